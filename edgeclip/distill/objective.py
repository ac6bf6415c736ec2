"""What a stage minimises: the recipe's loss terms, with the parameters that only training needs.

Adapters between widths and SigLIP's bias live here and not in the model: they are stored with the optimizer's
state and never exported. Embeddings come in as this rank's rows; gathering happens here, once a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.distill import losses
from edgeclip.distill.pairs import Pairs
from edgeclip.distill.recipe import (
    AffinityLoss,
    DecoupledLoss,
    FeatureLoss,
    InfoNCELoss,
    InteractiveLoss,
    LossSpec,
    SigLIPLoss,
    StageSpec,
    TeacherSpec,
)
from edgeclip.errors import ConfigError

__all__ = ["Embedded", "Objective"]


@dataclass(frozen=True)
class Embedded:
    """One batch through one model.

    Attributes:
        image: ``(b, E)``, not normalized.
        texts: one ``(b, E)`` for each caption of a picture.
    """

    image: Tensor
    texts: tuple[Tensor, ...]


class Objective(nn.Module):
    """The loss of one stage.

    Args:
        stage: whose loss terms.
        embed_dim: width of the student's embedding.
        teachers: the recipe's teachers by name.
        teacher_dims: width of each teacher's embedding.

    Raises:
        ConfigError: a term compares embeddings of different widths without an adapter.
    """

    def __init__(
        self,
        stage: StageSpec,
        *,
        embed_dim: int,
        teachers: Mapping[str, TeacherSpec],
        teacher_dims: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.stage = stage
        self._teachers = dict(teachers)
        self.adapters = nn.ModuleDict()
        self.biases = nn.ParameterDict()
        for index, spec in enumerate(stage.loss):
            if isinstance(spec, SigLIPLoss):
                self.biases[str(index)] = nn.Parameter(torch.tensor(float(spec.bias_init)))
            if isinstance(spec, FeatureLoss) and teacher_dims[spec.teacher] != embed_dim:
                for tower in _towers(spec):
                    self.adapters[f"{index}-{tower}"] = nn.Linear(embed_dim, teacher_dims[spec.teacher])
            if isinstance(spec, InteractiveLoss) and teacher_dims[spec.teacher] != embed_dim:
                raise ConfigError(
                    f"stage {stage.name!r}: the loss 'interactive' compares embeddings of {embed_dim} "
                    f"dimensions with {teacher_dims[spec.teacher]} of the teacher {spec.teacher!r}; "
                    "they must be as wide."
                )

    @property
    def needed_teachers(self) -> tuple[str, ...]:
        """Names of the teachers some term asks for, in the order of the recipe."""
        asked: set[str] = set()
        for spec in self.stage.loss:
            if isinstance(spec, AffinityLoss):
                asked.update(spec.teachers)
            elif isinstance(spec, InteractiveLoss | FeatureLoss):
                asked.add(spec.teacher)
        return tuple(name for name in self._teachers if name in asked)

    def forward(
        self,
        student: Embedded,
        teachers: Mapping[str, Embedded],
        *,
        scale: Tensor,
        progress: float,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts.

        Terms over pairs are summed over the captions of a picture, as MobileCLIP sums real and synthetic
        (Vasu et al. 2024).

        Args:
            student: this rank's embeddings.
            teachers: each needed teacher's, of the same batch.
            scale: the student's multiplier of cosines.
            progress: share of the stage that is done, from 0 to 1.
            ids: ``(b,)`` what each pair shows, see :class:`Pairs`.

        Returns:
            the total, and every term unweighted under ``"<index>-<kind>"``, detached.
        """
        total = student.image.new_zeros(())
        parts: dict[str, Tensor] = {}
        views = _pairs(student, ids)
        told = {name: _pairs(embedded, ids) for name, embedded in teachers.items()}
        for index, spec in enumerate(self.stage.loss):
            if isinstance(spec, FeatureLoss):
                value = self._features(index, spec, student, teachers[spec.teacher])
            else:
                value = torch.stack(
                    [
                        self._of_pairs(
                            index,
                            spec,
                            pairs,
                            {name: others[view] for name, others in told.items()},
                            scale=scale,
                            progress=progress,
                        )
                        for view, pairs in enumerate(views)
                    ]
                ).sum()
            total = total + spec.weight * value
            parts[f"{index}-{_kind(spec)}"] = value.detach()
        return total, parts

    def _of_pairs(
        self,
        index: int,
        spec: LossSpec,
        pairs: Pairs,
        told: Mapping[str, Pairs],
        *,
        scale: Tensor,
        progress: float,
    ) -> Tensor:
        """Return one term over the pairs of one caption."""
        match spec:
            case InfoNCELoss(softness=(first, last)):
                return losses.info_nce(pairs, scale, softness=first + (last - first) * progress)
            case DecoupledLoss():
                return losses.decoupled_contrastive(pairs, scale)
            case SigLIPLoss():
                return losses.siglip(pairs, scale, self.biases[str(index)])
            case AffinityLoss():
                return losses.affinity_kl(
                    pairs,
                    [told[name] for name in spec.teachers],
                    scale=scale,
                    teacher_scales=[self._teachers[name].scale for name in spec.teachers],
                    teacher_weights=spec.teacher_weights,
                )
            case InteractiveLoss():
                return losses.interactive_contrastive(pairs, told[spec.teacher], scale)
            case _:
                raise AssertionError(spec)

    def _features(self, index: int, spec: FeatureLoss, student: Embedded, teacher: Embedded) -> Tensor:
        terms = []
        for tower in _towers(spec):
            ours = [student.image] if tower == "image" else list(student.texts)
            theirs = [teacher.image] if tower == "image" else list(teacher.texts)
            key = f"{index}-{tower}"
            for mine, other in zip(ours, theirs, strict=True):
                adapted = self.adapters[key](mine) if key in self.adapters else mine
                if spec.distance == "mse":
                    adapted, wanted = F.normalize(adapted, dim=-1), F.normalize(other, dim=-1)
                    terms.append(losses.feature_mse(adapted, wanted) / len(ours))
                else:
                    terms.append(losses.feature_smooth_l1(adapted, other, beta=spec.beta) / len(ours))
        return torch.stack(terms).sum()


def _towers(spec: FeatureLoss) -> tuple[str, ...]:
    return ("image", "text") if spec.tower == "both" else (spec.tower,)


def _kind(spec: LossSpec) -> str:
    tag = type(spec).__struct_config__.tag
    return str(tag)


def _pairs(embedded: Embedded, ids: Tensor | None) -> list[Pairs]:
    """Return unit pairs, one for each caption; pictures are gathered once."""
    first = Pairs.gather(F.normalize(embedded.image, dim=-1), F.normalize(embedded.texts[0], dim=-1), ids=ids)
    return [first, *(first.with_text(F.normalize(text, dim=-1)) for text in embedded.texts[1:])]
