"""Damaged label files and banks: a typed one-line error or a result, soon, and nothing else."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeclip.errors import EdgeClipError
from edgeclip.label_sets import Label, LabelSet, Templates, read_labels
from edgeclip.labels import LabelBank

LIMIT_S = 5.0
EACH = 150  # mutations a kind of file: 900 in all


def _bank() -> LabelBank:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = (
        Label("cat", ("kitty",), ("a pet",), (("zh", Label("猫")),)),
        *map(Label, ["dog", "car", "树", "mug", "pen"]),
    )
    return LabelBank(LabelSet(labels), rows, Templates.of("openai-7"), "space", "tower", ("dog",))


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(_bank().embeddings))
    return stream.getvalue()


_JSON = {
    "labels": [
        {
            "name": "cat",
            "synonyms": ["kitty"],
            "descriptions": ["a pet"],
            "aliases": {"zh": "猫", "de": ["Katze"]},
        },
        "dog",
        {"name": "car", "aliases": {"fr": {"name": "voiture", "synonyms": ["auto"]}}},
    ]
}
SEEDS: dict[str, bytes] = {
    "labels.txt": "\ufeff# labels\ncat | kitty | 猫\r\ndog\n\nbig  car\n".encode(),
    "labels.json": json.dumps(_JSON, ensure_ascii=False).encode(),
    "templates.txt": b"a photo of a {}.\n# more\nthe {} here\n",
    "bank.safetensors": _bank().to_bytes(),
    "half.safetensors": _bank().to_bytes(dtype="float16"),
    "bank.npy": _npy(),
}
_TOKENS = [
    b"\x00", b"\xff", b"\xed\xa0\x80", b"\\ud800", b'"', b"[", b"]", b"{", b"}", b"{}", b":", b",", b"|",
    b"\n",
    b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 5000, b"[" * 3000, b"{" + b'"a":' * 50, b"F64", b"BF16",
    b"data_offsets", b"__metadata__", b"crc32", b"shape", b"labels", b"\xe2\x80\xae", b"\x93NUMPY",
    b"(10**9,)",
]  # fmt: skip


def _mutate(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        # headers matter most in binary files
        place = min(place, rng.choice([place, place, 300]))
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + rng.randint(1, 30)]
        elif kind == 3:
            data[place:place] = rng.choice(_TOKENS)
        elif kind == 4:
            token = rng.choice(_TOKENS)
            data[place : place + len(token)] = token
        else:
            end = place + rng.randint(1, 60)
            data[place:place] = data[place:end] * rng.randint(1, 3)
    return bytes(data)


def _read(path: Path) -> object:
    if path.name == "templates.txt":
        return Templates.read(path)
    if path.name.startswith("labels"):
        return read_labels(path)
    return LabelBank.open(path, labels=_bank().labels if path.suffix == ".npy" else None)


@pytest.mark.parametrize("name", SEEDS)
def test_mutated_files_give_a_result_or_one_line(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    path = tmp_path / name
    refused = 0
    for number in range(EACH):
        content = _mutate(SEEDS[name], rng)
        path.write_bytes(content)
        began = time.monotonic()
        try:
            result = _read(path)
        except EdgeClipError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message, (number, message)
            assert len(message) < 600, (number, message)
            assert name in message, (number, message)
        else:
            _check(result)
        assert time.monotonic() - began < LIMIT_S, number
    assert refused > EACH // 10  # the mutations bite


def _check(result: object) -> None:
    if isinstance(result, LabelBank):
        assert result.embeddings.shape[0] == len(result.labels)
        np.testing.assert_allclose(np.linalg.norm(result.embeddings, axis=1), 1, atol=0.02)
        json.dumps([label.to_json() for label in result.labels.labels], ensure_ascii=False).encode()
    elif isinstance(result, LabelSet):
        assert len(set(result.names)) == len(result) > 0
        "".join(result.names).encode()
    elif isinstance(result, Templates):
        assert all(text.count("{}") == 1 for text in result.texts)


@pytest.mark.parametrize("target", ["vectors", "bank"])
def test_mutated_cache_entries_never_reach_a_bank(tmp_path: Path, target: str) -> None:
    from edgeclip.cache import HostCache
    from edgeclip.label_store import LabelStore, StoredVectors

    rng = random.Random(target)
    store = LabelStore(HostCache.open("0" * 64, root=tmp_path), "c" * 64)
    bank = _bank()
    keys = [bytes([row]) * 32 for row in range(len(bank))]
    store.put_vectors(StoredVectors(dict(zip(keys, bank.embeddings, strict=True)), {keys[1]}))
    store.put_bank("b" * 64, bank.to_bytes())
    (path,) = [each for each in tmp_path.rglob(f"{target}-*.safetensors") if not each.name.startswith(".")]
    content = path.read_bytes()
    find: Callable[[], object] = {
        "vectors": lambda: store.vectors(keys).embeddings,
        "bank": lambda: store.bank("b" * 64),
    }[target]
    assert find()
    for _ in range(EACH):
        path.unlink()  # a new file each time: the old one may still be mapped
        path.write_bytes(_mutate(content, rng))
        found = find()
        if target == "vectors":
            assert isinstance(found, dict)
            for key, row in found.items():
                assert row.tolist() == bank.embeddings[keys.index(key)].tolist()
        elif found is not None:
            assert isinstance(found, tuple)
            assert found[0]["embeddings"].tolist() == bank.embeddings.tolist()
