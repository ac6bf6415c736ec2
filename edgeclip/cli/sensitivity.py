"""``edgeclip sensitivity``: what int8 costs a tower, product by product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ._options import Int8Choice, Notes, int8_options, prepare_stdout, shown

__all__ = ["sensitivity"]


@click.command(epilog="Example: edgeclip sensitivity run/model --int8-target cosine=0.99,top1=0.98 -o report")
@click.argument("checkpoint", metavar="CHECKPOINT|MODEL")
@click.option(
    "--tower", type=click.Choice(["image", "text"]), default="image", show_default=True, help="Which tower."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", "tensorrt"]),
    default="onnx",
    show_default=True,
    help="Whose int8: ONNX Runtime's or TensorRT's.",
)
@click.option("--target", metavar="TARGET", help="Processor or GPU it is for, such as x86-avx2.")
@click.option("--model", metavar="NAME", help="Model of a weights file that does not tell which it is.")
@int8_options(without_target="nothing is chosen", pictures="crops of edgeclip's photographs")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.  [default: usable cores]")
@click.option("--most", type=click.IntRange(min=1), default=20, show_default=True, help="Rows to show.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write the report and a plot here."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def sensitivity(
    *,
    checkpoint: str,
    tower: str,
    form: str,
    target: str | None,
    model: str | None,
    threads: int | None,
    most: int,
    output: Path | None,
    as_json: bool,
    **int8: Any,
) -> None:
    """Measure what int8 costs a tower: each product and each block, on the embedding.

    CHECKPOINT is a directory that training wrote, or a published weights file; MODEL is a name of `edgeclip
    models list` whose weights were pulled. With a target, says what has to stay float for it. What was
    measured is kept: a run that was stopped goes on where it was. Needs pip install "edgeclip[export]".
    """
    from edgeclip.export.options import Checkpoint
    from edgeclip.export.variants import parse_variants

    prepare_stdout()
    notes = Notes()
    (spec,) = parse_variants([f"{form}-int8"], target=target)
    choice = Int8Choice(**int8)
    asked = choice.search(output, threads)
    from edgeclip.export.sensitivity_search import search_checkpoint
    from edgeclip.labels import make_folder

    if output is not None:
        make_folder(output)

    try:
        report = search_checkpoint(
            Checkpoint(checkpoint, model),
            spec,
            asked,
            tower=tower,
            references=choice.references(),
            on_step=notes.progress,
        )
    except KeyboardInterrupt:
        notes.say("what was measured is kept: the same command goes on from there")
        raise
    finally:
        notes.done()
    if output is not None:
        notes.say(f"wrote {shown(output / f'{report.stem}.json')} and {shown(output / f'{report.stem}.svg')}")
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(report.to_table(most=most))
