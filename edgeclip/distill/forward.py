"""A batch through a model: pictures and captions to embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edgeclip.distill.batches import to_float

__all__ = ["embed"]


def embed(
    model: nn.Module,
    image: Tensor,
    tokens: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, ...]:
    """Return the embeddings of a batch, not normalized: the pictures', then each caption's.

    Args:
        model: has ``encode_image`` and ``encode_text``.
        image: ``(b, 3, H, W)`` uint8.
        tokens: ``(b, n, L)``.
        mean: of the model's preprocessing.
        std: likewise.

    Returns:
        ``1 + n`` tensors ``(b, E)``, float32.
    """
    pictures: Tensor = model.encode_image(to_float(image, mean=mean, std=std))  # type: ignore[operator]
    texts: Tensor = model.encode_text(tokens.flatten(0, 1))  # type: ignore[operator]
    each = texts.float().view(*tokens.shape[:2], -1)  # (b, n, E)
    return (pictures.float(), *each.unbind(1))
