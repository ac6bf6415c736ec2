"""``edgeclip embed``: the three files, their keys and space, and what happens to broken pictures."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from command import Command
from PIL import Image
from tiny_bundle import COLOURS, EMBED_DIM, colour_picture

from edgeclip.bundle import Bundle
from edgeclip.classify import ZeroShotClassifier

NAMES = sorted(COLOURS)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in COLOURS:
        Image.fromarray(colour_picture(name)).resize((60, 50)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def embed(capsys: pytest.CaptureFixture[str], tiny_bundle_session: Path):
    command = Command(capsys)
    return lambda *arguments: command("embed", "--bundle", tiny_bundle_session, "--threads", 1, *arguments)


def _expected(bundle: Path, photos: Path) -> np.ndarray:
    with ZeroShotClassifier.open(bundle) as classifier:
        return classifier.embed_images([photos / f"{name}.png" for name in NAMES])


def test_npy_with_its_keys_beside(embed, tiny_bundle_session: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    result = embed(photos, "-o", output)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"8 embeddings of {EMBED_DIM} dimensions in {output}\n"
    array = np.load(output, allow_pickle=False)
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, _expected(tiny_bundle_session, photos), atol=1e-6)
    beside = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert beside["embedding_space"] == Bundle.open(tiny_bundle_session).manifest.model.embedding_space
    assert [Path(key).stem for key in beside["keys"]] == NAMES


def test_safetensors(embed, tiny_bundle_session: Path, photos: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    output = tmp_path / "out.safetensors"
    assert embed(photos, "-o", output, "--batch-size", 5).code == 0
    with safetensors.safe_open(output, "numpy") as file:
        np.testing.assert_allclose(
            file.get_tensor("embeddings"), _expected(tiny_bundle_session, photos), atol=1e-6
        )
        metadata = file.metadata()
    assert metadata["embedding_space"] == Bundle.open(tiny_bundle_session).manifest.model.embedding_space
    assert [Path(key).stem for key in json.loads(metadata["keys"])] == NAMES


def test_jsonl(embed, tiny_bundle_session: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert embed(photos, "-o", output).code == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert list(rows[0]) == ["schema", "path", "embedding_space", "embedding"]
    np.testing.assert_allclose(
        [row["embedding"] for row in rows], _expected(tiny_bundle_session, photos), atol=1e-6
    )


def test_broken_pictures_are_left_out(embed, photos: Path, tmp_path: Path) -> None:
    (photos / "blue.png").write_bytes(b"x")
    result = embed(photos, "-o", tmp_path / "out.npy")
    assert result.code == 1
    assert "blue.png" in result.err
    assert np.load(tmp_path / "out.npy").shape == (7, EMBED_DIM)


def test_strict_writes_nothing(embed, photos: Path, tmp_path: Path) -> None:
    (photos / "blue.png").write_bytes(b"x")
    before = b"what was there"
    (tmp_path / "out.npy").write_bytes(before)
    assert embed(photos, "-o", tmp_path / "out.npy", "--strict").code == 1
    assert (tmp_path / "out.npy").read_bytes() == before
    assert not (tmp_path / "out.json").exists()


def test_no_pictures_give_an_empty_array(embed, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert embed(tmp_path / "empty", "-o", tmp_path / "out.npy").code == 0
    assert np.load(tmp_path / "out.npy").shape == (0, EMBED_DIM)


def test_a_full_disk_leaves_what_was_there(embed, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # short keys
    assert embed("photos", "-o", "out.npy").code == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("out.*")}
    for number in range(40):
        Image.fromarray(colour_picture("red", seed=number)).save(photos / f"more-{number}.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # for the keys, not for the array
        result = embed("photos", "-o", "out.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 1
    assert "'out.npy' cannot be written (File too large). Check rights and room" in result.err
    assert {path: path.read_bytes() for path in tmp_path.glob("out.*")} == before
    assert not list(tmp_path.glob(".edgeclip-tmp-*"))


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        ("out.txt", 2, "ends in '.txt', expected .npy"),
        ("none/out.npy", 1, "there is no directory"),
        ("folder.npy", 1, "this is a directory, expected the name of a file"),
        ("mine.npy", 1, "mine.json' is there and holds no keys of embeddings, so it is not replaced"),
    ],
)
def test_refusals_come_before_the_work(
    embed, photos: Path, tmp_path: Path, monkeypatch, output: str, code: int, message: str
) -> None:
    def refuse(*rest: object, **more: object) -> None:
        raise AssertionError("the work is done in vain")

    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "mine.json").write_text('["a list of mine"]', encoding="utf-8")
    monkeypatch.setattr("edgeclip.classify.ZeroShotClassifier.open", refuse)
    result = embed(photos, "-o", tmp_path / output)
    assert result.code == code
    assert message in result.err
