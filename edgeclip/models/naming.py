"""How the weights of a model are called by others: whose names are these, and what are they for a config.

========== ===================================================================================
source      names
========== ===================================================================================
apple       ``image_encoder.model.*``, ``text_encoder.*``
open_clip   ``visual.trunk.*`` (a tower of timm), ``text.*``
openai      ``visual.*``, the text tower at the root; open_clip writes its own ViTs like this
hf          ``vision_model.*``, ``text_model.*``, two projections
tinyclip    ``_image_encoder.visual.*``, ``_text_encoder.*``, with gates or pruned (``tinyclip.py``)
timm        an image tower alone
========== ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import nn

from edgeclip.errors import ConfigError, InputError
from edgeclip.models import efficientnet_lite, fastvit, text_transformer, tinyclip, vit
from edgeclip.models.clip import build_image_tower, build_text_tower
from edgeclip.models.config import (
    CLIPConfig,
    EfficientNetImageConfig,
    FastViTConfig,
    ImageConfig,
    TextConfig,
    TextTransformerConfig,
    ViTConfig,
)
from edgeclip.models.efficientnet_lite import LITE0, LITE1, LITE2, EfficientNetLite
from edgeclip.models.keys import Constant, KeyMap, KeyPair

__all__ = [
    "IMAGE_PREFIXES",
    "LITES",
    "OPENAI_NUMBERS",
    "Source",
    "image_map",
    "image_shapes",
    "is_own_vit",
    "key_map",
    "published_tower",
    "scale_name",
    "sniff",
    "text_map",
    "text_shapes",
]

Source = Literal["apple", "open_clip", "openai", "hf", "tinyclip", "timm"]

_SCALE = "logit_scale"
IMAGE_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "apple": ("image_encoder.",),
    "open_clip": ("visual.",),
    "openai": ("visual.",),
    "hf": ("vision_model.", "visual_projection."),
    "tinyclip": (tinyclip.IMAGE,),
    "timm": ("",),
}
# Numbers OpenAI stores among the weights.
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
_CAUSAL = ("openai", "hf", "tinyclip")
LITES = {config.name: config for config in (LITE0, LITE1, LITE2)}


def scale_name(source: Source) -> str:
    """Return what a source calls the logarithm of the scale."""
    return tinyclip.SCALE if source == "tinyclip" else _SCALE


def sniff(state: Mapping[str, Any], *, where: str = "weights") -> Source:
    """Return whose names these are.

    Args:
        state: anything by their names.
        where: what is read, as messages name it.

    Raises:
        InputError: nobody's that is known here.
    """
    if _any(state, tinyclip.IMAGE, tinyclip.TEXT, "image_encoder_without_ddp.", "text_encoder_without_ddp."):
        return "tinyclip"
    if _any(state, "image_encoder.model.", "text_encoder."):
        return "apple"
    if _any(state, "vision_model.", "text_model."):
        return "hf"
    if _any(state, "visual.trunk."):
        return "open_clip"
    if "visual.conv1.weight" in state and "token_embedding.weight" in state:
        return "openai"
    if _any(state, "stem.0.conv_kxk.", "patch_embed.", "conv_stem.") and not _any(state, "visual."):
        return "timm"
    raise InputError(
        f"{where}: the names {sorted(state)[:3]} … are nobody's that edgeclip reads, expected those of "
        "Apple, open_clip, OpenAI, Hugging Face transformers, TinyCLIP or timm; for a checkpoint of edgeclip "
        "name its folder."
    )


def _any(state: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in state)


def key_map(config: CLIPConfig, source: Source) -> KeyMap:
    """Return how a source calls the weights of a model.

    In open_clip a ViT has open_clip's own names, which are OpenAI's, where the text tower is causal (its
    ``ViT-*`` models), and timm's names where it is not (MobileCLIP-L-14).

    Raises:
        ConfigError: the source has no such model.
    """
    if source == "open_clip" and is_own_vit(config):
        source = "openai"
    image = image_map(config.image, source)
    return image if source == "timm" else image + text_map(config.text, source)


def is_own_vit(config: CLIPConfig) -> bool:
    """Whether open_clip computes such a model with its own ViT, and not with one of timm."""
    return (
        isinstance(config.image, ViTConfig)
        and config.image.stem == "patch"
        and isinstance(config.text, TextTransformerConfig)
        and config.text.attention == "causal"
    )


@lru_cache(maxsize=128)
def image_map(config: ImageConfig, source: Source) -> KeyMap:
    """Return the names of an image tower, ours below ``image_tower.``.

    Raises:
        ConfigError: the source has no such tower.
    """
    makers: Mapping[tuple[type, str], tuple[Callable[[Any], KeyMap], str]] = {
        (FastViTConfig, "apple"): (fastvit.apple_keys, "image_encoder.model."),
        (FastViTConfig, "open_clip"): (fastvit.timm_keys, "visual.trunk."),
        (FastViTConfig, "timm"): (fastvit.timm_keys, ""),
        (ViTConfig, "apple"): (vit.apple_keys, "image_encoder.model."),
        (ViTConfig, "open_clip"): (vit.timm_keys, "visual.trunk."),
        (ViTConfig, "timm"): (vit.timm_keys, ""),
        (ViTConfig, "openai"): (vit.openai_keys, "visual."),
        (ViTConfig, "tinyclip"): (vit.openai_keys, tinyclip.IMAGE + "visual."),
        (ViTConfig, "hf"): (vit.hf_keys, ""),
        (EfficientNetImageConfig, "timm"): (_lite_keys, ""),
    }
    maker, prefix = makers.get((type(config), source), (None, ""))
    if maker is None:
        raise ConfigError(
            f"image tower: {source!r} has no names for one of kind {config.kind!r}; choose another source."
        )
    return maker(config).prefixed(ours="image_tower.", theirs=prefix)


def _lite_keys(config: EfficientNetImageConfig) -> KeyMap:
    return efficientnet_lite.timm_keys(LITES[config.backbone])


@lru_cache(maxsize=128)
def text_map(config: TextConfig, source: Source) -> KeyMap:
    """Return the names of everything but the image tower: ours below ``text_tower.``, and the scale.

    Raises:
        ConfigError: the source has no such tower.
    """
    makers: Mapping[str, tuple[Callable[[TextTransformerConfig], KeyMap], str]] = {
        "apple": (text_transformer.apple_keys, "text_encoder."),
        "open_clip": (text_transformer.openai_keys, "text."),
        "openai": (text_transformer.openai_keys, ""),
        "tinyclip": (text_transformer.openai_keys, tinyclip.TEXT),
        "hf": (text_transformer.hf_keys, ""),
    }
    maker, prefix = makers.get(source, (None, ""))
    if maker is None or not isinstance(config, TextTransformerConfig):
        raise ConfigError(
            f"text tower: {source!r} has no names for one of kind {config.kind!r}; choose another source."
        )
    if source in _CAUSAL and config.attention != "causal":
        raise ConfigError(
            f"text tower: the code of {source!r} computes 'causal' attention, this tower "
            f"{config.attention!r}; choose 'open_clip'."
        )
    rest = KeyMap(
        (KeyPair(_SCALE, scale_name(source)),),
        tuple(Constant(name, value=None) for name in OPENAI_NUMBERS) if source == "openai" else (),
    )
    return maker(config).prefixed(ours="text_tower.", theirs=prefix) + rest


def published_tower(config: ImageConfig) -> nn.Module:
    """Return the tower that published weights belong to: of EfficientNet-Lite, the classifier network."""
    if isinstance(config, EfficientNetImageConfig):
        return EfficientNetLite(LITES[config.backbone])
    return build_image_tower(config)


@lru_cache(maxsize=128)
def image_shapes(config: ImageConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each of our keys that :func:`image_map` names."""
    with torch.device("meta"):
        tower = published_tower(config)
    return {f"image_tower.{key}": tuple(value.shape) for key, value in tower.state_dict().items()}


@lru_cache(maxsize=128)
def text_shapes(config: TextConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each of our keys that :func:`text_map` names."""
    with torch.device("meta"):
        tower = build_text_tower(config)
    shapes = {f"text_tower.{key}": tuple(value.shape) for key, value in tower.state_dict().items()}
    return shapes | {_SCALE: ()}
