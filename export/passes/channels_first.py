"""Scale pixels after their channels were moved, not before."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._graph import constant, fresh_name, like, new_constant, readers, require_flat

__all__ = ["ChannelsFirst"]

_TO_NCHW = [0, 3, 1, 2]
_RANK = 4


class ChannelsFirst(ir.passes.InPlacePass):
    """Move the transpose from NHWC to NCHW before the casts and constant sums and products above it; exact.

    A sum with three numbers along the last axis is a loop of length three in most engines; along the first
    axis it is a loop over a whole channel.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move every transpose of the case."""
        moved = [_hoist(model.graph, node) for node in list(model.graph) if _is_to_nchw(node)]
        return ir.passes.PassResult(model, modified=any(moved))

    def ensures(self, model: ir.Model) -> None:
        """Find no transpose left that could move further."""
        left = next((node.name for node in model.graph if _is_to_nchw(node) and _above(node)), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"the transpose {left!r} could move further up")


def _is_to_nchw(node: ir.Node) -> bool:
    order = node.attributes.get("perm")
    return node.op_type == "Transpose" and order is not None and list(order.value) == _TO_NCHW


def _above(transpose: ir.Node) -> list[ir.Node]:
    """Return the nodes that can be done after the transpose, the nearest first."""
    chain: list[ir.Node] = []
    value = transpose.inputs[0]
    while value is not None and not value.is_graph_output() and len(readers(value)) == 1:
        node = value.producer()
        if node is None or len(value.uses()) != 1:
            break
        index = _data_index(node)
        if index is None:
            break
        chain.append(node)
        value = node.inputs[index]
    return chain


def _data_index(node: ir.Node) -> int | None:
    """Return which input of a node is the picture, if the others are numbers or one number a channel."""
    if node.op_type == "Cast":
        return 0
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    computed = [index for index, value in enumerate(node.inputs) if constant(value) is None]
    if len(computed) != 1:
        return None
    other = constant(node.inputs[1 - computed[0]])
    assert other is not None
    along_last = other.size == 1 or (other.ndim <= _RANK and other.shape[-1] == other.size)
    data = node.inputs[computed[0]]
    full = data is not None and data.shape is not None and len(data.shape) == _RANK
    return computed[0] if along_last and full else None


def _hoist(graph: ir.Graph, transpose: ir.Node) -> bool:
    chain = _above(transpose)
    if not chain:
        return False
    top = chain[-1]
    index = _data_index(top)
    assert index is not None
    source, moved = top.inputs[index], transpose.outputs[0]
    assert source is not None
    moved.replace_all_uses_with(chain[0].outputs[0], replace_graph_outputs=True)
    transpose.replace_input_with(0, source)
    graph.remove(transpose)
    graph.insert_before(top, transpose)
    top.replace_input_with(index, moved)
    like(moved, source).shape = _transposed(source.shape)
    for node in chain:
        node.outputs[0].shape = _transposed(node.outputs[0].shape)
        for position, value in enumerate(node.inputs):
            array = constant(value)
            if array is not None and value is not None and array.size > 1:
                shaped = new_constant(graph, np.reshape(array, (-1, 1, 1)), f"{value.name}_channels")
                node.replace_input_with(position, shaped)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    moved.name = fresh_name(graph, f"{source.name}_channels_first")
    return True


def _transposed(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([shape[axis] for axis in _TO_NCHW])
