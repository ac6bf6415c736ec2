"""The traced graphs compute what the eager towers compute, and say nothing about where they were made."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.errors import ExportError  # noqa: E402
from edgeclip.export.trace import (  # noqa: E402
    OPSET,
    TracedTowers,
    check_model,
    fold_padding,
    strip_provenance,
    to_bytes,
    trace,
    trace_image_tower,
    trace_module,
    trace_text_tower,
)
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import BagTextConfig, CLIPConfig, PosteriorImageConfig  # noqa: E402
from edgeclip.models.efficientnet_lite import LITE_MEAN, LITE_STD  # noqa: E402

# float32 sums in another order, folded norms: measured 1e-7 on unit embeddings.
TOLERANCE = 1e-4
PAD = 49
SIZE = 64
CONFIG = CLIPConfig(
    name="tiny",
    image=PosteriorImageConfig(part_dims=(12, 4), part_weights=(0.75, 0.25)),
    text=BagTextConfig(
        vocab_size=50, context_length=8, pad_id=PAD, width=8, heads=2, hidden_dim=8, embed_dim=16
    ),
    image_size_px=(SIZE, SIZE),
    mean=LITE_MEAN,
    std=LITE_STD,
)


def make_model() -> CLIP:
    torch.manual_seed(0)
    model = build_clip(CONFIG)
    torch.nn.init.normal_(model.image_tower.class_table)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> CLIP:
    return make_model()


@pytest.fixture(scope="module")
def traced(model: CLIP) -> TracedTowers:
    return trace(model, CONFIG)


def run(graph: onnx.ModelProto, feed: NDArray[np.generic]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(to_bytes(graph), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: feed})[0]


def pixels(batch: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)


def test_a_bare_module_is_traced_as_it_is() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(12, 4))
    graph = trace_module(module, torch.zeros(2, 3, 4), input_name="row", output_name="sums")
    assert [node.op_type for node in graph.graph.node] == ["Reshape", "Gemm"]
    feed = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    expected = module(torch.from_numpy(feed)).numpy()
    assert np.abs(run(graph, feed) - expected).max() < 1e-6
    assert [value.name for value in (*graph.graph.input, *graph.graph.output)] == ["row", "sums"]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_image_graph_equals_eager_with_preprocessing_on_the_host(
    model: CLIP, traced: TracedTowers, batch: int
) -> None:
    image = pixels(batch)
    host = (torch.from_numpy(image).permute(0, 3, 1, 2).double() / 255 - LITE_MEAN[0]) / LITE_STD[0]
    with torch.no_grad():
        wanted = copy.deepcopy(model).double().encode_image(host, normalize=True).numpy()
    got = run(traced.image, image)
    assert np.abs(got - wanted).max() < TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_parts_of_features_and_their_gate_are_in_the_graph(model: CLIP) -> None:
    parts = PosteriorImageConfig(
        part_dims=(6, 2), part_weights=(0.4, 0.1), feature_dims=(4,), feature_weights=(0.5,), gated_dim=4
    )
    config = replace(CONFIG, image=parts)
    torch.manual_seed(0)
    seeing = build_clip(config)
    tower = seeing.image_tower
    tower.backbone.load_state_dict(model.image_tower.backbone.state_dict())
    for table in (tower.class_table, tower.feature_table, tower.feature_bias):
        torch.nn.init.normal_(table)
    image = pixels(3)
    host = (torch.from_numpy(image).permute(0, 3, 1, 2).double() / 255 - LITE_MEAN[0]) / LITE_STD[0]
    with torch.no_grad():
        wanted = copy.deepcopy(seeing.eval()).double().encode_image(host).numpy()
    got = run(trace_image_tower(tower, config), image)
    assert np.abs(got - wanted).max() < TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_text_graph_equals_eager(model: CLIP, traced: TracedTowers, batch: int) -> None:
    tokens = np.full((batch, 8), PAD, np.int32)
    for row in range(batch):
        tokens[row, : row * 3 + 1] = np.arange(1, row * 3 + 2)
    with torch.no_grad():
        wanted = model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    assert np.abs(run(traced.text, tokens) - wanted).max() < TOLERANCE


def test_interface_is_the_documented_one(traced: TracedTowers) -> None:
    said = {}
    for graph in traced.by_name().values():
        assert [entry.version for entry in graph.opset_import] == [OPSET]
        for value in (*graph.graph.input, *graph.graph.output):
            kind = value.type.tensor_type
            said[value.name] = (kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim])
    assert said == {
        "image": (TensorProto.UINT8, ["batch", SIZE, SIZE, 3]),
        "image_embedding": (TensorProto.FLOAT, ["batch", 16]),
        "tokens": (TensorProto.INT32, ["batch", "length"]),
        "text_embedding": (TensorProto.FLOAT, ["batch", 16]),
    }


def test_batch_norms_and_padding_are_folded(traced: TracedTowers) -> None:
    kinds = {node.op_type for node in traced.image.graph.node}
    assert not kinds & {"BatchNormalization", "Pad"}


def test_tracing_leaves_the_model_as_it_was(model: CLIP, traced: TracedTowers) -> None:
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_graphs_name_no_path_and_no_stack(traced: TracedTowers) -> None:
    for graph in traced.by_name().values():
        assert not graph.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
        assert not re.search(rb"/(home|work|tmp|usr|root)/|\.py\b|site-packages", to_bytes(graph))


@pytest.mark.slow
def test_same_bytes_from_two_directories(tmp_path: Path, repo: Path) -> None:
    """Two fresh processes, two working directories, two hash seeds."""
    script = (
        "import sys, hashlib; sys.path[:0] = [sys.argv[1], sys.argv[2]]\n"
        "import test_trace as t\n"
        "towers = t.trace(t.make_model(), t.CONFIG).by_name()\n"
        "print([hashlib.sha256(t.to_bytes(g)).hexdigest() for g in towers.values()])\n"
    )
    said = []
    for name, seed in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                script,
                str(repo / "tests/export"),
                str(repo / "tests/tools"),
            ],
            cwd=tmp_path / name,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path / name)},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout.splitlines()[-1])
    assert said[0] == said[1]


def test_padding_that_a_convolution_cannot_say_stays() -> None:
    def graph(mode: str, fill: float) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Pad", ["x", "amounts", "fill"], ["padded"], mode=mode),
            helper.make_node("Conv", ["padded", "w"], ["y"], pads=[1, 1, 1, 1]),
        ]
        constants = [
            numpy_helper.from_array(np.array([0, 0, 0, 1, 0, 0, 2, 3], np.int64), "amounts"),
            numpy_helper.from_array(np.array(fill, np.float32), "fill"),
            numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w"),
        ]
        shape = [1, 1, 8, 8]
        made = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            constants,
        )
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)

    foldable = graph("constant", 0.0)
    x = np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)
    before = run(foldable, x)
    assert fold_padding(foldable) == 1
    assert [node.op_type for node in foldable.graph.node] == ["Conv"]
    np.testing.assert_array_equal(run(foldable, x), before)
    assert fold_padding(graph("constant", 1.0)) == 0
    assert fold_padding(graph("edge", 0.0)) == 0


def test_invalid_graph_is_refused(traced: TracedTowers) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(traced.text)
    broken.graph.node[-1].input[0] = "nobody"
    with pytest.raises(ExportError, match="text: the ONNX checker refuses the graph"):
        check_model(broken, what="text")


def test_foreign_operator_set_is_refused(traced: TracedTowers) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(traced.text)
    other.opset_import.append(helper.make_opsetid("somebody.else", 1))
    with pytest.raises(
        ExportError, match=r"text: it imports .*'somebody\.else': 1.*, expected .* 17 or 18 or"
    ):
        check_model(other, what="text")
    with pytest.raises(ExportError, match=r"text: it imports .*'': 20.*, expected ONNX's own alone, 21\."):
        check_model(traced.text, what="text", opset=21)


def test_tower_that_cannot_be_traced_is_an_export_error() -> None:
    class Branching(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.float() if tokens.sum() > 3 else -tokens.float()

    with pytest.raises(ExportError, match="'tokens' tower cannot be traced to ONNX opset 20"):
        trace_text_tower(Branching(), 4)


def test_stripping_twice_changes_nothing(traced: TracedTowers) -> None:
    again = onnx.ModelProto()
    again.CopyFrom(traced.image)
    strip_provenance(again)
    assert to_bytes(again) == to_bytes(traced.image)
