"""What belongs to the model and not to one variant: its description, tokenizer, labels, golden file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeclip.bundle import Bundle, BundleWriter, PreprocessSpec, embedding_space
from edgeclip.errors import BundleError, ConfigError
from edgeclip.labels import LabelBank
from edgeclip.runtime.host import versions
from edgeclip.runtime.parity import DEGENERATE_SIMILARITY, Basis, compare_embeddings
from edgeclip.tensors import map_tensors, write_tensors

from .agreement import Yardstick
from .notices import notice_of
from .options import ExportSettings, Offered
from .reference import (
    Expected,
    Reference,
    default_templates,
    everyday,
    golden_tensors,
    reference_pictures,
    reference_texts,
)
from .steps import Steps
from .variants import VariantSpec

if TYPE_CHECKING:
    from .source import Source

__all__ = ["write_contents", "write_provenance"]


def write_contents(
    writer: BundleWriter,
    source: Source,
    variants: Sequence[VariantSpec],
    settings: ExportSettings,
    steps: Steps,
) -> Yardstick:
    """Write what belongs to the model, and have the float32 model speak on the reference set."""
    manifest = writer.manifest
    spec = msgspec.structs.replace(
        source.preprocess, applied="host" if settings.graph.float_input else "graph"
    )
    space = embedding_space(source.digest, spec)
    existing = _existing(writer, source, spec, space)
    made = {each.name for each in variants}
    known = {} if existing is None else existing.manifest.variants
    staying = {name: entry for name, entry in known.items() if name not in made}
    languages = source.tokenizer.config.languages
    given = settings.references.offered
    kept = _kept_bank(existing, given, others=bool(staying))
    if kept is None:
        offered = given or everyday(languages)
        with steps(f"{len(offered.labels)} labels: eager float32"):
            bank, bank_name = _eager_bank(source, offered, space, steps), offered.name
        _add_bank(writer, bank, bank_name, languages, scale=source.scale)
    else:
        bank, bank_name = kept
    manifest["default_bank"] = bank_name
    with steps("reference pictures"):
        pictures = reference_pictures(source.preprocess, settings.references.pictures)
    has_text = settings.graph.text or any("text" in entry.towers for entry in staying.values())
    texts = reference_texts(bank.labels, bank.templates, languages) if has_text else ()
    reference = Reference(pictures, texts)
    what = f"{len(pictures.names)} pictures" + (f" and {len(texts)} texts" if texts else "")
    with steps(f"{what}: eager float32"):
        image = source.images(
            pictures.pixels, lambda done, total: steps.note(f"eager float32: {done} of {total} pictures")
        )
        expected = Expected(image, source.texts(texts) if texts else None)
    similarity = compare_embeddings(image, image).reference_similarity or 0.0
    basis: Basis = "trained" if similarity < DEGENERATE_SIMILARITY else "centred"
    yardstick = Yardstick(
        writer,
        spec,
        reference,
        expected,
        source.tokenizer(texts, truncate=True) if texts else None,
        bank,
        bank_name,
        basis,
        similarity,
        source.scale,
        settings.threads,
    )
    if basis == "centred":
        yardstick.remarks.append(
            f"the reference embeddings are all alike (median cosine {similarity:.3f}), so cosines and ranks "
            "mean nothing: judged are differences and cosines after taking the mean off"
        )
    if existing is None:
        _describe(writer, source, spec, space, text=has_text)
    elif has_text and manifest.get("tokenizer") is None:
        _add_text(writer, source)
    _add_golden(writer, existing if staying else None, source, yardstick, settings)
    return yardstick


def _add_golden(
    writer: BundleWriter,
    existing: Bundle | None,
    source: Source,
    yardstick: Yardstick,
    settings: ExportSettings,
) -> None:
    """Write the golden file; pictures that variants which stay were judged by stay too."""
    tensors, bank_name = (
        golden_tensors(yardstick.reference, yardstick.expected, source.tokenizer, yardstick.bank),
        yardstick.bank_name,
    )
    known = None if existing is None else existing.manifest.golden
    if existing is not None and known is not None:
        old, metadata = map_tensors(existing.file(known), where=f"golden file {known!r}")
        tensors = {**tensors, **old}
        bank_name = metadata.get("bank", bank_name)
    writer.manifest["golden"] = writer.add("golden.safetensors", write_tensors(tensors, {"bank": bank_name}))
    if settings.references.pictures is not None:
        source_name = yardstick.reference.pictures.source
        yardstick.remarks.append(
            f"the bundle's golden file holds pictures of {source_name!r}, at the size of the tower"
            if known is None
            else "the bundle's golden file stays: it is what its other variants were judged by"
        )


def _existing(writer: BundleWriter, source: Source, spec: PreprocessSpec, space: str) -> Bundle | None:
    """Return the bundle that is there.

    Raises:
        BundleError: it holds another model, or the same one for other inputs or with another tokenizer.
    """
    if "model" not in writer.manifest:
        return None
    bundle = Bundle.open(writer.path)
    known = bundle.manifest.model
    if known.embedding_space != space:
        raise BundleError(
            f"{bundle.where}: holds the model {known.name!r} of the embedding space "
            f"{known.embedding_space[:12]}…, got {source.config.name!r} of {space[:12]}…: name another "
            "directory, or remove that bundle."
        )
    if bundle.manifest.preprocess.applied != spec.applied:
        raise BundleError(
            f"{bundle.where}: its pictures are normalized by the {bundle.manifest.preprocess.applied}, got "
            f"{spec.applied}: one bundle has one kind of input, name another directory."
        )
    tokenizer = None if bundle.manifest.tokenizer is None else bundle.manifest.tokenizer.digest
    if tokenizer not in (None, source.tokenizer.digest):
        raise BundleError(
            f"{bundle.where}: its tokenizer is {str(tokenizer)[:12]}…, got {source.tokenizer.digest[:12]}… "
            "with the same weights: name another directory."
        )
    return bundle


def _kept_bank(
    existing: Bundle | None, given: Offered | None, *, others: bool
) -> tuple[LabelBank, str] | None:
    """Return the bank that is there and serves: the default one, or the one with the given labels.

    Args:
        existing: the bundle that is there.
        given: labels that were asked for.
        others: whether variants stay that were judged by the banks that are there.

    Raises:
        ConfigError: the bank of the given name has other labels, and others stay.
    """
    if existing is None:
        return None
    name = existing.manifest.default_bank if given is None else given.name
    entry = existing.manifest.label_banks.get(name or "")
    if name is None or entry is None:
        return None
    bank = LabelBank.from_bytes(existing.read(entry.file), source=f"{existing.where}: label bank {name!r}")
    if given is None:
        return bank, name
    templates = given.templates or default_templates(given.labels)
    if bank.labels == given.labels and bank.templates.digest == templates.digest:
        return bank, name
    if others:
        raise ConfigError(
            f"{existing.where}: its bank {name!r} has {len(bank)} other labels, and its other variants "
            "were judged by them: put the labels into a file of another name, or name another directory."
        )
    return None


def _eager_bank(source: Source, offered: Offered, space: str, steps: Steps) -> LabelBank:
    templates = offered.templates or default_templates(offered.labels)
    bank = source.bank(
        offered.labels,
        templates,
        on_progress=lambda said: steps.note(f"labels: {said.labels_done} of {said.labels}"),
    )
    # As it is stored: everything is compared with what devices will read.
    return LabelBank.from_bytes(replace(bank, space=space).to_bytes(dtype="float16"))


def _add_bank(
    writer: BundleWriter, bank: LabelBank, name: str, languages: Sequence[str], *, scale: float
) -> None:
    manifest = writer.manifest
    language = "zh" if bank.templates.name == "zh" else "en" if "en" in languages else None
    manifest.setdefault("label_banks", {})[name] = {
        "file": writer.add(f"banks/{name}.safetensors", bank.to_bytes(dtype="float16")),
        "labels": len(bank),
        "templates": bank.templates.name,
        "language": language,
        "aliases": sorted({code for label in bank.labels.labels for code, _ in label.aliases}),
    }
    head = writer.add(
        "heads/temperature.safetensors", write_tensors({"scale": np.array([scale], np.float32)})
    )
    manifest.setdefault("heads", {})[f"temperature-{name}"] = {
        "kind": "temperature",
        "file": head,
        "bank": name,
        "fitted_on": "the model's own scale",
    }


def _describe(writer: BundleWriter, source: Source, spec: PreprocessSpec, space: str, *, text: bool) -> None:
    parameters = dict(source.parameters)
    if not text:
        parameters.pop("text")
    manifest = writer.manifest
    manifest.update(
        model={
            "name": source.config.name,
            "family": source.family,
            "parameters": parameters,
            "embed_dim": source.config.embed_dim,
            "scale": source.scale,
            "languages": list(source.tokenizer.config.languages),
            "licence": source.licence,
            "parents": [dict(parent) for parent in source.parents],
            "notices": [writer.add("NOTICE.txt", notice_of(source, text=text))],
            "embedding_space": space,
        },
        preprocess=msgspec.to_builtins(spec),
        tokenizer=_add_tokenizer(writer, source) if text else None,
        variants={},
    )


def _add_text(writer: BundleWriter, source: Source) -> None:
    """Say of a bundle that had no text tower what one with it says."""
    manifest = writer.manifest
    model = manifest["model"]
    manifest["tokenizer"] = _add_tokenizer(writer, source)
    model["parameters"] = {**model.get("parameters", {}), "text": source.parameters["text"]}
    others = [name for name in model.get("notices", []) if not name.startswith("NOTICE.")]
    model["notices"] = [writer.add("NOTICE.txt", notice_of(source, text=True)), *others]


def _add_tokenizer(writer: BundleWriter, source: Source) -> dict[str, Any]:
    stored = {
        name: writer.add(f"tokenizer/{name}", content) for name, content in source.tokenizer.files.items()
    }
    return {
        "config": stored["tokenizer.json"],
        "merges": stored["merges.txt.gz"],
        "words": stored.get("words.bin"),
        "digest": source.tokenizer.digest,
    }


def write_provenance(
    manifest: dict[str, Any],
    yardstick: Yardstick,
    source: Source,
    variants: Sequence[VariantSpec],
    settings: ExportSettings,
) -> None:
    """Write into the provenance how each variant was made."""
    installed = {**versions(), **_versions(("onnx", "onnxscript", "onnx-ir"))}
    said = {
        "tool": "edgeclip export",
        "source": dict(source.origin),
        "graph": settings.graph.to_dict(),
        "gelu_tanh": settings.build.gelu_tanh,
        "reference": yardstick.reference.to_dict(),
        "limits": [f"{each.where}:{each.number}={each.limit:g}" for each in settings.gates.limits],
        "versions": installed,
    }
    provenance = manifest.setdefault("provenance", {})
    provenance["source"] = dict(source.origin)
    provenance["variants"] = {
        name: entry
        for name, entry in {
            **provenance.get("variants", {}),
            **{spec.name: said for spec in variants},
        }.items()
        if name in manifest["variants"]
    }


def _versions(names: Sequence[str]) -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
