"""Byte-pair encoding of single words: merge files, merging and learning (Sennrich et al. 2016, on bytes).

A word is spelled in bytes, the last of which is marked as the end of the word (``</w>``), and merges join
neighbours in the order in which they were learned. Ids: 256 bytes, 256 bytes that end a word, then one
piece for each merge. Bytes are written in GPT-2's printable spelling (Radford et al. 2019), so merge files
are readable text.

A merge file, gzipped: the line ``#version: 0.2``, then ``first second`` a line, each joining two older
pieces to a new one.

Not in here: how a text is cleaned and cut into words, and special ids; see ``edgeclip.tokenizer``.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from edgeclip.errors import BundleError

__all__ = ["MAX_FILE_BYTES", "MAX_MERGES", "Merges", "learn_merges", "pack_merges"]

MAX_FILE_BYTES = 8 << 20  # decompressed; CLIP's merges are 0.5 MB
MAX_MERGES = 1 << 19
_HEADER = b"#version: 0.2\n"
_NO_MERGE = 1 << 62
_LONG_WORD = 64  # bytes from which the heap beats scanning


def _byte_spelling() -> list[tuple[int, str]]:
    """Return (byte, printable character) in the order of the ids 0 to 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [(byte, chr(byte)) for byte in printable] + [(byte, chr(256 + n)) for n, byte in enumerate(others)]


_SPELLING = _byte_spelling()
_ID_OF_BYTE = bytes(
    identifier for _, identifier in sorted((byte, i) for i, (byte, _) in enumerate(_SPELLING))
)
_BYTE_OF_CHARACTER = {character: byte for byte, character in _SPELLING}
_BYTE_PIECES = [character for _, character in _SPELLING] + [character + "</w>" for _, character in _SPELLING]
_BYTE_COUNT = len(_BYTE_PIECES)


class Merges:
    """The merges of one vocabulary, in order. Immutable, so safe to use from many threads.

    Args:
        packed: the contents of a ``merges.txt.gz``.

    Attributes:
        size: number of pieces; the ids of words are below it.
        content: the merge file, decompressed.

    Raises:
        BundleError: the file is damaged, or no merge file.
    """

    def __init__(self, packed: bytes) -> None:
        self.content = _gunzip(packed)
        self._joined, self.size = _read_merges(self.content)

    def encode(self, word: str) -> list[int]:
        """Return the ids of one word, which must not be empty."""
        ids = _spell(word)
        return (_merge if len(ids) < _LONG_WORD else _merge_long)(ids, self._joined, self.size)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, a space where a word ends; what is no UTF-8 becomes U+FFFD."""
        pieces = self.pieces()
        spelled = "".join([pieces[identifier] for identifier in ids])
        encoded = bytes(_BYTE_OF_CHARACTER[character] for character in spelled)
        return encoded.decode("utf-8", "replace").replace("</w>", " ")

    def pieces(self) -> list[str]:
        """Return the printable spelling of every id. Made anew from the file: for people and tests."""
        return [piece.decode() for piece in _pieces(self.content[len(_HEADER) :])]


def _spell(word: str) -> list[int]:
    """Return the ids of the bytes of a word, the last one as the end of the word."""
    try:
        encoded = word.encode()
    except UnicodeEncodeError:  # a lone surrogate, which no cleaning repaired
        encoded = word.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    ids = list(encoded.translate(_ID_OF_BYTE))
    ids[-1] += 256
    return ids


# --- merging -----------------------------------------------------------------------------------------------


def _merge(ids: list[int], joined: dict[int, int], size: int) -> list[int]:
    """Join neighbours, the oldest merge first and each from left to right, until none is left.

    Args:
        ids: one word.
        joined: ``{first id * size + second id: id of the joined piece}``; the older the merge, the smaller
        its id.
        size: number of pieces.
    """
    get = joined.get
    while len(ids) > 1:
        found = [get(first * size + second, _NO_MERGE) for first, second in pairwise(ids)]
        best = min(found)
        if best == _NO_MERGE:
            break
        at = found.index(best)
        result = ids[:at]
        last = len(ids) - 1
        while at < last:
            if found[at] == best:
                result.append(best)
                at += 2
            else:
                result.append(ids[at])
                at += 1
        if at == last:
            result.append(ids[last])
        ids = result
    return ids


def _merge_long(ids: list[int], joined: dict[int, int], size: int) -> list[int]:
    """Do the same in n log n steps, for words of any length.

    New pairs are always younger than the merge that made them (`_read_merges` checks it), so taking the least
    (id of the joined piece, place) from a heap is taking the oldest merge, leftmost first.
    """
    ids = list(ids)
    end = len(ids)
    following = list(range(1, end + 1))
    previous = list(range(-1, end - 1))
    heap: list[tuple[int, int, int]] = []

    def offer(left: int, right: int) -> None:
        piece = joined.get(ids[left] * size + ids[right])
        if piece is not None:
            heapq.heappush(heap, (piece, left, right))

    for place in range(end - 1):
        offer(place, place + 1)
    while heap:
        piece, left, right = heapq.heappop(heap)
        # Stale if one side was joined to something else since; a consumed place is -1.
        if ids[left] < 0 or following[left] != right or joined.get(ids[left] * size + ids[right]) != piece:
            continue
        ids[left], ids[right] = piece, -1
        following[left] = after = following[right]
        if after < end:
            previous[after] = left
            offer(left, after)
        if previous[left] >= 0:
            offer(previous[left], left)
    return [identifier for identifier in ids if identifier >= 0]


# --- merge files -------------------------------------------------------------------------------------------


def pack_merges(merges: Iterable[tuple[str, str]]) -> bytes:
    """Return the merge file of printable pairs; the same merges and zlib give the same bytes."""
    content = _HEADER + "".join(f"{first} {second}\n" for first, second in merges).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(content) + packer.flush()
    # No time, no file name and no system in the header.
    head = b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"
    return head + body + zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")


def _gunzip(packed: bytes) -> bytes:
    """Decompress a gzip file of one member, never to more than the limit."""
    reader = zlib.decompressobj(wbits=31)
    try:
        content = reader.decompress(packed, MAX_FILE_BYTES + 1)
    except zlib.error as error:
        raise BundleError(f"merges.txt.gz: cannot be decompressed ({error}); copy it again.") from error
    if len(content) > MAX_FILE_BYTES:
        raise BundleError(f"merges.txt.gz: holds more than {MAX_FILE_BYTES} bytes; no vocabulary needs that.")
    if not reader.eof:
        raise BundleError(f"merges.txt.gz: ends too early, after {len(packed)} bytes; copy it again.")
    if reader.unused_data:
        raise BundleError(f"merges.txt.gz: {len(reader.unused_data)} bytes follow its end; write it again.")
    return content


def _read_merges(content: bytes) -> tuple[dict[int, int], int]:
    """Parse a decompressed merge file into the table of `_merge` and the number of pieces.

    No Python loop runs over the lines and no text is decoded, so CLIP's 48,894 take some 30 ms.
    """
    if not content.startswith(_HEADER):
        raise BundleError(f"merges.txt.gz: it begins with {content[:40]!r}, expected {_HEADER!r}.")
    body = content[len(_HEADER) :]
    sides = _sides(body)
    pieces = _pieces(body)
    size = len(pieces)
    ids = dict(zip(pieces, range(size), strict=True))
    if len(ids) != size:
        twice, _ = Counter(pieces).most_common(1)[0]
        raise BundleError(
            f"merges.txt.gz: the piece {_shown(twice)} is made twice; each merge must make a new one."
        )
    try:
        pairs = np.fromiter(map(ids.__getitem__, sides), np.int64, len(sides)).reshape(-1, 2)
    except KeyError as error:
        side = error.args[0]
        line = sides.index(side) // 2 + 2
        raise BundleError(f"merges.txt.gz: line {line} joins {_shown(side)}, which no line makes.") from error
    late = np.flatnonzero(pairs.max(axis=1, initial=0) >= np.arange(_BYTE_COUNT, size))
    if len(late):
        raise BundleError(f"merges.txt.gz: line {int(late[0]) + 2} joins a piece that no earlier line makes.")
    keys = pairs[:, 0] * size + pairs[:, 1]
    return dict(zip(keys.tolist(), range(_BYTE_COUNT, size), strict=True)), size


def _pieces(body: bytes) -> list[bytes]:
    """Return the printable spelling of every id, in UTF-8."""
    return [piece.encode() for piece in _BYTE_PIECES] + body.replace(b" ", b"").split(b"\n")[:-1]


def _sides(body: bytes) -> list[bytes]:
    """Return both sides of every merge, one after the other; each line must be ``first second``."""
    raw = np.frombuffer(body, np.uint8)
    separators = raw[raw <= ord(" ")]
    if len(separators) > 2 * MAX_MERGES:
        raise BundleError(
            f"merges.txt.gz: holds {len(separators) // 2} merges, expected at most {MAX_MERGES}."
        )
    sides = body.split()
    in_turn = len(separators) % 2 == 0 and bool(
        np.all(separators[0::2] == ord(" ")) and np.all(separators[1::2] == ord("\n"))
    )
    # As many sides as separators: no side is empty.
    if in_turn and len(sides) == len(separators) and (not body or body.endswith(b"\n")):
        return sides
    for number, line in enumerate(body.split(b"\n")[:-1], start=2):
        parts = line.split(b" ")
        if len(parts) != 2 or not all(parts) or min(line) < ord(" "):
            raise BundleError(f"merges.txt.gz: line {number} is {_shown(line)}, expected 'first second'.")
    raise BundleError("merges.txt.gz: its last line is cut off; copy it again.")


def _shown(spelled: bytes) -> str:
    return repr(spelled[:40].decode("utf-8", "replace"))


# --- learning ----------------------------------------------------------------------------------------------


def learn_merges(counts: Counter[str], *, most: int, min_count: int) -> list[tuple[str, str]]:
    """Return the merges learned from words and how often each occurs, in printable spelling.

    Counts are kept up to date pair by pair: a merge costs the words it changes, not the corpus. Of pairs
    that occur equally often the one with the smaller ids comes first. A pair whose joined letters are a
    piece already (possible in runs such as "aaaaa") is passed over, because an id names one piece.

    Args:
        counts: words, cut as they will be cut when encoding.
        most: number of merges at most.
        min_count: pairs that occur less often are not joined.
    """
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
    while heap and len(merges) < most:
        negative, pair = heapq.heappop(heap)
        if pair_counts[pair] != -negative:  # counts only fall once a pair was offered: offer it again, lower
            if pair_counts[pair] >= min_count:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        first, second = pieces[pair >> 20], pieces[pair & 0xFFFFF]
        if first + second in made:
            continue
        new = len(pieces)
        pieces.append(first + second)
        made.add(first + second)
        merges.append((first, second))
        touched: set[int] = set()
        for index in where.pop(pair):
            ids, count = words[index]
            joined = _merge(ids, {pair: new}, 1 << 20)
            words[index] = joined, count
            for old in _pairs(ids):
                pair_counts[old] -= count
            for fresh in _pairs(joined):
                pair_counts[fresh] += count
                if new in (fresh >> 20, fresh & 0xFFFFF):
                    where[fresh].add(index)
                    touched.add(fresh)
        for fresh in touched:
            if pair_counts[fresh] >= min_count:
                heapq.heappush(heap, (-pair_counts[fresh], fresh))
    return merges


def _pairs(ids: list[int]) -> list[int]:
    return [first << 20 | second for first, second in pairwise(ids)]
