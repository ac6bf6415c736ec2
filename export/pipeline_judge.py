"""From what was measured to a report: now, or later with what devices said."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edgeclip.bundle import Bundle
from edgeclip.runtime.host import Host
from edgeclip.runtime.latency_report import RatioEntry

from .artifacts import Inconclusive, PipelineReport, StageOutcome
from .device_report import DeviceReport
from .gates import Accuracy, Facts, judge
from .pipeline_inputs import digest_of, tools
from .pipeline_recipe import AccuracyGate, GateSpec, LatencyGate, ParityGate, PipelineRecipe

__all__ = ["asked_of", "gates_of", "is_settled", "judged", "now", "reports_of"]


def gates_of(recipe: PipelineRecipe) -> tuple[GateSpec, ...]:
    """Return the gates; numbers are always judged, asked or not."""
    if any(isinstance(gate, ParityGate) for gate in recipe.gate):
        return recipe.gate
    return (ParityGate(name="numbers"), *recipe.gate)


def judged(
    recipe: PipelineRecipe,
    bundle: Bundle,
    said: Mapping[str, Any],
    reports: Sequence[DeviceReport],
    inconclusive: Inconclusive,
) -> PipelineReport:
    """Return the report on a bundle from what was measured before.

    Args:
        recipe: whose gates judge.
        bundle: an open bundle.
        said: keys of a pipeline report, those that are there.
        reports: of devices.
        inconclusive: what an inconclusive gate counts as.
    """
    gates = gates_of(recipe)
    taken = {
        gate.name: entry
        for gate in gates
        if isinstance(gate, AccuracyGate | LatencyGate)
        and (entry := said.get("measured", {}).get(gate.name)) is not None
        and entry["asked"] == asked_of(gate)
    }
    facts = Facts.of(
        bundle,
        verified=said.get("verify", {}).get("variants", {}),
        measured={name: _value(entry) for name, entry in taken.items()},
        unmeasured=said.get("unmeasured", {}),
        reports=_latest(reports),
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
        stages=tuple(StageOutcome(**stage) for stage in said.get("stages", ())),
        manifest=bundle.manifest,
        bundle={
            "name": bundle.manifest.model.name,
            "digest": bundle.digest,
            "size_bytes": facts.size_bytes,
        },
        verify=said.get("verify", {}),
        bench=said.get("bench", {}),
        not_timed=said.get("not_timed", {}),
        measured=taken,
        unmeasured=said.get("unmeasured", {}),
        device_reports=on_this,
        host=said.get("host") or Host.here().to_dict(),
        versions=said.get("versions") or tools(),
        remarks=tuple(dict.fromkeys((*said.get("remarks", ()), *remarks))),
    )


def _latest(reports: Sequence[DeviceReport]) -> tuple[DeviceReport, ...]:
    """Return one report for each device, variant and bundle: the latest."""
    found = {
        (report.device, report.variant, report.bundle.digest): report
        for report in sorted(reports, key=lambda report: report.created)
    }
    return tuple(found.values())


def reports_of(said: Mapping[str, Any]) -> tuple[DeviceReport, ...]:
    """Return the device reports that a pipeline report holds.

    Raises:
        InputError: one cannot be read.
    """
    return tuple(DeviceReport.from_dict(raw) for raw in said.get("device_reports", ()))


def asked_of(gate: AccuracyGate | LatencyGate) -> dict[str, Any]:
    """Return what decides a measurement: limits and the gate's name do not."""
    limits = ("name", "min", "max_drop", "max_ratio")
    asked = {key: value for key, value in msgspec.to_builtins(gate).items() if key not in limits}
    if isinstance(gate, AccuracyGate) and gate.max_drop is None:
        del asked["against"]
    return asked


def _value(entry: Mapping[str, Any]) -> Accuracy | RatioEntry:
    value = entry["value"]
    return msgspec.convert(value, RatioEntry) if "ratio" in value else msgspec.convert(value, Accuracy)


def is_settled(gate: AccuracyGate | LatencyGate, entry: Mapping[str, Any]) -> bool:
    """Return whether a measurement says yes or no: what noise left open is measured again."""
    facts = Facts("", 0, "", (), {}, measured={gate.name: _value(entry)})
    return judge(gate, facts).status != "inconclusive"


def now() -> str:
    """Return the time for reports, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
