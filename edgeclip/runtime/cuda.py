"""CUDA through ctypes: what GPU is here (``libcuda``), and memory and streams on it (``libcudart``).

No torch and no pycuda: a device that runs TensorRT has both libraries already. Every return code is checked
and becomes a sentence. Names and signatures: CUDA Driver API 13.0 §6.2, §6.5; CUDA Runtime API 13.0 §6.1,
§6.3, §6.4, §6.10; the same since CUDA 11.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgeclip.errors import BackendError, BackendUnavailableError

__all__ = ["CudaRuntime", "Gpu", "find_gpu"]

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_TO_DEVICE, _TO_HOST = 1, 2

_DRIVER_FUNCTIONS: Final[dict[str, list[Any]]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetUuid": [c_char_p, c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
}
_RUNTIME_FUNCTIONS: Final[dict[str, list[Any]]] = {
    "cudaGetDeviceCount": [POINTER(c_int)],
    "cudaSetDevice": [c_int],
    "cudaMalloc": [POINTER(c_void_p), c_size_t],
    "cudaFree": [c_void_p],
    "cudaMallocHost": [POINTER(c_void_p), c_size_t],
    "cudaFreeHost": [c_void_p],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaStreamCreate": [POINTER(c_void_p)],
    "cudaStreamSynchronize": [c_void_p],
    "cudaStreamDestroy": [c_void_p],
}
# What to do about the failures a user can do something about.
_ADVICE: Final = {
    2: "Use a smaller batch, or free memory of the GPU.",
    35: "Update the NVIDIA driver, or install a CUDA runtime that it supports.",
    100: "Make a GPU visible to this process (CUDA_VISIBLE_DEVICES, container options).",
}


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        index: as in ``cuda:N``.
        name: as the driver calls it.
        uuid: of this very board, ``"GPU-…"``.
        compute_capability: ``"8.7"``.
        cuda: newest CUDA version that the driver supports, ``"13.0"``.
        driver: version of the driver; ``None`` where the system does not tell.
    """

    index: int
    name: str
    uuid: str
    compute_capability: str
    cuda: str
    driver: str | None


@functools.lru_cache(maxsize=8)
def find_gpu(index: int = 0) -> Gpu:
    """Return the facts of a GPU. The first call starts the driver in this process: do not fork after it.

    Raises:
        BackendUnavailableError: no driver, no GPU, or none of that index.
    """
    library = _load(_driver_names())
    if library is None:
        raise BackendUnavailableError(
            f"no NVIDIA driver is loaded ({_driver_names()[0]} is not found): use a host with an NVIDIA GPU."
        )
    driver = _Functions(library, _DRIVER_FUNCTIONS, "the NVIDIA driver")

    def ask(name: str, *arguments: Any) -> None:
        code = driver.call(name, *arguments)
        if code:
            said = c_char_p()
            driver.call("cuGetErrorString", code, byref(said))
            reason = (said.value or b"unknown error").decode("utf-8", "replace")
            advice = _ADVICE.get(code, "Check the driver with nvidia-smi.")
            raise BackendUnavailableError(f"the NVIDIA driver: {name} failed: {reason} ({code}). {advice}")

    ask("cuInit", 0)
    count, device, version = c_int(), c_int(), c_int()
    ask("cuDeviceGetCount", byref(count))
    if index >= count.value:
        raise BackendUnavailableError(f"device: got 'cuda:{index}', this host has {count.value} GPU(s).")
    ask("cuDeviceGet", byref(device), index)
    ask("cuDriverGetVersion", byref(version))
    name, uuid = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    ask("cuDeviceGetName", name, len(name), device)
    ask("cuDeviceGetUuid", uuid, device)
    major, minor = c_int(), c_int()
    ask("cuDeviceGetAttribute", byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    ask("cuDeviceGetAttribute", byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    digits = uuid.raw.hex()
    return Gpu(
        index=index,
        name=name.value.decode("utf-8", "replace"),
        uuid="GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])),
        compute_capability=f"{major.value}.{minor.value}",
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
        driver=_driver_version(),
    )


class CudaRuntime:
    """Memory, copies and streams. Every call raises where CUDA says no.

    A GPU belongs to a thread: call :meth:`use` first in each thread.
    """

    def __init__(self, library: Any) -> None:
        self._functions = _Functions(library, _RUNTIME_FUNCTIONS, "libcudart")
        self._describe = library.cudaGetErrorString
        self._describe.argtypes, self._describe.restype = [c_int], c_char_p
        self._forget = library.cudaGetLastError

    @classmethod
    def open(cls) -> CudaRuntime:
        """Load the newest ``libcudart`` that works with the driver.

        Raises:
            BackendUnavailableError: none is here, or the driver is too old for all of them, or sees no GPU.
        """
        names = _runtime_names()
        problem = BackendUnavailableError(
            f"the CUDA runtime is not here (tried {', '.join(names[:4])} and others): run pip install "
            "nvidia-cuda-runtime, or install the CUDA toolkit."
        )
        found = 0
        for name in names:
            library = _load([name])
            if library is None:
                continue
            found += 1
            try:
                runtime = cls(library)
                runtime.device_count()
            except BackendUnavailableError as error:
                if found == 1:
                    problem = error
                continue
            return runtime
        raise problem

    def device_count(self) -> int:
        """Return how many GPUs there are."""
        count = c_int()
        self._call("cudaGetDeviceCount", byref(count))
        return count.value

    def use(self, index: int) -> None:
        """Let this thread's calls mean the GPU ``index``."""
        self._call("cudaSetDevice", index)

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new memory on the GPU."""
        return self._address("cudaMalloc", size_bytes)

    def free(self, address: int) -> None:
        """Give memory of the GPU back."""
        self._call("cudaFree", address)

    def allocate_host(self, size_bytes: int) -> int:
        """Return the address of new page-locked memory of the host, which copies at full speed."""
        return self._address("cudaMallocHost", size_bytes)

    def free_host(self, address: int) -> None:
        """Give page-locked memory back."""
        self._call("cudaFreeHost", address)

    def create_stream(self) -> int:
        """Return a new stream."""
        stream = c_void_p()
        self._call("cudaStreamCreate", byref(stream))
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until everything in a stream is done; errors of earlier calls arrive here too."""
        self._call("cudaStreamSynchronize", stream)

    def to_device(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Begin to copy from host memory to the GPU."""
        self._call("cudaMemcpyAsync", target, source, size_bytes, _TO_DEVICE, stream)

    def to_host(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Begin to copy from the GPU to host memory."""
        self._call("cudaMemcpyAsync", target, source, size_bytes, _TO_HOST, stream)

    def _address(self, name: str, size_bytes: int) -> int:
        address = c_void_p()
        self._call(name, byref(address), size_bytes, size_bytes=size_bytes)
        return address.value or 0

    def _call(self, name: str, *arguments: Any, size_bytes: int | None = None) -> None:
        code = self._functions.call(name, *arguments)
        if code == 0:
            return
        self._forget()  # else the next library that asks CUDA for its last error takes this one for its own
        said = (self._describe(code) or b"unknown error").decode("utf-8", "replace")
        what = name if size_bytes is None else f"{name} of {size_bytes:,} bytes"
        advice = _ADVICE.get(code, "Open the session again in a new process.")
        kind = BackendUnavailableError if code in (35, 100) else BackendError
        raise kind(f"CUDA: {what} failed: {said} (error {code}). {advice}")


class _Functions:
    """Functions of a library that return a code, with their argument types declared."""

    def __init__(self, library: Any, signatures: dict[str, list[Any]], what: str) -> None:
        self._functions: dict[str, Any] = {}
        for name, arguments in signatures.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise BackendUnavailableError(
                    f"{what} has no function {name!r}: update the NVIDIA driver and the CUDA runtime."
                ) from error
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function

    def call(self, name: str, *arguments: Any) -> int:
        code: int = self._functions[name](*arguments)
        return code


def _load(names: list[str]) -> Any | None:
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _driver_names() -> list[str]:
    return ["nvcuda.dll"] if sys.platform == "win32" else ["libcuda.so.1", "libcuda.so"]


def _runtime_names() -> list[str]:
    """Return where the CUDA runtime may be: the system's, a toolkit's, one from a package; newest first."""
    if sys.platform == "win32":
        names = ["cudart64_13.dll", "cudart64_12.dll", "cudart64_110.dll"]
        return [*names, *_packaged("bin", "cudart64_*.dll")]
    names = ["libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return [*names, f"{toolkit}/lib64/libcudart.so", "libcudart.so", *_packaged("lib", "libcudart.so.*")]


def _packaged(folder: str, pattern: str) -> Iterator[str]:
    """Yield the libraries of the packages nvidia-cuda-runtime, whose folders have changed over time."""
    for directory in sys.path:
        root = Path(directory or ".") / "nvidia"
        for found in (root / "cuda_runtime", *sorted(root.glob("cu[0-9]*"), reverse=True)):
            yield from map(str, sorted((found / folder).glob(pattern), reverse=True))


def _driver_version() -> str | None:
    for path in ("/sys/module/nvidia/version", "/proc/driver/nvidia/version"):
        with contextlib.suppress(OSError):
            match = re.search(r"\d+\.\d+(\.\d+)*", Path(path).read_text("utf-8", errors="replace"))
            if match:
                return match[0]
    return None
