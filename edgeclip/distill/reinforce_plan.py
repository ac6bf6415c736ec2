"""What reinforcing needs, opened: shards, teachers, captions from a file; and how samples are prepared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from edgeclip.distill.augment import Augmentation, RandAugment, RandomResizedCrop, Transform
from edgeclip.distill.caption_file import CaptionFile, with_captions
from edgeclip.distill.captioner import Captioner, central_square, open_captioner, weights_digest
from edgeclip.distill.inputs import TextInput, ViewForm, with_form
from edgeclip.distill.online_teacher import OnlineTeacher
from edgeclip.distill.randomness import random_stream
from edgeclip.distill.recipe import TeacherSpec
from edgeclip.distill.reinforcement import LeftOut, Reinforcement, Settings, SourceShard, TeacherRecord
from edgeclip.distill.samples import (
    BrokenLimit,
    ShardSamples,
    captions_of_members,
    find_shards,
    without_pictures,
)
from edgeclip.distill.stored import EXTENSIONS, IMAGE, Precision, layout_of
from edgeclip.distill.teachers import open_teacher
from edgeclip.distill.views import VIEWS_EXTENSION, views_to_json
from edgeclip.errors import ConfigError, InputError
from edgeclip.pictures import decode_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Plan", "Prepared", "ReinforceOptions", "open_plan"]

_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class ReinforceOptions:
    """How shards are reinforced; all but the last two decide what is in them.

    Attributes:
        augmentations: views of each picture.
        crop_scale: share of the picture's area that a crop keeps.
        rand_augment: operations on each view; 0 for none.
        rand_augment_magnitude: their strength, 0 to 30.
        precision: of the stored embeddings.
        batch_size: views, and texts, that a teacher takes at once.
        seed: of the views.
        device: ``"cpu"`` or ``"cuda"``.
        captions: file with further captions, see :class:`CaptionFile`.
        captioner: or ``open-clip:MODEL:FILE``, which writes them.
        captions_per_picture: that a captioner writes.
        workers: processes that prepare views.
        limit: samples that may be left out; each process counts its own.
    """

    augmentations: int = 10
    crop_scale: tuple[float, float] = (0.08, 1.0)
    rand_augment: int = 2
    rand_augment_magnitude: int = 9
    precision: Precision = "float16"
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"
    captions: Path | None = None
    captioner: str | None = None
    captions_per_picture: int = 5
    workers: int = 0
    limit: BrokenLimit = field(default_factory=BrokenLimit)


# -- Preparing samples --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sample before the teachers have seen it.

    Attributes:
        name: its key.
        members: what is written of it, but for the embeddings.
        layout: which caption each row of each array of texts is.
        views: ``(n, 3, H, W)`` uint8 for each form.
        tokens: ``(t, L)`` int32 for each tokenizer, in the order of the layout.
        captioned: whether it got further captions.
        place: number of its streams.
        whole: ``(3, H, W)`` uint8 for the captioner, if there is one.
    """

    name: str
    members: dict[str, bytes]
    layout: dict[str, list[tuple[str, int]]]
    views: tuple[NDArray[np.uint8], ...]
    tokens: tuple[NDArray[np.int32], ...]
    captioned: bool
    place: int
    whole: NDArray[np.uint8] | None = None


def _layout_and_tokens(
    captions: Mapping[str, Sequence[str]], tokenizers: Sequence[TextInput]
) -> tuple[dict[str, list[tuple[str, int]]], tuple[NDArray[np.int32], ...]]:
    """Return the rows of the arrays of texts, and the tokens of them all for each tokenizer."""
    layout = layout_of(captions)
    texts = [captions[kind][number] for rows in layout.values() for kind, number in rows]
    return layout, tuple(tokenizer(texts, truncate=True) for tokenizer in tokenizers) if texts else ()


class _Preparing(Dataset[Any]):
    """Makes the views and tokens of a shard's samples: what a worker does."""

    def __init__(
        self,
        samples: ShardSamples,
        augmentation: Augmentation,
        forms: Sequence[ViewForm],
        tokenizers: Sequence[TextInput],
        settings: Settings,
        captions: CaptionFile | None,
        whole: ViewForm | None,
    ) -> None:
        self._whole = whole
        self._samples, self._augmentation = samples, augmentation
        self._forms, self._tokenizers = tuple(forms), tuple(tokenizers)
        self._settings, self._captions = settings, captions
        # Streams of a sample depend on its own shard alone.
        digest = hashlib.sha256(samples.indexes[0].digest.encode()).digest()
        self._stream = int.from_bytes(digest[:4], "big") << 32

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> Prepared | LeftOut:
        try:
            return self._prepared(row)
        except InputError as error:
            return LeftOut(key=self._samples.key(row), reason=" ".join(str(error).split()))

    def _prepared(self, row: int) -> Prepared:
        sample = self._samples.read(row)
        old = {VIEWS_EXTENSION, *EXTENSIONS}
        members = {name: sample.members[name] for name in sample.members if name not in old}
        captions = sample.captions
        extra = self._captions.of(sample) if self._captions is not None else {}
        if extra:
            members = with_captions(members, extra, sample.key)
            captions = captions_of_members(members, sample.key)
        layout, tokens = _layout_and_tokens(captions, self._tokenizers)
        if not layout and self._whole is None:
            raise InputError(f"{sample.key}: has no caption. Give some in the file of --captions.")
        picture = decode_image(sample.image)
        rng = random_stream(self._settings.seed, 0, self._stream | row, "view")
        size_px = picture.height, picture.width
        drawn = [self._augmentation.sample(rng, size_px) for _ in range(self._settings.augmentations)]
        members[VIEWS_EXTENSION] = views_to_json(self._augmentation, drawn)
        views = []
        for form in self._forms:
            augmentation = with_form(self._augmentation, form)
            stacked = np.stack([augmentation.apply(picture, parameters) for parameters in drawn])
            views.append(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))
        whole = None
        if self._whole is not None:
            crop = RandomResizedCrop(self._whole.size_px, interpolation=self._whole.interpolation)
            square = Augmentation((crop,)).apply(picture, (central_square(*size_px),))
            whole = np.ascontiguousarray(square.transpose(2, 0, 1))
        place = self._stream | row
        return Prepared(sample.name, members, layout, tuple(views), tokens, bool(extra), place, whole)


# -- Plans --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything opened that reinforcing needs.

    Attributes:
        manifest: before any shard was made.
        shards: the input.
        teachers: in the order of their columns.
        captions: from the file, if there is one.
        captioner: if there is one.
        options: the settings.
    """

    manifest: Reinforcement
    shards: tuple[ShardSamples, ...]
    teachers: tuple[OnlineTeacher, ...]
    captions: CaptionFile | None
    captioner: Captioner | None
    options: ReinforceOptions

    @property
    def forms(self) -> tuple[ViewForm, ...]:
        """The forms of views some teacher has, each once."""
        return tuple(dict.fromkeys(_form(teacher) for teacher in self.teachers))

    @property
    def tokenizers(self) -> dict[str, TextInput]:
        """The tokenizers of the teachers by digest."""
        found = [teacher.consumer.tokenizer for teacher in self.teachers]
        return {tokenizer.digest: tokenizer for tokenizer in found if tokenizer is not None}

    def preparing(self, shard: ShardSamples) -> _Preparing:
        """Return what prepares the samples of a shard."""
        settings = self.manifest.settings
        crop = RandomResizedCrop(
            settings.image_size_px, scale=settings.crop_scale, interpolation=self.forms[0].interpolation
        )
        transforms: list[Transform] = [crop]
        if settings.rand_augment:
            transforms.append(
                RandAugment(num_ops=settings.rand_augment, magnitude=settings.rand_augment_magnitude)
            )
        return _Preparing(
            shard,
            Augmentation(tuple(transforms)),
            self.forms,
            list(self.tokenizers.values()),
            settings,
            self.captions,
            None if self.captioner is None else self.captioner.form,
        )

    def caption(self, group: Sequence[Prepared]) -> tuple[list[Prepared], list[LeftOut]]:
        """Return samples with what the captioner writes about them, and those that have no caption then."""
        if self.captioner is None or not group:
            return list(group), []
        images = torch.from_numpy(np.stack([one.whole for one in group if one.whole is not None]))
        stream = random_stream(self.manifest.settings.seed, 0, group[0].place, "caption")
        written = self.captioner(
            images.to(self.options.device),
            self.options.captions_per_picture,
            seed=int(stream.bit_generator.random_raw()) >> 1,
        )
        found: list[Prepared] = []
        mute: list[LeftOut] = []
        for one, texts in zip(group, written, strict=True):
            members = with_captions(one.members, {"synthetic": texts}, one.name) if texts else one.members
            captions = captions_of_members(members, one.name)
            layout, tokens = _layout_and_tokens(captions, list(self.tokenizers.values()))
            if layout:
                found.append(
                    replace(one, members=members, layout=layout, tokens=tokens, captioned=bool(texts))
                )
            else:
                mute.append(LeftOut(key=one.name, reason="has no caption, and the captioner wrote none."))
        return found, mute

    @torch.no_grad()
    def embed(self, group: Sequence[Prepared]) -> list[dict[str, NDArray[np.float32]]]:
        """Return the arrays of embeddings of each of some samples."""
        forms, digests = list(self.forms), list(self.tokenizers)
        images: list[Tensor] = []
        texts: list[Tensor] = []
        for teacher in self.teachers:
            assert teacher.consumer.tokenizer is not None
            at, number = forms.index(_form(teacher)), digests.index(teacher.consumer.tokenizer.digest)
            views = torch.from_numpy(np.concatenate([one.views[at] for one in group]))
            tokens = torch.from_numpy(np.concatenate([one.tokens[number] for one in group]))
            images.append(self._rows(views, lambda part, of=teacher: of(part, None).image))  # type: ignore[misc]
            texts.append(
                self._rows(tokens, lambda part, of=teacher: of(None, part[:, None]).texts[0])  # type: ignore[misc]
            )
        image, text = (torch.cat(columns, dim=1).numpy() for columns in (images, texts))
        found = []
        row = 0
        for number, one in enumerate(group):
            count = self.manifest.settings.augmentations
            arrays = {IMAGE: image[number * count : (number + 1) * count]}
            for name, rows in one.layout.items():
                arrays[name] = text[row : row + len(rows)]
                row += len(rows)
            for name, array in arrays.items():
                if not np.isfinite(array).all():
                    raise InputError(
                        f"sample {one.name!r}: a teacher's {name} are not finite; check its weights."
                    )
            found.append(arrays)
        return found

    def _rows(self, inputs: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return unit rows ``(n, d)`` float32, batch by batch."""
        device = self.options.device
        rows = [embed(part.to(device)).float().cpu() for part in torch.split(inputs, self.options.batch_size)]
        return F.normalize(torch.cat(rows), dim=-1)


def open_plan(
    paths: Sequence[Path],
    specs: Sequence[TeacherSpec],
    options: ReinforceOptions,
    *,
    root: Path,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Open shards, teachers and captions.

    Args:
        paths: shards, or folders of them.
        specs: the teachers, in the order of their columns.
        options: the settings.
        root: what the paths of teachers are relative to.
        progress: called with each shard before its index is opened or made.

    Raises:
        ConfigError: a setting is out of range, or a teacher cannot be asked about single samples.
        InputError: something is missing or cannot be read.
    """
    _check_options(options)
    captions = None if options.captions is None else CaptionFile(options.captions)
    captioner = None if options.captioner is None else open_captioner(options.captioner)
    files = find_shards(paths)
    names = [file.name for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two shards are called {twice[0]!r}, and each goes to a file of its name; reinforce them into "
            "different directories."
        )
    shards = tuple(ShardSamples([file], progress=progress) for file in files)
    for shard in shards:
        if not len(shard):
            raise InputError(without_pictures(shard.indexes))
    opened = [_opened(spec, root) for spec in specs]
    if not opened:
        raise ConfigError("no teacher; expected one or more.")
    said = [teacher.name for teacher, _ in opened]
    if len(set(said)) < len(said):
        raise ConfigError(f"teachers are called {said}; names must differ.")
    form = _form(opened[0][0])
    settings = Settings(
        augmentations=options.augmentations,
        image_size_px=form.size_px,
        crop_scale=options.crop_scale,
        rand_augment=options.rand_augment,
        rand_augment_magnitude=options.rand_augment_magnitude,
        precision=options.precision,
        batch_size=options.batch_size,
        seed=options.seed,
        device=options.device,
        captions=_said_of(captions, captioner, options),
    )
    manifest = Reinforcement(
        settings=settings,
        teachers=tuple(_records(opened)),
        source=tuple(
            SourceShard(name=file.name, digest=shard.indexes[0].digest, samples=len(shard))
            for file, shard in zip(files, shards, strict=True)
        ),
    )
    teachers = tuple(teacher for teacher, _ in opened)
    for teacher in teachers:
        teacher.to(torch.device(options.device))
    if captioner is not None:
        captioner.to(options.device)
    return Plan(manifest, shards, teachers, captions, captioner, options)


def _said_of(captions: CaptionFile | None, captioner: Captioner | None, options: ReinforceOptions) -> str:
    """Return what the manifest says about further captions."""
    if captioner is not None:
        return f"{options.captions_per_picture} of {captioner.name} {captioner.digest}"
    return "" if captions is None else captions.digest


def _check_options(options: ReinforceOptions) -> None:
    if options.captions is not None and options.captioner is not None:
        raise ConfigError("reinforce: captions come from a file or a captioner; expected one of them.")
    for name in ("augmentations", "batch_size", "captions_per_picture"):
        if getattr(options, name) < 1:
            raise ConfigError(f"reinforce: {name} is {getattr(options, name)}, expected 1 or more.")
    if options.seed < 0:
        raise ConfigError(f"reinforce: seed is {options.seed}, expected 0 or more.")
    if options.device not in ("cpu", "cuda"):
        raise ConfigError(f"reinforce: device is {options.device!r}, expected 'cpu' or 'cuda'.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU here; use device 'cpu'.")
    # Raises where the settings cannot be.
    RandomResizedCrop((1, 1), scale=options.crop_scale)
    RandAugment(num_ops=max(1, options.rand_augment), magnitude=options.rand_augment_magnitude)


def _opened(spec: TeacherSpec, root: Path) -> tuple[OnlineTeacher, float]:
    teacher = open_teacher(spec, root)
    if not isinstance(teacher, OnlineTeacher) or not teacher.image_dim or not teacher.text_dim:
        raise ConfigError(
            f"teacher {spec.name!r}: cannot be asked about single samples, or lacks a tower; expected a "
            "model with an image and a text tower that runs here."
        )
    return teacher, float(getattr(spec, "scale", None) or _SCALE)


def _form(teacher: OnlineTeacher) -> ViewForm:
    assert teacher.consumer.form is not None
    return teacher.consumer.form


def _records(opened: Sequence[tuple[OnlineTeacher, float]]) -> Iterator[TeacherRecord]:
    column = 0
    for teacher, scale in opened:
        assert teacher.image_dim is not None
        if teacher.image_dim != teacher.text_dim:
            raise ConfigError(
                f"teacher {teacher.name!r}: its embeddings are {teacher.image_dim} and {teacher.text_dim} "
                "wide; expected the same width for pictures and texts."
            )
        form = _form(teacher)
        yield TeacherRecord(
            name=teacher.name,
            columns=(column, column + teacher.image_dim),
            scale=scale,
            licence=str(teacher.parent.get("licence", "NOASSERTION")),
            parent=teacher.parent,
            image_size_px=form.size_px,
            interpolation=form.interpolation,
            sha256=weights_digest(teacher),
        )
        column += teacher.image_dim
