"""Correct biases for what rounding the weights in front of them does on average (Nagel et al. 2019, §4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeclip.quantization import CPU, RoundedWeight, Scheme, rounded_weight

from ._graph import constant, flag, new_constant, readers
from .qdq import channel_axis, is_product, steps_of

__all__ = ["CorrectBiases", "corrected"]


def corrected(model: ir.Model, nodes: Iterable[str]) -> dict[str, str]:
    """Return products that a correction can be added to, and the tensor that goes into each, by output name.

    A product has a bias, or is a convolution or a Gemm that may get one, or a MatMul with nothing but the
    addition of a vector behind it.
    """
    chosen = set(nodes)
    found: dict[str, str] = {}
    for node in model.graph:
        if node.outputs[0].name in chosen and is_product(node):
            source = node.inputs[0]
            if source is not None and (node.op_type != "MatMul" or _addition(node) is not None):
                found[node.outputs[0].name or ""] = source.name or ""
    return found


class CorrectBiases(ir.passes.InPlacePass):
    """Add to biases what rounded weights take off their product on average: ``(W - round(W)) E[x]``.

    1. Conv and Gemm: their own bias, which is made where there is none.
    2. MatMul: the vector that is added behind it; without one it stays as it is.

    Padding is taken for values like all others. The weights themselves stay as they are: the pass that
    follows rounds them, in the same way.

    Args:
        nodes: outputs of the products that will be quantized.
        means: mean of each channel of what goes into them, by its name; see :func:`corrected`.
        scheme: what int8 means.
        rounded: weights in integers, by what their product gives; the rest get the nearest levels.
    """

    def __init__(
        self,
        nodes: Iterable[str],
        means: Mapping[str, NDArray[np.float64]],
        scheme: Scheme = CPU,
        rounded: Mapping[str, RoundedWeight] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.nodes, self.means, self.scheme, self.rounded = tuple(nodes), means, scheme, rounded

    def requires(self, model: ir.Model) -> None:
        """Ask for the mean of what goes into every product."""
        missing = [name for name in corrected(model, self.nodes).values() if name not in self.means]
        if missing:
            raise ir.passes.PreconditionError(f"{missing[0]!r} has no means ({len(missing)} have none)")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Correct every bias."""
        graph = model.graph
        sources = corrected(model, self.nodes)
        for node in list(graph):
            name = node.outputs[0].name or ""
            if name in sources:
                self._correct(node, self.means[sources[name]], graph)
        return ir.passes.PassResult(model, modified=bool(sources))

    def _correct(self, node: ir.Node, mean: NDArray[np.float64], graph: ir.Graph) -> None:
        weight, axis = constant(node.inputs[1]), channel_axis(node)
        assert weight is not None
        given = self.rounded.get(node.outputs[0].name or "")
        if given is None:
            kept = rounded_weight(weight, axis, steps_of(node, weight, self.scheme), self.scheme)
        else:
            kept = given.values
        lost = weight.astype(np.float64) - kept
        shift = _product(lost, mean, node)
        addition = _addition(node) if node.op_type == "MatMul" else None
        reader, place = (node, 2) if addition is None else addition
        old = constant(reader.inputs[place]) if len(reader.inputs) > place else None
        value = (shift if old is None else old.astype(np.float64) + shift).astype(np.float32)
        made = new_constant(graph, value, f"{node.outputs[0].name}_bias")
        if place < len(reader.inputs):
            reader.replace_input_with(place, made)
        else:
            reader.resize_inputs(place + 1)
            reader.replace_input_with(place, made)


def _product(lost: NDArray[np.float64], mean: NDArray[np.float64], node: ir.Node) -> NDArray[np.float64]:
    """Return the product of what a weight lost with the mean of its input, ``(channels,)``."""
    if node.op_type != "Conv":
        return np.asarray(lost @ mean if channel_axis(node) == 0 else mean @ lost)
    groups = int(flag(node, "group", 1))
    summed = lost.reshape(*lost.shape[:2], -1).sum(axis=2)  # over the window
    out, each = summed.shape
    parts = summed.reshape(groups, out // groups, each)
    shift: NDArray[np.float64] = np.einsum("goc,gc->go", parts, mean.reshape(groups, each))
    return shift.reshape(-1)


def _addition(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Return what adds a vector to a product, and the place of that vector, if it alone reads the product."""
    value = node.outputs[0]
    reading = readers(value)
    if value.is_graph_output() or len(reading) != 1 or reading[0].op_type != "Add":
        return None
    weight = constant(node.inputs[1])
    for place, each in enumerate(reading[0].inputs):
        vector: NDArray[Any] | None = None if each is value else constant(each)
        if vector is not None and weight is not None and vector.shape == (weight.shape[1],):
            return reading[0], place
    return None
