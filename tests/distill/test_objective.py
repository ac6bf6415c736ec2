from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import Tensor  # noqa: E402

from edgeclip.distill import losses  # noqa: E402
from edgeclip.distill.forward import Tokens, Words  # noqa: E402
from edgeclip.distill.hidden_words import TokenShapes  # noqa: E402
from edgeclip.distill.objective import Embedded, Objective  # noqa: E402
from edgeclip.distill.pairs import Pairs  # noqa: E402
from edgeclip.distill.recipe import (  # noqa: E402
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
from edgeclip.distill.token_losses import TokenPairs, token_alignment  # noqa: E402
from edgeclip.errors import ConfigError  # noqa: E402

SCALES = {"near": 20.0, "wide": 30.0, "idle": 100.0, "eyes": 100.0}
DIMS = {"near": (4, 4), "wide": (6, 6), "idle": (4, 4), "eyes": (3, None)}
SCALE = torch.tensor(7.0)


def rows(width: int, seed: int) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(seed))


def embedded(width: int, seed: int, texts: int = 1) -> Embedded:
    return Embedded(rows(width, seed), tuple(rows(width, seed + 10 + text) for text in range(texts)))


def objective(*specs: LossSpec) -> Objective:
    stage = StageSpec(name="one", data="train", samples=10, batch_size=5, loss=specs)
    return Objective(stage, embed_dim=4, teacher_scales=SCALES, teacher_dims=DIMS)


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


# Tokens

SHAPES = TokenShapes(image=3, text=8, pieces=8, vocabulary=11, layers=2)


def with_tokens(texts: int = 1, rows_: int = 5) -> Embedded:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 11, (rows_, texts, 6), generator=generator, dtype=torch.int32)
    kept = torch.arange(6) < torch.randint(1, 6, (rows_, texts, 1), generator=generator)
    hidden = kept & (torch.arange(6) < 1)
    return Embedded(
        rows(4, 0),
        tuple(rows(4, 10 + text) for text in range(texts)),
        Tokens(
            Words(ids, kept, hidden),
            torch.randn(rows_, 7, 3, generator=generator),
            tuple(torch.randn(rows_, 6, 8, generator=generator) for _ in range(texts)),
            tuple(torch.randn(rows_, 6, 8, generator=generator) for _ in range(texts)),
        ),
    )


def token_objective(*specs: LossSpec) -> Objective:
    stage = StageSpec(name="one", data="train", samples=10, batch_size=5, loss=specs)
    torch.manual_seed(0)
    return Objective(stage, embed_dim=4, teacher_scales={}, teacher_dims={}, tokens=SHAPES)


def test_only_what_some_term_asks_for_is_wanted() -> None:
    plain = token_objective(InfoNCELoss()).wants
    assert (plain.tokens, plain.hidden) == (False, None)
    aligned = token_objective(InfoNCELoss(), TokenAlignmentLoss()).wants
    assert (aligned.tokens, aligned.hidden) == (True, None)
    made = token_objective(MaskedTokensLoss(share=0.3))
    assert made.wants.tokens is False
    assert made.wants.hidden is made.hidden_words
    assert made.hidden_words is not None
    assert made.hidden_words.share == 0.3


@pytest.mark.parametrize("width", [None, 9])
def test_tokens_are_aligned_in_a_space_of_their_own_caption_by_caption(width: int | None) -> None:
    made = token_objective(TokenAlignmentLoss(temperature=0.2, iterations=3, width=width))
    student = with_tokens(texts=2)
    tokens = student.tokens
    assert tokens is not None
    assert tokens.patches is not None
    assert tokens.words.kept is not None
    scale = torch.tensor(7.0, requires_grad=True)
    total, parts = made(student, {}, scale=scale, progress=0.0)
    heads = dict(made.named_parameters())
    assert {name: tuple(value.shape) for name, value in heads.items()} == {
        "token_heads.0-image.weight": (width or 4, 3),
        "token_heads.0-text.weight": (width or 4, 8),
    }
    expected = torch.zeros(())
    for caption in (0, 1):
        pairs = TokenPairs.gather(
            F.normalize(tokens.patches @ heads["token_heads.0-image.weight"].T, dim=-1),
            F.normalize(tokens.texts[caption] @ heads["token_heads.0-text.weight"].T, dim=-1),
            tokens.words.kept[:, caption],
            pairs=unit(student, caption),
        )
        expected = expected + token_alignment(pairs, 7.0, temperature=0.2, iterations=3)
    assert torch.allclose(total, expected)
    assert torch.allclose(parts["0-token-alignment"], expected)
    total.backward()
    assert scale.grad is None  # the model's scale belongs to its embeddings
    assert all(value.grad is not None for value in heads.values())


def test_hidden_words_of_all_captions_count_alike() -> None:
    made, student = token_objective(MaskedTokensLoss(weight=0.5)), with_tokens(texts=2)
    tokens = student.tokens
    assert tokens is not None
    assert tokens.words.hidden is not None
    assert made.hidden_words is not None
    total, parts = made(student, {}, scale=SCALE, progress=0.0)
    said, asked = [], []
    for caption in (0, 1):
        for row in range(5):
            for place in range(6):
                if tokens.words.hidden[row, caption, place]:
                    said.append(tokens.hidden[caption][row, place])
                    asked.append(int(tokens.words.ids[row, caption, place]))
    network = made.hidden_words
    states = network.norm(F.gelu(network.transform(torch.stack(said))))
    expected = F.cross_entropy(network.predict(states), torch.tensor(asked))
    assert torch.allclose(parts["0-masked-tokens"], expected)
    assert torch.allclose(total, 0.5 * expected)


@pytest.mark.parametrize("spec", [TokenAlignmentLoss(), MaskedTokensLoss()])
@pytest.mark.parametrize("missing", ["image", "text"])
def test_tokens_that_a_tower_cannot_give_are_named(spec: LossSpec, missing: str) -> None:
    stage = StageSpec(name="three", data="train", samples=10, batch_size=5, loss=(spec,))
    shapes = replace(SHAPES, **{missing: 0})
    kind = "token-alignment" if isinstance(spec, TokenAlignmentLoss) else "masked-tokens"
    with pytest.raises(ConfigError, match=f"stage 'three': .*'{kind}' .* the student's {missing} tower"):
        Objective(stage, embed_dim=4, teacher_scales={}, teacher_dims={}, tokens=shapes)


def test_alignment_and_uniformity_are_weighted_in_one_term() -> None:
    student = embedded(4, 0, texts=2)
    made = objective(AlignmentUniformityLoss(alignment=0.5, uniformity=2.0, t=3.0))
    _, parts = run(made, student)
    expected = torch.zeros(())
    for text in (0, 1):
        pairs = unit(student, text)
        spread = losses.uniformity(pairs.image, t=3.0) + losses.uniformity(pairs.text, t=3.0)
        expected = expected + 0.5 * losses.alignment(pairs.image, pairs.text) + 2.0 * spread / 2
    assert torch.allclose(parts["0-alignment-uniformity"], expected)


def test_softness_can_be_shared_by_similarity() -> None:
    student, made = embedded(4, 0), objective(InfoNCELoss(softness=(0.3, 0.3), spread="similar"))
    total, _ = run(made, student)
    assert torch.allclose(total, losses.info_nce(unit(student), SCALE, softness=0.3, spread="similar"))
