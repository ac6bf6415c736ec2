"""ONNX files for TensorRT: what is in them, what NVIDIA's own builder makes of them, and their numbers.

Engines are built by TensorRT-RTX, which needs no GPU for it; nothing here runs on one. Numbers are those of
the same file on ONNX Runtime.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.bundle import Requires  # noqa: E402
from edgeclip.errors import CalibrationError, ExportError  # noqa: E402
from edgeclip.export.build import BuildOptions, BuildRequest, BuiltVariant, builder_of  # noqa: E402
from edgeclip.export.variants import VariantSpec  # noqa: E402
from edgeclip.runtime.parity import ParityLimits, check_parity, compare_embeddings  # noqa: E402
from edgeclip.runtime.session import RuntimeOptions, open_session  # noqa: E402
from edgeclip.runtime.trt_build import BatchRange, BuiltEngine, build_engine, import_tensorrt  # noqa: E402

PROBES = ("mobileclip", "vit")
PRECISIONS = ("fp32", "fp16", "int8")
INPUTS = {"image": "image", "text": "tokens"}


def make(
    precision: str,
    graphs: dict[str, Any],
    folder: Path,
    rows: dict[str, NDArray[Any]] | None = None,
    *,
    target: str = "",
    **options: Any,
) -> BuiltVariant:
    """Make a variant as the exporter does."""
    spec = VariantSpec.parse(f"tensorrt-{precision}{target}")
    request = BuildRequest(spec, graphs, folder, rows or {}, "0" * 64, BuildOptions(**options))
    return builder_of("tensorrt")(request)


def stored(built: BuiltVariant, tower: str, folder: Path) -> Path:
    """Write the files of a tower and return the one to open."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in built.towers[tower].files.items():
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
    return folder / built.towers[tower].model


def engine(path: Path) -> BuiltEngine:
    """Build a file with NVIDIA's own builder."""
    trt = import_tensorrt("tensorrt_rtx")
    return build_engine(trt, path, name="tower", batch=BatchRange(1, 1, 8), compute_capability="8.6")


def embed(path: Path, tower: str, rows: NDArray[Any]) -> NDArray[Any]:
    with open_session(path, options=RuntimeOptions(threads=2)) as session:
        return session.run({INPUTS[tower]: rows})[f"{tower}_embedding"]


@pytest.fixture(scope="module", params=PROBES)
def probe(request: pytest.FixtureRequest, repo: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the traced towers of a trained probe and calibration rows."""
    from edgeclip.export.calibration_rows import calibration_set
    from edgeclip.export.options import Checkpoint, GraphOptions, References
    from edgeclip.export.source import open_source
    from edgeclip.export.text_length import fixed_length

    source = open_source(Checkpoint(str(repo / "tests/data/probes" / request.param)), threads=2)
    asked = References(calibration_samples=64, calibration_selection="random")
    languages, tokenize = source.tokenizer.config.languages, partial(source.tokenizer, truncate=True)
    chosen = calibration_set(source.preprocess, asked, languages=languages, tokenize=tokenize)
    rows = dict(chosen.rows)
    graphs = {tower: source.trace(tower, GraphOptions()) for tower in rows}
    return {**graphs, "text": fixed_length(graphs["text"], rows["text"].shape[1])}, rows


# --- the trained probes


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nvidias_builder_takes_both_towers_and_the_numbers_stay(
    probe: tuple[dict[str, Any], dict[str, NDArray[Any]]], precision: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    graphs, rows = probe
    built = make(precision, graphs, tmp_path, rows)
    for tower, graph in graphs.items():
        path = stored(built, tower, tmp_path / precision)
        assert engine(path).layers > 50
        plain = tmp_path / f"{tower}.onnx"
        plain.write_bytes(graph.SerializeToString())
        expected = embed(plain, tower, rows[tower])
        for batch in (1, 5):
            numbers = compare_embeddings(expected[:batch], embed(path, tower, rows[tower][:batch]))
            limits = ParityLimits.of(precision)
            assert check_parity(numbers, limits) == (), (tower, batch)
        numbers = compare_embeddings(expected, embed(path, tower, rows[tower]))
        assert check_parity(numbers, ParityLimits.of(precision)) == (), tower
        entries = built.towers[tower]
        assert [(entry.name, entry.dtype) for entry in entries.inputs] == [
            (INPUTS[tower], {"image": "uint8", "text": "int32"}[tower])
        ]
        assert [(entry.name, entry.dtype) for entry in entries.outputs] == [(f"{tower}_embedding", "float32")]


@pytest.mark.slow
def test_the_same_graph_gives_the_same_bytes(
    probe: tuple[dict[str, Any], dict[str, NDArray[Any]]], tmp_path: Path
) -> None:
    graphs, rows = probe
    for precision in ("fp16", "int8"):
        first, second = (make(precision, graphs, tmp_path / name, rows) for name in "ab")
        for tower in graphs:
            assert first.towers[tower].files == second.towers[tower].files


# --- MobileCLIP2-S0, both towers, every precision


@pytest.mark.slow
def test_nvidias_builder_takes_mobileclip2_s0(tmp_path: Path) -> None:
    """Fresh weights: what is asked is whether it is built, not what it knows. Most of it is tracing."""
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    import torch

    from edgeclip.export.passes import apply
    from edgeclip.export.passes.sequences import shared
    from edgeclip.export.trace import trace
    from edgeclip.models.clip import build_clip
    from edgeclip.models.zoo import clip_config

    config = clip_config("MobileCLIP2-S0")
    torch.manual_seed(0)
    model = build_clip(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("layer_scale", "attention_scale", "ffn_scale")):
                value.fill_(0.1)  # fresh ones are 1e-5, and a weight they are folded into leaves float16
    graphs = {
        tower: apply(graph, shared(), what=tower) for tower, graph in trace(model, config).by_name().items()
    }
    del model
    rng = np.random.default_rng(0)
    rows = {
        "image": rng.integers(0, 256, (16, 256, 256, 3), dtype=np.uint8),
        "text": rng.integers(1, 49_406, (16, 77), dtype=np.int32),
    }
    rows["text"][:, 20] = 49_407  # end of text
    size_bytes: dict[tuple[str, str], int] = {}
    for precision in PRECISIONS:
        built = make(precision, graphs, tmp_path, rows)
        for tower in graphs:
            path = stored(built, tower, tmp_path / precision)
            plan = engine(path)
            assert plan.layers > 200
            size_bytes[tower, precision] = len(plan.data)
            path.unlink()
    for tower in graphs:  # the plan holds what the file says
        assert size_bytes[tower, "fp16"] < 0.65 * size_bytes[tower, "fp32"]
        # Not less for int8 of convolutions: RTX keeps the source of its kernels, one a fused group.
        assert size_bytes[tower, "int8"] < 0.75 * size_bytes[tower, "fp32"]


# --- what is in the files


def tiny_graph(*, opset: int = 20, weight: float = 0.1) -> Any:
    """Return a convolution, a product and the L2 norm over ``(batch, 8, 8, 3)`` pictures."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, weight, (16, 16, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "white"], ["pixels"]),
        helper.make_node("Conv", ["pixels", "stem"], ["maps"], name="stem"),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("Conv", ["active", "kernel"], ["mixed"], name="mix"),
        helper.make_node("GlobalAveragePool", ["mixed"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("ReduceL2", ["features", "axis"], ["norm"], keepdims=1),
        helper.make_node("Div", ["features", "norm"], ["image_embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, ["batch", 16])],
        [
            numpy_helper.from_array(np.float32(255), "white"),
            numpy_helper.from_array(rng.normal(0, 0.3, (16, 3, 3, 3)).astype(np.float32), "stem"),
            numpy_helper.from_array(kernel, "kernel"),
            numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


ROWS = {"image": np.random.default_rng(1).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)}


def content(built: BuiltVariant) -> Any:
    data = built.towers["image"].files["image.onnx"]
    assert isinstance(data, bytes)
    return onnx.shape_inference.infer_shapes(onnx.load_from_string(data))


def kinds(graph: Any) -> dict[str, int]:
    """Return the element type of every value."""
    values = (*graph.graph.value_info, *graph.graph.input, *graph.graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**found, **{tensor.name: tensor.data_type for tensor in graph.graph.initializer}}


def test_float32_is_the_graph_as_it_was(tmp_path: Path) -> None:
    made = content(make("fp32", {"image": tiny_graph()}, tmp_path))
    assert [node.op_type for node in made.graph.node] == [node.op_type for node in tiny_graph().graph.node]
    assert {tensor.data_type for tensor in made.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}


def test_a_cast_alone_reads_the_bytes(tmp_path: Path) -> None:
    """The passes for ONNX Runtime turn bytes; TensorRT refuses to."""
    graph = tiny_graph()
    graph.graph.node[0].CopyFrom(helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2]))
    graph.graph.node[1].CopyFrom(helper.make_node("Cast", ["turned"], ["planes"], to=TensorProto.FLOAT))
    for precision in PRECISIONS:
        made = content(make(precision, {"image": graph}, tmp_path, ROWS))
        assert [node.op_type for node in made.graph.node if "image" in node.input] == ["Cast"]


def test_float16_computes_in_float16_between_float32_inputs_and_outputs(tmp_path: Path) -> None:
    made = content(make("fp16", {"image": tiny_graph()}, tmp_path))
    types = kinds(made)
    for node in made.graph.node:
        if node.op_type == "Conv":
            assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}
    assert types["image_embedding"] == TensorProto.FLOAT


def test_int8_is_signed_symmetric_8_bits_and_float16_around(tmp_path: Path) -> None:
    built = make("int8", {"image": tiny_graph()}, tmp_path, ROWS)
    made = content(built)
    types = kinds(made)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    counts = Counter(node.op_type for node in made.graph.node)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (1, 2)
    producers = {output: node for node in made.graph.node for output in node.output}
    for node in made.graph.node:
        if node.op_type.endswith("QuantizeLinear"):
            assert tensors[node.input[1]].dtype == np.float16
            assert tensors[node.input[2]].dtype == np.int8
            assert not tensors[node.input[2]].any()
        if node.name == "mix" or "kernel" in " ".join(node.input):
            for name in node.input[:2]:
                if node.op_type == "Conv":
                    assert producers[name].op_type == "DequantizeLinear"  # no cast between: TensorRT fuses
                    assert types[name] == TensorProto.FLOAT16
    weights = [array for array in tensors.values() if array.dtype == np.int8 and array.ndim == 4]
    assert max(np.abs(array).max() for array in weights) == 127  # never the 7 bits of AVX2
    assert built.calibration is not None
    assert built.calibration["scheme"]["symmetric"] is True
    assert built.calibration["scheme"]["weight_bits"] == 8
    assert built.calibration["rows"] == {"image": 32}


def test_the_target_says_which_gpu(tmp_path: Path) -> None:
    graphs = {"image": tiny_graph()}
    assert make("fp16", graphs, tmp_path).requires == Requires()
    assert make("fp16", graphs, tmp_path, target="@cuda-sm87").requires == Requires(compute_capability="8.7")
    at_target = make("int8", graphs, tmp_path, ROWS, target="@cuda-sm87")
    assert at_target.towers["image"].files == make("int8", graphs, tmp_path, ROWS).towers["image"].files


def test_weights_may_stand_beside_the_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    from edgeclip.bundle import BundleWriter

    built = make("fp32", {"image": tiny_graph()}, tmp_path, external_data=True)
    tower = built.towers["image"]
    assert list(tower.files) == ["image.onnx", "image.onnx.data"]
    with BundleWriter(tmp_path / "bundle", manifest={}) as writer:
        names = [writer.add(f"v/{name}", content) for name, content in tower.files.items()]
        assert engine(writer.path / names[0]).data


def test_int8_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"'tensorrt-int8', image tower: its calibration rows are none"
    ):
        make("int8", {"image": tiny_graph()}, tmp_path)


def test_int8_wants_float16_scales(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'tensorrt-int8', image tower: it has opset 18.*at least 19"):
        make("int8", {"image": tiny_graph(opset=18)}, tmp_path, ROWS)


def test_a_weight_that_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'tensorrt-fp16', image tower: the pass Float16 fails.*'kernel'"):
        make("fp16", {"image": tiny_graph(weight=1e6)}, tmp_path)


def test_the_graph_that_was_given_stays(tmp_path: Path) -> None:
    graph = tiny_graph()
    before = graph.SerializeToString(deterministic=True)
    for precision in PRECISIONS:
        make(precision, {"image": graph}, tmp_path, ROWS)
    assert graph.SerializeToString(deterministic=True) == before
