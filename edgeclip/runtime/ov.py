"""OpenVINO: Intel's CPUs, GPUs and NPUs, and every other CPU.

One stream and one infer request for each tower: OpenVINO runs a tower's calls one after the other anyway, so
that an engine may not be entered twice at once (``concurrent_runs``), and sessions wait for each other. Every
compiled tower has its own thread pool. The precision that the device computes in is set and read back,
because OpenVINO lowers it by itself where a device is faster so. Its telemetry is kept out of this process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = [
    "OvEngine",
    "import_openvino",
    "load",
    "openvino_devices",
    "openvino_message",
    "prepare",
    "without_telemetry",
]

_DTYPES: Final = {
    "u8": "uint8",
    "i8": "int8",
    "i32": "int32",
    "i64": "int64",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "boolean": "bool",
}
_PRECISION: Final = "INFERENCE_PRECISION_HINT"
_SETTINGS_OF_BUNDLES: Final = ("DYNAMIC_QUANTIZATION_GROUP_SIZE", "EXECUTION_MODE_HINT", _PRECISION)
_VIRTUAL: Final = frozenset({"auto", "hetero", "multi"})
_MAX_CACHED_BYTES: Final = 256 << 20
_TELEMETRY: Final = "openvino_telemetry"
_import_lock = threading.RLock()
_log = logging.getLogger(__name__)


# --- the library ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Make the package ``openvino_telemetry`` impossible to import meanwhile.

    ``import openvino`` itself imports the converter of models, which writes an identifier below the home
    directory and reports the import to its makers. It does without where the package is not installed, and no
    environment variable that means this alone says so.
    """
    with _import_lock:
        there = {_TELEMETRY: sys.modules[_TELEMETRY]} if _TELEMETRY in sys.modules else {}
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # what import takes for "not installed"
        try:
            yield
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(there)


def import_openvino() -> Any:
    """Return the module ``openvino`` with its telemetry off. Import it this way, and in no other.

    Raises:
        BackendUnavailableError: it is not installed or does not import.
    """
    try:
        with contextlib.nullcontext() if "openvino" in sys.modules else without_telemetry():
            import openvino
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend 'openvino' cannot be used: openvino does not import ({error}). "
            'Run pip install "edgeclip[openvino]".'
        ) from error
    return openvino


@functools.lru_cache(maxsize=1)
def _core() -> Any:
    """Return the one core of this process: it holds the loaded devices, and no settings of ours."""
    return import_openvino().Core()


def openvino_devices() -> dict[str, str]:
    """Return the devices OpenVINO sees here, each with its full name.

    Raises:
        BackendUnavailableError: OpenVINO is not installed or does not import.
    """
    core = _core()
    return {str(name): _full_name(core, str(name)) for name in core.available_devices}


def _full_name(core: Any, device: str) -> str:
    try:
        return str(core.get_property(device, "FULL_DEVICE_NAME")).strip()
    except Exception:  # a device that is listed and does not start
        _log.debug("OpenVINO does not tell the name of %s", device, exc_info=True)
        return ""


# --- opening ----------------------------------------------------------------------------------------------


def load(model: ModelFiles, options: RuntimeOptions, *, reason: str) -> OvEngine:
    """Load a tower into OpenVINO.

    Args:
        model: an IR (``.xml``, its weights among ``files`` or beside it), or an ONNX file.
        options: device, threads and memory.
        reason: why this backend, kept in :class:`Placement`.

    Raises:
        BackendUnavailableError: OpenVINO or the device is not here.
        BackendError: the file cannot be loaded; the device computes in another precision than was set; or it
            is not the CPU, and the tower was not compiled for it.
        ConfigError: an option that OpenVINO does not have.
    """
    plan = _Plan.of(model, options)
    cache = _BlobCache.of(plan, options)
    compiled = None if cache is None else cache.open()
    from_cache = compiled is not None
    if compiled is None:
        if cache is not None and plan.kind != "cpu":
            raise _not_compiled(plan, options)
        compiled = plan.compile()
        if cache is not None:
            cache.keep(compiled)
    return _engine(plan, compiled, options, reason, from_cache=from_cache)


def load_profiled(model: ModelFiles, options: RuntimeOptions, *, folder: Path) -> OvEngine:
    """Load a tower so that OpenVINO times every kernel; :meth:`OvEngine.kernel_times` reads it.

    Args:
        model: as for :func:`load`.
        options: as for :func:`load`; nothing is cached, and a device other than the CPU compiles now.
        folder: not used; other backends write there.

    Raises:
        BackendUnavailableError: as :func:`load`.
        BackendError: as :func:`load`.
        ConfigError: as :func:`load`.
    """
    plan = _Plan.of(model, options)
    plan = replace(plan, settings=MappingProxyType({**plan.settings, "PERF_COUNT": "YES"}))
    engine = _engine(plan, plan.compile(), options, "to be profiled", from_cache=False)
    engine.calls = []
    return engine


def prepare(
    model: ModelFiles,
    options: RuntimeOptions,
    *,
    force: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Prepared:
    """Keep what OpenVINO compiles a tower to in ``options.cache_dir``, unless it is there.

    Args:
        model: a tower of a bundle.
        options: as for :func:`load`.
        force: compile again although it is there.
        on_progress: told what is done.

    Raises:
        BackendUnavailableError: as :func:`load`.
        BackendError: it cannot be compiled, or not be kept.
        ConfigError: as :func:`load`.
    """
    plan = _Plan.of(model, options)
    cache = _BlobCache.of(plan, options)
    if cache is None:
        return Prepared(None, 0, 0.0, up_to_date=True)
    kept = None if force else cache.entries.get(cache.name)
    if kept is not None and cache.open() is not None:
        return Prepared(cache.entries.path(cache.name), len(kept), 0.0, up_to_date=True)
    began = time.perf_counter()
    if on_progress is not None:
        on_progress(f"compiling for {plan.device}")
    size_bytes = cache.keep(plan.compile())
    if size_bytes is None:
        raise BackendError(
            f"{model.name}: what it was compiled to cannot be kept in {str(options.cache_dir)!r}. Set "
            "EDGECLIP_CACHE_DIR to a directory that can be written."
        )
    path = cache.entries.path(cache.name)
    return Prepared(path, size_bytes, time.perf_counter() - began, up_to_date=False)


def _not_compiled(plan: _Plan, options: RuntimeOptions) -> BackendUnavailableError:
    bundle = "BUNDLE" if plan.model.bundle is None else repr(str(plan.model.bundle))
    return BackendUnavailableError(
        f"{plan.model.name}: it was not compiled for {plan.device} on this host, which takes long. Run "
        f"edgeclip compile {bundle} --variant {plan.model.variant or 'NAME'} --backend openvino --device "
        f"{options.device}."
    )


@dataclass(frozen=True)
class _Plan:
    """What is to be compiled, for which device and with which settings.

    Attributes:
        model: the tower.
        kind: of the device, as :func:`parse_device` says.
        device: OpenVINO's name of it.
        settings: OpenVINO's properties.
        threads: asked for, on the CPU.
        notes: what was decided and why, in words.
        keeps_little: memory counts more than speed.
    """

    model: ModelFiles
    kind: str
    device: str
    settings: Mapping[str, Any]
    threads: int
    notes: tuple[str, ...]
    keeps_little: bool

    @classmethod
    def of(cls, model: ModelFiles, options: RuntimeOptions) -> _Plan:
        if options.providers is not None:
            raise ConfigError(
                f"providers: got {options.providers!r} for OpenVINO, expected None: providers are ONNX "
                "Runtime's. Choose with device."
            )
        core = _core()
        kind, index = parse_device(options.device)
        device = _device(core, kind, index, options.device)
        threads, why_threads = _threads(options)
        precision, why_precision = _precision(core, kind, device, model)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            _PRECISION: precision,
            # Activations of layers whose weights are int8 would be rounded too, which nobody asked for.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        notes = [why_threads] if kind == "cpu" or kind in _VIRTUAL else []
        of_cpu = {"INFERENCE_NUM_THREADS": str(threads), "ENABLE_CPU_PINNING": options.affinity is not None}
        if kind == "cpu":
            settings |= {"NUM_STREAMS": "1", **of_cpu}
        elif kind in _VIRTUAL:
            # They pass on what is a property of every device, and refuse what is one of some.
            del settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
            settings["DEVICE_PROPERTIES"] = {"CPU": of_cpu}
        else:
            threads = 1
        if options.spinning:
            notes.append("OpenVINO's threads do not spin")
        settings |= {
            key: model.session_config[key] for key in _SETTINGS_OF_BUNDLES if key in model.session_config
        }
        notes.append(why_precision)
        return cls(
            model,
            kind,
            device,
            MappingProxyType(settings),
            threads,
            tuple(notes),
            keeps_little=bool(options.low_memory),
        )

    def compile(self) -> Any:
        """Read and compile the tower.

        Raises:
            BackendError: OpenVINO refuses it.
        """
        try:
            network = _read(self.model)
            if not network.outputs:  # an empty file is an ONNX graph of nothing
                raise ValueError("it has no output")
        except Exception as error:
            raise self._error(error, f"cannot load {self.model.model.name!r}") from error
        self._check_batch(network)
        try:
            return _core().compile_model(network, self.device, dict(self.settings))
        except Exception as error:
            raise self._error(error, f"cannot compile {self.model.model.name!r} for {self.device}") from error

    def check(self, compiled: Any) -> None:
        """Raise unless the device computes in the precision that was set.

        Raises:
            BackendError: it does not.
        """
        if self.kind in _VIRTUAL:
            return  # they do not tell
        wanted = str(self.settings[_PRECISION])
        got = _type_name(compiled.get_property(_PRECISION))
        if got != wanted:
            raise BackendError(
                f"{self.model.name}: OpenVINO computes in {got} on {self.device}, expected {wanted}. Choose "
                "a variant of another precision or another device."
            )

    def _check_batch(self, network: Any) -> None:
        if self.kind == "npu" and any(port.partial_shape.is_dynamic for port in network.inputs):
            raise BackendError(
                f"{self.model.name}: the NPU takes towers of one batch, and this one takes any. Export the "
                "variant again with --static-batch 1."
            )

    def _error(self, error: Exception, verb: str) -> BackendError:
        return _translated(error, f"{self.model.name}: OpenVINO {_version()} {verb}")


def _device(core: Any, kind: str, index: int, said: str) -> str:
    """Return OpenVINO's name of a device, after looking whether it is here."""
    if kind not in OPENVINO_DEVICES and kind != "cpu":
        raise BackendUnavailableError(
            f"backend 'openvino' does not run on {said!r}, expected 'cpu', or 'gpu' and 'npu' for Intel's."
        )
    available = [str(name) for name in core.available_devices]
    if kind in _VIRTUAL:
        name, colon, listed = said.partition(":")
        parts = [_device(core, *parse_device(part), part) for part in listed.split(",")] if colon else []
        return f"{name.upper()}{colon}{','.join(parts)}"
    name = f"{kind.upper()}.{index}" if kind == "gpu" else kind.upper()
    # A GPU that is alone has no number in the list.
    if name not in available and not (index == 0 and kind.upper() in available):
        raise BackendUnavailableError(
            f"device {said!r} is not here: OpenVINO sees {', '.join(available) or 'no device'}. Install its "
            "driver, or choose one of these."
        )
    return name


def _threads(options: RuntimeOptions) -> tuple[int, str]:
    if options.affinity is not None:
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        if usable != sorted(set(options.affinity)):
            listed = ",".join(map(str, sorted(set(options.affinity))))
            raise ConfigError(
                f"affinity: got {options.affinity} for OpenVINO, expected every CPU of this process "
                f"({usable}), to which it then pins its threads itself. Start the process with taskset -c "
                f"{listed}."
            )
        return len(options.affinity), f"{len(options.affinity)} thread(s) pinned to CPUs {options.affinity}"
    if options.threads is not None:
        return options.threads, f"{options.threads} thread(s) asked for"
    cores = usable_cores()
    return cores, f"{cores} thread(s) = usable cores"


def _precision(core: Any, kind: str, device: str, model: ModelFiles) -> tuple[str, str]:
    """Return the precision to compute floats in, and why."""
    said = model.session_config.get(_PRECISION)
    if said is not None:
        return str(said), f"floats in {said} as the bundle says"
    if kind in _VIRTUAL:
        # They cannot be asked what came of it, and a CPU without float16 would take bfloat16 for it.
        return "f32", "every device asked for f32"
    half = model.precision in ("fp16", "int8")
    offered = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if not half:
        if "FP32" not in offered:
            raise BackendUnavailableError(
                f"{model.name}: {device} does not compute in float32, which {model.precision!r} towers ask "
                "for. Choose an fp16 or int8 variant."
            )
        return "f32", "floats in f32"
    if "FP16" in offered:
        return "f16", "floats in f16"
    return "f32", f"floats in f32, because {device} has no float16 arithmetic"


def _read(model: ModelFiles) -> Any:
    """Return a tower as OpenVINO reads it, by the reader of its own format alone.

    ``Core.read_model`` asks the readers of all formats in turn, and one of them writes to stderr.
    """
    if model.format == "openvino":
        weights = next(
            (file for file in model.files if file.suffix == ".bin"), model.model.with_suffix(".bin")
        )
        return _core().read_model(str(model.model), str(weights))
    from openvino.frontend import FrontEndManager

    reader = FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(str(model.model)))


def _engine(
    plan: _Plan, compiled: Any, options: RuntimeOptions, reason: str, *, from_cache: bool
) -> OvEngine:
    plan.check(compiled)
    executing = [str(name) for name in compiled.get_property("EXECUTION_DEVICES")]
    notes, threads = list(plan.notes), plan.threads
    if plan.kind == "cpu":
        threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        if threads != plan.threads:
            notes.append(f"OpenVINO uses {threads}, no more than this host has cores")
    kind, index = parse_device(options.device)
    if from_cache:
        notes.append("compiled form from the cache")
    return OvEngine(
        compiled,
        plan,
        Placement(
            backend="openvino",
            provider=f"OpenVINO {_version()} {','.join(executing)}",
            device=f"gpu:{index}" if kind == "gpu" else options.device,
            threads=threads,
            precision=plan.model.precision,
            reason="; ".join([reason, *notes]),
        ),
    )


class OvEngine:
    """One tower in OpenVINO."""

    concurrent_runs = False

    def __init__(self, compiled: Any, plan: _Plan, chosen: Placement) -> None:
        self._compiled = compiled
        self._model = plan.model
        self._keeps_little = plan.keeps_little
        self._request = compiled.create_infer_request()
        self.calls: list[list[Any]] | None = None
        """What was timed, for engines of :func:`load_profiled`."""
        self.chosen = chosen
        self.inputs: Mapping[str, TensorSpec] = _specs(compiled.inputs, plan.model)
        self.outputs: Mapping[str, TensorSpec] = _specs(compiled.outputs, plan.model)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; the arrays returned are copies of OpenVINO's."""
        try:
            values = self._request.infer(dict(feeds), share_inputs=True)
            results = {name: values[number] for number, name in enumerate(self.outputs)}
            if self.calls is not None:
                self.calls.append(list(self._request.profiling_info))
            if self._keeps_little:
                self._compiled.release_memory()
        except Exception as error:
            raise _translated(error, f"{self._model.name}: OpenVINO failed") from error
        return results

    def kernel_times(self) -> list[list[KernelTime]]:
        """Return the kernels of every call so far; for engines of :func:`load_profiled`.

        The CPU tells the mean of all calls so far, cut to microseconds. What call n took is taken from two
        of them, and is off by at most n microseconds either way: small kernels need the median of many calls.
        """
        counts: dict[str, int] = {}
        totals_ms: dict[str, float] = {}
        calls: list[list[KernelTime]] = []
        for call in self.calls or ():
            kernels = []
            for each in call:
                if not str(each.status).endswith(".EXECUTED"):
                    continue
                name, ms = each.node_name, each.real_time.total_seconds() * 1e3
                if self.chosen.device == "cpu":
                    counts[name] = counts.get(name, 0) + 1
                    before_ms, totals_ms[name] = totals_ms.get(name, 0.0), ms * counts[name]
                    ms = max(0.0, totals_ms[name] - before_ms)
                kernels.append(KernelTime(name, each.exec_type, ms))
            calls.append(kernels)
        return calls

    def close(self) -> None:
        """Do nothing: the engine goes with the last reference, which a call in flight may hold."""


# --- the compiled form in the cache ------------------------------------------------------------------------


@dataclass(frozen=True)
class _BlobCache:
    """What a tower was compiled to, for one device with one set of settings, in the host cache.

    Its name depends on OpenVINO, host, device and settings; damage is seen by its checksum.
    """

    plan: _Plan
    entries: HostCache
    name: str

    @classmethod
    def of(cls, plan: _Plan, options: RuntimeOptions) -> _BlobCache | None:
        """Return the cache for a tower, ``None`` where there is none or the device gives nothing to keep."""
        model, directory = plan.model, options.cache_dir
        if directory is None or model.digest is None or plan.kind in _VIRTUAL or not directory.is_dir():
            return None
        core = _core()
        if "EXPORT_IMPORT" not in core.get_property(plan.device, "OPTIMIZATION_CAPABILITIES"):
            return None
        if plan.kind == "cpu":
            size_bytes = sum(file.stat().st_size for file in model.files or (model.model,))
            if options.low_memory or size_bytes > _MAX_CACHED_BYTES:
                return None
        said = [
            model.digest,
            _version(),
            Host.here().fingerprint(),
            _full_name(core, plan.device),
            plan.device,
            *sorted((key, str(value)) for key, value in plan.settings.items()),
        ]
        key = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
        return cls(
            plan,
            HostCache(directory, writable=os.access(directory, os.W_OK | os.X_OK)),
            f"openvino-{key}.blob",
        )

    def open(self) -> Any | None:
        """Return the compiled tower; ``None`` where it is not here or does not load."""
        data = self.entries.get(self.name)
        if data is None:
            return None
        try:
            return _core().import_model(io.BytesIO(data), self.plan.device, dict(self.plan.settings))
        except Exception:  # compiled again
            _log.debug("the compiled form %s does not load", self.name, exc_info=True)
            return None

    def keep(self, compiled: Any) -> int | None:
        """Keep a compiled tower; return its size, ``None`` where that failed, which costs time alone."""
        if not self.entries.writable:
            return None
        stream = io.BytesIO()
        try:
            compiled.export_model(stream)
        except Exception:
            _log.debug("%s cannot be exported", self.plan.model.name, exc_info=True)
            return None
        data = stream.getbuffer()
        return data.nbytes if self.entries.put(self.name, data) else None


# --- words ------------------------------------------------------------------------------------------------


def _version() -> str:
    """Return OpenVINO's version without the digits of its build: ``"2026.4.1"``."""
    return str(import_openvino().__version__).partition("-")[0]


def _type_name(value: Any) -> str:
    return str(value.get_type_name()) if hasattr(value, "get_type_name") else str(value)


def _specs(ports: list[Any], model: ModelFiles) -> Mapping[str, TensorSpec]:
    specs = {}
    for port in ports:
        name, kind = str(port.any_name), _type_name(port.element_type)
        if kind not in _DTYPES:
            raise BackendError(
                f"{model.name}: {name!r} has the type {kind!r}, expected one of "
                f"{', '.join(sorted(_DTYPES.values()))}. Export the tower again."
            )
        shape = tuple(
            ("B" if axis == 0 else f"d{axis}") if size.is_dynamic else int(size.get_length())
            for axis, size in enumerate(port.partial_shape)
        )
        specs[name] = TensorSpec(name, _DTYPES[kind], shape)
    return MappingProxyType(specs)


def _translated(error: Exception, where: str) -> BackendError:
    text = openvino_message(error)
    if isinstance(error, MemoryError) or re.search(
        r"bad_alloc|out of memory|allocat\w+ .*memory", text, re.I
    ):
        return BackendError(
            f"{where}: out of memory ({text}). Use a smaller batch, a smaller variant or "
            "RuntimeOptions(low_memory=True)."
        )
    if re.search(r"can not open file", text, re.I):
        return BackendError(f"{where}: a file is missing ({text}). Restore the bundle.")
    if re.search(
        r"unable to read the model|can't be parsed|pugi|tags mismatch|bin file|no output", text, re.I
    ):
        return BackendError(f"{where}: it is damaged, or not a model ({text}). Restore the bundle.")
    return BackendError(f"{where}: {text}.")


# Source files, and lines that announce the next one.
_NOISE: Final = re.compile(
    r"(?:\[\w+\] .*)?Exception from \S+:$|Check '.*' failed at \S+$|FrontEnd API failed with \w+:?$"
    r"|Loading input model$|Model wasn't fully converted|While validating |-- .* with a message:$|Summary:$"
)


def openvino_message(error: Exception) -> str:
    """Shorten a message of OpenVINO: what follows the list of source files, without directories."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not _NOISE.match(line)] or lines[-1:] or [type(error).__name__]
    # An operator that is not known is said last, after what failed because of it.
    telling.sort(key=lambda line: "No conversion rule" not in line)
    text = re.sub(r"(?<![\w.])/(?:[^/\s\"']+/)+", "", telling[0]).removeprefix("-- ")
    return " ".join(re.split(r"\.? Please check|\. Ensure", text)[0].split()).rstrip(" .:")[:300]
