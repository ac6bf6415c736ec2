"""Percentiles and their intervals, against simulation and against numbers nobody here computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgeclip.errors import ConfigError
from edgeclip.runtime.statistics import (
    bootstrap_medians,
    nearest_rank,
    order_interval,
    percentile,
)


def test_a_percentile_is_the_nearest_rank() -> None:
    samples = np.random.default_rng(0).permutation(np.arange(1.0, 1001.0))
    found = percentile(samples, 99)
    assert found is not None
    assert (found.p, found.ms) == (99, 990.0)
    assert percentile(samples, 50).ms == 500.0  # type: ignore[union-attr]


@given(st.integers(1, 400), st.floats(1, 99.9))
@settings(max_examples=60, deadline=None)
def test_the_nearest_rank_agrees_with_numpy(n: int, p: float) -> None:
    samples = np.sort(np.random.default_rng(n).normal(size=n))
    assert nearest_rank(samples, p) == np.percentile(samples, p, method="inverted_cdf")


@pytest.mark.parametrize(
    ("n", "p", "carried"),
    [(19, 50, False), (20, 50, True), (99, 90, False), (100, 90, True), (999, 99, False), (1000, 99, True)],
)
def test_a_percentile_needs_ten_samples_above_it(n: int, p: float, carried: bool) -> None:
    assert (percentile(np.arange(n, dtype=float), p) is not None) is carried


def test_a_low_percentile_needs_ten_samples_below_it() -> None:
    assert percentile(np.arange(100.0), 5) is None
    assert percentile(np.arange(300.0), 5) is not None


@pytest.mark.parametrize("n", [6, 20, 101, 1000, 5000])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_the_ranks_of_an_interval_are_the_tightest_that_cover(n: int, q: float) -> None:
    low, high = order_interval(n, q, 0.95)
    count = stats.binom(n, q)
    if low > 1:
        assert count.cdf(low - 1) <= 0.025
    assert count.cdf(low) > 0.025
    if high < n:
        assert count.sf(high - 1) <= 0.025
        assert count.sf(high - 2) > 0.025


@pytest.mark.parametrize("p", [50, 90])
@pytest.mark.parametrize("shape", ["lognormal", "two humps", "rounded"])
def test_intervals_cover_as_often_as_they_say(p: float, shape: str) -> None:
    rng = np.random.default_rng(7)
    draw = {
        "lognormal": lambda size: rng.lognormal(0, 0.8, size),
        "two humps": lambda size: np.where(rng.random(size) < 0.3, 20, 10) + rng.normal(0, 0.1, size),
        "rounded": lambda size: np.round(rng.exponential(5, size), 1),
    }[shape]
    true = np.percentile(draw(400_000), p)
    trials = 400
    found = [percentile(draw(200), p) for _ in range(trials)]
    covered = np.mean([one is not None and one.low_ms <= true <= one.high_ms for one in found])
    # The interval is conservative; three standard errors of a share of 0.95 over 400 trials are 0.033.
    assert covered >= 0.95 - 0.033


def test_a_higher_confidence_is_a_wider_interval() -> None:
    samples = np.random.default_rng(0).normal(size=300)
    narrow, wide = percentile(samples, 50, confidence=0.8), percentile(samples, 50, confidence=0.99)
    assert narrow is not None
    assert wide is not None
    assert wide.low_ms < narrow.low_ms < narrow.high_ms < wide.high_ms


def test_bootstrapped_medians_are_those_of_resamples() -> None:
    rng = np.random.default_rng(3)
    samples = rng.lognormal(0, 1, 101)
    quick = bootstrap_medians(samples, rng, draws=20_000)
    slow = np.median(rng.choice(samples, (20_000, 101)), axis=1)
    points = [0.025, 0.25, 0.5, 0.75, 0.975]
    # Neighbouring order statistics around the median of 101 samples differ by about this much.
    np.testing.assert_allclose(np.quantile(quick, points), np.quantile(slow, points), rtol=0.03)


@pytest.mark.parametrize("p", [0, 100, -1, float("nan")])
def test_percentiles_outside_the_range_are_an_error(p: float) -> None:
    with pytest.raises(ConfigError, match=r"p: got .*, expected a number between 0 and 100"):
        percentile([1.0] * 50, p)


def test_no_samples_have_no_median() -> None:
    with pytest.raises(ConfigError, match="got no samples"):
        nearest_rank(np.array([]), 50)
