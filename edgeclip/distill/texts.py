"""Texts without pictures: what a text tower learns from on its own, each with its weight.

A table is a ``.jsonl`` file with one object a line:

``text``
    the text.
``kind``
    which ``prompts`` go around it, such as its language; ``alt`` if missing.
``weight``
    how often it is drawn, relative to the others; 1 if missing.
``pictures``
    numbers of pictures it fits, rows of the ``pictures`` of the data: one is drawn each time. All texts of a
    table have some, or none.

What a text should embed to comes from a teacher: stored rows (``kind = "embeddings"``) or a sentence encoder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from edgeclip.distill.embedding_files import map_rows
from edgeclip.distill.samples import Sample
from edgeclip.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["TextSamples", "open_pictures", "open_texts"]


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    kind: str = "alt"
    weight: float = 1.0
    pictures: tuple[int, ...] = ()


_DECODER = msgspec.json.Decoder(_Row)


class TextSamples:
    """The texts of some tables, in their order; see :class:`edgeclip.distill.samples.Samples`.

    Attributes:
        weights: ``(n,)`` how often each is drawn; ``None``: all alike.
        most_pictures: one more than the largest number of a picture; 0: there are none.
        digest: sha256 of the tables.

    Args:
        rows: of all tables.
        keys: where each is from.
        digest: of the tables' bytes.
    """

    def __init__(self, rows: Sequence[_Row], keys: Sequence[str], digest: str) -> None:
        self._rows, self._keys = rows, keys
        self.digest = digest
        self.most_pictures = 1 + max((number for row in rows for number in row.pictures), default=-1)
        weights = np.array([row.weight for row in rows], np.float64)
        self.weights: NDArray[np.float64] | None = None if (weights == weights[0]).all() else weights

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """Return ``<table>:<line>``."""
        return self._keys[index]

    def read(self, index: int) -> Sample:
        """Return a text as the one caption of a sample without a picture."""
        row = self._rows[index]
        return Sample(self._keys[index], b"", {row.kind: (row.text,)}, pictures=row.pictures)


def open_texts(paths: Sequence[Path]) -> TextSamples:
    """Return the texts of tables, one after the other.

    Args:
        paths: ``.jsonl`` files.

    Raises:
        InputError: a file cannot be read, a line is no such object, or some texts have pictures and others
            none.
    """
    rows: list[_Row] = []
    keys: list[str] = []
    whole = hashlib.sha256()
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"texts {str(path)!r} cannot be read ({error.strerror or error}).") from error
        whole.update(hashlib.sha256(content).digest())
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            rows.append(_row(line, f"{str(path)!r}, line {number}"))
            keys.append(f"{path.name}:{number}")
    if not rows:
        raise InputError(f"texts {[str(path) for path in paths]}: hold no line, expected one text or more.")
    bare = next((place for place, row in enumerate(rows) if not row.pictures), None)
    if bare is not None and any(row.pictures for row in rows):
        raise InputError(
            f"texts: {keys[bare]!r} has no 'pictures' and others have; put the two kinds into tables of "
            "their own."
        )
    return TextSamples(tuple(rows), tuple(keys), whole.hexdigest())


def _row(line: bytes, where: str) -> _Row:
    try:
        row = _DECODER.decode(line)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputError(
            f"texts {where}: {error}; expected an object with 'text' and, if wanted, 'kind', 'weight' and "
            "'pictures'."
        ) from error
    if not row.text.strip() or not 0 < row.weight < math.inf or any(number < 0 for number in row.pictures):
        raise InputError(
            f"texts {where}: got the text {row.text[:40]!r}, the weight {row.weight} and the pictures "
            f"{list(row.pictures)[:4]}, expected a text, a positive number, and rows from 0."
        )
    return row


def open_pictures(path: Path, *, embed_dim: int, needed: int, where: str) -> Tensor:
    """Return the unit embeddings of pictures that a frozen image tower gave, ``(N, E)`` float32.

    Args:
        path: an ``.npy`` file.
        embed_dim: ``E`` of the student.
        needed: rows that texts name.
        where: names the data in errors.

    Raises:
        ConfigError: it is no such file, of another width, or has too few rows.
        InputError: a row is not finite.
    """
    rows = map_rows(path, f"{where}: 'pictures'")
    if rows.shape[1] != embed_dim or len(rows) < needed:
        raise ConfigError(
            f"{where}: 'pictures' is {str(path)!r} with {len(rows)} rows of {rows.shape[1]}, expected at "
            f"least {max(needed, 1)} rows of {embed_dim}, the width of the student's embeddings."
        )
    pictures = torch.from_numpy(np.array(rows, dtype=np.float32))
    broken = (~pictures.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise InputError(f"{where}: row {broken[0]} of {str(path)!r} is not finite; compute it again.")
    return torch.nn.functional.normalize(pictures, dim=1)
