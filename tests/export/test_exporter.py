"""From a checkpoint to a bundle whose numbers hold: what comes out, what is refused, what stays."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from exported import (  # noqa: E402
    NAMES,
    PROBES,
    export_probe,
    manifest_of,
    model_file,
    run_file,
    shape_pictures,
    write_pictures,
)

from edgeclip.bundle import Bundle, BundleWriter, Requires  # noqa: E402
from edgeclip.classify import ZeroShotClassifier  # noqa: E402
from edgeclip.errors import (  # noqa: E402
    BackendUnavailableError,
    BundleError,
    ConfigError,
    ExportError,
    InputError,
    MissingExtraError,
    ParityError,
)
from edgeclip.export import agreement, exporter, to_onnx  # noqa: E402
from edgeclip.export.build import BuildRequest, BuiltVariant  # noqa: E402
from edgeclip.export.exporter import default_order, export_bundle  # noqa: E402
from edgeclip.export.options import (  # noqa: E402
    Checkpoint,
    ExportSettings,
    Gates,
    GraphOptions,
    LimitChange,
    Offered,
    References,
    Step,
)
from edgeclip.export.source import Source, _locate, open_source  # noqa: E402
from edgeclip.export.variants import parse_variants  # noqa: E402
from edgeclip.export.verify import verify_bundle  # noqa: E402
from edgeclip.hub import weights_directory  # noqa: E402
from edgeclip.label_sets import LabelSet, Templates  # noqa: E402
from edgeclip.models.checkpoints import CheckpointInfo, read_checkpoint_info, save_checkpoint  # noqa: E402
from edgeclip.models.clip import build_clip  # noqa: E402
from edgeclip.models.zoo import MODELS, clip_config  # noqa: E402
from edgeclip.runtime import parity  # noqa: E402
from edgeclip.runtime.host import Host  # noqa: E402
from edgeclip.runtime.parity import ParityLimits, compare_embeddings  # noqa: E402
from edgeclip.runtime.session import RuntimeOptions, open_session  # noqa: E402
from edgeclip.tensors import map_tensors  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

# float32 sums in another order, folded norms: measured 4e-7 on unit embeddings.
FP32 = ParityLimits.of("fp32")
COLOURS = ("red circle", "blue square", "green star", "yellow heart", "black cross")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("shapes") / "shapes")


@pytest.fixture(scope="module")
def traced() -> Mapping[tuple[str, GraphOptions], Any]:
    """Graphs that were traced before: tracing is most of an export, and the same graph each time."""
    return {}


@pytest.fixture(autouse=True)
def _trace_once(traced: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Source.trace

    def remembered(self: Source, tower: str, options: GraphOptions) -> Any:
        key = (self.digest, tower, replace(options, text=True, bake_labels=False))
        if key not in traced:
            traced[key] = trace(self, tower, options)
        return traced[key]

    monkeypatch.setattr(Source, "trace", remembered)


@pytest.fixture
def bundle(pictures: Path, tmp_path: Path) -> Path:
    """The tinyclip probe as onnx-fp32."""
    export_probe("tinyclip", tmp_path / "bundle", pictures)
    return tmp_path / "bundle"


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def settings(pictures: Path | None, **graph: Any) -> ExportSettings:
    return ExportSettings(graph=GraphOptions(**graph), references=References(pictures=pictures), threads=1)


# --- what comes out ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_probe_keeps_its_numbers_at_batch_1_and_5(name: str, pictures: Path, tmp_path: Path) -> None:
    done = export_probe(name, tmp_path / "bundle", pictures)
    assert (done.report.basis, done.report.variants["onnx-fp32"].status) == ("trained", "passed")
    # Pictures and texts that the export has not seen, run by ONNX Runtime alone.
    fresh = shape_pictures(11, seed=500)
    source = open_source(Checkpoint(str(PROBES / name)))
    texts = [f"a picture of a {colour}" for colour in COLOURS] + ["一个红色的圆"]
    tokens = Tokenizer.open(PROBES / name)(texts, truncate=True)
    for tower, rows, expected in (
        ("image", fresh, source.images(fresh)),
        ("text", tokens, source.texts(texts)),
    ):
        for batch in (1, 5):
            got = run_file(model_file(tmp_path / "bundle", "onnx-fp32", tower), rows, batch=batch)
            numbers = compare_embeddings(expected, got)
            assert numbers.max_abs <= FP32.max_abs, (tower, batch)
            assert numbers.cosine_min >= FP32.cosine_min, (tower, batch)
            np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_a_bundle_says_what_it_is_and_checks_itself(bundle: Path) -> None:
    said = manifest_of(bundle)
    info = read_checkpoint_info(PROBES / "tinyclip")
    assert said["model"]["name"] == info.config.name
    assert said["model"]["scale"] == pytest.approx(info.scale, rel=1e-3)  # stored in float16
    assert (said["model"]["licence"], said["model"]["languages"]) == (info.licence, ["en", "zh"])
    assert said["preprocess"]["applied"] == "graph"
    assert said["tokenizer"]["digest"] == Tokenizer.open(PROBES / "tinyclip").digest
    assert said["default_variants"] == ["onnx-fp32"]
    assert (said["default_bank"], said["label_banks"]["everyday"]["labels"]) == ("everyday", 100)
    (head,) = said["heads"].values()
    assert (head["kind"], head["bank"]) == ("temperature", "everyday")
    entry = said["variants"]["onnx-fp32"]
    for tower, shape in (("image", ["batch", 64, 64, 3]), ("text", ["batch", "length"])):
        assert entry["towers"][tower]["inputs"][0]["shape"] == shape
        found = entry["parity"][tower]
        assert (found["status"], found["missed"], "basis" in found) == ("passed", {}, False)
        assert found["host"]["machine"]
    assert entry["parity"]["image"]["bank"] == "everyday"
    made = said["provenance"]["variants"]["onnx-fp32"]
    assert made["reference"]["pictures"] == 64
    assert made["reference"]["source"] == "shapes"
    weights = PROBES / "tinyclip" / "model.safetensors"
    assert made["source"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {"torch", "onnx", "onnxscript", "onnxruntime"} <= set(made["versions"])
    assert "/" not in json.dumps(said["provenance"])  # no path says where it was made
    report = verify_bundle(Bundle.open(bundle))
    assert [verdict.status for verdict in report.variants] == ["passed"]
    assert not report.damaged


def test_the_golden_file_holds_pictures_texts_and_what_eager_makes_of_them(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    golden, metadata = map_tensors(opened.file(opened.manifest.golden or ""))
    assert golden["images"].shape == (16, 64, 64, 3)
    assert golden["tokens"].shape[0] == 16
    source = open_source(Checkpoint(str(PROBES / "tinyclip")))
    np.testing.assert_allclose(golden["image_embedding"], source.images(golden["images"]), atol=1e-6)
    assert golden["bank_top5"].shape == (16, 5)
    assert metadata["bank"] == "everyday"


def test_the_new_bundle_classifies_without_labels(bundle: Path) -> None:
    with ZeroShotClassifier.open(bundle) as classifier:
        (best, *_) = classifier.classify(shape_pictures(1)[0])
        assert best.label in classifier.bank.names
        assert 0 < best.score <= 1
        classifier.set_labels(["red circle", "blue square"])
        assert len(classifier.classify(shape_pictures(1)[0])) == 2


@pytest.mark.slow
def test_two_exports_from_two_directories_have_the_same_bytes(
    pictures: Path, tmp_path: Path, traced: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    kept = dict(traced)
    for folder in ("one", "two/deeper"):
        here = tmp_path / folder
        here.mkdir(parents=True)
        shutil.copytree(PROBES / "vit", here / "model")
        monkeypatch.chdir(here)
        traced.clear()
        export_bundle(Checkpoint("model"), parse_variants(["onnx-fp32"]), Path("bundle"), settings(pictures))
    traced.update(kept)
    assert contents(tmp_path / "one/bundle") == contents(tmp_path / "two/deeper/bundle")


def test_preprocessing_in_the_graph_is_the_hosts(pictures: Path, tmp_path: Path, bundle: Path) -> None:
    host = tmp_path / "host"
    export_probe("tinyclip", host, None, settings=settings(pictures, float_input=True))
    said = manifest_of(host)
    assert said["preprocess"]["applied"] == "host"
    assert said["variants"]["onnx-fp32"]["towers"]["image"]["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": ["batch", 3, 64, 64]}
    ]
    assert said["model"]["embedding_space"] == manifest_of(bundle)["model"]["embedding_space"]
    fresh = shape_pictures(16, seed=900)
    with ZeroShotClassifier.open(bundle) as one, ZeroShotClassifier.open(host) as other:
        assert np.abs(one.embed_images(fresh) - other.embed_images(fresh)).max() <= 1e-4
    assert verify_bundle(Bundle.open(host)).variants[0].status == "passed"


def test_labels_inside_a_graph_give_scaled_cosines(pictures: Path, tmp_path: Path) -> None:
    labels = LabelSet.of(COLOURS)
    chosen = replace(
        settings(pictures, bake_labels=True),
        references=References(pictures=pictures, offered=Offered("colours", labels, Templates.of("one"))),
    )
    done = export_probe("tinyclip", tmp_path / "bundle", None, settings=chosen)
    assert done.report.variants["onnx-fp32"].towers["classifier"].numbers.top1_agreement == 1
    path = model_file(tmp_path / "bundle", "onnx-fp32", "classifier")
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["labels"]) == list(COLOURS)
    assert metadata["bank"] == "colours"
    fresh = shape_pictures(9, seed=77)
    logits = run_file(path, fresh, batch=4)
    source = open_source(Checkpoint(str(PROBES / "tinyclip")))
    cosines = source.images(fresh) @ source.texts([f"a photo of a {name}." for name in COLOURS]).T
    # The bank is stored in float16: half a unit of its last place, times the scale.
    np.testing.assert_allclose(logits, float(metadata["scale"]) * cosines, atol=source.scale * 1e-3)
    assert (logits.argmax(1) == cosines.argmax(1)).all()
    said = manifest_of(tmp_path / "bundle")
    assert said["variants"]["onnx-fp32"]["parity"]["classifier"]["bank"] == "colours"
    (verdict,) = verify_bundle(Bundle.open(tmp_path / "bundle")).variants
    assert verdict.status == "passed"
    assert verdict.golden is not None
    assert verdict.golden.towers["classifier"].numbers.top1_agreement == 1


def test_wrong_labels_inside_a_graph_are_found_on_the_device(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_probe("tinyclip", out, None, settings=settings(pictures, bake_labels=True))
    path = model_file(out, "onnx-fp32", "classifier")
    graph = onnx.load(path)
    (weights,) = [tensor for tensor in graph.graph.initializer if tensor.name == "label_weights"]
    turned = np.roll(onnx.numpy_helper.to_array(weights), 1, axis=1)
    weights.CopyFrom(onnx.numpy_helper.from_array(turned, "label_weights"))
    with BundleWriter(out) as writer:
        stored = writer.add("onnx-fp32/classifier.onnx", graph.SerializeToString())
        writer.manifest["variants"]["onnx-fp32"]["towers"]["classifier"].update(model=stored, files=[stored])
        writer.commit()
    (verdict,) = verify_bundle(Bundle.open(out)).variants
    assert verdict.status == "failed"
    assert "classifier" in verdict.reason
    assert "top1_agreement is " in verdict.reason


def test_without_text_tower_the_labels_of_the_bundle_remain(pictures: Path, tmp_path: Path) -> None:
    export_probe("tinyclip", tmp_path / "bundle", None, settings=settings(pictures, text=False))
    said = manifest_of(tmp_path / "bundle")
    assert said["tokenizer"] is None
    assert set(said["variants"]["onnx-fp32"]["towers"]) == {"image"}
    assert "text" not in said["model"]["parameters"]
    with ZeroShotClassifier.open(tmp_path / "bundle") as classifier:
        assert len(classifier.classify(shape_pictures(1)[0], top_k=200)) == 100
    assert verify_bundle(Bundle.open(tmp_path / "bundle")).variants[0].status == "passed"


def test_a_fixed_batch_is_filled_up(pictures: Path, tmp_path: Path, bundle: Path) -> None:
    fixed = tmp_path / "fixed"
    export_probe("tinyclip", fixed, None, settings=settings(pictures, static_batch=3))
    towers = manifest_of(fixed)["variants"]["onnx-fp32"]["towers"]
    assert towers["image"]["inputs"][0]["shape"] == [3, 64, 64, 3]
    assert towers["text"]["inputs"][0]["shape"] == [3, 24]
    assert towers["text"]["outputs"][0]["shape"] == [3, 96]
    fresh = shape_pictures(5)
    with ZeroShotClassifier.open(fixed) as one, ZeroShotClassifier.open(bundle) as other:
        np.testing.assert_allclose(one.embed_images(fresh), other.embed_images(fresh), atol=1e-5)
        np.testing.assert_allclose(one.embed_texts(COLOURS), other.embed_texts(COLOURS), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [17, 24])
def test_other_operator_sets_agree_too(opset: int, pictures: Path, tmp_path: Path) -> None:
    done = export_probe(
        "mobileclip", tmp_path / "bundle", None, settings=settings(pictures, opset=opset, text=False)
    )
    assert done.report.variants["onnx-fp32"].status == "passed"
    graph = onnx.load(model_file(tmp_path / "bundle", "onnx-fp32", "image"))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", opset)]


def test_intermediate_graphs_are_kept_on_request(pictures: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    export_probe(
        "tinyclip", tmp_path / "bundle", None, settings=replace(settings(pictures), keep_intermediate=kept)
    )
    for name in ("image.onnx", "text.onnx"):
        onnx.checker.check_model(onnx.load(kept / name), full_check=True)


def test_every_step_is_told_and_timed(pictures: Path, tmp_path: Path) -> None:
    told: list[Step] = []
    done = export_probe("tinyclip", tmp_path / "bundle", pictures, on_step=told.append)
    ended = [step for step in told if step.seconds is not None]
    assert ended == list(done.report.steps)
    names = [step.name for step in ended]
    assert names[0] == "open the checkpoint"
    assert names[-2:] == ["onnx-fp32: verify the text tower", "commit"]
    assert done.report.peak_rss_bytes is None or done.report.peak_rss_bytes > 50_000_000


# --- weights that say nothing ------------------------------------------------------------------------------


def test_random_weights_are_judged_by_their_differences(tmp_path: Path) -> None:
    info = read_checkpoint_info(PROBES / "vit")
    torch.manual_seed(0)
    model = build_clip(info.config)
    save_checkpoint(model, tmp_path / "fresh", info, tokenizer_files=Tokenizer.open(PROBES / "vit").files)
    out = tmp_path / "bundle"
    done = export_bundle(
        Checkpoint(str(tmp_path / "fresh")), parse_variants(["onnx-fp32"]), out, settings(None)
    )
    assert done.report.basis == "centred"
    (remark,) = done.report.remarks
    assert "are all alike (median cosine 0.9" in remark or "are all alike (median cosine 1.0" in remark
    found = manifest_of(out)["variants"]["onnx-fp32"]["parity"]["image"]
    assert (found["basis"], found["status"]) == ("centred", "passed")
    assert found["max_abs"] <= 1e-4
    assert found["centred_cosine_mean"] >= 0.999
    assert "bank" not in found
    (verdict,) = verify_bundle(Bundle.open(out)).variants
    assert verdict.status == "passed", verdict.reason


# --- gates -------------------------------------------------------------------------------------------------


def test_a_failed_gate_names_variant_tower_number_limit_and_picture_and_writes_nothing(
    pictures: Path, tmp_path: Path
) -> None:
    strict = replace(settings(pictures), gates=Gates((LimitChange("fp32", "max_abs", 1e-12),)))
    with pytest.raises(ParityError) as error:
        export_probe("tinyclip", tmp_path / "bundle", None, settings=strict)
    message = str(error.value)
    assert message.startswith("variant 'onnx-fp32', image tower: max_abs is ")
    assert "expected at most 1e-12" in message
    assert "shape-0" in message
    assert ".png'" in message
    assert not (tmp_path / "bundle").exists()


def test_a_failed_gate_leaves_the_old_bundle(bundle: Path, pictures: Path) -> None:
    before = contents(bundle)
    strict = replace(settings(pictures), gates=Gates((LimitChange("onnx-fp32", "cosine_min", 1.0),)))
    with pytest.raises(ParityError, match=r"cosine_min is 1, expected at least 1|cosine_min is 0\.9"):
        export_probe("tinyclip", bundle, None, settings=strict)
    assert contents(bundle) == before


def test_a_limit_that_was_loosened_is_written_down_and_holds_on_devices(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity._LIMITS, "fp32", ParityLimits(max_abs=1e-12))
    loose = replace(settings(pictures), gates=Gates((LimitChange("fp32", "max_abs", 1e-4),)))
    done = export_probe("tinyclip", tmp_path / "bundle", None, settings=loose)
    assert done.report.variants["onnx-fp32"].towers["image"].missed == {"max_abs": 1e-12}
    said = manifest_of(tmp_path / "bundle")
    assert said["variants"]["onnx-fp32"]["parity"]["image"]["missed"] == {"max_abs": 1e-12}
    assert said["provenance"]["variants"]["onnx-fp32"]["limits"] == ["fp32:max_abs=0.0001"]
    assert verify_bundle(Bundle.open(tmp_path / "bundle")).variants[0].status == "passed"


def _in_place_of_tensorrt(request: BuildRequest) -> BuiltVariant:
    return replace(to_onnx.build(request), requires=Requires(compute_capability="12.0"))


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A maker of TensorRT variants that gives float32 graphs, on a host without a GPU."""
    builder_of = exporter.builder_of
    chosen: Callable[[str], Any] = lambda name: (  # noqa: E731
        _in_place_of_tensorrt if name == "tensorrt" else builder_of(name)
    )
    monkeypatch.setattr(exporter, "builder_of", chosen)
    monkeypatch.setattr(agreement, "unmet", lambda *_, **__: "it needs a GPU, and no driver is loaded")


@pytest.mark.usefixtures("fake_tensorrt")
def test_an_engine_that_is_not_here_is_stood_in_for_and_said_so(pictures: Path, tmp_path: Path) -> None:
    done = export_probe("tinyclip", tmp_path / "bundle", pictures, "tensorrt-fp32")
    tower = done.report.variants["tensorrt-fp32"].towers["image"]
    assert (tower.status, tower.reason) == ("unverified", "it needs a GPU, and no driver is loaded")
    assert tower.numbers is not None
    assert tower.numbers.max_abs <= 1e-4
    found = manifest_of(tmp_path / "bundle")["variants"]["tensorrt-fp32"]["parity"]["image"]
    assert found["status"] == "unverified"
    assert found["proxy"].startswith("ONNX Runtime ")
    assert found["cosine_min"] > 0.99999


@pytest.mark.usefixtures("fake_tensorrt")
def test_what_must_be_verified_and_cannot_be_is_a_failed_gate(pictures: Path, tmp_path: Path) -> None:
    strict = replace(settings(pictures), gates=Gates(require_verified=True))
    with pytest.raises(ParityError, match="tensorrt-fp32, image tower: it needs a GPU"):
        export_probe("tinyclip", tmp_path / "bundle", None, "tensorrt-fp32", settings=strict)
    assert ParityError.exit_code == 4
    assert not (tmp_path / "bundle").exists()


MACHINE = os.uname().machine
ELSEWHERE, NEEDED = (
    ("arm64-dotprod", "dotprod") if MACHINE == "x86_64" else ("x86-vnni", "avx512_vnni, avx_vnni")
)


@pytest.mark.parametrize("form", ["onnx-fp32", "onnx-int8", "openvino-fp16"])
def test_another_kind_of_processor_is_stood_in_for_and_proves_itself_on_the_device(
    form: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    name, out = f"{form}@{ELSEWHERE}", tmp_path / "bundle"
    # Names that say nothing about shapes are near ties: two of 64 pictures already miss the limit.
    loose = Gates((LimitChange.parse("int8:top1_agreement=0.9"),) if form == "onnx-int8" else ())
    done = export_probe("tinyclip", out, None, name, settings=replace(settings(pictures), gates=loose))
    tower = done.report.variants[name].towers["image"]
    assert tower.status == "unverified"
    assert tower.reason.startswith(f"it needs one of {NEEDED}, this host has ")
    assert tower.proxy == f"the same engine on {MACHINE}, which has none of {NEEDED}"
    assert tower.numbers is not None
    assert tower.numbers.cosine_mean > 0.99
    found = manifest_of(out)["variants"][name]["parity"]["image"]
    assert (found["status"], found["proxy"]) == ("unverified", tower.proxy)
    assert done.report.default_variants == (name,)
    with pytest.raises(BackendUnavailableError, match=f"none of its variants can be run .*{NEEDED}"):
        ZeroShotClassifier.open(out)
    # A device of that kind takes it by itself, and runs golden pictures before it answers.
    here = Host.here()
    device = replace(here, isa=frozenset(NEEDED.split(", ")))
    monkeypatch.setattr(Host, "here", classmethod(lambda cls: device))
    seen: list[str] = []
    check_tower = parity.check_tower
    monkeypatch.setattr(
        parity, "check_tower", lambda *said, **more: (seen.append(said[3]), check_tower(*said, **more))[1]
    )
    with ZeroShotClassifier.open(out) as classifier:
        assert classifier.choice.variant.name == name
        classifier.set_labels(["red circle", "blue square"])
    assert seen == ["image", "text"]


def test_another_kind_of_processor_is_a_failed_gate_where_all_must_be_verified(
    pictures: Path, tmp_path: Path
) -> None:
    strict = replace(settings(pictures), gates=Gates(require_verified=True))
    with pytest.raises(ParityError, match=rf"onnx-fp32@{ELSEWHERE}, image tower: it needs one of {NEEDED}"):
        export_probe("tinyclip", tmp_path / "bundle", None, f"onnx-fp32@{ELSEWHERE}", settings=strict)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("target", "device"), [("intel-gpu", "gpu"), ("intel-npu", "npu")])
def test_openvinos_other_devices_are_not_verified_by_a_cpu(
    target: str, device: str, pictures: Path, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    if device.upper() in openvino.Core().available_devices:
        pytest.skip(f"this host has Intel's {device}")
    name = f"openvino-fp16@{target}"
    chosen = settings(pictures, static_batch=3)
    tower = export_probe("tinyclip", tmp_path / "bundle", None, name, settings=chosen).report.variants[name]
    image = tower.towers["image"]
    assert image.status == "unverified"
    assert image.reason.startswith(f"device '{device}' is not here")
    assert image.proxy is not None
    assert image.proxy.startswith("OpenVINO ")
    assert image.numbers is not None
    assert image.numbers.cosine_min >= 0.999


def test_intels_devices_run_what_was_compiled_for_them(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    compiled: list[tuple[str, str, bool]] = []

    def compile_variant(variant: Any, *, towers: list[str], options: RuntimeOptions) -> None:
        assert options.cache_dir is not None
        compiled.append((variant.name, towers[0], options.cache_dir.is_dir()))

    def open_here(files: Any, *, options: RuntimeOptions) -> Any:
        assert (options.device, len(compiled)) == ("gpu", len(opened) + 1)
        opened.append(options.cache_dir)
        return open_session(files, options=RuntimeOptions(threads=1))

    opened: list[Path | None] = []
    monkeypatch.setattr(agreement, "open_session", open_here)
    monkeypatch.setattr("edgeclip.runtime.compile.compile_variant", compile_variant)
    name = "openvino-fp16@intel-gpu"
    done = export_probe("tinyclip", tmp_path / "bundle", pictures, name)
    assert done.report.variants[name].status == "passed"
    assert compiled == [(name, "image", True), (name, "text", True)]
    assert None not in opened


# --- an existing bundle ------------------------------------------------------------------------------------


def test_a_variant_is_added_and_the_others_stay(bundle: Path, pictures: Path) -> None:
    before = manifest_of(bundle)
    done = export_probe("tinyclip", bundle, pictures, "onnx-fp32@x86-avx2")
    said = manifest_of(bundle)
    assert list(said["variants"]) == ["onnx-fp32", "onnx-fp32@x86-avx2"]
    assert said["variants"]["onnx-fp32"] == before["variants"]["onnx-fp32"]
    assert said["model"] == before["model"]
    assert set(said["provenance"]["variants"]) == {"onnx-fp32", "onnx-fp32@x86-avx2"}
    assert said["default_variants"] == ["onnx-fp32@x86-avx2", "onnx-fp32"]
    assert not done.report.variants["onnx-fp32@x86-avx2"].replaced
    again = export_probe("tinyclip", bundle, pictures, "onnx-fp32@x86-avx2")
    assert again.report.variants["onnx-fp32@x86-avx2"].replaced
    assert all(verdict.status == "passed" for verdict in verify_bundle(Bundle.open(bundle)).variants)


def test_another_model_is_refused(bundle: Path, pictures: Path) -> None:
    before = contents(bundle)
    with pytest.raises(BundleError, match=r"holds the model 'probe-tinyclip' .* got 'probe-vit'"):
        export_probe("vit", bundle, pictures)
    assert contents(bundle) == before


def test_another_kind_of_input_is_refused(bundle: Path, pictures: Path) -> None:
    with pytest.raises(BundleError, match="normalized by the graph, got host"):
        export_probe("tinyclip", bundle, None, settings=settings(pictures, float_input=True))


def test_other_labels_under_the_name_of_baked_ones_are_refused(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def offer(*names: str, bake: bool) -> ExportSettings:
        chosen = settings(pictures, bake_labels=bake)
        offered = Offered("things", LabelSet.of(names))
        return replace(chosen, references=References(pictures=pictures, offered=offered))

    export_probe("tinyclip", out, None, settings=offer("cat", "dog", bake=True))
    before = contents(out)
    with pytest.raises(ConfigError, match="its bank 'things' has 2 other labels"):
        export_probe(
            "tinyclip", out, None, "onnx-fp32@x86-avx2", settings=offer("cat", "dog", "cow", bake=False)
        )
    assert contents(out) == before
    # The same labels are the bank that is there; where no other variant is left, there may be others.
    export_probe("tinyclip", out, None, "onnx-fp32@x86-avx2", settings=offer("cat", "dog", bake=True))
    assert manifest_of(out)["label_banks"]["things"]["file"] in before
    export_probe(
        "tinyclip", out, None, "onnx-fp32", "onnx-fp32@x86-avx2", settings=offer("cat", "cow", bake=True)
    )
    assert all(verdict.status == "passed" for verdict in verify_bundle(Bundle.open(out)).variants)


def golden_of(bundle: Path) -> dict[str, Any]:
    opened = Bundle.open(bundle)
    tensors, _ = map_tensors(opened.file(opened.manifest.golden or ""))
    return {name: np.array(array) for name, array in tensors.items()}


def test_what_the_other_variants_were_judged_by_stays(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    before = golden_of(bundle)
    other = write_pictures(tmp_path / "other", 20)
    chosen = replace(settings(other, text=False), references=References(pictures=other))
    done = export_probe("tinyclip", bundle, None, "onnx-fp32@x86-avx2", settings=chosen)
    assert (
        "the bundle's golden file stays: it is what its other variants were judged by" in done.report.remarks
    )
    after = golden_of(bundle)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    towers = [
        set(verdict.golden.towers)
        for verdict in verify_bundle(Bundle.open(bundle)).variants
        if verdict.golden
    ]
    assert towers == [{"image", "text"}, {"image"}]
    # Nothing was judged by it any more: the next one may take its place.
    export_probe("tinyclip", bundle, None, "onnx-fp32", "onnx-fp32@x86-avx2", settings=settings(other))
    assert not np.array_equal(golden_of(bundle)["images"], before["images"])


def test_a_text_tower_can_be_added_later(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_probe("tinyclip", out, None, settings=settings(pictures, text=False))
    before = golden_of(out)
    export_probe("tinyclip", out, None, "onnx-fp32@x86-avx2")
    said = manifest_of(out)
    assert set(said["variants"]["onnx-fp32@x86-avx2"]["towers"]) == {"image", "text"}
    assert set(said["model"]["parameters"]) == {"image", "text"}
    (notice,) = said["model"]["notices"]
    assert said["tokenizer"]["digest"] == Tokenizer.open(PROBES / "tinyclip").digest
    assert "tokens" in golden_of(out)
    np.testing.assert_array_equal(golden_of(out)["images"], before["images"])
    assert (out / notice).is_file()
    assert all(verdict.status == "passed" for verdict in verify_bundle(Bundle.open(out)).variants)
    with ZeroShotClassifier.open(out, variant="onnx-fp32") as classifier:  # with the other one's text tower
        classifier.set_labels(["red circle", "blue square"])


def test_another_tokenizer_is_refused(bundle: Path, pictures: Path) -> None:
    with BundleWriter(bundle) as writer:
        writer.manifest["tokenizer"]["digest"] = "0" * 64
        writer.commit()
    with pytest.raises(BundleError, match=r"its tokenizer is 000000000000…, got [0-9a-f]{12}…"):
        export_probe("tinyclip", bundle, pictures)


@pytest.mark.parametrize("at", ["reference pictures", "trace the text tower", "onnx-fp32: make", "commit"])
def test_an_interrupt_leaves_the_old_bundle(at: str, bundle: Path, pictures: Path) -> None:
    before = contents(bundle)

    def interrupt(step: Step) -> None:
        if step.name == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_probe("tinyclip", bundle, pictures, "onnx-fp32", "onnx-fp32@x86-avx2", on_step=interrupt)
    assert contents(bundle) == before


def test_what_a_killed_export_left_goes_with_the_next(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))  # nothing of ours needs it
    left = bundle / ".edgeclip-tmp-export-1234" / "onnx-fp32" / "engines"
    left.mkdir(parents=True)
    (left / "image.blob").write_bytes(b"half")
    work: list[Path] = []
    for step in ("open the checkpoint", "onnx-fp32: store"):

        def look(said: Step, step: str = step) -> None:
            if said.name == step:
                work.extend(bundle.glob(".edgeclip-tmp-export-*"))

        export_probe("tinyclip", bundle, pictures, on_step=look)
    assert len(set(work)) == 2  # each export has one, and removes it
    assert bundle / ".edgeclip-tmp-export-1234" not in work
    assert not list(bundle.glob(".edgeclip-*"))


def test_every_write_to_a_bundle_removes_what_a_killed_export_left(bundle: Path) -> None:
    left = bundle / ".edgeclip-tmp-export-1234" / "onnx-fp32" / "engines"
    left.mkdir(parents=True)
    (left / "image.blob").write_bytes(b"half")
    with BundleWriter(bundle) as writer:
        writer.commit()
    assert not list(bundle.glob(".edgeclip-*"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_twenty_random_moments_a_complete_bundle_opens(tmp_path: Path) -> None:
    tool = Path(__file__).parents[1] / "tools" / "kill_export.py"
    done = subprocess.run(
        [sys.executable, str(tool), str(tmp_path / "bundle"), "20", "0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["kills"] == 20
    assert seen["mid_export"] >= 8  # they did meet exports, not only what comes before
    assert seen["rerun"] == "passed"


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("nothing-of-this-name", InputError, "no such file or directory, and no model of that name"),
        ("mobileclip2-s0", InputError, "did you mean 'MobileCLIP2-S0'"),
        ("MobileCLIP2-S0", InputError, "run `edgeclip models pull MobileCLIP2-S0`"),
        ("{bundle}", InputError, "it is a bundle, whose float32 weights are gone"),
        ("{probes}", InputError, "it has no config.json"),
    ],
)
def test_what_is_no_checkpoint_is_named(
    checkpoint: str, error: type[Exception], message: str, tiny_bundle_session: Path, tmp_path: Path
) -> None:
    said = checkpoint.format(bundle=tiny_bundle_session, probes=PROBES)
    with pytest.raises(error, match=message):
        export_bundle(Checkpoint(said), parse_variants(["onnx-fp32"]), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_model_of_the_zoo_is_found_where_it_was_pulled_to() -> None:
    folder = weights_directory("MobileCLIP2-S0")
    folder.mkdir(parents=True)
    weights = MODELS["MobileCLIP2-S0"].weights
    assert weights is not None
    file = folder / weights.files[0]
    file.touch()
    assert _locate(Checkpoint("MobileCLIP2-S0")) == (str(file), "MobileCLIP2-S0")


def test_a_folder_with_one_picture_is_too_little_to_compare_on(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "one", 1)
    with pytest.raises(InputError, match="holds 1 picture, expected at least 2"):
        export_probe("tinyclip", tmp_path / "bundle", folder)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "some", 3)
    (folder / "shape-001.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"shape-001\.png"):
        export_probe("tinyclip", tmp_path / "bundle", folder)


def test_the_directory_of_a_checkpoint_is_not_written_into(tmp_path: Path) -> None:
    copy = shutil.copytree(PROBES / "tinyclip", tmp_path / "model")
    before = contents(copy)
    with pytest.raises(ConfigError, match="is a checkpoint: name another directory"):
        export_bundle(Checkpoint(str(copy)), parse_variants(["onnx-fp32"]), copy)
    assert contents(copy) == before


def test_a_bundle_keeps_no_intermediate_files(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(ConfigError, match=r"bundle' is the bundle: name another directory"):
        export_probe("tinyclip", out, None, settings=ExportSettings(keep_intermediate=out))
    assert not out.exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_is_not_written_over(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"out': cannot be written: a file is there, expected a directory"):
        export_probe("tinyclip", out, None)
    assert out.is_symlink() if kind == "link" else out.read_text() == "mine"


@pytest.mark.parametrize("variant", ["openvino-fp16", "openvino-int8"])
def test_a_package_of_one_format_is_asked_for_before_anything_is_done(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    told: list[Step] = []
    with pytest.raises(MissingExtraError, match=r"'openvino', .* \"edgeclip\[openvino\]\""):
        export_probe("tinyclip", tmp_path / "bundle", None, variant, on_step=told.append)
    assert told == []


def test_an_engine_that_fails_is_an_error_and_not_unverified(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder_of = exporter.builder_of

    def broken(request: BuildRequest) -> BuiltVariant:
        built = builder_of("onnx")(request)
        image = built.towers["image"]
        return replace(built, towers={"image": replace(image, files={image.model: b"\x08\x09"})})

    monkeypatch.setattr(exporter, "builder_of", lambda name: broken)
    with pytest.raises(ExportError, match="'onnx-fp32', image tower: its engine is here and cannot run it"):
        export_probe("tinyclip", tmp_path / "bundle", pictures)


def test_default_variants_put_verified_int8_first() -> None:
    def entry(status: str, *towers: str, **requires: Any) -> dict[str, Any]:
        names = towers or ("image", "text")
        return {
            "requires": requires,
            "towers": {name: {} for name in names},
            "parity": {name: {"status": status} for name in names},
        }

    entries = {
        "onnx-fp32": entry("passed"),
        "onnx-int8": entry("passed"),
        "openvino-fp16": entry("passed"),
        "onnx-fp16": entry("passed"),
        "onnx-int8@x86-vnni": entry("passed"),
        # What asks nothing of a host might be taken by a host it is not for.
        "openvino-fp16@intel-gpu": entry("unverified"),
        "onnx-int8@arm64-dotprod": entry("unverified", isa_any=["dotprod"]),
        "tensorrt-fp16@cuda-sm87": entry("unverified", compute_capability="8.7"),
        "texts": entry("passed", "text"),
    }
    assert default_order(entries) == [
        "tensorrt-fp16@cuda-sm87",
        "onnx-int8@arm64-dotprod",
        "onnx-int8@x86-vnni",
        "onnx-int8",
        "onnx-fp32",
        "openvino-fp16",
        "onnx-fp16",
    ]
    assert default_order({"openvino-fp16@intel-gpu": entry("unverified")}) == ["openvino-fp16@intel-gpu"]


# --- full size ---------------------------------------------------------------------------------------------


@pytest.mark.full
def test_mobileclip2_s0_takes_two_minutes_and_four_gib(tmp_path: Path) -> None:
    """Both towers, ONNX and OpenVINO, verified: in a process of its own, on two threads."""
    pytest.importorskip("openvino")
    config = clip_config("MobileCLIP2-S0")
    torch.manual_seed(0)
    tokenizer = Tokenizer.clip(config.text.context_length)
    info = CheckpointInfo(config=config, scale=1.0, tokenizer_digest=tokenizer.digest, tokenizer_files={})
    save_checkpoint(build_clip(config), tmp_path / "model", info, tokenizer_files=tokenizer.files)
    done = subprocess.run(
        [
            sys.executable, "-m", "edgeclip", "export",
            str(tmp_path / "model"), "-o", str(tmp_path / "bundle"),
            "--variant", "onnx-fp32", "--variant", "openvino-fp16", "--threads", "2", "--json",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["basis"] == "centred"
    assert sum(step["seconds"] for step in said["steps"]) < 120
    assert said["peak_rss_bytes"] < 4 << 30
