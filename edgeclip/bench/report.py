"""The bench report: everything one run of `edgeclip bench` measured, raw samples included.

``docs/bench-report.schema.json`` is :func:`bench_schema`. What figures mean stands in ``docs/bench.md``. The
report is self-contained: tables, pages and gates are made of it and nothing else.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from edgeclip.runtime.documents import Document
from edgeclip.runtime.host import UNAVAILABLE
from edgeclip.runtime.latency import STAGES
from edgeclip.runtime.latency_report import (
    Count,
    DriftEntry,
    Share,
    StageEntry,
    Unavailable,
    stage_entry,
)
from edgeclip.tables import aligned

__all__ = [
    "COLD_PHASES",
    "END_TO_END",
    "FIRST_LABEL",
    "MAX_DRIFT",
    "MAX_OTHERS_SHARE",
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
MAX_OTHERS_SHARE: Final = 0.1
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
    """Signs that others used the machine, or that it slowed down, while this target was measured.

    ``steal_share`` of the machine's time went to other guests of its host, ``others_share`` to other
    programs.
    """

    steal_share: Share | Unavailable = UNAVAILABLE
    others_share: Share | Unavailable = UNAVAILABLE
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
        others = self.interference.others_share
        if isinstance(others, float) and others > MAX_OTHERS_SHARE:
            found.append(f"other programs used {others:.0%} of the machine")
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
        """Return the report as text for a terminal: a section a target, and all of them side by side."""
        megapixels = self.pictures.megapixels
        sizes = f"{min(megapixels):.1f} to {max(megapixels):.1f} megapixels"
        host = self.host
        lines = [
            f"{self.subject}: {self.pictures.n} {self.pictures.source}, {sizes}; {self.labels.n:,} labels",
            f"{host.get('cpu_model', UNAVAILABLE)}, {host.get('cores', '?')} usable cores",
        ]
        for run in self.runs:
            lines += ["", *_section(run)]
        if len(self.runs) > 1:
            lines += ["", *_summary(self.runs)]
        if self.peaks is not None:
            lines += ["", *_peaks(self.peaks)]
        if isinstance(self.steal_share, float) and self.steal_share > MAX_STEAL_SHARE:
            lines += [
                "",
                f"warning: the hypervisor gave {self.steal_share:.1%} of the run to others: measure again",
            ]
        return "\n".join(lines)


# --- the table --------------------------------------------------------------------------------------------


def _section(run: BenchRun) -> list[str]:
    where = run.placement
    decoding = "reduced-scale decoding" if run.fast_decode else "exact decoding"
    placed = f"{where.get('backend')} on {where.get('device')}, {run.threads} thread(s), batch {run.batch}"
    lines = [f"{run.name}: {placed}, {where.get('precision')}, {decoding}"]
    heading = ("ms a call", "ms each", *(f"p{p:.0f}" for p in _PS), "batch", "n", "drift")
    rows = [heading, *(_row(name, run.stages[name]) for name in _ordered(run.stages))]
    lines += aligned(rows, range(1, len(heading)))
    rate = run.images_per_s
    between = "" if rate.low is None or rate.high is None else f" ({rate.low:.1f} to {rate.high:.1f})"
    lines.append(f"images/s: {rate.value:.1f}{between}")
    if run.cold_start:
        phases = [phase for phase in COLD_PHASES if any(phase in each for each in run.cold_start.values())]
        cold = [("cold start, ms", *phases, "n")]
        for kind, found in run.cold_start.items():
            cells = [f"{found[phase].wall_ms:.0f}" if phase in found else "-" for phase in phases]
            cold.append((f"cache {kind}", *cells, str(max(each.n for each in found.values()))))
        lines += aligned(cold, range(1, len(cold[0])))
    if run.memory is not None:
        rss, pss = _megabytes(run.memory.peak_rss_bytes), _megabytes(run.memory.peak_pss_bytes)
        lines.append(f"memory of a fresh process: RSS {rss}, PSS {pss} at most")
    if run.text:
        said = [
            f"{way} {entry.wall_ms:.2f} ms ({entry.ms:.3f} each, n = {entry.n})"
            for way, entry in run.text.items()
        ]
        lines.append(f"{next(iter(run.text.values())).batch} labels: {', '.join(said)}")
    if run.arithmetic is not None:
        lines.append(_arithmetic(run.arithmetic))
    seen = run.interference
    shares = [
        f"{name} {share if isinstance(share, str) else f'{share:.1%}'}"
        for name, share in (("steal", seen.steal_share), ("other programs", seen.others_share))
    ]
    lines.append(f"interference: {', '.join(shares)}, drift {_drift(seen.drift)}")
    lines += [f"no {name}: {why}" for name, why in run.missing.items()]
    lines += [f"warning: {warning}: do not trust these figures, measure again" for warning in run.warnings()]
    return lines


def _drift(drift: DriftEntry | None) -> str:
    if drift is None:
        return "unknown"
    return f"{drift.ratio - 1:+.1%} ({drift.low - 1:+.1%} to {drift.high - 1:+.1%})"


def _ordered(stages: dict[str, StageEntry]) -> list[str]:
    order = {name: place for place, name in enumerate((*STAGES, END_TO_END))}
    return sorted(stages, key=lambda name: order.get(name, len(order)))


def _row(name: str, entry: StageEntry) -> tuple[str, ...]:
    found = {each.p: each for each in entry.percentiles}
    shown = [
        f"{found[p].ms:.2f} ({found[p].low_ms:.2f} to {found[p].high_ms:.2f})" if p in found else "-"
        for p in _PS
    ]
    drift = "-" if entry.drift is None else f"{entry.drift.ratio - 1:+.1%}"
    return name, f"{entry.ms:.2f}", *shown, str(entry.batch), f"{entry.n:,}", drift


def _arithmetic(entry: ArithmeticEntry) -> str:
    share = entry.int8_operations / entry.operations if entry.operations else 0.0
    lead = (
        f"image tower: {entry.operations / 1e6:,.1f} million operations a picture ({share:.0%} int8), "
        f"{entry.achieved_per_s / 1e9:.1f} GOP/s"
    )
    if entry.peak_per_s is None or entry.share is None:
        return f"{lead}; {entry.why}"
    return f"{lead} of {entry.peak_per_s / 1e9:.1f} that matrix products reach in this run: {entry.share:.0%}"


def _summary(runs: tuple[BenchRun, ...]) -> list[str]:
    heading = ("target", "p50 ms", "images/s", "first label ms", "RSS", "files", "of peak", "")
    rows: list[tuple[str, ...]] = [heading]
    for run in runs:
        cold = run.cold_start.get("hit", {}).get(FIRST_LABEL)
        arithmetic = run.arithmetic
        rows.append(
            (
                run.name,
                f"{run.stages[END_TO_END].wall_ms:.2f}",
                f"{run.images_per_s.value:.1f}",
                "-" if cold is None else f"{cold.wall_ms:.0f}",
                "-" if run.memory is None else _megabytes(run.memory.peak_rss_bytes),
                _megabytes(run.size_bytes),
                "-" if arithmetic is None or arithmetic.share is None else f"{arithmetic.share:.0%}",
                "disturbed" if run.warnings() else "",
            )
        )
    return aligned(rows, range(1, len(heading) - 1))


def _peaks(peaks: PeaksEntry) -> list[str]:
    said = []
    for unit, found in (("GFLOP/s", peaks.float_gflops), ("int8 GOP/s", peaks.int8_gops)):
        if found:
            products = ", ".join(f"{rate:.1f} at {n}" for n, rate in found.items())
            said.append(f"best matrix product of one thread: {products} {unit}")
    return said


def _megabytes(size_bytes: int | str) -> str:
    return size_bytes if isinstance(size_bytes, str) else f"{size_bytes / 1e6:.1f} MB"


# --- making one -------------------------------------------------------------------------------------------


def bench_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a report."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(BenchReport)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "edgeclip bench report, schema 1",
        **schema,
    }
