"""``edgeclip heads reject``: the threshold from which a picture shows one of the labels offered at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._labelled import check_own, embed_labelled, labelled_options
from ._options import SCHEMA, ModelChoice, Notes, bundle_directory, prepare_stdout, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgeclip.bundle import Bundle
    from edgeclip.evaluate.rejection import RejectFit
    from edgeclip.label_sets import LabelSet
    from edgeclip.labels import LabelBank
    from edgeclip.reject import RejectHead

__all__ = ["reject"]

EXIT_INCONCLUSIVE = 3
_FITTED_ON_CHARS = 120
_BANK = "background"
_DENIALS = ("a photo without a {}.", "a photo of something that is no {}.")


@dataclass(frozen=True, eq=False)
class _Fitted:
    """What is stored: the head, and the background bank where the bundle has none yet."""

    fit: RejectFit
    head: RejectHead
    background: LabelBank | None


@click.command()
@click.argument("bundle_path", metavar="BUNDLE")
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Folder a class, table or shards; the labels are the names that are offered.",
)
@click.option(
    "--false-accepts",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    metavar="SHARE",
    help="Share of pictures with no right label that may be accepted.",
)
@click.option(
    "--background",
    metavar="FILE",
    help="Label file of general names.  [default: the bundle's, else those of the embedded bundle]",
)
@click.option(
    "--method",
    type=click.Choice(["negatives", "no"]),
    default="negatives",
    show_default=True,
    help="Compare labels with general names, or with their own denials.",
)
@click.option(
    "--denial",
    "denials",
    multiple=True,
    metavar="TEMPLATE",
    help=f"Text that denies a label, for --method no; repeat it.  [default: {_DENIALS[0]!r} and another]",
)
@click.option("--write", is_flag=True, help="Store the head in the bundle.  [default: only say it]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of draws and folds.")
@click.option("--limit", type=click.IntRange(min=1), help="Pictures at most, spread over the data.")
@labelled_options
def reject(
    *,
    bundle_path: str,
    data: str,
    false_accepts: float,
    background: str | None,
    method: str,
    denials: tuple[str, ...],
    write: bool,
    seed: int,
    limit: int | None,
    max_left_out: str,
    variant: str,
    threads: int | None,
    cache_dir: Path | None,
    as_json: bool,
) -> int:
    """Fit the head with which 'classify --reject' gives no label to pictures that none fits.

    Pictures are offered names of the data, with their own among them and without; the threshold accepts the
    share asked for of the second kind, whatever the number of names. Rates are of names that it was not
    fitted on. Exit code 3 where the head tells the two kinds apart no better than the greatest softmax does;
    nothing is written then.

    Example: edgeclip heads reject my-bundle --data labelled/ --write
    """
    from edgeclip.bundle import Bundle
    from edgeclip.errors import ConfigError
    from edgeclip.evaluate.picture_sets import Picture, open_set
    from edgeclip.label_sets import Templates

    prepare_stdout()
    notes = Notes()
    if denials and method != "no":
        raise ConfigError("--denial: only --method no has denials; give it too, or leave --denial out.")
    if background is not None and method == "no":
        raise ConfigError("--background: --method no compares labels with their denials; leave it out.")
    templates = Templates.of(list(denials or _DENIALS)).texts
    pictures = open_set(data)
    opened = Bundle.open(bundle_directory(bundle_path, notes))
    if write:
        check_own(bundle_path)

    def usable(picture: Picture) -> str | tuple[str]:
        if picture.label is None:
            return "has no label; expected a column 'label' or a folder a class."
        return (picture.label,)

    model = ModelChoice(bundle_path, variant, "auto", "cpu", threads, cache_dir)
    general = None if background is None else _read(background)
    images, uses, left_out = embed_labelled(opened, pictures, usable, model, limit, max_left_out, notes)
    shown_names = [name for (name,) in uses]
    fitted = _fit(
        opened, model, images, shown_names, general, templates if method == "no" else (), false_accepts, seed
    )
    fit = fitted.fit
    written = write and fit.improves
    if written:
        _write(opened, pictures.path, fitted)
    if as_json:
        document = {
            "schema": SCHEMA,
            "kind": "reject",
            "bundle": str(opened.path),
            "left_out": left_out,
            "written": written,
            **fit.to_dict(),
        }
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        click.echo(_summary(fit, write=write, path=opened.path))
    return 0 if fit.improves else EXIT_INCONCLUSIVE


def _read(path: str) -> LabelSet:
    from edgeclip.label_sets import read_labels

    return read_labels(path)


def _fit(
    opened: Bundle,
    model: ModelChoice,
    images: NDArray[np.float32],
    shown_names: Sequence[str],
    general: LabelSet | None,
    denials: tuple[str, ...],
    false_accepts: float,
    seed: int,
) -> _Fitted:
    """Encode names and what stands against them, and fit."""
    from dataclasses import replace

    import numpy as np

    from edgeclip.bundle import Bundle
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.evaluate.rejection import fit_no, fit_reject
    from edgeclip.reject import read_background, read_reject_head

    names = sorted(set(shown_names))
    columns = {name: column for column, name in enumerate(names)}
    own = np.array([columns[name] for name in shown_names], np.intp)
    scale = opened.manifest.model.scale
    opening = ZeroShotClassifier.open(
        opened, variant=model.variant, options=model.options(), keep_text_tower=True
    )
    with closing(opening) as classifier:
        classifier.set_labels(names)
        labels = classifier.bank
        if denials:
            texts = [template.replace("{}", name) for name in names for template in denials]
            rows = (
                classifier.embed_texts(texts, truncate=True)
                .reshape(len(names), len(denials), -1)
                .mean(axis=1)
            )
            rows = np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)
            no = fit_no(labels, rows, images, own, scale=scale, false_accepts=false_accepts, seed=seed)
            return _Fitted(no, no.head(denials), None)
        if general is None and opened.manifest.background_bank is not None:
            bank, added = read_background(opened), None
        else:
            classifier.set_labels(general or read_background(Bundle.open("default")).labels)
            bank = added = classifier.bank
    fit = fit_reject(labels, bank, images, own, scale=scale, false_accepts=false_accepts, seed=seed)
    head = fit.head()
    if added is None:
        head = _with_rows_of(opened, head)
    elif general is None:  # the same names in the same order
        head = replace(head, kinds=read_reject_head(Bundle.open("default")).kinds)
    return _Fitted(fit, head, added)


def _with_rows_of(opened: Bundle, head: RejectHead) -> RejectHead:
    """Return a head with the background rows of the one that the bundle has, if it has one."""
    from dataclasses import replace

    from edgeclip.errors import ConfigError
    from edgeclip.reject import read_reject_head

    try:
        before = read_reject_head(opened)
    except ConfigError:
        return head
    return replace(head, bank_rows=before.bank_rows, more=before.more, kinds=before.kinds)


def _write(opened: Bundle, data: str, fitted: _Fitted) -> None:
    """Store the head in place of the bundle's other one, and the background where it is new."""
    from edgeclip.bundle import BundleWriter

    fit, bank = fitted.fit, fitted.background
    said = {"false_accepts": f"{fit.false_accepts:g}", "fitted": json.dumps(fit.to_dict())}
    with BundleWriter(opened.path) as writer:
        manifest = writer.manifest
        stored: dict[str, Any] = manifest.setdefault("heads", {})
        for name in [
            key for key, each in stored.items() if (each["kind"], each.get("bank")) == ("reject", None)
        ]:
            del stored[name]
        stored["reject"] = {
            "kind": "reject",
            "file": writer.add("heads/reject.safetensors", fitted.head.to_bytes(said)),
            "fitted_on": f"{Path(data).name}: {fit.pictures} pictures of {fit.names} labels"[
                -_FITTED_ON_CHARS:
            ],
        }
        if bank is not None:
            manifest.setdefault("label_banks", {})[_BANK] = {
                "file": writer.add(f"banks/{_BANK}.safetensors", bank.to_bytes(dtype="float16")),
                "labels": len(bank),
                "templates": bank.templates.name,
                "title": "general names, for what none of the labels fits",
            }
            manifest["background_bank"] = _BANK
        writer.commit()


def _summary(fit: RejectFit, *, write: bool, path: Path) -> str:
    lines = [
        f"{fit.pictures:,} pictures of {fit.names:,} labels",
        "threshold "
        + ", ".join(
            f"{least:.2f} for {offered}"
            for least, offered in zip(fit.together or fit.threshold, fit.offered, strict=True)
        )
        + " labels",
    ]
    for offered, areas in fit.auroc.items():
        lines.append(
            f"{offered + ' labels:':11} area under the ROC curve {areas['gate']:.3f}; greatest cosine "
            f"{areas['cosine']:.3f}, greatest softmax {areas['softmax']:.3f}"
        )
    lines += [
        f"{f'{rates.offered} offered:':11} {rates.true_accepts:.1%} accepted with the right label, "
        f"{rates.false_accepts:.1%} without (labels it was not fitted on)"
        for rates in fit.rates
    ]
    if not fit.improves:
        lines.append("no better than the greatest softmax, so nothing is written")
    elif write:
        lines.append(f"stored in {shown(path)}")
    else:
        lines.append("nothing is written without --write")
    return "\n".join(lines)
