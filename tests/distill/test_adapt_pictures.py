"""Pictures to adapt on and labelled ones, as a tiny bundle sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import COLOURS, colour_picture

from edgeclip.classify import ZeroShotClassifier
from edgeclip.distill.adapt_pictures import check, labelled, look_at
from edgeclip.errors import InputError
from edgeclip.evaluate.picture_sets import open_set
from edgeclip.evaluate.subjects import BundleSubject
from edgeclip.label_sets import LabelSet

NAMES = tuple(COLOURS)


@pytest.fixture
def subject(tiny_bundle: Path) -> Iterator[BundleSubject]:
    found = BundleSubject("tiny", ZeroShotClassifier.open(tiny_bundle))
    yield found
    found.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder a number of a colour, three pictures in each."""
    folder = tmp_path / "pictures"
    for number, name in enumerate(NAMES):
        (folder / str(number)).mkdir(parents=True)
        for seed in range(3):
            Image.fromarray(colour_picture(name, seed=seed)).save(folder / str(number) / f"{seed}.png")
    return folder


def none(_: int) -> int:
    return 0


def test_labels_that_are_numbers_of_a_set_are_found_by_their_names(
    subject: BundleSubject, pictures: Path
) -> None:
    bank = subject.bank(LabelSet.of(NAMES[::-1]), None)  # another order than the set's
    numbered = dataclasses.replace(open_set(pictures), numbered=True, labels=LabelSet.of(NAMES))
    chosen = labelled(numbered, bank, none)
    uses = {picture.label: row for picture, row in chosen}
    assert uses == {str(number): len(NAMES) - 1 - number for number in range(len(NAMES))}


def test_what_changed_is_counted_and_pictures_adapted_on_are_told(
    subject: BundleSubject, pictures: Path
) -> None:
    bank = subject.bank(LabelSet.of(NAMES), None)
    seen = look_at(open_set(pictures / "0"), [subject], allowed=none)
    assert (len(seen.rows[0]), seen.left_out) == (3 - seen.duplicates, 0)
    wrong = np.roll(bank.embeddings, 1, axis=0)
    found = check(
        labelled(open_set(pictures), bank, none), subject, bank.embeddings, wrong, seen, allowed=none
    )
    assert found.adapted_on == 3
    assert found.changes.n == 3 * len(NAMES)
    assert found.after.value < found.before.value
    assert found.is_worse
    back = check(
        labelled(open_set(pictures), bank, none), subject, wrong, bank.embeddings, seen, allowed=none
    )
    assert not back.is_worse
    assert back.to_dict()["before"]["value"] == pytest.approx(found.after.value)


def test_stored_rows_follow_the_pictures_that_are_taken(subject: BundleSubject, pictures: Path) -> None:
    shown = open_set(pictures)
    alone = look_at(shown, [subject], allowed=none)
    stored = np.arange(2 * 3 * len(NAMES), dtype=np.float32).reshape(-1, 2)
    seen = look_at(shown, [subject], allowed=none, stored=stored, limit=4)
    assert len(seen.rows[1]) == len(seen.rows[0]) == 4
    for own, row in zip(*seen.rows, strict=True):
        place = int(row[0]) // 2
        assert own @ alone.rows[0][place] == pytest.approx(1, abs=1e-5) or alone.duplicates
    with pytest.raises(InputError, match="has 2 rows"):
        look_at(shown, [subject], allowed=none, stored=stored[:2])
