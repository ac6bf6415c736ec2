"""OpenVINO's files: interfaces, numbers on the engine, equal bytes, and that int8 is that of all engines."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")
if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

from exported import NAMES, PROBES, export_probe, run_file, shape_pictures, write_pictures  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.bundle import Bundle, Requires  # noqa: E402
from edgeclip.calibration.sensitivity import Int8Target  # noqa: E402
from edgeclip.errors import CalibrationError, ExportError, MissingExtraError  # noqa: E402
from edgeclip.export import to_openvino  # noqa: E402
from edgeclip.export.build import (  # noqa: E402
    BuildOptions,
    BuildRequest,
    BuiltVariant,
    Int8Search,
    Int8Settings,
)
from edgeclip.export.int8 import policy_of, quantize  # noqa: E402
from edgeclip.export.options import Checkpoint, ExportSettings, GraphOptions, References  # noqa: E402
from edgeclip.export.storage import store_small  # noqa: E402
from edgeclip.export.to_onnx import tensor_entries  # noqa: E402
from edgeclip.export.variants import VariantSpec  # noqa: E402
from edgeclip.export.verify import verify_bundle  # noqa: E402
from edgeclip.runtime import RuntimeOptions, open_session  # noqa: E402
from edgeclip.runtime.byte_products import products  # noqa: E402
from edgeclip.runtime.ort import import_onnxruntime  # noqa: E402
from edgeclip.runtime.ov import import_openvino  # noqa: E402
from edgeclip.runtime.parity import (  # noqa: E402
    Golden,
    ParityLimits,
    check_parity,
    compare_embeddings,
)
from edgeclip.runtime.rows import run_rows  # noqa: E402

ONE = RuntimeOptions(threads=1)
SIDE, EMBED, ROWS = 8, 16, 32


def tiny_graph(batch: int | str = "batch") -> Any:
    """Return pixels -> two convolutions, GELU after each -> mean -> product -> unit rows."""
    rng = np.random.default_rng(0)
    weights = {
        "stem": rng.normal(size=(8, 3, 3, 3)) / 5,
        "kernel": rng.normal(size=(8, 8, 3, 3)) / 8,
        "bias": rng.normal(size=8) / 5,
        "product": rng.normal(size=(8, EMBED)),
        "scale": np.float32(1 / 255),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["whole"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["whole", "scale"], ["pixels"]),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "stem", "bias"], ["edges"], pads=[1, 1, 1, 1]),
        helper.make_node("Gelu", ["edges"], ["lit"]),
        helper.make_node("Conv", ["lit", "kernel", "bias"], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("Gelu", ["seen"], ["active"]),
        helper.make_node("ReduceMean", ["active", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "product"], ["raw"]),
        helper.make_node("ReduceL2", ["raw", "last"], ["length"]),
        helper.make_node("Div", ["raw", "length"], ["image_embedding"]),
    ]
    constants = [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()]
    constants += [
        numpy_helper.from_array(np.array([2, 3]), "axes"),
        numpy_helper.from_array(np.array([1]), "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, [batch, EMBED])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def pixels(count: int = ROWS, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def request(
    work: Path,
    name: str,
    graphs: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    **options: bool,
) -> BuildRequest:
    work.mkdir(parents=True, exist_ok=True)
    spec = VariantSpec.parse(name)
    if calibration is None:
        calibration = {"image": pixels()} if spec.form.precision == "int8" else {}
    return BuildRequest(
        spec, graphs or {"image": tiny_graph()}, work, calibration, "feed" * 16, BuildOptions(**options)
    )


def read_xml(path: Path) -> ET.Element:
    return ET.parse(path).getroot()  # noqa: S314  # our own file


def contents(built: BuiltVariant) -> dict[str, str]:
    """Return the digests of all files."""
    found = {}
    for tower in built.towers.values():
        for name, content in tower.files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def run(built: BuiltVariant, rows: NDArray[Any], tower: str = "image", batch: int = 8) -> NDArray[Any]:
    path = built.towers[tower].files[built.towers[tower].model]
    assert isinstance(path, Path)
    with open_session(path, options=ONE) as session:
        return run_rows(session, rows, batch=batch)


def by_onnx_runtime(tmp_path: Path, rows: NDArray[Any], graph: Any = None) -> NDArray[Any]:
    path = tmp_path / "reference.onnx"
    path.write_bytes((graph or tiny_graph()).SerializeToString())
    return run_file(path, rows, batch=8)


# --- files, interfaces and bytes


@pytest.mark.parametrize("form", ["openvino-fp32", "openvino-fp16", "openvino-int8"])
def test_every_precision_has_the_interface_of_the_graph(form: str, tmp_path: Path) -> None:
    built = to_openvino.build(request(tmp_path, form))
    tower = built.towers["image"]
    assert list(tower.files) == ["image.xml", "image.bin"]
    assert (tower.inputs, tower.outputs) == tensor_entries(tiny_graph())
    assert built.requires == Requires(engine=">=2026.1")
    with open_session(tmp_path / "image.xml", options=ONE) as session:
        assert [str(spec) for spec in session.inputs.values()] == [f"uint8 (B, {SIDE}, {SIDE}, 3)"]
        assert [str(spec) for spec in session.outputs.values()] == [f"float32 (B, {EMBED})"]
        assert (*session.inputs, *session.outputs) == ("image", "image_embedding")


@pytest.mark.parametrize(
    ("form", "cosine"), [("openvino-fp32", 0.9999999), ("openvino-fp16", 0.9999), ("openvino-int8", 0.99)]
)
@pytest.mark.parametrize("batch", [1, 5])
def test_numbers_are_those_of_onnx_runtime(form: str, cosine: float, batch: int, tmp_path: Path) -> None:
    rows = pixels(10, seed=2)
    numbers = compare_embeddings(
        by_onnx_runtime(tmp_path, rows), run(to_openvino.build(request(tmp_path, form)), rows, batch=batch)
    )
    assert numbers.cosine_min >= cosine
    assert form != "openvino-fp32" or numbers.max_abs <= 1e-6


def test_float16_halves_the_weights(tmp_path: Path) -> None:
    sizes = {}
    for form in ("openvino-fp32", "openvino-fp16"):
        to_openvino.build(request(tmp_path / form, form))
        sizes[form] = (tmp_path / form / "image.bin").stat().st_size
    assert sizes["openvino-fp16"] <= 0.55 * sizes["openvino-fp32"]


@pytest.mark.parametrize("kind", ["one overflows", "small beside zeros"])
def test_what_float16_cannot_hold_stays_float32(kind: str, tmp_path: Path) -> None:
    """Left to itself, OpenVINO cuts 1e6 down to 65504, and half of what is at 3e-8 to nothing."""
    graph = tiny_graph()
    (product,) = (tensor for tensor in graph.graph.initializer if tensor.name == "product")
    weights = numpy_helper.to_array(product).copy()
    if kind == "one overflows":
        weights[0, 0] = 1e6
    else:
        weights[:, ::2] = 0.0
        weights *= 3e-8
    product.CopyFrom(numpy_helper.from_array(weights, "product"))
    rows = pixels(10, seed=2)
    built = to_openvino.build(request(tmp_path, "openvino-fp16", {"image": graph}))
    numbers = compare_embeddings(by_onnx_runtime(tmp_path, rows, graph), run(built, rows))
    assert numbers.max_abs <= 2e-3
    kinds = {
        data.get("shape", "").replace(" ", ""): data.get("element_type")
        for data in read_xml(tmp_path / "image.xml").iterfind("layers/layer[@type='Const']/data")
    }
    assert (kinds["8,8,3,3"], kinds["8,3,3,3"]) == ("f16", "f16")
    assert kinds.get(f"8,{EMBED}", kinds.get(f"{EMBED},8")) == "f32"
    again = to_openvino.build(request(tmp_path / "again", "openvino-fp16", {"image": graph}))
    assert contents(again) == contents(built)


def test_int8_weights_are_stored_as_bytes_but_for_stem_and_projection(tmp_path: Path) -> None:
    to_openvino.build(request(tmp_path, "openvino-int8"))
    root = read_xml(tmp_path / "image.xml")
    kinds = {
        data.get("shape", "").replace(" ", ""): data.get("element_type")
        for data in root.iterfind("layers/layer[@type='Const']/data")
    }
    assert (kinds["8,8,3,3"], kinds["8,3,3,3"]) == ("i8", "f32")
    assert "i8" not in (kinds.get(f"8,{EMBED}"), kinds.get(f"{EMBED},8"))
    assert root.find("layers/layer[@type='FakeQuantize']") is not None


@pytest.mark.parametrize("form", ["openvino-fp32", "openvino-fp16", "openvino-int8"])
def test_two_builds_in_two_directories_are_the_same_bytes(form: str, tmp_path: Path) -> None:
    first = to_openvino.build(request(tmp_path / "here", form))
    second = to_openvino.build(request(tmp_path / "and" / "there", form))
    assert contents(first) == contents(second)


def test_the_file_tells_no_version_and_no_place(tmp_path: Path) -> None:
    to_openvino.build(request(tmp_path / "somewhere", "openvino-int8"))
    path = tmp_path / "somewhere" / "image.xml"
    text, root = path.read_text("utf-8"), read_xml(path)
    assert "somewhere" not in text
    assert module_version("openvino") not in text
    names = [layer.get("name", "") for layer in root.iterfind("layers/layer")]
    assert len(set(names)) == len(names)
    assert "Convolution_1" in names
    ports = [port.get("names") for port in root.iter("port") if port.get("names")]
    assert ports == ["image", "image_embedding"]


def module_version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    code = """
        import hashlib, sys
        from pathlib import Path
        import numpy as np, onnx
        from edgeclip.export import to_openvino
        from edgeclip.export.build import BuildRequest
        from edgeclip.export.variants import VariantSpec
        graph, rows, work = onnx.load(sys.argv[1]), np.load(sys.argv[2]), Path(sys.argv[3])
        request = BuildRequest(VariantSpec.parse("openvino-int8"), {"image": graph}, work, {"image": rows})
        to_openvino.build(request)
        for name in ("image.xml", "image.bin"):
            print(name, hashlib.sha256((work / name).read_bytes()).hexdigest())
    """
    onnx.save(tiny_graph(), tmp_path / "graph.onnx")
    np.save(tmp_path / "rows.npy", pixels())
    (tmp_path / "far").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(code)]
    arguments = [str(tmp_path / name) for name in ("graph.onnx", "rows.npy", "far")]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    said = dict(line.split() for line in result.stdout.splitlines())
    assert said == contents(to_openvino.build(request(tmp_path / "near", "openvino-int8")))


def test_weights_that_openvino_maps_are_the_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(to_openvino.build(request(tmp_path / "inside", "openvino-fp32")))
    monkeypatch.setattr(to_openvino, "_INLINE_BYTES", 1)
    given = request(tmp_path / "beside", "openvino-fp32")
    before = given.graphs["image"].SerializeToString()
    assert contents(to_openvino.build(given)) == expected
    assert (tmp_path / "beside" / "image.data").stat().st_size > 1000
    assert given.graphs["image"].SerializeToString() == before


# --- targets and refusals


def test_a_target_decides_the_range_of_weights_and_what_hosts_must_offer(tmp_path: Path) -> None:
    built = {
        name: to_openvino.build(request(tmp_path / name.replace("@", "-"), name))
        for name in ("openvino-int8", "openvino-int8@x86-avx2", "openvino-int8@x86-vnni")
    }
    narrow, wide = built["openvino-int8@x86-avx2"], built["openvino-int8@x86-vnni"]
    assert contents(built["openvino-int8"]) == contents(narrow)  # runs anywhere, so there too
    assert contents(narrow)["image.bin"] != contents(wide)["image.bin"]
    assert largest_pairs(tmp_path / "openvino-int8-x86-avx2") <= [128]
    assert largest_pairs(tmp_path / "openvino-int8-x86-vnni") > [128]
    assert wide.requires == Requires(isa_any=("avx512_vnni", "avx_vnni"), engine=">=2026.1")
    assert narrow.calibration is not None
    assert narrow.calibration["scheme"]["fit_pairs"] is True


def largest_pairs(folder: Path) -> list[int]:
    """Return the largest sum of two weights that meet, for each product of bytes."""
    return [product.largest_pair for product in products(folder / "image.xml")]


def test_how_it_was_quantized_is_said(tmp_path: Path) -> None:
    said = to_openvino.build(request(tmp_path, "openvino-int8@intel-gpu")).calibration
    assert said is not None
    assert said["method"] == {"image": "mse"}
    assert said["rows"] == {"image": ROWS}
    assert said["digest"] == "feed" * 16
    assert said["policy"]["image"]["name"] == "convolutions"
    assert (said["scheme"]["fit_pairs"], said["scheme"]["integer_outputs"]) == (False, False)
    assert to_openvino.build(request(tmp_path, "openvino-fp16")).calibration is None


def test_the_npu_takes_one_batch_and_no_float32(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"'openvino-fp16@intel-npu'.*takes 'image' of \('batch', 8, 8, 3\)"
    ):
        to_openvino.build(request(tmp_path, "openvino-fp16@intel-npu"))
    with pytest.raises(ExportError, match="'openvino-fp32@intel-npu': the NPU has no float32"):
        to_openvino.build(request(tmp_path, "openvino-fp32@intel-npu", {"image": tiny_graph(1)}))
    built = to_openvino.build(request(tmp_path, "openvino-int8@intel-npu", {"image": tiny_graph(2)}))
    rows = pixels(5, seed=4)
    expected = by_onnx_runtime(tmp_path, np.concatenate([rows, rows[:1]]), tiny_graph("batch"))[:5]
    assert compare_embeddings(expected, run(built, rows)).cosine_min >= 0.99


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"'openvino-int8', image tower.*uint8 \(7, 8, 8, 3\)"):
        to_openvino.build(request(tmp_path, "openvino-int8", calibration={"image": pixels(7)}))


def test_a_fixed_batch_larger_than_the_rows_is_filled(tmp_path: Path) -> None:
    rows = pixels(5, seed=4)
    graph = tiny_graph(ROWS + 9)
    built = to_openvino.build(request(tmp_path, "openvino-int8", {"image": graph}))
    assert built.calibration is not None
    assert built.calibration["rows"] == {"image": ROWS}
    expected = by_onnx_runtime(tmp_path, rows, tiny_graph())
    assert compare_embeddings(expected, run(built, rows)).cosine_min >= 0.99


def test_files_that_cannot_be_written_are_our_error(tmp_path: Path) -> None:
    (tmp_path / "image.bin").mkdir()
    with pytest.raises(
        ExportError, match=r"^variant 'openvino-fp16', image tower: .* write its files: Can't open bin file"
    ) as caught:
        to_openvino.build(request(tmp_path, "openvino-fp16"))
    assert str(tmp_path) not in str(caught.value)


def test_what_openvino_cannot_convert_is_our_error(tmp_path: Path) -> None:
    graph = tiny_graph()
    graph.graph.node[-5].op_type = "NoSuchActivation"
    with pytest.raises(
        ExportError, match=r"'openvino-fp32', image tower: .* graph: No .*NoSuchActivation-20\.$"
    ):
        to_openvino.build(request(tmp_path, "openvino-fp32", {"image": graph}))


@pytest.mark.parametrize("form", ["openvino-fp32", "openvino-int8"])
def test_a_missing_package_is_named(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        to_openvino.importlib.util,
        "find_spec",
        lambda name, *more: None if name == "openvino" else find(name, *more),
    )
    with pytest.raises(MissingExtraError, match="openvino"):
        to_openvino.build(request(tmp_path, form))


# --- int8 is that of all engines


@pytest.mark.parametrize("kind", ["pixels", "gated", "rows"])
def test_openvino_computes_what_the_graph_with_q_and_dq_says(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime computes that graph in float, node by node; OpenVINO in bytes."""
    graph = {"pixels": tiny_graph, "gated": gated_graph, "rows": row_graph}[kind]()
    rows = pixels() if kind != "rows" else np.random.default_rng(3).normal(size=(ROWS, 5, 32)).astype("f4")
    policy = policy_of(graph)
    rounded = quantize(graph, rows, policy, to_openvino.openvino_scheme(fit_pairs=True), what="graph")
    store_small(rounded, tables=policy.tables, others=policy.others)
    path = tmp_path / "rounded.onnx"
    path.write_bytes(rounded.SerializeToString())
    expected = simulated(path, rows)
    given = request(tmp_path, "openvino-int8", {"image": graph}, {"image": rows})
    got = run(to_openvino.build(given), rows)
    exact = by_onnx_runtime(tmp_path, rows, graph)
    # Rounding of a value that lies between two steps may go either way.
    assert np.linalg.norm(got - expected) < 0.1 * np.linalg.norm(got - exact)


def simulated(path: Path, rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return what ONNX Runtime gives without any integer kernel."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"image": rows})[0]
    return found


def row_graph() -> Any:
    """Return rows of a transformer -> two linear maps with a GELU between -> mean -> unit rows."""
    rng = np.random.default_rng(7)
    weights = {
        "up": rng.normal(size=(32, 64)) / 6,
        "up_bias": rng.normal(size=64),
        "down": rng.normal(size=(64, EMBED)) / 8,
    }
    nodes = [
        helper.make_node("MatMul", ["image", "up"], ["wide"]),
        helper.make_node("Add", ["wide", "up_bias"], ["shifted"]),
        helper.make_node("Gelu", ["shifted"], ["lit"]),
        helper.make_node("MatMul", ["lit", "down"], ["narrow"]),
        helper.make_node("ReduceMean", ["narrow", "axes"], ["raw"], keepdims=0),
        helper.make_node("ReduceL2", ["raw", "last"], ["length"]),
        helper.make_node("Div", ["raw", "length"], ["image_embedding"]),
    ]
    constants = [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()]
    constants += [numpy_helper.from_array(np.array([1]), name) for name in ("axes", "last")]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 5, 32])],
        [helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, ["batch", EMBED])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("kind", ["pixels", "rows"])
def test_products_of_int8_run_in_bytes(kind: str, tmp_path: Path) -> None:
    graph, rows = tiny_graph(), {"image": pixels()}
    if kind == "rows":
        drawn = np.random.default_rng(3).normal(size=(ROWS, 5, 32)).astype(np.float32)
        graph, rows = row_graph(), {"image": drawn}
    to_openvino.build(request(tmp_path, "openvino-int8", {"image": graph}, rows))
    compiled = (
        import_openvino()
        .Core()
        .compile_model(tmp_path / "image.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    kinds = {"Convolution", "FullyConnected"}
    ran = [
        str(said["runtimePrecision"].astype(str))
        for said in (op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops())
        if str(said["layerType"].astype(str)) in kinds
    ]
    assert sum(each in ("u8", "i8") for each in ran) == {"pixels": 1, "rows": 2}[kind]


@pytest.mark.parametrize("opset", [17, 21, 24])
def test_every_opset_is_taken(opset: int, tmp_path: Path) -> None:
    graph = row_graph()
    for node in graph.graph.node:
        if node.op_type == "Gelu":  # it is of opset 20
            node.op_type = "Sigmoid"
        if node.op_type.startswith("Reduce") and opset < 18:
            node.attribute.append(helper.make_attribute("axes", [1]))
            del node.input[1:]
    graph.opset_import[0].version = opset
    rows = np.random.default_rng(3).normal(size=(ROWS, 5, 32)).astype(np.float32)
    built = to_openvino.build(request(tmp_path, "openvino-int8", {"image": graph}, {"image": rows}))
    assert compare_embeddings(by_onnx_runtime(tmp_path, rows, graph), run(built, rows)).cosine_min >= 0.99


# --- the probes, against eager float32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "shapes")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_probe_keeps_its_numbers_at_batch_1_and_5(name: str, pictures: Path, tmp_path: Path) -> None:
    bundle = export_probe(name, tmp_path / "bundle", pictures, "openvino-fp32", "openvino-fp16").bundle
    golden = Golden.of(bundle)
    references = {"image": golden.image_embedding, "text": golden.text_embedding}
    rows = {"image": golden.images, "text": golden.tokens}
    for precision in ("fp32", "fp16"):
        for tower, reference in references.items():
            files = bundle.variant(f"openvino-{precision}").tower(tower)
            with open_session(files, options=ONE) as session:
                for batch in (1, 5):
                    got = run_rows(session, rows[tower], batch=batch)  # type: ignore[arg-type]
                    numbers = compare_embeddings(reference, got)  # type: ignore[arg-type]
                    assert check_parity(numbers, ParityLimits.of(precision)) == ()
    report = verify_bundle(bundle)
    assert {verdict.name: verdict.status for verdict in report.variants} == {
        "openvino-fp32": "passed",
        "openvino-fp16": "passed",
    }


@pytest.fixture(scope="module")
def traced() -> Mapping[str, Any]:
    from edgeclip.export.source import open_source

    source = open_source(Checkpoint(str(PROBES / "tinyclip")), threads=1)
    return {"image": source.trace("image", GraphOptions())}


@pytest.mark.slow
def test_int8_of_a_trained_vit_keeps_its_directions(traced: Mapping[str, Any], tmp_path: Path) -> None:
    """Calibrated on pictures of its own kind; the ranks are the business of the choice of layers."""
    rows = shape_pictures(48)
    built = to_openvino.build(
        request(tmp_path, "openvino-int8", traced, {"image": shape_pictures(32, seed=900)})
    )
    numbers = compare_embeddings(by_onnx_runtime(tmp_path, rows, traced["image"]), run(built, rows))
    assert numbers.cosine_mean >= 0.999
    assert (tmp_path / "image.bin").stat().st_size < 0.4 * sum(
        len(tensor.raw_data) for tensor in traced["image"].graph.initializer
    )


@pytest.mark.slow
def test_a_bundle_of_openvino_files_classifies_from_the_command_line(pictures: Path, tmp_path: Path) -> None:
    export_probe(
        "tinyclip",
        tmp_path / "bundle",
        pictures,
        "openvino-fp16",
        settings=ExportSettings(references=References(pictures=pictures), threads=1),
    )
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.default_variants == ("openvino-fp16",)
    for tower in ("image", "text"):  # OpenVINO itself finds the weights by the name of the graph
        model = bundle.variant("openvino-fp16").tower(tower).model
        assert import_openvino().Core().read_model(model).outputs
    command = [sys.executable, "-m", "edgeclip", "classify", str(next(pictures.iterdir()))]
    options = ["--bundle", str(tmp_path / "bundle"), "--variant", "openvino-fp16", "--backend", "openvino"]
    result = subprocess.run(
        [*command, *options, "--labels", "a red circle,a green square", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert '"score"' in result.stdout


# --- what stays float


def gated_graph() -> Any:
    """Return pixels -> nine convolutions and a gate -> mean -> classifier -> softmax -> table."""
    rng = np.random.default_rng(5)
    width, classes = 16, 64
    weights = {
        "stem": rng.normal(size=(width, 3, 3, 3)) / 5,
        "depthwise": rng.normal(size=(width, 1, 3, 3)) / 3,
    }
    weights |= {f"point_{n}": rng.normal(size=(width, width, 1, 1)) / 4 for n in range(7)}
    weights |= {
        "gate": rng.normal(size=(width, width, 1, 1)) / 4,
        "classifier": rng.normal(size=(width, classes)),
        "table": rng.normal(size=(classes, EMBED)),
        "scale": np.float32(1 / 255),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["whole"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["whole", "scale"], ["pixels"]),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "stem"], ["seen"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["seen"], ["lit"]),
        helper.make_node("Conv", ["lit", "depthwise"], ["deep"], pads=[1, 1, 1, 1], group=width),
        helper.make_node("Relu", ["deep"], ["map_0"]),
    ]
    for number in range(7):
        nodes += [
            helper.make_node("Conv", [f"map_{number}", f"point_{number}"], [f"mixed_{number}"]),
            helper.make_node("Relu", [f"mixed_{number}"], [f"map_{number + 1}"]),
        ]
    nodes += [
        helper.make_node("ReduceMean", ["map_7", "axes"], ["squeezed"], keepdims=1),
        helper.make_node("Conv", ["squeezed", "gate"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["share"]),
        helper.make_node("Mul", ["map_7", "share"], ["excited"]),
        helper.make_node("ReduceMean", ["excited", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "classifier"], ["classes"]),
        helper.make_node("Softmax", ["classes"], ["posterior"]),
        helper.make_node("MatMul", ["posterior", "table"], ["raw"]),
        helper.make_node("ReduceL2", ["raw", "last"], ["length"]),
        helper.make_node("Div", ["raw", "length"], ["image_embedding"]),
    ]
    constants = [numpy_helper.from_array(np.asarray(w, np.float32), name) for name, w in weights.items()]
    constants += [
        numpy_helper.from_array(np.array([2, 3]), "axes"),
        numpy_helper.from_array(np.array([1]), "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, ["batch", EMBED])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_first_convolutions_and_products_of_one_vector_stay_float(tmp_path: Path) -> None:
    graph = gated_graph()
    built = to_openvino.build(request(tmp_path / "int8", "openvino-int8", {"image": graph}))
    root = read_xml(tmp_path / "int8" / "image.xml")
    shapes: dict[str, list[str]] = {}
    for data in root.iterfind("layers/layer[@type='Const']/data"):
        shapes.setdefault(data.get("shape", "").replace(" ", ""), []).append(data.get("element_type", ""))
    assert shapes["16,3,3,3"] == ["f32"]
    assert shapes["16,1,1,3,3"] == ["f32"]  # the depthwise one, an eighth of all products
    assert sorted(shapes["16,16,1,1"]) == ["f32"] + ["i8"] * 7  # the gate among them
    # Classifier and table compute in float from int8 with a scale a column.
    assert (shapes["64,16"], shapes["16,64"]) == (["i8"], ["i8"])
    assert (shapes["64,1"], shapes["16,1"]) == (["f32"], ["f32"])
    assert built.calibration is not None
    assert built.calibration["policy"]["image"]["entry"] == 8
    rows = pixels(10, seed=2)
    numbers = compare_embeddings(by_onnx_runtime(tmp_path, rows, graph), run(built, rows))
    assert numbers.cosine_mean > 0.99


def test_a_depthwise_weight_is_stored_as_its_groups_read_it(tmp_path: Path) -> None:
    """Engines sum it in 32 bits; a file tells that by the shape."""
    graph = gated_graph()
    for node in graph.graph.node:
        if "depthwise" in node.input:
            node.input[1] = "point_0"
            del node.attribute[:]
        elif "point_0" in node.input:
            node.input[1] = "depthwise"
            node.attribute.extend(
                [helper.make_attribute("pads", [1, 1, 1, 1]), helper.make_attribute("group", 16)]
            )
    to_openvino.build(request(tmp_path, "openvino-int8", {"image": graph}))
    shapes = {
        (data.get("shape", "").replace(" ", ""), data.get("element_type"))
        for data in read_xml(tmp_path / "image.xml").iterfind("layers/layer[@type='Const']/data")
    }
    assert {("16,1,1,3,3", "i8"), ("16,1,1,1,1", "f32")} <= shapes
    assert [product.weight.shape for product in products(tmp_path / "image.xml")] == [(16, 16)] * 6


def test_a_target_takes_products_into_float_and_a_manifest_names_them(tmp_path: Path) -> None:
    made = to_openvino.build(aiming(tmp_path, "cosine=0.99998"))
    assert made.calibration is not None
    choice = made.calibration["choice"]["image"]
    assert choice["kept"]
    assert made.calibration["policy"]["image"]["keep_float"] == sorted(choice["kept"])
    numbers = compare_embeddings(by_onnx_runtime(tmp_path, pixels(), gated_graph()), run(made, pixels()))
    assert numbers.cosine_mean >= 0.99998


def test_a_target_that_is_not_reached_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cosine=1\b"):
        to_openvino.build(aiming(tmp_path, "cosine=1"))


def aiming(work: Path, target: str) -> BuildRequest:
    # Rounding by moments would reach all that this graph can.
    options = BuildOptions(
        int8=Int8Search(target=Int8Target.parse(target), threads=1),
        quantization=Int8Settings(rounding="nearest"),
    )
    asked = request(work, "openvino-int8", {"image": gated_graph()})
    return dataclasses.replace(asked, options=options)
