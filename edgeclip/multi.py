"""Several labels a picture: which of a bank's labels fit, each judged by itself.

The score of a label is its cosine, standardised over the bank's labels for each picture: how many standard
deviations it stands above the labels that do not fit. Pictures differ in how high all their cosines are, and
this takes it off; the threshold belongs to the bank that it was fitted on. In a bundle it is a head of kind
``reject`` bound to the bank, with metadata ``method`` = ``standardized`` and one float tensor ``threshold``.

    >>> fit = fit_multi(cosines, truth)                                                    # doctest: +SKIP
    >>> fit.threshold, fit.f1, fit.first_alone
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .errors import BundleError, ConfigError, InputError
from .tensors import read_tensors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from .bundle import Bundle

__all__ = ["METHOD", "MultiFit", "StandardizedGate", "fit_multi", "multi_gate", "standardized"]

METHOD: Final = "standardized"
LEAST_LABELS: Final = 4
"""With fewer, mean and deviation are of the labels that fit rather than of those that do not."""
LEAST_PICTURES: Final = 50
FOLDS: Final = 5
_DRAWS: Final = 1000


@dataclass(frozen=True, eq=False)
class StandardizedGate:
    """Judges each label of a bank by itself; see the module docstring.

    Attributes:
        rows: ``(0, E)``: it needs none beside the labels'.
        threshold: least score of the best label, and of any label by itself.
    """

    rows: NDArray[np.float32]
    threshold: float
    method: str = METHOD

    @property
    def threshold_alone(self) -> float:
        """Least score of a label by itself."""
        return self.threshold

    def scores(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the score of the best label of each picture, ``(B,)``."""
        best: NDArray[np.float64] = self.alone(own, others).max(axis=1)
        return best

    def alone(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the scores ``(B, N)`` of labels with cosines ``own`` ``(B, N)``."""
        return standardized(own)


@dataclass(frozen=True)
class MultiFit:
    """A threshold for a bank, and what it is worth.

    Attributes:
        threshold: with the best F1 on all pictures, in standard deviations.
        f1: micro F1 of each fold at the threshold of the others; ``low`` and ``high`` are the ends of its
            95 % interval, over pictures.
        first_alone: the same of giving each picture its first label and no other.
        fold_thresholds: they tell how certain ``threshold`` is.
        precision: share of given labels that are right.
        recall: share of right labels that are given.
        pictures: how many.
        labels_a_picture: mean number of right ones.
        improves: whether the interval of the difference to ``first_alone`` is above zero.
    """

    threshold: float
    f1: dict[str, float]
    first_alone: dict[str, float]
    fold_thresholds: tuple[float, ...]
    precision: float
    recall: float
    pictures: int
    labels_a_picture: float
    improves: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "fold_thresholds": list(self.fold_thresholds)}


def standardized(cosines: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return cosines ``(B, N)`` less their mean over labels, over their standard deviation."""
    values = np.asarray(cosines, np.float64)
    centred = values - values.mean(axis=1, keepdims=True)
    spread = np.sqrt((centred * centred).mean(axis=1, keepdims=True))
    result: NDArray[np.float64] = centred / np.where(spread > 0, spread, 1.0)
    return result


def fit_multi(cosines: ArrayLike, truth: ArrayLike, *, folds: int = FOLDS, seed: int = 0) -> MultiFit:
    """Fit the threshold of a bank, and measure it on pictures it was not fitted on.

    Args:
        cosines: ``(P, N)`` of pictures and all labels of the bank.
        truth: ``(P, N)`` bool: which labels are right.
        folds: parts that the pictures are divided into; each is judged at the threshold of the others.
        seed: of the division and of the intervals.

    Raises:
        InputError: shapes disagree, a cosine is not finite, or there are fewer than 50 pictures, 4 labels or
            two right labels on any picture.
        ConfigError: fewer than two folds, or more than pictures.
    """
    values, right = np.asarray(cosines, np.float64), np.asarray(truth)
    if values.ndim != 2 or right.shape != values.shape or right.dtype != np.bool_:
        raise InputError(
            f"several labels: got cosines {values.shape} and truth {right.dtype} {right.shape}, expected "
            "(P, N) both, truth bool."
        )
    pictures, labels = values.shape
    if pictures < LEAST_PICTURES or labels < LEAST_LABELS:
        raise InputError(
            f"several labels: got {pictures} pictures and {labels} labels, expected at least "
            f"{LEAST_PICTURES} and {LEAST_LABELS}; give more."
        )
    if not np.isfinite(values).all():
        raise InputError("several labels: the cosines are not all finite numbers.")
    if not (right.sum(axis=1) > 1).any():
        raise InputError(
            "several labels: no picture has two right labels, so there is nothing to learn from; separate "
            "the labels of a picture by '|', as in 'cat|dog'."
        )
    if not 2 <= folds <= pictures:
        raise ConfigError(f"folds: got {folds}, expected 2 to {pictures}, the number of pictures.")
    scores = standardized(values)
    place = np.empty(pictures, np.intp)
    random = np.random.default_rng(seed)
    place[random.permutation(pictures)] = np.arange(pictures) % folds
    thresholds = [_best_threshold(scores[place != fold], right[place != fold]) for fold in range(folds)]
    given = scores >= np.array(thresholds)[place][:, None]
    first = np.zeros_like(right)
    first[np.arange(pictures), values.argmax(axis=1)] = True
    counts = np.stack([_counts(given, right), _counts(first, right)])  # (2, P, 3)
    # One draw at a time: all at once are a gigabyte for 30,000 pictures.
    drawn = [counts[:, random.integers(pictures, size=pictures)].sum(axis=1) for _ in range(_DRAWS)]
    ours, alone = _f1(np.stack(drawn, axis=1))
    low, _ = np.quantile(ours - alone, (0.025, 0.975))
    hits, said, wanted = counts[0].sum(axis=0)
    return MultiFit(
        threshold=_best_threshold(scores, right),
        f1=_figure(counts[0], ours),
        first_alone=_figure(counts[1], alone),
        fold_thresholds=tuple(thresholds),
        precision=float(hits / max(said, 1)),
        recall=float(hits / max(wanted, 1)),
        pictures=pictures,
        labels_a_picture=float(right.sum(axis=1).mean()),
        improves=bool(low > 0),
    )


def multi_gate(bundle: Bundle, bank: str | None, threshold: float | None = None) -> StandardizedGate | None:
    """Return the gate fitted on the label bank ``bank``, if the bundle has one.

    Raises:
        BundleError: its file is damaged.
    """
    for name, entry in bundle.manifest.heads.items():
        if entry.kind != "reject" or bank is None or entry.bank != bank:
            continue
        where = f"{bundle.where}: head {name!r}"
        tensors, metadata = read_tensors(bundle.read(entry.file), where=where)
        stored: NDArray[Any] | None = tensors.get("threshold")
        if metadata.get("method") != METHOD:
            continue
        if stored is None or stored.size != 1 or stored.dtype.kind != "f":
            raise BundleError(f"{where}: expected one float tensor 'threshold', got {sorted(tensors)}.")
        least = float(stored.reshape(())) if threshold is None else threshold
        if not math.isfinite(least):
            raise BundleError(f"{where}: its threshold is {least!r}, expected a number; fit it again.")
        return StandardizedGate(np.empty((0, bundle.manifest.model.embed_dim), np.float32), least)
    return None


def _best_threshold(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Return the score with the best micro F1, in the middle between two that occur."""
    order = np.argsort(-scores, axis=None, kind="stable")
    ranked = scores.ravel()[order]
    hits = np.cumsum(right.ravel()[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + right.sum())
    # Equal scores fall on one side of any threshold: only the last of them is a place to cut.
    ends = np.append(ranked[1:] < ranked[:-1], True)
    best = int(np.where(ends, f1, -1.0).argmax())
    return float(ranked[best] if best + 1 == len(ranked) else (ranked[best] + ranked[best + 1]) / 2)


def _counts(given: NDArray[np.bool_], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each picture labels that are given and right, given, and right: ``(P, 3)``."""
    return np.stack([(given & right).sum(axis=1), given.sum(axis=1), right.sum(axis=1)], axis=1)


def _f1(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the micro F1 of summed counts ``(…, 3)``."""
    result: NDArray[np.float64] = 2 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1)
    return result


def _figure(counts: NDArray[np.int64], drawn: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(_f1(counts.sum(axis=0))), "low": float(low), "high": float(high)}
