"""Running engines. What needs no GPU: where engines are found, what is said where they are not, and every
step of a call against stand-ins for libcudart and TensorRT's runtime (tests/tools/fake_cuda.py)."""

from __future__ import annotations

import gc
import json
import re
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCudart, FakeTensorRT, RtxAs

from edgeclip.bundle import Bundle, BundleWriter, TowerFiles
from edgeclip.cache import COMPILED, HostCache
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError, InputError
from edgeclip.runtime import trt as trt_module
from edgeclip.runtime.choose import open_tower, unmet
from edgeclip.runtime.compile import EngineChoices, compile_variant
from edgeclip.runtime.cuda import CudaRuntime, Gpu
from edgeclip.runtime.host import Host
from edgeclip.runtime.session import (
    ModelFiles,
    OpenSession,
    Placement,
    RuntimeOptions,
    model_files,
    open_session,
)
from edgeclip.runtime.trt import EngineSettings, Kernels, TrtEngine, prepare
from edgeclip.runtime.trt_build import BatchRange, import_tensorrt
from edgeclip.runtime.trt_cache import EngineCache, EngineRecord

pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)

ORIN = Gpu(0, "NVIDIA Orin", "GPU-0", "8.7", "12.6", "540.4.0")
RTX_3060 = Gpu(0, "NVIDIA GeForce RTX 3060", "GPU-1", "8.6", "13.0", "580.65.06")
CUDA = RuntimeOptions(device="cuda")


def add_tensorrt(directory: Path, **fields: Any) -> Bundle:
    """Give a bundle a variant tensorrt-fp32 made of the files of onnx-fp32; return it opened."""
    with BundleWriter(directory) as writer:
        entry = dict(writer.manifest["variants"]["onnx-fp32"])
        writer.manifest["variants"]["tensorrt-fp32"] = {
            **entry,
            "format": "tensorrt",
            "requires": {},
            **fields,
        }
        return writer.commit()


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return add_tensorrt(tiny_bundle)


@pytest.fixture
def tower(bundle: Bundle) -> TowerFiles:
    return bundle.variant("tensorrt-fp32").tower("image")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Let this host have a GPU, as far as it is asked what it is."""
    monkeypatch.setattr(trt_module, "find_gpu", lambda index: replace(RTX_3060, index=index))
    return RTX_3060


# --- a call, against stand-ins


class Stage:
    """An engine on the stand-ins, and ONNX Runtime on the same file."""

    def __init__(self, tower: TowerFiles, *, largest: int = 8, smallest: int = 1) -> None:
        self.cudart = FakeCudart()
        self.trt = FakeTensorRT(self.cudart)
        self.tower = tower
        self.data = FakeTensorRT.engine(tower.model.read_bytes(), smallest, smallest, largest)

    def engine(self, kernels: Kernels | None = None) -> TrtEngine:
        chosen = Placement("tensorrt", "TensorRT 10.3.0", "cuda:0", 1, "fp32", "a test")
        cuda, model = CudaRuntime(self.cudart), model_files(self.tower)
        return TrtEngine(self.trt, cuda, self.data, model=model, chosen=chosen, index=0, kernels=kernels)

    def session(self, kernels: Kernels | None = None) -> OpenSession:
        return OpenSession(self.engine(kernels), name="tiny")

    def expected(self, pixels: Any) -> Any:
        onnx_tower = replace(self.tower, format="onnx")
        with open_session(onnx_tower, options=RuntimeOptions(threads=1)) as session:
            return session.run({"image": pixels})["image_embedding"]


@pytest.fixture
def stage(tower: TowerFiles) -> Stage:
    return Stage(tower)


def pixels(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_inputs_and_outputs_are_those_of_the_network(stage: Stage) -> None:
    with stage.session() as session:
        assert str(session.inputs["image"]) == "uint8 (B, 32, 32, 3)"
        assert str(session.outputs["image_embedding"]) == "float32 (B, 16)"


@pytest.mark.parametrize("count", [1, 5, 8, 20])
def test_every_batch_gives_the_numbers_of_the_network(stage: Stage, count: int) -> None:
    given = pixels(count)
    with stage.session() as session:
        got = session.run({"image": given})["image_embedding"]
    np.testing.assert_array_equal(got, stage.expected(given))
    assert stage.trt.runs == {1: [1], 5: [5], 8: [8], 20: [8, 8, 4]}[count]


def test_a_batch_below_the_smallest_is_filled_up(tower: TowerFiles) -> None:
    stage = Stage(tower, smallest=4)
    given = pixels(10)
    with stage.session() as session:
        got = session.run({"image": given})["image_embedding"]
    assert stage.trt.runs == [8, 4]
    np.testing.assert_array_equal(got, stage.expected(given))


def test_results_are_the_callers_and_inputs_stay(stage: Stage) -> None:
    first, second = pixels(2, 1), pixels(2, 2)
    kept = first.copy()
    with stage.session() as session:
        one = session.run({"image": first})["image_embedding"]
        before = one.copy()
        session.run({"image": second})
    np.testing.assert_array_equal(one, before)
    np.testing.assert_array_equal(first, kept)
    assert one.flags.writeable
    assert one.flags.owndata or one.base is None


def test_inputs_in_any_layout_are_taken(stage: Stage) -> None:
    given = pixels(3)[:, ::-1]
    with stage.session() as session:
        got = session.run({"image": given})["image_embedding"]
    np.testing.assert_array_equal(got, stage.expected(np.ascontiguousarray(given)))


def test_memory_is_made_once_and_grows_with_the_batch(stage: Stage) -> None:
    def allocations() -> int:
        return stage.cudart.calls.count("cudaMalloc")

    with stage.session() as session:
        for count, expected in ((2, 2), (2, 2), (1, 2), (4, 4), (3, 4), (4, 4)):
            given = pixels(count, count)
            got = session.run({"image": given})["image_embedding"]
            np.testing.assert_array_equal(got, stage.expected(given))
            assert allocations() == expected
        assert len(stage.cudart.memory) == 4  # one for input and output, on each side


def test_closing_gives_everything_back(stage: Stage) -> None:
    session = stage.session()
    session.run({"image": pixels(2)})
    session.close()
    assert not stage.cudart.memory
    assert not stage.cudart.streams
    session.close()
    with pytest.raises(BackendError, match="the session is closed"):
        session.run({"image": pixels(1)})


def test_a_session_that_is_dropped_gives_everything_back(stage: Stage) -> None:
    session = stage.session()
    session.run({"image": pixels(2)})
    del session
    gc.collect()
    assert not stage.cudart.memory
    assert not stage.cudart.streams


def test_many_threads_may_ask_at_once(stage: Stage) -> None:
    given = [pixels(1 + number % 3, number) for number in range(12)]
    got: list[Any] = [None] * len(given)

    with stage.session() as session:

        def work(start: int) -> None:
            for number in range(start, len(given), 3):
                got[number] = session.run({"image": given[number]})["image_embedding"]

        threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for asked, answer in zip(given, got, strict=True):
        np.testing.assert_array_equal(answer, stage.expected(asked))


def test_wrong_inputs_never_reach_the_gpu(stage: Stage) -> None:
    with stage.session() as session, pytest.raises(InputError, match="got dtype float32, expected uint8"):
        session.run({"image": pixels(1).astype(np.float32)})
    assert stage.trt.runs == []


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("Runtime", "TensorRT 10.3.0 cannot give a runtime"),
        (
            "deserialize_cuda_engine",
            r"cannot load the engine \(Serialization assertion failed.*\)\. Run edge",
        ),
        ("create_execution_context", "cannot make a context"),
    ],
)
def test_what_tensorrt_refuses_at_loading_is_an_error(stage: Stage, refused: str, message: str) -> None:
    stage.trt.refuse.add(refused)
    with pytest.raises(BackendError, match=rf"tensorrt-fp32 image tower: .*{message}"):
        stage.engine()
    assert not stage.cudart.streams


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("execute_async_v3", r"failed to run \(enqueueV3: .*an illegal memory access\)"),
        ("set_tensor_address", "does not take memory for 'image'"),
        ("infer_shapes", "lacks the shape of 'image'"),
        ("infer_shapes raises", r"finds no shapes for a batch of 1 \(a reshape does not fit\)"),
    ],
)
def test_what_tensorrt_refuses_at_running_is_an_error(stage: Stage, refused: str, message: str) -> None:
    with stage.session() as session:
        stage.trt.refuse.add(refused)
        with pytest.raises(BackendError, match=rf"tensorrt-fp32 image tower: TensorRT {message}"):
            session.run({"image": pixels(1)})
        stage.trt.refuse.clear()
        given = pixels(1)
        np.testing.assert_array_equal(session.run({"image": given})["image_embedding"], stage.expected(given))


def test_cuda_failing_in_a_call_is_an_error(stage: Stage) -> None:
    with stage.session() as session:
        stage.cudart.fail["cudaStreamSynchronize"] = 700
        with pytest.raises(BackendError, match=r"cudaStreamSynchronize failed: .*\(error 700\)"):
            session.run({"image": pixels(1)})


def test_no_memory_on_the_gpu_says_how_much_was_asked_for(stage: Stage) -> None:
    with stage.session() as session:
        stage.cudart.fail["cudaMalloc"] = 2
        with pytest.raises(BackendError, match=r"cudaMalloc of 6,144 bytes failed.*smaller batch"):
            session.run({"image": pixels(2)})
        stage.cudart.fail.clear()
        assert session.run({"image": pixels(2)})["image_embedding"].shape == (2, 16)


def test_nvidias_own_runtime_says_why_it_cannot_load(
    tower: TowerFiles, tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real engine, NVIDIA's real runtime, and no GPU below them."""
    prepare(model_files(tower), replace(CUDA, cache_dir=tmp_path))
    monkeypatch.setattr(CudaRuntime, "open", classmethod(lambda cls: CudaRuntime(FakeCudart())))
    with pytest.raises(BackendError, match=r"TensorRT-RTX .* cannot load the engine \(.*CUDA driver version"):
        open_session(tower, options=replace(CUDA, cache_dir=tmp_path))


# --- kernels that TensorRT-RTX compiles where it runs


def test_kernels_are_compiled_once_and_kept(stage: Stage, tmp_path: Path) -> None:
    cache = HostCache(tmp_path, writable=True)
    session = stage.session(Kernels(cache, "kernels"))
    session.run({"image": pixels(1)})
    assert cache.get("kernels") == b"fits:1;"  # though nobody has closed it: a process may be killed
    session.run({"image": pixels(2)})
    session.close()
    assert cache.get("kernels") == b"fits:1;2;"
    given = pixels(2, 5)
    with stage.session(Kernels(cache, "kernels")) as again:
        np.testing.assert_array_equal(again.run({"image": given})["image_embedding"], stage.expected(given))
    assert stage.trt.compiled == [b"1;", b"2;"]


def test_kernels_that_do_not_fit_are_replaced(stage: Stage, tmp_path: Path) -> None:
    cache = HostCache(tmp_path, writable=True)
    cache.put("kernels", b"of another driver")
    with stage.session(Kernels(cache, "kernels")) as session:
        session.run({"image": pixels(1)})
    assert cache.get("kernels") == b"fits:1;"


@pytest.mark.parametrize(
    "refused", ["create_runtime_config", "create_runtime_cache", "set_runtime_cache", "serialize"]
)
def test_kernels_that_cannot_be_kept_cost_time_alone(stage: Stage, tmp_path: Path, refused: str) -> None:
    cache = HostCache(tmp_path, writable=True)
    stage.trt.refuse.add(refused)
    given = pixels(1)
    with stage.session(Kernels(cache, "kernels")) as session:
        np.testing.assert_array_equal(session.run({"image": given})["image_embedding"], stage.expected(given))
    assert cache.get("kernels") is None


@pytest.mark.parametrize("kept", [True, False])
def test_rtx_alone_keeps_kernels_beside_the_engine(
    tower: TowerFiles, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    options = replace(CUDA, cache_dir=tmp_path)
    prepare(model_files(tower), options)
    monkeypatch.setattr(trt_module, "is_rtx", lambda trt: kept)
    monkeypatch.setattr(CudaRuntime, "open", classmethod(lambda cls: CudaRuntime(FakeCudart())))
    given: list[Kernels | None] = []

    def note(*_: Any, kernels: Kernels | None, **__: Any) -> Any:
        given.append(kernels)
        raise BackendError("loaded")

    monkeypatch.setattr(trt_module, "TrtEngine", note)
    with pytest.raises(BackendError, match=r"^loaded$"):
        open_session(tower, options=options)
    assert [kernels is not None for kernels in given] == [kept]


# --- finding the engine


def test_the_processor_runs_no_engine(tower: TowerFiles) -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"runs on a GPU, got the device 'cpu', expected 'cuda'"
    ):
        open_session(tower)


def test_a_missing_engine_says_what_to_run(bundle: Bundle, tower: TowerFiles, gpu: Gpu) -> None:
    with pytest.raises(BackendError, match=r"no engine for this host \(there is none in '.*'\)") as caught:
        open_session(tower, options=replace(CUDA, device="cuda:1"))
    assert f"Run edgeclip compile {str(bundle.path)!r} --variant tensorrt-fp32 --device cuda:1, " in str(
        caught.value
    )
    assert "as --cache-dir or RuntimeOptions(cache_dir=…)" in str(caught.value)


def test_the_engine_is_found_where_it_was_put(
    bundle: Bundle, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a bare session, by the classifier's way of opening, and under the name of the bundle."""
    loaded: list[bytes] = []

    def note(trt: Any, cuda: Any, data: bytes, **_: Any) -> Any:
        loaded.append(data)
        raise BackendError("loaded")

    monkeypatch.setattr(trt_module, "TrtEngine", note)
    monkeypatch.setattr(CudaRuntime, "open", classmethod(lambda cls: CudaRuntime(FakeCudart())))
    variant = bundle.variant("tensorrt-fp32")
    for name in ("image", "text"):
        prepared = prepare(model_files(variant.tower(name)), CUDA)
        assert prepared.path is not None
        assert prepared.path.parent == HostCache.open(COMPILED).directory
        with pytest.raises(BackendError, match=r"^loaded$"):
            open_session(variant.tower(name), options=CUDA)
        with pytest.raises(BackendError, match=r"^loaded$"):
            open_tower(bundle, variant, name, CUDA)
        assert loaded == [prepared.path.read_bytes()] * 2
        loaded.clear()


def test_a_bare_engine_file_is_loaded_as_it_is(
    tmp_path: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.engine"
    path.write_bytes(b"an engine")
    monkeypatch.setattr(CudaRuntime, "open", classmethod(lambda cls: CudaRuntime(FakeCudart())))
    with pytest.raises(BackendError, match=r"image\.engine: TensorRT-RTX .* cannot load the engine"):
        open_session(path, options=CUDA)


def test_a_bare_network_is_no_engine(tmp_path: Path, gpu: Gpu) -> None:
    model = ModelFiles(tmp_path / "image.onnx", "image.onnx", "tensorrt")
    with pytest.raises(BackendError, match=r"got no engine, expected a file \.engine or \.plan"):
        trt_module.load(model, CUDA, reason="a test")
    with pytest.raises(BackendError, match="engines are built from towers of bundles"):
        prepare(model, CUDA)


# --- building and keeping


def test_what_is_built_is_not_built_again(tower: TowerFiles, gpu: Gpu, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    options, model = replace(CUDA, cache_dir=folder), model_files(tower)
    first = prepare(model, options)
    assert not first.up_to_date
    assert first.seconds > 0
    second = prepare(model, options)
    assert (second.up_to_date, second.path, second.seconds) == (True, first.path, 0.0)
    assert not prepare(model, options, force=True).up_to_date
    other = prepare(model, options, settings=EngineSettings(batch=BatchRange(1, 2, 4)))
    assert not other.up_to_date
    assert sorted(path.suffix for path in folder.iterdir() if path.name[0] != ".") == [".engine", ".json"]
    record = json.loads(next(folder.glob("[!.]*.json")).read_text())
    assert other.path is not None
    assert record["engine"] == other.path.name
    assert record["profile"] == {"image": [[1, 32, 32, 3], [2, 32, 32, 3], [4, 32, 32, 3]]}
    assert (record["gpu"], record["compute_capability"]) == ("NVIDIA GeForce RTX 3060", "8.6")
    assert record["driver"] == "580.65.06"
    assert record["tower_digest"] == tower.digest
    assert record["build_s"] > 0


def test_tensorrt_builds_on_the_gpu_that_was_asked_for(
    tower: TowerFiles, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself builds for the current GPU of the thread and keeps what it measured."""
    module = RtxAs(import_tensorrt("tensorrt_rtx"), "10.3.0")
    cudart = FakeCudart(devices=2)
    monkeypatch.setattr(trt_module, "import_tensorrt", lambda backend: module)
    monkeypatch.setattr(CudaRuntime, "open", classmethod(lambda cls: CudaRuntime(cudart)))
    used: list[int] = []
    monkeypatch.setattr(CudaRuntime, "use", lambda self, index: used.append(index))
    folder = tmp_path / "engines"
    options = replace(CUDA, device="cuda:1", cache_dir=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # RTX's timing cache does nothing, and says so
        prepare(model_files(tower), options)
    assert used == [1]
    cache = EngineCache.of(options)
    assert cache.timing_cache("10.3.0", RTX_3060.name)
    assert cache.timing_cache("10.4.0", RTX_3060.name) == b""
    assert cache.timing_cache("10.3.0", "NVIDIA GeForce RTX 3070") == b""


def test_damage_is_seen_and_built_again(tower: TowerFiles, gpu: Gpu, tmp_path: Path) -> None:
    options, model = replace(CUDA, cache_dir=tmp_path), model_files(tower)
    path = prepare(model, options).path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BackendError, match=rf"{path.name!r} in .* is damaged\)\. Run edgeclip compile"):
        open_session(tower, options=options)
    assert not prepare(model, options).up_to_date
    assert prepare(model, options).up_to_date


@pytest.mark.parametrize(
    ("backend", "changed", "gpu", "reason"),
    [
        ("tensorrt", {"engine_version": "10.3.0"}, ORIN, r"built by version 10\.3\.0, this host has 1"),
        ("tensorrt", {}, ORIN, None),
        (
            "tensorrt",
            {},
            replace(ORIN, name="NVIDIA Orin Nano"),
            r"built on NVIDIA Orin, this host has .* Nano",
        ),
        ("tensorrt", {}, replace(ORIN, compute_capability="8.9"), r"built for compute capability 8\.7"),
        ("tensorrt_rtx", {}, replace(ORIN, name="NVIDIA Orin Nano"), None),
        ("tensorrt_rtx", {"compute_capability": None}, replace(ORIN, compute_capability="8.9"), None),
    ],
)
def test_an_engine_of_another_version_or_gpu_does_not_fit(
    backend: str, changed: dict[str, Any], gpu: Gpu, reason: str | None
) -> None:
    record = replace(make_record(backend), **changed)
    misfit = record.misfit(version="11.4.0", gpu=gpu)
    assert (misfit is None) == (reason is None)
    if reason is not None:
        assert misfit is not None
        assert re.search(reason, misfit)


def make_record(backend: str = "tensorrt") -> EngineRecord:
    return EngineRecord(
        engine="",
        size_bytes=0,
        tower_digest="ab" * 32,
        tower="tiny image tower",
        precision="fp16",
        backend=backend,
        engine_version="11.4.0",
        compute_capability="8.7",
        gpu="NVIDIA Orin",
        gpu_uuid="GPU-0",
        driver=None,
        batch="1/1/8",
        workspace_bytes=None,
        profile={"image": [[1], [1], [8]]},
        layers=3,
        build_s=1.0,
    )


def test_an_update_of_tensorrt_makes_engines_stale(
    tower: TowerFiles, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(CUDA, cache_dir=tmp_path)
    prepare(model_files(tower), options)
    path = next(tmp_path.glob("[!.]*.json"))
    record = json.loads(path.read_text())
    HostCache(tmp_path, writable=True).put(
        path.name, json.dumps({**record, "engine_version": "1.6.0"}).encode()
    )
    with pytest.raises(BackendError, match=r"it was built by version 1\.6\.0, this host has 1\.7"):
        open_session(tower, options=options)
    assert not prepare(model_files(tower), options).up_to_date


def test_a_record_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    cache = engines(tmp_path)
    stored = cache.keep(make_record(), b"engine")
    assert found(cache) == stored
    assert cache.same(make_record()) == stored
    assert cache.read(stored) == b"engine"
    (name,) = (path.name for path in tmp_path.glob("[!.]*.json"))
    for wrong in (
        b"",
        b"{}",
        b"[1]",
        json.dumps({**stored.to_dict(), "schema": 2}).encode(),
        b'{"schema": 1}',
    ):
        cache.entries.put(name, wrong)
        assert found(cache) == f"there is none in {str(tmp_path)!r}"
        assert cache.same(make_record()) is None


def engines(directory: Path) -> EngineCache:
    return EngineCache.of(RuntimeOptions(cache_dir=directory))


def found(cache: EngineCache, digest: str = "ab" * 32, **changes: Any) -> EngineRecord | str:
    asked: dict[str, Any] = {"backend": "tensorrt", "version": "11.4.0", "gpu": ORIN}
    return cache.fitting(digest, **(asked | changes))


def test_an_engine_is_found_for_its_network_and_gpu_alone(tmp_path: Path) -> None:
    cache = engines(tmp_path)
    stored = cache.keep(make_record(), b"engine")
    assert found(cache) == stored
    assert str(found(cache, gpu=RTX_3060)).endswith(
        "does not fit: it was built for compute capability 8.7, this host's NVIDIA GeForce RTX 3060 has 8.6"
    )
    assert str(found(cache, "ac" * 32)).startswith("there is none")
    assert str(found(cache, "ab" * 31 + "ac")).startswith("there is none")  # alike in what the name has of it
    assert str(found(cache, backend="tensorrt_rtx")).startswith("there is none")
    for_all = cache.keep(replace(make_record("tensorrt_rtx"), compute_capability=None, gpu=None), b"for all")
    assert found(cache, backend="tensorrt_rtx", gpu=RTX_3060) == for_all
    own = cache.keep(replace(make_record("tensorrt_rtx"), compute_capability="8.6"), b"its own")
    assert found(cache, backend="tensorrt_rtx", gpu=RTX_3060) == own
    assert found(cache, backend="tensorrt_rtx", gpu=ORIN) == for_all


@pytest.mark.parametrize(
    "changed",
    [
        {"gpu": "NVIDIA Orin Nano"},
        {"engine_version": "11.5.0"},
        {"compute_capability": "8.9"},
        {"tower_digest": "cd" * 32},
    ],
)
def test_engines_of_two_gpus_versions_and_networks_stand_side_by_side(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    cache = engines(tmp_path)
    first = cache.keep(make_record(), b"first")
    second = cache.keep(replace(make_record(), **changed), b"second")
    assert (cache.read(first), cache.read(second)) == (b"first", b"second")
    assert cache.same(make_record()) == first


@pytest.mark.parametrize("changed", [{"batch": "1/2/8"}, {"workspace_bytes": 1 << 20}])
def test_an_engine_of_other_choices_takes_the_place(tmp_path: Path, changed: dict[str, Any]) -> None:
    cache = engines(tmp_path)
    first = cache.keep(make_record(), b"first")
    other = replace(make_record(), **changed)
    assert cache.same(other) is None
    second = cache.keep(other, b"second")
    assert (cache.read(first), cache.read(second)) == (None, b"second")
    assert cache.same(make_record()) is None
    assert found(cache) == second


def test_another_variant_in_the_bundle_asks_for_no_other_engine(
    bundle: Bundle, gpu: Gpu, tmp_path: Path
) -> None:
    """The network is what it was, though the bundle has another digest."""
    first = prepare(model_files(bundle.variant("tensorrt-fp32").tower("image")), CUDA)
    with BundleWriter(bundle.path) as writer:
        writer.manifest["variants"]["onnx-again"] = writer.manifest["variants"]["onnx-fp32"]
        changed = writer.commit()
    assert changed.digest != bundle.digest
    second = prepare(model_files(changed.variant("tensorrt-fp32").tower("image")), CUDA)
    assert second.up_to_date
    assert second.path == first.path


def test_a_kill_between_engine_and_record_leaves_the_old_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = engines(tmp_path)
    old = cache.keep(make_record(), b"old")
    real = HostCache.put

    def killed(self: HostCache, name: str, data: Any) -> bool:
        if name.endswith(".json"):
            raise KeyboardInterrupt
        return real(self, name, data)

    monkeypatch.setattr(HostCache, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.keep(make_record(), b"new")
    monkeypatch.undo()
    assert found(cache) == old
    assert cache.read(old) == b"old"


def test_nowhere_to_keep_it_is_said_before_the_build(tower: TowerFiles, gpu: Gpu, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    options = replace(CUDA, cache_dir=tmp_path / "file" / "below")
    with pytest.raises(BackendError, match=r"cannot be kept in '.*below'\. Choose .* EDGECLIP_CACHE_DIR"):
        prepare(model_files(tower), options)


def test_a_disk_that_fills_up_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostCache, "put", lambda self, name, data: False)
    with pytest.raises(BackendError, match=r"tiny image tower: the engine was built and cannot be kept in"):
        engines(tmp_path).keep(make_record(), b"x")


# --- for which host


def test_a_generation_is_built_for_without_a_gpu(bundle: Bundle, tmp_path: Path) -> None:
    variant = bundle.variant("tensorrt-fp32")
    options = RuntimeOptions(cache_dir=tmp_path)
    compiled = compile_variant(variant, options=options, choices=EngineChoices(compute_capability="8.9"))
    assert [each.tower for each in compiled] == ["image", "text"]
    version = import_tensorrt("tensorrt_rtx").__version__
    record = engines(tmp_path).fitting(
        variant.tower_digest("image"),
        backend="tensorrt_rtx",
        version=version,
        gpu=replace(RTX_3060, compute_capability="8.9"),
    )
    assert isinstance(record, EngineRecord)
    assert record.gpu is None
    assert record.engine_version == version


def test_a_generation_older_than_the_variant_needs_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = add_tensorrt(tiny_bundle, requires={"compute_capability": "8.9"}, target="cuda-sm89")
    with pytest.raises(BackendUnavailableError, match=r"needs compute capability 8\.9 or newer, got '8\.6'"):
        compile_variant(
            bundle.variant("tensorrt-fp32"),
            options=RuntimeOptions(cache_dir=tmp_path),
            choices=EngineChoices(compute_capability="8.6"),
        )


@pytest.mark.parametrize("aim", ["any", "8.6"])
def test_engines_for_other_machines_are_rtxs_alone(
    aim: str, tower: TowerFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT would build for the GPU at hand, whatever is asked for."""
    monkeypatch.setattr(trt_module, "is_rtx", lambda trt: False)
    with pytest.raises(ConfigError, match=rf"got {aim!r}, expected none.*backend tensorrt_rtx"):
        prepare(
            model_files(tower),
            RuntimeOptions(cache_dir=tmp_path / "engines"),
            settings=EngineSettings(compute_capability=aim),
        )
    assert not list((tmp_path / "engines").glob("*"))


@pytest.mark.parametrize(
    ("needs", "device", "has", "reason"),
    [
        (None, "cpu", None, "it needs a GPU, and no driver is loaded"),
        (None, "cuda", None, "it needs a GPU, and no NVIDIA driver is loaded"),
        ("8.7", "cuda", None, "it needs a GPU of capability 8.7, and no NVIDIA driver is loaded"),
        (
            "8.7",
            "cuda",
            RTX_3060,
            "it needs a GPU of capability 8.7 or newer, and NVIDIA GeForce RTX 3060 has 8.6",
        ),
        ("8.7", "cpu", ORIN, "it needs a GPU of capability 8.7, and the device asked for is 'cpu'"),
        ("8.7", "cuda", ORIN, None),
        ("8.7", "cuda", replace(ORIN, compute_capability="12.0"), None),
        (None, "cuda", RTX_3060, None),
    ],
)
def test_a_host_is_told_why_it_cannot_run_a_variant(
    tiny_bundle: Path,
    needs: str | None,
    device: str,
    has: Gpu | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find_gpu(index: int = 0) -> Gpu:
        if has is None:
            raise BackendUnavailableError("no NVIDIA driver is loaded.")
        return has

    monkeypatch.setattr("edgeclip.runtime.cuda.find_gpu", find_gpu)
    bundle = add_tensorrt(tiny_bundle, requires={"compute_capability": needs} if needs else {})
    host = replace(Host.here(), gpus=() if has is None else (has.name,))
    said = unmet(bundle.variant("tensorrt-fp32"), options=RuntimeOptions(device=device), host=host)
    assert (said is None) == (reason is None), said
    if reason is not None:
        assert said is not None
        assert said.startswith(reason)


# --- verify


def test_verify_asks_for_the_gpu_by_itself_and_says_what_to_run(
    bundle: Bundle, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing engine is no wrong number: the variant was not run."""
    from edgeclip.export.verify import verify_bundle

    monkeypatch.setattr("edgeclip.runtime.cuda.find_gpu", lambda index=0: gpu)
    verdicts = {verdict.name: verdict for verdict in verify_bundle(bundle).variants}
    assert verdicts["onnx-fp32"].status == "passed"
    verdict = verdicts["tensorrt-fp32"]
    assert verdict.status == "not run"
    assert "no engine for this host" in verdict.reason
    assert "Run edgeclip compile" in verdict.reason
