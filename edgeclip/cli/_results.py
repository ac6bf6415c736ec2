"""How ``edgeclip classify`` writes results: for people, as JSON Lines, one JSON document, or CSV."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import click

from edgeclip.tables import aligned

from ._options import SCHEMA

if TYPE_CHECKING:
    from edgeclip.answers import Answer, Prediction, Rejection
    from edgeclip.classify import Outcome, ZeroShotClassifier
    from edgeclip.runtime.latency import StageClock

__all__ = [
    "SHARES",
    "Summary",
    "Writer",
    "answer_object",
    "kept_of",
    "open_writer",
    "timing_table",
    "why_none",
]

SHARES = ("softmax", "linear")
"""Kinds of scores that sum to 1 over labels."""


class Summary:
    """Counts and times of one run."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.pictures = 0
        self.failed = 0

    @property
    def wall_ms(self) -> float:
        """Since the first picture was asked for."""
        return (time.perf_counter() - self._began) * 1e3


class Writer(Protocol):
    """Writes outcomes as they come, and what ends them."""

    def picture(self, key: str, outcome: Outcome, kept: tuple[Prediction, ...]) -> None:
        """Write one picture; ``kept`` are the predictions above the least confidence."""
        ...

    def end(self, summary: Summary) -> None:
        """Write what follows the last picture."""
        ...


class Lines:
    """For people: a line a picture and its labels below, or all in one line for a single label."""

    def __init__(self, stream: TextIO, classifier: ZeroShotClassifier, clock: StageClock | None) -> None:
        self._stream = stream
        self._clock = clock
        self._score = "{:6.1%}" if classifier.score_kind in SHARES else "{:7.2f}"

    def picture(self, key: str, outcome: Outcome, kept: tuple[Prediction, ...]) -> None:
        """Write one picture."""
        if outcome.error is not None:
            return  # said on stderr
        name = click.style(key, bold=True)
        if not kept:
            self._write(f"{name}\n  ({why_none(outcome)})")
        else:
            rows = [
                f"  {self._score.format(each.score)}  {_label(each, first=not i)}"
                for i, each in enumerate(kept)
            ]
            self._write("\n".join([name, *rows]))

    def end(self, summary: Summary) -> None:
        """Write where the time went, if that was asked for."""
        if self._clock is not None:
            self._write("\n" + timing_table(self._clock, summary))

    def _write(self, text: str) -> None:
        click.echo(text, file=self._stream)


def kept_of(answer: Answer | Outcome, min_confidence: float) -> tuple[Prediction, ...]:
    """Return the predictions that score enough; all where that is not asked, as gates score below 0, too."""
    if not min_confidence:
        return answer.predictions
    return tuple(each for each in answer.predictions if each.score >= min_confidence)


def why_none(answer: Answer | Outcome) -> str:
    """Return why none of the labels is shown."""
    asked = answer.rejection
    if asked is None or answer.predictions:
        return "no label scored high enough"
    return f"none of the labels: score {asked.score:.2f}, needed {asked.threshold:.2f}"


def _label(prediction: Prediction, *, first: bool) -> str:
    return click.style(prediction.label, fg="green") if first else prediction.label


class JsonLines:
    """One JSON object a picture."""

    def __init__(self, stream: TextIO, classifier: ZeroShotClassifier) -> None:
        self._stream = stream
        self._score_kind = classifier.score_kind

    def picture(self, key: str, outcome: Outcome, kept: tuple[Prediction, ...]) -> None:
        """Write one object."""
        document = {"schema": SCHEMA, "score_kind": self._score_kind, **picture_object(key, outcome, kept)}
        self._stream.write(json.dumps(document, ensure_ascii=False) + "\n")
        self._stream.flush()

    def end(self, summary: Summary) -> None:
        """Nothing follows."""


class JsonDocument:
    """One JSON document, written at the end."""

    def __init__(self, stream: TextIO, classifier: ZeroShotClassifier, clock: StageClock | None) -> None:
        self._stream = stream
        self._classifier = classifier
        self._clock = clock
        self._results: list[dict[str, Any]] = []

    def picture(self, key: str, outcome: Outcome, kept: tuple[Prediction, ...]) -> None:
        """Keep one object."""
        self._results.append(picture_object(key, outcome, kept))

    def end(self, summary: Summary) -> None:
        """Write the document."""
        classifier, placement = self._classifier, self._classifier.placement
        document = {
            "schema": SCHEMA,
            "score_kind": classifier.score_kind,
            "model": classifier.bundle.manifest.model.name,
            "embedding_space": classifier.bundle.manifest.model.embedding_space,
            "variant": classifier.choice.variant.name,
            "backend": placement.backend,
            "device": placement.device,
            "threads": placement.threads,
            "labels": len(classifier.labels),
            "results": self._results,
            "pictures": summary.pictures,
            "failed": summary.failed,
            "wall_ms": round(summary.wall_ms, 3),
        }
        if self._clock is not None:
            document["stages"] = stage_objects(self._clock)
        self._stream.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
        self._stream.flush()


class Csv:
    """CSV with a header; one row a label, or a row with an error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._csv = csv.writer(stream, lineterminator="\n")
        self._csv.writerow(["path", "rank", "label", "score", "similarity", "error"])

    def picture(self, key: str, outcome: Outcome, kept: tuple[Prediction, ...]) -> None:
        """Write the rows of one picture."""
        if outcome.error is not None:
            self._csv.writerow([key, "", "", "", "", _one_line(outcome.error)])
        for number, each in enumerate(kept, start=1):
            row = [key, number, each.label, f"{each.score:.6g}", f"{each.similarity:.6g}", ""]
            self._csv.writerow(row)
        self._stream.flush()

    def end(self, summary: Summary) -> None:
        """Nothing follows."""


def open_writer(
    form: str | None, stream: TextIO, classifier: ZeroShotClassifier, clock: StageClock | None
) -> Writer:
    """Return the writer of a form: ``json``, ``jsonl``, ``csv``, or ``None`` for people."""
    if form == "jsonl":
        return JsonLines(stream, classifier)
    if form == "csv":
        return Csv(stream)
    return JsonDocument(stream, classifier, clock) if form == "json" else Lines(stream, classifier, clock)


def answer_object(kept: Sequence[Prediction], rejection: Rejection | None) -> dict[str, Any]:
    """Return what a JSON object says of labels and of rejection, where that was asked."""
    document: dict[str, Any] = {
        "predictions": [
            {"label": each.label, "score": _rounded(each.score), "similarity": _rounded(each.similarity)}
            for each in kept
        ],
    }
    if rejection is not None:
        document["rejected"] = rejection.rejected
        document["rejection"] = {
            "score": _rounded(rejection.score),
            "threshold": _rounded(rejection.threshold),
        }
    return document


def picture_object(key: str, outcome: Outcome, kept: tuple[Prediction, ...]) -> dict[str, Any]:
    """Return the JSON object of one picture."""
    if outcome.error is not None:
        return {"path": key, "error": _one_line(outcome.error)}
    document = {"path": key, **answer_object(kept, outcome.rejection)}
    if outcome.timing_ms is not None:
        document["timing_ms"] = {
            **{stage: round(ms, 4) for stage, ms in outcome.timing_ms.items()},
            "batch": outcome.batch,
        }
    return document


def stage_objects(clock: StageClock) -> dict[str, Mapping[str, float]]:
    """Return the stages of a clock as JSON objects."""
    return {
        name: {
            "ms": round(stage.ms, 4),
            "wall_ms": round(stage.wall_ms, 4),
            "runs": stage.runs,
            "items": stage.items,
            "batch": stage.batch,
        }
        for name, stage in clock.totals().items()
    }


def timing_table(clock: StageClock, summary: Summary) -> str:
    """Return the stages as an aligned table; cold-start phases first, the wall clock last."""
    rows = [("stage", "ms each", "ms in all", "runs", "batch")]
    for name, stage in clock.totals().items():
        rows.append((name, f"{stage.ms:.2f}", f"{stage.wall_ms:.1f}", str(stage.runs), str(stage.batch)))
    lines = aligned(rows, range(1, 5))
    done = summary.pictures - summary.failed
    each = f", {summary.wall_ms / done:.2f} ms a picture" if done else ""
    lines.append(
        f"wall: {summary.wall_ms:.1f} ms for {_count(summary.pictures, 'picture')}{each} (stages overlap)"
    )
    return "\n".join(lines)


def _rounded(value: float) -> float:
    """Return a value to the six digits that float32 carries."""
    return float(f"{value:.6g}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
