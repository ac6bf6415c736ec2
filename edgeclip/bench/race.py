"""Find the fastest of many settings in little time: slow ones drop out early, close ones are repeated.

Who enters races against the leader, turn by turn in random order, so that both meet the same machine, and is
dropped as soon as it is clearly slower. Those that are left run rounds, everyone once a round in random
order, until nobody is in doubt or the time is over. What counts is always the ratio of two turns that follow
each other closely; a machine that becomes slower with time disturbs nothing. Racing: Maron & Moore 1994,
"Hoeffding Races", here with intervals of the median ratio that need no distribution.

Knows no engines, bundles or clocks: a contender's turn gives one number, and less is better.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import numpy as np

from edgeclip.errors import EdgeClipError
from edgeclip.runtime.statistics import order_interval

__all__ = ["DEFAULT_RULES", "Contender", "Entry", "Race", "Ratio", "Rules", "ratio_of"]

_DROPPING_CONFIDENCE: Final = 0.99  # every round looks again
_ranks = functools.lru_cache(maxsize=256)(order_interval)


class Contender(Protocol):
    """One setting that takes part."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def rank(self) -> tuple[Any, ...]:
        """Smaller is preferred among those that are as fast; asked for after the last turn."""
        ...

    def open(self) -> None:
        """Make ready; an :class:`EdgeClipError` keeps it out, with its reason."""
        ...

    def turn(self) -> float:
        """Return a positive number, less is better."""
        ...

    def close(self) -> None:
        """Give back what it holds. It may be opened again."""
        ...


_Contender = TypeVar("_Contender", bound=Contender)


@dataclass(frozen=True)
class Ratio:
    """How many times as much one takes as another: median of pairs of turns, and the interval of it."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Rules:
    """When who drops out.

    Attributes:
        tie: so much more counts as equal.
        needed: pairs of turns behind a verdict.
        hopeless: pairs after which an entrant is dropped at once, if every one of them is above the ratio.
        rounds: at most, among those that are left.
        most: how many of them there may be; more hold memory and share the time.
        surely: the preferred one among equals takes surely less than so many times the fastest.
    """

    tie: float = 0.02
    needed: int = 6
    hopeless: tuple[tuple[int, float], ...] = ((2, 2.0), (3, 1.3), (4, 1.15))
    rounds: int = 40
    most: int = 6
    surely: float = 1.05


DEFAULT_RULES: Final = Rules()

State = Literal["left", "slower", "failed", "late"]


@dataclass(eq=False)
class Entry(Generic[_Contender]):
    """One contender and what became of it.

    Attributes:
        contender: itself.
        state: ``"left"`` while it may win; ``"late"`` where there was no time to tell.
        why: it is not, in words.
        turns: every number it gave, the first one of all, which warms up, left out.
        relative: to the first who entered, over the leaders of its time.
        ratio: to the leader when it was last looked at.
    """

    contender: _Contender
    state: State = "left"
    why: str = ""
    turns: list[float] = field(default_factory=list)
    relative: float = 1.0
    ratio: Ratio | None = None

    @property
    def name(self) -> str:
        """Of the contender."""
        return self.contender.name


def ratio_of(pairs: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Return the median of ratios with its interval, which is the whole range where they are few."""
    ordered = np.sort(np.asarray(pairs, np.float64))
    low, high = _ranks(len(ordered), 0.5, confidence)
    return Ratio(float(np.median(ordered)), float(ordered[low - 1]), float(ordered[high - 1]), len(ordered))


class Race(Generic[_Contender]):
    """A race; close it, also when it is broken off.

    Args:
        left_s: seconds that are left; no turn begins where there are none.
        rules: who drops out when.
        seed: of the orders.
        on_turn: called with the name of who runs next.
    """

    def __init__(
        self,
        left_s: Callable[[], float],
        *,
        rules: Rules = DEFAULT_RULES,
        seed: int = 0,
        on_turn: Callable[[str], None] | None = None,
    ) -> None:
        self.rules = rules
        self.entries: list[Entry[_Contender]] = []
        self._left_s = left_s
        self._random = random.Random(seed)  # noqa: S311 - an order of measurements, not a secret
        self._on_turn = on_turn
        self._leader: Entry[_Contender] | None = None

    @property
    def leader(self) -> Entry[_Contender] | None:
        """The fastest so far."""
        return self._leader

    @property
    def left(self) -> list[Entry[_Contender]]:
        """Who may still win, in the order of entering."""
        return [entry for entry in self.entries if entry.state == "left"]

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return self._left_s() <= 0

    def enter(self, contender: _Contender) -> Entry[_Contender]:
        """Let a contender race against the leader, and keep it if it is not clearly slower."""
        entry = Entry(contender)
        self.entries.append(entry)
        try:
            if self._on_turn is not None:
                self._on_turn(entry.name)
            contender.open()
            contender.turn()
        except EdgeClipError as error:
            self._out(entry, "failed", " ".join(str(error).split()))
            return entry
        leader = self._leader
        if leader is None:
            self._leader = entry
            return entry
        pairs, hopeless = self._pairs(entry, leader, self.rules.needed, self.rules.hopeless)
        if pairs:
            entry.ratio = ratio_of(pairs)
            entry.relative = leader.relative * entry.ratio.median
        if len(pairs) < self.rules.needed and not hopeless:
            self._out(entry, "late", f"the time was over after {len(pairs)} of {self.rules.needed} pairs")
            return entry
        ratio = ratio_of(pairs)
        if hopeless or ratio.low > 1 + self.rules.tie:
            self._out(entry, "slower", f"took {ratio.median:.2f} times as much as {leader.name}")
            return entry
        # Else rounds will tell: taking every lucky one for the measure of the next would add up.
        if ratio.high < 1:
            self._follow(entry, leader, ratio_of([1 / pair for pair in pairs]))
        self._make_room()
        return entry

    def settle(self) -> None:
        """Let those that are left run rounds until it is clear who is the fastest, or the time is over."""
        rows: list[dict[Entry[_Contender], float]] = []
        while len(rows) < self.rules.rounds and (self._left_s() > 0 or not rows):
            left = self.left
            if not left or (len(left) == 1 and len(rows) >= self.rules.needed):
                return
            self._random.shuffle(left)
            rows.append({entry: self._turn(entry) for entry in left})
            if len(rows) >= self.rules.needed and len(left) > 1:
                self._judge(rows, self._leader or left[0])
                if self._is_clear():
                    return

    def compare(self, a: Entry[_Contender], b: Entry[_Contender], pairs: int) -> Ratio | None:
        """Return how many times as much ``a`` takes as ``b``; opens who was closed.

        Returns:
            ``None`` where there was no time for a verdict.
        """
        for entry in (a, b):
            if entry.state != "left":
                entry.contender.open()
                entry.contender.turn()
        found, _ = self._pairs(a, b, pairs, ())
        return ratio_of(found) if len(found) >= self.rules.needed else None

    def winner(self) -> Entry[_Contender] | None:
        """Return the preferred one among those that are as fast as the fastest."""
        leader = self._leader
        if leader is None:
            return None
        good = [entry for entry in self.left if entry is leader or self._is_as_fast(entry)]
        return min(good, key=lambda entry: entry.contender.rank)

    def close(self) -> None:
        """Close every contender that may be open."""
        for entry in self.entries:
            entry.contender.close()

    def _is_as_fast(self, entry: Entry[_Contender]) -> bool:
        ratio = entry.ratio
        if ratio is None or ratio.n < self.rules.needed:
            return False
        return ratio.median <= 1 + self.rules.tie and ratio.high <= self.rules.surely

    def _turn(self, entry: Entry[_Contender]) -> float:
        if self._on_turn is not None:
            self._on_turn(entry.name)
        value = entry.contender.turn()
        entry.turns.append(value)
        return value

    def _pairs(
        self, a: Entry[_Contender], b: Entry[_Contender], count: int, hopeless: tuple[tuple[int, float], ...]
    ) -> tuple[list[float], bool]:
        """Return ratios of turns of ``a`` and ``b``, and whether ``a`` was hopeless."""
        pairs: list[float] = []
        while len(pairs) < count and self._left_s() > 0:
            if self._random.random() < 0.5:
                mine, theirs = self._turn(a), self._turn(b)
            else:
                theirs, mine = self._turn(b), self._turn(a)
            pairs.append(mine / theirs)
            if any(len(pairs) == n and min(pairs) > limit for n, limit in hopeless):
                return pairs, True
        return pairs, False

    def _judge(self, rows: list[dict[Entry[_Contender], float]], leader: Entry[_Contender]) -> None:
        """Look at the rounds so far: who leads, how far the others are behind, who drops out."""
        left = self.left
        medians = {entry: _median_ratio(rows, entry, leader) for entry in left}
        first = min(medians, key=lambda entry: medians[entry])
        if first is not leader:
            first.relative = leader.relative * medians[first]
            self._leader = leader = first
        leader.ratio = None
        for entry in left:
            if entry is leader:
                continue
            pairs = [row[entry] / row[leader] for row in rows]
            entry.ratio = ratio_of(pairs)
            entry.relative = leader.relative * entry.ratio.median
            if ratio_of(pairs, _DROPPING_CONFIDENCE).low > 1 + self.rules.tie:
                self._out(entry, "slower", f"took {entry.ratio.median:.2f} times as much as {leader.name}")

    def _is_clear(self) -> bool:
        return all(entry is self._leader or self._is_as_fast(entry) for entry in self.left)

    def _follow(self, entry: Entry[_Contender], before: Entry[_Contender], ratio: Ratio) -> None:
        """Make an entrant the leader; how the others compare with it is open again."""
        self._leader = entry
        for each in self.left:
            each.ratio = None
        before.ratio = ratio
        if ratio.low > 1 + self.rules.tie:
            self._out(before, "slower", f"took {ratio.median:.2f} times as much as {entry.name}")

    def _make_room(self) -> None:
        """Drop the slowest where more are left than may be."""
        left, leader = self.left, self._leader
        if leader is None or len(left) <= self.rules.most:
            return
        last = max((entry for entry in left if entry is not leader), key=lambda entry: entry.relative)
        said = f"took {last.relative / leader.relative:.2f} times as much as {leader.name}"
        self._out(last, "slower", f"{said}, and {self.rules.most} others are as close")

    def _out(self, entry: Entry[_Contender], state: State, why: str) -> None:
        entry.state, entry.why = state, why
        entry.contender.close()


def _median_ratio(
    rows: list[dict[Entry[_Contender], float]], a: Entry[_Contender], b: Entry[_Contender]
) -> float:
    return math.exp(float(np.median([math.log(row[a] / row[b]) for row in rows])))
