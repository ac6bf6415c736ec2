"""Classes of one's own: their names, their pictures, and what cannot be one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from picture_sets import clip_benchmark
from tar_shards import picture

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.own_classes import OwnClasses, read_names


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "parts"
    for name, count in (("bent_nail", 5), ("screw", 3), ("0", 2)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(picture(number))
    return root


def test_names_are_folders_read_as_words_or_as_they_are(folders: Path) -> None:
    found = OwnClasses.of(str(folders), {"0": "washer"}, as_words=True)
    assert found.names == ("washer", "bent nail", "screw")
    places = [found.place(each) for each in found.pictures]
    assert places == [0] * 2 + [1] * 5 + [2] * 3
    assert OwnClasses.of(str(folders), {}, as_words=False).names == ("0", "bent_nail", "screw")


def test_labels_of_one_name_are_one_class_from_which_is_drawn(folders: Path) -> None:
    def drawn(seed: int) -> list[str]:
        found = OwnClasses.of(str(folders), {"0": "screw"}, as_words=True, shots=2, seed=seed)
        assert found.names == ("screw", "bent nail")
        assert sorted(str(found.place(each)) for each in found.pictures) == ["0", "0", "1", "1"]
        return [each.key for each in found.pictures]

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(10)}) > 1


def test_a_picture_without_a_label_has_no_place(folders: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        rows.writerows([["parts/0/0.png", "a"], ["parts/0/1.png", "b"], ["parts/screw/0.png", ""]])
    found = OwnClasses.of(str(table), {}, as_words=False)
    *_, without = [found.place(each) for each in found.pictures]
    assert found.names == ("a", "b")
    assert without == "has no label; expected a column 'label' or a folder a class."


def test_numbered_classes_have_the_names_that_the_set_brings(tmp_path: Path) -> None:
    found = OwnClasses.of(str(clip_benchmark(tmp_path / "wds")), {}, as_words=True)
    assert found.names == ("crane", "red fox")  # the set has two numbers of the first
    assert [found.place(each) for each in found.pictures] == [0, 0, 1] * 2


def test_what_cannot_be_a_class_is_said(folders: Path) -> None:
    with pytest.raises(
        InputError, match=r"a name is given for 'nut', but .* it has '0', 'bent_nail', 'screw'"
    ):
        OwnClasses.of(str(folders), {"nut": "x"}, as_words=True)
    with pytest.raises(ConfigError, match=r"holds 1 class \('x'\), expected at least 2: a folder for each"):
        OwnClasses.of(str(folders), dict.fromkeys(("0", "bent_nail", "screw"), "x"), as_words=True)
    with pytest.raises(InputError, match="got the class name 'a\\\\x1bb', expected up to"):
        OwnClasses.of(str(folders), {"0": "a\x1bb"}, as_words=True)
    (folders / "empty").mkdir()
    with pytest.raises(InputError, match="empty' holds no pictures, expected some of the class 'empty'"):
        OwnClasses.of(str(folders), {}, as_words=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "it is not UTF-8"),
        (b'{"a": ', "not JSON"),
        (b'{"a": 1}', "folder 'a' is named 1, expected a text"),
        (b"a= ", "folder 'a' is named ' ', expected a text"),
        (b"a=b\na=c", "folder 'a' is named twice"),
        (b"a", "got the line 'a', expected 'folder=name'"),
    ],
)
def test_files_of_names_that_are_none_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "names"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_names(path)


def test_names_may_hold_an_equals_sign_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\ufeffa = x = y  z\n\nb=c\n", encoding="utf-8")
    assert read_names(path) == {"a": "x = y z", "b": "c"}
