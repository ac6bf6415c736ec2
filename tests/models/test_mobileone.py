"""Blocks with branches equal timm's, weight for weight, and their folded form equals them."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torchvision_shim  # noqa: E402, F401
from torch import Tensor, nn  # noqa: E402
from towers import RELATIVE, difference, random_weights  # noqa: E402

from edgeclip.models.mobileone import (  # noqa: E402
    ConvFFN,
    ConvNorm,
    MobileOneBlock,
    RepMixer,
    RepMixerBlock,
    Residual,
    SqueezeExcite,
)
from edgeclip.models.reparam import reparameterize  # noqa: E402

BLOCKS = {
    "dense": {"in_channels": 4, "out_channels": 8, "kernel": (3, 3), "stride": 2},
    "depthwise": {"in_channels": 8, "out_channels": 8, "kernel": (3, 3), "groups": 8},
    "widening": {"in_channels": 8, "out_channels": 16, "kernel": (3, 3), "groups": 8, "squeeze": 4},
    "pointwise": {"in_channels": 8, "out_channels": 8, "kernel": (1, 1)},
    "without 1×1": {"in_channels": 8, "out_channels": 8, "kernel": (3, 3), "scale_branch": False},
    "over tokens": {"in_channels": 8, "out_channels": 8, "kernel": (1, 11), "groups": 8},
    "linear": {"in_channels": 8, "out_channels": 8, "kernel": (3, 3), "activation": False},
}


def picture(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 9, 13, dtype=torch.float64, generator=generator)


@torch.no_grad()
def folds_to(module: nn.Module, x: Tensor) -> list[nn.Module]:
    """Assert that the folded module equals the module; return its innermost layers."""
    folded = reparameterize(nn.Sequential(module))
    assert difference(folded(x), module(x)) <= RELATIVE
    return [layer for layer in folded.modules() if not list(layer.children())]


@pytest.mark.parametrize("numbers", BLOCKS.values(), ids=list(BLOCKS))
def test_a_block_folds_to_one_convolution(numbers: dict[str, Any]) -> None:
    block = random_weights(MobileOneBlock(**numbers))
    kinds = [type(layer) for layer in folds_to(block, picture(numbers["in_channels"]))]
    gate = [nn.Conv2d, nn.Conv2d] if numbers.get("squeeze") else []
    activation = [nn.GELU] if numbers.get("activation", True) else []
    assert kinds == [nn.Conv2d, *gate, *activation]


@pytest.mark.parametrize("numbers", BLOCKS.values(), ids=list(BLOCKS))
def test_branches_exist_where_published_ones_do(numbers: dict[str, Any]) -> None:
    block = MobileOneBlock(**numbers)
    keeps_shape = numbers["in_channels"] == numbers["out_channels"] and numbers.get("stride", 1) == 1
    assert (block.skip is not None) == keeps_shape
    assert (block.scale is not None) == (numbers["kernel"][0] > 1 and numbers.get("scale_branch", True))


@torch.no_grad()
def test_a_block_equals_timms() -> None:
    timm_fastvit = pytest.importorskip("timm.models.fastvit")
    reference = random_weights(timm_fastvit.MobileOneBlock(8, 8, 3, group_size=1, use_se=False))
    ours = MobileOneBlock(8, 8, kernel=(3, 3), groups=8)
    names = {
        "main.conv": "conv_kxk.0.conv",
        "main.norm": "conv_kxk.0.bn",
        "scale.conv": "conv_scale.conv",
        "scale.norm": "conv_scale.bn",
        "skip": "identity",
    }
    state = reference.state_dict()
    ours.load_state_dict(
        {
            key: state[names[key.rpartition(".")[0]] + "." + key.rpartition(".")[2]]
            for key in ours.state_dict()
        }
    )
    assert difference(ours.double().eval()(picture(8)), reference(picture(8))) <= RELATIVE


def test_squeeze_and_excitation_gates_each_channel() -> None:
    module = SqueezeExcite(3, 2).double()
    nn.init.zeros_(module.expand.weight)
    module.expand.bias.data = torch.tensor([-40.0, 0.0, 40.0], dtype=torch.float64)
    gates = module(picture(3)) / picture(3)
    for channel, gate in enumerate((0.0, 0.5, 1.0)):
        assert torch.allclose(gates[:, channel], torch.full_like(gates[:, channel], gate))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 11)], ids=["image", "text"])
def test_repmixer_folds_to_one_depthwise_convolution(kernel: tuple[int, int]) -> None:
    mixer = random_weights(RepMixer(8, kernel=kernel))
    (conv,) = folds_to(mixer, picture(8))
    assert isinstance(conv, nn.Conv2d)
    assert conv.groups == 8
    assert conv.kernel_size == kernel


@torch.no_grad()
def test_repmixer_without_scale_is_the_identity() -> None:
    mixer = random_weights(RepMixer(8, kernel=(3, 3)))
    nn.init.zeros_(mixer.layer_scale)
    assert torch.equal(mixer(picture(8)), picture(8))
    assert difference(mixer.fold()(picture(8)), picture(8)) <= RELATIVE


@pytest.mark.parametrize(
    ("mixer_kernel", "ffn_kernel"), [((3, 3), (7, 7)), ((1, 11), (1, 11))], ids=["image", "text"]
)
def test_a_repmixer_block_folds_to_four_convolutions(
    mixer_kernel: tuple[int, int], ffn_kernel: tuple[int, int]
) -> None:
    block = random_weights(RepMixerBlock(8, 24, mixer_kernel=mixer_kernel, ffn_kernel=ffn_kernel))
    layers = folds_to(block, picture(8))
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 4


def test_the_feed_forward_part_keeps_its_module_and_loses_its_norm() -> None:
    layers = folds_to(random_weights(ConvFFN(8, 24, kernel=(7, 7))), picture(8))
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 3


def test_a_convolution_with_norm_halves_the_map() -> None:
    module = random_weights(ConvNorm(4, 8, kernel=(3, 3), stride=2))
    assert module(picture(4)).shape == (2, 8, 5, 7)
    (conv,) = folds_to(module, picture(4))
    assert isinstance(conv, nn.Conv2d)


def test_a_residual_adds_its_input() -> None:
    assert torch.equal(Residual(nn.Identity())(picture(2)), 2 * picture(2))


def test_fresh_layer_scales_have_the_asked_value() -> None:
    block = RepMixerBlock(8, 24, mixer_kernel=(3, 3), ffn_kernel=(7, 7), scale_init=0.25)
    for scale in (block.layer_scale, block.mixer.layer_scale):
        assert torch.equal(scale, torch.full((8, 1, 1), 0.25))
