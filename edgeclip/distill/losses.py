"""Losses of contrastive training and distillation, one pure function a term.

All take unit embeddings as :class:`Pairs` (this rank's rows, everybody's columns) and return the mean over
this rank's rows, so that the average over ranks is the loss of the joint batch. ``scale`` is the multiplier
of cosines (``logit_scale.exp()``), never its logarithm.

Rows are taken in slices such that no matrix of similarities exceeds ``max_matrix_bytes``; with more than one
slice the matrix is computed again in the backward pass and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgeclip.distill.pairs import Pairs
from edgeclip.errors import ConfigError

__all__ = [
    "MAX_MATRIX_BYTES",
    "affinity_kl",
    "alignment",
    "decoupled_contrastive",
    "feature_cosine",
    "feature_mse",
    "feature_smooth_l1",
    "info_nce",
    "interactive_contrastive",
    "picture_match",
    "siglip",
    "uniformity",
]

MAX_MATRIX_BYTES = 256 << 20

_RowLoss = Callable[..., Tensor]


def info_nce(
    pairs: Pairs,
    scale: Tensor | float,
    *,
    softness: float = 0.0,
    spread: Literal["even", "similar"] = "even",
    max_matrix_bytes: int = MAX_MATRIX_BYTES,
) -> Tensor:
    """Return the symmetric cross-entropy of matching (Radford et al. 2021, figure 3).

    LightCLIP (Nie et al. 2023, arXiv 2312.00674) softens the labels of negatives progressively while it
    trains, since web captions also fit other pictures. Of the paper we know the abstract: how the softness is
    shared, how much of it there is and that it grows linearly are ours.

    Args:
        pairs: unit embeddings.
        scale: multiplier of cosines.
        softness: share of each row's target that its negatives get: 0 is CLIP.
        spread: how they share it: ``"even"``, or ``"similar"``: by the softmax of their own logits, taken as
            constants, so that those that look right to the model get most.
        max_matrix_bytes: see the module.
    """
    if not 0 <= softness < 1:
        raise ConfigError(f"info_nce: softness is {softness}, expected a share from 0 and below 1.")

    def row_loss(rows: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
        logits = scale * rows @ columns.T
        if spread == "similar":
            targets = _soften(targets, softness, logits.detach())
        return -(targets * logits.log_softmax(dim=1)).sum()

    targets = pairs.targets() if spread == "similar" else _soften(pairs.targets(), softness)
    both = over_rows(row_loss, (pairs.image, targets), (pairs.all_text,), max_matrix_bytes) + over_rows(
        row_loss, (pairs.text, targets), (pairs.all_image,), max_matrix_bytes
    )
    return both / (2 * len(pairs.image))


def _soften(targets: Tensor, softness: float, logits: Tensor | None = None) -> Tensor:
    """Move ``softness`` of each row from its positives to its negatives; rows without negatives stay.

    Negatives share it by the softmax of ``logits``, or evenly.
    """
    if softness == 0:
        return targets
    negative = targets == 0
    share = negative.any(dim=1, keepdim=True).to(targets.dtype) * softness
    said = torch.zeros_like(targets) if logits is None else logits
    # A row of nothing but positives has no softmax; its share is 0.
    weights = said.masked_fill(~negative, float("-inf")).softmax(dim=1).nan_to_num(0.0)
    return targets * (1 - share) + weights * share


def decoupled_contrastive(
    pairs: Pairs, scale: Tensor | float, *, max_matrix_bytes: int = MAX_MATRIX_BYTES
) -> Tensor:
    """Return InfoNCE without the positive in its own denominator (Yeh et al. 2022), symmetric.

    Rows need at least one negative; the gradient then does not fade as a positive gets easy, which lets
    small batches learn.
    """
    if len(pairs.all_image) < 2:
        raise ConfigError("decoupled_contrastive: a joint batch of 1 has no negatives; use 2 or more pairs.")

    def row_loss(rows: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
        logits = scale * rows @ columns.T
        negatives = logits.masked_fill(targets > 0, float("-inf"))
        return (negatives.logsumexp(dim=1) - (targets * logits).sum(dim=1)).sum()

    targets = pairs.targets()
    both = over_rows(row_loss, (pairs.image, targets), (pairs.all_text,), max_matrix_bytes) + over_rows(
        row_loss, (pairs.text, targets), (pairs.all_image,), max_matrix_bytes
    )
    return both / (2 * len(pairs.image))


def siglip(
    pairs: Pairs,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    max_matrix_bytes: int = MAX_MATRIX_BYTES,
) -> Tensor:
    """Return the pairwise sigmoid loss (Zhai et al. 2023): every pair of the batch is a yes or no.

    Args:
        pairs: unit embeddings.
        scale: multiplier of cosines.
        bias: added to every logit; starts at −10 in the paper.
        max_matrix_bytes: see the module.
    """

    def row_loss(rows: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
        signs = torch.where(targets > 0, 1.0, -1.0).to(rows.dtype)
        return -F.logsigmoid(signs * (scale * rows @ columns.T + bias)).sum()

    total = over_rows(row_loss, (pairs.image, pairs.targets()), (pairs.all_text,), max_matrix_bytes)
    return total / len(pairs.image)


def affinity_kl(
    student: Pairs,
    teachers: Sequence[Pairs],
    *,
    scale: Tensor | float,
    teacher_scales: Sequence[float],
    teacher_weights: Sequence[float] | None = None,
    max_matrix_bytes: int = MAX_MATRIX_BYTES,
) -> Tensor:
    """Return how far the student's affinities are from the teachers', as a mean Kullback-Leibler divergence.

    ``½ Σ_k w_k [KL(S_k(image, text) ‖ S(image, text)) + KL(S_k(text, image) ‖ S(text, image))]`` with ``S``
    the row-wise softmax of scaled cosines. With equal weights this is MobileCLIP's distillation loss (Vasu
    et al. 2024) and, for one teacher, CLIP-KD's contrastive relational distillation (Yang et al. 2024) and,
    up to the teacher's entropy, which has no gradient, TinyCLIP's affinity mimicking (Wu et al. 2023).

    Args:
        student: unit embeddings of the student.
        teachers: unit embeddings of each teacher, of the same pairs; their widths may differ.
        scale: the student's multiplier of cosines.
        teacher_scales: each teacher's own.
        teacher_weights: share of each teacher; equal if not given.
        max_matrix_bytes: see the module.

    Raises:
        ConfigError: no teacher, or scales and weights of another number.
    """
    weights = _teacher_weights(teachers, teacher_scales, teacher_weights)

    def row_loss(rows: Tensor, *others: Tensor) -> Tensor:
        columns = others[len(teachers)]
        target = torch.zeros((), dtype=rows.dtype, device=rows.device)
        negative_entropy = torch.zeros((), dtype=rows.dtype, device=rows.device)
        for index, (teacher_scale, weight) in enumerate(zip(teacher_scales, weights, strict=True)):
            said = (teacher_scale * others[index] @ others[len(teachers) + 1 + index].T).log_softmax(dim=1)
            target = target + weight * said.exp()
            negative_entropy = negative_entropy + weight * (said.exp() * said).sum()
        return negative_entropy - (target * (scale * rows @ columns.T).log_softmax(dim=1)).sum()

    both = over_rows(
        row_loss,
        (student.image, *(teacher.image.detach() for teacher in teachers)),
        (student.all_text, *(teacher.all_text.detach() for teacher in teachers)),
        max_matrix_bytes,
    ) + over_rows(
        row_loss,
        (student.text, *(teacher.text.detach() for teacher in teachers)),
        (student.all_image, *(teacher.all_image.detach() for teacher in teachers)),
        max_matrix_bytes,
    )
    return both / (2 * len(student.image))


def _teacher_weights(
    teachers: Sequence[Pairs], scales: Sequence[float], weights: Sequence[float] | None
) -> list[float]:
    if not teachers or len(scales) != len(teachers) or (weights and len(weights) != len(teachers)):
        raise ConfigError(
            f"affinity_kl: got {len(teachers)} teachers, {len(scales)} scales and "
            f"{'equal' if weights is None else len(weights)} weights; expected one of each a teacher."
        )
    said = [1.0] * len(teachers) if weights is None else list(weights)
    if min(said) < 0 or sum(said) <= 0:
        raise ConfigError(f"affinity_kl: teacher weights are {said}, expected shares of 0 or more.")
    return [weight / sum(said) for weight in said]


def interactive_contrastive(
    student: Pairs,
    teacher: Pairs,
    scale: Tensor | float,
    *,
    max_matrix_bytes: int = MAX_MATRIX_BYTES,
) -> Tensor:
    """Return InfoNCE of each of the student's towers against the teacher's other one.

    Interactive contrastive learning (Yang et al. 2024, "CLIP-KD"): the student's pictures must find
    the teacher's texts, its texts the teacher's pictures. Widths must agree: use an adapter where they do
    not. ``scale`` is a multiplier here; the published code passes the logarithm unexponentiated.
    """
    if student.image.shape != teacher.image.shape:
        raise ConfigError(
            f"interactive_contrastive: student embeddings are {tuple(student.image.shape)}, the teacher's "
            f"{tuple(teacher.image.shape)}; adapt one to the other's width first."
        )
    crossed_images = Pairs(
        student.image,
        student.text,
        teacher.all_image.detach(),
        teacher.all_text.detach(),
        offset=student.offset,
        ids=student.ids,
        all_ids=student.all_ids,
    )
    return info_nce(crossed_images, scale, max_matrix_bytes=max_matrix_bytes)


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of ``(b, D)`` embeddings (CLIP-KD's FD) over all elements.

    Averaging over the elements makes the term small (unit vectors differ by at most 4/D): CLIP-KD weights it
    by 2,000.
    """
    _same_shape("feature_mse", student, teacher)
    return F.mse_loss(student, teacher.detach())


def feature_smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Return the Huber-like mean difference of ``(b, D)`` features (DC-CLIP, stage 1).

    Args:
        student: features, through an adapter where the widths differ.
        teacher: what they should be.
        beta: below this difference the loss is quadratic.
    """
    _same_shape("feature_smooth_l1", student, teacher)
    return F.smooth_l1_loss(student, teacher.detach(), beta=beta)


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of one less the cosine of ``(b, D)`` unit embeddings."""
    _same_shape("feature_cosine", student, teacher)
    return 1 - (student * teacher.detach()).sum(dim=1).mean()


def picture_match(student: Tensor, teacher: Tensor, pictures: Tensor, *, scale: float) -> Tensor:
    """Return how far texts are from being as similar to some pictures as the teacher says.

    The mean Kullback-Leibler divergence of ``softmax(scale · text · pictures)`` from the teacher's: one
    direction of :func:`affinity_kl`, with pictures that stand still and need not belong to the texts.

    Args:
        student: ``(b, D)`` unit embeddings of texts.
        teacher: what they should be, ``(b, D)``.
        pictures: ``(k, D)`` unit embeddings.
        scale: multiplier of cosines.
    """
    _same_shape("picture_match", student, teacher)
    said = (scale * student @ pictures.T).log_softmax(dim=1)
    wanted = (scale * teacher.detach() @ pictures.T).log_softmax(dim=1)
    return F.kl_div(said, wanted, reduction="batchmean", log_target=True)


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean squared distance of unit rows that belong together (Wang & Isola 2020, α = 2)."""
    _same_shape("alignment", first, second)
    return (first - second).square().sum(dim=1).mean()


def uniformity(rows: Tensor, *, t: float = 2.0, max_matrix_bytes: int = MAX_MATRIX_BYTES) -> Tensor:
    """Return the logarithm of the mean Gaussian potential of unit rows (Wang & Isola 2020).

    0 where all coincide, about −2t where they are spread evenly over a sphere of many dimensions. The batch
    is this rank's: gather first for the joint one.
    """
    if len(rows) < 2:
        raise ConfigError(f"uniformity: got {len(rows)} rows, expected 2 or more.")
    squares = rows.square().sum(dim=1)
    places = torch.arange(len(rows), device=rows.device)

    def potentials(some: Tensor, own: Tensor, place: Tensor) -> Tensor:
        exponents = -t * (own[:, None] + squares - 2 * some @ rows.T)
        return exponents.masked_fill(place[:, None] == places, float("-inf")).logsumexp(dim=1)

    size = max(1, max_matrix_bytes // (len(rows) * rows.element_size()))
    if size >= len(rows):
        of_rows = potentials(rows, squares, places)
    else:
        slices = zip(*(torch.split(each, size) for each in (rows, squares, places)), strict=True)
        of_rows = torch.cat([checkpoint(potentials, *each, use_reentrant=False) for each in slices])
    return of_rows.logsumexp(dim=0) - math.log(len(rows) * (len(rows) - 1))


def _same_shape(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ConfigError(
            f"{what}: got shapes {tuple(student.shape)} and {tuple(teacher.shape)}, expected the same; "
            "put an adapter between them."
        )


def over_rows(
    row_loss: _RowLoss, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...], max_matrix_bytes: int
) -> Tensor:
    """Return the sum of ``row_loss`` over slices of ``rows`` small enough for ``max_matrix_bytes``."""
    row_bytes = len(columns[0]) * columns[0].element_size() * len(columns)
    size = max(1, max_matrix_bytes // max(1, row_bytes))
    if size >= len(rows[0]):
        return row_loss(*rows, *columns)
    total = torch.zeros((), dtype=rows[0].dtype, device=rows[0].device)
    for start in range(0, len(rows[0]), size):
        slices = [part[start : start + size] for part in rows]
        said: Tensor = checkpoint(row_loss, *slices, *columns, use_reentrant=False)
        total = total + said
    return total
