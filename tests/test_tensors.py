"""The safetensors reader and writer, held against the library of that name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edgeclip.errors import BundleError, InputError
from edgeclip.tensors import map_tensors, read_tensors, write_tensors

DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")


def some_tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    shapes = [(), (0,), (3,), (2, 3), (0, 4), (2, 1, 5)]
    return {
        f"{dtype} {shape} 名": rng.integers(0, 2, shape).astype(dtype) for dtype in DTYPES for shape in shapes
    }


def document(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_the_library_reads_what_we_write() -> None:
    tensors = some_tensors()
    read = safetensors.numpy.load(write_tensors(tensors, {"a": "b", "言": "語"}))
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected, strict=True)


def test_we_read_what_the_library_writes() -> None:
    tensors = some_tensors()
    read, metadata = read_tensors(safetensors.numpy.save(tensors, {"a": "b", "言": "語"}))
    assert metadata == {"a": "b", "言": "語"}
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(read[name], expected, strict=True)


def test_equal_input_is_equal_bytes_in_any_order() -> None:
    tensors = some_tensors()
    metadata = {"b": "2", "a": "1"}
    again = write_tensors(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert write_tensors(tensors, metadata) == again


def test_the_form_is_frozen_byte_by_byte() -> None:
    expected = (
        b'\x60\0\0\0\0\0\0\0{"__metadata__":{"k":"v"},"x":{"dtype":"I16","shape":[2],"data_offsets":[0,4]}}'
    )
    written = write_tensors({"x": np.array([1, -2], np.int16)}, {"k": "v"})
    header = int.from_bytes(written[:8], "little")
    assert header % 8 == 0
    assert written[8:].startswith(expected[8:])
    assert written[8 + header :] == b"\x01\x00\xfe\xff"


def test_other_layouts_are_written_as_what_they_hold() -> None:
    base = np.arange(12, dtype=">f4").reshape(3, 4)
    read, _ = read_tensors(write_tensors({"big": base, "columns": base.T, "steps": base[::2, ::3]}))
    np.testing.assert_array_equal(read["big"], base)
    np.testing.assert_array_equal(read["columns"], base.T)
    np.testing.assert_array_equal(read["steps"], base[::2, ::3])


def test_arrays_are_aligned_read_only_views() -> None:
    read, _ = read_tensors(write_tensors({"a": np.ones(3, np.uint8), "b": np.ones(2), "c": np.ones(5, "f2")}))
    for array in read.values():
        assert array.flags.aligned
        assert not array.flags.writeable
        assert not array.flags.owndata


def test_a_mapped_file_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(write_tensors(some_tensors(), {"a": "b"}))
    mapped, metadata = map_tensors(path)
    assert metadata == {"a": "b"}
    for name, expected in some_tensors().items():
        np.testing.assert_array_equal(mapped[name], expected, strict=True)


@pytest.mark.parametrize("content", [None, b"", b"1234567", b"12345678"])
def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"the file .*x\.safetensors' cannot be read"):
        map_tensors(path, error=InputError)


def test_a_dtype_without_a_code_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="tensor 'c' has dtype complex64"):
        write_tensors({"c": np.ones(2, np.complex64)})


X = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it has 0 bytes, expected at least 8"),
        (struct.pack("<Q", 2**63) + b"{}", "its header says 9223372036854775808 bytes"),
        (struct.pack("<Q", 3) + b"{}", "its header says 3 bytes, expected at most 2"),
        (document(b"\xff"), "invalid start byte"),
        (document(b"{"), "Expecting"),
        (document(b"[" * 100_000), "."),
        (document([]), "its header is not an object"),
        (document(b'{"a":1,"a":2}'), "a name appears twice"),
        (document({"__metadata__": []}), "__metadata__ is not an object of strings"),
        (document({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
        (document({"x": 1}), "the entry of tensor 'x' is not"),
        (document({"x": {"dtype": "U8", "shape": [0]}}), "the entry of tensor 'x' is not"),
        (document({"x": {**X, "dtype": "BF16"}}, b"1234"), "tensor 'x' has dtype 'BF16', expected one of"),
        (document({"x": {**X, "dtype": ["U8"]}}, b"1234"), "tensor 'x' has dtype"),
        (document({"x": {**X, "shape": [-4]}}, b"1234"), "a list of at most 8 sizes"),
        (document({"x": {**X, "shape": [4.0]}}, b"1234"), "a list of at most 8 sizes"),
        (document({"x": {**X, "shape": [True] * 4}}, b"1234"), "a list of at most 8 sizes"),
        (document({"x": {**X, "shape": [1] * 9}}, b"1234"), "a list of at most 8 sizes"),
        (document({"x": {**X, "shape": [2**62, 4]}}, b"1234"), "a list of at most 8 sizes"),
        (document({"x": {**X, "shape": [2**61, 8, 0]}}, b"1234"), "but 4 bytes"),
        (document({"x": {**X, "shape": [5]}}, b"1234"), r"shape \[5\] of U8 but 4 bytes"),
        (document({"x": {**X, "data_offsets": [0, 5]}}, b"1234"), "offsets outside the 4 bytes"),
        (document({"x": {**X, "data_offsets": [4, 0]}}, b"1234"), "offsets outside"),
        (document({"x": {**X, "data_offsets": [0]}}, b"1234"), "offsets outside"),
        (document({"x": {**X, "data_offsets": [1, 5]}}, b"12345"), "a gap or an overlap at byte 0"),
        (document({"x": X, "y": {**X, "data_offsets": [2, 6]}}, b"123456"), "a gap or an overlap at byte 2"),
        (document({"x": X}, b"12345"), "it has 5 bytes of data, its header describes 4"),
        (document({"x": {**X, "dtype": "BOOL"}}, b"\0\1\1\2"), "BOOL but holds bytes other than 0 and 1"),
    ],
)
def test_a_malformed_document_is_refused_in_one_line(data: bytes, expected: str) -> None:
    with pytest.raises(BundleError, match=expected) as caught:
        read_tensors(data, where="golden file 'g'")
    assert str(caught.value).startswith("golden file 'g' cannot be read as safetensors: ")
    assert "\n" not in str(caught.value)


def test_damaged_documents_are_refused_or_read() -> None:
    """500 seeded mutations of a bank: a typed error of one line or arrays, never anything else."""
    rng = np.random.default_rng(7)
    good = write_tensors(
        {"embeddings": rng.normal(size=(5, 8)).astype("f2"), "rows": np.arange(5)}, {"format": "bank"}
    )
    said = []
    for _ in range(500):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            position = int(rng.integers(0, min(len(data), 260)))
            kind = rng.integers(0, 4)
            if kind == 0:
                data[position] = int(rng.integers(0, 256))
            elif kind == 1:
                del data[position : position + int(rng.integers(1, 40))]
            elif kind == 2:
                data[position:position] = bytes(
                    rng.integers(0, 256, int(rng.integers(1, 20)), dtype=np.uint8)
                )
            else:
                data[position:position] = b'9{["0'[int(rng.integers(0, 5)) :][:1]
        try:
            tensors, _ = read_tensors(bytes(data))
        except BundleError as error:
            said.append(str(error))
        else:
            assert sum(array.nbytes for array in tensors.values()) <= len(data)
    assert len(said) > 300
    assert not any("\n" in message for message in said)
