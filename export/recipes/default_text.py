"""What the default model's text tower learns from: texts with target embeddings.

Every *entry* is a text with the embedding it should have (``default_space.py``) and a weight that says how
often it is drawn. Training puts entries into prompt templates; the target does not depend on the template, so
the tower learns to look through it. Chinese comes from MIT-licensed lists, the 1,000 class names and the
names of emoji, and for ``default-zh`` from CC-CEDICT too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import InputError

from .default_pictograms import PictogramNames
from .default_space import ClassNames, Concepts, Floats, Space, unit
from .emoji import Pictogram
from .minilm import MiniLM

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "Entries",
    "SentenceCache",
    "build_entries",
    "read_chinese",
]

_log = logging.getLogger(__name__)

CHINESE = Path(__file__).with_name("default_chinese.toml")
# How often a name is drawn, where a rare noun is drawn once.
_CLASS = 12.0
_EVERYDAY = 15.0
_EVERYDAY_CHINESE = 12.0
_EMOJI = 10.0
_MOST_DRAWINGS = 100
_LATER_NAME = 0.5  # of a Chinese name that is not the usual one, against the usual one


class SentenceCache:
    """Sentence vectors kept in a directory: the teacher takes ten minutes for all of them.

    Every call that meets new texts adds a pair of files, ``sentences-<hash>.npy`` and the texts of its
    rows, ``sentences-<hash>.json``, which is written last.

    Raises:
        InputError: a pair cannot be read.
    """

    def __init__(self, directory: Path, teacher: Callable[[], MiniLM]) -> None:
        self._directory = directory
        self._make_teacher = teacher
        self._teacher: MiniLM | None = None
        self._vectors = np.empty((0, 0), np.float16)
        self._rows: dict[str, int] = {}
        for path in sorted(directory.glob("sentences-*.json")):
            self._read(path)

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return unit vectors ``(n, 384)`` of texts."""
        new = sorted({text for text in texts if text not in self._rows})
        if new:
            self._teacher = self._teacher or self._make_teacher()
            _log.info("running the teacher on %d texts", len(new))
            vectors = self._teacher.encode(new).astype(np.float16)
            self._directory.mkdir(parents=True, exist_ok=True)
            key = hashlib.sha256("\0".join(new).encode()).hexdigest()[:16]
            path = self._directory / f"sentences-{key}.json"
            np.save(path.with_suffix(".npy"), vectors)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(new, ensure_ascii=False), encoding="utf-8")
            unfinished.replace(path)
            self._add(new, vectors)
        return unit(np.asarray(self._vectors[[self._rows[text] for text in texts]], np.float32))

    def _read(self, path: Path) -> None:
        try:
            self._add(json.loads(path.read_text("utf-8")), np.load(path.with_suffix(".npy")))
        except (OSError, ValueError) as error:
            raise InputError(
                f"sentence vectors {str(path)!r} cannot be read ({error}); delete {path.stem}.json."
            ) from error

    def _add(self, texts: Sequence[str], vectors: NDArray[np.float16]) -> None:
        if len(texts) != len(vectors):
            raise ValueError(f"{len(texts)} texts for {len(vectors)} vectors")
        first = len(self._rows)
        self._rows |= {text: first + place for place, text in enumerate(texts)}
        self._vectors = np.concatenate([self._vectors, vectors]) if first else vectors


@dataclass(frozen=True)
class Entries:
    """Texts to learn from.

    Attributes:
        texts: the texts.
        targets: ``(n, E)`` float16 unit embeddings.
        weights: ``(n,)`` how often each is drawn, relative.
        languages: ``"en"`` or ``"zh"`` each; which templates it goes into.
        templated: whether it goes into templates at all (glosses do not).
        classes: the classes a picture of it would be of, most of what it stands for; empty where it is
            something else.
    """

    texts: tuple[str, ...]
    targets: NDArray[np.float16]
    weights: Floats
    languages: tuple[str, ...]
    templated: NDArray[np.bool_]
    classes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Draft:
    text: str
    q: Floats
    meaning: str  # the text whose sentence vector is the second part
    gloss: Floats  # added to it, may be zeros
    weight: float
    language: str = "en"
    templated: bool = True


def build_entries(
    concepts: Concepts,
    names: ClassNames,
    emoji: Sequence[Pictogram],
    space: Space,
    pictograms: PictogramNames,
    cache: SentenceCache,
    *,
    dictionary: Sequence[tuple[str, tuple[str, ...]]] = (),
) -> Entries:
    """Return everything the text tower learns from: names, glosses, class names, emoji names.

    Args:
        concepts: with vectors.
        names: of the classes.
        emoji: flags among them are passed over.
        space: where texts should go.
        pictograms: where drawings of them go.
        cache: of the sentence teacher.
        dictionary: Chinese words with English glosses (:func:`.cedict.read_cedict`).
    """
    drafts = [
        *_class_drafts(concepts, names),
        *_wordnet_drafts(concepts),
        *_emoji_drafts(concepts, emoji, cache),
        *_everyday_drafts(concepts),
        *_chinese_drafts(concepts, read_chinese()),
        *_gloss_drafts(concepts),
    ]
    meanings = cache.encode([draft.meaning for draft in drafts])
    if dictionary:
        more = list(_dictionary_drafts(concepts, dictionary, {draft.text for draft in drafts}))
        meanings = np.concatenate([meanings, cache.encode([draft.meaning for draft in more])])
        drafts += more
    glosses = np.stack([draft.gloss for draft in drafts])
    drawn_below = _drawings_below(concepts, pictograms.names)
    targets = np.empty((len(drafts), space.embed_dim), np.float16)
    for start in range(0, len(drafts), 4096):
        part = slice(start, start + 4096)
        q = np.stack([draft.q for draft in drafts[part]])
        vectors = unit(meanings[part] + 0.3 * glosses[part])
        said = [draft.meaning for draft in drafts[part]]
        kinds = [drawn_below.get(concepts.main_meaning(name), ()) for name in said]
        targets[part] = space.embed_texts(
            q, vectors, pictograms.codes(said, meanings[part]), pictograms.drawn(said, kinds)
        )
    return Entries(
        tuple(draft.text for draft in drafts),
        targets,
        np.array([draft.weight for draft in drafts], np.float32),
        tuple(draft.language for draft in drafts),
        np.array([draft.templated for draft in drafts]),
        tuple(_classes(draft) for draft in drafts),
    )


def _drawings_below(concepts: Concepts, names: Sequence[str]) -> dict[int | None, list[int]]:
    """Return which drawings show each meaning or a kind of it; what has very many is no kind to be seen."""
    found: dict[int | None, list[int]] = {}
    for row, name in enumerate(names):
        meaning = concepts.main_meaning(name)
        if meaning is not None:
            for above in concepts.wordnet.ancestors(meaning):
                found.setdefault(above, []).append(row)
    return {meaning: rows for meaning, rows in found.items() if len(rows) <= _MOST_DRAWINGS}


def _classes(draft: _Draft) -> tuple[int, ...]:
    """Return the classes that carry most of a name; none where they do not hold half of it."""
    if not draft.templated:
        return ()
    most = np.flatnonzero(draft.q >= 0.5 * draft.q.max())
    return tuple(most.tolist()) if draft.q[most].sum() >= 0.5 else ()


def _class_drafts(concepts: Concepts, names: ClassNames) -> Iterable[_Draft]:
    for index, english in enumerate(names.english):
        q = np.zeros(1000, np.float32)
        q[index] = 1
        gloss = concepts.gloss_of_synset(names.offsets[index])
        shared = concepts.of_name(english)  # two classes of one name share it
        yield _Draft(english, q if shared is None else shared, english, gloss, _CLASS)
        for other in names.others[index]:
            if other.lower() != english.lower() and concepts.of_name(other) is None:
                yield _Draft(other, q, other, gloss, 3.0)
        yield _Draft(names.chinese[index], q, english, gloss, _CLASS, language="zh")


def _wordnet_drafts(concepts: Concepts) -> Iterable[_Draft]:
    wordnet = concepts.wordnet
    seen: set[str] = set()
    for offset in concepts.offsets:
        for lemma in wordnet.synsets[offset].lemmas:
            name = lemma.lower()
            if name in seen:
                continue
            seen.add(name)
            q = concepts.of_name(name)
            meanings = concepts.meanings(name)
            if q is None or not meanings:
                continue
            weight = _name_weight(concepts, name, lemma, [kind for kind, _ in meanings])
            gloss = concepts.gloss_of_name(name)
            yield _Draft(name, q, name, gloss, weight)
            if weight >= 2 and not name.endswith("s"):
                yield _Draft(_plural(name), q, name, gloss, 0.2 * weight)


def _name_weight(concepts: Concepts, name: str, lemma: str, kinds: Sequence[int]) -> float:
    """Weigh a name by how common it is and by whether the picture side can know it."""
    synsets = concepts.wordnet.synsets
    count = sum(
        tagged
        for kind in kinds
        for each, tagged in zip(synsets[kind].lemmas, synsets[kind].counts, strict=True)
        if each.lower() == name
    )
    weight = 1 + math.log1p(count)
    if any(concepts.covers(kind) for kind in kinds):
        weight *= 2
    if " " not in name:
        weight *= 1.5
    if lemma[0].isupper():  # scientific and family names
        weight *= 0.3
    if synsets[kinds[0]].lexical_file in (18, 27, 15):  # persons, substances, places
        weight *= 0.5
    return weight


def _plural(name: str) -> str:
    if name.endswith(("sh", "ch", "x", "z")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else name + "s"


_MOST_EMOJI_A_TAG = 4  # tags of more emoji are topics, not names


def _emoji_drafts(concepts: Concepts, emoji: Sequence[Pictogram], cache: SentenceCache) -> Iterable[_Draft]:
    emoji = [each for each in emoji if not each.is_flag]
    vectors = cache.encode([each.english for each in emoji])
    tagged: dict[str, list[tuple[Floats, str]]] = {}
    for each, vector in zip(emoji, vectors, strict=True):
        english = each.english
        q = concepts.of_name(english)
        if q is None:
            q = concepts.of_vector(vector)
        gloss = concepts.gloss_of_name(english)
        yield _Draft(english, q, english, gloss, _EMOJI)
        yield _Draft(each.chinese, q, english, gloss, _EMOJI, language="zh")
        for tag in each.chinese_tags:
            tagged.setdefault(tag, []).append((q, english))
    named = {each.chinese for each in emoji}
    for tag, found in tagged.items():
        if tag in named or len(found) > _MOST_EMOJI_A_TAG:
            continue
        for q, english in found:
            gloss = concepts.gloss_of_name(english)
            yield _Draft(tag, q, english, gloss, 3.0 / len(found), language="zh")


def _everyday_drafts(concepts: Concepts) -> Iterable[_Draft]:
    """Yield the names of the list of look-alikes: what people ask for most; WordNet lacks some of them."""
    for name in concepts.everyday:
        q = concepts.of_name(name)
        if q is None:
            continue
        gloss = concepts.gloss_of_name(name)
        yield _Draft(name, q, name, gloss, _EVERYDAY)
        if not name.endswith("s"):
            yield _Draft(_plural(name), q, name, gloss, 0.1 * _EVERYDAY)


def read_chinese(path: Path = CHINESE) -> dict[str, tuple[str, ...]]:
    """Return Chinese names of everyday things by their English names, the usual one first.

    Raises:
        InputError: the list cannot be read, or a line is no list of names.
    """
    try:
        lines = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Chinese names: {str(path)!r} cannot be read ({error}).") from error
    for english, chinese in lines.items():
        if not isinstance(chinese, list) or not all(isinstance(each, str) and each for each in chinese):
            raise InputError(
                f"Chinese names: {str(path)!r} has {chinese!r} for {english!r}, expected a list of names."
            )
    return {english: tuple(chinese) for english, chinese in lines.items()}


def _chinese_drafts(concepts: Concepts, chinese: Mapping[str, Sequence[str]]) -> Iterable[_Draft]:
    """Yield Chinese names; one that stands for several English ones is a mixture of them."""
    meant: dict[str, list[tuple[float, str, Floats]]] = {}
    for english, names in chinese.items():
        q = concepts.of_name(english)
        if q is None:
            continue
        for place, name in enumerate(names):
            meant.setdefault(name, []).append((_LATER_NAME if place else 1.0, english, q))
    for name, found in meant.items():
        total = sum(share for share, _, _ in found)
        q = np.asarray(sum(share / total * each for share, _, each in found), np.float32)
        share, english, _ = max(found, key=lambda one: one[0])
        yield _Draft(
            name, q, english, concepts.gloss_of_name(english), _EVERYDAY_CHINESE * share, language="zh"
        )


def _gloss_drafts(concepts: Concepts) -> Iterable[_Draft]:
    synsets = concepts.wordnet.synsets
    for offset, text in zip(concepts.offsets, concepts.gloss_texts(), strict=True):
        covered = concepts.covers(offset)
        gloss = concepts.gloss_of_synset(offset)
        q = concepts.of_synset(offset)
        yield _Draft(synsets[offset].gloss, q, text, gloss, 0.5 if covered else 0.1, templated=False)


def _dictionary_drafts(
    concepts: Concepts, dictionary: Sequence[tuple[str, tuple[str, ...]]], known: set[str]
) -> Iterable[_Draft]:
    """Yield Chinese words whose English gloss is the name of something that can be seen.

    A word with several such glosses is drawn as each of them, so that it ends up between them; words known
    from elsewhere keep what is said there.
    """
    for word, glosses in dictionary:
        if word in known:
            continue
        found = [
            (gloss, q)
            for gloss in glosses
            if concepts.meanings(gloss) and (q := concepts.of_name(gloss)) is not None
        ]
        for gloss, q in found:
            covered = any(concepts.covers(kind) for kind, _ in concepts.meanings(gloss))
            weight = (2.0 if covered else 1.0) / len(found)
            yield _Draft(word, q, gloss, concepts.gloss_of_name(gloss), weight, language="zh")
