"""Operations of towers, against counts by torch and by onnx's shape inference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from edgeclip.bench.operations import Operations, count_operations
from edgeclip.bundle import Bundle
from edgeclip.errors import BackendError, InputError

PRODUCTS = ("Conv", "Gemm", "MatMul")


def constant(name: str, *shape: int) -> Any:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each product, in a graph of any batch."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w2"], ["b"], "grouped", group=4, pads=[2, 2, 2, 2]),
        helper.make_node("ConvTranspose", ["b", "w3"], ["c"], "transposed", strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        helper.make_node("Flatten", ["d"], ["e"], "flatten"),
        helper.make_node("Gemm", ["e", "w4"], ["f"], "gemm", transB=1),
        helper.make_node("Unsqueeze", ["f", "axis"], ["g"], "wider"),
        helper.make_node("Transpose", ["g"], ["h"], "turned", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h", "g"], ["i"], "batched"),
        helper.make_node("MatMul", ["i", "w5"], ["y"], "last"),
    ]
    constants = [
        constant("w1", 8, 3, 3, 3),
        constant("w2", 12, 2, 5, 5),
        constant("w3", 12, 5, 2, 2),
        constant("w4", 7, 5),
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        constant("w5", 7, 9),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "products",
        [value("x", TensorProto.FLOAT, ["batch", 3, 20, 16])],
        [value("y", TensorProto.FLOAT, ["batch", 7, 9])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path_factory.mktemp("products") / "products.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def counted_by_torch(network: Path) -> int:
    weights = {
        each.name: torch.from_numpy(numpy_helper.to_array(each).copy())
        for each in onnx.load(network).graph.initializer
    }
    with FlopCounterMode(display=False) as counter:
        a = functional.conv2d(torch.ones(1, 3, 20, 16), weights["w1"], stride=2, padding=1)
        b = functional.conv2d(a, weights["w2"], groups=4, padding=2)
        c = functional.conv_transpose2d(b, weights["w3"], stride=2)
        f = functional.linear(c.mean((2, 3)), weights["w4"])
        i = f[:, :, None] @ f[:, None]
        assert (i @ weights["w5"]).shape == (1, 7, 9)
    total = counter.get_total_flops()
    assert isinstance(total, int)
    return total


def test_onnx_products_are_those_that_torch_counts(network: Path, counted_by_torch: int) -> None:
    assert count_operations(network) == Operations(counted_by_torch, 0)


def test_openvino_products_are_those_that_torch_counts(
    network: Path, counted_by_torch: int, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.Core().read_model(network), tmp_path / "products.xml", False)
    assert count_operations(tmp_path / "products.xml") == Operations(counted_by_torch, 0)


def test_openvino_attention_is_two_products(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from openvino import opset13

    shapes = [(1, 4, 10, 8), (1, 4, 6, 8), (1, 4, 6, 8)]
    inputs = [opset13.parameter(shape, np.float32) for shape in shapes]
    attention = opset13.scaled_dot_product_attention(*inputs)
    openvino.save_model(openvino.Model([attention], inputs), tmp_path / "attention.xml", False)
    with FlopCounterMode(display=False) as counter:
        query, key, value = (torch.ones(shape) for shape in shapes)
        query @ key.transpose(-1, -2) @ value
    assert count_operations(tmp_path / "attention.xml").total == counter.get_total_flops()


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_shipped_tower_is_what_shape_inference_says(tower: str) -> None:
    files = Bundle.open("default").variant("onnx-int8").tower(tower)
    model = onnx.load(files.model)
    for size in (each.type.tensor_type.shape.dim[0] for each in model.graph.input):
        size.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {each.name: list(each.dims) for each in graph.initializer}
    for each in (*graph.input, *graph.output, *graph.value_info):
        shapes[each.name] = [size.dim_value for size in each.type.tensor_type.shape.dim]
    makers = {output: node.op_type for node in graph.node for output in node.output}
    total = int8 = 0
    for node in graph.node:
        if node.op_type in PRODUCTS:
            inner = shapes[node.input[1]][1:] if node.op_type == "Conv" else [shapes[node.input[0]][-1]]
            operations = 2 * math.prod(shapes[node.output[0]]) * math.prod(inner)
            total += operations
            int8 += operations * all(makers.get(name) == "DequantizeLinear" for name in node.input[:2])
    found = count_operations(files)
    assert found.total == total > 0
    # Bytes that are only moved before they are multiplied are bytes still.
    assert int8 <= found.int8 <= total
    assert (found.int8 > 0) == (int8 > 0)


def test_formats_without_sizes_say_so(tmp_path: Path) -> None:
    (tmp_path / "tower.engine").write_bytes(b"plan")
    with pytest.raises(InputError, match="a tensorrt file does not say the sizes"):
        count_operations(tmp_path / "tower.engine")


def test_operators_with_products_inside_are_named(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Einsum", ["x"], ["y"], "sum", equation="bij->bi")],
        "einsum",
        [value("x", TensorProto.FLOAT, ["batch", 3, 4])],
        [value("y", TensorProto.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "einsum.onnx")
    with pytest.raises(InputError, match=r"einsum.onnx: the products inside the operator 'Einsum'"):
        count_operations(tmp_path / "einsum.onnx")


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "damaged.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"damaged.onnx: ONNX Runtime does not run it"):
        count_operations(tmp_path / "damaged.onnx")
