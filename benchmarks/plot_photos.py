"""Draw what the embedded model says of the demonstration photographs: docs/images/photos.jpg.

All 998 names that come with the model are on offer; the two best stand below each picture with their scores.

    python benchmarks/plot_photos.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import edgeclip
from edgeclip import ZeroShotClassifier
from edgeclip.classify import Prediction

ROOT = Path(__file__).parent.parent
PHOTOS = Path(edgeclip.__file__).parent / "assets" / "photos"
TARGET = ROOT / "docs/images/photos.jpg"

COLUMNS, SIDE, GAP, TEXT = 4, 210, 12, 50
INK, PALE, PAPER = "#1f2933", "#7b8794", "#ffffff"
FIRST, SECOND = 15, 13
_QUALITY = 82


def main() -> None:
    """Classify the photographs and draw them in a grid."""
    paths = sorted(PHOTOS.glob("*.jpg"))
    with ZeroShotClassifier.open() as classifier:
        classifier.set_bundle_labels()
        found = classifier.classify(paths, top_k=2)
        names = len(classifier.bank)
    rows = -(-len(paths) // COLUMNS)
    sheet = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), GAP + rows * (SIDE + TEXT + GAP)), PAPER)
    for place, (path, predictions) in enumerate(zip(paths, found, strict=True)):
        row, column = divmod(place, COLUMNS)
        _draw(sheet, path, predictions, GAP + column * (SIDE + GAP), GAP + row * (SIDE + TEXT + GAP))
    TARGET.parent.mkdir(exist_ok=True)
    sheet.save(TARGET, quality=_QUALITY, optimize=True)
    print(f"{TARGET.relative_to(ROOT)}: {len(paths)} photographs, {names} names", file=sys.stderr)


def _draw(sheet: Image.Image, path: Path, predictions: list[Prediction], x: int, y: int) -> None:
    with Image.open(path) as photo:
        sheet.paste(ImageOps.fit(photo.convert("RGB"), (SIDE, SIDE)), (x, y))
    draw = ImageDraw.Draw(sheet)
    for size, ink, below, said in zip((FIRST, SECOND), (INK, PALE), (6, 28), predictions, strict=True):
        font = ImageFont.load_default(size)
        draw.text((x, y + SIDE + below), said.label, ink, font)
        draw.text((x + SIDE, y + SIDE + below), f"{said.score:.0%}", ink, font, anchor="ra")


if __name__ == "__main__":
    main()
