"""Take the tanh form of GELU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from ._graph import drop_unread, flag, fresh_name, like, readers, require_flat, scalar

__all__ = ["GeluTanh"]

_GELU_OPSET = 20  # has an operator for it
_CLOSE = 1e-4  # of a constant, relative


class GeluTanh(ir.passes.InPlacePass):
    """Replace the exact form of GELU by its tanh form (Hendrycks & Gimpel 2016, §2), which is faster.

    They differ by at most 5e-4 a value. Cases:

    1. ``Gelu`` with ``approximate="none"``;
    2. its decomposition through ``Erf``, however its products are ordered: half of x times 1 + erf(x/√2).

    Before opset 20, which has no node for it, nothing is replaced: ONNX Runtime makes one node of the exact
    decomposition and runs that of the tanh form as the eight nodes it is.

    Attributes:
        replaced: how many the last call replaced.
    """

    replaced = 0

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every GELU of the cases."""
        self.replaced = 0
        for node in list(model.graph) if _has_gelu(model) else ():
            if node.op_type == "Gelu" and flag(node, "approximate", "none") == "none":
                node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
                self.replaced += 1
            elif node.op_type == "Erf" and (found := _exact(node)) is not None:
                _replace(model.graph, found)
                self.replaced += 1
        if self.replaced:
            drop_unread(model.graph)
        return ir.passes.PassResult(model, modified=bool(self.replaced))

    def ensures(self, model: ir.Model) -> None:
        """Find no exact GELU left."""
        for node in model.graph if _has_gelu(model) else ():
            exact = node.op_type == "Gelu" and flag(node, "approximate", "none") == "none"
            if exact or (node.op_type == "Erf" and _exact(node) is not None):
                raise ir.passes.PostconditionError(f"{node.name!r} is still the exact form")


@dataclass(frozen=True)
class _Exact:
    """A decomposed GELU: of ``x``, ending in ``last``."""

    x: ir.Value
    last: ir.Node


def _exact(erf: ir.Node) -> _Exact | None:
    x = _scaled(erf.inputs[0], 1 / math.sqrt(2))
    plus = _only_reader(erf.outputs[0], "Add")
    if x is None or plus is None or _other(plus, erf.outputs[0], 1.0) is None:
        return None
    # Of x, ½ and 1 + erf two products are made, in any order; ½ may also have gone into x before.
    last, factor, seen = plus, 1.0, 0
    while seen < 2 and (product := _only_reader(last.outputs[0], "Mul")) is not None:
        others = [value for value in product.inputs if value is not last.outputs[0]]
        if len(others) != 1:
            break
        if (number := scalar(others[0])) is not None:
            factor *= number
        elif others[0] is x:
            seen += 2
        elif _scaled(others[0], 0.5) is x:
            factor *= 0.5
            seen += 2
        else:
            return None
        last = product
        if seen == 2 and _near(factor, 0.5):
            return _Exact(x, last)
        if seen == 2:
            final = _only_reader(last.outputs[0], "Mul")
            rest = None if final is None else _other(final, last.outputs[0], 0.5 / factor)
            return None if final is None or rest is None else _Exact(x, final)
    return None


def _near(number: float, wanted: float) -> bool:
    return abs(number - wanted) <= _CLOSE * abs(wanted)


def _scaled(value: ir.Value | None, factor: float) -> ir.Value | None:
    """Return what ``value`` is ``factor`` times of."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    number = scalar(second)
    if number is not None and number and _near(1 / number if node.op_type == "Div" else number, factor):
        return first
    if node.op_type == "Mul" and (number := scalar(first)) is not None and _near(number, factor):
        return second
    return None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    reading = readers(value)
    if value.is_graph_output() or len(reading) != 1 or reading[0].op_type != op_type:
        return None
    return reading[0]


def _other(node: ir.Node, known: ir.Value, wanted: float) -> ir.Value | None:
    """Return the constant operand of a node whose other operand is ``known``, if it has that value."""
    for value in node.inputs:
        if value is not known and (number := scalar(value)) is not None and _near(number, wanted):
            return value
    return None


def _has_gelu(model: ir.Model) -> bool:
    return model.opset_imports.get("", 0) >= _GELU_OPSET


def _replace(graph: ir.Graph, found: _Exact) -> None:
    output = found.last.outputs[0]
    gelu = ir.node("Gelu", [found.x], {"approximate": "tanh"})
    graph.insert_after(found.last, gelu)
    result, name = like(gelu.outputs[0], found.x), output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    output.name = fresh_name(graph, f"{name}_exact")
    result.name = name
