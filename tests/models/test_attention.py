"""Laws of transformer layers, and a loop over heads as their reference."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from towers import RELATIVE, difference, random_weights  # noqa: E402

from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.attention import (  # noqa: E402
    MASKED,
    OPENAI_LAYER,
    Attention,
    QuickGELU,
    Transformer,
    TransformerLayer,
    layer_keys,
)

WIDTH, LENGTH = 12, 5


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)


def transformer(
    heads: tuple[int, ...] = (2, 3), hidden: tuple[int, ...] = (16, 20), activation: str = "gelu"
) -> Transformer:
    made = Transformer(
        WIDTH,
        heads=heads,
        hidden_dims=hidden,
        head_dim=4,
        activation=activation,
        norm_eps=1e-5,
        where="tower",
    )
    return random_weights(made)


def causal() -> Tensor:
    place = torch.arange(LENGTH)
    return (place > place[:, None]) * MASKED


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 4), (2, 4), (5, 8)], ids=["equal", "pruned", "wider"])
def test_attention_equals_a_loop_over_rows_and_heads(heads: int, head_dim: int) -> None:
    attention = random_weights(Attention(WIDTH, heads=heads, head_dim=head_dim))
    x, mask = tokens(), causal().double()
    with torch.no_grad():
        got = attention(x, mask=mask)
        q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=-1)
        for row in range(len(x)):
            mixed = torch.zeros(LENGTH, heads * head_dim, dtype=torch.float64)
            for head in range(heads):
                part = slice(head * head_dim, (head + 1) * head_dim)
                score = q[row, :, part] @ k[row, :, part].T / head_dim**0.5
                weight = score.masked_fill(mask < 0, -torch.inf).softmax(dim=-1)
                mixed[:, part] = weight @ v[row, :, part]
            wanted = mixed @ attention.out.weight.T + attention.out.bias
            assert difference(got[row], wanted) < RELATIVE


def test_heads_keep_the_order_of_torch() -> None:
    theirs = random_weights(nn.MultiheadAttention(WIDTH, 3, batch_first=True))
    ours = Attention(WIDTH, heads=3, head_dim=4).double()
    ours.qkv.weight.data, ours.qkv.bias.data = theirs.in_proj_weight.data, theirs.in_proj_bias.data
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    x = tokens()
    with torch.no_grad():
        assert difference(ours(x), theirs(x, x, x, need_weights=False)[0]) < RELATIVE


@pytest.mark.parametrize("fused", [True, False])
def test_folded_attention_equals_attention(fused: bool) -> None:
    attention = random_weights(Attention(WIDTH, heads=2, head_dim=4))
    x, mask = tokens(), causal().double()
    with torch.no_grad():
        folded = attention.fold(fused=fused)
        assert difference(folded(x, mask=mask), attention(x, mask=mask)) < RELATIVE
        if not fused:
            wanted = attention(x, queries=x[:, :2], mask=mask[:2])
            assert difference(folded(x, queries=x[:, :2], mask=mask[:2]), wanted) < RELATIVE


def test_some_queries_are_rows_of_all_queries() -> None:
    attention = random_weights(Attention(WIDTH, heads=2, head_dim=4))
    x = tokens()
    with torch.no_grad():
        assert difference(attention(x, queries=x[:, 1:3]), attention(x)[:, 1:3]) < RELATIVE


def test_masked_tokens_have_no_part_at_all() -> None:
    attention = random_weights(Attention(WIDTH, heads=2, head_dim=4))
    x = tokens()
    mask = torch.tensor([[0, 0, 0, MASKED, MASKED]], dtype=torch.float64)
    with torch.no_grad():
        alone = attention(x[:, :3])
        for form in (attention, attention.fold()):
            assert difference(form(x, mask=mask)[:, :3], alone) < RELATIVE


def test_a_row_with_nothing_left_stays_finite() -> None:
    attention = random_weights(Attention(WIDTH, heads=2, head_dim=4))
    mask = torch.full((1, LENGTH), MASKED, dtype=torch.float64)
    with torch.no_grad():
        assert attention(tokens(), mask=mask).isfinite().all()


def test_a_layer_without_parts_is_the_identity() -> None:
    bare = TransformerLayer(WIDTH, heads=0, head_dim=4, hidden_dim=0, activation="gelu", norm_eps=1e-5)
    assert not list(bare.parameters())
    assert torch.equal(bare(tokens()), tokens())
    assert torch.equal(bare(tokens(), queries=tokens()[:, :1]), tokens()[:, :1])


@pytest.mark.parametrize("activation", ["gelu", "quick-gelu"])
@pytest.mark.parametrize(
    ("heads", "hidden"),
    [
        ((2, 3), (16, 20)),
        ((2, 0, 3), (16, 0, 20)),
        ((2, 0, 0), (0, 16, 20)),
        ((0, 0), (16, 20)),
        ((2,), (0,)),
    ],
)
def test_picked_tokens_equal_all_tokens(
    heads: tuple[int, ...], hidden: tuple[int, ...], activation: str
) -> None:
    stack = transformer(heads, hidden, activation)
    x, mask = tokens(), causal().double()
    with torch.no_grad():
        wanted = stack(x, mask=mask)
        for _ in ("as trained", "folded", "folded again"):
            picked = stack.forward_picked(x, lambda y: y[:, 2:3], mask=mask, picked_mask=mask[2:3])
            assert difference(picked, wanted[:, 2:3]) < RELATIVE
            assert difference(stack(x, mask=mask), wanted) < RELATIVE
            stack.fold()
    assert not any(isinstance(module, (Attention, QuickGELU)) for module in stack.modules())


def test_the_last_layer_computes_the_picked_token_only() -> None:
    stack = transformer()
    seen: list[int] = []
    for layer in stack.layers:
        layer.fc1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        stack.forward_picked(tokens(), lambda y: y[:, :1])
    assert seen == [LENGTH, 1]


def test_masks_work_in_mixed_precision() -> None:
    stack = transformer().float()
    x, mask = tokens().float(), causal()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = stack(x, mask=mask)
    assert difference(mixed, stack(x, mask=mask)) < 0.05


def test_gradients_reach_every_weight() -> None:
    stack = transformer().train()
    stack.forward_picked(tokens(), lambda y: y[:, :1]).sum().backward()
    assert all(weight.grad is not None for weight in stack.parameters())


def test_layers_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="tower: 'heads' has 2 layers and 'hidden_dims' 1"):
        transformer((2, 3), (16,))
    with pytest.raises(ConfigError, match="'heads' has 0 layers and 'hidden_dims' 0"):
        transformer((), ())


def test_key_tables_leave_out_what_a_layer_lacks() -> None:
    pairs = layer_keys(OPENAI_LAYER, "resblocks.{}.", heads=(2, 0), hidden_dims=(0, 8), first=3)
    assert {pair.ours.split(".")[2]: pair.names[0].split(".")[1] for pair in pairs} == {"0": "3", "1": "4"}
    assert {pair.ours.split(".", 3)[3].split(".")[0] for pair in pairs[:6]} == {"norm1", "attention"}
    assert {pair.ours.split(".", 3)[3].split(".")[0] for pair in pairs[6:]} == {"norm2", "fc1", "fc2"}
