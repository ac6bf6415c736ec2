"""Stand-ins for libcudart, libcuda and TensorRT's runtime, for machines without a GPU.

The libraries are real C function pointers that call back into Python, so that what the product does at the
ctypes boundary (types, addresses, codes) is done for real; "GPU" memory is ordinary memory. The stand-in
engine runs the ONNX file it was "built" from with ONNX Runtime, reading and writing the very addresses it was
given: if a buffer, shape or copy were wrong, so would be its numbers.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_int, c_size_t, c_uint, c_void_p
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgeclip.bundle import TowerFiles
from edgeclip.runtime.cuda import CudaRuntime
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.runtime.session import OpenSession, Placement, model_files
from edgeclip.runtime.trt import TrtEngine

__all__ = ["FakeCudart", "FakeTensorRT", "RtxAs", "fake_driver", "open_on_stand_ins"]

NO_DEVICE, OUT_OF_MEMORY, ILLEGAL_ADDRESS = 100, 2, 700


class FakeCudart:
    """A libcudart whose memory is the host's. ``fail[name] = code`` lets a function fail."""

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.fail: dict[str, int] = {}
        self.memory: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.calls: list[str] = []
        self.forgotten = 0
        self._define("cudaGetDeviceCount", self._device_count, POINTER(c_int))
        self._define("cudaSetDevice", lambda index: 0 if index < self.devices else 101, c_int)
        self._define("cudaMalloc", self._allocate, POINTER(c_void_p), c_size_t)
        self._define("cudaMallocHost", self._allocate, POINTER(c_void_p), c_size_t)
        self._define("cudaFree", self._free, c_void_p)
        self._define("cudaFreeHost", self._free, c_void_p)
        self._define("cudaMemcpyAsync", self._copy, c_void_p, c_void_p, c_size_t, c_int, c_void_p)
        self._define("cudaStreamCreate", self._create_stream, POINTER(c_void_p))
        self._define("cudaStreamSynchronize", lambda stream: 0 if stream in self.streams else 400, c_void_p)
        self._define("cudaStreamDestroy", self._destroy_stream, c_void_p)
        self._define("cudaGetLastError", self._last_error)
        text = ctypes.create_string_buffer(b"a fault of the stand-in")
        self._text = text
        self.cudaGetErrorString = CFUNCTYPE(c_void_p, c_int)(lambda code: ctypes.addressof(text))

    def _define(self, name: str, function: Callable[..., int], *arguments: Any) -> None:
        def call(*given: Any) -> int:
            self.calls.append(name)
            return self.fail.get(name) or function(*given)

        setattr(self, name, CFUNCTYPE(c_int, *arguments)(call))

    def _device_count(self, count: Any) -> int:
        count[0] = self.devices
        return 0 if self.devices else NO_DEVICE

    def _allocate(self, address: Any, size_bytes: int) -> int:
        memory = ctypes.create_string_buffer(size_bytes)
        address[0] = ctypes.addressof(memory)
        self.memory[ctypes.addressof(memory)] = memory
        return 0

    def _free(self, address: int) -> int:
        return 0 if self.memory.pop(address, None) is not None else 1

    def _copy(self, target: int, source: int, size_bytes: int, kind: int, stream: int) -> int:
        for address in (target, source):
            if address not in self.memory or size_bytes > len(self.memory[address]):
                return ILLEGAL_ADDRESS
        if stream not in self.streams or kind not in (1, 2):
            return 1
        ctypes.memmove(target, source, size_bytes)
        return 0

    def _create_stream(self, stream: Any) -> int:
        stream[0] = 0x1000 + len(self.streams)
        self.streams.add(stream[0])
        return 0

    def _destroy_stream(self, stream: int) -> int:
        self.streams.remove(stream)
        return 0

    def _last_error(self) -> int:
        self.forgotten += 1
        return 0


def fake_driver(
    *, gpus: int = 1, name: bytes = b"NVIDIA Orin", capability: tuple[int, int] = (8, 7), init: int = 0
) -> Any:
    """Return a libcuda with so many GPUs."""

    def put(value: int) -> Callable[..., int]:
        def function(target: Any, *_: Any) -> int:
            target[0] = value
            return 0

        return function

    def get_name(target: int, length: int, device: int) -> int:
        ctypes.memmove(target, name + b"\0", min(length, len(name) + 1))
        return 0

    def get_uuid(target: int, device: int) -> int:
        ctypes.memmove(target, bytes(range(16)), 16)
        return 0

    def get_attribute(target: Any, attribute: int, device: int) -> int:
        target[0] = {75: capability[0], 76: capability[1]}[attribute]
        return 0

    message = ctypes.create_string_buffer(b"no CUDA-capable device is detected")

    def describe(code: int, target: Any) -> int:
        target[0] = ctypes.addressof(message)
        return 0

    return SimpleNamespace(
        message=message,
        cuInit=CFUNCTYPE(c_int, c_uint)(lambda flags: init),
        cuDriverGetVersion=CFUNCTYPE(c_int, POINTER(c_int))(put(12060)),
        cuDeviceGetCount=CFUNCTYPE(c_int, POINTER(c_int))(put(gpus)),
        cuDeviceGet=CFUNCTYPE(c_int, POINTER(c_int), c_int)(put(0)),
        cuDeviceGetName=CFUNCTYPE(c_int, c_void_p, c_int, c_int)(get_name),
        cuDeviceGetUuid=CFUNCTYPE(c_int, c_void_p, c_int)(get_uuid),
        cuDeviceGetAttribute=CFUNCTYPE(c_int, POINTER(c_int), c_int, c_int)(get_attribute),
        cuGetErrorString=CFUNCTYPE(c_int, c_int, POINTER(c_void_p))(describe),
    )


class FakeTensorRT:
    """A module whose engines run on ONNX Runtime. ``refuse`` names the calls that fail, as TensorRT does.

    An "engine" is an ONNX file with one line before it: the smallest, best and largest batch.
    """

    __name__ = "tensorrt"
    __version__ = "10.3.0"

    def __init__(self, cudart: FakeCudart) -> None:
        self.cudart = cudart
        self.refuse: set[str] = set()
        self.runs: list[int] = []
        self.compiled: list[bytes] = []
        self.information = ""
        """What the engine inspector says; each of its layers is reported as a millisecond a row."""

        class Severity:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class ILogger:
            pass

        ILogger.Severity = Severity  # type: ignore[attr-defined]
        self.ILogger = ILogger
        self.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")

        class IProfiler:
            pass

        self.IProfiler = IProfiler
        self.LayerInformationFormat = SimpleNamespace(JSON="json")

    @staticmethod
    def engine(onnx_bytes: bytes, smallest: int = 1, best: int = 1, largest: int = 8) -> bytes:
        return f"{smallest} {best} {largest}\n".encode() + onnx_bytes

    def Runtime(self, logger: Any) -> Any:  # TensorRT's name
        if "Runtime" in self.refuse:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(data, logger))

    def _engine(self, data: bytes, logger: Any) -> Any:
        if "deserialize_cuda_engine" in self.refuse:
            logger.log(1, "Serialization assertion failed: stdVersionRead == kSERIALIZATION_VERSION")
            return None
        return _FakeEngine(self, data, logger)


class RtxAs:
    """TensorRT-RTX under TensorRT's name and another version: what it makes is real, its flags are noted."""

    def __init__(self, real: Any, version: str) -> None:
        self._real = real
        self.__name__ = f"tensorrt as {version}"
        self.__version__ = version
        self.flags: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Builder(self, logger: Any) -> Any:
        """Return a builder that notes the flags of its networks."""
        real, flags = self._real.Builder(logger), self.flags

        class Noting:
            def create_network(self, value: int) -> Any:
                flags.append(value)
                return real.create_network(value)

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        return Noting()


def open_on_stand_ins(tower: TowerFiles) -> OpenSession:
    """Open a tower as the backend would on a GPU."""
    cudart = FakeCudart()
    trt = FakeTensorRT(cudart)
    chosen = Placement("tensorrt", "TensorRT 10.3.0", "cuda:0", 1, tower.precision, "a test")
    model = model_files(tower)
    data = FakeTensorRT.engine(tower.model.read_bytes())
    engine = TrtEngine(trt, CudaRuntime(cudart), data, model=model, chosen=chosen, index=0)
    return OpenSession(engine, name=model.name)


class _FakeEngine:
    def __init__(self, trt: FakeTensorRT, data: bytes, logger: Any) -> None:
        line, _, graph = data.partition(b"\n")
        self.trt, self.logger = trt, logger
        self.profile = tuple(map(int, line.split()))
        self.session = import_onnxruntime().InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.io = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.io)

    def get_tensor_name(self, index: int) -> str:
        return str(self.io[index].name)

    def _of(self, name: str) -> Any:
        return next(argument for argument in self.io if argument.name == name)

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in {argument.name for argument in self.session.get_inputs()} else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"tensor(uint8)": "UINT8", "tensor(int32)": "INT32", "tensor(float)": "FLOAT"}
        return SimpleNamespace(name=kinds[self._of(name).type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._of(name).shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(size, *self.get_tensor_shape(name)[1:]) for size in self.profile]

    def create_execution_context(self, running: Any = None) -> Any:
        return None if "create_execution_context" in self.trt.refuse else _FakeContext(self, running)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: self.trt.information)

    def create_runtime_config(self) -> Any:
        return None if "create_runtime_config" in self.trt.refuse else _FakeRuntimeConfig(self.trt)


class _FakeRuntimeConfig:
    """Takes kernels that "fit", which are those that begin so, and adds one for each new batch."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        self.kernels: Any = None

    def create_runtime_cache(self) -> Any:
        if "create_runtime_cache" in self.trt.refuse:
            return None
        cache = SimpleNamespace(blob=b"fits:", refuse=self.trt.refuse)

        def deserialize(blob: bytes) -> bool:
            if blob.startswith(b"fits:"):
                cache.blob = bytes(blob)
            return blob.startswith(b"fits:")

        cache.deserialize = deserialize
        cache.serialize = lambda: None if "serialize" in cache.refuse else cache.blob
        return cache

    def set_runtime_cache(self, cache: Any) -> bool:
        self.kernels = cache
        return "set_runtime_cache" not in self.trt.refuse


class _FakeContext:
    def __init__(self, engine: _FakeEngine, running: Any) -> None:
        self.engine = engine
        self.kernels = None if running is None else running.kernels
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profiler: Any = None
        self.enqueue_emits_profile = True

    def report_to_profiler(self) -> bool:
        if (
            self.profiler is None
            or self.enqueue_emits_profile
            or "report_to_profiler" in self.engine.trt.refuse
        ):
            return False
        for layer in json.loads(self.engine.trt.information)["Layers"]:
            self.profiler.report_layer_time(layer["Name"], float(self.engine.trt.runs[-1]))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profile
        if not low <= shape[0] <= high and self.engine.get_tensor_shape(name)[0] == -1:
            self.engine.logger.log(1, f"Supplied binding dimension {shape} is outside the profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return "set_tensor_address" not in self.engine.trt.refuse

    def infer_shapes(self) -> list[str]:
        if "infer_shapes raises" in self.engine.trt.refuse:
            self.engine.logger.log(1, "a reshape does not fit")
            raise RuntimeError("shape inference failed")
        return ["image"] if "infer_shapes" in self.engine.trt.refuse else []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = next(iter(self.shapes.values()))[0]
        return (rows, *self.engine.get_tensor_shape(name)[1:])

    def execute_async_v3(self, stream: int) -> bool:
        if "execute_async_v3" in self.engine.trt.refuse or stream not in self.engine.trt.cudart.streams:
            self.engine.logger.log(1, "enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access)")
            return False
        feeds = {
            argument.name: self._array(argument.name, self.shapes[argument.name])
            for argument in self.engine.session.get_inputs()
        }
        if self.kernels is not None:
            kernel = b"%d;" % self.shapes[next(iter(feeds))][0]
            if kernel not in self.kernels.blob:
                self.engine.trt.compiled.append(kernel)
                self.kernels.blob += kernel
        names = [argument.name for argument in self.engine.session.get_outputs()]
        self.engine.trt.runs.append(len(next(iter(feeds.values()))))
        for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
            self._array(name, value.shape)[...] = value
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> Any:
        kind = {"UINT8": np.uint8, "INT32": np.int32, "FLOAT": np.float32}
        dtype = np.dtype(kind[self.engine.get_tensor_dtype(name).name])
        memory = self.engine.trt.cudart.memory[self.addresses[name]]
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        assert size_bytes <= len(memory), "the engine was given too little memory"
        return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)
