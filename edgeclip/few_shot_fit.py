"""Fit few-shot heads: discriminants of pictures blended with the words, chosen by leave-one-out.

A head is the weighted sum of up to three linear classifiers, so it is one itself:

* *zero-shot*: the text rows ``z`` of the names, ``scale · x · z``;
* *pictures*: Gaussian discriminant analysis with one covariance, ``w = P μ`` and ``b = −½ μ · P μ`` with the
  class means ``μ``, equal priors and the inverse ``P`` of the shrunk covariance (Wang et al. 2024, "A
  Hard-to-Beat Baseline for Training-Free CLIP-based Adaptation", §3);
* *words*: the same within the span of the text rows. It has one dimension less than there are classes, so
  that few pictures tell its covariance, and it mends what the text rows get wrong in common.

Wang et al. blend the first two and choose the weight on further pictures, which few do not leave. Here the
covariance is ``(prior · T + S) / (prior + N − C)``: the scatter ``S`` within classes, and a target ``T`` that
counts as ``prior`` pictures, a multiple of the identity with the trace of ``S / (N − C)``. And the means of
the second classifier are not those of the pictures as they are: classes of like names have like means, so
that the pictures of all tell each (regression on a Gaussian process, its kernel the products of text rows).

Logits of each picture by the head of the others follow from those of the head of all, by rank-one updates of
the inverses (Sherman & Morrison 1950). By the likelihood that they give to the right classes are chosen: the
prior, how far names speak for means, a temperature for each classifier, and the weights. Weights are drawn
towards ``1 − u, u/2, u/2`` with ``u = (n − 1) / (n + 6)`` for ``n`` pictures a class: the text rows count as
seven pictures until pictures say otherwise. Where every class has one picture nothing is left to choose by:
text rows decide, and the second classifier only where these are nearly tied (``benchmarks/few_shot.py``).

Everything is float64 numpy; equal input gives equal bytes on one machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, get_args

import numpy as np

from .errors import ConfigError, InputError
from .few_shot import FewShotHead, Method, Part, Rejecting, Settings, Statistics, gate_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    _Array = NDArray[np.float64]
    _Layer = tuple[NDArray[np.float64], NDArray[np.float64]]  # weights (C, E), bias (C,)

__all__ = ["HeldOut", "extended", "fit_head", "held_out", "layer", "without_class"]

ACCEPTED: Final = 0.95
"""Share of the head's own pictures that the threshold of rejection accepts."""
_PICTURE_PRIORS: Final = (3.0, 10.0, 30.0, 100.0, 300.0)
_WORD_PRIORS: Final = (0.2, 1.0, 5.0)  # times the number of classes
_LIKENESSES: Final = (0.1, 0.5, 2.0)
_OWN_MEAN: Final = 0.1  # of a class, beside what it has in common with those of like names
_NEAREST_MEAN: Final = 1e9  # such a prior leaves nothing but the identity
# Found on stamps (half tune), pictograms of a style that the default model knows, and shapes.
_TEXTS_COUNT_AS: Final = 7
_WEIGHT_DEVIATION: Final = 0.3
_ONE_PICTURE: Final = 0.16
_ONE_PICTURE_LIKENESS: Final = 0.5
_ONE_PICTURE_TOTAL: Final = 0.5
_DISCRIMINANT_SCALE: Final = 0.15  # where temperatures of discriminants are searched from
_LEAST_DEVIATION: Final = 0.01  # of cosines
_MOST_SCORES: Final = 1 << 20  # that choices are made by: some hundred megabytes
_STEPS: Final = 60
_UNIT_TOLERANCE: Final = 1e-3


# --- fitting -----------------------------------------------------------------------------------------------


def fit_head(
    embeddings: ArrayLike,
    targets: ArrayLike,
    names: Sequence[str],
    *,
    space: str,
    zero_shot: ArrayLike | None = None,
    scale: float = 1.0,
    method: Method | None = None,
    settings: Settings | None = None,
) -> FewShotHead:
    """Return the head of labelled embeddings.

    100 classes of 16 pictures take well below a second.

    Args:
        embeddings: ``(N, E)`` unit rows.
        targets: ``(N,)`` classes, 0 to C − 1; each needs a picture.
        names: of the C classes.
        space: embedding space of the rows.
        zero_shot: ``(C, E)`` unit text rows of the names, for the method ``"blend"``.
        scale: the model's multiplier of cosines with them.
        method: what to fit; ``None`` is ``"blend"`` where there are text rows, else ``"gda"``.
        settings: take these, in place of choosing; they say the method, too.

    Raises:
        InputError: shapes disagree, rows are not of unit length, or a class has no picture.
        ConfigError: fewer than two classes, or a method that needs text rows without them.
    """
    names = tuple(names)
    rows, wanted = _checked(embeddings, targets, names)
    texts = None if zero_shot is None else _unit_rows("text rows", zero_shot, len(names), rows.shape[1])
    chosen_method = method or ("gda" if texts is None else "blend")
    if chosen_method not in get_args(Method):
        raise ConfigError(f"few-shot method: got {chosen_method!r}, expected {', '.join(get_args(Method))}.")
    if chosen_method == "blend" and texts is None:
        raise ConfigError("few-shot method 'blend' needs text rows of the names; give them, or use 'gda'.")
    order = np.argsort(wanted, kind="stable")
    rows, wanted = rows[order], wanted[order]
    if settings is None:
        asked = Settings(chosen_method, scale)
        settings = _chosen(rows, wanted, None if chosen_method != "blend" else texts, asked)
    if settings.method != "blend":
        texts = None
    return _built(names, space, Statistics.of(rows, wanted, len(names)), texts, settings)


def extended(
    head: FewShotHead,
    embeddings: ArrayLike,
    targets: ArrayLike,
    names: Sequence[str],
    *,
    zero_shot: ArrayLike | None = None,
    choose: bool = True,
) -> FewShotHead:
    """Return a head with further classes, or further pictures of classes that it has.

    It is the head that all pictures together give, bit for bit where settings are chosen again.

    Args:
        head: the head; it does not change.
        embeddings: ``(N, E)`` unit rows of the new pictures.
        targets: ``(N,)`` their places in ``names``.
        names: classes of the new pictures, new or known.
        zero_shot: unit text rows of ``names``, where the head has such.
        choose: choose the settings again; they stay where a class has more than E pictures, whose single
            embeddings are not kept.

    Raises:
        InputError: as :func:`fit_head`.
        ConfigError: text rows are missing.
    """
    names = tuple(names)
    rows, wanted = _checked(embeddings, targets, names, least=1)
    width = head.weights.shape[1]
    if rows.shape[1] != width:
        raise InputError(f"few-shot head: got embeddings of {rows.shape[1]} numbers, it has {width}.")
    everyone = (*head.names, *(name for name in names if name not in head.names))
    texts = head.zero_shot
    if texts is not None:
        if zero_shot is None:
            raise ConfigError("few-shot head: it was fitted with words; give the text rows of the new names.")
        given = _unit_rows("text rows", zero_shot, len(names), width)
        texts = np.concatenate([texts, given[[names.index(name) for name in everyone[len(head) :]]]])
    places = [everyone.index(name) for name in names]
    order = sorted(range(len(names)), key=lambda row: places[row])
    turned = np.argsort(order)[wanted]
    more = Statistics.of(rows, turned, len(names))
    statistics = head.statistics.joined(more, [places[row] for row in order])
    return _again(everyone, head, statistics, texts, choose)


def without_class(head: FewShotHead, name: str, *, choose: bool = True) -> FewShotHead:
    """Return a head without a class: the head that the pictures of the others give.

    Args:
        head: the head; it does not change.
        name: of the class.
        choose: as :func:`extended`.

    Raises:
        ConfigError: there is no such class, or one would be left.
    """
    if name not in head.names:
        raise ConfigError(
            f"few-shot head: has no class {name!r}, expected one of {', '.join(map(repr, head.names))}."
        )
    if len(head) <= 2:
        raise ConfigError(
            f"few-shot head: without {name!r} one class would be left of {', '.join(map(repr, head.names))}, "
            "expected two; add another one first."
        )
    place = head.names.index(name)
    names = tuple(each for each in head.names if each != name)
    texts = None if head.zero_shot is None else np.delete(head.zero_shot, place, axis=0)
    return _again(names, head, head.statistics.without(place), texts, choose)


def layer(statistics: Statistics, zero_shot: NDArray[np.float32] | None, settings: Settings) -> _Layer:
    """Return weights ``(C, E)`` and bias ``(C,)``, float64, that settings make of statistics."""
    texts = None if zero_shot is None else zero_shot.astype(np.float64)
    moments = _Moments.of(statistics, settings.total, texts)
    weights, bias = moments.discriminant(settings.pictures)
    if texts is not None:
        if settings.words.weight:
            basis = _span(texts)
            if len(basis):
                inner, offset = moments.within(basis).discriminant(settings.words)
                weights, bias = weights + inner @ basis, bias + offset
        weights = weights + settings.zero_shot * texts
    return weights, bias


def _built(
    names: tuple[str, ...],
    space: str,
    statistics: Statistics,
    texts: NDArray[np.float32] | None,
    settings: Settings,
) -> FewShotHead:
    weights, bias = layer(statistics, texts, settings)
    return FewShotHead(
        names, weights.astype(np.float32), bias.astype(np.float32), space, statistics, texts, settings
    )


def _again(
    names: tuple[str, ...],
    head: FewShotHead,
    statistics: Statistics,
    texts: NDArray[np.float32] | None,
    choose: bool,
) -> FewShotHead:
    settings = head.settings
    if choose and statistics.whole:
        rows = np.concatenate(statistics.rows)
        wanted = np.repeat(np.arange(len(names)), statistics.counts)
        settings = _chosen(rows, wanted, texts, Settings(settings.method, settings.scale))
    return _built(names, head.space, statistics, texts, settings)


# --- discriminants -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Moments:
    """What discriminants are made of.

    Attributes:
        counts: ``(C,)`` pictures of each class.
        means: ``(C, e)``.
        scatter: ``(e, e)`` within classes.
        target: ``(e, e)`` covariance that it is shrunk towards.
        alike: ``(C, C)`` how alike the names are, where there are such.
    """

    counts: _Array
    means: _Array
    scatter: _Array
    target: _Array
    alike: _Array | None = None

    @classmethod
    def of(cls, statistics: Statistics, total: float, texts: _Array | None = None) -> _Moments:
        """Return the moments, with a share of the covariance of all pictures in the target."""
        counts, means = statistics.counts.astype(np.float64), statistics.means
        moment, pictures = statistics.moment(), counts.sum()
        scatter = moment - (means * counts[:, None]).T @ means
        mean = statistics.sums.sum(axis=0) / pictures
        whole = (moment - pictures * np.outer(mean, mean)) / (pictures - 1)
        freedom = pictures - len(counts)
        # Of one picture a class: as much of what pictures differ by is taken to be within classes as between.
        spread = np.trace(scatter) / freedom if freedom else np.trace(whole) / 2
        level = max(float(spread) / len(moment), 1e-12)
        target = level * (1 - total) * np.eye(len(moment))
        if total:
            target += level * total * whole * (len(moment) / max(float(np.trace(whole)), 1e-12))
        return cls(counts, means, scatter, target, None if texts is None else _alike(texts))

    def within(self, basis: _Array) -> _Moments:
        """Return the moments of the coordinates in an orthonormal basis ``(r, e)``."""
        return _Moments(
            self.counts,
            self.means @ basis.T,
            basis @ self.scatter @ basis.T,
            basis @ self.target @ basis.T,
        )

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the scatter."""
        return float(self.counts.sum()) - len(self.counts)

    def smoothing(self, likeness: float) -> tuple[_Array, _Array]:
        """Return the matrix ``(C, C)`` that makes expected means of those of the pictures, and one inside it.

        The mean of a class is taken to be any one for all classes plus a part with the covariance
        ``likeness · alike`` over classes; that of its pictures has noise of ``1 / counts`` beside it, all in
        units of the covariance within classes (Rasmussen & Williams 2006, §2.2 and §2.7). The second matrix
        is the inverse of the sum, less what the mean of all takes. Likeness 0 takes the means as they are.
        """
        classes = np.eye(len(self.means))
        if not likeness or self.alike is None:
            return classes, np.zeros_like(classes)
        inverse = np.linalg.inv(likeness * self.alike + np.diag(1 / self.counts))
        ones = inverse.sum(axis=1)
        inner = np.asarray(inverse - np.outer(ones, ones) / ones.sum())
        return classes - inner / self.counts[:, None], inner

    def discriminant(self, part: Part) -> _Layer:
        """Return weights and bias, times the weight of the part."""
        if not part.weight:
            return np.zeros_like(self.means), np.zeros(len(self.means))
        smoothing, _ = self.smoothing(part.likeness)
        centre = self.means.mean(axis=0)
        means = smoothing @ (self.means - centre)
        inverse = np.linalg.inv(part.prior * self.target + self.scatter)
        weights = (part.prior + self.freedom) * means @ inverse
        quadratic = np.einsum("ce,ce->c", weights, means) - part.spread * smoothing**2 @ (1 / self.counts)
        return part.weight * weights, part.weight * (-0.5 * quadratic - weights @ centre)

    def without_each(
        self, rows: _Array, wanted: NDArray[np.intp], prior: float, likenesses: Sequence[float] = (0.0,)
    ) -> tuple[list[_Array], float]:
        """Return logits ``(n, C)`` of pictures, each by the discriminant of all others, and the spread.

        Args:
            rows: ``(n, e)`` of pictures that are among those of the moments.
            wanted: their classes, of at least two pictures each.
            prior: of the covariance.
            likenesses: of the means; there are logits for each.

        The target is taken to be the same without a picture.
        """
        means = self.means - self.means.mean(axis=0)
        inverse = np.linalg.inv(prior * self.target + self.scatter)
        factor = prior + self.freedom - 1
        others = np.maximum(self.counts - 1, 1)
        step = (self.counts / others)[wanted]
        deviation = rows - self.means[wanted]
        solved = deviation @ inverse
        length = np.einsum("ne,ne->n", solved, deviation)
        gain = step / (1 - step * length)  # of the rank-one update
        spread = float(np.mean(factor * step * (length + gain * length**2)))
        # All the rest is made of two products with the inverse: of means and means, deviations and means.
        gram, along = means @ inverse @ means.T, solved @ means.T
        along_own = along[np.arange(len(rows)), wanted]
        gained = gain * (length + along_own)
        fewer, found = 1 / others - 1 / self.counts, []
        for likeness in likenesses:
            smoothing, inner = self.smoothing(likeness)
            # Without picture i of class c the mean of c is another, and has more noise: expected mean k moves
            # by -smoothing[k, c] * (turned[c] @ means + moved[i] * deviation[i]).
            less = 1 / (1 + fewer * np.diag(inner))
            turned, moved = (fewer * less)[:, None] * inner, (less / others)[wanted]
            mean_mean, turned_gram = gram @ smoothing.T, turned @ gram
            along_means, along_turned = along @ smoothing.T, np.einsum("nc,nc->n", along, turned[wanted])
            along_moved = along_turned + moved * length
            picture_moved = (
                along_moved + np.diag(turned_gram)[wanted] + moved * along_own + gained * along_moved
            )
            moved_moved = (
                np.einsum("cd,cd->c", turned_gram, turned)[wanted]
                + moved * (2 * along_turned + moved * length)
                + gain * along_moved**2
            )
            logits = mean_mean[wanted] + along_means * (1 + gained)[:, None]
            logits -= 0.5 * (np.einsum("cd,dc->c", smoothing, mean_mean) + gain[:, None] * along_means**2)
            share = smoothing.T[wanted]
            moved_mean = (turned_gram @ smoothing.T)[wanted] + along_means * (moved + gain * along_moved)[
                :, None
            ]
            logits += share * (moved_mean - picture_moved[:, None] - 0.5 * share * moved_moved[:, None])
            # What noise adds to the square of mean k, by the class that the picture is left out of.
            noise = (
                smoothing**2 @ (1 / self.counts)
                - 2 * smoothing.T * ((turned / self.counts) @ smoothing.T)
                + smoothing.T**2 * (turned**2 @ (1 / self.counts) + fewer * less**2)[:, None]
            )
            found.append(factor * logits + 0.5 * spread * noise[wanted])
        return found, spread


def _alike(texts: _Array) -> _Array:
    """Return how alike classes are by their names, ``(C, C)``; the mean of its diagonal is near 1.

    It is the products of the text rows less their mean, and a little for what names do not say.
    """
    differences = texts - texts.mean(axis=0)
    products = differences @ differences.T
    products *= len(texts) / max(float(np.trace(products)), 1e-12)
    return np.asarray(products + _OWN_MEAN * np.eye(len(texts)))


def _span(texts: _Array) -> _Array:
    """Return an orthonormal basis ``(r, E)`` of the differences of text rows; none where it tells no more.

    Within half of all dimensions the covariance is hardly easier to tell than within all.
    """
    if 2 * len(texts) > texts.shape[1]:
        return np.zeros((0, texts.shape[1]))
    differences = texts - texts.mean(axis=0)
    # Of the small product rather than of the rows: ten times as fast.
    values, turned = np.linalg.eigh(differences @ differences.T)
    kept = values > 1e-5 * max(float(values[-1]), 1e-9)
    return np.asarray((turned[:, kept] / np.sqrt(values[kept])).T @ differences)


# --- choices -----------------------------------------------------------------------------------------------


def _chosen(
    rows: NDArray[np.float32],
    wanted: NDArray[np.intp],
    zero_shot: NDArray[np.float32] | None,
    asked: Settings,
) -> Settings:
    """Return settings for pictures in the order of their classes; method and scale are as asked."""
    classes = int(wanted.max()) + 1
    statistics = Statistics.of(rows, wanted, classes)
    several = statistics.counts > 1
    told = np.flatnonzero(several[wanted])  # those that can be left out
    total = 0.0 if len(told) else _ONE_PICTURE_TOTAL
    told = told[:: max(1, -(-len(told) * classes // _MOST_SCORES))]
    texts = None if zero_shot is None else zero_shot.astype(np.float64)
    if not len(told):
        return _of_one_picture(rows, wanted, texts, replace(asked, total=total))
    moments = _Moments.of(statistics, total, texts)
    left_out, right = rows[told].astype(np.float64), wanted[told]
    priors: Sequence[float] = (_NEAREST_MEAN,) if asked.method == "mean" else _PICTURE_PRIORS
    likenesses = (0.0,) if texts is None else _LIKENESSES
    pictures, logits = _best_prior(moments, left_out, right, priors, likenesses)
    if texts is None:
        return replace(asked, pictures=pictures, rejecting=_rejecting(statistics, left_out, right, None))
    zero = asked.scale * left_out @ texts.T
    temperature = _temperature(zero, right, 1.0)
    parts, terms = [pictures], [temperature * zero, logits]
    if len(basis := _span(texts)):
        priors = tuple(each * classes for each in _WORD_PRIORS)
        words, logits = _best_prior(moments.within(basis), left_out @ basis.T, right, priors, (0.0,))
        parts.append(words)
        terms.append(logits)
    count = len(wanted) / classes
    share = (count - 1) / (count + _TEXTS_COUNT_AS - 1)
    start = np.array([1 - share] + [share / len(parts)] * len(parts))
    # Where few classes have a picture to leave out, what these say of the others is uncertain.
    weights = _weights(np.stack(terms), right, start, _WEIGHT_DEVIATION * float(several.mean()))
    parts = [
        replace(part, weight=part.weight * each)
        for part, each in zip(parts, weights[1:].tolist(), strict=True)
    ]
    return replace(
        asked,
        zero_shot=float(asked.scale * temperature * weights[0]),
        pictures=parts[0],
        words=parts[1] if len(parts) > 1 else Part(),
        rejecting=_rejecting(statistics, left_out, right, texts),
    )


def _of_one_picture(
    rows: NDArray[np.float32], wanted: NDArray[np.intp], texts: _Array | None, asked: Settings
) -> Settings:
    """Return settings for classes of one picture each.

    Text rows have not seen the pictures, so that their temperature and the threshold can be told from them.
    """
    if texts is None:
        return replace(asked, pictures=Part(_DISCRIMINANT_SCALE))
    cosines = rows.astype(np.float64) @ texts.T
    temperature = _temperature(asked.scale * cosines, wanted, 1.0)
    multiplier = 1 / _deviation(cosines[np.arange(len(wanted)), wanted])
    return replace(
        asked,
        zero_shot=asked.scale * temperature,
        pictures=Part(temperature * _ONE_PICTURE, likeness=_ONE_PICTURE_LIKENESS),
        rejecting=_accepting(multiplier, 0.0, multiplier * cosines.max(axis=1)),
    )


def _best_prior(
    moments: _Moments,
    rows: _Array,
    wanted: NDArray[np.intp],
    priors: Sequence[float],
    likenesses: Sequence[float],
) -> tuple[Part, _Array]:
    """Return the discriminant that makes pictures left out most likely, and their logits at its weight."""
    tried = []
    for prior in priors:
        found, spread = moments.without_each(rows, wanted, prior, likenesses)
        for likeness, logits in zip(likenesses, found, strict=True):
            scale = _temperature(logits, wanted, _DISCRIMINANT_SCALE)
            logits *= scale
            tried.append((_loss(logits, wanted), Part(scale, prior, spread, likeness), logits))
    _, part, logits = min(tried, key=lambda each: each[0])
    return part, logits


def _temperature(logits: _Array, wanted: NDArray[np.intp], start: float) -> float:
    """Return the multiplier of logits that makes the right classes most likely.

    Its logarithm is drawn towards that of ``start`` with a standard deviation of 1: of pictures that are all
    right, any multiplier is too small. Newton's steps; the second derivative is kept positive.
    """
    theta = np.log(start)
    for _ in range(_STEPS):
        scale = float(np.exp(theta))
        scores = _softmax(scale * logits)
        expected = np.einsum("nc,nc->n", scores, logits)
        slope = scale * float((expected - logits[np.arange(len(wanted)), wanted]).sum())
        curvature = scale**2 * float((np.einsum("nc,nc,nc->n", scores, logits, logits) - expected**2).sum())
        gradient = slope + theta - np.log(start)
        step = -gradient / (curvature + max(slope, 0.0) + 1)
        theta += float(np.clip(step, -1, 1))
        if abs(step) < 1e-9:
            break
    return float(np.exp(theta))


def _weights(terms: _Array, wanted: NDArray[np.intp], start: _Array, deviation: float) -> _Array:
    """Return the weights ``(K,)``, none negative, of terms ``(K, n, C)`` that make right classes most likely.

    They are drawn towards ``start`` with the standard deviation. The loss is convex: Newton's steps,
    projected, and halved until the loss falls.
    """
    precision = 1 / deviation**2
    right = terms[:, np.arange(len(wanted)), wanted]  # (K, n)

    def loss(weights: _Array) -> float:
        drawn = precision / 2 * float(((weights - start) ** 2).sum())
        return _loss(np.tensordot(weights, terms, 1), wanted) + drawn

    weights = start.copy()
    current = loss(weights)
    for _ in range(_STEPS):
        scores = _softmax(np.tensordot(weights, terms, 1))
        expected = np.einsum("knc,nc->kn", terms, scores)
        gradient = (expected - right).sum(axis=1) + precision * (weights - start)
        centred = terms - expected[..., None]
        hessian = np.tensordot(centred * scores, centred, ((1, 2), (1, 2))) + precision * np.eye(len(terms))
        free = (weights > 0) | (gradient < 0)
        step = np.zeros_like(weights)
        step[free] = -np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        for halving in range(_STEPS):
            following = np.maximum(weights + step / 2**halving, 0)
            fallen = current - loss(following)
            if fallen > 0:
                break
        else:
            break
        weights, current = following, current - fallen
        if fallen <= 1e-10 * abs(current):
            break
    return weights


def _rejecting(
    statistics: Statistics, rows: _Array, wanted: NDArray[np.intp], texts: _Array | None
) -> Rejecting:
    """Return how strangers are told, by pictures that are left out of the mean of their class."""
    means, counts = statistics.means, statistics.counts[wanted]
    places = np.arange(len(wanted))
    cosines = rows @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    others = (means[wanted] * counts[:, None] - rows) / (counts - 1)[:, None]
    cosines[places, wanted] = np.einsum("ne,ne->n", rows, others) / np.linalg.norm(others, axis=1)
    pictures = 1 / _deviation(cosines[places, wanted])
    scores, words = pictures * cosines, 0.0
    if texts is not None:
        cosines = rows @ texts.T
        words = 1 / _deviation(cosines[places, wanted])
        scores += words * cosines
    return _accepting(words, pictures, scores.max(axis=1))


def _accepting(words: float, pictures: float, scores: _Array) -> Rejecting:
    # Of n + 1 scores in any order, the last is below the k-th least of the others with a chance of k in
    # n + 1 (Vovk et al. 2005, conformal prediction). Fewer than 19 pictures cannot promise 95 %.
    least = int((len(scores) + 1) * (1 - ACCEPTED) + 1e-9)
    threshold = float(np.sort(scores)[max(least - 1, 0)])
    # Products with float32 rows are a little less or more than these.
    threshold -= 1e-4 * max(1.0, abs(threshold))
    return Rejecting(words, pictures, threshold, float((scores >= threshold).mean()))


def _deviation(cosines: _Array) -> float:
    return max(float(cosines.std()), _LEAST_DEVIATION)


def _softmax(logits: _Array) -> _Array:
    scores: _Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


def _loss(logits: _Array, wanted: NDArray[np.intp]) -> float:
    """Return the sum of the negative logarithms of the right classes' scores."""
    highest = logits.max(axis=1)
    total = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
    return float((total - logits[np.arange(len(wanted)), wanted]).sum())


# --- what a fit is worth -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Pictures as heads see them that were fitted without them.

    Attributes:
        places: ``(M,)`` of the pictures among those given.
        logits: ``(M, C)`` of the heads.
        zero_shot: ``(M, C)`` cosines with the text rows, where there are such.
        accepted: ``(M,)`` whether the gate of the head accepts it; empty where there is no gate.
    """

    places: NDArray[np.intp]
    logits: NDArray[np.float32]
    zero_shot: NDArray[np.float32] | None
    accepted: NDArray[np.bool_]


def held_out(
    embeddings: ArrayLike,
    targets: ArrayLike,
    names: Sequence[str],
    *,
    zero_shot: ArrayLike | None = None,
    scale: float = 1.0,
    method: Method | None = None,
    folds: int = 5,
    seed: int = 0,
) -> HeldOut | None:
    """Return what heads say of pictures that they were not fitted on, everything chosen without them.

    Each class is spread over the folds; the only picture of a class is never held out.

    Args:
        embeddings: as :func:`fit_head`; so are ``targets``, ``names``, ``zero_shot``, ``scale``, ``method``.
        targets: see there.
        names: see there.
        zero_shot: see there.
        scale: see there.
        method: see there.
        folds: parts, at least 2.
        seed: of the parts.

    Returns:
        ``None`` where every class has one picture.
    """
    if folds < 2:
        raise ConfigError(f"folds: got {folds}, expected at least 2.")
    rows, wanted = _checked(embeddings, targets, tuple(names))
    texts = None if zero_shot is None else _unit_rows("text rows", zero_shot, len(names), rows.shape[1])
    part = np.full(len(wanted), -1, np.intp)
    random, first = np.random.default_rng(seed), 0
    for each in range(len(names)):
        mine = random.permutation(np.flatnonzero(wanted == each))
        if len(mine) > 1:
            # Where the last class ended, so that no part takes a picture of every small class.
            part[mine] = (first + np.arange(len(mine))) % folds
            first += len(mine)
    places, logits, accepted = [], [], []
    for fold in range(folds):
        out = np.flatnonzero(part == fold)
        if not len(out):
            continue
        kept = part != fold
        head = fit_head(
            rows[kept], wanted[kept], names, space="", zero_shot=texts, scale=scale, method=method
        )
        places.append(out)
        logits.append(head.logits(rows[out]))
        if head.settings.rejecting is not None:
            gate = gate_of(head)
            accepted.append(gate.scores(logits[-1], rows[out] @ gate.rows.T) >= gate.threshold)
    if not places:
        return None
    shown = np.concatenate(places)
    return HeldOut(
        shown,
        np.concatenate(logits),
        None if texts is None else rows[shown] @ texts.T,
        np.concatenate(accepted) if accepted else np.zeros(0, bool),
    )


# --- input -------------------------------------------------------------------------------------------------


def _checked(
    embeddings: ArrayLike, targets: ArrayLike, names: tuple[str, ...], *, least: int = 2
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    rows, wanted = np.asarray(embeddings), np.asarray(targets)
    if rows.ndim != 2 or wanted.shape != rows.shape[:1] or not rows.size:
        raise InputError(
            f"few-shot head: got embeddings of shape {rows.shape} and targets of {wanted.shape}, expected "
            "(N, E) and (N,)."
        )
    if len(names) < least:
        raise ConfigError(
            f"few-shot head: got the classes {', '.join(map(repr, names)) or '(none)'}, expected at least "
            f"{least}: one class is told from nothing."
        )
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"few-shot head: the class {repeated!r} is given twice; give each once.")
    if wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= len(names):
        raise InputError(
            f"few-shot head: targets of {wanted.dtype} are not all classes 0 to {len(names) - 1}."
        )
    empty = np.flatnonzero(np.bincount(wanted.astype(np.intp), minlength=len(names)) == 0)
    if len(empty):
        raise InputError(
            f"few-shot head: class {names[int(empty[0])]!r} has no pictures; give it some, or leave it out."
        )
    return _unit_rows("embeddings", rows, len(rows), rows.shape[1]), wanted.astype(np.intp)


def _unit_rows(what: str, rows: ArrayLike, count: int, width: int) -> NDArray[np.float32]:
    found = np.asarray(rows)
    if found.shape != (count, width) or found.dtype.kind != "f":
        raise InputError(
            f"few-shot head: got {what} of {found.dtype} {found.shape}, expected floats ({count}, {width})."
        )
    wrong = ~(abs(np.linalg.norm(found, axis=1) - 1) <= _UNIT_TOLERANCE)  # NaN, too
    if wrong.any():
        raise InputError(
            f"few-shot head: row {int(wrong.argmax())} of the {what} is not of length 1. Normalise the rows."
        )
    return found.astype(np.float32)
