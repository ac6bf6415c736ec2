"""Finishing: rounding as torch's own fake quantization does it, and towers that int8 costs less."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402

from edgeclip.distill.finish_int8 import (  # noqa: E402
    FinishSettings,
    RoundedProduct,
    RoundedProducts,
    finish_int8,
)
from edgeclip.errors import CalibrationError, ConfigError  # noqa: E402
from edgeclip.quantization import CPU, TENSORRT, Scheme, activation_step, weight_steps  # noqa: E402

INPUT, OUTPUT = (-1.5, 2.5), (-0.3, 6.0)


class Tower(nn.Module):
    """A convolution, a clamp, a mean and a linear map; unit rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Any) -> Any:
        x = F.gelu(self.depthwise(F.relu6(self.stem(x.permute(0, 3, 1, 2) / 64))))
        return F.normalize(self.head(x.mean(dim=(2, 3))), dim=1)


PRODUCTS = {
    "stem.weight": RoundedProduct((0.0, 4.0), (0.0, 3.0)),
    "depthwise.weight": RoundedProduct((0.0, 3.0), (-2.0, 2.0)),
    "head.weight": RoundedProduct((-0.2, 1.0)),
}


@pytest.fixture
def rows() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (80, 12, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("scheme", [CPU, Scheme(weight_bits=7), TENSORRT])
@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
def test_rounding_is_torchs_fake_quantization(scheme: Scheme, kind: str) -> None:
    torch.manual_seed(1)
    layer = {
        "conv": nn.Conv2d(6, 10, 3, bias=True),
        "depthwise": nn.Conv2d(6, 6, 3, groups=6),
        "linear": nn.Linear(9, 7),
    }[kind]
    x = torch.randn(2, 6, 9, 9)
    output = None if kind == "linear" else OUTPUT
    with torch.no_grad(), RoundedProducts(layer, {"weight": RoundedProduct(INPUT, output)}, scheme) as mode:
        got = layer(x)
    assert mode.seen == {"weight"}
    least, most = (-128, 127) if scheme.signed else (0, 255)

    def fake(value: Any, given: tuple[float, float]) -> Any:
        scale, zero = activation_step(given, scheme)
        return torch.fake_quantize_per_tensor_affine(value, float(scale), zero, least, most)

    weight = layer.weight.detach()
    scales = torch.from_numpy(weight_steps(weight.numpy(), 0, scheme))
    limit = scheme.weight_limit
    rounded = torch.fake_quantize_per_channel_affine(
        weight, scales, torch.zeros(len(scales), dtype=torch.int32), 0, -limit, limit
    )
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            expected = F.linear(fake(x, INPUT), rounded, layer.bias)
        else:
            expected = F.conv2d(fake(x, INPUT), rounded, layer.bias, groups=layer.groups)
        expected = expected if output is None else fake(expected, output)
    assert (got - expected).abs().max() <= float(activation_step(OUTPUT, scheme)[0]) * 1.01
    # Torch divides by multiplying with the reciprocal: a value on the edge may fall to either side.
    assert (got - expected).abs().gt(1e-5).float().mean() < 0.01


def test_gradients_pass_inside_the_range_alone() -> None:
    layer = nn.Linear(3, 2)
    x = torch.tensor([[-9.0, 0.5, 9.0]], requires_grad=True)
    with RoundedProducts(layer, {"weight": RoundedProduct((-1.0, 1.0))}, CPU):
        layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert (x.grad[0, [0, 2]] == 0).all()
    assert x.grad[0, 1] != 0
    assert layer.weight.grad.abs().min() > 0


def test_other_products_stay_exact() -> None:
    tower, x = Tower(), torch.rand(2, 12, 12, 3)
    with torch.no_grad():
        exact = tower(x)
        with RoundedProducts(tower, {}, CPU) as mode:
            assert torch.equal(tower(x), exact)
    assert not mode.seen


def test_a_finished_tower_is_closer_and_the_first_one_untouched(rows: Any) -> None:
    tower = Tower()
    before = copy.deepcopy(tower.state_dict())
    bank = F.normalize(torch.randn(20, 8), dim=1).numpy()
    settings = FinishSettings(steps=60, learning_rate=1e-3, every=10, batch=16)
    told: list[int] = []
    done = finish_int8(
        tower, PRODUCTS, CPU, rows, bank=bank, settings=settings, on_step=lambda step, loss: told.append(step)
    )
    assert done.after < 0.7 * done.before
    assert done.step > 0
    assert done.held_out == 16
    assert told == list(range(1, 61))
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())
    # What it says of itself is what the tower it returns gives.
    with torch.no_grad():
        held_out = torch.from_numpy(rows[4::5])
        wanted = tower(held_out)
        with RoundedProducts(done.tower, PRODUCTS, CPU):
            got = done.tower(held_out)
    assert float((1 - (got * wanted).sum(dim=1)).mean()) == pytest.approx(done.after, rel=1e-3)
    assert not any(parameter.requires_grad for parameter in done.tower.parameters())


def test_the_same_seed_gives_the_same_tower(rows: Any) -> None:
    settings = FinishSettings(steps=6, every=2, batch=8, learning_rate=1e-3, seed=3)
    first, second = (finish_int8(Tower(), PRODUCTS, CPU, rows, settings=settings) for _ in range(2))
    other = finish_int8(
        Tower(), PRODUCTS, CPU, rows, settings=FinishSettings(**{**vars(settings), "seed": 4})
    )
    assert first.to_dict() == second.to_dict()
    assert first.flips_before is None
    assert other.after != first.after


def test_nothing_is_returned_that_is_worse(rows: Any) -> None:
    settings = FinishSettings(steps=10, every=5, learning_rate=1.0)  # as far as one can jump
    done = finish_int8(Tower(), PRODUCTS, CPU, rows, settings=settings)
    assert (done.step, done.after) == (0, done.before)
    assert torch.equal(done.tower.state_dict()["head.weight"], Tower().state_dict()["head.weight"])


@pytest.mark.slow
def test_a_trained_tower_gains_by_it(repo: Path) -> None:
    """The MobileCLIP-shaped probe, every convolution but the first rounded, on pictures like its own."""
    from itertools import islice

    from edgeclip.export.trace import ImageGraph
    from edgeclip.models.checkpoints import load_model
    from edgeclip.models.reparam import reparameterize
    from edgeclip.shapes import ordered_combinations, render

    loaded = load_model(repo / "tests/data/probes/mobileclip")
    config = loaded.config
    tower = ImageGraph(reparameterize(loaded.model.image_tower), mean=config.mean, std=config.std).eval()
    size = config.image_size_px[0]
    seen = islice(ordered_combinations(held_out=False, seed=0), 80)
    pictures = np.stack([render(each, seed=row, size_px=size) for row, each in enumerate(seen)])
    names = [name for name, each in tower.named_modules() if isinstance(each, nn.Conv2d)][1:]
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = (min(low, float(given[0].min())), max(high, float(given[0].max())))

        return hook

    modules = dict(tower.named_modules())
    hooks = [modules[name].register_forward_pre_hook(watch(name)) for name in names]
    with torch.no_grad():
        tower(torch.from_numpy(pictures))
    for hook in hooks:
        hook.remove()
    products = {f"{name}.weight": RoundedProduct(ranges[name]) for name in ranges}
    settings = FinishSettings(steps=20, every=10, learning_rate=1e-5, batch=16)
    done = finish_int8(tower, products, CPU, pictures, settings=settings)
    assert 0 < done.after < 0.9 * done.before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"hybrid": 1.5}, "hybrid is 1.5"),
        ({"scale": 101.0}, "scale is 101.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinishSettings(**change)


def test_what_cannot_be_finished(rows: Any) -> None:
    with pytest.raises(CalibrationError, match="got 31 rows, expected at least 32"):
        finish_int8(Tower(), PRODUCTS, CPU, rows[:31])
    with pytest.raises(CalibrationError, match=r"'neck.weight' is no weight"):
        finish_int8(Tower(), {"neck.weight": RoundedProduct(INPUT)}, CPU, rows)
    with pytest.raises(CalibrationError, match=r"'stem.bias' is no weight"):
        finish_int8(Tower(), {"stem.bias": RoundedProduct(INPUT)}, CPU, rows)
    tower = Tower()
    tower.extra = nn.Linear(8, 8)
    with pytest.raises(CalibrationError, match=r"'extra.weight' is the weight of no"):
        finish_int8(tower, {**PRODUCTS, "extra.weight": RoundedProduct(INPUT)}, CPU, rows)
    with torch.no_grad():
        tower.head.bias[0] = float("nan")
    with pytest.raises(CalibrationError, match="not finite"):
        finish_int8(tower, PRODUCTS, CPU, rows)
