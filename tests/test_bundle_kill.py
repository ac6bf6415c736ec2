"""A writer that is killed leaves the complete old bundle or the complete new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

TOOL = Path(__file__).parent / "tools" / "kill_writer.py"


def run(*arguments: object) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, int] = json.loads(done.stdout)
    return seen


@pytest.mark.slow
def test_killed_at_random_moments_a_complete_bundle_opens(tmp_path: Path) -> None:
    seen = run("random", tmp_path / "bundle", 50, 0)
    assert seen["kills"] == 50
    assert seen["mid_write"] >= 20  # the kills did meet writes, not only pauses between them
    assert seen["versions"] >= 10
    assert seen["files"] <= 8  # the manifest, three files, and what the last version but one used


def test_killed_before_each_step_a_complete_bundle_opens(tmp_path: Path) -> None:
    seen = run("steps", tmp_path / "bundle")
    assert seen["steps"] >= 20
    assert 2 <= seen["new"] < seen["steps"]  # killed after the commit point, the new one is there
