"""The shipped recipe dc-clip, at a size for one core."""

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
    with_changes,
)

from edgeclip.distill.recipe import FeatureLoss, InfoNCELoss  # noqa: E402
from edgeclip.shapes import captions, ordered_combinations  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_its_stages_are_the_published_ones() -> None:
    recipe = recipe_of("dc-clip")
    features, alignment = recipe.stage
    assert [(type(spec), spec.tower, spec.distance) for spec in features.loss] == [
        (FeatureLoss, "image", "smooth-l1"),
        (FeatureLoss, "text", "smooth-l1"),
    ]
    assert [type(spec) for spec in alignment.loss] == [InfoNCELoss]
    assert recipe.data["train"].captions == {"alt": 0.5, "zh": 0.5}


def test_its_rows_are_long_enough_for_both_languages() -> None:
    length = recipe_of("dc-clip").student.config["text"]["context_length"]
    tokenizer = Tokenizer.clip(length)
    combinations = ordered_combinations(False, 0)
    for number, combination in zip(range(300), combinations, strict=False):
        for language in ("en", "zh"):
            (text,) = captions(combination, language, number)
            assert tokenizer.count(text) <= length


@pytest.mark.slow
def test_english_and_chinese_both_beat_the_starting_point(tmp_path: Path) -> None:
    recipe = beside_probe(
        "dc-clip",
        tmp_path,
        "stage.0.samples=2400",
        "stage.0.batch_size=40",
        "stage.0.schedule.warmup=5",
        "stage.0.optimizer.learning_rate=4e-3",
        "stage.1.samples=2000",
        "stage.1.batch_size=40",
        "stage.1.schedule.warmup=5",
        "stage.1.optimizer.learning_rate=2e-3",
    )
    before = measured(recipe, tmp_path)
    after, steps = trained(recipe, tmp_path, tmp_path / "run")
    for pairs in ("english-pairs", "chinese-pairs"):
        # Of 100 pictures and captions; chance finds 5 % among the first five.
        assert recall(before[pairs], 5) < 0.12
        assert recall(after[pairs], 5) > recall(before[pairs], 5) + 0.1
    for labels in ("english-labels", "chinese-labels"):
        assert after[labels]["pictures"] == 100
    features = [step for step in steps if step["stage"] == "features"]
    assert all(
        features[-1]["parts"][name] < 0.85 * features[0]["parts"][name] for name in features[0]["parts"]
    )


@pytest.mark.slow
def test_the_commands_of_its_comment_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, teacher, student, published = commands_of("dc-clip")
    assert shapes == ["edgeclip", "data", "make-shapes", "-o", "shapes"]
    monkeypatch.chdir(tmp_path)
    # The teacher that comes with edgeclip reads both languages, too.
    bundle = [*with_changes('teacher=[{kind="bundle", name="teacher"}]'), "--dry-run"]
    assert_commands_work(
        [*shapes, "--train", "32", "--held-out", "8"],
        [*teacher, *short(0)],
        [*student, *short(0, 1)],
        [*student, *short(0, 1), *bundle],
    )
    assert (tmp_path / "run" / "model" / "config.json").is_file()

    assert published[:3] == ["edgeclip", "train", "dc-clip"]
    recipe = recipe_of("dc-clip", *changes_of(published))
    assert (recipe.student.model, recipe.teacher[0].name) == ("MobileCLIP2-S0", "teacher")
