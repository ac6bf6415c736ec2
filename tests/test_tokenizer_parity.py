"""Token ids equal those of open_clip's SimpleTokenizer, text by text."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeclip.tokenizer import Tokenizer, _ftfy

pytest.importorskip("torch")
import torchvision_shim  # noqa: F401  (open_clip imports torchvision)

pytest.importorskip("open_clip")
from open_clip.tokenizer import SimpleTokenizer, default_bpe


def items(text: str) -> list[str]:
    return text.split(" ")


ENGLISH = [
    *items(
        "a photo of the cat dogs naïve café it's we're I'VE don't they'LL CLIP O'Reilly's rock'n'roll 'tis"
    ),
    *items("1234 3.14 50% x86 state-of-the-art C++ #1 @home e-mail <|endoftext|> </w> <unk>"),
    *items("<start_of_text> <end_of_text> <END_OF_TEXT>"),
]
REFERENCES = [
    *items("&amp; &lt; &gt &eacute; &EACUTE; &amp;amp; &amp;eacute; &amp;amp;lt; &#233; &#xe9; &#x1F600;"),
    *items("&nbsp; &Atilde;&copy; &; &#; &#0; &#x80; &#xD800; &#99999999; &notanentity; &copy &ampamp;"),
    *items("&lt;start_of_text&gt; &#27;[0m"),
]
SPACES = [
    *" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff",
    "\r\n",
]
CONTROLS = [
    *map(chr, [*range(32), *range(127, 160)]),
    *items("\x1b[36;44m \x1b[0m \u200d \ufe0f \u202e \ufff9 \u206b"),
]
REPAIRED = [
    *items("Ã© â€™ â€œquoteâ€\x9d Ã¢â‚¬â„¢ ðŸ˜€ Â£ l’humanitÃ© schÃ¶n ÐŸÑ€Ð¸Ð²ÐµÑ‚ æ–‡å\xad— ï¬\x81n"),
    *items("ﬁ ﬂ ＬＯＵＤ “curly” ‘it’s’ ſ 'ſ \u212a ı İ ẞ ǅ ｶﾞ ﾊﾝｶｸ <ſtart_of_text> e\u0301"),
    *items("\ud83d\ude00 \ud800 \udc00"),
]
PICTURES = items("😀 👩‍👩‍👧 🇩🇪 👍🏽 ❤️ ☃ 🏴‍☠️ ① ½ Ⅷ ٣ ४ 零 〇 ㊗ ™ €")


def any_character(rng: random.Random) -> str:
    return chr(rng.randrange(rng.choice([0x80, 0x300, 0x3000, 0x1_0000, 0x11_0000])))


def chinese(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(0x4E00, 0xA000)) for _ in range(rng.randint(1, 5)))


PIECES: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: rng.choice(ENGLISH),
    lambda rng: rng.choice(ENGLISH) + " ",
    chinese,
    lambda rng: rng.choice(REFERENCES),
    lambda rng: rng.choice(SPACES) * rng.randint(1, 3),
    lambda rng: rng.choice(CONTROLS),
    lambda rng: rng.choice(REPAIRED),
    lambda rng: rng.choice(PICTURES),
    lambda rng: "".join(chr(rng.randrange(128)) for _ in range(rng.randint(1, 12))),
    lambda rng: "".join(any_character(rng) for _ in range(rng.randint(1, 6))),
    lambda rng: "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABC'", k=rng.randint(1, 14))),
    lambda rng: " ",
)


def random_text(rng: random.Random) -> str:
    kinds = rng.choice([PIECES, PIECES[:2], (rng.choice(PIECES),)])
    return "".join(rng.choice(kinds)(rng) for _ in range(rng.randint(0, 14)))


@pytest.fixture(scope="module")
def theirs() -> Any:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.clip()


def assert_equal_texts(texts: list[str], ours: Tokenizer, theirs: Any) -> None:
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), ascii(text)
    np.testing.assert_array_equal(ours(texts, truncate=True), theirs(texts).numpy())


def test_the_merges_are_open_clips_used_ones(ours: Tokenizer) -> None:
    lines = gzip.decompress(ours.files["merges.txt.gz"]).split(b"\n")
    with gzip.open(default_bpe()) as file:
        assert lines[1:-1] == file.read().split(b"\n")[1 : 49152 - 256 - 2 + 1]


def test_ids_and_pieces_are_open_clips(ours: Tokenizer, theirs: Any) -> None:
    pieces = ours._merges.pieces()
    assert {piece: index for index, piece in enumerate(pieces)} == {
        piece: index for piece, index in theirs.encoder.items() if index < 49_406
    }
    assert (ours.config.special.start, ours.config.special.end) == (theirs.sot_token_id, theirs.eot_token_id)
    assert ours.vocab_size == theirs.vocab_size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00",
        "a photo of a cat",
        "it's the dogs' 2nd TOY, isn't it?",
        "一只猫坐在垫子上",
        "&amp;amp;lt; caf&eacute; &#x1F600;",
        "naïve façade Ångström ﬁne",
        "schÃ¶n â€œquoteâ€\x9d",
        "👩‍👩‍👧🇩🇪👍🏽",
        "a\x0bb\x1cc\x85d\u2028e\ufefff",
        "\x1b[31mred\x1b[0m",
        "<start_of_text>a<END_OF_TEXT>",
        "x" * 10_000,
        "猫" * 10_000,
        "cat " * 2_500,
        "é&amp;😀 " * 1_250,
        "".join(random.Random(0).choices("abcdefghij", k=10_000)),
        "a" + "\u0301\u0323" * 2_000,
    ],
    ids=lambda text: f"{len(text)}-{text[:12]!a}",
)
def test_chosen_texts_give_open_clips_ids(text: str, ours: Tokenizer, theirs: Any) -> None:
    assert_equal_texts([text], ours, theirs)


def test_random_texts_give_open_clips_ids(ours: Tokenizer, theirs: Any) -> None:
    rng = random.Random(0)
    assert_equal_texts([random_text(rng) for _ in range(1_500)], ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_30_000_random_texts_give_open_clips_ids(seed: int, ours: Tokenizer, theirs: Any) -> None:
    rng = random.Random(seed)
    assert_equal_texts([random_text(rng) for _ in range(6_000)], ours, theirs)


@pytest.mark.slow
def test_every_character_gives_open_clips_ids(ours: Tokenizer, theirs: Any) -> None:
    # Each code point of the planes that hold letters, between letters, where cleaning and cutting matter.
    for first in [*range(0, 0x3_2400, 16), *range(0xE_0000, 0xE_0200, 16), *range(0x10_FF00, 0x11_0000, 16)]:
        text = "".join(f"a{chr(code)}B " for code in range(first, first + 16))
        assert ours.encode(text) == theirs.encode(text), hex(first)


def test_decoding_equals_open_clips(ours: Tokenizer, theirs: Any) -> None:
    rng = random.Random(3)
    for _ in range(100):
        ids = [identifier for identifier in theirs.encode(random_text(rng)) if identifier < 49_406]
        assert ours.decode(ids) == theirs.decode(ids).rstrip(" ")


def test_skipping_ftfy_for_plain_ascii_changes_nothing() -> None:
    import ftfy

    printable = [chr(code) for code in range(32, 127)]
    texts = [first + second for first in printable for second in printable]
    rng = random.Random(4)
    texts += ["".join(rng.choices(printable, k=rng.randint(3, 40))) for _ in range(5_000)]
    texts += ["".join(chr(rng.randrange(128)) for _ in range(8)) for _ in range(5_000)]
    for text in texts:
        assert _ftfy(text) == ftfy.fix_text(text), repr(text)
