"""Which passes a graph goes through, and in which order."""

from __future__ import annotations

import onnx_ir as ir

from ..variants import VariantSpec
from .channels_first import ChannelsFirst
from .clean import Clean
from .fold_padding import FoldPadding
from .gelu_tanh import GeluTanh
from .pool_mean import PoolMean
from .split_grouped import SplitGrouped
from .strip_provenance import StripProvenance

__all__ = ["for_onnx_runtime", "shared"]

# AVX2 without AVX-512: tanh has a vector kernel there that is faster than that of erf. With AVX-512 the exact
# form is the faster one (1.5 % of MobileCLIP2-S0; in OpenVINO 4 %); on ARM nothing was measured.
_TANH_TARGETS = frozenset({"x86-avx2"})


def shared() -> list[ir.passes.PassBase]:
    """Return the passes of every graph, whatever is made of it; exact but for the order of sums."""
    return [FoldPadding(), Clean(), ChannelsFirst(), SplitGrouped(), PoolMean(), Clean(), StripProvenance()]


def for_onnx_runtime(spec: VariantSpec, *, gelu_tanh: bool) -> list[ir.passes.PassBase]:
    """Return the passes of a float graph for ONNX Runtime, behind those of :func:`shared`.

    A graph that is to be quantized goes through them before. The tanh form of GELU is never taken in float32:
    it moves embeddings of trained models by up to 1.6e-4, and 1e-4 is the limit there.

    Args:
        spec: the variant.
        gelu_tanh: whether the tanh form may be taken.
    """
    tanh = gelu_tanh and spec.form.precision != "fp32" and spec.target_name in _TANH_TARGETS
    faster: list[ir.passes.PassBase] = [GeluTanh()] if tanh else []
    return [*faster, StripProvenance()]
