"""Which pictures should int8 ranges be chosen on? Coverage of embeddings against random and stratified ones.

Two image towers, quantized as `edgeclip export --variant onnx-int8` does it: the default model and the
MobileCLIP-shaped probe. Each choice is made with five seeds from one pool of unlabelled pictures, and judged
on photographs that no picture of the pool is a part of: mean cosine to float32, and how often the first of
998 names and of the 200 stamp names (default model) or of 200 shape names (probe) stays the same. The probe
knows shapes: it is also calibrated and judged on those. Ranges are from the smallest to the largest value,
or as `--ranges` says.

    edgeclip data fetch photos default-model pictograms
    python benchmarks/calibration_selection.py

Ranges of a choice are those of its rows, and each row's are observed once: that makes many choices cheap.
That a graph made so is what the exporter makes is checked first. Kernels must be exact: on x86 without VNNI
the session asks for them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from default_graphs import float_graphs, preprocess_spec, tokenizer
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from written import ROOT, write

from edgeclip.bundle import PreprocessSpec
from edgeclip.calibration.dataset import CROPS, POOL_PER_SAMPLE, WHOLE, Pool, Selection, View, cover
from edgeclip.calibration.ranges import MinMax, RangeMethod, observe
from edgeclip.export.int8 import policy_of, quantize
from edgeclip.export.passes import apply
from edgeclip.export.passes.qdq import InsertQdq, observed, place
from edgeclip.export.ranges import GraphWatch
from edgeclip.fetch import materials, photos
from edgeclip.preprocess import Preprocess
from edgeclip.quantization import CPU
from edgeclip.runtime.ort import import_onnxruntime

SEEDS = range(5)
CHOICES = (
    ("coverage", 64),
    ("coverage", 256),
    ("random", 64),
    ("random", 512),
    ("stratified", 64),
)
VIEWS = (WHOLE, View(mirrored=True), *CROPS)
PICTOGRAMS, SHAPES = 1200, 400
KEPT = ROOT / "build" / "calibration-selection"  # what was observed of a pool
Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]


# --- pictures ----------------------------------------------------------------------------------------------


def seen(spec: PreprocessSpec, paths: Sequence[Path], parts: Sequence[View] = VIEWS) -> Pixels:
    """Return photographs in some views, ``(n, H, W, 3)``."""
    prepare = Preprocess(spec)

    def views(path: Path) -> list[Pixels]:
        image = prepare.decode(path)
        return [prepare.resize(view.of(image)) for view in parts]

    with ThreadPoolExecutor(2) as threads:
        return np.stack([row for rows in threads.map(views, paths) for row in rows])


def pictograms(spec: PreprocessSpec, grounds: Pixels) -> Pixels:
    """Return emoji of two drawn sets, of many sizes, on crops of photographs."""
    folders = materials("pictograms")
    drawn = [
        *sorted((folders["emoji-datasource-google"] / "img/google/64").glob("*.png")),
        *sorted((folders["@lobehub/fluent-emoji-3d"] / "assets").glob("*.webp")),
    ]
    rng = np.random.default_rng(0)
    height, width = spec.image_size_px
    rows = []
    for number in rng.choice(len(drawn), PICTOGRAMS, replace=False):
        side = int(min(height, width) * rng.uniform(0.3, 0.9))
        with Image.open(drawn[number]) as image:
            emoji = image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
        ground = Image.fromarray(grounds[rng.integers(len(grounds))])
        ground.paste(emoji, (int(rng.integers(width - side)), int(rng.integers(height - side))), emoji)
        rows.append(np.asarray(ground))
    return np.stack(rows)


def shapes(*, held_out: bool, count: int) -> Pixels:
    """Return generated shapes as the probe knows them."""
    from edgeclip.shapes import held_out_combinations, render, training_combinations

    every = held_out_combinations() if held_out else training_combinations()
    step = len(every) / count
    return np.stack([render(every[int(row * step)], row) for row in range(count)])


# --- graphs ------------------------------------------------------------------------------------------------


def session_of(graph: onnx.ModelProto) -> Any:
    """Return a session of exact int8 kernels, one thread."""
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    data = graph.SerializeToString(deterministic=True)
    return import_onnxruntime().InferenceSession(data, options, providers=["CPUExecutionProvider"])


def embed(graph: onnx.ModelProto, rows: Pixels) -> Floats:
    """Return unit embeddings, ``(n, E)``."""
    session = session_of(graph)
    (entry,) = session.get_inputs()
    parts = [session.run(None, {entry.name: rows[at : at + 8]})[0] for at in range(0, len(rows), 8)]
    return np.concatenate(parts)


def rows_ranges(graph: onnx.ModelProto, rows: Pixels, names: Sequence[str]) -> NDArray[np.float64]:
    """Return the least and largest value of each tensor for each row, ``(2, n, tensors)``."""
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    del watched.graph.output[:]
    axes = helper.make_tensor("watched:axes", TensorProto.INT64, [1], [1])
    watched.graph.initializer.append(axes)
    for number, name in enumerate(names):
        flat = f"watched:{number}"
        watched.graph.node.append(helper.make_node("Flatten", [name], [flat], axis=1))
        for kind in ("ReduceMin", "ReduceMax"):
            output = f"{flat}:{kind}"
            watched.graph.node.append(helper.make_node(kind, [flat, axes.name], [output], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["B"]))
    session = session_of(watched)
    (entry,) = session.get_inputs()
    parts = [np.stack(session.run(None, {entry.name: rows[at : at + 8]})) for at in range(0, len(rows), 8)]
    both = np.concatenate(parts, axis=1)  # (2 * tensors, n)
    return np.stack([both[0::2].T, both[1::2].T]).astype(np.float64)


@dataclass
class Tower:
    """An image tower, what may calibrate it and what judges it."""

    graph: onnx.ModelProto
    pool: Pixels
    kinds: tuple[str, ...]
    judges: Mapping[str, Pixels]
    banks: Mapping[str, Floats]
    method: RangeMethod = field(default_factory=MinMax)

    def __post_init__(self) -> None:
        self.shaped = onnx.shape_inference.infer_shapes(self.graph, data_prop=True)
        model = ir.from_proto(self.shaped)
        self.policy = policy_of(self.graph)
        self.nodes = place(model, self.policy)
        self.names = observed(model, self.nodes, CPU)
        content = self.graph.SerializeToString(deterministic=True) + self.pool.tobytes()
        path = KEPT / f"{hashlib.sha256(content).hexdigest()[:16]}.npz"
        if not path.is_file():
            KEPT.mkdir(parents=True, exist_ok=True)
            ranges, embeddings = rows_ranges(self.graph, self.pool, self.names), embed(self.graph, self.pool)
            np.savez(path, ranges=ranges, embeddings=embeddings)
        with np.load(path) as kept:
            self.ranges, self.embeddings = kept["ranges"], kept["embeddings"]
        self.expected = {name: embed(self.graph, rows) for name, rows in self.judges.items()}

    def quantized(self, places: Sequence[int]) -> onnx.ModelProto:
        """Return the int8 graph that these rows of the pool calibrate."""
        if self.method == MinMax():
            least, most = self.ranges[0, places].min(axis=0), self.ranges[1, places].max(axis=0)
            ranges = {name: (float(a), float(b)) for name, a, b in zip(self.names, least, most, strict=True)}
        else:
            watch = GraphWatch(self.graph, what="benchmark")
            ranges = observe(watch, self.pool[places], self.names, self.method, what="benchmark")
        return apply(self.shaped, [InsertQdq(self.nodes, ranges, CPU)], what="benchmark")

    def check(self) -> None:
        """Refuse to measure anything but what the exporter makes."""
        places = list(range(16))
        own = self.quantized(places).SerializeToString(deterministic=True)
        theirs = quantize(self.graph, self.pool[places], self.policy, CPU, what="benchmark")
        if own != theirs.SerializeToString(deterministic=True):
            sys.exit("the graph made from ranges of single rows is not the exporter's: nothing was measured.")

    def judged(self, places: Sequence[int]) -> dict[str, Any]:
        """Return how far the int8 graph is from float32."""
        graph = self.quantized(places)
        said: dict[str, Any] = {}
        for name, rows in self.judges.items():
            got, expected = embed(graph, rows).astype(np.float64), self.expected[name].astype(np.float64)
            cosine = (
                (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
            )
            said[name] = {
                "cosine_loss_mean": round(float(1 - cosine.mean()), 6),
                "cosine_min": round(float(cosine.min()), 5),
                "top1_agreement": {
                    bank: round(
                        float(((got @ names.T).argmax(1) == (expected @ names.T).argmax(1)).mean()), 5
                    )
                    for bank, names in self.banks.items()
                },
            }
        return said

    def choose(self, method: str, samples: int, seed: int) -> list[int]:
        """Return the rows of the pool that a choice takes."""
        selection = Selection(method, samples, seed)  # type: ignore[arg-type]
        most = POOL_PER_SAMPLE * samples if method == "coverage" else None  # as an export reads them
        pool = Pool.of(self.pool, selection, "pool", self.kinds, most=most)
        at = {row.tobytes(): number for number, row in enumerate(self.pool)}
        taken = pool.choose(selection, lambda rows: self.embeddings[[at[row.tobytes()] for row in rows]])
        return [at[row.tobytes()] for row in taken]


def medoids(embeddings: Floats, count: int, seed: int) -> list[int]:
    """Return the row nearest to each centre of k-means, which begins with drawn rows."""
    rows = embeddings.astype(np.float64)
    centres = rows[np.random.default_rng(seed).choice(len(rows), count, replace=False)]
    for _ in range(25):
        nearest = (rows @ centres.T).argmax(axis=1)
        sums = np.stack([rows[nearest == each].sum(axis=0) for each in range(count)])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return sorted({int(at) for at in (rows @ centres.T).argmax(axis=0)})


def farthest(embeddings: Floats, count: int, seed: int) -> list[int]:
    """Return rows each of which is the farthest from those before it (k-centre, Gonzalez 1985)."""
    rows = embeddings.astype(np.float64)
    chosen = [int(np.random.default_rng(seed).integers(len(rows)))]
    nearest = np.full(len(rows), 2.0)
    while len(chosen) < count:
        nearest = np.minimum(nearest, 1 - rows @ rows[chosen[-1]])
        chosen.append(int(nearest.argmax()))
    return chosen


# --- subjects ----------------------------------------------------------------------------------------------


def default_tower(quick: bool, *, on: str = "photographs") -> Tower:
    """Return the default model with photographs and pictograms, or with what an export takes by itself."""
    from edgeclip.bundle import Bundle
    from edgeclip.labels import LabelBank

    spec = preprocess_spec()
    pool, kinds = photographs(spec, quick) if on == "photographs" else shipped(spec)
    bundle = Bundle.open("default")
    entry = bundle.manifest.label_banks["imagenet-1k"]
    bank = LabelBank.from_bytes(bundle.read(entry.file), source="imagenet-1k")
    lines = (ROOT / "benchmarks/data/stamps.jsonl").read_text(encoding="utf-8").splitlines()
    names = sorted({json.loads(line)["en"] for line in lines})
    graphs = float_graphs()
    tokens = tokenizer()([f"a photo of a {name}." for name in names], truncate=True)
    session = session_of(graphs["text"])
    stamps = session.run(None, {session.get_inputs()[0].name: tokens})[0]
    judges = {"photographs": judging(spec, quick)}
    banks = {f"{len(bank)} names": bank.embeddings, f"{len(names)} stamp names": stamps}
    return Tower(graphs["image"], pool, kinds, judges, banks)


def probe_tower(quick: bool, *, on: str) -> Tower:
    """Return the MobileCLIP-shaped probe, calibrated on photographs or on shapes."""
    from edgeclip.export.options import Checkpoint, GraphOptions
    from edgeclip.export.source import open_source
    from edgeclip.label_sets import LabelSet, Templates
    from edgeclip.shapes import held_out_combinations, label

    source = open_source(Checkpoint(str(ROOT / "tests/data/probes/mobileclip")), threads=1)
    every = held_out_combinations()
    step = len(every) / 200
    names = LabelSet.of(sorted({label(every[int(row * step)], "en") for row in range(200)}))
    bank = source.bank(names, Templates.of("bare")).embeddings
    graph = source.trace("image", GraphOptions())
    if on == "photographs":
        pool, kinds = photographs(source.preprocess, quick)
        judges = {
            "photographs": judging(source.preprocess, quick),
            "unseen shapes": shapes(held_out=True, count=SHAPES),
        }
    else:
        pool = shapes(held_out=False, count=300 if quick else 3000)
        kinds = tuple(str(row * 20 // len(pool)) for row in range(len(pool)))  # combinations are in order
        judges = {"unseen shapes": shapes(held_out=True, count=SHAPES)}
    return Tower(graph, pool, kinds, judges, {f"{len(names)} shape names": bank})


def photographs(spec: PreprocessSpec, quick: bool) -> tuple[Pixels, tuple[str, ...]]:
    """Return the pool of photographs and pictograms, and what each picture is."""
    found = photos(use="calibration")
    paths = [photo.path for photo in found][:: 10 if quick else 1]
    rows = seen(spec, paths)
    # What is known of an unlabelled picture: the package and folder it came in.
    kinds = [f"{photo.package.name}/{photo.path.parent.name}" for photo in found][:: 10 if quick else 1]
    drawn = pictograms(spec, rows)[:: 10 if quick else 1]
    strata = [kind for kind in kinds for _ in VIEWS] + ["pictograms"] * len(drawn)
    return np.concatenate([rows, drawn]), tuple(strata)


def shipped(spec: PreprocessSpec) -> tuple[Pixels, tuple[str, ...]]:
    """Return the photographs that come with edgeclip as an export crops them, and which each row is of."""
    paths = sorted((ROOT / "edgeclip/assets/photos").glob("*.jpg"))
    rows = seen(spec, paths, CROPS)
    return rows, tuple(path.stem for path in paths for _ in CROPS)


def judging(spec: PreprocessSpec, quick: bool) -> Pixels:
    """Return photographs that nothing was calibrated on."""
    return seen(spec, [photo.path for photo in photos(use="test")][:: 8 if quick else 1])


SUBJECTS: Mapping[str, Callable[[bool], Tower]] = {
    "default, photographs": default_tower,
    "mobileclip probe, photographs": lambda quick: probe_tower(quick, on="photographs"),
    "default, shipped photographs": lambda quick: default_tower(quick, on="shipped"),
    "mobileclip probe, shapes": lambda quick: probe_tower(quick, on="shapes"),
}


def choices(tower: Tower) -> Iterator[tuple[str, int, int, Callable[[], list[int]]]]:
    """Yield method, samples, seed and how to choose."""
    for seed in SEEDS:
        for method, samples in (each for each in CHOICES if each[1] < len(tower.pool)):
            yield method, samples, seed, lambda m=method, n=samples, s=seed: tower.choose(m, n, s)  # type: ignore[misc]
        yield "k-means", 64, seed, lambda s=seed: medoids(tower.embeddings, 64, s)  # type: ignore[misc]
        yield "farthest", 64, seed, lambda s=seed: farthest(tower.embeddings, 64, s)  # type: ignore[misc]
    yield "k-medians of all", 64, 0, lambda: cover(tower.embeddings, 64)
    yield "all", len(tower.pool), 0, lambda: list(range(len(tower.pool)))


def measured(tower: Tower) -> list[dict[str, Any]]:
    """Return what every choice comes to."""
    if tower.method == MinMax():
        tower.check()
    rows = []
    for method, samples, seed, choose in choices(tower):
        places = choose()
        judged = tower.judged(places)
        rows.append(
            {"method": method, "samples": samples, "rows": len(places), "seed": seed, "judged": judged}
        )
        print(f"{method}-{samples} seed {seed}: {judged}", file=sys.stderr)
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, least and largest over seeds by choice."""
    said: dict[str, Any] = {}
    for method, samples in dict.fromkeys((row["method"], row["samples"]) for row in rows):
        of_choice = [row["judged"] for row in rows if (row["method"], row["samples"]) == (method, samples)]
        entry: dict[str, Any] = {}
        for judge, first in of_choice[0].items():
            numbers = {"cosine_loss_mean": [each[judge]["cosine_loss_mean"] for each in of_choice]}
            for bank in first["top1_agreement"]:
                numbers[f"top1, {bank}"] = [each[judge]["top1_agreement"][bank] for each in of_choice]
            entry[judge] = {
                name: {"mean": round(float(np.mean(values)), 6), "least": min(values), "most": max(values)}
                for name, values in numbers.items()
            }
        said[f"{method}-{samples}"] = entry
    return said


def main() -> None:
    """Measure every subject, and write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", choices=SUBJECTS, action="append")
    parser.add_argument(
        "--ranges", type=RangeMethod.parse, default=MinMax(), help="minmax, mse, percentile:99.9"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the pictures: to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/calibration_selection.json")
    options = parser.parse_args()
    subjects = {}
    for name in options.subject or SUBJECTS:
        started = time.perf_counter()
        tower = SUBJECTS[name](options.quick)
        print(f"{name}: pool of {len(tower.pool)}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        tower.method = options.ranges
        rows = measured(tower)
        subjects[name if tower.method == MinMax() else f"{name}, {tower.method} ranges"] = {
            "pool": len(tower.pool),
            "tensors": len(tower.names),
            "judges": {judge: len(pictures) for judge, pictures in tower.judges.items()},
            "summary": summary(rows),
            "choices": rows,
        }
    write(options.output, {"benchmark": "calibration_selection", "seeds": len(SEEDS), "subjects": subjects})


if __name__ == "__main__":
    main()
