"""Facts about the machine, from files that systems of other kinds would have."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from edgeclip.runtime import host as host_module
from edgeclip.runtime.host import (
    CpuTimes,
    Host,
    cpu_times,
    peak_rss_bytes,
    usable_cores,
    versions,
)

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) N100
flags\t\t: fpu avx avx2 fma f16c avx_vnni

processor\t: 1
model name\t: another core
flags\t\t: fpu
"""
RASPBERRY_PI = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd0b

Revision\t: d04170
"""


class Files:
    """The system files of another machine, by path; everything else is absent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text: dict[str, str] = {}
        monkeypatch.setattr(host_module, "_read", lambda path, limit: self.text.get(path))


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(monkeypatch)


def read_anew() -> Host:
    return host_module._here.__wrapped__()


def test_this_machine_is_described() -> None:
    here = Host.here()
    assert here is Host.here()
    assert 1 <= here.cores <= here.logical_cpus
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.to_dict()["fingerprint"] == here.fingerprint()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
def test_linux_tells_everything_that_decides_kernels() -> None:
    here = Host.here()
    assert here.isa
    assert here.memory_bytes is not None
    assert here.memory_bytes > 1 << 28
    assert cpu_times() is not None


def test_an_intel_board(files: Files) -> None:
    files.text["/proc/cpuinfo"] = X86
    found = read_anew()
    assert found.cpu_model == "Intel(R) N100"
    assert found.isa == {"avx2", "fma", "f16c", "avx_vnni"}


def test_a_raspberry_pi(files: Files) -> None:
    files.text |= {
        "/proc/cpuinfo": RASPBERRY_PI,
        "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    }
    found = read_anew()
    assert found.isa == {"neon", "fp16", "dotprod"}
    assert found.cpu_model == "implementer 0x41 part 0xd0b"
    assert found.board == "Raspberry Pi 5 Model B Rev 1.0"


def test_a_system_that_tells_nothing_says_unavailable(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_uname", lambda: ("Plan9", "4", "x86_64"))
    monkeypatch.delenv("PROCESSOR_IDENTIFIER", raising=False)
    monkeypatch.setattr(host_module.os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError))
    found = read_anew()
    assert (found.isa, found.cpu_model, found.memory_bytes, found.cpu_quota) == (None, None, None, None)
    facts = found.to_dict()
    assert facts["isa"] == facts["cpu_model"] == facts["memory_bytes"] == "unavailable"
    assert cpu_times() is None
    assert len(found.fingerprint()) == 16


def test_every_apple_has_dotprod(files: Files) -> None:
    assert host_module._isa({}, "Darwin", "aarch64") == {"neon", "fp16", "dotprod"}
    assert host_module._isa({}, "Windows", "x86_64") is None


@pytest.mark.parametrize(
    ("cgroup", "limits", "quota"),
    [
        ("0::/", {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            "0::/a/b",
            {"/sys/fs/cgroup/a/cpu.max": "50000 100000", "/sys/fs/cgroup/a/b/cpu.max": "max 100000"},
            0.5,
        ),
        (
            "4:cpu,cpuacct:/docker/1\n1:name=systemd:/x\n0::/",
            {
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            "4:cpu:/",
            {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("", {}, None),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    cgroup: str,
    limits: dict[str, str],
    quota: float | None,
) -> None:
    files.text |= {"/proc/self/cgroup": cgroup, **limits}
    monkeypatch.setattr(host_module.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert read_anew().cpu_quota == quota
    assert usable_cores() == (8 if quota is None else math.ceil(quota))


def test_affinity_limits_the_cores(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module.os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "536870912\n", 1 << 29),
        ("memory.max", "max\n", None),
        ("memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_the_memory_limit_of_a_container(files: Files, name: str, text: str, limit: int | None) -> None:
    files.text |= {"/proc/self/cgroup": "0::/", f"/sys/fs/cgroup/{name}": text}
    assert read_anew().memory_limit_bytes == limit


def test_steal_time_is_a_share() -> None:
    assert CpuTimes(total=300, steal=30).steal_share_since(CpuTimes(total=100, steal=10)) == 0.1
    assert CpuTimes(total=100, steal=1).steal_share_since(CpuTimes(total=100, steal=1)) == 0


def test_the_fingerprint_follows_what_answers_depend_on() -> None:
    here = replace(Host.here(), isa=frozenset({"avx2", "fma"}))
    same = replace(here, isa=frozenset({"fma", "avx2"}), cores=99, release="another", memory_bytes=1)
    assert here.fingerprint() == same.fingerprint()
    for change in (
        {"cpu_model": "other"},
        {"isa": frozenset({"avx2"})},
        {"machine": "riscv64"},
        {"gpus": ("x",)},
    ):
        assert replace(here, **change).fingerprint() != here.fingerprint()


def test_the_fingerprint_changes_with_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Host.here().fingerprint()
    monkeypatch.setattr(host_module, "versions", lambda: {"onnxruntime": "99.0"})
    assert Host.here().fingerprint() != before


def test_versions_are_those_of_the_installed_packages() -> None:
    found = versions()
    assert {"numpy", "onnxruntime", "pillow"} <= set(found)
    for name, version in found.items():
        assert version == metadata.version(name)


def test_the_first_of_two_installations_counts(tmp_path: Path) -> None:
    for folder, version in (("one", "1.0"), ("two", "2.0")):
        (tmp_path / folder / f"OnnxRuntime_GPU-{version}.dist-info").mkdir(parents=True)
    (tmp_path / "one" / "old_style-3.1-py3.11.egg-info").mkdir()
    found = host_module._installed((str(tmp_path / "none"), str(tmp_path / "one"), str(tmp_path / "two")))
    assert found == {"onnxruntime-gpu": "1.0", "old-style": "3.1"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_the_peak_of_memory_grows_with_use() -> None:
    before = peak_rss_bytes()
    assert before is not None
    block = bytearray(before + (32 << 20))
    block[::4096] = b"x" * len(block[::4096])
    assert peak_rss_bytes() > before  # type: ignore[operator]


def test_facts_need_the_standard_library_alone() -> None:
    code = (
        "import sys; from edgeclip.runtime.host import Host; Host.here().to_dict(); "
        "print(sorted({'numpy', 'onnxruntime', 'importlib.metadata', 'msgspec'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    # An editable install brings in what its finder needs; a wheel brings nothing.
    assert result.stdout.strip() in ("[]", "['importlib.metadata']")


GIVES_BACK = """
import ctypes, os
from edgeclip.runtime.host import release_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [ctypes.create_string_buffer(b"x" * 60_000) for _ in range(1000)]  # below what glibc maps apart
last = ctypes.create_string_buffer(b"x" * 60_000)  # keeps the heap's end where it is
blocks.clear()
before = resident()
assert release_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="only glibc is told to"
)
def test_freed_memory_goes_back_to_the_system() -> None:
    result = subprocess.run([sys.executable, "-c", GIVES_BACK], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 30_000_000
