"""Let teachers look at every sample of some shards once, and keep what they say: dataset reinforcement.

For each input shard one output shard of the same name: its samples with their members as they are, further
captions where a file gives some, ``.paug.json`` with the parameters of the views and ``.npz`` or ``.pth.gz``
with the embeddings (:mod:`edgeclip.distill.stored`). Students then train on it at the cost of reading
(Faghri et al. 2023; Vasu et al. 2024, "MobileCLIP").

What is in a shard depends on the input shard, the teachers and the settings, and not on the other shards:
views are drawn from streams named after the shard's index and the row, and batches end with the shard. So
shards can be shared by processes, and one that was stopped leaves nothing to mend: a shard gets its name when
it is whole, its record after that, and the manifest is completed by whoever finishes last. (On one machine
and number of threads; another one rounds otherwise.)

Further captions come from a file or from a captioner (:mod:`edgeclip.distill.captioner`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import torch
from torch.utils.data import DataLoader

from edgeclip.distill.batches import loaded
from edgeclip.distill.index import index_document, index_path
from edgeclip.distill.reinforce_plan import Plan, Prepared
from edgeclip.distill.reinforcement import (
    MANIFEST_NAME,
    FinishedShard,
    LeftOut,
    Reinforcement,
    ShardRecord,
    read_record,
    read_reinforcement,
    record_path,
)
from edgeclip.distill.samples import ShardSamples
from edgeclip.distill.shards import free_name, is_whole, tar_writer
from edgeclip.distill.stored import Precision, write_stored
from edgeclip.errors import InputError
from edgeclip.storage import TEMPORARY_PREFIX, DirectoryLock, hash_stream, sync_directory, write_temporary

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ReinforceReport", "reinforce"]

_WAIT_S, _ATTEMPTS = 0.05, 600
_ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ReinforceReport:
    """What was made.

    Attributes:
        directory: where.
        status: ``"written"``; ``"resumed"``, where some of this process's shards were there; ``"present"``,
            where all were; ``"dry-run"``.
        complete: whether all shards are there, those of other processes too.
        shards: of this process; for a dry run, of all.
        samples: in them.
        size_bytes: of them.
        embedding_bytes: of the members with embeddings.
        payload_bytes: of the numbers in them.
        captioned: samples that got captions from the file.
        without_picture: samples without one, left out.
        broken: other samples left out.
        teachers: name and columns of each.
    """

    directory: Path
    status: Literal["written", "resumed", "present", "dry-run"]
    complete: bool
    shards: int
    samples: int
    size_bytes: int
    embedding_bytes: int
    payload_bytes: int
    captioned: int
    without_picture: int
    broken: tuple[LeftOut, ...]
    teachers: Mapping[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {
            "directory": str(self.directory),
            "broken": msgspec.to_builtins(self.broken),
            "teachers": dict(self.teachers),
        }


Progress = Callable[[int, int], None]


def reinforce(
    plan: Plan,
    directory: Path,
    *,
    rank: int = 0,
    world: int = 1,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ReinforceReport:
    """Make this process's share of the shards, or what is left of it.

    Args:
        plan: what to do.
        directory: to make; or one in which the same was begun.
        rank: of this process; it makes the shards ``rank``, ``rank + world``, …
        world: processes.
        dry_run: check the directory and one sample, and write nothing.
        progress: called with samples done and all samples of this process.

    Raises:
        InputError: too many samples are broken, the directory holds something else, a shard is being made by
            another process, or the disk refuses.
    """
    _check_directory(plan, directory)
    if dry_run:
        return _tried(plan, directory)
    own = plan.shards[rank::world]
    total = sum(map(len, own))
    allowed = plan.options.limit.allowed(total)
    finished: list[FinishedShard] = []
    broken: list[LeftOut] = []
    done = kept = 0
    with _translated(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _announce(plan, directory)
        for shard in own:
            target = directory / shard.indexes[0].path.name
            entry = _kept(plan, target)
            if entry is None:
                with _staging(directory, target.name) as staging:
                    said = (lambda count, at=done: progress(at + count, total)) if progress else None
                    check = functools.partial(_check_allowed, allowed, total, tuple(broken))
                    entry = _make(plan, shard, target, staging, check, said)
            else:
                kept += 1
            finished.append(entry)
            done += len(shard)
            broken += entry.broken
            _check_allowed(allowed, total, broken)
            if progress is not None:
                progress(done, total)
        complete = _complete(plan, directory)
        _sweep(directory, [MANIFEST_NAME, *(entry.name for entry in finished)])
    status: Literal["written", "resumed", "present"] = "resumed" if kept else "written"
    return _report(
        plan, directory, "present" if kept == len(own) else status, finished, tuple(broken), complete=complete
    )


def _report(
    plan: Plan,
    directory: Path,
    status: Literal["written", "resumed", "present", "dry-run"],
    finished: Sequence[FinishedShard],
    broken: tuple[LeftOut, ...],
    *,
    complete: bool,
) -> ReinforceReport:
    return ReinforceReport(
        directory=directory,
        status=status,
        complete=complete,
        shards=len(finished),
        samples=sum(shard.samples for shard in finished),
        size_bytes=sum(shard.size_bytes for shard in finished),
        embedding_bytes=sum(shard.embedding_bytes for shard in finished),
        payload_bytes=sum(shard.payload_bytes for shard in finished),
        captioned=sum(shard.captioned for shard in finished),
        without_picture=sum(shard.without_picture for shard in finished),
        broken=broken,
        teachers={teacher.name: teacher.columns for teacher in plan.manifest.teachers},
    )


def _tried(plan: Plan, directory: Path) -> ReinforceReport:
    """Send a sample through the teachers, and return what all shards would hold by it."""
    broken: tuple[LeftOut, ...] = ()
    preparing = plan.preparing(plan.shards[0])
    total = sum(map(len, plan.shards))
    prepared: Prepared | None = None
    for row in range(len(preparing)):
        item = preparing[row]
        if isinstance(item, Prepared):
            captioned, mute = plan.caption([item])
            if captioned:
                prepared = captioned[0]
                break
            item = mute[0]
        broken = (*broken, item)
        _check_allowed(plan.options.limit.allowed(total), total, broken)
    if prepared is None:
        raise InputError(f"none of {len(preparing)} samples can be used: {broken[-1].reason}")
    (arrays,) = plan.embed([prepared])
    _, member = write_stored(arrays, plan.options.precision)
    kept = sum(map(len, prepared.members.values()))
    finished = [
        FinishedShard(
            name=shard.indexes[0].path.name,
            samples=(count := len(shard)),
            size_bytes=count * (kept + len(member)),
            sha256="",
            embedding_bytes=count * len(member),
            payload_bytes=count * _payload(arrays, plan.options.precision),
            without_picture=shard.indexes[0].samples - shard.indexes[0].pictures,
        )
        for shard in plan.shards
    ]
    return _report(plan, directory, "dry-run", finished, broken, complete=False)


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise InputError(
            f"{str(directory)!r}: a shard of it is being made by another process. Wait for that to end."
        ) from error
    except OSError as error:
        raise InputError(
            f"{str(directory)!r} cannot be written ({error.strerror or error}). Check its permissions and "
            "the space left; the shards that are finished stay."
        ) from error


def _check_directory(plan: Plan, directory: Path) -> None:
    """Raise where a directory holds something else than what was begun of this plan."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{str(directory)!r} is a file, expected a directory to make.")
    sources = {shard.indexes[0].path.resolve().parent for shard in plan.shards}
    if directory.exists() and directory.resolve() in sources:
        raise InputError(f"{str(directory)!r} holds the shards that are read; choose another directory.")
    found = read_reinforcement(directory)
    if found is None:
        foreign = directory.is_dir() and [
            path.name for path in directory.iterdir() if not path.name.startswith(".edgeclip-")
        ]
        if foreign:
            raise InputError(
                f"{str(directory)!r} is there already and holds {sorted(foreign)[0]!r}, but no "
                f"{MANIFEST_NAME}. Choose a directory that does not exist, or an empty one."
            )
        return
    differing = _differences(found.plan, plan.manifest)
    if differing:
        raise InputError(
            f"{str(directory)!r} holds shards made otherwise: {'; '.join(differing[:3])}. Remove it, or "
            "choose another directory."
        )


def _differences(found: Reinforcement, wanted: Reinforcement) -> list[str]:
    theirs, ours = (msgspec.to_builtins(one) for one in (found, wanted))
    said = [
        f"{name} is {theirs['settings'][name]}, not {value}"
        for name, value in ours["settings"].items()
        if theirs["settings"][name] != value
    ]
    names = [[teacher["name"] for teacher in one["teachers"]] for one in (theirs, ours)]
    if names[0] != names[1]:
        said.append(f"teachers are {names[0]}, not {names[1]}")
    else:
        said += [
            f"{key} of the teacher {mine['name']!r} is {str(other[key])[:60]}, not {str(mine[key])[:60]}"
            for mine, other in zip(ours["teachers"], theirs["teachers"], strict=True)
            for key in mine
            if mine[key] != other[key]
        ]
    if theirs["source"] != ours["source"]:
        said.append(
            f"the input was {len(theirs['source'])} shards of "
            f"{sum(shard['samples'] for shard in theirs['source'])} samples, and is now others"
        )
    return said


def _announce(plan: Plan, directory: Path) -> None:
    """Put the manifest where there is none; of processes that do so at once the first wins."""
    _publish(directory, plan.manifest, (directory / MANIFEST_NAME).exists)
    _check_directory(plan, directory)


def _publish(directory: Path, manifest: Reinforcement, is_there: Callable[[], bool]) -> None:
    """Write the manifest, unless another process does.

    Raises:
        BlockingIOError: something else holds its folder all the time.
    """
    for _ in range(_ATTEMPTS):
        if is_there():
            return
        # Another process may hold the folder, or remove it while it is opened here.
        with (
            contextlib.suppress(BlockingIOError, FileNotFoundError),
            _staging(directory, MANIFEST_NAME) as staging,
        ):
            if not is_there():
                _put(staging, directory / MANIFEST_NAME, _document(manifest))
            return
        time.sleep(_WAIT_S)
    raise BlockingIOError(errno.EAGAIN, "another process holds the manifest", str(directory))


def _document(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _kept(plan: Plan, target: Path) -> FinishedShard | None:
    """Return the record of a shard that is finished and what its record says; ``None`` for all others."""
    try:
        record = read_record(target)
    except InputError:
        return None
    if record is None or record.plan != plan.manifest.digest:
        return None
    return record.shard if is_whole(target, record.shard.size_bytes, record.shard.sha256) else None


@contextmanager
def _staging(directory: Path, name: str) -> Iterator[Path]:
    """Yield a folder for what is not finished; it is emptied of what a killed process left there."""
    folder = directory / f"{TEMPORARY_PREFIX}{name}"
    folder.mkdir(exist_ok=True)
    lock = DirectoryLock(folder)
    try:
        for path in folder.iterdir():
            if not path.name.startswith(".edgeclip-lock"):
                path.unlink()
        yield folder
    finally:
        for path in folder.iterdir():
            if not path.name.startswith(".edgeclip-lock"):
                path.unlink(missing_ok=True)
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(directory: Path, names: Sequence[str]) -> None:
    """Remove what was left by processes that were killed when they had all but finished."""
    for name in names:
        if (directory / f"{TEMPORARY_PREFIX}{name}").exists():
            with contextlib.suppress(BlockingIOError), _staging(directory, name):
                pass


def _make(
    plan: Plan,
    shard: ShardSamples,
    target: Path,
    staging: Path,
    check: Callable[[Sequence[LeftOut]], None],
    progress: Callable[[int], None] | None,
) -> FinishedShard:
    """Make one shard, its index and its record, in this order."""
    index = shard.indexes[0]
    broken: list[LeftOut] = []
    samples = embedding_bytes = payload_bytes = captioned = 0
    names: set[str] = set()
    making = staging / "shard.tar"
    with making.open("wb") as stream:
        writer = tar_writer()(stream)
        try:
            for count, group, left_out in _groups(plan, shard):
                broken += left_out
                check(broken)
                for one, arrays in zip(group, plan.embed(group) if group else (), strict=True):
                    extension, member = write_stored(arrays, plan.options.precision)
                    name = free_name(one.name, names)
                    names.add(name)
                    writer.write({"__key__": name, **one.members, extension: member})
                    samples += 1
                    embedding_bytes += len(member)
                    payload_bytes += _payload(arrays, plan.options.precision)
                    captioned += one.captioned
                if progress is not None:
                    progress(count)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                writer.close()
            raise
        if not samples:
            raise InputError(
                f"shard {str(index.path)!r}: none of {len(shard)} samples can be used; the last one is "
                f"{broken[-1].key!r} ({broken[-1].reason.rstrip('.')})."
            )
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())
    with making.open("rb", buffering=0) as raw:
        size_bytes, sha256 = hash_stream(raw)
    entry = FinishedShard(
        name=target.name,
        samples=samples,
        size_bytes=size_bytes,
        sha256=sha256,
        embedding_bytes=embedding_bytes,
        payload_bytes=payload_bytes,
        captioned=captioned,
        without_picture=index.samples - index.pictures,
        broken=tuple(broken),
    )
    document = index_document(making)
    for path in (index_path(target), record_path(target)):
        path.unlink(missing_ok=True)  # of another shard of this name
    making.replace(target)
    _put(staging, index_path(target), document)
    _put(staging, record_path(target), _document(ShardRecord(plan=plan.manifest.digest, shard=entry)))
    return entry


def _as_it_is(item: Any) -> Any:
    return item


def _groups(plan: Plan, shard: ShardSamples) -> Iterator[tuple[int, list[Prepared], list[LeftOut]]]:
    """Yield samples of a shard in groups that fill the teachers' batches, with the count of those done."""
    preparing = plan.preparing(shard)
    size = max(1, math.ceil(plan.options.batch_size / plan.options.augmentations))
    loader: DataLoader[Any] = DataLoader(
        preparing,
        batch_size=None,
        num_workers=plan.options.workers,
        collate_fn=_as_it_is,
        prefetch_factor=2 if plan.options.workers else None,
        generator=torch.Generator(),
    )
    group: list[Prepared] = []
    broken: list[LeftOut] = []
    for count, item in enumerate(loaded(loader, "preparing samples"), 1):
        if isinstance(item, LeftOut):
            broken.append(item)
        else:
            group.append(item)
        if len(group) == size or count == len(preparing):
            captioned, mute = plan.caption(group)
            yield count, captioned, broken + mute
            group, broken = [], []


def _payload(arrays: Mapping[str, NDArray[np.float32]], precision: Precision) -> int:
    return sum(array.size for array in arrays.values()) * _ITEM_BYTES[precision]


def _put(staging: Path, path: Path, content: bytes) -> None:
    temporary, _, _ = write_temporary(staging, content)
    temporary.replace(path)
    sync_directory(path.parent)


def _check_allowed(
    allowed: int, samples: int, before: Sequence[LeftOut], further: Sequence[LeftOut] = ()
) -> None:
    broken = [*before, *further]
    if len(broken) > allowed:
        raise InputError(
            f"{len(broken)} of {samples} samples cannot be used, {allowed} are allowed; the last one is "
            f"{broken[-1].key!r} ({broken[-1].reason.rstrip('.')}). Mend them, or raise --max-broken."
        )


def _complete(plan: Plan, directory: Path) -> bool:
    """Complete the manifest if every shard is there; return whether it is."""
    entries: list[FinishedShard] = []
    for source in plan.manifest.source:
        record = read_record(directory / source.name)
        if record is None or record.plan != plan.manifest.digest:
            return False
        entries.append(record.shard)
    whole = msgspec.structs.replace(plan.manifest, complete=True, shards=tuple(entries))
    _publish(directory, whole, lambda: read_reinforcement(directory) == whole)
    return True
