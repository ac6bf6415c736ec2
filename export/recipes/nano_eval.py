"""How well the small model does: a name among few and among all, on stamps and pictograms of an unseen style.

``n``-way: the right name against ``n − 1`` drawn from the others, a hundred draws, the same for every model.
Stamps are cut-out photographs (``stamps.py``); pictograms are of a set that no picture was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import InputError
from edgeclip.evaluate.subjects import Subject
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.preprocess import Preprocess

from .emoji import read_pictograms
from .stamps import Stamp, of_half

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Question", "answers", "judged", "n_way", "pictogram_questions", "stamp_questions"]

DRAWS = 100
_BATCH = 32


@dataclass(frozen=True)
class Question:
    """A picture and the names it has.

    Attributes:
        path: of the picture.
        key: names it in rows.
        english: its name.
        chinese: its name.
    """

    path: Path
    key: str
    english: str
    chinese: str

    def name(self, language: str) -> str:
        """Return the name in ``"en"`` or ``"zh"``."""
        return self.english if language == "en" else self.chinese


def stamp_questions(stamps: Sequence[Stamp], package: Path, half: str, language: str) -> list[Question]:
    """Return the pictures of one half that are judged in a language.

    Args:
        stamps: all of them.
        package: the unpacked package.
        half: ``"tune"`` or ``"report"``.
        language: of the names.
    """
    return [
        Question(stamp.path(package), stamp.file, stamp.en, stamp.zh)
        for stamp in of_half(stamps, half, language)
    ]


def pictogram_questions(emojibase: Path, drawings: Path) -> list[Question]:
    """Return every emoji without skin tone that a set draws.

    Args:
        emojibase: the unpacked package ``emojibase-data``.
        drawings: folder of the set's files.
    """
    listed = read_pictograms(emojibase, (drawings,))
    return [Question(one.files[0], one.code, one.english, one.chinese) for one in listed]


def answers(
    subject: Subject, questions: Sequence[Question], language: str, names: Sequence[str] | None = None
) -> NDArray[np.float32]:
    """Return cosines ``(n, N)`` of pictures and names.

    Args:
        subject: what is judged.
        questions: the pictures.
        language: of the names: ``"en"`` through the templates ``one``, ``"zh"`` through ``zh``.
        names: all that are offered; those of the questions, sorted, if not given.
    """
    offered = _offered(questions, language) if names is None else tuple(names)
    bank = subject.bank(LabelSet.of(list(offered)), Templates.of("one" if language == "en" else "zh"))
    return _images(subject, questions) @ bank.embeddings.T


def _images(subject: Subject, questions: Sequence[Question]) -> NDArray[np.float32]:
    prepare = Preprocess(subject.preprocess)
    return np.concatenate(
        [
            subject.images(np.stack([prepare(each.path) for each in questions[start : start + _BATCH]]))
            for start in range(0, len(questions), _BATCH)
        ]
    )


def _offered(questions: Sequence[Question], language: str) -> tuple[str, ...]:
    return tuple(sorted({each.name(language) for each in questions}))


def n_way(
    cosines: NDArray[np.float32], own: NDArray[np.intp], n: int, *, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Return each picture's share of draws in which its own name is the best of ``n``; ties count against it.

    Args:
        cosines: ``(m, N)`` of pictures and names.
        own: ``(m,)`` columns of the right names.
        n: names offered, the right one among them.
        draws: sets of other names a picture.
        seed: of these.

    Raises:
        InputError: there are fewer than ``n`` names.
    """
    pictures, names = cosines.shape
    if not 2 <= n <= names:
        raise InputError(f"{n}-way: got {names} names, expected at least {n}, and n from 2.")
    rng = np.random.default_rng(seed)
    won = np.zeros(pictures)
    rows = np.arange(pictures)
    for _ in range(draws):
        # The others in a random order; the right name goes last.
        keys = rng.random((pictures, names))
        keys[rows, own] = 2.0
        others = np.argpartition(keys, n - 2, axis=1)[:, : n - 1]
        won += (cosines[rows[:, None], others] < cosines[rows, own][:, None]).all(axis=1)
    return won / draws


def judged(
    subject: Subject,
    questions: Sequence[Question],
    language: str,
    n: int,
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the figures of a set, and a row a picture.

    Args:
        subject: what is judged.
        questions: the pictures.
        language: of the names.
        n: of the ``n``-way figure.
        names: all that are offered; those of the questions if not given.
    """
    offered = _offered(questions, language) if names is None else tuple(names)
    cosines = answers(subject, questions, language, offered)
    column = {name: index for index, name in enumerate(offered)}
    own = np.array([column[each.name(language)] for each in questions], np.intp)
    shares = n_way(cosines, own, n)
    rank = (cosines >= cosines[np.arange(len(own)), own][:, None]).sum(axis=1)
    return {
        "language": language,
        "pictures": len(questions),
        "names": len(offered),
        f"{n}-way": round(float(shares.mean()), 4),
        "top1": round(float((rank <= 1).mean()), 4),
        "top5": round(float((rank <= 5).mean()), 4),
        "rows": [
            {
                "picture": each.key,
                "name": each.name(language),
                "rank": int(at),
                f"{n}-way": round(float(share), 2),
            }
            for each, at, share in zip(questions, rank, shares, strict=True)
        ],
    }
