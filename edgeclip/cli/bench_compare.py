"""``edgeclip bench compare``: which of two is faster, or that it cannot be told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from ._bench_parts import labels_asked, pictures_of, show_document
from ._options import (
    LabelChoice,
    Notes,
    bundle_directory,
    check_output,
    output_options,
    prepare_stdout,
    workload_options,
)

if TYPE_CHECKING:
    from edgeclip.bench.targets import Target

__all__ = ["EXIT_CODES", "compare"]

EXIT_CODES: Final = {"same": 0, "faster": 0, "inconclusive": 3, "slower": 4}
_STAGES: Final = ("end_to_end", "decode", "resize", "tokenize", "text_tower", "image_tower", "head")
_UNITS_S: Final = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0}


def _duration(_ctx: click.Context, _param: click.Parameter, said: str) -> float:
    """Return seconds, written as 60, 60s, 1.5m or 800ms."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|)", said.strip())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"{said!r}: expected a time above 0, such as 60s or 2m.")
    return float(match[1]) * _UNITS_S[match[2]]


def _share(_ctx: click.Context, _param: click.Parameter, said: str) -> float:
    """Return a share, written as 5% or 0.05; a bare 5 could be either, and would pass any regression."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", said.strip())
    share = 0.0 if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0.001 <= share <= 10 or (share >= 1 and not said.strip().endswith("%")):
        raise click.BadParameter(f"{said!r}: expected 0.1% to 1000%, or a share below 1, such as 5% or 0.05.")
    return share


@click.command(epilog="Example: edgeclip bench compare default,threads=1 default,threads=2 --budget 30s")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--stage",
    type=click.Choice(_STAGES),
    default="end_to_end",
    show_default=True,
    help="What is timed: file to label, or a stage of it.",
)
@workload_options
@click.option(
    "--effect",
    callback=_share,
    metavar="SHARE",
    default="5%",
    show_default=True,
    help="Smallest difference that matters.",
)
@click.option(
    "--budget",
    callback=_duration,
    metavar="TIME",
    default="60s",
    show_default=True,
    help="Time for all of it.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=8),
    metavar="N",
    help="Fresh processes, at least 8.  [default: what the budget carries, at most 20]",
)
@click.option(
    "--inconclusive",
    type=click.Choice(["pass", "fail"]),
    help="What an inconclusive comparison counts as: exit code 0 or 4.  [default: neither, 3]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order.")
@output_options
@click.pass_context
def compare(
    ctx: click.Context,
    *,
    a: str,
    b: str,
    stage: str,
    images: Path | None,
    labels: str | None,
    label_file: Path | None,
    templates: str | None,
    language: str | None,
    effect: float,
    budget: float,
    processes: int | None,
    inconclusive: Literal["pass", "fail"] | None,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say whether B is faster or slower than A, the same, or that it cannot be told.

    A and B are written BUNDLE[#VARIANT], settings behind it: my-bundle#onnx-int8,threads=2,batch=8 or
    default,backend=openvino,device=cpu,decode=fast. BUNDLE is a directory, hf:ORG/NAME@REV or default. They
    take turns on the same pictures in fresh processes.

    \b
    same          whatever the difference is, it is smaller than --effect
    faster        B takes less time
    slower        B takes more time: a regression, exit code 4
    inconclusive  the interval allows too much, or the machine was disturbed: exit code 3
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    prepare_stdout()
    offered = LabelChoice(labels, label_file, templates, language)
    offered.check()
    check_output("--output", output)
    notes = Notes()
    from edgeclip.bench.compare import ComparePlan
    from edgeclip.bench.compare import compare as run

    plan = ComparePlan(
        _target(a, notes),
        _target(b, notes),
        pictures_of(images, notes),
        stage=stage,
        labels=labels_asked(offered),
        effect=effect,
        budget_s=budget,
        processes=processes,
        seed=seed,
    )
    try:
        found = run(
            plan, on_progress=lambda done, planned: notes.progress(f"process {done} of {planned} at most")
        )
    finally:
        notes.done()
    show_document(found, output, notes, as_json=as_json)
    counts_as = {"pass": 0, "fail": 4, None: EXIT_CODES["inconclusive"]}
    ctx.exit(counts_as[inconclusive] if found.verdict == "inconclusive" else EXIT_CODES[found.verdict])


def _target(said: str, notes: Notes) -> Target:
    from edgeclip.bench.targets import parse_target
    from edgeclip.errors import InputError

    if Path(said).suffix.lower() == ".json":
        raise InputError(
            f"{said!r} is a report, expected a bundle: two runs at different times differ by more than "
            "either of them can tell. Give the bundles, which are then measured in turns."
        )
    target = parse_target(said)
    bundle_directory(target.bundle, notes)  # downloads what is not here, before anything is timed
    return target
