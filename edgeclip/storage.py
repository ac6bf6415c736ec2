"""Files on disk, handled so that neither a hostile directory nor a sudden end does harm.

Opening stays inside a directory; writing goes through a temporary file, a sync and a rename; a lock keeps a
second writer out and ends with its process. Everything here raises ``OSError`` and knows nothing of bundles.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

__all__ = [
    "LOCK_NAME",
    "TEMPORARY_PREFIX",
    "DirectoryLock",
    "FileLock",
    "hash_stream",
    "open_inside",
    "sync_directory",
    "write_temporary",
]

TEMPORARY_PREFIX, LOCK_NAME = ".edgeclip-tmp-", ".edgeclip-lock"
_BLOCK_BYTES = 1 << 18

_log = logging.getLogger(__name__)


def open_inside(root: str, name: str) -> tuple[Path, FileIO]:
    """Open a regular file below a directory for reading; links are followed only while they stay inside.

    Args:
        root: the directory, as ``os.path.realpath`` gives it.
        name: relative posix path, already checked for ``..`` and the like.

    Returns:
        The resolved path and an unbuffered stream.

    Raises:
        OSError: missing, unreadable, not a regular file, or a link that leads out of the directory.
    """
    resolved = os.path.realpath(os.path.join(root, *name.split("/")))  # noqa: PTH118
    try:
        inside = os.path.commonpath([root, resolved]) == root != resolved
    except ValueError:  # another drive
        inside = False
    if not inside:
        raise OSError(errno.EPERM, "it is a link that leads out of the directory", name)
    flags = os.O_RDONLY
    # O_NONBLOCK: opening a named pipe must not wait for somebody to write into it
    for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, flag, 0)
    descriptor = os.open(resolved, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", name)
    return Path(resolved), FileIO(descriptor, "r")


def hash_stream(stream: FileIO) -> tuple[int, str]:
    """Return size in bytes and sha256 of what is left in an unbuffered stream."""
    digest, size_bytes = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    while count := stream.readinto(buffer):
        digest.update(buffer[:count])
        size_bytes += count
    return size_bytes, digest.hexdigest()


def write_temporary(folder: Path, content: bytes | os.PathLike[str]) -> tuple[Path, int, str]:
    """Write bytes, or a copy of a file, to a new temporary file and sync it.

    Returns:
        Its path, which the caller renames or removes, its size in bytes and its sha256.

    Raises:
        OSError: the source cannot be read or the disk refuses; nothing is left behind.
    """
    path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with path.open("xb", buffering=0) as out:  # permissions as the umask says, like any file of the user
            for block in _blocks(content):
                digest.update(block)
                size_bytes += len(block)
                while block:
                    block = block[out.write(block) :]
            os.fsync(out.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return path, size_bytes, digest.hexdigest()


def _blocks(content: bytes | os.PathLike[str]) -> Iterator[memoryview]:
    if isinstance(content, (bytes, bytearray, memoryview)):
        yield memoryview(content).cast("B")
        return
    with Path(content).open("rb", buffering=0) as source:
        while block := source.read(_BLOCK_BYTES):
            yield memoryview(block)


def sync_directory(folder: Path) -> None:
    """Make renames in ``folder`` durable; does nothing where directories cannot be opened (Windows)."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # closed to readers, or on a network file system that refuses
        _log.debug("cannot sync %s: %s", folder, error)


class FileLock:
    """An advisory lock, released by the system when its process ends, however it ends.

    Args:
        path: of the lock file; made, and removed at the release.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: the lock file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._process = os.getpid()
        for _ in range(100):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                _lock(descriptor)
                if self._is_current(descriptor):
                    self._descriptor = descriptor
                    return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its last holder removed the file between our open and our lock
        raise BlockingIOError(errno.EAGAIN, "its lock file keeps changing", str(self._path))

    def release(self) -> None:
        """Remove the lock file and release the lock; harmless when repeated, or in a forked child."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if self._process == os.getpid():
            with contextlib.suppress(OSError):
                self._path.unlink()  # Windows refuses while it is open: an empty file stays and does no harm
        os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def __del__(self) -> None:
        self.release()


class DirectoryLock(FileLock):
    """A lock on a directory, as :class:`FileLock`; the lock file lies in it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / LOCK_NAME)


def _lock(descriptor: int) -> None:
    """Lock an open file without waiting, or raise ``BlockingIOError``."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(errno.EAGAIN, "it is locked") from error
    else:
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            # A file system without locks: each write is still atomic, only two at once may lose one of them.
            _log.debug("cannot lock: %s", error)
