"""``edgeclip reinforce``: let teachers look at shards once, and keep what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeclip.cli._options import SCHEMA, Notes, is_there, prepare_stdout, shown
from edgeclip.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from edgeclip.distill.recipe import TeacherSpec
    from edgeclip.distill.reinforce import ReinforceReport

__all__ = ["reinforce"]

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)")
_SHOWN = 20
_LINE_EVERY_S = 10.0


@click.command(
    epilog="Example: edgeclip reinforce shards --teacher run/model --augmentations 10 -o reinforced"
)
@click.argument("shards", nargs=-1, required=True, metavar="SHARDS...", type=click.Path(path_type=Path))
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="SPEC",
    help="DIR|FILE, MODEL:FILE or open-clip:MODEL:FILE; NAME=… names it.  Several times for several.",
)
@click.option(
    "--teachers",
    "teacher_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="[[teacher]] tables of any kind in TOML, as recipes have them, with their scales.",
)
@click.option(
    "--augmentations", type=click.IntRange(min=1), default=10, show_default=True, help="Views a picture."
)
@click.option(
    "--captions",
    metavar="FILE|MODEL",
    help='Further captions: JSONL with {"key": "000017", "captions": ["…"], "zh": ["…"]}, or '
    "open-clip:MODEL:FILE, a CoCa that writes them.",
)
@click.option(
    "--captions-per-picture",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="That a captioner writes.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Directory to make."
)
@click.option(
    "--crop-scale",
    type=(float, float),
    default=(0.08, 1.0),
    show_default=True,
    metavar="LO HI",
    help="Share of the picture that crops keep.",
)
@click.option(
    "--rand-augment",
    type=click.IntRange(0, 14),
    default=2,
    show_default=True,
    help="Operations of RandAugment a view; 0 for none.",
)
@click.option(
    "--rand-augment-magnitude",
    type=click.IntRange(0, 30),
    default=9,
    show_default=True,
    help="Their strength.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float16",
    show_default=True,
    help="Of the embeddings: bfloat16 in .pth.gz, the others in .npz, which is faster to read.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Views a teacher takes at once.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the views.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that make views."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--max-broken",
    default="1%",
    show_default=True,
    metavar="N|N%",
    help="Samples that may be left out because they cannot be read.",
)
@click.option("--dry-run", is_flag=True, help="Check everything on one sample and say what would be made.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def reinforce(
    shards: tuple[Path, ...],
    teachers: tuple[str, ...],
    teacher_file: Path | None,
    augmentations: int,
    captions: str | None,
    captions_per_picture: int,
    output: Path,
    crop_scale: tuple[float, float],
    rand_augment: int,
    rand_augment_magnitude: int,
    precision: str,
    batch_size: int,
    seed: int,
    workers: int,
    device: str,
    max_broken: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Store views of the pictures in SHARDS and teachers' embeddings of them, in DataCompDR's layout.

    SHARDS are .tar files, names with a range (train-{000..011}.tar) or folders of them. For each one DIR gets
    one of the same name, with all its members. A recipe trains on DIR with [[teacher]] kind = "stored". The
    same command again goes on where it was stopped. Several processes: torchrun --nproc-per-node 2 -m
    edgeclip reinforce …
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("edgeclip reinforce", extra="train", module="torch")
    from edgeclip.distill.captioner import CAPTIONER_PREFIX
    from edgeclip.distill.ranks import place_of_process
    from edgeclip.distill.reinforce import reinforce as make
    from edgeclip.distill.reinforce_plan import ReinforceOptions, open_plan
    from edgeclip.distill.samples import BrokenLimit

    prepare_stdout()
    notes = Notes()
    world, rank = place_of_process(device)
    specs = [*_of_command_line(teachers), *_of_file(teacher_file)]
    if not specs:
        raise click.UsageError("give --teacher or --teachers.")
    writes = captions is not None and captions.startswith(CAPTIONER_PREFIX)
    options = ReinforceOptions(
        augmentations=augmentations,
        crop_scale=crop_scale,
        rand_augment=rand_augment,
        rand_augment_magnitude=rand_augment_magnitude,
        precision=precision,  # type: ignore[arg-type]
        batch_size=batch_size,
        seed=seed,
        device=device,
        captions=None if captions is None or writes else Path(captions),
        captioner=captions if writes else None,
        captions_per_picture=captions_per_picture,
        workers=workers,
        limit=BrokenLimit.parse(max_broken),
    )
    plan = open_plan(
        shards, specs, options, root=Path(), progress=lambda path: notes.progress(f"reading {shown(path)}")
    )
    report = make(plan, output, rank=rank, world=world, dry_run=dry_run, progress=_reporting(notes))
    notes.done()
    for sample in report.broken[:_SHOWN]:
        notes.say(f"left out: {shown(sample.key)}: {shown(sample.reason)}")
    if len(report.broken) > _SHOWN:
        notes.say(f"left out: {len(report.broken) - _SHOWN:,} more; reinforcement.json lists them all")
    if as_json:
        if rank == 0:
            click.echo(json.dumps({"schema": SCHEMA, **report.to_dict()}, ensure_ascii=False, indent=2))
        return
    lines = _described(report, augmentations, captioned=captions is not None)
    if rank == 0:
        click.echo("\n".join(lines))
    else:
        notes.say(f"process {rank}: {lines[0]}")


def _of_command_line(said: Sequence[str]) -> list[TeacherSpec]:
    """Return the teachers of ``--teacher``; each has a name of its own."""
    from edgeclip.distill.recipe import CheckpointTeacher, OpenClipTeacher
    from edgeclip.models.zoo import MODELS

    found: list[TeacherSpec] = []
    names: set[str] = set()
    for text in said:
        match = None if is_there(text) else _NAMED.fullmatch(text)
        spec = match[2] if match else text
        kind, _, rest = spec.partition(":")
        if kind == "open-clip":
            model, colon, file = rest.partition(":")
            if not (model and colon and file):
                raise ConfigError(f"--teacher {text!r}: expected open-clip:MODEL:FILE.")
            name = _free(match[1] if match else model, names)
            found.append(OpenClipTeacher(name=name, model=model, pretrained=file))
        elif rest and kind in MODELS:
            name = _free(match[1] if match else kind, names)
            found.append(CheckpointTeacher(name=name, path=rest, model=kind))
        else:
            name = _free(match[1] if match else Path(spec).stem or "teacher", names)
            found.append(CheckpointTeacher(name=name, path=spec))
    return found


def _free(name: str, taken: set[str]) -> str:
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free


def _of_file(path: Path | None) -> Sequence[TeacherSpec]:
    from edgeclip.distill.recipe import parse_teachers, read_recipe_file

    if path is None:
        return ()
    return parse_teachers(read_recipe_file(path), where=f"teachers {str(path)!r}")


def _reporting(notes: Notes) -> Callable[[int, int], None]:
    """Return what shows how far this process is; shards that were there do not count for the speed."""
    began: float | None = None
    last = time.monotonic()
    first = 0

    def show(done: int, total: int) -> None:
        nonlocal began, last, first
        now = time.monotonic()
        if began is None:
            began, first = now, done
        speed = (done - first) / (now - began) if now > began else 0.0
        left = f", {speed:,.1f} samples/s, {(total - done) / speed / 60:.0f} min left" if speed else ""
        text = f"reinforced {done:,} of {total:,} samples{left}"
        if sys.stderr.isatty():
            notes.progress(text)
        elif now - last >= _LINE_EVERY_S:
            last = now
            notes.say(text)

    return show


def _described(report: ReinforceReport, augmentations: int, *, captioned: bool) -> list[str]:
    samples = max(1, report.samples)
    size, member, payload = (
        f"{count / samples / 1024:,.1f} KiB"
        for count in (report.size_bytes, report.embedding_bytes, report.payload_bytes)
    )
    would = "would be about " if report.status == "dry-run" else ""
    columns = [f"{name} in columns {low} to {high - 1}" for name, (low, high) in report.teachers.items()]
    lines = [
        (
            f"{report.samples:,} samples in {report.shards:,} shard{'s' * (report.shards != 1)} "
            f"({report.status}), {would}{report.size_bytes / 1e6:,.1f} MB, in {shown(report.directory)} "
            f"({len(report.broken)} left out)"
        ),
        f"a sample takes {size}, its embeddings {member} ({payload} of numbers, {augmentations} views)",
        f"teachers: {', '.join(columns)}",
    ]
    if captioned and report.status != "dry-run":
        hint = "" if report.captioned else "; 'edgeclip data inspect' shows a key as the file must have it"
        lines.append(f"{report.captioned:,} samples got further captions{hint}")
    if report.without_picture:
        lines.append(f"{report.without_picture:,} samples without a picture are left out")
    if not report.complete and report.status != "dry-run":
        lines.append("other processes are still at work, or were stopped: not all shards are there yet")
    return lines
