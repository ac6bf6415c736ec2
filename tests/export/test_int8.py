"""Int8 graphs: what is quantized, the numbers of ONNX Runtime's own quantizer, its kernels, parity."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.bundle import Requires  # noqa: E402
from edgeclip.calibration.ranges import (  # noqa: E402
    MeanSquaredError,
    MinMax,
    Percentile,
    means,
    observe,
)
from edgeclip.errors import CalibrationError, ExportError  # noqa: E402
from edgeclip.export.build import (  # noqa: E402
    BuildOptions,
    BuildRequest,
    BuiltVariant,
    Int8Settings,
    builder_of,
)
from edgeclip.export.int8 import policy_of, quantize, scheme_of, symmetric_qdq  # noqa: E402
from edgeclip.export.passes import apply  # noqa: E402
from edgeclip.export.passes.bias import CorrectBiases, corrected  # noqa: E402
from edgeclip.export.passes.qdq import InsertQdq, observed, place  # noqa: E402
from edgeclip.export.passes.watch import WatchTensors  # noqa: E402
from edgeclip.export.ranges import GraphWatch  # noqa: E402
from edgeclip.export.rounding import rounded_weights  # noqa: E402
from edgeclip.export.storage import store_small  # noqa: E402
from edgeclip.export.variants import VariantSpec  # noqa: E402
from edgeclip.quantization import (  # noqa: E402
    CONVOLUTIONS,
    CPU,
    TENSORRT,
    TRANSFORMER,
    Int8Policy,
    Scheme,
)
from edgeclip.runtime.byte_products import overflow  # noqa: E402
from edgeclip.runtime.ort import import_onnxruntime  # noqa: E402
from edgeclip.runtime.parity import ParityNumbers, compare_embeddings  # noqa: E402

SIZE, WIDTH = 16, 24
IR_VERSIONS = {20: 9, 21: 10, 24: 12}
EXACT = {"session.x64quantprecision": "1"}


def graph_of(
    nodes: list[Any], weights: dict[str, NDArray[Any]], *, opset: int = 20, batch: str | int = "batch"
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, [batch, WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSIONS[opset]
    )


def weights_of(seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)

    def drawn(*shape: int, fan: int) -> NDArray[np.float32]:
        return (rng.normal(size=shape) / np.sqrt(fan)).astype(np.float32)

    return {
        "factor": np.full(3, 1 / 64, np.float32),
        "stem": drawn(WIDTH, 3, 3, 3, fan=27),
        "stem_bias": drawn(WIDTH, fan=4),
        "depthwise": drawn(WIDTH, 1, 3, 3, fan=9)
        * np.logspace(-2, 1, WIDTH, dtype=np.float32)[:, None, None, None],
        "depthwise_bias": drawn(WIDTH, fan=4),
        "mix": drawn(WIDTH, WIDTH, 1, 1, fan=WIDTH),
        "mix_bias": drawn(WIDTH, fan=4),
        "gate": drawn(WIDTH, WIDTH, 1, 1, fan=WIDTH),
        "projection": drawn(WIDTH, WIDTH, fan=WIDTH),
        "axis": np.array([1], np.int64),
    }


def convolutions(*, opset: int = 20, batch: str | int = "batch") -> onnx.ModelProto:
    """Return stem, ReLU, depthwise, GELU, 1x1, residual sum, gate, pooling, projection and L2 norm."""
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "factor"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "stem", "stem_bias"], ["stem_out"], name="stem", **pads),
        helper.make_node("Relu", ["stem_out"], ["active"]),
        helper.make_node(
            "Conv", ["active", "depthwise", "depthwise_bias"], ["maps"], name="depthwise", group=WIDTH, **pads
        ),
        helper.make_node("Gelu", ["maps"], ["bent"]),
        helper.make_node("Conv", ["bent", "mix", "mix_bias"], ["mixed"], name="mix"),
        helper.make_node("Relu", ["mixed"], ["bounded"]),
        helper.make_node("Add", ["bounded", "active"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["mean"]),
        helper.make_node("Conv", ["mean", "gate"], ["gated"], name="gate"),
        helper.make_node("Flatten", ["gated"], ["features"]),
        helper.make_node("Gemm", ["features", "projection"], ["projected"], name="projection"),
        helper.make_node("ReduceL2", ["projected", "axis"], ["norm"]),
        helper.make_node("Div", ["projected", "norm"], ["image_embedding"]),
    ]
    return graph_of(nodes, weights_of(), opset=opset, batch=batch)


def tokens(opset: int = 20) -> onnx.ModelProto:
    """Return a table, two linear maps with an attention-like product between them, and a mean."""
    rng = np.random.default_rng(3)
    weights = {
        "table": rng.normal(size=(100, WIDTH)).astype(np.float32) * np.linspace(0.1, 9, 100)[:, None],
        "first": rng.normal(size=(WIDTH, 2 * WIDTH)) / 5,
        "second": rng.normal(size=(2 * WIDTH, WIDTH)) / 5,
        "projection": rng.normal(size=(WIDTH, WIDTH)),
    }
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "rows"], ["mixed"]),
        helper.make_node("MatMul", ["mixed", "first"], ["wide"]),
        helper.make_node("Gelu", ["wide"], ["bent"]),
        helper.make_node("MatMul", ["bent", "second"], ["narrow"]),
        helper.make_node("ReduceMean", ["narrow", "axis"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "projection"], ["text_embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", 8])],
        [helper.make_tensor_value_info("text_embedding", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
        + [numpy_helper.from_array(np.array([1], np.int64), "axis")],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSIONS[opset]
    )


def pictures(count: int = 32, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def texts(count: int = 32, seed: int = 1) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 100, (count, 8)).astype(np.int32)


def build(name: str, tmp_path: Path, graph: onnx.ModelProto | None = None, **given: Any) -> BuiltVariant:
    rows = given.get("rows", {"image": pictures()})
    graphs = {"image": convolutions() if graph is None else graph}
    options = given.get("options", BuildOptions())
    request = BuildRequest(VariantSpec.parse(name), graphs, tmp_path, rows, "0" * 64, options)
    return builder_of("onnx")(request)


def content(built: BuiltVariant, tower: str = "image") -> bytes:
    data = built.towers[tower].files[f"{tower}.onnx"]
    assert isinstance(data, bytes)
    return data


def run(
    model: onnx.ModelProto | bytes, rows: NDArray[Any], settings: dict[str, str] | None = None
) -> NDArray[Any]:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in (EXACT if settings is None else settings).items():
        options.add_session_config_entry(key, value)
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: rows})[0]
    return result


def arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def made_by(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def parts(model: onnx.ModelProto, output: str, place: int) -> list[NDArray[Any]]:
    """Return scale and zero point of an input of a node, behind the integers of a constant."""
    made, known = made_by(model), arrays(model)
    dequantize = made[made[output].input[place]]
    assert dequantize.op_type == "DequantizeLinear"
    return [known[name] for name in dequantize.input if name in known]


# --- what is quantized


def test_products_are_quantized_and_stem_gate_and_projection_stay_float(tmp_path: Path) -> None:
    model = onnx.load_from_string(content(build("onnx-int8", tmp_path)))
    made = made_by(model)

    def behind(output: str) -> list[str]:
        return [made[name].op_type if name in made else "constant" for name in made[output].input]

    for output in ("maps", "mixed"):
        assert behind(output) == ["DequantizeLinear"] * 3
    for output in ("stem_out", "gated", "projected"):
        assert "DequantizeLinear" not in behind(output)
    assert behind("sum") == ["DequantizeLinear", "Relu"], (
        "a convolution gives int8, others read the exact value"
    )
    assert behind("bent") == ["DequantizeLinear"]
    assert behind("mean") == ["Add"]
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 4


def test_attention_products_stay_float_and_maps_over_tokens_do_not() -> None:
    graph = tokens()
    assert policy_of(graph) == TRANSFORMER
    assert policy_of(convolutions()) == CONVOLUTIONS
    shaped = ir.from_proto(onnx.shape_inference.infer_shapes(graph))
    assert place(shaped, TRANSFORMER) == ("wide", "narrow")
    assert place(shaped, dataclasses.replace(TRANSFORMER, pooled=True)) == (
        "wide",
        "narrow",
        "text_embedding",
    )
    assert place(shaped, dataclasses.replace(TRANSFORMER, keep_float=frozenset({"wide"}))) == ("narrow",)
    assert place(shaped, dataclasses.replace(TRANSFORMER, ops=frozenset({"Conv"}))) == ()


def test_a_policy_can_take_the_stem_and_what_is_pooled() -> None:
    shaped = ir.from_proto(onnx.shape_inference.infer_shapes(convolutions()))
    assert place(shaped, CONVOLUTIONS) == ("maps", "mixed")
    everything = Int8Policy("all", stem=True, pooled=True)
    assert place(shaped, everything) == ("stem_out", "maps", "mixed", "gated", "projected")
    model = quantize(convolutions(), pictures(), everything, CPU, what="tower")
    assert made_by(model)[made_by(model)["projected"].input[1]].op_type == "DequantizeLinear"
    rows = pictures(8, seed=2)
    assert (run(convolutions(), rows) * run(model, rows)).sum(1).min() > 0.99


# --- numbers of others


class _Rows:
    def __init__(self, rows: NDArray[Any]) -> None:
        self._parts = iter(np.split(rows, len(rows) // 8))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._parts, None)
        return None if part is None else {"image": part}


@pytest.mark.parametrize("bits", [7, 8])
def test_integers_and_scales_are_those_of_onnx_runtimes_quantizer(tmp_path: Path, bits: int) -> None:
    import_onnxruntime()
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    onnx.save(convolutions(), tmp_path / "float.onnx")
    quantize_static(
        str(tmp_path / "float.onnx"),
        str(tmp_path / "int8.onnx"),
        _Rows(pictures()),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=["depthwise", "mix"],
        per_channel=True,
        reduce_range=bits == 7,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    theirs = onnx.load(tmp_path / "int8.onnx")
    plain = Int8Settings(MinMax(), correct_biases=False, rounding="nearest")
    ours = quantize(convolutions(), pictures(), CONVOLUTIONS, scheme_of(bits), plain, what="tower")
    for output in ("maps", "mixed"):
        for index in (1, 2):  # weight and bias: integers, scales, zero points
            integers, scale, zero = parts(ours, output, index)
            wanted, wanted_scale, wanted_zero = parts(theirs, output, index)
            # Our scales of activations have eleven bits, and biases are in their units.
            close = 0 if index == 1 else np.abs(wanted) / 512 + 1
            assert (np.abs(integers.astype(int) - wanted.astype(int)) <= close).all()
            np.testing.assert_allclose(
                scale, wanted_scale.reshape(scale.shape), rtol=1e-6 if index == 1 else 2e-3
            )
            assert not zero.any()
            assert not wanted_zero.any()
        scale, zero = parts(ours, output, 0)
        wanted_scale, wanted_zero = parts(theirs, output, 0)
        assert wanted_scale <= scale <= wanted_scale * (1 + 2**-10)
        assert abs(int(zero) - int(wanted_zero)) <= 1
    rows = pictures(8, seed=2)
    exact = run(convolutions(), rows)
    errors = [np.abs(run(model, rows) - exact).max() for model in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1] < 0.1


def test_ranges_are_the_least_and_largest_values() -> None:
    rows = pictures(21)
    seen = observe(GraphWatch(convolutions(), what="tower"), rows, ["planes", "active"], what="tower")
    assert seen["planes"] == (rows.min() / 64, rows.max() / 64)
    watch = GraphWatch(convolutions(batch=4), what="tower")
    fixed = observe(watch, rows, ["planes", "active"], what="tower")
    assert fixed["active"] == pytest.approx(seen["active"], rel=1e-5)
    assert seen["active"][0] == 0


def test_what_is_watched_must_be_there() -> None:
    with pytest.raises(ExportError, match=r"tower: the pass WatchTensors fails: it has no tensor 'nothing'"):
        apply(convolutions(), [WatchTensors(["nothing"], "extremes")], what="tower")
    with pytest.raises(ExportError, match="the shape of 'active' is not known"):
        apply(convolutions(), [WatchTensors(["active"], "means")], what="tower")


def test_means_are_those_of_channels() -> None:
    rows = pictures(21)
    shaped = onnx.shape_inference.infer_shapes(convolutions(), data_prop=True)
    (mean,) = means(GraphWatch(shaped, what="tower"), rows, ["planes"]).values()
    np.testing.assert_allclose(mean, rows.astype(np.float64).mean((0, 1, 2)) / 64, rtol=1e-5)


# --- biases


def rounded_to(model: onnx.ModelProto, nodes: tuple[str, ...]) -> onnx.ModelProto:
    """Return a float graph with rounded weights of so few steps that their error shows."""
    coarse = onnx.ModelProto()
    coarse.CopyFrom(model)
    weights = {node.input[1] for node in coarse.graph.node if node.output[0] in nodes}
    for tensor in coarse.graph.initializer:
        if tensor.name in weights:
            value = numpy_helper.to_array(tensor)
            axes = tuple(range(1, value.ndim)) if value.ndim == 4 else (0,)
            step = np.abs(value).max(axis=axes, keepdims=True) / 64
            tensor.CopyFrom(numpy_helper.from_array(np.rint(value / step) * step, tensor.name))
    return coarse


def with_bias(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the tower of tokens with a vector added behind its first map."""
    vector = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(vector, "vector"))
    place = next(place for place, node in enumerate(model.graph.node) if node.output[0] == "bent")
    model.graph.node[place].input[0] = "shifted"
    model.graph.node.insert(place, helper.make_node("Add", ["vector", "wide"], ["shifted"]))
    return model


@pytest.mark.parametrize("kind", ["convolutions", "tokens"])
def test_corrected_biases_bring_means_back(kind: str) -> None:
    """What a product without padding gives on average is what it gives in float."""
    graph, rows = (
        (convolutions(), pictures(64)) if kind == "convolutions" else (with_bias(tokens()), texts(64))
    )
    shaped = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    model = ir.from_proto(shaped)
    nodes = ("mixed",) if kind == "convolutions" else ("wide",)
    sources = corrected(model, nodes)
    assert set(sources) == set(nodes)
    found = means(GraphWatch(shaped, what="tower"), rows, list(sources.values()))
    scheme = Scheme(weight_bits=7)
    better = apply(shaped, [CorrectBiases(nodes, found, scheme)], what="tower")
    output = "shifted" if kind == "tokens" else nodes[0]

    def mean_of(each: onnx.ModelProto) -> NDArray[np.float64]:
        each = onnx.shape_inference.infer_shapes(rounded_to(each, nodes), data_prop=True)
        return next(iter(means(GraphWatch(each, what="tower"), rows, [output]).values()))

    wanted = next(iter(means(GraphWatch(shaped, what="tower"), rows, [output]).values()))
    before, after = (np.abs(mean_of(each) - wanted).max() for each in (shaped, better))
    assert after < 0.01 * before


def patches(count: int, seed: int) -> NDArray[np.uint8]:
    """Return pictures whose neighbours are alike, as they are in pictures."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, SIZE // 4, SIZE // 4, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 4, axis=1), 4, axis=2)


@pytest.mark.parametrize(
    ("kind", "output"), [("convolutions", "maps"), ("convolutions", "mixed"), ("tokens", "wide")]
)
@pytest.mark.parametrize("correct_biases", [True, False])
def test_rounding_by_moments_brings_products_nearer(kind: str, output: str, correct_biases: bool) -> None:
    """On rows that no weight was rounded by; with the mean of what a bias takes up, and without."""
    graph, rows, others = (
        (convolutions(), patches(64, seed=1), patches(64, seed=2))
        if kind == "convolutions"
        else (with_bias(tokens()), texts(64), texts(64, seed=2))
    )
    shaped = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    model, watch, scheme = ir.from_proto(shaped), GraphWatch(shaped, what="tower"), Scheme(weight_bits=7)
    sources = corrected(model, [output])
    found = means(watch, rows, list(sources.values()))
    chosen = rounded_weights(
        model, watch, rows, [output], scheme, corrected=sources if correct_biases else (), what="tower"
    )
    seen = "shifted" if kind == "tokens" else output

    def values(each: onnx.ModelProto) -> NDArray[np.float64]:
        with GraphWatch(each, what="tower").values([seen]) as session:
            return session.run({next(iter(session.inputs)): others})["0"].astype(np.float64)

    errors = []
    for rounded in ({}, chosen):
        passes = [CorrectBiases([output], found, scheme, rounded)] if correct_biases else []
        each = rounded_to(apply(shaped, passes, what="tower"), (output,))
        if rounded:
            weight = made_by(each)[output].input[1]
            exact = chosen[output].values.astype(np.float32)
            (tensor,) = [tensor for tensor in each.graph.initializer if tensor.name == weight]
            tensor.CopyFrom(numpy_helper.from_array(exact, weight))
        errors.append(np.square(values(each) - values(shaped)).mean())
    assert errors[1] < 0.9 * errors[0]


def test_integers_chosen_by_moments_are_those_of_the_file() -> None:
    shaped = onnx.shape_inference.infer_shapes(convolutions(), data_prop=True)
    model, scheme = ir.from_proto(shaped), scheme_of(fit_pairs=True)
    nodes, rows = place(model, CONVOLUTIONS), pictures(64)
    sources = corrected(model, nodes)
    watch = GraphWatch(shaped, what="tower")
    chosen = rounded_weights(model, watch, rows, nodes, scheme, corrected=sources, what="tower")
    assert set(chosen) == set(nodes)
    made = quantize(convolutions(), rows, CONVOLUTIONS, scheme, what="tower")
    for output in nodes:
        integers, scale, _ = parts(made, output, 1)
        assert np.array_equal(integers, chosen[output].integers)
        assert np.array_equal(scale.ravel(), chosen[output].steps)
    nearest = quantize(
        convolutions(), rows, CONVOLUTIONS, scheme, Int8Settings(rounding="nearest"), what="tower"
    )
    assert any((parts(nearest, output, 1)[0] != chosen[output].integers).any() for output in nodes)


def test_a_correction_needs_means() -> None:
    with pytest.raises(ExportError, match=r"'active' has no means \(1 have none\)"):
        apply(convolutions(), [CorrectBiases(["maps"], {})], what="tower")


def test_ranges_can_be_given(tmp_path: Path) -> None:
    shaped = onnx.shape_inference.infer_shapes(convolutions(), data_prop=True)
    model = ir.from_proto(shaped)
    names = observed(model, place(model, CONVOLUTIONS), CPU)
    given = dict.fromkeys(names, (-1.0, 1.55))
    made = quantize(convolutions(), pictures(), CONVOLUTIONS, CPU, what="tower", ranges=given)
    scale, zero = parts(made, "maps", 0)
    assert (float(scale), int(zero)) == (pytest.approx(0.01, rel=1e-3), 100)


@pytest.mark.parametrize("method", [MinMax(), Percentile(99.0), MeanSquaredError()])
def test_the_method_decides_ranges_and_is_said(tmp_path: Path, method: Any) -> None:
    options = BuildOptions(quantization=Int8Settings(method, correct_biases=False))
    built = build("onnx-int8", tmp_path, options=options)
    plain = build("onnx-int8", tmp_path, options=BuildOptions(quantization=Int8Settings(MinMax())))
    assert built.calibration is not None
    assert built.calibration["method"] == {"image": str(method)}
    assert built.calibration["correct_biases"] is False
    assert content(built) != content(plain)


def test_ranges_come_from_the_cache_and_not_from_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGECLIP_CACHE_DIR", str(tmp_path / "cache"))
    runs: list[str] = []
    extremes = GraphWatch.extremes

    def counted(self: GraphWatch, names: Any) -> Any:
        runs.append("run")
        return extremes(self, names)

    monkeypatch.setattr(GraphWatch, "extremes", counted)
    first = content(build("onnx-int8@x86-vnni", tmp_path))
    again = content(build("onnx-int8@x86-vnni", tmp_path))
    assert (first, len(runs)) == (again, 1)
    build("onnx-int8", tmp_path)  # other weights, the same ranges
    assert len(runs) == 1
    (entry,) = (tmp_path / "cache").rglob("ranges-*.json")
    entry.write_bytes(b"{")
    assert content(build("onnx-int8@x86-vnni", tmp_path)) == first
    assert len(runs) == 2


# --- text towers


def test_weights_of_texts_are_stored_in_int8_and_computed_in_float(tmp_path: Path) -> None:
    exact = run(tokens(), texts(8, seed=2))
    request = BuildRequest(
        VariantSpec.parse("onnx-int8"), {"text": tokens()}, tmp_path, {"text": texts()}, "0" * 64
    )
    built = builder_of("onnx")(request)
    model = onnx.load_from_string(content(built, "text"))
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QuantizeLinear"] == kinds["DequantizeLinear"] == 0
    stored = {name for name, value in arrays(model).items() if value.dtype == np.int8 and value.ndim == 2}
    assert len(stored) >= 3  # the table and both maps
    got = run(content(built, "text"), texts(8, seed=2))
    assert compare_embeddings(exact, got).cosine_min > 0.9998
    assert built.calibration is not None
    assert built.calibration["method"] == {"text": None}
    full = BuildOptions(quantization=Int8Settings(text="full"))
    computed = builder_of("onnx")(dataclasses.replace(request, options=full))
    kinds = Counter(node.op_type for node in onnx.load_from_string(content(computed, "text")).graph.node)
    assert kinds["QuantizeLinear"] >= 1


@pytest.mark.parametrize("opset", [20, 21, 24])
def test_every_quantized_product_runs_in_an_integer_kernel(tmp_path: Path, opset: int) -> None:
    """In new opsets too, where ONNX Runtime's own quantizer is said to fail."""
    ort = import_onnxruntime()
    for name, settings in (("onnx-int8", EXACT), ("onnx-int8@x86-avx2", {})):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        for key, value in settings.items():
            options.add_session_config_entry(key, value)
        built = build(name, tmp_path, convolutions(opset=opset))
        ort.InferenceSession(content(built), options, providers=["CPUExecutionProvider"])
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
        assert kinds["QLinearConv"] == 2
        assert kinds["Conv"] + kinds["FusedConv"] == 2  # stem and gate
    model = quantize(tokens(opset), texts(), TRANSFORMER, CPU, what="tower")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["MatMulIntegerToFloat"] == 2


def test_a_bias_over_weights_next_to_nothing_stays_right() -> None:
    graph = convolutions()
    for tensor in graph.graph.initializer:
        if tensor.name in ("mix", "mix_bias"):
            value = numpy_helper.to_array(tensor).copy()
            value[0], value[1] = (1e-20, 0) if tensor.name == "mix" else (3.0, 5.0)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    rows = pictures(8, seed=2)
    model = quantize(graph, pictures(), CONVOLUTIONS, CPU, what="tower")
    assert (run(graph, rows) * run(model, rows)).sum(1).min() > 0.995


# --- targets


@pytest.mark.parametrize(
    ("name", "fits", "requires"),
    [
        ("onnx-int8", True, Requires()),
        ("onnx-int8@x86-avx2", True, Requires(isa_any=("avx2",))),
        ("onnx-int8@x86-vnni", False, Requires(isa_any=("avx512_vnni", "avx_vnni"))),
        ("onnx-int8@arm64-dotprod", False, Requires(isa_any=("dotprod",))),
    ],
)
def test_the_target_decides_pairs_and_hosts(
    tmp_path: Path, name: str, fits: bool, requires: Requires
) -> None:
    built = build(name, tmp_path)
    path = tmp_path / "tower.onnx"
    path.write_bytes(content(built))
    assert (overflow(path) is None) is fits
    weights = [value for value in arrays(onnx.load(path)).values() if value.dtype == np.int8]
    assert (
        max(int(np.abs(value.astype(int)).max()) for value in weights) == 127
    )  # depthwise ones, in any case
    assert dict(built.session_config) == {}
    assert built.requires == requires
    said = built.calibration
    assert said is not None
    assert (said["method"], said["rows"], said["digest"]) == ({"image": "mse"}, {"image": 32}, "0" * 64)
    assert (said["scheme"]["weight_bits"], said["scheme"]["fit_pairs"]) == (8, fits)
    assert said["policy"]["image"]["name"] == "convolutions"


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (content(build("onnx-int8", tmp_path)) for _ in range(2))
    assert first == second
    other = content(build("onnx-int8", tmp_path, rows={"image": pictures(seed=9) // 2}))
    assert other != first


def test_the_interface_stays(tmp_path: Path) -> None:
    built, plain = build("onnx-int8", tmp_path).towers["image"], build("onnx-fp32", tmp_path).towers["image"]
    assert (built.inputs, built.outputs) == (plain.inputs, plain.outputs)


# --- TensorRT's form


def test_tensorrt_gets_signed_symmetric_int8_and_scales_that_float16_holds() -> None:
    model = symmetric_qdq(convolutions(), pictures())
    made, known = made_by(model), arrays(model)
    pairs = [node for node in model.graph.node if node.op_type.endswith("QuantizeLinear")]
    assert len([node for node in pairs if node.op_type == "QuantizeLinear"]) == 2, "inputs only"
    for node in pairs:
        scale, zero = known[node.input[1]], known[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert (scale == scale.astype(np.float16)).all()
    for output in ("maps", "mixed"):
        assert made[output].input[2] in known, "the bias stays float"
        integers = parts(model, output, 1)[0]
        assert (np.abs(integers.astype(int)).max(axis=(1, 2, 3)) >= 120).all(), "a scale for each channel"
    rows = pictures(8, seed=2)
    assert (run(convolutions(), rows) * run(model, rows, {})).sum(1).min() > 0.99


# --- storage


def test_tables_are_stored_as_int8_and_other_weights_as_float16() -> None:
    graph = quantize(tokens(), texts(), TRANSFORMER, CPU, what="tower")
    small = onnx.ModelProto()
    small.CopyFrom(graph)
    store_small(small, tables="int8", others="float16")
    kinds = {name: value.dtype for name, value in arrays(small).items()}
    assert kinds["table_int8"] == np.int8
    assert kinds["projection_half"] == np.float16
    assert all(value.dtype == np.float32 for name, value in arrays(small).items() if name.endswith("_scale"))
    rows = texts(8, seed=2)
    wanted, got = run(graph, rows), run(small, rows)
    assert np.abs(wanted - got).max() < 0.02 * np.abs(wanted).max()
    same = onnx.ModelProto()
    same.CopyFrom(graph)
    store_small(same, tables="float32", others="float32")
    assert same == graph


# --- refusals


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"'onnx-int8', image tower: its calibration rows are none, exp"
    ):
        build("onnx-int8", tmp_path, rows={})
    with pytest.raises(CalibrationError, match=r"are uint8 \(15, 16, 16, 3\), expected at least 16 of uint8"):
        build("onnx-int8", tmp_path, rows={"image": pictures(15)})
    with pytest.raises(CalibrationError, match=r"are float32 \(32, 16, 16, 3\), expected .* \(16, 16, 3\)"):
        build("onnx-int8", tmp_path, rows={"image": pictures().astype(np.float32)})
    nothing = Int8Policy("nothing", ops=frozenset({"Gemm"}))
    with pytest.raises(ExportError, match=r"tower: nothing in it .* \(policy 'nothing': products of Gemm"):
        quantize(convolutions(), pictures(), nothing, CPU, what="tower")


def test_values_that_are_not_finite_are_refused() -> None:
    graph = convolutions()
    for tensor in graph.graph.initializer:
        if tensor.name == "factor":
            tensor.CopyFrom(numpy_helper.from_array(np.full(3, np.inf, np.float32), "factor"))
    with pytest.raises(
        CalibrationError, match=r"tower: 'active' is not finite for the calibration rows from 0"
    ):
        quantize(graph, pictures(), CONVOLUTIONS, CPU, what="tower")


def test_a_scheme_is_checked() -> None:
    with pytest.raises(CalibrationError, match="weight bits: got 4, expected 7 or 8"):
        Scheme(weight_bits=4)
    with pytest.raises(CalibrationError, match="signed=True"):
        Scheme(symmetric=True)
    assert TENSORRT.weight_limit == 127
    assert scheme_of(7).weight_limit == 64


def test_the_pass_refuses_what_it_was_not_made_for() -> None:
    shaped = onnx.shape_inference.infer_shapes(convolutions())
    ranges = dict.fromkeys(observed(ir.from_proto(shaped), ["mixed"]), (0.0, 1.0))
    assert set(ranges) == {"bent", "bounded"}
    with pytest.raises(ExportError, match=r"'bounded' has no range \(1 have none\)"):
        apply(shaped, [InsertQdq(["mixed"], {"bent": (0.0, 1.0)})], what="tower")
    with pytest.raises(ExportError, match="'sum' is no product with a constant weight"):
        apply(shaped, [InsertQdq(["sum"], ranges)], what="tower")
    done = apply(shaped, [InsertQdq(["mixed"], ranges)], what="tower")
    with pytest.raises(ExportError, match="it is quantized already, at "):
        apply(done, [InsertQdq(["mixed"], ranges)], what="tower")


# --- trained probes


def shapes(combinations: Any, size_px: int, seed: int) -> NDArray[np.uint8]:
    from edgeclip.shapes import render

    return np.stack([render(each, seed=seed + row, size_px=size_px) for row, each in enumerate(combinations)])


@pytest.mark.slow
@pytest.mark.parametrize(("probe", "least"), [("mobileclip", 0.94), ("vit", 0.975), ("tinyclip", 0.975)])
def test_trained_probes_agree_with_float32(repo: Path, tmp_path: Path, probe: str, least: float) -> None:
    """200 labels of one word more or less each: the hardest names there are for these models."""
    pytest.importorskip("torch")
    from edgeclip.export.options import Checkpoint, GraphOptions
    from edgeclip.export.passes.sequences import shared
    from edgeclip.export.source import open_source
    from edgeclip.shapes import captions, held_out_combinations, label, ordered_combinations

    source = open_source(Checkpoint(str(repo / "tests/data/probes" / probe)), threads=2)
    seen = list(itertools.islice(ordered_combinations(False, 1), 64))
    judged = held_out_combinations()[:200]
    size = source.preprocess.image_size_px[0]
    known = [captions(each, language, 7)[0] for each in seen for language in ("en", "zh")]
    asked = [captions(each, language, 9)[0] for each in judged for language in ("en", "zh")]
    rows = {"image": shapes(seen, size, 1), "text": source.tokenizer(known, truncate=True)}
    feeds = {"image": shapes(judged, size, 1000), "text": source.tokenizer(asked, truncate=True)}
    names = source.tokenizer([label(each, "en") for each in judged], truncate=True)
    graphs = {t: apply(source.trace(t, GraphOptions()), shared(), what=t) for t in ("image", "text")}
    exact = {tower: run(graph, feeds[tower], {}) for tower, graph in graphs.items()}
    bank = run(graphs["text"], names, {})
    for name in ("onnx-int8", "onnx-int8@x86-avx2", "onnx-int8@x86-vnni"):
        request = BuildRequest(VariantSpec.parse(name), graphs, tmp_path, rows, "0" * 64)
        built = builder_of("onnx")(request)
        for tower, graph in graphs.items():
            data = content(built, tower)
            got = run(data, feeds[tower], dict(built.session_config))
            numbers: ParityNumbers = compare_embeddings(exact[tower], got, bank=bank)
            assert numbers.cosine_mean > 0.998, (name, tower)
            assert numbers.cosine_min > 0.99, (name, tower)
            assert numbers.top1_agreement is not None
            assert numbers.top1_agreement >= (least if tower == "image" else 0.99), (name, tower)
            # A tower of a megabyte has as many names and scales as a large one.
            assert len(data) < 0.35 * len(graph.SerializeToString()), (name, tower)


@pytest.mark.full
def test_both_towers_of_mobileclip2_s0_shrink_to_less_than_three_tenths(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import torch
    from towers import random_weights

    from edgeclip.export.passes.sequences import shared
    from edgeclip.export.trace import trace
    from edgeclip.models.clip import build_clip
    from edgeclip.models.zoo import clip_config

    config = clip_config("MobileCLIP2-S0")
    traced = trace(random_weights(build_clip(config), dtype=torch.float32), config).by_name()
    rng = np.random.default_rng(0)
    rows = {
        "image": rng.integers(0, 256, (16, 256, 256, 3), dtype=np.uint8),
        "text": rng.integers(1, 49_406, (16, 77), dtype=np.int32),
    }
    graphs = {tower: apply(graph, shared(), what=tower) for tower, graph in traced.items()}
    built = builder_of("onnx")(BuildRequest(VariantSpec.parse("onnx-int8"), graphs, tmp_path, rows, "0" * 64))
    for tower, graph in graphs.items():
        assert len(content(built, tower)) < 0.29 * len(graph.SerializeToString()), tower
