"""Write means over both spatial axes as pooling."""

from __future__ import annotations

import onnx_ir as ir

from ._graph import constant, drop_unread, flag, like, require_flat

__all__ = ["PoolMean"]

_RANK = 4


class PoolMean(ir.passes.InPlacePass):
    """Replace ``ReduceMean`` over the two spatial axes that keeps them by ``GlobalAveragePool``.

    The same sum in another order. ONNX Runtime pools in the blocked layout of its convolutions, and integer
    kernels exist for it; a mean would first be brought back to NCHW.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every mean of the case."""
        found = [node for node in model.graph if _is_spatial_mean(node)]
        for node in found:
            pool = ir.node("GlobalAveragePool", [node.inputs[0]])
            model.graph.insert_after(node, pool)
            old, new = node.outputs[0], pool.outputs[0]
            like(new, old).name = old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        if found:
            drop_unread(model.graph)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        """Find none left."""
        left = next((node.name for node in model.graph if _is_spatial_mean(node)), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"{left!r} is still a ReduceMean")


def _is_spatial_mean(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or flag(node, "keepdims", 1) != 1:
        return False
    data = node.inputs[0]
    if data is None or data.shape is None or len(data.shape) != _RANK:
        return False
    said = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = flag(node, "axes", []) if said is None else [int(axis) for axis in said.reshape(-1)]
    return sorted(axis % _RANK for axis in axes) == [2, 3]
