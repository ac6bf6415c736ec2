"""Find pictures in folders, lists, tables and WebDataset shards, in an order that repeats.

Everything becomes a stream of :class:`Sample`. Nothing is decoded here, and no more than one sample of a
shard is held in memory. Pictures that are missing or broken are yielded like the others: whoever decodes
them says so and goes on. A folder, table or shard that cannot be read is an error, because an unknown number
of pictures would be left out in silence.

    >>> from edgeclip.data import read_samples
    >>> [sample.key for sample in read_samples(["photos/"])]      # doctest: +SKIP
    ['photos/cat.jpg', 'photos/dog.jpg']
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from edgeclip.errors import InputError

__all__ = ["PICTURE_SUFFIXES", "Sample", "captions_of", "read_path_list", "read_samples", "texts_of"]

# The formats `preprocess.decode_image` reads, under the names files of them have.
PICTURE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm"}
    | {".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
_TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_SHARD_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
# The first name that a table has is taken; as img2dataset, open_clip and Hugging Face call them.
_IMAGE_COLUMNS = ("image", "path", "file", "filename", "file_name", "filepath", "image_path", "img")
_CAPTION_COLUMNS = ("caption", "text", "title")
_CAPTION_KIND = re.compile(r"captions?_([A-Za-z0-9_-]+)")
_LABEL_COLUMNS = ("label", "class", "cls", "category")
# WebDataset: the key is everything up to the first dot of the last part of the name.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_DESCRIBING = ("txt", "cls", "json", "syn.json")
_MAX_MEMBER_BYTES = 1 << 28
_MAX_LINE = 1 << 24  # characters of a JSON object
_LIST_BLOCK_BYTES = 1 << 16

Skipped = Callable[[Path, str], None]


@dataclass(frozen=True)
class Sample:
    """One picture and what is known about it.

    Attributes:
        key: where it came from, the same on every run: the path as given or found, ``<shard>/<member>``.
        source: its path, or its encoded bytes.
        caption: a sentence about it.
        label: the name of its class.
        columns: the row of a table by column, or what a shard says: its ``.json``, and its ``.txt`` as
            ``caption``; :func:`captions_of` reads it. Not compared.
    """

    key: str
    source: Path | bytes
    caption: str | None = None
    label: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_samples(
    paths: Iterable[str | os.PathLike[str]],
    *,
    missing: Literal["raise", "yield"] = "raise",
    folder_labels: bool = False,
    image_column: str | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Sample]:
    """Yield the pictures of files, folders, tables and shards, in the order given.

    A folder gives the files below it that have a picture's suffix, in either case, sorted by path part by
    part; what is hidden (a leading dot) is left out, links are followed, no folder is read twice. ``.csv``,
    ``.tsv`` and ``.jsonl`` are tables whose relative paths start at the table's folder. ``.tar`` (also
    ``.gz``, ``.bz2``, ``.xz``) are WebDataset shards: captions come from ``.txt``, labels from ``.cls``,
    both from ``.json``. Any other file is taken for a picture, whatever its name.

    Args:
        paths: what to read. All are looked for before the first is read.
        missing: ``"yield"`` leaves a path that is not there to whoever opens it.
        folder_labels: label pictures of a folder by the folder directly below it that they are in.
        image_column: the column or key of a table that holds the path; by default the first usual name.
        skipped: called with a folder below the given ones that cannot be listed, and the reason; without it
            that is an error.

    Raises:
        InputError: a path is not there, a folder cannot be listed, a table or shard cannot be read.
    """
    found = [Path(path) for path in paths]
    if missing == "raise":
        for path in found:
            if not _exists(path):
                raise InputError(f"{str(path)!r}: no such file or folder. Check the path.")
    return _read(found, folder_labels, image_column, skipped)


def read_path_list(source: str | os.PathLike[str] | IO[bytes]) -> Iterator[Path]:
    r"""Yield the paths of a list: one a line, or separated by null bytes as ``find -print0`` writes them.

    Streams: a path is yielded as soon as it is complete, so a slow writer on a pipe can be followed.

    Args:
        source: a file, or a stream of bytes (standard input). Empty entries and a ``\r`` at the end of a line
            are left out.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            with Path(source).open("rb") as stream:
                yield from _split(stream)
        except OSError as error:
            raise InputError(
                f"list of paths {str(source)!r} cannot be read ({error.strerror or error}). Check the path."
            ) from error
    else:
        yield from _split(source)


def _split(stream: IO[bytes]) -> Iterator[Path]:
    # read1 returns what is there; read waits for a whole block.
    read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
    separator, rest = b"", b""
    while block := read(_LIST_BLOCK_BYTES):
        # A name may hold a line feed, never a null byte; a list with null bytes shows one in its first block.
        separator = separator or (b"\0" if b"\0" in block else b"\n")
        *entries, rest = (rest + block).split(separator)
        yield from _paths(entries, separator)
    yield from _paths([rest], separator)


def _paths(entries: Iterable[bytes], separator: bytes) -> Iterator[Path]:
    for entry in entries:
        name = entry.removesuffix(b"\r") if separator == b"\n" else entry
        if name:
            yield Path(os.fsdecode(name))


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name too long for the system, a null byte
        return False


def _read(
    paths: Iterable[Path], folder_labels: bool, image_column: str | None, skipped: Skipped | None
) -> Iterator[Sample]:
    for path in paths:
        name = path.name.lower()
        if _is_folder(path):
            yield from _read_folder(path, folder_labels, skipped)
        elif path.suffix.lower() in _TABLE_DELIMITERS:
            yield from _read_rows(path, _table_rows(path), image_column)
        elif name.endswith(_LINES_SUFFIXES):
            yield from _read_rows(path, _json_rows(path), image_column)
        elif name.endswith(_SHARD_SUFFIXES):
            yield from _read_shard(path)
        else:
            yield Sample(path.as_posix(), path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _read_folder(root: Path, folder_labels: bool, skipped: Skipped | None) -> Iterator[Sample]:
    for path in _pictures(root, skipped):
        parts = path.relative_to(root).parts
        label = parts[0] if folder_labels and len(parts) > 1 else None
        yield Sample(path.as_posix(), path, label=label)


def _pictures(root: Path, skipped: Skipped | None) -> Iterator[Path]:
    """Yield the picture files below a folder, depth first, names in code point order."""
    visited: set[tuple[int, int]] = set()
    pending = [(root, True)]
    while pending:
        path, is_folder = pending.pop()
        if not is_folder:
            yield path
            continue
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in visited:  # a link back, or a second link
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as listing:
                entries = sorted((entry.name, _kind(entry)) for entry in listing)
        except OSError as error:
            reason = error.strerror or str(error)
            if skipped is None or path == root:
                raise InputError(
                    f"folder {str(path)!r} cannot be listed ({reason}). Check its rights, or leave it out."
                ) from error
            skipped(path, reason)
            continue
        # The last one pushed is the first one read.
        pending.extend((path / name, kind == "folder") for name, kind in reversed(entries) if kind)


def _kind(entry: os.DirEntry[str]) -> Literal["folder", "picture", ""]:
    """Tell folders and pictures from everything else: what is hidden, of another kind, a pipe or device."""
    if entry.name.startswith("."):
        return ""
    picture = PurePosixPath(entry.name).suffix.lower() in PICTURE_SUFFIXES
    try:
        if entry.is_dir():
            return "folder"
        if picture and (entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())):
            return "picture"  # a broken link to a picture is said where it is opened
    except OSError:  # a link to itself
        return "picture" if picture else ""
    return ""


def _read_rows(
    table: Path, rows: Iterator[tuple[int, Mapping[str, Any]]], image_column: str | None
) -> Iterator[Sample]:
    for number, row in rows:
        name = _value(row, (image_column,) if image_column else _IMAGE_COLUMNS)
        if name is None:
            expected = repr(image_column) if image_column else ", ".join(map(repr, _IMAGE_COLUMNS))
            raise InputError(
                f"table {str(table)!r}, line {number}: has no picture among {', '.join(map(repr, row))}; "
                f"expected a path under {expected}."
            )
        yield Sample(
            key=name,
            source=table.parent / name,
            caption=_value(row, _CAPTION_COLUMNS),
            label=_value(row, _LABEL_COLUMNS),
            columns=row,
        )


def _value(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


def _table_rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import csv

    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=_TABLE_DELIMITERS[table.suffix.lower()])
            for row in reader:
                row.pop(None, None)  # cells past the header
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(table, error) from error


def _json_rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import json

    number = 0
    try:
        with table.open(encoding="utf-8-sig") as stream:
            while line := stream.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise InputError(
                        f"table {str(table)!r}, line {number}: is too long, expected a JSON object of at "
                        f"most {_MAX_LINE} characters."
                    )
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(
                        f"table {str(table)!r}, line {number}: expected a JSON object, got {row!r:.80}."
                    )
                yield number, row
    except InputError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(table, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"table {str(table)!r}, line {number}: is not JSON ({error}).") from error


def _unreadable(table: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(
        f"table {str(table)!r} cannot be read ({reason}): expected UTF-8 text with one row a line."
    )


def _read_shard(shard: Path) -> Iterator[Sample]:
    """Yield the samples of a WebDataset shard: consecutive members of one key, the first picture of each."""
    key, fields = "", dict[str, tuple[str, bytes]]()
    for name, suffix, content in _shard_members(shard):
        if name != key:
            yield from _shard_sample(shard, fields)
            key, fields = name, {}
        fields.setdefault(suffix, (f"{name}.{suffix}", content))
    yield from _shard_sample(shard, fields)


def _shard_members(shard: Path) -> Iterator[tuple[str, str, bytes]]:
    from edgeclip.archives import iter_members

    for name, size, read in iter_members(shard):
        match = _MEMBER.fullmatch(name.removeprefix("./"))
        if match is None or PurePosixPath(name).name.startswith((".", "__")):
            continue
        suffix = match[2].lower()
        if f".{suffix}" not in PICTURE_SUFFIXES and suffix not in _DESCRIBING:
            continue
        if size > _MAX_MEMBER_BYTES:
            raise InputError(
                f"shard {str(shard)!r}: member {name!r} has {size} bytes, "
                f"expected at most {_MAX_MEMBER_BYTES}."
            )
        yield match[1], suffix, read()


def _shard_sample(shard: Path, fields: Mapping[str, tuple[str, bytes]]) -> Iterator[Sample]:
    picture = next((field for suffix, field in fields.items() if f".{suffix}" in PICTURE_SUFFIXES), None)
    if picture is None:
        return
    described: dict[str, Any] = {}
    for suffix in ("json", "syn.json"):
        if suffix in fields:
            described.update(_described(fields[suffix][1]))
    text = _text(fields, "txt")
    yield Sample(
        key=f"{shard.as_posix()}/{picture[0]}",
        source=picture[1],
        caption=text or _value(described, _CAPTION_COLUMNS),
        label=_text(fields, "cls") or _value(described, _LABEL_COLUMNS),
        columns={**described, "caption": text} if text else described,
    )


def _text(fields: Mapping[str, tuple[str, bytes]], suffix: str) -> str | None:
    content = fields.get(suffix, ("", b""))[1]
    return content.decode("utf-8", "replace").strip() or None


def _described(content: bytes) -> Mapping[str, Any]:
    """Return a member's JSON object; what is none describes nothing."""
    import json

    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# -- captions -----------------------------------------------------------------------------------------------


def captions_of(columns: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the captions in a row of a table or a JSON object, by kind; no kind without texts.

    ``caption``, ``text`` or ``title`` is of the kind ``alt``, ``caption_KIND`` of the kind ``KIND``,
    ``rewrite`` or ``rewrites`` of ``rewrite``; ``syn_text`` and ``syn_text_TAG`` are ``synthetic`` and
    ``synthetic_TAG``; ``captions`` holds a list (``alt``) or an object of kinds. A value is a text or a list
    of texts.
    """
    found: dict[str, tuple[str, ...]] = {}

    def add(kind: str, value: Any) -> None:
        if texts := texts_of(value):
            kind = kind.encode("utf-8", "replace").decode()
            found[kind] = found.get(kind, ()) + texts

    for name in _CAPTION_COLUMNS:
        if texts := texts_of(columns.get(name)):
            found["alt"] = texts
            break
    for name, value in columns.items():
        if name == "captions":
            for kind, texts in (value if isinstance(value, Mapping) else {"alt": value}).items():
                add(str(kind), texts)
        elif name in ("rewrite", "rewrites"):
            add("rewrite", value)
        elif name == "syn_text":
            add("synthetic", value)
        elif name.startswith("syn_text_"):
            add("synthetic" + name.removeprefix("syn_text"), value)
        elif match := _CAPTION_KIND.fullmatch(name):
            add(match[1], value)
    return found


def texts_of(value: Any) -> tuple[str, ...]:
    """Return the texts of a value, stripped; what is empty or no text is left out."""
    values = value if isinstance(value, (list, tuple)) else [value]
    # JSON can spell half a surrogate pair, which is no text and cannot be written again.
    stripped = [text.strip().encode("utf-8", "replace").decode() for text in values if isinstance(text, str)]
    return tuple(text for text in stripped if text)
