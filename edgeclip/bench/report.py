"""The bench report: everything one run of `edgeclip bench` measured, raw samples included.

``docs/bench-report.schema.json`` is :func:`bench_schema`. What figures mean stands in ``docs/bench.md``. The
report is self-contained: tables, pages and gates are made of it and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from edgeclip.runtime.documents import Document
from edgeclip.runtime.host import UNAVAILABLE
from edgeclip.runtime.latency import LatencySamples
from edgeclip.runtime.latency_report import (
    Count,
    DriftEntry,
    PercentileEntry,
    Share,
    StageEntry,
    Unavailable,
)

__all__ = [
    "COLD_PHASES",
    "END_TO_END",
    "FIRST_LABEL",
    "MAX_DRIFT",
    "MAX_STEAL_SHARE",
    "ArithmeticEntry",
    "BenchReport",
    "BenchRun",
    "InterferenceEntry",
    "LabelsEntry",
    "MemoryEntry",
    "MemorySample",
    "PeaksEntry",
    "PicturesEntry",
    "RateEntry",
    "bench_schema",
    "stage_entry",
]

SCHEMA_ID: Final = "urn:edgeclip:bench-report:1"
END_TO_END: Final = "end_to_end"
FIRST_LABEL: Final = "first_label"
COLD_PHASES: Final = (
    "interpreter",
    "import",
    "open",
    "compile",
    "labels",
    "decode",
    "first_run",
    FIRST_LABEL,
)
"""Parts of a cold start in their order, and last the whole: from the start of the process to a label."""
MAX_STEAL_SHARE: Final = 0.01
MAX_DRIFT: Final = 0.05

Positive = Annotated[float, Meta(gt=0)]
_PS: Final = (50.0, 90.0, 99.0)


class PicturesEntry(Struct, frozen=True, kw_only=True):
    """The pictures, in the order in which they are classified over and over.

    ``megapixels`` has one number a picture. ``digest`` is the SHA-256 of their SHA-256s.
    """

    source: str
    n: Annotated[int, Meta(ge=1)]
    megapixels: tuple[Positive, ...]
    size_bytes: Count
    digest: str


class LabelsEntry(Struct, frozen=True, kw_only=True):
    """The labels that are offered; ``source`` is ``bundle``, ``--labels`` or the name of a file."""

    n: Annotated[int, Meta(ge=1)]
    source: str
    templates: str


class RateEntry(Struct, frozen=True, kw_only=True):
    """Pictures a second: batch over the median of calls, with the interval of that median.

    The interval is null where the samples do not carry one.
    """

    value: Positive
    low: Positive | None = None
    high: Positive | None = None


class MemorySample(Struct, frozen=True, kw_only=True):
    """The most memory one fresh process held until its first label."""

    rss_bytes: Count | Unavailable
    pss_bytes: Count | Unavailable


class MemoryEntry(Struct, frozen=True, kw_only=True):
    """Medians over fresh processes. PSS is the largest of readings a few milliseconds apart."""

    peak_rss_bytes: Count | Unavailable
    peak_pss_bytes: Count | Unavailable
    samples: tuple[MemorySample, ...] = ()


class ArithmeticEntry(Struct, frozen=True, kw_only=True):
    """What the image tower calculates a second, against what this machine can.

    ``operations`` are those of one picture, multiplications and additions, in matrix products and
    convolutions; ``int8_operations`` those among them that are between Q/DQ. ``peak_per_s`` is what the best
    matrix product of one thread gives, times the threads, the two kinds mixed as in the tower.
    """

    operations: Count
    int8_operations: Count
    achieved_per_s: Positive
    peak_per_s: Positive | None = None
    share: Positive | None = None
    why: str = ""


class InterferenceEntry(Struct, frozen=True, kw_only=True):
    """Signs that others used the machine, or that it slowed down, while this target was measured."""

    steal_share: Share | Unavailable = UNAVAILABLE
    drift: DriftEntry | None = None


class BenchRun(Struct, frozen=True, kw_only=True):
    """One target.

    ``stages`` are decode, resize, tokenize, text_tower, image_tower, head and ``end_to_end``, a whole call
    from files to labels; a batched call's decoders run side by side, so that stages may sum to more than it.
    ``text`` is the way from labels to their embeddings, ``batch`` labels at once. Where a figure is missing,
    ``missing`` has the reason under its name.
    """

    name: Annotated[str, Meta(min_length=1)]
    variant: str
    placement: dict[str, Any]
    threads: Annotated[int, Meta(ge=1)]
    batch: Annotated[int, Meta(ge=1)]
    stages: dict[str, StageEntry]
    images_per_s: RateEntry
    fast_decode: bool = False
    cold_start: dict[Literal["hit", "miss"], dict[str, StageEntry]] = field(default_factory=dict)
    memory: MemoryEntry | None = None
    text: dict[Literal["uncached", "cached"], StageEntry] = field(default_factory=dict)
    arithmetic: ArithmeticEntry | None = None
    interference: InterferenceEntry = field(default_factory=InterferenceEntry)
    size_bytes: Count = 0
    accuracy: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return why this run should not be trusted, in words; empty where nothing speaks against it."""
        found = []
        steal, drift = self.interference.steal_share, self.interference.drift
        if isinstance(steal, float) and steal > MAX_STEAL_SHARE:
            found.append(f"the hypervisor gave {steal:.1%} of the time to others")
        if drift is not None and abs(drift.ratio - 1) > MAX_DRIFT and not drift.low <= 1 <= drift.high:
            end = "slower" if drift.ratio > 1 else "faster"
            found.append(f"its last third ran {abs(drift.ratio - 1):.1%} {end} than its first")
        return found


class PeaksEntry(Struct, frozen=True, kw_only=True):
    """Best matrix product ``n × n × n`` of one thread in this run, by n; 10⁹ operations a second."""

    float_gflops: dict[str, Positive] = field(default_factory=dict)
    int8_gops: dict[str, Positive] = field(default_factory=dict)


class BenchReport(Document, frozen=True, kw_only=True):
    """Everything one run measured. Made by :func:`edgeclip.bench.run.benchmark`."""

    schema: Literal[1] = 1
    kind: Literal["bench-report"] = "bench-report"
    subject: Annotated[str, Meta(min_length=1)]
    created: str
    command: str
    bundle: dict[str, str]
    pictures: PicturesEntry
    labels: LabelsEntry
    runs: Annotated[tuple[BenchRun, ...], Meta(min_length=1)]
    peaks: PeaksEntry | None = None
    seed: int = 0
    duration_s: Annotated[float, Meta(ge=0)] = 0.0
    steal_share: Share | Unavailable = UNAVAILABLE
    host: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_table(self) -> str:
        """Return the report as text for a terminal."""
        return "\n".join([self.subject, *(run.name for run in self.runs)])


def stage_entry(samples: LatencySamples, *, drift: DriftEntry | None = None) -> StageEntry:
    """Return samples as a stage of a report.

    Args:
        samples: at least one.
        drift: found elsewhere; pictures that differ would look like a drift of few samples.
    """
    return StageEntry(
        ms=samples.median_ms / samples.batch,
        wall_ms=samples.median_ms,
        batch=samples.batch,
        n=len(samples),
        warmup=samples.warmup,
        samples_ms=tuple(samples.samples_ms.tolist()),
        first_ms=samples.first_ms,
        percentiles=tuple(PercentileEntry(**asdict(found)) for found in samples.percentiles()),
        drift=drift,
    )


def bench_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a report."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(BenchReport)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "edgeclip bench report, schema 1",
        **schema,
    }
