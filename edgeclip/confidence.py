"""How sure may a bundle say it is? A temperature for a label bank, fitted on pictures that are labelled.

A score is the softmax of ``scale · cosine`` over all labels offered; ``1 / scale`` is the temperature. Which
label comes first does not depend on it, only what the scores mean: fitted, pictures with a score of 80 % are
right about eight times in ten (Guo et al. 2017, §4.2). What is said about a fit is measured on pictures that
it has not seen: each fold is scored at the scale of the others.

(The other calibration, of the ranges of int8, is :mod:`edgeclip.calibration`.)

    >>> fit = fit_temperature(similarity, targets)                                         # doctest: +SKIP
    >>> fit.scale, fit.before.error, fit.after.error
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.metrics import bootstrap_interval, expected_calibration_error
from edgeclip.heads import MAX_SCALE
from edgeclip.runtime.statistics import CONFIDENCE

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["LEAST_PICTURES", "Reliability", "TemperatureFit", "fit_scale", "fit_temperature", "reliability"]

LEAST_PICTURES: Final = 50
"""Fewer say too little: with 50 the calibration error itself is uncertain by about ten points."""
FOLDS: Final = 5
_LEAST_SCALE: Final = 1e-3
_STEPS: Final = 100


@dataclass(frozen=True)
class Reliability:
    """How far scores are from being right as often as they say.

    Attributes:
        error: expected calibration error (15 bins of equal width) of the first label's score.
        low: of its 95 % interval, bootstrap over pictures.
        high: of its 95 % interval.
        nll: mean negative logarithm of the right label's score.
        score: mean score of the first label.
        accuracy: share of pictures whose right label comes first.
        n: pictures.
    """

    error: float
    low: float
    high: float
    nll: float
    score: float
    accuracy: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class TemperatureFit:
    """A scale for a label bank, and what it is worth.

    Attributes:
        scale: fitted on all pictures.
        scale_before: what scores were made with.
        before: scores at ``scale_before``.
        after: scores of each fold at the scale fitted on the others.
        fold_scales: those scales; they tell how certain ``scale`` is.
        labels: different right labels among the pictures.
        seed: of the folds.
    """

    scale: float
    scale_before: float
    before: Reliability
    after: Reliability
    fold_scales: tuple[float, ...]
    labels: int
    seed: int

    @property
    def temperature(self) -> float:
        """What logits are divided by: one over the scale."""
        return 1 / self.scale

    @property
    def improves(self) -> bool:
        """Whether held-out pictures are more likely at the new scale."""
        return self.after.nll < self.before.nll

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "scale": self.scale,
            "temperature": self.temperature,
            "scale_before": self.scale_before,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "fold_scales": list(self.fold_scales),
            "labels": self.labels,
            "seed": self.seed,
            "improves": self.improves,
        }


def fit_temperature(
    similarity: ArrayLike,
    targets: ArrayLike,
    *,
    scale_before: float,
    folds: int = FOLDS,
    seed: int = 0,
) -> TemperatureFit:
    """Fit the scale of a label bank, and measure it on pictures it was not fitted on.

    Args:
        similarity: ``(N, C)`` cosines of pictures and all labels of the bank.
        targets: ``(N,)`` columns of the right labels.
        scale_before: the scale in force.
        folds: parts that the pictures are divided into; each is scored at the scale of the others.
        seed: of the division.

    Raises:
        InputError: shapes disagree, a cosine is not finite, there are fewer than 50 pictures, all have one
            label, or right labels are no more similar than others.
        ConfigError: fewer than two folds, or more than pictures.
    """
    cosines, wanted = _checked(similarity, targets)
    count, labels = len(wanted), len(np.unique(wanted))
    if count < LEAST_PICTURES:
        raise InputError(
            f"temperature: got {count} labelled pictures, expected at least {LEAST_PICTURES}; give more."
        )
    if labels < 2:
        raise InputError(
            f"temperature: all {count} pictures have one label, expected at least two different ones: how "
            "often a score is right is not to be seen from one."
        )
    if not 2 <= folds <= count:
        raise ConfigError(f"folds: got {folds}, expected 2 to {count}, the number of pictures.")
    place = np.empty(count, np.intp)
    place[np.random.default_rng(seed).permutation(count)] = np.arange(count) % folds
    scales = [fit_scale(cosines[place != fold], wanted[place != fold]) for fold in range(folds)]
    return TemperatureFit(
        scale=fit_scale(cosines, wanted),
        scale_before=scale_before,
        before=reliability(cosines, wanted, np.full(count, scale_before)),
        after=reliability(cosines, wanted, np.array(scales)[place]),
        fold_scales=tuple(scales),
        labels=labels,
        seed=seed,
    )


def fit_scale(similarity: ArrayLike, targets: ArrayLike) -> float:
    """Return the scale, at most 100, at which the right labels are most likely.

    The mean negative log likelihood is convex in the scale, and its derivative is the mean over pictures of
    the expected cosine less the right one. Its root is bracketed and found by Newton's steps, halving
    the bracket wherever a step would leave it (Press et al. 2007, §9.4).

    Args:
        similarity: ``(N, C)`` cosines.
        targets: ``(N,)`` columns of the right labels.

    Raises:
        InputError: shapes disagree, a cosine is not finite, or right labels are no more similar than others.
    """
    cosines, wanted = _checked(similarity, targets)
    low, high = _LEAST_SCALE, MAX_SCALE
    if _slope(cosines, wanted, low)[0] >= 0:
        right = float(cosines[np.arange(len(wanted)), wanted].mean())
        raise InputError(
            f"temperature: right labels have a mean cosine of {right:.4f} and all labels "
            f"{cosines.mean():.4f}, expected more for the right ones: labels and pictures do not belong "
            "together."
        )
    if _slope(cosines, wanted, high)[0] <= 0:
        return high
    scale = float(np.sqrt(low * high))
    for _ in range(_STEPS):
        slope, curvature = _slope(cosines, wanted, scale)
        low, high = (scale, high) if slope < 0 else (low, scale)
        step = scale - slope / curvature if curvature > 0 else np.inf
        following = step if low < step < high else (low + high) / 2
        if abs(following - scale) <= 1e-12 * scale:
            return float(following)
        scale = float(following)
    return scale


def reliability(similarity: ArrayLike, targets: ArrayLike, scales: ArrayLike) -> Reliability:
    """Return how reliable scores are.

    Args:
        similarity: ``(N, C)`` cosines.
        targets: ``(N,)`` columns of the right labels.
        scales: ``(N,)``, the scale of each picture.

    Raises:
        InputError: shapes disagree, or a cosine is not finite.
    """
    cosines, wanted = _checked(similarity, targets)
    scores = _softmax(np.asarray(scales, np.float64)[:, None] * cosines)
    rows = np.arange(len(wanted))
    first = cosines.argmax(axis=1)
    confidence, correct = scores[rows, first], first == wanted
    pairs = np.column_stack([confidence, correct])
    low, high = bootstrap_interval(pairs, _error_of, confidence=CONFIDENCE)
    likelihood = np.maximum(scores[rows, wanted], np.finfo(np.float64).tiny)
    return Reliability(
        _error_of(pairs),
        low,
        high,
        float(-np.log(likelihood).mean()),
        float(confidence.mean()),
        float(correct.mean()),
        len(wanted),
    )


def _error_of(pairs: NDArray[np.float64]) -> float:
    return expected_calibration_error(pairs[:, 0], pairs[:, 1])


def _slope(cosines: NDArray[np.float64], wanted: NDArray[np.intp], scale: float) -> tuple[float, float]:
    """Return first and second derivative of the mean negative log likelihood."""
    scores = _softmax(scale * cosines)
    expected = (scores * cosines).sum(axis=1)
    right = cosines[np.arange(len(wanted)), wanted]
    spread = (scores * (cosines - expected[:, None]) ** 2).sum(axis=1)
    return float((expected - right).mean()), float(spread.mean())


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    normalized: NDArray[np.float64] = scores / scores.sum(axis=1, keepdims=True)
    return normalized


def _checked(similarity: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    cosines, wanted = np.asarray(similarity, np.float64), np.asarray(targets)
    if cosines.ndim != 2 or wanted.shape != cosines.shape[:1] or not cosines.size:
        raise InputError(
            f"temperature: got cosines of shape {cosines.shape} and targets of {wanted.shape}, expected "
            "(N, C) and (N,)."
        )
    if wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= cosines.shape[1]:
        raise InputError(
            f"temperature: targets of {wanted.dtype} are not all columns 0 to {cosines.shape[1] - 1}."
        )
    finite = np.isfinite(cosines).all(axis=1)
    if not finite.all():
        raise InputError(f"temperature: cosines of picture {int(np.argmin(finite))} are not finite.")
    return cosines, wanted.astype(np.intp)
