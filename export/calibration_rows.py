"""Rows that int8 ranges are chosen on, for both towers; the same rows for every variant of an export.

Pictures are the user's, or the photographs that come with edgeclip in other crops than those that judge an
export. Texts are the captions of the user's pictures where they have any, else everyday names in templates,
in every language of the model that there are names in. Nothing is drawn at random: where there are more rows
than wanted, they are taken evenly, so that the same pictures give the same rows and the same digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgeclip.bundle import PreprocessSpec
from edgeclip.data import captions_of, read_samples
from edgeclip.errors import ConfigError
from edgeclip.label_sets import Templates
from edgeclip.preprocess import Preprocess

from .options import SAMPLES
from .reference import calibration_pictures, calibration_texts, everyday, reference_texts

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EVERYDAY_TEXTS", "LEAST_SAMPLES", "CalibrationRows", "calibration_rows"]

LEAST_SAMPLES: Final = 16
EVERYDAY_TEXTS: Final = "everyday names in templates"


@dataclass(frozen=True, eq=False)
class CalibrationRows:
    """Rows by tower.

    Attributes:
        rows: ``image`` ``(n, H, W, 3)`` uint8 and, for models with a text tower, ``text`` ``(m, L)`` int32.
        sources: where those of each tower are from, without a path.
    """

    rows: Mapping[str, NDArray[Any]]
    sources: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """Sha256 of the rows."""
        digest = hashlib.sha256()
        for name in sorted(self.rows):
            digest.update(np.ascontiguousarray(self.rows[name]).data)
        return digest.hexdigest()

    def feeds(self, spec: PreprocessSpec, *, float_input: bool) -> dict[str, NDArray[Any]]:
        """Return the rows as graphs take them.

        Args:
            spec: how the model wants pictures.
            float_input: pictures as float32 ``(n, 3, H, W)``, normalized.
        """
        feeds = dict(self.rows)
        if float_input:
            feeds["image"] = Preprocess(spec).normalize(feeds["image"])
        return feeds


def calibration_rows(
    spec: PreprocessSpec,
    *,
    languages: Sequence[str] = (),
    tokenize: Callable[[Sequence[str]], NDArray[np.int32]] | None = None,
    given: Path | None = None,
    reference: Path | None = None,
    samples: int = SAMPLES,
) -> CalibrationRows:
    """Return rows to choose ranges on.

    Args:
        spec: how the model wants pictures.
        languages: of the model.
        tokenize: texts to token rows; ``None`` where there is no text tower.
        given: a folder, table or shards of the user's. Fewer than 64 pictures are cropped and flipped.
        reference: what judges the export, of the user's too: where nothing is given, other crops of it.
            Without both the photographs that come with edgeclip, in other crops than those that judge.
        samples: pictures, and texts, at most.

    Raises:
        ConfigError: fewer than 16 samples are asked for.
        InputError: ``given`` or ``reference`` is not there, holds fewer than two pictures, or one cannot be
            read.
    """
    if samples < LEAST_SAMPLES:
        raise ConfigError(f"calibration samples: got {samples}, expected at least {LEAST_SAMPLES}.")
    pictures = calibration_pictures(spec, given, reference=reference, most=samples)
    rows: dict[str, NDArray[Any]] = {"image": pictures.pixels[_evenly(len(pictures.pixels), samples)]}
    sources = {"image": pictures.source}
    if tokenize is not None:
        captions = _captions(given or reference)
        if len(captions) >= LEAST_SAMPLES:
            texts = [captions[place] for place in _evenly(len(captions), samples)]
            sources["text"] = f"captions of {pictures.source}"
        else:
            texts, sources["text"] = _everyday(languages, samples), EVERYDAY_TEXTS
        rows["text"] = tokenize(texts)
    return CalibrationRows(rows, sources)


def _captions(given: Path | None) -> list[str]:
    """Return every caption of the user's pictures once."""
    found: dict[str, None] = {}
    if given is None:
        return []
    for sample in read_samples([given]):
        for texts in captions_of(sample.columns).values():
            found.update(dict.fromkeys(texts))
        if sample.caption:
            found[sample.caption] = None
    return list(found)


def _everyday(languages: Sequence[str], most: int) -> list[str]:
    """Return everyday names in templates, as many of each language, without those that judge an export."""
    offered = everyday(languages)
    judging = set(reference_texts(offered.labels, offered.templates or Templates.of("one"), languages))
    of_each = [languages, ("zh",)] if {"en", "zh"} <= set(languages) else [languages]
    chosen: list[str] = []
    for number, each in enumerate(of_each):
        texts = [text for text in calibration_texts(each) if text not in judging]
        share = most // len(of_each) + (number < most % len(of_each))
        chosen += [texts[place] for place in _evenly(len(texts), share)]
    return chosen


def _evenly(total: int, most: int) -> list[int]:
    return list(range(total)) if total <= most else [place * total // most for place in range(most)]
