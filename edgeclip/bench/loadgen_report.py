"""The document of `edgeclip bench loadgen`: MLPerf's LoadGen and our own loops on one classifier.

``docs/loadgen-check.schema.json`` is :func:`loadgen_schema`. It is a check of our clock, and never an MLPerf
result: those need LoadGen's own length, an accuracy run beside it, and MLPerf's rules for the whole system.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from edgeclip.bench.report import LabelsEntry, PicturesEntry
from edgeclip.runtime.documents import Document
from edgeclip.runtime.host import UNAVAILABLE
from edgeclip.runtime.latency_report import Ms, Share, Unavailable
from edgeclip.tables import aligned

__all__ = [
    "MLPERF_S",
    "Given",
    "LoadGenCheck",
    "LoadGenTurn",
    "OwnTurn",
    "RatioOfTurns",
    "Scenario",
    "ScenarioEntry",
    "loadgen_schema",
]

SCHEMA_ID: Final = "urn:edgeclip:loadgen-check:1"
MLPERF_S: Final = 600.0
"""MLPerf's shortest run in SingleStream and Offline."""

Scenario = Literal["SingleStream", "Offline"]
Given = Literal["decoded", "file"]
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
_FIGURES: Final = {"SingleStream": "p90 ms", "Offline": "images/s"}


class OwnTurn(Struct, frozen=True, kw_only=True):
    """What our own loop measured in one turn; percentile and mean are of calls, in SingleStream alone."""

    n: Count
    duration_s: Positive
    images_per_s: Positive
    p90_ms: Ms | None = None
    mean_ms: Ms | None = None

    def figure(self) -> float:
        """Return what the scenario is about: the 90th percentile, or pictures a second."""
        return self.images_per_s if self.p90_ms is None else self.p90_ms


class LoadGenTurn(OwnTurn, frozen=True, kw_only=True):
    """What LoadGen's log says of one turn.

    ``valid`` holds for the shortest time and the fewest queries that were asked for here, not for MLPerf's.
    """

    valid: bool
    min_duration_met: bool
    min_queries_met: bool
    early_stopping_met: bool
    invalid_reason: str = ""


class RatioOfTurns(Struct, frozen=True, kw_only=True):
    """LoadGen's figure over ours: median over rounds, with the interval of the median (95 %, or null)."""

    value: Positive
    low: Positive | None = None
    high: Positive | None = None


class ScenarioEntry(Struct, frozen=True, kw_only=True):
    """One scenario on one kind of input: a turn of LoadGen and one of ours each round."""

    scenario: Scenario
    given: Given
    min_duration_s: Positive
    min_query_count: Count
    loadgen: tuple[LoadGenTurn, ...]
    ours: tuple[OwnTurn, ...]
    ratio: RatioOfTurns


class LoadGenCheck(Document, frozen=True, kw_only=True):
    """Everything one check measured. Made by :func:`edgeclip.bench.loadgen.check`."""

    schema: Literal[1] = 1
    kind: Literal["loadgen-check"] = "loadgen-check"
    is_mlperf_result: Literal[False] = False
    subject: Annotated[str, Meta(min_length=1)]
    created: str
    command: str
    loadgen_version: str
    bundle: dict[str, str]
    variant: str
    placement: dict[str, Any]
    batch: Count
    pictures: PicturesEntry
    labels: LabelsEntry
    scenarios: Annotated[tuple[ScenarioEntry, ...], Meta(min_length=1)]
    seed: int = 0
    steal_share: Share | Unavailable = UNAVAILABLE
    host: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_table(self) -> str:
        """Return the check as text for a terminal."""
        where = self.placement
        first = self.scenarios[0]
        heading = ("given", "scenario", "", "LoadGen", "ours", "LoadGen / ours", "n", "valid")
        rows: list[tuple[str, ...]] = [heading]
        for entry in self.scenarios:
            theirs, ours = (
                _median([turn.figure() for turn in turns]) for turns in (entry.loadgen, entry.ours)
            )
            valid = sum(turn.valid for turn in entry.loadgen)
            rows.append(
                (
                    entry.given,
                    entry.scenario,
                    _FIGURES[entry.scenario],
                    f"{theirs:.3f}",
                    f"{ours:.3f}",
                    _ratio(entry.ratio),
                    f"{sum(turn.n for turn in entry.loadgen):,}",
                    f"{valid} of {len(entry.loadgen)}",
                )
            )
        reasons = {
            turn.invalid_reason.strip(): None
            for entry in self.scenarios
            for turn in entry.loadgen
            if not turn.valid
        }
        subject = (
            f"{self.subject}, {self.variant}: {where.get('backend')} on {where.get('device')}, "
            f"{where.get('threads')} thread(s), {self.pictures.n} {self.pictures.source}, "
            f"{self.labels.n:,} labels"
        )
        turns = (
            f"LoadGen {self.loadgen_version}, rounds: {len(first.loadgen)}; a turn takes at least "
            f"{first.min_duration_s:g} s and {first.min_query_count:,} pictures, and is valid by that"
        )
        why = [f"LoadGen says of what is not valid: {reason or 'nothing'}" for reason in reasons]
        no_result = (
            f"not an MLPerf result: that takes {MLPERF_S:g} s in one run, an accuracy run, and MLPerf's "
            "rules for the whole system"
        )
        return "\n".join([subject, *aligned(rows, range(3, 7)), turns, *why, no_result])


def loadgen_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a check."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(LoadGenCheck)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "edgeclip LoadGen check, schema 1",
        **schema,
    }


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _ratio(ratio: RatioOfTurns) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f}"
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
