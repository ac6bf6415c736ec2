"""Where the text tower of the default model starts: not at random, but at the best bag of pieces.

A bag that gives every piece a vector and every text the mean of its pieces' is a linear map, so that the
best one for given targets is known: ridge regression of the targets, on their main axes, on the shares of
the pieces. The tower's table and its shortcut take it over; products of neighbours and the hidden layer start
near zero, and training adds what no linear map can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from edgeclip.errors import ConfigError
from edgeclip.models.text import BagTextTower
from edgeclip.tokenizer import Tokenizer

from .default_space import Floats

__all__ = ["start_from_targets"]

_RIDGE = 1.0  # as if a piece had stood alone, once, for nothing in particular
_STEPS = 60  # of conjugate gradients; the residual no longer falls
_TABLE_STD = 0.5  # as a fresh table
_SHORTCUT_GAIN, _PAIRS_GAIN, _FRESH_GAIN = 0.1, 0.3, 0.1


@torch.no_grad()
def start_from_targets(
    tower: BagTextTower, tokenizer: Tokenizer, texts: Sequence[str], targets: Floats, weights: Floats
) -> float:
    """Give a fresh tower the best linear bag, and return the share of the targets' variance it explains.

    Args:
        tower: changed in place.
        tokenizer: of the tower.
        texts: ``(n)``.
        targets: what they should embed to ``(n, E)``.
        weights: how much each counts ``(n,)``.

    Raises:
        ConfigError: the tower's table is factorised, or wider than the targets.
    """
    width = tower.config.width
    if tower.widen is not None or width > targets.shape[1]:
        raise ConfigError(
            f"start: a text tower of width {width} and token_dim {tower.config.token_dim} cannot take over a "
            f"map to {targets.shape[1]} numbers; give it no token_dim and no more width than that."
        )
    share, goal = torch.from_numpy(weights / weights.sum())[:, None], torch.from_numpy(targets)
    mean = (share * goal).sum(dim=0)
    goal = goal - mean
    covariance = (goal.double().T * share.T) @ goal.double()
    axes = torch.linalg.eigh(covariance)[1].flip(1)[:, :width].float()  # (E, D), the main one first
    bags = _bags(tokenizer, texts, tower.config.vocab_size)
    goal_of_bags = goal @ axes
    # Weights of the mean text are 1, so that the ridge means the same for any number of texts.
    count = share * len(texts)
    table = _ridge(bags, goal_of_bags, count)
    error = (share * (goal - (bags @ table) @ axes.T) ** 2).sum() / (share * goal**2).sum()
    tower.pieces.weight.copy_(_TABLE_STD / table.std() * table)
    tower.left.weight.mul_(_PAIRS_GAIN)
    tower.right.weight.mul_(_PAIRS_GAIN)
    tower.projection.weight.mul_(_FRESH_GAIN)
    tower.shortcut.weight.mul_(_FRESH_GAIN)
    tower.shortcut.weight[:, :width] += _SHORTCUT_GAIN * axes
    tower.shortcut.bias.copy_(mean)
    return 1 - float(error)


def _bags(tokenizer: Tokenizer, texts: Sequence[str], vocab_size: int) -> Tensor:
    """Return the shares of pieces in texts, sparse ``(n, V)``."""
    pieces = [tokenizer.encode(text)[: tokenizer.context_length] for text in texts]
    counts = np.array([len(each) for each in pieces])
    places = np.stack([np.repeat(np.arange(len(texts)), counts), np.fromiter(chain(*pieces), np.int64)])
    shares = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    return torch.sparse_coo_tensor(
        torch.from_numpy(places),
        torch.from_numpy(shares),
        (len(texts), vocab_size),
        check_invariants=True,
    ).coalesce()


def _ridge(bags: Tensor, goal: Tensor, weights: Tensor) -> Tensor:
    """Return the table ``(V, D)`` by conjugate gradients, a system for every column."""
    across = bags.t().coalesce()
    table = torch.zeros(bags.shape[1], goal.shape[1])
    rest = across @ (weights * goal)
    direction, length = rest.clone(), (rest**2).sum(dim=0)
    for _ in range(_STEPS):
        image = across @ (weights * (bags @ direction)) + _RIDGE * direction
        step = length / (direction * image).sum(dim=0).clamp_min(1e-12)
        table += step * direction
        rest -= step * image
        before, length = length, (rest**2).sum(dim=0)
        direction = rest + length / before.clamp_min(1e-20) * direction
    return table
