"""Metrics as pure functions of arrays, and intervals for them.

They know no models, no labels and no files. Shares are between 0 and 1. Whatever is not finite is an error:
a comparison with NaN would count as a miss in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import InputError
from edgeclip.runtime.statistics import CONFIDENCE, check_open_interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Confusion",
    "Share",
    "auroc",
    "bootstrap_interval",
    "confusions",
    "expected_calibration_error",
    "false_positive_rate",
    "mean_per_class_recall",
    "median_similarity",
    "per_class_recall",
    "recall_at_k",
    "share",
    "top_k",
    "top_k_accuracy",
    "unit_rows",
    "wilson_interval",
]

_SIMILARITY_ROWS = 512  # their 130,816 pairs give a median to three digits


# --- intervals ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """A share of ``n`` trials; ``low`` and ``high`` are its Wilson interval."""

    value: float
    low: float
    high: float
    n: int
    confidence: float = CONFIDENCE


def share(hits: ArrayLike, *, confidence: float = CONFIDENCE) -> Share:
    """Return the share of true values with its interval.

    Args:
        hits: ``(N,)`` booleans, one a trial; trials are independent.
        confidence: of the interval.

    Raises:
        InputError: there are none.
        ConfigError: ``confidence`` is out of range.
    """
    counted = _flat("hits", hits)
    count, n = int(np.count_nonzero(counted)), len(counted)
    low, high = wilson_interval(count, n, confidence=confidence)
    return Share(count / n, low, high, n, confidence)


def wilson_interval(successes: int, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the score interval of a share: good for few trials and near 0 and 1 (Wilson 1927).

    Raises:
        InputError: ``successes`` is not between 0 and ``n``, or ``n`` is 0.
        ConfigError: ``confidence`` is out of range.
    """
    check_open_interval("confidence", confidence, 1)
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"interval of a share: got {successes} of {n}, expected 0 to n of at least one.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, squared = successes / n, z * z
    middle = p + squared / (2 * n)
    half = z * (p * (1 - p) / n + squared / (4 * n * n)) ** 0.5
    scale = 1 + squared / n
    # At the ends rounding may leave the exact 0 or 1, or the share itself, by one unit.
    return max(0.0, min(p, (middle - half) / scale)), min(1.0, max(p, (middle + half) / scale))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float] | None = None,
    *,
    confidence: float = CONFIDENCE,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic (Efron & Tibshirani 1993, §13.3).

    For a difference of two models on the same pictures, give the differences picture by picture.

    Args:
        values: ``(N,)`` numbers, or ``(N, …)`` rows that are drawn whole.
        statistic: of values drawn; the mean if missing.
        confidence: of the interval.
        draws: resamples.
        seed: of the draws.

    Raises:
        InputError: there are no values.
        ConfigError: ``confidence`` is out of range.
    """
    check_open_interval("confidence", confidence, 1)
    rows = np.asarray(values, np.float64)
    if not len(rows):
        raise InputError("bootstrap: got no values, expected at least one.")
    random = np.random.default_rng(seed)
    chosen = np.mean if statistic is None else statistic
    drawn = [float(chosen(rows[random.integers(0, len(rows), len(rows))])) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# --- classification ----------------------------------------------------------------------------------------


def top_k(scores: ArrayLike, k: int) -> NDArray[np.intp]:
    """Return the columns of the ``k`` largest scores of each row, ``(N, min(k, C))``, largest first.

    Equal scores keep the order of the columns, as in ``edgeclip.heads.rank``.

    Raises:
        InputError: a score is not finite, there is no column, or ``k`` is less than 1.
    """
    rows = _matrix("scores", scores)
    if k < 1 or not rows.shape[1]:
        raise InputError(f"top-k: got k {k!r} of {rows.shape[1]} labels, expected at least one of each.")
    return np.argsort(-rows, axis=1, kind="stable")[:, :k]


def top_k_accuracy(scores: ArrayLike, targets: ArrayLike, *, k: int = 1) -> float:
    """Return the share of rows whose target is among the ``k`` largest scores.

    Args:
        scores: ``(N, C)``.
        targets: ``(N,)`` columns.
        k: how many count as a hit; ties as in :func:`top_k`.

    Raises:
        InputError: shapes disagree, a target is no column, or a score is not finite.
    """
    best = top_k(scores, k)
    wanted = _targets(targets, len(best), _matrix("scores", scores).shape[1])
    return share((best == wanted[:, None]).any(axis=1)).value


def per_class_recall(hits: ArrayLike, targets: ArrayLike, *, classes: int) -> NDArray[np.float64]:
    """Return the share of hits of each class, ``(classes,)``; NaN where a class has no row.

    Raises:
        InputError: shapes disagree or a target is out of range.
    """
    counted = _flat("hits", hits).astype(np.float64)
    wanted = _targets(targets, len(counted), classes)
    rows = np.bincount(wanted, minlength=classes)
    recalled = np.bincount(wanted, weights=counted, minlength=classes)
    recalls: NDArray[np.float64] = np.divide(recalled, rows, out=np.full(classes, np.nan), where=rows > 0)
    return recalls


def mean_per_class_recall(hits: ArrayLike, targets: ArrayLike, *, classes: int) -> float:
    """Return the mean over the classes that have rows: rare classes count like frequent ones.

    Raises:
        InputError: as :func:`per_class_recall`.
    """
    return float(np.nanmean(per_class_recall(hits, targets, classes=classes)))


@dataclass(frozen=True, order=True)
class Confusion:
    """``count`` rows of class ``target`` were taken for ``predicted``, of ``of`` rows of that class."""

    target: int
    predicted: int
    count: int
    of: int


def confusions(predicted: ArrayLike, targets: ArrayLike, *, most: int = 10) -> list[Confusion]:
    """Return the most frequent pairs of a class and what it was taken for; of equals the first classes.

    Raises:
        InputError: shapes disagree.
    """
    taken, wanted = _flat("predicted", predicted), _flat("targets", targets)
    if len(taken) != len(wanted):
        raise InputError(f"confusions: got {len(taken)} predictions for {len(wanted)} targets.")
    rows = Counter(wanted.tolist())
    pairs = Counter(
        (target, other)
        for target, other in zip(wanted.tolist(), taken.tolist(), strict=True)
        if target != other
    )
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [Confusion(target, other, count, rows[target]) for (target, other), count in ordered]


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, *, bins: int = 15) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width (Guo et al. 2017, eq. 3).

    Args:
        confidences: ``(N,)`` scores of the predictions, between 0 and 1.
        correct: ``(N,)`` whether each was right.
        bins: how many; a confidence on an edge belongs to the bin below it.

    Raises:
        InputError: shapes disagree, or a confidence is out of range.
    """
    scores, right = _flat("confidences", confidences).astype(np.float64), _flat("correct", correct)
    if len(scores) != len(right):
        raise InputError(f"calibration: got {len(scores)} confidences for {len(right)} outcomes.")
    wrong = ~((scores >= 0) & (scores <= 1 + 1e-6))  # NaN too; a softmax in float32 may round above 1
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"calibration: confidence {row} is {scores[row]}, expected 0 to 1.")
    # 1e-9: an edge such as 3/15 is not exact
    place = np.clip(np.ceil(scores * bins - 1e-9).astype(np.intp) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=scores - right.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(scores))


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Return the area under the ROC curve: how often a positive outscores a negative, ties half.

    Raises:
        InputError: shapes disagree, a score is not finite, or one of the two classes is empty.
    """
    values, wanted = _flat("scores", scores).astype(np.float64), _flat("positive", positive).astype(bool)
    if len(values) != len(wanted):
        raise InputError(f"AUROC: got {len(values)} scores for {len(wanted)} outcomes.")
    _check_finite("scores", values[:, None])
    positives = int(wanted.sum())
    negatives = len(wanted) - positives
    if not positives or not negatives:
        raise InputError(
            f"AUROC: got {positives} positives and {negatives} negatives, expected some of each."
        )
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # mean rank, from 1, of each distinct score
    above = ranks[place][wanted].sum() - positives * (positives + 1) / 2  # Mann & Whitney 1947
    return float(above / (positives * negatives))


def false_positive_rate(scores: ArrayLike, positive: ArrayLike, *, recall: float = 0.95) -> float:
    """Return the share of negatives above the highest threshold that keeps this share of the positives.

    With 0.95 it is the "FPR at 95 % TPR" of Hendrycks & Gimpel 2017 and what followed.

    Raises:
        InputError: as :func:`auroc`.
        ConfigError: ``recall`` is not between 0 and 1.
    """
    check_open_interval("recall", recall, 1)
    auroc(scores, positive)  # the same demands
    values, wanted = np.asarray(scores, np.float64), np.asarray(positive, bool)
    kept = np.sort(values[wanted])[::-1]
    # 1e-9: 0.95 of 20 are 19.000000000000004
    threshold = kept[max(0, int(np.ceil(recall * len(kept) - 1e-9)) - 1)]
    return float(np.mean(values[~wanted] >= threshold))


# --- embeddings --------------------------------------------------------------------------------------------


def recall_at_k(similarity: ArrayLike, relevant: ArrayLike, *, k: int = 1) -> float:
    """Return the share of queries that have something relevant among their ``k`` most similar.

    Args:
        similarity: ``(Q, G)`` of queries and gallery.
        relevant: ``(Q, G)`` booleans.
        k: how many are looked at; ties as in :func:`top_k`.

    Raises:
        InputError: shapes disagree, a similarity is not finite, or a query has nothing relevant.
    """
    best = top_k(similarity, k)
    wanted = np.asarray(relevant, bool)
    if wanted.shape != np.shape(similarity):
        raise InputError(f"recall: 'relevant' has shape {wanted.shape}, expected {np.shape(similarity)}.")
    empty = ~wanted.any(axis=1)
    if empty.any():
        raise InputError(f"recall: query {int(np.argmax(empty))} has nothing relevant; leave it out.")
    return share(np.take_along_axis(wanted, best, axis=1).any(axis=1)).value


def median_similarity(embeddings: ArrayLike) -> float:
    """Return the median cosine of two rows: near 1, all inputs look alike and cosines prove nothing.

    Of more than 512 rows, 512 at equal distances are taken.

    Raises:
        InputError: there are fewer than two rows, or a row is zero or not finite.
    """
    rows = unit_rows("embeddings", embeddings)
    if len(rows) < 2:
        raise InputError(f"similarity: got {len(rows)} rows, expected at least two.")
    if len(rows) > _SIMILARITY_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, _SIMILARITY_ROWS).astype(np.intp)]
    return float(np.median((rows @ rows.T)[np.triu_indices(len(rows), 1)]))


def unit_rows(name: str, embeddings: ArrayLike) -> NDArray[np.floating[Any]]:
    """Return the rows ``(N, E)`` scaled to unit length, float64 if they are that and float32 if not.

    Raises:
        InputError: a row is zero or not finite; the message calls the array ``name``.
    """
    rows = _matrix(name, embeddings)
    rows = rows if rows.dtype == np.float64 else rows.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise InputError(f"{name}: row {int(np.argmin(norms))} is zero and has no direction.")
    unit: NDArray[np.floating[Any]] = rows / norms
    return unit


# --- checks ------------------------------------------------------------------------------------------------


def _matrix(name: str, values: ArrayLike) -> NDArray[Any]:
    rows = np.asarray(values)
    if rows.ndim != 2:
        raise InputError(f"{name}: got shape {rows.shape}, expected two dimensions.")
    _check_finite(name, rows)
    return rows


def _check_finite(name: str, rows: NDArray[Any]) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise InputError(f"{name}: row {int(np.argmin(finite))} is not finite.")


def _flat(name: str, values: ArrayLike) -> NDArray[Any]:
    flat = np.asarray(values)
    if flat.ndim != 1 or not len(flat):
        raise InputError(f"{name}: got shape {flat.shape}, expected one dimension with at least one entry.")
    return flat


def _targets(targets: ArrayLike, rows: int, classes: int) -> NDArray[np.intp]:
    wanted = _flat("targets", targets)
    if wanted.dtype.kind not in "iu" or len(wanted) != rows:
        raise InputError(f"targets: got {len(wanted)} of type {wanted.dtype}, expected {rows} whole numbers.")
    outside = (wanted < 0) | (wanted >= classes)
    if outside.any():
        row = int(np.argmax(outside))
        raise InputError(f"targets: entry {row} is {wanted[row]}, expected 0 to {classes - 1}.")
    return wanted.astype(np.intp)
