"""Label sets and templates: what is read, what is refused, and how the refusal names the place."""

from __future__ import annotations

import json
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgeclip.errors import ConfigError, InputError
from edgeclip.label_sets import (
    MAX_LABEL_CHARS,
    MAX_LABELS,
    TEMPLATES,
    Label,
    LabelSet,
    Templates,
    parse_labels,
    read_labels,
)


def _file(tmp_path: Path, content: str | bytes, name: str = "labels.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "\ufeff# animals\r\ncat\r\n\r\n  big   dog | hound |puppy\n  # end\nC#\n")
    assert read_labels(path).labels == (Label("cat"), Label("big dog", ("hound", "puppy")), Label("C#"))


def test_json_file_in_all_its_forms(tmp_path: Path) -> None:
    entry = {
        "name": "cat",
        "synonyms": ["kitty"],
        "descriptions": "a small furry pet",
        "aliases": {
            "zh": "猫",
            "de": ["Katze", "Kater"],
            "fr": {"name": "chat", "descriptions": ["un félin"]},
        },
    }
    cat = Label(
        "cat",
        ("kitty",),
        ("a small furry pet",),
        (
            ("zh", Label("猫")),
            ("de", Label("Katze", ("Kater",))),
            ("fr", Label("chat", (), ("un félin",))),
        ),
    )
    rest = {key: value for key, value in entry.items() if key != "name"}
    for document in ([entry, "dog"], {"labels": [entry, "dog"]}, {"cat": rest, "dog": []}):
        path = _file(tmp_path, json.dumps(document), "labels.json")
        assert read_labels(path).labels == (cat, Label("dog"))


def test_labels_survive_their_json_form(tmp_path: Path) -> None:
    labels = (Label("a", ("b",), ("c d",), (("zh", Label("猫", ("咪",))),)), Label("x"))
    path = _file(tmp_path, json.dumps([label.to_json() for label in labels]), "labels.json")
    assert read_labels(path).labels == labels


def test_command_line_labels() -> None:
    assert parse_labels("cat|kitty, dog ,猫，狗,").labels == (
        Label("cat", ("kitty",)),
        Label("dog"),
        Label("猫"),
        Label("狗"),
    )


def test_language_takes_the_aliases() -> None:
    labels = LabelSet.of({"cat": {"aliases": {"zh": ["猫", "猫咪"]}}, "dog": {"aliases": {"zh": "狗"}}})
    assert labels.in_language("zh").labels == (Label("猫", ("猫咪",)), Label("狗"))
    with pytest.raises(InputError, match=r"'cat' has no alias in language 'fr'.*zh"):
        labels.in_language("fr")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog\ncat\n", r"labels.txt, line 3: label 'cat' is repeated \(first in .*labels.txt, line 1\)"),
        ("Cat\n# x\n ｃat", r"line 3: label 'ｃat' is repeated"),
        ("cat\n | kitty\n", r"line 2: empty label"),
        ("cat | \n", r"line 1: empty synonym"),
        ("x" * (MAX_LABEL_CHARS + 1), rf"line 1: label of {MAX_LABEL_CHARS + 1} characters, at most"),
        ("cat\nd\x00g\n", r"line 2: label 'd\\x00g' holds a control character"),
        (b"cat\nd\xff\xfeg\n", r"line 2: not UTF-8"),
        ("# nothing\n\n", r"labels.txt: no labels"),
        ("a" + "|b" * 101, r"line 1: 101 synonyms, at most 100"),
    ],
)
def test_text_file_refusals_name_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(_file(tmp_path, content))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('["cat",\n "dog"', r"labels.json, line 2: not JSON"),
        ("3", r"labels.json: got int"),
        ('"cat"', r"labels.json: got str"),
        ("[]", r"labels.json: no labels"),
        ("[3]", r"labels.json\[0\]: got int 3"),
        ('[{"synonyms": []}]', r'\[0\]: the object has no "name"'),
        ('[{"name": "a", "synonym": []}]', r"\[0\]: unknown key 'synonym', expected one of name, synonyms"),
        ('[{"name": "a", "synonyms": [1]}]', r"\[0\].synonyms: synonym is int 1"),
        ('[{"name": "a", "synonyms": 1}]', r"\[0\].synonyms: got int"),
        ('[{"name": "a", "aliases": []}]', r"\[0\].aliases: expected a mapping"),
        ('[{"name": "a", "aliases": {"zh": []}}]', r"\[0\].aliases: an empty list"),
        ('[{"name": "a", "aliases": {"zh": 1}}]', r"\[0\].aliases: got int 1"),
        ('{"a": 1}', r"labels.json\['a'\]: got int 1"),
        ('["a", "\\ud800"]', r"\[1\]: label '\\ud800' holds a control character or half"),
        ('["a", ["b"]]', r"\[1\]: got list"),
        ("[" * 100_000, r"labels.json: not a label file"),
        ('["' + "1" * 20 + '", ' + "1" * 5000 + "]", r"labels.json: not a label file"),
    ],
)
def test_json_refusals_name_the_entry(tmp_path: Path, document: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(_file(tmp_path, document, "labels.json"))


def test_too_many_labels() -> None:
    with pytest.raises(InputError, match=f"more than {MAX_LABELS}"):
        LabelSet.of(str(number) for number in range(MAX_LABELS + 1))


@pytest.mark.parametrize("path", ["/nonexistent/labels.txt", "\0", "/"])
def test_unreadable_label_file(path: str) -> None:
    with pytest.raises(InputError, match="label file"):
        read_labels(path)


@pytest.mark.parametrize("labels", ["cat,dog", [], [""], [b"cat"], ["a", "a"]])
def test_bad_lists(labels: Any) -> None:
    with pytest.raises(InputError, match="labels"):
        LabelSet.of(labels)


# -- templates ---------------------------------------------------------------------------------------------


def test_openai_templates_equal_the_published_ones() -> None:
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        pytest.skip("open_clip is not installed")
    # this one file: importing the package brings in torchvision
    published = runpy.run_path(str(Path(package.origin).with_name("zero_shot_metadata.py")))
    for name, constant in (("openai-80", "OPENAI"), ("openai-7", "SIMPLE")):
        theirs = [template("cat") for template in published[f"{constant}_IMAGENET_TEMPLATES"]]
        assert [text.replace("{}", "cat") for text in TEMPLATES[name]] == theirs


def test_built_in_sets_are_valid() -> None:
    assert set(TEMPLATES) == {"bare", "one", "openai-7", "openai-80", "zh"}
    for name, texts in TEMPLATES.items():
        assert Templates.of(list(texts)) == Templates.of(name)
        assert len(set(texts)) == len(texts)


def test_braces_in_a_label_are_kept() -> None:
    assert Label("{0} {}").texts(("a {}.",)) == (("a {0} {}.",),)


def test_texts_of_a_label() -> None:
    label = Label("cat", ("kitty",), ("a pet",))
    assert label.texts(("a {}", "the {}")) == (("a cat", "the cat"), ("a kitty", "the kitty"), ("a pet",))


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("openai", r"got 'openai', expected one of 'bare', 'one'"),
        ("a {} and {}", r"template 1: got 'a \{\} and \{\}', expected exactly one"),
        ("a {label}", r"expected exactly one"),
        (["a {}", "photo"], r"template 2: got 'photo'"),
        ([], "empty list"),
        ([3], "template 1: got int"),
        (["a {}\n"], "control character"),
        (["{}" + "x" * 1000], "1002 characters"),
    ],
)
def test_bad_templates(templates: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Templates.of(templates)


def test_template_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "# mine\na {} here\n\nthe {}\n")
    assert Templates.read(path) == Templates("custom", ("a {} here", "the {}"))
    assert Templates.read(_file(tmp_path, "a photo of a {}.\n")).name == "one"
    with pytest.raises(ConfigError, match=r"labels.txt, line 2: got 'b'"):
        Templates.read(_file(tmp_path, "a {}\nb\n"))
    with pytest.raises(ConfigError, match="holds no template"):
        Templates.read(_file(tmp_path, "#\n"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        Templates.read(_file(tmp_path, b"\xff{}"))
    with pytest.raises(ConfigError, match="cannot be read"):
        Templates.read(tmp_path / "none.txt")
