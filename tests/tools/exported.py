"""Exports of the probes, for tests: pictures they know, and quick ways to export and run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.export.exporter import export_bundle
from edgeclip.export.options import Checkpoint, Exported, ExportSettings, References
from edgeclip.export.variants import parse_variants
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.shapes import held_out_combinations, render

PROBES = Path(__file__).parents[1] / "data" / "probes"
NAMES = ("mobileclip", "tinyclip", "vit")


def shape_pictures(count: int, *, seed: int = 3) -> NDArray[np.uint8]:
    """Return pictures ``(count, 64, 64, 3)`` of what probes were never trained on."""
    combinations = held_out_combinations()
    step = max(1, len(combinations) // count)
    return np.stack([render(combinations[row * step], seed + row) for row in range(count)])


def write_pictures(folder: Path, count: int = 64) -> Path:
    """Write such pictures to a folder."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(shape_pictures(count)):
        Image.fromarray(pixels).save(folder / f"shape-{number:03}.png")
    return folder


def export_probe(
    name: str,
    out: Path,
    pictures: Path | None,
    *variants: str,
    settings: ExportSettings | None = None,
    **more: Any,
) -> Exported:
    """Export a probe, compared on pictures that it knows."""
    settings = settings or ExportSettings(references=References(pictures=pictures), threads=1)
    return export_bundle(
        Checkpoint(str(PROBES / name)), parse_variants(variants or ("onnx-fp32",)), out, settings, **more
    )


def run_file(path: Path, rows: NDArray[Any], *, batch: int) -> NDArray[np.float32]:
    """Run an ONNX file with ONNX Runtime itself, without anything of ours."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    parts = [
        session.run(None, {name: rows[start : start + batch]})[0] for start in range(0, len(rows), batch)
    ]
    return np.concatenate(parts)


def manifest_of(bundle: Path) -> dict[str, Any]:
    """Return a bundle's manifest as it stands there."""
    said: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return said


def model_file(bundle: Path, variant: str, tower: str) -> Path:
    """Return the file of a tower."""
    return bundle / manifest_of(bundle)["variants"][variant]["towers"][tower]["model"]
