"""Masked language modelling beside contrastive training: hide words, look at the picture, say what they were.

LightCLIP (Nie et al. 2023, arXiv 2312.00674) gets more out of a short text encoder this way, and brings the
picture into the masked text at several depths. Of the paper we know the abstract. Ours, beyond that: 15 % of
the words as BERT has it (Devlin et al. 2019), all of them replaced by one learned vector, since CLIP's
vocabulary has no id to spare; cross-attention to the patches behind some layers of the text tower, which
starts as nothing; BERT's head.

All of it is needed in training only. It is part of the objective, and no part of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.distill.randomness import random_stream
from edgeclip.distill.token_losses import hidden_word_loss
from edgeclip.tokenizer import SpecialIds

__all__ = ["HiddenWords", "TokenShapes", "hide", "hiding_draws", "word_places"]

_HEAD_DIM = 32


def word_places(tokens: Tensor, special: SpecialIds) -> Tensor:
    """Return which ids ``(…, L)`` are words: not padding, not start and end, ``(…, L)`` bool.

    Where there is an end, all behind it is padding: CLIP's tokenizer pads with an id that is also a word.
    """
    words = tokens != special.pad if special.end is None else (tokens == special.end).cumsum(dim=-1) == 0
    return words if special.start is None else words & (tokens != special.start)


def hiding_draws(shape: tuple[int, int], index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """Return numbers in [0, 1) that decide what is hidden, ``(b, n, L)``; functions of the sample alone.

    Args:
        shape: ``(n, L)``.
        index: ``(b,)`` the samples.
        seed: of the order of samples.
        epoch: how often the data have been through.
    """
    rows = [random_stream(seed, epoch, each, "hide").random(shape, np.float32) for each in index.tolist()]
    return torch.from_numpy(np.stack(rows)).to(index.device)


def hide(words: Tensor, draws: Tensor, share: float) -> Tensor:
    """Return which words are hidden, ``(…, L)`` bool: each with chance ``share``, at least one of a text.

    Args:
        words: ``(…, L)`` bool, see :func:`word_places`. A text without words has none to hide.
        draws: ``(…, L)`` in [0, 1).
        share: of the words.
    """
    draws = draws.masked_fill(~words, 2.0)
    return words & ((draws < share) | (draws == draws.amin(dim=-1, keepdim=True)))


@dataclass(frozen=True)
class TokenShapes:
    """What the towers of a student say about tokens; 0 where a tower has none to give.

    Attributes:
        image: width of a patch.
        text: width of a word.
        pieces: width of a row of the token table.
        vocabulary: rows of it.
        layers: attention layers of the text tower.
    """

    image: int = 0
    text: int = 0
    pieces: int = 0
    vocabulary: int = 0
    layers: int = 0


class _Fusion(nn.Module):
    """Words look at patches: pre-norm cross-attention whose output starts at zero."""

    def __init__(self, width: int, image_width: int) -> None:
        super().__init__()
        inner = max(1, width // _HEAD_DIM) * _HEAD_DIM
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner)
        self.key_value = nn.Linear(image_width, 2 * inner)
        self.out = nn.Linear(inner, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        """Return ``x + out(attention)`` of ``x`` ``(B, L, D)`` and patches ``(B, N, C)``."""
        query = _heads(self.query(self.norm(x)))
        key, value = self.key_value(patches).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(query, _heads(key), _heads(value))  # (B, heads, L, head_dim)
        return cast(Tensor, x + self.out(mixed.transpose(1, 2).flatten(2)))


def _heads(x: Tensor) -> Tensor:
    """Return (B, L, heads · head_dim) as (B, heads, L, head_dim)."""
    return x.reshape(*x.shape[:2], -1, _HEAD_DIM).transpose(1, 2)


class HiddenWords(nn.Module):
    """What predicts hidden words: the vector in their place, fusion with the picture, the head.

    Args:
        shapes: of the student's tokens.
        share: of the words that are hidden.
        fusions: layers of the text tower behind which words look at patches, spread evenly, the last among
            them; all where there are fewer.
    """

    def __init__(self, shapes: TokenShapes, *, share: float, fusions: int) -> None:
        super().__init__()
        self.share = share
        count = min(fusions, shapes.layers)
        self._block_of = {(number + 1) * shapes.layers // count - 1: number for number in range(count)}
        self.vector = nn.Parameter(torch.empty(shapes.pieces))
        self.image_norm = nn.LayerNorm(shapes.image)
        self.fusions = nn.ModuleList(_Fusion(shapes.text, shapes.image) for _ in range(count))
        self.transform = nn.Linear(shapes.text, shapes.text)
        self.norm = nn.LayerNorm(shapes.text)
        self.predict = nn.Linear(shapes.text, shapes.vocabulary)
        nn.init.normal_(self.vector, std=0.02)
        nn.init.zeros_(self.predict.bias)

    def fused(self, layer: int, x: Tensor, patches: Tensor) -> Tensor:
        """Return the words ``(B, L, D)`` behind a layer of the text tower, as the next layer sees them.

        Args:
            layer: its number.
            x: what it gives.
            patches: ``(B, N, C)`` of :attr:`image_norm`.
        """
        if layer not in self._block_of:
            return x
        return cast(Tensor, self.fusions[self._block_of[layer]](x, patches))

    def loss(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the mean cross-entropy over the hidden words of all ranks.

        Args:
            states: ``(n, D)`` the text tower's tokens at their places.
            ids: ``(n,)`` what was hidden.
        """
        states = self.norm(F.gelu(self.transform(states)))
        return hidden_word_loss(states, ids, self.predict.weight, self.predict.bias)
