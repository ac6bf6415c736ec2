"""Embedding and tokens of one forward pass, for losses over patches and words; hidden words."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from towers import random_weights  # noqa: E402

from edgeclip.models.config import FastViTConfig, TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.fastvit import FastViT  # noqa: E402
from edgeclip.models.text_transformer import TextTransformer  # noqa: E402
from edgeclip.models.vit import VisionTransformer  # noqa: E402

VIT = ViTConfig(
    width=32, heads=(2, 2, 2), hidden_dims=(64, 64, 64), head_dim=16, patch_px=8, grid=(4, 3), embed_dim=24
)
VITS = {
    "plain": VIT,
    "pruned": dataclasses.replace(VIT, heads=(2, 1, 0), hidden_dims=(0, 40, 8)),
    "one-layer": dataclasses.replace(VIT, heads=(2,), hidden_dims=(64,)),
}
FASTVIT = FastViTConfig(
    dims=(8, 16), depths=(1, 1), mixers=("repmixer", "attention"), head_dim=8, embed_dim=24
)
TEXT = TextTransformerConfig(
    vocab_size=50, context_length=12, width=32, heads=(2, 2), hidden_dims=(64, 64), head_dim=16, embed_dim=24
)
TEXTS = {
    "causal": TEXT,
    "full": dataclasses.replace(TEXT, attention="full"),
    "padded": dataclasses.replace(TEXT, attention="padded"),
    "mean": dataclasses.replace(TEXT, attention="padded", pool="mean", token_dim=8),
    "conv": dataclasses.replace(TEXT, attention="full", conv_ends=True, conv_kernel=5),
    "conv-mean": dataclasses.replace(TEXT, attention="full", conv_ends=True, conv_kernel=5, pool="mean"),
    "pruned": dataclasses.replace(TEXT, heads=(2, 0), hidden_dims=(0, 40)),
}


def tower(made: nn.Module, *, training: bool) -> nn.Module:
    return random_weights(made, dtype=torch.float32).train(training)


def rows() -> Tensor:
    tokens = torch.randint(1, 49, (3, 12), generator=torch.Generator().manual_seed(1))
    for row, length in zip(tokens, (12, 5, 3), strict=True):
        row[length - 1], row[length:] = 49, 0
    return tokens


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", VITS.values(), ids=VITS)
def test_a_vit_gives_its_embedding_and_its_patches(config: ViTConfig, training: bool) -> None:
    made = tower(VisionTransformer(config), training=training)
    image = torch.randn(3, 3, 32, 24, generator=torch.Generator().manual_seed(2))
    embedding, patches = made.forward_with_tokens(image)
    assert torch.equal(embedding, made(image))
    assert patches.shape == (3, 12, 32)
    assert torch.equal(patches, made.forward_tokens(image)[:, 1:])


@pytest.mark.parametrize("training", [False, True])
def test_a_fastvit_gives_its_embedding_and_its_last_map(training: bool) -> None:
    made = tower(FastViT(FASTVIT), training=training)
    image = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    embedding, places = made.forward_with_tokens(image)
    assert torch.equal(embedding, made(image))
    assert places.shape == (3, 4 * 6, 32)
    features = made.forward_features(image)
    assert torch.equal(places[:, 7], features[:, :, 1, 1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", TEXTS.values(), ids=TEXTS)
def test_a_text_tower_gives_its_embedding_and_its_words(
    config: TextTransformerConfig, training: bool
) -> None:
    made = tower(TextTransformer(config), training=training)
    embedding, words = made.forward_with_tokens(rows())
    assert torch.equal(embedding, made(rows()))
    assert torch.equal(words, made.forward_tokens(rows()))


def test_batch_norms_move_once_for_both() -> None:
    once, both = (tower(TextTransformer(TEXTS["conv"]), training=True) for _ in range(2))
    once(rows())
    both.forward_with_tokens(rows())
    expected = once.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in both.state_dict().items())


def pass_on(index: int, x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("config", TEXTS.values(), ids=TEXTS)
def test_with_nothing_hidden_the_words_are_as_ever(config: TextTransformerConfig) -> None:
    made = tower(TextTransformer(config), training=False)
    instead = torch.full((config.token_dim or config.width,), float("nan"))
    hidden = torch.zeros(3, 12, dtype=torch.bool)
    found = made.forward_hidden(rows(), hidden=hidden, instead=instead, after_layer=pass_on)
    assert torch.equal(found, made.forward_tokens(rows()))


@pytest.mark.parametrize("name", ["causal", "padded", "mean", "conv"])
def test_what_is_hidden_cannot_be_read(name: str) -> None:
    made = tower(TextTransformer(TEXTS[name]), training=False)
    hidden = torch.zeros(3, 12, dtype=torch.bool)
    hidden[:, 1] = True
    instead = torch.randn(TEXTS[name].token_dim or 32, generator=torch.Generator().manual_seed(5))

    def words(tokens: Tensor, vector: Tensor) -> Tensor:
        return made.forward_hidden(tokens, hidden=hidden, instead=vector, after_layer=pass_on)

    others = rows()
    others[:, 1] = 7
    assert torch.equal(words(rows(), instead), words(others, instead))
    assert not torch.equal(words(rows(), instead)[:, 1], words(rows(), instead + 1)[:, 1])
    others[:, 0] = 7
    assert not torch.equal(words(rows(), instead), words(others, instead))


def test_what_is_put_between_the_layers_is_read_by_the_next() -> None:
    made = tower(TextTransformer(TEXTS["padded"]), training=False)
    seen = []

    def between(index: int, x: Tensor) -> Tensor:
        seen.append((index, x))
        return torch.zeros_like(x) if index == 0 else x

    hidden = torch.zeros(3, 12, dtype=torch.bool)
    made.forward_hidden(rows(), hidden=hidden, instead=torch.zeros(32), after_layer=between)
    assert [index for index, _ in seen] == [0, 1]
    (expected,) = {tuple(row.tolist()) for row in seen[1][1][:1, 0]}
    assert torch.allclose(seen[1][1][0], torch.tensor(expected).expand(12, -1), atol=1e-6)  # all of it zero
