"""The noun half of WordNet 3.0, read from its database files (``wndb(5WN)``): names, ancestors, glosses.

Knows nothing of pictures or models. ImageNet's class ids are the offsets of these synsets (``n02084071`` is
2084071).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgeclip.errors import InputError

__all__ = ["PHYSICAL_ENTITY", "Synset", "WordNet", "read_wordnet"]

PHYSICAL_ENTITY = 1930
_EXAMPLE = re.compile(r'[;:]?\s*".*$')


@dataclass(frozen=True)
class Synset:
    """One meaning: its names (most common first), its gloss without examples, and its parents by offset."""

    offset: int
    lemmas: tuple[str, ...]
    gloss: str
    parents: tuple[int, ...]
    lexical_file: int
    counts: tuple[int, ...]
    """How often each lemma was tagged with this meaning in WordNet's corpora."""
    instance: bool = False
    """Whether it names one individual (a person, a river), not a kind."""


class WordNet:
    """Synsets by offset, with the relations the recipe needs."""

    def __init__(self, synsets: dict[int, Synset], senses: dict[str, tuple[int, ...]]) -> None:
        self.synsets = synsets
        self.senses = senses
        """Offsets of each lower-case name (spaces, not underscores), the most common meaning first."""

    @cached_property
    def children(self) -> dict[int, tuple[int, ...]]:
        """Offsets of the direct children of each synset."""
        found: dict[int, list[int]] = defaultdict(list)
        for synset in self.synsets.values():
            for parent in synset.parents:
                found[parent].append(synset.offset)
        return {offset: tuple(sorted(kids)) for offset, kids in found.items()}

    @cached_property
    def depth(self) -> dict[int, int]:
        """Length of the longest path from the root, the root itself being 1."""
        depth: dict[int, int] = {}

        def visit(offset: int) -> int:
            if offset not in depth:
                parents = self.synsets[offset].parents
                depth[offset] = 1 + max((visit(parent) for parent in parents), default=0)
            return depth[offset]

        for offset in self.synsets:
            visit(offset)
        return depth

    def ancestors(self, offset: int) -> frozenset[int]:
        """Return the synset itself and everything above it."""
        found = {offset}
        stack = [offset]
        while stack:
            for parent in self.synsets[stack.pop()].parents:
                if parent not in found:
                    found.add(parent)
                    stack.append(parent)
        return frozenset(found)

    def below(self, roots: Iterable[int]) -> set[int]:
        """Return the given synsets and everything below them."""
        found = set(roots)
        stack = list(found)
        while stack:
            for child in self.children.get(stack.pop(), ()):
                if child not in found:
                    found.add(child)
                    stack.append(child)
        return found

    def base_form(self, word: str) -> str | None:
        """Return a name WordNet knows: the word itself, else its singular by the usual endings, else None."""
        word = word.lower()
        if word in self.senses:
            return word
        for ending, replacement in (("ies", "y"), ("ves", "f"), ("men", "man"), ("es", ""), ("s", "")):
            if word.endswith(ending):
                base = word[: -len(ending)] + replacement
                if base in self.senses:
                    return base
        return None


def read_wordnet(directory: Path) -> WordNet:
    """Read ``data.noun``, ``index.noun`` and ``cntlist.rev`` from WordNet's ``dict`` directory.

    Raises:
        InputError: a file is missing or not in the WordNet format.
    """
    try:
        counts = _read_counts(directory / "cntlist.rev")
        synsets: dict[int, Synset] = {}
        for line in (directory / "data.noun").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                synset = _parse_synset(line, counts)
                synsets[synset.offset] = synset
        senses: dict[str, tuple[int, ...]] = {}
        for line in (directory / "index.noun").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                fields = line.split()
                offsets = fields[-int(fields[2]) :]
                senses[fields[0].replace("_", " ")] = tuple(int(offset) for offset in offsets)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"WordNet: cannot read {str(directory)!r} ({error}). Expected the database files of WordNet 3.0 "
            "(Debian package wordnet-base, usr/share/wordnet)."
        ) from error
    return WordNet(synsets, senses)


def _read_counts(path: Path) -> dict[tuple[str, int, int], int]:
    """Return tag counts by (lemma, lexical file, lexical id)."""
    counts: dict[tuple[str, int, int], int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, count = line.split()[:3]
        lemma, _, rest = key.partition("%")
        fields = rest.split(":")
        if fields[0] == "1":
            counts[lemma, int(fields[1]), int(fields[2])] = int(count)
    return counts


def _parse_synset(line: str, counts: dict[tuple[str, int, int], int]) -> Synset:
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    lexical_file = int(fields[1])
    words = int(fields[3], 16)
    lemmas, tagged = [], []
    for index in range(words):
        lemma, lexical_id = fields[4 + 2 * index], int(fields[5 + 2 * index], 16)
        lemmas.append(lemma.replace("_", " "))
        tagged.append(counts.get((lemma.lower(), lexical_file, lexical_id), 0))
    start = 4 + 2 * words
    pointers = int(fields[start])
    parents = [
        int(fields[start + 2 + 4 * index])
        for index in range(pointers)
        if fields[start + 1 + 4 * index] in ("@", "@i")
    ]
    return Synset(
        int(fields[0]),
        tuple(lemmas),
        _EXAMPLE.sub("", gloss).strip(),
        tuple(parents),
        lexical_file,
        tuple(tagged),
        instance="@i" in fields[start + 1 :: 4],
    )
