"""The manifest of a bundle: its typed form, and what makes one acceptable.

``docs/bundle-format.md`` specifies it; ``docs/manifest.schema.json`` is :func:`manifest_schema`. Parsing
trusts nothing and reads no file: bytes in, checked values out, or a ``BundleError`` of one sentence that
names the field.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct

from edgeclip.errors import BundleError

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "BankEntry",
    "FileEntry",
    "FileName",
    "HeadEntry",
    "Manifest",
    "ModelEntry",
    "Parity",
    "PreprocessSpec",
    "Requires",
    "SchemaVersion",
    "TensorEntry",
    "TokenizerFiles",
    "TowerEntry",
    "VariantEntry",
    "embedding_space",
    "encode_manifest",
    "manifest_schema",
    "named_strings",
    "one_line",
    "parse_manifest",
    "some",
]

MANIFEST_NAME = "manifest.json"
MAX_FILE_BYTES = 1 << 36

# `$` alone also matches before a final newline in Python, though not in ECMAScript, which JSON Schema uses.
_END = r"$(?!\n)"
_PART = r"[A-Za-z0-9_@+-][A-Za-z0-9._@+-]*"
FileName = Annotated[str, Meta(pattern=rf"^{_PART}(/{_PART})*{_END}", max_length=240)]
KeyName = Annotated[str, Meta(pattern=rf"^{_PART}{_END}", max_length=120)]
Sha256 = Annotated[str, Meta(pattern=rf"^[0-9a-f]{{64}}{_END}")]
SidePx = Annotated[int, Meta(ge=1, le=4096)]
Dim = Annotated[int, Meta(ge=1, le=1 << 31)]
DimName = Annotated[str, Meta(pattern=rf"^[A-Za-z_][A-Za-z0-9_.+*-]*{_END}", max_length=60)]
Word = Annotated[str, Meta(pattern=rf"^[a-z0-9][a-z0-9._+-]*{_END}", max_length=60)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]

# Names Windows gives to devices, whatever the suffix.
_RESERVED = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
)


class SchemaVersion(Struct, frozen=True, kw_only=True, order=True):
    """Version of the manifest's schema; readers of one major understand every minor."""

    major: Annotated[int, Meta(ge=0, le=1 << 31)]
    minor: Annotated[int, Meta(ge=0, le=1 << 31)]

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


SCHEMA = SchemaVersion(major=1, minor=0)


class FileEntry(Struct, frozen=True, kw_only=True):
    """Hash and size of one file of the bundle."""

    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]


class PreprocessSpec(Struct, frozen=True, kw_only=True):
    """How a picture becomes the image tower's input.

    ``image_size_px`` is ``(H, W)``; ``mean`` and ``std`` are per RGB channel on pixels in [0, 1]; ``applied``
    says whether scaling, mean and std are part of the graph or are done by the host.
    """

    image_size_px: tuple[SidePx, SidePx]
    resize: Literal["shortest", "squash"] = "shortest"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop: Literal["center", "none"] = "center"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    applied: Literal["graph", "host"] = "graph"


class TokenizerFiles(Struct, frozen=True, kw_only=True):
    """Where the tokenizer's files are: settings, BPE merges (gzip) and the hashed list of known words.

    ``digest`` is ``Tokenizer.digest``: two bundles whose digests agree turn every text into the same ids.
    """

    config: FileName
    merges: FileName
    words: FileName | None = None
    digest: Sha256 | None = None


class TensorEntry(Struct, frozen=True, kw_only=True):
    """Name, dtype and shape of one input or output; a symbolic dimension is a name."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    dtype: Word
    shape: Annotated[tuple[Dim | DimName, ...], Meta(max_length=8)]


class TowerEntry(Struct, frozen=True, kw_only=True):
    """Files and interface of one tower: ``model`` is the file to open, ``files`` are all that it needs."""

    model: FileName
    files: Annotated[tuple[FileName, ...], Meta(min_length=1)]
    inputs: Annotated[tuple[TensorEntry, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[TensorEntry, ...], Meta(min_length=1)]


class Requires(Struct, frozen=True, kw_only=True):
    """What a host must offer: one of ``isa_any``, an engine version (``>=1.20``), a GPU's capability."""

    isa_any: tuple[Word, ...] = ()
    engine: str | None = None
    compute_capability: str | None = None


class Parity(Struct, frozen=True, kw_only=True):
    """Measured agreement of a tower with its eager float32 form; numbers are absent where nothing was run.

    ``status`` is ``unverified`` where the engine, the device or the instruction sets it is for were not at
    hand where the bundle was made; ``proxy`` then says what was run in their place. ``n`` counts the compared
    samples, ``bank`` names the label bank behind the top-k agreements. ``missed`` holds the limit of each
    number that did not reach it and was accepted all the same by whoever made the bundle: ``passed`` without
    it means that every limit was met. ``basis`` is ``centred`` where all embeddings of the reference set are
    nearly one, as random weights make them: cosines and ranks then mean nothing, and ``max_abs`` and
    ``centred_cosine_mean`` (the mean embedding taken off both) were judged instead.
    """

    status: Literal["passed", "unverified"]
    max_abs: float | None = None
    cosine_min: float | None = None
    cosine_mean: float | None = None
    centred_cosine_mean: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    n: Count = 0
    bank: KeyName | None = None
    host: dict[str, Any] = {}
    proxy: str | None = None
    missed: dict[KeyName, float] = {}
    basis: Literal["trained", "centred"] = "trained"


class VariantEntry(Struct, frozen=True, kw_only=True):
    """One format × precision × target of the model.

    ``format`` is ``onnx``, ``openvino`` or ``tensorrt``, ``precision`` is ``fp32``, ``fp16`` or ``int8``; a
    reader skips a variant whose words it does not know. ``parity`` has one entry a tower. ``session_config``
    are engine settings the variant was verified with (for ONNX Runtime: session configuration entries).
    """

    format: Word
    precision: Word
    towers: Annotated[dict[KeyName, TowerEntry], Meta(min_length=1)]
    target: str | None = None
    requires: Requires = Requires()
    calibration: dict[str, Any] | None = None
    parity: dict[KeyName, Parity] = {}
    accuracy: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    session_config: dict[str, str] = {}


class BankEntry(Struct, frozen=True, kw_only=True):
    """One label bank: a safetensors file with ``labels`` unit embeddings.

    ``templates`` names the prompt templates, ``variant`` the variant whose text tower made it, ``language``
    the language of the labels, ``aliases`` the further languages in which its labels can be asked for.
    """

    file: FileName
    labels: Annotated[int, Meta(ge=1, le=1 << 31)]
    templates: str
    variant: KeyName | None = None
    language: str | None = None
    aliases: tuple[str, ...] = ()
    title: str | None = None


class HeadEntry(Struct, frozen=True, kw_only=True):
    """One head: a safetensors file that turns embeddings (or similarities to ``bank``) into answers."""

    kind: Literal["temperature", "linear", "reject"]
    file: FileName
    bank: KeyName | None = None
    fitted_on: str | None = None


class ModelEntry(Struct, frozen=True, kw_only=True):
    """The model behind the bundle.

    ``parameters`` counts per tower; ``scale`` multiplies cosines (``exp`` of the learnt logarithm, at most
    100); ``parents`` are the models it descends from; ``embedding_space`` is a digest of model and
    preprocessing that two sets of embeddings must share to be compared; ``notices`` are files with the texts
    its licences ask for.
    """

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    family: str
    embed_dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    scale: Annotated[float, Meta(gt=0, le=100)]
    licence: str
    embedding_space: Annotated[str, Meta(min_length=8, max_length=128)]
    parameters: dict[str, Count] = {}
    languages: tuple[str, ...] = ()
    parents: tuple[str | dict[str, Any], ...] = ()
    notices: tuple[FileName, ...] = ()


class Manifest(Struct, frozen=True, kw_only=True):
    """Everything a bundle says about itself. Readers ignore fields they do not know; writers keep them."""

    schema: SchemaVersion
    min_reader: SchemaVersion = SchemaVersion(major=1, minor=0)
    model: ModelEntry
    preprocess: PreprocessSpec
    tokenizer: TokenizerFiles | None = None
    variants: Annotated[dict[KeyName, VariantEntry], Meta(min_length=1)]
    default_variants: tuple[KeyName, ...] = ()
    label_banks: dict[KeyName, BankEntry] = {}
    default_bank: KeyName | None = None
    background_bank: KeyName | None = None
    heads: dict[KeyName, HeadEntry] = {}
    golden: FileName | None = None
    files: dict[FileName, FileEntry]
    provenance: dict[str, Any] = {}


def embedding_space(model_digest: str, preprocess: PreprocessSpec) -> str:
    """Return the digest that two sets of embeddings must share to be compared.

    Args:
        model_digest: sha256 of the trained weights (any form that is stable across exports of one model).
        preprocess: how pictures are prepared; where the scaling is applied does not change the space.
    """
    said = msgspec.to_builtins(preprocess)
    del said["applied"]
    text = json.dumps({"model": model_digest, "preprocess": said}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_manifest(data: bytes, where: str) -> tuple[dict[str, Any], Manifest]:
    """Parse and check a manifest; return the raw document and its typed view.

    Args:
        data: content of ``manifest.json``.
        where: the bundle, as messages name it.

    Raises:
        BundleError: not JSON, an unknown schema major, or a field that cannot be used, which is named.
    """
    raw = _parse_json(data, where)
    _check_schema(raw, where)
    try:
        manifest = msgspec.convert(raw, Manifest)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} cannot be used: {_explain(raw, error)}.") from error
    _check_manifest(manifest, where)
    return raw, manifest


def encode_manifest(raw: dict[str, Any]) -> bytes:
    """Return the canonical bytes of a manifest: fields in the order of :class:`Manifest`, those below sorted.

    Raises:
        TypeError, ValueError, RecursionError: a value that JSON does not have.
    """
    known = [name for name in Manifest.__struct_fields__ if name in raw]
    ordered = {name: _sorted_keys(raw[name]) for name in [*known, *sorted(set(raw) - set(known))]}
    return (json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_sorted_keys(item) for item in value]
    return value


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
        raw = json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float
        )
        if "\\u" in text:
            # An escaped lone surrogate parses, and then breaks whoever prints or writes it.
            json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} is not valid JSON: {one_line(error)}.") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{where}: {MANIFEST_NAME} holds a JSON {type(raw).__name__}, expected an object.")
    return raw


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} appears twice in one object")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _explain(raw: dict[str, Any], error: BaseException) -> str:
    """Return the problem with the key of the entry it is in, which msgspec's own message leaves out."""
    sections: dict[str, Any] = {
        "variants": dict[KeyName, VariantEntry],
        "label_banks": dict[KeyName, BankEntry],
        "heads": dict[KeyName, HeadEntry],
        "files": dict[FileName, FileEntry],
    }
    for section, kind in sections.items():
        entries = raw.get(section)
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            problem = _problem({key: entry}, kind)
            if problem is not None:
                return f"{section} {key[:120]!r}: {problem}"
    return one_line(error)


def _problem(value: Any, kind: Any) -> str | None:
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        return one_line(error)
    return None


def one_line(error: BaseException) -> str:
    """Return the message of a foreign exception, fit to be part of a sentence of ours."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


def some(names: Iterable[str]) -> list[str]:
    """Return names for a message: sorted, and not more than a reader wants to see."""
    ordered = sorted(names)
    return ordered if len(ordered) <= 10 else [*ordered[:9], f"and {len(ordered) - 9} more"]


def _check_schema(raw: dict[str, Any], where: str) -> None:
    def version(field: str) -> SchemaVersion:
        try:
            return msgspec.convert(raw.get(field), SchemaVersion)
        except (msgspec.ValidationError, OverflowError) as error:
            raise BundleError(
                f"{where}: {MANIFEST_NAME}: field {field!r} cannot be used: {one_line(error)}; expected "
                '{"major": 1, "minor": 0} or later.'
            ) from error

    schema = version("schema")
    if schema.major != SCHEMA.major:
        raise BundleError(
            f"{where}: the manifest has schema {schema}, this edgeclip reads {SCHEMA.major}.x: "
            f"install an edgeclip that reads {schema.major}.x, or export the bundle again."
        )
    if "min_reader" in raw and (needed := version("min_reader")) > SCHEMA:
        raise BundleError(
            f"{where}: the bundle asks for a reader of schema {needed}, this edgeclip reads {SCHEMA}: "
            "update edgeclip."
        )


_Refuse = Callable[[str, str], NoReturn]


def _check_manifest(manifest: Manifest, where: str) -> None:
    """Check what types alone cannot say: that every reference leads somewhere and numbers make sense."""

    def refuse(field: str, problem: str) -> NoReturn:
        raise BundleError(f"{where}: {MANIFEST_NAME}: field {field!r}: {problem}.")

    _check_file_names(manifest, refuse)
    _check_references(manifest, refuse)
    for field, values in (("mean", manifest.preprocess.mean), ("std", manifest.preprocess.std)):
        if not all(abs(value) <= 1e3 for value in values):
            refuse(f"preprocess.{field}", f"got {list(values)}, expected numbers on pixels in [0, 1]")
    if not all(value > 1e-6 for value in manifest.preprocess.std):
        refuse("preprocess.std", f"got {list(manifest.preprocess.std)}, expected numbers above zero")


def _check_file_names(manifest: Manifest, refuse: _Refuse) -> None:
    seen: dict[str, str] = {}
    for name in manifest.files:
        if name.lower() == MANIFEST_NAME:
            refuse("files", f"lists {name!r}, which cannot carry its own hash")
        for part in name.lower().split("/"):
            if part.endswith(".") or part.partition(".")[0] in _RESERVED:
                refuse("files", f"the name {name!r} is not usable on every system, choose another")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            refuse("files", f"the names {other!r} and {name!r} differ only in upper and lower case")


def _check_references(manifest: Manifest, refuse: _Refuse) -> None:
    def listed(field: str, name: str | None) -> None:
        if name is not None and name not in manifest.files:
            refuse(field, f"names the file {name!r}, which 'files' does not list")

    def among(field: str, name: str | None, names: dict[str, Any], kind: str) -> None:
        if name is not None and name not in names:
            refuse(field, f"names the {kind} {name!r}; the bundle has {some(names)}")

    if manifest.tokenizer is not None:
        for part in ("config", "merges", "words"):
            listed(f"tokenizer.{part}", getattr(manifest.tokenizer, part))
    for key, variant in manifest.variants.items():
        for tower_name, tower in variant.towers.items():
            field = f"variants.{key}.towers.{tower_name}"
            if tower.model not in tower.files:
                refuse(
                    f"{field}.model", f"{tower.model!r} is not among the tower's files {some(tower.files)}"
                )
            for name in tower.files:
                listed(f"{field}.files", name)
    for name in manifest.default_variants:
        among("default_variants", name, manifest.variants, "variant")
    if len(set(manifest.default_variants)) != len(manifest.default_variants):
        refuse("default_variants", f"names a variant twice: {some(manifest.default_variants)}")
    for key, bank in manifest.label_banks.items():
        listed(f"label_banks.{key}.file", bank.file)
    among("default_bank", manifest.default_bank, manifest.label_banks, "label bank")
    among("background_bank", manifest.background_bank, manifest.label_banks, "label bank")
    for key, head in manifest.heads.items():
        listed(f"heads.{key}.file", head.file)
        among(f"heads.{key}.bank", head.bank, manifest.label_banks, "label bank")
    listed("golden", manifest.golden)
    for name in manifest.model.notices:
        listed("model.notices", name)


def named_strings(value: Any) -> Iterator[str]:
    """Yield every string value in a document: what is among them may be the name of a file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from named_strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from named_strings(item)


def manifest_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a manifest, as ``docs/manifest.schema.json`` holds it.

    What types cannot say is not in it: that a name is listed in ``files``, that a default names a variant.
    """
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Manifest of an edgeclip bundle, schema {SCHEMA.major}.x",
        **msgspec.json.schema(Manifest),
    }
    definitions = document["$defs"]
    for definition in definitions.values():
        if "description" in definition:
            definition["description"] = " ".join(definition["description"].split())
    definitions["Manifest"]["properties"]["schema"] = {
        "allOf": [{"$ref": "#/$defs/SchemaVersion"}, {"properties": {"major": {"const": SCHEMA.major}}}]
    }
    plain = json.dumps(document).replace(json.dumps(_END)[1:-1], "$")
    schema: dict[str, Any] = json.loads(plain)
    return schema
