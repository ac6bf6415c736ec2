"""Image-text pairs from shards, tables and folders, each reachable by its number.

Readers decode nothing. A sample that cannot be read is an :class:`InputError` of ``read``: whoever reads
counts it and goes on; a shard or table that cannot be listed is an error when it is opened.

Captions have kinds, so that a recipe can say how often each is drawn:

=====================================================  ================
found in                                               kind
=====================================================  ================
``.txt``; column ``caption``, ``text`` or ``title``    ``alt``
column ``caption_KIND`` (``caption_zh``)               ``KIND``
column ``rewrite`` or ``rewrites``                     ``rewrite``
``syn_text`` (in ``.syn.json`` or a column)            ``synthetic``
``syn_text_TAG``                                       ``synthetic_TAG``
column ``captions``: a list, or an object of kinds     ``alt``, or these
``.cls``; column ``label`` …; folder of a picture      ``label``
=====================================================  ================

The columns are those of a table and those of a shard's ``.json``. A value is a text or a list of texts.
``.syn.json`` is DataCompDR's (Vasu et al. 2024, "MobileCLIP"; apple/DataCompDR-12M).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from edgeclip.data import captions_of, read_samples, texts_of
from edgeclip.distill.index import Member, ShardFiles, ShardIndex, is_picture, open_index
from edgeclip.errors import ConfigError, InputError

__all__ = [
    "Broken",
    "BrokenLimit",
    "FileSamples",
    "JoinedSamples",
    "Sample",
    "Samples",
    "ShardSamples",
    "captions_of",
    "captions_of_members",
    "find_shards",
    "open_samples",
    "without_pictures",
]

_LABEL_COLUMNS = ("label", "class", "cls", "category")
_MAX_CAPTION_FILE_BYTES = 1 << 20
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_BRACES = 1_000_000


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture and what is known about it.

    Attributes:
        key: where it is from, the same on every run: ``shard-000000.tar/000000017``, or the path of a file.
        image: path or content of the picture file.
        captions: texts by kind; no kind without texts, no empty text.
        name: its key inside its shard; empty for files.
        members: content of the files of a shard's sample by extension, read when asked for.
        pictures: of a text without a picture of its own (:mod:`edgeclip.distill.texts`): numbers of those it
            fits.
    """

    key: str
    image: Path | bytes = field(repr=False)
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    name: str = ""
    members: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    pictures: tuple[int, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be used: its number, its key, and why."""

    index: int
    key: str
    reason: str


@dataclass(frozen=True)
class BrokenLimit:
    """How many samples may be broken before it is an error: this share of all, at most this many.

    Attributes:
        share: of all samples, rounded up.
        count: at most.
    """

    share: float = 0.01
    count: int = 10_000

    @classmethod
    def parse(cls, text: str) -> BrokenLimit:
        """Return the limit of ``"10"`` (samples) or ``"1%"`` (of all).

        Raises:
            ConfigError: neither.
        """
        number = text.strip().removesuffix("%")
        try:
            if number != text.strip():
                return cls(share=float(number) / 100, count=sys.maxsize)
            return cls(share=1.0, count=int(number))
        except (ValueError, ConfigError) as error:
            raise ConfigError(
                f"limit of broken samples is {text!r}, expected a count such as 10 or a share such as 1%."
            ) from error

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.count < 0:
            raise ConfigError(
                f"limit of broken samples is {self.share} and {self.count}, expected a share from 0 to 1 and "
                "a count of 0 or more."
            )

    def allowed(self, samples: int) -> int:
        """Return how many of so many samples may be broken."""
        return min(self.count, math.ceil(self.share * samples - 1e-9))  # 7 % of 100 are 7.000000000000001


class Samples(Protocol):
    """A numbered set of samples. Can be read from any thread, and pickled."""

    @property
    def digest(self) -> str:
        """Sha256 of which samples there are, in which order; not of what is in the pictures."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return the key of a sample without reading it."""
        ...

    def read(self, index: int) -> Sample:
        """Return a sample.

        Raises:
            InputError: it cannot be read.
        """
        ...


def open_samples(
    paths: Iterable[str | os.PathLike[str]], *, progress: Callable[[str], None] | None = None
) -> Samples:
    """Return the samples of shards, tables and folders, in the order given.

    Args:
        paths: ``.tar`` shards, also as ``name-{000..011}.tar``; folders with shards directly in them, taken
            by name; ``.csv``, ``.tsv`` and ``.jsonl`` tables; folders of pictures, whose captions are in a
            ``.txt`` file of the same name; single pictures.
        progress: called with each shard or table before it is read.

    Raises:
        InputError: something is missing or cannot be listed, or there is no sample at all.
    """
    parts: list[Samples] = []
    given = [Path(path) for given in paths for path in expanded(Path(given))]
    for is_shards, group in itertools.groupby(given, key=holds_shards):
        if is_shards:
            parts.append(ShardSamples(find_shards(group), progress=progress))
        else:
            for path in group:
                if progress is not None:
                    progress(str(path))
                parts.append(FileSamples(path))
    samples = parts[0] if len(parts) == 1 else JoinedSamples(parts)
    if not len(samples):
        indexes = [index for part in parts if isinstance(part, ShardSamples) for index in part.indexes]
        if any(index.samples for index in indexes):
            raise InputError(without_pictures(indexes))
        said = ", ".join(repr(str(path)) for path in given[:3])
        raise InputError(
            f"no samples in {said or 'an empty list of paths'}: expected pictures. Check the path."
        )
    return samples


def find_shards(paths: Iterable[Path]) -> list[Path]:
    """Return shards as given, and those directly in folders, by name.

    Raises:
        InputError: a path is not there, or a folder holds no shard.
    """
    found: list[Path] = []
    for path in (path for given in paths for path in expanded(given)):
        if not path.is_dir():
            found.append(path)
            continue
        shards = _shards_in(path)
        if not shards:
            raise InputError(f"folder {str(path)!r} holds no .tar files. Make some with 'data make-shards'.")
        found += shards
    for path in found:
        if not path.exists():
            raise InputError(f"shard {str(path)!r}: no such file. Check the path.")
    return found


def expanded(path: Path) -> Iterator[Path]:
    """Yield ``a-00.tar``, ``a-01.tar`` for ``a-{00..01}.tar``: recipes are read without a shell."""
    match = _BRACES.search(path.name)
    if match is None or path.exists():
        yield path
        return
    low, high = int(match[1]), int(match[2])
    if not 0 <= high - low < _MAX_BRACES:
        raise InputError(
            f"{str(path)!r}: the range {match[0]} has {high - low + 1} members, expected 1 to {_MAX_BRACES}."
        )
    for number in range(low, high + 1):
        digits = f"{number:0{len(match[1])}d}"
        yield path.with_name(path.name[: match.start()] + digits + path.name[match.end() :])


def holds_shards(path: Path) -> bool:
    """Return whether a path is a shard by its name, or a folder with shards directly in it."""
    if path.is_dir():
        return bool(_shards_in(path))
    name = path.name.lower()
    return name.endswith((".tar", ".tgz")) or ".tar." in name


def _shards_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as listing:
            names = [
                entry.name
                for entry in listing
                if entry.name.lower().endswith((".tar", ".tgz", ".tar.gz")) and not entry.name.startswith(".")
            ]
    except OSError as error:
        raise InputError(
            f"folder {str(folder)!r} cannot be listed ({error.strerror or error}). Check its rights."
        ) from error
    return [folder / name for name in sorted(names)]


# -- Captions -----------------------------------------------------------------------------------------------


def captions_of_members(members: Mapping[str, bytes], what: str) -> dict[str, tuple[str, ...]]:
    """Return the captions in the files of a shard's sample, by kind.

    Args:
        members: content by extension.
        what: names the sample in errors.

    Raises:
        InputError: a JSON member is none.
    """
    columns: dict[str, Any] = {}
    for extension in ("json", "syn.json"):
        if extension in members:
            columns |= _described(members[extension], f"{what}.{extension}")
    captions = captions_of(columns)
    if alt := texts_of(_decoded(members, "txt")):
        # The .json of img2dataset repeats the .txt; captions of ours in "captions" go on after it.
        captions["alt"] = alt + tuple(text for text in captions.get("alt", ()) if text not in alt)
    label = _decoded(members, "cls").strip() or next(
        (said for column in _LABEL_COLUMNS if (said := _text_or_number(columns.get(column)))), ""
    )
    if label:
        captions["label"] = (label,)
    return captions


def _text_or_number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return "".join(texts_of(value)[:1])


# -- Shards -------------------------------------------------------------------------------------------------


class ShardSamples:
    """The samples of tar shards that have a picture.

    Args:
        shards: in order.
        progress: called with each shard before its index is opened or made.

    Raises:
        InputError: a shard cannot be read, is compressed or damaged.
    """

    def __init__(self, shards: Sequence[Path], *, progress: Callable[[str], None] | None = None) -> None:
        self.indexes: list[ShardIndex] = []
        for shard in shards:
            if progress is not None:
                progress(str(shard))
            self.indexes.append(open_index(shard))
        self._ends = list(itertools.accumulate(index.pictures for index in self.indexes))
        self._files = ShardFiles()
        whole = hashlib.sha256()
        for index in self.indexes:
            whole.update(f"{index.path.name}\0{index.digest}\n".encode("utf-8", "surrogateescape"))
        self.digest = whole.hexdigest()

    def __reduce__(self) -> tuple[type[ShardSamples], tuple[list[Path]]]:
        return ShardSamples, ([index.path for index in self.indexes],)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _place(self, index: int) -> tuple[ShardIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        shard = self.indexes[number]
        return shard, shard.picture_row(index - (self._ends[number - 1] if number else 0))

    def key(self, index: int) -> str:
        """Return ``<shard>/<key>``."""
        shard, row = self._place(index)
        return _shown(f"{shard.path.name}/{shard.key(row)}")

    def read(self, index: int) -> Sample:
        """Return a sample; its picture and texts are read now, other members when they are asked for.

        Raises:
            InputError: the shard was changed, or a JSON member is none.
        """
        shard, row = self._place(index)
        name = shard.key(row)
        members = _Members(self._files, shard.path, shard.members(row))
        image = next((extension for extension in members if is_picture(extension)), None)
        if image is None:
            raise InputError(
                f"index of shard {str(shard.path)!r} is damaged: {name!r} has no picture. Delete it; it is "
                "made again."
            )
        captions = captions_of_members(members, f"{shard.path.name}/{name}")
        return Sample(_shown(f"{shard.path.name}/{name}"), members[image], captions, name, members)


def without_pictures(indexes: Sequence[ShardIndex]) -> str:
    """Return what to say about shards without pictures, such as DataCompDR's as they are published."""
    count = sum(index.samples for index in indexes)
    members = ", ".join(dict.fromkeys(name for index in indexes for name in index.extensions)) or "none"
    return (
        f"shard {str(indexes[0].path)!r}: {count} samples have no picture (members: {members}). Put pictures "
        "and .txt captions of the same keys beside them in the same shard: for DataCompDR, unpack its shard "
        "and the one of DataComp-12M with the same number into one folder, and pack that with "
        "'tar --sort=name'."
    )


class _Members(Mapping[str, bytes]):
    """The files of a sample, read one by one when they are looked at."""

    def __init__(self, files: ShardFiles, shard: Path, members: Sequence[Member]) -> None:
        self._files, self._shard = files, shard
        self._found = {member.extension: member for member in members}

    def __getitem__(self, extension: str) -> bytes:
        return self._files.read(self._shard, self._found[extension])

    def __contains__(self, extension: object) -> bool:
        return extension in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _decoded(members: Mapping[str, bytes], extension: str) -> str:
    return members[extension].decode("utf-8", "replace") if extension in members else ""


def _described(content: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: is not JSON ({error}). Make the shard again.") from error
    return value if isinstance(value, dict) else {}


# -- Tables, folders, files ---------------------------------------------------------------------------------


class _Row(msgspec.Struct, frozen=True, array_like=True):
    key: str
    path: bytes  # below the root of FileSamples, or absolute; names need not be text
    captions: dict[str, tuple[str, ...]]
    sidecar: bool


class FileSamples:
    """The pictures of a table or folder, or one picture.

    Rows are packed into one block of memory: a Python object for each of millions would be copied into every
    worker as soon as it is counted.

    Args:
        path: a ``.csv``, ``.tsv`` or ``.jsonl`` table, a folder, or a picture.

    Raises:
        InputError: the path is not there, or cannot be listed or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        is_folder = path.is_dir()
        self._root = path if is_folder else path.parent
        block, ends = bytearray(), []
        encode = msgspec.msgpack.encode
        for found in read_samples([path], folder_labels=True):
            if not isinstance(found.source, Path):
                raise InputError(f"{str(path)!r}: expected a table or a folder, got a shard.")
            captions = captions_of(found.columns)
            if found.label is not None:
                captions["label"] = (found.label,)
            try:
                inside = found.source.relative_to(self._root)
            except ValueError:  # a table may name files anywhere
                inside = found.source
            block += encode(_Row(_shown(found.key), os.fsencode(inside), captions, sidecar=is_folder))
            ends.append(len(block))
        self._block, self._ends = bytes(block), np.array(ends, np.int64)
        whole = hashlib.sha256()
        for index in range(len(ends)):
            row = self._row(index)
            whole.update(encode((row.path, sorted(row.captions.items()))))
        self.digest = whole.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def _row(self, index: int) -> _Row:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        begin = int(self._ends[index - 1]) if index else 0
        return _DECODER.decode(memoryview(self._block)[begin : int(self._ends[index])])

    def key(self, index: int) -> str:
        """Return the path as it was given or found."""
        return self._row(index).key

    def read(self, index: int) -> Sample:
        """Return a sample, with the path of its picture.

        Raises:
            InputError: the file with its caption cannot be read.
        """
        row = self._row(index)
        image = self._root / os.fsdecode(row.path)
        captions = row.captions
        if row.sidecar and "alt" not in captions and (texts := _sidecar(image.with_suffix(".txt"))):
            captions = {"alt": texts, **captions}
        return Sample(row.key, image, captions)


_DECODER = msgspec.msgpack.Decoder(_Row)


def _shown(key: str) -> str:
    """Return a key that can be logged and written as JSON: odd bytes of file names are escaped."""
    return os.fsencode(key).decode("utf-8", "backslashreplace")


def _sidecar(path: Path) -> tuple[str, ...]:
    """Return the captions beside a picture, one a line; none where there is no such file."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_CAPTION_FILE_BYTES + 1)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise InputError(f"caption {str(path)!r} cannot be read ({error.strerror or error}).") from error
    if len(content) > _MAX_CAPTION_FILE_BYTES:
        raise InputError(f"caption {str(path)!r}: expected at most {_MAX_CAPTION_FILE_BYTES} bytes.")
    return texts_of(content.decode("utf-8", "replace").splitlines())


class JoinedSamples:
    """Several sets one after the other."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(map(len, self.parts)))
        self.digest = hashlib.sha256("\n".join(part.digest for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _place(self, index: int) -> tuple[Samples, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)

    def key(self, index: int) -> str:
        """Return the key the sample has in its own set."""
        part, inside = self._place(index)
        return part.key(inside)

    def read(self, index: int) -> Sample:
        """Return a sample, as its own set does."""
        part, inside = self._place(index)
        return part.read(inside)
