"""ONNX files of a variant: names, interfaces, data beside the graph, numbers on the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.bundle import Requires, TensorEntry, stored_name  # noqa: E402
from edgeclip.errors import ExportError  # noqa: E402
from edgeclip.export.build import BuildOptions, BuildRequest, builder_of  # noqa: E402
from edgeclip.export.to_onnx import built_tower, tensor_entries  # noqa: E402
from edgeclip.export.variants import VariantSpec  # noqa: E402

WIDTH, EMBED = 48, 16


def tiny_graph(seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    weights = numpy_helper.from_array(rng.normal(size=(WIDTH, EMBED)).astype(np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x", "w"], ["image_embedding"]),
        ],
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", WIDTH])],
        [helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, ["batch", EMBED])],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def request(tmp_path: Path, name: str, **options: bool | None) -> BuildRequest:
    graphs = {"image": tiny_graph()}
    return BuildRequest(VariantSpec.parse(name), graphs, tmp_path, options=BuildOptions(**options))


def test_entries_say_names_dtypes_and_shapes() -> None:
    assert tensor_entries(tiny_graph()) == (
        (TensorEntry(name="image", dtype="uint8", shape=("batch", WIDTH)),),
        (TensorEntry(name="image_embedding", dtype="float32", shape=("batch", EMBED)),),
    )


def test_a_dimension_without_a_name_is_an_error() -> None:
    graph = tiny_graph()
    graph.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    with pytest.raises(ExportError, match="'image': its dimension 0 has no size"):
        tensor_entries(graph)


def test_float32_is_the_graph_as_it_was(tmp_path: Path) -> None:
    asked = request(tmp_path, "onnx-fp32")
    built = builder_of("onnx")(asked)
    tower = built.towers["image"]
    assert list(tower.files) == ["image.onnx"]
    content = tower.files["image.onnx"]
    assert isinstance(content, bytes)
    stored, given = onnx.load_from_string(content).graph, asked.graphs["image"].graph
    assert [node.op_type for node in stored.node] == [node.op_type for node in given.node]
    assert stored.initializer == given.initializer
    assert (stored.input, stored.output) == (given.input, given.output)
    assert built.requires == Requires()
    assert builder_of("onnx")(asked).towers["image"].files == tower.files


def test_a_target_says_what_its_hosts_must_offer(tmp_path: Path) -> None:
    built = builder_of("onnx")(request(tmp_path, "onnx-fp32@arm64-neon"))
    assert built.requires == Requires(isa_any=("neon",))


def test_external_data_is_named_as_a_bundle_stores_it(tmp_path: Path) -> None:
    import hashlib

    import onnxruntime

    built = builder_of("onnx")(request(tmp_path, "onnx-fp32", external_data=True)).towers["image"]
    assert list(built.files) == ["image.onnx", "image.onnx.data"]
    data = built.files["image.onnx.data"]
    assert isinstance(data, bytes)
    stored = stored_name("image.onnx.data", hashlib.sha256(data).hexdigest())
    graph = built.files["image.onnx"]
    assert isinstance(graph, bytes)
    assert stored.encode() in graph
    (tmp_path / stored).write_bytes(data)
    (tmp_path / "image.onnx").write_bytes(graph)
    feed = {"image": np.random.default_rng(1).integers(0, 256, (3, WIDTH), dtype=np.uint8)}
    providers = ["CPUExecutionProvider"]
    beside = onnxruntime.InferenceSession(str(tmp_path / "image.onnx"), providers=providers).run(None, feed)
    within = onnxruntime.InferenceSession(tiny_graph().SerializeToString(), providers=providers)
    np.testing.assert_array_equal(beside[0], within.run(None, feed)[0])


def test_too_many_weights_for_one_file_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.export.to_onnx.LARGEST_MESSAGE", 1000)
    with pytest.raises(ExportError, match=r"image tower: its weights have 0\.0 GB"):
        built_tower("image", tiny_graph(), external_data=False)
    assert len(built_tower("image", tiny_graph()).files) == 2


@pytest.mark.parametrize(
    ("variant", "allowed", "form"),
    [
        ("onnx-fp32", True, "none"),
        ("onnx-fp32@x86-avx2", True, "none"),
        ("onnx-fp16@x86-vnni", True, "none"),
        ("onnx-fp16@x86-avx2", False, "none"),
        ("onnx-fp16@x86-avx2", True, "tanh"),
    ],
)
def test_gelu_takes_its_tanh_form_only_where_that_is_faster_and_within_limits(
    tmp_path: Path, variant: str, allowed: bool, form: str
) -> None:
    graph = tiny_graph()
    graph.graph.node[1].output[0] = "m"
    graph.graph.node.append(helper.make_node("Gelu", ["m"], ["image_embedding"]))
    asked = BuildRequest(
        VariantSpec.parse(variant), {"image": graph}, tmp_path, options=BuildOptions(gelu_tanh=allowed)
    )
    content = builder_of("onnx")(asked).towers["image"].files["image.onnx"]
    assert isinstance(content, bytes)
    gelu = next(node for node in onnx.load_from_string(content).graph.node if node.op_type == "Gelu")
    said = {entry.name: entry.s.decode() for entry in gelu.attribute}
    assert said.get("approximate", "none") == form


def test_a_graph_the_checker_refuses_is_not_stored() -> None:
    graph = tiny_graph()
    graph.graph.node[1].input[1] = "nobody"
    with pytest.raises(ExportError, match=r"image tower: the ONNX checker refuses the graph: .*nobody"):
        built_tower("image", graph)
