"""Gates say whether any offered label fits a picture at all: "none of these", which a softmax cannot say.

A gate is made when labels are set, from the bundle's *background bank* (general names, encoded once) and its
head of kind ``reject``. For a picture it is given two kinds of cosines, with the offered labels and with
rows of its own, and returns a score in which more means "one of the labels". It never changes which label is
first.

Method ``negatives`` (negative labels, Jiang et al. 2024, their eq. 5 for one group, as log odds): with ``c``
the cosines of the offered labels, ``d`` those of the background rows and ``s`` the head's multiplier, the
score is ``s · max c − log Σ exp(s · d)``. Background rows that mean an offered label are left out.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .errors import BundleError, ConfigError, InputError
from .labels import LabelBank
from .tensors import read_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bundle import Bundle
    from .label_sets import Label

__all__ = ["Gate", "NegativesGate", "RejectHead", "open_gate", "read_background", "read_reject_head"]


class Gate(Protocol):
    """What accepts or rejects a picture, given its cosines."""

    @property
    def rows(self) -> NDArray[np.float32]:
        """``(M, E)`` unit rows of its own, multiplied with embeddings behind the labels'; M may be 0."""
        ...

    @property
    def threshold(self) -> float:
        """Least score that is accepted."""
        ...

    @property
    def threshold_alone(self) -> float:
        """Least score of a label by itself, as :meth:`alone` gives it, with which it counts as seen."""
        ...

    @property
    def method(self) -> str:
        """What the score is, as JSON output names it."""
        ...

    def scores(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the score of each picture ``(B,)``: finite, more means "one of the labels".

        Args:
            own: ``(B, N)`` cosines with the offered labels.
            others: ``(B, M)`` cosines with :attr:`rows`.
        """
        ...

    def alone(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the score of every label, as if it alone were offered, ``(B, N)``: finite."""
        ...


@dataclass(frozen=True)
class RejectHead:
    """The numbers of a ``reject`` head.

    Attributes:
        method: how the score is made.
        scale: multiplier of the cosines.
        overlap: text-text cosine above which a background row means an offered label.
        threshold: least score that is accepted.
    """

    method: str
    scale: float
    overlap: float
    threshold: float


@dataclass(frozen=True, eq=False)
class NegativesGate:
    """Log odds of the best label against the background; see the module docstring.

    Attributes:
        rows: ``(M, E)`` background rows that mean none of the labels.
        threshold: least score that is accepted.
        threshold_alone: least score of a label by itself.
        scale: multiplier of the cosines.
    """

    rows: NDArray[np.float32]
    threshold: float
    threshold_alone: float
    scale: float
    method: str = "negatives"

    def scores(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``scale · max own − log Σ exp(scale · others)``, ``(B,)``."""
        return self.alone(own.max(axis=1, keepdims=True), others)[:, 0]

    def alone(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``scale · own − log Σ exp(scale · others)``, ``(B, N)``."""
        background = np.log(np.exp(others * self.scale, dtype=np.float64).sum(axis=1, keepdims=True))
        return np.asarray(own * self.scale - background)


def open_gate(
    bundle: Bundle,
    labels: LabelBank,
    *,
    scale: float,
    threshold: float | None = None,
    background: LabelBank | None = None,
) -> Gate:
    """Return the gate for a set of labels.

    Args:
        bundle: with a background bank and a ``reject`` head.
        labels: those offered.
        scale: multiplier of the cosines where the head has none of its own.
        threshold: in place of the head's.
        background: the bundle's background bank, where it is at hand already.

    Raises:
        ConfigError: the bundle has no background bank or no ``reject`` head, or the threshold is no number.
        BundleError: one of them is damaged.
    """
    head = read_reject_head(bundle)
    if threshold is not None and not math.isfinite(threshold):
        raise ConfigError(f"rejection threshold: got {threshold!r}, expected a finite number.")
    background = background or read_background(bundle)
    alike = (background.embeddings @ labels.embeddings.T).max(axis=1) > head.overlap
    offered = {phrase for label in labels.labels.labels for phrase in _phrases(label)}
    for row, label in enumerate(background.labels.labels):
        if not alike[row] and not offered.isdisjoint(_phrases(label)):
            alike[row] = True
    if alike.all():
        raise ConfigError(
            f"{bundle.where}: the {len(labels)} labels offered cover all {len(background)} names of its "
            "background bank, so nothing is left to reject them for: offer fewer, or do without rejection."
        )
    least = head.threshold if threshold is None else threshold
    return NegativesGate(
        np.ascontiguousarray(background.embeddings[~alike]), least, least, head.scale or scale
    )


def read_background(bundle: Bundle) -> LabelBank:
    """Return the background bank of a bundle.

    Raises:
        ConfigError: it has none.
        BundleError: it is damaged.
    """
    name = bundle.manifest.background_bank
    if name is None:
        raise ConfigError(_nothing_there(bundle, "background bank"))
    where = f"{bundle.where}: background bank {name!r}"
    try:
        return LabelBank.from_bytes(bundle.read(bundle.manifest.label_banks[name].file), source=where)
    except InputError as error:
        raise BundleError(str(error)) from error


def read_reject_head(bundle: Bundle) -> RejectHead:
    """Return the ``reject`` head of a bundle.

    Raises:
        ConfigError: it has none.
        BundleError: it is damaged, or of a method that this version does not know.
    """
    for name, entry in bundle.manifest.heads.items():
        if entry.kind == "reject" and entry.bank is None:  # those of a bank: edgeclip.multi
            where = f"{bundle.where}: head {name!r}"
            tensors, metadata = read_tensors(bundle.read(entry.file), where=where)
            method = metadata.get("method", "")
            if method != "negatives":
                raise BundleError(
                    f"{where}: rejects by method {method[:40]!r}, expected 'negatives': "
                    "install a newer edgeclip."
                )
            numbers = {}
            for key in ("scale", "overlap", "threshold"):
                value = tensors.get(key)
                if (
                    value is None
                    or value.size != 1
                    or value.dtype.kind != "f"
                    or not np.isfinite(value).all()
                ):
                    raise BundleError(
                        f"{where}: expected one finite float tensor {key!r}, got {sorted(tensors)}."
                    )
                numbers[key] = float(value.reshape(()))
            return RejectHead(method, **numbers)
    raise ConfigError(_nothing_there(bundle, "head of kind 'reject'"))


def _nothing_there(bundle: Bundle, what: str) -> str:
    return (
        f"{bundle.where}: has no {what}, so it cannot tell that no label fits: fit one with "
        "`edgeclip heads reject BUNDLE --data DIR --write`, or classify without rejection."
    )


def _phrases(label: Label) -> Iterator[str]:
    """Yield a label's names and synonyms in all its languages, in a form that equal ones share."""
    for phrase in (label.name, *label.synonyms):
        yield phrase.casefold() if phrase.isascii() else unicodedata.normalize("NFKC", phrase).casefold()
    for _, alias in label.aliases:
        yield from _phrases(alias)
