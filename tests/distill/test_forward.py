"""What the student's forward pass returns, in one batch and in parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402

from edgeclip.distill.accumulate import backward_in_parts  # noqa: E402
from edgeclip.distill.batches import Batch, Position  # noqa: E402
from edgeclip.distill.forward import (  # noqa: E402
    Tokens,
    Wants,
    embed,
    embedded_of,
    token_shapes,
    words_of,
)
from edgeclip.distill.hidden_words import HiddenWords, TokenShapes  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import (  # noqa: E402
    BagTextConfig,
    CLIPConfig,
    EfficientNetImageConfig,
    FastViTConfig,
    TextTransformerConfig,
    ViTConfig,
)
from edgeclip.tokenizer import SpecialIds  # noqa: E402

SPECIAL = SpecialIds(pad=47, start=48, end=49)
VIT = ViTConfig(
    width=24, heads=(2, 2), hidden_dims=(48, 48), head_dim=12, patch_px=8, grid=(2, 2), embed_dim=16
)
FASTVIT = FastViTConfig(
    dims=(8, 16), depths=(1, 1), mixers=("repmixer", "attention"), head_dim=8, embed_dim=16
)
TEXT = TextTransformerConfig(
    vocab_size=50,
    context_length=10,
    width=32,
    heads=(2, 2, 2),
    hidden_dims=(64, 64, 64),
    head_dim=16,
    attention="padded",
    pool="mean",
    pad_id=47,
    token_dim=8,
    embed_dim=16,
)
MCT = dataclasses.replace(
    TEXT, attention="full", pool="eot", token_dim=0, conv_ends=True, conv_kernel=3, pad_id=0
)
MEAN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def model(image: Any = VIT, text: Any = TEXT) -> CLIP:
    torch.manual_seed(0)
    return build_clip(CLIPConfig(name="tiny", image=image, text=text, image_size_px=(16, 16)))


def batch(captions: int = 2, rows: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 47, (rows, captions, 10), generator=generator, dtype=torch.int32)
    tokens[..., 0] = 48
    for row in range(rows):
        for caption in range(captions):
            length = 3 + (row + caption) % 6
            tokens[row, caption, length] = 49
            tokens[row, caption, length + 1 :] = 47
    image = torch.randint(0, 256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(
        Position(0, 0), torch.arange(rows), tuple(map(str, range(rows))), {"image": image, "tokens": tokens}
    )


def network(made: CLIP) -> HiddenWords:
    torch.manual_seed(1)
    found = HiddenWords(token_shapes(made), share=0.3, fusions=2)
    for fusion in found.fusions:
        torch.nn.init.normal_(fusion.out.weight, std=0.3)
    return found


def run(made: CLIP, wants: Wants, data: Batch) -> tuple[Tensor, ...]:
    words = words_of(data, wants, SPECIAL, seed=0)
    return embed(made, data["image"], words.ids, words.hidden, **MEAN, wants=wants)


def test_token_shapes_are_those_of_the_towers() -> None:
    assert token_shapes(model()) == TokenShapes(image=24, text=32, pieces=8, vocabulary=50, layers=3)
    assert token_shapes(model(FASTVIT)).image == 32
    bag = BagTextConfig(vocab_size=50, context_length=10, pad_id=47, width=16, embed_dim=16)
    assert token_shapes(model(EfficientNetImageConfig(embed_dim=16), bag)) == TokenShapes()


@pytest.mark.parametrize("image", [VIT, FASTVIT], ids=["vit", "fastvit"])
def test_embeddings_are_the_same_whatever_else_is_wanted(image: Any) -> None:
    made, data = model(image).eval(), batch()
    plain = run(made, Wants(), data)
    assert [tuple(each.shape) for each in plain] == [(6, 16)] * 3
    for wants in (Wants(tokens=True), Wants(hidden=network(made)), Wants(True, network(made))):
        found = run(made, wants, data)
        assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=False))
        captions = 2
        assert len(found) == 3 + (1 + captions) * wants.tokens + captions * (wants.hidden is not None)


def test_tokens_come_under_their_names() -> None:
    made, data = model().eval(), batch()
    wants = Wants(True, network(made))
    words = words_of(data, wants, SPECIAL, seed=0)
    said = embedded_of(run(made, wants, data), words, wants)
    tokens = said.tokens
    assert isinstance(tokens, Tokens)
    assert tokens.patches is not None
    assert torch.equal(tokens.patches, made.image_tower.forward_with_tokens(pixels(data))[1])
    for caption in range(2):
        expected = made.text_tower.forward_tokens(data["tokens"][:, caption])
        assert torch.allclose(tokens.texts[caption], expected, atol=1e-6)
        assert tokens.hidden[caption].shape == expected.shape
    assert words.kept is not None
    assert words.hidden is not None
    assert words.kept[0, 0].tolist() == [False, True, True, *[False] * 7]
    assert words.hidden[words.kept].any()
    assert not words.hidden[~words.kept].any()
    assert (
        embedded_of(run(made, Wants(), data), words_of(data, Wants(), SPECIAL, seed=0), Wants()).tokens
        is None
    )


def pixels(data: Batch) -> Tensor:
    mean, std = (torch.tensor(MEAN[name])[:, None, None] for name in ("mean", "std"))
    return (data["image"].float() / 255 - mean) / std


def test_hidden_words_cannot_be_read_but_the_picture_can() -> None:
    made, data = model().eval(), batch(captions=1)
    wants = Wants(hidden=network(made))
    words = words_of(data, wants, SPECIAL, seed=0)
    assert words.hidden is not None

    def behind(image: Tensor, ids: Tensor) -> Tensor:
        return embed(made, image, ids, words.hidden, **MEAN, wants=wants)[-1]

    expected = behind(data["image"], words.ids)
    other = torch.where(words.hidden, 11, words.ids)
    assert not torch.equal(other, words.ids)
    assert torch.equal(behind(data["image"], other), expected)
    assert not torch.allclose(behind(data["image"].flip(0), words.ids), expected, atol=1e-4)


@pytest.mark.parametrize("image", [VIT, FASTVIT], ids=["vit", "fastvit"])
def test_parts_give_the_gradients_of_the_whole(image: Any) -> None:
    made, data = model(image), batch()
    made.eval()  # batch norms frozen
    beside = network(made)
    wants = Wants(True, beside)
    words = words_of(data, wants, SPECIAL, seed=0)
    parameters = {**dict(made.named_parameters()), **{f"+{k}": p for k, p in beside.named_parameters()}}
    weights = [torch.randn(6, 16), torch.randn(6, 16), torch.randn(6, 16)]

    def loss(*found: Tensor) -> Tensor:
        said = embedded_of(found, words, wants)
        assert said.tokens is not None
        assert words.hidden is not None
        assert said.tokens.patches is not None
        # Every row meets every other, as in a contrastive loss.
        pooled = [said.tokens.patches.mean(dim=1), *(each.mean(dim=1) for each in said.tokens.texts)]
        joint = sum((each @ each.T).exp().mean().log() for each in pooled)
        states = torch.stack(said.tokens.hidden, dim=1)[words.hidden]
        rows = sum((row * weight).sum() for row, weight in zip(found, weights, strict=False))
        return joint + rows + beside.loss(states, words.ids[words.hidden].long())

    def part(chosen: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return embed(made, *chosen, **MEAN, wants=wants)

    gradients = []
    for count in (1, 3):
        for parameter in parameters.values():
            parameter.grad = None
        assert words.hidden is not None
        chunks = zip(*(each.chunk(count) for each in (data["image"], words.ids, words.hidden)), strict=True)
        backward_in_parts(part, list(chunks), loss)
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys()
    assert {"+vector", "+fusions.0.query.weight", "+image_norm.weight", "+predict.weight"} < whole.keys()
    for name, expected in whole.items():
        assert torch.allclose(parts[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name


def test_statistics_of_batch_norms_are_of_texts_that_can_be_read() -> None:
    plain, made, data = model(text=MCT).train(), model(text=MCT).train(), batch()
    run(plain, Wants(tokens=True), data)
    run(made, Wants(True, network(made)), data)
    expected = dict(plain.named_buffers())
    assert expected
    assert all(torch.equal(value, expected[name]) for name, value in made.named_buffers())


def test_words_that_only_the_picture_tells_are_learned() -> None:
    made = model().train()
    beside = HiddenWords(token_shapes(made), share=0.15, fusions=2)
    wants = Wants(hidden=beside)
    kinds = torch.arange(8)
    image = torch.randint(0, 256, (8, 3, 1, 1), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    tokens = torch.full((8, 1, 10), 47)
    tokens[:, 0, 0], tokens[:, 0, 1], tokens[:, 0, 2] = 48, 20 + kinds, 49
    data = Batch(
        Position(0, 0),
        kinds,
        tuple("abcdefgh"),
        {"image": image.expand(8, 3, 16, 16).contiguous(), "tokens": tokens},
    )
    words = words_of(data, wants, SPECIAL, seed=0)
    assert words.hidden is not None
    assert words.hidden.sum() == 8  # the only word of each text
    optimizer = torch.optim.AdamW([*made.parameters(), *beside.parameters()], lr=5e-3)

    def loss(image: Tensor) -> Tensor:
        (found,) = embed(made, image, words.ids, words.hidden, **MEAN, wants=wants)[2:]
        return beside.loss(found[words.hidden[:, 0]], words.ids[words.hidden])

    for _ in range(60):
        optimizer.zero_grad()
        value = loss(data["image"])
        value.backward()
        optimizer.step()
    assert float(value.detach()) < 0.3
    assert float(loss(data["image"].roll(1, dims=0)).detach()) > 2  # the words of the neighbours
