"""Keep in float what is to stay float between int8 neighbours."""

from __future__ import annotations

import onnx_ir as ir

from ._graph import after, constant, like, readers, require_flat

__all__ = ["KeepFloat"]

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm"})
_CLAMPS = frozenset({"Relu", "Clip"})


class KeepFloat(ir.passes.InPlacePass):
    """Put a step that does nothing behind float products between DequantizeLinear and QuantizeLinear.

    ONNX Runtime (from 1.21 on, ``WeightBiasQuantization``) takes such a product for one that somebody forgot:
    it rounds its weight to int8 with *one* scale, and computes it in integers. What was left in float because
    int8 costs too much there costs even more than with a scale a channel. The step is a ``LeakyRelu`` of
    slope 1, which is exact, not removed as an identity is, and computed within the convolution.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Protect every such product."""
        found = [node for node in model.graph if _is_taken(node)]
        for node in found:
            value = node.outputs[0]
            uses = list(value.uses())
            same = like(after(node, "LeakyRelu", [value], {"alpha": 1.0}, stem=f"{value.name}_float"), value)
            for use in uses:
                use.node.replace_input_with(use.idx, same)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Find no such product."""
        left = next((node for node in model.graph if _is_taken(node)), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"{left.outputs[0].name!r} would be rounded by ONNX Runtime")


def _is_taken(node: ir.Node) -> bool:
    """Whether ONNX Runtime would round the weight of a node."""
    if node.op_type not in _PRODUCTS or constant(node.inputs[1]) is None:
        return False
    source = node.inputs[0]
    before = None if source is None else source.producer()
    if before is None or before.op_type != "DequantizeLinear":
        return False
    value = node.outputs[0]
    while not value.is_graph_output() and len(following := readers(value)) == 1:
        if following[0].op_type == "QuantizeLinear":
            return True
        if following[0].op_type not in _CLAMPS:
            return False
        value = following[0].outputs[0]
    return False
