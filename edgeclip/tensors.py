"""Arrays in files: the safetensors format, read without trusting it and written reproducibly.

Eight bytes of header length (little endian), a JSON header ``{name: {dtype, shape, data_offsets}}`` with
strings under ``__metadata__``, then the data without gaps (https://github.com/huggingface/safetensors#format).
Written here rather than with the library for three reasons: a malformed file becomes one line instead of a
foreign exception, arrays can stay in a memory map, and metadata comes out in a fixed order. Tests hold it
against the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import BundleError, EdgeClipError

__all__ = ["map_tensors", "read_tensors", "tensor_blocks", "write_tensors"]

MAX_HEADER_BYTES = 16 << 20
MAX_RANK = 8
_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "<i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "<u1",
        "BOOL": "?",
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_tensors(
    data: bytes | memoryview | NDArray[np.uint8],
    *,
    where: str = "safetensors data",
    error: type[EdgeClipError] = BundleError,
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the arrays and the metadata of a safetensors document.

    Args:
        data: the whole document. The arrays are read-only views into it: nothing is copied.
        where: what is read, as messages name it (``"golden file 'golden.1a2b3c4d.safetensors'"``).
        error: the class to raise: ``BundleError`` for parts of a bundle, ``InputError`` for a user's file.

    Raises:
        EdgeClipError: ``error``, where the document is malformed or holds a dtype numpy
            does not have (BF16, F8).
    """
    view = memoryview(cast("bytes", data)).cast("B").toreadonly()
    try:
        return _read(view)
    except (ValueError, RecursionError) as problem:
        said = " ".join(str(problem).split()).rstrip(".")[:300] or type(problem).__name__
        raise error(f"{where} cannot be read as safetensors: {said}.") from problem


def map_tensors(
    path: Path, *, where: str | None = None, error: type[EdgeClipError] = BundleError
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the arrays of a safetensors file, read-only and memory-mapped, and its metadata.

    Pages are read when they are touched and shared between processes. The file must not be changed meanwhile.

    Raises:
        EdgeClipError: ``error``, as :func:`read_tensors`, and where the file cannot be opened.
    """
    where = where or f"the file {str(path)!r}"
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as problem:  # ValueError: an empty file cannot be mapped
        raise error(f"{where} cannot be read: {problem}.") from problem
    return read_tensors(mapped, where=where, error=error)


def write_tensors(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors document; equal arrays and metadata give equal bytes.

    Tensors are laid out by falling item size, then by name, so that each is aligned to its dtype.

    Raises:
        TypeError: a dtype that safetensors does not have.
    """
    return b"".join(tensor_blocks(tensors, metadata))


def tensor_blocks(
    tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> list[bytes | memoryview]:
    """Return what :func:`write_tensors` does, as blocks to write one after the other; arrays are not copied.

    Raises:
        TypeError: a dtype that safetensors does not have.
    """
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    arrays = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, expected one of {sorted(_DTYPES)}")
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    end = 0
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _NAMES[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    data = (arrays[name].reshape(-1).view(np.uint8).data for name in order)
    return [len(text).to_bytes(8, "little"), text, *data]


def _read(view: memoryview) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    if len(view) < 8:
        raise ValueError(f"it has {len(view)} bytes, expected at least 8")
    length = int.from_bytes(view[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(view) - 8):
        raise ValueError(
            f"its header says {length} bytes, expected at most {min(MAX_HEADER_BYTES, len(view) - 8)}"
        )
    header = json.loads(bytes(view[8 : 8 + length]).decode("utf-8"), object_pairs_hook=_unique_keys)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not an object of strings")
    data = view[8 + length :]
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _tensor(name, entry, data)
        spans.append(span)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"its data has a gap or an overlap at byte {min(begin, position)}")
        position = end
    if position != len(data):
        raise ValueError(f"it has {len(data)} bytes of data, its header describes {position}")
    return tensors, metadata


def _tensor(name: str, entry: Any, data: memoryview) -> tuple[NDArray[Any], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of tensor {name[:80]!r} is not {{dtype, shape, data_offsets}}")
    shape, offsets, said = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(said, str) or said not in _DTYPES:
        raise ValueError(
            f"tensor {name[:80]!r} has dtype {str(said)[:40]!r}, expected one of {sorted(_DTYPES)}"
        )
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name[:80]!r} has a shape that is not a list of at most {MAX_RANK} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(data):
        raise ValueError(f"tensor {name[:80]!r} has offsets outside the {len(data)} bytes of data")
    dtype, (begin, end) = _DTYPES[said], offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"tensor {name[:80]!r} has shape {shape} of {said} but {end - begin} bytes")
    flat: NDArray[Any] = np.frombuffer(data[begin:end], dtype=np.uint8)
    if said == "BOOL" and flat.size and flat.max() > 1:
        raise ValueError(f"tensor {name[:80]!r} is BOOL but holds bytes other than 0 and 1")
    return flat.view(dtype).reshape(shape), (begin, end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return unique
