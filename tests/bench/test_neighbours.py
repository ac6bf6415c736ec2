"""What others had of the machine, from counts that say so and from counts that do not."""

from __future__ import annotations

import sys
import time

import pytest

from edgeclip.bench import neighbours
from edgeclip.bench.neighbours import Neighbours, read_ticks


def stat(user: int = 0, nice: int = 0, idle: int = 0, steal: int = 0) -> str:
    return f"cpu  {user} {nice} 3 {idle} 5 0 7 {steal} 99 99\ncpu0 1 1 1 1 1 1 1 1 1 1\n"


def test_ticks_are_read_field_by_field() -> None:
    ticks = read_ticks(stat(user=10, nice=20, idle=40, steal=80))
    assert ticks is not None
    assert (ticks.total, ticks.worked, ticks.stolen) == (165, 40, 80)


@pytest.mark.parametrize("text", ["", "intr 1 2 3", "cpu  1 2 3 4"])
def test_systems_that_do_not_tell(text: str) -> None:
    assert read_ticks(text) is None


def test_shares_are_of_what_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(
        [stat(), stat(user=40, nice=10, idle=40, steal=10), stat(), stat(user=100), stat(), stat(idle=200)]
    )
    monkeypatch.setattr(neighbours, "read_ticks", lambda: read_ticks(next(texts)))
    monkeypatch.setattr(neighbours.os, "sysconf", lambda name: 100)
    own = iter([0, int(0.3e9), 0, int(0.5e9), 0, 0])
    monkeypatch.setattr(neighbours, "process_time_ns", lambda: next(own))
    seen = Neighbours()
    for _ in range(3):
        with seen:
            pass
    assert seen.steal_share == pytest.approx(10 / 400)
    assert seen.others_share == pytest.approx((150 - 30 - 50) / 400)


def test_nothing_is_said_where_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Neighbours().steal_share is None
    monkeypatch.setattr(neighbours, "read_ticks", lambda: None)
    seen = Neighbours()
    with seen:
        pass
    assert (seen.steal_share, seen.others_share) == (None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_our_own_work_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Neighbours()
    with seen:
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            pass
    assert seen.others_share is not None
    assert 0 <= seen.others_share <= 1
