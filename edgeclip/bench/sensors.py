"""Temperature, clocks, power and throttling of a device while something runs on it.

What is read: thermal zones, cooling devices, cpufreq, throttle counters and RAPL energy of Linux's sysfs;
``vcgencmd`` of the Raspberry Pi, ``tegrastats`` of the Jetson, ``nvidia-smi`` of NVIDIA's other GPUs. What a
device does not tell stays untold, and why is noted. :class:`SensorLog` reads in a thread of its own, once a
second, and measures what that costs. Sources:

- sysfs: Linux's Documentation/ABI/testing/{sysfs-class-thermal, sysfs-class-powercap,
  sysfs-devices-system-cpu} and Documentation/admin-guide/thermal/intel_thermal_throttle.rst
- vcgencmd: raspberrypi.com/documentation/computers/os.html, "get_throttled"
- tegrastats: Jetson Linux Developer Guide, "tegrastats Utility"
- bits of NVIDIA's clocks: NVML API Reference, "NvmlClocksEventReasons"
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol

from msgspec import Meta, Struct

__all__ = [
    "CostEntry",
    "Gauge",
    "GaugeEntry",
    "Probe",
    "SensorLog",
    "SensorsEntry",
    "ThrottleEntry",
    "find_probes",
    "throttled",
]

Kind = Literal["temperature", "clock", "power", "throttle"]
Unit = Literal["C", "MHz", "W", "events", "state", "bits"]
Share = Annotated[float, Meta(ge=0)]

INTERVAL_S: Final = 1.0
_PLAUSIBLE_C: Final = (-50.0, 200.0)  # ACPI zones without a sensor say -273.2
_WAIT_S: Final = 3.0  # for the first line of a program that goes on telling
_CALL_S: Final = 2.0  # for a program that answers once

_VCGENCMD: Final = "vcgencmd get_throttled"
_NVIDIA_SMI: Final = "nvidia-smi"
_NOW: Final[Mapping[str, tuple[tuple[int, str], ...]]] = {
    _VCGENCMD: (
        (1 << 0, "under-voltage"),
        (1 << 1, "the clock was capped"),
        (1 << 2, "throttled"),
        (1 << 3, "the soft temperature limit was reached"),
    ),
    _NVIDIA_SMI: (
        (0x04, "the power limit held the clock down"),
        (0x08, "hardware slowdown"),
        (0x20, "software thermal slowdown"),
        (0x40, "hardware thermal slowdown"),
        (0x80, "power brake"),
    ),
}
_SINCE_BOOT: Final = 16  # bits of vcgencmd that stay set stand so many places above those of now


# --- what is written ---------------------------------------------------------------------------------------


class GaugeEntry(Struct, frozen=True, kw_only=True):
    """One thing that was read, a value for each reading; null where it could not be read.

    ``throttle`` gauges count ``events``, give the ``state`` of a cooling device (0 where nothing is held
    back), or ``bits`` as their source defines them.
    """

    name: str
    kind: Kind
    unit: Unit
    source: str
    values: tuple[float | None, ...]


class CostEntry(Struct, frozen=True, kw_only=True):
    """What reading cost: CPU time of the thread and of the programs it asked, and wall times of a reading.

    ``share`` is CPU time over the time that was watched, so 0.01 is a hundredth of one core.
    """

    readings: Annotated[int, Meta(ge=0)]
    cpu_ms: Share
    share: Share
    median_ms: Share
    slowest_ms: Share


class SensorsEntry(Struct, frozen=True, kw_only=True):
    """Everything that was read; ``at_s`` are the times of readings, from the start of the run."""

    interval_s: Annotated[float, Meta(gt=0)]
    at_s: tuple[float, ...]
    gauges: tuple[GaugeEntry, ...]
    cost: CostEntry
    untold: tuple[str, ...] = ()

    def of_kind(self, kind: Kind) -> tuple[GaugeEntry, ...]:
        """Return the gauges of a kind that were read at least once."""
        return tuple(
            gauge
            for gauge in self.gauges
            if gauge.kind == kind and any(value is not None for value in gauge.values)
        )


class ThrottleEntry(Struct, frozen=True, kw_only=True):
    """Whether the device held itself back; ``why`` says what told it, or who was asked in vain."""

    status: Literal["yes", "no", "unknown"]
    why: tuple[str, ...] = ()


def throttled(sensors: SensorsEntry) -> ThrottleEntry:
    """Return whether a device held itself back, from what it tells about that: not from how fast it was."""
    gauges = sensors.of_kind("throttle")
    found = [said for gauge in gauges for said in _held_back(gauge)]
    if found:
        return ThrottleEntry(status="yes", why=tuple(dict.fromkeys(found)))
    if gauges:
        return ThrottleEntry(status="no", why=tuple(f"{gauge.source}: {gauge.name}" for gauge in gauges))
    why = tuple(said for said in sensors.untold if said.startswith("throttle")) or sensors.untold
    return ThrottleEntry(status="unknown", why=why)


def _held_back(gauge: GaugeEntry) -> Iterator[str]:
    values = [value for value in gauge.values if value is not None]
    if gauge.unit == "events":
        count = max(values) - values[0]
        if count > 0:
            yield f"{gauge.name}: {count:.0f} more"
        return
    if gauge.unit == "state":
        held = sum(value > 0 for value in values)
        if held:
            yield f"{gauge.name}: held back in {held} of {len(values)} readings"
        return
    # what is set since boot, and was not when the run began, happened between two readings
    before = int(values[0])
    for bit, words in _NOW[gauge.source]:
        seen = any(int(value) & bit for value in values)
        late = bit << _SINCE_BOOT if gauge.source == _VCGENCMD else 0
        if seen or any(int(value) & late and not before & late for value in values):
            yield words


# --- what is read ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """Name, kind and unit of one thing that a probe reads, and where it has it from."""

    name: str
    kind: Kind
    unit: Unit
    source: str


class Probe(Protocol):
    """Something that reads gauges. Used by one thread."""

    @property
    def gauges(self) -> tuple[Gauge, ...]:
        """What it reads."""
        ...

    def read(self) -> Sequence[float | None]:
        """Return a value for each gauge, ``None`` for what cannot be read now."""
        ...

    def close(self) -> None:
        """Let go of files and programs."""
        ...


class _Files:
    """Gauges that are the mean or sum of small files. The files stay open: a reading is one call each."""

    def __init__(self, untold: list[str]) -> None:
        self._untold = untold
        self._gauges: list[Gauge] = []
        self._parts: list[tuple[tuple[int, ...], float, bool]] = []

    @property
    def gauges(self) -> tuple[Gauge, ...]:
        return tuple(self._gauges)

    def add(self, gauge: Gauge, paths: Sequence[Path], *, scale: float, mean: bool = True) -> bool:
        """Add a gauge if at least one of its files can be read now; say why where none can."""
        opened: list[int] = []
        problem = ""
        for path in paths:
            try:
                file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                problem = error.strerror or str(error)
                continue
            if _number(file) is None:
                problem = "it gives no number"
                os.close(file)
                continue
            opened.append(file)
        if opened:
            self._gauges.append(gauge)
            self._parts.append((tuple(opened), scale, mean))
        elif problem:
            self._untold.append(f"{gauge.kind} of {gauge.name}: {paths[0]}: {problem}")
        return bool(opened)

    def read(self) -> list[float | None]:
        found: list[float | None] = []
        for gauge, (files, scale, mean) in zip(self._gauges, self._parts, strict=True):
            numbers = [number for file in files if (number := _number(file)) is not None]
            if not numbers:
                found.append(None)
                continue
            value = sum(numbers) * scale / (len(numbers) if mean else 1)
            if gauge.kind == "temperature" and not _PLAUSIBLE_C[0] <= value <= _PLAUSIBLE_C[1]:
                found.append(None)
                continue
            found.append(round(value, 3))
        return found

    def close(self) -> None:
        for files, _, _ in self._parts:
            for file in files:
                os.close(file)
        self._parts, self._gauges = [], []


class _Energy:
    """Power from counters of energy that run over: the mean since the reading before."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._gauges: list[Gauge] = []
        self._counters: list[tuple[int, int]] = []
        self._before: list[tuple[float, int] | None] = []

    @property
    def gauges(self) -> tuple[Gauge, ...]:
        return tuple(self._gauges)

    def add(self, gauge: Gauge, path: Path, range_uj: int) -> None:
        """Add a counter in microjoules that starts again after ``range_uj``.

        Raises:
            OSError: it is not for us.
        """
        self._counters.append((os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)), range_uj))
        self._gauges.append(gauge)
        self._before.append(None)

    def read(self) -> list[float | None]:
        found: list[float | None] = []
        for place, (file, range_uj) in enumerate(self._counters):
            energy_uj, now_s = _number(file), self._now()
            before = self._before[place]
            self._before[place] = None if energy_uj is None else (now_s, energy_uj)
            if energy_uj is None or before is None or now_s <= before[0]:
                found.append(None)
                continue
            used_uj = energy_uj - before[1]
            used_uj += range_uj if used_uj < 0 else 0
            found.append(round(used_uj / 1e6 / (now_s - before[0]), 3))
        return found

    def close(self) -> None:
        for file, _ in self._counters:
            os.close(file)
        self._counters, self._gauges, self._before = [], [], []


class _Asked:
    """Gauges of a program that answers once; asked anew for each reading."""

    def __init__(self, gauge: Gauge, command: tuple[str, ...], parse: Callable[[str], float | None]) -> None:
        self.gauges = (gauge,)
        self._command, self._parse = command, parse

    def read(self) -> list[float | None]:
        try:
            return [self._parse(_answer(self._command))]
        except (OSError, subprocess.SubprocessError):
            return [None]

    def close(self) -> None:
        """Nothing is held."""


class _Told:
    """Gauges of a program that prints a line a second until it is stopped; the latest line counts.

    Raises:
        OSError: it cannot be run.
        ValueError: it ended, or said nothing that is understood within three seconds.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        parse: Callable[[str], dict[Gauge, float | None]],
    ) -> None:
        self._parse = parse
        # its own session: Ctrl-C is for us, and we end it in order
        self._program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._pipe = -1 if self._program.stdout is None else self._program.stdout.fileno()
        self._rest = b""
        self._known: dict[Gauge, float | None] = {}
        try:
            said = ""
            deadline_s = time.monotonic() + _WAIT_S
            os.set_blocking(self._pipe, False)
            while not self._known and time.monotonic() < deadline_s:
                line = self._latest()
                if line is not None:
                    self._known, said = parse(line), line
                elif self._program.poll() is not None:
                    break
                else:
                    time.sleep(0.02)
            if not self._known:
                raise ValueError(said.strip() or "it says nothing")
        except BaseException:
            self.close()
            raise
        self.gauges = tuple(self._known)

    def _latest(self) -> str | None:
        """Return the last whole line there is."""
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self._pipe, 1 << 16):
                self._rest += block
        *lines, self._rest = self._rest.split(b"\n")
        return next((line.decode("utf-8", "replace") for line in reversed(lines) if line.strip()), None)

    def read(self) -> list[float | None]:
        line = self._latest()
        # its second is not ours: where a line is late, the one before counts once more
        known, self._known = self._known if line is None else self._parse(line), {}
        if line is not None:
            self._known = known
        return [known.get(gauge) for gauge in self.gauges]

    def close(self) -> None:
        self._program.terminate()
        try:
            self._program.wait(_CALL_S)
        except subprocess.TimeoutExpired:
            self._program.kill()
            self._program.wait()
        if self._program.stdout is not None:
            self._program.stdout.close()


def _number(file: int) -> int | None:
    """Return the number in a small open file of sysfs."""
    try:
        return int(os.pread(file, 64, 0))
    except (OSError, ValueError):
        return None


def _answer(command: tuple[str, ...]) -> str:
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CALL_S, check=True)
    return said.stdout.decode("utf-8", "replace")


# --- who is there ------------------------------------------------------------------------------------------


def find_probes(
    *,
    root: Path = Path("/"),
    gpu: int | None = None,
    which: Callable[[str], str | None] = shutil.which,
    now: Callable[[], float] = time.monotonic,
) -> tuple[list[Probe], list[str]]:
    """Return what can be read here, and what cannot with the reason.

    Args:
        root: where ``sys`` is.
        gpu: number of an NVIDIA GPU to ask about; without, none is woken up.
        which: finds programs.
        now: clock in seconds.
    """
    untold: list[str] = []
    files = _Files(untold)
    _thermal_zones(root, files, untold)
    _core_temperatures(root, files)
    _clocks(root, files)
    _cooling(root, files)
    _throttle_counters(root, files)
    energy = _Energy(now)
    _rapl(root, energy, untold)
    probes: list[Probe] = [files, energy]
    probes += _raspberry(which, untold, warm=any(each.kind == "temperature" for each in files.gauges))
    program = which("tegrastats")
    if program is not None:
        probes += _told((program, "--interval", "1000"), parse_tegrastats, "tegrastats", untold)
    if gpu is not None:
        probes += _nvidia(which, gpu, untold)
    kinds = {gauge.kind for probe in probes for gauge in probe.gauges}
    for kind in ("temperature", "clock", "power", "throttle"):
        if kind not in kinds and not any(said.startswith(kind) for said in untold):
            untold.append(f"{kind}: nothing on this system tells it")
    return [probe for probe in probes if probe.gauges], untold


def _thermal_zones(root: Path, files: _Files, untold: list[str]) -> None:
    seen: dict[str, int] = {}
    for zone in _numbered(root / "sys/class/thermal", "thermal_zone"):
        name = _word(zone / "type") or zone.name
        seen[name] = seen.get(name, 0) + 1
        name = name if seen[name] == 1 else f"{name} {seen[name]}"
        files.add(Gauge(name, "temperature", "C", "thermal zone"), [zone / "temp"], scale=1e-3)


def _core_temperatures(root: Path, files: _Files) -> None:
    """Add the sensors of AMD's CPUs, which have no thermal zone."""
    for chip in _numbered(root / "sys/class/hwmon", "hwmon"):
        name = _word(chip / "name")
        if name in ("k10temp", "zenpower"):
            files.add(Gauge(name, "temperature", "C", "hwmon"), [chip / "temp1_input"], scale=1e-3)


def _clocks(root: Path, files: _Files) -> None:
    """Add the mean clock of each kind of core that this process may run on."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    kinds: dict[str, list[Path]] = {}
    for policy in _numbered(root / "sys/devices/system/cpu/cpufreq", "policy"):
        cores = {int(word) for word in (_word(policy / "affected_cpus") or "").split() if word.isdecimal()}
        if usable is not None and cores and not cores & usable:
            continue
        most = _word(policy / "cpuinfo_max_freq") or ""
        kinds.setdefault(f"up to {int(most) / 1e3:.0f} MHz" if most.isdecimal() else "", []).append(policy)
    for kind, policies in kinds.items():
        name = f"cores {kind}".strip()
        paths = [policy / "scaling_cur_freq" for policy in policies]
        files.add(Gauge(name, "clock", "MHz", "cpufreq"), paths, scale=1e-3)


def _cooling(root: Path, files: _Files) -> None:
    """Add what holds processors back when they are hot. Fans are cooling devices, too, and left out."""
    groups: dict[str, list[Path]] = {}
    for device in _numbered(root / "sys/class/thermal", "cooling_device"):
        name = _word(device / "type") or ""
        if re.match(r"processor$|(thermal-)?(cpufreq|devfreq)|cpu-|gpu", name, re.IGNORECASE):
            # one for each core on PCs: "Processor"; "thermal-cpufreq-0", "cpufreq-cpu0" for each cluster
            groups.setdefault(name, []).append(device / "cur_state")
    for name, paths in groups.items():
        files.add(Gauge(name, "throttle", "state", "cooling device"), paths, scale=1, mean=False)


def _throttle_counters(root: Path, files: _Files) -> None:
    """Add the counters of Intel's thermal monitor, each summed over the cores."""
    cores = _numbered(root / "sys/devices/system/cpu", "cpu")
    for what in ("core", "package"):
        paths = [
            path for core in cores if (path := core / f"thermal_throttle/{what}_throttle_count").is_file()
        ]
        if paths:
            gauge = Gauge(f"thermal throttling of the {what}", "throttle", "events", "thermal_throttle")
            files.add(gauge, paths, scale=1, mean=False)


def _rapl(root: Path, energy: _Energy, untold: list[str]) -> None:
    """Add whole packages (and the platform, where it is told); their parts are contained in them."""
    for zone in _numbered(root / "sys/class/powercap", "intel-rapl:"):
        name, most = _word(zone / "name") or zone.name, _word(zone / "max_energy_range_uj") or ""
        if not most.isdecimal():
            continue
        try:
            energy.add(Gauge(name, "power", "W", "RAPL"), zone / "energy_uj", int(most))
        except OSError as error:
            untold.append(f"power of {name}: {zone / 'energy_uj'}: {error.strerror or error}")


def _raspberry(which: Callable[[str], str | None], untold: list[str], *, warm: bool) -> list[Probe]:
    program = which("vcgencmd")
    if program is None:
        return []
    throttle = Gauge("firmware", "throttle", "bits", _VCGENCMD)
    probes: list[Probe] = [_Asked(throttle, (program, "get_throttled"), parse_throttled)]
    if not warm:  # asking starts a program: only where no file tells it
        gauge = Gauge("SoC", "temperature", "C", "vcgencmd measure_temp")
        probes.append(_Asked(gauge, (program, "measure_temp"), parse_temperature))
    good = []
    for probe in probes:
        if probe.read()[0] is None:
            gauge = probe.gauges[0]
            untold.append(f"{gauge.kind} of {gauge.name}: {gauge.source!r} does not answer")
        else:
            good.append(probe)
    return good


def _told(
    command: tuple[str, ...],
    parse: Callable[[str], dict[Gauge, float | None]],
    name: str,
    untold: list[str],
) -> list[Probe]:
    try:
        return [_Told(command, parse)]
    except (OSError, ValueError) as error:
        untold.append(f"{name}: {error}")
        return []


def _nvidia(which: Callable[[str], str | None], gpu: int, untold: list[str]) -> list[Probe]:
    program = which(_NVIDIA_SMI)
    if program is None:
        untold.append(f"GPU: there is no {_NVIDIA_SMI}")
        return []
    problems: list[str] = []
    # drivers before 535 know the older name alone
    for reasons in ("clocks_event_reasons", "clocks_throttle_reasons"):
        fields = f"temperature.gpu,clocks.sm,power.draw,{reasons}.active"
        command = (
            program,
            f"--id={gpu}",
            f"--query-gpu={fields}",
            "--format=csv,noheader,nounits",
            "--loop-ms=1000",
        )
        found = _told(command, parse_nvidia_smi, _NVIDIA_SMI, problems)
        if found:
            return found
    untold.append(problems[-1])
    return []


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """Return the entries called prefix and a number, by number."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []
    numbers = [name[len(prefix) :] for name in names if name.startswith(prefix)]
    return [folder / f"{prefix}{number}" for number in sorted(filter(str.isdecimal, numbers), key=int)]


def _word(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


# --- what programs say -------------------------------------------------------------------------------------


def parse_throttled(said: str) -> float | None:
    """Return the bits of ``vcgencmd get_throttled``: ``throttled=0x50000``."""
    match = re.fullmatch(r"throttled=0x([0-9a-fA-F]+)", said.strip())
    return float(int(match[1], 16)) if match else None


def parse_temperature(said: str) -> float | None:
    """Return the degrees of ``vcgencmd measure_temp``: ``temp=42.2'C``."""
    match = re.fullmatch(r"temp=(-?\d+(?:\.\d+)?)'C", said.strip())
    return float(match[1]) if match else None


_TEGRA_C = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
_TEGRA_MW = re.compile(r"\b([A-Z][A-Z0-9_]+) (\d+)(?:mW)?/\d+(?:mW)?(?=\s|$)")
_TEGRA_GPU = re.compile(r"\bGR3D_FREQ (?:\d+%)?@\[?(\d+)")


def parse_tegrastats(said: str) -> dict[Gauge, float | None]:
    """Return temperatures, power and the GPU's clock of a line of ``tegrastats``.

    Rails are ``VDD_IN 5704mW/5704mW`` (now/mean), on older systems without the unit. The PMIC's temperature
    is a constant on all of them and left out.
    """
    found: dict[Gauge, float | None] = {}
    for name, degrees in _TEGRA_C.findall(said):
        if name != "PMIC" and _PLAUSIBLE_C[0] <= float(degrees) <= _PLAUSIBLE_C[1]:
            found[Gauge(name, "temperature", "C", "tegrastats")] = float(degrees)
    for name, power_mw in _TEGRA_MW.findall(said):
        found[Gauge(name, "power", "W", "tegrastats")] = int(power_mw) / 1e3
    match = _TEGRA_GPU.search(said)
    if match:
        found[Gauge("GPU", "clock", "MHz", "tegrastats")] = float(match[1])
    return found


def parse_nvidia_smi(said: str) -> dict[Gauge, float | None]:
    """Return what a line of ``nvidia-smi`` says: degrees, MHz, watts, bits; ``[N/A]`` is left out.

    Empty where the line is something else, such as that a field is not known.
    """
    cells = [cell.strip() for cell in said.split(",")]
    gauges = (
        Gauge("GPU", "temperature", "C", _NVIDIA_SMI),
        Gauge("GPU", "clock", "MHz", _NVIDIA_SMI),
        Gauge("GPU", "power", "W", _NVIDIA_SMI),
        Gauge("GPU", "throttle", "bits", _NVIDIA_SMI),
    )
    if len(cells) != len(gauges):
        return {}
    found: dict[Gauge, float | None] = {}
    for gauge, cell in zip(gauges, cells, strict=True):
        with contextlib.suppress(ValueError):
            found[gauge] = float(int(cell, 16)) if cell.startswith("0x") else float(cell)
    return found


# --- reading all the while ---------------------------------------------------------------------------------


class SensorLog:
    """Read probes once a second in a thread of its own, while the body of a ``with`` runs.

    Args:
        probes: see :func:`find_probes`; closed at the end.
        untold: what cannot be read.
        interval_s: between readings.
    """

    def __init__(
        self, probes: Sequence[Probe], untold: Sequence[str] = (), *, interval_s: float = INTERVAL_S
    ) -> None:
        self._find: Callable[[], tuple[Sequence[Probe], Sequence[str]]] = lambda: (probes, untold)
        self._probes: tuple[Probe, ...] = ()
        self._gauges: tuple[Gauge, ...] = ()
        self._untold: tuple[str, ...] = ()
        self._interval_s = interval_s
        self._at_s: list[float] = []
        self._rows: list[list[float | None]] = []
        self._walls_ms: list[float] = []
        self._cpu_ms = 0.0
        self._watched_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edgeclip-sensors", daemon=True)

    @classmethod
    def here(cls, gpu: int | None = None) -> SensorLog:
        """Return a log of what this machine tells; programs are started when it is entered.

        Args:
            gpu: see :func:`find_probes`.
        """
        log = cls([])
        log._find = lambda: find_probes(gpu=gpu)
        return log

    def __enter__(self) -> SensorLog:
        probes, untold = self._find()
        self._probes, self._untold = tuple(probes), tuple(untold)
        self._gauges = tuple(gauge for probe in self._probes for gauge in probe.gauges)
        self._programs_ms = _programs_cpu_ms()
        self._began_s = time.perf_counter()
        if self._probes:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._probes:
            self._thread.join()
        self._watched_s = time.perf_counter() - self._began_s
        for probe in self._probes:
            probe.close()  # a program that told all the while is counted once it has ended
        self._cpu_ms += _programs_cpu_ms() - self._programs_ms

    def _watch(self) -> None:
        began_ns = time.thread_time_ns()
        while True:
            start_s = time.perf_counter()
            row = [value for probe in self._probes for value in probe.read()]
            end_s = time.perf_counter()
            self._at_s.append(round(start_s - self._began_s, 3))
            self._rows.append(row)
            self._walls_ms.append((end_s - start_s) * 1e3)
            # by the clock and not by the last reading, so that slow readings do not add up
            passed = (end_s - self._began_s) % self._interval_s
            if self._stop.wait(self._interval_s - passed):
                break
        self._cpu_ms = (time.thread_time_ns() - began_ns) / 1e6

    def result(self) -> SensorsEntry:
        """Return what was read; after the ``with``."""
        columns = zip(*self._rows, strict=True) if self._rows else (() for _ in self._gauges)
        walls_ms = sorted(self._walls_ms)
        return SensorsEntry(
            interval_s=self._interval_s,
            at_s=tuple(self._at_s),
            gauges=tuple(
                GaugeEntry(
                    name=gauge.name,
                    kind=gauge.kind,
                    unit=gauge.unit,
                    source=gauge.source,
                    values=tuple(column),
                )
                for gauge, column in zip(self._gauges, columns, strict=True)
            ),
            cost=CostEntry(
                readings=len(walls_ms),
                cpu_ms=round(max(0.0, self._cpu_ms), 3),
                share=round(max(0.0, self._cpu_ms) / 1e3 / max(self._watched_s, 1e-9), 6),
                median_ms=round(walls_ms[len(walls_ms) // 2], 3) if walls_ms else 0.0,
                slowest_ms=round(walls_ms[-1], 3) if walls_ms else 0.0,
            ),
            untold=self._untold,
        )


def _programs_cpu_ms() -> float:
    """Return CPU time of programs this process has started and seen the end of."""
    if sys.platform == "win32":
        return 0.0
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e3
