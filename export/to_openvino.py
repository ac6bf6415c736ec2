"""OpenVINO's IR: an ``.xml`` and a ``.bin`` a tower, in float32, float16 or int8.

Inputs and outputs keep their names, dtypes and shapes: uint8 pictures in, float32 embeddings out, whatever
the precision between. *fp16* stores weights in float16, but for those that float16 cannot hold; a device with
float16 arithmetic also computes in it. *int8* is NNCF's post-training quantization: weights symmetric per
output channel, activations asymmetric; token tables are int8 rows with a float scale each. Equal graphs, rows
and versions give equal bytes: layers are named by kind and number, and what tells versions is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from edgeclip.bundle import Requires
from edgeclip.errors import CalibrationError, ExportError, MissingExtraError
from edgeclip.quantization import CONVOLUTIONS
from edgeclip.runtime.host import versions
from edgeclip.runtime.ov import import_openvino, openvino_message, without_telemetry
from edgeclip.runtime.parity import ParityLimits, compare_embeddings

from .build import BuildRequest, BuiltTower, BuiltVariant
from .int8 import policy_of
from .passes.float16 import MOST_LOST, lost
from .ranges import check_rows
from .to_onnx import tensor_entries

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = ["build"]

_ENGINE: Final = ">=2026.1"
"""Versions of OpenVINO that read these files; 2026.1.0 and 2026.4.1 were tried."""
_INLINE_BYTES: Final = 1024  # smaller tensors stay in the graph, where shapes and axes are read
_MOST_ROWS: Final = 300  # NNCF's own default: ranges and biases do not gain by more

# AVX2 without VNNI adds two products of bytes in 16 bits: weights of every layer take half the range there.
# Files for no target may meet such a host. Everywhere else products are added in 32 bits.
_OVERFLOWS: Final = frozenset({None, "x86-avx2"})
_DEVICES: Final[Mapping[str, str]] = MappingProxyType({"intel-gpu": "GPU", "intel-npu": "NPU"})

# Normalization of embeddings and everything with a square or a mean: cheap, and ruined by 256 levels.
_FLOAT_TYPES: Final = (
    "Power",
    "Sqrt",
    "Divide",
    "ReduceSum",
    "ReduceMean",
    "ReduceL2",
    "MVN",
    "Softmax",
    "NormalizeL2",
)

_PRODUCTS: Final = frozenset({"Convolution", "GroupConvolution", "MatMul"})
_FIRST: Final = 3
"""Convolutions at the beginning that stay float, at most: stem, depthwise and pointwise one."""
_LARGE: Final = 4096
"""Elements from which the weight of a product in float is stored as int8."""


def build(request: BuildRequest) -> BuiltVariant:
    """Make the IR files of one variant.

    Raises:
        MissingExtraError: OpenVINO, or NNCF for int8, is not installed.
        CalibrationError: a tower has no calibration rows, they do not fit, or int8 misses its target.
        ExportError: the variant cannot be made.
    """
    spec, precision = request.spec, request.spec.form.precision
    _require("openvino", extra="openvino")
    if precision == "int8":
        _require("nncf", extra="export")
        for tower, graph in request.graphs.items():
            check_rows(graph, request.calibration.get(tower), what=f"variant {spec.name!r}, {tower} tower")
    _check_target(request)
    towers = {}
    chosen: dict[str, int] = {}
    for tower, graph in request.graphs.items():
        what = f"variant {spec.name!r}, {tower} tower"
        request.on_step(f"convert the {tower} tower")
        network = _converted(tower, graph, request.work, what=what)
        if precision == "int8":
            request.on_step(f"quantize the {tower} tower")
            network = _quantized(network, tower, request, chosen, what=what)
        towers[tower] = _stored(tower, network, graph, request.work, what=what, halve=precision == "fp16")
        del network
    target = Requires() if spec.target is None else spec.target.requires
    return BuiltVariant(
        towers,
        requires=msgspec.structs.replace(target, engine=_ENGINE),
        calibration=_said(request, chosen) if precision == "int8" else None,
    )


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
    return BuiltTower(path.name, {path.name: path, f"{tower}.bin": path.with_suffix(".bin")}, inputs, outputs)


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

    Layers that OpenVINO makes are called by a counter of the process; NNCF and OpenVINO write their versions
    and settings below ``rt_info`` of the network. What ``rt_info`` of a layer says is kept: it tells plugins
    how to treat it.
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


def _policy(request: BuildRequest) -> dict[str, Any]:
    """Return how towers are quantized, as the manifest says it too.

    NNCF's scheme for transformers keeps sums of residual branches in float. Towers of convolutions take it
    too: quantized sums cost them a third of their agreement with float32. They also take the accurate form of
    bias correction, layer by layer, which halves their error again.
    """
    target = request.spec.target_name
    return {
        "model_type": "transformer",
        "preset": "mixed",
        "target_device": _DEVICES.get(target or "", "CPU"),
        "overflow_fix": "enable" if target in _OVERFLOWS else "disable",
        "float_types": list(_FLOAT_TYPES),
        "float_pooled": True,
        "bias_correction": {
            tower: "accurate" if policy_of(graph) == CONVOLUTIONS else "fast"
            for tower, graph in request.graphs.items()
        },
    }


def _quantized(network: Any, tower: str, request: BuildRequest, chosen: dict[str, int], *, what: str) -> Any:
    """Return a network with fake-quantized activations and int8 weights.

    Where int8 has to reach a target, as many more of the first products stay float as that takes, at most
    half of them. What is compared is the network itself, on OpenVINO and the calibration rows.

    Args:
        network: in float; stays as it is.
        tower: its name.
        request: the variant.
        chosen: how many of the first products stay float is added here.
        what: the tower, as messages name it.

    Raises:
        CalibrationError: the target is not reached.
        ExportError: NNCF cannot quantize it.
    """
    rows = request.calibration[tower][:_MOST_ROWS]
    asked = request.options.int8
    target = None if asked is None else asked.of(tower)
    products = _products(network)
    chosen[tower] = _first_float(products)
    if target is None:
        return _by_nncf(network.clone(), tower, rows, chosen[tower], request, what=what)
    reference = _embedded(network, rows)
    more = [-(-len(products) * part // 8) for part in (1, 2, 3, 4)]
    for first in [chosen[tower], *(each for each in more if each > chosen[tower])]:
        request.on_step(f"quantize the {tower} tower, {first} of {len(products)} products first in float")
        made = _by_nncf(network.clone(), tower, rows, first, request, what=what)
        numbers = compare_embeddings(
            reference, _embedded(made, rows), bank=request.bank if tower == "image" else None
        )
        if target.is_met(numbers):
            chosen[tower] = first
            return made
    raise CalibrationError(
        f"{what}: with the first {first} of its {len(products)} products in float int8 does not reach "
        f"{target}: {target.missed(numbers)}. Ask for less, give other calibration pictures, or export "
        "openvino-fp16."
    )


def _embedded(network: Any, rows: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return what a network makes of rows on this CPU, in float32 where it is not int8."""
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = import_openvino().Core().compile_model(network, "CPU", settings)
    parts = [np.array(compiled(batch)[0]) for batch in _batches(network, rows)]
    return np.concatenate(parts)[: len(rows)]


def _batches(network: Any, rows: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    """Return rows as a network takes them; the last batch begins again."""
    batch = network.inputs[0].partial_shape[0]
    size = 1 if batch.is_dynamic else int(batch.get_length())
    whole = np.resize(rows, (-(-len(rows) // size) * size, *rows.shape[1:]))
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _by_nncf(
    network: Any, tower: str, rows: NDArray[np.generic], first: int, request: BuildRequest, *, what: str
) -> Any:
    policy, batches = _policy(request), _batches(network, rows)
    kept = _kept_float(network, first)
    with _quiet_nncf() as nncf:
        from nncf.quantization.advanced_parameters import OverflowFix

        settings: dict[str, Any] = {
            "preset": nncf.QuantizationPreset(policy["preset"]),
            "target_device": nncf.TargetDevice(policy["target_device"]),
            "subset_size": len(batches),
            "model_type": nncf.ModelType(policy["model_type"]),
            "fast_bias_correction": policy["bias_correction"][tower] == "fast",
            "ignored_scope": nncf.IgnoredScope(types=list(policy["float_types"]), names=kept, validate=False),
        }
        advanced = nncf.AdvancedQuantizationParameters(overflow_fix=OverflowFix(policy["overflow_fix"]))
        try:
            network = _small_weights(nncf, network, kept)
            if not request.options.accuracy_control:
                return nncf.quantize(network, nncf.Dataset(batches), advanced_parameters=advanced, **settings)
            return nncf.quantize_with_accuracy_control(
                network,
                nncf.Dataset(batches),
                nncf.Dataset(batches),
                _mean_cosine(network),
                max_drop=1 - (ParityLimits.of("int8").cosine_mean or 0.0),
                drop_type=nncf.DropType.ABSOLUTE,
                advanced_quantization_parameters=advanced,
                **settings,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise ExportError(f"{what}: NNCF cannot quantize it: {reason}.") from error


def _products(network: Any) -> list[Any]:
    return [op for op in network.get_ordered_ops() if op.get_type_name() in _PRODUCTS]


def _first_float(products: Sequence[Any]) -> int:
    """Return how many products at the beginning stay float: convolutions, few of them in a small tower."""
    first = 0
    for product in products[:_FIRST]:
        if "Convolution" not in product.get_type_name() or (first and first >= len(products) / 8):
            break
        first += 1
    return first


def _kept_float(network: Any, first: int) -> list[str]:
    """Return the names of products that stay float: the first ones, and those of one vector a row.

    They are a small part of the work and most of the error. Maps of the first convolutions are large and
    their channels unlike each other; one vector a picture is what the answer is read from.
    """
    products = _products(network)
    chosen = products[:first] + [op for op in products[first:] if op is products[-1] or _is_pooled(op)]
    return [str(op.get_friendly_name()) for op in chosen]


def _is_pooled(product: Any) -> bool:
    """Return whether a product with a constant is of one vector a row."""
    shape = product.input_value(0).get_partial_shape()
    if shape.rank.is_dynamic or product.input_value(1).get_partial_shape().is_dynamic:
        return False
    if product.get_type_name() == "MatMul":
        return int(shape.rank.get_length()) == 2
    return all(size.is_static and size.get_length() == 1 for size in list(shape)[2:])


def _small_weights(nncf: Any, network: Any, kept: Sequence[str]) -> Any:
    """Store large weights of matrices that stay float as int8 with a scale a channel; sums stay float."""
    names = {
        str(op.get_friendly_name())
        for op in _products(network)
        if op.get_type_name() == "MatMul"
        and op.input_value(1).get_node().get_type_name() == "Constant"
        and op.input_value(1).get_node().data.size >= _LARGE
    }.intersection(kept)
    if not names:
        return network
    others = [str(op.get_friendly_name()) for op in _products(network) if op.get_friendly_name() not in names]
    return nncf.compress_weights(
        network,
        mode=nncf.CompressWeightsMode.INT8_SYM,
        ignored_scope=nncf.IgnoredScope(names=others, types=["Gather"], validate=False),
    )


def _mean_cosine(network: Any) -> Any:
    """Return NNCF's measure of a network: the mean cosine of its embeddings with those in float32."""
    reference = import_openvino().Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    known: dict[bytes, NDArray[Any]] = {}

    def expected(rows: NDArray[Any]) -> NDArray[Any]:
        key = hashlib.sha256(np.ascontiguousarray(rows).data).digest()
        if key not in known:
            known[key] = np.asarray(reference(rows)[0], np.float64)
        return known[key]

    def measure(compiled: Any, items: Any) -> tuple[float, list[float]]:
        cosines: list[float] = []
        for rows in items:
            got, want = np.asarray(compiled(rows)[0], np.float64), expected(rows)
            lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
            cosines.append(float(((got * want).sum(axis=1) / lengths).mean()))
        return float(np.mean(cosines)), cosines

    return measure


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """Import NNCF with its telemetry off, and keep its progress bars and remarks to itself."""
    import_openvino()
    logger = logging.getLogger("nncf")
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        with without_telemetry():
            import nncf
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield nncf
        finally:
            logger.setLevel(level)


def _said(request: BuildRequest, chosen: Mapping[str, int]) -> dict[str, Any]:
    installed = versions()
    return {
        "method": "nncf",
        "accuracy_control": request.options.accuracy_control,
        "rows": {tower: min(len(request.calibration[tower]), _MOST_ROWS) for tower in request.graphs},
        "digest": request.calibration_digest,
        "openvino": installed.get("openvino"),
        "policy": {**_policy(request), "float_first": dict(chosen)},
    }
