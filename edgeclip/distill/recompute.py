"""Memory for time: the blocks of a tower are computed again in the backward pass (Chen et al. 2016).

Only the input of a block is kept, and what is between its input and its output is made anew when its gradient
is asked for. The second time must equal the first: random generators are restored (stochastic depth agrees),
and batch norms do not move their running statistics again.

The models know nothing of this: blocks are wrapped while a context is open, so that copies of a model, and
what is folded or exported, are as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from edgeclip.models.attention import TransformerLayer
from edgeclip.models.efficientnet_lite import InvertedResidual
from edgeclip.models.fastvit import AttentionBlock, Downsample
from edgeclip.models.mobileone import MobileOneBlock, RepMixerBlock
from edgeclip.models.text_transformer import ConvLayer

__all__ = ["blocks_of", "held_statistics", "recomputed_blocks"]

_BLOCKS = (
    AttentionBlock,
    ConvLayer,
    Downsample,
    InvertedResidual,
    MobileOneBlock,
    RepMixerBlock,
    TransformerLayer,
)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that are recomputed as one, none inside another."""
    if isinstance(model, _BLOCKS):
        return [model]
    return [block for child in model.children() for block in blocks_of(child)]


@contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """Let the blocks of ``model`` keep only their inputs in forward passes inside this context.

    The backward pass may come after it.
    """
    blocks = blocks_of(model)
    for block in blocks:
        # An attribute of the instance stands before the method of its class.
        block.__dict__["forward"] = _Recomputed(block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


class _Recomputed:
    """The forward pass of a block that forgets what is inside it."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._block, self._forward = block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            self._forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=partial(_contexts, self._block),
            **kwargs,
        )


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), held_statistics(block)


@contextmanager
def held_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode compute as ever, but leave their running statistics as they are."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    before = [{name: norm._buffers[name] for name in _STATISTICS} for norm in norms]
    # Others in their place, not their values written back: autograd would take that for a change of what it
    # has saved.
    for norm, buffers in zip(norms, before, strict=True):
        norm._buffers.update(
            {name: None if value is None else value.clone() for name, value in buffers.items()}
        )
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)
