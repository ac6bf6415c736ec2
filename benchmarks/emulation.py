"""What the benchmarks under an emulated processor share: subjects, inputs, the child process, comparison.

The child (``emulation_child.py``) needs the base install alone and runs on the processor at hand or under
qemu-user; it gets arrays and gives arrays. All that is judged is judged here, on this processor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.bundle import Bundle
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.parity import Golden, compare_embeddings
from edgeclip.shapes import held_out_combinations, render

ROOT = Path(__file__).parent.parent
CHILD = ROOT / "benchmarks" / "emulation_child.py"
PROBES = ("mobileclip", "vit", "tinyclip")
PICTURES = 112
_SIDE = 64  # of the probes' pictures


@dataclass(frozen=True)
class Subject:
    """A variant of a bundle; ``name`` is for reports."""

    name: str
    bundle: Path | str
    variant: str


def qemu(name: str) -> str:
    """Return an emulator of qemu-user, or end with what to install."""
    found = shutil.which(name)
    if found is None:
        sys.exit(f"{name} is not installed: apt install qemu-user (Debian, Ubuntu), then run this again.")
    return found


def version_of(emulator: str) -> str:
    """Return what an emulator says of its version."""
    said = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


def export_probes(folder: Path, variants: Sequence[str]) -> list[Subject]:
    """Export every probe and return its variants; limits are those of ranks among near-duplicate names."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, pixels in enumerate(_shapes(128)):
        Image.fromarray(pixels).save(pictures / f"shape-{number:03}.png")
    found = []
    for probe in PROBES:
        out = folder / probe
        command = [sys.executable, "-m", "edgeclip", "export", str(ROOT / "tests/data/probes" / probe)]
        command += ["--reference", str(pictures), "--limit", "int8:top1_agreement=0.9", "-o", str(out)]
        for variant in variants:
            command += ["--variant", variant]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        found += [Subject(f"{probe} probe", out, variant) for variant in variants]
    return found


def _shapes(count: int) -> list[NDArray[np.uint8]]:
    combinations = held_out_combinations()
    step = max(1, len(combinations) // count)
    return [render(combinations[row * step], 3 + row) for row in range(count)]


def inputs(subject: Subject, pictures: int = PICTURES) -> dict[str, NDArray[Any]]:
    """Return rows by tower: crops of edgeclip's photographs, shapes for probes, golden token rows."""
    bundle = Bundle.open(subject.bundle)
    golden = Golden.of(bundle)
    prepare = Preprocess(bundle.manifest.preprocess)
    if golden.images.shape[1] == _SIDE:
        sources = [Image.fromarray(pixels) for pixels in _shapes(pictures)]
    else:
        sources = _crops(pictures)
    rows: dict[str, NDArray[Any]] = {"image": np.stack([prepare(source) for source in sources])}
    if golden.tokens is not None:
        rows["text"] = golden.tokens
    return rows


def _crops(count: int) -> list[Image.Image]:
    """Return crops of the photographs that come with edgeclip, another part of each time after time."""
    photos = sorted((ROOT / "edgeclip/assets/photos").glob("*.jpg"))
    made = []
    for number in range(count):
        with Image.open(photos[number % len(photos)]) as opened:
            picture = opened.convert("RGB")
        turn = number // len(photos)
        side = int(min(picture.size) * (1.0, 0.8, 0.6)[turn % 3])
        left = (picture.width - side) * (turn % 5) // 4
        top = (picture.height - side) * ((turn * 2) % 5) // 4
        made.append(picture.crop((left, top, left + side, top + side)))
    return made


def embed(
    subject: Subject,
    rows: Mapping[str, NDArray[Any]],
    folder: Path,
    *,
    command: Sequence[str] = (sys.executable,),
    environment: Mapping[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """Run the child and return its arrays: embeddings by tower, and what it says of the processor.

    Args:
        subject: what is run.
        rows: by tower.
        folder: for files on the way and the child's cache.
        command: an interpreter, emulated or not.
        environment: of the child, added to this one.
    """
    given, result = folder / "rows.npz", folder / "result.npz"
    np.savez(given, **rows)
    result.unlink(missing_ok=True)
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    done = subprocess.run(
        [*command, str(CHILD), str(subject.bundle), subject.variant, str(given), str(result)],
        env={**os.environ, "EDGECLIP_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{subject.name} {subject.variant}: {done.returncode}\n{done.stderr[-2000:]}")
    with np.load(result) as arrays:
        return dict(arrays)


def agreement(
    subject: Subject, here: Mapping[str, NDArray[Any]], there: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    """Return how far the answers of two processors are from each other, tower by tower."""
    golden = Golden.of(Bundle.open(subject.bundle))
    result: dict[str, Any] = {
        "subject": subject.name,
        "variant": subject.variant,
        "sums_here": str(here["sums"]),
        "sums_there": str(there["sums"]),
        "isa_there": str(there["isa"]),
    }
    for tower in ("image", "text"):
        if tower not in here:
            continue
        bank = golden.bank if tower == "image" else None
        numbers = compare_embeddings(here[tower], there[tower], bank=bank)
        result[tower] = {
            "n": numbers.n,
            "labels": None if bank is None else len(bank),
            "top1_agreement": numbers.top1_agreement,
            "cosine_min": numbers.cosine_min,
            "cosine_mean": numbers.cosine_mean,
            "max_abs": numbers.max_abs,
            "identical_rows": int((here[tower] == there[tower]).all(axis=1).sum()),
        }
    return result
