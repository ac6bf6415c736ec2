"""Which range of a tensor its 256 levels are spread over: five methods, and the statistics they choose by.

A method is a value. *Min-max* takes the least and largest value there was; *moving average* the means of
the least and largest values of batches; *percentile* leaves out a share of the values; *entropy* keeps the
distribution (Migacz 2017, "8-bit Inference with TensorRT"); *MSE* makes the expected squared error of
rounding and clipping least. The last three go by a histogram, for which the rows are read twice: the first
time finds its bounds, so that it never has to grow, and a tensor takes the same 2,049 numbers however many
values it has.

    >>> RangeMethod.parse("percentile:99.9")
    Percentile(share=99.9)
    >>> str(MeanSquaredError())
    'mse'

Whoever has a graph tells what is inside it through a :class:`Watch`; nothing here knows of ONNX.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeclip.cache import HostCache
from edgeclip.errors import CalibrationError, ConfigError
from edgeclip.quantization import CPU, Range, Scheme
from edgeclip.runtime.rows import fixed_batch
from edgeclip.runtime.session import Session

__all__ = [
    "BATCH",
    "METHODS",
    "Entropy",
    "Histogram",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "RangeMethod",
    "Seen",
    "Watch",
    "batches",
    "chunks",
    "means",
    "observe",
]

BATCH: Final = 8
"""Rows that a graph runs at a time, unless it takes a fixed number."""
_HALF: Final = 1024  # bins on either side of the one around zero
_MOST_BYTES: Final = 256 << 20  # of tensors that are held at once
_STEPS: Final = 64  # bounds that MSE tries on either side
_LEVELS: Final = 255  # steps between 256 levels


# --- what was seen of a tensor -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many values fell into bins of one width, the middle one around zero.

    Attributes:
        counts: ``(2 n + 1,)`` int64.
        bound: right end of the last bin; the left end of the first is its negative.
    """

    counts: NDArray[np.int64]
    bound: float

    @cached_property
    def edges(self) -> NDArray[np.float64]:
        """Ends of the bins, ``(2 n + 2,)``."""
        return np.linspace(-self.bound, self.bound, len(self.counts) + 1)

    @cached_property
    def centres(self) -> NDArray[np.float64]:
        """Middles of the bins, ``(2 n + 1,)``."""
        return (self.edges[:-1] + self.edges[1:]) / 2


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of a tensor over a calibration set.

    Attributes:
        least: smallest value.
        most: largest value.
        mean_least: mean over batches of their smallest values.
        mean_most: mean over batches of their largest values.
        histogram: of all values, where the method asks for one.
    """

    least: float
    most: float
    mean_least: float
    mean_most: float
    histogram: Histogram | None = None


# --- methods -----------------------------------------------------------------------------------------------


class RangeMethod(ABC):
    """How a range is chosen. Methods are frozen values: equal ones choose the same.

    Attributes:
        name: in recipes, options and manifests.
        by_histogram: whether it goes by a histogram.
    """

    name: ClassVar[str]
    by_histogram: ClassVar[bool] = True

    @abstractmethod
    def choose(self, seen: Seen, scheme: Scheme = CPU) -> Range:
        """Return the range of a tensor.

        Args:
            seen: of the tensor; with a histogram where the method goes by one.
            scheme: what int8 means.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]  # all are dataclasses

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(text: str) -> RangeMethod:
        """Read a method as options and recipes name it.

        Raises:
            ConfigError: there is none of that name, or its share is out of range.
        """
        name, colon, rest = text.strip().partition(":")
        method = METHODS.get(name)
        if method is None or (colon and method is not Percentile):
            raise ConfigError(
                f"int8 method {text!r}: expected one of {', '.join(sorted(METHODS))}; percentile takes a "
                "share, as in percentile:99.99."
            )
        if not colon:
            return method()
        try:
            share = float(rest)
        except ValueError:
            share = float("nan")
        return Percentile(share)


@dataclass(frozen=True)
class MinMax(RangeMethod):
    """From the smallest to the largest value."""

    name = "minmax"
    by_histogram = False

    def choose(self, seen: Seen, scheme: Scheme = CPU) -> Range:
        """Return the range of a tensor."""
        return seen.least, seen.most


@dataclass(frozen=True)
class MovingAverage(RangeMethod):
    """From the mean of the smallest to the mean of the largest values of batches of eight rows."""

    name = "moving-average"
    by_histogram = False

    def choose(self, seen: Seen, scheme: Scheme = CPU) -> Range:
        """Return the range of a tensor."""
        return seen.mean_least, seen.mean_most


@dataclass(frozen=True)
class Percentile(RangeMethod):
    """What holds a share of the values, as many left out on either side.

    Attributes:
        share: in percent.

    Raises:
        ConfigError: it is not above 50 and at most 100.
    """

    share: float = 99.99
    name = "percentile"

    def __post_init__(self) -> None:
        if not 50 < self.share <= 100:
            raise ConfigError(f"percentile: got {self.share:g}, expected above 50 and at most 100.")

    def choose(self, seen: Seen, scheme: Scheme = CPU) -> Range:
        """Return the range of a tensor."""
        histogram = _histogram_of(seen)
        below = np.cumsum(histogram.counts) / histogram.counts.sum()
        cut = (100 - self.share) / 200
        low = histogram.edges[int(np.searchsorted(below, cut))]
        high = histogram.edges[min(int(np.searchsorted(below, 1 - cut)), len(below) - 1)]
        return _within(seen, float(low), float(high))

    def __str__(self) -> str:
        return f"{self.name}:{self.share:g}"


@dataclass(frozen=True)
class Entropy(RangeMethod):
    """The threshold that changes the distribution least, by Kullback and Leibler's divergence (Migacz 2017).

    It is sought among symmetric ones, as ONNX Runtime does, from 128 bins on.
    """

    name = "entropy"

    def choose(self, seen: Seen, scheme: Scheme = CPU) -> Range:
        """Return the range of a tensor."""
        histogram = _histogram_of(seen)
        first, half = 64, len(histogram.counts) // 2
        diverged = [_divergence(histogram.counts, half, reach) for reach in range(first, half + 1)]
        reach = first + int(np.argmin(diverged))
        return _within(seen, float(histogram.edges[half - reach]), float(histogram.edges[half + reach + 1]))


@dataclass(frozen=True)
class MeanSquaredError(RangeMethod):
    """The range of least expected squared error: of rounding within it, of clipping outside.

    Values within are taken as even between two levels, but for those at zero, which is a level.
    """

    name = "mse"

    def choose(self, seen: Seen, scheme: Scheme = CPU) -> Range:
        """Return the range of a tensor."""
        histogram = _histogram_of(seen)
        shares = np.arange(_STEPS, 0, -1) / _STEPS  # the widest first: it wins a draw
        if scheme.symmetric:
            highs = max(-seen.least, seen.most, 0.0) * shares
            lows = -highs
            error = _clipped(histogram, lows, highs) + _rounded(histogram, lows, highs)
            best = int(np.argmin(error))
            return _within(seen, float(lows[best]), float(highs[best]))
        lows = min(seen.least, 0.0) * shares if seen.least < 0 else np.zeros(1)
        highs = max(seen.most, 0.0) * shares if seen.most > 0 else np.zeros(1)
        low, high = (each.ravel() for each in np.meshgrid(lows, highs, indexing="ij"))
        best = int(np.argmin(_clipped(histogram, low, high) + _rounded(histogram, low, high)))
        return float(low[best]), float(high[best])


METHODS: Final[dict[str, type[RangeMethod]]] = {
    method.name: method for method in (MinMax, MovingAverage, Percentile, Entropy, MeanSquaredError)
}
"""Methods by name."""


def _histogram_of(seen: Seen) -> Histogram:
    assert seen.histogram is not None, "the method goes by a histogram"
    return seen.histogram


def _within(seen: Seen, low: float, high: float) -> Range:
    return min(max(low, seen.least), seen.most), max(min(high, seen.most), seen.least)


def _divergence(counts: NDArray[np.int64], middle: int, reach: int) -> float:
    """Return how far a distribution that is cut at ``reach`` bins is from the one of 128 levels within."""
    start, end = middle - reach, min(middle + reach + 1, len(counts))
    inside = counts[start:end]
    given = inside.astype(np.float64)
    given[0] += counts[:start].sum()
    given[-1] += counts[end:].sum()
    width = len(inside) // 128
    level = np.minimum(np.arange(len(inside)) // width, 127)
    filled = given != 0
    # As ONNX Runtime does: the bins that the last level has beyond its width count into it and get nothing.
    regular = np.arange(len(inside)) < 128 * width
    totals = np.bincount(level, inside, 128)
    holders = np.bincount(level[regular], filled[regular], 128)
    share = np.floor(np.divide(totals, holders, out=np.zeros(128), where=holders != 0))
    spread = np.where(regular, share[level], 0.0)
    p, q = _smooth(given), _smooth(spread)
    if p is None or q is None:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def _smooth(counts: NDArray[np.float64], least: float = 0.0001) -> NDArray[np.float64] | None:
    """Give empty bins a little, taken evenly off the others; ``None`` where those have too little."""
    empty = counts == 0
    holders = int((~empty).sum())
    if holders == 0:
        return None
    off = least * int(empty.sum()) / holders
    if off >= 1:
        return None
    return np.asarray(counts + least * empty - off * ~empty)


def _clipped(
    histogram: Histogram, lows: NDArray[np.float64], highs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the squared error of what lies outside of ranges, summed over values; ``(ranges,)``."""
    centres, counts = histogram.centres, histogram.counts.astype(np.float64)
    moments = [np.concatenate([[0.0], np.cumsum(counts * centres**power)]) for power in range(3)]
    below = np.searchsorted(centres, lows)
    above = np.searchsorted(centres, highs, side="right")
    under = [moment[below] for moment in moments]
    over = [moment[-1] - moment[above] for moment in moments]
    return np.asarray(
        under[2]
        - 2 * lows * under[1]
        + lows**2 * under[0]
        + over[2]
        - 2 * highs * over[1]
        + highs**2 * over[0]
    )


def _rounded(
    histogram: Histogram, lows: NDArray[np.float64], highs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the squared error of what lies within ranges, summed over values; ``(ranges,)``."""
    counts = histogram.counts.astype(np.float64)
    counts[len(counts) // 2] = 0
    total = np.concatenate([[0.0], np.cumsum(counts)])
    within = total[np.searchsorted(histogram.centres, highs, side="right")]
    within -= total[np.searchsorted(histogram.centres, lows)]
    return np.asarray(within * ((highs - lows) / _LEVELS) ** 2 / 12)


# --- observing ---------------------------------------------------------------------------------------------


class Watch(Protocol):
    """A graph that can be asked what is inside it.

    Each method opens a session with the graph's own input. Its outputs are ``"0"``, ``"1"`` … in the order
    of the names, with a suffix where a tensor has several.
    """

    @property
    def digest(self) -> str:
        """Sha256 of the graph."""

    def extremes(self, names: Sequence[str]) -> AbstractContextManager[Session]:
        """Give the smallest and largest value and how many there are: ``0:least``, ``0:most``, ``0:size``."""

    def values(self, names: Sequence[str]) -> AbstractContextManager[Session]:
        """Give all values of the tensors: ``0``, ``(size,)``."""

    def means(self, names: Sequence[str]) -> AbstractContextManager[Session]:
        """Give the mean of each channel: ``0``, ``(channels,)``."""


def observe(
    watch: Watch,
    rows: NDArray[np.generic],
    names: Sequence[str],
    method: RangeMethod | None = None,
    *,
    scheme: Scheme = CPU,
    what: str,
    cache: HostCache | None = None,
) -> dict[str, Range]:
    """Return the ranges of tensors over calibration rows.

    Args:
        watch: of a float32 graph with one input.
        rows: ``(n, …)`` for that input. A graph of fixed batch gets its batch, the last one filled up.
        names: of float32 tensors.
        method: how; min-max without.
        scheme: what int8 means.
        what: the tower, as messages name it.
        cache: of the graph (its digest in place of a bundle's); what is found there is not computed again.

    Raises:
        CalibrationError: a tensor is NaN or infinite for some rows.
        BackendError: the graph cannot be run.
    """
    method = MinMax() if method is None else method
    entry = _entry(rows, names, method, scheme)
    known = None if cache is None else _read(cache.get(entry), names)
    if known is not None:
        return known
    seen = _extremes(watch, rows, names, what=what)
    if method.by_histogram:
        seen = _with_histograms(watch, rows, names, seen)
    found = {name: method.choose(each[0], scheme) for name, each in zip(names, seen, strict=True)}
    if cache is not None:
        cache.put(entry, json.dumps({"ranges": found}).encode())
    return found


def means(watch: Watch, rows: NDArray[np.generic], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each channel of tensors over rows, ``(channels,)`` by name.

    Args:
        watch: of a graph.
        rows: for its input.
        names: of tensors in it.

    Raises:
        BackendError: the graph cannot be run.
    """
    if not names:
        return {}
    totals: list[NDArray[np.float64]] = []
    count = 0
    with watch.means(names) as session:
        for feeds, size in batches(session, rows):
            got = session.run(feeds)
            each = [got[str(place)].astype(np.float64) * size for place in range(len(names))]
            totals = [a + b for a, b in zip(totals, each, strict=True)] if totals else each
            count += size
    return {name: total / count for name, total in zip(names, totals, strict=True)}


def _extremes(
    watch: Watch, rows: NDArray[np.generic], names: Sequence[str], *, what: str
) -> list[tuple[Seen, int]]:
    """Return what is seen of each tensor without a histogram, and the values it has in a batch."""
    least, most, sizes = [], [], np.zeros(len(names), np.int64)
    with watch.extremes(names) as session:
        for number, (feeds, _) in enumerate(batches(session, rows)):
            got = session.run(feeds)
            low = [float(got[f"{place}:least"]) for place in range(len(names))]
            high = [float(got[f"{place}:most"]) for place in range(len(names))]
            _check_finite(names, low, high, what=what, row=number * _size(session))
            least.append(low)
            most.append(high)
            sizes = np.maximum(sizes, [int(got[f"{place}:size"]) for place in range(len(names))])
    lows, highs = np.array(least), np.array(most)
    return [
        (
            Seen(
                float(lows[:, place].min()),
                float(highs[:, place].max()),
                float(lows[:, place].mean()),
                float(highs[:, place].mean()),
            ),
            int(sizes[place]),
        )
        for place in range(len(names))
    ]


def _with_histograms(
    watch: Watch, rows: NDArray[np.generic], names: Sequence[str], seen: Sequence[tuple[Seen, int]]
) -> list[tuple[Seen, int]]:
    """Return the same with histograms. The graph runs once for as many tensors as may be held at a time."""
    counts = [np.zeros(2 * _HALF + 1, np.int64) for _ in names]
    bounds = [max(abs(each.least), abs(each.most)) or 1.0 for each, _ in seen]
    for chosen in chunks([size for _, size in seen]):
        with watch.values([names[place] for place in chosen]) as session:
            for feeds, _ in batches(session, rows):
                got = session.run(feeds)
                for number, place in enumerate(chosen):
                    counts[place] += _counted(got.pop(str(number)), bounds[place])
    return [
        (Seen(each.least, each.most, each.mean_least, each.mean_most, Histogram(count, bound)), size)
        for (each, size), count, bound in zip(seen, counts, bounds, strict=True)
    ]


def _counted(values: NDArray[Any], bound: float) -> NDArray[np.int64]:
    """Return how many values fall into each bin."""
    bins = 2 * _HALF + 1
    places = (values.ravel() + np.float32(bound)) * np.float32(bins / (2 * bound))
    return np.bincount(np.clip(places, 0, bins - 1).astype(np.int32), minlength=bins)


def chunks(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Give places of tensors, in order, so many at a time that their values fit."""
    chosen: list[int] = []
    held = 0
    for place, size in enumerate(sizes):
        if chosen and held + 4 * size > _MOST_BYTES:
            yield chosen
            chosen, held = [], 0
        chosen.append(place)
        held += 4 * size
    if chosen:
        yield chosen


def _size(session: Session) -> int:
    return fixed_batch(session) or BATCH


def batches(
    session: Session, rows: NDArray[np.generic]
) -> Iterator[tuple[dict[str, NDArray[np.generic]], int]]:
    """Give feeds and how many of the given rows they hold."""
    (name,) = session.inputs
    fixed, size = fixed_batch(session), _size(session)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        count = len(part)
        if fixed is not None and count < size:
            part = np.concatenate([part, np.repeat(part[-1:], size - count, axis=0)])
        yield {name: np.ascontiguousarray(part)}, count


def _check_finite(
    names: Sequence[str], least: Sequence[float], most: Sequence[float], *, what: str, row: int
) -> None:
    wrong = [name for name, *both in zip(names, least, most, strict=True) if not np.isfinite(both).all()]
    if wrong:
        raise CalibrationError(
            f"{what}: {wrong[0]!r} is not finite for the calibration rows from {row} on ({len(wrong)} "
            "tensors are not); its float32 form is broken, or the rows are."
        )


# --- cache -------------------------------------------------------------------------------------------------


def _entry(rows: NDArray[np.generic], names: Sequence[str], method: RangeMethod, scheme: Scheme) -> str:
    """Return the name of a cache entry: rows, tensors and method."""
    said = json.dumps([rows.dtype.name, rows.shape, list(names), method.to_dict(), scheme.symmetric])
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    digest.update(said.encode())
    return f"ranges-{digest.hexdigest()[:32]}.json"


def _read(content: bytes | None, names: Sequence[str]) -> dict[str, Range] | None:
    """Return cached ranges; ``None`` where there are none, or not such as were asked for."""
    try:
        found = {} if content is None else json.loads(content)["ranges"]
        ranges = {name: (float(found[name][0]), float(found[name][1])) for name in names}
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return ranges if np.isfinite(list(ranges.values())).all() else None
