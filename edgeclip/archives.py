"""Read the package archives that pip, npm and apt download, without their tools and without trusting names.

Wheels and zip files, gzipped tarballs, Debian packages (an ``ar`` archive that holds a tarball) and, inside
them, Qt resource files (``.rcc``). No library extracts anything: members are read into memory one by one,
only regular files that match a pattern, with limits on number and size, and every name is checked.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from edgeclip.errors import InputError

__all__ = ["Limits", "iter_members", "read_members", "safe_name"]

_AR_MAGIC, _AR_HEADER_BYTES = b"!<arch>\n", 60
# By the tarball's suffix. Python reads zst from 3.14 on only; Debian's own packages are xz.
_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    "": lambda stream: stream,
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
}
_RCC_MAGIC, _RCC_COMPRESSED, _RCC_FOLDER, _RCC_ZSTD = b"qres", 1, 2, 4


@dataclass(frozen=True)
class Limits:
    """How much one archive may yield before it is refused."""

    files: int = 100_000
    file_bytes: int = 1 << 29
    total_bytes: int = 1 << 32


def safe_name(name: str, *, archive: str) -> str:
    """Return a member's name as a relative POSIX path that stays where it is put.

    Raises:
        InputError: the name is absolute, climbs, or means something else on another system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    bad = name.startswith("/") or ".." in parts or not parts
    if bad or any(character in name for character in "\\:\0"):
        raise InputError(
            f"archive {archive!r} has a member named {name!r}, which would leave the directory it is "
            "unpacked to: nothing of it was kept; get the archive from its publisher."
        )
    return "/".join(parts)


def read_members(
    archive: Path, patterns: Sequence[str], *, limits: Limits | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every regular file that matches one of the patterns.

    Args:
        archive: a ``.whl``, ``.zip``, ``.tgz``, ``.tar``, ``.tar.*`` or ``.deb`` file.
        patterns: as for ``fnmatch``: ``*`` also crosses ``/``. ``OUTER:INNER`` looks into Qt resource files
            that match OUTER; their members are named ``<file>/<member>``.
        limits: what is too much.

    Raises:
        InputError: not such an archive, truncated, damaged, a dangerous name, or over the limits.
    """
    limits = limits or Limits()
    plain = [pattern for pattern in patterns if ":" not in pattern]
    nested = [pattern.split(":", 1) for pattern in patterns if ":" in pattern]
    seen: set[str] = set()
    total = 0

    def admit(name: str, size: int) -> None:
        nonlocal total
        total += size
        if name.casefold() in seen:
            raise InputError(
                f"archive {archive.name!r} holds {name!r} twice, or two names that differ in case only: "
                "nothing of it was kept; get the archive from its publisher."
            )
        seen.add(name.casefold())
        if size > limits.file_bytes or total > limits.total_bytes or len(seen) > limits.files:
            raise InputError(
                f"archive {archive.name!r} holds too much at {name!r}: expected at most "
                f"{limits.files} files, {limits.file_bytes} bytes each, {limits.total_bytes} bytes together; "
                "nothing of it was kept."
            )

    def inside(name: str) -> list[str]:
        return [inner for outer, inner in nested if fnmatchcase(name, outer)]

    with _translated(archive):
        for raw_name, size, read in _entries(archive):
            name = safe_name(raw_name, archive=archive.name)
            wanted, inner_patterns = any(fnmatchcase(name, pattern) for pattern in plain), inside(name)
            if not wanted and not inner_patterns:
                continue
            if size > limits.file_bytes:
                admit(name, size)
            content = read()
            if wanted:
                admit(name, len(content))
                yield name, content
            if inner_patterns:
                for raw_inner, data in _rcc_members(content, limits.file_bytes):
                    inner_name = safe_name(raw_inner, archive=f"{archive.name}:{name}")
                    if any(fnmatchcase(inner_name, pattern) for pattern in inner_patterns):
                        admit(f"{name}/{inner_name}", len(data))
                        yield f"{name}/{inner_name}", data


def iter_members(archive: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yield name, size and a way to read every regular file, in order: for contents, names are not checked.

    Read a member before asking for the next one. A truncated archive is an error after its last whole member.

    Raises:
        InputError: not an archive of a kind named at :func:`read_members`, truncated or damaged.
    """

    def checked(read: Callable[[], bytes]) -> bytes:
        with _translated(archive):
            return read()

    with _translated(archive):
        for name, size, read in _entries(archive):
            yield name, size, functools.partial(checked, read)


@contextlib.contextmanager
def _translated(archive: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        lzma.LZMAError,
        zlib.error,
        struct.error,
        EOFError,
        OSError,  # zipfile seeks to wherever a damaged directory points
        ValueError,
        LookupError,
        OverflowError,
        RuntimeError,
        _DamagedError,
    ) as error:
        raise InputError(
            f"archive {archive.name!r} cannot be read ({str(error) or type(error).__name__}): it is "
            "truncated, damaged or of another kind; delete it and fetch it again."
        ) from error


class _DamagedError(Exception):
    """An archive that breaks its own format; never leaves this module."""


class _Reader:
    """Defers reading one member until its name was looked at."""

    def __init__(self, stream: AbstractContextManager[IO[bytes]], size: int) -> None:
        self._stream, self._size = stream, size

    def __call__(self) -> bytes:
        with self._stream as stream:
            content = stream.read(self._size + 1)
        if len(content) != self._size:
            raise _DamagedError(f"a member has {len(content)} bytes, expected {self._size}")
        return content


_Entry = tuple[str, int, _Reader]


def _entries(archive: Path) -> Iterator[_Entry]:
    name = archive.name.lower()
    if name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(archive) as file:
            yield from _zip_entries(file)
    elif name.endswith(".deb"):
        with archive.open("rb") as stream:
            data, suffix = _deb_data(stream, archive.stat().st_size)
            yield from _tar_entries(data, suffix)
    elif name.endswith((".tgz", ".tar")) or ".tar." in name:
        with archive.open("rb") as stream:
            yield from _tar_entries(stream, ".gz" if name.endswith(".tgz") else name.rpartition(".tar")[2])
    else:
        raise _DamagedError("expected a name that ends in .whl, .zip, .tgz, .tar, .tar.* or .deb")


def _zip_entries(file: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in file.infolist():
        kind = (info.external_attr >> 16) & 0o170000
        if info.filename.endswith("/") or kind not in (0, 0o100000):  # links and devices are nobody's data
            continue
        if info.flag_bits & 1:
            raise _DamagedError(f"member {info.filename!r} is encrypted")
        yield info.filename, info.file_size, _Reader(_OpenLater(file, info), info.file_size)


class _OpenLater(AbstractContextManager[IO[bytes]]):
    """A zip member, opened on entry so that members nobody wants cost nothing."""

    def __init__(self, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self._file, self._info = file, info

    def __enter__(self) -> IO[bytes]:
        self._stream = self._file.open(self._info)
        return self._stream

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _tar_entries(compressed: BinaryIO, suffix: str) -> Iterator[_Entry]:
    if suffix not in _DECOMPRESSORS:
        raise _DamagedError(f"its files are in a tarball '*{suffix}', a compression not read here")
    stream = _Tail(_DECOMPRESSORS[suffix](compressed))
    with tarfile.open(fileobj=cast("BinaryIO", stream), mode="r|") as file:
        for member in file:
            if not member.isreg():  # folders come with their files; links and devices are nobody's data
                continue
            content = cast("BinaryIO", file.extractfile(member))
            yield member.name, member.size, _Reader(content, member.size)
    # tarfile takes a file that was cut off between two members for a complete one. Reading on to the
    # last byte also compares the compressed stream's own checksum.
    while stream.read(1 << 20):
        pass
    if stream.tail.strip(b"\0") or len(stream.tail) < tarfile.BLOCKSIZE:
        raise _DamagedError("the tarball has no end")


class _Tail:
    """A stream that remembers the last block it gave: zeros, if a tarball ended where it should."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.tail = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.tail = (self.tail + data)[-tarfile.BLOCKSIZE :]
        return data


def _deb_data(stream: BinaryIO, size: int) -> tuple[BinaryIO, str]:
    """Return the package's tarball of files and the suffix that names its compression (deb(5), ar(5))."""
    if stream.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise _DamagedError("it does not start like a Debian package")
    position = len(_AR_MAGIC)
    while position + _AR_HEADER_BYTES <= size:
        stream.seek(position)
        header = stream.read(_AR_HEADER_BYTES)
        digits = header[48:58].strip()
        if header[58:60] != b"`\n" or not digits.isdigit():
            raise _DamagedError(f"the member header at byte {position} is damaged")
        name, length = header[:16].decode("ascii").strip().rstrip("/"), int(digits)
        start = position + _AR_HEADER_BYTES
        if start + length > size:
            raise _DamagedError(f"member {name!r} ends after the file does")
        if name.startswith("data.tar"):
            return cast("BinaryIO", _Window(stream, start, length)), name[len("data.tar") :]
        position = start + length + length % 2
    raise _DamagedError("it has no member 'data.tar'")


class _Window(io.RawIOBase):
    """A part of a file as a stream of its own."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._stream, self._left = stream, size
        stream.seek(start)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _rcc_members(data: bytes, limit: int) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a Qt resource file (layout: Qt's ``qresource.cpp``)."""
    if data[:4] != _RCC_MAGIC:
        raise _DamagedError("a Qt resource file does not start with 'qres'")
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    if version not in (1, 2, 3):
        raise _DamagedError(f"Qt resource format {version} is unknown")
    node_bytes = 14 if version == 1 else 22

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        return _slice(data, names + offset + 6, 2 * length).decode("utf-16-be")

    pending, visited = [(0, "")], set()
    while pending:
        index, prefix = pending.pop()
        if index in visited:
            raise _DamagedError("a Qt resource file refers to one entry twice")
        visited.add(index)
        offset = tree + index * node_bytes
        name_offset, flags = struct.unpack_from(">IH", data, offset)
        path = f"{prefix}/{name_at(name_offset)}" if index else ""
        if flags & _RCC_FOLDER:
            count, first = struct.unpack_from(">2I", data, offset + 6)
            if count > len(data) // node_bytes:
                raise _DamagedError(
                    "a folder of a Qt resource file has more entries than the file has room for"
                )
            pending.extend((first + child, path) for child in reversed(range(count)))
            continue
        (start,) = struct.unpack_from(">I", data, offset + 10)
        (length,) = struct.unpack_from(">I", data, contents + start)
        content = _slice(data, contents + start + 4, length)
        if flags & _RCC_ZSTD:
            raise _DamagedError(
                f"Qt resource {path!r} is compressed with zstd, which Python does not read everywhere"
            )
        if flags & _RCC_COMPRESSED:  # qCompress: the size, big-endian, then a zlib stream
            content = zlib.decompressobj().decompress(content[4:], limit + 1)
        yield path.lstrip("/"), content


def _slice(data: bytes, start: int, length: int) -> bytes:
    if start + length > len(data):
        raise _DamagedError("a Qt resource file ends before its contents do")
    return data[start : start + length]
