"""How many multiplications and additions one picture or text costs a tower, counted from its file.

Matrix products and convolutions only, a multiplication and its addition as two: the rest is a few percent in
every tower we know, and waits for memory more than it calculates. Sizes come from the engine that belongs to
the format: ONNX Runtime's own notes of one run with every optimisation off, OpenVINO's shape inference. A
product is int8 where both of its factors come from Q/DQ.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from edgeclip.bench.feeds import TEXT_LENGTH, example_feeds
from edgeclip.errors import BackendError, InputError
from edgeclip.onnx_files import GraphNode, graph_nodes
from edgeclip.runtime.session import ModelFiles, TensorSpec, model_files

if TYPE_CHECKING:
    from edgeclip.bundle import TowerFiles

__all__ = ["Operations", "Product", "count_operations", "products_of"]

Shape = Sequence[int]


@dataclass(frozen=True)
class Operations:
    """Operations of one item of a batch.

    Attributes:
        total: multiplications and additions.
        int8: those among them whose factors are both 8-bit integers.
    """

    total: int
    int8: int


class Product(NamedTuple):
    """A matrix product or convolution of a file, with the sizes it has for one item of a batch.

    ``node`` is its name in the file, ``operations`` counts multiplications and additions, ``int8`` says that
    its factors are both 8-bit integers, and shapes are those of both factors and of what it gives.
    """

    node: str
    operations: int
    int8: bool
    factors: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved by itself."""
        weight = self.factors[1]
        inner = weight[1:2] if len(weight) == 4 else weight[1:3]  # OpenVINO: (G, O / G, C / G, …)
        return len(weight) >= 4 and all(size == 1 for size in inner) and self.output[1] > 1


def count_operations(tower: TowerFiles | Path) -> Operations:
    """Count what one item costs. Runs an ONNX tower once, which takes a little longer than a call.

    Args:
        tower: of a bundle, or an ONNX file or IR.

    Raises:
        InputError: the format, or an operator in the file, is not one whose products can be counted.
        BackendError: the engine that tells the sizes cannot load it.
    """
    products = products_of(tower)
    return Operations(
        sum(each.operations for each in products), sum(each.operations for each in products if each.int8)
    )


def products_of(tower: TowerFiles | Path) -> tuple[Product, ...]:
    """Return the products of a file in the order they run; see :func:`count_operations`."""
    model = model_files(tower)
    if model.format == "onnx" or model.model.suffix == ".onnx":  # what TensorRT builds engines from
        return _onnx_products(model)
    if model.format == "openvino":
        return _openvino_products(model)
    raise InputError(f"{model.name}: a {model.format} file does not say the sizes of its products.")


# --- ONNX -------------------------------------------------------------------------------------------------


def _convolution(inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * math.prod(inputs[1][1:])  # weight (O, C / groups, …)


def _transposed_convolution(inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])  # weight (C, O / groups, …)


def _product(inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * inputs[0][-1]


def _gemm(inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(inputs[0]) * output[-1]  # whichever factor is transposed


_Counter = Callable[[Sequence[Shape], Shape], int]
_COUNTED: Final[Mapping[str, _Counter]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "ConvTranspose": _transposed_convolution,
    "FusedConv": _convolution,
    "Gemm": _gemm,
    "MatMul": _product,
    "MatMulInteger": _product,
}
_INTEGER: Final = frozenset({"ConvInteger", "MatMulInteger"})
# Products in these are not told by the shapes of their inputs and outputs alone.
_UNCOUNTED: Final = frozenset(
    {
        *("Attention", "DeformConv", "Einsum", "FusedGemm", "FusedMatMul", "GRU", "GroupQueryAttention"),
        *("LSTM", "MatMulNBits", "MultiHeadAttention", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul"),
        *("RNN", "QMoE", "MoE", "If", "Loop", "Scan"),
    }
)
_MOVES: Final = frozenset(
    {"Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


def _onnx_products(model: ModelFiles) -> tuple[Product, ...]:
    path, name = model.model, model.name
    events, batch = _notes_of_one_run(path, name)
    nodes = graph_nodes(path)
    by_name = {node.name: node for node in nodes if node.name}
    makers = {output: node for node in nodes for output in node.outputs}
    products = []
    for event in events:
        said = event["args"]
        op = said["op_name"]
        if op in _UNCOUNTED:
            raise InputError(f"{name}: the products inside the operator {op!r} are not counted.")
        if op not in _COUNTED:
            continue
        inputs, outputs = _shapes(said["input_type_shape"]), _shapes(said["output_type_shape"])
        operations = 2 * _COUNTED[op](inputs, outputs[0])
        name_there = event["name"].removesuffix("_kernel_time")
        node = by_name.get(name_there)
        is_int8 = op in _INTEGER or (
            node is not None and all(_is_byte(each, makers) for each in node.inputs[:2])
        )
        factors = tuple(map(tuple, inputs[:2]))
        products.append(Product(name_there, operations // batch, is_int8, factors, tuple(outputs[0])))
    return tuple(products)


def _notes_of_one_run(path: Path, name: str) -> tuple[list[dict[str, Any]], int]:
    """Return what ONNX Runtime notes of every node in one run, and the batch of that run."""
    from edgeclip.runtime.ort import import_onnxruntime

    ort = import_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        # Weights that are packed for a kernel beforehand are missing among its inputs.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "notes")
        try:
            session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
            specs = {
                each.name: TensorSpec(each.name, _DTYPES.get(each.type, "float32"), tuple(each.shape))
                for each in session.get_inputs()
            }
            feeds = example_feeds(specs)
            session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_bytes())
        except Exception as error:  # every class of onnxruntime derives from Exception alone
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BackendError(f"{name}: ONNX Runtime does not run it to tell its sizes: {reason}") from error
    return [event for event in events if event.get("cat") == "Node"], len(next(iter(feeds.values())))


_DTYPES: Final = {
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
}


def _shapes(said: Sequence[Mapping[str, Shape]]) -> list[Shape]:
    return [next(iter(each.values()), ()) for each in said]


def _is_byte(tensor: str, makers: Mapping[str, GraphNode]) -> bool:
    """Return whether a tensor was an 8-bit integer before it was handed to a product."""
    node = makers.get(tensor)
    while node is not None and node.op in _MOVES:
        node = makers.get(node.inputs[0])
    return node is not None and node.op == "DequantizeLinear"


# --- OpenVINO ---------------------------------------------------------------------------------------------

_OV_MOVES: Final = frozenset(
    {"Reshape", "Squeeze", "Transpose", "Unsqueeze", "Convert", "VariadicSplit", "Split"}
)
_OV_UNCOUNTED: Final = frozenset(
    {"LSTMSequence", "GRUSequence", "RNNSequence", "Einsum", "If", "Loop", "TensorIterator"}
)


def _grouped(inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * math.prod(inputs[1][2:])  # weight (G, O / G, C / G, …)


def _grouped_transposed(inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(inputs[0]) * math.prod(inputs[1][2:])  # weight (G, C / G, O / G, …)


def _attention(inputs: Sequence[Shape], output: Shape) -> int:
    return (math.prod(inputs[0]) + math.prod(output)) * inputs[1][-2]  # keys (…, S, E)


_OV_COUNTED: Final[Mapping[str, _Counter]] = {
    "Convolution": _convolution,
    "ConvolutionBackpropData": _transposed_convolution,
    "GroupConvolution": _grouped,
    "GroupConvolutionBackpropData": _grouped_transposed,
    "MatMul": _product,
    "ScaledDotProductAttention": _attention,
}


def _openvino_products(model: ModelFiles) -> tuple[Product, ...]:
    name = model.name
    from edgeclip.runtime.ov import import_openvino, openvino_message

    openvino = import_openvino()
    products = []
    try:
        weights = next((each for each in model.files if each.suffix == ".bin"), None)
        network = openvino.Core().read_model(str(model.model), str(weights or ""))
        shapes = [
            [
                size.get_length() if not size.is_dynamic else TEXT_LENGTH if axis else 1
                for axis, size in enumerate(port.partial_shape)
            ]
            for port in network.inputs
        ]
        network.reshape(dict(zip(network.inputs, map(openvino.PartialShape, shapes), strict=True)))
        batch = shapes[0][0]
        for node in network.get_ordered_ops():
            op = node.get_type_name()
            if op in _OV_UNCOUNTED:
                raise InputError(f"{name}: the products inside the operator {op!r} are not counted.")
            if op in _OV_COUNTED:
                inputs = [list(node.get_input_shape(place)) for place in (0, 1)]
                if op == "MatMul" and node.get_attributes()["transpose_a"]:
                    inputs[0].append(inputs[0][-2])  # the axis that is summed stands last but one
                output = tuple(node.get_output_shape(0))
                operations = 2 * _OV_COUNTED[op](inputs, output)
                is_int8 = op != "ScaledDotProductAttention" and all(_ov_is_byte(node, i) for i in (0, 1))
                factors = tuple(map(tuple, inputs))
                products.append(
                    Product(node.get_friendly_name(), operations // batch, is_int8, factors, output)
                )
    except RuntimeError as error:
        raise BackendError(f"{name}: OpenVINO does not tell its sizes: {openvino_message(error)}") from error
    return tuple(products)


def _ov_is_byte(node: Any, place: int) -> bool:
    """Return whether an input comes from bytes: through a ``FakeQuantize``, or a scaled constant of bytes."""
    source = node.input(place).get_source_output().get_node()
    while True:
        op = source.get_type_name()
        if op == "FakeQuantize":
            return True
        if op == "Constant":
            return bool(source.get_output_element_type(0).size == 1)
        scaled = op in ("Multiply", "Subtract") and _ov_is_constant(source.input(1))
        if op not in _OV_MOVES and not scaled:
            return False
        source = source.input(0).get_source_output().get_node()


def _ov_is_constant(port: Any) -> bool:
    source = port.get_source_output().get_node()
    while source.get_type_name() in _OV_MOVES:
        source = source.input(0).get_source_output().get_node()
    return bool(source.get_type_name() == "Constant")
