"""Pruning of gated TinyCLIP weights against a masked forward pass written for the test alone."""

from __future__ import annotations

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from key_lists import synthetic_state  # noqa: E402
from torch import Tensor  # noqa: E402

from edgeclip.errors import InputError  # noqa: E402
from edgeclip.models.config import TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.foreign import from_state  # noqa: E402
from edgeclip.models.tinyclip import gates, infer_config, plain_names, prune  # noqa: E402
from edgeclip.models.zoo import MODELS  # noqa: E402

# The same sums in another order, in float64.
TOLERANCE = 1e-9
WIDTH, HEADS, HEAD_DIM, LAYERS, HIDDEN = 128, 2, 64, 4, 160
PATCH, SIDE, CONTEXT, VOCAB, EMBED = 8, 32, 12, 60, 20
IMAGE, TEXT = "_image_encoder.", "_text_encoder."
LIKE = MODELS["TinyCLIP-auto-ViT-22M-32-Text-10M"].config
ON, OFF = 10.0, -10.0


def gated_state(seed: int = 0, *, soft: bool = False) -> dict[str, Tensor]:
    """Return a small gated model: heads, neurons, hidden dimensions and whole parts are switched off."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.1) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    def norm() -> dict[str, Tensor]:
        return {"weight": 1 + random(WIDTH), "bias": random(WIDTH)}

    def layers(prefix: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index in range(LAYERS):
            block = f"{prefix}transformer.resblocks.{index}."
            for name in ("ln_1", "ln_2"):
                found |= {f"{block}{name}.{leaf}": value for leaf, value in norm().items()}
            found |= {
                f"{block}attn.in_proj_weight": random(3 * WIDTH, WIDTH),
                f"{block}attn.in_proj_bias": random(3 * WIDTH),
                f"{block}attn.out_proj.weight": random(WIDTH, WIDTH),
                f"{block}attn.out_proj.bias": random(WIDTH, scale=1.0),
                f"{block}mlp.c_fc.weight": random(HIDDEN, WIDTH),
                f"{block}mlp.c_fc.bias": random(HIDDEN),
                f"{block}mlp.c_proj.weight": random(WIDTH, HIDDEN),
                f"{block}mlp.c_proj.bias": random(WIDTH, scale=1.0),
            }
        return found

    def loga(prefix: str) -> dict[str, Tensor]:
        def some(*shape: int) -> Tensor:
            if soft:
                return random(*shape, scale=3.0)
            return torch.where(torch.rand(*shape, generator=generator) < 0.6, ON, OFF).double()

        heads, neurons = some(LAYERS, HEADS), some(LAYERS, HIDDEN)
        heads[0], heads[1], neurons[1], neurons[2] = OFF, OFF, OFF, OFF
        heads[2, 0], heads[3] = ON, ON
        return {
            f"{prefix}l0_module.hidden_loga": some(WIDTH),
            f"{prefix}l0_module.heads_loga": heads,
            f"{prefix}l0_module.intermediate_loga": neurons,
            f"{prefix}l0_module.lambda_1": torch.tensor(10.0),
            f"{prefix}l0_module.lambda_2": torch.tensor(10.0),
        }

    visual = f"{IMAGE}visual."
    return (
        {
            f"{visual}conv1.weight": random(WIDTH, 3, PATCH, PATCH),
            f"{visual}class_embedding": random(WIDTH, scale=1.0),
            f"{visual}positional_embedding": random(1 + (SIDE // PATCH) ** 2, WIDTH, scale=1.0),
            f"{visual}proj": random(WIDTH, EMBED),
            f"{TEXT}token_embedding.weight": random(VOCAB, WIDTH, scale=1.0),
            f"{TEXT}positional_embedding": random(CONTEXT, WIDTH, scale=1.0),
            f"{TEXT}text_projection": random(WIDTH, EMBED),
            "_logit_scale.logit_scale": torch.tensor(3.9, dtype=torch.float64),
        }
        | {f"{visual}ln_pre.{leaf}": value for leaf, value in norm().items()}
        | {f"{visual}ln_post.{leaf}": value for leaf, value in norm().items()}
        | {f"{TEXT}ln_final.{leaf}": value for leaf, value in norm().items()}
        | layers(visual)
        | layers(TEXT)
        | loga(IMAGE)
        | loga(TEXT)
    )


class Masked:
    """The full-width model, every gate a factor; nothing is taken out of a weight."""

    def __init__(self, state: dict[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix
        self.learned = {
            name: state[f"{prefix}l0_module.{name}_loga"] for name in ("hidden", "heads", "intermediate")
        }
        self.hidden = gates(self.learned["hidden"])
        self.inner = "visual." if prefix == IMAGE else ""

    def get(self, name: str) -> Tensor:
        return self.state[self.prefix + self.inner + name]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Normalize over the dimensions that are on, and leave zeros in the others."""
        on = (self.hidden != 0).double()
        mean = (x * on).sum(-1, keepdim=True) / on.sum()
        variance = ((x - mean).square() * on).sum(-1, keepdim=True) / on.sum()
        normal = (x - mean) / (variance + 1e-5).sqrt()
        return on * (normal * self.get(f"{name}.weight") + self.get(f"{name}.bias"))

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        for index in range(LAYERS):
            block = f"transformer.resblocks.{index}."
            heads, neurons = gates(self.learned["heads"][index]), gates(self.learned["intermediate"][index])
            if heads.any():  # without heads, the bias of the output goes too
                y = self.norm(x, f"{block}ln_1")
                y = y @ self.get(f"{block}attn.in_proj_weight").T + self.get(f"{block}attn.in_proj_bias")
                q, k, v = (
                    part.reshape(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for part in y.chunk(3, -1)
                )
                score = q @ k.mT / math.sqrt(HEAD_DIM)
                if mask is not None:
                    score = score.masked_fill(mask, -torch.inf)
                y = (score.softmax(-1) @ v) * heads[:, None, None]
                y = y.transpose(1, 2).reshape(batch, length, WIDTH)
                y = y @ self.get(f"{block}attn.out_proj.weight").T + self.get(f"{block}attn.out_proj.bias")
                x = x + y * self.hidden
            y = self.norm(x, f"{block}ln_2")
            y = F.gelu(y @ self.get(f"{block}mlp.c_fc.weight").T + self.get(f"{block}mlp.c_fc.bias"))
            y = (y * neurons) @ self.get(f"{block}mlp.c_proj.weight").T + self.get(f"{block}mlp.c_proj.bias")
            x = x + y * self.hidden
        return x

    def image(self, pixels: Tensor) -> Tensor:
        x = F.conv2d(pixels, self.get("conv1.weight"), stride=PATCH).flatten(2).mT
        first = self.get("class_embedding").expand(len(x), 1, -1)
        x = (torch.cat([first, x], dim=1) + self.get("positional_embedding")) * self.hidden
        x = self.layers(self.norm(x, "ln_pre"))
        return self.norm(x[:, 0], "ln_post") @ (self.get("proj") * self.hidden[:, None])

    def text(self, tokens: Tensor) -> Tensor:
        x = (self.get("token_embedding.weight")[tokens] + self.get("positional_embedding")) * self.hidden
        later = torch.ones(CONTEXT, CONTEXT).triu(1).bool()
        x = self.norm(self.layers(x, later), "ln_final")
        end = x[torch.arange(len(x)), tokens.argmax(-1)]
        return end @ (self.get("text_projection") * self.hidden[:, None])


@pytest.mark.parametrize("soft", [False, True], ids=["on-off", "soft"])
@pytest.mark.parametrize("seed", [0, 1])
def test_pruned_model_computes_what_the_masked_one_does(seed: int, soft: bool) -> None:
    state = gated_state(seed, soft=soft)
    pruned = prune(state)
    config = infer_config(pruned, LIKE)
    assert isinstance(config.image, ViTConfig)
    assert isinstance(config.text, TextTransformerConfig)
    assert config.image_size_px == (SIDE, SIDE)
    assert (config.image.heads[0], config.image.hidden_dims[1:3]) == (0, (0, 0))
    assert 0 < config.image.width < WIDTH
    assert 0 < config.text.width < WIDTH

    found = from_state(state)
    assert found.source == "tinyclip"
    assert (found.config.image, found.config.text) == (config.image, config.text)
    model = found.model.double()
    # Loading rounds to float32; the comparison wants the weights as they were pruned.
    from edgeclip.models.foreign import key_map

    shapes = {key: value.shape for key, value in model.state_dict().items()}
    model.load_state_dict(key_map(config, "tinyclip").to_ours(pruned, shapes, where="x"))
    generator = torch.Generator().manual_seed(9)
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, VOCAB - 1, (3, CONTEXT), generator=generator)
    tokens[:, 7] = VOCAB - 1
    with torch.no_grad():
        for mine, other in (
            (model.encode_image(pixels), Masked(state, IMAGE).image(pixels)),
            (model.encode_text(tokens), Masked(state, TEXT).text(tokens)),
        ):
            assert (mine - other).abs().max() <= TOLERANCE * other.abs().max()
            # A collapsed tower would agree with anything.
            assert (other[0] - other[1]).abs().max() > 0.05 * other.abs().max()


def test_pruning_a_pruned_model_changes_nothing() -> None:
    once = prune(gated_state())
    twice = prune(once)
    assert set(twice) == set(once)
    assert all(torch.equal(twice[key], value) for key, value in once.items())


def test_part_without_neurons_in_a_file_leaves_its_constant_before() -> None:
    """The published pruning keeps a feed-forward part of no neurons, whose output is its bias."""
    state = prune(gated_state())
    width = state[f"{IMAGE}visual.ln_post.weight"].shape[0]
    block = f"{IMAGE}visual.transformer.resblocks.3."
    before = state[f"{block}attn.out_proj.bias"]
    constant = torch.randn(width, generator=torch.Generator().manual_seed(0)).double()
    empty = state | {
        f"{block}mlp.c_fc.weight": torch.zeros(0, width).double(),
        f"{block}mlp.c_fc.bias": torch.zeros(0).double(),
        f"{block}mlp.c_proj.weight": torch.zeros(width, 0).double(),
        f"{block}mlp.c_proj.bias": constant,
    }
    pruned = prune(empty)
    assert torch.equal(pruned[f"{block}attn.out_proj.bias"], before + constant)
    assert not [key for key in pruned if key.startswith((f"{block}mlp", f"{block}ln_2"))]


@pytest.mark.parametrize(
    ("loga", "expected"),
    [
        ([10.0, 10.0, 10.0], [1, 1, 1]),
        ([-10.0, 10.0, -10.0], [0, 1, 0]),
        ([-10.0] * 3, [0, 0, 0]),
    ],
)
def test_gates_far_from_zero_are_on_or_off(loga: list[float], expected: list[int]) -> None:
    found = gates(torch.tensor(loga))
    assert torch.allclose(found, torch.tensor(expected).float(), atol=1e-5)
    assert (found == 0).tolist() == [not on for on in expected]


def test_as_many_gates_are_zero_as_are_expected_to_be() -> None:
    loga = torch.linspace(-3, 3, 101, dtype=torch.float64)
    # P(z = 0) of a hard concrete gate with limits -0.1 and 1.1 at temperature 2/3.
    expected = torch.sigmoid(-loga - math.log(11) * 2 / 3).sum().item()
    found = gates(loga)
    assert int((found == 0).sum()) == round(expected)
    assert torch.allclose(found[found != 0], torch.sigmoid(loga[found != 0] * 1.2))


def test_gate_of_a_whole_part_is_a_scalar() -> None:
    assert gates(torch.tensor(OFF)) == 0
    assert gates(torch.tensor(ON)) > 0.99


@pytest.mark.parametrize(("part", "other"), [("mha", "attn"), ("ffn", "mlp")])
def test_gates_of_whole_parts_take_them_out(part: str, other: str) -> None:
    state = gated_state()
    for prefix in (IMAGE, TEXT):
        state[f"{prefix}l0_module.{part}_loga"] = torch.tensor([ON, ON, ON, OFF])
    pruned = prune(state)
    assert not [key for key in pruned if f"resblocks.3.{other}" in key]
    assert [key for key in pruned if "resblocks.3." in key]


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("_encoder.", "_encoder.module.").replace("scale.", "scale.module."),
        lambda key: key.replace("_image_encoder", "image_encoder_without_ddp").replace(
            "_text_encoder", "text_encoder_without_ddp"
        ),
    ],
)
def test_names_of_distributed_training_are_plain(rename: object) -> None:
    state = gated_state()
    renamed = {rename(key): value for key, value in state.items()}  # type: ignore[operator]
    assert set(renamed) != set(state)
    assert set(plain_names(renamed)) == set(state)


def test_towers_under_two_names_are_one() -> None:
    state = gated_state()
    doubled = state | {
        key.replace("_image_encoder", "image_encoder_without_ddp"): value for key, value in state.items()
    }
    assert set(plain_names(doubled)) == set(state)


def test_gates_of_another_size_are_refused() -> None:
    state = gated_state()
    state[f"{IMAGE}l0_module.heads_loga"] = torch.full((LAYERS, 5), ON)
    with pytest.raises(InputError, match=r"gates below '_image_encoder\.l0_module\.' do not fit"):
        prune(state)


def test_gates_that_leave_nothing_are_refused() -> None:
    state = gated_state()
    state[f"{TEXT}l0_module.hidden_loga"] = torch.full((WIDTH,), OFF)
    with pytest.raises(InputError, match="leave none of 128 hidden dimensions"):
        prune(state)


def test_missing_weight_is_named() -> None:
    state = gated_state()
    del state[f"{IMAGE}visual.transformer.resblocks.3.attn.in_proj_weight"]
    with pytest.raises(InputError, match=r"KeyError: 'attn\.in_proj_weight'"):
        prune(state)


def test_sizes_need_their_tensors() -> None:
    state = prune(gated_state())
    del state[f"{TEXT}token_embedding.weight"]
    with pytest.raises(InputError, match=r"cannot be read off its weights \(KeyError: .*token_embedding"):
        infer_config(state, LIKE)


def test_manual_model_under_these_names_is_known() -> None:
    """Sizes that the zoo has are called by its name, whoever named the tensors."""
    state = {}
    for key, value in synthetic_state("tinyclip-ViT-8M-16-Text-3M").items():
        plain = key.removeprefix("module.")
        prefix = "_logit_scale." if plain == "logit_scale" else IMAGE if plain.startswith("visual.") else TEXT
        state[prefix + plain] = value
    found = from_state(state)
    assert found.candidates == ("TinyCLIP-ViT-8M-16-Text-3M",)
    assert found.config == MODELS["TinyCLIP-ViT-8M-16-Text-3M"].config


def test_pruned_release_takes_the_name_that_is_said() -> None:
    found = from_state(synthetic_state("tinyclip-auto-pruned"), model="TinyCLIP-auto-ViT-22M-32-Text-10M")
    assert found.name == "TinyCLIP-auto-ViT-22M-32-Text-10M"
    assert found.config.image == dataclasses.replace(
        found.config.image, width=549, patch_px=32, grid=(7, 7), head_dim=64, activation="gelu"
    )
    assert found.licence == "MIT"


def test_pruned_weights_at_the_root_need_the_name() -> None:
    state = {}
    for key, value in plain_names(synthetic_state("tinyclip-auto-pruned")).items():
        state[key.removeprefix("_logit_scale.").removeprefix(IMAGE).removeprefix(TEXT)] = value
    found = from_state(state, model="TinyCLIP-auto-ViT-45M-32-Text-18M.LAION400M")
    assert found.config.text.width == 510  # type: ignore[union-attr]


@pytest.mark.slow
def test_gated_names_of_full_size_load() -> None:
    state = synthetic_state("tinyclip-auto-masked")
    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if key.endswith("_loga"):
            state[key] = torch.where(torch.rand(value.shape, generator=generator) < 0.6, ON, OFF)
        else:
            state[key] = torch.zeros(value.shape, dtype=torch.float16)
    found = from_state(state)
    assert found.name.startswith("TinyCLIP-auto-ViT-")
    kept = int((gates(state[f"{IMAGE}module.l0_module.hidden_loga"]) != 0).sum())
    assert isinstance(found.config.image, ViTConfig)
    assert found.config.image.width == kept
