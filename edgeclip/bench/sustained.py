"""The sustained protocol: one picture after the other for ten minutes, while sensors are read.

Short measurements see a cold device. Boards without a fan, laptops and phones are fast for a minute and
slower from then on; what counts is what is left. Every call is timed from picture to answer, none is left
out. The first minute stands against the last, and the slowest minute says what can be relied on.

A picture belongs to the second in which it was done. Samples of one minute are not independent (a busy
neighbour, a clock that steps), so the interval of the change comes from a bootstrap over blocks of
neighbours (Künsch, The Annals of Statistics 17, 1989; blocks here do not overlap).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
from msgspec import Meta, Struct

from edgeclip.bench.report import LabelsEntry, PicturesEntry
from edgeclip.bench.sensors import GaugeEntry, SensorLog, SensorsEntry, ThrottleEntry, throttled
from edgeclip.errors import ConfigError
from edgeclip.runtime.host import cpu_times
from edgeclip.runtime.latency import LatencySamples, StageClock
from edgeclip.runtime.latency_report import PercentileEntry
from edgeclip.runtime.statistics import CONFIDENCE, nearest_rank, percentile

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ChangeEntry",
    "MinuteEntry",
    "Sustained",
    "SustainedEntry",
    "SustainedPlan",
    "WindowEntry",
    "change_of_median",
    "summarize",
    "sustain",
]

Positive = Annotated[float, Meta(gt=0)]
Seconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]

SHORTEST_S: Final = 3.0
LONGEST_S: Final = 3600.0  # one value a picture: reports stay below the size that readers take
MINUTE_S: Final = 60
STAGE_SAMPLES: Final = 20_000
_BLOCKS, _DRAWS = 30, 1000
_VALUES_AT_ONCE = 1 << 18
_SHOW_NS: Final = 1_000_000_000


class WindowEntry(Struct, frozen=True, kw_only=True):
    """Pictures that were done in some seconds; ``p50`` is null where they are too few to carry it."""

    from_s: Seconds
    to_s: Positive
    n: Count
    images_per_s: Seconds
    p50: PercentileEntry | None = None


class MinuteEntry(Struct, frozen=True, kw_only=True):
    """The slowest minute of the run, wherever it began."""

    from_s: Seconds
    images_per_s: Seconds


class ChangeEntry(Struct, frozen=True, kw_only=True):
    """Median of the last window over that of the first: 1.2 means that a picture takes a fifth longer."""

    ratio: Positive
    low: Positive
    high: Positive
    confidence: Annotated[float, Meta(gt=0, lt=1)]


class SustainedEntry(Struct, frozen=True, kw_only=True):
    """What came of a sustained run. Times of pictures stand under ``latency``, ``end_to_end``, in order.

    ``pictures`` and ``labels`` are what was classified; null where the run was of something else.
    ``images_by_second`` says how many were done in each second, the last of which is not a whole one: with
    the times in their order everything here can be computed again. ``window_s`` is the length of ``first``
    and ``last``: a minute, and in runs under three minutes a third of it. ``stages_every`` is the distance
    of the pictures whose stages are kept; end-to-end times are all there.
    """

    asked_s: Positive
    lasted_s: Positive
    interrupted: bool
    images: Annotated[int, Meta(ge=1)]
    images_per_s: Positive
    images_by_second: tuple[Count, ...]
    window_s: Count
    first: WindowEntry | None
    last: WindowEntry | None
    change: ChangeEntry | None
    slowest_minute: MinuteEntry | None
    stages_every: Annotated[int, Meta(ge=1)]
    throttled: ThrottleEntry
    sensors: SensorsEntry
    pictures: PicturesEntry | None = None
    labels: LabelsEntry | None = None

    def to_table(self) -> str:
        """Return it as text."""
        lines = [f"{self.images:,} pictures in {self.lasted_s:.0f} s, {self.images_per_s:.2f} a second"]
        if self.interrupted:
            lines[0] += f"; interrupted, {self.asked_s:.0f} s were asked for"
        for name, window in (("first", self.first), ("last", self.last)):
            if window is not None:
                lines.append(f"{name} {self.window_s} s: {_p50(window)}, {window.images_per_s:.2f} a second")
        if self.change is not None:
            change = self.change
            lines.append(f"last / first: {change.ratio:.3f} ({change.low:.3f} to {change.high:.3f})")
        if self.slowest_minute is not None:
            slowest = self.slowest_minute
            lines.append(
                f"slowest minute: {slowest.images_per_s:.2f} a second, from {slowest.from_s:.0f} s on"
            )
        why = "; ".join(self.throttled.why)
        lines.append(f"throttled: {self.throttled.status}" + (f" ({why})" if why else ""))
        for kind in ("temperature", "clock", "power"):
            lines += [_gauge(gauge) for gauge in self.sensors.of_kind(kind)]
        lines += [f"not told: {said}" for said in self.sensors.untold if said not in self.throttled.why]
        cost = self.sensors.cost
        if cost.readings:
            lines.append(
                f"reading sensors cost {cost.share:.2%} of a core, {cost.median_ms:.2f} ms each second "
                f"(slowest {cost.slowest_ms:.1f} ms)"
            )
        return "\n".join(lines)


def _p50(window: WindowEntry) -> str:
    if window.p50 is None:
        return f"{window.n} pictures, too few for p50"
    return f"p50 {window.p50.ms:.2f} ms ({window.p50.low_ms:.2f} to {window.p50.high_ms:.2f}, n {window.n:,})"


def _gauge(gauge: GaugeEntry) -> str:
    values = [value for value in gauge.values if value is not None]
    unit = "°C" if gauge.unit == "C" else gauge.unit
    return (
        f"{gauge.kind} of {gauge.name}: {values[0]:g} {unit} at first, {values[-1]:g} at last, "
        f"{min(values):g} to {max(values):g}"
    )


# --- the run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SustainedPlan:
    """How long, and what becomes of a run that is cut short.

    Attributes:
        duration_s: 3 to 3600.
        warmup: calls before the run: enough to have everything loaded, too few to warm the device.
        keep_partial: whether Ctrl-C ends the run and keeps what there is, rather than throwing it away.

    Raises:
        ConfigError: the duration is out of range.
    """

    duration_s: float = 600.0
    warmup: int = 3
    keep_partial: bool = False

    def __post_init__(self) -> None:
        """Check the duration."""
        if not SHORTEST_S <= self.duration_s <= LONGEST_S:
            raise ConfigError(
                f"duration: got {self.duration_s:g} s, expected {SHORTEST_S:g} to {LONGEST_S:g} s: shorter "
                "runs say nothing of a sustained load, longer ones make reports that cannot be read."
            )


@dataclass(frozen=True, eq=False)
class Sustained:
    """A run: what was timed, and what follows from it.

    Attributes:
        end_to_end: every call.
        stages: of every ``entry.stages_every``-th call.
        entry: for the report.
    """

    end_to_end: LatencySamples
    stages: Mapping[str, LatencySamples]
    entry: SustainedEntry


def sustain(
    call: Callable[[int], object],
    *,
    plan: SustainedPlan,
    sensors: SensorLog,
    clock: StageClock | None = None,
    on_progress: Callable[[float, int, float], None] | None = None,
) -> Sustained:
    """Call a function again and again for the length of a plan.

    Args:
        call: does the work for the n-th picture and returns when its answer is ready.
        plan: how long.
        sensors: read meanwhile; not used before.
        clock: where ``call`` records its stages; emptied after each call.
        on_progress: told seconds, pictures and the latest time in ms, once a second, between two calls.

    Raises:
        KeyboardInterrupt: unless the plan keeps what there is, and there is something.
    """
    first_ms = None
    for number in range(plan.warmup):
        start_ns = perf_counter_ns()
        call(number)
        first_ms = (perf_counter_ns() - start_ns) / 1e6 if first_ms is None else first_ms
    if clock is not None:
        clock.clear()
    taken_ns, ends_ns = array("q"), array("q")
    stages_ns: dict[str, array[int]] = {}
    interrupted = False
    ticks = cpu_times()
    with sensors:
        began_ns = perf_counter_ns()
        deadline_ns = began_ns + round(plan.duration_s * 1e9)
        shown_ns = began_ns
        try:
            while True:
                start_ns = perf_counter_ns()
                call(len(taken_ns))
                end_ns = perf_counter_ns()
                taken_ns.append(end_ns - start_ns)
                ends_ns.append(end_ns - began_ns)
                if clock is not None:
                    for span in clock.spans:
                        stages_ns.setdefault(span.stage, array("q")).append(span.end_ns - span.start_ns)
                    clock.clear()
                if end_ns >= deadline_ns:
                    break
                if on_progress is not None and end_ns - shown_ns >= _SHOW_NS:
                    shown_ns = end_ns
                    on_progress(ends_ns[-1] / 1e9, len(ends_ns), taken_ns[-1] / 1e6)
        except KeyboardInterrupt:
            if not (plan.keep_partial and ends_ns):
                raise
            interrupted = True
    later = cpu_times()
    steal_share = None if ticks is None or later is None else later.steal_share_since(ticks)
    done = len(ends_ns)  # the interrupt may have come between the two
    times_ms, ends_s = _ms(taken_ns[:done]), np.array(ends_ns, np.float64) / 1e9
    every = max(1, math.ceil(done / STAGE_SAMPLES))
    duration_s = float(ends_s[-1])
    return Sustained(
        LatencySamples(times_ms, plan.warmup, first_ms, 1, duration_s, steal_share),
        {
            name: LatencySamples(_ms(values)[::every], plan.warmup, None, 1, duration_s, steal_share)
            for name, values in stages_ns.items()
        },
        summarize(
            times_ms, ends_s, asked_s=plan.duration_s, interrupted=interrupted, stages_every=every,
            sensors=sensors.result(),
        ),
    )  # fmt: skip


def _ms(values_ns: array[int]) -> NDArray[np.float64]:
    # a tenth of a microsecond: what is written is what is computed with
    return np.round(np.array(values_ns, np.float64) / 1e6, 4)


# --- what follows ------------------------------------------------------------------------------------------


def summarize(
    times_ms: NDArray[np.float64],
    ends_s: NDArray[np.float64],
    *,
    asked_s: float,
    interrupted: bool,
    stages_every: int,
    sensors: SensorsEntry,
) -> SustainedEntry:
    """Return what follows from the times of all pictures.

    Args:
        times_ms: of each picture, ``(n,)``.
        ends_s: when each was done, ``(n,)``, rising.
        asked_s: how long the run was to last.
        interrupted: whether it was cut short.
        stages_every: see :class:`SustainedEntry`.
        sensors: what was read meanwhile.
    """
    seconds = ends_s.astype(np.int64)
    by_second = np.bincount(seconds)
    whole = len(by_second) - 1  # the last second is not a whole one
    window_s = min(MINUTE_S, whole // 3)
    first = last = None
    change = None
    if window_s:
        first, in_first = _window(times_ms, seconds, 0, window_s)
        last, in_last = _window(times_ms, seconds, whole - window_s, whole)
        change = change_of_median(in_first, in_last)
    slowest = None
    if whole >= MINUTE_S:
        sums = np.convolve(by_second[:whole], np.ones(MINUTE_S, np.int64), "valid")
        at = int(np.argmin(sums))
        slowest = MinuteEntry(from_s=at, images_per_s=round(int(sums[at]) / MINUTE_S, 4))
    lasted_s = float(ends_s[-1])
    return SustainedEntry(
        asked_s=asked_s,
        lasted_s=round(lasted_s, 3),
        interrupted=interrupted,
        images=len(times_ms),
        images_per_s=round(len(times_ms) / lasted_s, 4),
        images_by_second=tuple(by_second.tolist()),
        window_s=window_s,
        first=first,
        last=last,
        change=change,
        slowest_minute=slowest,
        stages_every=stages_every,
        throttled=throttled(sensors),
        sensors=sensors,
    )


def _window(
    times_ms: NDArray[np.float64], seconds: NDArray[np.int64], from_s: int, to_s: int
) -> tuple[WindowEntry, NDArray[np.float64]]:
    inside = times_ms[(seconds >= from_s) & (seconds < to_s)]
    found = percentile(inside, 50) if len(inside) else None
    entry = WindowEntry(
        from_s=from_s,
        to_s=to_s,
        n=len(inside),
        images_per_s=round(len(inside) / (to_s - from_s), 4),
        p50=None if found is None else PercentileEntry(**asdict(found)),
    )
    return entry, inside


def change_of_median(
    first: NDArray[np.float64], last: NDArray[np.float64], *, seed: int = 0
) -> ChangeEntry | None:
    """Return median of ``last`` over median of ``first``, with an interval that neighbours may be alike in.

    Args:
        first: times in their order.
        last: times in their order.
        seed: of the bootstrap.

    Returns:
        ``None`` where one has fewer than thirty samples.
    """
    if min(len(first), len(last)) < _BLOCKS:
        return None
    rng = np.random.default_rng(seed)
    ratios = _block_medians(last, rng) / _block_medians(first, rng)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    ratio = nearest_rank(np.sort(last), 50.0) / nearest_rank(np.sort(first), 50.0)
    # with few samples the interval of resampled medians may miss the nearest rank by one sample
    return ChangeEntry(
        ratio=ratio, low=min(float(low), ratio), high=max(float(high), ratio), confidence=CONFIDENCE
    )


def _block_medians(samples: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return medians of resamples that are made of whole blocks of neighbours."""
    length = len(samples) // _BLOCKS  # what is left over at the end is in no resample
    blocks = samples[: length * _BLOCKS].reshape(_BLOCKS, length)
    drawn = rng.integers(_BLOCKS, size=(_DRAWS, _BLOCKS))
    at_once = max(1, _VALUES_AT_ONCE // (length * _BLOCKS))
    return np.concatenate(
        [
            np.median(blocks[drawn[start : start + at_once]].reshape(-1, _BLOCKS * length), axis=1)
            for start in range(0, _DRAWS, at_once)
        ]
    )
