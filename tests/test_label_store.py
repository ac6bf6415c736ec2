"""The store of label vectors while it stays open: neighbours, damage, and what is read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeclip import label_store
from edgeclip.cache import HostCache
from edgeclip.label_store import LabelStore, StoredVectors


def _open(root: Path) -> LabelStore:
    return LabelStore(HostCache.open("0" * 64, root=root), "c" * 64)


def _key(number: int) -> bytes:
    return number.to_bytes(8, "little") * 4


def _vectors(*numbers: int) -> StoredVectors:
    rows = {_key(number): np.full(4, number, np.float32) for number in numbers}
    return StoredVectors(rows, {_key(number) for number in numbers if number % 2})


def _numbers(found: StoredVectors) -> set[int]:
    for key, row in found.embeddings.items():
        assert key == _key(int(row[0]))
        assert (key in found.truncated) == bool(row[0] % 2)
    return {int(row[0]) for row in found.embeddings.values()}


def _chunk(root: Path) -> Path:
    (path,) = root.rglob("vectors-*")
    return path


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that a store maps, growing as it does."""
    names: list[str] = []
    real = label_store._map_sound

    def spy(path: Path) -> object:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(label_store, "_map_sound", spy)
    return names


def test_chunks_of_another_store_are_noticed(tmp_path: Path) -> None:
    store, neighbour = _open(tmp_path), _open(tmp_path)
    store.put_vectors(_vectors(1, 2))
    assert _numbers(store.vectors([_key(3)])) == set()
    neighbour.put_vectors(_vectors(3))
    assert _numbers(store.vectors([_key(each) for each in (1, 3, 4)])) == {1, 3}


def test_a_chunk_is_read_again_only_for_what_it_holds(tmp_path: Path, readings: list[str]) -> None:
    _open(tmp_path).put_vectors(_vectors(1, 2))
    _open(tmp_path).put_vectors(_vectors(3))
    store = _open(tmp_path)
    assert _numbers(store.vectors([_key(9)])) == set()
    assert len(readings) == 2
    assert _numbers(store.vectors([_key(8)])) == set()
    store.put_vectors(_vectors(5))  # its own is known without being read
    assert _numbers(store.vectors([])) == set()
    assert len(readings) == 2
    assert _numbers(store.vectors([_key(2), _key(8)])) == {2}
    assert len(readings) == 3


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    store = _open(tmp_path)
    store.put_vectors(_vectors(1))
    like = _key(1)[:8] + _key(2)[:24]
    assert not store.vectors([like]).embeddings
    store.put_vectors(StoredVectors({like: np.zeros(4, np.float32)}))
    assert set(store.vectors([like]).embeddings) == {like}
    assert _numbers(store.vectors([_key(1)])) == {1}


@pytest.mark.parametrize("damage", ["flip", "empty", "gone"])
def test_a_chunk_damaged_after_it_was_read_counts_as_absent_until_made_again(
    tmp_path: Path, damage: str
) -> None:
    store = _open(tmp_path)
    store.put_vectors(_vectors(1, 2))
    path = _chunk(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # a new file: the old one may still be mapped
    if damage != "gone":
        path.write_bytes(content if damage == "flip" else b"")
    assert _numbers(store.vectors([_key(1)])) == set()
    _open(tmp_path).put_vectors(_vectors(1, 2))  # the same content, so the same name
    assert _chunk(tmp_path) == path
    assert _numbers(store.vectors([_key(1)])) == {1}


def test_a_chunk_damaged_before_it_is_read_is_noticed_when_made_again(tmp_path: Path) -> None:
    _open(tmp_path).put_vectors(_vectors(1))
    path = _chunk(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    store = _open(tmp_path)
    assert _numbers(store.vectors([_key(1)])) == set()
    path.unlink()
    path.write_bytes(content)
    assert _numbers(store.vectors([_key(1)])) == {1}


def test_merged_chunks_of_another_store_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_store, "_MAX_CHUNKS", 3)
    store, neighbour = _open(tmp_path), _open(tmp_path)
    for number in range(3):
        store.put_vectors(_vectors(number))
    neighbour.put_vectors(_vectors(3))  # merges all four and removes the three
    assert len(list(tmp_path.rglob("vectors-*"))) == 1
    assert _numbers(store.vectors([_key(each) for each in range(5)])) == {0, 1, 2, 3}
    store.put_vectors(_vectors(4))
    assert _numbers(neighbour.vectors([_key(each) for each in range(5)])) == {0, 1, 2, 3, 4}


def test_a_cleared_cache_is_filled_again(tmp_path: Path) -> None:
    import shutil

    store = _open(tmp_path)
    store.put_vectors(_vectors(1))
    shutil.rmtree(tmp_path)
    assert _numbers(store.vectors([_key(1)])) == set()
    assert store.put_vectors(_vectors(1))
    assert _numbers(_open(tmp_path).vectors([_key(1)])) == {1}


def test_a_file_of_other_keys_is_no_chunk(tmp_path: Path) -> None:
    store = _open(tmp_path)
    store.put_vectors(_vectors(1))
    odd = {
        "keys": np.zeros((1, 32), np.uint64),
        "embeddings": np.zeros((1, 4), np.float32),
        "truncated": np.zeros(1, np.uint8),
    }
    (_chunk(tmp_path).parent / "vectors-odd.safetensors").write_bytes(label_store.seal(odd, {}))
    assert not _open(tmp_path).vectors([bytes(32)]).embeddings
    assert _numbers(_open(tmp_path).vectors([_key(1)])) == {1}
