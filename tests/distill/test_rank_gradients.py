from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

torch = pytest.importorskip("torch")
from rank_gradients import CASES, TOWERS  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from edgeclip.distill.ranks import Ranks  # noqa: E402
from edgeclip.distill.recipe import LossSpec, PictureMatchLoss  # noqa: E402

TOOL = Path(__file__).parents[1] / "tools" / "rank_gradients.py"
TOLERANCE = 1e-9  # the bar is 1e-6; float64 gives 1e-14


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The gradients of one process, and of two that torchrun started."""
    folder = tmp_path_factory.mktemp("gradients")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    for name, launcher in launchers.items():
        said = subprocess.run(
            [*launcher, str(TOOL), str(folder / name)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert said.returncode == 0, said.stderr[-2000:]
    return load_file(folder / "one"), load_file(folder / "two")


@pytest.mark.slow
@pytest.mark.parametrize("tower", list(TOWERS))
def test_two_ranks_give_the_gradients_of_one_process(
    tower: str, both: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    one, two = ({k: v for k, v in side.items() if k.startswith(f"{tower}/")} for side in both)
    assert one.keys() == two.keys()
    assert {name.split("/")[1] for name in one} > set(CASES)
    for name, expected in one.items():
        assert expected.dtype == torch.float64
        assert expected.abs().max() > 0 or name.endswith("/loss"), name
        assert (two[name] - expected).abs().max() <= TOLERANCE * expected.abs().max(), name


@pytest.mark.slow
def test_cases_differ_by_more_than_ranks_do(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one = both[0]
    key = "vit/{}/image_tower.projection.weight"
    first, second = one[key.format("info-nce")], one[key.format("info-nce with ids")]
    assert (first - second).norm() > 1e-3 * first.norm()


def test_every_loss_is_compared() -> None:
    compared = {type(term) for terms in CASES.values() for term in terms}
    # A picture match compares rows with pictures that all ranks share: no other rank's rows are in it.
    assert compared | {PictureMatchLoss} == set(get_args(LossSpec))


def test_averages_keep_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def summed(flat: Any) -> None:
        assert flat.dtype == torch.float64
        flat *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", summed)
    double, single = torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([0.5])
    before = double.clone()
    Ranks(2, 0, torch.device("cpu")).average_([double, single])
    assert torch.equal(double, before)
    assert torch.equal(single, torch.tensor([0.5]))
