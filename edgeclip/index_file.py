"""The file of a picture index, and the journal beside it while one is being made.

**Index.** Safetensors, replaced as a whole by one rename. Entries are sorted by path; a picture that cannot
be read is an entry with a reason and without an embedding.

================== =======================================================================================
``embeddings``     ``(N, E)`` float32, unit rows, of the entries without a reason, in their order
``sums``           ``(⌈N / 1024⌉,)`` uint32: crc32 of each 1,024 rows, compared when they are first used
``paths``          uint8: paths relative to the folder, separated by null bytes
``reasons``        uint8: why an entry has no embedding, in UTF-8; empty where it has one
``stats``          ``(M, 3)`` int64: time of change in ns (-1: not to be trusted), size in bytes, inode
``contents``       ``(M, 16)`` uint8: blake2b of the file
``root``           uint8: the folder; ``.`` is where the index lies
================== =======================================================================================

Metadata: ``format`` ``edgeclip-picture-index``, ``schema`` ``1``, ``space``, ``variant``, ``tower``,
``model``, and ``crc32`` of the other metadata, as JSON with sorted keys, and of all tensors but the
embeddings, in the order of their names. Paths are bytes, as the file system has them, and always have ``/``.

**Journal.** ``<index>.journal``: a record for each entry that is new, as soon as it is known: crc32, length,
content. What a kill cuts off in the middle is left out, so a run that goes on has everything before it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from .errors import ConfigError, InputError
from .storage import sync_directory
from .tensors import map_tensors, tensor_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BLOCK_ROWS",
    "INDEX_NAME",
    "Entry",
    "Journal",
    "MadeWith",
    "PictureIndex",
    "Stat",
    "check_replaceable",
    "index_path",
    "stat_of",
    "write_index",
]

INDEX_NAME: Final = ".edgeclip-index"
"""Name of the index of a folder, in that folder."""

BLOCK_ROWS: Final = 1024
CONTENT_BYTES: Final = 16
_FORMAT, _SCHEMA = "edgeclip-picture-index", "1"
_JOURNAL_FORMAT = "edgeclip-picture-journal 1"
_TABLE = ("contents", "paths", "reasons", "root", "stats", "sums")
_RECORD = struct.Struct("<II")  # crc32 and length of what follows
_ENTRY = struct.Struct(f"<3q{CONTENT_BYTES}sIII")  # stat, content, bytes of path, reason and embedding
_MAX_RECORD_BYTES = 1 << 24
_SYNC_S = 5.0


class Stat(NamedTuple):
    """What tells cheaply that a file is the one it was.

    Attributes:
        mtime_ns: time of its last change; -1 where that was so short before it was read that a further
            change would not show.
        size_bytes: its size.
        inode: its number, 0 where the system has none.
    """

    mtime_ns: int
    size_bytes: int
    inode: int


class Entry(NamedTuple):
    """One picture of an index.

    Attributes:
        stat: of the file when it was read.
        content: digest of the file; empty where it changed while it was read.
        embedding: ``(E,)`` float32, a unit row; ``None`` where there is a reason.
        reason: why it cannot be read, else empty.
    """

    stat: Stat
    content: bytes
    embedding: NDArray[np.float32] | None
    reason: str = ""


def stat_of(path: Path) -> Stat:
    """Return what tells that a file is as it was.

    Raises:
        OSError: there is none.
    """
    found = path.stat()
    return Stat(found.st_mtime_ns, found.st_size, found.st_ino & (1 << 63) - 1)


@dataclass(frozen=True)
class MadeWith:
    """What the embeddings of an index were made with. Those of two spaces cannot be compared.

    Attributes:
        space: the manifest's ``model.embedding_space``.
        variant: name of the variant.
        tower: digest of its image tower.
        model: name of the model; not compared.
        embed_dim: E.
    """

    space: str
    variant: str
    tower: str
    model: str = field(compare=False)
    embed_dim: int


def index_path(said: str | os.PathLike[str]) -> Path:
    """Return the index of a folder, or the path itself where it is no folder."""
    path = Path(said)
    return path / INDEX_NAME if path.is_dir() else path


class PictureIndex:
    """An index, mapped from disk. Safe from many threads; a file that is replaced meanwhile changes nothing.

    Attributes:
        path: of the file.
        made_with: what the embeddings were made with.
        root: the folder that paths are relative to.
        paths: of the pictures, sorted; row for row those of :attr:`embeddings`.
        broken: why other pictures cannot be read, by path.
        embeddings: ``(N, E)`` float32, read-only, mapped and not checked yet: see :meth:`check`.

    Raises:
        InputError: the file is missing, no index or damaged; the message says what to do.
        ConfigError: a newer edgeclip made it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.where = f"picture index {str(self.path)!r}"
        if not self.path.is_file():
            raise InputError(f"{self.where}: there is none. Make it with `edgeclip index DIR`.")
        try:
            tensors, metadata = map_tensors(self.path, where=self.where, error=InputError)
        except InputError as error:
            raise InputError(f"{error} {_REPAIR}") from error
        if metadata.get("format") != _FORMAT:
            raise InputError(f"{self.where}: safetensors, but no picture index. Check the path.")
        if metadata.get("schema") != _SCHEMA:
            raise ConfigError(
                f"{self.where}: schema {metadata.get('schema', 'missing')[:20]!r}, expected {_SCHEMA!r}. "
                "Install a newer edgeclip, or make it anew with `edgeclip index --rebuild`."
            )
        try:
            if metadata["crc32"] != _table_sum(tensors, metadata):
                raise ValueError("its checksum does not match")
            self._read(tensors, metadata)
        except (KeyError, ValueError, TypeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{self.where}: is damaged ({said}). {_REPAIR}") from error

    def _read(self, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
        embeddings, sums = tensors["embeddings"], tensors["sums"]
        names = tensors["paths"].tobytes().split(b"\0") if tensors["paths"].size else []
        reasons = tensors["reasons"].tobytes().decode("utf-8").split("\0") if names else []
        stats, contents = tensors["stats"], tensors["contents"]
        count = reasons.count("")
        if (
            embeddings.dtype != np.float32
            or embeddings.ndim != 2
            or len(embeddings) != count
            or sums.shape != (-(-count // BLOCK_ROWS),)
            or len(reasons) != len(names)
            or stats.shape != (len(names), 3)
            or contents.shape != (len(names), CONTENT_BYTES)
        ):
            raise ValueError("its parts do not fit together")
        self.embeddings: NDArray[np.float32] = embeddings
        self.made_with = MadeWith(
            metadata["space"],
            metadata["variant"],
            metadata["tower"],
            metadata["model"],
            embeddings.shape[1],
        )
        root = Path(os.fsdecode(tensors["root"].tobytes()))
        self.root = root if root.is_absolute() else self.path.parent / root
        self._names, self._reasons = [os.fsdecode(name) for name in names], reasons
        self._stats, self._contents = stats, contents
        self._sums = sums
        self._sound: dict[int, bool] = {}
        if count == len(names):
            self.paths: Sequence[str] = self._names
        else:
            pairs = zip(self._names, reasons, strict=True)
            self.paths = [name for name, reason in pairs if not reason]

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def broken(self) -> Mapping[str, str]:
        """Why pictures without an embedding have none, by path."""
        return {name: reason for name, reason in zip(self._names, self._reasons, strict=True) if reason}

    def is_sound(self, block: int) -> bool:
        """Return whether a block of 1,024 rows is as it was written; it is read the first time only."""
        if block not in self._sound:
            rows = self.embeddings[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
            self._sound[block] = zlib.crc32(np.ascontiguousarray(rows).data) == int(self._sums[block])
        return self._sound[block]

    def check(self) -> None:
        """Read all embeddings that were not read yet.

        Raises:
            InputError: some of them are damaged.
        """
        if len(self._sound) < len(self._sums):
            for block in range(len(self._sums)):
                self.is_sound(block)
        if not all(self._sound.values()):
            damaged = sum(not sound for sound in self._sound.values())
            raise InputError(
                f"{self.where}: {damaged} of {len(self._sums)} blocks of embeddings are damaged. {_REPAIR}"
            )

    def embedding_of(self, path: Path) -> NDArray[np.float32] | None:
        """Return the embedding ``(E,)`` of a file, ``None`` where the index has none of it as it is now."""
        try:
            inside = path.resolve().relative_to(self.root.resolve()).as_posix()
            place = self._names.index(inside)
            known = not self._reasons[place] and stat_of(path) == Stat(*self._stats[place].tolist())
        except (OSError, ValueError):  # it is elsewhere, gone, or not in the index
            return None
        return self.embeddings[self._reasons[:place].count("")] if known else None

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yield all entries, sorted by path; those in damaged blocks are left out."""
        row = 0
        stats, contents = self._stats.tolist(), self._contents.tobytes()
        for number, (name, reason) in enumerate(zip(self._names, self._reasons, strict=True)):
            content = contents[number * CONTENT_BYTES : (number + 1) * CONTENT_BYTES]
            content = content if any(content) else b""
            if reason:
                yield name, Entry(Stat(*stats[number]), content, None, reason)
                continue
            if self.is_sound(row // BLOCK_ROWS):
                yield name, Entry(Stat(*stats[number]), content, self.embeddings[row])
            row += 1


_REPAIR = "Run `edgeclip index` on its folder: it makes anew what is missing."


def check_replaceable(path: Path) -> None:
    """Refuse to put an index in the place of a file that is none, and never was.

    Raises:
        InputError: it is another kind of file, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(1 << 12)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror or error}). Check it.") from error
    if head and path.name != INDEX_NAME and _FORMAT.encode() not in head:
        raise InputError(
            f"{str(path)!r} is there and no picture index, so it is not replaced. Choose another -o."
        )


def write_index(path: Path, root: str, made_with: MadeWith, entries: Mapping[str, Entry]) -> None:
    """Write an index in place of the one that is there, at once: a kill leaves the old one or the new one.

    Only one process may do so at a time; the temporary file has one name.

    Args:
        path: of the index.
        root: the folder, absolute or relative to where the index lies.
        made_with: what the embeddings were made with.
        entries: by path relative to the folder.

    Raises:
        OSError: the disk refuses; the old index is as it was.
    """
    names = sorted(entries)
    kept = [entries[name] for name in names]
    rows = [each.embedding for each in kept if each.embedding is not None]
    embeddings = np.stack(rows) if rows else np.empty((0, made_with.embed_dim), np.float32)
    blocks = range(0, len(rows), BLOCK_ROWS)
    tensors: dict[str, NDArray[Any]] = {
        "embeddings": embeddings,
        "sums": np.array([zlib.crc32(embeddings[at : at + BLOCK_ROWS].data) for at in blocks], np.uint32),
        "paths": _bytes(b"\0".join(os.fsencode(name) for name in names)),
        "reasons": _bytes("\0".join(each.reason for each in kept).encode()),
        "stats": np.array([each.stat for each in kept], np.int64).reshape(-1, 3),
        "contents": _bytes(b"".join(each.content.ljust(CONTENT_BYTES, b"\0") for each in kept)).reshape(
            -1, CONTENT_BYTES
        ),
        "root": _bytes(os.fsencode(root)),
    }
    metadata = {"format": _FORMAT, "schema": _SCHEMA}
    metadata |= {name: value for name, value in asdict(made_with).items() if name != "embed_dim"}
    metadata["crc32"] = _table_sum(tensors, metadata)
    temporary = path.with_name(f"{path.name}.new")
    try:
        with temporary.open("wb", buffering=0) as out:
            for block in tensor_blocks(tensors, metadata):
                rest = memoryview(block)
                while rest:
                    rest = rest[out.write(rest) :]
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def _bytes(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)


def _table_sum(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    said = {name: value for name, value in metadata.items() if name != "crc32"}
    value = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in _TABLE:
        value = zlib.crc32(np.ascontiguousarray(tensors[name]).data, value)
    return f"{value:08x}"


class Journal:
    """Entries of an index that is being made, on disk as soon as they are known; one process at a time.

    Opening goes on with what an earlier run left for the same model, and removes what it left for another.

    Args:
        path: of the index.
        root: the folder, as :func:`write_index` takes it.
        made_with: what embeddings are made with.
        rebuild: whether everything is made anew; goes on with a journal of the same kind only.

    Attributes:
        entries: what an earlier run left, by path.

    Raises:
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, root: str, made_with: MadeWith, *, rebuild: bool = False) -> None:
        self.path = path.with_name(f"{path.name}.journal")
        self._embed_dim = made_with.embed_dim
        self._synced = time.monotonic()
        self.entries: dict[str, Entry] = {}
        said = {"format": _JOURNAL_FORMAT, "root": root, "rebuild": rebuild, **asdict(made_with)}
        head = json.dumps(said, sort_keys=True).encode()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path, flags, 0o666)
        try:
            end = self._replay(head)
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
            if end == 0:
                self._append(head)
        except BaseException:
            os.close(self._descriptor)
            raise

    def add(self, name: str, entry: Entry) -> None:
        """Write one entry.

        Raises:
            OSError: the disk refuses; what came before stays.
        """
        path, reason = os.fsencode(name), entry.reason.encode()
        row = b"" if entry.embedding is None else entry.embedding.astype("<f4", copy=False).tobytes()
        content = entry.content.ljust(CONTENT_BYTES, b"\0")
        lengths = (len(path), len(reason), len(row))
        self._append(_ENTRY.pack(*entry.stat, content, *lengths) + path + reason + row)
        # A process that is killed loses nothing; a machine that loses power, these seconds at most.
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def remove(self) -> None:
        """Remove it: the index holds everything."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave it where it is. Calling it again does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _append(self, content: bytes) -> None:
        record = _RECORD.pack(zlib.crc32(content), len(content)) + content
        written = os.write(self._descriptor, record)  # one call: a kill leaves a record whole or cut off
        while written < len(record):
            more = os.write(self._descriptor, record[written:])
            if more == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            written += more

    def _replay(self, head: bytes) -> int:
        """Take what is there; return where the next record goes, 0 where nothing is of use."""
        end = 0
        with open(self._descriptor, "rb", closefd=False) as stream:
            for content in _records(stream):
                if end == 0:
                    if content != head:
                        return 0
                elif (found := self._parsed(content)) is not None:
                    self.entries[found[0]] = found[1]
                end += _RECORD.size + len(content)
        return end

    def _parsed(self, content: bytes) -> tuple[str, Entry] | None:
        if len(content) < _ENTRY.size:
            return None
        *stat, digest, path, reason, row = _ENTRY.unpack_from(content)
        ends = np.cumsum([_ENTRY.size, path, reason, row]).tolist()
        if ends[-1] != len(content) or row not in (0, 4 * self._embed_dim):
            return None
        name, said, values = (content[a:b] for a, b in pairwise(ends))
        embedding = np.frombuffer(values, "<f4") if row else None
        digest = digest if any(digest) else b""
        return os.fsdecode(name), Entry(Stat(*stat), digest, embedding, said.decode())


def _records(stream: Any) -> Iterator[bytes]:
    """Yield the contents of whole records, up to the first that is cut off or damaged."""
    while len(head := stream.read(_RECORD.size)) == _RECORD.size:
        checksum, length = _RECORD.unpack(head)
        if length > _MAX_RECORD_BYTES:
            return
        content = stream.read(length)
        if len(content) != length or zlib.crc32(content) != checksum:
            return
        yield content
