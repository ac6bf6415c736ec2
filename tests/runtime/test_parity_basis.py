"""Embeddings that are all alike, limits that were missed on purpose, and graphs with labels inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.bundle import Parity
from edgeclip.errors import InputError
from edgeclip.runtime.parity import ParityLimits, check_parity, compare_embeddings, compare_logits
from edgeclip.runtime.rows import fixed_batch, run_rows
from edgeclip.runtime.session import OpenSession, Placement, TensorSpec

RANDOM = np.random.default_rng(0)


def alike(count: int, *, spread: float) -> NDArray[np.float32]:
    rows = np.ones((count, 32)) + spread * RANDOM.normal(size=(count, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_alike_embeddings_hide_an_error_from_cosines_and_not_from_centred_ones() -> None:
    reference = alike(64, spread=1e-2)
    shuffled = reference[RANDOM.permutation(64)]  # every row is another picture's
    numbers = compare_embeddings(reference, shuffled)
    assert numbers.cosine_min > 0.999
    assert not check_parity(numbers, ParityLimits(cosine_min=0.999))
    failures = check_parity(numbers, ParityLimits.of("fp32", "centred"))
    assert {failure.number for failure in failures} == {"max_abs", "centred_cosine_mean"}
    assert not check_parity(compare_embeddings(reference, reference), ParityLimits.of("fp32", "centred"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_every_precision_has_limits_on_either_basis(precision: str) -> None:
    assert ParityLimits.of(precision, "centred").max_abs is not None
    assert ParityLimits.of(precision, "centred").top1_agreement is None
    assert ParityLimits.of_classifier(precision).top1_agreement == 0.98
    assert ParityLimits.of_classifier(precision, "centred").top1_agreement is None


def test_what_was_missed_on_purpose_holds_and_nothing_else_is_loosened() -> None:
    limits = ParityLimits.of("int8")
    assert limits.accepting(None) == limits
    assert limits.accepting(Parity(status="passed", cosine_mean=0.999)) == limits
    said = Parity(status="passed", cosine_mean=0.97, cosine_min=0.9, missed={"cosine_mean": 0.99})
    accepted = limits.accepting(said)
    assert accepted.cosine_mean == pytest.approx(0.925)
    assert accepted.top1_agreement == limits.top1_agreement
    said = Parity(status="passed", top1_agreement=0.95, missed={"top1_agreement": 0.98})
    assert limits.accepting(said).top1_agreement == pytest.approx(0.85)
    said = Parity(status="passed", max_abs=3e-4, missed={"max_abs": 1e-4})
    assert ParityLimits.of("fp32").accepting(said).max_abs == pytest.approx(6e-4)


def test_logits_are_compared_by_their_best_labels() -> None:
    cosines = np.array([[0.9, 0.1, 0.2], [0.1, 0.8, 0.7]], np.float32)
    assert compare_logits(cosines, cosines).top1_agreement == 1
    swapped = compare_logits(cosines, cosines[:, [0, 2, 1]])
    assert swapped.top1_agreement == 0.5
    assert swapped.max_abs == pytest.approx(0.1, abs=1e-6)
    broken = compare_logits(cosines, np.where(cosines > 0.85, np.nan, cosines))
    assert (broken.not_finite, broken.worst) == (1, 0)
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 2\)"):
        compare_logits(cosines, cosines[:, :2])


class _Doubling:
    """An engine that doubles rows, and remembers how many came."""

    concurrent_runs = True
    chosen = Placement("fake", "numpy", "cpu", 1, "fp32", "a fake was asked for")

    def __init__(self, batch: int | str) -> None:
        self.inputs = {"rows": TensorSpec("rows", "float32", (batch, 2))}
        self.outputs = {"doubled": TensorSpec("doubled", "float32", (batch, 2))}
        self.calls: list[int] = []

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls.append(len(feeds["rows"]))
        return {"doubled": feeds["rows"] * 2}

    def close(self) -> None:
        """Nothing to release."""


@pytest.mark.parametrize(("batch", "calls"), [(3, [3, 3]), ("batch", [2, 2, 1])])
def test_rows_go_through_in_the_batches_a_tower_takes(batch: int | str, calls: list[int]) -> None:
    engine = _Doubling(batch)
    session = OpenSession(engine, name="doubling")
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    assert fixed_batch(session) == (batch if isinstance(batch, int) else None)
    np.testing.assert_array_equal(run_rows(session, rows, batch=2), rows * 2)
    assert engine.calls == calls
