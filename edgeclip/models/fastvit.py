"""MCi image towers."""

from __future__ import annotations

from torch import nn

from edgeclip.models.config import FastViTConfig

__all__ = ["FastViT"]


class FastViT(nn.Module):
    """MCi image towers."""

    def __init__(self, config: FastViTConfig) -> None:
        super().__init__()
        self.config = config
