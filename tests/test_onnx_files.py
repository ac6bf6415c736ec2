"""What a graph makes an engine read is found, wherever in the graph it is said."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import _get_all_tensors

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BundleError
from edgeclip.onnx_files import external_locations


def tensor(name: str, location: str | None = None) -> Any:
    made = numpy_helper.from_array(np.zeros(4, np.float32), name)
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("offset", "0"), ("location", location), ("length", "16")):
            entry = made.external_data.add()
            entry.key, entry.value = key, value
    return made


def graph(*initializers: Any, nodes: tuple[Any, ...] = ()) -> Any:
    return helper.make_graph(list(nodes), "g", [], [], list(initializers))


def save(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_every_place_that_holds_a_tensor_is_searched(tmp_path: Path) -> None:
    inner = graph(tensor("a", "in-subgraph"))
    deeper = graph(nodes=(helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=graph()),))
    nodes = (
        helper.make_node("Constant", [], ["x"], value=tensor("b", "in-attribute")),
        helper.make_node("Loop", [], ["y"], body=deeper),
        helper.make_node(
            "Many", [], ["z"], tensors=[tensor("e", "in-tensors")], graphs=[graph(tensor("f", "in-graphs"))]
        ),
    )
    model = helper.make_model(graph(tensor("g", "in-initializer"), tensor("h"), nodes=nodes))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor("i", "in-sparse"))
    function = model.functions.add()
    function.node.add().CopyFrom(helper.make_node("Constant", [], ["x"], value=tensor("j", "in-function")))
    model.training_info.add().algorithm.CopyFrom(graph(tensor("k", "in-training")))

    assert external_locations(save(tmp_path / "m.onnx", model)) == {
        f"in-{place}"
        for place in (
            "subgraph", "attribute", "tensors", "graphs", "initializer", "sparse", "function", "training",
        )
    }  # fmt: skip


def test_it_agrees_with_the_onnx_package(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(20):
        initializers = [
            tensor(f"t{each}", rng.choice([None, f"file-{each}", "../x", "/etc/passwd", "名"]))
            for each in range(10)
        ]
        model = helper.make_model(graph(*initializers))
        expected = {
            entry.value
            for found in _get_all_tensors(model)
            for entry in found.external_data
            if entry.key == "location"
        }
        assert external_locations(save(tmp_path / f"{number}.onnx", model)) == expected


def test_a_real_graph_without_external_data_names_none(tiny_bundle: Path) -> None:
    for path in tiny_bundle.rglob("*.onnx"):
        assert external_locations(path) == set()


@pytest.mark.parametrize("content", [b"graph", b"\x08", b"\x3a\x05ab", b"\x0b", b"\x09\0", b"\xff" * 20])
def test_what_is_no_protobuf_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"field|number"):
        external_locations(tmp_path / "m.onnx")


def test_an_empty_file_names_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    assert external_locations(tmp_path / "m.onnx") == set()


def test_graphs_nested_deeper_than_the_stack_do_no_harm(tmp_path: Path) -> None:
    def wrap(field: int, content: bytes) -> bytes:
        length, size = b"", len(content)
        while size >= 0x80:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([field << 3 | 2]) + length + bytes([size]) + content

    content = wrap(5, tensor("a", "deep").SerializeToString())
    for _ in range(3000):
        content = wrap(1, wrap(5, wrap(6, content)))  # node, attribute, graph
    (tmp_path / "m.onnx").write_bytes(wrap(7, content))
    assert external_locations(tmp_path / "m.onnx") == {"deep"}


def test_mutated_graphs_give_names_or_a_value_error(tmp_path: Path, tiny_bundle: Path) -> None:
    rng = random.Random(0)
    initializers = [tensor(f"t{each}", "file") for each in range(5)]
    good = helper.make_model(graph(*initializers)).SerializeToString()
    good += max((path.read_bytes() for path in tiny_bundle.rglob("image*.onnx")), key=len)
    path = tmp_path / "m.onnx"
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            external_locations(path)
        except ValueError:
            continue


def with_external_data(bundle: Path, location: str, *, listed: bool) -> Bundle:
    model = helper.make_model(graph(tensor("w", location)))
    with BundleWriter(bundle) as writer:
        tower = writer.manifest["variants"]["onnx-fp32"]["towers"]["image"]
        data = writer.add("onnx-fp32/image.data", bytes(16), exact=True)
        file = writer.add("onnx-fp32/image.onnx", model.SerializeToString())
        tower.update(model=file, files=[file, data] if listed else [file])
        return writer.commit()


def test_external_data_that_the_tower_lists_is_allowed(tiny_bundle: Path) -> None:
    tower = with_external_data(tiny_bundle, "image.data", listed=True).variant("onnx-fp32").tower("image")
    assert [path.name for path in tower.files][1] == "image.data"


@pytest.mark.parametrize(
    ("location", "listed"),
    [
        ("image.data", False),
        ("../../canary", True),
        ("/etc/passwd", True),
        ("./image.data", True),
        ("", True),
    ],
)
def test_external_data_that_the_tower_does_not_list_is_refused(
    tiny_bundle: Path, location: str, listed: bool
) -> None:
    bundle = with_external_data(tiny_bundle, location, listed=listed)
    with pytest.raises(
        BundleError, match=r"the graph 'onnx-fp32/image.* reads the file .*, which is not among"
    ):
        bundle.variant("onnx-fp32").tower("image")


@pytest.mark.parametrize("location", ["/image.data", "image.data"])
def test_at_the_top_of_the_bundle_an_absolute_location_stays_one(tiny_bundle: Path, location: str) -> None:
    model = helper.make_model(graph(tensor("w", location)))
    with BundleWriter(tiny_bundle) as writer:
        data = writer.add("image.data", bytes(16), exact=True)
        file = writer.add("image.model", model.SerializeToString())  # whatever it is called
        writer.manifest["variants"]["onnx-fp32"]["towers"]["image"].update(model=file, files=[file, data])
        variant = writer.commit().variant("onnx-fp32")
    if location == "image.data":
        assert len(variant.tower("image").files) == 2
    else:
        with pytest.raises(BundleError, match=r"reads the file '/image\.data'"):
            variant.tower("image")


def test_a_graph_that_is_no_protobuf_is_an_error_of_the_bundle(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        file = writer.add("onnx-fp32/image.onnx", b"no graph")
        writer.manifest["variants"]["onnx-fp32"]["towers"]["image"].update(model=file, files=[file])
        bundle = writer.commit()
    with pytest.raises(BundleError, match=r"cannot be read: a .* export it again"):
        bundle.variant("onnx-fp32").tower("image")


def test_the_onnx_package_reads_the_same_field_numbers() -> None:
    """The table of messages is right: each named field has the number and the type it is given there."""
    from edgeclip.onnx_files import _MESSAGES

    for message, fields in _MESSAGES.items():
        described = getattr(onnx, message).DESCRIPTOR
        for number, inner in fields.items():
            assert described.fields_by_number[number].message_type.name == inner
        for field in described.fields:
            if field.message_type is not None and field.message_type.name in {*_MESSAGES, "TensorProto"}:
                assert field.number in fields, (message, field.name)
