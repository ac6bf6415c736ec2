"""``edgeclip tune``: find the best setting of a bundle on this device, and let ``auto`` take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import SCHEMA, Notes, bundle_directory, prepare_stdout, shown

if TYPE_CHECKING:
    from edgeclip.bench.tune import TunePlan
    from edgeclip.bundle import Bundle

__all__ = ["tune"]

_MOST_IMAGES = 64


@click.command(epilog="Example: edgeclip tune default --for throughput --images photos/ --floor parity")
@click.argument("bundle", default="default", metavar="[BUNDLE]")
@click.option(
    "--for",
    "goal",
    type=click.Choice(["latency", "throughput", "memory"]),
    default="latency",
    show_default=True,
    help="One picture after another, streams of picture files, or the peak memory of a process.",
)
@click.option(
    "--budget", "budget_s", type=float, default=90.0, show_default=True, help="Seconds it may take in all."
)
@click.option(
    "--floor",
    "floors",
    multiple=True,
    metavar="CONDITION",
    help="What a variant must keep: golden (right answers to the bundle's golden pictures here, always asked "
    "for), parity (every limit met where it was made), or NUMBER=LIMIT by its manifest, such as "
    "top1_agreement=0.98, cosine_min=0.999 or accuracy.top1=0.6. Repeatable.  [default: golden]",
)
@click.option("--variant", "variants", multiple=True, help="Only these. Repeatable.  [default: all]")
@click.option("--device", default="cpu", show_default=True, help="As for classify; each has its own profile.")
@click.option(
    "--threads", metavar="N,N,…", help="Numbers of threads.  [default: powers of two, and usable cores]"
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="Pictures of the stream, the first 64.  [default: edgeclip's photographs]",
)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be tried and what is left out; measure nothing."
)
@click.option("--show", is_flag=True, help="Show the profile there is, and whether it still holds.")
@click.option("--forget", is_flag=True, help="Remove the profile there is.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def tune(
    *,
    bundle: str,
    goal: str,
    budget_s: float,
    floors: tuple[str, ...],
    variants: tuple[str, ...],
    device: str,
    threads: str | None,
    images: Path | None,
    dry_run: bool,
    show: bool,
    forget: bool,
    as_json: bool,
) -> None:
    """Find the best setting of BUNDLE on this device: variant, engine, threads and what else there is.

    Slow settings drop out early, close ones are measured in turns until it is clear. The outcome is a profile
    in the host cache: from then on variant "auto" is what it names, and what you do not say yourself is what
    it says. It replaces the one there was. Let nothing else run meanwhile. BUNDLE is a directory, or
    hf:ORG/NAME@REV; without, the embedded bundle.
    """
    if dry_run + show + forget > 1:
        raise click.UsageError("--dry-run, --show and --forget exclude each other.")
    from edgeclip.bench.floor import Floor
    from edgeclip.bench.tune import TunePlan
    from edgeclip.bundle import Bundle

    prepare_stdout()
    notes = Notes()
    plan = TunePlan(
        goal=goal,  # type: ignore[arg-type]  # click has checked it
        floor=Floor(tuple(dict.fromkeys(("golden", *floors)))),
        budget_s=budget_s,
        device=device,
        variants=variants,
        threads=_threads(threads),
        images=_images(images, goal == "throughput"),
    )
    opened = Bundle.open(bundle_directory(bundle, notes))
    if show:
        _show(opened, device, as_json=as_json)
    elif forget:
        _forget(opened, device, as_json=as_json)
    elif dry_run:
        _dry_run(opened, plan, as_json=as_json)
    else:
        _tune(opened, plan, notes, as_json=as_json)


def _tune(bundle: Bundle, plan: TunePlan, notes: Notes, *, as_json: bool) -> None:
    from edgeclip.bench.tune import check_cache, keep, tune
    from edgeclip.runtime.host import Host
    from edgeclip.runtime.tuned import find_profile

    check_cache(bundle)  # before the time is spent
    before = find_profile(bundle, Host.here(), plan.device)
    try:
        report = tune(bundle, plan, on_progress=notes.progress)
    finally:
        notes.done()
    path = keep(bundle, report)
    if as_json:
        click.echo(report.to_json())
        return
    click.echo(report.to_text())
    if before is not None and before.profile is not None:
        click.echo(f"        it replaces {before.profile}")
    click.echo(f"kept in {shown(path)}; variant auto takes it from now on")


def _dry_run(bundle: Bundle, plan: TunePlan, *, as_json: bool) -> None:
    from edgeclip.bench.tune import candidates

    first, left_out = candidates(bundle, plan)
    if as_json:
        document: dict[str, Any] = {"schema": SCHEMA, "kind": "tune-plan", "goal": plan.goal}
        document |= {"budget_s": plan.budget_s, "floor": list(plan.floor.said), "device": plan.device}
        document |= {"would_try": list(first), "left_out": left_out}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    click.echo(f"would tune for {plan.goal} on {plan.device} in at most {plan.budget_s:g} s, and would try")
    for name in first:
        click.echo(f"  {name}")
    if not first:
        click.echo("  nothing")
    for name, why in left_out.items():
        click.echo(f"left out: {name}: {why}")


def _show(bundle: Bundle, device: str, *, as_json: bool) -> None:
    from edgeclip.cache import HostCache
    from edgeclip.errors import InputError
    from edgeclip.runtime.host import Host
    from edgeclip.runtime.tuned import find_profile, measurements_name

    host = Host.here()
    found = find_profile(bundle, host, device)
    if found is None:
        raise InputError(f"{bundle.where}: it has no tuned profile for {device} here. Run edgeclip tune.")
    profile, stale = found.profile, found.stale
    if as_json:
        document = {
            "schema": SCHEMA,
            "kind": "tune-show",
            "stale": stale,
            "profile": None if profile is None else profile.to_dict(),
        }
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    if profile is not None:
        interval = "" if profile.low is None else f", {profile.low:.2f} to {profile.high:.2f}"
        click.echo(f"{profile}")
        click.echo(f"  {profile.value:.2f} {profile.unit}{interval}, {profile.why}")
        floor, engines = ", ".join(profile.floor), profile.engines
        click.echo(f"  floor {floor}; {', '.join(f'{name} {version}' for name, version in engines.items())}")
    if stale is not None:
        click.echo(f"  stale, so not used: {stale}. Run edgeclip tune again.")
    elif HostCache.open(bundle.digest, host.fingerprint()).get(measurements_name(device)) is not None:
        path = HostCache.open(bundle.digest, host.fingerprint()).path(measurements_name(device))
        click.echo(f"  every turn is in {shown(path)}")


def _forget(bundle: Bundle, device: str, *, as_json: bool) -> None:
    from edgeclip.runtime.host import Host
    from edgeclip.runtime.tuned import forget_profile

    removed = forget_profile(bundle, Host.here(), device)
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "kind": "tune-forget", "removed": removed}, indent=2))
    else:
        click.echo("removed" if removed else "there was none")


def _threads(said: str | None) -> tuple[int, ...]:
    if said is None:
        return ()
    try:
        return tuple(int(number) for number in said.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"got {said!r}, expected whole numbers with commas between them.", param_hint="--threads"
        ) from error


def _images(said: Path | None, needed: bool, /) -> tuple[Path, ...]:
    """Return pictures of a stream."""
    from itertools import islice

    from edgeclip.data import read_samples
    from edgeclip.errors import InputError

    if not needed:
        if said is not None:
            raise click.UsageError("--images is for --for throughput.")
        return ()
    if said is None:
        said = Path(__file__).parents[1] / "assets" / "photos"
    found = islice(read_samples([said]), _MOST_IMAGES)
    paths = tuple(Path(str(sample.source)) for sample in found if isinstance(sample.source, Path))
    if not paths:
        raise InputError(f"--images {str(said)!r}: got no picture files, expected some in the folder.")
    return paths
