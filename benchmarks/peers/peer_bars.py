"""The bars: what must hold between edgeclip and the peers, and whether it did. Pure functions.

A bar is never left out because it was missed; one that could not be measured says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Bar", "evaluate", "missing"]


@dataclass(frozen=True)
class Bar:
    """A limit on one number.

    Attributes:
        name: what is compared.
        limit: the bar.
        sense: ``"at least"`` or ``"at most"``.
        by: what is held against it: ``"ratio"``, the median, or ``"low"``, the lower end of its interval.
        unit: of the number; ``"x"`` for ratios.
    """

    name: str
    limit: float
    sense: Literal["at least", "at most"]
    by: Literal["ratio", "low"] = "ratio"
    unit: str = "x"


def evaluate(bar: Bar, found: Mapping[str, Any]) -> dict[str, Any]:
    """Hold a number with its interval against a bar.

    Args:
        bar: the bar.
        found: ``ratio``, ``low`` and ``high``.

    Returns:
        The numbers, the bar, ``met``, and ``interval``: ``"clear"`` where the whole interval lies on one side
        of the bar, else ``"straddles"``.
    """
    low, high = float(found["low"]), float(found["high"])
    held = float(found[bar.by])
    met = held >= bar.limit if bar.sense == "at least" else held <= bar.limit
    clear = low >= bar.limit or high <= bar.limit
    return {
        "ratio": found["ratio"],
        "low": found["low"],
        "high": found["high"],
        "unit": bar.unit,
        "bar": f"{bar.sense} {bar.limit:g}" + (" (lower end)" if bar.by == "low" else ""),
        "limit": bar.limit,
        "met": met,
        "interval": "clear" if clear else "straddles",
    }


def missing(bar: Bar, why: str) -> dict[str, Any]:
    """Return the entry of a bar that could not be measured: not met, and why."""
    return {
        "ratio": None,
        "low": None,
        "high": None,
        "unit": bar.unit,
        "bar": f"{bar.sense} {bar.limit:g}",
        "limit": bar.limit,
        "met": None,
        "why": why,
    }
