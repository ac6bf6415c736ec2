"""Time our tokenizer and open_clip's on the same texts, in turns, and write the ratios.

What costs: a text is cleaned (ftfy, for what is not plain ASCII), cut into words and, for words not seen
before, merged pair by pair. Both keep words they have seen, so a label set under 80 templates is mostly
look-ups; "new words" gives both emptied caches before each call. Opening is measured in fresh processes.

Run from the repository root, with the test extra, open_clip and torch installed::

    python benchmarks/tokenizer_speed.py [--output benchmarks/results/tokenizer_speed.json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

import torchvision_shim  # noqa: E402, F401  (open_clip imports torchvision)
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402

from edgeclip.label_sets import TEMPLATES  # noqa: E402
from edgeclip.runtime.host import Host  # noqa: E402
from edgeclip.runtime.latency import RatioInterval, compare_interleaved  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

NAMES = [
    *("tabby cat", "golden retriever", "red-tailed hawk", "Volkswagen Beetle", "coffee mug", "grand piano"),
    *("bald eagle", "space shuttle", "orange", "teapot", "umbrella", "zebra", "African elephant"),
    *("traffic light", "sewing machine", "hot-air balloon"),
]
CHINESE = [
    "一只猫坐在垫子上。",
    "一张金毛寻回犬的照片",
    "红色的双层巴士停在路边",
    "桌子上有一杯咖啡",
    "热气球飞过山谷",
]
MIXED = ["naïve café &amp; crème brûlée", "It’s a dog’s life…", "schÃ¶n, ﬁne ＷＩＤＥ", "👍🏽 ok 猫 50%"]
OPEN = """
import time
began = time.perf_counter()
import numpy
numpy_ready = time.perf_counter()
from edgeclip.tokenizer import Tokenizer
imported = time.perf_counter()
tokenizer = Tokenizer.clip()
opened = time.perf_counter()
tokenizer(["a photo of a cat"])
done = time.perf_counter()
print(numpy_ready - began, imported - numpy_ready, opened - imported, done - opened)
"""


def workloads() -> dict[str, list[str]]:
    """Return the texts by name."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {
        "16 names x 80 templates": [t.format(name) for name in NAMES for t in TEMPLATES["openai-80"]],
        "200 Chinese captions": [rng.choice(CHINESE) for _ in range(200)],
        "200 texts to repair": [rng.choice(MIXED) for _ in range(200)],
        "200 texts of new words": [
            " ".join("".join(rng.choices(letters, k=rng.randint(3, 11))) for _ in range(8))
            for _ in range(200)
        ],
    }


def compare(name: str, texts: list[str], ours: Tokenizer, theirs: Any) -> tuple[RatioInterval, int]:
    """Return how much longer open_clip takes, having checked that the rows are equal."""
    assert (ours(texts, truncate=True) == theirs(texts).numpy()).all()
    new_words = "new words" in name

    def run_ours() -> object:
        if new_words:
            ours._cache.clear()
        return ours(texts, truncate=True)

    def run_theirs() -> object:
        if new_words:
            theirs.cache.clear()
            theirs.cache.update({text: text for text in ("<start_of_text>", "<end_of_text>")})
        return theirs(texts)

    run: Callable[[], object] = run_theirs
    return compare_interleaved(run, run_ours, min_blocks=40, min_duration_s=3), len(texts)


def opening(processes: int = 15) -> dict[str, float]:
    """Return the median milliseconds of each phase from import to the first row, in fresh processes."""
    phases = ("import_numpy_ms", "import_tokenizer_ms", "open_ms", "first_row_ms")
    runs = []
    for _ in range(processes):
        done = subprocess.run(
            [sys.executable, "-c", OPEN], capture_output=True, text=True, check=True, cwd=ROOT
        )
        runs.append([1e3 * float(value) for value in done.stdout.split()])
    medians = [statistics.median(values) for values in zip(*runs, strict=True)]
    return dict(zip(phases, [round(value, 2) for value in medians], strict=True))


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "tokenizer_speed.json"
    )
    output: Path = parser.parse_args().output
    host = Host.here()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    ours, theirs = Tokenizer.clip(), SimpleTokenizer()
    results = {}
    made = compare_interleaved(SimpleTokenizer, Tokenizer.clip, min_blocks=20)
    print(f"{'opening the vocabulary':28} open_clip / edgeclip {made}")
    for name, texts in workloads().items():
        interval, count = compare(name, texts, ours, theirs)
        results[name] = {
            "texts": count,
            "ratio": round(interval.ratio, 3),
            "low": round(interval.low, 3),
            "high": round(interval.high, 3),
            "n": interval.n,
            "open_clip_us_per_text": round(1e3 * interval.a.median_ms / count, 2),
            "edgeclip_us_per_text": round(1e3 * interval.b.median_ms / count, 2),
            "open_clip_ms": [round(float(value), 4) for value in interval.a.samples_ms],
            "edgeclip_ms": [round(float(value), 4) for value in interval.b.samples_ms],
        }
        print(f"{name:28} open_clip / edgeclip {interval}")
    document = {
        "schema": 1,
        "measures": "time of open_clip's SimpleTokenizer over ours, rows of 77 (above 1: ours is faster)",
        "command": "python benchmarks/tokenizer_speed.py",
        "commit": commit.stdout.strip(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": {
            "cpu_model": host.cpu_model,
            "machine": host.machine,
            "cores": host.cores,
            "python": host.python,
        },
        "versions": {
            name: version(name) for name in ("ftfy", "msgspec", "numpy", "open_clip_torch", "regex", "torch")
        },
        "opening": {
            **opening(),
            "ratio": round(made.ratio, 3),
            "low": round(made.low, 3),
            "high": round(made.high, 3),
            "n": made.n,
            "open_clip_ms": round(made.a.median_ms, 2),
            "edgeclip_ms": round(made.b.median_ms, 2),
        },
        "results": results,
    }
    print("opening", document["opening"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
