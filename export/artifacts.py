"""What a pipeline leaves for people and for CI: summary, JUnit report and model card.

Pure functions from a report to text. Everything that comes from outside (names, reasons) is escaped for the
format it goes into.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from xml.etree import ElementTree

from edgeclip.manifest import Manifest, Parity
from edgeclip.runtime.host import UNAVAILABLE

from .gates import Status, Verdict

__all__ = ["Inconclusive", "PipelineReport", "StageOutcome", "junit", "model_card", "summary"]

Inconclusive = Literal["report", "pass", "fail"]
_MB = 1e6
_SIGN: Mapping[Status, str] = {
    "passed": "✅ passed",
    "failed": "❌ failed",
    "inconclusive": "❔ inconclusive",
}


@dataclass(frozen=True)
class StageOutcome:
    """One stage.

    Attributes:
        name: of the stage.
        outcome: whether it was done, taken from an earlier run, or nothing was to be done.
        seconds: it took now.
        note: what there is to say.
    """

    name: str
    outcome: Literal["done", "reused", "nothing to do", "failed"]
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """What a pipeline found.

    Attributes:
        recipe: its name.
        recipe_digest: of its tables.
        created: in UTC.
        inconclusive: what an inconclusive gate counts as.
        verdicts: one a gate.
        stages: in order.
        manifest: of the bundle; ``None`` where none came out.
        bundle: name, digest and size of it.
        verify: what ``edgeclip verify --json`` said here.
        bench: latency reports by variant, raw samples included.
        not_timed: variants that were not timed, and why.
        measured: what gates had measured, by gate: what was asked, and the numbers.
        unmeasured: why nothing was measured, by gate.
        device_reports: of devices, on this bundle.
        host: where it ran.
        versions: of what ran.
        remarks: what the user should know.
    """

    recipe: str
    recipe_digest: str
    created: str
    inconclusive: Inconclusive
    verdicts: tuple[Verdict, ...]
    stages: tuple[StageOutcome, ...]
    manifest: Manifest | None
    bundle: Mapping[str, Any] | None
    verify: Mapping[str, Any]
    bench: Mapping[str, Mapping[str, Any]]
    not_timed: Mapping[str, str]
    measured: Mapping[str, Mapping[str, Any]]
    unmeasured: Mapping[str, str]
    device_reports: Sequence[Mapping[str, Any]]
    host: Mapping[str, Any]
    versions: Mapping[str, str]
    remarks: tuple[str, ...] = field(default=())

    @property
    def status(self) -> Status:
        """The worst of all gates, with inconclusive ones counted as asked."""
        found = {_counted(verdict.status, self.inconclusive) for verdict in self.verdicts}
        order: tuple[Status, ...] = ("failed", "inconclusive")
        return next((status for status in order if status in found), "passed")

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""
        return {"passed": 0, "inconclusive": 3, "failed": 4}[self.status]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "schema": 1,
            "kind": "pipeline-report",
            "recipe": self.recipe,
            "recipe_digest": self.recipe_digest,
            "created": self.created,
            "status": self.status,
            "exit_code": self.exit_code,
            "inconclusive": self.inconclusive,
            "gates": [verdict.to_dict() for verdict in self.verdicts],
            "stages": [vars(stage) for stage in self.stages],
            "bundle": None if self.bundle is None else dict(self.bundle),
            "verify": dict(self.verify),
            "bench": {name: dict(said) for name, said in self.bench.items()},
            "not_timed": dict(self.not_timed),
            "measured": {name: dict(said) for name, said in self.measured.items()},
            "unmeasured": dict(self.unmeasured),
            "device_reports": [dict(said) for said in self.device_reports],
            "remarks": list(self.remarks),
            "host": dict(self.host),
            "versions": dict(self.versions),
        }


def _counted(status: Status, inconclusive: Inconclusive) -> Status:
    if status != "inconclusive" or inconclusive == "report":
        return status
    return "passed" if inconclusive == "pass" else "failed"


# --- summary -----------------------------------------------------------------------------------------------


def summary(report: PipelineReport) -> str:
    """Return Markdown fit for a CI job summary: gates, variants, host."""
    lines = [f"# {_text(report.recipe)}: {_SIGN[report.status]}", ""]
    lines += _gates_table(report)
    if report.manifest is not None:
        lines += ["", "## Variants", "", *_variants_table(report.manifest, report.verify, report.bench)]
        lines += _not_timed(report.not_timed)
    measured = _device_table(report.device_reports)
    if measured:
        lines += ["", "## Devices", "", *measured]
    lines += ["", "## Stages", ""]
    lines += _table(
        ("stage", "outcome", "s", ""),
        [(stage.name, stage.outcome, f"{stage.seconds:.1f}", stage.note) for stage in report.stages],
        right=(2,),
    )
    if report.remarks:
        lines += ["", *(f"- {_text(remark)}" for remark in report.remarks)]
    lines += ["", "## Host and versions", "", *_host_table(report)]
    return "\n".join(lines) + "\n"


def _gates_table(report: PipelineReport) -> list[str]:
    rows = []
    for verdict in report.verdicts:
        sign = _SIGN[verdict.status]
        if verdict.status == "inconclusive" and report.inconclusive != "report":
            sign += f", counts as {_counted(verdict.status, report.inconclusive)}"
        # all of what failed or is open; of what passed a line is enough
        shown = verdict.findings if verdict.status == "passed" else verdict.telling
        for number, finding in enumerate(shown):
            first = number == 0
            rows.append(
                (
                    verdict.gate if first else "",
                    sign if first else "",
                    finding.subject,
                    finding.got,
                    finding.limit,
                    finding.reason,
                )
            )
    return _table(("gate", "verdict", "of", "got", "expected", "why"), rows)


def _variants_table(
    manifest: Manifest, verify: Mapping[str, Any], bench: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    rows = []
    for name, entry in manifest.variants.items():
        files = {file for tower in entry.towers.values() for file in tower.files}
        size_bytes = sum(manifest.files[file].size_bytes for file in files)
        here = verify.get("variants", {}).get(name, {}).get("status", "not run")
        stage = bench.get(name, {}).get("stages", {}).get("image_tower")
        for number, (tower, parity) in enumerate(sorted(entry.parity.items())):
            first = number == 0
            rows.append(
                (
                    name if first else "",
                    f"{size_bytes / _MB:.2f}" if first else "",
                    tower,
                    parity.status + (" (other limits accepted)" if parity.missed else ""),
                    "-" if parity.max_abs is None else f"{parity.max_abs:.1e}",
                    _cosine(parity),
                    "-" if parity.top1_agreement is None else f"{parity.top1_agreement:.1%}",
                    here if first else "",
                    _p50(stage) if tower == "image" else "",
                )
            )
        if not entry.parity:
            rows.append((name, f"{size_bytes / _MB:.2f}", "", "-", "-", "-", "-", here, _p50(stage)))
    heading = ("variant", "MB", "tower", "at export", "max abs", "cosine", "top-1", "here", "p50 ms")
    return _table(heading, rows, right=(1, 4, 5, 6, 8))


def _cosine(parity: Parity) -> str:
    if parity.basis == "centred":
        return "-" if parity.centred_cosine_mean is None else f"{parity.centred_cosine_mean:.6f} (centred)"
    return "-" if parity.cosine_mean is None else f"{parity.cosine_mean:.6f}"


def _p50(stage: Mapping[str, Any] | None) -> str:
    if stage is None:
        return "-"
    batch = f", batch {stage['batch']}" if stage["batch"] != 1 else ""
    found = next((each for each in stage["percentiles"] if each["p"] == 50), None)
    if found is None:
        return f"{stage['wall_ms']:.2f} (n {stage['n']}{batch})"
    return f"{found['ms']:.2f} ({found['low_ms']:.2f} to {found['high_ms']:.2f}, n {stage['n']}{batch})"


def _not_timed(not_timed: Mapping[str, str]) -> list[str]:
    lines = [f"- {_text(name)} was not timed: {_text(reason)}" for name, reason in not_timed.items()]
    return ["", *lines] if lines else []


def _device_table(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = []
    for report in reports:
        stages = (report.get("latency") or {}).get("stages", {})
        rows.append(
            (
                report["device"],
                report["variant"],
                report["verify"]["status"],
                _p50(stages.get("image_tower")),
                _board(report.get("host", {})),
                report["created"],
            )
        )
    return _table(("device", "variant", "verify", "p50 ms", "host", "created"), rows) if rows else []


def _board(host: Mapping[str, Any]) -> str:
    """Return what a device calls itself: its board, else its processor."""
    said = (host.get(name) for name in ("board", "cpu_model"))
    return next((str(value) for value in said if value not in (None, UNAVAILABLE)), "")


def _host_table(report: PipelineReport) -> list[str]:
    rows = [
        (name, _plain(report.host[name]))
        for name in ("cpu_model", "cores", "machine", "system", "release", "isa", "gpus", "python")
        if report.host.get(name) not in (None, [], UNAVAILABLE)
    ]
    rows += [(name, version) for name, version in report.versions.items()]
    if report.bundle is not None:
        rows.insert(0, ("bundle", f"{report.bundle['name']} {report.bundle['digest']}"))
    return _table(("", ""), [*rows, ("created", report.created)])


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    marks = ["---:" if place in right else "---" for place in range(len(heading))]
    lines = [heading, marks, *(tuple(map(_text, row)) for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#])")


def _text(text: str) -> str:
    """Return text that means itself in Markdown, in a table too."""
    plain = " ".join(_printable(text).split()).replace("&", "&amp;")
    return _MARKDOWN.sub(r"\\\1", plain)


# --- JUnit -------------------------------------------------------------------------------------------------


def junit(report: PipelineReport) -> bytes:
    """Return a JUnit report: a gate is a test case; an inconclusive one is skipped, or as was asked."""
    counted = [_counted(verdict.status, report.inconclusive) for verdict in report.verdicts]
    counts = {
        "tests": str(len(counted)),
        "failures": str(counted.count("failed")),
        "errors": "0",
        "skipped": str(counted.count("inconclusive")),
        "time": f"{sum(stage.seconds for stage in report.stages):.3f}",
    }
    suites = ElementTree.Element("testsuites", {"name": "edgeclip pipeline", **counts})
    suite = ElementTree.SubElement(
        suites,
        "testsuite",
        {
            "name": _xml(report.recipe),
            "timestamp": report.created.removesuffix("Z"),
            "hostname": _xml(str(report.host.get("machine", "unknown"))),
            **counts,
        },
    )
    for verdict, status in zip(report.verdicts, counted, strict=True):
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": _xml(f"edgeclip.{report.recipe}"), "name": _xml(verdict.gate), "time": "0.000"},
        )
        said = _xml("; ".join(map(str, verdict.telling)))
        if status == "failed":
            failure = ElementTree.SubElement(case, "failure", {"message": said, "type": verdict.kind})
            failure.text = _xml("\n".join(map(str, verdict.findings)))
        elif status == "inconclusive":
            ElementTree.SubElement(case, "skipped", {"message": said, "type": "inconclusive"})
        lines = [f"{finding.status}: {finding}" for finding in verdict.findings]
        ElementTree.SubElement(case, "system-out").text = _xml("\n".join(lines))
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


# XML 1.0, §2.2: what is no Char cannot even be written as a reference.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _xml(text: str) -> str:
    return _NO_XML.sub("�", text)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char.isspace() else "�" for char in text)


# --- model card --------------------------------------------------------------------------------------------


def model_card(report: PipelineReport) -> str:
    """Return Markdown that says what the bundle is, where it is from, and what it is not.

    The report must have a manifest.
    """
    manifest = report.manifest
    assert manifest is not None
    model = manifest.model
    height, width = manifest.preprocess.image_size_px
    parameters = ", ".join(f"{tower} {count:,}" for tower, count in sorted(model.parameters.items()))
    lines = [f"# {_text(model.name)}", ""]
    lines += _table(
        ("", ""),
        [
            ("family", model.family),
            ("licence", model.licence),
            ("parameters", parameters),
            ("embedding", f"{model.embed_dim} numbers, unit length"),
            (
                "pictures",
                f"{height} × {width}, {manifest.preprocess.resize}, {manifest.preprocess.crop} crop",
            ),
            ("languages", ", ".join(model.languages) or "not said"),
            ("labels inside", _banks(manifest)),
        ],
    )
    lines += ["", "## Descends from", ""]
    parents = _ancestors(model.parents)
    lines += _table(("model", "role", "licence"), parents) if parents else ["Nothing that is recorded."]
    lines += ["", "## Variants", "", *_variants_table(manifest, report.verify, report.bench)]
    lines += ["", "## Limits", "", *(f"- {_text(line)}" for line in _limits(manifest))]
    lines += ["", "## How it was made", ""]
    lines += [f"- recipe {_text(report.recipe)}, sha256 {report.recipe_digest}"]
    source = manifest.provenance.get("source")
    if isinstance(source, Mapping):
        lines += [f"- {_text(str(key))}: {_text(str(value))}" for key, value in sorted(source.items())]
    lines += [f"- {_text(line)}" for line in _references(manifest)]
    lines += [f"- {_text(name)} {_text(version)}" for name, version in report.versions.items()]
    return "\n".join(lines) + "\n"


def _references(manifest: Manifest) -> list[str]:
    """Return what variants were compared on, as the exporter notes it."""
    lines = []
    made = manifest.provenance.get("variants")
    for name, said in made.items() if isinstance(made, Mapping) else ():
        reference = said.get("reference") if isinstance(said, Mapping) else None
        if isinstance(reference, Mapping):
            pictures, texts = reference.get("pictures"), reference.get("texts")
            source = reference.get("source")
            lines.append(f"{name}: compared with float32 on {pictures} pictures ({source}) and {texts} texts")
    return lines


def _banks(manifest: Manifest) -> str:
    said = [f"{name} ({entry.labels:,})" for name, entry in manifest.label_banks.items()]
    return ", ".join(said) or "none"


def _ancestors(parents: Iterable[str | Mapping[str, Any]], above: str = "") -> list[tuple[str, str, str]]:
    rows = []
    for parent in parents:
        if isinstance(parent, str):
            rows.append((above + parent, "", "not said"))
            continue
        name = above + str(parent.get("name", "a parent without a name"))
        rows.append((name, str(parent.get("role", "")), str(parent.get("licence") or "not said")))
        further = parent.get("parents")
        if isinstance(further, list | tuple):
            rows += _ancestors(further, f"{name} ← ")
    return rows


def _limits(manifest: Manifest) -> list[str]:
    lines = []
    for name, entry in manifest.variants.items():
        missed = sorted({number for said in entry.parity.values() for number in said.missed})
        if missed:
            lines.append(f"{name}: default limits of parity were set aside for {', '.join(missed)}")
        unverified = sorted(tower for tower, said in entry.parity.items() if said.status != "passed")
        if unverified:
            proxies = sorted({said.proxy for said in entry.parity.values() if said.proxy})
            instead = f"; compared on {', '.join(proxies)}" if proxies else ""
            lines.append(f"{name}: not run on its own engine where it was made{instead}")
        if any(said.basis == "centred" for said in entry.parity.values()):
            lines.append(
                f"{name}: its reference embeddings are all alike, as those of untrained weights are; cosines "
                "and ranks prove nothing"
            )
    lines.append(
        "Scores are relative to the labels that are offered; a picture of none of them gets one too."
    )
    return lines
