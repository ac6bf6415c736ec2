"""What labels cost that are new to a live classifier: one more among a hundred, and a hundred at once.

* ``one``: a label is added to 100 in force, one template, tower held open. Beside it the same change by a
  classifier that forgot what it has in memory, so that it reads the host cache and writes a whole bank; and
  the tokenizer and text tower alone.
* ``hundred``: 100 labels nobody has seen, beside a plain loop over the same engine: tokenize, run, normalise,
  in batches of the same sizes, nothing checked, pooled or kept.
* ``batches``: 100 texts through the text tower in other divisions, beside 64 + 36, and what memory they take.

Bars: one new label within ``--bar-ms``; a hundred at most 1.03 times the plain loop.

    python benchmarks/new_labels.py
    python benchmarks/new_labels.py --bundle BUNDLE --bar-ms 80 --parts one,hundred --output FILE.json
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from written import arguments, difference, model, ratio, write

from edgeclip.classify import ZeroShotClassifier
from edgeclip.runtime.latency import RatioInterval, compare_interleaved
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.text_encoder import TEXTS_A_CALL, even_parts

MAX_RATIO_AT_100 = 1.03
LABELS = 100
DIVISIONS = {"100": [100], "50 + 50": [50, 50], "4 x 25": [25] * 4, "15 and 14": even_parts(100, 16)}
REFERENCE = [64, 36]


def compare(a: Callable[[], object], b: Callable[[], object], seconds: float) -> RatioInterval:
    """Compare in turns, with no more blocks than an interval needs where a call takes seconds."""
    return compare_interleaved(
        a, b, min_blocks=6, min_duration_s=seconds, max_duration_s=2 * seconds, warmup=1
    )


def result(found: RatioInterval) -> dict[str, Any]:
    """Return a comparison with the raw samples of both sides."""
    samples = {name: side.samples_ms.round(4).tolist() for name, side in (("a", found.a), ("b", found.b))}
    return {**ratio(found), "a_minus_b": difference(found), "samples_ms": samples}


def one(classifier: ZeroShotClassifier, seconds: float) -> dict[str, Any]:
    """Add one new label to 100, again and again."""
    names = [f"thing {number}" for number in range(LABELS)]
    numbers = count()

    def change() -> None:
        classifier.set_labels([*names, f"new thing {next(numbers)}"], templates="one")

    def change_without_memory() -> None:
        classifier._labels._recent, classifier._labels._store = [], None
        change()

    def tower() -> None:
        classifier.embed_texts([f"a photo of a new thing {next(numbers)}."])

    classifier.set_labels(names, templates="one")
    return {
        "live (a), text tower alone (b)": result(compare(change, tower, seconds)),
        "live (a), without what is in memory (b)": result(compare(change, change_without_memory, seconds)),
    }


def hundred(classifier: ZeroShotClassifier, seconds: float) -> dict[str, Any]:
    """Set 100 new labels, beside a plain loop over the same engine."""
    numbers = count()
    session, tokenizer = classifier._labels._encoder._open()
    (name,) = session.inputs
    (output,) = session.outputs
    bare = getattr(session._engine, "_session", None)  # ONNX Runtime's own, where that is the backend

    def run(tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        return session.run({name: tokens})[output] if bare is None else bare.run(None, {name: tokens})[0]

    def change() -> None:
        number = next(numbers)
        classifier.set_labels([f"thing {number} {each}" for each in range(LABELS)], templates="one")

    def plain() -> NDArray[np.float32]:
        number, parts, start = next(numbers), [], 0
        for size in even_parts(LABELS, TEXTS_A_CALL):
            texts = [f"a photo of a thing {number} {each}." for each in range(start, start + size)]
            rows = run(tokenizer(texts))
            parts.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
            start += size
        return np.concatenate(parts)

    return {"set_labels (a), plain loop (b)": result(compare(change, plain, seconds))}


def batches(classifier: ZeroShotClassifier, seconds: float) -> dict[str, Any]:
    """Run 100 texts in other divisions, beside 64 + 36."""
    return {
        name: result(compare(division(classifier, sizes), division(classifier, REFERENCE), seconds))
        for name, sizes in DIVISIONS.items()
    }


def division(classifier: ZeroShotClassifier, sizes: Sequence[int]) -> Callable[[], None]:
    """Return what runs 100 texts in batches of these sizes."""
    session, tokenizer = classifier._labels._encoder._open()
    (name,) = session.inputs
    tokens = tokenizer([f"a photo of a thing {each}." for each in range(sum(sizes))])
    parts = np.split(tokens, np.cumsum(sizes)[:-1])

    def run() -> None:
        for part in parts:
            session.run({name: part})

    return run


def memory_mb(options: Any, sizes: Sequence[int]) -> float:
    """Return by how much 100 texts in these batches grow a process that has the tower open."""
    command = [sys.executable, __file__, "--bundle", options.bundle, "--variant", options.variant]
    command += ["--threads", str(options.threads), "--grow", ",".join(map(str, sizes))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_mb() -> float:
    """Return what this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "new_labels.json")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bar-ms", type=float, default=5.0)
    parser.add_argument("--parts", default="one,hundred,batches")
    parser.add_argument("--grow", help="run texts in batches of these sizes and print the growth in MB")
    options = parser.parse_args()
    parts = {"one": one, "hundred": hundred, "batches": batches}
    with tempfile.TemporaryDirectory(prefix="edgeclip-labels-") as folder:
        os.environ["EDGECLIP_CACHE_DIR"] = folder
        with ZeroShotClassifier.open(
            options.bundle,
            variant=options.variant,
            options=RuntimeOptions(threads=options.threads),
            keep_text_tower=True,
        ) as classifier:
            if options.grow:
                run = division(classifier, [int(size) for size in options.grow.split(",")])
                before = resident_mb()
                run()
                print(resident_mb() - before)
                return
            results = {name: parts[name](classifier, options.seconds) for name in options.parts.split(",")}
            of_text = classifier._labels._encoder.variant.name
            what = {**model(classifier), "text_variant": of_text}
    if "batches" in results:
        all_sizes = {"64 + 36": REFERENCE, **DIVISIONS}
        results["memory_mb"] = {name: round(memory_mb(options, all_sizes[name]), 1) for name in all_sizes}
    passed = {}
    if "one" in results:
        live = results["one"]["live (a), text tower alone (b)"]
        passed["one"] = live["a_median_ms"] <= options.bar_ms
    if "hundred" in results:
        passed["hundred"] = results["hundred"]["set_labels (a), plain loop (b)"]["ratio"] <= MAX_RATIO_AT_100
    write(
        options.output,
        {
            "measures": "labels new to a live classifier, text tower held open; times of a over b",
            "bars": {"one": f"median ≤ {options.bar_ms} ms", "hundred": f"ratio ≤ {MAX_RATIO_AT_100}"},
            "passed": passed,
            **what,
            "results": results,
        },
        show=False,
    )
    for part, found in results.items():
        for name, each in found.items():
            said = (
                f"{each:.1f} MB"
                if isinstance(each, float)
                else f"{each['a_median_ms']:.3f} and {each['b_median_ms']:.3f} ms, ratio {each['ratio']:.3f} "
                f"({each['low']:.3f} to {each['high']:.3f}, {each['blocks']} blocks)"
            )
            print(f"{part}: {name}: {said}")
    print(f"within bars: {passed}")


if __name__ == "__main__":
    main()
