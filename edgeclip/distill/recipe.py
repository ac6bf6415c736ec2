"""Training recipes: TOML files that say what is trained, on what, with which losses, stage by stage.

A recipe is ``schema = 1``, ``kind = "train"`` and the tables below; every table is a class here, every key an
attribute. Reading is strict: an unknown key, a wrong type, a number out of range or a name that refers to
nothing is one sentence with the place, what was found and what was expected. Paths are relative to the
recipe's folder.

    schema = 1
    kind = "train"
    name = "plain-clip"

    [student]
    model = "tiny-fastvit"

    [data.train]
    paths = ["shapes/train.jsonl"]

    [[stage]]
    name = "contrastive"
    data = "train"
    samples = 100_000
    batch_size = 256

    [[stage.loss]]
    kind = "info-nce"
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from edgeclip.distill.recipe_text import (
    convert,
    mapping,
    parse_tables,
    parse_toml,
    read_recipe_file,
    tables,
)
from edgeclip.errors import ConfigError

__all__ = [
    "AffinityLoss",
    "AlignmentUniformityLoss",
    "BundleTeacher",
    "CheckpointTeacher",
    "DataSpec",
    "DecoupledLoss",
    "EmbeddingsTeacher",
    "FeatureLoss",
    "GroupSpec",
    "HuggingFaceTeacher",
    "ImageFeaturesTeacher",
    "InfoNCELoss",
    "InteractiveLoss",
    "LossSpec",
    "MaskedTokensLoss",
    "OpenClipTeacher",
    "OptimizerSpec",
    "PictureMatchLoss",
    "PromptSpec",
    "PruneSpec",
    "Recipe",
    "ScheduleSpec",
    "SentenceTeacher",
    "SigLIPLoss",
    "StageSpec",
    "StoredTeacher",
    "StudentSpec",
    "TeacherSpec",
    "TokenAlignmentLoss",
    "ValidationSpec",
    "load_recipe",
    "parse_recipe",
    "parse_teachers",
    "read_recipe_file",
    "recipe_digest",
    "teachers_of",
]

_LARGEST = sys.float_info.max  # TOML has inf and nan
Finite = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareBelowOne = Annotated[float, Meta(ge=0, lt=1)]
KeptShare = Annotated[float, Meta(gt=0, lt=1)]
Count = Annotated[int, Meta(ge=1)]


class _Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a recipe."""


class StudentSpec(_Table, frozen=True, kw_only=True):
    """What is trained.

    Attributes:
        model: a name of the model zoo, built with fresh weights.
        config: or an architecture of one's own, with the keys of ``CLIPConfig``; ``name`` is the recipe's.
            With ``inherit``, what it leaves out is as in the larger model.
        checkpoint: or the weights to start from: our checkpoint, or a published file of ``model``.
        inherit: a larger model to cut the weights of ``model`` or ``config`` out of: our checkpoint, or a
            published file.
        inherit_model: name in the model zoo of that file, where its weights alone do not tell.
        inherit_layers: which layers of the larger model are taken.
        tokenizer: directory with a tokenizer's files; the checkpoint's, or CLIP's own, if not given.
        materials: where ``edgeclip data fetch default-model -o`` put the packages that weights of the
            checkpoint are left in; its own directory if not given.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    checkpoint: str | None = None
    inherit: str | None = None
    inherit_model: str | None = None
    inherit_layers: Literal["even", "first"] = "even"
    tokenizer: str | None = None
    materials: str | None = None


class PromptSpec(_Table, frozen=True, kw_only=True):
    """What is put around captions of one kind, drawn anew each time; it does not change what they say.

    Attributes:
        templates: texts with one ``{}``, names of ours such as ``"openai-80"``, or ``.txt`` files with one a
            line; what stands twice is drawn twice as often.
        bare: share of captions without a template.
        before: texts of which one may stand in front of a caption, inside the template.
        before_share: share of captions that get one.
        drop: share of captions of three tokens or more that lose one of them, so that no token carries a
            meaning alone. Teachers with a tokenizer of their own read them whole.
    """

    templates: tuple[str, ...] = ()
    bare: Share = 0.0
    before: tuple[str, ...] = ()
    before_share: Share = 0.0
    drop: Share = 0.0


class DataSpec(_Table, frozen=True, kw_only=True):
    """Image-text pairs, or texts without pictures.

    Attributes:
        paths: shards, tables or folders.
        texts: instead of ``paths``, tables of texts (:mod:`edgeclip.distill.texts`).
        pictures: with ``texts``, an ``.npy`` file with what the frozen image tower makes of pictures.
        prompts: what is put around captions, by their kind.
        captions: how often each kind of caption is drawn, as weights.
        synthetic: the same for the further captions of a picture, where a stage has ``texts`` above 1.
        crop_scale: share of the picture's area that a random crop keeps; ``[1, 1]`` takes all of it.
        rand_augment: operations of RandAugment on each view; 0 for none.
        rand_augment_magnitude: their strength, 0 to 30.
        max_broken: samples that may fail to decode before training stops.
    """

    paths: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    texts: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    pictures: str | None = None
    prompts: dict[str, PromptSpec] = msgspec.field(default_factory=dict)
    captions: Annotated[dict[str, Positive], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: {"alt": 1.0}
    )
    synthetic: Annotated[dict[str, Positive], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: {"synthetic": 1.0}
    )
    crop_scale: tuple[Positive, Positive] = (0.9, 1.0)
    rand_augment: Annotated[int, Meta(ge=0, le=14)] = 0
    rand_augment_magnitude: Annotated[int, Meta(ge=0, le=30)] = 9
    max_broken: Annotated[int, Meta(ge=0)] = 100


class CheckpointTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="checkpoint"):
    """A checkpoint of ours, or a published file of a model of the zoo, run beside the student."""

    name: str
    path: str
    model: str | None = None
    scale: Positive = 100.0


class OpenClipTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="open-clip"):
    """A model of open_clip (extra ``openclip``), run beside the student.

    Attributes:
        name: as losses call it.
        model: as open_clip calls it.
        pretrained: local file with its weights.
        tag: which of the weights that open_clip lists for the model these are: mean, deviation and
            interpolation are theirs. Needed where the listed ones differ in that.
        licence: SPDX identifier of its weights' terms, which the file does not state.
        scale: the teacher's own multiplier of cosines.
    """

    name: str
    model: str
    pretrained: str
    tag: str | None = None
    licence: str = ""
    scale: Positive = 100.0


class StoredTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="stored"):
    """Embeddings that lie in the shards, made by ``edgeclip reinforce`` or by others in DataCompDR's layout.

    What is not given is what ``reinforcement.json`` beside the shards says about the teacher of this name.

    Attributes:
        name: as losses call it.
        slice: first and last-plus-one column of its part of the stored embeddings; needed for shards of
            others.
        caption_share: how much of a picture's embedding its captions make up: 0 takes what the teacher saw, 1
            the mean of what it read. For pictures that it misnames and whose captions are right.
        scale: the teacher's own multiplier of cosines; 100 for shards of others.
        licence: SPDX identifier of its weights' terms; ``NOASSERTION`` for shards of others.
    """

    name: str
    slice: tuple[int, int] | None = None
    caption_share: Share = 0.0
    scale: Positive | None = None
    licence: str | None = None


class BundleTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="bundle"):
    """An exported bundle, run beside the student by its own runtime, on the CPU.

    Attributes:
        name: as losses call it.
        path: its directory; ``"default"`` and ``"nano"`` come with edgeclip.
        variant: which of its variants; the first in float32 that runs here, if not given, else the one that
            ``edgeclip classify`` would take.
        scale: the teacher's own multiplier of cosines.
    """

    name: str
    path: str = "default"
    variant: str | None = None
    scale: Positive = 100.0


class HuggingFaceTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="huggingface"):
    """A CLIP, ChineseCLIP, AltCLIP or SigLIP of transformers (extra ``hf``), run beside the student.

    Attributes:
        name: as losses call it.
        path: local directory with ``config.json``, ``model.safetensors``, tokenizer and processor.
        context_length: tokens a text; CLIP's 77 if not given, or what its text tower reads where that is less
            or must be exact.
        licence: SPDX identifier of its weights' terms, which the directory does not state in a fixed place.
        scale: the teacher's own multiplier of cosines.
    """

    name: str
    path: str
    context_length: Count | None = None
    licence: str = ""
    scale: Positive = 100.0


class ImageFeaturesTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="image-features"):
    """An image tower or classifier: what it gives before its classifier, for losses of kind ``"feature"``.

    Attributes:
        name: as losses call it.
        path: its weights: a checkpoint of ours, a published file, or for timm any file of its model.
        model: its name, needed for timm; of the model zoo where the weights alone do not tell.
        library: ``"edgeclip"``, or ``"timm"`` (extra ``openclip``) for what the zoo does not have.
        licence: SPDX identifier of its weights' terms, where its file is of nobody the zoo knows.
    """

    scale: ClassVar[float] = 1.0  # it has no similarities of pictures and texts

    name: str
    path: str
    model: str | None = None
    library: Literal["edgeclip", "timm"] = "edgeclip"
    licence: str = ""


class SentenceTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="sentence"):
    """A sentence encoder, for losses of kind ``"feature"``.

    Attributes:
        name: as losses call it.
        path: local directory of transformers (extra ``hf``), or an ONNX file.
        tokenizer: the ``tokenizer.json`` of an ONNX file.
        pooling: of its tokens: the mean of those that are no padding, or the first.
        context_length: tokens a text; 77, or what it reads where that is less, if not given.
        licence: SPDX identifier of its weights' terms.
    """

    scale: ClassVar[float] = 1.0  # it has no similarities of pictures and texts

    name: str
    path: str
    tokenizer: str | None = None
    pooling: Literal["mean", "first"] = "mean"
    context_length: Count | None = None
    licence: str = ""


class EmbeddingsTeacher(_Table, frozen=True, kw_only=True, tag_field="kind", tag="embeddings"):
    """Embeddings computed elsewhere: row ``i`` belongs to sample ``i`` of the data.

    They are of whole pictures, whatever crop the student sees, and of one caption a picture.

    Attributes:
        name: as losses call it.
        image: ``.npy`` file with an ``(N, d)`` array of floats.
        text: likewise.
        digest: of the samples they belong to, as ``run.json`` of a run names it; not compared if not given.
        licence: SPDX identifier of the terms of what made them.
        scale: the teacher's own multiplier of cosines.
    """

    name: str
    image: str | None = None
    text: str | None = None
    digest: str | None = None
    licence: str = ""
    scale: Positive = 100.0


TeacherSpec: TypeAlias = (
    CheckpointTeacher
    | OpenClipTeacher
    | StoredTeacher
    | BundleTeacher
    | HuggingFaceTeacher
    | ImageFeaturesTeacher
    | SentenceTeacher
    | EmbeddingsTeacher
)


class InfoNCELoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="info-nce"):
    """Matching pictures and texts of the batch.

    Attributes:
        weight: of the term.
        softness: share of each target that negatives get, linearly from the first to the last step.
        spread: how they share it: ``"even"``, or by what the student takes for ``"similar"``.
    """

    weight: Positive = 1.0
    softness: tuple[ShareBelowOne, ShareBelowOne] = (0.0, 0.0)
    spread: Literal["even", "similar"] = "even"


class DecoupledLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="decoupled"):
    """InfoNCE without the positive in its denominator."""

    weight: Positive = 1.0


class SigLIPLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="siglip"):
    """A yes or no for every pair."""

    weight: Positive = 1.0
    bias_init: Finite = -10.0


class AffinityLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="affinity"):
    """The student's similarities should be the teachers' (MobileCLIP, TinyCLIP, CLIP-KD's CRD)."""

    teachers: Annotated[tuple[str, ...], Meta(min_length=1)]
    weight: Positive = 1.0
    teacher_weights: tuple[NotNegative, ...] | None = None


class InteractiveLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="interactive"):
    """Each tower of the student against the teacher's other one (CLIP-KD's ICL)."""

    teacher: str
    weight: Positive = 1.0


class FeatureLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="feature"):
    """The student's embeddings should be the teacher's, through an adapter where widths differ.

    Attributes:
        teacher: whose.
        tower: of which tower.
        distance: ``"mse"`` on unit vectors (CLIP-KD's FD), ``"cosine"``, which is half their squared
            difference, or ``"smooth-l1"`` (DC-CLIP's first stage).
        beta: of smooth L1.
        weight: of the term.
    """

    teacher: str
    tower: Literal["image", "text", "both"] = "both"
    distance: Literal["mse", "cosine", "smooth-l1"] = "mse"
    beta: Positive = 1.0
    weight: Positive = 1.0


class PictureMatchLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="picture-match"):
    """Texts should be as similar to pictures as the teacher's embeddings of them are.

    Attributes:
        teacher: whose embeddings of texts; as wide as the student's.
        pictures: drawn anew each step from the ``pictures`` of the data.
        scale: multiplier of cosines on both sides.
        weight: of the term.
    """

    teacher: str
    pictures: Count = 256
    scale: Positive = 20.0
    weight: Positive = 1.0


class AlignmentUniformityLoss(
    _Table, frozen=True, kw_only=True, tag_field="kind", tag="alignment-uniformity"
):
    """Pairs close together, all else spread over the sphere (Wang & Isola 2020).

    Attributes:
        weight: of the term.
        alignment: weight of the distance of pairs in it.
        uniformity: weight of the mean of both towers' uniformity in it.
        t: how fast the potential of a pair of rows falls.
    """

    weight: Positive = 1.0
    alignment: NotNegative = 1.0
    uniformity: NotNegative = 1.0
    t: Positive = 2.0


class TokenAlignmentLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="token-alignment"):
    """Words matched with patches, as embeddings are with each other (LightCLIP's second part).

    Attributes:
        weight: of the term.
        temperature: of the relaxation, in cosines.
        iterations: of the prices of patches; 0 lets words share a patch for nothing.
        width: of the space tokens are compared in; the embedding's if not given.
    """

    weight: Positive = 1.0
    temperature: Annotated[float, Meta(ge=0.02)] = 0.05
    iterations: Annotated[int, Meta(ge=0)] = 5
    width: Count | None = None


class MaskedTokensLoss(_Table, frozen=True, kw_only=True, tag_field="kind", tag="masked-tokens"):
    """Hidden words, told from the others and the picture (LightCLIP's third part).

    Attributes:
        weight: of the term.
        share: of the words that are hidden.
        fusions: layers of the text tower behind which words look at patches, spread evenly.
    """

    weight: Positive = 1.0
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.15
    fusions: Count = 2


LossSpec: TypeAlias = (
    InfoNCELoss
    | DecoupledLoss
    | SigLIPLoss
    | AffinityLoss
    | InteractiveLoss
    | FeatureLoss
    | PictureMatchLoss
    | AlignmentUniformityLoss
    | TokenAlignmentLoss
    | MaskedTokensLoss
)


class OptimizerSpec(_Table, frozen=True, kw_only=True):
    """AdamW; norms, biases, scales and position tables are not decayed."""

    learning_rate: Positive = 1e-3
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.2


class ScheduleSpec(_Table, frozen=True, kw_only=True):
    """Linear warm-up, then cosine decay or a constant, over the steps of the stage."""

    kind: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[int, Meta(ge=0)] = 0
    final: Share = 0.0


class GroupSpec(_Table, frozen=True, kw_only=True):
    """Parameters that are trained otherwise: the first pattern that matches a name decides.

    Attributes:
        match: pattern over parameter names, ``"text_tower.*"``.
        learning_rate: factor on the stage's rate; 0 freezes.
        weight_decay: instead of the optimizer's.
    """

    match: str
    learning_rate: NotNegative = 1.0
    weight_decay: NotNegative | None = None


class PruneSpec(_Table, frozen=True, kw_only=True):
    """Gates that are learned in a stage; at its end, what they close is taken out of the model.

    Attributes:
        image: share of the parameters in the image tower's layers that stay, of those at the beginning of the
            stage; ``None``: all.
        text: likewise of the text tower.
        gates: on what: channels of the residual stream, attention heads, hidden units, whole parts of layers.
        warmup: steps in which the share asked for falls from 1.
        learning_rate: of the gates; the stage's schedule does not touch it.
        multiplier_learning_rate: of the two factors of the penalty.
    """

    image: KeptShare | None = None
    text: KeptShare | None = None
    gates: Annotated[tuple[Literal["channels", "heads", "neurons", "layers"], ...], Meta(min_length=1)] = (
        "channels",
        "heads",
        "neurons",
    )
    warmup: Annotated[int, Meta(ge=0)] = 0
    learning_rate: Positive = 0.02
    multiplier_learning_rate: Positive = 0.02


class StageSpec(_Table, frozen=True, kw_only=True):
    """One stage of training.

    Attributes:
        name: as logs and checkpoints call it.
        data: name of a ``[data.…]`` table.
        samples: pictures seen in the whole stage.
        batch_size: of all processes together.
        loss: the terms, summed with their weights.
        parts: micro-batches a step; the gradient is that of the whole batch.
        texts: captions a picture: the first is a real one, the others are synthetic.
        precision: of the towers; losses and optimizer stay float32.
        optimizer: how parameters move.
        schedule: of the learning rate.
        group: exceptions from both.
        clip_norm: limit on the gradient's norm.
        ema: decay of the running average of the weights that is evaluated and exported; ``None`` for none.
            The first steps of a run decay faster, ``(1 + step) / (10 + step)``, so that fresh weights fade.
        checkpoint_activations: compute the blocks of the towers again in the backward pass instead of keeping
            what is inside them: less memory, the same weights.
        freeze_batch_norm: keep batch norms at their statistics, which makes ``parts`` exact.
        train_scale: whether the multiplier of cosines is learned.
        scale: the multiplier of cosines at the beginning of the stage; as it is if not given.
        prune: gates that make the model smaller at the end of the stage.
    """

    name: str
    data: str
    samples: Count
    batch_size: Count
    loss: tuple[LossSpec, ...]
    parts: Count = 1
    texts: Count = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    group: tuple[GroupSpec, ...] = ()
    clip_norm: Positive | None = 1.0
    ema: Share | None = None
    checkpoint_activations: bool = False
    freeze_batch_norm: bool = False
    train_scale: bool = True
    scale: Annotated[float, Meta(gt=0, le=100)] | None = None
    prune: PruneSpec | None = None

    @property
    def steps(self) -> int:
        """Steps of the stage: whole batches until all samples are seen."""
        return -(-self.samples // self.batch_size)


class ValidationSpec(_Table, frozen=True, kw_only=True):
    """What is measured while training.

    Attributes:
        name: as logs call it.
        kind: ``"zero-shot"``: labels of pictures; ``"retrieval"``: pictures and their captions;
            ``"teacher-agreement"``: whether student and teacher find the same alike.
        data: name of a ``[data.…]`` table.
        labels: file with one label a line, or JSON with aliases, for ``"zero-shot"``.
        language: whose aliases are offered; the names themselves if not given.
        templates: prompt templates around the labels.
        teacher: for ``"teacher-agreement"``; it need not be one that some loss asks.
        every: steps between two measurements; the last step is always measured.
        limit: pictures at most; 0 for all.
    """

    name: str
    kind: Literal["zero-shot", "retrieval", "teacher-agreement"] = "retrieval"
    data: str = "validation"
    labels: str | None = None
    language: str | None = None
    templates: str = "bare"
    teacher: str | None = None
    every: Count = 1000
    limit: Annotated[int, Meta(ge=0)] = 0


class Recipe(_Table, frozen=True, kw_only=True):
    """A whole recipe.

    Attributes:
        name: of the model that comes out.
        student: what is trained.
        data: tables of pairs by name.
        stage: in order.
        teacher: by ``name``.
        validation: what is measured.
        seed: of weights, order, crops and captions.
        checkpoint_every: steps between two checkpoints; stages end with one.
        licence: of the model that comes out, an SPDX identifier; what it descends from may restrict it.
        dtype: in which its weights are stored.
    """

    name: str
    student: StudentSpec
    data: dict[str, DataSpec]
    stage: tuple[StageSpec, ...]
    teacher: tuple[TeacherSpec, ...] = ()
    validation: tuple[ValidationSpec, ...] = ()
    seed: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    checkpoint_every: Count = 1000
    licence: str = "Apache-2.0"
    dtype: Literal["float32", "float16"] = "float32"


def load_recipe(path: Path, *, changes: Iterable[str] = ()) -> Recipe:
    """Return the recipe of a TOML file.

    Args:
        path: the file.
        changes: ``key=value`` with dotted keys and TOML values, as ``--set`` takes them:
            ``"stage.0.batch_size=64"``. They are applied before the recipe is checked.

    Raises:
        ConfigError: the file cannot be read or used.
    """
    return parse_recipe(read_recipe_file(path), where=f"recipe {str(path)!r}", changes=changes)


def parse_recipe(content: bytes, *, where: str = "recipe", changes: Iterable[str] = ()) -> Recipe:
    """Return the recipe of TOML text; see :func:`load_recipe`."""
    said = parse_tables(content, where=where, kind="train", changes=changes)
    recipe = _recipe(said, where)
    _check(recipe, where)
    return recipe


def parse_teachers(content: bytes, *, where: str) -> tuple[TeacherSpec, ...]:
    """Return the teachers of TOML text with ``[[teacher]]`` tables, as recipes have them, and nothing else.

    Raises:
        ConfigError: it is too large, not TOML, or holds something else.
    """
    said = parse_toml(content, where=where, what="are these teachers")
    others = sorted(said.keys() - {"teacher"})
    if others or not said:
        raise ConfigError(f"{where}: holds {others or 'nothing'}, expected [[teacher]] tables alone.")
    return tuple(
        convert(table, TeacherSpec, f"{where}: [[teacher]] {index}")
        for index, table in enumerate(tables(said["teacher"], f"{where}: teacher"))
    )


def recipe_digest(recipe: Recipe) -> str:
    """Return the sha256 of what the recipe means: order of keys, comments and defaults do not matter."""
    return hashlib.sha256(
        json.dumps(msgspec.to_builtins(recipe), sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def _recipe(said: dict[str, Any], where: str) -> Recipe:
    """Convert table by table, so that messages name the place."""
    rest = dict(said)
    data = {
        name: convert(table, DataSpec, f"{where}: [data.{name}]")
        for name, table in mapping(rest.pop("data", {}), f"{where}: [data]").items()
    }
    stages = tuple(
        _stage(table, f"{where}: [[stage]] {index}")
        for index, table in enumerate(tables(rest.pop("stage", []), f"{where}: stage"))
    )
    lists: dict[str, tuple[Any, ...]] = {}
    for key, kind in (("teacher", TeacherSpec), ("validation", ValidationSpec)):
        lists[key] = tuple(
            convert(table, kind, f"{where}: [[{key}]] {index}")
            for index, table in enumerate(tables(rest.pop(key, []), f"{where}: {key}"))
        )
    if "student" in rest:
        rest["student"] = msgspec.to_builtins(convert(rest["student"], StudentSpec, f"{where}: [student]"))
    checked: Recipe = convert({**rest, "data": {}, "stage": []}, Recipe, where)
    return msgspec.structs.replace(checked, data=data, stage=stages, **lists)


def _stage(table: Any, where: str) -> StageSpec:
    rest = dict(mapping(table, where))
    losses = tuple(
        convert(item, LossSpec, f"{where}: [[stage.loss]] {index}")
        for index, item in enumerate(tables(rest.pop("loss", []), f"{where}: loss"))
    )
    groups = tuple(
        convert(item, GroupSpec, f"{where}: [[stage.group]] {index}")
        for index, item in enumerate(tables(rest.pop("group", []), f"{where}: group"))
    )
    checked: StageSpec = convert({**rest, "loss": []}, StageSpec, where)
    return msgspec.structs.replace(checked, loss=losses, group=groups)


def _check(recipe: Recipe, where: str) -> None:
    """Raise where the tables contradict each other."""
    if not recipe.stage:
        raise ConfigError(f"{where}: expected one [[stage]] or more.")
    said = {key for key in ("model", "config", "checkpoint") if getattr(recipe.student, key) is not None}
    if said not in ({"model"}, {"config"}, {"checkpoint"}, {"model", "checkpoint"}):
        raise ConfigError(
            f"{where}: [student]: got {sorted(said)}, expected 'model', 'config' or 'checkpoint', or 'model' "
            "beside the 'checkpoint' of a published file."
        )
    if recipe.student.inherit is None:
        if recipe.student.inherit_model is not None:
            raise ConfigError(
                f"{where}: [student]: 'inherit_model' stands without 'inherit', the larger model."
            )
    elif "checkpoint" in said:
        raise ConfigError(
            f"{where}: [student]: got 'inherit' beside 'checkpoint'; expected it beside 'model' or "
            "'config', which say what is cut out."
        )
    teachers = [teacher.name for teacher in recipe.teacher]
    for names, what in (
        (teachers, "[[teacher]]"),
        ([stage.name for stage in recipe.stage], "[[stage]]"),
        ([entry.name for entry in recipe.validation], "[[validation]]"),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{where}: {what}: the names {twice} stand twice; names must differ.")
    for index, teacher in enumerate(recipe.teacher):
        _check_teacher(teacher, f"{where}: [[teacher]] {index}")
    for index, stage in enumerate(recipe.stage):
        _check_stage(recipe, stage, teachers, f"{where}: [[stage]] {index}")
    for index, entry in enumerate(recipe.validation):
        at = f"{where}: [[validation]] {index}"
        if entry.data not in recipe.data:
            raise ConfigError(f"{at}: 'data' is {entry.data!r}, expected one of {sorted(recipe.data)}.")
        if recipe.data[entry.data].texts:
            raise ConfigError(f"{at}: [data.{entry.data}] has texts without pictures; expected pairs.")
        if entry.kind == "zero-shot" and entry.labels is None:
            raise ConfigError(f"{at}: kind = 'zero-shot' needs 'labels', a file with one label a line.")
        if entry.kind == "teacher-agreement" and entry.teacher not in teachers:
            raise ConfigError(f"{at}: 'teacher' is {entry.teacher!r}, expected one of {sorted(teachers)}.")
    for name, table in recipe.data.items():
        _check_data(table, f"{where}: [data.{name}]")
        low, high = table.crop_scale
        if not low <= high <= 1:
            raise ConfigError(
                f"{where}: [data.{name}]: 'crop_scale' is [{low}, {high}], "
                "expected two rising shares up to 1."
            )


def _check_data(table: DataSpec, at: str) -> None:
    if (table.paths is None) is (table.texts is None):
        raise ConfigError(
            f"{at}: got {'none' if table.paths is None else 'both'} of 'paths' and 'texts', expected one: "
            "pairs, or texts without pictures."
        )
    if table.pictures is not None and not table.texts:
        raise ConfigError(
            f"{at}: 'pictures' is {table.pictures!r}, but the data are pairs, whose pictures are looked at; "
            "expected it beside 'texts'."
        )
    if table.texts:
        for key, default in _TEXTLESS.items():
            if getattr(table, key) != default:
                raise ConfigError(
                    f"{at}: {key!r} is {getattr(table, key)!r}, but texts have no views and no captions to "
                    "choose from; leave it out."
                )
    for kind, said in table.prompts.items():
        if said.before_share and not said.before:
            raise ConfigError(
                f"{at}: prompts.{kind}: 'before_share' is {said.before_share}, but 'before' is empty."
            )


def _check_stored(recipe: Recipe, stage: StageSpec, at: str) -> None:
    """Raise where a stage with stored teachers asks for views that nobody has embeddings of."""
    stored = {teacher.name for teacher in recipe.teacher if isinstance(teacher, StoredTeacher)}
    asked = sorted(stored.intersection(name for loss in stage.loss for name in teachers_of(loss)))
    table = recipe.data[stage.data]
    for key in ("crop_scale", "rand_augment", "rand_augment_magnitude"):
        value, default = getattr(table, key), _VIEWS[key]
        if asked and value != default:
            raise ConfigError(
                f"{at}: the views of the stored teachers {asked} lie in the shards, but [data.{stage.data}] "
                f"sets {key!r} to {value!r}; leave it out, or take teachers that run beside the student."
            )


_VIEWS = {field.name: field.default for field in msgspec.structs.fields(DataSpec)}
_TEXTLESS: dict[str, Any] = {
    "captions": {"alt": 1.0},
    "synthetic": {"synthetic": 1.0},
    **{key: _VIEWS[key] for key in ("crop_scale", "rand_augment", "rand_augment_magnitude")},
}


def teachers_of(loss: LossSpec) -> tuple[str, ...]:
    """Return the teachers a loss term names."""
    if isinstance(loss, AffinityLoss):
        return loss.teachers
    return (loss.teacher,) if isinstance(loss, InteractiveLoss | FeatureLoss | PictureMatchLoss) else ()


def _check_teacher(teacher: TeacherSpec, at: str) -> None:
    if isinstance(teacher, EmbeddingsTeacher) and teacher.image is None and teacher.text is None:
        raise ConfigError(f"{at}: got neither 'image' nor 'text', expected the .npy file of one or both.")
    if isinstance(teacher, ImageFeaturesTeacher) and teacher.library == "timm" and teacher.model is None:
        raise ConfigError(f"{at}: library = 'timm' needs 'model', a name that timm knows.")


def _check_stage(recipe: Recipe, stage: StageSpec, teachers: list[str], at: str) -> None:
    if stage.data not in recipe.data:
        raise ConfigError(f"{at}: 'data' is {stage.data!r}, expected one of {sorted(recipe.data)}.")
    if not stage.loss:
        raise ConfigError(f"{at}: expected one [[stage.loss]] or more.")
    _check_stored(recipe, stage, at)
    if recipe.data[stage.data].texts and (stage.texts > 1 or stage.prune is not None):
        key, value = ("texts", stage.texts) if stage.texts > 1 else ("prune", "given")
        raise ConfigError(
            f"{at}: {key!r} is {value}, but [data.{stage.data}] has texts without pictures; expected pairs."
        )
    if stage.batch_size % stage.parts:
        raise ConfigError(
            f"{at}: 'batch_size' {stage.batch_size} cannot be cut into 'parts' {stage.parts}; "
            "choose a divisor."
        )
    if stage.schedule.warmup >= stage.steps:
        raise ConfigError(
            f"{at}: 'warmup' is {stage.schedule.warmup} steps, but the stage has {stage.steps} "
            f"({stage.samples} samples in batches of {stage.batch_size}); shorten it."
        )
    twice = [index for index, loss in enumerate(stage.loss) if isinstance(loss, MaskedTokensLoss)][1:]
    if twice:
        raise ConfigError(
            f"{at}: [[stage.loss]] {twice[0]}: kind = 'masked-tokens' stands twice; a stage hides words once."
        )
    if stage.prune is not None:
        if stage.prune.image is None and stage.prune.text is None:
            raise ConfigError(
                f"{at}: 'prune' asks for nothing; expected a share for 'image', 'text' or both."
            )
        if stage.prune.warmup >= stage.steps:
            raise ConfigError(
                f"{at}: 'prune.warmup' is {stage.prune.warmup} steps, but the stage has {stage.steps}; "
                "shorten it."
            )
    for index, loss in enumerate(stage.loss):
        place = f"{at}: [[stage.loss]] {index}"
        unknown = [name for name in teachers_of(loss) if name not in teachers]
        if unknown:
            raise ConfigError(f"{place}: no [[teacher]] is called {unknown}; there are {sorted(teachers)}.")
        if (
            isinstance(loss, AffinityLoss)
            and loss.teacher_weights is not None
            and len(loss.teacher_weights) != len(loss.teachers)
        ):
            raise ConfigError(
                f"{place}: {len(loss.teacher_weights)} 'teacher_weights' for {len(loss.teachers)} 'teachers'."
            )
