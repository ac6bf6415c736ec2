"""Weight inheritance against direct indexing, the identity, and what cannot be cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor  # noqa: E402
from towers import random_weights  # noqa: E402

from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import (  # noqa: E402
    BagTextConfig,
    CLIPConfig,
    FastViTConfig,
    TextTransformerConfig,
    ViTConfig,
)
from edgeclip.models.inherit import inherit, inherited_layers  # noqa: E402

TEXT = TextTransformerConfig(
    vocab_size=40,
    context_length=12,
    width=48,
    heads=(3, 3, 3, 3, 3, 3),
    hidden_dims=(96,) * 6,
    head_dim=16,
    embed_dim=24,
)
VIT = CLIPConfig(
    name="parent",
    image=ViTConfig(
        width=64,
        heads=(4, 4, 4, 4),
        hidden_dims=(128,) * 4,
        head_dim=16,
        patch_px=8,
        grid=(3, 3),
        embed_dim=24,
    ),
    text=TEXT,
    image_size_px=(24, 24),
)
# With a convolutional stem, a factorised table, biases, other heads in each layer, and MCt's ends.
RICH = dataclasses.replace(
    VIT,
    image=dataclasses.replace(
        VIT.image,
        width=160,
        heads=(2, 0, 3, 1),
        hidden_dims=(128, 64, 0, 32),
        stem="conv",
        pre_norm=False,
        class_position=False,
        projection_bias=True,
    ),
    text=dataclasses.replace(TEXT, attention="full", conv_ends=True, conv_kernel=3, token_dim=20),
)
FASTVIT = CLIPConfig(
    name="parent",
    image=FastViTConfig(
        dims=(16, 32, 64),
        depths=(2, 4, 2),
        mixers=("repmixer", "repmixer", "attention"),
        position_stages=(2,),
        se_stages=(1, 2),
        attention_norm="layer",
        head_dim=8,
        embed_dim=24,
    ),
    text=TEXT,
    image_size_px=(32, 32),
)


def parent_of(config: CLIPConfig) -> CLIP:
    return random_weights(build_clip(config), dtype=torch.float32)


def image(config: CLIPConfig, **changes: Any) -> CLIPConfig:
    return dataclasses.replace(config, image=dataclasses.replace(config.image, **changes))


def text(config: CLIPConfig, **changes: Any) -> CLIPConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, **changes))


def embeddings(model: CLIP, config: CLIPConfig) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    pictures = torch.randn(2, 3, *config.image_size_px, generator=generator)
    tokens = torch.randint(1, 40, (2, config.text.context_length), generator=generator)
    with torch.no_grad():
        return [model.encode_image(pictures), model.encode_text(tokens)]


@pytest.mark.parametrize("layers", ["even", "first"])
@pytest.mark.parametrize("config", [VIT, RICH, FASTVIT], ids=["vit", "rich", "fastvit"])
def test_a_child_as_large_as_its_parent_is_its_parent(config: CLIPConfig, layers: Any) -> None:
    parent = parent_of(config)
    child = inherit(parent, config, config, layers=layers)
    before, after = parent.state_dict(), child.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(map(torch.equal, embeddings(child, config), embeddings(parent, config)))
    with torch.no_grad():
        child.logit_scale.zero_()
        next(child.image_tower.parameters()).zero_()
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())
    assert all(parameter.requires_grad for parameter in child.parameters())


def test_vit_and_text_take_front_slices_of_even_layers() -> None:
    parent = parent_of(VIT)
    config = text(
        image(VIT, width=40, heads=(3, 2), hidden_dims=(50, 0), embed_dim=10),
        width=32,
        heads=(2, 0, 1, 3),
        hidden_dims=(60, 96, 0, 10),
        context_length=9,
        embed_dim=10,
    )
    child = inherit(parent, VIT, config)
    theirs, ours = parent.state_dict(), child.state_dict()
    expected = {
        "logit_scale": theirs["logit_scale"],
        "image_tower.stem.conv.weight": theirs["image_tower.stem.conv.weight"][:40],
        "image_tower.positions.class_token": theirs["image_tower.positions.class_token"][:40],
        "image_tower.positions.table": theirs["image_tower.positions.table"][:, :40],
        "image_tower.projection.weight": theirs["image_tower.projection.weight"][:10, :40],
        "text_tower.token_embedding.weight": theirs["text_tower.token_embedding.weight"][:, :32],
        "text_tower.positions": theirs["text_tower.positions"][:9, :32],
        "text_tower.projection.weight": theirs["text_tower.projection.weight"][:10, :32],
    }
    for name, width in (
        ("image_tower.first_norm", 40),
        ("image_tower.final_norm", 40),
        ("text_tower.final_norm", 32),
    ):
        expected |= {f"{name}.{leaf}": theirs[f"{name}.{leaf}"][:width] for leaf in ("weight", "bias")}
    layers = [
        ("image_tower", 40, [(0, 3, 50), (2, 2, 0)], 4),
        ("text_tower", 32, [(0, 2, 60), (1, 0, 96), (3, 1, 0), (4, 3, 10)], 3),
    ]
    for tower, width, taken, heads in layers:
        for index, (source, kept, hidden) in enumerate(taken):
            mine, other = (f"{tower}.transformer.layers.{number}." for number in (index, source))
            if kept:
                weight = theirs[other + "attention.qkv.weight"].view(3, heads, 16, -1)
                bias = theirs[other + "attention.qkv.bias"].view(3, heads, 16)
                expected[mine + "attention.qkv.weight"] = torch.cat(
                    [weight[part, head, :, :width] for part in range(3) for head in range(kept)]
                )
                expected[mine + "attention.qkv.bias"] = torch.cat(
                    [bias[part, head] for part in range(3) for head in range(kept)]
                )
                out = theirs[other + "attention.out.weight"]
                expected[mine + "attention.out.weight"] = out[:width, : 16 * kept]
                expected[mine + "attention.out.bias"] = theirs[other + "attention.out.bias"][:width]
                for leaf in ("weight", "bias"):
                    expected[f"{mine}norm1.{leaf}"] = theirs[f"{other}norm1.{leaf}"][:width]
            if hidden:
                expected[mine + "fc1.weight"] = theirs[other + "fc1.weight"][:hidden, :width]
                expected[mine + "fc1.bias"] = theirs[other + "fc1.bias"][:hidden]
                expected[mine + "fc2.weight"] = theirs[other + "fc2.weight"][:width, :hidden]
                expected[mine + "fc2.bias"] = theirs[other + "fc2.bias"][:width]
                for leaf in ("weight", "bias"):
                    expected[f"{mine}norm2.{leaf}"] = theirs[f"{other}norm2.{leaf}"][:width]
    assert expected.keys() == ours.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    assert all(rows.isfinite().all() for rows in embeddings(child, config))


def test_fastvit_takes_channels_blocks_and_statistics() -> None:
    parent = parent_of(FASTVIT)
    config = text(
        image(FASTVIT, dims=(8, 16, 32), depths=(1, 3, 2), mlp_ratio=2.0, embed_dim=12),
        width=16,
        heads=(1,),
        hidden_dims=(16,),
        embed_dim=12,
    )
    child = inherit(parent, FASTVIT, config)
    theirs, ours = (
        {name.removeprefix("image_tower."): value for name, value in model.state_dict().items()}
        for model in (parent, child)
    )
    norm = "stem.1.main.norm."
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(ours[norm + leaf], theirs[norm + leaf][:8])
    large = "stages.1.downsample.large.conv.weight"
    assert torch.equal(ours[large], theirs[large][:16])
    squeeze = "stages.2.downsample.se.reduce.weight"
    assert torch.equal(ours[squeeze], theirs[squeeze][:8, :32])
    for index, source in enumerate((0, 1, 2)):  # floor(i · 4 / 3)
        expand = "stages.1.blocks.{}.ffn.expand.weight"
        assert torch.equal(ours[expand.format(index)], theirs[expand.format(source)][:32, :16])
        scale = "stages.1.blocks.{}.layer_scale"
        assert torch.equal(ours[scale.format(index)], theirs[scale.format(source)][:16])
    qkv = "stages.2.blocks.1.attention.qkv.weight"
    parts = theirs[qkv].view(3, 8, 8, 64)  # part, head, channel
    assert torch.equal(
        ours[qkv][..., 0, 0],
        torch.cat([parts[part, head, :, :32] for part in range(3) for head in range(4)]),
    )
    assert torch.equal(ours["projection.weight"], theirs["projection.weight"][:12, :64])
    assert all(rows.isfinite().all() for rows in embeddings(child, config))


def test_a_convolutional_stem_and_a_factorised_table_are_cut_too() -> None:
    parent = parent_of(RICH)
    config = text(image(RICH, width=140, heads=(2, 0, 1, 0)), width=32, heads=(3,) * 6, token_dim=7)
    child = inherit(parent, RICH, config)
    theirs, ours = parent.state_dict(), child.state_dict()
    stem = "image_tower.stem."
    assert torch.equal(ours[stem + "conv2.weight"], theirs[stem + "conv2.weight"][:35, :35])
    assert torch.equal(ours[stem + "norm2.running_var"], theirs[stem + "norm2.running_var"][:35])
    assert torch.equal(ours[stem + "conv3.bias"], theirs[stem + "conv3.bias"][:140])
    assert torch.equal(
        ours["text_tower.token_projection.weight"], theirs["text_tower.token_projection.weight"][:32, :7]
    )
    assert torch.equal(
        ours["text_tower.first.mixer.mix.main.norm.running_mean"],
        theirs["text_tower.first.mixer.mix.main.norm.running_mean"][:32],
    )
    assert all(rows.isfinite().all() for rows in embeddings(child, config))


@pytest.mark.parametrize(
    ("parent", "child", "even"),
    [
        (12, 6, (0, 2, 4, 6, 8, 10)),
        (12, 3, (0, 4, 8)),
        (12, 9, (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        (5, 2, (0, 2)),
        (3, 3, (0, 1, 2)),
    ],
)
def test_layers_are_spaced_evenly_or_the_first(parent: int, child: int, even: tuple[int, ...]) -> None:
    assert inherited_layers(parent, child) == even
    assert inherited_layers(parent, child, "first") == tuple(range(child))


def test_towers_of_other_kinds_are_inherited_whole() -> None:
    bag = BagTextConfig(
        vocab_size=40, context_length=12, pad_id=0, width=16, heads=2, hidden_dim=8, embed_dim=24
    )
    config = dataclasses.replace(VIT, text=bag)
    parent = parent_of(config)
    child = inherit(parent, config, image(config, hidden_dims=(32,) * 4))
    for name, value in parent.text_tower.state_dict().items():
        assert torch.equal(child.text_tower.state_dict()[name], value)
    with pytest.raises(ConfigError, match=r"'text\.width' of the child is 8, of the parent 16"):
        inherit(parent, config, text(config, width=8))


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        (VIT, image(VIT, width=65), r"'image\.width' of the child is 65, expected at most 64"),
        (
            VIT,
            image(VIT, heads=(4, 4, 5, 4)),
            r"'image\.heads' of the child's layer 2 is 5, expected at most 4",
        ),
        (VIT, text(VIT, hidden_dims=(96,) * 5 + (97,)), r"'text\.hidden_dims' of the child's layer 5 is 97"),
        (
            VIT,
            image(VIT, heads=(4,) * 5, hidden_dims=(128,) * 5),
            r"'image\.heads' of the child has 5 layers, expected at most 4",
        ),
        (RICH, image(RICH, heads=(2, 1, 3, 1)), r"layer 1 is 1, expected at most 0"),
        (
            VIT,
            text(VIT, context_length=13),
            r"'text\.context_length' of the child is 13, expected at most 12",
        ),
        (VIT, text(VIT, vocab_size=39), r"'text\.vocab_size' of the child is 39, of the parent 40"),
        (VIT, image(VIT, head_dim=8), r"'image\.head_dim' of the child is 8, of the parent 16"),
        (VIT, image(VIT, activation="quick-gelu"), r"'image\.activation' of the child is 'quick-gelu'"),
        (RICH, image(RICH, stem_dim=41), r"'image\.stem_dim' of the child is 41, expected at most 40"),
        (VIT, text(VIT, token_dim=8), r"'text\.token_dim' of the child is 8, expected at most 0"),
        (RICH, text(RICH, token_dim=0), r"'text\.token_dim' of the child is 0, of the parent 20"),
        (VIT, dataclasses.replace(VIT, mean=(0.5, 0.5, 0.5)), r"'mean' of the child is \(0\.5, 0\.5, 0\.5\)"),
        (
            VIT,
            dataclasses.replace(VIT, image=FASTVIT.image),
            "is of kind 'fastvit', the parent's of kind 'vit'",
        ),
        (FASTVIT, image(FASTVIT, dims=(16, 32, 65)), r"'image\.dims' of the child is \(16, 32, 65\)"),
        (FASTVIT, image(FASTVIT, dims=(8, 32, 64)), "grow from stage to stage by the same factors"),
        (FASTVIT, image(FASTVIT, depths=(2, 5, 2)), r"'image\.depths' of the child is \(2, 5, 2\)"),
        (
            FASTVIT,
            image(FASTVIT, mlp_ratio=3.5),
            r"'image\.mlp_ratio' of the child is 3\.5, expected at most 3",
        ),
        (FASTVIT, image(FASTVIT, se_stages=(1,)), r"'image\.se_stages' of the child is \(1,\)"),
    ],
)
def test_what_cannot_be_cut_is_named(parent: CLIPConfig, child: CLIPConfig, message: str) -> None:
    with torch.device("meta"):
        model = build_clip(parent)
    with pytest.raises(ConfigError, match=message):
        inherit(model, parent, child)
