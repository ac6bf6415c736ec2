"""What the facade costs over bare ONNX Runtime: `ZeroShotClassifier.classify` against `session.run`.

Both get the same preprocessed batch, ``(B, H, W, 3)`` uint8; ``run`` is called on the very session the facade
holds, so the two differ in nothing but what edgeclip adds: checks, the head over the default labels, and
predictions as Python objects. Called in turns (`compare_interleaved`), spinning off, all cores.

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
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    from edgeclip.runtime.session import RuntimeOptions

    runtime = RuntimeOptions(threads=options.threads)
    with ZeroShotClassifier.open(options.bundle, variant=options.variant, options=runtime) as classifier:
        height, width = classifier.bundle.manifest.preprocess.image_size_px
        bare = classifier._session._engine._session
        name = bare.get_inputs()[0].name
        results = {}
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
            results[f"batch {batch}"] = {**ratio(found), "added": difference(found)}
        document = {
            "measures": "time of classify() on a preprocessed batch (a) over bare session.run on it (b)",
            "bars": {"batch 8": f"ratio < {MAX_RATIO_AT_8}", "batch 1": f"difference < {MAX_MS_AT_1} ms"},
            "passed": results["batch 8"]["ratio"] < MAX_RATIO_AT_8
            and results["batch 1"]["added"]["difference_ms"] < MAX_MS_AT_1,
            **model(classifier),
            "labels": len(classifier.bank),
            "results": results,
        }
    write(options.output, document)


if __name__ == "__main__":
    main()
