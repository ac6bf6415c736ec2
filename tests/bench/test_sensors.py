"""Sensors: trees of sysfs made by hand, texts that programs print on real devices, and what reading costs."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from edgeclip.bench.sensors import (
    Gauge,
    GaugeEntry,
    Probe,
    SensorLog,
    SensorsEntry,
    find_probes,
    parse_nvidia_smi,
    parse_tegrastats,
    parse_temperature,
    parse_throttled,
    throttled,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sysfs and shell scripts")

# What users of each device pasted into public issues and test suites; the unit of rails came with JetPack 5.
ORIN = (
    "11-30-2025 13:26:01 RAM 2461/7620MB (lfb 3x2MB) SWAP 1243/3810MB (cached 5MB) CPU [19%@729,14%@729,"
    "22%@729,8%@729,15%@729,17%@729] EMC_FREQ 4%@2133 GR3D_FREQ 0%@[305] NVDEC off NVJPG off NVJPG1 off VIC "
    "off OFA off APE 200 cpu@46.531C soc2@47.312C soc0@46.593C gpu@48.218C tj@48.843C soc1@48.843C VDD_IN "
    "5704mW/5704mW VDD_CPU_GPU_CV 831mW/831mW VDD_SOC 1624mW/1624mW"
)
NANO = (
    "RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) CPU [2%@102,1%@102,0%@102,0%@102] EMC_FREQ 0% "
    "GR3D_FREQ 0% PLL@39C CPU@40.5C PMIC@100C GPU@41C AO@46C thermal@41C POM_5V_IN 900/943 POM_5V_GPU 0/0 "
    "POM_5V_CPU 123/123"
)
TX1 = (
    "RAM 1179/3983MB (lfb 120x4MB) IRAM 0/252kB(lfb 252kB) CPU [1%@102,4%@102,0%@102,0%@102] EMC_FREQ 7%@408 "
    "GR3D_FREQ 0%@76 APE 25 AO@42.5C CPU@37.5C GPU@39C PLL@37C Tdiode@42.75C PMIC@100C Tboard@42C "
    "thermal@38.5C VDD_IN 2532/2698 VDD_CPU 76/178 VDD_GPU 19/19"
)
JETPACK_7 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 GR3D_FREQ "
    "0%@[1300,1300] NVENC0 off NVDEC0 off APE 174 cpu@52.968C/52.968C"
)

Tree = Callable[[dict[str, str | int]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Return what makes a tree of small files, as sysfs shows them."""

    def make(files: dict[str, str | int]) -> Path:
        for name, content in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return make


def _program(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _none(name: str) -> None:
    return None


def _values(probes: Sequence[Probe]) -> dict[tuple[str, str], float | None]:
    return {
        (gauge.kind, gauge.name): value
        for probe in probes
        for gauge, value in zip(probe.gauges, probe.read(), strict=True)
    }


def _closed(probes: Sequence[Probe]) -> None:
    for probe in probes:
        probe.close()


PI = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": 61234,
    "class/thermal/cooling_device0/type": "pwm-fan",
    "class/thermal/cooling_device0/cur_state": 3,
    "devices/system/cpu/cpufreq/policy0/affected_cpus": "0 1 2 3",
    "devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": 2400000,
    "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": 1500000,
}


def test_zones_and_clocks_of_a_board(tree: Tree) -> None:
    probes, untold = find_probes(root=tree(PI), which=_none)
    assert _values(probes) == {
        ("temperature", "cpu-thermal"): 61.234,
        ("clock", "cores up to 2400 MHz"): 1500.0,
    }
    # a fan that turns is no throttling, so nobody here tells it
    assert untold == [
        "power: nothing on this system tells it",
        "throttle: nothing on this system tells it",
    ]
    _closed(probes)


def test_files_are_read_anew_each_time(tree: Tree, tmp_path: Path) -> None:
    probes, _ = find_probes(root=tree(PI), which=_none)
    zone = tmp_path / "sys/class/thermal/thermal_zone0/temp"
    assert _values(probes)["temperature", "cpu-thermal"] == 61.234
    zone.write_text("70000\n")
    assert _values(probes)["temperature", "cpu-thermal"] == 70.0
    zone.write_text("\n")  # a driver that is asleep
    assert _values(probes)["temperature", "cpu-thermal"] is None
    zone.write_text("-274000\n")  # ACPI's word for "no sensor"
    assert _values(probes)["temperature", "cpu-thermal"] is None
    _closed(probes)


def _open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_every_file_is_closed(tree: Tree) -> None:
    before = _open_files()
    probes, _ = find_probes(root=tree(PI), which=_none)
    _values(probes)
    _closed(probes)
    assert _open_files() == before


def test_clocks_are_means_of_each_kind_of_core(tree: Tree) -> None:
    files: dict[str, str | int] = {}
    mine = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    for policy, (most, now) in enumerate([(1800000, 600000), (1800000, 1200000), (2400000, 2000000)]):
        folder = f"devices/system/cpu/cpufreq/policy{policy}"
        files |= {
            f"{folder}/affected_cpus": mine,
            f"{folder}/cpuinfo_max_freq": most,
            f"{folder}/scaling_cur_freq": now,
        }
    # cores this process may not use are not its clock
    files |= {
        "devices/system/cpu/cpufreq/policy9/affected_cpus": 4095,
        "devices/system/cpu/cpufreq/policy9/cpuinfo_max_freq": 3000000,
        "devices/system/cpu/cpufreq/policy9/scaling_cur_freq": 3000000,
    }
    probes, _ = find_probes(root=tree(files), which=_none)
    assert _values(probes) == {
        ("clock", "cores up to 1800 MHz"): 900.0,
        ("clock", "cores up to 2400 MHz"): 2000.0,
    }
    _closed(probes)


def test_two_zones_of_one_type_and_amd_without_zones(tree: Tree) -> None:
    files: dict[str, str | int] = {
        "class/thermal/thermal_zone0/type": "acpitz",
        "class/thermal/thermal_zone0/temp": 30000,
        "class/thermal/thermal_zone10/type": "x86_pkg_temp",
        "class/thermal/thermal_zone10/temp": 60000,
        "class/thermal/thermal_zone2/type": "acpitz",
        "class/thermal/thermal_zone2/temp": 31000,
        "class/hwmon/hwmon1/name": "k10temp",
        "class/hwmon/hwmon1/temp1_input": 55500,
        "class/hwmon/hwmon2/name": "nvme",
        "class/hwmon/hwmon2/temp1_input": 40000,
    }
    probes, _ = find_probes(root=tree(files), which=_none)
    assert list(_values(probes).items()) == [
        (("temperature", "acpitz"), 30.0),
        (("temperature", "acpitz 2"), 31.0),
        (("temperature", "x86_pkg_temp"), 60.0),
        (("temperature", "k10temp"), 55.5),
    ]
    _closed(probes)


def test_power_is_the_mean_since_the_reading_before_and_survives_the_counter(
    tree: Tree, tmp_path: Path
) -> None:
    root = tree(
        {
            "class/powercap/intel-rapl:0/name": "package-0",
            "class/powercap/intel-rapl:0/max_energy_range_uj": 262143328850,
            "class/powercap/intel-rapl:0/energy_uj": 262143000000,
            "class/powercap/intel-rapl:0:0/name": "core",  # part of the package
            "class/powercap/intel-rapl:0:0/max_energy_range_uj": 262143328850,
            "class/powercap/intel-rapl:0:0/energy_uj": 1,
        }
    )
    now = [100.0]
    probes, _ = find_probes(root=root, which=_none, now=lambda: now[0])
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    assert _values(probes) == {("power", "package-0"): None}
    counter.write_text("262143300000\n")
    now[0] += 0.5
    assert _values(probes) == {("power", "package-0"): 0.6}  # 0.3 J in half a second
    counter.write_text("5000000\n")  # started again at 262143.32885 J
    now[0] += 1.0
    assert _values(probes) == {("power", "package-0"): pytest.approx(5.02885, abs=1e-3)}
    _closed(probes)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_counter_for_root_alone_is_named(tree: Tree) -> None:
    root = tree(
        {
            "class/powercap/intel-rapl:0/name": "package-0",
            "class/powercap/intel-rapl:0/max_energy_range_uj": 262143328850,
            "class/powercap/intel-rapl:0/energy_uj": 1,
        }
    )
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").chmod(0)
    _, untold = find_probes(root=root, which=_none)
    assert any("power of package-0" in said and "Permission denied" in said for said in untold)


def test_a_counter_that_cannot_be_opened_is_named(tree: Tree) -> None:
    root = tree(
        {
            "class/powercap/intel-rapl:0/name": "package-0",
            "class/powercap/intel-rapl:0/max_energy_range_uj": 262143328850,
        }
    )
    _, untold = find_probes(root=root, which=_none)
    (said,) = [each for each in untold if each.startswith("power")]
    assert "power of package-0" in said
    assert "No such file" in said


def _entry(*gauges: GaugeEntry, untold: tuple[str, ...] = ()) -> SensorsEntry:
    with SensorLog([]) as log:
        pass
    cost = log.result().cost
    return SensorsEntry(interval_s=1.0, at_s=(), gauges=gauges, cost=cost, untold=untold)


def _gauge(unit: str, *values: float | None, name: str = "g", source: str = "s") -> GaugeEntry:
    return GaugeEntry(name=name, kind="throttle", unit=unit, source=source, values=values)  # type: ignore[arg-type]


BITS = "vcgencmd get_throttled"


@pytest.mark.parametrize(
    ("gauge", "why"),
    [
        (_gauge("events", 17.0, 17.0, 19.0), "g: 2 more"),
        (_gauge("state", 0.0, 3.0, None, 1.0), "g: held back in 2 of 3 readings"),
        (_gauge("bits", 0.0, 0x4, 0.0, source=BITS), "throttled"),
        (_gauge("bits", 0x1, source=BITS), "under-voltage"),
        # between two readings: the bit since boot is new, the one of now is gone again
        (_gauge("bits", 0x10000, 0x90000, source=BITS), "the soft temperature limit was reached"),
        (_gauge("bits", 0.0, 0x40, source="nvidia-smi"), "hardware thermal slowdown"),
        (_gauge("bits", 0.0, 0x4, source="nvidia-smi"), "the power limit held the clock down"),
    ],
)
def test_throttled_is_what_the_device_says(gauge: GaugeEntry, why: str) -> None:
    said = throttled(_entry(_gauge("events", 5.0, 5.0, name="other"), gauge))
    assert (said.status, said.why) == ("yes", (why,))


@pytest.mark.parametrize(
    "gauge",
    [
        _gauge("events", 17.0, None, 17.0),
        _gauge("state", 0.0, 0.0),
        _gauge("bits", 0x50000, 0x50000, source=BITS),  # since boot, and not in this run
        _gauge("bits", 0x1, 0x100, source="nvidia-smi"),  # idle, and held by the display
    ],
)
def test_not_throttled_is_said_by_whom(gauge: GaugeEntry) -> None:
    said = throttled(_entry(gauge))
    assert (said.status, said.why) == ("no", (f"{gauge.source}: g",))


def test_without_anybody_to_ask_it_is_unknown() -> None:
    said = throttled(_entry(_gauge("events", None, None), untold=("throttle: nobody",)))
    assert (said.status, said.why) == ("unknown", ("throttle: nobody",))
    said = throttled(_entry(untold=("clock: nobody", "throttle of firmware: no answer")))
    assert said.why == ("throttle of firmware: no answer",)
    assert throttled(_entry(untold=("nvidia-smi: it says nothing",))).why == ("nvidia-smi: it says nothing",)


def test_intels_counters_and_cooling_devices_are_summed(tree: Tree) -> None:
    files: dict[str, str | int] = {}
    for core in range(3):
        files[f"devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count"] = core
        files[f"devices/system/cpu/cpu{core}/thermal_throttle/package_throttle_count"] = 7
        files[f"class/thermal/cooling_device{core}/type"] = "Processor"
        files[f"class/thermal/cooling_device{core}/cur_state"] = 1
    files["class/thermal/cooling_device7/type"] = "thermal-cpufreq-0"
    files["class/thermal/cooling_device7/cur_state"] = 0
    probes, _ = find_probes(root=tree(files), which=_none)
    assert _values(probes) == {
        ("throttle", "Processor"): 3.0,
        ("throttle", "thermal-cpufreq-0"): 0.0,
        ("throttle", "thermal throttling of the core"): 3.0,
        ("throttle", "thermal throttling of the package"): 21.0,
    }
    _closed(probes)


def test_what_vcgencmd_says() -> None:
    assert parse_throttled("throttled=0x50005\n") == 0x50005
    assert parse_throttled("throttled=0x0") == 0
    assert parse_throttled("VCHI initialization failed\n") is None
    assert parse_temperature("temp=42.2'C\n") == 42.2
    assert parse_temperature("temp=N/A") is None


def test_what_tegrastats_says() -> None:
    def said(line: str) -> dict[str, dict[str, float | None]]:
        found: dict[str, dict[str, float | None]] = {}
        for gauge, value in parse_tegrastats(line).items():
            found.setdefault(gauge.kind, {})[gauge.name] = value
        return found

    orin = said(ORIN)
    assert orin["power"] == {"VDD_IN": 5.704, "VDD_CPU_GPU_CV": 0.831, "VDD_SOC": 1.624}
    assert orin["temperature"] == {
        "cpu": 46.531, "soc2": 47.312, "soc0": 46.593, "gpu": 48.218, "tj": 48.843, "soc1": 48.843,
    }  # fmt: skip
    assert orin["clock"] == {"GPU": 305}
    nano = said(NANO)
    assert nano["power"] == {"POM_5V_IN": 0.9, "POM_5V_GPU": 0.0, "POM_5V_CPU": 0.123}
    assert nano["temperature"] == {"PLL": 39, "CPU": 40.5, "GPU": 41, "AO": 46, "thermal": 41}
    assert "clock" not in nano
    assert said(TX1)["power"] == {"VDD_IN": 2.532, "VDD_CPU": 0.076, "VDD_GPU": 0.019}
    assert said(TX1)["clock"] == {"GPU": 76}
    assert said(JETPACK_7) == {"temperature": {"cpu": 52.968}, "clock": {"GPU": 1300}}
    assert parse_tegrastats("tegrastats: permission denied") == {}


def test_what_nvidia_smi_says() -> None:
    def said(line: str) -> dict[str, float | None]:
        return {gauge.kind: value for gauge, value in parse_nvidia_smi(line).items()}

    assert said("45, 1410, 52.34, 0x0000000000000004\n") == {
        "temperature": 45, "clock": 1410, "power": 52.34, "throttle": 4,
    }  # fmt: skip
    assert said("45, 1410, [N/A], [Not Supported]") == {"temperature": 45, "clock": 1410}
    assert said('Field "clocks_event_reasons.active" is not a valid field to query.') == {}


def test_a_raspberry_is_asked_by_its_program(tree: Tree, tmp_path: Path) -> None:
    answers = 'case $1 in get_throttled) echo throttled=0x50005;; measure_temp) echo "temp=48.3\'C";; esac'
    program = _program(tmp_path, "vcgencmd", answers)
    which = {"vcgencmd": str(program)}.get
    probes, _ = find_probes(root=tmp_path, which=which)
    assert _values(probes) == {("throttle", "firmware"): 0x50005, ("temperature", "SoC"): 48.3}
    # where a file tells the temperature, no program is started for it
    probes, _ = find_probes(root=tree(PI), which=which)
    assert set(_values(probes)) == {
        ("temperature", "cpu-thermal"), ("clock", "cores up to 2400 MHz"), ("throttle", "firmware"),
    }  # fmt: skip
    _closed(probes)
    _program(tmp_path, "vcgencmd", "echo VCHI initialization failed; exit 255")
    probes, untold = find_probes(root=tree(PI), which=which)
    assert "throttle of firmware: 'vcgencmd get_throttled' does not answer" in untold
    _closed(probes)


def test_a_program_that_goes_on_telling_is_followed_and_ended(tmp_path: Path) -> None:
    program = _program(
        tmp_path,
        "tegrastats",
        f'echo $$ > "{tmp_path}/pid"\necho "{NANO}"\nsleep 0.3\necho "{TX1}"\nexec sleep 60',
    )
    probes, _ = find_probes(root=tmp_path, which={"tegrastats": str(program)}.get)
    assert _values(probes)["power", "POM_5V_IN"] == 0.9
    deadline = time.monotonic() + 10
    while _values(probes)["temperature", "AO"] != 42.5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    _closed(probes)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_older_nvidia_smi_is_asked_in_its_words(tmp_path: Path) -> None:
    program = _program(
        tmp_path,
        "nvidia-smi",
        'case "$*" in *clocks_event_reasons*) echo "Field \\"clocks_event_reasons.active\\" is not a valid '
        'field to query."; exit 2;; *--id=1*) echo "45, 1410, 52.34, 0x0000000000000000"; exec sleep 60;; '
        "esac",
    )
    which = {"nvidia-smi": str(program)}.get
    assert find_probes(root=tmp_path, which=which)[0] == []  # nobody asked for a GPU
    probes, _ = find_probes(root=tmp_path, gpu=1, which=which)
    assert _values(probes)["clock", "GPU"] == 1410
    _closed(probes)
    _, untold = find_probes(root=tmp_path, gpu=0, which=which)
    assert "nvidia-smi: it says nothing" in untold
    assert "GPU: there is no nvidia-smi" in find_probes(root=tmp_path, gpu=0, which=_none)[1]


class _Counter:
    """A probe that counts how often it is read, and in which thread."""

    gauges = (Gauge("n", "power", "W", "test"),)

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.closed = False

    def read(self) -> list[float | None]:
        self.threads.append(threading.current_thread().name)
        return [float(len(self.threads))]

    def close(self) -> None:
        self.closed = True


def test_the_log_reads_in_its_own_thread_and_says_what_it_cost() -> None:
    probe = _Counter()
    with SensorLog([probe], ["x: untold"], interval_s=0.05) as log:
        deadline = time.monotonic() + 10
        while len(probe.threads) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    said = log.result()
    assert probe.closed
    assert set(probe.threads) == {"edgeclip-sensors"}
    assert said.gauges[0].values == tuple(map(float, range(1, len(probe.threads) + 1)))
    assert len(said.at_s) == said.cost.readings == len(probe.threads)
    assert list(said.at_s) == sorted(said.at_s)
    assert said.untold == ("x: untold",)
    assert 0 < said.cost.share < 1
    assert 0 <= said.cost.median_ms <= said.cost.slowest_ms


def test_programs_are_part_of_the_cost(tmp_path: Path) -> None:
    # a loop of the shell: a tenth of a second and more of CPU time
    busy = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo throttled=0x0"
    program = _program(tmp_path, "vcgencmd", f"[ $1 = get_throttled ] || exit 1\n{busy}")
    probes, _ = find_probes(root=tmp_path, which={"vcgencmd": str(program)}.get)
    with SensorLog(probes, interval_s=0.2) as log:
        pass  # the first reading is always there
    assert log.result().cost.readings >= 1
    assert log.result().cost.cpu_ms > 20


def test_without_probes_no_thread_is_started() -> None:
    before = threading.active_count()
    with SensorLog([], ["temperature: nothing on this system tells it"]) as log:
        assert threading.active_count() == before
    assert log.result().gauges == ()
    assert log.result().cost.readings == 0


def test_programs_start_with_the_log_and_not_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _program(tmp_path, "tegrastats", f'touch "{tmp_path}/started"\necho "{NANO}"\nexec sleep 60')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log = SensorLog.here()
    assert not (tmp_path / "started").exists()
    with log:
        pass
    assert (tmp_path / "started").exists()
    (power,) = [gauge for gauge in log.result().gauges if gauge.name == "POM_5V_IN"]
    assert power.values[0] == 0.9


def test_this_machine_can_be_asked() -> None:
    probes, untold = find_probes()
    for probe in probes:
        assert len(probe.read()) == len(probe.gauges)
    assert probes or untold
    _closed(probes)
