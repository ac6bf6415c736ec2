"""Picture indexes: the embeddings of all pictures of a folder in one file, kept up to date.

:func:`update_index` embeds what is new and drops what is gone. A file counts as unchanged while time of
change, size and inode are; where one of them differs, its content decides: files that were moved, copied or
only touched keep their embeddings. Pictures that cannot be decoded are remembered with the reason and tried
again when they change. What is known goes to a journal at once, so that a run which is killed goes on where
it was; the index itself is replaced at the end, by one rename (:mod:`edgeclip.index_file`).

    >>> with ZeroShotClassifier.open() as classifier:                      # doctest: +SKIP
    ...     update_index("photos", classifier, made_with(classifier.bundle, classifier.choice.variant))
"""

from __future__ import annotations

import hashlib
import os
import stat as stat_bits
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

import numpy as np

from .data import read_samples
from .errors import BackendError, ConfigError, EdgeClipError, InputError
from .index_file import (
    INDEX_NAME,
    Entry,
    Journal,
    MadeWith,
    PictureIndex,
    Stat,
    check_replaceable,
    stat_of,
    write_index,
)
from .storage import FileLock

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bundle import Bundle, Variant

__all__ = ["Embedder", "IndexProgress", "IndexReport", "index_folder", "made_with", "update_index"]

_HASH_BYTES: Final = 1 << 20
_TICK_NS: Final = 2_000_000_000  # the coarsest clock of a file system in use: FAT
_MAX_REASON_CHARS: Final = 300
_LOOKED_FOR: Final = 10  # pictures of an index, in a folder that may be another one
_REPLACES_MAPPED: Final = sys.platform != "win32"  # whether a file can be replaced that is mapped


class EmbeddedPicture(Protocol):
    """What became of one picture: its unit embedding ``(E,)``, or the error that stands for it."""

    @property
    def embedding(self) -> NDArray[np.float32] | None: ...
    @property
    def error(self) -> EdgeClipError | None: ...


class Embedder(Protocol):
    """What embeds pictures; :class:`edgeclip.ZeroShotClassifier` does."""

    def embed_stream(
        self, images: Iterable[Path], *, batch_size: int | None = None
    ) -> Iterator[EmbeddedPicture]:
        """Yield what becomes of each picture, in order."""
        ...


@dataclass(frozen=True)
class IndexProgress:
    """How far an update is.

    Attributes:
        to_look_at: pictures that are new or may have changed.
        looked_at: of these.
        remaining_s: estimated from those; ``None`` before the first.
    """

    to_look_at: int
    looked_at: int
    remaining_s: float | None


@dataclass
class IndexReport:
    """What an update did.

    Attributes:
        path: of the index.
        pictures: in it, with an embedding.
        embedded: pictures that the tower looked at.
        resumed: entries that an interrupted run had left.
        recognised: pictures that were moved, copied or touched, and kept the embedding of their content.
        removed: entries whose file is gone.
        unchanged: pictures that are as they were.
        broken: why pictures of the index have no embedding, by path.
        failed: paths that this run could not read, with the reason; those of :attr:`broken` among them that
            it tried.
        repaired: what was wrong with the index that was there, empty where nothing was.
        seconds: it took.
    """

    path: Path
    pictures: int = 0
    embedded: int = 0
    resumed: int = 0
    recognised: int = 0
    removed: int = 0
    unchanged: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    repaired: str = ""
    seconds: float = 0.0


def made_with(bundle: Bundle, variant: Variant) -> MadeWith:
    """Return what an index says its embeddings were made with."""
    model = bundle.manifest.model
    return MadeWith(
        model.embedding_space, variant.name, variant.tower_digest("image"), model.name, model.embed_dim
    )


def index_folder(path: Path, folder: Path) -> str:
    """Return how an index names its folder: relative where the folder lies with it, so that both can move."""
    there, here = os.path.abspath(folder), os.path.abspath(path.parent)  # noqa: PTH100  # links stay links
    if there == here or there.startswith(here.rstrip(os.sep) + os.sep):
        return Path(os.path.relpath(there, here)).as_posix()
    return there


def update_index(
    folder: str | os.PathLike[str],
    embedder: Embedder,
    made: MadeWith,
    *,
    path: str | os.PathLike[str] | None = None,
    verify: bool = False,
    rebuild: bool = False,
    batch_size: int | None = None,
    on_progress: Callable[[IndexProgress], None] | None = None,
    on_failure: Callable[[str, str], None] | None = None,
    on_skipped: Callable[[Path, str], None] | None = None,
) -> IndexReport:
    """Make the index of a folder, or bring it up to date.

    Args:
        folder: its pictures are found as :func:`edgeclip.data.read_samples` finds them.
        embedder: a classifier.
        made: what it embeds with, as :func:`made_with` returns it.
        path: of the index; by default ``.edgeclip-index`` in the folder.
        verify: compare contents instead of times, and try broken pictures again.
        rebuild: embed everything anew.
        batch_size: pictures a tower call, as ``embed_stream`` takes it.
        on_progress: called after each picture that was looked at.
        on_failure: called with the path of a picture that cannot be read, and the reason.
        on_skipped: called with a folder that cannot be listed, and the reason; without it that is an error.
            What the index knows of pictures in it stays, but not with ``rebuild``.

    Raises:
        InputError: the folder cannot be read, holds no pictures any more, or the index cannot be written.
            The old index is as it was, and the next call goes on.
        ConfigError: the index was made with something else, of another folder or by a newer edgeclip, or
            another process is making it.
        BackendError: the tower failed.
    """
    root = Path(folder)
    if not root.is_dir():
        kind = "is no folder" if root.exists() else "there is no such folder"
        raise InputError(f"{str(root)!r}: {kind}, expected a folder of pictures. Check the path.")
    target = root / INDEX_NAME if path is None else Path(path)
    if target.is_dir():
        raise InputError(f"{str(target)!r} is a folder, expected a file to write the index to.")
    began = time.perf_counter()
    try:
        lock = FileLock(target.with_name(f"{target.name}.lock"))
    except BlockingIOError as error:
        raise ConfigError(
            f"picture index {str(target)!r}: another process is making it. Wait for it, or choose another -o."
        ) from error
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        update = _Update(root, target, made, rebuild=rebuild, verify=verify)
        with closing(update):
            update.scan(on_skipped)
            update.embed(embedder, batch_size, on_progress, on_failure)
            report = update.commit()
    finally:
        lock.release()
    report.seconds = time.perf_counter() - began
    return report


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"picture index {str(path)!r} cannot be written ({error.strerror or error}). "
        "Check rights and room of its folder, or choose another place with -o FILE."
    )


class _Update:
    """One update of an index; :func:`update_index` tells its steps."""

    def __init__(self, root: Path, target: Path, made: MadeWith, *, rebuild: bool, verify: bool) -> None:
        self._root, self._target, self._made = root, target, made
        self._said_root = index_folder(target, root)
        self._verify = verify
        self._report = IndexReport(target)
        self._stale = True  # whether the index has to be written
        self._entries: dict[str, Entry] = {}
        if target.exists():
            check_replaceable(target)
            if not rebuild:
                self._read_old()
        try:
            self._journal = Journal(target, self._said_root, made, rebuild=rebuild)
        except OSError as error:
            raise _unwritable(target, error) from error
        self._entries |= self._journal.entries
        self._report.resumed = len(self._journal.entries)
        self._stale |= bool(self._journal.entries)
        self._by_content = {each.content: each for each in self._entries.values() if each.content}
        self._kept: dict[str, Entry] = {}
        self._pending: list[tuple[str, Path]] = []

    def close(self) -> None:
        """Leave the journal for the next run, where it is still there."""
        self._journal.close()

    def _read_old(self) -> None:
        """Take the entries of the index that is there, as far as they are sound."""
        try:
            old = PictureIndex(self._target)
        except InputError as error:
            self._report.repaired = str(error)
            return
        if old.made_with != self._made:
            raise ConfigError(_made_differently(old, self._made))
        for name, entry in old.entries():
            row = entry.embedding
            if row is not None and not _REPLACES_MAPPED:
                row = row.copy()
            self._entries[name] = entry._replace(embedding=row)
        try:
            old.check()
        except InputError as error:
            self._report.repaired = str(error)
            return
        self._stale = os.path.abspath(old.root) != os.path.abspath(self._root)  # noqa: PTH100
        if self._stale and self._entries and not self._knows_some():
            raise ConfigError(
                f"{old.where}: is of the folder {str(old.root)!r}, got {str(self._root)!r}. Choose "
                "another -o, or give --rebuild."
            )

    def _knows_some(self) -> bool:
        """Return whether pictures of the index are in the folder; names alone may be those of any camera."""
        step = -(-len(self._entries) // _LOOKED_FOR)
        for name, entry in islice(self._entries.items(), 0, None, step):
            path = self._root / name
            try:
                if stat_of(path).size_bytes == entry.stat.size_bytes and _content(path) == entry.content:
                    return True
            except OSError:  # gone, as some may be
                continue
        return False

    def scan(self, skipped: Callable[[Path, str], None] | None) -> None:
        """Find the pictures, and tell those that are as they were from those to look at."""
        unlisted: list[str] = []

        def on_skipped(path: Path, reason: str) -> None:
            if skipped is None:
                raise InputError(f"folder {str(path)!r} cannot be listed ({reason}). Check its rights.")
            unlisted.append(f"{path.relative_to(self._root).as_posix()}/")
            skipped(path, reason)

        for sample in read_samples([self._root], skipped=on_skipped):
            path = cast("Path", sample.source)
            name = path.relative_to(self._root).as_posix()
            entry = self._entries.get(name)
            if entry is not None and not self._verify and _is_as_it_was(path, entry.stat):
                self._kept[name] = entry
            else:
                self._pending.append((name, path))
        for name, entry in self._entries.items():
            if unlisted and name not in self._kept and name.startswith(tuple(unlisted)):
                self._kept[name] = entry
        seen = len(self._kept) + len(self._pending)
        if self._entries and not seen:
            raise InputError(
                f"{str(self._root)!r}: holds no pictures, but its index has {len(self._entries):,}; it "
                "stays. Check that the disk is there, or give --rebuild."
            )
        self._report.unchanged = len(self._kept)
        self._report.removed = len(
            self._entries.keys() - self._kept.keys() - {name for name, _ in self._pending}
        )
        self._stale |= bool(self._report.removed)

    def embed(
        self,
        embedder: Embedder,
        batch_size: int | None,
        on_progress: Callable[[IndexProgress], None] | None,
        on_failure: Callable[[str, str], None] | None,
    ) -> None:
        """Look at what is new or may have changed, and write it to the journal."""
        began, looked_at = time.perf_counter(), 0
        waiting: deque[tuple[str, Path, Stat, Entry]] = deque()  # at the tower

        def done(name: str, entry: Entry | None, reason: str = "") -> None:
            nonlocal looked_at
            looked_at += 1
            if entry is not None:
                self._add(name, entry)
            if reason:
                self._report.failed[name] = reason
                if on_failure is not None:
                    on_failure(name, reason)
            if on_progress is not None:
                remaining_s = (time.perf_counter() - began) / looked_at * (len(self._pending) - looked_at)
                on_progress(IndexProgress(len(self._pending), looked_at, remaining_s))

        def to_embed() -> Iterator[Path]:
            for name, path in self._pending:
                try:
                    stat = stat_of(path)
                    trusted = _trusted(stat)
                    content = _content(path)
                except OSError as error:  # it may be readable next time, and need not have changed for that
                    self._stale |= name in self._entries
                    done(name, None, f"cannot be opened ({error.strerror or error})")
                    continue
                known = self._by_content.get(content)
                if known is not None and not (self._verify and known.reason):
                    own = self._entries.get(name)
                    if own is not None and own.content == content:
                        self._report.unchanged += 1
                        done(name, own if own.stat in (stat, trusted) else own._replace(stat=trusted))
                    else:
                        self._report.recognised += 1
                        done(name, known._replace(stat=trusted))
                    continue
                waiting.append((name, path, stat, Entry(trusted, content, None)))
                yield path

        for each in embedder.embed_stream(to_embed(), batch_size=batch_size):
            name, path, stat, entry = waiting.popleft()
            if not _is_as_it_was(path, stat):  # nobody knows which of its contents was embedded
                entry = entry._replace(stat=stat._replace(mtime_ns=-1), content=b"")
            if each.embedding is None:
                reason = _reason(path, each.error)
                done(name, entry._replace(reason=reason), reason)
                continue
            if not np.isfinite(each.embedding).all():
                raise BackendError("the image tower gave no numbers; run `edgeclip verify`.")
            self._report.embedded += 1
            entry = entry._replace(embedding=each.embedding)
            if entry.content:
                self._by_content[entry.content] = entry
            done(name, entry)

    def _add(self, name: str, entry: Entry) -> None:
        self._kept[name] = entry
        if self._entries.get(name) is entry:
            return
        self._stale = True
        try:
            self._journal.add(name, entry)
        except OSError as error:
            raise _unwritable(self._target, error) from error

    def commit(self) -> IndexReport:
        """Write the index, where anything changed, and remove the journal."""
        try:
            if self._stale:
                write_index(self._target, self._said_root, self._made, self._kept)
            self._journal.remove()
        except OSError as error:
            raise _unwritable(self._target, error) from error
        report = self._report
        report.broken = {name: each.reason for name, each in sorted(self._kept.items()) if each.reason}
        report.pictures = len(self._kept) - len(report.broken)
        return report


def _made_differently(old: PictureIndex, now: MadeWith) -> str:
    had = old.made_with
    if had.space != now.space:
        was, got = f"model {had.model!r} (space {had.space[:12]})", f"{now.model!r} (space {now.space[:12]})"
    else:
        was, got = f"variant {had.variant!r} ({had.tower[:12]})", f"{now.variant!r} ({now.tower[:12]})"
    return (
        f"{old.where}: was made with {was}, got {got}; their embeddings do not mix. Give the same one, or "
        "--rebuild."
    )


def _is_as_it_was(path: Path, stat: Stat) -> bool:
    try:
        return stat_of(path) == stat
    except OSError:
        return False


def _trusted(stat: Stat) -> Stat:
    """Return a stat without its time where a change right now would leave that time as it is."""
    return stat if time.time_ns() - stat.mtime_ns > _TICK_NS else stat._replace(mtime_ns=-1)


def _content(path: Path) -> bytes:
    """Return the digest of a file.

    Raises:
        OSError: it cannot be read, or is no regular file: a pipe may never end.
    """
    if not stat_bits.S_ISREG(path.stat().st_mode):
        raise OSError("is no regular file")
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
    return digest.digest()


def _reason(path: Path, error: EdgeClipError | None) -> str:
    """Return why a picture cannot be read, in one line and without its path, which may change."""
    said = " ".join(str(error).replace("\0", " ").split()).removeprefix(f"{os.fspath(path)!r}: ")
    return said.encode("utf-8", "backslashreplace").decode()[:_MAX_REASON_CHARS] or "cannot be read"
