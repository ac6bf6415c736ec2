"""Where the samples of a tar shard lie, found by one walk over its headers.

Training reads samples in random order, so a shard is a plain tar file and an index says at which byte each
member begins. The index is a safetensors document: next to the shard as ``NAME.index`` where edgeclip wrote
the shard, in the host cache for the shards of others. It is mapped into memory, not loaded: processes share
it, and millions of samples cost nothing until they are read.

A sample is a run of members with the same key: the name up to the first dot of its last part (WebDataset's
rule). What follows the dot is the member's extension, in lower case: ``jpg``, ``txt``, ``syn.json``.

Tar: POSIX.1-2017, pax, "ustar Interchange Format"; GNU's long names and base-256 sizes are read too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeclip.cache import HostCache
from edgeclip.data import PICTURE_SUFFIXES
from edgeclip.errors import EdgeClipError, InputError
from edgeclip.tensors import map_tensors, read_tensors, write_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["INDEX_SUFFIX", "Member", "ShardFiles", "ShardIndex", "index_document", "open_index"]

SCHEMA = 1
INDEX_SUFFIX = ".index"
MAX_MEMBER_BYTES = 1 << 28
_KIND = "edgeclip-shard-index"
_BLOCK = 512
_MAX_EXTENSIONS = 1 << 12
_MAX_NAME_BYTES = 1 << 16  # of a long name or pax header
_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_ARRAYS: dict[str, np.dtype[Any]] = {
    "first": np.dtype("<i8"),
    "offset": np.dtype("<i8"),
    "size": np.dtype("<i8"),
    "key_end": np.dtype("<i8"),
    "pictures": np.dtype("<i4"),
    "extension": np.dtype("<u2"),
    "keys": np.dtype("u1"),
}
_OPEN_FILES = 64


class Member(NamedTuple):
    """A file inside a shard.

    Attributes:
        extension: what follows the key, in lower case, without the first dot.
        offset: of its first byte in the shard.
        size_bytes: of its content.
    """

    extension: str
    offset: int
    size_bytes: int


def is_picture(extension: str) -> bool:
    """Return whether members of this extension are pictures."""
    return f".{extension}" in PICTURE_SUFFIXES


# -- Reading an index ---------------------------------------------------------------------------------------


class ShardIndex:
    """The samples of one shard, by row.

    Attributes:
        path: the shard.
        size_bytes: of the shard.
        samples: rows.
        pictures: rows that have a picture.
        digest: sha256 of keys, extensions, places and sizes; two shards that agree here and differ in content
            are not told apart.
        extensions: how many members there are of each, the most frequent first.
    """

    def __init__(self, path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
        try:
            self._read(path, arrays, metadata)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"index of shard {str(path)!r} cannot be used ({type(error).__name__}: {error}). "
                "Delete it; it is made again."
            ) from error

    def _read(self, path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
        if metadata.get("kind") != _KIND or metadata.get("schema") != str(SCHEMA):
            raise ValueError(f"got kind {metadata.get('kind')!r} and schema {metadata.get('schema')!r}")
        for name, dtype in _ARRAYS.items():
            if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        self.path = path
        self.size_bytes = int(metadata["size_bytes"])
        self.digest = metadata["digest"]
        counts = json.loads(metadata["extensions"])
        self._names = [str(name) for name in counts]
        self.extensions = dict(
            sorted(((str(name), int(count)) for name, count in counts.items()), key=lambda item: -item[1])
        )
        self._arrays = arrays
        self.samples = len(arrays["key_end"])
        self.pictures = len(arrays["pictures"])

    @functools.cached_property
    def _checked(self) -> Mapping[str, NDArray[Any]]:
        """The arrays, once it is known that no row leads out of them: an index is a file like any other."""
        arrays, size = self._arrays, self.size_bytes
        first, offset, length, key_end = (arrays[name] for name in ("first", "offset", "size", "key_end"))
        members = len(offset)
        consistent = (
            len(first) == self.samples + 1
            and first[0] == 0
            and first[-1] == members
            and bool((np.diff(first) > 0).all())
            and len(length) == len(arrays["extension"]) == members
            and bool((offset >= _BLOCK).all())
            and bool((length >= 0).all())
            and bool((offset <= size).all())
            and bool((length <= size - offset).all())
            and bool((arrays["extension"] < len(self._names)).all())
            and bool((np.diff(key_end, prepend=0) > 0).all())
            and (key_end[-1] if self.samples else 0) == len(arrays["keys"])
            and bool((arrays["pictures"] >= 0).all())
            and bool((arrays["pictures"] < self.samples).all())
        )
        if not consistent:
            raise InputError(f"index of shard {str(self.path)!r} is damaged. Delete it; it is made again.")
        return arrays

    def picture_row(self, index: int) -> int:
        """Return the row of the ``index``-th sample that has a picture."""
        return int(self._checked["pictures"][index])

    def key(self, row: int) -> str:
        """Return the key of a sample inside its shard."""
        ends = self._checked["key_end"]
        begin = int(ends[row - 1]) if row else 0
        return os.fsdecode(self._checked["keys"][begin : int(ends[row])].tobytes())

    def members(self, row: int) -> tuple[Member, ...]:
        """Return the members of a sample in the order of the shard."""
        arrays = self._checked
        span = slice(int(arrays["first"][row]), int(arrays["first"][row + 1]))
        return tuple(
            Member(self._names[extension], offset, size)
            for extension, offset, size in zip(
                arrays["extension"][span].tolist(),
                arrays["offset"][span].tolist(),
                arrays["size"][span].tolist(),
                strict=True,
            )
        )


def open_index(shard: Path) -> ShardIndex:
    """Return the index of a shard: the one beside it, the one in the host cache, or a new one.

    Raises:
        InputError: the shard cannot be read, is compressed, truncated or no tar file.
    """
    _refuse_compressed(shard)
    try:
        status = shard.stat()
    except OSError as error:
        raise _unreadable(shard, error) from error
    beside = index_path(shard)
    if beside.is_file():
        try:
            index = ShardIndex(shard, *map_tensors(beside, error=InputError))
            if index.size_bytes == status.st_size:
                return index
        except EdgeClipError:  # damaged, or of an older schema: the shard itself has the answer
            pass
    place = f"{shard.absolute()}\0{status.st_size}\0{status.st_mtime_ns}"
    name = f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}{INDEX_SUFFIX}"
    cache = HostCache.open(hashlib.sha256(f"{_KIND}-{SCHEMA}".encode()).hexdigest())
    document: bytes | NDArray[np.uint8] | None = cache.map_array(name, dtype=np.dtype(np.uint8))
    if document is not None:
        try:
            return ShardIndex(shard, *read_tensors(document, error=InputError))
        except EdgeClipError:
            pass
    document = index_document(shard)
    if cache.put_array(name, np.frombuffer(document, np.uint8)):
        mapped = cache.map_array(name, dtype=np.dtype(np.uint8))
        document = document if mapped is None else mapped
    return ShardIndex(shard, *read_tensors(document, error=InputError))


def index_path(shard: Path) -> Path:
    """Return where the index of a shard of ours lies: ``shard-000000.tar`` -> ``shard-000000.index``."""
    return shard.with_suffix(INDEX_SUFFIX)


# -- Making an index ----------------------------------------------------------------------------------------


def index_document(shard: Path) -> bytes:
    """Return the index of a tar file as a document; equal shards give equal documents.

    Raises:
        InputError: the file cannot be read, is compressed, truncated, or no tar file.
    """
    _refuse_compressed(shard)
    numbers: dict[str, int] = {}
    counts: list[int] = []
    keys = bytearray()
    key_end: list[int] = []
    first: list[int] = []
    pictures: list[int] = []
    extensions: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    last: str | None = None
    seen: set[str] = set()
    pictured = False
    try:
        with shard.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            for name, offset, size in _entries(stream, size_bytes, shard):
                match = _MEMBER.fullmatch(name.removeprefix("./"))
                if match is None or name.rpartition("/")[2].startswith("__"):
                    continue
                key, extension = match[1], match[2].lower()
                if key != last:
                    last, pictured = key, False
                    seen.clear()
                    first.append(len(offsets))
                    keys += os.fsencode(key)
                    key_end.append(len(keys))
                if extension in seen:
                    continue  # a second one of the same name: the first counts
                seen.add(extension)
                if not pictured and is_picture(extension):
                    pictured = True
                    pictures.append(len(key_end) - 1)
                number = numbers.setdefault(extension, len(numbers))
                if number == len(counts):
                    counts.append(0)
                counts[number] += 1
                if len(numbers) > _MAX_EXTENSIONS:
                    raise InputError(
                        f"shard {str(shard)!r} has more than {_MAX_EXTENSIONS} kinds of members, such as "
                        f"{extension!r}. Keys must not contain dots: a key ends at its first one."
                    )
                extensions.append(number)
                offsets.append(offset)
                sizes.append(size)
    except OSError as error:
        raise _unreadable(shard, error) from error
    arrays = {
        "first": np.array([*first, len(offsets)], _ARRAYS["first"]),
        "offset": np.array(offsets, _ARRAYS["offset"]),
        "size": np.array(sizes, _ARRAYS["size"]),
        "key_end": np.array(key_end, _ARRAYS["key_end"]),
        "pictures": np.array(pictures, _ARRAYS["pictures"]),
        "extension": np.array(extensions, _ARRAYS["extension"]),
        "keys": np.frombuffer(bytes(keys), _ARRAYS["keys"]),
    }
    named = json.dumps(dict(zip(numbers, counts, strict=True)))
    digest = hashlib.sha256(named.encode())
    for name in sorted(arrays):
        digest.update(name.encode() + len(arrays[name]).to_bytes(8, "little") + arrays[name].tobytes())
    metadata = {
        "kind": _KIND,
        "schema": str(SCHEMA),
        "size_bytes": str(size_bytes),
        "extensions": named,
        "digest": digest.hexdigest(),
    }
    return write_tensors(arrays, metadata)


def _entries(stream: IO[bytes], size_bytes: int, shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset of the content and size of every regular file of a tar file."""
    position = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        stream.seek(position)
        header = stream.read(_BLOCK)
        if len(header) < _BLOCK:
            raise _damaged(shard, position, "the file ends where a header was expected; it was cut off")
        if not header.strip(b"\0"):
            break
        if not _is_header(header):
            raise _damaged(shard, position, "there is no tar header")
        kind = header[156:157]
        size = _number(header[124:136])
        if long_size is not None and kind in b"0\0" + b"7":
            size = long_size
        if size is None or size < 0 or position + _BLOCK + size > size_bytes:
            raise _damaged(
                shard, position, f"a member of {size} bytes does not fit into the {size_bytes} of the file"
            )
        data = position + _BLOCK
        position = data + -(-size // _BLOCK) * _BLOCK
        if kind in (b"L", b"x"):
            if size > _MAX_NAME_BYTES:
                raise _damaged(shard, data, f"an extended header has {size} bytes")
            content = stream.read(size)
            if kind == b"L":
                long_name = os.fsdecode(content.rstrip(b"\0"))
            else:
                said = _pax(content)
                if any(key.startswith(b"GNU.sparse") for key in said):
                    raise _damaged(shard, data, "a sparse member, which is not read")
                if b"path" in said:
                    long_name = os.fsdecode(said[b"path"])
                if b"size" in said:
                    digits = said[b"size"]
                    long_size = int(digits) if digits.isdigit() and len(digits) < 20 else -1
            continue
        if kind in (b"K", b"g"):
            continue
        if kind == b"S":
            raise _damaged(shard, data, "a sparse member, which is not read")
        name, long_name, long_size = long_name or _name(header), None, None
        if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
            yield name, data, size
    # tar pads with zeros. Anything else was appended by `cat` and would be left out in silence.
    while block := stream.read(1 << 20):
        if block.strip(b"\0"):
            raise _damaged(
                shard, position, "the archive ends here but the file goes on; were two joined with cat?"
            )


def _is_header(block: bytes) -> bool:
    said = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if said == unsigned:
        return True
    return said == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])  # summed as signed


def _number(field: bytes) -> int | None:
    """Return a number of a header: octal digits, or base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return os.fsdecode(name)


def _pax(content: bytes) -> dict[bytes, bytes]:
    found = {}
    while content:
        digits, space, _ = content.partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 2 < int(digits) <= len(content):
            break
        record, content = content[len(digits) + 1 : int(digits)], content[int(digits) :]
        key, _, value = record.removesuffix(b"\n").partition(b"=")
        found[key] = value
    return found


def _damaged(shard: Path, position: int, what: str) -> InputError:
    return InputError(
        f"shard {str(shard)!r} is not a whole tar file: at byte {position:,} {what}. Get or make it again."
    )


def _unreadable(shard: Path, error: OSError) -> InputError:
    return InputError(f"shard {str(shard)!r} cannot be read ({error.strerror or error}). Check the path.")


def _refuse_compressed(shard: Path) -> None:
    compressed = shard.name.lower().endswith(_COMPRESSED)
    if not compressed:
        try:
            with shard.open("rb") as stream:
                compressed = stream.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
        except OSError as error:
            raise _unreadable(shard, error) from error
    if compressed:
        raise InputError(
            f"shard {str(shard)!r} is compressed, and samples are read in random order from plain .tar "
            "files. Decompress it; pictures are compressed already."
        )


# -- Reading members ----------------------------------------------------------------------------------------


class _Descriptor:
    """An open file that closes when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardFiles:
    """Reads members of shards from any thread; keeps the last files open. Pickles as an empty one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[()]]:
        return ShardFiles, ()

    def read(self, shard: Path, member: Member) -> bytes:
        """Return the content of a member.

        Raises:
            InputError: the shard cannot be read, or was changed since it was indexed.
        """
        if member.size_bytes > MAX_MEMBER_BYTES:
            raise InputError(
                f"shard {str(shard)!r}: the member {member.extension!r} at byte {member.offset:,} has "
                f"{member.size_bytes:,} bytes, expected at most {MAX_MEMBER_BYTES:,}."
            )
        try:
            descriptor = self._descriptor(shard)
            block = self._read(descriptor.number, member.offset - _BLOCK, _BLOCK + member.size_bytes)
        except OSError as error:
            raise _unreadable(shard, error) from error
        header = block[:_BLOCK]
        # This takes some microseconds; a stale index would give parts of other pictures.
        if (
            len(block) != _BLOCK + member.size_bytes
            or not _is_header(header)
            or _number(header[124:136]) not in (member.size_bytes, 0)
        ):
            raise InputError(
                f"shard {str(shard)!r} was changed since it was indexed: no member of {member.size_bytes:,} "
                f"bytes at byte {member.offset:,}. Delete its .index file and start again."
            )
        return block[_BLOCK:]

    def _descriptor(self, shard: Path) -> _Descriptor:
        with self._lock:
            found = self._open.pop(shard, None) or _Descriptor(shard)
            self._open[shard] = found
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return found

    def _read(self, descriptor: int, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(descriptor, size, offset)
        with self._lock:  # Windows
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
