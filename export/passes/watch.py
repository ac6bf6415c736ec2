"""Let a graph tell about tensors inside it: for choosing ranges, and for correcting biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from ._graph import drop_unread, new_constant

__all__ = ["Told", "WatchTensors"]

Told: TypeAlias = Literal["extremes", "values", "means"]
_CHANNELS_SECOND: Final = 4  # feature maps are (batch, channels, height, width), tokens (…, channels)


class WatchTensors(ir.passes.InPlacePass):
    """Replace the outputs of a graph by what is told of tensors; what is not needed for that goes.

    1. ``extremes``: ``0:least``, ``0:most`` (float32 scalars) and ``0:size`` (int64) for the first tensor.
    2. ``values``: ``0``, the tensor itself.
    3. ``means``: ``0``, the mean of each channel: of axis 1 of feature maps, else of the last axis.

    Args:
        names: of float32 tensors.
        told: what of them.
    """

    def __init__(self, names: Sequence[str], told: Told) -> None:
        super().__init__()
        self.names, self.told = tuple(names), told

    def requires(self, model: ir.Model) -> None:
        """Ask for the tensors to be there."""
        known = _values(model.graph)
        missing = [name for name in self.names if name not in known]
        if missing:
            raise ir.passes.PreconditionError(f"it has no tensor {missing[0]!r} ({len(missing)} are missing)")
        if self.told == "means":
            shapeless = [name for name in self.names if known[name].shape is None]
            if shapeless:
                raise ir.passes.PreconditionError(f"the shape of {shapeless[0]!r} is not known")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the outputs."""
        graph = model.graph
        known = _values(graph)
        graph.outputs.clear()
        for place, name in enumerate(self.names):
            value = known[name]
            if self.told == "extremes":
                for op_type, said in (("ReduceMin", "least"), ("ReduceMax", "most")):
                    self._give(graph, op_type, [value], f"{place}:{said}", keepdims=0)
                self._give(graph, "Size", [value], f"{place}:size", dtype=ir.DataType.INT64)
            elif self.told == "values":
                self._give(graph, "Identity", [value], str(place), rank=None)
            else:
                self._give_mean(graph, value, str(place))
        drop_unread(graph)
        return ir.passes.PassResult(model, modified=True)

    def _give_mean(self, graph: ir.Graph, value: ir.Value, output: str) -> None:
        assert value.shape is not None
        rank = value.shape.rank()
        channel = 1 if rank == _CHANNELS_SECOND else rank - 1
        axes = np.array([axis for axis in range(rank) if axis != channel], np.int64)
        if (graph.opset_imports.get("") or 0) >= 18:
            constant = new_constant(graph, axes, f"{output}_axes")
            self._give(graph, "ReduceMean", [value, constant], output, rank=1, keepdims=0)
        else:
            self._give(graph, "ReduceMean", [value], output, rank=1, keepdims=0, axes=axes.tolist())

    @staticmethod
    def _give(
        graph: ir.Graph,
        op_type: str,
        inputs: Sequence[ir.Value],
        output: str,
        *,
        rank: int | None = 0,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int | list[int],
    ) -> None:
        node = ir.node(op_type, inputs, attributes)
        made = node.outputs[0]
        made.name, made.dtype = output, dtype
        made.shape = inputs[0].shape if rank is None else ir.Shape([None] * rank)
        graph.append(node)
        graph.outputs.append(made)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    return {value.name: value for value in values if value.name}
