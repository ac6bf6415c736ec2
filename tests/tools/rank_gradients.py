"""Gradients of every loss on one joint batch, in float64: by one process, or by those that torchrun started.

    python tests/tools/rank_gradients.py OUT.safetensors
    python -m torch.distributed.run --nproc-per-node 2 tests/tools/rank_gradients.py OUT.safetensors

Each rank takes its rows of the batch, and gradients are averaged as the trainer averages them. The first rank
writes them as ``<tower>/<case>/<parameter>``, and the loss as ``<tower>/<case>/loss``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeclip.distill.accumulate import backward_in_parts
from edgeclip.distill.forward import Embedded, Words, embed_pixels, embedded_of, token_shapes
from edgeclip.distill.objective import Objective
from edgeclip.distill.ranks import Ranks, ranks
from edgeclip.distill.recipe import (
    AffinityLoss,
    AlignmentUniformityLoss,
    DecoupledLoss,
    FeatureLoss,
    InfoNCELoss,
    InteractiveLoss,
    LossSpec,
    MaskedTokensLoss,
    SigLIPLoss,
    StageSpec,
    TokenAlignmentLoss,
)
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import CLIPConfig, FastViTConfig, ImageConfig, TextTransformerConfig, ViTConfig

BATCH, EMBED, CAPTIONS, SIDE_PX = 8, 16, 2, 32
# One as wide as the student, two that need an adapter.
TEACHERS = {"same": 16, "wide": 24, "narrow": 8}
SCALES = {"same": 20.0, "wide": 50.0, "narrow": 10.0}
IDS = (0, 1, 2, 3, 1, 5, 2, 7)  # some pictures twice, on both ranks

TOWERS: dict[str, ImageConfig] = {
    "vit": ViTConfig(
        width=24, heads=(2, 2), hidden_dims=(48, 48), head_dim=12, patch_px=8, grid=(4, 4), embed_dim=EMBED
    ),
    "mci": FastViTConfig(
        dims=(8, 16),
        depths=(1, 1),
        mixers=("repmixer", "attention"),
        head_dim=8,
        embed_dim=EMBED,
        layer_scale_init=0.3,
    ),
}
TEXT = TextTransformerConfig(
    vocab_size=60, context_length=8, width=24, heads=(2,), hidden_dims=(48,), head_dim=12, embed_dim=EMBED
)

CASES: dict[str, tuple[LossSpec, ...]] = {
    "info-nce": (InfoNCELoss(),),
    "softened": (InfoNCELoss(softness=(0.1, 0.5)),),
    "decoupled": (DecoupledLoss(),),
    "siglip": (SigLIPLoss(bias_init=-2.0),),
    "affinity": (AffinityLoss(teachers=("same",)),),
    "affinity of three": (AffinityLoss(teachers=tuple(TEACHERS), teacher_weights=(1.0, 2.0, 0.5)),),
    "interactive": (InteractiveLoss(teacher="same"), InteractiveLoss(teacher="wide", weight=0.5)),
    "feature": (
        FeatureLoss(teacher="narrow", weight=3.0),
        FeatureLoss(teacher="wide", tower="image", distance="smooth-l1", beta=0.1),
    ),
    "all": (
        InfoNCELoss(weight=0.7),
        SigLIPLoss(weight=0.1),
        AffinityLoss(teachers=("same", "wide")),
        InteractiveLoss(teacher="narrow"),
        FeatureLoss(teacher="narrow"),
    ),
    "softened by similarity": (InfoNCELoss(softness=(0.1, 0.5), spread="similar"),),
    "alignment-uniformity": (AlignmentUniformityLoss(),),
    "token-alignment": (TokenAlignmentLoss(width=12),),
    "masked-tokens": (MaskedTokensLoss(),),
    "lightclip": (InfoNCELoss(softness=(0.0, 0.1)), TokenAlignmentLoss(), MaskedTokensLoss(weight=0.3)),
}
# Cases with the ids of the pictures, and some in micro-batches.
WITH_IDS = ("info-nce", "softened", "decoupled", "siglip", "all", "token-alignment")
IN_PARTS = ("all", "lightclip")


def build(tower: str) -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(name="tiny", image_size_px=(SIDE_PX, SIDE_PX), image=TOWERS[tower], text=TEXT)
    model = build_clip(config).double().train()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # frozen, at statistics that a trained one could have
            module.eval()
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("se.reduce.bias"):  # its ReLU would be shut for all
            nn.init.constant_(parameter, 0.5)
    return model


def objective_of(terms: tuple[LossSpec, ...], model: CLIP) -> Objective:
    torch.manual_seed(2)
    stage = StageSpec(name="s", data="d", samples=BATCH, batch_size=BATCH, loss=terms)
    made = Objective(
        stage,
        embed_dim=EMBED,
        teacher_scales=SCALES,
        teacher_dims={name: (width, width) for name, width in TEACHERS.items()},
        tokens=token_shapes(model),
    ).double()
    for name, parameter in made.named_parameters():
        if ".out." in name:  # nothing at first: nothing before it would have a gradient
            nn.init.normal_(parameter, std=0.3)
    return made


def gradients(
    tower: str, terms: tuple[LossSpec, ...], here: Ranks, *, ids: bool, parts: int
) -> dict[str, Tensor]:
    """Return the averaged gradients by the name of their parameter, and the loss."""
    model = build(tower)
    objective = objective_of(terms, model)
    generator = torch.Generator().manual_seed(3)
    share = BATCH // here.world
    mine = slice(here.rank * share, (here.rank + 1) * share)
    pictures = torch.randn(BATCH, 3, SIDE_PX, SIDE_PX, dtype=torch.float64, generator=generator)[mine]
    tokens = torch.randint(1, 59, (BATCH, CAPTIONS, TEXT.context_length), generator=generator)[mine]
    told = {}
    for name, width in TEACHERS.items():
        rows = torch.randn(1 + CAPTIONS, BATCH, width, dtype=torch.float64, generator=generator)[:, mine]
        told[name] = Embedded(rows[0], tuple(rows[1:]))
    shown = torch.tensor(IDS)[mine] if ids else None

    # Ranks hide different numbers of words.
    words = Words(tokens, tokens % 5 != 0, tokens % 15 == 1)

    def embed(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return embed_pixels(model, *part, wants=objective.wants)

    def loss(*found: Tensor) -> Tensor:
        needed = {name: told[name] for name in objective.needed_teachers}
        student = embedded_of(found, words, objective.wants)
        total, _ = objective(student, needed, scale=model.logit_scale.exp(), progress=0.5, ids=shown)
        return total

    pieces = list(zip(*(each.chunk(parts) for each in (pictures, tokens, words.hidden)), strict=True))
    if parts == 1:
        value = loss(*embed(pieces[0]))
        value.backward()
        value = value.detach()
    else:
        value = backward_in_parts(embed, pieces, loss)
    named = [*model.named_parameters(), *((f"objective.{n}", p) for n, p in objective.named_parameters())]
    found = {name: p.grad for name, p in named if p.grad is not None} | {"loss": value.reshape(1)}
    here.average_(list(found.values()))
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    with ranks("cpu") as here:
        for tower in TOWERS:
            for case, terms in CASES.items():
                variants = {case: (False, 1)}
                if case in WITH_IDS:
                    variants[f"{case} with ids"] = (True, 1)
                if case in IN_PARTS:
                    variants[f"{case} in parts"] = (False, 2)
                for name, (ids, parts) in variants.items():
                    said = gradients(tower, terms, here, ids=ids, parts=parts)
                    found |= {f"{tower}/{name}/{key}": value.contiguous() for key, value in said.items()}
        if here.is_first:
            save_file(found, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
