"""What the facade costs over bare ONNX Runtime: `ZeroShotClassifier.classify` against `session.run`.

Both get the same preprocessed batch, ``(B, H, W, 3)`` uint8; ``run`` is called on the very session the
facade holds, so the two differ in nothing but what edgeclip adds: checks, the head, and predictions as
Python objects. Over 100 labels (what more labels cost is the question of ``label_count.py``) and over the
bundle's own. Called in turns (`compare_interleaved`), spinning off, all cores. Needs a quiet machine:
what is added is small code, and most of its time is fetching it back into caches that the tower, and
everything else that runs, has emptied.

Bars: less than 2 % at batch 8, less than 0.2 ms at batch 1.

    python benchmarks/facade_overhead.py
"""

from __future__ import annotations

import numpy as np
from written import arguments, difference, model, ratio, write

from edgeclip.classify import ZeroShotClassifier
from edgeclip.runtime.latency import compare_interleaved

MAX_RATIO_AT_8, MAX_MS_AT_1 = 1.02, 0.2


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "facade_overhead.json")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    from edgeclip.runtime.session import RuntimeOptions

    runtime = RuntimeOptions(threads=options.threads)
    with ZeroShotClassifier.open(options.bundle, variant=options.variant, options=runtime) as classifier:
        height, width = classifier.bundle.manifest.preprocess.image_size_px
        bare = classifier._session._engine._session
        name = bare.get_inputs()[0].name
        results = {}
        for labels in (100, "default"):
            if labels == "default":
                classifier.set_bundle_labels()
            else:
                classifier.set_labels([f"thing {number}" for number in range(labels)])
            for batch in (1, 8):
                pictures = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)

                def facade(pictures: np.ndarray = pictures) -> object:
                    return classifier.classify(pictures)

                def run(pictures: np.ndarray = pictures) -> object:
                    return bare.run(None, {name: pictures})

                found = compare_interleaved(
                    facade,
                    run,
                    min_blocks=200,
                    min_duration_s=options.seconds,
                    max_duration_s=4 * options.seconds,
                )
                key = f"batch {batch}, {len(classifier.bank)} labels"
                results[key] = {**ratio(found), "added": difference(found)}
        document = {
            "measures": "time of classify() on a preprocessed batch (a) over bare session.run on it (b)",
            "bars": {
                "batch 8, 100 labels": f"ratio < {MAX_RATIO_AT_8}",
                "batch 1, 100 labels": f"difference < {MAX_MS_AT_1} ms",
            },
            "passed": results["batch 8, 100 labels"]["ratio"] < MAX_RATIO_AT_8
            and results["batch 1, 100 labels"]["added"]["difference_ms"] < MAX_MS_AT_1,
            **model(classifier),
            "results": results,
        }
    write(options.output, document)


if __name__ == "__main__":
    main()
