"""What of a tower becomes int8, and in which form: values and their arithmetic, without onnx and torch.

A :class:`Int8Policy` says which nodes stay float, a :class:`Scheme` what int8 means for an engine, and ranges
are a mapping from names of tensors to the least and largest value they take. Whoever chooses better ranges or
better nodes brings other values; nothing else changes. The exporter writes them into a graph, training
rounds by them, and a simulation computes with them: all by the arithmetic here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

__all__ = [
    "CONVOLUTIONS",
    "CPU",
    "POLICIES",
    "TENSORRT",
    "TRANSFORMER",
    "WEIGHTS",
    "Int8Policy",
    "Range",
    "Ranges",
    "RoundedWeight",
    "Scheme",
    "activation_step",
    "neighbours",
    "rounded_weight",
    "weight_steps",
]

Range: TypeAlias = tuple[float, float]
"""Least and largest value of a tensor."""
Ranges: TypeAlias = Mapping[str, Range]
"""Range by name of tensor."""
_BITS: Final = (7, 8)
_PAIR: Final = 127  # 255 x 128 fits into 16 bits, and rounding two weights adds one at most
_MANTISSA: Final = 11  # bits of a float16's mantissa, the hidden one among them
_TINY: Final = float(np.finfo(np.float32).tiny)
_LEAST_HALF: Final = 2.0**-24


@dataclass(frozen=True)
class Scheme:
    """What int8 means for an engine. Weights are symmetric with a scale a channel, always.

    Attributes:
        weight_bits: 8, or 7 where an engine adds pairs of products in 16 bits.
        signed: activations are int8 in place of uint8.
        symmetric: the zero point of activations is 0, and their range the same on both sides.
        integer_outputs: convolutions give int8 and have int32 biases, which ONNX Runtime's integer kernels
            need; without, only what goes into a product is quantized.
        half_scales: scales are numbers that float16 holds exactly, so that a later cast changes nothing.
        fit_pairs: two neighbouring weights of one sign add up to 128 at most, so that sums of 16 bits hold
            their products as they do with 7 bits; most weights keep nearly 8.

    Raises:
        CalibrationError: the weight bits are not 7 or 8, or symmetric activations are not signed.
    """

    weight_bits: int = 8
    signed: bool = False
    symmetric: bool = False
    integer_outputs: bool = True
    half_scales: bool = False
    fit_pairs: bool = False

    def __post_init__(self) -> None:
        if self.weight_bits not in _BITS:
            raise CalibrationError(f"weight bits: got {self.weight_bits}, expected 7 or 8.")
        if self.symmetric and not self.signed:
            raise CalibrationError("symmetric activations are signed: set signed=True.")

    @property
    def weight_limit(self) -> int:
        """Largest absolute value of a weight: 127, and 64 in 7 bits (2 x 255 x 64 fits into 16 bits)."""
        return 127 if self.weight_bits == 8 else 64

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


CPU: Final = Scheme()
"""ONNX Runtime on CPUs: unsigned activations, which its kernels take on every processor."""
TENSORRT: Final = Scheme(signed=True, symmetric=True, integer_outputs=False, half_scales=True)
"""TensorRT: signed and symmetric throughout; float16 around it."""


@dataclass(frozen=True)
class Int8Policy:
    """Which nodes of a tower compute in int8. Only products with constant weights ever do.

    LayerNorm, softmax, products of two activations (attention), residual sums, GELU and the L2 norm stay
    float under every policy.

    Attributes:
        name: of the policy, for the manifest.
        ops: kinds of nodes that may be quantized.
        stem: quantize the convolution that reads the pixels, and what follows it.
        entry: products behind the stem that stay float with it, at most an eighth of all: they have few
            channels and the finest maps, and every later one builds on their errors.
        pooled: quantize products with one vector a picture or text: gates of squeeze and excitation, and the
            projection.
        keep_float: names of node outputs that stay float whatever the rest says.
        tables: how tables that are only looked up are stored; ``"int8"`` has a scale a row.
        others: how large weights of nodes that stay float are stored; ``"int8"`` those of linear maps, with a
            scale an output channel, and the rest as float16.
    """

    name: str
    ops: frozenset[str] = frozenset({"Conv", "Gemm", "MatMul"})
    stem: bool = False
    entry: int = 0
    pooled: bool = False
    keep_float: frozenset[str] = frozenset()
    tables: Literal["float32", "int8"] = "int8"
    others: Literal["float32", "float16", "int8"] = "float16"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "name": self.name,
            "ops": sorted(self.ops),
            "stem": self.stem,
            "entry": self.entry,
            "pooled": self.pooled,
            "keep_float": sorted(self.keep_float),
            "tables": self.tables,
            "others": self.others,
        }


CONVOLUTIONS: Final = Int8Policy("convolutions", entry=8, others="int8")
"""Towers whose weights are in convolutions for the most part."""
TRANSFORMER: Final = Int8Policy("transformer")
"""Towers whose weights are in linear maps over tokens for the most part."""
WEIGHTS: Final = Int8Policy("weights", frozenset(), others="int8")
"""Nothing computes in int8: weights are only stored so."""
POLICIES: Final = (CONVOLUTIONS, TRANSFORMER, WEIGHTS)


def activation_step(given: Range, scheme: Scheme) -> tuple[np.float32, int]:
    """Return scale and zero point of a range, widened to hold 0, which padding and zeros need."""
    low, high = min(given[0], 0.0), max(given[1], 0.0)
    if scheme.symmetric:
        return _coarse(max(-low, high) / 127, scheme), 0
    scale = _coarse((high - low) / 255, scheme)
    zero = int(np.clip(np.rint(-low / np.float64(scale)), 0, 255))
    return scale, zero - 128 if scheme.signed else zero


def weight_steps(
    weight: NDArray[np.float32],
    axis: int,
    scheme: Scheme,
    *,
    least: NDArray[np.float64] | float = 0.0,
    groups: int = 1,
) -> NDArray[np.float32]:
    """Return the scale of each index of an axis of a weight, ``(channels,)``.

    Args:
        weight: of a product; of a convolution where it has more than two axes.
        axis: its axis of output channels.
        scheme: what int8 means.
        least: scales are at least this, one number or ``(channels,)``.
        groups: of a convolution. With one channel each no pairs are added, and none need to fit.
    """
    other = tuple(each for each in range(weight.ndim) if each != axis)
    largest = np.abs(weight).max(axis=other).astype(np.float64)
    scale = np.maximum(largest / scheme.weight_limit, least)
    is_depthwise = weight.ndim > 2 and weight.shape[1] == 1 and groups == len(weight)
    if scheme.fit_pairs and not is_depthwise:
        scale = np.maximum(scale, _pair_steps(weight, axis))
    scale = np.where(scale > _TINY, scale, 1.0)
    return _half(scale) if scheme.half_scales else scale.astype(np.float32)


def rounded_weight(
    weight: NDArray[np.float32], axis: int, steps: NDArray[np.float32], scheme: Scheme
) -> NDArray[np.float64]:
    """Return what int8 makes of a weight, in floating point.

    Args:
        weight: of a product.
        axis: its axis of output channels.
        steps: scale of each output channel.
        scheme: what int8 means.
    """
    wide = steps.astype(np.float64).reshape([-1 if each == axis else 1 for each in range(weight.ndim)])
    return np.asarray(np.rint(weight / wide).clip(-scheme.weight_limit, scheme.weight_limit) * wide)


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight in integers that somebody chose.

    Attributes:
        integers: in the shape of the weight.
        steps: scale of each output channel.
        axis: of output channels.
    """

    integers: NDArray[np.int8]
    steps: NDArray[np.float32]
    axis: int

    @property
    def values(self) -> NDArray[np.float64]:
        """What int8 makes of the weight, in floating point."""
        wide = [-1 if each == self.axis else 1 for each in range(self.integers.ndim)]
        return np.asarray(self.integers * self.steps.astype(np.float64).reshape(wide))


def neighbours(channels: int, positions: int) -> NDArray[np.intp]:
    """Return which terms of a sum meet in 16 bits on processors with AVX2, ``(ways, terms)``; -1 for none.

    Args:
        channels: that are summed up.
        positions: of a convolution's window; 1 for linear maps.

    Returns:
        By terms in the order of a weight: channels, and in each of them positions.
    """
    channel, position = np.divmod(np.arange(channels * positions), positions)
    running = position * channels + channel  # position after position
    place = np.argsort(running)
    partner = running ^ 1
    met = np.where(partner < len(place), place[np.minimum(partner, len(place) - 1)], -1)
    filled = np.where(channel ^ 1 < channels, (channel ^ 1) * positions + position, -1)
    return np.stack([met, filled]).astype(np.intp)


def _pair_steps(weight: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    """Return the least scale of each output channel with which sums of 16 bits hold pairs of products.

    Kernels of AVX2 add the products of two neighbours along the sum: channels, position after position of a
    kernel. ONNX Runtime goes on from one position to the next, OpenVINO fills the channels of each up first;
    where that makes other neighbours, both are heeded.
    """
    rows = np.moveaxis(weight.astype(np.float64), axis, -1)  # terms of the sum first
    if weight.ndim == 2:
        return _largest_pairs(rows) / _PAIR
    rows = rows.reshape(len(rows), -1, rows.shape[-1]).transpose(1, 0, 2)  # position, channel, output
    filled = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2), (0, 0)))
    ways = [_largest_pairs(each.reshape(-1, rows.shape[-1])) for each in (rows, filled)]
    return np.asarray(np.maximum(*ways) / _PAIR)


def _largest_pairs(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest sum of two neighbours of one sign in each column."""
    rows = np.pad(rows, ((0, len(rows) % 2), (0, 0)))
    pairs = [np.maximum(each, 0) for each in (rows, -rows)]
    largest: NDArray[np.float64] = np.maximum(*((each[0::2] + each[1::2]).max(axis=0) for each in pairs))
    return largest


def _coarse(scale: float, scheme: Scheme) -> np.float32:
    """Return a scale of few bits, at least the given one.

    Two processors differ in the last bits of what they compute; with eleven bits they choose the same scale
    nearly always, and float16 can hold it.
    """
    if scale <= _TINY:
        return np.float32(1)
    if scheme.half_scales:
        return np.float32(_half(np.asarray(scale)))
    mantissa, exponent = np.frexp(scale)
    return np.float32(np.ldexp(np.ceil(np.ldexp(mantissa, _MANTISSA)), exponent - _MANTISSA))


def _half(scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the next numbers up that float16 holds."""
    near = np.maximum(scale, _LEAST_HALF).astype(np.float16)
    near = np.where(near.astype(np.float64) < scale, np.nextafter(near, np.float16(np.inf)), near)
    return near.astype(np.float32)
