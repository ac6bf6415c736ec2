"""Label sets and prompt templates: what the user offers the classifier, read and checked.

Three ways to write labels, all read by :func:`read_labels` or :meth:`LabelSet.of`:

* a list: ``["cat", "dog"]``; on the command line ``--labels "cat,dog"``;
* a text file, one label a line; lines that start with ``#`` and empty lines are skipped; synonyms follow
  after ``|``: ``sofa | couch | settee``;
* a JSON file: a list, or ``{"labels": [...]}``, whose entries are a name or an object::

    {"name": "cat", "synonyms": ["kitty"], "descriptions": ["a small furry pet with whiskers"],
     "aliases": {"zh": "猫", "de": ["Katze", "Kater"], "fr": {"name": "chat", "descriptions": ["…"]}}}

  or a mapping from name to such an object or to a list of synonyms.

Synonyms go through the prompt templates like the name; descriptions are whole sentences and are encoded as
they stand; aliases are the label in another language, used when that language is asked for
(:meth:`LabelSet.in_language`).

This module knows no model: how labels become embeddings is in :mod:`edgeclip.labels`.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ConfigError, InputError

__all__ = [
    "MAX_LABELS",
    "MAX_LABEL_CHARS",
    "MAX_PHRASES",
    "TEMPLATES",
    "Label",
    "LabelSet",
    "Templates",
    "parse_labels",
    "read_labels",
]

MAX_LABELS = 100_000
"""Most labels in one set: above it a bank no longer fits small devices (100,000 × 512 float32 is 205 MB)."""
MAX_LABEL_CHARS = 1_000
"""Longest name, synonym or description; far above any context length, so only mistakes meet it."""
MAX_PHRASES = 100
"""Most synonyms, descriptions or languages of one label."""
_MAX_FILE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Label:
    """One class the user offers: the name shown in predictions, and the texts that stand for it."""

    name: str
    synonyms: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    aliases: tuple[tuple[str, Label], ...] = ()  # (language, the label in it)

    def texts(self, templates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Return the texts to encode, one tuple a phrase: its embedding is the mean over the tuple."""
        phrases = (self.name, *self.synonyms)
        # replace, not format: a label may hold braces
        templated = tuple(
            tuple(template.replace("{}", phrase) for template in templates) for phrase in phrases
        )
        return templated + tuple((description,) for description in self.descriptions)

    def to_json(self) -> Any:
        """Return the form :func:`read_labels` reads: a string when there is only a name."""
        if not (self.synonyms or self.descriptions or self.aliases):
            return self.name
        entry: dict[str, Any] = {"name": self.name}
        if self.synonyms:
            entry["synonyms"] = list(self.synonyms)
        if self.descriptions:
            entry["descriptions"] = list(self.descriptions)
        if self.aliases:
            entry["aliases"] = {language: alias.to_json() for language, alias in self.aliases}
        return entry


@dataclass(frozen=True)
class LabelSet:
    """An ordered set of labels with distinct names.

    Names are compared without regard to case and Unicode form: text towers lower-case, so "Cat" and "cat"
    would share one embedding and halve each other's score.
    """

    labels: tuple[Label, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(label.name for label in self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, labels: LabelSet | Iterable[str | Label] | Mapping[str, Any]) -> LabelSet:
        """Return a checked label set from names, labels or a mapping name -> synonyms or object.

        Raises:
            InputError: no label, an empty, overlong or repeated one; the message names the entry.
        """
        if isinstance(labels, LabelSet):
            return labels
        if isinstance(labels, str):
            raise InputError(
                f"labels: got one string {_short(labels)}, expected a list of names; "
                "use parse_labels() for a comma-separated string."
            )
        return _collect("labels", labels)

    def in_language(self, language: str) -> LabelSet:
        """Return the set with each label replaced by its alias in ``language``.

        Raises:
            InputError: a label has no alias in it; the message names the first one.
        """
        replaced = []
        for label in self.labels:
            alias = dict(label.aliases).get(language)
            if alias is None:
                known = sorted({code for each in self.labels for code, _ in each.aliases})
                raise InputError(
                    f"label {label.name!r} has no alias in language {language!r}; languages in this set: "
                    f'{", ".join(known) or "none"}. Add it under "aliases" in the label file.'
                )
            replaced.append(("labels", alias))
        return _checked(replaced)


def parse_labels(text: str, *, source: str = "--labels") -> LabelSet:
    """Return the labels of a comma-separated string; ``|`` separates synonyms.

    Raises:
        InputError: as for :meth:`LabelSet.of`; entries are counted from 1.
    """
    # The full-width comma is what a Chinese keyboard types.
    pieces = text.replace("，", ",").split(",")
    if len(pieces) > 1 and not pieces[-1].strip():
        pieces.pop()  # a trailing comma is no label
    return _checked(
        [_from_line(f"{source}, entry {i}", piece) for i, piece in enumerate(pieces, start=1)], source
    )


def read_labels(path: str | Path) -> LabelSet:
    """Return the labels of a text or JSON file (JSON by suffix ``.json``).

    Raises:
        InputError: unreadable, not UTF-8, or a label that is empty, overlong or repeated; names the line.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{str(path)!r} is larger than {_MAX_FILE_BYTES >> 20} MB: not a label file.")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"label file {str(path)!r} cannot be read: {reason}.") from error
    return labels_from_bytes(content, source=str(path), as_json=path.suffix.lower() == ".json")


def labels_from_bytes(content: bytes, *, source: str, as_json: bool) -> LabelSet:
    """Return the labels in the content of a label file; ``source`` is how errors call it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{source}, line {line}: not UTF-8 text. Save the label file as UTF-8.") from error
    if as_json:
        return _from_json(text, source)
    entries = [
        _from_line(f"{source}, line {number}", line)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return _checked(entries, source)


# --------------------------------------------------------------------------------------------- templates
_TEMPLATE_FILE = Path(__file__).parent / "assets" / "templates.json"

TEMPLATES: dict[str, tuple[str, ...]] = {
    name: tuple(texts) for name, texts in json.loads(_TEMPLATE_FILE.read_text(encoding="utf-8")).items()
}
"""Built-in template sets. ``bare`` is the label alone; ``one`` is "a photo of a {}."; ``openai-7`` and
``openai-80`` are the published CLIP sets for ImageNet (Radford et al. 2021; MIT, see NOTICE); ``zh`` is seven
Chinese ones of ours."""


@dataclass(frozen=True)
class Templates:
    """A named set of prompt templates, each with exactly one ``{}`` for the label."""

    name: str
    texts: tuple[str, ...]

    @classmethod
    def of(cls, templates: Templates | str | Sequence[str]) -> Templates:
        """Return templates from a built-in name, one template string or a list of them.

        Raises:
            ConfigError: an unknown name, or a template without exactly one ``{}``.
        """
        if isinstance(templates, Templates):
            return templates
        if isinstance(templates, str):
            if templates in TEMPLATES:
                return cls(templates, TEMPLATES[templates])
            if "{" not in templates:
                raise ConfigError(
                    f"templates: got {templates!r}, expected one of {', '.join(map(repr, TEMPLATES))}, "
                    'or a template with one {} such as "a photo of a {}."'
                )
            templates = (templates,)
        texts = tuple(templates)
        if not texts:
            raise ConfigError("templates: got an empty list, expected at least one template.")
        for number, text in enumerate(texts, start=1):
            _check_template(text, f"template {number}")
        for name, known in TEMPLATES.items():
            if known == texts:
                return cls(name, texts)
        return cls("custom", texts)

    @classmethod
    def read(cls, path: str | Path) -> Templates:
        """Return the templates of a text file, one a line, ``#`` comments skipped.

        Raises:
            ConfigError: unreadable, or a line without exactly one ``{}``; names file and line.
        """
        try:
            lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"template file {str(path)!r} is not UTF-8 text.") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"template file {str(path)!r} cannot be read: {reason}.") from error
        texts = []
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                _check_template(line.strip(), f"{path}, line {number}")
                texts.append(line.strip())
        if not texts:
            raise ConfigError(f"template file {str(path)!r} holds no template.")
        return cls.of(texts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the templates in order; the name does not count."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


def _check_template(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: got {type(text).__name__}, expected a string with one {{}}.")
    rest = text.replace("{}", "", 1)
    if text.count("{}") != 1 or "{" in rest or "}" in rest:
        raise ConfigError(
            f'{where}: got {_short(text)}, expected exactly one {{}} as in "a photo of a {{}}."'
        )
    if len(text) > MAX_LABEL_CHARS:
        raise ConfigError(f"{where}: {len(text)} characters, at most {MAX_LABEL_CHARS} are allowed.")
    if not text.isprintable():
        raise ConfigError(f"{where}: got {_short(text)}, which holds a control character.")


# ----------------------------------------------------------------------------------------------- parsing
_Entry = tuple[str, Label]  # (where it stands, the label)
_KEYS = ("name", "synonyms", "descriptions", "aliases")


def _checked(entries: Sequence[_Entry], source: str = "labels") -> LabelSet:
    """Return the set, or raise when it is empty, too large or repeats a name."""
    if not entries:
        raise InputError(f"{source}: no labels; give at least one.")
    if len(entries) > MAX_LABELS:
        raise InputError(f"{source}: {len(entries)} labels, at most {MAX_LABELS} are allowed.")
    seen: dict[str, str] = {}
    for where, label in entries:
        key = unicodedata.normalize("NFKC", label.name).casefold()
        if key in seen:
            first = f" (first in {seen[key]})" if seen[key] != where else ""
            raise InputError(f"{where}: label {label.name!r} is repeated{first}. Give every label once.")
        seen[key] = where
    return LabelSet(tuple(label for _, label in entries))


def _clean(text: Any, where: str, what: str = "label") -> str:
    """Return ``text`` with single spaces, or raise naming ``where``."""
    if not isinstance(text, str):
        raise InputError(f"{where}: {what} is {type(text).__name__} {_short(text)}, expected text.")
    cleaned = " ".join(text.split())
    if not cleaned:
        raise InputError(f"{where}: empty {what}.")
    if len(cleaned) > MAX_LABEL_CHARS:
        raise InputError(
            f"{where}: {what} of {len(cleaned)} characters, at most {MAX_LABEL_CHARS} are allowed."
        )
    if not cleaned.isascii():
        if any(unicodedata.category(character) in ("Cs", "Cc") for character in cleaned):
            raise InputError(
                f"{where}: {what} {_short(cleaned)} holds a control character or half a surrogate pair."
            )
    elif not cleaned.isprintable():
        raise InputError(f"{where}: {what} {_short(cleaned)} holds a control character.")
    return cleaned


def _from_line(where: str, line: str) -> _Entry:
    name, *synonyms = line.split("|")
    if len(synonyms) > MAX_PHRASES:
        raise InputError(f"{where}: {len(synonyms)} synonyms, at most {MAX_PHRASES} are allowed.")
    return where, Label(_clean(name, where), tuple(_clean(each, where, "synonym") for each in synonyms))


def _from_json(text: str, source: str) -> LabelSet:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}, line {error.lineno}: not JSON: {error.msg}.") from error
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
        raise InputError(f"{source}: not a label file: {type(error).__name__}.") from error
    if isinstance(document, dict) and isinstance(document.get("labels"), (list, dict)):
        document = document["labels"]
    if not isinstance(document, (list, dict)):
        raise InputError(
            f"{source}: got {type(document).__name__}, expected a list of labels or a mapping from name."
        )
    return _collect(source, document)


def _collect(source: str, labels: Iterable[Any] | Mapping[str, Any]) -> LabelSet:
    entries: list[_Entry] = []
    if isinstance(labels, Mapping):
        for name, value in labels.items():
            where = f"{source}[{_short(name)}]"
            entries.append((where, _from_value(value, where, name=name)))
        return _checked(entries, source)
    for index, value in enumerate(labels):
        if index >= MAX_LABELS:
            raise InputError(f"{source}: more than {MAX_LABELS} labels; at most that many are allowed.")
        where = f"{source}[{index}]"
        entries.append((where, _from_value(value, where)))
    return _checked(entries, source)


def _from_value(value: Any, where: str, *, name: Any = None) -> Label:
    """Return the label of one JSON value; ``name`` is its key where labels are written as a mapping."""
    if isinstance(value, Label):
        return value
    if isinstance(value, str) and name is None:
        return Label(_clean(value, where))
    if isinstance(value, (list, tuple)) and name is not None:
        value = {"synonyms": value}
    if not isinstance(value, Mapping):
        raise InputError(
            f"{where}: got {type(value).__name__} {_short(value)}, expected a name or an object."
        )
    unknown = sorted(str(key) for key in value if key not in _KEYS)
    if unknown:
        raise InputError(f"{where}: unknown key {_short(unknown[0])}, expected one of {', '.join(_KEYS)}.")
    if name is None and "name" not in value:
        raise InputError(f'{where}: the object has no "name".')
    aliases = value.get("aliases", {})
    if not isinstance(aliases, Mapping) or len(aliases) > MAX_PHRASES:
        raise InputError(f"{where}.aliases: expected a mapping from language to name, {MAX_PHRASES} at most.")
    return Label(
        _clean(value.get("name", name), where, "name"),
        _phrases(value.get("synonyms", ()), f"{where}.synonyms", "synonym"),
        _phrases(value.get("descriptions", ()), f"{where}.descriptions", "description"),
        tuple(
            (_clean(code, where, "language"), _alias(each, f"{where}.aliases"))
            for code, each in aliases.items()
        ),
    )


def _alias(value: Any, where: str) -> Label:
    if isinstance(value, str):
        return Label(_clean(value, where, "alias"))
    if isinstance(value, (list, tuple)):
        names = _phrases(value, where, "alias")
        if not names:
            raise InputError(f"{where}: an empty list, expected at least one alias.")
        return Label(names[0], names[1:])
    if isinstance(value, Mapping) and "aliases" not in value:
        return _from_value(value, where)
    raise InputError(
        f"{where}: got {type(value).__name__} {_short(value)}, expected a name, a list or an object."
    )


def _phrases(value: Any, where: str, what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: got {type(value).__name__}, expected a list of texts.")
    if len(value) > MAX_PHRASES:
        raise InputError(f"{where}: {len(value)} entries, at most {MAX_PHRASES} are allowed.")
    return tuple(_clean(each, where, what) for each in value)


def _short(value: Any) -> str:
    """Return a repr cut to a length an error line can carry."""
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "…" + text[-1]
