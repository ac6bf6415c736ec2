"""Weight inheritance: a smaller model cut out of a larger one of the same make, as a start of training.

Wu et al. 2023, "TinyCLIP", §3.3, the manual form: of every axis that is smaller in the child, the front is
taken (channels, attention heads, hidden units, stages of FastViT with their batch norms' statistics), and of
the layers a subset. Nothing is rescaled. A child with the parent's config has the parent's weights, bit for
bit.

Which layers: ``"even"`` takes layer ``floor(i · P / C)`` of ``P`` as the child's layer ``i`` of ``C``, in
FastViT within each stage. Where ``C`` divides ``P`` these are the layers the published code takes; elsewhere
its whole-numbered stride degenerates (9 of 12 are the first nine there), and that is what ``"first"`` is.

What cannot be cut must be the same in both: how pictures are prepared, patches and their grid, the
vocabulary, the width of a head, activation, mask and pooling. Towers of other kinds than ViT, transformer and
FastViT are inherited whole or not at all.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Literal

import torch
from torch import Tensor

from edgeclip.errors import ConfigError
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import (
    CLIPConfig,
    FastViTConfig,
    ImageConfig,
    TextConfig,
    TextTransformerConfig,
    ViTConfig,
)

__all__ = ["InheritedLayers", "inherit", "inherited_layers"]

InheritedLayers = Literal["even", "first"]

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.")
_QKV = re.compile(r"attention\.qkv\.(weight|bias)$")

# Sizes that may shrink; everything else in a config must agree, but for what has no part in the weights.
_SHRINKING: Mapping[type, tuple[str, ...]] = {
    ViTConfig: ("width", "heads", "hidden_dims", "embed_dim"),
    TextTransformerConfig: ("context_length", "width", "heads", "hidden_dims", "token_dim", "embed_dim"),
    FastViTConfig: ("dims", "depths", "mlp_ratio", "embed_dim"),
}
_WITHOUT_WEIGHTS = ("layer_scale_init", "stem_dim")


def inherited_layers(parent: int, child: int, layers: InheritedLayers = "even") -> tuple[int, ...]:
    """Return which of ``parent`` layers become those of a child that has ``child``, in order."""
    if layers == "first":
        return tuple(range(child))
    return tuple(index * parent // child for index in range(child))


@torch.no_grad()
def inherit(
    parent: CLIP, parent_config: CLIPConfig, child_config: CLIPConfig, *, layers: InheritedLayers = "even"
) -> CLIP:
    """Return a model of ``child_config`` with weights of ``parent``.

    Args:
        parent: unfolded.
        parent_config: what it was built from.
        child_config: at most as large in every dimension.
        layers: which layers are taken where the child has fewer.

    Raises:
        ConfigError: the child is larger somewhere, or differs in what cannot be cut; the message names it.
    """
    _check(parent_config, child_config)
    with torch.device("meta"):
        child = build_clip(child_config)
    names = _sources(parent_config.image, child_config.image, layers, "image")
    names |= _sources(parent_config.text, child_config.text, layers, "text")
    source = parent.state_dict()
    child.load_state_dict(
        {
            name: _front(source[_source(name, names)], value.shape, thrice=bool(_QKV.search(name)))
            for name, value in child.state_dict().items()
        },
        assign=True,
    )
    return child.train(parent.training)


def _front(value: Tensor, shape: Sequence[int], *, thrice: bool) -> Tensor:
    """Return a copy of the front of every axis.

    Args:
        value: of the parent.
        shape: of the child.
        thrice: the first axis holds queries, keys and values, each ``(heads, head_dim)``.
    """
    if thrice:
        value, shape = value.unflatten(0, (3, -1)), (3, shape[0] // 3, *shape[1:])  # type: ignore[no-untyped-call]
    front = value[tuple(slice(size) for size in shape)]
    return (front.flatten(0, 1) if thrice else front).clone()


def _source(name: str, names: Mapping[str, str]) -> str:
    """Return the parent's name of a child's tensor; ``names`` maps prefixes of layers."""
    for pattern in (_LAYER, _BLOCK):
        match = pattern.search(name)
        if match:
            return names[name[: match.end()]] + name[match.end() :]
    return name


def _sources(
    parent: ImageConfig | TextConfig, child: ImageConfig | TextConfig, layers: InheritedLayers, where: str
) -> dict[str, str]:
    """Return the prefix of the parent's layer by that of the child's."""
    if isinstance(parent, FastViTConfig) and isinstance(child, FastViTConfig):
        name = f"{where}_tower.stages.{{}}.blocks.{{}}."
        return {
            name.format(stage, index): name.format(stage, source)
            for stage, counts in enumerate(zip(parent.depths, child.depths, strict=True))
            for index, source in enumerate(inherited_layers(*counts, layers))
        }
    if isinstance(parent, ViTConfig | TextTransformerConfig) and isinstance(child, type(parent)):
        name = f"{where}_tower.transformer.layers.{{}}."
        taken = inherited_layers(len(parent.heads), len(child.heads), layers)
        for key in ("heads", "hidden_dims"):
            _check_layers(getattr(parent, key), getattr(child, key), taken, f"{where}.{key}")
        return {name.format(index): name.format(source) for index, source in enumerate(taken)}
    return {}


def _check_layers(parent: Sequence[int], child: Sequence[int], taken: Sequence[int], where: str) -> None:
    if len(child) > len(parent):
        raise ConfigError(
            f"inherit: {where!r} of the child has {len(child)} layers, expected at most {len(parent)}, what "
            "the parent has."
        )
    for index, source in enumerate(taken):
        if child[index] > parent[source]:
            raise ConfigError(
                f"inherit: {where!r} of the child's layer {index} is {child[index]}, expected at most "
                f"{parent[source]}, what the parent's layer {source} has."
            )


def _check(parent: CLIPConfig, child: CLIPConfig) -> None:
    for name in ("image_size_px", "resize", "interpolation", "crop", "mean", "std"):
        _same(name, getattr(parent, name), getattr(child, name))
    for where, ours, theirs in (("image", parent.image, child.image), ("text", parent.text, child.text)):
        if type(ours) is not type(theirs):
            raise ConfigError(
                f"inherit: the child's {where} tower is of kind {theirs.kind!r}, the parent's of kind "
                f"{ours.kind!r}; a tower can be cut out of one of its own kind only."
            )
        shrinking = _SHRINKING.get(type(ours), ())
        for field in fields(ours):
            before, after = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name in _WITHOUT_WEIGHTS:
                continue
            if field.name not in shrinking:
                _same(f"{where}.{field.name}", before, after)
            elif not isinstance(before, tuple) and after > before:
                raise ConfigError(
                    f"inherit: {f'{where}.{field.name}'!r} of the child is {after}, expected at most "
                    f"{before}, what the parent has."
                )
    if isinstance(parent.image, FastViTConfig) and isinstance(child.image, FastViTConfig):
        _check_fastvit(parent.image, child.image)
    if isinstance(parent.image, ViTConfig) and isinstance(child.image, ViTConfig):
        most, got = parent.image.stem_channels, child.image.stem_channels
        if parent.image.stem == "conv" and got > most:
            raise ConfigError(
                f"inherit: 'image.stem_dim' of the child is {got}, expected at most "
                f"{most}, what the parent has."
            )
    factorised = [
        isinstance(text, TextTransformerConfig) and text.token_dim for text in (parent.text, child.text)
    ]
    if bool(factorised[0]) != bool(factorised[1]):
        raise ConfigError(
            f"inherit: 'text.token_dim' of the child is {factorised[1]}, of the parent {factorised[0]}; a "
            "table is factorised in both or in none."
        )


def _check_fastvit(parent: FastViTConfig, child: FastViTConfig) -> None:
    for name in ("dims", "depths"):
        before, after = getattr(parent, name), getattr(child, name)
        if len(before) != len(after) or any(map(operator.gt, after, before)):
            raise ConfigError(
                f"inherit: 'image.{name}' of the child is {after}, expected as many stages as the parent's "
                f"{before} and no number above it."
            )
    growth = [[width / config.dims[0] for width in config.dims] for config in (parent, child)]
    if growth[0] != growth[1]:
        raise ConfigError(
            f"inherit: 'image.dims' of the child is {child.dims}, of the parent {parent.dims}; widths must "
            "grow from stage to stage by the same factors, because each channel is downsampled on its own."
        )


def _same(name: str, parent: object, child: object) -> None:
    if parent != child:
        raise ConfigError(
            f"inherit: {name!r} of the child is {child!r}, of the parent {parent!r}; this cannot be cut and "
            "must be the same."
        )
