"""The blocks of MobileCLIP that train in several branches and run as one convolution.

MobileOne (Vasu et al. 2023, "MobileOne"), RepMixer and the convolutional feed-forward part (Vasu et al. 2023,
"FastViT"). Kernels are ``(rows, columns)``, so that the text blocks of MobileCLIP-S0 (1×11 over tokens; Vasu
et al. 2024, "MobileCLIP") are the same code. Batch-norm ``eps`` is 1e-5, as published.

Two deviations, neither of which published weights can tell: MobileOne's several parallel convolutions are one
here, as in every MobileCLIP, and RepMixer's ``norm`` is the batch norm that its MobileOne block consists of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.models.reparam import Kernel, fold_children, fold_conv_bn, scale_outputs

__all__ = ["ConvFFN", "ConvNorm", "MobileOneBlock", "RepMixer", "RepMixerBlock", "Residual", "SqueezeExcite"]

Size = tuple[int, int]


class ConvNorm(nn.Module):
    """A convolution without bias, padded by half its kernel, and a batch norm."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: Size, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=(kernel[0] // 2, kernel[1] // 2),
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C_out, H / stride, W / stride)``."""
        y: Tensor = self.norm(self.conv(x))
        return y

    def fold(self) -> nn.Conv2d:
        """Return the convolution with the norm inside."""
        return fold_conv_bn(self.conv, self.norm)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate made of all channels' means (Hu et al. 2018)."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``(B, C, H, W)``."""
        gate: Tensor = self.expand(F.relu(self.reduce(x.mean(dim=(2, 3), keepdim=True))))  # (B, C, 1, 1)
        return x * gate.sigmoid()


class Residual(nn.Module):
    """``x + body(x)``: what folded blocks consist of."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Add the body's output to its input."""
        y: Tensor = x + self.body(x)
        return y


class MobileOneBlock(nn.Module):
    """A convolution, a 1×1 convolution and a skip, each with a batch norm, added up; then gate and GELU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: rows and columns, both odd.
        stride: of every branch; the skip exists where it is 1 and the channels agree.
        groups: of every branch.
        scale_branch: whether the 1×1 convolution exists; a kernel of one row never has it, as published.
        squeeze: channels of squeeze-and-excitation's inner layer; 0 for none.
        activation: whether GELU ends the block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Size,
        stride: int = 1,
        groups: int = 1,
        scale_branch: bool = True,
        squeeze: int = 0,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.main = ConvNorm(in_channels, out_channels, kernel=kernel, stride=stride, groups=groups)
        self.scale: ConvNorm | None = None
        if scale_branch and kernel[0] > 1:
            self.scale = ConvNorm(in_channels, out_channels, kernel=(1, 1), stride=stride, groups=groups)
        self.skip: nn.BatchNorm2d | None = None
        if in_channels == out_channels and stride == 1:
            self.skip = nn.BatchNorm2d(in_channels)
        self.se: SqueezeExcite | None = SqueezeExcite(out_channels, squeeze) if squeeze else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C_in, H, W)`` to ``(B, C_out, H / stride, W / stride)``."""
        y: Tensor = self.main(x)
        if self.scale is not None:
            y = y + self.scale(x)
        if self.skip is not None:
            y = y + self.skip(x)
        if self.se is not None:
            y = self.se(y)
        return F.gelu(y) if self.activation else y

    def kernel(self) -> Kernel:
        """Return the sum of the branches as one kernel."""
        conv = self.main.conv
        size: Size = (conv.kernel_size[0], conv.kernel_size[1])
        kernel = Kernel.of_conv(conv, self.main.norm)
        if self.scale is not None:
            kernel += Kernel.of_conv(self.scale.conv, self.scale.norm).padded(size)
        if self.skip is not None:
            kernel += Kernel.of_norm(self.skip, groups=conv.groups, size=size)
        return kernel

    def fold(self) -> nn.Module:
        """Return one convolution, with gate and GELU behind it where the block has them."""
        conv = self.main.conv
        layers: list[nn.Module] = [
            self.kernel().to_conv(stride=conv.stride[0], groups=conv.groups, dtype=conv.weight.dtype)
        ]
        if self.se is not None:
            layers.append(self.se)
        if self.activation:
            layers.append(nn.GELU())
        return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


class RepMixer(nn.Module):
    """``x + s·(mix(x) - norm(x))`` with a depthwise MobileOne block.

    Args:
        channels: of input and output.
        kernel: rows and columns, both odd.
        scale_init: initial ``s``, per channel.
    """

    def __init__(self, channels: int, *, kernel: Size, scale_init: float = 1e-5) -> None:
        super().__init__()
        self.mix = MobileOneBlock(channels, channels, kernel=kernel, groups=channels, activation=False)
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), scale_init))

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``(B, C, H, W)`` over its neighbourhood."""
        y: Tensor = x + self.layer_scale * (self.mix(x) - self.norm(x))
        return y

    def fold(self) -> nn.Conv2d:
        """Return one depthwise convolution: ``W = I + s·(W_mix - W_norm)``, ``b = s·(b_mix - b_norm)``."""
        conv = self.mix.main.conv
        size: Size = (conv.kernel_size[0], conv.kernel_size[1])
        norm = Kernel.of_norm(self.norm, groups=conv.groups, size=size)
        copied = Kernel.identity(conv.groups, groups=conv.groups, size=size, device=conv.weight.device)
        kernel = copied + (self.mix.kernel() - norm).scaled(self.layer_scale)
        return kernel.to_conv(groups=conv.groups, dtype=conv.weight.dtype)


class ConvFFN(nn.Module):
    """A depthwise convolution with batch norm, then two 1×1 convolutions with GELU between them.

    Folding leaves the module and takes its batch norm.
    """

    def __init__(self, channels: int, hidden_dim: int, *, kernel: Size) -> None:
        super().__init__()
        self.depthwise = ConvNorm(channels, channels, kernel=kernel, groups=channels)
        self.expand = nn.Conv2d(channels, hidden_dim, 1)
        self.project = nn.Conv2d(hidden_dim, channels, 1)
        for conv in (self.depthwise.conv, self.expand, self.project):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to its like."""
        y: Tensor = self.project(F.gelu(self.expand(self.depthwise(x))))
        return y


class RepMixerBlock(nn.Module):
    """RepMixer, then the feed-forward part with its layer scale as a residual.

    Args:
        channels: of input and output.
        hidden_dim: width of the feed-forward part.
        mixer_kernel: of RepMixer.
        ffn_kernel: of the feed-forward part's depthwise convolution.
        scale_init: initial layer scales.
    """

    def __init__(
        self,
        channels: int,
        hidden_dim: int,
        *,
        mixer_kernel: Size,
        ffn_kernel: Size,
        scale_init: float = 1e-5,
    ) -> None:
        super().__init__()
        self.mixer = RepMixer(channels, kernel=mixer_kernel, scale_init=scale_init)
        self.ffn = ConvFFN(channels, hidden_dim, kernel=ffn_kernel)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), scale_init))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to its like."""
        x = self.mixer(x)
        y: Tensor = x + self.layer_scale * self.ffn(x)
        return y

    def fold(self) -> nn.Sequential:
        """Return a depthwise convolution and a residual of three convolutions."""
        ffn = fold_children(self.ffn)
        scale_outputs(ffn.project, self.layer_scale)
        return nn.Sequential(self.mixer.fold(), Residual(ffn))
