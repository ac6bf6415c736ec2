"""Two forms of one model on the same pictures: what changed, whether chance explains it, and intervals.

Crops of one photograph agree or disagree together, so a picture is no trial of its own there: intervals of
such means resample photographs, not pictures.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import InputError
from edgeclip.runtime.statistics import CONFIDENCE, check_open_interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["ClusteredMean", "Paired", "clustered_mean", "paired"]

_DRAWS = 10_000


@dataclass(frozen=True)
class Paired:
    """Hits of a reference and of another form of it on the same pictures.

    Attributes:
        both_right: pictures both have right.
        right_to_wrong: pictures only the reference has right.
        wrong_to_right: pictures only the other has right.
        both_wrong: pictures neither has right.
    """

    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    both_wrong: int

    @property
    def n(self) -> int:
        """Pictures."""
        return self.both_right + self.right_to_wrong + self.wrong_to_right + self.both_wrong

    @property
    def net_loss(self) -> float:
        """Share of pictures lost, less those gained."""
        return (self.right_to_wrong - self.wrong_to_right) / self.n

    @property
    def p_value(self) -> float:
        """How likely chance alone makes so uneven changes: the exact two-sided test of McNemar (1947).

        Under the hypothesis that losses and gains are equally likely, losses are binomial with 1/2. 1 where
        nothing changed.
        """
        changed = self.right_to_wrong + self.wrong_to_right
        fewer = min(self.right_to_wrong, self.wrong_to_right)
        tail = sum(math.comb(changed, k) for k in range(fewer + 1))
        # Whole numbers until the one division: 2**-changed is no double from 1075 on.
        return min(1.0, (2 * tail) / (1 << changed))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {"n": self.n, **asdict(self), "net_loss": self.net_loss, "mcnemar_p": self.p_value}


def paired(reference: ArrayLike, other: ArrayLike) -> Paired:
    """Count what changed from a reference to another form of it.

    Args:
        reference: ``(N,)`` booleans, whether the reference has each picture right.
        other: ``(N,)`` booleans of the same pictures.

    Raises:
        InputError: shapes disagree, or there is no picture.
    """
    before, after = np.asarray(reference, bool), np.asarray(other, bool)
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise InputError(
            f"paired outcomes: got shapes {before.shape} and {after.shape}, expected (N,) twice, not empty."
        )
    return Paired(
        int((before & after).sum()),
        int((before & ~after).sum()),
        int((~before & after).sum()),
        int((~before & ~after).sum()),
    )


@dataclass(frozen=True)
class ClusteredMean:
    """The mean of ``n`` values in ``clusters`` clusters; ``low`` and ``high`` are its bootstrap interval."""

    value: float
    low: float
    high: float
    n: int
    clusters: int
    confidence: float = CONFIDENCE


def clustered_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable] | NDArray[Any],
    *,
    confidence: float = CONFIDENCE,
    draws: int = _DRAWS,
    seed: int = 0,
) -> ClusteredMean:
    """Return a mean with the percentile bootstrap interval over clusters (Davison & Hinkley 1997, §3.8).

    Every value has the same weight, so that clusters count by their size.

    Args:
        values: ``(N,)`` numbers or booleans.
        clusters: ``(N,)``, what each belongs to, such as its photograph.
        confidence: of the interval.
        draws: resamples.
        seed: of the draws.

    Raises:
        InputError: shapes disagree, a value is not finite, or there are fewer than two clusters.
        ConfigError: ``confidence`` is out of range.
    """
    check_open_interval("confidence", confidence, 1)
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or len(numbers) != len(clusters):
        raise InputError(
            f"clustered mean: got values of shape {numbers.shape} in {len(clusters)} clusters, expected (N,) "
            "and one cluster for each."
        )
    if not np.isfinite(numbers).all():
        raise InputError(f"clustered mean: value {int(np.argmin(np.isfinite(numbers)))} is not finite.")
    places: dict[Hashable, int] = {}
    place = np.array([places.setdefault(each, len(places)) for each in clusters], np.intp)
    if len(places) < 2:
        raise InputError(f"clustered mean: got {len(places)} clusters, expected at least two to resample.")
    sums = np.bincount(place, weights=numbers)
    sizes = np.bincount(place)
    chosen = np.random.default_rng(seed).integers(0, len(places), (draws, len(places)))
    means = sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return ClusteredMean(
        float(numbers.mean()), float(low), float(high), len(numbers), len(places), confidence
    )
