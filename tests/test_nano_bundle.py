"""The small embedded bundle: its size, its golden file, and the figures that docs/default-model.md quotes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeclip.bundle import Bundle
from edgeclip.runtime.parity import golden_check

LARGEST_BYTES = 7_000_000
SEEDS = 3


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("nano")


@pytest.fixture(scope="module")
def result(repo: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repo / "benchmarks/results/nano.json").read_text("utf-8"))
    return found


def test_it_is_small(bundle: Bundle) -> None:
    assert sum(bundle.file(name).stat().st_size for name in bundle.manifest.files) < LARGEST_BYTES
    assert bundle.manifest.model.parameters["image"] < 2_000_000


def test_golden_agrees(bundle: Bundle) -> None:
    report = golden_check(bundle, "onnx-int8")
    assert set(report.towers) == {"image", "text"}
    assert report.passed, {name: tower.failures for name, tower in report.towers.items()}


def test_notices_name_what_its_teacher_was_made_from(bundle: Bundle) -> None:
    notice, card = (bundle.read(name).decode() for name in bundle.manifest.model.notices)
    for word in ("WordNet 3.0", "MIT License", "Noto emoji", "EfficientNet-Lite0"):
        assert word in notice
    accuracy = bundle.manifest.variants["onnx-int8"].accuracy
    assert accuracy is not None
    assert f"top-1 {100 * accuracy['en']['top1']:.0f} % " in card


def test_committed_figures_are_of_this_model_and_two_more_seeds(
    bundle: Bundle, result: dict[str, Any]
) -> None:
    spaces = [
        model["about"]["embedding_space"]
        for model in result["models"]
        if (model["about"]["model"], model["about"]["precision"]) == ("edgeclip-nano", "int8")
    ]
    assert bundle.manifest.model.embedding_space in spaces
    assert len(set(spaces)) == SEEDS


@pytest.mark.parametrize(
    ("figure", "least"),
    [("stamps-report-en/5-way", 0.40), ("twitter-en/10-way", 0.60)],
)
def test_every_seed_reaches_what_is_asked_and_int8_loses_little(
    result: dict[str, Any], figure: str, least: float
) -> None:
    int8, fp32 = (result["figures"][f"edgeclip-nano/{precision}/{figure}"] for precision in ("int8", "fp32"))
    assert int8["models"] == fp32["models"] == SEEDS
    assert int8["least"] >= least
    assert fp32["mean"] - int8["mean"] <= 0.03
