"""The tanh form of GELU, from the operator and from every decomposition that exporters write."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
from graphs import graph, kinds, node, run  # noqa: E402

from edgeclip.export.passes import apply, check  # noqa: E402
from edgeclip.export.passes.gelu_tanh import GeluTanh  # noqa: E402

ROUNDING = 1e-6
X = np.linspace(-6, 6, 121, dtype=np.float32).reshape(11, 11)


def number(value: float) -> np.ndarray:
    return np.float32(value).reshape(())


CONSTANTS = {
    "root": number(math.sqrt(2)),
    "inverse": number(1 / math.sqrt(2)),
    "one": number(1),
    "half": number(0.5),
    "third": number(1 / 3),
}
ERF = {
    "div": [node("Div", ["x", "root"], ["s"]), node("Erf", ["s"], ["e"]), node("Add", ["e", "one"], ["p"])],
    "mul": [
        node("Mul", ["inverse", "x"], ["s"]),
        node("Erf", ["s"], ["e"]),
        node("Add", ["one", "e"], ["p"]),
    ],
}
PRODUCTS = {
    "x then half": [node("Mul", ["x", "p"], ["m"]), node("Mul", ["m", "half"], ["y"])],
    "half then x": [node("Mul", ["p", "half"], ["m"]), node("Mul", ["x", "m"], ["y"])],
    "half of x": [node("Mul", ["x", "half"], ["m"]), node("Mul", ["m", "p"], ["y"])],
}


def tanh_form(x: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy()


def made(nodes: list[onnx.NodeProto], opset: int) -> onnx.ModelProto:
    read = {name for each in nodes for name in each.input}
    constants = {name: array for name, array in CONSTANTS.items() if name in read}
    return graph(nodes, ["batch", 11], ["batch", 11], constants, opset=opset)


def replaced(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    one = GeluTanh()
    result = apply(model, [one], what="graph")
    check(result, what="graph")
    return result, one.replaced


def test_the_operator_takes_the_other_form() -> None:
    result, count = replaced(made([node("Gelu", ["x"], ["y"])], 20))
    assert (kinds(result), count) == (["Gelu"], 1)
    np.testing.assert_allclose(run(result, X), tanh_form(X), atol=ROUNDING)
    assert replaced(result)[1] == 0


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("erf", ERF)
def test_a_decomposition_is_recognised(erf: str, products: str) -> None:
    result, count = replaced(made([*ERF[erf], *PRODUCTS[products]], 20))
    assert (kinds(result), count) == (["Gelu"], 1)
    np.testing.assert_allclose(run(result, X), tanh_form(X), atol=ROUNDING)


@pytest.mark.parametrize(
    "nodes",
    [
        [*ERF["div"], node("Mul", ["x", "p"], ["m"]), node("Mul", ["m", "third"], ["y"])],
        [node("Erf", ["x"], ["e"]), node("Add", ["e", "one"], ["p"]), *PRODUCTS["x then half"]],
        [
            *ERF["div"],
            node("Mul", ["x", "p"], ["m"]),
            node("Mul", ["m", "half"], ["h"]),
            node("Add", ["h", "e"], ["y"]),
        ],
        [*ERF["div"], node("Mul", ["s", "p"], ["m"]), node("Mul", ["m", "half"], ["y"])],
    ],
    ids=["another factor", "no root of two", "erf read twice", "another x"],
)
def test_what_is_no_gelu_stays(nodes: list[onnx.NodeProto]) -> None:
    model = made(nodes, 20)
    result, count = replaced(model)
    assert count == 0
    np.testing.assert_array_equal(run(result, X), run(model, X))


def test_before_opset_20_the_exact_decomposition_stays_and_is_fused(tmp_path: Path) -> None:
    import onnxruntime

    result, count = replaced(made([*ERF["div"], *PRODUCTS["x then half"]], 17))
    assert count == 0
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(result.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert kinds(onnx.load(tmp_path / "optimized.onnx")) == ["Gelu"]
