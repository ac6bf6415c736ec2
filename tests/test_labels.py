"""Label banks: what is encoded, what is found again, the file form, and damage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.bundle import Bundle
from edgeclip.cache import HostCache
from edgeclip.errors import InputError
from edgeclip.label_store import LabelStore
from edgeclip.labels import (
    BankProgress,
    Label,
    LabelBank,
    LabelSet,
    Templates,
    build_bank,
    label_keys,
    write_atomic,
)
from edgeclip.text_encoder import TEXTS_A_CALL, TextEncoder, even_parts

ONE = Templates.of("one")
SEVEN = Templates.of("openai-7")


class Counting:
    """A text encoder that remembers which texts the real one was asked for."""

    def __init__(self, bundle: Path) -> None:
        opened = Bundle.open(bundle)
        self._encoder = TextEncoder(opened, opened.variant("onnx-fp32"))
        self.digest, self.space = self._encoder.digest, self._encoder.space
        self.texts: list[str] = []
        self.before: Callable[[], None] = lambda: None

    def encode(
        self, texts: Sequence[str], *, clock: Any = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        self.before()
        self.texts += texts
        return self._encoder.encode(texts, clock=clock)

    @property
    def is_open(self) -> bool:
        return self._encoder.is_open


@pytest.fixture
def encoder(tiny_bundle_session: Path) -> Counting:
    return Counting(tiny_bundle_session)


@pytest.fixture
def store(tmp_path: Path, encoder: Counting) -> LabelStore:
    return _store(tmp_path, encoder)


def _store(root: Path, encoder: Counting) -> LabelStore:
    return LabelStore(HostCache.open("0" * 64, root=root / "cache"), encoder.digest)


def _files(root: Path, pattern: str) -> list[Path]:
    return sorted(path for path in (root / "cache").rglob(pattern) if path.is_file())


# -- how a bank is made ------------------------------------------------------------------------------------


def test_one_phrase_equals_open_clips_prompt_ensemble(encoder: Counting) -> None:
    torch = pytest.importorskip("torch")
    bank = build_bank(LabelSet.of(["red", "light blue"]), SEVEN, encoder)
    for name, row in zip(bank.names, bank.embeddings, strict=True):
        texts = [text.replace("{}", name) for text in SEVEN.texts]
        # open_clip.zero_shot_classifier: normalise each, mean over templates, normalise
        each = torch.nn.functional.normalize(torch.from_numpy(encoder.encode(texts)[0]), dim=-1)
        theirs = torch.nn.functional.normalize(each.mean(dim=0), dim=0).numpy()
        np.testing.assert_allclose(row, theirs, atol=2e-7)  # two float32 roundings of values below 1


def test_synonyms_and_descriptions_weigh_the_same(encoder: Counting) -> None:
    label = Label("red", ("green",), ("something blue",))
    row = build_bank(LabelSet((label,)), SEVEN, encoder).embeddings[0]
    alone = build_bank(LabelSet.of(["red", "green"]), SEVEN, encoder).embeddings
    described = encoder.encode(["something blue"])[0]
    mean = np.concatenate([alone, described]).mean(axis=0)
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=2e-7)


def test_rows_are_unit_and_read_only(encoder: Counting) -> None:
    bank = build_bank(LabelSet.of(["red", "blue"]), ONE, encoder)
    assert bank.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(bank.embeddings, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        bank.embeddings[0, 0] = 1


def test_long_labels_are_cut_and_named(encoder: Counting, store: LabelStore) -> None:
    labels = LabelSet.of(["red", "very " * 40 + "long"])
    assert build_bank(labels, ONE, encoder, store=store).truncated == (labels.names[1],)
    # from the whole bank, and from single vectors
    assert build_bank(labels, ONE, encoder, store=store).truncated == (labels.names[1],)
    turned = LabelSet.of(labels.names[::-1])
    assert build_bank(turned, ONE, encoder, store=store).truncated == (labels.names[1],)
    assert len(encoder.texts) == 2


# -- what is encoded again ---------------------------------------------------------------------------------


def test_one_label_added_to_a_thousand_encodes_one(encoder: Counting, store: LabelStore) -> None:
    names = [f"label {number}" for number in range(1000)]
    build_bank(LabelSet.of(names), ONE, encoder, store=store)
    assert len(encoder.texts) == 1000
    build_bank(LabelSet.of([*names[:500], "new", *names[500:]]), ONE, encoder, store=store)
    assert encoder.texts[1000:] == ["a photo of a new."]


def test_a_cached_bank_opens_nothing(tmp_path: Path, tiny_bundle_session: Path) -> None:
    labels = LabelSet.of(["red", "blue"])
    first = Counting(tiny_bundle_session)
    made = build_bank(labels, SEVEN, first, store=_store(tmp_path, first))
    second = Counting(tiny_bundle_session)
    again = build_bank(labels, SEVEN, second, store=_store(tmp_path, second))
    assert not second.texts
    assert not second.is_open
    assert again.embeddings.tobytes() == made.embeddings.tobytes()
    assert _is_mapped(again.embeddings)


def _is_mapped(array: Any) -> bool:
    """Return whether an array is, in the end, a view of a memory map."""
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None) if not isinstance(array, memoryview) else array.obj
    return False


@pytest.mark.parametrize("change", ["order", "subset", "synonym", "templates"])
def test_only_what_changes_is_encoded(encoder: Counting, store: LabelStore, change: str) -> None:
    build_bank(LabelSet.of(["red", "blue", "green"]), ONE, encoder, store=store)
    encoder.texts.clear()
    labels, templates, expected = {
        "order": (LabelSet.of(["green", "red", "blue"]), ONE, []),
        "subset": (LabelSet.of(["blue"]), ONE, []),
        "synonym": (
            LabelSet((Label("red", ("crimson",)), Label("blue"))),
            ONE,
            ["a photo of a red.", "a photo of a crimson."],
        ),
        "templates": (LabelSet.of(["blue"]), Templates.of("the {}"), ["the blue"]),
    }[change]
    build_bank(labels, templates, encoder, store=store)
    assert encoder.texts == expected


def test_keys_are_those_of_stores_that_are_in_use() -> None:
    labels = LabelSet.of({"red": {"synonyms": ["crimson"], "aliases": {"zh": "红"}}, "blue": []})
    said = ['["red", ["crimson"], []]', '["blue", [], []]']
    expected = [hashlib.sha256(f"tower\0{ONE.digest}\0{each}".encode()).digest() for each in said]
    assert label_keys(labels, ONE, "tower") == expected


def test_aliases_do_not_count(encoder: Counting, store: LabelStore) -> None:
    build_bank(LabelSet.of(["red"]), ONE, encoder, store=store)
    build_bank(LabelSet.of({"red": {"aliases": {"zh": "红"}}}), ONE, encoder, store=store)
    assert len(encoder.texts) == 1


def test_rows_of_a_known_bank_are_taken(encoder: Counting) -> None:
    known = build_bank(LabelSet.of(["red", "blue"]), ONE, encoder)
    encoder.texts.clear()
    bank = build_bank(LabelSet.of(["green", "blue"]), ONE, encoder, known=lambda: known)
    assert encoder.texts == ["a photo of a green."]
    assert bank.embeddings[1].tobytes() == known.embeddings[1].tobytes()


@pytest.mark.parametrize("other", [{"tower": "f" * 64}, {"templates": SEVEN}])
def test_a_bank_made_otherwise_is_not_taken(encoder: Counting, other: dict[str, Any]) -> None:
    known = replace(build_bank(LabelSet.of(["red"]), ONE, encoder), **other)
    encoder.texts.clear()
    build_bank(LabelSet.of(["red"]), ONE, encoder, known=lambda: known)
    assert encoder.texts == ["a photo of a red."]


def test_rows_of_recent_banks_are_taken_before_the_store_is_asked(
    encoder: Counting, store: LabelStore, tmp_path: Path
) -> None:
    first = build_bank(LabelSet.of(["red", "blue"]), ONE, encoder, store=store)
    other = replace(build_bank(LabelSet.of(["red"]), SEVEN, encoder), tower="f" * 64)
    encoder.texts.clear()
    for path in _files(tmp_path, "*"):
        path.unlink()
    labels = LabelSet.of(["blue", "green", "red"])
    bank = build_bank(labels, ONE, encoder, recent=[other, first], store=store)
    assert encoder.texts == ["a photo of a green."]
    assert bank.embeddings[[2, 0]].tobytes() == first.embeddings.tobytes()
    assert len(_files(tmp_path, "vectors-*")) == 1
    assert not _files(tmp_path, "bank-*")  # what changes while a process runs is kept as vectors


def test_the_bank_is_used_before_it_is_written_and_written_all_the_same(
    encoder: Counting, store: LabelStore, tmp_path: Path
) -> None:
    labels = LabelSet.of(["red"])

    def refuse(bank: LabelBank) -> None:
        assert bank.names == ("red",)
        assert not _files(tmp_path, "vectors-*")
        raise InputError("refused")

    with pytest.raises(InputError, match="refused"):
        build_bank(labels, ONE, encoder, store=store, use=refuse)
    assert len(_files(tmp_path, "vectors-*")) == 1
    used: list[LabelBank] = []
    for _ in range(2):  # from vectors, then as a whole
        assert build_bank(labels, ONE, encoder, store=store, use=used.append) is used[-1]
    assert len(used) == 2
    assert len(encoder.texts) == 1


def test_texts_are_shared_out_evenly() -> None:
    assert even_parts(100, 64) == [50, 50]
    for count in range(200):
        for most in (1, 7, 32):
            sizes = even_parts(count, most)
            assert sum(sizes) == count
            assert len(sizes) == -(-count // most)
            assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_label_without_direction_is_named_and_what_came_before_is_kept(
    encoder: Counting, store: LabelStore, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoder.encode

    def broken(texts: Sequence[str], *, clock: Any = None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        embeddings, cut = real(texts)
        embeddings[["bad" in text for text in texts]] = bad
        return embeddings, cut

    monkeypatch.setattr(encoder, "encode", broken)
    labels = LabelSet.of(["red", "bad one", "blue"])
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match=r"'bad one'.*has no direction"):
        build_bank(labels, ONE, encoder, store=store)
    encoder.texts.clear()
    build_bank(LabelSet.of(["red"]), ONE, encoder, store=store)
    assert not encoder.texts


def test_labels_with_several_texts_are_pooled_across_calls(encoder: Counting) -> None:
    many = Templates.of([f"{number} {{}}" for number in range(TEXTS_A_CALL - 1)])
    labels = (Label("red", ("crimson",)), Label("blue"), Label("green", (), ("leaves",)), Label("grey"))
    bank = build_bank(LabelSet(labels), many, encoder)
    for label, row in zip(labels, bank.embeddings, strict=True):
        alone = build_bank(LabelSet((label,)), many, encoder)
        np.testing.assert_allclose(row, alone.embeddings[0], atol=1e-6)  # other batches, other roundings


def test_an_unwritable_cache_costs_time_alone(encoder: Counting, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = LabelStore(HostCache.open("0" * 64, root=tmp_path / "file" / "below"), encoder.digest)
    labels = LabelSet.of(["red"])
    first = build_bank(labels, ONE, encoder, store=store)
    assert build_bank(labels, ONE, encoder, store=store).embeddings.tolist() == first.embeddings.tolist()
    assert len(encoder.texts) == 2


# -- damage, kills, neighbours -----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["bank-*", "vectors-*", "*"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_damaged_entries_are_ignored_and_made_again(
    encoder: Counting, store: LabelStore, tmp_path: Path, pattern: str, damage: str
) -> None:
    labels = LabelSet.of(["red", "blue"])
    made = build_bank(labels, ONE, encoder, store=store)
    for path in _files(tmp_path, pattern):
        content = bytearray(path.read_bytes())
        if damage == "flip":
            content[-3] ^= 0x10
        elif damage == "cut":
            del content[-5:]
        elif damage == "empty":
            content.clear()
        else:
            content = bytearray(made.to_bytes() if "vectors" in path.name else b"{}" * 40)
        path.unlink()
        path.write_bytes(content)
    again = build_bank(labels, ONE, encoder, store=store)
    np.testing.assert_allclose(again.embeddings, made.embeddings, atol=1e-6)


def test_an_interrupted_run_continues(encoder: Counting, store: LabelStore) -> None:
    labels = LabelSet.of([f"label {number}" for number in range(200)])

    def stop() -> None:
        if len(encoder.texts) >= 128:
            raise KeyboardInterrupt

    encoder.before = stop
    with pytest.raises(KeyboardInterrupt):
        build_bank(labels, ONE, encoder, store=store)
    encoder.before = lambda: None
    build_bank(labels, ONE, encoder, store=store)
    assert len(encoder.texts) == 200


_SLOW_BUILD = """
import sys, time
from pathlib import Path
import edgeclip.labels as labels
from edgeclip.bundle import Bundle
from edgeclip.cache import HostCache
from edgeclip.label_store import LabelStore
from edgeclip.text_encoder import TextEncoder

labels._KEEP_EVERY_S = 0.01
bundle = Bundle.open(sys.argv[1])
encoder = TextEncoder(bundle, bundle.variant("onnx-fp32"))

class Slow:
    digest, space = encoder.digest, encoder.space
    def encode(self, texts, *, clock=None):
        time.sleep(0.05)
        print(len(texts), flush=True)
        return encoder.encode(texts)

names = [f"label {number}" for number in range(2000)]
store = LabelStore(HostCache.open("0" * 64, root=Path(sys.argv[2]) / "cache"), encoder.digest)
labels.build_bank(labels.LabelSet.of(names), labels.Templates.of("one"), Slow(), store=store)
"""


def test_a_killed_run_continues(tmp_path: Path, tiny_bundle_session: Path, encoder: Counting) -> None:
    command = [sys.executable, "-c", _SLOW_BUILD, str(tiny_bundle_session), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(4):
            process.stdout.readline()
        process.kill()
    names = [f"label {number}" for number in range(2000)]
    build_bank(LabelSet.of(names), ONE, encoder, store=_store(tmp_path, encoder))
    # the batch in flight and the one not yet written may be lost, no more
    assert len(encoder.texts) <= 2000 - 2 * (TEXTS_A_CALL - 1)


_BUILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_labels import Counting, LabelSet, ONE, _store, build_bank
encoder = Counting(Path(sys.argv[1]))
names = [f"label {number}" for number in range(int(sys.argv[3]))]
bank = build_bank(LabelSet.of(names), ONE, encoder, store=_store(Path(sys.argv[2]), encoder))
print(__import__("hashlib").sha256(bank.embeddings.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_processes_may_build_at_once(tmp_path: Path, tiny_bundle_session: Path, encoder: Counting) -> None:
    here = Path(__file__).parent
    paths = [str(here), str(here / "tools")]
    command = [sys.executable, "-c", _BUILD, str(tiny_bundle_session), str(tmp_path), "300", *paths]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    results = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(results) == 1
    names = [f"label {number}" for number in range(300)]
    build_bank(LabelSet.of(names), ONE, encoder, store=_store(tmp_path, encoder))
    assert not encoder.texts


def test_many_small_additions_stay_few_files(encoder: Counting, store: LabelStore, tmp_path: Path) -> None:
    names = [f"label {number}" for number in range(80)]
    for count in range(1, len(names) + 1):
        build_bank(LabelSet.of(names[:count]), ONE, encoder, store=store)
    assert len(encoder.texts) == 80
    assert len(_files(tmp_path, "vectors-*")) <= 33
    assert len(_files(tmp_path, "bank-*")) <= 33
    assert len(_files(tmp_path, ".*.sum")) <= 66
    build_bank(LabelSet.of(names[::-1]), ONE, encoder, store=store)
    assert len(encoder.texts) == 80


def test_progress_estimates_what_is_left(encoder: Counting) -> None:
    seen: list[BankProgress] = []
    encoder.before = lambda: time.sleep(0.002)
    build_bank(
        LabelSet.of([f"label {number}" for number in range(70)]), ONE, encoder, on_progress=seen.append
    )
    sizes = even_parts(70, TEXTS_A_CALL)
    done = [sum(sizes[: part + 1]) for part in range(len(sizes))]
    assert len(done) > 1
    assert [(each.labels_done, each.texts_done, each.texts) for each in seen] == [(n, n, 70) for n in done]
    assert all(each.remaining_s is not None for each in seen)
    assert seen[0].remaining_s
    assert seen[-1].remaining_s == 0


# -- the file form -----------------------------------------------------------------------------------------


@pytest.fixture
def bank(encoder: Counting) -> LabelBank:
    labels = LabelSet((Label("red", ("crimson",), (), (("zh", Label("红")),)), Label("very " * 40 + "long")))
    return build_bank(labels, SEVEN, encoder)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bank_files_read_back(bank: LabelBank, tmp_path: Path, dtype: Any) -> None:
    bank.save(tmp_path / "bank.safetensors", dtype=dtype)
    again = LabelBank.open(tmp_path / "bank.safetensors")
    for name in ("labels", "templates", "space", "tower", "truncated"):
        assert getattr(again, name) == getattr(bank, name)
    assert again.embeddings.dtype == np.float32
    # half precision keeps 11 bits of values below 1
    np.testing.assert_allclose(again.embeddings, bank.embeddings, atol=0 if dtype == "float32" else 5e-4)
    np.testing.assert_allclose(np.linalg.norm(again.embeddings, axis=1), 1, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["bank.safetensors"]


def test_the_library_reads_our_bank_files(bank: LabelBank, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    bank.save(tmp_path / "bank.safetensors")
    with safetensors.safe_open(tmp_path / "bank.safetensors", "numpy") as file:
        assert file.get_tensor("embeddings").tolist() == bank.embeddings.tolist()
        assert json.loads(file.metadata()["labels"])[0]["name"] == "red"
        assert file.metadata()["space"] == bank.space


def test_the_same_bank_is_the_same_bytes(bank: LabelBank) -> None:
    assert bank.to_bytes() == LabelBank.from_bytes(bank.to_bytes()).to_bytes()


def test_npy_banks(bank: LabelBank, tmp_path: Path) -> None:
    path = tmp_path / "bank.npy"
    np.save(path, bank.embeddings * 3)
    with pytest.raises(InputError, match=r"bank.npy' holds no labels: put 'bank.txt' beside it"):
        LabelBank.open(path)
    (tmp_path / "bank.txt").write_text("a\nb\n", encoding="utf-8")
    read = LabelBank.open(path, space="s")
    assert (read.names, read.space) == (("a", "b"), "s")
    np.testing.assert_allclose(read.embeddings, bank.embeddings, atol=1e-6)
    with pytest.raises(InputError, match=r"bank.npy.*shape \(2, 16\) for 1 labels"):
        LabelBank.open(path, labels=LabelSet.of(["a"]))
    np.save(path, np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not an \.npy file"):
        LabelBank.open(path)
    np.save(path, np.zeros((2, 4), np.float32))
    with pytest.raises(InputError, match="'a' has length 0"):
        LabelBank.open(path)
    np.save(path, np.zeros((2, 4), np.int32))
    with pytest.raises(InputError, match="expected floats"):
        LabelBank.open(path)


def test_rows_that_are_not_unit_are_refused() -> None:
    labels = LabelSet.of(["a", "b"])
    for bad in (2.0, 0.9, float("nan"), float("inf")):
        rows = np.array([[1, 0], [bad, 0]], np.float32)
        with pytest.raises(InputError, match="'b' has length"):
            LabelBank(labels, rows, ONE)


def test_other_files_are_no_banks(tmp_path: Path) -> None:
    from edgeclip.tensors import write_tensors

    path = tmp_path / "x.safetensors"
    for content, message in (
        (b"", "x.safetensors.* cannot be read as safetensors"),
        (write_tensors({"embeddings": np.ones((1, 1), np.float32)}), "no label bank"),
        (write_tensors({}, {"format": "edgeclip-label-bank", "schema": "1"}), "no label bank"),
        (
            write_tensors(
                {"embeddings": np.ones((1, 1), np.float32)}, {"format": "edgeclip-label-bank", "schema": "2"}
            ),
            "schema '2', expected '1'",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            LabelBank.open(path)
    with pytest.raises(InputError, match="cannot be read"):
        LabelBank.open(tmp_path / "none.safetensors")


def test_a_changed_byte_is_noticed(bank: LabelBank) -> None:
    content = bytearray(bank.to_bytes())
    content[-1] ^= 1
    with pytest.raises(InputError, match="checksum does not match"):
        LabelBank.from_bytes(bytes(content))


def test_an_unwritable_bank_file_is_named(bank: LabelBank, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'.*none/bank.safetensors' cannot be written"):
        bank.save(tmp_path / "none" / "bank.safetensors")


def test_a_file_never_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is no file, expected one to write over"):
        write_atomic(pipe, b"content")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
