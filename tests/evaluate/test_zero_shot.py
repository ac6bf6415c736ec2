from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, SIDE_PX, colour_picture

from edgeclip.bundle import PreprocessSpec
from edgeclip.classify import ZeroShotClassifier
from edgeclip.data import Sample
from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.metrics import top_k_accuracy, wilson_interval
from edgeclip.evaluate.zero_shot import (
    NamedConfusion,
    evaluate_classifier,
    evaluate_embedder,
    evaluate_zero_shot,
)
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.preprocess import Preprocess

NAMES = tuple(COLOURS)


def _rows(n: int, classes: int, *, noise: float = 1.4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    texts = random.normal(size=(classes, 16))
    targets = random.integers(0, classes, n)
    return texts[targets] + noise * random.normal(size=(n, 16)), texts, targets


# --- embeddings --------------------------------------------------------------------------------------------


def test_a_report_by_hand() -> None:
    images = np.array([[1.0, 0.1], [0.1, 1.0], [0.2, 1.0], [5.0, 0.0]])
    report = evaluate_zero_shot(
        images, np.eye(2), ["x", "y", "x", "x"], labels=["x", "y"], groups=["a", None, "a", "b"]
    )
    assert (report.n, report.labels) == (4, 2)
    assert report.top1.value == 0.75
    assert (report.top1.low, report.top1.high) == wilson_interval(3, 4)
    assert report.top5.value == 1.0
    assert report.mean_per_class_recall == pytest.approx((2 / 3 + 1) / 2)
    assert report.calibration_error is None
    assert {name: (each.value, each.n) for name, each in report.groups.items()} == {
        "a": (0.5, 2),
        "b": (1.0, 1),
    }
    assert report.confusions == (NamedConfusion("x", "y", 1, 3),)


def test_a_report_agrees_with_the_metrics_whatever_the_length_of_rows() -> None:
    images, texts, targets = _rows(3000, 40)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    for stretch in (1.0, 7.0):
        report = evaluate_zero_shot(stretch * images, texts, targets)
        assert report.top1.value == top_k_accuracy(unit[0] @ unit[1].T, targets)
        assert report.top5.value == top_k_accuracy(unit[0] @ unit[1].T, targets, k=5)
        assert 0.5 < report.top1.value < report.top5.value < 1


def test_targets_may_be_numbers_or_names_and_labels_a_bank() -> None:
    images, texts, targets = _rows(50, 5)
    unit = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    bank = LabelBank(
        labels=LabelSet.of(list("abcde")), embeddings=unit, templates=Templates.of("{}"), space=""
    )
    names = ["abcde"[target] for target in targets]
    report = evaluate_zero_shot(images.astype(np.float32), bank, names)
    numbered = evaluate_zero_shot(images.astype(np.float32), unit, targets)
    assert report.top1 == numbered.top1
    assert report.confusions[0].target in "abcde"
    assert numbered.confusions[0].target in "01234"


def test_scale_gives_a_calibration_error() -> None:
    images, texts, targets = _rows(2000, 10)
    cold, warm = (evaluate_zero_shot(images, texts, targets, scale=scale) for scale in (100.0, 10.0))
    assert cold.calibration_error is not None
    assert warm.calibration_error is not None
    assert cold.top1 == warm.top1
    # at 1 / scale of 0 every score is 1, so that the error is the share of wrong ones
    assert cold.calibration_error == pytest.approx(1 - cold.top1.value, abs=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_embeddings": np.eye(3)}, "image embeddings have 2 dimensions and text embeddings 3"),
        ({"targets": [0, 2]}, "targets: entry 1 is 2, expected 0 to 1"),
        ({"targets": [0]}, "got 2 pictures, 1 targets and 2 groups"),
        ({"targets": [0.0, 1.0]}, "targets: got shape .* of float64"),
        (
            {"targets": ["x", "z"], "labels": ["x", "y"]},
            "picture 1 has the label 'z', .* among the 2 offered",
        ),
        ({"labels": ["x"]}, "got 1 names for 2 labels"),
        ({"groups": ["a"]}, "2 targets and 1 groups"),
        ({"image_embeddings": np.zeros((2, 2))}, "image embeddings: row 0 is zero"),
        ({"image_embeddings": np.full((2, 2), np.nan)}, "image embeddings: row 0 is not finite"),
        ({"image_embeddings": np.empty((0, 2)), "targets": []}, "got no picture that can be read"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, object], words: str) -> None:
    given = {"image_embeddings": np.eye(2), "text_embeddings": np.eye(2), "targets": [0, 1]}
    with pytest.raises(InputError, match=words):
        evaluate_zero_shot(**(given | change))  # type: ignore[arg-type]


def test_a_confidence_out_of_range_is_an_error() -> None:
    with pytest.raises(ConfigError, match="confidence: got 2"):
        evaluate_zero_shot(np.eye(2), np.eye(2), [0, 1], confidence=2)


def test_a_report_is_json_and_a_table() -> None:
    images, texts, targets = _rows(100, 4)
    groups = ["day" if target % 2 else "night" for target in targets]
    report = evaluate_zero_shot(images, texts, targets, labels=list("abcd"), groups=groups, scale=20.0)
    said = json.loads(json.dumps(report.to_dict()))
    assert said["schema"] == 1
    assert said["n"] == 100
    assert said["top1"] == {
        "value": report.top1.value,
        "low": report.top1.low,
        "high": report.top1.high,
        "n": 100,
        "confidence": 0.95,
    }
    assert set(said["groups"]) == {"day", "night"}
    assert set(said["confusions"][0]) == {"target", "predicted", "count", "of"}
    lines = report.to_table().splitlines()
    assert lines[0] == "100 pictures, 4 labels offered"
    assert lines[1] == (
        f"top-1                  {report.top1.value:6.1%}  "
        f"({report.top1.low:.1%} to {report.top1.high:.1%}, 95% interval)"
    )
    assert any(line.startswith("  night  ") for line in lines)
    assert any(" -> " in line for line in lines)


# --- an open classifier ------------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    found = []
    for name in NAMES:
        for seed in range(3):
            path = tmp_path / f"{name}-{seed}.png"
            Image.fromarray(colour_picture(name, seed=seed)).save(path)
            found.append(Sample(path.name, path, label=name))
    return found


@pytest.fixture
def classifier(tiny_bundle_session: Path) -> Iterator[ZeroShotClassifier]:
    with ZeroShotClassifier.open(tiny_bundle_session, variant="onnx-fp32") as opened:
        opened.set_labels(NAMES)
        yield opened


def test_a_classifier_is_evaluated_with_its_labels_and_head(
    classifier: ZeroShotClassifier, samples: list[Sample]
) -> None:
    done: list[int] = []
    report = evaluate_classifier(
        classifier, samples, groups=lambda sample: sample.key[-5], progress=done.append
    )
    assert (report.n, report.labels) == (24, 8)
    assert report.top1.value == 1.0
    assert report.calibration_error is not None
    assert {name: each.n for name, each in report.groups.items()} == {"0": 8, "1": 8, "2": 8}
    assert done == list(range(1, 25))


def test_pictures_in_memory_are_let_go(classifier: ZeroShotClassifier, samples: list[Sample]) -> None:
    alive = weakref.WeakSet[Sample]()
    most = 0

    def stream() -> Iterator[Sample]:
        nonlocal most
        for number, sample in enumerate(samples * 4):
            assert isinstance(sample.source, Path)
            held = Sample(str(number), sample.source.read_bytes(), label=sample.label)
            alive.add(held)
            most = max(most, len(alive))
            yield held

    assert evaluate_classifier(classifier, stream(), batch_size=2, workers=1).n == 4 * len(samples)
    assert most < len(samples)


def test_a_classifier_and_its_embeddings_give_one_report(
    classifier: ZeroShotClassifier, samples: list[Sample]
) -> None:
    classifier.set_labels(NAMES[::-1])
    ours = evaluate_classifier(classifier, samples, batch_size=5)
    theirs = evaluate_zero_shot(
        classifier.embed_images([sample.source for sample in samples]),
        classifier.bank,
        [str(sample.label) for sample in samples],
        scale=classifier.bundle.manifest.model.scale,
    )
    assert ours.top1 == theirs.top1
    assert ours.top5 == theirs.top5
    assert ours.calibration_error == pytest.approx(theirs.calibration_error, abs=1e-5)


def test_a_picture_that_cannot_be_read_is_skipped_and_named(
    classifier: ZeroShotClassifier, samples: list[Sample]
) -> None:
    broken = Sample("broken.png", b"no picture", label="red")
    report = evaluate_classifier(classifier, [broken, *samples])
    assert report.n == len(samples)
    assert report.top1.value == 1.0
    assert [key for key, _ in report.skipped] == ["broken.png"]
    assert "1 pictures could not be read, first 'broken.png': " in report.to_table()
    assert report.to_dict()["skipped"][0]["key"] == "broken.png"
    with pytest.raises(InputError, match="no picture that can be read; the first of 1 that could not"):
        evaluate_classifier(classifier, [broken])


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (None, "picture 'x' has no label"),
        ("mauve", "has the label 'mauve', which is not among the 8 offered"),
    ],
)
def test_a_picture_without_an_offered_label_is_an_error(
    label: str | None, words: str, classifier: ZeroShotClassifier, samples: list[Sample]
) -> None:
    stray = Sample("x", samples[0].source, label=label)
    with pytest.raises(InputError, match=words):
        evaluate_classifier(classifier, [*samples, stray])
    with pytest.raises(InputError, match=words):
        evaluate_embedder(len, [stray], np.eye(8), labels=NAMES)  # type: ignore[arg-type]


# --- any embedder ------------------------------------------------------------------------------------------

SPEC = PreprocessSpec(
    image_size_px=(SIDE_PX, SIDE_PX),
    resize="squash",
    interpolation="bilinear",
    crop="none",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    applied="graph",
)


def _centred(colours: np.ndarray) -> np.ndarray:
    """Return colours as directions: what a bank of colours needs to tell them apart."""
    return np.concatenate([colours / 255 - 0.5, np.full((len(colours), 1), 0.2)], axis=1)


BANK = _centred(np.array(list(COLOURS.values()), float))


def test_any_function_of_pixels_can_be_evaluated(samples: list[Sample]) -> None:
    batches: list[tuple[int, ...]] = []

    def embed(pictures: np.ndarray) -> np.ndarray:
        assert pictures.dtype == np.uint8
        batches.append(pictures.shape)
        return _centred(pictures.mean(axis=(1, 2)))

    done: list[int] = []
    broken = Sample("broken.png", b"no picture", label="red")
    report = evaluate_embedder(
        embed,
        [*samples, broken],
        BANK,
        labels=NAMES,
        preprocess=Preprocess(SPEC),
        batch_size=10,
        scale=20.0,
        groups=lambda sample: sample.label,
        progress=done.append,
    )
    assert report.top1.value == 1.0
    assert (report.n, report.labels, len(report.groups)) == (24, 8, 8)
    assert batches == [(10, SIDE_PX, SIDE_PX, 3), (10, SIDE_PX, SIDE_PX, 3), (4, SIDE_PX, SIDE_PX, 3)]
    assert done == [10, 20, 25]
    assert [key for key, _ in report.skipped] == ["broken.png"]


def test_without_preprocess_the_function_reads_the_pictures(samples: list[Sample]) -> None:
    def embed(sources: list[Path]) -> np.ndarray:
        return _centred(np.stack([np.asarray(Image.open(path)).mean(axis=(0, 1)) for path in sources]))

    assert evaluate_embedder(embed, samples, BANK, labels=NAMES).top1.value == 1.0


def test_an_embedder_of_the_wrong_shape_is_an_error(samples: list[Sample]) -> None:
    with pytest.raises(InputError, match=r"embedding 24 pictures gave shape \(7, 4\), expected \(24, E\)"):
        evaluate_embedder(lambda sources: np.ones((7, 4)), samples, BANK, labels=NAMES)
    with pytest.raises(InputError, match="got no names of labels"):
        evaluate_embedder(lambda sources: np.ones((7, 4)), samples, BANK)
    with pytest.raises(InputError, match="no picture that can be read"):
        evaluate_embedder(lambda sources: np.ones((7, 4)), [], BANK, labels=NAMES)
