"""The shipped recipes tinyclip and tinyclip-manual, at a size for one core."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from shipped_recipes import PROBE, changes_of, commands_of, measured, recall, recipe_of, trained  # noqa: E402
from train_runs import log  # noqa: E402

from edgeclip.distill.recipe import AffinityLoss, Recipe  # noqa: E402
from edgeclip.models.checkpoints import load_model, read_checkpoint_info  # noqa: E402
from edgeclip.models.config import TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.models.zoo import clip_config  # noqa: E402
from edgeclip.shape_files import write_shapes  # noqa: E402

VALIDATION = [
    'data.held_out={paths=["shapes/held_out.jsonl"]}',
    'data.train.paths=["shapes/train.jsonl"]',
    "data.train.crop_scale=[0.9, 1.0]",
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def teacher() -> str:
    return f'teacher=[{{kind="checkpoint", name="parent", path="{PROBE}", scale=50.0}}]'


def validation(every: int) -> str:
    return f'validation=[{{name="pairs", data="held_out", every={every}}}]'


def smaller(before: Any, after: Any) -> bool:
    return all(
        small < large
        for small, large in (
            (after.width, before.width),
            (sum(after.heads), sum(before.heads)),
            (sum(after.hidden_dims), sum(before.hidden_dims)),
        )
    )


def test_stages_losses_and_rates_are_the_published_ones() -> None:
    recipe = recipe_of("tinyclip")
    shares = 1.0
    for index, (steps, kept) in enumerate(((3000, 0.75), (5000, 0.5), (8000, 0.25))):
        mask, recover = recipe.stage[2 * index : 2 * index + 2]
        assert (mask.steps, mask.schedule.kind, recover.schedule.kind) == (steps, "constant", "cosine")
        assert mask.prune is not None
        assert (mask.prune.warmup, mask.prune.learning_rate, mask.prune.image) == (
            1000,
            0.02,
            mask.prune.text,
        )
        assert set(mask.prune.gates) == {"channels", "heads", "neurons"}
        shares *= mask.prune.image or 1.0
        assert shares == pytest.approx(kept, abs=1e-3)
        assert recover.prune is None
    stages = (*recipe.stage, *recipe_of("tinyclip-manual").stage)
    for stage in stages:
        assert stage.loss == (AffinityLoss(teachers=("parent",)),)
        assert (stage.clip_norm, stage.optimizer.learning_rate) == (5.0, 1e-4)
        assert (stage.scale, stage.train_scale, recipe.teacher[0].scale) == (50.0, False, 50.0)


def test_the_second_run_by_hand_fits_the_first() -> None:
    first, second = commands_of("tinyclip-manual")
    recipes: list[Recipe] = [recipe_of("tinyclip-manual", *changes_of(each)) for each in (first, second)]
    assert [recipe.student.model for recipe in recipes] == [
        "TinyCLIP-ViT-61M-32-Text-29M",
        "TinyCLIP-ViT-40M-32-Text-19M",
    ]
    from edgeclip.models.clip import build_clip
    from edgeclip.models.inherit import inherit

    names = ["ViT-B-32.laion2b_s34b_b79k", *(recipe.student.model for recipe in recipes)]
    for larger, small in itertools.pairwise(names):
        assert larger is not None
        assert small is not None
        with torch.device("meta"):
            inherit(build_clip(clip_config(larger)), clip_config(larger), clip_config(small), layers="first")


@pytest.mark.slow
def test_pruned_students_recover(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", train=600, held_out=100, size_px=64)
    changes = [f'student={{checkpoint="{PROBE}"}}', teacher(), validation(16), *VALIDATION]
    for index in range(6):
        at = f"stage.{index}."
        changes += [at + "samples=512", at + "batch_size=32", at + "precision=float32"]
        changes += [at + "optimizer.learning_rate=1e-3"]
        if index % 2 == 0:
            changes += [at + "prune.learning_rate=0.5", at + "prune.warmup=4"]
            changes += [at + "prune.image=0.6", at + "prune.text=0.6"]
    recipe = recipe_of("tinyclip", *changes)
    after, steps = trained(recipe, tmp_path, tmp_path / "run")
    # The last measurement of a stage that prunes is of what is left, before any recovery. One pair of 100 is
    # found by chance.
    just_pruned, recovered = (
        [recall(entry["values"], 1) for entry in log(tmp_path / "run", "validation")[start::2]]
        for start in (0, 1)
    )
    assert recovered[-1] == recall(after["pairs"], 1)
    assert recovered[-1] > just_pruned[-1] + 0.1
    assert sum(recovered) > sum(just_pruned) + 0.3
    assert all(step["scale"] == pytest.approx(50) for step in steps)

    rounds = [entry["towers"] for entry in log(tmp_path / "run", "prune")]
    assert len(rounds) == 3
    for tower in ("image", "text"):
        shares = [each[tower]["share"] for each in rounds]
        assert all(0.5 < share < 0.9 for share in shares)
        sizes = [each[tower]["parameters"] for each in rounds]
        assert [before for before, _ in sizes[1:]] == [left for _, left in sizes[:-1]]

    parent, student = load_model(PROBE), load_model(tmp_path / "run" / "model")
    counts = [sum(p.numel() for p in loaded.model.parameters()) for loaded in (parent, student)]
    assert counts[1] < 0.75 * counts[0]
    assert smaller(parent.config.image, student.config.image)
    assert smaller(parent.config.text, student.config.text)
    assert (
        counts[1] == sum(rounds[-1][tower]["parameters"][1] for tower in ("image", "text")) + 1
    )  # the scale
    parents = read_checkpoint_info(tmp_path / "run" / "model").parents
    assert [(each["role"], each["name"]) for each in parents] == [
        ("start", "probe-vit"),
        ("teacher", "probe-vit"),
        ("recipe", "tinyclip"),
    ]
    model = student.model
    picture = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.encode_image(picture)
        assert torch.allclose(reparameterize(model).encode_image(picture), expected, atol=1e-4)


@pytest.mark.slow
def test_cut_students_recover(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", train=600, held_out=100, size_px=64)
    sizes = "width=80, heads=[3, 2], hidden_dims=[160, 160]"
    recipe = recipe_of(
        "tinyclip-manual",
        f'student={{inherit="{PROBE}", config={{image={{{sizes}}}, text={{{sizes}}}}}}}',
        teacher(),
        validation(1000),
        *VALIDATION,
        "stage.0.samples=1280",
        "stage.0.batch_size=32",
        "stage.0.precision=float32",
        "stage.0.schedule.warmup=2",
        "stage.0.optimizer.learning_rate=1e-3",
    )
    cut = measured(recipe, tmp_path)["pairs"]
    after, steps = trained(recipe, tmp_path, tmp_path / "run")
    assert recall(after["pairs"], 5) > recall(cut, 5) + 0.3
    assert steps[-1]["parts"]["0-affinity"] < 0.7 * steps[0]["parts"]["0-affinity"]
    student = load_model(tmp_path / "run" / "model")
    assert isinstance(student.config.image, ViTConfig)
    assert isinstance(student.config.text, TextTransformerConfig)
    assert (student.config.image.heads, student.config.text.width) == ((3, 2), 80)
    assert student.parents[0]["role"] == "start"
    assert student.licence == "Apache-2.0"
