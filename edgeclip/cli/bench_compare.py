"""``edgeclip bench compare``: which of two is faster, or that it cannot be told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from ._options import Notes, bundle_directory, is_there, prepare_stdout, shown

if TYPE_CHECKING:
    from edgeclip.bench.targets import Target

__all__ = ["EXIT_CODES", "compare"]

EXIT_CODES: Final = {"same": 0, "faster": 0, "inconclusive": 3, "slower": 4}
_STAGES: Final = ("end_to_end", "decode", "resize", "tokenize", "text_tower", "image_tower", "head")
_MOST_PICTURES: Final = 64
_UNITS_S: Final = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0}


def _duration(_ctx: click.Context, _param: click.Parameter, said: str) -> float:
    """Return seconds, written as 60, 60s, 1.5m or 800ms."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|)", said.strip())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"{said!r}: expected a time above 0, such as 60s or 2m.")
    return float(match[1]) * _UNITS_S[match[2]]


def _share(_ctx: click.Context, _param: click.Parameter, said: str) -> float:
    """Return a share, written as 5% or 0.05."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", said.strip())
    share = 0.0 if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0.001 <= share <= 10:
        raise click.BadParameter(f"{said!r}: expected 0.1% to 1000%, such as 5% or 0.05.")
    return share


@click.command(
    epilog="Example: edgeclip bench compare my-bundle#onnx-fp32 my-bundle#onnx-int8,threads=1 --budget 30s"
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--stage",
    type=click.Choice(_STAGES),
    default="end_to_end",
    show_default=True,
    help="What is timed: file to label, or a stage of it.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help=f"Pictures, at most {_MOST_PICTURES}.  [default: edgeclip's photographs]",
)
@click.option("--labels", metavar="A,B,…|FILE", help="Labels offered.  [default: those of each bundle]")
@click.option("--templates", metavar="NAME|FILE", help="Prompts around --labels.  [default: the bundle's]")
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
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write JSON here, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def compare(
    ctx: click.Context,
    *,
    a: str,
    b: str,
    stage: str,
    images: Path | None,
    labels: str | None,
    templates: str | None,
    effect: float,
    budget: float,
    processes: int | None,
    inconclusive: Literal["pass", "fail"] | None,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say whether B is faster or slower than A, the same, or that it cannot be told.

    A and B are BUNDLE[#VARIANT][,backend=…][,device=…][,threads=N][,batch=N][,decode=fast]; BUNDLE is a
    directory, hf:ORG/NAME@REV or default. They take turns on the same pictures in fresh processes.

    \b
    same          whatever the difference is, it is smaller than --effect
    faster        B takes less time
    slower        B takes more time: a regression, exit code 4
    inconclusive  the interval allows too much, or the machine was disturbed: exit code 3
    """  # noqa: D301  # \b is click's mark for lines that stay as they are
    from edgeclip.errors import InputError

    prepare_stdout()
    if templates is not None and labels is None:
        raise click.UsageError("--templates needs --labels.")
    if output is not None and not output.resolve().parent.is_dir():
        raise InputError(f"--output {str(output)!r}: there is no directory {str(output.parent)!r}; make it.")
    notes = Notes()
    from edgeclip.bench.compare import ComparePlan
    from edgeclip.bench.compare import compare as run

    plan = ComparePlan(
        _target(a, notes),
        _target(b, notes),
        _pictures(images, notes),
        stage=stage,
        labels=None if labels is None else _labels(labels),
        templates=None if templates is None else _templates(templates),
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
    text = found.to_json()
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
        notes.say(f"wrote {shown(output)}")
    click.echo(text if as_json else found.to_table())
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


def _pictures(images: Path | None, notes: Notes) -> list[Path]:
    from edgeclip.data import read_samples
    from edgeclip.errors import InputError

    folder = Path(__file__).parent.parent / "assets" / "photos" if images is None else images
    sources = [sample.source for sample in read_samples([folder])]
    found = [source for source in sources if isinstance(source, Path)]
    if not found:
        held = "shards" if sources else "no pictures"
        raise InputError(
            f"--images {str(folder)!r} holds {held}, expected picture files; give a folder of them."
        )
    if len(found) > _MOST_PICTURES:
        notes.say(f"{_MOST_PICTURES} of {len(found):,} pictures are used, spread over all")
        found = [found[place * len(found) // _MOST_PICTURES] for place in range(_MOST_PICTURES)]
    return found


def _labels(said: str) -> tuple[Any, ...]:
    from edgeclip.label_sets import parse_labels, read_labels

    is_file = is_there(said) or ("," not in said and Path(said).suffix)
    return tuple(label.to_json() for label in (read_labels(said) if is_file else parse_labels(said)).labels)


def _templates(said: str) -> tuple[str, ...]:
    from ._options import templates_of

    return templates_of(said).texts
