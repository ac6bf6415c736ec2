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
from edgeclip.tensors import write_tensors

from .agreement import Yardstick
from .notices import notice_of
from .options import ExportSettings, Offered
from .reference import (
    Expected,
    Reference,
    default_templates,
    everyday,
    golden_file,
    reference_pictures,
    reference_texts,
)
from .steps import Steps
from .variants import VariantSpec

if TYPE_CHECKING:
    from .source import Source

__all__ = ["write_contents", "write_provenance"]


def write_contents(writer: BundleWriter, source: Source, settings: ExportSettings, steps: Steps) -> Yardstick:
    """Write what belongs to the model, and have the float32 model speak on the reference set."""
    manifest = writer.manifest
    spec = msgspec.structs.replace(
        source.preprocess, applied="host" if settings.graph.float_input else "graph"
    )
    space = embedding_space(source.digest, spec)
    existing = _existing(writer, source, spec, space)
    languages = source.tokenizer.config.languages
    given = settings.references.offered
    bank_name = existing.manifest.default_bank if existing is not None and given is None else None
    if existing is not None and bank_name is not None:
        file = existing.manifest.label_banks[bank_name].file
        bank = LabelBank.from_bytes(existing.read(file), source=f"{existing.where}: label bank {bank_name!r}")
    else:
        offered = given or everyday(languages)
        with steps(f"{len(offered.labels)} labels: eager float32"):
            bank, bank_name = _eager_bank(source, offered, space, steps), offered.name
        _refuse_other_labels(existing, bank_name, bank)
        _add_bank(writer, bank, bank_name, languages, scale=source.scale)
    with steps("reference pictures"):
        pictures = reference_pictures(source.preprocess, settings.references.pictures)
    texts = reference_texts(bank.labels, bank.templates, languages) if settings.graph.text else ()
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
        _describe(writer, source, spec, space, text=settings.graph.text)
    elif settings.graph.text and manifest.get("tokenizer") is None:
        manifest["tokenizer"] = _add_tokenizer(writer, source)
    if existing is None or existing.manifest.golden is None or given or settings.references.pictures:
        golden = golden_file(reference, expected, source.tokenizer, bank, bank_name)
        manifest["golden"] = writer.add("golden.safetensors", golden)
        if settings.references.pictures is not None:
            yardstick.remarks.append(
                f"the bundle's golden file holds pictures of {pictures.source!r}, at the size of the tower"
            )
    return yardstick


def _existing(writer: BundleWriter, source: Source, spec: PreprocessSpec, space: str) -> Bundle | None:
    """Return the bundle that is there.

    Raises:
        BundleError: it holds another model, or the same one for other inputs.
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
    return bundle


def _refuse_other_labels(existing: Bundle | None, name: str, bank: LabelBank) -> None:
    """Refuse to put other labels under the name of a bank that a variant has inside."""
    for variant in {} if existing is None else existing.manifest.variants.values():
        parity = variant.parity.get("classifier")
        if existing is None or parity is None or parity.bank != name:
            continue
        known = LabelBank.from_bytes(existing.read(existing.manifest.label_banks[name].file))
        if known.names != bank.names or known.templates.digest != bank.templates.digest:
            raise ConfigError(
                f"{existing.where}: its bank {name!r} has {len(known)} other labels, and a variant has them "
                "inside: give the label file another name, or name another directory."
            )


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
    manifest["default_bank"] = name
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
    installed = {**versions(), **_versions(("onnx", "onnxscript", "onnx-ir", "nncf"))}
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
