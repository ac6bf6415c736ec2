"""Shards: what is written, that it repeats, that a killed run goes on, and what a check finds."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tar_shards import make_shard, make_table, picture

from edgeclip.distill import shards as shards_module
from edgeclip.distill.index import index_document
from edgeclip.distill.samples import BrokenLimit, ShardSamples, open_samples
from edgeclip.distill.shard_checks import inspect_shards, validate_samples
from edgeclip.distill.shards import MANIFEST_NAME, write_shards
from edgeclip.errors import ConfigError, InputError, MissingExtraError
from edgeclip.storage import DirectoryLock

pytest.importorskip("webdataset")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return make_table(tmp_path / "files", 12)


# Writing


def test_what_goes_in_comes_out(table: Path, tmp_path: Path) -> None:
    source = open_samples([table])
    report = write_shards(source, tmp_path / "shards", samples_per_shard=5)
    assert (report.status, report.shards, report.samples, report.broken) == ("written", 3, 12, ())
    written = open_samples([tmp_path / "shards"])
    assert report.digest == written.digest
    assert [index.pictures for index in written.indexes] == [5, 5, 2]  # type: ignore[attr-defined]
    for number in range(12):
        sample, original = written.read(number), source.read(number)
        assert sample.key == f"shard-{number // 5:06d}.tar/{number:09d}"
        assert sample.captions == original.captions
        assert isinstance(original.image, Path)
        assert sample.image == original.image.read_bytes()
        assert json.loads(sample.members["json"])["key"] == original.key


def test_another_reader_of_webdataset_reads_them(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=20)
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with (tmp_path / "shards/shard-000000.tar").open("rb") as stream:
        found = list(group_by_keys({"__url__": "", **member} for member in tar_file_iterator(stream)))
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(12)]
    assert found[3]["txt"] == b"picture 3"
    assert found[3]["png"] == (table.parent / "003.png").read_bytes()
    assert json.loads(found[3]["syn.json"]) == {"syn_text": ["noise 3 a", "noise 3 b", "noise 3 c"]}
    assert found[3]["cls"] == b"odd"
    assert json.loads(found[3]["json"])["captions"] == {
        "rewrite": ["an image, number 3", "no. 3"],
        "zh": ["第3张图片"],
    }


def test_shards_are_plain_tar_files_without_times_and_users(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "shards")
    with tarfile.open(tmp_path / "shards/shard-000000.tar") as archive:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in archive} == {
            (0, 0, 0, "", 0o644)
        }


def test_shards_of_others_keep_their_members_and_keys(tmp_path: Path) -> None:
    members = {
        "uid1.jpg": picture(1, kind="JPEG"),
        "uid1.txt": b"one",
        "uid1.npz": b"N" * 700,
        "uid1.paug.json": b'{"param_aug": []}',
        "uid1.syn.json": b'{"syn_text": ["s"]}',
        "猫.webp": picture(2, kind="WEBP"),
    }
    write_shards(open_samples([make_shard(tmp_path / "foreign.tar", members)]), tmp_path / "shards")
    with tarfile.open(tmp_path / "shards/shard-000000.tar") as archive:
        assert {info.name: archive.extractfile(info).read() for info in archive} == members  # type: ignore[union-attr]


def test_keys_that_meet_in_one_shard_are_told_apart(tmp_path: Path) -> None:
    shards = [make_shard(tmp_path / f"{n}.tar", {"0.png": picture(n), "1.png": picture(9)}) for n in (1, 2)]
    write_shards(open_samples(shards), tmp_path / "shards")
    written = open_samples([tmp_path / "shards"])
    assert [written.read(number).name for number in range(4)] == ["0", "1", "0-2", "1-2"]
    assert written.read(2).image == picture(2)


def test_a_shard_ends_before_it_grows_too_large(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "one", samples_per_shard=1)
    content = max(path.stat().st_size for path in (tmp_path / "one").glob("*.tar"))
    report = write_shards(open_samples([table]), tmp_path / "few", size_limit=4 * content)
    assert report.shards < 12
    # a tar file is filled up with zeros to a multiple of 10,240 bytes
    assert all(p.stat().st_size <= 4 * content + 10_240 for p in (tmp_path / "few").glob("*.tar"))
    assert write_shards(open_samples([table]), tmp_path / "each", size_limit=1).shards == 12


def test_the_same_samples_give_the_same_bytes(table: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_shards(open_samples([table]), tmp_path / name, samples_per_shard=5)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_the_index_beside_a_shard_is_the_one_a_scan_gives(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    for shard in (tmp_path / "shards").glob("*.tar"):
        assert shard.with_suffix(".index").read_bytes() == index_document(shard)


# Going on


def test_a_directory_that_is_complete_is_left_as_it_is(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    report = write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    assert (report.status, report.kept) == ("present", 3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before


@pytest.mark.parametrize("damage", ["changed", "removed", "index removed", "index changed"])
def test_what_is_damaged_is_written_again(table: Path, tmp_path: Path, damage: str) -> None:
    write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    whole = files(tmp_path / "shards")
    shard = tmp_path / "shards/shard-000001.tar"
    if damage == "changed":
        shard.write_bytes(shard.read_bytes()[:-1] + b"1")
    elif damage == "removed":
        shard.unlink()
    elif damage == "index removed":
        shard.with_suffix(".index").unlink()
    else:
        shard.with_suffix(".index").write_bytes(b"x")
    report = write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    assert files(tmp_path / "shards") == whole
    assert report.kept == (3 if "index" in damage else 1)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_that_fails_anywhere_is_finished_by_the_next(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    write_shards(open_samples([table]), tmp_path / "whole", samples_per_shard=5)
    calls = 0

    def failing(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise OSError(28, "No space left on device")
        real(path, content)

    real = shards_module._put
    monkeypatch.setattr(shards_module, "_put", failing)
    try:
        write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
        assert step > 7  # a manifest at first, then an index and a manifest for each of three shards
    except InputError as error:
        assert "shards' cannot be written (No space left on device)" in str(error)  # noqa: PT017
    monkeypatch.undo()
    write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    assert files(tmp_path / "shards") == files(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_that_are_killed_are_finished_by_the_last(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(open_samples([table]), tmp_path / "whole", samples_per_shard=2)
    rng = np.random.default_rng(0)
    killed = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:  # this one dies by itself, between two samples or between two files
            left = int(rng.integers(1, 12))

            def dying(real: Callable[..., Any]) -> Callable[..., Any]:
                def counted(*arguments: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments)

                return counted

            monkeypatch.setattr(shards_module, "_put", dying(shards_module._put))
            monkeypatch.setattr(shards_module, "_size_of", dying(shards_module._size_of))
            write_shards(open_samples([table]), tmp_path / "s", samples_per_shard=2)
            os._exit(0)
        rng.integers(1, 12)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    write_shards(open_samples([table]), tmp_path / "s", samples_per_shard=2)
    assert killed > 3
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_shards_made_otherwise_are_not_mixed(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    with pytest.raises(
        InputError, match=r"holds shards made otherwise: samples per shard is 5, not 6. Remove it"
    ):
        write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=6)
    other = make_table(tmp_path / "other", 13)
    with pytest.raises(
        InputError, match=r"the digest of the samples is .*, the number of samples is 12, not 13"
    ):
        write_shards(open_samples([other]), tmp_path / "shards", samples_per_shard=5)


# Errors


def test_a_directory_with_other_things_is_left_alone(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="files' is there already and holds no shards of ours"):
        write_shards(open_samples([table]), table.parent)
    with pytest.raises(InputError, match=r"table\.jsonl' is a file, expected a directory"):
        write_shards(open_samples([table]), table)
    assert len(files(table.parent)) == 13


def test_a_damaged_manifest_is_an_error(table: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / MANIFEST_NAME).write_text('{"schema": 2}', encoding="utf-8")
    with pytest.raises(
        InputError, match=r"shards\.json' is no manifest of shards \(.*schema.*\)\. Remove it"
    ):
        write_shards(open_samples([table]), tmp_path / "shards")


def test_a_manifest_cannot_lead_out_of_its_directory(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "shards")
    path = tmp_path / "shards" / MANIFEST_NAME
    path.write_text(path.read_text().replace("shard-000000.tar", "../shard-000000.tar"))
    with pytest.raises(InputError, match="is no manifest of shards"):
        validate_samples([tmp_path / "shards"])


def test_a_directory_in_use_is_an_error(table: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    lock = DirectoryLock(tmp_path / "shards")
    with pytest.raises(InputError, match="shards' is being written by another process"):
        write_shards(open_samples([table]), tmp_path / "shards")
    lock.release()


@pytest.mark.parametrize("name", ["samples_per_shard", "size_limit"])
def test_sizes_below_one_are_errors(table: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"shards: {name} is 0, expected 1 or more"):
        write_shards(open_samples([table]), tmp_path / "shards", **{name: 0})  # type: ignore[arg-type]


def test_without_webdataset_the_error_names_the_extra(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.writer", None)
    with pytest.raises(
        MissingExtraError, match=r"writing shards needs the package 'webdataset'.*edgeclip\[train\]"
    ):
        write_shards(open_samples([table]), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


# Broken samples


def test_pictures_that_are_none_are_left_out_and_named(table: Path, tmp_path: Path) -> None:
    (table.parent / "003.png").write_bytes(b"<html>")
    (table.parent / "007.png").unlink()
    (table.parent / "011.png").write_bytes(b"")
    samples = open_samples([table])
    limit = BrokenLimit(share=1.0)
    report = write_shards(samples, tmp_path / "shards", samples_per_shard=3, limit=limit)
    assert [(one.index, one.key) for one in report.broken] == [
        (3, "003.png"),
        (7, "007.png"),
        (11, "011.png"),
    ]
    assert (
        report.broken[0].reason
        == "003.png: is no picture of a known format ("
        + ", ".join(["JPEG", "PNG", "WebP", "GIF", "TIFF", "BMP", "AVIF", "PPM"])
        + ")."
    )
    assert report.broken[1].reason.endswith("007.png': no such file.")
    assert report.samples == 9
    again = write_shards(samples, tmp_path / "shards", samples_per_shard=3, limit=limit)
    assert (again.status, again.broken) == ("present", report.broken)
    written = open_samples([tmp_path / "shards"])
    assert [written.read(i).captions["alt"][0] for i in range(9)] == [
        f"picture {number}" for number in range(11) if number not in (3, 7)
    ]


def test_too_many_broken_samples_are_an_error_and_what_was_written_stays(table: Path, tmp_path: Path) -> None:
    whole = files_of(table, tmp_path / "whole")
    contents = {name: (table.parent / name).read_bytes() for name in ("008.png", "010.png")}
    for name in contents:
        (table.parent / name).write_bytes(b"broken")
    with pytest.raises(
        InputError, match=r"2 of 12 samples cannot be used, 1 are allowed; the last one is '010\.png'"
    ):
        write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    for name, content in contents.items():
        (table.parent / name).write_bytes(content)
    report = write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=5)
    assert report.status == "resumed"
    assert files(tmp_path / "shards") == whole


def files_of(table: Path, directory: Path) -> dict[str, bytes]:
    write_shards(open_samples([table]), directory, samples_per_shard=5)
    return files(directory)


def test_nothing_but_broken_samples_is_an_error(tmp_path: Path) -> None:
    table = make_table(tmp_path / "files", 3)
    for path in table.parent.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 3 samples can be used; the last one is '002\.png'"):
        write_shards(open_samples([table]), tmp_path / "shards", limit=BrokenLimit(share=1.0))


def test_a_run_that_failed_before_its_first_shard_binds_nobody(table: Path, tmp_path: Path) -> None:
    bad = make_table(tmp_path / "bad", 2)
    for path in bad.parent.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="2 of 2 samples cannot be used, 1 are allowed"):
        write_shards(open_samples([bad]), tmp_path / "shards")
    assert write_shards(open_samples([table]), tmp_path / "shards").status == "written"


# Looking and checking


def test_inspect_counts_members_and_captions(table: Path, tmp_path: Path) -> None:
    write_shards(open_samples([table]), tmp_path / "shards", samples_per_shard=8)
    found = inspect_shards([tmp_path / "shards"])
    assert found.samples == found.looked_at == 12
    assert [shard.samples for shard in found.shards] == [8, 4]
    assert found.shards[0].extensions == {"cls": 8, "json": 8, "png": 8, "syn.json": 8, "txt": 8}
    assert found.captions == {
        "alt": (12, 1.0),
        "label": (12, 1.0),
        "rewrite": (12, 2.0),
        "synthetic": (12, 3.0),
        "zh": (12, 1.0),
    }
    assert found.first is not None
    assert found.first[0] == "shard-000000.tar/000000000"
    assert found.digest == ShardSamples([shard.path for shard in found.shards]).digest


def test_inspect_counts_samples_without_a_picture(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "s.tar", {"a.txt": b"x", "b.png": picture(1), "b.json": b"{"})
    found = inspect_shards([shard])
    assert [(one.samples, one.without_picture) for one in found.shards] == [(1, 1)]
    assert (found.unreadable, found.first) == (1, None)


@pytest.mark.parametrize(("samples", "looked_at"), [(201, 101), (399, 200), (400, 200)])
def test_inspect_looks_at_two_hundred_samples_at_most(tmp_path: Path, samples: int, looked_at: int) -> None:
    shard = make_shard(tmp_path / "s.tar", {f"{number:03d}.png": b"" for number in range(samples)})
    assert inspect_shards([shard]).looked_at == looked_at


def test_validate_finds_every_kind_of_broken_sample(tmp_path: Path) -> None:
    good = picture(1)
    shard = make_shard(
        tmp_path / "s.tar",
        {
            "good.png": good,
            "good.txt": b"text",
            "half.png": good[: len(good) // 2],
            "none.jpg": b"<html>",
            "json.png": good,
            "json.paug.json": b"{",
            "syn.png": good,
            "syn.syn.json": b"no",
            "mute.png": good,
        },
    )
    found = validate_samples([shard], workers=2)
    assert (found.samples, found.without_caption, found.captions) == (6, 1, {"alt": 1})
    assert [(one.index, one.key) for one in found.broken] == [
        (1, "s.tar/half"),
        (2, "s.tar/none"),
        (3, "s.tar/json"),
        (4, "s.tar/syn"),
    ]
    assert "its member 'paug.json' is not JSON" in found.broken[2].reason
    assert found.damaged == {}


def test_validate_goes_on_after_a_damaged_shard(tmp_path: Path) -> None:
    make_shard(tmp_path / "1.tar", {"a.png": picture(1)})
    whole = make_shard(tmp_path / "2.tar", {"a.png": picture(1)}).read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[:700])
    make_shard(tmp_path / "3.tar", {"a.png": picture(1)})
    found = validate_samples([tmp_path])
    assert found.samples == 2
    assert list(found.damaged) == [str(tmp_path / "2.tar")]
    assert "is not a whole tar file" in found.damaged[str(tmp_path / "2.tar")]


def test_validate_compares_with_the_manifest(table: Path, tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    write_shards(open_samples([table]), directory, samples_per_shard=4)
    assert validate_samples([directory]).damaged == {}
    content = bytearray((directory / "shard-000000.tar").read_bytes())
    content[512] ^= 1
    (directory / "shard-000000.tar").write_bytes(content)
    (directory / "shard-000001.tar").unlink()
    make_shard(directory / "shard-000009.tar", {"a.png": picture(1)})
    (directory / "shard-000002.tar").unlink()
    (directory / "shard-000002.tar").mkdir()
    damaged = {Path(path).name: reason for path, reason in validate_samples([directory]).damaged.items()}
    assert damaged == {
        "shard-000000.tar": damaged["shard-000000.tar"],
        "shard-000001.tar": "is missing",
        "shard-000002.tar": damaged["shard-000002.tar"],
        "shard-000009.tar": "is not in shards.json, which has 3 shards",
    }
    assert damaged["shard-000000.tar"].startswith("is not what shards.json says (sha256 ")
    assert "cannot be read (Is a directory)" in damaged["shard-000002.tar"]


def test_validate_says_where_writing_was_stopped(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (table.parent / "006.png").unlink()
    with pytest.raises(InputError, match="1 of 12"):
        write_shards(open_samples([table]), tmp_path / "s", samples_per_shard=5, limit=BrokenLimit(share=0.0))
    assert list(validate_samples([tmp_path / "s"]).damaged.values()) == [
        "says that 5 of 12 samples were written: make-shards was stopped; run it again"
    ]


def test_validate_checks_tables_too(tmp_path: Path) -> None:
    table = make_table(tmp_path, 5, broken=frozenset({2}))
    found = validate_samples([table])
    assert [(one.index, one.key) for one in found.broken] == [(2, "002.png")]


def test_validate_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.tar': no such file"):
        validate_samples([tmp_path / "gone.tar"])
    empty = make_shard(tmp_path / "empty.tar", {"a.txt": b"no picture"})
    with pytest.raises(InputError, match=r"no samples in '.*empty\.tar'"):
        validate_samples([empty])
