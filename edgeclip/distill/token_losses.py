"""Losses over the patches of pictures and the words of texts, one pure function a term.

LightCLIP (Nie et al. 2023, arXiv 2312.00674) aligns patches and words by a relaxed bipartite matching, and
has masked language modelling beside it. Of the paper we know the abstract, and found no code. So the
relaxation below, that it is used contrastively, and every constant are ours.

Texts of other ranks take part in the matching with their gradients, as in ``losses``: the average over ranks
of a loss and of its gradients is that of the joint batch. No matrix exceeds ``max_matrix_bytes``; what does
not fit is cut, and computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgeclip.distill.losses import MAX_MATRIX_BYTES, over_rows
from edgeclip.distill.pairs import Pairs, gather_rows
from edgeclip.errors import ConfigError, InputError

__all__ = ["MATRICES", "TokenPairs", "hidden_word_loss", "matched_similarity", "token_alignment"]

MATRICES = 3
"""Numbers held at once for a word and a patch: product, exponential, and the plan of the backward pass."""


@dataclass(frozen=True)
class TokenPairs:
    """Patches of this rank's pictures, and the words of everybody's texts.

    Attributes:
        patches: ``(b, N, C)`` unit rows.
        words: ``(B, L, C)`` unit rows of all ranks, in rank order.
        kept: ``(B, L)`` bool, which of them are words: not padding, not start and end.
        targets: ``(b, B)`` which texts belong to each picture, and which pictures of all ranks to each of
            this rank's texts; rows sum to 1.
        offset: row of ``words`` where this rank's texts begin.
    """

    patches: Tensor
    words: Tensor
    kept: Tensor
    targets: Tensor
    offset: int = 0

    @classmethod
    def gather(cls, patches: Tensor, words: Tensor, kept: Tensor, *, pairs: Pairs) -> TokenPairs:
        """Return this rank's pictures with the texts of all ranks beside them.

        Columns without a word in any text of the joint batch are left out.

        Args:
            patches: ``(b, N, C)``.
            words: ``(b, L, C)``.
            kept: ``(b, L)`` bool.
            pairs: embeddings of the same pairs: what belongs to what is the same for their tokens.

        Raises:
            InputError: shapes that do not belong together.
        """
        if (
            patches.ndim != 3
            or words.ndim != 3
            or kept.shape != words.shape[:2]
            or not len(patches) == len(words) == len(pairs.image)
            or patches.shape[2] != words.shape[2]
        ):
            raise InputError(
                f"token pairs: got patches {tuple(patches.shape)}, words {tuple(words.shape)} and a mask "
                f"{tuple(kept.shape)} of {len(pairs.image)} pairs, expected (b, N, C), (b, L, C) and (b, L)."
            )
        all_kept = gather_rows(kept.to(torch.uint8)).bool()
        used = all_kept.any(dim=0)
        all_words = gather_rows(words)[:, used]
        return cls(patches, all_words, all_kept[:, used], pairs.targets(), pairs.offset)


def token_alignment(
    pairs: TokenPairs,
    scale: Tensor | float,
    *,
    temperature: float = 0.05,
    iterations: int = 5,
    max_matrix_bytes: int = MAX_MATRIX_BYTES,
) -> Tensor:
    """Return the symmetric cross-entropy of matching by patches and words in place of embeddings.

    ``½ [CE(scale · s(V_i, ·)) + CE(scale · s(·, T_i))]`` over this rank's pictures and texts, with ``s`` of
    :func:`matched_similarity`. Contrastive, as the objective over embeddings: an attraction of matching
    pairs alone is fulfilled by tokens that are all alike. (FILIP, Yao et al. 2022, is the case without
    capacity and temperature: each word takes its best patch.)

    Args:
        pairs: unit tokens.
        scale: multiplier of similarities.
        temperature: of the relaxation.
        iterations: of the prices of patches.
        max_matrix_bytes: see the module.
    """
    scores = _all_scores(pairs, temperature, iterations, max_matrix_bytes)  # (b, B)
    # The texts of this rank against the pictures of all: what the others have computed is a column away.
    own = slice(pairs.offset, pairs.offset + len(scores))
    of_texts = gather_rows(scores)[:, own].T  # (b, B)
    both = (
        -(pairs.targets * (scale * scores).log_softmax(dim=1)).sum()
        - (pairs.targets * (scale * of_texts).log_softmax(dim=1)).sum()
    )
    return both / (2 * len(scores))


def matched_similarity(
    patches: Tensor, words: Tensor, kept: Tensor, *, temperature: float = 0.05, iterations: int = 5
) -> Tensor:
    """Return how well the words of texts can be matched to patches of pictures, each with each.

    The exact form is an assignment: every word of a text ``T`` takes one patch of a picture ``V``, no patch
    serves two words, and the mean cosine of the pairs is as large as can be. Relaxed, a word may be shared by
    patches, at a cost (entropic optimal transport: Cuturi 2013; Benamou et al. 2015 for the inequality):

    ``s(V, T) = 1/|T| · max_P  Σ_lp P_lp ⟨t_l, v_p⟩ − ε Σ_l KL(P_l ‖ 1/N)``
    ``subject to  P ≥ 0,  Σ_p P_lp = 1,  Σ_l P_lp ≤ max(1, |T| / N)``

    with ``N`` patches and ``ε`` the temperature. It is at most the mean cosine of the best assignment, and
    less by ``ε ln N`` at most; for large ``ε`` it is the mean cosine of all. A text of more words than there
    are patches has to put several on one.

    Computed from the dual: patches have prices ``h ≥ 0``, and

    ``s = 1/|T| · min_h  Σ_l ε ln( 1/N Σ_p exp((⟨t_l, v_p⟩ − h_p) / ε) ) + max(1, |T|/N) Σ_p h_p``.

    Prices are found by alternating projections, a fixed number of times, and taken as constants: at the
    optimum the gradient with regard to the cosines is ``P / |T|`` whatever the prices do (Danskin). After few
    iterations ``s`` lies above the optimum, every word still gives its whole weight, and some patches serve
    more than they should.

    Args:
        patches: ``(b, N, C)`` unit rows.
        words: ``(B, L, C)`` unit rows.
        kept: ``(B, L)`` bool, which of them are words. A text without any has similarity 0.
        temperature: ``ε``, in cosines; from 0.02 in float32.
        iterations: 0 leaves patches free of charge.

    Returns:
        ``(b, B)``.

    Raises:
        ConfigError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"matched_similarity: temperature is {temperature}, expected more than 0.")
    rows, places, width = patches.shape
    texts, length, _ = words.shape
    # One product of matrices for all pairs.
    products = (words / temperature).reshape(-1, width) @ patches.reshape(-1, width).T
    scores = products.view(texts, length, rows, places).permute(2, 0, 1, 3)  # (b, B, L, N)
    count = kept.sum(dim=1).to(scores.dtype)  # (B,)
    capacity = (count / places).clamp(min=1)
    total: Tensor = _Assignment.apply(scores, kept, capacity, iterations)  # type: ignore[no-untyped-call]
    total = total - count * torch.log(scores.new_tensor(float(places)))
    return temperature * total / count.clamp(min=1)


class _Assignment(torch.autograd.Function):
    """The dual in units of the temperature, without ``ln N``; its gradient is the plan.

    ``Σ_l ln Σ_p exp(x_lp − h_p) + capacity · Σ_p h_p`` of scores ``x`` ``(b, B, L, N)``, to ``(b, B)``.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: Tensor, capacity: Tensor, iterations: int) -> Tensor:
        tiny = torch.finfo(scores.dtype).tiny
        # The best patch of a word counts 1, so that no row underflows as a whole.
        best = scores.amax(dim=3)
        kernel = scores.contiguous() if not scores.is_contiguous() else scores.clone()
        kernel.sub_(best[..., None]).exp_().mul_(kept[:, :, None])
        free = scores.new_ones(len(kernel), kernel.shape[1], kernel.shape[3])  # exp(−h), (b, B, N)
        # Words and patches in turn, each set to what is best given the other.
        sums = _weighted(kernel, free, kept, tiny)
        for _ in range(iterations):
            demand = (sums.reciprocal()[:, :, None] @ kernel)[:, :, 0]
            free = (capacity[:, None] / demand.clamp(min=tiny)).clamp(min=tiny, max=1)
            sums = _weighted(kernel, free, kept, tiny)  # (b, B, L)
        ctx.save_for_backward(kernel, free, sums)
        paid = torch.where(kept, best + sums.log(), 0).sum(dim=2)
        return paid - capacity * free.log().sum(dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        kernel, free, sums = ctx.saved_tensors
        plan = kernel * free[:, :, None]
        return plan.mul_((gradients[0][:, :, None] / sums)[..., None]), None, None, None


def _weighted(kernel: Tensor, free: Tensor, kept: Tensor, tiny: float) -> Tensor:
    """Return the row sums of the kernel with prices, ``(b, B, L)``; 1 where there is no word."""
    return torch.where(kept, (kernel @ free[..., None])[..., 0].clamp(min=tiny), 1)


def _all_scores(pairs: TokenPairs, temperature: float, iterations: int, max_matrix_bytes: int) -> Tensor:
    """Return the similarities ``(b, B)`` of this rank's pictures with all texts, tile by tile."""
    patches, words, kept = pairs.patches, pairs.words, pairs.kept

    def scores(patches: Tensor, words: Tensor, kept: Tensor) -> Tensor:
        return matched_similarity(patches, words, kept, temperature=temperature, iterations=iterations)

    pair_bytes = max(1, words.shape[1] * patches.shape[1] * words.element_size() * MATRICES)
    fitting = max(1, max_matrix_bytes // pair_bytes)
    rows, columns = max(1, fitting // len(words)), min(fitting, len(words))
    if rows >= len(patches):
        return scores(patches, words, kept)
    return torch.cat(
        [
            torch.cat(
                [
                    checkpoint(scores, some, words[start : start + columns], kept[start : start + columns],
                               use_reentrant=False)
                    for start in range(0, len(words), columns)
                ],
                dim=1,
            )
            for some in torch.split(patches, rows)
        ]
    )  # fmt: skip


def hidden_word_loss(
    states: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    max_matrix_bytes: int = MAX_MATRIX_BYTES,
) -> Tensor:
    """Return the mean cross-entropy of hidden words over the words of all ranks (Devlin et al. 2019, §3.1).

    Ranks may have hidden different numbers of words, none included.

    Args:
        states: ``(n, D)`` what the network says at their places.
        ids: ``(n,)`` which they are.
        weight: ``(vocabulary, D)`` of the map to logits.
        bias: ``(vocabulary,)``.
        max_matrix_bytes: see the module.
    """
    count = states.new_tensor([float(len(ids))])
    world = 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        world = dist.get_world_size()
        dist.all_reduce(count)

    def row_loss(states: Tensor, ids: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(states, weight, bias), ids, reduction="sum")

    total = over_rows(row_loss, (states, ids), (weight, bias), max_matrix_bytes)
    return total * world / count[0].clamp(min=1)
