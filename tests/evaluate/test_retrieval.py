from __future__ import annotations

import numpy as np
import pytest

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate import retrieval
from edgeclip.evaluate.metrics import recall_at_k
from edgeclip.evaluate.retrieval import Texts, evaluate_retrieval

RANDOM = np.random.default_rng(0)


def test_equal_texts_are_one() -> None:
    texts = Texts.of([["a", "b"], ["b", "b"], ["c", "a"]])
    assert texts.texts == ("a", "b", "c")
    pairs = list(zip(texts.pictures.tolist(), texts.numbers.tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 1), (2, 2), (2, 0)]


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 12, 1 << 27])
def test_recall_is_that_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(retrieval, "_CHUNK_BYTES", chunk_bytes)
    words = [f"text {number}" for number in range(60)]
    captions = [
        [words[number] for number in RANDOM.integers(0, 60, RANDOM.integers(1, 5))] for _ in range(90)
    ]
    texts = Texts.of(captions)
    # Few directions: ties are everywhere.
    images = np.eye(8)[RANDOM.integers(0, 8, 90)] + np.eye(8)[RANDOM.integers(0, 8, 90)]
    rows = np.eye(8)[RANDOM.integers(0, 8, len(texts.texts))] * 3
    report = evaluate_retrieval(images, rows, texts, ks=(1, 2, 5, 10, 200))
    relevant = np.array([[text in said for text in texts.texts] for said in captions])
    similarity = images / np.linalg.norm(images, axis=1, keepdims=True) @ (rows / 3).T
    for k in (1, 2, 5, 10, 200):
        assert report.image_to_text[k].value == recall_at_k(similarity, relevant, k=k)
        assert report.text_to_image[k].value == recall_at_k(similarity.T, relevant.T, k=k)
    assert (report.pictures, report.texts) == (90, len(texts.texts))
    assert (report.image_to_text[1].n, report.text_to_image[1].n) == (90, len(texts.texts))
    assert report.image_to_text[200].value == 1.0


def test_a_loop_over_sorted_lists_says_the_same() -> None:
    captions = [[f"{row}", f"{row}+", "same"] for row in range(25)]
    texts = Texts.of(captions)
    images, rows = RANDOM.normal(size=(25, 6)), RANDOM.normal(size=(len(texts.texts), 6))
    hits = []
    for row, image in enumerate(images):
        cosines = [float(image @ text / np.linalg.norm(text)) for text in rows]
        first = sorted(range(len(rows)), key=lambda at: -cosines[at])[:5]
        hits.append(any(texts.texts[at] in captions[row] for at in first))
    assert evaluate_retrieval(images, rows, texts).image_to_text[5].value == np.mean(hits)


def test_json_has_every_share() -> None:
    said = evaluate_retrieval(np.eye(3), np.eye(3), Texts.of([["a"], ["b"], ["c"]])).to_dict()
    assert (said["pictures"], said["texts"]) == (3, 3)
    assert said["image_to_text"]["r1"]["value"] == said["text_to_image"]["r10"]["value"] == 1.0
    assert said["image_to_text"]["r5"]["n"] == 3


def test_what_does_not_fit_is_said() -> None:
    texts = Texts.of([["a"], ["b"]])
    with pytest.raises(InputError, match=r"image embeddings \(2, 3\) and text embeddings \(3, 3\)"):
        evaluate_retrieval(np.ones((2, 3)), np.ones((3, 3)), texts)
    with pytest.raises(InputError, match="image embeddings: row 1 is zero"):
        evaluate_retrieval(np.diag([1.0, 0.0]), np.eye(2), texts)
    with pytest.raises(InputError, match="picture 1 has no text"):
        Texts.of([["a"], []])
    with pytest.raises(InputError, match="got no pictures"):
        Texts.of([])
    with pytest.raises(ConfigError, match="confidence"):
        evaluate_retrieval(np.eye(2), np.eye(2), texts, confidence=2)
