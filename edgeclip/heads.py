"""Heads turn embeddings into answers: here the temperature head of zero-shot classification.

A head maps similarities ``(B, N)`` to scores ``(B, N)`` and says what its scores are (``score_kind``);
ranking is shared. Heads know no labels and no pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import BundleError
from .tensors import read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bundle import Bundle

__all__ = ["Head", "Ranking", "TemperatureHead", "cosines", "rank", "temperature_head"]

_SORT_ALL = 128  # labels up to which sorting all is quicker than looking for the best first
MAX_SCALE = 100.0
"""Largest multiplier of cosines, as CLIP clips it (Radford et al. 2021, §2.5)."""


class Head(Protocol):
    """What turns similarities into scores."""

    @property
    def score_kind(self) -> str:
        """What the scores are, as JSON output names it."""
        ...

    def __call__(self, similarity: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return ``(B, N)`` scores of ``(B, N)`` similarities."""
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

    def __call__(self, similarity: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the softmax of ``scale · similarity`` over the last axis, float32."""
        # cosines are at most 1, so exp() stays below e^200 only after the maximum is taken off
        logits: NDArray[np.float32] = similarity - similarity.max(axis=-1, keepdims=True)
        logits *= np.float32(self.scale)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)
        return logits


def cosines(embeddings: NDArray[np.float32], bank: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``(B, N)`` dot products of ``(B, E)`` and ``(N, E)``, on the calling thread alone.

    One dot product a pair, not one matrix product: BLAS would share that out to threads of its own, which
    wait for each other busily. Beside other work they lose their cores, and tens of microseconds become
    milliseconds (``benchmarks/results/head_threads.json``). Nor do rows then depend on how many pictures
    share the call.
    """
    products: NDArray[np.float32] = np.matmul(bank[None, :, None, :], embeddings[:, None, :, None])
    return products[..., 0, 0]


@dataclass(frozen=True, eq=False)
class Ranking:
    """The best labels of a batch, best first.

    Attributes:
        rows: ``(B, k)`` rows of the bank.
        score: ``(B, k)`` float32.
        similarity: ``(B, k)`` float32 cosine.
    """

    rows: NDArray[np.intp]
    score: NDArray[np.float32]
    similarity: NDArray[np.float32]


def rank(
    embeddings: NDArray[np.float32], bank: NDArray[np.float32], head: Head, *, top_k: int = 5
) -> Ranking:
    """Return the ``top_k`` labels of each picture (all of them where the bank has fewer).

    Args:
        embeddings: ``(B, E)`` float32, unit rows.
        bank: ``(N, E)`` float32, unit rows.
        head: what scores the similarities.
        top_k: at least 1.

    Equal similarities keep the order of the bank among the labels returned. Costs N dot products and a
    few passes over ``(B, N)`` (``benchmarks/label_count.py``).
    """
    similarity = cosines(embeddings, bank)  # (B, N)
    score = head(similarity)
    count = bank.shape[0]
    k = min(top_k, count)
    # Methods throughout, not numpy's functions: after a tower has emptied the processor's caches, every layer
    # of Python between here and the kernels is fetched from memory again.
    if count <= _SORT_ALL:
        rows = (-similarity).argsort(axis=1, kind="stable")[:, :k]
    else:
        rows = similarity.argpartition(count - k, axis=1)[:, count - k :]
        rows.sort(axis=1)  # the order of the bank, which the stable sort below keeps among equals
    picture = _column(len(embeddings))
    if count > _SORT_ALL:
        rows = rows[picture, (-similarity[picture, rows]).argsort(axis=1, kind="stable")]
    return Ranking(rows, score[picture, rows], similarity[picture, rows])


@lru_cache(maxsize=64)
def _column(length: int) -> NDArray[np.intp]:
    """Return 0, 1, … as a column that picks the pictures beside an array of rows."""
    return np.arange(length)[:, None]


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
