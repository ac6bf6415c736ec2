"""Picture indexes: what an update does, what survives, what a search finds."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, EMBED_DIM, colour_picture, make_tiny_bundle

from edgeclip import index_file
from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import ConfigError, InputError
from edgeclip.index import IndexReport, index_folder, made_with, update_index
from edgeclip.index_file import Entry, Journal, MadeWith, PictureIndex, Stat, write_index
from edgeclip.reject import NegativesGate, open_gate, read_background
from edgeclip.search import LEAST_PICTURES, LEAST_RELEVANCE, Searcher, nearest

TOOLS = Path(__file__).parent / "tools"
OLD_NS = 1_700_000_000_000_000_000


def put(folder: Path, name: str, colour: str = "red", seed: int = 0) -> Path:
    """Write a picture whose time of change is long ago, as that of most pictures."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colour_picture(colour, seed=seed)).save(path, "PNG")
    os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(COLOURS):
        put(folder, f"{'inner/' if number % 2 else ''}{name}.png", name)
    return folder


@pytest.fixture(scope="module")
def classifier(tiny_bundle_session: Path) -> Iterator[ZeroShotClassifier]:
    with ZeroShotClassifier.open(tiny_bundle_session) as opened:
        yield opened


class Counting:
    """A classifier that remembers what it embedded, and is interrupted after some pictures."""

    def __init__(self, classifier: ZeroShotClassifier, stop_after: int | None = None) -> None:
        self.classifier, self.stop_after = classifier, stop_after
        self.names: list[str] = []

    def embed_stream(self, images: Iterable[Path], *, batch_size: int | None = None) -> Iterator[Any]:
        for each in self.classifier.embed_stream(images, batch_size=batch_size):
            if self.stop_after is not None and len(self.names) >= self.stop_after:
                raise KeyboardInterrupt
            self.names.append(each.source.name)
            yield each


@pytest.fixture
def update(classifier: ZeroShotClassifier) -> Callable[..., IndexReport]:
    made = made_with(classifier.bundle, classifier.choice.variant)
    return lambda folder, embedder=classifier, **more: update_index(folder, embedder, made, **more)


def counts(report: IndexReport) -> tuple[int, int, int, int, int]:
    return report.pictures, report.embedded, report.recognised, report.removed, report.unchanged


# --- what an update does -----------------------------------------------------------------------------------


def test_rows_are_those_of_embed_images(update, classifier, photos: Path) -> None:
    report = update(photos)
    index = PictureIndex(report.path)
    index.check()
    assert report.path == photos / ".edgeclip-index"
    assert list(index.paths) == sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    expected = np.stack([classifier.embed_images(photos / name) for name in index.paths])
    np.testing.assert_array_equal(index.embeddings, expected)
    assert sorted(path.name for path in photos.iterdir() if path.is_file())[0] == ".edgeclip-index"
    assert not list(photos.glob(".edgeclip-index.*"))  # neither lock nor journal are left


def test_what_is_as_it_was_is_not_looked_at(update, classifier, photos: Path) -> None:
    update(photos)
    before = (photos / ".edgeclip-index").stat()
    counting = Counting(classifier)
    assert counts(update(photos, counting)) == (8, 0, 0, 0, 8)
    assert counting.names == []
    after = (photos / ".edgeclip-index").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)  # not written again


def test_new_changed_moved_copied_touched_and_removed(update, classifier, photos: Path) -> None:
    update(photos)
    put(photos, "new.png", "red", seed=5)
    put(photos, "red.png", "black", seed=6)  # same time, another content and size or inode
    (photos / "blue.png").rename(photos / "sky.png")
    shutil.copy(photos / "inner" / "green.png", photos / "grass.png")
    os.utime(photos / "inner" / "yellow.png")
    (photos / "white.png").unlink()
    counting = Counting(classifier)
    report = update(photos, counting)
    assert sorted(counting.names) == ["new.png", "red.png"]
    assert counts(report) == (9, 2, 2, 2, 5)
    index = PictureIndex(report.path)
    for name, row in zip(index.paths, index.embeddings, strict=True):
        np.testing.assert_array_equal(row, classifier.embed_images(photos / name))
    assert "white.png" not in index.paths
    assert "blue.png" not in index.paths


def test_a_change_that_does_not_show_is_seen_by_verify(update, classifier, photos: Path) -> None:
    path = photos / "red.png"
    content = path.read_bytes()
    update(photos)
    with path.open("r+b") as stream:  # same inode, size and time
        stream.write(content[:-1] + b"\x01")
    os.utime(path, ns=(OLD_NS, OLD_NS))
    assert counts(update(photos)) == (8, 0, 0, 0, 8)
    assert counts(update(photos, verify=True)) == (8, 1, 0, 0, 7)
    before = (photos / ".edgeclip-index").stat().st_mtime_ns
    assert counts(update(photos, verify=True)) == (8, 0, 0, 0, 8)
    assert (photos / ".edgeclip-index").stat().st_mtime_ns == before


def test_a_change_within_the_tick_of_the_clock_is_seen(update, photos: Path) -> None:
    path = photos / "red.png"
    os.utime(path)  # changed just now: another change may leave this time as it is
    now = path.stat().st_mtime_ns
    update(photos)
    with path.open("r+b") as stream:  # same inode and size
        stream.write(path.read_bytes()[:-1] + b"\x01")
    os.utime(path, ns=(now, now))
    assert update(photos).embedded == 1


def test_broken_pictures_are_remembered_until_they_change(update, classifier, photos: Path) -> None:
    bad = photos / "bad.png"
    bad.write_bytes(b"no picture at all")
    os.utime(bad, ns=(OLD_NS, OLD_NS))
    said: list[tuple[str, str]] = []
    report = update(photos, on_failure=lambda *each: said.append(each))
    assert said == [("bad.png", report.broken["bad.png"])]
    assert "is no picture format known here" in report.broken["bad.png"]
    assert "bad.png" not in report.broken["bad.png"]  # it may be moved
    counting = Counting(classifier)
    again = update(photos, counting)
    assert (counting.names, again.failed, list(again.broken)) == ([], {}, ["bad.png"])
    assert list(PictureIndex(again.path).broken) == ["bad.png"]
    update(photos, counting, verify=True)
    assert counting.names == ["bad.png"]
    put(photos, "bad.png", "red", seed=9)
    assert update(photos, counting).broken == {}


def test_what_cannot_be_opened_is_tried_each_time(update, photos: Path) -> None:
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    for _ in range(2):
        report = update(photos)
        assert report.failed == {"gone.png": "cannot be opened (No such file or directory)"}
        assert report.broken == {}
    put(photos, "nowhere.png", "red", seed=7)
    report = update(photos)
    assert (report.failed, report.pictures) == ({}, 10)


def test_a_picture_that_changes_while_it_is_read_is_read_again(update, classifier, photos: Path) -> None:
    class Changing(Counting):
        def embed_stream(self, images: Iterable[Path], *, batch_size: int | None = None) -> Iterator[Any]:
            for each in super().embed_stream(images, batch_size=batch_size):
                if each.source.name == "red.png":
                    put(photos, "red.png", "black", seed=3)
                yield each

    update(photos, Changing(classifier))
    counting = Counting(classifier)
    index = PictureIndex(update(photos, counting).path)
    assert counting.names == ["red.png"]
    row = index.embeddings[list(index.paths).index("red.png")]
    np.testing.assert_array_equal(row, classifier.embed_images(photos / "red.png"))


def test_a_known_picture_that_can_no_longer_be_opened_is_dropped(update, photos: Path) -> None:
    update(photos)
    (photos / "red.png").unlink()
    (photos / "red.png").symlink_to(photos / "nowhere.png")
    assert list(update(photos).failed) == ["red.png"]
    assert "red.png" not in PictureIndex(photos / ".edgeclip-index").paths


def test_odd_names(update, photos: Path) -> None:
    names = [b"line\nfeed.png", b"latin-\xe9.png", "猫.png".encode()]
    for number, name in enumerate(names):
        put(photos, os.fsdecode(name), "red", seed=20 + number)
    index = PictureIndex(update(photos).path)
    assert {os.fsdecode(name) for name in names} <= set(index.paths)
    assert update(photos).unchanged == 11


def test_a_folder_that_cannot_be_listed_keeps_its_pictures(
    update, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(photos)
    (photos / "red.png").unlink()
    listed = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("edgeclip.data.os.scandir", refuse)
    skipped: list[Path] = []
    report = update(photos, on_skipped=lambda path, _: skipped.append(path))
    assert skipped == [photos / "inner"]
    assert counts(report) == (7, 0, 0, 1, 7)
    with pytest.raises(InputError, match=r"inner.*cannot be listed"):
        update(photos)


def test_a_disk_that_is_not_there_empties_no_index(update, photos: Path, tmp_path: Path) -> None:
    update(photos, path=tmp_path / "index")
    shutil.rmtree(photos)
    photos.mkdir()
    with pytest.raises(InputError, match="holds no pictures, but its index has 8"):
        update(photos, path=tmp_path / "index")
    assert len(PictureIndex(tmp_path / "index")) == 8
    assert update(photos, path=tmp_path / "index", rebuild=True).pictures == 0


def test_the_index_moves_with_its_folder(update, classifier, photos: Path, tmp_path: Path) -> None:
    update(photos)
    moved = photos.rename(tmp_path / "moved")
    counting = Counting(classifier)
    assert update(moved, counting).unchanged == 8
    assert counting.names == []
    index = PictureIndex(moved / ".edgeclip-index")
    assert index.root / index.paths[0] == moved / index.paths[0]


def test_an_index_elsewhere_knows_its_folder(update, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "index"
    path.parent.mkdir()
    update(photos, path=path)
    assert PictureIndex(path).root == photos
    other = tmp_path / "other"
    put(other, "a.png")
    with pytest.raises(ConfigError, match=r"is of the folder .*photos.*, got .*other"):
        update(other, path=path)
    moved = photos.rename(tmp_path / "moved")
    assert update(moved, path=path).unchanged == 8
    assert PictureIndex(path).root == moved


def test_another_folder_with_the_same_names_is_refused(update, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "index"
    update(photos, path=path)
    before = path.read_bytes()
    for name in list(COLOURS):  # as the pictures of two cameras
        put(tmp_path / "other", (photos / f"{name}.png").name, "red", seed=50 + len(name))
        put(tmp_path / "other", f"inner/{name}.png", "red", seed=60 + len(name))
    with pytest.raises(ConfigError, match="is of the folder"):
        update(tmp_path / "other", path=path)
    assert path.read_bytes() == before


def test_pictures_of_the_future_do_not_write_the_index_each_time(update, classifier, photos: Path) -> None:
    future_ns = 4_000_000_000_000_000_000  # a camera whose clock is wrong; such a time tells of no change
    os.utime(photos / "red.png", ns=(future_ns, future_ns))
    before = update(photos).path.stat().st_mtime_ns
    counting = Counting(classifier)
    assert counts(update(photos, counting)) == (8, 0, 0, 0, 8)
    assert counting.names == []
    assert (photos / ".edgeclip-index").stat().st_mtime_ns == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs a list of what is mapped")
def test_no_map_of_the_old_index_is_left_where_that_keeps_it_from_being_replaced(
    update, classifier, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[bool] = []

    def write(path: Path, *rest: Any) -> None:
        mapped.append(str(path) in Path("/proc/self/maps").read_text())
        write_index(path, *rest)

    monkeypatch.setattr("edgeclip.index.write_index", write)
    update(photos)
    for number, replaces in enumerate((True, False)):
        monkeypatch.setattr("edgeclip.index._REPLACES_MAPPED", replaces)
        put(photos, f"new-{number}.png", "red", seed=70 + number)
        assert counts(update(photos))[:2] == (9 + number, 1)
    assert mapped == [False, True, False]
    index = PictureIndex(photos / ".edgeclip-index")
    expected = np.stack([classifier.embed_images(photos / name) for name in index.paths])
    np.testing.assert_array_equal(index.embeddings, expected)


def test_another_name_of_the_same_model_is_no_other_model(update, classifier, photos: Path) -> None:
    update(photos)
    made = replace(made_with(classifier.bundle, classifier.choice.variant), model="renamed")
    assert counts(update_index(photos, classifier, made)) == (8, 0, 0, 0, 8)


def test_a_folder_whose_name_is_no_text(update, photos: Path, tmp_path: Path) -> None:
    odd = photos.rename(tmp_path / os.fsdecode(b"latin-\xe9"))
    for path in (odd / ".edgeclip-index", tmp_path / "beside", tmp_path / "else" / "where"):
        path.parent.mkdir(exist_ok=True)
        update(odd, path=path)
        assert PictureIndex(path).root.resolve() == odd
        assert update(odd, path=path).unchanged == 8


def test_relative_to_the_index_where_the_folder_lies_with_it(tmp_path: Path) -> None:
    assert index_folder(tmp_path / "a" / ".edgeclip-index", tmp_path / "a") == "."
    assert index_folder(tmp_path / "index", tmp_path / "a" / "b") == "a/b"
    assert index_folder(tmp_path / "a" / "index", tmp_path / "b") == str(tmp_path / "b")


# --- what it refuses ---------------------------------------------------------------------------------------


def test_another_model_or_variant_is_refused(update, photos: Path, tmp_path: Path) -> None:
    update(photos)
    other = make_tiny_bundle(tmp_path / "other", seed=1)
    said = r"made with model 'tiny-colours' \(space .*--rebuild"
    with ZeroShotClassifier.open(other) as opened, pytest.raises(ConfigError, match=said):
        update_index(photos, opened, made_with(other, opened.choice.variant))


def test_another_variant_is_refused_and_rebuild_takes_it(
    update, tiny_bundle_session: Path, photos: Path
) -> None:
    update(photos)
    with ZeroShotClassifier.open(tiny_bundle_session, variant="onnx-fp32") as opened:
        made = made_with(opened.bundle, opened.choice.variant)
        with pytest.raises(ConfigError, match=r"made with variant 'onnx-int8' .*got 'onnx-fp32'"):
            update_index(photos, opened, made)
        report = update_index(photos, opened, made, rebuild=True)
    assert report.embedded == 8
    assert PictureIndex(report.path).made_with == made


def test_one_at_a_time(update, classifier, photos: Path) -> None:
    def again(name: str, reason: str) -> None:
        with pytest.raises(ConfigError, match="another process is making it"):
            update(photos)
        seen.append(name)

    seen: list[str] = []
    (photos / "bad.png").write_bytes(b"x")
    update(photos, on_failure=again)
    assert seen == ["bad.png"]


def test_paths_that_are_no_folder(update, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        update(tmp_path / "none")
    with pytest.raises(InputError, match="is no folder, expected a folder"):
        update(photos / "red.png")
    with pytest.raises(InputError, match="is a folder, expected a file"):
        update(photos, path=photos / "inner")
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\)"):
        update(photos, path=tmp_path / "none" / "index")


def test_a_file_that_is_no_index_is_not_replaced(update, photos: Path) -> None:
    path = photos / "red.png"
    before = path.read_bytes()
    for rebuild in (False, True):
        with pytest.raises(InputError, match="no picture index, so it is not replaced"):
            update(photos, path=path, rebuild=rebuild)
    assert path.read_bytes() == before


# --- what survives -----------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(update, classifier, photos: Path) -> None:
    counting = Counting(classifier, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        update(photos, counting)
    assert not (photos / ".edgeclip-index").exists()
    journal = photos / ".edgeclip-index.journal"
    with journal.open("ab") as stream:  # a record that was cut off
        stream.write(b"\x01\x02\x03\x04\xff\x00\x00\x00half")
    rest = Counting(classifier)
    report = update(photos, rest)
    assert (report.resumed, len(counting.names), len(rest.names)) == (3, 3, 5)
    assert not set(counting.names) & set(rest.names)
    np.testing.assert_array_equal(
        PictureIndex(report.path).embeddings,
        np.stack([classifier.embed_images(photos / name) for name in PictureIndex(report.path).paths]),
    )
    assert not journal.exists()


def test_an_interrupted_run_leaves_the_old_index(update, classifier, photos: Path) -> None:
    update(photos)
    before = (photos / ".edgeclip-index").read_bytes()
    for seed in range(4):
        put(photos, f"more-{seed}.png", "red", seed=30 + seed)
    with pytest.raises(KeyboardInterrupt):
        update(photos, Counting(classifier, stop_after=2))
    assert (photos / ".edgeclip-index").read_bytes() == before
    assert counts(update(photos)) == (12, 2, 0, 0, 10)


def test_an_interrupted_rebuild_goes_on_as_one(update, classifier, photos: Path) -> None:
    update(photos)
    with pytest.raises(KeyboardInterrupt):
        update(photos, Counting(classifier, stop_after=3), rebuild=True)
    assert update(photos, rebuild=True).embedded == 5
    assert update(photos, rebuild=True).embedded == 8


@pytest.mark.parametrize("where", [0.02, 0.2, 0.5, 0.8, 0.99, b'"space":"', b'"tower":"'])
def test_every_damage_is_said_and_repaired(update, photos: Path, where: float | bytes) -> None:
    report = update(photos)
    good = report.path.read_bytes()
    damaged = bytearray(good)
    at = good.index(where) + len(where) if isinstance(where, bytes) else int(len(good) * where)
    damaged[at] ^= 0x11
    report.path.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="picture index"):
        PictureIndex(report.path).check()
    repaired = update(photos)
    assert repaired.repaired.startswith("picture index")
    PictureIndex(report.path).check()
    assert report.path.read_bytes() == good


@pytest.mark.parametrize("content", [b"", b"\0" * 100])
def test_a_file_without_a_header_is_repaired(update, photos: Path, content: bytes) -> None:
    report = update(photos)
    report.path.write_bytes(content)
    with pytest.raises(InputError, match=r"picture index .* cannot be read"):
        PictureIndex(report.path)
    assert update(photos).embedded == 8


def test_only_damaged_blocks_are_embedded_again(
    update, classifier, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "BLOCK_ROWS", 3)
    path = update(photos).path
    index = PictureIndex(path)
    content = bytearray(path.read_bytes())
    at = content.index(index.embeddings[4].tobytes())  # of the second of three blocks
    content[at] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="1 of 3 blocks of embeddings are damaged"):
        PictureIndex(path).check()
    counting = Counting(classifier)
    report = update(photos, counting)
    assert sorted(counting.names) == sorted(Path(name).name for name in index.paths[3:6])
    assert report.unchanged == 5
    PictureIndex(path).check()


def test_a_newer_schema_is_refused_and_kept(update, photos: Path) -> None:
    path = update(photos).path
    newer = path.read_bytes().replace(b'"schema":"1"', b'"schema":"9"')
    path.write_bytes(newer)
    with pytest.raises(ConfigError, match="schema '9', expected '1'"):
        PictureIndex(path)
    with pytest.raises(ConfigError, match="Install a newer edgeclip"):
        update(photos)
    assert path.read_bytes() == newer
    assert update(photos, rebuild=True).embedded == 8


def test_a_full_disk_is_one_sentence_and_the_old_index_stays(update, photos: Path) -> None:
    path = update(photos).path
    before = path.read_bytes()
    for seed in range(30):
        put(photos, f"more-{seed}.png", "red", seed=40 + seed)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # the journal comes to its end
        with pytest.raises(InputError, match=r"cannot be written \(File too large\)\. Check rights and room"):
            update(photos)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3500, limits[1]))  # the journal fits, the index does not
        with pytest.raises(InputError, match="cannot be written"):
            update(photos, path=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    report = update(photos)
    assert report.resumed > 0
    assert report.pictures == 38


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ended_at_any_call_the_index_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "kill_index_calls.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments_the_index_is_whole(tiny_bundle_session: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for seed in range(400):
        put(folder, f"{seed:03}.png", list(COLOURS)[seed % 8], seed=seed)
    command = [sys.executable, TOOLS / "kill_index.py", folder, tmp_path / "index", tiny_bundle_session, 8, 0]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == 8
    assert seen["resumed_from"] >= 1  # some kills met the work, not the start
    assert seen["pictures"] > 300


# --- the file ----------------------------------------------------------------------------------------------

MADE = MadeWith("s" * 64, "onnx-int8", "t" * 64, "model", 4)


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    row = np.array([0.5, 0.5, 0.5, 0.5], np.float32)
    entries = {
        "b": Entry(Stat(1, 2, 3), b"c" * 16, row),
        "a": Entry(Stat(-1, 0, 0), b"", None, "no picture — 猫"),
        "c": Entry(Stat(5, 6, 7), b"", row[::-1]),
    }
    write_index(tmp_path / "index", ".", MADE, entries)
    back = dict(PictureIndex(tmp_path / "index").entries())
    assert list(back) == ["a", "b", "c"]
    for name, entry in entries.items():
        assert back[name][:2] == entry[:2]
        assert back[name].reason == entry.reason
    journal = Journal(tmp_path / "other", ".", MADE)
    for name, entry in entries.items():
        journal.add(name, entry)
    journal.close()
    again = Journal(tmp_path / "other", ".", MADE).entries
    assert {name: each[:2] for name, each in again.items()} == {
        name: each[:2] for name, each in entries.items()
    }
    assert Journal(tmp_path / "other", "elsewhere", MADE).entries == {}


def test_no_single_byte_is_changed_unseen(tmp_path: Path) -> None:
    path = tmp_path / "index"
    row = np.full(4, 0.5, np.float32)
    entries = {"a/b": Entry(Stat(1, 2, 3), b"c" * 16, row), "c": Entry(Stat(-1, 0, 0), b"", None, "broken")}
    write_index(path, ".", MADE, entries)
    good = path.read_bytes()
    for place in range(len(good)):
        for flipped in (0x01, 0x20, 0x80):
            path.write_bytes(good[:place] + bytes([good[place] ^ flipped]) + good[place + 1 :])
            with pytest.raises((InputError, ConfigError)):
                PictureIndex(path).check()
        path.write_bytes(good[:place])
        with pytest.raises(InputError):
            PictureIndex(path)


def test_an_empty_index(tmp_path: Path) -> None:
    write_index(tmp_path / "index", ".", MADE, {})
    index = PictureIndex(tmp_path / "index")
    index.check()
    assert (len(index), list(index.entries()), index.broken) == (0, [], {})
    assert nearest(index, np.ones(4, np.float32)).shape == (0,)


def test_the_safetensors_library_reads_it(update, photos: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = update(photos).path
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "edgeclip-picture-index"
        assert file.get_tensor("embeddings").shape == (8, EMBED_DIM)


# --- searching ---------------------------------------------------------------------------------------------


def many(folder: Path, count: int) -> None:
    for number in range(count):
        put(folder, f"{number:03}.png", list(COLOURS)[number % len(COLOURS)], seed=number)


def test_as_a_matrix_product_finds_it(update, classifier, tmp_path: Path) -> None:
    many(tmp_path / "photos", 40)
    index = PictureIndex(update(tmp_path / "photos").path)
    query = classifier.embed_images(colour_picture("blue", seed=99))
    similarity = index.embeddings @ query
    np.testing.assert_allclose(nearest(index, query), similarity, atol=2e-7)
    with Searcher(index, classifier.bundle) as searcher:
        found = searcher.by_embedding(query, top_k=7)
    order = np.argsort(-similarity, kind="stable")[:7]
    assert [each.path for each in found.matches] == [index.paths[row] for row in order]
    assert found.cutoff is None
    np.testing.assert_allclose([each.similarity for each in found.matches], similarity[order], atol=2e-7)


def test_equal_pictures_come_in_the_order_of_their_paths(update, classifier, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in "dbca":
        put(folder, f"{name}.png", "red", seed=1)
    index = PictureIndex(update(folder).path)
    with Searcher(index, classifier.bundle) as searcher:
        found = searcher.by_embedding(index.embeddings[0], top_k=3)
    assert [each.path for each in found.matches] == ["a.png", "b.png", "c.png"]


def test_a_picture_does_not_find_itself(update, classifier, photos: Path) -> None:
    index = PictureIndex(update(photos).path)
    query = classifier.embed_images(photos / "red.png")
    with Searcher(index, classifier.bundle) as searcher:
        assert searcher.by_embedding(query, top_k=1).matches[0].path == "red.png"
        left = searcher.by_embedding(query, top_k=8, leave_out=photos / "red.png").matches
    assert len(left) == 7
    assert all(each.path != "red.png" for each in left)


def test_a_picture_of_the_index_has_its_embedding_there(update, classifier, photos: Path) -> None:
    (photos / "aaa.png").write_bytes(b"no picture")
    os.utime(photos / "aaa.png", ns=(OLD_NS, OLD_NS))
    index = PictureIndex(update(photos).path)
    for name in index.paths:
        np.testing.assert_array_equal(
            index.embedding_of(photos / name), classifier.embed_images(photos / name)
        )
    assert index.embedding_of(photos / "inner" / ".." / "red.png") is not None
    for other in ("aaa.png", "none.png", "../elsewhere.png"):
        assert index.embedding_of(photos / other) is None
    put(photos, "red.png", "black", seed=3)
    assert index.embedding_of(photos / "red.png") is None  # it is another one now


@pytest.mark.parametrize("top_k", [0, -1])
def test_at_least_one_picture_is_asked_for(update, classifier, photos: Path, top_k: int) -> None:
    index = PictureIndex(update(photos).path)
    with Searcher(index, classifier.bundle) as searcher:
        with pytest.raises(InputError, match=f"top_k is {top_k}, expected at least 1"):
            searcher.by_embedding(index.embeddings[0], top_k=top_k, leave_out=photos / "red.png")
        with pytest.raises(InputError, match="expected at least 1"):
            searcher.by_text(searcher.encode("red"), top_k=top_k)
        assert len(searcher.by_embedding(index.embeddings[0], top_k=100).matches) == 8


@pytest.mark.parametrize("words", ["animal", "vehicle", "cat", "a red car", "工具"])
def test_all_that_is_relevant_is_found_whatever_top_k(tmp_path: Path, words: str) -> None:
    bundle = Bundle.open("default")
    rows = read_background(bundle).embeddings
    draw = np.random.default_rng(0)
    pictures = rows[draw.integers(0, len(rows), 1500)]
    pictures = pictures + draw.normal(0, 0.8 / rows.shape[1] ** 0.5, pictures.shape)
    pictures = (pictures / np.linalg.norm(pictures, axis=1, keepdims=True)).astype(np.float32)
    model = bundle.manifest.model
    entries = {f"{row:04}": Entry(Stat(row, 0, 0), b"", each) for row, each in enumerate(pictures)}
    made = MadeWith(model.embedding_space, "onnx-int8", "", model.name, model.embed_dim)
    write_index(tmp_path / "index", ".", made, entries)
    with Searcher(PictureIndex(tmp_path / "index"), bundle) as searcher:
        query = searcher.encode(words)
        found = {top_k: searcher.by_text(query, top_k=top_k) for top_k in (1, 20, 1500)}
    gate = open_gate(bundle, query, scale=model.scale)
    assert isinstance(gate, NegativesGate)
    cosine = pictures @ query.embeddings.T
    odds = replace(gate, weight=1.0).alone(cosine, pictures @ gate.rows.T)[:, 0]
    order = np.argsort(-cosine[:, 0], kind="stable")
    expected = [f"{row:04}" for row in order[1 / (1 + np.exp(-odds[order])) >= LEAST_RELEVANCE].tolist()]
    for top_k, each in found.items():
        assert [match.path for match in each.matches] == expected[:top_k]
        assert each.more == (len(expected) > top_k)


@pytest.mark.parametrize("words", ["animal", "cat"])
def test_only_pictures_below_a_folder(tmp_path: Path, words: str) -> None:
    bundle = Bundle.open("default")
    rows = read_background(bundle).embeddings
    made = MadeWith(bundle.manifest.model.embedding_space, "onnx-int8", "", "", rows.shape[1])
    entries = {
        f"{row % 7}/{row:04}": Entry(Stat(row, 0, 0), b"", np.ascontiguousarray(each))
        for row, each in enumerate(rows)
    }
    write_index(tmp_path / "index", ".", made, entries)
    with Searcher(PictureIndex(tmp_path / "index"), bundle) as searcher:
        query = searcher.encode(words)
        for ask in (
            lambda **more: searcher.by_text(query, **more),
            lambda **more: searcher.by_text(query, cut=False, **more),
            lambda **more: searcher.by_embedding(rows[5], **more),
        ):
            expected = [each for each in ask(top_k=len(rows)).matches if each.path.startswith("3/")]
            found = ask(top_k=len(rows), below="3/")
            assert found.matches == tuple(expected)
            assert ask(top_k=1, below="3/").matches == tuple(expected[:1])
            assert ask(below="none/").matches == ()


def test_words_find_their_colour_and_nothing_else(
    update, classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeclip.search.COSINE_DEVIATIONS", 3.0)  # of seven other colours none can reach 4.6
    folder = tmp_path / "photos"
    many(folder, 8 * 20)
    for path in sorted(folder.iterdir())[2::8][3:]:  # three blue ones are left: they stand out
        path.unlink()
    index = PictureIndex(update(folder).path)
    with Searcher(index, classifier.bundle) as searcher:
        words = searcher.encode("a blue")
        assert words.names == ("blue",)  # templates have articles of their own
        nearest_ones = searcher.by_text(words, top_k=6, cut=False)
        found, two = (searcher.by_text(words, top_k=top_k) for top_k in (6, 2))
    assert nearest_ones.cutoff is None
    assert len(nearest_ones.matches) == 6
    assert found.cutoff is not None
    assert found.cutoff.method == "deviations"
    assert sorted(each.path for each in found.matches) == ["002.png", "010.png", "018.png"]
    assert [each.path for each in nearest_ones.matches[:3]] == [each.path for each in found.matches]
    assert (two.matches, two.more, found.more) == (found.matches[:2], True, False)
    similarity = nearest(index, words.embeddings[0]).astype(np.float64)
    deviations = np.sort((similarity - similarity.mean()) / similarity.std())[::-1]
    np.testing.assert_allclose([each.relevance for each in found.matches], deviations[:3], rtol=1e-6)


def test_few_pictures_have_no_cutoff(update, classifier, photos: Path) -> None:
    index = PictureIndex(update(photos).path)
    assert len(index) < LEAST_PICTURES
    with Searcher(index, classifier.bundle) as searcher:
        found = searcher.by_text(searcher.encode("blue|cyan"), top_k=3)
    assert found.cutoff is None
    assert {each.path for each in found.matches[:2]} == {"blue.png", "cyan.png"}


def test_another_space_is_refused(update, photos: Path, tmp_path: Path) -> None:
    index = PictureIndex(update(photos).path)
    with pytest.raises(ConfigError, match="was made with model 'tiny-colours'"):
        Searcher(index, make_tiny_bundle(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match=r"query of shape \(3,\), expected \(16,\)"):
        nearest(index, np.zeros(3, np.float32))


def test_sixteen_threads_find_the_same(update, classifier, tmp_path: Path) -> None:
    many(tmp_path / "photos", 80)
    index = PictureIndex(update(tmp_path / "photos").path)
    answers: list[Any] = []
    with Searcher(index, classifier.bundle, keep_text_tower=True) as searcher:

        def ask() -> None:
            for name in COLOURS:
                found = searcher.by_text(searcher.encode(name), top_k=5)
                answers.append((name, found, searcher.by_embedding(index.embeddings[3], top_k=5)))

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 16 * len(COLOURS)
    for name in COLOURS:
        first, *others = [answer for answer in answers if answer[0] == name]
        assert all(other == first for other in others)
