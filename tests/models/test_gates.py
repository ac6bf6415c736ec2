"""Gated towers against a forward pass that keeps the full width and multiplies what flows by the gates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from torch.distributions import RelaxedBernoulli  # noqa: E402
from towers import difference, random_weights  # noqa: E402

from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.config import TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.gates import (  # noqa: E402
    Gates,
    chance_of_open,
    deterministic_gates,
    gated,
    layer_parameters,
    pruned,
    sampled_gates,
)
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.models.text_transformer import TextTransformer  # noqa: E402
from edgeclip.models.vit import VisionTransformer  # noqa: E402

EXACT = 1e-9
"""The same sums in another order, in float64."""

VIT = ViTConfig(
    width=48,
    heads=(3, 2, 3, 0),
    hidden_dims=(40, 32, 0, 24),
    head_dim=8,
    patch_px=8,
    grid=(2, 3),
    activation="quick-gelu",
    embed_dim=20,
)
STEM = dataclasses.replace(
    VIT, stem="conv", pre_norm=False, class_position=False, projection_bias=True, activation="gelu"
)
CAUSAL = TextTransformerConfig(
    vocab_size=30,
    context_length=9,
    width=32,
    heads=(4, 2),
    hidden_dims=(24, 40),
    head_dim=8,
    pad_id=0,
    embed_dim=20,
)
PADDED = dataclasses.replace(CAUSAL, attention="padded", pool="mean", token_dim=12)
MCT = dataclasses.replace(CAUSAL, attention="full", conv_ends=True, conv_kernel=3)

CASES = pytest.mark.parametrize(
    "config", [VIT, STEM, CAUSAL, PADDED, MCT], ids=["vit", "stem", "causal", "padded", "mct"]
)


def tower_of(config: Any) -> Any:
    kind = VisionTransformer if isinstance(config, ViTConfig) else TextTransformer
    return random_weights(kind(config))


def inputs_of(config: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(config, ViTConfig):
        rows, columns = config.grid
        size = (rows * config.patch_px, columns * config.patch_px)
        return torch.randn(3, 3, *size, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 29, (4, config.context_length), generator=generator)
    for row, length in enumerate((9, 5, 3, 7)):
        tokens[row, length - 1] = 29
        tokens[row, length:] = 0
    return tokens


def random_gates(config: Any, seed: int = 0) -> Gates:
    """Return gates of every kind: closed, open, between; a closed attention and a part without units."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        values = torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.where(values < 0.4, 0.0, torch.where(values > 0.8, 1.0, values)).requires_grad_()

    layers = len(config.heads)
    attention, feeding = (
        torch.rand(layers, generator=generator, dtype=torch.float64).clamp(min=0.2) for _ in range(2)
    )
    attention[1] = 0
    neurons = [drawn(count) for count in config.hidden_dims]
    neurons[0] = torch.zeros_like(neurons[0], requires_grad=True)
    gated_channels = not getattr(config, "conv_ends", False)
    return Gates(
        drawn(config.width) if gated_channels else None,
        tuple(drawn(count) for count in config.heads),
        tuple(neurons),
        attention.requires_grad_(),
        feeding.requires_grad_(),
    )


def norm(x: Tensor, layer: nn.LayerNorm, z: Tensor) -> Tensor:
    """Normalize the open channels by their own mean and variance; closed ones stay 0."""
    kept = (z > 0).to(x.dtype)
    mean = (x * kept).sum(-1, keepdim=True) / kept.sum()
    spread = (x - mean) * kept
    variance = spread.square().sum(-1, keepdim=True) / kept.sum()
    return (spread / (variance + layer.eps).sqrt() * layer.weight + layer.bias) * kept


def masked_layers(x: Tensor, tower: Any, gates: Gates, z: Tensor, mask: Tensor | None) -> Tensor:
    for index, layer in enumerate(tower.transformer.layers):
        heads, neurons = gates.heads[index], gates.neurons[index]
        if layer.attention is not None and bool((heads > 0).any()):
            qkv = layer.attention.qkv(norm(x, layer.norm1, z))
            q, k, v = qkv.unflatten(-1, (3, len(heads), -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, head_dim)
            score = q @ k.transpose(-1, -2) * tower.config.head_dim**-0.5
            mixed = (score if mask is None else score + mask).softmax(-1) @ v
            mixed = (mixed * heads[:, None, None]).transpose(1, 2).flatten(2)
            x = x + layer.attention.out(mixed) * gates.attention[index] * z
        if layer.fc1 is not None and bool((neurons > 0).any()):
            hidden = layer.activation(layer.fc1(norm(x, layer.norm2, z))) * neurons
            x = x + layer.fc2(hidden) * gates.feeding[index] * z
    return x


def masked(tower: Any, inputs: Tensor, gates: Gates) -> Tensor:
    """Return the embedding of a tower of full width whose flow is multiplied by the gates."""
    config = tower.config
    z = torch.ones(config.width, dtype=torch.float64) if gates.channels is None else gates.channels
    if isinstance(config, ViTConfig):
        patches = tower.stem(inputs).flatten(2).transpose(1, 2)
        token = tower.positions.class_token.expand(len(patches), 1, -1)
        table = tower.positions.table
        if not config.class_position:
            table = torch.cat([torch.zeros_like(table[:1]), table])
        x = torch.cat([token, patches], dim=1) + table
        x = norm(x, tower.first_norm, z) * z if config.pre_norm else x * z
        x = masked_layers(x, tower, gates, z, None)[:, 0]
        return tower.projection(norm(x, tower.final_norm, z))
    x = tower.token_embedding(inputs)
    if tower.token_projection is not None:
        x = tower.token_projection(x)
    x = (x + tower.positions) * z
    mask = None
    if config.attention == "causal":
        mask = torch.full((inputs.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
    elif config.attention == "padded":
        mask = torch.where(inputs == 0, -torch.inf, 0.0)[:, None, None].to(x.dtype)
    if tower.first is not None:
        x = tower.first(x)
    x = masked_layers(x, tower, gates, z, mask)
    if tower.last is not None:
        x = tower.last(x)
    if config.pool == "mean":
        keep = (inputs != 0).to(x.dtype)[..., None]
        x = (x * keep).sum(1) / keep.sum(1)
    else:
        x = x[torch.arange(len(x)), inputs.argmax(-1)]
    return tower.projection(norm(x, tower.final_norm, z))


@CASES
def test_open_gates_change_nothing(config: Any) -> None:
    tower = tower_of(config)
    gates = Gates.open(config, like=torch.zeros((), dtype=torch.float64))
    for made in (gated(tower, gates), pruned(tower, gates)):
        assert made.config == config
        assert torch.equal(made(inputs_of(config)), tower(inputs_of(config)))


@CASES
def test_what_is_cut_computes_what_is_masked(config: Any) -> None:
    tower = tower_of(config)
    for seed in range(3):
        gates = random_gates(config, seed)
        expected = masked(tower, inputs_of(config), gates)
        for made in (gated(tower, gates), pruned(tower, gates)):
            assert difference(made(inputs_of(config)), expected) < EXACT
        made = pruned(tower, gates)
        assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in tower.parameters())
        assert difference(tower(inputs_of(config)), expected) > 0.01  # the gates do something


@CASES
def test_gradients_reach_weights_and_gates(config: Any) -> None:
    tower = tower_of(config)
    gates = random_gates(config)
    leaves = [*tower.parameters(), gates.attention, gates.feeding, *gates.heads, *gates.neurons]
    leaves += [] if gates.channels is None else [gates.channels]
    weights = len(list(tower.parameters()))
    found, expected = (
        torch.autograd.grad(compute().square().sum(), leaves, allow_unused=True)
        for compute in (
            lambda: gated(tower, gates)(inputs_of(config)),
            lambda: masked(tower, inputs_of(config), gates),
        )
    )
    for index, (leaf, ours, theirs) in enumerate(zip(leaves, found, expected, strict=True)):
        ours = torch.zeros_like(leaf) if ours is None else ours
        theirs = torch.zeros_like(leaf) if theirs is None else theirs
        if index >= weights:  # a learned gate that is closed is clipped, and has no gradient in both
            theirs = theirs * (leaf > 0)
        assert torch.allclose(ours, theirs, rtol=EXACT, atol=EXACT)
    assert all(
        any(bool(value.any()) for value in group if value is not None)
        for group in (found[:weights], found[weights:])
    )


@CASES
def test_the_count_is_that_of_the_layers_that_are_left(config: Any) -> None:
    tower = tower_of(config)
    for gates in (Gates.open(config, like=torch.zeros(())), random_gates(config)):
        opened = Gates(
            None if gates.channels is None else (gates.channels > 0).double(),
            *(tuple((each > 0).double() for each in group) for group in (gates.heads, gates.neurons)),
            *((group > 0).double() for group in (gates.attention, gates.feeding)),
        )
        left = sum(p.numel() for p in pruned(tower, gates).transformer.parameters())
        assert layer_parameters(config, opened).item() == left
    assert left > 0


@pytest.mark.parametrize("config", [VIT, CAUSAL], ids=["vit", "causal"])
def test_the_expected_count_is_the_mean_over_drawn_gates(config: Any) -> None:
    generator = torch.Generator().manual_seed(4)

    def chance(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    layers = len(config.heads)
    probability = Gates(
        chance(config.width),
        # Few heads, so that a part without any has a share.
        tuple(chance(count) for count in config.heads),
        tuple(chance(count) * 0.05 for count in config.hidden_dims),
        chance(layers),
        chance(layers),
    )

    def drawn(values: Tensor) -> Tensor:
        return torch.bernoulli(values, generator=generator)

    counts = [
        layer_parameters(
            config,
            Gates(
                drawn(chances := probability.channels),  # type: ignore[arg-type]
                tuple(map(drawn, probability.heads)),
                tuple(map(drawn, probability.neurons)),
                drawn(probability.attention),
                drawn(probability.feeding),
            ),
        )
        for _ in range(4000)
    ]
    assert chances is not None
    found = torch.stack(counts)
    error = (found.std() / len(counts) ** 0.5).item()
    assert abs(found.mean().item() - layer_parameters(config, probability).item()) < 4 * error


def test_statistics_of_a_stem_move_on() -> None:
    tower = tower_of(STEM).train()
    before = tower.stem.norm1.running_mean.clone()
    made = gated(tower, random_gates(STEM))
    assert made.stem.norm1.training
    tower.stem.norm2.eval()
    assert not gated(tower, random_gates(STEM)).stem.norm2.training
    made(inputs_of(STEM))
    assert not torch.equal(tower.stem.norm1.running_mean, before)
    kept = pruned(tower, random_gates(STEM))
    kept(inputs_of(STEM))
    assert torch.equal(tower.stem.norm1.running_mean, made.stem.norm1.running_mean)
    assert kept.config.stem_dim == 32


@CASES
def test_a_pruned_tower_is_an_ordinary_one(config: Any) -> None:
    tower = tower_of(config)
    made = pruned(tower, random_gates(config))
    fresh = type(tower)(made.config).double().eval()
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    fresh.load_state_dict(made.state_dict())
    expected = made(inputs_of(config))
    assert torch.equal(fresh(inputs_of(config)), expected)
    assert difference(reparameterize(made)(inputs_of(config)), expected) < EXACT
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.zero_()
    assert torch.equal(fresh(inputs_of(config)), expected)


def test_a_tower_can_be_pruned_again() -> None:
    tower = tower_of(STEM)
    once = pruned(tower, random_gates(STEM))
    gates = random_gates(once.config, seed=7)
    assert difference(pruned(once, gates)(inputs_of(STEM)), masked(once, inputs_of(STEM), gates)) < EXACT


def test_closing_every_channel_is_refused() -> None:
    gates = dataclasses.replace(random_gates(VIT), channels=torch.zeros(48))
    with pytest.raises(ConfigError, match="image tower: the gates close all 48 channels"):
        gated(tower_of(VIT), gates)


def test_channels_of_mct_are_refused() -> None:
    gates = dataclasses.replace(random_gates(MCT), channels=torch.ones(32))
    with pytest.raises(ConfigError, match="channels of a tower with 'conv_ends'"):
        pruned(tower_of(MCT), gates)


# Hard concrete gates, against torch's relaxed Bernoulli distribution: the same variable before the stretching


@pytest.mark.parametrize("loga", [-4.0, -1.0, 0.0, 0.7, 4.0])
def test_gates_are_a_stretched_and_clipped_relaxed_bernoulli(loga: float) -> None:
    where = torch.tensor(loga, dtype=torch.float64)
    # s · (ζ - γ) + γ with ζ = 1.1 and γ = -0.1 is below 0 where s is below 1/12.
    limit = 0.1 / 1.2
    relaxed = RelaxedBernoulli(torch.tensor(2 / 3, dtype=torch.float64), logits=where)
    # In the logit of s the density has no poles at the ends.
    logit = torch.linspace(-60, float(torch.logit(torch.tensor(limit))), 200_001, dtype=torch.float64)
    closed = torch.trapezoid(relaxed.base_dist.log_prob(logit).exp(), logit)
    assert chance_of_open(where).item() == pytest.approx(1 - closed.item(), abs=1e-6)

    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(100_000, generator=generator, dtype=torch.float64)
    found = sampled_gates(where.expand(len(noise)), noise)
    share = (found > 0).double().mean().item()
    assert share == pytest.approx(chance_of_open(where).item(), abs=0.006)
    torch.manual_seed(0)
    theirs = (relaxed.sample((100_000,)) * 1.2 - 0.1).clamp(0, 1)
    assert found.mean().item() == pytest.approx(theirs.mean().item(), abs=0.006)
    assert found.std().item() == pytest.approx(theirs.std().item(), abs=0.006)


def test_gates_can_be_learned() -> None:
    noise = torch.tensor([0.3, 0.6, 0.999], dtype=torch.float64)
    loga = torch.tensor([0.4, -0.3, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sampled_gates(a, noise)[:2], loga)
    assert torch.autograd.gradcheck(chance_of_open, loga)
    sampled_gates(loga, noise).sum().backward()
    assert loga.grad is not None
    assert loga.grad[2] == 0  # clipped to 1


def test_deterministic_gates_close_as_many_as_are_expected_to_be() -> None:
    loga = torch.tensor([3.0, -1.0, 0.5, -3.0])
    found = deterministic_gates(loga)
    closed = 4 - chance_of_open(loga).sum().item()
    assert int((found == 0).sum()) == round(closed) == 1
    assert found[3] == 0
    assert torch.allclose(found[:3], (loga[:3] * 1.5 * 0.8).sigmoid())
