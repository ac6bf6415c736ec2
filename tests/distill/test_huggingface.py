"""Teachers of transformers: their embeddings are those of the library itself, on inputs it made itself."""

from __future__ import annotations

import json
import math
import pickle  # noqa: TID251 - as workers get it
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision_shim")
transformers = pytest.importorskip("transformers")

from msgspec.structs import replace  # noqa: E402
from tiny_transformers import EMBED, SIDE_PX, save  # noqa: E402
from train_runs import STAGE, make_data, recipe_text, run, steps  # noqa: E402

from edgeclip.distill.batches import to_float  # noqa: E402
from edgeclip.distill.huggingface import pooled  # noqa: E402
from edgeclip.distill.recipe import (  # noqa: E402
    CheckpointTeacher,
    HuggingFaceTeacher,
    SentenceTeacher,
    TeacherSpec,
    parse_recipe,
)
from edgeclip.distill.run import open_run  # noqa: E402
from edgeclip.distill.teachers import open_teacher  # noqa: E402
from edgeclip.errors import ConfigError, InputError, MissingExtraError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = ["a red cat", "dog", "红色 猫", "the " * 60]
KINDS = ("clip", "chinese-clip", "altclip", "siglip")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory with a directory of each model, and the models that were saved there."""
    folder = tmp_path_factory.mktemp("models")
    return folder, {kind: save(kind, folder / kind) for kind in (*KINDS, "bert")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def rows_of(said: Any) -> Any:
    return said if isinstance(said, torch.Tensor) else said.pooler_output


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the libraries think that they may ask the hub, and see that nobody does."""
    asked: list[Any] = []

    def refuse(*args: Any, **_: Any) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    assert not asked


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_library_s_own(kind: str, models: tuple[Path, dict[str, Any]]) -> None:
    folder, saved = models
    teacher = open_teacher(HuggingFaceTeacher(name="t", path=kind, licence="MIT"), folder)
    theirs = saved[kind]
    width = 16 if kind == "siglip" else EMBED
    assert (teacher.image_dim, teacher.text_dim) == (width, width)
    assert teacher.parent == {
        "role": "teacher",
        "name": kind,
        "licence": "MIT",
        "file": kind,
        "source": "transformers",
        "parents": [],
    }

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / kind, local_files_only=True)
    length = teacher.consumer.tokenizer.context_length
    made = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    tokens = torch.from_numpy(teacher.consumer.tokenizer(TEXTS, truncate=True))
    assert tokens.dtype == torch.int32
    assert ("attention_mask" in made) == (kind != "siglip")

    pictures = torch.randint(0, 256, (2, 3, SIDE_PX, SIDE_PX), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(folder / kind, local_files_only=True)
    pixels = processor(list(pictures), return_tensors="pt").pixel_values
    assert torch.allclose(to_float(pictures, mean=teacher.mean, std=teacher.std), pixels, atol=1e-5)

    said = teacher(pictures, tokens.view(2, 2, length))
    with torch.no_grad():
        texts = rows_of(theirs.get_text_features(**made)).view(2, 2, width)
        images = rows_of(theirs.get_image_features(pixel_values=pixels))
    assert texts.std() > 0.1
    assert torch.allclose(said.image, images, atol=1e-5)
    for caption in (0, 1):
        assert torch.allclose(said.texts[caption], texts[:, caption], atol=1e-5)


@pytest.mark.parametrize("kind", ["chinese-clip", "altclip", "bert"])
def test_padding_does_not_count(kind: str, models: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = models
    spec: TeacherSpec = HuggingFaceTeacher(name="t", path=kind, context_length=8)
    if kind == "bert":
        spec = SentenceTeacher(name="t", path=kind, context_length=8)
    long = open_teacher(replace(spec, context_length=30), folder)
    short = open_teacher(spec, folder)
    said = [
        teacher(None, torch.from_numpy(teacher.consumer.tokenizer(TEXTS[:2]))[None]).texts
        for teacher in (short, long)
    ]
    for mine, other in zip(*said, strict=True):
        assert torch.allclose(mine, other, atol=1e-5)
    assert short.consumer.tokenizer.digest != long.consumer.tokenizer.digest


def test_a_sentence_encoder_is_the_mean_of_its_unmasked_tokens(models: tuple[Path, dict[str, Any]]) -> None:
    folder, saved = models
    teacher = open_teacher(SentenceTeacher(name="t", path="bert"), folder)
    assert (teacher.image_dim, teacher.text_dim) == (None, 16)
    assert (teacher.consumer.form, teacher.consumer.tokenizer.context_length) == (None, 40)
    tokens = torch.from_numpy(teacher.consumer.tokenizer(TEXTS, truncate=True))
    said = teacher(None, tokens[None])
    assert said.image is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert")
    for row, text in enumerate(TEXTS):  # one by one there is no padding at all
        with torch.no_grad():
            states = saved["bert"](**tokenizer(text, truncation=True, max_length=40, return_tensors="pt"))
        assert torch.allclose(said.texts[row][0], states.last_hidden_state[0].mean(dim=0), atol=1e-5)

    first = open_teacher(SentenceTeacher(name="t", path="bert", pooling="first"), folder)
    with torch.no_grad():
        states = saved["bert"](**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
    assert torch.allclose(first(None, tokens[None]).texts[0][0], states[0, 0], atol=1e-5)


def test_pooling_is_the_mean_where_the_mask_is_one() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]])
    assert pooled(states, torch.tensor([[1, 1, 0]]), "mean").tolist() == [[2.0, 4.0]]
    assert pooled(states, torch.tensor([[0, 0, 0]]), "mean").tolist() == [[0.0, 0.0]]
    assert pooled(states, torch.tensor([[1, 1, 0]]), "first").tolist() == [[1.0, 2.0]]


def test_a_tokenizer_goes_to_workers_and_refuses_long_texts(models: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = models
    tokenizer = open_teacher(HuggingFaceTeacher(name="t", path="clip"), folder).consumer.tokenizer
    again = pickle.loads(pickle.dumps(tokenizer))
    assert np.array_equal(again(TEXTS, truncate=True), tokenizer(TEXTS, truncate=True))
    assert again.digest == tokenizer.digest
    with pytest.raises(InputError, match="got 182 tokens, expected at most 14"):
        tokenizer(["the " * 60])


@pytest.mark.slow
def test_two_kinds_of_teachers_teach_together(
    models: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    folder, _ = models
    for kind in ("altclip", "bert"):
        shutil.copytree(folder / kind, data / kind, dirs_exist_ok=True)
    run(data, data / "first")
    teachers = """
[[stage.loss]]
kind = "affinity"
teachers = ["ours", "theirs"]
teacher_weights = [3, 1]
[[stage.loss]]
kind = "feature"
teacher = "sentences"
tower = "text"
[[teacher]]
kind = "checkpoint"
name = "ours"
path = "first/model"
scale = 40
[[teacher]]
kind = "huggingface"
name = "theirs"
path = "altclip"
scale = 20
[[teacher]]
kind = "sentence"
name = "sentences"
path = "bert"
"""
    # Two workers, so that a tokenizer of the library is used after a fork.
    result, heard = run(data, tmp_path / "run", STAGE + teachers, workers=2)
    assert result.licence == "NOASSERTION"
    parts = steps(heard)[-1]["parts"]
    assert sorted(parts) == ["0-info-nce", "1-affinity", "2-feature"]
    assert 0 < parts["1-affinity"] < steps(heard)[0]["parts"]["1-affinity"]
    opened = open_run(parse_recipe(recipe_text(data, STAGE + teachers).encode()), data)
    inputs = opened.inputs(opened.recipe.stage[0])
    sentences, ours = opened.teachers["sentences"].consumer, opened.teachers["ours"].consumer
    assert inputs.tokens_name(sentences) == "tokens:2"
    assert inputs.tokens_name(ours) == "tokens"
    assert len(opened.objective(opened.recipe.stage[0]).adapters) == 1


# What cannot be


def changed(folder: Path, tmp_path: Path, kind: str, file: str, **values: Any) -> Path:
    """Return a copy of a model with other values in one of its JSON files; ``None`` takes a key out."""
    target = tmp_path / kind
    shutil.copytree(folder / kind, target, dirs_exist_ok=True)
    said = {**json.loads((target / file).read_text()), **values}
    (target / file).write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        ("clip", "config.json", {"model_type": "blip"}, r"'clip' has the model_type 'blip', expected one of"),
        ("clip", "preprocessor_config.json", {"resample": 5}, "'resample' is 5, expected 2 .* or 3"),
        ("clip", "preprocessor_config.json", {"rescale_factor": 1}, "'rescale_factor' is not 1/255"),
        ("clip", "preprocessor_config.json", {"resample": [3]}, r"'resample' is \[3\], expected 2"),
        ("clip", "preprocessor_config.json", {"rescale_factor": "1/255"}, "'rescale_factor' is not 1/255"),
        ("clip", "preprocessor_config.json", {"image_std": [1, math.nan, 1]}, r"deviation \(1.0, nan, 1.0\)"),
        ("clip", "config.json", {"model_type": ["clip"]}, r"model_type \['clip'\], expected one of"),
        ("clip", "preprocessor_config.json", {"size": None}, "has no 'size' of pictures"),
        ("clip", "preprocessor_config.json", {"image_mean": [0.5]}, r"mean \(0.5,\) .* three numbers"),
        (
            "clip",
            "preprocessor_config.json",
            {"crop_size": {"height": 48, "width": 48}},
            r"pictures of \(48, 48\) px, its image tower sees \(32, 32\)",
        ),
        ("siglip", "preprocessor_config.json", {"image_std": None}, "cannot be used .*'image_std'"),
    ],
)
def test_a_directory_that_does_not_fit_is_one_sentence(
    kind: str,
    file: str,
    values: dict[str, Any],
    message: str,
    models: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    root = changed(models[0], tmp_path, kind, file, **values)
    with pytest.raises(ConfigError, match=f"teacher 't': .*{message}") as caught:
        open_teacher(HuggingFaceTeacher(name="t", path=kind), root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "file", "expected"),
    [
        (HuggingFaceTeacher(name="t", path="bert"), "config.json", "an object"),
        (HuggingFaceTeacher(name="t", path="clip"), "preprocessor_config.json", "an object"),
        (CheckpointTeacher(name="t", path="bert"), "config.json", "an object"),
        (SentenceTeacher(name="t", path="bert"), "1_Pooling/config.json", "an object"),
        (SentenceTeacher(name="t", path="bert"), "modules.json", "an array"),
    ],
)
def test_json_of_another_shape_is_one_sentence(
    spec: TeacherSpec, file: str, expected: str, models: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(models[0] / spec.path, tmp_path / spec.path)
    path = tmp_path / spec.path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}" if expected == "an array" else "[[1]]")
    with pytest.raises(ConfigError, match=f"teacher 't': {path.name} .*holds .*expected {expected}"):
        open_teacher(spec, tmp_path)


def test_a_tokenizer_without_room_is_one_sentence(
    models: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root = changed(models[0], tmp_path, "clip", "tokenizer_config.json", model_max_length=0)
    with pytest.raises(ConfigError, match=r"'clip' does not say how long texts may be: ValueError: 0 tokens"):
        open_teacher(HuggingFaceTeacher(name="t", path="clip"), root)


def test_weights_that_are_missing_are_not_drawn_at_random(
    models: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models[0] / "clip", tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"'clip' lacks 1 weights .* 'text_projection.weight'"):
        open_teacher(HuggingFaceTeacher(name="t", path="clip"), tmp_path)


def test_pickled_weights_are_not_opened(models: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(models[0] / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="teacher 't': 'clip' cannot be loaded"):
        open_teacher(HuggingFaceTeacher(name="t", path="clip"), tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (HuggingFaceTeacher(name="t", path="nowhere"), "'path' is '.*nowhere', expected a directory"),
        (HuggingFaceTeacher(name="t", path="bert"), "'bert', expected one of .* kind = 'sentence'"),
        (HuggingFaceTeacher(name="t", path="clip", context_length=15), "is 15, expected at most 14"),
        (HuggingFaceTeacher(name="t", path="siglip", context_length=9), "is 9, expected exactly 10"),
        (HuggingFaceTeacher(name="t", path="altclip", context_length=39), "is 39, expected at most 38"),
        (SentenceTeacher(name="t", path="nowhere"), "'path' is '.*nowhere', expected a directory"),
        (SentenceTeacher(name="t", path="bert", tokenizer="x.json"), "'tokenizer' is 'x.json' beside"),
    ],
)
def test_what_cannot_be_opened_is_named(
    spec: TeacherSpec, message: str, models: tuple[Path, dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError, match=f"teacher 't': .*{message}"):
        open_teacher(spec, models[0])


def test_an_encoder_that_pools_otherwise_is_refused(
    models: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(models[0] / "bert", tmp_path / "bert")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "include_prompt": True})
    )
    with pytest.raises(ConfigError, match=r"'pooling' is 'mean', .* says \['cls_token'\]"):
        open_teacher(SentenceTeacher(name="t", path="bert"), tmp_path)
    open_teacher(SentenceTeacher(name="t", path="bert", pooling="first"), tmp_path)
    steps_of = [{"type": "sentence_transformers.models.Transformer"}, {"type": "x.models.Dense"}]
    (tmp_path / "bert" / "modules.json").write_text(json.dumps(steps_of))
    with pytest.raises(ConfigError, match=r"modules.json in 'bert' adds \['Dense'\]"):
        open_teacher(SentenceTeacher(name="t", path="bert", pooling="first"), tmp_path)


@pytest.mark.parametrize(
    "spec", [HuggingFaceTeacher(name="t", path="clip"), SentenceTeacher(name="t", path="bert")]
)
def test_without_transformers_the_extra_is_named(
    spec: TeacherSpec, models: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"teacher 't' .*edgeclip\[hf\]"):
        open_teacher(spec, models[0])
