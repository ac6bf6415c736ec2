"""Answers: what is asked of embeddings, and what is said of each picture.

:class:`Answers` says what is asked: only the best labels, or also whether any of them fits (``reject``), or
which of them fit, each by itself (``multi``). :class:`InForce` holds everything that an answer is made of, so
that a change of labels is one assignment.

    >>> Answers(reject=True)
    Answers(reject=True, multi=False, threshold=None, context=())
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from .errors import ConfigError
from .heads import ContextHead, Head, LinearHead, TemperatureHead, best_of, cosines
from .label_sets import MAX_LABEL_CHARS, Templates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .few_shot import FewShotHead
    from .labels import LabelBank
    from .reject import Gate

__all__ = ["Answer", "Answers", "InForce", "Prediction", "Rejection", "crossed", "in_context"]

Ranked: TypeAlias = "tuple[float, int, float]"
"""Of a label: similarity, its number among those offered, score."""
MAX_CONTEXTS = 100
"""Most contexts of one set of labels: each costs as many texts and rows as there are labels."""


@dataclass(frozen=True)
class Answers:
    """What is asked of each picture.

    Attributes:
        reject: give no label to a picture that shows none of those offered.
        multi: judge each label by itself; give those that fit, be they none or several.
        threshold: score from which a label fits; ``None`` is that of the bundle or the head.
        context: where and how the pictures may have been taken, such as ``"on snow"`` or ``"a blurred {}"``.

    Raises:
        ConfigError: both ``reject`` and ``multi``, a threshold without either or that is no number, or a
            context that is empty, repeated, no more than ``{}`` or has more than one of these.
    """

    reject: bool = False
    multi: bool = False
    threshold: float | None = None
    context: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reject and self.multi:
            raise ConfigError("answers: got reject and multi together; give one: multi rejects, too.")
        if self.threshold is not None:
            if not (self.reject or self.multi):
                raise ConfigError("answers: got a threshold, but neither reject nor multi; give one of them.")
            if not math.isfinite(self.threshold):
                raise ConfigError(f"answers: threshold is {self.threshold!r}, expected a number.")
        if isinstance(cast("object", self.context), str):
            raise ConfigError(f"context: got one string {self.context!r}, expected a list of phrases.")
        if len(self.context) > MAX_CONTEXTS:
            raise ConfigError(f"context: {len(self.context)} phrases, at most {MAX_CONTEXTS} are allowed.")
        for number, phrase in enumerate(self.context, start=1):
            _check_context(phrase, number)
        # Nothing is a context, too: one that is there twice would count twice.
        patterns = [" ".join(_pattern(phrase).split()) for phrase in self.context]
        if len({"{}", *patterns}) <= len(patterns):
            raise ConfigError(
                f"context: a phrase is repeated or says nothing in {', '.join(self.context)!r}; give each "
                "once."
            )

    @property
    def gated(self) -> bool:
        """Whether a gate decides over labels."""
        return self.reject or self.multi


@dataclass(frozen=True)
class Prediction:
    """One label offered for one picture.

    Attributes:
        label: name of the label.
        score: what the head made of all similarities; for the temperature head the softmax over the labels,
            with ``multi`` the gate's score of this label alone.
        similarity: cosine of picture and label; for a head fitted on pictures the logit.
    """

    label: str
    score: float
    similarity: float


@dataclass(frozen=True)
class Rejection:
    """Whether a picture shows any of the labels at all.

    Attributes:
        score: more means "one of the labels".
        threshold: from which a picture is accepted.
    """

    score: float
    threshold: float

    @property
    def rejected(self) -> bool:
        """Whether the picture shows none of them."""
        return self.score < self.threshold


@dataclass(frozen=True)
class Answer:
    """What is said of one picture.

    Attributes:
        predictions: best first; none for a picture that was rejected.
        rejection: what the gate said; ``None`` where it was not asked.
    """

    predictions: tuple[Prediction, ...]
    rejection: Rejection | None = None

    @property
    def is_nan(self) -> bool:
        """Whether this was made of an embedding that is not a number."""
        asked = self.rejection
        if asked is not None and asked.score != asked.score:
            return True
        said = self.predictions
        return bool(said) and said[0].similarity != said[0].similarity


@dataclass(frozen=True, eq=False)
class InForce:
    """Everything that answers are made of: one object, so that a swap is one assignment.

    Attributes:
        names: ``(N,)`` what may be predicted.
        rows: ``(R + M, E)`` what embeddings are multiplied with: the head's rows, then the gate's.
        head: makes similarities and scores of the first R products.
        gate: judges whether labels fit, with the last M products; ``None`` where nobody asked.
        multi: whether it judges each label by itself.
        bank: the labels; ``None`` for a head fitted on pictures.
        fitted: that head; ``None`` for labels.
    """

    names: tuple[str, ...]
    rows: NDArray[np.float32]
    head: Head
    gate: Gate | None = None
    multi: bool = False
    bank: LabelBank | None = None
    fitted: FewShotHead | None = None

    @property
    def score_kind(self) -> str:
        """What ``Prediction.score`` is, as JSON output names it."""
        return self.gate.method if self.multi and self.gate is not None else self.head.score_kind

    def answer(self, embeddings: NDArray[np.float32], top_k: int) -> list[Answer]:
        """Return an answer for each of the unit embeddings ``(B, E)``.

        A similarity that is not a number stays one; whoever has the embeddings knows what that means.
        """
        return [
            Answer(self._named(best if asked is None else self.fitting(best, asked)), asked)
            for best, asked in self.ranked(embeddings, top_k)
        ]

    def ranked(
        self, embeddings: NDArray[np.float32], top_k: int
    ) -> list[tuple[list[Ranked], Rejection | None]]:
        """Return the ``top_k`` labels of each of ``(B, E)``, whether they fit or not, and what the gate says.

        They are ordered by similarity; where each label is judged by itself, by that score.
        """
        products = cosines(embeddings, self.rows)
        gate = self.gate
        if gate is None:
            return [(best, None) for best in best_of(self.head.similarity(products), self.head, top_k=top_k)]
        own = products.shape[1] - len(gate.rows)
        similarity, others = self.head.similarity(products[:, :own]), products[:, own:]
        if self.multi:
            return _each_alone(similarity, gate.alone(similarity, others), gate.threshold_alone, top_k)
        ranking = best_of(similarity, self.head, top_k=top_k)
        scores = gate.scores(similarity, others).tolist()
        return [(best, Rejection(score, gate.threshold)) for best, score in zip(ranking, scores, strict=True)]

    def fitting(self, best: list[Ranked], asked: Rejection) -> list[Ranked]:
        """Return those of the best labels that are given."""
        if self.multi:
            return [each for each in best if each[2] >= asked.threshold]
        return [] if asked.rejected else best

    def _named(self, best: list[Ranked]) -> tuple[Prediction, ...]:
        names = self.names
        return tuple([Prediction(names[row], score, similarity) for similarity, row, score in best])


def _each_alone(
    similarity: NDArray[np.float32], alone: NDArray[np.float64], threshold: float, top_k: int
) -> list[tuple[list[Ranked], Rejection | None]]:
    """Return the labels with the greatest scores of their own ``(B, N)``."""
    found: list[tuple[list[Ranked], Rejection | None]] = []
    for row, scores in zip(similarity, alone, strict=True):
        order = (-scores).argsort(kind="stable")[:top_k].tolist()
        best = [(row.item(each), each, scores.item(each)) for each in order]
        found.append((best, Rejection(best[0][2], threshold)))
    return found


def crossed(groups: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return every way to say one phrase or none of each group, but for none of any.

    What is independent in a picture (its texture, its place) is a group, so that both are inferred:

        >>> crossed([["striped {}"], ["on snow", "at night"]])
        ('{} on snow', '{} at night', 'striped {}', 'striped {} on snow', 'striped {} at night')
    """
    patterns = ["{}"]
    for group in groups:
        patterns = [
            _pattern(phrase).replace("{}", pattern) for pattern in patterns for phrase in ("{}", *group)
        ]
    return tuple(patterns[1:])


def in_context(templates: Templates, phrase: str) -> Templates:
    """Return prompt templates for labels in a context.

    A phrase with ``{}`` holds the label (``"a blurred {}"``); one without follows it (``"on snow"``).

    Raises:
        ConfigError: a template becomes too long.
    """
    return Templates.of([text.replace("{}", _pattern(phrase)) for text in templates.texts])


def _pattern(phrase: str) -> str:
    return phrase if "{}" in phrase else f"{{}} {phrase}"


def of_bank(
    bank: LabelBank,
    head: TemperatureHead,
    answers: Answers,
    gate: Gate | None,
    contexts: Sequence[LabelBank] = (),
) -> InForce:
    """Return what is in force when a bank is offered.

    Args:
        bank: the labels.
        head: of this bank.
        answers: what is asked.
        gate: of this bank, where it is asked for.
        contexts: the same labels in each context.
    """
    rows = bank.embeddings
    if contexts:
        head = ContextHead(head.scale, 1 + len(contexts))
        rows = np.concatenate([rows, *(each.embeddings for each in contexts)])
    return InForce(bank.names, _with_gate(rows, gate), head, gate, answers.multi, bank)


def of_few_shot(fitted: FewShotHead, answers: Answers, gate: Gate | None) -> InForce:
    """Return what is in force when a head fitted on pictures is offered."""
    rows, head = _with_gate(fitted.weights, gate), LinearHead(fitted.bias)
    return InForce(fitted.names, rows, head, gate, answers.multi, fitted=fitted)


def _with_gate(rows: NDArray[np.float32], gate: Gate | None) -> NDArray[np.float32]:
    return rows if gate is None or not len(gate.rows) else np.concatenate([rows, gate.rows])


def _check_context(phrase: str, number: int) -> None:
    where = f"context, entry {number}"
    if not isinstance(phrase, str) or not phrase.strip():
        raise ConfigError(
            f"{where}: got {phrase!r}, expected a phrase such as 'on snow' or 'a blurred {{}}'."
        )
    rest = phrase.replace("{}", "", 1)
    if "{" in rest or "}" in rest:
        raise ConfigError(f"{where}: got {phrase[:80]!r}, expected at most one {{}}, for the label.")
    if len(phrase) > MAX_LABEL_CHARS or not phrase.isprintable():
        raise ConfigError(
            f"{where}: got {phrase[:80]!r}, expected printable text of at most {MAX_LABEL_CHARS} characters."
        )
