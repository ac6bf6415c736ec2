"""The whole model: unit embeddings, the posterior tower, widths that must agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeclip.errors import ConfigError  # noqa: E402
from edgeclip.models.clip import CLIP, PosteriorImageTower, build_clip, build_image_tower  # noqa: E402
from edgeclip.models.config import (  # noqa: E402
    BagTextConfig,
    CLIPConfig,
    PosteriorImageConfig,
    config_from_dict,
    config_to_dict,
)

CONFIG = CLIPConfig(
    name="tiny",
    image=PosteriorImageConfig(part_dims=(12, 4), part_weights=(0.75, 0.25)),
    text=BagTextConfig(
        vocab_size=50, context_length=8, pad_id=49, width=8, heads=2, hidden_dim=8, embed_dim=16
    ),
    image_size_px=(64, 64),
)


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    made = build_clip(CONFIG).eval()
    tower = made.image_tower
    assert isinstance(tower, PosteriorImageTower)
    torch.nn.init.normal_(tower.class_table)
    return made


def test_projection_equals_numpy_and_has_unit_length(model: CLIP) -> None:
    tower = model.image_tower
    assert isinstance(tower, PosteriorImageTower)
    logits = 5 * np.random.default_rng(0).normal(size=(3, 1000))
    with torch.no_grad():
        got = tower.double().project(torch.from_numpy(logits)).numpy()
        table = tower.class_table.numpy()
    tower.float()
    posterior = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    first, second = posterior @ table[:, :12], posterior @ table[:, 12:]
    first, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (first, second))
    np.testing.assert_allclose(got, np.concatenate([0.75**0.5 * first, 0.5 * second], axis=1), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-12)


def test_forward_gives_unit_embeddings_and_a_capped_scale(model: CLIP) -> None:
    tokens = torch.tensor([[1, 2, 49, 49, 49, 49, 49, 49]])
    with torch.no_grad():
        model.logit_scale.fill_(50.0)
        image, text, scale = model(torch.randn(2, 3, 64, 64), tokens)
        model.logit_scale.fill_(float(np.log(1 / 0.07)))
    assert torch.allclose(image.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert torch.allclose(text.norm(dim=-1), torch.ones(1), atol=1e-5)
    assert scale.item() == 100


def test_normalize_only_scales_rows(model: CLIP) -> None:
    tokens = torch.tensor([[5, 6, 7, 49, 49, 49, 49, 49]])
    with torch.no_grad():
        plain, normalized = model.encode_text(tokens), model.encode_text(tokens, normalize=True)
    assert torch.allclose(plain / plain.norm(), normalized, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIG, image=replace(CONFIG.image, backbone="lite9")), "unknown backbone 'lite9'.*lite0"),
        (
            replace(CONFIG, image=replace(CONFIG.image, part_dims=(12, 5))),
            "into 17 dimensions, .*tower into 16",
        ),
        (replace(CONFIG, image=replace(CONFIG.image, classes=10)), "has 1000 classes, the config says 10"),
        (replace(CONFIG, image=replace(CONFIG.image, part_weights=(0.5, 0.4))), "must sum to 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(config: CLIPConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_clip(config)


def test_config_survives_json() -> None:
    assert config_from_dict(CLIPConfig, config_to_dict(CONFIG), where="here") == CONFIG


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", None, r"here: 'name': got None, expected str"),
        (
            "mean",
            [0.0, 0.0],
            r"here: 'mean': got \[0.0, 0.0\], expected a list for tuple\[float, float, float\]",
        ),
        ("mean", ["a", 0.0, 0.0], r"here: 'mean': got 'a', expected float"),
        ("image_size_px", 224, r"here: 'image_size_px': got 224"),
        ("text", [], r"here: 'text': 'kind' is None, expected one of \['bag', 'transformer'\]"),
        ("surprise", 1, r"unknown keys \['surprise'\]"),
    ],
)
def test_config_names_the_bad_key(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(CLIPConfig, {**config_to_dict(CONFIG), key: value}, where="here")


def test_config_names_the_missing_key() -> None:
    said = config_to_dict(CONFIG)
    del said["text"]["vocab_size"]
    with pytest.raises(ConfigError, match=r"here: 'text': .*missing keys \['vocab_size'\]"):
        config_from_dict(CLIPConfig, said, where="here")


SEEING = PosteriorImageConfig(
    part_dims=(12, 4), part_weights=(0.3, 0.2), feature_dims=(6,), feature_weights=(0.5,), gated_dim=5
)


@pytest.fixture(scope="module")
def seeing() -> PosteriorImageTower:
    torch.manual_seed(0)
    tower = build_image_tower(SEEING).eval()
    assert isinstance(tower, PosteriorImageTower)
    for table in (tower.class_table, tower.feature_table, tower.feature_bias):
        torch.nn.init.normal_(table)
    return tower


def test_features_and_a_gate_equal_numpy(seeing: PosteriorImageTower) -> None:
    random = np.random.default_rng(0)
    logits, features = 5 * random.normal(size=(4, 1000)), 0.05 * random.normal(size=(4, 1280))
    with torch.no_grad():
        got = seeing.double().project(torch.from_numpy(logits), torch.from_numpy(features)).numpy()
        table, projection = seeing.class_table.numpy(), seeing.feature_table.numpy()
        bias = seeing.feature_bias.numpy()
    seeing.float()
    posterior = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    both, seen = posterior @ table, features @ projection + bias
    gate = 1 / (1 + np.exp(-seen[:, 11:]))
    parts = [(both[:, :12], 0.3), (both[:, 12:], 0.2), (seen[:, :6], 0.5)]
    expected = [
        np.sqrt(share * (1 - gate)) * part / np.linalg.norm(part, axis=1, keepdims=True)
        for part, share in parts
    ]
    expected.append(np.sqrt(gate) * seen[:, 6:11] / np.linalg.norm(seen[:, 6:11], axis=1, keepdims=True))
    np.testing.assert_allclose(got, np.concatenate(expected, axis=1), atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-12)
    assert SEEING.embed_dim == got.shape[1] == 27


def test_the_tower_gives_its_features_to_the_projection(seeing: PosteriorImageTower) -> None:
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = seeing.backbone.features(image)
        expected = seeing.project(seeing.backbone(image), features)
        torch.testing.assert_close(seeing(image), expected)
        with pytest.raises(ConfigError, match="12 columns of features"):
            seeing.project(seeing.backbone(image))


def test_shares_of_all_parts_sum_to_one() -> None:
    with pytest.raises(ConfigError, match=r"feature_weights \(0\.4,\)"):
        build_image_tower(replace(SEEING, feature_weights=(0.4,)))


def test_a_config_without_the_newer_fields_is_the_older_tower() -> None:
    said = config_to_dict(PosteriorImageConfig())
    older = {key: said[key] for key in ("kind", "backbone", "classes", "part_dims", "part_weights")}
    config = config_from_dict(PosteriorImageConfig, older, where="image")
    assert config == PosteriorImageConfig()
    tower = build_image_tower(config)
    assert sorted(key for key in tower.state_dict() if not key.startswith("backbone.")) == ["class_table"]
