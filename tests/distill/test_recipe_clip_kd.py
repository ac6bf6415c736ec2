"""The shipped recipe clip-kd, at a size for one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from shipped_recipes import (  # noqa: E402
    assert_commands_work,
    beside_probe,
    changes_of,
    commands_of,
    measured,
    recall,
    recipe_of,
    short,
    trained,
)

from edgeclip.distill.recipe import AffinityLoss, FeatureLoss, InfoNCELoss, InteractiveLoss  # noqa: E402
from edgeclip.models.checkpoints import read_checkpoint_info  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_losses_are_the_published_ones_at_the_teacher_s_width() -> None:
    (stage,) = recipe_of("clip-kd").stage
    width = recipe_of("plain-clip").student.config["image"]["embed_dim"]
    assert [(type(spec), spec.weight) for spec in stage.loss] == [
        (InfoNCELoss, 1.0),
        (AffinityLoss, 1.0),
        (InteractiveLoss, 1.0),
        (FeatureLoss, 2000.0 * width / 512),
    ]
    assert (stage.optimizer.learning_rate, stage.optimizer.weight_decay) == (1e-3, 0.1)


@pytest.mark.slow
def test_it_beats_its_starting_point(tmp_path: Path) -> None:
    recipe = beside_probe(
        "clip-kd",
        tmp_path,
        "stage.0.samples=2800",
        "stage.0.batch_size=40",
        "stage.0.schedule.warmup=5",
        "stage.0.optimizer.learning_rate=2e-3",
        "stage.0.loss.3.weight=375",  # 2000 at 512 dimensions, the probe has 96
    )
    before = measured(recipe, tmp_path)["held-out-pairs"]
    after, steps = trained(recipe, tmp_path, tmp_path / "run")
    # Of 100 pictures and captions; chance finds 5 % among the first five.
    assert recall(before, 5) < 0.1
    assert recall(after["held-out-pairs"], 5) > recall(before, 5) + 0.3
    assert after["held-out-labels"]["pictures"] == 100
    parts = steps[-1]["parts"]
    assert sorted(parts) == ["0-info-nce", "1-affinity", "2-interactive", "3-feature"]
    assert all(parts[name] < 0.8 * steps[0]["parts"][name] for name in parts)
    info = read_checkpoint_info(tmp_path / "run" / "model")
    assert [(parent["role"], parent["name"]) for parent in info.parents] == [
        ("teacher", "probe-vit"),
        ("recipe", "clip-kd"),
    ]


@pytest.mark.slow
def test_the_commands_of_its_comment_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, teacher, student, published = commands_of("clip-kd")
    assert shapes == ["edgeclip", "data", "make-shapes", "-o", "shapes"]
    monkeypatch.chdir(tmp_path)
    assert_commands_work(
        [*shapes, "--train", "32", "--held-out", "8"], [*teacher, *short(0)], [*student, *short(0)]
    )
    assert (tmp_path / "run" / "model" / "config.json").is_file()

    assert published[:3] == ["edgeclip", "train", "clip-kd"]
    recipe = recipe_of("clip-kd", *changes_of(published))
    assert (recipe.student.model, recipe.teacher[0].name) == ("MobileCLIP2-S0", "teacher")
    assert (recipe.stage[0].batch_size, recipe.stage[0].schedule.warmup) == (1024, 10_000)
    assert recipe.stage[0].loss[3].weight == 2000
