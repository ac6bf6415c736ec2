"""Switches against the graphs that InsertQdq makes, run by ONNX Runtime itself."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.calibration.ranges import means, observe  # noqa: E402
from edgeclip.errors import ExportError  # noqa: E402
from edgeclip.export.passes import apply, check  # noqa: E402
from edgeclip.export.passes.bias import CorrectBiases, corrected  # noqa: E402
from edgeclip.export.passes.qdq import InsertQdq, observed, place  # noqa: E402
from edgeclip.export.passes.switches import SWITCHES, InsertSwitches  # noqa: E402
from edgeclip.export.ranges import GraphWatch  # noqa: E402
from edgeclip.quantization import CPU, TENSORRT, Int8Policy, Range, Scheme  # noqa: E402
from edgeclip.runtime.ort import import_onnxruntime  # noqa: E402

SIZE, WIDTH = 12, 8
ALL = Int8Policy("all", stem=True, pooled=True)
EXACT = {"session.x64quantprecision": "1"}
ROUNDED = {"session.disable_quant_qdq": "1"}
PAIRS = Scheme(fit_pairs=True)


def tower() -> onnx.ModelProto:
    """A tower with what matters: a clamp that is folded, a value with two readers, products of all kinds."""
    rng = np.random.default_rng(5)

    def drawn(*shape: int) -> NDArray[np.float32]:
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    weights: dict[str, NDArray[Any]] = {
        "unit": np.float32(1 / 64),
        "stem": drawn(WIDTH, 3, 3, 3),
        "stem_bias": drawn(WIDTH),
        "deep": drawn(WIDTH, 1, 3, 3),
        "mix": drawn(WIDTH, WIDTH, 1, 1),
        "mix_bias": drawn(WIDTH),
        "gate": drawn(WIDTH, WIDTH, 1, 1),
        "hidden": drawn(WIDTH, WIDTH),
        "hidden_bias": drawn(WIDTH),
        "map": drawn(WIDTH, WIDTH),
        "map_bias": drawn(WIDTH),
        "out": drawn(WIDTH, WIDTH),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "unit"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "stem", "stem_bias"], ["stem_out"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["stem_out"], ["stem_relu"]),
        helper.make_node("Conv", ["stem_relu", "deep"], ["deep_out"], pads=[1] * 4, group=WIDTH),
        helper.make_node("Gelu", ["deep_out"], ["deep_gelu"]),
        helper.make_node("Conv", ["deep_gelu", "mix", "mix_bias"], ["mix_out"]),
        helper.make_node("Add", ["mix_out", "stem_relu"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["mean"]),
        helper.make_node("Conv", ["mean", "gate"], ["gate_out"]),
        helper.make_node("Sigmoid", ["gate_out"], ["gate_open"]),
        helper.make_node("Mul", ["sum", "gate_open"], ["gated"]),
        helper.make_node("ReduceMean", ["gated", "axes"], ["pooled"], keepdims=0),
        helper.make_node("Gemm", ["pooled", "hidden", "hidden_bias"], ["hidden_out"], transB=1),
        helper.make_node("MatMul", ["hidden_out", "map"], ["map_out"]),
        helper.make_node("Add", ["map_bias", "map_out"], ["map_sum"]),
        helper.make_node("Gelu", ["map_sum"], ["map_gelu"]),
        helper.make_node("MatMul", ["map_gelu", "out"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


ROWS = np.random.default_rng(1).integers(0, 256, (16, SIZE, SIZE, 3), np.uint8)
NODES = ("stem_out", "deep_out", "mix_out", "gate_out", "hidden_out", "map_out", "embedding")


@functools.cache
def ranges_of(scheme: Scheme) -> dict[str, Range]:
    names = observed(ir.from_proto(tower()), NODES, scheme)
    return observe(GraphWatch(tower(), what="tower"), ROWS, names, scheme=scheme, what="tower")


@functools.cache
def means_of() -> dict[str, NDArray[np.float64]]:
    names = tuple(dict.fromkeys(corrected(ir.from_proto(tower()), NODES).values()))
    return means(GraphWatch(tower(), what="tower"), ROWS, names)


def correct(scheme: Scheme, nodes: tuple[str, ...] = NODES) -> list[CorrectBiases]:
    return [CorrectBiases(nodes, means_of(), scheme)]


def quantize(scheme: Scheme, nodes: tuple[str, ...] = NODES) -> InsertQdq:
    return InsertQdq(nodes, ranges_of(scheme), scheme)


def run(
    graph: onnx.ModelProto, config: dict[str, str] | None = None, **more: NDArray[Any]
) -> NDArray[np.float32]:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    got: NDArray[np.float32] = session.run(None, {"image": ROWS, **more})[0]
    return got


def on(*names: str) -> NDArray[np.bool_]:
    return np.array([name in names for name in NODES])


@pytest.fixture(scope="module", params=[CPU, PAIRS, TENSORRT], ids=["u8s8", "pairs", "s8s8"])
def scheme(request: pytest.FixtureRequest) -> Scheme:
    found: Scheme = request.param
    return found


@pytest.fixture(scope="module")
def switched(scheme: Scheme) -> onnx.ModelProto:
    assert place(ir.from_proto(tower()), ALL) == NODES
    made = apply(tower(), [InsertSwitches(quantize(scheme), before=correct(scheme))], what="tower")
    check(made, what="tower")
    return made


def test_all_off_is_the_float_graph(switched: onnx.ModelProto) -> None:
    np.testing.assert_allclose(run(switched, ROUNDED, switches=on()), run(tower()), rtol=0, atol=1e-6)


def test_all_on_is_the_quantized_graph(switched: onnx.ModelProto, scheme: Scheme) -> None:
    quantized = apply(tower(), [*correct(scheme), quantize(scheme)], what="tower")
    got = run(switched, ROUNDED, switches=on(*NODES))
    np.testing.assert_allclose(got, run(quantized, ROUNDED), rtol=0, atol=1e-6)
    # It is not the float graph under another name.
    lost = np.abs(got - run(tower())).max()
    assert lost > 1e-3
    if scheme.integer_outputs:
        # Integer kernels round in another place now and then: a step of one tensor, far less than int8 costs.
        assert np.abs(got - run(quantized, EXACT)).max() < lost / 4


@pytest.mark.parametrize("name", NODES)
def test_one_on_is_that_product_alone(switched: onnx.ModelProto, scheme: Scheme, name: str) -> None:
    alone = apply(tower(), [*correct(scheme, (name,)), quantize(scheme, (name,))], what="tower")
    got = run(switched, ROUNDED, switches=on(name))
    np.testing.assert_allclose(got, run(alone, ROUNDED), rtol=0, atol=1e-6)
    assert np.abs(got - run(tower())).max() > 1e-5


def test_without_corrections_biases_stay(scheme: Scheme) -> None:
    made = apply(tower(), [InsertSwitches(quantize(scheme))], what="tower")
    quantized = apply(tower(), [quantize(scheme)], what="tower")
    got = run(made, ROUNDED, switches=on(*NODES))
    np.testing.assert_allclose(got, run(quantized, ROUNDED), rtol=0, atol=1e-6)


def test_any_are_those_products(switched: onnx.ModelProto, scheme: Scheme) -> None:
    chosen = ("deep_out", "mix_out", "embedding")
    some = apply(tower(), [*correct(scheme, chosen), quantize(scheme, chosen)], what="tower")
    got = run(switched, ROUNDED, switches=on(*chosen))
    np.testing.assert_allclose(got, run(some, ROUNDED), rtol=0, atol=1e-6)


def test_the_input_names_products_in_their_order(switched: onnx.ModelProto) -> None:
    (given,) = [value for value in switched.graph.input if value.name == SWITCHES]
    assert given.type.tensor_type.elem_type == TensorProto.BOOL
    assert [dim.dim_value for dim in given.type.tensor_type.shape.dim] == [len(NODES)]


def test_a_graph_with_switches_is_refused(switched: onnx.ModelProto, scheme: Scheme) -> None:
    with pytest.raises(ExportError, match=r"the pass InsertSwitches fails: the node .* holds a graph"):
        apply(switched, [InsertSwitches(quantize(scheme))], what="tower")
