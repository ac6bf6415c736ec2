"""Small ONNX graphs, and running them, for tests of passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["graph", "kinds", "node", "run"]

node = helper.make_node
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}


def graph(
    nodes: Sequence[onnx.NodeProto],
    x: Sequence[int | str],
    y: Sequence[int | str],
    constants: Mapping[str, NDArray[Any]] | None = None,
    *,
    dtype: type[np.generic] = np.float32,
    opset: int = 20,
) -> onnx.ModelProto:
    """Return a graph from ``x`` (of ``dtype``) to ``y`` (float32) with the shapes of its values inferred."""
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", _TYPES[np.dtype(dtype)], x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)


def kinds(model: onnx.ModelProto) -> list[str]:
    """Return the operators in order."""
    return [each.op_type for each in model.graph.node]


def run(model: onnx.ModelProto, x: NDArray[Any], *, plain: bool = True) -> NDArray[Any]:
    """Run a graph on ONNX Runtime, as it stands or optimised."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]
