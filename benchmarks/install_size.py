"""Measure what the base install puts on disk: a fresh environment, our wheel, nothing else.

Builds the wheel from a copy of the tree, installs it into a new virtual environment, and adds up the files
of every package, bytecode left out and then counted on its own. The bar: under 190 MB without the embedded
bundle.

    python benchmarks/install_size.py -o benchmarks/results/install_size.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
BAR_MB = 190.0
MB = 1e6
# Parts of our own package that are data: the embedded bundles and the demonstration photographs.
BUNDLES, PHOTOS = ("edgeclip/assets/default/", "edgeclip/assets/nano/"), "edgeclip/assets/photos/"
# Runs in the measured environment, with its Python and nothing but the standard library.
_LISTING = """
import importlib.metadata, json
for d in importlib.metadata.distributions():
    files = [(str(f).replace("\\\\", "/"), f.locate()) for f in d.files or ()]
    sizes = {name: path.stat().st_size for name, path in files if path.is_file()}
    print(json.dumps({"name": d.metadata["Name"], "version": d.version, "sizes": sizes}))
"""


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command and return what it printed."""
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(words[:4])} failed: {done.stderr.strip()[-1000:]}")
    return done.stdout


def build_wheel(scratch: Path) -> Path:
    """Build the wheel from a copy: setuptools leaves build/ and *.egg-info beside the sources."""
    source = scratch / "source"
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=REPO)
    for name in filter(None, listing.split("\0")):
        if (REPO / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPO / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, source)
    return next(scratch.glob("edgeclip-*.whl"))


def measure(wheel: Path, scratch: Path, interpreter: str) -> list[dict[str, Any]]:
    """Install the wheel into a fresh environment and return name, version and sizes of what is there."""
    scratch.mkdir()
    environment = scratch / "environment"
    run(interpreter, "-m", "venv", environment)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    constraints = ("-c", REPO / "constraints.txt")  # the versions that every other figure is of
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *constraints,
        wheel,
        cwd=scratch,
    )
    run(python, "-m", "pip", "check", cwd=scratch)
    rows = [json.loads(line) for line in run(python, "-c", _LISTING, cwd=scratch).splitlines()]
    return [row for row in rows if row["name"].lower() not in ("pip", "setuptools")]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sizes in MB: per package, with and without the bundle, bytecode apart."""
    packages, bytecode, bundle, photos = [], 0, 0, 0
    for row in rows:
        code = {name: size for name, size in row["sizes"].items() if not name.endswith(".pyc")}
        bytecode += sum(row["sizes"].values()) - sum(code.values())
        if row["name"] == "edgeclip":
            bundle = sum(size for name, size in code.items() if name.startswith(BUNDLES))
            photos = sum(size for name, size in code.items() if name.startswith(PHOTOS))
        packages.append(
            {"name": row["name"], "version": row["version"], "mb": round(sum(code.values()) / MB, 2)}
        )
    packages.sort(key=lambda package: -package["mb"])
    total = sum(package["mb"] for package in packages)
    return {
        "with_bundle_mb": round(total, 2),
        "without_bundle_mb": round(total - bundle / MB, 2),
        "bundle_mb": round(bundle / MB, 2),
        "photos_mb": round(photos / MB, 2),
        "bytecode_mb": round(bytecode / MB, 2),
        "packages": packages,
    }


def show(sizes: dict[str, Any]) -> None:
    """Print one installation."""
    print(f"\nPython {sizes['python']}\n\n| package | version | MB |\n|---|---|---|")
    for package in sizes["packages"]:
        print(f"| {package['name']} | {package['version']} | {package['mb']:.1f} |")
    bundle = f"bundle {sizes['bundle_mb']:.1f} MB"
    print(f"\nwith the embedded bundle    {sizes['with_bundle_mb']:7.1f} MB ({bundle})")
    print(f"without it                  {sizes['without_bundle_mb']:7.1f} MB (bar: under {BAR_MB:.0f} MB)")
    print(f"bytecode, written by pip    {sizes['bytecode_mb']:7.1f} MB more (pip install --no-compile: none)")


def main() -> int:
    """Measure, print the tables, write the JSON; 1 where the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--wheel", type=Path, help="measure this wheel instead of building one")
    parser.add_argument(
        "--python", action="append", help="a Python to install into, repeatable; this one by default"
    )
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        wheel = (options.wheel or build_wheel(Path(directory))).resolve()
        wheel_mb = wheel.stat().st_size / MB
        for number, interpreter in enumerate(options.python or [sys.executable]):
            version = run(interpreter, "-c", "import platform; print(platform.python_version())").strip()
            rows = measure(wheel, Path(directory, str(number)), interpreter)
            runs.append({"python": version, **summarise(rows)})
            show(runs[-1])
    print(f"\nour wheel                   {wheel_mb:7.1f} MB (photographs {runs[0]['photos_mb']:.1f} MB)")
    if options.output:
        document = {
            "schema": 1,
            "command": "python benchmarks/install_size.py",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": run("git", "rev-parse", "--short", "HEAD", cwd=REPO).strip(),
            "platform": f"{platform.system()} {platform.machine()}",
            "bar_mb": BAR_MB,
            "wheel_mb": round(wheel_mb, 2),
            "installs": runs,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(sizes["without_bundle_mb"] < BAR_MB for sizes in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
