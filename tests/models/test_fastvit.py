"""Our MCi towers against timm's, weight for weight, in float64; their folded form; their names elsewhere."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torchvision_shim  # noqa: E402, F401
from torch import nn  # noqa: E402
from towers import RELATIVE, difference, loaded, random_weights, round_trip  # noqa: E402

from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models.config import FastViTConfig  # noqa: E402
from edgeclip.models.fastvit import FastViT, apple_keys, timm_keys  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.models.zoo import MODELS  # noqa: E402

timm = pytest.importorskip("timm")
from timm.layers import LayerNorm2d  # noqa: E402
from timm.models.fastvit import FastVit, RepConditionalPosEnc, checkpoint_filter_fn  # noqa: E402
from timm.utils import reparameterize_model  # noqa: E402

# Like MCi0: four stages, gates, batch norm before attention.
TINY_FOUR = FastViTConfig(
    dims=(8, 16, 32, 64),
    depths=(1, 2, 1, 2),
    mixers=("repmixer", "repmixer", "repmixer", "attention"),
    position_stages=(3,),
    se_stages=(2, 3),
    embed_dim=24,
)
# Like MCi3: five stages, two of attention with layer norm, a stem without 1×1 branches.
TINY_FIVE = FastViTConfig(
    dims=(8, 16, 32, 64, 128),
    depths=(1, 2, 1, 1, 1),
    mixers=("repmixer", "repmixer", "repmixer", "attention", "attention"),
    mlp_ratio=4.0,
    position_stages=(3, 4),
    attention_norm="layer",
    stem_scale_branch=False,
    embed_dim=24,
)
TINY = {"four": TINY_FOUR, "five": TINY_FIVE}
TINY_SIZE = (128, 192)


def full_config(name: str) -> FastViTConfig:
    config = MODELS[name].config.image
    assert isinstance(config, FastViTConfig)
    return config


# Variant, one model that has it, timm's name, parameters of ours and of ours folded, published millions.
VARIANTS = {
    "mci0": ("MobileCLIP2-S0", "fastvit_mci0", 11_406_464, 11_348_032, 11.4),
    "mci1": ("MobileCLIP-S1", "fastvit_mci1", 21_541_120, 21_442_624, 21.5),
    "mci2": ("MobileCLIP2-S2", "fastvit_mci2", 35_814_720, 35_677_520, 35.7),
    "mci3": ("MobileCLIP2-S3", "fastvit_mci3", 125_234_880, 125_031_648, 125.1),
    "mci4": ("MobileCLIP2-S4", "fastvit_mci4", 321_784_064, 321_500_800, 321.6),
}
SIZES = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mci0", "mci1", "mci2")),
    *(pytest.param(name, marks=pytest.mark.full) for name in ("mci3", "mci4")),
]


def timm_tower(config: FastViTConfig) -> FastVit:
    """Return timm's network of the same numbers, its weights filled and its head's bias 0."""
    stages = range(len(config.dims))
    encoding = partial(RepConditionalPosEnc, spatial_shape=(7, 7))
    tower = FastVit(
        layers=config.depths,
        token_mixers=config.mixers,
        embed_dims=config.dims,
        mlp_ratios=(config.mlp_ratio,) * len(stages),
        downsamples=tuple(stage > 0 for stage in stages),
        se_downsamples=tuple(stage in config.se_stages for stage in stages),
        pos_embs=tuple(encoding if stage in config.position_stages else None for stage in stages),
        lkc_use_act=True,
        stem_use_scale_branch=config.stem_scale_branch,
        norm_layer=partial(LayerNorm2d, eps=1e-5) if config.attention_norm == "layer" else nn.BatchNorm2d,
        num_classes=config.embed_dim,
    )
    random_weights(tower)
    nn.init.zeros_(tower.head.fc.bias)
    return tower


def meta_tower(config: FastViTConfig) -> FastViT:
    with torch.device("meta"):
        return FastViT(config)


def pictures(batch: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator)


def assert_equal_to_timm(reference: FastVit, config: FastViTConfig, size: tuple[int, int]) -> None:
    ours = loaded(meta_tower(config), timm_keys(config), reference.state_dict())
    for batch in (1, 3):
        image = pictures(batch, size)
        with torch.inference_mode():
            assert difference(ours(image), reference(image)) <= RELATIVE


def assert_folds(tower: FastViT, size: tuple[int, int]) -> None:
    folded = reparameterize(tower)
    image = pictures(1, size)
    with torch.inference_mode():
        assert difference(folded(image), tower(image)) <= RELATIVE
    assert_nothing_is_left(folded)


def assert_nothing_is_left(folded: nn.Module) -> None:
    plain = (nn.Conv2d, nn.Linear)
    for name, module in folded.named_modules():
        assert not isinstance(module, nn.BatchNorm2d), name
        assert not hasattr(module, "fold") or getattr(module, "query_scale", None) == 1, name
        if not isinstance(module, plain):
            # Layer norms keep their weight; anything else that owns a tensor is a branch or a scale.
            owned = dict(module.named_parameters(recurse=False))
            assert not owned or type(module).__name__ == "ChannelNorm", (name, list(owned))
    assert not list(folded.buffers())


@pytest.mark.parametrize("name", list(TINY))
def test_equals_timm_with_the_same_weights(name: str) -> None:
    assert_equal_to_timm(timm_tower(TINY[name]), TINY[name], TINY_SIZE)


@pytest.mark.parametrize("name", SIZES)
def test_full_size_equals_timm_with_the_same_weights_and_folds(name: str) -> None:
    model, timm_name, *_ = VARIANTS[name]
    config = full_config(model)
    reference = random_weights(timm.create_model(timm_name, num_classes=config.embed_dim))
    nn.init.zeros_(reference.head.fc.bias)
    assert_equal_to_timm(reference, config, (256, 256))
    assert_folds(loaded(meta_tower(config), timm_keys(config), reference.state_dict()), (256, 256))


@pytest.mark.parametrize("name", list(TINY))
def test_folding_changes_nothing_and_leaves_plain_layers(name: str) -> None:
    assert_folds(random_weights(FastViT(TINY[name])), TINY_SIZE)


def test_folding_leaves_the_model_as_it_is_and_is_done_once() -> None:
    tower = random_weights(FastViT(TINY_FOUR))
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    folded = reparameterize(tower)
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())
    again = reparameterize(folded)
    assert all(torch.equal(value, folded.state_dict()[key]) for key, value in again.state_dict().items())


def test_features_come_before_the_mean_and_the_projection() -> None:
    tower = random_weights(FastViT(TINY_FOUR))
    image = pictures(2, TINY_SIZE)
    with torch.inference_mode():
        features = tower.forward_features(image)
        assert features.shape == (2, 128, 4, 6)
        assert difference(tower.projection(features.mean((2, 3))), tower(image)) <= RELATIVE


def test_a_fresh_tower_trains_every_parameter() -> None:
    torch.manual_seed(0)
    tower = FastViT(dataclasses.replace(TINY_FOUR, layer_scale_init=0.1, projection_bias=True)).train()
    tower(pictures(2, (64, 64)).float()).square().mean().backward()
    still = [name for name, value in tower.named_parameters() if value.grad is None or not value.grad.any()]
    assert not still


# Names elsewhere
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [apple_keys, timm_keys], ids=["apple", "timm"])
@pytest.mark.parametrize("name", list(TINY))
def test_names_elsewhere_and_back_are_bit_identical(name: str, keys: Any) -> None:
    round_trip(random_weights(FastViT(TINY[name]), dtype=torch.float32), keys(TINY[name]))


@pytest.mark.parametrize("config", TINY.values(), ids=list(TINY))
def test_all_of_timms_tensors_come_back_bit_identical(config: FastViTConfig) -> None:
    state = timm_tower(config).state_dict()
    ours = loaded(meta_tower(config), timm_keys(config), state)
    back = timm_keys(config).to_theirs(ours.state_dict())
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("config", TINY.values(), ids=list(TINY))
def test_apples_names_are_those_that_timm_converts(config: FastViTConfig) -> None:
    state = random_weights(FastViT(config)).state_dict()
    apple = apple_keys(config).prefixed(theirs="image_encoder.model.").to_theirs(state)
    converted = checkpoint_filter_fn(apple, timm_tower(config))
    ours = timm_keys(config).to_theirs(state)
    assert set(converted) == set(ours)
    assert all(torch.equal(converted[key], value) for key, value in ours.items())


def test_a_bias_that_is_not_zero_needs_a_config_that_has_one() -> None:
    reference = timm_tower(TINY_FOUR)
    nn.init.ones_(reference.head.fc.bias)
    with pytest.raises(InputError, match=r"'head\.fc\.bias' is not 0 throughout"):
        loaded(meta_tower(TINY_FOUR), timm_keys(TINY_FOUR), reference.state_dict())
    config = dataclasses.replace(TINY_FOUR, projection_bias=True)
    assert_equal_to_timm(reference, config, TINY_SIZE)


def test_apples_names_have_no_projection_bias() -> None:
    with pytest.raises(ConfigError, match="projection_bias is True"):
        apple_keys(dataclasses.replace(TINY_FOUR, projection_bias=True))


# Numbers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VARIANTS))
def test_parameters_are_the_published_ones(name: str) -> None:
    model, timm_name, unfolded, folded, published = VARIANTS[name]
    config = full_config(model)
    tower = meta_tower(config)
    assert count(tower) == unfolded
    assert count(reparameterize(tower)) == folded
    with torch.device("meta"):
        reference = timm.create_model(timm_name, num_classes=config.embed_dim)
        assert count(reference) == unfolded + config.embed_dim  # its head has a bias
        # The published figures are rounded from the form the authors' own folding leaves: norms and scales
        # that we fold as well are still in it, the train-time branches are not.
        assert round(count(reparameterize_model(reference)) / 1e6, 1) == published


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 2)}, r"\(4, 2, 4\) entries"),
        ({"dims": (), "depths": (), "mixers": ()}, r"\(0, 0, 0\) entries"),
        ({"depths": (1, 0, 1, 1)}, r"depths \(1, 0, 1, 1\)"),
        ({"embed_dim": 0}, "embed_dim 0"),
        ({"dims": (8, 12, 32, 64)}, "12 is no multiple of 8"),
        ({"head_dim": 24}, "64 channels cannot be cut into heads of 24"),
        ({"head_dim": 0}, "heads of 0"),
        ({"mixers": ("repmixer", "pool", "repmixer", "attention")}, "unknown mixer 'pool'"),
        ({"attention_norm": "group"}, "unknown attention_norm 'group'"),
        ({"mlp_ratio": 0.1}, "mlp_ratio 0.1"),
        ({"position_stages": (4,)}, r"position_stages \(4,\).*\[4\]"),
        ({"se_stages": (0, 2)}, r"se_stages \(0, 2\).*\[0\]"),
        ({"final_expansion": 1.5}, "final_expansion 1.5 of 64"),
        ({"dims": (3, 3, 3, 3), "head_dim": 3}, "final_expansion 2.0 of 3"),
        ({"dims": (12, 12, 12, 12), "head_dim": 4}, "24 channels after the last convolution"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FastViT(dataclasses.replace(TINY_FOUR, **changes))


# Graphs
# -------------------------------------------------------------------------------------------------


def test_a_folded_tower_traces_to_plain_nodes() -> None:
    counts = node_counts(reparameterize(random_weights(FastViT(TINY_FOUR), dtype=torch.float32)), (128, 128))
    assert set(counts) == {
        *("Add", "Conv", "Gelu", "Gemm", "MatMul", "Mul", "ReduceMean", "Relu", "Reshape"),
        *("Sigmoid", "Softmax", "Split", "Transpose"),
    }
    # Of two attention blocks: the scores' and the values' products with two transposes that engines merge.
    assert (counts["Transpose"], counts["MatMul"], counts["Split"], counts["Softmax"]) == (4, 4, 2, 2)


@pytest.mark.slow
def test_folded_mci0_has_at_least_a_tenth_fewer_nodes_than_timms() -> None:
    config = full_config("MobileCLIP2-S0")
    reference = timm.create_model("fastvit_mci0", num_classes=config.embed_dim).eval()
    nn.init.zeros_(reference.head.fc.bias)
    ours = loaded(meta_tower(config), timm_keys(config), reference.state_dict())
    counts = node_counts(reparameterize(ours), (256, 256))
    theirs = node_counts(reparameterize_model(reference), (256, 256))
    assert counts["BatchNormalization"] == 0
    assert counts.total() <= 0.9 * theirs.total(), (counts, theirs)


def node_counts(folded: nn.Module, size: tuple[int, int]) -> Counter[str]:
    """Return how many nodes of each kind the graph has, bare: float pictures in, raw embeddings out."""
    pytest.importorskip("onnxscript")
    from edgeclip.export.trace import to_bytes, trace_module
    from edgeclip.runtime.ort import import_onnxruntime

    image = pictures(2, size).float()
    graph = trace_module(folded, image, input_name="image", output_name="embedding")
    session = import_onnxruntime().InferenceSession(to_bytes(graph), providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"image": image.numpy()})
    with torch.inference_mode():
        # float32 in another order, on features of order 1.
        assert difference(torch.from_numpy(embedding), folded(image)) <= 1e-4
    return Counter(node.op_type for node in graph.graph.node)
