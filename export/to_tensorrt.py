"""ONNX files for TensorRT: strongly typed, so that the file says the precision of every tensor.

TensorRT builds its engine from them on the device (``edgeclip compile``); nothing here needs TensorRT or a
GPU. Its int8 is symmetric and signed, weights and activations alike, and what is not quantized is float16:
never the graph made for a CPU, whose unsigned activations and 7-bit weights it does not take.
"""

from __future__ import annotations

from edgeclip.bundle import Requires
from edgeclip.errors import ExportError

from .build import BuildRequest, BuiltVariant

__all__ = ["build"]


def build(request: BuildRequest) -> BuiltVariant:
    """Make the ONNX files of one TensorRT variant.

    Raises:
        ExportError: it cannot be made.
    """
    from .to_onnx import built_tower

    precision = request.spec.form.precision
    if precision != "fp32":
        raise ExportError(f"variant {request.spec.name!r}: no pass makes {precision} for TensorRT yet.")
    target = request.spec.target
    return BuiltVariant(
        {
            name: built_tower(name, graph, external_data=request.options.external_data)
            for name, graph in request.graphs.items()
        },
        requires=Requires() if target is None else target.requires,
    )
