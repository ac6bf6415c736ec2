"""Sensitivity of trained towers: the switchboard against real int8 graphs, and the search in an export."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from exported import PROBES, export_probe, manifest_of, shape_pictures, write_pictures  # noqa: E402

from edgeclip.calibration.latency_table import LatencyTable, NodeTime  # noqa: E402
from edgeclip.calibration.sensitivity import Int8Target, measure  # noqa: E402
from edgeclip.errors import CalibrationError, ConfigError, ExportError  # noqa: E402
from edgeclip.export.build import BuildOptions, Int8Search  # noqa: E402
from edgeclip.export.options import Checkpoint, ExportSettings, GraphOptions, References  # noqa: E402
from edgeclip.export.sensitivity_onnx import Quantizable, SwitchedTower  # noqa: E402
from edgeclip.export.sensitivity_search import search, search_checkpoint  # noqa: E402
from edgeclip.export.source import open_source  # noqa: E402
from edgeclip.export.variants import VariantSpec, parse_variants  # noqa: E402
from edgeclip.quantization import CPU, TENSORRT, Scheme  # noqa: E402
from edgeclip.runtime.parity import compare_embeddings  # noqa: E402
from edgeclip.runtime.session import RuntimeOptions  # noqa: E402

ONE = RuntimeOptions(threads=1)
ROWS = shape_pictures(24)


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    return {
        name: open_source(Checkpoint(str(PROBES / name)), threads=1).trace("image", GraphOptions())
        for name in ("mobileclip", "tinyclip")
    }


def tower_of(graph: onnx.ModelProto, scheme: Scheme = CPU) -> Quantizable:
    return Quantizable.of(graph, ROWS, scheme, what="probe", options=ONE)


@pytest.mark.parametrize("name", ["mobileclip", "tinyclip"])
@pytest.mark.parametrize("scheme", [CPU, TENSORRT], ids=["cpu", "tensorrt"])
def test_the_switchboard_is_the_real_graph(
    graphs: dict[str, onnx.ModelProto], name: str, scheme: Scheme
) -> None:
    tower = tower_of(graphs[name], scheme)
    with SwitchedTower(tower, options=ONE) as board:
        none = board.embed(ROWS, ())
        for on in (tower.nodes, tower.nodes[::2], tower.nodes[3:4]):
            real = tower.embed_exact(ROWS, on, options=ONE)
            simulated = board.embed(ROWS, on)
            # The order of sums and weights stored as float16 tip single roundings: each is a step of int8.
            missed = 1 - compare_embeddings(real, simulated).cosine_mean
            lost = 1 - compare_embeddings(none, real).cosine_mean
            assert missed < max(lost / 2, 1e-5), (on, missed, lost)


def test_products_have_blocks_and_times(graphs: dict[str, onnx.ModelProto]) -> None:
    tower = tower_of(graphs["mobileclip"])
    assert set(tower.blocks) == set(tower.nodes)
    assert {"stem", "stages.0.blocks.0", "stages.2.blocks.1", "projection"} <= set(tower.blocks.values())
    assert tower.blocks[tower.nodes[0]] == "stem"
    table = tower.times(options=ONE, runs=3)
    assert set(table.nodes) == set(tower.nodes)
    assert sum(each.float_ms for each in table.nodes.values()) <= table.float_ms
    assert {"stem", "transformer.layers.0", "transformer.layers.2", "projection"} <= set(
        tower_of(graphs["tinyclip"]).blocks.values()
    )


def test_a_search_reaches_its_target(graphs: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    tower = tower_of(graphs["mobileclip"])
    table = LatencyTable({name: NodeTime(1.0, 0.5) for name in tower.nodes}, 40.0, "a device")
    (tmp_path / "table.json").write_text(json.dumps(table.to_dict()), encoding="utf-8")
    asked = Int8Search(Int8Target(cosine=0.9997), tmp_path / "table.json", tmp_path / "reports", threads=1)
    steps: list[str] = []
    report = search(
        graphs["mobileclip"], ROWS, CPU, asked, tower="image", variant="onnx-int8", on_step=steps.append
    )
    choice = report.choice
    assert choice is not None
    assert choice.measured.cosine_mean >= 0.9997 > 1 - report.sensitivity.everything.cosine
    assert 0 < len(choice.keep_float) < len(tower.nodes)
    assert any("of 58 measured" in said or "measured, last" in said for said in steps)
    # The same numbers again, from what is kept and from nothing.
    with SwitchedTower(tower, options=ONE) as board:
        assert measure(board, ROWS).to_dict() == report.sensitivity.to_dict()
    again = search(graphs["mobileclip"], ROWS, CPU, asked, tower="image", variant="onnx-int8")
    assert again.choice is not None
    assert again.choice.to_dict() == choice.to_dict()
    document = json.loads((tmp_path / "reports" / "onnx-int8-image.json").read_text(encoding="utf-8"))
    assert document["choice"]["keep_float"] == dict(choice.keep_float)
    assert document["latency"]["source"] == "a device"
    picture = ET.parse(tmp_path / "reports" / "onnx-int8-image.svg").getroot()  # noqa: S314
    titles = [each.text or "" for each in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(": " in title for title in titles) == len(tower.nodes)
    text = report.to_table(most=5)
    assert f"{len(choice.keep_float)} of {len(tower.nodes)} products stay float" in text
    assert report.sensitivity.worst()[0] in text


def test_a_target_out_of_reach_is_an_error(graphs: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    asked = Int8Search(Int8Target(cosine=1.0), None, tmp_path, threads=1)
    with pytest.raises(CalibrationError, match=r"int8 target cosine=1: .* 14 of 15 products in float"):
        search(graphs["tinyclip"], ROWS, CPU, asked, tower="image", variant="onnx-int8")


def test_a_board_is_used_open_and_with_products_it_has(graphs: dict[str, onnx.ModelProto]) -> None:
    board = SwitchedTower(tower_of(graphs["tinyclip"]), options=ONE)
    with pytest.raises(ExportError, match="probe: its switchboard is closed"):
        board.embed(ROWS, ())
    with board, pytest.raises(ExportError, match="it has no product 'nonsense'"):
        board.embed(ROWS, ["nonsense"])


def test_only_towers_that_these_engines_quantize() -> None:
    with pytest.raises(ExportError, match="sensitivity of 'openvino-int8': expected onnx-int8"):
        search_checkpoint(Checkpoint("x"), VariantSpec.parse("openvino-int8"), Int8Search())


def test_a_target_without_int8_is_refused() -> None:
    options = BuildOptions(int8=Int8Search(Int8Target(cosine=0.99)))
    with pytest.raises(ConfigError, match="no int8 variant is asked for among onnx-fp32; add onnx-int8"):
        options.check(parse_variants(["onnx-fp32"]))
    options.check(parse_variants(["openvino-int8"]))


@pytest.mark.slow
def test_an_export_keeps_what_was_chosen(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 64)
    table = tmp_path / "table.json"
    graph = open_source(Checkpoint(str(PROBES / "mobileclip")), threads=1).trace("image", GraphOptions())
    nodes = tower_of(graph).nodes
    times = LatencyTable({name: NodeTime(1.0, 0.5) for name in nodes})
    table.write_text(json.dumps(times.to_dict()), encoding="utf-8")
    target = Int8Target(cosine=0.9997, top1=0.95)
    settings = ExportSettings(
        graph=GraphOptions(text=False),
        references=References(pictures=pictures, calibration_samples=32),
        build=BuildOptions(int8=Int8Search(target, table, tmp_path / "reports", 1)),
        threads=1,
    )
    done = export_probe("mobileclip", tmp_path / "bundle", pictures, "onnx-int8", settings=settings)
    said: dict[str, Any] = manifest_of(tmp_path / "bundle")["variants"]["onnx-int8"]["calibration"]
    choice = said["choice"]["image"]
    assert choice["target"] == {"cosine": 0.9997, "top1": 0.95}
    assert choice["products"] == len(nodes)
    assert 0 < len(choice["kept"]) < len(nodes)
    assert all("of the cosine" in reason for reason in choice["kept"].values())
    assert said["policy"]["image"]["keep_float"] == sorted(choice["kept"])
    assert choice["cosine"] >= 0.9997
    assert done.report.to_dict()["variants"]["onnx-int8"]["choices"]["image"] == choice
    # The stored graph has a rounded weight for every other product, and for none of these.
    stored = manifest_of(tmp_path / "bundle")["variants"]["onnx-int8"]["towers"]["image"]["model"]
    made = onnx.load(tmp_path / "bundle" / stored).graph
    rounded = {node.output[0] for node in made.node if node.op_type == "DequantizeLinear"}
    products = {
        node.output[0]: node.input[1] for node in made.node if node.op_type in ("Conv", "Gemm", "MatMul")
    }
    in_int8 = {name for name, weight in products.items() if weight in rounded}
    assert in_int8 == set(nodes) - set(choice["kept"])
    assert (tmp_path / "reports" / "onnx-int8-image.svg").is_file()
