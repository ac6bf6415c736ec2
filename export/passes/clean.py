"""Remove what computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from ._graph import constant, drop_unread, new_constant, readers, require_flat

__all__ = ["Clean"]

_ROUNDS = 10
_SMALL_BYTES = 64  # axes and shapes are folded whatever they grow to
# Not folded: random numbers, and what engines look for as nodes.
_LEFT = frozenset(
    {"Bernoulli", "Constant", "DequantizeLinear", "Multinomial", "QuantizeLinear"}
    | {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


class Clean(ir.passes.InPlacePass):
    """Remove what computes nothing; exact.

    1. ``Identity``; sums with zero, products and quotients with one that change no shape; transposes that
       move nothing.
    2. Nodes of constants, where the result is no larger than the constants that go (weights stored small and
       widened in the graph stay small); shapes that are known.
    3. Second copies of constants and of nodes.
    4. What nobody reads.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clean until nothing changes."""
        modified = False
        for _ in range(_ROUNDS):
            changed = bool(common.IdentityEliminationPass()(model).modified)
            changed |= _drop_neutral(model.graph)
            changed |= _fold(model)
            changed |= bool(common.DeduplicateHashedInitializersPass()(model).modified)
            changed |= bool(common.CommonSubexpressionEliminationPass()(model).modified)
            changed |= bool(drop_unread(model.graph))
            modified |= changed
            if not changed:
                break
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """Find no constant left that nobody reads."""
        for name, value in model.graph.initializers.items():
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                raise ir.passes.PostconditionError(f"nobody reads the constant {name!r}")


def _drop_neutral(graph: ir.Graph) -> bool:
    """Remove nodes that give back one of their inputs (1)."""
    dropped = False
    for node in list(graph):
        same = _given_back(node)
        output = node.outputs[0]
        if same is None or output.is_graph_output():
            continue
        output.replace_all_uses_with(same)
        graph.remove(node, safe=True)
        dropped = True
    return dropped


def _given_back(node: ir.Node) -> ir.Value | None:
    if node.op_type == "Transpose":
        order = node.attributes.get("perm")
        moves = order is None or list(order.value) != sorted(order.value)
        return None if moves else node.inputs[0]
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    wanted = 0 if node.op_type in ("Add", "Sub") else 1
    pairs = [(node.inputs[0], node.inputs[1])]
    if node.op_type in ("Add", "Mul"):
        pairs.append((node.inputs[1], node.inputs[0]))
    for data, other in pairs:
        array = constant(other)
        if array is None or data is None or constant(data) is not None or not (array == wanted).all():
            continue
        if _keeps_shape(data, array):
            return data
    return None


def _keeps_shape(data: ir.Value, array: NDArray[np.generic]) -> bool:
    """Whether broadcasting with a constant leaves a shape as it is."""
    if data.shape is None or array.ndim > len(data.shape):
        return False
    behind = list(data.shape)[len(data.shape) - array.ndim :]
    return all(size in (1, of) for size, of in zip(array.shape, behind, strict=True))


def _fold(model: ir.Model) -> bool:
    """Replace nodes by the constants they compute (2)."""
    graph, folded = model.graph, False
    for node in list(graph):
        results = _evaluated(node, model)
        if results is None:
            continue
        for output, array in zip(node.outputs, results, strict=True):
            output.replace_all_uses_with(new_constant(graph, array, f"{output.name}_constant"))
        graph.remove(node, safe=True)
        drop_unread(graph)
        folded = True
    return folded


def _evaluated(node: ir.Node, model: ir.Model) -> Sequence[NDArray[np.generic]] | None:
    if node.graph is None or node.domain or node.op_type in _LEFT:
        return None
    if any(output.is_graph_output() for output in node.outputs):
        return None
    if node.op_type == "Shape" and node.inputs[0] is not None and not node.attributes:
        shape = node.inputs[0].shape
        if shape is not None and shape.is_static():
            return [np.asarray(shape.numpy(), np.int64)]
    arrays = {str(value.name): constant(value) for value in node.inputs if value is not None}
    if not arrays or any(array is None for array in arrays.values()):
        return None
    known = {name: array for name, array in arrays.items() if array is not None}
    results = _run(node, known, model)
    if results is None:
        return None
    saved = sum(
        known[str(value.name)].nbytes for value in node.inputs if value is not None and _only(value, node)
    )
    size = sum(array.nbytes for array in results)
    return results if size <= max(saved, _SMALL_BYTES) else None


def _only(value: ir.Value, node: ir.Node) -> bool:
    return readers(value) == [node] and not value.is_graph_output()


def _run(
    node: ir.Node, feeds: dict[str, NDArray[np.generic]], model: ir.Model
) -> Sequence[NDArray[np.generic]] | None:
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "node", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", model.opset_imports.get("", 0))]
    try:
        runner = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets))
        results = runner.run(None, feeds)
    except (NotImplementedError, RuntimeError):
        return None  # an operator without a reference: left as it is
    wanted = [None if output.dtype is None else output.dtype.numpy() for output in node.outputs]
    return [
        np.asarray(array, dtype=dtype) if dtype is not None else np.asarray(array)
        for array, dtype in zip(results, wanted, strict=True)
    ]
