"""How much faster int8 image towers are: each against float32 on its own engine, and on the faster one.

Subjects are the default model (trained), and ViT-B/32 and MobileCLIP2-S0 with random weights, whose answers
mean nothing and whose times are those of any weights. Files are as `edgeclip export` makes them, for no
target and for x86-vnni where this host has it; pictures are uint8 and the preprocessing is inside.
MobileCLIP2-S0 is also held against what a careful user runs today: open_clip's export, folded by timm, on
its faster engine, with float pictures. Two forms at a time run in turns. The peaks of plain matrix products
on this host say what is to be gained.

    python benchmarks/peers/int8_speed.py        # about ten minutes; on an idle machine
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests" / "tools")]

import numpy as np
from default_graphs import build_variant, float_graphs
from numpy.typing import NDArray
from written import arguments, ratio, write

from edgeclip.runtime.host import Host
from edgeclip.runtime.latency import compare_interleaved, measure
from edgeclip.runtime.session import RuntimeOptions, open_session

SUBJECTS = ("default", "ViT-B-32.openai", "MobileCLIP2-S0")
ROWS = 32
N = 1024

Runner = Callable[[], object]


def graph_of(name: str) -> Any:
    """Return the float32 image graph of a subject, as an export makes it, and open_clip's file or nothing."""
    if name == "default":
        return float_graphs()["image"], None
    from edgeclip.export.passes import apply
    from edgeclip.export.passes.sequences import shared
    from edgeclip.export.trace import trace_image_tower
    from edgeclip.models.clip import build_clip
    from edgeclip.models.zoo import clip_config

    if name == "MobileCLIP2-S0":
        import exported_towers as peers

        from edgeclip.models.naming import key_map

        config, model = clip_config(name), peers.fresh(name)
        own = build_clip(config).eval()
        shapes = {key: value.shape for key, value in own.state_dict().items()}
        own.load_state_dict(key_map(config, "open_clip").to_ours(model.state_dict(), shapes, where=name))
        rival = peers.theirs(model, config.image_size_px)
    else:
        import torch
        from towers import random_weights

        config, rival = clip_config(name), None
        own = random_weights(build_clip(config), dtype=torch.float32)
    return apply(trace_image_tower(own.image_tower, config), shared(), what="image tower"), rival


def photographs(height: int, width: int) -> NDArray[np.uint8]:
    """Return crops of the photographs that come with edgeclip."""
    from PIL import Image

    import edgeclip

    folder = Path(edgeclip.__file__).parent / "assets" / "photos"
    found = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as picture:
            image = picture.convert("RGB")
        for box in ((0, 0, 0.7, 0.7), (0.3, 0.3, 1, 1)):
            sides = tuple(round(at * size) for at, size in zip(box, image.size * 2, strict=True))
            found.append(np.asarray(image.crop(sides).resize((width, height))))
    return np.stack(found)[:ROWS]


def forms_of(graph: Any, work: Path, threads: int) -> dict[str, Runner]:
    """Return what runs one picture, by form."""
    height, width = (dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim[1:3])
    pixels = photographs(height, width)
    wanted = ["onnx-fp32", "openvino-fp32", "onnx-int8", "openvino-int8"]
    if {"avx_vnni", "avx512_vnni"} & set(Host.here().isa or ()):
        wanted += ["onnx-int8@x86-vnni", "openvino-int8@x86-vnni"]
    runners: dict[str, Runner] = {}
    for form in wanted:
        folder = work / form
        if not folder.exists():
            built = build_variant(form, {"image": pixels}, folder, {"image": graph})["image"].files
            _built[form] = built
        session = open_session(_built[form], options=RuntimeOptions(threads=threads))
        feeds = {"image": pixels[:1]}
        runners[form] = lambda session=session, feeds=feeds: session.run(feeds)  # type: ignore[misc]
    return runners


_built: dict[str, Any] = {}


def rivals_of(rival: bytes | None, threads: int) -> dict[str, Runner]:
    """Return what runs open_clip's file, by engine."""
    if rival is None:
        return {}
    import exported_towers as peers

    given = np.random.default_rng(0).random((1, 3, 256, 256), np.float32)
    engines = {"onnxruntime": peers.on_onnxruntime, "openvino": peers.on_openvino}
    started = {name: start(rival, threads) for name, start in engines.items()}
    return {f"open_clip on {name}": lambda run=run: run(given) for name, run in started.items()}


def fastest(runners: Mapping[str, Runner], seconds: float) -> tuple[str, dict[str, float]]:
    """Return the fastest by median, and all medians."""
    medians = {
        name: measure(run, min_samples=20, min_duration_s=seconds / 4, max_duration_s=seconds).median_ms
        for name, run in runners.items()
    }
    return min(medians, key=medians.__getitem__), medians


def compare(name: str, seconds: float) -> dict[str, Any]:
    """Compare all forms of a subject."""
    graph, rival = graph_of(name)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 2):
            runners = forms_of(graph, Path(folder), threads)
            floats = {form: run for form, run in runners.items() if form.endswith("fp32")}
            best_float, medians = fastest(floats, seconds)
            others = rivals_of(rival, threads)
            best_rival, theirs = fastest(others, seconds) if others else ("", {})
            pairs: dict[str, Any] = {}
            for form, run in runners.items():
                if form in floats:
                    continue
                against = {f"{form.split('-')[0]}-fp32": floats[f"{form.split('-')[0]}-fp32"]}
                against[best_float] = floats[best_float]
                against |= {best_rival: others[best_rival]} if others else {}
                for other, slower in against.items():
                    interval = compare_interleaved(
                        slower, run, min_blocks=20, min_duration_s=seconds, max_duration_s=3 * seconds
                    )
                    pairs[f"{other} over {form}"] = ratio(interval)
            found[f"threads {threads}"] = {
                "fastest_fp32": best_float,
                "fp32_median_ms": medians,
                "open_clip_median_ms": theirs,
                "speed": pairs,
            }
            print(name, threads, {key: value["ratio"] for key, value in pairs.items()}, file=sys.stderr)
    _built.clear()
    return found


def peaks(seconds: float) -> dict[str, float]:
    """Return the speed of square matrix products on one thread, in GFLOP/s and GOP/s."""
    from onnx import TensorProto, helper, numpy_helper

    from edgeclip.runtime.ort import import_onnxruntime

    ort, draw = import_onnxruntime(), np.random.default_rng(0)
    found = {}
    for kind, op, given, weight in (
        ("float32", "MatMul", draw.random((N, N), np.float32), draw.random((N, N), np.float32)),
        (
            "uint8 x int8",
            "MatMulInteger",
            draw.integers(0, 256, (N, N), np.uint8),
            draw.integers(-64, 65, (N, N)).astype(np.int8),
        ),
    ):
        kinds = (TensorProto.FLOAT,) * 2 if op == "MatMul" else (TensorProto.UINT8, TensorProto.INT32)
        graph = helper.make_graph(
            [helper.make_node(op, ["a", "b"], ["y"])],
            "product",
            [helper.make_tensor_value_info("a", kinds[0], [N, N])],
            [helper.make_tensor_value_info("y", kinds[1], [N, N])],
            [numpy_helper.from_array(weight, "b")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        taken = measure(
            lambda session=session, given=given: session.run(None, {"a": given}),
            min_samples=20,
            min_duration_s=seconds / 2,
            max_duration_s=seconds,
        )
        found[kind] = round(2 * N**3 / taken.median_ms / 1e6, 1)
    return found


def main() -> None:
    """Compare every subject, and write it down."""
    parser = arguments(__doc__.splitlines()[0], "int8_speed.json")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    options = parser.parse_args()
    results = {name: compare(name, options.seconds) for name in options.subjects}
    write(
        options.output,
        {
            "measures": "time of float32 over time of int8, image towers, batch 1, uint8 pictures",
            "peak_gops_one_thread": peaks(options.seconds),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
