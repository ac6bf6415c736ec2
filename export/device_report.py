"""Device reports: what a device says about one variant of a bundle, for gates elsewhere.

A report is one JSON document, schema 1, ``docs/ci/device-report.md``. It holds what ``edgeclip verify`` found
and a latency report with its raw samples, and names the bundle by the digest of its manifest: a report on
another bundle counts for nothing. Needs the base install only.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edgeclip.bundle import Bundle
from edgeclip.errors import InputError
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.latency_report import LatencyReport
from edgeclip.runtime.session import DEFAULT_OPTIONS, RuntimeOptions

from .timing import DEFAULT_EFFORT, Effort, time_variant
from .verify import verify_bundle

__all__ = [
    "BundleRef",
    "DeviceReport",
    "VerifyEntry",
    "device_report",
    "device_report_schema",
    "read_device_report",
]

SCHEMA_ID = "urn:edgeclip:device-report:1"
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
    host: dict[str, Any] = {}
    versions: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        said: dict[str, Any] = msgspec.to_builtins(self)
        return said

    def to_json(self) -> str:
        """Return the report as one JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

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


def device_report(
    bundle: Bundle,
    variant: str,
    *,
    device: str,
    options: RuntimeOptions = DEFAULT_OPTIONS,
    effort: Effort | None = DEFAULT_EFFORT,
) -> DeviceReport:
    """Verify a variant on this host, time it, and return the report.

    Args:
        bundle: an open bundle.
        variant: name of the variant.
        device: what reports call this kind of host.
        options: where to run.
        effort: how long to measure; ``None`` times nothing.

    Raises:
        BundleError: there is no such variant, or files are damaged.
        BackendUnavailableError: it cannot be run here.
        BackendError: it cannot be timed here, although it could be verified.
    """
    verified = verify_bundle(bundle, variant=variant, options=options)
    if verified.damaged:
        verified.raise_for()
    said = verified.to_dict()["variants"][variant]
    latency = None
    if effort is not None and said["status"] == "passed":
        latency = time_variant(bundle.variant(variant), options=options, effort=effort)
    return DeviceReport(
        device=device,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        bundle=BundleRef(name=bundle.manifest.model.name, digest=bundle.digest),
        variant=variant,
        verify=msgspec.convert(said, VerifyEntry),
        latency=latency,
        host=Host.here().to_dict(),
        versions=versions(),
    )
