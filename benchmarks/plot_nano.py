"""Draw accuracy over time of a picture for the small model and the default one: docs/images/nano.svg.

Every trained seed is a point, with its interval over names; from `results/nano.json`.

    python benchmarks/nano.py … && python benchmarks/plot_nano.py
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks/results/nano.json"
TARGET = ROOT / "docs/images/nano.svg"

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 380, 60, 200, 56, 56
LEAST_MS, MOST_MS = 0.1, 10.0
INK, PALE, LINE = "#1f2933", "#52606d", "#e4e7eb"
# Set, figure, what it is called, chance, colour.
ASKED = (
    ("stamps-report-en", "5-way", "cut-out photographs, five names", 0.2, "#2f7ed8"),
    ("twitter-en", "10-way", "emoji of an unseen style, ten names", 0.1, "#e8710a"),
)


@dataclass(frozen=True)
class Point:
    """One model and one question: milliseconds, share, and the interval of that."""

    ms: float
    share: float
    low: float
    high: float


def main() -> None:
    """Read the figures and draw them."""
    result = json.loads(SOURCE.read_text(encoding="utf-8"))
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(draw(result), encoding="utf-8")
    print(TARGET.relative_to(ROOT))


def points(result: dict[str, Any], subject: str, figure: str) -> dict[str, list[Point]]:
    """Return the int8 models by name, each with the time of its own bundle."""
    times = {each["b"]: each["b_median_ms"] for each in result["latency"]}
    beside = result["latency"][0]
    times.setdefault(beside["a"], beside["a_median_ms"])
    found: dict[str, list[Point]] = {}
    for model in result["models"]:
        bundle = model["name"].split("/")[0]
        if model["about"]["precision"] != "int8" or bundle not in times:
            continue
        said = model["sets"][subject]
        point = Point(times[bundle], said[figure], *said[f"{figure}-interval"])
        found.setdefault(model["about"]["model"], []).append(point)
    return found


def _x(ms: float) -> float:
    whole = math.log(MOST_MS / LEAST_MS)
    return LEFT + (WIDTH - LEFT - RIGHT) * math.log(ms / LEAST_MS) / whole


def _y(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _text(x: float, y: float, said: str, anchor: str = "start", fill: str = PALE, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"{more}>{escape(said)}</text>'


def draw(result: dict[str, Any]) -> str:
    """Return the picture."""
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="13">'
        ),
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(
            LEFT,
            26,
            "right among a few names, int8, over the time of a picture",
            fill=INK,
            more=' font-size="15" font-weight="600"',
        ),
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path d="M{LEFT} {_y(share):.1f}H{WIDTH - RIGHT}" stroke="{LINE}"/>')
        parts.append(_text(LEFT - 8, _y(share) + 4, f"{share:.0%}", "end"))
    for ms in (0.1, 0.3, 1.0, 3.0, 10.0):
        parts.append(f'<path d="M{_x(ms):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{LINE}"/>')
        parts.append(_text(_x(ms), HEIGHT - BOTTOM + 20, f"{ms:g} ms", "middle"))
    parts.append(
        _text(
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 12,
            "image tower, one thread (log; points of one model stand side by side)",
            "middle",
        )
    )
    for place, (subject, figure, said, chance, colour) in enumerate(ASKED):
        groups = points(result, subject, figure)
        shift = 7 * (2 * place - 1)
        for name, of_one in groups.items():
            for number, point in enumerate(of_one):
                x = _x(point.ms) + shift + 4 * (number - (len(of_one) - 1) / 2)
                parts.append(
                    f'<path d="M{x:.1f} {_y(point.low):.1f}V{_y(point.high):.1f}" stroke="{colour}" '
                    f'stroke-width="1.5" opacity="0.5"/>'
                )
                parts.append(f'<circle cx="{x:.1f}" cy="{_y(point.share):.1f}" r="4" fill="{colour}"/>')
            if place == 0:
                middle = sum(_x(point.ms) for point in of_one) / len(of_one)
                seeds = f", {len(of_one)} seeds" if len(of_one) > 1 else ""
                parts.append(_text(middle, TOP - 8, name.removeprefix("edgeclip-") + seeds, "middle", INK))
        parts.append(
            f'<path d="M{LEFT} {_y(chance):.1f}H{WIDTH - RIGHT}" stroke="{colour}" stroke-dasharray="4"/>'
        )
        parts.append(_text(WIDTH - RIGHT + 8, _y(chance) + 4, f"chance: {chance:.0%}", fill=colour))
        parts.append(_text(WIDTH - RIGHT + 8, TOP + 22 + 44 * place, said.split(", ")[0], fill=colour))
        parts.append(_text(WIDTH - RIGHT + 8, TOP + 39 + 44 * place, said.split(", ")[1], fill=colour))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
