"""Laws of the bag-of-pieces text tower."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402

from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.config import BagTextConfig  # noqa: E402
from edgeclip.models.text import AttentionPool, BagTextTower  # noqa: E402

PAD = 99
# Sums of float64 in another order.
TOLERANCE = 1e-12


@pytest.fixture
def tower() -> BagTextTower:
    torch.manual_seed(0)
    config = BagTextConfig(
        vocab_size=100, context_length=12, pad_id=PAD, width=16, heads=4, hidden_dim=24, embed_dim=20
    )
    made = BagTextTower(config).double().eval()
    for pool in (made.pool_pieces, made.pool_pairs):  # zero scores would hide a wrong softmax
        torch.nn.init.normal_(pool.score.weight)
    return made


def rows(*texts: list[int], length: int = 12) -> Tensor:
    return torch.tensor([text + [PAD] * (length - len(text)) for text in texts])


def test_padding_does_not_change_the_embedding(tower: BagTextTower) -> None:
    text = [3, 14, 15, 92]
    with torch.no_grad():
        bare = tower(rows(text, length=4))
        for length in (5, 12, 40):
            assert (tower(rows(text, length=length)) - bare).abs().max().item() < TOLERANCE


def test_batch_of_n_equals_n_singles(tower: BagTextTower) -> None:
    texts = [[1], [2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18]]
    with torch.no_grad():
        batch = tower(rows(*texts))
        singles = torch.cat([tower(rows(text)) for text in texts])
    assert (batch - singles).abs().max().item() < TOLERANCE


def test_order_of_words_matters(tower: BagTextTower) -> None:
    with torch.no_grad():
        there, back = tower(rows([1, 2, 3], [3, 2, 1]))
    assert (there - back).abs().max().item() > 1e-3


def test_one_piece_and_no_piece_give_finite_embeddings(tower: BagTextTower) -> None:
    with torch.no_grad():
        embedding = tower(rows([7], []))
    assert embedding.isfinite().all()
    assert embedding[0].norm().item() > 0


def test_int32_tokens_equal_int64_tokens(tower: BagTextTower) -> None:
    tokens = rows([1, 2, 3])
    with torch.no_grad():
        assert torch.equal(tower(tokens.int()), tower(tokens))


def test_attention_pool_equals_a_loop_over_tokens_and_heads() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(8, heads=2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    with torch.no_grad():
        got = pool(x, mask)
        for row in range(2):
            kept = x[row][mask[row]]
            score = kept @ pool.score.weight.T
            for head in range(2):
                weight = score[:, head].exp() / score[:, head].exp().sum()
                wanted = sum(
                    w * token[4 * head : 4 * head + 4] for w, token in zip(weight, kept, strict=True)
                )
                assert (got[row, 4 * head : 4 * head + 4] - wanted).abs().max().item() < TOLERANCE


def test_factorised_table_equals_the_table_it_stands_for() -> None:
    torch.manual_seed(0)
    config = BagTextConfig(
        vocab_size=100,
        context_length=12,
        pad_id=PAD,
        width=16,
        heads=4,
        hidden_dim=24,
        embed_dim=20,
        token_dim=6,
    )
    narrow = BagTextTower(config).double().eval()
    wide = BagTextTower(dataclasses.replace(config, token_dim=0)).double().eval()
    state = narrow.state_dict()
    state["pieces.weight"] = state["pieces.weight"] @ state.pop("widen.weight").T
    wide.load_state_dict(state)
    assert narrow.pieces.weight.shape == (100, 6)
    with torch.no_grad():
        assert (narrow(rows([1, 2, 3])) - wide(rows([1, 2, 3]))).abs().max().item() < TOLERANCE


def test_keys_of_a_tower_without_factorised_table_stay(tower: BagTextTower, repo: Path) -> None:
    from safetensors import safe_open

    with safe_open(repo / "tests/data/default-checkpoint/model.safetensors", framework="np") as file:
        keys = list(file.keys())
    published = {key.removeprefix("text_tower.") for key in keys if key.startswith("text_tower.")}
    assert set(tower.state_dict()) == published


def test_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 10 does not divide into 4 heads"):
        BagTextTower(BagTextConfig(vocab_size=10, context_length=4, pad_id=9, width=10, heads=4))
