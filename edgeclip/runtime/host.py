"""Facts about the machine at hand, cheap enough to read at every start.

Files and system calls only: no subprocess, no foreign module. What a system does not tell is ``None`` in the
fields and ``"unavailable"`` in what is printed. Linux tells all of it; macOS and Windows part of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = [
    "UNAVAILABLE",
    "CpuTimes",
    "Host",
    "cpu_times",
    "engine_versions",
    "peak_rss_bytes",
    "release_freed_memory",
    "usable_cores",
    "versions",
]

UNAVAILABLE: Final = "unavailable"

# Linux's names in /proc/cpuinfo to ours; only what decides which kernels run.
_ISA_OF_FLAG: Final = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "neon": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
_ENGINES: Final = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "openvino",
    "tensorrt",
    "tensorrt-cu12-bindings",
    "tensorrt-cu13-bindings",
    "tensorrt-rtx",
    "tensorrt-rtx-cu12-bindings",
    "tensorrt-rtx-cu13-bindings",
)
_PACKAGES: Final = ("edgeclip", "numpy", "pillow", "torch", *_ENGINES)


@dataclass(frozen=True)
class Host:
    """What this machine is. Made by :meth:`here`.

    Attributes:
        system: ``"Linux"``, ``"Darwin"`` or ``"Windows"``.
        release: of the kernel.
        distribution: name and version of the Linux distribution.
        machine: ``"x86_64"``, ``"aarch64"`` …, one spelling on all systems.
        python: version.
        libc: name and version of the C library.
        cpu_model: as the machine calls it.
        isa: instruction sets that decide which kernels run, by our names (``avx2``, ``avx_vnni``, ``neon``,
            ``dotprod``…); ``None`` where the system does not tell.
        cores: usable by this process: affinity and container quota respected.
        logical_cpus: in the machine.
        cpu_quota: limit of the container in cores.
        memory_bytes: of the machine.
        memory_limit_bytes: of the container.
        container: whether this looks like a container.
        gpus: names of NVIDIA GPUs whose driver is loaded.
        board: name of a single-board computer.
    """

    system: str
    release: str
    distribution: str | None
    machine: str
    python: str
    libc: str | None
    cpu_model: str | None
    isa: frozenset[str] | None
    cores: int
    logical_cpus: int
    cpu_quota: float | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    container: bool
    gpus: tuple[str, ...]
    board: str | None

    @classmethod
    def here(cls) -> Host:
        """Return the facts of this machine, read once per process."""
        return _here()

    def fingerprint(self) -> str:
        """Return 16 digits that change with what compiled files and int8 answers depend on.

        That is CPU model, instruction sets, GPUs, system, architecture and the versions of the engines.
        """
        said = {
            "cpu": self.cpu_model,
            "isa": sorted(self.isa or ()),
            "gpus": self.gpus,
            "system": self.system,
            "machine": self.machine,
            "engines": engine_versions(),
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for a report, ``"unavailable"`` for what is not told, with the fingerprint."""
        facts: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, frozenset):
                value = sorted(value)
            elif isinstance(value, tuple):
                value = list(value)
            facts[name] = UNAVAILABLE if value is None else value
        return {**facts, "fingerprint": self.fingerprint()}


@functools.lru_cache(maxsize=1)
def _here() -> Host:
    system, release, machine = _uname()
    cpu = _cpuinfo()
    return Host(
        system=system,
        release=release,
        distribution=_distribution(),
        machine=machine,
        python=".".join(map(str, sys.version_info[:3])),
        libc=_libc(),
        cpu_model=_cpu_model(cpu),
        isa=_isa(cpu, system, machine),
        cores=usable_cores(),
        logical_cpus=os.cpu_count() or 1,
        cpu_quota=_cpu_quota(),
        memory_bytes=_memory_bytes(),
        memory_limit_bytes=_memory_limit_bytes(),
        container=_in_container(),
        gpus=_gpus(),
        board=_board(),
    )


def usable_cores() -> int:
    """Return how many cores this process may use: affinity and container quota respected, at least 1.

    A quota is rounded up: at 1.5 cores two threads finish sooner than one, though throttled at times.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that matter, importing none of them.

    The names of the ``*.dist-info`` directories say it; ``importlib.metadata`` alone takes longer to import
    than everything else here together.
    """
    return {name: version for name in _PACKAGES if (version := _installed(tuple(sys.path)).get(name))}


def engine_versions() -> dict[str, str]:
    """Return the installed versions of inference engines, see :func:`versions`."""
    return {name: version for name, version in versions().items() if name in _ENGINES}


@functools.lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for directory in path:
        try:
            names = [entry.name for entry in os.scandir(directory or ".")]
        except OSError:
            continue
        for entry in names:
            if entry.endswith((".dist-info", ".egg-info")):
                name, _, version = entry[:-10].partition("-")
                if version:
                    # The first on sys.path is the one that is imported.
                    found.setdefault(_normalised(name), re.sub(r"-py3.*$", "", version))
    return found


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- clocks and counters of the system --------------------------------------------------------------------


@dataclass(frozen=True)
class CpuTimes:
    """Ticks of all CPUs since start: in total, and those a hypervisor gave to others."""

    total: int
    steal: int

    def steal_share_since(self, earlier: CpuTimes) -> float:
        """Return which share of the time since ``earlier`` was stolen."""
        return (self.steal - earlier.steal) / max(1, self.total - earlier.total)


def cpu_times() -> CpuTimes | None:
    """Return the system's CPU ticks; ``None`` where it does not tell."""
    text = _read("/proc/stat", 256)
    if text is None or not text.startswith("cpu "):
        return None
    # user nice system idle iowait irq softirq steal; guest times are part of user
    ticks = [int(field) for field in text.splitlines()[0].split()[1:9]]
    return CpuTimes(sum(ticks), ticks[7]) if len(ticks) == 8 else None


def peak_rss_bytes() -> int | None:
    """Return the largest resident memory this process has had; ``None`` where the system does not tell."""
    status = _read("/proc/self/status", 8192)
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE) if status else None
    if match:
        return int(match[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there
    return None


def release_freed_memory() -> bool:
    """Give memory that was freed back to the system, where the C library can be told to (glibc).

    An engine that is being loaded parses, folds and packs weights, and glibc keeps what all that needed for
    the next allocation. Takes one or two milliseconds.

    Returns:
        Whether something was given back.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return trim is not None and bool(trim(0))


# --- one fact each ----------------------------------------------------------------------------------------


def _uname() -> tuple[str, str, str]:
    if hasattr(os, "uname"):
        said = os.uname()
        system, release, machine = said.sysname, said.release, said.machine
    else:
        import platform

        system, release, machine = platform.system(), platform.release(), platform.machine()
    spelling = {"amd64": "x86_64", "arm64": "aarch64"}
    return system, release, spelling.get(machine.lower(), machine)


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first core."""
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo", 16384) or "").splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            if fields:
                break
            continue
        fields[name.strip().lower()] = value.strip()
    return fields


def _cpu_model(cpu: dict[str, str]) -> str | None:
    if cpu.get("model name"):
        return cpu["model name"]
    if "cpu implementer" in cpu:
        return f"implementer {cpu['cpu implementer']} part {cpu.get('cpu part', '?')}"
    return os.environ.get("PROCESSOR_IDENTIFIER")  # Windows


def _isa(cpu: dict[str, str], system: str, machine: str) -> frozenset[str] | None:
    flags = (cpu.get("flags") or cpu.get("features") or "").split()
    if flags:
        return frozenset(_ISA_OF_FLAG[flag] for flag in flags if flag in _ISA_OF_FLAG)
    if system == "Darwin" and machine == "aarch64":
        return frozenset({"neon", "fp16", "dotprod"})  # every Apple M has them
    return None


def _distribution() -> str | None:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read("/etc/os-release", 4096) or "", re.MULTILINE)
    return match[1] if match else None


def _libc() -> str | None:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cpu_quota() -> float | None:
    """Return the tightest limit of the control groups this process is in, in cores."""
    limits = []
    for directory in _control_groups("cpu"):
        if text := _read(f"{directory}/cpu.max", 64):
            limits.append(_ratio(*text.split()[:2]))
        elif text := _read(f"{directory}/cpu.cfs_quota_us", 64):
            limits.append(_ratio(text, _read(f"{directory}/cpu.cfs_period_us", 64) or ""))
    return min((limit for limit in limits if limit), default=None)


def _memory_limit_bytes() -> int | None:
    limits = []
    for directory in _control_groups("memory"):
        text = _read(f"{directory}/memory.max", 64) or _read(f"{directory}/memory.limit_in_bytes", 64)
        # Version 1 says "no limit" with the largest number of pages.
        if text and text.strip().isdecimal() and int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits, default=None)


def _control_groups(controller: str) -> Iterator[str]:
    """Yield the directories of this process's control group and those above it, versions 2 and 1."""
    for line in (_read("/proc/self/cgroup", 4096) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = "/sys/fs/cgroup"
        elif controller in controllers.split(","):
            root = f"/sys/fs/cgroup/{controllers}"
        else:
            continue
        # Inside a container the path may name the host's tree, of which only the root is mounted.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            yield "/".join([root, *parts[:length]])


def _ratio(quota: str, period: str = "") -> float | None:
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max"
        return None


def _in_container() -> bool:
    return (
        Path("/.dockerenv").exists()
        or Path("/run/.containerenv").exists()
        or "KUBERNETES_SERVICE_HOST" in os.environ
    )


def _gpus() -> tuple[str, ...]:
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", _read(str(path), 4096) or "", re.MULTILINE)
        names.append(match[1].strip() if match else "NVIDIA GPU")
    return tuple(names)


def _board() -> str | None:
    text = _read("/proc/device-tree/model", 256)
    return text.rstrip("\0\n") or None if text else None


def _read(path: str, limit_bytes: int) -> str | None:
    """Return the start of a small system file; ``None`` where it is not there or not for us."""
    try:
        with open(path, "rb") as stream:  # noqa: PTH123 - Path.open costs more than the read
            return stream.read(limit_bytes).decode("utf-8", "replace")
    except OSError:
        return None
