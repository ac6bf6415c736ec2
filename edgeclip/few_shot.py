"""Few-shot heads: classes of one's own from a few pictures each, as one linear layer.

Logits of a unit embedding ``x`` are ``x · W + b``; scores are their softmax. :mod:`edgeclip.few_shot_fit`
fits them in closed form. The file keeps what the layer was made of, so that a class comes and goes without
the pictures of the others.

    >>> head = FewShotHead.open("parts.head")                                              # doctest: +SKIP
    >>> classifier.set_head(head)                                                          # doctest: +SKIP

**Head file.** Safetensors. Answering needs ``weights`` ``(C, E)`` and ``bias`` ``(C,)``, float32. Rejecting
and fitting on need the rest: ``counts`` ``(C,)`` int64 pictures of each class, ``sums`` ``(C, E)`` float64 of
their embeddings, ``rows`` ``(R, E)`` float32 and ``row_counts`` ``(C,)`` int64, so that the rows of a class
have the second moment of its pictures; and ``zero_shot`` ``(C, E)`` float32, the text rows, where they were
used. Metadata:

============== ==================================================================================
``format``     ``edgeclip-few-shot-head``
``schema``     ``1``
``names``      JSON list of C names
``space``      the manifest's ``model.embedding_space``
``settings``   JSON object, see :class:`Settings`
``crc32``      of the tensor bytes
============== ==================================================================================

The rows of a class are the embeddings of its pictures, at most E of them: of more pictures they are the
triangular factor of their QR decomposition. No picture can be seen in them, but whether a given one was among
them can be told.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from .errors import BundleError, ConfigError, InputError
from .label_sets import MAX_LABEL_CHARS
from .label_store import is_sound, seal
from .labels import write_atomic
from .tensors import read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bundle import Bundle

__all__ = [
    "FewShotGate",
    "FewShotHead",
    "Method",
    "Part",
    "Rejecting",
    "Settings",
    "Statistics",
    "check_names",
    "gate_of",
    "read_head",
]

Method = Literal["blend", "gda", "mean"]
KIND: Final = "linear"
"""Of the entry of a head in a bundle's manifest."""

_FORMAT: Final = "edgeclip-few-shot-head"
_MAX_HEAD_BYTES: Final = 1 << 31
_UNIT_TOLERANCE: Final = 5e-3


@dataclass(frozen=True)
class Part:
    """A discriminant of pictures, as one term of a head.

    Attributes:
        weight: multiplier of its logits.
        prior: pictures that the target of the covariance counts as.
        spread: trace of the covariance within classes times the inverse of the shrunk one. Means of few
            pictures are longer than those of many by ``spread`` over the count, which the bias takes off.
        likeness: variance of the class means along what their names differ by, in units of the covariance
            within classes, so that classes of like names tell of each other; 0 takes each mean as it is.
    """

    weight: float = 0.0
    prior: float = 1.0
    spread: float = 0.0
    likeness: float = 0.0


@dataclass(frozen=True)
class Rejecting:
    """What a gate needs; see :class:`FewShotGate`.

    Attributes:
        words: multiplier of the cosines with text rows.
        pictures: multiplier of those with class means.
        threshold: least score that is accepted.
        rate: share of the head's own pictures that was accepted, each without itself in the head.
    """

    words: float
    pictures: float
    threshold: float
    rate: float


@dataclass(frozen=True)
class Settings:
    """What was chosen when a head was fitted; with the statistics, it says what the layer is.

    Attributes:
        method: ``"blend"`` of words and pictures, ``"gda"`` of pictures alone, or nearest class ``"mean"``.
        scale: the model's multiplier of cosines.
        zero_shot: multiplier of the cosines with the text rows.
        pictures: the discriminant of embeddings.
        words: the discriminant of embeddings within the span of the text rows.
        total: share of the covariance of all pictures in the target: above 0 where classes have a picture
            each.
        rejecting: how strangers are told; ``None`` where the pictures do not say.
    """

    method: Method = "blend"
    scale: float = 1.0
    zero_shot: float = 0.0
    pictures: Part = Part()
    words: Part = Part()
    total: float = 0.0
    rejecting: Rejecting | None = None

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Settings:
        """Return settings from JSON values.

        Raises:
            ValueError: a value is unknown or no number; KeyError, TypeError and AttributeError say the rest.
        """
        rejecting = said["rejecting"]
        found = cls(
            said["method"],
            _number(said["scale"]),
            _number(said["zero_shot"]),
            Part(**{key: _number(value) for key, value in said["pictures"].items()}),
            Part(**{key: _number(value) for key, value in said["words"].items()}),
            _number(said["total"]),
            None
            if rejecting is None
            else Rejecting(**{key: _number(value) for key, value in rejecting.items()}),
        )
        if found.method not in get_args(Method):
            raise ValueError(f"unknown method {found.method!r}")
        return found


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"got {value!r}, expected a number")
    return float(value)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a head needs to know of its pictures.

    Attributes:
        counts: ``(C,)`` pictures of each class.
        sums: ``(C, E)`` float64 sums of their embeddings.
        rows: for each class ``(R, E)`` float32 with the second moment of its pictures: their embeddings, or
            where there are more than E, the triangular factor of these.

    Raises:
        InputError: shapes or dtypes disagree, a number is not finite, or a class has no pictures.
    """

    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    rows: tuple[NDArray[np.float32], ...]

    def __post_init__(self) -> None:
        counts, sums, rows = self.counts, self.sums, self.rows
        if (
            counts.dtype != np.int64
            or sums.dtype != np.float64
            or sums.ndim != 2
            or not counts.shape == sums.shape[:1] == (len(rows),)
            or any(each.dtype != np.float32 or each.shape[1:] != sums.shape[1:] for each in rows)
        ):
            raise InputError("few-shot head: its statistics do not fit together; fit it again.")
        if not (counts > 0).all() or not all(map(len, rows)):
            raise InputError("few-shot head: a class has no pictures; give it some, or leave it out.")
        if not (np.isfinite(sums).all() and all(np.isfinite(each).all() for each in rows)):
            raise InputError("few-shot head: its statistics are not all finite numbers; fit it again.")

    @classmethod
    def of(cls, embeddings: NDArray[np.float32], targets: NDArray[np.intp], classes: int) -> Statistics:
        """Return the statistics of embeddings ``(N, E)`` of the classes ``targets`` ``(N,)``."""
        rows = [np.asarray(embeddings[targets == each], np.float32) for each in range(classes)]
        return cls(
            np.array([len(each) for each in rows], np.int64),
            np.stack([each.sum(axis=0, dtype=np.float64) for each in rows]),
            tuple(map(_factor, rows)),
        )

    @property
    def means(self) -> NDArray[np.float64]:
        """Means ``(C, E)`` of the classes."""
        return self.sums / self.counts[:, None]

    @property
    def whole(self) -> bool:
        """Whether the rows are the embeddings of the pictures."""
        return all(len(rows) == count for rows, count in zip(self.rows, self.counts.tolist(), strict=True))

    def moment(self) -> NDArray[np.float64]:
        """Return the second moment ``(E, E)``: the sum over pictures of ``x xᵀ``."""
        stacked = np.concatenate(self.rows).astype(np.float64)
        return np.asarray(stacked.T @ stacked)

    def joined(self, other: Statistics, places: list[int]) -> Statistics:
        """Return these and others together.

        Args:
            other: of further pictures.
            places: for each of its classes the class here; those not here yet follow, in order.
        """
        counts, sums, rows = list(self.counts), list(self.sums), list(self.rows)
        for place, count, total, more in zip(places, other.counts, other.sums, other.rows, strict=True):
            if place < len(self.counts):
                counts[place] += count
                rows[place] = np.concatenate([rows[place], more])
                # Of single pictures as Statistics.of has it: sums of sums may end in other bits.
                whole = len(rows[place]) == counts[place]
                sums[place] = rows[place].sum(axis=0, dtype=np.float64) if whole else sums[place] + total
                rows[place] = _factor(rows[place])
            else:
                counts.append(count)
                sums.append(total)
                rows.append(more)
        return Statistics(np.array(counts, np.int64), np.stack(sums), tuple(rows))

    def without(self, place: int) -> Statistics:
        """Return these without a class."""
        rows = tuple(each for number, each in enumerate(self.rows) if number != place)
        return Statistics(np.delete(self.counts, place), np.delete(self.sums, place, axis=0), rows)


def _factor(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows with the same second moment, at most as many as they are wide."""
    if len(rows) <= rows.shape[1]:
        return rows
    return np.asarray(np.linalg.qr(rows.astype(np.float64), mode="r"), np.float32)


def check_names(names: Sequence[str]) -> None:
    """Refuse names that no class can have.

    Raises:
        InputError: one is empty, too long, or holds what terminals would obey.
    """
    for name in names:
        if not name.strip() or not name.isprintable() or len(name) > MAX_LABEL_CHARS:
            raise InputError(
                f"few-shot head: got the class name {name[:80]!r}, expected up to {MAX_LABEL_CHARS} "
                "printable characters; name it otherwise and fit it again."
            )


@dataclass(frozen=True, eq=False)
class FewShotHead:
    """A linear layer for classes of one's own.

    Attributes:
        names: C classes.
        weights: ``(C, E)``; logits of unit embeddings ``(B, E)`` are ``x @ weights.T + bias``.
        bias: ``(C,)``.
        space: the embedding space it belongs to.
        statistics: of the pictures it was fitted on.
        zero_shot: ``(C, E)`` unit text rows, where they were used.
        settings: what was chosen.

    Raises:
        InputError: shapes or dtypes disagree, a name is repeated, or a number is not finite.
    """

    names: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    space: str
    statistics: Statistics
    zero_shot: NDArray[np.float32] | None = None
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        shape = (len(self.names), self.weights.shape[-1])
        if (
            len(self.names) < 2
            or self.weights.shape != shape
            or self.bias.shape != shape[:1]
            or self.weights.dtype != np.float32
            or self.bias.dtype != np.float32
        ):
            raise InputError(
                f"few-shot head: weights of shape {self.weights.shape} and bias of {self.bias.shape} for "
                f"{len(self.names)} classes, expected float32 (C, E) and (C,) with at least two classes."
            )
        check_names(self.names)
        if len(set(self.names)) < len(self.names):
            raise InputError("few-shot head: a class name is repeated; fit it again.")
        if not (np.isfinite(self.weights).all() and np.isfinite(self.bias).all()):
            raise InputError("few-shot head: its weights are not all finite numbers; fit it again.")
        texts = self.zero_shot
        if self.statistics.sums.shape != shape or (texts is not None and texts.shape != shape):
            raise InputError("few-shot head: its weights and statistics do not fit together; fit it again.")
        if texts is not None and not (
            texts.dtype == np.float32 and (abs(np.linalg.norm(texts, axis=1) - 1) <= _UNIT_TOLERANCE).all()
        ):
            raise InputError("few-shot head: its text rows are not of unit length; fit it again.")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FewShotHead:
        """Return the head in a file.

        Raises:
            InputError: unreadable, damaged or not a head; the message names the file.
        """
        path = Path(path)
        try:
            size = path.stat().st_size
            if size > _MAX_HEAD_BYTES:
                raise InputError(f"{str(path)!r}: {size} bytes, a head has at most {_MAX_HEAD_BYTES}.")
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"head {str(path)!r} cannot be read: {reason}.") from error
        return cls.from_bytes(content, source=repr(str(path)))

    @classmethod
    def from_bytes(cls, content: bytes, *, source: str = "head data") -> FewShotHead:
        """Return the head in the content of a head file.

        Raises:
            InputError: damaged or not a head; the message begins with ``source``.
        """
        tensors, metadata = read_tensors(content, where=source, error=InputError)
        if metadata.get("format") != _FORMAT:
            raise InputError(
                f"{source}: safetensors, but no few-shot head; make one with `edgeclip heads fit`."
            )
        if metadata.get("schema") != "1":
            raise InputError(
                f"{source}: head schema {metadata.get('schema', 'missing')!r}, expected '1'; install a newer "
                "edgeclip."
            )
        if not is_sound(tensors, metadata):
            raise InputError(f"{source}: its checksum does not match, the file is damaged.")
        try:
            names = tuple(map(str, json.loads(metadata["names"])))
            settings = Settings.of(json.loads(metadata["settings"]))
            counts = tensors["row_counts"]
            if counts.dtype.kind != "i" or counts.ndim != 1 or counts.sum() != len(tensors["rows"]):
                raise ValueError("rows are not those of the classes")
            rows = tuple(np.split(tensors["rows"], np.cumsum(counts)[:-1]))
            statistics = Statistics(tensors["counts"], tensors["sums"], rows)
            return cls(
                names,
                tensors["weights"],
                tensors["bias"],
                metadata["space"],
                statistics,
                tensors.get("zero_shot"),
                settings,
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{source}: its parts do not fit together; fit the head again.") from error

    def to_bytes(self) -> bytes:
        """Return the head file described in the module docstring; the same head gives the same bytes."""
        statistics = self.statistics
        tensors: dict[str, NDArray[Any]] = {
            "weights": self.weights,
            "bias": self.bias,
            "counts": statistics.counts,
            "sums": statistics.sums,
            "rows": np.concatenate(statistics.rows),
            "row_counts": np.array([len(each) for each in statistics.rows], np.int64),
        }
        if self.zero_shot is not None:
            tensors["zero_shot"] = self.zero_shot
        return seal(
            tensors,
            {
                "format": _FORMAT,
                "schema": "1",
                "names": json.dumps(self.names, ensure_ascii=False),
                "space": self.space,
                "settings": json.dumps(asdict(self.settings), sort_keys=True),
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head file, replacing an older one at once.

        Raises:
            InputError: it cannot be written.
        """
        write_atomic(Path(path), self.to_bytes())

    def logits(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits ``(B, C)`` of unit embeddings ``(B, E)``; scores are their softmax."""
        return embeddings @ self.weights.T + self.bias


@dataclass(frozen=True, eq=False)
class FewShotGate:
    """Tells pictures of none of a head's classes (the protocol :class:`edgeclip.reject.Gate`).

    The score of a class is its cosine with the mean of its pictures plus its cosine with its name, each over
    its standard deviation among the head's own pictures; that of a picture is the best of them. Both are one
    product, for they add up to one row a class.

    Attributes:
        rows: ``(C, E)``, not of unit length.
        threshold: least score that is accepted.
        method: what the score is.
    """

    rows: NDArray[np.float32]
    threshold: float
    method: str = "class-cosines"

    @property
    def threshold_alone(self) -> float:
        """Least score with which a class by itself counts as seen."""
        return self.threshold

    def scores(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the score of each picture ``(B,)``; more means "one of the classes".

        Args:
            own: ``(B, C)`` logits, which are not looked at.
            others: ``(B, C)`` products with :attr:`rows`.
        """
        best: NDArray[np.float64] = others.max(axis=1).astype(np.float64)
        return best

    def alone(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the score of every class by itself, ``(B, C)``."""
        return others.astype(np.float64)


def gate_of(head: FewShotHead, threshold: float | None = None) -> FewShotGate:
    """Return what tells pictures of none of a head's classes.

    Args:
        head: the head.
        threshold: in place of the fitted one.

    Raises:
        ConfigError: the head was fitted on a picture a class without words, which say nothing about others.
    """
    rejecting = head.settings.rejecting
    if rejecting is None:
        raise ConfigError(
            "rejection: this head was fitted without words on one picture a class, which does not tell what "
            "belongs to none of them; fit it on more pictures."
        )
    means = head.statistics.means
    rows = rejecting.pictures * means / np.linalg.norm(means, axis=1, keepdims=True)
    if head.zero_shot is not None:
        rows = rows + rejecting.words * head.zero_shot
    return FewShotGate(rows.astype(np.float32), rejecting.threshold if threshold is None else threshold)


def read_head(bundle: Bundle, name: str | None = None) -> FewShotHead:
    """Return a few-shot head that is stored in a bundle.

    Args:
        bundle: the bundle.
        name: of the entry; may be left out where there is only one.

    Raises:
        ConfigError: there is none of this name, or several.
        BundleError: it is damaged.
    """
    found = [key for key, entry in bundle.manifest.heads.items() if entry.kind == KIND]
    if name is None and len(found) == 1:
        name = found[0]
    if name not in found:
        raise ConfigError(
            f"{bundle.where}: has no few-shot head {name or 'by default'!r}, expected one of "
            f"{', '.join(map(repr, found)) or 'none'}; store one with `edgeclip heads fit --write`."
        )
    where = f"{bundle.where}: head {name!r}"
    try:
        return FewShotHead.from_bytes(bundle.read(bundle.manifest.heads[name].file), source=where)
    except InputError as error:
        raise BundleError(str(error)) from error
