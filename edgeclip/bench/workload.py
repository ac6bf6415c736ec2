"""What a benchmark classifies: pictures, and the labels that are offered."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeclip.bench.report import LabelsEntry, PicturesEntry
from edgeclip.errors import InputError

if TYPE_CHECKING:
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.label_sets import LabelSet, Templates
    from edgeclip.labels import LabelBank

__all__ = ["DEMO", "MAX_PICTURES", "Workload", "picture_files"]

DEMO: Final = Path(__file__).parents[1] / "assets" / "photos"
"""The demonstration photographs, which come with edgeclip."""
MAX_PICTURES: Final = 100
"""Pictures of a folder that are used: enough to be unlike each other, few enough to come again and again."""


@dataclass(frozen=True)
class Workload:
    """What is classified.

    Attributes:
        pictures: files, classified in this order over and over.
        source: how the report calls where they come from.
        labels: that are offered, or a finished bank; ``None`` for the bundle's own.
        templates: of ``labels``; ``None`` for the bundle's.
        labels_source: how the report calls where they come from.
        language: of the bundle's own labels.
    """

    pictures: tuple[Path, ...]
    source: str = "demonstration photographs"
    labels: LabelSet | LabelBank | None = None
    templates: Templates | None = None
    labels_source: str = "bundle"
    language: str | None = None

    def set_labels(self, classifier: ZeroShotClassifier) -> None:
        """Offer the labels."""
        if self.labels is None:
            classifier.set_bundle_labels(self.language)
        else:
            classifier.set_labels(self.labels, templates=self.templates)

    def labels_entry(self, classifier: ZeroShotClassifier) -> LabelsEntry:
        """Return what the report says of the labels in force."""
        bank = classifier.bank
        return LabelsEntry(n=len(bank), source=self.labels_source, templates=bank.templates.name)

    def pictures_entry(self) -> PicturesEntry:
        """Read every picture and return what the report says of them.

        Raises:
            InputError: one cannot be read.
        """
        from PIL import Image

        from edgeclip.pictures import decode_image

        megapixels, sums, size_bytes = [], [], 0
        for path in self.pictures:
            decode_image(path)  # says in a sentence what is wrong with it
            content = path.read_bytes()
            with Image.open(path) as picture:
                megapixels.append(picture.width * picture.height / 1e6)
            size_bytes += len(content)
            sums.append(hashlib.sha256(content).digest())
        return PicturesEntry(
            source=self.source,
            n=len(self.pictures),
            megapixels=tuple(megapixels),
            size_bytes=size_bytes,
            digest=hashlib.sha256(b"".join(sums)).hexdigest(),
        )


def picture_files(where: Path) -> tuple[Path, ...]:
    """Return the first :data:`MAX_PICTURES` picture files of a folder, or the one that is named.

    Raises:
        InputError: there is none.
    """
    from edgeclip.data import read_samples

    sources = (sample.source for sample in read_samples([where]))
    found = [
        source.absolute() for source in itertools.islice(sources, MAX_PICTURES) if isinstance(source, Path)
    ]
    if not found:
        raise InputError(f"{str(where)!r}: holds no picture files, expected a folder with at least one.")
    return tuple(found)
