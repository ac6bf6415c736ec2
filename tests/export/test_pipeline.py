"""Runs of a pipeline: what is done again and what is not, what is left behind, and what ends a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import colour_picture, make_tiny_bundle
from wrong_bundle import put_wrong_model

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.calibration.dataset import Selection
from edgeclip.calibration.sensitivity import Int8Target
from edgeclip.errors import BundleError, ConfigError, InputError, ParityError
from edgeclip.export import pipeline_measure, pipeline_state
from edgeclip.export.artifacts import PipelineReport
from edgeclip.export.device_report import (
    DeviceReport,
    device_report,
    device_report_schema,
    read_device_report,
)
from edgeclip.export.pipeline import (
    PipelineOptions,
    judge_bundle,
    judge_run,
    plan_pipeline,
    run_pipeline,
)
from edgeclip.export.pipeline_recipe import PipelineRecipe, parse_pipeline
from edgeclip.export.timing import Effort
from edgeclip.runtime.latency import LatencySamples, RatioInterval
from edgeclip.runtime.session import RuntimeOptions

PROBE = Path(__file__).parents[1] / "data" / "probes" / "vit"
ARTIFACTS = {"report.json", "summary.md", "junit.xml", "model-card.md"}
ONE_THREAD = RuntimeOptions(threads=1)
RECIPE = """
schema = 1
kind = "pipeline"
name = "tiny"
[model]
checkpoint = "checkpoint"
[export]
variants = ["onnx-fp32", "onnx-int8"]
[calibration]
data = "photos"
[bench]
threads = 1
samples = 20
duration_s = 0
[[gate]]
name = "colours"
kind = "accuracy"
data = "photos"
variant = "onnx-int8"
min = 0.9
max_drop = 0.1
against = "onnx-fp32"
[[gate]]
name = "size"
kind = "size"
max_mb = 1
"""
JUDGED = """
schema = 1
kind = "pipeline"
name = "judged"
[model]
bundle = "bundle"
"""


def options(root: Path, **changes: Any) -> PipelineOptions:
    return PipelineOptions(root, root / "out", **changes)


def parse(text: str, *changes: str) -> PipelineRecipe:
    return parse_pipeline(text.encode(), changes=changes)


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """Return a folder with a checkpoint and pictures."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    for name in ("red", "green", "blue"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        Image.fromarray(colour_picture(name)).save(folder / "0.png")
    return tmp_path


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Bundle]:
    """Return a maker of tiny bundles that makes each but once."""
    made: dict[tuple[str, ...], Bundle] = {}

    def template(names: tuple[str, ...]) -> Bundle:
        if names not in made:
            made[names] = make_tiny_bundle(tmp_path_factory.mktemp("template") / "bundle", variants=names)
        return made[names]

    return template


@pytest.fixture
def exports(
    monkeypatch: pytest.MonkeyPatch, templates: Callable[[tuple[str, ...]], Bundle]
) -> list[list[str]]:
    """Put a quick exporter in place of the real one; return the variants it was asked for, call by call."""
    calls: list[list[str]] = []

    def export(checkpoint: Any, specs: Any, out: Path, settings: Any, *, on_step: Any = None) -> Any:
        calls.append([spec.name for spec in specs])
        there = Bundle.open(out).manifest.variants if (out / "manifest.json").is_file() else ()
        template = templates(tuple(dict.fromkeys([*there, *calls[-1]])))
        with BundleWriter(out, manifest=template.raw) as writer:
            for name in template.manifest.files:
                writer.add(name, template.file(name))
            bundle = writer.commit()
        return SimpleNamespace(bundle=bundle, report=SimpleNamespace(remarks=("a remark",)))

    monkeypatch.setattr("edgeclip.export.exporter.export_bundle", export)
    return calls


def outcomes(report: PipelineReport) -> dict[str, str]:
    return {stage.name: stage.outcome for stage in report.stages}


# --- what is done again ------------------------------------------------------------------------------------


def test_a_run_leaves_one_folder_and_another_takes_everything_over(
    workshop: Path, exports: list[list[str]]
) -> None:
    said: list[str] = []
    recipe = parse(RECIPE)
    first = run_pipeline(recipe, options(workshop, on_note=said.append))
    assert (first.status, first.exit_code) == ("passed", 0)
    assert set(outcomes(first).values()) == {"done"}
    assert exports == [["onnx-fp32", "onnx-int8"]]
    assert {each.name for each in (workshop / "out").iterdir()} == ARTIFACTS | {"bundle", "state.json"}
    report = json.loads((workshop / "out" / "report.json").read_text())
    assert len(report["bench"]["onnx-int8"]["stages"]["image_tower"]["samples_ms"]) >= 20
    assert report["measured"]["colours"]["accuracy"] == {"value": 1.0, "n": 3, "against": 1.0}
    said.clear()
    second = run_pipeline(recipe, options(workshop, on_note=said.append))
    assert set(outcomes(second).values()) == {"done", "reused"}
    assert [name for name, outcome in outcomes(second).items() if outcome == "done"] == ["checkpoint"]
    assert "export: reused, 2 variants" in said
    assert len(exports) == 1
    assert second.remarks == ("a remark",)
    again = json.loads((workshop / "out" / "report.json").read_text())
    assert again["bench"] == report["bench"]


@pytest.mark.parametrize(
    ("changes", "made", "redone"),
    [
        ([], [], []),
        (["gate.1.max_mb=2"], [], []),
        (["gate.0.min=0.5"], [], []),
        (["gate.0.limit=2"], [], ["gates"]),
        (["bench.samples=25"], [], ["bench"]),
        (["bench.threads=2"], [], ["verify", "bench", "gates"]),
        (["calibration.samples=16"], [["onnx-int8"]], ["export", "verify"]),
        (["calibration.int8_target='top1=0.98'"], [["onnx-int8"]], ["export", "verify"]),
        (["calibration.finish_int8=8"], [["onnx-int8"]], ["export", "verify"]),
        (["export.opset=19"], [["onnx-fp32", "onnx-int8"]], ["export", "verify"]),
        (["export.limits=['int8:cosine_mean=0.9']"], [["onnx-int8"]], ["export", "verify"]),
        (["export.reference='photos'"], [["onnx-fp32", "onnx-int8"]], ["export", "verify"]),
    ],
)
def test_a_changed_key_redoes_only_what_depends_on_it(
    workshop: Path, exports: list[list[str]], changes: list[str], made: list[list[str]], redone: list[str]
) -> None:
    run_pipeline(parse(RECIPE), options(workshop))
    exports.clear()
    report = run_pipeline(parse(RECIPE, *changes), options(workshop))
    assert exports == made
    done = [name for name, outcome in outcomes(report).items() if outcome == "done"]
    assert done == ["checkpoint", *redone]


def test_spelling_of_a_target_is_no_change_and_contents_of_a_latency_table_are(
    workshop: Path, exports: list[list[str]]
) -> None:
    (workshop / "times.json").write_text("{}")
    table = "calibration.latency_table='times.json'"
    run_pipeline(parse(RECIPE, "calibration.int8_target='cosine=0.99,top1=0.98'", table), options(workshop))
    run_pipeline(parse(RECIPE, "calibration.int8_target='top1=.98, cosine=.990'", table), options(workshop))
    assert len(exports) == 1
    (workshop / "times.json").write_text('{"a": 1}')
    run_pipeline(parse(RECIPE, "calibration.int8_target='cosine=0.99,top1=0.98'", table), options(workshop))
    assert exports[1:] == [["onnx-int8"]]


def test_what_is_finished_together_is_made_again_together(workshop: Path, exports: list[list[str]]) -> None:
    """One training serves all int8 variants of a section, and depends on which they are."""
    both = "export.variants=['onnx-fp32', 'onnx-int8', 'onnx-int8@x86-vnni']"
    finished = "calibration.finish_int8=8"
    run_pipeline(parse(RECIPE, finished), options(workshop))
    run_pipeline(parse(RECIPE, finished, both), options(workshop))
    assert exports[1:] == [["onnx-int8", "onnx-int8@x86-vnni"]]
    run_pipeline(
        parse(RECIPE, finished, both, "export.limits=['onnx-int8:cosine_min=0.5']"), options(workshop)
    )
    assert exports[2:] == [["onnx-int8", "onnx-int8@x86-vnni"]]
    run_pipeline(parse(RECIPE), options(workshop))
    run_pipeline(parse(RECIPE, both), options(workshop))
    assert exports[4:] == [["onnx-int8@x86-vnni"]]


def test_changed_contents_are_noticed_under_the_same_names(workshop: Path, exports: list[list[str]]) -> None:
    run_pipeline(parse(RECIPE), options(workshop))
    exports.clear()
    Image.fromarray(colour_picture("red", seed=5)).save(workshop / "photos" / "red" / "1.png")
    report = run_pipeline(parse(RECIPE), options(workshop))
    assert exports == [["onnx-int8"]]  # its ranges
    assert report.measured["colours"]["accuracy"]["n"] == 4
    exports.clear()
    (workshop / "checkpoint" / "model.safetensors").write_bytes(b"other")
    run_pipeline(parse(RECIPE), options(workshop))
    assert exports == [["onnx-fp32", "onnx-int8"]]


def test_a_folder_called_checkpoint_is_not_taken_for_the_checkpoint(
    workshop: Path, exports: list[list[str]]
) -> None:
    (workshop / "checkpoint").rename(workshop / "weights")
    shutil.copytree(workshop / "photos", workshop / "checkpoint")
    recipe = parse(RECIPE, "model.checkpoint=weights", "calibration.data=checkpoint")
    run_pipeline(recipe, options(workshop))
    exports.clear()
    Image.fromarray(colour_picture("red", seed=5)).save(workshop / "checkpoint" / "red" / "1.png")
    run_pipeline(recipe, options(workshop))
    assert exports == [["onnx-int8"]]


def test_the_bundle_is_whole_while_another_takes_its_place(
    workshop: Path, exports: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it removes a folder leaves half of it."""
    run_pipeline(parse(RECIPE), options(workshop))
    out = workshop / "out"
    (workshop / "checkpoint" / "model.safetensors").write_bytes(b"other")
    removed: list[str] = []

    def killed(path: Path, **how: Any) -> None:
        if path.is_dir():
            removed.append(path.name)
            (path / "manifest.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeclip.export.pipeline.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(parse(RECIPE), options(workshop))
    assert removed
    Bundle.open(out / "bundle").check_files()
    assert run_pipeline(parse(RECIPE), options(workshop)).exit_code == 0
    assert {each.name for each in out.iterdir()} == ARTIFACTS | {"bundle", "state.json"}


def test_variants_that_the_recipe_no_longer_has_go_and_new_ones_come(
    workshop: Path, exports: list[list[str]]
) -> None:
    only = ("export.variants=['onnx-fp32']", "gate=[]")
    run_pipeline(parse(RECIPE), options(workshop))
    report = run_pipeline(parse(RECIPE, *only), options(workshop))
    bundle = Bundle.open(workshop / "out" / "bundle")
    assert list(bundle.manifest.variants) == ["onnx-fp32"]
    assert not [file for file in bundle.path.rglob("*int8*/*") if file.is_file()]
    assert set(report.bench) == {"onnx-fp32"}
    assert len(exports) == 1
    run_pipeline(parse(RECIPE), options(workshop))
    assert exports[1:] == [["onnx-int8"]]
    assert Bundle.open(workshop / "out" / "bundle").manifest.default_variants == ("onnx-int8", "onnx-fp32")


def test_each_section_is_an_export_of_its_own_with_the_limits_that_are_its_own(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    (workshop / "times.json").write_text("{}")

    def export(checkpoint: Any, specs: Any, out: Path, settings: Any, **how: Any) -> Any:
        asked.append((checkpoint, [spec.name for spec in specs], settings))
        raise Killed

    monkeypatch.setattr("edgeclip.export.exporter.export_bundle", export)
    text = RECIPE + '[[export.section]]\nvariants = ["openvino-int8@intel-npu"]\nstatic_batch = 1\n'
    changes = (
        "export.limits=['int8:cosine_mean=0.9', 'openvino-int8@intel-npu:cosine_min=0.5']",
        "export.labels=['red', 'green']",
        "export.templates='a {}'",
        "calibration.samples=20",
        "calibration.selection=random",
        "calibration.seed=3",
        "calibration.int8_target='top1=0.98'",
        "calibration.latency_table='times.json'",
        "calibration.finish_int8=8",
        "gate=[]",
    )
    for skip in (0, 1):
        recipe = parse(text, *changes)
        if skip:
            recipe = parse(text, *changes, "export.variants=['openvino-int8']", "export.target='intel-npu'",
                           "export.static_batch=1", "export.section=[]")  # fmt: skip
        with pytest.raises(Killed):
            run_pipeline(recipe, options(workshop, force=True))
    (checkpoint, names, first), (_, others, second) = asked
    assert checkpoint.path == str(workshop / "checkpoint")
    assert (names, others) == (["onnx-fp32", "onnx-int8"], ["openvino-int8@intel-npu"])
    assert (first.graph.static_batch, second.graph.static_batch) == (None, 1)
    assert [change.number for change in first.gates.limits] == ["cosine_mean"]
    assert [change.number for change in second.gates.limits] == ["cosine_mean", "cosine_min"]
    assert first.references.calibration == workshop / "photos"
    assert first.references.selection == Selection("random", samples=20, seed=3)
    assert first.references.offered.labels.names == ("red", "green")
    assert first.references.offered.templates.texts == ("a {}",)
    assert first.threads == 1
    assert first.build.int8.folder == workshop / "out" / "sensitivity"
    assert (first.build.int8.target, first.build.int8.threads) == (Int8Target(top1=0.98), 1)
    assert (first.build.int8.latency_table, first.finish_int8) == (workshop / "times.json", 8)


def test_sections_without_int8_are_not_asked_for_it(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def export(checkpoint: Any, specs: Any, out: Path, settings: Any, **how: Any) -> Any:
        settings.check(specs)
        asked.append(settings)
        raise Killed

    monkeypatch.setattr("edgeclip.export.exporter.export_bundle", export)
    text = (
        RECIPE.replace(', "onnx-int8"', "") + '[[export.section]]\nvariants = ["openvino-int8@intel-npu"]\n'
    )
    recipe = parse(text, "calibration.int8_target='top1=0.98'", "calibration.finish_int8=8", "gate=[]")
    with pytest.raises(Killed):
        run_pipeline(recipe, options(workshop))
    assert (asked[0].build.int8, asked[0].finish_int8) == (None, 0)


def test_force_does_everything_again(workshop: Path, exports: list[list[str]]) -> None:
    run_pipeline(parse(RECIPE), options(workshop))
    report = run_pipeline(parse(RECIPE), options(workshop, force=True))
    assert len(exports) == 2
    assert set(outcomes(report).values()) == {"done"}


@pytest.mark.parametrize("damage", ["file", "manifest", "state", "edited state"])
def test_what_cannot_be_vouched_for_is_done_again(
    workshop: Path, exports: list[list[str]], damage: str
) -> None:
    run_pipeline(parse(RECIPE), options(workshop))
    out = workshop / "out"
    if damage == "file":
        next((out / "bundle").glob("onnx-int8/*.onnx")).write_bytes(b"")
    elif damage == "manifest":
        path = out / "bundle" / "manifest.json"
        path.write_bytes(path.read_bytes() + b" ")
    elif damage == "state":
        (out / "state.json").write_text('{"schema": 1, "stages"')
    else:
        said = json.loads((out / "state.json").read_text())
        said["stages"]["verify"]["result"] = {"variants": "all well"}
        (out / "state.json").write_text(json.dumps(said))
    report = run_pipeline(parse(RECIPE), options(workshop))
    assert len(exports) == 2
    assert report.status == "passed"
    Bundle.open(out / "bundle").check_files()
    if "state" in damage:
        assert "state.json of an earlier run cannot be used, so everything was done again" in report.remarks


def test_an_update_does_everything_again_that_it_may_change(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse(JUDGED.replace('"bundle"', '"tiny-bundle"') + "[bench]\nsamples = 20\nduration_s = 0\n")
    run_pipeline(recipe, options(tiny_bundle.parent))
    taken = outcomes(run_pipeline(recipe, options(tiny_bundle.parent)))
    assert taken == {"verify": "reused", "bench": "reused"}
    real = pipeline_measure.tools()
    monkeypatch.setattr(pipeline_measure, "tools", lambda: {**real, "edgeclip": "99"})
    again = outcomes(run_pipeline(recipe, options(tiny_bundle.parent)))
    assert again == {"verify": "done", "bench": "done"}


def test_what_noise_left_open_is_measured_again(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = JUDGED.replace('"bundle"', f'"{tiny_bundle}"') + (
        '[[gate]]\nkind = "latency"\nvariant = "onnx-int8"\nbaseline = "onnx-fp32"\nmax_ratio = 1.0\n'
    )
    ends = [(0.9, 1.1), (0.7, 0.8), (2.0, 3.0)]
    measured = []

    def compare(a: Any, b: Any, **how: Any) -> Any:
        low, high = ends[len(measured)]
        measured.append((a.name, b.name, how["tower"]))
        samples = LatencySamples(np.array([1.0, 2.0]))
        return RatioInterval((low + high) / 2, low, high, 60, 0.95, samples, samples, 0)

    monkeypatch.setattr(pipeline_measure, "compare_towers", compare)
    recipe = parse(text)
    root = tiny_bundle.parent
    codes = [run_pipeline(recipe, options(root)).exit_code for _ in range(3)]
    assert codes == [3, 0, 0]
    assert measured == [("onnx-int8", "onnx-fp32", "image")] * 2
    assert run_pipeline(recipe, options(root, force=True)).exit_code == 4


# --- what ends a run ---------------------------------------------------------------------------------------


def test_an_export_that_disagrees_is_a_failed_gate_with_artifacts(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **how: Any) -> Any:
        raise ParityError("variant 'onnx-int8', image tower: cosine_mean is 0.2, expected at least 0.99.")

    monkeypatch.setattr("edgeclip.export.exporter.export_bundle", refuse)
    report = run_pipeline(parse(RECIPE), options(workshop))
    assert (report.status, report.exit_code) == ("failed", 4)
    out = workshop / "out"
    summary = (out / "summary.md").read_text()
    assert summary.count("cosine\\_mean is 0.2, expected at least 0.99") == 1
    assert "A recipe says so in \\[export\\] 'reference', 'labels' and 'limits'" in summary
    assert "'int8\\_target' and 'finish\\_int8'" in summary
    assert "| export | failed |" in summary
    assert "<failure" in (out / "junit.xml").read_text()
    assert [(verdict.gate, verdict.status) for verdict in report.verdicts] == [
        ("numbers", "failed"),
        ("colours", "inconclusive"),
        ("size", "inconclusive"),
    ]
    assert not (out / "bundle").exists()
    assert not (out / "model-card.md").exists()


def test_wrong_numbers_fail_though_the_recipe_has_no_gate(tiny_bundle: Path, tmp_path: Path) -> None:
    put_wrong_model(tiny_bundle, tmp_path)
    report = run_pipeline(parse(JUDGED.replace('"bundle"', f'"{tiny_bundle}"')), options(tmp_path))
    assert report.exit_code == 4
    assert [verdict.gate for verdict in report.verdicts] == ["numbers"]
    assert "image cosine_mean is" in report.verdicts[0].telling[0].reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.checkpoint=nowhere", "there is no '.*nowhere', and no model of"),
        (
            "model.checkpoint=MobileCLIP-S0",
            "its weights are not in .*run `edgeclip models pull MobileCLIP-S0`",
        ),
        (
            "calibration.data=nowhere",
            r"\[calibration\] 'data' is 'nowhere', and there is no '/.*relative to '/",
        ),
        (
            "calibration={int8_target='top1=1', latency_table='nowhere'}",
            r"\[calibration\] 'latency_table' is 'nowhere'",
        ),
        ("export.reference=nowhere", r"\[export\] 'reference' is 'nowhere'"),
        ("export.labels=nowhere", r"\[export\] 'labels' is 'nowhere'"),
        ("bench.images=nowhere", r"\[bench\] 'images' is 'nowhere'"),
        ("gate.0.data=nowhere", "gate 'colours' 'data' is 'nowhere'"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_done(
    workshop: Path, exports: list[list[str]], change: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run_pipeline(parse(RECIPE, change), options(workshop))
    assert not (workshop / "out").exists()
    assert exports == []


def test_a_folder_serves_one_run_at_a_time(workshop: Path, exports: list[list[str]]) -> None:
    out = options(workshop)
    with (
        pipeline_state.locked(out.out),
        pytest.raises(BundleError, match="another pipeline is running in it"),
    ):
        run_pipeline(parse(RECIPE), out)
    assert run_pipeline(parse(RECIPE), out).exit_code == 0


def test_artifacts_of_an_earlier_run_do_not_outlive_an_error(
    workshop: Path, exports: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pipeline(parse(RECIPE), options(workshop))

    def fail(*arguments: Any, **how: Any) -> Any:
        raise InputError("a picture is broken.")

    monkeypatch.setattr("edgeclip.export.exporter.export_bundle", fail)
    with pytest.raises(InputError, match="a picture is broken"):
        run_pipeline(parse(RECIPE, "export.opset=18"), options(workshop))
    left = {each.name for each in (workshop / "out").iterdir()}
    assert left == {"bundle", "state.json"}
    Bundle.open(workshop / "out" / "bundle").check_files()


class Killed(BaseException):
    """An end that nothing catches."""


@pytest.mark.slow
def test_an_end_at_any_write_leaves_a_folder_in_which_another_run_succeeds(
    workshop: Path, exports: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many renames of a run are its last one once; from nothing and from what a finished run left."""
    real = os.replace
    left = {"count": 0}

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **how: Any) -> Any:
            left["count"] -= 1
            if left["count"] == 0:
                raise Killed
            return function(*arguments, **how)

        return call

    brief = ("gate=[]", "bench.samples=1")
    started = parse(RECIPE, "export.variants=['onnx-fp32']", *brief)
    wanted = parse(RECIPE, *brief)
    ends = 0
    for before, step in ((None, 3), (started, 4)):
        for number in range(1, 60, step):
            out = workshop / "out"
            shutil.rmtree(out, ignore_errors=True)
            left["count"] = -1
            if before is not None:
                run_pipeline(before, options(workshop))
            with monkeypatch.context() as patch:
                left["count"] = number
                patch.setattr(Path, "replace", counted(Path.replace))
                patch.setattr(Path, "rename", counted(Path.rename))
                patch.setattr(os, "replace", counted(real))
                try:
                    run_pipeline(wanted, options(workshop))
                except Killed:
                    ends += 1
                else:
                    break
            report = run_pipeline(wanted, options(workshop))
            assert report.exit_code == 0
            bundle = Bundle.open(out / "bundle")
            bundle.check_files()
            assert set(bundle.manifest.variants) == {"onnx-fp32", "onnx-int8"}
            assert {each.name for each in out.iterdir()} == ARTIFACTS | {"bundle", "state.json"}
        else:
            pytest.fail("it never came to its end")
    assert ends > 6


# --- dry runs ----------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    workshop: Path, exports: list[list[str]]
) -> None:
    plan = plan_pipeline(parse(RECIPE), options(workshop))
    assert {each.outcome for each in plan if each.name in ("export", "verify", "bench")} == {"to do"}
    assert not (workshop / "out").exists()
    run_pipeline(parse(RECIPE), options(workshop))
    before = {path: path.stat().st_mtime_ns for path in (workshop / "out").rglob("*")}
    plan = plan_pipeline(parse(RECIPE, "bench.samples=99"), options(workshop))
    assert {path: path.stat().st_mtime_ns for path in (workshop / "out").rglob("*")} == before
    by_stage: dict[str, set[str]] = {}
    for each in plan:
        by_stage.setdefault(each.name, set()).add(each.outcome)
    assert by_stage == {
        "checkpoint": {"is read"},
        "export": {"reused"},
        "verify": {"reused"},
        "bench": {"to do"},
        "gate": {"judged", "measurement reused"},
    }


# --- devices and finished bundles --------------------------------------------------------------------------

ON_DEVICE = JUDGED + '[[gate]]\nname = "pi"\nkind = "device-report"\ndevice = "pi"\nvariant = "onnx-int8"\n'


@pytest.fixture
def pi(tiny_bundle: Path) -> DeviceReport:
    bundle = Bundle.open(tiny_bundle)
    return device_report(bundle, "onnx-int8", device="pi", options=ONE_THREAD, effort=Effort(120, 0.0))


def test_a_report_of_this_host_passes_its_gate(tiny_bundle: Path, pi: DeviceReport, tmp_path: Path) -> None:
    path = tmp_path / "pi.json"
    path.write_text(pi.to_json(), encoding="utf-8")
    read = read_device_report(path)
    assert read == pi
    assert read.verify.status == "passed"
    assert read.latency is not None
    assert len(read.latency.samples("image_tower")) == 120
    bundle = Bundle.open(tiny_bundle)
    recipe = parse(ON_DEVICE, "gate.0.p50_ms=1000", "gate.0.p90_ms=1000")
    assert judge_bundle(recipe, bundle, [read]).exit_code == 0
    assert judge_bundle(recipe, bundle, []).exit_code == 3
    assert judge_bundle(recipe, bundle, [], inconclusive="pass").exit_code == 0
    assert judge_bundle(recipe, bundle, [], inconclusive="fail").exit_code == 4
    slow = parse(ON_DEVICE, "gate.0.p50_ms=0.000001")
    assert judge_bundle(slow, bundle, [read]).exit_code == 4


def test_reports_are_merged_into_a_run_and_stay(tiny_bundle: Path, pi: DeviceReport) -> None:
    root = tiny_bundle.parent
    recipe = parse(ON_DEVICE.replace('"bundle"', '"tiny-bundle"'))
    assert run_pipeline(recipe, options(root)).exit_code == 3
    verified = json.loads((root / "out" / "report.json").read_text())["verify"]
    assert judge_run(recipe, options(root), [pi]).exit_code == 0
    said = json.loads((root / "out" / "report.json").read_text())
    assert said["device_reports"][0]["latency"]["stages"]["image_tower"]["n"] == 120
    assert said["verify"] == verified
    assert "| pi | onnx-int8 | passed |" in (root / "out" / "summary.md").read_text()
    assert judge_run(recipe, options(root), []).exit_code == 0


def test_judging_by_other_gates_keeps_what_was_measured(workshop: Path, exports: list[list[str]]) -> None:
    first = run_pipeline(parse(RECIPE), options(workshop))
    assert judge_run(parse(RECIPE, "gate=[]"), options(workshop), []).exit_code == 0
    again = judge_run(parse(RECIPE), options(workshop), [])
    assert [verdict.status for verdict in again.verdicts] == ["passed"] * 3
    assert again.measured == first.measured


def test_a_report_on_another_bundle_counts_for_nothing_and_that_is_said(
    tiny_bundle: Path, pi: DeviceReport
) -> None:
    other = Bundle.open("default")
    report = judge_bundle(parse(ON_DEVICE), other, [pi])
    assert report.exit_code in (3, 4)
    assert f"the report of pi is on another bundle, {pi.bundle.digest[:12]}…" in report.remarks[0]


def test_what_is_no_report_is_refused(tmp_path: Path, pi: DeviceReport) -> None:
    path = tmp_path / "r.json"
    for content, words in [
        ("{", "is not valid JSON"),
        ("[]", "kind 'list', expected 'device-report'"),
        (json.dumps(pi.to_dict() | {"schema": 2}), "schema 2, expected 1"),
        (json.dumps(pi.to_dict() | {"verify": {"status": "fine"}}), "Invalid enum value 'fine'"),
        (json.dumps(pi.to_dict() | {"bundle": {"name": "x", "digest": "12"}}), "cannot be read"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=words):
            read_device_report(path)
    with pytest.raises(InputError, match="No such file"):
        read_device_report(tmp_path / "none.json")


def test_the_schema_beside_the_templates_is_that_of_reports(repo: Path, pi: DeviceReport) -> None:
    import jsonschema

    path = repo / "docs" / "ci" / "device-report.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert schema == device_report_schema(), f"write {path} anew from device_report_schema()"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    said = json.loads(pi.to_json())
    assert list(validator.iter_errors(said)) == []
    assert list(validator.iter_errors(said | {"verify": {"status": "fine"}}))
    assert list(validator.iter_errors(said | {"bundle": {"name": "x", "digest": "12"}}))


def test_a_run_is_not_judged_with_another_bundle_or_report(tiny_bundle: Path) -> None:
    root = tiny_bundle.parent
    recipe = parse(JUDGED.replace('"bundle"', '"tiny-bundle"'))
    with pytest.raises(InputError, match=r"report.json' cannot be used: No such file"):
        judge_run(recipe, options(root), [])
    run_pipeline(recipe, options(root))
    make_tiny_bundle(tiny_bundle, seed=7)
    with pytest.raises(InputError, match=r"is about the bundle .*run the pipeline again"):
        judge_run(recipe, options(root), [])
    (root / "out" / "report.json").write_text('{"schema": 2, "kind": "pipeline-report"}')
    with pytest.raises(InputError, match=r"cannot be used: .*schema"):
        judge_run(recipe, options(root), [])


def test_stages_around_the_tower_are_timed_with_pictures(workshop: Path, exports: list[list[str]]) -> None:
    report = run_pipeline(parse(RECIPE, "bench.images=photos", "bench.batch=4"), options(workshop))
    stages = report.bench["onnx-fp32"]["stages"]
    assert set(stages) == {"image_tower", "decode", "resize", "head"}
    assert (stages["image_tower"]["batch"], stages["decode"]["batch"]) == (4, 1)


def test_a_baseline_bundle_is_measured_in_turns(tiny_bundle: Path, workshop: Path) -> None:
    text = JUDGED.replace('"bundle"', f'"{tiny_bundle}"') + (
        '[[gate]]\nname = "t"\nkind = "latency"\nvariant = "onnx-fp32"\nbaseline = "onnx-fp32"\n'
        f'baseline_bundle = "{tiny_bundle}"\nmax_ratio = 5\nblocks = 10\nduration_s = 0\n'
    )
    report = run_pipeline(parse(text, "bench.samples=10", "bench.duration_s=0"), options(workshop))
    assert report.exit_code == 0
    ratio = report.measured["t"]["ratio"]
    assert 0.2 < ratio["ratio"] < 5
    assert (ratio["n"], len(ratio["a_samples_ms"])) == (10, 20)


# --- the real exporter -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeclip.shape_files import write_shapes

    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root / "shapes", train=128, held_out=100)
    return root


@pytest.mark.slow
def test_ci_smoke_runs_on_a_probe_and_is_taken_over(shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from importlib.resources import files

    content = files("edgeclip.export.recipes").joinpath("ci-smoke.toml").read_bytes()
    recipe = parse_pipeline(content, changes=[f"model.checkpoint={PROBE}"])
    began = time.perf_counter()
    report = run_pipeline(recipe, PipelineOptions(shapes, tmp_path / "out"))
    assert time.perf_counter() - began < 180
    assert (report.status, {verdict.status for verdict in report.verdicts}) == ("passed", {"passed"})
    assert report.manifest is not None
    assert report.measured["accuracy"]["accuracy"]["value"] > 0.5
    again = run_pipeline(recipe, PipelineOptions(shapes, tmp_path / "out"))
    assert [name for name, outcome in outcomes(again).items() if outcome == "done"] == ["checkpoint"]


@pytest.mark.slow
def test_cpu_int8_leaves_in_float_what_a_probe_needs(shapes: Path, tmp_path: Path) -> None:
    """Calibrated on pictures of the probe's own kind, and judged by labels of their kind."""
    pytest.importorskip("torch")
    from importlib.resources import files

    content = files("edgeclip.export.recipes").joinpath("cpu-int8.toml").read_bytes()
    changes = [
        f"model.checkpoint={PROBE.parent / 'mobileclip'}",
        "calibration.data=shapes/images/train",
        "export.reference=shapes/images/held_out",
        "export.labels=shapes/labels.json",
        "bench.threads=1",
        "bench.samples=5",
        "gate.3.max_ratio=100",  # other tests run meanwhile
    ]
    recipe = parse_pipeline(content, changes=changes)
    report = run_pipeline(recipe, PipelineOptions(shapes, tmp_path / "out"))
    assert (report.status, report.exit_code) == ("passed", 0)
    manifest = json.loads((tmp_path / "out" / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    variant = manifest["variants"]["onnx-int8@x86-avx2"]
    choice = variant["calibration"]["choice"]["image"]
    assert choice["target"] == {"cosine": 0.995, "top1": 0.99}
    assert 0 < len(choice["kept"]) < choice["products"]
    assert variant["parity"]["image"]["top1_agreement"] >= 0.98
    assert [path.suffix for path in sorted((tmp_path / "out" / "sensitivity").iterdir())] == [".json", ".svg"]
    again = run_pipeline(recipe, PipelineOptions(shapes, tmp_path / "out"))
    assert [name for name, outcome in outcomes(again).items() if outcome == "done"] == ["checkpoint"]


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_in_which_another_run_succeeds(shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "edgeclip", "pipeline", "run", "ci-smoke", "-o", str(tmp_path / "out")]
    command += ["--set", f"model.checkpoint={PROBE}", "--set", "gate=[]"]
    killed = 0
    for delay_s in (2.5, 4.0):
        process = subprocess.Popen(command, cwd=shapes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=shapes, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert killed
    Bundle.open(tmp_path / "out" / "bundle").check_files()
    assert not (tmp_path / "out" / ".bundle-new").exists()
