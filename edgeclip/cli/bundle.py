"""``edgeclip bundle``: look into bundles, slim, compare and pack them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._options import SCHEMA, LabelChoice, Notes, bundle_directory, prepare_stdout, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeclip.bundle import Bundle, Variant
    from edgeclip.bundle_tools import Difference, NewBank
    from edgeclip.labels import BankProgress, LabelBank, LabelSet, Templates

__all__ = ["bundle"]

_BANK_NAME = "labels"
_EXIT_DIFFERENT = 1

_output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the result goes."
)
_force = click.option("--force", is_flag=True, help="Replace what is there.")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group()
def bundle() -> None:
    """Inspect, slim, compare and pack bundles.

    A bundle is a directory with a manifest.json, or 'default' for the one that comes with edgeclip.

    Example: edgeclip bundle inspect default
    """


# --- inspect -----------------------------------------------------------------------------------------------


@bundle.command()
@click.argument("bundle_path", metavar="[BUNDLE]", default="default")
@click.option("--check", is_flag=True, help="Read every file and compare its hash.")
@_as_json
def inspect(bundle_path: str, check: bool, as_json: bool) -> None:
    """Show what is in BUNDLE (the embedded one, unless named).

    Example: edgeclip bundle inspect default
    """
    from edgeclip.bundle import Bundle
    from edgeclip.bundle_tools import describe_bundle

    prepare_stdout()
    opened = Bundle.open(bundle_directory(bundle_path, Notes()))
    if check:
        opened.check_files()
    document = describe_bundle(opened)
    if as_json:
        document["checked"] = check
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        _show(opened, document, checked=check)


def _show(opened: Bundle, document: dict[str, Any], *, checked: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    model, preprocess = opened.manifest.model, opened.manifest.preprocess
    parameters = ", ".join(f"{name} {_count(count)}" for name, count in model.parameters.items())
    height, width = preprocess.image_size_px
    state = "all hashes checked" if checked else "hashes are checked at first use"
    tokenizer = document["tokenizer"]
    facts = {
        "model": f"{model.name} ({model.family}), {parameters or 'parameters not stated'}",
        "embeddings": f"{model.embed_dim} dimensions, scale {model.scale:g}, "
        f"space {model.embedding_space[:16]}",
        "pictures": f"{height} × {width} px, {preprocess.resize}, {preprocess.interpolation}, "
        f"crop {preprocess.crop}",
        "languages": ", ".join(model.languages) or "not stated",
        "tokenizer": "none"
        if tokenizer is None
        else f"digest {(tokenizer.get('digest') or 'not stated')[:16]}",
        "licence": model.licence,
        "parents": _cut(", ".join(map(_parent, model.parents)), 300) or "none stated",
        "golden": "none" if document["golden"] is None else _size(document["golden"]["size_bytes"]),
        "size": f"{_size(document['size_bytes'])} in {document['files']} files, {state}",
        "digest": opened.digest,
        "schema": document["manifest_schema"],
    }
    console.print(f"[bold]{escape(shown(opened.path))}[/bold]", soft_wrap=True)
    for name, fact in facts.items():
        console.print(f"  {name:<11} {escape(shown(fact))}", soft_wrap=True)
    console.print(_variant_table(opened, document))
    if opened.manifest.label_banks:
        console.print(_bank_table(opened, document))
    for name, head in opened.manifest.heads.items():
        fitted = f", fitted on {head.fitted_on}" if head.fitted_on else ""
        console.print(
            escape(shown(f"head {name}: {head.kind}, bank {head.bank or 'any'}{fitted}")), soft_wrap=True
        )
    for name, value in sorted(opened.manifest.provenance.items()):
        console.print(escape(f"made with {shown(name)}: {_cut(shown(_one_line(value)))}"), soft_wrap=True)


def _variant_table(opened: Bundle, document: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("variant", "tower", "size", "needs", "parity with float32", title_justify="left")
    order = [
        *document["default_variants"],
        *(v for v in document["variants"] if v not in document["default_variants"]),
    ]
    for name in order:
        entry = opened.manifest.variants[name]
        rank = f" (default {order.index(name) + 1})" if document["variants"][name]["default"] else ""
        needs = [
            f"one of {', '.join(entry.requires.isa_any)}" if entry.requires.isa_any else "",
            f"{entry.format} {entry.requires.engine}" if entry.requires.engine else "",
            f"GPU {entry.requires.compute_capability}" if entry.requires.compute_capability else "",
        ]
        for number, (tower, part) in enumerate(document["variants"][name]["towers"].items()):
            first = number == 0
            row = [
                f"{name}{rank}" if first else "",
                tower,
                _size(part["size_bytes"]),
                "; ".join(need for need in needs if need) if first else "",
                _parity(part["parity"]),
            ]
            table.add_row(*(escape(shown(cell)) for cell in row))
    return table


def _bank_table(opened: Bundle, document: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("label bank", "labels", "size", "language", "templates", title_justify="left")
    for name, entry in opened.manifest.label_banks.items():
        roles = [
            role
            for role, holder in (
                ("default", opened.manifest.default_bank),
                ("background", opened.manifest.background_bank),
            )
            if holder == name
        ]
        languages = ", ".join([entry.language or "not stated", *entry.aliases])
        size = _size(document["label_banks"][name]["size_bytes"])
        row = [
            f"{name} ({', '.join(roles)})" if roles else name,
            f"{entry.labels:,}",
            size,
            languages,
            entry.templates,
        ]
        table.add_row(*(escape(shown(cell)) for cell in row))
    return table


def _parity(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "not stated"
    missed = parity.get("missed") or {}
    said = [f"{parity['status']} but for {', '.join(sorted(missed))}" if missed else parity["status"]]
    for key, name in (("max_abs", "max abs"), ("cosine_mean", "cosine mean"), ("top1_agreement", "top-1")):
        if parity.get(key) is not None:
            said.append(f"{name} {parity[key]:.6g}")
    if parity.get("proxy"):
        said.append(f"proxy {parity['proxy']}")
    return ", ".join(said)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.2f} MB" if size_bytes >= 100_000 else f"{size_bytes / 1e3:,.1f} kB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 100_000 else f"{parameters:,}"


def _parent(parent: str | dict[str, Any]) -> str:
    named = parent.get("name") if isinstance(parent, dict) else parent
    return named if isinstance(named, str) else _one_line(parent)


def _cut(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _one_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


# --- slim --------------------------------------------------------------------------------------------------


@bundle.command()
@click.argument("bundle_path", metavar="BUNDLE")
@click.option(
    "--variant", "variants", multiple=True, help="Variant to keep; may be repeated.  [default: all]"
)
@click.option(
    "--labels",
    metavar="FILE|A,B,…",
    help="Labels the device is to know: a file (text, JSON or a bank), or names. They become the label bank.",
)
@click.option(
    "--templates", metavar="NAME|FILE", help="Prompt templates for --labels.  [default: the bundle's]"
)
@click.option("--drop-text", is_flag=True, help="Leave out text towers and tokenizer.")
@_output
@_force
def slim(
    *,
    bundle_path: str,
    variants: tuple[str, ...],
    labels: str | None,
    templates: str | None,
    drop_text: bool,
    output: Path,
    force: bool,
) -> None:
    """Write what goes on the device: the variants named of BUNDLE, and what they need.

    Needs the base install only. With --labels the text tower encodes them here; with --drop-text the device
    then needs none.

    Example: edgeclip bundle slim default --variant onnx-int8 --labels "cat,dog,car" --drop-text -o device
    """
    from edgeclip.bundle import Bundle
    from edgeclip.bundle_tools import describe_bundle, slim_bundle

    choice = _label_choice(labels, templates)
    choice.check()
    prepare_stdout()
    notes = Notes()
    source = Bundle.open(bundle_directory(bundle_path, notes))
    variants = variants or tuple(
        dict.fromkeys((*source.manifest.default_variants, *source.manifest.variants))
    )
    for name in variants:
        source.variant(name)
    bank = _new_bank(source, variants[0], choice, notes)
    notes.done()
    made = slim_bundle(source, output, variants=variants, bank=bank, drop_text=drop_text, force=force)
    before, after = describe_bundle(source)["size_bytes"], describe_bundle(made)["size_bytes"]
    click.echo(
        f"{shown(output)}: {_size(after)} of {_size(before)}, variants {', '.join(made.manifest.variants)}"
    )


def _label_choice(labels: str | None, templates: str | None) -> LabelChoice:
    """Tell a file of labels from labels: what exists, or ends like a file of labels, is a file."""
    if labels is not None and "," not in labels:
        path = Path(labels)
        if path.suffix.lower() in (".txt", ".json", ".safetensors", ".npy") or path.is_file():
            return LabelChoice(None, path, templates, None)
    return LabelChoice(labels, None, templates, None)


def _new_bank(source: Bundle, variant: str, choice: LabelChoice, notes: Notes) -> NewBank | None:
    from edgeclip.bundle_tools import NewBank
    from edgeclip.errors import BundleError
    from edgeclip.labels import LabelBank

    labels = choice.read()
    if labels is None:
        return None
    bank = (
        labels
        if isinstance(labels, LabelBank)
        else _encode(source, variant, labels, choice.read_templates(), notes.on_encoding)
    )
    if bank.space and bank.space != source.manifest.model.embedding_space:
        raise BundleError(
            f"the label bank is of the embedding space {bank.space[:16]}, {source.where} of "
            f"{source.manifest.model.embedding_space[:16]}: build it with this bundle."
        )
    entry = {"labels": len(bank), "templates": bank.templates.name, "variant": variant, "language": None}
    return NewBank(_BANK_NAME, bank.to_bytes(), entry)


def _encode(
    source: Bundle,
    variant: str,
    labels: LabelSet,
    templates: Templates | None,
    on_progress: Callable[[BankProgress], None],
) -> LabelBank:
    """Encode labels with a text tower of the bundle that runs on this host."""
    from edgeclip.label_sets import Templates
    from edgeclip.labels import LabelBank, build_bank
    from edgeclip.text_encoder import TextEncoder

    name = source.manifest.default_bank
    known = None
    if name is not None:
        known = LabelBank.from_bytes(source.read(source.manifest.label_banks[name].file), source=source.where)
    if templates is None:
        templates = Templates.of("one") if known is None else known.templates
    encoder = TextEncoder(source, _text_variant(source, variant))
    try:
        return build_bank(labels, templates, encoder, known=lambda: known, on_progress=on_progress)
    finally:
        encoder.close()


def _text_variant(source: Bundle, variant: str) -> Variant:
    """Return the variant whose text tower encodes the labels: one for another machine may not run here."""
    from edgeclip.errors import BundleError
    from edgeclip.runtime.choose import unmet
    from edgeclip.runtime.host import Host
    from edgeclip.runtime.session import RuntimeOptions

    host, reasons = Host.here(), []
    for name in dict.fromkeys(
        (variant, *source.manifest.default_variants, *sorted(source.manifest.variants))
    ):
        candidate = source.variant(name)
        if "text" in candidate.entry.towers:
            problem = unmet(candidate, options=RuntimeOptions(), host=host)
            if problem is None:
                return candidate
            reasons.append(f"{name}: {problem}")
    detail = "; ".join(reasons) or "it has none"
    raise BundleError(f"{source.where}: no text tower that runs here to encode labels with ({detail}).")


# --- diff --------------------------------------------------------------------------------------------------


@bundle.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--exit-code", is_flag=True, help="Exit with 1 where they differ.")
@_as_json
def diff(a: str, b: str, exit_code: bool, as_json: bool) -> int:
    """Show in which fields and files the bundles A and B differ.

    Reads both manifests, no other file: files are compared by the hashes there.

    Example: edgeclip bundle diff default device
    """
    from edgeclip.bundle import Bundle
    from edgeclip.bundle_tools import diff_bundles

    prepare_stdout()
    first, second = (Bundle.open(bundle_directory(name, Notes())) for name in (a, b))
    differences = diff_bundles(first, second)
    if as_json:
        found = [
            {"field": each.field, "a": each.a, "b": each.b, "missing": each.missing} for each in differences
        ]
        document = {"schema": SCHEMA, "same": not found, "differences": found}
        click.echo(json.dumps(document, ensure_ascii=False, indent=2))
    elif not differences:
        click.echo("no differences")
    else:
        for each in differences:
            click.echo(_difference(each))
    return _EXIT_DIFFERENT if differences and exit_code else 0


def _difference(each: Difference) -> str:
    field = shown(each.field)
    if each.missing == "a":
        return f"+ {field}: {_shortened(each.b)}"
    if each.missing == "b":
        return f"- {field}: {_shortened(each.a)}"
    return f"~ {field}: {_shortened(each.a)} → {_shortened(each.b)}"


def _shortened(value: Any) -> str:
    return _cut(shown(json.dumps(value, ensure_ascii=False)))


# --- pack and unpack ---------------------------------------------------------------------------------------


@bundle.command()
@click.argument("bundle_path", metavar="BUNDLE")
@_output
@_force
def pack(bundle_path: str, output: Path, force: bool) -> None:
    """Write BUNDLE as one .tar or .zip file; the same bundle gives the same bytes.

    Every file is checked on the way.

    Example: edgeclip bundle pack default -o edgeclip-default.zip
    """
    from edgeclip.bundle import Bundle
    from edgeclip.bundle_tools import pack_bundle

    prepare_stdout()
    source = Bundle.open(bundle_directory(bundle_path, Notes()))
    size_bytes = pack_bundle(source, output, force=force)
    click.echo(f"{shown(output)}: {_size(size_bytes)}")


@bundle.command()
@click.argument("archive", type=click.Path(path_type=Path))
@_output
@_force
def unpack(archive: Path, output: Path, force: bool) -> None:
    """Unpack ARCHIVE, a file of 'bundle pack', into a new directory.

    Only files that the manifest inside lists are written, checked against its hashes.

    Example: edgeclip bundle unpack edgeclip-default.zip -o bundle
    """
    from edgeclip.bundle_tools import unpack_bundle

    prepare_stdout()
    made = unpack_bundle(archive, output, force=force)
    click.echo(
        f"{shown(output)}: {made.manifest.model.name}, {len(made.manifest.files)} files, digest "
        f"{made.digest[:16]}"
    )
