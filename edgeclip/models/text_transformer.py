"""Transformer text towers."""

from __future__ import annotations

from torch import nn

from edgeclip.models.config import TextTransformerConfig

__all__ = ["TextTransformer"]


class TextTransformer(nn.Module):
    """Transformer text towers."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
