"""A recipe whose teachers cannot be is one sentence: the key, what was found, what is expected."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from train_runs import STAGE, make_data, recipe_text  # noqa: E402

from edgeclip.distill.recipe import parse_recipe  # noqa: E402
from edgeclip.distill.run import dry_run_of, open_run  # noqa: E402
from edgeclip.errors import EdgeClipError  # noqa: E402

FEATURE = '[[stage.loss]]\nkind = "feature"\nteacher = "t"\n'
AFFINITY = '[[stage.loss]]\nkind = "affinity"\nteachers = ["t"]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"), train=64, held_out=8)
    np.save(folder / "rows.npy", np.ones((64, 8), np.float32))
    shutil.copytree(repo / "tests" / "data" / "probes" / "vit", folder / "ours")
    (folder / "theirs").mkdir()
    (folder / "theirs" / "config.json").write_text('{"model_type": "clip"}')
    return folder


def teacher(kind: str, *lines: str) -> str:
    return "\n".join(["[[teacher]]", f'kind = "{kind}"', 'name = "t"', *lines, ""])


# Found while the recipe is read.
WRONG_TABLES = [
    (teacher("oracle"), r"'kind' is 'oracle': .*'oracle'"),
    ('[[teacher]]\nname = "t"\n', "missing required field `kind`"),
    (teacher("bundle", "path = 3"), "'path' is 3: expected `str`, got `int`"),
    (teacher("bundle", 'model = "x"'), r"unknown field `model`; known are .*'variant'"),
    (teacher("bundle", "scale = 0"), "'scale' is 0: expected `float` > 0"),
    (teacher("huggingface"), "missing required field `path`"),
    (
        teacher("huggingface", 'path = "x"', "context_length = 0"),
        "'context_length' is 0: expected `int` >= 1",
    ),
    (teacher("image-features"), "missing required field `path`"),
    (teacher("image-features", 'path = "x"', "scale = 3"), "unknown field `scale`"),
    (
        teacher("image-features", 'path = "x"', 'library = "keras"'),
        "'library' is 'keras': invalid enum value",
    ),
    (teacher("image-features", 'path = "x"', 'library = "timm"'), "library = 'timm' needs 'model'"),
    (teacher("sentence", 'path = "x"', 'pooling = "max"'), "'pooling' is 'max': invalid enum value 'max'"),
    (teacher("embeddings"), "got neither 'image' nor 'text'"),
    (teacher("embeddings", 'image = ["x.npy"]'), r"'image' is \['x.npy'\]: expected `str \| null`"),
]


@pytest.mark.parametrize(("table", "message"), WRONG_TABLES)
def test_a_wrong_table_names_its_place(table: str, message: str, folder: Path) -> None:
    with pytest.raises(EdgeClipError, match=rf"\[\[teacher\]\] 0: .*{message}") as caught:
        parse_recipe(recipe_text(folder, STAGE + FEATURE + table).encode())
    assert "\n" not in str(caught.value)


# Found while what it names is opened.
WRONG_FILES = [
    (FEATURE, teacher("bundle", 'path = "nowhere"'), r"bundle '.*nowhere'"),
    (
        FEATURE,
        teacher("checkpoint", 'path = "theirs"'),
        "'theirs', a directory of transformers; say kind = 'huggingface'",
    ),
    (FEATURE, teacher("checkpoint", 'path = "nowhere"'), "nowhere"),
    (
        FEATURE,
        teacher("checkpoint", 'path = "ours"', 'model = "x"'),
        "'probe-vit', got model 'x'; leave it out",
    ),
    (FEATURE, teacher("image-features", 'path = "ours"', 'model = "x"'), "got model 'x'; leave it out"),
    (FEATURE, teacher("bundle", 'variant = "x"'), "no variant 'x'; it has .*onnx-int8"),
    (FEATURE, teacher("huggingface", 'path = "nowhere"'), "teacher 't': 'path' is '.*nowhere', expected"),
    (FEATURE, teacher("image-features", 'path = "nowhere.pt"'), "'.*nowhere.pt' cannot be read"),
    (FEATURE, teacher("image-features", 'path = "."'), "'.*' is a folder"),
    (FEATURE, teacher("sentence", 'path = "nowhere.onnx"'), "'path' is '.*nowhere.onnx', which is no file"),
    (FEATURE, teacher("sentence", 'path = "nowhere"'), "'path' is '.*nowhere', expected a directory"),
    (FEATURE, teacher("embeddings", 'image = "nowhere.npy"'), "'image' is '.*nowhere.npy', which cannot"),
    (
        FEATURE,
        teacher("embeddings", 'image = "rows.npy"'),
        "'feature' asks for text .* 't' has no text tower",
    ),
    (FEATURE, teacher("embeddings", 'text = "rows.npy"'), "'feature' asks for image .* no image tower"),
    (AFFINITY, teacher("embeddings", 'image = "rows.npy"'), "'affinity' asks for text .* no text tower"),
]


@pytest.mark.parametrize(("loss", "table", "message"), WRONG_FILES)
def test_what_cannot_be_opened_is_one_sentence(loss: str, table: str, message: str, folder: Path) -> None:
    recipe = parse_recipe(recipe_text(folder, STAGE + loss + table).encode())
    with pytest.raises(EdgeClipError, match=message) as caught:
        dry_run_of(recipe, folder)
    assert "\n" not in str(caught.value)


def test_a_teacher_no_loss_asks_is_not_opened(folder: Path) -> None:
    recipe = parse_recipe(recipe_text(folder, STAGE + teacher("bundle", 'path = "nowhere"')).encode())
    assert open_run(recipe, folder).teachers == {}
