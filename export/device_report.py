"""Make a device report here: verify a variant, time it. What a report is: ``edgeclip.bench.device_report``.

Needs the base install only.
"""

from __future__ import annotations

import datetime

import msgspec

from edgeclip.bench.device_report import (
    BundleRef,
    DeviceReport,
    VerifyEntry,
    device_report_schema,
    read_device_report,
)
from edgeclip.bundle import Bundle
from edgeclip.runtime.host import Host, versions
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
    "verify_here",
]


def verify_here(bundle: Bundle, variant: str, *, options: RuntimeOptions = DEFAULT_OPTIONS) -> VerifyEntry:
    """Return what ``edgeclip verify`` says of a variant on this host, as reports carry it.

    Raises:
        BundleError: there is no such variant, or files are damaged.
        BackendUnavailableError: it cannot be run here.
    """
    verified = verify_bundle(bundle, variant=variant, options=options)
    if verified.damaged:
        verified.raise_for()
    return msgspec.convert(verified.to_dict()["variants"][variant], VerifyEntry)


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
    said = verify_here(bundle, variant, options=options)
    latency = None
    if effort is not None and said.status == "passed":
        latency = time_variant(bundle.variant(variant), options=options, effort=effort)
    return DeviceReport(
        device=device,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        bundle=BundleRef(name=bundle.manifest.model.name, digest=bundle.digest),
        variant=variant,
        verify=said,
        latency=latency,
        host=Host.here().to_dict(),
        versions=versions(),
    )
