"""CUDA through ctypes, against NVIDIA's own libcudart where it is installed and against a stand-in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCudart, fake_driver

from edgeclip.errors import BackendError, BackendUnavailableError
from edgeclip.runtime import cuda as cuda_module
from edgeclip.runtime.cuda import CudaRuntime, find_gpu


@pytest.fixture(autouse=True)
def _no_known_gpus() -> Iterator[None]:
    find_gpu.cache_clear()
    yield
    find_gpu.cache_clear()


def _has_gpu() -> bool:
    try:
        find_gpu()
    except BackendUnavailableError:
        return False
    finally:
        find_gpu.cache_clear()
    return True


def test_nvidias_own_runtime_has_every_function_and_says_that_there_is_no_gpu() -> None:
    library = cuda_module._load(cuda_module._runtime_names())
    if library is None:
        pytest.skip("libcudart is not installed")
    runtime = CudaRuntime(library)
    if _has_gpu():
        assert runtime.device_count() > 0
        return
    # 35 without a driver, 100 with one that sees no GPU; the words are NVIDIA's
    with pytest.raises(BackendUnavailableError, match=r"cudaGetDeviceCount failed: .*\(error (35|100)\)"):
        runtime.device_count()
    with pytest.raises(BackendUnavailableError, match=r"cudaMalloc of 1,048,576 bytes failed"):
        runtime.allocate(1 << 20)
    with pytest.raises(BackendUnavailableError, match=r"cudaGetDeviceCount failed"):
        CudaRuntime.open()


def test_a_runtime_that_is_too_new_for_the_driver_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    newest, older = FakeCudart(), FakeCudart(devices=3)
    libraries = {"libcudart.so.13": newest, "libcudart.so.12": older}
    monkeypatch.setattr(cuda_module, "_load", lambda names: libraries.get(names[0]))
    newest.fail["cudaGetDeviceCount"] = 35
    assert CudaRuntime.open().device_count() == 3
    older.fail["cudaGetDeviceCount"] = 100
    with pytest.raises(BackendUnavailableError, match=r"\(error 35\)\. Update the NVIDIA driver"):
        CudaRuntime.open()


def test_bytes_go_to_the_device_and_back() -> None:
    library = FakeCudart()
    runtime = CudaRuntime(library)
    runtime.use(0)
    stream = runtime.create_stream()
    device = runtime.allocate(64)
    source, target = runtime.allocate_host(64), runtime.allocate_host(64)
    sent = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8)
    ctypes.memmove(source, sent.ctypes.data, 64)
    runtime.to_device(device, source, 64, stream)
    runtime.to_host(target, device, 64, stream)
    runtime.synchronize(stream)
    assert ctypes.string_at(target, 64) == sent.tobytes()
    runtime.free(device)
    runtime.free_host(source)
    runtime.free_host(target)
    runtime.destroy_stream(stream)
    assert not library.memory
    assert not library.streams


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        (2, BackendError, "smaller batch"),
        (35, BackendUnavailableError, "Update the NVIDIA driver"),
        (100, BackendUnavailableError, "CUDA_VISIBLE_DEVICES"),
        (719, BackendError, "in a new process"),
    ],
)
def test_a_code_becomes_a_sentence_and_is_forgotten(code: int, kind: type[Exception], advice: str) -> None:
    library = FakeCudart()
    library.fail["cudaMalloc"] = code
    expected = rf"cudaMalloc of 4,096 bytes failed: a fault of the stand-in \(error {code}\)\..*{advice}"
    with pytest.raises(BackendError, match=expected) as caught:
        CudaRuntime(library).allocate(4096)
    assert type(caught.value) is kind
    assert library.forgotten == 1


@pytest.mark.parametrize(
    "name",
    ["cudaSetDevice", "cudaFree", "cudaFreeHost", "cudaStreamSynchronize", "cudaStreamDestroy"],
)
def test_every_function_is_checked(name: str) -> None:
    library = FakeCudart()
    library.fail[name] = 719
    runtime = CudaRuntime(library)
    call = {
        "cudaSetDevice": runtime.use,
        "cudaFree": runtime.free,
        "cudaFreeHost": runtime.free_host,
        "cudaStreamSynchronize": runtime.synchronize,
        "cudaStreamDestroy": runtime.destroy_stream,
    }[name]
    with pytest.raises(BackendError, match=rf"{name} failed: .* \(error 719\)"):
        call(0)


def test_copies_and_streams_are_checked() -> None:
    library = FakeCudart()
    library.fail.update(cudaMemcpyAsync=1, cudaStreamCreate=3, cudaMallocHost=2, cudaGetDeviceCount=100)
    runtime = CudaRuntime(library)
    with pytest.raises(BackendError, match=r"cudaMemcpyAsync failed: .* \(error 1\)"):
        runtime.to_device(1, 2, 3, 4)
    with pytest.raises(BackendError, match=r"cudaMemcpyAsync failed"):
        runtime.to_host(1, 2, 3, 4)
    with pytest.raises(BackendError, match=r"cudaStreamCreate failed"):
        runtime.create_stream()
    with pytest.raises(BackendError, match=r"cudaMallocHost of 7 bytes failed"):
        runtime.allocate_host(7)
    with pytest.raises(BackendUnavailableError, match=r"cudaGetDeviceCount failed"):
        runtime.device_count()


def test_a_library_without_a_function_is_named() -> None:
    library = FakeCudart()
    del library.cudaStreamCreate  # type: ignore[attr-defined]  # defined by name
    with pytest.raises(BackendUnavailableError, match=r"libcudart has no function 'cudaStreamCreate'"):
        CudaRuntime(library)


def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_runtime_names", lambda: ["libcudart-none.so.1"])
    with pytest.raises(BackendUnavailableError, match=r"tried libcudart-none\.so\.1.*nvidia-cuda-runtime"):
        CudaRuntime.open()


def test_a_runtime_from_a_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcudart.so.13").write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(folder / "libcudart.so.13") in cuda_module._runtime_names()


# --- the driver


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_load", lambda names: fake_driver())
    gpu = find_gpu()
    assert (gpu.name, gpu.compute_capability, gpu.cuda, gpu.index) == ("NVIDIA Orin", "8.7", "12.6", 0)
    assert gpu.uuid == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_an_index_beyond_the_last_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_load", lambda names: fake_driver(gpus=2))
    with pytest.raises(BackendUnavailableError, match=r"got 'cuda:5', this host has 2 GPU"):
        find_gpu(5)


def test_what_the_driver_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_load", lambda names: fake_driver(init=100))
    with pytest.raises(
        BackendUnavailableError,
        match=r"cuInit failed: no CUDA-capable device is detected \(100\)\. Make a GPU",
    ):
        find_gpu()


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "_load", lambda names: None)
    with pytest.raises(BackendUnavailableError, match=r"no NVIDIA driver is loaded \(libcuda"):
        find_gpu()


def test_an_old_driver_without_a_function_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_driver()
    del library.cuDeviceGetUuid
    monkeypatch.setattr(cuda_module, "_load", lambda names: library)
    with pytest.raises(BackendUnavailableError, match=r"the NVIDIA driver has no function 'cuDeviceGetUuid'"):
        find_gpu()


def test_arguments_of_the_stand_in_are_those_of_the_product() -> None:
    """A stand-in that took other types would prove nothing."""
    library = FakeCudart()
    before = {name: getattr(library, name) for name in cuda_module._RUNTIME_FUNCTIONS}
    declared = {name: tuple(function.argtypes) for name, function in before.items()}
    CudaRuntime(library)
    assert {name: tuple(function.argtypes) for name, function in before.items()} == declared
