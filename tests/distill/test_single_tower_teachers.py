"""Teachers with one tower: image classifiers and sentence encoders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
from msgspec.structs import replace  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from train_runs import SIZE_PX, STAGE, make_data, run, steps  # noqa: E402

from edgeclip.distill.batches import to_float  # noqa: E402
from edgeclip.distill.recipe import ImageFeaturesTeacher, SentenceTeacher  # noqa: E402
from edgeclip.distill.teachers import open_teacher  # noqa: E402
from edgeclip.errors import ConfigError, InputError, MissingExtraError  # noqa: E402
from edgeclip.models.checkpoints import load_checkpoint  # noqa: E402
from edgeclip.models.efficientnet_lite import (  # noqa: E402
    LITE0,
    LITE_MEAN,
    LITE_STD,
    EfficientNetLite,
    timm_keys,
)

WORDS = ("a", "red", "circle", "红", "圆")
WIDTH = 6


def sentences_file(path: Path, *, pooled: bool = False, inputs: tuple[str, ...] = ()) -> np.ndarray:
    """Write an encoder whose tokens are rows of a table, and its tokenizer; return the table."""
    import onnx
    import tokenizers
    from onnx import TensorProto, helper, numpy_helper

    table = np.random.default_rng(0).normal(size=(len(WORDS) + 2, WIDTH)).astype(np.float32)
    names = inputs or ("input_ids", "attention_mask", "token_type_ids")
    nodes = [helper.make_node("Gather", ["table", names[0]], ["tokens"])]
    if pooled:
        nodes.append(helper.make_node("ReduceMax", ["tokens", "axis"], ["out"], keepdims=0))
    else:
        nodes.append(helper.make_node("Identity", ["tokens"], ["out"]))
    graph = helper.make_graph(
        nodes,
        "sentences",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "L"]) for name in names],
        [
            helper.make_tensor_value_info(
                "out", TensorProto.FLOAT, ["B", WIDTH] if pooled else ["B", "L", WIDTH]
            )
        ],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path)
    pieces = {"[PAD]": 0, "[UNK]": 1, **{word: 2 + at for at, word in enumerate(WORDS)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(9)
    tokenizer.save(str(path.with_name("tokenizer.json")))
    return table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), train=64, held_out=8)


# Texts


def test_an_onnx_encoder_is_pooled_over_its_unmasked_tokens(tmp_path: Path) -> None:
    table = sentences_file(tmp_path / "s.onnx")
    spec = SentenceTeacher(name="t", path="s.onnx", tokenizer="tokenizer.json", licence="MIT")
    teacher = open_teacher(spec, tmp_path)
    assert (teacher.image_dim, teacher.text_dim) == (None, WIDTH)
    assert (teacher.parent["name"], teacher.parent["source"], teacher.parent["licence"]) == (
        "s",
        "onnx",
        "MIT",
    )
    tokenizer = teacher.consumer.tokenizer
    tokens = tokenizer(["a red circle", "红 圆", "blue", "a " * 20], truncate=True)
    assert tokens.shape == (4, 9)  # what its tokenizer cuts at
    assert tokens[0].tolist() == [2, 3, 4, -1, -1, -1, -1, -1, -1]
    said = teacher(None, torch.from_numpy(tokens).view(2, 2, 9))
    expected = [table[[2, 3, 4]], table[[5, 6]], table[[1]], table[[2]]]
    rows = [said.texts[0][0], said.texts[1][0], said.texts[0][1], said.texts[1][1]]
    for row, wanted in zip(rows, expected, strict=True):
        assert np.allclose(row.numpy(), wanted.mean(axis=0), atol=1e-6)
    first = open_teacher(
        SentenceTeacher(name="t", path="s.onnx", tokenizer="tokenizer.json", pooling="first"), tmp_path
    )
    assert np.allclose(first(None, torch.from_numpy(tokens[None, :1])).texts[0], table[2])
    short = open_teacher(
        SentenceTeacher(name="t", path="s.onnx", tokenizer="tokenizer.json", context_length=4), tmp_path
    )
    assert short.consumer.tokenizer(["a"]).shape == (1, 4)
    assert short.consumer.tokenizer.digest != tokenizer.digest
    with pytest.raises(InputError, match="got 5 tokens, expected at most 4"):
        short.consumer.tokenizer(["a " * 5])


def test_an_onnx_file_that_pools_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    table = sentences_file(tmp_path / "s.onnx", pooled=True)
    spec = SentenceTeacher(name="t", path="s.onnx", tokenizer="tokenizer.json", context_length=2)
    teacher = open_teacher(spec, tmp_path)
    tokens = torch.from_numpy(teacher.consumer.tokenizer(["red circle"]))
    assert np.allclose(teacher(None, tokens[None]).texts[0], table[[3, 4]].max(axis=0))


def test_texts_alone_teach_through_a_projection(data: Path, tmp_path: Path) -> None:
    sentences_file(data / "s.onnx")
    teacher = """
[[stage.loss]]
kind = "feature"
teacher = "t"
tower = "text"
weight = 100
[[teacher]]
kind = "sentence"
name = "t"
path = "s.onnx"
tokenizer = "tokenizer.json"
"""
    _, heard = run(data, tmp_path / "run", STAGE + teacher)
    assert steps(heard)[-1]["parts"]["1-feature"] < 0.9 * steps(heard)[0]["parts"]["1-feature"]
    for tower in ("both", "image"):
        with pytest.raises(ConfigError, match=r"'feature' asks for image .* 't' has no image tower"):
            run(data, tmp_path / tower, STAGE + teacher.replace('"text"', f'"{tower}"'))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer": None}, "the ONNX file 's.onnx' needs 'tokenizer'"),
        ({"path": "nowhere.onnx"}, r"'path' is '.*nowhere.onnx', which is no file"),
        ({"tokenizer": "nowhere.json"}, "'tokenizer' is '.*nowhere.json', which cannot be read"),
        ({"tokenizer": "s.onnx"}, "'tokenizer' is '.*s.onnx', which cannot be read"),
        ({"context_length": 10}, "'context_length' is 10, expected at most 9"),
        ({"path": "other.onnx"}, r"takes \['ids', 'mask'\], expected 'input_ids'"),
    ],
)
def test_an_encoder_that_cannot_be_used_is_named(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sentences_file(tmp_path / "other.onnx", inputs=("ids", "mask"))
    sentences_file(tmp_path / "s.onnx")
    spec = SentenceTeacher(**{"name": "t", "path": "s.onnx", "tokenizer": "tokenizer.json", **values})
    with pytest.raises(ConfigError, match=f"teacher 't': .*{message}"):
        open_teacher(spec, tmp_path)


def test_without_tokenizers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences_file(tmp_path / "s.onnx")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"teacher 't' .*edgeclip\[train\]"):
        open_teacher(SentenceTeacher(name="t", path="s.onnx", tokenizer="tokenizer.json"), tmp_path)


# Pictures


def test_a_checkpoint_s_image_tower_teaches_alone(repo: Path) -> None:
    probes = repo / "tests" / "data" / "probes"
    teacher = open_teacher(ImageFeaturesTeacher(name="t", path="vit"), probes)
    model = load_checkpoint(probes / "vit")
    assert (teacher.image_dim, teacher.text_dim, teacher.consumer.tokenizer) == (96, None, None)
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        wanted = model.encode_image(to_float(pictures, mean=(0.5,) * 3, std=(0.25,) * 3))
    said = teacher(pictures, None)
    assert torch.allclose(said.image, wanted, atol=1e-5)
    assert said.texts == ()
    assert (teacher.parent["name"], teacher.parent["licence"]) == ("probe-vit", "Apache-2.0")


@pytest.mark.slow
def test_a_published_classifier_gives_what_it_classifies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lite = EfficientNetLite(LITE0).eval()
    state = lite.state_dict()
    save_file(timm_keys(LITE0).to_theirs(state), tmp_path / "timm.safetensors")
    name = "EfficientNet-Lite0"
    teacher = open_teacher(
        ImageFeaturesTeacher(name="t", path="timm.safetensors", model=name, licence="MIT"), tmp_path
    )
    assert (teacher.image_dim, teacher.mean) == (1280, LITE_MEAN)
    pictures = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        wanted = lite.features(to_float(pictures, mean=teacher.mean, std=teacher.std))
    assert torch.allclose(teacher(pictures, None).image, wanted, atol=1e-5)
    assert teacher.parent["licence"] == "Apache-2.0"  # the zoo knows better than the recipe

    torch.save({_lite_pytorch(key): value for key, value in state.items()}, tmp_path / "lite.pt")
    teacher = open_teacher(ImageFeaturesTeacher(name="t", path="lite.pt", licence="Apache-2.0"), tmp_path)
    assert (teacher.mean, teacher.parent["source"]) == (LITE_MEAN, "lite-pytorch")
    with torch.no_grad():
        wanted = lite.features(to_float(pictures, mean=LITE_MEAN, std=LITE_STD))
    assert torch.allclose(teacher(pictures, None).image, wanted, atol=1e-5)


def _lite_pytorch(key: str) -> str:
    """Return how efficientnet-lite-pytorch calls a weight of ours."""
    top = {"stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1"}
    block = {"expand": "_expand_conv", "expand_norm": "_bn0", "depthwise": "_depthwise_conv"}
    block |= {"depthwise_norm": "_bn1", "project": "_project_conv", "project_norm": "_bn2"}
    first, *rest = key.split(".")
    if first == "blocks":
        return ".".join(("_blocks", rest[0], block[rest[1]], *rest[2:]))
    return ".".join(({**top, "classifier": "_fc"}[first], *rest))


@pytest.mark.filterwarnings("ignore")
def test_timm_s_models_give_timm_s_features(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision_shim")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("test_efficientnet", pretrained=False).eval()
    torch.save({"state_dict": theirs.state_dict()}, data / "classifier.pt")
    spec = ImageFeaturesTeacher(
        name="t", path="classifier.pt", model="test_efficientnet", library="timm", licence="MIT"
    )
    teacher = open_teacher(spec, data)
    side = theirs.pretrained_cfg["input_size"][-1]
    assert teacher.consumer.form.size_px == (side, side)
    pictures = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    mean, std = theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"]
    with torch.no_grad():
        features = theirs.forward_features(to_float(pictures, mean=mean, std=std))
        wanted = theirs.forward_head(features, pre_logits=True)
    assert torch.allclose(teacher(pictures, None).image, wanted, atol=1e-5)
    assert (teacher.parent["name"], teacher.parent["licence"]) == ("test_efficientnet", "MIT")
    few = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)  # no classifier at all
    few.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier.")})
    save_file(few.state_dict(), data / "features.safetensors")
    headless = open_teacher(replace(spec, path="features.safetensors"), data)
    assert torch.equal(headless(pictures, None).image, teacher(pictures, None).image)

    stage = STAGE + (
        '[[stage.loss]]\nkind = "feature"\nteacher = "t"\ntower = "image"\n'
        '[[teacher]]\nkind = "image-features"\nname = "t"\npath = "classifier.pt"\n'
        'model = "test_efficientnet"\nlibrary = "timm"\n'
    )
    _, heard = run(data, tmp_path / "run", stage, changes=("stage.0.samples=96",))
    assert steps(heard)[0]["parts"]["1-feature"] > 0

    for change, error, message in (
        ({"model": "test_nobody"}, ConfigError, "timm knows no model 'test_nobody'"),
        ({"model": "test_vit"}, ConfigError, "'classifier.pt' cannot be loaded as 'test_vit' of timm"),
        ({"path": "nowhere.pt"}, InputError, "nowhere.pt"),
    ):
        values = {"name": "t", "path": "classifier.pt", "model": "test_efficientnet", "library": "timm"}
        with pytest.raises(error, match=message):
            open_teacher(ImageFeaturesTeacher(**{**values, **change}), data)


def test_without_timm_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    spec = ImageFeaturesTeacher(name="t", path="w.pt", model="test_vit", library="timm")
    with pytest.raises(MissingExtraError, match=r"teacher 't' .*edgeclip\[openclip\]"):
        open_teacher(spec, tmp_path)


def test_files_of_nobody_are_named(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="nobody's that edgeclip reads"):
        open_teacher(ImageFeaturesTeacher(name="t", path="w.safetensors"), tmp_path)
    torch.save({"_conv_stem.weight": torch.zeros(SIZE_PX)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"teacher 't': 'w.pt' .* the shapes of none"):
        open_teacher(ImageFeaturesTeacher(name="t", path="w.pt"), tmp_path)
