"""A batch through the student: pictures and captions to embeddings, and to tokens where a loss wants them.

Every tower runs once: tokens come out of the pass that gives the embedding. Words that are hidden are a pass
of their own, since they must not be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from edgeclip.distill.batches import Batch, to_float
from edgeclip.distill.hidden_words import HiddenWords, TokenShapes, hide, hiding_draws, word_places
from edgeclip.distill.recompute import held_statistics
from edgeclip.models.fastvit import FastViT
from edgeclip.models.text import BagTextTower
from edgeclip.models.text_transformer import TextTransformer
from edgeclip.models.vit import VisionTransformer
from edgeclip.tokenizer import SpecialIds

if TYPE_CHECKING:
    from edgeclip.models.clip import CLIP

__all__ = [
    "Embedded",
    "Tokens",
    "Wants",
    "Words",
    "embed",
    "embed_pixels",
    "embed_texts",
    "embedded_of",
    "token_shapes",
    "words_of",
]


@dataclass(frozen=True)
class Words:
    """What is known of a batch's words before the student sees them.

    Attributes:
        ids: ``(b, n, L)``.
        kept: ``(b, n, L)`` bool, which are words; ``None`` where no loss asks.
        hidden: ``(b, n, L)`` bool, which are hidden; ``None`` where no loss asks.
    """

    ids: Tensor
    kept: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """Patches and words of one batch through the student.

    Attributes:
        words: which they are.
        patches: ``(b, N, C)``.
        texts: one ``(b, L, D)`` for each caption.
        hidden: one ``(b, L, D)`` for each caption, of which some words were hidden.
    """

    words: Words
    patches: Tensor | None = None
    texts: tuple[Tensor, ...] = ()
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Embedded:
    """One batch through one model.

    Attributes:
        image: ``(b, E)``, not normalized; ``None`` of a teacher without an image tower.
        texts: one ``(b, E)`` for each caption of a picture; none of a teacher without a text tower.
        tokens: of the student, where a loss wants them.
    """

    image: Tensor | None
    texts: tuple[Tensor, ...]
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Wants:
    """What a stage's losses want besides embeddings.

    Attributes:
        tokens: patches and words.
        hidden: words behind hidden ones, by way of this network.
    """

    tokens: bool = False
    hidden: HiddenWords | None = field(default=None, repr=False)


EMBEDDINGS = Wants()
_LENGTHS = 4  # groups of texts of about one length


def token_shapes(model: CLIP) -> TokenShapes:
    """Return the widths of the tokens that the towers of a model can give beside the embedding."""
    image, text = model.image_tower, model.text_tower
    patch = image.projection.in_features if isinstance(image, VisionTransformer | FastViT) else 0
    if not isinstance(text, TextTransformer):
        return TokenShapes(patch)
    table = text.token_embedding
    return TokenShapes(
        patch,
        text.projection.in_features,
        table.embedding_dim,
        table.num_embeddings,
        len(text.transformer.layers),
    )


def words_of(batch: Batch, wants: Wants, special: SpecialIds, *, seed: int) -> Words:
    """Return what is known of a batch's words; what is hidden depends on seed, epoch and sample alone.

    Args:
        batch: with the student's ``tokens``.
        wants: of the losses.
        special: ids of the student's tokenizer.
        seed: of the order of samples.
    """
    ids = batch["tokens"]
    if not wants.tokens and wants.hidden is None:
        return Words(ids)
    kept, hidden = word_places(ids, special), None
    if wants.hidden is not None:
        shape = (ids.shape[1], ids.shape[2])
        draws = hiding_draws(shape, batch.index, seed=seed, epoch=batch.position.epoch)
        hidden = hide(kept, draws, wants.hidden.share)
    return Words(ids, kept, hidden)


def embed(
    model: nn.Module,
    image: Tensor,
    tokens: Tensor,
    hidden: Tensor | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    wants: Wants = EMBEDDINGS,
) -> tuple[Tensor, ...]:
    """Return the embeddings of a batch, not normalized: the pictures', then each caption's; then its tokens.

    Args:
        model: a :class:`CLIP`; has ``encode_image`` and ``encode_text`` where no tokens are wanted.
        image: ``(b, 3, H, W)`` uint8.
        tokens: ``(b, n, L)``.
        hidden: ``(b, n, L)`` bool, which words are hidden where ``wants`` says so.
        mean: of the model's preprocessing.
        std: likewise.
        wants: what else; its towers have it (:func:`token_shapes`).

    Returns:
        ``1 + n`` embeddings ``(b, E)``; with ``wants.tokens`` the patches ``(b, N, C)`` and the words of each
        caption ``(b, L, D)``; with ``wants.hidden`` those of each caption behind hidden words; float32.
    """
    return embed_pixels(model, to_float(image, mean=mean, std=std), tokens, hidden, wants=wants)


def embed_pixels(
    model: nn.Module,
    pixels: Tensor,
    tokens: Tensor,
    hidden: Tensor | None = None,
    *,
    wants: Wants = EMBEDDINGS,
) -> tuple[Tensor, ...]:
    """Return what :func:`embed` returns, of pixels ``(b, 3, H, W)`` that are scaled and normalized."""
    ids, shape = tokens.flatten(0, 1), tokens.shape[:2]
    if not wants.tokens and wants.hidden is None:
        pictures: Tensor = model.encode_image(pixels)  # type: ignore[operator]
        return (_wide(pictures), *embed_texts(model, tokens))
    image_tower = cast("VisionTransformer | FastViT", model.image_tower)
    text_tower = cast(TextTransformer, model.text_tower)
    pictures, patches = image_tower.forward_with_tokens(pixels)
    if wants.tokens:
        texts, words = text_tower.forward_with_tokens(ids)
        found = (_wide(pictures), *_each(texts, shape), _wide(patches), *_each(words, shape))
    else:
        found = (_wide(pictures), *_each(text_tower(ids), shape))
    if wants.hidden is None:
        return found
    assert hidden is not None
    network = wants.hidden
    seen = network.image_norm(patches).repeat_interleave(shape[1], dim=0)  # (b·n, N, C)
    # The statistics of batch norms are of texts that can be read.
    with held_statistics(text_tower):
        behind = text_tower.forward_hidden(
            ids,
            hidden=hidden.flatten(0, 1),
            instead=network.vector,
            after_layer=lambda layer, x: network.fused(layer, x, seen),
        )
    return (*found, *_each(behind, shape))


def embed_texts(model: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    """Return the embeddings ``(b, E)`` of each caption, not normalized, in float32.

    A bag of pieces leaves padding out exactly, so texts of about one length go together, without the columns
    that are padding in all of them: most rows are short.

    Args:
        model: has ``encode_text``.
        tokens: ``(b, n, L)``.
    """
    ids = tokens.flatten(0, 1)
    tower = getattr(model, "text_tower", None)
    encode = cast("Callable[[Tensor], Tensor]", model.encode_text)
    if not isinstance(tower, BagTextTower) or len(ids) < _LENGTHS:
        return _each(encode(ids), tokens.shape[:2])
    lengths = (ids != tower.config.pad_id).sum(dim=1)
    order = lengths.argsort(stable=True)
    rows = [
        encode(ids[some, : max(2, int(lengths[some].max()))])  # products of neighbours need two
        for some in order.tensor_split(_LENGTHS)
    ]
    return _each(torch.cat(rows)[order.argsort()], tokens.shape[:2])


def _each(rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return rows ``(b·n, …)`` caption by caption."""
    return _wide(rows).unflatten(0, shape).unbind(1)  # type: ignore[no-untyped-call,no-any-return]


def _wide(rows: Tensor) -> Tensor:
    """Return rows in float32 at least."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def embedded_of(found: Sequence[Tensor], words: Words, wants: Wants) -> Embedded:
    """Return what :func:`embed` has found by name.

    Args:
        found: of the whole batch.
        words: of it.
        wants: what was asked for.
    """
    captions = words.ids.shape[1]
    parts = iter(found)

    def each() -> tuple[Tensor, ...]:
        return tuple(next(parts) for _ in range(captions))

    image, texts = next(parts), each()
    if not wants.tokens and wants.hidden is None:
        return Embedded(image, texts)
    patches = next(parts) if wants.tokens else None
    said = each() if wants.tokens else ()
    return Embedded(image, texts, Tokens(words, patches, said, each() if wants.hidden is not None else ()))
