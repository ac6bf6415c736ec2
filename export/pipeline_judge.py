"""From what was measured to a report: now, or later with what devices said."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from edgeclip.bundle import Bundle
from edgeclip.errors import InputError
from edgeclip.runtime.host import Host
from edgeclip.runtime.latency_report import LatencyReport, RatioEntry

from .artifacts import Inconclusive, PipelineReport, StageOutcome
from .device_report import DeviceReport
from .gates import Accuracy, Facts, judge
from .pipeline_inputs import digest_of, tools
from .pipeline_recipe import AccuracyGate, GateSpec, LatencyGate, ParityGate, PipelineRecipe

__all__ = [
    "Measured",
    "Stored",
    "asked_of",
    "gates_of",
    "is_settled",
    "judged",
    "now",
    "read_stored",
]


def gates_of(recipe: PipelineRecipe) -> tuple[GateSpec, ...]:
    """Return the gates; numbers are always judged, asked or not."""
    if any(isinstance(gate, ParityGate) for gate in recipe.gate):
        return recipe.gate
    return (ParityGate(name="numbers"), *recipe.gate)


class Measured(Struct, frozen=True, kw_only=True):
    """What was measured for a gate: what was asked, and the numbers of an accuracy or of a ratio."""

    asked: dict[str, Any]
    accuracy: Accuracy | None = None
    ratio: RatioEntry | None = None

    @property
    def value(self) -> Accuracy | RatioEntry | None:
        """The numbers."""
        return self.accuracy or self.ratio


class Stored(Struct, frozen=True, kw_only=True):
    """Those parts of a pipeline report from which it can be judged again."""

    schema: Literal[1] = 1
    kind: Literal["pipeline-report"] = "pipeline-report"
    bundle: dict[str, str | int] | None = None
    stages: tuple[StageOutcome, ...] = ()
    verify: dict[str, Any] = {}
    bench: dict[str, LatencyReport] = {}
    not_timed: dict[str, str] = {}
    measured: dict[str, Measured] = {}
    unmeasured: dict[str, str] = {}
    device_reports: tuple[DeviceReport, ...] = ()
    remarks: tuple[str, ...] = ()
    host: dict[str, Any] = {}
    versions: dict[str, str] = {}


def read_stored(path: Path) -> Stored:
    """Return what a run left in its ``report.json``.

    Raises:
        InputError: it cannot be read, or is no pipeline report.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Stored)
    except OSError as error:
        reason = error.strerror or str(error)
    except msgspec.MsgspecError as error:
        reason = str(error)
    raise InputError(f"{str(path)!r} cannot be used: {reason}; expected what `edgeclip pipeline run` wrote.")


def judged(
    recipe: PipelineRecipe,
    bundle: Bundle,
    said: Stored,
    reports: Sequence[DeviceReport],
    inconclusive: Inconclusive,
) -> PipelineReport:
    """Return the report on a bundle from what was measured before.

    Args:
        recipe: whose gates judge.
        bundle: an open bundle.
        said: what was measured.
        reports: of devices, beside those that were there.
        inconclusive: what an inconclusive gate counts as.
    """
    gates = gates_of(recipe)
    taken = {
        gate.name: found
        for gate in gates
        if isinstance(gate, AccuracyGate | LatencyGate)
        and (found := said.measured.get(gate.name)) is not None
        and found.asked == asked_of(gate)
    }
    verified = said.verify.get("variants")
    facts = Facts.of(
        bundle,
        verified=verified if isinstance(verified, dict) else {},
        measured={name: found.value for name, found in taken.items() if found.value is not None},
        unmeasured=said.unmeasured,
        reports=_latest((*said.device_reports, *reports)),
    )
    on_this = [report.to_dict() for report in facts.reports if report.bundle.digest == bundle.digest]
    others = [report for report in facts.reports if report.bundle.digest != bundle.digest]
    remarks = [
        f"the report of {report.device} is on another bundle, {report.bundle.digest[:12]}…, and counts for "
        "nothing"
        for report in others
    ]
    return PipelineReport(
        recipe=recipe.name,
        recipe_digest=digest_of(recipe=msgspec.to_builtins(recipe)),
        created=now(),
        inconclusive=inconclusive,
        verdicts=tuple(judge(gate, facts) for gate in gates),
        stages=said.stages,
        manifest=bundle.manifest,
        bundle={
            "name": bundle.manifest.model.name,
            "digest": bundle.digest,
            "size_bytes": facts.size_bytes,
        },
        verify=said.verify,
        bench={name: report.to_dict() for name, report in said.bench.items()},
        not_timed=said.not_timed,
        measured={name: msgspec.to_builtins(found) for name, found in said.measured.items()},
        unmeasured=said.unmeasured,
        device_reports=on_this,
        host=said.host or Host.here().to_dict(),
        versions=said.versions or tools(),
        remarks=tuple(dict.fromkeys((*said.remarks, *remarks))),
    )


def _latest(reports: Sequence[DeviceReport]) -> tuple[DeviceReport, ...]:
    """Return one report for each device, variant and bundle: the latest."""
    found = {
        (report.device, report.variant, report.bundle.digest): report
        for report in sorted(reports, key=lambda report: report.created)
    }
    return tuple(found.values())


def asked_of(gate: AccuracyGate | LatencyGate) -> dict[str, Any]:
    """Return what decides a measurement: limits and the gate's name do not."""
    limits = ("name", "min", "max_drop", "max_ratio")
    asked = {key: value for key, value in msgspec.to_builtins(gate).items() if key not in limits}
    if isinstance(gate, AccuracyGate) and gate.max_drop is None:
        del asked["against"]
    return asked


def is_settled(gate: AccuracyGate | LatencyGate, found: Measured) -> bool:
    """Return whether a measurement says yes or no: what noise left open is measured again."""
    if found.value is None:
        return False
    facts = Facts("", 0, "", (), {}, measured={gate.name: found.value})
    return judge(gate, facts).status != "inconclusive"


def now() -> str:
    """Return the time for reports, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
