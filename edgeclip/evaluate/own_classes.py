"""Classes of one's own: what the folders, tables or shards of a set show, under which names.

A label is what the set says of a picture: the folder that it lies in, a column, or a number whose name the
set brings. The name of a class is what a file of names says of its label, else the label; labels of one name
are one class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeclip.errors import ConfigError, InputError
from edgeclip.few_shot import check_names

from .picture_sets import Picture, PictureSet, open_set

__all__ = ["OwnClasses", "read_names"]

_MAX_NAMES_BYTES = 1 << 24
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class OwnClasses:
    """Classes of a set.

    Attributes:
        names: of the classes, in the order in which the set first shows them.
        pictures: the set, or what was drawn of it.
        named: the name of each label.
    """

    names: tuple[str, ...]
    pictures: PictureSet
    named: Mapping[str, str]

    @classmethod
    def of(
        cls,
        data: str,
        renamed: Mapping[str, str],
        *,
        as_words: bool,
        shots: int | None = None,
        seed: int = 0,
        least: int = 2,
    ) -> OwnClasses:
        """Return the classes of a set, before any picture is decoded.

        Args:
            data: folder, table or shards.
            renamed: names of labels.
            as_words: read '_' in other labels as a space.
            shots: pictures of a class at most, drawn at random.
            seed: of the draw.
            least: number of classes.

        Raises:
            InputError: the set cannot be read, a folder has no pictures, there are none of a label that is
                named, or a name cannot be one.
            ConfigError: fewer classes.
        """
        pictures = open_set(data)
        numbers: dict[str, list[int]] = {}
        for number, picture in enumerate(pictures):
            if picture.label is not None:
                numbers.setdefault(_label(pictures, picture.label), []).append(number)
        _check_folders(Path(data), pictures, numbers)
        unknown = next((label for label in renamed if label not in numbers), None)
        if unknown is not None:
            raise InputError(
                f"a name is given for {unknown!r}, but {data!r} has no pictures of it; it has "
                f"{', '.join(map(repr, list(numbers)[:_SHOWN])) or 'none with a label'}."
            )
        named = {
            label: renamed.get(label, label.replace("_", " ").strip() if as_words else label)
            for label in numbers
        }
        names = tuple(dict.fromkeys(named.values()))
        if len(names) < least:
            count = f"{len(names)} class{'es' if len(names) != 1 else ''}"
            found = ", ".join(map(repr, names)) or "no picture has a label"
            raise ConfigError(
                f"{data!r} holds {count} ({found}), expected at least {least}: a folder for each."
            )
        check_names(names)
        if shots is not None:
            random, kept = np.random.default_rng(seed), []
            for name in names:
                own = [number for label in numbers if named[label] == name for number in numbers[label]]
                kept += random.permutation(own)[:shots].tolist()
            pictures = _Drawn(**vars(pictures), numbers=frozenset(kept))
        return cls(names, pictures, named)

    def place(self, picture: Picture) -> int | str:
        """Return the place of a picture's class, or why it has none."""
        if picture.label is None:
            return "has no label; expected a column 'label' or a folder a class."
        return self.names.index(self.named[_label(self.pictures, picture.label)])


@dataclass(frozen=True)
class _Drawn(PictureSet):
    """Some pictures of a set, by their numbers."""

    numbers: frozenset[int] = frozenset()

    def __iter__(self) -> Iterator[Picture]:
        return (picture for number, picture in enumerate(super().__iter__()) if number in self.numbers)


def _label(pictures: PictureSet, said: str) -> str:
    """Return a label; sets of numbered classes bring their names."""
    if not pictures.numbered or pictures.labels is None:
        return said
    names = pictures.labels.names
    return names[int(said)] if said.isdecimal() and int(said) < len(names) else said


def _check_folders(path: Path, pictures: PictureSet, found: Mapping[str, object]) -> None:
    """Refuse folders without a picture: somebody meant them to be classes."""
    if pictures.parts != (path,) or not path.is_dir():
        return
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in found:
            raise InputError(
                f"{str(folder)!r} holds no pictures, expected some of the class {folder.name!r}; "
                "give it some, or remove the folder."
            )


def read_names(path: Path) -> dict[str, str]:
    """Return names by label, from lines ``label=name`` or a JSON object.

    Raises:
        InputError: unreadable, not of one of the two forms, or a label is named twice.
    """
    try:
        if path.stat().st_size > _MAX_NAMES_BYTES:
            raise InputError(f"{str(path)!r}: larger than {_MAX_NAMES_BYTES} bytes, expected names.")
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"{str(path)!r} cannot be read: {reason}.") from error
    if text.lstrip().startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r}: not JSON ({error}).") from error
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        wrong = next((line for line in lines if "=" not in line), None)
        if wrong is not None:
            raise InputError(f"{str(path)!r}: got the line {wrong[:80]!r}, expected 'folder=name'.")
        pairs = [line.split("=", 1) for line in lines]
    names: dict[str, str] = {}
    for label, name in pairs:
        label = label.strip()
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{str(path)!r}: folder {label!r} is named {name!r}, expected a text.")
        if label in names:
            raise InputError(f"{str(path)!r}: folder {label!r} is named twice.")
        names[label] = " ".join(name.split())
    return names
