"""A bag-of-pieces text tower: no transformer, a few hundred microseconds a text.

``x = table[tokens]`` (B, L, D); two pools over the tokens, each an attention pooling with its own weights per
group of channels (the single learned query of Lee et al. 2019, "Set Transformer", §3.2, without key
projections):

1. the pieces ``x`` themselves;
2. products of neighbours ``(x_i A) * (x_{i+1} B)``, which see the order that a bag forgets ("horse chestnut"
is no
   horse); a rank-D bilinear form (Kim et al. 2017, "Hadamard product for low-rank bilinear pooling", eq. 4).

The embedding is a linear map of both pools plus a hidden GELU layer. Padding is left out exactly: a longer
row of the same text gives the same embedding. Own design; no published weights.

The table is most of a small tower. With ``token_dim`` it is factorised: a narrow table and one linear map to
the tower's width (Lan et al. 2020, "ALBERT", §3.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.errors import ConfigError
from edgeclip.models.config import BagTextConfig

__all__ = ["AttentionPool", "BagTextTower"]

# Below every score that occurs and far inside float16; masked positions are set to exactly zero afterwards.
_MASKED_SCORE = -1e4


class AttentionPool(nn.Module):
    """Weighted mean over tokens; each group of channels has its own softmax over the tokens that count."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, heads, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool ``x`` (B, L, D) over the tokens where ``mask`` (B, L) is true; zeros where none is."""
        keep = mask[..., None]  # (B, L, 1)
        score = self.score(x).masked_fill(~keep, _MASKED_SCORE)  # (B, L, heads)
        weight = score.softmax(dim=1) * keep  # (B, L, heads)
        heads = self.score.out_features
        grouped = x.unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]  # (B, L, heads, D/heads)
        pooled: Tensor = (grouped * weight[..., None]).sum(dim=1).flatten(1)  # (B, D)
        return pooled


class BagTextTower(nn.Module):
    """Tokens ``(B, L)`` to embeddings ``(B, E)``, not normalized."""

    def __init__(self, config: BagTextConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ConfigError(
                f"text tower: width {config.width} does not divide into {config.heads} heads; "
                "choose a width that is a multiple of heads."
            )
        self.config = config
        width = config.width
        self.pieces = nn.Embedding(config.vocab_size, config.token_dim or width)
        self.widen: nn.Linear | None = None
        if config.token_dim:
            self.widen = nn.Linear(config.token_dim, width, bias=False)
        self.left = nn.Linear(width, width, bias=False)
        self.right = nn.Linear(width, width, bias=False)
        self.pool_pieces = AttentionPool(width, heads=config.heads)
        self.pool_pairs = AttentionPool(width, heads=config.heads)
        self.norm = nn.LayerNorm(2 * width)
        self.hidden = nn.Linear(2 * width, config.hidden_dim)
        self.projection = nn.Linear(config.hidden_dim, config.embed_dim, bias=False)
        self.shortcut = nn.Linear(2 * width, config.embed_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        nn.init.normal_(self.pieces.weight, std=0.5)
        if self.widen is not None:
            nn.init.normal_(self.widen.weight, std=self.config.token_dim**-0.5)
        # Scores start at zero: every pool starts as a plain mean.
        nn.init.zeros_(self.pool_pieces.score.weight)
        nn.init.zeros_(self.pool_pairs.score.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids ``(B, L)``; any L, padding at the end."""
        mask = tokens != self.config.pad_id  # (B, L)
        x = self.pieces(tokens)  # (B, L, D)
        if self.widen is not None:
            x = self.widen(x)
        pairs = self.left(x[:, :-1]) * self.right(x[:, 1:])  # (B, L-1, D)
        pooled = torch.cat(
            [self.pool_pieces(x, mask), self.pool_pairs(pairs, mask[:, :-1] & mask[:, 1:])], dim=-1
        )  # (B, 2D)
        pooled = self.norm(pooled)
        embedding: Tensor = self.projection(F.gelu(self.hidden(pooled))) + self.shortcut(pooled)
        return embedding
