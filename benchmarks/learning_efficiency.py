"""How many samples reinforcement saves: `plain-clip` on generated pictures, alone and with stored teachers.

The baseline is the recipe `plain-clip` (InfoNCE), its learning rate chosen on the tuning half of the held-out
combinations; the reinforced student is the same network, trained on shards that `edgeclip reinforce` wrote
with the three probes of `tests/data/probes` as teachers, for at most a fifth of the samples. Both are judged
on the report half: top-1 among the labels of all held-out combinations, of which no picture was in training.

    python benchmarks/learning_efficiency.py --work DIR

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
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch.utils.flop_counter import FlopCounterMode
from written import ROOT, write

from edgeclip.models.checkpoints import load_model

SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SAMPLES = 64_000
SHARE = 5  # the reinforced student sees this part of the samples
VIEWS = 4
PROBES = ("mobileclip", "vit", "tinyclip")
EMBED_DIM = 288  # of both students: that of the three probes one after the other
PLOT = ROOT / "docs/images/learning-efficiency.svg"

VALIDATION = """
[[validation]]
name = "{half}"
kind = "zero-shot"
data = "{half}"
labels = "shapes/labels.json"
every = {every}
"""


def main() -> None:
    """Train what is missing, then collect, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="Where data and runs lie.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["baseline", "reinforced"], help="Train these and stop.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/learning_efficiency.json", metavar="FILE"
    )
    given = parser.parse_args()
    bench = Bench(given.work, given.threads)
    bench.make_data()
    if given.only != "reinforced":
        for rate in RATES:
            bench.train(bench.baseline(rate, SEEDS[0]))
        best = bench.best_rate()
        for seed in SEEDS:
            bench.train(bench.baseline(best, seed))
    if given.only != "baseline":
        bench.reinforce()
        for seed in SEEDS:
            bench.train(bench.reinforced(seed))
    if given.only is None:
        document = bench.collect()
        sys.argv = [sys.argv[0], "--work", "DIR"]
        write(given.output, document)
        PLOT.write_text(drawn(document), encoding="utf-8")


class Bench:
    """The runs of a work directory, by name."""

    def __init__(self, work: Path, threads: int) -> None:
        self.work, self.threads = work.resolve(), threads

    # -- Data ---------------------------------------------------------------------------------------------

    def make_data(self) -> None:
        """Make the pictures and halve the held-out combinations by a hash of their label."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._edgeclip("data", "make-shapes", "-o", "shapes")
        rows = (self.work / "shapes/held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        halves: dict[str, list[str]] = {"tune": [], "report": []}
        for row in rows:
            odd = hashlib.sha256(json.loads(row)["label"].encode()).digest()[-1] % 2
            halves[("tune", "report")[odd]].append(row)
        for half, mine in halves.items():
            (self.work / "shapes" / f"{half}.jsonl").write_text("".join(mine), encoding="utf-8")

    def reinforce(self) -> None:
        """Write the training pictures as shards with the teachers' knowledge in them."""
        self._edgeclip("data", "make-shards", "shapes/train.jsonl", "-o", "shards")
        teachers = [f"--teacher={name}={ROOT / 'tests/data/probes' / name}" for name in PROBES]
        self._edgeclip(
            "reinforce", "shards", *teachers, "--augmentations", str(VIEWS), "--crop-scale", "0.9", "1.0",
            "--rand-augment", "0", "-o", "reinforced",
        )  # fmt: skip

    # -- Recipes ------------------------------------------------------------------------------------------

    def baseline(self, rate: float, seed: int) -> str:
        """Write the recipe of a plain run; return its name."""
        text = self._plain(seed, rate, SAMPLES, every=50)
        return self._recipe(f"plain-{rate:g}-{seed}", text)

    def reinforced(self, seed: int) -> str:
        """Write the recipe of a reinforced run; return its name."""
        text = self._plain(seed, REINFORCED["rate"], SAMPLES // SHARE, every=REINFORCED["every"])
        text = text.replace(
            'paths = ["shapes/train.jsonl"]\ncrop_scale = [0.9, 1.0]', 'paths = ["reinforced"]'
        )
        text = text.replace("batch_size = 128", f"batch_size = {REINFORCED['batch_size']}")
        text = text.replace("warmup = 100", f"warmup = {REINFORCED['warmup']}")
        text = text.replace("ema = 0.995", f"ema = {REINFORCED['ema']}")
        text = text.replace("[data.train]", f"{TEACHER}[data.train]")
        text = text.replace('[[stage.loss]]\nkind = "info-nce"\n', REINFORCED["losses"])
        return self._recipe(f"reinforced-{seed}", text)

    def _plain(self, seed: int, rate: float, samples: int, *, every: int) -> str:
        text = (ROOT / "edgeclip/distill/recipes/plain-clip.toml").read_text(encoding="utf-8")
        text = text[: text.index("[[validation]]")]
        changes = {
            "seed = 0": f"seed = {seed}",
            "learning_rate = 1e-3": f"learning_rate = {rate:g}",
            "samples = 160_000": f"samples = {samples}",
            "embed_dim = 128": f"embed_dim = {EMBED_DIM}",
            '[data.held_out]\npaths = ["shapes/held_out.jsonl"]': "".join(
                f'[data.{half}]\npaths = ["shapes/{half}.jsonl"]\n' for half in ("tune", "report")
            ),
        }
        for before, after in changes.items():
            if before not in text:
                sys.exit(f"plain-clip.toml has no {before!r} any more; change this benchmark too")
            text = text.replace(before, after)
        return text + "".join(VALIDATION.format(half=half, every=every) for half in ("tune", "report"))

    def _recipe(self, name: str, text: str) -> str:
        (self.work / f"{name}.toml").write_text(text, encoding="utf-8")
        return name

    # -- Runs ---------------------------------------------------------------------------------------------

    def train(self, name: str) -> None:
        """Run a recipe to its end, unless an earlier call did."""
        if not (self.work / name / "model").is_dir():
            self._edgeclip("train", f"{name}.toml", "-o", name)

    def best_rate(self) -> float:
        """Return the learning rate that ends highest on the tuning half."""
        return max(RATES, key=lambda rate: self.curve(f"plain-{rate:g}-{SEEDS[0]}", "tune")[-1][1])

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
        """Return how long a run's steps took, without its measurements."""
        steps = [entry for entry in self._log(name) if entry["kind"] == "step"]
        batch = steps[0]["samples"]
        return sum(batch / entry["samples_per_s"] for entry in steps)

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
        best = self.best_rate()
        plain = [f"plain-{best:g}-{seed}" for seed in SEEDS]
        helped = [f"reinforced-{seed}" for seed in SEEDS]
        target = statistics.mean(self.curve(name, "report")[-1][1] for name in plain)
        student = flops(self.work / plain[0] / "model")
        teachers = [flops(ROOT / "tests/data/probes" / name) for name in PROBES]
        pictures = sum(1 for _ in (self.work / "shapes/train.jsonl").open(encoding="utf-8"))
        asked = sum(each["image"] * VIEWS * pictures + each["text"] * pictures for each in teachers)
        step = 3 * (student["image"] + student["text"])
        cost = {"plain": step * SAMPLES, "reinforced": step * (SAMPLES // SHARE), "reinforcement": asked}
        manifest = json.loads((self.work / "reinforced/reinforcement.json").read_text(encoding="utf-8"))
        return {
            "target_top1": round(target, 4),
            "learning_rate": {
                "chosen": best,
                "tuning_top1": {
                    f"{rate:g}": self.curve(f"plain-{rate:g}-{SEEDS[0]}", "tune")[-1][1] for rate in RATES
                },
            },
            "samples": {"plain": SAMPLES, "reinforced": SAMPLES // SHARE, "share": 1 / SHARE},
            "reached_by_all_seeds": all(self.curve(name, "report")[-1][1] >= target for name in helped),
            "runs": {
                name: {
                    "tune": self.curve(name, "tune"),
                    "report": self.curve(name, "report"),
                    "seconds": round(self.seconds(name), 1),
                }
                for name in [*plain, *helped]
            },
            "seconds_are": "sums of the steps' times, on a machine that did other work meanwhile",
            "flops": {
                "student_forward": student,
                "teachers_forward": dict(zip(PROBES, teachers, strict=True)),
                "total": cost,
                "with_reinforcement_over_plain": (cost["reinforced"] + asked) / cost["plain"],
                "students_until_it_pays": asked / (cost["plain"] - cost["reinforced"]),
                "teachers_training": sum(map(training_flops, PROBES, teachers)),
                "students_until_it_pays_with_teachers": (sum(map(training_flops, PROBES, teachers)) + asked)
                / (cost["plain"] - cost["reinforced"]),
            },
            "recipe": {**REINFORCED, "views": VIEWS, "teachers": list(PROBES)},
            "reinforcement": manifest["settings"],
        }


# The probes' embeddings side by side are one teacher, whose cosine is the mean of theirs; the student's
# embeddings are moved towards it directly, which needs no other pictures in the batch, so batches are small.
TEACHER = f"""
[[teacher]]
kind = "stored"
name = "probes"
slice = [0, {EMBED_DIM}]
licence = "Apache-2.0"

"""
REINFORCED: dict[str, Any] = {
    "rate": 6e-3,
    "batch_size": 32,
    "warmup": 20,
    "ema": 0.98,
    "every": 40,
    "losses": '[[stage.loss]]\nkind = "feature"\nteacher = "probes"\ndistance = "mse"\nweight = 500.0\n',
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


def training_flops(probe: str, forward: dict[str, int]) -> int:
    """Return what training a probe took: its recipe says how many pictures, each with one caption."""
    said = json.loads((ROOT / "tests/data/probes" / probe / "recipe.json").read_text(encoding="utf-8"))
    pictures: int = said["recipe"]["batch"] * said["recipe"]["steps"]
    return 3 * pictures * (forward["image"] + forward["text"])


def drawn(document: dict[str, Any]) -> str:
    """Return the learning curves as SVG: accuracy over samples seen, a line a run."""
    width, height, left, right, top, bottom = 760, 420, 64, 24, 56, 56
    most = document["samples"]["plain"]

    def place(samples: float, accuracy: float) -> tuple[float, float]:
        x = left + (width - left - right) * samples / most
        return x, top + (height - top - bottom) * (1 - accuracy)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, sans-serif" font-size="13">'
        ),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        (
            f'<text x="{left}" y="24" font-size="15" font-weight="600" fill="#1f2933">Top-1 among '
            "796 labels of held-out combinations, over samples seen</text>"
        ),
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
    colours = {"plain": "#2f7ed8", "reinforced": "#e8710a"}
    for name, run in document["runs"].items():
        points = " ".join(
            f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in [(0, 0), *run["report"]])
        )
        colour = colours[name.split("-")[0]]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for row, (name, colour) in enumerate(colours.items()):
        y = height - bottom - 60 + 22 * row
        seen = document["samples"][name]
        text = f"{name}: {seen:,} samples, {len(SEEDS)} seeds"
        parts.append(
            f'<rect x="{width - 320}" y="{y - 6}" width="22" height="4" fill="{colour}"/>'
            f'<text x="{width - 290}" y="{y}" fill="#1f2933">{escape(text)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
