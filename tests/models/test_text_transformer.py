"""Our transformer text towers against open_clip's, and MCt against its formulas, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
import torchvision_shim  # noqa: E402, F401
from key_lists import read_keys  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from towers import RELATIVE, below_any, difference, loaded, random_weights, round_trip  # noqa: E402

from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models import text_transformer  # noqa: E402
from edgeclip.models.config import TextTransformerConfig  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.models.text_transformer import TextTransformer  # noqa: E402

open_clip = pytest.importorskip("open_clip")

END = 49
TINY = TextTransformerConfig(
    vocab_size=50,
    context_length=12,
    width=32,
    heads=(2, 2),
    hidden_dims=(64, 64),
    head_dim=16,
    embed_dim=24,
)
TINY_MCT = dataclasses.replace(TINY, attention="full", conv_ends=True, conv_kernel=5)
COMPACT = dataclasses.replace(TINY, attention="padded", pool="mean", pad_id=49, token_dim=8)
CONFIGS = {
    "causal": TINY,
    "quick": dataclasses.replace(TINY, activation="quick-gelu"),
    "full": dataclasses.replace(TINY, attention="full"),
    "padded": dataclasses.replace(TINY, attention="padded"),
    "causal-mean": dataclasses.replace(TINY, pool="mean"),
    "mct": TINY_MCT,
    "mct-mean": dataclasses.replace(TINY_MCT, pool="mean"),
    "compact": COMPACT,
    "pruned": dataclasses.replace(TINY, heads=(2, 0, 1), hidden_dims=(0, 40, 8), width=24),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EOT = {name: config for name, config in CONFIGS.items() if config.pool == "eot"}
OPEN_CLIP_TEXT = {
    "context_length": 12,
    "vocab_size": 50,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "mlp_ratio": 2.0,
}
VISION = {"layers": 1, "width": 16, "head_width": 16, "patch_size": 8, "image_size": 8}


def rows(config: TextTransformerConfig, lengths: tuple[int, ...] = (12, 5, 3)) -> Tensor:
    """Return texts of several lengths: words, an end token, padding."""
    generator = torch.Generator().manual_seed(1)
    limit = config.context_length
    end = max(id_ for id_ in range(config.vocab_size) if id_ != config.pad_id)
    tokens = torch.randint(1, end, (len(lengths), limit), generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[min(length, limit) - 1] = end
        row[length:] = config.pad_id
    return tokens


# --- the reference ----------------------------------------------------------------------------------------


def open_clip_text(text: Mapping[str, Any], embed_dim: int = 24, **other: Any) -> nn.Module:
    model = open_clip.model.CLIP(embed_dim, dict(VISION), dict(text), **other)
    return random_weights(model)


def text_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the text tower's tensors as OpenAI's layout has them: at the root, among others."""
    return {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith(("visual.", "logit_scale"))
    }


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick-gelu"])
@pytest.mark.parametrize("attention", ["causal", "full"])
def test_equals_open_clip(attention: str, quick: bool) -> None:
    config = dataclasses.replace(TINY, attention=attention, activation="quick-gelu" if quick else "gelu")
    reference = open_clip_text(OPEN_CLIP_TEXT | {"no_causal_mask": attention == "full"}, quick_gelu=quick)
    ours = loaded(TextTransformer(config), text_transformer.openai_keys(config), text_state(reference))
    tokens = rows(config)
    with torch.no_grad():
        wanted = reference.encode_text(tokens)
        assert difference(ours(tokens), wanted) < RELATIVE
        assert difference(ours(tokens[1:2]), wanted[1:2]) < RELATIVE


def test_equals_open_clip_with_custom_text_and_padding_left_out() -> None:
    config = dataclasses.replace(TINY, attention="padded")
    reference = random_weights(
        open_clip.transformer.TextTransformer(
            **OPEN_CLIP_TEXT, output_dim=24, no_causal_mask=True, use_pad_mask=True, pad_id=0
        )
    )
    ours = loaded(TextTransformer(config), text_transformer.openai_keys(config), reference.state_dict())
    tokens = rows(config)
    with torch.no_grad():
        assert difference(ours(tokens), reference(tokens)) < RELATIVE


def mct(state: Mapping[str, Tensor], tokens: Tensor, *, layers: int, heads: int) -> Tensor:
    """Embed tokens by the formulas of MobileCLIP-S0's text encoder, under Apple's names."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def batch_norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])

    def depthwise(x: Tensor, name: str) -> Tensor:  # (B, D, L)
        weight = state[f"{name}.weight"][:, :, 0]
        return F.conv1d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])

    def conv_block(x: Tensor, name: str) -> Tensor:  # (B, L, D)
        x = x.mT
        mixer = f"{name}.token_mixer"
        mixed = batch_norm(
            depthwise(x, f"{mixer}.mixer.rbr_conv.0.conv"), f"{mixer}.mixer.rbr_conv.0.bn"
        ) + batch_norm(x, f"{mixer}.mixer.rbr_skip")
        scale = state[f"{mixer}.layer_scale"][:, :, 0]
        x = x + scale * (mixed - batch_norm(x, f"{mixer}.norm.rbr_skip"))
        y = batch_norm(depthwise(x, f"{name}.convffn.conv.conv"), f"{name}.convffn.conv.bn").mT
        y = linear(F.gelu(linear(y, f"{name}.convffn.fc1")), f"{name}.convffn.fc2")
        return x.mT + state[f"{name}.layer_scale"][:, 0, 0] * y

    def layer(x: Tensor, name: str) -> Tensor:
        batch, length, width = x.shape
        qkv = linear(norm(x, f"{name}.pre_norm_mha.0"), f"{name}.pre_norm_mha.1.qkv_proj")
        q, k, v = qkv.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weight = (q @ k.mT / (width // heads) ** 0.5).softmax(dim=-1)
        mixed = (weight @ v).transpose(1, 2).reshape(x.shape)
        x = x + linear(mixed, f"{name}.pre_norm_mha.1.out_proj")
        hidden = F.gelu(linear(norm(x, f"{name}.pre_norm_ffn.0"), f"{name}.pre_norm_ffn.1"))
        return x + linear(hidden, f"{name}.pre_norm_ffn.4")

    x = state["embedding_layer.weight"][tokens] + state["positional_embedding.pos_embed.pos_embed"][0, 0]
    x = conv_block(x, "transformer.0")
    for index in range(layers):
        x = layer(x, f"transformer.{index + 1}")
    x = norm(conv_block(x, f"transformer.{layers + 1}"), "final_layer_norm")
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ state["projection_layer"]


@pytest.mark.parametrize(
    "config",
    [
        TINY_MCT,
        pytest.param(
            TextTransformerConfig(
                vocab_size=49408,
                context_length=77,
                width=512,
                heads=(8,) * 4,
                hidden_dims=(2048,) * 4,
                attention="full",
                conv_ends=True,
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tiny", "full-size"],
)
def test_mct_equals_its_formulas(config: TextTransformerConfig) -> None:
    tower = random_weights(TextTransformer(config))
    theirs = text_transformer.apple_keys(config).to_theirs(tower.state_dict())
    tokens = rows(config)
    with torch.no_grad():
        wanted = mct(theirs, tokens, layers=len(config.heads), heads=config.heads[0])
        assert difference(tower(tokens), wanted) < RELATIVE
        assert difference(tower(tokens[1:2]), wanted[1:2]) < RELATIVE
        assert difference(reparameterize(tower)(tokens), wanted) < RELATIVE


# --- laws -------------------------------------------------------------------------------------------------


@ALL
def test_folded_equals_unfolded(config: TextTransformerConfig) -> None:
    tower = random_weights(TextTransformer(config))
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    folded = reparameterize(tower)
    tokens = rows(config)
    with torch.no_grad():
        assert difference(folded(tokens), tower(tokens)) < RELATIVE
        assert difference(folded.forward_tokens(tokens), tower.forward_tokens(tokens)) < RELATIVE
        assert torch.equal(reparameterize(folded)(tokens), folded(tokens))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not [key for key in folded.state_dict() if "layer_scale" in key]
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())


@pytest.mark.parametrize("config", EOT.values(), ids=EOT)
def test_embedding_is_the_end_token_of_all_tokens(config: TextTransformerConfig) -> None:
    tower = random_weights(TextTransformer(config))
    tokens = rows(config)
    with torch.no_grad():
        every = tower.forward_tokens(tokens)
        end = every[torch.arange(len(tokens)), tokens.argmax(dim=-1)]
        assert difference(tower(tokens), tower.projection(end)) < RELATIVE


def test_mean_is_over_the_tokens_that_are_not_padding() -> None:
    tower = random_weights(TextTransformer(COMPACT))
    tower.final_norm = nn.Identity()
    tokens = rows(COMPACT)
    with torch.no_grad():
        every = tower.forward_tokens(tokens)
        wanted = torch.stack(
            [states[row != COMPACT.pad_id].mean(dim=0) for states, row in zip(every, tokens, strict=True)]
        )
        assert difference(tower(tokens), tower.projection(wanted)) < RELATIVE


@ALL
def test_batch_of_n_equals_n_singles(config: TextTransformerConfig) -> None:
    tower = random_weights(TextTransformer(config))
    tokens = rows(config)
    with torch.no_grad():
        singles = torch.cat([tower(row[None]) for row in tokens])
        assert difference(tower(tokens), singles) < RELATIVE


def test_causal_tokens_do_not_see_what_follows() -> None:
    tower = random_weights(TextTransformer(TINY))
    tokens = rows(TINY)
    changed = tokens.clone()
    changed[:, 8:] = 7
    with torch.no_grad():
        before, after = tower.forward_tokens(tokens), tower.forward_tokens(changed)
    assert difference(after[:, :8], before[:, :8]) < RELATIVE
    assert difference(after[:, 8:], before[:, 8:]) > 1e-3


def test_padding_is_left_out_whatever_its_length() -> None:
    tower = random_weights(TextTransformer(COMPACT))
    tokens = rows(COMPACT, (3, 2, 3))
    with torch.no_grad():
        wanted = tower(tokens)
        for length in (3, 4, 9):
            assert difference(tower(tokens[:, :length]), wanted) < RELATIVE


def test_int32_tokens_equal_int64_tokens() -> None:
    tower = random_weights(TextTransformer(TINY))
    with torch.no_grad():
        assert torch.equal(tower(rows(TINY).int()), tower(rows(TINY)))


def test_a_text_without_tokens_gives_a_finite_embedding() -> None:
    tower = random_weights(TextTransformer(COMPACT))
    with torch.no_grad():
        assert tower(torch.full((2, 12), COMPACT.pad_id)).isfinite().all()


@ALL
def test_training_starts_with_a_finite_gradient_for_every_weight(config: TextTransformerConfig) -> None:
    torch.manual_seed(0)
    tower = TextTransformer(config)
    tower(rows(config)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in tower.parameters())


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["openai_keys", "apple_keys", "hf_keys"])
def test_round_trip_is_bit_identical(name: str) -> None:
    round_trip(random_weights(TextTransformer(TINY)), getattr(text_transformer, name)(TINY))


def test_round_trip_of_mct_through_apple_is_bit_identical() -> None:
    round_trip(random_weights(TextTransformer(TINY_MCT)), text_transformer.apple_keys(TINY_MCT))


def test_towers_a_source_lacks_have_no_names_there() -> None:
    with pytest.raises(ConfigError, match="OpenAI's text tower has conv_ends False, this tower True"):
        text_transformer.openai_keys(TINY_MCT)
    with pytest.raises(ConfigError, match="Apple's text tower has token_dim 0, this tower 8"):
        text_transformer.apple_keys(COMPACT)
    with pytest.raises(ConfigError, match="transformers' text tower has token_dim 0, this tower 8"):
        text_transformer.hf_keys(COMPACT)


# --- errors -----------------------------------------------------------------------------------------------


def test_convolutions_need_full_attention_and_an_odd_kernel() -> None:
    with pytest.raises(ConfigError, match="'attention' is 'causal' and 'conv_kernel' 11"):
        TextTransformer(dataclasses.replace(TINY, conv_ends=True))
    with pytest.raises(ConfigError, match="'attention' is 'full' and 'conv_kernel' 4"):
        TextTransformer(dataclasses.replace(TINY_MCT, conv_kernel=4))


def test_end_of_text_cannot_be_found_where_padding_has_the_largest_id() -> None:
    with pytest.raises(ConfigError, match=r"that is padding \(id 49 of 50\)"):
        TextTransformer(dataclasses.replace(COMPACT, pool="eot"))


def test_rows_that_are_too_long_or_too_short_are_refused() -> None:
    with pytest.raises(InputError, match=r"got \(1, 13\) tokens, expected \(B, 12\) at most"):
        TextTransformer(TINY)(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(InputError, match=r"got \(1, 11\) tokens, expected \(B, 12\); padding takes part"):
        TextTransformer(TINY_MCT)(torch.ones(1, 11, dtype=torch.int64))


# --- export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "most"),
    [(TINY, 70), (COMPACT, 69), (TINY_MCT, 88)],
    ids=["causal", "compact", "mct"],
)
def test_traced_tower_equals_eager(config: TextTransformerConfig, most: int) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    import onnxruntime

    from edgeclip.export.trace import trace_text_tower

    tower = random_weights(TextTransformer(config), dtype=torch.float32)
    graph = trace_text_tower(reparameterize(tower), config.context_length)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens = rows(config, (12, 5, 3, 7, 2))
    got = torch.from_numpy(session.run(None, {"tokens": tokens.int().numpy()})[0])
    with torch.no_grad():
        wanted = F.normalize(tower(tokens), dim=-1)
    assert (got - wanted).abs().max().item() < 1e-5
    kinds = [node.op_type for node in graph.graph.node]
    assert len(kinds) <= most
    assert not {"BatchNormalization", "Shape", "Concat", "Squeeze", "Where", "Slice"} & set(kinds)


# --- full size --------------------------------------------------------------------------------------------


def full_text(width: int, layers: int, **other: Any) -> TextTransformerConfig:
    return TextTransformerConfig(
        vocab_size=49408,
        context_length=77,
        width=width,
        heads=(width // 64,) * layers,
        hidden_dims=(4 * width,) * layers,
        **other,
    )


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (full_text(512, 4, attention="full", conv_ends=True), 42441216),
        (full_text(512, 12), 63428096),
        (full_text(768, 12, attention="full", embed_dim=768), 123650304),
        (full_text(256, 3), 15169024),
    ],
    ids=["MCt", "base", "large", "TinyCLIP-3M"],
)
def test_published_sizes(config: TextTransformerConfig, parameters: int) -> None:
    with torch.device("meta"):
        tower = TextTransformer(config)
    assert sum(value.numel() for value in tower.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("hf-clip-vit-base-patch32", full_text(512, 12)),
        ("hf-clip-vit-large-patch14", full_text(768, 12, embed_dim=768)),
    ],
)
def test_names_of_transformers_are_all_known(name: str, config: TextTransformerConfig) -> None:
    listed = below_any(read_keys(name), ("text_model.", "text_projection."))
    with torch.device("meta"):
        tower = TextTransformer(config)
        state = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in listed.items()}
    loaded(tower, text_transformer.hf_keys(config), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "layers", "attention"),
    [(512, 12, "causal"), (512, 12, "full"), (256, 3, "causal")],
    ids=["base-causal", "base-full", "TinyCLIP-3M"],
)
def test_full_size_equals_open_clip(width: int, layers: int, attention: str) -> None:
    quick = width == 256
    config = full_text(width, layers, attention=attention, activation="quick-gelu" if quick else "gelu")
    text = {"width": width, "heads": width // 64, "layers": layers, "no_causal_mask": attention == "full"}
    reference = open_clip_text(text, 512, quick_gelu=quick)
    with torch.device("meta"):
        ours = TextTransformer(config)
    ours = loaded(ours, text_transformer.openai_keys(config), text_state(reference))
    tokens = rows(config, (77, 9, 4))
    with torch.no_grad():
        wanted = reference.encode_text(tokens)
        assert difference(ours(tokens), wanted) < RELATIVE
        assert difference(ours(tokens[1:2]), wanted[1:2]) < RELATIVE


@pytest.mark.full
def test_full_size_large_equals_open_clip() -> None:
    config = full_text(768, 12, attention="full", embed_dim=768)
    text = {"width": 768, "heads": 12, "layers": 12, "no_causal_mask": True}
    reference = open_clip_text(text, 768)
    with torch.device("meta"):
        ours = TextTransformer(config)
    ours = loaded(ours, text_transformer.openai_keys(config), text_state(reference))
    tokens = rows(config, (77, 9, 4))
    with torch.no_grad():
        assert difference(ours(tokens), reference.encode_text(tokens)) < RELATIVE
