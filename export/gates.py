"""Gates: is what came out good enough? One function a kind, from measured values to findings.

Nothing is measured, opened or printed here. A limit on something that varies from run to run is judged by its
interval: below the limit it passed, above it failed, across it nothing can be said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from msgspec import Struct

from edgeclip.bundle import Bundle, Parity
from edgeclip.runtime.latency_report import RatioEntry

from .device_report import DeviceReport
from .pipeline_recipe import (
    AccuracyGate,
    DeviceReportGate,
    GateSpec,
    LatencyGate,
    LicenceGate,
    ParityGate,
    SizeGate,
)

__all__ = [
    "GATES",
    "Accuracy",
    "Facts",
    "Finding",
    "Status",
    "VariantFacts",
    "Verdict",
    "judge",
    "licence_allowed",
]

Status = Literal["passed", "failed", "inconclusive"]
_WORST: Final[tuple[Status, ...]] = ("failed", "inconclusive", "passed")
_MB = 1e6

# --- what is known -----------------------------------------------------------------------------------------


class Accuracy(Struct, frozen=True):
    """A metric of a variant, and of what it is compared with.

    Attributes:
        value: of the variant.
        n: pictures it is over.
        against: the other one's value; ``None`` where it was not asked for.
    """

    value: float
    n: int
    against: float | None = None


@dataclass(frozen=True)
class VariantFacts:
    """What is known of one variant.

    Attributes:
        files: size in bytes by name.
        parity: what the manifest says, by tower.
        status: what ``verify`` found on this host: ``"passed"``, ``"failed"``, ``"not run"``.
        reason: why it failed or was not run.
    """

    files: Mapping[str, int]
    parity: Mapping[str, Parity]
    status: str = "not run"
    reason: str = "nobody asked"


@dataclass(frozen=True)
class Facts:
    """Everything that gates judge.

    Attributes:
        digest: of the bundle's manifest.
        size_bytes: of all files of the bundle.
        licence: of the model.
        parents: what it descends from, as the manifest says it.
        variants: by name.
        measured: what was measured for a gate, by the gate's name.
        unmeasured: why nothing was, by the gate's name.
        reports: of devices, on this bundle or others.
    """

    digest: str
    size_bytes: int
    licence: str
    parents: tuple[str | Mapping[str, Any], ...]
    variants: Mapping[str, VariantFacts]
    measured: Mapping[str, Accuracy | RatioEntry] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    reports: tuple[DeviceReport, ...] = ()

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        verified: Mapping[str, Mapping[str, Any]],
        measured: Mapping[str, Accuracy | RatioEntry],
        unmeasured: Mapping[str, str],
        reports: tuple[DeviceReport, ...],
    ) -> Facts:
        """Return what a manifest says, with what was measured.

        Args:
            bundle: an open bundle.
            verified: ``variants`` of what ``edgeclip verify --json`` said here.
            measured: see the attribute.
            unmeasured: see the attribute.
            reports: see the attribute.
        """
        manifest = bundle.manifest
        variants = {}
        for name, entry in manifest.variants.items():
            files = {file for tower in entry.towers.values() for file in tower.files}
            said = verified.get(name, {})
            variants[name] = VariantFacts(
                {file: manifest.files[file].size_bytes for file in sorted(files)},
                entry.parity,
                str(said.get("status", "not run")),
                str(said.get("reason", "nobody asked")),
            )
        return cls(
            digest=bundle.digest,
            size_bytes=sum(entry.size_bytes for entry in manifest.files.values())
            + len(bundle.manifest_bytes),
            licence=manifest.model.licence,
            parents=manifest.model.parents,
            variants=variants,
            measured=measured,
            unmeasured=unmeasured,
            reports=reports,
        )


# --- what is said ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: a variant, file, parent or device.
        status: what came of it.
        got: what was measured, with its unit.
        limit: what was expected.
        reason: why it is not simply the number against the limit.
    """

    subject: str
    status: Status
    got: str
    limit: str
    reason: str = ""

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.subject}: got {self.got}, expected {self.limit}{reason}"


@dataclass(frozen=True)
class Verdict:
    """What one gate says.

    Attributes:
        gate: its name.
        kind: its kind.
        findings: one for each thing it looked at.
    """

    gate: str
    kind: str
    findings: tuple[Finding, ...]

    @property
    def status(self) -> Status:
        """The worst of its findings."""
        found = {finding.status for finding in self.findings}
        return next(status for status in _WORST if status in found)

    @property
    def telling(self) -> tuple[Finding, ...]:
        """Those findings that made the status what it is."""
        return tuple(finding for finding in self.findings if finding.status == self.status)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "gate": self.gate,
            "kind": self.kind,
            "status": self.status,
            "findings": [asdict(finding) for finding in self.findings],
        }


def judge(gate: GateSpec, facts: Facts) -> Verdict:
    """Return what a gate says about measured values."""
    findings = tuple(GATES[type(gate)](gate, facts))
    return Verdict(gate.name, str(gate.__struct_config__.tag), findings)


# --- kinds -------------------------------------------------------------------------------------------------


def _parity(gate: ParityGate, facts: Facts) -> Iterator[Finding]:
    limit = "verified on its own engine" if gate.require_verified else "within its limits"
    for name in gate.variants or facts.variants:
        variant = facts.variants.get(name)
        if variant is None:
            yield _absent(name, limit)
            continue
        devices = [(report.device, report.verify) for report in _reports(facts, name)]
        bad = [f"on {device}: {said.reason}" for device, said in devices if said.status == "failed"]
        if variant.status == "failed":
            bad.insert(0, f"on this host: {variant.reason}")
        places = [f"on {device}" for device, said in devices if said.status == "passed"]
        if variant.status == "passed":
            places.insert(0, "on this host")
        if variant.parity and all(said.status == "passed" for said in variant.parity.values()):
            places.insert(0, "at the export")
        proxies = sorted({said.proxy for said in variant.parity.values() if said.proxy and said.n})
        if bad:
            yield Finding(name, "failed", "wrong numbers", limit, "; ".join(bad))
        elif places:
            instead = f" ({'; '.join(proxies)})" if proxies and places == ["at the export"] else ""
            yield Finding(name, "passed", f"verified {', '.join(places)}{instead}", limit)
        elif gate.require_verified:
            yield Finding(name, "failed", "unverified", limit, variant.reason)
        elif proxies:
            yield Finding(name, "passed", f"compared on {', '.join(proxies)} only", limit)
        else:
            yield Finding(name, "inconclusive", "nothing", limit, f"it was run nowhere: {variant.reason}")


def _accuracy(gate: AccuracyGate, facts: Facts) -> Iterator[Finding]:
    limits = [] if gate.min is None else [f"{gate.metric} of at least {gate.min:.1%}"]
    if gate.max_drop is not None:
        limits.append(f"at most {gate.max_drop:.1%} below {gate.against}")
    limit = ", ".join(limits)
    found = facts.measured.get(gate.name)
    if not isinstance(found, Accuracy):
        yield _unmeasured(gate.name, gate.variant, limit, facts)
        return
    got = f"{found.value:.1%} of {found.n:,}"
    # a share over the same pictures is exact; what is added is for the last bit of a float
    good = gate.min is None or found.value >= gate.min - 1e-12
    if gate.max_drop is not None and found.against is not None:
        drop = found.against - found.value
        got += f", {gate.against} {found.against:.1%}"
        good = good and drop <= gate.max_drop + 1e-12
    yield Finding(gate.variant, "passed" if good else "failed", got, limit)


def _size(gate: SizeGate, facts: Facts) -> Iterator[Finding]:
    sizes: dict[str, int] = {}
    for name in gate.variants or facts.variants:
        files = facts.variants[name].files if name in facts.variants else None
        if files is None:
            yield _absent(name, f"at most {gate.max_mb:g} MB")
        elif gate.of == "file":
            sizes |= files
        else:
            sizes[name] = sum(files.values())
    if gate.of == "bundle":
        sizes = {"bundle": facts.size_bytes}
    for name, size_bytes in sizes.items():
        good = size_bytes <= gate.max_mb * _MB
        got = f"{size_bytes / _MB:.2f} MB"
        yield Finding(name, "passed" if good else "failed", got, f"at most {gate.max_mb:g} MB")


def _licence(gate: LicenceGate, facts: Facts) -> Iterator[Finding]:
    limit = f"one of {', '.join(gate.allow)}"
    for subject, licence in [("model", facts.licence), *_parents(facts.parents)]:
        good = licence_allowed(licence, gate.allow)
        yield Finding(subject, "passed" if good else "failed", licence or "no licence", limit)


def _latency(gate: LatencyGate, facts: Facts) -> Iterator[Finding]:
    other = gate.baseline if gate.baseline_bundle is None else f"{gate.baseline} of {gate.baseline_bundle}"
    limit = f"at most {gate.max_ratio:g} times {other}"
    found = facts.measured.get(gate.name)
    if not isinstance(found, RatioEntry):
        yield _unmeasured(gate.name, gate.variant, limit, facts)
        return
    got = f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f}, {found.n} blocks)"
    yield _within(gate.variant, found.low, found.high, gate.max_ratio, got, limit)


def _device_report(gate: DeviceReportGate, facts: Facts) -> Iterator[Finding]:
    subject = f"{gate.variant} on {gate.device}"
    expected = f"a report of {gate.device}"
    found = [report for report in _reports(facts, gate.variant) if report.device == gate.device]
    if not found:
        reason = _at_hand(facts)
        yield Finding(subject, "inconclusive", "no report", expected, reason)
    for report in found:
        statuses: dict[str, Status] = {"passed": "passed", "failed": "failed"}
        status = statuses.get(report.verify.status, "inconclusive")
        limit = "the right numbers"
        yield Finding(subject, status, f"verify: {report.verify.status}", limit, report.verify.reason)
        budgets: list[tuple[int, float | None]] = [
            (p, most) for p, most in ((50, gate.p50_ms), (90, gate.p90_ms)) if most is not None
        ]
        for p, most in budgets or [(50, None)]:
            yield _percentile(subject, report, gate.stage, p, most)


def _at_hand(facts: Facts) -> str:
    """Say which reports there are where the one that is asked for is not."""
    said = []
    for report in facts.reports:
        digest = report.bundle.digest
        whose = "this bundle" if digest == facts.digest else f"the bundle {digest[:12]}…"
        said.append(f"{report.device} for {report.variant} of {whose}")
    if not said:
        return "there is no report at all"
    return f"there are reports of {', '.join(said)}; this bundle is {facts.digest[:12]}…"


def _percentile(subject: str, report: DeviceReport, stage: str, p: int, most: float | None) -> Finding:
    """Judge a percentile; without a budget it is told and not judged."""
    limit = "no budget is set" if most is None else f"p{p} of at most {most:g} ms"
    unknown: Status = "passed" if most is None else "inconclusive"
    if report.latency is None or stage not in report.latency.stages:
        known = "nothing" if report.latency is None else ", ".join(sorted(report.latency.stages))
        return Finding(subject, unknown, "no latency", limit, f"timed was {known}, not {stage}")
    samples = report.latency.samples(stage)
    found = samples.percentile(p)
    if found is None:
        reason = f"{len(samples)} samples do not carry p{p}"
        return Finding(subject, unknown, "too few samples", limit, reason)
    got = f"p{p} {found.ms:.2f} ms ({found.low_ms:.2f} to {found.high_ms:.2f}, n {len(samples):,})"
    if most is None:
        return Finding(subject, "passed", got, limit, "set p50_ms or p90_ms of the gate to have it judged")
    return _within(subject, found.low_ms, found.high_ms, most, got, limit)


# what a key says it is: each function takes its own table
GATES: Final[Mapping[type, Callable[[Any, Facts], Iterator[Finding]]]] = MappingProxyType(
    {
        ParityGate: _parity,
        AccuracyGate: _accuracy,
        SizeGate: _size,
        LicenceGate: _licence,
        LatencyGate: _latency,
        DeviceReportGate: _device_report,
    }
)
"""Table of the recipe to the function that judges it."""


# --- shared ------------------------------------------------------------------------------------------------


def _within(subject: str, low: float, high: float, most: float, got: str, limit: str) -> Finding:
    """Judge an interval: all of it counts."""
    if high <= most:
        return Finding(subject, "passed", got, limit)
    if low > most:
        return Finding(subject, "failed", got, limit)
    return Finding(subject, "inconclusive", got, limit, "the interval lies across the limit")


def _absent(variant: str, limit: str) -> Finding:
    return Finding(variant, "failed", "no such variant in the bundle", limit)


def _unmeasured(gate: str, subject: str, limit: str, facts: Facts) -> Finding:
    reason = facts.unmeasured.get(gate, "it was not measured")
    return Finding(subject, "inconclusive", "nothing", limit, reason)


def _reports(facts: Facts, variant: str) -> list[DeviceReport]:
    return [
        report
        for report in facts.reports
        if report.bundle.digest == facts.digest and report.variant == variant
    ]


def _parents(parents: tuple[str | Mapping[str, Any], ...]) -> Iterator[tuple[str, str]]:
    """Yield name and licence of each ancestor."""
    for parent in parents:
        if isinstance(parent, str):
            yield parent, ""
            continue
        yield str(parent.get("name", "a parent without a name")), str(parent.get("licence") or "")
        above = parent.get("parents")
        if isinstance(above, list | tuple):
            yield from _parents(tuple(above))


_TOKEN = re.compile(r"\s*(\(|\)|[A-Za-z0-9.+:-]+)")


def licence_allowed(expression: str, allow: tuple[str, ...]) -> bool:
    """Return whether a list of licences allows an SPDX expression.

    All of ``A AND B`` must be allowed, one of ``A OR B`` is enough, and what ``WITH`` grants on top of a
    licence is not looked at (SPDX specification 3.0, annex B). Text that is no expression is compared whole.
    """
    known = {each.casefold() for each in allow}
    if expression.casefold() in known:
        return True
    words, at = [], 0
    while at < len(expression.rstrip()):
        match = _TOKEN.match(expression, at)
        if match is None:
            return False
        words.append(match[1])
        at = match.end()
    words.reverse()  # read from the end of a list

    def either() -> bool:
        good = both()
        while words and words[-1].upper() == "OR":
            words.pop()
            good = both() or good
        return good

    def both() -> bool:
        good = one()
        while words and words[-1].upper() == "AND":
            words.pop()
            good = one() and good
        return good

    def one() -> bool:
        word = words.pop()
        if word == "(":
            good = either()
            return words.pop() == ")" and good
        if words and words[-1].upper() == "WITH":
            del words[-2:]
        return word.casefold() in known

    try:
        return either() and not words
    except IndexError:  # it ends where something has to follow
        return False
