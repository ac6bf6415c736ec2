"""Gates say whether any offered label fits a picture at all: "none of these", which a softmax cannot say.

A gate is made when labels are set, from a head of kind ``reject`` that belongs to no bank. For a picture it
is given two kinds of cosines, with the offered labels and with rows of its own, and returns a score in
which more means "one of the labels". It never changes which label is first.

*Method* ``negatives``. General names, encoded once, stand for everything that was not offered. With ``c``
the cosines of the N labels offered, ``d`` those of the background rows, ``t`` the cosines of these rows with
the text of the first label, and numbers ``s``, ``w``, ``k`` of the head, the score of a picture is::

    log Σ exp(s · c) − w · log Σ exp(s · (d + k · ln N · t))

With ``w = 1`` and ``k = 0`` these are the log odds of the labels against the background: NegLabel (Jiang et
al. 2024, eq. 4, all negatives in one group). A smaller ``w`` trusts the cosine itself more, as a model needs
whose first guess is often wrong. What is accepted wrongly of many labels is a near miss, a deer for an
antelope: the more are offered, the more count rows near to the first one. A label by itself has the score
``s · c − w · log Σ exp(s · d)``, the same for N = 1. Background rows that mean an offered label are left out:
those with one of its names or synonyms, and those whose text is closer to it than ``overlap``. *Kinds* of a
label (breeds, for dog) stand on its side: a picture of a kind is one of the label, whose own cosine is small
because it is the mean of many. Each counts as a twentieth of a label.

*Method* ``no`` (the idea of CLIPN, Wang et al. 2023, without its second text tower). The rows are texts
that deny each label ("a photo without {}"), ``n`` their cosines; the score is ``s · (c − n)`` of the first
label: the log odds of yes against no. It is worth what the model learnt of "without": docs/rejection.md.

*Threshold.* The best of many labels fits a strange picture better than one does, so the threshold depends
on how many are offered. The head holds those of some numbers of labels, each accepting the same share of
pictures without a right label; between them it is interpolated along ``ln N``, and beyond them it stays.

**Head file.** Safetensors with float tensors ``scale`` (s), ``threshold`` ``(K,)`` with integers
``offered`` ``(K,)``, rising, for ``negatives`` also ``weight`` (w) and ``overlap``; metadata ``method``,
and ``templates`` (JSON list) for ``no``. ``threshold`` is that of the best of so many labels by themselves;
that of all of them is ``together`` ``(K,)``, with ``nearness`` (k). A head of ``negatives`` without these,
as they were written before, judges pictures by their best label alone. The background is the bank that the
manifest names as ``background_bank``: only its rows ``bank_rows`` (integers), where the head lists some, and
``more`` rows of the head's own, named by the metadata ``labels`` (JSON, as label files), in four bits a
number: ``(M, ⌈E / 2⌉)`` uint8, the lower four bits first, each holding the number plus 8, times
``more_scales`` ``(M,)``. ``kinds``, where there are any, is uint8: JSON compressed by zlib, for each name in
lower case the background rows that are kinds of it.
"""

from __future__ import annotations

import json
import math
import threading
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import BundleError, ConfigError, InputError
from .heads import MAX_SCALE, cosines
from .label_sets import LabelSet, Templates, labels_from_bytes
from .labels import LabelBank
from .tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bundle import Bundle, HeadEntry, Manifest
    from .label_sets import Label

    Encode = Callable[[Sequence[str]], NDArray[np.float32]]

__all__ = [
    "METHODS",
    "Gate",
    "NegativesGate",
    "NoGate",
    "RejectHead",
    "kinds_of",
    "meaning",
    "open_gate",
    "read_background",
    "read_reject_head",
]

METHODS = ("negatives", "no")
KIND_COUNTS = 0.05
"""What a kind counts as where the threshold is chosen by the number of labels; docs/rejection.md."""
_MOST_KINDS_BYTES = 1 << 24
_MOST_NEARNESS = 5.0  # of a row that is the first label: sums of exponentials stay doubles
_ARTICLES = ("a", "an", "the")
_PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"), ("es", ""), ("s", ""))


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
        """Return the score of every label by itself, ``(B, N)``: finite."""
        ...


@dataclass(frozen=True, eq=False)
class NegativesGate:
    """Labels against the background; see the module docstring.

    Attributes:
        rows: ``(M, E)`` background rows that mean none of the labels.
        threshold: least score that is accepted.
        threshold_alone: least score of a label by itself.
        scale: multiplier of the cosines.
        weight: of the background.
        kinds: for a label that has kinds its column, and their rows; these are the first of ``rows``.
        handicaps: ``(N,)`` taken off the score of each label by itself: ``threshold_alone`` is that of the
            label with most kinds, and others need less.
        texts: ``(N, E)`` embeddings of the labels; ``None`` judges a picture by its best label alone.
        nearness: ``k · ln N``: of the cosines of background rows and the first label.
    """

    rows: NDArray[np.float32]
    threshold: float
    threshold_alone: float
    scale: float
    weight: float
    method: str = "negatives"
    kinds: tuple[tuple[int, NDArray[np.intp]], ...] = ()
    handicaps: NDArray[np.float64] | float = 0.0
    texts: NDArray[np.float32] | None = None
    nearness: float = 0.0

    def scores(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the score of all labels together, ``(B,)``."""
        own, others, lifting = self._lifted(own, others)
        if self.texts is None:
            return np.asarray(own.max(axis=1) * self.scale - self.weight * self._sum(others))
        if self.nearness:
            first = self.texts[own.argmax(axis=1)]
            others = others + self.nearness * cosines(first, self.rows[lifting:])
        return self._sum(own) - self.weight * self._sum(others)

    def alone(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``scale · own − weight · log Σ exp(scale · others)``, ``(B, N)``."""
        own, others, _ = self._lifted(own, others)
        return np.asarray(own * self.scale - self.weight * self._sum(others)[:, None] - self.handicaps)

    def _lifted(
        self, own: NDArray[np.float32], others: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
        """Return the cosines of labels or their kinds, of the background, and how many rows are kinds."""
        if not self.kinds:
            return own, others, 0
        own, first = own.copy(), 0
        for column, rows in self.kinds:
            own[:, column] = np.maximum(own[:, column], others[:, rows].max(axis=1))
            first = max(first, int(rows.max()) + 1)
        return own, others[:, first:], first

    def _sum(self, cosines: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``log Σ exp(scale · cosines)``, ``(B,)``."""
        # Cosines times a scale of at most 100: in double precision nothing need be taken off first.
        return np.asarray(np.log(np.exp(cosines * self.scale, dtype=np.float64).sum(axis=1)))


@dataclass(frozen=True, eq=False)
class NoGate:
    """Each label against its denial; see the module docstring.

    Attributes:
        rows: ``(N, E)`` embeddings of the denied labels, in the order of the labels.
        threshold: least score that is accepted.
        threshold_alone: least score of a label by itself.
        scale: multiplier of the cosines.
    """

    rows: NDArray[np.float32]
    threshold: float
    threshold_alone: float
    scale: float
    method: str = "no"

    def scores(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``scale · (own − others)`` of the first label, ``(B,)``."""
        first = own.argmax(axis=1)[:, None]
        result: NDArray[np.float64] = np.take_along_axis(self.alone(own, others), first, axis=1)[:, 0]
        return result

    def alone(self, own: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return ``scale · (own − others)``, ``(B, N)``."""
        return np.asarray(self.scale * (own.astype(np.float64) - others))


@dataclass(frozen=True, eq=False)
class RejectHead:
    """A ``reject`` head.

    Attributes:
        method: one of :data:`METHODS`.
        scale: multiplier of the cosines, above 0 and at most 100; ``None`` is that of the labels' own head.
        threshold: least score of the best label by itself, for each number of labels in ``offered``.
        offered: numbers of labels, rising.
        weight: of the background (``negatives``).
        overlap: text-text cosine above which a background row means an offered label (``negatives``).
        templates: texts that deny a label (``no``).
        bank_rows: rows of the background bank that are used; ``None`` for all.
        more: labels and rows beside the background bank's.
        kinds: for names in lower case the background rows that are kinds of them.
        together: least score of all labels together, as ``threshold`` is (``negatives``); empty for a head
            that judges pictures by their best label.
        nearness: how much background rows near to the first label count, for each e-fold of labels.
    """

    method: str = "negatives"
    scale: float | None = None
    threshold: tuple[float, ...] = (0.0,)
    offered: tuple[int, ...] = (1,)
    weight: float = 1.0
    overlap: float = 1.0
    templates: tuple[str, ...] = ()
    bank_rows: NDArray[np.integer[Any]] | None = None
    more: tuple[LabelSet, NDArray[np.float32]] | None = None
    kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    together: tuple[float, ...] = ()
    nearness: float = 0.0

    def least(self, labels: float, *, alone: bool = False) -> float:
        """Return the threshold of so many labels, interpolated along the logarithm of their number.

        Args:
            labels: how many; kinds count a little.
            alone: that of the best of them by itself, rather than of what the gate's ``scores`` are.
        """
        table = self.threshold if alone or not self.together else self.together
        return float(np.interp(math.log(labels), np.log(self.offered), table))

    def near(self, labels: float) -> float:
        """Return how much rows near to the first of so many labels count; thresholds know no more of them."""
        return self.nearness * math.log(min(labels, self.offered[-1]))

    def background(self, bank: LabelBank, *, where: str = "background") -> LabelBank:
        """Return the rows of a background bank that are used, and those of the head behind them.

        Raises:
            BundleError: the head belongs to another bank.
        """
        if self.bank_rows is None and self.more is None:
            return bank
        used = np.arange(len(bank)) if self.bank_rows is None else self.bank_rows
        if not len(used) or used.min() < 0 or used.max() >= len(bank):
            raise BundleError(
                f"{where}: has {len(bank)} rows, but the `reject` head names others: write that head again."
            )
        labels, rows = [bank.labels.labels[int(row)] for row in used], bank.embeddings[used]
        if self.more is not None:
            labels += self.more[0].labels
            rows = np.concatenate([rows, self.more[1]])
        try:
            return replace(bank, labels=LabelSet.of(labels), embeddings=rows, truncated=())
        except (InputError, ValueError) as error:
            raise BundleError(f"{where}, with the `reject` head's own names: {error}") from error

    @classmethod
    def from_bytes(cls, content: bytes, *, embed_dim: int, where: str = "reject head") -> RejectHead:
        """Return the head in the content of a head file.

        Raises:
            BundleError: it is damaged, or of a method that this version does not know; begins with ``where``.
        """
        tensors, metadata = read_tensors(content, where=where)
        method = metadata.get("method", "")
        if method not in METHODS:
            raise BundleError(
                f"{where}: rejects by method {method[:40]!r}, expected one of "
                f"{', '.join(map(repr, METHODS))}: install a newer edgeclip."
            )
        scale = _numbers(tensors, "scale", 1, where)[0] if "scale" in tensors else None
        if scale is not None and not 0 < scale <= MAX_SCALE:
            raise BundleError(f"{where}: scale is {scale:g}, expected above 0 and at most {MAX_SCALE:g}.")
        offered = _integers(tensors, "offered", where)
        if offered is None or not len(offered) or offered[0] < 1 or (np.diff(offered) < 1).any():
            raise BundleError(f"{where}: 'offered' is {offered}, expected rising numbers from 1.")
        least = tuple(_numbers(tensors, "threshold", len(offered), where))
        counts = tuple(offered.tolist())
        try:
            if method == "no":
                templates = Templates.of(_strings(metadata.get("templates", ""))).texts
                return cls(method, scale, least, counts, templates=templates)
            return cls(
                method,
                scale,
                least,
                counts,
                _numbers(tensors, "weight", 1, where)[0],
                _numbers(tensors, "overlap", 1, where)[0],
                bank_rows=_integers(tensors, "bank_rows", where),
                more=_more(tensors, metadata, embed_dim, where),
                kinds=_kinds(tensors, where),
                **_together(tensors, counts, where),
            )
        except (InputError, ConfigError) as error:
            raise BundleError(f"{where}: {error}") from error

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Return the head file described in the module docstring, with further metadata."""
        tensors: dict[str, NDArray[Any]] = {
            "threshold": np.array(self.threshold, np.float32),
            "offered": np.array(self.offered, np.int32),
        }
        said = {**(metadata or {}), "method": self.method}
        if self.scale is not None:
            tensors["scale"] = np.array(self.scale, np.float32)
        if self.method == "no":
            said["templates"] = json.dumps(self.templates, ensure_ascii=False)
            return write_tensors(tensors, said)
        tensors["weight"] = np.array(self.weight, np.float32)
        tensors["overlap"] = np.array(self.overlap, np.float32)
        if self.together:
            tensors["together"] = np.array(self.together, np.float32)
            tensors["nearness"] = np.array(self.nearness, np.float32)
        if self.bank_rows is not None:
            tensors["bank_rows"] = self.bank_rows.astype(np.int32)
        if self.kinds:
            kinds = json.dumps(self.kinds, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
            tensors["kinds"] = np.frombuffer(zlib.compress(kinds.encode(), 9), np.uint8)
        if self.more is not None:
            labels, rows = self.more
            tensors["more"], tensors["more_scales"] = _to_four_bits(rows)
            said["labels"] = json.dumps(
                [label.to_json() for label in labels.labels], ensure_ascii=False, separators=(",", ":")
            )
        return write_tensors(tensors, said)


def open_gate(
    bundle: Bundle,
    labels: LabelBank,
    *,
    scale: float,
    threshold: float | None = None,
    background: LabelBank | None = None,
    encode: Encode | None = None,
) -> Gate:
    """Return the gate for a set of labels.

    Args:
        bundle: with a ``reject`` head, and for its method ``negatives`` a background bank.
        labels: those offered.
        scale: multiplier of the cosines where the head has none of its own.
        threshold: in place of the head's.
        background: the bundle's background bank, where it was read already; for the method ``no`` a bank
            that holds the labels' denials under the labels' names.
        encode: for the method ``no``: texts to unit embeddings ``(B, E)``.

    Raises:
        ConfigError: the bundle has no background bank or no ``reject`` head, the threshold is no number, the
            labels cover the whole background, or nothing gives the denials.
        BundleError: head or bank are damaged.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise ConfigError(f"rejection threshold: got {threshold!r}, expected a finite number.")
    head = read_reject_head(bundle)
    if head.method == "no":
        rows = _denials(bundle, head, labels, background, encode)
        least, alone = (head.least(len(labels)), head.least(1)) if threshold is None else (threshold,) * 2
        return NoGate(rows, least, alone, head.scale or scale)
    own = _background(bundle, background)
    same = meaning(labels, own, head.overlap)
    of_label = kinds_of(head, labels, own) & ~same
    lifted = np.flatnonzero(of_label.any(axis=0))
    kept = ~(same | of_label).any(axis=0)
    if not kept.any():
        raise ConfigError(
            f"{bundle.where}: the {len(labels)} labels offered cover all {len(own)} names of its "
            "background, so nothing is left to reject them for: offer fewer, or do without rejection."
        )
    counts = of_label.sum(axis=1)
    offered = len(labels) + KIND_COUNTS * float(counts.sum())
    if threshold is None:
        least = head.least(offered)
        different, which = np.unique(counts, return_inverse=True)
        of_each = np.array([head.least(1 + KIND_COUNTS * count, alone=True) for count in different.tolist()])
        of_each = of_each[which]
    else:
        least, of_each = threshold, np.full(len(labels), threshold)
    alone = float(of_each.max())
    return NegativesGate(
        np.concatenate([own.embeddings[lifted], own.embeddings[kept]]),
        least,
        alone,
        head.scale or scale,
        head.weight,
        kinds=tuple(
            (column, np.searchsorted(lifted, np.flatnonzero(of_label[column])))
            for column in np.flatnonzero(counts).tolist()
        ),
        handicaps=of_each - alone,
        texts=labels.embeddings if head.together else None,
        nearness=head.near(offered),
    )


def meaning(labels: LabelBank, background: LabelBank, overlap: float) -> NDArray[np.bool_]:
    """Return which background rows mean which label, ``(N, M)``.

    They do where they share a name or synonym in any language, without regard to case, Unicode form and an
    English plural of the label, or where the cosine of their embeddings is above ``overlap``.
    """
    same: NDArray[np.bool_] = cosines(labels.embeddings, background.embeddings) > overlap
    rows = _rows_by_phrase(background)
    for column, label in enumerate(labels.labels.labels):
        for phrase in _phrases(label):
            same[column, _of_phrase(phrase, rows)] = True
    return same


def read_background(bundle: Bundle) -> LabelBank:
    """Return the background of a bundle: rows of its background bank, and those of its ``reject`` head.

    It is read at the first call and kept as long as the bundle.

    Raises:
        ConfigError: it has no background bank.
        BundleError: bank or head are damaged.
    """
    return _background(bundle, None)


def read_reject_head(bundle: Bundle) -> RejectHead:
    """Return the ``reject`` head of a bundle; those of a label bank are of :mod:`edgeclip.multi`.

    Raises:
        ConfigError: it has none.
        BundleError: it is damaged, or of a method that this version does not know.
    """
    kept = _kept(bundle)
    if kept.head is None:
        found = _entry(bundle.manifest)
        if found is None:
            raise ConfigError(_nothing_there(bundle, "head of kind 'reject'"))
        name, entry = found
        where = f"{bundle.where}: head {name!r}"
        embed_dim = bundle.manifest.model.embed_dim
        kept.head = RejectHead.from_bytes(bundle.read(entry.file), embed_dim=embed_dim, where=where)
    return kept.head


def kinds_of(head: RejectHead, labels: LabelBank, background: LabelBank) -> NDArray[np.bool_]:
    """Return which background rows are kinds of which label, ``(N, M)``; some may mean it as well.

    Raises:
        BundleError: the head belongs to another background.
    """
    kinds = np.zeros((len(labels), len(background)), np.bool_)
    for column, label in enumerate(labels.labels.labels if head.kinds else ()):
        rows = [row for phrase in _phrases(label) for row in _of_phrase(phrase, head.kinds)]
        if rows and max(rows) >= len(background):
            raise BundleError(
                f"the `reject` head names kinds of {label.name!r} beyond the {len(background)} rows of the "
                "background: write that head again."
            )
        kinds[column, rows] = True
    return kinds


# --- inside ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Kept:
    """What was read of an open bundle: labels of a live camera change often."""

    head: RejectHead | None = None
    background: LabelBank | None = None


_KEPT: weakref.WeakKeyDictionary[Bundle, _Kept] = weakref.WeakKeyDictionary()
_BY_PHRASE: weakref.WeakKeyDictionary[LabelBank, dict[str, list[int]]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _rows_by_phrase(background: LabelBank) -> dict[str, list[int]]:
    """Return the rows of a background by what they are called: made once, kept as long as it is."""
    with _LOCK:
        known = _BY_PHRASE.get(background)
    if known is None:
        known = {}
        for row, label in enumerate(background.labels.labels):
            for phrase in _phrases(label):
                known.setdefault(phrase, []).append(row)
        with _LOCK:
            known = _BY_PHRASE.setdefault(background, known)
    return known


def _kept(bundle: Bundle) -> _Kept:
    with _LOCK:
        return _KEPT.setdefault(bundle, _Kept())


def _background(bundle: Bundle, bank: LabelBank | None) -> LabelBank:
    """Return what :func:`read_background` does; ``bank`` is the background bank, read already."""
    kept = _kept(bundle)
    if kept.background is None:
        name = bundle.manifest.background_bank
        if name is None:
            raise ConfigError(_nothing_there(bundle, "background bank"))
        where = f"{bundle.where}: background bank {name!r}"
        if bank is None:
            try:
                content = bundle.read(bundle.manifest.label_banks[name].file)
                bank = LabelBank.from_bytes(content, source=where)
            except InputError as error:
                raise BundleError(str(error)) from error
        if _entry(bundle.manifest) is not None:
            bank = read_reject_head(bundle).background(bank, where=where)
        kept.background = bank
    return kept.background


def _entry(manifest: Manifest) -> tuple[str, HeadEntry] | None:
    """Return the ``reject`` head that belongs to no bank."""
    for name, entry in manifest.heads.items():
        if entry.kind == "reject" and entry.bank is None:
            return name, entry
    return None


def _nothing_there(bundle: Bundle, what: str) -> str:
    return (
        f"{bundle.where}: has no {what}, so it cannot tell that no label fits: fit one with "
        "`edgeclip heads reject BUNDLE --data DIR --write`, take a bundle that has one, as 'default' has, "
        "or do without rejection."
    )


def _numbers(tensors: dict[str, NDArray[Any]], key: str, count: int, where: str) -> list[float]:
    value = tensors.get(key)
    if value is None or value.size != count or value.dtype.kind != "f" or not np.isfinite(value).all():
        raise BundleError(
            f"{where}: expected a finite float tensor {key!r} of {count}, got {sorted(tensors)}: "
            "write the head again."
        )
    return [float(each) for each in value.ravel()]


def _strings(text: str) -> list[str]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    return said if isinstance(said, list) else []


def _integers(tensors: dict[str, NDArray[Any]], key: str, where: str) -> NDArray[np.intp] | None:
    values = tensors.get(key)
    if values is None:
        return None
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise BundleError(f"{where}: {key!r} is {values.dtype} {values.shape}, expected integers (K,).")
    return values.astype(np.intp)


def _together(tensors: dict[str, NDArray[Any]], offered: Sequence[int], where: str) -> dict[str, Any]:
    if "together" not in tensors:
        return {}
    nearness = _numbers(tensors, "nearness", 1, where)[0]
    if not 0 <= nearness * math.log(offered[-1]) <= _MOST_NEARNESS:
        raise BundleError(
            f"{where}: nearness is {nearness:g} for up to {offered[-1]} labels, expected 0 to "
            f"{_MOST_NEARNESS / max(math.log(offered[-1]), 1):g}: write the head again."
        )
    return {"together": tuple(_numbers(tensors, "together", len(offered), where)), "nearness": nearness}


def _kinds(tensors: dict[str, NDArray[Any]], where: str) -> dict[str, tuple[int, ...]]:
    packed = tensors.get("kinds")
    if packed is None:
        return {}
    try:
        unpacking = zlib.decompressobj()
        said = unpacking.decompress(packed.tobytes(), _MOST_KINDS_BYTES)
        kinds = json.loads(said)
        found = {str(name): tuple(int(row) for row in rows) for name, rows in kinds.items()}
        if any(row < 0 for rows in found.values() for row in rows):
            raise ValueError("a row is negative")
    except (zlib.error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{where}: its kinds are damaged ({' '.join(str(error).split())[:80]}): write the head again."
        ) from error
    return found


def _more(
    tensors: dict[str, NDArray[Any]], metadata: dict[str, str], embed_dim: int, where: str
) -> tuple[LabelSet, NDArray[np.float32]] | None:
    if "more" not in tensors and "more_scales" not in tensors:
        return None
    packed, scales = tensors.get("more", np.empty(0)), tensors.get("more_scales", np.empty(0))
    labels = labels_from_bytes(
        metadata.get("labels", "").encode("utf-8", "replace"), source=where, as_json=True
    )
    expected = (len(labels), -(-embed_dim // 2))
    if packed.shape != expected or packed.dtype != np.uint8 or scales.shape != expected[:1]:
        raise BundleError(
            f"{where}: 'more' is {packed.dtype} {packed.shape} with scales {scales.shape}, expected uint8 "
            f"{expected} and {expected[:1]}: write the head again."
        )
    rows = _from_four_bits(packed, scales.astype(np.float32))[:, :embed_dim]
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise BundleError(f"{where}: 'more' has a row without direction: write the head again.")
    return labels, rows / length


def _to_four_bits(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return rows ``(M, E)`` as ``(M, ⌈E / 2⌉)`` bytes and their scales ``(M,)``."""
    scales = np.abs(rows).max(axis=1) / 7
    levels = np.rint(rows / scales[:, None]).astype(np.int8) + 8
    if levels.shape[1] % 2:
        levels = np.concatenate([levels, np.full((len(levels), 1), 8, np.int8)], axis=1)
    levels = levels.astype(np.uint8)
    return levels[:, ::2] | levels[:, 1::2] << 4, scales.astype(np.float32)


def _from_four_bits(packed: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    levels = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    rows: NDArray[np.float32] = (levels.astype(np.float32) - 8) * scales[:, None]
    return rows


def _denials(
    bundle: Bundle, head: RejectHead, labels: LabelBank, bank: LabelBank | None, encode: Encode | None
) -> NDArray[np.float32]:
    """Return the embeddings of the denied labels ``(N, E)``: of a bank that holds them, or encoded."""
    if bank is None and encode is None and bundle.manifest.background_bank is not None:
        bank = read_background(bundle)
    if bank is not None and bank.templates.texts == head.templates:  # else it holds the names themselves
        rows = {name: row for row, name in enumerate(bank.names)}
        if all(name in rows for name in labels.names):
            return np.ascontiguousarray(bank.embeddings[[rows[name] for name in labels.names]])
    if encode is None:
        raise ConfigError(
            f"{bundle.where}: its `reject` head judges labels against their denials, and nothing here can "
            "encode those of the labels offered: use a bundle with a text tower and a bank of denials."
        )
    texts = [template.replace("{}", name) for name in labels.names for template in head.templates]
    embeddings = np.asarray(encode(texts), np.float32).reshape(len(labels), len(head.templates), -1)
    means = embeddings.mean(axis=1)
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)


def _phrases(label: Label) -> Iterator[str]:
    """Yield a label's names and synonyms in all its languages, in a form that equal ones share.

    Case, Unicode form and an English article make no difference.
    """
    for phrase in (label.name, *label.synonyms):
        same = phrase.casefold() if phrase.isascii() else unicodedata.normalize("NFKC", phrase).casefold()
        first, _, rest = same.partition(" ")
        yield rest if rest and first in _ARTICLES else same
    for _, alias in label.aliases:
        yield from _phrases(alias)


def _of_phrase(phrase: str, table: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """Return what a table has for a phrase, else for its singular: people offer "dogs" as well as "dog"."""
    found = table.get(phrase)
    if found is not None:
        return found
    singulars = (phrase[: -len(end)] + single for end, single in _PLURALS if phrase.endswith(end))
    return next((table[each] for each in singulars if each in table), ())
