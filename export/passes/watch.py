"""Let a graph tell about tensors inside it: for choosing ranges, and for correcting biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from ._graph import drop_unread, new_constant, readers

__all__ = ["Told", "WatchTensors"]

Told: TypeAlias = Literal["extremes", "values", "means"]
"""What is told of tensors."""


class WatchTensors(ir.passes.InPlacePass):
    """Replace the outputs of a graph by what is told of tensors; what is not needed for that goes.

    1. ``extremes``: ``0:least``, ``0:most`` (float32 scalars) and ``0:size`` (int64) for the first tensor.
    2. ``values``: ``0``, all values of the tensor, ``(size,)``.
    3. ``means``: ``0``, the mean of each channel: of axis 1 of what a convolution reads or gives, else of the
       last axis.

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
                flat = new_constant(graph, np.array([-1], np.int64), f"{place}_flat")
                self._give(graph, "Reshape", [value, flat], str(place), shape=[f"size_{place}"])
            else:
                self._give_mean(graph, value, str(place))
        drop_unread(graph)
        return ir.passes.PassResult(model, modified=True)

    def _give_mean(self, graph: ir.Graph, value: ir.Value, output: str) -> None:
        assert value.shape is not None
        rank = value.shape.rank()
        producer = value.producer()
        around = [*readers(value), *([] if producer is None else [producer])]
        channel = 1 if any(node.op_type == "Conv" for node in around) else rank - 1
        axes = np.array([axis for axis in range(rank) if axis != channel], np.int64)
        size = value.shape[channel]
        shape = [size if isinstance(size, int) else f"channels_{output}"]
        if (graph.opset_imports.get("") or 0) >= 18:
            constant = new_constant(graph, axes, f"{output}_axes")
            self._give(graph, "ReduceMean", [value, constant], output, shape=shape, keepdims=0)
        else:
            self._give(graph, "ReduceMean", [value], output, shape=shape, keepdims=0, axes=axes.tolist())

    @staticmethod
    def _give(
        graph: ir.Graph,
        op_type: str,
        inputs: Sequence[ir.Value],
        output: str,
        *,
        shape: Sequence[int | str] = (),
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int | list[int],
    ) -> None:
        node = ir.node(op_type, inputs, attributes)
        made = node.outputs[0]
        made.name, made.dtype = output, dtype
        made.shape = ir.Shape(shape)
        graph.append(node)
        graph.outputs.append(made)


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    return {value.name: value for value in values if value.name}
