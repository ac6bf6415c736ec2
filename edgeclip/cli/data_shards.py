"""``edgeclip data make-shards``, ``inspect`` and ``validate``: training data in tar shards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeclip.cli._options import SCHEMA, Notes, prepare_stdout, shown

if TYPE_CHECKING:
    from edgeclip.distill.samples import Broken
    from edgeclip.distill.shard_checks import Inspection

__all__ = ["inspect", "make_shards", "validate"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)")
_SHOWN = 20


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    match = _SIZE.fullmatch(value.strip().lower())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match else 0
    if size < 1:
        raise click.BadParameter(
            f"{value!r} is no size: expected a number of bytes, or one with KB, MB, GB, MiB, GiB."
        )
    return int(size)


@click.command("make-shards")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Directory to make."
)
@click.option(
    "--samples-per-shard",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Samples of a shard at most.",
)
@click.option(
    "--size-limit",
    callback=_size,
    default="1GB",
    show_default=True,
    metavar="SIZE",
    help="Size of a shard at most.",
)
@click.option(
    "--max-broken",
    default="1%",
    show_default=True,
    metavar="N|N%",
    help="Samples that may be left out because their picture is missing or no picture.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def make_shards(
    inputs: tuple[Path, ...],
    output: Path,
    samples_per_shard: int,
    size_limit: int,
    max_broken: str,
    as_json: bool,
) -> None:
    """Pack pictures and captions into tar shards.

    INPUT is a .csv, .tsv or .jsonl table (columns image, caption, also caption_zh, rewrites, syn_text …), a
    folder of pictures with .txt captions beside them, or shards. The same input gives the same bytes. A run
    that was stopped goes on where it was.

    Example: edgeclip data make-shards shapes/train.jsonl -o shards
    """
    from edgeclip.distill.samples import BrokenLimit, open_samples
    from edgeclip.distill.shards import write_shards

    prepare_stdout()
    notes = Notes()
    limit = BrokenLimit.parse(max_broken)
    samples = open_samples(inputs, progress=lambda path: notes.progress(f"reading {shown(path)}"))
    report = write_shards(
        samples,
        output,
        samples_per_shard=samples_per_shard,
        size_limit=size_limit,
        limit=limit,
        progress=lambda done, of: notes.progress(f"packed {done:,} of {of:,} samples"),
    )
    notes.done()
    if as_json:
        _print_json(report.to_dict())
        return
    _say_broken(notes, report.broken, "left out")
    if report.without_caption:
        notes.say(
            f"{_counted(report.without_caption, 'sample')} without any caption; training needs texts "
            "(--help says where they are looked for)"
        )
    kept = f", {report.kept} of them there already" if report.kept else ""
    click.echo(
        f"{_counted(report.samples, 'sample')} in {_counted(report.shards, 'shard')}{kept}, "
        f"{_bytes(report.size_bytes)}, in {shown(report.directory)} "
        f"({len(report.broken)} left out, digest {report.digest[:16]})"
    )


@click.command()
@click.argument("shards", nargs=-1, required=True, metavar="SHARDS...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(shards: tuple[Path, ...], as_json: bool) -> None:
    """Say what SHARDS hold: samples, files, captions.

    SHARDS are .tar files, names with a range (train-{000..011}.tar) or folders of them. Counts are of all
    samples; captions are those of up to 200, and the first sample is shown.

    Example: edgeclip data inspect shards
    """
    from edgeclip.distill.shard_checks import inspect_shards

    prepare_stdout()
    notes = Notes()
    found = inspect_shards(shards, progress=lambda path: notes.progress(f"reading {shown(path)}"))
    notes.done()
    if as_json:
        _print_json(found.to_dict())
    else:
        click.echo("\n".join(_described(found)))


@click.command()
@click.argument("shards", nargs=-1, required=True, metavar="SHARDS...", type=click.Path(path_type=Path))
@click.option(
    "--max-broken",
    default="0",
    show_default=True,
    metavar="N|N%",
    help="Broken samples that are still no failure.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads that decode.  [default: one for each usable core]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def validate(
    ctx: click.Context, shards: tuple[Path, ...], max_broken: str, workers: int | None, as_json: bool
) -> None:
    """Decode every sample and list the broken ones.

    SHARDS may also be tables and folders of pictures. Shards that edgeclip wrote are compared with the hashes
    in shards.json or reinforcement.json; what teachers left in samples is read too. Exit code 1: more broken
    samples than --max-broken, or a damaged shard.

    Example: edgeclip data validate shards
    """
    from edgeclip.distill.samples import BrokenLimit
    from edgeclip.distill.shard_checks import validate_samples
    from edgeclip.runtime.host import usable_cores

    prepare_stdout()
    notes = Notes()
    limit = BrokenLimit.parse(max_broken)
    found = validate_samples(
        shards,
        workers=workers or usable_cores(),
        progress=lambda done, of: notes.progress(f"checked {done:,} of {of:,} samples"),
    )
    notes.done()
    ok = len(found.broken) <= limit.allowed(found.samples) and not found.damaged
    if as_json:
        _print_json({"ok": ok, **found.to_dict()})
    else:
        for path, reason in found.damaged.items():
            click.echo(f"damaged: {shown(path)}: {shown(reason)}")
        for sample in found.broken:
            click.echo(f"broken: {_named(sample)}")
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in found.captions.items()) or "none"
        click.echo(
            f"{_counted(found.samples, 'sample')}: {len(found.broken):,} broken, "
            f"{found.without_caption:,} without a "
            f"caption; samples with captions: {kinds}; damaged files: {len(found.damaged)}"
        )
    if not ok:
        ctx.exit(1)


def _described(found: Inspection) -> list[str]:
    lines = []
    for shard in found.shards:
        without = f", {shard.without_picture:,} without a picture" if shard.without_picture else ""
        members = ", ".join(f"{name} {count:,}" for name, count in shard.extensions.items())
        lines.append(
            f"{shown(shard.path)}: {_counted(shard.samples, 'sample')}{without}, {_bytes(shard.size_bytes)} "
            f"({members})"
        )
    size_bytes = sum(shard.size_bytes for shard in found.shards)
    lines.append(
        f"{_counted(found.samples, 'sample')} in {_counted(len(found.shards), 'shard')}, "
        f"{_bytes(size_bytes)}, digest {found.digest[:16]}"
    )
    if found.looked_at:
        kinds = [
            f"{kind} in {count:,} ({mean:.1f} each)" for kind, (count, mean) in found.captions.items()
        ] or ["none"]
        unreadable = f", {found.unreadable} of them unreadable" if found.unreadable else ""
        lines.append(
            f"captions of {_counted(found.looked_at, 'sample')}{unreadable}: {', '.join(kinds)}; "
            f"a picture has {_bytes(found.picture_bytes)} (median)"
        )
    if found.stored is not None:
        count, views, columns = found.stored
        lines.append(
            f"stored by teachers: {_counted(views, 'view')} and embeddings of {columns:,} columns "
            f"(first of {count:,} looked at)"
        )
    if found.first is not None:
        key, captions = found.first
        lines.append(f"first sample: {shown(key)}")
        lines += [f"  {shown(kind)}: {shown(texts[0])}" for kind, texts in captions.items()]
    return lines


def _say_broken(notes: Notes, broken: tuple[Broken, ...], what: str) -> None:
    for sample in broken[:_SHOWN]:
        notes.say(f"{what}: {_named(sample)}")
    if len(broken) > _SHOWN:
        notes.say(f"{what}: {len(broken) - _SHOWN:,} more; --json and shards.json list them all")


def _named(sample: Broken) -> str:
    """Return what is wrong with a sample, with its key once: reasons of files begin with their path."""
    named = sample.reason.startswith(f"{sample.key!r}: ")
    return shown(sample.reason) if named else f"{shown(sample.key)}: {shown(sample.reason)}"


def _print_json(document: dict[str, object]) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **document}, ensure_ascii=False, indent=2))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
