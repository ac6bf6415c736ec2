"""Int8 files for ONNX Runtime."""

from __future__ import annotations

from edgeclip.errors import ExportError

from .build import BuildRequest, BuiltVariant

__all__ = ["quantized"]


def quantized(request: BuildRequest) -> BuiltVariant:
    """Make the int8 ONNX files of one variant.

    Raises:
        ExportError: it cannot be made.
    """
    raise ExportError(f"variant {request.spec.name!r}: no pass quantizes yet.")
