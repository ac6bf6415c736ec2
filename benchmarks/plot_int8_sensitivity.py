"""Draw accuracy against speed of what stays float, from `results/int8_sensitivity.json`.

python benchmarks/int8_sensitivity.py && python benchmarks/plot_int8_sensitivity.py
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks/results/int8_sensitivity.json"
TARGET = ROOT / "docs/images/int8-sensitivity.svg"

SIDE, TALL, LEFT, TOP, GAP = 330, 240, 70, 70, 110
COLOURS = {"everything": "#34a853", "fixed": "#9b51e0", "chosen": "#e8710a", "random": "#9aa5b1"}
NAMES = {
    "everything": "everything in int8",
    "fixed": "fixed policy",
    "chosen": "chosen, at several targets",
    "random": "as many, at random",
}


def main() -> None:
    """Read the points of every tower and draw a panel each."""
    towers = json.loads(SOURCE.read_text(encoding="utf-8"))["towers"]
    width, height = max(LEFT + len(towers) * (SIDE + GAP) - 30, 760), TOP + TALL + 90
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif" font-size="12">'
        ),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for place, (name, tower) in enumerate(towers.items()):
        parts += panel(LEFT + place * (SIDE + GAP), name, tower)
    x = LEFT
    for kind, said in NAMES.items():
        parts.append(f'<circle cx="{x + 5}" cy="{height - 18}" r="5" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="{height - 14}" fill="#1f2933">{said}</text>')
        x += 36 + 7 * len(said)
    TARGET.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
    print(TARGET.relative_to(ROOT))


def panel(left: float, name: str, tower: dict[str, Any]) -> list[str]:
    is_centred = all("centred" in text for text in tower["choices"])
    key = "centred_cosine_mean" if is_centred else "cosine_mean"
    points = [
        (point["float_over_int8"]["ratio"], max(1 - point[key], 1e-7), point) for point in tower["points"]
    ]
    lows = [point["float_over_int8"]["low"] for _, _, point in points]
    highs = [point["float_over_int8"]["high"] for _, _, point in points]
    least, most = min(lows) - 0.02, max(highs) + 0.02
    low = math.floor(math.log10(min(cost for _, cost, _ in points)))
    high = max(math.ceil(math.log10(max(cost for _, cost, _ in points))), low + 1)

    def at(speed: float, cost: float) -> tuple[float, float]:
        x = left + SIDE * (speed - least) / (most - least)
        return x, TOP + TALL * (1 - (math.log10(cost) - low) / (high - low))

    measure = "1 - centred cosine" if is_centred else "1 - cosine"
    parts = [
        f'<text x="{left}" y="26" fill="#1f2933" font-size="15" font-weight="600">{escape(name)}</text>',
        f'<text x="{left}" y="46" fill="#7b8794">{measure} on pictures that nothing was chosen on</text>',
    ]
    for power in range(low, high + 1):
        _, y = at(least, 10.0**power)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + SIDE}" y2="{y:.1f}" stroke="#e4e7eb"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" fill="#7b8794" text-anchor="end">1e{power}</text>'
        )
    step = 0.1 if most - least < 1.2 else 0.25
    tick = math.ceil(least / step) * step
    while tick <= most:
        x, _ = at(tick, 10.0**low)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + TALL}" stroke="#e4e7eb"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{TOP + TALL + 16}" fill="#7b8794" text-anchor="middle">{tick:.2f}</text>'
        )
        tick += step
    parts.append(
        f'<text x="{left + SIDE / 2}" y="{TOP + TALL + 36}" fill="#1f2933" text-anchor="middle">'
        "times as fast as float, one thread</text>"
    )
    for speed, cost, point in sorted(points, key=lambda each: each[2]["kind"] != "random"):
        x, y = at(speed, cost)
        ends = [at(point["float_over_int8"][end], cost)[0] for end in ("low", "high")]
        colour = COLOURS[point["kind"]]
        parts.append(
            f'<line x1="{ends[0]:.1f}" y1="{y:.1f}" x2="{ends[1]:.1f}" y2="{y:.1f}" stroke="{colour}"/>'
        )
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{escape(point["label"])}: '
            f"{point['kept']} in float</title></circle>"
        )
    return parts


if __name__ == "__main__":
    main()
