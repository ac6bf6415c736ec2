"""A recipe with everything it names opened: the student, its teachers, data and measurements.

Also what a dry run does: prepare a batch of every stage and send some of it through all models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeclip.distill.batches import Batch, BatchLoader, BatchPlan
from edgeclip.distill.forward import Embedded, embed, embed_texts, embedded_of, token_shapes, words_of
from edgeclip.distill.inputs import Inputs, StoredViews
from edgeclip.distill.lineage import licence_of
from edgeclip.distill.losses import MAX_MATRIX_BYTES
from edgeclip.distill.objective import Objective
from edgeclip.distill.optim import parameter_groups
from edgeclip.distill.prompts import Prompts, open_prompts
from edgeclip.distill.randomness import random_stream
from edgeclip.distill.ranks import ranks
from edgeclip.distill.recipe import (
    AffinityLoss,
    FeatureLoss,
    MaskedTokensLoss,
    PictureMatchLoss,
    Recipe,
    StageSpec,
    TokenAlignmentLoss,
    recipe_digest,
    teachers_of,
)
from edgeclip.distill.samples import BrokenLimit, Samples, open_samples
from edgeclip.distill.sparsity import Sparsity
from edgeclip.distill.student import Student, open_student
from edgeclip.distill.teachers import Teacher, open_teacher
from edgeclip.distill.texts import TextSamples, open_pictures, open_texts
from edgeclip.distill.token_losses import MATRICES
from edgeclip.distill.validation import Validation, open_validation
from edgeclip.errors import ConfigError
from edgeclip.models.checkpoints import CheckpointInfo

__all__ = ["Run", "StagePlan", "broken_limit", "dry_run_of", "open_run", "torch_seed"]

_PROBE = 2  # pictures a dry run sends through the models


@dataclass(frozen=True)
class StagePlan:
    """What a stage will do, for a dry run.

    Attributes:
        name: of the stage.
        steps: of the stage.
        batch_size: of all processes.
        samples: of its data.
        trained: parameters that move.
        frozen: parameters that do not.
        matrix_bytes: largest matrices of similarities held at once by a process, an estimate.
        teachers: that run beside it.
    """

    name: str
    steps: int
    batch_size: int
    samples: int
    trained: int
    frozen: int
    matrix_bytes: int
    teachers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"teachers": list(self.teachers)}


@dataclass(frozen=True)
class Run:
    """A recipe with everything it names opened.

    Attributes:
        recipe: the recipe.
        student: before its first step.
        teachers: by name.
        data: pairs by name of their table.
        validations: in order.
        prompts: what is put around captions, by name of the table, where something is.
        pictures: ``(N, E)`` unit embeddings of pictures for texts without pictures, likewise.
    """

    recipe: Recipe
    student: Student
    teachers: Mapping[str, Teacher]
    data: Mapping[str, Samples]
    validations: tuple[Validation, ...]
    prompts: Mapping[str, Prompts] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each table of data, with the pictures and templates beside it, by name."""
        return {name: self._digest(name, samples.digest) for name, samples in self.data.items()}

    def _digest(self, name: str, table: str) -> str:
        pictures, prompts = self.pictures.get(name), self.prompts.get(name)
        if pictures is None and prompts is None:
            return table
        kinds = {} if prompts is None else prompts.kinds
        templates = sorted((kind, each.templates) for kind, each in kinds.items())
        whole = hashlib.sha256(f"{table} {templates}".encode())
        if pictures is not None:
            whole.update(np.ascontiguousarray(pictures.numpy()).data)
        return whole.hexdigest()

    def inputs(self, stage: StageSpec) -> Inputs:
        """Return what prepares a stage's samples, for the student and the teachers it needs."""
        needed = self.objective(stage).needed_teachers
        asked = [self.teachers[name].consumer for name in needed]
        consumers = [self.student.consumer, *(consumer for consumer in asked if consumer is not None)]
        return Inputs.of(
            self.recipe.data[stage.data],
            stage.texts,
            consumers,
            stored=self._stored(stage, needed),
            prompts=self.prompts.get(stage.data),
        )

    def own_pictures(self, batch: Batch, pictures: Tensor | None) -> Tensor | None:
        """Return the row of a picture ``(b, E)`` for each text of a batch; ``None`` where they have none."""
        if pictures is None or "picture" not in batch.arrays:
            return None
        return pictures[batch["picture"]]

    def _stored(self, stage: StageSpec, needed: Sequence[str]) -> StoredViews | None:
        """Return what the stage's samples hold of their views; ``None``: they are drawn."""
        found = {views for name in needed if (views := self.teachers[name].views) is not None}
        if len(found) > 1:
            raise ConfigError(
                f"stage {stage.name!r}: its stored teachers lie in different shards; take one table of data."
            )
        return found.pop() if found else None

    def objective(self, stage: StageSpec) -> Objective:
        """Return a stage's loss with fresh parameters, which depend on the recipe's seed alone.

        Raises:
            ConfigError: widths that disagree.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.recipe.seed, self.recipe.stage.index(stage), 0))
            return Objective(
                stage,
                embed_dim=self.student.config.embed_dim,
                teacher_scales={name: teacher.scale for name, teacher in self.teachers.items()},
                teacher_dims={
                    name: (teacher.image_dim, teacher.text_dim) for name, teacher in self.teachers.items()
                },
                tokens=token_shapes(self.student.model),
            )

    def sparsity(self, stage: StageSpec) -> Sparsity | None:
        """Return a stage's masks at their beginning; ``None`` where it prunes nothing.

        Raises:
            ConfigError: the student has no gates of the kinds asked for, or a loss compares tokens, whose
                width gates would change.
        """
        if stage.prune is None:
            return None
        where = f"stage {stage.name!r}"
        wants = self.objective(stage).wants
        if wants.tokens or wants.hidden is not None:
            raise ConfigError(
                f"{where}: 'prune' stands beside a loss over patches or words, whose width gates change; "
                "prune in a stage of its own."
            )
        return Sparsity(self.student.config, stage.prune, where=where)

    def plan(self, stage: StageSpec, *, world: int = 1, rank: int = 0) -> BatchPlan:
        """Return which samples are in which batch of a stage; every stage has its own order.

        Raises:
            ConfigError: a batch is larger than the data, or cannot be shared.
        """
        index = self.recipe.stage.index(stage)
        seed = self.recipe.seed + (index << 32)
        samples = self.data[stage.data]
        weights = samples.weights if isinstance(samples, TextSamples) else None
        plan = BatchPlan(len(samples), stage.batch_size, seed, world, rank, weights)
        if (stage.batch_size // world) % stage.parts:
            raise ConfigError(
                f"stage {stage.name!r}: each of {world} processes takes {stage.batch_size // world} samples "
                f"a step, which cannot be cut into 'parts' {stage.parts}; choose a divisor."
            )
        return plan

    def check(self, *, world: int = 1) -> list[StagePlan]:
        """Prepare a batch of every stage, send some of it through all models, and return the plans.

        Raises:
            EdgeClipError: something does not fit.
        """
        return [self._check_stage(stage, world) for stage in self.recipe.stage]

    @torch.no_grad()
    def _check_stage(self, stage: StageSpec, world: int) -> StagePlan:
        plan, inputs, objective = self.plan(stage, world=world), self.inputs(stage), self.objective(stage)
        self.sparsity(stage)
        limit = broken_limit(self.recipe, stage)
        batches = BatchLoader(self.data[stage.data], plan, inputs, limit=limit).batches()
        batch = next(batches)
        model, config = self.student.model, self.student.config
        was_training = model.training
        model.eval()
        few, wants = batch.head(_PROBE), objective.wants
        words = words_of(few, wants, self.student.tokenizer.config.special, seed=plan.seed)
        pictures = self.pictures.get(stage.data)
        if inputs.of_texts:
            embedded = Embedded(self.own_pictures(few, pictures), embed_texts(model, few["tokens"]))
        else:
            images, ids = few["image"], few["tokens"]
            found = embed(model, images, ids, words.hidden, mean=config.mean, std=config.std, wants=wants)
            embedded = embedded_of(found, words, wants)
        model.train(was_training)
        told = {name: self.teachers[name].ask(few, inputs) for name in objective.needed_teachers}
        if len(few) > 1:
            rng = random_stream(plan.seed, 0, 0, "pictures")
            scale = model.logit_scale.exp()
            objective(embedded, told, scale=scale, progress=0.0, pictures=pictures, rng=rng)
        trained = {name for group in parameter_groups(model, stage) for name in group.names}
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
        moving = sum(counts[name] for name in trained)
        rows = stage.batch_size // world
        columns = 1 + max(
            (len(spec.teachers) for spec in stage.loss if isinstance(spec, AffinityLoss)), default=0
        )
        return StagePlan(
            stage.name,
            stage.steps,
            stage.batch_size,
            len(self.data[stage.data]),
            moving,
            sum(counts.values()) - moving,
            min(rows * stage.batch_size * 4 * max(columns, _token_columns(embedded)), MAX_MATRIX_BYTES),
            objective.needed_teachers,
        )

    def info(self) -> tuple[CheckpointInfo, str]:
        """Return what the student's checkpoint says, and a remark on its licence."""
        parents = [*self.student.parents, *(teacher.parent for teacher in self.teachers.values())]
        licence, remark = licence_of(self.recipe.licence, parents)
        recipe = {"role": "recipe", "name": self.recipe.name, "sha256": recipe_digest(self.recipe)}
        config = replace(self.student.config, name=self.recipe.name)
        info = CheckpointInfo(
            config=config,
            scale=1.0,
            tokenizer_digest=self.student.tokenizer.digest,
            tokenizer_files={},
            licence=licence,
            parents=(*parents, recipe),
        )
        return info, remark


def open_run(recipe: Recipe, root: Path) -> Run:
    """Open what a recipe names: data, models, labels.

    Args:
        recipe: the recipe.
        root: what its paths are relative to.

    Raises:
        EdgeClipError: something is missing or does not fit.
    """
    student = open_student(recipe, root)
    used = {stage.data for stage in recipe.stage} | {entry.data for entry in recipe.validation}
    data: dict[str, Samples] = {
        name: open_texts([root / path for path in table.texts])
        if table.texts
        else open_samples([root / path for path in table.paths or ()])
        for name, table in recipe.data.items()
        if name in used
    }
    prompts = {
        name: opened
        for name, table in recipe.data.items()
        if name in used and (opened := open_prompts(table.prompts, root, where=f"[data.{name}]")) is not None
    }
    pictures = _open_pictures(recipe, data, root, embed_dim=student.config.embed_dim)
    asked: dict[str, list[StageSpec]] = {}
    for stage in recipe.stage:
        for name in dict.fromkeys(name for spec in stage.loss for name in teachers_of(spec)):
            asked.setdefault(name, []).append(stage)
    teachers = {
        spec.name: open_teacher(spec, root, {stage.data: data[stage.data] for stage in asked[spec.name]})
        for spec in recipe.teacher
        if spec.name in asked
    }
    for name, stages in asked.items():
        for stage in stages:
            teachers[name].check(stage, recipe.data[stage.data], data[stage.data])
    for stage in recipe.stage:
        if recipe.data[stage.data].texts:
            _check_texts(stage, student, teachers, data[stage.data], pictures.get(stage.data))
    # Those that are only compared with are no parents of the student.
    watched = {entry.teacher for entry in recipe.validation} - set(teachers)
    compared = dict(teachers) | {
        spec.name: open_teacher(spec, root) for spec in recipe.teacher if spec.name in watched
    }
    validations = tuple(
        open_validation(entry, recipe.data[entry.data], data[entry.data], root, compared)
        for entry in recipe.validation
    )
    return Run(recipe, student, teachers, data, validations, prompts, pictures)


def _open_pictures(
    recipe: Recipe, data: Mapping[str, Samples], root: Path, *, embed_dim: int
) -> dict[str, Tensor]:
    """Return the embeddings of pictures of every table of texts that has some."""
    found: dict[str, Tensor] = {}
    for name, samples in data.items():
        if not isinstance(samples, TextSamples):
            continue
        said, where = recipe.data[name].pictures, f"[data.{name}]"
        if said is not None:
            found[name] = open_pictures(
                root / said, embed_dim=embed_dim, needed=samples.most_pictures, where=where
            )
        elif samples.most_pictures:
            raise ConfigError(
                f"{where}: its texts name pictures up to number {samples.most_pictures - 1}; expected "
                "'pictures', the .npy file of these."
            )
    return found


def _check_texts(
    stage: StageSpec,
    student: Student,
    teachers: Mapping[str, Teacher],
    samples: Samples,
    pictures: Tensor | None,
) -> None:
    """Raise where a stage on texts without pictures asks for pictures.

    Raises:
        ConfigError: the image tower is trained, or a loss or teacher needs pictures there are none of.
    """
    where = f"stage {stage.name!r}: [data.{stage.data}] has texts without pictures"
    moving = [
        name
        for group in parameter_groups(student.model, stage)
        for name in group.names
        if name.startswith("image_tower.")
    ]
    if moving:
        raise ConfigError(
            f"{where}, which cannot train {moving[0]!r}; freeze the image tower: [[stage.group]] with "
            "match = 'image_tower.*' and learning_rate = 0."
        )
    paired = isinstance(samples, TextSamples) and samples.most_pictures > 0
    for index, spec in enumerate(stage.loss):
        kind = type(spec).__struct_config__.tag
        if isinstance(spec, PictureMatchLoss):
            if pictures is None:
                raise ConfigError(f"{where}: the loss {index} ({kind}) needs 'pictures', an .npy file.")
        elif isinstance(spec, FeatureLoss):
            if spec.tower != "text":
                raise ConfigError(
                    f"{where}: the loss {index} ({kind}) is of the tower {spec.tower!r}, expected 'text'."
                )
        elif isinstance(spec, TokenAlignmentLoss | MaskedTokensLoss):
            raise ConfigError(f"{where}: the loss {index} ({kind}) needs the pictures themselves.")
        elif not paired:
            raise ConfigError(
                f"{where}: the loss {index} ({kind}) compares texts with pictures; expected 'pictures' in "
                "every line of the table."
            )
    for name in dict.fromkeys(name for spec in stage.loss for name in teachers_of(spec)):
        asked = teachers[name].consumer
        if asked is not None and asked.form is not None:
            raise ConfigError(f"{where}, but the teacher {name!r} looks at pictures; take one of texts.")


def dry_run_of(recipe: Recipe, root: Path, *, device: str = "cpu") -> tuple[list[StagePlan], str]:
    """Check that a recipe can be run, and return what each stage will do and a remark on the licence.

    Args:
        recipe: the recipe.
        root: what its paths are relative to.
        device: where it shall run.

    Raises:
        EdgeClipError: something is missing or does not fit.
    """
    with ranks(device) as here:
        run = open_run(recipe, root)
        return run.check(world=here.world), run.info()[1]


def _token_columns(embedded: Embedded) -> int:
    """Return the numbers a pair costs where patches are matched with words."""
    if embedded.tokens is None or embedded.tokens.patches is None:
        return 0
    return MATRICES * embedded.tokens.patches.shape[1] * embedded.tokens.words.ids.shape[2]


def broken_limit(recipe: Recipe, stage: StageSpec) -> BrokenLimit:
    """Return how many samples of a stage may be broken."""
    return BrokenLimit(share=1.0, count=recipe.data[stage.data].max_broken)


def torch_seed(seed: int, stage: int, step: int, rank: int = 0) -> int:
    """Return a seed of torch's generators, from a stream of its own."""
    stream = random_stream(seed + (stage << 32), step, rank, "model")
    return int(stream.bit_generator.random_raw()) >> 1
