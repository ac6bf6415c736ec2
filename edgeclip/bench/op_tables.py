"""Operator profiles as tables: by block or stage of the tower, and several side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from edgeclip.bench.per_op import OpEntry, OpProfile
from edgeclip.tables import aligned

__all__ = ["Level", "profile_table", "side_by_side"]

Level = Literal["block", "stage", "kernel"]
_NOWHERE: Final = "-"
_DISTURBED: Final = 1.05


@dataclass
class _Group:
    """The kernels of one block or stage together."""

    ms: float = 0.0
    operations: int = 0
    int8_operations: int = 0

    def add(self, entry: OpEntry) -> None:
        self.ms += entry.ms
        self.operations += entry.operations or 0
        self.int8_operations += (entry.operations or 0) if entry.int8 else 0


def profile_table(profile: OpProfile, level: Level, *, most: int | None = None) -> str:
    """Return a profile as a table: what ran, what of the machine it uses, where the time goes.

    Args:
        profile: with an account, or ``level`` is ``"kernel"``.
        level: what a row is.
        most: rows; the slowest. All where that is not given, 20 of kernels.
    """
    if level == "kernel":
        kernels = profile.to_table(most=20 if most is None else most).splitlines()
        return "\n".join([*kernels[:2], *_account(profile), *kernels[2:]])
    groups = _groups(profile, level)
    total = profile.kernels_ms or 1.0
    unit = "GOP" if profile.int8_operations else "GFLOP"
    rows: list[tuple[str, ...]] = [(level, "ms", "share", unit, f"{unit}/s", "of peak")]
    kept = _slowest({name: group.ms for name, group in groups.items()}, most)
    for name in kept:
        group = groups[name]
        rate = group.operations / group.ms / 1e6 if group.ms and group.operations else None
        ideal_ms = profile.ideal_ms(group.operations, group.int8_operations)
        rows.append(
            (
                name,
                f"{group.ms:.3f}",
                f"{group.ms / total:.1%}",
                f"{group.operations / 1e9:.4f}" if group.operations else "-",
                "-" if rate is None else f"{rate:.1f}",
                "-" if rate is None or ideal_ms is None else f"{ideal_ms / group.ms:.0%}",
            )
        )
    lines = [*profile.heading(), *_account(profile), "", *aligned(rows, range(1, 6))]
    return "\n".join([*lines, *_rest(groups, kept)])


def side_by_side(profiles: Mapping[str, OpProfile], level: Level, *, most: int | None = None) -> str:
    """Return several profiles as one table by block or stage, each beside the first.

    Args:
        profiles: by what its column is called; at least one.
        level: what a row is; kernels of different files have no rows in common.
        most: rows; the slowest. All where that is not given.
    """
    found = {name: _groups(profile, level) for name, profile in profiles.items()}
    first, *others = found
    slowest: dict[str, float] = {}
    for name in _in_order([list(groups) for groups in found.values()]):
        slowest[name] = max(groups[name].ms for groups in found.values() if name in groups)
    kept = _slowest(slowest, most)
    rows: list[tuple[str, ...]] = [(level, first, *(head for name in others for head in (name, "ratio")))]
    for row in (*kept, "kernels"):
        sums = [
            profiles[name].kernels_ms if row == "kernels" else groups[row].ms if row in groups else None
            for name, groups in found.items()
        ]
        rows.append(_compared(row, sums))
    rows.append(_compared("call", [profile.wall_ms for profile in profiles.values()]))
    lines = []
    for profile in profiles.values():
        lines += [*profile.heading(), *_account(profile), ""]
    lines.append(f"ms of kernels by {level}; ratio is the time over that of {first}, below 1 is faster")
    table = aligned(rows, range(1, len(rows[0])))
    return "\n".join([*lines, *table[:-2], *_rest(slowest, kept), *table[-2:]])


def _compared(name: str, sums: Sequence[float | None]) -> tuple[str, ...]:
    """Return a row: each time, and behind all but the first its ratio to that."""
    cells = [name]
    for place, ms in enumerate(sums):
        cells.append("-" if ms is None else f"{ms:.3f}")
        if place:
            cells.append("-" if ms is None or not sums[0] else f"{ms / sums[0]:.2f}")
    return tuple(cells)


def _groups(profile: OpProfile, level: Level) -> dict[str, _Group]:
    """Return kernels summed by block or stage, in the order these first run."""
    found: dict[str, _Group] = {}
    for entry in profile.ops:
        name = (entry.block if level == "block" else entry.stage) or _NOWHERE
        found.setdefault(name, _Group()).add(entry)
    return found


def _in_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return all names, those that one list alone has behind the one before them there."""
    found = list(lists[0])
    for names in lists[1:]:
        place = 0
        for name in names:
            if name in found:
                place = found.index(name) + 1
            else:
                found.insert(place, name)
                place += 1
    return found


def _slowest(ms: Mapping[str, float], most: int | None) -> list[str]:
    """Return the names of the slowest, in the order they stand in."""
    kept = set(sorted(ms, key=lambda name: -ms[name])[:most])
    return [name for name in ms if name in kept]


def _rest(all_of_them: Mapping[str, object], kept: Sequence[str]) -> list[str]:
    return [f"and {len(all_of_them) - len(kept)} more"] if len(kept) < len(all_of_them) else []


def _account(profile: OpProfile) -> list[str]:
    """Return what a call calculates, how much of the machine that uses, and where its time goes."""
    if profile.operations is None:
        return [f"operations: unknown ({profile.why})"] if profile.why else []
    unit = "GOP" if profile.int8_operations else "GFLOP"
    share = f", {profile.int8_operations / profile.operations:.0%} int8" if profile.int8_operations else ""
    rate = profile.operations / profile.wall_ms / 1e6
    said = f"{profile.operations / 1e9:.4f} {unit} a call{share}: {rate:.1f} {unit}/s"
    found = sum(entry.operations or 0 for entry in profile.ops)
    ideal_ms = profile.ideal_ms(profile.operations, profile.int8_operations or 0)
    if not ideal_ms:
        return [said]
    peak = profile.operations / ideal_ms / 1e6
    reached = (
        f"which is {ideal_ms / profile.wall_ms:.0%} of the {peak:.1f} that matrix products reach in this run"
    )
    if found < profile.operations:
        return [said, reached, f"kernels name {found / profile.operations:.0%} of these operations"]
    products_ms = sum(entry.ms for entry in profile.ops if entry.operations)
    runs_ms = [sum(times) for times in zip(*(entry.samples_ms for entry in profile.ops), strict=True)]
    walls_ms = profile.timed_wall_samples_ms
    outside_ms = statistics.median(wall - run for wall, run in zip(walls_ms, runs_ms, strict=True))
    parts = {
        "products at that peak": ideal_ms,
        "what they take beyond it": products_ms - ideal_ms,
        "other kernels": profile.kernels_ms - products_ms,
        "outside of kernels, and timing them": outside_ms,
        # One kernel or another is interrupted in every call, but not the same: medians do not have it.
        "interruptions": profile.timed_wall_ms - profile.kernels_ms - outside_ms,
    }
    rows = [(f"  {what}", f"{ms:.2f}", f"{ms / profile.timed_wall_ms:.1%}") for what, ms in parts.items()]
    alone_ms = profile.kernels_ms + outside_ms
    if profile.timed_wall_ms > _DISTURBED * alone_ms:
        reached += f",\n{ideal_ms / alone_ms:.0%} without interruptions"
    return [
        said,
        reached,
        f"where the {profile.timed_wall_ms:.2f} ms go:",
        *aligned(rows, (1, 2)),
    ]
