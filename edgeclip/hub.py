"""Download weights and finished bundles from the Hugging Face hub: one file at a time, checked, resumable.

The hub's own client (extra ``hub``) does the talking; this module decides what is fetched and when it counts.
A file is first written beside its place as ``.NAME.HASH.part``, compared with the sha256 that was asked for
and with what the hub says of that commit, and renamed; a receipt in JSON says what it is. An interrupted
download goes on where it stopped. Of a bundle, the manifest is written last, as in every bundle.

The commit is settled at the first download and recorded: later calls stay on it, and need no network while
the file is there. Tokens are sent to the hub's host only; the client's telemetry is off. ``HF_ENDPOINT``
names another hub, ``HF_HUB_OFFLINE=1`` forbids the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

import msgspec

from edgeclip.cache import cache_root
from edgeclip.errors import BundleError, InputError
from edgeclip.hub_client import COMMIT, HubClient, Progress, RemoteFile, UnreachableError, disk_errors
from edgeclip.manifest import MANIFEST_NAME, parse_manifest
from edgeclip.storage import DirectoryLock, hash_stream

__all__ = [
    "BundleReference",
    "Progress",
    "Pulled",
    "Receipt",
    "WantedFile",
    "fetch_bundle",
    "parse_bundle_reference",
    "pull",
    "receipt_path",
    "weights_directory",
]

_PREFIX = "hf:"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_RECEIPT_SUFFIX = ".receipt.json"
_MAX_MANIFEST_BYTES = 16 << 20
_LOCK_SECONDS = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WantedFile:
    """One file of a hub repository.

    Attributes:
        repo: ``"organisation/name"``.
        files: names it may have, preferred first.
        revision: commit, tag or branch; ``None`` for the recorded commit, else the default one.
        default_revision: commit that holds the file, where known; ``None`` for the newest.
        sha256: what it must be, where known beforehand.
    """

    repo: str
    files: tuple[str, ...]
    revision: str | None = None
    default_revision: str | None = None
    sha256: str | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a downloaded file is; written beside it.

    Attributes:
        schema: version of this document.
        repo: hub repository.
        revision: its commit.
        file: name in the repository.
        sha256: of the file.
        size_bytes: of the file.
        licence: identifier of the licence shown.
        accepted: whether the licence was accepted explicitly.
        downloaded: time, ISO 8601, UTC.
    """

    repo: str
    revision: str
    file: str
    sha256: str
    size_bytes: int
    licence: str
    accepted: bool
    downloaded: str
    schema: int = 1


@dataclass(frozen=True)
class Pulled:
    """A file that is there.

    Attributes:
        path: where.
        receipt: what it is.
        downloaded: whether this call downloaded it.
    """

    path: Path
    receipt: Receipt
    downloaded: bool


@dataclass(frozen=True)
class BundleReference:
    """``hf:organisation/name@revision``, taken apart.

    Attributes:
        repo: ``"organisation/name"``.
        revision: commit, tag or branch; ``None`` for the newest commit.
    """

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return f"{_PREFIX}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def weights_directory(name: str) -> Path:
    """Return where the weights of a model are kept unless a directory is given."""
    return cache_root() / "models" / name


def receipt_path(path: Path) -> Path:
    """Return where the receipt of a downloaded file is."""
    return path.with_name(path.name + _RECEIPT_SUFFIX)


def pull(
    wanted: WantedFile,
    directory: Path,
    *,
    licence: str,
    accepted: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Return a file of the hub, downloading it unless it is there.

    Without a revision, a file that was downloaded before stays on its recorded commit: its hash is checked
    (about 1 GB/s) and nothing is asked of the network.

    Args:
        wanted: what.
        directory: where to; it is made.
        licence: identifier of the licence, for the receipt.
        accepted: whether the user accepted it explicitly.
        progress: told how far the download is.

    Raises:
        MissingExtraError: the hub's client is not installed.
        InputError: no network, no such repository, revision or file, no access, a wrong hash, a full disk, or
            a file of another origin in the way. Nothing is then in place that was not there before.
    """
    with _made(directory), _locked(directory):
        known = _known(wanted, directory)
        if known is not None and (wanted.revision is None or wanted.revision == known.receipt.revision):
            return known
        hub = HubClient.connect()
        recorded = None if wanted.revision else _recorded(wanted, directory)
        revision = wanted.revision or (recorded.revision if recorded else wanted.default_revision)
        remote = hub.find(wanted.repo, wanted.files, revision)
        if known is not None and known.receipt.revision == remote.revision:
            return known
        path = directory / PurePosixPath(remote.name).name
        _refuse_foreign(path, wanted.repo)
        expected = [("the table of models", wanted.sha256)]
        if recorded is not None and recorded.file == remote.name:
            expected.append((f"the receipt {str(receipt_path(path))!r}", recorded.sha256))

        def write_receipt(sha256: str, size_bytes: int) -> None:
            receipt = Receipt(
                repo=remote.repo,
                revision=remote.revision,
                file=remote.name,
                sha256=sha256,
                size_bytes=size_bytes,
                licence=licence,
                accepted=accepted,
                downloaded=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            document = msgspec.json.format(msgspec.json.encode(receipt), indent=2) + b"\n"
            _replace(receipt_path(path), document)

        # The receipt comes first: a file without one would look like the user's own after a sudden end.
        hub.download(remote, path, expected=expected, progress=progress, before=write_receipt)
        receipt = _read_receipt(path)
        if receipt is None:
            raise InputError(f"{str(receipt_path(path))!r} vanished while it was used: run it again.")
        return Pulled(path, receipt, downloaded=True)


# --- bundles -----------------------------------------------------------------------------------------------


def parse_bundle_reference(text: str) -> BundleReference:
    """Return the parts of ``hf:organisation/name[@revision]``.

    Raises:
        InputError: the text has another form.
    """
    repo, at, revision = text.removeprefix(_PREFIX).partition("@")
    parts = repo.split("/")
    named = len(parts) == 2 and all(_NAME.fullmatch(part) and ".." not in part for part in parts)
    if not text.startswith(_PREFIX) or not named or (at and not _is_revision(revision)):
        raise InputError(
            f"bundle {text!r} cannot be found on the hub: expected hf:organisation/name@revision, where the "
            "revision is a commit, tag or branch."
        )
    return BundleReference(repo, revision or None)


def fetch_bundle(
    reference: BundleReference | str,
    *,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the directory of a bundle on the hub, downloading what is not there.

    Only the manifest and the files it names are downloaded; each must have the sha256 the manifest states.
    A commit that was downloaded before needs no network; nor does a tag, branch or missing revision while the
    hub cannot be reached: the commit it last stood for is used then.

    Args:
        reference: ``hf:organisation/name@revision``.
        say: told in a sentence which commit was taken, where the reference does not name one.
        progress: told how far the download is.

    Raises:
        MissingExtraError: the hub's client is not installed.
        InputError: as :func:`pull`.
        BundleError: the repository holds no bundle, or a damaged one.
    """
    wanted = parse_bundle_reference(reference) if isinstance(reference, str) else reference
    say = say or _log.info
    home = cache_root() / "bundles" / wanted.repo.replace("/", "--")
    named = wanted.revision is not None and COMMIT.fullmatch(wanted.revision)
    if named and (home / str(wanted.revision) / MANIFEST_NAME).is_file():
        return home / str(wanted.revision)
    hub = HubClient.connect()
    note = home / f"{hashlib.sha256((wanted.revision or '').encode()).hexdigest()[:16]}.revision"
    try:
        files = hub.files(wanted.repo, wanted.revision)
    except UnreachableError as error:
        commit = _read_text(note)
        if not COMMIT.fullmatch(commit) or not (home / commit / MANIFEST_NAME).is_file():
            raise InputError(str(error)) from error
        say(f"{wanted}: the hub cannot be reached, so the copy of commit {commit} is used")
        return home / commit
    if MANIFEST_NAME not in files:
        raise BundleError(
            f"{wanted}: the repository has no {MANIFEST_NAME}, so it holds no bundle: expected a directory "
            "that `edgeclip export` wrote."
        )
    commit = files[MANIFEST_NAME].revision
    directory = home / commit
    if not named:
        say(f"{wanted}: commit {commit}")
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        if not (directory / MANIFEST_NAME).is_file():
            _fetch_files(hub, files, directory, where=str(wanted), progress=progress)
    _replace(note, commit.encode())
    return directory


def _fetch_files(
    hub: HubClient, files: dict[str, RemoteFile], directory: Path, *, where: str, progress: Progress | None
) -> None:
    """Download what the manifest names, then put the manifest in place."""
    size_bytes = files[MANIFEST_NAME].size_bytes or 0
    if size_bytes > _MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{where}: its {MANIFEST_NAME} has {size_bytes} bytes, expected at most {_MAX_MANIFEST_BYTES}: "
            "it is no bundle's."
        )
    draft = directory / f".{MANIFEST_NAME}.draft"
    hub.download(files[MANIFEST_NAME], draft, progress=None)
    try:
        _, manifest = parse_manifest(draft.read_bytes(), where)
        for name, entry in manifest.files.items():
            if name not in files:
                raise BundleError(
                    f"{where}: the manifest names {name!r}, which the repository does not have: "
                    "the bundle is incomplete, so upload it again."
                )
            path = directory / name
            if path.is_file() and _hashed(path) == (entry.size_bytes, entry.sha256):
                continue
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            hub.download(files[name], path, expected=[("the manifest", entry.sha256)], progress=progress)
        with disk_errors(directory):
            draft.replace(directory / MANIFEST_NAME)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text


# --- files -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a directory, and remove it again where it is new and stays empty."""
    is_new = not directory.exists()
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, waiting for whoever has it."""
    while True:
        try:
            with disk_errors(directory):
                lock = DirectoryLock(directory)
            break
        except BlockingIOError:
            time.sleep(_LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _known(wanted: WantedFile, directory: Path) -> Pulled | None:
    """Return the file that is already there and is what its receipt says."""
    for name in wanted.files:
        path = directory / PurePosixPath(name).name
        receipt = _read_receipt(path)
        if receipt is None or (receipt.repo, receipt.file) != (wanted.repo, name) or not path.is_file():
            continue
        if wanted.sha256 is not None and receipt.sha256 != wanted.sha256:
            continue
        if _hashed(path) == (receipt.size_bytes, receipt.sha256):
            return Pulled(path, receipt, downloaded=False)
    return None


def _recorded(wanted: WantedFile, directory: Path) -> Receipt | None:
    """Return the receipt of an earlier download whose file is gone or damaged."""
    for name in wanted.files:
        receipt = _read_receipt(directory / PurePosixPath(name).name)
        if receipt is not None and receipt.repo == wanted.repo:
            return receipt
    return None


def _refuse_foreign(path: Path, repo: str) -> None:
    """Refuse to replace a file that this module did not put there for the same repository."""
    receipt = _read_receipt(path)
    if path.exists() and receipt is None:
        raise InputError(
            f"{str(path)!r} exists and was not downloaded by edgeclip: move it away, or say another "
            "directory."
        )
    if receipt is not None and receipt.repo != repo:
        raise InputError(
            f"{str(path)!r} is from {receipt.repo!r}, not from {repo!r}: say another directory for "
            "each model."
        )


def _read_receipt(path: Path) -> Receipt | None:
    try:
        return msgspec.json.decode(receipt_path(path).read_bytes(), type=Receipt)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.debug("no receipt of %s: %s", path, error)
        return None


def _hashed(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as stream:
        return hash_stream(stream)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _replace(path: Path, data: bytes) -> None:
    """Write a small file by a rename."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with disk_errors(path):
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
