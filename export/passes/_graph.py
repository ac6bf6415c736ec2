"""What several passes ask of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "after",
    "constant",
    "drop_unread",
    "flag",
    "fresh_name",
    "like",
    "new_constant",
    "readers",
    "require_flat",
    "scalar",
]


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the content of an initializer or of a ``Constant`` node; ``None`` for anything computed."""
    if value is None or (value.is_graph_input() and not value.is_initializer()):
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return a constant of one element as a number."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value, each once, in no order that matters."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def flag(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of an attribute: a number, text, or a list of numbers."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    value = attribute.value
    return list(value) if isinstance(value, (list, tuple)) else value


def fresh_name(graph: ir.Graph, stem: str) -> str:
    """Return a name that no value of the graph has."""
    taken = set(graph.initializers) | {value.name for value in graph.inputs}
    taken |= {output.name for node in graph for output in node.outputs}
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def new_constant(graph: ir.Graph, array: NDArray[Any], stem: str) -> ir.Value:
    """Add an initializer and return it."""
    name = fresh_name(graph, stem)
    tensor = ir.Tensor(np.asarray(array, order="C"), name=name)
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
    graph.register_initializer(value)
    return value


def after(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    stem: str,
) -> ir.Value:
    """Insert a node of one output behind ``node`` and return that output."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    made = ir.node(op_type, inputs, attributes)
    made.outputs[0].name = fresh_name(graph, stem)
    graph.insert_after(node, made)
    return made.outputs[0]


def like(value: ir.Value, other: ir.Value) -> ir.Value:
    """Give a value the dtype and shape of another one, and return it.

    The type is made anew: two values that share one would change together.
    """
    value.type = None if other.dtype is None else ir.TensorType(other.dtype)
    value.shape = None if other.shape is None else ir.Shape(list(other.shape))
    return value


def drop_unread(graph: ir.Graph) -> int:
    """Remove nodes and initializers that nobody reads; return how many."""
    dropped = 0
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
            dropped += 1
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
            dropped += 1
    return dropped


def require_flat(model: ir.Model) -> None:
    """Refuse functions and subgraphs.

    Raises:
        PreconditionError: there is one.
    """
    nested = next((node for node in model.graph if any(_graphs(node))), None)
    if nested is not None:
        raise ir.passes.PreconditionError(f"the node {nested.name!r} ({nested.op_type}) holds a graph")
    if model.functions:
        raise ir.passes.PreconditionError(f"the model has {len(model.functions)} functions")


def _graphs(node: ir.Node) -> list[bool]:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return [True for attribute in node.attributes.values() if attribute.type in kinds]
