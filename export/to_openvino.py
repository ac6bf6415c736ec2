"""OpenVINO's IR: an ``.xml`` and a ``.bin`` a tower, in float32, float16 or int8.

Inputs and outputs keep their names, dtypes and shapes: uint8 pictures in, float32 embeddings out, whatever
the precision between. *fp16* stores weights in float16, but for those that float16 cannot hold; a device with
float16 arithmetic also computes in it. *int8* is the quantization of :mod:`.int8`, with the same policies,
ranges and biases. Only what goes into products is rounded, though: OpenVINO computes what stands between two
products (GELU, residual sums) within the first one, and rounds once, behind it. Equal graphs, rows and
versions give equal bytes: layers are named by kind and number, and what tells versions is left out.
"""

from __future__ import annotations

import importlib.util
import io
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from edgeclip.bundle import Requires
from edgeclip.errors import ExportError, MissingExtraError
from edgeclip.quantization import WEIGHTS, Int8Policy, Scheme
from edgeclip.runtime.ov import import_openvino, openvino_message

from .build import BuildRequest, BuiltTower, BuiltVariant
from .int8 import chosen_policy, quantize, said, scheme_of
from .passes.float16 import MOST_LOST, lost
from .ranges import check_rows
from .storage import LARGE, store_small
from .to_onnx import tensor_entries

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from edgeclip.calibration.sensitivity import Choice

__all__ = ["build", "openvino_scheme", "store_weights"]

_ENGINE: Final = ">=2026.1"
"""Versions of OpenVINO that read these files; 2026.1.0 and 2026.4.1 were tried."""
_INLINE_BYTES: Final = 1024  # smaller tensors stay in the graph, where shapes and axes are read
_PRODUCTS: Final = frozenset({"Convolution", "GroupConvolution", "MatMul"})


def build(request: BuildRequest) -> BuiltVariant:
    """Make the IR files of one variant.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        CalibrationError: a tower has no calibration rows, they do not fit, or int8 misses its target.
        ExportError: the variant cannot be made.
    """
    spec, precision = request.spec, request.spec.form.precision
    _require("openvino", extra="openvino")
    if precision == "int8":
        for tower, graph in request.graphs.items():
            check_rows(graph, request.calibration.get(tower), what=f"variant {spec.name!r}, {tower} tower")
    _check_target(request)
    scheme = openvino_scheme(fit_pairs=spec.target is None or spec.target.fit_pairs)
    towers = {}
    policies: dict[str, Int8Policy] = {}
    choices: dict[str, Choice] = {}
    for tower, graph in request.graphs.items():
        what = f"variant {spec.name!r}, {tower} tower"
        if precision == "int8":
            request.on_step(f"quantize the {tower} tower")
            policies[tower] = chosen_policy(request, tower, graph, scheme, choices)
            network = _quantized(tower, request, policies[tower], scheme, what=what)
        else:
            request.on_step(f"convert the {tower} tower")
            network = _converted(tower, graph, request.work, what=what)
        towers[tower] = _stored(tower, network, graph, request.work, what=what, halve=precision == "fp16")
        del network
    target = Requires() if spec.target is None else spec.target.requires
    return BuiltVariant(
        towers,
        requires=msgspec.structs.replace(target, engine=_ENGINE),
        calibration=said(request, scheme, policies, choices) if policies else None,
    )


def openvino_scheme(*, fit_pairs: bool) -> Scheme:
    """Return OpenVINO's form of int8, with weights that fit in pairs or not."""
    return replace(scheme_of(fit_pairs=fit_pairs), integer_outputs=False)


def _require(module: str, *, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError("exporting OpenVINO files", extra=extra, module=module)


def _check_target(request: BuildRequest) -> None:
    """Refuse what the NPU cannot run."""
    spec = request.spec
    if spec.target_name != "intel-npu":
        return
    if spec.form.precision == "fp32":
        raise ExportError(
            f"variant {spec.name!r}: the NPU has no float32 arithmetic; export openvino-fp16 or -int8."
        )
    for tower, graph in request.graphs.items():
        (entry, *_), _ = tensor_entries(graph)
        if any(isinstance(size, str) for size in entry.shape):
            raise ExportError(
                f"variant {spec.name!r}: the NPU takes towers of one batch, and the {tower} tower takes "
                f"{entry.name!r} of {entry.shape}; export with --static-batch 1."
            )


# --- conversion -------------------------------------------------------------------------------------------


def _converted(tower: str, graph: onnx.ModelProto, work: Path, *, what: str) -> Any:
    """Return a graph as OpenVINO's model, simplified as its converter does it."""
    openvino = import_openvino()
    from openvino._offline_transformations import apply_moc_transformations

    inputs, outputs = tensor_entries(graph)
    try:
        network = openvino.Core().read_model(_written(graph, work / f"{tower}.onnx"))
        apply_moc_transformations(network, cf=True, smart_reshape=True)
    except Exception as error:
        raise ExportError(f"{what}: OpenVINO cannot convert the graph: {openvino_message(error)}.") from error
    # Merged layers leave several names on one tensor.
    for port, entry in zip((*network.inputs, *network.outputs), (*inputs, *outputs), strict=True):
        port.get_tensor().set_names({entry.name})
    return network


def _written(graph: onnx.ModelProto, path: Path) -> Path:
    """Write a graph with its weights beside it, and return where: from there OpenVINO maps them."""
    import onnx

    thin = onnx.ModelProto()
    thin.CopyFrom(graph)
    data = path.with_suffix(".data")
    with data.open("wb") as stream:
        for tensor in thin.graph.initializer:
            if len(tensor.raw_data) < _INLINE_BYTES:
                continue
            stream.write(bytes(-stream.tell() % 64))
            place = {"location": data.name, "offset": stream.tell(), "length": len(tensor.raw_data)}
            stream.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(thin.SerializeToString(deterministic=True))
    return path


def _stored(
    tower: str, network: Any, graph: onnx.ModelProto, work: Path, *, what: str, halve: bool
) -> BuiltTower:
    inputs, outputs = tensor_entries(graph)
    path = work / f"{tower}.xml"
    try:
        if halve:
            network = _sparing(network, work / f"{tower}.single.xml")
        import_openvino().save_model(network, path, compress_to_fp16=halve)
    except RuntimeError as error:
        raise ExportError(
            f"{what}: OpenVINO cannot write its files: {openvino_message(error)}. Make room where the bundle "
            "is."
        ) from error
    names = [entry.name for entry in (*inputs, *outputs)]
    path.write_bytes(_canonical(path.read_bytes(), names))
    files = {path.name: path, f"{tower}.bin": path.with_suffix(".bin")}
    return BuiltTower(path.name, files, inputs, outputs, alike=True)


def _sparing(network: Any, path: Path) -> Any:
    """Return a network that keeps in float32 what float16 cannot hold, when its weights are halved.

    OpenVINO itself looks at shares: it cuts one large value down to 65504, and rounds what is small to
    nothing beside zeros. The mark that a constant stays as it is can only be read from a file.
    """
    openvino = import_openvino()
    spared = set()
    for number, node in enumerate(network.get_ordered_ops()):
        if (
            node.get_type_name() == "Constant"
            and node.get_element_type() == openvino.Type.f32
            and lost(node.data) > MOST_LOST
        ):
            spared.add(f"spared_{number}")
            node.set_friendly_name(f"spared_{number}")
    if not spared:
        return network
    openvino.save_model(network, path, compress_to_fp16=False)
    root = ET.fromstring(path.read_bytes())  # noqa: S314  # OpenVINO has written it a moment ago
    for layer in root.iterfind("layers/layer"):
        if layer.get("name") in spared:
            said = ET.SubElement(layer, "rt_info")
            ET.SubElement(said, "attribute", name="precise", version="0")
    ET.ElementTree(root).write(path)
    return openvino.Core().read_model(path)


def _canonical(text: bytes, names: Sequence[str]) -> bytes:
    """Return an IR without what depends on versions, on other exports of the process, or on nothing.

    Layers that OpenVINO makes are called by a counter of the process; its version and settings stand below
    ``rt_info`` of the network. What ``rt_info`` of a layer says is kept: it tells plugins how to treat it.
    """
    root = ET.fromstring(text)  # noqa: S314  # OpenVINO has written it a moment ago
    for child in root.findall("rt_info"):
        root.remove(child)
    root.set("name", "tower")
    counts: dict[str, int] = {}
    for layer in root.iterfind("layers/layer"):
        kind = layer.get("type", "Layer")
        counts[kind] = counts.get(kind, 0) + 1
        if kind != "Parameter":
            layer.set("name", f"{kind}_{counts[kind]}")
        for port in layer.iterfind("output/port"):
            said = port.get("names")
            if said is not None and said not in names:
                del port.attrib["names"]
    stream = io.BytesIO()
    ET.ElementTree(root).write(stream, encoding="utf-8", xml_declaration=True)
    return stream.getvalue() + b"\n"


# --- int8 -------------------------------------------------------------------------------------------------


def _quantized(tower: str, request: BuildRequest, policy: Int8Policy, scheme: Scheme, *, what: str) -> Any:
    """Return a network with what its policy chooses in int8, and all weights in few bytes.

    Raises:
        CalibrationError: ranges cannot be had from the rows.
        ExportError: nothing can be quantized, or OpenVINO cannot convert the graph.
    """
    import onnx

    graph = request.graphs[tower]
    if policy == WEIGHTS:
        model = onnx.ModelProto()
        model.CopyFrom(graph)
    else:
        rows, settings = request.calibration[tower], request.options.quantization
        model = quantize(graph, rows, policy, scheme, settings, what=what)
    store_small(model, tables=policy.tables, others="float32")
    return store_weights(_converted(tower, model, request.work, what=what), policy)


def store_weights(network: Any, policy: Int8Policy) -> Any:
    """Store weights of a network in few bytes, in the forms that OpenVINO knows best; return it, changed.

    1. Int8 weights of products that are quantized have the shape their product reads, and those of linear
       maps their output channels first.
    2. Linear maps in float get int8 weights with a scale an output channel, where the policy says so. Their
       sums stay float.
    3. The rest is float16 in the file where that loses little.

    Args:
        network: of one tower.
        policy: how it was quantized.
    """
    for node in network.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in _PRODUCTS or node.input(1).get_partial_shape().is_dynamic:
            continue
        found = _stored_int8(node.input_value(1).get_node())
        if found is not None:
            _give_int8(node, *found)
        elif kind == "MatMul" and policy.others == "int8":
            weight = node.input_value(1).get_node()
            if weight.get_type_name() == "Constant" and weight.data.ndim == 2 and weight.data.size >= LARGE:
                axis = 0 if node.get_attributes()["transpose_b"] else 1
                _give_int8(node, *_rounded(weight.data, axis))
    if policy.others != "float32":
        _halve(network)
    network.validate_nodes_and_infer_types()
    return network


def _stored_int8(node: Any) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """Return integers and scales of a weight that is made of them, as its reader sees both."""
    shape = tuple(node.get_output_shape(0))
    while node.get_type_name() == "Reshape":  # a convolution's groups become an axis
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Multiply":
        return None
    stored, scale = (node.input_value(place).get_node() for place in (0, 1))
    if stored.get_type_name() == "Convert":
        stored = stored.input_value(0).get_node()
    if any(each.get_type_name() != "Constant" for each in (stored, scale)) or stored.data.dtype != np.int8:
        return None
    each = np.broadcast_to(scale.data, stored.data.shape).reshape(shape)
    axes = tuple(axis for axis in range(each.ndim) if np.ptp(each, axis=axis).any())
    kept = tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(each.ndim))
    return stored.data.reshape(shape), np.ascontiguousarray(each[kept])


def _give_int8(node: Any, integers: NDArray[np.int8], scale: NDArray[np.float32]) -> None:
    """Let a product read a weight of integers and scales; of a linear map with its output channels first."""
    from openvino import opset13 as ops

    if node.get_type_name() == "MatMul" and not node.get_attributes()["transpose_b"]:
        integers, scale = np.swapaxes(integers, -1, -2), np.swapaxes(scale, -1, -2)
        node.set_attribute("transpose_b", True)
    wide = ops.convert(ops.constant(np.ascontiguousarray(integers)), "f32")
    weight = ops.multiply(wide, ops.constant(np.ascontiguousarray(scale)))
    node.input(1).replace_source_output(weight.output(0))


def _rounded(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round the weight of a linear map to int8 with a scale each index of an axis."""
    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scale).clip(-127, 127).astype(np.int8), scale


def _halve(network: Any) -> None:
    """Store large float32 constants in float16 where that loses little; scales and biases stay."""
    from openvino import opset13 as ops

    for node in network.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.data.dtype != np.float32:
            continue
        if sum(size > 1 for size in node.data.shape) < 2 or node.data.size < LARGE:
            continue
        if lost(node.data) > MOST_LOST:
            continue
        readers = node.output(0).get_target_inputs()
        half = ops.convert(ops.constant(node.data.astype(np.float16)), "f32")
        for reader in readers:
            reader.replace_source_output(half.output(0))
