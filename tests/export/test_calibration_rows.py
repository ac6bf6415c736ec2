"""Rows that int8 ranges are chosen on: apart from those that judge, the same every time, of the user's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeclip.bundle import PreprocessSpec
from edgeclip.errors import ConfigError, InputError
from edgeclip.export.calibration_rows import EVERYDAY_TEXTS, CalibrationRows, calibration_rows
from edgeclip.export.options import References
from edgeclip.export.reference import PHOTOGRAPHS, everyday, reference_pictures, reference_texts
from edgeclip.label_sets import Templates
from edgeclip.preprocess import Preprocess

SPEC = PreprocessSpec(image_size_px=(32, 32))


class Texts:
    """A tokenizer that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        self.asked = list(texts)
        return np.array(
            [[len(text), *text.encode()[:7]] + [0] * (7 - len(text.encode()[:7])) for text in texts], np.int32
        )


def folder_of(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


def test_without_the_users_pictures_they_are_apart_from_those_that_judge() -> None:
    texts = Texts()
    chosen = calibration_rows(SPEC, languages=("en", "zh"), tokenize=texts)
    assert chosen.rows["image"].shape == (128, 32, 32, 3)
    assert chosen.rows["image"].dtype == np.uint8
    assert len(chosen.rows["text"]) > 200
    assert chosen.sources == {"image": PHOTOGRAPHS, "text": EVERYDAY_TEXTS}
    judged = {row.tobytes() for row in reference_pictures(SPEC).pixels}
    assert not judged & {row.tobytes() for row in chosen.rows["image"]}
    offered = everyday(("en", "zh"))
    judging = reference_texts(offered.labels, offered.templates or Templates.of("one"), ("en", "zh"))
    assert not set(texts.asked) & set(judging)


@pytest.mark.parametrize(("languages", "chinese"), [(("en",), 0), (("zh",), 64), (("en", "zh"), 32)])
def test_texts_are_in_every_language_of_the_model(languages: tuple[str, ...], chinese: int) -> None:
    texts = Texts()
    calibration_rows(SPEC, languages=languages, tokenize=texts, samples=64)
    assert len(texts.asked) == 64
    assert (
        sum(not text.isascii() and any(letter >= "一" for letter in text) for text in texts.asked) == chinese
    )


def test_the_same_pictures_give_the_same_rows_and_digest() -> None:
    first, again = (calibration_rows(SPEC, languages=("en",), tokenize=Texts()) for _ in range(2))
    assert first.digest == again.digest
    assert len(first.digest) == 64
    others = [
        calibration_rows(SPEC, languages=("en",), tokenize=Texts(), samples=20),
        calibration_rows(SPEC, languages=("en",)),
        calibration_rows(PreprocessSpec(image_size_px=(32, 32), interpolation="bicubic")),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_few_pictures_are_cropped_and_many_are_taken_evenly(tmp_path: Path) -> None:
    few = calibration_rows(SPEC, given=folder_of(tmp_path / "few", 3))
    assert few.rows["image"].shape == (27, 32, 32, 3)
    assert few.sources == {"image": "few"}
    assert "text" not in few.rows
    many = folder_of(tmp_path / "many", 70)
    assert len(calibration_rows(SPEC, given=many).rows["image"]) == 70
    some = calibration_rows(SPEC, given=many, samples=16).rows["image"]
    assert len(some) == 16
    assert (some[0] == Preprocess(SPEC)(many / "000.png")).all()
    assert (some[8] == Preprocess(SPEC)(many / "035.png")).all()


def test_pictures_to_compare_on_lend_other_crops(tmp_path: Path) -> None:
    pictures = folder_of(tmp_path / "judges", 4)
    chosen = calibration_rows(SPEC, reference=pictures)
    judged = {row.tobytes() for row in reference_pictures(SPEC, pictures).pixels}
    assert len(chosen.rows["image"]) >= 16
    assert not judged & {row.tobytes() for row in chosen.rows["image"]}


def test_captions_of_the_users_pictures_are_the_texts(tmp_path: Path) -> None:
    pictures = folder_of(tmp_path / "pictures", 18)
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
    chosen = calibration_rows(SPEC, languages=("en",), tokenize=texts, given=table)
    assert len(chosen.rows["text"]) == 36
    assert {"picture 0", "图 0", "picture 17"} <= set(texts.asked)
    assert chosen.sources["text"] == "captions of table.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]), "utf-8")
    few = calibration_rows(SPEC, languages=("en",), tokenize=texts, given=table)
    assert few.sources["text"] == EVERYDAY_TEXTS
    assert pictures.is_dir()


def test_float_input_is_what_the_host_normalizes() -> None:
    spec = PreprocessSpec(image_size_px=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    rows = CalibrationRows({"image": np.full((1, 32, 32, 3), 255, np.uint8)}, {"image": "white"})
    floats = rows.feeds(spec, float_input=True)["image"]
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats[0, :, 0, 0], [2.5, 2.4, 1.4], rtol=1e-6)
    assert rows.feeds(spec, float_input=False)["image"] is rows.rows["image"]


def test_too_few_samples_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="calibration samples: got 15, expected at least 16"):
        calibration_rows(SPEC, samples=15)
    with pytest.raises(InputError, match="nowhere"):
        calibration_rows(SPEC, given=tmp_path / "nowhere")
    assert References().calibration_samples == 256


@pytest.mark.slow
def test_the_manifest_says_what_ranges_were_chosen_on(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from exported import export_probe, write_pictures

    from edgeclip.export.options import ExportSettings, Gates, GraphOptions, LimitChange

    pictures = write_pictures(tmp_path / "shapes", 64)
    settings = ExportSettings(
        graph=GraphOptions(text=False),
        references=References(pictures=pictures, calibration=pictures, calibration_samples=20),
        gates=Gates((LimitChange("int8", "top1_agreement", 0.8),)),
        threads=1,
    )
    made = export_probe("tinyclip", tmp_path / "bundle", pictures, "onnx-int8", settings=settings)
    said = made.bundle.manifest.variants["onnx-int8"].calibration
    assert said is not None
    assert (said["method"], said["rows"], said["source"]) == ("minmax", {"image": 20}, {"image": "shapes"})
    spec = made.bundle.manifest.preprocess
    assert said["digest"] == calibration_rows(spec, given=pictures, samples=20).digest
