"""Does decoding overlap the tower? A folder of large crops, one after the other and as a stream.

At least 200 JPEG crops of at least 8 megapixels are cut from the fetched photographs and written to a folder.
*Sequential* decodes and resizes a picture on one thread and runs the tower on all cores, picture after
picture. *Overlapped* is what `edgeclip classify FOLDER` runs: `classify_stream` over the same files with the
same session. Whole passes over the folder take turns (`compare_interleaved`).

With D the time to decode and resize on one thread and I the time of the tower on both of two cores, the work
of a picture is D + 2·I core-seconds, so no schedule takes less than (D + 2·I)/2 and none gains more than
bound = 2·(D + I)/(D + 2·I). Bar: bound at least 1.3, and ratio at least 1 + 0.8·(bound − 1). D and I are
means over the sequential passes of the same run.

    edgeclip data fetch photos
    python benchmarks/overlap.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from written import arguments, model, ratio, write

from edgeclip.classify import ZeroShotClassifier
from edgeclip.fetch import photos
from edgeclip.preprocess import decode_image
from edgeclip.runtime.latency import StageClock, compare_interleaved

MIN_PIXELS = 8_000_000
MIN_BOUND, SHARE = 1.3, 0.8
ASPECTS = (4 / 3, 3 / 2, 3 / 4, 1.0)


def crops(count: int, rng: np.random.Generator) -> Iterator[tuple[str, Image.Image]]:
    """Yield at least ``count`` crops of 8 megapixels or a little more, evenly over the larger photographs."""
    large = photos(min_megapixels=MIN_PIXELS / 1e6)
    each = -(-count // len(large))
    for photo in large:
        picture = decode_image(photo.path)
        for index in range(each):
            aspect = ASPECTS[index % len(ASPECTS)]
            width, height = _size(picture.size, aspect, rng)
            left = int(rng.integers(0, picture.width - width + 1))
            top = int(rng.integers(0, picture.height - height + 1))
            yield photo.entry.path, picture.crop((left, top, left + width, top + height))


def _size(size: tuple[int, int], aspect: float, rng: np.random.Generator) -> tuple[int, int]:
    area = MIN_PIXELS * rng.uniform(1.0, 1.3)
    for pixels in (area, MIN_PIXELS):
        width, height = round((pixels * aspect) ** 0.5) + 1, round((pixels / aspect) ** 0.5) + 1
        if width <= size[0] and height <= size[1]:
            return width, height
    return size


def make_folder(folder: Path, count: int) -> dict[str, Any]:
    """Write the crops as JPEGs and return what they are."""
    megapixels, sizes, sources = [], [], set()
    for number, (source, crop) in enumerate(crops(count, np.random.default_rng(0))):
        path = folder / f"{number:04}.jpg"
        crop.save(path, "JPEG", quality=90)
        megapixels.append(crop.width * crop.height / 1e6)
        sizes.append(path.stat().st_size)
        sources.add(source)
    return {
        "crops": len(sizes),
        "photos": len(sources),
        "megapixels_min": round(min(megapixels), 3),
        "megapixels_median": round(float(np.median(megapixels)), 3),
        "jpeg_quality": 90,
        "megabytes_median": round(float(np.median(sizes)) / 1e6, 3),
        "upscaled": False,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "overlap.json")
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=6, help="each of two passes of both kinds")
    parser.add_argument("--fast-decode", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        material = make_folder(Path(temporary), options.crops)
        files = sorted(Path(temporary).iterdir())
        clock = StageClock()
        with ZeroShotClassifier.open(
            options.bundle, variant=options.variant, fast_decode=options.fast_decode, clock=clock
        ) as classifier:
            expected = [
                classifier.classify(file, top_k=1)[0].label for file in files
            ]  # also warms the page cache
            clock.clear()

            def sequential() -> None:
                assert [classifier.classify(file, top_k=1)[0].label for file in files] == expected

            def overlapped() -> None:
                before = len(clock._spans)
                outcomes = classifier.classify_stream(files, top_k=1)
                assert [outcome.predictions[0].label for outcome in outcomes] == expected
                del clock._spans[before:]  # stages are those of the sequential passes

            found = compare_interleaved(
                sequential,
                overlapped,
                min_blocks=options.blocks,
                min_duration_s=0,
                max_duration_s=3600,
                warmup=1,
            )
            spans: dict[str, list[float]] = {}
            for span in clock.spans:
                spans.setdefault(span.stage, []).append(span.wall_ms)
            decode_ms = float(np.mean(spans["decode"]) + np.mean(spans["resize"]))
            tower_ms = float(np.mean(spans["image_tower"]))
            bound = 2 * (decode_ms + tower_ms) / (decode_ms + 2 * tower_ms)
            needed = 1 + SHARE * (bound - 1)
            document = {
                "measures": "a folder of large JPEG crops: sequential passes (a) over overlapped ones (b)",
                "bar": f"bound ≥ {MIN_BOUND} and ratio ≥ 1 + {SHARE}·(bound − 1)",
                "passed": bound >= MIN_BOUND and found.ratio >= needed,
                **model(classifier),
                "fast_decode": options.fast_decode,
                "material": material,
                "decode_and_resize_ms": round(decode_ms, 3),
                "tower_ms": round(tower_ms, 3),
                "bound": round(bound, 4),
                "needed": round(needed, 4),
                "result": ratio(found),
            }
    write(options.output, document)


if __name__ == "__main__":
    main()
