"""The public fake."""

from __future__ import annotations

import numpy as np
import pytest

from edgeclip.errors import ConfigError
from edgeclip.testing import FakeSession


def test_equal_rows_have_equal_embeddings_and_others_do_not() -> None:
    with FakeSession("text", context_length=4, embed_dim=64) as session:
        tokens = np.array([[1, 2, 3, 0], [1, 2, 4, 0], [1, 2, 3, 0]], np.int32)
        embedding = session.run({"tokens": tokens})["text_embedding"]
    np.testing.assert_array_equal(embedding[0], embedding[2])
    assert abs(float(embedding[0] @ embedding[1])) < 0.6


def test_runs_and_rows_are_counted() -> None:
    session = FakeSession(image_size_px=(4, 6))
    assert (session.runs, session.rows) == (0, 0)
    for n in (1, 3):
        session.run({"image": np.zeros((n, 4, 6, 3), np.uint8)})
    assert (session.runs, session.rows) == (2, 4)
    assert session.chosen.backend == "fake"


def test_an_unknown_tower_is_an_error() -> None:
    with pytest.raises(ConfigError, match="tower: got 'audio', expected 'image' or 'text'"):
        FakeSession("audio")  # type: ignore[arg-type]
