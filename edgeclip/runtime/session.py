"""Open one tower on one inference engine: the session protocol, its options and the one input check.

A backend is a module with a function ``load(model, options, reason=…) -> Engine``; :data:`BACKENDS` maps
its name to that module, which is imported when the backend is used and not before. What every backend shares
stands here and nowhere else: names, dtypes and shapes of the inputs are checked, use after ``close`` or after
``fork`` is refused, and engines that cannot run twice at once are serialised. A session knows no bundles,
pictures, tokens or clocks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast, runtime_checkable

from edgeclip.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    ConfigError,
    InputError,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.bundle import TensorEntry, TowerFiles

__all__ = [
    "BACKENDS",
    "DEFAULT_OPTIONS",
    "OPENVINO_DEVICES",
    "Backend",
    "Engine",
    "KernelTime",
    "ModelFiles",
    "OpenSession",
    "Placement",
    "Prepared",
    "RuntimeOptions",
    "Session",
    "TensorSpec",
    "model_files",
    "open_session",
    "resolve_backend",
]


class KernelTime(NamedTuple):
    """How long one kernel took in one call, as its engine says: its name there, its code, milliseconds.

    ``start_ms`` is when it began, from the start of its call; ``None`` where an engine does not tell.
    ``nodes`` are those of the file that it computes, where an engine tells more than a name.
    """

    name: str
    kernel: str
    ms: float
    start_ms: float | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSpec:
    """Describe one input or output.

    Attributes:
        name: its name in the graph.
        dtype: numpy name of the element type, such as ``"uint8"``.
        shape: sizes; a name such as ``"B"`` is a size that is free, and the same name the same size.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {_shape_text(self.shape)}"


@dataclass(frozen=True)
class Placement:
    """Say where a tower really runs, and why there.

    Attributes:
        backend: our name of the engine, such as ``"ort"``.
        provider: the engine's own name of what executes, such as ``"CPUExecutionProvider"``.
        device: ``"cpu"``, ``"cuda:0"``, ``"gpu:0"`` …, as :func:`parse_device` takes it.
        threads: threads a call may use on the CPU.
        precision: precision of the variant, or ``"as stored"`` for a bare model file.
        reason: why this backend, device and thread count, in words.
    """

    backend: str
    provider: str
    device: str
    threads: int
    precision: str
    reason: str


OPENVINO_DEVICES: Final = frozenset({"gpu", "npu", "auto", "hetero", "multi"})
"""Kinds of device that OpenVINO alone runs on; the last three choose among others, when asked by name."""

_ONE_DEVICE: Final = re.compile(r"(cpu|npu)|(cuda|gpu)(?::([0-9]{1,4}))?")
_SEVERAL_DEVICES: Final = re.compile(r"(auto)|(auto|hetero|multi):((?:cpu|npu|gpu(?::[0-9]{1,4})?)(?:,|$))+")


def parse_device(device: str) -> tuple[str, int]:
    """Split a device into kind and index.

    ``"cpu"``; ``"cuda"`` and ``"cuda:N"`` are NVIDIA's GPUs; ``"gpu"``, ``"gpu:N"`` and ``"npu"`` are
    Intel's, for OpenVINO, as are ``"auto"``, ``"auto:LIST"``, ``"hetero:LIST"`` and ``"multi:LIST"`` with a
    list such as ``gpu,cpu``, whose index is 0.

    Raises:
        ConfigError: it is none of these.
    """
    said = str(device)
    one = _ONE_DEVICE.fullmatch(said)
    if one is not None:
        return one[1] or one[2], int(one[3] or 0)
    several = _SEVERAL_DEVICES.fullmatch(said)
    if several is not None and not said.endswith(","):
        return several[1] or several[2], 0
    raise ConfigError(
        f"device: got {device!r}, expected 'cpu', 'cuda' or 'cuda:N'; or for OpenVINO 'gpu', 'gpu:N', 'npu', "
        "'auto', or 'auto:', 'hetero:' or 'multi:' with a list such as gpu,cpu."
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class RuntimeOptions:
    """Choose how towers are run. What is asked for here is what runs, or opening is an error.

    Attributes:
        backend: ``"auto"`` (the backend of the variant's format) or a name in :data:`BACKENDS`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or one of OpenVINO's, see :func:`parse_device`.
        providers: ONNX Runtime execution providers in order of preference; ``None`` follows ``device``.
        threads: threads a call may use, at least 1; ``None`` is what the tuned profile says, else the number
            of usable cores (affinity and container limits respected).
        spinning: let worker threads spin between calls: a little faster alone, much slower beside others.
            ``None`` is off, unless the tuned profile of the device says otherwise.
        affinity: one logical CPU number (from 0) for each thread. The first belongs to the calling thread,
            which is never pinned; worker threads are.
        low_memory: no arena, no pre-packed weights: less memory, slower calls. ``None`` as for ``spinning``.
        cache_dir: where compiled forms may be kept; ``None`` keeps none.
        allow: guards to lift: ``"unverified"`` takes variants without passed parity, ``"unsafe-isa"`` takes
            variants made for other instruction sets.

    Raises:
        ConfigError: a value cannot be used.
    """

    backend: str = "auto"
    device: str = "cpu"
    providers: tuple[str, ...] | None = None
    threads: int | None = None
    spinning: bool | None = None
    affinity: tuple[int, ...] | None = None
    low_memory: bool | None = None
    cache_dir: Path | None = None
    allow: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for name, kind in (("providers", tuple), ("affinity", tuple)):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name}: got {value!r}, expected a tuple or None.")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise BackendUnavailableError(
                f"backend: got {self.backend!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}."
            )
        parse_device(self.device)
        if self.threads is not None and (not _is_int(self.threads) or self.threads < 1):
            raise ConfigError(
                f"threads: got {self.threads!r}, expected a whole number of at least 1, or None."
            )
        if self.affinity is not None:
            self._check_affinity(self.affinity)
        if self.providers is not None and not self.providers:
            raise ConfigError("providers: got none, expected at least one name, or None to follow device.")
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", Path(self.cache_dir))
        object.__setattr__(self, "allow", frozenset(self.allow))
        unknown = sorted(self.allow - _ALLOWABLE)
        if unknown:
            known = ", ".join(map(repr, sorted(_ALLOWABLE)))
            raise ConfigError(f"allow: got {unknown[0]!r}, expected some of {known}.")

    def _check_affinity(self, affinity: tuple[int, ...]) -> None:
        if not affinity or not all(_is_int(cpu) and cpu >= 0 for cpu in affinity):
            raise ConfigError(
                f"affinity: got {affinity!r}, expected CPU numbers from 0, one for each thread."
            )
        if self.threads is not None and self.threads != len(affinity):
            raise ConfigError(
                f"affinity: got {len(affinity)} CPU numbers for {self.threads} threads, "
                f"expected one for each thread."
            )


_ALLOWABLE: Final = frozenset({"unsafe-isa", "unverified"})


DEFAULT_OPTIONS: Final = RuntimeOptions()


class Session(Protocol):
    """One loaded tower.

    Sessions from :func:`open_session` may be used from many threads; others say so themselves.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What ``run`` takes, by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What ``run`` gives, by name."""
        ...

    @property
    def chosen(self) -> Placement:
        """Where the tower really runs, and why."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the tower once and return every output, ready and owned by the caller."""
        ...

    def close(self) -> None:
        """Release the engine. Calling it again does nothing."""
        ...


@runtime_checkable
class Engine(Protocol):
    """What a backend's ``load`` returns: a loaded tower without the checks that :class:`OpenSession` adds.

    ``run`` gets feeds whose names, dtypes and shapes are right, and returns arrays the caller owns.
    ``concurrent_runs`` is true when ``run`` may be entered by many threads at once.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """See :class:`Session`."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """See :class:`Session`."""
        ...

    @property
    def chosen(self) -> Placement:
        """See :class:`Session`."""
        ...

    @property
    def concurrent_runs(self) -> bool:
        """Whether many threads may be in ``run`` at once."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once with feeds that are already checked."""
        ...

    def close(self) -> None:
        """Release the engine."""
        ...


@dataclass(frozen=True)
class ModelFiles:
    """The files of one tower, as a backend gets them.

    Attributes:
        model: main file.
        name: what messages call it.
        format: ``"onnx"``, ``"openvino"`` or ``"tensorrt"``.
        precision: see :class:`Placement`.
        session_config: engine keys the bundle asks for.
        digest: identifies the content; ``None`` for a bare file.
        files: all files of the tower, ``model`` among them; empty for a bare file.
        variant: its name in the bundle, and ``bundle``: where it comes from.
    """

    model: Path
    name: str
    format: str
    precision: str = "as stored"
    session_config: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None
    files: tuple[Path, ...] = ()
    variant: str | None = None
    bundle: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What a backend's ``prepare`` leaves behind for a tower, so that opening it is quick.

    Attributes:
        path: the compiled form; ``None`` where the engine has none for this tower.
        size_bytes: of it.
        seconds: spent.
        up_to_date: it was there already, and nothing was done.
    """

    path: Path | None
    size_bytes: int
    seconds: float
    up_to_date: bool


@dataclass(frozen=True)
class Backend:
    """One row of :data:`BACKENDS`.

    Attributes:
        module: our module that has ``load``.
        library: the foreign module it needs.
        formats: variant formats it runs.
        install: what to type when the library is missing.
        bindings: the inner half of ``library``, which suffices where it is installed alone.
    """

    module: str
    library: str
    formats: tuple[str, ...]
    install: str
    bindings: str | None = None

    def unavailable(self) -> str | None:
        """Return why this backend cannot be used here, or ``None`` where it can. Imports nothing."""
        if importlib.util.find_spec(self.module) is None:
            return "this edgeclip has no such backend yet"
        if not _has_module(self.library) and not (self.bindings and _has_module(self.bindings)):
            return f"the package {self.library!r} is not installed: run {self.install}"
        return None


BACKENDS: Final[Mapping[str, Backend]] = MappingProxyType(
    {
        "ort": Backend("edgeclip.runtime.ort", "onnxruntime", ("onnx",), "pip install onnxruntime"),
        "openvino": Backend(
            "edgeclip.runtime.ov", "openvino", ("openvino", "onnx"), 'pip install "edgeclip[openvino]"'
        ),
        "tensorrt": Backend(
            "edgeclip.runtime.trt",
            "tensorrt",
            ("tensorrt",),
            "pip install tensorrt (Jetson: part of JetPack)",
            "tensorrt_bindings",
        ),
        "tensorrt_rtx": Backend(
            "edgeclip.runtime.trt",
            "tensorrt_rtx",
            ("tensorrt",),
            'pip install "edgeclip[rtx]"',
            "tensorrt_rtx_bindings",
        ),
        "eager": Backend("edgeclip.runtime.eager", "torch", (), 'pip install "edgeclip[export]"'),
    }
)
"""Backend name to where it lives; the order is the order of preference for a format."""


class OpenSession:
    """A :class:`Session` around an engine: a context manager that checks inputs once, for all backends.

    Safe to use from many threads: engines that cannot run twice at once wait for one another. A
    call that is running while another thread closes the session ends normally.
    """

    def __init__(self, engine: Engine, *, name: str) -> None:
        import numpy as np

        self._engine: Engine | None = engine
        self._name = name
        self._inputs = engine.inputs
        self._outputs = engine.outputs
        self._chosen = engine.chosen
        self._lock = None if engine.concurrent_runs else threading.Lock()
        self._process = os.getpid()
        _LIVE.add(self)
        # (name, dtype, shape) of every input, ready to be compared: `dtype.name` is Python code, `==` is not.
        self._expected = tuple(
            (spec.name, np.dtype(spec.dtype), spec.shape) for spec in self._inputs.values()
        )

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What ``run`` takes, by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What ``run`` gives, by name."""
        return self._outputs

    @property
    def chosen(self) -> Placement:
        """Where the tower really runs, and why."""
        return self._chosen

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the tower once.

        Args:
            feeds: one array for each of ``inputs``, with exactly its dtype and shape. They are only read.

        Returns:
            Every output by name. The arrays are the caller's: no later call changes them.

        Raises:
            InputError: a name, dtype or shape is wrong.
            BackendError: the session is closed, was opened before a ``fork``, or the engine failed.
        """
        engine = self._engine
        if engine is None:
            raise BackendError(f"{self._name}: the session is closed. Open it again with open_session().")
        if os.getpid() != self._process:
            raise BackendError(
                f"{self._name}: the session was opened in process {self._process} and does not work after "
                f"fork (this is process {os.getpid()}). Open a session in each process."
            )
        self._check(feeds)
        if self._lock is None:
            return engine.run(feeds)
        with self._lock:
            return engine.run(feeds)

    def close(self) -> None:
        """Release the engine. Calling it again does nothing; calls in flight end normally."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if os.getpid() == self._process:
            engine.close()

    def _leak(self) -> None:
        """Keep the engine's memory for ever, in a child process after ``fork``.

        Freeing an engine waits for its worker threads. They do not exist in the child, so it would hang: in
        ``close``, when the object is collected, or at exit.
        """
        import ctypes

        if self._engine is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))

    def __enter__(self) -> OpenSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else f"{self._chosen.backend} on {self._chosen.device}"
        return f"<OpenSession {self._name!r}: {state}>"

    def _check(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Raise unless ``feeds`` is what the tower takes."""
        if len(feeds) != len(self._expected) or any(name not in feeds for name, _, _ in self._expected):
            got = ", ".join(map(repr, sorted(feeds))) or "no inputs"
            expected = ", ".join(repr(name) for name, _, _ in self._expected)
            raise InputError(
                f"{self._name}: got the inputs {got}, expected {expected}. Pass exactly these names."
            )
        bound: dict[str, tuple[str, int]] = {}
        for name, dtype, shape in self._expected:
            array = feeds[name]
            if type(array).__module__ != "numpy" or not hasattr(array, "dtype"):
                raise InputError(
                    f"{name}: got {type(array).__name__}, expected a numpy array of {dtype} "
                    f"{_shape_text(shape)}."
                )
            if array.dtype != dtype:  # another byte order is another dtype
                raise InputError(
                    f"{name}: got dtype {array.dtype!s}, expected {dtype}. "
                    f"Convert with `array.astype({dtype.name!r})`."
                )
            got_shape = array.shape
            if len(got_shape) != len(shape):
                raise InputError(_wrong_shape(name, got_shape, shape))
            for size, want in zip(got_shape, shape, strict=True):
                if isinstance(want, int):
                    if size != want:
                        raise InputError(_wrong_shape(name, got_shape, shape))
                elif size < 1:
                    raise InputError(
                        f"{name}: got the empty shape {_shape_text(got_shape)}, expected "
                        f"{_shape_text(shape)} with {want} at least 1."
                    )
                else:
                    first, other = bound.setdefault(want, (name, size))
                    if other != size:
                        raise InputError(
                            f"{name}: got {want} = {size} where {first} has {want} = {other}, "
                            f"expected the same."
                        )


_LIVE: Final[weakref.WeakSet[OpenSession]] = weakref.WeakSet()


def _leak_all_in_child() -> None:
    for session in list(_LIVE):
        session._leak()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_all_in_child)


def open_session(tower: TowerFiles | Path | str, *, options: RuntimeOptions = DEFAULT_OPTIONS) -> OpenSession:
    """Load one tower and return it ready to run.

    Args:
        tower: a tower of a bundle, or the path of a bare model file (``.onnx``).
        options: backend, device, threads.

    Returns:
        A session, also a context manager that closes it.

    Raises:
        BackendUnavailableError: the backend, provider or device asked for is not here, or int8 sums of this
            file would overflow on this host.
        BackendError: the engine cannot load the file.
        BundleError: the tower is not what the manifest says.
    """
    model = model_files(tower)
    name, reason = resolve_backend(model.format, options)
    module = cast(Any, importlib.import_module(BACKENDS[name].module))
    from edgeclip.runtime.byte_sums import refuse_overflow
    from edgeclip.runtime.host import release_freed_memory

    refuse_overflow(model, name, options)
    engine: Engine = module.load(model, options, reason=reason)
    release_freed_memory()
    if not isinstance(tower, (str, os.PathLike)):
        _check_interface("inputs", tower.inputs, engine.inputs, model)
        _check_interface("outputs", tower.outputs, engine.outputs, model)
    return OpenSession(engine, name=model.name)


def resolve_backend(model_format: str, options: RuntimeOptions) -> tuple[str, str]:
    """Return the backend that runs a format, and the reason in words.

    Raises:
        BackendUnavailableError: none of them is here, or the one asked for cannot run the format.
    """
    if options.backend != "auto":
        backend = BACKENDS[options.backend]
        if backend.formats and model_format not in backend.formats:
            raise BackendUnavailableError(
                f"backend {options.backend!r} runs {' and '.join(backend.formats)} files, got "
                f"{model_format!r}. Choose another variant or backend='auto'."
            )
        why = backend.unavailable()
        if why:
            raise BackendUnavailableError(f"backend {options.backend!r} cannot be used: {why}.")
        return options.backend, f"backend {options.backend} was asked for"
    reasons = []
    for name, backend in BACKENDS.items():
        if model_format in backend.formats:
            why = backend.unavailable()
            if why is None:
                return name, f"backend {name} runs {model_format} files"
            reasons.append(f"{name}: {why}")
    if not reasons:
        known = sorted({known for backend in BACKENDS.values() for known in backend.formats})
        raise BackendUnavailableError(
            f"got a {model_format!r} file, expected one of {', '.join(map(repr, known))}."
        )
    raise BackendUnavailableError(f"no backend for {model_format!r} files is here ({'; '.join(reasons)}).")


_FORMAT_OF_SUFFIX: Final = {
    ".onnx": "onnx",
    ".ort": "onnx",
    ".xml": "openvino",
    ".engine": "tensorrt",
    ".plan": "tensorrt",
}


def model_files(tower: TowerFiles | Path | str) -> ModelFiles:
    """Return a tower of a bundle or a bare file as backends take it.

    Raises:
        InputError: the bare file is not there, or its suffix says no format.
    """
    if isinstance(tower, (str, os.PathLike)):
        path = Path(tower)
        if path.suffix not in _FORMAT_OF_SUFFIX:
            raise InputError(
                f"{str(path)!r}: got the suffix {path.suffix!r}, expected one of "
                f"{', '.join(map(repr, _FORMAT_OF_SUFFIX))}."
            )
        if not path.is_file():
            raise InputError(f"{str(path)!r} is not a file: expected a model to open.")
        return ModelFiles(model=path, name=path.name, format=_FORMAT_OF_SUFFIX[path.suffix])
    return ModelFiles(
        model=tower.model,
        name=f"{tower.variant} {tower.tower} tower",
        format=tower.format,
        precision=tower.precision,
        session_config=dict(tower.session_config),
        digest=tower.digest,
        files=tower.files,
        variant=tower.variant,
        bundle=tower.bundle,
    )


def _check_interface(
    kind: str, said: tuple[TensorEntry, ...], found: Mapping[str, TensorSpec], model: ModelFiles
) -> None:
    """Raise unless the tower is what the manifest says it is; names of free sizes may differ."""
    expected = {entry.name: (entry.dtype, _fixed(entry.shape)) for entry in said}
    if expected != {spec.name: (spec.dtype, _fixed(spec.shape)) for spec in found.values()}:
        has = ", ".join(f"{spec.name} {spec}" for spec in found.values())
        says = ", ".join(f"{entry.name} {entry.dtype} {_shape_text(entry.shape)}" for entry in said)
        raise BundleError(
            f"{model.name}: {model.model.name!r} has the {kind} {has}, the manifest says {says}. "
            "Export the bundle again."
        )


def _fixed(shape: tuple[int | str, ...]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in shape)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _shape_text(shape: tuple[int | str, ...]) -> str:
    inside = ", ".join(map(str, shape))
    return f"({inside},)" if len(shape) == 1 else f"({inside})"


def _wrong_shape(name: str, got: tuple[int, ...], expected: tuple[int | str, ...]) -> str:
    message = f"{name}: got shape {_shape_text(got)}, expected {_shape_text(expected)}."
    if len(got) == len(expected) - 1 and isinstance(expected[0], str):
        return f"{message} Add the batch axis with `array[None]`."
    return message
