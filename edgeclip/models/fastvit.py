"""FastViT as MobileCLIP's image towers MCi0 to MCi4 use it, and smaller ones of the same make.

Vasu et al. 2023, "FastViT", in the form of Vasu et al. 2024, "MobileCLIP", and Faghri et al. 2025,
"MobileCLIP2" (five stages, a stem without 1×1 branches, layer norm before attention): a convolutional stem of
stride 4, stages that each but the first begin by halving the map with a large-kernel convolution, RepMixer
blocks first and attention blocks last, a last depthwise convolution with squeeze-and-excitation, the mean
over the map, a projection.

Everything stays channel-major, attention included: its linear layers are 1×1 convolutions, so that no
transpose stands between them and the convolutions around. Folded
(:func:`~edgeclip.models.reparam.reparameterize`), a RepMixer block is four convolutions, a GELU and a sum;
a batch norm before attention, the layer scales and the scale of the queries are inside weights. A layer norm
before attention stays: it depends on the picture.

Widths that depend on no config: kernels 7×7 (downsampling, position encoding, feed-forward), 3×3 (the rest);
squeeze-and-excitation has a quarter of the channels, rounded to 8, in downsampling, and a sixteenth at the
end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.errors import ConfigError
from edgeclip.models.config import FastViTConfig
from edgeclip.models.keys import Constant, KeyMap, KeyPair
from edgeclip.models.mobileone import (
    ConvFFN,
    ConvNorm,
    MobileOneBlock,
    RepMixerBlock,
    Residual,
    SqueezeExcite,
)
from edgeclip.models.reparam import Kernel, fold_bn_linear, fold_children, scale_outputs

__all__ = ["Attention", "AttentionBlock", "ChannelNorm", "Downsample", "FastViT", "apple_keys", "timm_keys"]

_LARGE = (7, 7)
_SMALL = (3, 3)
_FINAL_SQUEEZE = 16


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position of ``(B, C, H, W)``."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)``."""
        rows = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return rows.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention of all positions, in channel-major layout.

    Args:
        channels: of input and output.
        head_dim: channels of a head.
    """

    def __init__(self, channels: int, *, head_dim: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.head_dim = head_dim
        self.query_scale = head_dim**-0.5
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to its like."""
        channels, height, width = x.shape[1:]
        # One axis for queries, keys, values and heads: a split of it needs no squeeze behind.
        qkv = self.qkv(x).reshape(-1, 3 * self.heads, self.head_dim, height * width)
        query, key, value = qkv.split(self.heads, dim=1)  # (B, heads, head_dim, H·W) each
        if self.query_scale != 1:
            query = query * self.query_scale
        weights = (query.mT @ key).softmax(dim=-1)  # (B, heads, H·W, H·W)
        mixed = value @ weights.mT  # (B, heads, head_dim, H·W)
        y: Tensor = self.project(mixed.reshape(-1, channels, height, width))
        return y

    def fold(self) -> Attention:
        """Move the scale of the queries into the weights that make them, and return self."""
        factor = torch.ones(self.qkv.out_channels, dtype=torch.float64, device=self.qkv.weight.device)
        factor[: self.heads * self.head_dim] = self.query_scale
        scale_outputs(self.qkv, factor)
        self.query_scale = 1.0
        return self


class AttentionBlock(nn.Module):
    """Attention and the feed-forward part, both residual with a layer scale.

    Args:
        channels: of input and output.
        hidden_dim: width of the feed-forward part.
        head_dim: channels of an attention head.
        norm: before attention, not yet part of another module.
        scale_init: initial layer scales.
    """

    def __init__(
        self,
        channels: int,
        hidden_dim: int,
        *,
        head_dim: int,
        norm: nn.BatchNorm2d | ChannelNorm,
        scale_init: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attention = Attention(channels, head_dim=head_dim)
        self.attention_scale = nn.Parameter(torch.full((channels, 1, 1), scale_init))
        self.ffn = ConvFFN(channels, hidden_dim, kernel=_LARGE)
        self.ffn_scale = nn.Parameter(torch.full((channels, 1, 1), scale_init))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to its like."""
        x = x + self.attention_scale * self.attention(self.norm(x))
        y: Tensor = x + self.ffn_scale * self.ffn(x)
        return y

    def fold(self) -> nn.Sequential:
        """Return two residuals; only a layer norm remains beside attention."""
        attention = self.attention.fold()
        scale_outputs(attention.project, self.attention_scale)
        mixer: nn.Module = attention
        if isinstance(self.norm, nn.BatchNorm2d):
            attention.qkv = fold_bn_linear(self.norm, attention.qkv)
        else:
            mixer = nn.Sequential(self.norm, attention)
        ffn = fold_children(self.ffn)
        scale_outputs(ffn.project, self.ffn_scale)
        return nn.Sequential(Residual(mixer), Residual(ffn))


class Downsample(nn.Module):
    """Halve the map: a grouped 7×7 convolution with a 3×3 branch, gate, GELU, then a pointwise block.

    The two branches are RepLKNet's (Ding et al. 2022).

    Args:
        in_channels: channels of the input, each filtered on its own.
        out_channels: channels of the output, a multiple.
        squeeze: channels of squeeze-and-excitation's inner layer; 0 for none.
    """

    def __init__(self, in_channels: int, out_channels: int, *, squeeze: int = 0) -> None:
        super().__init__()
        self.large = ConvNorm(in_channels, out_channels, kernel=_LARGE, stride=2, groups=in_channels)
        self.small = ConvNorm(in_channels, out_channels, kernel=_SMALL, stride=2, groups=in_channels)
        self.se: SqueezeExcite | None = SqueezeExcite(out_channels, squeeze) if squeeze else None
        self.pointwise = MobileOneBlock(out_channels, out_channels, kernel=(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C_out, H / 2, W / 2)``."""
        y: Tensor = self.large(x) + self.small(x)
        if self.se is not None:
            y = self.se(y)
        return self.pointwise(F.gelu(y))  # type: ignore[no-any-return]

    def fold(self) -> nn.Sequential:
        """Return the layers with one 7×7 convolution for both branches."""
        conv = self.large.conv
        kernel = Kernel.of_conv(conv, self.large.norm)
        kernel += Kernel.of_conv(self.small.conv, self.small.norm).padded(_LARGE)
        merged = kernel.to_conv(stride=conv.stride[0], groups=conv.groups, dtype=conv.weight.dtype)
        gate = [] if self.se is None else [self.se]
        return nn.Sequential(merged, *gate, nn.GELU(), self.pointwise.fold())


class PositionEncoding(nn.Module):
    """Conditional position encoding: a depthwise convolution added to its input (Chu et al. 2023)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, _LARGE, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to its like."""
        y: Tensor = x + self.conv(x)
        return y

    def fold(self) -> nn.Conv2d:
        """Return the convolution with 1 added at the centre."""
        conv = self.conv
        copied = Kernel.identity(conv.groups, groups=conv.groups, size=_LARGE, device=conv.weight.device)
        return (copied + Kernel.of_conv(conv)).to_conv(groups=conv.groups, dtype=conv.weight.dtype)


class Stage(nn.Module):
    """Downsampling and position encoding where the stage has them, then its blocks."""

    def __init__(
        self, *, downsample: Downsample | None, position: PositionEncoding | None, blocks: list[nn.Module]
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.position = position
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C_out, H / 2, W / 2)``, or to the same size without a halving."""
        if self.downsample is not None:
            x = self.downsample(x)
        if self.position is not None:
            x = self.position(x)
        y: Tensor = self.blocks(x)
        return y


class FastViT(nn.Module):
    """An MCi image tower: ``(B, 3, H, W)`` to unnormalised ``(B, E)``.

    Sides may have any size; whole multiples of the total stride ``2^(stages + 1)`` waste nothing.

    Raises:
        ConfigError: numbers of the config contradict each other.
    """

    def __init__(self, config: FastViTConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        first, last = config.dims[0], config.dims[-1]
        features = int(last * config.final_expansion)
        scale = config.stem_scale_branch
        self.stem = nn.Sequential(
            MobileOneBlock(3, first, kernel=_SMALL, stride=2, scale_branch=scale),
            MobileOneBlock(first, first, kernel=_SMALL, stride=2, groups=first, scale_branch=scale),
            MobileOneBlock(first, first, kernel=(1, 1)),
        )
        self.stages = nn.Sequential(*(_stage(config, index) for index in range(len(config.dims))))
        self.final = MobileOneBlock(
            last, features, kernel=_SMALL, groups=last, squeeze=features // _FINAL_SQUEEZE
        )
        self.projection = nn.Linear(features, config.embed_dim, bias=config.projection_bias)
        nn.init.normal_(self.projection.weight, std=features**-0.5)
        if config.projection_bias:
            nn.init.zeros_(self.projection.bias)

    def forward_features(self, image: Tensor) -> Tensor:
        """Return the last map ``(B, D, h, w)``, before the mean over positions.

        ``D`` is the last of ``dims`` times ``final_expansion``; ``h`` and ``w`` are the sides of the picture
        divided by the total stride.
        """
        y: Tensor = self.final(self.stages(self.stem(image)))
        return y

    def forward(self, image: Tensor) -> Tensor:
        """Embed ``(B, 3, H, W)`` pixels, scaled and normalized as the weights expect."""
        return self._pooled(self.forward_features(image))

    def forward_with_tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding, bit by bit that of ``forward``, and the positions of the last map.

        Returns:
            ``(B, E)`` and ``(B, h·w, D)``, row by row of the map.
        """
        features = self.forward_features(image)
        return self._pooled(features), features.flatten(2).transpose(1, 2)

    def _pooled(self, features: Tensor) -> Tensor:
        embedding: Tensor = self.projection(features.mean(dim=(2, 3)))
        return embedding


def _stage(config: FastViTConfig, index: int) -> Stage:
    channels = config.dims[index]
    hidden_dim = int(channels * config.mlp_ratio)
    init = config.layer_scale_init
    blocks: list[nn.Module] = []
    for _ in range(config.depths[index]):
        if config.mixers[index] == "repmixer":
            blocks.append(
                RepMixerBlock(channels, hidden_dim, mixer_kernel=_SMALL, ffn_kernel=_LARGE, scale_init=init)
            )
            continue
        norm = nn.BatchNorm2d(channels) if config.attention_norm == "batch" else ChannelNorm(channels)
        blocks.append(
            AttentionBlock(channels, hidden_dim, head_dim=config.head_dim, norm=norm, scale_init=init)
        )
    downsample = None
    if index:
        squeeze = max(8, (channels // 4 + 4) // 8 * 8) if index in config.se_stages else 0
        downsample = Downsample(config.dims[index - 1], channels, squeeze=squeeze)
    position = PositionEncoding(channels) if index in config.position_stages else None
    return Stage(downsample=downsample, position=position, blocks=blocks)


def _check(config: FastViTConfig) -> None:
    """Raise a ``ConfigError`` where numbers contradict each other."""
    stages = len(config.dims)
    lengths = (stages, len(config.depths), len(config.mixers))
    if not stages or len(set(lengths)) > 1:
        raise ConfigError(
            f"FastViT: dims, depths and mixers have {lengths} entries, expected one of each per stage."
        )
    if min(config.dims) < 1 or min(config.depths) < 1 or config.embed_dim < 1:
        raise ConfigError(
            f"FastViT: got dims {config.dims}, depths {config.depths} and embed_dim {config.embed_dim}, "
            "expected positive numbers."
        )
    for before, after in zip(config.dims, config.dims[1:], strict=False):
        if after % before:
            raise ConfigError(
                f"FastViT: dims {config.dims}: {after} is no multiple of {before}; each channel is "
                "downsampled on its own, so that widths may only grow by whole factors."
            )
    for channels, mixer in zip(config.dims, config.mixers, strict=True):
        if mixer not in ("repmixer", "attention"):
            raise ConfigError(f"FastViT: unknown mixer {mixer!r}, expected 'repmixer' or 'attention'.")
        if mixer == "attention" and (config.head_dim < 1 or channels % config.head_dim):
            raise ConfigError(
                f"FastViT: a stage of {channels} channels cannot be cut into heads of {config.head_dim}; "
                "choose a head_dim that divides it."
            )
    if config.attention_norm not in ("batch", "layer"):
        raise ConfigError(
            f"FastViT: unknown attention_norm {config.attention_norm!r}, expected 'batch' or 'layer'."
        )
    if int(min(config.dims) * config.mlp_ratio) < 1:
        raise ConfigError(f"FastViT: mlp_ratio {config.mlp_ratio} leaves no hidden channel.")
    wrong = sorted(
        set(config.position_stages) - set(range(stages)) | set(config.se_stages) - set(range(1, stages))
    )
    if wrong:
        raise ConfigError(
            f"FastViT: position_stages {config.position_stages} or se_stages {config.se_stages} name the "
            f"stages {wrong}; there are 0 to {stages - 1}, and the first has no downsampling."
        )
    features = config.dims[-1] * config.final_expansion
    if config.final_expansion != int(config.final_expansion) or features < _FINAL_SQUEEZE:
        raise ConfigError(
            f"FastViT: final_expansion {config.final_expansion} of {config.dims[-1]} channels, expected a "
            f"whole factor and at least {_FINAL_SQUEEZE} channels after it."
        )
    if features % _FINAL_SQUEEZE:
        raise ConfigError(
            f"FastViT: {features:g} channels after the last convolution, expected a multiple of "
            f"{_FINAL_SQUEEZE}, the ratio of its squeeze-and-excitation."
        )


# Foreign names
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """What the two sources call differently."""

    stem: str
    final: str
    main: str
    scale: str
    skip: str
    large: str
    ffn: str
    final_squeeze: tuple[str, str]
    layer_scale: str


_APPLE = _Names(
    stem="patch_embed",
    final="conv_exp",
    main="rbr_conv.0",
    scale="rbr_scale",
    skip="rbr_skip",
    large="lkb_origin",
    ffn="convffn",
    final_squeeze=("se.reduce", "se.expand"),
    layer_scale="",
)
_TIMM = _Names(
    stem="stem",
    final="final_conv",
    main="conv_kxk.0",
    scale="conv_scale",
    skip="identity",
    large="large_conv",
    ffn="mlp",
    final_squeeze=("se.fc1", "se.fc2"),
    layer_scale=".gamma",
)


def apple_keys(config: FastViTConfig) -> KeyMap:
    """Return how Apple's MobileCLIP checkpoints call the weights, relative to ``image_encoder.model.``.

    Raises:
        ConfigError: the projection has a bias, for which there is no name.
    """
    if config.projection_bias:
        raise ConfigError(
            "FastViT: projection_bias is True, but Apple's names have none; write timm's names instead."
        )
    places: dict[str, str] = {}
    number = 0
    for index in range(len(config.dims)):
        if index:
            places[f"stages.{index}.downsample"] = f"network.{number}.proj"
            number += 1
        if index in config.position_stages:
            places[f"stages.{index}.position.conv"] = f"network.{number}.pe"
            number += 1
        places[f"stages.{index}.blocks"] = f"network.{number}"
        number += 1
    pairs = _pairs(config, _APPLE, places)
    return KeyMap((*pairs, KeyPair("projection.weight", "head.proj", transposed=True)))


def timm_keys(config: FastViTConfig) -> KeyMap:
    """Return how timm calls the weights, relative to ``visual.trunk.`` in open_clip's checkpoints.

    timm always has a bias in its head: a constant 0 where the projection has none.
    """
    places: dict[str, str] = {}
    for index in range(len(config.dims)):
        places[f"stages.{index}.downsample"] = f"stages.{index}.downsample.proj"
        places[f"stages.{index}.position.conv"] = f"stages.{index}.pos_emb.pos_enc"
        places[f"stages.{index}.blocks"] = f"stages.{index}.blocks"
    pairs = (*_pairs(config, _TIMM, places), KeyPair("projection.weight", "head.fc.weight"))
    if config.projection_bias:
        return KeyMap((*pairs, KeyPair("projection.bias", "head.fc.bias")))
    return KeyMap(pairs, (Constant("head.fc.bias", (config.embed_dim,)),))


def _pairs(config: FastViTConfig, names: _Names, places: dict[str, str]) -> tuple[KeyPair, ...]:
    """Return the pairs of everything but the projection; ``places`` renames the parts of stages."""
    reduce, expand = names.final_squeeze
    parts = [
        (r"^stem\.", f"{names.stem}."),
        (r"^final\.se\.reduce", f"{names.final}.{reduce}"),
        (r"^final\.se\.expand", f"{names.final}.{expand}"),
        (r"^final\.", f"{names.final}."),
        # A norm behind a convolution, before the names that tell which convolution it is are gone.
        (r"\b(main|scale|large|small|depthwise)\.norm\.", r"\1.bn."),
        (r"\.downsample\.(large|small)\.", r".downsample.0.\1."),
        (r"\.downsample\.se\.reduce\.", ".downsample.0.se.fc1."),
        (r"\.downsample\.se\.expand\.", ".downsample.0.se.fc2."),
        (r"\.downsample\.pointwise\.", ".downsample.1."),
        (r"\.mixer\.mix\.", ".token_mixer.mixer."),
        (r"\.mixer\.norm\.", f".token_mixer.norm.{names.skip}."),
        (r"\.mixer\.layer_scale", ".token_mixer.layer_scale"),
        (r"\.attention\.project\.", ".token_mixer.proj."),
        (r"\.attention\.", ".token_mixer."),
        (r"\.attention_scale$", ".layer_scale_1"),
        (r"\.ffn_scale$", ".layer_scale_2"),
        (r"\.ffn\.depthwise\.", f".{names.ffn}.conv."),
        (r"\.ffn\.expand\.", f".{names.ffn}.fc1."),
        (r"\.ffn\.project\.", f".{names.ffn}.fc2."),
        (r"(\.layer_scale(_\d)?)$", rf"\1{names.layer_scale}"),
        (r"\.main\.", f".{names.main}."),
        (r"\.scale\.", f".{names.scale}."),
        (r"\.skip\.", f".{names.skip}."),
        (r"\.large\.", f".{names.large}."),
        (r"\.small\.", ".small_conv."),
    ]
    with torch.device("meta"):
        ours = FastViT(config).state_dict()
    pairs = []
    for key, value in ours.items():
        if key.startswith("projection."):
            continue
        theirs = key
        for pattern, replacement in parts:
            theirs = re.sub(pattern, replacement, theirs)
        for place, renamed in places.items():
            if theirs.startswith(f"{place}."):
                theirs = renamed + theirs.removeprefix(place)
                break
        linear = re.search(r"\.attention\.(qkv|project)\.weight$", key)
        pairs.append(KeyPair(key, theirs, theirs_shape=tuple(value.shape[:2]) if linear else None))
    return tuple(pairs)
