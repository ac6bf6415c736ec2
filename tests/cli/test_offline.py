"""No command but `data fetch`, `models pull` and an `hf:` bundle uses the network: sockets are watched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Loaded before edgeclip (as sitecustomize): any attempt to use a socket ends the process with code 99.
GUARD = """
import os, sys
def refuse(event, arguments):
    if event.startswith("socket.") and event not in {"socket.gethostname"}:
        sys.stderr.write(f"socket used: {event} {arguments!r}\\n")
        sys.stderr.flush()
        os._exit(99)
sys.addaudithook(refuse)
"""

COMMANDS = [
    ["classify", "PHOTOS"],
    ["classify", "PHOTOS", "--labels", "cat,dog,teapot", "--jsonl"],
    ["embed", "PHOTOS", "-o", "OUT/embeddings.npy"],
    ["index", "PHOTOS", "--json"],
    ["labels", "build", "--labels", "cat,dog", "-o", "OUT/bank.safetensors"],
    ["bundle", "inspect", "default"],
    [
        "bundle",
        "slim",
        "default",
        "--variant",
        "onnx-int8",
        "--labels",
        "cat,dog",
        "--drop-text",
        "-o",
        "OUT/slim",
    ],
    ["bundle", "pack", "default", "-o", "OUT/default.tar"],
    ["bundle", "diff", "default", "default"],
    ["verify", "default"],
    ["compile", "default"],
    ["doctor"],
    ["cache", "info"],
    ["cache", "clear", "--yes"],
    ["models"],
    ["models", "show", "MobileCLIP2-S0"],
]


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    return folder


def _run(guard: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(guard)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


def test_the_guard_sees_a_socket(guard: Path) -> None:
    result = _run(guard, "-c", "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)")
    assert result.returncode == 99
    assert "socket used" in result.stderr


@pytest.mark.parametrize("query", ["a cat", "PHOTO"])
def test_searches_use_no_socket(query: str, guard: Path, repo: Path, tmp_path: Path) -> None:
    photos = repo / "edgeclip" / "assets" / "photos"
    index = str(tmp_path / "index")
    for command in (["index", str(photos), "-o", index], ["search", query, index]):
        command[1] = command[1].replace("PHOTO", str(photos / "cat.jpg"))
        result = _run(guard, "-m", "edgeclip", *command)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_commands_use_no_socket(command: list[str], guard: Path, repo: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for photo in sorted((repo / "edgeclip/assets/photos").glob("*.jpg"))[:2]:
        shutil.copy(photo, photos)
    (tmp_path / "out").mkdir()
    arguments = [
        part.replace("PHOTOS", str(photos)).replace("OUT", str(tmp_path / "out")) for part in command
    ]
    result = _run(guard, "-m", "edgeclip", *arguments)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (util-linux)")
def test_the_main_job_runs_without_any_network_interface(repo: Path) -> None:
    command = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system allows no network namespaces")
    photo = next(iter(sorted((repo / "edgeclip/assets/photos").glob("*.jpg"))))
    result = subprocess.run(
        [*command, sys.executable, "-m", "edgeclip", "classify", str(photo), "--labels", "cat,dog"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_training_run_uses_no_socket(guard: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    shapes, run = tmp_path / "shapes", tmp_path / "run"
    for command in (
        ["data", "make-shapes", "-o", str(shapes), "--train", "16", "--held-out", "8"],
        ["train", "plain-clip", "-o", str(run), "--set", f'data.train.paths=["{shapes}/train.jsonl"]',
         "--set", f'data.held_out.paths=["{shapes}/held_out.jsonl"]', "--set", "validation=[]",
         "--set", "stage.0.samples=16", "--set", "stage.0.batch_size=8",
         "--set", "stage.0.schedule.warmup=0"],
    ):  # fmt: skip
        result = _run(guard, "-m", "edgeclip", *command)
        assert result.returncode == 0, result.stderr
    assert (run / "model" / "model.safetensors").is_file()
