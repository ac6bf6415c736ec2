"""Checkpoints of others load without a missing key, go back unchanged, and are told apart or refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import urllib.request
from pathlib import Path
from typing import get_args

import pytest

torch = pytest.importorskip("torch")
from key_lists import names, read_keys, synthetic_state  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edgeclip.errors import ConfigError, InputError  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import CLIPConfig, FastViTConfig, ViTConfig  # noqa: E402
from edgeclip.models.foreign import (  # noqa: E402
    Source,
    from_state,
    image_tower_from_state,
    key_map,
    load_foreign,
    load_image_tower,
    save_foreign,
    sniff,
)
from edgeclip.models.foreign import _choose as choose  # noqa: E402
from edgeclip.models.foreign import _name_of_file as name_of_file  # noqa: E402
from edgeclip.models.keys import KeyMismatchError  # noqa: E402
from edgeclip.models.reparam import reparameterize  # noqa: E402
from edgeclip.models.tinyclip import plain_names  # noqa: E402
from edgeclip.models.zoo import MODELS, TINY  # noqa: E402

# The same sums in another order, in float64.
TOLERANCE = 1e-9
LARGE = ("S3", "S4", "L-14", "large", "mci3", "mci4")

# Which model each list of keys is, and whether it must be said.
LISTS: dict[str, tuple[Source, tuple[str, ...], str | None]] = {
    "apple-mobileclip_s0": ("apple", ("MobileCLIP-S0",), None),
    "apple-mobileclip_s1": ("apple", ("MobileCLIP-S1",), None),
    "apple-mobileclip_s2": ("apple", ("MobileCLIP-S2", "MobileCLIP2-S2"), None),
    "apple-mobileclip_b": ("apple", ("MobileCLIP-B",), "MobileCLIP-B"),
    "apple-mobileclip2_s0": ("apple", ("MobileCLIP2-S0",), None),
    "hf-TinyCLIP-ViT-8M-16-Text-3M": ("hf", ("TinyCLIP-ViT-8M-16-Text-3M",), None),
    "hf-TinyCLIP-ViT-39M-16-Text-19M": ("hf", ("TinyCLIP-ViT-39M-16-Text-19M",), None),
    "hf-TinyCLIP-ViT-40M-32-Text-19M": ("hf", ("TinyCLIP-ViT-40M-32-Text-19M",), None),
    "hf-TinyCLIP-ViT-61M-32-Text-29M": ("hf", ("TinyCLIP-ViT-61M-32-Text-29M",), None),
    "hf-clip-vit-base-patch32": ("hf", ("ViT-B-32.openai",), "ViT-B-32.openai"),
    "hf-clip-vit-base-patch16": ("hf", ("ViT-B-16.openai",), "ViT-B-16.openai"),
    "hf-clip-vit-large-patch14": ("hf", ("ViT-L-14.openai",), "ViT-L-14.openai"),
    "openai-ViT-B-32": ("openai", ("ViT-B-32.openai",), None),
    "openai-ViT-B-16": ("openai", ("ViT-B-16.openai",), None),
    "openai-ViT-L-14": ("openai", ("ViT-L-14.openai",), None),
    "openclip-MobileCLIP-S1": ("open_clip", ("MobileCLIP-S1",), None),
    "openclip-MobileCLIP-S2": ("open_clip", ("MobileCLIP-S2", "MobileCLIP2-S2"), None),
    "openclip-MobileCLIP-B": ("open_clip", ("MobileCLIP-B", "MobileCLIP-B-LT", "MobileCLIP2-B"), None),
    "openclip-MobileCLIP2-S0": ("open_clip", ("MobileCLIP2-S0",), None),
    "openclip-MobileCLIP2-S2": ("open_clip", ("MobileCLIP-S2", "MobileCLIP2-S2"), None),
    "openclip-MobileCLIP2-B": ("open_clip", ("MobileCLIP-B", "MobileCLIP-B-LT", "MobileCLIP2-B"), None),
    "openclip-MobileCLIP2-S3": ("open_clip", ("MobileCLIP-S3", "MobileCLIP2-S3"), None),
    "openclip-MobileCLIP2-S4": ("open_clip", ("MobileCLIP-S4", "MobileCLIP2-S4"), None),
    "openclip-MobileCLIP2-L-14": ("open_clip", ("MobileCLIP-L-14", "MobileCLIP2-L-14"), None),
    "openclip-ViT-B-32": ("openai", ("ViT-B-32.laion2b_s34b_b79k",), "ViT-B-32.laion2b_s34b_b79k"),
    "openclip-ViT-B-16": ("openai", ("ViT-B-16.laion2b_s34b_b88k",), "ViT-B-16.laion2b_s34b_b88k"),
    "openclip-ViT-L-14": ("openai", ("ViT-L-14.laion2b_s32b_b82k",), "ViT-L-14.laion2b_s32b_b82k"),
    "timm-fastvit_mci0": ("timm", ("MobileCLIP-S0", "MobileCLIP2-S0"), None),
    "timm-fastvit_mci1": ("timm", ("MobileCLIP-S1",), None),
    "timm-fastvit_mci2": ("timm", ("MobileCLIP-S2", "MobileCLIP2-S2"), None),
    "timm-fastvit_mci3": ("timm", ("MobileCLIP-S3", "MobileCLIP2-S3"), None),
    "timm-fastvit_mci4": ("timm", ("MobileCLIP-S4", "MobileCLIP2-S4"), None),
    "timm-vit_base_mci_224": ("timm", ("MobileCLIP-B", "MobileCLIP-B-LT", "MobileCLIP2-B"), None),
    "timm-tf_efficientnet_lite0": ("timm", ("EfficientNet-Lite0",), None),
    "timm-tf_efficientnet_lite1": ("timm", ("EfficientNet-Lite1",), None),
    "timm-tf_efficientnet_lite2": ("timm", ("EfficientNet-Lite2",), None),
    "tinyclip-ViT-8M-16-Text-3M": ("openai", ("TinyCLIP-ViT-8M-16-Text-3M",), None),
    "tinyclip-ViT-39M-16-Text-19M": ("openai", ("TinyCLIP-ViT-39M-16-Text-19M",), None),
    "tinyclip-ViT-40M-32-Text-19M": ("openai", ("TinyCLIP-ViT-40M-32-Text-19M",), None),
    "tinyclip-ViT-61M-32-Text-29M": ("openai", ("TinyCLIP-ViT-61M-32-Text-29M",), None),
    "tinyclip-auto-pruned": ("tinyclip", (), None),
    # With gates: tests/models/test_tinyclip.py.
}


def keys_of(name: str) -> dict[str, Tensor]:
    """Return tensors without content under the names of a list, as ``read_state`` would."""
    state = synthetic_state(name)
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def perturbed(config: CLIPConfig, seed: int = 0) -> CLIP:
    """Return a model none of whose tensors is trivial: fresh ones hide a key that went elsewhere."""
    torch.manual_seed(seed)
    model = build_clip(config, scale=20.0).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(int(torch.randint(1, 1000, (), generator=generator)))
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif key != "logit_scale":
            value.add_(torch.randn(value.shape, generator=generator) * 0.02)
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return set(first) == set(second) and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )


# --- key lists ---------------------------------------------------------------------------------------------


def test_every_list_has_a_test() -> None:
    assert set(names()) == set(LISTS) | {"tinyclip-auto-masked"}


def test_lists_stay_small(repo: Path) -> None:
    assert sum(path.stat().st_size for path in (repo / "tests/data/keys").iterdir()) < 1_500_000


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if any(part in name for part in LARGE) else name
        for name in LISTS
    ],
)
def test_published_names_and_shapes_load_without_a_difference(name: str) -> None:
    source, candidates, said = LISTS[name]
    state = keys_of(name)
    assert sniff(state) == source
    if source == "timm":
        tower = image_tower_from_state(state, model=said)
        assert tower.candidates == candidates
        parameters = {key: value.shape for key, value in tower.tower.state_dict().items()}
    else:
        found = from_state(state, model=said)
        assert found.source == source
        assert found.candidates == candidates
        assert not found.model.training
        parameters = {key: value.shape for key, value in found.model.state_dict().items()}
    assert parameters
    count = sum(value.numel() for value in plain_names(state).values())
    # Theirs may hold constants beside: zero biases, positions, numbers.
    assert 0 <= count - sum(shape.numel() for shape in parameters.values()) <= 1000


@pytest.mark.parametrize("name", ["hf-clip-vit-base-patch32", "openclip-ViT-B-32"])
def test_what_the_weights_do_not_say_must_be_said(name: str) -> None:
    with pytest.raises(
        InputError,
        match=r"'ViT-B-32\.openai', 'ViT-B-32\.laion2b_s34b_b79k'.*differ in \['image\.activation', "
        r"'text\.activation'\]; say which one it is with `model`",
    ):
        from_state(keys_of(name))


def test_the_name_decides_activation_and_pixels() -> None:
    state = keys_of("openclip-ViT-B-32")
    openai = from_state(state, model="ViT-B-32.openai").config.image
    laion = from_state(state, model="ViT-B-32.laion2b_s34b_b79k").config.image
    assert isinstance(openai, ViTConfig)
    assert isinstance(laion, ViTConfig)
    assert (openai.activation, laion.activation) == ("quick-gelu", "gelu")


def test_old_position_buffers_may_be_missing() -> None:
    state = {key: value for key, value in keys_of("hf-clip-vit-base-patch32").items() if "_ids" not in key}
    assert from_state(state, model="ViT-B-32.openai").source == "hf"


def test_mobileclip_b_is_computed_as_the_code_of_its_file_does() -> None:
    """Apple's code and timm's differ in the norms' epsilon and in the padding of the stem."""
    numbers = {}
    for name, model in (
        ("apple-mobileclip_b", "MobileCLIP-B"),
        ("apple-mobileclip_b", "MobileCLIP-B-LT"),
        ("apple-mobileclip_b", "MobileCLIP2-B"),  # published for open_clip
        ("openclip-MobileCLIP-B", None),
        ("timm-vit_base_mci_224", None),
    ):
        state = keys_of(name)
        found = (image_tower_from_state if name.startswith("timm") else from_state)(state, model=model)
        assert isinstance(found.config.image, ViTConfig)
        numbers[name, model] = (found.config.image.norm_eps, found.config.image.stem_padding_px)
    assert list(numbers.values()) == [(1e-5, 1), (1e-5, 1), (1e-6, 0), (1e-6, 0), (1e-6, 0)]


def test_mobileclip_b_of_apple_must_be_told_from_the_second_generation() -> None:
    with pytest.raises(InputError, match=r"differ in \['image\.norm_eps', 'image\.stem_padding_px'\]"):
        from_state(keys_of("apple-mobileclip_b"))


def test_every_missing_and_unexpected_key_is_named() -> None:
    state = keys_of("tinyclip-ViT-8M-16-Text-3M")
    state["visual.surprise"] = state.pop("visual.ln_post.weight")
    state["ln_final.weight"] = torch.zeros(3, device="meta")
    with pytest.raises(KeyMismatchError, match=r"nearest to 'TinyCLIP-ViT-8M-16-Text-3M'") as caught:
        from_state(state)
    message = str(caught.value)
    assert "missing keys ['visual.ln_post.weight'], unexpected keys ['visual.surprise']" in message
    assert "'ln_final.weight' is (3,) instead of (256,)" in message


def test_a_wrong_name_is_a_mismatch() -> None:
    with pytest.raises(
        KeyMismatchError, match=r"as 'TinyCLIP-ViT-39M-16-Text-19M': the weights do not fit"
    ) as e:
        from_state(keys_of("tinyclip-ViT-8M-16-Text-3M"), model="TinyCLIP-ViT-39M-16-Text-19M")
    assert len(e.value.differences.missing) > 20


def test_shapes_of_no_known_model_are_refused() -> None:
    state = {key: value[:1] if value.ndim else value for key, value in keys_of("apple-mobileclip_s0").items()}
    with pytest.raises(InputError, match=r"has the names of 'apple', but no known model"):
        from_state(state)


def test_unknown_names_are_shown() -> None:
    with pytest.raises(InputError, match=r"the names \['backbone\.a', 'backbone\.b'\] … are nobody's"):
        from_state({"backbone.b": torch.zeros(1), "backbone.a": torch.zeros(1)})


def test_our_own_names_say_how_to_load_them() -> None:
    with pytest.raises(InputError, match="for a checkpoint of edgeclip name its folder"):
        from_state(build_clip(TINY["tiny-vit"]).state_dict())


def test_an_image_tower_alone_is_no_model() -> None:
    with pytest.raises(InputError, match=r"holds an image tower alone, by timm's names.*load_image_tower"):
        from_state(keys_of("timm-fastvit_mci0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "MobileCLIP-S9"}, "'MobileCLIP-S9'"),
        ({"model": "MobileCLIP-S0", "config": TINY["tiny-mct"]}, "both model 'MobileCLIP-S0' and a config"),
        ({"model": "EfficientNet-Lite0"}, "'EfficientNet-Lite0' is an image tower alone"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_state(keys_of("apple-mobileclip_s0"), **arguments)  # type: ignore[arg-type]


# --- round trips -------------------------------------------------------------------------------------------

ROUND_TRIPS: list[tuple[str, Source]] = [
    ("tiny-fastvit", "apple"),
    ("tiny-fastvit", "open_clip"),
    ("tiny-fastvit-five", "apple"),
    ("tiny-fastvit-five", "open_clip"),
    ("tiny-mct", "apple"),
    ("tiny-vit", "openai"),
    ("tiny-vit", "open_clip"),
    ("tiny-vit", "hf"),
    ("tiny-vit", "tinyclip"),
    ("tiny-vit-quick", "openai"),
    ("tiny-vit-quick", "hf"),
    ("tiny-vit-mci", "apple"),
    ("tiny-vit-mci", "open_clip"),
    ("tiny-vit-pruned", "openai"),
    ("tiny-vit-pruned", "tinyclip"),
]


@pytest.mark.parametrize(("name", "source"), ROUND_TRIPS)
def test_round_trip_is_bit_identical(name: str, source: Source, tmp_path: Path) -> None:
    config = TINY[name]
    model = perturbed(config)
    save_foreign(model, config, tmp_path / "w.safetensors", source=source)
    found = load_foreign(tmp_path / "w.safetensors", config=config)
    assert found.config == config
    assert same_weights(found.model, model)


@pytest.mark.parametrize("name", ["tiny-fastvit", "tiny-vit", "tiny-vit-mci"])
def test_image_tower_alone_round_trips(name: str, tmp_path: Path) -> None:
    config = TINY[name]
    model = perturbed(config)
    save_foreign(model, config, tmp_path / "w.safetensors", source="timm")
    state = load_file(tmp_path / "w.safetensors")
    part = image_tower_from_state(keys_of("timm-fastvit_mci0")).config
    tower = image_tower_from_state(state, config=dataclasses.replace(part, image=config.image))
    assert same_weights(tower.tower, model.image_tower)


def test_a_bias_in_timms_head_is_kept() -> None:
    """timm trains its head with a bias; only conversions from Apple's names leave zeros there."""
    state = synthetic_state("timm-fastvit_mci0", device="cpu")
    plain = image_tower_from_state(state)
    assert isinstance(plain.config.image, FastViTConfig)
    assert not plain.config.image.projection_bias
    state["head.fc.bias"] += 0.5
    biased = image_tower_from_state(state)
    assert isinstance(biased.config.image, FastViTConfig)
    assert biased.config.image.projection_bias
    assert torch.equal(biased.tower.state_dict()["projection.bias"], torch.full((512,), 0.5))


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("tiny-bag", "open_clip", "'open_clip' has no names for one of kind 'bag'"),
        ("tiny-fastvit", "hf", "'hf' has no names for one of kind 'fastvit'"),
        ("tiny-mct", "open_clip", "conv_ends False, this tower True"),
        ("tiny-transformer", "apple", "token_dim 0, this tower 8"),
    ],
)
def test_models_that_a_source_has_not_are_refused(
    name: str, source: Source, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        save_foreign(build_clip(TINY[name]), TINY[name], tmp_path / "w", source=source)


def test_full_attention_is_not_written_for_causal_readers() -> None:
    config = TINY["tiny-vit"]
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, attention="full"))
    with pytest.raises(ConfigError, match="code of 'hf' computes 'causal' attention, this tower 'full'"):
        key_map(config, "hf")
    names = {name for pair in key_map(config, "open_clip").pairs for name in pair.names}
    assert "visual.trunk.norm_pre.weight" in names  # as MobileCLIP-L-14


def test_folded_model_is_refused(tmp_path: Path) -> None:
    config = TINY["tiny-fastvit"]
    with pytest.raises(ConfigError, match=r"'tiny-fastvit' is folded or was built from another config: \d+"):
        save_foreign(reparameterize(build_clip(config)), config, tmp_path / "w", source="apple")


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    config = TINY["tiny-vit"]
    with pytest.raises(InputError, match=r"w\.safetensors' cannot be written"):
        save_foreign(build_clip(config), config, tmp_path / "no" / "w.safetensors", source="openai")


def test_every_source_is_tested() -> None:
    assert {source for _, source in ROUND_TRIPS} | {"timm"} == set(get_args(Source))


# --- files -------------------------------------------------------------------------------------------------


def tiny_file(path: Path, **changes: Tensor) -> CLIPConfig:
    """Write a tiny ViT under OpenAI's names, with some tensors replaced."""
    config = TINY["tiny-vit"]
    model = perturbed(config)
    state = key_map(config, "openai").to_theirs(model.state_dict()) | changes
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return config


def test_half_precision_is_loaded_as_float32(tmp_path: Path) -> None:
    config = TINY["tiny-vit"]
    model = perturbed(config)
    half = key_map(config, "openai").to_theirs(copy.deepcopy(model).half().state_dict())
    save_file(half, tmp_path / "w.safetensors")
    found = load_foreign(tmp_path / "w.safetensors", config=config)
    weight = found.model.state_dict()["image_tower.projection.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.state_dict()["image_tower.projection.weight"].half().float())
    assert found.parents[0]["dtypes"] == ["float16"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    config = tiny_file(tmp_path / "w.pt", **{"ln_final.bias": torch.full((32,), value)})
    with pytest.raises(
        InputError, match=r"1 tensors hold numbers that are not finite.*text_tower\.final_norm\.b"
    ):
        load_foreign(tmp_path / "w.pt", config=config)


def test_scale_of_one_element_is_a_scalar(tmp_path: Path) -> None:
    config = tiny_file(tmp_path / "w.pt", logit_scale=torch.tensor([2.5]))
    assert load_foreign(tmp_path / "w.pt", config=config).model.logit_scale.item() == 2.5


def test_model_outlives_its_file(tmp_path: Path) -> None:
    config = tiny_file(tmp_path / "w.pt")
    model = load_foreign(tmp_path / "w.pt", config=config).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "w.pt").write_bytes(b"\0" * (tmp_path / "w.pt").stat().st_size)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_origin_is_recorded(tmp_path: Path) -> None:
    config = tiny_file(tmp_path / "w.pt")
    (parent,) = load_foreign(tmp_path / "w.pt", config=config).parents
    assert parent["sha256"] == hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    assert (parent["file"], parent["source"], parent["dtypes"]) == ("w.pt", "openai", ["float32"])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mobileclip2_b.pt", "MobileCLIP2-B"),
        ("models--apple--MobileCLIP-B-LT-OpenCLIP/open_clip_model.safetensors", "MobileCLIP-B-LT"),
        ("models--apple--MobileCLIP-B-OpenCLIP/open_clip_model.safetensors", "MobileCLIP-B"),
        ("weights.pt", None),
    ],
)
def test_file_name_tells_models_of_one_shape_apart(path: str, expected: str | None) -> None:
    entries = [MODELS[name] for name in ("MobileCLIP-B", "MobileCLIP-B-LT", "MobileCLIP2-B")]
    assert name_of_file(Path("/data") / path, entries) == expected


@pytest.mark.parametrize(
    ("name", "source", "path", "expected"),
    [
        ("apple-mobileclip_b", "apple", "mobileclip_b.pt", "MobileCLIP-B"),
        ("apple-mobileclip_b", "apple", "mobileclip2_b.pt", "MobileCLIP2-B"),
        ("openclip-ViT-B-32", "openai", "ViT-B-32.openai/open_clip_model.safetensors", "ViT-B-32.openai"),
    ],
)
def test_published_file_name_decides_what_the_weights_do_not_say(
    name: str, source: Source, path: str, expected: str
) -> None:
    entries = choose(keys_of(name), source, "x", path=Path("/data") / path)
    assert entries[0].name == expected
    assert len(entries) == 3


def test_name_from_the_file_is_used_everywhere(tmp_path: Path) -> None:
    state = synthetic_state("timm-fastvit_mci0", device="cpu")
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "mobileclip2_s0.pt")
    found = load_image_tower(tmp_path / "mobileclip2_s0.pt")
    assert found.name == found.config.name == found.parents[0]["name"] == "MobileCLIP2-S0"
    assert found.candidates == ("MobileCLIP2-S0", "MobileCLIP-S0")
    assert found.licence == "apple-amlr"


# --- side by side ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_open_clip_and_we_read_each_others_mobileclip2_s0(tmp_path: Path) -> None:
    import torchvision_shim  # noqa: F401

    open_clip = pytest.importorskip("open_clip")
    published = synthetic_state("openclip-MobileCLIP2-S0", device="cpu")
    save_file(published, tmp_path / "theirs.safetensors")
    found = load_foreign(tmp_path / "theirs.safetensors")
    assert found.name == "MobileCLIP2-S0"
    save_foreign(found.model, found.config, tmp_path / "ours.safetensors", source="open_clip")
    written = load_file(tmp_path / "ours.safetensors")
    assert set(written) == set(published)
    assert all(torch.equal(written[key], value) for key, value in published.items())

    # Without its own random weights, which take longer than the comparison.
    again = open_clip.create_model("MobileCLIP2-S0", load_weights=False, device="meta").to_empty(device="cpu")
    open_clip.load_checkpoint(again, str(tmp_path / "ours.safetensors"))
    again, ours = again.eval().double(), found.model.double()
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)).double()
    tokens = torch.randint(1, 49000, (2, 77), generator=torch.Generator().manual_seed(2))
    tokens[:, 20] = 49407
    with torch.no_grad():
        for mine, other in (
            (ours.encode_image(image), again.encode_image(image)),
            (ours.encode_text(tokens), again.encode_text(tokens)),
        ):
            assert (mine - other).abs().max() <= TOLERANCE * other.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileCLIP-B", "MobileCLIP2-S0", "ViT-B-32"])
def test_lists_agree_with_the_installed_open_clip(name: str) -> None:
    """``tests/tools/write_keys.py`` writes them anew where a version changed names."""
    import torchvision_shim  # noqa: F401

    open_clip = pytest.importorskip("open_clip")
    state = open_clip.create_model(name, load_weights=False, device="meta").state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == read_keys(
        f"openclip-{name}"
    )


@pytest.mark.slow
def test_a_published_size_round_trips_through_a_file(tmp_path: Path) -> None:
    """TinyCLIP-8M as its authors release it: float16, under ``state_dict``, every name after ``module.``."""
    state = {k: v.half() for k, v in synthetic_state("tinyclip-ViT-8M-16-Text-3M", device="cpu").items()}
    torch.save({"state_dict": state, "epoch": 25}, tmp_path / "TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt")
    found = load_foreign(tmp_path / "TinyCLIP-ViT-8M-16-Text-3M-YFCC15M.pt")
    assert (found.name, found.licence) == ("TinyCLIP-ViT-8M-16-Text-3M", "MIT")
    save_foreign(found.model, found.config, tmp_path / "hf.safetensors", source="hf")
    back = load_foreign(tmp_path / "hf.safetensors")
    assert back.config == found.config
    assert same_weights(back.model, found.model)
    published = {key for key in read_keys("hf-TinyCLIP-ViT-8M-16-Text-3M") if "_ids" not in key}
    assert set(load_file(tmp_path / "hf.safetensors")) == published


# --- the real files ----------------------------------------------------------------------------------------

RELEASES = "https://github.com/wkcn/TinyCLIP-model-zoo/releases/download/checkpoints/"
PUBLISHED = sorted(name for name, entry in MODELS.items() if entry.weights is not None)


@pytest.mark.network
@pytest.mark.parametrize("name", PUBLISHED)
def test_real_weights_load(name: str, tmp_path: Path) -> None:
    entry = MODELS[name]
    weights = entry.weights
    assert weights is not None
    path = tmp_path / weights.files[0]
    where = f"https://huggingface.co/{weights.repo}/resolve/main/" if weights.repo else RELEASES
    urllib.request.urlretrieve(where + weights.files[0], path)  # noqa: S310 - two fixed hosts
    if entry.text_parameters is None and not entry.pruned_on_load:
        assert name in load_image_tower(path).candidates
        return
    found = load_foreign(path, model=name)
    assert 1 < found.model.logit_scale.exp().item() <= 101
    if entry.image_parameters is not None:
        ours = found.model.image_tower
        extra = 0 if found.config.image == entry.config.image else entry.config.image.embed_dim
        assert sum(value.numel() for value in ours.parameters()) - extra <= entry.image_parameters


def test_a_file_with_nobodys_names_is_named(repo: Path) -> None:
    ours = repo / "tests/data/probes/vit/model.safetensors"
    with pytest.raises(
        InputError, match=r"weights file '.*vit/model.safetensors': the names .*name its folder"
    ):
        load_foreign(ours)
