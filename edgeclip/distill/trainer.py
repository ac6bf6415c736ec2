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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from edgeclip.distill.batches import Batch, BatchLoader
from edgeclip.distill.journal import Journal
from edgeclip.distill.optim import parameter_groups
from edgeclip.distill.ranks import Ranks, ranks
from edgeclip.distill.recipe import Recipe, recipe_digest
from edgeclip.distill.run import Run, broken_limit, open_run
from edgeclip.distill.sparsity import Sparsity
from edgeclip.distill.stage import Done, Stage
from edgeclip.distill.state import Position, TrainingState, latest_state, load_state, save_state
from edgeclip.errors import ConfigError
from edgeclip.models.checkpoints import read_checkpoint_info, save_checkpoint
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import CLIPConfig

__all__ = ["Progress", "Result", "TrainOptions", "train"]

MAX_SKIPPED_IN_A_ROW = 10


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


_Listener: TypeAlias = Callable[[Progress], None]
_Stop: TypeAlias = Callable[[], bool]


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
            run.sparsity(stage)
            parameter_groups(run.student.model, stage)
        tables = run.digests
        here.check_same("recipe and data", f"{recipe_digest(recipe)} {sorted(tables.items())}".encode())
        journal: Journal | None = None
        if here.is_first:
            journal = Journal(
                options.output,
                recipe_digest=recipe_digest(recipe),
                data=tables,
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
            if any(stage.prune is not None for stage in self._recipe.stage):
                self._take_shape(found)
            state = load_state(found, self._model, recipe_digest=self._digest)
            self._position = state.position
        self._here.check_same("where training stands", f"{self._position}".encode())
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
        stage = Stage(self._run, index, self._here)
        if state is not None and state.position.step:
            stage.restore(state)
        spec = stage.spec
        if spec.ema is None:
            self._average = {}
        elif not self._average:
            self._average = _floating(self._model)
        if spec.scale is not None and not self._position.step:
            for weights in (dict(self._model.named_parameters()), self._average):
                if weights:
                    weights["logit_scale"].detach().fill_(math.log(spec.scale))
        loader = BatchLoader(
            self._run.data[spec.data],
            stage.plan,
            stage.inputs,
            workers=self._options.workers,
            limit=broken_limit(self._recipe, spec),
            pin_memory=self._here.device.type == "cuda",
        )
        broken = self._position.broken
        batches = loader.batches(stage.plan.at_step(self._position.step))
        try:
            while self._position.step < spec.steps:
                began = time.perf_counter_ns()
                batch = next(batches).to(self._here.device, non_blocking=True)
                done = stage.step(batch, self._position.step, stop=self._stop())
                self._count(stage, done, broken + len(loader.broken), batch)
                self._log(stage, done, (time.perf_counter_ns() - began) / 1e9)
                is_end = self._position.step == spec.steps
                self._validate(stage, is_last=is_end and index == len(self._recipe.stage) - 1)
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
        if stage.sparsity is not None:
            self._prune(stage, stage.sparsity)
        self._save(None)
        return done.stop and index + 1 < len(self._recipe.stage)

    def _take_shape(self, state: Path) -> None:
        """Go on with a model of the shape that a state has: a stage before it may have pruned it."""
        config = read_checkpoint_info(state).config
        if config != self._info.config:
            self._take(build_clip(config), config)

    def _take(self, model: CLIP, config: CLIPConfig) -> None:
        """Go on with another model."""
        self._run = replace(self._run, student=replace(self._run.student, model=model, config=config))
        self._model, (self._info, _) = model, self._run.info()

    def _prune(self, stage: Stage, sparsity: Sparsity) -> None:
        """Take out of the model, and of its running average, what a stage's masks close."""
        before, config = self._model, self._run.student.config
        if self._average:
            self._average = _floating(sparsity.pruned(self._averaged(), config)[0])
        self._take(*sparsity.pruned(before, config))
        towers = {name: asdict(each) for name, each in sparsity.report(before, self._model).items()}
        if self._journal is not None:
            step = self._position.total_steps
            self._journal.log({"kind": "prune", "step": step, "stage": stage.spec.name, "towers": towers})
        for name, each in towers.items():
            self._remark(
                f"stage {stage.spec.name!r} left {each['share']:.3f} of the {name} tower's layers (asked: "
                f"{each['asked']:g}), {each['parameters'][1]:,} of its {each['parameters'][0]:,} parameters"
            )

    def _count(self, stage: Stage, done: Done, broken: int, batch: Batch) -> None:
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

    def _log(self, stage: Stage, done: Done, seconds: float) -> None:
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

    def _validate(self, stage: Stage, *, is_last: bool) -> None:
        """Measure on the first rank what is due; the others wait for it with their next step."""
        step = self._position.total_steps
        due = [each for each in self._run.validations if is_last or step % each.spec.every == 0]
        if self._journal is None or not due:
            return
        model = self._averaged()
        if stage.sparsity is not None:
            model, _ = stage.sparsity.pruned(model, self._run.student.config)
        for each in due:
            values = each.measure(
                model, self._run.student.config, self._run.student.tokenizer, device=self._here.device
            )
            self._measured[each.spec.name] = values
            entry = {"kind": "validation", "step": step, "name": each.spec.name, "values": values}
            self._journal.log(entry)
            self._listen(Progress("validation", step, self._steps, entry))

    def _averaged(self) -> CLIP:
        """Return a copy of the model with the weights that count."""
        model = copy.deepcopy(self._model).requires_grad_(False).eval()
        if self._average:
            model.load_state_dict({**model.state_dict(), **self._average})
        return model

    def _save(self, stage: Stage | None) -> None:
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
                objective={} if stage is None else stage.own_state(),
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
        student, model = self._run.student, self._averaged().cpu()
        info = replace(self._info, dtype=self._recipe.dtype, external_weights=student.left_outside(model))
        save_checkpoint(model, staged, info, tokenizer_files=student.tokenizer.files)
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
