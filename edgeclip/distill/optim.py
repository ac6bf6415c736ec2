"""Which parameter moves how fast: the optimizer's groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from edgeclip.distill.recipe import ScheduleSpec, StageSpec
from edgeclip.errors import ConfigError

__all__ = ["ParameterGroup", "build_optimizer", "learning_rate_factor", "parameter_groups"]

_SCALES = ("layer_scale", "attention_scale", "ffn_scale", "logit_scale", "logit_bias")
_POSITIONS = ("position", "class_token")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a decay.

    Attributes:
        names: of the parameters, in the order of the model.
        learning_rate: factor on the stage's rate.
        weight_decay: their own.
    """

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float


def parameter_groups(model: nn.Module, stage: StageSpec) -> list[ParameterGroup]:
    """Return the groups of a stage; parameters of none are frozen.

    Not decayed are vectors (biases, norms), scales and position tables: decay pulls weights towards zero,
    and zero means nothing there. The first ``[[stage.group]]`` whose pattern matches a name decides about
    it; a rate of 0 freezes.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for group in stage.group:
        if not any(fnmatchcase(name, group.match) for name in names):
            raise ConfigError(
                f"stage {stage.name!r}: the group {group.match!r} matches no parameter; the model has "
                f"{len(names)}, such as {names[:3]}."
            )
    found: dict[tuple[float, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        if name == "logit_scale" and not stage.train_scale:
            continue
        said = next((group for group in stage.group if fnmatchcase(name, group.match)), None)
        rate = 1.0 if said is None else said.learning_rate
        if rate == 0:
            continue
        if said is not None and said.weight_decay is not None:
            decay = said.weight_decay
        else:
            decay = stage.optimizer.weight_decay if _decays(name, parameter) else 0.0
        found.setdefault((rate, decay), []).append(name)
    if not found:
        raise ConfigError(f"stage {stage.name!r}: every parameter is frozen; there is nothing to train.")
    return [ParameterGroup(tuple(members), rate, decay) for (rate, decay), members in sorted(found.items())]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    last = name.rsplit(".", 1)[-1]
    named = last in _SCALES or any(part in name for part in _POSITIONS)
    return parameter.ndim >= 2 and not named


def build_optimizer(model: nn.Module, stage: StageSpec) -> torch.optim.AdamW:
    """Return AdamW over the groups of a stage; everything else stops requiring gradients.

    On the CPU all of a parameter's update is one pass over its memory, a third of the time.
    """
    groups = parameter_groups(model, stage)
    parameters = dict(model.named_parameters())
    trained = {name for group in groups for name in group.names}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trained)
    said = stage.optimizer
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.names],
                "lr": said.learning_rate * group.learning_rate,
                "base_lr": said.learning_rate * group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=said.betas,
        eps=said.eps,
        fused=all(parameter.device.type == "cpu" for parameter in parameters.values()),
    )


def learning_rate_factor(schedule: ScheduleSpec, step: int, steps: int) -> float:
    """Return the share of the stage's learning rate at a step.

    Linear from ``1/warmup`` to 1 over the first ``warmup`` steps, then constant, or half a cosine that ends
    at ``final`` on the last step (Loshchilov & Hutter 2017, without restarts).

    Args:
        schedule: the recipe's.
        step: from 0.
        steps: of the whole stage.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    past, whole = step - schedule.warmup, max(1, steps - 1 - schedule.warmup)
    return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, past / whole)))
