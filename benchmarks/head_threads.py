"""Why the head takes N dot products on one thread and not one matrix product: the latter beside other work.

The image tower, then cosines with 1,000 labels, BLAS left as numpy brings it: once on this machine as it
is, once beside as many busy processes as it has cores. BLAS shares a matrix product out to threads of its
own, which wait for each other busily; beside other work a wait can last until the system schedules the
other.

    python benchmarks/head_threads.py
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from written import arguments, difference, ratio, write

from edgeclip.classify import ZeroShotClassifier
from edgeclip.heads import cosines
from edgeclip.runtime.host import usable_cores
from edgeclip.runtime.latency import compare_interleaved

LABELS = 1000


def compare(
    tower: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    picture: NDArray[np.uint8],
    rows: NDArray[np.float32],
    seconds: float,
) -> dict[str, Any]:
    """Compare both forms, each behind a run of the tower as in a call of the facade."""
    found = compare_interleaved(
        lambda: tower(picture) @ rows.T,
        lambda: cosines(tower(picture), rows),
        min_blocks=200,
        min_duration_s=seconds,
    )
    tails = {
        f"{name}_p90_ms": round(float(np.percentile(side.samples_ms, 90)), 4)
        for name, side in (("a", found.a), ("b", found.b))
    }
    return {**ratio(found), **tails, "added": difference(found)}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "head_threads.json")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with ZeroShotClassifier.open(options.bundle, variant=options.variant) as classifier:
        height, width = classifier.bundle.manifest.preprocess.image_size_px
        picture = rng.integers(0, 256, (1, height, width, 3), np.uint8)
        rows = rng.standard_normal((LABELS, classifier.bundle.manifest.model.embed_dim)).astype(np.float32)
        tower = classifier._embed
        results = {}
        results["alone"] = compare(tower, picture, rows, options.seconds)
        # sessions of their own, as other programs are: some schedulers share the cores out by session first
        busy = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
            for _ in range(usable_cores())
        ]
        try:
            results["beside a busy process on each core"] = compare(tower, picture, rows, options.seconds)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    write(
        options.output,
        {
            "measures": f"tower and cosines with {LABELS} labels: one matrix product (a), dot products (b)",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
