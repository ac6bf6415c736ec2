"""Train a student stage by stage, so that a run can be stopped anywhere and goes on as if it had not been.

What a step does is a function of the weights, the optimizer's state and the number of the step: the batch
(:mod:`edgeclip.distill.batches`), the learning rate and the seed of dropout follow from the number. So the
same recipe and data give the same weights, bit by bit on one CPU with the same number of threads, whether or
not the run was killed in between. One process or many under ``torchrun`` see the same joint batches; their
weights agree up to the order of sums, where batch norms are frozen or absent (each rank's batch norms see its
share of a batch only).

Not in here: reading the command line, handling signals, printing. The caller hands in a function that says
when to stop, and one that hears about progress.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from edgeclip.distill.accumulate import backward_in_parts
from edgeclip.distill.batches import Batch, BatchLoader, BatchPlan
from edgeclip.distill.inputs import Inputs
from edgeclip.distill.journal import Journal
from edgeclip.distill.losses import MAX_MATRIX_BYTES
from edgeclip.distill.objective import Embedded, Objective
from edgeclip.distill.optim import build_optimizer, learning_rate_factor, parameter_groups
from edgeclip.distill.randomness import random_stream
from edgeclip.distill.ranks import Ranks, ranks
from edgeclip.distill.recipe import AffinityLoss, Recipe, StageSpec, recipe_digest
from edgeclip.distill.samples import BrokenLimit, Samples, open_samples
from edgeclip.distill.state import (
    Position,
    TrainingState,
    latest_state,
    load_state,
    optimizer_moments,
    restore_moments,
    save_state,
)
from edgeclip.distill.teachers import Student, Teacher, embed, licence_of, open_student, open_teacher
from edgeclip.distill.validation import Validation, open_validation
from edgeclip.errors import ConfigError, EdgeClipError
from edgeclip.models.checkpoints import CheckpointInfo, save_checkpoint
from edgeclip.models.clip import CLIP, MAX_SCALE

__all__ = ["Progress", "Result", "Run", "StagePlan", "TrainOptions", "dry_run_of", "open_run", "train"]

MAX_SKIPPED_IN_A_ROW = 10
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE = 2  # pictures a dry run sends through the models


@dataclass(frozen=True)
class TrainOptions:
    """How a recipe is run; none of it changes the result, but for rounding on another device.

    Attributes:
        output: directory of the run.
        root: what the recipe's paths are relative to.
        workers: processes that prepare batches, for each rank.
        device: ``"cpu"`` or ``"cuda"``.
        restart: throw away what an earlier run left there.
        log_every: steps between two lines of the log.
        recipe_text: kept beside the run.
    """

    output: Path
    root: Path
    workers: int = 0
    device: str = "cpu"
    restart: bool = False
    log_every: int = 1
    recipe_text: str = ""


@dataclass(frozen=True)
class Progress:
    """What a step, a validation or a remark says to who listens.

    Attributes:
        kind: which of them.
        step: steps that are done.
        steps: of the whole run.
        entry: what the log says.
        text: of a remark.
    """

    kind: Literal["step", "validation", "remark"]
    step: int
    steps: int
    entry: Mapping[str, Any]
    text: str = ""


@dataclass(frozen=True)
class Result:
    """How a call of :func:`train` ended.

    Attributes:
        status: ``"finished"``; ``"present"``: an earlier call had finished it; ``"interrupted"``: it was
            asked to stop, and goes on with the next call.
        steps: that are done.
        of: steps of the whole run.
        skipped: steps without an update.
        broken: samples that could not be used.
        model: the checkpoint, when finished.
        licence: of that.
        validation: the last numbers of each measurement.
        rank: of this process.
    """

    status: Literal["finished", "present", "interrupted"]
    steps: int
    of: int
    skipped: int = 0
    broken: int = 0
    model: Path | None = None
    licence: str = ""
    validation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        said = asdict(self) | {"model": None if self.model is None else str(self.model)}
        del said["rank"]
        return said


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


_Listener: TypeAlias = Callable[[Progress], None]
_Stop: TypeAlias = Callable[[], bool]


# -- Opening ------------------------------------------------------------------------------------------------


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
        consumers = [self.student.consumer, *(self.teachers[name].consumer for name in needed)]
        return Inputs.of(self.recipe.data[stage.data], stage.texts, consumers)

    def objective(self, stage: StageSpec) -> Objective:
        """Return a stage's loss with fresh parameters, which depend on the recipe's seed alone.

        Raises:
            ConfigError: widths that disagree.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self.recipe.seed, self.recipe.stage.index(stage), 0))
            return Objective(
                stage,
                embed_dim=self.student.config.embed_dim,
                teachers={spec.name: spec for spec in self.recipe.teacher},
                teacher_dims={name: teacher.embed_dim for name, teacher in self.teachers.items()},
            )

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
        limit = _limit(self.recipe, stage)
        batches = BatchLoader(self.data[stage.data], plan, inputs, limit=limit).batches()
        batch = next(batches)
        model, config = self.student.model, self.student.config
        was_training = model.training
        model.eval()
        image, *texts = embed(
            model, batch["image"][:_PROBE], batch["tokens"][:_PROBE], mean=config.mean, std=config.std
        )
        model.train(was_training)
        told = {}
        for name in objective.needed_teachers:
            teacher = self.teachers[name]
            told[name] = teacher(
                batch[inputs.image_name(teacher.consumer)][:_PROBE],
                batch[inputs.tokens_name(teacher.consumer)][:_PROBE],
            )
        if len(image) > 1:
            objective(Embedded(image, tuple(texts)), told, scale=model.logit_scale.exp(), progress=0.0)
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
            min(rows * stage.batch_size * 4 * columns, MAX_MATRIX_BYTES),
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
    asked = {name for stage in recipe.stage for spec in stage.loss for name in _named(spec)}
    teachers = {spec.name: open_teacher(spec, root) for spec in recipe.teacher if spec.name in asked}
    validations = tuple(
        open_validation(entry, recipe.data[entry.data], data[entry.data], root) for entry in recipe.validation
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


def _named(spec: Any) -> tuple[str, ...]:
    """Return the teachers a loss term names."""
    if hasattr(spec, "teachers"):
        return tuple(spec.teachers)
    return (spec.teacher,) if hasattr(spec, "teacher") else ()


def _limit(recipe: Recipe, stage: StageSpec) -> BrokenLimit:
    return BrokenLimit(share=1.0, count=recipe.data[stage.data].max_broken)


def _seed(seed: int, stage: int, step: int, rank: int = 0) -> int:
    """Return a seed of torch's generators, from a stream of its own."""
    stream = random_stream(seed + (stage << 32), step, rank, "model")
    return int(stream.bit_generator.random_raw()) >> 1


# -- Training -----------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    options: TrainOptions,
    *,
    listen: _Listener = lambda progress: None,
    stop: _Stop = lambda: False,
) -> Result:
    """Run a recipe to its end, from where an earlier call left it.

    Args:
        recipe: what to do.
        options: where and how.
        listen: hears about every step; called on the first rank only.
        stop: asked after every step; true means to save and return.

    Raises:
        EdgeClipError: the recipe, its data or the directory cannot be used, or training went wrong for good.
    """
    with ranks(options.device) as here, _deterministic(here):
        run = open_run(recipe, options.root)
        for stage in recipe.stage:  # before anything is written
            run.plan(stage, world=here.world)
            run.objective(stage)
            parameter_groups(run.student.model, stage)
        journal: Journal | None = None
        if here.is_first:
            journal = Journal(
                options.output,
                recipe_digest=recipe_digest(recipe),
                data={name: samples.digest for name, samples in run.data.items()},
                recipe=options.recipe_text,
                restart=options.restart,
            )
        try:
            here.barrier()  # the first rank may have thrown old states away
            return _Trainer(run, options, here, journal, listen, stop).run()
        finally:
            if journal is not None:
                journal.close()


@contextmanager
def _deterministic(here: Ranks) -> Iterator[None]:
    """Choose kernels that give the same bits every time; on a GPU some have none, and are left."""
    if here.device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # only costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


class _Trainer:
    """One call of :func:`train`."""

    def __init__(
        self,
        run: Run,
        options: TrainOptions,
        here: Ranks,
        journal: Journal | None,
        listen: _Listener,
        stop: _Stop,
    ) -> None:
        self._run, self._options, self._here = run, options, here
        self._journal, self._listen, self._stop = journal, listen, stop
        self._recipe = run.recipe
        self._digest = recipe_digest(run.recipe)
        self._steps = sum(stage.steps for stage in run.recipe.stage)
        self._info, self._licence_remark = run.info()
        self._model = run.student.model
        self._average: dict[str, Tensor] = {}
        self._measured: dict[str, dict[str, float]] = {}
        self._position = Position()
        self._in_a_row = 0

    def run(self) -> Result:
        states = self._options.output / "states"
        found = latest_state(states)
        state: TrainingState | None = None
        if found is not None:
            state = load_state(found, self._model, recipe_digest=self._digest)
            self._position = state.position
        if state is not None and state.position.stage == len(self._recipe.stage):
            self._average = dict(state.ema)
            status: Literal["present", "finished"] = "present"
            if self._journal is not None and not self._journal.model.is_dir():
                self._write_model()
                status = "finished"
            return self._result(status)
        if self._journal is not None:
            self._journal.rewind(self._position.total_steps)
        if self._licence_remark:
            self._remark(self._licence_remark)
        if state is not None:
            self._remark(f"going on at step {self._position.total_steps} of {self._steps}")
        self._model.to(self._here.device)
        for teacher in self._run.teachers.values():
            teacher.to(self._here.device)
        self._average = {
            name: value.to(self._here.device) for name, value in (state.ema if state else {}).items()
        }
        for index in range(self._position.stage, len(self._recipe.stage)):
            if self._train_stage(index, state):
                return self._result("interrupted")
            state = None
        if self._journal is not None:
            self._write_model()
        self._here.barrier()
        return self._result("finished")

    def _train_stage(self, index: int, state: TrainingState | None) -> bool:
        """Do what is left of a stage; return whether it was interrupted."""
        stage = _Stage(self._run, index, self._here)
        if state is not None and state.position.step:
            stage.restore(state)
        spec = stage.spec
        if spec.ema is None:
            self._average = {}
        elif not self._average:
            self._average = _floating(self._model)
        loader = BatchLoader(
            self._run.data[spec.data],
            stage.plan,
            stage.inputs,
            workers=self._options.workers,
            limit=_limit(self._recipe, spec),
            pin_memory=self._here.device.type == "cuda",
        )
        broken = self._position.broken
        batches = loader.batches(stage.plan.at_step(self._position.step))
        try:
            while self._position.step < spec.steps:
                began = time.perf_counter_ns()
                try:
                    batch = next(batches).to(self._here.device, non_blocking=True)
                except EdgeClipError:
                    # A signal to the whole process group also ends the workers.
                    if not self._stop():
                        raise
                    self._save(stage)
                    return True
                done = stage.step(batch, self._position.step, stop=self._stop())
                self._count(stage, done, broken + len(loader.broken), batch)
                self._log(stage, done, (time.perf_counter_ns() - began) / 1e9)
                is_end = self._position.step == spec.steps
                self._validate(is_last=is_end and index == len(self._recipe.stage) - 1)
                if is_end:
                    break
                if done.stop:
                    self._save(stage)
                    return True
                if self._position.total_steps % self._recipe.checkpoint_every == 0:
                    self._save(stage)
        finally:
            batches.close()  # type: ignore[attr-defined]
        self._position = replace(self._position, stage=index + 1, step=0)
        self._save(None)
        return done.stop and index + 1 < len(self._recipe.stage)

    def _count(self, stage: _Stage, done: _Done, broken: int, batch: Batch) -> None:
        """Move the position on, and the running average; stop where nothing is learned any more."""
        at = self._position
        self._position = replace(
            at,
            step=at.step + 1,
            total_steps=at.total_steps + 1,
            broken=broken,
            skipped=at.skipped + (not done.updated),
        )
        if done.updated:
            self._in_a_row = 0
            decay = stage.spec.ema
            if decay is not None:
                decay = min(decay, (1 + at.total_steps) / (10 + at.total_steps))
                with torch.no_grad():
                    for name, value in _floating(self._model, copied=False).items():
                        self._average[name].lerp_(value, 1 - decay)
            return
        self._in_a_row += 1
        if self._journal is not None:
            samples = self._run.data[stage.spec.data]
            _, joint = next(self._run.plan(stage.spec).requests(batch.position))
            self._journal.skipped(
                {
                    "step": self._position.total_steps,
                    "stage": stage.spec.name,
                    "loss": _plain(done.loss),
                    "grad_norm": _plain(done.grad_norm),
                    "keys": [samples.key(int(row)) for row in joint],
                }
            )
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ConfigError(
                f"stage {stage.spec.name!r}: the loss or a gradient was not finite in "
                f"{self._in_a_row} steps in a row, the last is step {self._position.total_steps} (loss "
                f"{done.loss}, gradient norm {done.grad_norm}); lower the learning rate, or look at the "
                "samples in skipped.jsonl."
            )

    def _log(self, stage: _Stage, done: _Done, seconds: float) -> None:
        step = self._position.total_steps
        entry = {
            "kind": "step",
            "step": step,
            "stage": stage.spec.name,
            "samples": self._position.step * stage.spec.batch_size,
            "loss": _plain(done.loss),
            "parts": {name: _plain(value) for name, value in done.parts.items()},
            "lr": done.learning_rate,
            "grad_norm": _plain(done.grad_norm),
            "scale": done.scale,
            "updated": done.updated,
            "samples_per_s": round(stage.spec.batch_size / seconds, 2),
        }
        if self._journal is not None:
            if step % self._options.log_every == 0 or step == self._steps:
                self._journal.log(entry)
            self._listen(Progress("step", step, self._steps, entry))

    def _validate(self, *, is_last: bool) -> None:
        """Measure on the first rank what is due; the others wait for it with their next step."""
        step = self._position.total_steps
        due = [each for each in self._run.validations if is_last or step % each.spec.every == 0]
        if self._journal is None or not due:
            return
        model = self._evaluated()
        for each in due:
            values = each.measure(
                model, self._run.student.config, self._run.student.tokenizer, device=self._here.device
            )
            self._measured[each.spec.name] = values
            entry = {"kind": "validation", "step": step, "name": each.spec.name, "values": values}
            self._journal.log(entry)
            self._listen(Progress("validation", step, self._steps, entry))

    def _evaluated(self) -> CLIP:
        """Return a copy of the model with the weights that count."""
        model = copy.deepcopy(self._model).requires_grad_(False).eval()
        if self._average:
            model.load_state_dict({**model.state_dict(), **self._average})
        return model

    def _save(self, stage: _Stage | None) -> None:
        """Write the state, on the first rank."""
        if self._journal is None:
            return
        save_state(
            self._journal.states,
            self._model,
            self._info,
            TrainingState(
                self._position,
                self._digest,
                moments={} if stage is None else stage.moments(),
                objective={} if stage is None else dict(stage.objective.state_dict()),
                ema=self._average,
                scaler={} if stage is None else stage.scaler.state_dict(),
            ),
            tokenizer_files=self._run.student.tokenizer.files,
        )

    def _write_model(self) -> None:
        """Write the checkpoint that comes out, completely or not at all."""
        assert self._journal is not None
        staged = self._journal.staged_model
        shutil.rmtree(staged, ignore_errors=True)
        save_checkpoint(
            self._evaluated().cpu(), staged, self._info, tokenizer_files=self._run.student.tokenizer.files
        )
        staged.rename(self._journal.model)

    def _remark(self, text: str) -> None:
        if self._journal is not None:
            self._listen(Progress("remark", self._position.total_steps, self._steps, {}, text))

    def _result(self, status: Literal["finished", "present", "interrupted"]) -> Result:
        is_done = status != "interrupted"
        return Result(
            status,
            self._position.total_steps,
            self._steps,
            self._position.skipped,
            self._position.broken,
            self._options.output / "model" if is_done else None,
            self._info.licence,
            self._measured,
            self._here.rank,
        )


@dataclass(frozen=True)
class _Done:
    """What a step did; the same on every rank."""

    loss: float
    parts: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    scale: float
    updated: bool
    stop: bool


class _Stage:
    """The moving parts of one stage: loss, optimizer, scaling."""

    def __init__(self, run: Run, index: int, here: Ranks) -> None:
        self.spec = run.recipe.stage[index]
        self._run, self._index, self._here = run, index, here
        self._model, self._config = run.student.model, run.student.config
        self.plan = run.plan(self.spec, world=here.world, rank=here.rank)
        self.inputs = run.inputs(self.spec)
        self.objective = run.objective(self.spec).to(here.device)
        self._teachers = {name: run.teachers[name] for name in self.objective.needed_teachers}
        self._optimizer = build_optimizer(self._model, self.spec)
        said = self.spec.optimizer
        for decays in (True, False):  # adapters are matrices with a bias, SigLIP's bias is a number
            own = [p for p in self.objective.parameters() if (p.ndim >= 2) is decays]
            if own:
                self._optimizer.add_param_group(
                    {
                        "params": own,
                        "lr": said.learning_rate,
                        "base_lr": said.learning_rate,
                        "weight_decay": said.weight_decay if decays else 0.0,
                    }
                )
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._names = {id(p): name for name, p in self._model.named_parameters()} | {
            id(p): f"objective.{name}" for name, p in self.objective.named_parameters()
        }
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.spec.precision == "float16")

    def restore(self, state: TrainingState) -> None:
        """Go on from a state in the middle of this stage."""
        self.objective.load_state_dict(dict(state.objective))
        restore_moments(self._optimizer, self._names, state.moments)
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name."""
        return optimizer_moments(self._optimizer, self._names)

    def step(self, batch: Batch, number: int, *, stop: bool) -> _Done:
        """Do step ``number`` of the stage; without an update where loss or gradient is not finite."""
        torch.manual_seed(_seed(self._run.recipe.seed, self._index, 1 + number, self._here.rank))
        rate = self._set_learning_rate(number)
        self._set_modes()
        before = [buffer.clone() for buffer in self._model.buffers()]
        self._optimizer.zero_grad(set_to_none=True)
        loss, parts = self._backward(batch, progress=number / max(1, self.spec.steps - 1))
        values = torch.stack([loss, *parts.values(), loss.new_tensor(float(stop))]).float()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        statistics = [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        self._here.average_([values, *gradients, *statistics])
        if self.scaler.is_enabled():
            self.scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self.spec.clip_norm or math.inf))
        said = values.tolist()
        updated = math.isfinite(said[0]) and math.isfinite(norm)
        with torch.no_grad():
            if updated:
                self._optimizer.step()
                self._model.logit_scale.clamp_(max=math.log(MAX_SCALE))
            else:
                # What was not finite may have reached the statistics of batch norms.
                for buffer, value in zip(self._model.buffers(), before, strict=True):
                    buffer.copy_(value)
        if self.scaler.is_enabled():
            self.scaler.update()
        return _Done(
            loss=said[0],
            parts=dict(zip(parts, said[1:-1], strict=True)),
            grad_norm=norm,
            learning_rate=rate,
            scale=float(self._model.logit_scale.detach().exp()),
            updated=updated,
            stop=said[-1] > 0,
        )

    def _set_learning_rate(self, number: int) -> float:
        factor = learning_rate_factor(self.spec.schedule, number, self.spec.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.spec.optimizer.learning_rate * factor

    def _set_modes(self) -> None:
        self._model.train()
        if self.spec.freeze_batch_norm:
            for module in self._model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.spec.precision == "float32":
            return nullcontext()
        return torch.autocast(self._here.device.type, _DTYPES[self.spec.precision])

    def _backward(self, batch: Batch, *, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of this rank's rows; return the loss and its terms, detached."""
        told = self._ask(batch)
        said: list[tuple[Tensor, dict[str, Tensor]]] = []

        def embedded(part: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            with self._precision():
                return embed(self._model, *part, mean=self._config.mean, std=self._config.std)

        def loss(image: Tensor, *texts: Tensor) -> Tensor:
            total, parts = self.objective(
                Embedded(image, texts),
                told,
                scale=self._model.logit_scale.exp(),
                progress=progress,
                ids=batch.index,
            )
            said.append((total.detach(), parts))
            scaled: Tensor = self.scaler.scale(total)
            return scaled

        parts = self._cut(batch["image"], batch["tokens"])
        if len(parts) == 1:
            loss(*embedded(parts[0])).backward()  # type: ignore[no-untyped-call]
        else:
            backward_in_parts(embedded, parts, loss)
        return said[0]

    def _ask(self, batch: Batch) -> dict[str, Embedded]:
        """Return what the teachers say, part by part as the student's."""
        told = {}
        for name, teacher in self._teachers.items():
            image = batch[self.inputs.image_name(teacher.consumer)]
            tokens = batch[self.inputs.tokens_name(teacher.consumer)]
            with self._precision():
                rows = [teacher(*part) for part in self._cut(image, tokens)]
            told[name] = Embedded(
                torch.cat([row.image for row in rows]),
                tuple(torch.cat(column) for column in zip(*(row.texts for row in rows), strict=True)),
            )
        return told

    def _cut(self, image: Tensor, tokens: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return list(zip(image.chunk(self.spec.parts), tokens.chunk(self.spec.parts), strict=True))


def _floating(model: nn.Module, *, copied: bool = True) -> dict[str, Tensor]:
    """Return the weights and statistics of a model by name."""
    return {
        name: value.detach().clone() if copied else value.detach()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }


def _plain(value: float) -> float | str:
    """Return a number as JSON can hold it: what is not finite by name."""
    return value if math.isfinite(value) else str(value)
