"""The same int8 files on other processors: what was measured under emulation, and measuring it again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def check(found: dict[str, Any]) -> None:
    assert {each["cpu"] for each in found["results"]} == {"cortex-a72", "cortex-a76"}
    for each in found["results"]:
        assert each["image"]["n"] >= 100
        assert each["image"]["top1_agreement"] >= 0.99
        assert each["image"]["cosine_min"] >= 0.999
        assert each["text"]["cosine_min"] >= 0.999
        assert each["sums_there"] == "32-bit"
        assert ("dotprod" in each["isa_there"]) is (each["cpu"] == "cortex-a76")


def test_the_committed_result_is_within_the_bar() -> None:
    found = json.loads((RESULTS / "emulated_aarch64.json").read_text(encoding="utf-8"))
    assert {each["subject"] for each in found["results"]} >= {"embedded bundle", "vit probe"}
    check(found)


def test_on_avx2_files_that_fit_answer_the_same_and_others_do_not() -> None:
    found = json.loads((RESULTS / "emulated_avx2.json").read_text(encoding="utf-8"))["results"]
    assert {each["variant"] for each in found} == {"onnx-int8", "onnx-int8@x86-avx2", "onnx-int8@x86-vnni"}
    for each in found:
        assert (each["sums_here"], each["sums_there"]) == ("32-bit", "16-bit pairs")
        if each["variant"] == "onnx-int8@x86-vnni":
            assert each["image"]["cosine_min"] < 0.999
        else:
            assert each["image"]["top1_agreement"] == 1
            # The last bits of float nodes can tip a rounding in one picture; sums that overflow change all.
            assert min(each[tower]["cosine_min"] for tower in ("image", "text")) > 0.9999
            assert min(each[tower]["cosine_mean"] for tower in ("image", "text")) > 0.999999


@pytest.mark.full
def test_int8_answers_the_same_on_emulated_arm(tmp_path: Path) -> None:
    for program in ("qemu-aarch64", "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian, Ubuntu: apt install qemu-user)")
    output = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "emulated_aarch64.py"
    command = [sys.executable, str(script), "--pictures", "100", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(output.read_text(encoding="utf-8")))
