"""The members of a reinforced sample that hold what teachers said about it: DataCompDR's layout.

===================  ==========================================================================
member               holds
===================  ==========================================================================
``.npz``             arrays in float32 or float16
``.pth.gz``          the same in bfloat16: gzip of what ``torch.save`` writes
``.paug.json``       ``param_aug``: the parameters of each view (:mod:`edgeclip.distill.views`)
``.syn.json``        ``syn_text``: synthetic captions; ``syn_text_TAG`` those of another captioner
===================  ==========================================================================

Arrays are ``(rows, K·d)``: unit embeddings of K teachers side by side.

===================  ==========================================================================
array                its rows
===================  ==========================================================================
``image_emb``        one for each view
``text_emb``         the first alt text, then (where it has rows for them) the synthetic captions
``syn_text_TAG_emb`` synthetic captions of that tag (the second published version has these)
``caption_KIND_emb`` captions of other kinds, ``caption_zh_emb``; of the kind ``alt`` those behind the first
===================  ==========================================================================

The last line is ours; others leave such arrays alone. Layout: Vasu et al. 2024 ("MobileCLIP"), the loader of
apple/ml-mobileclip and the data card of apple/DataCompDR-12M.

Members come from strangers. They are never unpickled beyond tensors, sizes are limited before anything is
decompressed, and what is asked for must be finite. Training wants one of thirty rows: only that is read, so
sums over whole members are checked where a set is validated (:func:`check_stored`), not in training.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from edgeclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "EXTENSIONS",
    "Precision",
    "StoredEmbeddings",
    "check_stored",
    "open_stored",
    "place_of",
    "stored_member",
    "write_stored",
]

Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]

EXTENSIONS = ("npz", "pth.gz")
"""Members that hold embeddings; where a sample has both, the first counts."""

IMAGE, TEXT = "image_emb", "text_emb"
MAX_BYTES = 1 << 26
MAX_ROWS, MAX_COLUMNS = 1 << 14, 1 << 16
_MAX_ARRAYS = 64
_MAX_HEAD_BYTES = 4096
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SYNTHETIC = re.compile(r"synthetic(_.+)?")
# Not compressed: a fifth would be gained, and inflating costs as much as all else that training does with a
# sample's embeddings.
_GZIP_LEVEL = 0


class Place(NamedTuple):
    """Where the embedding of a caption is: the array and its row."""

    array: str
    row: int


# -- Reading ------------------------------------------------------------------------------------------------


class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, wanted: Sequence[int]) -> NDArray[np.float32]: ...

    def check(self) -> None: ...


class StoredEmbeddings:
    """The arrays of one sample.

    Attributes:
        where: names the member in errors.
        shapes: ``(rows, columns)`` by name.
    """

    def __init__(self, where: str, arrays: Mapping[str, _Array]) -> None:
        self.where = where
        self._arrays = arrays
        self.shapes = {name: array.shape for name, array in arrays.items()}
        if IMAGE not in arrays:
            raise InputError(
                f"{where}: holds {sorted(arrays)}, expected {IMAGE!r}. Reinforce the sample again."
            )
        widths = {columns for _, columns in self.shapes.values()}
        if len(widths) > 1:
            raise InputError(
                f"{where}: its arrays have {sorted(widths)} columns, expected the same number in all. "
                "Reinforce the sample again."
            )
        (self.columns,) = widths

    @property
    def views(self) -> int:
        """How many views have an embedding."""
        return self.shapes[IMAGE][0]

    def rows(self, name: str, wanted: Sequence[int]) -> NDArray[np.float32]:
        """Return rows of an array, ``(len(wanted), columns)`` float32.

        Raises:
            InputError: there is no such array or row, or it is damaged or not finite.
        """
        array = self._arrays.get(name)
        if array is None:
            raise InputError(f"{self.where}: holds {sorted(self.shapes)}, expected {name!r}.")
        for row in wanted:
            if not 0 <= row < array.shape[0]:
                raise InputError(f"{self.where}: {name!r} has {array.shape[0]} rows, expected a row {row}.")
        found = array.rows(wanted)
        if not np.isfinite(found).all():
            raise InputError(
                f"{self.where}: {name!r} holds numbers that are not finite in rows {list(wanted)[:5]}. "
                "Reinforce the sample again."
            )
        return found

    def check(self) -> None:
        """Read everything.

        Raises:
            InputError: something is damaged or not finite.
        """
        for name, array in self._arrays.items():
            array.check()
            self.rows(name, range(array.shape[0]))


def stored_member(members: Mapping[str, bytes]) -> str | None:
    """Return the extension of the member with a sample's embeddings; ``None`` where it has none."""
    return next((extension for extension in EXTENSIONS if extension in members), None)


def open_stored(members: Mapping[str, bytes], *, where: str) -> StoredEmbeddings:
    """Return what is stored about a sample, without reading its rows yet.

    Args:
        members: content by extension, as a :class:`~edgeclip.distill.samples.Sample` has them.
        where: names the sample in errors.

    Raises:
        InputError: there is nothing, or it is damaged, too large, or of a type that is not read.
    """
    extension = stored_member(members)
    if extension is None:
        raise InputError(
            f"{where}: has no stored embeddings (members {sorted(members)}, expected .npz or .pth.gz). "
            "Make them with 'edgeclip reinforce', or leave the stored teachers out."
        )
    named = f"{where}.{extension}"
    content = members[extension]
    if len(content) > MAX_BYTES:
        raise InputError(f"{named}: has {len(content):,} bytes, expected at most {MAX_BYTES:,}.")
    arrays = _npz_arrays(content, named) if extension == "npz" else _torch_arrays(content, named)
    return StoredEmbeddings(named, arrays)


def _checked_shape(shape: Sequence[int], name: str, where: str) -> tuple[int, int]:
    if len(shape) != 2 or not 1 <= shape[0] <= MAX_ROWS or not 1 <= shape[1] <= MAX_COLUMNS:
        raise InputError(
            f"{where}: {name!r} has the shape {tuple(shape)}, expected (rows, columns) of at most {MAX_ROWS} "
            f"by {MAX_COLUMNS}. Reinforce the sample again."
        )
    return int(shape[0]), int(shape[1])


# -- npz ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ZipEntry:
    """A file in a zip archive: where its bytes are."""

    name: str
    method: int
    checksum: int
    begin: int
    compressed: int
    size: int


def _zip_entries(content: bytes, where: str) -> list[_ZipEntry]:
    """Return the files of a zip archive (PKWARE's APPNOTE 4.3).

    Nothing is decompressed. The archive is read by its directory, as all programs do; sizes that do not fit
    into it are refused.
    """

    def refuse(what: str) -> InputError:
        return InputError(f"{where}: is not a whole zip archive ({what}). Get or make the shard again.")

    end = content.rfind(b"PK\5\6", max(0, len(content) - (1 << 16) - 22))
    if end < 0 or end + 22 > len(content):
        raise refuse("it has no end")
    count, size, begin = struct.unpack_from("<HII", content, end + 10)
    if count > _MAX_ARRAYS or begin + size > end:
        raise refuse(f"a directory of {count} files in {size} bytes; at most {_MAX_ARRAYS} are expected")
    found: dict[str, _ZipEntry] = {}
    at, total = begin, 0
    for _ in range(count):
        if at + 46 > end or content[at : at + 4] != b"PK\1\2":
            raise refuse("its directory is damaged")
        flags, method = struct.unpack_from("<HH", content, at + 8)
        checksum, compressed, full, name_size, extra, comment = struct.unpack_from(
            "<IIIHHH", content, at + 16
        )
        (local,) = struct.unpack_from("<I", content, at + 42)
        name = content[at + 46 : at + 46 + name_size].decode("utf-8", "replace")
        at += 46 + name_size + extra + comment
        if flags & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(f"{name!r} is encrypted or compressed by method {method}, which is not read")
        if local + 30 > len(content) or content[local : local + 4] != b"PK\3\4":
            raise refuse(f"{name!r} is not where the directory says")
        own_name, own_extra = struct.unpack_from("<HH", content, local + 26)
        start = local + 30 + own_name + own_extra
        total += full
        if start + compressed > begin or (method == zipfile.ZIP_STORED and compressed != full):
            raise refuse(f"{name!r} does not fit into it")
        if total > MAX_BYTES:
            raise InputError(
                f"{where}: would have more than {MAX_BYTES:,} bytes when decompressed; expected embeddings."
            )
        if name in found:
            raise refuse(f"{name!r} stands in it twice")
        found[name] = _ZipEntry(name, method, checksum, start, compressed, full)
    return list(found.values())


def _bytes_of(content: bytes, entry: _ZipEntry, until: int, where: str) -> bytes | memoryview:
    """Return the first ``until`` bytes of a file in a zip archive."""
    raw = memoryview(content)[entry.begin : entry.begin + entry.compressed]
    if entry.method == zipfile.ZIP_STORED or not until:  # to zlib, 0 means without a limit
        return raw[:until]
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, until)
    except zlib.error as error:
        raise InputError(f"{where}: {entry.name!r} is damaged ({error}). Get or make it again.") from error
    if len(data) < min(until, entry.size):
        raise InputError(
            f"{where}: {entry.name!r} has {len(data)} bytes, its archive says {entry.size}. Make it again."
        )
    return data


@lru_cache(maxsize=256)  # the samples of a set have the same few
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether in Fortran order, dtype and size of the header of an array."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version}")
    read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype, stream.tell()


class _NpyArray:
    """An array in an npz file, of which only the rows that are asked for are read."""

    def __init__(self, content: bytes, entry: _ZipEntry, where: str) -> None:
        self._content, self._entry, self._where = content, entry, where
        name = entry.name.removesuffix(".npy")
        head = bytes(_bytes_of(content, entry, min(entry.size, _MAX_HEAD_BYTES), where))
        # Another version has a longer size of the header, which numpy reads.
        size = 10 + int.from_bytes(head[8:10], "little") if head[6:8] == b"\1\0" else len(head)
        try:
            shape, fortran, dtype, self._head = _npy_header(head[:size])
        # numpy tries the syntax of several versions of Python on a header, with the errors of each parser.
        except Exception as error:
            raise InputError(
                f"{where}: {name!r} is no array ({' '.join(str(error).split())[:120]}). Make it again."
            ) from error
        # Anything else is refused here and above all arrays of objects, which would be unpickled.
        if dtype not in (np.dtype("<f4"), np.dtype("<f2")) or fortran:
            raise InputError(
                f"{where}: {name!r} is {dtype}{' in Fortran order' if fortran else ''}, expected float32 or "
                "float16 in C order. Reinforce the sample again."
            )
        self._dtype = dtype
        self.shape = _checked_shape(shape, name, where)
        expected = self._head + self.shape[0] * self.shape[1] * dtype.itemsize
        if entry.size != expected:
            raise InputError(
                f"{where}: {name!r} of shape {self.shape} has {entry.size} bytes, expected {expected}. "
                "Get or make it again."
            )

    def rows(self, wanted: Sequence[int]) -> NDArray[np.float32]:
        columns = self.shape[1]
        last = max(wanted, default=-1) + 1
        until = self._head + last * columns * self._dtype.itemsize
        data = _bytes_of(self._content, self._entry, until, self._where)
        array = np.frombuffer(data, self._dtype, count=last * columns, offset=self._head)
        return array.reshape(last, columns)[list(wanted)].astype(np.float32)

    def check(self) -> None:
        data = _bytes_of(self._content, self._entry, self._entry.size, self._where)
        if zlib.crc32(data) != self._entry.checksum:
            raise InputError(
                f"{self._where}: {self._entry.name!r} is damaged, its checksum differs. Get or make it again."
            )


def _npz_arrays(content: bytes, where: str) -> dict[str, _Array]:
    return {
        entry.name.removesuffix(".npy"): _NpyArray(content, entry, where)
        for entry in _zip_entries(content, where)
        if entry.name.endswith(("_emb.npy", "_emb"))
    }


# -- pth.gz -------------------------------------------------------------------------------------------------


class _TorchArray:
    def __init__(self, tensor: Any, name: str, where: str) -> None:
        import torch

        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise InputError(f"{where}: {name!r} is {type(tensor).__name__}, expected a dense tensor.")
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise InputError(
                f"{where}: {name!r} is {tensor.dtype}, expected bfloat16, float16 or float32. "
                "Reinforce the sample again."
            )
        self.shape = _checked_shape(tuple(tensor.shape), name, where)
        self._tensor = tensor.detach()

    def rows(self, wanted: Sequence[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._tensor[list(wanted)].float().numpy()
        return found

    def check(self) -> None:
        """Do nothing: gzip's checksum has been compared."""

    def bfloat16_bytes(self) -> bytes | None:
        """Return the numbers as they lie in memory; ``None`` for other types."""
        import torch

        if self._tensor.dtype != torch.bfloat16 or not self._tensor.is_contiguous():
            return None
        return self._tensor.view(torch.uint16).numpy().tobytes()


def _torch_arrays(content: bytes, where: str) -> dict[str, _Array]:
    unzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        saved = unzip.decompress(content, MAX_BYTES + 1)
    except zlib.error as error:
        raise InputError(f"{where}: is no gzip file, or damaged ({error}). Get or make it again.") from error
    if len(saved) > MAX_BYTES:
        raise InputError(
            f"{where}: would have more than {MAX_BYTES:,} bytes when decompressed; expected embeddings."
        )
    if not unzip.eof:
        raise InputError(f"{where}: ends before its gzip stream does. Get or make it again.")
    # torch would decompress the files of this archive without a limit, and reads an older format of pickles.
    entries = _zip_entries(saved, where)
    if not saved.startswith(b"PK\3\4") or any(entry.method != zipfile.ZIP_STORED for entry in entries):
        raise InputError(
            f"{where}: holds an older format or compressed files inside, expected what torch.save writes."
        )
    files = {entry.name.partition("/")[2]: saved[entry.begin : entry.begin + entry.size] for entry in entries}
    structure = files.get("data.pkl", b""), files.get("byteorder", b"")
    known = _STRUCTURES.get(structure)
    if known is not None and all(len(files.get(file, b"")) == size for _, file, size, _ in known):
        return {name: _RawArray(files[file], shape) for name, file, _, shape in known}
    arrays = _unpickled(saved, where)
    _learn(structure, files, arrays)
    return dict(arrays)


# What torch says about the samples of a set is the same for all but the numbers: where torch.load found each
# tensor of the first one is where it is in the others with the same pickle, which spares them a millisecond.
_STRUCTURES: dict[tuple[bytes, bytes], list[tuple[str, str, int, tuple[int, int]]]] = {}
_MAX_STRUCTURES, _MAX_PICKLE_BYTES = 64, 1 << 14


def _learn(
    structure: tuple[bytes, bytes], files: Mapping[str, bytes], arrays: Mapping[str, _TorchArray]
) -> None:
    """Remember in which file of the archive each tensor lies, where that is beyond doubt."""
    if (
        len(structure[0]) > _MAX_PICKLE_BYTES
        or len(_STRUCTURES) >= _MAX_STRUCTURES
        or structure[1] != b"little"
    ):
        return
    found = []
    for name, array in arrays.items():
        content = array.bfloat16_bytes()
        places = [file for file, held in files.items() if held == content]
        if content is None or len(places) != 1:
            return
        found.append((name, places[0], len(content), array.shape))
    _STRUCTURES[structure] = found


class _RawArray:
    """An array of bfloat16 numbers in a file of an archive."""

    def __init__(self, content: bytes, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._halves = np.frombuffer(content, "<u2").reshape(shape)

    def rows(self, wanted: Sequence[int]) -> NDArray[np.float32]:
        # The upper half of a float32.
        found: NDArray[np.float32] = (self._halves[list(wanted)].astype(np.uint32) << 16).view(np.float32)
        return found

    def check(self) -> None:
        """Do nothing: gzip's checksum has been compared."""


def _unpickled(saved: bytes, where: str) -> dict[str, _TorchArray]:
    import torch

    try:
        said = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    # Its parsers raise whatever they stumble over, among it errors of a module that is not imported here.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{where}: holds more than tensors, or is damaged ({reason}). Get or make it again."
        ) from error
    if not isinstance(said, Mapping):
        raise InputError(f"{where}: holds {type(said).__name__}, expected a dictionary of tensors.")
    return {
        name: _TorchArray(tensor, name, where)
        for name, tensor in said.items()
        if isinstance(name, str) and name.endswith("_emb")
    }


# -- Captions -----------------------------------------------------------------------------------------------


def place_of(
    kind: str, number: int, captions: Mapping[str, Sequence[str]], stored: StoredEmbeddings
) -> Place:
    """Return where the embedding of a caption is.

    Args:
        kind: of the caption.
        number: among the sample's captions of this kind.
        captions: all captions of the sample.
        stored: its arrays.

    Raises:
        InputError: there is none, or there are other numbers of captions and embeddings.
    """
    texts = stored.shapes.get(TEXT, (0, 0))[0]
    count = len(captions.get(kind, ()))
    place, have = Place(array_of(kind), number), stored.shapes.get(array_of(kind), (0, 0))[0]
    if kind == "alt":
        if number == 0:
            place, have, count = Place(TEXT, 0), min(texts, 1), 1
        else:
            place, count = Place(place.array, number - 1), count - 1
    elif _SYNTHETIC.fullmatch(kind) and place.array not in stored.shapes:
        only = [known for known in captions if _SYNTHETIC.fullmatch(known)] == [kind]
        if kind == "synthetic" or only:
            place, have = Place(TEXT, 1 + number), texts - 1
    if have != count:
        raise InputError(
            f"{stored.where}: has {max(have, 0)} embeddings of captions of the kind {kind!r}, the sample has "
            f"{count} such captions. Reinforce it again, or leave this kind out of the captions."
        )
    return place


def array_of(kind: str) -> str:
    """Return the name of the array with the captions of a kind that are not in ``text_emb``."""
    if _SYNTHETIC.fullmatch(kind):
        return f"{kind.replace('synthetic', 'syn_text', 1)}_emb"
    return f"caption_{kind}_emb"


def layout_of(captions: Mapping[str, Sequence[str]]) -> dict[str, list[tuple[str, int]]]:
    """Return which caption each row of each array belongs to, for captions as they are to be stored.

    Labels are no captions and get no row.
    """
    alt = captions.get("alt", ())
    layout: dict[str, list[tuple[str, int]]] = {}
    rest = {kind: texts for kind, texts in captions.items() if kind not in ("alt", "label") and texts}
    if alt:
        layout[TEXT] = [("alt", 0)]
        layout[TEXT] += [("synthetic", number) for number in range(len(rest.pop("synthetic", ())))]
        if len(alt) > 1:
            layout[array_of("alt")] = [("alt", number) for number in range(1, len(alt))]
    for kind in sorted(rest):
        layout[array_of(kind)] = [(kind, number) for number in range(len(rest[kind]))]
    return layout


def check_stored(members: Mapping[str, bytes], captions: Mapping[str, Sequence[str]], *, where: str) -> None:
    """Read all that is stored about a sample.

    Raises:
        InputError: something is damaged, not finite, or belongs to another number of captions.
    """
    stored = open_stored(members, where=where)
    stored.check()
    for kind in captions:
        own = array_of(kind) in stored.shapes
        if kind == "alt" or own or (_SYNTHETIC.fullmatch(kind) and captions[kind]):
            place_of(kind, 0, captions, stored)
        if kind == "alt" and own:
            place_of(kind, 1, captions, stored)


# -- Writing ------------------------------------------------------------------------------------------------


def write_stored(arrays: Mapping[str, NDArray[np.float32]], precision: Precision) -> tuple[str, bytes]:
    """Return extension and content of the member with these arrays; the same arrays give the same bytes.

    Args:
        arrays: ``(rows, columns)`` by name.
        precision: bfloat16 gives a ``pth.gz``, the others an ``npz``, not compressed so that single rows can
            be read.

    Raises:
        InputError: more than is read again.
    """
    rows, columns = (max(array.shape[axis] for array in arrays.values()) for axis in (0, 1))
    size_bytes = sum(array.nbytes for array in arrays.values())
    most = _MAX_ARRAYS - 16, MAX_ROWS, MAX_COLUMNS, MAX_BYTES - (1 << 20)  # archives have files of their own
    if any(said > limit for said, limit in zip((len(arrays), rows, columns, size_bytes), most, strict=True)):
        raise InputError(
            f"embeddings of one sample: {len(arrays)} arrays of up to {rows} rows and {columns} columns, "
            f"{size_bytes:,} bytes in float32; expected at most {most[0]}, {most[1]}, {most[2]} and "
            f"{most[3]:,}. Take fewer views, captions or teachers."
        )
    buffer = io.BytesIO()
    if precision == "bfloat16":
        import torch

        tensors = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in arrays.items()}
        torch.save(tensors, buffer)
        return "pth.gz", gzip.compress(buffer.getvalue(), _GZIP_LEVEL, mtime=0)
    dtype = np.dtype("<f4" if precision == "float32" else "<f2")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array, dtype), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), content.getvalue())
    return "npz", buffer.getvalue()
