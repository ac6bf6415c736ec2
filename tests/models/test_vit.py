"""Our vision transformer against open_clip's and timm's, weight for weight, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torchvision_shim  # noqa: E402, F401
from key_lists import read_keys  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from towers import RELATIVE, below, below_any, difference, loaded, random_weights, round_trip  # noqa: E402

from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models import vit  # noqa: E402
from edgeclip.models.config import CLIPConfig, TextTransformerConfig, ViTConfig  # noqa: E402
from edgeclip.models.keys import KeyMap  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.models.vit import VisionTransformer, with_grid  # noqa: E402

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

TINY = ViTConfig(
    width=32, heads=(2, 2), hidden_dims=(64, 64), head_dim=16, patch_px=8, grid=(4, 4), embed_dim=24
)
# A quarter of the width is the conv stem's channels from width 128 on, in Apple's code and here.
TINY_CONV = ViTConfig(
    width=128,
    heads=(2, 2),
    hidden_dims=(256, 256),
    patch_px=16,
    grid=(3, 3),
    stem="conv",
    class_position=False,
    pre_norm=False,
    embed_dim=24,
)
TINY_APPLE = dataclasses.replace(TINY_CONV, stem_padding_px=1)
BOTH = pytest.mark.parametrize("config", [TINY, TINY_CONV, TINY_APPLE], ids=["patch", "conv", "apple"])


def picture(config: ViTConfig, batch: int = 3) -> Tensor:
    rows, columns = config.grid
    generator = torch.Generator().manual_seed(1)
    size = (rows * config.patch_px, columns * config.patch_px)
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator)


def assert_equal_towers(config: ViTConfig, keys: KeyMap, reference: nn.Module) -> None:
    with torch.device("meta"):
        ours = VisionTransformer(config)
    ours = loaded(ours, keys, reference.state_dict())
    image = picture(config)
    with torch.no_grad():
        wanted = reference(image)
        assert difference(ours(image), wanted) < RELATIVE
        assert difference(ours(image[:1]), wanted[:1]) < RELATIVE


def open_clip_model(embed_dim: int, vision: Mapping[str, Any], *, quick_gelu: bool = False) -> nn.Module:
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1}
    model = open_clip.model.CLIP(embed_dim, dict(vision), text, quick_gelu=quick_gelu)
    return random_weights(model).visual


# --- the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "quick-gelu"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)], ids=["square", "wide"])
def test_equals_open_clip(activation: str, grid: tuple[int, int]) -> None:
    config = dataclasses.replace(TINY, activation=activation, grid=grid)
    vision = {
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "mlp_ratio": 2.0,
        "patch_size": 8,
        "image_size": (grid[0] * 8, grid[1] * 8),
    }
    reference = open_clip_model(24, vision, quick_gelu=activation == "quick-gelu")
    assert_equal_towers(config, vit.openai_keys(config), reference)


def test_equals_open_clip_without_the_first_norm() -> None:
    config = dataclasses.replace(TINY, pre_norm=False)
    vision = {"layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8}
    reference = open_clip_model(24, vision | {"image_size": 32, "no_ln_pre": True})
    assert_equal_towers(config, vit.openai_keys(config), reference)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_equals_timm(pre_norm: bool) -> None:
    config = dataclasses.replace(TINY, pre_norm=pre_norm)
    reference = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        pre_norm=pre_norm,
        num_classes=24,
        global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    assert_equal_towers(config, vit.timm_keys(config), zero_biases(random_weights(reference)))


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-6])
def test_conv_stem_equals_timm(norm_eps: float) -> None:
    config = dataclasses.replace(TINY_CONV, norm_eps=norm_eps)
    assert_equal_towers(config, vit.timm_keys(config), timm_conv(config))


def test_conv_stem_with_apples_padding_equals_timm_on_a_padded_stem() -> None:
    config = dataclasses.replace(TINY_CONV, stem_padding_px=1)
    reference = timm_conv(config)
    reference.patch_embed.backbone[0].conv.padding = (1, 1)
    assert_equal_towers(config, vit.timm_keys(config), reference)


def timm_conv(config: ViTConfig) -> nn.Module:
    hybrid = timm.models.vision_transformer_hybrid
    width, patch = config.width, config.patch_px
    backbone = hybrid.ConvStem(
        channels=(width // 4, width // 4, width),
        stride=(patch // 4, 2, 2),
        kernel_size=(patch // 4, 2, 2),
        padding=0,
        act_layer=nn.GELU,
    )
    reference = timm.models.vision_transformer.VisionTransformer(
        img_size=patch * config.grid[0],
        patch_size=1,
        embed_layer=partial(hybrid.HybridEmbed, backbone=backbone, proj=False),
        embed_dim=width,
        depth=len(config.heads),
        num_heads=config.heads[0],
        mlp_ratio=config.hidden_dims[0] / width,
        no_embed_class=True,
        num_classes=config.embed_dim,
        global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
    )
    return zero_biases(random_weights(reference))


def zero_biases(reference: nn.Module) -> nn.Module:
    """Make the biases zero that a converted checkpoint holds as zeros."""
    for name, value in reference.named_parameters():
        if name in ("head.bias", "patch_embed.proj.bias"):
            nn.init.zeros_(value)
    return reference


def test_timm_computes_mobileclip_b_with_another_epsilon_and_padding_than_apple() -> None:
    """Why both are numbers of the config; a change in timm would show here."""
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_mci_224", num_classes=512, global_pool="token")
        large = timm.create_model("vit_large_patch14_clip_224", num_classes=768, global_pool="token")
    assert {module.eps for module in theirs.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert theirs.patch_embed.backbone[0].conv.padding == (0, 0)
    assert {module.eps for module in large.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


# --- laws -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("activation", ["gelu", "quick-gelu"])
def test_folded_equals_unfolded(config: ViTConfig, activation: str) -> None:
    tower = random_weights(VisionTransformer(dataclasses.replace(config, activation=activation)))
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    folded = reparameterize(tower)
    image = picture(config)
    with torch.no_grad():
        assert difference(folded(image), tower(image)) < RELATIVE
        assert difference(folded.forward_tokens(image), tower.forward_tokens(image)) < RELATIVE
        assert torch.equal(reparameterize(folded)(image), folded(image))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())


@BOTH
def test_embedding_is_the_class_token_of_all_tokens(config: ViTConfig) -> None:
    tower = random_weights(VisionTransformer(config))
    image = picture(config)
    with torch.no_grad():
        tokens = tower.forward_tokens(image)
        assert tokens.shape == (3, 1 + config.grid[0] * config.grid[1], config.width)
        assert difference(tower(image), tower.projection(tokens[:, 0])) < RELATIVE


def test_pruned_layers_run_fold_and_keep_their_names() -> None:
    config = dataclasses.replace(TINY, heads=(2, 1, 0), hidden_dims=(0, 40, 8), width=24)
    tower = random_weights(VisionTransformer(config))
    image = picture(config)
    with torch.no_grad():
        assert difference(reparameterize(tower)(image), tower(image)) < RELATIVE
    round_trip(tower, vit.openai_keys(config))


def test_training_starts_with_a_finite_gradient_for_every_weight() -> None:
    torch.manual_seed(0)
    tower = VisionTransformer(TINY)
    tower(picture(TINY).float()).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in tower.parameters())


@pytest.mark.parametrize("name", ["openai_keys", "timm_keys", "apple_keys", "hf_keys"])
def test_round_trip_is_bit_identical(name: str) -> None:
    config = TINY_CONV if name == "apple_keys" else TINY
    round_trip(random_weights(VisionTransformer(config)), getattr(vit, name)(config))


def test_round_trip_of_the_conv_stem_through_timm_is_bit_identical() -> None:
    round_trip(random_weights(VisionTransformer(TINY_CONV)), vit.timm_keys(TINY_CONV))


def test_towers_a_source_lacks_have_no_names_there() -> None:
    with pytest.raises(ConfigError, match="OpenAI's ViT has stem 'patch', this tower 'conv'"):
        vit.openai_keys(TINY_CONV)
    with pytest.raises(ConfigError, match="Apple's ViT has stem 'conv', this tower 'patch'"):
        vit.apple_keys(TINY)
    with pytest.raises(ConfigError, match="transformers' ViT has pre_norm True, this tower False"):
        vit.hf_keys(dataclasses.replace(TINY, pre_norm=False))
    with pytest.raises(ConfigError, match="has projection_bias False, this tower True"):
        vit.openai_keys(dataclasses.replace(TINY, projection_bias=True))


def test_projection_bias_has_a_name_in_timm() -> None:
    config = dataclasses.replace(TINY, projection_bias=True)
    round_trip(random_weights(VisionTransformer(config)), vit.timm_keys(config))


# --- input size -------------------------------------------------------------------------------------------


def test_pictures_of_another_size_are_refused() -> None:
    tower = VisionTransformer(TINY)
    with pytest.raises(InputError, match=r"got pixels of shape \(1, 3, 40, 32\), expected \(B, 3, 32, 32\)"):
        tower(torch.zeros(1, 3, 40, 32))


def test_another_grid_interpolates_as_open_clip_does() -> None:
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    small, large = (open_clip_model(24, vision | {"image_size": size}) for size in (32, 56))
    state = {f"visual.{key}": value.float() for key, value in small.state_dict().items()}
    config = dataclasses.replace(TINY, heads=(2,), hidden_dims=(128,))
    tower = loaded(VisionTransformer(config), vit.openai_keys(config), below(state, "visual."))
    made = with_grid(tower, (7, 7))

    class Holder(nn.Module):
        visual = large

    open_clip.model.resize_pos_embed(state, Holder())
    assert difference(made.positions.table, state["visual.positional_embedding"]) < 1e-6
    assert made.config.grid == (7, 7)
    assert made(torch.zeros(1, 3, 56, 56)).shape == (1, 24)
    assert tower.config.grid == (4, 4)
    assert tower(torch.zeros(1, 3, 32, 32)).shape == (1, 24)


def test_same_grid_changes_nothing() -> None:
    tower = random_weights(VisionTransformer(TINY_CONV), dtype=torch.float32)
    assert difference(with_grid(tower, (3, 3)).positions.table, tower.positions.table) < 1e-6


def test_grids_that_cannot_be_made_are_refused() -> None:
    tower = VisionTransformer(TINY)
    with pytest.raises(ConfigError, match=r"got grid \(0, 4\)"):
        with_grid(tower, (0, 4))
    with pytest.raises(ConfigError, match=r"folded already, so grid \(5, 5\)"):
        with_grid(reparameterize(tower), (5, 5))


def test_padding_that_adds_a_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="got stem_padding_px 2, expected 0 to 1"):
        VisionTransformer(dataclasses.replace(TINY_CONV, stem_padding_px=2))


def test_a_patch_that_does_not_suit_the_conv_stem_is_refused() -> None:
    with pytest.raises(ConfigError, match="got patch_px 14, expected a multiple of 4"):
        VisionTransformer(dataclasses.replace(TINY_CONV, patch_px=14))


# --- export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, TINY_APPLE], ids=["patch", "conv"])
def test_traced_tower_equals_eager(config: ViTConfig) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    import onnxruntime

    from edgeclip.export.trace import trace_image_tower

    tower = random_weights(VisionTransformer(config), dtype=torch.float32)
    side = config.grid[0] * config.patch_px
    text = TextTransformerConfig(vocab_size=9, context_length=4, width=8, heads=(1,), hidden_dims=(8,))
    graph = trace_image_tower(
        reparameterize(tower),
        CLIPConfig(name="tiny", image=config, text=text, image_size_px=(side, side)),
    )
    pixels = torch.randint(0, 256, (5, side, side, 3), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {"image": pixels.numpy()})[0])
    with torch.no_grad():
        wanted = nn.functional.normalize(tower(pixels.permute(0, 3, 1, 2) / 255), dim=-1)
    assert (got - wanted).abs().max().item() < 1e-5
    kinds = [node.op_type for node in graph.graph.node]
    assert len(kinds) <= 72
    assert not {"BatchNormalization", "Shape", "Concat", "Squeeze", "Where"} & set(kinds)


# --- full size --------------------------------------------------------------------------------------------


def full_vit(width: int, layers: int, patch_px: int, **other: Any) -> ViTConfig:
    side = 224 // patch_px
    return ViTConfig(
        width=width,
        heads=(width // 64,) * layers,
        hidden_dims=(4 * width,) * layers,
        patch_px=patch_px,
        grid=(side, side),
        **other,
    )


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (full_vit(768, 12, 32), 87849216),
        (full_vit(768, 12, 16), 86192640),
        (full_vit(1024, 24, 14, embed_dim=768), 303966208),
        (full_vit(256, 10, 16), 8276992),
        (full_vit(768, 12, 16, stem="conv", class_position=False, pre_norm=False), 86348544),
    ],
    ids=["B/32", "B/16", "L/14", "TinyCLIP-8M/16", "MobileCLIP-B"],
)
def test_published_sizes(config: ViTConfig, parameters: int) -> None:
    with torch.device("meta"):
        tower = VisionTransformer(config)
    assert sum(value.numel() for value in tower.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("hf-clip-vit-base-patch32", full_vit(768, 12, 32)),
        ("hf-clip-vit-large-patch14", full_vit(1024, 24, 14, embed_dim=768)),
    ],
)
def test_names_of_transformers_are_all_known(name: str, config: ViTConfig) -> None:
    listed = below_any(read_keys(name), ("vision_model.", "visual_projection."))
    with torch.device("meta"):
        tower = VisionTransformer(config)
        state = {key: torch.empty(shape, dtype=dtype) for key, (dtype, shape) in listed.items()}
    loaded(tower, vit.hf_keys(config), state)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "layers", "patch_px"), [(768, 12, 32), (256, 10, 16)], ids=["B32", "8M16"])
def test_full_size_equals_open_clip(width: int, layers: int, patch_px: int) -> None:
    config = full_vit(width, layers, patch_px, activation="quick-gelu")
    vision = {"layers": layers, "width": width, "patch_size": patch_px, "image_size": 224}
    assert_equal_towers(config, vit.openai_keys(config), open_clip_model(512, vision, quick_gelu=True))


@pytest.mark.slow
def test_full_size_mobileclip_b_equals_timm() -> None:
    config = full_vit(768, 12, 16, stem="conv", class_position=False, pre_norm=False, norm_eps=1e-6)
    reference = timm.create_model("vit_base_mci_224", num_classes=512, global_pool="token")
    assert_equal_towers(config, vit.timm_keys(config), zero_biases(random_weights(reference)))


@pytest.mark.full
def test_full_size_large_equals_timm_and_open_clip() -> None:
    config = full_vit(1024, 24, 14, embed_dim=768)
    reference = timm.create_model("vit_large_patch14_clip_224", num_classes=768, global_pool="token")
    assert_equal_towers(config, vit.timm_keys(config), zero_biases(random_weights(reference)))
    del reference
    vision = {"layers": 24, "width": 1024, "patch_size": 14, "image_size": 224}
    assert_equal_towers(config, vit.openai_keys(config), open_clip_model(768, vision))
