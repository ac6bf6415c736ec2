"""The table of models agrees with the code that builds them and with what was published."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.errors import ConfigError
from edgeclip.models.clip import build_clip, build_image_tower, build_text_tower
from edgeclip.models.config import CLIPConfig, FastViTConfig, config_from_dict, config_to_dict
from edgeclip.models.efficientnet_lite import LITE0, LITE1, LITE2, LITE_MEAN, LITE_STD, EfficientNetLite
from edgeclip.models.fastvit import Downsample
from edgeclip.models.mobileone import MobileOneBlock, RepMixer
from edgeclip.models.zoo import MODELS, TINY, BackboneConfig, ModelEntry, clip_config, model_entry

_FULL = [entry for entry in MODELS.values() if isinstance(entry.config, CLIPConfig)]
_BACKBONES = [entry for entry in MODELS.values() if isinstance(entry.config, BackboneConfig)]


def _name(entry: ModelEntry) -> str:
    return entry.name


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("entry", _FULL, ids=_name)
def test_parameters_are_those_of_the_built_towers(entry: ModelEntry) -> None:
    assert isinstance(entry.config, CLIPConfig)
    with torch.device("meta"):
        built = _count(build_image_tower(entry.config.image)), _count(build_text_tower(entry.config.text))
    if entry.pruned_on_load:
        assert (entry.image_parameters, entry.text_parameters) == (None, None)
        # The file is a whole ViT-B/32 with masks.
        whole = MODELS["ViT-B-32.openai"]
        assert built == (whole.image_parameters, whole.text_parameters)
    else:
        assert built == (entry.image_parameters, entry.text_parameters)


@pytest.mark.parametrize("entry", _BACKBONES, ids=_name)
def test_a_backbone_counts_the_published_classifier(entry: ModelEntry) -> None:
    config = {each.name: each for each in (LITE0, LITE1, LITE2)}[entry.config.image.backbone]  # type: ignore[union-attr]
    with torch.device("meta"):
        assert _count(EfficientNetLite(config)) == entry.image_parameters
    assert (entry.config.mean, entry.config.std) == (LITE_MEAN, LITE_STD)
    assert entry.config.image_size_px == (config.image_size_px, config.image_size_px)
    assert (entry.text_parameters, entry.tokenizer, entry.embed_dim, entry.context_length) == (None,) * 4


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("MobileCLIP-S0", 11.4, 42.4),
        ("MobileCLIP-S1", 21.5, 63.4),
        ("MobileCLIP-S2", 35.7, 63.4),
        ("MobileCLIP-B", 86.3, 63.4),
        ("MobileCLIP-S3", 125.1, 123.7),
        ("MobileCLIP-S4", 321.6, 123.7),
        ("MobileCLIP-L-14", 304.0, 123.7),
        ("MobileCLIP2-S0", 11.4, 63.4),
        ("TinyCLIP-ViT-8M-16-Text-3M", 8.3, 15.2),
        ("TinyCLIP-ViT-39M-16-Text-19M", 38.6, 44.5),
        ("TinyCLIP-ViT-40M-32-Text-19M", 39.7, 44.5),
        ("TinyCLIP-ViT-61M-32-Text-29M", 61.4, 54.0),
        ("ViT-B-32.openai", 87.8, 63.4),
    ],
)
def test_sizes_are_the_published_ones(name: str, image: float, text: float) -> None:
    # Apple lists 123.6 M for the large text tower and 304.3 M for ViT-L/14; open_clip's own count is ours.
    config, text_parameters = clip_config(name), MODELS[name].text_parameters
    with torch.device("meta"):
        tower = build_image_tower(config.image)
    assert text_parameters is not None
    assert round(_count_as_published(tower) / 1e6, 1) == image
    assert round(text_parameters / 1e6, 1) == text


def _count_as_published(tower: torch.nn.Module) -> int:
    """Count parameters after the folding of Apple's code: branches only, no norm elsewhere and no scale."""
    count = _count(tower)
    inside = {module.mix for module in tower.modules() if isinstance(module, RepMixer)}
    for module in tower.modules():
        if isinstance(module, RepMixer):
            conv, branches = module.mix.main.conv, [module]
        elif isinstance(module, MobileOneBlock) and module not in inside:
            conv = module.main.conv
            branches = [branch for branch in (module.main, module.scale, module.skip) if branch is not None]
        elif isinstance(module, Downsample):
            conv, branches = module.large.conv, [module.large, module.small]
        else:
            continue
        count += conv.weight.numel() + conv.out_channels - sum(map(_count, branches))
    return count


@pytest.mark.parametrize("entry", _FULL, ids=_name)
def test_configs_survive_json_and_agree_with_themselves(entry: ModelEntry) -> None:
    config = entry.config
    assert isinstance(config, CLIPConfig)
    assert config_from_dict(CLIPConfig, config_to_dict(config), where=config.name) == config
    assert config.image.embed_dim == config.text.embed_dim == entry.embed_dim
    grid = getattr(config.image, "grid", None)
    if grid is not None:
        assert tuple(side * config.image.patch_px for side in grid) == config.image_size_px  # type: ignore[union-attr]


def test_every_variant_of_the_published_families_is_there() -> None:
    names = set(MODELS)
    assert {f"MobileCLIP-{size}" for size in ("S0", "S1", "S2", "B", "B-LT", "S3", "S4", "L-14")} <= names
    assert {f"MobileCLIP2-{size}" for size in ("S0", "S2", "B", "S3", "S4", "L-14")} <= names
    assert {f"{shape}.openai" for shape in ("ViT-B-32", "ViT-B-16", "ViT-L-14")} <= names
    assert {"ViT-B-32.laion2b_s34b_b79k", "ViT-B-16.laion2b_s34b_b88k"} <= names
    sizes = {name.split("ViT-")[1].split("-")[0] for name in names if name.startswith("TinyCLIP")}
    assert sizes == {"8M", "39M", "40M", "61M", "22M", "45M", "63M"}
    assert {"EfficientNet-Lite0", "EfficientNet-Lite1", "EfficientNet-Lite2"} <= names


def test_openai_weights_use_quick_gelu_and_the_others_do_not() -> None:
    for entry in MODELS.values():
        activation = getattr(entry.config.image, "activation", None)
        if activation is not None:
            assert activation == ("quick-gelu" if entry.name.endswith(".openai") else "gelu"), entry.name


def test_preprocessing_of_mobileclip_follows_the_published_tables() -> None:
    plain = {"MobileCLIP-S0", "MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP-B", "MobileCLIP-B-LT"}
    plain |= {"MobileCLIP2-S0", "MobileCLIP2-S2", "MobileCLIP2-B"}
    for entry in MODELS.values():
        if not entry.family.startswith("MobileCLIP"):
            continue
        config = entry.config
        assert config.mean == ((0, 0, 0) if entry.name in plain else (0.48145466, 0.4578275, 0.40821073))
        assert config.std == ((1, 1, 1) if entry.name in plain else (0.26862954, 0.26130258, 0.27577711))
        assert config.interpolation == ("bicubic" if entry.name.endswith("L-14") else "bilinear")
        side = 256 if isinstance(config.image, FastViTConfig) else 224
        assert (config.image_size_px, config.resize, config.crop) == ((side, side), "shortest", "center")


def test_apple_weights_are_research_only_and_the_rest_are_free() -> None:
    for entry in MODELS.values():
        if entry.family.startswith("MobileCLIP"):
            assert entry.licence is not None
            assert (entry.licence.identifier, entry.licence.research_only) == ("apple-amlr", True)
        elif entry.licence is not None:
            assert entry.licence.identifier in {"MIT", "Apache-2.0"}
            assert not entry.licence.research_only


def test_sources_are_complete_and_nothing_is_claimed_that_was_not_run() -> None:
    for entry in MODELS.values():
        assert (entry.weights is None) == (entry.licence is None) == (entry.family == "edgeclip")
        assert (entry.accuracy is None) == (entry.weights is None)
        assert entry.run_here == (entry.name == "EfficientNet-Lite0")
        if entry.weights is None:
            continue
        weights = entry.weights
        assert weights.files
        assert weights.url.startswith("https://")
        assert weights.repo is None or re.fullmatch(r"[\w.-]+/[\w.-]+", weights.repo)
        assert weights.revision is None or re.fullmatch(r"[0-9a-f]{40}", weights.revision)
        assert weights.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", weights.sha256)


def test_only_mobileclip_b_is_computed_otherwise_from_other_files() -> None:
    special = {entry.name for entry in MODELS.values() if entry.image_of}
    assert special == {"MobileCLIP-B", "MobileCLIP-B-LT"}
    for name in special:
        apple, timm = MODELS[name].config.image, MODELS[name].image_of["open_clip"]
        assert (apple.norm_eps, apple.stem_padding_px) == (1e-5, 1)
        assert (timm.norm_eps, timm.stem_padding_px) == (1e-6, 0)
        assert timm == MODELS["MobileCLIP2-B"].config.image == MODELS[name].image_of["timm"]


def test_the_nano_image_tower_is_small_and_text_towers_fit_the_tokenizer(repo: Path) -> None:
    own = [entry for entry in MODELS.values() if entry.family == "edgeclip"]
    (described,) = (repo / "edgeclip/assets/default/tokenizer").glob("tokenizer*.json")
    tokenizer = json.loads(described.read_text(encoding="utf-8"))
    for entry in own:
        assert entry.image_parameters is not None
        assert entry.image_parameters <= 2_000_000
        assert isinstance(entry.config, CLIPConfig)
        text = entry.config.text
        assert 192 <= text.width <= 384
        assert 0 < text.token_dim < text.width
        assert (text.pad_id, text.context_length) == (
            tokenizer["special"]["pad"],
            tokenizer["context_length"],
        )
        assert text.vocab_size == text.pad_id + 1
    assert {entry.config.text.kind for entry in own} == {"bag", "transformer"}  # type: ignore[union-attr]


@pytest.mark.parametrize("config", TINY.values(), ids=lambda config: config.name)
def test_tiny_models_embed_and_are_tiny(config: CLIPConfig) -> None:
    torch.manual_seed(0)
    model = build_clip(config).eval()
    assert _count(model) < 200_000
    tokens = torch.randint(1, 60, (2, config.text.context_length))
    with torch.inference_mode():
        image, text, scale = model(torch.rand(2, 3, *config.image_size_px), tokens)
    assert image.shape == text.shape == (2, config.embed_dim)
    assert np.isfinite(float(scale))


def test_the_tiny_table_covers_every_topology() -> None:
    def shape(tower: object, *names: str) -> tuple[object, ...]:
        return (getattr(tower, "kind", None), *(getattr(tower, name, None) for name in names))

    configs = [entry.config for entry in _FULL if isinstance(entry.config, CLIPConfig)]
    image = ("stem", "activation", "attention_norm", "stem_scale_branch")
    text = ("conv_ends", "attention", "activation", "pool")
    assert {shape(each.image, *image) for each in configs} <= {
        shape(each.image, *image) for each in TINY.values()
    }
    assert {shape(each.text, *text) for each in configs} <= {
        shape(each.text, *text) for each in TINY.values()
    }


def test_unknown_names_are_errors_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"no model is called 'mobileclip2-s9': did you mean MobileCLIP2-S"):
        model_entry("mobileclip2-s9")
    with pytest.raises(ConfigError, match=r"no model is called 'xyz': run `edgeclip models`"):
        model_entry("xyz")
    with pytest.raises(ConfigError, match=r"'ViT-L-14' has several weights: say one of ViT-L-14\.datacomp"):
        model_entry("ViT-L-14")
    with pytest.raises(ConfigError, match="'EfficientNet-Lite1' is an image backbone"):
        clip_config("EfficientNet-Lite1")
    assert clip_config("MobileCLIP2-S0") is MODELS["MobileCLIP2-S0"].config


def test_entries_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        MODELS["other"] = MODELS["MobileCLIP-S0"]  # type: ignore[index]
    changed = replace(MODELS["MobileCLIP-S0"], note="mine")
    assert MODELS["MobileCLIP-S0"].note != changed.note


def test_the_table_needs_no_torch() -> None:
    code = "import sys, edgeclip.models.zoo; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
