"""The embedded bundle opens, agrees with its golden file, and knows what it says it knows. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier
from edgeclip.runtime.parity import golden_check
from edgeclip.text_encoder import open_tokenizer
from edgeclip.words import label_warnings

LARGEST_BYTES = 14_000_000
PHOTOS = {
    "cat": "cat", "dog": "dog", "koala": "koala", "panda": "panda", "castle": "castle", "crab": "crab",
    "coffee": "coffee", "bison": "bison", "sheep": "sheep", "baseball": "baseball",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("default")


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return ZeroShotClassifier.open("default")


def test_it_is_small_and_every_file_is_the_one_named(bundle: Bundle) -> None:
    assert sum(bundle.file(name).stat().st_size for name in bundle.manifest.files) < LARGEST_BYTES


def test_golden_agrees(bundle: Bundle) -> None:
    report = golden_check(bundle, "onnx-int8")
    assert set(report.towers) == {"image", "text"}
    assert report.passed, {name: tower.failures for name, tower in report.towers.items()}


def test_manifest_names_licence_parents_and_measured_numbers(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.model.licence == "Apache-2.0"
    assert {parent["licence"] for parent in manifest.model.parents if isinstance(parent, dict)} == {
        "Apache-2.0",
        "CC0-1.0",
        "MIT",
        "WordNet-3.0",
    }
    assert manifest.model.languages == ("en", "zh")
    variant = manifest.variants["onnx-int8"]
    assert {parity.status for parity in variant.parity.values()} == {"passed"}
    assert variant.accuracy is not None
    assert variant.accuracy["en"]["n"] == 141
    # Its weights fit the 16-bit sums of AVX2, so that no setting has to keep them right there.
    assert variant.session_config == {}
    assert variant.calibration["scheme"]["fit_pairs"]
    assert b"WordNet" in bundle.read(manifest.model.notices[0])


def test_photographs_are_known_in_english_and_chinese(classifier: ZeroShotClassifier, repo: Path) -> None:
    photos = repo / "edgeclip/assets/photos"
    classifier.set_labels(list(PHOTOS.values()))
    for file, label in PHOTOS.items():
        assert classifier.classify(photos / f"{file}.jpg", top_k=1)[0].label == label
    classifier.set_labels(["猫", "狗", "城堡", "螃蟹", "咖啡"], templates="zh")
    for file, label in (
        ("cat", "猫"),
        ("dog", "狗"),
        ("castle", "城堡"),
        ("crab", "螃蟹"),
        ("coffee", "咖啡"),
    ):
        assert classifier.classify(photos / f"{file}.jpg", top_k=1)[0].label == label


@pytest.mark.parametrize("labels", [["gato", "perro"], ["кошка"]])
def test_labels_it_does_not_know_are_warned_about(bundle: Bundle, labels: list[str]) -> None:
    assert label_warnings(labels, bundle.manifest.model.languages, open_tokenizer(bundle))


@pytest.mark.parametrize("labels", [["cat", "dog"], ["猫"], ["Golden Retriever", "traffic light"]])
def test_labels_it_knows_are_not(bundle: Bundle, labels: list[str]) -> None:
    assert not label_warnings(labels, bundle.manifest.model.languages, open_tokenizer(bundle))


def test_results_behind_the_figures_are_committed(repo: Path, bundle: Bundle) -> None:
    """What docs/default-model.md quotes: one row a picture, made with these very towers.

    The head that rejects came later; the bundle says of which one its towers, banks and temperature are.
    """
    result = json.loads((repo / "benchmarks/results/default_model.json").read_text("utf-8"))
    assert result["bundle"]["digest"] in (bundle.digest, bundle.manifest.provenance["towers_of"])
    shipped = result["forms"]["onnx-int8"]
    pictures = [row for half in ("tune", "report") for row in shipped["rows"][half]["stamps en"]]
    assert len(pictures) == 271
    accuracy = bundle.manifest.variants["onnx-int8"].accuracy
    assert accuracy is not None
    figure = shipped["figures"]["report"]["stamps en all top-1"]
    assert figure["value"] == pytest.approx(100 * accuracy["en"]["top1"], abs=0.01)
