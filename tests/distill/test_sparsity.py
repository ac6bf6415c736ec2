"""Masks: what they cost, what they leave, and that runs which prune go on exactly where they stopped."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from train_runs import (  # noqa: E402
    FASTVIT,
    STAGE,
    VIT,
    assert_same_weights,
    log,
    opened,
    run,
    run_recipe,
    start,
    steps,
    weights,
    write,
)

from edgeclip.distill import trainer as trainer_module  # noqa: E402
from edgeclip.distill.randomness import random_stream  # noqa: E402
from edgeclip.distill.recipe import PruneSpec, load_recipe  # noqa: E402
from edgeclip.distill.sparsity import Sparsity, TowerMasks  # noqa: E402
from edgeclip.distill.state import latest_state  # noqa: E402
from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.checkpoints import load_model, read_checkpoint_info  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import CLIPConfig, TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.gates import gated, layer_parameters, sampled_gates  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = CLIPConfig(
    name="full",
    image=ViTConfig(
        width=48, heads=(3, 3), hidden_dims=(96, 96), head_dim=16, patch_px=8, grid=(2, 2), embed_dim=24
    ),
    text=TextTransformerConfig(
        vocab_size=50,
        context_length=8,
        width=32,
        heads=(4, 2, 2),
        hidden_dims=(64, 64, 64),
        head_dim=8,
        embed_dim=24,
    ),
    image_size_px=(16, 16),
)
BOTH = PruneSpec(image=0.5, text=0.6)

PRUNE = """
[stage.prune]
image = 0.5
text = 0.6
gates = ["channels", "heads", "neurons", "layers"]
warmup = 1
learning_rate = 1.5
multiplier_learning_rate = 2.0
"""
SECOND = STAGE.replace("contrastive", "second").replace("samples = 320", "samples = 160")
FIRST = STAGE.replace("samples = 320", "samples = 192") + PRUNE


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a stage that prunes and one behind it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(folder, out, FIRST, SECOND, changes=("stage.0.ema=0.9", "stage.1.ema=0.9"))
    return out


EMA = ("stage.0.ema=0.9", "stage.1.ema=0.9")


def full(dtype: Any = torch.float64) -> CLIP:
    torch.manual_seed(0)
    return build_clip(CONFIG).to(dtype)


def sparsity(spec: PruneSpec = BOTH, *, spread: float = 0.0) -> Sparsity:
    made = Sparsity(CONFIG, spec, where="stage 'mask'").double()
    torch.manual_seed(1)
    with torch.no_grad():
        for loga in made.masks():
            loga.add_(torch.randn_like(loga) * spread - spread)
        made.clamp_()
    return made


def noise(made: Sparsity, step: int = 0) -> Any:
    return made.noise(random_stream(3, step, 0, "gates"))


def pictures() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# What masks cost


def test_the_penalty_is_one_sided_and_its_multipliers_ascend() -> None:
    masks = TowerMasks(CONFIG.image, 0.5, ("heads",)).double()  # type: ignore[arg-type]
    for share, target, expected in ((0.8, 0.5, 10 * 0.3 + 10 * 0.09), (0.4, 0.5, 0.0), (0.5, 0.5, 0.0)):
        where = torch.tensor(share, dtype=torch.float64, requires_grad=True)
        cost = masks.penalty(where, target)
        assert cost.item() == pytest.approx(expected)
        slope, linear, quadratic = torch.autograd.grad(cost, [where, masks.linear, masks.quadratic])
        above = max(share - target, 0)
        assert slope.item() == pytest.approx(10 + 20 * above if above else 0)
        assert (linear.item(), quadratic.item()) == pytest.approx((above, above**2))


def test_the_target_falls_from_everything_to_the_share() -> None:
    made = Sparsity(CONFIG, PruneSpec(image=0.4, warmup=10), where="stage 'mask'")
    (masks,) = (each for each in made.modules() if isinstance(each, TowerMasks))
    assert [made.target(masks, step) for step in (0, 5, 10, 99)] == pytest.approx([1, 0.7, 0.4, 0.4])


@pytest.mark.parametrize(
    "gates", [("channels", "heads", "neurons"), ("heads",), ("neurons", "layers"), ("channels",)]
)
def test_the_expected_share_is_the_mean_over_steps(gates: Any) -> None:
    made = sparsity(PruneSpec(image=0.9, gates=gates), spread=3.0)
    masks = made.towers["image"]
    assert isinstance(masks, TowerMasks)
    counts = []
    for step in range(1000):
        uniform = noise(made, step)["image"]
        drawn = {
            name: (sampled_gates(loga, uniform[name]) > 0).double() for name, loga in masks.masks.items()
        }
        gates_of_step = masks.gates(lambda name, loga, drawn=drawn: drawn[name])  # type: ignore[misc]
        counts.append(layer_parameters(masks.config, gates_of_step).item() / masks.whole)
    _, said = made.penalty(0)
    error = float(np.std(counts)) / len(counts) ** 0.5
    assert abs(np.mean(counts) - said["kept-image"].item()) < 4 * error
    assert error > 0


def test_masks_that_only_pay_reach_the_share_and_stay_there() -> None:
    made = sparsity(PruneSpec(image=0.5, text=0.6, warmup=250))
    optimizer = torch.optim.AdamW(
        [
            {"params": made.masks(), "lr": 0.02},
            {"params": made.multipliers(), "lr": 0.02, "maximize": True},
        ],
        weight_decay=0.0,
    )
    for step in range(400):
        optimizer.zero_grad()
        cost, said = made.penalty(step)
        cost.backward()
        optimizer.step()
        made.clamp_()
    assert 0.45 < said["kept-image"].item() < 0.5 + 1e-3
    assert 0.55 < said["kept-text"].item() < 0.6 + 1e-3
    assert all(multiplier.item() > 10 for multiplier in made.multipliers())


# What they leave


def test_pruning_gives_the_gates_without_chance() -> None:
    made, model = sparsity(spread=2.0), full()
    small, config = made.pruned(model, CONFIG)
    masks = made.towers["image"]
    assert isinstance(masks, TowerMasks)
    expected = gated(model.image_tower, masks.settled())(pictures())  # type: ignore[arg-type]
    assert (small.encode_image(pictures()) - expected).abs().max() <= 1e-9
    assert config.image.width < 48
    assert build_clip(config).state_dict().keys() == small.state_dict().keys()
    assert small.logit_scale is model.logit_scale
    said = made.report(model, small)
    _, expectation = made.penalty(0)
    for name in ("image", "text"):
        assert said[name].share == pytest.approx(expectation[f"kept-{name}"].item(), abs=0.03)
        assert said[name].parameters[1] < said[name].parameters[0]
    assert said["image"].width == (48, config.image.width)


def test_a_tower_without_a_share_stays() -> None:
    made, model = sparsity(PruneSpec(text=0.5), spread=2.0), full()
    assert made.view(model, noise(made)).image_tower is model.image_tower
    small, config = made.pruned(model, CONFIG)
    assert small.image_tower is model.image_tower
    assert config.image == CONFIG.image
    assert config.text != CONFIG.text


def test_a_step_s_gates_follow_from_its_number() -> None:
    made, model = sparsity(spread=3.0), full()
    first, again, other = (made.view(model, noise(made, step)).encode_image(pictures()) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first.square().sum().backward()
    reached = [loga for loga in made.towers["image"].masks.values() if loga.grad is not None]  # type: ignore[union-attr]
    assert any(bool(loga.grad.any()) for loga in reached)
    assert model.image_tower.projection.weight.grad is not None  # type: ignore[union-attr]


def test_chance_never_closes_every_channel() -> None:
    made, model = sparsity(PruneSpec(image=0.5)), full()
    drawn = noise(made)
    drawn["image"]["channels"].fill_(1e-9)
    drawn["image"]["channels"][7] = 1e-8
    assert made.view(model, drawn).image_tower.config.width == 1  # type: ignore[union-attr]


# What cannot be asked for


@pytest.mark.parametrize(
    ("student", "stage", "message"),
    [
        (
            FASTVIT,
            FIRST,
            r"stage 'contrastive': 'prune.image' is 0.5, but the image tower is of kind 'fastvit'",
        ),
        (VIT, STAGE + "[stage.prune]\nwarmup = 2\n", r"'prune' asks for nothing"),
        (
            VIT,
            FIRST.replace("warmup = 1\nlearning", "warmup = 6\nlearning"),
            r"'prune.warmup' is 6 steps, .* has 6",
        ),
        (VIT, FIRST.replace("image = 0.5", "image = 1.5"), r"'prune.image' is 1.5: expected `float` < 1.0"),
        (VIT, FIRST.replace('"layers"]', '"blocks"]'), r"'blocks'"),
        (
            VIT,
            FIRST.replace(', "layers"]', "]").replace("0.5", "0.001", 1),
            r"keeps at least 0\.00\d of its layers' parameters",
        ),
        (
            VIT,
            FIRST.replace(', "neurons", "layers"]', "]").replace('"channels", ', "").replace("0.5", "0.4", 1),
            r"keeps at least 0\.\d+ of its layers' parameters with gates on \['heads'\]",
        ),
    ],
)
def test_what_cannot_be_pruned_is_named(
    student: str, stage: str, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(folder, tmp_path / "run", stage, student=student)
    assert not (tmp_path / "run").exists()


def test_channels_of_mct_and_losses_over_tokens_are_named(folder: Path) -> None:
    stage = FIRST + '[[stage.loss]]\nkind = "token-alignment"\n'
    run_ = opened(folder, stage)
    with pytest.raises(ConfigError, match="'prune' stands beside a loss over patches or words"):
        run_.sparsity(run_.recipe.stage[0])
    config = dataclasses.replace(
        CONFIG, text=dataclasses.replace(CONFIG.text, attention="full", conv_ends=True)
    )
    with pytest.raises(ConfigError, match="the text tower has 'conv_ends', whose channels have no gates"):
        Sparsity(config, BOTH, where="stage 'mask'")
    made = Sparsity(config, PruneSpec(text=0.6, gates=("heads", "neurons")), where="stage 'mask'")
    assert made.pruned(build_clip(config), config)[1].text.width == 32  # type: ignore[union-attr]


# Runs


def test_a_stage_prunes_and_the_next_goes_on_with_what_is_left(folder: Path, whole: Path) -> None:
    entries = log(whole)
    assert [entry["stage"] for entry in entries] == ["contrastive"] * 6 + ["second"] * 5
    first = [entry for entry in entries if entry["stage"] == "contrastive"]
    for entry in first:
        assert entry["loss"] == pytest.approx(entry["parts"]["0-info-nce"] + entry["parts"]["prune"])
    assert first[-1]["parts"]["kept-image"] < first[0]["parts"]["kept-image"]
    assert "prune" not in entries[-1]["parts"]
    (said,) = log(whole, "prune")
    assert said["step"] == 6
    assert said["towers"]["image"]["share"] < 0.8
    info = read_checkpoint_info(whole / "model")
    start = opened(folder, STAGE).student
    assert isinstance(info.config.image, ViTConfig)
    assert info.config.image.width == said["towers"]["image"]["width"][1] < 48
    assert info.config.name == "tiny"
    loaded = load_model(whole / "model").model
    smaller, larger = (sum(p.numel() for p in model.parameters()) for model in (loaded, start.model))
    assert smaller < 0.8 * larger
    assert sum(p.numel() for p in loaded.image_tower.parameters()) == said["towers"]["image"]["parameters"][1]
    picture = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = loaded.encode_image(picture)
        assert torch.allclose(reparameterize(loaded).encode_image(picture), expected, atol=1e-5)


@pytest.mark.parametrize("after", [1, 5, 6, 7])
def test_a_run_that_prunes_is_stopped_and_goes_on(
    after: int, folder: Path, whole: Path, tmp_path: Path
) -> None:
    result, _ = run(folder, tmp_path, FIRST, SECOND, changes=EMA, stop_after=after)
    assert (result.status, result.steps) == ("interrupted", after)
    state = latest_state(tmp_path / "states")
    assert state is not None
    said = read_checkpoint_info(state).config
    assert (said == read_checkpoint_info(whole / "model").config) is (after >= 6)
    result, heard = run(folder, tmp_path, FIRST, SECOND, changes=EMA)
    remarks = [each.text for each in heard if each.kind == "remark" and "asked: 0.5" in each.text]
    assert len(remarks) == (after < 6)
    assert (result.status, len(steps(heard))) == ("finished", 11 - after)
    assert_same_weights(tmp_path, whole)
    assert [entry["loss"] for entry in log(tmp_path)] == [entry["loss"] for entry in log(whole)]
    assert log(tmp_path, "prune") == log(whole, "prune")
    again, heard = run(folder, tmp_path, FIRST, SECOND, changes=EMA)
    assert (again.status, heard) == ("present", [])


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.slow
def test_a_run_that_prunes_is_killed_and_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    recipe = write(folder, "prune", FIRST, SECOND)
    run_recipe(load_recipe(recipe), folder, tmp_path / "whole")
    # With two steps between states: in the stage that prunes, then in the one behind it.
    for kill_at in (3, 5):
        assert start(recipe, tmp_path / "killed", 1, kill_at) == [-signal.SIGKILL]
    run_recipe(load_recipe(recipe), folder, tmp_path / "killed")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_a_run_that_ends_while_it_prunes_does_it_again(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (*EMA, "checkpoint_every=4")
    expected = run(folder, tmp_path / "whole", FIRST, SECOND, changes=changes)

    def dying(*said: Any, **options: Any) -> None:
        raise KeyboardInterrupt  # the model is pruned, nothing of it is written

    honest = trainer_module._Trainer._prune

    def pruning(self: Any, *said: Any) -> None:
        honest(self, *said)
        monkeypatch.setattr(trainer_module, "save_state", dying)

    monkeypatch.setattr(trainer_module._Trainer, "_prune", pruning)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "parts", FIRST, SECOND, changes=changes)
    assert len(log(tmp_path / "parts", "prune")) == 1
    monkeypatch.undo()
    found = run(folder, tmp_path / "parts", FIRST, SECOND, changes=changes)
    assert found[1][0].text == "going on at step 4 of 11"
    assert len(log(tmp_path / "parts", "prune")) == 1
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    assert expected[0].steps == 11


@pytest.mark.slow
def test_two_ranks_prune_alike(folder: Path, tmp_path: Path) -> None:
    recipe = write(folder, "ranks", FIRST, SECOND)
    run_recipe(load_recipe(recipe), folder, tmp_path / "1")
    assert start(recipe, tmp_path / "2", 2) == [0, 0]
    one, two = (weights(tmp_path / str(world)) for world in (1, 2))
    assert {name: value.shape for name, value in one.items()} == {
        name: value.shape for name, value in two.items()
    }
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-4), name


def test_micro_batches_see_the_same_gates(folder: Path, whole: Path, tmp_path: Path) -> None:
    changes = (*EMA, "stage.0.parts=4", "stage.0.checkpoint_activations=true")
    _, heard = run(folder, tmp_path, FIRST, SECOND, changes=changes)
    assert [entry["loss"] for entry in steps(heard)] == pytest.approx(
        [entry["loss"] for entry in log(whole)], rel=1e-3
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_prunes_and_resumes(
    precision: str, folder: Path, whole: Path, tmp_path: Path
) -> None:
    changes = (*EMA, f"stage.0.precision={precision}", f"stage.1.precision={precision}")
    run(folder, tmp_path / "whole", FIRST, SECOND, changes=changes)
    for after in (4, 4):
        run(folder, tmp_path / "parts", FIRST, SECOND, changes=changes, stop_after=after)
    run(folder, tmp_path / "parts", FIRST, SECOND, changes=changes)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    first, other = (log(out)[2]["parts"] for out in (whole, tmp_path / "whole"))
    assert first["0-info-nce"] != other["0-info-nce"]
    assert first["prune"] == pytest.approx(other["prune"], rel=0.05)


def test_the_average_is_pruned_as_the_weights_are(folder: Path, tmp_path: Path) -> None:
    validation = '[[validation]]\nname = "pairs"\ndata = "train"\nevery = 3\nlimit = 40\n'
    run(folder, tmp_path, FIRST, validation, changes=EMA[:1])
    state = latest_state(tmp_path / "states")
    assert state is not None
    average, raw = load_file(state / "ema.safetensors"), load_file(state / "model.safetensors")
    found = weights(tmp_path)
    assert {name: value.shape for name, value in average.items()} == {
        name: raw[name].shape for name in average
    }
    assert all(torch.equal(found[name], value) for name, value in average.items())
    assert not all(torch.equal(raw[name], value) for name, value in average.items())
    # The last validation is of the model that comes out.
    run_ = opened(folder, FIRST, validation)
    loaded = load_model(tmp_path / "model")
    expected = run_.validations[0].measure(
        loaded.model, loaded.config, run_.student.tokenizer, device=torch.device("cpu")
    )
    assert log(tmp_path, "validation")[-1]["values"] == expected


def test_a_step_that_is_not_finite_leaves_the_masks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TowerMasks.share
    calls = 0

    def poisoned(self: TowerMasks) -> Tensor:
        nonlocal calls
        calls += 1
        return honest(self) * (float("nan") if calls == 3 else 1.0)

    monkeypatch.setattr(TowerMasks, "share", poisoned)
    result, heard = run(folder, tmp_path, FIRST, changes=("stage.0.samples=96", "stage.0.prune.text=0.9"))
    assert result.skipped == 1
    assert [entry["updated"] for entry in steps(heard)] == [True, False, True]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
