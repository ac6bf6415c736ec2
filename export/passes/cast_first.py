"""Cast bytes to float before anything else is done with them."""

from __future__ import annotations

import onnx_ir as ir

from ._graph import fresh_name, readers, require_flat

__all__ = ["CastFirst"]

_MOVING = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_BYTES = ir.DataType.UINT8


class CastFirst(ir.passes.InPlacePass):
    """Move casts of uint8 inputs above what only moves data in between; exact.

    TensorRT takes uint8 for inputs of a network and lets nothing but a cast read them.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move every cast of the case."""
        moved = False
        for value in list(model.graph.inputs):
            if value.dtype == _BYTES:
                for node in readers(value):
                    moved |= _lower(model.graph, value, node)
        return ir.passes.PassResult(model, modified=moved)

    def ensures(self, model: ir.Model) -> None:
        """Find a cast behind every uint8 input, and nothing else."""
        for value in model.graph.inputs:
            other = next((node for node in readers(value) if node.op_type != "Cast"), None)
            if value.dtype == _BYTES and other is not None:
                raise ir.passes.PostconditionError(
                    f"the input {value.name!r} is read by {other.op_type} {other.name!r} before a cast"
                )


def _lower(graph: ir.Graph, value: ir.Value, first: ir.Node) -> bool:
    """Move the cast at the end of a chain of moving nodes to its start."""
    chain: list[ir.Node] = []
    node = first
    while (
        node.op_type in _MOVING and len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()
    ):
        chain.append(node)
        (node,) = readers(node.outputs[0])
    if not chain or node.op_type != "Cast":
        return False
    end, last = node.outputs[0], chain[-1].outputs[0]
    wanted = ir.DataType(node.attributes["to"].value)
    kind, name, is_output = ir.TensorType(wanted), end.name, end.is_graph_output()
    end.replace_all_uses_with(last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.shape = end.shape if last.shape is None else last.shape
    if is_output:
        last.name = name
    cast = ir.node("Cast", [value], {"to": wanted})
    single = cast.outputs[0]
    single.name, single.type, single.shape = fresh_name(graph, f"{value.name}_float"), kind, value.shape
    graph.insert_before(chain[0], cast)
    chain[0].replace_input_with(0, single)
    for moving in chain:
        # A type without a shape is not valid in a file; the checker infers both.
        moving.outputs[0].type = None if moving.outputs[0].shape is None else kind
    return True
