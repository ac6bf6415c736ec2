"""What a stage minimises: the recipe's loss terms, with the parameters that only training needs.

Adapters between widths, SigLIP's bias and what losses over tokens learn live here and not in the model: they
are stored with the optimizer's state and never exported. Embeddings come in as this rank's rows; gathering
happens here, once a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.distill import losses
from edgeclip.distill.forward import Embedded, Tokens, Wants
from edgeclip.distill.hidden_words import HiddenWords, TokenShapes
from edgeclip.distill.pairs import Pairs
from edgeclip.distill.recipe import (
    AffinityLoss,
    AlignmentUniformityLoss,
    DecoupledLoss,
    FeatureLoss,
    InfoNCELoss,
    InteractiveLoss,
    LossSpec,
    MaskedTokensLoss,
    PictureMatchLoss,
    SigLIPLoss,
    StageSpec,
    TokenAlignmentLoss,
)
from edgeclip.distill.token_losses import TokenPairs, token_alignment
from edgeclip.errors import ConfigError

__all__ = ["Embedded", "Objective"]

NO_TOKENS = TokenShapes()


class Objective(nn.Module):
    """The loss of one stage.

    Args:
        stage: whose loss terms.
        embed_dim: width of the student's embedding.
        teacher_scales: each teacher's own multiplier of cosines by name, in the order of the recipe.
        teacher_dims: widths of each teacher's image and text embeddings; ``None`` for a tower it lacks.
        tokens: what the student's towers give beside embeddings.

    Raises:
        ConfigError: a term asks a teacher for a tower that it lacks, or the student for tokens.
    """

    def __init__(
        self,
        stage: StageSpec,
        *,
        embed_dim: int,
        teacher_scales: Mapping[str, float],
        teacher_dims: Mapping[str, tuple[int | None, int | None]],
        tokens: TokenShapes = NO_TOKENS,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.teacher_scales = dict(teacher_scales)
        self.adapters = nn.ModuleDict()
        self.biases = nn.ParameterDict()
        self.token_heads = nn.ModuleDict()
        self.hidden_words: HiddenWords | None = None
        self._in_pairs = dict.fromkeys(
            name
            for spec in stage.loss
            if not isinstance(spec, FeatureLoss | PictureMatchLoss)
            for name, _ in _asked(spec)
        )
        for index, spec in enumerate(stage.loss):
            if isinstance(spec, SigLIPLoss):
                self.biases[str(index)] = nn.Parameter(torch.tensor(float(spec.bias_init)))
            if isinstance(spec, TokenAlignmentLoss | MaskedTokensLoss):
                _check_tokens(stage, spec, tokens)
            if isinstance(spec, TokenAlignmentLoss):
                for tower, own in (("image", tokens.image), ("text", tokens.text)):
                    head = nn.Linear(own, spec.width or embed_dim, bias=False)
                    self.token_heads[f"{index}-{tower}"] = head
            if isinstance(spec, MaskedTokensLoss):
                self.hidden_words = HiddenWords(tokens, share=spec.share, fusions=spec.fusions)
            for teacher, towers in _asked(spec):
                for tower in towers:
                    width = teacher_dims[teacher][_TOWERS.index(tower)]
                    if width is None:
                        raise ConfigError(
                            f"stage {stage.name!r}: the loss {_kind(spec)!r} asks for {tower} embeddings, "
                            f"but the teacher {teacher!r} has no {tower} tower; use kind = 'feature' with "
                            "the tower it has, or another teacher."
                        )
                    if isinstance(spec, PictureMatchLoss) and width != embed_dim:
                        raise ConfigError(
                            f"stage {stage.name!r}: the loss 'picture-match' compares both with the same "
                            f"pictures, but the teacher {teacher!r} embeds into {width} dimensions, the "
                            f"student into {embed_dim}."
                        )
                    key = self._adapter(teacher, tower)
                    if (
                        isinstance(spec, FeatureLoss | InteractiveLoss)
                        and width != embed_dim
                        and key not in self.adapters
                    ):
                        self.adapters[key] = nn.Linear(embed_dim, width)

    @property
    def wants(self) -> Wants:
        """What the terms want of the student besides embeddings."""
        return Wants(
            tokens=any(isinstance(spec, TokenAlignmentLoss) for spec in self.stage.loss),
            hidden=self.hidden_words,
        )

    @property
    def needed_teachers(self) -> tuple[str, ...]:
        """Names of the teachers some term asks for, in the order of the recipe."""
        asked = {teacher for spec in self.stage.loss for teacher, _ in _asked(spec)}
        return tuple(name for name in self.teacher_scales if name in asked)

    def forward(
        self,
        student: Embedded,
        teachers: Mapping[str, Embedded],
        *,
        scale: Tensor,
        progress: float,
        ids: Tensor | None = None,
        pictures: Tensor | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts.

        Terms over pairs are summed over the captions of a picture, as MobileCLIP sums real and synthetic
        (Vasu et al. 2024).

        Args:
            student: this rank's embeddings, with the tokens that :attr:`wants` names.
            teachers: each needed teacher's, of the same batch.
            scale: the student's multiplier of cosines.
            progress: share of the stage that is done, from 0 to 1.
            ids: ``(b,)`` what each pair shows, see :class:`Pairs`.
            pictures: ``(N, E)`` unit embeddings that ``picture-match`` draws from.
            rng: of these draws; the same on every rank.

        Returns:
            the total, and every term unweighted under ``"<index>-<kind>"``, detached.
        """
        total = student.texts[0].new_zeros(())
        parts: dict[str, Tensor] = {}
        views = [] if student.image is None else _pairs(student, ids)
        told = {name: _pairs(teachers[name], ids) for name in self._in_pairs}
        for index, spec in enumerate(self.stage.loss):
            if isinstance(spec, FeatureLoss):
                value = self._features(spec, student, teachers[spec.teacher])
            elif isinstance(spec, PictureMatchLoss):
                value = self._picture_match(spec, student, teachers[spec.teacher], pictures, rng)
            elif isinstance(spec, TokenAlignmentLoss):
                value = self._token_alignment(index, spec, student.tokens, views, scale)
            elif isinstance(spec, MaskedTokensLoss):
                value = self._hidden_words(student.tokens)
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
                softness = first + (last - first) * progress
                return losses.info_nce(pairs, scale, softness=softness, spread=spec.spread)
            case DecoupledLoss():
                return losses.decoupled_contrastive(pairs, scale)
            case SigLIPLoss():
                return losses.siglip(pairs, scale, self.biases[str(index)])
            case AffinityLoss():
                return losses.affinity_kl(
                    pairs,
                    [told[name] for name in spec.teachers],
                    scale=scale,
                    teacher_scales=[self.teacher_scales[name] for name in spec.teachers],
                    teacher_weights=spec.teacher_weights,
                )
            case InteractiveLoss():
                adapted = replace(
                    pairs,
                    image=F.normalize(self._adapted(spec.teacher, "image", pairs.image), dim=-1),
                    text=F.normalize(self._adapted(spec.teacher, "text", pairs.text), dim=-1),
                )
                return losses.interactive_contrastive(adapted, told[spec.teacher], scale)
            case AlignmentUniformityLoss():
                # The rows of all ranks: the logarithm of a mean is no mean of logarithms.
                spread = (
                    losses.uniformity(pairs.all_image, t=spec.t) + losses.uniformity(pairs.all_text, t=spec.t)
                ) / 2
                return spec.alignment * losses.alignment(pairs.image, pairs.text) + spec.uniformity * spread
            case _:
                raise AssertionError(spec)

    def _token_alignment(
        self,
        index: int,
        spec: TokenAlignmentLoss,
        tokens: Tokens | None,
        views: Sequence[Pairs],
        scale: Tensor,
    ) -> Tensor:
        """Return the term, summed over captions as terms over pairs are."""
        assert tokens is not None
        assert tokens.patches is not None
        assert tokens.words.kept is not None
        patches = F.normalize(self.token_heads[f"{index}-image"](tokens.patches), dim=-1)
        terms = []
        for words, kept, pairs in zip(tokens.texts, tokens.words.kept.unbind(1), views, strict=True):
            words = F.normalize(self.token_heads[f"{index}-text"](words), dim=-1)
            terms.append(
                token_alignment(
                    TokenPairs.gather(patches, words, kept, pairs=pairs),
                    scale.detach(),  # the model's scale belongs to its embeddings
                    temperature=spec.temperature,
                    iterations=spec.iterations,
                )
            )
        return torch.stack(terms).sum()

    def _hidden_words(self, tokens: Tokens | None) -> Tensor:
        """Return the mean over the hidden words of all captions."""
        assert tokens is not None
        assert tokens.words.hidden is not None
        assert self.hidden_words is not None
        states = torch.stack(tokens.hidden, dim=1)  # (b, n, L, D)
        hidden = tokens.words.hidden
        return self.hidden_words.loss(states[hidden], tokens.words.ids[hidden].long())

    def _features(self, spec: FeatureLoss, student: Embedded, teacher: Embedded) -> Tensor:
        terms = []
        for tower in _towers(spec):
            ours, theirs = _rows(student, tower), _rows(teacher, tower)
            for mine, other in zip(ours, theirs, strict=True):
                adapted = self._adapted(spec.teacher, tower, mine)
                if spec.distance == "smooth-l1":
                    terms.append(losses.feature_smooth_l1(adapted, other, beta=spec.beta) / len(ours))
                else:
                    distance = losses.feature_mse if spec.distance == "mse" else losses.feature_cosine
                    adapted, wanted = F.normalize(adapted, dim=-1), F.normalize(other, dim=-1)
                    terms.append(distance(adapted, wanted) / len(ours))
        return torch.stack(terms).sum()

    def _picture_match(
        self,
        spec: PictureMatchLoss,
        student: Embedded,
        teacher: Embedded,
        pictures: Tensor | None,
        rng: np.random.Generator | None,
    ) -> Tensor:
        assert pictures is not None
        assert rng is not None
        drawn = (rng.random(spec.pictures) * len(pictures)).astype(np.int64)
        some = pictures[torch.from_numpy(drawn).to(pictures.device)]
        terms = [
            losses.picture_match(
                F.normalize(mine, dim=-1), F.normalize(other, dim=-1), some, scale=spec.scale
            )
            for mine, other in zip(student.texts, teacher.texts, strict=True)
        ]
        return torch.stack(terms).mean()

    def _adapted(self, teacher: str, tower: str, rows: Tensor) -> Tensor:
        """Return the student's rows as wide as the teacher's."""
        key = self._adapter(teacher, tower)
        return self.adapters[key](rows) if key in self.adapters else rows

    def _adapter(self, teacher: str, tower: str) -> str:
        """Return the name of an adapter, which all terms about a teacher's tower share."""
        return f"{list(self.teacher_scales).index(teacher)}-{tower}"  # names of modules have no dots


_TOWERS = ("image", "text")


def _check_tokens(stage: StageSpec, spec: TokenAlignmentLoss | MaskedTokensLoss, tokens: TokenShapes) -> None:
    for tower, width, kinds in (
        ("image", tokens.image, "a ViT or a FastViT"),
        ("text", tokens.text, "a transformer"),
    ):
        if not width:
            raise ConfigError(
                f"stage {stage.name!r}: the loss {_kind(spec)!r} needs tokens of the student's {tower} "
                f"tower, which gives none; expected {kinds}."
            )


def _towers(spec: FeatureLoss) -> tuple[str, ...]:
    return _TOWERS if spec.tower == "both" else (spec.tower,)


def _rows(embedded: Embedded, tower: str) -> list[Tensor]:
    if tower == "text":
        return list(embedded.texts)
    assert embedded.image is not None
    return [embedded.image]


def _asked(spec: LossSpec) -> list[tuple[str, tuple[str, ...]]]:
    """Return the teachers that a term asks, and for the embeddings of which towers."""
    match spec:
        case AffinityLoss():
            return [(name, _TOWERS) for name in spec.teachers]
        case InteractiveLoss():
            return [(spec.teacher, _TOWERS)]
        case FeatureLoss():
            return [(spec.teacher, _towers(spec))]
        case PictureMatchLoss():
            return [(spec.teacher, ("text",))]
        case _:
            return []


def _kind(spec: LossSpec) -> str:
    tag = type(spec).__struct_config__.tag
    return str(tag)


def _pairs(embedded: Embedded, ids: Tensor | None) -> list[Pairs]:
    """Return unit pairs, one for each caption; pictures are gathered once."""
    assert embedded.image is not None
    first = Pairs.gather(F.normalize(embedded.image, dim=-1), F.normalize(embedded.texts[0], dim=-1), ids=ids)
    return [first, *(first.with_text(F.normalize(text, dim=-1)) for text in embedded.texts[1:])]
