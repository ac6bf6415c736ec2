"""``edgeclip bench --device-report FILE``: what a device gives in the long run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from edgeclip.errors import InputError

from ._options import Notes, shown

if TYPE_CHECKING:
    from edgeclip.bench.targets import Target
    from edgeclip.bench.workload import Workload

__all__ = ["DURATION_S", "device_name", "sustained"]

DURATION_S: Final = 600.0
_NOT_PASSED: Final = 4
_INTERRUPTED: Final = 130


def device_name(said: str | None) -> str:
    """Return what reports call this device: what was said, else a word made of its board or processor.

    Raises:
        InputError: it cannot be a name.
    """
    if said is None:
        from edgeclip.runtime.host import Host

        host = Host.here()
        said = re.sub(r"[^a-z0-9]+", "-", (host.board or host.cpu_model or host.machine).lower()).strip("-")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", said):
        raise InputError(
            f"--device-name {said!r}: expected letters, digits, points, dashes and underscores, such as "
            "raspberry-pi5."
        )
    return said


def sustained(
    path: Path,
    target: Target,
    workload: Workload,
    *,
    device: str,
    duration_s: float,
    keep_partial: bool,
    notes: Notes,
    as_json: bool,
) -> None:
    """Run the sustained protocol, write the report, and print what came of it.

    Ends with 4 where the device's numbers are wrong, and with 130 where Ctrl-C cut the run short.

    Raises:
        EdgeClipError: as :func:`edgeclip.export.device_report.run_device_report`.
    """
    from edgeclip.bench.sustained import SustainedPlan
    from edgeclip.bundle import Bundle
    from edgeclip.export.device_report import run_device_report

    def show(seconds: float, pictures: int, latest_ms: float) -> None:
        notes.progress(
            f"{seconds:.0f} of {duration_s:.0f} s, {pictures:,} pictures, the latest {latest_ms:.1f} ms"
        )

    plan = SustainedPlan(duration_s=duration_s, keep_partial=keep_partial)
    try:
        report = run_device_report(
            path,
            bundle=Bundle.open(target.bundle),
            target=target,
            workload=workload,
            device=device,
            plan=plan,
            on_progress=show,
        )
    finally:
        notes.done()
    notes.say(f"wrote {shown(path)}")
    if as_json:
        click.echo(report.to_json())
    else:
        click.echo(f"{report.bundle.name} {report.variant} on {report.device}")
        if report.sustained is not None:
            click.echo(report.sustained.to_table())
    if report.verify.status != "passed":
        notes.say(f"its numbers here are not right, so nothing was timed: {report.verify.reason}")
        raise click.exceptions.Exit(_NOT_PASSED)
    if report.sustained is not None and report.sustained.interrupted:
        raise click.exceptions.Exit(_INTERRUPTED)
