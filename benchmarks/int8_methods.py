"""What each choice of int8 does to the answers: range methods, biases, weights, what stays float; text forms.

Image towers of the default model and of the trained probes, 8-bit ONNX files in ONNX Runtime. Ranges of the
default model are chosen on the pictures of `agreement_pictures.py` for that and judged on every eighth of its
unlabelled ones (200 names); those of probes on 128 shapes of training, judged on 796 held-out ones (200
names that differ by a word). A row changes one thing; `default` is what `edgeclip export` does.

Text forms (`--texts`): the text tower of MobileCLIP2-S0 with random weights, 16 texts of one session: fp32;
weights in int8 followed by Cast and Mul, by DequantizeLinear, as MatMulNBits of 8 bits; int8 throughout.
Memory is what a process has more after loading and one run.

    python benchmarks/int8_methods.py [--texts]
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from written import ROOT, write

from edgeclip.export.build import Int8Settings
from edgeclip.export.int8 import policy_of, quantize, scheme_of, symmetric_qdq
from edgeclip.export.options import Checkpoint, GraphOptions
from edgeclip.export.passes import apply
from edgeclip.export.passes.sequences import shared
from edgeclip.export.source import open_source
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.runtime.parity import compare_embeddings
from edgeclip.shapes import held_out_combinations, label, ordered_combinations, render

METHODS = (
    "minmax",
    "moving-average",
    "percentile:99.9",
    "percentile:99.99",
    "percentile:99.999",
    "entropy",
    "mse",
)
PROBES = ("mobileclip", "vit", "tinyclip")
SIMULATED = {"session.disable_quant_qdq": "1"}
THREADS = 2


@dataclass(frozen=True, eq=False)
class Subject:
    """An image tower with what its int8 is chosen and judged on."""

    name: str
    graph: onnx.ModelProto
    rows: NDArray[np.uint8]
    pictures: NDArray[np.uint8]
    bank: NDArray[np.float32]


def run(
    graph: onnx.ModelProto, rows: NDArray[Any], settings: Mapping[str, str] | None = None
) -> NDArray[np.float32]:
    """Return what a graph gives for rows."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: rows[start : start + 16]})[0] for start in range(0, len(rows), 16)]
    return np.concatenate(parts)


def default_model() -> Subject:
    """Return the default model's tower."""
    from agreement_pictures import calibration_pixels, labelled_sets, unlabelled
    from default_graphs import float_graphs, preprocess_spec, tokenizer

    graphs = float_graphs()
    stamps = next(each for each in labelled_sets(preprocess_spec()) if each.name == "stamps-en")
    texts = tokenizer()([f"a photo of a {name}." for name in stamps.candidates], truncate=True)
    pictures = unlabelled(preprocess_spec()).pixels[::8]
    bank = run(graphs["text"], texts)
    return Subject(
        "default", graphs["image"], calibration_pixels(preprocess_spec()), np.asarray(pictures), bank
    )


def probe(name: str) -> Subject:
    """Return the image tower of a probe."""
    source = open_source(Checkpoint(str(ROOT / "tests" / "data" / "probes" / name)), threads=THREADS)
    size = source.preprocess.image_size_px[0]
    graphs = {t: apply(source.trace(t, GraphOptions()), shared(), what=t) for t in ("image", "text")}
    seen = list(itertools.islice(ordered_combinations(False, 1), 128))
    judged = held_out_combinations()
    names = source.tokenizer([label(each, "en") for each in judged[:200]], truncate=True)
    draw = {0: seen, 1: judged}
    rows, pictures = (
        np.stack([render(each, 5000 * part + row, size_px=size) for row, each in enumerate(draw[part])])
        for part in draw
    )
    return Subject(name, graphs["image"], rows, pictures, run(graphs["text"], names))


def forms(subject: Subject) -> Iterator[tuple[str, onnx.ModelProto, Mapping[str, str]]]:
    """Give each form with its name and the settings it is run with."""
    from edgeclip.calibration.ranges import RangeMethod

    policy, what = policy_of(subject.graph), subject.name

    def made(settings: Int8Settings = Int8Settings(), policy: Any = policy, **scheme: Any) -> onnx.ModelProto:  # noqa: B008
        return quantize(
            subject.graph, subject.rows, policy, replace(scheme_of(), **scheme), settings, what=what
        )

    yield "default", made(fit_pairs=True), {}
    yield "8 bits", made(), {}
    yield "7 bits", made(weight_bits=7), {}
    for method in METHODS:
        yield method, made(Int8Settings(RangeMethod.parse(method)), fit_pairs=True), {}
    yield "nearest levels", made(Int8Settings(rounding="nearest"), fit_pairs=True), {}
    yield "biases as they are", made(Int8Settings(correct_biases=False), fit_pairs=True), {}
    yield "all but the stem", made(policy=replace(policy, entry=0), fit_pairs=True), {}
    yield "outputs in float", made(integer_outputs=False, fit_pairs=True), {}
    yield (
        "minmax, biases as they are, all but the stem",
        made(
            Int8Settings(RangeMethod.parse("minmax"), correct_biases=False), policy=replace(policy, entry=0)
        ),
        {},
    )
    yield "TensorRT's", symmetric_qdq(subject.graph, subject.rows, policy, what=what), SIMULATED


def judge(subject: Subject) -> dict[str, Any]:
    """Return the agreement of every form with float32."""
    exact = run(subject.graph, subject.pictures)
    found: dict[str, Any] = {}
    for name, graph, settings in forms(subject):
        numbers = compare_embeddings(exact, run(graph, subject.pictures, settings), bank=subject.bank)
        assert numbers.top1_agreement is not None
        found[name] = {
            "cosine_mean": round(numbers.cosine_mean, 6),
            "cosine_min": round(numbers.cosine_min, 5),
            "top1": round(numbers.top1_agreement, 4),
        }
        print(subject.name, name, found[name], flush=True)
    return {"pictures": len(subject.pictures), "labels": len(subject.bank), "forms": found}


# --- text towers -------------------------------------------------------------------------------------------


def text_forms(folder: Path) -> dict[str, Path]:
    """Write the text tower of MobileCLIP2-S0 in each form."""
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "tools"))
    from towers import random_weights

    from edgeclip.export.storage import store_small
    from edgeclip.export.trace import trace
    from edgeclip.models.clip import build_clip
    from edgeclip.models.zoo import clip_config

    config = clip_config("MobileCLIP2-S0")
    model = random_weights(build_clip(config), dtype=torch.float32)
    graph = apply(trace(model, config).by_name()["text"], shared(), what="text")
    rows = np.random.default_rng(0).integers(1, 49_406, (32, 77), dtype=np.int32)
    made = {"fp32": graph}
    for name in ("cast and mul", "DequantizeLinear", "MatMulNBits"):
        made[name] = onnx.ModelProto()
        made[name].CopyFrom(graph)
    store_small(made["cast and mul"], tables="int8", others="int8")
    store_small(made["DequantizeLinear"], tables="int8", others="float32")
    _dequantized(made["DequantizeLinear"])
    store_small(made["MatMulNBits"], tables="int8", others="float32")
    made["MatMulNBits"] = _blocks(made["MatMulNBits"])
    made["int8"] = quantize(graph, rows, policy_of(graph), scheme_of(fit_pairs=True), what="text")
    store_small(made["int8"], tables="int8", others="float16")
    paths = {}
    for name, each in made.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.onnx"
        paths[name].write_bytes(each.SerializeToString())
    return paths


def _dequantized(model: onnx.ModelProto) -> None:
    """Store the weights of products as int8 with DequantizeLinear behind them."""
    from onnx import helper, numpy_helper

    for node in [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]:
        tensor = next((each for each in model.graph.initializer if each.name == node.input[1]), None)
        if tensor is None or len(tensor.dims) != 2:
            continue
        transposed = any(each.name == "transB" and each.i for each in node.attribute)
        axis = 0 if transposed else 1
        value = numpy_helper.to_array(tensor)
        scale = (np.abs(value).max(axis=1 - axis) / 127).astype(np.float32)
        shape = (-1, 1) if axis == 0 else (1, -1)
        whole = np.rint(value / scale.reshape(shape)).astype(np.int8)
        name = tensor.name
        model.graph.initializer.remove(tensor)
        added = {"q": whole, "scale": scale, "zero": np.zeros(len(scale), np.int8)}
        model.graph.initializer.extend(
            [numpy_helper.from_array(each, f"{name}_{kind}") for kind, each in added.items()]
        )
        inputs = [f"{name}_{kind}" for kind in added]
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [name], axis=axis))


def _blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    import_onnxruntime()
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True, accuracy_level=0)
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made


def one_text_form(path: Path, rows: Path, out: Path) -> None:
    """Load a form in this process alone, run it, and print what that took."""
    ort = import_onnxruntime()
    tokens = np.load(rows)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    load_s = time.perf_counter() - began
    name = session.get_inputs()[0].name
    held = _held_kb()
    result = session.run(None, {name: tokens})[0]
    times = []
    for _ in range(10):
        began = time.perf_counter()
        session.run(None, {name: tokens[:1]})
        times.append(time.perf_counter() - began)
    np.save(out, result)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "file_mb": round(path.stat().st_size / 1e6, 1),
                "load_s": round(load_s, 2),
                "held_mb": round(held / 1e3),
                "peak_mb": round((peak - before) / 1e3),
                "text_ms": round(1e3 * float(np.median(times)), 1),
            }
        )
    )


def _held_kb() -> int:
    said = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in said.splitlines() if line.startswith("VmRSS")))


def compare_texts() -> dict[str, Any]:
    """Return size, load time, memory, latency and agreement of each text form."""
    found = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        rows = np.random.default_rng(1).integers(1, 49_406, (16, 77), dtype=np.int32)
        np.save(folder / "rows.npy", rows)
        exact = None
        for name, path in text_forms(folder).items():
            arguments = [sys.executable, __file__, "--one", path, folder / "rows.npy", folder / "out.npy"]
            said = subprocess.run(list(map(str, arguments)), check=True, capture_output=True, text=True)
            got = np.load(folder / "out.npy")
            exact = got if exact is None else exact
            numbers = compare_embeddings(exact, got)
            centred = numbers.centred_cosine_mean
            found[name] = {
                **json.loads(said.stdout),
                "max_abs": round(numbers.max_abs, 5),
                "centred_cosine": centred,
            }
            print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["default", *PROBES])
    parser.add_argument("--texts", action="store_true", help="compare forms of a text tower too")
    parser.add_argument("--one", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "int8_methods.json")
    asked = parser.parse_args()
    if asked.one:
        one_text_form(*asked.one)
        return
    result: dict[str, Any] = {
        name: judge(default_model() if name == "default" else probe(name)) for name in asked.subjects
    }
    write(asked.output, {"images": result, "texts": compare_texts() if asked.texts else None})


if __name__ == "__main__":
    main()
