from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import Tensor  # noqa: E402

from edgeclip.distill import losses  # noqa: E402
from edgeclip.distill.objective import Embedded, Objective  # noqa: E402
from edgeclip.distill.pairs import Pairs  # noqa: E402
from edgeclip.distill.recipe import (  # noqa: E402
    AffinityLoss,
    CheckpointTeacher,
    DecoupledLoss,
    FeatureLoss,
    InfoNCELoss,
    InteractiveLoss,
    LossSpec,
    SigLIPLoss,
    StageSpec,
)
from edgeclip.errors import ConfigError  # noqa: E402

TEACHERS = {
    "near": CheckpointTeacher(name="near", path="near", scale=20.0),
    "wide": CheckpointTeacher(name="wide", path="wide", scale=30.0),
    "idle": CheckpointTeacher(name="idle", path="idle"),
    "eyes": CheckpointTeacher(name="eyes", path="eyes"),
}
DIMS = {"near": (4, 4), "wide": (6, 6), "idle": (4, 4), "eyes": (3, None)}
SCALE = torch.tensor(7.0)


def rows(width: int, seed: int) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(seed))


def embedded(width: int, seed: int, texts: int = 1) -> Embedded:
    return Embedded(rows(width, seed), tuple(rows(width, seed + 10 + text) for text in range(texts)))


def objective(*specs: LossSpec) -> Objective:
    stage = StageSpec(name="one", data="train", samples=10, batch_size=5, loss=specs)
    return Objective(stage, embed_dim=4, teachers=TEACHERS, teacher_dims=DIMS)


def unit(embedding: Embedded, text: int = 0) -> Pairs:
    return Pairs.gather(F.normalize(embedding.image, dim=-1), F.normalize(embedding.texts[text], dim=-1))


def run(made: Objective, student: Embedded, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    teachers = {"near": embedded(4, 1, 2), "wide": embedded(6, 2, 2)}
    total, parts = made(student, teachers, **({"scale": SCALE, "progress": 0.0} | options))
    return total, parts


def test_terms_are_weighted_and_named_by_place_and_kind() -> None:
    student = embedded(4, 0)
    total, parts = run(
        objective(InfoNCELoss(weight=0.25), AffinityLoss(teachers=("near",), weight=0.75)), student
    )
    assert set(parts) == {"0-info-nce", "1-affinity"}
    assert float(total) == pytest.approx(
        0.25 * float(parts["0-info-nce"]) + 0.75 * float(parts["1-affinity"])
    )
    assert torch.allclose(parts["0-info-nce"], losses.info_nce(unit(student), SCALE))


def test_terms_over_pairs_are_summed_over_captions() -> None:
    student = embedded(4, 0, texts=2)
    _, parts = run(objective(DecoupledLoss()), student)
    expected = sum(losses.decoupled_contrastive(unit(student, text), SCALE) for text in (0, 1))
    assert torch.allclose(parts["0-decoupled"], expected)


def test_each_teacher_keeps_its_scale_and_weight() -> None:
    student, teachers = embedded(4, 0), {"near": embedded(4, 1, 2), "wide": embedded(6, 2, 2)}
    made = objective(AffinityLoss(teachers=("wide", "near"), teacher_weights=(1.0, 3.0)))
    total, _ = made(student, teachers, scale=SCALE, progress=0.0)
    expected = losses.affinity_kl(
        unit(student), [unit(teachers["wide"]), unit(teachers["near"])],
        scale=SCALE, teacher_scales=[30.0, 20.0], teacher_weights=[1.0, 3.0],
    )  # fmt: skip
    assert torch.allclose(total, expected)


def test_softness_follows_the_progress_of_the_stage() -> None:
    student, made = embedded(4, 0), objective(InfoNCELoss(softness=(0.0, 0.4)))
    for progress, softness in ((0.0, 0.0), (0.5, 0.2), (1.0, 0.4)):
        total, _ = run(made, student, progress=progress)
        assert torch.allclose(total, losses.info_nce(unit(student), SCALE, softness=softness))


def test_features_of_other_width_pass_an_adapter_that_is_trained() -> None:
    student = embedded(4, 0)
    made = objective(FeatureLoss(teacher="wide", distance="smooth-l1"))
    assert {name for name, _ in made.named_parameters()} == {
        f"adapters.1-{tower}.{leaf}" for tower in ("image", "text") for leaf in ("weight", "bias")
    }
    total, _ = made(student, {"wide": embedded(6, 2)}, scale=SCALE, progress=0.0)
    total.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_features_of_the_same_width_need_none() -> None:
    student = embedded(4, 0)
    made = objective(FeatureLoss(teacher="near", tower="image"))
    assert not list(made.parameters())
    _, parts = run(made, student)
    expected = F.mse_loss(F.normalize(student.image, dim=-1), F.normalize(embedded(4, 1, 2).image, dim=-1))
    assert torch.allclose(parts["0-feature"], expected)


def test_siglip_brings_its_bias() -> None:
    made = objective(SigLIPLoss(bias_init=-3.0))
    ((name, bias),) = made.named_parameters()
    assert (name, bias.item()) == ("biases.0", -3.0)
    total, _ = run(made, embedded(4, 0))
    assert torch.allclose(total, losses.siglip(unit(embedded(4, 0)), SCALE, -3.0))


def test_only_teachers_that_are_asked_for_are_needed() -> None:
    made = objective(FeatureLoss(teacher="wide"), AffinityLoss(teachers=("near",)), InfoNCELoss())
    assert made.needed_teachers == ("near", "wide")


def test_interactive_compares_through_the_adapters_of_features() -> None:
    total, _ = run(objective(InteractiveLoss(teacher="near")), embedded(4, 0))
    expected = losses.interactive_contrastive(unit(embedded(4, 0)), unit(embedded(4, 1, 2)), SCALE)
    assert torch.allclose(total, expected)
    made = objective(InteractiveLoss(teacher="wide"), FeatureLoss(teacher="wide"))
    assert {name for name, _ in made.named_children()} == {"adapters", "biases", "token_heads"}
    assert set(made.adapters) == {"1-image", "1-text"}
    student, wide = embedded(4, 0), embedded(6, 2)
    _, parts = made(student, {"wide": wide}, scale=SCALE, progress=0.0)
    adapted = Embedded(
        made.adapters["1-image"](F.normalize(student.image, dim=-1)),
        (made.adapters["1-text"](F.normalize(student.texts[0], dim=-1)),),
    )
    expected = losses.interactive_contrastive(unit(adapted), unit(wide), SCALE)
    assert torch.allclose(parts["0-interactive"], expected)


def test_a_teacher_with_one_tower_gives_its_features_and_no_pairs() -> None:
    student, eyes = embedded(4, 0), Embedded(rows(3, 5), ())
    made = objective(InfoNCELoss(), FeatureLoss(teacher="eyes", tower="image"))
    total, _ = made(student, {"eyes": eyes}, scale=SCALE, progress=0.0)
    assert torch.isfinite(total)
    for spec in (
        FeatureLoss(teacher="eyes"),
        AffinityLoss(teachers=("eyes",)),
        InteractiveLoss(teacher="eyes"),
    ):
        with pytest.raises(ConfigError, match="the teacher 'eyes' has no text tower"):
            objective(spec)
