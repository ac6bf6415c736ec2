"""What tuning found: the profile, every setting that was tried with its turns, and what was not."""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
from msgspec import Struct

from edgeclip.bench.race import Entry, Race
from edgeclip.bench.settings import Fresh, Setting
from edgeclip.runtime.documents import Document
from edgeclip.runtime.statistics import order_interval
from edgeclip.runtime.tuned import Goal, TunedProfile
from edgeclip.tables import aligned

__all__ = ["UNITS", "GainEntry", "SettingEntry", "TuneReport", "setting_entry", "undecided", "why_chosen"]

_NAMED: Final = 4
UNITS: Final = {"latency": "ms", "throughput": "ms", "memory": "MB"}
_WHAT: Final = {
    "latency": "one picture after another, decoded already, to its label",
    "throughput": "a stream of picture files, decoding included, time a picture",
    "memory": "peak resident memory of a fresh process that classifies one picture",
}


class SettingEntry(Struct, frozen=True, kw_only=True):
    """One setting: ``turns`` are raw, ``value`` their median between ``low`` and ``high`` (95 %).

    ``ratio`` is to the chosen one, from turns that alternated: it is right where values drifted.
    """

    name: str
    state: Literal["left", "slower", "failed", "late"]
    chosen: bool
    why: str
    ratio: float | None
    value: float | None
    low: float | None
    high: float | None
    turns: tuple[float, ...]


class GainEntry(Struct, frozen=True, kw_only=True):
    """How many times as much ``setting``, what ``auto`` took before, takes as the chosen one; ``n`` pairs."""

    setting: str
    ratio: float
    low: float
    high: float
    n: int


class TuneReport(Document, frozen=True, kw_only=True):
    """What tuning found, with every turn."""

    schema: Literal[1] = 1
    kind: Literal["tune-report"] = "tune-report"
    model: str
    profile: TunedProfile
    gain: GainEntry | None
    settings: tuple[SettingEntry, ...]
    not_tried: dict[str, str]
    left_out: dict[str, str]
    undecided: str | None
    budget_s: float
    seconds: float
    steal_share: float | None
    host: dict[str, Any]
    versions: dict[str, str]

    def to_text(self) -> str:
        """Return it for people: what was chosen and why, and what became of the others."""
        profile, unit = self.profile, self.profile.unit
        what = (
            f"{self.model} on {self.host['cpu_model']}, {profile.cores} usable core(s), {profile.device}: "
            f"{profile.goal} ({_WHAT[profile.goal]}), {self.seconds:.0f} s"
        )
        lines = [what, ""]
        rows: list[tuple[str, ...]] = [("", "setting", unit, "95 % interval", "to chosen", "turns")]
        rows += [_row(each) for each in self.settings if each.state in ("left", "slower")]
        lines += aligned(rows, (2, 4, 5))
        failed, late = (
            {each.name: each.why for each in self.settings if each.state == state}
            for state in ("failed", "late")
        )
        for title, reasons in (
            ("left out", {**self.left_out, **failed}),
            ("not tried", {**late, **self.not_tried}),
        ):
            if reasons:
                lines += ["", f"{title}:", *_grouped(reasons)]
        lines += ["", f"chosen: {profile.variant}, {profile.settings}: {profile.why}"]
        if self.gain is not None:
            gain = self.gain
            verb = "as much memory as it" if profile.goal == "memory" else "as long as it"
            lines.append(
                f"        without a profile, auto takes {gain.setting}: {gain.ratio:.2f} times {verb} "
                f"({gain.low:.2f} to {gain.high:.2f}, {gain.n} pairs)"
            )
        if self.undecided is not None:
            lines.append(f"note:   {self.undecided}")
        if self.steal_share is not None and self.steal_share > 0.02:
            lines.append(
                f"note:   the hypervisor gave {self.steal_share:.0%} of the time to others: tune again when "
                "the machine is quiet"
            )
        return "\n".join(lines)


def _grouped(reasons: dict[str, str]) -> list[str]:
    """Return a line for each reason, with those it is for; of many the first ones."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    lines = []
    for why, found in names.items():
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        lines.append(f"  {'; '.join(found[:_NAMED])}{more}: {why}")
    return lines


def setting_entry(entry: Entry[Setting], winner: Entry[Setting], goal: Goal) -> SettingEntry:
    """Return what is said of one setting; times in milliseconds, memory in megabytes."""
    scale = 1.0 if goal == "memory" else 1e3
    turns = tuple(round(value * scale, 6) for value in entry.turns)
    ordered = sorted(turns)
    low, high = order_interval(len(turns), 0.5, 0.95) if len(turns) > 5 else (0, 0)
    return SettingEntry(
        name=entry.name,
        state=entry.state,
        chosen=entry is winner,
        why=entry.why,
        ratio=entry.relative / winner.relative if entry.state in ("left", "slower") else None,
        value=float(np.median(turns)) if turns else None,
        low=ordered[low - 1] if low else None,
        high=ordered[high - 1] if low else None,
        turns=turns,
    )


def _row(entry: SettingEntry) -> tuple[str, ...]:
    interval = "" if entry.low is None or entry.high is None else f"{entry.low:.2f} to {entry.high:.2f}"
    return (
        "*" if entry.chosen else "",
        entry.name,
        "" if entry.value is None else f"{entry.value:.2f}",
        interval,
        "" if entry.ratio is None else f"{entry.ratio:.2f}",
        str(len(entry.turns)),
    )


def why_chosen(winner: Entry[Setting], race: Race[Setting], tried: int) -> str:
    """Return why the winner was chosen, in words."""
    leader = race.leader
    if leader is None or leader is winner:
        return f"the best of {tried} tried" if tried > 1 else "the only one that could be tried"
    ratio = winner.ratio
    close = "" if ratio is None else f" ({ratio.median:.3f}, {ratio.low:.3f} to {ratio.high:.3f})"
    best = f"as good as {leader.name}, the best of {tried} tried{close}"
    return f"{best}, and preferred to it: {_gentler(winner, leader)}"


def _gentler(winner: Entry[Setting], leader: Entry[Setting]) -> str:
    ours, theirs = winner.contender, leader.contender
    a, b = ours.settings, theirs.settings
    if isinstance(ours, Fresh):
        return "it is faster"
    if a.spinning != b.spinning:
        return "its threads do not spin"
    if a.threads != b.threads:
        return "it takes fewer threads"
    if ours.runner.place != theirs.runner.place:
        return "the bundle puts its variant first"
    return "it is the plainer setting"


def undecided(winner: Entry[Setting], race: Race[Setting], late: int) -> str | None:
    """Return who may be much better than the winner after all, in words.

    Args:
        winner: the chosen one.
        race: that is over.
        late: how many had no time to enter.
    """
    late += sum(entry.state == "late" for entry in race.entries)
    said = [f"{late} setting(s) were not tried within the budget"] if late else []
    unsure = [
        entry.name for entry in race.left if entry not in (winner, race.leader) and _may_win(entry, race)
    ]
    said += [f"it was not settled within the budget whether {', '.join(unsure)} is better"] if unsure else []
    return f"{'; '.join(said)}. Give it more with --budget" if said else None


def _may_win(entry: Entry[Setting], race: Race[Setting]) -> bool:
    ratio = entry.ratio
    return ratio is None or ratio.n < race.rules.needed or ratio.low < 1 / race.rules.surely
