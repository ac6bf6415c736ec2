"""The label vectors kept on this host.

``<host cache>/labels/<context>/`` holds

* ``vectors-*.safetensors``: chunks of ``keys`` (n, 32) uint8, ``embeddings`` (n, E) float32 and ``truncated``
  (n,) uint8. A key is the hash of text tower, tokenizer, templates and label, so a chunk never goes stale.
  Chunks are only ever added, each under its own name, and merged into one when there are many: processes need
  no lock.
* ``bank-*.safetensors``: whole banks as one file, so that a warm start maps one file and looks up no vectors.

Files are safetensors whose metadata entry ``crc32`` covers the tensors. Whatever is damaged counts as absent
and is encoded again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
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


class LabelStore:
    """Label vectors and whole banks of one context in the host cache.

    Args:
        cache: host cache of the bundle; where it is unwritable nothing is found and nothing kept.
        context: digest of everything but labels and templates that the vectors depend on.
    """

    def __init__(self, cache: HostCache, context: str) -> None:
        self._cache = cache
        self._folder = f"labels/{context[:16]}"

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
        for path in self._chunks():
            _collect(path, wanted, width, found)
        return found

    def put_vectors(self, new: StoredVectors) -> bool:
        """Add one chunk of vectors; returns whether it was written."""
        if not new.embeddings:
            return True
        chunks = self._chunks()
        if len(chunks) >= _MAX_CHUNKS:
            merged = StoredVectors()
            for path in chunks:
                _collect(path, None, None, merged)
            merged.embeddings.update(new.embeddings)
            merged.truncated |= new.truncated
            new = merged
        else:
            chunks = []
        name = self._write_chunk(new)
        for path in chunks if name else ():  # now held by the merged chunk
            if path.name != name:
                self._cache.remove(f"{self._folder}/{path.name}")
        return name is not None

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
        return name if self._cache.put(f"{self._folder}/{name}", content) else None

    def _path(self, name: str) -> Path | None:
        return None if self._cache.directory is None else self._cache.path(*self._folder.split("/"), name)

    def _chunks(self) -> list[Path]:
        folder = self._path("")
        if folder is None:
            return []
        with suppress(OSError):
            return sorted(folder.glob("vectors-*.safetensors"))
        return []

    def _drop_old_banks(self) -> None:
        folder = self._path("")
        with suppress(OSError):
            banks = [] if folder is None else list(folder.glob("bank-*.safetensors"))
            if len(banks) > _MAX_BANKS:
                banks.sort(key=lambda path: path.stat().st_mtime)
                for path in banks[:-_MAX_BANKS]:
                    self._cache.remove(f"{self._folder}/{path.name}")


def _collect(path: Path, wanted: set[bytes] | None, width: int | None, found: StoredVectors) -> None:
    """Copy the vectors of one chunk that are wanted (all, for ``None``) into ``found``."""
    chunk = _map_sound(path)
    if chunk is None:
        return
    tensors, _ = chunk
    try:
        keys, embeddings, truncated = tensors["keys"], tensors["embeddings"], tensors["truncated"]
        fits = len(keys) == len(embeddings) == len(truncated)
        if not fits or keys.shape[1:] != (32,) or embeddings.ndim != 2 or embeddings.dtype != np.float32:
            return
    except (KeyError, TypeError):
        return
    if width is not None and embeddings.shape[1] != width:
        return
    joined = keys.tobytes()
    for row in range(len(keys)):
        key = joined[32 * row : 32 * row + 32]
        if wanted is None or key in wanted:
            # A copy: the map of a chunk that is merged away must not be held open by single rows.
            found.embeddings[key] = np.array(embeddings[row])
            if truncated[row]:
                found.truncated.add(key)
