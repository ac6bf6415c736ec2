"""The bench command's core: what a report holds, how targets take turns, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.bench import run as bench_run
from edgeclip.bench.cold import ColdResult, ColdTarget
from edgeclip.bench.operations import Operations
from edgeclip.bench.report import (
    END_TO_END,
    BenchReport,
    InterferenceEntry,
    PeaksEntry,
    bench_schema,
    stage_entry,
)
from edgeclip.bench.run import BenchPlan, benchmark
from edgeclip.bench.targets import Target
from edgeclip.bench.workload import Workload, picture_files
from edgeclip.bundle import Bundle
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError, InputError
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.runtime.latency import STAGES, LatencySamples
from edgeclip.runtime.latency_report import DriftEntry

Changed = Callable[..., BenchReport]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("pictures")
    for name in list(COLOURS)[:3]:
        Image.fromarray(np.kron(colour_picture(name), np.ones((3, 3, 1), np.uint8))).save(
            folder / f"{name}.png"
        )
    return picture_files(folder)


@pytest.fixture(scope="module")
def workload(pictures: tuple[Path, ...]) -> Workload:
    labels = LabelSet.of(["red", "dark green", "blue"])
    return Workload(pictures, "pictures of colours", labels, Templates.of("one"), "--labels")


@pytest.fixture(scope="module")
def report(tiny_bundle_session: Path, workload: Workload) -> BenchReport:
    """Two batches of one variant and one of another, measured for real."""
    targets = [("onnx-fp32", 1), ("onnx-fp32", 2), ("onnx-int8", 1)]
    plan = BenchPlan(
        tuple(Target(str(tiny_bundle_session), name, threads=1, batch=batch) for name, batch in targets),
        workload,
        duration_s=0.0,
        min_samples=30,
        cold=0,
        command="edgeclip bench",
        peak_sizes=(64,),
    )
    return benchmark(plan)


def test_every_target_is_a_run(report: BenchReport) -> None:
    assert [run.name for run in report.runs] == [
        "onnx-fp32,threads=1",
        "onnx-fp32,threads=1,batch=2",
        "onnx-int8,threads=1",
    ]
    for run, batch in zip(report.runs, (1, 2, 1), strict=True):
        assert set(run.stages) == {*STAGES, END_TO_END}
        assert (run.batch, run.threads, run.placement["backend"]) == (batch, 1, "ort")
        whole = run.stages[END_TO_END]
        assert whole.batch == run.stages["image_tower"].batch == batch
        assert whole.n == len(whole.samples_ms) >= 30
        assert run.stages["decode"].n == batch * whole.n  # every picture is decoded on its own
        assert run.stages["image_tower"].n == run.stages["head"].n == whole.n
        assert whole.first_ms is not None
        assert whole.ms == whole.wall_ms / batch
        assert run.images_per_s.value == pytest.approx(1e3 / whole.ms)
        assert run.images_per_s.low is not None
        assert run.images_per_s.high is not None
        assert run.images_per_s.low <= run.images_per_s.value <= run.images_per_s.high


def test_stages_of_single_pictures_are_parts_of_their_calls(report: BenchReport) -> None:
    parts = [report.runs[0].stages[name] for name in ("decode", "resize", "image_tower", "head")]
    sums = np.sum([part.samples_ms for part in parts], axis=0)
    assert (sums <= np.array(report.runs[0].stages[END_TO_END].samples_ms)).all()


def test_labels_are_encoded_and_found(report: BenchReport) -> None:
    for run in report.runs:
        assert set(run.text) == {"uncached", "cached"}
        assert run.text["uncached"].n == run.text["cached"].n >= 3
        assert run.text["uncached"].batch == run.stages["text_tower"].batch == 3
    assert report.labels.n == 3
    assert (report.labels.source, report.labels.templates) == ("--labels", "one")


def test_arithmetic_is_of_this_tower_and_this_run(report: BenchReport) -> None:
    assert report.peaks is not None
    assert set(report.peaks.float_gflops) == set(report.peaks.int8_gops) == {"64"}
    real, integer = report.runs[0].arithmetic, report.runs[2].arithmetic
    assert real is not None
    assert integer is not None
    assert real.operations == integer.operations
    assert (real.int8_operations, integer.int8_operations) == (0, 0)  # its weights alone are bytes
    tower_s = report.runs[0].stages["image_tower"].ms / 1e3
    assert real.achieved_per_s == pytest.approx(real.operations / tower_s)
    assert real.peak_per_s == pytest.approx(1e9 * report.peaks.float_gflops["64"])
    assert real.share == pytest.approx(real.achieved_per_s / real.peak_per_s)


def test_a_mix_is_held_against_a_mix_of_ceilings() -> None:
    tower = stage_entry(LatencySamples(np.array([2.0]), batch=2))
    peaks = PeaksEntry(float_gflops={"512": 1.0, "1024": 2.0}, int8_gops={"512": 8.0})
    found = bench_run._arithmetic(Operations(8_000_000, 4_000_000), tower, 2, peaks)
    assert found.achieved_per_s == pytest.approx(8e9)
    # On two threads 4 million float operations take 1 ms at best, as many of bytes a quarter of that.
    assert found.peak_per_s == pytest.approx(8e6 / 1.25e-3)
    assert (
        bench_run._arithmetic(Operations(8, 0), tower, 2, None).why
        == "no ceiling was measured for this device"
    )


def test_what_was_classified_is_said(report: BenchReport, pictures: tuple[Path, ...]) -> None:
    assert report.pictures.n == 3
    assert report.pictures.megapixels == (pytest.approx(96 * 96 / 1e6),) * 3
    assert report.pictures.size_bytes == sum(path.stat().st_size for path in pictures)
    assert report.host["fingerprint"]
    assert report.versions["onnxruntime"]
    assert report.runs[0].missing == {"cold_start": "--cold 0", "memory": "--cold 0"}
    assert report.runs[0].size_bytes > 0


def test_it_reads_back_and_meets_its_schema(report: BenchReport, repo: Path) -> None:
    assert BenchReport.from_json(report.to_json()) == report
    schema = json.loads((repo / "docs" / "bench-report.schema.json").read_text(encoding="utf-8"))
    # After a change of edgeclip/bench/report.py: python tests/tools/write_bench_schema.py
    assert _ordered(schema) == _ordered(bench_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(report.to_dict())
    broken = report.to_dict()
    broken["runs"][0]["batch"] = 0
    assert not validator.is_valid(broken)
    with pytest.raises(InputError, match=r"bench report cannot be read.*batch"):
        BenchReport.from_dict(broken)


def _ordered(value: Any) -> Any:
    """Return a schema as versions of msgspec and Python agree on it, see ``test_latency_report.py``."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        done = {key: _ordered(item) for key, item in value.items()}
        if "anyOf" in done:
            done["anyOf"] = sorted(done["anyOf"], key=str)
        return done
    return [_ordered(item) for item in value] if isinstance(value, list) else value


# --- the table --------------------------------------------------------------------------------------------


def test_the_table_shows_each_target_and_all_side_by_side(report: BenchReport) -> None:
    lines = report.to_table().splitlines()
    assert lines[0].endswith("3 pictures of colours, 0.0 to 0.0 megapixels; 3 labels")
    assert "onnx-fp32,threads=1,batch=2: ort on cpu, 1 thread(s), batch 2, fp32, exact decoding" in lines
    rows = [line.split() for line in lines]
    assert sum(row[:1] == [END_TO_END] for row in rows) == 3
    assert sum(row[:1] == ["images/s:"] for row in rows) == 3
    assert "no cold_start: --cold 0" in lines
    (summary,) = [place for place, row in enumerate(rows) if row[:1] == ["target"]]
    assert [row[0] for row in rows[summary + 1 : summary + 4]] == [run.name for run in report.runs]
    assert any(line.startswith("best matrix product of one thread: ") for line in lines)


@pytest.mark.parametrize(
    ("interference", "said"),
    [
        (InterferenceEntry(steal_share=0.021), "the hypervisor gave 2.1% of the time to others"),
        (
            InterferenceEntry(drift=DriftEntry(ratio=1.2, low=1.1, high=1.3)),
            "its last third ran 20.0% slower",
        ),
        (
            InterferenceEntry(drift=DriftEntry(ratio=0.8, low=0.7, high=0.9)),
            "its last third ran 20.0% faster",
        ),
    ],
)
def test_disturbed_runs_are_marked(report: BenchReport, interference: InterferenceEntry, said: str) -> None:
    raw = report.to_dict()
    for run in raw["runs"]:
        run["interference"] = {"steal_share": 0.0, "drift": None}
    calm = BenchReport.from_dict(raw)
    assert "warning" not in "\n".join(calm.to_table().splitlines()[:-2])
    raw["runs"][1]["interference"] = json.loads(json.dumps(_plain(interference)))
    table = BenchReport.from_dict(raw).to_table()
    assert f"warning: {said}" in table
    assert table.count("disturbed") == 1


@pytest.mark.parametrize(
    "interference",
    [
        InterferenceEntry(steal_share=0.009, others_share=0.09),
        InterferenceEntry(drift=DriftEntry(ratio=1.04, low=1.02, high=1.06)),
        InterferenceEntry(drift=DriftEntry(ratio=1.2, low=0.9, high=1.5)),
    ],
)
def test_what_is_small_or_uncertain_is_no_warning(
    report: BenchReport, interference: InterferenceEntry
) -> None:
    raw = report.to_dict()["runs"][0]
    raw["interference"] = _plain(interference)
    run = BenchReport.from_dict({**report.to_dict(), "runs": [raw]}).runs[0]
    assert run.warnings() == []


def _plain(entry: InterferenceEntry) -> dict[str, Any]:
    drift = entry.drift
    said = None if drift is None else {"ratio": drift.ratio, "low": drift.low, "high": drift.high}
    return {"steal_share": entry.steal_share, "others_share": entry.others_share, "drift": said}


# --- turns ------------------------------------------------------------------------------------------------


def test_targets_take_turns_in_rounds(
    tiny_bundle_session: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    turn = bench_run._turn

    def noted(lane: Any, pictures: tuple[Path, ...]) -> None:
        turns.append(lane.subject.target.short_name)
        turn(lane, pictures)

    monkeypatch.setattr(bench_run, "_turn", noted)
    monkeypatch.setattr(bench_run, "_TURN_CALLS", 1)
    targets = tuple(
        Target(str(tiny_bundle_session), "onnx-fp32", threads=1, batch=batch) for batch in (1, 2, 3)
    )
    report = benchmark(BenchPlan(targets, workload, 0.0, 20, cold=0, seed=4, peak_sizes=()))
    rounds = [turns[start : start + 3] for start in range(0, len(turns), 3)]
    names = [target.short_name for target in targets]
    assert len(rounds) == 20
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 2
    assert report.peaks is None
    assert {run.stages[END_TO_END].n for run in report.runs} == {20}


def test_slow_and_quick_targets_end_together(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[float] = []

    def turn(lane: Any, pictures: tuple[Path, ...]) -> None:
        turns.append(lane.ms)
        calls = max(1, round(30 / lane.ms))
        lane.wall_ms += [lane.ms] * calls
        lane.spent_ns += round(calls * lane.ms * 1e6)

    monkeypatch.setattr(bench_run, "_turn", turn)
    lanes: Any = [SimpleNamespace(ms=ms, wall_ms=[], spent_ns=0) for ms in (300.0, 20.0, 1.0)]
    bench_run._rounds(BenchPlan((Target("a"),), workload, 10.0, 50), lanes, {}, None, lambda said: None)
    assert all(len(lane.wall_ms) >= 50 and lane.spent_ns >= 10e9 for lane in lanes)
    for ms in (300.0, 20.0, 1.0):
        places = [place for place, each in enumerate(turns) if each == ms]
        assert places[0] < 0.05 * len(turns)
        assert places[-1] > 0.95 * len(turns)
        assert np.median(places) == pytest.approx(0.5 * len(turns), rel=0.1)


def test_pictures_of_unlike_sizes_are_no_drift() -> None:
    draw = np.random.default_rng(0)
    sizes = [40.0, 1.0, 3.0]

    def drift(factor: float) -> DriftEntry | None:
        # Three pictures in turn; calls of the last third take so much longer.
        samples = []
        for call in range(300):
            ms = sizes[call % 3] * draw.uniform(0.98, 1.02) * (factor if call >= 200 else 1.0)
            samples.append((ms, call % 3))
        return bench_run._drift(samples)

    steady, slower = drift(1.0), drift(1.2)
    assert steady is not None
    assert slower is not None
    assert steady.low <= 1 <= steady.high
    assert abs(steady.ratio - 1) < 0.02
    assert slower.ratio == pytest.approx(1.2, abs=0.02)
    assert slower.low > 1.1


def test_too_few_calls_of_each_picture_say_nothing_of_drift() -> None:
    assert bench_run._drift([(1.0, call % 40) for call in range(80)]) is None


# --- refusals ---------------------------------------------------------------------------------------------


def test_a_target_that_cannot_run_ends_it_before_anything_is_measured(
    tiny_bundle_session: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "measure_cold", lambda *_, **__: pytest.fail("something was measured"))
    monkeypatch.setattr(bench_run, "_rounds", lambda *_: pytest.fail("something was measured"))
    where = str(tiny_bundle_session)
    targets = (Target(where, "onnx-fp32"), Target(where, "onnx-fp32", "tensorrt"))
    with pytest.raises(BackendUnavailableError, match=r"variant 'onnx-fp32' cannot be run here.*tensorrt"):
        benchmark(BenchPlan(targets, workload))


def test_a_picture_that_cannot_be_read_ends_it(tiny_bundle_session: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    plan = BenchPlan((Target(str(tiny_bundle_session)),), Workload(picture_files(tmp_path)), cold=0)
    with pytest.raises(InputError, match=r"broken\.jpg"):
        benchmark(plan)


def test_plans_that_mean_nothing(workload: Workload) -> None:
    with pytest.raises(ConfigError, match="got no targets"):
        BenchPlan((), workload)
    with pytest.raises(ConfigError, match="targets of 2 bundles, 'a' first"):
        BenchPlan((Target("a"), Target("b")), workload)
    with pytest.raises(ConfigError, match="5 cold starts and inf s"):
        BenchPlan((Target("a"),), workload, math.inf)
    with pytest.raises(ConfigError, match="got 0 samples"):
        BenchPlan((Target("a"),), workload, min_samples=0)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no picture files"):
        picture_files(tmp_path)


def test_auto_is_called_by_the_name_of_what_it_stands_for(
    tiny_bundle_session: Path, workload: Workload
) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    where, first = str(tiny_bundle_session), bundle.manifest.default_variants[0]
    (named,) = bench_run._subjects(BenchPlan((Target(where), Target(where, first)), workload), bundle)
    assert named.target == Target(where, first)


def test_a_bundle_without_a_text_tower_says_so(
    tmp_path: Path, workload: Workload, tiny_bundle_session: Path
) -> None:
    from edgeclip.bundle_tools import slim_bundle

    slim_bundle(Bundle.open(tiny_bundle_session), tmp_path / "slim", variants=["onnx-fp32"], drop_text=True)
    plan = BenchPlan(
        (Target(str(tmp_path / "slim"), threads=1),), Workload(workload.pictures), 0.0, 3, 0, peak_sizes=()
    )
    (run,) = benchmark(plan).runs
    assert run.missing["text"] == "the bundle has no text tower"
    assert run.text == {}
    assert "text_tower" not in run.stages


def test_a_text_tower_that_does_not_open_is_a_reason(
    tiny_bundle: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *, timed: bool = True) -> None:
        raise BackendError("it was not compiled")

    monkeypatch.setattr("edgeclip.bench.text_path.TextPath.measure", refuse)
    plan = BenchPlan(
        (Target(str(tiny_bundle), threads=1),), Workload(workload.pictures), 0.0, 3, 0, peak_sizes=()
    )
    assert benchmark(plan).runs[0].missing["text"] == "it was not compiled"


def test_batches_share_their_cold_starts(
    tiny_bundle_session: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def measure(targets: list[ColdTarget], *_: Any, **__: Any) -> list[ColdResult]:
        started.extend(each.target.short_name for each in targets)
        return [ColdResult(missing={"cold_start": each.target.short_name}) for each in targets]

    monkeypatch.setattr(bench_run, "measure_cold", measure)
    where = str(tiny_bundle_session)
    targets = [Target(where, "onnx-fp32", threads=count, batch=batch) for count in (1, 2) for batch in (1, 2)]
    report = benchmark(BenchPlan(tuple(targets), workload, 0.0, 2, cold=1, peak_sizes=()))
    assert started == ["onnx-fp32,threads=1", "onnx-fp32,threads=2"]
    assert [run.missing["cold_start"] for run in report.runs] == [started[0]] * 2 + [started[1]] * 2
