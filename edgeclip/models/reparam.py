"""Folding of train-time structure into plain layers. Everything here is exact in eval mode up to rounding.

A module that trains in another form than it runs has a method ``fold`` that returns what replaces it; the
arithmetic they share stands here. Sums and products are made in float64 and stored in the dtype of the
weight.
"""

from __future__ import annotations

import copy
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

__all__ = ["Foldable", "fold_children", "fold_conv_bn", "reparameterize"]

_Module = TypeVar("_Module", bound=nn.Module)


@runtime_checkable
class Foldable(Protocol):
    """A module with train-time structure."""

    def fold(self) -> nn.Module:
        """Return plain layers that compute the same in eval mode; the module itself may be used up."""
        ...


def reparameterize(model: _Module) -> _Module:
    """Return a folded copy of a model or tower, in eval mode, for inference and export only.

    Train-time branches, batch norms, layer scales and query scaling are gone from the copy; the model stays
    as it is. Folding a folded copy changes nothing.
    """
    folded = _folded(copy.deepcopy(model).eval())
    assert isinstance(folded, type(model))
    return folded.requires_grad_(False)


def fold_children(module: _Module) -> _Module:
    """Fold everything below ``module``, in place, and return it: for a ``fold`` that keeps its module."""
    for name, child in module.named_children():
        setattr(module, name, _folded(child))
    return module


def _folded(module: nn.Module) -> nn.Module:
    return module.fold() if isinstance(module, Foldable) else fold_children(module)


@torch.no_grad()
def fold_conv_bn(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return ``conv`` with the batch norm that follows it folded into its weight and bias, changed in place.

    With running statistics ``m, v`` and affine ``g, b``: ``w' = w·g/√(v+ε)`` and ``b' = b + (bias -
    m)·g/√(v+ε)`` (Jacob et al. 2018, §3.2). Computed in float64, stored in the dtype of the weight.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # (C_out,)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(factor)
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight.double() * factor[:, None, None, None]).to(dtype))
    conv.bias = nn.Parameter((norm.bias.double() + (bias - norm.running_mean.double()) * factor).to(dtype))
    return conv
