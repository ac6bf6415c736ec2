"""What works on this machine and what does not, each problem with one thing to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeclip.bundle import EMBEDDED, Bundle
from edgeclip.cache import cache_root
from edgeclip.errors import BackendError, BundleError, EdgeClipError
from edgeclip.runtime.choose import choose_variant
from edgeclip.runtime.cuda import find_gpu
from edgeclip.runtime.host import Host, cpu_times, versions
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.runtime.parity import golden_check
from edgeclip.runtime.session import BACKENDS, DEFAULT_OPTIONS
from edgeclip.runtime.trt_build import MODULES, import_tensorrt
from edgeclip.runtime.tuned import find_profile

__all__ = ["BackendState", "Check", "Diagnosis", "diagnose"]

_MIN_OPEN_FILES = 1024
_BUSY_STEAL_SHARE = 0.05


@dataclass(frozen=True)
class BackendState:
    """Whether a backend can be used here.

    Attributes:
        name: as in ``RuntimeOptions.backend``.
        works: whether it can.
        detail: version and providers, or why it cannot be used and what to run.
    """

    name: str
    works: bool
    detail: str


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: of the thing.
        state: ``"problem"`` costs something, ``"broken"`` means that edgeclip cannot classify here.
        detail: what was found.
        suggestion: what to do; empty where all is well.
    """

    name: str
    state: Literal["ok", "problem", "broken"]
    detail: str
    suggestion: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``edgeclip doctor`` says."""

    host: Host
    versions: dict[str, str]
    backends: tuple[BackendState, ...]
    checks: tuple[Check, ...]

    @property
    def broken(self) -> tuple[Check, ...]:
        """The checks without which nothing runs."""
        return tuple(check for check in self.checks if check.state == "broken")

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain JSON values."""
        return {
            "schema": 1,
            "kind": "doctor",
            "host": self.host.to_dict(),
            "versions": self.versions,
            "backends": {state.name: asdict(state) for state in self.backends},
            "checks": [asdict(check) for check in self.checks],
        }


def diagnose(bundle: str | os.PathLike[str] = "default") -> Diagnosis:
    """Look at this machine; loads engines, runs the golden pictures of a bundle, and writes nothing.

    Args:
        bundle: whose golden check stands for "it works here".
    """
    backends = tuple(_backend(name) for name in BACKENDS)
    base = next(state for state in backends if state.name == "ort")
    checks = [_base(base), _one_onnxruntime(), _telemetry()]
    if base.works:
        checks += [_bundle(bundle), _tuned(bundle)]
    checks += [_cache(), _open_files(), _steal()]
    return Diagnosis(Host.here(), versions(), backends, tuple(check for check in checks if check))


def _backend(name: str) -> BackendState:
    why = BACKENDS[name].unavailable()
    if why is not None:
        return BackendState(name, False, why)
    if name == "ort":
        try:
            ort = import_onnxruntime()
        except BackendError as error:
            return BackendState(name, False, str(error))
        # Azure's provider sends pictures to a server; edgeclip never uses it.
        providers = [found for found in ort.get_available_providers() if found != "AzureExecutionProvider"]
        return BackendState(name, True, f"onnxruntime {ort.__version__}: {', '.join(providers)}")
    if name == "openvino":
        from edgeclip.runtime.ov import openvino_devices

        try:
            devices = ", ".join(f"{device} ({said})" for device, said in openvino_devices().items())
        except BackendError as error:
            return BackendState(name, False, str(error))
        return BackendState(name, True, f"openvino {versions().get(name, '')}: {devices or 'no device'}")
    if name in MODULES:
        return _tensorrt(name)
    version = versions().get(name.replace("_", "-"), "")
    return BackendState(name, True, f"{BACKENDS[name].library} {version}".strip())


def _tensorrt(name: str) -> BackendState:
    try:
        trt = import_tensorrt(name)
    except BackendError as error:
        return BackendState(name, False, str(error).rstrip("."))
    said = f"{trt.__name__} {trt.__version__}"
    try:
        gpu = find_gpu()
    except BackendError as error:
        return BackendState(name, False, f"{said} is installed, and {str(error).rstrip('.')}")
    return BackendState(name, True, f"{said}: {gpu.name}, compute capability {gpu.compute_capability}")


def _base(state: BackendState) -> Check:
    if state.works:
        return Check("base backend", "ok", state.detail)
    return Check("base backend", "broken", state.detail, f"run {BACKENDS['ort'].install}")


def _one_onnxruntime() -> Check | None:
    """Say when two distributions have written into one module: files of both are mixed then."""
    found = sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", ())))
    if len(found) < 2:
        return None
    return Check(
        "onnxruntime packages",
        "problem",
        f"{' and '.join(found)} are installed over each other in one module",
        f"run pip uninstall -y {' '.join(found)}, then install the one you want",
    )


def _telemetry() -> Check | None:
    said = os.environ.get("ORT_DISABLE_TELEMETRY", "1")
    if said == "1":
        return None
    return Check(
        "telemetry",
        "problem",
        f"ORT_DISABLE_TELEMETRY is {said!r}, so onnxruntime may report to its makers",
        "unset it; edgeclip then switches the reports off",
    )


def _bundle(path: str | os.PathLike[str]) -> Check:
    name = "embedded bundle" if path in EMBEDDED else "bundle"
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        return Check(
            name, "problem", str(error), "name a bundle with --bundle, or install edgeclip from a wheel"
        )
    try:
        choice = choose_variant(bundle)
        report = golden_check(bundle, choice.variant, options=choice.options_for(DEFAULT_OPTIONS))
    except EdgeClipError as error:
        return Check(name, "broken", str(error), f"run edgeclip verify {path}")
    failures = [f"{tower.tower}: {failure}" for tower in report.towers.values() for failure in tower.failures]
    if failures:
        return Check(
            name, "broken", f"{report.variant}: {'; '.join(failures)}", f"run edgeclip verify {path}"
        )
    cosines = ", ".join(
        f"{tower.tower} cosine {tower.numbers.cosine_min:.5f}" for tower in report.towers.values()
    )
    return Check(name, "ok", f"{report.variant} gives the right answers here ({cosines})")


def _tuned(path: str | os.PathLike[str]) -> Check | None:
    """Say whether a tuned profile decides what ``auto`` takes of a bundle."""
    try:
        found = find_profile(Bundle.open(path), Host.here(), "cpu")
    except BundleError:
        return None  # said already
    again = f"edgeclip tune {path}"
    if found is None:
        return Check("tuned profile", "ok", f"none, so the order of the bundle decides; '{again}' makes one")
    if found.stale is not None:
        return Check("tuned profile", "problem", f"it is not used: {found.stale}", f"run {again}")
    return Check("tuned profile", "ok", str(found.profile))


def _cache() -> Check:
    root = cache_root()
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Check("cache", "ok", f"{str(root)!r} can be written")
    return Check(
        "cache",
        "problem",
        f"{str(root)!r} cannot be written, so labels are encoded at every start",
        "set EDGECLIP_CACHE_DIR to a directory you can write",
    )


def _open_files() -> Check | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MIN_OPEN_FILES:
        return Check("open files", "ok", f"at most {soft}")
    wanted = _MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else min(_MIN_OPEN_FILES, hard)
    return Check("open files", "problem", f"at most {soft}", f"run ulimit -n {wanted}")


def _steal() -> Check | None:
    times = cpu_times()
    share = 0.0 if times is None else times.steal / max(1, times.total)
    if share < _BUSY_STEAL_SHARE:
        return None
    return Check(
        "neighbours",
        "problem",
        f"the hypervisor gave {share:.0%} of this machine's time since start to others",
        "measure latency somewhere quieter",
    )
