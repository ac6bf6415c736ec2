"""``edgeclip sensitivity``, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Command

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
from exported import PROBES, write_pictures

PROBE = str(PROBES / "tinyclip")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("shapes") / "shapes", 32)


def test_it_says_what_int8_costs(capsys: pytest.CaptureFixture[str], pictures: Path, tmp_path: Path) -> None:
    command = Command(capsys)
    arguments = ["sensitivity", PROBE, "--calibration-data", pictures, "--calibration-samples", 16]
    arguments += ["--threads", 1, "--int8-target", "cosine=0.99", "-o", tmp_path / "report"]
    done = command(*arguments)
    assert done.code == 0, done.err
    assert "probe-tinyclip, image tower, onnx-int8: int8 measured on 16 rows" in done.out
    assert "cosine=0.99: " in done.out
    assert "of 15 products stay float; cosine 0.99" in done.out
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "onnx-int8-image.json",
        "onnx-int8-image.svg",
    ]
    # The other scheme, as a document.
    said = command(*arguments[:8], "--format", "tensorrt", "--json")
    document = json.loads(said.out)
    assert document["kind"] == "sensitivity"
    assert document["scheme"]["symmetric"] is True
    assert document["choice"] is None
    assert len(document["sensitivity"]["nodes"]) == 15
    assert document["sensitivity"]["rows"] == 16


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--int8-target", "cosine=2"], 1, "int8 target 'cosine=2': expected NAME=LIMIT"),
        (["--latency-table", "none.json"], 1, "latency table 'none.json' cannot be read"),
        (["--target", "toaster"], 1, "toaster"),
        (["--tower", "sound"], 2, "'sound' is not one of 'image', 'text'"),
        (["--calibration-selection", "stratified"], 1, "rows are of pictures without a label"),
    ],
)
def test_what_cannot_be(
    capsys: pytest.CaptureFixture[str], pictures: Path, more: list[str], code: int, message: str
) -> None:
    done = Command(capsys)(
        "sensitivity",
        PROBE,
        "--calibration-data",
        pictures,
        "--calibration-samples",
        16,
        "--threads",
        1,
        *more,
    )
    assert done.code == code
    assert message in done.err


def test_a_checkpoint_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = Command(capsys)("sensitivity", tmp_path / "none")
    assert done.code == 1
    assert "there is no such file or directory" in done.err


def test_a_folder_that_cannot_be_written_is_known_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = Command(capsys)("sensitivity", PROBE, "-o", tmp_path / "file" / "report", "--threads", 1)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"folder {str(tmp_path / 'file' / 'report')!r} cannot be written: Not a directory" in done.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_control_c_keeps_what_was_measured(pictures: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = [sys.executable, "-m", "edgeclip", "sensitivity", PROBE, "--threads", "1", "--tower", "text"]
    environment = {**os.environ, "EDGECLIP_CACHE_DIR": str(cache)}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    state = None
    for _ in range(1200):
        state = next(cache.glob("*/any/sensitivity/*.jsonl"), None)
        if state is not None and state.read_text(encoding="utf-8").count("\n") >= 3:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"the same command goes on from there" in error
    assert state is not None
    before = state.read_text(encoding="utf-8").splitlines()
    done = subprocess.run(arguments, env=environment, capture_output=True, check=True)
    assert b"text tower" in done.stdout
    assert state.read_text(encoding="utf-8").splitlines()[: len(before)] == before
