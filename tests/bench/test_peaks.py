"""The ceiling: products are right, the best is kept, and large ones are left to fast machines."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from edgeclip.bench import peaks
from edgeclip.bench.peaks import Peaks
from edgeclip.runtime.probe_graphs import float_product


def test_every_size_is_measured_for_both_kinds() -> None:
    found = Peaks((16, 32))
    found.measure()
    first = found.entry()
    found.measure()
    second = found.entry()
    assert set(first.float_gflops) == set(first.int8_gops) == {"16", "32"}
    for kind in ("float_gflops", "int8_gops"):
        for n, rate in getattr(first, kind).items():
            assert getattr(second, kind)[n] >= rate > 0  # the best counts


def test_products_of_seconds_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_MOST_NS", 1)
    found = Peaks((16, 32, 64))
    found.measure()
    assert set(found.entry().float_gflops) == set(found.entry().int8_gops) == {"16"}


def test_the_float_product_is_what_the_reference_evaluator_gives() -> None:
    from onnx.reference import ReferenceEvaluator

    from edgeclip.runtime.ort import import_onnxruntime

    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((3, 5)).astype(np.float32), draw.standard_normal((5, 4)).astype(np.float32)
    graph = float_product(3, b)
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    (expected,) = ReferenceEvaluator(onnx.load_from_string(graph)).run(None, {"a": a})  # type: ignore[misc]
    session: Any = import_onnxruntime().InferenceSession(graph, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"a": a})[0], expected, rtol=1e-6)
    np.testing.assert_allclose(expected, a @ b, rtol=1e-6)
