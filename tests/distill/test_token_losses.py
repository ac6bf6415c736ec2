"""The relaxed matching against exact assignments and a general solver, gradients, tiles; hidden words."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import numpy as np  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812
from torch import Tensor  # noqa: E402

optimize = pytest.importorskip("scipy.optimize")

from edgeclip.distill.pairs import Pairs  # noqa: E402
from edgeclip.distill.token_losses import (  # noqa: E402
    TokenPairs,
    hidden_word_loss,
    matched_similarity,
    token_alignment,
)
from edgeclip.errors import ConfigError, InputError  # noqa: E402

CONVERGED = 3000


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def mask(lengths: tuple[int, ...], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def pairs(patches: Tensor, words: Tensor, kept: Tensor, ids: Tensor | None = None) -> TokenPairs:
    embeddings = Pairs.gather(unit(len(patches), 3, seed=9), unit(len(patches), 3, seed=8), ids=ids)
    return TokenPairs.gather(patches, words, kept, pairs=embeddings)


# The matching


@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.005])
def test_it_is_the_exact_assignment_but_for_the_temperature(temperature: float) -> None:
    patches, words = unit(4, 9, 6, seed=0), unit(5, 7, 6, seed=1)
    lengths = (7, 5, 3, 1, 6)
    found = matched_similarity(
        patches, words, mask(lengths, 7), temperature=temperature, iterations=CONVERGED
    )
    for row, picture in enumerate(patches):
        for column, (text, length) in enumerate(zip(words, lengths, strict=True)):
            cosines = (text[:length] @ picture.T).numpy()
            exact = cosines[optimize.linear_sum_assignment(cosines, maximize=True)].mean()
            value = float(found[row, column])
            assert exact - temperature * math.log(9) - 1e-9 <= value <= exact + 1e-6


def test_two_words_cannot_have_the_same_best_patch() -> None:
    patches = torch.eye(3, dtype=torch.float64)[None]
    words = F.normalize(torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.3, 0.0]]], dtype=torch.float64), dim=-1)
    kept = torch.ones(1, 2, dtype=torch.bool)
    shared = (1 + float(words[0, 1, 0])) / 2
    apart = (1 + float(words[0, 1, 1])) / 2
    free = matched_similarity(patches, words, kept, temperature=1e-3, iterations=0)
    priced = matched_similarity(patches, words, kept, temperature=1e-3, iterations=CONVERGED)
    assert float(free) == pytest.approx(shared, abs=2e-3)
    assert float(priced) == pytest.approx(apart, abs=2e-3)


@pytest.mark.parametrize(("words", "places"), [(3, 4), (4, 4), (5, 3)])
def test_it_is_the_optimum_a_general_solver_finds(words: int, places: int) -> None:
    temperature = 0.3
    cosines = (unit(words, 4, seed=3) @ unit(places, 4, seed=4).T).numpy()
    capacity = max(1.0, words / places)

    def cost(flat: Any) -> float:
        plan = np.clip(flat.reshape(words, places), 1e-12, None)
        return float(-(plan * cosines).sum() + temperature * (plan * np.log(plan * places)).sum())

    solved = optimize.minimize(
        cost,
        np.full(words * places, 1 / places),
        method="SLSQP",
        bounds=[(0, 1)] * (words * places),
        constraints=[
            {"type": "eq", "fun": lambda flat: flat.reshape(words, places).sum(axis=1) - 1},
            {"type": "ineq", "fun": lambda flat: capacity - flat.reshape(words, places).sum(axis=0)},
        ],
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    assert solved.success
    found = matched_similarity(
        unit(places, 4, seed=4)[None],
        unit(words, 4, seed=3)[None],
        torch.ones(1, words, dtype=torch.bool),
        temperature=temperature,
        iterations=CONVERGED,
    )
    assert float(found) == pytest.approx(-solved.fun / words, abs=1e-6)


def test_few_iterations_come_from_above() -> None:
    patches, words, kept = unit(2, 6, 4, seed=0), unit(3, 6, 4, seed=1), mask((6, 6, 4), 6)
    values = [
        matched_similarity(patches, words, kept, temperature=0.05, iterations=count)
        for count in (0, 1, 5, 50, CONVERGED)
    ]
    for more, fewer in zip(values[1:], values, strict=False):
        assert (more <= fewer + 1e-12).all()
    assert (values[0] - values[-1] > 1e-3).any()


def test_hot_matching_is_the_mean_of_all_and_padding_does_not_count() -> None:
    patches, words, kept = unit(2, 6, 4, seed=0), unit(3, 5, 4, seed=1), mask((5, 2, 0), 5)
    found = matched_similarity(patches, words, kept, temperature=1e4)
    for row, picture in enumerate(patches):
        for column, length in enumerate((5, 2)):
            expected = (words[column, :length] @ picture.T).mean()
            assert torch.allclose(found[row, column], expected, atol=1e-4)
    assert (found[:, 2] == 0).all()
    words[:, 4] = 17.0
    again = matched_similarity(patches, words, kept, temperature=0.1)
    words[1:, 4] = -3.0
    assert torch.equal(matched_similarity(patches, words, kept, temperature=0.1)[:, 1:], again[:, 1:])


def test_float32_agrees_at_the_lowest_temperature() -> None:
    patches, words, kept = unit(3, 16, 8, seed=0), unit(4, 12, 8, seed=1), mask((12, 8, 5, 12), 12)
    exact = matched_similarity(patches, words, kept, temperature=0.02, iterations=20)
    found = matched_similarity(patches.float(), words.float(), kept, temperature=0.02, iterations=20)
    assert found.isfinite().all()
    assert torch.allclose(found.double(), exact, atol=1e-5)


def test_a_temperature_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="temperature is 0"):
        matched_similarity(
            unit(1, 2, 3, seed=0), unit(1, 2, 3, seed=1), torch.ones(1, 2).bool(), temperature=0
        )


# The loss


def reference(batch: TokenPairs, scale: float, scores: Tensor) -> float:
    total = 0.0
    for logits in (scale * scores, scale * scores.T):
        for row, targets in zip(logits.tolist(), batch.targets.tolist(), strict=True):
            log_sum = math.log(sum(math.exp(value) for value in row))
            total -= sum(share * (value - log_sum) for value, share in zip(row, targets, strict=True))
    return total / (2 * len(scores))


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 0, 3])])
def test_the_loss_is_the_mean_cross_entropy_of_both_directions(ids: Tensor | None) -> None:
    patches, words, kept = unit(4, 6, 5, seed=0), unit(4, 7, 5, seed=1), mask((5, 2, 4, 3), 7)
    batch = pairs(patches, words, kept, ids)
    scores = torch.stack(
        [
            torch.cat(
                [
                    matched_similarity(picture[None], text[None], count[None], temperature=0.1, iterations=4)[
                        0
                    ]
                    for text, count in zip(words, kept, strict=True)
                ]
            )
            for picture in patches
        ]
    )
    found = token_alignment(batch, 6.0, temperature=0.1, iterations=4)
    assert float(found) == pytest.approx(reference(batch, 6.0, scores), rel=1e-12)
    assert batch.words.shape[1] == 5  # nobody has more words


def test_pairs_that_match_word_by_word_have_less_loss() -> None:
    words = unit(4, 5, 16, seed=1)
    patches = torch.cat([words, unit(4, 3, 16, seed=2)], dim=1)
    kept = torch.ones(4, 5, dtype=torch.bool)
    right = token_alignment(pairs(patches, words, kept), 20.0)
    wrong = token_alignment(pairs(patches.roll(1, dims=0), words, kept), 20.0)
    assert float(right) < 0.01 < math.log(4) < float(wrong)


@pytest.mark.parametrize("lengths", [(4, 2, 3), (4, 0, 1)])
def test_gradients_are_those_of_the_value_once_prices_have_settled(lengths: tuple[int, ...]) -> None:
    patches, words = unit(3, 5, 4, seed=0).requires_grad_(), unit(3, 4, 4, seed=1).requires_grad_()
    kept = mask(lengths, 4)
    assert torch.autograd.gradcheck(
        lambda patches, words: token_alignment(
            pairs(F.normalize(patches, dim=-1), F.normalize(words, dim=-1), kept),
            5.0,
            temperature=0.5,
            iterations=60,
        ),
        (patches, words),
    )


@pytest.mark.parametrize("iterations", [0, 3])
def test_every_word_gives_its_whole_weight_whatever_the_prices(iterations: int) -> None:
    patches, words, kept = unit(1, 6, 4, seed=0), unit(1, 5, 4, seed=1), mask((4,), 5)
    cosines = words[0] @ patches[0].T
    words.requires_grad_()
    similarity = matched_similarity(patches, words, kept, temperature=0.1, iterations=iterations)
    (gradient,) = torch.autograd.grad(similarity.sum(), words)
    # d s / d t_l = Σ_p P_lp v_p / |T|: the part in the span of the patches says what P is.
    plan = torch.linalg.lstsq(patches[0].T, 4 * gradient[0, :4].T).solution
    assert torch.allclose(patches[0].T @ plan, 4 * gradient[0, :4].T)
    assert (gradient[0, 4] == 0).all()
    if not iterations:
        expected = (cosines[:4] / 0.1).softmax(dim=1) @ patches[0] / 4
        assert torch.allclose(gradient[0, :4], expected)


@pytest.mark.parametrize("pairs_at_once", [40, 11, 3, 1])
def test_tiles_change_neither_value_nor_gradient(pairs_at_once: int) -> None:
    kept = mask((4, 2, 5, 3, 5), 5)
    found = []
    for limit in (1 << 30, pairs_at_once * 5 * 6 * 8 * 3):
        patches, words = unit(5, 6, 4, seed=0).requires_grad_(), unit(5, 5, 4, seed=1).requires_grad_()
        value = token_alignment(pairs(patches, words, kept), 7.0, max_matrix_bytes=limit)
        found.append((value.detach(), *torch.autograd.grad(value, (patches, words))))
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_texts_without_words_are_all_alike() -> None:
    patches, words = unit(3, 5, 4, seed=0), unit(3, 4, 4, seed=1)
    value = token_alignment(pairs(patches, words, torch.zeros(3, 4, dtype=torch.bool)), 7.0)
    assert float(value) == pytest.approx(math.log(3))


def test_shapes_that_do_not_belong_together_are_named() -> None:
    with pytest.raises(InputError, match=r"patches \(3, 5, 4\), words \(3, 4, 6\).*\(3, 4\)"):
        pairs(unit(3, 5, 4, seed=0), unit(3, 4, 6, seed=1), torch.ones(3, 4).bool())


# Hidden words


def test_hidden_words_are_the_mean_cross_entropy_of_their_logits() -> None:
    states, weight, bias = unit(6, 4, seed=0), 3 * unit(9, 4, seed=1), unit(1, 9, seed=2)[0]
    ids = torch.tensor([0, 8, 3, 3, 1, 7])
    expected = 0.0
    for state, number in zip(states, ids.tolist(), strict=True):
        logits = [float(state @ row + shift) for row, shift in zip(weight, bias, strict=True)]
        expected -= (logits[number] - math.log(sum(map(math.exp, logits)))) / 6
    assert float(hidden_word_loss(states, ids, weight, bias)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("limit", [1 << 30, 2 * 9 * 8 * 2, 1])
def test_gradients_of_hidden_words_are_those_of_the_value(limit: int) -> None:
    said = (unit(5, 4, seed=0), unit(9, 4, seed=1), unit(1, 9, seed=2)[0])
    ids = torch.tensor([0, 8, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda states, weight, bias: hidden_word_loss(states, ids, weight, bias, max_matrix_bytes=limit),
        tuple(value.requires_grad_() for value in said),
    )


def test_no_hidden_word_is_no_loss_with_a_gradient_of_zero() -> None:
    weight = unit(9, 4, seed=1).requires_grad_()
    value = hidden_word_loss(
        unit(0, 4, seed=0), torch.zeros(0, dtype=torch.long), weight, torch.zeros(9, dtype=torch.float64)
    )
    value.backward()
    assert float(value.detach()) == 0
    assert weight.grad is not None
    assert (weight.grad == 0).all()
