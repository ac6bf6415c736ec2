"""Move zero padding into convolutions."""

from __future__ import annotations

import onnx_ir as ir

from ._graph import constant, drop_unread, flag, readers, require_flat, scalar

__all__ = ["FoldPadding"]


class FoldPadding(ir.passes.InPlacePass):
    """Move constant zero padding into the convolution behind it; exact.

    ``SAME`` padding of even inputs is asymmetric, which PyTorch writes as a node of its own; a Conv's
    ``pads`` can say it. Case: ``Pad(constant, 0)`` of the two spatial axes whose only reader is a Conv with
    explicit pads.

    Attributes:
        folded: how many the last call moved.
    """

    folded = 0

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every padding of the case."""
        self.folded = sum(_fold(node) for node in list(model.graph) if node.op_type == "Pad")
        dropped = drop_unread(model.graph)
        return ir.passes.PassResult(model, modified=bool(self.folded or dropped))

    def ensures(self, model: ir.Model) -> None:
        """Find no padding of the case left."""
        left = next((node.name for node in model.graph if node.op_type == "Pad" and _amounts(node)), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"the padding {left!r} is still there")


def _amounts(pad: ir.Node) -> list[int] | None:
    """Return how much a padding adds (top, left, bottom, right) where a convolution can say it."""
    output = pad.outputs[0]
    reading = readers(output)
    if output.is_graph_output() or len(reading) != 1 or reading[0].op_type != "Conv":
        return None
    if list(reading[0].inputs).count(output) != 1 or reading[0].inputs[0] is not output:
        return None
    if flag(reading[0], "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    if flag(pad, "mode", "constant") != "constant" or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return None
    if len(pad.inputs) > 2 and pad.inputs[2] is not None and scalar(pad.inputs[2]) != 0:
        return None
    said = constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if said is None or said.size != 8:
        return None
    amounts = [int(each) for each in said.reshape(-1)]
    if any(amounts[axis] for axis in (0, 1, 4, 5)) or min(amounts) < 0:
        return None
    return [amounts[2], amounts[3], amounts[6], amounts[7]]


def _fold(pad: ir.Node) -> bool:
    extra = _amounts(pad)
    if extra is None:
        return False
    conv = readers(pad.outputs[0])[0]
    before = flag(conv, "pads", [0, 0, 0, 0])
    conv.attributes.pop("auto_pad", None)
    conv.attributes["pads"] = ir.AttrInt64s(
        "pads", [one + two for one, two in zip(before, extra, strict=True)]
    )
    conv.replace_input_with(0, pad.inputs[0])
    graph = pad.graph
    assert isinstance(graph, ir.Graph)
    graph.remove(pad, safe=True)
    return True
