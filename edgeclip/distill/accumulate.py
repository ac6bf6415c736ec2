"""Gradient accumulation that is exact for contrastive losses (Gao et al. 2021, "GradCache").

Adding up the gradients of micro-batches is not the gradient of the batch where every pair is compared with
every other. So each micro-batch is embedded twice: first without gradients, to collect the embeddings of the
whole batch; then, once the loss has given the gradient of every embedding, again with them. Memory is that
of one micro-batch, time one more forward pass.

The second pass must repeat the first: random generators are restored, so dropout and stochastic depth agree.
Batch norms in training mode compute their statistics from the micro-batch, not from the batch; freeze them
(``eval``) where exactness matters. Their running averages would move in both passes: the trainer holds them
in the first (:func:`edgeclip.distill.recompute.held_statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from edgeclip.errors import ConfigError

__all__ = ["backward_in_parts"]

_Part = TypeVar("_Part")


def backward_in_parts(
    embed: Callable[[_Part], tuple[Tensor, ...]],
    parts: Sequence[_Part],
    loss: Callable[..., Tensor],
) -> Tensor:
    """Add the gradient of ``loss`` over all parts to the parameters, and return its value.

    Args:
        embed: a micro-batch to its embeddings, each ``(b, …)``; called twice a part, with gradients the
            second time.
        parts: the micro-batches.
        loss: of the concatenated embeddings, one argument for each that ``embed`` returns. Parameters of its
            own (the logit scale) get their gradients here.

    Returns:
        the loss, detached.

    Raises:
        ConfigError: no parts.
    """
    if not parts:
        raise ConfigError("backward_in_parts: got no micro-batches, expected one or more.")
    states: list[list[Tensor]] = []
    collected: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for part in parts:
            states.append(_generator_states())
            collected.append(embed(part))
    joined = [torch.cat(column).requires_grad_() for column in zip(*collected, strict=True)]
    value = loss(*joined)
    value.backward()  # type: ignore[no-untyped-call]
    after = _generator_states()
    sizes = [len(columns[0]) for columns in collected]
    gradients = [
        torch.split(column.grad if column.grad is not None else torch.zeros_like(column), sizes)
        for column in joined
    ]
    for index, part in enumerate(parts):
        _restore_generators(states[index])
        reached = [
            (embedding, column[index])
            for embedding, column in zip(embed(part), gradients, strict=True)
            if embedding.requires_grad  # not of a tower that is frozen
        ]
        if reached:
            embeddings, theirs = zip(*reached, strict=True)
            torch.autograd.backward(embeddings, theirs)
    _restore_generators(after)
    return value.detach()


def _generator_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return states


def _restore_generators(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
