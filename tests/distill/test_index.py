"""The index of a shard against Python's tarfile, and what damaged shards and indexes do."""

from __future__ import annotations

import copy
import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tar_shards import make_shard

from edgeclip.distill import index as index_module
from edgeclip.distill.index import Member, ShardFiles, ShardIndex, index_document, index_path, open_index
from edgeclip.errors import InputError
from edgeclip.tensors import read_tensors, write_tensors

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def contents(index: ShardIndex) -> list[tuple[str, dict[str, bytes]]]:
    files = ShardFiles()
    return [
        (index.key(row), {m.extension: files.read(index.path, m) for m in index.members(row)})
        for row in range(index.samples)
    ]


@pytest.mark.parametrize("kind", list(FORMATS))
def test_members_are_grouped_by_key_as_webdataset_does(tmp_path: Path, kind: str) -> None:
    long = "folder/" + "n" * 180
    members = {
        "a.JPG": b"picture",
        "a.txt": b"",
        "a.syn.json": b"{}",
        "sub/b.c/0001.png": b"x" * 513,
        "./sub/b.c/0001.cls": b"7",
        "__meta__.json": b"left out",
        "nodot": b"left out",
        "猫.webp": b"cat",
        **({} if kind == "ustar" else {f"{long}.png": b"long"}),
    }
    shard = make_shard(tmp_path / "s.tar", members, layout=FORMATS[kind])
    found = open_index(shard)
    assert contents(found) == [
        ("a", {"jpg": b"picture", "txt": b"", "syn.json": b"{}"}),
        ("sub/b.c/0001", {"png": b"x" * 513, "cls": b"7"}),
        ("猫", {"webp": b"cat"}),
        *([] if kind == "ustar" else [(long, {"png": b"long"})]),
    ]
    assert found.size_bytes == shard.stat().st_size
    assert found.pictures == found.samples


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(
        st.tuples(
            st.from_regex(r"[a-c]{1,2}(/[a-c]{1,120})?\.(png|txt|syn\.json)", fullmatch=True),
            st.binary(max_size=1100),
        ),
        max_size=8,
    ),
    kind=st.sampled_from(sorted(FORMATS)),
)
def test_offsets_and_sizes_are_those_of_tarfile(
    tmp_path: Path, members: list[tuple[str, bytes]], kind: str
) -> None:
    if kind == "ustar":
        members = [(name, content) for name, content in members if len(name) <= 100]
    shard = make_shard(tmp_path / "s.tar", members, layout=FORMATS[kind])
    with tarfile.open(shard) as archive:
        expected = {(info.offset_data, info.size) for info in archive if info.isreg()}
    arrays, _ = read_tensors(index_document(shard))
    found = set(zip(arrays["offset"].tolist(), arrays["size"].tolist(), strict=True))
    assert found <= expected
    keys_and_extensions = {tuple(name.split(".", 1)) for name, _ in members}
    assert len(found) >= len(keys_and_extensions)


def test_samples_without_a_picture_are_indexed_but_not_counted_as_pictures(tmp_path: Path) -> None:
    found = open_index(
        make_shard(tmp_path / "s.tar", {"1.txt": b"a", "2.png": b"b", "3.npz": b"c", "4.jpeg": b"d"})
    )
    assert (found.samples, found.pictures) == (4, 2)
    assert [found.key(found.picture_row(number)) for number in range(2)] == ["2", "4"]
    assert found.extensions == {"txt": 1, "png": 1, "npz": 1, "jpeg": 1}


def test_of_two_members_with_one_name_the_first_counts(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", [("a.png", b"first"), ("a.png", b"second"), ("b.png", b"b")])
    assert contents(open_index(shard)) == [("a", {"png": b"first"}), ("b", {"png": b"b"})]


def test_folders_links_and_devices_are_nobodys_data(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    with tarfile.open(shard, "w") as archive:
        for name, kind in (
            ("d.png", tarfile.DIRTYPE),
            ("l.png", tarfile.SYMTYPE),
            ("f.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert open_index(shard).samples == 0


def test_equal_shards_have_equal_indexes_and_others_another_digest(tmp_path: Path) -> None:
    one = index_document(make_shard(tmp_path / "1.tar", {"a.png": b"12"}))
    assert one == index_document(make_shard(tmp_path / "2.tar", {"a.png": b"12"}))
    digests = {
        ShardIndex(Path(name), *read_tensors(index_document(make_shard(tmp_path / name, members)))).digest
        for name, members in (
            ("3.tar", {"a.png": b"12"}),
            ("4.tar", {"a.png": b"1"}),
            ("5.tar", {"b.png": b"12"}),
        )
    }
    assert len(digests) == 3


# Where an index is kept


def test_the_index_of_a_foreign_shard_is_kept_in_the_host_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1"})
    first = open_index(shard)
    monkeypatch.setattr(index_module, "index_document", lambda path: pytest.fail("scanned again"))
    assert open_index(shard).digest == first.digest
    assert not index_path(shard).exists()


def test_a_shard_that_was_replaced_is_scanned_again(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1"})
    open_index(shard)
    make_shard(shard, {f"{number}.png": b"1" for number in range(30)})
    assert open_index(shard).samples == 30


def test_an_index_beside_the_shard_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1"})
    index_path(shard).write_bytes(index_document(shard))
    monkeypatch.setattr(index_module, "index_document", lambda path: pytest.fail("scanned"))
    assert open_index(shard).key(0) == "a"


@pytest.mark.parametrize("damage", ["cut", "other kind", "of another shard"])
def test_an_index_beside_the_shard_that_does_not_fit_is_not_used(tmp_path: Path, damage: str) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1"})
    document = index_document(shard)
    other = make_shard(tmp_path / "o.tar", {f"{number}.png": b"1" for number in range(30)})
    index_path(shard).write_bytes(
        {"cut": document[:-3], "other kind": write_tensors({}), "of another shard": index_document(other)}[
            damage
        ]
    )
    assert contents(open_index(shard)) == [("a", {"png": b"1"})]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first", [0, 9]),
        ("offset", [1 << 40, 1536]),
        ("size", [1 << 40, 1]),
        ("size", [-1, 1]),
        ("extension", [0, 77]),
        ("key_end", [99]),
        ("pictures", [5]),
    ],
)
def test_an_index_whose_rows_lead_out_of_it_is_an_error(tmp_path: Path, name: str, value: list[int]) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1", "a.txt": b"2"})
    arrays, metadata = read_tensors(index_document(shard))
    arrays[name] = np.array(value, arrays[name].dtype)
    index_path(shard).write_bytes(write_tensors(arrays, metadata))
    with pytest.raises(InputError, match=r"index of shard '.*s\.tar' is damaged. Delete it"):
        open_index(shard).members(0)


def test_a_shard_that_changed_after_it_was_indexed_is_an_error(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1" * 600, "b.png": b"2"})
    found = open_index(shard)
    make_shard(shard, {"a.png": b"1", "b.png": b"2" * 600})
    with pytest.raises(
        InputError, match=r"s\.tar' was changed since it was indexed: no member of 1 bytes at byte 2,048"
    ):
        ShardFiles().read(shard, found.members(1)[0])


def test_a_member_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 1,099,511,627,776 bytes, expected at most"):
        ShardFiles().read(tmp_path / "s.tar", Member("png", 512, 1 << 40))


# Shards that cannot be used


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar"])
def test_compressed_shards_are_refused_by_name_and_by_content(tmp_path: Path, name: str) -> None:
    shard = tmp_path / name
    shard.write_bytes(gzip.compress(make_shard(tmp_path / "plain.tar", {"a.png": b"1"}).read_bytes()))
    with pytest.raises(
        InputError, match=rf"shard '.*{name}' is compressed, .* plain \.tar files. Decompress it"
    ):
        open_index(shard)


def test_a_pax_size_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"猫.png": b"x" * 9})
    content = shard.read_bytes().replace(b"path=", b"size=", 1)
    shard.write_bytes(content)
    with pytest.raises(InputError, match="a member of -1 bytes does not fit"):
        open_index(shard)


@pytest.mark.parametrize("kept", [0, 100, 512, 700, 1024, 1536])
def test_a_shard_that_was_cut_off_is_an_error(tmp_path: Path, kept: int) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1" * 600})
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"s\.tar' is not a whole tar file: at byte"):
        open_index(shard)


def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="at byte 0 there is no tar header"):
        open_index(shard)


def test_two_shards_joined_with_cat_are_an_error(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1"})
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(InputError, match="the file goes on; were two joined with cat"):
        open_index(shard)


def test_a_damaged_header_in_the_middle_is_an_error(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.png": b"1", "b.png": b"2"})
    content = bytearray(shard.read_bytes())
    content[1024 + 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="at byte 1,024 there is no tar header"):
        open_index(shard)


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.tar' cannot be read \(No such file"):
        open_index(tmp_path / "gone.tar")


def test_names_with_many_dots_are_an_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_MAX_EXTENSIONS", 3)
    shard = make_shard(tmp_path / "s.tar", {f"img.{number}.png": b"1" for number in range(4)})
    with pytest.raises(
        InputError, match=r"more than 3 kinds of members, such as '3\.png'. Keys must not contain"
    ):
        open_index(shard)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2047), value=st.integers(0, 255))
def test_any_changed_byte_gives_an_index_or_a_sentence(tmp_path: Path, place: int, value: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("猫.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    content = bytearray(buffer.getvalue())
    content[place] = value
    shard = tmp_path / "s.tar"
    shard.write_bytes(content)
    try:
        found = ShardIndex(shard, *read_tensors(index_document(shard)))
    except InputError:
        return
    json.dumps([found.key(row) for row in range(found.samples)])


def test_open_files_are_few_and_pickling_leaves_them_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_OPEN_FILES", 2)
    files = ShardFiles()
    for _ in range(2):
        for number in range(4):
            shard = make_shard(tmp_path / f"{number}.tar", {"a.png": b"%d" % number})
            assert files.read(shard, Member("png", 512, 1)) == b"%d" % number
            assert len(files._open) <= 2
    assert copy.copy(files)._open == {}
