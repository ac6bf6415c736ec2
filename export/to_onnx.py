"""ONNX files for ONNX Runtime: float32 as traced, float16, int8.

One file a tower. Weights go into a second file beside it where one file cannot hold them (2 GB is the limit
of a protobuf message), or where that is asked for.
"""

from __future__ import annotations

import hashlib
from typing import Any

import onnx
from onnx import TensorProto, helper

from edgeclip.bundle import Requires, TensorEntry, stored_name
from edgeclip.errors import ExportError

from .build import BuildRequest, BuiltTower, BuiltVariant
from .passes import LARGEST_MESSAGE, apply, check
from .passes.float16 import Float16
from .passes.sequences import for_onnx_runtime
from .passes.strip_provenance import StripProvenance

__all__ = ["build", "built_tower", "tensor_entries"]

_INLINE_BYTES = 1024  # smaller tensors stay in the graph, where engines read shapes and axes


def build(request: BuildRequest) -> BuiltVariant:
    """Make the ONNX files of one variant.

    Raises:
        ExportError: the variant cannot be made.
    """
    precision = request.spec.form.precision
    if precision == "int8":
        from .int8 import quantized

        return quantized(request)
    passes = for_onnx_runtime(request.spec, gelu_tanh=request.options.gelu_tanh)
    if precision == "fp16":
        passes += [Float16(), StripProvenance()]
    target = request.spec.target
    towers = {}
    for name, graph in request.graphs.items():
        request.on_step(f"{name} tower in {precision}")
        made = apply(graph, passes, what=f"{name} tower of {request.spec.name!r}")
        towers[name] = built_tower(name, made, external_data=request.options.external_data)
    return BuiltVariant(towers, requires=Requires() if target is None else target.requires)


def built_tower(tower: str, graph: onnx.ModelProto, *, external_data: bool | None = None) -> BuiltTower:
    """Run the full checker and return the files of one tower; equal graphs give equal bytes.

    Args:
        tower: its name.
        graph: a valid graph; stays as it is.
        external_data: see :class:`edgeclip.export.build.BuildOptions`.

    Raises:
        ExportError: the graph is not valid, or needs a second file and that was ruled out.
    """
    check(graph, what=f"{tower} tower")
    weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    if external_data is False and weights > LARGEST_MESSAGE:
        raise ExportError(
            f"{tower} tower: its weights have {weights / 1e9:.1f} GB, expected at most "
            f"{LARGEST_MESSAGE / 1e9:.1f} GB in one file; allow external data."
        )
    inputs, outputs = tensor_entries(graph)
    model = f"{tower}.onnx"
    files: dict[str, bytes] = {}
    if external_data or weights > LARGEST_MESSAGE:
        graph, data = _split(graph, f"{model}.data")
        files[model] = graph.SerializeToString(deterministic=True)
        files[f"{model}.data"] = data
    else:
        files[model] = graph.SerializeToString(deterministic=True)
    return BuiltTower(model, files, inputs, outputs)


def _split(graph: onnx.ModelProto, name: str) -> tuple[onnx.ModelProto, bytes]:
    """Move the weights out; the graph names their file as a bundle will store it."""
    data = bytearray()
    places: dict[str, tuple[int, int]] = {}
    for tensor in graph.graph.initializer:
        if len(tensor.raw_data) >= _INLINE_BYTES:
            data += bytes(-len(data) % 4096)  # engines map pages
            places[tensor.name] = (len(data), len(tensor.raw_data))
            data += tensor.raw_data
    location = stored_name(name, hashlib.sha256(data).hexdigest())
    thin = onnx.ModelProto()
    for field, value in graph.ListFields():
        if field.name != "graph":
            _copy_field(thin, field, value)
    for field, value in graph.graph.ListFields():
        if field.name != "initializer":
            _copy_field(thin.graph, field, value)
    for tensor in graph.graph.initializer:
        kept = thin.graph.initializer.add()
        if tensor.name not in places:
            kept.CopyFrom(tensor)
            continue
        kept.name, kept.data_type = tensor.name, tensor.data_type
        kept.dims.extend(tensor.dims)
        kept.data_location = TensorProto.EXTERNAL
        offset, length = places[tensor.name]
        for key, said in (("location", location), ("offset", str(offset)), ("length", str(length))):
            kept.external_data.add(key=key, value=said)
    return thin, bytes(data)


def _copy_field(message: Any, field: Any, value: Any) -> None:
    if field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def tensor_entries(graph: onnx.ModelProto) -> tuple[tuple[TensorEntry, ...], tuple[TensorEntry, ...]]:
    """Return inputs and outputs of a graph as the manifest names them.

    Raises:
        ExportError: a dimension is neither a number nor a name.
    """
    return (
        tuple(_entry(value) for value in graph.graph.input),
        tuple(_entry(value) for value in graph.graph.output),
    )


def _entry(value: onnx.ValueInfoProto) -> TensorEntry:
    kind = value.type.tensor_type
    shape: list[int | str] = []
    for axis, dim in enumerate(kind.shape.dim):
        if not dim.HasField("dim_value") and not dim.dim_param:
            raise ExportError(
                f"{value.name!r}: its dimension {axis} has no size and no name; name it in the graph."
            )
        shape.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param)
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return TensorEntry(name=value.name, dtype=dtype, shape=tuple(shape))
