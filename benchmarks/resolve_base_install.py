"""Resolve the base install as wheels only, for every Python and platform we support, and print a table.

Nothing is installed or built: pip resolves for the target's tags (``pip install --dry-run --report``), on
any machine. pip evaluates environment markers for the Python that runs it, so the requirements of every
resolved package are read again here with the target's markers, and what they add or drop is resolved anew
until nothing changes.

    python benchmarks/resolve_base_install.py -o benchmarks/results/resolve_base_install.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
GLIBC = 28  # RHEL 8, Debian 10, Ubuntu 20.04 and later; JetPack 6 has 2.35
MACOS = 14
# Newer systems to try where the oldest one has no wheels, so that the table can say what is needed.
NEWER = {"glibc": (31, 34, 35, 39), "macos": (15,)}


@dataclass(frozen=True)
class Target:
    """One system: its wheel tags and what environment markers see there."""

    name: str
    markers: dict[str, str]
    machine: str
    kind: str

    def tags(self, level: int) -> list[str]:
        """Return the platform tags, the oldest system first; ``level`` is the newest glibc or macOS."""
        if self.kind == "glibc":
            legacy = {
                "x86_64": ["manylinux2014", "manylinux2010", "manylinux1"],
                "aarch64": ["manylinux2014"],
            }
            tags = [f"manylinux_2_{minor}_{self.machine}" for minor in range(level, 4, -1)]
            return (
                tags + [f"{tag}_{self.machine}" for tag in legacy[self.machine]] + [f"linux_{self.machine}"]
            )
        if self.kind == "macos":
            tags = [
                f"macosx_{major}_0_{kind}"
                for major in range(level, 10, -1)
                for kind in ("arm64", "universal2")
            ]
            return tags + [f"macosx_10_{minor}_universal2" for minor in range(16, 3, -1)]
        return ["win_amd64"]

    def levels(self) -> tuple[int, ...]:
        """Return the systems to try, the one we promise first."""
        return {"glibc": (GLIBC, *NEWER["glibc"]), "macos": (MACOS, *NEWER["macos"])}.get(self.kind, (0,))


def _markers(system: str, machine: str, os_name: str, sys_platform: str) -> dict[str, str]:
    return {
        "platform_system": system,
        "platform_machine": machine,
        "os_name": os_name,
        "sys_platform": sys_platform,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_version": "",
        "extra": "",
    }


TARGETS = (
    Target("linux x86-64", _markers("Linux", "x86_64", "posix", "linux"), "x86_64", "glibc"),
    Target("linux aarch64", _markers("Linux", "aarch64", "posix", "linux"), "aarch64", "glibc"),
    Target("windows x86-64", _markers("Windows", "AMD64", "nt", "win32"), "amd64", "windows"),
    Target("macos arm64", _markers("Darwin", "arm64", "posix", "darwin"), "arm64", "macos"),
)


def base_requirements() -> list[str]:
    """Return the base dependencies of pyproject.toml."""
    project = msgspec.toml.decode((REPO / "pyproject.toml").read_bytes())["project"]
    return list(project["dependencies"])


def applies(requirement: Requirement, environment: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(environment)


def bare(requirement: Requirement) -> str:
    """Return a requirement without its marker, which pip would evaluate for its own Python."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def run_pip(requirements: list[str], python: str, tags: list[str]) -> dict[str, Any] | str:
    """Return pip's report, or what it said when it found no solution."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += [
            "--disable-pip-version-check",
            "--no-input",
            "--only-binary=:all:",
            "--target",
            f"{scratch}/t",
        ]
        command += ["--report", str(report), "--python-version", python, "--implementation", "cp"]
        for tag in tags:
            command += ["--platform", tag]
        done = subprocess.run(
            [*command, *requirements], capture_output=True, text=True, check=False, cwd=scratch
        )
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line]
            return (lines or [f"pip ended with {done.returncode}"])[-1].removeprefix("ERROR: ")
        return dict(json.loads(report.read_text()))


def resolve(target: Target, python: str, level: int) -> dict[str, Any]:
    """Resolve one cell; ``packages`` where it worked, ``reason`` where not."""
    environment = {**target.markers, "python_version": python, "python_full_version": f"{python}.0"}
    environment["implementation_version"] = environment["python_full_version"]
    roots = [
        bare(requirement)
        for requirement in map(Requirement, base_requirements())
        if applies(requirement, environment)
    ]
    added: dict[str, str] = {}
    for _ in range(5):
        report = run_pip([*roots, *added.values()], python, target.tags(level))
        if isinstance(report, str):
            return {"ok": False, "reason": _without_hosts(report)}
        found: dict[str, Any] = {
            canonicalize_name(item["metadata"]["name"]): item for item in report["install"]
        }
        needed = _closure(roots, found, environment)
        missing = {name: text for name, text in needed.items() if name not in found}
        if not missing:
            return {"ok": True, "packages": {name: _described(found[name]) for name in sorted(needed)}}
        added.update(missing)
    return {"ok": False, "reason": f"requirements did not settle: {', '.join(sorted(added))}"}


def _closure(roots: list[str], found: dict[str, Any], environment: dict[str, str]) -> dict[str, str]:
    """Return name -> requirement of everything the target needs, by the target's markers."""
    needed: dict[str, str] = {}
    pending = [Requirement(root) for root in roots]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name in needed:
            continue
        needed[name] = bare(requirement)
        for text in found.get(name, {}).get("metadata", {}).get("requires_dist", []):
            child = Requirement(text)
            if applies(child, environment):
                pending.append(child)
    return needed


def _described(item: dict[str, Any]) -> dict[str, str]:
    return {"version": item["metadata"]["version"], "wheel": item["download_info"]["url"].rsplit("/", 1)[-1]}


def _without_hosts(text: str) -> str:
    return re.sub(r"https?://\S+", "<index>", text)[:500]


def _needs(target: Target, level: int, cell: dict[str, Any]) -> str:
    """Say what the wheels found ask of the system: the newest glibc or macOS among them."""
    pattern = {"glibc": r"manylinux_2_(\d+)_", "macos": r"macosx_(\d+)_"}.get(target.kind)
    if pattern is None:
        return "yes"
    newest = 0
    for package in cell["packages"].values():
        wheel = (
            package["wheel"]
            .replace("manylinux2014", "manylinux_2_17")
            .replace("manylinux2010", "manylinux_2_12")
        )
        levels = [int(number) for number in re.findall(pattern, wheel)]
        newest = max(newest, min(levels, default=0))  # a wheel with several tags runs on the oldest
    return f"glibc 2.{newest}" if target.kind == "glibc" else f"macOS {newest}"


def main() -> int:
    """Resolve every cell, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="write every package of every cell to this JSON file"
    )
    parser.add_argument(
        "--python", action="append", choices=PYTHONS, help="only this Python; may be repeated"
    )
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS])
    options = parser.parse_args()
    pythons = options.python or PYTHONS
    targets = [target for target in TARGETS if not options.target or target.name in options.target]
    cells: list[dict[str, Any]] = []
    table: dict[tuple[str, str], str] = {}
    for target in targets:
        for python in pythons:
            started = time.perf_counter()
            cell: dict[str, Any] = {"ok": False}
            first_reason = None
            for level in target.levels():
                cell = resolve(target, python, level)
                if cell["ok"]:
                    break
                first_reason = first_reason or cell["reason"]
            table[target.name, python] = _needs(target, level, cell) if cell["ok"] else "**no**"
            cells.append(
                {"target": target.name, "python": python, "needs": table[target.name, python], **cell}
            )
            if first_reason is not None:
                cells[-1]["reason"] = first_reason
            seconds = time.perf_counter() - started
            print(f"{target.name} {python}: {table[target.name, python]} ({seconds:.0f} s)", file=sys.stderr)
    print(f"| Python | {' | '.join(target.name for target in targets)} |")
    print(f"|---|{'---|' * len(targets)}")
    for python in pythons:
        print(f"| {python} | {' | '.join(table[target.name, python] for target in targets)} |")
    for cell in cells:
        if not cell["ok"]:
            print(f"\n{cell['target']}, Python {cell['python']}: {cell['reason']}")
    if options.output:
        document = {
            "schema": 1,
            "command": "python benchmarks/resolve_base_install.py",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=False
            ).stdout.strip(),
            "requirements": base_requirements(),
            "promised": {"glibc": f"2.{GLIBC}", "macos": str(MACOS)},
            "cells": cells,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(cell["ok"] for cell in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
