"""Each law of folding on its own: the folded layer computes what the pair computed, in float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402
from towers import RELATIVE, difference, random_weights  # noqa: E402

from edgeclip.models.reparam import (  # noqa: E402
    Foldable,
    Kernel,
    fold_bn_linear,
    fold_children,
    fold_conv_bn,
    reparameterize,
    scale_outputs,
)


class Twice(nn.Module):
    """Trains as ``2·conv(x)`` and runs as one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.conv(x)

    def fold(self) -> nn.Conv2d:
        return scale_outputs(self.conv, torch.full((2,), 2.0))


def picture(channels: int, height: int = 7, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=generator)


def conv_and_norm(*, bias: bool, groups: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=bias, groups=groups, stride=stride)
    return random_weights(nn.Sequential(conv, nn.BatchNorm2d(8)))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_batch_norm_folds_into_the_convolution_before_it(bias: bool, groups: int) -> None:
    pair = conv_and_norm(bias=bias, groups=groups)
    expected = pair(picture(4))
    assert difference(fold_conv_bn(pair[0], pair[1])(picture(4)), expected) <= RELATIVE


@torch.no_grad()
def test_folding_computes_in_float64_and_keeps_the_dtype() -> None:
    pair = conv_and_norm(bias=False, groups=1).float()
    exact = fold_conv_bn(*(layer.double() for layer in conv_and_norm(bias=False, groups=1).float()))
    folded = fold_conv_bn(pair[0], pair[1])
    assert folded.weight.dtype == torch.float32
    assert torch.equal(folded.weight, exact.weight.float())
    assert torch.equal(folded.bias, exact.bias.float())


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_the_pointwise_convolution_behind_it(bias: bool) -> None:
    pair = random_weights(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=bias)))
    expected = pair(picture(4))
    folded = fold_bn_linear(pair[0], pair[1])
    assert folded.bias is not None
    assert folded.weight.shape == (6, 4, 1, 1)
    assert difference(folded(picture(4)), expected) <= RELATIVE


@torch.no_grad()
def test_batch_norm_folds_into_the_linear_layer_behind_it() -> None:
    norm, linear = random_weights(nn.BatchNorm2d(4)), random_weights(nn.Linear(4, 6, bias=False))
    expected = linear(norm(picture(4)).permute(0, 2, 3, 1))
    folded = fold_bn_linear(norm, linear)
    assert difference(folded(picture(4).permute(0, 2, 3, 1)), expected) <= RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Linear(9, 5, bias=False)], ids=["bias", "plain"])
def test_a_scale_per_output_folds_into_the_linear_layer(layer: nn.Linear) -> None:
    random_weights(layer)
    factor = torch.linspace(-1, 2, 5, dtype=torch.float64)
    expected = layer(picture(4)) * factor
    assert difference(scale_outputs(layer, factor)(picture(4)), expected) <= RELATIVE


@torch.no_grad()
def test_a_scale_per_channel_folds_into_the_convolution() -> None:
    conv = random_weights(nn.Conv2d(4, 5, 3))
    factor = torch.linspace(-1, 2, 5, dtype=torch.float64).reshape(5, 1, 1)
    expected = conv(picture(4)) * factor
    assert difference(scale_outputs(conv, factor)(picture(4)), expected) <= RELATIVE


@torch.no_grad()
def test_parallel_convolutions_add_up_to_one() -> None:
    wide, narrow = conv_and_norm(bias=False, groups=4, stride=2), nn.Conv2d(4, 8, (1, 1), groups=4, stride=2)
    random_weights(narrow)
    kernel = Kernel.of_conv(wide[0], wide[1]) + Kernel.of_conv(narrow).padded((3, 3))
    merged = kernel.to_conv(stride=2, groups=4, dtype=torch.float64)
    expected = wide(picture(4)) + narrow(picture(4))
    assert difference(merged(picture(4)), expected) <= RELATIVE


@torch.no_grad()
def test_a_kernel_is_padded_around_its_centre_on_each_axis() -> None:
    conv = random_weights(nn.Conv2d(4, 8, (1, 3), padding=(0, 1)))
    padded = Kernel.of_conv(conv).padded((5, 7)).to_conv(dtype=torch.float64)
    assert padded.padding == (2, 3)
    assert difference(padded(picture(4)), conv(picture(4))) <= RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 11)])
def test_the_identity_kernel_copies_its_input(groups: int, size: tuple[int, int]) -> None:
    kernel = Kernel.identity(4, groups=groups, size=size, device=torch.device("cpu"))
    assert torch.equal(kernel.to_conv(groups=groups, dtype=torch.float64)(picture(4)), picture(4))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_batch_norm_alone_is_a_kernel(groups: int) -> None:
    norm = random_weights(nn.BatchNorm2d(4))
    conv = Kernel.of_norm(norm, groups=groups, size=(3, 5)).to_conv(groups=groups, dtype=torch.float64)
    assert difference(conv(picture(4)), norm(picture(4))) <= RELATIVE


@torch.no_grad()
def test_kernels_subtract_and_scale_as_their_convolutions_do() -> None:
    one, other = (random_weights(nn.Conv2d(4, 8, 3, padding=1), seed) for seed in (0, 1))
    factor = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    kernel = (Kernel.of_conv(one) - Kernel.of_conv(other)).scaled(factor)
    expected = (one(picture(4)) - other(picture(4))) * factor[:, None, None]
    assert difference(kernel.to_conv(dtype=torch.float64)(picture(4)), expected) <= RELATIVE


@torch.no_grad()
def test_reparameterize_folds_a_copy_of_every_module_that_can() -> None:
    model = random_weights(nn.Sequential(Twice(), nn.Sequential(nn.GELU(), Twice()))).train()
    folded = reparameterize(model)
    assert isinstance(model[0], Twice)
    assert model.training
    assert not folded.training
    assert not any(isinstance(module, Foldable) for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert difference(folded(picture(2)), model(picture(2))) <= RELATIVE


def test_fold_children_works_in_place_and_returns_its_module() -> None:
    model = nn.Sequential(Twice(), nn.GELU())
    assert fold_children(model) is model
    assert isinstance(model[0], nn.Conv2d)
