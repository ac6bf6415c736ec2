"""Embeddings from files teach what the model that made them teaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from train_runs import STAGE, make_data, recipe_text, run, steps  # noqa: E402

from edgeclip.distill.batches import BatchLoader, BatchPlan, to_float  # noqa: E402
from edgeclip.distill.recipe import EmbeddingsTeacher, parse_recipe  # noqa: E402
from edgeclip.distill.run import open_run  # noqa: E402
from edgeclip.distill.samples import BrokenLimit, open_samples  # noqa: E402
from edgeclip.distill.teachers import open_teacher  # noqa: E402
from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models.checkpoints import load_checkpoint  # noqa: E402
from edgeclip.pictures import decode_image  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

LOSSES = """
[[stage.loss]]
kind = "affinity"
teachers = ["t"]
[[stage.loss]]
kind = "interactive"
teacher = "t"
[[stage.loss]]
kind = "feature"
teacher = "t"
"""
ONLINE = '[[teacher]]\nkind = "checkpoint"\nname = "t"\npath = "first/model"\nscale = 30\n'
FILES = '[[teacher]]\nkind = "embeddings"\nname = "t"\nimage = "image.npy"\ntext = "text.npy"\nscale = 30\n'
WHOLE = ("data.train.crop_scale=[1, 1]",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model, and what it says of every whole picture and its caption, in the order of the table."""
    folder = make_data(tmp_path_factory.mktemp("data"), train=96, held_out=8)
    run(folder, folder / "first", changes=("stage.0.samples=96",))
    model, tokenizer = load_checkpoint(folder / "first" / "model"), Tokenizer.open(folder / "tokenizer")
    lines = (folder / "shapes" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pictures = [np.array(decode_image(folder / "shapes" / row["image"])) for row in rows]
    batch = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        image = model.encode_image(to_float(batch, mean=(0.0,) * 3, std=(1.0,) * 3))
        text = model.encode_text(torch.from_numpy(tokenizer([row["caption"] for row in rows], truncate=True)))
    np.save(folder / "image.npy", image.numpy())
    np.save(folder / "text.npy", text.numpy().astype(np.float64))
    np.save(folder / "half.npy", image.numpy().astype(np.float16))
    return folder


def test_files_and_the_model_that_made_them_teach_the_same(folder: Path, tmp_path: Path) -> None:
    changes = (*WHOLE, "stage.0.samples=96", "stage.0.parts=2")
    _, online = run(folder, tmp_path / "online", STAGE + LOSSES + ONLINE, changes=changes)
    _, files = run(folder, tmp_path / "files", STAGE + LOSSES + FILES, changes=changes)
    assert len(steps(online)) == 3
    for mine, other in zip(steps(files), steps(online), strict=True):
        assert mine["parts"] == pytest.approx(other["parts"], rel=1e-4)


def test_rows_are_those_of_the_samples_on_every_rank_and_for_replaced_ones(
    folder: Path, tmp_path: Path
) -> None:
    teacher = open_teacher(EmbeddingsTeacher(name="t", image="image.npy", text="text.npy"), folder)
    assert (teacher.image_dim, teacher.text_dim, teacher.consumer) == (32, 32, None)
    assert teacher.to(torch.device("cpu")) is teacher
    samples = open_samples([folder / "shapes" / "train.jsonl"])
    opened = open_run(parse_recipe(recipe_text(folder, STAGE + LOSSES + FILES).encode()), folder)
    inputs = opened.inputs(opened.recipe.stage[0])
    image, text = np.load(folder / "image.npy"), np.load(folder / "text.npy")
    keys = [samples.key(number) for number in range(len(samples))]
    broken = set(keys[::5])

    def prepare(sample: Any, randomness: Any) -> Any:
        if sample.key in broken:
            raise InputError("damaged on purpose")
        return inputs(sample, randomness)

    replaced = 0
    for rank in range(2):
        plan = BatchPlan(len(samples), 32, 0, 2, rank)
        loader = BatchLoader(samples, plan, prepare, limit=BrokenLimit(share=1.0))
        batches = loader.batches()
        for (_, wanted), batch in zip(plan.requests(), [next(batches) for _ in range(4)], strict=False):
            said = teacher.ask(batch, inputs)
            numbers = [keys.index(key) for key in batch.keys]  # by name, not by the number it carries
            assert np.array_equal(said.image.numpy(), image[numbers])
            assert np.allclose(said.texts[0].numpy(), text[numbers], atol=1e-7)
            replaced += int((wanted != np.array(numbers)).sum())
    assert replaced > 10


def test_one_side_alone_and_half_precision_teach_features(folder: Path, tmp_path: Path) -> None:
    teacher = open_teacher(EmbeddingsTeacher(name="t", image="half.npy", licence="CC0-1.0"), folder)
    assert (teacher.image_dim, teacher.text_dim) == (32, None)
    assert teacher.parent == {
        "role": "teacher",
        "name": "t",
        "licence": "CC0-1.0",
        "file": "half.npy",
        "source": "embeddings",
        "parents": [],
    }
    feature = '[[stage.loss]]\nkind = "feature"\nteacher = "t"\ntower = "image"\nweight = 500\n'
    files = '[[teacher]]\nkind = "embeddings"\nname = "t"\nimage = "half.npy"\n'
    changes = (*WHOLE, "data.train.captions={alt=1, zh=1}")  # captions do not matter to pictures
    _, heard = run(folder, tmp_path / "run", STAGE + feature + files, changes=changes)
    parts = [entry["parts"]["1-feature"] for entry in steps(heard)]
    assert parts[-1] < 0.7 * parts[0]
    with pytest.raises(ConfigError, match=r"'affinity' asks for text .* 't' has no text tower"):
        run(folder, tmp_path / "other", STAGE + LOSSES + files)


def test_a_digest_ties_rows_to_their_samples(folder: Path) -> None:
    digest = open_samples([folder / "shapes" / "train.jsonl"]).digest
    for said, fits in ((digest, True), ("0" * 64, False)):
        text = recipe_text(folder, STAGE + LOSSES + FILES + f'digest = "{said}"\n')
        recipe = parse_recipe(text.encode())
        if fits:
            open_run(recipe, folder)
            continue
        with pytest.raises(ConfigError, match=f"'digest' is '0000.*', .* have '{digest[:16]}'"):
            open_run(recipe, folder)


def test_a_row_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    rows = np.load(folder / "image.npy")
    rows[:, 3] = np.nan
    np.save(folder / "nan.npy", rows)
    with pytest.raises(InputError, match=r"row \d+ of 'image' \(sample '.*png'\) is not finite"):
        run(folder, tmp_path, STAGE + LOSSES + FILES.replace("image.npy", "nan.npy"), changes=WHOLE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("teacher.0.image=few.npy",),
            r"'image' has 95 rows, expected 96, one for each sample of \[data.train\]",
        ),
        (("teacher.0.text=few.npy",), "'text' has 95 rows, expected 96"),
        (("data.train.captions={alt=1, zh=1}",), r"draws 1 captions of the kinds \['alt', 'zh'\]"),
        (("stage.0.texts=2",), "'text' has one row a sample, but stage 'contrastive' draws 2 captions"),
    ],
)
def test_rows_that_are_not_the_samples_are_refused(
    changes: tuple[str, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    np.save(folder / "few.npy", np.ones((95, 32), np.float32))
    with pytest.raises(ConfigError, match=f"teacher 't': .*{message}"):
        run(folder, tmp_path / "run", STAGE + LOSSES + FILES, changes=changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which cannot be read as a .npy file: .*No such file"),
        (b"not an array", "which cannot be read as a .npy file"),
        (b"PK\x03\x04 but no archive", "which cannot be read as a .npy file"),
        (b"\x93NUMPY\x01\x00\x08\x00{'a': ( ", "which cannot be read as a .npy file"),
        (b"\x93NUMPY\x01\x00\x20\x4e" + b" " * 20000, "which cannot be read as a .npy file"),
        (np.ones(3, np.float32), r"with float32 \(3,\), expected \(N, d\)"),
        (np.ones((3, 2), np.int64), r"with int64 \(3, 2\), expected \(N, d\) of float16 or"),
        (np.ones((3, 0), np.float32), r"with float32 \(3, 0\), expected"),
        (np.array([["a"], [{}]], dtype=object), "cannot be read as a .npy file: .*"),
    ],
)
def test_files_that_hold_something_else_are_named(content: Any, message: str, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "x.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "x.npy", content, allow_pickle=True)
    with pytest.raises(ConfigError, match=f"teacher 't': 'text' is '.*x.npy'.*{message}") as caught:
        open_teacher(EmbeddingsTeacher(name="t", text="x.npy"), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones((3, 2), np.float32))
    with pytest.raises(ConfigError, match=r"x.npz', which cannot be read as a .npy file: the magic string"):
        open_teacher(EmbeddingsTeacher(name="t", image="x.npz"), tmp_path)
