"""Print the table of all device reports in this folder as Markdown.

python benchmarks/devices/table.py
python benchmarks/devices/table.py --check FILE.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeclip.bench.device_report import DeviceReport, read_device_report
from edgeclip.bench.sensors import SensorsEntry
from edgeclip.bench.sustained import WindowEntry
from edgeclip.errors import EdgeClipError

HERE = Path(__file__).parent
NOTHING = "no figures yet"
LEAST_S = 600.0
HEADING = (
    "device",
    "variant",
    "threads",
    "p50 of the first minute, ms",
    "of the last",
    "last / first",
    "slowest minute, pictures/s",
    "hottest",
    "throttled",
)
NUMBERS = range(2, 8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or say what keeps a report out of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="FILE", help="say whether a report can be taken")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the reports are")
    given = parser.parse_args(arguments)
    try:
        if given.check is not None:
            problems = unfit(read_device_report(given.check))
            print("\n".join(problems) or f"{given.check.name} can be taken")
            return 1 if problems else 0
        print(table([read_device_report(path) for path in sorted(given.folder.glob("*.json"))]))
    except EdgeClipError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def unfit(report: DeviceReport) -> list[str]:
    """Return why a report does not belong here."""
    found = []
    if report.verify.status != "passed":
        found.append(f"verify: {report.verify.status}, expected passed: {report.verify.reason}")
    if report.sustained is None:
        return [*found, "it has no sustained run: make it with `edgeclip bench --device-report`"]
    if report.sustained.interrupted or report.sustained.lasted_s < LEAST_S:
        found.append(f"it lasted {report.sustained.lasted_s:.0f} s, expected {LEAST_S:.0f} s")
    return found


def table(reports: Sequence[DeviceReport]) -> str:
    """Return the table of those reports that belong here; without any, that there are no figures."""
    rows = [_row(report) for report in reports if not unfit(report)]
    if not rows:
        return NOTHING
    line = ["---:" if place in NUMBERS else "---" for place in range(len(HEADING))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [HEADING, line, *rows])


def _row(report: DeviceReport) -> tuple[str, ...]:
    said, latency = report.sustained, report.latency
    if said is None or latency is None:
        raise ValueError("an unfit report")
    change = said.change
    return (
        _text(report.device),
        _text(report.variant),
        str(latency.placement.get("threads", "-")),
        _p50(said.first),
        _p50(said.last),
        "-" if change is None else f"{change.ratio:.2f} ({change.low:.2f} to {change.high:.2f})",
        "-" if said.slowest_minute is None else f"{said.slowest_minute.images_per_s:.1f}",
        _hottest(said.sensors),
        said.throttled.status,
    )


def _p50(window: WindowEntry | None) -> str:
    return "-" if window is None or window.p50 is None else f"{window.p50.ms:.1f}"


def _hottest(sensors: SensorsEntry) -> str:
    values = [
        value for gauge in sensors.of_kind("temperature") for value in gauge.values if value is not None
    ]
    return f"{max(values):.0f} °C" if values else "-"


def _text(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
