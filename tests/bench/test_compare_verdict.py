"""Verdicts on simulated samples whose truth is known: false alarms, detection, drift, spikes, stolen time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.bench import verdict
from edgeclip.bench.verdict import Interval, Launch, conclude, interval, judge, judge_launches
from edgeclip.errors import ConfigError

EFFECT = 0.05


class Machine:
    """A machine with noise that lasts, and with luck that each launch has of its own.

    Args:
        seed: of everything.
        ratio: true time of b over a.
        luck: standard deviation, over launches, of what keeps one side slower as long as a process runs.
        noise: standard deviation of a call.
        lasting: how much of the noise of one call is left in the next.
    """

    def __init__(
        self, seed: int, ratio: float = 1.0, luck: float = 0.01, noise: float = 0.05, lasting: float = 0.9
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.ratio, self.luck, self.noise, self.lasting = ratio, luck, noise, lasting

    def launch(self, blocks: int = 12, units: int = 3) -> Launch:
        calls = blocks * 4 * units
        shocks = self.rng.normal(0, self.noise * np.sqrt(1 - self.lasting**2), calls)
        logs = np.empty(calls)
        level = self.rng.normal(0, self.noise)
        for call in range(calls):
            level = logs[call] = self.lasting * level + shocks[call]
        turns = (8 * np.exp(logs)).reshape(blocks, 4, units)
        swapped = self.rng.random(blocks) < 0.5
        outer, inner = turns[:, [0, 3]], turns[:, [1, 2]]
        a = np.where(swapped[:, None, None], inner, outer)
        b = np.where(swapped[:, None, None], outer, inner)
        return Launch(a, b * self.ratio * np.exp(self.rng.normal(0, self.luck)), 0.0)

    def launches(self, count: int = 20) -> list[Launch]:
        return [self.launch() for _ in range(count)]


def ended(launches: Sequence[Launch], seed: int) -> str:
    for done in range(1, len(launches) + 1):
        found = conclude(launches[:done], len(launches), effect=EFFECT, seed=seed)
        if found is not None:
            return found.verdict
    raise AssertionError


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "_DRAWS", 1000)


# --- truth is known


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("count", [9, 10, 20])
def test_what_the_first_to_open_has_of_it_cancels_where_orders_are_balanced(count: int) -> None:
    """Two equal sides, and 4 % for whoever is opened first: the interval keeps its promise, in the middle."""
    trials = 150
    rng = np.random.default_rng(count)
    missed, errors = {"balanced": 0, "free": 0}, {"balanced": 0.0, "free": 0.0}
    for seed in range(trials):
        pairs = rng.permuted(np.tile([-1.0, 1.0], (10, 1)), axis=1).reshape(-1)[:count]
        luck = rng.normal(0, 0.01, count)
        for name, signs in (("balanced", pairs), ("free", rng.choice([-1.0, 1.0], count))):
            found = interval(luck + 0.04 * signs, 0.98, seed=seed)
            missed[name] += not found.low <= 1 <= found.high
            errors[name] += np.log(found.ratio) ** 2
    assert missed["balanced"] <= 0.02 * trials
    assert errors["balanced"] < 0.5 * errors["free"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("luck", [0.01, 0.04])
def test_false_alarms_are_as_rare_as_promised(luck: float) -> None:
    trials = 200
    said = [ended(Machine(seed, luck=luck).launches(), seed) for seed in range(trials)]
    alarms = trials - said.count("same") - said.count("inconclusive")
    # Two percent of 200 and three standard deviations above.
    assert alarms <= 10, said


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
def test_a_slow_down_of_the_stated_effect_is_found() -> None:
    trials = 120
    said = [ended(Machine(seed, ratio=1 + EFFECT).launches(), seed) for seed in range(trials)]
    assert said.count("slower") >= 0.9 * trials
    assert "faster" not in said


def test_the_same_slow_down_with_the_sides_swapped_is_a_speed_up() -> None:
    launches = Machine(1, ratio=1.1).launches()
    swapped = [Launch(each.b_ms, each.a_ms) for each in launches]
    slower, faster = (judge_launches(each, effect=EFFECT) for each in (launches, swapped))
    assert (slower.verdict, faster.verdict) == ("slower", "faster")
    assert slower.interval.ratio * faster.interval.ratio == pytest.approx(1)
    assert slower.interval.low * faster.interval.high == pytest.approx(1)


def test_more_calls_in_too_few_launches_do_not_look_like_knowledge() -> None:
    """What differs between launches is not made smaller by measuring each for longer."""
    short = [Machine(seed, luck=0.05).launch(blocks=10) for seed in range(8)]
    long = [Machine(seed, luck=0.05).launch(blocks=200) for seed in range(8)]
    widths = [
        np.log(found.high / found.low)
        for found in (judge_launches(each, effect=EFFECT).interval for each in (short, long))
    ]
    assert widths[1] > 0.5 * widths[0]
    assert judge_launches(long, effect=EFFECT).verdict == "inconclusive"


def test_a_drift_of_the_machine_changes_nothing_but_is_told() -> None:
    launches = Machine(2).launches()
    warm = [
        Launch(each.a_ms * slower, each.b_ms * slower)
        for each, slower in zip(launches, np.linspace(1, 1.2, len(launches)), strict=True)
    ]
    found, drifted = (judge_launches(each, effect=EFFECT) for each in (launches, warm))
    assert drifted.verdict == found.verdict == "same"
    assert drifted.interval.ratio == pytest.approx(found.interval.ratio)
    assert drifted.drift == pytest.approx(1.17 / 1.03 - 1, abs=0.04)


@pytest.mark.parametrize("hit", [0.02, 0.05])
def test_spikes_do_not_decide(hit: float) -> None:
    rng = np.random.default_rng(3)

    def struck(times_ms: NDArray[np.float64]) -> NDArray[np.float64]:
        return times_ms * np.where(rng.random(times_ms.shape) < hit, 10.0, 1.0)

    launches = [Launch(struck(each.a_ms), struck(each.b_ms)) for each in Machine(3).launches()]
    assert judge_launches(launches, effect=EFFECT).verdict == "same"


def test_a_few_launches_that_went_wrong_do_not_decide() -> None:
    launches = Machine(4).launches()
    for place in (3, 8, 15):
        launches[place] = Launch(launches[place].a_ms, launches[place].b_ms * 3)
    assert judge_launches(launches, effect=EFFECT).verdict == "same"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda each, _: Launch(each.a_ms, each.b_ms, 0.08), "hypervisor gave 8% of the time"),
        (lambda each, way: Launch(each.a_ms * way, each.b_ms * way), r"times changed by \+\d\d%"),
        (lambda each, way: Launch(each.a_ms / way, each.b_ms / way), r"times changed by -\d\d%"),
    ],
)
def test_a_disturbed_run_is_inconclusive_whatever_it_shows(
    change: Callable[[Launch, float], Launch], reason: str
) -> None:
    launches = Machine(5, ratio=1.5).launches()
    assert judge_launches(launches, effect=EFFECT).verdict == "slower"
    ways = np.linspace(1, 1.6, len(launches))
    disturbed = [change(each, way) for each, way in zip(launches, ways, strict=True)]
    found = judge_launches(disturbed, effect=EFFECT)
    assert found.verdict == "inconclusive"
    assert len(found.reasons) == 1
    assert re.search(reason, found.reasons[0]), found.reasons


# --- the verdict of an interval


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.97, 1.03, "same"),
        (1.01, 1.04, "same"),  # there is a difference, and it is smaller than what matters
        (1.001, 1.08, "slower"),
        (1.2, 1.3, "slower"),
        (0.9, 0.999, "faster"),
        (0.96, 0.99, "same"),
        (0.99, 1.06, "inconclusive"),
        (0.94, 1.01, "inconclusive"),
        (1 / 1.05, 1.04, "inconclusive"),
    ],
)
def test_a_verdict_follows_from_interval_and_effect(low: float, high: float, said: str) -> None:
    assert judge(Interval((low * high) ** 0.5, low, high, 0.98), EFFECT) == said


@pytest.mark.usefixtures("few_draws")
def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    for draw in (rng.standard_normal, lambda n: rng.standard_t(3, n)):
        trials = 250
        found = [interval(0.03 * draw(12), 0.9, seed=seed) for seed in range(trials)]
        covered = sum(each.low <= 1 <= each.high for each in found)
        # Three standard errors of a share of 0.9 over 250 trials are 0.057.
        assert covered / trials >= 0.9 - 0.057


def test_an_interval_is_that_of_the_trimmed_mean_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    logs = np.random.default_rng(7).standard_t(3, 13) / 50
    found = interval(logs, 0.98, seed=0)
    assert np.log(found.ratio) == pytest.approx(stats.trim_mean(logs, 0.2))
    assert found.low < found.ratio < found.high
    assert found.ratio / found.low == pytest.approx(found.high / found.ratio)


def test_launches_that_agree_to_the_last_digit_give_a_point() -> None:
    found = interval([0.02] * 10, 0.98, seed=0)
    assert found.low == found.ratio == found.high == pytest.approx(np.exp(0.02))


def test_too_few_launches_are_an_error() -> None:
    with pytest.raises(ConfigError, match="got 7 launches, expected at least 8"):
        interval([0.0] * 7, 0.98, seed=0)


# --- looks


def test_there_are_two_looks_whose_errors_add_up() -> None:
    undecided = Machine(8, ratio=1.03, luck=0.03).launches()
    found = {
        done: conclude(undecided[:done], 20, effect=0.001, confidence=0.98)
        for done in range(1, len(undecided))
    }
    assert set(found.values()) == {None}
    early = conclude(Machine(8, ratio=1.5).launches(10), 20, effect=EFFECT)
    last = conclude(undecided, 20, effect=0.001)
    assert early is not None
    assert last is not None
    assert early.verdict == "slower"
    assert (1 - early.interval.confidence) + (1 - last.interval.confidence) == pytest.approx(0.02)


def test_few_launches_are_looked_at_once() -> None:
    launches = Machine(9, ratio=1.5).launches(14)
    assert all(conclude(launches[:done], 14, effect=EFFECT) is None for done in range(14))
    found = conclude(launches, 14, effect=EFFECT)
    assert found is not None
    assert found.interval.confidence == pytest.approx(0.98)


def test_a_comparison_that_runs_out_of_time_ends_once_it_has_enough() -> None:
    launches = Machine(10, ratio=1.5).launches(9)
    assert conclude(launches[:7], 20, effect=EFFECT, out_of_time=True) is None
    found = conclude(launches, 20, effect=EFFECT, out_of_time=True)
    assert found is not None
    assert found.verdict == "slower"
