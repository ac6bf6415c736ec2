"""The sustained protocol: figures of simulated runs with known truth, a short real run, and its gate."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeclip.bench.device_report import (
    DeviceReport,
    VerifyEntry,
    check_writable,
    read_device_report,
    sustained_report,
    write_device_report,
)
from edgeclip.bench.sensors import Gauge, SensorLog
from edgeclip.bench.sustained import (
    SustainedEntry,
    SustainedPlan,
    change_of_median,
    summarize,
    sustain,
)
from edgeclip.bench.targets import Target
from edgeclip.bench.workload import DEMO, Workload, picture_files
from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import ConfigError, InputError
from edgeclip.export.device_report import run_device_report, verify_here
from edgeclip.export.pipeline import judge_bundle
from edgeclip.export.pipeline_recipe import PipelineRecipe, parse_pipeline
from edgeclip.runtime.latency import StageClock
from edgeclip.runtime.session import RuntimeOptions

ONE_THREAD = RuntimeOptions(threads=1)


def _entry(times_ms: np.ndarray[Any, np.dtype[np.float64]], **changes: Any) -> SustainedEntry:
    """Return what follows from pictures one after the other without a gap."""
    with SensorLog([]) as log:
        pass
    said: dict[str, Any] = {
        "asked_s": 600.0, "interrupted": False, "stages_every": 1, "sensors": log.result(),
    }  # fmt: skip
    return summarize(times_ms, np.cumsum(times_ms) / 1e3, **(said | changes))


# --- figures of known runs ---------------------------------------------------------------------------------


def test_a_device_that_slows_down_in_the_middle() -> None:
    # two minutes at 10 ms, a minute at 40 ms, then 15 ms for the rest: what a throttling board does
    times_ms = np.concatenate([np.full(12_000, 10.0), np.full(1_500, 40.0), np.full(28_000, 15.0)])
    said = _entry(times_ms)
    assert said.images == sum(said.images_by_second) == 41_500
    assert said.lasted_s == 600.0
    assert said.window_s == 60
    assert said.first is not None
    assert said.last is not None
    assert said.first.p50 is not None
    assert said.last.p50 is not None
    assert (said.first.p50.ms, said.last.p50.ms) == (10.0, 15.0)
    assert said.first.images_per_s == pytest.approx(100, abs=0.1)
    assert said.change is not None
    assert said.change.ratio == 1.5
    assert said.slowest_minute is not None
    assert said.slowest_minute.from_s == pytest.approx(120, abs=1)
    assert said.slowest_minute.images_per_s == pytest.approx(25, abs=0.2)
    assert said.throttled.status == "unknown"
    text = said.to_table()
    assert "41,500 pictures in 600 s, 69.17 a second" in text
    assert "last / first: 1.500 (1.500 to 1.500)" in text
    assert "throttled: unknown" in text
    assert "reading sensors" not in text


def test_a_picture_counts_for_the_second_in_which_it_was_done() -> None:
    said = _entry(np.array([1500.0, 400.0, 200.0, 1900.0, 100.0]))  # done at 1.5, 1.9, 2.1, 4.0, 4.1 s
    assert said.images_by_second == (0, 2, 1, 0, 2)
    assert said.window_s == 1
    assert said.first is not None
    assert said.first.n == 0
    assert said.first.p50 is None
    assert said.change is None
    assert said.slowest_minute is None
    assert "first 1 s: 0 pictures, too few for p50" in said.to_table()


def test_windows_of_a_short_run_do_not_overlap() -> None:
    said = _entry(np.full(9_000, 10.0))
    assert said.window_s == 30
    assert said.first is not None
    assert said.last is not None
    assert (said.first.from_s, said.first.to_s) == (0, 30)
    # cumulated floats may end a hair before 90 s
    assert said.last.to_s - said.last.from_s == 30
    assert said.last.from_s >= said.first.to_s
    assert said.slowest_minute is not None
    assert said.slowest_minute.images_per_s == pytest.approx(100, abs=0.1)


def test_the_interval_covers_the_true_change_of_independent_times() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(120):
        first, last = rng.lognormal(2, 0.2, 240), 1.2 * rng.lognormal(2, 0.2, 240)
        found = change_of_median(first, last, seed=seed)
        assert found is not None
        hits += found.low <= 1.2 <= found.high
    assert hits >= 108  # 114 expected; 107 or fewer of 120 come once in 200 at 95 %


def test_the_interval_covers_the_true_change_of_times_that_are_alike() -> None:
    """Neighbours that are alike for dozens of pictures: resampling single pictures misses far too often."""
    rng = np.random.default_rng(6)

    def minute(factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        noise = rng.normal(size=600)
        level = 0.0
        times = np.empty(600)
        for place in range(600):
            level = 0.9 * level + noise[place] * np.sqrt(1 - 0.81)
            times[place] = factor * np.exp(2 + 0.1 * level)
        return times

    hits = single = 0
    for seed in range(60):
        first, last = minute(1.0), minute(1.1)
        found = change_of_median(first, last, seed=seed)
        assert found is not None
        hits += found.low <= 1.1 <= found.high
        draws = np.random.default_rng(seed).integers(600, size=(2, 300, 600))
        ratios = np.median(last[draws[0]], axis=1) / np.median(first[draws[1]], axis=1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        single += low <= 1.1 <= high
    assert hits >= 50
    assert single < hits - 8


def test_too_few_pictures_have_no_interval() -> None:
    assert change_of_median(np.ones(29), np.ones(100)) is None
    assert change_of_median(np.ones(30), np.ones(30)) is not None


@pytest.mark.parametrize("duration_s", [2.9, 3601.0, float("nan")])
def test_a_run_of_a_senseless_length_is_refused(duration_s: float) -> None:
    with pytest.raises(ConfigError, match=rf"got {duration_s:g} s, expected 3 to 3600"):
        SustainedPlan(duration_s=duration_s)


# --- the loop ----------------------------------------------------------------------------------------------


class _Hot:
    """A sensor that warms up and throttles."""

    gauges = (
        Gauge("soc", "temperature", "C", "test"),
        Gauge("soc", "throttle", "events", "test"),
    )

    def __init__(self) -> None:
        self.readings = 0

    def read(self) -> list[float | None]:
        self.readings += 1
        return [40.0 + self.readings, float(self.readings > 2)]

    def close(self) -> None:
        """Nothing is held."""


def test_every_call_is_timed_and_sensors_are_read_meanwhile() -> None:
    calls: list[int] = []
    shown: list[tuple[float, int, float]] = []
    clock = StageClock()

    def call(number: int) -> None:
        calls.append(number)
        with clock.span("work"):
            time.sleep(0.01)

    run = sustain(
        call,
        plan=SustainedPlan(duration_s=3.0, warmup=2),
        sensors=SensorLog([_Hot()], ["power: nobody"]),
        clock=clock,
        on_progress=lambda *said: shown.append(said),
    )
    assert calls == [0, 1, *range(run.entry.images)]
    assert len(run.end_to_end) == len(run.stages["work"]) == run.entry.images
    assert (run.end_to_end.samples_ms >= run.stages["work"].samples_ms).all()
    assert run.end_to_end.samples_ms.sum() <= run.entry.lasted_s * 1e3 + 1
    assert run.end_to_end.warmup == 2
    assert run.entry.lasted_s >= 3.0
    assert not run.entry.interrupted
    assert clock.spans == ()
    assert 1 <= len(shown) <= 3
    assert run.entry.throttled.status == "yes"
    assert run.entry.sensors.gauges[0].values[:2] == (41.0, 42.0)
    text = run.entry.to_table()
    assert "temperature of soc: 41 °C at first" in text
    assert "throttled: yes (soc: 1 more)" in text
    assert "not told: power: nobody" in text
    assert f"reading sensors cost {run.entry.sensors.cost.share:.2%} of a core" in text


@pytest.mark.parametrize("keep", [False, True])
def test_ctrl_c_throws_away_or_keeps_as_asked(keep: bool) -> None:
    def call(number: int) -> None:
        if number == 7:
            raise KeyboardInterrupt

    plan = SustainedPlan(warmup=1, keep_partial=keep)
    if not keep:
        with pytest.raises(KeyboardInterrupt):
            sustain(call, plan=plan, sensors=SensorLog([]))
        return
    run = sustain(call, plan=plan, sensors=SensorLog([]))
    assert run.entry.interrupted
    assert run.entry.images == len(run.end_to_end) == 7
    assert run.entry.asked_s == 600
    assert "interrupted, 600 s were asked for" in run.entry.to_table()


def test_ctrl_c_before_the_first_picture_keeps_nothing() -> None:
    def call(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sustain(call, plan=SustainedPlan(warmup=0, keep_partial=True), sensors=SensorLog([]))


# --- a real run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny_bundle_session: Path) -> DeviceReport:
    """Three seconds of the tiny bundle on this machine."""
    bundle = Bundle.open(tiny_bundle_session)
    clock = StageClock()
    verify = verify_here(bundle, "onnx-int8", options=ONE_THREAD)
    with ZeroShotClassifier.open(bundle, variant="onnx-int8", options=ONE_THREAD, clock=clock) as classifier:
        return sustained_report(
            classifier,
            Workload(picture_files(DEMO)),
            device="pi",
            verify=verify,
            clock=clock,
            plan=SustainedPlan(duration_s=3.0),
            sensors=SensorLog([_Hot()]),
        )


def test_a_short_real_run_has_all_its_parts(report: DeviceReport) -> None:
    assert report.verify.status == "passed"
    assert report.latency is not None
    assert report.sustained is not None
    said = report.sustained
    stages = report.latency.stages
    assert next(iter(stages)) == "end_to_end"
    assert {"decode", "resize", "image_tower", "head"} <= set(stages)
    assert stages["end_to_end"].n == said.images == sum(said.images_by_second)
    assert stages["image_tower"].n == -(-said.images // said.stages_every)
    assert said.window_s == 1
    assert said.pictures is not None
    assert said.pictures.n == len(said.pictures.megapixels) == len(picture_files(DEMO))
    assert said.labels is not None
    assert said.labels.source == "bundle"
    assert report.latency.placement["threads"] == 1
    assert report.latency.bundle["variant"] == "onnx-int8"
    assert report.bundle.digest == report.latency.bundle["digest"]


def test_a_report_is_read_as_it_was_written_and_fits_its_schema(
    report: DeviceReport, tmp_path: Path, repo: Path
) -> None:
    import jsonschema

    path = tmp_path / "pi.json"
    write_device_report(report, path)
    assert read_device_report(path) == report
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pi.json"]
    schema = json.loads((repo / "docs/ci/device-report.schema.json").read_text(encoding="utf-8"))
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(path.read_text()))) == []
    # samples stand on a line, so that a report of ten minutes can be looked at and compared
    text = path.read_text()
    assert text.count("\n") < 1500
    assert json.loads(text) == json.loads(json.dumps(report.to_dict()))


def test_words_that_look_like_numbers_stay_as_they_are(report: DeviceReport, tmp_path: Path) -> None:
    odd = msgspec.structs.replace(report, device="[\n  1,\n  2\n]")
    write_device_report(odd, tmp_path / "odd.json")
    assert read_device_report(tmp_path / "odd.json").device == "[\n  1,\n  2\n]"


def _recipe(**limits: float | str) -> PipelineRecipe:
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in limits.items())
    text = (
        'schema = 1\nkind = "pipeline"\nname = "x"\n[model]\nbundle = "bundle"\n[[gate]]\nname = "pi"\n'
        f'kind = "device-report"\ndevice = "pi"\nvariant = "onnx-int8"\n{lines}'
    )
    return parse_pipeline(text.encode())


def test_the_pipeline_gate_reads_a_sustained_report(
    report: DeviceReport, tiny_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pi.json"
    write_device_report(report, path)
    bundle, read = Bundle.open(tiny_bundle), read_device_report(path)
    assert judge_bundle(_recipe(), bundle, []).exit_code == 3
    for stage in ("image_tower", "end_to_end"):
        assert judge_bundle(_recipe(stage=stage, p50_ms=10_000), bundle, [read]).exit_code == 0
        assert judge_bundle(_recipe(stage=stage, p50_ms=1e-6), bundle, [read]).exit_code == 4


def test_wrong_numbers_are_reported_and_not_timed(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    clock = StageClock()
    with ZeroShotClassifier.open(bundle, variant="onnx-int8", options=ONE_THREAD, clock=clock) as classifier:
        said = sustained_report(
            classifier,
            Workload(picture_files(DEMO)),
            device="pi",
            verify=VerifyEntry(status="failed", reason="cosine 0.1"),
            clock=clock,
            plan=SustainedPlan(),
            sensors=SensorLog([]),
        )
        assert (said.latency, said.sustained) == (None, None)
        assert judge_bundle(_recipe(), bundle, [said]).exit_code == 4
        with pytest.raises(ConfigError, match="got no pictures"):
            sustained_report(
                classifier, Workload(()), device="pi", verify=said.verify, clock=clock, plan=SustainedPlan(),
                sensors=SensorLog([]),
            )  # fmt: skip


# --- files -------------------------------------------------------------------------------------------------


def test_a_place_that_takes_no_file_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none'?/pi.json' cannot be written: No such file"):
        check_writable(tmp_path / "none" / "pi.json")
    with pytest.raises(InputError, match="it is a directory"):
        check_writable(tmp_path)
    check_writable(tmp_path / "pi.json")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_report(
    report: DeviceReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pi.json"
    path.write_text("the old one")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputError, match=r"pi.json' cannot be written: No space left on device"):
        write_device_report(report, path)
    assert [each.name for each in tmp_path.iterdir()] == ["pi.json"]
    assert path.read_text() == "the old one"


SCRIPT = """
import sys
from pathlib import Path
from edgeclip.bench.sustained import SustainedPlan
from edgeclip.bench.targets import Target
from edgeclip.bench.targets import Target
from edgeclip.bench.workload import DEMO, Workload, picture_files
from edgeclip.bundle import Bundle
from edgeclip.export.device_report import run_device_report

run_device_report(
    Path("pi.json"), bundle=Bundle.open(sys.argv[1]), target=Target(sys.argv[1], "onnx-int8", threads=1),
    workload=Workload(picture_files(DEMO)), device="pi",
    plan=SustainedPlan(keep_partial=sys.argv[2] == "keep"),
    on_progress=lambda *said: print("running", flush=True),
)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("kept", ["keep", "throw"])
def test_ctrl_c_leaves_a_whole_report_or_the_old_one(kept: str, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "pi.json").write_text("the old one")
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_bundle), kept], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stdout.readline() == b"running\n"
        program.send_signal(signal.SIGINT)
        _, complaints = program.communicate(timeout=60)
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".edgeclip")]
    if kept == "throw":
        assert b"KeyboardInterrupt" in complaints
        assert (tmp_path / "pi.json").read_text() == "the old one"
        return
    assert program.returncode == 0, complaints
    said = read_device_report(tmp_path / "pi.json").sustained
    assert said is not None
    assert said.interrupted
    assert said.lasted_s < 600


def test_a_file_is_written_by_one_call(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    shared: dict[str, Any] = {"bundle": bundle, "workload": Workload(picture_files(DEMO)), "device": "pi"}
    path, plan = tmp_path / "pi.json", SustainedPlan(duration_s=3.0)
    target = Target(str(tiny_bundle), threads=1)
    said = run_device_report(path, target=target, plan=plan, **shared)
    assert read_device_report(path) == said
    assert said.variant in bundle.manifest.variants
    with pytest.raises(ConfigError, match="got batch 8, expected 1"):
        run_device_report(path, target=Target(str(tiny_bundle), batch=8), plan=plan, **shared)


# --- the collection ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collection() -> Any:
    """The script beside the collected reports."""
    path = Path(__file__).parents[2] / "benchmarks" / "devices" / "table.py"
    spec = importlib.util.spec_from_file_location("devices_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _ten_minutes(report: DeviceReport, **changes: Any) -> DeviceReport:
    """Return the report with what a run of ten minutes would say."""
    assert report.sustained is not None
    rng = np.random.default_rng(0)
    sustained = _entry(np.concatenate([rng.uniform(90, 110, 3000), rng.uniform(112, 128, 2600)]))
    sensors = report.sustained.sensors
    said = msgspec.structs.replace(sustained, sensors=sensors, throttled=report.sustained.throttled)
    return msgspec.structs.replace(report, **({"sustained": said} | changes))


def test_without_reports_there_are_no_figures(collection: Any, tmp_path: Path, capsys: Any) -> None:
    assert collection.main(["--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no figures yet\n"


def test_reports_become_a_table(collection: Any, report: DeviceReport, tmp_path: Path, capsys: Any) -> None:
    full = _ten_minutes(report, device="a|b")
    write_device_report(full, tmp_path / "a.json")
    write_device_report(report, tmp_path / "short.json")
    assert collection.main(["--folder", str(tmp_path)]) == 0
    heading, line, *rows = capsys.readouterr().out.splitlines()
    assert line.count("|") == heading.count("|")
    (row,) = rows
    said = full.sustained
    assert said is not None
    assert said.first is not None
    assert said.first.p50 is not None
    assert said.change is not None
    assert said.slowest_minute is not None
    cells = [cell.strip() for cell in row.replace("\\|", "/").strip("|").split("|")]
    assert cells[:4] == ["a/b", "onnx-int8", "1", f"{said.first.p50.ms:.1f}"]
    assert cells[5].startswith(f"{said.change.ratio:.2f} (")
    assert cells[6] == f"{said.slowest_minute.images_per_s:.1f}"
    assert cells[7].endswith(" °C")
    assert cells[8] == "yes" if said.sensors.at_s[2:] else cells[8] in ("yes", "no")


def test_what_cannot_be_taken_is_said(
    collection: Any, report: DeviceReport, tmp_path: Path, capsys: Any
) -> None:
    write_device_report(report, tmp_path / "short.json")
    assert collection.main(["--check", str(tmp_path / "short.json")]) == 1
    assert capsys.readouterr().out == "it lasted 3 s, expected 600 s\n"
    failed = VerifyEntry(status="failed", reason="cosine 0.1")
    write_device_report(_ten_minutes(report, verify=failed), tmp_path / "failed.json")
    assert collection.main(["--check", str(tmp_path / "failed.json")]) == 1
    assert "verify: failed, expected passed: cosine 0.1" in capsys.readouterr().out
    write_device_report(_ten_minutes(report, sustained=None), tmp_path / "none.json")
    assert collection.main(["--check", str(tmp_path / "none.json")]) == 1
    assert "it has no sustained run" in capsys.readouterr().out
    write_device_report(_ten_minutes(report), tmp_path / "good.json")
    assert collection.main(["--check", str(tmp_path / "good.json")]) == 0
    (tmp_path / "broken.json").write_text("{")
    assert collection.main(["--folder", str(tmp_path)]) == 1
    assert "broken.json' is not valid JSON" in capsys.readouterr().err


def test_every_collected_report_can_be_taken(collection: Any) -> None:
    for path in collection.HERE.glob("*.json"):
        assert collection.unfit(read_device_report(path)) == [], path
