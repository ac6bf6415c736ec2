"""Measure what an accuracy gate asks for: one metric of a variant, and of what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeclip.bundle import Bundle
from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.comparison import Settings, compare_retrieval, compare_zero_shot
from edgeclip.evaluate.offered import Offered, offer
from edgeclip.evaluate.picture_sets import PictureSet, open_set
from edgeclip.evaluate.results import Row
from edgeclip.evaluate.subjects import Subject, open_bundle
from edgeclip.label_sets import LabelSet, Templates, read_labels
from edgeclip.runtime.host import usable_cores
from edgeclip.runtime.session import RuntimeOptions

from .gates import Accuracy
from .pipeline_inputs import templates_of
from .pipeline_recipe import AccuracyGate

__all__ = ["measure_accuracy"]


def measure_accuracy(
    bundle: Bundle,
    gate: AccuracyGate,
    *,
    root: Path,
    options: RuntimeOptions,
    eager: Callable[[], Subject],
    on_progress: Callable[[str], None] = lambda said: None,
) -> Accuracy:
    """Return what a gate asks for.

    Args:
        bundle: an open bundle.
        gate: which metric of which variant, on what.
        root: folder that the gate's paths are relative to.
        options: where variants run.
        eager: opens the float32 model; its owner closes it.
        on_progress: told how far it is.

    Raises:
        BackendError: a variant cannot run here.
        BundleError: there is no such variant.
        InputError: the data cannot be used.
        ConfigError: the metric is none of the data's.
    """
    pictures = open_set(root / gate.data)
    settings = Settings(
        limit=gate.limit,
        workers=options.threads or usable_cores(),
        progress=lambda what, done, total: on_progress(f"{gate.name}: {what}: {done:,} of {total:,}"),
    )
    compared = gate.max_drop is not None
    names = [gate.variant] + ([gate.against] if compared and gate.against != "eager" else [])
    subjects: list[Subject] = []
    own, _ = open_bundle(str(bundle.path), variants=names, options=options)
    try:
        subjects += own
        if compared and gate.against == "eager":
            subjects.append(eager())
        if "_to_" in gate.metric:
            comparison = compare_retrieval(subjects, pictures, settings=settings)
        else:
            offered = _offered(gate, pictures, root)
            comparison = compare_zero_shot(subjects, pictures, offered, settings=settings)
    finally:
        for subject in own:
            subject.close()
    values = [_metric(row, gate.metric) for row in comparison.rows]
    return Accuracy(values[0], comparison.data.measured, values[1] if compared else None)


def _metric(row: Row, metric: str) -> float:
    """Return one number of a row: the mean over languages, or over kinds of captions."""
    if "_to_" in metric:
        way, _, k = metric.rpartition("_r")
        found = [getattr(report, way)[int(k)].value for report in row.retrieval.values()]
    else:
        found = [
            getattr(value, "value", value)
            for value in (getattr(report, metric) for report in row.reports.values())
        ]
    return float(sum(found) / len(found))


def _offered(gate: AccuracyGate, pictures: PictureSet, root: Path) -> Offered:
    if gate.labels is None:
        labels = pictures.labels or LabelSet.of(_labels_found(pictures))
    elif isinstance(gate.labels, str):
        labels = read_labels(str(root / gate.labels))
    else:
        labels = LabelSet.of(gate.labels)
    known = pictures.labels if pictures.numbered else None
    if known is not None and len(labels) != len(known):
        raise ConfigError(
            f"gate {gate.name!r}: 'labels' has {len(labels):,}, expected {len(known):,} in the order of "
            f"{pictures.path!r}, whose pictures have numbers for labels."
        )
    prompts: list[tuple[str | None, Templates]] = []
    if gate.templates is not None:
        prompts = [(None, templates_of(gate.templates, root))]
    elif pictures.templates is not None:
        prompts = [(None, pictures.templates)]
    languages = [] if gate.language is None else [gate.language]
    return offer([(None, labels)], languages=languages, templates=prompts, numbered=pictures.numbered)


def _labels_found(pictures: PictureSet) -> list[str]:
    found = {picture.label for picture in pictures if picture.label is not None}
    if not found:
        raise InputError(
            f"{pictures.path!r}: no picture has a label; expected a folder a class, a column 'label' or .cls "
            "files."
        )
    return sorted(found)
