"""``edgeclip pipeline``: from a checkpoint to verified, gated deployment files, in one command for CI."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgeclip.tables import aligned

from ._options import SCHEMA, Notes, bundle_directory, prepare_stdout, shown

if TYPE_CHECKING:
    from edgeclip.export.artifacts import PipelineReport
    from edgeclip.export.pipeline import Planned
    from edgeclip.export.pipeline_recipe import PipelineRecipe

__all__ = ["pipeline"]

_RECIPES = "edgeclip.export.recipes"

_set = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe: model.checkpoint=run/model.",
)
_inconclusive = click.option(
    "--inconclusive",
    type=click.Choice(["pass", "fail"]),
    help="What a gate counts as that can say neither yes nor no.  [default: neither, exit code 3]",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(
    epilog="Example: edgeclip pipeline run ci-smoke --set model.checkpoint=run/model -o build/ci-smoke"
)
def pipeline() -> None:
    """Export, verify, time and judge a model by a recipe, for CI.

    Ends with 0 where every gate passed, 4 where one failed, 3 where one can say neither yes nor no.
    """


@pipeline.command(
    epilog="Example: edgeclip pipeline run cpu-int8 --set model.checkpoint=run/model -o build/cpu-int8"
)
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder for the bundle and the reports.",
)
@_set
@_inconclusive
@click.option("--force", is_flag=True, help="Do everything again.")
@click.option("--dry-run", is_flag=True, help="Check the recipe and say what would be done; write nothing.")
@_json
@click.pass_context
def run(
    ctx: click.Context,
    *,
    recipe: str,
    output: Path,
    changes: tuple[str, ...],
    inconclusive: Literal["pass", "fail"] | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run RECIPE; the same command again takes over what has not changed.

    RECIPE is a .toml file, whose paths are relative to its folder, or the name of a built-in recipe, whose
    paths are relative to the working directory: cpu-int8, raspberry-pi5, intel-openvino, jetson, rtx,
    ci-smoke. DIR gets bundle/, summary.md, junit.xml, report.json and model-card.md.
    """
    parsed, root = _parsed(recipe, changes)
    from edgeclip.export.pipeline import PipelineOptions, plan_pipeline, run_pipeline

    prepare_stdout()
    notes = Notes()
    options = PipelineOptions(
        root,
        output,
        inconclusive or "report",
        force=force,
        on_note=notes.say,
        on_progress=notes.progress,
    )
    if dry_run:
        click.echo(_plan(plan_pipeline(parsed, options), as_json=as_json))
        return
    try:
        report = run_pipeline(parsed, options)
    finally:
        notes.done()
    _show(report, output, as_json=as_json)
    ctx.exit(report.exit_code)


@pipeline.command(
    epilog="Example: edgeclip pipeline gate raspberry-pi5 -o build/raspberry-pi5 --report pi5.json"
)
@click.argument("recipe", metavar="RECIPE")
@click.option("--bundle", metavar="DIR", help="Bundle to judge by its manifest and the reports alone.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of a run to judge again, with what it measured; its reports are written anew.",
)
@click.option(
    "--report",
    "reports",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What a device reported; repeat it.",
)
@_set
@_inconclusive
@_json
@click.pass_context
def gate(
    ctx: click.Context,
    *,
    recipe: str,
    bundle: str | None,
    output: Path | None,
    reports: tuple[Path, ...],
    changes: tuple[str, ...],
    inconclusive: Literal["pass", "fail"] | None,
    as_json: bool,
) -> None:
    """Judge what is there by the gates of RECIPE; nothing is exported or measured.

    Reports count where they name the bundle by its digest. The gates of a recipe that need a measurement are
    inconclusive without the folder of its run.
    """
    if (bundle is None) == (output is None):
        raise click.UsageError("give --bundle or -o, one of them.")
    parsed, root = _parsed(recipe, changes, for_gates=True)
    from edgeclip.bundle import Bundle
    from edgeclip.export.device_report import read_device_report
    from edgeclip.export.pipeline import PipelineOptions, judge_bundle, judge_run

    prepare_stdout()
    read = [read_device_report(path) for path in reports]
    if output is not None:
        report = judge_run(parsed, PipelineOptions(root, output, inconclusive or "report"), read)
    else:
        opened = Bundle.open(bundle_directory(str(bundle), Notes()))
        report = judge_bundle(parsed, opened, read, inconclusive=inconclusive or "report")
    _show(report, output, as_json=as_json)
    ctx.exit(report.exit_code)


def _parsed(recipe: str, changes: Iterable[str], *, for_gates: bool = False) -> tuple[PipelineRecipe, Path]:
    """Return a recipe and the folder its paths are relative to."""
    from edgeclip.distill.recipe_text import find_recipe
    from edgeclip.export.pipeline_recipe import parse_pipeline

    content, root, where = find_recipe(recipe, _RECIPES)
    return parse_pipeline(content, where=where, changes=changes, for_gates=for_gates), root


# --- what is said ------------------------------------------------------------------------------------------


def _show(report: PipelineReport, output: Path | None, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
        return
    rows = [("gate", "verdict", "of", "got", "expected")]
    for verdict in report.verdicts:
        for number, finding in enumerate(verdict.findings):
            first = (verdict.gate, verdict.status) if number == 0 else ("", "")
            rows.append((*first, finding.subject, finding.got, finding.limit))
    for line in aligned(rows):
        click.echo(line)
    for verdict in report.verdicts:
        for finding in verdict.telling:
            if finding.reason and verdict.status != "passed":
                click.echo(f"{verdict.gate}: {finding.subject}: {finding.reason}")
    for remark in report.remarks:
        click.echo(f"note: {remark}")
    where = "" if output is None else f"; see {shown(output / 'summary.md')}"
    click.echo(f"{report.recipe}: {report.status}{where}")


def _plan(planned: Sequence[Planned], *, as_json: bool) -> str:
    if as_json:
        said: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "pipeline-plan",
            "dry_run": True,
            "stages": [vars(each) for each in planned],
        }
        return json.dumps(said, indent=2, ensure_ascii=False)
    return "\n".join(
        aligned([("stage", "what", ""), *((each.name, each.what, each.outcome) for each in planned)])
    )
