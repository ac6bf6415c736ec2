"""Labels a model cannot know are warned about, and word lists are checked before they are believed."""

from __future__ import annotations

import random
import struct
import unicodedata

import pytest

from edgeclip.errors import BundleError
from edgeclip.tokenizer import Tokenizer, train_bpe
from edgeclip.words import WordList, build_words, label_warnings, scripts_of, split_words

TEXTS = [
    "a photo of a cat",
    "a photo of a dog",
    "many boxes, ponies and glasses",
    "the Volkswagen Beetle",
    "一只猫在睡觉",
    "狗",
    "crème brûlée",
]


@pytest.fixture(scope="module")
def bilingual() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=600, languages=("en", "zh")).with_words(build_words(TEXTS))


@pytest.fixture(scope="module")
def without_list() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=600, languages=("en", "zh"))


@pytest.mark.parametrize(
    "labels", [["cat", "dog"], ["猫"], ["Cats", "DOGS"], ["a cat, 2 dogs!"], ["ｃａｔ"], []]
)
def test_known_labels_are_not_warned_about(labels: list[str], bilingual: Tokenizer) -> None:
    assert label_warnings(labels, ("en", "zh"), bilingual) == []


def test_words_that_are_not_in_the_list_are_named(bilingual: Tokenizer) -> None:
    (warning,) = label_warnings(["gato", "perro"], ("en", "zh"), bilingual)
    assert warning == (
        "2 of 2 words (100 %) are not in the list the text tower was trained on: 'gato', 'perro'. "
        "Expect poor scores, or use other names."
    )


def test_foreign_letters_are_named_with_the_languages(bilingual: Tokenizer, without_list: Tokenizer) -> None:
    expected = (
        "1 of 2 labels (50 %) is written in cyrillic letters, but the model was trained on en, zh: 'кошка'. "
        "Expect arbitrary scores."
    )
    assert label_warnings(["кошка", "cat"], ("en", "zh"), bilingual) == [expected]
    assert label_warnings(["кошка", "cat"], ("en", "zh"), without_list) == [expected]


def test_without_a_list_only_letters_are_judged(without_list: Tokenizer) -> None:
    assert label_warnings(["gato", "🐱", "747"], ("en", "zh"), without_list) == []


def test_chinese_is_foreign_to_an_english_model(without_list: Tokenizer) -> None:
    assert "han letters" in label_warnings(["猫"], ("en",), without_list)[0]


def test_a_label_without_words_is_named_where_there_is_a_list(bilingual: Tokenizer) -> None:
    assert label_warnings(["🐱", "cat"], ("en", "zh"), bilingual) == [
        "1 of 2 labels (50 %) is without any word: '🐱'. Expect arbitrary scores."
    ]


def test_many_labels_are_counted_and_few_are_quoted(bilingual: Tokenizer) -> None:
    (warning,) = label_warnings([f"слово{'а' * n}" for n in range(100)], ("en",), bilingual)
    assert warning.startswith("100 of 100 labels (100 %) are written in cyrillic letters")
    assert "and 95 more" in warning
    assert len(warning) < 500


def test_whatever_the_labels_hold_each_warning_is_one_short_line(bilingual: Tokenizer) -> None:
    rng = random.Random(5)
    odd = ["", "\n", "\ud800", "猫\x00", "a\u0301" * 3, "e" + "\u0301\u0323" * 500_000, "ж" * 10_000]
    for _ in range(200):
        labels = rng.sample(odd, 3) + [
            "".join(chr(rng.randrange(0x11_0000)) for _ in range(9)) for _ in range(9)
        ]
        for warning in label_warnings(labels, ("en", "zh"), bilingual):
            assert len(warning) < 800
            assert warning.isprintable()


def test_unknown_languages_are_not_judged(without_list: Tokenizer) -> None:
    assert label_warnings(["кошка"], ("tlh",), without_list) == []
    assert label_warnings(["кошка"], (), without_list) == []


@pytest.mark.parametrize(
    ("label", "languages"),
    [
        ("кошка", ("ru",)),
        ("ネコ 猫", ("ja",)),
        ("고양이", ("ko",)),
        ("γάτα", ("el",)),
        ("قطة", ("ar",)),
        ("बिल्ली", ("hi",)),
        ("חתול", ("he",)),
        ("แมว", ("th",)),
        ("Kätzchen", ("de-AT",)),
        ("貓", ("zh-Hant",)),
        ("mačka мачка", ("sr",)),
        ("mèo", ("vi_VN",)),
    ],
)
def test_labels_in_the_scripts_of_their_language_are_fine(
    label: str, languages: tuple[str, ...], without_list: Tokenizer
) -> None:
    assert label_warnings([label], languages, without_list) == []


@pytest.mark.parametrize(
    "word", ["cat", "cats", "boxes", "box", "pony", "ponies", "glasses", "glass", "dogs", "x"]
)
def test_plurals_and_single_letters_are_known(word: str) -> None:
    assert WordList(build_words(TEXTS)).knows(word)


@pytest.mark.parametrize("word", ["ca", "c猫", "catss", "gatos", "minibus", "é"])
def test_what_only_looks_like_a_plural_is_unknown(word: str) -> None:
    assert not WordList(build_words(TEXTS)).knows(word)


def test_words_are_runs_of_letters_and_single_han_characters() -> None:
    assert split_words("The cat's 2 BEDs, l'Été") == ["the", "cat", "s", "beds", "l", "été"]
    assert split_words("猫と犬 cat猫") == ["猫", "と", "犬", "cat", "猫"]
    assert split_words("हिन्दी, ｆｕｌｌ") == ["हिन्दी", "full"]
    assert split_words("123 🐱 \ud800") == []


def test_ascii_words_are_split_as_others_are() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(chr(rng.randrange(128)) for _ in range(40))
        assert split_words(text) == split_words(text + " 猫")[:-1]


def test_unknown_share_counts_words(bilingual: Tokenizer, without_list: Tokenizer) -> None:
    assert bilingual.unknown_share("a photo of a gato") == pytest.approx(0.2)
    assert bilingual.unknown_share("2024") is None
    assert without_list.unknown_share("a photo") is None


def test_rare_words_are_left_out() -> None:
    words = WordList(build_words(["cat cat", "dog"], min_count=2))
    assert "cat" in words
    assert "dog" not in words
    assert len(words) == 1


def test_the_form_is_frozen() -> None:
    assert build_words(["猫 cat", "Cat dog"]).hex() == FROZEN
    assert build_words(["dog cat", "cat 猫"]).hex() == FROZEN


FROZEN = "4543574f524453000100000003000000a68cf446f73e71a06a8b12bb"


def test_a_list_without_words_is_a_list() -> None:
    words = WordList(build_words([]))
    assert len(words) == 0
    assert not words.knows("cat")


def test_membership_is_exact_on_100_000_words() -> None:
    rng = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    inside = {"".join(rng.choices(letters, k=8)) for _ in range(100_000)}
    words = WordList(build_words(inside))
    assert all(word in words for word in rng.sample(sorted(inside), 2_000))
    outside = {"".join(rng.choices(letters, k=9)) for _ in range(20_000)}
    assert sum(word in words for word in outside) <= 4  # 0.5 expected by chance


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:10], "got 10 bytes, expected at least 16"),
        (lambda data: b"X" + data[1:], "signature b'XCWORDS"),
        (lambda data: data[:8] + struct.pack("<I", 2) + data[12:], "got version 2, expected 1"),
        (lambda data: data[:-1], "expected 28 for 3 words"),
        (lambda data: data + b"\0", "got 29 bytes, expected 28"),
        (lambda data: data[:12] + struct.pack("<I", 2**32 - 1) + data[16:], "for 4294967295 words"),
        (lambda data: data[:16] + data[20:24] + data[16:20] + data[24:], "not in increasing order"),
        (lambda data: data[:16] + data[16:20] * 3, "not in increasing order"),
    ],
)
def test_a_damaged_list_is_an_error(damage: object, message: str) -> None:
    data = build_words(["cat dog 猫"])
    with pytest.raises(BundleError, match=message):
        WordList(damage(data))  # type: ignore[operator]


def test_scripts_agree_with_the_names_of_characters() -> None:
    # An independent source: the Unicode name of a letter begins with its script.
    own_name = ("latin", "greek", "cyrillic", "hebrew", "arabic", "devanagari", "thai", "hangul", "georgian")
    own_name += ("armenian", "tamil", "bengali", "ethiopic", "khmer", "lao", "myanmar")
    named = {name.upper(): name for name in own_name} | {"HIRAGANA": "kana", "KATAKANA": "kana", "CJK": "han"}
    judged = 0
    for code in [*range(0x3100), *range(0x4E00, 0xD7A4, 7), *range(0x20000, 0x2A6D7, 101)]:
        character = chr(code)
        script = named.get(unicodedata.name(character, "").split(" ")[0])
        if script is None or not character.isalpha() or unicodedata.normalize("NFKC", character) != character:
            continue
        judged += 1
        found = scripts_of(character)
        assert found <= {script}, (hex(code), unicodedata.name(character), found)
        exact = script in ("han", "hangul", "kana", "cyrillic", "greek") and not 0x1D00 <= code < 0x1DC0
        if code < 0x250 or exact:  # elsewhere the table leaves out phonetic signs and rare extensions
            assert found == {script}, (hex(code), unicodedata.name(character))
    assert judged > 5_000
