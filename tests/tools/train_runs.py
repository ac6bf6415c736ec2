"""Tiny training runs: generated shapes, a student of a few thousand parameters, a tokenizer for its captions.

    python tests/tools/train_runs.py RECIPE OUT [KILL_AT_STEP]

runs a recipe in this process (one rank under torchrun's environment), and kills it with SIGKILL right after
a step if asked to.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from edgeclip.distill.recipe import Recipe, load_recipe, parse_recipe
from edgeclip.distill.run import Run, open_run
from edgeclip.distill.trainer import Progress, Result, TrainOptions, train
from edgeclip.shape_files import write_shapes
from edgeclip.tokenizer import train_bpe

SIZE_PX, CONTEXT, EMBED = 32, 16, 32
# Adam divides by the root of a gradient's square: without this floor it would turn rounding of gradients
# near zero into whole steps.
FLOOR = "eps = 1e-4"

VIT = f"""
[student.config]
image_size_px = [{SIZE_PX}, {SIZE_PX}]
resize = "squash"
crop = "none"
[student.config.image]
kind = "vit"
width = 48
heads = [3, 3]
hidden_dims = [96, 96]
head_dim = 16
patch_px = 8
grid = [4, 4]
embed_dim = {EMBED}
"""

# Batch norms, as the MCi towers have them.
FASTVIT = f"""
[student.config]
image_size_px = [{SIZE_PX}, {SIZE_PX}]
resize = "squash"
crop = "none"
[student.config.image]
kind = "fastvit"
dims = [8, 16]
depths = [1, 1]
mixers = ["repmixer", "attention"]
head_dim = 8
embed_dim = {EMBED}
"""

TEXT = """
[student.config.text]
kind = "transformer"
vocab_size = {vocab}
context_length = {context}
width = 32
heads = [2]
hidden_dims = [64]
head_dim = 16
attention = "padded"
pool = "mean"
pad_id = {pad}
embed_dim = {embed}
"""

BASE = """
schema = 1
kind = "train"
name = "tiny"
seed = 3
checkpoint_every = 1000
[student]
tokenizer = "tokenizer"
{student}
[data.train]
paths = ["shapes/train.jsonl"]
captions = {{ alt = 1.0 }}
[data.held_out]
paths = ["shapes/held_out.jsonl"]
"""

STAGE = """
[[stage]]
name = "contrastive"
data = "train"
samples = 320
batch_size = 32
optimizer = { learning_rate = 2e-3 }
schedule = { warmup = 2 }
[[stage.loss]]
kind = "info-nce"
"""


def make_data(folder: Path, *, train: int = 256, held_out: int = 48) -> Path:
    """Write pictures, captions, labels and a tokenizer into a folder, once."""
    write_shapes(folder / "shapes", train=train, held_out=held_out, size_px=SIZE_PX, seed=1)
    lines = (folder / "shapes" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    train_bpe(captions, vocab_size=600, context_length=CONTEXT).to_files(folder / "tokenizer")
    return folder


def recipe_text(folder: Path, *rest: str, student: str = VIT) -> str:
    """Return a recipe over :func:`make_data`'s folder: what all share, then the given tables."""
    from edgeclip.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(folder / "tokenizer")
    text = TEXT.format(
        vocab=tokenizer.vocab_size, pad=tokenizer.config.special.pad, context=CONTEXT, embed=EMBED
    )
    return BASE.format(student=student + text) + "".join(rest or (STAGE,))


def opened(folder: Path, *rest: str, student: str = VIT) -> Run:
    """Open what a recipe of :func:`recipe_text` names."""
    return open_run(parse_recipe(recipe_text(folder, *rest, student=student).encode()), folder)


def run(
    folder: Path, out: Path, *rest: str, student: str = VIT, changes: tuple[str, ...] = (), **options: Any
) -> tuple[Result, list[Progress]]:
    """Train a recipe of :func:`recipe_text` to its end, and return what it said."""
    recipe = parse_recipe(recipe_text(folder, *rest, student=student).encode(), changes=changes)
    return run_recipe(recipe, folder, out, **options)


def run_recipe(recipe: Recipe, folder: Path, out: Path, **options: Any) -> tuple[Result, list[Progress]]:
    heard: list[Progress] = []
    stop_after = options.pop("stop_after", None)
    result = train(
        recipe,
        TrainOptions(out, folder, **options),
        listen=heard.append,
        stop=lambda: stop_after is not None and len(steps(heard)) >= stop_after - 1,
    )
    return result, heard


def write(folder: Path, name: str, *rest: str, student: str = VIT) -> Path:
    """Write a recipe that saves its state in every second step, for :func:`start`."""
    path = folder / name
    text = recipe_text(folder, *rest, student=student).replace(
        "checkpoint_every = 1000", "checkpoint_every = 2"
    )
    path.write_text(text.replace("learning_rate = 2e-3", f"learning_rate = 2e-3, {FLOOR}"), encoding="utf-8")
    return path


def start(recipe: Path, out: Path, world: int, kill_at: int = 0) -> list[int]:
    """Run every rank in a process of its own, and return how they ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        there = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world),
            "RANK": str(rank),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, str(recipe), str(out), str(kill_at)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(there if world > 1 else {})},
                stderr=subprocess.DEVNULL if kill_at else None,
            )
        )
    try:
        return [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def steps(heard: list[Progress]) -> list[dict[str, Any]]:
    return [dict(each.entry) for each in heard if each.kind == "step"]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model" / "model.safetensors")


def log(out: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not different


def main() -> None:
    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    kill_at = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    torch.set_num_threads(1)
    done = 0

    def stop() -> bool:
        # Asked before every step: on every rank, unlike progress.
        nonlocal done
        if kill_at and done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return False

    train(load_recipe(path), TrainOptions(out, path.parent), stop=stop)


if __name__ == "__main__":
    main()
