from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeclip.distill.recipe import (
    AffinityLoss,
    InfoNCELoss,
    StoredTeacher,
    load_recipe,
    parse_recipe,
    recipe_digest,
)
from edgeclip.errors import ConfigError

MINIMAL = """
schema = 1
kind = "train"
name = "plain"

[student]
model = "tiny-fastvit"

[data.train]
paths = ["train.jsonl"]

[[stage]]
name = "contrastive"
data = "train"
samples = 1_001
batch_size = 100

[[stage.loss]]
kind = "info-nce"
"""

DISTILLED = (
    MINIMAL
    + """
[[stage.loss]]
kind = "affinity"
teachers = ["large", "stored"]
weight = 0.75

[[stage.group]]
match = "text_tower.*"
learning_rate = 0.1

[[teacher]]
kind = "checkpoint"
name = "large"
path = "teacher"
scale = 70

[[teacher]]
kind = "stored"
name = "stored"
slice = [0, 768]

[[validation]]
name = "shapes"
kind = "zero-shot"
data = "train"
labels = "labels.txt"
"""
)


def test_a_minimal_recipe_has_sane_defaults() -> None:
    recipe = parse_recipe(MINIMAL.encode())
    (stage,) = recipe.stage
    assert stage.loss == (InfoNCELoss(),)
    assert stage.steps == 11  # the last batch is begun for the 1,001st sample
    assert (stage.optimizer.learning_rate, stage.schedule.kind, stage.clip_norm) == (1e-3, "cosine", 1.0)
    assert recipe.seed == 0


def test_losses_teachers_and_groups_become_their_own_classes() -> None:
    recipe = parse_recipe(DISTILLED.encode())
    assert recipe.stage[0].loss[1] == AffinityLoss(teachers=("large", "stored"), weight=0.75)
    assert recipe.teacher[1] == StoredTeacher(name="stored", slice=(0, 768))
    assert recipe.teacher[0].scale == 70
    assert recipe.stage[0].group[0].learning_rate == 0.1


def test_digest_is_about_meaning() -> None:
    plain = recipe_digest(parse_recipe(MINIMAL.encode()))
    spelled = MINIMAL.replace("samples = 1_001", "samples = 1001 # all\nparts = 1")
    assert recipe_digest(parse_recipe(spelled.encode())) == plain
    assert recipe_digest(parse_recipe(MINIMAL.replace("1_001", "1_002").encode())) != plain


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("stage.0.batch_size=64", 64),
        ("stage.0.batch_size = 64", 64),
    ],
)
def test_set_changes_one_key(change: str, expected: int) -> None:
    assert parse_recipe(MINIMAL.encode(), changes=[change]).stage[0].batch_size == expected


def test_set_takes_toml_values_bare_words_and_new_tables() -> None:
    recipe = parse_recipe(
        MINIMAL.encode(),
        changes=["name=other", 'data.train.paths=["a.tar", "b.tar"]', "stage.0.optimizer.learning_rate=5e-4"],
    )
    assert recipe.name == "other"
    assert recipe.data["train"].paths == ("a.tar", "b.tar")
    assert recipe.stage[0].optimizer.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "batch_size = 100",
            "batch_sise = 100",
            r"\[\[stage\]\] 0: .*`batch_sise`.*known are .*'batch_size'",
        ),
        (
            "batch_size = 100",
            'batch_size = "many"',
            r"\[\[stage\]\] 0: 'batch_size' is 'many': expected `int`",
        ),
        (
            "[[stage.loss]]",
            "[stage.optimizer]\nlearning_rat = 1\n[[stage.loss]]",
            r"\[\[stage\]\] 0: 'optimizer': .*`learning_rat`; known are \['betas', 'eps', 'learning_rate', ",
        ),
        (
            "[[stage.loss]]",
            "[stage.prune]\nimag = 1\n[[stage.loss]]",
            r"'prune': .*`imag`; known are \['gates', 'image', ",
        ),
        (
            'kind = "info-nce"',
            'kind = "info-nce"\nsotness = [0, 1]',
            r"\[\[stage.loss\]\] 0: .*`sotness`; known are \['softness', 'spread', 'weight'\]",
        ),
        ('kind = "info-nce"', 'kind = "info-nce"\nweight = inf', "'weight' is inf: expected `float` <= 1.79"),
        ('kind = "info-nce"', 'kind = "siglip"\nbias_init = nan', "'bias_init' is nan: expected `float`"),
        (
            "[[stage.loss]]",
            "[stage.optimizer]\nbetas = [0.9, 1.0]\n[[stage.loss]]",
            r"'optimizer.betas\[1\]' is \[0.9, 1.0\]: expected `float` < 1.0",
        ),
        (
            'paths = ["train.jsonl"]',
            "captions = { alt = -1 }\npaths = ['a']",
            r"'captions\[...\]' is {'alt': -1}: expected `float` > 0",
        ),
        (
            'paths = ["train.jsonl"]',
            "captions = {}\npaths = ['a']",
            r"\[data.train\]: 'captions' is {}: expected `object` of length >= 1",
        ),
        ("batch_size = 100", "batch_size = 0", r"'batch_size' is 0: expected `int` >= 1"),
        ("samples = 1_001\n", "", r"\[\[stage\]\] 0: .*missing required field `samples`"),
        ('kind = "info-nce"', 'kind = "info_nce"', r"\[\[stage.loss\]\] 0: .*'info_nce'"),
        ('data = "train"', 'data = "trian"', r"'data' is 'trian', expected one of \['train'\]"),
        (
            'paths = ["train.jsonl"]',
            "paths = []",
            r"\[data.train\]: 'paths' is \[\]: expected `array` of length",
        ),
        (
            'paths = ["train.jsonl"]',
            "crop_scale = [0.9, 0.5]\npaths = ['a']",
            r"\[0.9, 0.5\], expected two rising",
        ),
        ('model = "tiny-fastvit"', "", r"\[student\]: got \[\], expected 'model', 'config' or"),
        ("schema = 1", "schema = 2", "expected schema = 1"),
        ('kind = "train"', 'kind = "pipeline"', "expected kind = 'train'"),
        ("batch_size = 100", "batch_size = 100\nparts = 3", r"'batch_size' 100 cannot be cut into 'parts' 3"),
        ("[[stage.loss]]", "[stage.schedule]\nwarmup = 11\n[[stage.loss]]", "'warmup' is 11 steps.* has 11 "),
        ("[[stage]]", "[stage]", r"stage: got .*, expected an array of tables"),
        ('name = "plain"', 'name = "plain', "not valid TOML"),
        (MINIMAL[MINIMAL.index("[[stage.loss") :], "", r"\[\[stage\]\] 0: expected one \[\[stage.loss\]\]"),
    ],
)
def test_malformed_recipes_name_the_place(old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    with pytest.raises(ConfigError, match=message) as caught:
        parse_recipe(MINIMAL.replace(old, new, 1).encode(), where="recipe 'r.toml'")
    assert str(caught.value).startswith("recipe 'r.toml'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'teachers = ["large", "stored"]',
            'teachers = ["huge"]',
            r"called \['huge'\]; there are \['large', 'stored'\]",
        ),
        ("weight = 0.75", "teacher_weights = [1]", "1 'teacher_weights' for 2 'teachers'"),
        ("weight = 0.75", "weight = -1", r"\[\[stage.loss\]\] 1: 'weight' is -1"),
        ('name = "stored"', 'name = "large"', r"\[\[teacher\]\]: the names \['large'\] stand twice"),
        ('labels = "labels.txt"', "", "needs 'labels'"),
        ("slice = [0, 768]", "slice = [0]", r"\[\[teacher\]\] 1: 'slice' is \[0\]"),
    ],
)
def test_contradictions_are_named(old: str, new: str, message: str) -> None:
    assert old in DISTILLED
    with pytest.raises(ConfigError, match=message):
        parse_recipe(DISTILLED.replace(old, new, 1).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_size", "expected key=value"),
        ("stage.1.batch_size=3", "has the entries 0 to 0, not '1'"),
        ("stage.².batch_size=3", "has the entries 0 to 0, not '²'"),
        ("stage.0.batch_size.x=3", "'stage.0.batch_size' is 100"),
        ("stage.0.nothing=3", "`nothing`"),
    ],
)
def test_changes_that_fit_nothing_are_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(MINIMAL.encode(), changes=[change])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.toml' cannot be read: No such file"):
        load_recipe(tmp_path / "nothing.toml")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_recipe_or_a_typed_error(content: bytes) -> None:
    with pytest.raises(ConfigError):
        parse_recipe(content)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_in_any_place_gives_a_typed_error_or_a_recipe(data: st.DataObject) -> None:
    lines = DISTILLED.splitlines()
    places = [index for index, line in enumerate(lines) if "=" in line]
    index = data.draw(st.sampled_from(places))
    value = data.draw(st.sampled_from(["-1", '"x"', "[]", "{}", "nan", "true", "1e999", "[[1]]", "{a = 1}"]))
    lines[index] = lines[index].split("=")[0] + "= " + value
    with contextlib.suppress(ConfigError):
        parse_recipe("\n".join(lines).encode())
