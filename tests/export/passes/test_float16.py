"""What goes to float16, what does not, and what cannot."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
from graphs import graph, kinds, node, run  # noqa: E402
from onnx import TensorProto  # noqa: E402

from edgeclip.errors import ExportError  # noqa: E402
from edgeclip.export.passes import apply, check  # noqa: E402
from edgeclip.export.passes.float16 import Float16  # noqa: E402

# Of outputs of order 1: a few roundings of 2^-11.
ROUNDING = 5e-3
HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    result = apply(model, [Float16()], what="tower")
    check(result, what="tower")
    for before, after in zip(
        (*model.graph.input, *model.graph.output), (*result.graph.input, *result.graph.output), strict=True
    ):
        assert (before.name, before.type.tensor_type.elem_type) == (
            after.name,
            after.type.tensor_type.elem_type,
        )
    return result


def read_as(model: onnx.ModelProto) -> dict[str, set[int]]:
    """Return the float types every kind of operator reads."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)
    }
    types |= {value.name: value.type.tensor_type.elem_type for value in inferred.output}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    found: dict[str, set[int]] = {}
    for each in inferred.node:
        read = {types[name] for name in each.input if name} & {HALF, SINGLE}
        found.setdefault(each.op_type, set()).update(read)
    return found


def tower() -> onnx.ModelProto:
    nodes = [
        node("Cast", ["x"], ["f"], to=SINGLE),
        node("Mul", ["f", "factor"], ["s"]),
        node("Transpose", ["s"], ["t"], perm=[0, 3, 1, 2]),
        node("Conv", ["t", "w"], ["c"], strides=[4, 4]),
        node("Relu", ["c"], ["a"]),
        node("Reshape", ["a", "to"], ["r"]),
        node("LayerNormalization", ["r", "gain"], ["n"]),
        node("MatMul", ["n", "wq"], ["q"]),
        node("Add", ["q", "mask"], ["qm"]),
        node("Softmax", ["qm"], ["p"]),
        node("MatMul", ["p", "n"], ["o"]),
        node("Add", ["o", "r"], ["res"]),
        node("Gelu", ["res"], ["g"]),
        node("ReduceMean", ["g", "axis"], ["m"], keepdims=0),
        node("Gemm", ["m", "wp"], ["e"]),
        node("Mul", ["e", "e"], ["sq"]),
        node("ReduceSum", ["sq", "last"], ["ss"]),
        node("Sqrt", ["ss"], ["norm"]),
        node("Div", ["e", "norm"], ["y"]),
    ]
    mask = np.triu(np.full((4, 4), np.finfo(np.float32).min, np.float32), 1)
    constants = {
        "factor": np.full(3, 1 / 255, np.float32),
        "w": normal(4, 3, 4, 4, scale=0.3),
        "to": np.array([-1, 4, 4], np.int64),
        "gain": normal(4, seed=1),
        "wq": normal(4, 4, seed=2),
        "mask": mask,
        "axis": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
        "wp": normal(4, 6, seed=3),
    }
    return graph(nodes, ["batch", 8, 8, 3], ["batch", 6], constants, dtype=np.uint8)


def test_arithmetic_is_half_and_sums_of_squares_are_not() -> None:
    result = halved(tower())
    said = read_as(result)
    for kind in ("Conv", "Relu", "MatMul", "Gelu", "Gemm"):
        assert said[kind] == {HALF}, kind
    for kind in (
        "LayerNormalization",
        "Softmax",
        "ReduceMean",
        "ReduceSum",
        "Sqrt",
        "Div",
        "Mul",
        "Transpose",
    ):
        assert said[kind] == {SINGLE}, kind
    assert said["Add"] == {HALF, SINGLE}  # the residual sum, and the mask in front of the softmax
    assert all(t.data_type == HALF for t in result.graph.initializer if t.name.startswith("w"))


def test_numbers_stay_within_rounding() -> None:
    model = tower()
    for batch in (1, 5):
        x = np.random.default_rng(batch).integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8)
        assert np.abs(run(halved(model), x) - run(model, x)).max() < ROUNDING


def test_squares_beyond_float16_do_not_overflow() -> None:
    """The L2 norm of values whose squares float16 cannot hold."""
    nodes = [
        node("MatMul", ["x", "w"], ["e"]),
        node("Pow", ["e", "two"], ["sq"]),
        node("ReduceSum", ["sq", "last"], ["ss"]),
        node("Sqrt", ["ss"], ["norm"]),
        node("Div", ["e", "norm"], ["y"]),
    ]
    constants = {"w": normal(4, 6), "two": np.float32(2).reshape(()), "last": np.array([-1], np.int64)}
    model = graph(nodes, [2, 4], [2, 6], constants)
    x = normal(2, 4, seed=1, scale=3000)
    assert np.abs(run(model, x) * np.linalg.norm(x @ constants["w"], axis=1, keepdims=True)).max() > 256
    assert np.abs(run(halved(model), x) - run(model, x)).max() < ROUNDING


def test_a_decomposed_layer_norm_stays_single() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("ReduceMean", ["h", "last"], ["mean"]),
        node("Sub", ["h", "mean"], ["d"]),
        node("Mul", ["d", "d"], ["sq"]),
        node("ReduceMean", ["sq", "last"], ["var"]),
        node("Add", ["var", "eps"], ["ve"]),
        node("Sqrt", ["ve"], ["sd"]),
        node("Div", ["d", "sd"], ["n"]),
        node("Mul", ["n", "gain"], ["g"]),
        node("MatMul", ["g", "v"], ["y"]),
    ]
    constants = {
        "w": normal(8, 8),
        "last": np.array([-1], np.int64),
        "eps": np.float32(1e-12).reshape(()),  # vanishes in float16
        "gain": normal(8, seed=1),
        "v": normal(8, 3, seed=2, scale=0.3),
    }
    model = graph(nodes, [2, 8], [2, 3], constants)
    said = read_as(halved(model))
    for kind in ("ReduceMean", "Sub", "Mul", "Add", "Sqrt", "Div"):
        assert said[kind] == {SINGLE}, kind
    x = normal(2, 8, seed=4, scale=300)
    assert np.abs(run(halved(model), x) - run(model, x)).max() < ROUNDING


def test_a_weight_that_overflows_is_named() -> None:
    model = graph([node("MatMul", ["x", "huge"], ["y"])], [1, 2], [1, 2], {"huge": normal(2, 2, scale=1e6)})
    with pytest.raises(ExportError, match=r"Float16 fails: 'huge' overflows in float16: .* at most 65504"):
        apply(model, [Float16()], what="tower")


def test_a_product_whose_weight_vanishes_stays_single() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("MatMul", ["m", "dust"], ["d"]),
        node("Add", ["m", "d"], ["y"]),
    ]
    constants = {"w": normal(2, 2), "dust": normal(2, 2, scale=1e-7)}
    result = halved(graph(nodes, [1, 2], [1, 2], constants))
    assert read_as(result)["MatMul"] == {HALF, SINGLE}
    dust = next(tensor for tensor in result.graph.initializer if tensor.name.startswith("dust"))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(dust), constants["dust"])


def test_a_small_bias_may_vanish() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Add", ["m", "b"], ["a"]),
        node("MatMul", ["a", "w"], ["y"]),
    ]
    model = graph(nodes, [1, 2], [1, 2], {"w": normal(2, 2), "b": normal(2, scale=1e-9)})
    assert read_as(halved(model))["Add"] == {HALF}


@pytest.mark.parametrize(("opset", "scales"), [(20, HALF), (17, SINGLE)])
def test_quantized_nodes_stay_and_take_half_scales(opset: int, scales: int) -> None:
    nodes = [
        node("QuantizeLinear", ["x", "sx", "zero"], ["qx"]),
        node("DequantizeLinear", ["qx", "sx", "zero"], ["dx"]),
        node("DequantizeLinear", ["qw", "sw", "zeros"], ["dw"], axis=0),
        node("DequantizeLinear", ["qb", "sb"], ["db"], axis=0),
        node("Conv", ["dx", "dw", "db"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "sx", "zero"], ["qr"]),
        node("DequantizeLinear", ["qr", "sx", "zero"], ["y"]),
    ]
    constants = {
        "sx": np.float32(0.02).reshape(()),
        "zero": np.int8(0).reshape(()),
        "qw": np.random.default_rng(0).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8),
        "sw": np.array([0.004, 0.005, 0.006, 0.007], np.float32),
        "zeros": np.zeros(4, np.int8),
        "qb": np.array([100, -200, 300, 0], np.int32),
        "sb": np.float32(1e-8) * np.ones(4, np.float32),
    }
    model = graph(nodes, ["batch", 3, 4, 4], ["batch", 4, 4, 4], constants, opset=opset)
    result = halved(model)
    assert [kind for kind in kinds(result) if kind != "Cast"] == kinds(model)
    types = {tensor.name: tensor.data_type for tensor in result.graph.initializer}
    read = [each for each in result.graph.node if each.op_type == "DequantizeLinear" and "qw" in each.input]
    assert types[read[0].input[1]] == scales
    assert types["sb"] == SINGLE  # of an int32 bias: float16 has no such number
    assert read_as(result)["Conv"] == {HALF}
    x = normal(2, 3, 4, 4)
    assert np.abs(run(result, x) - run(model, x)).max() <= 0.02 + ROUNDING  # one step of the last quantizer


def test_movement_follows_its_data() -> None:
    nodes = [
        node("Softmax", ["x"], ["s"]),
        node("Transpose", ["s"], ["t"], perm=[1, 0]),
        node("MatMul", ["t", "w"], ["m"]),
        node("Transpose", ["m"], ["y"], perm=[1, 0]),
    ]
    model = graph(nodes, [3, 3], [2, 3], {"w": normal(3, 2)})
    assert kinds(halved(model)) == ["Softmax", "Transpose", "Cast", "MatMul", "Cast", "Transpose"]
