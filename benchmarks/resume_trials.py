"""Kill training runs with SIGKILL at random moments, resume them, and compare the final weights bit by bit.

A run of two stages (fresh batch norms, a running average, a state every third step) is done once to its end.
Then, in each trial, the same run is killed somewhere in a step drawn at random, at a moment drawn at random
inside it, and started again. Ranks are processes with torchrun's environment, on gloo; with two ranks, one of
them or both are killed.

    python benchmarks/resume_trials.py
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "tools")]

from train_runs import FASTVIT, STAGE, log, make_data, recipe_text  # noqa: E402
from written import write  # noqa: E402

from edgeclip.distill.state import latest_state  # noqa: E402

TOOL = ROOT / "tests" / "tools" / "train_runs.py"
STEPS = 40
SECOND = """
[[stage]]
name = "second"
data = "train"
samples = 320
batch_size = 16
ema = 0.9
[[stage.loss]]
kind = "siglip"
"""


def start(recipe: Path, out: Path, world: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    return [
        subprocess.Popen(
            [sys.executable, str(TOOL), str(recipe), str(out)],
            env={**environment, **({**there, "RANK": str(rank)} if world > 1 else {})},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[bytes]], *, patience_s: float = 600) -> list[int]:
    """Wait for all, and kill who is not done in time: torchrun ends the others where one is dead."""
    until = time.monotonic() + patience_s
    ends = []
    for process in processes:
        try:
            process.wait(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
        ends.append(process.wait())
    return ends


def steps_logged(out: Path) -> int:
    path = out / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def trial(recipe: Path, out: Path, world: int, step_s: float, rng: random.Random) -> dict[str, Any]:
    """Kill a run once, resume it to its end, and say what happened."""
    step = rng.randrange(STEPS - 1)  # killed when so many steps are logged, inside the next one
    delay_s = rng.uniform(0, 1.2 * step_s)
    victims = list(range(world)) if rng.random() < 0.5 else [rng.randrange(world)]
    processes = start(recipe, out, world)
    while steps_logged(out) < step:
        if processes[0].poll() is not None:
            raise SystemExit(f"the run ended by itself with {processes[0].returncode}")
        time.sleep(0.001)
    time.sleep(delay_s)
    for rank in victims:
        processes[rank].send_signal(signal.SIGKILL)
    ends = finish(processes, patience_s=10)
    if -signal.SIGKILL not in ends or (out / "model").exists():
        raise SystemExit(f"nothing was killed: {ends}")
    logged, state = steps_logged(out), latest_state(out / "states")
    partial = [path.name for path in (out / "states").glob(".partial-*")] if state else []
    if finish(start(recipe, out, world)) != [0] * world:
        raise SystemExit("the run did not go on")
    return {
        "asked_to_die_in_step": step + 1,
        "after_ms": round(delay_s * 1e3, 2),
        "killed_ranks": victims,
        "steps_logged": logged,
        "resumed_from": state.name if state else None,
        "half_written_state": bool(partial),
        "weights": digest(out),
        "losses": [entry["loss"] for entry in log(out)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "resume.json")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = make_data(Path(name))
        recipe = folder / "recipe.toml"
        first = STAGE.replace("batch_size = 32", "batch_size = 16\nema = 0.9")
        text = recipe_text(folder, first, SECOND, student=FASTVIT)
        recipe.write_text(text.replace("checkpoint_every = 1000", "checkpoint_every = 3"), encoding="utf-8")
        for world in (1, 2):
            whole = folder / f"whole-{world}"
            if finish(start(recipe, whole, world)) != [0] * world:
                raise SystemExit("the uninterrupted run failed")
            entries = log(whole)
            assert len(entries) == STEPS
            times = sorted(16 / entry["samples_per_s"] for entry in entries)
            expected, losses = digest(whole), [entry["loss"] for entry in entries]
            trials = []
            for number in range(options.trials):
                said = trial(recipe, folder / f"run-{world}-{number}", world, times[len(times) // 2], rng)
                said["same_losses"] = said.pop("losses") == losses
                said["same_bits"] = said.pop("weights") == expected
                trials.append(said)
                print(world, said, file=sys.stderr)
            results[f"world size {world}"] = {
                "steps": STEPS,
                "identical": sum(said["same_bits"] and said["same_losses"] for said in trials),
                "of": len(trials),
                "weights_sha256": expected,
                "trials": trials,
            }
    write(
        options.output,
        {
            "measures": "final weights of a run killed by SIGKILL at a random moment and resumed, against "
            "the uninterrupted run: bit by bit",
            "results": results,
        },
    )
    if any(found["identical"] < found["of"] for found in results.values()):
        raise SystemExit("a resumed run differs")


if __name__ == "__main__":
    main()
