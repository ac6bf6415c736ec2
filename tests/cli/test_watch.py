"""Files that are offered again: changes are seen, none is taken half written, what fails is tried again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edgeclip.cli import _watch
from edgeclip.cli._watch import Watch
from edgeclip.errors import InputError

PATIENCE_S = 20


class Offered:
    """Offers the content of a file, which must not hold the word broken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[str] = []
        self.tried = 0

    def __call__(self, heed: Callable[[], None]) -> Sequence[str]:
        self.tried += 1
        content = self.path.read_text(encoding="utf-8")
        if "broken" in content:
            raise InputError(f"{content!r} is broken")
        self.seen.append(content)
        return [f"about {content}"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_watch, "_POLL_S", 0.05)


@pytest.fixture
def offered(tmp_path: Path) -> Offered:
    path = tmp_path / "labels.txt"
    path.write_text("old", encoding="utf-8")
    return Offered(path)


def _until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def _watch_of(offered: Offered) -> Watch:
    return Watch(offered.path, ("file", "words"), offered)


def test_a_file_that_stays_is_not_read_again(offered: Offered) -> None:
    with _watch_of(offered).running(lambda _: None):
        time.sleep(0.4)
    assert offered.tried == 0


def test_a_change_before_the_thread_runs_is_seen(offered: Offered) -> None:
    watch = _watch_of(offered)
    offered.path.write_text("new", encoding="utf-8")
    said: list[str] = []
    with watch.running(said.append):
        _until(lambda: said)
    assert offered.seen == ["new"]
    assert said == ["about new"]


def test_a_change_of_the_same_size_and_time_is_seen(offered: Offered) -> None:
    before = offered.path.stat()
    with _watch_of(offered).running(lambda _: None):
        time.sleep(0.2)
        offered.path.write_text("new", encoding="utf-8")
        os.utime(offered.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        _until(lambda: offered.seen)
    assert offered.path.stat().st_mtime_ns == before.st_mtime_ns
    assert offered.seen[-1] == "new"


def test_a_file_is_read_when_its_writer_is_done(offered: Offered) -> None:
    with _watch_of(offered).running(lambda _: None):
        with offered.path.open("w", encoding="utf-8") as stream:
            for number in range(40):
                stream.write(f"{number} ")
                stream.flush()
                time.sleep(0.01)
        _until(lambda: offered.seen)
    assert offered.seen == [" ".join(map(str, range(40))) + " "]


def test_what_cannot_be_used_is_said_once_and_tried_again(
    offered: Offered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watch, "_AGAIN_S", 0.3)
    said: list[str] = []
    with _watch_of(offered).running(said.append):
        offered.path.write_text("broken", encoding="utf-8")
        _until(lambda: offered.tried >= 3)
        assert said == ["the file is not used, and the words stay: 'broken' is broken"]
        offered.path.unlink()
        _until(lambda: len(said) == 2)
        assert "No such file" in said[1]
        offered.path.write_text("new", encoding="utf-8")
        _until(lambda: offered.seen)
        offered.path.write_text("broken", encoding="utf-8")
        _until(lambda: len(said) == 4)  # it worked meanwhile, so it is news
    assert said[2:] == ["about new", said[0]]


def test_what_cannot_be_used_is_not_read_at_every_look(offered: Offered) -> None:
    with _watch_of(offered).running(lambda _: None):
        offered.path.write_text("broken", encoding="utf-8")
        _until(lambda: offered.tried)
        time.sleep(0.5)
        assert offered.tried == 1
        offered.path.write_text("new", encoding="utf-8")
        _until(lambda: offered.seen)


def test_a_pipe_in_its_place_is_not_opened(offered: Offered) -> None:
    said: list[str] = []
    with _watch_of(offered).running(said.append):
        offered.path.unlink()
        os.mkfifo(offered.path)
        _until(lambda: said and "is no file any more, expected one" in said[-1])
    assert not offered.seen


def test_leaving_stops_what_heeds_it(offered: Offered) -> None:
    begun = threading.Event()

    def encode(heed: Callable[[], None]) -> Sequence[str]:
        begun.set()
        while True:
            heed()
            time.sleep(0.01)

    said: list[str] = []
    with Watch(offered.path, ("file", "words"), encode).running(said.append):
        offered.path.write_text("new", encoding="utf-8")
        begun.wait()
    assert said == []
