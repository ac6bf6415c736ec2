"""Finishing in an export: what int8 rounds is found in the module, and the finished file is closer."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from command import Command  # noqa: E402
from PIL import Image  # noqa: E402

from edgeclip.bundle import Bundle  # noqa: E402
from edgeclip.calibration.ranges import MinMax, means, observe  # noqa: E402
from edgeclip.distill.finish_int8 import FinishSettings, RoundedProducts  # noqa: E402
from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.export.build import Int8Settings  # noqa: E402
from edgeclip.export.finish import finish_image_tower, rounded_products  # noqa: E402
from edgeclip.export.int8 import policy_of, quantize  # noqa: E402
from edgeclip.export.options import ExportSettings, GraphOptions  # noqa: E402
from edgeclip.export.passes import apply  # noqa: E402
from edgeclip.export.passes.bias import CorrectBiases, corrected  # noqa: E402
from edgeclip.export.passes.qdq import InsertQdq, observed, place  # noqa: E402
from edgeclip.export.passes.sequences import shared  # noqa: E402
from edgeclip.export.passes.split_grouped import SplitGrouped  # noqa: E402
from edgeclip.export.ranges import GraphWatch  # noqa: E402
from edgeclip.export.trace import image_graph, trace_image_graph  # noqa: E402
from edgeclip.export.variants import parse_variants  # noqa: E402
from edgeclip.models.checkpoints import load_model  # noqa: E402
from edgeclip.quantization import CPU, Int8Policy, Scheme  # noqa: E402
from edgeclip.runtime import open_session  # noqa: E402
from edgeclip.shapes import ordered_combinations, render  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def shapes(count: int, size_px: int, *, seed: int = 0) -> NDArray[np.uint8]:
    seen = islice(ordered_combinations(held_out=False, seed=seed), count)
    return np.stack([render(each, seed=row, size_px=size_px) for row, each in enumerate(seen)])


@pytest.mark.parametrize("scheme", [CPU, Scheme(fit_pairs=True)])
@pytest.mark.parametrize("probe", ["mobileclip", "vit"])
def test_training_rounds_what_the_file_rounds(repo: Path, tmp_path: Path, probe: str, scheme: Scheme) -> None:
    loaded = load_model(repo / "tests/data/probes" / probe)
    config, options = loaded.config, GraphOptions()
    module = image_graph(loaded.model.image_tower, config, options).eval()
    rows = shapes(16, config.image_size_px[0])
    whole = [each for each in shared() if not isinstance(each, SplitGrouped)]
    graph = apply(trace_image_graph(module, config, options), whole, what="image tower")
    shaped = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    model = ir.from_proto(shaped)
    nodes = place(model, policy_of(graph))
    watch = GraphWatch(graph, what="tower")
    ranges = observe(watch, rows, observed(model, nodes, scheme), scheme=scheme, what="tower")
    sources = corrected(model, nodes)
    seen = means(watch, rows, tuple(dict.fromkeys(sources.values())))
    average = {name: seen[source] for name, source in sources.items()}
    products = rounded_products(model, module, nodes, ranges, scheme, average)
    assert len(products) == len(nodes) > 8
    path = tmp_path / "int8.onnx"
    passes = [CorrectBiases(nodes, seen, scheme), InsertQdq(nodes, ranges, scheme)]
    onnx.save(apply(shaped, passes, what="int8"), path)
    with open_session(path) as session:
        engine = session.run({"image": rows})["image_embedding"]
    with torch.no_grad():
        exact = module(torch.from_numpy(rows)).numpy()
        with RoundedProducts(module, products, scheme) as mode:
            simulated = module(torch.from_numpy(rows)).numpy()
    assert mode.seen == set(products)
    # Values on the edge of two levels fall to either side; what is common is most of the error.
    error, apart = np.abs(engine - exact).mean(), np.abs(engine - simulated).mean()
    assert 0 < apart < 0.75 * error


@pytest.mark.slow
def test_the_command_finishes_int8_and_leaves_float_alone(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "shapes"
    pictures.mkdir()
    for row, pixels in enumerate(shapes(64, 64)):
        Image.fromarray(pixels).save(pictures / f"{row:03d}.png")
    run = Command(capsys)
    done: dict[str, Any] = {}
    for name, extra in (("plain", ()), ("finished", ("--finish-int8", 20))):
        result = run(
            "export", repo / "tests/data/probes/mobileclip", "--variant", "onnx-fp32,onnx-int8@x86-avx2",
            "--no-text", "--reference", pictures, "--calibration-data", pictures, "-o", tmp_path / name,
            "--limit", "int8:top1_agreement=0.5", *extra, "--json",
        )  # fmt: skip
        assert result.code == 0, result.err
        done[name] = json.loads(result.out)["variants"]
    numbers = {
        name: {form: said["towers"]["image"]["numbers"] for form, said in variants.items()}
        for name, variants in done.items()
    }
    assert numbers["plain"]["onnx-fp32"] == numbers["finished"]["onnx-fp32"]
    before, after = (numbers[name]["onnx-int8@x86-avx2"]["cosine_mean"] for name in ("plain", "finished"))
    assert before != after > 0.998
    bundles = {name: Bundle.open(tmp_path / name).manifest.variants for name in done}
    said = bundles["finished"]["onnx-int8@x86-avx2"].calibration
    assert said is not None
    assert said["finishing"]["steps"] == 20
    assert 0 < said["finishing"]["after"] < said["finishing"]["before"]
    assert "finishing" not in (bundles["plain"]["onnx-int8@x86-avx2"].calibration or {})


@pytest.mark.slow
def test_finishing_heals_coarse_int8(repo: Path, tmp_path: Path) -> None:
    """Every product in int8, weights in 7 bits and ranges as wide as they get: judged on other pictures."""
    loaded = load_model(repo / "tests/data/probes/mobileclip")
    config, options = loaded.config, GraphOptions()
    module = image_graph(loaded.model.image_tower, config, options).eval()
    size = config.image_size_px[0]
    rows, others = shapes(96, size), shapes(64, size, seed=1)
    policy, scheme = Int8Policy("all", stem=True, pooled=True), Scheme(weight_bits=7)
    coarse = Int8Settings(method=MinMax(), correct_biases=False, rounding="nearest")

    def lost(graph: onnx.ModelProto) -> float:
        path = tmp_path / "int8.onnx"
        onnx.save(quantize(graph, rows, policy, scheme, coarse, what="image tower"), path)
        with open_session(path) as session:
            got = session.run({"image": others})["image_embedding"]
        return float(1 - (got * exact).sum(axis=1).mean())

    with torch.no_grad():
        exact = module(torch.from_numpy(others)).numpy()
    done = finish_image_tower(
        module, config, options, rows, policy=policy, scheme=scheme, quantization=coarse,
        settings=FinishSettings(steps=20, every=10),
    )  # fmt: skip
    assert done.simulated == done.products
    assert done.finished.after < 0.95 * done.finished.before
    plain = apply(trace_image_graph(module, config, options), shared(), what="image tower")
    assert lost(done.graph) < 0.95 * lost(plain)


def test_finishing_without_int8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"finishing for int8: no int8 variant .* among onnx-fp32"):
        ExportSettings(finish_int8=10).check(parse_variants(["onnx-fp32"]))
