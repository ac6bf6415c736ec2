"""``edgeclip bench loadgen``: what MLPerf's LoadGen says of the same classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._bench_parts import command_line, labels_asked, pictures_of, show_document, sources_of
from ._options import (
    BACKENDS,
    LabelChoice,
    Notes,
    bundle_directory,
    check_output,
    output_options,
    prepare_stdout,
    workload_options,
)

if TYPE_CHECKING:
    from edgeclip.bench.loadgen_report import Given

__all__ = ["loadgen"]


@click.command(epilog="Example: edgeclip bench loadgen default --threads 2 --input decoded --input file")
@click.argument("bundle", default="default", metavar="[BUNDLE]")
@click.option("--variant", default="auto", show_default=True, help="Variant to measure.")
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Inference engine."
)
@click.option("--device", default="cpu", show_default=True, help="As for bench.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the tower.  [default: usable cores]")
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures a call in Offline."
)
@click.option(
    "--input",
    "given",
    multiple=True,
    type=click.Choice(["decoded", "file"]),
    help="Pictures decoded and resized beforehand, as MLPerf has it, or the bytes of their files. "
    "Repeatable.  [default: decoded]",
)
@workload_options
@click.option(
    "--rounds", type=click.IntRange(min=1), default=6, show_default=True, help="Turns of each side."
)
@click.option(
    "--turn",
    "turn_s",
    type=click.FloatRange(min=0.1, max=3600),
    metavar="SECONDS",
    default=2.0,
    show_default=True,
    help="A turn takes at least so long; MLPerf's is 600.",
)
@click.option(
    "--min-queries",
    type=click.IntRange(min=1),
    metavar="N",
    default=100,
    show_default=True,
    help="A turn answers at least so many pictures; LoadGen needs 64 in SingleStream.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of every order.")
@click.option(
    "--keep-logs",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep LoadGen's own logs, a folder for each turn.",
)
@output_options
def loadgen(
    *,
    bundle: str,
    variant: str,
    backend: str,
    device: str,
    threads: int | None,
    batch: int,
    given: tuple[Given, ...],
    images: Path | None,
    labels: str | None,
    label_file: Path | None,
    templates: str | None,
    language: str | None,
    rounds: int,
    turn_s: float,
    min_queries: int,
    seed: int,
    keep_logs: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Let MLPerf's LoadGen drive BUNDLE in SingleStream and Offline, in turns with our own loops.

    It checks our clock against one that many know; it is no MLPerf result, whatever LoadGen calls valid.
    Needs the extra "loadgen".
    """
    prepare_stdout()
    check_output("--output", output)
    offered = LabelChoice(labels, label_file, templates, language)
    offered.check()
    from edgeclip.bench.loadgen import LoadGenPlan, check, require_loadgen
    from edgeclip.bench.targets import Target

    require_loadgen()  # before anything is downloaded
    notes = Notes()
    pictures_source, labels_source = sources_of(images, offered)
    plan = LoadGenPlan(
        target=Target(bundle_directory(bundle, notes), variant, backend, device, threads, batch),
        pictures=pictures_of(images, notes),
        labels=labels_asked(offered),
        pictures_source=pictures_source,
        labels_source=labels_source,
        given=tuple(dict.fromkeys(given)) or ("decoded",),
        rounds=rounds,
        turn_s=turn_s,
        min_queries=min_queries,
        seed=seed,
        logs=keep_logs,
        command=command_line(),
    )
    try:
        found = check(plan, notes.progress)
    finally:
        notes.done()
    show_document(found, output, notes, as_json=as_json)
