"""Vision transformers."""

from __future__ import annotations

from torch import nn

from edgeclip.models.config import ViTConfig

__all__ = ["VisionTransformer"]


class VisionTransformer(nn.Module):
    """Vision transformers."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
