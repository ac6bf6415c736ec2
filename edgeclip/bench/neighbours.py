"""What others had of the machine meanwhile: other programs, and other guests of its host."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import process_time_ns
from typing import Final

__all__ = ["Neighbours", "read_ticks"]

_STAT: Final = Path("/proc/stat")
_FIELDS: Final = 8


@dataclass(frozen=True)
class _Ticks:
    """Time of all processors since start, in ticks: all of it, what was worked, and what was stolen."""

    total: int
    worked: int
    stolen: int


def read_ticks(text: str | None = None) -> _Ticks | None:
    """Return the system's count; ``None`` where it does not tell.

    Args:
        text: content of ``/proc/stat``, instead of reading it.
    """
    if text is None:
        try:
            with _STAT.open("rb") as stream:
                text = stream.read(256).decode("ascii", "replace")
        except OSError:
            return None
    fields = text.partition("\n")[0].split()
    if len(fields) <= _FIELDS or fields[0] != "cpu":
        return None
    user, nice, system, idle, waiting, hard, soft, stolen = map(int, fields[1 : _FIELDS + 1])
    worked = user + nice + system + hard + soft  # guests are part of user
    return _Ticks(worked + idle + waiting + stolen, worked, stolen)


class Neighbours:
    """A context that adds up what others had while its bodies ran.

    Ticks are coarse, about ten milliseconds: single bodies may be off, their sum is not.
    """

    def __init__(self) -> None:
        self._total = self._worked = self._stolen = 0
        self._own_ns = 0
        self._began: tuple[_Ticks | None, int] = (None, 0)
        self._tells = True

    def __enter__(self) -> None:
        self._began = read_ticks(), process_time_ns()

    def __exit__(self, *_: object) -> None:
        before, own_ns = self._began
        after = read_ticks()
        self._own_ns += process_time_ns() - own_ns
        if before is None or after is None:
            self._tells = False
            return
        self._total += after.total - before.total
        self._worked += after.worked - before.worked
        self._stolen += after.stolen - before.stolen

    @property
    def steal_share(self) -> float | None:
        """Share of the machine's time that its hypervisor gave to others; ``None`` where it is not told."""
        return _share(self._stolen, self._total) if self._tells and self._total else None

    @property
    def others_share(self) -> float | None:
        """Share of the machine's time that other programs had; ``None`` where it is not told."""
        if not (self._tells and self._total):
            return None
        own = self._own_ns / 1e9 * os.sysconf("SC_CLK_TCK")
        return _share(self._worked - own, self._total)


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole))
