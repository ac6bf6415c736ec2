"""Folding of train-time structure into plain layers. Everything here is exact in eval mode up to rounding.

A module that trains in another form than it runs has a method ``fold`` that returns what replaces it; the
arithmetic they share stands here. Sums and products are made in float64 and stored in the dtype of the
weight.

The laws, each with a test of its own: a batch norm folds into the convolution before it
(:func:`fold_conv_bn`) or into the linear layer or 1×1 convolution behind it (:func:`fold_bn_linear`);
parallel convolutions add up once their kernels have one size (:class:`Kernel`; Ding et al. 2021, "RepVGG"); a
factor per channel of the output, be it a layer scale or the scale of queries, folds into the layer that makes
it (:func:`scale_outputs`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Foldable",
    "Kernel",
    "fold_bn_linear",
    "fold_children",
    "fold_conv_bn",
    "reparameterize",
    "scale_outputs",
]

_Module = TypeVar("_Module", bound=nn.Module)
_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


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
    kernel = Kernel.of_conv(conv, norm)
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(kernel.weight.to(dtype))
    conv.bias = nn.Parameter(kernel.bias.to(dtype))
    return conv


@torch.no_grad()
def fold_bn_linear(norm: nn.BatchNorm2d, layer: _Layer) -> _Layer:
    """Return ``layer`` with the batch norm that precedes it folded in, changed in place; a bias appears.

    ``w' = w·f`` per input channel with ``f = g/√(v+ε)``, and ``b' = bias + w·(b - m·f)``. The layer is
    linear or a 1×1 convolution without groups and padding: at a padded border the shift would be missing.
    """
    assert isinstance(layer, nn.Linear) or (layer.kernel_size == (1, 1) and layer.groups == 1)
    factor, shift = _affine(norm)
    weight = layer.weight.double()
    matrix = weight.flatten(1)  # (C_out, C_in)
    bias = matrix @ shift
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter((matrix * factor).reshape(weight.shape).to(dtype))
    layer.bias = nn.Parameter(bias.to(dtype))
    return layer


@torch.no_grad()
def scale_outputs(layer: _Layer, factor: Tensor) -> _Layer:
    """Return ``layer`` with its output channels multiplied by ``factor``, changed in place.

    Args:
        layer: linear or convolution with ``C_out`` output channels.
        factor: ``C_out`` elements of any shape.
    """
    dtype = layer.weight.dtype
    rows = factor.double().reshape(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight = nn.Parameter((layer.weight.double() * rows).to(dtype))
    if layer.bias is not None:
        layer.bias = nn.Parameter((layer.bias.double() * rows.flatten()).to(dtype))
    return layer


@dataclass(frozen=True)
class Kernel:
    """Weight and bias of a convolution in float64, as a value: kernels of one size add up.

    Attributes:
        weight: ``(C_out, C_in / groups, kh, kw)``.
        bias: ``(C_out,)``.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of_conv(cls, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> Kernel:
        """Return the kernel of a convolution, with the batch norm behind it if there is one."""
        weight = conv.weight.detach().double()
        bias = conv.bias.detach().double() if conv.bias is not None else weight.new_zeros(len(weight))
        if norm is None:
            return cls(weight, bias)
        factor, _ = _affine(norm)
        return cls(
            weight * factor[:, None, None, None],
            norm.bias.detach().double() + (bias - _statistics(norm)[0]) * factor,
        )

    @classmethod
    def identity(cls, channels: int, *, groups: int, size: tuple[int, int], device: torch.device) -> Kernel:
        """Return the kernel that copies its input: 1 at the centre of each channel's own slice."""
        width = channels // groups
        weight = torch.zeros(channels, width, *size, dtype=torch.float64, device=device)
        rows = torch.arange(channels, device=device)
        weight[rows, rows % width, size[0] // 2, size[1] // 2] = 1
        return cls(weight, weight.new_zeros(channels))

    @classmethod
    def of_norm(cls, norm: nn.BatchNorm2d, *, groups: int, size: tuple[int, int]) -> Kernel:
        """Return a batch norm without a convolution as a kernel."""
        factor, shift = _affine(norm)
        copied = cls.identity(len(factor), groups=groups, size=size, device=factor.device)
        return cls(copied.weight * factor[:, None, None, None], shift)

    def padded(self, size: tuple[int, int]) -> Kernel:
        """Return the kernel with zeros around it up to ``size``; the convolution's padding grows alike."""
        missing = [wanted - has for wanted, has in zip(size, self.weight.shape[2:], strict=True)]
        assert all(lines >= 0 and lines % 2 == 0 for lines in missing)
        rows, columns = (lines // 2 for lines in missing)
        around = [columns, columns, rows, rows]
        return Kernel(F.pad(self.weight, around), self.bias)

    def __add__(self, other: Kernel) -> Kernel:
        return Kernel(self.weight + other.weight, self.bias + other.bias)

    def __sub__(self, other: Kernel) -> Kernel:
        return Kernel(self.weight - other.weight, self.bias - other.bias)

    def scaled(self, factor: Tensor) -> Kernel:
        """Return the kernel with output channels multiplied by ``factor``, ``C_out`` elements."""
        rows = factor.detach().double().flatten()
        return Kernel(self.weight * rows[:, None, None, None], self.bias * rows)

    def to_conv(self, *, stride: int = 1, groups: int = 1, dtype: torch.dtype) -> nn.Conv2d:
        """Return the convolution, padded by half its kernel."""
        out_channels, width, height, columns = self.weight.shape
        conv = nn.Conv2d(
            width * groups,
            out_channels,
            (height, columns),
            stride=stride,
            padding=(height // 2, columns // 2),
            groups=groups,
            device="meta",
        )
        conv.weight = nn.Parameter(self.weight.to(dtype))
        conv.bias = nn.Parameter(self.bias.to(dtype))
        return conv


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.double(), norm.running_var.double()


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return factor and shift of a batch norm in eval mode, ``(C,)`` each."""
    mean, variance = _statistics(norm)
    factor = norm.weight.detach().double() / torch.sqrt(variance + norm.eps)
    return factor, norm.bias.detach().double() - mean * factor
