"""Checkpoints: a directory with ``config.json``, ``model.safetensors`` and the tokenizer's files.

``config.json`` (schema 2)::

    {"schema": 2, "model": {…CLIPConfig…}, "scale": 14.3, "dtype": "float16",
     "tokenizer": {"digest": "…", "files": {"tokenizer.json": "<sha256>", …}}, "licence": "…", "parents": […],
     "external_weights": [{"prefix", "package", "version", "file", "sha256", "keys"}]}

``model.safetensors`` holds the unfolded weights under our names. Weights we did not train need not be copied:
an entry of ``external_weights`` says which file of which published package gives every key under ``prefix``,
how that file calls them (``keys``) and its sha256. Schema 1 knew one architecture, ``clip-posterior-bag``,
and its towers carry no ``kind``; it is still read. Loading is strict: every missing and every unexpected key
is named. Nothing is unpickled but tensors (``torch.load(weights_only=True)``), and only after the hash
agrees.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edgeclip.errors import ConfigError, InputError
from edgeclip.models.clip import CLIP, MAX_SCALE, build_clip
from edgeclip.models.config import CLIPConfig, config_from_dict, config_to_dict
from edgeclip.models.efficientnet_lite import rename_lite_pytorch_keys, rename_timm_keys
from edgeclip.models.foreign import ForeignModel, Source, load_foreign
from edgeclip.models.keys import Differences, KeyMismatchError
from edgeclip.models.state_files import write_state

__all__ = [
    "CheckpointInfo",
    "ExternalWeights",
    "LoadedModel",
    "info_of_foreign",
    "load_checkpoint",
    "load_external_weights",
    "load_model",
    "read_checkpoint_info",
    "save_checkpoint",
]

SCHEMA = 2
_FIRST_ARCHITECTURE = "clip-posterior-bag"  # the only one of schema 1
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_UNKNOWN_LICENCE = "NOASSERTION"  # SPDX's word for it
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_RENAMES: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "lite-pytorch": rename_lite_pytorch_keys,
    "timm": rename_timm_keys,
}


@dataclass(frozen=True, kw_only=True)
class ExternalWeights:
    """Weights that stay in the published package they come from.

    Attributes:
        prefix: our keys that come from there, ``"image_tower.backbone."``.
        package: name of the package.
        version: its version.
        file: path inside the package.
        sha256: of that file.
        keys: how it calls its keys: ``"lite-pytorch"`` or ``"timm"``.
        licence: SPDX identifier.
    """

    prefix: str
    package: str
    version: str
    file: str
    sha256: str
    keys: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What ``config.json`` says.

    Attributes:
        config: both towers and the preprocessing.
        scale: multiplier of cosines.
        dtype: how the weights are stored.
        tokenizer_digest: ``Tokenizer.digest``.
        tokenizer_files: sha256 of each of its files.
        licence: SPDX expression.
        parents: what the weights descend from.
        external_weights: weights that are not in the directory.
    """

    config: CLIPConfig
    scale: float
    dtype: Literal["float32", "float16"] = "float32"
    tokenizer_digest: str = ""
    tokenizer_files: Mapping[str, str]
    licence: str = "Apache-2.0"
    parents: tuple[Mapping[str, Any], ...] = ()
    external_weights: tuple[ExternalWeights, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model from a checkpoint of ours or of others.

    Attributes:
        model: in float32, in eval mode, unfolded.
        config: what it was built from.
        source: whose file it was; ``"edgeclip"`` for ours.
        licence: SPDX expression or the hub's word.
        parents: what the weights descend from.
    """

    model: CLIP
    config: CLIPConfig
    source: Source | Literal["edgeclip"]
    licence: str
    parents: tuple[Mapping[str, Any], ...] = ()


def load_model(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    external: Mapping[str, str | os.PathLike[str]] | None = None,
) -> LoadedModel:
    """Return the model of a checkpoint, ours or a foreign one.

    Args:
        path: a directory of ours, or a weights file of others
            (:func:`~edgeclip.models.foreign.load_foreign`).
        model: name of the model in the zoo, where foreign weights alone do not tell.
        external: see :func:`load_checkpoint`.

    Raises:
        InputError: the checkpoint is missing, damaged, or cannot be told apart from another.
        ConfigError: its config cannot be used, or ``model`` is unknown or stands beside a checkpoint of ours.
    """
    if not (Path(path) / _CONFIG).is_file():
        found = load_foreign(path, model=model)
        info = info_of_foreign(found)
        return LoadedModel(
            model=found.model,
            config=found.config,
            source=found.source,
            licence=info.licence,
            parents=info.parents,
        )
    info = read_checkpoint_info(path)
    if model is not None:
        raise ConfigError(
            f"checkpoint {str(path)!r} says itself that it is {info.config.name!r}, got model {model!r}; "
            "leave it out."
        )
    return LoadedModel(
        model=load_checkpoint(path, external=external),
        config=info.config,
        source="edgeclip",
        licence=info.licence,
        parents=info.parents,
    )


def info_of_foreign(
    foreign: ForeignModel, *, tokenizer_digest: str = "", dtype: Literal["float32", "float16"] = "float32"
) -> CheckpointInfo:
    """Return what a checkpoint of ours says about foreign weights.

    Args:
        foreign: as it was loaded.
        tokenizer_digest: of the tokenizer whose files :func:`save_checkpoint` is given; for CLIP's vocabulary
            ``Tokenizer.clip().digest``.
        dtype: how the weights will be stored.
    """
    return CheckpointInfo(
        config=foreign.config,
        scale=_scale(foreign.model),
        dtype=dtype,
        tokenizer_digest=tokenizer_digest,
        tokenizer_files={},
        licence=foreign.licence or _UNKNOWN_LICENCE,
        parents=foreign.parents,
    )


def _scale(model: CLIP) -> float:
    """Return the multiplier of cosines; a published logarithm may be a little beyond the limit."""
    return min(model.logit_scale.exp().item(), MAX_SCALE)


def save_checkpoint(
    model: CLIP,
    directory: str | os.PathLike[str],
    info: CheckpointInfo,
    *,
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """Write a checkpoint; ``config.json`` last, so that a directory that has one is complete.

    Args:
        model: whose weights are stored, unfolded.
        directory: made if missing.
        info: what ``config.json`` will say; its ``scale`` and ``tokenizer_files`` are taken from the other
            arguments.
        tokenizer_files: content by file name (``Tokenizer.files``).

    Raises:
        ConfigError: a weight does not fit into ``info.dtype``.
        InputError: the directory cannot be written.
    """
    directory = Path(directory)
    outside = tuple(entry.prefix for entry in info.external_weights)
    state = {
        key: value.detach().to(_DTYPES[info.dtype]).contiguous()
        if value.is_floating_point()
        else value.contiguous()
        for key, value in model.state_dict().items()
        if not key.startswith(outside)
    }
    too_large = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if too_large:
        raise ConfigError(
            f"checkpoint {str(directory)!r}: {too_large[:5]} hold numbers that are not finite in "
            f"{info.dtype}, expected none; store it as float32, and if it is, the model is broken."
        )
    said = {
        "schema": SCHEMA,
        "model": config_to_dict(info.config),
        "scale": _scale(model),
        "dtype": info.dtype,
        "tokenizer": {
            "digest": info.tokenizer_digest,
            "files": {
                name: hashlib.sha256(content).hexdigest() for name, content in sorted(tokenizer_files.items())
            },
        },
        "licence": info.licence,
        "parents": [dict(parent) for parent in info.parents],
        "external_weights": [asdict(entry) for entry in info.external_weights],
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in tokenizer_files.items():
            (directory / name).write_bytes(content)
        write_state(directory / _WEIGHTS, state)
        text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
        (directory / _CONFIG).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {str(directory)!r} cannot be written: {error}.") from error


def read_checkpoint_info(directory: str | os.PathLike[str]) -> CheckpointInfo:
    """Return what ``config.json`` says, and check that the tokenizer's files are the ones it names.

    Raises:
        InputError: a file is missing or differs.
        ConfigError: a key is missing, unknown or of the wrong type, or the schema is not known.
    """
    directory = Path(directory)
    path = directory / _CONFIG
    where = f"checkpoint {str(directory)!r}: {_CONFIG}"
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"checkpoint {str(directory)!r}: {_CONFIG} cannot be read ({error.strerror}); expected a "
            "directory with "
            f"{_CONFIG} and {_WEIGHTS}."
        ) from error
    try:
        said = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}.") from error
    info = _parse_info(said, where)
    for name, sha256 in info.tokenizer_files.items():
        file = directory / name
        if Path(name).name != name or not file.is_file() or _sha256(file) != sha256:
            raise InputError(
                f"checkpoint {str(directory)!r}: the tokenizer file {name!r} is missing or not the "
                f"one {_CONFIG} "
                f"names (sha256 {sha256[:16]}…)."
            )
    return info


def load_checkpoint(
    directory: str | os.PathLike[str], *, external: Mapping[str, str | os.PathLike[str]] | None = None
) -> CLIP:
    """Return the model of a checkpoint in float32, in eval mode.

    Args:
        directory: the checkpoint.
        external: for each package of ``external_weights``, the directory it is unpacked in
            (``edgeclip.fetch.materials("default-model")`` returns such a mapping) or the weights file itself.

    Raises:
        InputError: a file is missing, damaged or another one than named.
        KeyMismatchError: keys or shapes disagree.
        ConfigError: ``config.json`` cannot be used.
    """
    directory = Path(directory)
    info = read_checkpoint_info(directory)
    with torch.device("meta"):  # every weight comes from the files: do not spend time on random ones
        model = build_clip(info.config, scale=info.scale)
    path = directory / _WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"checkpoint {str(directory)!r}: {_WEIGHTS} cannot be read: {error}.") from error
    for entry in info.external_weights:
        found = (external or {}).get(entry.package)
        if found is None:
            raise InputError(
                f"checkpoint {str(directory)!r}: the weights {entry.prefix + '*'!r} come from the package "
                f"{entry.package!r} {entry.version}; run `edgeclip data fetch default-model` and pass "
                "its directory "
                "as `external`."
            )
        state.update(load_external_weights(entry, found))
    _load_state(model, state, where=f"checkpoint {str(directory)!r}")
    return model.eval()


def load_external_weights(entry: ExternalWeights, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return weights of a published package under our names, prefix included.

    Args:
        entry: which file, and its hash.
        path: the directory the package is unpacked in, or the file.

    Raises:
        InputError: the file is missing or not the one named.
        ConfigError: ``keys`` names no known way to rename.
    """
    if entry.keys not in _RENAMES:
        raise ConfigError(
            f"external weights: unknown keys {entry.keys!r}, expected one of {sorted(_RENAMES)}."
        )
    file = Path(path)
    if file.is_dir():
        file = file / entry.file
    if not file.is_file():
        raise InputError(
            f"external weights: {str(file)!r} is missing; expected {entry.file!r} of "
            f"{entry.package!r} {entry.version}."
        )
    found = _sha256(file)
    if found != entry.sha256:
        raise InputError(
            f"external weights: {str(file)!r} has sha256 {found[:16]}…, expected {entry.sha256[:16]}…; fetch "
            f"{entry.package!r} {entry.version} again."
        )
    if file.suffix == ".safetensors":
        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    return {entry.prefix + key: value for key, value in _RENAMES[entry.keys](state).items()}


def _load_state(model: CLIP, state: dict[str, Tensor], *, where: str) -> None:
    """Load ``state`` strictly; every difference is named."""
    expected = model.state_dict()
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    shapes = [
        f"{key!r} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(set(expected) & set(state))
        if state[key].shape != expected[key].shape
    ]
    if missing or unexpected or shapes:
        raise KeyMismatchError(where, Differences(tuple(missing), tuple(unexpected), tuple(shapes)))
    broken = [
        key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if broken:
        raise InputError(f"{where}: weights that are not finite: {sorted(broken)}; the file is damaged.")
    model.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()}, assign=True)


_KEYS = (
    "schema",
    "model",
    "scale",
    "dtype",
    "tokenizer",
    "licence",
    "parents",
    "external_weights",
)


def _parse_info(said: Any, where: str) -> CheckpointInfo:
    if isinstance(said, dict) and said.get("schema") == 1:
        said = _from_schema_1(said, where)
    if not isinstance(said, dict) or said.get("schema") != SCHEMA:
        schema = said.get("schema") if isinstance(said, dict) else type(said).__name__
        raise ConfigError(
            f"{where}: got schema {schema!r}, expected {SCHEMA}; install an edgeclip that reads it."
        )
    missing, unknown = sorted(set(_KEYS) - set(said)), sorted(set(said) - set(_KEYS))
    if missing or unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}, missing keys {missing}; expected {list(_KEYS)}.")
    scale, dtype = said["scale"], said["dtype"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= MAX_SCALE * 1.001:
        raise ConfigError(
            f"{where}: 'scale' is {scale!r}, expected a number above 0 and at most {MAX_SCALE:g}."
        )
    if dtype not in _DTYPES:
        raise ConfigError(f"{where}: 'dtype' is {dtype!r}, expected one of {sorted(_DTYPES)}.")
    config = config_from_dict(CLIPConfig, said["model"], where=f"{where}: 'model'")
    try:
        return CheckpointInfo(
            config=config,
            scale=float(scale),
            dtype=dtype,
            tokenizer_digest=str(said["tokenizer"]["digest"]),
            tokenizer_files={str(name): str(sha256) for name, sha256 in said["tokenizer"]["files"].items()},
            licence=str(said["licence"]),
            parents=tuple(dict(parent) for parent in said["parents"]),
            external_weights=tuple(ExternalWeights(**entry) for entry in said["external_weights"]),
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}: 'tokenizer', 'parents' or 'external_weights' cannot be used: {error}."
        ) from error


def _from_schema_1(said: dict[str, Any], where: str) -> dict[str, Any]:
    """Return what a schema 1 file says, as schema 2 says it."""
    architecture, model = said.get("architecture"), said.get("model")
    if architecture != _FIRST_ARCHITECTURE or not isinstance(model, dict):
        raise ConfigError(
            f"{where}: unknown architecture {architecture!r}, expected {_FIRST_ARCHITECTURE!r}."
        )
    towers = {
        name: {"kind": kind} | model[name]
        for name, kind in (("image", "posterior"), ("text", "bag"))
        if isinstance(model.get(name), dict)
    }
    rest = {key: value for key, value in said.items() if key != "architecture"}
    return rest | {"schema": SCHEMA, "model": model | towers}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
