"""``edgeclip models``: which models edgeclip knows, what is known of them, and their weights from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeclip.tables import aligned

if TYPE_CHECKING:
    from edgeclip.models.zoo import ModelEntry

__all__ = ["models"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_PRUNED, _NO_WEIGHTS = "pruned", "none"
_LEGEND = """
image, text: millions of parameters before folding; pruned: the masks in the file decide.
preprocessing: interpolation, then the range of pixels, or OpenAI's mean and deviation.
Accuracies are the publishers' and were not measured here; run here: with the real weights."""


def _list_options(command: _Command) -> _Command:
    command = click.option("--family", metavar="NAME", help="Only the models of this family.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


@click.group(invoke_without_command=True)
@_list_options
@click.pass_context
def models(ctx: click.Context, family: str | None, as_json: bool) -> None:
    """List the models edgeclip knows, and download their weights.

    Without a subcommand, lists them.

    Example: edgeclip models show MobileCLIP2-S0
    """
    if ctx.invoked_subcommand is None:
        _print_list(family, as_json=as_json)
    elif family or as_json:
        raise click.UsageError(f"give the options after {ctx.invoked_subcommand!r}.")


@models.command("list")
@_list_options
def list_(family: str | None, as_json: bool) -> None:
    """List models: size of each tower, input, preprocessing, licence, published accuracy.

    What all models of a family share stands in its heading. Accuracies are the publishers', not ours.

    Example: edgeclip models list --family TinyCLIP
    """
    _print_list(family, as_json=as_json)


@models.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(name: str, as_json: bool) -> None:
    """Show everything that is known about the model NAME.

    Example: edgeclip models show MobileCLIP2-S0
    """
    from dataclasses import asdict
    from textwrap import fill

    from edgeclip.models.zoo import model_entry

    entry = model_entry(name)
    document = _facts(entry)
    if as_json:
        config = {"kind": entry.config.image.kind, **asdict(entry.config.image)}
        text = getattr(entry.config, "text", None)
        document["image"] = config
        document["text"] = None if text is None else {"kind": text.kind, **asdict(text)}
        click.echo(json.dumps({"schema": 1, "model": document}, indent=2, ensure_ascii=False))
        return
    rows = _shown(entry)
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        first, rest = f"{label.ljust(width)}  ", " " * (width + 2)
        click.echo(fill(value, 98, initial_indent=first, subsequent_indent=rest, break_long_words=False))


@models.command()
@click.argument("name")
@click.option("--accept-licence", is_flag=True, help="Accept a licence that allows research only.")
@click.option(
    "--revision",
    metavar="REV",
    help="Commit, tag or branch.  [default: that of the first download, else the newest]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Directory to download to.  [default: the user's cache]",
)
def pull(name: str, accept_licence: bool, revision: str | None, output: Path | None) -> None:
    """Download the weights of the model NAME from the hub and print where they are.

    The commit and the sha256 of the first download are recorded in a receipt beside the file; later
    downloads stay on them unless --revision says otherwise. Needs pip install "edgeclip[hub]".

    Example: edgeclip models pull TinyCLIP-ViT-8M-16-Text-3M
    """
    from edgeclip.cli._options import Notes
    from edgeclip.errors import ConfigError
    from edgeclip.hub import WantedFile, weights_directory
    from edgeclip.hub import pull as pull_file
    from edgeclip.models.zoo import model_entry

    entry = model_entry(name)
    weights, licence = entry.weights, entry.licence
    if weights is None or licence is None:
        raise ConfigError(f"model {name!r} has no published weights: it is an architecture to train.")
    if weights.repo is None:
        raise ConfigError(
            f"the weights of {name!r} are not on the hub: download {weights.files[0]!r} from {weights.url} "
            "yourself and give its path where a checkpoint is asked for."
        )
    notes = Notes()
    where = f" {licence.url}" if licence.url else ""
    notes.say(f"weights of {name}: licence {licence.identifier} ({licence.name}){where}")
    if licence.research_only and not accept_licence:
        raise ConfigError(
            f"the weights of {name!r} may be used for research only ({licence.identifier}): read the "
            "licence, and say --accept-licence if you accept it."
        )
    wanted = WantedFile(
        repo=weights.repo,
        files=weights.files,
        revision=revision,
        default_revision=weights.revision,
        sha256=None if revision else weights.sha256,
    )
    try:
        pulled = pull_file(
            wanted,
            output or weights_directory(name),
            licence=licence.identifier,
            accepted=accept_licence,
            progress=notes.on_download,
        )
    finally:
        notes.done()
    receipt = pulled.receipt
    state = "downloaded" if pulled.downloaded else "already here"
    notes.say(
        f"{state}: {receipt.repo} at {receipt.revision}, {receipt.size_bytes / 1e6:,.1f} MB, "
        f"sha256 {receipt.sha256}"
    )
    click.echo(str(pulled.path))


# --- what is shown -----------------------------------------------------------------------------------------


def _entries(family: str | None) -> list[ModelEntry]:
    from edgeclip.errors import ConfigError
    from edgeclip.models.zoo import MODELS

    entries = list(MODELS.values())
    if family is None:
        return entries
    chosen = [entry for entry in entries if entry.family.lower() == family.lower()]
    if not chosen:
        families = dict.fromkeys(entry.family for entry in entries)
        raise ConfigError(f"no family is called {family!r}: there are {', '.join(families)}.")
    return chosen


def _facts(entry: ModelEntry) -> dict[str, Any]:
    """Return an entry as JSON values."""
    config, weights, licence, accuracy = entry.config, entry.weights, entry.licence, entry.accuracy
    return {
        "name": entry.name,
        "family": entry.family,
        "tag": entry.tag,
        "image_parameters": entry.image_parameters,
        "text_parameters": entry.text_parameters,
        "pruned_on_load": entry.pruned_on_load,
        "image_size_px": list(config.image_size_px),
        "context_length": entry.context_length,
        "embed_dim": entry.embed_dim,
        "tokenizer": entry.tokenizer,
        "preprocess": {
            "resize": config.resize,
            "interpolation": config.interpolation,
            "crop": config.crop,
            "mean": list(config.mean),
            "std": list(config.std),
        },
        "licence": None
        if licence is None
        else {
            "identifier": licence.identifier,
            "name": licence.name,
            "research_only": licence.research_only,
            "url": licence.url,
        },
        "weights": None
        if weights is None
        else {
            "repo": weights.repo,
            "files": list(weights.files),
            "naming": weights.naming,
            "url": weights.url,
            "revision": weights.revision,
            "sha256": weights.sha256,
        },
        "accuracy": None
        if accuracy is None
        else {"percent": accuracy.percent, "metric": accuracy.metric, "source": accuracy.source},
        "run_here": entry.run_here,
        "note": entry.note,
    }


def _print_list(family: str | None, *, as_json: bool) -> None:
    entries = _entries(family)
    if as_json:
        document = {"schema": 1, "models": [_facts(entry) for entry in entries]}
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    families = dict.fromkeys(entry.family for entry in entries)
    blocks = [_block([entry for entry in entries if entry.family == name]) for name in families]
    click.echo("\n\n".join(blocks))
    click.echo(_LEGEND)


# Columns that go into the heading where a whole family shares the value.
_COLUMNS: tuple[tuple[str, Callable[[ModelEntry], str]], ...] = (
    ("input", lambda entry: str(entry.config.image_size_px[0])),
    ("context", lambda entry: str(entry.context_length or "-")),
    ("dim", lambda entry: str(entry.embed_dim or "-")),
    ("preprocessing", lambda entry: _preprocessing(entry)),
    ("licence", lambda entry: _licence(entry)),
    ("run here", lambda entry: "yes" if entry.run_here else "no"),
)
_NUMBERS = {"image", "text", "input", "context", "dim", "top-1"}


def _block(entries: Sequence[ModelEntry]) -> str:
    """Return the part of the list that is about one family."""
    shared = {name: _only(map(form, entries)) for name, form in _COLUMNS}
    metric = _only(entry.accuracy.metric if entry.accuracy else "" for entry in entries)
    source = _only(entry.accuracy.source.partition(",")[0] if entry.accuracy else "" for entry in entries)
    heading = ", ".join(_said_once(name, value) for name, value in shared.items() if value not in (None, "-"))
    lines = [f"{entries[0].family}: {heading}"]
    if metric:
        lines.append(f"top-1: {metric}, from {source}")
    header = ["name", "image", "text", *(name for name, value in shared.items() if value is None)]
    rows = [header + (["top-1"] if metric else [])]
    for entry in entries:
        row = [
            entry.name,
            _millions(entry, entry.image_parameters),
            _millions(entry, entry.text_parameters),
            *(form(entry) for name, form in _COLUMNS if shared[name] is None),
        ]
        rows.append(row + ([f"{entry.accuracy.percent:.1f}"] if entry.accuracy else []))
    right = [place for place, name in enumerate(rows[0]) if name in _NUMBERS]
    return "\n".join([*lines, *(f"  {line}" for line in aligned(rows, right))])


def _said_once(name: str, value: str | None) -> str:
    """Return a value that a whole family shares, as its heading says it."""
    if name == "run here":
        return "run here" if value == "yes" else "never run here"
    return "no weights" if value == _NO_WEIGHTS else f"{name} {value}"


def _only(values: Iterable[str]) -> str | None:
    """Return the value if it is one and the same, else ``None``."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _millions(entry: ModelEntry, parameters: int | None) -> str:
    if parameters is None:
        return _PRUNED if entry.pruned_on_load else "-"
    return f"{parameters / 1e6:.1f}"


def _licence(entry: ModelEntry) -> str:
    if entry.licence is None:
        return _NO_WEIGHTS
    return entry.licence.identifier + (" (research only)" if entry.licence.research_only else "")


def _preprocessing(entry: ModelEntry) -> str:
    """Return how pictures are prepared, in few words: interpolation, then the range of pixels."""
    config = entry.config
    if config.mean == (0.0, 0.0, 0.0) and config.std == (1.0, 1.0, 1.0):
        scale = "0..1"
    elif config.mean == config.std == (0.5, 0.5, 0.5):
        scale = "-1..1"
    elif config.mean[0] == config.mean[1]:
        scale = f"(x-{config.mean[0] * 255:.0f})/{config.std[0] * 255:.0f}"
    else:
        scale = "OpenAI"
    return f"{config.interpolation} {scale}"


def _shown(entry: ModelEntry) -> list[tuple[str, str]]:
    """Return the lines of ``models show``."""
    config, weights, licence, accuracy = entry.config, entry.weights, entry.licence, entry.accuracy
    height, width = config.image_size_px

    def size(parameters: int | None) -> str:
        if parameters is None:
            return "decided by the masks in the file" if entry.pruned_on_load else "-"
        return f"{parameters:,} parameters"

    rows = [
        ("name", entry.name),
        ("family", entry.family),
        ("image tower", f"{config.image.kind}, {size(entry.image_parameters)}"),
    ]
    if isinstance(entry.tokenizer, str):
        kind = getattr(config, "text").kind  # noqa: B009
        rows += [
            ("text tower", f"{kind}, {size(entry.text_parameters)}"),
            ("tokenizer", f"{entry.tokenizer}, context {entry.context_length}"),
            ("embed dim", str(entry.embed_dim)),
        ]
    else:
        rows.append(("text tower", "none"))
    rows += [
        ("input", f"{height}×{width}"),
        ("resize", f"{config.resize}, {config.interpolation}, crop {config.crop}"),
        ("mean", ", ".join(f"{value:g}" for value in config.mean)),
        ("std", ", ".join(f"{value:g}" for value in config.std)),
    ]
    if licence is None or weights is None:
        rows.append(("weights", "none published"))
    else:
        rows += [
            (
                "licence",
                f"{licence.identifier}: {licence.name}" + (", research only" * licence.research_only),
            ),
            ("weights", f"{weights.files[0]} ({weights.naming} names)"),
            ("from", weights.url),
            ("revision", weights.revision or "not known beforehand; recorded at the first download"),
            ("sha256", weights.sha256 or "not known beforehand; the hub's is checked and recorded"),
        ]
    if accuracy is not None:
        rows.append(("accuracy", f"{accuracy.percent:.1f} % {accuracy.metric} ({accuracy.source})"))
    rows.append(("run here", "yes" if entry.run_here else "no: never run with the real weights"))
    if entry.note:
        rows.append(("note", entry.note))
    return rows
