"""Which products of bytes a file asks for, how engines add them here, and what is refused because of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BackendError, BackendUnavailableError
from edgeclip.runtime import RuntimeOptions, byte_sums, choose_variant, open_session, probe_graphs
from edgeclip.runtime.byte_products import Overflow, overflow, products
from edgeclip.runtime.byte_sums import UnsafeIsaWarning, adds_in_16_bits, lacks_vnni, run_graph
from edgeclip.runtime.host import Host

AVX2 = replace(Host.here(), isa=frozenset({"avx2", "fma"}))
VNNI = replace(Host.here(), isa=frozenset({"avx2", "avx_vnni"}))
ALLOWED = RuntimeOptions(allow=frozenset({"unsafe-isa"}), threads=1)


@pytest.fixture
def in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every engine add as AVX2 does, by word alone: the numbers stay those of this host."""
    monkeypatch.setattr(byte_sums, "adds_in_16_bits", lambda backend="ort": True)
    monkeypatch.setattr("edgeclip.runtime.choose.adds_in_16_bits", lambda backend="ort": True)


def weight_of(most: int, shape: tuple[int, ...] = (8, 16)) -> NDArray[np.int8]:
    weight = np.random.default_rng(0).integers(-most, most + 1, shape).astype(np.int8)
    weight[0], weight[1] = most, most
    return weight


def product(most: int) -> bytes:
    weight = weight_of(most)
    return probe_graphs.product((2, 8), (np.float32(1), 0), "uint8", weight, np.ones(16, np.float32))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- reading files


def test_a_product_and_its_largest_pair_are_found(tmp_path: Path) -> None:
    assert overflow(written(tmp_path / "a.onnx", product(100))) == Overflow(1, "y", 200)
    assert overflow(written(tmp_path / "b.onnx", product(64))) is None
    (found,) = products(tmp_path / "a.onnx")
    assert (found.weight == weight_of(100)).all()


def test_pairs_are_neighbours_of_one_sign(tmp_path: Path) -> None:
    """127 and -127 cancel out in a pair; 127 and 127 do not, unless they belong to two pairs."""
    steps = (np.float32(1), 0)
    for column, expected in (
        ([127, -127, 127, -127], 127),
        ([-1, 127, 127, -1], 127),
        ([0, 0, -127, -2], 129),
    ):
        weight = np.tile(np.array(column, np.int8)[:, None], (1, 4))
        graph = probe_graphs.product((2, 4), steps, "uint8", weight, np.ones(4, np.float32))
        (found,) = products(written(tmp_path / "graph.onnx", graph))
        assert found.largest_pair == expected


@pytest.mark.parametrize(("groups", "expected"), [(1, 1), (4, 1), (8, 0)])
def test_convolutions_are_read_position_by_position(tmp_path: Path, groups: int, expected: int) -> None:
    weight = weight_of(127, (8, 8 // groups, 3, 3))
    steps = (np.float32(1), 128)
    graph = probe_graphs.convolution(
        (1, 8, 4, 4), steps, "uint8", weight, np.ones(8, np.float32), steps, groups=groups
    )
    found = list(products(written(tmp_path / "graph.onnx", graph)))
    assert len(found) == expected
    if found:
        assert (found[0].weight[: 8 // groups, 3] == weight[3, :, 0, 0]).all()


def test_weights_that_meet_floats_are_left_out(tmp_path: Path) -> None:
    """Weight-only int8: an engine turns them into floats first."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper

    for removed in ("QuantizeLinear", "x_dq"):
        model = onnx.load_from_string(product(127))
        if removed == "x_dq":
            first = model.graph.node[0]
            del model.graph.node[:2]
            model.graph.node[-1].input[0] = first.input[0]
        path = written(tmp_path / "graph.onnx", model.SerializeToString())
        assert (overflow(path) is None) is (removed == "x_dq")
    model = onnx.load_from_string(product(127))
    model.graph.node.insert(2, helper.make_node("Transpose", ["x_dq"], ["moved"], perm=[0, 1]))
    model.graph.node[-1].input[0] = "moved"
    assert overflow(written(tmp_path / "moved.onnx", model.SerializeToString())) == Overflow(1, "y", 254)


def test_external_data_and_integer_operators_are_read(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")

    a = np.zeros((2, 64), np.uint8)
    graph = probe_graphs.integer_product(a, weight_of(127, (64, 32)))
    assert overflow(written(tmp_path / "inside.onnx", graph)) == Overflow(1, "y", 254)
    model = onnx.load_from_string(graph)
    onnx.save(
        model,
        tmp_path / "outside.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="outside.data",
    )
    assert overflow(tmp_path / "outside.onnx") == Overflow(1, "y", 254)


def test_what_tells_nothing_is_left_to_the_engine(tmp_path: Path) -> None:
    assert overflow(written(tmp_path / "engine.plan", b"anything")) is None
    assert overflow(written(tmp_path / "empty.onnx", b"")) is None
    with pytest.raises(ValueError, match="beyond its message"):
        overflow(written(tmp_path / "cut.onnx", product(127)[:200]))


def openvino_file(path: Path, most: int, *, rounded: bool = True) -> Path:
    pytest.importorskip("openvino")
    from edgeclip.runtime.ov import import_openvino

    openvino = import_openvino()
    from openvino import opset13 as ops

    x = ops.parameter([2, 8, 4, 4], np.float32, name="x")
    source: Any = x
    if rounded:
        low, high = np.float32(0), np.float32(255)
        source = ops.fake_quantize(x, low, high, low, high, 256)
    stored = ops.constant(weight_of(most, (16, 8, 3, 3)), dtype=np.int8)
    scaled = ops.multiply(ops.convert(stored, np.float32), ops.constant(np.ones((16, 1, 1, 1), np.float32)))
    made = ops.convolution(source, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    openvino.save_model(openvino.Model([made], [x], "tower"), path, compress_to_fp16=False)
    return path


def test_openvino_files_are_read(tmp_path: Path) -> None:
    found = overflow(openvino_file(tmp_path / "wide.xml", 127))
    assert found is not None
    assert (found.products, found.largest_pair) == (1, 254)
    stored = (tmp_path / "wide.bin").rename(tmp_path / "wide.01234567.bin")  # as bundles name it
    assert overflow(tmp_path / "wide.xml", (tmp_path / "wide.xml", stored)) == found
    assert overflow(openvino_file(tmp_path / "narrow.xml", 64)) is None
    assert overflow(openvino_file(tmp_path / "weights.xml", 127, rounded=False)) is None
    (tmp_path / "broken.xml").write_text("<net", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.xml: "):
        overflow(tmp_path / "broken.xml")


# --- opening files


@pytest.mark.usefixtures("in_16_bits")
def test_a_bare_file_that_would_overflow_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "int8.onnx", product(100))
    expected = (
        r"int8\.onnx.*: its int8 answers would be wrong here: ort adds pairs of products in 16 bits on this "
        r"host \(.+\), and 1 of its products can overflow them \(at most in 'y', whose weights add up to 200,"
        r" 128 fits"
    )
    with pytest.raises(BackendUnavailableError, match=expected):
        open_session(path, options=RuntimeOptions(threads=1))
    with pytest.warns(UnsafeIsaWarning, match="whose weights add up to 200"):
        open_session(path, options=ALLOWED).close()
    open_session(written(tmp_path / "seven.onnx", product(64)), options=RuntimeOptions(threads=1)).close()


@pytest.mark.usefixtures("in_16_bits")
def test_openvino_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"wrong here: openvino adds pairs .* add up to 254"):
        open_session(openvino_file(tmp_path / "wide.xml", 127), options=RuntimeOptions(threads=1))


def test_where_sums_are_exact_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_sums, "adds_in_16_bits", lambda backend="ort": False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_session(written(tmp_path / "int8.onnx", product(127)), options=ALLOWED).close()


@pytest.mark.usefixtures("in_16_bits")
@pytest.mark.parametrize("key", ["session.x64quantprecision", "session.disable_quant_qdq"])
def test_settings_that_make_sums_exact_lift_the_refusal(tmp_path: Path, key: str) -> None:
    from edgeclip.runtime.session import ModelFiles

    path = written(tmp_path / "int8.onnx", product(127))
    model = ModelFiles(path, "tower", "onnx", precision="int8", session_config={key: "1"})
    byte_sums.refuse_overflow(model, "ort", RuntimeOptions())
    with pytest.raises(BackendUnavailableError, match="openvino adds pairs"):
        byte_sums.refuse_overflow(model, "openvino", RuntimeOptions())  # a setting of the other engine


def test_an_engine_that_adds_in_no_known_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_sums, "run_graph", lambda *given, **more: {"y": np.full((4, 16), 5.0)})
    with pytest.raises(BackendError, match=r"'ort': a product of bytes gives \[5.0\] here, expected 259080"):
        adds_in_16_bits.__wrapped__("ort")


def test_the_probe_is_what_a_host_with_vnni_or_without_gives() -> None:
    host = Host.here()
    if host.machine == "x86_64" and host.isa is not None and "avx2" in host.isa:
        assert adds_in_16_bits("ort") is lacks_vnni(host)
    made = run_graph(product(64), {"x": np.full((2, 8), 255, np.float32)})
    assert (made["y"] == 255 * weight_of(64).astype(int).sum(axis=0)).all()


# --- choosing


def with_int8(path: Path, most: int, **fields: Any) -> Bundle:
    with BundleWriter(path) as writer:
        entry = writer.manifest["variants"]["onnx-int8"]
        stored = writer.add("onnx-int8/image.onnx", product(most))
        entry["towers"]["image"].update(model=stored, files=[stored])
        entry.update(fields)
        return writer.commit()


def test_a_variant_without_isa_that_would_overflow_is_passed_over(tiny_bundle: Path) -> None:
    bundle = with_int8(tiny_bundle, 127)
    assert choose_variant(bundle, host=VNNI).variant.name == "onnx-int8"
    choice = choose_variant(bundle, host=AVX2)
    assert choice.variant.name == "onnx-fp32"
    ((name, reason),) = choice.skipped
    assert name == "onnx-int8"
    assert reason == (
        "sums of its image tower would overflow: this host has avx2, fma and no VNNI, so pairs of "
        "products are added in 16 bits"
    )
    with pytest.raises(BackendUnavailableError, match=r"'onnx-int8' cannot be run here: sums of its image"):
        choose_variant(bundle, variant="onnx-int8", host=AVX2)
    with pytest.warns(UnsafeIsaWarning, match="'onnx-int8' is run although sums of its image tower would"):
        choose_variant(bundle, variant="onnx-int8", host=AVX2, options=ALLOWED)


def test_seven_bits_and_exact_kernels_are_taken_on_avx2(tiny_bundle: Path) -> None:
    assert choose_variant(with_int8(tiny_bundle, 64), host=AVX2).variant.name == "onnx-int8"
    config = {"session.x64quantprecision": "1"}
    bundle = with_int8(tiny_bundle, 127, session_config=config)
    assert choose_variant(bundle, host=AVX2).variant.name == "onnx-int8"


# --- a bundle that really saturates


@pytest.mark.full
def test_a_saturating_bundle_of_others_is_refused_on_an_emulated_haswell(tmp_path: Path) -> None:
    """8-bit weights, no word of instruction sets: the processor is found out by what its sums are."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 is not installed (Debian, Ubuntu: apt install qemu-user)")
    pytest.importorskip("onnx")
    from exported import export_probe, write_pictures

    from edgeclip.export.options import ExportSettings, Gates, LimitChange, References

    pictures = write_pictures(tmp_path / "pictures")
    settings = ExportSettings(
        references=References(pictures=pictures),
        gates=Gates(limits=(LimitChange("int8", "top1_agreement", 0.9),)),
        threads=1,
    )
    variants = ("onnx-fp32", "onnx-int8@x86-vnni", "onnx-int8@x86-avx2")
    path = tmp_path / "bundle"
    export_probe("mobileclip", path, pictures, *variants, settings=settings)
    with BundleWriter(path) as writer:
        writer.manifest["variants"]["onnx-int8@x86-vnni"].pop("requires")
        writer.commit()

    def classify(variant: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [
            qemu,
            "-cpu",
            "Haswell",
            sys.executable,
            "-m",
            "edgeclip",
            "classify",
            "--bundle",
            str(path),
        ]
        command += ["--variant", variant, "--threads", "1", "--labels", "red circle,blue square", *more]
        return subprocess.run(
            [*command, str(next(pictures.iterdir()))],
            env={**os.environ, "EDGECLIP_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )

    refused = classify("onnx-int8@x86-vnni")
    assert refused.returncode == 1
    assert "its int8 answers would be wrong here: ort adds pairs of products in 16 bits" in refused.stderr
    allowed = classify("onnx-int8@x86-vnni", "--allow", "unsafe-isa")
    assert allowed.returncode == 0
    assert "warning: onnx-int8@x86-vnni image tower: its int8 answers would be wrong here" in allowed.stderr
    fits = classify("onnx-int8@x86-avx2")
    assert fits.returncode == 0
    assert "warning" not in fits.stderr.replace("qemu-x86_64: warning", "")
