"""``edgeclip labels``: build label banks and look into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import (
    SCHEMA,
    LabelChoice,
    ModelChoice,
    Notes,
    bundle_directory,
    label_options,
    model_options,
    prepare_stdout,
    shown,
)

if TYPE_CHECKING:
    from edgeclip.labels import LabelBank

__all__ = ["labels"]

_PAIRS = 5


@click.group()
def labels() -> None:
    """Build and inspect label banks: labels as embeddings, ready to classify with.

    Example: edgeclip labels build --labels "cat,dog" -o pets.safetensors
    """


@labels.command()
@model_options
@label_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the bank to this .safetensors file."
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float32",
    show_default=True,
    help="Precision in the file.",
)
def build(
    *,
    bundle: str,
    variant: str,
    backend: str,
    device: str,
    threads: int | None,
    cache_dir: Path | None,
    allow: tuple[str, ...],
    labels: str | None,
    label_file: Path | None,
    templates: str | None,
    language: str | None,
    output: Path | None,
    dtype: Any,
) -> None:
    """Encode labels, so that classifying with them starts at once.

    The embeddings go to the cache of this host, and with -o to a file for 'classify --label-file'. A build
    that is stopped continues where it was when it is run again.

    Example: edgeclip labels build --labels "cat,dog" --templates openai-7 -o pets.safetensors
    """
    offered = LabelChoice(labels, label_file, templates, language)
    offered.check(required=True)
    if output is not None and output.suffix.lower() != ".safetensors":
        raise click.BadParameter(f"{str(output)!r} does not end in .safetensors.", param_hint="--output")
    model = ModelChoice(bundle, variant, backend, device, threads, cache_dir, allow)
    from edgeclip.classify import ZeroShotClassifier

    prepare_stdout()
    notes = Notes()
    opened = bundle_directory(model.bundle, notes)
    with ZeroShotClassifier.open(opened, variant=model.variant, options=model.options()) as classifier:
        offered.apply(classifier, notes)
        bank = classifier.bank
    if output is not None:
        bank.save(output, dtype=dtype)
    where = "in the cache of this host" if output is None else f"in {shown(output)}"
    click.echo(f"{_summary(bank)} {where}")


@labels.command()
@click.argument("bank", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(bank: Path, as_json: bool) -> None:
    """Show what is in BANK, a file of 'labels build' or an .npy file, and which labels are most alike.

    Example: edgeclip labels inspect pets.safetensors
    """
    from edgeclip.labels import LabelBank

    prepare_stdout()
    opened = LabelBank.open(bank)
    pairs = _closest(opened)
    if as_json:
        document = {
            "schema": SCHEMA,
            "labels": [label.to_json() for label in opened.labels.labels],
            "embed_dim": opened.embeddings.shape[1],
            "templates": {"name": opened.templates.name, "texts": list(opened.templates.texts)},
            "embedding_space": opened.space,
            "truncated": list(opened.truncated),
            "closest": [{"a": a, "b": b, "similarity": round(cosine, 6)} for cosine, a, b in pairs],
        }
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
        return
    click.echo(_summary(opened))
    click.echo(f"embedding space: {opened.space[:16] or 'not stated'}")
    names = ", ".join(opened.names[:20])
    click.echo(f"labels: {names}{', …' if len(opened) > 20 else ''}")
    if opened.truncated:
        click.echo(f"cut at the context length: {len(opened.truncated)}, first {opened.truncated[0][:40]!r}")
    for cosine, a, b in pairs:
        click.echo(f"  {cosine:.3f}  {a} | {b}")


def _summary(bank: LabelBank) -> str:
    noun = "label" if len(bank) == 1 else "labels"
    return f"{len(bank):,} {noun} × {bank.embeddings.shape[1]} dimensions, templates {bank.templates.name!r}"


def _closest(bank: LabelBank) -> list[tuple[float, str, str]]:
    """Return the pairs of labels whose embeddings are most alike, at most five, the closest first."""
    import numpy as np

    found: list[tuple[float, str, str]] = []
    rows = np.asarray(bank.embeddings)
    for start in range(0, len(rows), 1024):  # blocks: the whole product of 100,000 labels would be 40 GB
        similarity = rows[start : start + 1024] @ rows[start:].T
        similarity[
            np.tril_indices(len(similarity), m=similarity.shape[1])
        ] = -2  # each pair once, none with itself
        best = np.argpartition(similarity, -min(_PAIRS, similarity.size), axis=None)[-_PAIRS:]
        for a, b in zip(*np.unravel_index(best, similarity.shape), strict=True):
            if similarity[a, b] >= -1.5:
                found.append((float(similarity[a, b]), bank.names[start + a], bank.names[start + b]))
    return sorted(found, key=lambda pair: -pair[0])[:_PAIRS]
