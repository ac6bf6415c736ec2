"""``reinforcement.json``: what a directory of reinforced shards was made of, by which teachers, and how far.

A manifest is complete when every shard is. While shards are being made each finished one has a record of its
own beside it (``NAME.reinforced.json``), so that processes need not talk to each other.

Shards of others in DataCompDR's layout have no manifest. Whether there is one decides how pictures are
decoded: ours had their crops drawn on pictures as :func:`~edgeclip.pictures.decode_image` gives them, those
of DataCompDR on what Pillow's plain ``convert("RGB")`` gives, not turned upright.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edgeclip.distill.samples import JoinedSamples, Samples, ShardSamples
from edgeclip.distill.shards import read_document
from edgeclip.distill.stored import Precision, open_stored, stored_member
from edgeclip.errors import ConfigError, InputError

__all__ = [
    "MANIFEST_NAME",
    "FinishedShard",
    "LeftOut",
    "Reinforcement",
    "Settings",
    "ShardRecord",
    "SourceShard",
    "TeacherRecord",
    "read_record",
    "read_reinforcement",
    "record_path",
    "reinforcement_of",
    "stored_columns",
]

SCHEMA = 1
MANIFEST_NAME = "reinforcement.json"
_RECORD_SUFFIX = ".reinforced.json"
_LOOKED_AT = 16


class _Table(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the manifest."""


class Settings(_Table, frozen=True, kw_only=True):
    """How views are drawn and what is kept of them.

    Attributes:
        augmentations: views of each picture.
        image_size_px: ``(H, W)`` of the first teacher's views, on which translations depend.
        crop_scale: share of the picture's area that a crop keeps.
        rand_augment: operations on each view; 0 for none.
        rand_augment_magnitude: their strength.
        precision: of the stored embeddings.
        batch_size: of the teachers; another one may round otherwise.
        seed: of the views.
        device: where the teachers ran; another one rounds otherwise.
        captions: sha256 of the file with captions, or who wrote how many; empty for none.
    """

    augmentations: Annotated[int, Meta(ge=1)]
    image_size_px: tuple[int, int]
    crop_scale: tuple[float, float]
    rand_augment: int
    rand_augment_magnitude: int
    precision: Precision
    batch_size: int
    seed: int
    device: str
    captions: str = ""


class TeacherRecord(_Table, frozen=True, kw_only=True):
    """One teacher and its part of the embeddings.

    Attributes:
        name: as recipes call it.
        columns: first and last-plus-one column.
        scale: its own multiplier of cosines.
        licence: of its weights.
        parent: what checkpoints of students record about it.
        image_size_px: ``(H, W)`` of its views.
        interpolation: of their resize.
        sha256: of its weights.
    """

    name: str
    columns: tuple[int, int]
    scale: Annotated[float, Meta(gt=0)]
    licence: str
    parent: dict[str, Any]
    image_size_px: tuple[int, int]
    interpolation: str
    sha256: str


class SourceShard(_Table, frozen=True, kw_only=True):
    """A shard that is reinforced; ``digest`` is that of its index."""

    name: str
    digest: str
    samples: int


class LeftOut(_Table, frozen=True, kw_only=True):
    """A sample that could not be used."""

    key: str
    reason: str


class FinishedShard(_Table, frozen=True, kw_only=True):
    """A shard that was made.

    Attributes:
        name: of its file.
        samples: in it.
        size_bytes: of the file.
        sha256: of the file.
        embedding_bytes: of the members with embeddings.
        payload_bytes: of the numbers in them.
        captioned: samples that got captions from the file.
        without_picture: samples of the source that have none, and are left out.
        broken: other samples that are left out.
    """

    name: str
    samples: int
    size_bytes: int
    sha256: str
    embedding_bytes: int
    payload_bytes: int
    captioned: int = 0
    without_picture: int = 0
    broken: tuple[LeftOut, ...] = ()


class Reinforcement(_Table, frozen=True, kw_only=True):
    """The manifest."""

    schema: Literal[1] = 1
    kind: Literal["reinforcement"] = "reinforcement"
    settings: Settings
    teachers: Annotated[tuple[TeacherRecord, ...], Meta(min_length=1)]
    source: tuple[SourceShard, ...]
    complete: bool = False
    shards: tuple[FinishedShard, ...] = ()

    @property
    def plan(self) -> Reinforcement:
        """The manifest before any shard was made."""
        return msgspec.structs.replace(self, complete=False, shards=())

    @property
    def digest(self) -> str:
        """The sha256 of what decides the shards."""
        return hashlib.sha256(msgspec.json.encode(self.plan, order="deterministic")).hexdigest()

    @property
    def columns(self) -> int:
        """Width of the embeddings."""
        return self.teachers[-1].columns[1]


class ShardRecord(_Table, frozen=True, kw_only=True):
    """What is beside a finished shard: whose plan it follows, and what the manifest will say."""

    schema: Literal[1] = 1
    plan: str
    shard: FinishedShard


def record_path(shard: Path) -> Path:
    """Return where the record of a finished shard is."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}{_RECORD_SUFFIX}")


def read_reinforcement(directory: Path) -> Reinforcement | None:
    """Return the manifest of a directory; ``None`` where there is none.

    Raises:
        InputError: there is one, but it cannot be read.
    """
    return read_document(directory / MANIFEST_NAME, Reinforcement, "manifest of reinforced shards")


def read_record(shard: Path) -> ShardRecord | None:
    """Return the record of a finished shard; ``None`` where there is none.

    Raises:
        InputError: there is one, but it cannot be read.
    """
    return read_document(record_path(shard), ShardRecord, "record of a reinforced shard")


# -- Of samples ---------------------------------------------------------------------------------------------


def reinforcement_of(samples: Samples, *, what: str) -> Reinforcement | None:
    """Return the manifest beside the shards that samples are read from; ``None`` for shards of others.

    Args:
        samples: of a table of data.
        what: names the table in errors.

    Raises:
        ConfigError: some are in no shard, or shards are of several kinds.
        InputError: a manifest cannot be read.
    """
    folders = sorted({folder for part in _parts(samples, what) for folder in part})
    found = [(folder, read_reinforcement(folder)) for folder in folders]
    first_folder, first = found[0]
    for folder, manifest in found[1:]:
        if (first is None) != (manifest is None) or (
            first is not None and manifest is not None and first.teachers != manifest.teachers
        ):
            raise ConfigError(
                f"{what}: the shards in {str(folder)!r} and {str(first_folder)!r} were reinforced by "
                "different teachers; put them into two [data.…] tables."
            )
    for folder, manifest in found:
        if manifest is not None and not manifest.complete:
            raise ConfigError(
                f"{what}: {str(folder / MANIFEST_NAME)!r} says that not all shards are made; run the same "
                "'edgeclip reinforce' command again until they are."
            )
    return first


def _parts(samples: Samples, what: str) -> list[set[Path]]:
    if isinstance(samples, JoinedSamples):
        return [folders for part in samples.parts for folders in _parts(part, what)]
    if isinstance(samples, ShardSamples):
        return [{index.path.parent for index in samples.indexes}]
    raise ConfigError(
        f"{what}: stored teachers read their embeddings from tar shards, got a table or folder of pictures. "
        "Make shards with 'edgeclip data make-shards' and reinforce them."
    )


def stored_columns(samples: Samples, *, what: str) -> int:
    """Return the width of the embeddings in shards of others, from the first sample that can be read.

    Raises:
        ConfigError: none of the first samples has embeddings.
    """
    reason = "there are no samples"
    for index in range(min(_LOOKED_AT, len(samples))):
        found = _columns(samples, index)
        if isinstance(found, int):
            return found
        reason = found
    raise ConfigError(
        f"{what}: no stored embeddings in the first samples ({reason}); expected .npz or .pth.gz members. "
        "Reinforce the shards with 'edgeclip reinforce', or use other teachers."
    )


def _columns(samples: Samples, index: int) -> int | str:
    """Return the width of a sample's embeddings, or why there are none."""
    try:
        sample = samples.read(index)
        if stored_member(sample.members) is None:
            return f"{sample.key} has only {sorted(sample.members)}"
        return open_stored(sample.members, where=sample.key).columns
    except InputError as error:
        return str(error).rstrip(".")
