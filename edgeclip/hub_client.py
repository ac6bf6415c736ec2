"""What edgeclip asks of the hub's client: list a repository, and download one file, checked.

``huggingface_hub`` (extra ``hub``) is imported when :meth:`HubClient.connect` is called, and its errors
become ours here, one sentence each. Its own download functions start again from nothing after an
interruption, so that only its transfer of one file is used; what has arrived stays in a part file, whose name
carries the hash it must come to.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from edgeclip.errors import InputError, MissingExtraError

__all__ = ["COMMIT", "HubClient", "Progress", "RemoteFile", "UnreachableError", "disk_errors"]

Progress = Callable[[str, int, int], None]
COMMIT = re.compile(r"[0-9a-f]{40}")

_BLOCK_BYTES = 1 << 20
_REPORT_SECONDS = 0.2
_TIMEOUT_SECONDS = 30
# EFBIG is what a quota on file sizes gives.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How the client's libraries call a connection that stood and then did not.
_BROKEN_OFF = {
    "RemoteProtocolError",
    "ReadError",
    "ReadTimeout",
    "ChunkedEncodingError",
    "ConnectionResetError",
}
_NETWORK_PACKAGES = {"httpx2", "httpx", "httpcore", "httpcore2", "requests", "urllib3", "socket", "ssl"}


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub describes it.

    Attributes:
        repo: hub repository.
        revision: its commit.
        name: in the repository.
        size_bytes: of the file, where it is said.
        sha256: of the file; only large files have one.
        blob: git's SHA-1 of the others.
    """

    repo: str
    revision: str
    name: str
    size_bytes: int | None
    sha256: str | None
    blob: str | None


class UnreachableError(InputError):
    """The hub cannot be reached: copies may still serve."""


@dataclass(frozen=True)
class HubClient:
    """The hub's client and where the hub is."""

    client: Any
    endpoint: str

    @classmethod
    def connect(cls) -> HubClient:
        """Import the client; opens no connection."""
        fresh = "huggingface_hub" not in sys.modules
        said = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
        if fresh:
            os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read once, at its import
        try:
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.errors
            import huggingface_hub.file_download
        except ImportError as error:
            raise MissingExtraError(
                "downloading from the hub", extra="hub", module="huggingface_hub"
            ) from error
        finally:
            if fresh:
                if said is None:
                    os.environ.pop("HF_HUB_DISABLE_TELEMETRY", None)
                else:
                    os.environ["HF_HUB_DISABLE_TELEMETRY"] = said
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        return cls(huggingface_hub, endpoint.rstrip("/"))

    def files(self, repo: str, revision: str | None) -> dict[str, RemoteFile]:
        """Return the files of a repository at a commit; a tag, branch or ``None`` is resolved."""
        shown = f"{repo!r}" + (f" at {revision!r}" if revision else "")
        with self._translated(f"the repository {shown}"):
            api = self.client.HfApi(
                endpoint=self.endpoint, library_name="edgeclip", library_version=version("edgeclip")
            )
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
        commit = info.sha or ""
        if not COMMIT.fullmatch(commit):
            raise InputError(
                f"the hub at {self.endpoint} gave no commit for {shown}, got {commit!r}: is it a hub?"
            )
        return {
            sibling.rfilename: RemoteFile(
                repo=repo,
                revision=commit,
                name=sibling.rfilename,
                size_bytes=sibling.size,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                blob=None if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings or ()
        }

    def find(self, repo: str, names: tuple[str, ...], revision: str | None) -> RemoteFile:
        """Return the first of some files that a repository has."""
        files = self.files(repo, revision)
        for name in names:
            if name in files:
                return files[name]
        have = ", ".join(sorted(files)[:12]) or "nothing"
        raise InputError(
            f"the repository {repo!r} has none of {', '.join(names)}; it has {have}: "
            "say another --revision, or download the file yourself."
        )

    def download(
        self,
        remote: RemoteFile,
        path: Path,
        *,
        expected: list[tuple[str, str | None]] | None = None,
        progress: Progress | None,
        before: Callable[[str, int], None] | None = None,
    ) -> None:
        """Put a file in place, checked. The caller holds the directory's lock.

        Args:
            remote: what.
            path: where to.
            expected: who says which sha256, beside the hub.
            progress: told how far it is.
            before: told sha256 and size of the checked file just before it is put in place.

        Raises:
            InputError: what went wrong, in a sentence; nothing is then in place.
        """
        what = f"{remote.name!r} of {remote.repo!r}"
        claims = [(who, sha256) for who, sha256 in expected or () if sha256]
        claims += [("the hub", remote.sha256)] if remote.sha256 else []
        for who, sha256 in claims[:-1]:
            if sha256 != claims[-1][1]:
                raise InputError(
                    f"{what}: {who} says sha256 {sha256}, {claims[-1][0]} says {claims[-1][1]}; nothing was "
                    "downloaded: say another --revision, or find out which one is right."
                )
        tag = (claims[0][1] if claims else remote.blob) or remote.revision
        part = path.with_name(f".{path.name}.{tag[:16]}.part")
        try:
            with self._translated(what), disk_errors(path):
                metadata = self._metadata(remote)
                size_bytes = remote.size_bytes if remote.size_bytes is not None else metadata.size
                self._check_space(part, size_bytes, what)
                with part.open("a+b") as stream:
                    sink = _Sink(stream, remote.name, size_bytes or 0, progress)
                    self._receive(metadata, sink, size_bytes, remote)
                    stream.flush()
                    os.fsync(stream.fileno())
        except _NoSpaceError:
            part.unlink(missing_ok=True)
            raise
        self._compare(what, remote, claims, sink, part)
        if before is not None:
            before(sink.sha256.hexdigest(), sink.size_bytes)
        with disk_errors(path):
            part.replace(path)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            stale.unlink(missing_ok=True)  # of another revision, given up

    def _compare(
        self, what: str, remote: RemoteFile, claims: list[tuple[str, str]], sink: _Sink, part: Path
    ) -> None:
        """Compare what arrived with everything that is known of it; remove it where that differs."""
        got = sink.sha256.hexdigest()
        wrong = [(who, sha256) for who, sha256 in claims if sha256 != got]
        if not claims and remote.blob and not sink.is_blob(remote.blob, part):
            wrong = [("the hub", f"another content (git blob {remote.blob})")]
        if wrong:
            part.unlink(missing_ok=True)
            raise InputError(
                f"{what}: what arrived has sha256 {got} and {sink.size_bytes} bytes, {wrong[0][0]} says "
                f"{wrong[0][1]}: it was damaged or exchanged on the way and was removed; try again."
            )

    def _metadata(self, remote: RemoteFile) -> Any:
        url = self.client.hf_hub_url(
            remote.repo, remote.name, revision=remote.revision, endpoint=self.endpoint
        )
        return self.client.get_hf_file_metadata(
            url, headers=self._headers(), timeout=_TIMEOUT_SECONDS, endpoint=self.endpoint
        )

    def _headers(self) -> dict[str, str]:
        headers: dict[str, str] = self.client.utils.build_hf_headers(
            library_name="edgeclip", library_version=version("edgeclip")
        )
        return headers

    def _receive(self, metadata: Any, sink: _Sink, size_bytes: int | None, remote: RemoteFile) -> None:
        """Stream the rest of a file into its part."""
        headers = self._headers()
        if not _same_host(metadata.location, self.endpoint):
            headers.pop("authorization", None)
            headers.pop("Authorization", None)
        if size_bytes is not None and sink.size_bytes > size_bytes:
            sink.seek(0)
            sink.truncate()
        with _quiet(self.client):
            self.client.file_download.http_get(
                metadata.location,
                cast("BinaryIO", sink),
                resume_size=sink.size_bytes,
                headers=headers,
                expected_size=size_bytes,
                displayed_filename=remote.name,
            )

    def _check_space(self, part: Path, size_bytes: int | None, what: str) -> None:
        have = part.stat().st_size if part.exists() else 0
        free = shutil.disk_usage(part.parent).free
        if size_bytes is not None and size_bytes - have > free:
            raise InputError(
                f"{what} needs {(size_bytes - have) / 1e6:,.0f} MB in {str(part.parent)!r}, which has "
                f"{free / 1e6:,.0f} MB free: make room, or say another directory."
            )

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn the client's errors into one sentence each."""
        errors = self.client.errors
        try:
            yield
        except InputError:
            raise
        except errors.OfflineModeIsEnabled as error:
            raise UnreachableError(
                f"{what} was not downloaded: HF_HUB_OFFLINE forbids the network; unset it, or use a "
                "copy that is already here."
            ) from error
        except errors.GatedRepoError as error:
            raise InputError(
                f"{what} is gated: accept its terms on {self.endpoint} with your account, and set "
                "HF_TOKEN to a token of it."
            ) from error
        except errors.RevisionNotFoundError as error:
            raise InputError(
                f"{what} was not downloaded: the repository has no such revision; say a commit, tag or "
                "branch it has."
            ) from error
        except errors.RepositoryNotFoundError as error:
            status = _status(error)
            raise InputError(
                f"{what} was not downloaded: {self.endpoint} answers {status}: there is no such repository, "
                "or it is private; check the name, or set HF_TOKEN to a token that may read it."
            ) from error
        except errors.EntryNotFoundError as error:
            raise InputError(
                f"{what} was not downloaded: that revision has no such file; say another --revision."
            ) from error
        except errors.HfHubHTTPError as error:
            status = _status(error)
            advice = "set HF_TOKEN to a token that may read it" if status in (401, 403) else "try again later"
            kind = InputError if status in (401, 403) else UnreachableError
            raise kind(f"{what} was not downloaded: {self.endpoint} answers {status}: {advice}.") from error
        except OSError as error:
            if _is_network(error):
                raise self._unreachable(what, error) from error
            if "Consistency check failed" in str(error):
                raise InputError(
                    f"{what} arrived incomplete: the connection ended early; run the same command again, it "
                    "continues there."
                ) from error
            raise
        except Exception as error:
            if not _is_network(error):
                raise
            raise self._unreachable(what, error) from error

    def _unreachable(self, what: str, error: BaseException) -> UnreachableError:
        if type(error).__name__ in _BROKEN_OFF:
            return UnreachableError(
                f"{what} arrived incomplete: the connection broke off ({_reason(error)}); run the same "
                "command again, it continues there."
            )
        return UnreachableError(
            f"{what} was not downloaded: {self.endpoint} cannot be reached ({_reason(error)}); check the "
            "network, or copy the file from another machine."
        )


class _NoSpaceError(InputError):
    """The disk became full: what has arrived is given up."""


class _Sink:
    """The part of a file that has arrived: counts, hashes and reports what is written.

    The client writes forward, and goes back only to start again.
    """

    def __init__(self, stream: BinaryIO, name: str, total: int, progress: Progress | None) -> None:
        self._stream, self._name, self._total, self._progress = stream, name, total, progress
        self._reported = 0.0
        self.sha256 = hashlib.sha256()
        self.size_bytes = 0
        stream.seek(0)
        while block := stream.read(_BLOCK_BYTES):
            self.sha256.update(block)
            self.size_bytes += len(block)
        self._report(force=True)

    def write(self, block: bytes) -> int:
        self._stream.write(block)
        self.sha256.update(block)
        self.size_bytes += len(block)
        self._report(force=self.size_bytes == self._total)
        return len(block)

    def tell(self) -> int:
        return self.size_bytes

    def seek(self, position: int) -> int:
        if position not in (0, self.size_bytes):
            raise ValueError(f"a download cannot go back to byte {position}")
        if position == 0:
            self.sha256, self.size_bytes = hashlib.sha256(), 0
        return position

    def truncate(self) -> int:
        self._stream.truncate(self.size_bytes)
        return self.size_bytes

    def is_blob(self, sha1: str, part: Path) -> bool:
        """Tell whether the file is the git blob of this name."""
        digest = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        with part.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest() == sha1

    def _report(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and (force or now - self._reported > _REPORT_SECONDS):
            self._reported = now
            self._progress(self._name, self.size_bytes, self._total)


@contextlib.contextmanager
def _quiet(client: Any) -> Iterator[None]:
    """Keep the client's remarks on retries and its own bar off the terminal: the caller shows progress."""
    utils, logger = client.utils, logging.getLogger("huggingface_hub")
    level, bars_were_off = logger.level, utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not bars_were_off:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars_were_off:
            utils.enable_progress_bars()


def _same_host(url: str, endpoint: str) -> bool:
    ours, theirs = urlsplit(endpoint), urlsplit(url)
    return (ours.scheme, ours.netloc.lower()) == (theirs.scheme, theirs.netloc.lower())


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network(error: BaseException) -> bool:
    named = type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES
    return named or isinstance(error, (ConnectionError, TimeoutError))


def _reason(error: BaseException) -> str:
    """Return the innermost words of an error: those of the system."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = cast("BaseException", error.__cause__ or error.__context__)
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:200].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk into one sentence each."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _NoSpaceError(
                f"{str(path)!r} cannot be written: {(error.strerror or 'no space').lower()}; make room, or "
                "say another directory."
            ) from error
        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
            raise
        raise InputError(
            f"{str(path)!r} cannot be written: {(error.strerror or str(error)).lower()}; say another "
            "directory."
        ) from error
