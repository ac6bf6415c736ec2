"""What a pipeline reads: found before anything heavy begins, and hashed, so that a change is noticed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any, Final

import msgspec

from edgeclip.data import read_samples
from edgeclip.errors import ConfigError, InputError
from edgeclip.hub import weights_directory
from edgeclip.label_sets import TEMPLATES, LabelSet, Templates, read_labels
from edgeclip.models.zoo import MODELS
from edgeclip.runtime.host import versions
from edgeclip.storage import hash_stream

from .options import LimitChange, Offered
from .pipeline_recipe import AccuracyGate, ExportSpec, LatencyGate, PipelineRecipe

__all__ = [
    "CHECKPOINT",
    "Inputs",
    "content_digest",
    "digest_of",
    "limits_of",
    "offered_of",
    "templates_of",
    "tools",
]

CHECKPOINT: Final = "[model] checkpoint"
"""Under which the digest of the weights stands among those of paths: no path of a recipe is called so."""

_TOOLS: Final = ("onnx", "onnx-ir", "onnxscript")
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9._@+-]+")
_TABLES: Final = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Inputs:
    """What a recipe reads, found and hashed.

    Attributes:
        checkpoint: path of the weights; ``None`` where a finished bundle is judged.
        model: name of the model, where the weights do not tell.
        bundle: the finished one.
        digests: of contents, by the path as the recipe says it, and by :data:`CHECKPOINT`.
        root: folder that paths are relative to.
    """

    checkpoint: Path | None
    model: str | None
    bundle: Path | None
    digests: Mapping[str, str]
    root: Path

    @classmethod
    def of(cls, recipe: PipelineRecipe, root: Path) -> Inputs:
        """Look for everything before anything heavy is begun.

        Raises:
            ConfigError: something is not there.
            InputError: something cannot be read.
        """
        found = {}
        for key, said in _paths(recipe):
            if not (root / said).exists():
                raise ConfigError(
                    f"recipe {recipe.name!r}: {key} is {said!r}, and there is no "
                    f"{str((root / said).absolute())!r}; paths are relative to {str(root.absolute())!r}."
                )
            found[said] = ""
        checkpoint, model = None, recipe.model.model
        if recipe.model.checkpoint is not None:
            checkpoint, model = _checkpoint(recipe.model.checkpoint, model, root)
        digests = {said: content_digest(root / said) for said in found}
        if checkpoint is not None:
            digests[CHECKPOINT] = content_digest(checkpoint)
        bundle = None if recipe.model.bundle is None else root / recipe.model.bundle
        return cls(checkpoint, model, bundle, digests, root)


def _paths(recipe: PipelineRecipe) -> Iterator[tuple[str, str]]:
    """Yield the key and value of everything in a recipe that is a path."""
    if recipe.model.bundle is not None:
        yield "[model] 'bundle'", recipe.model.bundle
    export = recipe.export
    if export is not None:
        if isinstance(export.labels, str):
            yield "[export] 'labels'", export.labels
        if export.templates is not None and _is_file(export.templates):
            yield "[export] 'templates'", export.templates
        if export.reference is not None:
            yield "[export] 'reference'", export.reference
    if recipe.calibration.data is not None:
        yield "[calibration] 'data'", recipe.calibration.data
    if recipe.calibration.latency_table is not None:
        yield "[calibration] 'latency_table'", recipe.calibration.latency_table
    if recipe.bench is not None and recipe.bench.images is not None:
        yield "[bench] 'images'", recipe.bench.images
    for gate in recipe.gate:
        if isinstance(gate, AccuracyGate):
            yield f"gate {gate.name!r} 'data'", gate.data
            if isinstance(gate.labels, str):
                yield f"gate {gate.name!r} 'labels'", gate.labels
            if gate.templates is not None and _is_file(gate.templates):
                yield f"gate {gate.name!r} 'templates'", gate.templates
        if isinstance(gate, LatencyGate) and gate.baseline_bundle is not None:
            yield f"gate {gate.name!r} 'baseline_bundle'", gate.baseline_bundle


def _checkpoint(said: str, model: str | None, root: Path) -> tuple[Path, str | None]:
    """Return the weights that a recipe means: a path, or a model of the zoo that was pulled.

    Raises:
        ConfigError: it is neither.
    """
    path = root / Path(said).expanduser()
    if path.exists():
        return path, model
    entry = MODELS.get(said)
    if entry is None or entry.weights is None:
        raise ConfigError(
            f"[model] 'checkpoint' is {said!r}: there is no {str(path.absolute())!r}, and no model of "
            "`edgeclip models list` with published weights is called so."
        )
    folder = weights_directory(said)
    found = next((folder / name for name in entry.weights.files if (folder / name).is_file()), None)
    if found is None:
        raise ConfigError(
            f"[model] 'checkpoint' is {said!r}: its weights are not in {str(folder)!r}; run "
            f"`edgeclip models pull {said}`."
        )
    return found, said


def _is_file(templates: str) -> bool:
    return templates not in TEMPLATES and "{}" not in templates


def content_digest(path: Path) -> str:
    """Return the sha256 of a file, of all files of a folder, or of a table and the pictures it names.

    Raises:
        InputError: something cannot be read.
    """
    digest = hashlib.sha256()
    try:
        if path.is_dir():
            for each in sorted(path.rglob("*")):
                if each.is_file():
                    digest.update(f"{each.relative_to(path).as_posix()}\0{_file_digest(each)}\n".encode())
            return digest.hexdigest()
        digest.update(_file_digest(path).encode())
    except OSError as error:
        raise InputError(
            f"{str(error.filename or path)!r} cannot be read: {error.strerror or error}."
        ) from error
    if path.suffix.lower() in _TABLES:
        for sample in read_samples([path]):
            if isinstance(sample.source, Path):
                with contextlib.suppress(
                    OSError
                ):  # a picture that is not there is left out, or refused, later
                    digest.update(f"{sample.key}\0{_file_digest(sample.source)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with FileIO(path) as stream:
        return hash_stream(stream)[1]


def tools() -> dict[str, str]:
    """Return the versions of what decides the bytes and numbers of a run."""
    found = versions()
    for name in _TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def digest_of(**said: Any) -> str:
    """Return the digest of what a result depends on."""
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, default=msgspec.to_builtins)
    return hashlib.sha256(text.encode()).hexdigest()


def limits_of(export: ExportSpec) -> tuple[LimitChange, ...]:
    """Return the limits of parity that are set on purpose.

    Raises:
        ConfigError: one cannot be read.
    """
    return tuple(LimitChange.parse(text) for text in export.limits)


def offered_of(export: ExportSpec, root: Path) -> Offered | None:
    """Return the labels of the bundle, ``None`` for the usual ones.

    Raises:
        InputError: the file cannot be used.
    """
    if export.labels is None:
        return None
    given = export.labels
    labels = read_labels(str(root / given)) if isinstance(given, str) else LabelSet.of(given)
    name = _NOT_IN_A_NAME.sub("-", Path(given).stem).strip("-.") if isinstance(given, str) else ""
    templates = None if export.templates is None else templates_of(export.templates, root)
    return Offered(name or "labels", labels, templates)


def templates_of(said: str, root: Path) -> Templates:
    """Return prompts: those of a name, a prompt itself, or those of a file.

    Raises:
        InputError: the file cannot be used.
    """
    return Templates.read(str(root / said)) if _is_file(said) else Templates.of(said)
