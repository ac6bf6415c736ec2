from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402
from train_runs import (  # noqa: E402
    FASTVIT,
    STAGE,
    VIT,
    assert_same_weights,
    log,
    make_data,
    opened,
    run,
    steps,
    weights,
)

from edgeclip.distill import stage as stage_module  # noqa: E402
from edgeclip.distill.ranks import Ranks  # noqa: E402
from edgeclip.distill.state import latest_state  # noqa: E402
from edgeclip.distill.student import Student  # noqa: E402
from edgeclip.distill.trainer import MAX_SKIPPED_IN_A_ROW  # noqa: E402
from edgeclip.errors import ConfigError, EdgeClipError, InputError  # noqa: E402
from edgeclip.models.checkpoints import load_model, read_checkpoint_info  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

VALIDATIONS = """
[[validation]]
name = "pairs"
data = "train"
every = 5
limit = 40
[[validation]]
name = "labels"
kind = "zero-shot"
data = "held_out"
labels = "shapes/labels.json"
every = 100
limit = 40
"""


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was never stopped."""
    out = tmp_path_factory.mktemp("plain") / "run"
    run(folder, out)
    return out


# What comes out


@pytest.mark.slow
def test_training_learns(folder: Path, tmp_path: Path) -> None:
    changes = ("stage.0.samples=3840", "stage.0.batch_size=64", "stage.0.optimizer.learning_rate=4e-3")
    start = opened(folder, STAGE, VALIDATIONS, student=FASTVIT)
    student, validation = start.student, start.validations[0]
    before = validation.measure(
        student.model.eval(), student.config, student.tokenizer, device=torch.device("cpu")
    )
    result, heard = run(folder, tmp_path, STAGE, VALIDATIONS, student=FASTVIT, changes=changes)
    losses = [entry["loss"] for entry in steps(heard)]
    assert sum(losses[-5:]) / 5 < math.log(64) - 0.5
    assert result.validation is not None
    after = result.validation["pairs"]
    assert after["image_to_text_r5"] > 2 * before["image_to_text_r5"]
    assert after["text_to_image_r5"] > 2 * before["text_to_image_r5"]


def test_the_checkpoint_opens_and_says_what_it_is(folder: Path, plain: Path) -> None:
    info = read_checkpoint_info(plain / "model")
    assert (info.config.name, info.licence) == ("tiny", "Apache-2.0")
    assert info.parents[-1]["role"] == "recipe"
    assert Tokenizer.open(plain / "model").digest == Tokenizer.open(folder / "tokenizer").digest
    loaded = load_model(plain / "model")
    assert torch.isfinite(loaded.model.encode_image(torch.rand(2, 3, 32, 32))).all()
    assert (plain / "recipe.toml").exists()


def test_the_log_has_a_line_a_step(plain: Path) -> None:
    entries = log(plain)
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    assert [entry["samples"] for entry in entries] == list(range(32, 321, 32))
    last = entries[-1]
    assert last["parts"] == {"0-info-nce": pytest.approx(last["loss"])}
    assert last["lr"] == 0  # half a cosine to its end
    assert entries[1]["lr"] == pytest.approx(2e-3)
    assert all(
        entry["grad_norm"] > 0 and entry["samples_per_s"] > 0 and entry["updated"] for entry in entries
    )


def test_same_seed_same_weights_another_seed_others(folder: Path, plain: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "again")
    assert_same_weights(tmp_path / "again", plain)
    run(folder, tmp_path / "other", changes=("seed=4",))
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "other", plain)


def test_workers_do_not_change_the_weights(folder: Path, plain: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, workers=1)
    assert_same_weights(tmp_path, plain)


# Stopping and going on


@pytest.mark.parametrize("student", [VIT, FASTVIT], ids=["vit", "fastvit"])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    student: str, folder: Path, tmp_path: Path
) -> None:
    changes = ("stage.0.ema=0.9",)
    run(folder, tmp_path / "whole", student=student, changes=changes)
    for after in (3, 4):
        result, _ = run(folder, tmp_path / "parts", student=student, changes=changes, stop_after=after)
        assert result.status == "interrupted"
        assert result.model is None
    assert result.steps == 7
    result, heard = run(folder, tmp_path / "parts", student=student, changes=changes)
    assert (result.status, result.steps) == ("finished", 10)
    assert heard[0].text == "going on at step 7 of 10"
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    assert [entry["loss"] for entry in log(tmp_path / "parts")] == [
        entry["loss"] for entry in log(tmp_path / "whole")
    ]


def test_a_finished_run_is_left_alone(folder: Path, plain: Path) -> None:
    before = weights(plain)
    result, heard = run(folder, plain)
    assert (result.status, result.steps, heard) == ("present", 10, [])
    assert result.model == plain / "model"
    assert all(torch.equal(value, before[name]) for name, value in weights(plain).items())


def test_a_run_killed_before_its_model_was_complete_writes_it(folder: Path, tmp_path: Path) -> None:
    changes = ("stage.0.ema=0.9", "stage.0.samples=96")
    run(folder, tmp_path, changes=changes)
    before = weights(tmp_path)
    (tmp_path / "model").rename(tmp_path / ".partial-model")
    (tmp_path / ".partial-model" / "config.json").unlink()
    result, heard = run(folder, tmp_path, changes=changes)
    assert (result.status, steps(heard)) == ("finished", [])
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    assert read_checkpoint_info(tmp_path / "model").config.name == "tiny"


def test_restart_begins_again(folder: Path, plain: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, changes=("seed=9",))
    with pytest.raises(ConfigError, match=r"belongs to another recipe \(digest .*--restart"):
        run(folder, tmp_path)
    result, heard = run(folder, tmp_path, restart=True)
    assert (result.status, len(steps(heard))) == ("finished", 10)
    assert len(log(tmp_path)) == 10
    assert_same_weights(tmp_path, plain)


def test_ranks_that_disagree_throw_nothing_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(here: Ranks, what: str, value: bytes) -> None:
        raise ConfigError(f"the ranks disagree about {what}")

    run(folder, tmp_path, changes=("stage.0.samples=96",))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(Ranks, "check_same", disagree)
    with pytest.raises(ConfigError, match="disagree about recipe and data"):
        run(folder, tmp_path, restart=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_data_cannot_go_on(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", train=64, held_out=8)
    run(folder, tmp_path / "run", changes=("stage.0.samples=96",), stop_after=1)
    table = folder / "shapes" / "train.jsonl"
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"the data \['train'\] are others than when it began"):
        run(folder, tmp_path / "run", changes=("stage.0.samples=96",))


def test_a_directory_with_other_things_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds \['thesis.txt'\], but no run"):
        run(folder, tmp_path, restart=True)
    assert (tmp_path / "thesis.txt").exists()


def test_stages_follow_each_other_and_resume(folder: Path, tmp_path: Path) -> None:
    second = STAGE.replace("contrastive", "second").replace("samples = 320", "samples = 128")
    second += '[[stage.group]]\nmatch = "image_tower.*"\nlearning_rate = 0\n'
    changes = ("stage.0.samples=128",)
    run(folder, tmp_path / "whole", STAGE, second, changes=changes)
    run(folder, tmp_path / "parts", STAGE, second, changes=changes, stop_after=4)  # at the end of the first
    state = latest_state(tmp_path / "parts" / "states")
    assert state is not None
    position = json.loads((state / "state.json").read_text())["position"]
    assert (position["stage"], position["step"], position["total_steps"]) == (1, 0, 4)
    frozen = load_file(state / "model.safetensors")
    run(folder, tmp_path / "parts", STAGE, second, changes=changes, stop_after=2)
    run(folder, tmp_path / "parts", STAGE, second, changes=changes)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    after = weights(tmp_path / "whole")
    moved = {name for name in after if not torch.equal(after[name], frozen[name])}
    assert moved
    assert not any(name.startswith("image_tower") for name in moved)
    assert [entry["stage"] for entry in log(tmp_path / "whole")] == ["contrastive"] * 4 + ["second"] * 4


# Steps


def test_parts_give_the_step_of_the_whole_batch(folder: Path, plain: Path, tmp_path: Path) -> None:
    _, heard = run(folder, tmp_path, changes=("stage.0.parts=4",))
    whole = [entry["loss"] for entry in log(plain)]
    assert [entry["loss"] for entry in steps(heard)] == pytest.approx(whole, rel=1e-4)


def test_frozen_batch_norms_keep_their_statistics(folder: Path, tmp_path: Path) -> None:
    start = opened(folder, student=FASTVIT).student.model.state_dict()
    for name, changes in (("free", ()), ("frozen", ("stage.0.freeze_batch_norm=true",))):
        run(
            folder,
            tmp_path / name,
            student=FASTVIT,
            changes=("stage.0.samples=64", "stage.0.schedule.warmup=0", *changes),
        )
        after = weights(tmp_path / name)
        kept = [torch.equal(after[key], start[key]) for key in start if key.endswith("running_mean")]
        assert kept
        assert all(kept) is (name == "frozen")


def test_the_scale_may_stay_and_never_passes_100(folder: Path, tmp_path: Path) -> None:
    _, heard = run(folder, tmp_path / "stays", changes=("stage.0.train_scale=false",))
    assert {round(entry["scale"], 4) for entry in steps(heard)} == {round(1 / 0.07, 4)}
    group = '[[stage.group]]\nmatch = "logit_scale"\nlearning_rate = 2000\n'
    _, heard = run(folder, tmp_path / "fast", STAGE + group)
    scales = [entry["scale"] for entry in steps(heard)]
    assert max(scales) <= 100.001


def test_the_average_is_what_comes_out(folder: Path, plain: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, changes=("stage.0.ema=0.9",))
    state = latest_state(tmp_path / "states")
    assert state is not None
    raw, average = load_file(state / "model.safetensors"), load_file(state / "ema.safetensors")
    found = weights(tmp_path)
    name = next(key for key in found if key.endswith("weight"))
    assert torch.equal(found[name], average[name])
    assert not torch.equal(raw[name], average[name])
    assert torch.equal(raw[name], weights(plain)[name])  # averaging does not disturb


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_the_same_at_first(
    precision: str, folder: Path, plain: Path, tmp_path: Path
) -> None:
    changes = (f"stage.0.precision={precision}", "stage.0.samples=320")
    run(folder, tmp_path, changes=changes, stop_after=4)
    result, _ = run(folder, tmp_path, changes=changes)
    assert result.skipped <= 2  # float16 looks for its scale
    found = [entry["loss"] for entry in log(tmp_path)]
    assert found != [entry["loss"] for entry in log(plain)]
    assert found[-1] == pytest.approx(log(plain)[-1]["loss"], abs=0.2)
    run(folder, tmp_path / "whole", changes=changes)
    assert_same_weights(tmp_path, tmp_path / "whole")


def test_a_step_that_is_not_finite_is_skipped_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = stage_module.embed, 0

    def poisoned(model: Any, image: Any, tokens: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return (
            honest(model, image, tokens, **options)
            if calls != 3
            else tuple(
                rows * float("nan")
                for rows in honest(model, image.new_full(image.shape, 255), tokens, **options)
            )
        )

    monkeypatch.setattr(stage_module, "embed", poisoned)
    result, heard = run(folder, tmp_path, student=FASTVIT)
    assert result.skipped == 1
    assert [entry["updated"] for entry in steps(heard)] == [True, True, False, *[True] * 7]
    (line,) = (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    said = json.loads(line)
    assert (said["step"], said["loss"], len(said["keys"])) == (3, "nan", 32)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_nothing_but_nan_ends_training(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = stage_module.embed
    monkeypatch.setattr(
        stage_module,
        "embed",
        lambda *said, **options: tuple(rows * float("inf") for rows in honest(*said, **options)),
    )
    with pytest.raises(ConfigError, match=r"in 10 steps in a row, the last is step 10 .*learning rate"):
        run(folder, tmp_path)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == MAX_SKIPPED_IN_A_ROW


@pytest.mark.parametrize(
    "loss",
    [
        '[[stage.loss]]\nkind = "siglip"\n',
        '[[stage.loss]]\nkind = "decoupled"\n',
    ],
)
def test_every_plain_loss_trains_and_resumes(loss: str, folder: Path, tmp_path: Path) -> None:
    stage = STAGE[: STAGE.index("[[stage.loss]]")] + loss
    run(folder, tmp_path / "whole", stage)
    run(folder, tmp_path / "parts", stage, stop_after=5)
    run(folder, tmp_path / "parts", stage)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


# Data and validation


def test_broken_samples_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "data", train=64, held_out=8)
    for number in (3, 9):
        (folder / "shapes" / "images" / "train" / f"{number:06d}.png").write_bytes(b"no picture")
    changes = ("stage.0.samples=128", "stage.0.batch_size=16")
    result, _ = run(folder, tmp_path / "run", changes=changes)
    assert result.broken == 2
    with pytest.raises(InputError, match=r"2 of 64 samples cannot be used, 1 are allowed"):
        run(folder, tmp_path / "strict", changes=(*changes, "data.train.max_broken=1"))


def test_validations_are_logged_when_due_and_at_the_end(folder: Path, tmp_path: Path) -> None:
    result, _ = run(folder, tmp_path, STAGE, VALIDATIONS)
    found = log(tmp_path, "validation")
    assert [(entry["step"], entry["name"]) for entry in found] == [
        (5, "pairs"),
        (10, "pairs"),
        (10, "labels"),
    ]
    assert result.validation == {entry["name"]: entry["values"] for entry in found[1:]}
    pairs, labels = found[1]["values"], found[2]["values"]
    assert pairs["pictures"] == labels["pictures"] == 40
    assert 0 <= pairs["image_to_text_r1"] <= pairs["image_to_text_r5"] <= 1
    assert {"top1", "top5", "mean_per_class_recall"} <= labels.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage.0.batch_size=512", "batch size 512 is larger than the data, which have 256 samples"),
        ("student.config.text.vocab_size=100", "ids in rows of 16, the text tower reads 100 in rows of 16"),
        ("student.config.text.context_length=17", "reads .* in rows of 17"),
        ("student.config.text.pad_id=3", "leaves out 3"),
        ("student.config.image.widht=3", r"unknown keys \['widht'\]"),
        ("student.tokenizer=nowhere", "nowhere"),
        ('data.train.paths=["nothing.jsonl"]', "nothing.jsonl"),
        ("data.train.captions={zh_hant=1}", "expected zh_hant"),
    ],
)
def test_recipes_that_fit_nothing_write_nothing(
    change: str, message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeClipError, match=message):
        run(folder, tmp_path / "run", changes=(change, "stage.0.samples=5120"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_plan_counts_parameters_and_memory(folder: Path) -> None:
    group = '[[stage.group]]\nmatch = "text_tower.*"\nlearning_rate = 0\n'
    run_ = opened(folder, STAGE + group)
    assert isinstance(run_.student, Student)
    (plan,) = run_.check()
    text = sum(p.numel() for p in run_.student.model.text_tower.parameters())
    assert (plan.steps, plan.batch_size, plan.samples) == (10, 32, 256)
    assert plan.frozen == text
    assert plan.trained == sum(p.numel() for p in run_.student.model.parameters()) - text
    assert plan.matrix_bytes == 32 * 32 * 4
