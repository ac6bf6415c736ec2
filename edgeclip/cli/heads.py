"""``edgeclip heads``: fit what turns similarities into scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._labelled import bank_of, check_own, embed_labelled, labelled_options, store_for_bank
from ._options import (
    SCHEMA,
    ModelChoice,
    Notes,
    bundle_directory,
    prepare_stdout,
    shown,
)
from .heads_fit import add, fit, remove
from .heads_multi import multi
from .heads_reject import reject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeclip.bundle import Bundle
    from edgeclip.confidence import Reliability, TemperatureFit
    from edgeclip.evaluate.picture_sets import Picture, PictureSet
    from edgeclip.labels import LabelBank

__all__ = ["heads"]

EXIT_INCONCLUSIVE = 3


@click.group()
def heads() -> None:
    """Fit heads: what turns similarities into scores.

    Example: edgeclip heads temperature my-bundle --data labelled/
    """


for _command in (multi, reject, fit, add, remove):
    heads.add_command(_command)


@heads.command()
@click.argument("bundle_path", metavar="BUNDLE")
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Folder a class, table or shards, labelled with the bank's names.",
)
@click.option("--bank", metavar="NAME", help="Label bank of the bundle.  [default: its default bank]")
@click.option("--write", is_flag=True, help="Store the temperature in the bundle.  [default: only say it]")
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Held-out parts.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the parts.")
@click.option("--limit", type=click.IntRange(min=1), help="Pictures at most, spread over the data.")
@labelled_options
def temperature(
    *,
    bundle_path: str,
    data: str,
    bank: str | None,
    write: bool,
    folds: int,
    seed: int,
    limit: int | None,
    max_left_out: str,
    variant: str,
    threads: int | None,
    cache_dir: Path | None,
    as_json: bool,
) -> int:
    """Fit the temperature of a label bank, so that scores are right as often as they say.

    The order of labels stays as it is; 'classify --min-confidence' gets a meaning. The calibration error is
    measured before, and after on pictures that the temperature was not fitted on, with 95 % intervals. Exit
    code 3 where held-out pictures are not more likely than before; nothing is written then.

    Example: edgeclip heads temperature my-bundle --data labelled/ --write
    """
    from edgeclip.bundle import Bundle
    from edgeclip.confidence import fit_temperature
    from edgeclip.evaluate.picture_sets import open_set
    from edgeclip.heads import cosines, temperature_head

    prepare_stdout()
    notes = Notes()
    pictures = open_set(data)
    opened = Bundle.open(bundle_directory(bundle_path, notes))
    name = bank_of(opened, bank)
    if write:
        check_own(bundle_path)
    model = ModelChoice(bundle_path, variant, "auto", "cpu", threads, cache_dir)
    labels, images, targets, left_out = _embed(opened, name, pictures, model, limit, max_left_out, notes)
    before = temperature_head(opened, name).scale
    fit = fit_temperature(
        cosines(images, labels.embeddings), targets, scale_before=before, folds=folds, seed=seed
    )
    written = write and fit.improves
    if written:
        _write(opened, name, pictures.path, fit)
    if as_json:
        document = {
            "schema": SCHEMA,
            "kind": "temperature",
            "bundle": str(opened.path),
            "bank": name,
            "labels_offered": len(labels),
            "left_out": left_out,
            "written": written,
            **fit.to_dict(),
        }
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        click.echo(_summary(name, len(labels), fit, write=write, path=opened.path))
    return 0 if fit.improves else EXIT_INCONCLUSIVE


def _embed(
    opened: Bundle,
    name: str,
    pictures: PictureSet,
    model: ModelChoice,
    limit: int | None,
    max_left_out: str,
    notes: Notes,
) -> tuple[LabelBank, NDArray[np.float32], NDArray[np.intp], int]:
    """Return the bank, embeddings ``(N, E)``, columns of their labels, and how many are left out."""
    import numpy as np

    from edgeclip.labels import LabelBank

    entry = opened.manifest.label_banks[name]
    bank = LabelBank.from_bytes(opened.read(entry.file), source=f"label bank {name!r}")
    columns = {each: row for row, each in enumerate(bank.names)}

    def usable(picture: Picture) -> int | str:
        if picture.label is None:
            return "has no label; expected a column 'label' or a folder a class."
        if picture.label not in columns:
            return f"has the label {picture.label[:80]!r}, which is not in the bank {name!r}."
        return columns[picture.label]

    images, uses, left_out = embed_labelled(opened, pictures, usable, model, limit, max_left_out, notes)
    return bank, images, np.array(uses, np.intp), left_out


def _write(opened: Bundle, bank: str, data: str, fit: TemperatureFit) -> None:
    """Store the head in place of the bank's other one, if it has one."""
    import numpy as np

    from edgeclip.tensors import write_tensors

    content = write_tensors(
        {"scale": np.array([fit.scale], np.float32)},
        {
            "bank": bank,
            "pictures": str(fit.after.n),
            "labels": str(fit.labels),
            "ece_before": f"{fit.before.error:.4f}",
            "ece_after": f"{fit.after.error:.4f}",
        },
    )
    said = f"{Path(data).name}: {fit.after.n} pictures of {fit.labels} labels"
    store_for_bank(opened, bank, kind="temperature", name="temperature", content=content, said=said)


def _summary(bank: str, offered: int, fit: TemperatureFit, *, write: bool, path: Path) -> str:
    right, folds = fit.after.accuracy, fit.fold_scales
    counts = f"{fit.after.n:,} pictures of {fit.labels:,} of its {offered:,} labels"
    fitted = f"temperature {fit.temperature:.4g}; folds {min(folds):.4g} to {max(folds):.4g}"
    lines = [
        f"bank {bank!r}: {counts}, {right:.1%} right",
        f"scale {fit.scale_before:.4g} -> {fit.scale:.4g} ({fitted})",
        _line("before", fit.before),
        _line("after, held out", fit.after),
    ]
    if not fit.improves:
        lines.append("not better on held-out pictures, so nothing is written")
    elif write:
        lines.append(f"stored in {shown(path)}")
    else:
        lines.append("nothing is written without --write")
    return "\n".join(lines)


def _line(what: str, said: Reliability) -> str:
    return (
        f"{what + ':':17} calibration error {said.error:.1%} ({said.low:.1%} to {said.high:.1%}), mean score "
        f"{said.score:.1%}, NLL {said.nll:.3f}"
    )
