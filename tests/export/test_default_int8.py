"""The int8 forms of the default recipe: small, close to float, and safe where bytes saturate."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from onnx import numpy_helper  # noqa: E402

from edgeclip.errors import CalibrationError  # noqa: E402
from edgeclip.export.recipes.default_int8 import (  # noqa: E402
    _CLIP_FACTORS,
    _on_grid,
    quantize_image_graph,
    round_weights,
    shrink_text_graph,
)
from edgeclip.export.trace import to_bytes, trace_image_tower, trace_text_tower  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import BagTextConfig, CLIPConfig, PosteriorImageConfig  # noqa: E402
from edgeclip.models.efficientnet_lite import LITE_MEAN, LITE_STD  # noqa: E402
from edgeclip.runtime.ort import import_onnxruntime  # noqa: E402

SIZE = 64
CONFIG = CLIPConfig(
    name="tiny",
    image=PosteriorImageConfig(part_dims=(12, 4), part_weights=(0.75, 0.25)),
    text=BagTextConfig(
        vocab_size=300, context_length=8, pad_id=299, width=64, heads=2, hidden_dim=64, embed_dim=16
    ),
    image_size_px=(SIZE, SIZE),
    mean=LITE_MEAN,
    std=LITE_STD,
)


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    built = build_clip(CONFIG)
    torch.nn.init.normal_(built.image_tower.class_table)
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return built.eval()


def _pictures(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def _run(graph: onnx.ModelProto, feed: NDArray[np.generic]) -> NDArray[np.float32]:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(to_bytes(graph), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: feed})[0]


def _weight_bytes(graph: onnx.ModelProto) -> int:
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.graph.initializer)


@pytest.mark.slow
def test_the_int8_image_graph_is_small_and_close_to_float(model: CLIP) -> None:
    exact = trace_image_tower(model.image_tower, CONFIG)
    pictures = _pictures(24)

    quantized = quantize_image_graph(exact, pictures, reduce_range=False)

    kinds = {node.op_type for node in quantized.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    weights = [
        t for t in quantized.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    convolutions = [node for node in exact.graph.node if node.op_type == "Conv"]
    assert len(weights) == len(convolutions), "every convolution has 8-bit weights"
    assert _weight_bytes(quantized) < 0.35 * _weight_bytes(exact)
    # Random weights put all pictures within a hair of each other: this shows only that nothing is broken. How
    # close int8 is with trained weights, the golden pictures of the embedded bundle say.
    wanted, got = _run(exact, pictures), _run(quantized, pictures)
    assert (wanted * got).sum(1).min() > 0.99


def test_too_few_pictures_are_refused(model: CLIP) -> None:
    graph = trace_image_tower(model.image_tower, CONFIG)
    with pytest.raises(CalibrationError, match=r"got \(3, 64, 64, 3\), expected at least 16 pictures"):
        quantize_image_graph(graph, _pictures(3))


def test_the_small_text_graph_gives_the_same_embeddings(model: CLIP) -> None:
    exact = trace_text_tower(model.text_tower, CONFIG.text.context_length)
    tokens = np.random.default_rng(0).integers(0, 299, (32, 8)).astype(np.int32)

    small = shrink_text_graph(exact)

    assert _weight_bytes(small) < 0.4 * _weight_bytes(exact)
    wanted, got = _run(exact, tokens), _run(small, tokens)
    assert (wanted * got).sum(1).min() > 0.999


@pytest.mark.parametrize("bits", [7, 8])
def test_rounded_weights_lie_on_one_grid_a_channel(bits: int) -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0

    rounded = _on_grid(weight, bits)

    levels = {7: 64, 8: 127}[bits]
    for channel, exact in zip(rounded, weight, strict=True):
        steps = [exact.abs().max().clamp_min(1e-12) * factor / levels for factor in _CLIP_FACTORS]
        multiples = [channel / step for step in steps]
        assert any(
            torch.allclose(each, each.round(), atol=1e-3) and each.abs().max() < levels + 0.5
            for each in multiples
        )
        assert (channel - exact).abs().max() <= 0.35 * exact.abs().max()
    assert (rounded - weight).square().mean() < weight.square().mean() / (100 if bits == 8 else 25)


@pytest.mark.slow
def test_correcting_biases_brings_rounded_weights_back_to_the_float_mean(model: CLIP) -> None:
    backbone = model.image_tower.backbone
    images = torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    rounded = round_weights(backbone, images, bits=8)

    with torch.no_grad():
        exact, close = backbone(images), rounded(images)
    assert (exact.mean(0) - close.mean(0)).abs().max() <= 0.1 * exact.std()
    assert torch.nn.functional.cosine_similarity(exact, close).min() > 0.98
