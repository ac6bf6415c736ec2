"""Disks that fill up, states that are damaged, numbers that overflow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from train_runs import (  # noqa: E402
    FASTVIT,
    assert_same_weights,
    log,
    recipe_text,
    run,
    steps,
)

from edgeclip.distill.recipe import parse_recipe  # noqa: E402
from edgeclip.distill.state import latest_state  # noqa: E402
from edgeclip.distill.trainer import Progress, TrainOptions, train  # noqa: E402
from edgeclip.errors import InputError  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

OFTEN = ("checkpoint_every=2",)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(folder, out, changes=OFTEN)
    return out


# Disks


@contextmanager
def kept_limits() -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse_large_files(progress: Progress) -> None:
    """Let the system refuse what is written after step 5, whoever writes it."""
    import resource

    if progress.kind == "step" and progress.step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_a_disk_that_is_full_costs_one_state(folder: Path, whole: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_text(folder).encode(), changes=OFTEN)
    with kept_limits(), pytest.raises(InputError) as refused:
        train(recipe, TrainOptions(tmp_path, folder), listen=refuse_large_files)
    said = str(refused.value)
    assert "step-00000006' cannot be written: " in said
    assert "File too large" in said
    assert said.endswith("the same command goes on from 'step-00000004'.")
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["step-00000002", "step-00000004"]
    _, heard = run(folder, tmp_path, changes=OFTEN)
    assert heard[0].text == "going on at step 4 of 10"
    assert_same_weights(tmp_path, whole)


def test_a_disk_without_room_says_so(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeclip.distill import state

    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"\x00" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "write_state", full)
    with pytest.raises(InputError, match=r"step-00000002' cannot be written: .*No space left .* beginning"):
        run(folder, tmp_path, changes=OFTEN)
    assert list((tmp_path / "states").iterdir()) == []
    monkeypatch.undo()
    run(folder, tmp_path, changes=OFTEN)
    assert_same_weights(tmp_path, whole)


# Damage


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_state_is_named_and_the_one_before_goes_on(
    file: str, folder: Path, whole: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path, changes=OFTEN, stop_after=5)
    newest = latest_state(tmp_path / "states")
    assert newest is not None
    assert newest.name == "step-00000005"
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"step-00000005.*Remove it to resume from the one before"):
        run(folder, tmp_path, changes=OFTEN)
    assert newest.is_dir()  # nothing was thrown away
    for part in newest.iterdir():
        part.unlink()
    newest.rmdir()
    _, heard = run(folder, tmp_path, changes=OFTEN)
    assert heard[0].text == "going on at step 4 of 10"
    assert_same_weights(tmp_path, whole)


# Precision


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns(precision: str, folder: Path, tmp_path: Path) -> None:
    changes = (
        "stage.0.samples=1920",
        "stage.0.batch_size=64",
        "stage.0.optimizer.learning_rate=4e-3",
        f"stage.0.precision={precision}",
    )
    result, heard = run(folder, tmp_path, student=FASTVIT, changes=changes)
    losses = [entry["loss"] for entry in steps(heard) if entry["updated"]]
    assert sum(losses[-3:]) / 3 < losses[0] - 1
    assert result.skipped <= 5  # float16 looks for its scale


def test_float16_skips_what_overflows_and_resumes_its_scale(folder: Path, tmp_path: Path) -> None:
    changes = ("stage.0.precision=float16", "stage.0.samples=640", *OFTEN)
    result, heard = run(folder, tmp_path / "whole", student=FASTVIT, changes=changes)
    skipped = [entry["step"] for entry in steps(heard) if not entry["updated"]]
    assert skipped
    assert result.skipped == len(skipped)
    after = skipped[-1] + 1
    run(folder, tmp_path / "parts", student=FASTVIT, changes=changes, stop_after=after)
    state = latest_state(tmp_path / "parts" / "states")
    assert state is not None
    scaler = json.loads((state / "state.json").read_text(encoding="utf-8"))["scaler"]
    assert scaler["scale"] == 2.0 ** (16 - len(skipped))
    assert scaler["_growth_tracker"] == 1
    run(folder, tmp_path / "parts", student=FASTVIT, changes=changes)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    assert [e["loss"] for e in log(tmp_path / "parts")] == [e["loss"] for e in log(tmp_path / "whole")]
