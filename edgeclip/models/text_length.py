"""Other context lengths for a transformer text tower: shorter exactly, longer as a start of training.

Labels of a few words in a tower of 77 tokens are mostly padding. Where padding has no part in the embedding
(causal attention, or padding that is left out) the tail of the position table is simply not needed. Where it
has (full attention: most MobileCLIP models, MCt's convolutions included), a shorter row is another
input and gives another embedding, so nothing here shortens such a tower.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from edgeclip.errors import ConfigError
from edgeclip.models.text_transformer import TextTransformer

__all__ = ["stretch_positions", "with_context_length"]


def with_context_length(tower: TextTransformer, context_length: int) -> TextTransformer:
    """Return a copy that takes at most ``context_length`` tokens; texts that fit keep their embedding.

    Exact up to the order of sums.

    Args:
        tower: with causal or padded attention.
        context_length: tokens per text, start and end included. The tokenizer must cut to it as well, end
            token kept.

    Raises:
        ConfigError: attention is full, so that padding takes part in it, or the length is not between 1 and
            the tower's.
    """
    config = tower.config
    if config.attention == "full":
        raise ConfigError(
            f"text tower: cannot be shortened from {config.context_length} to {context_length} tokens: its "
            "attention is 'full', so padding takes part in it and fewer tokens give another embedding. Keep "
            f"{config.context_length} tokens and cache the embeddings of your labels, or train a student "
            "with 'causal' or 'padded' attention."
        )
    if not 1 <= context_length <= config.context_length:
        raise ConfigError(
            f"text tower: got context length {context_length}, expected 1 to {config.context_length}; "
            "stretch_positions() makes longer towers, as a start of training."
        )
    return _with_positions(tower, tower.positions[:context_length])


def stretch_positions(
    tower: TextTransformer, context_length: int = 248, *, keep: int = 20
) -> TextTransformer:
    """Return a copy for longer texts, to be trained further; short texts lose some accuracy until it is.

    Knowledge-preserved stretching (Zhang et al. 2024, "Long-CLIP"): the first ``keep`` positions, which are
    well trained, stay; the others are spread over the rest by linear interpolation with ratio
    ``r = (context_length - keep) / (old - keep)``, so that old position ``p`` comes to
    ``keep + r·(p - keep)``. Behind the last old position the table goes on along the line of the last two, as
    the published code has it. Its numbers are 77, 20 and r = 4, hence 248; other ratios are ours.

    Args:
        tower: of any attention; a full one sees more padding than it was trained with.
        context_length: tokens per text, more than the tower's.
        keep: positions that stay.

    Raises:
        ConfigError: the length is not above the tower's, or ``keep`` leaves fewer than two positions to
            stretch.
    """
    old = tower.config.context_length
    if context_length <= old or not 0 <= keep <= old - 2:
        raise ConfigError(
            f"text tower: cannot stretch {old} positions to {context_length} with keep {keep}; expected more "
            f"than {old} and keep between 0 and {old - 2}."
        )
    table = tower.positions.detach().double()
    ratio = (context_length - keep) / (old - keep)
    place = keep + torch.arange(context_length - keep, dtype=torch.float64, device=table.device) / ratio
    left = place.floor().long().clamp(max=old - 2)
    share = (place - left)[:, None]  # above 1 behind the last old position
    stretched = table[left] + share * (table[left + 1] - table[left])
    return _with_positions(tower, torch.cat([table[:keep], stretched]))


@torch.no_grad()
def _with_positions(tower: TextTransformer, table: Tensor) -> TextTransformer:
    copied = copy.deepcopy(tower)
    copied.config = dataclasses.replace(tower.config, context_length=len(table))
    copied.positions = nn.Parameter(
        table.detach().to(tower.positions).clone(), requires_grad=tower.positions.requires_grad
    )
    return copied
