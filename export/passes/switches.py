"""Give every product a switch between float and simulated int8, in one graph.

What each product loses to rounding is then measured in one session: no graph is quantized a second time, and
nothing is loaded again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeclip.quantization import Scheme

from ._graph import constant, drop_unread, flag, fresh_name, like, new_constant, readers, require_flat
from .qdq import InsertQdq, clamped

__all__ = ["SWITCHES", "InsertSwitches"]

SWITCHES = "switches"
"""Input of the graph: bool ``(N,)``, one a product, in the order of the nodes that are quantized."""


class InsertSwitches(ir.passes.InPlacePass):
    """Let every product be as it is, or rounded as :class:`InsertQdq` would round it, by an input.

    The rounded form has the numbers of that pass, taken from what it makes of a copy: a pair of
    QuantizeLinear and DequantizeLinear in front, weight and bias as they are after DequantizeLinear, and
    behind a convolution with integer outputs another pair. It adds up in float32, as exact integer kernels do
    but for the order of sums.

    A switch is an ``If``, whose branches have constant weights, which ONNX Runtime packs beforehand; a weight
    that is computed it would pack on every run. Because an engine fuses nothing across an ``If``, about as
    many sections as they have products each are one ``If`` themselves: the float graph as it is, or the same
    with a switch a product. With one switch on, all sections but one run as fast as the float graph.

    Args:
        quantize: what can be switched, and how it is rounded. It sees a copy of the graph.
        before: passes that change constants of the products on the way, as the correction of biases does;
            they see the copy too.
    """

    def __init__(self, quantize: InsertQdq, *, before: Sequence[ir.passes.PassBase] = ()) -> None:
        super().__init__()
        self._quantize, self._before = quantize, before

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs, and a graph that has such an input."""
        require_flat(model)
        if any(value.name == SWITCHES for value in model.graph.inputs):
            raise ir.passes.PreconditionError(f"it has an input {SWITCHES!r} already")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Switch every product."""
        graph, scheme = model.graph, self._quantize.scheme
        quantized = model.clone()
        for each in (*self._before, self._quantize):
            quantized = each(quantized).model
        order = {name: place for place, name in enumerate(self._quantize.nodes)}
        roundings = _roundings(quantized, order, graph, scheme)
        switches = ir.Value(name=SWITCHES, shape=ir.Shape([len(order)]), type=ir.TensorType(ir.DataType.BOOL))
        graph.inputs.append(switches)
        for section in _sections(graph, roundings):
            _Section(graph, section, roundings, switches).replace()
        drop_unread(graph)
        return ir.passes.PassResult(model, modified=bool(roundings))

    def ensures(self, model: ir.Model) -> None:
        """Find a switch for every product."""
        found = {
            node.name
            for outer in model.graph
            if outer.op_type == "If"
            for node in outer.attributes["then_branch"].as_graph()
            if node.op_type == "If"
        }
        missing = [name for name in self._quantize.nodes if name not in found]
        if missing:
            raise ir.passes.PostconditionError(f"{missing[0]!r} has no switch ({len(missing)} have none)")


@dataclass(frozen=True, eq=False)
class _Steps:
    """Scale and zero point of a tensor."""

    scale: NDArray[np.float32]
    zero: NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class _Rounding:
    """What int8 changes about a product.

    Attributes:
        place: of its switch.
        source: of what goes in.
        constants: by input.
        result: of what comes out, where that is rounded.
        tail: the node that belongs to it: a clamp before that rounding, or the addition of a bias.
        tail_constants: of that node, by input.
    """

    place: int
    source: _Steps
    constants: Mapping[int, NDArray[np.float32]]
    result: _Steps | None
    tail: ir.Node | None
    tail_constants: Mapping[int, NDArray[np.float32]]


def _roundings(
    quantized: ir.Model, order: Mapping[str, int], graph: ir.Graph, scheme: Scheme
) -> dict[str, _Rounding]:
    """Return what a quantized copy of a graph does to each product."""
    made = {node.outputs[0].name: node for node in quantized.graph}
    kept = {node.outputs[0].name: node for node in graph}
    steps = {
        _name(node.inputs[0]): _steps(node) for node in quantized.graph if node.op_type == "QuantizeLinear"
    }
    found = {}
    for name, place in order.items():
        output = kept[name].outputs[0]
        end = clamped(output)
        is_rounded = scheme.integer_outputs and kept[name].op_type == "Conv" and not end.is_graph_output()
        tail = end.producer() if is_rounded and end is not output else None
        tail_constants: dict[int, NDArray[np.float32]] = {}
        following = readers(output)
        if tail is None and len(following) == 1 and following[0].op_type == "Add":
            tail_constants = _changed(following[0], made[_name(following[0].outputs[0])])
            tail = following[0] if tail_constants else None
        found[name] = _Rounding(
            place,
            _steps(_producer(made[name].inputs[0])),
            _changed(kept[name], made[name]),
            steps[_name(end)] if is_rounded else None,
            tail,
            tail_constants,
        )
    return found


def _changed(before: ir.Node, after: ir.Node) -> dict[int, NDArray[np.float32]]:
    """Return the constants of a node that are not what they were, by input."""
    found = {}
    for place, value in enumerate(after.inputs):
        array = _dequantized(value)
        if array is None:
            array = constant(value)
        old = constant(before.inputs[place]) if place < len(before.inputs) else None
        if array is not None and (old is None or not np.array_equal(array, old)):
            found[place] = array
    return found


def _sections(graph: ir.Graph, roundings: Mapping[str, _Rounding]) -> list[list[ir.Node]]:
    """Return runs of nodes that hold all products, cut where one value alone goes on if that can be."""
    wanted = max(1, round(math.sqrt(len(roundings))))
    nodes = list(graph)
    last = {id(value): len(nodes) for value in graph.outputs}
    for place, node in reversed(list(enumerate(nodes))):
        for value in node.inputs:
            if value is not None:
                last.setdefault(id(value), place)
    tails = {name: id(each.tail) for name, each in roundings.items() if each.tail is not None}
    pending: set[int] = set()
    sections: list[list[ir.Node]] = []
    current: list[ir.Node] = []
    products = live = 0
    ends: dict[int, int] = {}
    for place, node in enumerate(nodes):
        name = _name(node.outputs[0])
        products += name in roundings
        pending.discard(id(node))
        if name in tails:
            pending.add(tails[name])
        if products:
            current.append(node)
        live -= ends.pop(place, 0)
        for value in node.outputs:
            until = last.get(id(value), place)
            if until > place and constant(value) is None:
                live += 1
                ends[until] = ends.get(until, 0) + 1
        if not pending and products >= wanted and (live == 1 or products >= 3 * wanted):
            sections.append(current)
            current, products = [], 0
    if products:
        sections.append(current)
    return sections


class _Section:
    """One section of a graph, on its way into an ``If``."""

    def __init__(
        self,
        graph: ir.Graph,
        nodes: Sequence[ir.Node],
        roundings: Mapping[str, _Rounding],
        switches: ir.Value,
    ) -> None:
        self._graph, self._nodes, self._switches = graph, nodes, switches
        self._roundings = roundings
        inside = set(map(id, nodes))
        self._products = [name for node in nodes if (name := _name(node.outputs[0])) in roundings]
        self._results = [
            value
            for node in nodes
            for value in node.outputs
            if value.is_graph_output() or any(id(use.node) not in inside for use in value.uses())
        ]

    def replace(self) -> None:
        """Put the section's two forms into the place of its nodes."""
        graph, stem = self._graph, self._products[0]
        numbers = np.asarray([self._roundings[name].place for name in self._products], np.int64)
        picked = self._node(
            "Gather", [self._switches, new_constant(graph, numbers, f"{stem}_places")], "any_0"
        )
        # Older operator sets know no ReduceMax of bool.
        counted = self._node("Cast", [picked.outputs[0]], "any_1", {"to": int(ir.DataType.INT32)})
        most = self._node("ReduceMax", [counted.outputs[0]], "any_2", {"keepdims": 0})
        is_on = self._node("Cast", [most.outputs[0]], "any", {"to": int(ir.DataType.BOOL)})
        branches = {"then_branch": self._branch(is_float=False), "else_branch": self._branch(is_float=True)}
        switch = ir.node("If", [is_on.outputs[0]], branches, num_outputs=len(self._results))
        graph.insert_before(self._nodes[0], [picked, counted, most, is_on, switch])
        names = [_name(value) for value in self._results]
        for old, new in zip(self._results, switch.outputs, strict=True):
            like(new, old)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        for node in reversed(self._nodes):
            graph.remove(node, safe=True)
        for new, name in zip(switch.outputs, names, strict=True):
            new.name = name

    def _branch(self, *, is_float: bool) -> ir.Graph:
        kind = "float" if is_float else "switched"
        there: dict[ir.Value | None, ir.Value] = {}
        nodes: list[ir.Node] = []
        folded: set[int] = set()
        for node in self._nodes:
            if id(node) in folded:
                continue
            name = _name(node.outputs[0])
            if is_float or name not in self._roundings:
                nodes.append(_copy(node, there, kind))
                continue
            rounding = self._roundings[name]
            nodes += self._switched(node, rounding, there)
            if rounding.tail is not None:
                folded.add(id(rounding.tail))
        outputs = [like(there[value], value) for value in self._results]
        return _graph(f"{self._products[0]}_{kind}", nodes, outputs)

    def _switched(
        self, node: ir.Node, rounding: _Rounding, there: dict[ir.Value | None, ir.Value]
    ) -> list[ir.Node]:
        """Return the nodes for one product."""
        stem = _name(node.outputs[0])
        end = node.outputs[0] if rounding.tail is None else rounding.tail.outputs[0]
        branches = {}
        for kind in ("int8", "float"):
            local = dict(there)
            nodes: list[ir.Node] = []
            if kind == "int8":
                source = node.inputs[0]
                assert source is not None
                at = there.get(source, source)
                local[source] = self._pair(at, rounding.source, nodes, f"{stem}_in")
            nodes.append(_copy(node, local, kind))
            if kind == "int8":
                self._replace(nodes[-1], rounding.constants, stem)
            if rounding.tail is not None:
                nodes.append(_copy(rounding.tail, local, kind))
                if kind == "int8":
                    self._replace(nodes[-1], rounding.tail_constants, f"{stem}_tail")
            output = nodes[-1].outputs[0]
            if kind == "int8" and rounding.result is not None:
                output = self._pair(output, rounding.result, nodes, f"{stem}_out")
            branches[kind] = _graph(f"{stem}_{kind}", nodes, [like(output, end)])
        place = new_constant(self._graph, np.asarray([rounding.place], np.int64), f"{stem}_place")
        pick = self._node("Gather", [self._switches, place], f"{stem}_is_on")
        attributes = {"then_branch": branches["int8"], "else_branch": branches["float"]}
        switch = ir.node("If", [pick.outputs[0]], attributes, name=stem)
        switch.outputs[0].name = f"{stem}_switched"
        there[end] = like(switch.outputs[0], end)
        return [pick, switch]

    def _replace(self, node: ir.Node, constants: Mapping[int, NDArray[np.float32]], stem: str) -> None:
        if constants:
            node.resize_inputs(max(len(node.inputs), max(constants) + 1))
        for number, array in constants.items():
            node.replace_input_with(number, new_constant(self._graph, array, f"{stem}_{number}_rounded"))

    def _pair(self, value: ir.Value, steps: _Steps, nodes: list[ir.Node], stem: str) -> ir.Value:
        """Add a pair that rounds a value, and return what it gives."""
        constants = [
            new_constant(self._graph, steps.scale, f"{stem}_scale"),
            new_constant(self._graph, steps.zero, f"{stem}_zero"),
        ]
        for op_type, said in (("QuantizeLinear", "q"), ("DequantizeLinear", "dq")):
            node = ir.node(op_type, [value, *constants])
            value = node.outputs[0]
            value.name = f"{stem}_{said}"
            nodes.append(node)
        return value

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        said: str,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Node:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = fresh_name(self._graph, f"{self._products[0]}_{said}")
        return node


def _graph(name: str, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> ir.Graph:
    """Return a branch that holds the weights of its convolutions.

    ONNX Runtime takes its fast layout of convolutions (NCHWc) only where their weights are in the same graph.
    """
    owned: dict[str, ir.Value] = {}
    for node in nodes:
        if node.op_type != "Conv":
            continue
        for place, value in enumerate(node.inputs):
            array = constant(value) if place else None
            if value is None or array is None:
                continue
            own = f"{value.name}_of_{name}"
            if own not in owned:
                tensor = ir.Tensor(array, name=own)
                kind = ir.TensorType(tensor.dtype)
                owned[own] = ir.Value(name=own, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
            node.replace_input_with(place, owned[own])
    return ir.Graph([], outputs, nodes=nodes, initializers=list(owned.values()), name=name)


def _copy(node: ir.Node, there: dict[ir.Value | None, ir.Value], kind: str) -> ir.Node:
    """Return a copy that reads the values of its branch, which it adds to."""
    inputs = [there.get(value, value) for value in node.inputs]
    made = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        attributes=list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"{_name(node.outputs[0])}_{kind}",
    )
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name = f"{_name(old)}_{kind}"
        there[old] = new
    return made


def _steps(node: ir.Node) -> _Steps:
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
    assert scale is not None
    assert zero is not None
    return _Steps(scale, zero)


def _dequantized(value: ir.Value | None) -> NDArray[np.float32] | None:
    """Return a constant behind DequantizeLinear as floats; ``None`` for what is not rounded."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    stored, scale = constant(node.inputs[0]), constant(node.inputs[1])
    if stored is None or scale is None:
        return None
    axis = int(flag(node, "axis", 1))
    shape = [-1 if each == axis else 1 for each in range(stored.ndim)]
    # Zero points of weights and biases are 0.
    found: NDArray[np.float32] = stored.astype(np.float32) * scale.reshape(shape)
    return found


def _producer(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None
    return node


def _name(value: ir.Value | None) -> str:
    assert value is not None
    return value.name or ""
