"""Folding of train-time structure into plain layers. Everything here is exact in eval mode up to rounding."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["fold_conv_bn"]


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
