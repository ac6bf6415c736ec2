"""Make a device report here: verify a variant, time it. What a report is: ``edgeclip.bench.device_report``.

Needs the base install only.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from edgeclip.bench.device_report import (
    BundleRef,
    DeviceReport,
    VerifyEntry,
    check_writable,
    device_report_schema,
    read_device_report,
    sustained_report,
    write_device_report,
)
from edgeclip.bench.sensors import SensorLog
from edgeclip.bench.sustained import SustainedPlan
from edgeclip.bench.targets import Target, open_target
from edgeclip.bench.workload import Workload
from edgeclip.bundle import Bundle
from edgeclip.errors import ConfigError
from edgeclip.runtime.choose import choose_variant
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.latency import StageClock
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
    "run_device_report",
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


def run_device_report(
    path: Path,
    *,
    bundle: Bundle,
    target: Target,
    workload: Workload,
    device: str,
    plan: SustainedPlan,
    on_progress: Callable[[float, int, float], None] | None = None,
) -> DeviceReport:
    """Verify a target here, run the sustained protocol, and write the report to a file.

    Args:
        path: of the report; what is there stays until the new one is whole.
        bundle: of the target, open.
        target: what to run, a picture at a time.
        workload: pictures and labels.
        device: what reports call this kind of host.
        plan: how long.
        on_progress: told seconds, pictures and the latest time in ms, once a second.

    Returns:
        The report that was written. Where ``sustained.interrupted`` is set, Ctrl-C ended the run.

    Raises:
        ConfigError: the target takes several pictures a call.
        InputError: the file cannot be written, or a picture not be read.
        BundleError: files are damaged, or there is no such variant.
        BackendError: it cannot run here.
        KeyboardInterrupt: nothing was written, unless the plan keeps what there is.
    """
    if target.batch != 1:
        raise ConfigError(
            f"device report: got batch {target.batch}, expected 1: pictures are timed one by one."
        )
    check_writable(path)
    options = target.options()
    target = replace(
        target, variant=choose_variant(bundle, variant=target.variant, options=options).variant.name
    )
    verify = verify_here(bundle, target.variant, options=options)
    kind, _, number = target.device.partition(":")
    gpu = int(number or 0) if kind == "cuda" else None
    clock = StageClock()
    with open_target(target, clock, bundle=bundle) as classifier:
        report = sustained_report(
            classifier,
            workload,
            device=device,
            verify=verify,
            clock=clock,
            plan=plan,
            sensors=SensorLog.here(gpu),
            on_progress=on_progress,
        )
    write_device_report(report, path)
    return report
