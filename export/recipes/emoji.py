"""Emoji with their names, from the package ``emojibase-data``, and drawings of them in some styles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeclip.errors import InputError

__all__ = ["Pictogram", "read_pictograms"]

_THINGS = frozenset({3, 4, 5, 6, 7})  # animals and nature, food, travel and places, activities, objects
_FLAGS = frozenset({None, 2, 9})  # regional letters, components, flags


@dataclass(frozen=True)
class Pictogram:
    """An emoji with its names.

    Attributes:
        code: code points in lower case, joined by ``-``.
        english: its name.
        chinese: its name.
        tags: further English words for it.
        chinese_tags: further Chinese words for it.
        group: number of its kind in the list; ``None`` for letters that flags are spelt with.
        files: a drawing in each style.
    """

    code: str
    english: str
    chinese: str
    tags: tuple[str, ...]
    chinese_tags: tuple[str, ...]
    group: int | None
    files: tuple[Path, ...]

    @property
    def is_thing(self) -> bool:
        """Whether it shows a thing or a being, and no face, person, flag or sign."""
        return self.group in _THINGS

    @property
    def is_flag(self) -> bool:
        """Whether it is a flag, or a component that is none by itself."""
        return self.group in _FLAGS


def read_pictograms(emojibase: Path, styles: Sequence[Path]) -> tuple[Pictogram, ...]:
    """Return every emoji without skin tone that all styles draw, in the order of the list.

    Args:
        emojibase: the unpacked package ``emojibase-data``.
        styles: folders with a drawing a code, ``.png`` or ``.webp``.

    Raises:
        InputError: the list cannot be read, or no emoji is in all styles.
    """
    try:
        listed, chinese = (
            json.loads((emojibase / language / "data.json").read_text("utf-8")) for language in ("en", "zh")
        )
        named = {entry["hexcode"]: entry for entry in chinese}
        drawn = [_by_code(folder) for folder in styles]
        found = []
        for entry in listed:
            code = str(entry["hexcode"]).lower()
            other, files = named.get(entry["hexcode"]), [style.get(_bare(code)) for style in drawn]
            if other is None or None in files:
                continue
            found.append(
                Pictogram(
                    code,
                    entry["label"],
                    other["label"],
                    tuple(entry.get("tags", ())),
                    tuple(other.get("tags", ())),
                    entry.get("group"),
                    tuple(file for file in files if file is not None),
                )
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"pictograms: cannot read {str(emojibase)!r} ({error}); run `edgeclip data fetch pictograms`."
        ) from error
    if not found:
        raise InputError(
            f"pictograms: none of {len(listed)} emoji is drawn in all of "
            f"{[str(folder) for folder in styles]}; run `edgeclip data fetch pictograms`."
        )
    return tuple(found)


def _by_code(folder: Path) -> dict[str, Path]:
    return {_bare(path.stem): path for path in sorted(folder.glob("*")) if path.suffix in (".png", ".webp")}


def _bare(code: str) -> str:
    """Return a code without variation selectors: sets differ in whether they write them."""
    return "-".join(part for part in code.split("-") if part != "fe0f")
