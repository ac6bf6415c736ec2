"""Put QuantizeLinear and DequantizeLinear around products with constant weights (Jacob et al. 2018).

Which nodes, in which form and with which ranges are values, see :mod:`edgeclip.quantization`; this pass
chooses none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeclip.quantization import (
    CPU,
    Int8Policy,
    Ranges,
    RoundedWeight,
    Scheme,
    activation_step,
    weight_steps,
)

from ._graph import after, constant, drop_unread, flag, fresh_name, new_constant, readers, require_flat

__all__ = ["InsertQdq", "channel_axis", "clamped", "observed", "place", "steps_of"]

_LEAST_OPSET = 13  # scales for each index of an axis
_CLAMPS = ("Relu", "Clip")
_LARGEST_BIAS = 1 << 30
_SHARE = 8  # of its products at most a tower keeps in float behind its stem


def place(model: ir.Model, policy: Int8Policy) -> tuple[str, ...]:
    """Return what a policy quantizes: the outputs of those nodes, in their order.

    Args:
        model: float32 graph with shapes.
        policy: what stays float.
    """
    first = _first(model.graph, policy)
    return tuple(
        node.outputs[0].name or ""
        for node in model.graph
        if node.op_type in policy.ops
        and is_product(node)
        and node not in first
        and node.outputs[0].name not in policy.keep_float
        and (policy.pooled or not _is_pooled(node, model.graph))
    )


def is_product(node: ir.Node) -> bool:
    """Whether a node is a product of an activation with a constant weight that has a known channel axis."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2 or node.inputs[0] is None:
        return False
    if constant(node.inputs[0]) is not None:
        return False
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
        return False
    if node.op_type == "Conv":
        return True
    if node.op_type == "Gemm":
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        is_plain = (flag(node, "alpha", 1.0), flag(node, "beta", 1.0), flag(node, "transA", 0)) == (1, 1, 0)
        return is_plain and (bias is None or bias.shape == (weight.shape[channel_axis(node)],))
    return weight.ndim == 2


def channel_axis(node: ir.Node) -> int:
    """Return the axis of a weight that has one index an output channel."""
    return 0 if node.op_type == "Conv" or flag(node, "transB", 0) else 1


def _first(graph: ir.Graph, policy: Int8Policy) -> list[ir.Node]:
    """Return the first products of a picture's tower that stay float; none where the input is no picture."""
    if policy.stem or not graph.inputs or graph.inputs[0].shape is None or graph.inputs[0].shape.rank() != 4:
        return []
    products = [node for node in graph if is_product(node)]
    return products[: 1 + min(policy.entry, len(products) // _SHARE)]


def _is_pooled(node: ir.Node, graph: ir.Graph) -> bool:
    """Whether a product is with one vector a picture or text."""
    source = node.inputs[0]
    assert source is not None
    if source.shape is None:
        return False
    sizes = list(source.shape)
    if node.op_type == "Conv":
        return all(size == 1 for size in sizes[2:])
    batch = graph.inputs[0].shape
    # Rows of tokens that were made one long list are not pooled: their first axis is not the batch.
    return len(sizes) == 2 and batch is not None and str(sizes[0]) == str(batch[0])


def observed(model: ir.Model, nodes: Iterable[str], scheme: Scheme = CPU) -> tuple[str, ...]:
    """Return the tensors whose ranges are needed to quantize nodes, each once, in the order of the graph."""
    chosen = set(nodes)
    names: dict[str, None] = {}
    for node in model.graph:
        if node.outputs[0].name in chosen:
            source = node.inputs[0]
            assert source is not None
            names[source.name or ""] = None
            if scheme.integer_outputs and node.op_type == "Conv":
                names[clamped(node.outputs[0]).name or ""] = None
    return tuple(names)


def clamped(value: ir.Value) -> ir.Value:
    """Return the value after a clamp that is all that reads this one: engines fold it into the rounding."""
    reading = readers(value)
    if value.is_graph_output() or len(reading) != 1 or reading[0].op_type not in _CLAMPS:
        return value
    return reading[0].outputs[0]


def steps_of(
    node: ir.Node,
    weight: NDArray[np.float32],
    scheme: Scheme,
    *,
    least: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.float32]:
    """Return the scale of each output channel of a product's weight, ``(channels,)``."""
    groups = int(flag(node, "group", 1))
    return weight_steps(weight, channel_axis(node), scheme, least=least, groups=groups)


class InsertQdq(ir.passes.InPlacePass):
    """Quantize products with constant weights.

    Weights become int8, symmetric, with a scale an output channel, followed by DequantizeLinear. What goes
    into a product is rounded by a pair of QuantizeLinear and DequantizeLinear, one for all its int8 readers;
    other readers keep the exact value. With ``integer_outputs`` convolutions also round what they give, for
    all readers, and biases are int32 in units of both scales. Zero points are always written out: engines
    that turn signed weights into unsigned ones want them.

    Args:
        nodes: outputs of the nodes to quantize.
        ranges: of every tensor that :func:`observed` names.
        scheme: what int8 means.
        rounded: weights in integers, by what their product gives; the rest get the nearest levels.
    """

    def __init__(
        self,
        nodes: Iterable[str],
        ranges: Ranges,
        scheme: Scheme = CPU,
        rounded: Mapping[str, RoundedWeight] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.nodes, self.ranges, self.scheme, self.rounded = tuple(nodes), ranges, scheme, rounded
        self._pairs: dict[str, ir.Value] = {}
        self._scales: dict[str, np.float32] = {}
        self._weights: dict[tuple[str, int], tuple[ir.Value, NDArray[np.float32]]] = {}
        self._known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def requires(self, model: ir.Model) -> None:
        """Refuse old opsets, graphs that are quantized already, and nodes or ranges that are missing."""
        require_flat(model)
        opset = model.opset_imports.get("", 0)
        if opset < _LEAST_OPSET:
            raise ir.passes.PreconditionError(f"opset {opset}, expected at least {_LEAST_OPSET}")
        there = next((node for node in model.graph if node.op_type.endswith("QuantizeLinear")), None)
        if there is not None:
            raise ir.passes.PreconditionError(f"it is quantized already, at {there.outputs[0].name!r}")
        made = {node.outputs[0].name: node for node in model.graph}
        for name in self.nodes:
            if name not in made or not is_product(made[name]):
                raise ir.passes.PreconditionError(f"{name!r} is no product with a constant weight")
        missing = [name for name in observed(model, self.nodes, self.scheme) if name not in self.ranges]
        if missing:
            raise ir.passes.PreconditionError(f"{missing[0]!r} has no range ({len(missing)} have none)")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantize every node."""
        graph = model.graph
        chosen = set(self.nodes)
        products = [node for node in graph if node.outputs[0].name in chosen]
        if self.scheme.integer_outputs:
            for node in products:
                value = clamped(node.outputs[0])
                if node.op_type == "Conv" and not value.is_graph_output():
                    self._round_for_all(value, graph)
        for node in products:
            source = node.inputs[0]
            assert source is not None
            node.replace_input_with(0, self._rounded(source, graph))
            self._quantize_weight(node, graph)
        drop_unread(graph)
        return ir.passes.PassResult(model, modified=bool(products))

    def ensures(self, model: ir.Model) -> None:
        """Find every node between DequantizeLinear nodes."""
        chosen = set(self.nodes)
        for node in model.graph:
            if node.outputs[0].name in chosen:
                for value in node.inputs[:2]:
                    producer = None if value is None else value.producer()
                    if producer is None or producer.op_type != "DequantizeLinear":
                        raise ir.passes.PostconditionError(f"{node.outputs[0].name!r} is not quantized")

    def _round_for_all(self, value: ir.Value, graph: ir.Graph) -> None:
        """Round a value for everything that reads it: an engine fuses a node that has one reader."""
        uses = list(value.uses())
        rounded = self._rounded(value, graph)
        for use in uses:
            use.node.replace_input_with(use.idx, rounded)

    def _rounded(self, value: ir.Value, graph: ir.Graph) -> ir.Value:
        """Return what dequantizes a value, made at its first use."""
        name = value.name or ""
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            return value
        if name not in self._pairs:
            scale, zero = activation_step(self.ranges[name], self.scheme)
            kind = np.int8 if self.scheme.signed else np.uint8
            inputs = [
                new_constant(graph, np.asarray(scale), f"{name}_scale"),
                self._zeros(graph, np.asarray(zero, kind), name),
            ]
            if producer is None:
                quantize = ir.node("QuantizeLinear", [value, *inputs])
                graph.insert_before(graph[0], quantize)
                stored = quantize.outputs[0]
                stored.name = fresh_name(graph, f"{name}_q")
            else:
                stored = after(producer, "QuantizeLinear", [value, *inputs], stem=f"{name}_q")
            made = stored.producer()
            assert made is not None
            rounded = after(made, "DequantizeLinear", [stored, *inputs], stem=f"{name}_dq")
            stored.shape = rounded.shape = value.shape
            stored.dtype, rounded.dtype = ir.DataType.from_numpy(np.dtype(kind)), ir.DataType.FLOAT
            self._pairs[name] = rounded
            self._scales[rounded.name or ""] = scale
        return self._pairs[name]

    def _quantize_weight(self, node: ir.Node, graph: ir.Graph) -> None:
        """Give a node its weight and its bias in integers."""
        weight, axis = node.inputs[1], channel_axis(node)
        rounded = node.inputs[0]
        assert weight is not None
        assert rounded is not None
        step = self._scales[rounded.name or ""]
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        key = (weight.name or "", axis)
        if key not in self._weights:
            # A channel whose weights are next to nothing must not make its bias overflow.
            least = np.abs(bias) / (np.float64(step) * _LARGEST_BIAS) if bias is not None else np.zeros(())
            self._weights[key] = self._weight(weight, axis, least, node, graph)
        value, scale = self._weights[key]
        node.replace_input_with(1, value)
        if bias is not None and self.scheme.integer_outputs:
            unit = (scale * step).astype(np.float32)
            integers = np.rint(bias / unit.astype(np.float64)).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)
            made = self._dequantized(node, integers, unit, 0, "bias", graph)
            node.replace_input_with(2, made)

    def _weight(
        self, weight: ir.Value, axis: int, least: NDArray[np.float64], node: ir.Node, graph: ir.Graph
    ) -> tuple[ir.Value, NDArray[np.float32]]:
        """Return a weight from int8 and its scales."""
        array = constant(weight)
        assert array is not None
        scale = steps_of(node, array, self.scheme, least=least)
        shape = [-1 if each == axis else 1 for each in range(array.ndim)]
        limit = self.scheme.weight_limit
        integers = np.rint(array / scale.reshape(shape)).clip(-limit, limit).astype(np.int8)
        given = self.rounded.get(node.outputs[0].name or "")
        if given is not None:
            same = (given.steps == scale).reshape(shape)  # but where a bias wanted a larger step
            integers = np.where(same, given.integers, integers)
        return self._dequantized(node, integers, scale, axis, "weight", graph), scale

    def _dequantized(
        self,
        node: ir.Node,
        integers: NDArray[np.generic],
        scale: NDArray[np.float32],
        axis: int,
        kind: str,
        graph: ir.Graph,
    ) -> ir.Value:
        """Return a constant stored as integers, dequantized in front of its reader.

        It is named after what its reader gives: those names are short, and a file holds each eight times.
        """
        name = f"{node.outputs[0].name}_{kind}"
        stored = new_constant(graph, integers, f"{name}_q")
        inputs = [
            stored,
            new_constant(graph, scale, f"{name}_scale"),
            self._zeros(graph, np.zeros(len(scale), integers.dtype), name),
        ]
        made = ir.node("DequantizeLinear", inputs, {"axis": axis})
        value = made.outputs[0]
        value.name = fresh_name(graph, f"{name}_dq")
        value.shape, value.dtype = ir.Shape(integers.shape), ir.DataType.FLOAT
        graph.insert_before(node, made)
        return value

    def _zeros(self, graph: ir.Graph, zeros: NDArray[np.generic], stem: str) -> ir.Value:
        """Return zero points: one tensor for all that are equal, and signed bytes each their own.

        ONNX Runtime's exact kernels make signed weights unsigned, and their zero points with them: a second
        weight with the same ones makes it fail.
        """
        if zeros.dtype == np.int8 and not self.scheme.symmetric:
            return new_constant(graph, zeros, f"{stem}_zero")
        key = (zeros.dtype.name, zeros.shape, zeros.tobytes())
        if key not in self._known:
            self._known[key] = new_constant(graph, zeros, f"zero_{zeros.dtype.name}")
        return self._known[key]
