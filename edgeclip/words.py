r"""What a text tower can be expected to know: its hashed word list and the scripts of its languages.

A word list (``words.bin``) says which words the texts held that a text tower was trained on. Only hashes are
stored, so the file neither lists the training texts nor costs more than four bytes a word. The form,
little-endian::

    offset 0   8 bytes   "ECWORDS\0"
    offset 8   uint32    version, 1
    offset 12  uint32    number of words n
    offset 16  n × uint32, strictly increasing: blake2b with digest_size=4 of the word in UTF-8,
               NFKC-normalized and lower-cased

A word is a run of letters; every Han character is a word of its own. With 100,000 words a stranger is taken
for known once in 43,000 times, which a warning can live with.

Not in here: tokens. The list belongs to the texts, whatever tokenizer cut them.
"""

from __future__ import annotations

import hashlib
import re
import struct
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgeclip.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["KnowsWords", "WordList", "build_words", "label_warnings", "scripts_of", "split_words"]

_MAGIC = b"ECWORDS\0"
_VERSION = 1
_HEADER = struct.Struct("<8sII")
_SHOWN = 5  # labels or words quoted in one warning
_JUDGED = 1_000  # characters of a label that are looked at

_ASCII_WORD = re.compile("[a-z]+")


def split_words(text: str) -> list[str]:
    """Return the words of a text, NFKC-normalized and lower-cased: runs of letters, single Han characters."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _word_finder()(unicodedata.normalize("NFKC", text).lower())


@lru_cache(maxsize=1)
def _word_finder() -> Callable[[str], list[str]]:
    import regex  # 20 ms, and only texts beyond ASCII need it

    found: Callable[[str], list[str]] = regex.compile(r"(?V1)\p{Han}|[[\p{L}\p{M}]--\p{Han}]+").findall
    return found


def _hash(word: str) -> int:
    # A lone surrogate cannot be encoded; it becomes a question mark, which is in no word.
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=4).digest(), "little")


class WordList:
    """A set of hashed words, read from the bytes of a ``words.bin``.

    Args:
        data: the whole file. The array is a view of it; nothing is copied.

    Raises:
        BundleError: the bytes are not a word list of version 1.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise BundleError(
                f"words.bin: got {len(data)} bytes, expected at least {_HEADER.size}; it is cut off."
            )
        magic, version, count = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise BundleError(
                f"words.bin: got the signature {magic!r}, expected {_MAGIC!r}; it is no word list."
            )
        if version != _VERSION:
            raise BundleError(
                f"words.bin: got version {version}, expected {_VERSION}; install a newer edgeclip."
            )
        if len(data) != _HEADER.size + 4 * count:
            raise BundleError(
                f"words.bin: got {len(data)} bytes, expected {_HEADER.size + 4 * count} for {count} words."
            )
        self._hashes: NDArray[np.uint32] = np.frombuffer(data, dtype="<u4", offset=_HEADER.size)
        if not bool(np.all(self._hashes[1:] > self._hashes[:-1])):
            raise BundleError(
                "words.bin: its hashes are not in increasing order; it is damaged, write it again."
            )

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, word: str) -> bool:
        """Return whether this very word is in the list (no plural is undone)."""
        wanted = _hash(word)
        at = int(np.searchsorted(self._hashes, wanted))
        return at < len(self._hashes) and int(self._hashes[at]) == wanted

    def knows(self, word: str) -> bool:
        """Return whether a word, its singular or its plural is in the list; an ASCII letter always is."""
        if len(word) == 1 and word.isascii():
            return True
        return any(form in self for form in _forms(word))

    def unknown(self, text: str) -> list[str]:
        """Return the words of a text that are not in the list, in their order."""
        return [word for word in split_words(text) if not self.knows(word)]


def _forms(word: str) -> list[str]:
    """Return a word, its regular plurals, and the singulars its ending allows: cats, boxes, ponies."""
    if not word.isascii() or len(word) < 3:
        return [word]
    forms = [word, word + "s", word + "es"]
    if word.endswith("y"):
        forms.append(word[:-1] + "ies")
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
        if word.endswith("es"):
            forms.append(word[:-2])
        if word.endswith("ies"):
            forms.append(word[:-3] + "y")
    return forms


def build_words(texts: Iterable[str], *, min_count: int = 1) -> bytes:
    """Return the ``words.bin`` of the words that occur at least ``min_count`` times in the texts.

    The same texts in any order give the same bytes.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_words(text))
    hashes = sorted({_hash(word) for word, count in counts.items() if count >= min_count})
    return _HEADER.pack(_MAGIC, _VERSION, len(hashes)) + np.array(hashes, dtype="<u4").tobytes()


# Letters by script: (first, last, script), in order, without overlap. Blocks, not the full property: enough
# to tell which alphabet a label is written in. What stands in no row (digits, signs, emoji, marks) belongs
# to no script.
_RANGES: tuple[tuple[int, int, str], ...] = (
    (0x0041, 0x005A, "latin"),
    (0x0061, 0x007A, "latin"),
    (0x00AA, 0x00AA, "latin"),
    (0x00BA, 0x00BA, "latin"),
    (0x00C0, 0x00D6, "latin"),
    (0x00D8, 0x00F6, "latin"),
    (0x00F8, 0x02AF, "latin"),
    (0x0370, 0x03FF, "greek"),
    (0x0400, 0x052F, "cyrillic"),
    (0x0531, 0x058F, "armenian"),
    (0x05D0, 0x05F4, "hebrew"),
    (0x0620, 0x065F, "arabic"),
    (0x066E, 0x06EF, "arabic"),
    (0x06FA, 0x06FF, "arabic"),
    (0x0750, 0x077F, "arabic"),
    (0x08A0, 0x08FF, "arabic"),
    (0x0900, 0x0965, "devanagari"),
    (0x0971, 0x097F, "devanagari"),
    (0x0980, 0x09E3, "bengali"),
    (0x0A00, 0x0A65, "gurmukhi"),
    (0x0A80, 0x0AE3, "gujarati"),
    (0x0B80, 0x0BE5, "tamil"),
    (0x0C00, 0x0C65, "telugu"),
    (0x0C80, 0x0CE5, "kannada"),
    (0x0D00, 0x0D65, "malayalam"),
    (0x0D80, 0x0DE5, "sinhala"),
    (0x0E01, 0x0E4E, "thai"),
    (0x0E80, 0x0ECF, "lao"),
    (0x1000, 0x103F, "myanmar"),
    (0x10A0, 0x10FF, "georgian"),
    (0x1100, 0x11FF, "hangul"),
    (0x1200, 0x137F, "ethiopic"),
    (0x1780, 0x17D3, "khmer"),
    (0x1C80, 0x1C8F, "cyrillic"),
    (0x1C90, 0x1CBF, "georgian"),
    (0x1E00, 0x1EFF, "latin"),
    (0x1F00, 0x1FFF, "greek"),
    (0x2C60, 0x2C7F, "latin"),
    (0x2DE0, 0x2DFF, "cyrillic"),
    (0x2E80, 0x2FDF, "han"),
    (0x3005, 0x3007, "han"),
    (0x3041, 0x30FF, "kana"),
    (0x3105, 0x312F, "bopomofo"),
    (0x3131, 0x318E, "hangul"),
    (0x31A0, 0x31BF, "bopomofo"),
    (0x31F0, 0x31FF, "kana"),
    (0x3400, 0x4DBF, "han"),
    (0x4E00, 0x9FFF, "han"),
    (0xA640, 0xA69F, "cyrillic"),
    (0xA720, 0xA7FF, "latin"),
    (0xA960, 0xA97C, "hangul"),
    (0xAC00, 0xD7FB, "hangul"),
    (0xF900, 0xFAFF, "han"),
    (0xFB1D, 0xFB4F, "hebrew"),
    (0xFB50, 0xFDFB, "arabic"),
    (0xFE70, 0xFEFC, "arabic"),
    (0xFF21, 0xFF3A, "latin"),
    (0xFF41, 0xFF5A, "latin"),
    (0xFF66, 0xFF9F, "kana"),
    (0x20000, 0x3FFFF, "han"),
)
_STARTS = [first for first, _, _ in _RANGES]

_LANGUAGES_BY_SCRIPTS: dict[str, str] = {
    "arabic": "ar fa ps ur",
    "armenian": "hy",
    "bengali": "bn",
    "cyrillic": "be bg kk ky mk mn ru tg uk",
    "cyrillic latin": "sr",
    "devanagari": "hi mr ne",
    "ethiopic": "am",
    "georgian": "ka",
    "greek": "el",
    "gujarati": "gu",
    "gurmukhi": "pa",
    "han bopomofo": "wuu yue zh",
    "han hangul": "ko",
    "han kana": "ja",
    "hebrew": "he yi",
    "kannada": "kn",
    "khmer": "km",
    "lao": "lo",
    "latin": "af ca cs cy da de en eo es et eu fi fil fr ga gl hr hu id is it la lt lv ms mt nb nl nn no pl "
    "pt ro sk sl sq sv sw tl tr vi zu",
    "malayalam": "ml",
    "myanmar": "my",
    "sinhala": "si",
    "tamil": "ta",
    "telugu": "te",
    "thai": "th",
}
_SCRIPTS_BY_LANGUAGE = {
    language: frozenset(scripts.split())
    for scripts, languages in _LANGUAGES_BY_SCRIPTS.items()
    for language in languages.split()
}


def scripts_of(text: str) -> set[str]:
    """Return the scripts of a text, such as ``{"latin", "han"}``; digits, signs and emoji have none."""
    if text.isascii():
        return {"latin"} if _ASCII_WORD.search(text.lower()) else set()
    found: set[str] = set()
    for character in set(text):
        row = _RANGES[max(bisect_right(_STARTS, ord(character)) - 1, 0)]
        if row[0] <= ord(character) <= row[1]:
            found.add(row[2])
    return found


def _scripts_for(languages: Sequence[str]) -> frozenset[str] | None:
    """Return the scripts of codes such as ``en`` or ``zh-Hans``; None if one is not in the table."""
    scripts: frozenset[str] = frozenset()
    for language in languages:
        known = _SCRIPTS_BY_LANGUAGE.get(re.split("[-_]", language.lower())[0])
        if known is None:
            return None
        scripts |= known
    return scripts or None


class KnowsWords(Protocol):
    """Anything that can have a word list; ``Tokenizer`` does."""

    @property
    def words(self) -> WordList | None:
        """The word list, if there is one."""


def label_warnings(labels: Sequence[str], languages: Sequence[str], tokenizer: KnowsWords) -> list[str]:
    """Return one sentence for each reason to expect that a model does not know some of the labels.

    Two reasons are looked at: letters outside the scripts of the model's languages (not judged when a
    language is not in our table), and, where the tokenizer carries a word list, words that are not in it.

    Args:
        labels: the names to classify by, before any template is put around them.
        languages: codes such as ``("en", "zh")``, as the manifest lists them.
        tokenizer: whose word list is asked.

    Returns:
        Sentences to show; empty when nothing is wrong.
    """
    warnings = []
    labels = [label[:_JUDGED] for label in labels]
    allowed = _scripts_for(languages)
    foreign = [label for label in labels if allowed is not None and scripts_of(label) - allowed]
    if foreign:
        scripts = set().union(*map(scripts_of, foreign)) - (allowed or set())
        warnings.append(
            f"{_share(foreign, labels, 'label')} written in {' and '.join(sorted(scripts))} letters, but the "
            f"model was trained on {', '.join(languages)}: {_quoted(foreign)}. Expect arbitrary scores."
        )
    if tokenizer.words is None:
        return warnings
    named = set(foreign)  # a label is named once
    rest = [label for label in labels if label not in named]
    words = [word for label in rest for word in split_words(label)]
    unknown = [word for word in words if not tokenizer.words.knows(word)]
    if unknown:
        warnings.append(
            f"{_share(unknown, words, 'word')} not in the list the text tower was trained on: "
            f"{_quoted(unknown)}. Expect poor scores, or use other names."
        )
    wordless = [label for label in rest if not split_words(label)]
    if wordless:
        warnings.append(
            f"{_share(wordless, labels, 'label')} without any word: {_quoted(wordless)}. "
            f"Expect arbitrary scores."
        )
    return warnings


def _share(part: Sequence[str], whole: Sequence[str], noun: str) -> str:
    """Return "1 of 2 labels (50 %) is"."""
    nouns = noun if len(whole) == 1 else noun + "s"
    percent = 100 * len(part) / len(whole)
    return f"{len(part)} of {len(whole)} {nouns} ({percent:.0f} %) {'is' if len(part) == 1 else 'are'}"


def _quoted(items: Sequence[str]) -> str:
    different = list(dict.fromkeys(items))
    shown = ", ".join(repr(item if len(item) <= 40 else item[:39] + "…") for item in different[:_SHOWN])
    return shown if len(different) <= _SHOWN else f"{shown} and {len(different) - _SHOWN} more"
