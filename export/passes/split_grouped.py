"""Make depthwise convolutions of grouped ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ._graph import constant, drop_unread, flag, fresh_name, like, new_constant, readers, require_flat

__all__ = ["SplitGrouped"]

Order = NDArray[np.intp]
_CHANNELWISE = frozenset(
    {
        "Clip",
        "Erf",
        "Gelu",
        "GlobalAveragePool",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Relu",
        "Sigmoid",
        "Tanh",
    }
)
_SPATIAL = [2, 3]


class SplitGrouped(ir.passes.InPlacePass):
    """Write a convolution with one input and k outputs a group as k depthwise ones and a ``Concat``; exact.

    ONNX Runtime has fast kernels for depthwise convolutions only; a group with two outputs goes through
    matrices of one row. The ``Concat`` brings the channels in another order, and that order goes into the
    weights behind it: convolutions, products, and the branch of a squeeze-and-excitation. Where it cannot,
    the convolution stays as it is.

    Attributes:
        split: how many the last call split.
    """

    split = 0

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Split every convolution of the case."""
        self.split = 0
        for node in list(model.graph):
            order = _order(node)
            if order is None:
                continue
            plan = _Plan(order)
            if plan.follow(node.outputs[0]):
                plan.apply(model.graph)
                _divide(model.graph, node)
                self.split += 1
        if self.split:
            drop_unread(model.graph)
        return ir.passes.PassResult(model, modified=bool(self.split))


def _order(node: ir.Node) -> Order | None:
    """Return which old channel each new one is, for a convolution of the case."""
    if node.op_type != "Conv" or (groups := flag(node, "group", 1)) == 1:
        return None
    weight, bias = constant(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or weight.shape[1] != 1 or weight.shape[0] == groups:
        return None
    if bias is not None and constant(bias) is None:
        return None
    return np.arange(weight.shape[0]).reshape(groups, -1).T.reshape(-1)


@dataclass
class _Plan:
    """Weights to bring into another order so that a value may be in that order.

    Attributes:
        order: which old channel each new one is.
        edits: node, input and axis of each.
    """

    order: Order
    edits: list[tuple[ir.Node, int, int]] = field(default_factory=list)
    moved: set[ir.Value] = field(default_factory=set)

    def follow(self, value: ir.Value) -> bool:
        """Follow a value to everything that reads it; return whether all of it can take the order."""
        if value in self.moved:
            return True
        self.moved.add(value)
        if value.is_graph_output():
            return False
        return all(self._read(node, value) for node in readers(value))

    def _read(self, node: ir.Node, value: ir.Value) -> bool:
        kind, index = node.op_type, list(node.inputs).index(value)
        if kind in _CHANNELWISE or (kind == "ReduceMean" and _is_spatial(node)):
            return index == 0 and self.follow(node.outputs[0])
        if kind == "Conv" and index == 0:
            return self._convolution(node)
        if kind == "Gemm" and index == 0 and not flag(node, "transA", 0):
            return self._edit(node, 1, 1 if flag(node, "transB", 0) else 0)
        if kind in ("Add", "Mul") and len(set(node.inputs)) == 2:
            return self._operand(node, 1 - index) and self.follow(node.outputs[0])
        return False

    def _convolution(self, node: ir.Node) -> bool:
        groups = flag(node, "group", 1)
        if groups == 1:
            return self._edit(node, 1, 1)
        weight = constant(node.inputs[1])
        if weight is None or weight.shape[0] != groups or groups != len(self.order):
            return False
        return self._rows(node) and self.follow(node.outputs[0])

    def _operand(self, node: ir.Node, index: int) -> bool:
        """Bring the other operand of a sum or product into the order."""
        value = node.inputs[index]
        if value is None:
            return False
        array = constant(value)
        if array is not None:
            along = array.size == 1 or (array.ndim >= 3 and array.shape[-3] == array.size)
            return along and (array.size == 1 or self._edit(node, index, array.ndim - 3))
        return value in self.moved or self._source(value)

    def _source(self, value: ir.Value) -> bool:
        """Let a value be made in the order: it comes from a convolution through channelwise operators."""
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return False
        if node.op_type in _CHANNELWISE and node.inputs[0] is not None:
            self.moved.add(value)
            return self._source(node.inputs[0])
        if node.op_type == "Conv" and flag(node, "group", 1) == 1 and value not in self.moved:
            self.moved.add(value)
            return self._rows(node)
        return False

    def _rows(self, node: ir.Node) -> bool:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return self._edit(node, 1, 0) and (bias is None or self._edit(node, 2, 0))

    def _edit(self, node: ir.Node, index: int, axis: int) -> bool:
        array = constant(node.inputs[index])
        if array is None or axis >= array.ndim or array.shape[axis] != len(self.order):
            return False
        self.edits.append((node, index, axis))
        return True

    def apply(self, graph: ir.Graph) -> None:
        """Make the edits."""
        for node, index, axis in self.edits:
            value = node.inputs[index]
            array = constant(value)
            assert value is not None
            assert array is not None
            ordered = np.take(array, self.order, axis=axis)
            node.replace_input_with(index, new_constant(graph, ordered, f"{value.name}_ordered"))


def _is_spatial(node: ir.Node) -> bool:
    said = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = flag(node, "axes", []) if said is None else [int(axis) for axis in said.reshape(-1)]
    return sorted(axis % 4 for axis in axes) == _SPATIAL


def _divide(graph: ir.Graph, node: ir.Node) -> None:
    groups = flag(node, "group", 1)
    weight, bias = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None
    times, output = weight.shape[0] // groups, node.outputs[0]
    parts: list[ir.Node] = []
    for part in range(times):
        inputs = [node.inputs[0], new_constant(graph, weight[part::times], f"{output.name}_weight_{part}")]
        if bias is not None:
            inputs.append(new_constant(graph, bias[part::times], f"{output.name}_bias_{part}"))
        made = ir.Node("", "Conv", inputs, dict(node.attributes), num_outputs=1)
        made.outputs[0].name = fresh_name(graph, f"{output.name}_part_{part}")
        like(made.outputs[0], output)
        if output.shape is not None:
            made.outputs[0].shape = ir.Shape([output.shape[0], groups, *list(output.shape)[2:]])
        parts.append(made)
    whole = ir.node("Concat", [part.outputs[0] for part in parts], {"axis": 1})
    graph.insert_after(node, [*parts, whole])
    result = whole.outputs[0]
    like(result, output)
    output.replace_all_uses_with(result)
    graph.remove(node, safe=True)
    result.name = output.name
