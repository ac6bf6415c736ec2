"""Heads turn embeddings into answers: what ranks labels, and what their scores mean.

A head comes with rows ``(R, E)`` that embeddings are multiplied with. Of the products ``(B, R)`` it makes a
similarity for each label ``(B, N)``, and of these the scores; it says what they are (``score_kind``). Ranking
is shared. Heads know no names and no pictures.

* :class:`TemperatureHead`: zero-shot. A row a label; similarity is the cosine.
* :class:`ContextHead`: zero-shot in several contexts. A row for each pair of context and label.
* :class:`LinearHead`: fitted on pictures. A row a class; similarity is the logit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import BundleError
from .tensors import read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bundle import Bundle

__all__ = [
    "SHARES",
    "ContextHead",
    "Head",
    "LinearHead",
    "TemperatureHead",
    "best_of",
    "cosines",
    "rank",
    "temperature_head",
]

MAX_SCALE = 100.0
"""Largest multiplier of cosines, as CLIP clips it (Radford et al. 2021, §2.5)."""
SHARES = ("softmax", "linear")
"""Kinds of scores that sum to 1 over labels."""

# exp() of more is no double.
_LARGEST_EXPONENT = 700.0
# Up to so many labels, sorting all is quicker than finding the best and sorting those.
_SORTED_WHOLE = 256


class Head(Protocol):
    """What turns products with its rows into similarities, and these into scores."""

    @property
    def score_kind(self) -> str:
        """What the scores are, as JSON output names it."""
        ...

    def similarity(self, products: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what labels are ranked by, ``(B, N)``, of the products ``(B, R)``."""
        ...

    def __call__(self, similarity: NDArray[np.float32], best: Sequence[float]) -> list[float]:
        """Return the scores of the ``best`` of one picture's similarities ``(N,)``, given best first."""
        ...


@dataclass(frozen=True)
class TemperatureHead:
    """Softmax over the offered labels at temperature ``1 / scale``.

    Scores of one picture sum to 1 over *all* labels offered: they say which label fits best, not whether any
    does.

    Args:
        scale: multiplier of the cosines, above 0 and at most 100.

    Raises:
        BundleError: the scale is out of range.
    """

    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.scale <= MAX_SCALE:
            raise BundleError(
                f"temperature head: scale is {self.scale!r}, expected above 0 and at most {MAX_SCALE:g}."
            )

    @property
    def score_kind(self) -> str:
        """``"softmax"``."""
        return "softmax"

    def similarity(self, products: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the products, which are cosines, as they are."""
        return products

    def __call__(self, similarity: NDArray[np.float32], best: Sequence[float]) -> list[float]:
        """Return the softmax of ``scale · similarity`` over all ``(N,)``, for the best ones."""
        scale = self.scale
        # Cosines times the scale stay below 100: in double precision nothing need be taken off first.
        if not abs(scale * best[0]) < _LARGEST_EXPONENT:
            return [math.nan] * len(best)
        total = float(np.exp(np.multiply(similarity, scale, dtype=np.float64)).sum())
        return [min(math.exp(scale * each) / total, 1.0) for each in best]  # the two exp() may round apart


@dataclass(frozen=True)
class ContextHead(TemperatureHead):
    """Softmax over labels that were offered in several contexts: which context is inferred, then the label.

    The context ``z`` of a picture ``x`` is not asked for but inferred, and labels are compared in it (An et
    al. 2024, "PerceptionCLIP", with labels in the first step and no smoothing, which gained nothing)::

        p(z | x) ∝ Σ_y exp(scale · cos(x, y in z))
        p(y | x) = Σ_z p(z | x) · softmax_y(scale · cos(x, y in z)) ∝ Σ_z exp(scale · cos(x, y in z))

    The similarity of a label is ``log p(y | x) / scale``, moved so that the best label has the mean of its
    cosines in all contexts, weighted by ``p(z | x)``: differences are those of cosines.

    Args:
        scale: multiplier of the cosines.
        contexts: K; the rows are ``(K · N, E)``, all labels in the first context first.
    """

    contexts: int = 1

    def similarity(self, products: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return ``(B, N)`` of the cosines ``(B, K · N)``."""
        pictures, rows = products.shape
        cosine = products.reshape(pictures, self.contexts, rows // self.contexts).astype(np.float64)
        logits = self.scale * cosine
        likely = _log_sum_exp(logits, axis=1)  # log p(y | x) and a constant, (B, N)
        best = likely.argmax(axis=1)
        context = _log_sum_exp(logits, axis=2)  # log p(z | x) and the same constant, (B, K)
        context -= _log_sum_exp(context, axis=1)[:, None]
        mean = (np.exp(context) * cosine[np.arange(pictures), :, best]).sum(axis=1)
        moved = (likely - likely.max(axis=1, keepdims=True)) / self.scale + mean[:, None]
        return np.asarray(moved, np.float32)


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Softmax over classes of a linear layer, as it was fitted on pictures (:mod:`edgeclip.few_shot`).

    Args:
        bias: ``(C,)`` added to the products with the layer's ``(C, E)``.
    """

    bias: NDArray[np.float32]

    @property
    def score_kind(self) -> str:
        """``"linear"``."""
        return "linear"

    def similarity(self, products: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits ``(B, C)``."""
        return products + self.bias

    def __call__(self, similarity: NDArray[np.float32], best: Sequence[float]) -> list[float]:
        """Return the softmax of the logits ``(C,)``, for the best ones."""
        highest = best[0]
        total = float(np.exp(similarity - highest, dtype=np.float64).sum())
        return [math.exp(each - highest) / total for each in best]


def cosines(embeddings: NDArray[np.float32], bank: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``(B, N)`` dot products of ``(B, E)`` and ``(N, E)``, on the calling thread alone.

    One dot product a pair, not one matrix product: BLAS would share that out to threads of its own, which
    wait for each other busily. Beside other work they lose their cores, and tens of microseconds become
    milliseconds (``benchmarks/results/head_threads.json``). Nor do rows then depend on how many pictures
    share the call.
    """
    products: NDArray[np.float32] = np.matmul(bank[None, :, None, :], embeddings[:, None, :, None])
    return products[..., 0, 0]


def rank(
    embeddings: NDArray[np.float32], bank: NDArray[np.float32], head: Head, *, top_k: int = 5
) -> list[list[tuple[float, int, float]]]:
    """Return the ``top_k`` labels of each picture, best first (all of them where the bank has fewer).

    Args:
        embeddings: ``(B, E)`` float32, unit rows.
        bank: ``(R, E)`` float32, the head's rows.
        head: what makes similarities of products, and scores of these.
        top_k: at least 1.

    Returns:
        For each picture ``(similarity, row of the bank, score)``. Equal similarities keep the order of the
        bank among the labels returned.

    Costs N dot products and two passes over ``(B, N)`` (``benchmarks/label_count.py``).
    """
    return best_of(head.similarity(cosines(embeddings, bank)), head, top_k=top_k)


def best_of(
    similarity: NDArray[np.float32], head: Head, *, top_k: int = 5
) -> list[list[tuple[float, int, float]]]:
    """Return the ``top_k`` labels of each picture by similarity ``(B, N)``; see :func:`rank`."""
    count = similarity.shape[1]
    k = min(top_k, count)
    # As few functions of numpy's and our own as possible: a tower has just emptied the caches, and
    # the code of each is fetched from memory again. It is most of what the facade costs a single picture.
    if count <= _SORTED_WHOLE:
        order = (-similarity).argsort(axis=1, kind="stable")[:, :k].tolist()
    else:
        order = _partitioned(similarity, k)
    ranking = []
    for row, columns in zip(similarity, order, strict=True):
        best = [row.item(column) for column in columns]
        ranking.append(list(zip(best, columns, head(row, best), strict=True)))
    return ranking


def _partitioned(similarity: NDArray[np.float32], k: int) -> list[list[int]]:
    """Return the columns of the ``k`` largest of each row, largest first."""
    start = similarity.shape[1] - k
    candidates = similarity.argpartition(start, axis=1)[:, start:].tolist()  # in no order
    return [
        [column for _, column in sorted([(-row.item(column), column) for column in columns])]
        for row, columns in zip(similarity, candidates, strict=True)
    ]


def _log_sum_exp(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    highest = values.max(axis=axis, keepdims=True)
    total: NDArray[np.float64] = np.log(np.exp(values - highest).sum(axis=axis)) + highest.squeeze(axis)
    return total


def temperature_head(bundle: Bundle, bank: str | None) -> TemperatureHead:
    """Return the head fitted on the label bank ``bank``, else one with the scale of the model.

    A fitted head is an entry of kind ``temperature`` in the manifest's ``heads`` that names the bank; its
    file is safetensors with one float32 tensor ``scale`` of shape ``()`` or ``(1,)``.

    Raises:
        BundleError: the file is damaged or holds another tensor.
    """
    for name, entry in bundle.manifest.heads.items():
        if entry.kind == "temperature" and entry.bank == bank and bank is not None:
            where = f"{bundle.where}: head {name!r}"
            tensors, _ = read_tensors(bundle.read(entry.file), where=where)
            scale: NDArray[Any] | None = tensors.get("scale")
            if scale is None or scale.size != 1 or scale.dtype.kind != "f":
                raise BundleError(f"{where}: expected one float tensor 'scale', got {sorted(tensors)}.")
            return TemperatureHead(float(scale.reshape(())))
    return TemperatureHead(bundle.manifest.model.scale)
