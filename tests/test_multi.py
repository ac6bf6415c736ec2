"""Several labels a picture: standardised scores, the threshold with the best F1, what it is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.classify import Answers, ZeroShotClassifier
from edgeclip.errors import BundleError, ConfigError, InputError
from edgeclip.multi import fit_multi, multi_gate, standardized
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.tensors import write_tensors


def _made(pictures: int, labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines in which one to three right labels stand out, and a level of each picture's own."""
    random = np.random.default_rng(seed)
    right = np.zeros((pictures, labels), bool)
    for row in right:
        row[random.choice(labels, random.integers(1, 4), replace=False)] = True
    noise = 0.05 * random.standard_normal((pictures, labels))
    return noise + 0.15 * right + random.uniform(-0.3, 0.6, (pictures, 1)), right


def test_scores_do_not_depend_on_a_picture_level_or_spread() -> None:
    cosines = np.random.default_rng(0).uniform(-1, 1, (5, 9))
    scores = standardized(cosines)
    np.testing.assert_allclose(standardized(0.3 * cosines + 0.2), scores, atol=1e-12)
    np.testing.assert_allclose(scores.mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(scores.std(axis=1), 1, atol=1e-12)
    assert standardized(np.full((1, 4), 0.5)).tolist() == [[0.0] * 4]


@settings(max_examples=40, deadline=None)
@given(st.integers(50, 70), st.integers(4, 8), st.integers(0, 2**31))
def test_the_threshold_is_the_best_there_is(pictures: int, labels: int, seed: int) -> None:
    cosines, right = _made(pictures, labels, seed)
    fit = fit_multi(cosines, right)
    scores = standardized(cosines)

    def f1(threshold: float) -> float:
        given_ = scores >= threshold
        return 2 * (given_ & right).sum() / (given_.sum() + right.sum())

    assert f1(fit.threshold) == pytest.approx(max(map(f1, scores.ravel())))


def test_what_it_is_worth_is_measured_on_held_out_pictures() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    cosines, right = _made(400, 12)
    fit = fit_multi(cosines, right, seed=3)
    assert fit.improves
    assert fit.f1["low"] < fit.f1["value"] < fit.f1["high"]
    first = np.zeros_like(right)
    first[np.arange(400), cosines.argmax(axis=1)] = True
    assert fit.first_alone["value"] == pytest.approx(sklearn.f1_score(right, first, average="micro"))
    # The held-out figure differs from the one on the fitting pictures, and hardly, for one number is fitted.
    given_ = standardized(cosines) >= fit.threshold
    assert fit.f1["value"] == pytest.approx(sklearn.f1_score(right, given_, average="micro"), abs=0.02)
    assert min(fit.fold_thresholds) <= fit.threshold <= max(fit.fold_thresholds)
    assert fit_multi(cosines, right, seed=3) == fit


def test_noise_is_no_improvement() -> None:
    random = np.random.default_rng(1)
    right = np.eye(8, dtype=bool)[random.integers(8, size=200)]
    right[0, :2] = True
    cosines = 0.3 * right + 0.01 * random.standard_normal(right.shape)
    fit = fit_multi(cosines, right)  # one right label a picture, and always the first: nothing to gain
    assert not fit.improves


@pytest.mark.parametrize(
    ("pictures", "labels", "said"),
    [(40, 8, "got 40 pictures and 8 labels"), (60, 3, "60 pictures and 3 labels")],
)
def test_too_little_is_refused(pictures: int, labels: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit_multi(*_made(pictures, labels))


def test_errors() -> None:
    cosines, right = _made(60, 6)
    with pytest.raises(InputError, match="truth int64"):
        fit_multi(cosines, right.astype(np.int64))
    with pytest.raises(InputError, match="no picture has two right labels"):
        fit_multi(cosines, np.eye(6, dtype=bool)[np.arange(60) % 6])
    with pytest.raises(InputError, match="not all finite"):
        fit_multi(np.where(cosines > 0.5, np.nan, cosines), right)
    with pytest.raises(ConfigError, match="got 61, expected 2 to 60"):
        fit_multi(cosines, right, folds=61)


def _with_head(path: Path, tensors: dict[str, np.ndarray], method: str = "standardized") -> Bundle:
    with BundleWriter(path) as writer:
        file = writer.add("heads/m.safetensors", write_tensors(tensors, {"method": method}))
        writer.manifest["heads"]["multi-colours"] = {"kind": "reject", "file": file, "bank": "colours"}
        return writer.commit()


def test_a_bank_with_a_threshold_gives_several_labels(tiny_bundle: Path) -> None:
    bundle = _with_head(tiny_bundle, {"threshold": np.array([0.8], np.float32)})
    with ZeroShotClassifier.open(
        bundle, options=RuntimeOptions(threads=1), answers=Answers(multi=True)
    ) as classifier:
        classifier.set_bundle_labels()
        assert classifier.score_kind == "standardized"
        pictures = np.random.default_rng(0).integers(0, 256, (20, 30, 30, 3), np.uint8)
        embeddings = classifier.embed_images(pictures)
        scores = standardized(embeddings @ classifier.bank.embeddings.T)
        for said, row in zip(classifier.answer(embeddings, top_k=99), scores, strict=True):
            expected = {classifier.labels[each] for each in np.flatnonzero(row >= 0.8)}
            assert {each.label for each in said.predictions} == expected
        assert len({len(each.predictions) for each in classifier.answer(embeddings, top_k=99)}) > 1
        with pytest.raises(ConfigError):
            classifier.set_labels(["red", "blue"])  # the threshold is of the bank
    with ZeroShotClassifier.open(bundle, answers=Answers(multi=True, threshold=9.0)) as classifier:
        assert classifier.classify(pictures[0]) == []


def test_a_damaged_threshold_is_named(tiny_bundle: Path) -> None:
    bundle = _with_head(tiny_bundle, {"scale": np.array([0.8], np.float32)})
    with pytest.raises(BundleError, match="expected one float tensor 'threshold'"):
        multi_gate(bundle, "colours")
    bundle = _with_head(tiny_bundle, {"threshold": np.array([np.nan], np.float32)})
    with pytest.raises(BundleError, match="threshold is nan"):
        multi_gate(bundle, "colours")
    assert multi_gate(bundle, None) is None
    assert multi_gate(_with_head(tiny_bundle, {}, "negatives"), "colours") is None
