"""CLIP: two towers into one space (Radford et al. 2021), and the image tower of the default model.

:class:`PosteriorImageTower` is a frozen classifier whose posterior is projected: ``p = softmax(logits)``,
then for each part of the embedding ``sqrt(w_i) · normalise(p · table_i)`` with the weights ``w_i`` summing to
1. The embedding is thus of unit length by construction. One part can carry the posterior itself (random
orthonormal columns), another the meaning of the classes (ConSE, Norouzi et al. 2014, eq. 2, over the whole
posterior and not its top 10). Further parts may be linear maps of the pooled features, and one of these may
be gated: with a gate ``g`` between 0 and 1 it has ``g`` of the squared length, all others ``1 - g``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.errors import ConfigError
from edgeclip.models.config import (
    CLIPConfig,
    EfficientNetImageConfig,
    FastViTConfig,
    ImageConfig,
    PosteriorImageConfig,
    TextConfig,
    TextTransformerConfig,
    ViTConfig,
)
from edgeclip.models.efficientnet_lite import LITE0, LITE1, LITE2, EfficientNetImageTower, EfficientNetLite
from edgeclip.models.fastvit import FastViT
from edgeclip.models.text import BagTextTower
from edgeclip.models.text_transformer import TextTransformer
from edgeclip.models.vit import VisionTransformer

__all__ = [
    "CLIP",
    "MAX_SCALE",
    "PosteriorImageTower",
    "build_clip",
    "build_image_tower",
    "build_text_tower",
]

MAX_SCALE = 100.0
_BACKBONES = {config.name: config for config in (LITE0, LITE1, LITE2)}


class PosteriorImageTower(nn.Module):
    """Classifier, posterior, projection; where the config asks for it, features beside the posterior.

    Args:
        backbone: gives pooled features, and class logits ``(B, classes)``.
        config: parts of the embedding.

    Raises:
        ConfigError: widths and shares do not belong together.
    """

    def __init__(self, backbone: EfficientNetLite, config: PosteriorImageConfig) -> None:
        super().__init__()
        if (
            len(config.part_dims) != len(config.part_weights)
            or len(config.feature_dims) != len(config.feature_weights)
            or abs(sum(config.part_weights) + sum(config.feature_weights) - 1) > 1e-6
        ):
            raise ConfigError(
                f"image tower: part_dims {config.part_dims} and part_weights {config.part_weights}, "
                f"feature_dims {config.feature_dims} and feature_weights {config.feature_weights} "
                "must be of one length each, and all weights must sum to 1."
            )
        self.config = config
        self.backbone = backbone
        self.class_table = nn.Parameter(torch.zeros(config.classes, sum(config.part_dims)))
        if config.feature_columns:
            self.feature_table = nn.Parameter(torch.zeros(backbone.feature_dim, config.feature_columns))
            self.feature_bias = nn.Parameter(torch.zeros(config.feature_columns))

    def forward(self, image: Tensor) -> Tensor:
        """Embed ``(B, 3, H, W)`` pixels, scaled and normalized, as unit rows ``(B, E)``."""
        if not self.config.feature_columns:
            return self.project(self.backbone(image))
        features = self.backbone.features(image)
        return self.project(self.backbone.classifier(features), features)

    def project(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Embed class logits ``(B, classes)`` and, where the config has parts of them, features ``(B, F)``.

        Raises:
            ConfigError: the config has parts of features, and none were given.
        """
        config = self.config
        both = logits.softmax(dim=-1) @ self.class_table  # (B, sum of part_dims)
        parts = list(torch.split(both, list(config.part_dims), dim=-1))
        weights = [*config.part_weights, *config.feature_weights]
        if not config.feature_columns:
            return _joined(parts, weights)
        if features is None:
            raise ConfigError(
                f"image tower: the config has {config.feature_columns} columns of features, got logits alone."
            )
        seen = features @ self.feature_table + self.feature_bias  # (B, feature_columns)
        ends = [config.gated_dim, 1] if config.gated_dim else []
        columns = torch.split(seen, [*config.feature_dims, *ends], dim=-1)
        embedding = _joined([*parts, *columns[: len(config.feature_dims)]], weights)
        if not config.gated_dim:
            return embedding
        gate = columns[-1].sigmoid()  # (B, 1)
        gated = F.normalize(columns[-2], dim=-1)
        return torch.cat([embedding * (1 - gate).sqrt(), gated * gate.sqrt()], dim=-1)


def _joined(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return unit rows whose parts have the given shares of the squared length."""
    return torch.cat(
        [F.normalize(part, dim=-1) * math.sqrt(weight) for part, weight in zip(parts, weights, strict=True)],
        dim=-1,
    )


class CLIP(nn.Module):
    """An image tower, a text tower, and the scale of their cosines.

    Args:
        image_tower: ``(B, 3, H, W)`` to ``(B, E)``.
        text_tower: ``(B, L)`` token ids to ``(B, E)``.
        scale: initial multiplier of cosines; ``logit_scale`` is its logarithm.
    """

    def __init__(self, *, image_tower: nn.Module, text_tower: nn.Module, scale: float = 1 / 0.07) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def encode_image(self, image: Tensor, *, normalize: bool = False) -> Tensor:
        """Embed a batch of preprocessed images.

        Args:
            image: ``(B, 3, H, W)`` float RGB, as the ``Preprocess`` of this model returns it.
            normalize: scale each row to unit L2 norm (off, as elsewhere in the field).

        Returns:
            ``(B, E)`` embedding in the dtype of the parameters.
        """
        embedding: Tensor = self.image_tower(image)  # (B, E)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, tokens: Tensor, *, normalize: bool = False) -> Tensor:
        """Embed a batch of token ids.

        Args:
            tokens: ``(B, L)`` integers from this model's tokenizer.
            normalize: scale each row to unit L2 norm (off, as elsewhere in the field).

        Returns:
            ``(B, E)`` embedding in the dtype of the parameters.
        """
        embedding: Tensor = self.text_tower(tokens)  # (B, E)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit image embeddings, unit text embeddings and the scale (at most 100)."""
        scale = self.logit_scale.exp().clamp(max=MAX_SCALE)
        return self.encode_image(image, normalize=True), self.encode_text(tokens, normalize=True), scale


def build_clip(config: CLIPConfig, *, scale: float = 1 / 0.07) -> CLIP:
    """Assemble the model of a config, with fresh weights.

    Raises:
        ConfigError: an unknown backbone, or widths that disagree.
    """
    if config.image.embed_dim != config.text.embed_dim:
        raise ConfigError(
            f"model {config.name!r}: the image tower embeds into {config.image.embed_dim} dimensions, "
            f"the text tower into {config.text.embed_dim}; they must agree."
        )
    return CLIP(
        image_tower=build_image_tower(config.image),
        text_tower=build_text_tower(config.text),
        scale=scale,
    )


def build_image_tower(config: ImageConfig) -> nn.Module:
    """Return the image tower of a config, with fresh weights.

    Raises:
        ConfigError: an unknown backbone, or numbers that contradict each other.
    """
    if isinstance(config, FastViTConfig):
        return FastViT(config)
    if isinstance(config, ViTConfig):
        return VisionTransformer(config)
    if config.backbone not in _BACKBONES:
        raise ConfigError(
            f"image tower: unknown backbone {config.backbone!r}, expected one of {sorted(_BACKBONES)}."
        )
    backbone = EfficientNetLite(_BACKBONES[config.backbone])
    if isinstance(config, EfficientNetImageConfig):
        return EfficientNetImageTower(backbone, config)
    if backbone.config.classes != config.classes:
        raise ConfigError(
            f"image tower: backbone {config.backbone!r} has {backbone.config.classes} classes, the config "
            f"says {config.classes}."
        )
    return PosteriorImageTower(backbone, config)


def build_text_tower(config: TextConfig) -> nn.Module:
    """Return the text tower of a config, with fresh weights.

    Raises:
        ConfigError: numbers that contradict each other.
    """
    return TextTransformer(config) if isinstance(config, TextTransformerConfig) else BagTextTower(config)
