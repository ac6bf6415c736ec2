"""Fit and judge "none of these": pictures with their right name among those offered, and without it.

A *draw* offers N names to each picture, drawn from all names but its own; once as they are, once with its
own name in the place of the last. Both share all other names, so that only the right name tells them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgeclip.errors import InputError
from edgeclip.heads import cosines
from edgeclip.reject import KIND_COUNTS, RejectHead, meaning

from .metrics import auroc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.labels import LabelBank

__all__ = [
    "Rates",
    "RejectFit",
    "Shown",
    "draw_sets",
    "fit_no",
    "fit_reject",
    "inside_and_outside",
    "rates_at",
]

COUNTS = (1, 2, 5, 10, 20, 50, 100)
"""Names offered, for which thresholds are fitted."""
_JUDGED = (5, 20)
_MANY = (20, 50)
"""Names offered, for which it matters what is near to the first."""
_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
_OVERLAPS = (0.5, 0.6, 0.7, 0.8)
_NEARNESS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_LEAST_GAIN = 0.001
"""Area that nearness must gain; less is noise."""
LEAST_PICTURES, LEAST_NAMES = 50, 6
_DRAWS = 20
_SCORED = 3000
"""Pictures times draws that are certain enough: fewer draws of more pictures."""
_MOST_PICTURES = 2000
"""More are drawn from."""
_FOLDS = 5

Score: TypeAlias = "Callable[[NDArray[np.intp]], NDArray[np.float64]]"


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures with their names, and a background.

    Attributes:
        cosines: ``(P, N)`` of pictures and names.
        own: ``(P,)`` column of each picture's name.
        others: ``(P, M)`` cosines of pictures and background rows.
        same: ``(N, M)`` which background rows mean which name.
        scale: multiplier of the cosines.
        texts: ``(N, M)`` cosines of names and background rows; none where no score asks for them.
        near: ``(N, M)`` rows that are left out as if nobody had thought of what a picture shows; ``same``
            if not given.
        kinds: ``(N, M)`` which background rows are kinds of which name and do not mean it; none if not given.
    """

    cosines: NDArray[np.float32]
    own: NDArray[np.intp]
    others: NDArray[np.float32]
    same: NDArray[np.bool_]
    scale: float
    texts: NDArray[np.float32] | None = None
    near: NDArray[np.bool_] | None = None
    kinds: NDArray[np.bool_] | None = None

    def lifted(self, sets: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the cosines ``(P, n)`` with the names ``sets`` ``(P, n)`` or their kinds."""
        own = np.take_along_axis(self.cosines, sets, axis=1)
        if self.kinds is not None:
            for place in range(sets.shape[1]):
                kinds = self.kinds[sets[:, place]]
                rows = np.flatnonzero(kinds.any(axis=1))
                found = np.where(kinds[rows], self.others[rows], -1).max(axis=1)
                own[rows, place] = np.maximum(own[rows, place], found)
        return own

    def best(self, sets: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the greatest cosine ``(P,)`` with the names ``sets`` ``(P, n)`` and their kinds."""
        return np.asarray(self.lifted(sets).max(axis=1), np.float64)

    def counted(self, sets: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return how many names ``(P,)`` count where the threshold is chosen: kinds count a little."""
        counts = np.full(len(sets), float(sets.shape[1]))
        if self.kinds is None:
            return counts
        counts += KIND_COUNTS * self.kinds.sum(axis=1)[sets].sum(axis=1)
        return counts

    def softmax(self, sets: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the greatest softmax over the names offered: the plain maximum score."""
        logits = self.scale * np.take_along_axis(self.cosines, sets, axis=1).astype(np.float64)
        score: NDArray[np.float64] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        return score

    def background(
        self, sets: NDArray[np.intp], near: NDArray[np.float64] | None = None, *, unnamed: bool = False
    ) -> NDArray[np.float64]:
        """Return ``log Σ exp(scale · (others + near · texts))`` ``(P,)``, the texts being the first name's.

        The sum is over the rows that mean none of the names offered and are no kinds of them.

        Args:
            sets: ``(P, n)`` names offered.
            near: ``(P,)`` how much rows near to the first name count; not at all if not given.
            unnamed: also without the rows that mean what the picture shows, as if nobody had thought of it.
        """
        kept = np.ones(self.others.shape, np.bool_)
        for place in range(sets.shape[1]):
            kept &= ~self.same[sets[:, place]]
            if self.kinds is not None:
                kept &= ~self.kinds[sets[:, place]]
        if unnamed:
            kept &= ~(self.same if self.near is None else self.near)[self.own]
        others = self.others
        if near is not None and self.texts is not None:
            first = np.take_along_axis(sets, self.lifted(sets).argmax(axis=1)[:, None], axis=1)[:, 0]
            others = others + near.astype(np.float32)[:, None] * self.texts[first]
        sums = (np.exp(self.scale * others, dtype=np.float64) * kept).sum(axis=1)
        result: NDArray[np.float64] = np.log(np.maximum(sums, 1e-12))
        return result

    def against_denials(self, sets: NDArray[np.intp]) -> NDArray[np.float64]:
        """Return the score of a ``NoGate``, where the rows of ``others`` are the denied names."""
        own = np.take_along_axis(self.cosines, sets, axis=1)
        first = np.take_along_axis(sets, own.argmax(axis=1)[:, None], axis=1)
        denied = np.take_along_axis(self.others, first, axis=1)[:, 0]
        return np.asarray(self.scale * (own.max(axis=1).astype(np.float64) - denied))

    def negatives(self, weight: float) -> Score:
        """Return the score of the best name by itself, as a function of the names offered."""
        return lambda sets: self.scale * self.best(sets) - weight * self.background(sets)

    def together(
        self, weight: float, nearness: float, *, most: int = COUNTS[-1], unnamed: bool = False
    ) -> Score:
        """Return the score of all names, as a function of the names offered.

        Args:
            weight: of the background.
            nearness: how much rows near to the first name count, for each e-fold of names.
            most: names above which they count no more.
            unnamed: with a background that lacks what the pictures show.
        """

        def score(sets: NDArray[np.intp]) -> NDArray[np.float64]:
            own = np.exp(self.scale * self.lifted(sets), dtype=np.float64).sum(axis=1)
            near = nearness * np.log(np.minimum(self.counted(sets), most)) if nearness else None
            return np.asarray(np.log(own) - weight * self.background(sets, near, unnamed=unnamed))

        return score


@dataclass(frozen=True)
class Rates:
    """What becomes of pictures at a threshold, in shares.

    Attributes:
        offered: names offered.
        threshold: mean over folds, where it differs between them.
        true_accepts: of pictures whose name is offered.
        false_accepts: of pictures whose name is not.
    """

    offered: int
    threshold: float
    true_accepts: float
    false_accepts: float


@dataclass(frozen=True)
class RejectFit:
    """A fitted ``reject`` head and what it is worth.

    Attributes:
        method: of the head.
        scale: multiplier of the cosines.
        weight: of the background (``negatives``).
        overlap: text-text cosine above which a background row means a label (``negatives``).
        threshold: of the best label by itself, for each number of labels in ``offered``.
        together: of all labels together (``negatives``).
        nearness: how much background rows near to the first label count (``negatives``).
        offered: numbers of labels.
        false_accepts: the share it was fitted for.
        auroc: by names offered: of the gate, of the greatest cosine, of the greatest softmax.
        rates: on names that the threshold was not fitted on, by names offered.
        pictures: how many.
        names: how many.
    """

    method: str
    scale: float
    weight: float
    overlap: float
    threshold: tuple[float, ...]
    together: tuple[float, ...]
    nearness: float
    offered: tuple[int, ...]
    false_accepts: float
    auroc: dict[str, dict[str, float]]
    rates: tuple[Rates, ...]
    pictures: int
    names: int

    @property
    def improves(self) -> bool:
        """Whether the gate tells pictures apart better than the greatest softmax does."""
        return all(each["gate"] > each["softmax"] for each in self.auroc.values())

    def head(self, templates: tuple[str, ...] = ()) -> RejectHead:
        """Return the head, without rows of its own; ``templates`` deny labels (``no``)."""
        return RejectHead(
            self.method,
            self.scale,
            self.threshold,
            self.offered,
            self.weight,
            self.overlap,
            templates,
            together=self.together,
            nearness=self.nearness,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def draw_sets(
    own: NDArray[np.intp], names: int, offered: int, draws: int, seed: int = 0
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yield, draw by draw, the names offered to each picture: ``(P, offered)`` with its own, and without.

    Raises:
        InputError: there are not enough names.
    """
    if not 1 <= offered < names:
        raise InputError(f"rejection: got {offered} of {names} names, expected 1 to {names - 1}.")
    random = np.random.default_rng(seed)
    rows = np.arange(len(own))
    for _ in range(draws):
        keys = random.random((len(own), names))
        keys[rows, own] = 2.0  # never among the others
        least = np.argpartition(keys, offered - 1, axis=1)[:, :offered]
        order = np.take_along_axis(keys, least, axis=1).argsort(axis=1)
        without = np.take_along_axis(least, order, axis=1)
        having = without.copy()
        having[:, -1] = own
        yield having, without


def inside_and_outside(
    score: Score,
    own: NDArray[np.intp],
    names: int,
    offered: int,
    *,
    draws: int | None = None,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scores ``(draws, P)`` of pictures with their name offered, and without it.

    Args:
        score: of the names offered ``(P, offered)``, for each picture.
        own: ``(P,)`` column of each picture's name.
        names: how many there are.
        offered: to each picture.
        draws: sets of names a picture; twenty if not given, fewer for many pictures.
        seed: of these.
    """
    if draws is None:
        draws = _draws_of(len(own))
    pairs = [
        (score(having), score(without)) for having, without in draw_sets(own, names, offered, draws, seed)
    ]
    return np.stack([first for first, _ in pairs]), np.stack([second for _, second in pairs])


def rates_at(
    inside: NDArray[np.float64], outside: NDArray[np.float64], threshold: float, offered: int
) -> Rates:
    """Return the shares of ``(draws, P)`` scores that a threshold accepts."""
    return Rates(
        offered, threshold, float((inside >= threshold).mean()), float((outside >= threshold).mean())
    )


def fit_reject(
    labels: LabelBank,
    background: LabelBank,
    images: NDArray[np.float32],
    own: NDArray[np.intp],
    *,
    scale: float,
    false_accepts: float = 0.05,
    seed: int = 0,
) -> RejectFit:
    """Fit weight, overlap and threshold of a gate with negatives.

    Weight and overlap are those with the best area under the ROC curve of the best name, over 5 and 20 names
    offered, and over a background that holds what the pictures show and one that does not: a camera sees
    both. Nearness then is that with the best area of all names together, over 20 and 50, and none where it
    gains less than a tenth of a point or loses with either background. The thresholds accept
    ``false_accepts`` of the pictures whose name is not among those offered.

    Args:
        labels: the names.
        background: general names, encoded.
        images: ``(P, E)`` unit embeddings.
        own: ``(P,)`` row of each picture's name.
        scale: multiplier of the cosines.
        false_accepts: share that may be accepted wrongly, between 0 and 1.
        seed: of draws and folds.

    Raises:
        InputError: fewer than 50 pictures, or 6 names that they show, or a share that is none.
    """
    judged = _checked(own, len(labels), false_accepts)
    if len(images) > _MOST_PICTURES:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:_MOST_PICTURES])
        images, own = images[chosen], own[chosen]
    products = np.asarray(images @ labels.embeddings.T), np.asarray(images @ background.embeddings.T)
    near = meaning(labels, background, min(_OVERLAPS))  # the same whatever overlap is tried
    texts = cosines(labels.embeddings, background.embeddings)
    found: list[tuple[float, float, float, Shown]] = []
    for overlap in _OVERLAPS:
        same = meaning(labels, background, overlap)
        shown = Shown(products[0], own, products[1], same, scale, texts, near)
        found += [(area, weight, overlap, shown) for weight, area in _areas_by_weight(shown, judged, seed)]
    _, weight, overlap, shown = max(found, key=lambda each: each[0])
    many = [count for count in _MANY if count < len(labels)] or judged
    areas = np.array(
        [
            [
                _mean_area(shown, shown.together(weight, nearness, unnamed=unnamed), many, seed)
                for unnamed in (False, True)
            ]
            for nearness in _NEARNESS
        ]
    )
    gains = np.where((areas >= areas[0]).all(axis=1), (areas - areas[0]).mean(axis=1), 0.0)
    nearness = _NEARNESS[int(gains.argmax())] if gains.max() >= _LEAST_GAIN else 0.0
    alone, together = shown.negatives(weight), shown.together(weight, nearness)
    fit = _fitted("negatives", shown, together, false_accepts, seed)
    least = tuple(
        _least(inside_and_outside(alone, own, len(labels), count, seed=seed + 1)[1], false_accepts)
        for count in fit.offered
    )
    return replace(
        fit, weight=weight, overlap=overlap, nearness=nearness, threshold=least, together=fit.threshold
    )


def fit_no(
    labels: LabelBank,
    denials: NDArray[np.float32],
    images: NDArray[np.float32],
    own: NDArray[np.intp],
    *,
    scale: float,
    false_accepts: float = 0.05,
    seed: int = 0,
) -> RejectFit:
    """Fit the threshold of a gate that compares labels with their denials, as :func:`fit_reject` does.

    Args:
        labels: the names.
        denials: ``(N, E)`` unit embeddings of the denied names.
        images: ``(P, E)`` unit embeddings.
        own: ``(P,)`` row of each picture's name.
        scale: multiplier of the cosines.
        false_accepts: share that may be accepted wrongly, between 0 and 1.
        seed: of draws and folds.

    Raises:
        InputError: fewer than 50 pictures, or 6 names that they show, or a share that is none.
    """
    _checked(own, len(labels), false_accepts)
    cosines, others = np.asarray(images @ labels.embeddings.T), np.asarray(images @ denials.T)
    shown = Shown(cosines, own, others, np.eye(len(labels), dtype=np.bool_), scale)
    return _fitted("no", shown, shown.against_denials, false_accepts, seed)


def _draws_of(pictures: int) -> int:
    return min(_DRAWS, max(3, _SCORED // pictures))


def _checked(own: NDArray[np.intp], names: int, false_accepts: float) -> list[int]:
    """Return the numbers of names that areas are judged at."""
    pictures, shown = len(own), len(np.unique(own))
    if pictures < LEAST_PICTURES or shown < LEAST_NAMES:
        raise InputError(
            f"rejection: got {pictures} pictures of {shown} names, expected at least {LEAST_PICTURES} and "
            f"{LEAST_NAMES}; give more."
        )
    if not 0 < false_accepts < 1:
        raise InputError(
            f"rejection: got {false_accepts:g} false accepts, expected a share above 0, below 1."
        )
    return [count for count in _JUDGED if count < names]


def _fitted(method: str, shown: Shown, score: Score, false_accepts: float, seed: int) -> RejectFit:
    """Return the fit of a score: its threshold, and areas and rates on draws that chose nothing."""
    pictures, names = shown.cosines.shape
    drawn = {
        count: inside_and_outside(score, shown.own, names, count, seed=seed + 1)
        for count in COUNTS
        if count < names
    }
    areas = {
        str(count): {
            "gate": _mean_area(shown, score, [count], seed + 1),
            "cosine": _mean_area(shown, shown.best, [count], seed + 1),
            "softmax": _mean_area(shown, shown.softmax, [count], seed + 1),
        }
        for count in _JUDGED
        if count < names
    }
    return RejectFit(
        method=method,
        scale=shown.scale,
        weight=0.0,
        overlap=1.0,
        threshold=tuple(_least(outside, false_accepts) for _, outside in drawn.values()),
        together=(),
        nearness=0.0,
        offered=tuple(drawn),
        false_accepts=false_accepts,
        auroc=areas,
        rates=_held_out(drawn, shown.own, false_accepts, seed),
        pictures=pictures,
        names=names,
    )


def _areas_by_weight(shown: Shown, counts: Sequence[int], seed: int) -> list[tuple[float, float]]:
    """Return each weight with its mean area, over a background with what pictures show, and one without."""
    pictures, names = shown.cosines.shape
    positive = np.arange(2 * pictures) < pictures
    areas: dict[float, list[float]] = {weight: [] for weight in _WEIGHTS}
    for count in counts:
        for pair in draw_sets(shown.own, names, count, _draws_of(pictures), seed):
            best = shown.scale * np.concatenate([shown.best(sets) for sets in pair])
            for unnamed in (False, True):
                background = np.concatenate([shown.background(sets, unnamed=unnamed) for sets in pair])
                for weight, found in areas.items():
                    found.append(auroc(best - weight * background, positive))
    return [(weight, float(np.mean(found))) for weight, found in areas.items()]


def _mean_area(shown: Shown, score: Score, counts: Sequence[int], seed: int) -> float:
    names = shown.cosines.shape[1]
    positive = np.arange(2 * len(shown.own)) < len(shown.own)
    areas = []
    for count in counts:
        inside, outside = inside_and_outside(score, shown.own, names, count, seed=seed)
        areas += [auroc(np.concatenate(pair), positive) for pair in zip(inside, outside, strict=True)]
    return float(np.mean(areas))


def _least(outside: NDArray[np.float64], false_accepts: float) -> float:
    return float(np.quantile(outside, 1 - false_accepts))


def _held_out(
    drawn: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]],
    own: NDArray[np.intp],
    false_accepts: float,
    seed: int,
) -> tuple[Rates, ...]:
    """Return the rates at thresholds fitted on the pictures of other names."""
    shown, place = np.unique(own, return_inverse=True)
    part = (np.random.default_rng(seed).permutation(len(shown)) % _FOLDS)[place]
    found: dict[int, list[tuple[int, Rates]]] = {count: [] for count in drawn}
    for fold in range(_FOLDS):
        held = part == fold
        for count, (inside, outside) in drawn.items():
            least = _least(outside[:, ~held], false_accepts)
            rates = rates_at(inside[:, held], outside[:, held], least, count)
            found[count].append((int(held.sum()), rates))
    return tuple(_mean_rates(count, each) for count, each in found.items())


def _mean_rates(offered: int, found: Sequence[tuple[int, Rates]]) -> Rates:
    sizes = np.array([size for size, _ in found], np.float64)

    def mean(values: Sequence[float]) -> float:
        return float(np.dot(sizes, values) / sizes.sum())

    return Rates(
        offered,
        mean([rates.threshold for _, rates in found]),
        mean([rates.true_accepts for _, rates in found]),
        mean([rates.false_accepts for _, rates in found]),
    )
