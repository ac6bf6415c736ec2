from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.metrics import (
    Confusion,
    Share,
    auroc,
    bootstrap_interval,
    confusions,
    expected_calibration_error,
    false_positive_rate,
    mean_per_class_recall,
    median_similarity,
    per_class_recall,
    recall_at_k,
    share,
    top_k,
    top_k_accuracy,
    unit_rows,
    wilson_interval,
)
from edgeclip.heads import TemperatureHead, rank
from edgeclip.runtime.parity import compare_embeddings

# --- intervals ---------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first call imports
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_interval_equals_scipy(trials: tuple[int, int], confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    successes, n = trials
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(successes, n, confidence=confidence)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_interval_covers_as_often_as_it_says() -> None:
    stats = pytest.importorskip("scipy.stats")
    n, p = 200, 0.83
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    chances = stats.binom.pmf(range(n + 1), n, p)
    covered = sum(chance for (low, high), chance in zip(intervals, chances, strict=True) if low <= p <= high)
    assert covered == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_a_share_of_impossible_counts_is_an_error(successes: int, n: int) -> None:
    with pytest.raises(InputError, match=f"got {successes} of {n}, expected 0 to n"):
        wilson_interval(successes, n)


def test_share_counts_hits() -> None:
    low, high = wilson_interval(3, 4, confidence=0.9)
    assert share([True, True, False, True], confidence=0.9) == Share(0.75, low, high, 4, 0.9)
    with pytest.raises(InputError, match=r"hits: got shape \(0,\), expected one dimension with at least one"):
        share([])
    with pytest.raises(ConfigError, match=r"confidence: got 1\.5"):
        share([True], confidence=1.5)


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values, draws=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values, draws=100) == bootstrap_interval(values, draws=100)
    assert bootstrap_interval(values, draws=100) != bootstrap_interval(values, draws=100, seed=1)


def test_bootstrap_interval_takes_rows_whole() -> None:
    rows = np.stack([np.arange(50.0), np.arange(50.0)], axis=1)
    low, high = bootstrap_interval(rows, lambda drawn: float((drawn[:, 0] - drawn[:, 1]).sum()), draws=50)
    assert (low, high) == (0.0, 0.0)
    with pytest.raises(InputError, match="bootstrap: got no values"):
        bootstrap_interval([])


# --- classification ----------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_top_k_agrees_with_the_head_of_the_classifier(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    # few distinct values, so that there are ties
    images, texts = (random.integers(-1, 2, (n, 3)).astype(np.float32) for n in (4, 6))
    expected = [[row for _, row, _ in best] for best in rank(images, texts, TemperatureHead(1.0), top_k=k)]
    assert top_k(images @ texts.T, k).tolist() == expected


def test_top_k_accuracy_by_hand() -> None:
    scores = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.4, 0.2]]
    targets = [1, 2, 1, 1]
    assert [top_k_accuracy(scores, targets, k=k) for k in (1, 2, 3, 9)] == [0.25, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("scores", "targets", "words"),
    [
        ([[0.1, np.nan]], [0], "scores: row 0 is not finite"),
        ([0.1, 0.2], [0], r"scores: got shape \(2,\), expected two dimensions"),
        ([[0.1, 0.2]], [2], "targets: entry 0 is 2, expected 0 to 1"),
        ([[0.1, 0.2]], [0, 1], "targets: got 2 of type int64, expected 1 whole numbers"),
        ([[0.1, 0.2]], [0.5], "targets: got 1 of type float64"),
        ([[]], [0], "got k 1 of 0 labels"),
    ],
)
def test_what_cannot_be_ranked_is_an_error(scores: object, targets: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        top_k_accuracy(scores, targets)  # type: ignore[arg-type]


def test_mean_per_class_recall_counts_classes_and_not_rows() -> None:
    hits, targets = [True, True, True, True, False, True], [0, 0, 0, 0, 2, 2]
    np.testing.assert_array_equal(per_class_recall(hits, targets, classes=4), [1.0, np.nan, 0.5, np.nan])
    assert mean_per_class_recall(hits, targets, classes=4) == 0.75


def test_confusions_are_counted_and_ordered() -> None:
    targets = [0, 0, 0, 1, 1, 2, 2]
    predicted = [1, 1, 0, 2, 0, 2, 1]
    assert confusions(predicted, targets, most=3) == [
        Confusion(0, 1, 2, 3),
        Confusion(1, 0, 1, 2),
        Confusion(1, 2, 1, 2),
    ]
    with pytest.raises(InputError, match="got 1 predictions for 2 targets"):
        confusions([1], [0, 1])


def test_calibration_error_by_hand() -> None:
    # bins of width 0.25: (0.5, 0.75] holds 0.6 and 0.75, (0.75, 1] holds 0.9
    confidences, correct = [0.6, 0.75, 0.9], [True, False, True]
    expected = (abs(1.35 - 1) + abs(0.9 - 1)) / 3
    assert expected_calibration_error(confidences, correct, bins=4) == pytest.approx(expected)


def test_calibration_error_of_a_calibrated_and_of_a_boastful_model() -> None:
    random = np.random.default_rng(0)
    confidences = random.uniform(0, 1, 100_000)
    assert expected_calibration_error(confidences, random.uniform(0, 1, 100_000) < confidences) < 0.01
    assert expected_calibration_error(np.ones(10), np.arange(10) < 3) == pytest.approx(0.7)


@pytest.mark.parametrize("edge", range(16))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(edge: int) -> None:
    confidence = edge / 15
    # with one more just below, of the opposite outcome: in one bin they cancel
    below = max(confidence - 1e-3, 0.0)
    error = expected_calibration_error([confidence, below], [True, False])
    assert error == pytest.approx(abs(confidence + below - 1) / 2)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, np.nan])
def test_a_confidence_out_of_range_is_an_error(wrong: float) -> None:
    with pytest.raises(InputError, match=f"confidence 1 is {wrong}, expected 0 to 1"):
        expected_calibration_error([0.5, wrong], [True, True])


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_how_often_a_positive_outscores_a_negative(rows: list[tuple[int, bool]]) -> None:
    positives = [score for score, positive in rows if positive]
    negatives = [score for score, positive in rows if not positive]
    scores, positive = [score for score, _ in rows], [positive for _, positive in rows]
    if not positives or not negatives:
        with pytest.raises(
            InputError, match=f"got {len(positives)} positives and {len(negatives)} negatives"
        ):
            auroc(scores, positive)
        return
    pairs = list(itertools.product(positives, negatives))
    expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert auroc(scores, positive) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [4, 10_000])  # with ties and without
def test_auroc_and_false_positive_rate_are_scikit_learn_s(seed: int, levels: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    positive = random.random(300) < 0.4
    scores = np.round((random.normal(size=300) + positive) * levels / 10)
    assert auroc(scores, positive) == pytest.approx(sklearn.roc_auc_score(positive, scores))
    rates, recalls, _ = sklearn.roc_curve(positive, scores, drop_intermediate=False)
    for recall in (0.5, 0.9, 0.95):
        expected = rates[np.argmax(recalls >= recall)]
        assert false_positive_rate(scores, positive, recall=recall) == pytest.approx(expected)


def test_false_positive_rate_of_a_perfect_and_a_blind_score() -> None:
    positive = np.arange(40) < 20
    assert false_positive_rate(positive.astype(float), positive) == 0.0
    assert false_positive_rate(np.ones(40), positive) == 1.0
    # 19 of 20 are enough: the worst positive may be anywhere
    assert false_positive_rate([*range(21, 40), -1, *range(20)], positive) == 0.0
    with pytest.raises(InputError, match="0 negatives"):
        false_positive_rate([1.0, 2.0], [True, True])
    with pytest.raises(ConfigError, match="recall"):
        false_positive_rate([1.0, 2.0], [True, False], recall=1.5)


def test_auroc_equals_mann_whitney() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    scores, positive = random.normal(size=500), random.uniform(size=500) < 0.3
    expected = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic / (
        positive.sum() * (~positive).sum()
    )
    assert auroc(scores, positive) == pytest.approx(expected)


# --- embeddings --------------------------------------------------------------------------------------------


def test_recall_at_k_by_hand() -> None:
    similarity = [[0.9, 0.8, 0.1], [0.2, 0.3, 0.4]]
    relevant = [[False, True, True], [True, False, False]]
    assert [recall_at_k(similarity, relevant, k=k) for k in (1, 2, 3)] == [0.0, 0.5, 1.0]
    with pytest.raises(InputError, match="query 1 has nothing relevant"):
        recall_at_k(similarity, [[True, False, False], [False, False, False]])
    with pytest.raises(InputError, match=r"'relevant' has shape \(1, 3\), expected \(2, 3\)"):
        recall_at_k(similarity, [[True, False, False]])


def test_recall_at_k_of_one_relevant_each_is_top_k_accuracy() -> None:
    random = np.random.default_rng(0)
    similarity, targets = random.normal(size=(40, 20)), random.integers(0, 20, 40)
    for k in (1, 5):
        relevant = targets[:, None] == np.arange(20)
        assert recall_at_k(similarity, relevant, k=k) == top_k_accuracy(similarity, targets, k=k)


def test_median_similarity_is_the_one_parity_reports() -> None:
    rows = np.random.default_rng(0).normal(0.5, 1.0, (60, 8)).astype(np.float32)
    assert median_similarity(rows) == pytest.approx(
        compare_embeddings(rows, rows).reference_similarity, abs=1e-6
    )
    assert median_similarity(np.ones((3, 5))) == pytest.approx(1.0)
    assert median_similarity(np.eye(40)) == 0.0


def test_median_similarity_looks_at_all_parts_of_a_long_set() -> None:
    alike = np.tile([1.0, 0.0], (5000, 1))
    assert median_similarity(np.concatenate([alike, np.tile([0.0, 1.0], (9000, 1))])) in (0.0, 1.0)
    spread = np.concatenate([alike, np.random.default_rng(0).normal(size=(20_000, 2))])
    assert median_similarity(spread) < 0.3


def test_a_row_without_direction_is_an_error() -> None:
    with pytest.raises(InputError, match="pictures: row 1 is zero"):
        unit_rows("pictures", [[1.0, 2.0], [0.0, 0.0]])
    with pytest.raises(InputError, match="embeddings: row 0 is not finite"):
        median_similarity([[np.inf, 1.0], [1.0, 1.0]])
    with pytest.raises(InputError, match="got 1 rows, expected at least two"):
        median_similarity([[1.0, 2.0]])


def test_unit_rows_keep_double_precision() -> None:
    assert unit_rows("x", np.ones((1, 3))).dtype == np.float64
    assert unit_rows("x", np.ones((1, 3), np.float16)).dtype == np.float32
