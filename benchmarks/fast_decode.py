"""May `edgeclip classify` decode JPEGs at reduced scale by default? A study, and its verdict.

Crops of photographs are saved as JPEGs of several qualities and subsamplings, decoded in full and at reduced
scale, and classified among the 200 names of ``data/stamps.jsonl``. The rule, fixed beforehand: reduced
decoding is the default only if the best label stays the same for at least 99 % of the crops, with the lower
end of the 95 % interval at 98 % or more (bootstrap over photographs, because crops of one photograph resemble
each other), and the mean cosine of the two embeddings is at least 0.995. Otherwise it is opt-in. Only crops
that were reduced count: the others agree by construction.

Compared with the full decode (``exact``):

* ``margin m``: `Image.draft` at the largest reduction that leaves both sides at least m times the target.
  ``margin 2`` is what `Preprocess(fast_decode=True)` does.
* ``control``: full decode, but resized in two steps, as Pillow's own `Image.thumbnail` does. What it changes
  shows how much of the disagreement is pictures between two labels, which any rounding tips.

``recheck`` answers another question: classify the reduced picture, and decode in full only those whose two
best labels are closest. How many must be decoded again until the answers agree?

    edgeclip data fetch photos
    python benchmarks/fast_decode.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from written import commit

from edgeclip.classify import ZeroShotClassifier
from edgeclip.fetch import photos
from edgeclip.preprocess import Preprocess, decode_image
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.latency import compare_interleaved

HERE = Path(__file__).parent
MIN_MEGAPIXELS = 2.0
MAX_CROP_PIXELS = 12e6
MARGINS = (1, 2, 3, 4)
PRODUCT_MARGIN = 2
ASPECTS = (4 / 3, 3 / 2, 1.0, 16 / 9, 3 / 4, 2 / 3)
QUALITIES = (70, 80, 90, 96)
SUBSAMPLINGS = {"4:2:0": 2, "4:4:4": 0}
RECHECK_SHARES = (0.02, 0.05, 0.1, 0.2)
BOOTSTRAP_DRAWS = 10_000

MIN_AGREEMENT, MIN_AGREEMENT_LOW, MIN_COSINE = 0.99, 0.98, 0.995
MIN_PHOTOS, MIN_CROPS = 30, 600


@dataclass(frozen=True)
class Crop:
    """One crop of one photograph, as the JPEG file a user might have."""

    photo: str
    width: int
    height: int
    quality: int
    subsampling: str
    content: bytes


def crops(key: str, path: Path, *, count: int, rng: np.random.Generator) -> Iterator[Crop]:
    """Yield random crops of at least 2 megapixels, of many sizes and aspect ratios, half of them mirrored."""
    photo = decode_image(path)
    for index in range(count):
        width, height = crop_size(photo.width, photo.height, ASPECTS[index % len(ASPECTS)], rng)
        left = int(rng.integers(0, photo.width - width + 1))
        top = int(rng.integers(0, photo.height - height + 1))
        picture = photo.crop((left, top, left + width, top + height))
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        quality = QUALITIES[index % len(QUALITIES)]
        subsampling = list(SUBSAMPLINGS)[index // len(QUALITIES) % len(SUBSAMPLINGS)]
        stream = BytesIO()
        picture.save(stream, "JPEG", quality=quality, subsampling=SUBSAMPLINGS[subsampling])
        yield Crop(key, width, height, quality, subsampling, stream.getvalue())


def crop_size(width: int, height: int, aspect: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the size of a crop that fits; the whole photograph where none of this aspect ratio does."""
    for _ in range(50):
        area = rng.uniform(MIN_MEGAPIXELS * 1e6, min(width * height, MAX_CROP_PIXELS))
        crop_width, crop_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if crop_width <= width and crop_height <= height and crop_width * crop_height >= MIN_MEGAPIXELS * 1e6:
            return crop_width, crop_height
    return width, height


class Forms:
    """The forms of one picture that are compared: exact, control and one per margin."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.exact = preprocess
        height, width = preprocess.spec.image_size_px
        self.draft_sizes_px = {m: (int(height * m), int(width * m)) for m in MARGINS}
        self.names = ["exact", "control", *(f"margin {m:g}" for m in MARGINS)]

    def reduced(self, content: bytes, margin: int) -> Image.Image:
        """Decode so that both sides stay at least ``margin`` times the target."""
        return decode_image(content, draft_size_px=self.draft_sizes_px[margin])

    def arrays(self, content: bytes) -> tuple[NDArray[np.uint8], list[float]]:
        """Return ``(forms, H, W, 3)`` and by how much each margin reduced the picture."""
        full = self.exact.decode(content)
        reduced = [self.reduced(content, margin) for margin in MARGINS]
        arrays = [self.exact.resize(full), self.two_steps(full), *map(self.exact.resize, reduced)]
        return np.stack(arrays), [round(full.width / picture.width, 2) for picture in reduced]

    def two_steps(self, picture: Image.Image) -> NDArray[np.uint8]:
        """Resize through a reduction by a whole number, to the same size; what is left to do is the crop."""
        spec = self.exact.spec
        size = spec.image_size_px[::-1]
        if spec.resize == "shortest":  # square targets: the longer side as the exact form has it
            width, height = picture.size
            side = spec.image_size_px[0]
            size = (side, side * height // width) if width <= height else (side * width // height, side)
        resample = Image.Resampling[spec.interpolation.upper()]
        return self.exact.resize(picture.resize(size, resample, reducing_gap=2.0))


def lower_end(values: NDArray[Any], photo: NDArray[Any], *, seed: int = 0) -> float:
    """Return the lower end of the 95 % interval of the mean, drawing whole photographs with replacement."""
    _, index = np.unique(photo, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (BOOTSTRAP_DRAWS, len(sums)))
    return float(np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), 2.5))


def summarize(same: NDArray[Any], cosine: NDArray[Any], photo: NDArray[Any]) -> dict[str, Any]:
    if not len(same):
        return {"n": 0}
    return {
        "n": len(same),
        "photos": len(np.unique(photo)),
        "agreement": float(same.mean()),
        "agreement_low": lower_end(same, photo),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
    }


def speed(forms: Forms, path: Path, *, width: int, height: int) -> dict[str, Any]:
    """Return decode + resize times of one photograph, full against reduced, taken in turns."""
    picture = decode_image(path)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    stream = BytesIO()
    picture.crop((left, top, left + width, top + height)).save(stream, "JPEG", quality=90)
    content = stream.getvalue()
    report: dict[str, Any] = {"size_px": [width, height], "size_bytes": len(content)}
    for margin in MARGINS:
        reduced = forms.reduced(content, margin)
        ratio = compare_interleaved(
            lambda: forms.exact(content),
            lambda margin=margin: forms.exact.resize(forms.reduced(content, margin)),  # type: ignore[misc]
            min_blocks=15,
        )
        report[f"margin {margin:g}"] = {
            "decoded_px": list(reduced.size),
            "ratio": [ratio.ratio, ratio.low, ratio.high],
            "blocks": ratio.n,
            "exact_ms": float(np.median(ratio.a.samples_ms)),
            "reduced_ms": float(np.median(ratio.b.samples_ms)),
        }
    return report


def verdict(row: dict[str, Any]) -> str:
    """Apply the rule to the crops that were reduced: the others agree by construction."""
    if row["n"] < MIN_CROPS or row["photos"] < MIN_PHOTOS:
        return "too few crops to decide"
    passed = (
        row["agreement"] >= MIN_AGREEMENT
        and row["agreement_low"] >= MIN_AGREEMENT_LOW
        and row["cosine_mean"] >= MIN_COSINE
    )
    return "default on" if passed else "opt-in"


def recheck(margin: NDArray[Any], same: NDArray[Any], photo: NDArray[Any]) -> list[dict[str, Any]]:
    """Return the agreement when the least certain share of the pictures is decoded again in full."""
    order = np.argsort(margin, kind="stable")
    rows = []
    for share in RECHECK_SHARES:
        again = order[: round(share * len(order))]
        fixed = same.copy()
        fixed[again] = True
        rows.append(
            {
                "share": share,
                "similarity_margin": float(margin[again[-1]]) if len(again) else 0.0,
                "agreement": float(fixed.mean()),
                "agreement_low": lower_end(fixed, photo),
            }
        )
    return rows


def names_of_stamps(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return sorted({row["en"] for row in rows})


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(arguments.seed)
    names = names_of_stamps(arguments.stamps)
    sources = photos(arguments.photos, min_megapixels=MIN_MEGAPIXELS)
    with ZeroShotClassifier.open(arguments.bundle, variant=arguments.variant) as classifier:
        classifier.set_labels(names)
        labels = classifier.bank.embeddings  # (N, E)
        forms = Forms(Preprocess(classifier.bundle.manifest.preprocess))
        rows: list[dict[str, Any]] = []
        for number, source in enumerate(sources):
            print(f"\r{number + 1}/{len(sources)} {source.path.name:60.60}", end="", file=sys.stderr)
            for crop in crops(source.key, source.path, count=arguments.crops, rng=rng):
                arrays, reductions = forms.arrays(crop.content)
                embeddings = classifier.embed_images(arrays)  # (forms, E)
                similarities = embeddings @ labels.T
                best = np.sort(similarities, axis=1)
                rows.append(
                    {
                        "photo": crop.photo,
                        "size_px": [crop.width, crop.height],
                        "quality": crop.quality,
                        "subsampling": crop.subsampling,
                        "reduction": reductions,
                        "label": [names[top] for top in similarities.argmax(1)],
                        "label_margin": [round(float(x), 5) for x in best[:, -1] - best[:, -2]],
                        "cosine": [round(float(x), 6) for x in embeddings @ embeddings[0]],
                    }
                )
        print(file=sys.stderr)
        large = next(s for s in sources if s.entry.size_px[0] >= 4000 and s.entry.size_px[1] >= 3000)
        timing = [
            speed(forms, large.path, width=width, height=height)
            for width, height in ((4000, 3000), (3264, 2448), (1633, 1225))
        ]
        report = {
            "schema": 1,
            "benchmark": "fast_decode",
            "command": f"python benchmarks/fast_decode.py --crops {arguments.crops} --seed {arguments.seed}",
            "commit": commit(),
            "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "host": Host.here().to_dict(),
            "versions": versions(),
            "bundle": classifier.bundle.digest,
            "variant": classifier.choice.variant.name,
            "labels": len(names),
            "seed": arguments.seed,
            "forms": forms.names,
        }
    return report | summary(rows, forms.names) | {"speed": timing, "crops": rows}


def summary(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    photo = np.array([row["photo"] for row in rows])
    label = np.array([row["label"] for row in rows])
    cosine = np.array([row["cosine"] for row in rows])
    margin = np.array([row["label_margin"] for row in rows])
    reduction = np.array([row["reduction"] for row in rows])
    same = label == label[:, :1]
    all_rows = {name: summarize(same[:, i], cosine[:, i], photo) for i, name in enumerate(names)}
    shrunk = {
        name: summarize(
            *(column[reduction[:, i] > 1] for column in (same[:, i + 2], cosine[:, i + 2], photo))
        )
        for i, name in enumerate(names[2:])
    }
    product = names.index(f"margin {PRODUCT_MARGIN:g}")
    verdicts = {name: verdict(row) for name, row in shrunk.items()}
    package = np.array([key.split("/", 1)[0] for key in photo])
    return {
        "rule": {
            "agreement": MIN_AGREEMENT,
            "agreement_low": MIN_AGREEMENT_LOW,
            "cosine_mean": MIN_COSINE,
            "photos": MIN_PHOTOS,
            "crops": MIN_CROPS,
        },
        "verdict": verdicts[names[product]],
        "verdicts": verdicts,
        "all": all_rows,
        "reduced_only": shrunk,
        "by_package": {
            str(name): summarize(*(c[package == name] for c in (same[:, product], cosine[:, product], photo)))
            for name in np.unique(package)
        },
        "recheck": recheck(margin[:, product], same[:, product], photo),
    }


def to_json(report: dict[str, Any]) -> str:
    """Return the report with one line a crop; labels and photographs as numbers into lists."""
    names = sorted({label for row in report["crops"] for label in row["label"]})
    sources = list(dict.fromkeys(row["photo"] for row in report["crops"]))
    columns = ("photo", "size_px", "quality", "subsampling", "reduction", "label", "label_margin", "cosine")
    rows = [
        [
            sources.index(row["photo"]),
            *(row[column] for column in columns[1:5]),
            [names.index(label) for label in row["label"]],
            *(row[column] for column in columns[6:]),
        ]
        for row in report["crops"]
    ]
    table = {"photos": sources, "labels": names, "columns": columns, "rows": "@"}
    text = json.dumps(report | {"crops": table}, indent=1)
    lines = ",\n   ".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return text.replace('"@"', f"[\n   {lines}\n  ]") + "\n"


def show(report: dict[str, Any]) -> None:
    print(f"{report['variant']} on {report['host'].get('cpu_model')}, {len(report['crops'])} crops")
    for title in ("all", "reduced_only", "by_package"):
        print(f"\n{title:24}{'n':>6}{'photos':>8}{'agree %':>9}{'low %':>8}{'cosine':>10}{'min':>10}")
        for name, row in report[title].items():
            if row["n"]:
                print(
                    f"{name:24}{row['n']:6}{row['photos']:8}{100 * row['agreement']:9.2f}"
                    f"{100 * row['agreement_low']:8.2f}{row['cosine_mean']:10.6f}{row['cosine_min']:10.6f}"
                )
    print("\nrecheck: share decoded again, agreement %, low %")
    for row in report["recheck"]:
        print(f"{row['share']:22.2f}{100 * row['agreement']:10.2f}{100 * row['agreement_low']:8.2f}")
    print("\ndecode + resize, full and reduced, ms (ratio and 95 % interval)")
    for size in report["speed"]:
        for name in (f"margin {m:g}" for m in MARGINS):
            row = size[name]
            ratio, low, high = row["ratio"]
            print(
                f"{size['size_px'][0]:5} x {size['size_px'][1]:<6}{name:12}{row['exact_ms']:8.1f}"
                f"{row['reduced_ms']:8.1f}   {ratio:.2f} ({low:.2f} to {high:.2f})"
            )
    print()
    for name, text in report["verdicts"].items():
        print(f"{name}: {text}{'   <- the product' if name == f'margin {PRODUCT_MARGIN:g}' else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", default="default", help="bundle directory (the embedded one)")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--photos", type=Path, help="directory of fetched data (the user's cache)")
    parser.add_argument("--stamps", type=Path, default=HERE / "data" / "stamps.jsonl")
    parser.add_argument("--crops", type=int, default=12, help="crops a photograph (12)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "fast_decode.json")
    arguments = parser.parse_args()
    report = study(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(to_json(report), encoding="utf-8")
    show(report)


if __name__ == "__main__":
    main()
