"""What is evaluated on: pictures with labels or captions, read from every usual form, and read again.

* A folder with a folder a class: labels are their names. Captions stand beside a picture, in a ``.txt`` of
  its name, one a line.
* ``.csv``, ``.tsv`` and ``.jsonl`` tables, with the columns of :mod:`edgeclip.data`.
* ``.tar``, or a folder with such directly in it: WebDataset shards with ``.cls``, ``.txt`` and ``.json``.
* A folder with ``nshards.txt`` or ``test/nshards.txt``: the form of ``clip_benchmark``. Shards are ``0.tar``,
  ``1.tar`` …; a ``.cls`` is the number of a line of ``classnames.txt``; prompts are in
  ``zeroshot_classification_templates.txt``, around ``{c}``. Where ``dataset_type.txt`` says ``retrieval``,
  each line of a ``.txt`` is a caption.

Nothing is decoded here. A set is a stream that can be run again, not a list: shards may be larger than
memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgeclip.data import Sample, captions_of, read_samples
from edgeclip.errors import InputError
from edgeclip.label_sets import Label, LabelSet, Templates

__all__ = ["Picture", "PictureSet", "open_set"]

_SHARD_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_SHARDS, _NAMES, _TYPE = "nshards.txt", "classnames.txt", "dataset_type.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_MAX_TEXT_BYTES = 1 << 24


@dataclass(frozen=True)
class Picture:
    """A picture and what is said about it.

    Attributes:
        key: where it is inside its set, the same wherever the set lies.
        source: its path, or its encoded bytes.
        label: its label as the set says it: a name or a number.
        captions: texts by kind.
    """

    key: str
    source: Path | bytes = field(repr=False)
    label: str | None = None
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureSet:
    """Pictures that can be run through again and again, in the same order. Made by :func:`open_set`.

    Attributes:
        path: as it was given.
        parts: files and folders, in order.
        root: what keys are relative to.
        task: what the set says it is for; ``None`` where it does not say.
        labels: what it brings to be offered, in the order of their numbers; names may repeat.
        templates: prompts it brings.
        numbered: whether its labels are numbers of ``labels``.
        lines: whether each line of a text is a caption.
    """

    path: str
    parts: tuple[Path, ...]
    root: Path
    task: Literal["zero-shot", "retrieval"] | None = None
    labels: LabelSet | None = None
    templates: Templates | None = None
    numbered: bool = False
    lines: bool = False

    def __iter__(self) -> Iterator[Picture]:
        """Yield the pictures.

        Raises:
            InputError: a folder, table or shard cannot be read.
        """
        root = self.root.as_posix().rstrip("/") + "/"
        for sample in read_samples(self.parts, folder_labels=True):
            key = sample.key.removeprefix(root)
            yield Picture(key, sample.source, sample.label, self._captions(sample))

    def _captions(self, sample: Sample) -> dict[str, tuple[str, ...]]:
        found = captions_of(sample.columns)
        if self.lines:
            alt = (line.strip() for text in found.get("alt", ()) for line in text.splitlines())
            found["alt"] = tuple(line for line in alt if line)
        elif not sample.columns and isinstance(sample.source, Path):
            beside = sample.source.with_suffix(".txt")
            if beside.is_file():
                said = (line.strip() for line in _read_text(beside).splitlines())
                found["alt"] = tuple(line for line in said if line)
        return {kind: texts for kind, texts in found.items() if texts}


def open_set(path: str | os.PathLike[str]) -> PictureSet:
    """Return the pictures of a folder, table, shard or ``clip_benchmark`` set; nothing of them is read yet.

    Raises:
        InputError: the path is not there, or the files of a ``clip_benchmark`` set do not fit together.
    """
    given = Path(path)
    if not given.exists():
        raise InputError(f"{str(given)!r}: no such file or folder. Check the path of the pictures.")
    if not given.is_dir():
        return PictureSet(str(path), (given,), given.parent)
    if (given / _SHARDS).is_file():
        return _clip_benchmark(path, given, given if (given / _NAMES).is_file() else given.parent)
    splits = sorted(found.parent.name for found in given.glob(f"*/{_SHARDS}"))
    if "test" in splits:
        return _clip_benchmark(path, given / "test", given)
    if splits:
        raise InputError(
            f"{str(given)!r} holds the splits {', '.join(splits)}, expected 'test'; name one of them, such "
            f"as {str(given / splits[0])!r}."
        )
    shards = sorted(
        entry
        for entry in given.iterdir()
        if entry.name.lower().endswith(_SHARD_SUFFIXES) and not entry.name.startswith(".")
    )
    return PictureSet(str(path), tuple(shards) or (given,), given)


def _clip_benchmark(path: str | os.PathLike[str], split: Path, root: Path) -> PictureSet:
    said = _read_text(split / _SHARDS).strip()
    if re.fullmatch(r"0*[1-9][0-9]{0,5}", said) is None:
        raise InputError(f"{str(split / _SHARDS)!r}: got {said[:40]!r}, expected the number of shards.")
    shards = tuple(split / f"{number}.tar" for number in range(int(said)))
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise InputError(
            f"{str(split)!r}: {missing.name!r} is missing, but {_SHARDS} says that there are {said} shards. "
            "Download it again."
        )
    kind = _read_text(root / _TYPE).strip().lower() if (root / _TYPE).is_file() else "classification"
    if kind not in ("retrieval", "classification"):
        raise InputError(
            f"{str(root / _TYPE)!r} says {kind[:40]!r}, expected 'retrieval' or 'classification'; "
            "other tasks cannot be evaluated."
        )
    labels = _class_names(root / _NAMES) if (root / _NAMES).is_file() else None
    if kind == "classification" and labels is None:
        raise InputError(f"{str(root)!r}: {_NAMES!r} is missing; it says what the numbers in .cls mean.")
    return PictureSet(
        str(path),
        shards,
        split,
        task="retrieval" if kind == "retrieval" else "zero-shot",
        labels=labels,
        templates=_templates(root / _TEMPLATES) if (root / _TEMPLATES).is_file() else None,
        numbered=labels is not None,
        lines=kind == "retrieval",
    )


def _class_names(path: Path) -> LabelSet:
    """Return the names as they stand: published lists repeat some, and numbers count them all."""
    lines = [" ".join(line.split()) for line in _read_text(path).rstrip("\n").split("\n")]
    empty = next((number for number, line in enumerate(lines, start=1) if not line), None)
    if empty is not None:
        raise InputError(f"{str(path)!r}, line {empty}: is empty, expected the name of class {empty - 1}.")
    for line in lines:
        LabelSet.of([line])  # length and control characters
    return LabelSet(tuple(Label(line) for line in lines))


def _templates(path: Path) -> Templates:
    lines = [line.strip().replace("{c}", "{}") for line in _read_text(path).splitlines()]
    return Templates.of([line for line in lines if line])


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror or error}).") from error
    if len(content) > _MAX_TEXT_BYTES:
        raise InputError(f"{str(path)!r}: expected at most {_MAX_TEXT_BYTES} bytes of text.")
    return content.decode("utf-8-sig", "replace")
