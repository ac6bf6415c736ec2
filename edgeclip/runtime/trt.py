"""TensorRT and TensorRT-RTX: run engines that ``edgeclip compile`` built on this host.

Loading never builds: that takes seconds to minutes. One engine has one stream, one context and buffers on the
GPU that are made once and grow with the batch, so that a call copies in, runs and copies out; batches outside
the engine's profile are cut or filled up. Not for many threads at once. CUDA is reached through ctypes
(``runtime/cuda.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgeclip.cache import HostCache
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError
from edgeclip.runtime.cuda import CudaRuntime, Gpu, find_gpu
from edgeclip.runtime.session import (
    KernelTime,
    ModelFiles,
    Placement,
    Prepared,
    RuntimeOptions,
    TensorSpec,
    parse_device,
    resolve_backend,
)
from edgeclip.runtime.trt_build import BatchRange, EngineLog, build_engine, import_tensorrt, is_rtx
from edgeclip.runtime.trt_cache import EngineCache, EngineRecord
from edgeclip.runtime.trt_profile import LayerTimes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["EngineSettings", "Kernels", "TrtEngine", "load", "load_profiled", "prepare"]

_ENGINE_SUFFIXES: Final = (".engine", ".plan")
_DTYPES: Final = {
    "UINT8": "uint8",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "HALF": "float16",
    "FLOAT": "float32",
}


# --- building ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineSettings:
    """Choices for a build.

    Attributes:
        batch: batches the engine is for.
        compute_capability: build for this GPU generation instead of the GPU at hand (TensorRT-RTX alone);
            ``"any"`` for all that it supports.
        workspace_bytes: see :func:`edgeclip.runtime.trt_build.build_engine`.
    """

    batch: BatchRange = field(default_factory=BatchRange)
    compute_capability: str | None = None
    workspace_bytes: int | None = None


def prepare(
    model: ModelFiles,
    options: RuntimeOptions,
    *,
    settings: EngineSettings | None = None,
    force: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Build the engine of a tower and keep it, unless one that fits is there.

    Args:
        model: a tower of a bundle.
        options: backend, device (``cuda:N``) and where engines are kept.
        settings: choices for the build.
        force: build although there is one.
        on_progress: told the stages; what it raises ends the build.

    Raises:
        BackendUnavailableError: no TensorRT, no GPU, or a generation that cannot be built for.
        BackendError: the build failed, or its result cannot be kept.
    """
    settings = settings or EngineSettings()
    if model.digest is None:
        raise BackendError(f"{model.name}: engines are built from towers of bundles, got a bare file.")
    backend, _ = resolve_backend(model.format, options)
    trt = import_tensorrt(backend)
    version = str(trt.__version__)
    cache = EngineCache.of(options)
    gpu = None if settings.compute_capability is not None else _gpu(model, options)
    capability = gpu.compute_capability if gpu is not None else settings.compute_capability
    aim = None if capability == "any" else capability
    if settings.compute_capability is not None and not is_rtx(trt):
        raise ConfigError(
            f"compute capability: got {capability!r}, expected none: TensorRT builds for the GPU at hand. "
            "Choose the backend tensorrt_rtx, or build on the device."
        )
    record = EngineRecord(
        engine="",
        size_bytes=0,
        tower_digest=model.digest,
        tower=model.name,
        precision=model.precision,
        backend=backend,
        engine_version=version,
        compute_capability=aim,
        gpu=None if gpu is None else gpu.name,
        gpu_uuid=None if gpu is None else gpu.uuid,
        driver=None if gpu is None else gpu.driver,
        batch=str(settings.batch),
        workspace_bytes=settings.workspace_bytes,
    )
    kept = None if force else cache.same(record)
    if kept is not None and cache.read(kept) is not None:
        return Prepared(cache.entries.path(kept.engine), kept.size_bytes, 0.0, up_to_date=True)
    if not cache.entries.writable:
        raise BackendError(
            f"{model.name}: its engine cannot be kept in {cache.where}. Choose a directory that can be "
            "written with -o or EDGECLIP_CACHE_DIR."
        )
    began = time.perf_counter()
    if gpu is not None and not is_rtx(trt):
        CudaRuntime.open().use(gpu.index)  # TensorRT builds for the GPU of the calling thread
    built = build_engine(
        trt,
        model.model,
        name=model.name,
        batch=settings.batch,
        compute_capability=aim if is_rtx(trt) else None,
        workspace_bytes=settings.workspace_bytes,
        timing_cache=b"" if gpu is None else cache.timing_cache(version, gpu.name),
        on_progress=on_progress,
    )
    if gpu is not None and built.timing_cache is not None:
        cache.keep_timing_cache(version, gpu.name, built.timing_cache)
    stored = cache.keep(
        replace(
            record,
            profile={name: [list(shape) for shape in shapes] for name, shapes in built.profile.items()},
            layers=built.layers,
            build_s=round(built.build_s, 3),
        ),
        built.data,
    )
    path = cache.entries.path(stored.engine)
    return Prepared(path, stored.size_bytes, time.perf_counter() - began, up_to_date=False)


# --- running ----------------------------------------------------------------------------------------------


def load(model: ModelFiles, options: RuntimeOptions, *, reason: str) -> TrtEngine:
    """Load the engine of a tower onto the GPU.

    Args:
        model: a tower whose engine was built, or a bare engine file.
        options: device (``cuda:N``); ``cache_dir`` instead of the host cache.
        reason: why this backend, kept in :class:`Placement`.

    Raises:
        BackendUnavailableError: no TensorRT, no GPU, no CUDA runtime, or no engine built for this host.
        BackendError: the engine does not load.
    """
    backend, _ = resolve_backend(model.format, options)
    gpu = _gpu(model, options)
    trt = import_tensorrt(backend)
    data, kernels = _engine_bytes(trt, backend, model, options, gpu)
    placement = Placement(
        backend=backend,
        provider=f"{'TensorRT-RTX' if is_rtx(trt) else 'TensorRT'} {trt.__version__}",
        device=f"cuda:{gpu.index}",
        threads=1,
        precision=model.precision,
        reason=f"{reason}; engine for {gpu.name} from {'a file' if model.digest is None else 'the cache'}",
    )
    return TrtEngine(
        trt, CudaRuntime.open(), data, model=model, chosen=placement, index=gpu.index, kernels=kernels
    )


def load_profiled(model: ModelFiles, options: RuntimeOptions, *, folder: Path) -> TrtEngine:
    """Load the engine of a tower so that its layers are timed; :meth:`TrtEngine.kernel_times` reads it.

    Args:
        model: as for :func:`load`.
        options: as for :func:`load`.
        folder: not used; other backends write there.

    Raises:
        BackendUnavailableError: as :func:`load`.
        BackendError: as :func:`load`.
    """
    loaded = load(model, options, reason="to be profiled")
    loaded.time_layers()
    return loaded


def _gpu(model: ModelFiles, options: RuntimeOptions) -> Gpu:
    kind, index = parse_device(options.device)
    if kind != "cuda":
        raise BackendUnavailableError(
            f"{model.name}: TensorRT runs on a GPU, got the device {options.device!r}, expected 'cuda' or "
            "'cuda:N'."
        )
    return find_gpu(index)


def _engine_bytes(
    trt: Any, backend: str, model: ModelFiles, options: RuntimeOptions, gpu: Gpu
) -> tuple[bytes, Kernels | None]:
    """Return an engine, and where TensorRT-RTX may keep the kernels it compiles for it."""
    if model.digest is None:
        if model.model.suffix not in _ENGINE_SUFFIXES:
            raise BackendError(
                f"{model.name}: got no engine, expected a file {' or '.join(_ENGINE_SUFFIXES)}."
            )
        return model.model.read_bytes(), None
    cache = EngineCache.of(options)
    found = cache.fitting(model.digest, backend=backend, version=str(trt.__version__), gpu=gpu)
    if isinstance(found, EngineRecord):
        data = cache.read(found)
        if data is not None:
            return data, Kernels(cache.entries, found.kernels_name(gpu)) if is_rtx(trt) else None
        found = f"{found.engine!r} in {cache.where} is damaged"
    raise BackendUnavailableError(
        f"{model.name}: no engine for this host ({found}). {_how_to_compile(model, options, backend)}, or "
        "give the directory of 'edgeclip compile -o' as --cache-dir or RuntimeOptions(cache_dir=…)."
    )


def _how_to_compile(model: ModelFiles, options: RuntimeOptions, backend: str) -> str:
    bundle = "BUNDLE" if model.bundle is None else repr(str(model.bundle))
    device = "" if options.device in ("cuda", "cuda:0") else f" --device {options.device}"
    which = "" if options.backend == "auto" else f" --backend {backend}"
    return f"Run edgeclip compile {bundle} --variant {model.variant or 'NAME'}{which}{device}"


@dataclass
class _Buffer:
    """Memory for one input or output, on the GPU and page-locked on the host."""

    name: str
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]
    cuda: CudaRuntime
    size_bytes: int = 0
    device: int = 0
    host: int = 0

    def reserve(self, rows: int) -> None:
        """Make room for so many rows; room once made stays."""
        wanted = max(1, rows * int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize)
        if wanted <= self.size_bytes:
            return
        self.release()
        self.device = self.cuda.allocate(wanted)
        self.host = self.cuda.allocate_host(wanted)
        self.size_bytes = wanted

    def view(self, rows: int) -> NDArray[Any]:
        """Return the host's memory as an array of so many rows."""
        shape = (rows, *self.row_shape)
        count = int(np.prod(shape, dtype=np.int64))
        memory: Any = (ctypes.c_byte * (count * self.dtype.itemsize)).from_address(self.host)
        rows_view: NDArray[Any] = np.frombuffer(memory, self.dtype, count).reshape(shape)
        return rows_view

    def release(self) -> None:
        """Give the memory back."""
        device, host = self.device, self.host
        self.device = self.host = self.size_bytes = 0
        if device:
            self.cuda.free(device)
        if host:
            self.cuda.free_host(host)


class Kernels:
    """What TensorRT-RTX compiles for the GPU while an engine runs, kept so that the next process need not.

    TensorRT-RTX looks itself whether what was kept fits version, GPU and driver. That something cannot be
    kept or does not fit costs time alone.

    Args:
        entries: where they are kept.
        name: of the entry.
    """

    def __init__(self, entries: HostCache, name: str) -> None:
        self._entries, self._name = entries, name
        self._kept = b""
        self._jit: Any = None

    def context(self, engine: Any) -> Any:
        """Return a context of an engine that takes kernels from here, or a plain one."""
        running = engine.create_runtime_config()
        jit = None if running is None else running.create_runtime_cache()
        if jit is None:
            return engine.create_execution_context()
        kept = self._entries.get(self._name)
        if kept is not None and jit.deserialize(kept):
            self._kept = kept
        if not running.set_runtime_cache(jit):
            return engine.create_execution_context()
        self._jit = jit
        return engine.create_execution_context(running)

    def keep(self) -> None:
        """Write down what has come to be."""
        memory = None if self._jit is None else self._jit.serialize()
        data = self._kept if memory is None else bytes(memory)
        if data != self._kept and self._entries.put(self._name, data):
            self._kept = data

    def close(self) -> None:
        """Let go of TensorRT's object."""
        self._jit = None


class TrtEngine:
    """One tower on one GPU."""

    concurrent_runs = False

    def __init__(
        self,
        trt: Any,
        cuda: CudaRuntime,
        data: bytes,
        *,
        model: ModelFiles,
        chosen: Placement,
        index: int,
        kernels: Kernels | None = None,
    ) -> None:
        self._trt = trt
        self._cuda = cuda
        self._index = index
        self._model = model
        self.chosen = chosen
        self._log = EngineLog.of(trt)
        self._log.begin()
        cuda.use(index)
        runtime = _made(lambda: trt.Runtime(self._log.logger), "give a runtime", self)
        engine = _made(lambda: runtime.deserialize_cuda_engine(data), "load the engine", self)
        make = engine.create_execution_context if kernels is None else lambda: kernels.context(engine)
        context = _made(make, "make a context for the engine", self)
        self._runtime, self._engine, self._context = runtime, engine, context
        self._kernels = kernels  # after the context: attributes go in this order, and it must outlive that
        self._to_keep = kernels is not None  # what the first call compiled
        self._limits: tuple[int, int] | None = None  # smallest and largest batch, where it is free
        self.inputs: Mapping[str, TensorSpec]
        self.outputs: Mapping[str, TensorSpec]
        self.inputs, self.outputs = self._interface(trt)
        self._buffers = {
            spec.name: _Buffer(
                spec.name,
                np.dtype(spec.dtype),
                tuple(int(size) for size in spec.shape[1:]),
                cuda,
            )
            for spec in (*self.inputs.values(), *self.outputs.values())
        }
        self._rows = 0  # what shapes and addresses are set for
        self._lock = threading.Lock()  # closing frees memory that a call in another thread may be using
        self._closed = False
        self._times: LayerTimes | None = None
        self._stream = cuda.create_stream()
        self._finalizer = weakref.finalize(self, _release, cuda, index, self._stream, self._buffers)
        self._finalizer.atexit = False  # at exit the driver may be gone, and takes all with it

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; the arrays returned are new.

        Batches larger than the engine's largest are run in parts; smaller ones than its smallest are filled
        up with their last row.

        Raises:
            BackendError: TensorRT or CUDA failed, or another thread has closed the session meanwhile.
        """
        with self._lock:
            if self._closed:
                raise BackendError(
                    f"{self._model.name}: the session is closed. Open it again with open_session()."
                )
            if self._times is not None:
                self._times.begin()
            results = self._run_parts(feeds)
            if self._kernels is not None and self._to_keep:
                self._to_keep = False  # a process that is killed has them kept then
                self._kernels.keep()
            return results

    def _run_parts(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._cuda.use(self._index)
        if self._limits is None:
            rows = int(next(iter(self.inputs.values())).shape[0])
            return self._run(feeds, slice(0, rows), rows)
        smallest, largest = self._limits
        count = len(next(iter(feeds.values())))
        parts = [
            self._run(feeds, slice(start, end), max(smallest, end - start))
            for start, end in _parts(count, largest)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}

    def time_layers(self) -> None:
        """Time the layers of every call from now on, which makes calls slower."""
        with self._lock:
            self._times = LayerTimes(self._trt, self._engine, self._context)

    def kernel_times(self) -> list[list[KernelTime]]:
        """Return the layers of every call so far; for engines of :func:`load_profiled`."""
        return [] if self._times is None else self._times.calls()

    def close(self) -> None:
        """Free the engine and its memory on the GPU, after the call in flight."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(BackendError):  # a GPU that has failed gives nothing back
                self._cuda.use(self._index)
            if self._kernels is not None:
                self._kernels.keep()
            if self._times is not None:
                self._times.close()
            self._context = None  # before what it was made from
            if self._kernels is not None:
                self._kernels.close()
            self._engine = self._runtime = None
            self._finalizer()

    def _run(self, feeds: Mapping[str, NDArray[Any]], part: slice, rows: int) -> dict[str, NDArray[Any]]:
        """Run the rows of ``part``, filled up to ``rows``."""
        self._set_rows(rows)
        stream = self._stream
        taken = part.stop - part.start
        for name in self.inputs:
            buffer = self._buffers[name]
            view = buffer.view(rows)
            np.copyto(view[:taken], feeds[name][part])
            view[taken:] = view[taken - 1]
            self._cuda.to_device(buffer.device, buffer.host, view.nbytes, stream)
        self._log.begin()
        if not self._context.execute_async_v3(stream):
            raise BackendError(f"{self._model.name}: TensorRT failed to run{self._log.last()}.")
        for name in self.outputs:
            buffer = self._buffers[name]
            self._cuda.to_host(buffer.host, buffer.device, buffer.view(rows).nbytes, stream)
        self._cuda.synchronize(stream)
        if self._times is not None and not self._times.collect():
            raise BackendError(f"{self._model.name}: TensorRT reports no times{self._log.last()}.")
        return {name: self._buffers[name].view(rows)[:taken].copy() for name in self.outputs}

    def _set_rows(self, rows: int) -> None:
        """Tell the context shapes and addresses; nothing to do where they are those of the last call."""
        if rows == self._rows:
            return
        self._rows = 0
        self._log.begin()
        for buffer in self._buffers.values():
            buffer.reserve(rows)
            if not self._context.set_tensor_address(buffer.name, buffer.device):
                raise BackendError(
                    f"{self._model.name}: TensorRT does not take memory for {buffer.name!r}"
                    f"{self._log.last()}."
                )
        for name in self.inputs:
            shape = (rows, *self._buffers[name].row_shape)
            if not self._context.set_input_shape(name, shape):
                raise BackendError(
                    f"{self._model.name}: TensorRT does not take the shape {shape} for {name!r}"
                    f"{self._log.last()}."
                )
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(
                f"{self._model.name}: TensorRT finds no shapes for a batch of {rows}{self._log.last()}."
            ) from error
        if unknown:
            raise BackendError(
                f"{self._model.name}: TensorRT lacks the shape of {', '.join(map(repr, unknown))}"
                f"{self._log.last()}."
            )
        for name in self.outputs:
            got = tuple(int(size) for size in self._context.get_tensor_shape(name))
            expected = (rows, *self._buffers[name].row_shape)
            if got != expected:
                raise BackendError(
                    f"{self._model.name}: the output {name!r} has the shape {got}, expected {expected}. "
                    "Export the tower again."
                )
        self._rows = rows

    def _interface(self, trt: Any) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        """Return inputs and outputs, and note which batches the engine takes."""
        engine = self._engine
        inputs: dict[str, TensorSpec] = {}
        outputs: dict[str, TensorSpec] = {}
        for number in range(engine.num_io_tensors):
            name = str(engine.get_tensor_name(number))
            kind = str(engine.get_tensor_dtype(name).name)
            shape = tuple(int(size) for size in engine.get_tensor_shape(name))
            if kind not in _DTYPES or not shape or min(shape[1:], default=1) < 1:
                raise BackendError(
                    f"{self._model.name}: {name!r} is {kind} {shape}, expected one of "
                    f"{', '.join(sorted(_DTYPES))} with no free size but the batch. Export the tower again."
                )
            spec = TensorSpec(name, _DTYPES[kind], ("B" if shape[0] < 0 else shape[0], *shape[1:]))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                inputs[name] = spec
                if shape[0] < 0:
                    smallest, _, largest = engine.get_tensor_profile_shape(name, 0)
                    self._limits = (int(smallest[0]), int(largest[0]))
            else:
                outputs[name] = spec
        return MappingProxyType(inputs), MappingProxyType(outputs)


def _made(make: Callable[[], Any], what: str, owner: TrtEngine) -> Any:
    """Return what TensorRT makes, which is ``None`` (or a ``TypeError``, for constructors) where it fails."""
    try:
        made = make()
    except TypeError as error:
        raise _refused(owner, what) from error
    if made is None:
        raise _refused(owner, what)
    return made


def _refused(owner: TrtEngine, what: str) -> BackendError:
    model, log = owner._model, owner._log
    bundle = "BUNDLE" if model.bundle is None else repr(str(model.bundle))
    again = f"Run edgeclip compile {bundle} --variant {model.variant or 'NAME'} --force."
    return BackendError(f"{model.name}: {owner.chosen.provider} cannot {what}{log.last()}. {again}")


def _parts(count: int, largest: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, largest):
        yield start, min(start + largest, count)


def _release(cuda: CudaRuntime, index: int, stream: int, buffers: Mapping[str, _Buffer]) -> None:
    """Give back what a session holds on the GPU; a GPU that has failed gives nothing back, and need not."""
    with contextlib.suppress(BackendError):
        cuda.use(index)
    for buffer in buffers.values():
        with contextlib.suppress(BackendError):
            buffer.release()
    with contextlib.suppress(BackendError):
        cuda.destroy_stream(stream)
