"""Percentiles and medians with intervals that hold for every distribution.

The p-th percentile of n samples is the nearest rank, the ``⌈n·p/100⌉``-th smallest, so always a sample that
occurred; it is given only where at least ten samples lie above it. Its interval is the pair of order
statistics that covers the true quantile with the stated confidence (David & Nagaraja, Order Statistics, 3rd
ed., §7.1).
All of it is for independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from edgeclip.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "CONFIDENCE",
    "SAMPLES_ABOVE",
    "Percentile",
    "bootstrap_medians",
    "check_open_interval",
    "nearest_rank",
    "order_interval",
    "percentile",
]

CONFIDENCE: Final = 0.95
SAMPLES_ABOVE: Final = 10


@dataclass(frozen=True)
class Percentile:
    """A percentile with its interval: ``low`` and ``high`` cover the true one with ``confidence``."""

    p: float
    ms: float
    low_ms: float
    high_ms: float
    confidence: float = CONFIDENCE


def percentile(
    samples: NDArray[np.float64] | Sequence[float], p: float, *, confidence: float = CONFIDENCE
) -> Percentile | None:
    """Return a percentile by nearest rank with a distribution-free interval.

    Args:
        samples: independent samples, in any order.
        p: between 0 and 100, both excluded.
        confidence: of the interval, at least.

    Returns:
        ``None`` where fewer than ten samples lie above it, or below it where ``p`` is under 50.

    Raises:
        ConfigError: ``p`` or ``confidence`` is out of range.
    """
    check_open_interval("p", p, 100)
    check_open_interval("confidence", confidence, 1)
    ordered = np.sort(np.asarray(samples, np.float64))
    n = len(ordered)
    rank = _rank(n, p)
    if n - rank < SAMPLES_ABOVE or (p < 50 and rank - 1 < SAMPLES_ABOVE):
        return None
    low, high = order_interval(n, p / 100, confidence)
    return Percentile(
        p, float(ordered[rank - 1]), float(ordered[low - 1]), float(ordered[high - 1]), confidence
    )


def _rank(n: int, p: float) -> int:
    """Return the rank, from 1, of the p-th percentile."""
    # The small subtraction: 1000 · 99.9 / 100 must be 999 and not 999.0000000000001 rounded up.
    return max(1, math.ceil(n * p / 100 - 1e-9))


def nearest_rank(ordered: NDArray[np.float64], p: float) -> float:
    """Return the p-th percentile of sorted samples, however few they are.

    Raises:
        ConfigError: there is no sample.
    """
    if not len(ordered):
        raise ConfigError("percentile: got no samples, expected at least one.")
    return float(ordered[_rank(len(ordered), p) - 1])


def order_interval(n: int, q: float, confidence: float) -> tuple[int, int]:
    """Return ranks ``low ≤ high``, from 1, with ``P(X_low ≤ quantile ≤ X_high) ≥ confidence``.

    The number of samples below the quantile is binomial(n, q); each tail gets at most half of the rest.
    Where n is too small for that, the smallest and the largest sample are returned.
    """
    tail = (1 - confidence) / 2
    cumulative = np.cumsum(_binomial(n, q))  # cumulative[k] = P(count ≤ k)
    # Misses below: quantile < X_low, that is at most low − 1 samples below it.
    low = int(np.searchsorted(cumulative, tail, side="right"))
    # Misses above: X_high < quantile, that is at least high samples below it.
    high = int(np.searchsorted(cumulative, 1 - tail, side="left")) + 1
    return max(1, low), min(n, high)


def _binomial(n: int, q: float) -> NDArray[np.float64]:
    """Return ``P(count = k)`` for k from 0 to n."""
    lgamma = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    k = np.arange(n + 1)
    log_p: NDArray[np.float64] = (
        lgamma[n] - lgamma - lgamma[::-1] + k * math.log(q) + (n - k) * math.log1p(-q)
    )
    return np.exp(log_p)


def bootstrap_medians(
    samples: NDArray[np.float64], rng: np.random.Generator, draws: int = 2000
) -> NDArray[np.float64]:
    """Return medians of resamples, without drawing the resamples.

    The middle one of n uniform numbers is Beta distributed, and the median of a resample is the sample at
    that place of the sorted ones.
    """
    ordered = np.sort(samples)
    half = (len(ordered) + 1) / 2
    places = rng.beta(half, half, draws) * len(ordered)
    return ordered[places.astype(np.intp)]


def check_open_interval(name: str, value: float, end: float) -> None:
    """Raise ``ConfigError`` unless ``value`` lies between 0 and ``end``, both excluded."""
    if not 0 < value < end:
        raise ConfigError(f"{name}: got {value!r}, expected a number between 0 and {end:g}.")
