"""ONNX files for TensorRT: strongly typed, so that the file says the precision of every tensor.

TensorRT builds its engine from them on the device (``edgeclip compile``); nothing here needs TensorRT or a
GPU, and ONNX Runtime can run the same files on a CPU, slowly, to check their numbers. TensorRT's int8 is
symmetric and signed, weights and activations alike, and what is not quantized is float16: never the graph
made for a CPU, whose unsigned activations it does not take.

Nothing is rewritten for speed: TensorRT fuses padding, layouts and GELU itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx

from edgeclip.bundle import Requires
from edgeclip.calibration.sensitivity import Choice
from edgeclip.errors import ExportError
from edgeclip.quantization import TENSORRT, Int8Policy

from . import passes
from .build import BuildRequest, BuiltVariant
from .int8 import chosen_policy, said, symmetric_qdq
from .passes.cast_first import CastFirst
from .passes.float16 import Float16
from .ranges import check_rows
from .to_onnx import built_tower

__all__ = ["build"]

_INT8_OPSET: Final = 19
"""From it on Q/DQ take float16; before, each would stand between casts, which TensorRT does not fuse."""


def build(request: BuildRequest) -> BuiltVariant:
    """Make the ONNX files of one TensorRT variant.

    Raises:
        CalibrationError: a tower that is to be int8 has no calibration rows, or ranges cannot be had from
            them.
        ExportError: the opset is too old, a weight does not fit into float16, or a pass fails.
    """
    precision = request.spec.form.precision
    make = {"fp32": _single, "fp16": _half, "int8": _int8}[precision]
    policies: dict[str, Int8Policy] = {}
    choices: dict[str, Choice] = {}
    if precision == "int8":
        for tower, graph in request.graphs.items():  # before anything that takes long
            what = _what(request, tower)
            _check_opset(graph, what=what)
            check_rows(graph, request.calibration.get(tower), what=what)
        for tower, graph in request.graphs.items():
            policies[tower] = chosen_policy(request, tower, graph, TENSORRT, choices)
    towers = {}
    for tower, graph in request.graphs.items():
        typed = make(request, tower, graph, policies)
        towers[tower] = built_tower(tower, typed, external_data=request.options.external_data)
    target = request.spec.target
    return BuiltVariant(
        towers,
        requires=Requires() if target is None else target.requires,
        calibration=said(request, TENSORRT, policies, choices) if policies else None,
    )


def _single(
    request: BuildRequest, tower: str, graph: onnx.ModelProto, policies: Mapping[str, Int8Policy]
) -> onnx.ModelProto:
    return passes.apply(graph, [CastFirst()], what=_what(request, tower))


def _half(
    request: BuildRequest, tower: str, graph: onnx.ModelProto, policies: Mapping[str, Int8Policy]
) -> onnx.ModelProto:
    request.on_step(f"cast the {tower} tower to float16")
    return passes.apply(graph, [CastFirst(), Float16()], what=_what(request, tower))


def _int8(
    request: BuildRequest, tower: str, graph: onnx.ModelProto, policies: Mapping[str, Int8Policy]
) -> onnx.ModelProto:
    request.on_step(f"quantize the {tower} tower")
    what = _what(request, tower)
    rows, settings = request.calibration[tower], request.options.quantization
    quantized = symmetric_qdq(graph, rows, policies[tower], settings, what=what)
    return passes.apply(quantized, [CastFirst(), Float16()], what=what)


def _what(request: BuildRequest, tower: str) -> str:
    return f"variant {request.spec.name!r}, {tower} tower"


def _check_opset(graph: onnx.ModelProto, *, what: str) -> None:
    opset = next((entry.version for entry in graph.opset_import if not entry.domain), 0)
    if opset < _INT8_OPSET:
        raise ExportError(
            f"{what}: it has opset {opset}, whose quantization knows no float16; expected at least "
            f"{_INT8_OPSET}, so export it with --opset 20."
        )
