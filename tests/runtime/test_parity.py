"""The numbers of two forms, their limits, and the golden check of a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cosine as scipy_cosine
from wrong_bundle import put_wrong_model

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BundleError, InputError
from edgeclip.runtime.parity import (
    Golden,
    ParityLimits,
    ParityNumbers,
    check_parity,
    check_tower,
    compare_embeddings,
    golden_check,
)
from edgeclip.runtime.session import open_session
from edgeclip.tensors import read_tensors, write_tensors
from edgeclip.testing import FakeSession


def unit_rows(n: int, embed_dim: int = 32, seed: int = 0) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(n, embed_dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_equal_embeddings_agree_wholly() -> None:
    rows = unit_rows(10)
    numbers = compare_embeddings(rows, rows.copy(), bank=unit_rows(50, seed=1))
    assert numbers.max_abs == 0
    assert numbers.cosine_min == pytest.approx(1, abs=1e-12)
    assert (numbers.top1_agreement, numbers.top5_agreement, numbers.not_finite) == (1, 1, 0)
    for precision in ("fp32", "fp16", "int8"):
        assert check_parity(numbers, ParityLimits.of(precision)) == ()


def test_the_numbers_are_those_of_an_independent_library() -> None:
    a, b = unit_rows(12), unit_rows(12, seed=5) * 1.7
    numbers = compare_embeddings(a, b)
    cosines = [
        1 - scipy_cosine(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)
    ]
    assert numbers.cosine_min == pytest.approx(min(cosines), abs=1e-9)
    assert numbers.cosine_mean == pytest.approx(np.mean(cosines), abs=1e-9)
    assert numbers.worst == int(np.argmin(cosines))
    pairs = [1 - scipy_cosine(a[i], a[j]) for i in range(12) for j in range(i)]
    assert numbers.reference_similarity == pytest.approx(np.median(pairs), abs=1e-6)


def test_ranks_are_compared_on_the_bank() -> None:
    bank = np.eye(8, dtype=np.float32)
    reference = bank[:4]
    candidate = bank[[0, 1, 2, 7]]
    numbers = compare_embeddings(reference, candidate, bank=bank)
    assert numbers.top1_agreement == 0.75
    # The fourth reference's best five are 3, 0, 1, 2, 4 and the candidate's 7, 0, 1, 2, 3.
    assert numbers.top5_agreement == pytest.approx((3 + 4 / 5) / 4)


def test_rows_that_are_not_finite_fail_whatever_the_limits() -> None:
    candidate = unit_rows(10)
    candidate[3, 0] = np.nan
    candidate[6, 1] = np.inf
    numbers = compare_embeddings(unit_rows(10), candidate, bank=unit_rows(20))
    assert (numbers.not_finite, numbers.cosine_min, numbers.worst) == (2, -1.0, 3)
    assert numbers.top1_agreement == 0.8
    (failure,) = check_parity(numbers, ParityLimits())
    assert str(failure) == "2 embeddings are not finite (first bad row 3)"


def test_a_common_part_hides_a_difference_that_centring_shows() -> None:
    """Random weights put every picture on one vector: the plain cosine is near one for unrelated rows."""
    common = np.full(32, 10, np.float32)
    numbers = compare_embeddings(unit_rows(20) + common, unit_rows(20, seed=9) + common)
    assert numbers.cosine_min > 0.999
    assert numbers.centred_cosine_mean is not None
    assert numbers.centred_cosine_mean < 0.3
    assert numbers.reference_similarity is not None
    assert numbers.reference_similarity > 0.9
    (failure,) = check_parity(numbers, ParityLimits(), similarity_limit=0.9)
    assert "reference embeddings are all alike, so cosines prove nothing" in str(failure)


def numbers_with(**changes: Any) -> ParityNumbers:
    base = ParityNumbers(
        n=100,
        max_abs=0.0,
        cosine_min=1.0,
        cosine_mean=1.0,
        centred_cosine_mean=1.0,
        top1_agreement=1.0,
        top5_agreement=1.0,
        reference_similarity=0.2,
        worst=4,
    )
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("precision", "changes", "message"),
    [
        ("fp32", {"max_abs": 2e-4}, r"max_abs is 0.0002, expected at most 0.0001 \(worst row 4\)"),
        ("fp32", {"max_abs": float("nan")}, "max_abs is nan"),
        ("fp32", {"cosine_min": 0.9999}, "cosine_min is 0.9999, expected at least 0.99999"),
        ("fp16", {"cosine_min": 0.9989}, "cosine_min is 0.9989, expected at least 0.999"),
        ("int8", {"cosine_mean": 0.98}, "cosine_mean is 0.98, expected at least 0.99"),
        ("int8", {"top1_agreement": 0.97}, "top1_agreement is 0.97, expected at least 0.98"),
        ("something new", {"cosine_mean": 0.98}, "cosine_mean"),
    ],
)
def test_a_number_beyond_its_limit_is_named(precision: str, changes: dict[str, Any], message: str) -> None:
    import re

    (failure,) = check_parity(numbers_with(**changes), ParityLimits.of(precision))
    assert re.search(message, str(failure))


@pytest.mark.parametrize(
    ("n", "different", "passes"),
    [
        (7, 5, True),
        (8, 1, True),
        (8, 2, False),
        (16, 1, True),
        (16, 2, False),
        (100, 2, True),
        (100, 3, False),
    ],
)
def test_ranks_of_few_pictures_are_judged_coarsely(n: int, different: int, passes: bool) -> None:
    numbers = numbers_with(n=n, top1_agreement=(n - different) / n)
    assert (check_parity(numbers, ParityLimits.of("int8")) == ()) is passes


def test_shapes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(InputError, match=r"got shapes \(3, 32\) and \(2, 32\), expected \(n, E\) twice"):
        compare_embeddings(unit_rows(3), unit_rows(2))
    with pytest.raises(InputError, match="twice"):
        compare_embeddings(unit_rows(3)[:0], unit_rows(3)[:0])
    with pytest.raises(InputError, match=r"bank: got shape \(4, 8\), expected \(N, 32\)"):
        compare_embeddings(unit_rows(3), unit_rows(3), bank=unit_rows(4, 8))


# --- golden


def test_every_variant_of_a_good_bundle_passes(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    for variant in bundle.manifest.variants:
        report = golden_check(bundle, variant)
        assert report.passed
        assert set(report.towers) == {"image", "text"}
        assert report.towers["image"].bank == "colours"
        assert report.towers["image"].numbers.n == 16


def test_a_limit_takes_the_first_inputs(tiny_bundle_session: Path) -> None:
    report = golden_check(Bundle.open(tiny_bundle_session), "onnx-int8", limit=5)
    assert report.towers["image"].numbers.n == 5


def test_another_model_in_the_place_of_a_variant_fails(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = put_wrong_model(tiny_bundle, tmp_path, "onnx-fp32")
    report = golden_check(bundle, "onnx-fp32")
    assert not report.passed
    assert not report.towers["image"].passed
    assert report.towers["text"].passed
    assert {failure.number for failure in report.towers["image"].failures} == {"max_abs", "cosine_min"}


def test_a_fixed_batch_is_filled_up(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    variant = bundle.variant("onnx-fp32")
    sizes: list[int] = []

    class FixedBatch(FakeSession):
        def run(self, feeds: Any) -> Any:
            sizes.append(len(feeds["image"]))
            with open_session(variant.tower("image")) as session:
                return session.run(feeds)

    session = FixedBatch()
    spec = replace(session.inputs["image"], shape=(5, 32, 32, 3))
    session._inputs = {"image": spec}
    result = check_tower(bundle, Golden.of(bundle), variant, "image", session, limit=12)
    assert result.passed
    assert sizes == [5, 5, 5]


def rewrite_golden(path: Path, change: Any) -> Bundle:
    with BundleWriter(path) as writer:
        tensors, metadata = read_tensors((path / writer.manifest["golden"]).read_bytes())
        tensors = dict(tensors)
        change(tensors, metadata)
        writer.manifest["golden"] = writer.add("golden.safetensors", write_tensors(tensors, metadata))
        return writer.commit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("images"), r"golden file '.*' *: it has no tensor 'images'"),
        (
            lambda t, m: t.update(images=t["images"][:, :30]),
            r"'images' is uint8 \(16, 30, 32, 3\), expected uint8",
        ),
        (
            lambda t, m: t.update(image_embedding=t["image_embedding"][:3]),
            r"'image_embedding' is float32 \(3, 16\)",
        ),
        (lambda t, m: t.update(tokens=t["tokens"].astype(np.int64)), r"'tokens' is int64"),
        (lambda t, m: t.pop("text_embedding"), r"no tensor 'text_embedding'"),
        (lambda t, m: t.update(images=t["images"][:0]), r"'images' is uint8 \(0, 32, 32, 3\)"),
    ],
)
def test_a_malformed_golden_file_is_named(tiny_bundle: Path, change: Any, message: str) -> None:
    bundle = rewrite_golden(tiny_bundle, change)
    with pytest.raises(BundleError, match=message):
        golden_check(bundle, "onnx-fp32")


def test_a_golden_file_without_text_or_bank_checks_the_rest(tiny_bundle: Path) -> None:
    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        del tensors["tokens"], tensors["text_embedding"]
        metadata["bank"] = "gone"

    report = golden_check(rewrite_golden(tiny_bundle, change), "onnx-int8")
    assert set(report.towers) == {"image"}
    assert report.towers["image"].numbers.top1_agreement is None


def test_a_bundle_without_golden_file_says_so(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        writer.manifest["golden"] = None
        bundle = writer.commit()
    with pytest.raises(BundleError, match="it has no golden file"):
        golden_check(bundle, "onnx-fp32")


def test_alike_golden_pictures_are_refused(tiny_bundle: Path) -> None:
    def change(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        for name in ("images", "image_embedding"):
            tensors[name] = np.repeat(tensors[name][:1], 16, axis=0)

    report = golden_check(rewrite_golden(tiny_bundle, change), "onnx-fp32")
    assert [failure.number for failure in report.towers["image"].failures] == ["reference_similarity"]
