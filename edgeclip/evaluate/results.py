"""What a comparison of models found: a row a model, and what all rows were measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edgeclip.evaluate.metrics import Share, auroc, false_positive_rate
from edgeclip.evaluate.passes import LeftOut
from edgeclip.evaluate.retrieval import RetrievalReport
from edgeclip.evaluate.zero_shot import Ranking, ZeroShotReport

__all__ = ["Comparison", "Counts", "OutOfDistribution", "Robustness", "Row"]


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
        auroc: by score, ``"score"`` (largest softmax probability; Hendrycks & Gimpel 2017) and
            ``"similarity"`` (largest cosine).
        fpr95: share of the outside ones above the threshold that keeps 95 % of the inside ones, by score.
    """

    inside: int
    outside: int
    auroc: Mapping[str, float]
    fpr95: Mapping[str, float]

    @classmethod
    def of(cls, inside: Ranking, outside: Ranking) -> OutOfDistribution:
        """Return what two rankings over the same labels say, by each score that both have."""
        pairs = {
            "score": (inside.score, outside.score),
            "similarity": (inside.similarity, outside.similarity),
        }
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
        )


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
    """

    name: str
    about: Mapping[str, Any]
    reports: Mapping[str, ZeroShotReport] = field(default_factory=dict)
    retrieval: Mapping[str, RetrievalReport] = field(default_factory=dict)
    agreement: Mapping[str, Share] = field(default_factory=dict)
    robustness: Mapping[str, Robustness] = field(default_factory=dict)
    ood: Mapping[str, OutOfDistribution] = field(default_factory=dict)

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
            said["out_of_distribution"] = {language: asdict(each) for language, each in self.ood.items()}
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

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        said: dict[str, Any] = {"task": self.task, "data": self.data.to_dict()}
        if self.task == "zero-shot":
            said |= {"labels": self.labels, "languages": list(self.columns)}
            said["templates"] = {language: list(texts) for language, texts in self.templates.items()}
        else:
            said |= {"captions": list(self.columns), "without_caption": dict(self.without)}
        if self.ood is not None:
            said["ood_data"] = self.ood.to_dict()
        said["seeds"] = {} if self.seed is None else {"corruptions": self.seed}
        return said | {"rows": [row.to_dict() for row in self.rows]}
