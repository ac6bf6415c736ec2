"""Text to token ids: byte-level BPE for CLIP's vocabulary and for those we train.

One algorithm (Sennrich et al. 2016, on bytes as in Radford et al. 2019) serves both kinds. A text is cleaned, cut
into words by a pattern, each word is spelled in bytes, the last of which carries ``</w>``, and the merges join
neighbours in the order in which they were learned. ``clip-bpe`` gives exactly the ids of open_clip's
``SimpleTokenizer``; ``edgeclip-bpe`` cuts every Han character off as a word of its own and reads no special tokens
from a text.

Ids: 256 bytes, 256 bytes at the end of a word, one for each merge in order, then the special ones.

Files (schema 1):

- ``tokenizer.json``: ``TokenizerConfig``. Cleaning steps and pattern are names from the tables below, never code: a
  file that nobody here wrote cannot make us run its regular expression. The expression stands beside its name for
  readers in other languages.
- ``merges.txt.gz``: the line ``#version: 0.2``, then one merge a line, ``first second``, in GPT-2's printable
  spelling of bytes.
- ``words.bin``, optional: see ``edgeclip.words``.

Not in here: what a model does with the ids, prompt templates, batching.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np

from edgeclip.errors import BundleError, InputError
from edgeclip.words import WordList, split_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SpecialIds", "Tokenizer", "TokenizerConfig", "train_bpe"]

_MERGES_HEADER = b"#version: 0.2\n"
_MAX_MERGES_BYTES = 8 << 20  # decompressed; CLIP's are 0.5 MB
_MAX_MERGES = 1 << 19
_MAX_CONFIG_BYTES = 1 << 16
_MAX_TEXT_CHARACTERS = 1 << 20
_MAX_CACHED_WORDS = 1 << 15
_MAX_CACHED_LENGTH = 48  # longer words are rare and would make the cache large
_NO_MERGE = 1 << 62


# --- spelling of bytes ------------------------------------------------------------------------------------


def _byte_spelling() -> list[tuple[int, str]]:
    """Return (byte, printable character) in the order of the ids 0 to 255 (Radford et al. 2019, GPT-2's files)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [(byte, chr(byte)) for byte in printable] + [(byte, chr(256 + n)) for n, byte in enumerate(others)]


_SPELLING = _byte_spelling()
_ID_OF_BYTE = bytes(
    identifier for _, identifier in sorted((byte, i) for i, (byte, _) in enumerate(_SPELLING))
)
_BYTE_PIECES = [character for _, character in _SPELLING] + [character + "</w>" for _, character in _SPELLING]
_BYTE_OF_CHARACTER = {character: byte for byte, character in _SPELLING}


def _spell(word: str) -> list[int]:
    """Return the ids of the bytes of a word, the last one as the end of the word."""
    try:
        encoded = word.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no cleaning step repaired
        encoded = word.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    ids = list(encoded.translate(_ID_OF_BYTE))
    ids[-1] += 256
    return ids


# --- cleaning ---------------------------------------------------------------------------------------------


def _ftfy(text: str) -> str:
    # For printable ASCII without a character reference ftfy has nothing to repair: the import (90 ms) can wait.
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy

    return str(ftfy.fix_text(text))


_LONG_REFERENCE = re.compile("&#[0-9]{4000,};?")


def _html_unescape_twice(text: str) -> str:
    if "&" not in text:
        return text
    import html

    # Python refuses to read a number of more than 4,300 digits; no such character exists anyway.
    once = html.unescape(_LONG_REFERENCE.sub("\ufffd", text))
    return html.unescape(_LONG_REFERENCE.sub("\ufffd", once))


def _nfkc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _whitespace(text: str) -> str:
    return " ".join(text.split())


_CLEANING: dict[str, Callable[[str], str]] = {
    "ftfy": _ftfy,
    "html-unescape-twice": _html_unescape_twice,
    "lower": str.lower,
    "nfkc": _nfkc,
    "whitespace": _whitespace,
}
_CLIP_CLEANING = ("ftfy", "html-unescape-twice", "whitespace", "lower")
_OUR_CLEANING = ("nfkc", "whitespace", "lower")


# --- patterns ---------------------------------------------------------------------------------------------


class _Pattern(msgspec.Struct, frozen=True):
    """How a text is cut into words: the expression, and one for ASCII texts that `re` understands and that agrees."""

    expression: str
    ascii_expression: str


_CLIP_SPECIAL_TEXTS = ("<start_of_text>", "<end_of_text>")
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# Names are for ever: a changed expression gets a new name.
_PATTERNS: dict[str, _Pattern] = {
    "clip": _Pattern(
        rf"(?i){'|'.join(_CLIP_SPECIAL_TEXTS)}|{_CONTRACTIONS}|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+",
        rf"(?i){'|'.join(_CLIP_SPECIAL_TEXTS)}|{_CONTRACTIONS}|[a-z]+|[0-9]|[^ \t\n\r\f\va-z0-9]+",
    ),
    # Every Han character is a word; kana runs are; Hangul is written with spaces, so letters do; marks stay with
    # their letter, without which Devanagari and Thai would fall to pieces.
    "edgeclip": _Pattern(
        rf"(?V1){_CONTRACTIONS}|\p{{Han}}|[\p{{Hiragana}}\p{{Katakana}}ー]+"
        r"|[[\p{L}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}ー]]+|\p{N}|[^\s\p{L}\p{M}\p{N}]+",
        rf"{_CONTRACTIONS}|[A-Za-z]+|[0-9]|[^ \t\n\r\f\vA-Za-z0-9]+",
    ),
}


@lru_cache(maxsize=8)
def _unicode_finder(name: str) -> Callable[[str], list[str]]:
    import regex  # 20 ms, and only texts beyond ASCII need it

    found: Callable[[str], list[str]] = regex.compile(_PATTERNS[name].expression).findall
    return found


# --- files ------------------------------------------------------------------------------------------------


class SpecialIds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Ids that stand for no piece of text; ``start`` and ``end`` are null for towers that want neither."""

    start: int | None
    end: int | None
    pad: int


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of ``tokenizer.json``. An unknown field is an error: it might change the ids.

    Attributes:
        schema: version of the form, 1.
        kind: ``clip-bpe`` reads ``<start_of_text>`` and ``<end_of_text>`` in a text as the special ids, as
            open_clip does; ``edgeclip-bpe`` reads every text as text.
        special: the ids that frame and fill a row.
        clean: names of the cleaning steps, in order.
        pattern: name of the expression that cuts a text into words.
        regex: that expression, for readers in other languages.
        context_length: tokens per text, start and end included.
        pooling: where a tower finds the end of the text: at the largest id, at the last column, or by the mask of
            columns that are not padding.
        languages: codes of the languages the vocabulary was made for.
    """

    schema: Literal[1]
    kind: Literal["clip-bpe", "edgeclip-bpe"]
    special: SpecialIds
    clean: tuple[str, ...]
    pattern: str
    regex: str
    context_length: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    pooling: Literal["argmax", "last", "mask"]
    languages: tuple[str, ...]


def _read_config(data: bytes) -> TokenizerConfig:
    if len(data) > _MAX_CONFIG_BYTES:
        raise BundleError(f"tokenizer.json: got {len(data)} bytes, expected at most {_MAX_CONFIG_BYTES}.")
    try:
        config = msgspec.json.decode(data, type=TokenizerConfig)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BundleError(
            f"tokenizer.json: cannot be read as a tokenizer of schema 1: {_one_line(error)}"
        ) from error
    for step in config.clean:
        if step not in _CLEANING:
            raise BundleError(
                f"tokenizer.json: unknown cleaning step {step!r}, expected some of {', '.join(sorted(_CLEANING))}; "
                f"install a newer edgeclip."
            )
    if len(set(config.clean)) != len(config.clean):
        raise BundleError(f"tokenizer.json: a cleaning step is named twice in {list(config.clean)}.")
    known = _PATTERNS.get(config.pattern)
    if known is None or known.expression != config.regex:
        raise BundleError(
            f"tokenizer.json: unknown pattern {config.pattern!r} with the expression {config.regex[:60]!r}, expected "
            f"one of {', '.join(sorted(_PATTERNS))} with its own expression; install a newer edgeclip."
        )
    return config


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _gunzip(data: bytes) -> bytes:
    """Decompress a gzip file of one member, never to more than the limit."""
    reader = zlib.decompressobj(wbits=31)
    try:
        content = reader.decompress(data, _MAX_MERGES_BYTES + 1)
    except zlib.error as error:
        raise BundleError(f"merges.txt.gz: cannot be decompressed: {_one_line(error)}.") from error
    if len(content) > _MAX_MERGES_BYTES:
        raise BundleError(
            f"merges.txt.gz: holds more than {_MAX_MERGES_BYTES} bytes, which no vocabulary needs."
        )
    if not reader.eof:
        raise BundleError(f"merges.txt.gz: ends too early, after {len(data)} bytes; copy it again.")
    if reader.unused_data:
        raise BundleError(f"merges.txt.gz: {len(reader.unused_data)} bytes follow its end; write it again.")
    return content


def _gzip(content: bytes) -> bytes:
    """Compress without time, name or system in the header, so that the same merges give the same bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(content) + packer.flush()
    tail = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")
    return b"\x1f\x8b\x08\0\0\0\0\0\x02\xff" + body + tail


def _pack_merges(merges: Iterable[tuple[str, str]]) -> bytes:
    return _gzip(_MERGES_HEADER + "".join(f"{first} {second}\n" for first, second in merges).encode())


def _read_merges(content: bytes) -> tuple[dict[int, int], int]:
    """Parse decompressed merges.

    No Python loop runs over the lines: CLIP's 48,894 are read in about 20 ms.

    Returns:
        ``{first id * vocabulary + second id: id of the joined piece}`` and ``vocabulary``, the number of pieces.
        The ids grow with the order of the merges, so they are the ranks too.
    """
    if not content.startswith(_MERGES_HEADER):
        raise BundleError(f"merges.txt.gz: its first line is {content[:40]!r}, expected {_MERGES_HEADER!r}.")
    body = content[len(_MERGES_HEADER) :]
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"merges.txt.gz: is not UTF-8: {_one_line(error)}.") from error
    sides = _sides(body, text)
    pieces = _BYTE_PIECES + text.replace(" ", "").split("\n")[:-1]
    vocabulary = len(pieces)
    ids = dict(zip(pieces, range(vocabulary), strict=True))
    if len(ids) != vocabulary:
        seen: set[str] = set()
        twice = next(piece for piece in pieces if piece in seen or seen.add(piece))  # type: ignore[func-returns-value]
        raise BundleError(
            f"merges.txt.gz: the piece {twice!r} is made twice; every merge must make a new one."
        )
    try:
        pairs = np.fromiter(map(ids.__getitem__, sides), np.int64, len(sides)).reshape(-1, 2)
    except KeyError as error:
        where = sides.index(error.args[0]) // 2 + 2
        raise BundleError(
            f"merges.txt.gz: line {where} joins {error.args[0]!r}, which no earlier line makes."
        ) from error
    joined = np.arange(len(_BYTE_PIECES), vocabulary)
    # Each side must be older than what it makes. Encoding long words relies on it.
    late = np.flatnonzero(pairs.max(axis=1, initial=0) >= joined)
    if len(late):
        raise BundleError(
            f"merges.txt.gz: line {int(late[0]) + 2} joins a piece that only a later line makes."
        )
    keys = pairs[:, 0] * vocabulary + pairs[:, 1]
    return dict(zip(keys.tolist(), joined.tolist(), strict=True)), vocabulary


def _sides(body: bytes, text: str) -> list[str]:
    """Return both sides of every merge, one after the other, having checked the form ``first second\\n``."""
    raw = np.frombuffer(body, np.uint8)
    separators = raw[raw <= ord(" ")]
    count = len(separators) // 2
    if count > _MAX_MERGES:
        raise BundleError(f"merges.txt.gz: holds {count} merges, expected at most {_MAX_MERGES}.")
    sides = text.split()
    in_turn = len(separators) % 2 == 0 and bool(
        np.all(separators[0::2] == ord(" ")) and np.all(separators[1::2] == ord("\n"))
    )
    # As many sides as separators: no side is empty, no other space separates, and the last line is complete.
    if not in_turn or len(sides) != len(separators) or (len(raw) and raw[-1] != ord("\n")):
        for number, line in enumerate(text.split("\n"), start=2):
            if len(line.split()) != 2 or line != " ".join(line.split()):
                raise BundleError(f"merges.txt.gz: line {number} is {line[:40]!r}, expected 'first second'.")
        raise BundleError("merges.txt.gz: the last line is cut off; copy it again.")
    return sides


def _read_file(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(
            f"{path.name}: cannot be read from {str(path.parent)!r}: {error.strerror}."
        ) from error
    if len(data) > limit:
        raise BundleError(f"{path.name}: holds more than {limit} bytes, which no vocabulary needs.")
    return data


# --- the tokenizer ----------------------------------------------------------------------------------------


class Tokenizer:
    """Turn texts into rows of token ids. Safe to use from many threads.

    Made by `open`, `from_bytes`, `clip` or `train_bpe`.

    Attributes:
        config: what ``tokenizer.json`` says.
        vocab_size: number of ids, special ones included.
        digest: sha256 over the settings and the merges, in hexadecimal. Two tokenizers with one digest give the
            same ids; the word list is not part of it.
        words: the words its text tower was trained on, if known.
    """

    def __init__(self, config: TokenizerConfig, merges: bytes, words: bytes | None = None) -> None:
        content = _gunzip(merges)
        self.config = config
        self.words = None if words is None else WordList(words)
        self._merges, self._pieces_count = _read_merges(content)
        self.vocab_size = self._check_special_ids()
        canonical = msgspec.json.encode(config, order="sorted")
        self.digest = hashlib.sha256(canonical + b"\0" + content).hexdigest()
        self._files = {
            "tokenizer.json": msgspec.json.format(canonical, indent=1) + b"\n",
            "merges.txt.gz": merges,
        }
        if words is not None:
            self._files["words.bin"] = words
        self._steps = [_CLEANING[step] for step in config.clean]
        self._find_ascii = re.compile(_PATTERNS[config.pattern].ascii_expression).findall
        self._special_words: dict[str, tuple[int, ...]] = {}
        if config.kind == "clip-bpe":
            ids = (config.special.start, config.special.end)
            self._special_words = {
                text: (identifier,)
                for text, identifier in zip(_CLIP_SPECIAL_TEXTS, ids, strict=True)
                if identifier is not None
            }
        self._cache: dict[str, tuple[int, ...]] = {}

    def _check_special_ids(self) -> int:
        """Return the size of the vocabulary, having checked that the special ids stand at its end."""
        special = self.config.special
        frame = [identifier for identifier in (special.start, special.end) if identifier is not None]
        beyond = sorted(
            {identifier for identifier in (*frame, special.pad) if identifier >= self._pieces_count}
        )
        size = self._pieces_count + len(beyond)
        if beyond != list(range(self._pieces_count, size)) or special.pad < 0:
            raise BundleError(
                f"tokenizer.json: the special ids {_as_dict(special)} leave a gap after the {self._pieces_count} "
                f"pieces of merges.txt.gz; the two files do not belong together."
            )
        if len(set(frame)) != len(frame) or any(identifier < self._pieces_count for identifier in frame):
            raise BundleError(
                f"tokenizer.json: the special ids {_as_dict(special)} clash; expected different start and end ids, "
                f"from {self._pieces_count} on."
            )
        if self.config.pooling == "mask" and special.pad < self._pieces_count:
            raise BundleError(
                f"tokenizer.json: pooling 'mask' needs a padding id from {self._pieces_count} on, got {special.pad}, "
                f"which is also a piece of text."
            )
        if self.config.context_length <= len(frame):
            raise BundleError(
                f"tokenizer.json: a context length of {self.config.context_length} leaves no room for text between "
                f"{len(frame)} special ids."
            )
        return size

    @classmethod
    def from_bytes(cls, config: bytes, merges_gz: bytes, words: bytes | None = None) -> Tokenizer:
        """Return the tokenizer of the contents of ``tokenizer.json``, ``merges.txt.gz`` and ``words.bin``.

        Raises:
            BundleError: one of them is damaged, of an unknown schema, or they do not belong together.
        """
        return cls(_read_config(config), merges_gz, words)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Return the tokenizer stored in a directory, which may lack ``words.bin``.

        Raises:
            BundleError: a file is missing or damaged.
        """
        directory = Path(directory)
        words = directory / "words.bin"
        return cls.from_bytes(
            _read_file(directory / "tokenizer.json", _MAX_CONFIG_BYTES),
            _read_file(directory / "merges.txt.gz", _MAX_MERGES_BYTES),
            _read_file(words, 4 * _MAX_MERGES_BYTES) if words.exists() else None,
        )

    @classmethod
    def clip(cls, context_length: int = 77) -> Tokenizer:
        """Return the tokenizer of OpenAI's CLIP (49,408 ids), equal to open_clip's ``SimpleTokenizer``."""
        directory = Path(__file__).parent / "assets" / "clip"
        config = _read_config(_read_file(directory / "tokenizer.json", _MAX_CONFIG_BYTES))
        merges = _read_file(directory / "merges.txt.gz", _MAX_MERGES_BYTES)
        return cls(msgspec.structs.replace(config, context_length=context_length), merges)

    @property
    def context_length(self) -> int:
        """Tokens per text, start and end included."""
        return self.config.context_length

    @property
    def pooling(self) -> str:
        """Where a tower finds the end of the text: ``argmax``, ``last`` or ``mask``."""
        return self.config.pooling

    @property
    def files(self) -> dict[str, bytes]:
        """The files by name, as `to_files` writes them."""
        return dict(self._files)

    def to_files(self, directory: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json``, ``merges.txt.gz`` and, if there are any, ``words.bin``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    def with_words(self, words: bytes | None) -> Tokenizer:
        """Return the same tokenizer with another word list (the bytes of a ``words.bin``)."""
        return Tokenizer(self.config, self._files["merges.txt.gz"], words)

    def clean(self, text: str) -> str:
        """Return a text as the pattern will see it."""
        for step in self._steps:
            text = step(text)
        return text

    def split(self, text: str) -> list[str]:
        """Return the words of a text, cleaned, as the pattern cuts them: what the merges work on."""
        text = self.clean(text)
        words: list[str] = (
            self._find_ascii(text) if text.isascii() else _unicode_finder(self.config.pattern)(text)
        )
        return words

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, cleaned, without start, end and padding."""
        ids, _ = self._encode(text, None)
        return ids

    def _encode(self, text: str, limit: int | None) -> tuple[list[int], bool]:
        """Return the ids and whether that is all; encoding may stop once there are more than ``limit``."""
        ids: list[int] = []
        cached = self._cache.get
        for word in self.split(text):
            ids += cached(word) or self._encode_word(word)
            if limit is not None and len(ids) > limit:
                return ids, False
        return ids, True

    def _encode_word(self, word: str) -> tuple[int, ...]:
        special = self._special_words.get(word)
        if special is not None:
            return special
        result = tuple(_merge(_spell(word), self._merges, self._pieces_count))
        if len(word) <= _MAX_CACHED_LENGTH:
            if len(self._cache) >= _MAX_CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = result
        return result

    def __call__(self, texts: Sequence[str] | str, *, truncate: bool = False) -> NDArray[np.int32]:
        """Return one row of ids for each text.

        Args:
            texts: one text or several.
            truncate: cut what is too long; the end token stays, at the last column.

        Returns:
            ``(B, L)`` int32, ``L`` the context length, filled up with the padding id.

        Raises:
            InputError: a text is too long and ``truncate`` is off, or is not a string.
        """
        if isinstance(texts, str):
            texts = [texts]
        special, length = self.config.special, self.context_length
        start = [] if special.start is None else [special.start]
        end = [] if special.end is None else [special.end]
        room = length - len(start) - len(end)
        rows = np.full((len(texts), length), special.pad, np.int32)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {index}: got {type(text).__name__}, expected a string.")
            if len(text) > _MAX_TEXT_CHARACTERS:
                raise InputError(
                    f"text {index}: got {len(text)} characters, expected at most {_MAX_TEXT_CHARACTERS}. Shorten it."
                )
            ids, _ = self._encode(text, room if truncate else None)
            if len(ids) > room and not truncate:
                raise InputError(
                    f"text {index}: got {len(ids) + length - room} tokens (start and end included), expected at most "
                    f"{length}. Shorten it or pass `truncate=True`."
                )
            row = start + ids[:room] + end
            rows[index, : len(row)] = row
        return rows

    def count(self, text: str) -> int:
        """Return how many tokens a text takes, start and end included."""
        special = self.config.special
        return len(self.encode(text)) + (special.start is not None) + (special.end is not None)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the cleaned text of a row or part of one, words parted by spaces; for people, not for round trips.

        Start and padding ids are left out, and what follows the end id.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        pieces = self._pieces()
        special = self.config.special
        found = []
        for identifier in ids:
            identifier = int(identifier)
            if identifier == special.end:
                break
            if not 0 <= identifier < self.vocab_size:
                raise InputError(f"token id {identifier}: expected 0 to {self.vocab_size - 1}.")
            if identifier < len(pieces):
                found.append(pieces[identifier])
        spelled = bytes(_BYTE_OF_CHARACTER[character] for character in "".join(found))
        return spelled.decode("utf-8", "replace").replace("</w>", " ").rstrip(" ")

    def _pieces(self) -> list[str]:
        body = _gunzip(self._files["merges.txt.gz"])[len(_MERGES_HEADER) :].decode()
        return _BYTE_PIECES + body.replace(" ", "").split("\n")[:-1]

    def unknown_share(self, text: str) -> float | None:
        """Return the share of a text's words that are not in the word list; None without a list or without words."""
        count = len(split_words(text))
        if self.words is None or not count:
            return None
        return len(self.words.unknown(text)) / count


def _as_dict(special: SpecialIds) -> dict[str, int | None]:
    return msgspec.structs.asdict(special)


# --- merging ----------------------------------------------------------------------------------------------


def _merge(ids: list[int], merges: dict[int, int], vocabulary: int) -> list[int]:
    """Join neighbours, the oldest merge first and each from left to right, until none is left."""
    if len(ids) > 64:
        return _merge_long(ids, merges, vocabulary)
    get = merges.get
    while len(ids) > 1:
        joined = [
            get(first * vocabulary + second, _NO_MERGE) for first, second in zip(ids, ids[1:], strict=False)
        ]
        best = min(joined)
        if best == _NO_MERGE:
            break
        at = joined.index(best)
        result = ids[:at]
        last = len(ids) - 1
        while at < last:
            if joined[at] == best:
                result.append(best)
                at += 2
            else:
                result.append(ids[at])
                at += 1
        if at == last:
            result.append(ids[last])
        ids = result
    return ids


def _merge_long(ids: list[int], merges: dict[int, int], vocabulary: int) -> list[int]:
    """Do the same for long words in n log n steps.

    A heap holds (id of the joined piece, place of its left side). New pairs are always younger than the merge that
    made them (`_read_merges` checks it), so taking the least entry is taking the oldest merge, leftmost first.
    """
    ids = list(ids)
    end = len(ids)
    following = list(range(1, end + 1))
    previous = list(range(-1, end - 1))
    heap: list[tuple[int, int, int]] = []

    def offer(left: int, right: int) -> None:
        joined = merges.get(ids[left] * vocabulary + ids[right])
        if joined is not None:
            heapq.heappush(heap, (joined, left, right))

    for place in range(end - 1):
        offer(place, place + 1)
    while heap:
        joined, left, right = heapq.heappop(heap)
        # Stale: one of the sides was joined to something else since.
        if (
            ids[left] < 0
            or following[left] != right
            or merges.get(ids[left] * vocabulary + ids[right]) != joined
        ):
            continue
        ids[left], ids[right] = joined, -1
        following[left] = after = following[right]
        if after < end:
            previous[after] = left
            offer(left, after)
        if previous[left] >= 0:
            offer(previous[left], left)
    return [identifier for identifier in ids if identifier >= 0]


# --- training ---------------------------------------------------------------------------------------------


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int = 16_000,
    context_length: int = 32,
    languages: Sequence[str] = ("en",),
    frame: bool = False,
    min_count: int = 2,
    pattern: str = "edgeclip",
    clean: Sequence[str] = _OUR_CLEANING,
) -> Tokenizer:
    """Learn a vocabulary from texts (Sennrich et al. 2016) and return its tokenizer, of kind ``edgeclip-bpe``.

    Counts are kept up to date pair by pair, so the cost is that of the words a merge changes: 200,000 captions and
    16,000 ids take well under a minute on one core. The same texts in any order give the same tokenizer: of pairs
    that occur equally often the one with the smaller ids is joined first.

    Args:
        texts: what to learn from; read once.
        vocab_size: number of ids at most, special ones included; fewer come out when no pair occurs often enough.
        context_length: tokens per text, start and end included.
        languages: codes of the languages of the texts.
        frame: add start and end ids, and pool at the end id (the largest); otherwise texts are rows of pieces, and
            padding is masked out.
        min_count: pairs that occur less often are not joined.
        pattern: name of the expression that cuts words.
        clean: names of the cleaning steps, in order.

    Raises:
        InputError: ``vocab_size`` has no room for the bytes and the special ids.
        BundleError: the pattern or a cleaning step is unknown.
    """
    special_count = 3 if frame else 1
    room = vocab_size - len(_BYTE_PIECES) - special_count
    if not 0 <= room <= _MAX_MERGES:
        least = len(_BYTE_PIECES) + special_count
        raise InputError(f"vocab_size: got {vocab_size}, expected {least} to {least + _MAX_MERGES}.")
    if pattern not in _PATTERNS:
        raise BundleError(f"pattern: got {pattern!r}, expected one of {', '.join(sorted(_PATTERNS))}.")

    def made(merges: Sequence[tuple[str, str]]) -> Tokenizer:
        first = len(_BYTE_PIECES) + len(merges)
        # The end id is the largest, so that argmax finds it.
        special = (
            SpecialIds(pad=first, start=first + 1, end=first + 2)
            if frame
            else SpecialIds(start=None, end=None, pad=first)
        )
        config = TokenizerConfig(
            schema=1,
            kind="edgeclip-bpe",
            special=special,
            clean=tuple(clean),
            pattern=pattern,
            regex=_PATTERNS[pattern].expression,
            context_length=context_length,
            pooling="argmax" if frame else "mask",
            languages=tuple(languages),
        )
        return Tokenizer.from_bytes(msgspec.json.encode(config), _pack_merges(merges))

    split = made([]).split
    counts = Counter(word for text in texts for word in split(text))
    return made(_learn_merges(counts, room, min_count))


def _learn_merges(counts: Counter[str], room: int, min_count: int) -> list[tuple[str, str]]:
    """Return at most ``room`` merges, learned from words and how often each occurs."""
    pieces = list(_BYTE_PIECES)
    made = set(pieces)
    words = [(_spell(word), count) for word, count in sorted(counts.items())]
    # A pair is one number, first << 20 | second, so that numbers sort as pairs do.
    pair_counts: defaultdict[int, int] = defaultdict(int)
    where: defaultdict[int, set[int]] = defaultdict(set)  # words that hold the pair, or once did
    for index, (ids, count) in enumerate(words):
        for pair in _pairs(ids):
            pair_counts[pair] += count
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items() if count >= min_count]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while heap and len(merges) < room:
        negative, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count != -negative:  # counts only fall after a pair was offered: offer it again, lower
            if count >= min_count:
                heapq.heappush(heap, (-count, pair))
            continue
        first, second = pair >> 20, pair & 0xFFFFF
        piece = pieces[first] + pieces[second]
        if (
            piece in made
        ):  # the same letters by another way, possible in runs such as "aaaaa"; ids name one piece
            continue
        made.add(piece)
        merges.append((pieces[first], pieces[second]))
        new = len(pieces)
        pieces.append(piece)
        touched: set[int] = set()
        for index in where.pop(pair):
            ids, count = words[index]
            joined = _merge(ids, {pair: new}, 1 << 20)
            if len(joined) == len(ids):
                continue
            words[index] = joined, count
            for old in _pairs(ids):
                pair_counts[old] -= count
            for fresh in _pairs(joined):
                pair_counts[fresh] += count
                if fresh >> 20 == new or fresh & 0xFFFFF == new:
                    where[fresh].add(index)
                    touched.add(fresh)
        for fresh in touched:
            if pair_counts[fresh] >= min_count:
                heapq.heappush(heap, (-pair_counts[fresh], fresh))
    return merges


def _pairs(ids: list[int]) -> list[int]:
    return [first << 20 | second for first, second in zip(ids, ids[1:], strict=False)]
