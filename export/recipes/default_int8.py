"""Int8 forms of the default model's two graphs, for AVX2 processors without VNNI too.

*Image*: static Q/DQ (Jacob et al. 2018) on convolutions and residual sums, weights symmetric per output
channel. Two ways are safe on AVX2, whose ``vpmaddubsw`` adds two products of an unsigned and a signed
byte in 16 bits: weights in 7 bits (``reduce_range``; 2·255·64 = 32,640 is the largest that fits), or
8-bit weights in a session with ``session.x64quantprecision=1``, which takes exact kernels. The embedded
bundle uses the second: it is closer to float32. Everything from the pooled features on stays float: the
classifier's logits go through a softmax, which turns a small error into a large one.

*Text*: the table of pieces in int8 with one scale a row; arithmetic stays float.

Weights outside Q/DQ are only stored small: int8 with one scale a row or column, or float16, followed by
``Cast`` and ``Mul`` of constants, which engines fold when they load the graph. (A ``DequantizeLinear`` there
would be computed on every run: ONNX Runtime keeps those for its Q/DQ rewriting.)
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from edgeclip.errors import CalibrationError
from edgeclip.models.efficientnet_lite import EfficientNetLite, InvertedResidual

from ..storage import gather_int8, store_float16, store_int8
from ..trace import check_model, strip_provenance

__all__ = ["quantize_image_graph", "round_weights", "shrink_text_graph"]

_MIN_IMAGES = 16


def quantize_image_graph(
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    *,
    method: Literal["minmax", "percentile", "entropy"] = "minmax",
    reduce_range: bool = True,
    exclude: Sequence[str] = (),
    float_tail: bool = True,
) -> onnx.ModelProto:
    """Return the int8 form of an image graph.

    Args:
        model: float graph with uint8 input, as ``export/trace.py`` makes it.
        images: calibration set, ``(n, H, W, 3)`` uint8.
        method: how ranges are chosen from the calibration set.
        reduce_range: 7-bit weights.
        exclude: names of nodes that stay float.
        float_tail: store classifier and class table in int8 and float16 instead of float32.

    Raises:
        CalibrationError: fewer than 16 pictures, or of another shape than the graph's input.
    """
    from edgeclip.runtime.ort import import_onnxruntime

    import_onnxruntime()  # first, and so with its telemetry off
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    expected = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    if images.ndim != 4 or list(images.shape[1:]) != expected or len(images) < _MIN_IMAGES:
        raise CalibrationError(
            f"calibration set: got {images.shape}, expected at least {_MIN_IMAGES} pictures of shape "
            f"{tuple(expected)}."
        )
    methods = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "float.onnx", Path(work) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            str(source),
            str(target),
            _Reader(model.graph.input[0].name, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Clip", "Add"],
            nodes_to_exclude=[*exclude, *_preprocessing_nodes(model)],
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=methods[method],
            extra_options={
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
                "CalibTensorRangeSymmetric": False,
            },
        )
        quantized = onnx.load(target)
    if float_tail:
        for node in [node for node in quantized.graph.node if node.op_type in ("Gemm", "MatMul")]:
            weight = node.input[1]
            if node.op_type == "Gemm":
                transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
                store_int8(quantized, weight, axis=0 if transposed else 1)
            else:
                store_float16(quantized, weight)
    strip_provenance(quantized)
    check_model(quantized, what="int8 image graph")
    return quantized


def shrink_text_graph(model: onnx.ModelProto, *, table: str | None = None) -> onnx.ModelProto:
    """Return a text graph stored in int8: the table with a scale a row, other matrices a scale a column."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    gathers = [node for node in result.graph.node if node.op_type == "Gather"]
    names = {tensor.name for tensor in result.graph.initializer}
    for node in gathers:
        if node.input[0] in names:
            gather_int8(result, node)
    matrices = [t for t in result.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
    readers = {node.input[1]: node for node in result.graph.node if node.op_type in ("Gemm", "MatMul")}
    for tensor in matrices:
        if tensor.name in readers and np.prod(tensor.dims) >= 4096:
            node = readers[tensor.name]
            transposed = any(a.name == "transB" and a.i == 1 for a in node.attribute)
            store_int8(result, tensor.name, axis=0 if transposed else 1)
    strip_provenance(result)
    check_model(result, what="int8 text graph")
    return result


class _Reader:
    """Feeds pictures to ONNX Runtime's calibrators."""

    def __init__(self, name: str, images: NDArray[np.uint8], batch: int = 8) -> None:
        self._name, self._images, self._batch = name, images, batch
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self._parts: Iterator[int] = iter(range(0, len(self._images), self._batch))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next whole batch (histograms want one shape), None at the end."""
        start = next(self._parts, None)
        if start is None or (start and start + self._batch > len(self._images)):
            return None
        return {self._name: self._images[start : start + self._batch]}


def _preprocessing_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes before the first convolution."""
    names = []
    for node in model.graph.node:
        if node.op_type == "Conv":
            break
        names.append(node.name)
    return names


# Weights made for int8
# ------------------------------------------------------------------------------------------------

_CLIP_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@torch.no_grad()
def round_weights(backbone: EfficientNetLite, images: Tensor, *, bits: int = 7) -> EfficientNetLite:
    """Return a folded copy whose convolution weights lie on the int8 grid, with corrected biases.

    Per output channel the scale with the least squared error of the weights is taken (a little clipping of
    outliers buys a finer grid); then, layer by layer in the order of the network, the bias takes up the mean
    error of its output over the calibration set (Nagel et al. 2019, §4.2, empirical form), so that errors do
    not pile up.

    Args:
        backbone: float network.
        images: calibration set, ``(n, 3, H, W)``, normalized.
        bits: of a weight, sign included.
    """
    exact, rounded = copy.deepcopy(backbone).eval().fold(), copy.deepcopy(backbone).eval().fold()

    def step(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Run one convolution in both networks, after rounding and correcting the second."""
        first, second = exact.get_submodule(name), rounded.get_submodule(name)
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        assert second.bias is not None
        second.weight.copy_(_on_grid(second.weight, bits))
        wanted, got = first(x), second(y)
        shift = (wanted - got).mean(dim=(0, 2, 3))
        second.bias += shift
        return wanted, got + shift[:, None, None]

    x, y = step("stem", images, images)
    x, y = F.relu6(x), F.relu6(y)
    for index, block in enumerate(exact.blocks):
        assert isinstance(block, InvertedResidual)
        inputs = x, y
        if block.expands:
            x, y = step(f"blocks.{index}.expand", x, y)
            x, y = F.relu6(x), F.relu6(y)
        x, y = step(f"blocks.{index}.depthwise", x, y)
        x, y = F.relu6(x), F.relu6(y)
        x, y = step(f"blocks.{index}.project", x, y)
        if block.adds_input:
            x, y = x + inputs[0], y + inputs[1]
    step("head", x, y)
    return rounded


def _on_grid(weight: Tensor, bits: int) -> Tensor:
    """Round ``(C_out, …)`` to symmetric levels a channel, scale by squared error."""
    levels = 2 ** (bits - 1) - (bits == 8)  # the grids of ONNX Runtime: ±127, and ±64 for its reduced range
    flat = weight.flatten(1).double()
    largest = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    best, best_error = flat, torch.full_like(largest, torch.inf)
    for factor in _CLIP_FACTORS:
        scale = largest * factor / levels
        candidate = (flat / scale).round().clamp(-levels, levels) * scale
        error = (candidate - flat).square().sum(dim=1, keepdim=True)
        best, best_error = torch.where(error < best_error, candidate, best), torch.minimum(error, best_error)
    return best.to(weight.dtype).view_as(weight)
