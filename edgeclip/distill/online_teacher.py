"""A frozen model that runs beside the student, whatever library it is of.

It stays in eval mode whatever is done to what holds it: its batch norms must not learn from the student's
batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeclip.distill.batches import Batch, to_float
from edgeclip.distill.inputs import Consumer, Inputs, StoredViews, TextInput, ViewForm
from edgeclip.distill.objective import Embedded
from edgeclip.distill.recipe import DataSpec, StageSpec
from edgeclip.distill.samples import Samples

__all__ = ["OnlineTeacher"]


class OnlineTeacher(nn.Module):
    """A frozen model that runs beside the student.

    Args:
        name: as losses call it.
        model: has ``encode_image`` where there is a form, and ``encode_text`` where there is a tokenizer.
        form: how its views are made; ``None``: it sees no pictures.
        mean: per RGB channel, on pixels in [0, 1]; ``None``: it takes ``(b, 3, H, W)`` uint8 as it is.
        std: likewise.
        tokenizer: its own; ``None``: it reads no texts.
        embed_dim: width of its embeddings.
        scale: its own multiplier of cosines.
        parent: what the student's checkpoint records about it.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        form: ViewForm | None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tokenizer: TextInput | None,
        embed_dim: int,
        scale: float,
        parent: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.requires_grad_(False).eval()
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.consumer = Consumer(form, tokenizer)
        self.views: StoredViews | None = None
        self.scale = scale
        self.image_dim = None if form is None else embed_dim
        self.text_dim = None if tokenizer is None else embed_dim
        self.parent = dict(parent)

    def train(self, mode: bool = True) -> OnlineTeacher:
        """Stay in eval mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, image: Tensor | None, tokens: Tensor | None) -> Embedded:
        """Embed ``(b, 3, H, W)`` uint8 pictures and ``(b, n, L)`` ids; ``None`` where it lacks the tower."""
        pictures: Tensor | None = None
        texts: tuple[Tensor, ...] = ()
        if image is not None:
            if self.mean is not None and self.std is not None:
                image = to_float(image, mean=self.mean, std=self.std)
            pictures = self.model.encode_image(image).float()  # type: ignore[operator]
        if tokens is not None:
            rows: Tensor = self.model.encode_text(tokens.flatten(0, 1))  # type: ignore[operator]
            texts = rows.float().view(*tokens.shape[:2], -1).unbind(1)
        return Embedded(pictures, texts)

    def check(self, stage: StageSpec, table: DataSpec, samples: Samples) -> None:
        """Do nothing: it can be asked about any picture and text."""

    def ask(self, batch: Batch, inputs: Inputs, *, parts: int = 1) -> Embedded:
        """Return its embeddings of a batch, see :class:`edgeclip.distill.teachers.Teacher`."""
        sees, reads = self.consumer.form is not None, self.consumer.tokenizer is not None
        images = batch[inputs.image_name(self.consumer)].chunk(parts) if sees else [None] * parts
        tokens = batch[inputs.tokens_name(self.consumer)].chunk(parts) if reads else [None] * parts
        rows = [self(*part) for part in zip(images, tokens, strict=True)]
        return Embedded(
            torch.cat([row.image for row in rows]) if sees else None,
            tuple(torch.cat(column) for column in zip(*(row.texts for row in rows), strict=True)),
        )
