"""``edgeclip index``: the embeddings of all pictures of a folder in one file, kept up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    SCHEMA,
    ModelChoice,
    Notes,
    batch_size_option,
    bundle_directory,
    duration,
    model_choice,
    prepare_stdout,
    shown,
)

if TYPE_CHECKING:
    from edgeclip.index import IndexProgress, IndexReport
    from edgeclip.index_file import MadeWith

__all__ = ["index", "indexed_variant"]


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the index here, where DIR is read-only.  [default: DIR/.edgeclip-index]",
)
@model_choice
@batch_size_option
@click.option("--verify", is_flag=True, help="Compare contents, not times; try broken pictures again.")
@click.option("--rebuild", is_flag=True, help="Embed everything anew, as with another bundle or variant.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def index(
    ctx: click.Context,
    *,
    folder: Path,
    output: Path | None,
    model: ModelChoice,
    batch_size: int | None,
    verify: bool,
    rebuild: bool,
    as_json: bool,
) -> None:
    """Index the pictures of a folder, so that `edgeclip search` finds them.

    Embeddings go to one file, DIR/.edgeclip-index. Run it again after pictures came, changed, moved or went:
    only what is new is embedded. Stopped at any moment, the same command goes on where it was, and an older
    index stays as it is until the new one is done. A picture that cannot be read is reported once, and tried
    again when it changes; the exit code is then 1.

    Example: edgeclip index photos/
    """
    from edgeclip.bundle import Bundle
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.index import made_with, update_index
    from edgeclip.index_file import INDEX_NAME

    prepare_stdout()
    notes = Notes()
    opened = Bundle.open(bundle_directory(model.bundle, notes))
    target = folder / INDEX_NAME if output is None else output
    chosen = model.variant if rebuild else indexed_variant(target, opened, model.variant)
    with ZeroShotClassifier.open(opened, variant=chosen, options=model.options()) as classifier:
        notes.on_choice(classifier.choice)
        made = made_with(opened, classifier.choice.variant)

        def on_progress(progress: IndexProgress) -> None:
            left = "" if progress.remaining_s is None else f", {duration(progress.remaining_s)} left"
            notes.progress(f"{progress.looked_at:,} of {progress.to_look_at:,} pictures{left}")

        try:
            report = update_index(
                folder,
                classifier,
                made,
                path=output,
                verify=verify,
                rebuild=rebuild,
                batch_size=batch_size,
                on_progress=on_progress,
                on_failure=lambda name, reason: notes.say(f"error: '{shown(folder / name)}': {reason}"),
                on_skipped=lambda path, reason: notes.say(
                    f"warning: folder '{shown(path)}' cannot be listed ({reason})"
                    + ("" if rebuild else "; what the index has of it stays")
                ),
            )
        except KeyboardInterrupt:
            notes.say("what is indexed so far is kept: the same command goes on")
            raise
        finally:
            notes.done()
    if report.repaired:
        notes.say(f"repaired: {report.repaired}")
    click.echo(
        json.dumps(_document(report, made), indent=2, ensure_ascii=False) if as_json else _said(report)
    )
    if not report.pictures:
        notes.say("no pictures found")
    if report.failed:
        ctx.exit(1)


def indexed_variant(path: Path, bundle: Any, variant: str) -> str:
    """Return the variant an index was made with, where ``auto`` was asked for and the bundle has it."""
    from edgeclip.errors import InputError
    from edgeclip.index_file import PictureIndex

    if variant != "auto":
        return variant
    try:
        made: MadeWith = PictureIndex(path).made_with
    except InputError:  # none yet, or a damaged one
        return variant
    same = made.space == bundle.manifest.model.embedding_space and made.variant in bundle.manifest.variants
    return made.variant if same else variant


def _said(report: IndexReport) -> str:
    """Return a report as one line."""
    changes = {
        "embedded": report.embedded,
        "from the interrupted run": report.resumed,
        "moved or copied": report.recognised,
        "removed": report.removed,
        "unreadable": len(report.broken.keys() | report.failed.keys()),
    }
    parts = [f"{count:,} {what}" for what, count in changes.items() if count]
    said = ", ".join(parts) or "nothing new"
    plural = "" if report.pictures == 1 else "s"
    return f"{report.pictures:,} picture{plural} in {shown(report.path)}: {said} ({report.seconds:.1f} s)"


def _document(report: IndexReport, made: MadeWith) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "score_kind": "none",
        "index": shown(report.path),
        "model": made.model,
        "embedding_space": made.space,
        "variant": made.variant,
        "pictures": report.pictures,
        "embedded": report.embedded,
        "resumed": report.resumed,
        "moved_or_copied": report.recognised,
        "removed": report.removed,
        "unchanged": report.unchanged,
        "unreadable": {shown(name): why for name, why in sorted({**report.broken, **report.failed}.items())},
        "failed_now": sorted(shown(name) for name in report.failed),
        "repaired": report.repaired or None,
        "wall_ms": round(report.seconds * 1e3, 3),
    }
