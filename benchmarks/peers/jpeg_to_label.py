"""From a JPEG file to a label, beside what people use today: one run, same photographs, same weights.

Every peer starts from one file of weights (MobileCLIP2-S0 at full size, random and perturbed, in open_clip's
names; ViT-B/32 in transformers' names for the peers that know nothing else), has its text embeddings cached,
and runs in a process of its own with the settings its documentation recommends. They are measured in turns
(``peer_rounds.py``): every subject of a round is called once untimed, so that caches are its own again, and
once timed by its own clock. Times of bare towers are medians over blocks without a pause, as OpenVINO's
`benchmark_app` takes them. What float32 peers say to every photograph is compared before anything is timed.
Threads of ONNX Runtime wait busily for work, as they do when nobody says otherwise and as `edgeclip tune`
asks for on a machine that is ours alone; one subject shows what we do by ourselves: we let them sleep.

    edgeclip data fetch photos
    python benchmarks/peers/jpeg_to_label.py --work ~/peers              # first makes exports and bundles
    python benchmarks/peers/jpeg_to_label.py --work ~/peers --quick      # a smoke run: numbers mean nothing
    python benchmarks/plot_peers.py                                      # plot, and tables of the pages
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests" / "tools")]

import numpy as np
from numpy.typing import NDArray
from peer_bars import Bar, evaluate, missing
from peer_install import install_sizes
from peer_rounds import (
    Places,
    Subject,
    Worker,
    first_label,
    ratio,
    rounds,
    summary,
    torchvision_environment,
    workers,
)
from peer_work import CLIP_MEAN, CLIP_STD, LEFT_OUT, TEMPLATE, Work, prepare
from written import arguments, write

from edgeclip.bundle import Bundle
from edgeclip.runtime.host import Host

SCENES = ("large", "large-1", "small", "vit", "pipelines", "start", "memory", "texts", "one-label", "towers")
OPEN_CLIP, PLAIN = "open_clip", "plain ONNX Runtime loop"
PLAIN_REDUCED, PLAIN_OPENVINO = "plain ONNX Runtime loop, reduced-scale JPEG", "plain OpenVINO loop"
OURS_A, OURS_B, OURS_OV = "edgeclip fp32", "edgeclip fp32, fast decode", "edgeclip fp32 on OpenVINO"
OURS_ASLEEP = "edgeclip fp32, threads that sleep"
DECODE, DECODE_REDUCED = "floor: full JPEG decode", "floor: reduced-scale JPEG decode"
TOWER_OURS, TOWER_THEIRS = "floor: fp32 tower, our file", "floor: fp32 tower, open_clip's file"
MAX_DIFFERENCE = 1e-4  # of cosines between float32 peers


@dataclass
class Run:
    """What all scenes share, and what they found."""

    work: Work
    places: Places
    quick: bool
    variants: tuple[str, ...]
    subjects: dict[str, Subject]
    scenes: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def n(self, wanted: int, quick: int = 2) -> int:
        """Return how many rounds."""
        return quick if self.quick else wanted

    def keep(self, scene: str, taken: dict[str, NDArray[np.float64]], **facts: Any) -> None:
        """Write the samples of a scene down."""
        self.samples[scene] = taken
        self.scenes[scene] = {**facts, "subjects": {name: summary(each) for name, each in taken.items()}}


# --- subjects -----------------------------------------------------------------------------------------------


def our_file(work: Work, variant: str, bundle: str = "bundle-s0") -> str:
    """Return the file of our image tower."""
    return str(Bundle.open(work.at(bundle)).variant(variant).tower("image").model)


def s0_subjects(work: Work, variants: Sequence[str]) -> dict[str, Subject]:
    """Return what goes from a picture to a label with the weights of MobileCLIP2-S0, and floors."""
    bank = work.at("s0-onnx", "bank.npy")
    plain = {
        "image": work.at("s0-onnx", "image.onnx"),
        "text": work.at("s0-onnx", "text.onnx"),
        "tokenizer": work.at("s0-onnx", "padded.json"),
        "bank": bank,
        "size_px": 256,
    }
    own = {**plain, "image": our_file(work, "onnx-fp32")}
    bundle = work.at("bundle-s0")
    theirs = {"model": "MobileCLIP2-S0", "weights": work.at("s0.safetensors"), "bank": bank}
    reduced, onnx, ov = "reduced scale", "ONNX Runtime", "OpenVINO"

    def loop(name: str, jpeg: str, shown: str, **options: Any) -> Subject:
        return Subject(name, "peer_plain", {**plain, **options}, "fp32", jpeg, shown)

    def ours(name: str, variant: str, jpeg: str, *, spinning: bool = True) -> Subject:
        engine = ov if variant.startswith("openvino") else onnx
        options = {"bundle": bundle, "variant": variant, "fast_decode": jpeg == reduced}
        options["spinning"] = spinning and engine == onnx
        precision = variant.partition("-")[2]
        return Subject(name, "peer_edgeclip", options, precision, jpeg, engine, ours=True)

    def floor(subject: Subject, do: str, given: str | None = None) -> Subject:
        return replace(subject, do=do, given=given)

    made = [
        Subject(OPEN_CLIP, "peer_open_clip", theirs, "fp32", "full", "PyTorch eager"),
        loop(PLAIN, "full", onnx),
        loop(PLAIN_REDUCED, reduced, onnx, reduced=True),
        loop(PLAIN_OPENVINO, "full", ov, engine="openvino"),
        ours(OURS_A, "onnx-fp32", "full"),
        ours(OURS_B, "onnx-fp32", reduced),
        ours(OURS_OV, "openvino-fp32", "full"),
        ours(OURS_ASLEEP, "onnx-fp32", "full", spinning=False),
        *(ours(best_name(each), each, reduced) for each in variants if "int8" in each),
        floor(loop(DECODE, "full", "Pillow", image=""), "decode"),
        floor(loop(DECODE_REDUCED, reduced, "Pillow", image="", reduced=True), "decode"),
        floor(Subject(TOWER_OURS, "peer_plain", own, "fp32", "", onnx), "tower", "uint8"),
        floor(loop(TOWER_THEIRS, "", onnx), "tower", "float"),
    ]
    return {subject.name: subject for subject in made}


def best_name(variant: str) -> str:
    """Return what a variant with fast decode is called in tables."""
    return f"edgeclip {variant}, fast decode"


def vit_subjects(work: Work, failed: dict[str, str]) -> dict[str, Subject]:
    """Return what goes from a picture to a label with the weights of ViT-B/32."""
    bank, labels = work.at("vit", "bank.npy"), work.labels
    plain = {
        "image": work.at("vit-onnx", "image.onnx"),
        "bank": bank,
        "size_px": 224,
        "bicubic": True,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
    }
    full, onnx = "full", "ONNX Runtime"
    hf = {"bank": bank, "labels": labels, "template": TEMPLATE}
    modern, lakera = work.at("site-modern"), work.at("site-onnx_clip")
    optimum = {**hf, "model": work.at("vit-optimum")}

    def ours(name: str, variant: str, jpeg: str) -> Subject:
        engine = "OpenVINO" if variant.startswith("openvino") else onnx
        options = {"bundle": work.at("bundle-vit"), "variant": variant, "fast_decode": jpeg != full}
        options["spinning"] = engine == onnx
        precision = variant.partition("-")[2]
        return Subject(name, "peer_edgeclip", options, precision, jpeg, engine, ours=True, same_weights=False)

    def peer(name: str, module: str, options: dict[str, Any], engine: str = onnx, **more: Any) -> Subject:
        return Subject(name, module, options, "fp32", full, engine, same_weights=False, **more)

    made = [
        peer(
            "transformers, cached texts",
            "peer_transformers",
            {**hf, "model": work.at("vit")},
            "PyTorch eager",
        ),
        peer("optimum, cached texts", "peer_optimum", optimum, path=(work.at("site-optimum"),)),
        peer("onnx_clip", "peer_onnx_clip", {"bank": bank}, path=(lakera,), all_cores=True),
        peer(
            "modern-onnx-clip",
            "peer_onnx_clip",
            {"bank": bank, "model": work.at("modern-model")},
            path=(modern,),
            all_cores=True,
        ),
        peer("plain ONNX Runtime loop, ViT-B/32", "peer_plain", plain),
        ours("edgeclip fp32, ViT-B/32", "onnx-fp32", full),
        ours("edgeclip onnx-int8, fast decode, ViT-B/32", "onnx-int8", "reduced scale"),
        ours("edgeclip openvino-int8, fast decode, ViT-B/32", "openvino-int8", "reduced scale"),
    ]
    needs = {"peer_onnx_clip": ("onnx_clip", "modern-onnx-clip"), "peer_optimum": ("optimum",)}
    return {
        subject.name: subject
        for subject in made
        if not any(name in failed and subject.name.startswith(name) for name in needs.get(subject.module, ()))
    }


# --- scenes -------------------------------------------------------------------------------------------------


def agreement(run: Run, subjects: Sequence[Subject], reference: str) -> dict[str, Any]:
    """Compare what float32 peers that decode at full scale make of every photograph."""
    pictures = [*run.work.large, *run.work.small]
    exact = [
        each
        for each in subjects
        if each.precision == "fp32" and each.jpeg == "full" and each.do == "classify"
    ]
    found: dict[str, NDArray[np.float64]] = {}
    for subject in exact:
        try:
            with workers([subject], 2, run.places) as started:
                worker = started[subject.name]
                rows = [worker.ask("similarities", str(path), tell=True)[1] for path in pictures]
        except RuntimeError as error:
            if subject.ours or subject.same_weights:
                raise
            run.failed[subject.name] = str(error)[-300:]
            run.subjects.pop(subject.name)
            say(f"{subject.name}: left out: {error}")
            continue
        found[subject.name] = np.array(rows)
    wanted = found.pop(reference)
    spread = float((wanted.max(axis=1) - np.sort(wanted, axis=1)[:, -2]).min())
    result: dict[str, Any] = {
        "reference": reference,
        "pictures": len(pictures),
        "smallest_lead_of_top1": spread,
    }
    for name, rows in found.items():
        difference = float(np.abs(rows - wanted).max())
        same = float((rows.argmax(axis=1) == wanted.argmax(axis=1)).mean())
        result[name] = {"max_cosine_difference": difference, "same_top1": same}
        say(
            f"agreement: {name} and {reference}: cosines differ by {difference:.1e} at most, top-1 {same:.2f}"
        )
    return result


def pictures_scene(
    run: Run, scene: str, names: Sequence[str], pictures: Sequence[Path], *, threads: int, n: int
) -> None:
    """Measure pictures to labels in turns."""
    subjects = [run.subjects[name] for name in names]
    with workers(subjects, threads, run.places) as started:
        calls = {name: _on(worker, pictures) for name, worker in started.items()}
        taken = rounds(calls, n)
    run.keep(scene, taken, threads=threads, pictures=[path.name for path in pictures], unit="ms")


def _on(worker: Worker, pictures: Sequence[Path]) -> Callable[[int], float]:
    return lambda number: worker.call(str(pictures[number % len(pictures)]))


def pipelines_scene(run: Run, n: int) -> None:
    """Measure pipelines that encode every label for every picture, as their documentation shows them."""
    chosen = {
        name.partition(",")[0] + " pipeline, texts encoded each time": replace(subject, do="pipeline")
        for name, subject in run.subjects.items()
        if subject.module in ("peer_transformers", "peer_optimum")
    }
    subjects = [replace(subject, name=name) for name, subject in chosen.items()]
    run.subjects.update({subject.name: subject for subject in subjects})
    names = [*chosen, "edgeclip fp32, ViT-B/32"]
    pictures_scene(run, "pipelines", names, run.work.large[:1], threads=2, n=n)


def start_scene(run: Run, names: Sequence[str], n: int, *, threads: int = 2) -> None:
    """Measure fresh processes: start to first label, peak memory after five pictures."""
    picture = run.work.large[0]
    for name in names:  # byte code, disk cache, stamps of our host cache
        first_label(run.subjects[name], threads, run.places, picture, more=0)
    order, shuffled = random.Random(0), list(names)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(n):
        order.shuffle(shuffled)
        for name in shuffled:
            taken[name].append(first_label(run.subjects[name], threads, run.places, picture, more=4))

    def of(key: str) -> dict[str, NDArray[np.float64]]:
        return {name: np.array([each[key] for each in told]) for name, told in taken.items()}

    run.keep("start", of("start_ms"), threads=threads, pictures=[picture.name], unit="ms")
    run.keep("peak memory", of("peak_rss_mb"), threads=threads, pictures=[picture.name] * 5, unit="MB")


def memory_scene(run: Run, n: int) -> None:
    """Measure the peak memory of the default bundle, and of little memory asked for."""
    default = {"bundle": "default", "variant": "auto"}
    small = {"bundle": run.work.at("bundle-s0"), "variant": "onnx-int8", "low_memory": True}
    asked = {
        "default bundle, 2 megapixels": (default, "full", run.work.middle),
        "low_memory, S0 int8, 12 megapixels": (small, "full", run.work.large[0]),
        "low_memory, S0 int8, 12 megapixels, fast decode": (
            {**small, "fast_decode": True},
            "reduced scale",
            run.work.large[0],
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for name, (options, jpeg, _) in asked.items():
        run.subjects[name] = Subject(name, "peer_edgeclip", options, "int8", jpeg, "ONNX Runtime", ours=True)
    for repeat in range(n + 1):
        for name, (_, _, picture) in asked.items():
            told = first_label(run.subjects[name], 2, run.places, picture, more=0)
            if repeat:  # the first one warms the host cache
                taken[name].append(told["peak_rss_mb"])
    run.keep("memory", {name: np.array(values) for name, values in taken.items()}, threads=2, unit="MB")


def texts_scene(run: Run, n: int) -> None:
    """Measure a hundred labels that nobody has seen, encoded by a text tower that is open."""
    bundle = run.work.at("bundle-s0")
    names = {}
    for variant in run.variants:
        engine = "OpenVINO" if variant.startswith("openvino") else "ONNX Runtime"
        options = {"bundle": bundle, "variant": variant, "keep_text_tower": True}
        options["spinning"] = engine == "ONNX Runtime"
        label = f"edgeclip {variant}"
        precision = variant.partition("-")[2]
        names[label] = Subject(label, "peer_edgeclip", options, precision, "", engine, do="texts", ours=True)
    for name in (OPEN_CLIP, PLAIN):
        names[name] = replace(run.subjects[name], do="texts")
    run.subjects.update({name: subject for name, subject in names.items() if subject.ours})
    stamp, counter = int(time.time()) % 1_000_000, iter(range(1 << 30))

    def asked(worker: Worker) -> tuple[float, Any]:
        number = f"{stamp} {next(counter)}"
        labels = [f"{label} {number}" for label in run.work.labels]
        given = labels if worker.subject.ours else [TEMPLATE.format(label) for label in labels]
        return worker.ask("texts", given, tell=True)

    with workers(list(names.values()), 2, run.places) as started:
        for worker in started.values():
            asked(worker)  # opens the tower
        taken = rounds({name: _texts_of(worker, asked) for name, worker in started.items()}, n)
        same = {name: np.array(_same(worker, run.work.labels)) for name, worker in started.items()}
    difference = {name: float(np.abs(row - same[OPEN_CLIP]).max()) for name, row in same.items()}
    run.keep("texts", taken, threads=2, unit="ms", texts=100, max_difference_to_open_clip=difference)


def _texts_of(worker: Worker, asked: Callable[[Worker], tuple[float, Any]]) -> Callable[[int], float]:
    return lambda number: asked(worker)[0]


def _same(worker: Worker, labels: Sequence[str]) -> list[float]:
    given = list(labels[:4]) if worker.subject.ours else [TEMPLATE.format(label) for label in labels[:4]]
    row: list[float] = worker.ask("texts", given, tell=True)[1]
    return row


def one_label_scene(run: Run, best: str, n: int) -> None:
    """Measure one more label with one template, the text tower held open, and closed."""
    asked: dict[str, dict[str, Any]] = {
        f"{what}, text tower {'open' if kept else 'closed'}": {
            "bundle": bundle,
            "variant": variant,
            "keep_text_tower": kept,
        }
        for what, bundle, variant in (
            ("S0 fp32", run.work.at("bundle-s0"), "onnx-fp32"),
            (f"S0 {best}", run.work.at("bundle-s0"), best),
            ("default", "default", "auto"),
        )
        for kept in (True, False)
    }
    made = [
        Subject(name, "peer_edgeclip", options, "", "", "", do="add_label", ours=True)
        for name, options in asked.items()
    ]
    stamp, counter = int(time.time()) % 1_000_000, iter(range(1 << 30))

    def add(worker: Worker) -> Callable[[int], float]:
        return lambda number: worker.ask("add_label", f"a red kite {stamp} {next(counter)}")[0]

    with workers(made, 2, run.places) as started:
        for worker in started.values():
            add(worker)(0)  # caches the other labels
        taken = rounds({name: add(worker) for name, worker in started.items()}, n)
    run.keep("one label", taken, threads=2, unit="ms")


def towers_scene(run: Run, n: int, seconds: float) -> None:
    """Measure bare towers in blocks: our sessions, hand-written loops over the same files, benchmark_app."""
    bundle = run.work.at("bundle-s0")
    plain = {"bank": run.work.at("s0-onnx", "bank.npy"), "size_px": 256}
    onnx, ov = our_file(run.work, "onnx-fp32"), _as_openvino_names(run.work)

    def ours(name: str, variant: str) -> Subject:
        engine = "OpenVINO" if variant.startswith("openvino") else "ONNX Runtime"
        options = {"bundle": bundle, "variant": variant, "spinning": engine == "ONNX Runtime"}
        return Subject(
            name, "peer_edgeclip", options, "fp32", "", engine, do="tower", given="uint8", ours=True
        )

    def loop(name: str, file: str, engine: str, **options: Any) -> Subject:
        known = {**plain, "image": file, "engine": engine, **options}
        return Subject(name, "peer_plain", known, "fp32", "", engine, do="tower", given="uint8")

    subjects = [
        ours("edgeclip on ONNX Runtime", "onnx-fp32"),
        loop("hand-written ONNX Runtime loop", onnx, "onnxruntime"),
        ours("edgeclip on OpenVINO", "openvino-fp32"),
        loop("hand-written OpenVINO loop", ov, "openvino"),
    ]

    def block(worker: Worker) -> Callable[[int], float]:
        return lambda number: worker.ask("tower", "uint8", untimed=2, for_s=seconds)[0]

    with workers(subjects, 2, run.places) as started:
        calls = {name: block(worker) for name, worker in started.items()}
        calls["benchmark_app"] = lambda number: benchmark_app(ov, 2, seconds)
        calls["benchmark_app, model reshaped to one picture"] = lambda number: benchmark_app(
            ov, 2, seconds, static=True
        )
        taken = rounds(calls, n)
    run.keep("towers", taken, threads=2, unit="ms", block_s=seconds)


def _as_openvino_names(work: Work) -> str:
    """Return our OpenVINO tower under one stem for both files, as other tools look for them."""
    tower = Bundle.open(work.at("bundle-s0")).variant("openvino-fp32").tower("image")
    if tower.model.with_suffix(".bin") in tower.files:
        return str(tower.model)
    folder = work.folder / "tower-openvino"  # a bundle that was made when each file had its own hash alone
    folder.mkdir(exist_ok=True)
    for path in tower.files:
        link = folder / f"image{path.suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    return str(folder / "image.xml")


def benchmark_app(model: str, threads: int, seconds: float, *, static: bool = False) -> float:
    """Return the median latency that OpenVINO's own tool tells, in milliseconds."""
    shape = "[1,256,256,3]"
    asked = ["-m", model, "-d", "CPU", "-api", "sync", "-nireq", "1"]
    # One stream is what its hint "latency" means on a CPU; with a hint it takes no number of threads.
    asked += ["-hint", "none", "-nstreams", "1", "-nthreads", str(threads)]
    asked += ["-t", f"{max(1, round(seconds))}", "-infer_precision", "f32"]
    asked += ["-shape", shape] if static else ["-data_shape", shape, "-inference_only"]
    program = "import sys; from openvino.tools.benchmark.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *asked], capture_output=True, text=True, check=False
    )
    found = re.search(r"Median:\s+([0-9.]+) ms", done.stdout)
    if found is None:
        raise RuntimeError(f"benchmark_app told no median: {(done.stderr or done.stdout)[-500:]}")
    return float(found[1])


# --- bars ---------------------------------------------------------------------------------------------------


def bars(run: Run, best: str | None) -> dict[str, Any]:
    """Hold everything that was measured against the bars."""
    found: dict[str, Any] = {}

    def compare(bar: Bar, scene: str, over: str, under: str) -> None:
        taken = run.samples.get(scene, {})
        absent = [name for name in (over, under) if name not in taken]
        if absent:
            found[bar.name] = missing(bar, f"{scene}: {absent[0]} was not measured")
        else:
            found[bar.name] = {"of": f"{over} / {under}", **evaluate(bar, ratio(taken[over], taken[under]))}

    def value(bar: Bar, scene: str, name: str) -> None:
        taken = run.samples.get(scene, {})
        if name not in taken:
            found[bar.name] = missing(bar, f"{scene}: {name} was not measured")
            return
        told = summary(taken[name])
        numbers = {"ratio": told["p50"], "low": told["p50_low"], "high": told["p50_high"]}
        found[bar.name] = {"of": name, **evaluate(bar, numbers)}

    ours_c = best_name(best) if best else "edgeclip, best variant"
    more, less = "at least", "at most"
    compare(Bar("12 MP (a): open_clip / fp32", 1.2, more), "large", OPEN_CLIP, OURS_A)
    compare(Bar("12 MP (a): plain loop / fp32", 1.0, more, "low"), "large", PLAIN, OURS_A)
    compare(Bar("12 MP (b): open_clip / fp32, fast decode", 2.8, more), "large", OPEN_CLIP, OURS_B)
    large = run.samples.get("large", {})
    bar = Bar("12 MP (b): fp32, fast decode / decode floor + tower floor", 1.05, less)
    if {OURS_B, DECODE_REDUCED, TOWER_OURS, TOWER_THEIRS} <= large.keys():
        tower = min((TOWER_OURS, TOWER_THEIRS), key=lambda name: float(np.median(large[name])))
        floors = large[DECODE_REDUCED] + large[tower]
        named = f"{OURS_B} / ({DECODE_REDUCED} + {tower})"
        found[bar.name] = {"of": named, **evaluate(bar, ratio(large[OURS_B], floors))}
    else:
        found[bar.name] = missing(bar, "large: floors were not measured")
    compare(Bar("12 MP (c): open_clip / best variant", 3.0, more), "large", OPEN_CLIP, ours_c)
    compare(Bar("12 MP (c): plain loop / best variant", 2.0, more), "large", PLAIN, ours_c)
    compare(Bar("12 MP (c): plain OpenVINO loop / best variant", 2.0, more), "large", PLAIN_OPENVINO, ours_c)
    compare(Bar("0.3 MP (a): open_clip / fp32", 1.5, more), "small", OPEN_CLIP, OURS_A)
    compare(Bar("0.3 MP (a): plain loop / fp32", 1.0, more), "small", PLAIN, OURS_A)
    compare(Bar("0.3 MP (c): plain loop / best variant", 1.15, more), "small", PLAIN, ours_c)
    for what, name in (("fp32", OURS_A), ("best variant", ours_c)):
        compare(Bar(f"start to first label: open_clip / {what}", 8.0, more), "start", OPEN_CLIP, name)
        compare(Bar(f"start to first label: {what} / plain loop", 1.0, less), "start", name, PLAIN)
    compare(Bar("100 new labels: fp32 / plain loop", 1.03, less), "texts", "edgeclip onnx-fp32", PLAIN)
    compare(Bar("100 new labels: best variant / plain loop", 0.8, less), "texts", f"edgeclip {best}", PLAIN)
    value(
        Bar("one new label, text tower open, S0", 80, less, unit="ms"),
        "one label",
        f"S0 {best}, text tower open",
    )
    value(
        Bar("one new label, text tower open, default", 5, less, unit="ms"),
        "one label",
        "default, text tower open",
    )
    compare(Bar("peak memory: fp32 / plain loop", 1.15, less), "peak memory", OURS_A, PLAIN)
    compare(Bar("peak memory: best variant / plain loop", 1.15, less), "peak memory", ours_c, PLAIN)
    value(
        Bar("peak memory, default bundle, 2 MP", 110, less, unit="MB"),
        "memory",
        "default bundle, 2 megapixels",
    )
    low = "low_memory, S0 int8, 12 megapixels"
    value(Bar("peak memory, low_memory, S0 int8", 256, less, unit="MB"), "memory", low)
    compare(
        Bar("tower: edgeclip / benchmark_app", 1.02, less), "towers", "edgeclip on OpenVINO", "benchmark_app"
    )
    app = "benchmark_app, model reshaped to one picture"
    compare(
        Bar("tower: edgeclip / benchmark_app, reshaped", 1.02, less), "towers", "edgeclip on OpenVINO", app
    )
    for what in ("ONNX Runtime", "OpenVINO"):
        bar = Bar(f"tower: edgeclip / hand-written loop, {what}", 1.02, less)
        compare(bar, "towers", f"edgeclip on {what}", f"hand-written {what} loop")
    sizes = run.scenes.get("install", {})
    bar = Bar("install: edgeclip / open_clip", 0.25, less)
    if sizes.get("edgeclip") and sizes.get("open_clip"):
        exact = sizes["edgeclip"]["mb"] / sizes["open_clip"]["mb"]
        numbers = dict.fromkeys(("ratio", "low", "high"), round(exact, 4))
        found[bar.name] = {"of": "MB of all files, embedded bundle counted", **evaluate(bar, numbers)}
    else:
        found[bar.name] = missing(bar, "no figures of an installation")
    return found


def best_variant(run: Run) -> str | None:
    """Return the int8 variant that is fastest on 12 megapixels, of those whose settings keep the accuracy."""
    floor = json.loads(Path(run.work.at("floor.json")).read_text(encoding="utf-8"))
    taken = run.samples.get("large") or run.samples.get("small") or {}
    there = [each for each in run.variants if best_name(each) in taken and floor.get(each, {}).get("passed")]
    return min(there, key=lambda each: float(np.median(taken[best_name(each)]))) if there else None


# --- the run ------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Tell what goes on."""
    print(f"{time.strftime('%H:%M:%S', time.gmtime())} {text}", file=sys.stderr, flush=True)


def default_variants() -> list[str]:
    """Return the variants that are exported: those for every host, and VNNI's where this one has it."""
    common = ["onnx-fp32", "openvino-fp32", "onnx-int8", "openvino-int8"]
    vnni = {"avx_vnni", "avx512_vnni"} & set(Host.here().isa or ())
    return [*common, *(["onnx-int8@x86-vnni", "openvino-int8@x86-vnni"] if vnni else [])]


def measure(run: Run, scenes: Sequence[str]) -> str | None:
    """Run the scenes in their order; return the best variant."""
    s0 = [name for name, subject in run.subjects.items() if subject.same_weights]
    vit = [name for name, subject in run.subjects.items() if not subject.same_weights]
    label_makers = [name for name in s0 if run.subjects[name].do == "classify"]
    work = run.work
    if "large" in scenes:
        say("12 megapixels, 2 threads")
        pictures_scene(run, "large", s0, work.large, threads=2, n=run.n(30))
    if "large-1" in scenes:
        say("12 megapixels, 1 thread")
        pictures_scene(run, "large, 1 thread", s0, work.large, threads=1, n=run.n(12))
    if "small" in scenes:
        say("0.3 megapixels, 2 threads")
        pictures_scene(run, "small", label_makers, work.small, threads=2, n=run.n(60))
    if "vit" in scenes and vit:
        say("ViT-B/32, 12 and 0.3 megapixels, 2 threads")
        pictures_scene(run, "ViT-B/32", vit, work.large, threads=2, n=run.n(20))
        pictures_scene(run, "ViT-B/32, small", vit, work.small, threads=2, n=run.n(30))
    if "pipelines" in scenes and vit:
        say("pipelines that encode the labels each time")
        try:
            pipelines_scene(run, run.n(6))
        except RuntimeError as error:
            run.failed["pipelines"] = str(error)[-300:]
            say(f"pipelines: left out: {error}")
    best = best_variant(run)
    if "start" in scenes:
        say("fresh processes")
        names = [OPEN_CLIP, PLAIN, OURS_A, *([best_name(best)] if best else []), *_starters(run)]
        start_scene(run, names, run.n(20))
    if "memory" in scenes:
        say("memory of the default bundle, and low_memory")
        memory_scene(run, run.n(7))
    if "texts" in scenes:
        say("100 new labels")
        texts_scene(run, run.n(8))
    if "one-label" in scenes:
        say("one new label")
        one_label_scene(run, best or "onnx-int8", run.n(30))
    if "towers" in scenes:
        say("bare towers")
        towers_scene(run, run.n(8), 3.0 if not run.quick else 1.0)
    return best


def _starters(run: Run) -> list[str]:
    """Return the peers of ViT-B/32 that are started fresh as well, and ours beside them."""
    wanted = ("peer_transformers", "peer_optimum")
    there = [
        name
        for name, subject in run.subjects.items()
        if subject.module in wanted and subject.do == "classify"
    ]
    return [*there, "edgeclip fp32, ViT-B/32"] if there else []


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "peers.json")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made once")
    parser.add_argument("--quick", action="store_true", help="two rounds of everything")
    parser.add_argument("--scenes", default=",".join(SCENES), help="some of them")
    parser.add_argument("--variants", default=",".join(default_variants()), help="of our bundle")
    parser.add_argument("--no-vit", action="store_true", help="leave ViT-B/32 and its peers out")
    options = parser.parse_args()
    work = Work(options.work.resolve())
    variants = tuple(options.variants.split(","))
    began = time.monotonic()
    failed = prepare(work, variants, vit=not options.no_vit, say=say)
    prepared = time.monotonic()
    subjects = s0_subjects(work, variants)
    with_vit = not options.no_vit and not any("ViT-B/32" in what for what in failed)
    if with_vit:
        subjects |= vit_subjects(work, failed)
    places = Places(work.folder, torchvision_environment(), work.at("site-edgeclip"))
    run = Run(work, places, options.quick, variants, subjects, failed=failed)
    say("agreement of float32 peers")
    agreed = {
        "MobileCLIP2-S0": agreement(run, [each for each in subjects.values() if each.same_weights], OPEN_CLIP)
    }
    if with_vit:
        vit = [each for each in subjects.values() if not each.same_weights]
        agreed["ViT-B/32"] = agreement(run, vit, "transformers, cached texts")
    for name, told in agreed["MobileCLIP2-S0"].items():
        if isinstance(told, dict) and not told["max_cosine_difference"] <= MAX_DIFFERENCE:
            raise SystemExit(
                f"{name}: cosines differ by {told['max_cosine_difference']:.1e} from open_clip's"
            )
    best = measure(run, options.scenes.split(","))
    run.scenes["install"] = install_sizes(work)
    judged = bars(run, best)
    for name, told in judged.items():
        mark = {True: "met", False: "MISSED", None: "not measured"}[told["met"]]
        say(f"{mark:12} {name}: {told['ratio']} ({told['low']} to {told['high']}), bar {told['bar']}")
    write(
        options.output,
        {
            "measures": "milliseconds from a JPEG file to its label, and what else users of such tools wait "
            "and pay for; text embeddings cached for all; interleaved rounds, medians with 95 % intervals",
            "quick": options.quick,
            "prepared_s": round(prepared - began, 1),
            "measured_s": round(time.monotonic() - prepared, 1),
            "labels": len(work.labels),
            "best_variant": best,
            "accuracy_floor": json.loads(Path(work.at("floor.json")).read_text(encoding="utf-8")),
            "agreement": agreed,
            "cells": {name: subject.to_dict() for name, subject in run.subjects.items()},
            "bars": judged,
            "not_run": {**LEFT_OUT, **run.failed},
            "scenes": run.scenes,
        },
        show=False,
    )


if __name__ == "__main__":
    main()
