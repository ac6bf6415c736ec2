"""What teachers said is read back from both published forms, and strangers' files do no harm."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.distill import stored as stored_module
from edgeclip.distill.stored import (
    Place,
    Precision,
    check_stored,
    layout_of,
    open_stored,
    place_of,
    write_stored,
)
from edgeclip.errors import InputError

torch = pytest.importorskip("torch")


def unit(rows: int, columns: int = 12, seed: int = 0) -> NDArray[np.float32]:
    array = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


ARRAYS = {"image_emb": unit(4), "text_emb": unit(3, seed=1), "caption_zh_emb": unit(2, seed=2)}
CAPTIONS = {"alt": ("a cat",), "synthetic": ("one", "two"), "zh": ("猫", "一只猫")}


def as_npz(arrays: Mapping[str, Any], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def as_pth(arrays: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(arrays, buffer)
    return gzip.compress(buffer.getvalue())


def tensors(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    return {name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}


# Round trips


@pytest.mark.parametrize(
    ("precision", "extension", "tolerance"),
    [("float32", "npz", 0.0), ("float16", "npz", 2**-11), ("bfloat16", "pth.gz", 2**-8)],
)
def test_arrays_come_back(precision: Precision, extension: str, tolerance: float) -> None:
    written = write_stored(ARRAYS, precision)
    assert written == write_stored(ARRAYS, precision)
    assert written[0] == extension
    found = open_stored(dict([written]), where="s/7")
    assert found.shapes == {name: array.shape for name, array in ARRAYS.items()}
    assert (found.views, found.columns) == (4, 12)
    for name, array in ARRAYS.items():
        rows = found.rows(name, range(len(array)))
        assert rows.dtype == np.float32
        assert np.abs(rows - array).max() <= tolerance
    found.check()
    assert np.array_equal(found.rows("image_emb", [3, 0]), found.rows("image_emb", range(4))[[3, 0]])


@pytest.mark.parametrize("compressed", [False, True])
def test_numpy_reads_ours_and_we_read_numpy_s(compressed: bool) -> None:
    _, content = write_stored(ARRAYS, "float32")
    theirs = np.load(io.BytesIO(content), allow_pickle=False)
    assert all(np.array_equal(theirs[name], array) for name, array in ARRAYS.items())
    ours = open_stored({"npz": as_npz(ARRAYS, compressed=compressed)}, where="s/7")
    assert np.array_equal(ours.rows("image_emb", [2]), ARRAYS["image_emb"][[2]])
    ours.check()


def test_what_is_remembered_of_a_structure_changes_nothing() -> None:
    """The first sample is unpickled, those alike are not: each gives its own numbers."""
    stored_module._STRUCTURES.clear()
    for seed in range(3):
        arrays = {"image_emb": unit(4, seed=seed), "text_emb": unit(4, seed=10 + seed)}
        content = as_pth(tensors(arrays))
        found = open_stored({"pth.gz": content}, where="s/7")
        for name, array in arrays.items():
            wanted = torch.from_numpy(array).bfloat16().float().numpy()
            assert np.array_equal(found.rows(name, range(4)), wanted)
    assert len(stored_module._STRUCTURES) == 1
    twins = {"image_emb": unit(4), "text_emb": unit(4)}  # which is which cannot be seen
    stored_module._STRUCTURES.clear()
    open_stored({"pth.gz": as_pth(tensors(twins))}, where="s/7")
    assert not stored_module._STRUCTURES
    half = {"image_emb": torch.zeros(3, 4, dtype=torch.float16)}
    assert open_stored({"pth.gz": as_pth(half)}, where="s/7").rows("image_emb", [1]).dtype == np.float32
    assert not stored_module._STRUCTURES


def test_torch_reads_ours() -> None:
    _, content = write_stored(ARRAYS, "bfloat16")
    said = torch.load(io.BytesIO(gzip.decompress(content)), weights_only=True)
    assert said["image_emb"].dtype == torch.bfloat16
    assert torch.equal(said["image_emb"], torch.from_numpy(ARRAYS["image_emb"]).bfloat16())


def test_members_have_no_time() -> None:
    _, content = write_stored(ARRAYS, "bfloat16")
    assert content[4:8] == b"\0\0\0\0"  # gzip's MTIME
    _, content = write_stored(ARRAYS, "float16")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_npz_is_preferred_as_by_the_published_loader() -> None:
    both = {"pth.gz": as_pth(tensors({"image_emb": unit(9)})), "npz": as_npz(ARRAYS)}
    assert open_stored(both, where="s/7").views == 4


def test_published_sizes() -> None:
    """Thirty views and six texts of two teachers: 108 KiB of bfloat16 (apple/DataCompDR-12M-bf16)."""
    arrays = {"image_emb": unit(30, 1536), "text_emb": unit(6, 1536, seed=1)}
    payload = 36 * 1536 * 2
    assert payload == 108 * 1024
    _, half = write_stored(arrays, "float16")
    assert payload < len(half) < payload + 1024
    _, small = write_stored(arrays, "bfloat16")
    assert payload < len(small) < payload + 2048  # not compressed, which is faster to read
    _, full = write_stored(arrays, "float32")
    assert 2 * payload < len(full) < 2 * payload + 1024


# Captions


@pytest.mark.parametrize(
    ("arrays", "captions", "places"),
    [
        # DataCompDR: the real caption, then the synthetic ones.
        (
            {"text_emb": 3},
            {"alt": ("a",), "synthetic": ("b", "c")},
            {("alt", 0): ("text_emb", 0), ("synthetic", 1): ("text_emb", 2)},
        ),
        # The second version: every key of .syn.json has an array.
        (
            {"text_emb": 1, "syn_text_emb": 2, "syn_text_dci_emb": 1},
            {"alt": ("a",), "synthetic": ("b", "c"), "synthetic_dci": ("d",)},
            {
                ("alt", 0): ("text_emb", 0),
                ("synthetic", 1): ("syn_text_emb", 1),
                ("synthetic_dci", 0): ("syn_text_dci_emb", 0),
            },
        ),
        # Its loader takes the first version's layout for a single tag too.
        (
            {"text_emb": 3},
            {"alt": ("a",), "synthetic_dci": ("b", "c")},
            {("synthetic_dci", 0): ("text_emb", 1)},
        ),
        # Ours.
        (
            {"text_emb": 2, "caption_alt_emb": 1, "caption_zh_emb": 2},
            {"alt": ("a", "b"), "synthetic": ("c",), "zh": ("d", "e")},
            {
                ("alt", 1): ("caption_alt_emb", 0),
                ("zh", 1): ("caption_zh_emb", 1),
                ("synthetic", 0): ("text_emb", 1),
            },
        ),
    ],
)
def test_captions_find_their_rows(arrays: Any, captions: Any, places: Any) -> None:
    said = {"image_emb": unit(1)} | {name: unit(rows) for name, rows in arrays.items()}
    found = open_stored({"npz": as_npz(said)}, where="s/7")
    for (kind, number), place in places.items():
        assert place_of(kind, number, captions, found) == Place(*place)


@pytest.mark.parametrize(
    "captions",
    [
        {"alt": ("a",), "synthetic": ("b", "c")},
        {"alt": ("a", "b", "c")},
        {"zh": ("a", "b")},
        {"synthetic": ("a", "b"), "zh": ("c",)},
        {"alt": ("a",), "synthetic": ("b",), "synthetic_dci": ("c", "d"), "rewrite": ("e",), "label": ("f",)},
    ],
)
def test_what_is_laid_out_is_found_again(captions: dict[str, tuple[str, ...]]) -> None:
    layout = layout_of(captions)
    rows = {
        place: number for number, place in enumerate((n, r) for n in layout for r in range(len(layout[n])))
    }
    arrays = {"image_emb": unit(1)} | {name: unit(len(of)) for name, of in layout.items()}
    found = open_stored({"npz": as_npz(arrays)}, where="s/7")
    seen = set()
    for kind, texts in captions.items():
        for number in range(len(texts)):
            if kind == "label":
                with pytest.raises(InputError, match="'label'"):
                    place_of(kind, number, captions, found)
                continue
            place = place_of(kind, number, captions, found)
            assert layout[place.array][place.row] == (kind, number)
            seen.add(rows[place])
    assert seen == set(range(len(rows)))


@pytest.mark.parametrize(
    ("arrays", "captions", "kind", "message"),
    [
        (
            {"text_emb": 1},
            {"alt": ("a",), "synthetic": ("b",)},
            "synthetic",
            "has 0 .* 'synthetic', .* has 1",
        ),
        (
            {"text_emb": 4},
            {"alt": ("a",), "synthetic": ("b",)},
            "synthetic",
            "has 3 .* 'synthetic', .* has 1",
        ),
        ({}, {"alt": ("a",)}, "alt", "has 0 .* 'alt', .* has 1"),
        ({"text_emb": 1}, {"alt": ("a",), "zh": ("b",)}, "zh", r"s/7\.npz: has 0 .* 'zh', .* has 1"),
    ],
)
def test_captions_without_embeddings_are_named(arrays: Any, captions: Any, kind: str, message: str) -> None:
    said = {"image_emb": unit(1)} | {name: unit(rows) for name, rows in arrays.items()}
    found = open_stored({"npz": as_npz(said)}, where="s/7")
    with pytest.raises(InputError, match=message):
        place_of(kind, 0, captions, found)


def test_whole_samples_are_checked() -> None:
    check_stored(dict([write_stored(ARRAYS, "float16")]), CAPTIONS, where="s/7")
    with pytest.raises(InputError, match="'synthetic'"):
        check_stored(dict([write_stored(ARRAYS, "float16")]), CAPTIONS | {"synthetic": ("x",)}, where="s/7")
    with pytest.raises(InputError, match=r"has 2 embeddings .* kind 'zh', the sample has 1 "):
        check_stored(dict([write_stored(ARRAYS, "float16")]), CAPTIONS | {"zh": ("x",)}, where="s/7")
    further = dict([write_stored(ARRAYS | {"caption_alt_emb": unit(2)}, "float16")])
    check_stored(further, CAPTIONS | {"alt": ("a cat", "a dog", "a hen")}, where="s/7")
    with pytest.raises(InputError, match=r"has 2 embeddings .* kind 'alt', the sample has 1 "):
        check_stored(further, CAPTIONS | {"alt": ("a cat", "a dog")}, where="s/7")
    content = bytearray(write_stored(ARRAYS, "float32")[1])
    at = bytes(content).index(ARRAYS["image_emb"].tobytes()) + 5
    content[at] ^= 1
    with pytest.raises(InputError, match=r"'image_emb\.npy' is damaged, its checksum differs"):
        check_stored({"npz": bytes(content)}, CAPTIONS, where="s/7")


# Strangers


class Harm:
    """Pickled, it would call something when it is read."""

    def __reduce__(self) -> Any:
        return print, ("harm was done",)


def edited(content: bytes, name: str, **changes: int) -> bytes:
    """Change fields of a member in the directory of a zip archive."""
    offsets = {"method": (10, "<H"), "flags": (8, "<H"), "compressed": (20, "<I"), "size": (24, "<I"),
               "local": (42, "<I")}  # fmt: skip
    raw = bytearray(content)
    at = content.rindex(b"PK\1\2" + content[content.index(b"PK\1\2") + 4 :][:4])
    for match in range(content.count(b"PK\1\2")):
        at = content.index(b"PK\1\2") if match == 0 else content.index(b"PK\1\2", at + 4)
        if content[at + 46 :].startswith(name.encode()):
            break
    for field, value in changes.items():
        offset, form = offsets[field]
        struct.pack_into(form, raw, at + offset, value)
    return bytes(raw)


def npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def zipped(files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def bomb() -> bytes:
    """Return an archive of some kilobytes that would become gigabytes, with an honest header."""
    head = (
        b"\x93NUMPY\1\0v\0"
        + repr({"descr": "<f4", "fortran_order": False, "shape": (16_384, 65_536)}).encode().ljust(117)
        + b"\n"
    )
    return zipped({"image_emb.npy": head + bytes(1 << 24)}, zipfile.ZIP_DEFLATED)


def hidden() -> bytes:
    """Return an archive of some kilobytes whose directory says that an array of megabytes is empty."""
    packed = zipped({"image_emb.npy": npy(np.zeros((1 << 8, 1 << 14), np.float32))}, zipfile.ZIP_DEFLATED)
    return edited(packed, "image_emb", size=0)


def older() -> bytes:
    """Return what torch saved before it used archives, with an archive behind it."""
    buffer = io.BytesIO()
    torch.save(tensors(ARRAYS), buffer, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    return gzip.compress(buffer.getvalue())


GOOD = as_npz(ARRAYS)
OBJECTS = as_npz({"image_emb": np.array([[Harm()]], dtype=object)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no end"),
        (b"PK\5\6" + bytes(10), "it has no end"),
        (GOOD[: len(GOOD) // 2], "it has no end"),
        (GOOD[100:], r"is not a whole zip archive"),
        (OBJECTS, "'image_emb' is object, expected float32"),
        (as_npz({"image_emb": np.zeros((2, 3), np.float64)}), "is float64, expected float32"),
        (as_npz({"image_emb": np.zeros((2, 3), np.int32)}), "is int32, expected float32"),
        (as_npz({"image_emb": np.zeros((2, 3), ">f4")}), "is >f4, expected float32"),
        (as_npz({"image_emb": np.zeros((3, 2), np.float32).T}), "is float32 in Fortran order"),
        (as_npz({"image_emb": np.zeros(3, np.float32)}), r"has the shape \(3,\), expected \(rows, columns\)"),
        (as_npz({"image_emb": np.zeros((0, 3), np.float32)}), r"has the shape \(0, 3\)"),
        (as_npz({"image_emb": np.zeros((2, 70_000), np.float16)}), r"has the shape \(2, 70000\)"),
        (as_npz({"text_emb": unit(2)}), r"holds \['text_emb'\], expected 'image_emb'"),
        (as_npz({"image_emb": unit(2), "text_emb": unit(2, 11)}), r"have \[11, 12\] columns"),
        (zipped({"image_emb.npy": b"no array"}), "'image_emb' is no array"),
        (zipped({"image_emb.npy": npy(unit(2))[:-1]}), "has 223 bytes, expected 224"),
        (zipped({"image_emb.npy": npy(unit(2)) + b"0"}), "has 225 bytes, expected 224"),
        (zipped({f"{number}_emb.npy": b"" for number in range(100)}), "a directory of 100 files"),
        (hidden(), "'image_emb' is no array"),
        (bomb(), r"has 16777344 bytes, expected 4294967424"),
        (edited(GOOD, "image_emb", flags=1), "is encrypted"),
        (edited(GOOD, "image_emb", method=12), "compressed by method 12"),
        (edited(GOOD, "image_emb", size=99), "does not fit into it"),
        (edited(GOOD, "image_emb", local=5), "is not where the directory says"),
        (edited(GOOD, "image_emb", size=1 << 31, method=8), "more than 67,108,864 bytes"),
    ],
)
def test_npz_of_strangers_are_refused(
    content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=rf"s/7\.npz: .*{message}"):
        open_stored({"npz": content}, where="s/7")
    assert capsys.readouterr().out == ""


def test_damaged_deflate_streams_are_refused() -> None:
    content = as_npz({"image_emb": unit(400)}, compressed=True)
    raw = bytearray(content)
    raw[2000:2100] = bytes(100)
    with pytest.raises(InputError, match=r"'image_emb\.npy'"):
        open_stored({"npz": bytes(raw)}, where="s/7").check()
    lying = edited(content, "image_emb", size=128 + 4 * 12 * 400)
    assert open_stored({"npz": lying}, where="s/7").views == 400


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_numbers_that_are_none_are_refused(value: float, precision: Precision) -> None:
    image = unit(3)
    image[1, 5] = value
    found = open_stored(dict([write_stored({"image_emb": image}, precision)]), where="s/7")
    found.rows("image_emb", [0, 2])
    with pytest.raises(InputError, match=r"'image_emb' holds numbers that are not finite in rows \[1\]"):
        found.rows("image_emb", [1])
    with pytest.raises(InputError, match="not finite"):
        found.check()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends before its gzip stream does"),
        (b"nothing", "is no gzip file"),
        (as_pth(tensors(ARRAYS))[:-30], "ends before"),
        (older(), "holds an older format"),
        (gzip.compress(b"nothing"), "is not a whole zip archive"),
        (gzip.compress(bytes(stored_module.MAX_BYTES + 1)), "more than 67,108,864 bytes"),
        (as_pth({"image_emb": Harm()}), "holds more than tensors"),
        (as_pth({"image_emb": [1, 2]}), "'image_emb' is list, expected a dense tensor"),
        (as_pth(torch.zeros(2, 3)), "holds Tensor, expected a dictionary"),
        (as_pth({"image_emb": torch.zeros(2, 3, dtype=torch.int64)}), "is torch.int64, expected bfloat16"),
        (as_pth({"image_emb": torch.zeros(1).expand(1_000_000, 60_000)}), r"shape \(1000000, 60000\)"),
        (as_pth({"text_emb": torch.zeros(2, 3)}), r"holds \['text_emb'\], expected 'image_emb'"),
    ],
)
def test_pth_of_strangers_are_refused(
    content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=rf"s/7\.pth\.gz: .*{message}"):
        open_stored({"pth.gz": content}, where="s/7")
    assert capsys.readouterr().out == ""


def test_nothing_is_inflated_for_an_array_that_is_said_to_be_empty() -> None:
    content = hidden()
    tracemalloc.start()
    with pytest.raises(InputError, match="'image_emb' is no array"):
        open_stored({"npz": content}, where="s/7")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({f"{number}_emb": unit(1) for number in range(49)}, "49 arrays of up to 1 rows and 12 columns"),
        ({"image_emb": np.zeros((1 << 14 | 1, 1), np.float32)}, "1 arrays of up to 16385 rows"),
        ({"image_emb": np.zeros((1 << 12, 1 << 12), np.float32)}, "67,108,864 bytes"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(arrays: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_stored(arrays, "float32")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_as_much_as_may_be_written_is_read(precision: Precision) -> None:
    arrays = {"image_emb": unit(2)} | {f"{number}_emb": unit(1) for number in range(47)}
    assert len(open_stored(dict([write_stored(arrays, precision)]), where="s/7").shapes) == 48


def test_archives_inside_archives_stay_small() -> None:
    buffer = io.BytesIO()
    torch.save({"image_emb": torch.zeros(1 << 12, 1 << 12)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    small = gzip.compress(zipped(inside, zipfile.ZIP_DEFLATED))
    assert len(small) < 100_000
    with pytest.raises(InputError, match=r"more than 67,108,864 bytes|compressed files inside"):
        open_stored({"pth.gz": small}, where="s/7")


def test_a_sample_without_embeddings_is_named() -> None:
    with pytest.raises(InputError, match=r"s/7: has no stored embeddings \(members \['jpg'\]"):
        open_stored({"jpg": b""}, where="s/7")
    with pytest.raises(InputError, match=r"holds .*'image_emb'.*, expected 'other_emb'"):
        open_stored({"npz": GOOD}, where="s/7").rows("other_emb", [0])
    with pytest.raises(InputError, match="'image_emb' has 4 rows, expected a row 4"):
        open_stored({"npz": GOOD}, where="s/7").rows("image_emb", [4])
    with pytest.raises(InputError, match="has 67,108,865 bytes"):
        open_stored({"npz": bytes(stored_module.MAX_BYTES + 1)}, where="s/7")


def test_random_damage_is_an_error_or_harmless() -> None:
    """Bytes of both forms are flipped at random; only our own error may come out."""
    rng = np.random.default_rng(0)
    forms = {"npz": as_npz(ARRAYS, compressed=True), "pth.gz": as_pth(tensors(ARRAYS))}
    refused = 0
    for extension, content in forms.items():
        raw = gzip.decompress(content) if extension == "pth.gz" else content
        for _ in range(300):
            damaged = bytearray(raw)
            for at in rng.integers(0, len(raw), 3):
                damaged[at] = rng.integers(0, 256)
            packed = bytes(damaged)
            if extension == "pth.gz":
                packed = gzip.compress(packed, 0)
            try:
                open_stored({extension: packed}, where="s/7").check()
            except InputError:
                refused += 1
    assert refused > 100
