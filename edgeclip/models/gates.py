"""Gates over the parts of a transformer tower, and the smaller tower that what is open makes.

Gates stand on the channels of the residual stream, on attention heads, on hidden units, and on each layer's
attention and feed-forward part as a whole (Xia et al. 2022, "CoFi"; Wu et al. 2023, "TinyCLIP", §3.3). A gate
is a number from 0 to 1. Learned gates are hard concrete (Louizos et al. 2018, "Learning Sparse Neural
Networks through L0 Regularization", §2.2): the logistic variable ``log u - log(1-u) + a`` of temperature
``β`` goes through a sigmoid, is stretched to ``(γ, ζ)`` and clipped to ``[0, 1]``, so that exact zeros and
ones have a probability.

:func:`gated` cuts what is closed out of the weights and multiplies what is partly open into them, so that a
gated tower *is* a smaller tower: differentiable while masks are learned, physical at the end, and both give
the same numbers because they are the same computation. It follows that

- norms see the channels that are open, and no others (as in TinyCLIP's masked norms);
- a channel's gate multiplies each write to it once, where it is written: by the first norm or, without one,
  by stem, class token and positions; by tokens and positions of a text; by each layer's two parts. Reading
  is not gated. TinyCLIP's ``prune()`` gates what stands before the first norm, and both projections too;
- an attention without heads, and a feed-forward part without units, is gone with its bias. TinyCLIP keeps
  the bias of the latter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from edgeclip.errors import ConfigError
from edgeclip.models.clip import build_image_tower, build_text_tower
from edgeclip.models.config import TextTransformerConfig, ViTConfig
from edgeclip.models.text_transformer import TextTransformer
from edgeclip.models.vit import VisionTransformer

__all__ = [
    "GateableTower",
    "Gates",
    "chance_of_open",
    "deterministic_gates",
    "gated",
    "layer_parameters",
    "pruned",
    "sampled_gates",
]

# Of the published gates: stretch limits, temperature, sharpening at inference, clamp of probabilities.
_LOW, _HIGH = -0.1, 1.1
_TEMPERATURE = 2 / 3
_SHARPNESS = 0.8
_EPSILON = 1e-6

GateableTower: TypeAlias = VisionTransformer | TextTransformer
"""Towers whose parts can be gated."""


# Hard concrete gates
# -------------------------------------------------------------------------------------------------


def chance_of_open(loga: Tensor) -> Tensor:
    """Return the probability that a gate is not 0, ``1 - sigmoid(β · log(-γ/ζ) - a)`` (eq. 12)."""
    closed = torch.sigmoid(math.log(-_LOW / _HIGH) * _TEMPERATURE - loga)
    return 1 - closed.clamp(_EPSILON, 1 - _EPSILON)


def sampled_gates(loga: Tensor, noise: Tensor) -> Tensor:
    """Return gates for uniform ``noise`` in (0, 1) of the shape of ``loga`` (eq. 10 and 11)."""
    noise = noise.clamp(_EPSILON, 1 - _EPSILON)
    soft = torch.sigmoid((noise.log() - (1 - noise).log() + loga) / _TEMPERATURE)
    return (soft * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def deterministic_gates(loga: Tensor) -> Tensor:
    """Return the gates of one group, ``(N,)`` or scalar, without chance.

    The form of CoFi and TinyCLIP: a gate's soft value is ``sigmoid(a / β · 0.8)``; as many of the smallest
    are set to 0 as are expected to be.
    """
    count = round(loga.numel() - chance_of_open(loga).sum().item())
    soft = torch.sigmoid(loga / _TEMPERATURE * _SHARPNESS)
    if count > 0:
        soft = soft.clone()
        flat = soft.view(-1)
        flat[flat.topk(count, largest=False).indices] = 0
    return soft


# Gated towers
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """The gates of one tower, or the probabilities that they are open.

    Attributes:
        channels: ``(D,)`` of the residual stream; ``None``: all open.
        heads: of each layer, ``(heads,)``.
        neurons: of each layer, ``(hidden units,)``.
        attention: ``(layers,)``, of each layer's attention.
        feeding: ``(layers,)``, of each layer's feed-forward part.
    """

    channels: Tensor | None
    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    attention: Tensor
    feeding: Tensor

    @classmethod
    def open(cls, config: ViTConfig | TextTransformerConfig, *, like: Tensor) -> Gates:
        """Return gates that change nothing, in the dtype and on the device of ``like``."""
        ones = like.new_ones
        return cls(
            None,
            tuple(ones(count) for count in config.heads),
            tuple(ones(count) for count in config.hidden_dims),
            ones(len(config.heads)),
            ones(len(config.heads)),
        )


def layer_parameters(config: ViTConfig | TextTransformerConfig, chance: Gates) -> Tensor:
    """Return how many parameters a tower's attention and feed-forward layers are expected to have.

    Norms and biases included; what stands before and behind the layers is not. Gates are independent, so that
    the expectation of each product is the product of expectations: the number is exact, and for gates of 0
    and 1 it is the count of the tower that :func:`gated` returns.

    Args:
        config: of the tower with all gates open.
        chance: probability that each gate is open.
    """
    one = chance.attention.new_tensor(float(config.width))
    width = one if chance.channels is None else chance.channels.sum()
    total = torch.zeros_like(width)
    for index, (heads, neurons) in enumerate(zip(chance.heads, chance.neurons, strict=True)):
        if heads.numel():
            rows = heads.sum() * chance.attention[index] * config.head_dim
            there = _any(heads) * chance.attention[index]
            total = total + rows * (4 * width + 3) + 3 * width * there  # one bias, two of the norm
        if neurons.numel():
            units = neurons.sum() * chance.feeding[index]
            there = _any(neurons) * chance.feeding[index]
            total = total + units * (2 * width + 1) + 3 * width * there
    return total


def _any(chance: Tensor) -> Tensor:
    return 1 - (1 - chance).prod()


def gated(tower: GateableTower, gates: Gates) -> GateableTower:
    """Return a tower of what the gates leave, whose weights are functions of the tower's and of the gates.

    Its tensors are no parameters: gradients flow on to the tower and the gates, and running statistics of
    batch norms are the tower's own. It is in the mode the tower is in, part by part. It is meant for one
    step and holds a copy of what is left of the weights; :func:`pruned` returns one that stays.

    Args:
        tower: unfolded.
        gates: of it.

    Raises:
        ConfigError: no channel is open, or channels are gated in a tower with ``conv_ends``.
    """
    made, state = _smaller(tower, gates)
    for name, value in state.items():
        at, _, leaf = name.rpartition(".")
        owner = made.get_submodule(at)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            del owner._parameters[leaf]
            setattr(owner, leaf, value)
    modes = {name: module.training for name, module in tower.named_modules()}
    for name, module in made.named_modules():
        module.training = modes[name]
    return made


@torch.no_grad()
def pruned(tower: GateableTower, gates: Gates) -> GateableTower:
    """Return :func:`gated` as a tower of its own, in the same mode as a whole.

    Raises:
        ConfigError: as for :func:`gated`.
    """
    made, state = _smaller(tower, gates)
    made.load_state_dict({name: value.detach().clone() for name, value in state.items()}, assign=True)
    return made.train(tower.training)


def _smaller(tower: GateableTower, gates: Gates) -> tuple[GateableTower, dict[str, Tensor]]:
    """Return a tower without data and the tensors that belong into it."""
    config: ViTConfig | TextTransformerConfig = tower.config
    kept = None if gates.channels is None else _open(gates.channels)
    sizes: dict[str, Any] = {
        "heads": tuple(map(_count, gates.heads, gates.attention)),
        "hidden_dims": tuple(map(_count, gates.neurons, gates.feeding)),
    }
    if kept is not None:
        if isinstance(config, TextTransformerConfig) and config.conv_ends:
            raise ConfigError(
                "text tower: got gates on the channels of a tower with 'conv_ends', whose feed-forward parts "
                "are as wide as the channels say; gate heads and neurons only."
            )
        if not len(kept):
            raise ConfigError(
                f"{'image' if isinstance(config, ViTConfig) else 'text'} tower: the gates close all "
                f"{config.width} channels, expected one open at least; ask for a larger share of the "
                "parameters."
            )
        sizes["width"] = len(kept)
        if isinstance(config, ViTConfig) and config.stem == "conv":
            sizes["stem_dim"] = config.stem_channels
    with torch.device("meta"):
        if isinstance(config, ViTConfig):
            made = build_image_tower(dataclasses.replace(config, **sizes))
        else:
            made = build_text_tower(dataclasses.replace(config, **sizes))
    state = dict(tower.named_parameters()) | dict(tower.named_buffers())
    cut = _cut(state, config, gates, kept)
    return cast(GateableTower, made), {name: cut[name] for name in made.state_dict()}


def _cut(
    state: Mapping[str, Tensor],
    config: ViTConfig | TextTransformerConfig,
    gates: Gates,
    kept: Tensor | None,
) -> dict[str, Tensor]:
    """Return the tensors of the smaller tower, and some of parts that it has not."""
    cut = dict(state)
    if kept is not None:
        assert gates.channels is not None
        gate = gates.channels[kept]
        for name, value in state.items():
            axis, writes = _stream_axis(name, config)
            if axis is not None:
                value = value.index_select(axis, kept)
                if writes:
                    value = value * gate.view(-1, *[1] * (value.ndim - 1 - axis))
                cut[name] = value
    for index, (heads, neurons) in enumerate(zip(gates.heads, gates.neurons, strict=True)):
        layer = f"transformer.layers.{index}."
        if heads.numel():
            _cut_attention(cut, layer + "attention.", heads, gates.attention[index], config.head_dim)
        if neurons.numel():
            _cut_feeding(cut, layer, neurons, gates.feeding[index])
    return cut


def _cut_attention(cut: dict[str, Tensor], at: str, heads: Tensor, gate: Tensor, head_dim: int) -> None:
    rows, count = _open(heads), len(heads)
    for leaf in ("weight", "bias"):
        value = cut[f"{at}qkv.{leaf}"]
        value = value.view(3, count, head_dim, *value.shape[1:]).index_select(1, rows)
        cut[f"{at}qkv.{leaf}"] = value.flatten(0, 2)
    out = cut[at + "out.weight"]
    out = out.view(len(out), count, head_dim).index_select(1, rows)  # (D, heads, head_dim)
    cut[at + "out.weight"] = (out * (heads[rows] * gate)[:, None]).flatten(1)
    cut[at + "out.bias"] = cut[at + "out.bias"] * gate


def _cut_feeding(cut: dict[str, Tensor], at: str, neurons: Tensor, gate: Tensor) -> None:
    units = _open(neurons)
    for leaf in ("weight", "bias"):
        cut[f"{at}fc1.{leaf}"] = cut[f"{at}fc1.{leaf}"].index_select(0, units)
    cut[at + "fc2.weight"] = cut[at + "fc2.weight"].index_select(1, units) * (neurons[units] * gate)
    cut[at + "fc2.bias"] = cut[at + "fc2.bias"] * gate


def _stream_axis(name: str, config: ViTConfig | TextTransformerConfig) -> tuple[int | None, bool]:
    """Return which axis of a tensor the channels of the residual stream are, and whether it writes them.

    ``None`` where it does not touch them.
    """
    first_norm = isinstance(config, ViTConfig) and config.pre_norm
    last = name.rsplit(".", 2)[-2:]
    if name.startswith("transformer.layers."):
        if last[0] in ("qkv", "fc1"):
            return (1, False) if last[1] == "weight" else (None, False)
        return 0, last[0] in ("out", "fc2")
    if name.startswith("first_norm."):
        return 0, True
    if name.startswith("final_norm."):
        return 0, False
    if name == "projection.weight":
        return 1, False
    if name in ("stem.conv.weight", "stem.conv3.weight", "stem.conv3.bias"):
        return 0, not first_norm
    if name == "positions.class_token":
        return 0, not first_norm
    if name in ("positions", "positions.table"):
        return 1, not first_norm
    if name == "token_embedding.weight" and not cast(TextTransformerConfig, config).token_dim:
        return 1, True
    if name == "token_projection.weight":
        return 0, True
    return None, False


def _open(gates: Tensor) -> Tensor:
    return gates.detach().nonzero().flatten()


def _count(gates: Tensor, whole: Tensor) -> int:
    return len(_open(gates)) if bool(whole.detach() > 0) else 0
