"""Cast weights and arithmetic to float16 where that is safe."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from ._graph import after, constant, fresh_name, new_constant, readers, require_flat

__all__ = ["MOST_LOST", "Float16", "lost"]

_HEAVY = frozenset({"Conv", "ConvTranspose", "Einsum", "Gather", "Gemm", "MatMul"})
_MOVING = frozenset(
    {"Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Expand"}
)
_ELEMENTWISE = frozenset({"Add", "Mul", "Neg", "Sub", "Where"})
_QUANTIZING = frozenset({"DequantizeLinear", "QuantizeLinear"})
# What float16 carries without a sum of squares or an exponential in it.
_SAFE = (
    _HEAVY
    | _MOVING
    | _ELEMENTWISE
    | _QUANTIZING
    | {"Clip", "Concat", "Erf", "GatherElements", "GatherND", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu"}
    | {"Max", "MaxPool", "Min", "Pad", "Relu", "Sigmoid", "Tanh"}
)
# What sums or squares: neither it nor the arithmetic around it is done in float16.
_DELICATE = frozenset(
    {"Div", "Exp", "GlobalAveragePool", "Log", "LogSoftmax", "Pow", "Reciprocal", "ReduceL2", "ReduceMean"}
    | {"ReduceSum", "ReduceSumSquare", "Softmax", "Sqrt"}
)
_POOLING = frozenset({"GlobalAveragePool", "Softmax"})  # their results are ordinary numbers again
_LARGEST = float(np.finfo(np.float16).max)
MOST_LOST = 0.01
"""Relative error of a tensor that float16 may cost; rounding alone gives 0.0003."""
_QUANTIZED_HALF_OPSET = 19  # before, scales are float32


class Float16(ir.passes.InPlacePass):
    """Cast weights and arithmetic to float16; inputs and outputs stay as they are.

    What stays float32:

    1. operators that sum, square or exponentiate: layer norms, softmax, means and the whole of a mean and
       variance chain, with the sums and products that only they read or that read them;
    2. the preprocessing: from the inputs to the first convolution or product;
    3. the L2 norm: from the last convolution or product to the outputs;
    4. every operator that is not known to be safe;
    5. convolutions and products whose weights vanish in float16, as those of a layer scale of 1e-6 do;
    6. ``QuantizeLinear`` and ``DequantizeLinear`` whose scales float16 cannot hold (those of int32 biases),
       or before opset 19, which has none in float16. All others get float16 scales and stay in place.

    Operators that only move data follow their input.

    Raises:
        ValueError: a constant overflows in float16, or types cannot be inferred.
    """

    def requires(self, model: ir.Model) -> None:
        """Refuse graphs within graphs."""
        require_flat(model)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cast."""
        common.ShapeInferencePass()(model)
        graph = model.graph
        unknown = next((out.name for node in graph for out in node.outputs if out.dtype is None), None)
        if unknown is not None:
            raise ValueError(f"the type of {unknown!r} cannot be inferred")
        kept = _kept(graph, model.opset_imports.get("", 0))
        work = _Work(graph)
        for node in list(graph):
            work.take(node, kept)
        work.restore_outputs()
        return ir.passes.PassResult(model, modified=work.changed)

    def ensures(self, model: ir.Model) -> None:
        """Find no input or output of the graph in float16."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype == ir.DataType.FLOAT16:
                raise ir.passes.PostconditionError(f"{value.name!r} became float16")


class _Work:
    """Casts one graph, node by node."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.changed = False
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def take(self, node: ir.Node, kept: set[ir.Node]) -> None:
        floats = [index for index, value in enumerate(node.inputs) if _is_float(value)]
        data = node.inputs[0] if node.inputs else None
        follows = node.op_type in _MOVING or node.op_type == "QuantizeLinear"
        single = (
            node in kept
            or (follows and data is not None and data.dtype == ir.DataType.FLOAT and constant(data) is None)
            or (not floats and node.op_type not in _QUANTIZING)
        )
        wanted = ir.DataType.FLOAT if single else ir.DataType.FLOAT16
        for index in floats:
            value = node.inputs[index]
            assert value is not None
            if value.dtype != wanted:
                node.replace_input_with(index, self._cast(value, wanted))
        if not single:
            for output in node.outputs:
                if output.dtype == ir.DataType.FLOAT:
                    output.dtype = ir.DataType.FLOAT16
                    self.changed = True

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        known = self._casts.get((value, wanted))
        if known is not None:
            return known
        self.changed = True
        array = constant(value)
        half = wanted == ir.DataType.FLOAT16
        stem = f"{value.name}_{'half' if half else 'float'}"
        if array is not None:
            made = new_constant(self.graph, _rounded(array, str(value.name)), stem)
        else:
            producer = value.producer()
            if producer is None:
                node = ir.node("Cast", [value], {"to": wanted})
                node.outputs[0].name = fresh_name(self.graph, stem)
                self.graph.insert_before(self.graph[0], node)
                made = node.outputs[0]
            else:
                made = after(producer, "Cast", [value], {"to": wanted}, stem=stem)
            made.dtype, made.shape = wanted, value.shape
        self._casts[value, wanted] = made
        return made

    def restore_outputs(self) -> None:
        """Cast outputs of the graph that became float16, under their own names."""
        for index, value in enumerate(self.graph.outputs):
            if value.dtype != ir.DataType.FLOAT16:
                continue
            producer = value.producer()
            assert producer is not None
            name, value.name = value.name, fresh_name(self.graph, f"{value.name}_half")
            single = after(producer, "Cast", [value], {"to": ir.DataType.FLOAT}, stem=str(name))
            single.dtype, single.shape = ir.DataType.FLOAT, value.shape
            self.graph.outputs[index] = single
        for name, initializer in list(self.graph.initializers.items()):
            if not initializer.uses() and not initializer.is_graph_output():
                del self.graph.initializers[name]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _rounded(array: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Return an array in float16, which must hold its largest value."""
    largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    if largest > _LARGEST:
        raise ValueError(
            f"{name!r} overflows in float16: its largest value is {largest:.3g}, expected at most "
            f"{_LARGEST:.0f}"
        )
    return array.astype(np.float16)


def _vanishes(node: ir.Node) -> bool:
    """Whether rounding loses more of a weight than it may; an overflow is an error and not this."""
    arrays = [constant(value) for value in node.inputs[:2] if _is_float(value)]
    return node.op_type in _HEAVY and any(
        MOST_LOST < lost(array) < np.inf for array in arrays if array is not None
    )


def lost(array: NDArray[np.float32]) -> float:
    """Return the relative error of an array in float16; ``inf`` where a finite value overflows."""
    finite = array[np.isfinite(array)]
    if np.abs(finite).max(initial=0.0) > _LARGEST:
        return float("inf")
    norm = float(np.linalg.norm(finite))
    return (
        float(np.linalg.norm(finite - finite.astype(np.float16).astype(np.float32))) / norm if norm else 0.0
    )


def _kept(graph: ir.Graph, opset: int) -> set[ir.Node]:
    """Return the nodes that stay float32; the numbers are those of the class."""
    nodes = list(graph)
    simple = {node for node in nodes if node.op_type in _ELEMENTWISE or _divides_by_constant(node)}
    kept = {node for node in nodes if node.op_type not in _SAFE and node not in simple}  # 4
    kept |= {node for node in nodes if _vanishes(node)}  # 5
    kept |= {node for node in nodes if node.op_type in _QUANTIZING and not _scale_fits(node, opset)}  # 6
    chain = {node for node in nodes if node.op_type in _DELICATE and node not in simple}
    for node in nodes:  # 1, downstream
        sources = {value.producer() for value in node.inputs if value is not None} - {None}
        if node in simple and any(
            source in chain and source.op_type not in _POOLING for source in sources if source is not None
        ):
            chain.add(node)
    for node in reversed(nodes):  # 1, upstream
        reading = [reader for output in node.outputs for reader in readers(output)]
        if node in simple and reading and all(reader in chain for reader in reading):
            chain.add(node)
    return kept | chain | _before(nodes) | _behind(nodes)


def _divides_by_constant(node: ir.Node) -> bool:
    return node.op_type == "Div" and constant(node.inputs[1]) is not None


def _before(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Return what is computed from the inputs alone, up to the first convolution or product (2)."""
    found: set[ir.Node] = set()
    for node in nodes:
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        if node.op_type not in _HEAVY | _QUANTIZING and all(
            value.is_graph_input() or value.producer() in found for value in computed
        ):
            found.add(node)
    return found


def _behind(nodes: list[ir.Node]) -> set[ir.Node]:
    """Return what stands between the last convolution or product and the outputs (3)."""
    found: set[ir.Node] = set()
    for node in reversed(nodes):
        if node.op_type in _HEAVY | _QUANTIZING:
            continue
        reading = [reader for output in node.outputs for reader in readers(output)]
        final = any(output.is_graph_output() for output in node.outputs)
        if (final or reading) and all(reader in found for reader in reading):
            found.add(node)
    return found


def _scale_fits(node: ir.Node, opset: int) -> bool:
    if opset < _QUANTIZED_HALF_OPSET:
        return False
    data = node.inputs[0]
    if node.op_type == "DequantizeLinear" and data is not None and data.dtype == ir.DataType.INT32:
        return False
    scale = constant(node.inputs[1])
    if scale is None:
        return False
    single = scale.astype(np.float64)
    error = np.abs(single - scale.astype(np.float16).astype(np.float64))
    return bool((error <= MOST_LOST * np.abs(single)).all())
