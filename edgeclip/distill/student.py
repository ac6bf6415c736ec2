"""Where training begins: the model that is trained, with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeclip.distill.inputs import Consumer, check_tokenizer, form_of
from edgeclip.distill.lineage import parent_of
from edgeclip.distill.recipe import Recipe, StudentSpec
from edgeclip.errors import ConfigError
from edgeclip.fetch import materials
from edgeclip.models.checkpoints import (
    ExternalWeights,
    load_external_weights,
    load_model,
    read_checkpoint_info,
)
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import CLIPConfig, config_from_dict, config_to_dict
from edgeclip.models.inherit import inherit
from edgeclip.models.zoo import MODELS, clip_config
from edgeclip.tokenizer import Tokenizer

__all__ = ["Student", "open_student"]


@dataclass(frozen=True)
class Student:
    """The model that is trained, before its first step.

    Attributes:
        model: in float32.
        config: what it was built from.
        tokenizer: its own.
        parents: what it descends from; empty for fresh weights.
        outside: weights that its checkpoint left in the packages they come from.
        packages: where these are.
    """

    model: CLIP
    config: CLIPConfig
    tokenizer: Tokenizer
    parents: tuple[Mapping[str, Any], ...] = ()
    outside: tuple[ExternalWeights, ...] = ()
    packages: Mapping[str, Path] = field(default_factory=dict)

    @property
    def consumer(self) -> Consumer:
        """What it takes in."""
        return Consumer(form_of(self.config), self.tokenizer)

    def left_outside(self, model: CLIP) -> tuple[ExternalWeights, ...]:
        """Return which of these weights a trained model still has as they were, to the last bit."""
        state = model.state_dict()
        return tuple(
            entry
            for entry in self.outside
            if all(
                torch.equal(state[key].cpu(), value.to(state[key].dtype))
                for key, value in load_external_weights(entry, self.packages[entry.package]).items()
            )
        )


def open_student(recipe: Recipe, root: Path) -> Student:
    """Return the student of a recipe; fresh weights depend on the recipe's seed alone.

    Args:
        recipe: whose ``[student]``.
        root: what paths are relative to.

    Raises:
        ConfigError: the model is not known, its tokenizer does not fit it, or it cannot be cut out of the
            larger one.
        InputError: the checkpoint cannot be read.
    """
    said = recipe.student
    parents: tuple[Mapping[str, Any], ...] = ()
    outside: tuple[ExternalWeights, ...] = ()
    packages: Mapping[str, Path] = {}
    given = said.checkpoint if said.inherit is None else said.inherit
    if given is not None:
        path = root / given
        outside = read_checkpoint_info(path).external_weights if (path / "config.json").is_file() else ()
        if outside:
            packages = materials("default-model", None if said.materials is None else root / said.materials)
        loaded = load_model(
            path, model=said.model if said.inherit is None else said.inherit_model, external=packages
        )
        model, config = loaded.model, loaded.config
        own = path if loaded.source == "edgeclip" and (path / "tokenizer.json").is_file() else None
        parents = (parent_of(config.name, "start", loaded.licence, given, loaded.source, loaded.parents),)
        if said.inherit is not None:
            config = _config(recipe.name, said, like=loaded.config)
            model = inherit(loaded.model, loaded.config, config, layers=said.inherit_layers)
    else:
        config, own = _config(recipe.name, said), None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = build_clip(config)
    tokenizer = _tokenizer(said, root, own, config)
    check_tokenizer(config, tokenizer, who="student")
    return Student(model, config, tokenizer, parents, () if said.inherit is not None else outside, packages)


def _config(name: str, said: StudentSpec, *, like: CLIPConfig | None = None) -> CLIPConfig:
    """Return the config a recipe spells out or names; what it leaves out of one is as in ``like``."""
    if said.config is not None:
        known = {} if like is None else config_to_dict(like)
        return config_from_dict(
            CLIPConfig, _merged(known, {"name": name, **said.config}), where="[student.config]"
        )
    assert said.model is not None
    return clip_config(said.model)


def _merged(known: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``known`` with what is ``said``, table by table."""
    return dict(known) | {
        key: _merged(known[key], value)
        if isinstance(value, dict) and isinstance(known.get(key), dict)
        else value
        for key, value in said.items()
    }


def _tokenizer(said: StudentSpec, root: Path, own: Path | None, config: CLIPConfig) -> Tokenizer:
    if said.tokenizer is not None:
        return Tokenizer.open(root / said.tokenizer)
    if own is not None:
        return Tokenizer.open(own)
    known = MODELS.get(config.name)
    if said.config is None and known is not None and known.tokenizer != "clip-bpe":
        raise ConfigError(
            f"student: the model {config.name!r} reads ids of kind {known.tokenizer!r}; expected "
            "'tokenizer', the directory of one."
        )
    return Tokenizer.clip(config.text.context_length)
