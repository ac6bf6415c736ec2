r"""Every lever on the way of a picture, on against off: which gain, and by how much.

The ratio is the time (or peak memory) without the lever over that with it: above 1 it gains. Both sides are
called in turns; memory is that of fresh processes, in rounds. Where one call would change what the next one
meets (threads that still spin, memory that is kept), each timed call follows an untimed one of its own kind.
Every lever is measured on the embedded bundle, and on another one where one is given: at the size of
MobileCLIP2-S0, say, for which random weights serve. Its twin with float input is for the first lever alone.

    edgeclip data fetch photos
    edgeclip export s0.safetensors --model MobileCLIP2-S0 --variant onnx-fp32 --variant onnx-int8 \
        --variant openvino-fp32 -o bundle-s0                  # weights as peers/jpeg_to_label.py makes them
    edgeclip export s0.safetensors --model MobileCLIP2-S0 --no-text --float-input -o bundle-s0-float
    python benchmarks/speed_work.py --bundle bundle-s0 --float-bundle bundle-s0-float     # minutes
    python benchmarks/speed_work.py --table        # the table of docs/experiments.md, from the JSON
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from cold_start import camera_photo
from PIL import Image
from written import arguments, model, ratio, write

from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier
from edgeclip.heads import cosines
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.host import usable_cores
from edgeclip.runtime.latency import (
    CONFIDENCE,
    LatencySamples,
    RatioInterval,
    _ratio_interval,
    compare_interleaved,
)
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.runtime.ov import import_openvino
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import RuntimeOptions, open_session

Call = Callable[[], object]
PICTURES = 13  # a folder that fills no batch: 8 + 5, 3 · 4 + 1, 6 · 2 + 1
INTRA = "session.intra_op."
SPINNING = {
    "spinning": {f"{INTRA}allow_spinning": "1"},
    "spinning within a call": {f"{INTRA}allow_spinning": "1", "session.force_spinning_stop": "1"},
    "spinning for 50 µs": {f"{INTRA}allow_spinning": "1", f"{INTRA}spin_duration_us": "50"},
}
MEMORY: dict[str, dict[str, Any]] = {
    "no arena": {"arena": False},
    "no prepacking": {"keys": {"session.disable_prepacking": "1"}},
    "initializers apart": {"keys": {"session.use_device_allocator_for_initializers": "1"}},
    "mapped weights": {
        "file": "ort",
        "keys": {
            "session.use_memory_mapped_ort_model": "1",
            "session.use_ort_model_bytes_for_initializers": "1",
        },
    },
    "mapped weights, no prepacking": {
        "file": "ort",
        "keys": {
            "session.use_memory_mapped_ort_model": "1",
            "session.use_ort_model_bytes_for_initializers": "1",
            "session.disable_prepacking": "1",
        },
    },
    "low_memory": {
        "arena": False,
        "keys": {
            "session.disable_prepacking": "1",
            "session.use_device_allocator_for_initializers": "1",
        },
    },
}
CHILD = """
import json, sys
from time import perf_counter
spec = json.loads(sys.argv[1])
import numpy as np
from edgeclip.runtime.host import peak_rss_bytes, release_freed_memory
from edgeclip.runtime.ort import import_onnxruntime
ort = import_onnxruntime()
base = peak_rss_bytes()
settings = ort.SessionOptions()
settings.intra_op_num_threads, settings.inter_op_num_threads = spec["threads"], 1
settings.log_severity_level = 4
settings.enable_cpu_mem_arena = settings.enable_mem_pattern = spec.get("arena", True)
if "file" in spec:
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
for key, value in spec.get("keys", {}).items():
    settings.add_session_config_entry(key, value)
began = perf_counter()
session = ort.InferenceSession(spec["model"], settings, providers=["CPUExecutionProvider"])
opened = perf_counter()
release_freed_memory()
feed = {session.get_inputs()[0].name: np.zeros(spec["shape"], np.uint8)}
times = []
for _ in range(12):
    start = perf_counter()
    session.run(None, feed)
    times.append((perf_counter() - start) * 1e3)
print(json.dumps({"tower": float(np.median(times[2:])), "open": (opened - began) * 1e3,
                  "memory": (peak_rss_bytes() - base) / 1e6}))
"""
# Lever -> whether it is in the runtime, and why.
DECISIONS = {
    "uint8 graph": ("kept", "a quarter of the bytes, and nothing for a host to get wrong"),
    "IO binding": (
        "not kept",
        "input and output are small beside a tower; outputs would be shared with later calls",
    ),
    "preallocated tensors": ("not kept", "input is shared already; outputs would be shared with later calls"),
    "spinning": (
        "option",
        "takes cores from others: `RuntimeOptions(spinning=True)`, or `edgeclip tune` decides",
    ),
    "spinning within a call": (
        "not kept",
        "as spinning beside others; light towers wait for threads to wake",
    ),
    "spinning for 50 µs": ("not kept", "as spinning, with less to gain and to lose"),
    "optimised graph cached": ("kept", "half of opening a tower"),
    "compiled blob cached": ("kept", "a tenth of opening a tower"),
    "reduced-scale decode": ("option", "`--fast-decode`: about 3 of 100 first labels change"),
    "crop inside the resize": ("fast decode alone", "moves single levels, so that it is not exact"),
    "reduce by 2 before the resize": ("not kept", "mean difference of pixels five times that of fast decode"),
    "picture memory kept": (
        "kept",
        "spares new pages where the allocator gives large blocks back; not with `low_memory`",
    ),
    "pipelined stream": ("kept", "`classify_stream`; the bound is in `benchmarks/overlap.py`"),
    "batches of 2": ("option", "`batch_size`"),
    "batches of 4": ("option", "`batch_size`"),
    "batches of 8": ("option", "`batch_size`"),
    "ragged tail": ("kept", "a batch that is not full is run as it is"),
    "head as one matmul": ("not kept", "BLAS threads stall beside other work (`benchmarks/head_threads.py`)"),
    "mapped bank": ("not kept", "a bank is small, and equal once it was read"),
    "no arena": ("low_memory", "part of it"),
    "no prepacking": ("low_memory", "part of it"),
    "initializers apart": ("low_memory", "part of it"),
    "mapped weights": (
        "reading alone",
        "cached graphs are mapped while they are read; weights used in place stay beside their packed copies",
    ),
    "mapped weights, no prepacking": (
        "not kept",
        "calls are slower; `low_memory` meets its bar without",
    ),
    "low_memory": ("option", "no picture memory kept; of a tower alone it saves nothing here"),
}


class Bench:
    """What all measurements share."""

    def __init__(self, *, quick: bool, threads: int) -> None:
        self.quick, self.threads = quick, threads
        self.rows: list[dict[str, Any]] = []

    def keep(self, lever: str, subject: str, what: str, found: dict[str, Any]) -> None:
        """Write one ratio down, and say it."""
        self.rows.append({"lever": lever, "subject": subject, "what": what, **found})
        told = f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        print(f"{subject:28} {lever:32} {what:24} {told}", file=sys.stderr, flush=True)

    def turns(self, lever: str, subject: str, what: str, off: Call, on: Call, *, repeat: int = 1) -> None:
        """Compare two calls that do not disturb each other."""
        blocks, seconds = (6, 0.0) if self.quick else (15, 2.0)
        found = compare_interleaved(
            off, on, min_blocks=blocks, min_duration_s=seconds, max_duration_s=15, repeat=repeat
        )
        self.keep(lever, subject, what, ratio(found))

    def settled(
        self, lever: str, subject: str, what: str, off: Call, on: Call, *, pause_s: float = 0
    ) -> None:
        """Compare two calls each of which follows a pause and an untimed call of its own kind."""
        order, taken = random.Random(0), {"a": [], "b": []}
        began = time.monotonic()
        for _ in range(6 if self.quick else 15):
            for name in order.choice(("abba", "baab")):
                call = off if name == "a" else on
                time.sleep(pause_s)
                call()
                start_ns = perf_counter_ns()
                call()
                taken[name].append((perf_counter_ns() - start_ns) / 1e6)
        self.keep(lever, subject, what, _of(taken["a"], taken["b"], time.monotonic() - began))


def _of(a: Sequence[float], b: Sequence[float], seconds: float) -> dict[str, Any]:
    """Return the ratio of samples taken in turns, two of each a block."""
    samples = [LatencySamples(np.array(each), duration_s=seconds) for each in (a, b)]
    told = _ratio_interval(samples[0].samples_ms, samples[1].samples_ms, CONFIDENCE)
    return ratio(RatioInterval(*told, len(a) // 2, CONFIDENCE, *samples, seed=0))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep so many cores busy meanwhile."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
        for _ in range(count)
    ]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


# --- towers -------------------------------------------------------------------------------------------------


def session_of(path: Path, threads: int, keys: dict[str, str]) -> Any:
    """Return a bare session of ONNX Runtime whose threads do not spin, unless ``keys`` say so."""
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 4
    for key, value in {f"{INTRA}allow_spinning": "0", **keys}.items():
        settings.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def float_input(bench: Bench, bundle: str, twin: str, variant: str) -> None:
    """Pixels to embedding: levels that the graph scales, against floats that the host made of them."""
    options = RuntimeOptions(threads=bench.threads)
    with (
        ZeroShotClassifier.open(bundle, variant=variant, options=options) as whole,
        ZeroShotClassifier.open(twin, variant=variant, options=options) as split,
    ):
        picture = pixels(whole.bundle)
        same = whole._embed(picture)[0] @ split._embed(picture)[0]
        assert same > 0.9999, f"not twins: cosine {same}"
        name = f"{whole.bundle.manifest.model.name} {variant}"
        bench.turns(
            "uint8 graph",
            name,
            "pixels to embedding",
            lambda: split._embed(picture),
            lambda: whole._embed(picture),
        )


def pixels(bundle: Bundle, count: int = 1) -> Any:
    """Return random tower inputs ``(count, H, W, 3)``."""
    height, width = bundle.manifest.preprocess.image_size_px
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def onnx_tower(bench: Bench, subject: str, bundle: Bundle, path: Path) -> None:
    """Binding and spinning, on the tower alone."""
    picture = pixels(bundle)
    session = session_of(path, bench.threads, {})
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    ort = import_onnxruntime()
    result = np.empty((1, bundle.manifest.model.embed_dim), np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_output(made.name, ort.OrtValue.ortvalue_from_numpy(result))

    def bound() -> None:
        binding.bind_cpu_input(given.name, picture)
        session.run_with_iobinding(binding)

    names, feed = [made.name], {given.name: picture}
    bench.turns("IO binding", subject, "tower", lambda: session.run(names, feed), bound)
    for lever, keys in SPINNING.items():
        spins = session_of(path, bench.threads, keys)
        for count, what in ((0, "tower, alone"), (1, "tower, busy neighbour")):
            with neighbours(count):
                bench.settled(
                    lever,
                    subject,
                    what,
                    lambda: session.run(names, feed),
                    lambda: spins.run(names, feed),  # noqa: B023
                    pause_s=0.06,  # what spun has gone to sleep
                )


def openvino_tower(bench: Bench, subject: str, bundle: Bundle, path: Path) -> None:
    """Tensors that are made once, against the call of the runtime."""
    ov = import_openvino()
    settings = {"INFERENCE_NUM_THREADS": bench.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(str(path), "CPU", {**settings, "INFERENCE_PRECISION_HINT": "f32"})
    picture, plain, fixed = pixels(bundle), compiled.create_infer_request(), compiled.create_infer_request()
    held = picture.copy()
    result = np.empty((1, bundle.manifest.model.embed_dim), np.float32)
    fixed.set_input_tensor(ov.Tensor(held, shared_memory=True))
    fixed.set_output_tensor(ov.Tensor(result, shared_memory=True))

    def preallocated() -> None:
        held[...] = picture
        fixed.infer()

    bench.turns(
        "preallocated tensors",
        subject,
        "tower",
        lambda: plain.infer({0: picture}, share_inputs=True)[0],
        preallocated,
    )


def opening(bench: Bench, subject: str, tower: Any, lever: str) -> None:
    """Open a tower with what the host cache keeps, and without."""
    with tempfile.TemporaryDirectory() as folder:
        cached = RuntimeOptions(threads=bench.threads, cache_dir=Path(folder))
        plain = RuntimeOptions(threads=bench.threads)
        open_session(tower, options=cached).close()
        bench.turns(
            lever,
            subject,
            "open the tower",
            lambda: open_session(tower, options=plain).close(),
            lambda: open_session(tower, options=cached).close(),
        )


def memory(bench: Bench, subject: str, bundle: Bundle, path: Path) -> None:
    """Open and run the tower in fresh processes, in rounds: peak memory over the engine's own, and time."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder, "tower.ort")
        session = session_of_stored(path, stored, bench.threads)
        del session
        base = {"model": str(path), "threads": bench.threads, "shape": pixels(bundle).shape}
        forms = {"": base} | {name: {**base, **form} for name, form in MEMORY.items()}
        for form in forms.values():
            if "file" in form:
                form["model"] = str(stored)
        told: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
        order, names, began = random.Random(0), list(forms), time.monotonic()
        for _ in range(6 if bench.quick else 8):
            order.shuffle(names)
            for name in names:
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, json.dumps(forms[name])],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                told[name].append(json.loads(done.stdout))
    seconds = time.monotonic() - began
    for name in MEMORY:
        for key, what in (
            ("memory", "peak memory of the tower"),
            ("tower", "tower"),
            ("open", "open the tower"),
        ):
            a, b = ([each[key] for each in told[form]] for form in ("", name))
            found = rounds(a, b)
            bench.keep(name, subject, what, {**found, "duration_s": round(seconds, 1)})


def session_of_stored(path: Path, stored: Path, threads: int) -> Any:
    """Write the optimised graph of a tower in ONNX Runtime's own format, which can be mapped."""
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 4
    settings.optimized_model_filepath = str(stored)
    settings.add_session_config_entry("session.save_model_format", "ORT")
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def rounds(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Return the median ratio over rounds of one sample each."""
    doubled = [np.repeat(np.array(each), 2).tolist() for each in (a, b)]
    found = _of(*doubled, 0.0)
    return {
        **found,
        "a_median_ms": round(float(np.median(a)), 4),
        "b_median_ms": round(float(np.median(b)), 4),
    }


# --- pictures -----------------------------------------------------------------------------------------------


def decoding(bench: Bench, subject: str, bundle: Bundle, photo: Path) -> None:
    """What stands between a file of 12 megapixels and the tower's pixels."""
    spec = bundle.manifest.preprocess
    exact, fast = Preprocess(spec), Preprocess(spec, fast_decode=True)
    core: Any = Image.core

    def blocks(count: int, call: Call) -> Call:
        def run() -> None:
            core.set_blocks_max(count)
            call()

        return run

    bench.turns("reduced-scale decode", subject, "file to pixels", lambda: exact(photo), lambda: fast(photo))
    for name, form in (("exact", exact), ("fast decode", fast)):
        without, kept = blocks(0, lambda: form(photo)), blocks(4, lambda: form(photo))  # noqa: B023
        bench.settled("picture memory kept", subject, f"file to pixels, {name}", without, kept)
    core.set_blocks_max(0)
    reduced = fast.decode(photo)
    if spec.crop == "center":
        whole = reduced.copy()
        whole.info = {}  # resized and cropped in two steps, as a full picture is
        bench.turns(
            "crop inside the resize",
            subject,
            "resize",
            lambda: exact.resize(whole),
            lambda: fast.resize(reduced),
        )
    size = spec.image_size_px[::-1]
    bench.turns(
        "reduce by 2 before the resize",
        subject,
        "resize",
        lambda: np.array(reduced.resize(size, Image.Resampling.BILINEAR)),
        lambda: np.array(reduced.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.0)),
    )


def streaming(bench: Bench, subject: str, classifier: ZeroShotClassifier, photo: Path) -> None:
    """A folder of 12-megapixel files, one after the other and pipelined; and batches of ready pictures."""
    files = [photo] * (4 if bench.quick else 8)

    def alone() -> None:
        for file in files:
            classifier.classify(file, top_k=1)

    def pipelined() -> None:
        list(classifier.classify_stream(files, top_k=1))

    blocks = 6
    found = compare_interleaved(alone, pipelined, min_blocks=blocks, min_duration_s=0, warmup=1)
    bench.keep("pipelined stream", subject, f"{len(files)} files", ratio(found))
    session, ready = classifier._session, pixels(classifier.bundle, PICTURES)

    def batches(size: int) -> Call:
        return lambda: run_rows(session, ready, batch=size)

    def filled() -> None:
        padded = np.concatenate([ready, np.repeat(ready[-1:], -len(ready) % 8, axis=0)])
        run_rows(session, padded, batch=8)

    for size in (2, 4, 8):
        bench.turns(f"batches of {size}", subject, f"{PICTURES} pictures", batches(1), batches(size))
    bench.turns("ragged tail", subject, f"{PICTURES} pictures, batches of 8", filled, batches(8))


def heads(bench: Bench, width: int) -> None:
    """One embedding against banks in memory and mapped from a file."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((1, width)).astype(np.float32)
    for labels in (100, 1000, 10_000):
        bank = rng.standard_normal((labels, width)).astype(np.float32)
        subject, repeat = f"{labels} labels, E {width}", max(1, 10_000 // labels)
        bench.turns(
            "head as one matmul",
            subject,
            "cosines",
            lambda: cosines(embedding, bank),  # noqa: B023
            lambda: embedding @ bank.T,  # noqa: B023
            repeat=repeat,
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "bank.npy")
        np.save(file, bank)
        mapped = np.load(file, mmap_mode="r")
        plain = np.asarray(mapped)
        bench.turns(
            "mapped bank",
            subject,
            "cosines",
            lambda: cosines(embedding, bank),
            lambda: cosines(embedding, plain),
        )


# --- the run ------------------------------------------------------------------------------------------------


def measure(bench: Bench, path: str, photo: Path) -> dict[str, Any]:
    """Measure every lever on one bundle; return what was measured."""
    bundle = Bundle.open(path)
    there = list(bundle.manifest.variants)
    onnx = next(name for name in ("onnx-fp32", "onnx-int8") if name in there)
    name = bundle.manifest.model.name
    subject = f"{name} {onnx}"
    tower = bundle.variant(onnx).tower("image")
    onnx_tower(bench, subject, bundle, tower.model)
    opening(bench, subject, tower, "optimised graph cached")
    memory(bench, subject, bundle, tower.model)
    if "openvino-fp32" in there:
        other = bundle.variant("openvino-fp32").tower("image")
        with tempfile.TemporaryDirectory() as folder:  # the weights lie under another stem
            for file in other.files:
                Path(folder, f"image{file.suffix}").symlink_to(file.resolve())
            openvino_tower(bench, f"{name} openvino-fp32", bundle, Path(folder, "image.xml"))
        opening(bench, f"{name} openvino-fp32", other, "compiled blob cached")
    decoding(bench, name, bundle, photo)
    options = RuntimeOptions(threads=bench.threads)
    with ZeroShotClassifier.open(bundle, variant=onnx, options=options) as classifier:
        streaming(bench, subject, classifier, photo)
        return model(classifier)


def table(document: dict[str, Any]) -> str:
    """Return the table of docs/experiments.md: levers down, bundles across (heads under the first)."""
    bundles = [bundle["model"] for bundle in document["bundles"]]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in document["results"]:
        model = row["subject"].split()[0]
        told = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        where = row["what"] if model in bundles else f"{row['what']}, {row['subject']}"
        cells.setdefault((row["lever"], where), {})[model if model in bundles else bundles[0]] = told
    lines = [
        f"| lever | off / on of | {' | '.join(bundles)} | now | why |",
        "|---" * (len(bundles) + 4) + "|",
    ]
    for (lever, where), told in cells.items():
        shown = " | ".join(told.get(bundle, "–") for bundle in bundles)
        lines.append(f"| {lever} | {where} | {shown} | {' | '.join(DECISIONS[lever])} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "speed_work.json")
    parser.add_argument("--float-bundle", help="--bundle exported with --float-input")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--photo", type=Path, help="JPEG; instead of a fetched one, cut to 12 megapixels")
    parser.add_argument("--quick", action="store_true", help="six blocks of everything: numbers mean little")
    parser.add_argument("--table", action="store_true", help="print the table of a run that was made")
    options = parser.parse_args()
    if options.table:
        if not options.output.is_file():
            raise SystemExit(f"{options.output.name} is not there: run without --table first.")
        print(table(json.loads(options.output.read_text(encoding="utf-8"))))
        return
    bench, began = Bench(quick=options.quick, threads=options.threads), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        photo = options.photo or camera_photo(Path(temporary) / "photo.jpg")
        with Image.open(photo) as opened:
            size = list(opened.size)
        measured = [measure(bench, "default", photo)]
        if options.bundle != "default":
            measured.append(measure(bench, options.bundle, photo))
            if options.float_bundle:
                float_input(bench, options.bundle, options.float_bundle, "onnx-fp32")
        heads(bench, 512)
    assert all(math.isfinite(row["ratio"]) for row in bench.rows)
    write(
        options.output,
        {
            "measures": "time or peak memory without a lever over that with it, in turns",
            "quick": options.quick,
            "threads": options.threads,
            "photo_px": size,
            "bundles": measured,
            "measured_s": round(time.monotonic() - began, 1),
            "results": bench.rows,
        },
        show=False,
    )
    print(table({"results": bench.rows}))


if __name__ == "__main__":
    main()
