"""``edgeclip doctor``: what this machine is, what works on it, and what to do about the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from edgeclip.errors import BackendError

if TYPE_CHECKING:
    from edgeclip.runtime.diagnose import Check, Diagnosis

__all__ = ["doctor"]


@click.command(epilog="Example: edgeclip doctor --json > doctor.json")
@click.option(
    "--bundle",
    metavar="DIR|hf:ORG/NAME@REV",
    help="Check this bundle in place of the embedded one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(bundle: str | None, as_json: bool) -> None:
    """Say what this machine is, which backends work and why the others do not.

    Ends with 1 only if the base backend is broken.
    """
    from edgeclip.cli._options import Notes, bundle_directory
    from edgeclip.runtime.diagnose import diagnose

    found = diagnose(bundle_directory(bundle or "default", Notes()))
    found = replace(found, checks=(*found.checks, *_int8_sums(found)))
    click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else _text(found))
    if found.broken:
        first = found.broken[0]
        raise BackendError(f"{first.name}: {first.detail.rstrip('.')}: {first.suggestion}.")


def _int8_sums(found: Diagnosis) -> list[Check]:
    """Run layers in int8 through every engine that works here, and compare with exact sums."""
    from edgeclip.calibration.saturation import detect
    from edgeclip.runtime.diagnose import Check

    checks = []
    for state in found.backends:
        if state.name not in ("ort", "openvino") or not state.works:
            continue
        name = f"int8 sums of {state.name}"
        try:
            detection = detect(state.name)
        except BackendError as error:
            checks.append(Check(name, "problem", str(error), "use float variants"))
            continue
        if detection.exact:
            layers = len(detection.findings)
            checks.append(Check(name, "ok", f"exact on this host ({layers} layers, every number)"))
            continue
        worst = max(detection.findings, key=lambda finding: finding.error)
        checks.append(
            Check(
                name,
                "problem",
                f"not exact on this host: products are added in 16 bits ({worst.layer}: {worst.wrong} of "
                f"{worst.outputs} numbers wrong, relative error {worst.error:.3f} in place of "
                f"{worst.exact_error:.3f})",
                "use int8 variants made for x86-avx2, or float ones; edgeclip refuses those that overflow",
            )
        )
    return checks


def _text(found: Diagnosis) -> str:
    host = found.host.to_dict()
    isa = " ".join(host["isa"]) if isinstance(host["isa"], list) else host["isa"]
    cores = f"{found.host.cores} of {found.host.logical_cpus} cores usable"
    quota = "" if found.host.cpu_quota is None else f", limited to {found.host.cpu_quota:g}"
    lines = [
        f"machine    {host['cpu_model']}, {host['machine']}, {cores}{quota}",
        f"isa        {isa}",
        f"memory     {_gib(found.host.memory_bytes)}{_limit(found.host.memory_limit_bytes)}",
        f"gpus       {', '.join(found.host.gpus) or 'none'}",
        f"system     {host['distribution']}, {host['system']} {host['release']}, {host['libc']}"
        + (", in a container" if found.host.container else ""),
        f"python     {found.host.python}, "
        + ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        f"host       {host['fingerprint']}",
        "",
    ]
    if found.host.board:
        lines.insert(1, f"board      {found.host.board}")
    width = max(len(state.name) for state in found.backends)
    lines += [
        f"{'works ' if state.works else 'absent'}  {state.name:<{width}}  {state.detail}"
        for state in found.backends
    ]
    lines.append("")
    for check in found.checks:
        lines.append(f"{check.state:<7}  {check.name}: {check.detail}")
        if check.suggestion:
            lines.append(f"         -> {check.suggestion}")
    return "\n".join(lines)


def _gib(size_bytes: int | None) -> str:
    return "unavailable" if size_bytes is None else f"{size_bytes / (1 << 30):.1f} GiB"


def _limit(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f", limited to {_gib(size_bytes)}"
