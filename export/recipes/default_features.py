"""What things outside the classifier's classes look like: a list by hand, and analogies.

The list (``default_look_alikes.toml``) says for 710 everyday names which classes such a picture would be
taken for. Every other meaning is placed by kernel ridge regression from the classes, which look like
themselves, and the lines of the list: meanings are alike by name and gloss, by gloss alone, and by their
ancestors in WordNet, weighted by how rare an ancestor is among the known ones.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import InputError

from .wordnet import WordNet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["LOOK_ALIKES", "Analogies", "read_look_alikes"]

Floats = NDArray[np.float32]

LOOK_ALIKES = Path(__file__).with_name("default_look_alikes.toml")
_DECAY = 0.8  # of the weight from one class of a line to the next
_ROWS = 4096


def read_look_alikes(english: Sequence[str], path: Path = LOOK_ALIKES) -> dict[str, Floats]:
    """Return a distribution over the classes ``(1000,)`` for every name of the list.

    Args:
        english: names of the classes; those with the same name share its weight.
        path: the list.

    Raises:
        InputError: the list cannot be read, or names a class there is not.
    """
    try:
        lines = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"look-alikes: {str(path)!r} cannot be read ({error}).") from error
    found: dict[str, Floats] = {}
    for name, classes in lines.items():
        q = np.zeros(len(english), np.float32)
        for place, said in enumerate(classes):
            rows = [row for row, each in enumerate(english) if each == said]
            if not rows:
                raise InputError(
                    f"look-alikes: {name!r} looks like {said!r}, which is no class; take a name of "
                    "clip-benchmark's English list."
                )
            q[rows] += _DECAY**place / len(rows)
        found[name.lower()] = q / q.sum()
    return found


class Analogies:
    """Kernel ridge regression from known meanings to distributions over the classes.

    Args:
        wordnet: WordNet.
        known: synsets ``(k)``.
        q: their distributions ``(k, 1000)``.
        vectors: unit vectors ``(k, D)`` of their names and glosses.
        glosses: unit vectors ``(k, D)`` of their glosses.
        ridge: added to the diagonal of the kernel.
    """

    def __init__(
        self,
        wordnet: WordNet,
        known: Sequence[int],
        q: Floats,
        vectors: Floats,
        glosses: Floats,
        *,
        ridge: float,
    ) -> None:
        self._wordnet = wordnet
        self._vectors, self._glosses = vectors, glosses
        above = [wordnet.ancestors(offset) for offset in known]
        counts = Counter(ancestor for each in above for ancestor in each)
        self._column = {ancestor: column for column, ancestor in enumerate(sorted(counts))}
        self._rarity = {ancestor: math.log(len(known) / count) ** 0.5 for ancestor, count in counts.items()}
        self._ancestors = self._ancestor_rows(above)
        kernel = self._kernel(vectors, glosses, self._ancestors)
        self._solved = np.linalg.solve(
            kernel.astype(np.float64) + ridge * np.eye(len(known)), q.astype(np.float64)
        ).astype(np.float32)

    def of(self, offsets: Sequence[int], vectors: Floats, glosses: Floats) -> NDArray[np.float16]:
        """Return distributions ``(n, 1000)`` of meanings with these vectors; zeros where nothing is alike."""
        found = np.empty((len(offsets), self._solved.shape[1]), np.float16)
        for start in range(0, len(offsets), _ROWS):
            part = slice(start, start + _ROWS)
            above = self._ancestor_rows([self._wordnet.ancestors(offset) for offset in offsets[part]])
            rows = np.maximum(self._kernel(vectors[part], glosses[part], above) @ self._solved, 0)
            found[part] = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-6)
        return found

    def _kernel(self, vectors: Floats, glosses: Floats, ancestors: Floats) -> Floats:
        """Return the kernel ``(n, k)`` of meanings and the known ones."""
        return np.asarray(
            np.maximum(vectors @ self._vectors.T, 0) ** 2
            + np.maximum(glosses @ self._glosses.T, 0) ** 2
            + 2 * (ancestors @ self._ancestors.T),
            np.float32,
        )

    def _ancestor_rows(self, above: Sequence[Iterable[int]]) -> Floats:
        """Return unit rows ``(n, ancestors)``; a row without a known ancestor is zero."""
        rows = np.zeros((len(above), len(self._column)), np.float32)
        for row, ancestors in enumerate(above):
            for ancestor in ancestors:
                if ancestor in self._column:
                    rows[row, self._column[ancestor]] = self._rarity[ancestor]
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.where(length > 0, length, 1), np.float32)


def mixed(own: Floats | None, guessed: Floats, share: float) -> Floats:
    """Return ``share`` of what the list says and the rest of what was guessed; that alone without a line."""
    return guessed if own is None else np.asarray(share * own + (1 - share) * guessed, np.float32)


LookAlikes = Mapping[str, Floats]
