from __future__ import annotations

import os
import signal
import socket
from datetime import timedelta
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from train_runs import (  # noqa: E402
    FASTVIT,
    STAGE,
    assert_same_weights,
    log,
    recipe_text,
    run,
    start,
    weights,
    write,
)

from edgeclip.distill import ranks as ranks_module  # noqa: E402
from edgeclip.distill.ranks import Ranks, place_of_process, ranks  # noqa: E402
from edgeclip.errors import ConfigError  # noqa: E402

TOLERANCE = 1e-4  # float32 sums in another order, over the steps of a run


def assert_close(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= TOLERANCE * (1 + value.abs().max()), name


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe whose result does not depend on how it is shared, and its run by one process."""
    fields = "batch_size = 32\nfreeze_batch_norm = true\nparts = 2"
    recipe = write(folder, "frozen.toml", STAGE.replace("batch_size = 32", fields), student=FASTVIT)
    out = tmp_path_factory.mktemp("alone") / "run"
    assert start(recipe, out, 1) == [0]
    return recipe, out


@pytest.mark.slow
def test_two_ranks_give_the_weights_of_one_process(alone: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, expected = alone
    assert start(recipe, tmp_path, 2) == [0, 0]
    assert_close(tmp_path, expected)
    one, two = log(expected), log(tmp_path)
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], rel=1e-4)
    assert [entry["step"] for entry in two] == list(range(1, 11))  # only one rank writes


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_number_of_ranks_may_change_on_the_way(alone: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, expected = alone
    assert start(recipe, tmp_path, 1, 5) == [-signal.SIGKILL]
    assert start(recipe, tmp_path, 2) == [0, 0]
    assert_close(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_run_killed_three_times_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    recipe = write(
        folder, "killed.toml", STAGE.replace("batch_size = 32", "batch_size = 32\nema = 0.9"), student=FASTVIT
    )
    assert start(recipe, tmp_path / "whole", 1) == [0]
    for kill_at in (1, 5, 3):  # before the first state; after the second; after the third
        assert start(recipe, tmp_path / "killed", 1, kill_at) == [-signal.SIGKILL]
        assert not (tmp_path / "killed" / "model").exists()
    assert start(recipe, tmp_path / "killed", 1) == [0]
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert [entry["loss"] for entry in log(tmp_path / "killed")] == [
        entry["loss"] for entry in log(tmp_path / "whole")
    ]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_two_ranks_killed_end_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    recipe = write(folder, "two.toml", student=FASTVIT)  # batch norms learn
    assert start(recipe, tmp_path / "whole", 2) == [0, 0]
    assert -signal.SIGKILL in start(recipe, tmp_path / "killed", 2, 5)
    assert start(recipe, tmp_path / "killed", 2) == [0, 0]
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_alone_nothing_is_averaged() -> None:
    value = torch.ones(3)
    with ranks("cpu") as here:
        assert here == Ranks(1, 0, torch.device("cpu"))
        here.average_([value])
    assert torch.equal(value, torch.ones(3))


def test_a_batch_that_ranks_cannot_share_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeclip.distill.recipe import parse_recipe
    from edgeclip.distill.run import open_run

    recipe = parse_recipe(recipe_text(folder).encode(), changes=["stage.0.parts=16"])
    opened = open_run(recipe, folder)
    assert opened.plan(recipe.stage[0], world=2).batch_size == 32
    with pytest.raises(ConfigError, match=r"each of 4 processes takes 8 samples .* 'parts' 16"):
        opened.plan(recipe.stage[0], world=4)
    with pytest.raises(ConfigError, match="batch size 32 cannot be shared by 3 processes"):
        opened.plan(recipe.stage[0], world=3)


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1")])
def test_an_environment_that_is_not_torchruns_is_named(
    name: str, value: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}='{value}'"):
        run(folder, tmp_path)


def test_an_unknown_device_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device is 'tpu', expected 'cpu' or 'cuda'"):
        run(folder, tmp_path, device="tpu")


def test_a_rank_of_more_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(ConfigError, match="RANK=5 and WORLD_SIZE=2"), ranks("cpu"):
        pass
    with pytest.raises(ConfigError, match="RANK=5 and WORLD_SIZE=2"):
        place_of_process("cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU of its own, torch sees 2"):
        place_of_process("cuda")
    with pytest.raises(ConfigError, match="torch sees 2"), ranks("cuda"):
        pass
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert place_of_process("cuda") == (4, 3)
    assert taken == [torch.device("cuda", 1)]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_does_not_wait_for_ever_for_others(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_module, "_MEETING", timedelta(seconds=1))
    with pytest.raises(ConfigError, match=r"2 processes cannot meet: .*torchrun"), ranks("cpu"):
        pass
