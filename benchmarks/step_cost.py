"""What a training step costs: on stored reinforcement, without any, and with the same teachers online.

One process, one student, the same pictures from the same shards, batches of one size. Steps (batch
preparation included) are taken in turns, so that whatever else the machine does hits all alike:

- `plain`: InfoNCE on random crops, with as many captions as the others; `plain-1`: with one caption;
- `stored`: affinity distillation; views and embeddings of two teachers come from reinforced shards;
- `online`: the same loss, the teachers run beside the student.

Teachers have random weights (their time does not depend on them) and together at least eight times the
student's operations forward. Predicted for `online`: (3 S + T) / 3 S in operations, S and T forward.

    python benchmarks/step_cost.py --work DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from learning_efficiency import flops
from written import ROOT, write

from edgeclip.distill.batches import Batch, BatchLoader
from edgeclip.distill.ranks import Ranks
from edgeclip.distill.recipe import parse_recipe
from edgeclip.distill.run import open_run
from edgeclip.distill.stage import Stage
from edgeclip.models.checkpoints import CheckpointInfo, save_checkpoint
from edgeclip.models.clip import build_clip
from edgeclip.models.config import CLIPConfig, TextTransformerConfig, ViTConfig
from edgeclip.tokenizer import Tokenizer

VIEWS = 10
PICTURES = 2_048
TEACHERS = ("first", "second")
CONFIG = CLIPConfig(
    name="teacher",
    image=ViTConfig(
        width=192, heads=(6,) * 6, hidden_dims=(768,) * 6, head_dim=32, patch_px=8, grid=(8, 8), embed_dim=192
    ),
    text=TextTransformerConfig(
        vocab_size=49408, context_length=32, width=192, heads=(6,) * 4, hidden_dims=(768,) * 4, head_dim=32,
        embed_dim=192,
    ),
    image_size_px=(64, 64),
)  # fmt: skip

RECIPE = """
schema = 1
kind = "train"
name = "step"
{student}
{teachers}
[data.train]
paths = ["{shards}"]
captions = {{ alt = 1.0 }}
{views}

[[stage]]
name = "step"
data = "train"
samples = 1_000_000
batch_size = {batch}
texts = {texts}
optimizer = {{ learning_rate = 1e-3, weight_decay = 0.1 }}

[[stage.loss]]
{loss}
"""
AFFINITY = f'kind = "affinity"\nteachers = {list(TEACHERS)}'.replace("'", '"')


def main() -> None:
    """Make shards and teachers, take steps in turns, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/step_cost.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    work = given.work.resolve()
    prepare(work)
    stored = "".join(f'[[teacher]]\nkind = "stored"\nname = "{name}"\n' for name in TEACHERS)
    online = "".join(
        f'[[teacher]]\nkind = "checkpoint"\nname = "{name}"\npath = "{name}"\n' for name in TEACHERS
    )
    crops = "crop_scale = [0.9, 1.0]"
    kinds = {
        "plain-1": ("", "shards", crops, 1, 'kind = "info-nce"'),
        "plain": ("", "shards", crops, 2, 'kind = "info-nce"'),
        "stored": (stored, "reinforced", "", 2, AFFINITY),
        "online": (online, "shards", crops, 2, AFFINITY),
    }
    steps = {
        name: stepper(work, said, batch=given.batch, steps=given.blocks + 3) for name, said in kinds.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in kinds}
    for block in range(given.blocks + 3):
        for name in list(kinds) if block % 2 else list(kinds)[::-1]:
            began = time.perf_counter_ns()
            steps[name]()
            if block >= 3:
                samples[name].append((time.perf_counter_ns() - began) / 1e9)
    student = flops(work / "student")
    teacher = sum(sum(flops(work / name).values()) for name in TEACHERS)
    texts = 2
    forward = student["image"] + texts * student["text"]
    asked = sum(f["image"] + texts * f["text"] for f in (flops(work / name) for name in TEACHERS))
    sys.argv = [sys.argv[0], "--work", "DIR"]
    write(
        given.output,
        {
            "batch": given.batch,
            "threads": given.threads,
            "views": VIEWS,
            "captions": texts,
            "samples_s": {name: [round(value, 5) for value in said] for name, said in samples.items()},
            "median_s": {name: round(float(np.median(said)), 5) for name, said in samples.items()},
            "ratios": {
                f"{a}/{b}": interval(samples[a], samples[b])
                for a, b in (("stored", "plain"), ("stored", "plain-1"), ("online", "plain"))
            },
            "predicted online/plain": round((3 * forward + asked) / (3 * forward), 3),
            "flops": {"student_forward": forward, "teachers_forward": asked, "one_pair_teachers": teacher},
            "teachers_over_student": round(asked / forward, 2),
        },
    )


def prepare(work: Path) -> None:
    """Make pictures, teachers and both kinds of shards, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(TEACHERS):
        if not (work / name).is_dir():
            torch.manual_seed(seed)
            info = CheckpointInfo(config=CONFIG, scale=50.0, tokenizer_files={})
            save_checkpoint(
                build_clip(CONFIG).eval(), work / name, info, tokenizer_files=Tokenizer.clip(32).files
            )
    edgeclip(work, "data", "make-shapes", "-o", "shapes")
    table = work / "shapes/two.jsonl"
    if not table.exists():
        rows = (work / "shapes/train.jsonl").read_text(encoding="utf-8").splitlines()[:PICTURES]
        # What it says does not matter for the time.
        table.write_text(
            "".join(row[:-1] + ', "syn_text": ["a picture of shapes"]}\n' for row in rows), encoding="utf-8"
        )
    edgeclip(work, "data", "make-shards", "shapes/two.jsonl", "-o", "shards")
    edgeclip(
        work, "reinforce", "shards", *(f"--teacher={name}={name}" for name in TEACHERS),
        "--augmentations", str(VIEWS), "--crop-scale", "0.9", "1.0", "--rand-augment", "0",
        "-o", "reinforced",
    )  # fmt: skip


def edgeclip(work: Path, *parts: str) -> None:
    """Run our own command line in the work directory."""
    subprocess.run([sys.executable, "-m", "edgeclip", *parts], cwd=work, check=True)


def stepper(
    work: Path, said: tuple[str, str, str, int, str], *, batch: int, steps: int
) -> Callable[[], None]:
    """Return a function that prepares the next batch and takes a step on it."""
    teachers, shards, views, texts, loss = said
    plain = (ROOT / "edgeclip/distill/recipes/plain-clip.toml").read_text(encoding="utf-8")
    student = plain[plain.index("[student.config]") : plain.index("[data.train]")]
    text = RECIPE.format(
        student=student, teachers=teachers, shards=shards, views=views, batch=batch, texts=texts, loss=loss
    )
    recipe = parse_recipe(text.encode())
    run = open_run(recipe, work)
    if not (work / "student").is_dir():
        info, _ = run.info()
        save_checkpoint(
            run.student.model, work / "student", info, tokenizer_files=run.student.tokenizer.files
        )
    stage = Stage(run, 0, Ranks(1, 0, torch.device("cpu")))
    samples: Any = run.data["train"]
    batches: Iterator[Batch] = BatchLoader(samples, stage.plan, stage.inputs).batches()
    number = iter(range(steps))

    def step() -> None:
        stage.step(next(batches), next(number), stop=False)

    return step


def interval(a: list[float], b: list[float], *, draws: int = 10_000) -> dict[str, float]:
    """Return the ratio of medians with a bootstrap interval over blocks."""
    rng = np.random.default_rng(0)
    first, second = np.asarray(a), np.asarray(b)
    rows = rng.integers(0, len(first), (draws, len(first)))
    ratios = np.median(first[rows], axis=1) / np.median(second[rows], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "ratio": round(float(np.median(first) / np.median(second)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "confidence": 0.95,
    }


if __name__ == "__main__":
    main()
