"""Look into tar shards, and check every sample of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from edgeclip.distill.augment import RandomResizedCrop
from edgeclip.distill.reinforcement import MANIFEST_NAME as REINFORCEMENT_NAME
from edgeclip.distill.reinforcement import read_reinforcement
from edgeclip.distill.samples import (
    Broken,
    JoinedSamples,
    Sample,
    Samples,
    ShardSamples,
    expanded,
    find_shards,
    holds_shards,
    open_samples,
)
from edgeclip.distill.shards import MANIFEST_NAME, Progress, ShardManifest, is_whole, read_manifest
from edgeclip.distill.stored import check_stored, open_stored, stored_member
from edgeclip.distill.views import VIEWS_EXTENSION, list_views, view_of
from edgeclip.errors import InputError
from edgeclip.pictures import decode_image

__all__ = ["Inspection", "ShardSummary", "Validation", "inspect_shards", "validate_samples"]

_LOOKED_AT = 200
_CHUNK = 256


# -- Looking into shards ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSummary:
    """What one shard holds.

    Attributes:
        path: of the shard.
        size_bytes: of the shard.
        samples: with a picture.
        without_picture: samples that have none, and are never read.
        extensions: members by extension, the most frequent first.
    """

    path: Path
    size_bytes: int
    samples: int
    without_picture: int
    extensions: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """What shards hold.

    Attributes:
        shards: one by one.
        digest: of the samples in this order.
        looked_at: samples that were read, spread evenly; the numbers below are theirs.
        captions: how many of them have captions of a kind, and how many captions a sample then has.
        unreadable: how many of them could not be read.
        picture_bytes: median size of their picture files.
        first: key and captions of the first of them.
        stored: samples among them that hold what teachers said, and the views and columns of the first of
            these; ``None`` where none does.
    """

    shards: tuple[ShardSummary, ...]
    digest: str
    looked_at: int
    captions: Mapping[str, tuple[int, float]]
    unreadable: int
    picture_bytes: int
    first: tuple[str, Mapping[str, tuple[str, ...]]] | None
    stored: tuple[int, int, int] | None = None

    @property
    def samples(self) -> int:
        """Samples with a picture in all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "samples": self.samples,
            "size_bytes": sum(shard.size_bytes for shard in self.shards),
            "digest": self.digest,
            "shards": [
                asdict(shard) | {"path": str(shard.path), "extensions": dict(shard.extensions)}
                for shard in self.shards
            ],
            "looked_at": {
                "samples": self.looked_at,
                "unreadable": self.unreadable,
                "picture_bytes": self.picture_bytes,
                "captions": {
                    kind: {"samples": count, "mean": mean} for kind, (count, mean) in self.captions.items()
                },
                "stored": None
                if self.stored is None
                else dict(zip(("samples", "views", "columns"), self.stored, strict=True)),
                "first": None
                if self.first is None
                else {"key": self.first[0], "captions": dict(self.first[1])},
            },
        }


def inspect_shards(
    paths: Iterable[str | os.PathLike[str]], *, progress: Callable[[str], None] | None = None
) -> Inspection:
    """Return what shards hold: counts of all members, and captions of up to 200 samples.

    Raises:
        InputError: a shard cannot be read or is damaged.
    """
    samples = ShardSamples(find_shards(map(Path, paths)), progress=progress)
    step = max(-(-len(samples) // _LOOKED_AT), 1)
    counts: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    sizes: list[int] = []
    first: tuple[str, Mapping[str, tuple[str, ...]]] | None = None
    reinforced = 0
    shape: tuple[int, int] | None = None
    looked = range(0, len(samples), step)
    for index in looked:
        try:
            sample = samples.read(index)
            if stored_member(sample.members) is not None:
                reinforced += 1
                if shape is None:
                    stored = open_stored(sample.members, where=sample.key)
                    shape = stored.views, stored.columns
        except InputError:
            continue
        sizes.append(len(sample.image) if isinstance(sample.image, bytes) else 0)
        first = first or (sample.key, sample.captions)
        for kind, found in sample.captions.items():
            counts[kind] += 1
            texts[kind] += len(found)
    return Inspection(
        shards=tuple(
            ShardSummary(
                path=index.path,
                size_bytes=index.size_bytes,
                samples=index.pictures,
                without_picture=index.samples - index.pictures,
                extensions=index.extensions,
            )
            for index in samples.indexes
        ),
        digest=samples.digest,
        looked_at=len(looked),
        captions={kind: (counts[kind], texts[kind] / counts[kind]) for kind in sorted(counts)},
        unreadable=len(looked) - len(sizes),
        picture_bytes=int(median(sizes)) if sizes else 0,
        first=first,
        stored=None if shape is None else (reinforced, *shape),
    )


# -- Checking -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """What a check of every sample found.

    Attributes:
        samples: checked.
        broken: samples that cannot be used.
        damaged: whole shards that cannot be used, or are not what their manifest says, and why.
        without_caption: samples that have no text at all.
        captions: how many samples have captions of a kind.
    """

    samples: int
    broken: tuple[Broken, ...]
    damaged: Mapping[str, str] = field(default_factory=dict)
    without_caption: int = 0
    captions: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"damaged": dict(self.damaged), "captions": dict(self.captions)}


def validate_samples(
    paths: Iterable[str | os.PathLike[str]],
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Validation:
    """Decode every picture and parse every JSON member of shards, tables or folders.

    Shards beside a manifest of ours are compared with it: all there, hashes right. What teachers left in a
    sample is read in full: views, embeddings, and that there are as many as captions.

    Args:
        paths: as for :func:`~edgeclip.distill.samples.open_samples`.
        workers: threads; decoders release the interpreter's lock.
        progress: called with samples done and all samples.

    Raises:
        InputError: a path is not there, or there is nothing to check.
    """
    damaged: dict[str, str] = {}
    parts: list[Samples] = []
    given = [path for said in paths for path in expanded(Path(said))]
    for path in given:
        if not holds_shards(path):
            parts.append(open_samples([path]))
            continue
        shards = find_shards([path])
        _compare(path, shards, damaged)
        for shard in shards:
            opened = _opened(shard, damaged)
            parts += [] if opened is None else [opened]
    samples = JoinedSamples(parts)
    if not len(samples) and not damaged:
        raise InputError(f"no samples in {', '.join(repr(str(path)) for path in given[:3])}. Check the path.")
    broken: list[Broken] = []
    captions: Counter[str] = Counter()
    without = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="edgeclip-validate") as pool:
        for begin in range(0, len(samples), _CHUNK):
            chunk = range(begin, min(begin + _CHUNK, len(samples)))
            for index, found in zip(chunk, pool.map(lambda at: _checked(samples, at), chunk), strict=True):
                if isinstance(found, str):
                    broken.append(Broken(index, samples.key(index), found))
                else:
                    captions.update(found)
                    without += not found
            if progress is not None:
                progress(chunk.stop, len(samples))
    return Validation(len(samples), tuple(broken), damaged, without, dict(sorted(captions.items())))


def _opened(shard: Path, damaged: dict[str, str]) -> ShardSamples | None:
    try:
        return ShardSamples([shard])
    except InputError as error:
        damaged[str(shard)] = str(error)
        return None


def _compare(given: Path, shards: Sequence[Path], damaged: dict[str, str]) -> None:
    """Compare shards with the manifest beside them, if there is one."""
    folder = given if given.is_dir() else given.parent
    manifest = read_manifest(folder) or read_reinforcement(folder)
    if manifest is None:
        return
    known = {shard.name: shard for shard in manifest.shards}
    if isinstance(manifest, ShardManifest):
        name = MANIFEST_NAME
        done = max((shard.after for shard in manifest.shards), default=0)
        stopped = f"{done} of {manifest.source.samples} samples were written: make-shards was stopped"
    else:
        name = REINFORCEMENT_NAME
        stopped = f"not all of {len(manifest.source)} shards were made: reinforce was stopped"
    # A manifest of reinforced shards lists them when all are there.
    for shard in shards if known or name == MANIFEST_NAME else ():
        entry = known.get(shard.name)
        if entry is None:
            damaged[str(shard)] = f"is not in {name}, which has {len(known)} shards"
        elif not is_whole(shard, entry.size_bytes, entry.sha256):
            damaged[str(shard)] = f"is not what {name} says (sha256 {entry.sha256[:16]}…)"
    if given.is_dir():
        here = {shard.name for shard in shards}
        damaged.update({str(folder / missing): "is missing" for missing in known if missing not in here})
        if not manifest.complete:
            damaged[str(folder / name)] = f"says that {stopped}; run it again"


def _checked(samples: Samples, index: int) -> tuple[str, ...] | str:
    """Return the kinds of captions of a sample, or why it is broken."""
    try:
        sample = samples.read(index)
        decode_image(sample.image)
        for extension in sample.members:
            if extension.endswith(".json") and extension != "syn.json":  # that one was read with the captions
                _check_json(extension, sample.members[extension])
        if stored_member(sample.members) is not None or VIEWS_EXTENSION in sample.members:
            _check_reinforced(sample)
    except InputError as error:
        return str(error)
    return tuple(sample.captions)


def _check_json(extension: str, content: bytes) -> None:
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its member {extension!r} is not JSON ({error}). Make it again.") from error


def _check_reinforced(sample: Sample) -> None:
    """Read all that teachers left in a sample."""
    check_stored(sample.members, sample.captions, where=sample.key)
    where = f"{sample.key}.{VIEWS_EXTENSION}"
    if VIEWS_EXTENSION not in sample.members:
        raise InputError(f"{where}: is missing. Reinforce the sample again.")
    views = list_views(sample.members[VIEWS_EXTENSION], where=where)
    for number, view in enumerate(views):
        view_of(RandomResizedCrop((1, 1)), view, where=f"{where}, view {number}")
    stored = open_stored(sample.members, where=sample.key).views
    if len(views) != stored:
        raise InputError(
            f"{where}: says {len(views)} views, there are embeddings of {stored}. Reinforce the sample again."
        )
