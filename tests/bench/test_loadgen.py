"""MLPerf's LoadGen beside our own loops: what it measures, what it leaves alone, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from command import Command
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.bench import loadgen as module
from edgeclip.bench import loadgen_child as child
from edgeclip.bench.loadgen import LoadGenPlan, check, require_loadgen
from edgeclip.bench.loadgen_report import LoadGenCheck, loadgen_schema
from edgeclip.bench.targets import Target
from edgeclip.bench.workload import picture_files
from edgeclip.errors import BackendError, ConfigError, EdgeClipError, InputError, MissingExtraError

needs_loadgen = pytest.mark.skipif(
    importlib.util.find_spec("mlperf_loadgen") is None, reason="MLPerf's LoadGen is not installed"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("pictures")
    for name in list(COLOURS)[:3]:
        Image.fromarray(np.kron(colour_picture(name), np.ones((3, 3, 1), np.uint8))).save(
            folder / f"{name}.png"
        )
    return picture_files(folder)


@pytest.fixture(scope="module")
def plan(tiny_bundle_session: Path, pictures: tuple[Path, ...]) -> LoadGenPlan:
    target = Target(str(tiny_bundle_session), "onnx-fp32", threads=1, batch=2)
    return LoadGenPlan(target, pictures, given=("decoded", "file"), rounds=2, turn_s=0.2, min_queries=70)


def _process() -> tuple[object, ...]:
    """Return settings of the process that a guest has no business with."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    signals = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    return affinity, signals, dict(os.environ), Path.cwd(), os.nice(0), threading.active_count()


@pytest.fixture(scope="module")
def found(plan: LoadGenPlan, tmp_path_factory: pytest.TempPathFactory) -> LoadGenCheck:
    logs = tmp_path_factory.mktemp("logs") / "made" / "here"
    before = _process()
    document = check(replace(plan, logs=logs))
    assert _process() == before
    names = {folder.name for folder in logs.iterdir()}
    assert names == {
        f"{given}-{scenario}-{number}"
        for given in ("decoded", "file")
        for scenario in ("SingleStream", "Offline")
        for number in (1, 2)
    }
    assert "MLPerf Results Summary" in (logs / "file-Offline-2" / "mlperf_log_summary.txt").read_text()
    return document


@needs_loadgen
def test_both_clocks_measure_every_scenario_on_every_input(found: LoadGenCheck) -> None:
    assert [(each.given, each.scenario) for each in found.scenarios] == [
        ("decoded", "SingleStream"),
        ("decoded", "Offline"),
        ("file", "SingleStream"),
        ("file", "Offline"),
    ]
    for entry in found.scenarios:
        assert len(entry.loadgen) == len(entry.ours) == 2
        for theirs, ours in zip(entry.loadgen, entry.ours, strict=True):
            assert theirs.n >= 70
            assert ours.n >= 70
            assert (theirs.p90_ms is None) == (ours.p90_ms is None) == (entry.scenario == "Offline")
            assert theirs.min_queries_met
        ratios = [a.figure() / b.figure() for a, b in zip(entry.loadgen, entry.ours, strict=True)]
        assert entry.ratio.value == pytest.approx(np.median(ratios))
        assert entry.ratio.low is None  # two rounds carry no interval
        assert 0.2 < entry.ratio.value < 5  # one machine, one classifier
    single = found.scenarios[0]
    assert all(turn.valid and turn.duration_s >= 0.2 for turn in single.loadgen)
    assert all(turn.mean_ms and turn.p90_ms and turn.mean_ms < 5 * turn.p90_ms for turn in single.ours)


@needs_loadgen
def test_nobody_takes_it_for_a_result_of_mlperf(found: LoadGenCheck) -> None:
    assert found.is_mlperf_result is False
    assert {(entry.min_duration_s, entry.min_query_count) for entry in found.scenarios} == {(0.2, 70)}
    assert found.loadgen_version[0].isdigit()
    *_, last = found.to_table().splitlines()
    assert last.startswith("not an MLPerf result: that takes 600 s in one run")


@needs_loadgen
def test_it_reads_back_and_meets_its_schema(found: LoadGenCheck, repo: Path) -> None:
    assert LoadGenCheck.from_json(found.to_json()) == found
    schema = json.loads((repo / "docs" / "loadgen-check.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(found.to_dict())
    assert not validator.is_valid({**found.to_dict(), "is_mlperf_result": True})
    assert not validator.is_valid({**found.to_dict(), "scenarios": []})


def test_the_schema_is_that_of_the_code(repo: Path) -> None:
    # After a change of edgeclip/bench/loadgen_report.py: python tests/tools/write_bench_schema.py
    text = (repo / "docs" / "loadgen-check.schema.json").read_text(encoding="utf-8")
    assert json.loads(text) == loadgen_schema()


@needs_loadgen
def test_what_loadgen_calls_invalid_is_said_with_its_reason(plan: LoadGenPlan) -> None:
    document = check(replace(plan, given=("decoded",), rounds=6, turn_s=0.1, min_queries=10))
    single, offline = document.scenarios
    # Fewer than 64 queries are too few for its early stopping; quick towers answer more in 0.1 s.
    for turn in single.loadgen:
        assert turn.valid == (turn.min_duration_met and turn.min_queries_met and turn.early_stopping_met)
        assert turn.early_stopping_met == (turn.n >= 64)
    assert offline.ratio.low is not None
    assert offline.ratio.high is not None
    assert offline.ratio.low <= offline.ratio.value <= offline.ratio.high
    valid = sum(turn.valid for turn in single.loadgen)
    assert f"{valid} of 6" in document.to_table()


@needs_loadgen
@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("raise InputError('a broken picture')", InputError, r"^a broken picture$"),
        (
            "raise MemoryError('none left')",
            BackendError,
            r"LoadGen asked for failed: MemoryError\('none left'\)",
        ),
        ("os.write(2, b'out of memory'); os.abort()", BackendError, r"ended with -6 .*\(.*out of memory.*\)"),
    ],
)
def test_what_goes_wrong_in_a_call_is_told_at_once(
    plan: LoadGenPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, kind: type, said: str
) -> None:
    """LoadGen itself ends its process with a signal where an error leaves a callback, and says nothing."""
    (tmp_path / "broken_calls.py").write_text(
        "import itertools, os\n"
        "import edgeclip.classify as classify\n"
        "from edgeclip.errors import InputError\n"
        "calls, real = itertools.count(), classify.ZeroShotClassifier._said\n"
        "def say_some(self, *a, **k):\n"
        f"    if next(calls) > 100: {body}\n"
        "    return real(self, *a, **k)\n"
        "classify.ZeroShotClassifier._said = say_some\n"
    )
    program = "import sys; sys.path[:] = sys.argv[1:]; import broken_calls"
    monkeypatch.setattr(
        module, "_PROGRAM", f"{program}; from edgeclip.bench.loadgen_child import main; main()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    began = time.perf_counter()
    with pytest.raises(kind, match=said):
        check(replace(plan, given=("decoded",), turn_s=600))
    assert time.perf_counter() - began < 60


@needs_loadgen
def test_a_process_that_never_begins_is_an_error(plan: LoadGenPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROGRAM", "import os; os.close(0); raise SystemExit('it rains')")
    many = replace(plan, pictures=plan.pictures * 5000)  # more than a pipe holds
    with pytest.raises(BackendError, match=r"ended with 1 and without a report \(it rains\)"):
        check(many)


@needs_loadgen
def test_an_engine_that_is_not_installed_is_named(plan: LoadGenPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"type": "failure", "kind": "MissingExtraError", "error": "needs the extra x"}'
    monkeypatch.setattr(module, "_PROGRAM", f"print({said!r})")
    with pytest.raises(EdgeClipError, match=r"^needs the extra x$"):
        check(plan)


@needs_loadgen
def test_logs_are_removed_unless_they_are_asked_for(
    plan: LoadGenPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    check(replace(plan, given=("decoded",), rounds=1, turn_s=0.1))
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"LoadGen's logs cannot be kept in '.*file/logs': Not a directory"):
        check(replace(plan, logs=tmp_path / "file" / "logs"))


def test_a_log_without_a_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"LoadGen's log '.*detail\.txt' cannot be read"):
        child._log(tmp_path)
    (tmp_path / "mlperf_log_detail.txt").write_text(':::MLLOG {"key": "x", "value": 1}\n')
    with pytest.raises(BackendError, match=r"holds no result: LoadGen ended early"):
        child._log(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": ()}, "pictures: got none"),
        ({"rounds": 0}, "got 0 rounds"),
        ({"min_queries": 0}, "0 queries"),
        ({"given": ()}, "0 kinds of input"),
        ({"turn_s": float("nan")}, "turns of nan s, expected 0.1 to 3600"),
    ],
)
def test_a_plan_out_of_range_is_an_error(plan: LoadGenPlan, changes: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        replace(plan, **changes)  # type: ignore[arg-type]


# --- the command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_a_missing_package_is_one_sentence(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    result = run("bench", "loadgen")
    assert result.code == 1
    assert result.err == (
        "edgeclip: error: MLPerf's LoadGen (which has wheels for Linux on x86-64, and none for Linux on ARM) "
        "needs the package 'mlcommons-loadgen', which is not installed: run pip install "
        '"edgeclip[loadgen]".\n'
    )
    with pytest.raises(MissingExtraError):
        require_loadgen()


@needs_loadgen
def test_the_command_prints_the_table_or_the_document(
    run: Command, tiny_bundle_session: Path, tmp_path: Path
) -> None:
    out = tmp_path / "check.json"
    quick = ("--threads", "1", "--rounds", "1", "--turn", "0.1", "--min-queries", "64")
    result = run("bench", "loadgen", tiny_bundle_session, *quick, "-o", out)
    assert (result.code, result.err) == (0, f"edgeclip: wrote {out}\n")
    document = LoadGenCheck.from_json(out.read_bytes())
    assert result.out == document.to_table() + "\n"
    assert document.command.startswith(f"edgeclip bench loadgen {tiny_bundle_session} --threads 1")
    assert {entry.given for entry in document.scenarios} == {"decoded"}
    again = run("bench", "loadgen", tiny_bundle_session, *quick, "--json", "--input", "file")
    assert {entry.given for entry in LoadGenCheck.from_json(again.out).scenarios} == {"file"}


@needs_loadgen
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("not-a-bundle",), 1, "not-a-bundle"),
        (("--turn", "0"), 2, "--turn"),
        (("--input", "video"), 2, "video"),
        (("--images", "not-there"), 1, "'not-there': no such file or folder"),
        (("-o", "not-there/x.json"), 1, "there is no directory 'not-there'"),
        (("--variant", "onnx-fp64"), 1, "no variant 'onnx-fp64'"),
        (("--labels", "a", "--label-file", "b"), 2, "--labels and --label-file"),
    ],
)
def test_bad_input_is_one_sentence(run: Command, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run("bench", "loadgen", *arguments)
    assert result.code == code
    assert message in result.err


@needs_loadgen
@pytest.mark.slow
def test_an_interrupt_ends_it_soon(tiny_bundle: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    command = [sys.executable, "-m", "edgeclip", "bench", "loadgen", str(tiny_bundle), "--turn", "600"]
    process = subprocess.Popen([*command, "--keep-logs", str(logs)], stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: logs.is_dir() and any(logs.rglob("mlperf_log_detail.txt")))
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in said


def _wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)
