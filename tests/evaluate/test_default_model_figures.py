"""The arithmetic of `benchmarks/default_model.py` against counting by hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import openmoji
import written
from default_model import (
    calibration_figure,
    mean_figure,
    rejection_figure,
    rejection_scores,
    rendered_openmoji,
)

from edgeclip.errors import InputError
from edgeclip.export.recipes.stamps import Stamp, figures, of_half

NAMES = ["ant", "ant", "bee", "cow", "cow", "cow", "dog", "elk"]


def test_the_mean_and_its_interval_are_those_of_the_manifest() -> None:
    rank = np.array([1, 3, 1, 1, 7, 1, 2, 1])
    stamps = [Stamp(f"{row}.png", name, name, "exact", "tune") for row, name in enumerate(NAMES)]
    expected = figures(stamps, rank, "en")["tune/all"]
    for top in (1, 5):
        found = mean_figure(rank <= top, NAMES)
        assert found["value"] == pytest.approx(100 * expected[f"top{top}"])
        assert [found["low"], found["high"]] == pytest.approx(
            [100 * each for each in expected[f"top{top}_interval"]]
        )
        assert (found["n"], found["names"]) == (8, 5)


def test_few_names_have_no_interval() -> None:
    assert mean_figure(np.array([], bool), []) == {"n": 0, "names": 0}
    assert mean_figure(np.array([True, False]), ["ant", "ant"]) == {"value": 50.0, "n": 2, "names": 1}


def test_rejection_offers_the_right_name_or_another_in_its_place() -> None:
    # The right name is worth 1 and every other 0: with it one of five stands out, without it none does.
    cosines, own = np.eye(8), np.arange(8)
    inside, outside = rejection_scores(cosines, own, 5, 10.0, draws=20)
    assert inside.shape == outside.shape == (20, 8)
    np.testing.assert_allclose(inside, np.exp(10) / (np.exp(10) + 4))
    np.testing.assert_allclose(outside, 1 / 5)
    assert rejection_figure(inside, outside, NAMES)["value"] == 100.0


def test_rejection_draws_all_other_names_alike() -> None:
    # One other name outshines all: it is offered in 4 of 19 draws beside the right one, in 5 of 19 without.
    cosines = np.zeros((40, 20))
    cosines[:, 7] = 1.0
    own = np.where(np.arange(40) % 20 == 7, 8, np.arange(40) % 20)
    inside, outside = rejection_scores(cosines, own, 5, 20.0, draws=400)
    assert np.mean(inside > 0.9) == pytest.approx(4 / 19, abs=0.015)
    assert np.mean(outside > 0.9) == pytest.approx(5 / 19, abs=0.015)


def test_rejection_is_the_share_of_pairs_won() -> None:
    random = np.random.default_rng(0)
    inside, outside = np.round(random.random((3, 8)) + 0.2, 1), np.round(random.random((3, 8)), 1)
    found = rejection_figure(inside, outside, NAMES)
    won = [
        (first > second) + 0.5 * (first == second)
        for draw in range(3)
        for first, second in product(inside[draw], outside[draw])
    ]
    assert found["value"] == pytest.approx(100 * np.mean(won), abs=0.005)
    assert found["low"] < found["value"] < found["high"]


def test_the_interval_of_rejection_resamples_whole_names() -> None:
    # All of one name are told apart, none of the other: a draw of names gives 1, 1/2 or 0 with 1 : 2 : 1.
    inside = np.array([[0.9, 0.9, 0.9, 0.1]])
    outside = np.array([[0.5, 0.5, 0.5, 0.5]])
    found = rejection_figure(inside, outside, ["ant", "ant", "ant", "bee"])
    assert (found["value"], found["low"], found["high"]) == (75.0, 0.0, 100.0)


def test_rejection_needs_a_name_to_take_the_place() -> None:
    with pytest.raises(InputError, match="got 5 of 5 names, expected 2 to 4"):
        rejection_scores(np.eye(5), np.arange(5), 5, 1.0)


def test_calibration_is_the_mean_gap_and_its_interval_resamples_whole_names() -> None:
    scores, correct = np.array([0.95, 0.95, 0.35, 0.35]), np.array([True, True, False, True])
    found = calibration_figure(scores, correct, ["ant", "ant", "bee", "bee"])
    assert found["value"] == pytest.approx(100 * (0.05 + 0.15) / 2)
    assert (found["low"], found["high"]) == (5.0, 15.0)  # of two names alike
    assert (found["mean_score"], found["accuracy"]) == (65.0, 75.0)


def test_without_a_renderer_openmoji_is_left_out_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "drawings", dict)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(InputError, match="rsvg-convert is not installed; run `apt-get install librsvg2-bin`"):
        rendered_openmoji()


def test_names_of_both_halves_are_left_out_of_the_report_half_alone() -> None:
    stamps = [
        Stamp("a.png", "goat", "山羊", "exact", "tune"),
        Stamp("b.png", "ibex", "山羊", "exact", "report"),
        Stamp("c.png", "koala", "考拉", "exact", "report"),
    ]
    assert of_half(stamps, "tune", "zh") == stamps[:1]
    assert of_half(stamps, "report", "zh") == stamps[2:]
    assert of_half(stamps, "report", "en") == stamps[1:]


@pytest.mark.parametrize("part", ["edgeclip", "export", "calibration"])
def test_a_result_of_code_that_was_not_committed_says_so(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "--quiet")
    for name in ("edgeclip", "export", "calibration", "docs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").touch()
    git("add", ".")
    git("commit", "--quiet", "--message", "a")
    monkeypatch.setattr(written, "ROOT", tmp_path)
    (tmp_path / "docs" / "a.py").write_text("changed", encoding="utf-8")
    assert len(written.commit()) == 40
    (tmp_path / part / "a.py").write_text("changed", encoding="utf-8")
    assert written.commit().endswith("-dirty")
