"""Draw how long a picture takes with each tool, from `results/peers.json`: docs/images/peers.svg.

Panels: a 12-megapixel JPEG to its label in a process that is warm, and from the start of a process to its
first label. The tables of README.md and docs/peers.md are put in their places there, between comments.

python benchmarks/peers/jpeg_to_label.py --work ~/peers && python benchmarks/plot_peers.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from peer_table import bars_table, peers_table, rows_of

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks/results/peers.json"
TARGET = ROOT / "docs/images/peers.svg"

WIDTH, LEFT, RIGHT, TOP, BAR, GAP, PANEL = 900, 340, 90, 66, 20, 9, 74
OURS, OTHERS, INK, SOFT, LINE = "#e8710a", "#9aa5b1", "#1f2933", "#616e7c", "#1f2933"


def panels(document: Mapping[str, Any]) -> list[tuple[str, str, float, dict[str, Mapping[str, Any]]]]:
    """Return title, unit, factor and rows of each panel."""
    scenes = document["scenes"]
    found = []
    for title, scene, unit, factor, same in (
        ("12-megapixel JPEG to label, MobileCLIP2-S0, the same weights for all", "large", "ms", 1.0, True),
        (
            "12-megapixel JPEG to label, ViT-B/32, for tools that have no MobileCLIP2",
            "ViT-B/32",
            "ms",
            1.0,
            False,
        ),
        ("start of a process to its first label, MobileCLIP2-S0", "start", "s", 1e-3, True),
    ):
        taken = scenes.get(scene, {}).get("subjects", {})
        rows = {name: taken[name] for name in rows_of(document, same_weights=same) if name in taken}
        if rows:
            ordered = dict(sorted(rows.items(), key=lambda row: -row[1]["p50"]))
            found.append((title, unit, factor, ordered))
    return found


def draw(document: Mapping[str, Any]) -> str:
    """Return the SVG."""
    shown = panels(document)
    height = TOP + sum(len(rows) * (BAR + GAP) + PANEL for *_, rows in shown) - 20
    threads = document["scenes"].get("large", {}).get("threads", 2)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="system-ui, sans-serif" font-size="13">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(10, 24, f"Waiting for a label: {document['host']['cpu_model']}, {threads} threads", INK, 600),
        _text(
            10, 42, "medians of interleaved rounds with 95 % intervals; text embeddings cached for all", SOFT
        ),
    ]
    y = TOP + 16
    for title, unit, factor, rows in shown:
        parts.append(_text(10, y, title, INK, 600))
        y += 14
        scale = (WIDTH - LEFT - RIGHT) / max(row["p50_high"] for row in rows.values())
        for name, row in rows.items():
            parts += _row(name, document["cells"][name], row, y, scale, unit, factor)
            y += BAR + GAP
        y += PANEL - 14
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _row(
    name: str,
    cell: Mapping[str, Any],
    row: Mapping[str, Any],
    y: int,
    scale: float,
    unit: str,
    factor: float,
) -> list[str]:
    """Return one bar with its interval, its value, and what precision and JPEG mode it stands for."""
    middle, low, high = (row[key] * scale for key in ("p50", "p50_low", "p50_high"))
    centre = y + BAR / 2
    value = f"{row['p50'] * factor:.0f} {unit}" if factor == 1 else f"{row['p50'] * factor:.2f} {unit}"
    bare = name.replace(", reduced-scale JPEG", "").replace(", fast decode", "")
    mode = {"full": "full JPEG", "reduced scale": "fast JPEG"}[cell["jpeg"]]
    bare = bare.replace(", ViT-B/32", "")
    said = " · ".join([bare, *([] if cell["precision"] in bare else [cell["precision"]]), mode])
    colour = OURS if cell["ours"] else OTHERS
    return [
        _text(LEFT - 8, centre + 4, said, INK, 600 if cell["ours"] else 400, anchor="end", size=11.5),
        f'<rect x="{LEFT}" y="{y}" width="{middle:.1f}" height="{BAR}" fill="{colour}"/>',
        (
            f'<path d="M{LEFT + low:.1f} {centre} H{LEFT + high:.1f} M{LEFT + low:.1f} {centre - 4} v8 '
            f'M{LEFT + high:.1f} {centre - 4} v8" stroke="{LINE}" fill="none"/>'
        ),
        _text(LEFT + high + 8, centre + 4, value, INK),
    ]


def _text(
    x: float, y: float, text: str, colour: str, weight: int = 400, *, anchor: str = "start", size: float = 13
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-weight="{weight}" font-size="{size}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def main() -> None:
    """Read the result; write the drawing and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    document = json.loads(options.source.read_text(encoding="utf-8"))
    options.target.write_text(draw(document), encoding="utf-8")
    tables = {
        "same weights": peers_table(document, same_weights=True),
        "vit": peers_table(document, same_weights=False),
        "bars": bars_table(document),
    }
    for page in (ROOT / "README.md", ROOT / "docs/peers.md"):
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Return a page with new tables: they stand between ``<!-- peers: NAME -->`` and ``<!-- end -->``."""
    for name, table in tables.items():
        start, end = f"<!-- peers: {name} -->", "<!-- end -->"
        before, found, rest = text.partition(start)
        if found:
            text = f"{before}{start}\n{table}{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    main()
