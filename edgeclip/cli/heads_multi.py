"""``edgeclip heads multi``: the threshold from which a label of a bank is given, beside others or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._labelled import bank_of, check_own, embed_labelled, labelled_options, store_for_bank
from ._options import SCHEMA, ModelChoice, Notes, bundle_directory, prepare_stdout, shown

if TYPE_CHECKING:
    from edgeclip.bundle import Bundle
    from edgeclip.multi import MultiFit

__all__ = ["multi"]

EXIT_INCONCLUSIVE = 3


@click.command()
@click.argument("bundle_path", metavar="BUNDLE")
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Table or shards, labelled with names of the bank; several are separated by '|'.",
)
@click.option("--bank", metavar="NAME", help="Label bank of the bundle.  [default: its default bank]")
@click.option("--write", is_flag=True, help="Store the threshold in the bundle.  [default: only say it]")
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True, help="Held-out parts.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the parts.")
@click.option("--limit", type=click.IntRange(min=1), help="Pictures at most, spread over the data.")
@labelled_options
def multi(
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
    """Fit the threshold with which 'classify --multi' gives the labels of a bank, each judged by itself.

    The threshold with the best F1 is taken; what it is worth is measured on pictures that it was not fitted
    on, beside giving each picture its first label alone, with 95 % intervals. Exit code 3 where it is not
    better than that; nothing is written then.

    Example: edgeclip heads multi my-bundle --data several.csv --write
    """
    import numpy as np

    from edgeclip.bundle import Bundle
    from edgeclip.evaluate.picture_sets import Picture, open_set
    from edgeclip.heads import cosines
    from edgeclip.labels import LabelBank
    from edgeclip.multi import fit_multi

    prepare_stdout()
    notes = Notes()
    pictures = open_set(data)
    opened = Bundle.open(bundle_directory(bundle_path, notes))
    name = bank_of(opened, bank)
    if write:
        check_own(bundle_path)
    labels = LabelBank.from_bytes(
        opened.read(opened.manifest.label_banks[name].file), source=f"label bank {name!r}"
    )
    columns = {each: row for row, each in enumerate(labels.names)}

    def usable(picture: Picture) -> tuple[int, ...] | str:
        if picture.label is None:
            return "has no label; expected a column 'label', several separated by '|'."
        names = [each.strip() for each in picture.label.split("|")]
        unknown = [each for each in names if each not in columns]
        if unknown:
            return f"has the label {unknown[0][:80]!r}, which is not in the bank {name!r}."
        return tuple(columns[each] for each in names)

    model = ModelChoice(bundle_path, variant, "auto", "cpu", threads, cache_dir)
    images, uses, left_out = embed_labelled(opened, pictures, usable, model, limit, max_left_out, notes)
    truth = np.zeros((len(uses), len(labels)), np.bool_)
    for row, of_picture in enumerate(uses):
        truth[row, list(of_picture)] = True
    fit = fit_multi(cosines(images, labels.embeddings), truth, folds=folds, seed=seed)
    written = write and fit.improves
    if written:
        _write(opened, name, pictures.path, fit)
    if as_json:
        document = {
            "schema": SCHEMA,
            "kind": "multi",
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


def _write(opened: Bundle, bank: str, data: str, fit: MultiFit) -> None:
    """Store the threshold in place of the bank's other one, if it has one."""
    import numpy as np

    from edgeclip.multi import METHOD
    from edgeclip.tensors import write_tensors

    content = write_tensors(
        {"threshold": np.array([fit.threshold], np.float32)},
        {"method": METHOD, "bank": bank, "pictures": str(fit.pictures), "f1": f"{fit.f1['value']:.4f}"},
    )
    said = f"{Path(data).name}: {fit.pictures} pictures"
    store_for_bank(opened, bank, kind="reject", name="multi", content=content, said=said)


def _summary(bank: str, offered: int, fit: MultiFit, *, write: bool, path: Path) -> str:
    def figure(of: dict[str, float]) -> str:
        return f"{of['value']:.1%} [{of['low']:.1%}, {of['high']:.1%}]"

    folds = fit.fold_thresholds
    lines = [
        f"bank {bank!r}: {fit.pictures:,} pictures, {fit.labels_a_picture:.3g} of {offered:,} labels each",
        f"threshold {fit.threshold:.3f} standard deviations; folds {min(folds):.3f} to {max(folds):.3f}",
        f"F1 on held-out pictures {figure(fit.f1)}; precision {fit.precision:.1%}, recall {fit.recall:.1%}",
        f"F1 of the first label alone {figure(fit.first_alone)}",
    ]
    if not fit.improves:
        lines.append("not better than the first label alone, so nothing is written")
    elif write:
        lines.append(f"stored in {shown(path)}")
    else:
        lines.append("nothing is written without --write")
    return "\n".join(lines)
