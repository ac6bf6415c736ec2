"""``edgeclip doctor``, on this machine and on machines with something wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wrong_bundle import put_wrong_model

from edgeclip.calibration import saturation
from edgeclip.cli import _run
from edgeclip.runtime import diagnose as diagnose_module
from edgeclip.runtime.byte_sums import adds_in_16_bits
from edgeclip.runtime.host import CpuTimes


def doctor(*arguments: str | Path) -> int:
    return _run(["doctor", *map(str, arguments)], debug=False)


def check(capsys: pytest.CaptureFixture[str], name: str) -> dict[str, str]:
    checks = json.loads(capsys.readouterr().out)["checks"]
    (found,) = [one for one in checks if one["name"] == name]
    assert isinstance(found, dict)
    return found


def test_a_sound_machine_ends_with_0(tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--bundle", tiny_bundle_session) == 0
    shown = capsys.readouterr()
    for words in (
        "machine ",
        "isa ",
        "works   ort",
        "ok       bundle: onnx-int8 gives the right answers here",
    ):
        assert words in shown.out
    assert shown.err == ""


def test_json_is_one_document(tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--bundle", tiny_bundle_session, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["kind"]) == (1, "doctor")
    assert said["backends"]["ort"]["works"] is True
    assert set(said["backends"]) == {"ort", "openvino", "tensorrt", "tensorrt_rtx", "eager"}
    for state in said["backends"].values():
        assert state["detail"]
    for one in said["checks"]:
        assert bool(one["suggestion"]) is (one["state"] != "ok")


def test_wrong_answers_end_with_1(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_wrong_model(tiny_bundle, tmp_path)
    assert doctor("--bundle", tiny_bundle) == 1
    shown = capsys.readouterr()
    assert "broken   bundle: onnx-int8: image: cosine_mean is " in shown.out
    assert f"-> run edgeclip verify {tiny_bundle}" in shown.out
    assert shown.err.count("\n") == 1


def test_a_missing_bundle_is_a_problem_and_no_breakage(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--bundle", "no-such-bundle", "--json") == 0
    found = check(capsys, "bundle")
    assert found["state"] == "problem"
    assert "does not exist" in found["detail"]


def test_a_base_backend_that_does_not_import_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libstdc++.so.6 is too old')")
    result = subprocess.run(
        [sys.executable, "-m", "edgeclip", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "absent  ort" in result.stdout
    assert "libstdc++.so.6 is too old" in result.stderr
    assert "pip install onnxruntime" in result.stderr
    assert result.stderr.count("\n") == 1


def test_two_onnxruntimes_in_one_place_are_named(
    tiny_bundle_session: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    (other / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor("--bundle", tiny_bundle_session, "--json") == 0
    found = check(capsys, "onnxruntime packages")
    assert found["detail"].startswith("onnxruntime and onnxruntime-gpu are installed over each other")
    assert found["suggestion"].startswith("run pip uninstall -y onnxruntime onnxruntime-gpu")


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    doctor("--bundle", "none", "--json")
    found = check(capsys, "cache")
    assert found["state"] == "problem"
    assert "EDGECLIP_CACHE_DIR" in found["suggestion"]


def test_telemetry_switched_on_by_the_user_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    doctor("--bundle", "none", "--json")
    assert "onnxruntime may report to its makers" in check(capsys, "telemetry")["detail"]


def test_few_open_files_and_busy_neighbours_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(diagnose_module, "cpu_times", lambda: CpuTimes(total=1000, steal=300))
    doctor("--bundle", "none", "--json")
    shown = capsys.readouterr().out
    checks = {one["name"]: one for one in json.loads(shown)["checks"]}
    assert checks["open files"]["suggestion"] == "run ulimit -n 1024"
    assert "gave 30% of this machine's time" in checks["neighbours"]["detail"]


def test_tensorrt_is_named_with_its_version_and_the_gpu_or_its_lack(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    _run(["doctor", "--json"], debug=False)
    state = json.loads(capsys.readouterr().out)["backends"]["tensorrt_rtx"]
    assert trt.__version__ in state["detail"]
    if not state["works"]:
        assert "NVIDIA driver" in state["detail"]


def test_sums_of_16_bits_are_a_problem_with_numbers(
    tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(layer: saturation.Layer, rows: object, **where: object) -> object:
        return layer.simulated("16-bit pairs")

    monkeypatch.setattr(saturation, "_run", cut_off)
    assert doctor("--bundle", tiny_bundle_session, "--json") == 0
    found = check(capsys, "int8 sums of ort")
    assert found["state"] == "problem"
    assert (
        "(largest bytes: 64 of 64 numbers wrong, relative error 0.494 in place of 0.000)" in found["detail"]
    )
    assert "made for x86-avx2" in found["suggestion"]


def test_int8_sums_of_this_host_are_told(
    tiny_bundle_session: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor("--bundle", tiny_bundle_session, "--json") == 0
    found = check(capsys, "int8 sums of ort")
    assert found["detail"].startswith(
        "not exact" if adds_in_16_bits("ort") else "exact on this host (3 layers"
    )
