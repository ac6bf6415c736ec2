"""Rounding of weights that heeds what goes into their product.

Rounding each weight to its nearest level makes the least error in the weight, not in what the product gives.
With second moments ``H = E[x x^T]`` of its inputs the squared error of an output is ``d H d^T``, ``d`` being
its row of rounding errors. Weights are rounded one after the other, and those that are left take up the error
of each as far as inputs that rise and fall together allow: the update of the optimal brain surgeon (Hassibi &
Stork 1993) in the form of GPTQ (Frantar et al. 2023, arXiv 2210.17323, equations 2 and 3, with the Cholesky
factor of ``H^-1``), here for convolutions of any kind, too. What an additive bias takes up, the mean of the
inputs, the caller leaves out of ``H``, and corrects the bias.

Two neighbours whose products some engines add up in 16 bits stay in their bounds: the second one of a pair is
bounded by the first, and the error goes where it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import CalibrationError
from edgeclip.runtime.session import Session

from .ranges import BATCH, Watch, batches, chunks

__all__ = ["Moments", "Windows", "moments", "round_to_moments"]

_DAMPING = 0.01  # of the mean variance, added to each: inputs that never vary must not divide by zero
_BLOCK = 64  # columns between updates of all that follow
_LEAST_SAMPLES, _MOST_SAMPLES = 2048, 16384
_SAMPLES_A_TERM = 8  # positions that are looked at, over terms of the sum


@dataclass(frozen=True)
class Windows:
    """What a product sums up: the last axis of a tensor, or a window of a picture with channels.

    Attributes:
        source: name of the tensor that goes in.
        shape: of one row of it: ``(…, terms)``, or ``(channels, height, width)`` for a convolution.
        kernel: ``(height, width)`` of the window; ``None`` for linear maps.
        strides: of the window.
        pads: zeros around the picture: top, left, bottom, right.
        dilations: of the window.
        groups: of channels that are summed up apart.
    """

    source: str
    shape: tuple[int, ...]
    kernel: tuple[int, int] | None = None
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def terms(self) -> int:
        """Number of terms of one sum."""
        if self.kernel is None:
            return self.shape[-1]
        return self.shape[0] // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def positions(self) -> int:
        """Sums that one row of the tensor gives for each output."""
        if self.kernel is None:
            return math.prod(self.shape[:-1])
        height, width = self._places()
        return height * width

    def _places(self) -> tuple[int, int]:
        assert self.kernel is not None
        top, left, bottom, right = self.pads
        sizes = (self.shape[1] + top + bottom, self.shape[2] + left + right)
        spans = [
            dilation * (side - 1) + 1 for dilation, side in zip(self.dilations, self.kernel, strict=True)
        ]
        height, width = (
            (size - span) // stride + 1 for size, span, stride in zip(sizes, spans, self.strides, strict=True)
        )
        return height, width

    def drawn(
        self, values: NDArray[np.floating], count: int, draw: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return terms of sums at drawn positions, ``(groups, terms, at most count)``.

        Args:
            values: of the tensor, flat, for any number of rows.
            count: of positions; all where there are no more.
            draw: chooses them.
        """
        if self.kernel is None:
            rows = values.reshape(-1, self.shape[-1])
            return np.ascontiguousarray(rows[_drawn(len(rows), count, draw)].T[None], np.float32)
        rows = values.reshape(-1, *self.shape)
        top, left, bottom, right = self.pads
        if any(self.pads):
            rows = np.pad(rows, ((0, 0), (0, 0), (top, bottom), (left, right)))
        height, width = self._places()
        chosen = _drawn(len(rows) * height * width, count, draw)
        picture, place = np.divmod(chosen, height * width)
        y, x = np.divmod(place, width)
        rise = y[:, None] * self.strides[0] + np.arange(self.kernel[0]) * self.dilations[0]
        run = x[:, None] * self.strides[1] + np.arange(self.kernel[1]) * self.dilations[1]
        # (positions, kernel height, kernel width, channels): axes that are indexed come first
        found = rows[picture[:, None, None], :, rise[:, :, None], run[:, None, :]]
        terms = found.transpose(3, 1, 2, 0).reshape(self.groups, self.terms, len(chosen))
        return np.ascontiguousarray(terms, np.float32)


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the terms of a product's sums.

    Attributes:
        second: mean products of two terms, ``(groups, terms, terms)``.
        first: means, ``(groups, terms)``.
    """

    second: NDArray[np.float64]
    first: NDArray[np.float64]

    @property
    def centred(self) -> NDArray[np.float64]:
        """Covariances, ``(groups, terms, terms)``: all that is left where a bias takes up the means."""
        return self.second - self.first[:, :, None] * self.first[:, None, :]


@dataclass(eq=False)
class _Sum:
    windows: Windows
    second: NDArray[np.float64] = field(init=False)
    first: NDArray[np.float64] = field(init=False)
    count: int = 0

    def __post_init__(self) -> None:
        groups, terms = self.windows.groups, self.windows.terms
        self.second, self.first = np.zeros((groups, terms, terms)), np.zeros((groups, terms))

    def add(self, terms: NDArray[np.float32]) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self.second += np.matmul(terms, terms.transpose(0, 2, 1))
        self.first += terms.sum(axis=2, dtype=np.float64)
        self.count += terms.shape[2]


def moments(
    watch: Watch, rows: NDArray[np.generic], windows: Sequence[Windows], *, what: str
) -> Iterator[tuple[Windows, Moments]]:
    """Give the moments of each product's terms over rows, in the order given, each window once.

    Positions are drawn where there are more than eight for each term, the same ones for the same rows. As
    many products are looked at in one run of the graph as memory allows.

    Args:
        watch: of a graph.
        rows: for its input.
        windows: what products sum up.
        what: the graph, as messages name it.

    Raises:
        BackendError: the graph cannot be run.
        CalibrationError: a tensor is not finite for some rows, or its squares are not.
    """
    unique = tuple(dict.fromkeys(windows))
    held = [BATCH * math.prod(each.shape) + 2 * each.groups * each.terms**2 for each in unique]
    for chosen in chunks(held):
        sums = [_Sum(unique[place]) for place in chosen]
        names = tuple(dict.fromkeys(each.windows.source for each in sums))
        draw = np.random.default_rng(0)
        with watch.values(names) as session:
            for feeds, size in batches(session, rows):
                got = session.run(feeds)
                for each in sums:
                    place = names.index(each.windows.source)
                    values = _of_rows(got[str(place)], size, session, feeds)
                    if not np.isfinite(values).all():
                        raise CalibrationError(
                            f"{what}: {each.windows.source!r} is not finite for the calibration rows; its "
                            "float32 form is broken, or the rows are."
                        )
                    each.add(each.windows.drawn(values, _share(each.windows, size, len(rows)), draw))
        for each in sums:
            found = Moments(each.second / each.count, each.first / each.count)
            if not np.isfinite(found.second).all():  # which no damping would ever let be inverted
                raise CalibrationError(
                    f"{what}: {each.windows.source!r} is so large for the calibration rows that its squares "
                    "exceed float32; its float32 form is broken, or the rows are."
                )
            yield each.windows, found


def _share(windows: Windows, size: int, rows: int) -> int:
    """Return how many positions a batch of so many rows gives."""
    wanted = min(max(_SAMPLES_A_TERM * windows.terms, _LEAST_SAMPLES), _MOST_SAMPLES)
    return max(1, math.ceil(wanted * size / rows))


def _of_rows(
    values: NDArray[np.generic], size: int, session: Session, feeds: Mapping[str, NDArray[np.generic]]
) -> NDArray[np.floating]:
    """Return the values of the rows that were given, without those that fill up a batch."""
    (name,) = session.inputs
    filled = len(feeds[name])
    kept = values[: len(values) // filled * size] if filled > size else values
    return np.asarray(kept, np.float32)


def _drawn(size: int, count: int, draw: np.random.Generator) -> NDArray[np.intp]:
    if size <= count:
        return np.arange(size)
    return np.sort(draw.choice(size, count, replace=False)).astype(np.intp)


def round_to_moments(
    weight: NDArray[np.floating],
    moment: NDArray[np.float64],
    steps: NDArray[np.floating],
    *,
    limit: int,
    neighbours: NDArray[np.intp] | None = None,
    most: int = 128,
) -> NDArray[np.int8]:
    """Return a weight in integers of its steps, such that what the product gives changes little.

    Args:
        weight: ``(groups, outputs, terms)``.
        moment: ``(groups, terms, terms)``, see :class:`Moments`.
        steps: ``(groups, outputs)``.
        limit: largest absolute value of an integer.
        neighbours: ``(ways, terms)``, the term that each one meets in a sum of 16 bits, or -1: two of one
            sign add up to ``most`` at most. Ways are engines.
        most: see ``neighbours``.

    Returns:
        ``(groups, outputs, terms)``; a row for which the nearest levels are better has those.
    """
    exact: NDArray[np.float64] = weight.astype(np.float64)
    wide: NDArray[np.float64] = steps.astype(np.float64)[..., None]
    nearest = np.rint(exact / wide).clip(-limit, limit)
    terms = exact.shape[2]
    order, factor = _factor(moment)
    left = np.take_along_axis(exact, order[:, None, :], axis=2) / wide
    found = np.zeros_like(left)
    bound = _Bounds(found, order, neighbours, limit, most)
    for start in range(0, terms, _BLOCK):
        stop = min(start + _BLOCK, terms)
        lost = np.zeros((*left.shape[:2], stop - start))
        for column in range(start, stop):
            found[:, :, column] = bound(column, np.rint(left[:, :, column]))
            diagonal = factor[:, column, column][:, None]
            error = (left[:, :, column] - found[:, :, column]) / diagonal
            left[:, :, column:stop] -= error[..., None] * factor[:, None, column, column:stop]
            lost[:, :, column - start] = error
        left[:, :, stop:] -= np.matmul(lost, factor[:, start:stop, stop:])
    back = np.argsort(order, axis=1)
    rounded = np.take_along_axis(found, back[:, None, :], axis=2)
    is_better = _errors(exact - rounded * wide, moment) <= _errors(exact - nearest * wide, moment)
    return np.where(is_better[..., None], rounded, nearest).astype(np.int8)


def _factor(moment: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the order of terms, those that matter most first, and the upper factor of ``H^-1`` in it.

    Inputs that hardly vary but together leave ``H`` singular: more is added to the diagonal until it is not.
    """
    groups, terms, _ = moment.shape
    unit = np.eye(terms)
    order = np.argsort(-np.diagonal(moment, axis1=1, axis2=2), axis=1, kind="stable")
    group = np.arange(groups)[:, None, None]
    sorted_moment = moment[group, order[:, :, None], order[:, None, :]]
    mean = np.trace(moment, axis1=1, axis2=2)[:, None, None] / terms
    damping = _DAMPING * np.where(mean > 0, mean, 1.0)
    while True:
        try:
            factor = np.linalg.cholesky(np.linalg.inv(sorted_moment + damping * unit))
        except np.linalg.LinAlgError:
            damping = 10 * damping
            continue
        return order, factor.transpose(0, 2, 1)


class _Bounds:
    """Keeps integers within their limit, and pairs of them within theirs.

    Args:
        found: integers so far, ``(groups, outputs, terms)`` in the order of rounding; read when called.
        order: the term at each place of that order, ``(groups, terms)``.
        neighbours: see :func:`round_to_moments`.
        limit: of one.
        most: of two.
    """

    def __init__(
        self,
        found: NDArray[np.float64],
        order: NDArray[np.intp],
        neighbours: NDArray[np.intp] | None,
        limit: int,
        most: int,
    ) -> None:
        self._found, self._limit, self._most = found, limit, most
        self._places: list[NDArray[np.intp]] = []
        back = np.argsort(order, axis=1)
        for way in [] if neighbours is None else neighbours:
            partner = way[order]  # (groups, terms): the term that the one at a place meets
            places = np.take_along_axis(back, np.maximum(partner, 0), axis=1)
            self._places.append(np.where(partner < 0, -1, places))

    def __call__(self, column: int, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return integers ``(groups, outputs)`` for one place of the order, as near as may be."""
        low, high = np.full_like(wanted, -self._limit), np.full_like(wanted, self._limit)
        for places in self._places:
            place = places[:, column]
            known = (place >= 0) & (place < column)
            other = np.where(known, place, 0)[:, None, None]
            met = np.take_along_axis(self._found, other, axis=2)[..., 0] * known[:, None]
            high = np.where(met > 0, np.minimum(high, self._most - met), high)
            low = np.where(met < 0, np.maximum(low, -self._most - met), low)
        return wanted.clip(low, high)


def _errors(lost: NDArray[np.float64], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean squared error of each output, ``(groups, outputs)``."""
    return np.asarray((np.matmul(lost, moment) * lost).sum(axis=2))
