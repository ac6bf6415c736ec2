"""Masks that are learned beside a model's weights and take parts of it out when their stage ends.

TinyCLIP's automatic weight inheritance (Wu et al. 2023, §3.3), after CoFi (Xia et al. 2022): hard concrete
gates (:mod:`edgeclip.models.gates`) on the channels, heads and hidden units of each tower, drawn anew in
every step, and a penalty that lets a given share of the layers' parameters stay.

With ``p`` the expected share and ``q`` the one that is asked for, the penalty of a tower is
``λ₁ · (p - q)₊ + λ₂ · (p - q)₊²``. Both multipliers are learned by gradient *ascent*, so that they grow as
long as too much is left. This is the one-sided form of the published code; the two-sided one of CoFi's paper
also punishes a tower for being smaller than asked, which the loss does by itself. ``q`` falls linearly from 1
in the warm-up.

The share is counted over a tower's attention and feed-forward layers, as the published sizes are: token
tables and stems are not. The count of what is expected is exact, norms and biases included
(:func:`~edgeclip.models.gates.layer_parameters`). At the end each group keeps as many gates as it is expected
to, so that the share comes out near the one asked for, and heads are whole.

Gates are drawn once a step, the same on every rank and for every micro-batch: they follow from the seed, the
stage and the step alone.

Nothing holds masks back at the share but the loss: give the warm-up time, as the published 1,000 steps at a
rate of 0.02. Without any loss these end at 0.495 of 0.5 asked; twenty steps at a rate of 0.1 at 0.11.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeclip.distill.recipe import PruneSpec
from edgeclip.errors import ConfigError
from edgeclip.models.clip import CLIP
from edgeclip.models.config import CLIPConfig, TextTransformerConfig, ViTConfig
from edgeclip.models.gates import (
    GateableTower,
    Gates,
    chance_of_open,
    deterministic_gates,
    gated,
    layer_parameters,
    pruned,
    sampled_gates,
)
from edgeclip.models.text_transformer import TextTransformer
from edgeclip.models.vit import VisionTransformer

__all__ = ["Noise", "PrunedTower", "Sparsity", "TowerMasks"]

Noise = Mapping[str, Tensor]
"""Uniform numbers in (0, 1) by the name of the mask they are for."""

# Of the published masks: where their locations may be (they begin at 10, which the first step cuts to this),
# and the multipliers' first value.
_LIMITS = (math.log(1e-2), math.log(1e2))
_MULTIPLIER = 10.0


@dataclass(frozen=True)
class PrunedTower:
    """What pruning left of a tower.

    Attributes:
        asked: share of the layers' parameters that was asked for.
        share: that is left.
        width: channels before and after.
        heads: of all layers, before and after.
        neurons: hidden units of all layers, before and after.
        parameters: of the whole tower, before and after.
    """

    asked: float
    share: float
    width: tuple[int, int]
    heads: tuple[int, int]
    neurons: tuple[int, int]
    parameters: tuple[int, int]


class TowerMasks(nn.Module):
    """The masks of one tower, and the two multipliers of its penalty.

    Args:
        config: of the tower.
        share: of its layers' parameters that shall stay.
        kinds: what is gated, as :class:`~edgeclip.distill.recipe.PruneSpec` names it.
    """

    def __init__(
        self, config: ViTConfig | TextTransformerConfig, share: float, kinds: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.config = config
        self.asked = share
        groups: dict[str, int] = {}
        if "channels" in kinds:
            groups["channels"] = config.width
        for kind, counts in (("heads", config.heads), ("neurons", config.hidden_dims)):
            if kind in kinds:
                groups |= {f"{kind}-{index}": count for index, count in enumerate(counts) if count}
        if "layers" in kinds:
            groups |= {"attention": len(config.heads), "feeding": len(config.heads)}
        self.masks = nn.ParameterDict(
            {name: nn.Parameter(torch.full((count,), _LIMITS[1])) for name, count in groups.items()}
        )
        self.linear = nn.Parameter(torch.tensor(_MULTIPLIER))
        self.quadratic = nn.Parameter(torch.tensor(_MULTIPLIER))
        self.whole = sum(
            heads * config.head_dim * (4 * config.width + 3)
            + units * (2 * config.width + 1)
            + 3 * config.width * ((heads > 0) + (units > 0))
            for heads, units in zip(config.heads, config.hidden_dims, strict=True)
        )

    def gates(self, value: Callable[[str, Tensor], Tensor]) -> Gates:
        """Return gates; what is not masked is open.

        Args:
            value: of the name of a mask and its locations.
        """
        opened = Gates.open(self.config, like=self.linear.detach())
        found = {name: value(name, loga) for name, loga in self.masks.items()}

        def layered(kind: str, otherwise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(found.get(f"{kind}-{index}", ones) for index, ones in enumerate(otherwise))

        return Gates(
            found.get("channels"),
            layered("heads", opened.heads),
            layered("neurons", opened.neurons),
            found.get("attention", opened.attention),
            found.get("feeding", opened.feeding),
        )

    def sampled(self, noise: Noise) -> Gates:
        """Return the gates of a step, differentiable in the masks."""
        gates = self.gates(lambda name, loga: sampled_gates(loga, noise[name]))
        if gates.channels is not None and not bool((gates.channels > 0).any()):
            # A tower without channels is none; chance may ask for it where it is narrow and nearly closed.
            likely = (self.masks["channels"] + noise["channels"]).argmax()
            one = nn.functional.one_hot(likely, len(gates.channels)).to(gates.channels)
            gates = dataclasses.replace(gates, channels=gates.channels + one)
        return gates

    @torch.no_grad()
    def settled(self) -> Gates:
        """Return the gates without chance, as the stage leaves them."""
        return self.gates(lambda name, loga: deterministic_gates(loga))

    def share(self) -> Tensor:
        """Return the expected share of the layers' parameters, differentiable in the masks."""
        chance = self.gates(lambda name, loga: chance_of_open(loga))
        return layer_parameters(self.config, chance) / self.whole

    @torch.no_grad()
    def least(self) -> float:
        """Return the smallest share the masks can express, with all of them at their lower limit."""
        chance = self.gates(lambda name, loga: chance_of_open(torch.full_like(loga, _LIMITS[0])))
        return layer_parameters(self.config, chance).item() / self.whole

    def penalty(self, share: Tensor, target: float) -> Tensor:
        """Return what an expected share above the target costs."""
        excess = torch.relu(share - target)
        return self.linear * excess + self.quadratic * excess.square()


class Sparsity(nn.Module):
    """The masks of a stage.

    Args:
        config: of the model at the beginning of the stage.
        spec: what is asked for.
        where: the stage, as messages name it.

    Raises:
        ConfigError: a tower has no gates of the kinds asked for, or cannot become as small.
    """

    def __init__(self, config: CLIPConfig, spec: PruneSpec, *, where: str) -> None:
        super().__init__()
        self.spec = spec
        self.towers = nn.ModuleDict()
        for name, share in (("image", spec.image), ("text", spec.text)):
            if share is not None:
                self.towers[name] = _masks_of(config, name, share, spec, where)

    def multipliers(self) -> list[nn.Parameter]:
        """Return the multipliers, which are learned by ascent."""
        return [each for masks in self._masks().values() for each in (masks.linear, masks.quadratic)]

    def masks(self) -> list[nn.Parameter]:
        """Return the masks."""
        return [loga for masks in self._masks().values() for loga in masks.masks.values()]

    def _masks(self) -> dict[str, TowerMasks]:
        return {name: each for name, each in self.towers.items() if isinstance(each, TowerMasks)}

    def noise(self, stream: np.random.Generator) -> dict[str, Noise]:
        """Return what the gates of a step are drawn from, by tower."""
        drawn: dict[str, Noise] = {}
        for name, masks in self._masks().items():
            drawn[name] = {
                key: torch.from_numpy(stream.random(len(loga))).to(loga.device, loga.dtype)
                for key, loga in masks.masks.items()
            }
        return drawn

    def view(self, model: CLIP, noise: Mapping[str, Noise]) -> CLIP:
        """Return the model through the gates of a step, for that step only.

        Its weights are functions of the model's parameters and of the masks, made anew with every call, so
        that each call has a graph of its own.
        """
        return _with_towers(
            model,
            {
                name: gated(_tower(model, name), each.sampled(noise[name]))
                for name, each in self._masks().items()
            },
        )

    def penalty(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the penalty of a step, and what the log says: the penalty and the expected shares."""
        total = self.multipliers()[0].new_zeros(())
        shares: dict[str, Tensor] = {}
        for name, masks in self._masks().items():
            share = masks.share()
            total = total + masks.penalty(share, self.target(masks, step))
            shares[f"kept-{name}"] = share.detach()
        return total, {"prune": total.detach()} | shares

    def target(self, masks: TowerMasks, step: int) -> float:
        """Return the share asked for at a step, from 0."""
        if step >= self.spec.warmup:
            return masks.asked
        return 1 - (1 - masks.asked) * step / self.spec.warmup

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the masks where they can still change."""
        for loga in self.masks():
            loga.clamp_(*_LIMITS)

    def pruned(self, model: CLIP, config: CLIPConfig) -> tuple[CLIP, CLIPConfig]:
        """Return what is left of a model, with weights of its own, and its config."""
        towers = {name: pruned(_tower(model, name), each.settled()) for name, each in self._masks().items()}
        configs: dict[str, Any] = {name: tower.config for name, tower in towers.items()}
        return _with_towers(model, towers), dataclasses.replace(config, **configs)

    def report(self, before: CLIP, after: CLIP) -> dict[str, PrunedTower]:
        """Return what pruning did, by tower."""
        found = {}
        for name, masks in self._masks().items():
            towers = [_tower(model, name) for model in (before, after)]
            old, new = (tower.config for tower in towers)
            layers = sum(p.numel() for p in towers[1].transformer.parameters())
            sizes = [sum(p.numel() for p in tower.parameters()) for tower in towers]
            found[name] = PrunedTower(
                masks.asked,
                layers / masks.whole,
                (old.width, new.width),
                (sum(old.heads), sum(new.heads)),
                (sum(old.hidden_dims), sum(new.hidden_dims)),
                (sizes[0], sizes[1]),
            )
        return found


def _masks_of(config: CLIPConfig, name: str, share: float, spec: PruneSpec, where: str) -> TowerMasks:
    tower = config.image if name == "image" else config.text
    at = f"{where}: 'prune.{name}' is {share}, but the {name} tower"
    if not isinstance(tower, ViTConfig | TextTransformerConfig):
        raise ConfigError(
            f"{at} is of kind {tower.kind!r}; only 'vit' and 'transformer' towers have gates: leave "
            f"{name!r} out, or cut a smaller tower out of it with 'inherit'."
        )
    if isinstance(tower, TextTransformerConfig) and tower.conv_ends and "channels" in spec.gates:
        raise ConfigError(
            f"{at} has 'conv_ends', whose channels have no gates; expected 'prune.gates' without 'channels', "
            f"got {list(spec.gates)}."
        )
    masks = TowerMasks(tower, share, spec.gates)
    least = masks.least()
    if share < least:
        raise ConfigError(
            f"{at} keeps at least {least:.3f} of its layers' parameters with gates on {list(spec.gates)}; "
            "ask for more, gate more, or prune in two stages."
        )
    return masks


def _tower(model: CLIP, name: str) -> GateableTower:
    tower = model.image_tower if name == "image" else model.text_tower
    assert isinstance(tower, VisionTransformer | TextTransformer)
    return tower


def _with_towers(model: CLIP, towers: Mapping[str, nn.Module]) -> CLIP:
    """Return a model with other towers, and the same scale."""
    made = copy.copy(model)
    made._modules = dict(model._modules) | {f"{name}_tower": tower for name, tower in towers.items()}
    made._parameters = dict(model._parameters)
    return made
