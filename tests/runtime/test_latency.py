"""The clock: spans from many threads, sampling rules, and ratios that come out right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgeclip.errors import ConfigError
from edgeclip.runtime import latency
from edgeclip.runtime.latency import (
    NO_CLOCK,
    LatencySamples,
    RatioInterval,
    StageClock,
    compare_interleaved,
    measure,
)


class Machine:
    """A clock that stands still but for what is asked of it: functions take exactly the time they draw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        monkeypatch.setattr(latency, "perf_counter_ns", lambda: self.now_ns)

    def taking(self, durations_ms: Callable[[], float]) -> Callable[[], None]:
        def fn() -> None:
            self.now_ns += round(durations_ms() * 1e6)

        return fn


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


# --- stages


def test_spans_are_summed_by_stage_in_the_order_of_a_call(machine: Machine) -> None:
    clock = StageClock()
    for stage, ms, batch in [("head", 1, 8), ("decode", 3, 1), ("decode", 5, 1), ("mine", 2, 1)]:
        with clock.span(stage, batch=batch):
            machine.taking(lambda ms=ms: ms)()
    totals = clock.totals()
    assert list(totals) == ["decode", "head", "mine"]
    assert (totals["decode"].ms, totals["decode"].wall_ms, totals["decode"].runs) == (4.0, 8.0, 2)


def test_a_batched_stage_is_divided_by_its_batch(machine: Machine) -> None:
    clock = StageClock()
    for batch, ms in [(8, 80), (2, 40)]:
        with clock.span("image_tower", batch=batch):
            machine.now_ns += ms * 1_000_000
    total = clock.totals()["image_tower"]
    assert (total.ms, total.wall_ms, total.items, total.batch) == (12.0, 120.0, 10, 8)
    assert [span.ms for span in clock.spans] == [10.0, 20.0]


def test_samples_leave_out_the_short_last_batch(machine: Machine) -> None:
    clock = StageClock()
    for batch in (8, 8, 3):
        with clock.span("image_tower", batch=batch):
            machine.now_ns += batch * 1_000_000
    samples = clock.samples()["image_tower"]
    assert samples.samples_ms.tolist() == [8.0, 8.0]
    assert samples.batch == 8


def test_a_stage_that_raises_is_still_timed(machine: Machine) -> None:
    clock = StageClock()
    broken = machine.taking(lambda: float("nan"))  # cannot be rounded
    with pytest.raises(ValueError, match="NaN"), clock.span("decode"):
        broken()
    assert clock.totals()["decode"].runs == 1


def test_stages_timed_elsewhere_can_be_added_and_all_be_forgotten() -> None:
    clock = StageClock()
    clock.record("open", 1_000_000, 3_000_000)
    assert clock.totals()["open"].ms == 2.0
    clock.clear()
    assert clock.totals() == {}


def test_many_threads_lose_no_span() -> None:
    clock = StageClock()

    def work() -> None:
        for _ in range(500):
            with clock.span("decode"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.totals()["decode"].runs == 4000


def test_no_clock_times_nothing_and_makes_nothing() -> None:
    assert NO_CLOCK.span("decode") is NO_CLOCK.span("head", batch=8)
    with NO_CLOCK.span("decode"), NO_CLOCK.span("decode"):
        pass
    assert repr(NO_CLOCK) == "NO_CLOCK"


# --- measure


def test_enough_samples_and_enough_time_are_both_needed(machine: Machine) -> None:
    by_count = measure(machine.taking(lambda: 50.0), warmup=2, min_samples=30, min_duration_s=1)
    assert (len(by_count), by_count.duration_s) == (30, 1.5)
    by_time = measure(machine.taking(lambda: 50.0), warmup=2, min_samples=5, min_duration_s=1)
    assert (len(by_time), by_time.duration_s) == (20, 1.0)


def test_the_longest_duration_ends_it_and_leaves_a_sample(machine: Machine) -> None:
    samples = measure(machine.taking(lambda: 4000.0), warmup=10, min_samples=100, max_duration_s=10)
    assert (samples.warmup, len(samples)) == (3, 1)


def test_warm_up_is_not_counted_but_the_first_call_is_kept(machine: Machine) -> None:
    durations: Iterator[float] = iter([90.0, 20.0, *[5.0] * 100])
    samples = measure(machine.taking(lambda: next(durations)), warmup=2, min_samples=40, min_duration_s=0)
    assert samples.first_ms == 90.0
    assert set(samples.samples_ms.tolist()) == {5.0}
    without = measure(machine.taking(lambda: 7.0), warmup=0, min_samples=1, min_duration_s=0)
    assert without.first_ms == 7.0


def test_a_real_function_is_measured() -> None:
    samples = measure(lambda: sum(range(500)), min_samples=30, min_duration_s=0, batch=2)
    assert len(samples) == 30
    assert samples.batch == 2
    assert 0 < samples.median_ms < 1000
    assert samples.steal_share is None or 0 <= samples.steal_share <= 1


@pytest.mark.parametrize(
    "limits", [{"warmup": -1}, {"min_duration_s": float("nan")}, {"max_duration_s": -1}, {"batch": 0}]
)
def test_limits_out_of_range_are_an_error(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(limits))}: got"):
        measure(lambda: None, **limits)  # type: ignore[arg-type]


def test_drift_is_seen_and_its_absence_too() -> None:
    rng = np.random.default_rng(0)
    noise = rng.lognormal(0, 0.05, 300)
    steady = LatencySamples(10 * noise).drift()
    assert steady is not None
    assert steady.low < 1 < steady.high
    slowing = LatencySamples(np.linspace(10, 15, 300) * noise).drift()
    assert slowing is not None
    assert slowing.low > 1.2
    assert slowing.ratio == pytest.approx(14.17 / 10.83, rel=0.03)
    assert LatencySamples(noise[:29]).drift() is None


# --- compare_interleaved


def compare(
    machine: Machine, a: Callable[[], float], b: Callable[[], float], **options: float
) -> RatioInterval:
    settings = {"min_blocks": 40, "min_duration_s": 0.0, **options}
    return compare_interleaved(machine.taking(a), machine.taking(b), **settings)  # type: ignore[arg-type]


def test_a_known_ratio_is_recovered(machine: Machine) -> None:
    rng = np.random.default_rng(1)
    found = compare(machine, lambda: 13 * rng.lognormal(0, 0.1), lambda: 10 * rng.lognormal(0, 0.1))
    assert found.low < 1.3 < found.high
    assert found.ratio == pytest.approx(1.3, rel=0.05)
    assert found.n == 40
    assert len(found.a) == len(found.b) == 80
    assert "40 blocks" in str(found)


def test_intervals_cover_the_ratio_as_often_as_they_say(machine: Machine) -> None:
    rng = np.random.default_rng(2)
    trials = 200
    covered = 0
    for seed in range(trials):
        found = compare(
            machine,
            lambda: 11 * rng.lognormal(0, 0.2),
            lambda: 10 * rng.lognormal(0, 0.2),
            seed=seed,
            min_blocks=25,
        )
        covered += found.low <= 1.1 <= found.high
    # Three standard errors of a share of 0.95 over 200 trials are 0.046.
    assert covered / trials >= 0.95 - 0.046


def test_a_function_against_itself_gives_one(machine: Machine) -> None:
    rng = np.random.default_rng(3)
    spiky = [lambda: 10 * rng.lognormal(0, 0.1) + 100 * (rng.random() < 0.05)] * 2
    found = compare(machine, *spiky)
    assert found.low <= 1 <= found.high


def test_drift_of_the_machine_does_not_bias_the_ratio(machine: Machine) -> None:
    calls = iter(range(10_000))

    def slower_and_slower() -> float:
        return 10.0 * 1.01 ** next(calls)

    found = compare(machine, slower_and_slower, slower_and_slower)
    assert found.ratio == pytest.approx(1, abs=1e-6)


def test_the_order_of_blocks_is_random_and_repeatable(machine: Machine) -> None:
    def order(seed: int) -> str:
        calls: list[str] = []
        compare_interleaved(
            lambda: calls.append("a"),
            lambda: calls.append("b"),
            min_blocks=50,
            min_duration_s=0,
            warmup=0,
            seed=seed,
        )
        return "".join(calls)

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    blocks = [first[start : start + 4] for start in range(0, len(first), 4)]
    assert set(blocks) == {"abba", "baab"}
    assert 15 <= blocks.count("abba") <= 35


def test_repeats_are_divided_out(machine: Machine) -> None:
    found = compare(machine, lambda: 2.0, lambda: 1.0, repeat=5)
    assert found.ratio == 2.0
    assert set(found.b.samples_ms.tolist()) == {1.0}


def test_the_longest_duration_still_leaves_an_interval(machine: Machine) -> None:
    found = compare(machine, lambda: 1000.0, lambda: 500.0, max_duration_s=1, min_blocks=30)
    assert found.n == 6
    assert found.low <= 2 <= found.high


def test_confidence_outside_the_range_is_an_error() -> None:
    with pytest.raises(ConfigError, match="confidence: got 1, expected a number between 0 and 1"):
        compare_interleaved(lambda: None, lambda: None, confidence=1)
