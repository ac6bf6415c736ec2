"""Memory that Pillow keeps between pictures: from the first one to the last holder, never against a user."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from edgeclip.classify import ZeroShotClassifier
from edgeclip.picture_memory import PictureMemory
from edgeclip.runtime.session import RuntimeOptions


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.collect()  # classifiers that other tests left open
    monkeypatch.delenv("PILLOW_BLOCKS_MAX", raising=False)
    assert Image.core.get_blocks_max() == 0
    yield
    Image.core.set_blocks_max(0)


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(stream, "JPEG")
    return stream.getvalue()


def test_the_last_holder_undoes_it() -> None:
    first, second = PictureMemory(), PictureMemory()
    first.hold()
    first.hold()
    second.hold()
    assert Image.core.get_blocks_max() == 4
    first.release()
    first.release()
    first.hold()  # nothing, once it was released
    assert Image.core.get_blocks_max() == 4
    second.release()
    assert Image.core.get_blocks_max() == 0


def test_a_holder_that_goes_releases() -> None:
    memory = PictureMemory()
    memory.hold()
    del memory
    gc.collect()
    assert Image.core.get_blocks_max() == 0


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.core.set_blocks_max(2)
    memory = PictureMemory()
    memory.hold()
    assert Image.core.get_blocks_max() == 2
    memory.release()
    assert Image.core.get_blocks_max() == 2
    Image.core.set_blocks_max(0)
    monkeypatch.setenv("PILLOW_BLOCKS_MAX", "0")
    refused = PictureMemory()
    refused.hold()
    assert Image.core.get_blocks_max() == 0
    refused.release()


def test_what_a_user_sets_meanwhile_stays() -> None:
    memory = PictureMemory()
    memory.hold()
    Image.core.set_blocks_max(9)
    memory.release()
    assert Image.core.get_blocks_max() == 9


def test_a_classifier_keeps_memory_from_its_first_picture_until_it_is_closed() -> None:
    with ZeroShotClassifier.open() as classifier:
        assert Image.core.get_blocks_max() == 0
        classifier.classify(np.zeros((224, 224, 3), np.uint8))  # nothing to decode
        assert Image.core.get_blocks_max() == 0
        alone = classifier.classify(jpeg())
        assert Image.core.get_blocks_max() == 4
        assert [each.predictions for each in classifier.classify_stream([jpeg()] * 3)] == [tuple(alone)] * 3
    assert Image.core.get_blocks_max() == 0


def test_a_classifier_that_is_to_take_little_memory_keeps_none() -> None:
    with ZeroShotClassifier.open(options=RuntimeOptions(low_memory=True)) as classifier:
        classifier.classify(jpeg())
        list(classifier.classify_stream([jpeg()]))
        assert Image.core.get_blocks_max() == 0
