"""Mutated bundles give a result or a typed error of one line, and nothing outside the directory is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="lays out links and pipes as on POSIX")

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("mode", "count", "least_refused"),
    # files: tokenizer, bank, head and golden, with their hashes kept right; archive: packed bundles
    [("manifest", 1000, 700), ("files", 400, 300), ("archive", 120, 60)],
)
def test_a_mutated_bundle_is_used_or_refused(
    tmp_path: Path, mode: str, count: int, least_refused: int
) -> None:
    shutil.copytree(TESTS / "data" / "bundle-1.0", tmp_path / "bundle")
    command = [sys.executable, TESTS / "tools" / "fuzz_bundle.py", tmp_path / "bundle", mode, str(count), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    seen = json.loads(done.stdout)
    assert seen["refused"] + seen["partly"] >= least_refused
    assert seen["opened"] + seen["partly"] + seen["refused"] == count
