"""What int8 costs product by product, how long it takes to know, and what choosing by it gives.

For each image tower: the time of the whole measurement, and accuracy against latency of four ways to say what
stays float: nothing (quantize everything), the fixed policy (stem and products with one vector a picture),
our choice at several targets, and as many products drawn at random. Accuracy is measured on other crops than
those that the choice was made on; times are interleaved with the float tower's, one thread.

MobileCLIP2-S0 has random weights here, with batch statistics of photographs: its cosines are centred, and
its ranks mean nothing. The default model's are trained.

    python benchmarks/int8_sensitivity.py                    # writes results/int8_sensitivity.json
    python benchmarks/int8_sensitivity.py --only default     # replaces one tower in it
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from default_graphs import float_graphs, preprocess_spec
from numpy.typing import NDArray
from written import ROOT, ratio, write

from edgeclip.bundle import Bundle, PreprocessSpec
from edgeclip.calibration.sensitivity import Choice, Int8Target, choose, measure
from edgeclip.errors import CalibrationError
from edgeclip.export.calibration_rows import calibration_set
from edgeclip.export.int8 import policy_of
from edgeclip.export.options import References
from edgeclip.export.passes.qdq import place
from edgeclip.export.reference import reference_pictures
from edgeclip.export.sensitivity_onnx import Quantizable, SwitchedTower
from edgeclip.labels import LabelBank
from edgeclip.quantization import CPU
from edgeclip.runtime.latency import compare_interleaved
from edgeclip.runtime.parity import ParityNumbers, compare_embeddings
from edgeclip.runtime.session import RuntimeOptions

S0, DEFAULT = "MobileCLIP2-S0", "default"
TARGETS = {
    S0: ("centred=0.95", "centred=0.98"),
    DEFAULT: ("cosine=0.99,top1=0.98", "cosine=0.9999", "cosine=0.99995"),
}


def main() -> None:
    """Measure both towers and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=(S0, DEFAULT))
    parser.add_argument("--threads", type=int, default=2, help="of the measurement; latency takes one")
    parser.add_argument("--samples", type=int, default=64, help="pictures to measure on")
    parser.add_argument("--state", type=Path, help="keep what was measured here")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each comparison")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/int8_sensitivity.json")
    asked = parser.parse_args()
    found = {}
    for name in (S0, DEFAULT):
        if asked.only in (None, name):
            found[name] = subject(name, asked)
    if asked.only is not None and asked.output.is_file():
        found = {**json.loads(asked.output.read_text(encoding="utf-8"))["towers"], **found}
    write(asked.output, {"towers": found})


def subject(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    graph, spec, bank = loaded(name)
    options = RuntimeOptions(threads=asked.threads)
    drawn = References(calibration_selection="random", calibration_samples=asked.samples)
    rows = calibration_set(spec, drawn).rows["image"]
    other = reference_pictures(spec).pixels
    took: dict[str, dict[str, float]] = {}

    def timed(what: str, since: tuple[float, float]) -> None:
        """Note wall and processor seconds: other work on the machine stretches the former alone."""
        wall, cpu = (round(a - b, 2) for a, b in zip(now(), since, strict=True))
        took[what] = {"wall_s": wall, "cpu_s": cpu}
        print(f"{name}: {what} {wall} s, {cpu} s of processors", file=sys.stderr)

    began = now()
    tower = Quantizable.of(graph, rows, CPU, what=name, options=options)
    timed("ranges", began)
    began = now()
    table = tower.times(options=RuntimeOptions(threads=1))
    timed("profile", began)
    began = now()
    with SwitchedTower(tower, options=options) as board:
        timed("switchboard", began)
        began = now()
        sensitivity = measure(board, rows, bank, state=asked.state)
        timed("sensitivity", began)
        reference = board.embed(rows, ())

        @functools.cache
        def simulated(on: tuple[str, ...]) -> ParityNumbers:
            return compare_embeddings(reference, board.embed(rows, on), bank=bank)

        def simulate(on: Collection[str]) -> ParityNumbers:
            return simulated(tuple(on))

        def exact(on: Collection[str]) -> ParityNumbers:
            return compare_embeddings(reference, tower.embed_exact(rows, on, options=options), bank=bank)

        choices: dict[str, Choice | str] = {}
        for text in TARGETS[name]:
            began = now()
            try:
                choices[text] = choose(sensitivity, table, Int8Target.parse(text), simulate, exact)
            except CalibrationError as error:
                choices[text] = str(error)
            timed(f"choice {text}", began)
    fixed = place(ir.from_proto(tower.graph), policy_of(graph))
    ways: dict[str, tuple[str, frozenset[str]]] = {
        "everything": ("everything", frozenset()),
        "fixed": ("fixed", frozenset(tower.nodes).difference(fixed)),
    }
    for text, choice in choices.items():
        if isinstance(choice, Choice):
            ways[text] = ("chosen", frozenset(choice.keep_float))
    counts = sorted({len(kept) for kind, kept in ways.values() if kind == "chosen" and kept})
    for count in counts:
        for seed in range(2):
            drawn = random.Random(seed).sample(tower.nodes, count)
            ways[f"random {count}, seed {seed}"] = ("random", frozenset(drawn))
    truth = tower.embed_exact(other, (), options=options)
    points = []
    for label, (kind, kept) in ways.items():
        on = [node for node in tower.nodes if node not in kept]
        numbers = compare_embeddings(truth, tower.embed_exact(other, on, options=options), bank=bank)
        points.append(
            {
                "label": label,
                "kind": kind,
                "kept": len(kept),
                "cosine_mean": numbers.cosine_mean,
                "cosine_min": numbers.cosine_min,
                "centred_cosine_mean": numbers.centred_cosine_mean,
                "top1_agreement": numbers.top1_agreement,
                "float_over_int8": speed(tower, on, other[:1], asked.seconds),
            }
        )
        print(json.dumps(points[-1]), file=sys.stderr)
    return {
        "products": len(tower.nodes),
        "rows": len(rows),
        "judged_on": len(other),
        "threads": asked.threads,
        "seconds": took,
        "latency_table": table.to_dict(),
        "sensitivity": sensitivity.to_dict(),
        "choices": {
            text: choice if isinstance(choice, str) else choice.to_dict() for text, choice in choices.items()
        },
        "points": points,
        "against_chosen": against(tower, ways, other[:1], asked.seconds),
    }


def against(
    tower: Quantizable, ways: dict[str, tuple[str, frozenset[str]]], row: NDArray[Any], seconds: float
) -> dict[str, Any]:
    """Return how much longer the others take than the last choice, in turns with it."""
    chosen = [label for label, (kind, _) in ways.items() if kind == "chosen"]
    if not chosen:
        return {}
    found: dict[str, Any] = {"chosen": chosen[-1]}
    sets = {name: [each for each in tower.nodes if each not in kept] for name, (_, kept) in ways.items()}
    for label in ("everything", "fixed"):
        found[label] = turns(tower, sets[label], sets[chosen[-1]], row, seconds)
    return found


def now() -> tuple[float, float]:
    """Return wall and processor seconds."""
    return time.perf_counter(), time.process_time()


def speed(tower: Quantizable, on: Collection[str], row: NDArray[Any], seconds: float) -> dict[str, Any]:
    """Return how much faster these products in int8 are than all in float, with this processor's kernels."""
    return turns(tower, (), on, row, seconds)


def turns(
    tower: Quantizable, a: Collection[str], b: Collection[str], row: NDArray[Any], seconds: float
) -> dict[str, Any]:
    """Return the time with the first products in int8 over that with the second ones."""
    one = RuntimeOptions(threads=1)
    with tower.opened(a, options=one) as first, tower.opened(b, options=one) as second:
        found = compare_interleaved(
            lambda: first.run({"image": row}),
            lambda: second.run({"image": row}),
            min_blocks=40,
            max_duration_s=seconds,
            min_duration_s=seconds,
        )
    return ratio(found)


def loaded(name: str) -> tuple[onnx.ModelProto, PreprocessSpec, NDArray[np.float32] | None]:
    """Return graph, preprocessing and label embeddings."""
    if name == DEFAULT:
        bundle = Bundle.open("default")
        entry = bundle.manifest.label_banks[str(bundle.manifest.default_bank)]
        bank = LabelBank.from_bytes(bundle.read(entry.file), source="default")
        return float_graphs()["image"], preprocess_spec(), bank.embeddings
    import torch

    from edgeclip.distill.eager import preprocess_of
    from edgeclip.export.options import GraphOptions
    from edgeclip.export.passes import apply
    from edgeclip.export.passes.sequences import shared
    from edgeclip.export.trace import trace_image_tower
    from edgeclip.models.clip import build_clip
    from edgeclip.models.zoo import clip_config
    from edgeclip.preprocess import Preprocess

    config = clip_config(name)
    torch.manual_seed(0)
    model = build_clip(config)
    spec = preprocess_of(config)
    drawn = References(calibration_selection="random", calibration_samples=32, calibration_seed=1)
    pictures = Preprocess(spec).normalize(calibration_set(spec, drawn).rows["image"])
    with torch.no_grad():
        for key, value in model.image_tower.named_parameters():
            if key.endswith(("layer_scale", "gamma")):
                value.fill_(0.2)  # as after training; fresh ones of 1e-5 would make blocks do nothing
        for module in model.image_tower.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        model.image_tower.train()
        model.image_tower(torch.from_numpy(pictures))
    model.eval()
    graph = trace_image_tower(model.image_tower.requires_grad_(False), config, GraphOptions())
    return apply(graph, shared(), what=name), spec, None


if __name__ == "__main__":
    main()
