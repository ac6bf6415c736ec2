"""Measure targets side by side: every stage, cold starts, memory, labels, and what the machine could do.

Targets take turns in rounds of random order, a few calls each, until every one has enough samples and enough
time: what disturbs the machine for a while disturbs all of them, and none is measured in one block. Every
target sees the same pictures equally often.
"""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from edgeclip.bench.cold import ColdResult, ColdTarget, measure_cold
from edgeclip.bench.neighbours import Neighbours
from edgeclip.bench.operations import Operations, count_operations
from edgeclip.bench.peaks import Peaks
from edgeclip.bench.report import (
    END_TO_END,
    ArithmeticEntry,
    BenchReport,
    BenchRun,
    InterferenceEntry,
    PeaksEntry,
    RateEntry,
    stage_entry,
)
from edgeclip.bench.targets import Target, open_target
from edgeclip.bench.text_path import TextPath
from edgeclip.bundle import Bundle
from edgeclip.errors import BackendError, ConfigError, EdgeClipError
from edgeclip.runtime.choose import choose_variant
from edgeclip.runtime.host import UNAVAILABLE, Host, cpu_times, versions
from edgeclip.runtime.latency import LatencySamples, StageClock
from edgeclip.runtime.latency_report import DriftEntry

if TYPE_CHECKING:
    from pathlib import Path

    from edgeclip.bench.workload import Workload
    from edgeclip.bundle import Variant
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.runtime.latency_report import StageEntry

__all__ = ["BenchPlan", "benchmark"]

_WARMUP: Final = 3
_TURN_NS: Final = 30_000_000
_TURN_CALLS: Final = 8
_AHEAD: Final = 0.02
_PEAKS_EVERY_NS: Final = 10_000_000_000
_TEXT_SHARE: Final = 0.2
_TEXT_SAMPLES: Final = 20
_MIN_OF_A_PICTURE: Final = 3


@dataclass(frozen=True)
class BenchPlan:
    """What is to be measured.

    Attributes:
        targets: of one bundle, no two of one name.
        workload: pictures and labels.
        duration_s: go on until every target was measured for so long…
        min_samples: …and so many calls were timed.
        cold: fresh processes a target, with a warm cache and with an empty one; 0 leaves them out.
        seed: of every order.
        command: what the user typed.
        peak_sizes: of the matrix products that give the ceiling; empty leaves it out.
    """

    targets: tuple[Target, ...]
    workload: Workload
    duration_s: float = 10.0
    min_samples: int = 100
    cold: int = 5
    seed: int = 0
    command: str = ""
    peak_sizes: tuple[int, ...] = (512, 1024, 2048)

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("bench: got no targets, expected at least one.")
        bundles = sorted({target.bundle for target in self.targets})
        if len(bundles) > 1:
            raise ConfigError(
                f"bench: got targets of {len(bundles)} bundles, {bundles[0]!r} first, expected one. Use "
                "`edgeclip bench compare` for two."
            )
        if self.min_samples < 1 or self.cold < 0 or not 0 <= self.duration_s < math.inf:
            raise ConfigError(
                f"bench: got {self.min_samples} samples, {self.cold} cold starts and {self.duration_s} s, "
                "expected at least 1, 0 and 0."
            )


def benchmark(plan: BenchPlan, on_progress: Callable[[str], None] = lambda said: None) -> BenchReport:
    """Measure what a plan says.

    Args:
        plan: what is measured.
        on_progress: told now and then in a few words what is being done.

    Returns:
        The report.

    Raises:
        BackendUnavailableError: a target cannot be run here; that is found before anything is measured.
        EdgeClipError: a picture, a label or the bundle cannot be used.
    """
    began_ns = perf_counter_ns()
    created = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    bundle = Bundle.open(plan.targets[0].bundle)
    on_progress("looking at pictures")
    pictures = plan.workload.pictures_entry()
    subjects = _subjects(plan, bundle)
    ticks = cpu_times()
    cold = _cold(plan, bundle, subjects, on_progress)
    with ExitStack() as stack:
        lanes = _open(plan, bundle, subjects, stack, on_progress)
        texts = _texts(plan, bundle, lanes, stack)
        peaks = Peaks(plan.peak_sizes) if plan.peak_sizes else None
        _rounds(plan, lanes, texts, peaks, on_progress)
        labels = plan.workload.labels_entry(lanes[0].classifier)
        measured = None if peaks is None else peaks.entry()
        runs = tuple(
            _run(lane, texts.get(lane.group), result, measured)
            for lane, result in zip(lanes, cold, strict=True)
        )
    later = cpu_times()
    share = None if ticks is None or later is None else min(1.0, max(0.0, later.steal_share_since(ticks)))
    model = bundle.manifest.model.name
    return BenchReport(
        subject=model,
        created=created,
        command=plan.command,
        bundle={"name": model, "path": str(plan.targets[0].bundle), "digest": bundle.digest},
        pictures=pictures,
        labels=labels,
        runs=runs,
        peaks=measured,
        seed=plan.seed,
        duration_s=(perf_counter_ns() - began_ns) / 1e9,
        steal_share=_told(share),
        host=Host.here().to_dict(),
        versions=versions(),
    )


# --- targets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """A target whose variant is known."""

    target: Target
    variant: Variant


def _subjects(plan: BenchPlan, bundle: Bundle) -> list[_Subject]:
    """Return the targets with their variants; ``auto`` is called by the name of what it stands for."""
    found: dict[str, _Subject] = {}
    for target in plan.targets:
        choice = choose_variant(bundle, variant=target.variant, options=target.options())
        # A tuned profile may set threads and more, which goes with "auto" alone.
        named = target if choice.settings is not None else replace(target, variant=choice.variant.name)
        found.setdefault(named.short_name, _Subject(named, choice.variant))
    return list(found.values())


@dataclass
class _Lane:
    """A target that is open, and everything it was seen to do.

    Attributes:
        subject: the target.
        classifier: shared by targets that differ in the batch alone.
        clock: of that classifier.
        group: names the classifier.
        calls: so far, warm-up included: says which pictures come next.
        starts: the first picture of every timed call.
        wall_ms: of every timed call.
        spans: of every stage, ``(milliseconds, batch, first picture of the call)``.
        spent_ns: in timed calls.
        neighbours: what others had of the machine while this target ran.
    """

    subject: _Subject
    classifier: ZeroShotClassifier
    clock: StageClock
    group: tuple[Any, ...]
    first_ms: float = 0.0
    calls: int = 0
    starts: list[int] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    spans: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)
    spent_ns: int = 0
    neighbours: Neighbours = field(default_factory=Neighbours)

    def call(self, pictures: tuple[Path, ...], *, timed: bool) -> None:
        """Classify the next pictures once."""
        batch = self.subject.target.batch
        start = self.calls * batch % len(pictures)
        chosen = [pictures[(start + place) % len(pictures)] for place in range(batch)]
        self.clock.clear()
        began_ns = perf_counter_ns()
        if batch == 1:
            self.classifier.classify(chosen[0])
        else:
            workers = self.classifier.placement.threads
            for outcome in self.classifier.classify_stream(chosen, batch_size=batch, workers=workers):
                if outcome.error is not None:
                    raise outcome.error
        taken_ns = perf_counter_ns() - began_ns
        if not self.calls:
            self.first_ms = taken_ns / 1e6
        self.calls += 1
        if not timed:
            return
        self.spent_ns += taken_ns
        self.starts.append(start)
        self.wall_ms.append(taken_ns / 1e6)
        for span in self.clock.spans:
            self.spans.setdefault(span.stage, []).append((span.wall_ms, span.batch, start))


def _open(
    plan: BenchPlan,
    bundle: Bundle,
    subjects: list[_Subject],
    stack: ExitStack,
    on_progress: Callable[[str], None],
) -> list[_Lane]:
    """Open every target and warm it up: what cannot run fails here, before anything is timed."""
    opened: dict[tuple[Any, ...], tuple[ZeroShotClassifier, StageClock]] = {}
    lanes = []
    for subject in subjects:
        target = subject.target
        group = (target.variant, target.backend, target.device, target.threads, target.fast_decode)
        on_progress(f"opening {target.short_name}")
        if group not in opened:
            clock = StageClock()
            classifier = stack.enter_context(open_target(target, clock, bundle=bundle))
            plan.workload.set_labels(classifier)
            opened[group] = classifier, clock
        lanes.append(_Lane(subject, *opened[group], group))
    for lane in lanes:
        on_progress(f"warming up {lane.subject.target.short_name}")
        for _ in range(_WARMUP):
            lane.call(plan.workload.pictures, timed=False)
    return lanes


def _texts(
    plan: BenchPlan, bundle: Bundle, lanes: list[_Lane], stack: ExitStack
) -> dict[tuple[Any, ...], TextPath | str]:
    """Return what times the labels of each classifier, or why nothing does."""
    found: dict[tuple[Any, ...], TextPath | str] = {}
    for lane in lanes:
        if lane.group not in found:
            path = TextPath.of(bundle, lane.subject.variant, lane.subject.target, lane.classifier.bank)
            if isinstance(path, TextPath):
                stack.callback(path.close)
                try:
                    path.measure(timed=False)
                except BackendError as error:  # pictures do without a text tower
                    path = str(error)
            found[lane.group] = path
    return found


def _cold(
    plan: BenchPlan, bundle: Bundle, subjects: list[_Subject], on_progress: Callable[[str], None]
) -> list[ColdResult]:
    """Return the cold starts of every target; those that differ in the batch alone share theirs."""
    if not plan.cold:
        return [ColdResult(missing={"cold_start": "--cold 0", "memory": "--cold 0"}) for _ in subjects]
    alone = [replace(each.target, batch=1) for each in subjects]
    formats = {target: each.variant.entry.format for target, each in zip(alone, subjects, strict=True)}
    results = measure_cold(
        [ColdTarget(target, bundle, form) for target, form in formats.items()],
        plan.workload,
        runs=plan.cold,
        seed=plan.seed,
        on_run=lambda done, of: on_progress(f"cold start {done} of {of}"),
    )
    found = dict(zip(formats, results, strict=True))
    return [found[target] for target in alone]


# --- rounds -----------------------------------------------------------------------------------------------


def _rounds(
    plan: BenchPlan,
    lanes: list[_Lane],
    texts: dict[tuple[Any, ...], TextPath | str],
    peaks: Peaks | None,
    on_progress: Callable[[str], None],
) -> None:
    """Let targets take turns until all have what the plan asks for."""
    order = random.Random(plan.seed)  # noqa: S311 - an order of measurements, not a secret
    paths = [path for path in texts.values() if isinstance(path, TextPath)]
    looked_ns = 0
    while (done := min(_done(plan, lane) for lane in lanes)) < 1:
        if peaks is not None and perf_counter_ns() - looked_ns > _PEAKS_EVERY_NS:
            peaks.measure()
            looked_ns = perf_counter_ns()
        # Those that are ahead sit out: else the quick ones would be done early, or be left alone at the end.
        behind = [lane for lane in lanes if _done(plan, lane) <= done + _AHEAD]
        for lane in order.sample(behind, len(behind)):
            _turn(lane, plan.workload.pictures)
        spent_ns = sum(lane.spent_ns for lane in lanes)
        for path in order.sample(paths, len(paths)):
            # Labels come less often than pictures: they get a share of the time, spread over all of it.
            if path.n <= _TEXT_SAMPLES * done and path.spent_ns * len(paths) <= _TEXT_SHARE * spent_ns:
                path.measure()
        least = min(lanes, key=lambda lane: len(lane.wall_ms))
        on_progress(
            f"{len(least.wall_ms):,} calls of {plan.min_samples:,} and {least.spent_ns / 1e9:.0f} s of "
            f"{plan.duration_s:.0f} at least, {len(lanes)} target{'s' if len(lanes) > 1 else ''}"
        )
    if peaks is not None:
        peaks.measure()


def _done(plan: BenchPlan, lane: _Lane) -> float:
    """Return which part of its samples and of its time a target has, the lesser of the two."""
    of_time = lane.spent_ns / 1e9 / plan.duration_s if plan.duration_s else 1.0
    return min(len(lane.wall_ms) / plan.min_samples, of_time)


def _turn(lane: _Lane, pictures: tuple[Path, ...]) -> None:
    """Time a few calls: the first one finds the caches as others left them, most of them do not."""
    began_ns = perf_counter_ns()
    with lane.neighbours:
        for _ in range(_TURN_CALLS):
            lane.call(pictures, timed=True)
            if perf_counter_ns() - began_ns > _TURN_NS:
                break


# --- results ----------------------------------------------------------------------------------------------


def _run(lane: _Lane, text: TextPath | str | None, cold: ColdResult, peaks: PeaksEntry | None) -> BenchRun:
    target, variant = lane.subject.target, lane.subject.variant
    placement = lane.classifier.placement
    stages = {name: _stage(spans) for name, spans in lane.spans.items()}
    whole = [(ms, target.batch, start) for ms, start in zip(lane.wall_ms, lane.starts, strict=True)]
    stages[END_TO_END] = _stage(whole, warmup=_WARMUP, first_ms=lane.first_ms)
    missing = dict(cold.missing)
    texts: dict[Literal["uncached", "cached"], StageEntry] = {}
    if isinstance(text, TextPath):
        texts, said = text.entries()
        stages.update(said)
    else:
        missing["text"] = text or "no labels were timed"
    arithmetic = None
    try:
        operations = count_operations(variant.tower("image"))
    except EdgeClipError as error:
        missing["arithmetic"] = str(error)
    else:
        on_cpu = placement.device == "cpu"
        arithmetic = _arithmetic(
            operations, stages["image_tower"], placement.threads, peaks if on_cpu else None
        )
    memory = cold.memory_entry()
    return BenchRun(
        name=target.short_name,
        variant=variant.name,
        placement=asdict(placement),
        threads=placement.threads,
        batch=target.batch,
        fast_decode=target.fast_decode,
        stages=stages,
        images_per_s=_rate(stages[END_TO_END]),
        cold_start=cold.cold_start(),
        memory=memory,
        text=texts,
        arithmetic=arithmetic,
        interference=InterferenceEntry(
            steal_share=_told(lane.neighbours.steal_share),
            others_share=_told(lane.neighbours.others_share),
            drift=stages[END_TO_END].drift,
        ),
        size_bytes=_size_bytes(variant),
        accuracy=variant.entry.accuracy,
        missing=missing,
    )


def _stage(
    spans: list[tuple[float, int, int]], *, warmup: int = 0, first_ms: float | None = None
) -> StageEntry:
    """Return a stage of calls whose pictures differ; calls on smaller batches, a last one, are left out."""
    batch = max(each[1] for each in spans)
    full = [each for each in spans if each[1] == batch]
    samples = LatencySamples(
        np.array([ms for ms, _, _ in full]), warmup=warmup, first_ms=first_ms, batch=batch
    )
    return stage_entry(samples, drift=_drift([(ms, start) for ms, _, start in full]))


def _drift(samples: list[tuple[float, int]]) -> DriftEntry | None:
    """Compare the last third of calls with the first, each against the median of calls on its pictures.

    Large pictures that happen to come early would look like a drift otherwise.
    """
    by_start: dict[int, list[float]] = {}
    for ms, start in samples:
        by_start.setdefault(start, []).append(ms)
    medians = {start: float(np.median(found)) for start, found in by_start.items()}
    if min(map(len, by_start.values())) < _MIN_OF_A_PICTURE or not all(medians.values()):
        return None
    relative = LatencySamples(np.array([ms / medians[start] for ms, start in samples]))
    drift = relative.drift()
    return None if drift is None else DriftEntry(**asdict(drift))


def _rate(entry: StageEntry) -> RateEntry:
    """Return pictures a second from the median of calls."""
    half = next((each for each in entry.percentiles if each.p == 50), None)
    return RateEntry(
        value=1e3 * entry.batch / entry.wall_ms,
        low=None if half is None else 1e3 * entry.batch / half.high_ms,
        high=None if half is None else 1e3 * entry.batch / half.low_ms,
    )


def _arithmetic(
    operations: Operations, tower: StageEntry, threads: int, peaks: PeaksEntry | None
) -> ArithmeticEntry:
    achieved = operations.total / (tower.ms / 1e3)
    said = ArithmeticEntry(
        operations=operations.total,
        int8_operations=operations.int8,
        achieved_per_s=achieved,
        why="no ceiling was measured for this device",
    )
    if peaks is None:
        return said
    real, integer = (1e9 * threads * max(each.values()) for each in (peaks.float_gflops, peaks.int8_gops))
    ideal_s = (operations.total - operations.int8) / real + operations.int8 / integer
    peak = operations.total / ideal_s
    return ArithmeticEntry(
        operations=operations.total,
        int8_operations=operations.int8,
        achieved_per_s=achieved,
        peak_per_s=peak,
        share=achieved / peak,
    )


def _size_bytes(variant: Variant) -> int:
    """Return the size of the files of all towers of a variant."""
    names = {name for tower in variant.entry.towers.values() for name in tower.files}
    return sum(variant.bundle.manifest.files[name].size_bytes for name in names)


def _told(share: float | None) -> Any:
    return UNAVAILABLE if share is None else share
