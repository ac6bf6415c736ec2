"""Label banks: labels × prompt templates as unit embeddings, encoded once and kept.

The embedding of a label is ``normalise(mean over phrases(normalise(mean over templates(e))))``, ``e`` the
unit embeddings of the text tower. The phrases are the name and its synonyms (each put into every template)
and the descriptions (as they stand). With one phrase this is CLIP's prompt ensembling (Radford et al. 2021,
§3.1.4); averaging phrases after normalising them gives each the same weight, however its templates agree.

**Bank file.** Safetensors with a tensor ``embeddings``, ``(N, E)`` float16 or float32, unit rows, and
metadata:

============== =========================================================================================
``format``     ``edgeclip-label-bank``
``schema``     ``1``
``labels``     JSON list of N labels, as :mod:`edgeclip.label_sets` reads them (a name, or an object)
``templates``  JSON ``{"name": …, "texts": […]}``
``space``      the manifest's ``model.embedding_space``
``tower``      digest of text tower and tokenizer, as :meth:`TextEncoder.digest`; may be absent
``truncated``  JSON list of the rows of labels whose texts were cut at the context length; may be absent
``crc32``      of the tensor bytes; may be absent
============== =========================================================================================

Made by ``LabelBank(LabelSet.of(names), embeddings, Templates.of("one"), space=…, tower=…)`` and
:meth:`LabelBank.save` or :meth:`LabelBank.to_bytes`. ``.npy`` files hold embeddings alone; their labels come
from a ``.txt`` or ``.json`` file of the same name beside them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .errors import InputError
from .label_sets import TEMPLATES, Label, LabelSet, Templates, labels_from_bytes, parse_labels, read_labels
from .label_store import LabelStore, StoredVectors, is_sound, seal
from .tensors import read_tensors
from .text_encoder import TEXTS_A_CALL, even_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .runtime.latency import Clock

__all__ = [
    "TEMPLATES",
    "BankProgress",
    "Encoder",
    "Label",
    "LabelBank",
    "LabelSet",
    "Templates",
    "build_bank",
    "parse_labels",
    "read_labels",
]

_FORMAT = "edgeclip-label-bank"
_MAX_BANK_BYTES = 1 << 30
_UNIT_TOLERANCE = (
    5e-3  # float16 rows of E = 1024 are off by up to 5e-4; ten times that is no rounding any more
)


@dataclass(frozen=True, eq=False)
class LabelBank:
    """Labels and their unit embeddings, ready for the head.

    Attributes:
        labels: N labels.
        embeddings: ``(N, E)`` float32, unit rows, read-only; may be a memory map.
        templates: what the labels were put into.
        space: digest of the embedding space; banks and pictures of two spaces must not meet.
        tower: digest of text tower and tokenizer, empty when not known.
        truncated: names of labels whose texts were cut at the context length.

    Raises:
        InputError: shapes disagree, or a row is not finite or not of unit length.
    """

    labels: LabelSet
    embeddings: NDArray[np.float32]
    templates: Templates
    space: str = ""
    tower: str = ""
    truncated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        embeddings = self.embeddings
        if embeddings.ndim != 2 or len(embeddings) != len(self.labels) or not embeddings.shape[1]:
            raise InputError(
                f"label bank: embeddings of shape {embeddings.shape} for {len(self.labels)} labels, "
                f"expected ({len(self.labels)}, E)."
            )
        if embeddings.dtype != np.float32:
            object.__setattr__(self, "embeddings", _unit(np.asarray(embeddings, np.float32)))
        squares = np.einsum("ij,ij->i", self.embeddings, self.embeddings)
        wrong = ~(np.abs(squares - 1) <= 2 * _UNIT_TOLERANCE)  # also true for NaN
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(
                f"label bank: the embedding of {self.labels.names[row]!r} has length "
                f"{float(np.sqrt(squares[row])):.4g}, expected 1. Normalise the rows."
            )
        if self.embeddings.flags.writeable:
            view = self.embeddings.view()
            view.flags.writeable = False
            object.__setattr__(self, "embeddings", view)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the rows."""
        return self.labels.names

    @cached_property
    def rows(self) -> Mapping[bytes, int]:
        """The row of each label, by the key of its vector; see :func:`label_keys`."""
        keys = label_keys(self.labels, self.templates, self.tower)
        return {key: row for row, key in enumerate(keys)}

    def __len__(self) -> int:
        return len(self.labels)

    def to_bytes(self, *, dtype: Literal["float16", "float32"] = "float32") -> bytes:
        """Return the bank file described in the module docstring; the same bank gives the same bytes."""
        return self._sealed(dtype, [label.to_json() for label in self.labels.labels])

    def save(self, path: str | os.PathLike[str], *, dtype: Literal["float16", "float32"] = "float32") -> None:
        """Write the bank file, replacing an older one at once."""
        write_atomic(Path(path), self.to_bytes(dtype=dtype))

    def _sealed(self, dtype: Literal["float16", "float32"], labels: list[Any]) -> bytes:
        rows = {name: row for row, name in enumerate(self.names)}
        return seal(
            {"embeddings": np.asarray(self.embeddings).astype(dtype, copy=False)},
            {
                "format": _FORMAT,
                "schema": "1",
                "labels": json.dumps(labels, ensure_ascii=False),
                "templates": json.dumps(
                    {"name": self.templates.name, "texts": self.templates.texts}, ensure_ascii=False
                ),
                "space": self.space,
                "tower": self.tower,
                "truncated": json.dumps([rows[name] for name in self.truncated]),
            },
        )

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, labels: LabelSet | None = None, space: str = ""
    ) -> LabelBank:
        """Return the bank in a safetensors or ``.npy`` file.

        Args:
            path: bank file.
            labels: for ``.npy``: its labels, where no file beside it names them.
            space: for ``.npy``: the embedding space its maker says it is of.

        Raises:
            InputError: unreadable, damaged or not a bank; the message names the file.
        """
        path = Path(path)
        content = _read_limited(path)
        if path.suffix.lower() != ".npy":
            return cls.from_bytes(content, source=repr(str(path)))
        if labels is None:
            beside = [path.with_suffix(suffix) for suffix in (".txt", ".json")]
            found = next((each for each in beside if each.is_file()), None)
            if found is None:
                raise InputError(f"{str(path)!r} holds no labels: put {beside[0].name!r} beside it.")
            labels = read_labels(found)
        return cls._from_npy(content, labels, space=space, source=repr(str(path)))

    @classmethod
    def from_bytes(cls, content: bytes, *, source: str = "label bank") -> LabelBank:
        """Return the bank in the content of a bank file.

        Raises:
            InputError: damaged or not a bank; the message begins with ``source``.
        """
        tensors, metadata = read_tensors(content, where=source, error=InputError)
        if metadata.get("format") != _FORMAT or "embeddings" not in tensors:
            raise InputError(f"{source}: safetensors, but no label bank; write it with LabelBank.save().")
        if metadata.get("schema") != "1":
            raise InputError(
                f"{source}: bank schema {metadata.get('schema', 'missing')!r}, expected '1'; "
                "install a newer edgeclip."
            )
        if not is_sound(tensors, metadata):
            raise InputError(f"{source}: its checksum does not match, the file is damaged.")
        labels = labels_from_bytes(
            metadata.get("labels", "").encode("utf-8", "surrogatepass"), source=source, as_json=True
        )
        try:
            said = json.loads(metadata["templates"])
            templates = Templates(str(said["name"]), Templates.of([*said["texts"]]).texts)
            truncated = tuple(labels.names[int(row)] for row in json.loads(metadata.get("truncated", "[]")))
        except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
            raise InputError(f"{source}: its templates or truncated labels are not readable.") from error
        try:
            return cls(
                labels,
                _float32(tensors["embeddings"]),
                templates,
                space=metadata.get("space", ""),
                tower=metadata.get("tower", ""),
                truncated=truncated,
            )
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def _from_npy(cls, content: bytes, labels: LabelSet, *, space: str, source: str) -> LabelBank:
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # numpy's header parser raises whatever it stumbles over
            raise InputError(f"{source}: not an .npy file, or damaged.") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2 or not array.size:
            shape = getattr(array, "shape", None)
            raise InputError(f"{source}: holds {type(array).__name__} {shape}, expected floats (N, E).")
        try:
            with np.errstate(all="ignore"):
                return cls(
                    labels, _unit(array.astype(np.float32)), Templates("unknown", ("{}",)), space=space
                )
        except InputError as error:
            raise InputError(f"{source}: {error}") from error


def _float32(embeddings: NDArray[Any]) -> NDArray[np.float32]:
    """Return float32 rows; float16 ones are brought back to unit length."""
    if embeddings.dtype == np.float32 or embeddings.ndim != 2:
        return embeddings
    if embeddings.dtype != np.float16:
        raise InputError(f"label bank: embeddings are {embeddings.dtype}, expected float32 or float16.")
    return _unit(embeddings.astype(np.float32))


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of unit length; a zero row stays zero and is refused by :class:`LabelBank`."""
    length = np.sqrt(np.einsum("...j,...j->...", rows, rows))[..., None]
    return np.asarray(rows / np.where(length > 0, length, 1), np.float32)


def _read_limited(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_BANK_BYTES:
            raise InputError(f"{str(path)!r}: {size} bytes, a label bank has at most {_MAX_BANK_BYTES}.")
        return path.read_bytes()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"label bank {str(path)!r} cannot be read: {reason}.") from error


# ---------------------------------------------------------------------------------------------- building


@dataclass(frozen=True)
class BankProgress:
    """How far the encoding of a bank is.

    Attributes:
        labels: labels to encode (those not found in a store), and ``labels_done`` of them.
        texts: texts to encode, and ``texts_done`` of them.
        remaining_s: estimated from the texts encoded so far; ``None`` before the first are.
    """

    labels: int
    labels_done: int
    texts: int
    texts_done: int
    remaining_s: float | None


class Encoder(Protocol):
    """What a bank is built with; :class:`edgeclip.text_encoder.TextEncoder` is one."""

    @property
    def digest(self) -> str:
        """Digest of everything the embedding of a text depends on."""
        ...

    @property
    def space(self) -> str:
        """Embedding space."""
        ...

    def encode(
        self, texts: Sequence[str], *, clock: Clock | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return unit embeddings ``(B, E)`` and which texts were cut."""
        ...


def build_bank(
    labels: LabelSet,
    templates: Templates,
    encoder: Encoder,
    *,
    recent: Sequence[LabelBank] = (),
    store: LabelStore | None = None,
    known: Callable[[], LabelBank | None] | None = None,
    use: Callable[[LabelBank], None] | None = None,
    on_progress: Callable[[BankProgress], None] | None = None,
    clock: Clock | None = None,
) -> LabelBank:
    """Return the bank of a label set, encoding only labels found in no other bank and not in the store.

    What is encoded goes to the store every few seconds, so a run that is killed continues where it stopped.
    The bank itself goes there only where there are no recent ones: what a process begins with, it is likely
    to begin with again; sets that change while it runs are put together from single vectors.

    Args:
        labels: the labels.
        templates: prompt templates.
        encoder: texts to embeddings; not asked when every label is found.
        recent: finished banks at hand, whose rows count for equal labels when templates and tower are the
            same.
        store: vectors kept on this host, asked for what is in none of them.
        known: gives one more finished bank, asked only where labels are still missing.
        use: called with the bank before what is new goes to the store; that happens even if it raises.
        on_progress: called after each batch.
        clock: where tokenizing and the text tower are timed.
    """
    digest = encoder.digest
    bank_key = ""
    if store is not None and not recent:
        said = json.dumps([label.to_json() for label in labels.labels])
        bank_key = hashlib.sha256("\0".join([digest, templates.digest, said]).encode()).hexdigest()
        cached = _from_store(store.bank(bank_key), labels, templates, encoder)
        if cached is not None:
            if use is not None:
                use(cached)
            return cached
    keys = label_keys(labels, templates, digest)
    found = StoredVectors()
    for bank in recent:
        _take_known(bank, keys, templates, digest, found)
    if store is not None:
        found.update(store.vectors([key for key in keys if key not in found.embeddings]))
    if known is not None and len(found.embeddings) < len(labels):
        _take_known(known(), keys, templates, digest, found)
    missing = {
        key: label for key, label in zip(keys, labels.labels, strict=True) if key not in found.embeddings
    }
    fresh = StoredVectors()
    if missing:
        fresh = _encode(missing, templates, encoder, found, store, on_progress=on_progress, clock=clock)
    try:
        bank = LabelBank(
            labels,
            np.stack([found.embeddings[key] for key in keys]),
            templates,
            space=encoder.space,
            tower=digest,
            truncated=tuple(
                label.name for key, label in zip(keys, labels.labels, strict=True) if key in found.truncated
            ),
        )
        if use is not None:
            use(bank)
    finally:
        if store is not None:
            store.put_vectors(fresh)
    if store is not None and not recent:
        store.put_bank(bank_key, bank.to_bytes())
    return bank


def _take_known(
    known: LabelBank | None, keys: Sequence[bytes], templates: Templates, tower: str, found: StoredVectors
) -> None:
    """Add the rows of a finished bank that stand for ``keys`` to ``found``."""
    if known is None or known.tower != tower or known.templates.digest != templates.digest:
        return
    rows, truncated = known.rows, set(known.truncated)
    for key in keys:
        if key in rows and key not in found.embeddings:
            found.embeddings[key] = known.embeddings[rows[key]]
            if known.labels.labels[rows[key]].name in truncated:
                found.truncated.add(key)


def label_keys(labels: LabelSet, templates: Templates, tower: str) -> list[bytes]:
    """Return the 32-byte key of each label's vector: hash of text tower, tokenizer, templates and label."""
    context = hashlib.sha256(f"{tower}\0{templates.digest}\0".encode())
    keys = []
    for label in labels.labels:
        key = context.copy()
        said = json.dumps([label.name, label.synonyms, label.descriptions])  # aliases are not encoded
        key.update(said.encode())
        keys.append(key.digest())
    return keys


def _from_store(
    found: tuple[dict[str, NDArray[Any]], dict[str, str]] | None,
    labels: LabelSet,
    templates: Templates,
    encoder: Encoder,
) -> LabelBank | None:
    """Return a whole bank of the store; its labels are those asked for, because its name is their hash."""
    if found is None:
        return None
    tensors, metadata = found
    with suppress(InputError, KeyError, IndexError, TypeError, ValueError):
        embeddings = tensors["embeddings"]
        if embeddings.dtype == np.float32 and metadata["tower"] == encoder.digest:
            truncated = tuple(labels.names[int(row)] for row in json.loads(metadata["truncated"]))
            return LabelBank(labels, embeddings, templates, encoder.space, encoder.digest, truncated)
    return None


_KEEP_EVERY_S = 5.0


def _encode(
    missing: Mapping[bytes, Label],
    templates: Templates,
    encoder: Encoder,
    found: StoredVectors,
    store: LabelStore | None,
    *,
    on_progress: Callable[[BankProgress], None] | None,
    clock: Clock | None,
) -> StoredVectors:
    """Encode ``missing`` into ``found``; return what is not in the store yet, which is of a few seconds."""
    plan = {key: label.texts(templates.texts) for key, label in missing.items()}
    total = sum(len(phrase) for phrases in plan.values() for phrase in phrases)
    queue = ((key, text) for key, phrases in plan.items() for phrase in phrases for text in phrase)
    waiting: dict[bytes, list[NDArray[np.float32]]] = {}
    fresh = StoredVectors()
    started = kept = time.perf_counter()
    texts_done = labels_done = 0
    try:
        for size in even_parts(total, TEXTS_A_CALL):
            batch = list(islice(queue, size))
            embeddings, cut = encoder.encode([text for _, text in batch], clock=clock)
            for (key, _), row, was_cut in zip(batch, embeddings, cut, strict=True):
                waiting.setdefault(key, []).append(row)
                if was_cut:
                    fresh.truncated.add(key)
            labels_done += _pool_finished(waiting, plan, missing, fresh)
            texts_done += len(batch)
            now = time.perf_counter()
            if store is not None and now - kept > _KEEP_EVERY_S:
                store.put_vectors(fresh)
                found.update(fresh)
                fresh, kept = StoredVectors(truncated=fresh.truncated & waiting.keys()), now
            if on_progress is not None:
                remaining_s = (now - started) / texts_done * (total - texts_done)
                on_progress(BankProgress(len(missing), labels_done, total, texts_done, remaining_s))
    except BaseException:  # Ctrl-C, say: the next run continues here
        if store is not None:
            store.put_vectors(fresh)
        raise
    found.update(fresh)
    return fresh


def _pool_finished(
    waiting: dict[bytes, list[NDArray[np.float32]]],
    plan: Mapping[bytes, tuple[tuple[str, ...], ...]],
    missing: Mapping[bytes, Label],
    fresh: StoredVectors,
) -> int:
    """Move the labels all of whose texts are encoded from ``waiting`` to ``fresh``; return how many."""
    alike: dict[tuple[int, ...], list[bytes]] = {}  # texts in each phrase -> labels with so many
    for key, rows in waiting.items():
        sizes = tuple(map(len, plan[key]))
        if len(rows) == sum(sizes):
            alike.setdefault(sizes, []).append(key)
    for sizes, keys in alike.items():
        vectors = _pool(np.stack([row for key in keys for row in waiting.pop(key)]), sizes)
        sound: list[bool] = np.logical_and(np.isfinite(vectors).all(axis=1), vectors.any(axis=1)).tolist()
        for key, vector, has_direction in zip(keys, vectors, sound, strict=True):
            if not has_direction:
                raise InputError(
                    f"label {missing[key].name!r}: its embedding has no direction; use another name or other "
                    "templates."
                )
            fresh.embeddings[key] = vector
    return sum(map(len, alike.values()))


def _pool(rows: NDArray[np.float32], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Return the vectors ``(N, E)`` of labels from their texts' embeddings, as the module docstring says.

    Args:
        rows: ``(N * T, E)``, the texts of each label one after the other.
        sizes: texts in each phrase, T in all; the same for every label.
    """
    each = rows.reshape(-1, sum(sizes), rows.shape[1])
    phrases = np.split(each, np.cumsum(sizes)[:-1], axis=1)
    means = np.stack([phrase.mean(axis=1) for phrase in phrases], axis=1)  # (N, phrases, E)
    return _unit(_unit(means).mean(axis=1))


def make_folder(folder: Path) -> None:
    """Make a folder that results go to later, so that one which cannot be written is known at once.

    Raises:
        InputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be written: {error.strerror or error}.") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that the old or the new content stands there, never a part.

    Raises:
        InputError: the directory is missing or not writable, or there stands something else than a file.
    """
    # Renaming would put the file in the place of a device. Path.exists raises where a name is too long.
    if os.path.exists(path) and not path.is_file():  # noqa: PTH110
        raise InputError(f"{str(path)!r} is no file, expected one to write over, or none. Name another.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C too
        with suppress(OSError, ValueError):
            temporary.unlink()
        if not isinstance(error, (OSError, ValueError)):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{str(path)!r} cannot be written: {reason}.") from error
