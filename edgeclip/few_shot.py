"""Few-shot heads: classes of one's own from a few pictures each, in closed form, as one linear layer.

Logits of a unit embedding ``x`` are ``x · W + b``. The file keeps what the layer was made of, so that a class
comes and goes without the pictures of the others.

**Head file.** Safetensors with ``weights`` ``(C, E)`` and ``bias`` ``(C,)`` float32, which is all that
answering needs; ``counts`` ``(C,)`` int64 pictures, ``sums`` ``(C, E)`` float64 of their embeddings, ``rows``
``(R, E)`` float32 and ``row_counts`` ``(C,)`` int64, so that the rows of a class have the second moment of
its pictures; ``zero_shot`` ``(C, E)`` float32, the text rows, where they were used. Metadata:

============== ===================================================================================
``format``     ``edgeclip-few-shot-head``
``schema``     ``1``
``names``      JSON list of C names
``space``      the manifest's ``model.embedding_space``
``settings``   JSON object, see :class:`Settings`
``crc32``      of the tensor bytes
============== ===================================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from .errors import InputError
from .label_store import is_sound, seal
from .labels import write_atomic
from .tensors import read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FewShotHead", "Method", "Settings", "Statistics", "fit_head"]

Method = Literal["blend", "gda", "mean", "zero-shot"]

_FORMAT: Final = "edgeclip-few-shot-head"
_MAX_HEAD_BYTES: Final = 1 << 31


@dataclass(frozen=True)
class Settings:
    """What was chosen when a head was fitted.

    Attributes:
        method: ``"blend"`` of words and pictures, ``"gda"`` of pictures alone, nearest class ``"mean"``, or
            ``"zero-shot"``.
        alpha: weight of the discriminant beside the words.
        shrinkage: of the covariance towards a multiple of the identity, 0 to 1.
        scale: multiplier of all logits, so that scores are right as often as they say.
        zero_shot_scale: multiplier of the text rows' cosines.
    """

    method: Method = "blend"
    alpha: float = 1.0
    shrinkage: float = 0.5
    scale: float = 1.0
    zero_shot_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a head needs to know of its pictures.

    Attributes:
        counts: ``(C,)`` pictures of each class.
        sums: ``(C, E)`` float64 sums of their embeddings.
        rows: for each class ``(R, E)`` float32 with the second moment of its pictures: their embeddings.
    """

    counts: NDArray[np.int64]
    sums: NDArray[np.float64]
    rows: tuple[NDArray[np.float32], ...]

    @classmethod
    def of(cls, embeddings: NDArray[np.float32], targets: NDArray[np.intp], classes: int) -> Statistics:
        """Return the statistics of embeddings ``(N, E)`` of the classes ``targets`` ``(N,)``."""
        rows = tuple(np.asarray(embeddings[targets == each], np.float32) for each in range(classes))
        return cls(
            np.array([len(each) for each in rows], np.int64),
            np.stack([each.sum(axis=0, dtype=np.float64) for each in rows]),
            rows,
        )

    @property
    def means(self) -> NDArray[np.float64]:
        """Means ``(C, E)`` of the classes."""
        return self.sums / self.counts[:, None]

    def scatter(self) -> NDArray[np.float64]:
        """Return the scatter ``(E, E)`` within classes, all of them together."""
        stacked = np.concatenate(self.rows).astype(np.float64)
        means = self.means
        return stacked.T @ stacked - (means * self.counts[:, None]).T @ means


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
        InputError: shapes disagree, or a number is not finite.
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
        if not self.names or self.weights.shape != shape or self.bias.shape != shape[:1]:
            raise InputError(
                f"few-shot head: weights of shape {self.weights.shape} and bias of {self.bias.shape} for "
                f"{len(self.names)} classes, expected ({len(self.names)}, E) and ({len(self.names)},)."
            )
        if not (np.isfinite(self.weights).all() and np.isfinite(self.bias).all()):
            raise InputError("few-shot head: its weights are not all finite numbers. Fit it again.")

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
    def from_bytes(cls, content: bytes, *, source: str = "few-shot head") -> FewShotHead:
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
            settings = Settings(**json.loads(metadata["settings"]))
            ends = np.cumsum(tensors["row_counts"])[:-1]
            statistics = Statistics(
                tensors["counts"], tensors["sums"], tuple(np.split(tensors["rows"], ends))
            )
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
        except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
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


def fit_head(
    embeddings: NDArray[np.float32],
    targets: NDArray[np.intp],
    names: Sequence[str],
    *,
    space: str,
    zero_shot: NDArray[np.float32] | None = None,
    settings: Settings | None = None,
) -> FewShotHead:
    """Return the head of labelled embeddings.

    Args:
        embeddings: ``(N, E)`` float32, unit rows.
        targets: ``(N,)`` classes, 0 to C − 1.
        names: of the C classes.
        space: embedding space of the rows.
        zero_shot: ``(C, E)`` unit text rows of the names.
        settings: what else would be chosen.
    """
    chosen = settings or Settings(method="blend" if zero_shot is not None else "gda")
    statistics = Statistics.of(embeddings, targets, len(names))
    weights, bias = _solve(statistics, zero_shot, chosen)
    return FewShotHead(tuple(names), weights, bias, space, statistics, zero_shot, chosen)


def _solve(
    statistics: Statistics, zero_shot: NDArray[np.float32] | None, settings: Settings
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weights ``(C, E)`` and bias ``(C,)``."""
    means = statistics.means
    width = means.shape[1]
    freedom = int(statistics.counts.sum()) - len(means)
    covariance = statistics.scatter() / max(freedom, 1)
    level = float(np.trace(covariance)) / width or 1.0 / width
    shrinkage = settings.shrinkage if freedom else 1.0
    covariance = (1 - shrinkage) * covariance + shrinkage * level * np.eye(width)
    weights = np.linalg.solve(covariance, means.T).T
    bias = -0.5 * np.einsum("ce,ce->c", weights, means)
    weights, bias = settings.alpha * weights, settings.alpha * bias
    if zero_shot is not None:
        weights = weights + settings.zero_shot_scale * zero_shot
    return (settings.scale * weights).astype(np.float32), (settings.scale * bias).astype(np.float32)
