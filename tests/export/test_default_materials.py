"""Reading what the default recipe is made from, and judging what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeclip.errors import InputError
from edgeclip.export.recipes.stamps import candidates, figures, fit_scale, ranks, read_stamps
from edgeclip.export.recipes.wordnet import WordNet, read_wordnet

# Three synsets in the form of wndb(5WN): an animal, a dog below it, one dog of history below that.
DATA = """  1 licence text
00000010 03 n 02 animal 0 beast 0 000 | a living organism; "the beasts of the field"
00000020 05 n 01 dog 0 001 @ 00000010 n 0000 | a member of the genus Canis; "the dog barked"
00000030 18 n 01 Laika 0 001 @i 00000020 n 0000 | the first dog in orbit
"""
INDEX = """  1 licence text
animal n 1 1 ~ 1 1 00000010
beast n 1 0 1 0 00000010
dog n 1 1 @ 1 1 00000020
laika n 1 1 @i 1 0 00000030
"""
COUNTS = "dog%1:05:00:: 1 42\nrun%2:38:00:: 1 7\n"


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    (tmp_path / "data.noun").write_text(DATA, encoding="utf-8")
    (tmp_path / "index.noun").write_text(INDEX, encoding="utf-8")
    (tmp_path / "cntlist.rev").write_text(COUNTS, encoding="utf-8")
    return read_wordnet(tmp_path)


def test_wordnet_names_ancestors_and_glosses(wordnet: WordNet) -> None:
    dog = wordnet.synsets[20]
    assert (dog.lemmas, dog.gloss, dog.parents, dog.counts) == (
        ("dog",),
        "a member of the genus Canis",
        (10,),
        (42,),
    )
    assert wordnet.synsets[10].lemmas == ("animal", "beast")
    assert wordnet.synsets[30].instance
    assert not dog.instance
    assert wordnet.ancestors(30) == {30, 20, 10}
    assert wordnet.below([20]) == {20, 30}
    assert wordnet.depth == {10: 1, 20: 2, 30: 3}
    assert wordnet.base_form("Dogs") == "dog"
    assert wordnet.base_form("cat") is None


def test_a_missing_wordnet_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wordnet-base"):
        read_wordnet(tmp_path / "nothing")


def _stamps_file(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def _row(en: str, split: str, zh: str = "名") -> dict[str, str]:
    return {"file": f"stamps/{en}.png", "en": en, "zh": zh, "kind": "exact", "split": split}


def test_ranks_count_ties_against_the_picture() -> None:
    bank = np.eye(3, dtype=np.float32)
    pictures = np.array([[0.9, 0.1, 0.1], [0.5, 0.5, 0.1]], np.float32)
    assert ranks(pictures, bank, ["a", "b", "c"], ["a", "b"]).tolist() == [1, 2]


def test_figures_are_means_with_intervals_over_names(tmp_path: Path) -> None:
    rows = [_row(f"name {number}", "report") for number in range(40)] + [_row("other", "tune", "另")]
    stamps = read_stamps(_stamps_file(tmp_path / "stamps.jsonl", rows))
    rank = np.array([1] * 10 + [3] * 10 + [9] * 20 + [1])

    found = figures(stamps, rank, "en")["report/all"]

    assert (found["n"], found["top1"], found["top5"]) == (40, 0.25, 0.5)
    low, high = found["top1_interval"]
    assert low < 0.25 < high
    # the normal approximation of 40 draws at a quarter: 1.96 · sqrt(0.25 · 0.75 / 40) = 0.134
    assert high - low == pytest.approx(2 * 0.134, abs=0.05)
    assert len(candidates(stamps, "en")) == 41


def test_chinese_names_of_both_halves_are_left_out_of_the_report(tmp_path: Path) -> None:
    rows = [_row("goat", "tune", "山羊"), _row("ibex", "report", "山羊"), _row("ram", "report", "公羊")]
    stamps = read_stamps(_stamps_file(tmp_path / "stamps.jsonl", rows))
    assert figures(stamps, np.array([1, 9, 1]), "zh")["report/all"]["n"] == 1


def test_a_malformed_list_of_stamps_is_named(tmp_path: Path) -> None:
    path = _stamps_file(tmp_path / "stamps.jsonl", [{"file": "a.png"}])
    with pytest.raises(InputError, match=r"stamps: '.*stamps.jsonl' cannot be read"):
        read_stamps(path)


def test_the_fitted_scale_is_the_one_that_made_the_answers() -> None:
    random = np.random.default_rng(0)
    similarity = random.uniform(-1, 1, (4000, 10)).astype(np.float32)
    odds = np.exp(8.0 * similarity)
    own = np.array([random.choice(10, p=row / row.sum()) for row in odds])
    assert fit_scale(similarity, own) == pytest.approx(8.0, rel=0.1)
