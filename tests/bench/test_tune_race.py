"""The race on simulated machines whose truth is known: regret, who drops out, ties, noise."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from edgeclip.bench.race import Race, Rules, ratio_of
from edgeclip.errors import BackendError


@dataclass
class Machine:
    """A clock that contenders turn, with noise: slow minutes, and other programs that come and go."""

    seed: int = 0
    noise: float = 0.0
    spikes: float = 0.0
    drift: float = 0.0
    now_s: float = 0.0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def run(self, true_s: float) -> float:
        taken_s = true_s * (1 + self.drift * self.now_s) * self.random.lognormvariate(0, self.noise)
        if self.random.random() < self.spikes:
            taken_s *= self.random.uniform(1.5, 4)
        self.now_s += 3 * taken_s
        return taken_s


@dataclass(eq=False)
class Simulated:
    """A contender whose true time is known."""

    name: str
    machine: Machine
    true_s: float
    place: int = 0
    opens_in_s: float = 0.3
    fails: bool = False
    is_open: bool = False
    turns: int = 0

    @property
    def rank(self) -> tuple[int, ...]:
        return (self.place,)

    def open(self) -> None:
        self.machine.now_s += self.opens_in_s
        if self.fails:
            raise BackendError(f"{self.name}: the engine refuses it.")
        self.is_open = True

    def turn(self) -> float:
        assert self.is_open
        self.turns += 1
        return self.machine.run(self.true_s)

    def close(self) -> None:
        self.is_open = False


def run_race(machine: Machine, contenders: list[Simulated], budget_s: float = 90.0) -> Race:
    race = Race(lambda: budget_s - machine.now_s, seed=machine.seed)
    for each in contenders:
        race.enter(each)
    race.settle()
    return race


def field_of(machine: Machine, times_s: list[float]) -> list[Simulated]:
    places = list(range(len(times_s)))
    return [
        Simulated(f"setting {place}", machine, true_s, place)
        for place, true_s in zip(places, times_s, strict=True)
    ]


def regret(race: Race) -> float:
    winner = race.winner()
    assert winner is not None
    best_s = min(entry.contender.true_s for entry in race.entries)  # type: ignore[attr-defined]
    return float(winner.contender.true_s / best_s - 1)  # type: ignore[attr-defined]


def test_without_noise_the_fastest_wins_and_the_slow_ones_hardly_run() -> None:
    machine = Machine()
    contenders = field_of(machine, [0.05, 0.11, 0.04, 0.3, 0.047, 0.06])
    race = run_race(machine, contenders)
    winner = race.winner()
    assert winner is not None
    assert winner.name == "setting 2"
    assert {entry.name for entry in race.left} == {"setting 2"}
    # The warm-up and two pairs for more than twice as slow, three or four for the next ones.
    assert [each.turns for each in contenders if each.true_s > 0.1] == [3, 3]
    assert contenders[5].turns == 4
    assert [each.is_open for each in contenders] == [False, False, True, False, False, False]
    race.close()
    assert not any(each.is_open for each in contenders)


def test_who_is_out_says_by_how_much() -> None:
    race = run_race(Machine(), field_of(Machine(), [0.05, 0.11]))
    slower = race.entries[1]
    assert (slower.state, slower.why) == ("slower", "took 2.20 times as much as setting 0")
    assert slower.relative == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("noise", "spikes", "drift"),
    [(0.01, 0.0, 0.0), (0.05, 0.0, 0.0), (0.05, 0.1, 0.01), (0.15, 0.2, 0.0)],
    ids=["quiet", "ordinary", "throttling beside others", "very noisy"],
)
def test_regret_is_small_on_machines_of_every_kind(noise: float, spikes: float, drift: float) -> None:
    """A field like a real one: variants, engines and threads from 8 to 120 ms, some of them close."""
    regrets = []
    for seed in range(60):
        machine = Machine(seed, noise, spikes, drift)
        draw = random.Random(1000 + seed)
        times_s = [0.02 * draw.uniform(1, 6) for _ in range(18)] + [0.02, 0.0202, 0.0207, 0.021]
        draw.shuffle(times_s)
        race = run_race(machine, field_of(machine, times_s))
        assert machine.now_s < 95
        regrets.append(regret(race))
    bound, share = (0.05, 0.99) if noise < 0.1 else (0.05, 0.9)
    assert sum(each <= bound for each in regrets) >= share * len(regrets), sorted(regrets)[-10:]
    assert max(regrets) < 0.15


def test_equals_are_told_from_better_ones_by_preference_alone() -> None:
    for seed in range(20):
        machine = Machine(seed, noise=0.01)
        contenders = field_of(machine, [0.0201, 0.02, 0.02, 0.0202])
        contenders[3].place = -1
        winner = run_race(machine, contenders).winner()
        assert winner is not None
        assert winner.name == "setting 3"


def test_a_preferred_one_that_is_slower_than_the_tie_does_not_win() -> None:
    for seed in range(20):
        machine = Machine(seed, noise=0.01)
        winner = run_race(machine, field_of(machine, [0.0212, 0.02])).winner()
        assert winner is not None
        assert winner.name == "setting 1"


def test_in_doubt_the_fastest_wins_and_not_the_preferred_one() -> None:
    """Where noise hides what is in between, equality is not assumed."""
    machine = Machine(3, noise=0.6)
    race = run_race(machine, field_of(machine, [0.022, 0.02, 0.021]), budget_s=6.0)
    winner, leader = race.winner(), race.leader
    assert winner is leader


def test_a_contender_that_does_not_open_is_left_out_with_its_reason() -> None:
    machine = Machine()
    contenders = field_of(machine, [0.02, 0.01, 0.03])
    contenders[1].fails = True
    race = run_race(machine, contenders)
    assert (race.entries[1].state, race.entries[1].why) == ("failed", "setting 1: the engine refuses it.")
    winner = race.winner()
    assert winner is not None
    assert winner.name == "setting 0"


def test_when_nothing_opens_nobody_wins() -> None:
    machine = Machine()
    contenders = field_of(machine, [0.02])
    contenders[0].fails = True
    race = run_race(machine, contenders)
    assert race.winner() is None
    race.settle()


def test_a_budget_that_is_spent_ends_it_and_says_so() -> None:
    machine = Machine(noise=0.01)
    race = run_race(machine, field_of(machine, [1.0, 0.9, 0.5]), budget_s=1.0)
    assert machine.now_s < 15
    assert [entry.why for entry in race.entries[1:]] == ["the time was over after 0 of 6 pairs"] * 2
    assert [entry.state for entry in race.entries[1:]] == ["late"] * 2
    winner = race.winner()
    assert winner is not None
    assert winner.name == "setting 0"


def test_who_had_few_pairs_does_not_lead() -> None:
    """One lucky pair must not make somebody the measure of all others."""
    machine = Machine()
    first, lucky = field_of(machine, [1.0, 0.1])
    race = Race(lambda: 7.0 - machine.now_s)
    race.enter(first)
    entry = race.enter(lucky)
    assert (entry.state, entry.why) == ("late", "the time was over after 1 of 6 pairs")
    assert race.leader is race.entries[0]
    assert race.winner() is race.entries[0]
    assert not lucky.is_open


def test_few_may_be_left_at_once() -> None:
    machine = Machine(noise=0.02)
    contenders = field_of(machine, [0.02 + 0.0001 * number for number in range(12)])
    race = Race(lambda: 90 - machine.now_s, rules=Rules(most=3))
    for each in contenders:
        race.enter(each)
        assert sum(other.is_open for other in contenders) <= 3
    assert any(entry.why.endswith("and 3 others are as close") for entry in race.entries)


def test_comparing_opens_who_was_dropped() -> None:
    machine = Machine(noise=0.01)
    contenders = field_of(machine, [0.03, 0.02])
    race = run_race(machine, contenders)
    assert not contenders[0].is_open
    found = race.compare(race.entries[0], race.entries[1], 12)
    assert found is not None
    assert found.n == 12
    assert found.low < 1.5 < found.high
    assert found.median == pytest.approx(1.5, rel=0.03)


def test_an_interrupt_goes_through() -> None:
    machine = Machine()
    (contender,) = field_of(machine, [0.02])

    def interrupted() -> float:
        raise KeyboardInterrupt

    contender.turn = interrupted  # type: ignore[method-assign]
    race = Race(lambda: 1.0)
    with pytest.raises(KeyboardInterrupt):
        race.enter(contender)
    race.close()
    assert not contender.is_open


def test_the_interval_of_few_ratios_is_their_range() -> None:
    assert ratio_of([1.0, 3.0, 2.0]).low == 1.0
    assert ratio_of([1.0, 3.0, 2.0]).high == 3.0
    assert ratio_of([1.0, 3.0, 2.0]).median == 2.0
