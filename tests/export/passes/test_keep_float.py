"""What stays float between int8 neighbours stays float in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.export.passes import apply  # noqa: E402
from edgeclip.export.passes.keep_float import KeepFloat  # noqa: E402
from edgeclip.export.passes.qdq import InsertQdq  # noqa: E402
from edgeclip.quantization import CPU  # noqa: E402
from edgeclip.runtime.ort import import_onnxruntime  # noqa: E402

SIZE, WIDTH = 8, 16
EXACT = {"session.x64quantprecision": "1"}
ROUNDED = {"session.disable_quant_qdq": "1"}
ROWS = np.random.default_rng(0).uniform(-1, 1, (2, 3, SIZE, SIZE)).astype(np.float32)


def tower(*, clamp: bool) -> onnx.ModelProto:
    """Three convolutions; the channels of the middle one are a thousand times apart."""
    rng = np.random.default_rng(2)
    spread = np.logspace(-3, 0, WIDTH, dtype=np.float32)[:, None, None, None]
    weights: dict[str, NDArray[Any]] = {
        "first": rng.normal(size=(WIDTH, 3, 3, 3)).astype(np.float32),
        "middle": rng.normal(size=(WIDTH, WIDTH, 1, 1)).astype(np.float32) * spread,
        "last": rng.normal(size=(WIDTH, WIDTH, 1, 1)).astype(np.float32) / spread[:, 0][None],
    }
    weights["last"] = weights["last"].reshape(WIDTH, WIDTH, 1, 1)
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["first_out"]),
        helper.make_node("Conv", ["first_out", "middle"], ["middle_out"]),
        helper.make_node("Relu", ["middle_out"], ["relu"]),
        helper.make_node("Conv", ["relu" if clamp else "middle_out", "last"], ["last_out"]),
        helper.make_node("GlobalAveragePool", ["last_out"], ["embedding"]),
    ]
    graph = helper.make_graph(
        [node for node in nodes if clamp or node.op_type != "Relu"],
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", WIDTH, 1, 1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


def session(graph: onnx.ModelProto, config: dict[str, str], kept: Path | None = None) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if kept is not None:
        options.optimized_model_filepath = str(kept)
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def quantized(graph: onnx.ModelProto, *more: Any) -> onnx.ModelProto:
    ranges = {"image": (-1.0, 1.0), "first_out": (-20.0, 20.0), "last_out": (-900.0, 900.0)}
    ranges |= {"relu": (0.0, 60.0), "middle_out": (-60.0, 60.0)}
    return apply(graph, [InsertQdq(("first_out", "last_out"), ranges, CPU), *more], what="tower")


@pytest.mark.parametrize("clamp", [True, False])
def test_the_weight_is_not_rounded(tmp_path: Path, clamp: bool) -> None:
    graph = tower(clamp=clamp)
    kept = quantized(graph, KeepFloat())
    truth = session(kept, ROUNDED).run(None, {"image": ROWS})[0]
    got = session(kept, EXACT, tmp_path / "kept.onnx").run(None, {"image": ROWS})[0]
    assert np.abs(got - truth).max() < 0.01 * np.abs(truth).max()
    used = [node.op_type for node in onnx.load(tmp_path / "kept.onnx").graph.node]
    assert sum("QLinearConv" in kind for kind in used) == 2
    # Without the pass it is, and this test would see it.
    bare = session(quantized(graph), EXACT, tmp_path / "bare.onnx").run(None, {"image": ROWS})[0]
    used = [node.op_type for node in onnx.load(tmp_path / "bare.onnx").graph.node]
    assert sum("QLinearConv" in kind for kind in used) == 3
    assert np.abs(bare - truth).max() > 0.05 * np.abs(truth).max()


def test_it_costs_no_pass_over_the_tensor(tmp_path: Path) -> None:
    session(quantized(tower(clamp=False), KeepFloat()), EXACT, tmp_path / "kept.onnx")
    used = [node.op_type for node in onnx.load(tmp_path / "kept.onnx").graph.node]
    assert "LeakyRelu" not in used


def test_it_is_exact() -> None:
    kept = quantized(tower(clamp=True), KeepFloat())
    bare = quantized(tower(clamp=True))
    a, b = (session(each, ROUNDED).run(None, {"image": ROWS})[0] for each in (kept, bare))
    np.testing.assert_array_equal(a, b)


def test_graphs_without_such_products_stay_as_they_are() -> None:
    graph = tower(clamp=True)
    assert apply(graph, [KeepFloat()], what="tower") == apply(graph, [], what="tower")
