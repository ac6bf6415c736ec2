"""The deployment format: a directory of files named, sized and hashed by one ``manifest.json``.

Reading (:class:`Bundle`) parses the manifest only; a file is checked against its sha256 at its first use. Nothing
that the manifest does not list is read, and no name or link leads out of the directory. Writing
(:class:`BundleWriter`) puts content-addressed files in place first and replaces ``manifest.json`` last: that is the
commit point, so that a process killed at any moment leaves the complete old or the complete new bundle.

The format is specified in ``docs/bundle-format.md`` and ``docs/manifest.schema.json``. No pickle, no code, and no
network here; what a tower computes is the business of ``runtime/``.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import stat
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

import msgspec
from msgspec import Meta, Struct

from edgeclip.errors import BundleError

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "BankEntry",
    "Bundle",
    "BundleWriter",
    "FileEntry",
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
    "TowerFiles",
    "Variant",
    "VariantEntry",
    "embedding_space",
    "encode_manifest",
    "parse_manifest",
    "provenance_time",
    "stored_name",
]

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 8 << 20
MAX_FILE_BYTES = 1 << 36

_log = logging.getLogger(__name__)

# `$` alone also matches before a final newline in Python (not in ECMAScript, which JSON Schema uses): hence (?!\n).
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


# --- the manifest, typed ---------------------------------------------------------------------------------------------


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

    ``image_size_px`` is ``(H, W)``; ``mean`` and ``std`` are per RGB channel on pixels in [0, 1]; ``applied`` says
    whether scaling, mean and std are part of the graph or are done by the host.
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
    """Files and interface of one tower: ``model`` is the file to open, ``files`` all it needs (``model`` included)."""

    model: FileName
    files: Annotated[tuple[FileName, ...], Meta(min_length=1)]
    inputs: Annotated[tuple[TensorEntry, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[TensorEntry, ...], Meta(min_length=1)]


class Requires(Struct, frozen=True, kw_only=True):
    """What a host must offer: any of these instruction sets, an engine version (``>=1.20``), a GPU capability."""

    isa_any: tuple[Word, ...] = ()
    engine: str | None = None
    compute_capability: str | None = None


class Parity(Struct, frozen=True, kw_only=True):
    """Measured agreement of a tower with its eager float32 form; numbers are absent where nothing was run.

    ``n`` counts the compared samples, ``bank`` names the label bank behind the top-k agreements, ``proxy`` says what
    was run in place of an engine that is not available where the bundle was made.
    """

    status: Literal["passed", "unverified"]
    max_abs: float | None = None
    cosine_min: float | None = None
    cosine_mean: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    n: Count = 0
    bank: KeyName | None = None
    host: dict[str, Any] = {}
    proxy: str | None = None


class VariantEntry(Struct, frozen=True, kw_only=True):
    """One format × precision × target of the model.

    ``format`` is ``onnx``, ``openvino`` or ``tensorrt``, ``precision`` is ``fp32``, ``fp16`` or ``int8``; a reader
    skips a variant whose words it does not know. ``parity`` has one entry a tower. ``session_config`` are engine
    settings the variant was verified with (for ONNX Runtime: session configuration entries).
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

    ``templates`` names the prompt templates, ``variant`` the text tower's variant it was made with, ``language`` the
    language of the labels, ``aliases`` the further languages in which its labels can be asked for.
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

    ``parameters`` counts per tower; ``scale`` multiplies cosines (``exp`` of the learnt logarithm, at most 100);
    ``parents`` are the models it descends from; ``embedding_space`` is the digest from :func:`embedding_space`;
    ``notices`` are listed files with the texts its licences ask for.
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
    """Everything a bundle says about itself. Fields this version does not know stay in ``Bundle.raw``."""

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


def provenance_time() -> str:
    """Return the time for ``provenance`` in UTC: ``SOURCE_DATE_EPOCH`` where set, else now.

    Raises:
        BundleError: ``SOURCE_DATE_EPOCH`` is not a number of seconds.
    """
    said = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        now = (
            datetime.datetime.fromtimestamp(int(said), datetime.timezone.utc)
            if said
            else datetime.datetime.now(datetime.timezone.utc)
        )
    except (ValueError, OverflowError, OSError) as error:
        raise BundleError(
            f"SOURCE_DATE_EPOCH is {said!r}, expected a whole number of seconds since 1970: correct or unset it."
        ) from error
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


# --- parsing and checking --------------------------------------------------------------------------------------------


def parse_manifest(data: bytes, where: str) -> tuple[dict[str, Any], Manifest]:
    """Parse and check a manifest; return the raw document and its typed view.

    Args:
        data: content of ``manifest.json``.
        where: the bundle, as messages name it.

    Raises:
        BundleError: not JSON, an unknown schema major, or a field that cannot be used; the message names the field.
    """
    raw = _parse_json(data, where)
    _check_schema(raw, where)
    try:
        manifest = msgspec.convert(raw, Manifest)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} cannot be used: {_one_line(error)}.") from error
    _check_manifest(manifest, where)
    return raw, manifest


def encode_manifest(raw: dict[str, Any]) -> bytes:
    """Return the canonical bytes of a manifest: fields in the order of :class:`Manifest`, all below them sorted."""
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
        raise BundleError(f"{where}: {MANIFEST_NAME} is not valid JSON: {_one_line(error)}.") from error
    if not isinstance(raw, dict):
        raise BundleError(f"{where}: {MANIFEST_NAME} holds a JSON {type(raw).__name__}, expected an object.")
    return raw


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} appears twice in one object")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


def _check_schema(raw: dict[str, Any], where: str) -> None:
    def version(field: str) -> SchemaVersion:
        try:
            return msgspec.convert(raw.get(field), SchemaVersion)
        except (msgspec.ValidationError, OverflowError) as error:
            raise BundleError(
                f"{where}: {MANIFEST_NAME}: field {field!r} cannot be used: {_one_line(error)}; expected "
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
            f"{where}: the bundle asks for a reader of schema {needed}, this edgeclip reads {SCHEMA}: update edgeclip."
        )


def _check_manifest(manifest: Manifest, where: str) -> None:
    """Check what types alone cannot say: that every reference leads somewhere and every number makes sense."""

    def refuse(field: str, problem: str) -> NoReturn:
        raise BundleError(f"{where}: {MANIFEST_NAME}: field {field!r}: {problem}.")

    _check_file_names(manifest, refuse)
    _check_references(manifest, refuse)
    for field, values in (("mean", manifest.preprocess.mean), ("std", manifest.preprocess.std)):
        if not all(abs(value) <= 1e3 for value in values):
            refuse(f"preprocess.{field}", f"got {list(values)}, expected numbers on pixels in [0, 1]")
    if not all(value > 1e-6 for value in manifest.preprocess.std):
        refuse("preprocess.std", f"got {list(manifest.preprocess.std)}, expected numbers above zero")


def _check_file_names(manifest: Manifest, refuse: Any) -> None:
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


def _check_references(manifest: Manifest, refuse: Any) -> None:
    def listed(field: str, name: str | None) -> None:
        if name is not None and name not in manifest.files:
            refuse(field, f"names the file {name!r}, which 'files' does not list")

    def among(field: str, name: str | None, names: dict[str, Any], kind: str) -> None:
        if name is not None and name not in names:
            refuse(field, f"names the {kind} {name!r}; the bundle has {sorted(names)}")

    if manifest.tokenizer is not None:
        for part in ("config", "merges", "words"):
            listed(f"tokenizer.{part}", getattr(manifest.tokenizer, part))
    for key, variant in manifest.variants.items():
        for tower_name, tower in variant.towers.items():
            field = f"variants.{key}.towers.{tower_name}"
            if tower.model not in tower.files:
                refuse(
                    f"{field}.model", f"{tower.model!r} is not among the tower's files {list(tower.files)}"
                )
            for name in tower.files:
                listed(f"{field}.files", name)
    for name in manifest.default_variants:
        among("default_variants", name, manifest.variants, "variant")
    if len(set(manifest.default_variants)) != len(manifest.default_variants):
        refuse("default_variants", f"names a variant twice: {list(manifest.default_variants)}")
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


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerFiles:
    """One tower, ready to be opened: its files are on disk and their hashes are checked.

    ``digest`` is over the hashes of its files: the same network has the same digest in every bundle.
    """

    tower: str
    model: Path
    files: tuple[Path, ...]
    variant: str
    format: str
    precision: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    requires: Requires
    session_config: dict[str, str]
    digest: str


@dataclass(frozen=True)
class Variant:
    """One variant of an open bundle."""

    bundle: Bundle
    name: str
    entry: VariantEntry

    def tower(self, name: str) -> TowerFiles:
        """Check and return the files of the tower ``"image"`` or ``"text"``.

        Raises:
            BundleError: the variant has no such tower, or a file is missing or damaged.
        """
        entry = self._entry(name)
        return TowerFiles(
            tower=name,
            model=self.bundle.file(entry.model),
            files=tuple(self.bundle.file(file) for file in entry.files),
            variant=self.name,
            format=self.entry.format,
            precision=self.entry.precision,
            inputs=entry.inputs,
            outputs=entry.outputs,
            requires=self.entry.requires,
            session_config=dict(self.entry.session_config),
            digest=self.tower_digest(name),
        )

    def tower_digest(self, name: str) -> str:
        """Return the digest of a tower without reading its files (they are named by hash in the manifest)."""
        entry = self._entry(name)
        hashes = {file: self.bundle.manifest.files[file].sha256 for file in entry.files}
        ordered = [hashes.pop(entry.model), *sorted(hashes.values())]
        return hashlib.sha256("\n".join(ordered).encode()).hexdigest()

    def _entry(self, name: str) -> TowerEntry:
        entry = self.entry.towers.get(name)
        if entry is None:
            raise BundleError(
                f"{self.bundle.where}: variant {self.name!r} has no {name!r} tower, only {sorted(self.entry.towers)}: "
                "use a bundle that was not slimmed without it."
            )
        return entry


class Bundle:
    """An open bundle: its manifest in memory, its files read and checked when asked for.

    Opening reads ``manifest.json`` and nothing else. Safe to share between threads; never writes.

    Attributes:
        path: the directory, absolute.
        manifest: the typed manifest.
        raw: the manifest as read, with the fields this version does not know. Not to be modified.
        digest: sha256 of ``manifest.json``.
        where: how messages name this bundle.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.where = f"bundle {str(path)!r}"
        self.raw, self.manifest = parse_manifest(data, self.where)
        self.digest = hashlib.sha256(data).hexdigest()
        self._root = os.path.realpath(path)
        self._checked: dict[str, Path] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | os.PathLike[str] = "default") -> Bundle:
        """Open a bundle directory, or with the word ``"default"`` the one that comes with edgeclip.

        Raises:
            BundleError: no such directory, no manifest, or a manifest that cannot be used.
        """
        if path == "default":
            directory = Path(__file__).parent / "assets" / "default"
            if not (directory / MANIFEST_NAME).is_file():
                raise BundleError(
                    "this installation of edgeclip has no embedded default bundle: reinstall edgeclip from a wheel, "
                    "or name a bundle directory."
                )
        else:
            directory = Path(path)
        return cls(directory.absolute(), _read_manifest(directory))

    def file(self, name: str) -> Path:
        """Return the path of a listed file, its size and sha256 checked at the first call.

        Raises:
            BundleError: the manifest does not list it, or it is missing, damaged, or outside the directory.
        """
        with self._lock:
            checked = self._checked.get(name)
            own = self._locks.setdefault(name, threading.Lock())
        if checked is not None:
            return checked
        entry = self._entry(name)
        with own:
            if name not in self._checked:
                path, descriptor = self._open(name)
                with os.fdopen(descriptor, "rb", buffering=0) as stream:
                    self._compare(name, entry, os.fstat(descriptor).st_size, None)
                    self._compare(name, entry, *self._guard(name, lambda: _hash_stream(stream)))
                self._checked[name] = path
        return self._checked[name]

    def read(self, name: str) -> bytes:
        """Return the content of a listed file; what is returned is what was checked.

        Raises:
            BundleError: as :meth:`file`.
        """
        entry = self._entry(name)
        path, descriptor = self._open(name)
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            self._compare(name, entry, os.fstat(descriptor).st_size, None)
            data = self._guard(name, stream.readall)
        known = name in self._checked
        self._compare(name, entry, len(data), None if known else hashlib.sha256(data).hexdigest())
        self._checked[name] = path
        return data

    def variant(self, name: str) -> Variant:
        """Return a variant by its name.

        Raises:
            BundleError: there is no such variant; the message lists those there are.
        """
        entry = self.manifest.variants.get(name)
        if entry is None:
            raise BundleError(f"{self.where}: no variant {name!r}; it has {sorted(self.manifest.variants)}.")
        return Variant(self, name, entry)

    def check_files(self) -> None:
        """Check every listed file.

        Raises:
            BundleError: the first file that is missing or damaged.
        """
        for name in self.manifest.files:
            self.file(name)

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(
                f"{self.where}: its manifest does not list the file {name!r}, so it is not read."
            )
        return entry

    def _open(self, name: str) -> tuple[Path, int]:
        try:
            return _open_inside(self._root, name)
        except FileNotFoundError as error:
            raise BundleError(
                f"{self.where}: the file {name!r} is missing: copy or export the bundle again."
            ) from error
        except OSError as error:
            raise BundleError(f"{self.where}: the file {name!r} cannot be read: {_reason(error)}.") from error

    def _guard(self, name: str, read: Any) -> Any:
        try:
            return read()
        except (OSError, MemoryError) as error:
            raise BundleError(f"{self.where}: the file {name!r} cannot be read: {_reason(error)}.") from error

    def _compare(self, name: str, entry: FileEntry, size_bytes: int, sha256: str | None) -> None:
        if size_bytes != entry.size_bytes:
            problem = f"has {size_bytes} bytes, the manifest says {entry.size_bytes}"
        elif sha256 is not None and sha256 != entry.sha256:
            problem = f"has sha256 {sha256[:16]}…, the manifest says {entry.sha256[:16]}…"
        else:
            return
        raise BundleError(
            f"{self.where}: the file {name!r} is damaged: it {problem}: copy or export the bundle again."
        )


def _read_manifest(directory: Path) -> bytes:
    where = f"bundle {str(directory)!r}"
    try:
        if not directory.is_dir():
            kind = "is a file" if directory.exists() else "does not exist"
            raise BundleError(f"{where}: {kind}, expected a directory with a {MANIFEST_NAME}.")
        _, descriptor = _open_inside(os.path.realpath(directory), MANIFEST_NAME)
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1) or b""
            while len(data) <= MAX_MANIFEST_BYTES and (
                more := stream.read(MAX_MANIFEST_BYTES + 1 - len(data))
            ):
                data += more
    except FileNotFoundError as error:
        raise BundleError(
            f"{where}: has no {MANIFEST_NAME}, so it is not a bundle (or its writing never ended)."
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} cannot be read: {_reason(error)}.") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{where}: {MANIFEST_NAME} has more than {MAX_MANIFEST_BYTES} bytes, which no bundle needs."
        )
    return data


def _reason(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
    return said[:1].lower() + said[1:]


def _open_inside(root: str, name: str) -> tuple[Path, int]:
    """Open a regular file below the resolved directory ``root``; links are followed only while they stay inside.

    Returns the resolved path and a descriptor for reading. Raises ``OSError``.
    """
    resolved = os.path.realpath(os.path.join(root, *name.split("/")))  # noqa: PTH118
    if os.path.commonpath([root, resolved]) != root or resolved == root:
        raise OSError(errno.EPERM, "it is a link that leads out of the bundle")
    flags = os.O_RDONLY
    for flag in (
        "O_NOFOLLOW",
        "O_NONBLOCK",
        "O_CLOEXEC",
        "O_BINARY",
    ):  # not blocking: a named pipe must not hang us
        flags |= getattr(os, flag, 0)
    descriptor = os.open(resolved, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return Path(resolved), descriptor


def _hash_stream(stream: Any) -> tuple[int, str]:
    """Return size and sha256 of what is left in an unbuffered stream."""
    digest, size_bytes = hashlib.sha256(), 0
    buffer = memoryview(bytearray(1 << 18))
    while count := stream.readinto(buffer):
        digest.update(buffer[:count])
        size_bytes += count
    return size_bytes, digest.hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------

_TAGGED = re.compile(r"\.[0-9a-f]{8}(?=(\.[A-Za-z0-9]+)?(\.gz)?$)")
_TEMPORARY_PREFIX, _LOCK_NAME = ".edgeclip-tmp-", ".edgeclip-lock"


def stored_name(name: str, sha256: str) -> str:
    """Return the name under which :class:`BundleWriter` stores a file: with 8 digits of its hash.

    ``onnx-int8/image.onnx`` becomes ``onnx-int8/image.1a2b3c4d.onnx``; a tag that is already there is replaced. Use
    it where another file must name this one, as an ONNX graph names its external data.
    """
    folder, slash, base = name.rpartition("/")
    base = _TAGGED.sub("", base)
    stem, suffixes = base, ""
    for wanted in (r"\.gz$", r"\.[A-Za-z0-9]+$"):
        if (match := re.search(wanted, stem)) and match.start():
            stem, suffixes = stem[: match.start()], match.group() + suffixes
    return f"{folder}{slash}{stem}.{sha256[:8]}{suffixes}"


class BundleWriter:
    """Write a new bundle, or change an existing one, so that a kill at any moment leaves a complete bundle.

    Files go to disk as they are added, under names no committed manifest uses for other content; :meth:`commit`
    replaces ``manifest.json`` and is the moment the new bundle exists. Files only the previous manifest used stay until
    the next write, so that processes which hold it open keep working. One writer a directory, held by a lock that the
    system releases with the process. A context manager: leaving it without :meth:`commit` takes back what was added.

    Attributes:
        path: the directory, absolute.
        manifest: the document to be written; edit it freely. It starts as the one given, else as the existing
            bundle's, else nearly empty. ``files``, ``schema`` and ``provenance.time`` are filled in by
            :meth:`commit`; ``provenance.time`` is kept where a given manifest has it.

    Raises:
        BundleError: the directory cannot be written, holds a bundle this version cannot read, or has another writer.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, manifest: dict[str, Any] | Manifest | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self.where = f"bundle {str(self.path)!r}"
        self._added: dict[str, dict[str, Any]] = {}
        self._created: set[str] = set()
        self._lock: _DirectoryLock | None = None
        with self._translated("cannot be written"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _DirectoryLock(self.path, self.where)
        try:
            self._previous = self._existing()
            if manifest is None:
                self.manifest = copy.deepcopy(self._previous)
                if isinstance(self.manifest.get("provenance"), dict):
                    self.manifest["provenance"].pop("time", None)
            elif isinstance(manifest, Manifest):
                self.manifest = cast("dict[str, Any]", msgspec.to_builtins(manifest))
            else:
                self.manifest = copy.deepcopy(manifest)
        except BaseException:
            self._lock.release()
            raise
        self._committed_files = set(self._previous.get("files", {}))

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, name: str, content: bytes | os.PathLike[str]) -> str:
        """Store a file and return its name in the bundle, which carries 8 digits of its hash.

        Args:
            name: relative posix path, as ``onnx-int8/image.onnx``.
            content: its bytes, or the path of a file to copy.

        Raises:
            BundleError: a name that cannot be used, an unreadable source, a full disk or read-only directory.
        """
        self._open_or_raise()
        try:
            msgspec.convert(name, FileName)
        except msgspec.ValidationError as error:
            raise BundleError(
                f"{self.where}: the name {name!r} cannot be used: expected a relative path of letters, digits and ._@+-."
            ) from error
        folder = self.path.joinpath(*name.split("/")[:-1])
        with self._translated(f"the file {name!r} cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            if os.path.realpath(folder) != os.path.join(os.path.realpath(self.path), *name.split("/")[:-1]):  # noqa: PTH118
                raise OSError(errno.EPERM, "its folder is a link")
            with _temporary(folder) as (temporary, descriptor):
                size_bytes, sha256 = _copy(content, descriptor)
                stored = stored_name(name, sha256)
                entry = {"sha256": sha256, "size_bytes": size_bytes}
                self._check_collision(stored, entry)
                target = self.path.joinpath(*stored.split("/"))
                existed = target.exists()
                os.replace(temporary, target)  # noqa: PTH105
        if not existed:
            self._created.add(stored)
        self._added[stored] = entry
        return stored

    def commit(self) -> Bundle:
        """Make what was added and said the bundle, release the lock and return it opened.

        Raises:
            BundleError: the manifest cannot be used, or the disk refuses; the old bundle is intact.
        """
        self._open_or_raise()
        self.manifest.setdefault("schema", msgspec.to_builtins(SCHEMA))
        self.manifest.setdefault("min_reader", {"major": SCHEMA.major, "minor": 0})
        provenance = self.manifest.setdefault("provenance", {})
        if isinstance(provenance, dict):
            provenance.setdefault("time", provenance_time())
        self.manifest["files"] = self._referenced_files()
        try:
            data = encode_manifest(self.manifest)
        except (TypeError, ValueError, RecursionError) as error:
            raise BundleError(
                f"{self.where}: the manifest cannot be written as JSON: {_one_line(error)}."
            ) from error
        _, manifest = parse_manifest(data, self.where)
        self._check_present(manifest)
        with self._translated("cannot be written"):
            self._sweep(keep=self._committed_files | set(manifest.files))
            for folder in {self.path.joinpath(*name.split("/")[:-1]) for name in manifest.files} | {
                self.path
            }:
                _sync_directory(folder)
            with _temporary(self.path) as (temporary, descriptor):
                _copy(data, descriptor)
                os.replace(temporary, self.path / MANIFEST_NAME)  # noqa: PTH105
            self._created.clear()
            _sync_directory(self.path)
        self.close()
        return Bundle.open(self.path)

    def close(self) -> None:
        """Release the lock; without a :meth:`commit` before, remove what was added."""
        if self._lock is None:
            return
        for name in self._created:
            with contextlib.suppress(OSError):
                self.path.joinpath(*name.split("/")).unlink()
        self._created.clear()
        self._lock.release()
        self._lock = None

    def _open_or_raise(self) -> None:
        if self._lock is None:
            raise BundleError(
                f"{self.where}: this writer has ended: make a new BundleWriter for further changes."
            )

    @contextlib.contextmanager
    def _translated(self, what: str) -> Any:
        try:
            yield
        except OSError as error:
            raise BundleError(f"{self.where}: {what}: {_reason(error)}.") from error

    def _existing(self) -> dict[str, Any]:
        if not (self.path / MANIFEST_NAME).exists():
            return {}
        raw, _ = parse_manifest(_read_manifest(self.path), self.where)
        return raw

    def _check_collision(self, stored: str, entry: dict[str, Any]) -> None:
        known = self._added.get(stored) or self._previous.get("files", {}).get(stored)
        if known is not None and known["sha256"] != entry["sha256"]:
            raise BundleError(
                f"{self.where}: two files would both be called {stored!r}: their hashes agree in 8 digits; "
                "choose another name for one."
            )

    def _referenced_files(self) -> dict[str, Any]:
        """Return the entries of the added files and of the older ones that any field still names."""
        said: dict[str, Any] = {**self._previous.get("files", {})}
        given = self.manifest.get("files")
        if isinstance(given, dict):
            said.update(given)
        named = set(_strings({key: value for key, value in self.manifest.items() if key != "files"}))
        return {**{name: said[name] for name in said if name in named}, **self._added}

    def _check_present(self, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            try:
                size_bytes = self.path.joinpath(*name.split("/")).stat().st_size
            except OSError as error:
                raise BundleError(
                    f"{self.where}: the manifest names {name!r}, which was not added: {_reason(error)}."
                ) from error
            if size_bytes != entry.size_bytes:
                raise BundleError(
                    f"{self.where}: the file {name!r} has {size_bytes} bytes, the manifest says {entry.size_bytes}."
                )

    def _sweep(self, keep: set[str]) -> None:
        """Remove files an earlier write left behind; only names this class gives are touched."""
        for folder, _, names in os.walk(self.path, topdown=False):
            for base in names:
                path = Path(folder, base)
                ours = base.startswith(_TEMPORARY_PREFIX) or _TAGGED.search(base)
                if ours and path.relative_to(self.path).as_posix() not in keep:
                    path.unlink(missing_ok=True)
            if Path(folder) != self.path:
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


@contextlib.contextmanager
def _temporary(folder: Path) -> Any:
    """Yield path and descriptor of a new file in ``folder``; removed again unless it was renamed."""
    path = folder / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags, 0o666)  # the umask decides, as for any file the user writes
    try:
        yield path, descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()


def _copy(content: bytes | os.PathLike[str], descriptor: int) -> tuple[int, str]:
    """Write ``content`` to a descriptor, sync and close it; return size and sha256 of what was written."""
    with os.fdopen(descriptor, "wb", buffering=0) as out:
        if isinstance(content, (bytes, bytearray, memoryview)):
            _write_all(out, memoryview(content))
            size_bytes, sha256 = len(content), hashlib.sha256(content).hexdigest()
        else:
            digest, size_bytes = hashlib.sha256(), 0
            with Path(content).open("rb", buffering=0) as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    _write_all(out, memoryview(chunk))
            sha256 = digest.hexdigest()
        os.fsync(out.fileno())
    return size_bytes, sha256


def _write_all(out: Any, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]


def _sync_directory(folder: Path) -> None:
    """Make renames in ``folder`` durable; a no-op where directories cannot be opened (Windows)."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems refuse to sync a directory
        _log.debug("cannot sync %s: %s", folder, error)
    finally:
        os.close(descriptor)


class _DirectoryLock:
    """An advisory lock on a directory, released by the system when the process ends, however it ends."""

    def __init__(self, directory: Path, where: str) -> None:
        self._path = directory / _LOCK_NAME
        self._descriptor: int | None = None
        for _ in range(100):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            if not _try_lock(descriptor):
                os.close(descriptor)
                raise BundleError(
                    f"{where}: another process is writing it: wait for it to end and try again."
                )
            try:
                current = os.stat(self._path)  # noqa: PTH116
            except FileNotFoundError:
                current = None
            if current is not None and os.path.samestat(current, os.fstat(descriptor)):
                self._descriptor = descriptor
                return
            os.close(descriptor)  # its last holder removed the file between our open and our lock
        raise BundleError(
            f"{where}: its lock file {str(self._path)!r} keeps changing: remove it and try again."
        )

    def release(self) -> None:
        """Remove the lock file and release the lock; harmless when repeated."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()  # Windows refuses while it is open: the empty file stays, and does no harm
        os.close(self._descriptor)
        self._descriptor = None

    def __del__(self) -> None:
        self.release()


def _try_lock(descriptor: int) -> bool:
    """Lock an open file without waiting; return whether it is ours."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (
        OSError
    ) as error:  # a file system without locks: writing is still atomic, only two writers may race
        _log.debug("no locks here: %s", error)
    return True
