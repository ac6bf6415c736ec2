"""What is put around captions while training: templates, words in front, and a token that goes missing.

None of it changes what a caption says, so a stored target stays the same and the tower learns to look through
the prompt. Which prompt a caption gets is drawn from the stream of its sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeclip.distill.batches import Caption
from edgeclip.distill.recipe import PromptSpec
from edgeclip.errors import ConfigError
from edgeclip.label_sets import TEMPLATES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.tokenizer import Tokenizer

__all__ = ["Prompted", "Prompts", "Writer", "open_prompts"]

_SLOT = "{}"
_LEAST_TOKENS = 3  # of a text that may lose one
_MAX_REMEMBERED = 1 << 18  # texts, of some 200 bytes


@dataclass(frozen=True)
class Prompted:
    """A caption in its prompt.

    Attributes:
        before: what stands in front of it.
        text: the caption.
        after: what stands behind it.
        drop: which of its tokens the student does not see, as a share of their number; ``None``: it sees all.
    """

    before: str
    text: str
    after: str
    drop: float | None = None

    @property
    def whole(self) -> str:
        """All of it."""
        return self.before + self.text + self.after


class Writer:
    """Writes prompted captions as ids, and remembers those of captions: texts come back in every epoch.

    Args:
        tokenizer: the student's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.config.special
        self._start = [] if special.start is None else [special.start]
        self._end = [] if special.end is None else [special.end]
        self._room = tokenizer.context_length - len(self._start) - len(self._end)
        self._ids: dict[str, list[int]] = {}
        self._apart: dict[tuple[str, str], bool] = {}

    def __call__(self, prompted: Prompted) -> NDArray[np.int32]:
        """Return the ids ``(L,)`` int32 that the student reads, cut where they are too many."""
        before, text, after = prompted.before, prompted.text, prompted.after
        if prompted.drop is None and not self._stands_apart(before, text, after):
            ids = self._tokenizer.encode(prompted.whole)
        else:
            ids = self._encoded(text)
            if prompted.drop is not None and len(ids) >= _LEAST_TOKENS:
                lost = int(prompted.drop * len(ids))
                ids = ids[:lost] + ids[lost + 1 :]
            if before or after:
                ids = self._encoded(before) + ids + self._encoded(after)
        ids = self._start + ids[: self._room] + self._end
        row = np.full(self._tokenizer.context_length, self._tokenizer.config.special.pad, np.int32)
        row[: len(ids)] = ids
        return row

    def _encoded(self, text: str) -> list[int]:
        ids = self._ids.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text)
            if len(self._ids) < _MAX_REMEMBERED:
                self._ids[text] = ids
        return ids

    def _stands_apart(self, before: str, text: str, after: str) -> bool:
        """Return whether a caption is cut into the same words inside a prompt as alone.

        Words are cut between kinds of characters, so that a letter, a digit and a Chinese character tell for
        all captions that begin and end with one of these.
        """
        if not before and not after:
            return True
        if not (text[:1].isalnum() and text[-1:].isalnum()):
            return False
        apart = self._apart.get((before, after))
        if apart is None:
            split = self._tokenizer.split
            apart = all(
                split(before + probe + after) == [*split(before), *split(probe), *split(after)]
                for probe in ("a", "7", "狗")
            )
            self._apart[before, after] = apart
        return apart


@dataclass(frozen=True)
class _Kind:
    spec: PromptSpec
    templates: tuple[tuple[str, str], ...]  # what stands before and after the slot


@dataclass(frozen=True)
class Prompts:
    """The prompts of a table of data, by kind of caption."""

    kinds: Mapping[str, _Kind]

    def draw(self, caption: Caption, rng: np.random.Generator) -> Prompted:
        """Return a caption in a prompt; a kind without prompts stays as it is."""
        kind = self.kinds.get(caption.kind)
        if kind is None:
            return Prompted("", caption.text, "")
        spec = kind.spec
        bare, worded, dropped, template, word, drop = rng.random(6).tolist()
        before = after = ""
        if kind.templates and bare >= spec.bare:
            before, after = kind.templates[int(template * len(kind.templates))]
        if worded < spec.before_share:
            before += spec.before[int(word * len(spec.before))] + " "
        return Prompted(before, caption.text, after, drop if dropped < spec.drop else None)


def open_prompts(said: Mapping[str, PromptSpec], root: Path, *, where: str) -> Prompts | None:
    """Return the prompts of a table of data; ``None`` where it has none.

    Args:
        said: by kind of caption.
        root: what paths are relative to.
        where: names the data in errors.

    Raises:
        ConfigError: a file of templates cannot be read or is empty, a name is unknown, or a template has no
            ``{}``.
    """
    if not said:
        return None
    return Prompts(
        {
            kind: _Kind(spec, tuple(_templates(spec, root, f"{where}: prompts.{kind}")))
            for kind, spec in said.items()
        }
    )


def _templates(spec: PromptSpec, root: Path, where: str) -> list[tuple[str, str]]:
    found: list[str] = []
    for entry in spec.templates:
        if _SLOT in entry:
            found.append(entry)
        elif entry in TEMPLATES:
            found += TEMPLATES[entry]
        elif entry.endswith(".txt"):
            found += _lines(root / entry, where)
        else:
            raise ConfigError(
                f"{where}: {entry!r} is no template, as it has no {_SLOT}, no .txt file, and none of ours: "
                f"{', '.join(TEMPLATES)}."
            )
    for template in found:
        if template.count(_SLOT) != 1:
            raise ConfigError(
                f"{where}: the template {template[:60]!r} has {template.count(_SLOT)} places {_SLOT}, "
                "expected one."
            )
    return [(before, after) for before, _, after in (template.partition(_SLOT) for template in found)]


def _lines(path: Path, where: str) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {str(path)!r} cannot be read ({error}).") from error
    if not lines:
        raise ConfigError(f"{where}: {str(path)!r} holds no line, expected a template with {_SLOT} in each.")
    return lines
