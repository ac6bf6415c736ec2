"""Checkpoints of others: Apple, open_clip and timm, OpenAI, Hugging Face transformers, TinyCLIP.

A file is read without running anything (``state_files.py``), its names tell whose it is, and its names and
shapes are compared with every model of the zoo. The names say nothing about activations, masks, norms and
preprocessing: where models that fit differ in one of them, the published name of the file or of its folder
decides, and else the caller has to say which one it is (``model=``). Weights are returned in float32, however
the file stores them.

timm's heads have a bias, which conversions from Apple's names fill with zeros. Where it is not zero, the
loaded config has ``projection_bias``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from edgeclip.errors import ConfigError, InputError
from edgeclip.models import tinyclip
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import (
    CLIPConfig,
    EfficientNetImageConfig,
    FastViTConfig,
    ImageConfig,
    TextConfig,
    ViTConfig,
)
from edgeclip.models.keys import Differences, KeyMismatchError
from edgeclip.models.naming import (
    IMAGE_PREFIXES,
    LITES,
    OPENAI_NUMBERS,
    Source,
    image_map,
    image_shapes,
    is_own_vit,
    key_map,
    published_tower,
    scale_name,
    sniff,
    text_map,
    text_shapes,
)
from edgeclip.models.state_files import read_state, write_state
from edgeclip.models.zoo import MODELS, BackboneConfig, ModelEntry, model_entry

__all__ = [
    "ForeignImageTower",
    "ForeignModel",
    "Source",
    "from_state",
    "image_tower_from_state",
    "key_map",
    "load_foreign",
    "load_image_tower",
    "read_state",
    "save_foreign",
    "sniff",
]

_HEAD_BIASES = ("head.fc.bias", "head.bias")
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model from a foreign file.

    Attributes:
        model: in float32, in eval mode, unfolded.
        config: what it was built from; the parts that the file's source decides are in it.
        source: whose names the file has.
        name: of the model in the zoo, or one made from its size (TinyCLIP "auto").
        candidates: all models of the zoo that the weights may be, the one taken first. The others differ by
            name only, or the file's name spoke against them.
        licence: of the weights, an SPDX identifier or the hub's word; ``""`` where it is not known.
        parents: what a checkpoint of ours should record about its origin.
    """

    model: CLIP
    config: CLIPConfig
    source: Source
    name: str
    candidates: tuple[str, ...] = ()
    licence: str = ""
    parents: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForeignImageTower:
    """An image tower from a foreign file; the attributes are those of :class:`ForeignModel`.

    The tower of an EfficientNet-Lite file is the backbone with its classifier, without our projection.
    """

    tower: nn.Module
    config: BackboneConfig
    source: Source
    name: str
    candidates: tuple[str, ...] = ()
    licence: str = ""
    parents: tuple[Mapping[str, Any], ...] = ()


# --- matching ----------------------------------------------------------------------------------------------


def _fits(
    state: Mapping[str, Tensor], source: Source, configs: Iterable[CLIPConfig | BackboneConfig]
) -> dict[str, Differences]:
    """Return how the weights differ from each config that the source can have, by the config's name."""
    prefixes = IMAGE_PREFIXES[source]
    image = {key: value for key, value in state.items() if key.startswith(prefixes)}
    rest = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    shapes = {tuple(value.shape) for value in image.values()}
    compared: dict[ImageConfig | TextConfig, Differences] = {}
    found: dict[str, Differences] = {}
    for config in configs:
        text = config.text if isinstance(config, CLIPConfig) and source != "timm" else None
        own_vit = isinstance(config, CLIPConfig) and is_own_vit(config)
        # Cheap first: to build all FastViTs takes a second.
        if not _may_be(config.image, shapes) or (text is None and source != "timm"):
            continue
        if source in ("open_clip", "openai") and own_vit != (source == "openai"):
            continue
        try:
            if config.image not in compared:
                names = image_map(config.image, source)
                compared[config.image] = names.compare(image, image_shapes(config.image))
            if text is not None and text not in compared:
                compared[text] = text_map(text, source).compare(rest, text_shapes(text))
        except ConfigError:
            continue
        first = compared[config.image]
        second = compared[text] if text is not None else Differences()
        found[config.name] = Differences(
            first.missing + second.missing, first.unexpected + second.unexpected, first.other + second.other
        )
    return found


def _may_be(config: ImageConfig, shapes: set[tuple[int, ...]]) -> bool:
    """Whether a tensor has the shape of the projection, in one orientation or the other."""
    if isinstance(config, FastViTConfig):
        width = int(config.dims[-1] * config.final_expansion)
    elif isinstance(config, ViTConfig):
        width = config.width
    else:
        return (
            isinstance(config, EfficientNetImageConfig) and (LITES[config.backbone].classes, 1280) in shapes
        )
    return bool({(width, config.embed_dim), (config.embed_dim, width)} & shapes)


def _choose(
    state: Mapping[str, Tensor], source: Source, where: str, *, path: Path | None, tower_only: bool = False
) -> tuple[ModelEntry, ...]:
    """Return the models of the zoo that the weights may be, the likeliest first.

    Raises:
        KeyMismatchError: none fits.
        InputError: several fit that differ in what neither the weights nor the file's name say.
    """
    entries = [entry for entry in MODELS.values() if entry.weights is not None and not entry.pruned_on_load]
    fits = _fits(state, source, [entry.config for entry in entries])
    if not fits:
        raise InputError(
            f"{where} has the names of {source!r}, but no known model of theirs has these shapes; "
            "pass `config`."
        )
    nearest = min(fits, key=lambda name: fits[name].count)
    if fits[nearest].count:
        raise KeyMismatchError(f"{where}, by {source!r}'s names nearest to {nearest!r}", fits[nearest])
    found = [entry for entry in entries if entry.name in fits and not fits[entry.name].count]
    if any(name in state for name in OPENAI_NUMBERS):
        found = [entry for entry in found if entry.tag == "openai"] or found
    name = None if path is None else _name_of_file(path, found)
    if name is not None:
        return tuple(sorted(found, key=lambda entry: entry.name != name))
    configs = [_config_for(entry, source) for entry in found]
    parts = [_image_part(config) if tower_only else config for config in configs]
    differing = sorted({name for part in parts for name in _differing(part, parts[0])} - {"name"})
    if differing:
        raise InputError(
            f"{where} fits {[entry.name for entry in found]}, which differ in {differing}; say which one "
            "it is with `model`."
        )
    return tuple(found)


def _differing(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Return the fields in which two configs differ."""
    found: list[str] = []
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if left == right:
            continue
        if dataclasses.is_dataclass(left) and type(left) is type(right):
            found += _differing(left, right, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


# --- loading -----------------------------------------------------------------------------------------------


def load_foreign(
    path: str | os.PathLike[str], *, model: str | None = None, config: CLIPConfig | None = None
) -> ForeignModel:
    """Return the model of a foreign file, in float32 and eval mode.

    Args:
        path: safetensors, or a state dict written by ``torch.save``.
        model: name of the model in the zoo, where the weights alone do not tell.
        config: a config in place of one from the zoo; taken as it is.

    Raises:
        InputError: the file cannot be read or used, or the weights fit several models.
        KeyMismatchError: the weights fit none, or not the one that was named.
        ConfigError: ``model`` is unknown or has no text tower, or both it and ``config`` are given.
    """
    path = Path(path)
    state = read_state(path)
    where = f"weights file {str(path)!r}"
    found = _from_state(state, model=model, config=config, where=where, path=path)
    return dataclasses.replace(found, parents=(_with_file(found.parents[0], path),))


def from_state(
    state: Mapping[str, Tensor],
    *,
    model: str | None = None,
    config: CLIPConfig | None = None,
    where: str = "weights",
) -> ForeignModel:
    """Return the model of foreign tensors; arguments and errors are those of :func:`load_foreign`.

    Args:
        state: their tensors, as :func:`read_state` returns them; on ``"meta"`` the model is too.
        model: see there.
        config: see there.
        where: what is read, as messages name it.
    """
    return _from_state(state, model=model, config=config, where=where, path=None)


def _from_state(
    state: Mapping[str, Tensor],
    *,
    model: str | None,
    config: CLIPConfig | None,
    where: str,
    path: Path | None,
) -> ForeignModel:
    source = sniff(state, where=where)
    if source == "timm":
        raise InputError(
            f"{where} holds an image tower alone, by timm's names; expected both towers. Use "
            "load_image_tower()."
        )
    named = _named_entry(model, config)
    state = _normalised(state, source)
    entries: tuple[ModelEntry, ...] = ()
    if source == "tinyclip" or (named is not None and named.pruned_on_load):
        state, source = _as_tinyclip(state, source), "tinyclip"
    if config is not None:
        chosen = config
    elif source == "tinyclip":
        chosen, entries = _tinyclip_config(state, named)
    else:
        entries = (named,) if named is not None else _choose(state, source, where, path=path)
        known = _config_for(entries[0], source)
        if not isinstance(known, CLIPConfig):
            raise ConfigError(f"model {known.name!r} is an image tower alone; use load_image_tower().")
        chosen = dataclasses.replace(known, image=_with_bias(known.image, state, source))
    with torch.device("meta"):
        clip = build_clip(chosen)
    ours = key_map(chosen, source).to_ours(
        state,
        {key: value.shape for key, value in clip.state_dict().items()},
        where=f"{where}, as {chosen.name!r}",
    )
    clip.load_state_dict(_usable(ours, where), assign=True)
    return ForeignModel(
        model=clip.eval(),
        config=chosen,
        source=source,
        name=chosen.name,
        candidates=tuple(entry.name for entry in entries),
        licence=_licence(entries),
        parents=(_parent(chosen.name, entries, source, state),),
    )


def load_image_tower(
    path: str | os.PathLike[str], *, model: str | None = None, config: BackboneConfig | None = None
) -> ForeignImageTower:
    """Return the image tower of a foreign file: of timm's, or of one with both towers.

    Args:
        path: safetensors, or a state dict written by ``torch.save``.
        model: name of the model in the zoo, where the weights alone do not tell.
        config: a config in place of one from the zoo; taken as it is.

    Raises:
        InputError: the file cannot be read or used, or the weights fit several models.
        KeyMismatchError: the weights fit none, or not the one that was named.
        ConfigError: ``model`` is unknown, or both it and ``config`` are given.
    """
    path = Path(path)
    state = read_state(path)
    where = f"weights file {str(path)!r}"
    found = _image_tower_from_state(state, model=model, config=config, where=where, path=path)
    return dataclasses.replace(found, parents=(_with_file(found.parents[0], path),))


def image_tower_from_state(
    state: Mapping[str, Tensor],
    *,
    model: str | None = None,
    config: BackboneConfig | None = None,
    where: str = "weights",
) -> ForeignImageTower:
    """Return the image tower of foreign tensors; arguments and errors are those of :func:`load_image_tower`.

    Args:
        state: their tensors, as :func:`read_state` returns them; on ``"meta"`` the tower is too.
        model: see there.
        config: see there.
        where: what is read, as messages name it.
    """
    return _image_tower_from_state(state, model=model, config=config, where=where, path=None)


def _image_tower_from_state(
    state: Mapping[str, Tensor],
    *,
    model: str | None,
    config: BackboneConfig | None,
    where: str,
    path: Path | None,
) -> ForeignImageTower:
    source = sniff(state, where=where)
    named = _named_entry(model, config)
    entries: tuple[ModelEntry, ...] = ()
    if source != "timm":
        if config is not None:
            raise ConfigError(
                f"{where} holds both towers, by the names of {source!r}: pass `model` in place of "
                "`config`, or use load_foreign()."
            )
        whole = _from_state(state, model=model, config=None, where=where, path=path)
        return ForeignImageTower(
            tower=whole.model.image_tower,
            config=_image_part(whole.config),
            source=source,
            name=whole.name,
            candidates=whole.candidates,
            licence=whole.licence,
            parents=whole.parents,
        )
    if config is None:
        entries = (named,) if named is not None else _choose(state, source, where, path=path, tower_only=True)
        config = _image_part(_config_for(entries[0], source))
        config = dataclasses.replace(config, image=_with_bias(config.image, state, source))
    with torch.device("meta"):
        tower = published_tower(config.image)
    mapped = image_map(config.image, source).to_ours(
        state,
        {f"image_tower.{key}": value.shape for key, value in tower.state_dict().items()},
        where=f"{where}, as {config.name!r}",
    )
    ours = {key.removeprefix("image_tower."): value for key, value in mapped.items()}
    tower.load_state_dict(_usable(ours, where), assign=True)
    return ForeignImageTower(
        tower=tower.eval(),
        config=config,
        source=source,
        name=config.name,
        candidates=tuple(entry.name for entry in entries),
        licence=_licence(entries),
        parents=(_parent(config.name, entries, source, state),),
    )


def _named_entry(model: str | None, config: CLIPConfig | BackboneConfig | None) -> ModelEntry | None:
    if model is not None and config is not None:
        raise ConfigError(f"got both model {model!r} and a config named {config.name!r}; pass one of them.")
    return None if model is None else model_entry(model)


def _config_for(entry: ModelEntry, source: Source) -> CLIPConfig | BackboneConfig:
    """Return the config of a model as the code that its file is meant for computes it."""
    return dataclasses.replace(entry.config, image=entry.image_of.get(source, entry.config.image))


def _image_part(config: CLIPConfig | BackboneConfig) -> BackboneConfig:
    fields = [field.name for field in dataclasses.fields(BackboneConfig)]
    return BackboneConfig(**{name: getattr(config, name) for name in fields})


def _with_bias(config: ImageConfig, state: Mapping[str, Tensor], source: Source) -> ImageConfig:
    """Return the config with a bias in its projection if timm's head has one that is not zero."""
    if source not in ("open_clip", "timm") or not isinstance(config, (FastViTConfig, ViTConfig)):
        return config
    prefix = "visual.trunk." if source == "open_clip" else ""
    biases = [state[prefix + name] for name in _HEAD_BIASES if prefix + name in state]
    if any(not bias.is_meta and bool(bias.any()) for bias in biases):
        return dataclasses.replace(config, projection_bias=True)
    return config


def _normalised(state: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Return the tensors without differences between files of one source."""
    same = tinyclip.plain_names(state) if source == "tinyclip" else dict(state)
    scale = same.get(scale_name(source))
    if scale is not None and tuple(scale.shape) == (1,):  # some training codes store it so
        same[scale_name(source)] = scale.reshape(())
    return same


def _as_tinyclip(state: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Return pruned weights under TinyCLIP's names."""
    if source == "openai":
        renamed = {
            tinyclip.SCALE
            if key == scale_name(source)
            else (tinyclip.IMAGE if key.startswith("visual.") else tinyclip.TEXT) + key: value
            for key, value in state.items()
            if key not in OPENAI_NUMBERS
        }
    else:
        renamed = dict(state)
    return tinyclip.prune(renamed)


def _tinyclip_config(
    state: Mapping[str, Tensor], named: ModelEntry | None
) -> tuple[CLIPConfig, tuple[ModelEntry, ...]]:
    """Return the config that the shapes say, under the name of the zoo or one made like them."""
    family = [entry for entry in MODELS.values() if entry.family == "TinyCLIP"]
    pruned = [entry for entry in family if entry.pruned_on_load]
    like = named.config if named is not None else pruned[0].config
    assert isinstance(like, CLIPConfig)
    if named is not None and not named.pruned_on_load:
        return like, (named,)
    config = tinyclip.infer_config(state, like)
    if named is not None:
        return config, (named,)
    same = tuple(entry for entry in family if dataclasses.replace(config, name=entry.name) == entry.config)
    if same:
        return dataclasses.replace(config, name=same[0].name), same
    name = tinyclip.size_name(state, config)
    # One shape was trained on two collections; which one, the weights do not say.
    return dataclasses.replace(config, name=name), tuple(e for e in pruned if e.name.startswith(name))


def _usable(ours: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return copies in float32, whole numbers as they are.

    Raises:
        InputError: a weight is not finite.
    """
    copies = {
        key: (value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()).contiguous()
        for key, value in ours.items()
    }
    broken = [key for key, value in copies.items() if not value.is_meta and not bool(value.isfinite().all())]
    if broken:
        raise InputError(
            f"{where}: {len(broken)} tensors hold numbers that are not finite, expected none: {broken[:5]}; "
            "the file is damaged."
        )
    return copies


def _licence(entries: Iterable[ModelEntry]) -> str:
    """Return the licence that all candidates have."""
    licences = {entry.licence.identifier for entry in entries if entry.licence is not None}
    return licences.pop() if len(licences) == 1 else ""


def _parent(
    name: str, entries: Iterable[ModelEntry], source: Source, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in state.values() if v.is_floating_point()})
    return {
        "name": name,
        "candidates": [entry.name for entry in entries],
        "source": source,
        "licence": _licence(entries),
        "dtypes": dtypes,
    }


def _name_of_file(path: Path, entries: Iterable[ModelEntry]) -> str | None:
    """Return the model whose published file or folder this is."""
    entries = list(entries)
    by_file = [e.name for e in entries if e.weights is not None and path.name in e.weights.files]
    if len(by_file) == 1:
        return by_file[0]
    # The longest: MobileCLIP-B-LT is not MobileCLIP-B.
    by_folder = [entry.name for entry in entries if any(entry.name in part for part in path.parts)]
    return max(by_folder, key=len, default=None)


def _with_file(parent: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return dict(parent) | {"file": path.name, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# --- writing -----------------------------------------------------------------------------------------------


def save_foreign(model: CLIP, config: CLIPConfig, path: str | os.PathLike[str], *, source: Source) -> None:
    """Write a model as safetensors under the names of others.

    Values are written bit for bit. The file carries weights alone: what a reader computes with them is the
    reader's (open_clip runs MobileCLIP-B with another ``norm_eps`` and padding than Apple's
    code, :mod:`edgeclip.models.vit`).

    Args:
        model: unfolded.
        config: what it was built from.
        path: the file, replaced if there is one.
        source: whose names; ``"timm"`` writes the image tower alone.

    Raises:
        ConfigError: the source has no such model, or the model is folded or of another config.
        InputError: the file cannot be written.
    """
    names = key_map(config, source)
    state = model.state_dict()
    expected = dict(image_shapes(config.image)) | dict(text_shapes(config.text))
    wrong = sorted(set(expected) ^ set(state))
    wrong += [key for key in expected if key in state and tuple(state[key].shape) != expected[key]]
    if wrong:
        raise ConfigError(
            f"model {config.name!r} is folded or was built from another config: {len(wrong)} tensors differ, "
            f"the first is {wrong[0]!r}; pass the model before reparameterize()."
        )
    try:
        write_state(Path(path), names.to_theirs(state))
    except (OSError, SafetensorError) as error:
        raise InputError(f"weights file {str(path)!r} cannot be written: {error}.") from error
