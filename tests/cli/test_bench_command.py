"""``edgeclip bench``, and with ``--per-op``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import Command

from edgeclip.bench.per_op import OpProfile
from edgeclip.bench.report import END_TO_END, BenchReport
from edgeclip.cli._bench_sustained import device_name


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_a_table_says_where_the_time_goes(run: Command, tiny_bundle: Path) -> None:
    chosen = ("--by", "kernel", "--most", "2")
    result = run("bench", "--per-op", tiny_bundle, "--runs", "3", "--threads", "1", *chosen)
    assert result.code == 0
    assert "ort on cpu, 1 thread(s), batch 1, medians of 3 runs" in result.out
    assert "more" in result.out
    # Its nodes have no names: no kernel is found in the file, and the table says so.
    assert "kernels name 0% of these operations" in result.out


def test_variants_stand_side_by_side_by_block(run: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    chosen = ("--variant", "onnx-fp32", "--variant", "onnx-int8")
    result = run("bench", "--per-op", tiny_bundle, *chosen, "--runs", "2", "--threads", "1", "--trace", trace)
    assert result.code == 0, result.err
    heading = next(line for line in result.out.splitlines() if line.startswith("block "))
    assert heading.split() == ["block", "onnx-fp32", "onnx-int8", "ratio"]
    ends = [line.split()[0] for line in result.out.splitlines()[-2:]]
    assert ends == ["kernels", "call"]
    assert "matrix products reach in this run" in result.out
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert {each["pid"] for each in events} == {1, 2}
    assert "ui.perfetto.dev" in result.err


@pytest.mark.parametrize("level", ["block", "stage", "kernel"])
def test_a_row_is_a_block_a_stage_or_a_kernel(run: Command, level: str) -> None:
    result = run("bench", "--per-op", "--by", level, "--runs", "2", "--threads", "1", "--tower", "text")
    assert result.code == 0, result.err
    columns = ["ms", "share", "kernel"] if level == "kernel" else [level, "ms", "share"]
    assert any(line.split()[:3] == columns for line in result.out.splitlines())


def test_json_holds_a_profile_of_each_variant(run: Command, tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    result = run(
        "bench", "--per-op", "--variant", "onnx-int8", "--tower", "text", "--runs", "2", "--json", "-o", out
    )
    assert result.code == 0
    document = json.loads(result.out)
    assert document == json.loads(out.read_text(encoding="utf-8"))
    (profile,) = [OpProfile.from_dict(each) for each in document["profiles"]]
    assert profile.runs == 2
    assert profile.bundle["variant"] == "onnx-int8"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--runs", "3"), 2, "--runs is for --per-op"),
        (("--by", "stage"), 2, "--by is for --per-op"),
        (("--trace", "x.json"), 2, "--trace is for --per-op"),
        (("--per-op", "--by", "layer"), 2, "'layer' is not one of"),
        (("--per-op", "--trace", "not-there/x.json"), 1, "--trace 'not-there/x.json': there is no directory"),
        (("--per-op", "--trace", "."), 1, "--trace '.': this is a directory"),
        (("--per-op", "--threads", "1,2"), 2, "--per-op takes one --threads, got 2"),
        (("--per-op", "--cold", "1"), 2, "--cold is for figures of whole calls"),
        (("--per-op", "--fast-decode"), 2, "--fast-decode is for figures of whole calls"),
        (("--threads", "1,x"), 2, "'1,x' is not a list of whole numbers of at least 1"),
        (("--batch", "0"), 2, "'0' is not a list"),
        (("--labels", "a", "--label-file", "b"), 2, "--labels and --label-file"),
        (("--variant", "onnx-fp64"), 1, "no variant 'onnx-fp64'"),
        (("--backend", "openvino", "--backend", "tensorrt"), 1, "backend 'tensorrt' runs tensorrt files"),
        (("--images", "not-there"), 1, "'not-there': no such file or folder"),
        (("-o", "not-there/x.json"), 1, "--output 'not-there/x.json': there is no directory 'not-there'"),
        (("-o", "."), 1, "--output '.': this is a directory"),
        (("--html", "not-there/x.html"), 1, "--html 'not-there/x.html': there is no directory"),
        (("--keep-partial",), 2, "--keep-partial is for --device-report"),
        (("--device-report", "x.json", "--cold", "1"), 2, "--cold is for runs without --device-report"),
        (("--device-report", "x.json", "--threads", "1,2"), 2, "--device-report runs one target, got 2"),
        (("--device-report", "x.json", "--batch", "2"), 1, "got batch 2, expected 1"),
        (("--device-report", "x.json", "--device-name", "a b"), 1, "--device-name 'a b': expected letters"),
        (("--device-report", "x.json", "--duration", "1"), 1, "duration: got 1 s"),
        (("not-a-bundle",), 1, "not-a-bundle"),
        (("--per-op", "--variant", "onnx-fp64"), 1, "onnx-fp64"),
        (("--per-op", "-o", "not-there/x.json"), 1, "there is no directory 'not-there'"),
        (("--per-op", "not-a-bundle"), 1, "not-a-bundle"),
        (("--per-op", "--tower", "audio"), 2, "audio"),
    ],
)
def test_bad_input_is_one_sentence(run: Command, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run("bench", *arguments)
    assert result.code == code
    assert message in result.err


# --- whole calls ------------------------------------------------------------------------------------------

_QUICK = ("--min-samples", 3, "--duration", 0, "--cold", 0)


def test_bundles_are_measured_without_a_word_more(
    run: Command, tiny_bundle_session: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    result = run("bench", tiny_bundle_session, *_QUICK, "--threads", "1", "--batch", "1,2", "-o", out)
    assert (result.code, result.err) == (0, f"edgeclip: wrote {out}\n")
    report = BenchReport.from_json(out.read_bytes())
    assert result.out == report.to_table() + "\n"
    assert [(run.threads, run.batch) for run in report.runs] == [(1, 1), (1, 2)]
    assert report.command.startswith(f"edgeclip bench {tiny_bundle_session} --min-samples 3")
    assert report.pictures.source == "demonstration photographs"
    assert report.labels.source == "bundle"


def test_variants_engines_and_threads_are_combined(
    run: Command, tiny_bundle_session: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    labels = tmp_path / "mine.txt"
    labels.write_text("red\nblue\n")
    result = run(
        *("bench", tiny_bundle_session, *_QUICK, "--json", "--threads", "1,2", "--label-file", labels),
        *("--variant", "onnx-fp32", "--backend", "ort", "--backend", "openvino", "--fast-decode"),
    )
    assert result.code == 0
    report = BenchReport.from_json(result.out)
    assert [run.name for run in report.runs] == [
        f"onnx-fp32,backend={backend},threads={threads},decode=fast"
        for backend in ("ort", "openvino")
        for threads in (1, 2)
    ]
    assert all(run.stages[END_TO_END].n >= 3 for run in report.runs)
    assert {run.placement["backend"] for run in report.runs} == {"ort", "openvino"}
    assert (report.labels.n, report.labels.source) == (2, "mine.txt")


def test_a_disturbed_run_is_said_beside_its_document(
    run: Command, tiny_bundle_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeclip.bench.neighbours.Neighbours.others_share", 0.42)
    result = run("bench", tiny_bundle_session, *_QUICK, "--threads", "1", "--json")
    assert BenchReport.from_json(result.out).runs[0].interference.others_share == 0.42
    assert "edgeclip: warning: onnx-int8,threads=1: other programs used 42% of the machine" in result.err


def test_help_is_of_the_measurement_and_names_the_other_command(run: Command) -> None:
    for arguments in (("bench", "--help"), ("bench", "-h")):
        result = run(*arguments)
        assert result.code == 0
        assert result.out.startswith("Usage: edgeclip bench [OPTIONS] [BUNDLE]\n")
        assert "compare …" in result.out
    assert run("bench", "compare", "--help").out.startswith("Usage: edgeclip bench compare [OPTIONS] A B\n")


def test_an_interrupt_leaves_what_was_there(
    run: Command, tiny_bundle_session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeclip.bench.run._rounds", interrupted)
    (tmp_path / "bench.json").write_text("older")
    result = run("bench", tiny_bundle_session, *_QUICK, "-o", tmp_path / "bench.json")
    assert result.code == 130
    assert (tmp_path / "bench.json").read_text() == "older"
    assert list(tmp_path.iterdir()) == [tmp_path / "bench.json"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_ctrl_c_ends_it_and_its_processes(tiny_bundle_session: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeclip", "bench", str(tiny_bundle_session), "--cold", "500"]
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = subprocess.Popen(
        [*command, "-o", str(tmp_path / "bench.json")],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob("edgeclip-cold-*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.endswith("edgeclip: interrupted\n")
    assert not (tmp_path / "bench.json").exists()
    assert list(folder.iterdir()) == []


def test_a_page_is_written_beside_the_table(run: Command, tiny_bundle_session: Path, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    result = run("bench", tiny_bundle_session, *_QUICK, "--threads", "1", "--html", page)
    assert (result.code, result.err) == (0, f"edgeclip: wrote {page}\n")
    assert END_TO_END in result.out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


# --- the long run -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_device_report_is_what_gates_read(run: Command, tiny_bundle_session: Path, tmp_path: Path) -> None:
    from edgeclip.export.device_report import read_device_report

    path = tmp_path / "device.json"
    command = ("bench", tiny_bundle_session, "--variant", "onnx-fp32", "--threads", "1", "--duration", 3)
    result = run(*command, "--device-report", path, "--device-name", "toaster")
    assert (result.code, result.err) == (0, f"edgeclip: wrote {path}\n")
    report = read_device_report(path)
    assert (report.device, report.variant, report.verify.status) == ("toaster", "onnx-fp32", "passed")
    assert report.sustained is not None
    assert report.sustained.images > 1
    assert result.out.splitlines()[0] == "tiny-colours onnx-fp32 on toaster"
    assert f"{report.sustained.images:,} pictures in 3 s" in result.out


@pytest.mark.parametrize(
    ("status", "interrupted", "code"), [("passed", False, 0), ("failed", False, 4), ("passed", True, 130)]
)
def test_how_a_long_run_ended_is_the_exit_code(
    run: Command,
    tiny_bundle_session: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    interrupted: bool,
    code: int,
) -> None:
    said = SimpleNamespace(
        bundle=SimpleNamespace(name="tiny"),
        variant="v",
        device="d",
        verify=SimpleNamespace(status=status, reason="cosine 0.2"),
        sustained=None
        if status == "failed"
        else SimpleNamespace(interrupted=interrupted, to_table=lambda: "table"),
    )
    monkeypatch.setattr("edgeclip.export.device_report.run_device_report", lambda *_, **__: said)
    result = run("bench", tiny_bundle_session, "--device-report", tmp_path / "d.json")
    assert result.code == code
    assert ("table" in result.out) == (status == "passed")
    assert ("cosine 0.2" in result.err) == (status == "failed")


def test_a_device_is_called_by_its_board(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SimpleNamespace(board="Raspberry Pi 5 Model B Rev 1.0", cpu_model="x", machine="y")
    monkeypatch.setattr("edgeclip.runtime.host.Host.here", lambda: host)
    assert device_name(None) == "raspberry-pi-5-model-b-rev-1-0"
    host.board = None
    host.cpu_model = "Intel(R) Core(TM) i7"
    assert device_name(None) == "intel-r-core-tm-i7"
    assert device_name("mine") == "mine"
