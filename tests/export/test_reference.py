"""What exports compare on: always the same, never what ranges are chosen on, small enough to ship."""

from __future__ import annotations

import numpy as np
import pytest

from edgeclip.bundle import PreprocessSpec
from edgeclip.export.reference import (
    EVERYDAY,
    Expected,
    Pictures,
    Reference,
    calibration_texts,
    everyday,
    golden_tensors,
    reference_pictures,
    reference_texts,
)
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.tensors import write_tensors
from edgeclip.tokenizer import Tokenizer

SPEC = PreprocessSpec(image_size_px=(32, 32))


def test_the_photographs_are_seen_seven_ways() -> None:
    pictures = reference_pictures(SPEC)
    assert pictures.pixels.shape == (112, 32, 32, 3)
    assert len(set(pictures.names)) == 112
    assert len(pictures.whole) == 16
    assert [pictures.names[row] for row in pictures.whole[:2]] == ["baseball.jpg", "bison.jpg"]
    whole, mirrored = pictures.pixels[:2].astype(int)
    # Resizing from other ends rounds a little differently.
    assert np.abs(whole - mirrored[:, ::-1]).max() <= 2
    assert len({row.tobytes() for row in pictures.pixels}) == 112


def test_the_same_reference_has_the_same_digest_and_another_one_another() -> None:
    texts = ("a", "b")
    digest = Reference(reference_pictures(SPEC), texts).digest
    assert Reference(reference_pictures(SPEC), texts).digest == digest
    assert Reference(reference_pictures(SPEC), ("a", "c")).digest != digest
    bicubic = PreprocessSpec(image_size_px=(32, 32), interpolation="bicubic")
    assert Reference(reference_pictures(bicubic), texts).digest != digest


def test_ranges_are_not_chosen_on_what_judges_them() -> None:
    offered = everyday(("en",))
    texts = reference_texts(offered.labels, Templates.of("openai-7"), ("en",))
    assert len(calibration_texts(("en",))) == 898
    assert not set(texts) & set(calibration_texts(("en",)))


@pytest.mark.parametrize(
    ("languages", "templates", "aliases"),
    [(("en",), "one", set()), (("en", "zh"), "one", {"zh"}), (("zh",), "zh", set())],
)
def test_everyday_names_are_a_hundred_in_the_models_languages(
    languages: tuple[str, ...], templates: str, aliases: set[str]
) -> None:
    offered = everyday(languages)
    assert (offered.name, len(offered.labels)) == (EVERYDAY, 100)
    assert offered.templates is not None
    assert offered.templates.name == templates
    assert {code for label in offered.labels.labels for code, _ in label.aliases} == aliases


def test_texts_are_in_the_models_languages_alone() -> None:
    labels = LabelSet.of(["cat", "dog"])
    english = reference_texts(labels, Templates.of("one"), ("en",))
    assert english == ("a photo of a cat.", "a photo of a dog.", "cat", "dog")
    both = reference_texts(labels, Templates.of("one"), ("en", "zh"))
    assert both[:4] == english
    assert len(both) == 4 + 32
    assert all(any("一" <= letter <= "鿿" for letter in text) for text in both[4:])


@pytest.mark.parametrize(("side", "expected"), [(64, 16), (224, 16), (336, 10), (512, 4), (1536, 1)])
def test_golden_files_stay_below_4_mb(side: int, expected: int) -> None:
    count = 20
    pixels = np.broadcast_to(np.uint8(7), (count, side, side, 3))
    names = tuple(f"{row}.png" for row in range(count))
    reference = Reference(Pictures(names, pixels, tuple(range(0, count, 2)), "test"), ("a", "b", "c"))
    rows = np.eye(count, 512, dtype=np.float32)
    bank = LabelBank(LabelSet.of(["cat", "dog"]), np.eye(2, 512, dtype=np.float32), Templates.of("one"))
    tensors = golden_tensors(reference, Expected(rows, rows[:3]), Tokenizer.clip(), bank)
    content = write_tensors(tensors, {"bank": "animals"})
    assert len(content) <= 4_000_000 or expected == 1
    assert len(tensors["images"]) == len(tensors["image_embedding"]) == expected
    assert (len(tensors["tokens"]), len(tensors["text_embedding"])) == (3, 3)
    assert tensors["bank_top5"].shape == (expected, 2)
