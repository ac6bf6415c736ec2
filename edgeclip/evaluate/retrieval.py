"""Retrieval: does a picture find its text, and a text its picture, among the first few?

A picture may have several texts; any of them is a hit. Equal texts are one text, and any of its pictures is a
hit: otherwise a model would be marked down for not telling them apart. Embeddings in, numbers out; for
captions in several languages or of several kinds it is called once for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import InputError
from edgeclip.evaluate.metrics import Share, share, unit_rows
from edgeclip.runtime.statistics import CONFIDENCE

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["KS", "RetrievalReport", "Texts", "evaluate_retrieval"]

KS = (1, 5, 10)
_CHUNK_BYTES = 1 << 27  # of similarities held at once


@dataclass(frozen=True)
class Texts:
    """The distinct texts of pictures, and which picture has which.

    Attributes:
        texts: T distinct ones, in the order they first appear.
        pictures: ``(P,)`` rows of pictures, ascending; one entry a pair of picture and text.
        numbers: ``(P,)`` rows of texts.
    """

    texts: tuple[str, ...]
    pictures: NDArray[np.intp]
    numbers: NDArray[np.intp]

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> Texts:
        """Return the texts of pictures; each picture has at least one.

        Raises:
            InputError: there is no picture, or one has no text.
        """
        known: dict[str, int] = {}
        pairs = []
        for row, said in enumerate(captions):
            if not said:
                raise InputError(f"retrieval: picture {row} has no text; leave it out.")
            pairs += [(row, known.setdefault(text, len(known))) for text in dict.fromkeys(said)]
        if not pairs:
            raise InputError("retrieval: got no pictures, expected at least one.")
        both = np.array(pairs, np.intp)
        return cls(tuple(known), both[:, 0], both[:, 1])


@dataclass(frozen=True)
class RetrievalReport:
    """How often the right one is among the first ``k``; nothing is left out where fewer are offered.

    Attributes:
        pictures: how many.
        texts: distinct ones.
        image_to_text: share of pictures that find one of their texts, by k.
        text_to_image: share of texts that find one of their pictures, by k.
    """

    pictures: int
    texts: int
    image_to_text: dict[int, Share]
    text_to_image: dict[int, Share]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "pictures": self.pictures,
            "texts": self.texts,
            **{
                way: {f"r{k}": asdict(each) for k, each in getattr(self, way).items()}
                for way in ("image_to_text", "text_to_image")
            },
        }


def evaluate_retrieval(
    image_embeddings: ArrayLike,
    text_embeddings: ArrayLike,
    texts: Texts,
    *,
    ks: Sequence[int] = KS,
    confidence: float = CONFIDENCE,
) -> RetrievalReport:
    """Return recall at ``k`` both ways, by cosine; of equal similarities the first row comes first.

    Args:
        image_embeddings: ``(N, E)``, of any length but zero; computed in float64 if they are, else float32.
        text_embeddings: ``(T, E)``, of ``texts.texts``.
        texts: which picture has which text.
        ks: how many are looked at.
        confidence: of the intervals, which take the queries as independent.

    Raises:
        InputError: shapes disagree, or an embedding is zero or not finite.
        ConfigError: ``confidence`` is out of range.
    """
    images = unit_rows("image embeddings", image_embeddings)
    words = unit_rows("text embeddings", text_embeddings)
    counts = int(texts.pictures.max()) + 1, len(texts.texts)
    if (len(images), len(words)) != counts or images.shape[1] != words.shape[1]:
        raise InputError(
            f"retrieval: got image embeddings {images.shape} and text embeddings {words.shape}, expected "
            f"({counts[0]}, E) and ({counts[1]}, E)."
        )
    forward = _places(images, words, texts.pictures, texts.numbers)
    order = np.argsort(texts.numbers, kind="stable")
    backward = _places(words, images, texts.numbers[order], texts.pictures[order])
    return RetrievalReport(
        pictures=len(images),
        texts=len(words),
        image_to_text={k: share(forward < k, confidence=confidence) for k in ks},
        text_to_image={k: share(backward < k, confidence=confidence) for k in ks},
    )


def _places(
    queries: NDArray[np.floating[Any]],
    gallery: NDArray[np.floating[Any]],
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
) -> NDArray[np.intp]:
    """Return the place, from 0, of each query's first relevant entry.

    Args:
        queries: ``(Q, E)``.
        gallery: ``(G, E)``.
        rows: queries, ascending; one entry a relevant pair.
        columns: what is relevant.
    """
    step = max(1, _CHUNK_BYTES // (gallery.itemsize * len(gallery)))
    places = np.empty(len(queries), np.intp)
    for start in range(0, len(queries), step):
        similarity = queries[start : start + step] @ gallery.T  # (q, G)
        first, last = np.searchsorted(rows, (start, start + len(similarity)))
        inside, wanted = rows[first:last] - start, columns[first:last]
        best = np.full(len(similarity), -np.inf, similarity.dtype)
        np.maximum.at(best, inside, similarity[inside, wanted])
        # Where several relevant ones are equal, the first of them counts.
        is_best = similarity[inside, wanted] == best[inside]
        column = np.full(len(similarity), len(gallery))
        np.minimum.at(column, inside[is_best], wanted[is_best])
        above = (similarity > best[:, None]).sum(axis=1)
        equal = (similarity == best[:, None]) & (np.arange(len(gallery)) < column[:, None])
        places[start : start + step] = above + equal.sum(axis=1)
    return places
