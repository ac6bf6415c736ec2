"""Heads: the softmax at a temperature, ranking, and the scale that comes with a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BundleError
from edgeclip.heads import TemperatureHead, cosines, rank, temperature_head
from edgeclip.tensors import write_tensors


def _unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    array = rng.standard_normal((rows, width)).astype(np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_scores_equal_torch_softmax() -> None:
    torch = pytest.importorskip("torch")
    similarity = np.random.default_rng(0).uniform(-1, 1, (5, 40)).astype(np.float32)
    best_first = (-np.sort(-similarity, axis=1)).tolist()
    ours = [TemperatureHead(37.5)(row, best) for row, best in zip(similarity, best_first, strict=True)]
    theirs = torch.softmax(37.5 * torch.tensor(best_first), dim=-1).numpy()
    # logits reach 75, whose float32 spacing of 8e-6 becomes the relative error of exp()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_scores_are_finite_at_the_ends(scale: float) -> None:
    similarity = np.array([[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]], np.float32)
    scores = [TemperatureHead(scale)(row, row.tolist()) for row in similarity]
    assert [sum(row) for row in scores] == pytest.approx([1, 1], rel=1e-6)
    assert scores[0][0] == scores[0][1] > scores[0][2]
    assert similarity.tolist() == [[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]]


@settings(deadline=None)
@given(st.floats(-1, 1, width=32), st.floats(0.01, 100))
def test_the_score_of_a_single_label_is_one_and_no_more(similarity: float, scale: float) -> None:
    (score,) = TemperatureHead(scale)(np.array([similarity], np.float32), [similarity])
    assert 1 - 1e-15 <= score <= 1


@pytest.mark.parametrize("scale", [0.0, -1.0, 100.5, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(BundleError, match=f"scale is {scale!r}"):
        TemperatureHead(scale)


def test_what_is_no_cosine_has_no_score() -> None:
    row = np.array([50.0, 1.0], np.float32)
    assert np.isnan(TemperatureHead(100.0)(row, row.tolist())).all()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 60) | st.integers(250, 300), st.integers(1, 70), st.integers(0, 2**31)
)
def test_ranking_equals_a_full_sort(pictures: int, labels: int, top_k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    embeddings, bank = _unit(rng, pictures, 8), _unit(rng, labels, 8)
    ranking = rank(embeddings, bank, TemperatureHead(20.0), top_k=top_k)
    similarity = cosines(embeddings, bank)
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :top_k]
    assert [[row for _, row, _ in best] for best in ranking] == expected.tolist()
    taken = np.take_along_axis(similarity, expected, axis=1)
    assert [[cosine for cosine, _, _ in best] for best in ranking] == taken.tolist()


def test_cosines_equal_a_matrix_product_whatever_the_batch() -> None:
    rng = np.random.default_rng(0)
    embeddings, bank = _unit(rng, 5, 512), _unit(rng, 300, 512)
    together = cosines(embeddings, bank)
    np.testing.assert_allclose(together, embeddings.astype(np.float64) @ bank.T.astype(np.float64), atol=3e-7)
    assert all(
        cosines(row[None], bank)[0].tolist() == whole.tolist()
        for row, whole in zip(embeddings, together, strict=True)
    )


def test_equal_similarities_keep_the_order_of_the_bank() -> None:
    bank = np.tile(np.eye(1, 4, dtype=np.float32), (3, 1))
    (best,) = rank(bank[:1], bank, TemperatureHead(1.0), top_k=5)
    assert [row for _, row, _ in best] == [0, 1, 2]


def test_scores_are_over_all_labels_not_the_ones_returned() -> None:
    bank = np.tile(np.eye(1, 4, dtype=np.float32), (10, 1))
    (best,) = rank(bank[:1], bank, TemperatureHead(5.0), top_k=2)
    assert [score for _, _, score in best] == pytest.approx([0.1, 0.1])


def test_a_fitted_head_counts_for_its_bank_alone(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        file = writer.add("heads/fitted.safetensors", write_tensors({"scale": np.array([7.5], np.float32)}))
        writer.manifest["heads"]["temperature"]["file"] = file
        bundle = writer.commit()
    assert temperature_head(bundle, "colours").scale == 7.5
    assert temperature_head(bundle, None).scale == bundle.manifest.model.scale == 20.0


def test_a_head_file_without_a_scale_is_named(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        file = writer.add("heads/odd.safetensors", write_tensors({"weight": np.zeros(3, np.float32)}))
        writer.manifest["heads"]["temperature"]["file"] = file
        writer.commit()
    with pytest.raises(BundleError, match=r"head 'temperature'.*'scale'.*weight"):
        temperature_head(Bundle.open(tiny_bundle), "colours")
