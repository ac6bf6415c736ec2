"""What the build writes for rejection: general names, rows that stand for them, and the head that ships."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")  # the package of the recipes

from edgeclip.bundle import Bundle
from edgeclip.export.recipes.emoji import Pictogram
from edgeclip.export.recipes.rejection import _share, add_rejection, general_names, main
from edgeclip.fetch import data_directory
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.reject import read_background, read_reject_head

DATA = data_directory()  # before a test sets another one


def emoji(english: str, chinese: str, group: int = 7) -> Pictogram:
    return Pictogram("1f", english, chinese, (), (), group, ())


def test_general_names_are_things_in_plain_letters() -> None:
    listed = (
        emoji("teapot", "茶壶"),
        emoji("Teapot", "水壶"),
        emoji("two o’clock", "两点"),
        emoji("1st place medal", "金牌"),
        emoji("grinning face", "笑脸", group=0),
    )
    names = general_names(listed)
    assert names.names == ("teapot",)
    assert dict(names.labels[0].aliases)["zh"].name == "茶壶"


def test_rows_of_the_bank_stand_for_names_that_are_near() -> None:
    def bank(names: list[str], rows: list[list[float]]) -> LabelBank:
        values = np.array(rows, np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        return LabelBank(LabelSet.of(names), values, Templates.of("one"))

    own = bank(["x", "y", "z"], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    head = _share(bank(["a", "b", "c"], [[0.1, 1, 0], [0, 1, 0.1], [1, 1, 1]]), own)
    assert head.bank_rows is not None
    assert head.bank_rows.tolist() == [1]
    assert head.more is not None
    assert head.more[0].names == ("c",)
    assert head.background(own).names == ("y", "c")


@pytest.mark.full
def test_the_recipe_writes_the_head_that_ships(tmp_path: Path) -> None:
    """Needs `edgeclip data fetch stamps default-model`; the embedded head is its last result."""
    shipped = Bundle.open("default")
    shutil.copytree(shipped.path, tmp_path / "copy")
    made, fit = add_rejection(Bundle.open(tmp_path / "copy"), "imagenet-1k", data=DATA, threads=1)
    ours, theirs = read_reject_head(made), read_reject_head(shipped)
    assert (ours.method, ours.weight, ours.overlap, ours.offered) == (
        theirs.method,
        theirs.weight,
        theirs.overlap,
        theirs.offered,
    )
    assert ours.kinds == theirs.kinds
    assert ours.threshold == pytest.approx(theirs.threshold, abs=0.02)
    assert read_background(made).names == read_background(shipped).names
    assert fit.improves
    assert made.manifest.background_bank == shipped.manifest.background_bank == "imagenet-1k"


def test_a_bundle_that_is_none_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "does not exist" in caplog.text
