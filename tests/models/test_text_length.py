"""Shortening text towers exactly, and stretching their positions as Long-CLIP does."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402
from towers import RELATIVE, difference, random_weights  # noqa: E402

from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.config import TextTransformerConfig  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.models.text_length import stretch_positions, with_context_length  # noqa: E402
from edgeclip.models.text_transformer import TextTransformer  # noqa: E402

# Fewer tokens change the order of sums in float64.
EXACT = 1e-12
CAUSAL = TextTransformerConfig(
    vocab_size=50,
    context_length=20,
    width=32,
    heads=(2, 2),
    hidden_dims=(64, 64),
    head_dim=16,
    embed_dim=24,
)
PADDED = dataclasses.replace(CAUSAL, attention="padded", pool="mean", pad_id=49, token_dim=8)
FULL = dataclasses.replace(CAUSAL, attention="full")
MCT = dataclasses.replace(FULL, conv_ends=True, conv_kernel=5)


def texts(config: TextTransformerConfig, longest: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    end = 48 if config.pad_id == 49 else 49
    tokens = torch.full((4, config.context_length), config.pad_id)
    for row, length in zip(tokens, (longest, 2, 4, 5), strict=True):
        row[: length - 1] = torch.randint(1, end, (length - 1,), generator=generator)
        row[length - 1] = end
    return tokens


@pytest.mark.parametrize("length", [7, 8, 19, 20])
@pytest.mark.parametrize(
    "config",
    [
        CAUSAL,
        dataclasses.replace(CAUSAL, pool="mean"),
        PADDED,
        dataclasses.replace(PADDED, pad_id=0, pool="eot"),
    ],
    ids=["causal", "causal-mean", "padded", "padded-eot"],
)
def test_shortened_tower_gives_the_same_embedding(config: TextTransformerConfig, length: int) -> None:
    tower = random_weights(TextTransformer(config))
    short = with_context_length(tower, length)
    tokens = texts(config)
    with torch.no_grad():
        wanted = tower(tokens)
        assert difference(short(tokens[:, :length]), wanted) <= EXACT
        assert difference(reparameterize(short)(tokens[:, :length]), wanted) < RELATIVE
    assert short.config.context_length == len(short.positions) == length
    assert tower.config.context_length == len(tower.positions) == 20


@pytest.mark.parametrize("config", [FULL, MCT], ids=["full", "mct"])
def test_padding_takes_part_in_a_full_tower(config: TextTransformerConfig) -> None:
    """Why such a tower is not shortened: this is what slicing its positions would do."""
    tower = random_weights(TextTransformer(config))
    short = random_weights(TextTransformer(dataclasses.replace(config, context_length=8)))
    state = tower.state_dict()
    short.load_state_dict(state | {"positions": state["positions"][:8]})
    tokens = texts(config)
    with torch.no_grad():
        assert difference(short(tokens[:, :8]), tower(tokens)) > 0.01
    with pytest.raises(ConfigError, match="cannot be shortened from 20 to 8 tokens: its attention is 'full'"):
        with_context_length(tower, 8)


@pytest.mark.parametrize("length", [0, 21])
def test_lengths_that_are_not_shorter_are_refused(length: int) -> None:
    with pytest.raises(ConfigError, match=f"got context length {length}, expected 1 to 20"):
        with_context_length(TextTransformer(CAUSAL), length)


def test_copies_share_nothing_and_train() -> None:
    tower = TextTransformer(CAUSAL)
    for copied in (with_context_length(tower, 20), stretch_positions(tower, 40, keep=5)):
        copied.positions.data.zero_()
        copied.token_embedding.weight.data.zero_()
        assert copied.positions.requires_grad
    assert tower.positions.abs().max().item() > 0
    assert tower.token_embedding.weight.abs().max().item() > 0


def published(table: Tensor, keep: int) -> Tensor:
    """Stretch fourfold as Long-CLIP's code does: four entries for each old one, the last one's beyond it."""
    old = len(table)
    made = [table[index] for index in range(keep)]
    for index in range(keep, old):
        here = table[index]
        step = table[index + 1] - here if index + 1 < old else here - table[index - 1]
        made += [here + step * quarter / 4 for quarter in range(4)]
    return torch.stack(made)


def test_stretching_equals_the_published_rule() -> None:
    tower = random_weights(TextTransformer(dataclasses.replace(CAUSAL, context_length=77)))
    long = stretch_positions(tower)
    assert long.config.context_length == 248
    assert difference(long.positions, published(tower.positions.detach(), 20)) < RELATIVE
    assert torch.equal(long.positions[:20], tower.positions[:20])
    assert torch.equal(long.positions[20::4], tower.positions[20:])


def test_stretched_tower_still_reads_texts_of_kept_positions_alike() -> None:
    tower = random_weights(TextTransformer(CAUSAL))
    long = stretch_positions(tower, 52, keep=9)
    tokens = texts(CAUSAL)
    with torch.no_grad():
        assert difference(long(tokens), tower(tokens)) < RELATIVE
        assert long(torch.ones(1, 52, dtype=torch.int64)).shape == (1, 24)


def test_other_ratios_keep_the_line() -> None:
    tower = TextTransformer(CAUSAL)
    tower.positions.data = torch.arange(20.0)[:, None].expand(20, 32).clone()
    long = stretch_positions(tower, 36, keep=4).positions.detach()
    assert (long[4:, 0] - (4 + torch.arange(32) / 2)).abs().max().item() < 1e-6


@pytest.mark.parametrize(("length", "keep"), [(20, 5), (10, 5), (40, 19), (40, -1)])
def test_stretches_that_make_no_sense_are_refused(length: int, keep: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot stretch 20 positions to {length} with keep {keep}"):
        stretch_positions(TextTransformer(CAUSAL), length, keep=keep)
