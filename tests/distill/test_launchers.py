"""Real launchers: torchrun and accelerate, their signals, and ranks that disagree."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402
from train_runs import FASTVIT, assert_same_weights, log, make_data, recipe_text, run  # noqa: E402

from edgeclip.distill.ranks import ranks  # noqa: E402
from edgeclip.distill.state import latest_state  # noqa: E402
from edgeclip.errors import ConfigError  # noqa: E402

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Of accelerate's launchers only the one of several GPUs starts several processes by itself; it needs no GPU.
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
TOOL = Path(__file__).parents[1] / "tools" / "poisoned_rank.py"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"))
    path = folder / "tiny.toml"
    path.write_text(recipe_text(folder, student=FASTVIT), encoding="utf-8")
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], *, timeout_s: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun stops its processes with it
        process.communicate()
        raise
    return process.returncode, out, err


def train(launcher: tuple[str, ...], recipe: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    return start(*launcher, "-m", "edgeclip", "train", recipe, "-o", out, *more)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by torchrun that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said, err = finished(train(TORCHRUN, recipe, out))
    assert code == 0, err
    assert said.count("finished: 10 steps") == 1  # one rank speaks
    return out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_launches_the_same_run(recipe: Path, whole: Path, tmp_path: Path) -> None:
    code, said, err = finished(train(ACCELERATE, recipe, tmp_path / "run"))
    assert code == 0, err
    assert said.count("finished: 10 steps") == 1
    assert_same_weights(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_signal_to_torchrun_saves_on_the_way_out(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = recipe.with_name("long.toml")
    text = recipe.read_text(encoding="utf-8")
    long.write_text(text.replace("samples = 320", "samples = 64000"), encoding="utf-8")
    # torchrun passes the signal on to the workers too.
    process = train(TORCHRUN, long, out, "--workers", 1)
    until = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len(log(out)) < 3:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finished(process)
    state = latest_state(out / "states")
    assert state is not None
    steps = [entry["step"] for entry in log(out)]
    assert state.name == f"step-{steps[-1]:08d}"  # nothing that was done is lost
    assert steps == list(range(1, steps[-1] + 1))
    assert not (out / "model").exists()


@pytest.mark.slow
def test_a_rank_with_nan_makes_all_skip_the_step(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, _, err = finished(start(*TORCHRUN, TOOL, recipe, out, 1, 4))
    assert code == 0, err
    assert [entry["updated"] for entry in log(out)] == [step != 4 for step in range(1, 11)]
    (line,) = (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(json.loads(line)["keys"]) == 32
    first, second = (load_file(out / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())


_DISAGREE = """
import os, sys
from pathlib import Path
data, out, tools, kind = sys.argv[1:]
sys.path.insert(0, tools)
from train_runs import run
rank = os.environ["RANK"]
try:
    run(Path(data), Path(out) / (f"own-{rank}" if kind == "runs" else "same"), changes=(
        (f"seed={rank}",) if kind == "recipes" else ()
    ))
except Exception as error:
    (Path(out) / f"{kind}-{rank}.txt").write_text(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "what"), [("recipes", "recipe and data"), ("runs", "where training stands")]
)
def test_ranks_that_see_other_files_are_refused(recipe: Path, tmp_path: Path, kind: str, what: str) -> None:
    if kind == "runs":
        run(recipe.parent, tmp_path / "own-0", stop_after=3)  # as on two machines without a shared directory
    script = tmp_path / "disagree.py"
    script.write_text(_DISAGREE, encoding="utf-8")
    code, _, err = finished(start(*TORCHRUN, script, recipe.parent, tmp_path, TOOL.parent, kind))
    assert code == 0, err
    for rank in (0, 1):
        said = tmp_path / f"{kind}-{rank}.txt"
        assert said.exists(), err
        assert f"the 2 ranks disagree about {what} (seen on rank {rank})" in said.read_text(encoding="utf-8")


_THREADS = """
import sys
from pathlib import Path
data, out, tools = sys.argv[1:]
sys.path.insert(0, tools)
from train_runs import run
run(Path(data), Path(out) / "run")
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
with (Path(out) / "threads.txt").open("a") as said:
    said.write(f"{' '.join(names)}\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for threads")
def test_no_thread_of_gloo_outlives_training(recipe: Path, tmp_path: Path) -> None:
    # One that does may abort the process when Python has ended: seen in one of some 20 runs of these tests.
    script = tmp_path / "threads.py"
    script.write_text(_THREADS, encoding="utf-8")
    code, _, err = finished(start(*TORCHRUN, script, recipe.parent, tmp_path, TOOL.parent))
    assert code == 0, err
    lines = (tmp_path / "threads.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert "python" in lines[0]
    assert "gloo" not in "".join(lines)


# Launchers that start something else than they were asked for


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpirun_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=f"{name}='2'.*torchrun"), ranks("cpu"):
        pass
    monkeypatch.setenv(name, "1")
    with ranks("cpu") as here:
        assert here.world == 1


def test_a_process_that_accelerate_left_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with ranks("cpu") as here:  # asked for one
        assert here.world == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match=r"ACCELERATE_USE_CPU='True'.*--multi_gpu"), ranks("cpu"):
        pass
