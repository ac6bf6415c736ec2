"""Write tar shards.

::

    shard-000000.tar  shard-000000.index  shard-000001.tar …
    shards.json       the manifest: what they were made of and how, and each shard's samples and sha256

Files go in as they are, nothing is encoded again. A sample's members are its picture (``jpg``, ``png``, …),
``txt`` (its first alt text), ``json`` (where it came from, other captions), ``syn.json`` (synthetic captions,
as in DataCompDR) and ``cls`` (its label); samples that come from shards keep all members and their keys.

The same samples and settings give the same bytes. A shard gets its name when it is whole, and the manifest
names it after that: a run that was killed goes on behind the last shard whose hash is right.

Tar layout and writing: the ``webdataset`` package.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from edgeclip.distill.index import index_document, index_path
from edgeclip.distill.samples import (
    Broken,
    BrokenLimit,
    Sample,
    Samples,
    ShardSamples,
)
from edgeclip.errors import ConfigError, InputError, MissingExtraError
from edgeclip.pictures import sniff_format
from edgeclip.storage import TEMPORARY_PREFIX, DirectoryLock, hash_stream, sync_directory, write_temporary

__all__ = [
    "MANIFEST_NAME",
    "ShardEntry",
    "ShardManifest",
    "ShardWriter",
    "ShardsReport",
    "free_name",
    "is_whole",
    "read_document",
    "read_manifest",
    "tar_writer",
    "write_shards",
]

SCHEMA = 1
MANIFEST_NAME = "shards.json"
_SHARD_NAME = r"^shard-[0-9]{6}\.tar$"
_MAX_DOCUMENT_BYTES = 1 << 28
_MAX_PICTURE_BYTES = 1 << 28
_SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "WebP": "webp",
    "GIF": "gif",
    "TIFF": "tif",
    "BMP": "bmp",
    "AVIF": "avif",
    "PPM": "ppm",
}
_BLOCK = 512
_Document = TypeVar("_Document")


# -- The manifest -------------------------------------------------------------------------------------------


class _LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    index: int
    key: str
    reason: str


class ShardEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished shard; ``after`` counts the source's samples in it, in those before, or left out.

    ``without_caption`` are samples without any text.
    """

    name: Annotated[str, msgspec.Meta(pattern=_SHARD_NAME)]
    samples: int
    size_bytes: int
    sha256: str
    after: int
    without_caption: int = 0
    broken: tuple[_LeftOut, ...] = ()


class _Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    samples: int
    digest: str


class ShardManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``shards.json``: what a directory of shards was made of, how, and how far."""

    schema: Literal[1]
    kind: Literal["shards"]
    source: _Source
    samples_per_shard: int
    size_limit: int
    complete: bool
    shards: tuple[ShardEntry, ...] = ()


def read_manifest(directory: Path) -> ShardManifest | None:
    """Return the manifest of a directory; None where there is none.

    Raises:
        InputError: there is one, but it cannot be read.
    """
    return read_document(directory / MANIFEST_NAME, ShardManifest, "manifest of shards")


def read_document(path: Path, kind: type[_Document], what: str) -> _Document | None:
    """Return a JSON document that lies beside shards; None where there is none.

    Raises:
        InputError: there is one, but it is no ``what`` or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_DOCUMENT_BYTES + 1)
        if len(content) > _MAX_DOCUMENT_BYTES:
            raise msgspec.DecodeError(f"it has more than {_MAX_DOCUMENT_BYTES:,} bytes")
        return msgspec.json.decode(content, type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is no {what} ({' '.join(str(error).split())}). Remove it, and make the shards "
            "again."
        ) from error


# -- Writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardsReport:
    """What was written.

    Attributes:
        directory: where.
        status: ``"written"``; ``"resumed"``, where some shards were there; ``"present"``, where all were.
        shards: files.
        samples: in them.
        size_bytes: of the shards.
        kept: shards that were there.
        without_caption: samples without any text; they are of no use for contrastive training.
        broken: samples left out.
        digest: of the samples, as :class:`~edgeclip.distill.samples.ShardSamples` gives it.
    """

    directory: Path
    status: Literal["written", "resumed", "present"]
    shards: int
    samples: int
    size_bytes: int
    kept: int
    without_caption: int
    broken: tuple[Broken, ...]
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"directory": str(self.directory)}


Progress = Callable[[int, int], None]


def write_shards(
    samples: Samples,
    directory: str | os.PathLike[str],
    *,
    samples_per_shard: int = 10_000,
    size_limit: int = 10**9,
    limit: BrokenLimit | None = None,
    progress: Progress | None = None,
) -> ShardsReport:
    """Write samples to a directory of shards, or go on where a run before was stopped.

    A picture that is missing or of no known format is left out and reported; pictures are not decoded
    (``edgeclip data validate`` does).

    Args:
        samples: what to write, in order.
        directory: to make; or one that holds shards of the same samples, made with the same settings.
        samples_per_shard: at most.
        size_limit: bytes of a shard at most, unless a single sample is larger.
        limit: samples that may be left out.
        progress: called with samples done and all samples.

    Raises:
        ConfigError: a number is out of range.
        InputError: too many samples are broken, the directory holds something else or is in use, the disk
            refuses, or the samples are none.
        MissingExtraError: ``webdataset`` is not installed.
    """
    for name, value in (("samples_per_shard", samples_per_shard), ("size_limit", size_limit)):
        if value < 1:
            raise ConfigError(f"shards: {name} is {value}, expected 1 or more.")
    target = Path(directory)
    plain = ShardManifest(
        schema=1,
        kind="shards",
        source=_Source(len(samples), samples.digest),
        samples_per_shard=samples_per_shard,
        size_limit=size_limit,
        complete=False,
    )
    if not target.exists():
        tar_writer()  # what is missing is said before a directory is made
    with _translated(target), _locked(target, plain):
        manifest, kept = _kept(target, plain, progress)
        if not manifest.complete:
            allowed = (limit or BrokenLimit()).allowed(len(samples))
            manifest = _write_rest(samples, target, manifest, allowed, progress)
    status: Literal["written", "resumed", "present"] = "resumed" if kept else "written"
    if kept == len(manifest.shards):
        status = "present"
    return ShardsReport(
        directory=target,
        status=status,
        shards=len(manifest.shards),
        samples=sum(shard.samples for shard in manifest.shards),
        size_bytes=sum(shard.size_bytes for shard in manifest.shards),
        kept=kept,
        without_caption=sum(shard.without_caption for shard in manifest.shards),
        broken=tuple(
            Broken(one.index, one.key, one.reason) for shard in manifest.shards for one in shard.broken
        ),
        digest=ShardSamples([target / shard.name for shard in manifest.shards]).digest,
    )


@contextmanager
def _translated(target: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise InputError(
            f"{str(target)!r} is being written by another process. Wait for it to end."
        ) from error
    except OSError as error:
        raise InputError(
            f"{str(target)!r} cannot be written ({error.strerror or error}). Check its permissions and the "
            "space left; the shards that are finished stay."
        ) from error


@contextmanager
def _locked(target: Path, plain: ShardManifest) -> Iterator[None]:
    """Hold the directory, which is new, empty, or holds a manifest of ours."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{str(target)!r} is a file, expected a directory to make.")
    found = read_manifest(target)
    if found is None and target.is_dir() and any(not _is_ours(path.name) for path in target.iterdir()):
        raise InputError(
            f"{str(target)!r} is there already and holds no shards of ours. Choose a directory that does not "
            "exist, or an empty one."
        )
    if found is not None and found.shards:  # a run that failed before its first shard binds nobody
        ours, theirs = (_settings(manifest) for manifest in (plain, found))
        differing = sorted(name for name in ours if ours[name] != theirs[name])
        if differing:
            raise InputError(
                f"{str(target)!r} holds shards made otherwise: "
                + ", ".join(f"{name} is {theirs[name]}, not {ours[name]}" for name in differing)
                + ". Remove it, or choose another directory."
            )
    target.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(target)
    try:
        for path in target.glob(f"{TEMPORARY_PREFIX}*"):  # left by a run that was killed
            path.unlink()
        yield
    finally:
        lock.release()


def _is_ours(name: str) -> bool:
    return name.startswith(".edgeclip-")


def _settings(manifest: ShardManifest) -> dict[str, Any]:
    return {
        "samples per shard": manifest.samples_per_shard,
        "size limit": manifest.size_limit,
        "the number of samples": manifest.source.samples,
        "the digest of the samples": manifest.source.digest[:16],
    }


def _kept(target: Path, plain: ShardManifest, progress: Progress | None) -> tuple[ShardManifest, int]:
    """Return the manifest cut before the first shard that is not what it says, and how many are left."""
    found = read_manifest(target)
    if found is None or not found.shards:
        return plain, 0
    kept: list[ShardEntry] = []
    for shard in found.shards:
        if not is_whole(target / shard.name, shard.size_bytes, shard.sha256):
            break
        _write_index(target / shard.name)
        kept.append(shard)
        if progress is not None:
            progress(shard.after, plain.source.samples)
    complete = found.complete and len(kept) == len(found.shards)
    return msgspec.structs.replace(plain, shards=tuple(kept), complete=complete), len(kept)


def is_whole(path: Path, size_bytes: int, sha256: str) -> bool:
    """Return whether a shard is what a manifest says; one that cannot be read is not."""
    try:
        with path.open("rb", buffering=0) as stream:
            return hash_stream(stream) == (size_bytes, sha256)
    except OSError:
        return False


def _write_index(shard: Path) -> None:
    document = index_document(shard)
    beside = index_path(shard)
    if not beside.is_file() or beside.read_bytes() != document:
        _put(beside, document)


def _put(path: Path, content: bytes) -> None:
    temporary, _, _ = write_temporary(path.parent, content)
    temporary.replace(path)
    sync_directory(path.parent)


def _write_rest(
    samples: Samples, target: Path, manifest: ShardManifest, allowed: int, progress: Progress | None
) -> ShardManifest:
    """Write what follows the last shard of the manifest; return the manifest of all."""
    make_writer = tar_writer()
    shards = list(manifest.shards)
    broken = [one for shard in shards for one in shard.broken]
    index = shards[-1].after if shards else 0
    _put_manifest(target, manifest)
    ahead: tuple[Sample, dict[str, bytes]] | None = None
    while index < len(samples):
        left_out: list[_LeftOut] = []
        count = size = mute = 0
        names: set[str] = set()
        with _new_shard(target, make_writer) as open_shard:
            while index < len(samples):
                try:
                    sample, members = ahead or _read(samples, index)
                    ahead = None
                except InputError as error:
                    left_out.append(_LeftOut(index, samples.key(index), " ".join(str(error).split())))
                    _check_allowed(broken + left_out, allowed, len(samples))
                else:
                    needed = _size_of(members)
                    if count and (count == manifest.samples_per_shard or size + needed > manifest.size_limit):
                        ahead = sample, members
                        break
                    name = free_name(members.pop("__key__").decode("utf-8", "surrogateescape"), names)
                    open_shard.write({"__key__": name, **members})
                    names.add(name)
                    count, size, mute = count + 1, size + needed, mute + (not sample.captions)
                index += 1
                if progress is not None:
                    progress(index, len(samples))
            if not count:
                raise InputError(
                    f"none of {len(samples)} samples can be used; the last one is {left_out[-1].key!r} "
                    f"({left_out[-1].reason.rstrip('.')})."
                )
            shard_name = f"shard-{len(shards):06d}.tar"
            size_bytes, sha256 = open_shard.finish(target / shard_name)
        broken += left_out
        shards.append(ShardEntry(shard_name, count, size_bytes, sha256, index, mute, tuple(left_out)))
        manifest = msgspec.structs.replace(
            manifest, shards=tuple(shards), complete=index == len(samples) and ahead is None
        )
        _put_manifest(target, manifest)
    return manifest


def _read(samples: Samples, index: int) -> tuple[Sample, dict[str, bytes]]:
    sample = samples.read(index)
    return sample, _members(sample, index)


def _put_manifest(target: Path, manifest: ShardManifest) -> None:
    _put(target / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def _check_allowed(broken: Sequence[_LeftOut], allowed: int, samples: int) -> None:
    if len(broken) > allowed:
        raise InputError(
            f"{len(broken)} of {samples} samples cannot be used, {allowed} are allowed; the last one is "
            f"{broken[-1].key!r} ({broken[-1].reason.rstrip('.')}). Mend them, or raise --max-broken."
        )


def free_name(name: str, taken: set[str]) -> str:
    """Return a key that the shard does not have yet: shards that are joined often count from 0 each."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free


class ShardWriter(Protocol):
    """What ``webdataset`` writes a shard with."""

    def write(self, obj: dict[str, Any]) -> int:
        """Add a sample: ``__key__`` and its members by extension."""
        ...

    def close(self) -> None:
        """End the archive."""
        ...


def tar_writer() -> Callable[[IO[bytes]], ShardWriter]:
    """Return what opens a writer on a stream; equal samples give equal bytes.

    Raises:
        MissingExtraError: ``webdataset`` is not installed.
    """
    try:
        from webdataset.writer import TarWriter
    except ImportError as error:
        raise MissingExtraError("writing shards", extra="train", module="webdataset") from error

    def opened(stream: IO[bytes]) -> ShardWriter:
        # No time and no user: equal samples give equal bytes. pax: names of any length.
        writer: ShardWriter = TarWriter(
            stream, user="", group="", mode=0o644, mtime=0, encoder=False, format="PAX_FORMAT", compress=False
        )
        return writer

    return opened


class _OpenShard:
    """A shard that is being written under a temporary name."""

    def __init__(self, path: Path, stream: IO[bytes], tar_writer: Callable[[IO[bytes]], ShardWriter]) -> None:
        self._path, self._stream = path, stream
        self._writer = tar_writer(stream)
        self.write = self._writer.write

    def abandon(self) -> None:
        """End the writer, which would otherwise write to a closed file when it is collected."""
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()

    def finish(self, path: Path) -> tuple[int, str]:
        """Give the shard its name and its index; return its size in bytes and sha256."""
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        with self._path.open("rb", buffering=0) as stream:
            size_and_hash = hash_stream(stream)
        document = index_document(self._path)
        index_path(path).unlink(missing_ok=True)  # of another shard of this name
        self._path.replace(path)
        _put(index_path(path), document)
        return size_and_hash


@contextmanager
def _new_shard(target: Path, tar_writer: Callable[[IO[bytes]], ShardWriter]) -> Iterator[_OpenShard]:
    path = target / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    try:
        with path.open("xb") as stream:
            shard = _OpenShard(path, stream, tar_writer)
            try:
                yield shard
            except BaseException:
                shard.abandon()
                raise
    finally:
        path.unlink(missing_ok=True)


def _size_of(members: Mapping[str, bytes]) -> int:
    return sum(
        _BLOCK + -(-len(content) // _BLOCK) * _BLOCK for name, content in members.items() if name != "__key__"
    )


def _members(sample: Sample, index: int) -> dict[str, bytes]:
    """Return what is written of a sample, by extension, and its key under ``__key__``.

    Raises:
        InputError: its picture cannot be read, or is of no known format.
    """
    content = sample.image if isinstance(sample.image, bytes) else _picture(sample.image)
    kind = sniff_format(content[:32])
    if kind is None:
        raise InputError(f"{sample.key}: is no picture of a known format ({', '.join(_SUFFIXES)}).")
    if sample.members:
        passed = {extension: sample.members[extension] for extension in sample.members}
        return {"__key__": sample.name.encode("utf-8", "surrogateescape"), **passed}
    described: dict[str, Any] = {"key": sample.key}
    captions = dict(sample.captions)
    label = captions.pop("label", ())
    synthetic = {kind: captions.pop(kind) for kind in list(captions) if kind.split("_")[0] == "synthetic"}
    alt = captions.get("alt", ())
    if len(alt) < 2:
        captions.pop("alt", None)
    if captions:
        described["captions"] = captions
    members = {"__key__": f"{index:09d}".encode(), _SUFFIXES[kind]: content, "json": _json(described)}
    if alt:
        members["txt"] = alt[0].encode("utf-8")
    if label:
        members["cls"] = label[0].encode("utf-8")
    if synthetic:
        members["syn.json"] = _json(
            {kind.replace("synthetic", "syn_text", 1): texts for kind, texts in synthetic.items()}
        )
    return members


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def _picture(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise InputError(f"{str(path)!r}: no such file.")
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_PICTURE_BYTES:
            raise InputError(
                f"{str(path)!r}: has {size_bytes:,} bytes, expected at most {_MAX_PICTURE_BYTES:,}."
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{str(path)!r}: cannot be read ({getattr(error, 'strerror', None) or error})."
        ) from error
