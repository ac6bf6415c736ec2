"""What a comparison of models found: a row a model, and what all rows were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.answers import Answers
from edgeclip.evaluate.metrics import Share, auroc, bootstrap_interval, false_positive_rate, share
from edgeclip.evaluate.offered import Instead
from edgeclip.evaluate.passes import LeftOut
from edgeclip.evaluate.retrieval import RetrievalReport
from edgeclip.evaluate.zero_shot import Ranking, ZeroShotReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Comparison",
    "Counts",
    "Interval",
    "OutOfDistribution",
    "Rejections",
    "Robustness",
    "Row",
    "SeveralLabels",
]


_PLAIN = Answers()


@dataclass(frozen=True)
class Interval:
    """A number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Robustness:
    """Top-1 on corrupted pictures.

    Attributes:
        clean: share on the pictures as they are.
        corrupted: share by corruption and severity.
    """

    clean: Share
    corrupted: Mapping[str, Mapping[int, Share]]

    def mean_of(self, corruption: str) -> float:
        """Return the mean over the severities of one corruption."""
        return float(np.mean([each.value for each in self.corrupted[corruption].values()]))

    @property
    def mean(self) -> float:
        """Mean over corruptions and severities."""
        return float(np.mean([self.mean_of(name) for name in self.corrupted]))

    @property
    def retained(self) -> float | None:
        """The mean as a share of what is right on clean pictures; ``None`` where nothing is."""
        return self.mean / self.clean.value if self.clean.value else None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "clean": asdict(self.clean),
            "mean": self.mean,
            "retained": self.retained,
            "corruptions": {
                name: {
                    "mean": self.mean_of(name),
                    "severities": {str(severity): asdict(each) for severity, each in shares.items()},
                }
                for name, shares in self.corrupted.items()
            },
        }


@dataclass(frozen=True)
class OutOfDistribution:
    """How well a score tells pictures that have a label from others.

    Attributes:
        inside: pictures with one of the labels.
        outside: pictures with none of them.
        auroc: by score, ``"score"`` (largest softmax probability; Hendrycks & Gimpel 2017), ``"similarity"``
            (largest cosine) and ``"gate"`` (of the gate, where one rejects).
        fpr95: share of the outside ones above the threshold that keeps 95 % of the inside ones, by score.
        accepted: share of the outside ones that the gate accepts; ``None`` without one.
    """

    inside: int
    outside: int
    auroc: Mapping[str, float]
    fpr95: Mapping[str, float]
    accepted: Share | None = None

    @classmethod
    def of(cls, inside: Ranking, outside: Ranking) -> OutOfDistribution:
        """Return what two rankings over the same labels say, by each score that both have."""
        pairs = {name: (getattr(inside, name), getattr(outside, name)) for name in _TELLING}
        scores = {
            name: np.concatenate([first, second])
            for name, (first, second) in pairs.items()
            if first is not None and second is not None
        }
        positive = np.arange(len(inside.best) + len(outside.best)) < len(inside.best)
        return cls(
            len(inside.best),
            len(outside.best),
            {name: auroc(values, positive) for name, values in scores.items()},
            {name: false_positive_rate(values, positive) for name, values in scores.items()},
            None if outside.given is None else share(outside.given > 0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        said = asdict(self)
        if self.accepted is None:
            del said["accepted"]
        return said


_TELLING = ("score", "similarity", "gate")  # of a ranking, what tells pictures apart


@dataclass(frozen=True)
class Rejections:
    """What becomes of pictures where none need be given a label.

    Attributes:
        threshold: of the gate.
        right: share of all pictures that are accepted, and whose first label is right.
        wrong: share that are accepted, and whose first label is wrong.
        rejected: share that are given no label.
        held_out: the same pictures, and again each without its own label among those offered: told apart,
            and what is accepted then. ``None`` where no label would be left, and for a bundle's own labels.
    """

    threshold: float
    right: Share
    wrong: Share
    rejected: Share
    held_out: OutOfDistribution | None = None

    @classmethod
    def of(
        cls, ranking: Ranking, targets: NDArray[np.intp], threshold: float, held_out: Ranking | None
    ) -> Rejections:
        """Return what a ranking with a gate says of pictures with the labels ``targets`` ``(N,)``."""
        if ranking.given is None:
            raise ValueError("a ranking without a gate rejects nothing")
        accepted, hits = ranking.given > 0, ranking.first == targets
        return cls(
            threshold,
            share(accepted & hits),
            share(accepted & ~hits),
            share(~accepted),
            None if held_out is None else OutOfDistribution.of(ranking, held_out),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"held_out": None if self.held_out is None else self.held_out.to_dict()}


@dataclass(frozen=True)
class SeveralLabels:
    """How good the labels given are, where each is judged by itself; over all pairs of picture and label.

    Attributes:
        f1: of precision and recall, with its 95 % bootstrap interval over pictures.
        precision: share of given labels that are right.
        recall: share of right labels that are given.
        given: labels given to a picture, mean.
        right: labels right for a picture, mean.
        first_alone: F1 of giving every picture its first label and no other, with its interval.
    """

    f1: Interval
    precision: float
    recall: float
    given: float
    right: float
    first_alone: Interval

    @classmethod
    def of(cls, counts: NDArray[np.intp]) -> SeveralLabels:
        """Return it of counts ``(N, 4)``: labels given and right, given, right, and whether the first is."""
        hits, given, right, _ = counts.sum(axis=0).tolist()
        alone = np.stack([counts[:, 3], np.ones_like(counts[:, 3]), counts[:, 2]], axis=1)
        return cls(
            _f1(counts[:, :3]),
            hits / given if given else 0.0,
            hits / right,
            given / len(counts),
            right / len(counts),
            _f1(alone),
        )


def _f1(counts: NDArray[np.intp]) -> Interval:
    def f1(rows: NDArray[np.float64]) -> float:
        hits, given, right = rows.sum(axis=0)
        return float(2 * hits / (given + right))

    return Interval(f1(counts.astype(np.float64)), *bootstrap_interval(counts, f1))


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: as the table calls it.
        about: what it is.
        reports: by language, for zero-shot.
        retrieval: by kind of caption, for retrieval.
        agreement: share of pictures on which its first label is the first row's, by language; empty for the
            first row.
        robustness: by language.
        ood: by language.
        rejections: by language, where a gate rejects.
        several: by language, where each label is judged by itself.
    """

    name: str
    about: Mapping[str, Any]
    reports: dict[str, ZeroShotReport] = field(default_factory=dict)
    retrieval: Mapping[str, RetrievalReport] = field(default_factory=dict)
    agreement: dict[str, Share] = field(default_factory=dict)
    robustness: dict[str, Robustness] = field(default_factory=dict)
    ood: dict[str, OutOfDistribution] = field(default_factory=dict)
    rejections: dict[str, Rejections] = field(default_factory=dict)
    several: dict[str, SeveralLabels] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        said: dict[str, Any] = {"name": self.name, "about": dict(self.about)}
        if self.reports:
            said["zero_shot"] = {
                language: {key: value for key, value in report.to_dict().items() if key not in _SHARED}
                for language, report in self.reports.items()
            }
        if self.retrieval:
            said["retrieval"] = {kind: report.to_dict() for kind, report in self.retrieval.items()}
        if self.agreement:
            said["agreement"] = {language: asdict(each) for language, each in self.agreement.items()}
        if self.robustness:
            said["robustness"] = {language: each.to_dict() for language, each in self.robustness.items()}
        if self.ood:
            said["out_of_distribution"] = {language: each.to_dict() for language, each in self.ood.items()}
        if self.rejections:
            said["rejection"] = {language: each.to_dict() for language, each in self.rejections.items()}
        if self.several:
            said["several_labels"] = {language: asdict(each) for language, each in self.several.items()}
        return said


_SHARED = ("schema", "skipped", "groups")  # of a report: said once for all rows


@dataclass(frozen=True)
class Counts:
    """What became of the pictures of a set.

    Attributes:
        path: of the set.
        total: pictures in it.
        taken: pictures that were to be measured, after the limit.
        measured: those of them that could be read.
        left_out: those that could not be used or read, and why.
    """

    path: str
    total: int
    taken: int
    measured: int
    left_out: tuple[LeftOut, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self) | {"left_out": [asdict(each) for each in self.left_out]}


@dataclass(frozen=True)
class Comparison:
    """Rows of one table, and what they were measured on.

    Attributes:
        task: ``"zero-shot"`` or ``"retrieval"``.
        rows: the first is the reference.
        data: the pictures.
        labels: how many are offered; 0 for retrieval.
        templates: prompts by language.
        columns: languages, or kinds of captions.
        without: by kind of caption, pictures that have none and are not part of its numbers.
        ood: the pictures without a label.
        seed: of the corruptions' chance; ``None`` where there are none.
        answers: what was asked of each picture, beside which label fits best.
        instead: what answered in place of labels that models encode; ``None`` for these.
    """

    task: str
    rows: tuple[Row, ...]
    data: Counts
    columns: tuple[str, ...]
    labels: int = 0
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: Mapping[str, int] = field(default_factory=dict)
    ood: Counts | None = None
    seed: int | None = None
    answers: Answers = _PLAIN
    instead: Instead | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        said: dict[str, Any] = {"task": self.task, "data": self.data.to_dict()}
        if self.task == "zero-shot":
            said |= {"labels": self.labels, "languages": list(self.columns)}
            instead: dict[str, Any] = {"bank": None, "head": None, "own_labels": False}
            instead |= {} if self.instead is None else self.instead.to_dict()
            said["asked"] = {**instead, **asdict(self.answers), "context": list(self.answers.context)}
            said["templates"] = {language: list(texts) for language, texts in self.templates.items()}
        else:
            said |= {"captions": list(self.columns), "without_caption": dict(self.without)}
        if self.ood is not None:
            said["ood_data"] = self.ood.to_dict()
        said["seeds"] = {} if self.seed is None else {"corruptions": self.seed}
        return said | {"rows": [row.to_dict() for row in self.rows]}
