"""What a measurement of sensitivity says: as JSON, as a table, and as a picture.

The picture is one SVG: the cost of each product on a logarithmic scale, in the order of the graph, with what
stays float in another colour; beside it the choices that were tried, accuracy against time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from edgeclip.calibration.latency_table import LatencyTable
from edgeclip.calibration.sensitivity import Choice, Sensitivity
from edgeclip.labels import make_folder, write_atomic
from edgeclip.quantization import Scheme
from edgeclip.runtime.host import Host, versions
from edgeclip.tables import aligned

__all__ = ["SensitivityReport"]

_INT8, _FLOAT, _INK, _PALE, _GRID = "#2f7ed8", "#e8710a", "#1f2933", "#7b8794", "#e4e7eb"
_LEAST: Final = 1e-8  # below it float32 embeddings say nothing
_HEIGHT, _TOP, _BOTTOM, _LEFT = 350, 72, 120, 64
_PLOT: Final = 190  # of the second panel's height and width


@dataclass(frozen=True)
class SensitivityReport:
    """Sensitivity of one tower, and what was chosen by it.

    Attributes:
        model: name of the model.
        tower: ``"image"`` or ``"text"``.
        variant: what it was measured for, such as ``"onnx-int8@x86-avx2"``.
        scheme: what int8 means there.
        sensitivity: what was measured.
        latency: times of the products.
        choice: what stays float; ``None`` where no target was given.
        seconds: what the measurement took, by step.
    """

    model: str
    tower: str
    variant: str
    scheme: Scheme
    sensitivity: Sensitivity
    latency: LatencyTable
    choice: Choice | None
    seconds: dict[str, float]

    @property
    def _named(self) -> str:
        return f"{self.model}, {self.tower} tower" if self.model else f"{self.tower} tower"

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.variant}-{self.tower}"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write the JSON document and the picture, and return where they are.

        Raises:
            InputError: the folder cannot be made or written.
        """
        make_folder(folder)
        document, picture = folder / f"{self.stem}.json", folder / f"{self.stem}.svg"
        for path, text in ((document, json.dumps(self.to_dict(), indent=1)), (picture, self.to_svg())):
            write_atomic(path, f"{text}\n".encode())
        return document, picture

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "schema": 1,
            "kind": "sensitivity",
            "model": self.model,
            "tower": self.tower,
            "variant": self.variant,
            "scheme": self.scheme.to_dict(),
            "sensitivity": self.sensitivity.to_dict(),
            "latency": self.latency.to_dict(),
            "choice": None if self.choice is None else self.choice.to_dict(),
            "seconds": self.seconds,
            "host": Host.here().to_dict(),
            "versions": versions(),
        }

    # --- text ----------------------------------------------------------------------------------------------

    def to_table(self, *, most: int = 20) -> str:
        """Return the worst products, the blocks and the choice as text."""
        found = self.sensitivity
        lines = [
            (
                f"{self._named}, {self.variant}: int8 measured on {found.rows} rows in "
                f"{sum(self.seconds.values()):.0f} s"
            ),
            f"times: {self.latency.source}",
            "",
        ]
        kept = {} if self.choice is None else self.choice.keep_float
        rows: list[tuple[str, ...]] = [("1-cosine", "flips", "ms", "int8", "share", "product", "block", "")]
        rows += [
            (*self._numbers(name), name, found.block_of[name], "float" if name in kept else "")
            for name in found.worst()[:most]
        ]
        lines += aligned(rows, range(5))
        if len(found.nodes) > most:
            lines.append(f"and {len(found.nodes) - most} more")
        blocks = sorted(found.blocks, key=lambda name: -found.blocks[name].cosine)
        rows = [("1-cosine", "flips", "block")]
        rows += [(*_cost(found.blocks[name]), name) for name in blocks[:most]]
        rows.append((*_cost(found.everything), "everything"))
        lines += ["", *aligned(rows, range(2)), ""]
        return "\n".join([*lines, *self._said()]).rstrip()

    def _numbers(self, name: str) -> tuple[str, ...]:
        time = self.latency.nodes.get(name)
        total = self.latency.float_ms
        share = "-" if time is None or not total else f"{time.float_ms / total:.1%}"
        times = ("-", "-") if time is None else (f"{time.float_ms:.3f}", f"{time.int8_ms:.3f}")
        return (*_cost(self.sensitivity.nodes[name]), *times, share)

    def _said(self) -> list[str]:
        choice = self.choice
        if choice is None:
            return []
        numbers = choice.measured
        top1 = "" if numbers.top1_agreement is None else f", top-1 {numbers.top1_agreement:.1%}"
        lines = [
            (
                f"{choice.target}: {len(choice.keep_float)} of {len(choice.nodes)} products stay float; "
                f"cosine {numbers.cosine_mean:.5f}{top1} in the real graph"
            ),
            (
                f"int8 saves {choice.gain_ms:.3f} of {choice.possible_ms:.3f} ms"
                if choice.possible_ms > 0
                else "by these times int8 saves nothing"
            ),
        ]
        lines += [f"  {name}: {reason}" for name, reason in choice.keep_float.items()]
        return lines

    # --- picture -------------------------------------------------------------------------------------------

    def to_svg(self) -> str:
        """Return the picture."""
        bars, width = self._bars()
        points = [] if self.choice is None else self._points(width + 40)
        whole = width + (40 + _PLOT + 60 if points else 0)
        found = self.sensitivity.everything
        kept = (
            ""
            if self.choice is None
            else f"; {self.choice.target} keeps {len(self.choice.keep_float)} in float"
        )
        title = f"{self._named}: what int8 costs each product"
        said = f"1 - cosine of the embedding, one product in int8 at a time; all: {found.cosine:.1e}{kept}"
        parts = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {_HEIGHT}" width="{whole}" '
                f'height="{_HEIGHT}" font-family="system-ui, sans-serif" font-size="11">'
            ),
            f'<rect width="{whole}" height="{_HEIGHT}" fill="#ffffff"/>',
            _text(_LEFT, 22, title, size=15, weight=600),
            _text(_LEFT, 40, said, fill=_PALE, size=12),
        ]
        return "\n".join([*parts, *bars, *points, "</svg>"])

    def _bars(self) -> tuple[list[str], int]:
        nodes = self.sensitivity.nodes
        kept = {} if self.choice is None else self.choice.keep_float
        step = max(4, min(16, 720 // len(nodes)))
        width = max(_LEFT + step * len(nodes) + 20, 620)
        costs = {name: max(cost.cosine, _LEAST) for name, cost in nodes.items()}
        low = math.floor(math.log10(min(costs.values())))
        high = max(math.ceil(math.log10(max(costs.values()))), low + 1)
        base, tall = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP
        parts = []
        for power in range(low, high + 1):
            y = base - tall * (power - low) / (high - low)
            parts.append(_line(_LEFT, y, width - 20, y, _GRID))
            parts.append(_text(_LEFT - 8, y + 4, f"1e{power}", fill=_PALE, anchor="end"))
        before, start = "", 0
        names = [*nodes, ""]
        for place, name in enumerate(names):
            block = self.sensitivity.block_of[name] if name else ""
            if block != before:
                if before:
                    middle = _LEFT + (start + place) / 2 * step
                    parts.append(_turned(middle, base + 14, _shortened(before)))
                if place:
                    parts.append(_line(_LEFT + place * step, _TOP, _LEFT + place * step, base + 4, _GRID))
                before, start = block, place
            if not name:
                continue
            height = max(1.0, tall * (math.log10(costs[name]) - low) / (high - low))
            colour = _FLOAT if name in kept else _INT8
            parts.append(
                f'<rect x="{_LEFT + place * step}" y="{base - height:.1f}" width="{step - 1}" '
                f'height="{height:.1f}" fill="{colour}"><title>{escape(name)} ({escape(block)}): '
                f"{nodes[name].cosine:.2e}</title></rect>"
            )
        for place, (colour, label) in enumerate(((_INT8, "int8"), (_FLOAT, "stays float"))):
            x = _LEFT + 90 * place
            parts.append(f'<rect x="{x}" y="{base + 96}" width="10" height="10" fill="{colour}"/>')
            parts.append(_text(x + 16, base + 105, label))
        return parts, width

    def _points(self, left: int) -> list[str]:
        assert self.choice is not None
        points = self.choice.curve
        base, tall = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP
        costs = [max(1 - point.cosine, _LEAST) for point in points]
        low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
        high = max(high, low + 1)
        losses = [point.lost_ms for point in points]
        least, most = min(0.0, *losses), max(*losses, 1e-6) if len(losses) > 1 else (losses[0] or 1e-6)
        most = max(most, least + 1e-6)

        def at(lost: float, cost: float) -> tuple[float, float]:
            x = left + _PLOT * (lost - least) / (most - least)
            return x, base - tall * (math.log10(cost) - low) / (high - low)

        parts = [_text(left, _TOP - 6, "choices that were tried", weight=600)]
        for power in range(low, high + 1):
            _, y = at(least, 10.0**power)
            parts.append(_line(left, y, left + _PLOT, y, _GRID))
            parts.append(_text(left - 6, y + 4, f"1e{power}", fill=_PALE, anchor="end"))
        for point, cost in zip(points, costs, strict=True):
            x, y = at(point.lost_ms, cost)
            fill = _INT8 if point.is_met else "#ffffff"
            label = f"{point.kept} in float, cosine {point.cosine:.6f}, {point.lost_ms:.3f} ms not saved"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{_INT8}"><title>'
                f"{escape(label)}</title></circle>"
            )
        lost = math.fsum(
            self.latency.nodes[name].gain_ms for name in self.choice.keep_float if name in self.latency.nodes
        )
        x, y = at(min(max(lost, least), most), max(1 - self.choice.simulated.cosine_mean, _LEAST))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{_FLOAT}" stroke-width="2"/>'
        )
        parts.append(_text(left, base + 16, f"{least:.2f}", fill=_PALE))
        parts.append(_text(left + _PLOT, base + 16, f"{most:.2f}", fill=_PALE, anchor="end"))
        parts.append(_text(left + _PLOT / 2, base + 32, "ms that int8 does not save", anchor="middle"))
        parts.append(_text(left, base + 49, "filled: reaches the target; ringed: chosen", fill=_PALE))
        return parts


def _cost(cost: Any) -> tuple[str, str]:
    return f"{cost.cosine:.2e}", "-" if cost.flips is None else f"{cost.flips:.1%}"


def _shortened(name: str) -> str:
    return name if len(name) <= 18 else f"…{name[-17:]}"


def _turned(x: float, y: float, text: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" transform="rotate(-40 {x:.1f} {y:.1f})"'
    return f'<text {place} fill="{_PALE}" font-size="10" text-anchor="end">{escape(text)}</text>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    fill: str = _INK,
    size: int | None = None,
    weight: int | None = None,
    anchor: str | None = None,
) -> str:
    said = {"font-size": size, "font-weight": weight, "text-anchor": anchor}
    more = "".join(f' {name}="{value}"' for name, value in said.items() if value is not None)
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{more}>{escape(text)}</text>'
