"""Which general names are kinds of which, by a small WordNet of our own and by the real one where it lies."""

from __future__ import annotations

from edgeclip.export.recipes.kinds import kinds_of_names
from edgeclip.export.recipes.wordnet import PHYSICAL_ENTITY, Synset, WordNet

THING, ANIMAL, DOG, POODLE, TIGER, PERSON, FIERCE = 10, 20, 30, 40, 50, 60, 70


def _wordnet() -> WordNet:
    def synset(offset: int, names: tuple[str, ...], parent: int | None, lexical_file: int = 5) -> Synset:
        parents = () if parent is None else (parent,)
        return Synset(offset, names, "", parents, lexical_file, tuple(3 for _ in names))

    chain = [
        synset(1, ("entity",), None),
        synset(PHYSICAL_ENTITY, ("physical entity",), 1),
        synset(THING, ("object",), PHYSICAL_ENTITY),
        synset(11, ("whole",), THING),
        synset(ANIMAL, ("animal", "beast"), 11),
        synset(DOG, ("dog",), ANIMAL),
        synset(POODLE, ("poodle",), DOG),
        synset(TIGER, ("tiger",), ANIMAL),
        synset(PERSON, ("person",), 11, 18),
        synset(FIERCE, ("tiger",), PERSON, 18),
    ]
    senses = {"tiger": (FIERCE, TIGER), "animal": (ANIMAL,), "beast": (ANIMAL,), "dog": (DOG,)}
    senses |= {"poodle": (POODLE,), "person": (PERSON,), "object": (THING,), "whole": (11,)}
    return WordNet({each.offset: each for each in chain}, senses)


def test_kinds_are_what_stands_below() -> None:
    names = ["Toy Poodle", "tiger", "dog", "poodle (big)", "nothing known", *["x"] * 10]
    kinds = kinds_of_names(names, _wordnet(), {"dog": ("狗",), "cat": ("猫",)})
    assert kinds == {
        "animal": (0, 1, 2, 3),
        "beast": (0, 1, 2, 3),
        "dog": (0, 2, 3),
        "狗": (0, 2, 3),
        "poodle": (0, 3),
    }


def test_what_covers_most_names_says_nothing() -> None:
    kinds = kinds_of_names(["dog", "poodle", "tiger"], _wordnet(), {})
    assert "animal" not in kinds
    assert kinds == {}  # dog covers two of three, poodle and tiger are themselves


def test_the_id_of_a_class_says_what_its_name_means() -> None:
    """Not the most common meaning, unless both are things of one sort."""
    names = ["tiger", "Toy Poodle", "dog", *["x"] * 10]
    kinds = kinds_of_names(names, _wordnet(), {}, {"tiger": POODLE})
    assert kinds["animal"] == (0, 1, 2)
    assert kinds["poodle"] == (0, 1)
    assert "tiger" not in kinds
    person = kinds_of_names(names, _wordnet(), {}, {"dog": FIERCE})
    assert person["animal"] == (0, 1)
    assert person["person"] == (2,)
