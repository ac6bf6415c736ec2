"""The labels that are offered for a set of pictures: in one language or several, and which number is which.

Labels have numbers, and every language has as many in the same order, so that a picture has one right answer
in all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeclip.errors import InputError
from edgeclip.label_sets import Label, LabelSet, Templates
from edgeclip.labels import LabelBank

__all__ = ["Instead", "Offered", "offer", "offer_instead", "repeated_names"]


@dataclass(frozen=True)
class Instead:
    """What answers in place of labels that models encode.

    Attributes:
        kind: ``"bank"``, finished; ``"head"``, fitted on pictures; ``"own"``, the labels that bundles bring.
        name: file of the bank, file or name of the head.
        bank: the bank itself.
    """

    kind: Literal["bank", "head", "own"]
    name: str = ""
    bank: LabelBank | None = None

    @property
    def asked(self) -> LabelBank | str | None:
        """What subjects are asked for: the bank, the head's name, or nothing."""
        return self.bank if self.kind == "bank" else self.name or None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"own_labels": True} if self.kind == "own" else {self.kind: self.name}


@dataclass(frozen=True)
class Offered:
    """Labels in several languages.

    Attributes:
        languages: label set by language; ``""`` where there is only one and it has no name.
        templates: prompts by language; ``None`` leaves them to the model that is asked.
        names: of the labels, distinct; how reports call them.
        numbers: number of each name a picture may carry.
        numbered: whether labels of pictures are numbers.
        instead: what models are asked for in place of the labels, which are then named as these.
    """

    languages: Mapping[str, LabelSet]
    templates: Mapping[str, Templates | None]
    names: tuple[str, ...]
    numbers: Mapping[str, int] = field(repr=False)
    numbered: bool = False
    instead: Instead | None = None

    def right(self, label: str, *, several: bool = False) -> tuple[int, ...] | str:
        """Return the numbers of the labels that are right for a picture, or the one that is not offered.

        Args:
            label: as the picture's set says it.
            several: whether it may be several, separated by ``|``.
        """
        found = []
        for each in [part.strip() for part in label.split("|")] if several else [label]:
            number = self.number(each)
            if number is None:
                return each
            found.append(number)
        return tuple(dict.fromkeys(found))

    def number(self, label: str) -> int | None:
        """Return the number of a picture's label; ``None`` where it is not offered."""
        found = None if self.numbered else self.numbers.get(label)
        # No more digits than a number of labels has: Python refuses to read very many.
        digits = re.fullmatch(r"0*([0-9]{1,9})", label) if found is None else None
        if digits is not None and (self.numbered or self._counts):
            number = int(digits[1])
            return number if number < len(self.names) else None
        return found

    @property
    def _counts(self) -> bool:
        """Whether a number can only mean a place: no label is one."""
        return not any(name.isascii() and name.isdecimal() for name in self.numbers)


def offer(
    given: Sequence[tuple[str | None, LabelSet]],
    *,
    languages: Sequence[str] = (),
    templates: Sequence[tuple[str | None, Templates]] = (),
    numbered: bool = False,
) -> Offered:
    """Return what is offered.

    Args:
        given: one label set without a name, or one for each language.
        languages: aliases of the one set to offer; ``"en"`` is the names themselves where no label has an
            alias of that language.
        templates: prompts for a language, or for all (``None``).
        numbered: whether labels of pictures are numbers of these labels.

    Raises:
        InputError: the languages do not fit together, or two of them give one name to different numbers.
    """
    if not given or (len(given) > 1 and any(language is None for language, _ in given)):
        raise InputError(
            f"labels: got {len(given)} sets, expected one, or one for each language as in en=FILE zh=FILE."
        )
    first_language, base = given[0]
    if languages and first_language is not None:
        raise InputError("labels: got a file for each language and languages too, expected one or the other.")
    sets = {language or "": labels for language, labels in given}
    if languages:
        sets = {language: _in_language(base, language) for language in languages}
    for language, labels in sets.items():
        if len(labels) != len(base):
            raise InputError(
                f"labels in {language!r}: got {len(labels)}, expected {len(base)} as in {first_language!r}: "
                "the same ones, in the same order."
            )
    said = {language or "": prompts for language, prompts in templates}
    unknown = sorted(set(said) - {"", *sets})
    if unknown:
        raise InputError(
            f"templates for {unknown[0]!r}, which is not offered; expected one of "
            f"{', '.join(map(repr, sets))}."
        )
    return Offered(
        languages=sets,
        templates={language: said.get(language, said.get("")) for language in sets},
        names=_distinct(base.names),
        numbers=_numbers([labels for _, labels in given], sets.values()),
        numbered=numbered,
    )


def offer_instead(instead: Instead, names: Sequence[str], *, numbered: LabelSet | None = None) -> Offered:
    """Return what answers in place of labels as if it were labels.

    Args:
        instead: what answers.
        names: of its labels or classes.
        numbered: labels that pictures have the numbers of.
    """
    numbers = {name: number for number, name in enumerate(names)}
    if numbered is not None:
        numbers = {str(row): numbers[name] for row, name in enumerate(numbered.names) if name in numbers}
    labels = LabelSet(tuple(map(Label, names)))
    return Offered({"": labels}, {"": None}, tuple(names), numbers, instead=instead)


def repeated_names(labels: LabelSet) -> list[str]:
    """Return the names that occur more than once."""
    return [name for name, count in Counter(labels.names).items() if count > 1]


def _in_language(labels: LabelSet, language: str) -> LabelSet:
    aliased = any(code == language for label in labels.labels for code, _ in label.aliases)
    return labels if language == "en" and not aliased else labels.in_language(language)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    seen: set[str] = set()
    distinct = []
    for number, name in enumerate(names):
        distinct.append(f"{name} (#{number})" if name in seen else name)
        seen.add(name)
    return tuple(distinct)


def _numbers(given: Sequence[LabelSet], others: Iterable[LabelSet]) -> dict[str, int]:
    found: dict[str, int] = {}
    for labels in given:
        repeated = set(repeated_names(labels))
        for number, name in enumerate(labels.names):
            if found.setdefault(name, number) != number and name not in repeated:
                raise InputError(
                    f"labels: {name!r} is number {found[name]} in one language and {number} in another, "
                    "expected the same labels in the same order."
                )
    for labels in others:
        for number, name in enumerate(labels.names):
            found.setdefault(name, number)
    return found
