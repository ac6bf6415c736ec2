"""Device reports: what a device says about one variant of a bundle, for gates elsewhere and for tables.

A report is one JSON document, schema 1, ``docs/device-report.md``. It holds what ``edgeclip verify`` found, a
latency report with its raw samples and, from the sustained protocol, how the device bore ten minutes of it.
It names the bundle by the digest of its manifest: a report on another bundle counts for nothing. Needs the
base install only.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edgeclip.bench.sensors import SensorLog
from edgeclip.bench.sustained import SustainedEntry, SustainedPlan, sustain
from edgeclip.errors import ConfigError, InputError
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.latency import StageClock
from edgeclip.runtime.latency_report import LatencyReport
from edgeclip.storage import write_temporary

if TYPE_CHECKING:
    from edgeclip.bench.workload import Workload
    from edgeclip.classify import ZeroShotClassifier

__all__ = [
    "BundleRef",
    "DeviceReport",
    "VerifyEntry",
    "check_writable",
    "device_report_schema",
    "read_device_report",
    "sustained_report",
    "write_device_report",
]

SCHEMA_ID = "urn:edgeclip:device-report:1"
END_TO_END = "end_to_end"
_MAX_BYTES = 64 << 20
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]


class BundleRef(Struct, frozen=True, kw_only=True):
    """The bundle that was run: name of its model and sha256 of its ``manifest.json``."""

    name: str
    digest: Sha256


class VerifyEntry(Struct, frozen=True, kw_only=True):
    """What ``edgeclip verify --json`` says under ``variants`` about the variant."""

    status: Literal["passed", "failed", "not run"]
    reason: str = ""
    towers: dict[str, Any] = {}


class DeviceReport(Struct, frozen=True, kw_only=True):
    """What a device says about one variant.

    Attributes:
        schema: 1.
        kind: tells the document from others.
        device: name of the kind of device, such as ``raspberry-pi5``; gates ask for it by this.
        created: in UTC.
        bundle: which bundle.
        variant: which of its variants.
        verify: whether its numbers are right there.
        latency: how fast it is there; ``None`` where nothing was timed.
        sustained: how it bore the sustained protocol; ``None`` where that was not run.
        host: what the device is.
        versions: of what ran.
    """

    schema: Literal[1] = 1
    kind: Literal["device-report"] = "device-report"
    device: Name
    created: str
    bundle: BundleRef
    variant: Name
    verify: VerifyEntry
    latency: LatencyReport | None = None
    sustained: SustainedEntry | None = None
    host: dict[str, Any] = {}
    versions: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        said: dict[str, Any] = msgspec.to_builtins(self)
        return said

    def to_json(self) -> str:
        """Return the report as one JSON document, lists of numbers on one line each."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        # strings hold no line breaks in JSON, so none of them can look like such a list
        return re.sub(r"\[\n([-+.\deEnul,\s]*?)\n\s*\]", lambda found: f"[{_on_a_line(found[1])}]", text)

    @classmethod
    def from_dict(cls, raw: Any, *, where: str = "device report") -> DeviceReport:
        """Read a report.

        Raises:
            InputError: it is not one, or of an unknown schema.
        """
        if not isinstance(raw, dict) or raw.get("kind") != "device-report":
            kind = raw.get("kind") if isinstance(raw, dict) else type(raw).__name__
            raise InputError(f"{where}: got a document of kind {kind!r}, expected 'device-report'.")
        if raw.get("schema") != 1:
            raise InputError(f"{where}: got schema {raw.get('schema')!r}, expected 1: update edgeclip.")
        try:
            return msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise InputError(f"{where} cannot be read: {error}.") from error


def _on_a_line(numbers: str) -> str:
    return " ".join(numbers.split())


def device_report_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a report."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(DeviceReport)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "edgeclip device report, schema 1",
        **schema,
    }


def read_device_report(path: Path) -> DeviceReport:
    """Return the report of a file.

    Raises:
        InputError: it cannot be read, or is no report.
    """
    where = f"device report {str(path)!r}"
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}.") from error
    if len(content) > _MAX_BYTES:
        raise InputError(f"{where}: larger than {_MAX_BYTES} bytes; is it a report?")
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from error
    return DeviceReport.from_dict(raw, where=where)


def check_writable(path: Path) -> None:
    """Refuse a place where a report cannot be written: before ten minutes are spent, not after.

    Raises:
        InputError: it is a directory, or in one that is not there or takes no files.
    """
    if path.is_dir():
        raise InputError(f"device report {str(path)!r}: it is a directory, expected a file in it.")
    try:
        temporary, _, _ = write_temporary(path.resolve().parent, b"")
    except OSError as error:
        raise InputError(
            f"device report {str(path)!r} cannot be written: {error.strerror or error}. Name a file in a "
            "directory that you may write to."
        ) from error
    temporary.unlink()


def write_device_report(report: DeviceReport, path: Path) -> None:
    """Write a report, or leave what is there: never half of one.

    Raises:
        InputError: it cannot be written.
    """
    content = (report.to_json() + "\n").encode()
    try:
        temporary, _, _ = write_temporary(path.resolve().parent, content)
        try:
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"device report {str(path)!r} cannot be written: {error.strerror or error}."
        ) from error


def sustained_report(
    classifier: ZeroShotClassifier,
    workload: Workload,
    *,
    device: str,
    verify: VerifyEntry,
    clock: StageClock,
    plan: SustainedPlan,
    sensors: SensorLog,
    on_progress: Callable[[float, int, float], None] | None = None,
) -> DeviceReport:
    """Classify pictures one by one for the length of a plan, and return the report.

    Args:
        classifier: open, with ``clock`` as its clock.
        workload: pictures, taken in turn, and labels.
        device: what reports call this kind of host.
        verify: what was found of the variant's numbers here. Where it is not ``"passed"``, nothing is timed.
        clock: see ``classifier``.
        plan: how long.
        sensors: read meanwhile.
        on_progress: see :func:`edgeclip.bench.sustained.sustain`.

    Raises:
        ConfigError: there is no picture, or no label.
        InputError: a picture cannot be read.
        BackendError: the tower failed.
        KeyboardInterrupt: unless the plan keeps what there is.
    """
    images = workload.pictures
    if not images:
        raise ConfigError("sustained run: got no pictures, expected at least one.")
    bundle, variant = classifier.bundle, classifier.choice.variant.name
    name = bundle.manifest.model.name
    latency = sustained = None
    if verify.status == "passed":
        pictures = workload.pictures_entry()
        workload.set_labels(classifier)
        run = sustain(
            lambda number: classifier.classify(images[number % len(images)]),
            plan=plan,
            sensors=sensors,
            clock=clock,
            on_progress=on_progress,
        )
        latency = LatencyReport.of(
            f"{name} {variant}",
            {END_TO_END: run.end_to_end, **run.stages},
            placement=classifier.placement,
            bundle={"name": name, "digest": bundle.digest, "variant": variant},
        )
        sustained = msgspec.structs.replace(
            run.entry, pictures=pictures, labels=workload.labels_entry(classifier)
        )
    return DeviceReport(
        device=device,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        bundle=BundleRef(name=name, digest=bundle.digest),
        variant=variant,
        verify=verify,
        latency=latency,
        sustained=sustained,
        host=Host.here().to_dict(),
        versions=versions(),
    )
