"""Float variants of trained models on ONNX Runtime against eager float32, and of full-size ones."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import exported_parity  # noqa: E402
import train_probes as probes  # noqa: E402

from edgeclip.bundle import BundleWriter  # noqa: E402
from edgeclip.errors import BundleError  # noqa: E402
from edgeclip.export.build import BuildOptions, BuildRequest, BuiltTower, builder_of  # noqa: E402
from edgeclip.export.options import GraphOptions  # noqa: E402
from edgeclip.export.passes import apply  # noqa: E402
from edgeclip.export.passes.sequences import shared  # noqa: E402
from edgeclip.export.trace import trace_image_tower, trace_text_tower  # noqa: E402
from edgeclip.export.variants import VariantSpec  # noqa: E402
from edgeclip.models.checkpoints import load_checkpoint, read_checkpoint_info  # noqa: E402
from edgeclip.runtime.parity import ParityLimits, check_parity, compare_embeddings  # noqa: E402
from edgeclip.runtime.session import open_session  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

PROBES = Path(__file__).parent.parent / "data" / "probes"
NAMES = ("mobileclip", "tinyclip", "vit")
PICTURES = 36
TEXTS = [
    f"a {size} {colour} {shape}"
    for size in ("small", "big")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square", "star")
]


@lru_cache
def _inputs(name: str) -> dict[str, tuple[NDArray[np.generic], NDArray[np.float32]]]:
    """Return rows of each tower of a probe, and what eager float32 makes of them."""
    model, config = load_checkpoint(PROBES / name).eval(), read_checkpoint_info(PROBES / name).config
    pictures, _ = probes.held_out_pictures(PICTURES, config.image_size_px[0], seed=5)
    tokens = np.asarray(Tokenizer.open(PROBES / name)(TEXTS), np.int32)
    with torch.no_grad():
        texts = model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    return {
        "image": (np.asarray(pictures), probes.embed_pictures(model, config, pictures)),
        "text": (tokens, texts),
    }


@lru_cache
def _graphs(name: str, opset: int = 20) -> dict[str, onnx.ModelProto]:
    model, config = load_checkpoint(PROBES / name).eval(), read_checkpoint_info(PROBES / name).config
    options = GraphOptions(opset=opset)
    traced = {
        "image": trace_image_tower(model.image_tower, config, options),
        "text": trace_text_tower(model.text_tower, config.text.context_length, options),
    }
    return {tower: apply(graph, shared(), what=tower) for tower, graph in traced.items()}


def build(
    name: str, graphs: dict[str, onnx.ModelProto], work: Path, **options: bool | None
) -> dict[str, BuiltTower]:
    request = BuildRequest(VariantSpec.parse(name), graphs, work, options=BuildOptions(**options))
    return dict(builder_of("onnx")(request).towers)


def embed(tower: BuiltTower, folder: Path, rows: NDArray[np.generic], batch: int) -> NDArray[np.float32]:
    """Store the files of a tower as they are, open them and run rows in batches."""
    for name, content in tower.files.items():
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
    with open_session(folder / tower.model) as session:
        (given,), (made,) = session.inputs, session.outputs
        parts = [session.run({given: rows[at : at + batch]})[made] for at in range(0, len(rows), batch)]
    return np.concatenate(parts)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["onnx-fp32", "onnx-fp16", "onnx-fp16@x86-avx2"])
@pytest.mark.parametrize("name", NAMES)
def test_float_variants_of_trained_probes_are_within_their_limits(
    name: str, variant: str, tmp_path: Path
) -> None:
    towers = build(variant, _graphs(name), tmp_path)
    limits = ParityLimits.of(variant[5:9])
    for tower, (rows, wanted) in _inputs(name).items():
        for batch in (1, 5):
            numbers = compare_embeddings(wanted, embed(towers[tower], tmp_path, rows, batch))
            assert not check_parity(numbers, limits), (tower, batch)
            assert numbers.reference_similarity is not None
            assert numbers.reference_similarity < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 24])
def test_the_passes_hold_in_the_first_and_last_opset(opset: int, tmp_path: Path) -> None:
    graphs = _graphs("mobileclip", opset)
    for variant in ("onnx-fp32", "onnx-fp16"):
        towers = build(variant, graphs, tmp_path)
        for tower, (rows, wanted) in _inputs("mobileclip").items():
            numbers = compare_embeddings(wanted, embed(towers[tower], tmp_path, rows, 5))
            assert not check_parity(numbers, ParityLimits.of(variant[5:])), (variant, tower)


@pytest.mark.slow
def test_float16_halves_the_files_and_keeps_the_interface(tmp_path: Path) -> None:
    single, half = (build(name, _graphs("vit"), tmp_path) for name in ("onnx-fp32", "onnx-fp16"))
    for tower in ("image", "text"):
        assert (half[tower].inputs, half[tower].outputs) == (single[tower].inputs, single[tower].outputs)
        sizes = [len(built[tower].files[f"{tower}.onnx"]) for built in (half, single)]
        assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.slow
def test_same_graphs_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build("onnx-fp16", _graphs("mobileclip"), tmp_path) for _ in range(2))
    assert {name: tower.files for name, tower in first.items()} == {
        name: tower.files for name, tower in second.items()
    }


@pytest.mark.slow
def test_weights_beside_the_graph_open_from_a_bundle_and_nothing_else_does(
    tmp_path: Path,
) -> None:
    from tiny_bundle import make_tiny_bundle

    rows, wanted = _inputs("vit")["image"]
    tower = build("onnx-fp32", {"image": _graphs("vit")["image"]}, tmp_path, external_data=True)["image"]
    assert list(tower.files) == ["image.onnx", "image.onnx.data"]
    path = make_tiny_bundle(tmp_path / "bundle").path
    with BundleWriter(path) as writer:
        stored = {name: writer.add(f"onnx-fp32/{name}", content) for name, content in tower.files.items()}
        entry = json.loads(json.dumps(writer.manifest["variants"]["onnx-fp32"]))
        entry["towers"] = {
            "image": {
                "model": stored["image.onnx"],
                "files": list(stored.values()),
                "inputs": [
                    {"name": each.name, "dtype": each.dtype, "shape": each.shape} for each in tower.inputs
                ],
                "outputs": [
                    {"name": each.name, "dtype": each.dtype, "shape": each.shape} for each in tower.outputs
                ],
            }
        }
        writer.manifest["variants"] = {"onnx-fp32": entry, "alone": json.loads(json.dumps(entry))}
        writer.manifest["variants"]["alone"]["towers"]["image"]["files"] = [stored["image.onnx"]]
        writer.manifest["default_variants"] = ["onnx-fp32"]
        bundle = writer.commit()
    with open_session(bundle.variant("onnx-fp32").tower("image")) as session:
        got = session.run({"image": rows[:5]})["image_embedding"]
    assert not check_parity(compare_embeddings(wanted[:5], got), ParityLimits.of("fp32"))
    with pytest.raises(BundleError, match=r"reads the file 'image\.onnx\.\w{8}\.data', which is not among"):
        bundle.variant("alone").tower("image")


# --- full size


@pytest.mark.full
@pytest.mark.parametrize("name", exported_parity.MODELS)
def test_full_size_towers_keep_their_numbers(name: str) -> None:
    assert exported_parity.failures(exported_parity.measured(name)) == []


def test_the_published_numbers_are_within_the_limits(repo: Path) -> None:
    said = json.loads((repo / "benchmarks/results/exported_parity.json").read_text("utf-8"))
    results = said["results"]
    assert {*results, *said["missing"]} == set(exported_parity.MODELS)
    for name, result in results.items():
        assert exported_parity.failures(result) == [], name
        for forms in result["towers"].values():
            assert set(exported_parity.FORMS) <= set(forms)


def test_full_size_towers_are_judged_by_what_rounding_costs_them() -> None:
    wanted = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    got = wanted.copy()
    got[3, 5] += 0.015 * float(np.abs(wanted - wanted.mean(axis=0)).max())
    judge = exported_parity.judged
    assert judge("onnx-fp16", wanted, got, rounding_alone=0.008)["failures"] == []
    assert judge("onnx-fp16", wanted, got, rounding_alone=0.007)["failures"] == [
        "0.015 of the spread, expected at most 0.014"
    ]
    (beyond, of_spread) = judge("openvino-fp32", wanted, got, rounding_alone=1.0)["failures"]
    assert beyond.startswith("max_abs is 0.00")
    assert of_spread == "0.015 of the spread, expected at most 0.001"
    got[0, 0] = np.nan
    assert judge("onnx-fp16", wanted, got, rounding_alone=1.0)["failures"][0].startswith(
        "1 embeddings are not"
    )
