"""Pictures of OpenMoji, a style of pictograms that nothing trains on, from the drawings in its package.

    edgeclip data fetch pictograms held-out-pictograms
    apt-get install librsvg2-bin
    python benchmarks/openmoji.py -o build/openmoji --size 64

writes a PNG with a clear ground for every emoji, as the packages of other styles hold them, and `names.json`
with their English names. They are under CC-BY-SA-4.0, for tests alone. librsvg's versions smooth edges in
slightly different ways: the version used stands in `names.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from edgeclip.errors import InputError
from edgeclip.fetch import materials

__all__ = ["drawings", "render", "renderer"]

_RENDERER = "rsvg-convert"


def drawings() -> Mapping[str, tuple[str, Path]]:
    """Return English name and SVG of the emoji that Unicode names, by code, without tones of skin."""
    package = materials("held-out-pictograms")["openmoji"]
    with (package / "data" / "openmoji.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if not row["group"].startswith("extras-")]
    return {
        row["hexcode"]: (row["annotation"], package / "color" / "svg" / f"{row['hexcode']}.svg")
        for row in rows
        if not row["skintone"]
    }


def renderer() -> str:
    """Return name and version of what draws.

    Raises:
        InputError: it is not installed.
    """
    if shutil.which(_RENDERER) is None:
        raise InputError(f"{_RENDERER} is not installed; run `apt-get install librsvg2-bin`.")
    version = subprocess.run([_RENDERER, "--version"], check=True, capture_output=True, text=True)
    return version.stdout.strip()


def render(found: Mapping[str, tuple[str, Path]], folder: Path, size_px: int) -> None:
    """Draw emoji as square PNG files, called by their code in lower case."""
    size = str(size_px)
    command = [_RENDERER, "--width", size, "--height", size, "--keep-aspect-ratio", "--output"]
    for code, (_, svg) in found.items():
        subprocess.run([*command, str(folder / f"{code.lower()}.png"), str(svg)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/openmoji"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--limit", type=int, help="only so many of them")
    asked = parser.parse_args()
    said = {"renderer": renderer(), "size_px": asked.size, "licence": "CC-BY-SA-4.0"}
    found = dict(sorted(drawings().items())[: asked.limit])
    asked.output.mkdir(parents=True, exist_ok=True)
    render(found, asked.output, asked.size)
    names = {code.lower(): name for code, (name, _) in found.items()}
    (asked.output / "names.json").write_text(
        json.dumps({**said, "names": names}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"{len(found)} pictures in {asked.output}")


if __name__ == "__main__":
    main()
