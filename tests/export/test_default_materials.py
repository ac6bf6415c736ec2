"""Reading what the default recipe is made from, and judging what it makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.errors import InputError
from edgeclip.export.recipes.default_features import LOOK_ALIKES, Analogies, read_look_alikes
from edgeclip.export.recipes.default_space import ClassNames, Concepts, Sight, Space, SpaceConfig, unit
from edgeclip.export.recipes.stamps import candidates, figures, fit_scale, ranks, read_stamps
from edgeclip.export.recipes.wordnet import Synset, WordNet, read_wordnet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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


# What things look like
# ------------------------------------------------------------------------------------------------------------


def _names(english: tuple[str, ...], offsets: tuple[int, ...]) -> ClassNames:
    return ClassNames(offsets, english, english, tuple((name,) for name in english))


def test_a_line_of_look_alikes_is_a_distribution_that_falls_off(tmp_path: Path) -> None:
    path = tmp_path / "list.toml"
    path.write_text('"Giraffe" = ["gazelle", "crane"]\n', encoding="utf-8")
    found = read_look_alikes(("crane", "gazelle", "crane", "ox"), path)["giraffe"]
    # 1 and 0.8, over their sum; two classes of one name share its weight
    np.testing.assert_allclose(found, [0.4 / 1.8, 1 / 1.8, 0.4 / 1.8, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [('"giraffe" = ["gazele"]', "'giraffe' looks like 'gazele', which is no class"), ("=", "cannot be read")],
)
def test_a_wrong_list_of_look_alikes_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_look_alikes(("gazelle",), path)


def test_every_line_of_the_list_is_of_lower_case_and_of_use() -> None:
    lines = tomllib.loads(LOOK_ALIKES.read_text("utf-8"))
    assert len(lines) > 700
    assert all(
        name == name.lower() and len(set(classes)) == len(classes) > 0 for name, classes in lines.items()
    )


def test_analogies_are_ridge_regression() -> None:
    random = np.random.default_rng(0)
    synsets = {row: Synset(row, (f"s{row}",), "", (), 5, (0,)) for row in range(20)}
    wordnet = WordNet(synsets, {})  # nothing above anything: ancestors add a constant to the diagonal alone
    vectors, glosses = (unit(random.normal(size=(20, 6))) for _ in range(2))
    q = unit(np.abs(random.normal(size=(14, 5)))) ** 2
    model = Analogies(wordnet, list(range(14)), q, vectors[:14], glosses[:14], ridge=1.0)
    got = model.of(list(range(14, 20)), vectors[14:], glosses[14:])

    def kernel(a: slice, b: slice) -> NDArray[np.float64]:
        names, said = (np.maximum(x[a] @ x[b].T, 0).astype(np.float64) for x in (vectors, glosses))
        return np.asarray(names**2 + said**2)

    old, new = slice(0, 14), slice(14, 20)
    wanted = np.maximum(kernel(new, old) @ np.linalg.inv(kernel(old, old) + 3 * np.eye(14)) @ q, 0)
    np.testing.assert_allclose(got, wanted / wanted.sum(axis=1, keepdims=True), atol=2e-3)  # float16


def _concepts(wordnet: WordNet, look_alikes: dict[str, NDArray[np.float32]]) -> Concepts:
    q = {name: np.pad(row, (0, 1000 - len(row))) for name, row in look_alikes.items()}
    filler = tuple(f"class {row}" for row in range(998))
    # beast 40, dog 20 and bird 50 are in WordNet; dog and bird are classes, the rest are fillers above 10
    names = _names(("dog", "bird", *filler), (20, 50, *[10] * 998))
    made = Concepts(wordnet, names, SpaceConfig(), q)
    width = len(made.offsets)
    vectors = unit(np.eye(max(width, 8)) + 0.5)  # everything is a little alike
    made.set_vectors(vectors[:width], vectors[:width], vectors[[0] * 1000])
    return made


@pytest.fixture
def small_world() -> WordNet:
    said = {
        10: ("thing", ()),
        20: ("dog", (10,)),
        40: ("yeti", (10,)),
        50: ("bird", (10,)),
        60: ("imp", (10,)),
    }
    synsets = {offset: Synset(offset, (name,), name, up, 5, (3,)) for offset, (name, up) in said.items()}
    synsets[1930] = Synset(1930, ("physical entity",), "", (), 3, (0,))
    synsets[10] = Synset(10, ("thing",), "thing", (1930,), 5, (3,))
    return WordNet(synsets, {synset.lemmas[0]: (offset,) for offset, synset in synsets.items()})


def test_a_name_outside_takes_its_own_line_before_guesses(small_world: WordNet) -> None:
    line = np.array([0.25, 0.75], np.float32)
    concepts = _concepts(small_world, {"yeti": line, "dog": line})
    own = SpaceConfig().own_share
    for name in ("yeti", "Yeti", "yetis"):
        q = concepts.of_name(name)
        assert q is not None
        assert q.sum() == pytest.approx(1, abs=1e-3)
        assert q[1] >= own * 0.75
    # a class is itself, whatever the list says
    q = concepts.of_name("dog")
    assert q is not None
    assert q[0] == 1
    assert concepts.of_name("unheard of") is None


def test_a_name_without_a_line_is_guessed_from_those_with_one(small_world: WordNet) -> None:
    without, with_line = (
        _concepts(small_world, lines).of_name("imp")
        for lines in ({}, {"yeti": np.array([0, 1.0], np.float32)})
    )
    assert without is not None
    assert with_line is not None
    assert with_line[1] > without[1]
    assert with_line.sum() == pytest.approx(1, abs=1e-3)


def test_a_kind_stands_for_its_classes_and_for_what_is_listed_below_it(small_world: WordNet) -> None:
    line = np.array([0.25, 0.75], np.float32)
    plain, listed = (_concepts(small_world, lines).of_synset(1930) for lines in ({}, {"yeti": line}))
    np.testing.assert_allclose(plain, 1 / 1000, rtol=1e-5)
    np.testing.assert_allclose(listed[:3], np.array([1.25, 1.75, 1]) / 1001, rtol=1e-5)
    assert listed.sum() == pytest.approx(1, abs=1e-5)


def test_drawings_show_the_kinds_above_them(small_world: WordNet) -> None:
    pytest.importorskip("torch")
    from edgeclip.export.recipes.default_text import _drawings_below

    concepts = _concepts(small_world, {})
    below = _drawings_below(concepts, ("dog", "dog face", "birds", "imp"))
    assert below == {20: [0], 50: [2], 60: [3], 10: [0, 2, 3], 1930: [0, 2, 3]}
    assert _drawings_below(concepts, ("dog",) * 101) == {}


def test_emoji_names_without_a_synset_keep_their_line(small_world: WordNet) -> None:
    line = np.array([0.5, 0.5], np.float32)
    q = _concepts(small_world, {"dog face": line}).of_name("dog face")
    assert q is not None
    np.testing.assert_allclose(q[:2], line)


# The space
# ------------------------------------------------------------------------------------------------------------

SMALL = SpaceConfig(part_dims=(24, 8), feature_dim=12, pictogram_dim=6)


@pytest.fixture(scope="module")
def space() -> Space:
    random = np.random.default_rng(0)
    sight = Sight(
        random.normal(size=40).astype(np.float32),
        random.normal(size=(40, 6)).astype(np.float32),
        random.normal(size=6).astype(np.float32),
        np.append(random.normal(size=40), 0.5).astype(np.float32),
    )
    return Space(
        unit(random.normal(size=(1000, 16))), random.normal(size=(1000, 40)).astype(np.float32), SMALL, sight
    )


def test_embeddings_of_both_sides_are_of_one_width_and_unit_length(space: Space) -> None:
    random = np.random.default_rng(1)
    texts = space.embed_texts(
        random.dirichlet(np.ones(1000), 5).astype(np.float32),
        unit(random.normal(size=(5, 16))),
        unit(random.normal(size=(5, 6))),
        np.concatenate([random.normal(size=(3, 40)), np.zeros((2, 40))]).astype(np.float32),
    )
    features, logits = (3 * random.normal(size=(4, n)).astype(np.float32) for n in (40, 1000))
    pictures = space.embed_pictures(features, logits)
    classes = space.embed_classes(np.eye(1000, dtype=np.float32)[:3])
    assert texts.shape[1] == pictures.shape[1] == classes.shape[1] == space.embed_dim == 24 + 8 + 12 + 6
    for rows in (texts, pictures, classes):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert not classes[:, -6:].any()  # a class is no drawing
    np.testing.assert_allclose(np.linalg.norm(texts[:, -6:], axis=1), SMALL.pictogram_share**0.5, atol=1e-5)


def test_a_class_fits_its_own_posterior_best(space: Space) -> None:
    classes = np.eye(1000, dtype=np.float32)[:50]
    vectors = unit(np.random.default_rng(0).normal(size=(1000, 16)))[:50]
    none = np.zeros((50, 6), np.float32), np.zeros((50, 40), np.float32)
    found = space.embed_classes(classes) @ space.embed_texts(classes, vectors, *none).T
    assert (found.argmax(axis=1) == np.arange(50)).all()


def test_names_take_a_share_of_their_features_from_drawings(space: Space) -> None:
    random = np.random.default_rng(3)
    q, vectors = np.eye(1000, dtype=np.float32)[:2], unit(random.normal(size=(2, 16)))
    codes, drawn = np.zeros((2, 6), np.float32), np.zeros((2, 40), np.float32)
    drawn[1] = random.normal(size=40)
    plain, mixed = (space.embed_texts(q, vectors, codes, each) for each in (0 * drawn, drawn))
    np.testing.assert_array_equal(plain[0], mixed[0])
    features = slice(32, 44)
    np.testing.assert_allclose(plain[1, :32], mixed[1, :32], atol=1e-6)  # the other parts stay
    said, seen = unit(plain[1:, features])[0], unit(drawn[1:] @ space.feature_table[:, :12])[0]
    share = SMALL.drawn_share
    expected = unit(((1 - share) * said + share * seen)[None])[0]
    np.testing.assert_allclose(unit(mixed[1:, features])[0], expected, atol=1e-5)


def test_the_image_tower_computes_what_the_space_says(space: Space) -> None:
    torch = pytest.importorskip("torch")
    from edgeclip.models.clip import PosteriorImageTower
    from edgeclip.models.config import PosteriorImageConfig

    class Backbone(torch.nn.Module):  # type: ignore[misc, name-defined]
        feature_dim = 40

    config = PosteriorImageConfig(
        part_dims=SMALL.part_dims,
        part_weights=SMALL.part_weights,
        feature_dims=(SMALL.feature_dim,),
        feature_weights=(SMALL.feature_weight,),
        gated_dim=SMALL.pictogram_dim,
    )
    tower = PosteriorImageTower(Backbone(), config)
    random = np.random.default_rng(2)
    features, logits = (random.normal(size=shape).astype(np.float32) for shape in ((6, 40), (6, 1000)))
    with torch.no_grad():
        tower.class_table.copy_(torch.from_numpy(space.table))
        tower.feature_table.copy_(torch.from_numpy(space.feature_table))
        tower.feature_bias.copy_(torch.from_numpy(space.feature_bias))
        got = tower.project(torch.from_numpy(logits), torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(got, space.embed_pictures(features, logits), atol=1e-5)


# Drawings
# ------------------------------------------------------------------------------------------------------------


def test_drawings_that_were_not_fetched_are_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edgeclip.export.recipes.default_pictograms import read_drawings

    with pytest.raises(InputError, match=f"pictograms: cannot read '{tmp_path}'.*data fetch pictograms"):
        read_drawings(tmp_path, tmp_path, tmp_path)


def _emoji_packages(folder: Path) -> tuple[Path, Path, Path]:
    from PIL import Image

    entries = [
        {"label": "red dot", "hexcode": "1F534-FE0F", "group": 8, "tags": ["red"]},
        {"label": "flag", "hexcode": "1F534", "group": 9},
        {"label": "one style", "hexcode": "1F535", "group": 8},
    ]
    for language in ("en", "zh"):
        (folder / "emojibase" / language).mkdir(parents=True)
        (folder / "emojibase" / language / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    for path, code in (("noto/img/google/64/1f534.png", 1), ("fluent/assets/1f534-fe0f.webp", 2)):
        file = folder / path
        file.parent.mkdir(parents=True)
        drawing = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        drawing.paste((200, 0, 0, 255), (8, 8, 24, 24))
        drawing.save(file, lossless=code == 2)
    return folder / "emojibase", folder / "noto", folder / "fluent"


def test_drawings_are_those_both_styles_have_and_views_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from edgeclip.export.recipes.default_pictograms import pictogram_views, read_drawings

    drawings = read_drawings(*_emoji_packages(tmp_path))
    assert [(drawing.name, drawing.tags, len(drawing.files)) for drawing in drawings] == [
        ("red dot", ("red",), 2)
    ]
    files = drawings[0].files
    plain = next(pictogram_views(files[:1], seed=None))
    assert plain.shape == (224, 224, 3)
    assert (plain[0, 0] == 255).all()
    assert tuple(plain[112, 112]) == (200, 0, 0)
    first, again = (list(pictogram_views(files, seed=3)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], plain)


def test_the_pictogram_part_finds_drawings_of_a_style_it_never_saw() -> None:
    pytest.importorskip("torch")
    from edgeclip.export.recipes.default_pictograms import HeadRecipe, PictogramNames, fit_head

    random = np.random.default_rng(0)
    content = random.normal(size=(40, 60))  # what is drawn; a style adds a constant and noise
    styles = [
        [
            (content + 0.5 * random.normal(size=60) + 0.3 * random.normal(size=(40, 60))).astype(np.float32)
            for _ in range(2)
        ]
        for _ in range(2)
    ]
    vectors = unit(content @ random.normal(size=(60, 20)) + 1)
    names = [f"Drawing {row}" for row in range(40)]
    recipe = HeadRecipe(dim=16, steps=150, batch_size=64)
    codes = fit_head([[view[:30] for view in views] for views in styles], names[:30], vectors[:30], recipe)
    rows = {name.lower(): (row,) for row, name in enumerate(names[:30])}
    known = PictogramNames(tuple(names[:30]), rows, codes, np.zeros((30, 60), np.float32))
    unseen = (content + 0.5 * random.normal(size=60) + 0.3 * random.normal(size=(40, 60))).astype(np.float32)
    found = unit(unseen @ codes.table + codes.bias)
    said = known.codes([name.lower() for name in names], vectors)
    assert ((found @ said.T).argmax(axis=1)[:30] == np.arange(30)).mean() > 0.8
    # names it never saw are placed by their sentence vectors: better than one in ten
    assert ((found[30:] @ said[30:].T).argmax(axis=1) == np.arange(10)).mean() > 0.3
    np.testing.assert_allclose(known.codes(names[:3], -vectors[:3]), codes.known[:3], atol=1e-6)


def test_a_name_means_its_own_drawing_else_the_few_that_have_it_as_a_tag() -> None:
    pytest.importorskip("torch")
    from edgeclip.export.recipes.default_pictograms import (
        Drawing,
        PictogramCodes,
        PictogramNames,
        rows_of_names,
    )

    tagged = {"Ox": ("bull", "animal"), "cow face": ("ox", "animal"), "cow": ("bull", "animal"), "ant": ()}
    rows = rows_of_names([Drawing(name, tags, ()) for name, tags in tagged.items()])
    assert rows == {"ox": (0,), "cow face": (1,), "cow": (2,), "ant": (3,), "bull": (0, 2)}
    looks = np.arange(8, dtype=np.float32).reshape(4, 2)
    nothing = np.zeros((2, 2), np.float32)
    head = PictogramCodes(nothing, nothing[0], unit(looks + 1), np.zeros(3, np.float32), np.ones((3, 2)))
    names = PictogramNames(tuple(tagged), rows, head, looks)
    drawn = names.drawn(["Bull", "animal", "ant", "cattle"], [(), (), (), (0, 1)])
    np.testing.assert_array_equal(drawn, [[2, 3], [0, 0], [6, 7], [1, 2]])
    np.testing.assert_array_equal(names.drawn(["bull"], [(0, 1)]), [[2, 3]])  # each drawing counts once
    codes = names.codes(["bull", "animal"], np.ones((2, 3), np.float32))
    np.testing.assert_allclose(codes[0], unit((head.known[:1] + head.known[2:3]) / 2)[0], atol=1e-6)
    np.testing.assert_allclose(codes[1], [0.5**0.5, 0.5**0.5], atol=1e-6)


def test_the_gate_parts_drawings_from_photographs() -> None:
    pytest.importorskip("torch")
    from edgeclip.export.recipes.default_pictograms import fit_gate

    random = np.random.default_rng(0)
    shift = random.normal(size=30)
    drawings, photographs = (
        (random.normal(size=(400, 30)) + sign * shift).astype(np.float32) for sign in (1, -1)
    )
    gate = fit_gate(drawings[:300], photographs[:300])
    opened = [1 / (1 + np.exp(-(rows[300:] @ gate[:-1] + gate[-1]))) for rows in (drawings, photographs)]
    assert np.median(opened[0]) > 0.9
    assert opened[1].max() < 0.01
    # halfway between them still counts as a photograph
    halfway = (drawings.mean(axis=0) + photographs.mean(axis=0)) / 2
    assert 1 / (1 + np.exp(-(halfway @ gate[:-1] + gate[-1]))) < 0.01


def test_no_free_photograph_is_an_error() -> None:
    pytest.importorskip("torch")
    from edgeclip.export.recipes.default_pictograms import look, photograph_views
    from edgeclip.models.efficientnet_lite import EfficientNetLite

    with pytest.raises(InputError, match="got 0 pictures to look at"):
        look(EfficientNetLite().eval(), photograph_views([]))
