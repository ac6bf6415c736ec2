from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.paired import Paired, clustered_mean, paired


@settings(deadline=None, max_examples=60)  # the first call imports
@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_equals_the_binomial_test_of_scipy(lost: int, gained: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    found = Paired(10, lost, gained, 5).p_value
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert found == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_more_changes_than_a_double_holds() -> None:
    assert Paired(0, 2000, 2000, 0).p_value == 1.0
    assert 0 < Paired(0, 1900, 2100, 0).p_value < 0.01


def test_changes_are_counted() -> None:
    found = paired([True, True, True, False, False, True], [True, False, False, True, False, True])
    assert found == Paired(2, 2, 1, 1)
    assert found.n == 6
    assert found.net_loss == pytest.approx(1 / 6)
    assert found.to_dict()["mcnemar_p"] == 1.0


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_outcomes_that_do_not_pair(first: list[bool], second: list[bool]) -> None:
    with pytest.raises(InputError, match=rf"got shapes \({len(first)},\) and \({len(second)},\)"):
        paired(first, second)


def test_clusters_of_one_give_the_ordinary_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=60)
    found = clustered_mean(values, list(range(60)))
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)


def test_copies_of_a_value_add_no_certainty() -> None:
    values = np.random.default_rng(0).random(40)
    once = clustered_mean(values, list(range(40)))
    copied = clustered_mean(np.repeat(values, 25), np.repeat(np.arange(40), 25))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert copied.n == 1000
    assert copied.clusters == 40


def test_the_interval_covers_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    clusters = np.repeat(np.arange(40), 10)
    covered = 0
    for _ in range(200):
        level = random.beta(9, 1, 40)  # how often each photograph agrees; 0.9 on average
        hits = random.random(400) < level[clusters]
        found = clustered_mean(hits, clusters, draws=400)
        covered += found.low <= 0.9 <= found.high
    assert 0.88 <= covered / 200 <= 0.99  # 0.95 but for 40 clusters of a skew distribution


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([1.0, 2.0], ["a"], "in 1 clusters"),
        ([1.0, 2.0], ["a", "a"], "got 1 clusters"),
        ([1.0, float("nan")], ["a", "b"], "value 1 is not finite"),
    ],
)
def test_means_that_cannot_be_had(values: list[float], clusters: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        clustered_mean(values, clusters)


def test_confidence_is_between_0_and_1() -> None:
    with pytest.raises(ConfigError, match=r"1\.5"):
        clustered_mean([0.0, 1.0], ["a", "b"], confidence=1.5)
