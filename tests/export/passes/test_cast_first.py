"""Casts of bytes stand first, and nothing else changes: ONNX's own evaluator agrees to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from edgeclip.errors import ExportError  # noqa: E402
from edgeclip.export.passes import apply, check  # noqa: E402
from edgeclip.export.passes.cast_first import CastFirst  # noqa: E402


def graph(
    *nodes: Any, shape_of_y: tuple[int | str, ...] = ("batch", 3, 4, 5), kind: int = TensorProto.FLOAT
) -> Any:
    scale = numpy_helper.from_array(np.array([[[2.0]], [[3.0]], [[4.0]]], np.float32), "scale")
    shape = numpy_helper.from_array(np.array([0, 3, 20], np.int64), "shape")
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 4, 5, 3])],
        [helper.make_tensor_value_info("y", kind, shape_of_y)],
        [scale, shape],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


TRANSPOSE = helper.make_node("Transpose", ["image"], ["t"], perm=[0, 3, 1, 2])
RESHAPE = helper.make_node("Reshape", ["t", "shape"], ["r"])


def cast(source: str, output: str = "f") -> Any:
    return helper.make_node("Cast", [source], [output], to=TensorProto.FLOAT)


@pytest.mark.parametrize(
    ("model", "order"),
    [
        (
            graph(TRANSPOSE, cast("t"), helper.make_node("Mul", ["f", "scale"], ["y"])),
            ["Cast", "Transpose", "Mul"],
        ),
        (
            graph(TRANSPOSE, RESHAPE, cast("r", "y"), shape_of_y=("batch", 3, 20)),
            ["Cast", "Transpose", "Reshape"],
        ),
        (
            graph(cast("image"), helper.make_node("Relu", ["f"], ["y"]), shape_of_y=("batch", 4, 5, 3)),
            ["Cast", "Relu"],
        ),
    ],
)
def test_the_cast_stands_first_and_numbers_stay(model: Any, order: list[str]) -> None:
    changed = apply(model, [CastFirst()], what="graph")
    check(changed, what="graph")
    assert [node.op_type for node in changed.graph.node] == order
    given = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    (before,), (after,) = (ReferenceEvaluator(each).run(None, {"image": given}) for each in (model, changed))
    np.testing.assert_array_equal(before, after)
    assert [value.name for value in changed.graph.output] == ["y"]


def test_bytes_that_are_never_cast_are_named() -> None:
    model = graph(helper.make_node("Transpose", ["image"], ["y"], name="turn"), kind=TensorProto.UINT8)
    with pytest.raises(ExportError, match=r"CastFirst fails.*'image' is read by Transpose 'turn'"):
        apply(model, [CastFirst()], what="graph")
