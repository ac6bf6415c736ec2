from __future__ import annotations

import json
from pathlib import Path

import pytest
from picture_sets import clip_benchmark
from tar_shards import make_shard, picture

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.offered import offer, repeated_names
from edgeclip.evaluate.passes import choose
from edgeclip.evaluate.picture_sets import Picture, open_set
from edgeclip.label_sets import Label, LabelSet, Templates

# Sets


def test_a_folder_a_class_with_captions_beside(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/deep/b.png", "dog/c.png", "d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "cat/a.txt").write_text("a cat\n\n  一只猫 \n", encoding="utf-8")
    found = list(open_set(tmp_path))
    assert [(each.key, each.label) for each in found] == [
        ("cat/a.png", "cat"),
        ("cat/deep/b.png", "cat"),
        ("d.png", None),
        ("dog/c.png", "dog"),
    ]
    assert [dict(each.captions) for each in found] == [{"alt": ("a cat", "一只猫")}, {}, {}, {}]
    assert list(open_set(tmp_path)) == found


def test_a_table_has_labels_and_captions_by_kind(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    row = {"image": "a.png", "caption": "x", "caption_zh": "一", "label": "cat"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (only,) = open_set(tmp_path / "t.jsonl")
    assert only == Picture("a.png", tmp_path / "a.png", "cat", {"alt": ("x",), "zh": ("一",)})


def test_keys_do_not_depend_on_where_the_set_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    make_shard(tmp_path / "set" / "b.tar", {"1.png": picture(1)})
    make_shard(tmp_path / "set" / "a.tar", {"1.png": picture(2), "1.txt": b"two\nlines"})
    first = list(open_set(tmp_path / "set"))
    monkeypatch.chdir(tmp_path)
    assert [each.key for each in first] == ["a.tar/1.png", "b.tar/1.png"]
    assert [each.key for each in open_set("set")] == [each.key for each in first]
    assert first[0].captions == {"alt": ("two\nlines",)}  # a shard of ours: one text
    (alone,) = open_set("set/b.tar")
    assert alone.key == "b.tar/1.png"


def test_clip_benchmark_s_classification(tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path / "wds")
    for path in (root, root / "test"):
        found = open_set(path)
        assert (found.task, found.numbered) == ("zero-shot", True)
        assert found.labels is not None
        assert found.labels.names == ("crane", "crane", "red fox")
        assert found.templates == Templates.of(["a photo of a {}.", "art of the {}."])
        assert [each.key for each in found][:2] == ["0.tar/s0000000.webp", "0.tar/s0000001.png"]
        assert [each.label for each in found] == ["0", "1", "2"] * 2


def test_clip_benchmark_s_retrieval(tmp_path: Path) -> None:
    found = open_set(clip_benchmark(tmp_path / "wds", retrieval=True))
    assert (found.task, found.labels) == ("retrieval", None)
    assert [each.captions["alt"] for each in found][3] == ("picture 3", "the same picture")


def test_more_than_nine_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    found = list(open_set(clip_benchmark(tmp_path / "wds", shards=11)))
    assert found[-1].key == "10.tar/s0000032.jpg"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test/nshards.txt", "many", "got 'many', expected the number of shards"),
        ("test/nshards.txt", "0", "got '0', expected the number of shards"),
        ("test/nshards.txt", "9" * 5000, "got '9{40}', expected the number of shards"),
        ("test/nshards.txt", "3", r"'2.tar' is missing, but nshards.txt says that there are 3"),
        ("dataset_type.txt", "multilabel", "says 'multilabel', expected 'retrieval' or 'classification'"),
        ("classnames.txt", "crane\n\nfox\n", "line 2: is empty, expected the name of class 1"),
        ("classnames.txt", None, "'classnames.txt' is missing; it says what the numbers in .cls mean"),
    ],
)
def test_a_damaged_clip_benchmark_set_is_said(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    root = clip_benchmark(tmp_path / "wds")
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_set(root)


def test_bad_prompts_are_said(tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path / "wds")
    (root / "zeroshot_classification_templates.txt").write_text("a photo\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="got 'a photo', expected exactly one"):
        open_set(root)


def test_a_set_without_a_test_split_names_those_it_has(tmp_path: Path) -> None:
    root = clip_benchmark(tmp_path / "wds", split="val")
    with pytest.raises(InputError, match=r"holds the splits val, expected 'test'; name one of them"):
        open_set(root)
    assert len(list(open_set(root / "val"))) == 6
    with pytest.raises(InputError, match="nowhere': no such file or folder"):
        open_set(tmp_path / "nowhere")


# Labels offered


def test_names_and_numbers_mean_labels() -> None:
    offered = offer([(None, LabelSet.of(["cat", "dog"]))])
    assert [offered.number(label) for label in ("dog", "0", "1", "2", "bird", "²", "001", "9" * 5000)] == [
        1, 0, 1, None, None, None, 1, None
    ]  # fmt: skip
    digits = offer([(None, LabelSet.of(["7", "1", "cat"]))])
    assert [digits.number(label) for label in ("7", "1", "0", "cat")] == [0, 1, None, 2]
    numbered = offer([(None, LabelSet.of(["7", "1", "cat"]))], numbered=True)
    assert [numbered.number(label) for label in ("7", "1", "0", "cat")] == [None, 1, 0, None]


def test_repeated_names_stay_apart() -> None:
    labels = LabelSet(tuple(Label(name) for name in ("crane", "fox", "crane")))
    offered = offer([(None, labels)], numbered=True)
    assert offered.names == ("crane", "fox", "crane (#2)")
    assert repeated_names(labels) == ["crane"]


def test_languages_are_aliases_of_one_set() -> None:
    labels = LabelSet.of([{"name": "cat", "aliases": {"zh": "猫"}}, {"name": "dog", "aliases": {"zh": "狗"}}])  # type: ignore[list-item]
    zh = Templates.of("zh")
    offered = offer([(None, labels)], languages=["en", "zh"], templates=[("zh", zh)])
    assert offered.languages["en"] is labels
    assert offered.languages["zh"].names == ("猫", "狗")
    assert offered.templates == {"en": None, "zh": zh}
    assert [offered.number(label) for label in ("dog", "狗")] == [1, 1]
    with pytest.raises(InputError, match="no alias in language 'de'"):
        offer([(None, labels)], languages=["de"])


def test_languages_are_files_in_one_order() -> None:
    english, chinese = LabelSet.of(["cat", "dog"]), LabelSet.of(["猫", "狗"])
    one = Templates.of("one")
    offered = offer([("en", english), ("zh", chinese)], templates=[(None, one)])
    assert (offered.names, offered.templates) == (("cat", "dog"), {"en": one, "zh": one})
    assert offered.number("狗") == 1
    for second, message in (
        (LabelSet.of(["dog", "cat"]), "'dog' is number 1 in one language and 0 in another"),
        (LabelSet.of(["猫"]), "labels in 'zh': got 1, expected 2 as in 'en'"),
    ):
        with pytest.raises(InputError, match=message):
            offer([("en", english), ("zh", second)])
    with pytest.raises(InputError, match="got 2 sets, expected one, or one for each language"):
        offer([(None, english), ("zh", chinese)])
    with pytest.raises(InputError, match="expected one or the other"):
        offer([("en", english)], languages=["zh"])
    with pytest.raises(InputError, match="templates for 'de', which is not offered"):
        offer([("en", english)], templates=[("de", one)])


# What is taken


def numbers(tmp_path: Path, count: int) -> Path:
    table = tmp_path / "t.jsonl"
    rows = [json.dumps({"image": f"{number:03d}.png"}) + "\n" for number in range(count)]
    table.write_text("".join(rows), encoding="utf-8")
    return table


@pytest.mark.parametrize("count", [1, 2, 7, 10, 33, 100])
@pytest.mark.parametrize("limit", [1, 2, 7, 10, 200, None])
def test_a_limit_takes_pictures_evenly(tmp_path: Path, count: int, limit: int | None) -> None:
    chosen = choose(open_set(numbers(tmp_path, count)), lambda picture: int(picture.key[:3]), limit=limit)
    taken = [number for _, number in chosen]
    assert len(taken) == chosen.count == min(count, limit or count)
    assert taken == [number * count // len(taken) for number in range(len(taken))]


def test_what_cannot_be_used_is_named_and_limited(tmp_path: Path) -> None:
    pictures = open_set(numbers(tmp_path, 20))

    def usable(picture: Picture) -> int | str:
        number = int(picture.key[:3])
        return "is odd." if number % 2 else number

    chosen = choose(pictures, usable, limit=3)
    assert ([number for _, number in chosen], chosen.total, chosen.found) == ([0, 6, 12], 20, 10)
    assert [each.key for each in chosen.left_out][:2] == ["001.png", "003.png"]
    message = r"10 of 20 pictures cannot be used, expected at most 9; the first is '001.png': is odd\."
    with pytest.raises(InputError, match=message):
        choose(pictures, usable, allowed=lambda total: total // 2 - 1)
    with pytest.raises(InputError, match=r"none of its 20 pictures can be used, first '000.png': no\."):
        choose(pictures, lambda picture: "no.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty' holds no pictures"):
        choose(open_set(tmp_path / "empty"), usable)
