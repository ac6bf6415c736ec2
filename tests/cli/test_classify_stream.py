"""``edgeclip classify -``: lines, counts, labels of a file that changes, how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.classify import ZeroShotClassifier
from edgeclip.cli._stream import _cut
from edgeclip.few_shot_fit import fit_head
from edgeclip.runtime.session import RuntimeOptions

NAMES = sorted(COLOURS)
COMMAND = [sys.executable, "-m", "edgeclip", "classify", "-"]
PATIENCE_S = 60  # a loaded machine starts slowly


def _png(name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(colour_picture(name)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def arguments(tiny_bundle_session: Path) -> list[str]:
    return [*COMMAND, "--bundle", str(tiny_bundle_session), "--threads", "1"]


@pytest.fixture
def run(arguments: list[str]) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    def run(content: bytes, *more: str) -> subprocess.CompletedProcess[bytes]:
        result = subprocess.run(
            [*arguments, *more], input=content, capture_output=True, timeout=PATIENCE_S, check=False
        )
        assert b"Traceback" not in result.stderr
        return result

    return run


class Live:
    """A command that is fed and read while it runs."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.lines: list[dict] = []
        self.said = ""
        self._threads = [threading.Thread(target=each) for each in (self._read, self._hear)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(json.loads(line))  # seen while it runs

    def _hear(self) -> None:
        for line in self.process.stderr:
            self.said += line.decode()

    def send(self, content: bytes) -> None:
        self.process.stdin.write(content)
        self.process.stdin.flush()

    def send_until(self, content: bytes, holds: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, self.said
            self.send(content)
            time.sleep(0.02)

    def end(self) -> int:
        self.process.stdin.close()
        code = self.process.wait(PATIENCE_S)
        for thread in self._threads:
            thread.join()
        self.process.stdout.close()
        self.process.stderr.close()
        assert "Traceback" not in self.said
        return code


def _head(path: Path, bundle: Path, names: list[str]) -> None:
    """Fit a head on two pictures a class, and write it."""
    with ZeroShotClassifier.open(bundle, options=RuntimeOptions(threads=1)) as classifier:
        pictures = [colour_picture(name, seed=seed) for name in names for seed in (0, 1)]
        embeddings = np.stack([classifier.embed_images(each) for each in pictures])
        space = classifier.bundle.manifest.model.embedding_space
    targets = np.repeat(np.arange(len(names)), 2)
    fit_head(embeddings, targets, names, space=space, method="mean").save(path)


def test_a_line_a_decision(run) -> None:
    result = run(b"junk" + b"--b".join(map(_png, NAMES)), "--all-frames", "--jsonl", "--top-k", "2")
    assert result.returncode == 0
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["predictions"][0]["label"] for line in lines] == NAMES
    assert list(lines[0]) == [
        "schema",
        "score_kind",
        "frame",
        "dropped",
        "skipped_bytes",
        "age_ms",
        "smoothed",
        "labels_version",
        "predictions",
    ]
    assert [line["frame"] for line in lines] == list(range(1, 9))
    assert [line["skipped_bytes"] for line in lines] == [4 + 3 * number for number in range(8)]
    assert all(line["age_ms"] > 0 and line["labels_version"] == 1 for line in lines)
    assert list(lines[0]["predictions"][0]) == ["label", "score", "similarity"]
    said = result.stderr.decode()
    assert "8 frames; 8 decided, 0 dropped for newer ones, 0 broken; 0 cut off; 25 bytes" in said
    assert "ms in the median" in said


def test_a_pipe_drops_what_is_old_and_counts_it(run) -> None:
    result = run(b"".join(map(_png, NAMES * 40)), "--jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    last = lines[-1]
    assert result.returncode == 0
    assert last["frame"] == 320 == len(lines) + last["dropped"]
    assert last["predictions"][0]["label"] == NAMES[-1]


def test_a_file_is_decided_frame_by_frame(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "clip.mjpeg"
    path.write_bytes(b"".join(map(_png, NAMES * 5)))
    with path.open("rb") as stream:
        result = subprocess.run(
            [*arguments, "--labels", "red,blue"], stdin=stream, capture_output=True, text=True, check=True
        )
    lines = result.stdout.splitlines()
    assert len(lines) == 40
    assert lines[NAMES.index("blue")].split()[:2] == [str(NAMES.index("blue") + 1), "blue"]
    assert "\x1b" not in result.stdout
    with path.open("rb") as stream:
        result = subprocess.run(
            [*arguments, "--every", "1s"], stdin=stream, capture_output=True, text=True, check=False
        )
    assert result.returncode == 2
    assert "of a file none is: pipe it in real time." in result.stderr


def test_raw_frames(run) -> None:
    content = b"".join(colour_picture(name).tobytes() for name in NAMES)
    result = run(content, "--raw", "32x32", "--all-frames", "--jsonl")
    labels = [json.loads(line)["predictions"][0]["label"] for line in result.stdout.splitlines()]
    assert labels == NAMES


def test_what_was_rejected_is_said(run) -> None:
    line = json.loads(run(_png("red"), "--labels", "red,blue", "--jsonl").stdout)
    assert "rejected" not in line
    result = run(_png("red"), "--min-confidence", "1")
    assert b"no label scored high enough" in result.stdout


def test_a_broken_frame_is_counted(run) -> None:
    whole = _png("red")
    at = whole.index(b"IDAT") + 4
    broken = whole[:at] + bytes(each ^ 0xFF for each in whole[at : at + 40]) + whole[at + 40 :]
    result = run(whole + broken + broken + whole, "--all-frames", "--jsonl")
    assert result.returncode == 0
    assert [json.loads(line)["frame"] for line in result.stdout.splitlines()] == [1, 4]
    said = result.stderr.decode()
    assert said.count("is left out") == 1
    assert "frame 2 is left out: picture of" in said
    assert "4 frames; 2 decided, 0 dropped for newer ones, 2 broken" in said
    strict = run(whole + broken + whole, "--all-frames", "--strict")
    assert strict.returncode == 1
    assert b"error: picture of" in strict.stderr
    nothing = run(broken)
    assert nothing.returncode == 1
    assert b"none of 1 frames could be decoded" in nothing.stderr


def test_a_stream_that_ends_inside_a_frame(run) -> None:
    result = run(_png("red") + _png("blue")[:-9], "--jsonl")
    assert result.returncode == 0
    assert b"1 cut off" in result.stderr
    assert b"the stream ended inside a frame" in result.stderr


def test_a_stream_of_something_else_is_not_waited_for_in_silence(arguments: list[str]) -> None:
    live = Live([*arguments, "--jsonl"])
    live.send_until(b"\0\0\0\1video" * 7_000, lambda: "so far" in live.said)
    assert "so far, standard input: " in live.said
    assert "bytes hold no whole picture, expected JPEG or PNG" in live.said
    live.send_until(_png("red"), lambda: live.lines)
    assert live.end() == 0
    assert live.said.count("so far") == 1


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (b"", (), "0 bytes hold no whole picture, expected JPEG or PNG"),
        (b"no picture" * 1000, (), "10,000 bytes hold no whole picture, expected"),
        (_png("red")[:-1], (), "hold no whole picture, one that breaks off,"),
        (b"x" * 100, ("--raw", "32x32:gray"), "100 bytes hold no frame of 32x32:gray"),
        (b"", ("--raw", "32x32:cmyk"), "got 'cmyk', expected one of rgb"),
        (b"", ("--raw", "32"), "got '32', expected WIDTHxHEIGHT"),
    ],
)
def test_no_picture_at_all(run, content: bytes, more: tuple[str, ...], said: str) -> None:
    result = run(content, *more)
    assert result.returncode == 1
    assert said in result.stderr.decode()
    assert result.stdout == b""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--json",), "--json does not go with a stream"),
        (("--timing",), "--timing does not go with a stream"),
        (("photo.jpg",), "goes with no other paths"),
        (("--every", "0"), "'0': expected a time above 0"),
        (("--every", "1s", "--all-frames"), "--every leaves out frames, and --all-frames none."),
        (("--smooth", "0"), "0 is not in the range"),
        (("--smooth", "9" * 30), "is not in the range"),
    ],
)
def test_options_that_do_not_go_together(run, more: tuple[str, ...], said: str) -> None:
    result = run(b"", *more)
    assert result.returncode == 2
    assert said in " ".join(result.stderr.decode().split())


def test_without_a_stream_its_options_mean_nothing(arguments: list[str]) -> None:
    files = [each for each in arguments if each != "-"]
    result = subprocess.run([*files, "x.jpg", "--smooth", "3"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--smooth is for a stream on standard input" in result.stderr


def test_a_terminal_is_no_stream(arguments: list[str]) -> None:
    ours, theirs = pty.openpty()
    result = subprocess.run(arguments, stdin=theirs, capture_output=True, text=True, check=False)
    os.close(ours)
    os.close(theirs)
    assert result.returncode == 2
    assert "which is a terminal here" in result.stderr


def test_a_terminal_sees_one_line_that_changes(arguments: list[str]) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*arguments, "--all-frames"], stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE
    )
    process.communicate(b"".join(map(_png, NAMES)), timeout=PATIENCE_S)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert seen.count("\r") == 8 + 1  # the terminal makes \r\n of the last \n
    assert seen.count("\n") == 1
    assert all(len(line) <= 80 + len("\x1b[K") for line in seen.split("\r"))


def test_ctrl_c_ends_it_while_it_waits_for_bytes(arguments: list[str]) -> None:
    live = Live([*arguments, "--jsonl"])
    live.send_until(_png("red"), lambda: live.lines)
    time.sleep(0.2)
    began = time.monotonic()
    live.process.send_signal(signal.SIGINT)
    code = live.process.wait(PATIENCE_S)
    assert time.monotonic() - began < 5
    assert live.end() == code == 130
    assert " decided, " in live.said
    assert "edgeclip: interrupted" in live.said


def test_a_reader_that_goes_is_no_error(arguments: list[str]) -> None:
    with subprocess.Popen(
        [*arguments, "--jsonl", "--all-frames"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        process.stdin.write(_png("red"))
        process.stdout.read(1)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            for _ in range(50):
                process.stdin.write(_png("red"))
        said = process.stderr.read()
        assert process.wait(PATIENCE_S) == 0
    assert b"Traceback" not in said
    assert b"Broken" not in said


def test_the_label_file_is_read_again(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("red\nblue\n", encoding="utf-8")
    live = Live([*arguments, "--jsonl", "--label-file", str(path)])
    picture = _png("green")
    live.send_until(picture, lambda: live.lines)

    beside = tmp_path / "new"
    beside.write_text("green\nred\n", encoding="utf-8")
    beside.replace(path)
    live.send_until(picture, lambda: live.lines[-1]["labels_version"] == 2)
    assert live.lines[-1]["predictions"][0]["label"] == "green"

    path.write_bytes(b"green\n\xff\xfe broken")
    live.send_until(picture, lambda: "the labels stay" in live.said)
    time.sleep(1.2)  # read again, and not said again
    live.send_until(picture, lambda: live.lines[-1]["predictions"])
    path.unlink()
    live.send_until(picture, lambda: live.said.count("the labels stay") == 2)
    path.write_text("cyan\ngreen\n", encoding="utf-8")
    live.send_until(picture, lambda: live.lines[-1]["labels_version"] == 3)

    assert live.end() == 0
    assert live.said.count("the labels stay") == 2
    assert "labels 2 answer from frame" in live.said
    assert ": 2 of them (cyan, green)" in live.said
    versions = [line["labels_version"] for line in live.lines]
    assert versions == sorted(versions)
    for line in live.lines:
        offered = {1: {"red", "blue"}, 2: {"green", "red"}, 3: {"cyan", "green"}}[line["labels_version"]]
        assert {each["label"] for each in line["predictions"]} == offered
    last = live.lines[-1]
    assert last["frame"] == len(live.lines) + last["dropped"]


def test_warnings_are_those_of_the_labels_in_force(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("red\nblue\n", encoding="utf-8")
    live = Live([*arguments, "--jsonl", "--label-file", str(path)])
    picture = _png("red")
    live.send_until(picture, lambda: live.lines)
    path.touch()
    time.sleep(1.5)
    live.send_until(picture, lambda: live.lines)
    assert "not in the list" not in live.said
    path.write_text("red\nbleu\n", encoding="utf-8")
    live.send_until(picture, lambda: live.lines[-1]["labels_version"] == 2)
    assert live.end() == 0
    assert "1 of 2 words (50 %) is not in the list the text tower was trained on: 'bleu'" in live.said
    assert live.lines[-1]["labels_version"] == 2  # touching the file is no change of labels


def test_several_labels_fit_as_they_do_for_a_picture(
    run, arguments: list[str], tiny_bundle_session: Path, tmp_path: Path
) -> None:
    head, picture = tmp_path / "head", tmp_path / "red.png"
    _head(head, tiny_bundle_session, ["blue", "green", "red"])
    picture.write_bytes(_png("red"))
    more = ["--head", str(head), "--multi", "--threshold", "-99", "--jsonl"]
    files = [str(picture) if each == "-" else each for each in arguments]
    still = subprocess.run([*files, *more], capture_output=True, check=True)
    expected = json.loads(still.stdout)["predictions"]
    assert len(expected) == 3
    assert min(each["score"] for each in expected) < 0
    assert json.loads(run(_png("red"), *more).stdout)["predictions"] == expected


def test_the_file_of_a_head_is_read_again(
    arguments: list[str], tiny_bundle_session: Path, tmp_path: Path
) -> None:
    path = tmp_path / "head"
    _head(path, tiny_bundle_session, ["blue", "green"])
    live = Live([*arguments, "--jsonl", "--head", str(path)])
    picture = _png("red")
    live.send_until(picture, lambda: live.lines)
    path.write_bytes(path.read_bytes()[:-100])
    live.send_until(picture, lambda: "the head is not used, and the classes stay" in live.said)
    _head(path, tiny_bundle_session, ["blue", "green", "red"])
    live.send_until(picture, lambda: live.lines[-1]["labels_version"] == 2)
    assert live.end() == 0
    assert live.lines[-1]["predictions"][0]["label"] == "red"
    assert "labels 2 answer from frame" in live.said


def test_a_pipe_of_labels_is_read_once(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "labels"
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=("red\nblue\n",)).start()
    live = Live([*arguments, "--jsonl", "--label-file", str(path)])
    live.send_until(_png("red"), lambda: live.lines)
    time.sleep(1.5)
    assert live.end() == 0
    assert "not used" not in live.said


@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [
        ("0<&-", 1, "standard input is closed"),
        ("1>&-", 1, "standard output is closed"),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
    ],
)
def test_what_is_not_there(arguments: list[str], tmp_path: Path, closed: str, code: int, said: str) -> None:
    clip = tmp_path / "clip"
    clip.write_bytes(_png("red") * 3)
    script = f'exec "$@" --jsonl < {shlex.quote(str(clip))} {closed}'
    result = subprocess.run(
        ["sh", "-c", script, "sh", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stdout.splitlines()) == (0 if code else 3)


def test_remarks_stand_on_lines_of_their_own(arguments: list[str]) -> None:
    ours, theirs = pty.openpty()
    whole = _png("red")
    at = whole.index(b"IDAT") + 4
    broken = whole[:at] + bytes(40) + whole[at + 40 :]
    process = subprocess.Popen(
        [*arguments, "--all-frames"], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    process.communicate(whole + broken + whole, timeout=PATIENCE_S)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    remarks = [line for line in seen.replace("\r", "\n").split("\n") if "edgeclip: " in line]
    assert any("frame 2 is left out" in line for line in remarks)
    assert all(line.startswith("edgeclip: ") for line in remarks), remarks


@pytest.mark.parametrize("columns", range(1, 12))
def test_a_line_takes_no_more_columns_than_there_are(columns: int) -> None:
    def width(text: str) -> int:
        return sum(2 if each in "猫狗车" else 1 for each in text)

    for line in ("", "cat", "cat dog car", "猫 狗", "a猫狗车b猫"):
        cut = _cut(line, columns)
        assert width(cut) <= columns
        assert cut == line or (width(line) > columns and line.startswith(cut[:-1]) and cut[-1] == "…")


@pytest.mark.slow
def test_a_camera_in_real_time(repo: Path, tmp_path: Path) -> None:
    output = tmp_path / "camera.json"
    script = repo / "benchmarks" / "camera.py"
    # `camera.py` judges latency and memory, which a loaded machine cannot promise in seconds: counts only.
    subprocess.run(
        [sys.executable, str(script), "--seconds", "12", "--changes", "2", "--output", str(output)],
        capture_output=True,
        check=False,
    )
    checks = json.loads(output.read_text(encoding="utf-8"))["checks"]
    counted = {name: passed for name, passed in checks.items() if "memory" not in name and "ages" not in name}
    assert len(counted) == 5
    assert all(counted.values()), checks
