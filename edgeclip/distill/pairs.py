"""A batch of image-text pairs spread over ranks, and the gathering that lets every rank see all of it.

Contrastive losses compare each pair with every other one of the joint batch. A rank holds its own rows and
gathers the rest; gradients flow through the gathering, so that the average over ranks of the gradients
(which is what DistributedDataParallel takes) equals the gradient of one process with the joint batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from edgeclip.errors import InputError

__all__ = ["Pairs", "gather_rows"]


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all ranks, in rank order; backward sums what every rank sends to ours."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter on every platform: reduce everything, keep our rows.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, ``(B, …)`` from ``(b, …)``, in rank order; alone, the rows themselves.

    Every rank must hold the same number of rows.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


@dataclass(frozen=True)
class Pairs:
    """Embeddings of image-text pairs: this rank's rows, and everybody's.

    Attributes:
        image: ``(b, E)`` this rank's image embeddings, of unit length where a loss says so.
        text: ``(b, E)`` the texts that belong to them.
        all_image: ``(B, E)`` every rank's images, in rank order.
        all_text: ``(B, E)`` every rank's texts.
        offset: row of ``all_image`` where this rank's rows begin.
        ids: ``(b,)`` what each pair shows; pairs with the same id are no negatives of each other. ``None``:
            every pair is its own.
        all_ids: ``(B,)`` every rank's.
    """

    image: Tensor
    text: Tensor
    all_image: Tensor
    all_text: Tensor
    offset: int = 0
    ids: Tensor | None = None
    all_ids: Tensor | None = None

    @classmethod
    def gather(cls, image: Tensor, text: Tensor, *, ids: Tensor | None = None) -> Pairs:
        """Return the pairs of this rank with those of all ranks beside them.

        Raises:
            InputError: shapes that do not belong together.
        """
        if image.ndim != 2 or image.shape != text.shape:
            raise InputError(
                f"pairs: got image embeddings {tuple(image.shape)} and text embeddings {tuple(text.shape)}, "
                "expected two of the same shape (b, E)."
            )
        if ids is not None and ids.shape != image.shape[:1]:
            raise InputError(f"pairs: got ids {tuple(ids.shape)}, expected ({len(image)},).")
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return cls(
            image,
            text,
            gather_rows(image),
            gather_rows(text),
            offset=rank * len(image),
            ids=ids,
            all_ids=None if ids is None else gather_rows(ids),
        )

    def with_text(self, text: Tensor) -> Pairs:
        """Return the same pictures with other texts ``(b, E)``; only the texts are gathered."""
        return dataclasses.replace(self, text=text, all_text=gather_rows(text))

    def targets(self) -> Tensor:
        """Return what each row should match, ``(b, B)``; rows sum to 1.

        One where row and column are the same pair; where ids are given, shared equally by all columns with
        the row's id (Yang et al. 2022, "Unified Contrastive Learning").
        """
        dtype, device = self.image.dtype, self.image.device
        if self.ids is None or self.all_ids is None:
            own = torch.arange(len(self.image), device=device) + self.offset
            return torch.nn.functional.one_hot(own, len(self.all_image)).to(dtype)
        same = (self.ids[:, None] == self.all_ids[None, :]).to(dtype)
        return same / same.sum(dim=1, keepdim=True)
