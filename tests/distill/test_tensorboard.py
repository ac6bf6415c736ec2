from __future__ import annotations

import errno
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from command import Command

torch = pytest.importorskip("torch")
from train_runs import STAGE, log, make_data, recipe_text  # noqa: E402

from edgeclip.distill.recipe import parse_recipe  # noqa: E402
from edgeclip.distill.tensorboard import written_scalars  # noqa: E402
from edgeclip.distill.trainer import Progress, TrainOptions, train  # noqa: E402
from edgeclip.errors import InputError, MissingExtraError  # noqa: E402

VALIDATION = '[[validation]]\nname = "pairs"\ndata = "held_out"\nevery = 4\n'
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the extra tensorboard is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"), train=64, held_out=8)
    (folder / "tiny.toml").write_text(recipe_text(folder, STAGE, VALIDATION), encoding="utf-8")
    return folder


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the events back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@needs_tensorboard
def test_a_run_that_was_killed_shows_every_step_once(folder: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(
        recipe_text(folder, STAGE, VALIDATION).encode(), changes=["checkpoint_every=4", "stage.0.ema=0.5"]
    )

    def run(until: int | None) -> None:
        with written_scalars(tmp_path / "tensorboard") as write:

            def hear(progress: Progress) -> None:
                write(progress)
                if progress.step == until:
                    raise KeyboardInterrupt  # nothing is saved

            train(recipe, TrainOptions(tmp_path / "run", folder), listen=hear)

    with pytest.raises(KeyboardInterrupt):
        run(7)
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["train/loss"]] == list(range(1, 8))
    run(None)
    found = scalars(tmp_path / "tensorboard")
    entries = log(tmp_path / "run")
    assert found["train/loss"] == [
        (entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in entries
    ]
    for tag, key in (("learning_rate", "lr"), ("grad_norm", "grad_norm"), ("scale", "scale")):
        assert [value for _, value in found[f"train/{tag}"]] == pytest.approx([e[key] for e in entries])
    assert [step for step, _ in found["loss/0-info-nce"]] == list(range(1, 11))
    assert [step for step, value in found["train/samples_per_s"] if value > 0] == list(range(1, 11))
    assert [step for step, _ in found["validation/pairs/image_to_text_r5"]] == [4, 8, 10]


@needs_tensorboard
def test_what_is_not_finite_is_written_and_steps_may_be_left_out(tmp_path: Path) -> None:
    with written_scalars(tmp_path / "made", every=2) as write:
        assert not (tmp_path / "made").exists()  # a rank that hears nothing writes nothing
        for step in range(1, 6):
            entry: dict[str, Any] = {"loss": "nan", "grad_norm": "inf", "lr": 0.1, "scale": 10.0}
            write(Progress("step", step, 5, {**entry, "parts": {}, "samples_per_s": 1.0}))
        write(Progress("remark", 5, 5, {}, "done"))
    found = scalars(tmp_path / "made")
    assert [step for step, _ in found["train/loss"]] == [2, 4, 5]
    assert all(math.isnan(value) for _, value in found["train/loss"])
    assert found["train/grad_norm"][0] == (2, math.inf)


@needs_tensorboard
def test_the_option_writes_beside_the_log_and_restart_clears(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", folder / "tiny.toml", "-o", tmp_path / "run", "--tensorboard")
    short = ("--set", "stage.0.samples=96", "--set", "stage.0.batch_size=32")
    command = Command(capsys)
    assert command(*arguments, *short).code == 0
    assert len(scalars(tmp_path / "run" / "tensorboard")["train/loss"]) == 3
    done = command(*arguments, *short, "--set", "seed=9", "--restart")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = pytest.raises(MissingExtraError, match=r"'tensorboard', .*edgeclip\[tensorboard\]")
    with missing, written_scalars(tmp_path):
        pass


@needs_tensorboard
def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    entry = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "scale": 10.0, "parts": {}, "samples_per_s": 1.0}
    refused = pytest.raises(InputError, match=r"files in .*file.* cannot be written: File exists")
    with refused, written_scalars(tmp_path / "file") as write:
        write(Progress("step", 1, 1, entry))


@needs_tensorboard
def test_what_cannot_be_written_at_the_end_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    close = SummaryWriter.close

    def full(writer: SummaryWriter) -> None:
        close(writer)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "close", full)
    entry = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "scale": 10.0, "parts": {}, "samples_per_s": 1.0}
    refused = pytest.raises(InputError, match="cannot be written: No space left on device")
    with refused, written_scalars(tmp_path / "made") as write:
        write(Progress("step", 1, 1, entry))
