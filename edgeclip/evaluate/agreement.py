"""Do two models see the same likeness? Numbers that need neither labels nor equal widths.

Cosines compare embeddings of one space, so they need a student that was taught to be in its teacher's.
Neighbours and matches compare what is closest to what, whatever the spaces are and however they are turned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import InputError
from edgeclip.evaluate.metrics import unit_rows

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["match_agreement", "mean_cosine", "neighbour_agreement"]

_CHUNK_BYTES = 1 << 27


def mean_cosine(first: ArrayLike, second: ArrayLike) -> float:
    """Return the mean cosine of row and row, ``(N, E)`` both.

    Raises:
        InputError: shapes disagree, or a row is zero or not finite.
    """
    a, b = _pair(first, second)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"mean cosine: got widths {a.shape[1]} and {b.shape[1]}, expected one width.")
    return float(np.einsum("ij,ij->i", a, b, dtype=np.float64).mean())


def neighbour_agreement(first: ArrayLike, second: ArrayLike) -> float:
    """Return the share of rows whose closest other row is the same for both models.

    Args:
        first: ``(N, E)`` embeddings of one model.
        second: ``(N, F)`` embeddings of the other, of the same things.

    Raises:
        InputError: shapes disagree, there are fewer than two rows, or a row is zero or not finite.
    """
    a, b = _pair(first, second)
    if len(a) < 2:
        raise InputError(f"neighbours: got {len(a)} rows, expected at least two.")
    return float(np.mean(_closest(a, a, apart=True) == _closest(b, b, apart=True)))


def match_agreement(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike]
) -> tuple[float, float]:
    """Return how often both models match the same: pictures with texts, and texts with pictures.

    Args:
        first: ``(N, E)`` of pictures and ``(T, E)`` of texts, of one model.
        second: ``(N, F)`` and ``(T, F)`` of the other.

    Raises:
        InputError: shapes disagree, or a row is zero or not finite.
    """
    images, texts = _pair(first[0], second[0]), _pair(first[1], second[1])
    forward = [_closest(*each) for each in zip(images, texts, strict=True)]
    backward = [_closest(*each) for each in zip(texts, images, strict=True)]
    return float(np.mean(forward[0] == forward[1])), float(np.mean(backward[0] == backward[1]))


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = unit_rows("first embeddings", first), unit_rows("second embeddings", second)
    if len(a) != len(b) or not len(a):
        raise InputError(f"agreement: got {len(a)} and {len(b)} rows, expected as many, and at least one.")
    return a, b


def _closest(queries: NDArray[Any], gallery: NDArray[Any], *, apart: bool = False) -> NDArray[np.intp]:
    """Return the most similar row of the gallery for each query; ``apart``: any but itself."""
    if queries.shape[1] != gallery.shape[1]:
        raise InputError(
            f"agreement: image embeddings are {queries.shape} and text embeddings {gallery.shape}, expected "
            "one width."
        )
    step = max(1, _CHUNK_BYTES // (gallery.itemsize * len(gallery)))
    found = []
    for start in range(0, len(queries), step):
        similarity = queries[start : start + step] @ gallery.T
        if apart:
            rows = np.arange(len(similarity))
            similarity[rows, start + rows] = -np.inf
        found.append(similarity.argmax(axis=1))
    return np.concatenate(found)
