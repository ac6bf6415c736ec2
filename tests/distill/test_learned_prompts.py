"""Learned prompts: through every kind of text tower, from words to vectors and back into a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeclip.classify import ZeroShotClassifier  # noqa: E402
from edgeclip.distill.adapt import Self, Taught, adapt, first_labels, posterior  # noqa: E402
from edgeclip.distill.eager import open_eager  # noqa: E402
from edgeclip.distill.learned_prompts import (  # noqa: E402
    LearnedPrompts,
    PromptSettings,
    PromptTower,
    open_prompt_tower,
)
from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.label_sets import Label, LabelSet, Templates  # noqa: E402

DATA = Path(__file__).parent.parent / "data"
PROBES = ("mobileclip", "tinyclip", "vit")
LABELS = LabelSet.of(
    [Label("red circle", ("a round red thing",), ("one filled shape in red",)), "blue square", "green star"]
)
TEMPLATE = Templates.of("a picture of one {}")
ROUNDING = 1e-5
pytestmark = pytest.mark.usefixtures("one_thread")


def probe(name: str, labels: LabelSet = LABELS, templates: Templates = TEMPLATE) -> PromptTower:
    return open_prompt_tower(str(DATA / "probes" / name), labels, templates)


@pytest.mark.parametrize("name", PROBES)
def test_the_words_of_the_template_give_the_bank_as_it_is(name: str) -> None:
    tower = probe(name)
    expected = open_eager(str(DATA / "probes" / name)).bank(LABELS, TEMPLATE)
    rows = tower.rows(tower.start()).detach().numpy()
    assert tower.words == 4
    assert np.abs(rows - expected.embeddings).max() < ROUNDING
    assert tower.check(expected.embeddings, where="probe") == pytest.approx(1)


@pytest.mark.parametrize("name", PROBES)
def test_other_vectors_give_other_rows_and_leave_the_tower_alone(name: str) -> None:
    tower = probe(name)
    start = tower.start()
    before = tower.rows(start)
    moved = tower.rows(start + 0.5 * torch.randn(start.shape, generator=torch.Generator().manual_seed(0)))
    assert (moved - before).abs().max() > 0.01
    assert moved.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert torch.equal(tower.rows(start), before)


def test_descriptions_are_no_prompts_and_do_not_move() -> None:
    spoken = Label("red circle", (), ("one filled shape in red",))
    tower = probe("vit", LabelSet.of(["blue square", spoken]))
    alone = probe("vit", LabelSet.of(["blue square", "red circle"]))
    context = torch.zeros_like(tower.start())
    described = open_eager(str(DATA / "probes/vit")).texts(["one filled shape in red"])[0]
    expected = alone.rows(context)[1].numpy() + described
    row = tower.rows(context)[1].numpy()
    assert np.abs(row - expected / np.linalg.norm(expected)).max() < ROUNDING


def test_the_default_model_is_a_bag_and_fits_its_checkpoint_without_the_weights_of_its_image_tower() -> None:
    labels, templates = LabelSet.of(["cat", "dog", "red fox"]), Templates.of("one")
    with ZeroShotClassifier.open() as classifier:
        classifier.set_labels(labels, templates=templates)
        bank = classifier.bank
    tower = open_prompt_tower(str(DATA / "default-checkpoint"), labels, templates)
    assert tower.check(bank.embeddings, where="checkpoint") > 0.999
    assert tower.words >= 3


@pytest.mark.parametrize("name", PROBES)
def test_a_context_that_was_moved_is_found_again_from_pictures(name: str) -> None:
    """Pictures lie where other words than the template's would put their labels."""
    names = ["red circle", "blue square", "green star", "yellow cross", "pink ring", "black square"]
    tower = probe(name, LabelSet.of(names))
    rng = np.random.default_rng(0)
    start = tower.start()
    away = torch.from_numpy(rng.normal(size=start.shape).astype(np.float32)) * start.norm(dim=1).mean() / 4
    meant = tower.rows(start + away).detach().numpy()
    own = np.repeat(np.arange(len(names)), 20)
    noise = rng.normal(size=(2, len(own), meant.shape[1])) * 0.4 / np.sqrt(meant.shape[1])
    seen, others = (
        np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)
        for rows in meant[own] + noise
    )
    rows = tower.rows(start).detach().numpy()
    fit = LearnedPrompts(tower, Taught(np.eye(len(names))[own]), 20.0)
    learned = fit(seen, rows, np.arange(len(own)))
    surprise = [
        -np.log(posterior(others, each, 20.0)[np.arange(len(own)), own]).mean() for each in (rows, learned)
    ]
    assert surprise[1] < 0.9 * surprise[0]
    assert np.mean(first_labels(others, learned) == own) >= np.mean(first_labels(others, rows) == own)
    assert np.array_equal(fit(seen, rows, np.arange(len(own))), learned)
    judged = adapt(seen, rows, LearnedPrompts(tower, Self(20.0), 20.0), scale=20.0).judgement
    assert judged.pictures == len(own)


def test_training_ends_where_it_stops_to_help() -> None:
    tower = probe("vit")
    rows = tower.rows(tower.start()).numpy()
    pictures = np.repeat(rows, 10, axis=0)
    said = np.eye(3)[np.repeat([1, 2, 0], 10)]
    wild = PromptSettings(steps=30, learning_rate=1e4, patience=2)
    kept = LearnedPrompts(tower, Taught(np.eye(3)[np.repeat([0, 1, 2], 10)]), 50.0, wild)
    assert np.abs(kept(pictures, rows, np.arange(30)) - rows).max() < ROUNDING  # no step was better
    learned = LearnedPrompts(tower, Taught(said), 20.0)(pictures, rows, np.arange(30))
    assert np.abs(learned - rows).max() > 0.01


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (Templates.of("bare"), "has no words before the label that can be learned"),
        (Templates.of(["a {}", "one {}"]), "got 2 templates, expected one"),
    ],
)
def test_templates_without_words_to_learn_are_refused(templates: Templates, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe("vit", templates=templates)


def test_another_kind_of_tower_is_refused() -> None:
    tokenizer: Any = None
    with pytest.raises(ConfigError, match="its text tower is a Linear; prompts are learned through"):
        PromptTower(torch.nn.Linear(2, 2), tokenizer, LABELS, TEMPLATE)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    tower = probe("vit")
    other = probe("tinyclip")
    rows = other.rows(other.start()).detach().numpy()
    with pytest.raises(ConfigError, match="is not the checkpoint that the bundle was exported from"):
        tower.check(rows, where="checkpoint")
    with pytest.raises(ConfigError, match="dimensions, the bundle into 7"):
        tower.check(rows[:, :7], where="checkpoint")


def test_no_checkpoint_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        open_prompt_tower(str(tmp_path / "nowhere"), LABELS, TEMPLATE)
    for file in (DATA / "probes/vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_prompt_tower(str(tmp_path), LABELS, TEMPLATE)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps 0"):
        PromptSettings(steps=0)
