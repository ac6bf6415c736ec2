"""LightCLIP's recipe at tiny scale: it learns, goes on exactly where it stopped, and leaves a plain model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402
from train_runs import (  # noqa: E402
    FASTVIT,
    VIT,
    assert_same_weights,
    log,
    make_data,
    recipe_text,
    run,
    weights,
)

from edgeclip.distill.recipe import (  # noqa: E402
    InfoNCELoss,
    MaskedTokensLoss,
    TokenAlignmentLoss,
    load_recipe,
    parse_recipe,
)
from edgeclip.distill.run import dry_run_of, open_run  # noqa: E402
from edgeclip.distill.state import latest_state  # noqa: E402
from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.checkpoints import load_model  # noqa: E402
from edgeclip.shape_files import write_shapes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

RECIPE = Path(str(files("edgeclip.distill.recipes").joinpath("lightclip.toml")))
TOOL = Path(__file__).parents[1] / "tools" / "train_runs.py"
PAIRS = """
[[validation]]
name = "pairs"
data = "held_out"
every = 100_000
limit = 96
"""


def stage(*, samples: int, learning_rate: float = 2e-3, more: str = "") -> str:
    """Return the stage of the recipe in small: its losses as they are shipped, word for word."""
    text = RECIPE.read_text(encoding="utf-8")
    losses = text[text.index("[[stage.loss]]") : text.index("[[validation]]")]
    return f"""
[[stage]]
name = "three-levels"
data = "train"
samples = {samples}
batch_size = 32
optimizer = {{ learning_rate = {learning_rate}, eps = 1e-4 }}
schedule = {{ warmup = 5 }}
{more}
{losses}"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), train=512, held_out=96)


def test_the_recipe_says_its_three_parts() -> None:
    (only,) = load_recipe(RECIPE).stage
    assert [type(loss) for loss in only.loss] == [InfoNCELoss, TokenAlignmentLoss, MaskedTokensLoss]
    first = only.loss[0]
    assert isinstance(first, InfoNCELoss)
    assert 0 == first.softness[0] < first.softness[1]


@pytest.mark.slow
def test_the_recipe_is_one_that_can_run(tmp_path: Path) -> None:
    write_shapes(tmp_path / "shapes", train=128, held_out=8, size_px=64, seed=1)
    (plan,), _ = dry_run_of(load_recipe(RECIPE), tmp_path)
    assert (plan.name, plan.frozen, plan.steps) == ("three-levels", 0, 1250)
    assert plan.matrix_bytes == 128 * 128 * 32 * 16 * 3 * 4  # pairs, words, patches, three numbers each


@pytest.mark.slow
@pytest.mark.parametrize(("student", "samples"), [(VIT, 7680), (FASTVIT, 2560)], ids=["vit", "fastvit"])
def test_it_learns(student: str, samples: int, folder: Path, tmp_path: Path) -> None:
    parts = (stage(samples=samples, learning_rate=3e-3), PAIRS)
    start = open_run(parse_recipe(recipe_text(folder, *parts, student=student).encode()), folder)
    before = start.validations[0].measure(
        start.student.model.eval(), start.student.config, start.student.tokenizer, device=torch.device("cpu")
    )
    result, heard = run(folder, tmp_path, *parts, student=student)
    assert result.validation is not None
    for way in ("image_to_text_r5", "text_to_image_r5"):
        # Chance is 5 of 96.
        assert before[way] < 0.15
        assert result.validation["pairs"][way] > before[way] + 0.12
    said = [step.entry["parts"] for step in heard if step.kind == "step"]
    for part in ("0-info-nce", "1-token-alignment", "2-masked-tokens"):
        assert sum(step[part] for step in said[-10:]) / 10 < said[0][part] - 1, part


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(folder, out, stage(samples=256), student=FASTVIT)
    return out


def test_it_goes_on_as_if_it_had_not_been_stopped(whole: Path, folder: Path, tmp_path: Path) -> None:
    plain = open_run(parse_recipe(recipe_text(folder, student=FASTVIT).encode()), folder).student.model
    for after in (3, 2):
        result, _ = run(folder, tmp_path, stage(samples=256), student=FASTVIT, stop_after=after)
        assert result.status == "interrupted"
        state = latest_state(tmp_path / "states")
        assert state is not None
        beside = {key for key in load_file(state / "optimizer.safetensors") if key.startswith("objective:")}
        assert {
            "objective:token_heads.1-image.weight",
            "objective:hidden_words.vector",
            "objective:hidden_words.fusions.0.query.weight",
            "objective:hidden_words.predict.weight",
        } < beside
        assert set(load_file(state / "model.safetensors")) == set(plain.state_dict())
    run(folder, tmp_path, stage(samples=256), student=FASTVIT)
    assert_same_weights(tmp_path, whole)
    assert [entry["parts"] for entry in log(tmp_path)] == [entry["parts"] for entry in log(whole)]


def test_what_only_training_needs_is_dropped_at_the_end(whole: Path, folder: Path) -> None:
    plain = open_run(parse_recipe(recipe_text(folder, student=FASTVIT).encode()), folder).student.model
    assert set(weights(whole)) == set(plain.state_dict())
    assert set(load_model(whole / "model").model.state_dict()) == set(plain.state_dict())


def test_parts_give_the_step_of_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    frozen = "freeze_batch_norm = true\n"
    for name, more in (("one", frozen), ("four", frozen + "parts = 4\n")):
        run(folder, tmp_path / name, stage(samples=192, more=more), student=FASTVIT)
    one, four = log(tmp_path / "one"), log(tmp_path / "four")
    for first, second in zip(one, four, strict=True):
        assert second["parts"] == pytest.approx(first["parts"], rel=1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


def test_recomputed_activations_change_nothing(whole: Path, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, stage(samples=256, more="checkpoint_activations = true\n"), student=FASTVIT)
    assert_same_weights(tmp_path, whole)


def test_lower_precision_says_nearly_the_same(whole: Path, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, stage(samples=192, more='precision = "bfloat16"\n'), student=VIT)
    run(folder, tmp_path / "exact", stage(samples=192), student=VIT)
    for first, second in zip(log(tmp_path), log(tmp_path / "exact"), strict=True):
        assert first["parts"] == pytest.approx(second["parts"], rel=0.05)
        assert first["parts"] != second["parts"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_it_goes_on_as_if_it_had_not_been_killed(whole: Path, folder: Path, tmp_path: Path) -> None:
    recipe = folder / "killed.toml"
    text = recipe_text(folder, stage(samples=256), student=FASTVIT)
    recipe.write_text(text.replace("checkpoint_every = 1000", "checkpoint_every = 2"), encoding="utf-8")
    for kill_at, code in (("5", -signal.SIGKILL), ("0", 0)):
        ended = subprocess.run(
            [sys.executable, str(TOOL), str(recipe), str(tmp_path), kill_at],
            timeout=300,
            check=False,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == code
    assert_same_weights(tmp_path, whole)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_process(folder: Path, tmp_path: Path) -> None:
    recipe = folder / "two.toml"
    text = recipe_text(folder, stage(samples=192, more="freeze_batch_norm = true\n"), student=FASTVIT)
    recipe.write_text(text, encoding="utf-8")
    for world in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        subprocess.run(
            [
                sys.executable,
                *(launch if world > 1 else []),
                str(TOOL),
                str(recipe),
                str(tmp_path / str(world)),
            ],
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    one, two = log(tmp_path / "1"), log(tmp_path / "2")
    for first, second in zip(one, two, strict=True):
        assert second["parts"] == pytest.approx(first["parts"], rel=1e-4)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)


BAG = """
[student.config.text]
kind = "bag"
vocab_size = {vocab}
context_length = 16
pad_id = {pad}
width = 16
hidden_dim = 16
embed_dim = 32
"""
EFFICIENTNET = """
[student.config]
image_size_px = [32, 32]
[student.config.image]
kind = "efficientnet-lite"
embed_dim = 32
"""


def test_towers_without_tokens_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'token-alignment' needs tokens of the student's image tower"):
        run(folder, tmp_path / "run", stage(samples=192), student=EFFICIENTNET)
    text = recipe_text(folder, stage(samples=192))
    vocab, pad = (int(text.split(f"{key} = ")[1].split()[0]) for key in ("vocab_size", "pad_id"))
    begins, ends = text.index("[student.config.text]"), text.index("[data.train]")
    bag = text[:begins] + BAG.format(vocab=vocab, pad=pad) + text[ends:]
    with pytest.raises(ConfigError, match=r"stage 'three-levels': .* the student's text tower"):
        open_run(parse_recipe(bag.encode()), folder).check()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "stage.0.loss.1.temperature=0.01",
            r"\[\[stage.loss\]\] 1: 'temperature' is 0.01: expected .* >= 0.02",
        ),
        ("stage.0.loss.2.share=1.0", r"\[\[stage.loss\]\] 2: 'share' is 1.0: expected .* < 1.0"),
        ("stage.0.loss.0.softness=[0.0, 1.0]", r"\[\[stage.loss\]\] 0: 'softness.* is .*: expected .* < 1.0"),
        ("stage.0.loss.0.spread=wide", r"'spread' is 'wide'"),
        ("stage.0.loss.2.fusion=2", r"`fusion`; known are .*'fusions'"),
    ],
)
def test_constants_out_of_range_are_named(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(RECIPE, changes=[change])


def test_words_are_hidden_once_a_stage() -> None:
    text = RECIPE.read_text(encoding="utf-8")
    block = text[text.index('[[stage.loss]]\nkind = "masked-tokens"') : text.index("[[validation]]")]
    with pytest.raises(ConfigError, match=r"\[\[stage.loss\]\] 3: kind = 'masked-tokens' stands twice"):
        parse_recipe(text.replace(block, block + block).encode())
