"""Students whose weights are cut out of a larger model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from train_runs import STAGE, VIT, make_data, recipe_text, run, run_recipe  # noqa: E402

from edgeclip.distill.recipe import Recipe, parse_recipe  # noqa: E402
from edgeclip.distill.run import open_run  # noqa: E402
from edgeclip.distill.student import Student, open_student  # noqa: E402
from edgeclip.errors import ConfigError, EdgeClipError  # noqa: E402
from edgeclip.models.checkpoints import CheckpointInfo, load_model, save_checkpoint  # noqa: E402
from edgeclip.models.clip import build_clip  # noqa: E402
from edgeclip.models.config import TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.foreign import save_foreign  # noqa: E402
from edgeclip.models.inherit import inherit  # noqa: E402
from edgeclip.models.zoo import clip_config  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

WIDTHS = "{width=32, heads=[2], hidden_dims=[40]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tokenizer, and the checkpoint ``larger`` of terms of its own."""
    folder = make_data(tmp_path_factory.mktemp("data"), train=64, held_out=8)
    student = open_run(parse_recipe(recipe_text(folder).encode()), folder).student
    info = CheckpointInfo(
        config=dataclasses.replace(student.config, name="larger"),
        scale=1.0,
        tokenizer_digest=student.tokenizer.digest,
        tokenizer_files={},
        licence="CC-BY-4.0",
    )
    with torch.no_grad():
        student.model.logit_scale.fill_(1.5)
    save_checkpoint(student.model, folder / "larger", info, tokenizer_files=student.tokenizer.files)
    return folder


def recipe_of(folder: Path, student: str) -> Recipe:
    text = recipe_text(folder, STAGE)
    head, rest = text.split("[student]", 1)
    return parse_recipe(
        f"{head}[student]\n{student}\n[data.train]{rest.split('[data.train]', 1)[1]}".encode()
    )


def opened(folder: Path, student: str) -> Student:
    return open_student(recipe_of(folder, student), folder)


def test_the_config_says_only_what_differs(folder: Path) -> None:
    student = opened(folder, f'inherit = "larger"\nconfig = {{ image = {WIDTHS} }}')
    larger = load_model(folder / "larger")
    assert isinstance(larger.config.image, ViTConfig)
    expected = dataclasses.replace(larger.config.image, width=32, heads=(2,), hidden_dims=(40,))
    assert student.config == dataclasses.replace(larger.config, name="tiny", image=expected)
    assert student.tokenizer.digest == Tokenizer.open(folder / "tokenizer").digest
    cut = inherit(larger.model, larger.config, student.config).state_dict()
    assert all(torch.equal(value, cut[name]) for name, value in student.model.state_dict().items())
    assert student.parents[0] == {
        "role": "start",
        "name": "larger",
        "licence": "CC-BY-4.0",
        "file": "larger",
        "source": "edgeclip",
        "parents": [],
    }
    first = opened(folder, 'inherit = "larger"\ninherit_layers = "first"\nconfig = { text = { width = 16 } }')
    assert first.config.text != student.config.text
    assert first.model.text_tower.config.width == 16  # type: ignore[union-attr]


def test_a_cut_student_trains_and_keeps_the_terms(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, f'inherit = "larger"\nconfig = {{ image = {WIDTHS} }}')
    result, heard = run_recipe(recipe, folder, tmp_path)
    assert result.licence == "Apache-2.0 AND CC-BY-4.0"
    assert heard[-1].step == 10
    assert load_model(tmp_path / "model").config.image.width == 32  # type: ignore[union-attr]


def test_a_published_file_may_be_cut(folder: Path) -> None:
    larger = clip_config("TinyCLIP-ViT-8M-16-Text-3M")
    assert isinstance(larger.image, ViTConfig)
    assert isinstance(larger.text, TextTransformerConfig)
    torch.manual_seed(0)
    model = build_clip(larger)
    save_foreign(model, larger, folder / "published.safetensors", source="tinyclip")
    student = opened(
        folder,
        'inherit = "published.safetensors"\ninherit_model = "TinyCLIP-ViT-8M-16-Text-3M"\n'
        "config = { image = { width = 64, heads = [1, 1], hidden_dims = [64, 64] } }",
    )
    tower = student.model.image_tower
    assert torch.equal(tower.stem.conv.weight, model.image_tower.stem.conv.weight[:64])  # type: ignore[union-attr]
    layers = [each.transformer.layers for each in (tower, model.image_tower)]  # type: ignore[union-attr]
    assert torch.equal(layers[0][1].fc1.weight, layers[1][5].fc1.weight[:64, :64])  # type: ignore[index, union-attr]
    assert student.config.text == larger.text


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ('inherit = "larger"', r"\[student\]: got \[\], expected 'model', 'config'"),
        ('inherit = "larger"\ncheckpoint = "larger"', "got 'inherit' beside 'checkpoint'"),
        ('model = "nano-transformer-192"\ninherit_model = "x"', "'inherit_model' stands without 'inherit'"),
        ('inherit = "larger"\nconfig = {}\ninherit_layers = "last"', "'inherit_layers' is 'last'"),
        ('inherit = "nothing"\nconfig = {}', "nothing"),
        ('inherit = "larger"\nconfig = {}\ninherit_model = "ViT-B-32.openai"', "got model 'ViT-B-32.openai'"),
        ('inherit = "larger"\nconfig = { image = { width = 64 } }', "'image.width' of the child is 64"),
        ('inherit = "larger"\nconfig = { image = { widht = 8 } }', r"unknown keys \['widht'\]"),
        ('inherit = "larger"\nmodel = "TinyCLIP-ViT-8M-16-Text-3M"', "of the child is .* must be the same"),
        ('inherit = "larger"\nconfig = { text = { context_length = 8 } }', "in rows of 16, the text tower"),
    ],
)
def test_what_cannot_be_cut_is_named(student: str, message: str, folder: Path) -> None:
    with pytest.raises(EdgeClipError, match=message):
        opened(folder, student)


def test_a_stage_begins_at_the_scale_it_asks_for(folder: Path, tmp_path: Path) -> None:
    second = STAGE.replace("contrastive", "second").replace("batch_size = 32", "batch_size = 32\nscale = 40")
    changes = ("stage.0.samples=96", "stage.1.samples=128", "stage.1.ema=0.9", "stage.0.ema=0.9")
    changes += ("stage.1.train_scale=false",)
    for out, stops in (("whole", ()), ("parts", (3, 2))):
        for after in stops:
            run(folder, tmp_path / out, STAGE, second, student=VIT, changes=changes, stop_after=after)
        _, heard = run(folder, tmp_path / out, STAGE, second, student=VIT, changes=changes)
        steps = [each.entry for each in heard if each.kind == "step"]
        assert steps[-1]["scale"] == pytest.approx(40)
        model = load_model(tmp_path / out / "model").model
        assert model.logit_scale.exp().item() == pytest.approx(40)
    with pytest.raises(ConfigError, match="'scale' is 101"):
        parse_recipe(recipe_text(folder, STAGE).encode(), changes=("stage.0.scale=101",))
