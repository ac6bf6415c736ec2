"""The host cache: what this machine worked out once and need not work out again.

``<root>/<first 16 digits of the bundle digest>/<host fingerprint>/`` holds label vectors, tuned profiles and
stamps of a bundle. ``<root>/compiled/any/`` holds engines, blobs and graphs of towers, which bundles share;
names tell network, host and engine. The root is ``EDGECLIP_CACHE_DIR``, else the user's cache directory.
Nothing in it is needed: an entry that is absent, damaged or cannot be written costs time, never correctness.
So nothing here raises for I/O, and whatever is read is checked before it is used. Entries are replaced
atomically; any number of processes may share a cache.

The layer above decides what makes up a fingerprint (``runtime/host.py``) and what an entry means.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from edgeclip.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["COMPILED", "CacheEntry", "CacheInfo", "HostCache", "cache_info", "cache_root", "clear_cache"]

ENVIRONMENT_NAME = "EDGECLIP_CACHE_DIR"
COMPILED: Final = "compiled"
"""What :meth:`HostCache.open` takes in place of a digest for what towers of all bundles were compiled to."""

_BUNDLE_FOLDER = re.compile(rf"[0-9a-f]{{16}}|{COMPILED}")
_HOST_FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
# Any file or folder name that every system takes; no leading dot, which marks our own checksums.
_PART = re.compile(r"[A-Za-z0-9_@+=-][A-Za-z0-9._@+=-]{0,199}")
_NPY_HEADER_BYTES, _READ_BYTES = 1 << 16, 1 << 20
_TEMPORARY_PREFIX, _SUM_SUFFIX = ".tmp-", ".sum"
# https://bford.info/cachedir: backup programs leave directories with this file out.
_TAG_NAME = "CACHEDIR.TAG"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# The host cache of edgeclip; safe to delete.\n"

_log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the directory that holds the caches of all bundles; it need not exist."""
    said = os.environ.get(ENVIRONMENT_NAME)
    if said:
        return Path(said).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("edgeclip")


@dataclass(frozen=True)
class HostCache:
    """What is cached for one bundle on one kind of host, or for all of them; may be shared between threads.

    Attributes:
        directory: where entries are; ``None`` where it does not exist and cannot be made.
        writable: whether entries can be added. A readable cache on a read-only disk still serves.
    """

    directory: Path | None
    writable: bool

    @classmethod
    def open(cls, bundle_digest: str, fingerprint: str = "any", *, root: Path | None = None) -> HostCache:
        """Open the cache of a bundle, making its directory where possible.

        Args:
            bundle_digest: ``Bundle.digest``, any sha256 in hexadecimal digits, or :data:`COMPILED`.
            fingerprint: ``Host.fingerprint()``; ``"any"`` for entries that hold on every host.
            root: instead of :func:`cache_root`.

        Raises:
            ConfigError: the digest or fingerprint cannot name a directory.
        """
        if not _BUNDLE_FOLDER.match(bundle_digest) or not _HOST_FOLDER.fullmatch(fingerprint):
            raise ConfigError(
                f"a host cache cannot be named {bundle_digest!r} and {fingerprint!r}: expected at least 16 "
                "hexadecimal digits and a short word."
            )
        root = cache_root() if root is None else root
        directory = root / bundle_digest[:16] / fingerprint
        try:
            if not root.exists():
                root.mkdir(parents=True, mode=0o700)
                (root / _TAG_NAME).write_bytes(_TAG)
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _log.debug("no host cache at %s: %s", directory, error)
        if not directory.is_dir():
            return cls(None, writable=False)
        return cls(directory, writable=os.access(directory, os.W_OK | os.X_OK))

    def path(self, *parts: str) -> Path:
        """Return where an entry is or would be, for an engine that reads and writes files itself.

        Such a file is the caller's to check. Write it elsewhere in the directory first and rename it.

        Raises:
            ConfigError: there is no directory, or a part is not a plain name.
        """
        if self.directory is None:
            raise ConfigError(
                "this host has no writable cache directory: ask `directory` before asking for a path."
            )
        return self.directory.joinpath(*_parts("/".join(part for part in parts if part)))

    def get(self, name: str) -> bytes | None:
        """Return an entry's content; ``None`` where it is absent, damaged or unreadable."""
        path = self._path(name)
        if path is None:
            return None
        try:
            data = path.read_bytes()
            expected = _sum_path(path).read_bytes()
        except (OSError, MemoryError) as error:
            _log.debug("not cached: %s: %s", path, error)
            return None
        if _checksum(data) != expected:
            _log.debug("damaged, so ignored: %s", path)
            return None
        return data

    def is_sound(self, name: str) -> bool:
        """Return whether an entry is there and undamaged, for who maps the file at ``path(name)``."""
        path = self._path(name)
        if path is None:
            return False
        size_bytes = value = 0
        try:
            with path.open("rb", buffering=0) as stream:
                while data := stream.read(_READ_BYTES):
                    size_bytes, value = size_bytes + len(data), zlib.crc32(data, value)
            expected = _sum_path(path).read_bytes()
        except OSError as error:
            _log.debug("not cached: %s: %s", path, error)
            return False
        return _said(size_bytes, value) == expected

    def put(self, name: str, data: bytes | memoryview) -> bool:
        """Replace an entry atomically; return whether it was written.

        The file at ``path(name)`` then holds exactly ``data``.
        """
        path = self._path(name)
        if path is None or not self.writable:
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Between the two renames the sum is that of another content: readers then see no entry.
            _replace(path, data)
            _replace(_sum_path(path), _checksum(data))
        except OSError as error:
            _log.debug("cannot write the host cache: %s: %s", path, error)
            return False
        return True

    def remove(self, name: str) -> None:
        """Forget an entry; harmless where there is none."""
        path = self._path(name)
        if path is not None:
            with contextlib.suppress(OSError):
                _sum_path(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def put_array(self, name: str, array: NDArray[Any]) -> bool:
        """Replace an entry by an array in numpy's format; return whether it was written."""
        import io

        import numpy as np

        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        return self.put(name, stream.getbuffer())

    def map_array(self, name: str, *, dtype: np.dtype[Any] | None = None) -> NDArray[Any] | None:
        """Return an array entry, read-only and memory-mapped; ``None`` where absent or damaged.

        Args:
            name: as given to :meth:`put_array`.
            dtype: what the array must be; another dtype counts as damaged.
        """
        import numpy as np

        path = self._path(name)
        if path is None:
            return None
        try:
            expected = _sum_path(path).read_bytes()
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
            if _checksum(memoryview(cast("bytes", mapped))) != expected:
                raise ValueError("its checksum does not match")
            array = _array_in(mapped)
        except (OSError, ValueError, EOFError, MemoryError) as error:
            _log.debug("not cached: %s: %s", path, error)
            return None
        return array if dtype is None or array.dtype == dtype else None

    def _path(self, name: str) -> Path | None:
        parts = _parts(name)
        return None if self.directory is None else self.directory.joinpath(*parts)


def _array_in(mapped: NDArray[np.uint8]) -> NDArray[Any]:
    """Return the array of an .npy file as a view of its map.

    ``np.load`` opens the file again, and would meet another one where a process has replaced it meanwhile.
    """
    import io

    import numpy as np
    from numpy.lib import format as npy

    stream = io.BytesIO(mapped[:_NPY_HEADER_BYTES].tobytes())
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    order: Any = "F" if is_fortran else "C"
    try:
        return np.ndarray(shape, dtype, mapped, stream.tell(), order=order)
    except TypeError as error:
        raise ValueError("it is too short for its shape") from error


def _parts(name: str) -> list[str]:
    parts = name.split("/") if name else []
    for part in parts:
        if not _PART.fullmatch(part):
            raise ConfigError(
                f"a cache entry cannot be named {name!r}: expected plain names with '/' between them."
            )
    return parts


def _sum_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SUM_SUFFIX}")


def _checksum(data: bytes | memoryview) -> bytes:
    """Return size and CRC-32: against damage, not against malice, which needs write access here anyway."""
    size_bytes = data.nbytes if isinstance(data, memoryview) else len(data)
    return _said(size_bytes, zlib.crc32(data))


def _said(size_bytes: int, value: int) -> bytes:
    return f"{size_bytes} {value:08x}".encode()


def _replace(path: Path, data: bytes | memoryview) -> None:
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


# --- looking after it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheEntry:
    """What is cached for one bundle, over all hosts; ``used_s`` is the time of its last change since 1970.

    ``bundle`` is :data:`COMPILED` for what towers of all bundles were compiled to.
    """

    bundle: str
    hosts: tuple[str, ...]
    files: int
    size_bytes: int
    used_s: float


@dataclass(frozen=True)
class CacheInfo:
    """The host cache of this user: its root and what is in it, largest first."""

    root: Path
    entries: tuple[CacheEntry, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all entries together."""
        return sum(entry.size_bytes for entry in self.entries)


def cache_info(root: Path | None = None) -> CacheInfo:
    """Return what the cache holds; what cannot be read is left out."""
    root = cache_root() if root is None else root
    entries = [_entry(folder) for folder in _bundle_folders(root)]
    return CacheInfo(root, tuple(sorted(entries, key=lambda entry: (-entry.size_bytes, entry.bundle))))


def clear_cache(root: Path | None = None, bundle: str | None = None) -> CacheInfo:
    """Remove cached entries and return what was removed.

    Only folders of this module's own layout are touched, so that a root that points elsewhere loses nothing.

    Args:
        root: instead of :func:`cache_root`.
        bundle: digest of one bundle, or its first digits; :data:`COMPILED`; ``None`` for all.

    Raises:
        ConfigError: the root is a file system's root, a home directory, or above one; or not exactly one
            entry has a digest that starts with ``bundle``.
    """
    root = cache_root() if root is None else root
    _refuse_odd_root(root)
    folders = _bundle_folders(root)
    if bundle is not None:
        folders = [folder for folder in folders if bundle and folder.name.startswith(bundle[:16])]
        if len(folders) != 1:
            raise ConfigError(
                f"the cache at {str(root)!r} has {len(folders)} entries whose digest starts with {bundle!r}, "
                "expected one: run `edgeclip cache info`."
            )
    removed = []
    for folder in folders:
        entry = _entry(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            removed.append(entry)
    return CacheInfo(root, tuple(removed))


def _refuse_odd_root(root: Path) -> None:
    resolved, home = Path(os.path.realpath(root)), Path(os.path.realpath(Path.home()))
    if resolved == Path(resolved.anchor) or resolved == home or resolved in home.parents:
        raise ConfigError(
            f"the cache root {str(root)!r} is a home directory or above one, so nothing in it is removed: "
            f"set {ENVIRONMENT_NAME} to a directory of its own."
        )


def _bundle_folders(root: Path) -> list[Path]:
    """Return the folders of our own layout: 16 digits, holding nothing but host folders."""
    try:
        with os.scandir(root) as found:
            names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        _log.debug("cannot list the host cache %s: %s", root, error)
        return []
    return [root / name for name in sorted(names) if _BUNDLE_FOLDER.fullmatch(name) and _is_ours(root / name)]


def _is_ours(folder: Path) -> bool:
    try:
        with os.scandir(folder) as hosts:
            return all(_is_host(entry) for entry in hosts)
    except OSError:
        return False


def _is_host(entry: os.DirEntry[str]) -> bool:
    return bool(_HOST_FOLDER.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)


def _entry(folder: Path) -> CacheEntry:
    files = size_bytes = 0
    used_s = 0.0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = Path(base, name).lstat()
                files += not name.startswith(".")
                size_bytes += status.st_size
                used_s = max(used_s, status.st_mtime)
    hosts = tuple(sorted(child.name for child in folder.iterdir() if child.is_dir()))
    return CacheEntry(folder.name, hosts, files, size_bytes, used_s)
