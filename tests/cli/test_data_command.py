from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeclip.cli import _run

SMALL = ["--train", "6", "--held-out", "4", "--size", "32"]


def test_make_shapes_writes_a_set_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "set"
    assert _run(["data", "make-shapes", "-o", str(target), *SMALL], debug=False) == 0
    digest = json.loads((target / "dataset.json").read_text())["digest"]
    assert capsys.readouterr().out == (
        f"6 pictures to train with and 4 held out, 32 px, 796 held-out labels in {target} "
        f"(written, digest {digest[:16]})\n"
    )
    assert len(list((target / "images").rglob("*.png"))) == 10


def test_make_shapes_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "set"
    for status in ("written", "present"):
        assert (
            _run(["data", "make-shapes", "-o", str(target), *SMALL, "--seed", "9", "--json"], debug=False)
            == 0
        )
        said = json.loads(capsys.readouterr().out)
        assert said.pop("digest") == json.loads((target / "dataset.json").read_text())["digest"]
        assert said == {
            "schema": 1,
            "directory": str(target),
            "status": status,
            "train": 6,
            "held_out": 4,
            "labels": 796,
            "size_px": 32,
            "seed": 9,
        }


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--size", "31"], 1, "size_px is 31, expected 32 to 1024"),
        (["--train", "0"], 2, "0 is not in the range x>=1"),
        (["--train", "1000001"], 1, "train is 1000001, expected 1 to 1000000"),
    ],
)
def test_make_shapes_says_what_is_out_of_range(
    options: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["data", "make-shapes", "-o", str(tmp_path / "set"), *options], debug=False) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_make_shapes_refuses_a_directory_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert _run(["data", "make-shapes", "-o", str(tmp_path), *SMALL], debug=False) == 1
    assert f"{str(tmp_path)!r} is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals work differently")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_leaves_nothing_behind(workers: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeclip", "data", "make-shapes", "-o", str(tmp_path / "set"),
         "--train", "20000", "--workers", workers],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.png")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, said = process.communicate(timeout=60)
    assert said.strip() == "edgeclip: interrupted"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_fetch_names_every_set_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    from edgeclip.corpus import load_corpus

    assert _run(["data", "fetch", "--help"], debug=False) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert [name for name in load_corpus().sets if name not in said] == []
