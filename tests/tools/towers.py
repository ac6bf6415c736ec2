"""Towers with weights that hide nothing, and others' weights in ours, for comparisons in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from edgeclip.models.keys import KeyMap

__all__ = ["RELATIVE", "below", "below_any", "difference", "loaded", "random_weights", "round_trip"]

RELATIVE = 1e-9
"""The same sums in another order, in float64; a wrong epsilon already shows as 1e-7."""

_Module = TypeVar("_Module", bound=nn.Module)
_Value = TypeVar("_Value")


@torch.no_grad()
def random_weights(model: _Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> _Module:
    """Fill every weight and statistic, and return the model in eval mode.

    Fresh weights hide errors: biases and batch-norm means of 0, scales of 1 or 1e-5. The fan-in rule for
    matrices keeps attention scores of order 1, so that a softmax over the wrong tokens shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point() or "mask" in name:
            continue
        if name.endswith(("layer_scale", "gamma", "running_var")) or (
            value.dim() == 1 and name.endswith("weight")
        ):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() < 2:
            value.normal_(std=0.2, generator=generator)
        else:
            value.normal_(std=(value.numel() / value.shape[0]) ** -0.5, generator=generator)
    return model.to(dtype).eval()


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return what stands below a prefix."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def below_any(state: Mapping[str, _Value], prefixes: tuple[str, ...]) -> dict[str, _Value]:
    """Return what has one of the prefixes, under its whole name."""
    return {key: value for key, value in state.items() if key.startswith(prefixes)}


def loaded(tower: _Module, keys: KeyMap, state: Mapping[str, Tensor]) -> _Module:
    """Return ``tower`` (made on the meta device) with others' weights, which it shares where it can."""
    shapes = {key: tuple(value.shape) for key, value in tower.state_dict().items()}
    tower.load_state_dict(keys.to_ours(state, shapes, where="reference"), assign=True)
    return tower.eval()


def round_trip(tower: nn.Module, keys: KeyMap) -> None:
    """Assert that our state under others' names and back is bit-identical, and covers all of it."""
    state = tower.state_dict()
    theirs = keys.to_theirs(state)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    back = keys.to_ours(theirs, shapes, where="round trip")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)


@torch.no_grad()
def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
