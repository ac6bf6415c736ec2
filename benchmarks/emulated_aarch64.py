"""Does the same int8 file give the same answers on 64-bit ARM?

The embedded bundle and int8 exports of the probes are run twice: on this processor, and under qemu-user as a
Cortex-A72 (NEON alone, as in a Raspberry Pi 4) and as a Cortex-A76 (dot products, as in a Raspberry Pi 5).
Correctness alone: emulated time means nothing.

The root file system is made from Debian's arm64 packages of Python and the wheels of the base install, both
through the ordinary clients (apt with a state of its own, so that this machine's packages stay as they are;
pip with ``--platform``), and kept in the data cache. qemu-user shows programs the /proc/cpuinfo of the
machine it runs on, which ONNX Runtime takes for ARM's at import and crashes: a file in the root file system
stands in.

    python benchmarks/emulated_aarch64.py     # needs qemu-aarch64 (Debian, Ubuntu: apt install qemu-user)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import tomllib
from emulation import PICTURES, ROOT, Subject, agreement, embed, export_probes, inputs, qemu, version_of

from edgeclip.bundle import Bundle
from edgeclip.cache import cache_root
from edgeclip.runtime.host import Host, versions

_COMMON = "fp asimd evtstrm aes pmull sha1 sha2 crc32"
CPUS = {
    "cortex-a72": ("0xd08", f"{_COMMON} cpuid"),
    "cortex-a76": ("0xd0b", f"{_COMMON} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
}
_LIBRARY = "usr/lib/aarch64-linux-gnu"


def root_file_system() -> Path:
    """Return a folder with Python for arm64 and the wheels of the base install, made where it is missing."""
    target = cache_root() / "data" / f"emulated-aarch64-{_key()}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        root = Path(partial) / "root"
        root.mkdir()
        for package in _packages(Path(partial) / "apt"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        loader = root / "lib" / "ld-linux-aarch64.so.1"
        if not loader.exists():  # newer systems have one lib, and the link is in no package of these
            (root / "lib").symlink_to("usr/lib")
        wheels = _wheels(Path(partial) / "wheels", _python(root))
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(root / "site")
        (root / "proc").mkdir()
        root.rename(target)
    return target


def _key() -> str:
    return f"onnxruntime-{version('onnxruntime')}-numpy-{version('numpy')}"


def _packages(folder: Path) -> list[Path]:
    """Fetch arm64 Python and the libraries that wheels link to, with a state apart from this system's."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    status = folder / "state/status"
    status.touch()
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": status,
        "Dir::Cache": folder / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in options.items())]
    _run([*apt, "update"])
    _run([*apt, "-y", "--download-only", "install", "python3", "libstdc++6", "zlib1g"])
    return sorted((folder / "cache/archives").glob("*.deb"))


def _python(root: Path) -> Path:
    return max((root / "usr/bin").glob("python3.[0-9]*"))


def _wheels(folder: Path, python: Path) -> list[Path]:
    """Fetch the base install in the versions that are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [line.split(">=")[0] for line in project["dependencies"] if ";" not in line]
    number = python.name.removeprefix("python")
    tag = number.replace(".", "")
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "-d", str(folder)]
    for platform in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014"):
        command += ["--platform", f"{platform}_aarch64"]
    command += ["--python-version", number, "--implementation", "cp"]
    command += ["--abi", f"cp{tag}", "--abi", "abi3", "--abi", "none"]
    _run([*command, *(f"{name}=={version(name)}" for name in names)])
    return sorted(folder.glob("*.whl"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])} failed: {done.stderr[-1500:]}")


def interpreter(emulator: str, root: Path, cpu: str) -> list[str]:
    """Return a command that runs arm64 Python as a processor."""
    part, features = CPUS[cpu]
    core = (
        f"processor\t: {{}}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 3\n\n"
    )
    (root / "proc/cpuinfo").write_text(core.format(0) + core.format(1))
    settings = {
        "PYTHONPATH": f"{root / 'site'}:{ROOT}",
        "PYTHONHOME": str(root / "usr"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_LIBRARY_PATH": f"{root / _LIBRARY}:{root / 'lib/aarch64-linux-gnu'}",
    }
    given = [part for key, value in settings.items() for part in ("-E", f"{key}={value}")]
    return [emulator, "-cpu", cpu, "-L", str(root), *given, str(_python(root))]


def main() -> None:
    """Run the processors, print the agreement, write it down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--cpu", action="append", choices=tuple(CPUS), help="All without.")
    parser.add_argument("--bundle", help="One bundle in place of the embedded one and the probes.")
    parser.add_argument("--variant", default="onnx-int8", help="Its variant.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/emulated_aarch64.json")
    options = parser.parse_args()
    emulator = qemu("qemu-aarch64")
    root = root_file_system()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.bundle is None:
            subjects = [Subject("embedded bundle", "default", "onnx-int8")]
            subjects += export_probes(folder, ["onnx-int8@arm64-dotprod"])
        else:
            subjects = [Subject(options.bundle, options.bundle, options.variant)]
        for subject in subjects:
            rows = inputs(subject, options.pictures)
            here = embed(subject, rows, folder)
            for cpu in options.cpu or CPUS:
                there = embed(subject, rows, folder, command=interpreter(emulator, root, cpu))
                found.append({"cpu": cpu, **agreement(subject, here, there)})
                print(json.dumps(found[-1]), flush=True)
    host = Host.here()
    result = {
        "what": "the same int8 files on this processor and on emulated 64-bit ARM",
        "command": "python benchmarks/emulated_aarch64.py",
        "bundle": Bundle.open("default").digest,
        "host": {"cpu_model": host.cpu_model, "isa": sorted(host.isa or ())},
        "qemu": version_of(emulator),
        "versions": versions(),
        "top1_agreement_min": min(each["image"]["top1_agreement"] for each in found),
        "cosine_min": min(each[tower]["cosine_min"] for each in found for tower in ("image", "text")),
        "results": found,
    }
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"least top-1 agreement {result['top1_agreement_min']:.4f}, cosine {result['cosine_min']:.6f}")


if __name__ == "__main__":
    main()
