"""Which words are hidden, and what the network beside the towers does with them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402

from edgeclip.distill.hidden_words import (  # noqa: E402
    HiddenWords,
    TokenShapes,
    hide,
    hiding_draws,
    word_places,
)
from edgeclip.tokenizer import SpecialIds, Tokenizer  # noqa: E402

SHAPES = TokenShapes(image=12, text=40, pieces=8, vocabulary=30, layers=5)


def test_words_are_what_stands_between_start_and_end() -> None:
    tokenizer = Tokenizer.clip(12)
    ids = torch.from_numpy(
        tokenizer(["a dog!", "", "wow!! a photo of a dog on a skateboard in the sun"], truncate=True)
    )
    found = word_places(ids, tokenizer.config.special)
    assert found.sum(dim=1).tolist() == [3, 0, 10]
    # CLIP pads with the id of "!": the first one is a word, those behind the end are not.
    assert tokenizer.config.special.pad == 0
    assert ids[0, 3:6].tolist() == [tokenizer.encode("!")[0], 49407, 0]
    assert found[0].tolist() == [False, True, True, True, *[False] * 8]


def test_words_of_a_tokenizer_without_a_frame_are_not_padding() -> None:
    found = word_places(torch.tensor([[5, 7, 9, 9]]), SpecialIds(pad=9, start=None, end=None))
    assert found.tolist() == [[True, True, False, False]]


def test_at_least_one_word_is_hidden_and_never_anything_else() -> None:
    words = torch.zeros(400, 2, 20, dtype=torch.bool)
    words[:, 0, 1:18] = True
    words[:, 1, 3:5] = True
    words[7, 1] = False
    hidden = hide(words, torch.rand(400, 2, 20, generator=torch.Generator().manual_seed(0)), 0.15)
    assert not (hidden & ~words).any()
    count = hidden.sum(dim=2)
    assert count[7, 1] == 0
    count[7, 1] = 1
    assert count.min() == 1
    assert float(hidden[:, 0].sum() / words[:, 0].sum()) == pytest.approx(0.15, abs=0.01)
    assert hidden[:, 0].any(dim=0).sum() == 17


def test_what_is_hidden_is_a_function_of_seed_epoch_and_sample() -> None:
    index = torch.tensor([3, 8, 5, 3])
    draws = hiding_draws((2, 6), index, seed=1, epoch=0)
    assert draws.shape == (4, 2, 6)
    assert torch.equal(draws[0], draws[3])
    assert torch.equal(hiding_draws((2, 6), index[1:3], seed=1, epoch=0), draws[1:3])  # another rank's share
    assert not torch.equal(draws[0], draws[1])
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        assert not torch.equal(hiding_draws((2, 6), index, **other), draws)
    assert (draws >= 0).all()
    assert (draws < 1).all()


@pytest.mark.parametrize(
    ("fusions", "layers"), [(1, [4]), (2, [1, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_fusions_are_spread_over_the_layers(fusions: int, layers: list[int]) -> None:
    made = HiddenWords(SHAPES, share=0.15, fusions=fusions)
    for fusion in made.fusions:
        torch.nn.init.ones_(fusion.out.weight)
    x, patches = torch.randn(2, 4, 40), torch.randn(2, 6, 12)
    assert [layer for layer in range(5) if not torch.equal(made.fused(layer, x, patches), x)] == layers


def test_fusion_begins_as_nothing_and_learns_to_look() -> None:
    made = HiddenWords(SHAPES, share=0.15, fusions=1)
    x, patches = torch.randn(2, 4, 40), torch.randn(2, 6, 12)
    assert torch.equal(made.fused(4, x, patches), x)
    made.fused(4, x, patches).square().sum().backward()
    weight = made.fusions[0].out.weight
    assert weight.grad is not None
    assert (weight.grad != 0).any()
    with torch.no_grad():
        weight.normal_()
    first, other = made.fused(4, x, patches), made.fused(4, x, patches + 1)
    assert not torch.allclose(first, other)
    assert torch.allclose(made.fused(4, x, patches.flip(1)), first, atol=1e-5)  # patches are a set


def test_hidden_words_can_be_learned() -> None:
    torch.manual_seed(0)
    made = HiddenWords(SHAPES, share=0.15, fusions=1)
    states, ids = torch.randn(30, 40), torch.arange(30)
    before = made.loss(states, ids)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        value: Tensor = made.loss(states, ids)
        value.backward()
        optimizer.step()
    assert float(before.detach()) > 3
    assert float(value.detach()) < 0.5
