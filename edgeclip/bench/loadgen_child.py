"""One check in a process of its own: LoadGen and our loops take turns on one classifier.

Standard input is one JSON document, :class:`Task`; standard output has one in each line: :class:`Progress`,
and last :class:`Done` or :class:`Failure`. The parent is :mod:`edgeclip.bench.loadgen`.

LoadGen cannot be interrupted, and an error that leaves a callback ends the process with a signal. So Ctrl-C
ends this process as it stands, and what a callback meets is told and ends it, too.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, get_args

import msgspec
import numpy as np
from msgspec import Struct

from edgeclip.bench.compare_child import LabelsAsked
from edgeclip.bench.loadgen_report import (
    Given,
    LoadGenCheck,
    LoadGenTurn,
    OwnTurn,
    RatioOfTurns,
    Scenario,
    ScenarioEntry,
)
from edgeclip.bench.targets import Target, open_target
from edgeclip.bench.workload import Workload
from edgeclip.bundle import Bundle
from edgeclip.errors import BackendError, EdgeClipError, InputError
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.host import UNAVAILABLE, Host, cpu_times, versions
from edgeclip.runtime.statistics import order_interval

if TYPE_CHECKING:
    from edgeclip.classify import ZeroShotClassifier

__all__ = ["Done", "Failure", "Message", "Progress", "Task", "main", "measure"]

SCENARIOS: Final[tuple[Scenario, ...]] = get_args(Scenario)
_WARMUP: Final = 3
_CONFIDENCE: Final = 0.95
_ROUNDS_OF_AN_INTERVAL: Final = 6  # below, not even all of the values cover the median in 95 %
# LoadGen makes its queries beforehand, from how fast we say to be. Too few of them end a turn early.
_FASTER: Final = 0.5
_MORE: Final = 1.25


class Task(Struct, frozen=True, kw_only=True):
    """What is to be done: see :class:`edgeclip.bench.loadgen.LoadGenPlan`; ``logs`` is a folder."""

    target: Target
    pictures: tuple[str, ...]
    pictures_source: str
    labels: LabelsAsked
    labels_source: str
    given: tuple[Given, ...]
    rounds: int
    turn_s: float
    min_queries: int
    seed: int
    command: str
    logs: str


class Progress(Struct, frozen=True, tag="progress"):
    """What is done next, in a few words."""

    said: str


class Done(Struct, frozen=True, tag="done"):
    """The report."""

    check: LoadGenCheck


class Failure(Struct, frozen=True, tag="failure"):
    """An error by the name of its class, for the parent to raise."""

    kind: str
    error: str


Message: TypeAlias = Progress | Done | Failure


def measure(
    plan: Task,
    on_progress: Callable[[str], None],
    fail: Callable[[BaseException], NoReturn],
) -> LoadGenCheck:
    """Measure what a plan says.

    Args:
        plan: what is measured.
        on_progress: told before each turn, in a few words.
        fail: ends the process; called with what was raised while LoadGen waited for an answer.

    Raises:
        EdgeClipError: a picture, a label, the target or a log cannot be used.
    """
    loadgen = importlib.import_module("mlperf_loadgen")
    created = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    workload = Workload(
        tuple(map(Path, plan.pictures)), plan.pictures_source, labels_source=plan.labels_source
    )
    pictures = workload.pictures_entry()
    bundle = Bundle.open(plan.target.bundle)
    with open_target(plan.target, bundle=bundle) as classifier:
        plan.labels.set(classifier)
        lanes = [
            _Lane(plan, classifier, loadgen, scenario, given, fail)
            for given in plan.given
            for scenario in SCENARIOS
        ]
        order = random.Random(plan.seed)  # noqa: S311 - an order of measurements, not a secret
        ticks = cpu_times()
        for number in range(plan.rounds):
            for lane in order.sample(lanes, len(lanes)):
                # Ours repeats what LoadGen asked for, so that LoadGen comes first once.
                ours_first = number > 0 and order.random() < 0.5
                on_progress(f"round {number + 1} of {plan.rounds}: {lane.scenario}, {lane.given}")
                for turn in (lane.ours, lane.theirs) if ours_first else (lane.theirs, lane.ours):
                    turn()
        later = cpu_times()
        share = None if ticks is None or later is None else min(1.0, max(0.0, later.steal_share_since(ticks)))
        return LoadGenCheck(
            subject=bundle.manifest.model.name,
            created=created,
            command=plan.command,
            loadgen_version=lanes[0].version,
            bundle={
                "name": bundle.manifest.model.name,
                "path": str(plan.target.bundle),
                "digest": bundle.digest,
            },
            variant=classifier.choice.variant.name,
            placement=asdict(classifier.placement),
            batch=plan.target.batch,
            pictures=pictures,
            labels=workload.labels_entry(classifier),
            scenarios=tuple(lane.entry() for lane in lanes),
            seed=plan.seed,
            steal_share=UNAVAILABLE if share is None else share,
            host=Host.here().to_dict(),
            versions=versions(),
        )


def _samples(plan: Task, classifier: ZeroShotClassifier, given: Given) -> list[Any]:
    """Return the pictures as they are given to the classifier, all in memory."""
    if given == "file":
        return [Path(picture).read_bytes() for picture in plan.pictures]
    spec = classifier.bundle.manifest.preprocess
    preprocess = Preprocess(spec, fast_decode=plan.target.fast_decode)
    return [preprocess(Path(picture)) for picture in plan.pictures]


class _Lane:
    """One scenario on one kind of input, and everything it was seen to do."""

    def __init__(
        self,
        plan: Task,
        classifier: ZeroShotClassifier,
        loadgen: Any,
        scenario: Scenario,
        given: Given,
        fail: Callable[[BaseException], NoReturn],
    ) -> None:
        self.scenario, self.given, self.version = scenario, given, ""
        self._plan, self._classifier, self._loadgen = plan, classifier, loadgen
        self._fail = fail
        self._samples = samples = _samples(plan, classifier, given)
        self._asked: list[int] = []
        self._theirs: list[LoadGenTurn] = []
        self._ours: list[OwnTurn] = []
        taken_s = []
        for _ in range(_WARMUP):
            began_ns = perf_counter_ns()
            self._answer(range(len(samples)))
            taken_s.append((perf_counter_ns() - began_ns) / 1e9 / len(samples))
        self._expected_s = min(taken_s)

    def _answer(self, indices: Sequence[int]) -> None:
        """Classify pictures: one after another in SingleStream, as a stream of batches in Offline."""
        samples = self._samples
        if self.scenario == "SingleStream":
            for index in indices:
                self._classifier.classify(samples[index])
            return
        batch = self._plan.target.batch
        for outcome in self._classifier.classify_stream(
            (samples[index] for index in indices),
            batch_size=batch,
            workers=self._classifier.placement.threads,
        ):
            if outcome.error is not None:
                raise outcome.error

    def theirs(self) -> None:
        """Let LoadGen ask and take the time.

        Raises:
            EdgeClipError: what a call raised, or a log that cannot be written or read.
        """
        folder = Path(self._plan.logs) / f"{self.given}-{self.scenario}-{len(self._theirs) + 1}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"LoadGen's logs cannot be kept in {str(folder)!r}: {error.strerror}."
            ) from error
        asked = self._run(folder)
        said = _log(folder)
        self.version = str(said["loadgen_version"])
        self._asked = max(self._asked, asked, key=len)
        single = self.scenario == "SingleStream"
        rate = said["result_qps_with_loadgen_overhead" if single else "result_samples_per_second"]
        self._expected_s = min(self._expected_s, 1 / rate)
        self._theirs.append(
            LoadGenTurn(
                n=len(asked),
                duration_s=len(asked) / rate,
                images_per_s=rate,
                p90_ms=said["result_90.00_percentile_latency_ns"] / 1e6 if single else None,
                mean_ms=said["result_mean_latency_ns"] / 1e6 if single else None,
                valid=said["result_validity"] == "VALID",
                min_duration_met=said["result_min_duration_met"],
                min_queries_met=said["result_min_queries_met"],
                early_stopping_met=said["early_stopping_met"],
                invalid_reason=said.get("result_invalid_reason", ""),
            )
        )

    def ours(self) -> None:
        """Answer what LoadGen asked for, on our clock."""
        if self.scenario == "Offline":
            began_ns = perf_counter_ns()
            self._answer(self._asked)
            taken_s = (perf_counter_ns() - began_ns) / 1e9
            n = len(self._asked)
            self._expected_s = min(self._expected_s, taken_s / n)
            self._ours.append(OwnTurn(n=n, duration_s=taken_s, images_per_s=n / taken_s))
            return
        taken_ns: list[int] = []
        began_ns = perf_counter_ns()
        for index in cycle(self._asked):
            start_ns = perf_counter_ns()
            self._answer((index,))
            now_ns = perf_counter_ns()
            taken_ns.append(now_ns - start_ns)
            if len(taken_ns) >= self._plan.min_queries and (now_ns - began_ns) / 1e9 >= self._plan.turn_s:
                break
        ordered = sorted(taken_ns)
        n, spent_s = len(ordered), (now_ns - began_ns) / 1e9
        self._ours.append(
            OwnTurn(
                n=n,
                duration_s=spent_s,
                images_per_s=n / spent_s,
                p90_ms=ordered[int(n * 0.9)] / 1e6,  # LoadGen's rank
                mean_ms=sum(ordered) / n / 1e6,
            )
        )

    def entry(self) -> ScenarioEntry:
        """Return what the report says."""
        ratios = [
            theirs.figure() / ours.figure() for theirs, ours in zip(self._theirs, self._ours, strict=True)
        ]
        return ScenarioEntry(
            scenario=self.scenario,
            given=self.given,
            min_duration_s=self._plan.turn_s,
            min_query_count=self._plan.min_queries,
            loadgen=tuple(self._theirs),
            ours=tuple(self._ours),
            ratio=_ratio(ratios),
        )

    def _settings(self) -> Any:
        loadgen, plan = self._loadgen, self._plan
        settings = loadgen.TestSettings()
        settings.scenario = getattr(loadgen.TestScenario, self.scenario)
        settings.mode = loadgen.TestMode.PerformanceOnly
        settings.min_duration_ms = math.ceil(plan.turn_s * 1e3)
        settings.min_query_count = plan.min_queries
        settings.single_stream_expected_latency_ns = max(1, int(_FASTER * self._expected_s * 1e9))
        settings.offline_expected_qps = _MORE / self._expected_s
        rng = random.Random(plan.seed)  # noqa: S311 - an order of pictures, not a secret
        settings.qsl_rng_seed, settings.sample_index_rng_seed, settings.schedule_rng_seed = (
            rng.getrandbits(63) for _ in range(3)
        )
        return settings

    def _run(self, folder: Path) -> list[int]:
        """Run LoadGen once and return which pictures it asked for, in order."""
        loadgen, count = self._loadgen, len(self._samples)
        asked: list[int] = []

        def issue(queries: list[Any]) -> None:
            indices = [query.index for query in queries]
            asked.extend(indices)
            try:
                self._answer(indices)
            except BaseException as error:  # LoadGen would end the process without a word
                self._fail(error)
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query.id, 0, 0) for query in queries])

        def nothing(_indices: list[int] | None = None) -> None:
            """Pictures are in memory already, and no answer is kept back."""

        output = loadgen.LogOutputSettings()
        output.outdir = str(folder)
        logging = loadgen.LogSettings()
        logging.log_output, logging.enable_trace = output, False
        library = loadgen.ConstructQSL(count, count, nothing, nothing)
        system = loadgen.ConstructSUT(issue, nothing)
        # No audit settings: LoadGen would take them from the folder at hand.
        loadgen.StartTestWithLogSettings(system, library, self._settings(), logging, "")
        loadgen.DestroySUT(system)
        loadgen.DestroyQSL(library)
        return asked


def _log(folder: Path) -> dict[str, Any]:
    """Return what LoadGen's detailed log says, by key."""
    path = folder / "mlperf_log_detail.txt"
    found: dict[str, Any] = {}
    try:
        for line in path.read_text("utf-8").splitlines():
            mark, _, said = line.partition(" ")
            if mark == ":::MLLOG":
                event = json.loads(said)
                found[event["key"]] = event["value"]
    except (OSError, ValueError, KeyError) as error:
        raise BackendError(f"LoadGen's log {str(path)!r} cannot be read: {error}.") from error
    if "result_validity" not in found:
        raise BackendError(f"LoadGen's log {str(path)!r} holds no result: LoadGen ended early.")
    return found


def _ratio(ratios: list[float]) -> RatioOfTurns:
    """Return the median over rounds with its interval."""
    ordered, n = sorted(ratios), len(ratios)
    value = float(np.median(ordered))
    if n < _ROUNDS_OF_AN_INTERVAL:
        return RatioOfTurns(value=value)
    low, high = order_interval(n, 0.5, _CONFIDENCE)
    return RatioOfTurns(value=value, low=ordered[low - 1], high=ordered[high - 1])


def main() -> None:
    """Do the check of standard input; write what is to be told to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    # What LoadGen and engines print must not mix with the messages.
    answer = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def tell(message: Message) -> None:
        answer.write(msgspec.json.encode(message) + b"\n")

    def fail(error: BaseException) -> NoReturn:
        tell(Failure(type(error).__name__, str(error) if isinstance(error, EdgeClipError) else repr(error)))
        os._exit(1)

    try:
        found = measure(plan, lambda said: tell(Progress(said)), fail)
    except EdgeClipError as error:
        fail(error)
    tell(Done(found))
