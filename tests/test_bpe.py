"""Merging and learning agree with naive and foreign implementations; merge files are checked line by line."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections import Counter
from itertools import pairwise

import pytest

from edgeclip.bpe import MAX_FILE_BYTES, Merges, learn_merges, pack_merges
from edgeclip.errors import BundleError

HEADER = b"#version: 0.2\n"


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def random_words(seed: int, count: int, letters: str = "abcde猫", longest: int = 9) -> Counter[str]:
    rng = random.Random(seed)
    words: Counter[str] = Counter()
    for _ in range(count):
        words["".join(rng.choices(letters, k=rng.randint(1, longest)))] += rng.randint(1, 40)
    return words


def printable(word: str) -> list[str]:
    """Return the printable spelling of the bytes of a word, as GPT-2's encoder writes it."""
    printable_bytes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = []
    for byte in word.encode():
        if byte in printable_bytes:
            spelled.append(chr(byte))
        else:
            spelled.append(chr(256 + sum(1 for other in range(byte) if other not in printable_bytes)))
    spelled[-1] += "</w>"
    return spelled


def joined_once(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    at = 0
    while at < len(symbols):
        if tuple(symbols[at : at + 2]) == pair:
            result.append("".join(pair))
            at += 2
        else:
            result.append(symbols[at])
            at += 1
    return result


def naive_learning(words: Counter[str], most: int, ids: dict[str, int]) -> tuple[list[tuple[str, str]], int]:
    """Learn merges by counting all pairs anew each time; also return how many came before the first tie."""
    state = [(printable(word), count) for word, count in sorted(words.items())]
    merges: list[tuple[str, str]] = []
    before_tie = -1
    while len(merges) < most:
        counts: Counter[tuple[str, str]] = Counter()
        for symbols, count in state:
            for pair in pairwise(symbols):
                counts[pair] += count
        counts = Counter({pair: count for pair, count in counts.items() if "".join(pair) not in ids})
        if not counts or max(counts.values()) < 2:
            break
        most_common = max(counts.values())
        best = [pair for pair, count in counts.items() if count == most_common]
        if len(best) > 1 and before_tie < 0:
            before_tie = len(merges)
        pair = min(best, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges.append(pair)
        ids["".join(pair)] = len(ids)
        state = [(joined_once(symbols, pair), count) for symbols, count in state]
    return merges, before_tie


def naive_encoding(word: str, merges: list[tuple[str, str]]) -> list[str]:
    symbols = printable(word)
    for pair in merges:
        symbols = joined_once(symbols, pair)
    return symbols


@pytest.mark.parametrize("seed", range(4))
def test_learning_equals_counting_all_pairs_anew(seed: int) -> None:
    words = random_words(seed, 60, letters="aab猫狗cd")
    ids = {piece: index for index, piece in enumerate(Merges(pack_merges([])).pieces())}
    expected, _ = naive_learning(words, 80, ids)
    assert len(expected) > 40
    assert learn_merges(words, most=80, min_count=2) == expected


def test_learning_agrees_with_huggingface_until_the_first_tie() -> None:
    # Of pairs that occur equally often we join the one with smaller ids; the tokenizers library numbers its
    # alphabet differently, so the two can only be compared as long as no tie was met.
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(7)
    words = Counter({word: rng.randint(1, 5_000) for word in random_words(3, 50, letters="abcdefgh")})
    ids = {piece: index for index, piece in enumerate(Merges(pack_merges([])).pieces())}
    _, before_tie = naive_learning(words, 60, ids)
    assert before_tie >= 15

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=2, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([" ".join([word] * count) for word, count in words.items()], trainer)
    theirs = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    assert learn_merges(words, most=before_tie, min_count=2) == theirs[:before_tie]


def test_encoding_equals_huggingface_and_the_naive_way() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    learned = learn_merges(random_words(1, 200), most=150, min_count=2)
    merges = Merges(pack_merges(learned))
    pieces = merges.pieces()
    model = tokenizers.models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=learned, end_of_word_suffix="</w>"
    )
    for word in random_words(2, 300, longest=90):
        spelled = printable(word)
        theirs = [token.id for token in model.tokenize("".join(spelled).removesuffix("</w>"))]
        ours = merges.encode(word)
        assert ours == theirs
        assert [pieces[identifier] for identifier in ours] == naive_encoding(word, learned)


@pytest.mark.parametrize("letters", ["ab", "a", "abcdefgh猫"])
def test_long_words_are_encoded_as_short_ones_are(letters: str) -> None:
    learned = learn_merges(random_words(5, 300, letters=letters, longest=30), most=200, min_count=2)
    merges = Merges(pack_merges(learned))
    rng = random.Random(6)
    for length in (63, 64, 65, 100, 301):
        word = "".join(rng.choices(letters, k=length))
        assert [merges.pieces()[i] for i in merges.encode(word)] == naive_encoding(word, learned)


def test_a_word_of_10_000_letters_is_encoded() -> None:
    learned = learn_merges(random_words(5, 300, letters="abc"), most=200, min_count=2)
    merges = Merges(pack_merges(learned))
    word = "".join(random.Random(1).choices("abc", k=10_000))
    assert merges.decode(merges.encode(word)) == word + " "


def test_learning_does_not_depend_on_the_order_of_words() -> None:
    words = random_words(9, 100)
    backwards = Counter(dict(reversed(list(words.items()))))
    assert learn_merges(words, most=90, min_count=2) == learn_merges(backwards, most=90, min_count=2)


def test_learning_stops_at_the_least_count() -> None:
    merges = learn_merges(Counter({"ab": 5, "cd": 4}), most=10, min_count=5)
    assert merges == [("a", "b</w>")]


def test_every_merge_makes_a_new_piece_even_in_runs_of_one_letter() -> None:
    words = Counter({"a" * length: 50 - length for length in range(1, 40)})
    learned = learn_merges(words, most=60, min_count=2)
    assert len({"".join(pair) for pair in learned}) == len(learned)
    Merges(pack_merges(learned))


def test_all_256_bytes_can_be_spelled() -> None:
    merges = Merges(pack_merges([]))
    text = "".join(map(chr, range(0x800))) + "猫🐱\U0010ffff"
    assert merges.decode(merges.encode(text)) == text + " "
    assert merges.size == 512


def test_lone_surrogates_become_replacement_characters() -> None:
    merges = Merges(pack_merges([]))
    assert merges.encode("a\ud800b") == merges.encode("a\ufffdb")
    assert merges.encode("\ud83d\ude00") == merges.encode("😀")


def test_merge_files_are_the_same_bytes_each_time() -> None:
    data = pack_merges([("a", "b"), ("ab", "c</w>")])
    assert data == pack_merges([("a", "b"), ("ab", "c</w>")])
    assert data[:10] == b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"  # no time, no name, no system
    assert gzip.decompress(data) == HEADER + b"a b\nab c</w>\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with b''"),
        (b"a b\n", "begins with b'a b"),
        (HEADER + b"a\n", "line 2 is 'a'"),
        (HEADER + b"a b\na b c\n", "line 3 is 'a b c'"),
        (HEADER + b"a  b\n", "line 2 is 'a  b'"),
        (HEADER + b"a b \n", "line 2 is 'a b '"),
        (HEADER + b"a b\n\nb c\n", "line 3 is ''"),
        (HEADER + b"a\x1cb c\n", "line 2 is 'a"),
        (HEADER + b"a b\r\n", "line 2 is 'a b\\\\r'"),
        (HEADER + b"a\tb\n", "line 2 is 'a\\\\tb'"),
        (HEADER + "a\u00a0 b\n".encode(), "line 2 joins 'a\\\\xa0', which no line makes"),
        (HEADER + b"a b", "last line is cut off"),
        (HEADER + b"a b\nc", "last line is cut off"),
        (HEADER + b"\xff\xfe b\n", "line 2 joins '��', which no line makes"),
        (HEADER + b"a xyz\n", "line 2 joins 'xyz', which no line makes"),
        (HEADER + b"ab c\na b\n", "line 2 joins a piece that no earlier line makes"),
        (HEADER + b"a b\nb c\na b\n", "'ab' is made twice"),
        (HEADER + b"a b\nb c\nab c\na bc\n", "'abc' is made twice"),
        (HEADER + b"a </w>\n", "line 2 joins '</w>'|'a</w>' is made twice"),
    ],
)
def test_a_wrong_line_is_named(content: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Merges(packed(content))
    assert "\n" not in str(caught.value)


def test_cut_gzip_is_an_error() -> None:
    with pytest.raises(BundleError, match="ends too early, after 30 bytes"):
        Merges(pack_merges([("a", "b"), ("c", "d")])[:30])


def test_bytes_after_the_gzip_are_an_error() -> None:
    with pytest.raises(BundleError, match="3 bytes follow its end"):
        Merges(pack_merges([("a", "b")]) + b"xyz")


@pytest.mark.parametrize("data", [b"", b"not gzip at all", b"\x1f\x8b\x08\0\0\0\0\0\x02\xff\xff\xff\xff"])
def test_what_is_no_gzip_is_an_error(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"cannot be decompressed|ends too early"):
        Merges(data)


def test_a_damaged_byte_is_found_by_the_checksum() -> None:
    data = bytearray(pack_merges([("a", "b")]))
    data[-6] ^= 1
    with pytest.raises(BundleError, match="cannot be decompressed"):
        Merges(bytes(data))


def test_a_decompression_bomb_is_refused_without_being_unpacked() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packer.compress(bytes(1 << 20))
    bomb += b"".join(packer.compress(bytes(1 << 20)) for _ in range(63)) + packer.flush()
    assert len(bomb) < 100_000
    with pytest.raises(BundleError, match=f"more than {MAX_FILE_BYTES} bytes"):
        Merges(bomb)


def test_too_many_merges_are_refused_before_they_are_read() -> None:
    with pytest.raises(BundleError, match="holds 600000 merges, expected at most 524288"):
        Merges(packed(HEADER + b"a b\n" * 600_000))
