"""Calibration sets of exports: apart from what judges, the user's if there are any, named in the manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeclip.bundle import PreprocessSpec
from edgeclip.calibration.dataset import CalibrationSet
from edgeclip.errors import CalibrationError, ConfigError, InputError
from edgeclip.export.calibration_rows import EVERYDAY_TEXTS, LABEL_TEXTS, calibration_set
from edgeclip.export.options import Offered, References
from edgeclip.export.reference import PHOTOGRAPHS, everyday, reference_pictures, reference_texts
from edgeclip.label_sets import LabelSet, Templates

SPEC = PreprocessSpec(image_size_px=(32, 32))
RANDOM = References(calibration_selection="random", calibration_samples=256)


class Texts:
    """A tokenizer that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        self.asked = list(texts)
        return np.array(
            [[len(text), *text.encode()[:7]] + [0] * (7 - len(text.encode()[:7])) for text in texts], np.int32
        )


def colours(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Embed pictures as their mean colours."""
    return (rows.mean(axis=(1, 2)) - 128).astype(np.float32)


def folder_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(5, axis=0).repeat(5, axis=1)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def test_without_the_users_pictures_they_are_apart_from_those_that_judge() -> None:
    texts = Texts()
    chosen = calibration_set(SPEC, RANDOM, languages=("en", "zh"), tokenize=texts)
    assert chosen.rows["image"].shape == (128, 32, 32, 3)
    assert len(chosen.rows["text"]) == 256
    assert chosen.sources == {"image": PHOTOGRAPHS, "text": EVERYDAY_TEXTS}
    assert chosen.selection["pictures"] == 16
    judged = {row.tobytes() for row in reference_pictures(SPEC).pixels}
    assert not judged & {row.tobytes() for row in chosen.rows["image"]}
    offered = everyday(("en", "zh"))
    judging = reference_texts(offered.labels, offered.templates or Templates.of("one"), ("en", "zh"))
    assert not set(texts.asked) & set(judging)


def test_by_default_64_rows_cover_them_and_256_texts_are_drawn() -> None:
    asked = References()
    chosen = calibration_set(SPEC, asked, languages=("en",), tokenize=Texts(), embed=colours)
    assert chosen.rows["image"].shape == (64, 32, 32, 3)
    assert len(chosen.rows["text"]) == 256
    assert (chosen.selection["method"], chosen.selection["pool"]) == ("coverage", 128)
    again = calibration_set(SPEC, asked, languages=("en",), tokenize=Texts(), embed=colours)
    assert again.digest == chosen.digest


@pytest.mark.parametrize(("languages", "chinese"), [(("en",), 0), (("zh",), 64), (("en", "zh"), 32)])
def test_texts_are_in_every_language_of_the_model(languages: tuple[str, ...], chinese: int) -> None:
    texts = Texts()
    asked = References(calibration_selection="random", calibration_samples=64)
    calibration_set(SPEC, asked, languages=languages, tokenize=texts)
    assert len(texts.asked) == 64
    assert (
        sum(not text.isascii() and any(letter >= "一" for letter in text) for text in texts.asked) == chinese
    )


def test_other_choices_have_other_digests() -> None:
    digests = [
        calibration_set(SPEC, RANDOM, languages=("en",), tokenize=Texts()).digest,
        calibration_set(SPEC, RANDOM, languages=("en",)).digest,
        calibration_set(SPEC, References(calibration_selection="random")).digest,
        calibration_set(SPEC, References(calibration_selection="random", calibration_seed=1)).digest,
        calibration_set(PreprocessSpec(image_size_px=(32, 32), interpolation="bicubic"), RANDOM).digest,
    ]
    assert len(set(digests)) == len(digests)


def test_few_pictures_of_the_users_are_cropped(tmp_path: Path) -> None:
    asked = References(
        calibration=folder_of(tmp_path / "few", 3), calibration_selection="random", calibration_samples=64
    )
    few = calibration_set(SPEC, asked)
    assert few.rows["image"].shape == (27, 32, 32, 3)
    assert few.sources == {"image": "few"}
    assert "text" not in few.rows


def test_pictures_to_compare_on_lend_other_crops(tmp_path: Path) -> None:
    pictures = folder_of(tmp_path / "judges", 4)
    chosen = calibration_set(SPEC, References(pictures=pictures), embed=colours)
    judged = {row.tobytes() for row in reference_pictures(SPEC, pictures).pixels}
    assert len(chosen.rows["image"]) == 32
    assert not judged & {row.tobytes() for row in chosen.rows["image"]}


def test_captions_of_the_users_pictures_are_the_texts(tmp_path: Path) -> None:
    folder_of(tmp_path / "pictures", 18)
    table = tmp_path / "table.jsonl"
    lines = [
        {
            "path": f"pictures/{number:03}.png",
            "caption": f"picture {number}",
            "captions": {"zh": [f"图 {number}"]},
        }
        for number in range(18)
    ]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    texts = Texts()
    asked = References(calibration=table)
    chosen = calibration_set(SPEC, asked, languages=("en",), tokenize=texts, embed=colours)
    assert set(texts.asked) == {f"{word} {number}" for word in ("picture", "图") for number in range(18)}
    assert chosen.sources["text"] == "captions of table.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]), "utf-8")
    few = calibration_set(SPEC, asked, languages=("en",), tokenize=texts, embed=colours)
    assert few.sources["text"] == EVERYDAY_TEXTS


def test_the_users_labels_are_texts_but_for_those_that_judge() -> None:
    texts = Texts()
    labels = LabelSet.of(["otter", "kettle", "tram", "quarry"])
    asked = References(offered=Offered("own", labels), calibration_selection="random")
    chosen = calibration_set(SPEC, asked, languages=("en",), tokenize=texts)
    assert chosen.sources["text"] == LABEL_TEXTS
    assert all(any(name in text for name in labels.names) for text in texts.asked)
    assert not set(texts.asked) & set(reference_texts(labels, Templates.of("one"), ("en",)))
    assert "itap of a kettle." in texts.asked


def test_a_finished_set_is_taken_as_it_is(tmp_path: Path) -> None:
    made = calibration_set(SPEC, RANDOM, languages=("en",), tokenize=Texts(), tokenizer="abc")
    path = tmp_path / "set.safetensors"
    made.write(path)
    asked = References(calibration=path)
    taken = calibration_set(SPEC, asked, tokenize=Texts(), tokenizer="abc")
    assert (taken.digest, taken.to_dict()) == (made.digest, made.to_dict())
    with pytest.raises(CalibrationError, match=r"pictures of \(32, 32, 3\), expected \(64, 64, 3\)"):
        calibration_set(PreprocessSpec(image_size_px=(64, 64)), asked)
    with pytest.raises(CalibrationError, match="texts are of the tokenizer 'abc', expected 'def'"):
        calibration_set(SPEC, asked, tokenize=Texts(), tokenizer="def")
    pictures = CalibrationSet({"image": made.rows["image"]}, {"image": "x"})
    pictures.write(path)
    with pytest.raises(CalibrationError, match="texts are of the tokenizer 'no texts'"):
        calibration_set(SPEC, asked, tokenize=Texts(), tokenizer="def")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="calibration samples: got 15, expected at least 16"):
        References(calibration_samples=15)
    with pytest.raises(InputError, match="nowhere"):
        calibration_set(SPEC, References(calibration=tmp_path / "nowhere"))


@pytest.mark.parametrize("float_input", [False, True])
def test_coverage_goes_by_what_the_float_model_makes_of_pictures(float_input: bool) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from exported import PROBES, shape_pictures

    from edgeclip.export.embedder import embedder
    from edgeclip.export.options import Checkpoint, GraphOptions
    from edgeclip.export.source import open_source

    source = open_source(Checkpoint(str(PROBES / "tinyclip")), threads=1)
    rows = shape_pictures(20)
    expected = source.images(rows)
    graph = source.trace("image", GraphOptions(float_input=float_input))
    with embedder(graph, source.preprocess, float_input=float_input, threads=1) as embed:
        np.testing.assert_allclose(embed(rows), expected, atol=1e-4)


@pytest.mark.slow
def test_the_manifest_says_what_ranges_were_chosen_on(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from exported import export_probe, write_pictures

    from edgeclip.export.options import ExportSettings, Gates, GraphOptions, LimitChange

    pictures, kept = write_pictures(tmp_path / "shapes", 64), tmp_path / "kept"
    settings = ExportSettings(
        graph=GraphOptions(text=False),
        references=References(pictures=pictures, calibration=pictures, calibration_samples=20),
        gates=Gates((LimitChange("int8", "top1_agreement", 0.8),)),
        threads=1,
        keep_intermediate=kept,
    )
    made = export_probe("tinyclip", tmp_path / "bundle", pictures, "onnx-int8", settings=settings)
    said = made.bundle.manifest.variants["onnx-int8"].calibration
    assert said is not None
    assert (said["rows"], said["source"]) == ({"image": 20}, {"image": "shapes"})
    assert said["selection"]["method"] == "coverage"
    taken = CalibrationSet.read(kept / "calibration.safetensors")
    assert said["digest"] == taken.digest
    settings = ExportSettings(
        graph=settings.graph,
        references=References(pictures=pictures, calibration=kept / "calibration.safetensors"),
        gates=settings.gates,
        threads=1,
    )
    again = export_probe("tinyclip", tmp_path / "again", pictures, "onnx-int8", settings=settings)
    assert again.bundle.manifest.variants["onnx-int8"] == made.bundle.manifest.variants["onnx-int8"]
