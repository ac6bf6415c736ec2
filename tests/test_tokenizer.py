"""Texts become the right rows, files are checked before they are believed, ASCII imports nothing heavy."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.bpe import pack_merges
from edgeclip.errors import BundleError, EdgeClipError, InputError
from edgeclip.tokenizer import Tokenizer, train_bpe
from edgeclip.words import build_words

TEXTS = [
    "a photo of a cat",
    "a photo of a dog",
    "一只猫在睡觉",
    "一张狗的照片",
    "crème brûlée",
    "ネコがいる",
    "고양이 한 마리",
] * 3


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def bag() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=620, context_length=12, languages=("en", "zh"))


@pytest.fixture(scope="module")
def framed() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=620, context_length=12, languages=("en", "zh"), frame=True)


def settings(tokenizer: Tokenizer) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(tokenizer.files["tokenizer.json"])
    return loaded


def reopened(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    config = {**settings(tokenizer), **changes}
    return Tokenizer.from_bytes(json.dumps(config).encode(), tokenizer.files["merges.txt.gz"])


# --- rows
# ----------------------------------------------------------------------------------------------------


def test_clip_rows_are_framed_and_filled(clip: Tokenizer) -> None:
    rows = clip(["a photo of a cat", ""])
    assert rows.shape == (2, 77)
    assert rows.dtype == np.int32
    # The ids every CLIP implementation gives for this text.
    assert rows[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert rows[1, :3].tolist() == [49406, 49407, 0]
    assert (clip.vocab_size, clip.context_length, clip.pooling) == (49_408, 77, "argmax")


def test_the_clip_vocabulary_is_frozen(clip: Tokenizer) -> None:
    assert clip.digest == "0186d3a97a3a579d16d0aa17b31c5bd56419ac75ef03ed4991d08a6e209daae2"


def test_one_text_is_a_batch_of_one(clip: Tokenizer) -> None:
    np.testing.assert_array_equal(clip("a cat"), clip(["a cat"]))


def test_no_texts_are_an_empty_batch(clip: Tokenizer) -> None:
    assert clip([]).shape == (0, 77)


def test_a_batch_equals_its_texts_one_by_one(bag: Tokenizer) -> None:
    np.testing.assert_array_equal(
        bag(TEXTS, truncate=True), np.concatenate([bag(t, truncate=True) for t in TEXTS])
    )


def test_a_bag_tower_gets_pieces_and_padding_only(bag: Tokenizer) -> None:
    row = bag("a cat")[0].tolist()
    ids = bag.encode("a cat")
    assert row == ids + [bag.config.special.pad] * (12 - len(ids))
    assert bag.config.special.pad == bag.vocab_size - 1
    assert bag.pooling == "mask"


def test_framed_rows_end_with_the_largest_id(framed: Tokenizer) -> None:
    rows = framed(["a cat", "一只猫在睡觉" * 9], truncate=True)
    assert framed.config.special.end == framed.vocab_size - 1
    assert rows.argmax(axis=1).tolist() == [1 + len(framed.encode("a cat")), 11]
    assert (rows[:, 0] == framed.config.special.start).all()


def test_a_text_that_is_too_long_is_an_error_unless_cut(clip: Tokenizer) -> None:
    texts = ["fine", "cat " * 200]
    with pytest.raises(
        InputError,
        match=r"text 1: got 202 tokens \(start and end included\), expected at most 77\. .*truncate=True",
    ):
        clip(texts)
    row = clip(texts, truncate=True)[1]
    assert row.tolist() == [49406] + [2368] * 75 + [49407]
    assert clip.count("cat " * 200) == 202


def test_a_text_that_just_fits_is_not_cut(clip: Tokenizer) -> None:
    np.testing.assert_array_equal(clip("cat " * 75), clip("cat " * 75, truncate=True))
    with pytest.raises(InputError, match="got 78 tokens"):
        clip("cat " * 76)


def test_the_context_length_is_a_choice() -> None:
    assert Tokenizer.clip(context_length=16)("a cat").shape == (1, 16)
    with pytest.raises(BundleError, match="context length of 2, expected 3"):
        Tokenizer.clip(context_length=2)


@pytest.mark.parametrize(
    ("texts", "message"), [([7], "text 0: got int"), (["a", None], "text 1: got NoneType")]
)
def test_what_is_no_text_is_an_error(texts: list[Any], message: str, clip: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        clip(texts)


def test_a_book_is_not_a_label(clip: Tokenizer) -> None:
    with pytest.raises(InputError, match="text 1: got 16385 characters, expected at most 16384"):
        clip(["a", "a" * 16_385], truncate=True)
    with pytest.raises(InputError, match="text: got 16385 characters"):
        clip.encode("a" * 16_385)


# --- what a text becomes
# -------------------------------------------------------------------------------------


def test_decoding_gives_the_cleaned_text(clip: Tokenizer, bag: Tokenizer, framed: Tokenizer) -> None:
    assert clip.decode(clip("A photo of a  CAT, 猫 &amp; 🐱!")[0]) == "a photo of a cat , 猫 & 🐱!"
    for tokenizer in (bag, framed):
        assert tokenizer.decode(tokenizer("Crème  猫 CAT")[0]) == "crème 猫 cat"
        assert tokenizer.decode([]) == ""


def test_decoding_an_unknown_id_is_an_error(bag: Tokenizer) -> None:
    with pytest.raises(
        InputError, match=f"token id: got {bag.vocab_size}, expected 0 to {bag.vocab_size - 1}"
    ):
        bag.decode([bag.vocab_size])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "A photo of TWO cats, it's 2024!",
            ["a", "photo", "of", "two", "cats", ",", "it", "'s", *"2024", "!"],
        ),
        ("一只cat猫", ["一", "只", "cat", "猫"]),
        ("ネコがいる", ["ネコがいる"]),
        ("猫とネコ、コーヒー", ["猫", "とネコ", "、", "コーヒー"]),
        ("고양이 한 마리", ["고양이", "한", "마리"]),
        ("हिन्दी बिल्ली", ["हिन्दी", "बिल्ली"]),
        ("ｆｕｌｌ　ｗｉｄｔｈ ①", ["full", "width", "1"]),
        ("ﬁsh ½", ["fish", "1", "⁄", "2"]),
        ("polar_bear", ["polar", "_", "bear"]),
        ("〇々𠀀", ["〇", "々", "𠀀"]),
        ("🐱‍👤 ok", ["🐱‍👤", "ok"]),
        ("", []),
        (" \t\n\u3000", []),
    ],
)
def test_our_pattern_cuts_han_characters_one_by_one(text: str, words: list[str], bag: Tokenizer) -> None:
    assert bag.split(text) == words


def test_our_pattern_agrees_with_its_ascii_form(bag: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(2_000):
        text = "".join(chr(rng.randrange(128)) for _ in range(rng.randint(0, 30)))
        assert bag.split(text) == bag.split(text + " 猫")[:-1]


def test_only_clip_reads_special_tokens_from_a_text(clip: Tokenizer, framed: Tokenizer) -> None:
    assert clip.encode("<start_of_text> a <END_OF_TEXT>") == [49406, 320, 49407]
    assert max(framed.encode("<start_of_text><end_of_text>")) < framed.config.special.pad


def test_every_text_survives_in_bytes(bag: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(chr(rng.choice([rng.randrange(0x250), rng.randrange(0x11_0000)])) for _ in range(8))
        expected = "".join(bag.split(text)).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        decoded = bag.decode(bag.encode(text))
        assert decoded.replace(" ", "") == expected.replace("</w>", "").replace(" ", "")


def test_a_character_reference_of_5000_digits_is_no_crash(clip: Tokenizer) -> None:
    assert clip.decode(clip.encode("a &#" + "9" * 5_000 + "; b")) == "a \ufffd b"


def test_threads_get_the_serial_answers(clip: Tokenizer) -> None:
    rng = random.Random(2)
    texts = ["".join(rng.choices("abcdefg 猫狗é'1", k=30)) for _ in range(200)]
    expected = clip(texts, truncate=True)
    fresh = Tokenizer.clip()
    wrong: list[int] = []

    def work(seed: int) -> None:
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        rows = fresh([texts[i] for i in order], truncate=True)
        wrong.extend(np.flatnonzero((rows != expected[order]).any(axis=1)).tolist())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_cache_of_words_is_bounded(bag: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.tokenizer._MAX_CACHED_WORDS", 10)
    tokenizer = reopened(bag)
    texts = [f"word{'abc'[n % 3] * n}" for n in range(40)]
    first = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == first
    assert len(tokenizer._cache) <= 10


def test_ascii_texts_import_neither_ftfy_nor_regex(tmp_path: Path) -> None:
    code = (
        "import sys; from edgeclip.tokenizer import Tokenizer; from edgeclip.words import label_warnings;"
        "t = Tokenizer.clip(); t(['a photo of a cat']); label_warnings(['cat'], ('en',), t);"
        "print([m for m in ('ftfy', 'regex', 'html', 'torch', 'onnxruntime', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == "[]\n"


# --- training
# ------------------------------------------------------------------------------------------------


def test_training_does_not_depend_on_the_order_of_texts(bag: Tokenizer) -> None:
    again = train_bpe(reversed(TEXTS), vocab_size=620, context_length=12, languages=("en", "zh"))
    assert again.digest == bag.digest == "16a2069fd83c8006767dbe98bfa949a6db6469d49c2cd68cf99d6fe89981c360"


def test_frequent_words_and_characters_become_one_piece() -> None:
    tokenizer = train_bpe(["a photo of a cat 猫"] * 5, vocab_size=600)
    assert all(len(tokenizer.encode(word)) == 1 for word in ("photo", "cat", "猫"))
    assert tokenizer.vocab_size <= 600


def test_training_without_texts_leaves_bytes() -> None:
    tokenizer = train_bpe([], vocab_size=600)
    assert tokenizer.vocab_size == 513
    assert len(tokenizer.encode("猫")) == 3


@pytest.mark.parametrize("size", [512, 2**30])
def test_an_impossible_vocabulary_is_an_error(size: int) -> None:
    with pytest.raises(InputError, match=f"vocab_size: got {size}, expected 513 to"):
        train_bpe([], vocab_size=size)


# --- files
# ---------------------------------------------------------------------------------------------------


def test_files_give_the_same_tokenizer_back(bag: Tokenizer, tmp_path: Path) -> None:
    stored = bag.with_words(build_words(TEXTS))
    stored.to_files(tmp_path / "tokenizer")
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == [
        "merges.txt.gz",
        "tokenizer.json",
        "words.bin",
    ]
    again = Tokenizer.open(tmp_path / "tokenizer")
    assert again.files == stored.files
    assert again.digest == bag.digest
    assert again.words is not None
    assert again.words.knows("cat")
    np.testing.assert_array_equal(again(TEXTS, truncate=True), bag(TEXTS, truncate=True))


def test_a_directory_without_word_list_is_fine(bag: Tokenizer, tmp_path: Path) -> None:
    bag.to_files(tmp_path)
    assert Tokenizer.open(tmp_path).words is None


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt.gz"])
def test_a_missing_file_is_named(name: str, bag: Tokenizer, tmp_path: Path) -> None:
    bag.to_files(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: cannot be read from .*: No such file"):
        Tokenizer.open(tmp_path)


def test_a_huge_file_is_not_read(bag: Tokenizer, tmp_path: Path) -> None:
    bag.to_files(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b" " * 70_000)
    with pytest.raises(BundleError, match=r"tokenizer\.json: holds more than 65536 bytes"):
        Tokenizer.open(tmp_path)
    with pytest.raises(BundleError, match="got 70000 bytes, expected at most 65536"):
        Tokenizer.from_bytes(b" " * 70_000, bag.files["merges.txt.gz"])


def test_the_digest_is_of_meaning_not_of_layout(bag: Tokenizer) -> None:
    assert reopened(bag).digest == bag.digest
    repacked = gzip.compress(gzip.decompress(bag.files["merges.txt.gz"]), mtime=5)
    assert Tokenizer.from_bytes(bag.files["tokenizer.json"], repacked).digest == bag.digest
    assert bag.with_words(build_words(TEXTS)).digest == bag.digest
    assert reopened(bag, context_length=13).digest != bag.digest
    fewer = pack_merges([("a", "b")])
    other = {**settings(bag), "special": {"start": None, "end": None, "pad": 513}}
    assert Tokenizer.from_bytes(json.dumps(other).encode(), fewer).digest != bag.digest


PAD = 581  # 512 bytes and the 69 merges that the texts give
NO_FRAME: dict[str, Any] = {"start": None, "end": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, r"schema 1: Invalid enum value 2.*`\$\.schema`"),
        ({"kind": "wordpiece"}, r"Invalid enum value 'wordpiece'.*`\$\.kind`"),
        ({"stem": True}, "unknown field `stem`"),
        (
            {"clean": ["nfkc", "stem", "lower"]},
            "unknown cleaning step 'stem', expected some of ftfy, html-unescape",
        ),
        ({"clean": ["lower", "lower"]}, "named twice in 'lower, lower'"),
        ({"pattern": "words"}, "unknown pattern 'words'.*expected one of clip, edgeclip"),
        ({"regex": "(a+)+$"}, r"unknown pattern 'edgeclip' with '\(a\+\)\+\$'"),
        ({"context_length": 0}, "context length of 0, expected 1"),
        ({"context_length": 10**9}, "context length of 1000000000, expected 1 .* to 4096"),
        ({"context_length": "12"}, "Expected `int`, got `str`"),
        ({"pooling": "mean"}, "Invalid enum value 'mean'"),
        ({"special": {**NO_FRAME, "pad": PAD + 1}}, r"pad 582\) leave a gap behind the 581 pieces"),
        ({"special": {**NO_FRAME, "pad": 10**30}}, "leave a gap"),
        ({"special": {**NO_FRAME, "pad": -1}}, "clash"),
        (
            {"special": {**NO_FRAME, "pad": 0}},
            "pooling 'mask' got the padding id 0, a piece of text; .* from 581 on",
        ),
        ({"special": {"start": PAD, "end": PAD, "pad": PAD}}, "clash"),
        ({"special": {"start": 5, "end": None, "pad": PAD}}, "clash"),
        (
            {"special": {"start": PAD + 1, "end": PAD + 2, "pad": PAD}, "context_length": 2},
            "expected 3 .* to 4096",
        ),
        ({"special": NO_FRAME}, "missing required field `pad`"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str, bag: Tokenizer) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        reopened(bag, **changes)
    assert str(caught.value).startswith("tokenizer.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema": 1}', b"[" * 60_000, b'"\xff"'])
def test_what_is_no_json_object_is_an_error(data: bytes, bag: Tokenizer) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json: is no tokenizer of schema 1"):
        Tokenizer.from_bytes(data, bag.files["merges.txt.gz"])


def test_merges_of_another_vocabulary_are_refused(bag: Tokenizer, clip: Tokenizer) -> None:
    with pytest.raises(
        BundleError, match=r"leave a gap behind the 581 pieces .* the files do not belong together"
    ):
        Tokenizer.from_bytes(clip.files["tokenizer.json"], bag.files["merges.txt.gz"])


# --- damage
# --------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    513,
    2**31,
    2**64,
    1e308,
    "",
    "a\nb",
    "\ud800",
    [],
    ["lower"],
    {},
    [[]],
)


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, drop or insert bytes."""
    mutable = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(mutable) + 1) if mutable else 0
        action = rng.randrange(6)
        if action == 0 and mutable:
            mutable[at % len(mutable)] ^= 1 << rng.randrange(8)
        elif action == 1:
            del mutable[at:]
        elif action == 2:
            mutable[at:at] = mutable[: rng.randrange(40)]
        elif action == 3:
            del mutable[at : at + rng.randrange(1, 9)]
        elif action == 4:
            mutable[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            mutable[at:at] = rng.choice(
                [b"\n", b" ", b"a b\n", "\u00a0".encode(), "\u2028".encode(), b"\0", b"</w>"]
            )
    return bytes(mutable)


def damaged_settings(rng: random.Random, config: dict[str, Any]) -> bytes:
    """Replace, drop or add a field, or damage the text of the file."""
    changed = json.loads(json.dumps(config))
    where = rng.choice([changed, changed["special"]])
    key = rng.choice([*where, "new"])
    if rng.random() < 0.2:
        where.pop(key, None)
    else:
        where[key] = rng.choice([*VALUES, rng.choice(list(config.values()))])
    data = json.dumps(changed).encode()
    return damaged_bytes(rng, data) if rng.random() < 0.4 else data


def damaged_lines(rng: random.Random, packed: bytes) -> bytes:
    """Damage the lines of a merge file and pack them again, so that the checksum holds."""
    lines = gzip.decompress(packed).split(b"\n")
    for _ in range(rng.randint(1, 3)):
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        action = rng.randrange(4)
        if action == 0:
            lines[first], lines[second] = lines[second], lines[first]
        elif action == 1:
            lines.insert(first, lines[second])
        elif action == 2:
            del lines[first]
        else:
            lines[first] = damaged_bytes(rng, lines[first])
        lines = lines or [b""]
    return gzip.compress(b"\n".join(lines), mtime=0)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_a_tokenizer_or_a_typed_error(seed: int, bag: Tokenizer) -> None:
    # 4 × 400 mutations, and every tokenizer that still opens is used.
    rng = random.Random(seed)
    good = bag.with_words(build_words(TEXTS)).files
    opened = 0
    messages: list[str] = []
    for number in range(400):
        files = dict(good)
        part = number % 4
        if part == 0:
            files["tokenizer.json"] = damaged_settings(rng, settings(bag))
        elif part == 1:
            files["merges.txt.gz"] = damaged_bytes(rng, files["merges.txt.gz"])
        elif part == 2:
            files["merges.txt.gz"] = damaged_lines(rng, files["merges.txt.gz"])
        else:
            files["words.bin"] = damaged_bytes(rng, files["words.bin"])
        try:
            tokenizer = Tokenizer.from_bytes(
                *(files[name] for name in ("tokenizer.json", "merges.txt.gz", "words.bin"))
            )
        except EdgeClipError as error:
            messages.append(str(error))
            continue
        opened += 1
        rows = tokenizer(["a photo of a cat", "一只猫 ½ é", "x" * 99], truncate=True)
        assert rows.min() >= 0
        assert rows.max() < tokenizer.vocab_size
        assert 0 <= (tokenizer.unknown_share("cat 猫") or 0) <= 1
        tokenizer.decode(rows[0])
    assert not any("\n" in message or len(message) > 600 for message in messages)
    assert opened >= 5  # the mutations are not all caught by the first check
