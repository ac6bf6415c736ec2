"""A bundle as a teacher says what its own runtime says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from tiny_bundle import COLOURS, EMBED_DIM, SIDE_PX, colour_picture, make_tiny_bundle  # noqa: E402
from train_runs import STAGE, assert_same_weights, make_data, run, steps  # noqa: E402

from edgeclip.bundle import Bundle  # noqa: E402
from edgeclip.classify import ZeroShotClassifier  # noqa: E402
from edgeclip.distill.recipe import BundleTeacher  # noqa: E402
from edgeclip.distill.teachers import open_teacher  # noqa: E402
from edgeclip.errors import BundleError, ConfigError  # noqa: E402
from edgeclip.text_encoder import TextEncoder  # noqa: E402

NAMES = tuple(COLOURS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"), train=64, held_out=8)
    make_tiny_bundle(folder / "colours")
    make_tiny_bundle(folder / "pictures", text_tower=False)
    return folder


def pictures() -> torch.Tensor:
    rows = np.stack([colour_picture(name) for name in NAMES])
    return torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())


def test_a_bundle_knows_its_colours(folder: Path) -> None:
    teacher = open_teacher(BundleTeacher(name="t", path="colours"), folder)
    assert (teacher.image_dim, teacher.text_dim) == (EMBED_DIM, EMBED_DIM)
    assert teacher.consumer.form.size_px == (SIDE_PX, SIDE_PX)
    tokens = torch.from_numpy(teacher.consumer.tokenizer(NAMES))
    said = teacher(pictures(), tokens[:, None])
    assert (said.image @ said.texts[0].T).argmax(dim=1).tolist() == list(range(len(NAMES)))
    assert not said.image.requires_grad

    bundle = Bundle.open(folder / "colours")
    encoder = TextEncoder(bundle, bundle.variant("onnx-fp32"))
    assert np.allclose(said.texts[0].numpy(), encoder.encode(NAMES)[0], atol=1e-6)
    encoder.close()
    with ZeroShotClassifier.open(folder / "colours", variant="onnx-fp32") as classifier:
        rows = classifier.embed_images([colour_picture(name) for name in NAMES])
    assert np.allclose(said.image.numpy(), rows, atol=1e-6)


def test_full_precision_is_preferred_and_recorded(folder: Path) -> None:
    assert Bundle.open(folder / "colours").manifest.default_variants[0] == "onnx-int8"
    preferred = open_teacher(BundleTeacher(name="t", path="colours"), folder)
    named = open_teacher(BundleTeacher(name="t", path="colours", variant="onnx-int8"), folder)
    assert preferred.parent["source"] == "bundle, onnx-fp32"
    assert named.parent["source"] == "bundle, onnx-int8"
    assert (named.parent["role"], named.parent["file"]) == ("teacher", "colours")
    assert named.parent["licence"] == Bundle.open(folder / "colours").manifest.model.licence
    difference = (preferred(pictures(), None).image - named(pictures(), None).image).abs().max()
    assert 0 < difference < 0.2
    states = [teacher.state_dict() for teacher in (preferred, named)]
    assert not torch.equal(states[0]["model.digest"], states[1]["model.digest"])


def test_the_default_bundle_reads_two_languages() -> None:
    teacher = open_teacher(BundleTeacher(name="t"), Path())
    tokens = torch.from_numpy(teacher.consumer.tokenizer(["a cat", "猫", "a truck"]))
    rows = torch.cat(teacher(None, tokens[None]).texts)
    similarity = rows @ rows.T
    assert similarity[0, 1] > similarity[0, 2] + 0.1
    assert teacher.parent["file"] == "default"
    assert {parent["role"] for parent in teacher.parent["parents"] if "role" in parent}


def test_a_run_beside_a_bundle_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    affinity = """
[[stage.loss]]
kind = "affinity"
teachers = ["t"]
[[teacher]]
kind = "bundle"
name = "t"
path = "colours"
scale = 20
"""
    run(folder, tmp_path / "whole", STAGE + affinity)
    run(folder, tmp_path / "parts", STAGE + affinity, stop_after=4, workers=2)
    run(folder, tmp_path / "parts", STAGE + affinity)
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_a_bundle_without_text_tower_teaches_pictures(folder: Path, tmp_path: Path) -> None:
    teacher = open_teacher(BundleTeacher(name="t", path="pictures"), folder)
    assert (teacher.text_dim, teacher.consumer.tokenizer) == (None, None)
    feature = """
[[stage.loss]]
kind = "feature"
teacher = "t"
tower = "image"
weight = 100
[[teacher]]
kind = "bundle"
name = "t"
path = "pictures"
"""
    _, heard = run(folder, tmp_path / "run", STAGE + feature)
    assert steps(heard)[-1]["parts"]["1-feature"] < steps(heard)[0]["parts"]["1-feature"]

    affinity = feature.replace('"feature"\nteacher = "t"\ntower = "image"', '"affinity"\nteachers = ["t"]')
    with pytest.raises(ConfigError, match=r"'affinity' asks for text .* 't' has no text tower"):
        run(folder, tmp_path / "other", STAGE + affinity)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_opened_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        open_teacher(BundleTeacher(name="t", path="nowhere"), folder)
    with pytest.raises(BundleError, match=r"no variant 'onnx-int4'; it has .*onnx-fp32"):
        open_teacher(BundleTeacher(name="t", path="colours", variant="onnx-int4"), folder)
