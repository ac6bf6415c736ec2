from __future__ import annotations

import numpy as np
import pytest

from edgeclip.errors import InputError
from edgeclip.evaluate import agreement
from edgeclip.evaluate.agreement import match_agreement, mean_cosine, neighbour_agreement

RANDOM = np.random.default_rng(3)


def rotated(rows: np.ndarray, width: int) -> np.ndarray:
    """Return the same likenesses in another space, other lengths too."""
    columns = np.linalg.qr(RANDOM.normal(size=(width, width)))[0][: rows.shape[1]]
    return rows @ columns * RANDOM.uniform(0.1, 9, (len(rows), 1))


def test_mean_cosine_is_that_of_pairs() -> None:
    a, b = RANDOM.normal(size=(20, 7)), RANDOM.normal(size=(20, 7))
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    assert mean_cosine(a, 3 * b) == pytest.approx(np.mean(cosines))
    assert mean_cosine(a, 5 * a) == pytest.approx(1)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 27])
def test_a_turned_space_has_the_same_neighbours_and_matches(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(agreement, "_CHUNK_BYTES", chunk_bytes)
    images, texts = RANDOM.normal(size=(40, 6)), RANDOM.normal(size=(25, 6))
    turn = np.linalg.qr(RANDOM.normal(size=(11, 11)))[0][:6]
    assert neighbour_agreement(images, rotated(images, 11)) == 1.0
    assert match_agreement((images, texts), (images @ turn, 2 * texts @ turn)) == (1.0, 1.0)


def test_strangers_agree_by_chance() -> None:
    images, texts = RANDOM.normal(size=(2, 400, 16)), RANDOM.normal(size=(2, 50, 16))
    assert neighbour_agreement(*images) < 0.03
    forward, backward = match_agreement((images[0], texts[0]), (images[1], texts[1]))
    assert 0 < forward < 0.06
    assert backward < 0.06


def test_matches_are_those_of_a_loop() -> None:
    a, b = (RANDOM.normal(size=(12, 5)), RANDOM.normal(size=(9, 5))), None
    b = (a[0] + 0.4 * RANDOM.normal(size=(12, 5)), a[1] + 0.4 * RANDOM.normal(size=(9, 5)))

    def best(queries: np.ndarray, gallery: np.ndarray) -> list[int]:
        return [int(np.argmax([q @ g / np.linalg.norm(g) for g in gallery])) for q in queries]

    expected = [
        np.mean([x == y for x, y in zip(best(a[i], a[1 - i]), best(b[i], b[1 - i]), strict=True)])
        for i in (0, 1)
    ]
    assert 0 < expected[0] < 1
    assert match_agreement(a, b) == pytest.approx(tuple(expected))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InputError, match="got 3 and 2 rows"):
        neighbour_agreement(np.eye(3), np.eye(2))
    with pytest.raises(InputError, match="widths 3 and 2"):
        mean_cosine(np.eye(3), np.ones((3, 2)))
    with pytest.raises(InputError, match="got 1 rows"):
        neighbour_agreement(np.ones((1, 2)), np.ones((1, 2)))
    with pytest.raises(InputError, match=r"image embeddings are \(2, 2\) and text embeddings \(2, 3\)"):
        match_agreement((np.eye(2), np.ones((2, 3))), (np.eye(2), np.ones((2, 3))))
