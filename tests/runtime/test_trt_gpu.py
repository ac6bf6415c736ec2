"""TensorRT on a GPU: ``pytest -m gpu`` on a host that has one, with TensorRT or TensorRT-RTX."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.bench.per_op import profile_tower
from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BackendUnavailableError
from edgeclip.export.verify import verify_bundle
from edgeclip.runtime.choose import choose_variant, open_tower
from edgeclip.runtime.compile import compile_variant
from edgeclip.runtime.cuda import CudaRuntime, find_gpu
from edgeclip.runtime.parity import ParityLimits, check_parity, compare_embeddings
from edgeclip.runtime.session import RuntimeOptions, open_session, resolve_backend

pytestmark = pytest.mark.gpu

CUDA = RuntimeOptions(device="cuda", allow=frozenset({"unverified"}))


@pytest.fixture(scope="module", autouse=True)
def _engine_and_gpu() -> None:
    try:
        find_gpu()
        resolve_backend("tensorrt", CUDA)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    with BundleWriter(tiny_bundle) as writer:
        entry = dict(writer.manifest["variants"]["onnx-fp32"])
        writer.manifest["variants"]["tensorrt-fp32"] = {**entry, "format": "tensorrt", "requires": {}}
        return writer.commit()


def pixels(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_the_runtime_sees_the_gpu_the_driver_sees() -> None:
    runtime = CudaRuntime.open()
    assert runtime.device_count() >= 1
    runtime.use(0)
    stream = runtime.create_stream()
    address = runtime.allocate(1 << 20)
    runtime.synchronize(stream)
    runtime.free(address)
    runtime.destroy_stream(stream)


def test_compiled_towers_give_the_numbers_of_onnx_runtime(bundle: Bundle) -> None:
    variant = bundle.variant("tensorrt-fp32")
    assert not any(each.prepared.up_to_date for each in compile_variant(variant, options=CUDA))
    assert all(each.prepared.up_to_date for each in compile_variant(variant, options=CUDA))
    onnx = bundle.variant("onnx-fp32")
    tokens = np.random.default_rng(0).integers(0, 500, (70, 16), dtype=np.int32)
    for tower, name, rows in (("image", "image", pixels(20)), ("text", "tokens", tokens)):
        with open_session(onnx.tower(tower)) as session:
            expected = session.run({name: rows})[f"{tower}_embedding"]
        with open_tower(bundle, variant, tower, CUDA) as session:
            assert session.chosen.device == "cuda:0"
            for count in (1, 5, 8, 20, 3):  # 20 pictures are more than the engine's largest batch
                got = session.run({name: rows[:count]})[f"{tower}_embedding"]
                numbers = compare_embeddings(expected[:count], got)
                assert check_parity(numbers, ParityLimits.of("fp32")) == (), (tower, count, numbers)


def test_layers_are_timed_and_found_in_the_file(bundle: Bundle) -> None:
    variant = bundle.variant("tensorrt-fp32")
    compile_variant(variant, options=CUDA)
    profile = profile_tower(variant.tower("image"), options=CUDA, runs=5, account=True)
    assert profile.placement["device"] == "cuda:0"
    assert all(len(each.samples_ms) == 5 for each in profile.ops)
    assert profile.kernels_ms > 0
    # The GPU's own time of the layers is part of the time of the call.
    assert min(map(sum, zip(*(each.samples_ms for each in profile.ops), strict=True))) < max(
        profile.timed_wall_samples_ms
    )
    found = sum(each.operations or 0 for each in profile.ops)
    assert profile.operations is not None
    assert found == profile.operations, "a product of the file is in no layer"
    assert {each.block for each in profile.ops} != {None}


def test_many_threads_get_the_answers_of_one(bundle: Bundle) -> None:
    variant = bundle.variant("tensorrt-fp32")
    compile_variant(variant, options=CUDA)
    feeds = [pixels(1 + seed % 4, seed) for seed in range(8)]
    wrong: list[int] = []
    with open_tower(bundle, variant, "image", CUDA) as session:
        expected = [session.run({"image": feed})["image_embedding"] for feed in feeds]

        def work() -> None:
            for number, feed in enumerate(feeds):
                got = session.run({"image": feed})["image_embedding"]
                if not np.allclose(got, expected[number], atol=1e-5):
                    wrong.append(number)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_kernels_of_rtx_are_kept_and_give_the_same_numbers(bundle: Bundle, tmp_path: Path) -> None:
    if resolve_backend("tensorrt", CUDA)[0] != "tensorrt_rtx":
        pytest.skip("TensorRT compiles its kernels when it builds")
    variant, options = bundle.variant("tensorrt-fp32"), replace(CUDA, cache_dir=tmp_path)
    compile_variant(variant, options=options)
    given = pixels(4)
    with open_tower(bundle, variant, "image", options) as session:
        first = session.run({"image": given})["image_embedding"]
        (kept,) = tmp_path.glob("kernels-*.cache")
    size_bytes = kept.stat().st_size
    with open_tower(bundle, variant, "image", options) as session:
        np.testing.assert_array_equal(session.run({"image": given})["image_embedding"], first)
    assert kept.stat().st_size == size_bytes > 0


def test_verify_runs_the_variant(bundle: Bundle) -> None:
    compile_variant(bundle.variant("tensorrt-fp32"), options=CUDA)
    verdict = {each.name: each for each in verify_bundle(bundle).variants}["tensorrt-fp32"]
    assert (verdict.status, verdict.reason) == ("passed", "")


def test_a_generation_newer_than_this_one_is_asked_for_in_vain(tiny_bundle: Path) -> None:
    with BundleWriter(tiny_bundle) as writer:
        entry = dict(writer.manifest["variants"]["onnx-fp32"])
        writer.manifest["variants"]["tensorrt-fp32"] = {
            **entry,
            "format": "tensorrt",
            "requires": {"compute_capability": "99.0"},
        }
        bundle = writer.commit()
    with pytest.raises(BackendUnavailableError, match=rf"99\.0 or newer, and {find_gpu().name}"):
        choose_variant(bundle, variant="tensorrt-fp32", options=CUDA)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_trained_probe_agrees_in_every_precision(precision: str, repo: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from edgeclip.cli import _run

    directory = tmp_path / "bundle"
    probe = repo / "tests/data/probes/mobileclip"
    variant = f"tensorrt-{precision}"
    assert _run(["export", str(probe), "--variant", variant, "-o", str(directory)], debug=False) == 0
    bundle = Bundle.open(directory)
    assert {each.status for each in bundle.variant(variant).entry.parity.values()} == {"passed"}
    compile_variant(bundle.variant(variant), options=replace(CUDA, allow=frozenset()))
    assert {each.status for each in verify_bundle(bundle).variants} == {"passed"}
