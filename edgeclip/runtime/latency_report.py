"""The latency report: what was measured, where, with what, raw samples included.

``docs/latency-report.schema.json`` is :func:`latency_schema`. Reports are read by the pipeline's gates, so
they are self-contained: percentiles can be computed again from the samples, hosts and versions be compared.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct, field

from edgeclip.errors import InputError
from edgeclip.runtime.documents import Document
from edgeclip.runtime.host import UNAVAILABLE, Host, peak_rss_bytes, versions
from edgeclip.runtime.latency import COLD_START_PHASES, STAGES, LatencySamples, RatioInterval
from edgeclip.runtime.session import Placement
from edgeclip.tables import aligned

__all__ = [
    "DriftEntry",
    "LatencyReport",
    "PercentileEntry",
    "RatioEntry",
    "StageEntry",
    "latency_schema",
    "stage_entry",
]

SCHEMA_ID = "urn:edgeclip:latency-report:1"
Ms = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Unavailable = Literal["unavailable"]


class PercentileEntry(Struct, frozen=True, kw_only=True):
    """A percentile by nearest rank, with a distribution-free interval of the stated confidence."""

    p: Annotated[float, Meta(gt=0, lt=100)]
    ms: Ms
    low_ms: Ms
    high_ms: Ms
    confidence: Annotated[float, Meta(gt=0, lt=1)]


class DriftEntry(Struct, frozen=True, kw_only=True):
    """Median of the last third of the samples over that of the first third, with its 95 % interval."""

    ratio: Ms
    low: Ms
    high: Ms


class StageEntry(Struct, frozen=True, kw_only=True):
    """One stage: ``samples_ms`` are wall times of calls, in order; a call handles ``batch`` items.

    ``wall_ms`` is their median and ``ms`` that divided by the batch. Percentiles are of calls, and only those
    with at least ten samples above them are given.
    """

    ms: Ms
    wall_ms: Ms
    batch: Annotated[int, Meta(ge=1)]
    n: Annotated[int, Meta(ge=1)]
    warmup: Count
    samples_ms: Annotated[tuple[Ms, ...], Meta(min_length=1)]
    first_ms: Ms | None = None
    percentiles: tuple[PercentileEntry, ...] = ()
    drift: DriftEntry | None = None


class RatioEntry(Struct, frozen=True, kw_only=True):
    """Time of ``a`` over time of ``b``, measured in turns; ``n`` is the number of blocks of four calls."""

    a: str
    b: str
    ratio: Annotated[float, Meta(gt=0)]
    low: Annotated[float, Meta(gt=0)]
    high: Annotated[float, Meta(gt=0)]
    n: Annotated[int, Meta(ge=1)]
    confidence: Annotated[float, Meta(gt=0, lt=1)]
    seed: int
    a_samples_ms: tuple[Ms, ...] = ()
    b_samples_ms: tuple[Ms, ...] = ()


class LatencyReport(Document, frozen=True, kw_only=True):
    """Everything about one measurement. Made by :meth:`of`.

    ``stages`` are keyed by stage (``decode``, ``resize``, ``tokenize``, ``text_tower``, ``image_tower``,
    ``head``, or a name of the caller's), ``cold_start_ms`` by phase (``import``, ``open``, ``compile``,
    ``first_run``). What a host does not tell is the word ``unavailable``.
    """

    schema: Literal[1] = 1
    kind: Literal["latency-report"] = "latency-report"
    subject: Annotated[str, Meta(min_length=1)]
    created: str
    stages: dict[str, StageEntry]
    cold_start_ms: dict[Literal["import", "open", "compile", "first_run"], Ms] = field(default_factory=dict)
    ratios: tuple[RatioEntry, ...] = ()
    bundle: dict[str, str] = field(default_factory=dict)
    placement: dict[str, Any] = field(default_factory=dict)
    peak_rss_bytes: Annotated[int, Meta(ge=0)] | Unavailable = UNAVAILABLE
    steal_share: Share | Unavailable = UNAVAILABLE
    host: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        subject: str,
        stages: Mapping[str, LatencySamples],
        *,
        cold_start_ms: Mapping[str, float] | None = None,
        ratios: Mapping[tuple[str, str], RatioInterval] | None = None,
        placement: Placement | None = None,
        bundle: Mapping[str, str] | None = None,
    ) -> LatencyReport:
        """Make a report of measurements taken in this process, on this machine, just now.

        Args:
            subject: what was measured, for people.
            stages: samples by stage.
            cold_start_ms: milliseconds by phase.
            ratios: comparisons, keyed by the names of a and b.
            placement: where the towers ran.
            bundle: what identifies the bundle, such as name, digest and variant.

        Raises:
            InputError: a stage has no samples, or a phase is unknown.
        """
        for name, samples in stages.items():
            if not len(samples):
                raise InputError(f"stage {name!r} has no samples, expected at least one.")
        unknown = sorted(set(cold_start_ms or {}) - set(COLD_START_PHASES))
        if unknown:
            raise InputError(
                f"cold start: got the phase {unknown[0]!r}, expected one of {COLD_START_PHASES}."
            )
        shares = [samples.steal_share for samples in stages.values() if samples.steal_share is not None]
        rss = peak_rss_bytes()
        return cls(
            subject=subject,
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            stages={name: _stage(samples) for name, samples in stages.items()},
            cold_start_ms={name: float(ms) for name, ms in (cold_start_ms or {}).items()},  # type: ignore[misc]
            ratios=tuple(_ratio(names, interval) for names, interval in (ratios or {}).items()),
            bundle=dict(bundle or {}),
            placement={} if placement is None else asdict(placement),
            peak_rss_bytes=UNAVAILABLE if rss is None else rss,
            steal_share=min(1.0, max(0.0, max(shares))) if shares else UNAVAILABLE,
            host=Host.here().to_dict(),
            versions=versions(),
        )

    def samples(self, stage: str) -> LatencySamples:
        """Return the raw samples of a stage, ready for other statistics."""
        entry = self.stages[stage]
        return LatencySamples(
            samples_ms=np.array(entry.samples_ms, np.float64),
            warmup=entry.warmup,
            first_ms=entry.first_ms,
            batch=entry.batch,
        )

    def to_table(self) -> str:
        """Return the report as a text table, stages in the order of a call."""
        lines = [self.subject]
        where = self.placement
        if where:
            lines.append(f"{where['backend']} on {where['device']}, {where['threads']} thread(s)")
        order = {name: place for place, name in enumerate(STAGES)}
        names = sorted(self.stages, key=lambda name: order.get(name, len(order)))
        heading = ("stage", "ms/item", "p50", "p90", "p99", "batch", "n", "drift")
        rows = [heading, *(_row(name, self.stages[name]) for name in names)]
        lines += aligned(rows, range(1, len(heading)))
        lines += [f"cold start: {name} {ms:.1f} ms" for name, ms in self.cold_start_ms.items()]
        lines += [
            f"{entry.a} / {entry.b}: {entry.ratio:.3f} ({entry.low:.3f} to {entry.high:.3f}, n = {entry.n})"
            for entry in self.ratios
        ]
        if isinstance(self.steal_share, float) and self.steal_share > 0.01:
            lines.append(f"the hypervisor gave {self.steal_share:.0%} of the time to others: measure again")
        return "\n".join(lines)


def latency_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a report."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(LatencyReport)))
    phases = schema["$defs"]["LatencyReport"]["properties"]["cold_start_ms"]
    phases["propertyNames"] = {"enum": list(COLD_START_PHASES)}  # msgspec checks it and does not say it
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "edgeclip latency report, schema 1",
        **schema,
    }


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


def _stage(samples: LatencySamples) -> StageEntry:
    drift = samples.drift()
    return stage_entry(samples, drift=None if drift is None else DriftEntry(**asdict(drift)))


def _ratio(names: tuple[str, str], interval: RatioInterval) -> RatioEntry:
    return RatioEntry(
        a=names[0],
        b=names[1],
        ratio=interval.ratio,
        low=interval.low,
        high=interval.high,
        n=interval.n,
        confidence=interval.confidence,
        seed=interval.seed,
        a_samples_ms=tuple(interval.a.samples_ms.tolist()),
        b_samples_ms=tuple(interval.b.samples_ms.tolist()),
    )


def _row(name: str, entry: StageEntry) -> tuple[str, ...]:
    found = {percentile.p: percentile.ms for percentile in entry.percentiles}
    shown = [f"{found[p]:.2f}" if p in found else "-" for p in (50.0, 90.0, 99.0)]
    drift = "-" if entry.drift is None else f"{entry.drift.ratio - 1:+.1%}"
    return name, f"{entry.ms:.2f}", *shown, str(entry.batch), str(entry.n), drift
