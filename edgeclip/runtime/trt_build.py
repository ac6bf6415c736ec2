"""Build a TensorRT engine from a tower's ONNX file: one path for TensorRT 10, 11 and TensorRT-RTX.

The three share one Python API; which is used is a module handle. Networks are strongly typed: the ONNX file
says the precision of every tensor, no flag does. TensorRT answers most failures with ``None`` or ``False``
and a logged line, so every answer is checked, and the last line of the log is part of the message. Needs the
base install and the engine: no torch, no onnx. Engine bytes are not reproducible: TensorRT times kernels.

TensorRT Python API 10.3 to 11.4, TensorRT-RTX 1.7.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError

__all__ = [
    "MODULES",
    "BatchRange",
    "BuiltEngine",
    "EngineLog",
    "build_engine",
    "compute_capabilities",
    "import_tensorrt",
    "is_rtx",
]

MODULES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "tensorrt": ("tensorrt", "tensorrt_bindings"),
        "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    }
)
"""Backend to the names under which its module may be installed; the second is the first's inner half."""

_OLDEST: Final = 10
_log = logging.getLogger(__name__)


def import_tensorrt(backend: str) -> Any:
    """Return the module of a backend: ``tensorrt``, ``tensorrt_rtx``, or the bindings alone.

    Raises:
        BackendUnavailableError: none is installed, its libraries are missing, or it is too old.
    """
    reasons = []
    for name in MODULES[backend]:
        try:
            trt = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a DLL
            reasons.append(f"{name}: {error}")
            continue
        version = str(trt.__version__)
        major = re.match(r"\d+", version)
        if not is_rtx(trt) and (major is None or int(major[0]) < _OLDEST):
            raise BackendUnavailableError(
                f"backend {backend!r}: got TensorRT {version}, expected {_OLDEST} or newer: it comes with "
                "JetPack 6, elsewhere run pip install -U tensorrt."
            )
        return trt
    raise BackendUnavailableError(f"backend {backend!r} cannot be used: {'; '.join(reasons)}.")


def is_rtx(trt: Any) -> bool:
    """Return whether a module is TensorRT-RTX."""
    return str(trt.__name__).startswith("tensorrt_rtx")


def compute_capabilities(trt: Any) -> tuple[str, ...]:
    """Return the GPU generations that a module can build for without one at hand, such as ``"8.6"``."""
    if not is_rtx(trt):
        return ()
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names)


@dataclass(frozen=True)
class BatchRange:
    """Batches an engine is built for.

    Attributes:
        smallest: rows of the smallest batch.
        best: rows that the engine is tuned for.
        largest: rows of the largest batch.

    Raises:
        ConfigError: they are not ``1 <= smallest <= best <= largest``.
    """

    smallest: int = 1
    best: int = 1
    largest: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.best <= self.largest:
            raise ConfigError(
                f"batch: got {self}, expected 1 <= MIN <= OPT <= MAX, such as 1/1/8 or simply 1,8."
            )

    def __str__(self) -> str:
        return f"{self.smallest}/{self.best}/{self.largest}"

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Read ``"8"`` (only that), ``"1,8"`` (1 to 8, tuned for the first) or ``"1/4/8"`` (MIN/OPT/MAX).

        Raises:
            ConfigError: it is none of these.
        """
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*,\s*(\d{1,6})|\s*/\s*(\d{1,6})\s*/\s*(\d{1,6}))?\s*", text)
        if match is None:
            raise ConfigError(f"batch: got {text!r}, expected N, OPT,MAX or MIN/OPT/MAX, such as 1,8.")
        first, last, best, largest = (None if group is None else int(group) for group in match.groups())
        if best is not None:
            return cls(first or 0, best, largest or 0)
        if last is not None:
            return cls(min(first or 0, last), first or 0, max(first or 0, last))
        return cls(first or 0, first or 0, first or 0)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and how it was built.

    Attributes:
        data: the serialized engine.
        profile: smallest, best and largest shape of every input with a free batch.
        build_s: seconds that parsing and building took.
        layers: of the parsed network.
        timing_cache: what to hand to the next build; ``None`` where the engine keeps none.
    """

    data: bytes
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    build_s: float
    layers: int
    timing_cache: bytes | None


class EngineLog:
    """TensorRT's log of one process: errors are kept for messages, the rest goes to :mod:`logging`.

    TensorRT takes the first logger of a process for all that follow, so there is one of each module.
    """

    _LOGS: Final[dict[str, EngineLog]] = {}

    def __init__(self, trt: Any) -> None:
        self._errors: deque[str] = deque(maxlen=64)
        errors = self._errors
        loud = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]  # the module is known at run time
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in loud:
                    errors.append(" ".join(msg.split()))
                _log.debug("%s", msg)

        self.logger: Any = Logger()

    @classmethod
    def of(cls, trt: Any) -> EngineLog:
        """Return the log of a module."""
        name = str(trt.__name__)
        if name not in cls._LOGS:
            cls._LOGS[name] = cls(trt)
        return cls._LOGS[name]

    def begin(self) -> None:
        """Forget earlier errors."""
        self._errors.clear()

    def last(self) -> str:
        """Return the last error since :meth:`begin`, in brackets and ready for a message; else nothing.

        Without a GPU many calls also say that there is none, after what matters: such lines count only
        where nothing else was said.
        """
        told = [line for line in self._errors if "catchCudaError" not in line] or list(self._errors)
        return f" ({told[-1][:400].rstrip('. ')})" if told else ""


def build_engine(
    trt: Any,
    model: Path,
    *,
    name: str,
    batch: BatchRange,
    compute_capability: str | None = None,
    workspace_bytes: int | None = None,
    timing_cache: bytes = b"",
    on_progress: Callable[[str], None] | None = None,
) -> BuiltEngine:
    """Parse an ONNX file and build an engine.

    Args:
        trt: see :func:`import_tensorrt`.
        model: the file; external data are read beside it.
        name: what messages call the tower.
        batch: for inputs whose first axis is free.
        compute_capability: GPU generation to build for (TensorRT-RTX alone); ``None`` is the engine's own
            choice: TensorRT builds for the GPU at hand, TensorRT-RTX for all it supports.
        workspace_bytes: memory the engine may use for intermediate values; ``None`` sets no limit.
        timing_cache: what an earlier build gave; ignored where it does not fit.
        on_progress: told the stages of the build. What it raises ends the build.

    Raises:
        BackendUnavailableError: there is no GPU, or the engine cannot build for that generation.
        BackendError: the file cannot be parsed or built; the message has the last line of TensorRT's log.
    """
    log = EngineLog.of(trt)
    log.begin()
    began = time.perf_counter()
    what = f"{name}: {'TensorRT-RTX' if is_rtx(trt) else 'TensorRT'} {trt.__version__}"
    with _interrupt_noted() as interrupted:
        try:
            builder = trt.Builder(log.logger)
        except TypeError as error:  # the factory gave a null pointer
            raise BackendUnavailableError(
                f"{what} cannot start: it finds no usable GPU{log.last()}. Build on the device itself."
            ) from error
        network = _parse(trt, builder, model, what, log)
        config = _configuration(trt, builder, workspace_bytes, what, log)
        if compute_capability is not None:
            _aim(trt, config, compute_capability, what, log)
        profile = _add_profile(builder, network, config, batch, what, log)
        timing = _set_timing_cache(trt, config, timing_cache)
        monitor = _monitor(trt, on_progress, interrupted)
        config.progress_monitor = monitor
        if interrupted.is_set():
            raise KeyboardInterrupt
        memory = builder.build_serialized_network(network, config)
    if monitor.raised is not None:
        raise monitor.raised
    if memory is None:
        raise BackendError(
            f"{what} cannot build {model.name!r} for batches {batch}{log.last()}. Try a smaller batch or "
            "workspace, or another variant."
        )
    return BuiltEngine(
        data=bytes(memory),
        profile=profile,
        build_s=time.perf_counter() - began,
        layers=network.num_layers,
        timing_cache=_bytes_of(timing),
    )


def _parse(trt: Any, builder: Any, model: Path, what: str, log: EngineLog) -> Any:
    """Return the network of an ONNX file, strongly typed."""
    major = int(str(trt.__version__).partition(".")[0])
    # From 11 on, and in RTX, every network is strongly typed and the flag only warns.
    flags = 0 if is_rtx(trt) or major > 10 else 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    if network is None:
        raise BackendError(f"{what} gives no network{log.last()}.")
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(model)):
        said = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        reason = f" ({said[-1]})" if said else log.last()
        raise BackendError(f"{what} cannot parse {model.name!r}{reason}. Export the tower again.")
    if network.num_inputs == 0 or network.num_outputs == 0:
        raise BackendError(f"{what}: {model.name!r} has no input or no output. Export the tower again.")
    return network


def _parser_error(problem: Any) -> str:
    operator, node = str(problem.node_operator()), str(problem.node_name())
    where = f"{operator} {node}: ".replace(" :", ":") if operator or node else ""
    return f"{where}{' '.join(str(problem.desc()).split())[:400]}".rstrip(". ")


def _configuration(trt: Any, builder: Any, workspace_bytes: int | None, what: str, log: EngineLog) -> Any:
    config = builder.create_builder_config()
    if config is None:
        raise BackendError(f"{what} gives no build configuration{log.last()}.")
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers name their nodes, for profiles
    config.clear_flag(trt.BuilderFlag.TF32)  # on by itself, and float32 would have 10 bits of mantissa
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    return config


def _aim(trt: Any, config: Any, capability: str, what: str, log: EngineLog) -> None:
    known = compute_capabilities(trt)
    if capability not in known:
        can = f"one of {', '.join(known)}" if known else "none: it builds for the GPU at hand"
        raise BackendUnavailableError(
            f"{what} cannot build for compute capability {capability!r}, expected {can}."
        )
    config.num_compute_capabilities = 1
    aim = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
    if not config.set_compute_capability(aim, 0):
        raise BackendUnavailableError(
            f"{what} does not take the compute capability {capability!r}{log.last()}."
        )


def _add_profile(
    builder: Any, network: Any, config: Any, batch: BatchRange, what: str, log: EngineLog
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Say which shapes the inputs may have; nothing where all are fixed."""
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(int(size) for size in tensor.shape)
        if -1 in shape[1:]:
            raise BackendError(
                f"{what}: the input {tensor.name!r} has the shape {shape}, expected a free batch alone."
            )
        if shape and shape[0] == -1:
            rest = shape[1:]
            shapes[str(tensor.name)] = (
                (batch.smallest, *rest),
                (batch.best, *rest),
                (batch.largest, *rest),
            )
    if not shapes:
        return shapes
    profile = builder.create_optimization_profile()
    try:
        for name, (smallest, best, largest) in shapes.items():
            profile.set_shape(name, smallest, best, largest)
        added = config.add_optimization_profile(profile)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BackendError(f"{what} refuses the batches {batch} ({error}){log.last()}.") from error
    if added < 0:
        raise BackendError(f"{what} refuses the batches {batch}{log.last()}.")
    return shapes


def _set_timing_cache(trt: Any, config: Any, data: bytes) -> Any:
    """Return the timing cache of a build, which must live as long; ``None`` where there is none."""
    if is_rtx(trt):
        return None  # it measures nothing when it builds: kernels are made where the engine runs
    for content in dict.fromkeys((data, b"")):
        timing = config.create_timing_cache(content)
        if timing is not None and config.set_timing_cache(timing, False):
            return timing
        _log.debug("TensorRT does not take a timing cache of %d bytes", len(content))
    return None


def _bytes_of(timing: Any) -> bytes | None:
    memory = None if timing is None else timing.serialize()
    return None if memory is None else bytes(memory)


@contextlib.contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """Note Ctrl-C while TensorRT builds, and let it count afterwards.

    Python raises it in whatever Python code runs next, which is TensorRT's log or monitor, and TensorRT
    swallows what those raise. So the usual handler is put aside, and only where it stands and can be.
    """
    interrupted = threading.Event()
    usual = signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not usual:
        yield interrupted
        return
    signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupted.is_set():
        raise KeyboardInterrupt


def _monitor(trt: Any, on_progress: Callable[[str], None] | None, interrupted: threading.Event) -> Any:
    """Return a progress monitor. Nothing may be raised into TensorRT: a build is ended by an answer."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name)
            return self.raised is None and not interrupted.is_set()

        def _tell(self, phase_name: str) -> None:
            try:
                if self.raised is None and on_progress is not None:
                    on_progress(phase_name)
            except BaseException as error:  # raised again when the build has ended
                self.raised = error

    return Monitor()
