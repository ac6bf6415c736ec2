"""Store weights of nodes that compute in float in fewer bytes: int8 with scales, or float16.

What was one constant becomes constants with ``Cast`` and ``Mul``, which engines fold when they load the
graph. (A ``DequantizeLinear`` there would be computed on every run: ONNX Runtime keeps those for its Q/DQ
rewriting.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["gather_int8", "store_float16", "store_int8", "store_small"]

LARGE = 512
"""Elements from which a weight is worth another form; what has one axis (biases, scales) stays as it is."""


def store_small(model: onnx.ModelProto, *, tables: str, others: str) -> None:
    """Store the large float32 weights of a graph in fewer bytes, in place.

    Args:
        model: the graph.
        tables: ``"int8"`` for tables that rows are gathered from, ``"float32"`` to leave them.
        others: ``"float16"`` for everything else, ``"float32"`` to leave it; ``"int8"`` for weights of
            linear maps, with a scale an output channel, and float16 for the rest.
    """
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and np.prod(tensor.dims) >= LARGE
    }
    reading: dict[str, list[onnx.NodeProto]] = {name: [] for name in large}
    for node in model.graph.node:
        for name in dict.fromkeys(node.input):
            if name in reading:
                reading[name].append(node)
    for tensor in list(model.graph.initializer):
        nodes = reading.get(tensor.name, [])
        is_table = len(nodes) == 1 and nodes[0].op_type == "Gather" and nodes[0].input[0] == tensor.name
        if is_table and len(tensor.dims) == 2 and tables == "int8":
            gather_int8(model, nodes[0])
        elif tensor.name in large and others == "int8" and (axis := _channels(nodes, tensor)) is not None:
            store_int8(model, tensor.name, axis=axis)
        elif tensor.name in large and others != "float32":
            largest = np.abs(numpy_helper.to_array(tensor)).max()
            if largest <= np.finfo(np.float16).max:
                store_float16(model, tensor.name)


def _channels(nodes: Sequence[onnx.NodeProto], tensor: onnx.TensorProto) -> int | None:
    """Return the axis of output channels of a weight; ``None`` where not all that read it are such maps."""
    axes = set()
    for node in nodes:
        if node.op_type not in ("Gemm", "MatMul") or list(node.input).index(tensor.name) != 1:
            return None
        transposed = any(each.name == "transB" and each.i for each in node.attribute)
        axes.add(0 if transposed else len(tensor.dims) - 1)
    return axes.pop() if len(axes) == 1 else None


def store_int8(model: onnx.ModelProto, name: str, *, axis: int) -> None:
    """Store a float initializer as int8 with a scale along ``axis``, followed by ``Cast`` and ``Mul``."""
    values, scale = _rows(_take(model, name), axis)
    model.graph.initializer.extend(
        [numpy_helper.from_array(values, f"{name}_int8"), numpy_helper.from_array(scale, f"{name}_scale")]
    )
    _prepend(
        model,
        [
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_whole"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_whole", f"{name}_scale"], [name]),
        ],
    )


def store_float16(model: onnx.ModelProto, name: str) -> None:
    """Store a float initializer as float16, followed by ``Cast``."""
    values = _take(model, name).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(values, f"{name}_half"))
    _prepend(model, [helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT)])


def gather_int8(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Gather from an int8 table, and multiply the gathered rows by the gathered scales."""
    table, indices, output = node.input[0], node.input[1], node.output[0]
    values, scale = _rows(_take(model, table), axis=0)
    model.graph.initializer.extend(
        [numpy_helper.from_array(values, f"{table}_int8"), numpy_helper.from_array(scale, f"{table}_scale")]
    )
    position = list(model.graph.node).index(node)
    taken = {tensor.name for tensor in model.graph.initializer}
    stem = f"{output}_row" if f"{output}_scale" in taken else output  # Q/DQ of the rows has the same names
    replacement = [
        helper.make_node("Gather", [f"{table}_int8", indices], [f"{stem}_int8"], axis=0),
        helper.make_node("Gather", [f"{table}_scale", indices], [f"{stem}_scale"], axis=0),
        helper.make_node("Cast", [f"{stem}_int8"], [f"{stem}_whole"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{stem}_whole", f"{stem}_scale"], [output]),
    ]
    model.graph.node.remove(node)
    for offset, each in enumerate(replacement):
        model.graph.node.insert(position + offset, each)


def _rows(array: NDArray[Any], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize symmetrically with one scale for each index of ``axis``; scales keep their axes."""
    other = tuple(each for each in range(array.ndim) if each != axis)
    scale = np.abs(array).max(axis=other, keepdims=True) / 127
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.clip(np.rint(array / scale), -127, 127).astype(np.int8), scale


def _take(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    """Remove an initializer and return its value."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor)
    model.graph.initializer.remove(tensor)
    return np.asarray(array)


def _prepend(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    for offset, node in enumerate(nodes):
        model.graph.node.insert(offset, node)
