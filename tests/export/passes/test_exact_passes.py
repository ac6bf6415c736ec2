"""Passes that change how a graph is written and not what it computes."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
import onnx_ir as ir  # noqa: E402
from graphs import graph, kinds, node, run  # noqa: E402
from onnx import TensorProto, numpy_helper  # noqa: E402

from edgeclip.errors import ExportError  # noqa: E402
from edgeclip.export.passes import apply, check  # noqa: E402
from edgeclip.export.passes.channels_first import ChannelsFirst  # noqa: E402
from edgeclip.export.passes.clean import Clean  # noqa: E402
from edgeclip.export.passes.fold_padding import FoldPadding  # noqa: E402
from edgeclip.export.passes.pool_mean import PoolMean  # noqa: E402
from edgeclip.export.passes.split_grouped import SplitGrouped  # noqa: E402
from edgeclip.export.passes.strip_provenance import StripProvenance  # noqa: E402

# The same products, summed in another order, in float32.
SUMS = 1e-5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def after(model: onnx.ModelProto, *passes: ir.passes.PassBase) -> onnx.ModelProto:
    """Apply passes to a graph that must stay as it is, and check the result fully."""
    before = model.SerializeToString(deterministic=True)
    result = apply(model, passes, what="graph")
    assert model.SerializeToString(deterministic=True) == before
    check(result, what="result")
    return result


# --- padding -----------------------------------------------------------------------------------------------


def padded(amounts: list[int], *, mode: str = "constant", readers: int = 1) -> onnx.ModelProto:
    nodes = [
        node("Pad", ["x", "amounts"], ["p"], mode=mode),
        node("Conv", ["p", "w"], ["y"], pads=[1, 0, 1, 0]),
    ]
    if readers == 2:
        nodes[1].output[0] = "c"
        nodes += [node("ReduceMax", ["p"], ["m"], keepdims=1), node("Add", ["c", "m"], ["y"])]
    constants = {"amounts": np.array(amounts, np.int64), "w": normal(2, 2, 3, 3)}
    return graph(nodes, [1, 2, 8, 8], ["a", "b", "c", "d"], constants)


def test_padding_goes_into_the_convolution() -> None:
    model = padded([0, 0, 0, 1, 0, 0, 2, 3])
    result = after(model, FoldPadding())
    assert kinds(result) == ["Conv"]
    x = normal(1, 2, 8, 8, seed=1)
    np.testing.assert_array_equal(run(result, x), run(model, x))


@pytest.mark.parametrize(
    "model",
    [
        padded([1, 0, 0, 1, 0, 0, 2, 3]),
        padded([0, 0, -1, 0, 0, 0, 0, 0]),
        padded([0, 0, 0, 1, 0, 0, 2, 3], mode="reflect"),
        padded([0, 0, 0, 1, 0, 0, 2, 3], readers=2),
    ],
    ids=["batch", "cropping", "reflecting", "two readers"],
)
def test_other_padding_stays(model: onnx.ModelProto) -> None:
    assert "Pad" in kinds(after(model, FoldPadding()))


# --- provenance --------------------------------------------------------------------------------------------


def test_nothing_says_where_a_graph_was_made() -> None:
    model = graph([node("Relu", ["x"], ["y"], name="/home/me/model.py:7", doc_string="here")], [2], [2])
    model.producer_name, model.doc_string, model.graph.name = "somebody", "made at home", "main"
    model.metadata_props.add(key="path", value="/home/me")
    model.graph.node[0].metadata_props.add(key="stack", value="/home/me/model.py")
    model.graph.input[0].doc_string = "/home/me"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "unread"))
    model.graph.initializer[0].doc_string = "/home/me"
    model.opset_import.append(onnx.helper.make_opsetid("unused.domain", 1))
    result = after(model, StripProvenance())
    data = result.SerializeToString()
    for word in (b"home", b"somebody", b"unused", b"stack"):
        assert word not in data
    assert [(each.name, each.op_type) for each in result.graph.node] == [("Relu_1", "Relu")]
    assert after(result, StripProvenance()).SerializeToString() == data


# --- cleaning ----------------------------------------------------------------------------------------------


def test_cleaning_leaves_what_computes() -> None:
    nodes = [
        node("Identity", ["x"], ["i"]),
        node("Add", ["i", "zeros"], ["a"]),
        node("Mul", ["one", "a"], ["b"]),
        node("Transpose", ["b"], ["t"], perm=[0, 1]),
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        node("MatMul", ["t", "wt"], ["m"]),
        node("Transpose", ["w_again"], ["wt_again"], perm=[1, 0]),
        node("MatMul", ["t", "wt_again"], ["m_again"]),
        node("Relu", ["m"], ["dead"]),
        node("Add", ["m", "m_again"], ["y"]),
    ]
    w = normal(5, 3)
    constants = {
        "zeros": np.zeros(3, np.float32),
        "one": np.ones((1, 1), np.float32),
        "w": w,
        "w_again": w.copy(),
    }
    model = graph(nodes, ["batch", 3], ["batch", 5], constants)
    result = after(model, Clean())
    assert kinds(result) == ["MatMul", "Add"]
    assert len(result.graph.initializer) == 1
    x = normal(2, 3, seed=1)
    np.testing.assert_array_equal(run(result, x), run(model, x))
    assert not Clean()(ir.from_proto(result)).modified


@pytest.mark.parametrize(
    ("constant", "shape"),
    [(np.zeros((4, 1), np.float32), [4, 3]), (np.zeros((2, 1, 3), np.float32), [2, 1, 3])],
)
def test_a_sum_with_zero_that_widens_stays(constant: np.ndarray, shape: list[int]) -> None:
    model = graph(
        [node("Add", ["x", "c"], ["s"]), node("Relu", ["s"], ["y"])], [1, 3], shape, {"c": constant}
    )
    assert kinds(after(model, Clean())) == ["Add", "Relu"]


def test_weights_stored_small_stay_small() -> None:
    nodes = [
        node("Cast", ["small"], ["whole"], to=TensorProto.FLOAT),
        node("Mul", ["whole", "scale"], ["w"]),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    constants = {"small": np.ones((64, 64), np.int8), "scale": np.full((1, 64), 0.5, np.float32)}
    model = graph(nodes, [1, 64], [1, 64], constants)
    assert kinds(after(model, Clean())) == ["Cast", "Mul", "MatMul"]


def test_dequantized_constants_stay() -> None:
    nodes = [node("DequantizeLinear", ["q", "s"], ["w"]), node("Add", ["x", "w"], ["y"])]
    model = graph(nodes, [4], [4], {"q": np.ones(4, np.int8), "s": np.float32(0.5).reshape(())})
    assert kinds(after(model, Clean())) == ["DequantizeLinear", "Add"]


# --- layout ------------------------------------------------------------------------------------------------


def preprocessing(shift: np.ndarray) -> onnx.ModelProto:
    nodes = [
        node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "factor"], ["m"]),
        node("Add", ["m", "shift"], ["a"]),
        node("Transpose", ["a"], ["t"], perm=[0, 3, 1, 2]),
        node("Conv", ["t", "w"], ["y"]),
    ]
    constants = {"factor": normal(3), "shift": shift, "w": normal(2, 3, 3, 3)}
    return graph(nodes, ["batch", 8, 6, 3], ["batch", 2, 6, 4], constants, dtype=np.uint8)


def test_pixels_are_scaled_channels_first() -> None:
    model = preprocessing(normal(3, seed=2))
    result = after(model, ChannelsFirst())
    assert kinds(result) == ["Transpose", "Cast", "Mul", "Add", "Conv"]
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(run(result, x), run(model, x))


def test_a_constant_along_another_axis_stops_the_transpose() -> None:
    result = after(preprocessing(normal(8, 6, 1)), ChannelsFirst())
    assert kinds(result) == ["Cast", "Mul", "Add", "Transpose", "Conv"]


@pytest.mark.parametrize(("keepdims", "expected"), [(1, "GlobalAveragePool"), (0, "ReduceMean")])
def test_spatial_means_pool(keepdims: int, expected: str) -> None:
    nodes = [node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)]
    shape: list[int | str] = ["batch", 4, 1, 1] if keepdims else ["batch", 4]
    model = graph(nodes, ["batch", 4, 5, 6], shape, {"axes": np.array([-1, 2], np.int64)})
    result = after(model, PoolMean())
    assert kinds(result) == [expected]
    x = normal(2, 4, 5, 6)
    np.testing.assert_allclose(run(result, x), run(model, x), atol=SUMS)


def test_a_mean_over_channels_is_no_pool() -> None:
    nodes = [node("ReduceMean", ["x", "axes"], ["y"])]
    model = graph(nodes, [1, 4, 5, 6], [1, 1, 5, 1], {"axes": np.array([1, 3], np.int64)})
    assert kinds(after(model, PoolMean())) == ["ReduceMean"]


# --- grouped convolutions ----------------------------------------------------------------------------------

IN, TIMES = 4, 2
OUT = IN * TIMES


def grouped(*, tail: str) -> onnx.ModelProto:
    """A grouped convolution, a squeeze-and-excitation, GELU, and something that takes its channels."""
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], group=IN, pads=[1, 1, 1, 1], strides=[2, 2]),
        node("ReduceMean", ["c", "axes"], ["p"], keepdims=1),
        node("Conv", ["p", "w1", "b1"], ["s1"]),
        node("Relu", ["s1"], ["s2"]),
        node("Conv", ["s2", "w2", "b2"], ["s3"]),
        node("Sigmoid", ["s3"], ["s4"]),
        node("Mul", ["c", "s4"], ["m"]),
        node("Mul", ["m", "layer_scale"], ["l"]),
        node("Gelu", ["l"], ["g"]),
        node("Conv", ["g", "dw"], ["d"], group=OUT),
    ]
    tails = {
        "conv": ([node("Conv", ["d", "wt"], ["y"])], ["batch", 5, 4, 4]),
        "gemm": (
            [
                node("ReduceMean", ["d", "axes"], ["q"], keepdims=0),
                node("Gemm", ["q", "wg"], ["y"], transB=1),
            ],
            ["batch", 3],
        ),
        "output": ([node("Relu", ["d"], ["y"])], ["batch", OUT, 4, 4]),
        "foreign sum": (
            [
                node("Conv", ["x", "wf"], ["f"], strides=[2, 2]),
                node("Gelu", ["f"], ["fg"]),
                node("ReduceMax", ["f"], ["fm"]),
                node("Add", ["d", "fg"], ["z"]),
                node("Conv", ["z", "wt"], ["zc"]),
                node("Add", ["zc", "fm"], ["y"]),
            ],
            ["batch", 5, 4, 4],
        ),
    }
    constants = {
        "w": normal(OUT, 1, 3, 3),
        "b": normal(OUT, seed=1),
        "axes": np.array([2, 3], np.int64),
        "w1": normal(2, OUT, 1, 1, seed=2),
        "b1": normal(2, seed=3),
        "w2": normal(OUT, 2, 1, 1, seed=4),
        "b2": normal(OUT, seed=5),
        "layer_scale": normal(OUT, 1, 1, seed=6),
        "dw": normal(OUT, 1, 1, 1, seed=7),
        "wt": normal(5, OUT, 1, 1, seed=8),
        "wg": normal(3, OUT, seed=9),
        "wf": normal(OUT, IN, 1, 1, seed=10),
    }
    last, shape = tails[tail]
    read = {name for each in (*nodes, *last) for name in each.input}
    kept = {name: array for name, array in constants.items() if name in read}
    return graph([*nodes, *last], ["batch", IN, 8, 8], shape, kept)


@pytest.mark.parametrize("tail", ["conv", "gemm"])
def test_grouped_convolutions_become_depthwise_ones(tail: str) -> None:
    model = grouped(tail=tail)
    one = SplitGrouped()
    result = after(model, one)
    assert one.split == 1
    for each in result.graph.node:
        groups = next((entry.i for entry in each.attribute if entry.name == "group"), 1)
        weight = next(
            (t for t in result.graph.initializer if each.op_type == "Conv" and t.name == each.input[1]), None
        )
        assert weight is None or groups in (1, weight.dims[0])
    x = normal(3, IN, 8, 8, seed=11)
    np.testing.assert_allclose(run(result, x), run(model, x), atol=SUMS)


@pytest.mark.parametrize("tail", ["output", "foreign sum"])
def test_an_order_that_would_show_is_not_taken(tail: str) -> None:
    model = grouped(tail=tail)
    one = SplitGrouped()
    result = after(model, one)
    assert one.split == 0
    assert kinds(result) == kinds(model)
    x = normal(1, IN, 8, 8)
    np.testing.assert_array_equal(run(result, x), run(model, x))


# --- contracts ---------------------------------------------------------------------------------------------


def test_a_graph_within_a_graph_is_refused() -> None:
    inner = onnx.helper.make_graph(
        [node("Identity", ["x"], ["z"])], "inner", [], [onnx.helper.make_tensor_value_info("z", 1, [2])]
    )
    nodes = [node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner, name="choice")]
    model = graph(nodes, [2], [2], {"yes": np.array(True)})
    for each in (FoldPadding(), Clean(), ChannelsFirst(), PoolMean(), SplitGrouped()):
        with pytest.raises(
            ExportError, match=rf"{type(each).__name__} fails: the node 'choice' \(If\) holds a graph"
        ):
            apply(model, [each], what="graph")


def test_an_invalid_graph_is_refused() -> None:
    model = graph([node("Relu", ["x"], ["y"])], [2], [2])
    model.graph.node[0].input[0] = "nobody"
    with pytest.raises(ExportError, match=r"tower: the ONNX checker refuses the graph: .*nobody"):
        check(model, what="tower")


def test_a_large_graph_is_checked_through_files(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph([node("MatMul", ["x", "w"], ["y"])], [1, 64], [1, 64], {"w": normal(64, 64)})
    monkeypatch.setattr("edgeclip.export.passes.LARGEST_MESSAGE", 1000)
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 1000)
    check(model, what="tower")
    model.graph.node[0].op_type = "Nothing"
    with pytest.raises(ExportError, match="Nothing"):
        check(model, what="tower")
