"""The calibration set of an export: which pictures and texts, before :mod:`..calibration` chooses among them.

Pictures are the user's, or other crops of those that judge the export, or the photographs that come with
edgeclip in other crops. Texts are the captions of the user's pictures and the user's labels in templates,
else everyday names in templates, in every language of the model that there are names in; none of them judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import edgeclip
from edgeclip.bundle import PreprocessSpec
from edgeclip.calibration.dataset import (
    CROPS,
    LEAST_SAMPLES,
    CalibrationSet,
    Embed,
    SamplePool,
    choose_texts,
    read_pool,
)
from edgeclip.data import read_samples
from edgeclip.label_sets import TEMPLATES, Templates
from edgeclip.runtime.host import usable_cores

from .options import References
from .reference import (
    PHOTOGRAPHS,
    calibration_texts,
    default_templates,
    everyday,
    reference_texts,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["EVERYDAY_TEXTS", "LABEL_TEXTS", "calibration_set"]

EVERYDAY_TEXTS: Final = "everyday names in templates"
LABEL_TEXTS: Final = "labels in templates"


def calibration_set(
    spec: PreprocessSpec,
    asked: References,
    *,
    languages: Sequence[str] = (),
    tokenize: Callable[[Sequence[str]], NDArray[np.int32]] | None = None,
    tokenizer: str = "",
    embed: Embed | None = None,
    on_note: Callable[[str], None] = lambda said: None,
) -> CalibrationSet:
    """Return the rows to choose ranges on.

    Args:
        spec: how the model wants pictures.
        asked: pictures, labels, and how to choose. A file that ``CalibrationSet.write`` wrote is taken as it
            is.
        languages: of the model.
        tokenize: texts to token rows; ``None`` where there is no text tower.
        tokenizer: its digest.
        embed: pictures to embeddings of the float model, for coverage.
        on_note: told how far it is.

    Raises:
        ConfigError: a choice cannot be used.
        InputError: pictures are not there, are fewer than two, cannot be read, or lack labels.
        CalibrationError: a finished set is of another model, or embeddings are not finite.
    """
    selection = asked.selection
    given = asked.calibration
    if given is not None and CalibrationSet.is_file(given):
        ready = CalibrationSet.read(given)
        ready.check_fits(spec, text=tokenize is not None, tokenizer=tokenizer)
        return ready

    def prepared(done: int, total: int) -> None:
        on_note(f"calibration: {done} of {total} pictures")

    def embedded(done: int, total: int) -> None:
        on_note(f"calibration: {done} of {total} rows embedded")

    pool = read_pool(_pool(asked), spec, selection, workers=usable_cores(), on_progress=prepared)
    rows: dict[str, NDArray[Any]] = {"image": pool.choose(selection, embed, on_progress=embedded)}
    sources = {"image": pool.source}
    if tokenize is not None:
        texts, sources["text"] = _texts(asked, languages)
        rows["text"] = tokenize(texts)
    return CalibrationSet(rows, sources, pool.described(selection), tokenizer if tokenize is not None else "")


def _pool(asked: References) -> SamplePool:
    if asked.calibration is not None:
        return SamplePool.of(asked.calibration)
    if asked.pictures is not None:
        return replace(SamplePool.of(asked.pictures), few=CROPS, many=CROPS)
    folder = Path(edgeclip.__file__).parent / "assets" / "photos"
    return SamplePool(lambda: read_samples([folder]), PHOTOGRAPHS, few=CROPS)


def _texts(asked: References, languages: Sequence[str]) -> tuple[list[str], str]:
    """Return texts, and where they are from."""
    selection, most = asked.selection, asked.texts
    groups: list[Sequence[str]] = []
    sources = []
    pictures = asked.calibration or asked.pictures
    if pictures is not None:
        pool = SamplePool.of(pictures)
        if captions := pool.captions(selection, most):
            groups.append(captions)
            sources.append(f"captions of {pool.source}")
    if asked.offered is not None and (phrases := _label_texts(asked, languages)):
        groups.append(phrases)
        sources.append(LABEL_TEXTS)
    if sum(map(len, groups)) < LEAST_SAMPLES:
        groups, sources = _everyday(languages), [EVERYDAY_TEXTS]
    return choose_texts(groups, selection, most), " and ".join(sources)


def _label_texts(asked: References, languages: Sequence[str]) -> list[str]:
    """Return the user's labels in templates, and bare, without the texts that judge."""
    assert asked.offered is not None
    labels = asked.offered.labels
    judging = asked.offered.templates or default_templates(labels)
    templates = (*judging.texts, *TEMPLATES["zh" if judging.name == "zh" else "openai-7"], "{}")
    judges = set(reference_texts(labels, judging, languages))
    texts = [text for label in labels.labels for phrase in label.texts(templates) for text in phrase]
    return [text for text in dict.fromkeys(texts) if text not in judges]


def _everyday(languages: Sequence[str]) -> list[Sequence[str]]:
    """Return everyday names in templates for each language, without those that judge an export."""
    offered = everyday(languages)
    judging = set(reference_texts(offered.labels, offered.templates or Templates.of("one"), languages))
    of_each = [languages, ("zh",)] if {"en", "zh"} <= set(languages) else [languages]
    return [[text for text in calibration_texts(each) if text not in judging] for each in of_each]
