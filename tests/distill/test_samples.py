"""Samples by number from shards, tables and folders: keys, captions by kind, digests."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tar_shards import make_shard, make_table, picture

from edgeclip.distill.index import index_document, index_path
from edgeclip.distill.samples import (
    BrokenLimit,
    FileSamples,
    JoinedSamples,
    ShardSamples,
    captions_of,
    find_shards,
    open_samples,
)
from edgeclip.errors import ConfigError, InputError
from edgeclip.tensors import read_tensors, write_tensors


def test_a_dataset_of_apples_layout_gives_captions_and_raw_members(tmp_path: Path) -> None:
    shard = make_shard(
        tmp_path / "00000000.tar",
        {
            "uid1.url.txt": b"https://example.com/1.jpg",
            "uid1.jpg": picture(1, kind="JPEG"),
            "uid1.txt": b" an alt text\n",
            "uid1.syn.json": b'{"syn_text": ["one", " two "], "syn_text_coca": ["three"]}',
            "uid1.paug.json": b'{"param_aug": []}',
            "uid1.npz": b"N",
            "uid1.json": b'{"uid": "uid1", "sha256": "0"}',
            "uid2.pth.gz": b"no picture",
        },
    )
    samples = ShardSamples([shard])
    assert len(samples) == 1
    sample = samples.read(0)
    assert (sample.key, sample.name) == ("00000000.tar/uid1", "uid1")
    assert sample.image == picture(1, kind="JPEG")
    assert sample.captions == {
        "alt": ("an alt text",),
        "synthetic": ("one", "two"),
        "synthetic_coca": ("three",),
    }
    assert sample.members["npz"] == b"N"
    assert set(sample.members) == {"url.txt", "jpg", "txt", "syn.json", "paug.json", "npz", "json"}


def test_a_shard_of_img2dataset_says_its_caption_once(tmp_path: Path) -> None:
    described = json.dumps({"caption": "a cat", "url": "u", "key": "0", "status": "success"}).encode()
    shard = make_shard(tmp_path / "s.tar", {"0.jpg": b"j", "0.json": described, "0.txt": b"a cat"})
    assert ShardSamples([shard]).read(0).captions == {"alt": ("a cat",)}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"caption": "a", "text": "b"}, {"alt": ("a",)}),
        ({"caption": "", "title": ["b", "c", ""]}, {"alt": ("b", "c")}),
        ({"caption_zh": "猫", "captions_de": ["Katze"]}, {"zh": ("猫",), "de": ("Katze",)}),
        ({"rewrite": "r", "rewrites": ["s"]}, {"rewrite": ("r", "s")}),
        ({"captions": ["a", "b"]}, {"alt": ("a", "b")}),
        ({"caption": "a", "captions": {"alt": ["b"], "x": "c"}}, {"alt": ("a", "b"), "x": ("c",)}),
        ({"caption": 7, "syn_text": None, "text_emb": [0.5], "captions": {"x": [1, None]}}, {}),
        ({"caption": "half a pair \ud800"}, {"alt": ("half a pair ?",)}),
    ],
)
def test_captions_of_columns(columns: dict[str, object], expected: dict[str, tuple[str, ...]]) -> None:
    assert captions_of(columns) == expected


@given(
    st.dictionaries(
        st.sampled_from(["caption", "captions", "syn_text", "caption_zh", "rewrites", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_any_json_gives_texts_or_nothing(columns: dict[str, object]) -> None:
    for texts in captions_of(columns).values():
        assert texts
        assert all(text and text == text.strip() and text.encode() for text in texts)


def test_a_table_gives_every_column_with_captions(tmp_path: Path) -> None:
    samples = open_samples([make_table(tmp_path, 3)])
    assert len(samples) == 3
    sample = samples.read(2)
    assert (sample.key, sample.image) == ("002.png", tmp_path / "002.png")
    assert sample.captions == {
        "alt": ("picture 2",),
        "zh": ("第2张图片",),
        "rewrite": ("an image, number 2", "no. 2"),
        "synthetic": ("noise 2 a", "noise 2 b", "noise 2 c"),
        "label": ("even",),
    }


def test_a_csv_table_may_name_files_anywhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    table = tmp_path / "tables/t.csv"
    table.parent.mkdir()
    table.write_text(f"filepath,title\n../a.png,one\n{tmp_path}/elsewhere/b.png,two\n", encoding="utf-8")
    samples = FileSamples(table)
    assert [os.path.normpath(samples.read(index).image) for index in range(2)] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "elsewhere/b.png"),
    ]
    assert samples.read(1).captions == {"alt": ("two",)}


def test_a_folder_gives_labels_and_the_texts_beside(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/2.png", "3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "cat/1.txt").write_text("a cat\n\nsitting\n", encoding="utf-8")
    samples = open_samples([tmp_path])
    found = {samples.key(i).removeprefix(f"{tmp_path}/"): samples.read(i).captions for i in range(3)}
    assert found == {
        "cat/1.png": {"alt": ("a cat", "sitting"), "label": ("cat",)},
        "dog/2.png": {"label": ("dog",)},
        "3.png": {},
    }


def test_names_that_are_no_text_are_read_and_shown_escaped(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as stream:  # noqa: PTH123 -- a path of bytes
        stream.write(picture(1))
    samples = open_samples([tmp_path])
    sample = samples.read(0)
    assert sample.key.endswith(r"\xff.png")
    assert isinstance(sample.image, Path)
    assert sample.image.read_bytes() == picture(1)


def test_shards_tables_and_folders_are_joined_in_order(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for number in range(2):
        make_shard(tmp_path / f"shards/s-{number:02d}.tar", {f"{number}.png": picture(number)})
    table = make_table(tmp_path / "t", 2)
    samples = open_samples([tmp_path / "shards", table, tmp_path / "shards/s-{00..01}.tar"])
    assert isinstance(samples, JoinedSamples)
    assert [samples.key(index) for index in range(len(samples))] == [
        "s-00.tar/0",
        "s-01.tar/1",
        "000.png",
        "001.png",
        "s-00.tar/0",
        "s-01.tar/1",
    ]
    assert samples.read(3).captions["alt"] == ("picture 1",)
    with pytest.raises(IndexError, match="sample 6 of 6"):
        samples.read(6)


def test_the_digest_follows_what_is_in_not_where_it_lies(tmp_path: Path) -> None:
    one, two = make_table(tmp_path / "1", 3), make_table(tmp_path / "2", 3)
    assert open_samples([one]).digest == open_samples([two]).digest
    assert open_samples([one]).digest != open_samples([make_table(tmp_path / "3", 4)]).digest
    two.write_text(two.read_text(encoding="utf-8").replace("picture 1", "picture I"), encoding="utf-8")
    assert open_samples([one]).digest != open_samples([two]).digest
    assert open_samples([one, two]).digest != open_samples([two, one]).digest
    assert open_samples([tmp_path / "1"]).digest == open_samples([tmp_path / "2"]).digest

    shards = [make_shard(tmp_path / name / "s.tar", {"a.png": b"1"}) for name in ("1", "2")]
    assert ShardSamples(shards[:1]).digest == ShardSamples(shards[1:]).digest


def test_copies_for_workers_read_the_same(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": picture(1), "a.txt": b"a"})
    for samples in (ShardSamples([shard]), FileSamples(make_table(tmp_path, 2))):
        again = copy.deepcopy(samples)
        assert again.digest == samples.digest
        assert again.read(0).captions == samples.read(0).captions


# What cannot be read


def test_a_sample_with_damaged_json_is_an_error_of_that_sample(tmp_path: Path) -> None:
    shard = make_shard(
        tmp_path / "s.tar", {"a.png": b"1", "a.syn.json": b"{", "b.png": b"2", "b.json": b"[1]"}
    )
    samples = ShardSamples([shard])
    with pytest.raises(InputError, match=r"s\.tar/a\.syn\.json: is not JSON"):
        samples.read(0)
    assert samples.read(1).captions == {}


def test_an_index_that_promises_a_picture_is_an_error_of_that_sample(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1", "b.txt": b"2"})
    arrays, metadata = read_tensors(index_document(shard))
    arrays["pictures"] = np.array([0, 1], arrays["pictures"].dtype)
    index_path(shard).write_bytes(write_tensors(arrays, metadata))
    samples = ShardSamples([shard])
    assert samples.read(0).image == b"1"
    with pytest.raises(InputError, match=r"index of shard '.*s\.tar' is damaged: 'b' has no picture"):
        samples.read(1)


def test_a_caption_file_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "a.txt").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(InputError, match=r"a\.txt': expected at most 1048576 bytes"):
        open_samples([tmp_path]).read(0)


def test_a_folder_with_compressed_shards_is_refused(tmp_path: Path) -> None:
    make_shard(tmp_path / "s.tar.gz", {"a.png": b"1"}, mode="w:gz")
    with pytest.raises(InputError, match=r"s\.tar\.gz' is compressed"):
        open_samples([tmp_path])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.tar", r"shard '.*gone\.tar': no such file"),
        ("gone.jsonl", r"gone\.jsonl': no such file or folder"),
        ("empty", r"no samples in '.*empty': expected pictures"),
        ("s-{5..2}.tar", r"the range \{5\.\.2\} has -2 members"),
        ("s-{0..1}.tar", r"shard '.*s-0\.tar': no such file"),
    ],
)
def test_paths_that_give_nothing_are_errors(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        open_samples([tmp_path / path])


def test_a_folder_without_shards_is_an_error_where_shards_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.tar files"):
        find_shards([tmp_path])


# Limits


@pytest.mark.parametrize(
    ("text", "samples", "allowed"),
    [("0", 5, 0), ("3", 2, 2), ("3", 900, 3), ("1%", 250, 3), ("7%", 100, 7), ("100%", 7, 7)],
)
def test_limits_of_broken_samples(text: str, samples: int, allowed: int) -> None:
    assert BrokenLimit.parse(text).allowed(samples) == allowed


def test_the_usual_limit_is_a_share_and_a_count() -> None:
    assert [BrokenLimit().allowed(samples) for samples in (10, 1000, 10**8)] == [1, 10, 10_000]


@pytest.mark.parametrize("text", ["", "many", "-1", "101%", "1.5", "nan%"])
def test_limits_that_mean_nothing_are_errors(text: str) -> None:
    with pytest.raises(ConfigError, match=f"limit of broken samples is '{text}', expected a count"):
        BrokenLimit.parse(text)
