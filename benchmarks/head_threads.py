"""Why the head takes N dot products on one thread and not one matrix product: the latter beside other work.

Cosines of one embedding with 1,000 labels, E = 512, BLAS left as numpy brings it: once on this machine as it
is, once beside as many busy processes as it has cores. BLAS shares a matrix product out to threads of its
own, which wait for each other busily; beside other work a wait can last until the system schedules the other.

    python benchmarks/head_threads.py
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
from written import arguments, ratio, write

from edgeclip.heads import cosines
from edgeclip.runtime.host import usable_cores
from edgeclip.runtime.latency import RatioInterval, compare_interleaved

LABELS, WIDTH = 1000, 512


def told(found: RatioInterval) -> dict[str, Any]:
    """Return the ratio with the tails of both sides."""
    tails = {
        f"{name}_p{p:g}_ms": round(float(np.percentile(side.samples_ms, p)), 4)
        for name, side in (("a", found.a), ("b", found.b))
        for p in (90, 99)
    }
    return {**ratio(found), **tails}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "head_threads.json")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((LABELS, WIDTH)).astype(np.float32)
    embedding = rng.standard_normal((1, WIDTH)).astype(np.float32)

    def compare() -> dict[str, Any]:
        found = compare_interleaved(
            lambda: embedding @ bank.T,
            lambda: cosines(embedding, bank),
            min_blocks=200,
            min_duration_s=options.seconds,
        )
        return told(found)

    results = {"alone": compare()}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
    try:
        results["beside a busy process on each core"] = compare()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    write(
        options.output,
        {
            "measures": f"cosines with {LABELS} labels, E {WIDTH}: one matrix product (a), dot products (b)",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
