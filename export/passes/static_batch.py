"""Fix the batch."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ._graph import require_flat

__all__ = ["StaticBatch"]


class StaticBatch(ir.passes.InPlacePass):
    """Give the free first axis of every input a size, and infer the shapes behind it.

    Args:
        size: of a batch, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def requires(self, model: ir.Model) -> None:
        """Expect inputs whose first axis is free or has that size already."""
        require_flat(model)
        if self.size < 1:
            raise ir.passes.PreconditionError(f"the batch is {self.size}, expected at least 1")
        for value in model.graph.inputs:
            first = value.shape[0] if value.shape is not None and len(value.shape) else None
            if not isinstance(first, ir.SymbolicDim) and first != self.size:
                raise ir.passes.PreconditionError(
                    f"the first axis of {value.name!r} is {first}, expected a free one or {self.size}"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fix it."""
        graph = model.graph
        free = [value for value in graph.inputs if value.shape is not None and not value.shape.is_static()]
        names = {value.shape[0] for value in free if value.shape is not None}
        for value in (*free, *graph.outputs):
            if value.shape is not None:
                value.shape = ir.Shape([self.size if dim in names else dim for dim in value.shape])
        for node in graph:
            for output in node.outputs:
                if output.shape is not None and not output.shape.is_static():
                    output.shape = None
        common.ShapeInferencePass()(model)
        return ir.passes.PassResult(model, modified=bool(free))

    def ensures(self, model: ir.Model) -> None:
        """Find no free axis in inputs and outputs."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.shape is None or not value.shape.is_static():
                raise ir.passes.PostconditionError(f"{value.name!r} still has the shape {value.shape}")
