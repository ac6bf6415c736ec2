"""One stage of a run: its loss, optimizer and scaling, and what a step does with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeclip.distill.accumulate import backward_in_parts
from edgeclip.distill.batches import Batch
from edgeclip.distill.forward import Embedded, Words, embed, embed_texts, embedded_of, words_of
from edgeclip.distill.optim import build_optimizer, learning_rate_factor
from edgeclip.distill.randomness import random_stream
from edgeclip.distill.ranks import Ranks
from edgeclip.distill.recompute import held_statistics, recomputed_blocks
from edgeclip.distill.run import Run, torch_seed
from edgeclip.distill.sparsity import Noise, Sparsity
from edgeclip.distill.state import TrainingState, optimizer_moments, restore_moments
from edgeclip.models.clip import CLIP, MAX_SCALE

__all__ = ["Done", "Stage"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SPARSITY = "sparsity."  # before the names of masks, among those of the objective


@dataclass(frozen=True)
class Done:
    """What a step did; the same on every rank."""

    loss: float
    parts: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    scale: float
    updated: bool
    stop: bool


class Stage:
    """The moving parts of one stage: loss, optimizer, scaling.

    Args:
        run: what the recipe names.
        index: of the stage.
        here: this process.
    """

    def __init__(self, run: Run, index: int, here: Ranks) -> None:
        self.spec = run.recipe.stage[index]
        self._run, self._index, self._here = run, index, here
        self._model, self._config = run.student.model, run.student.config
        self.plan = run.plan(self.spec, world=here.world, rank=here.rank)
        self.inputs = run.inputs(self.spec)
        self.objective = run.objective(self.spec).to(here.device)
        self._pictures = run.pictures.get(self.spec.data)
        if self._pictures is not None:
            self._pictures = self._pictures.to(here.device)
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
        self.sparsity = run.sparsity(self.spec)
        self._masks: list[nn.Parameter] = []
        self._noise: Mapping[str, Noise] = {}
        if self.sparsity is not None:
            self._add_masks(self.sparsity.to(here.device))
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.spec.precision == "float16")

    def _add_masks(self, sparsity: Sparsity) -> None:
        """Let the masks descend and their multipliers ascend, at rates that no schedule touches."""
        said = sparsity.spec
        self._masks = [*sparsity.masks(), *sparsity.multipliers()]
        for own, rate in (
            (sparsity.masks(), said.learning_rate),
            (sparsity.multipliers(), said.multiplier_learning_rate),
        ):
            self._optimizer.add_param_group(
                {
                    "params": own,
                    "lr": rate,
                    "base_lr": rate,
                    "scheduled": False,
                    "betas": (0.9, 0.999),
                    "weight_decay": 0.0,
                    "maximize": own[0] is sparsity.multipliers()[0],
                }
            )
        self._names |= {id(p): f"{_SPARSITY}{name}" for name, p in sparsity.named_parameters()}

    def own_state(self) -> dict[str, Tensor]:
        """Return what only this stage has: parameters of the objective, and masks."""
        masks = {} if self.sparsity is None else self.sparsity.state_dict()
        return dict(self.objective.state_dict()) | {
            f"{_SPARSITY}{name}": each for name, each in masks.items()
        }

    def restore(self, state: TrainingState) -> None:
        """Go on from a state in the middle of this stage."""
        masks = {
            name.removeprefix(_SPARSITY): value
            for name, value in state.objective.items()
            if name.startswith(_SPARSITY)
        }
        self.objective.load_state_dict(
            {name: value for name, value in state.objective.items() if not name.startswith(_SPARSITY)}
        )
        if self.sparsity is not None:
            self.sparsity.load_state_dict(masks)
        restore_moments(self._optimizer, self._names, state.moments)
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name."""
        return optimizer_moments(self._optimizer, self._names)

    def step(self, batch: Batch, number: int, *, stop: bool) -> Done:
        """Do step ``number`` of the stage; without an update where loss or gradient is not finite."""
        torch.manual_seed(torch_seed(self._run.recipe.seed, self._index, 1 + number, self._here.rank))
        rate = self._set_learning_rate(number)
        self._set_modes()
        before = [buffer.clone() for buffer in self._model.buffers()]
        self._optimizer.zero_grad(set_to_none=True)
        if self.sparsity is not None:  # the same on every rank
            seed = self._run.recipe.seed + (self._index << 32)
            self._noise = self.sparsity.noise(random_stream(seed, 1 + number, 0, "gates"))
        loss, parts = self._backward(batch, number)
        values = torch.stack([loss, *parts.values(), loss.new_tensor(float(stop))]).float()
        gradients = [p.grad for p in (*self._parameters, *self._masks) if p.grad is not None]
        statistics = [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        self._here.average_([values, *gradients, *statistics])
        if self.scaler.is_enabled():
            self.scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self.spec.clip_norm or math.inf))
        said = values.tolist()
        updated = math.isfinite(said[0]) and math.isfinite(norm) and _are_finite(self._masks)
        with torch.no_grad():
            if updated:
                self._optimizer.step()
                self._model.logit_scale.clamp_(max=math.log(MAX_SCALE))
                if self.sparsity is not None:
                    self.sparsity.clamp_()
            else:
                # What was not finite may have reached the statistics of batch norms.
                for buffer, value in zip(self._model.buffers(), before, strict=True):
                    buffer.copy_(value)
        if self.scaler.is_enabled():
            self.scaler.update()
        return Done(
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
            group["lr"] = group["base_lr"] * (factor if group.get("scheduled", True) else 1.0)
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

    def _seen(self) -> CLIP:
        """Return the model that pictures and captions go through in this step."""
        return self._model if self.sparsity is None else self.sparsity.view(self._model, self._noise)

    def _memory(self, model: nn.Module) -> AbstractContextManager[Any]:
        return recomputed_blocks(model) if self.spec.checkpoint_activations else nullcontext()

    def _statistics(self) -> AbstractContextManager[Any]:
        # Of the two passes of a part, the one with gradients moves the statistics of batch norms.
        return nullcontext() if torch.is_grad_enabled() else held_statistics(self._model)

    def _backward(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of this rank's rows; return the loss and its terms, detached."""
        told, wants = self._ask(batch), self.objective.wants
        words = words_of(batch, wants, self._run.student.tokenizer.config.special, seed=self.plan.seed)
        said: list[tuple[Tensor, dict[str, Tensor]]] = []

        def embedded(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with self._statistics():
                model = self._seen()
                with self._memory(model), self._precision():
                    if self.inputs.of_texts:
                        return embed_texts(model, *part)
                    return embed(model, *part, mean=self._config.mean, std=self._config.std, wants=wants)

        def loss(*found: Tensor) -> Tensor:
            if self.inputs.of_texts:
                student = Embedded(self._run.own_pictures(batch, self._pictures), found)
            else:
                student = embedded_of(found, words, wants)
            total, parts = self.objective(
                student,
                told,
                scale=self._model.logit_scale.exp(),
                progress=number / max(1, self.spec.steps - 1),
                ids=batch.arrays.get("picture", batch.index),
                pictures=self._pictures,
                rng=random_stream(self.plan.seed, 1 + number, 0, "pictures"),
            )
            if self.sparsity is not None:
                penalty, shares = self.sparsity.penalty(number)
                total, parts = total + penalty, parts | shares
            said.append((total.detach(), parts))
            scaled: Tensor = self.scaler.scale(total)
            return scaled

        parts = self._cut(batch.arrays.get("image"), words)
        if len(parts) == 1:
            loss(*embedded(parts[0])).backward()  # type: ignore[no-untyped-call]
        else:
            backward_in_parts(embedded, parts, loss)
        return said[0]

    def _ask(self, batch: Batch) -> dict[str, Embedded]:
        """Return what the teachers say."""
        with self._precision():
            return {
                name: teacher.ask(batch, self.inputs, parts=self.spec.parts)
                for name, teacher in self._teachers.items()
            }

    def _cut(self, image: Tensor | None, words: Words) -> Sequence[tuple[Tensor, ...]]:
        """Return pictures, ids and, where some are, which words are hidden, part by part."""
        whole = [tensor for tensor in (image, words.ids, words.hidden) if tensor is not None]
        return list(zip(*(tensor.chunk(self.spec.parts) for tensor in whole), strict=True))


def _are_finite(parameters: Sequence[nn.Parameter]) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)
