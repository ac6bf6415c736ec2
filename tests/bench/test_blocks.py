"""Blocks: from names of weights, from another form of the tower, and from the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.bench.blocks import BEFORE, file_nodes, named_products, places
from edgeclip.bench.operations import Product, products_of
from edgeclip.bundle import Bundle
from edgeclip.onnx_files import GraphNode


def product(node: str, operations: int, *, depthwise: bool = False, size: int = 8) -> Product:
    weight = (4, 1, 3, 3) if depthwise else (4, 4, 1, 1)
    return Product(node, operations, False, ((1, 4, size, size), weight), (1, 4, size, size))


def conv(name: str, read: str, gives: str, weight: str) -> GraphNode:
    return GraphNode(name, "Conv", (read, weight), (gives,))


NAMED = [
    GraphNode("Cast_1", "Cast", ("image",), ("x0",)),
    conv("Conv_1", "x0", "x1", "tower.stem.0.weight"),
    GraphNode("Relu_1", "Relu", ("x1",), ("x2",)),
    conv("Conv_2", "x2", "x3", "tower.stages.0.blocks.0.expand.weight"),
    GraphNode("Relu_2", "Relu", ("x3",), ("x4",)),
    conv("Conv_3", "x4", "x5", "tower.stages.0.blocks.0.project.weight"),
    GraphNode("Add_1", "Add", ("x2", "x5"), ("x6",)),
    conv("Conv_4", "x6", "x7", "tower.stages.0.blocks.1.expand.weight"),
    GraphNode("Gelu_1", "Gelu", ("x7",), ("x8",)),
    GraphNode("MatMul_1", "MatMul", ("x8", "val_1"), ("x9",)),
    GraphNode("Add_2", "Add", ("x9", "tower.projection.bias"), ("x10",)),
]
SIZES = [product(f"Conv_{n}", 10 * n) for n in (1, 2, 3, 4)] + [product("MatMul_1", 50)]


def without_names(nodes: list[GraphNode]) -> list[GraphNode]:
    """Return a graph as the int8 form has it: the same tensors, weights called by what they give."""
    return [
        node._replace(
            inputs=tuple(
                f"{node.outputs[0]}_w" if name.startswith("tower.") else name for name in node.inputs
            )
        )
        for node in nodes
    ]


def test_weights_name_blocks_and_what_reads_them_follows() -> None:
    found = places(NAMED, {"image"}, SIZES)
    assert {name: place.block for name, place in found.items()} == {
        "Cast_1": BEFORE,
        "Conv_1": "stem",
        "Relu_1": "stem",
        "Conv_2": "stages.0.blocks.0",
        "Relu_2": "stages.0.blocks.0",
        "Conv_3": "stages.0.blocks.0",
        "Add_1": "stages.0.blocks.0",
        "Conv_4": "stages.0.blocks.1",
        "Gelu_1": "stages.0.blocks.1",
        "MatMul_1": "projection",  # its weight has no name: the bias behind it does
        "Add_2": "projection",
    }
    assert {place.stage for place in found.values()} == {BEFORE, "stem", "stages.0", "projection"}


def test_a_weight_that_several_nodes_share_names_none() -> None:
    shared = [
        node._replace(inputs=(*node.inputs, "tower.stem.norm.weight")) if node.op == "Conv" else node
        for node in NAMED
    ]
    assert places(shared, {"image"}, SIZES) == places(NAMED, {"image"}, SIZES)


def test_names_are_taken_over_from_a_form_with_the_same_products() -> None:
    like = named_products(NAMED, {"image"}, SIZES)
    assert like is not None
    bare = without_names(NAMED)
    assert named_products(bare, {"image"}, SIZES) is None
    assert places(bare, {"image"}, SIZES, [like]) == places(NAMED, {"image"}, SIZES)


def test_another_tower_names_nothing() -> None:
    other = [(operations + 1, "elsewhere") for operations in range(5)]
    found = places(without_names(NAMED), {"image"}, SIZES, [other])
    assert "elsewhere" not in {place.block for place in found.values()}


def test_without_names_blocks_end_with_residual_sums_and_linear_products() -> None:
    found = {name: place.block for name, place in places(without_names(NAMED), {"image"}, SIZES).items()}
    assert found["Conv_1"] == "x1"  # what reads the picture stands alone
    assert found["Conv_2"] == found["Conv_3"] == found["Add_1"] == "x3…x5"
    assert found["Conv_4"] != found["Conv_3"]


def test_stages_without_names_are_sizes_of_the_picture() -> None:
    bare = without_names(NAMED)
    assert places(bare, {"image"}, SIZES)["Conv_3"].stage == "8x8"


@pytest.mark.parametrize("tower", ["image", "text"])
def test_every_node_of_the_embedded_towers_has_a_place(tower: str) -> None:
    files = Bundle.open("default").variant("onnx-int8").tower(tower)
    nodes, roots = file_nodes(files.model, [each.name for each in files.inputs])
    products = products_of(files)
    found = places(nodes, roots, products)
    assert {each.node for each in products} <= found.keys()


def test_the_embedded_image_tower_has_the_blocks_of_its_design() -> None:
    files = Bundle.open("default").variant("onnx-int8").tower("image")
    nodes, roots = file_nodes(files.model, ["image"])
    found = places(nodes, roots, products_of(files))
    blocks = list(dict.fromkeys(place.block for place in found.values()))
    # EfficientNet-Lite0 (Tan and Le 2019): a stem, 16 inverted bottlenecks, a last convolution, a classifier.
    assert blocks[:3] == [BEFORE, "stem", "blocks.0"]
    bottlenecks = blocks[2 : blocks.index("classifier") - 1]
    assert len(bottlenecks) == 16
    sizes = list(dict.fromkeys(place.stage for place in found.values() if place.block in bottlenecks))
    assert sizes == ["112x112", "56x56", "28x28", "14x14", "7x7"]


def test_an_ir_takes_the_names_of_its_onnx_file(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    weights = {"tower.stem.weight": (4, 3, 3, 3), "tower.blocks.0.weight": (5, 4, 1, 1)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "tower.stem.weight"], ["a"], "Conv_1"),
            helper.make_node("Relu", ["a"], ["b"], "Relu_1"),
            helper.make_node("Conv", ["b", "tower.blocks.0.weight"], ["c"], "Conv_2"),
        ],
        "tower",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 5, 6, 6])],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "tower.onnx")
    openvino.save_model(openvino.Core().read_model(tmp_path / "tower.onnx"), tmp_path / "tower.xml", False)
    like = named_products(
        *file_nodes(tmp_path / "tower.onnx", ["image"]), products_of(tmp_path / "tower.onnx")
    )
    assert like is not None
    assert [block for _, block in like] == ["stem", "blocks.0"]
    products = products_of(tmp_path / "tower.xml")
    found = places(*file_nodes(tmp_path / "tower.xml", ["image"]), products, [like])
    assert [found[each.node].block for each in products] == ["stem", "blocks.0"]
