"""The length of a text graph's rows: free where padding takes no part, or one, for engines built for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from .variants import VariantSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["LEAST_LENGTH", "LENGTH", "fixed_length", "graphs_for"]

LENGTH: Final = "length"
"""Name of the second axis of tokens where it is free."""
LEAST_LENGTH: Final = 2
"""Tokens that a row of free length has at least."""
_ONE_LENGTH: Final = frozenset({"intel-gpu", "intel-npu"})
_AXES_OF_TOKENS: Final = 2


def graphs_for(
    spec: VariantSpec, graphs: Mapping[str, onnx.ModelProto], context_length: int | None
) -> Mapping[str, onnx.ModelProto]:
    """Return the graphs a variant is made of: those of GPUs and NPUs take texts of one length.

    TensorRT tunes its kernels for one shape, and OpenVINO compiles them on such a device for each it meets.

    Args:
        spec: the variant.
        graphs: by tower.
        context_length: of the rows that text graphs take; ``None`` without texts.
    """
    is_free = spec.form.format != "tensorrt" and spec.target_name not in _ONE_LENGTH
    if is_free or "text" not in graphs or context_length is None:
        return graphs
    return {**graphs, "text": fixed_length(graphs["text"], context_length)}


def fixed_length(graph: onnx.ModelProto, length: int) -> onnx.ModelProto:
    """Return a text graph that takes rows of one length; the given one where it does already."""
    dims = graph.graph.input[0].type.tensor_type.shape.dim
    if len(dims) != _AXES_OF_TOKENS or dims[1].dim_param != LENGTH:
        return graph
    fixed = type(graph)()
    fixed.CopyFrom(graph)
    fixed.graph.input[0].type.tensor_type.shape.dim[1].dim_value = length
    del fixed.graph.value_info[:]  # they speak of any length
    return fixed
