"""The one clock: stages of a call, samples of a function, and honest ratios of two.

What counts as one sample is what its callers time: ``fn()`` must return when its result is ready, as
``Session.run`` does. Nothing here knows models, bundles or pictures.

Percentiles and their intervals are defined in ``statistics.py``. A ratio is the median over blocks of the
geometric mean of the ratios in a block, with the same kind of interval.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from edgeclip.errors import ConfigError
from edgeclip.runtime.host import CpuTimes, cpu_times
from edgeclip.runtime.statistics import (
    CONFIDENCE,
    Percentile,
    bootstrap_medians,
    check_open_interval,
    nearest_rank,
    order_interval,
    percentile,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "COLD_START_PHASES",
    "CONFIDENCE",
    "NO_CLOCK",
    "STAGES",
    "Clock",
    "Drift",
    "LatencySamples",
    "Percentile",
    "RatioInterval",
    "Span",
    "StageClock",
    "StageTime",
    "compare_interleaved",
    "measure",
    "percentile",
]

STAGES: Final = ("decode", "resize", "tokenize", "text_tower", "image_tower", "head")
COLD_START_PHASES: Final = ("import", "open", "compile", "first_run")

# --- stages -----------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Something that times stages: a :class:`StageClock`, or :data:`NO_CLOCK`."""

    def span(self, stage: str, *, batch: int = 1) -> AbstractContextManager[object]:
        """Return a context that times its body as one run of a stage over ``batch`` items."""
        ...


class _NoClock:
    """A clock that times nothing: one shared context, no allocation, no lock."""

    _nothing: Final = nullcontext()

    def span(self, stage: str, *, batch: int = 1) -> AbstractContextManager[object]:
        return self._nothing

    def __repr__(self) -> str:
        return "NO_CLOCK"


NO_CLOCK: Final[Clock] = _NoClock()


@dataclass(frozen=True)
class Span:
    """One run of a stage, in ``perf_counter_ns`` nanoseconds."""

    stage: str
    start_ns: int
    end_ns: int
    batch: int

    @property
    def wall_ms(self) -> float:
        """How long it took."""
        return (self.end_ns - self.start_ns) / 1e6

    @property
    def ms(self) -> float:
        """How long it took for one item of the batch."""
        return self.wall_ms / self.batch


@dataclass(frozen=True)
class StageTime:
    """All runs of one stage together.

    Attributes:
        ms: mean milliseconds per item.
        wall_ms: sum over runs. Stages overlap where pictures are decoded ahead: sums may exceed the wall.
        runs: how often it ran.
        items: how many items that were.
        batch: largest batch.
    """

    ms: float
    wall_ms: float
    runs: int
    items: int
    batch: int


class StageClock:
    """Record how long stages take. Safe for many threads at once; keeps every span until ``clear``."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, int, int, int]] = []  # list.append needs no lock

    def span(self, stage: str, *, batch: int = 1) -> _Running:
        """Time the body of a ``with`` as one run of ``stage`` over ``batch`` items; also when it raises."""
        return _Running(self._spans, stage, batch)

    def record(self, stage: str, start_ns: int, end_ns: int, *, batch: int = 1) -> None:
        """Add a run that was timed elsewhere with ``perf_counter_ns``."""
        self._spans.append((stage, start_ns, end_ns, batch))

    @property
    def spans(self) -> tuple[Span, ...]:
        """Every run so far, in the order in which they ended."""
        return tuple(Span(*span) for span in list(self._spans))

    def totals(self) -> dict[str, StageTime]:
        """Return one line a stage, known stages first and in their order."""
        groups: dict[str, list[Span]] = {}
        for span in self.spans:
            groups.setdefault(span.stage, []).append(span)
        order = [*COLD_START_PHASES, *STAGES]
        names = sorted(groups, key=lambda name: order.index(name) if name in order else len(order))
        return {name: _stage_time(groups[name]) for name in names}

    def samples(self) -> dict[str, LatencySamples]:
        """Return the runs of every stage as samples, ready for percentiles and reports.

        Runs whose batch is smaller than the stage's largest, the last of a list, are left out.
        """
        groups: dict[str, list[Span]] = {}
        for span in self.spans:
            groups.setdefault(span.stage, []).append(span)
        found = {}
        for stage, spans in groups.items():
            batch = max(span.batch for span in spans)
            full = [span for span in spans if span.batch == batch]
            found[stage] = LatencySamples(
                samples_ms=np.array([span.wall_ms for span in full]),
                first_ms=spans[0].wall_ms,
                batch=batch,
                duration_s=(spans[-1].end_ns - spans[0].start_ns) / 1e9,
            )
        return found

    def clear(self) -> None:
        """Forget every span."""
        self._spans.clear()


class _Running:
    """The body of a ``with clock.span(…)``."""

    __slots__ = ("_batch", "_spans", "_stage", "_start_ns")

    def __init__(self, spans: list[tuple[str, int, int, int]], stage: str, batch: int) -> None:
        self._spans = spans
        self._stage = stage
        self._batch = batch

    def __enter__(self) -> None:
        self._start_ns = perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spans.append((self._stage, self._start_ns, perf_counter_ns(), self._batch))


def _stage_time(spans: Sequence[Span]) -> StageTime:
    wall_ms = sum(span.wall_ms for span in spans)
    items = sum(span.batch for span in spans)
    return StageTime(
        ms=wall_ms / max(items, 1),
        wall_ms=wall_ms,
        runs=len(spans),
        items=items,
        batch=max(span.batch for span in spans),
    )


# --- samples and percentiles ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """How the last third of the samples compares with the first: throttling, warming up, leaks.

    Attributes:
        ratio: median of the last third over median of the first.
        low: of the interval of the ratio.
        high: of the interval of the ratio. Samples close in time are alike, so it is a little narrow.
    """

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class LatencySamples:
    """Raw samples of one function.

    Attributes:
        samples_ms: milliseconds of each call, in the order of the calls.
        warmup: calls before them that were not counted.
        first_ms: the very first call, warm-up or not.
        batch: items a call handled.
        duration_s: from the first counted call to the last.
        steal_share: share of the machine's time that its hypervisor gave to others; ``None`` where not told.
    """

    samples_ms: NDArray[np.float64]
    warmup: int = 0
    first_ms: float | None = None
    batch: int = 1
    duration_s: float = 0.0
    steal_share: float | None = None

    def __len__(self) -> int:
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """The 50th percentile, however few samples there are.

        Raises:
            ConfigError: there is no sample.
        """
        return nearest_rank(np.sort(self.samples_ms), 50.0)

    def percentile(self, p: float, *, confidence: float = CONFIDENCE) -> Percentile | None:
        """Return a percentile with its interval, ``None`` where the samples do not carry it."""
        return percentile(self.samples_ms, p, confidence=confidence)

    def percentiles(self, ps: Iterable[float] = (50, 90, 95, 99, 99.9)) -> tuple[Percentile, ...]:
        """Return those percentiles that the samples carry."""
        return tuple(found for p in ps if (found := self.percentile(p)) is not None)

    def drift(self, *, seed: int = 0) -> Drift | None:
        """Compare the last third with the first; ``None`` below thirty samples."""
        third = len(self.samples_ms) // 3
        if third < 10:
            return None
        rng = np.random.default_rng(seed)
        first, last = self.samples_ms[:third], self.samples_ms[-third:]
        ratios = bootstrap_medians(last, rng) / bootstrap_medians(first, rng)
        low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        ratio = nearest_rank(np.sort(last), 50.0) / nearest_rank(np.sort(first), 50.0)
        return Drift(float(ratio), float(low), float(high))


def measure(
    fn: Callable[[], object],
    *,
    warmup: int = 10,
    min_samples: int = 100,
    min_duration_s: float = 1.0,
    max_duration_s: float = 60.0,
    batch: int = 1,
) -> LatencySamples:
    """Call a function until there are enough samples and return them all.

    Args:
        fn: called without arguments; it returns when its result is ready.
        warmup: calls before the counted ones.
        min_samples: go on until there are so many…
        min_duration_s: …and for so long, whichever ends later (as MLPerf's LoadGen).
        max_duration_s: but never longer than this, warm-up included; at least one sample is taken.
        batch: items one call handles, noted in the result.

    Raises:
        ConfigError: a limit is negative or not a number.
    """
    _check_limits(warmup=warmup, min_samples=min_samples, batch=batch - 1)
    _check_limits(min_duration_s=min_duration_s, max_duration_s=max_duration_s)
    began_ns = perf_counter_ns()
    deadline_ns = began_ns + round(max_duration_s * 1e9)
    first_ns = None
    warm = 0
    while warm < warmup and perf_counter_ns() < deadline_ns:
        taken_ns = _time_ns(fn)
        first_ns = taken_ns if first_ns is None else first_ns
        warm += 1
    samples_ns: list[int] = []
    ticks = cpu_times()
    counted_from_ns = perf_counter_ns()
    enough_ns = counted_from_ns + round(min_duration_s * 1e9)
    while True:
        samples_ns.append(_time_ns(fn))
        now_ns = perf_counter_ns()
        if now_ns >= deadline_ns or (len(samples_ns) >= min_samples and now_ns >= enough_ns):
            break
    return LatencySamples(
        samples_ms=np.array(samples_ns, np.float64) / 1e6,
        warmup=warm,
        first_ms=(samples_ns[0] if first_ns is None else first_ns) / 1e6,
        batch=batch,
        duration_s=(now_ns - counted_from_ns) / 1e9,
        steal_share=_steal_share(ticks),
    )


# --- two functions against each other ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RatioInterval:
    """Time of ``a`` over time of ``b``: 2 means that ``a`` takes twice as long.

    Attributes:
        ratio: median over blocks.
        low: lower end of the interval that covers the median ratio with ``confidence``.
        high: upper end.
        n: blocks, each of two calls of ``a`` and two of ``b``.
        confidence: of the interval.
        a: raw samples of ``a``.
        b: raw samples of ``b``.
        seed: of the order of the blocks.
        steal_share: see :class:`LatencySamples`.
    """

    ratio: float
    low: float
    high: float
    n: int
    confidence: float
    a: LatencySamples
    b: LatencySamples
    seed: int
    steal_share: float | None = None

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f}, {self.n} blocks)"


def compare_interleaved(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    min_blocks: int = 30,
    min_duration_s: float = 1.0,
    max_duration_s: float = 60.0,
    warmup: int = 3,
    repeat: int = 1,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> RatioInterval:
    """Measure how much longer ``a`` takes than ``b``, in turns, so that both meet the same machine.

    Every block is ``a b b a`` or ``b a a b``, drawn at random: a drift that is linear over a block cancels in
    its ratio, and no rhythm of the machine can follow the order.

    Args:
        a: called without arguments; it returns when its result is ready.
        b: the other one.
        min_blocks: go on until there are so many blocks…
        min_duration_s: …and for so long.
        max_duration_s: but not longer than this, once there are the blocks an interval needs.
        warmup: calls of each before the first block.
        repeat: calls in one timed sample, for functions of a few microseconds.
        confidence: of the interval.
        seed: of the order.

    Raises:
        ConfigError: a limit is out of range.
    """
    _check_limits(min_blocks=min_blocks - 1, warmup=warmup, repeat=repeat - 1)
    _check_limits(min_duration_s=min_duration_s, max_duration_s=max_duration_s)
    check_open_interval("confidence", confidence, 1)
    # Below this many blocks no pair of order statistics covers the median.
    needed = math.ceil(1 + math.log2(1 / (1 - confidence)))
    order = random.Random(seed)  # noqa: S311 - an order of measurements, not a secret
    first_ns = {"a": 0, "b": 0}
    for name, fn in (("a", a), ("b", b)):
        for call in range(warmup):
            taken_ns = _time_ns(fn)
            first_ns[name] = first_ns[name] if call else taken_ns
    taken: dict[str, list[float]] = {"a": [], "b": []}
    ticks = cpu_times()
    began_ns = perf_counter_ns()
    blocks = 0
    while True:
        for name in order.choice(("abba", "baab")):
            fn = a if name == "a" else b
            taken[name].append(_time_ns(fn, repeat) / repeat)
        blocks += 1
        passed_s = (perf_counter_ns() - began_ns) / 1e9
        if blocks < needed:
            continue
        if passed_s >= max_duration_s or (blocks >= min_blocks and passed_s >= min_duration_s):
            break
    steal_share = _steal_share(ticks)
    samples = {
        name: LatencySamples(
            samples_ms=np.array(values) / 1e6,
            warmup=warmup,
            first_ms=first_ns[name] / 1e6 if warmup else values[0] / 1e6,
            duration_s=passed_s,
            steal_share=steal_share,
        )
        for name, values in taken.items()
    }
    ratio, low, high = _ratio_interval(samples["a"].samples_ms, samples["b"].samples_ms, confidence)
    return RatioInterval(ratio, low, high, blocks, confidence, samples["a"], samples["b"], seed, steal_share)


def _ratio_interval(
    a: NDArray[np.float64], b: NDArray[np.float64], confidence: float
) -> tuple[float, float, float]:
    """Return the median ratio of blocks of two samples each, with its interval."""
    logs = np.log(np.maximum(a, 1e-9)).reshape(-1, 2).mean(axis=1)  # 1e-9: one picosecond, never a zero
    logs -= np.log(np.maximum(b, 1e-9)).reshape(-1, 2).mean(axis=1)
    ordered = np.sort(logs)
    low, high = order_interval(len(ordered), 0.5, confidence)
    ratio, below, above = np.exp([np.median(ordered), ordered[low - 1], ordered[high - 1]])
    return float(ratio), float(below), float(above)


def _time_ns(fn: Callable[[], object], repeat: int = 1) -> int:
    if repeat == 1:
        start_ns = perf_counter_ns()
        fn()
        return perf_counter_ns() - start_ns
    calls = range(repeat)
    start_ns = perf_counter_ns()
    for _ in calls:
        fn()
    return perf_counter_ns() - start_ns


def _steal_share(before: CpuTimes | None) -> float | None:
    after = cpu_times()
    return None if before is None or after is None else after.steal_share_since(before)


def _check_limits(**limits: float) -> None:
    for name, value in limits.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name}: got {value!r}, expected a number that is large enough.")
