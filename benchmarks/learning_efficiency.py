"""How many samples reinforcement saves: `plain-clip` on generated pictures, alone and with stored teachers.

The baseline is the recipe `plain-clip` (InfoNCE), its learning rate chosen on the tuning half of the held-out
combinations; the reinforced student has the same towers and embeddings as wide as the teachers', and is
trained on shards that `edgeclip reinforce` wrote, for a fifth of the samples. Both are judged on the report
half: top-1 among the labels of all held-out combinations, of which no picture was in training.

    python benchmarks/learning_efficiency.py --data shapes --work DIR
    python benchmarks/learning_efficiency.py --data pictograms --work DIR    # edgeclip data fetch pictograms

`shapes` has the three probes of `tests/data/probes` as teachers. `pictograms` trains a wider one, by
`plain-clip` too, on other and more pictures of the same combinations for more samples.

Runs lie in DIR and are kept: the same command goes on where it was stopped. Compute is counted in floating
point operations of the towers' matrix products and convolutions (a backward pass counts as two forward
passes), because wall time on a shared machine says little; both are in the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent))

import torch
from pictograms import write_pictograms
from torch.utils.flop_counter import FlopCounterMode
from written import ROOT, write

from edgeclip.models.checkpoints import load_model
from edgeclip.shape_files import write_shapes

SEEDS = (0, 1, 2)
SHARE = 5  # the reinforced student sees this part of the samples
EMBED_DIM = 288  # of the plain student
CURVE = 10  # measurements of a run
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / "docs/images"

VALIDATION = """
[[validation]]
name = "{half}"
kind = "zero-shot"
data = "{half}"
labels = "{data}/labels.json"
every = {every}
"""


# --- what is learned, and from whom ------------------------------------------------------------------------


class Teacher(Protocol):
    """A frozen model, and what it cost."""

    @property
    def name(self) -> str:
        """Its name in shards and results."""

    def ready(self, bench: Bench) -> None:
        """Train it, unless it is there."""

    def checkpoint(self, bench: Bench) -> Path:
        """Return where it is."""

    def trained(self, bench: Bench) -> dict[str, Any]:
        """Return ``samples``, ``seconds``, and ``top1`` on held-out combinations."""


@dataclass(frozen=True)
class Probe:
    """A committed probe: its recipe says how many pictures it saw, each with one caption."""

    name: str

    def ready(self, bench: Bench) -> None:
        """Do nothing: it is in the repository."""

    def checkpoint(self, bench: Bench) -> Path:
        """Return where it is."""
        return ROOT / "tests/data/probes" / self.name

    def trained(self, bench: Bench) -> dict[str, Any]:
        """Return what its recipe says."""
        said = json.loads((self.checkpoint(bench) / "recipe.json").read_text(encoding="utf-8"))
        return {
            "samples": said["recipe"]["batch"] * said["recipe"]["steps"],
            "seconds": said["training"]["train_s"],
            "top1": said["held_out"]["en"]["top1"]["value"],
        }


@dataclass(frozen=True)
class Apprentice:
    """A teacher that `plain-clip` trains here, on pictures no student sees."""

    name: str
    seed: int
    rate: float
    samples: int
    embed_dim: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]

    def ready(self, bench: Bench) -> None:
        """Train it, unless an earlier call did."""
        text = bench.plain(self.seed, self.rate, self.samples, batch_size=BATCH, embed_dim=self.embed_dim)
        text = replaced(
            text,
            {
                "dims = [24, 48, 96]": f"dims = {list(self.dims)}",
                "depths = [2, 2, 2]": f"depths = {list(self.depths)}",
                "/train.jsonl": "/teacher.jsonl",
            },
        )
        bench.train(bench.recipe(self.name, text))

    def checkpoint(self, bench: Bench) -> Path:
        """Return where it is."""
        return bench.work / self.name / "model"

    def trained(self, bench: Bench) -> dict[str, Any]:
        """Return what its run says."""
        return {
            "samples": self.samples,
            "seconds": round(bench.seconds(self.name), 1),
            "top1": bench.curve(self.name, "report")[-1][1],
        }


@dataclass(frozen=True)
class Reinforced:
    """What the reinforced student does otherwise than the plain one.

    Attributes:
        embed_dim: that of the teachers one after the other.
        final: share of the rate that is left at the end.
        weight: of the distance to their embeddings.
        views: of a picture, stored.
    """

    embed_dim: int
    rate: float
    batch_size: int
    warmup: int
    final: float
    ema: float
    weight: float
    views: int


@dataclass(frozen=True)
class Task:
    """A data set, who teaches it, and for how long it is learned.

    Attributes:
        make: writes a directory with ``train.jsonl``, ``held_out.jsonl`` and ``labels.json``.
        samples: that the plain student sees.
        rates: to choose its learning rate from.
        result: file in ``RESULTS``.
        plot: file in ``IMAGES``.
    """

    name: str
    make: Callable[[Path], object]
    samples: int
    teachers: tuple[Teacher, ...]
    reinforced: Reinforced
    result: str
    plot: str
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)


TASKS = (
    Task(
        name="shapes",
        make=write_shapes,
        samples=64_000,
        teachers=(Probe("mobileclip"), Probe("vit"), Probe("tinyclip")),
        reinforced=Reinforced(
            embed_dim=288, rate=6e-3, batch_size=32, warmup=20, final=0.0, ema=0.98, weight=500.0, views=4
        ),
        result="learning_efficiency.json",
        plot="learning-efficiency.svg",
    ),
    Task(
        name="pictograms",
        make=lambda directory: write_pictograms(
            directory, {"train": 8_000, "teacher": 24_000, "held_out": 2_000}
        ),
        samples=32_000,
        rates=(2e-3, 4e-3, 8e-3),
        teachers=(Apprentice("wide", 100, 4e-3, 96_000, 144, (24, 72, 144), (1, 1, 2)),),
        reinforced=Reinforced(
            embed_dim=144, rate=6e-3, batch_size=32, warmup=20, final=0.4, ema=0.98, weight=500.0, views=1
        ),
        result="learning_efficiency_pictograms.json",
        plot="learning-efficiency-pictograms.svg",
    ),
)
BATCH = 128  # of `plain-clip`


def main() -> None:
    """Train what is missing, then collect, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = {task.name: task for task in TASKS}
    parser.add_argument("--data", choices=tasks, default="shapes", help="What is learned.")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="Where data and runs lie.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", choices=["baseline", "teachers", "reinforced"], help="Train these and stop."
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="Instead of the committed result.")
    given = parser.parse_args()
    bench = Bench(tasks[given.data], given.work, given.threads)
    bench.make_data()
    parts = {"baseline": bench.baselines, "teachers": bench.teachers, "reinforced": bench.reinforced}
    for name, train in parts.items():
        if given.only in (None, name):
            train()
    if given.only is None:
        document = bench.collect()
        sys.argv = [sys.argv[0], "--data", given.data, "--work", "DIR", "--threads", str(given.threads)]
        write(given.output or RESULTS / bench.task.result, document)
        (IMAGES / bench.task.plot).write_text(drawn(document), encoding="utf-8")


class Bench:
    """The runs of a task in a work directory, by name."""

    def __init__(self, task: Task, work: Path, threads: int) -> None:
        self.task, self.work, self.threads = task, work.resolve() / task.name, threads

    def baselines(self) -> None:
        """Train the plain students."""
        for rate in self.task.rates:
            self.train(self._plain_student(rate, SEEDS[0]))
        best = self.best_rate()
        for seed in SEEDS:
            self.train(self._plain_student(best, seed))

    def teachers(self) -> None:
        """Train the teachers that are not there."""
        for teacher in self.task.teachers:
            teacher.ready(self)

    def reinforced(self) -> None:
        """Let the teachers look once, and train the students that read what they said."""
        self._reinforce()
        for seed in SEEDS:
            self.train(self._reinforced_student(seed))

    # -- Data ---------------------------------------------------------------------------------------------

    @property
    def data(self) -> Path:
        """Where the pictures are."""
        return self.work / self.task.name

    def make_data(self) -> None:
        """Make the pictures and halve the held-out combinations by a hash of their label."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.task.make(self.data)
        halves: dict[str, list[str]] = {"tune": [], "report": []}
        for row in self.data.joinpath("held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
            odd = hashlib.sha256(json.loads(row)["label"].encode()).digest()[-1] % 2
            halves[("tune", "report")[odd]].append(row)
        for half, mine in halves.items():
            (self.data / f"{half}.jsonl").write_text("".join(mine), encoding="utf-8")

    def _reinforce(self) -> None:
        """Write the training pictures as shards with the teachers' knowledge in them."""
        before = self._reinforcing()
        if before["done"]:
            return
        self._edgeclip("data", "make-shards", f"{self.task.name}/train.jsonl", "-o", "shards")
        teachers = [f"--teacher={each.name}={each.checkpoint(self)}" for each in self.task.teachers]
        began, done = time.perf_counter(), False
        try:
            self._edgeclip(
                "reinforce", "shards", *teachers, "--augmentations", str(self.task.reinforced.views),
                "--crop-scale", "0.9", "1.0", "--rand-augment", "0", "-o", "reinforced",
            )  # fmt: skip
            done = True
        finally:
            seconds = before["seconds"] + time.perf_counter() - began
            (self.work / TIMED).write_text(json.dumps({"seconds": seconds, "done": done}), encoding="utf-8")

    def _reinforcing(self) -> dict[str, Any]:
        """Return how long reinforcement took so far, and whether it is done."""
        try:
            said: dict[str, Any] = json.loads((self.work / TIMED).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"seconds": 0.0, "done": False}
        return said

    # -- Recipes ------------------------------------------------------------------------------------------

    def _plain_student(self, rate: float, seed: int) -> str:
        text = self.plain(seed, rate, self.task.samples, batch_size=BATCH, embed_dim=EMBED_DIM)
        return self.recipe(f"plain-{rate:g}-{seed}", text)

    def _reinforced_student(self, seed: int) -> str:
        ours, samples = self.task.reinforced, self.task.samples // SHARE
        text = self.plain(seed, ours.rate, samples, batch_size=ours.batch_size, embed_dim=ours.embed_dim)
        changes = {
            f'paths = ["{self.task.name}/train.jsonl"]\ncrop_scale = [0.9, 1.0]': 'paths = ["reinforced"]',
            "warmup = 100": f"warmup = {ours.warmup}, final = {ours.final:g}",
            "ema = 0.995": f"ema = {ours.ema}",
            "[data.train]": f"{TEACHER.format(embed_dim=ours.embed_dim)}[data.train]",
            '[[stage.loss]]\nkind = "info-nce"\n': LOSS.format(weight=ours.weight),
        }
        return self.recipe(f"reinforced-{samples}-{seed}", replaced(text, changes))

    def plain(self, seed: int, rate: float, samples: int, *, batch_size: int, embed_dim: int) -> str:
        """Return the recipe `plain-clip`, on this task and with these numbers."""
        text = (ROOT / "edgeclip/distill/recipes/plain-clip.toml").read_text(encoding="utf-8")
        changes = {
            "seed = 0": f"seed = {seed}",
            "learning_rate = 1e-3": f"learning_rate = {rate:g}",
            "samples = 160_000": f"samples = {samples}",
            f"batch_size = {BATCH}": f"batch_size = {batch_size}",
            "embed_dim = 128": f"embed_dim = {embed_dim}",
            "shapes/train.jsonl": f"{self.task.name}/train.jsonl",
            '[data.held_out]\npaths = ["shapes/held_out.jsonl"]': "".join(
                f'[data.{half}]\npaths = ["{self.task.name}/{half}.jsonl"]\n' for half in ("tune", "report")
            ),
        }
        text = replaced(text[: text.index("[[validation]]")], changes)
        every = samples // batch_size // CURVE
        return text + "".join(
            VALIDATION.format(half=half, every=every, data=self.task.name) for half in ("tune", "report")
        )

    def recipe(self, name: str, text: str) -> str:
        """Write a recipe; return its name."""
        (self.work / f"{name}.toml").write_text(text, encoding="utf-8")
        return name

    # -- Runs ---------------------------------------------------------------------------------------------

    def train(self, name: str) -> None:
        """Run a recipe to its end, unless an earlier call did."""
        if not (self.work / name / "model").is_dir():
            self._edgeclip("train", f"{name}.toml", "-o", name)

    def best_rate(self) -> float:
        """Return the learning rate that ends highest on the tuning half."""
        return max(self.task.rates, key=lambda rate: self.curve(f"plain-{rate:g}-{SEEDS[0]}", "tune")[-1][1])

    def curve(self, name: str, half: str) -> list[tuple[int, float]]:
        """Return ``(samples, top-1)`` of a run's measurements."""
        entries = self._log(name)
        batch = next(e["samples"] for e in entries if e["kind"] == "step" and e["step"] == 1)
        return [
            (entry["step"] * batch, entry["values"]["top1"])
            for entry in entries
            if entry["kind"] == "validation" and entry["name"] == half
        ]

    def seconds(self, name: str) -> float:
        """Return how long a run's steps took, each as long as the median one: a pause is no work."""
        steps = [entry for entry in self._log(name) if entry["kind"] == "step"]
        batch = steps[0]["samples"]  # of later steps: since the beginning
        return len(steps) * batch / statistics.median(step["samples_per_s"] for step in steps)

    def _log(self, name: str) -> list[dict[str, Any]]:
        lines = (self.work / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _edgeclip(self, *parts: str) -> None:
        command = [sys.executable, "-m", "edgeclip", *parts]
        print("$ edgeclip", *parts, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=self.work, env=environment, check=True)

    # -- Result -------------------------------------------------------------------------------------------

    def collect(self) -> dict[str, Any]:
        """Return everything that was measured, and what follows from it."""
        task, best = self.task, self.best_rate()
        plain = [f"plain-{best:g}-{seed}" for seed in SEEDS]
        samples = task.samples // SHARE
        helped = [f"reinforced-{samples}-{seed}" for seed in SEEDS]
        target = statistics.mean(self.last(name) for name in plain)
        forward = flops(self.work / plain[0] / "model")
        teachers = {each.name: flops(each.checkpoint(self)) for each in task.teachers}
        trained = {each.name: each.trained(self) for each in task.teachers}
        pictures = sum(1 for _ in (self.data / "train.jsonl").open(encoding="utf-8"))
        asked = sum(
            pictures * (task.reinforced.views * each["image"] + each["text"]) for each in teachers.values()
        )
        manifest = json.loads((self.work / "reinforced/reinforcement.json").read_text(encoding="utf-8"))
        return {
            "data": task.name,
            "labels": len(json.loads((self.data / "labels.json").read_text(encoding="utf-8"))["labels"]),
            "pictures": pictures,
            "target_top1": round(target, 4),
            "learning_rate": {
                "chosen": best,
                "tuning_top1": {
                    f"{rate:g}": self.curve(f"plain-{rate:g}-{SEEDS[0]}", "tune")[-1][1]
                    for rate in task.rates
                },
            },
            "plain": {"samples": task.samples, "top1": [self.last(name) for name in plain]},
            "reinforced": {
                "samples": samples,
                "share": samples / task.samples,
                "top1": [self.last(name) for name in helped],
                "reached_by_all_seeds": all(self.last(name) >= target for name in helped),
            },
            "flops": paid(
                plain=training_flops(task.samples, forward),
                reinforced=training_flops(samples, flops(self.work / helped[0] / "model")),
                reinforcement=asked,
                teachers=sum(training_flops(trained[name]["samples"], teachers[name]) for name in teachers),
            ),
            "seconds": paid(
                plain=statistics.median(map(self.seconds, plain)),
                reinforced=statistics.median(map(self.seconds, helped)),
                reinforcement=self._reinforcing()["seconds"],
                teachers=sum(each["seconds"] for each in trained.values()),
            ),
            "seconds_are": (
                "medians over seeds of steps times the median time of a step, and the time of the command "
                "for reinforcement, on a machine that did other work meanwhile"
            ),
            "runs": {
                name: {
                    "tune": self.curve(name, "tune"),
                    "report": self.curve(name, "report"),
                    "seconds": round(self.seconds(name), 1),
                }
                for name in [*plain, *helped]
            },
            "student_forward_flops": forward,
            "teachers": {name: trained[name] | {"forward_flops": teachers[name]} for name in teachers},
            "recipe": asdict(task.reinforced),
            "reinforcement": manifest["settings"],
        }

    def last(self, name: str) -> float:
        """Return a run's top-1 on the report half at its end."""
        return self.curve(name, "report")[-1][1]


# The teachers' embeddings side by side are one teacher, whose cosine is the mean of theirs; the student's
# embeddings are moved towards it directly, which needs no other pictures in the batch, so batches are small.
TEACHER = """
[[teacher]]
kind = "stored"
name = "teachers"
slice = [0, {embed_dim}]
licence = "Apache-2.0"

"""
LOSS = """[[stage.loss]]
kind = "feature"
teacher = "teachers"
distance = "mse"
weight = {weight}
"""
TIMED = "reinforced.seconds.json"


def replaced(text: str, changes: dict[str, str]) -> str:
    """Return a recipe with changes, each of which must find its place."""
    for before, after in changes.items():
        if before not in text:
            sys.exit(f"plain-clip.toml has no {before!r} any more; change this benchmark too")
        text = text.replace(before, after)
    return text


def paid(*, plain: float, reinforced: float, reinforcement: float, teachers: float) -> dict[str, Any]:
    """Return the costs of one student and of what comes before it, and after how many students it pays."""
    saved = plain - reinforced
    return {
        "total": {"plain": plain, "reinforced": reinforced, "reinforcement": reinforcement},
        "with_reinforcement_over_plain": (reinforced + reinforcement) / plain,
        "students_until_it_pays": reinforcement / saved,
        "teachers_training": teachers,
        "students_until_it_pays_with_teachers": (teachers + reinforcement) / saved,
    }


def flops(checkpoint: Path) -> dict[str, int]:
    """Return the floating point operations of both towers for one input."""
    loaded = load_model(checkpoint)
    model, config = loaded.model.eval(), loaded.config
    said = {}
    with torch.no_grad():
        for tower, given in (
            ("image", torch.zeros(1, 3, *config.image_size_px)),
            ("text", torch.zeros(1, config.text.context_length, dtype=torch.int64)),
        ):
            with FlopCounterMode(display=False) as counter:
                model.encode_image(given) if tower == "image" else model.encode_text(given)
            said[tower] = int(counter.get_total_flops())
    return said


def training_flops(samples: int, forward: dict[str, int]) -> int:
    """Return what training takes: a picture with one caption a sample, backward as two forward passes."""
    return 3 * samples * (forward["image"] + forward["text"])


def drawn(document: dict[str, Any]) -> str:
    """Return the learning curves as SVG: accuracy over samples seen, a line a run."""
    width, height, left, right, top, bottom = 760, 420, 64, 24, 56, 56
    most = document["plain"]["samples"]
    subject, labels = document["data"].capitalize(), document["labels"]
    title = f"{subject}: top-1 among {labels} held-out labels, over samples seen"

    def place(samples: float, accuracy: float) -> tuple[float, float]:
        x = left + (width - left - right) * samples / most
        return x, top + (height - top - bottom) * (1 - accuracy)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif" font-size="13">'
        ),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        (f'<text x="{left}" y="24" font-size="15" font-weight="600" fill="#1f2933">{escape(title)}</text>'),
    ]
    for share in range(0, 101, 20):
        x0, y = place(0, share / 100)
        parts.append(
            f'<line x1="{x0}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="#e4e7eb"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#52606d">{share} %</text>'
        )
    for quarter in range(5):
        samples = most * quarter // 4
        x, _ = place(samples, 0)
        parts.append(
            f'<text x="{x:.1f}" y="{height - bottom + 20}" text-anchor="middle" fill="#52606d">'
            f"{samples:,}</text>"
        )
    x0, y = place(0, document["target_top1"])
    parts.append(
        f'<line x1="{x0}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="#7b8794" '
        'stroke-dasharray="4 4"/>'
    )
    for row, (kind, colour) in enumerate({"plain": "#2f7ed8", "reinforced": "#e8710a"}.items()):
        runs = [run["report"] for name, run in document["runs"].items() if name.startswith(f"{kind}-")]
        for run in runs:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in [(0, 0), *run]))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = height - bottom - 60 + 22 * row
        text = f"{kind}: {document[kind]['samples']:,} samples, {len(runs)} seeds"
        parts.append(
            f'<rect x="{width - 320}" y="{y - 6}" width="22" height="4" fill="{colour}"/>'
            f'<text x="{width - 290}" y="{y}" fill="#1f2933">{escape(text)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
