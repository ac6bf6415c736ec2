"""Plots as SVG, made by hand: strips of samples, stacked bars, and points with an accuracy.

A plot is a string without scripts, styles of its own or anything from elsewhere: colours are classes that the
page around it gives a meaning (``edgeclip.bench.html``), so that the plot follows its light and dark. Names
stand on lines of their own above what they name, shortened to the room there is: nothing can run into
anything else, however long they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Bar", "Dot", "Part", "Strip", "element", "scatter_plot", "shorten", "stack_plot", "strip_plot"]

WIDTH: Final = 900
_LEFT, _RIGHT = 14, 26
_AXIS_PX: Final = 40
_FONT_PX: Final = 13
_DOTS: Final = 500  # a strip: more cannot be told apart and make pages heavy
_LOG_FROM: Final = 12.0  # times between the least and the most, from which on an axis is logarithmic


@dataclass(frozen=True)
class Strip:
    """One row of samples.

    Attributes:
        name: above the row.
        note: at the right end of the name's line.
        samples: as many as there are.
        marks: values by what they are called, such as ``p50``; drawn as ticks, least first.
        interval: of the first mark.
    """

    name: str
    note: str
    samples: Sequence[float]
    marks: Mapping[str, float]
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Part:
    """A piece of a bar; ``kind`` is the class of its colour."""

    kind: str
    value: float


@dataclass(frozen=True)
class Bar:
    """One stacked bar; ``mark`` is a value to draw a line at, measured by itself."""

    name: str
    note: str
    parts: Sequence[Part]
    mark: float | None = None


@dataclass(frozen=True)
class Dot:
    """One point: ``area`` is proportional to what its circle covers, ``best`` that no other beats it."""

    name: str
    tag: str
    x: float
    y: float
    area: float
    best: bool
    low: float | None = None
    high: float | None = None


# --- parts of a drawing ------------------------------------------------------------------------------------


def element(tag: str, *children: str, **attributes: object) -> str:
    """Return an element: attributes are escaped, children are markup already.

    Underscores of names are hyphens, one at the end is dropped (``class_``). Numbers have one digit.
    """
    words = [tag]
    for name, value in attributes.items():
        said = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        words.append(f'{name.rstrip("_").replace("_", "-")}="{escape(said, quote=True)}"')
    opening = " ".join(words)
    return f"<{opening}>{''.join(children)}</{tag}>" if children else f"<{opening}/>"


def _text(said: str, *, x: float, y: float, class_: str = "ink", anchor: str = "start") -> str:
    return element("text", escape(said), x=x, y=y, class_=class_, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _drawing(title: str, height: float, parts: Sequence[str]) -> str:
    return element(
        "svg",
        element("title", escape(title)),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {math.ceil(height)}",
        role="img",
        font_size=_FONT_PX,
    )


def text_width(said: str) -> float:
    """Return how many pixels a text takes at most, in the sans-serif fonts of common systems."""
    return sum(_FONT_PX * (1.02 if ord(c) > 0x2E7F else 0.9 if c in "mwMW@%" else 0.62) for c in said)


def shorten(said: str, width: float) -> str:
    """Return a text that fits, its middle left out: names differ at their ends."""
    if text_width(said) <= width:
        return said
    keep = len(said) - 1
    while keep > 2 and text_width(said[: keep - keep // 2] + "…" + said[len(said) - keep // 2 :]) > width:
        keep -= 1
    return said[: keep - keep // 2] + "…" + said[len(said) - keep // 2 :]


class _Axis:
    """A horizontal or vertical axis: from values to pixels, with round ticks."""

    def __init__(self, low: float, high: float, start_px: float, end_px: float, *, log: bool = False) -> None:
        self.log = log
        self._start_px, self._end_px = start_px, end_px
        self._low, self._high = (math.log(low), math.log(high)) if log else (low, high)
        self.ticks = _log_ticks(low, high) if log else _ticks(low, high)

    def __call__(self, value: float) -> float:
        at = math.log(max(value, 1e-12)) if self.log else value
        share = (at - self._low) / ((self._high - self._low) or 1.0)
        return self._start_px + min(1.0, max(0.0, share)) * (self._end_px - self._start_px)


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 7)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    found = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    inside = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    decades = [tick for tick in inside if f"{tick:e}".startswith("1.000")]
    return decades if len(inside) > 9 and len(decades) > 1 else inside


def _said(tick: float) -> str:
    return f"{tick:,.0f}" if abs(tick) >= 1000 else f"{tick:g}"


def _bottom(axis: _Axis, top: float, bottom: float, label: str) -> list[str]:
    """Return grid lines, their numbers below, and what the axis is."""
    parts = []
    for tick in axis.ticks:
        x = axis(tick)
        parts.append(_line(x, top, x, bottom, "grid"))
        parts.append(_text(_said(tick), x=x, y=bottom + 16, class_="soft", anchor="middle"))
    parts.append(_text(label, x=WIDTH - _RIGHT, y=bottom + 34, class_="soft", anchor="end"))
    return parts


def _headline(name: str, note: str, y: float) -> list[str]:
    room = WIDTH - _LEFT - _RIGHT - text_width(note) - 20
    title = element("title", escape(name))
    short = escape(shorten(name, room))
    return [
        element("text", title, short, x=_LEFT, y=y, class_="ink name"),
        _text(note, x=WIDTH - _RIGHT, y=y, class_="soft", anchor="end"),
    ]


# --- plots -------------------------------------------------------------------------------------------------


def strip_plot(rows: Sequence[Strip], *, title: str, label: str) -> str:
    """Return one strip a row: a dot a sample, ticks at its marks, a bar for the interval of the first."""
    values = [value for row in rows for value in row.samples if value > 0]
    least, most = min(values, default=1.0), max(values, default=1.0)
    log = most / least > _LOG_FROM
    axis = _Axis(least * 0.9 if log else 0.0, most * (1.1 if log else 1.04), _LEFT, WIDTH - _RIGHT, log=log)
    row_px, strip_px = 74, 26
    height = 6 + row_px * len(rows) + _AXIS_PX
    bottom = height - _AXIS_PX
    parts = _bottom(axis, 4, bottom, f"{label}, logarithmic" if log else label)
    for place, row in enumerate(rows):
        top = 6 + place * row_px
        parts += _headline(row.name, row.note, top + 14)
        middle = top + 22 + strip_px / 2
        parts += [
            element("circle", cx=axis(value), cy=middle + offset * strip_px, r=2.2, class_="dot")
            for value, offset in _spread(row.samples)
        ]
        if row.interval is not None:
            low, high = (axis(end) for end in row.interval)
            parts.append(
                element("rect", x=low, y=middle - 7, width=max(high - low, 1.0), height=14, class_="between")
            )
        free_from = -math.inf  # names of marks that would run into each other are left out
        for name, value in row.marks.items():
            x = axis(value)
            parts.append(_line(x, middle - strip_px / 2 - 2, x, middle + strip_px / 2 + 2, "mark"))
            half = text_width(name) / 2 + 2
            at = min(max(x, _LEFT + half), WIDTH - _RIGHT - half)
            if at - half >= free_from:
                parts.append(
                    _text(name, x=at, y=middle + strip_px / 2 + 14, class_="ink small", anchor="middle")
                )
                free_from = at + half
    return _drawing(title, height, parts)


def _spread(samples: Sequence[float]) -> list[tuple[float, float]]:
    """Return values with a place across the strip, from -0.5 to 0.5; the same for the same samples.

    Where there are very many, every k-th of the sorted ones, with the least and the largest.
    """
    ordered = sorted(samples)
    if len(ordered) > _DOTS:
        step = (len(ordered) - 1) / (_DOTS - 1)
        ordered = [ordered[round(step * n)] for n in range(_DOTS)]
    golden = (math.sqrt(5) - 1) / 2
    return [(value, (n * golden) % 1.0 - 0.5) for n, value in enumerate(ordered)]


def stack_plot(
    bars: Sequence[Bar], kinds: Mapping[str, str], *, title: str, label: str, mark_label: str = ""
) -> str:
    """Return stacked bars with a legend.

    Args:
        bars: from the top.
        kinds: what a class of colour is called, in the order of the legend.
        title: for those who cannot see it.
        label: of the axis.
        mark_label: what the marks are.
    """
    most = max((max(sum(part.value for part in bar.parts), bar.mark or 0.0) for bar in bars), default=1.0)
    axis = _Axis(0.0, (most or 1.0) * 1.02, _LEFT, WIDTH - _RIGHT)
    used = {part.kind for bar in bars for part in bar.parts}
    legend, legend_px = _legend({kind: said for kind, said in kinds.items() if kind in used}, mark_label)
    bar_px, row_px = 24, 56
    height = legend_px + row_px * len(bars) + _AXIS_PX
    bottom = height - _AXIS_PX
    parts = [*legend, *_bottom(axis, legend_px, bottom, label)]
    for place, bar in enumerate(bars):
        top = legend_px + place * row_px
        parts += _headline(bar.name, bar.note, top + 14)
        total = 0.0
        for part in bar.parts:
            x, end = axis(total), axis(total + part.value)
            total += part.value
            said = f"{part.value:.1f}" if most < 100 else f"{part.value:,.0f}"
            parts.append(
                element(
                    "rect",
                    element("title", escape(f"{kinds.get(part.kind, part.kind)}: {part.value:.2f}")),
                    x=x, y=top + 21, width=max(end - x, 0.0), height=bar_px, class_=f"fill-{part.kind}",
                )
            )  # fmt: skip
            if end - x > text_width(said) + 8:
                parts.append(
                    _text(
                        said, x=(x + end) / 2, y=top + 21 + bar_px / 2 + 5, class_=f"on-{part.kind}",
                        anchor="middle",
                    )
                )  # fmt: skip
        if bar.mark is not None:
            x = axis(bar.mark)
            parts.append(_line(x, top + 18, x, top + 24 + bar_px, "mark"))
    return _drawing(title, height, parts)


def _legend(kinds: Mapping[str, str], mark_label: str) -> tuple[list[str], float]:
    """Return swatches with their names in as many lines as they need, and the height of that."""
    parts: list[str] = []
    x, y = float(_LEFT), 8.0
    for kind, said in [*kinds.items(), *([("", mark_label)] if mark_label else [])]:
        width = 20 + text_width(said) + 18
        if x + width > WIDTH - _RIGHT and x > _LEFT:
            x, y = float(_LEFT), y + 22
        if kind:
            parts.append(element("rect", x=x, y=y, width=13, height=13, rx=2, class_=f"fill-{kind}"))
        else:
            parts.append(_line(x + 6, y - 2, x + 6, y + 15, "mark"))
        parts.append(_text(said, x=x + 19, y=y + 11))
        x += width
    return parts, y + 28


def scatter_plot(dots: Sequence[Dot], *, title: str, x_label: str, y_label: str) -> str:
    """Return points, the tag of each in a lane above the plot with a line to it: tags never overlap."""
    xs, lows = [dot.x for dot in dots], [dot.y if dot.low is None else dot.low for dot in dots]
    highs = [dot.y if dot.high is None else dot.high for dot in dots]
    log = max(xs) / max(min(xs), 1e-9) > _LOG_FROM
    left, lane, top, height = 66, 22, 48, 400
    bottom = height - _AXIS_PX
    across = _Axis(
        min(xs) * 0.8 if log else 0.0, max(xs) * (1.25 if log else 1.08), left, WIDTH - _RIGHT - 10, log=log
    )
    margin = max((max(highs) - min(lows)) * 0.12, 0.01)
    up = _Axis(min(lows) - margin, max(highs) + margin, bottom, top)
    parts = _bottom(across, top, bottom, f"{x_label}, logarithmic" if log else x_label)
    for tick in up.ticks:
        y = up(tick)
        parts.append(_line(left, y, WIDTH - _RIGHT - 10, y, "grid"))
        parts.append(_text(_said(tick), x=left - 8, y=y + 4, class_="soft", anchor="end"))
    parts.append(_text(y_label, x=_LEFT, y=bottom + 34, class_="soft"))
    largest = max((dot.area for dot in dots), default=0.0) or 1.0
    places = sorted(range(len(dots)), key=lambda place: (dots[place].x, dots[place].y))
    tags = _apart([across(dots[place].x) for place in places], 26, left + 10, WIDTH - _RIGHT - 20)
    for place, at in zip(places, tags, strict=True):
        x, y = across(dots[place].x), up(dots[place].y)
        parts.append(
            element("polyline", points=f"{at:.1f},{lane + 9} {x:.1f},{top} {x:.1f},{y:.1f}", class_="lead")
        )
    for dot in sorted(dots, key=lambda dot: -dot.area):
        x, y = across(dot.x), up(dot.y)
        if dot.low is not None and dot.high is not None:
            parts.append(_line(x, up(dot.low), x, up(dot.high), "whisker"))
        radius = max(4.0, 20.0 * math.sqrt(dot.area / largest))
        name = element("title", escape(dot.name))
        parts.append(
            element("circle", name, cx=x, cy=y, r=radius, class_="point best" if dot.best else "point")
        )
    for place, at in zip(places, tags, strict=True):
        dot = dots[place]
        parts.append(element("circle", cx=at, cy=lane - 2, r=11, class_="tag best" if dot.best else "tag"))
        parts.append(
            _text(
                dot.tag,
                x=at,
                y=lane + 2.5,
                class_="on-tag small" if dot.best else "ink small",
                anchor="middle",
            )
        )
    return _drawing(title, height, parts)


def _apart(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Return places close to the wanted, sorted ones, ``distance`` or more from each other, within limits."""
    if len(wanted) > 1:
        distance = min(distance, (high - low) / (len(wanted) - 1))
    found: list[float] = []
    for at in wanted:
        found.append(max(at, low, found[-1] + distance if found else low))
    over = high
    for place in range(len(found) - 1, -1, -1):
        found[place] = min(found[place], over)
        over = found[place] - distance
    return found
