"""What of a tower becomes int8, and in which form: values, without onnx and without an engine.

A :class:`Int8Policy` says which nodes stay float, a :class:`Scheme` what int8 means for an engine, and ranges
are a mapping from names of tensors to the least and largest value they take. Whoever chooses better ranges or
better nodes brings other values; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from edgeclip.errors import CalibrationError

__all__ = [
    "CONVOLUTIONS",
    "CPU",
    "POLICIES",
    "TENSORRT",
    "TRANSFORMER",
    "Int8Policy",
    "Range",
    "Ranges",
    "Scheme",
]

Range: TypeAlias = tuple[float, float]
"""Least and largest value of a tensor."""
Ranges: TypeAlias = Mapping[str, Range]
"""Range by name of tensor."""
_BITS: Final = (7, 8)


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

    Raises:
        CalibrationError: the weight bits are not 7 or 8, or symmetric activations are not signed.
    """

    weight_bits: int = 8
    signed: bool = False
    symmetric: bool = False
    integer_outputs: bool = True
    half_scales: bool = False

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
        stem: quantize the convolution that reads the pixels.
        pooled: quantize products with one vector a picture or text: gates of squeeze and excitation, and the
            projection.
        keep_float: names of node outputs that stay float whatever the rest says.
        tables: how tables that are only looked up are stored; ``"int8"`` has a scale a row.
        others: how large weights of nodes that stay float are stored.
    """

    name: str
    ops: frozenset[str] = frozenset({"Conv", "Gemm", "MatMul"})
    stem: bool = False
    pooled: bool = False
    keep_float: frozenset[str] = frozenset()
    tables: Literal["float32", "int8"] = "int8"
    others: Literal["float32", "float16"] = "float16"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "name": self.name,
            "ops": sorted(self.ops),
            "stem": self.stem,
            "pooled": self.pooled,
            "keep_float": sorted(self.keep_float),
            "tables": self.tables,
            "others": self.others,
        }


CONVOLUTIONS: Final = Int8Policy("convolutions")
"""Towers whose weights are in convolutions for the most part."""
TRANSFORMER: Final = Int8Policy("transformer")
"""Towers whose weights are in linear maps over tokens for the most part."""
POLICIES: Final = (CONVOLUTIONS, TRANSFORMER)
