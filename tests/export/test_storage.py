"""Tables in int8 beside rounded activations of the same rows."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgeclip.export.int8 import quantize  # noqa: E402
from edgeclip.export.storage import store_small  # noqa: E402
from edgeclip.quantization import CPU, TRANSFORMER  # noqa: E402
from edgeclip.runtime.ort import import_onnxruntime  # noqa: E402


def test_rows_that_a_product_reads_at_once() -> None:
    random = np.random.default_rng(0)
    table, weight = random.normal(size=(64, 16)), random.normal(size=(16, 24))
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "tokens"], ["embedding"]),
            helper.make_node("MatMul", ["embedding", "weight"], ["text_embedding"]),
        ],
        "tower",
        [helper.make_tensor_value_info("tokens", TensorProto.INT32, ["batch", 4])],
        [helper.make_tensor_value_info("text_embedding", TensorProto.FLOAT, ["batch", 4, 24])],
        [
            numpy_helper.from_array(table.astype(np.float32), "table"),
            numpy_helper.from_array(weight.astype(np.float32), "weight"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    rows = random.integers(0, 64, (16, 4)).astype(np.int32)
    small = quantize(model, rows, TRANSFORMER, CPU, what="tower")
    assert any(node.op_type == "DequantizeLinear" for node in small.graph.node)
    store_small(small, tables="int8", others="float16")
    onnx.checker.check_model(small, full_check=True)
    session = import_onnxruntime().InferenceSession(
        small.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"tokens": rows})
    expected = table[rows] @ weight
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
