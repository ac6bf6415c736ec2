"""Which general names are kinds of which: poodle of dog, dog of mammal; by WordNet, in English and Chinese.

A name is taken for the meaning of it, or of its last words, that names a thing or being and is most common,
of a person last. The id of an ImageNet class is a synset: that is what its name means, and the most common
meaning as well if both are things of one sort (a castle is a fortress and a building, but a beaver no fur).
What stands above in WordNet is what it is a kind of, under the names whose first or second such meaning that
is, as far as WordNet's corpora use them so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from .wordnet import PHYSICAL_ENTITY, WordNet

__all__ = ["kinds_of_names"]

_LEAST_DEPTH = 5  # above lie "object", "whole" and the like
_MOST_SHARE = 0.4  # of all names: what covers more says nothing
_SENSES = 2
_PERSON = 18  # a tiger is an animal before it is a fierce person
_SHOWN_OTHERWISE = frozenset({"tea cup", "plate"})  # by their ids a drink and a dish; pictures show tableware
_ASIDE = re.compile(r"\(.*?\)")


def kinds_of_names(
    names: Sequence[str],
    wordnet: WordNet,
    chinese: Mapping[str, Sequence[str]],
    known: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return for each word above some of the names, in lower case, the places of its kinds, rising.

    Args:
        names: English names.
        wordnet: where they stand.
        chinese: Chinese names of English ones, which have the same kinds.
        known: synsets of ImageNet's classes by their names.
    """
    below: dict[str, set[int]] = defaultdict(set)
    for place, name in enumerate(names):
        meant = _meanings(name, wordnet, None if known is None else known.get(name))
        for above in frozenset().union(*map(wordnet.ancestors, meant)):
            if wordnet.depth[above] < _LEAST_DEPTH:
                continue
            synset = wordnet.synsets[above]
            for lemma, count in zip(synset.lemmas, synset.counts, strict=True):
                word = lemma.replace("_", " ").casefold()
                if count and above in _things(word, wordnet)[:_SENSES]:
                    below[word].add(place)
    most = _MOST_SHARE * len(names)
    found = {word: tuple(sorted(places)) for word, places in below.items() if len(places) <= most}
    kinds = {word: places for word, places in found.items() if not _is_itself(word, places, names)}
    for word, places in list(kinds.items()):
        for name in chinese.get(word, ()):
            kinds.setdefault(name, places)
    return kinds


def _meanings(name: str, wordnet: WordNet, known: int | None) -> set[int]:
    common = _meaning(name, wordnet)
    if known is None or name in _SHOWN_OTHERWISE:
        return set() if common is None else {common}
    sort = wordnet.synsets[known].lexical_file
    return {known, common} if common is not None and wordnet.synsets[common].lexical_file == sort else {known}


def _meaning(name: str, wordnet: WordNet) -> int | None:
    """Return the synset of a name, or of as many of its last words as WordNet knows."""
    words = _ASIDE.sub(" ", name).casefold().split()
    for first in range(len(words)):
        known = wordnet.base_form(" ".join(words[first:]))
        if known is not None:
            things = _things(known, wordnet)
            others = [each for each in things if wordnet.synsets[each].lexical_file != _PERSON]
            return next(iter(others or things), None)
    return None


def _things(word: str, wordnet: WordNet) -> list[int]:
    """Return the meanings of a word that are things or beings, the most common first."""
    return [offset for offset in wordnet.senses.get(word, ()) if PHYSICAL_ENTITY in wordnet.ancestors(offset)]


def _is_itself(word: str, places: Sequence[int], names: Sequence[str]) -> bool:
    """Return whether the only kind of a word is the name that it is: equal names are left out anyway."""
    return len(places) == 1 and names[places[0]].casefold() == word
