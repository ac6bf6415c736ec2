"""A recipe with everything it names opened: the student, its teachers, data and measurements.

Also what a dry run does: prepare a batch of every stage and send some of it through all models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgeclip.distill.batches import BatchLoader, BatchPlan
from edgeclip.distill.forward import Embedded, embed, embedded_of, token_shapes, words_of
from edgeclip.distill.inputs import Inputs, StoredViews
from edgeclip.distill.lineage import licence_of
from edgeclip.distill.losses import MAX_MATRIX_BYTES
from edgeclip.distill.objective import Objective
from edgeclip.distill.optim import parameter_groups
from edgeclip.distill.randomness import random_stream
from edgeclip.distill.ranks import ranks
from edgeclip.distill.recipe import AffinityLoss, Recipe, StageSpec, recipe_digest, teachers_of
from edgeclip.distill.samples import BrokenLimit, Samples, open_samples
from edgeclip.distill.sparsity import Sparsity
from edgeclip.distill.student import Student, open_student
from edgeclip.distill.teachers import Teacher, open_teacher
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
    """

    recipe: Recipe
    student: Student
    teachers: Mapping[str, Teacher]
    data: Mapping[str, Samples]
    validations: tuple[Validation, ...]

    def inputs(self, stage: StageSpec) -> Inputs:
        """Return what prepares a stage's samples, for the student and the teachers it needs."""
        needed = self.objective(stage).needed_teachers
        asked = [self.teachers[name].consumer for name in needed]
        consumers = [self.student.consumer, *(consumer for consumer in asked if consumer is not None)]
        return Inputs.of(
            self.recipe.data[stage.data], stage.texts, consumers, stored=self._stored(stage, needed)
        )

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
        plan = BatchPlan(len(self.data[stage.data]), stage.batch_size, seed, world, rank)
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
        found = embed(
            model, few["image"], few["tokens"], words.hidden, mean=config.mean, std=config.std, wants=wants
        )
        model.train(was_training)
        told = {name: self.teachers[name].ask(few, inputs) for name in objective.needed_teachers}
        embedded = embedded_of(found, words, wants)
        if len(few) > 1:
            objective(embedded, told, scale=model.logit_scale.exp(), progress=0.0)
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
    data = {
        name: open_samples([root / path for path in table.paths])
        for name, table in recipe.data.items()
        if name in used
    }
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
    # Those that are only compared with are no parents of the student.
    watched = {entry.teacher for entry in recipe.validation} - set(teachers)
    compared = dict(teachers) | {
        spec.name: open_teacher(spec, root) for spec in recipe.teacher if spec.name in watched
    }
    validations = tuple(
        open_validation(entry, recipe.data[entry.data], data[entry.data], root, compared)
        for entry in recipe.validation
    )
    return Run(recipe, student, teachers, data, validations)


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
