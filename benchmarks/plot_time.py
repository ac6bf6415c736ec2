"""Draw where the time goes, from `results/cold_start.json`: docs/images/where-the-time-goes.svg.

python benchmarks/cold_start.py && python benchmarks/plot_time.py
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks/results/cold_start.json"
TARGET = ROOT / "docs/images/where-the-time-goes.svg"

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 860, 10, 30, 34, 64, 52
COLOURS = {
    "Python starts": "#9aa5b1",
    "import": "#7b8794",
    "open, compile": "#52606d",
    "decode": "#2f7ed8",
    "resize": "#6fb1fc",
    "image tower": "#e8710a",
    "labels, head": "#34a853",
}


def main() -> None:
    """Read the medians of the fresh processes and draw two bars: from nothing, and the picture alone."""
    result = json.loads(SOURCE.read_text(encoding="utf-8"))
    phase = {name: entry["p50_ms"] for name, entry in result["phases"].items()}
    stage = {name: entry["p50_ms"] for name, entry in result["stages"].items()}
    picture = {
        "decode": stage["decode"],
        "resize": stage["resize"],
        "image tower": stage["first_run"],
        "labels, head": phase["labels"] + stage["head"],
    }
    start = {
        "Python starts": phase["before import"],
        "import": phase["import"],
        "open, compile": phase["open and compile"],
    }
    megapixels = round(result["photo_px"][0] * result["photo_px"][1] / 1e6)
    bars = {
        f"from the start of the process to the first label: {sum((start | picture).values()):.0f} ms": start
        | picture,
        f"the {megapixels}-megapixel JPEG alone: {sum(picture.values()):.0f} ms": picture,
    }
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(_draw(bars), encoding="utf-8")
    print(
        TARGET.relative_to(ROOT),
        {title: {k: round(v, 1) for k, v in bar.items()} for title, bar in bars.items()},
    )


def _draw(bars: dict[str, dict[str, float]]) -> str:
    longest = max(sum(bar.values()) for bar in bars.values())
    scale = (WIDTH - LEFT - RIGHT) / longest
    height = TOP + len(bars) * (BAR + GAP) - GAP + 40
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="system-ui, sans-serif" font-size="14">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    y = TOP
    for title, bar in bars.items():
        parts.append(f'<text x="{LEFT}" y="{y - 24}" fill="#1f2933" font-weight="600">{escape(title)}</text>')
        x = float(LEFT)
        for name, value in bar.items():
            width = value * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[name]}"/>'
            )
            if width > 28:
                parts.append(
                    f'<text x="{x + width / 2:.1f}" y="{y + BAR / 2 + 5:.0f}" fill="#ffffff" '
                    f'text-anchor="middle">{value:.0f}</text>'
                )
            x += width
        y += BAR + GAP
    x = float(LEFT)
    for name, colour in COLOURS.items():
        parts.append(f'<rect x="{x:.0f}" y="{height - 26}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20:.0f}" y="{height - 14}" fill="#1f2933">{escape(name)}</text>')
        x += 36 + 8 * len(name)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
