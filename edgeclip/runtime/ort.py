"""ONNX Runtime, on the CPU or through its CUDA provider.

An engine may be entered by many threads at once: ONNX Runtime's ``Run`` is thread-safe. Every session has its
own thread pool; no process-wide setting is touched except ONNX Runtime's own telemetry, which is turned off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from edgeclip.cache import HostCache
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError
from edgeclip.runtime.host import Host, usable_cores
from edgeclip.runtime.session import (
    OPENVINO_DEVICES,
    KernelTime,
    ModelFiles,
    Placement,
    Prepared,
    RuntimeOptions,
    TensorSpec,
    parse_device,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["OrtEngine", "import_onnxruntime", "load", "load_profiled", "prepare"]

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"

_DTYPES: Final = {
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
}
_MAX_CACHED_BYTES: Final = 256 << 20
_MAPPED: Final = "session.use_memory_mapped_ort_model"
_log = logging.getLogger(__name__)
_QUIET: Final = 4  # fatal only: what goes wrong arrives as an exception, nothing is printed


def load(model: ModelFiles, options: RuntimeOptions, *, reason: str) -> OrtEngine:
    """Load a tower into ONNX Runtime.

    Args:
        model: an ONNX file; external data is read beside it.
        options: device, providers, threads and memory.
        reason: why this backend, kept in :class:`Placement`.

    Raises:
        BackendUnavailableError: ONNX Runtime or a provider asked for is not here or did not start.
        BackendError: the file cannot be loaded.
    """
    return _load(model, options, reason)


def load_profiled(model: ModelFiles, options: RuntimeOptions, *, folder: Path) -> OrtEngine:
    """Load a tower so that ONNX Runtime times every kernel; :meth:`OrtEngine.kernel_times` reads it.

    Args:
        model: as for :func:`load`.
        options: as for :func:`load`; nothing is cached.
        folder: where the notes are written.

    Raises:
        BackendUnavailableError: as :func:`load`.
        BackendError: as :func:`load`.
    """
    return _load(model, replace(options, cache_dir=None), "to be profiled", profile=folder / "profile")


def _load(
    model: ModelFiles, options: RuntimeOptions, reason: str, *, profile: Path | None = None
) -> OrtEngine:
    ort = import_onnxruntime()
    providers = _providers(options)
    available = ort.get_available_providers()
    _require(providers, available, model, "offers")
    threads, why_threads = _threads(options)
    settings = _session_options(ort, model, options, providers, threads)
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)

    def make(source: str) -> Any:
        chosen = [(name, _provider_options(name, options)) for name in providers]
        return ort.InferenceSession(source, settings, providers=chosen)

    try:
        cache = _GraphCache.of(ort, model, options, providers)
        session, from_cache = (make(str(model.model)), False) if cache is None else cache.open(settings, make)
    except Exception as error:  # every class of onnxruntime derives from Exception alone
        raise _load_error(error, model, ort.__version__) from error
    # ONNX Runtime falls back to the CPU by itself when a provider does not start.
    _require(providers, session.get_providers(), model, "started")
    kind, index = parse_device(options.device)
    device = f"cuda:{index}" if providers[0] != CPU and (kind == "cuda" or providers[0] == CUDA) else "cpu"
    return OrtEngine(
        session,
        model,
        Placement(
            backend="ort",
            provider=providers[0],
            device=device,
            threads=threads,
            precision=model.precision,
            reason=f"{reason}; {why_threads}" + ("; optimised graph from the cache" if from_cache else ""),
        ),
    )


def prepare(
    model: ModelFiles,
    options: RuntimeOptions,
    *,
    force: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Keep the optimised graph of a tower in ``options.cache_dir``, unless it is there.

    Args:
        model: a tower of a bundle.
        options: as for :func:`load`.
        force: optimise again although it is there.
        on_progress: told what is done.

    Raises:
        BackendUnavailableError: as :func:`load`.
        BackendError: as :func:`load`.
    """
    ort = import_onnxruntime()
    cache = _GraphCache.of(ort, model, options, _providers(options))
    if cache is None:
        return Prepared(None, 0, 0.0, up_to_date=True)
    if force:
        cache.entries.remove(cache.name)
    kept = cache.entries.get(cache.name)
    began = time.perf_counter()
    if kept is None:
        if on_progress is not None:
            on_progress("optimising the graph")
        load(model, options, reason="to be prepared").close()
        data = cache.entries.get(cache.name)
        if data is None:
            raise BackendError(
                f"{model.name}: its optimised graph cannot be kept in {str(options.cache_dir)!r}. Set "
                "EDGECLIP_CACHE_DIR to a directory that can be written."
            )
        return Prepared(
            cache.entries.path(cache.name), len(data), time.perf_counter() - began, up_to_date=False
        )
    return Prepared(cache.entries.path(cache.name), len(kept), 0.0, up_to_date=True)


class OrtEngine:
    """One tower in ONNX Runtime. Safe for many threads at once."""

    concurrent_runs = True

    def __init__(self, session: Any, model: ModelFiles, chosen: Placement) -> None:
        self._session = session
        self._model = model
        self.chosen = chosen
        self.inputs: Mapping[str, TensorSpec] = _specs(session.get_inputs(), model)
        self.outputs: Mapping[str, TensorSpec] = _specs(session.get_outputs(), model)
        self._names = list(self.outputs)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; the arrays returned are new."""
        try:
            values = self._session.run(self._names, feeds)
        except Exception as error:
            raise _run_error(error, self._model) from error
        return dict(zip(self._names, values, strict=True))

    def kernel_times(self) -> list[list[KernelTime]]:
        """Return the kernels of every call so far, in the order they ran and with their starts; stop timing.

        For engines of :func:`load_profiled`, once.
        """
        events = json.loads(Path(self._session.end_profiling()).read_bytes())
        calls: list[list[KernelTime]] = []
        kernels: list[dict[str, Any]] = []
        for event in events:
            if event.get("cat") == "Node":
                kernels.append(event)
            elif event.get("name") == "model_run":  # stands behind the kernels of its call
                calls.append(
                    [
                        KernelTime(
                            each["name"].removesuffix("_kernel_time"),
                            each["args"]["op_name"],
                            each["dur"] / 1e3,  # microseconds, as their starts
                            (each["ts"] - event["ts"]) / 1e3,
                        )
                        for each in kernels
                    ]
                )
                kernels = []
        return calls

    def close(self) -> None:
        """Drop the session; the memory goes when the last call in flight has ended."""
        del self._session


@dataclass(frozen=True)
class _GraphCache:
    """The optimised graph of one tower on this host, kept beside the bundle's other cached parts.

    Optimising an int8 tower is two thirds of the time of opening it. The stored graph is for this machine's
    kernels, so its name depends on host, engine version and settings. Damage is seen by its checksum. The
    file is mapped while it is read. Its weights are copied all the same: used where they lie, they would stay
    in memory beside the copies that kernels rearrange (docs/experiments.md).
    """

    ort: Any
    model: Path
    entries: HostCache
    name: str

    @classmethod
    def of(
        cls, ort: Any, model: ModelFiles, options: RuntimeOptions, providers: tuple[str, ...]
    ) -> _GraphCache | None:
        """Return the cache for a tower, ``None`` where there is none or it is not worth it."""
        directory = options.cache_dir
        if directory is None or model.digest is None or providers != (CPU,):
            return None
        if model.model.stat().st_size > _MAX_CACHED_BYTES or not directory.is_dir():
            return None
        said = [
            model.digest,
            ort.__version__,
            Host.here().fingerprint(),
            *sorted(model.session_config.items()),
        ]
        key = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
        entries = HostCache(directory, writable=os.access(directory, os.W_OK | os.X_OK))
        return cls(ort, model.model, entries, f"graph-{key}.ort")

    def open(self, settings: Any, make: Callable[[str], Any]) -> tuple[Any, bool]:
        """Return a session and whether its graph came from here; keep the graph where it did not."""
        if self.entries.is_sound(self.name):
            settings.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            settings.add_session_config_entry(_MAPPED, "1")
            try:
                return make(str(self.entries.path(self.name))), True
            except Exception:  # made again below
                _log.debug("the cached graph %s does not load", self.name, exc_info=True)
                settings.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
                settings.add_session_config_entry(_MAPPED, "0")
        return self._make_and_keep(settings, make), False

    def _make_and_keep(self, settings: Any, make: Callable[[str], Any]) -> Any:
        if not self.entries.writable:
            return make(str(self.model))
        temporary = self.entries.path(f"new-{secrets.token_hex(8)}.ort")
        settings.optimized_model_filepath = str(temporary)
        settings.add_session_config_entry("session.save_model_format", "ORT")
        try:
            session = make(str(self.model))
            self.entries.put(self.name, temporary.read_bytes())
            return session
        except Exception:  # a full disk among others; a file that does not load fails again, with its reason
            _log.debug("the optimised graph of %s cannot be kept", self.model, exc_info=True)
            settings.optimized_model_filepath = ""
            return make(str(self.model))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def import_onnxruntime() -> Any:
    """Return the module ``onnxruntime`` with its telemetry off. Import it this way, and in no other.

    On Linux, macOS and Windows onnxruntime 1.31 starts an uploader thread and writes a device identifier
    below the user's cache directory *while it is imported*; the call that disables events comes too late for
    them, and a process that forks afterwards hangs at exit. The environment variable is read at import and
    stays set, for processes started from here.

    Raises:
        BackendUnavailableError: it is not installed or does not import.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend 'ort' cannot be used: onnxruntime does not import ({error}). "
            f"Run pip install onnxruntime."
        ) from error
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # for a process that imported it before us
    return onnxruntime


def _providers(options: RuntimeOptions) -> tuple[str, ...]:
    kind, _ = parse_device(options.device)
    if kind in OPENVINO_DEVICES:
        raise BackendUnavailableError(
            f"backend 'ort' does not run on {options.device!r}, expected 'cpu' or 'cuda'. Choose "
            "backend='openvino'."
        )
    if options.providers is None:
        return (CPU,) if kind == "cpu" else (CUDA,)
    if kind == "cuda" and options.providers[0] == CPU:
        raise ConfigError(
            f"providers: got {CPU!r} first for device {options.device!r}, expected {CUDA!r}. "
            f"Drop one of the two."
        )
    return options.providers


def _require(asked: tuple[str, ...], present: list[str], model: ModelFiles, verb: str) -> None:
    missing = [name for name in asked if name not in present]
    if missing:
        hint = " For CUDA put onnxruntime-gpu in the place of onnxruntime." if CUDA in missing else ""
        raise BackendUnavailableError(
            f"{model.name}: asked for {', '.join(map(repr, missing))}, but ONNX Runtime {verb} only "
            f"{', '.join(map(repr, present))}.{hint}"
        )


def _threads(options: RuntimeOptions) -> tuple[int, str]:
    if options.affinity is not None:
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        foreign = sorted(set(options.affinity) - set(usable))
        if foreign:  # ONNX Runtime would leave the thread where it is, without a word
            raise ConfigError(
                f"affinity: CPU {foreign[0]} is not usable by this process, expected some of "
                f"{sorted(usable)}."
            )
        return len(options.affinity), f"{len(options.affinity)} thread(s) on CPUs {options.affinity}"
    if options.threads is not None:
        return options.threads, f"{options.threads} thread(s) asked for"
    cores = usable_cores()
    return cores, f"{cores} thread(s) = usable cores"


def _session_options(
    ort: Any, model: ModelFiles, options: RuntimeOptions, providers: tuple[str, ...], threads: int
) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _QUIET
    entries = {
        "session.intra_op.allow_spinning": "1" if options.spinning else "0",
        "session.inter_op.allow_spinning": "0",
    }
    if CPU not in providers:
        entries["session.disable_cpu_ep_fallback"] = "1"
    if options.affinity is not None and len(options.affinity) > 1:
        # One entry for each worker (the calling thread is none of them); numbers start at 1.
        entries["session.intra_op_thread_affinities"] = ";".join(str(cpu + 1) for cpu in options.affinity[1:])
    if options.low_memory:
        settings.enable_cpu_mem_arena = False
        settings.enable_mem_pattern = False
        entries["session.disable_prepacking"] = "1"
        entries["session.use_device_allocator_for_initializers"] = "1"
    entries.update(model.session_config)
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    return settings


def _provider_options(name: str, options: RuntimeOptions) -> dict[str, str]:
    if name == CUDA:
        return {"device_id": str(parse_device(options.device)[1])}
    return {}


def _specs(arguments: list[Any], model: ModelFiles) -> Mapping[str, TensorSpec]:
    specs = {}
    for argument in arguments:
        if argument.type not in _DTYPES:
            raise BackendError(
                f"{model.name}: {argument.name!r} has the type {argument.type!r}, expected one of "
                f"{', '.join(sorted(_DTYPES.values()))}. Export the tower again."
            )
        shape = tuple(
            size if isinstance(size, (int, str)) else f"d{axis}" for axis, size in enumerate(argument.shape)
        )
        specs[argument.name] = TensorSpec(argument.name, _DTYPES[argument.type], shape)
    return MappingProxyType(specs)


def _load_error(error: Exception, model: ModelFiles, version: str) -> BackendError:
    text = _first_line(error)
    where = f"{model.name}: ONNX Runtime {version} cannot load {model.model.name!r}"
    kind = type(error).__name__
    if _out_of_memory(error):
        return BackendError(
            f"{where}: out of memory ({text}). Try RuntimeOptions(low_memory=True) or a smaller variant."
        )
    if kind == "NoSuchFile":
        return BackendError(f"{where}: a file is missing ({text}). Restore the bundle.")
    if kind == "InvalidProtobuf":
        return BackendError(f"{where}: it is no ONNX file, or damaged ({text}). Restore the bundle.")
    if "opset" in text.lower() or "ir version" in text.lower():
        return BackendError(
            f"{where}: it needs a newer ONNX Runtime ({text}). Run pip install -U onnxruntime."
        )
    if "disable_cpu_ep_fallback" in text or "fallback to CPU EP" in text:
        return BackendUnavailableError(
            f"{where} wholly on the provider asked for ({text}). Add {CPU!r} to providers to let single "
            f"nodes run there."
        )
    return BackendError(f"{where}: {text}")


def _run_error(error: Exception, model: ModelFiles) -> BackendError:
    text = _first_line(error)
    if _out_of_memory(error):
        return BackendError(
            f"{model.name}: out of memory ({text}). Use a smaller batch or RuntimeOptions(low_memory=True)."
        )
    return BackendError(f"{model.name}: ONNX Runtime failed: {text}")


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "failed to allocate memory" in text or "bad_alloc" in text


def _first_line(error: Exception) -> str:
    """Shorten a message of ONNX Runtime: its first line without error class, source file and function."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+/(onnxruntime/\S+)", r"\1", text)
    return text.strip().rstrip(".")[:300]
