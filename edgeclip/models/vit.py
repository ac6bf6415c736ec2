"""Vision transformers: OpenAI's and open_clip's ViT, TinyCLIP's, and MobileCLIP-B.

Dosovitskiy et al. 2021 with CLIP's changes (Radford et al. 2021, §2.4): a norm before the first layer, the
class token's output through a norm and a bias-free projection. MobileCLIP-B (Vasu et al. 2024; in code
``vit_b16``) instead begins with three strided convolutions (Xiao et al. 2021), has no norm before the first
layer and gives its class token no position.

Two codes compute MobileCLIP-B's published weights, and not alike. Apple's, in whose names they came, has
``norm_eps`` 1e-5 and one pixel of zeros around the picture (``stem_padding_px``; its 4×4 convolution is
padded as if it were 3×3), so each patch begins a pixel further up and left. timm's ``vit_base_mci_224``,
which open_clip runs, has 1e-6 and no padding. On random weights and noise the epsilon moves an embedding by
3e-4 of its length, the padding by a tenth (cosine 0.995). Both are numbers of the config.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.errors import ConfigError, InputError
from edgeclip.models.attention import (
    APPLE_LAYER,
    HF_LAYER,
    OPENAI_LAYER,
    TIMM_LAYER,
    Transformer,
    affine_keys,
    batch_norm_keys,
    layer_keys,
)
from edgeclip.models.config import ViTConfig
from edgeclip.models.keys import Constant, KeyMap, KeyPair
from edgeclip.models.reparam import fold_conv_bn

__all__ = [
    "VisionTransformer",
    "apple_keys",
    "hf_keys",
    "openai_keys",
    "timm_keys",
    "with_grid",
]


class _PatchStem(nn.Module):
    """One strided convolution without bias."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, config.patch_px, stride=config.patch_px, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return ``(B, D, rows, columns)``."""
        return cast(Tensor, self.conv(image))


class _ConvStem(nn.Module):
    """Three convolutions without overlap: strides ``patch_px / 4``, 2 and 2."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if config.patch_px % 4 or config.patch_px == 0:
            raise ConfigError(
                f"image tower: got patch_px {config.patch_px}, expected a multiple of 4 for the 'conv' stem."
            )
        stride = config.patch_px // 4
        most = (stride - 1) // 2
        if not 0 <= config.stem_padding_px <= most:
            raise ConfigError(
                f"image tower: got stem_padding_px {config.stem_padding_px}, expected 0 to {most}: more adds "
                "a patch to each row."
            )
        channels = config.stem_channels
        self.conv1 = nn.Conv2d(3, channels, stride, stride=stride, padding=config.stem_padding_px, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 2, stride=2, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, config.width, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        """Return ``(B, D, rows, columns)``."""
        x = F.gelu(self.norm1(self.conv1(image)))
        x = F.gelu(self.norm2(self.conv2(x)))
        return cast(Tensor, self.conv3(x))

    def fold(self) -> _ConvStem:
        """Fold both batch norms in place and return self."""
        if isinstance(self.norm1, nn.BatchNorm2d):
            self.conv1, self.norm1 = fold_conv_bn(self.conv1, self.norm1), nn.Identity()
        if isinstance(self.norm2, nn.BatchNorm2d):
            self.conv2, self.norm2 = fold_conv_bn(self.conv2, self.norm2), nn.Identity()
        return self


class _Positions(nn.Module):
    """Put the class token before the patches and add the position embedding."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.class_position = config.class_position
        rows, columns = config.grid
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.table = nn.Parameter(torch.empty(rows * columns + config.class_position, config.width))
        nn.init.normal_(self.class_token, std=config.width**-0.5)
        nn.init.normal_(self.table, std=config.width**-0.5)

    def forward(self, patches: Tensor) -> Tensor:
        """Return ``(B, 1 + N, D)`` of patches ``(B, N, D)``."""
        return _after_zero(patches) + self.summed()

    def summed(self) -> Tensor:
        """Return what is added to a zero token and the patches behind it, ``(1 + N, D)``."""
        first = self.class_token[None]
        if not self.class_position:
            return torch.cat([first, self.table])
        return torch.cat([first + self.table[:1], self.table[1:]])

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Return the same with one table."""
        return _FoldedPositions(self.summed())


class _FoldedPositions(nn.Module):
    """Class token and positions as one table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, patches: Tensor) -> Tensor:
        """Return ``(B, 1 + N, D)`` of patches ``(B, N, D)``."""
        return _after_zero(patches) + self.table


def _after_zero(patches: Tensor) -> Tensor:
    # A zero token in front, which the class token is added to: its concatenation would have to be repeated
    # over the batch, and that takes shape arithmetic in an exported graph.
    return F.pad(patches, (0, 0, 1, 0))


class VisionTransformer(nn.Module):
    """Pixels ``(B, 3, H, W)`` to embeddings ``(B, E)``, not normalized.

    Args:
        config: the tower; ``H, W`` are ``grid · patch_px``.

    Raises:
        ConfigError: ``heads`` and ``hidden_dims`` disagree, or ``patch_px`` does not suit the stem.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(
            config.width,
            heads=config.heads,
            hidden_dims=config.hidden_dims,
            head_dim=config.head_dim,
            activation=config.activation,
            norm_eps=config.norm_eps,
            where="image tower",
        )
        self.stem: nn.Module = _ConvStem(config) if config.stem == "conv" else _PatchStem(config)
        self.positions: nn.Module = _Positions(config)
        self.first_norm: nn.Module = nn.Identity()
        if config.pre_norm:
            self.first_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.projection = nn.Linear(config.width, config.embed_dim, bias=config.projection_bias)
        nn.init.normal_(self.projection.weight, std=config.width**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        """Embed pixels, scaled and normalized as the model's preprocessing says.

        Raises:
            InputError: the picture is not of the size of the grid (:func:`with_grid` makes another tower).
        """
        token = self.transformer.forward_picked(self._embed(image), _class_token)  # (B, 1, D)
        return cast(Tensor, self.projection(self.final_norm(token.flatten(1))))

    def forward_with_tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding, bit by bit that of ``forward``, and the patches after the final norm.

        Returns:
            ``(B, E)`` and ``(B, N, D)``, row by row of the grid.
        """
        token, tokens = self.transformer.forward_both(self._embed(image), _class_token)
        return self.projection(self.final_norm(token.flatten(1))), self.final_norm(tokens[:, 1:])

    def forward_tokens(self, image: Tensor) -> Tensor:
        """Return all tokens after the final norm, ``(B, 1 + N, D)``, the class token first."""
        return cast(Tensor, self.final_norm(self.transformer(self._embed(image))))

    def _embed(self, image: Tensor) -> Tensor:
        """Return the tokens ``(B, 1 + N, D)`` the first layer sees."""
        rows, columns = self.config.grid
        expected = (3, rows * self.config.patch_px, columns * self.config.patch_px)
        if tuple(image.shape[1:]) != expected:
            raise InputError(
                f"image tower: got pixels of shape {tuple(image.shape)}, expected (B, "
                f"{', '.join(map(str, expected))}). Resize the pictures, or make a tower of another grid "
                "with with_grid()."
            )
        patches = self.stem(image).flatten(2).transpose(1, 2)  # (B, N, D)
        return cast(Tensor, self.first_norm(self.positions(patches)))


def _class_token(x: Tensor) -> Tensor:
    return x[:, :1]


@torch.no_grad()
def with_grid(tower: VisionTransformer, grid: tuple[int, int]) -> VisionTransformer:
    """Return a copy for another input size: its position embedding is interpolated.

    Bicubic with antialiasing, as open_clip does it when a checkpoint has another grid; a class token's
    position stays. This changes the model: fine-tune it, or measure what it lost.

    Raises:
        ConfigError: the grid is not of at least one row and column.
    """
    if min(grid) < 1:
        raise ConfigError(f"image tower: got grid {grid}, expected at least one row and one column.")
    copied = copy.deepcopy(tower)
    copied.config = dataclasses.replace(tower.config, grid=grid)
    positions = copied.positions
    if not isinstance(positions, _Positions):
        raise ConfigError(
            f"image tower: its position embedding is folded already, so grid {grid} cannot be made; "
            "take the tower before reparameterize()."
        )
    kept = int(positions.class_position)
    square = positions.table[kept:].T.reshape(1, -1, *tower.config.grid)  # (1, D, rows, columns)
    resized = F.interpolate(square.float(), size=grid, mode="bicubic", antialias=True, align_corners=False)
    table = torch.cat([positions.table[:kept], resized[0].flatten(1).T.to(positions.table)])
    positions.table = nn.Parameter(table)
    return copied


# Foreign checkpoints
# -------------------------------------------------------------------------------------------------


def openai_keys(config: ViTConfig) -> KeyMap:
    """Return the names of OpenAI and of open_clip's own ViT, below ``visual.``.

    Raises:
        ConfigError: that source has no such tower.
    """
    _refuse(config, "OpenAI's ViT", stem="patch", class_position=True, projection_bias=False)
    return KeyMap(
        (
            KeyPair("positions.class_token", "class_embedding"),
            KeyPair("positions.table", "positional_embedding"),
            KeyPair("stem.conv.weight", "conv1.weight"),
            *_norm("first_norm", "ln_pre", present=config.pre_norm),
            *_layers(config, OPENAI_LAYER, "transformer.resblocks.{}."),
            *_norm("final_norm", "ln_post"),
            KeyPair("projection.weight", "proj", transposed=True),
        )
    )


def timm_keys(config: ViTConfig) -> KeyMap:
    """Return timm's names (``vit_*_clip_*``, ``vit_base_mci_224``), in open_clip below ``visual.trunk.``."""
    width = config.width
    tokens = config.grid[0] * config.grid[1] + config.class_position
    constants = []
    if not config.projection_bias:
        constants.append(Constant("head.bias", (config.embed_dim,)))
    if config.stem == "patch" and not config.pre_norm:
        constants.append(Constant("patch_embed.proj.bias", (width,)))
    return KeyMap(
        (
            KeyPair("positions.class_token", "cls_token", theirs_shape=(1, 1, width)),
            KeyPair("positions.table", "pos_embed", theirs_shape=(1, tokens, width)),
            *_stem(config, conv="patch_embed.backbone.{}.conv", norm="patch_embed.backbone.{}.bn"),
            *_norm("first_norm", "norm_pre", present=config.pre_norm),
            *_layers(config, TIMM_LAYER, "blocks.{}."),
            *_norm("final_norm", "norm"),
            *_projection(config, "head"),
        ),
        tuple(constants),
    )


def apple_keys(config: ViTConfig) -> KeyMap:
    """Return the names of Apple's MobileCLIP-B, below ``image_encoder.model.``.

    Raises:
        ConfigError: that source has no such tower.
    """
    _refuse(config, "Apple's ViT", stem="conv", class_position=False, pre_norm=False, projection_bias=False)
    width = config.width
    positions = (1, 1, config.grid[0] * config.grid[1], width)
    return KeyMap(
        (
            KeyPair("positions.class_token", "cls_token", theirs_shape=(1, 1, width)),
            KeyPair("positions.table", "pos_embed.pos_embed.pos_embed", theirs_shape=positions),
            *_stem(config, conv="patch_emb.{}.block.conv", norm="patch_emb.{}.block.norm"),
            *_layers(config, APPLE_LAYER, "transformer.{}."),
            *_norm("final_norm", "post_transformer_norm"),
            KeyPair("projection.weight", "classifier.proj", transposed=True),
        )
    )


def hf_keys(config: ViTConfig) -> KeyMap:
    """Return the full names of Hugging Face transformers' CLIP.

    Raises:
        ConfigError: that source has no such tower.
    """
    _refuse(
        config, "transformers' ViT", stem="patch", class_position=True, pre_norm=True, projection_bias=False
    )
    tokens = config.grid[0] * config.grid[1] + 1
    embeddings = "vision_model.embeddings."
    return KeyMap(
        (
            KeyPair("positions.class_token", embeddings + "class_embedding"),
            KeyPair("positions.table", embeddings + "position_embedding.weight"),
            KeyPair("stem.conv.weight", embeddings + "patch_embedding.weight"),
            *_norm("first_norm", "vision_model.pre_layrnorm"),  # their spelling
            *_layers(config, HF_LAYER, "vision_model.encoder.layers.{}."),
            *_norm("final_norm", "vision_model.post_layernorm"),
            KeyPair("projection.weight", "visual_projection.weight"),
        ),
        (Constant(embeddings + "position_ids", (1, tokens), value=None),),
    )


def _refuse(config: ViTConfig, source: str, **expected: object) -> None:
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"image tower: {source} has {name} {value!r}, this tower {getattr(config, name)!r}; "
                "its weights have no names there."
            )


def _layers(
    config: ViTConfig, names: Mapping[str, str | tuple[str, ...]], theirs: str
) -> tuple[KeyPair, ...]:
    return layer_keys(names, theirs, heads=config.heads, hidden_dims=config.hidden_dims)


def _norm(ours: str, theirs: str, *, present: bool = True) -> tuple[KeyPair, ...]:
    return affine_keys(ours, theirs) if present else ()


def _projection(config: ViTConfig, theirs: str) -> tuple[KeyPair, ...]:
    return affine_keys("projection", theirs)[: 1 + config.projection_bias]


def _stem(config: ViTConfig, *, conv: str, norm: str) -> tuple[KeyPair, ...]:
    if config.stem == "patch":
        return (KeyPair("stem.conv.weight", "patch_embed.proj.weight"),)
    pairs = [KeyPair(f"stem.conv{index + 1}.weight", conv.format(index) + ".weight") for index in range(3)]
    pairs.append(KeyPair("stem.conv3.bias", conv.format(2) + ".bias"))
    for index in range(2):
        pairs.extend(batch_norm_keys(f"stem.norm{index + 1}", norm.format(index)))
    return tuple(pairs)
