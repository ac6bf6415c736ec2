"""What 10,000 labels cost over 100: one picture's embedding to its five best labels, on one thread.

Similarities, softmax over all labels, the best five, and predictions as Python objects: what
`ZeroShotClassifier.classify` does after the tower. Random unit banks; called in turns.

Bar: 10,000 labels add at most 2 ms to 100 at E up to 512, one thread.

    python benchmarks/label_count.py
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # before numpy is loaded

import numpy as np  # noqa: E402
from written import arguments, difference, ratio, write  # noqa: E402

from edgeclip.answers import InForce  # noqa: E402
from edgeclip.classify import ZeroShotClassifier  # noqa: E402
from edgeclip.heads import TemperatureHead  # noqa: E402
from edgeclip.labels import LabelBank, LabelSet, Templates  # noqa: E402
from edgeclip.runtime.latency import compare_interleaved  # noqa: E402

MAX_ADDED_MS = 2.0


def active(labels: int, width: int) -> InForce:
    """Return a random bank in force, as the classifier holds it."""
    rows = np.random.default_rng(labels).standard_normal((labels, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    bank = LabelBank(LabelSet.of(f"label {row}" for row in range(labels)), rows, Templates.of("one"))
    return InForce(bank.names, bank.embeddings, TemperatureHead(50.0))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "label_count.json")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    results = {}
    with ZeroShotClassifier.open(options.bundle, variant=options.variant) as classifier:
        for width in (256, 384, 512):
            embedding = np.random.default_rng(1).standard_normal((1, width)).astype(np.float32)
            embedding /= np.linalg.norm(embedding)
            many, few = active(10_000, width), active(100, width)
            found = compare_interleaved(
                lambda: classifier._said(embedding, many, 5),  # noqa: B023
                lambda: classifier._said(embedding, few, 5),  # noqa: B023
                min_blocks=200,
                min_duration_s=options.seconds,
                max_duration_s=4 * options.seconds,
            )
            results[f"E {width}"] = {**ratio(found), "added": difference(found)}
    write(
        options.output,
        {
            "measures": "embedding to predictions with 10,000 labels (a) and with 100 (b), batch 1",
            "bar": f"difference ≤ {MAX_ADDED_MS} ms at E ≤ 512",
            "passed": all(each["added"]["high_ms"] <= MAX_ADDED_MS for each in results.values()),
            "threads": 1,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
