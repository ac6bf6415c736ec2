"""The label vectors kept on this host.

``<host cache>/labels/<context>/`` holds

* ``vectors-*.safetensors``: chunks of ``keys`` (n, 32) uint8, ``embeddings`` (n, E) float32 and ``truncated``
  (n,) uint8. A key is the hash of text tower, tokenizer, templates and label, so a chunk never goes stale.
  Chunks are only ever added, each under its own name, and merged into one when there are many: processes need
  no lock.
* ``bank-*.safetensors``: whole banks as one file, so that a warm start maps one file and looks up no vectors.

An open store remembers which keys a chunk holds once it has read it (8 bytes a key), so that a chunk is read
again only where it may hold what is asked for. The folder is listed at each call: chunks of other processes
are noticed.

Files are safetensors whose metadata entry ``crc32`` covers the tensors. Whatever is damaged counts as absent
and is encoded again.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BundleError
from .tensors import map_tensors, write_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .cache import HostCache

__all__ = ["LabelStore", "StoredVectors", "is_sound", "seal"]

_SUFFIX = ".safetensors"
_MAX_CHUNKS = 32
_MAX_BANKS = 32


def seal(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors document whose metadata holds a checksum of its tensors."""
    return write_tensors(tensors, {**metadata, "crc32": _checksum(tensors)})


def is_sound(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bool:
    """Return whether the tensors are the ones that were sealed (true where there is no checksum)."""
    return "crc32" not in metadata or metadata["crc32"] == _checksum(tensors)


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(np.ascontiguousarray(tensors[name]).data, value)
    return f"{value:08x}"


def _map_sound(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]] | None:
    """Return the tensors of a cache file as views of a memory map; ``None`` when absent or damaged."""
    with suppress(BundleError):
        tensors, metadata = map_tensors(path)
        if is_sound(tensors, metadata):
            return tensors, metadata
    return None


@dataclass
class StoredVectors:
    """Vectors by key, as found in the store or waiting to be written there."""

    embeddings: dict[bytes, NDArray[np.float32]] = field(default_factory=dict)
    truncated: set[bytes] = field(default_factory=set)

    def update(self, other: StoredVectors) -> None:
        """Add those of another."""
        self.embeddings.update(other.embeddings)
        self.truncated |= other.truncated


class LabelStore:
    """Label vectors and whole banks of one context in the host cache. One thread at a time.

    Args:
        cache: host cache of the bundle; where it is unwritable nothing is found and nothing kept.
        context: digest of everything but labels and templates that the vectors depend on.
    """

    def __init__(self, cache: HostCache, context: str) -> None:
        self._cache = cache
        self._folder = f"labels/{context[:16]}"
        self._heads: dict[str, NDArray[np.uint64]] = {}  # chunk -> sorted first eight bytes of its keys

    def bank(self, key: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]] | None:
        """Return the tensors and metadata of the whole bank ``key``, memory-mapped, or ``None``."""
        path = self._path(f"bank-{key[:32]}.safetensors")
        found = _map_sound(path) if path is not None else None
        if found is not None and path is not None:
            with suppress(OSError):
                path.touch()  # the least recently used bank is dropped first
        return found

    def put_bank(self, key: str, content: bytes) -> bool:
        """Keep a whole bank; returns whether it was written."""
        written = self._cache.put(f"{self._folder}/bank-{key[:32]}.safetensors", content)
        if written:
            self._drop_old_banks()
        return written

    def vectors(self, keys: Sequence[bytes], width: int | None = None) -> StoredVectors:
        """Return what is known of ``keys``; ``width`` is E where known, and others are left out."""
        wanted = set(keys)
        found = StoredVectors()
        if not wanted:
            return found
        names = self._chunks()
        self._heads = {name: heads for name, heads in self._heads.items() if name in names}
        heads = _heads(wanted)
        for name in names:
            if name not in self._heads or _meet(self._heads[name], heads):
                self._collect(name, wanted, width, found)
        return found

    def put_vectors(self, new: StoredVectors) -> bool:
        """Add one chunk of vectors; returns whether it was written."""
        if not new.embeddings:
            return True
        chunks = self._chunks()
        if len(chunks) >= _MAX_CHUNKS:
            merged = StoredVectors()
            for name in chunks:
                self._collect(name, None, None, merged)
            merged.embeddings.update(new.embeddings)
            merged.truncated |= new.truncated
            new = merged
        else:
            chunks = []
        written = self._write_chunk(new)
        for name in chunks if written else ():  # now held by the merged chunk
            if name != written:
                self._cache.remove(f"{self._folder}/{name}")
        return written is not None

    def _write_chunk(self, new: StoredVectors) -> str | None:
        keys = sorted(new.embeddings)
        content = seal(
            {
                "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32),
                "embeddings": np.stack([new.embeddings[key] for key in keys]),
                "truncated": np.array([key in new.truncated for key in keys], np.uint8),
            },
            {"format": "edgeclip-label-vectors"},
        )
        # Named by content: two processes that encode the same labels write the same file.
        name = f"vectors-{zlib.crc32(content):08x}-{keys[0].hex()[:16]}-{len(keys)}.safetensors"
        if not self._cache.put(f"{self._folder}/{name}", content):
            return None
        self._heads[name] = _heads(keys)
        return name

    def _path(self, name: str) -> Path | None:
        return None if self._cache.directory is None else self._cache.path(*self._folder.split("/"), name)

    def _chunks(self) -> list[str]:
        """Return the names of the chunks that are there now."""
        folder = self._path("")
        if folder is None:
            return []
        with suppress(OSError):
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries]
            return sorted(name for name in names if name.startswith("vectors-") and name.endswith(_SUFFIX))
        return []

    def _drop_old_banks(self) -> None:
        folder = self._path("")
        with suppress(OSError):
            banks = [] if folder is None else list(folder.glob("bank-*.safetensors"))
            if len(banks) > _MAX_BANKS:
                banks.sort(key=lambda path: path.stat().st_mtime)
                for path in banks[:-_MAX_BANKS]:
                    self._cache.remove(f"{self._folder}/{path.name}")

    def _collect(self, name: str, wanted: set[bytes] | None, width: int | None, found: StoredVectors) -> None:
        """Copy the vectors of one chunk that are wanted (all, for ``None``) into ``found``."""
        path = self._path(name)
        chunk = None if path is None else _map_sound(path)
        if chunk is None:
            return
        tensors, _ = chunk
        try:
            keys, embeddings, truncated = tensors["keys"], tensors["embeddings"], tensors["truncated"]
            fits = len(keys) == len(embeddings) == len(truncated)
            are_keys = keys.shape[1:] == (32,) and keys.dtype == np.uint8
            if not fits or not are_keys or embeddings.ndim != 2 or embeddings.dtype != np.float32:
                return
        except (KeyError, TypeError):
            return
        if width is not None and embeddings.shape[1] != width:
            return
        joined = keys.tobytes()
        rows = [joined[start : start + 32] for start in range(0, len(joined), 32)]
        self._heads[name] = _heads(rows)
        for row, key in enumerate(rows):
            if wanted is None or key in wanted:
                # A copy: the map of a chunk that is merged away must not be held open by single rows.
                found.embeddings[key] = np.array(embeddings[row])
                if truncated[row]:
                    found.truncated.add(key)


def _heads(keys: Iterable[bytes]) -> NDArray[np.uint64]:
    """Return the first eight bytes of each key as sorted numbers."""
    return np.sort(np.frombuffer(b"".join([key[:8] for key in keys]), np.uint64))


def _meet(held: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> bool:
    """Return whether two sorted arrays share a number. Two keys of one head cost a reading, no more."""
    places = np.searchsorted(held, wanted)
    places[places == len(held)] = 0
    return bool(len(held)) and bool((held[places] == wanted).any())
