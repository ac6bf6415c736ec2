"""A stored teacher that misnames pictures is put right by their captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeclip.distill.batches import Batch, Position
from edgeclip.distill.inputs import STORED_IMAGE, STORED_TEXT, Consumer, Inputs, StoredViews, ViewForm
from edgeclip.distill.offline import OfflineTeacher
from edgeclip.distill.recipe import DataSpec, StoredTeacher, parse_recipe
from edgeclip.errors import ConfigError

RECIPE = """
schema = 1
kind = "train"
name = "named"
student = {{ model = "MobileCLIP-S0" }}
data.train.paths = ["dr"]
[[teacher]]
kind = "stored"
name = "seer"
caption_share = {share}
[[stage]]
name = "distil"
data = "train"
samples = 4
batch_size = 2
[[stage.loss]]
kind = "affinity"
teachers = ["seer"]
"""


def asked(share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a teacher in columns 2 to 5 says of two pictures with two captions, and what is stored."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 8)).astype(np.float32)
    texts = rng.standard_normal((2, 2, 8)).astype(np.float32)
    image[:, 2:6] /= np.linalg.norm(image[:, 2:6], axis=-1, keepdims=True)
    texts[..., 2:6] /= np.linalg.norm(texts[..., 2:6], axis=-1, keepdims=True)
    teacher = OfflineTeacher(
        "seer", columns=(2, 6), scale=20.0, views=StoredViews(8), parent={}, caption_share=share
    )
    arrays = {STORED_IMAGE: torch.from_numpy(image), STORED_TEXT: torch.from_numpy(texts)}
    batch = Batch(Position(), torch.tensor([0, 1]), ("a", "b"), arrays)
    said = teacher.ask(
        batch, Inputs.of(DataSpec(paths=("dr",)), 2, [Consumer(ViewForm((8, 8), "bilinear"), None)])
    )
    assert said.image is not None
    for column, text in enumerate(said.texts):
        np.testing.assert_array_equal(text.numpy(), texts[:, column, 2:6])
    return said.image.numpy(), image[:, 2:6], texts[..., 2:6]


def test_without_a_share_the_pictures_are_as_they_were_seen() -> None:
    said, image, _ = asked(0.0)
    np.testing.assert_array_equal(said, image)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_captions_make_up_their_share(share: float) -> None:
    said, image, texts = asked(share)
    mean = texts.mean(axis=1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(said, (1 - share) * image + share * mean, atol=1e-6)


def test_a_share_is_between_none_and_all() -> None:
    (teacher,) = parse_recipe(RECIPE.format(share=0.6).encode()).teacher
    assert isinstance(teacher, StoredTeacher)
    assert teacher.caption_share == 0.6
    with pytest.raises(ConfigError, match=r"\[\[teacher\]\] 0.*<= 1"):
        parse_recipe(RECIPE.format(share=1.5).encode())
