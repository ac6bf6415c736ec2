"""Teachers that are not there any more: what they said lies in the shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from edgeclip.distill.batches import Batch
from edgeclip.distill.inputs import STORED_IMAGE, STORED_TEXT, Consumer, Inputs, StoredViews
from edgeclip.distill.objective import Embedded
from edgeclip.distill.recipe import DataSpec, StageSpec, StoredTeacher
from edgeclip.distill.reinforcement import Reinforcement, TeacherRecord, reinforcement_of, stored_columns
from edgeclip.distill.samples import Samples
from edgeclip.errors import ConfigError

__all__ = ["OfflineTeacher", "open_stored_teacher"]

_SCALE = 100.0
_NOT_SAID = "NOASSERTION"


class OfflineTeacher:
    """A teacher whose embeddings are read with the samples.

    Args:
        name: as losses call it.
        columns: first and last-plus-one column of its part of the stored rows.
        scale: its own multiplier of cosines.
        views: what is stored, all teachers together.
        parent: what the student's checkpoint records about it.
        caption_share: how much of a picture's embedding its captions make up, from 0 to 1.
    """

    def __init__(
        self,
        name: str,
        *,
        columns: tuple[int, int],
        scale: float,
        views: StoredViews,
        parent: Mapping[str, Any],
        caption_share: float = 0.0,
    ) -> None:
        self.name = name
        self.caption_share = caption_share
        self.columns, self.scale, self.views = columns, scale, views
        self.image_dim: int | None = columns[1] - columns[0]
        self.text_dim: int | None = self.image_dim
        self.parent = dict(parent)

    @property
    def consumer(self) -> Consumer | None:
        """Nothing is prepared for it."""
        return None

    def check(self, stage: StageSpec, table: DataSpec, samples: Samples) -> None:
        """Do nothing: the shards have been looked at, and every sample brings its own rows."""

    def ask(self, batch: Batch, inputs: Inputs, *, parts: int = 1) -> Embedded:
        """Return its embeddings of a batch, see :class:`~edgeclip.distill.teachers.Teacher`."""
        own = slice(*self.columns)
        image, texts = batch[STORED_IMAGE][:, own], batch[STORED_TEXT][..., own]
        if self.caption_share:
            said = F.normalize(F.normalize(texts, dim=-1).mean(dim=1), dim=-1)
            image = torch.lerp(F.normalize(image, dim=-1), said, self.caption_share)
        return Embedded(image, texts.unbind(1))

    def to(self, device: torch.device) -> OfflineTeacher:
        """Return itself: rows arrive with the batch."""
        return self


def open_stored_teacher(spec: StoredTeacher, data: Mapping[str, Samples]) -> OfflineTeacher:
    """Return a teacher whose embeddings lie in shards.

    Args:
        spec: which.
        data: every table of data it is asked about, by name.

    Raises:
        ConfigError: the shards do not say who it is, or what the recipe says does not fit them.
        InputError: a manifest cannot be read.
    """
    opened = {name: _open(spec, samples, f"[data.{name}]") for name, samples in data.items()}
    (first_name, first), *others = opened.items()
    for name, other in others:
        if (other.columns, other.scale, other.views) != (first.columns, first.scale, first.views):
            raise ConfigError(
                f"teacher {spec.name!r}: [data.{name}] stores it otherwise than [data.{first_name}] (columns "
                f"{list(other.columns)} and {list(first.columns)}); give each its own [[teacher]]."
            )
    return first


def _open(spec: StoredTeacher, samples: Samples, what: str) -> OfflineTeacher:
    manifest = reinforcement_of(samples, what=what)
    record = None if manifest is None else _record(manifest, spec)
    columns = stored_columns(samples, what=what) if manifest is None else manifest.columns
    own = spec.slice or (record.columns if record is not None else None)
    if own is None:
        said = "" if manifest is None else f", which names {[one.name for one in manifest.teachers]}"
        raise ConfigError(
            f"teacher {spec.name!r}: expected 'slice', the first and last-plus-one of the {columns} columns "
            f"that are its own: {'no manifest is' if manifest is None else 'it is not in the manifest'} "
            f"beside the shards of {what}{said}."
        )
    if not 0 <= own[0] < own[1] <= columns:
        raise ConfigError(
            f"teacher {spec.name!r}: 'slice' is {list(own)}, expected two rising columns of the {columns} in "
            f"the shards of {what}."
        )
    if record is not None and record.name == spec.name and own != record.columns:
        raise ConfigError(
            f"teacher {spec.name!r}: 'slice' is {list(own)}, but the manifest beside the shards of {what} "
            f"gives it the columns {list(record.columns)}; leave 'slice' out."
        )
    licence = spec.licence or (record.licence if record is not None else _NOT_SAID)
    parent = (
        dict(record.parent)
        if record is not None
        else {"role": "teacher", "name": spec.name, "source": "stored", "parents": []}
    )
    return OfflineTeacher(
        spec.name,
        columns=own,
        scale=spec.scale or (record.scale if record is not None else _SCALE),
        views=StoredViews(columns, upright=manifest is not None),
        parent=parent | {"licence": licence},
        caption_share=spec.caption_share,
    )


def _record(manifest: Reinforcement, spec: StoredTeacher) -> TeacherRecord | None:
    """Return what the manifest says of the teacher of this name, or of these columns."""
    for record in manifest.teachers:
        if record.name == spec.name:
            return record
    return next((record for record in manifest.teachers if record.columns == spec.slice), None)
