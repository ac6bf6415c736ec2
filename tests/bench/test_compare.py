"""Comparisons: the plan of launches, what one launch does, fresh processes, and the command line."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from command import Command

from edgeclip.bench import compare as module
from edgeclip.bench import compare_child as child
from edgeclip.bench.compare import BenchComparison, ComparePlan, compare, compare_schema, run_launch
from edgeclip.bench.compare_child import COMPARED, LabelsAsked, SideTold, Task, Told, launch
from edgeclip.bench.targets import Target, open_target, parse_target
from edgeclip.bench.verdict import judge_launches
from edgeclip.cli.bench_compare import _STAGES
from edgeclip.errors import BackendError, BundleError, ConfigError, EdgeClipError, InputError

PHOTOS = Path(module.__file__).parents[1] / "assets" / "photos"
PICTURES = (PHOTOS / "cat.jpg", PHOTOS / "crab.jpg", PHOTOS / "dog.jpg")


def told(task: Task, *, ratio: float = 1.0, luck: float = 0.01, blocks: int = 6, digest: str = "d") -> Told:
    rng = np.random.default_rng(task.seed)
    a, b = (8 * np.exp(rng.normal(0, 0.02, (2, blocks * 2 * 3)))).tolist()
    lucky = ratio * float(np.exp(rng.normal(0, luck)))
    told_of = {
        "bundle": "Made up",
        "digest": digest * 64,
        "variant": "onnx-int8",
        "placement": {"backend": "ort", "threads": 1},
        "labels": 10,
    }
    return Told(
        a=SideTold(samples_ms=tuple(a), **told_of),
        b=SideTold(samples_ms=tuple(ms * lucky for ms in b), **told_of),
        opened_first=task.opened_first,
        blocks=("abba",) * blocks,
        units=3,
        items=1,
        measured_s=task.measure_s,
        steal_share=0.0,
    )


class Launches:
    """Launches on a clock that only they move."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, start_s: float | Sequence[float] = 0.5, **options: Any
    ) -> None:
        self.now_s = 0.0
        self.tasks: list[Task] = []
        self._starts: Iterator[float] = iter([start_s] * 100 if isinstance(start_s, float) else start_s)
        self._options = options
        monkeypatch.setattr(module, "perf_counter", lambda: self.now_s)

    def __call__(self, task: Task) -> Told:
        self.tasks.append(task)
        self.now_s += next(self._starts) + task.measure_s
        return told(task, **self._options)


def plan(**changes: Any) -> ComparePlan:
    return replace(ComparePlan(Target(), Target(threads=1), PICTURES), **changes)


# --- the plan of launches


def test_launches_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch, luck=0.2)
    seen: list[tuple[int, int]] = []
    found = compare(plan(), launcher=launches, on_progress=lambda *done: seen.append(done))
    assert found.verdict == "inconclusive"
    assert seen == [(done, 20) for done in range(1, 21)]
    assert found.used_s == pytest.approx(60)
    assert {round(task.measure_s, 2) for task in launches.tasks[2:]} == {2.55}
    assert len({task.seed for task in launches.tasks}) == 21


def test_both_sides_are_opened_first_equally_often_in_an_order_that_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders = []
    for seed in range(12):
        launches = Launches(monkeypatch, luck=0.2)
        found = compare(plan(seed=seed), launcher=launches)
        order = "".join(each.opened_first for each in found.launches)
        assert order == "".join(task.opened_first for task in launches.tasks[1:])
        assert {"".join(sorted(order[at : at + 2])) for at in range(0, len(order), 2)} == {"ab"}
        for seen in range(1, len(order) + 1):  # at every look
            assert abs(order[:seen].count("a") - order[:seen].count("b")) <= 1
        orders.append(order)
    assert len(set(orders)) == len(orders)  # no fixed rhythm
    assert {order[0] for order in orders} == {"a", "b"}


def test_what_is_done_once_is_not_part_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(monkeypatch, [500.0] + [0.5] * 20, luck=0.2)
    found = compare(plan(), launcher=launches)
    assert launches.tasks[0].measure_s == 0
    assert (len(found.launches), found.used_s) == (20, pytest.approx(60))


def test_targets_that_open_slowly_are_opened_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(plan(), launcher=Launches(monkeypatch, 2.0, luck=0.2))
    assert (len(found.launches), found.planned_launches) == (12, 12)
    assert found.used_s == pytest.approx(60)


def test_as_many_processes_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(plan(processes=33), launcher=Launches(monkeypatch, luck=0.2))
    assert len(found.launches) == 33


def test_what_is_clear_halfway_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(plan(), launcher=Launches(monkeypatch, ratio=1.5))
    assert found.verdict == "slower"
    assert (len(found.launches), found.planned_launches) == (10, 20)
    assert found.used_s < 35
    assert found.ratio.low < 1.5 < found.ratio.high


def test_a_machine_that_gets_slow_ends_the_comparison_when_time_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Launches(monkeypatch, [0.5] * 6 + [12.0] * 20, luck=0.2)
    found = compare(plan(), launcher=slow)
    assert len(found.launches) == 9
    assert 60 <= found.used_s < 75


def test_a_budget_that_carries_no_interval_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"budget: got 10 s, expected at least 23 s: 8 processes are needed, and each takes 2.3 s"
    with pytest.raises(ConfigError, match=message):
        compare(plan(budget_s=10.0), launcher=Launches(monkeypatch, 2.1))


def test_a_bundle_that_changes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter("aaaab")
    fresh = Launches(monkeypatch)

    def changing(task: Task) -> Told:
        return told(task, digest=next(digests)) if fresh(task) else told(task)

    with pytest.raises(
        BundleError, match=r"'Made up' changed .* 'onnx-int8' of bbbbbbbbbbbb .* of aaaaaaaaaaaa"
    ):
        compare(plan(), launcher=changing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "thinking"}, "stage: got 'thinking', expected one of end_to_end, decode"),
        ({"effect": 0.0}, "effect: got 0.0, expected 0.001 to 10"),
        ({"budget_s": float("inf")}, "budget: got inf s, expected more than 0"),
        ({"processes": 7}, "processes: got 7, expected at least 8"),
    ],
)
def test_a_plan_out_of_range_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_a_plan_without_pictures_is_an_error() -> None:
    with pytest.raises(InputError, match="pictures: got none"):
        plan(pictures=())


# --- the document


def test_the_document_holds_what_the_verdict_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(plan(seed=3), launcher=Launches(monkeypatch, ratio=0.5))
    again = BenchComparison.from_json(found.to_json())
    assert again == found
    judged = judge_launches(
        [each.samples() for each in again.launches],
        effect=again.effect,
        confidence=again.ratio.confidence,
        seed=again.seed,
    )
    assert (
        (judged.verdict, judged.interval.low)
        == (again.verdict, again.ratio.low)
        == ("faster", found.ratio.low)
    )
    assert again.b.n == sum(len(each.b_samples_ms) for each in again.launches)
    assert again.b.median_ms == np.median([ms for each in again.launches for ms in each.b_samples_ms])
    assert again.b.name == "default,threads=1"


def test_it_meets_its_schema(monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
    schema = json.loads((repo / "docs" / "bench-comparison.schema.json").read_text(encoding="utf-8"))
    # After a change of edgeclip/bench/compare.py: python tests/tools/write_bench_schema.py
    assert schema == compare_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = compare(plan(), launcher=Launches(monkeypatch)).to_dict()
    validator.validate(document)
    assert not validator.is_valid({**document, "verdict": "maybe"})
    assert not validator.is_valid({**document, "launches": []})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 1.2}, r"slower: B takes \+\d\d\.\d% \(\+\d\d\.\d% to \+\d\d\.\d%\)"),
        ({"ratio": 3.0}, r"slower: B takes [23]\.\d\d times"),
        ({"ratio": 0.8}, r"faster: B takes -\d\d\.\d%"),
        ({}, r"same: whatever B differs by is less than 5 % \([+-]\d\.\d% to"),
        ({"luck": 0.06}, r"neither excludes a difference nor one of 5 %; --budget \d+0s may do"),
        ({"luck": 0.5}, r"nor one of 5 %; measure on a machine that is quieter"),
    ],
)
def test_the_table_ends_with_the_verdict(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    lines = compare(plan(), launcher=Launches(monkeypatch, **options)).to_table().splitlines()
    assert lines[0].split() == ["p50", "ms", "n", "variant", "threads", "target"]
    assert [line[0] for line in lines[1:3]] == ["A", "B"]
    assert lines[3].startswith("B / A: ")
    assert lines[4].startswith("drift ")
    assert re.search(said, lines[5]), lines[5]


# --- one launch


class Recorder:
    """A classifier that writes down what it was given."""

    def __init__(self, name: str, log: list[tuple[str, Any]]) -> None:
        self._name, self._log = name, log
        self.bank = SimpleNamespace(names=("cat", "dog", "car"))
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(model=SimpleNamespace(name="M")), digest="d")
        self.choice = SimpleNamespace(variant=SimpleNamespace(name="v"))
        self.placement = parse_target("default")  # any dataclass

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.append((self._name, "closed"))

    def set_bundle_labels(self, language: str | None) -> None:
        self._log.append((self._name, f"labels {language}"))

    def classify(self, picture: Path) -> None:
        self._log.append((self._name, picture))

    def classify_stream(self, pictures: Sequence[Path], *, batch_size: int, workers: int | None) -> Any:
        assert len(pictures) % batch_size == 0
        for picture in pictures:
            self._log.append((self._name, picture))
            yield SimpleNamespace(error=None)


def task_of(a: Target, b: Target, **changes: Any) -> Task:
    task = Task(
        a=asdict(a),
        b=asdict(b),
        stage="end_to_end",
        pictures=tuple(map(str, PICTURES)),
        labels=LabelsAsked(),
        measure_s=0.02,
        seed=1,
    )
    return msgspec.structs.replace(task, **changes)


def test_both_sides_handle_the_same_pictures_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_WARM_MS", 0.0)
    monkeypatch.setattr(child, "_WARM_CALLS", 1)
    log: list[tuple[str, Any]] = []
    sides = {2: "a", 3: "b"}
    found = launch(
        task_of(Target(batch=2), Target(batch=3)),
        lambda target, _: Recorder(sides[target.batch], log),  # type: ignore[arg-type,return-value]
    )
    assert found.items == 6
    assert found.opened_first == log[0][0]
    assert log[-2:] == [({"a": "b", "b": "a"}[found.opened_first], "closed"), (found.opened_first, "closed")]
    calls = log[2 + 2 * 6 : -2]
    turn = (found.units + 1) * 6  # the first unit of a turn is not counted: calls are short
    for number, block in enumerate(found.blocks):
        handled = calls[number * 4 * turn : (number + 1) * 4 * turn]
        turns = [handled[start : start + turn] for start in range(0, 4 * turn, turn)]
        assert "".join(each[0][0] for each in turns) == block
        assert all({name for name, _ in each} == {each[0][0]} for each in turns)
        assert len({tuple(picture for _, picture in each) for each in turns}) == 1
    assert len(calls) == len(found.blocks) * 4 * turn
    assert len(found.a.samples_ms) == len(found.b.samples_ms) == len(found.blocks) * 2 * found.units


@pytest.mark.parametrize("first", ["a", "b"])
def test_the_side_that_is_asked_for_is_opened_first(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr(child, "_WARM_MS", 0.0)
    log: list[tuple[str, Any]] = []
    sides = {1: "a", 2: "b"}
    found = launch(
        task_of(Target(), Target(batch=2), opened_first=first, measure_s=0.0),
        lambda target, _: Recorder(sides[target.batch], log),  # type: ignore[arg-type,return-value]
    )
    assert found.opened_first == log[0][0] == first


@pytest.mark.parametrize("stage", COMPARED)
def test_every_stage_of_a_real_bundle_is_timed(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, stage: str
) -> None:
    monkeypatch.setattr(child, "_WARM_MS", 0.0)
    target = parse_target(f"{tiny_bundle},threads=1")
    found = launch(task_of(target, replace(target, batch=2), stage=stage))
    for side in (found.a, found.b):
        assert len(side.samples_ms) == len(found.blocks) * 2 * found.units
        assert min(side.samples_ms) > 0
        assert side.placement["threads"] == 1
    assert found.a.variant == found.b.variant == "onnx-int8"


def test_labels_reach_the_classifier(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    monkeypatch.setattr(child, "_WARM_MS", 0.0)
    target = parse_target(f"{tiny_bundle},threads=1")
    asked = LabelsAsked(labels=("red", {"name": "blue", "synonyms": ["navy"]}), templates=("a {}",))
    found = launch(task_of(target, target, labels=asked))
    assert (found.a.labels, found.b.labels) == (2, 2)


def test_a_stage_that_never_runs_is_an_error(tiny_bundle: Path) -> None:
    target = parse_target(f"{tiny_bundle},threads=1")
    with pytest.raises(BackendError, match=r"stage 'resize' never ran on .*tiny-bundle"):
        launch(task_of(target, target, stage="resize"), lambda each, _: open_target(each))


def test_a_picture_that_cannot_be_read_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    target = parse_target(f"{tiny_bundle},threads=1")
    for side in (target, replace(target, batch=2)):
        with pytest.raises(InputError, match=r"bad\.jpg"):
            launch(task_of(side, side, pictures=(str(bad),)))


# --- a fresh process


@pytest.mark.slow
def test_a_fresh_process_measures(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the working directory was imported')")
    monkeypatch.chdir(tmp_path)
    target = parse_target(f"{tiny_bundle},threads=1")
    found = run_launch(task_of(target, target))
    assert found.a.digest == found.b.digest
    assert min(found.a.samples_ms) > 0


@pytest.mark.slow
def test_what_an_engine_prints_does_not_mix_with_the_result(tiny_bundle: Path, tmp_path: Path) -> None:
    """The child's standard output is the document alone, whatever writes to descriptor 1 in between."""
    program = (
        "import os; from edgeclip.bench import compare_child as child; opened = child.open_target\n"
        "child.open_target = lambda *a, **k: os.write(1, b'engine says hello') and opened(*a, **k)\n"
        "child.main()"
    )
    target = parse_target(f"{tiny_bundle},threads=1")
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=msgspec.json.encode(task_of(target, target)),
        capture_output=True,
        check=True,
    )
    assert min(msgspec.json.decode(done.stdout, type=Told).a.samples_ms) > 0
    assert b"engine says hello" in done.stderr


@pytest.mark.slow
def test_an_error_of_a_process_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not-here"):
        run_launch(task_of(Target(bundle=str(tmp_path / "not-here")), Target()))


def test_a_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho out of memory >&2\nkill -9 $$\n")
    dying.chmod(dying.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(module.sys, "executable", str(dying))
    with pytest.raises(BackendError, match=r"ended with -9 and without a result \(out of memory\)"):
        run_launch(task_of(Target(), Target()))


def test_an_error_of_an_unknown_kind_is_still_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    telling = tmp_path / "python"
    said = '{"type":"failure","kind":"MissingExtraError","error":"needs the extra x"}'
    telling.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{said}'\n")
    telling.chmod(telling.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(module.sys, "executable", str(telling))
    with pytest.raises(EdgeClipError, match="needs the extra x"):
        run_launch(task_of(Target(), Target()))


# --- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def launching(monkeypatch: pytest.MonkeyPatch, launcher: Callable[[Task], Told]) -> None:
    monkeypatch.setattr(module, "run_launch", launcher)


@pytest.mark.parametrize(
    ("options", "arguments", "code"),
    [
        ({}, (), 0),
        ({"ratio": 0.5}, (), 0),
        ({"ratio": 1.5}, (), 4),
        ({"ratio": 1.5}, ("--effect", "100%"), 0),
        ({"luck": 0.2}, (), 3),
        ({"luck": 0.2}, ("--inconclusive", "pass"), 0),
        ({"luck": 0.2}, ("--inconclusive", "fail"), 4),
        ({"ratio": 1.5}, ("--inconclusive", "pass"), 4),
    ],
)
def test_the_exit_code_tells_a_regression(
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    arguments: tuple[str, ...],
    code: int,
) -> None:
    launching(monkeypatch, Launches(monkeypatch, **options))
    assert run("bench", "compare", "default", "default,threads=1", *arguments).code == code


def test_probes_are_compared(
    run: Command, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(child, "_WARM_MS", 0.0)
    launching(monkeypatch, lambda task: launch(msgspec.structs.replace(task, measure_s=0.02)))
    out = tmp_path / "found.json"
    sides = (f"{tiny_bundle}#onnx-fp32,threads=1", f"{tiny_bundle}#onnx-int8,threads=1")
    result = run("bench", "compare", *sides, "--budget", "20s", "--processes", "8", "--json", "-o", out,
                 "--stage", "image_tower", "--images", PHOTOS, "--labels", "red,blue")  # fmt: skip
    found = BenchComparison.from_json(result.out)
    assert result.code == {"slower": 4, "inconclusive": 3}.get(found.verdict, 0)
    assert found == BenchComparison.from_json(out.read_text(encoding="utf-8"))
    assert (found.a.variant, found.b.variant, found.stage) == ("onnx-fp32", "onnx-int8", "image_tower")
    assert (found.a.labels, found.pictures, found.b.name) == (2, 16, sides[1])
    assert 0 < found.ratio.low <= found.ratio.value <= found.ratio.high


def test_labels_templates_and_pictures_are_passed_on(
    run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launches = Launches(monkeypatch)
    launching(monkeypatch, launches)
    (tmp_path / "labels.txt").write_text("sofa | couch\nchair\n")
    run("bench", "compare", "default", "default", "--images", PHOTOS / "cat.jpg",
        "--label-file", tmp_path / "labels.txt", "--templates", "a {}")  # fmt: skip
    task = launches.tasks[0]
    assert task.labels.labels == ({"name": "sofa", "synonyms": ["couch"]}, "chair")
    assert task.labels.templates == ("a {}",)
    assert [Path(each).name for each in task.pictures] == ["cat.jpg"]
    run("bench", "compare", "default", "default", "--language", "zh", "--stage", "head", "--budget", "2m")
    assert (launches.tasks[-1].labels.language, launches.tasks[-1].stage) == ("zh", "head")


def test_an_interrupt_ends_it(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Task) -> Told:
        raise KeyboardInterrupt

    launching(monkeypatch, interrupted)
    assert run("bench", "compare", "default", "default").code == 130


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("default",), 2, "Missing argument 'B'"),
        (("old.json", "new.json"), 1, "'old.json' is a report, expected a bundle"),
        (("default", "New.JSON"), 1, "'New.JSON' is a report, expected a bundle"),
        (("default", "default,thread=2"), 1, "'thread'"),
        (("default", "default", "--effect", "0"), 2, "'0': expected 0.1% to 1000%"),
        (("default", "default", "--effect", "5"), 2, "'5': expected 0.1% to 1000%, or a share below 1"),
        (("default", "default", "--effect", "few"), 2, "'few': expected 0.1% to 1000%"),
        (("default", "default", "--budget", "1h"), 2, "'1h': expected a time above 0"),
        (("default", "default", "--budget", "0s"), 2, "'0s': expected a time above 0"),
        (("default", "default", "--processes", "7"), 2, "7 is not in the range x>=8"),
        (("default", "default", "--stage", "thinking"), 2, "thinking"),
        (("default", "default", "--templates", "one"), 2, "--templates needs --labels or --label-file"),
        (("default", "default", "--images", "nowhere"), 1, "nowhere"),
        (("default", "default", "-o", "not-there/x.json"), 1, "there is no directory 'not-there'"),
    ],
)
def test_bad_input_is_one_sentence(run: Command, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run("bench", "compare", *arguments)
    assert result.code == code
    assert message in result.err


def test_a_folder_without_pictures_is_an_error(run: Command, tmp_path: Path) -> None:
    result = run("bench", "compare", "default", "default", "--images", tmp_path)
    assert result.code == 1
    assert "holds no picture files" in result.err


def test_the_command_knows_every_stage() -> None:
    assert _STAGES == COMPARED


@pytest.mark.parametrize(("said", "seconds"), [("90", 90), ("1.5m", 90), ("2min", 120), ("20s", 20)])
def test_times_are_read(run: Command, monkeypatch: pytest.MonkeyPatch, said: str, seconds: float) -> None:
    launching(monkeypatch, Launches(monkeypatch))
    result = run("bench", "compare", "default", "default", "--budget", said, "--json")
    assert json.loads(result.out)["budget_s"] == seconds
