"""Zero-shot classification of labelled pictures: how often is the right label first, or among the first five?

Three ways in, one report: embeddings that are there already (:func:`evaluate_zero_shot`), an open
``ZeroShotClassifier`` (:func:`evaluate_classifier`: what its users get, head and all), and any function that
embeds pictures (:func:`evaluate_embedder`: an eager model, without its framework being imported here).

    >>> with ZeroShotClassifier.open() as classifier:                                    # doctest: +SKIP
    ...     classifier.set_labels(read_labels("shapes/labels.json"))
    ...     print(evaluate_classifier(classifier, read_samples(["shapes/held_out.jsonl"])).to_table())
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.metrics import (
    Share,
    confusions,
    expected_calibration_error,
    mean_per_class_recall,
    share,
    top_k,
    unit_rows,
)
from edgeclip.heads import SHARES
from edgeclip.labels import LabelBank
from edgeclip.runtime.statistics import CONFIDENCE

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from edgeclip.answers import InForce
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.data import Sample
    from edgeclip.preprocess import Preprocess

__all__ = [
    "NamedConfusion",
    "Ranking",
    "ZeroShotReport",
    "evaluate_classifier",
    "evaluate_embedder",
    "evaluate_zero_shot",
    "rank_pictures",
    "ranking_of",
    "report_of",
]

SCHEMA = 1
_BEST = 5
_CHUNK = 1024  # rows whose scores are held at once

Grouping = Callable[["Sample"], str | None]


@dataclass(frozen=True)
class NamedConfusion:
    """``count`` of the ``of`` pictures of ``target`` were taken for ``predicted``."""

    target: str
    predicted: str
    count: int
    of: int


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a model says about N pictures.

    Attributes:
        best: ``(N, k)`` numbers of the most similar labels, the best first; k is 5, or all where fewer are
            offered.
        similarity: ``(N,)`` cosine of the best one.
        score: ``(N,)`` float64 softmax of the best one over all labels; ``None`` without a scale, or where
            scores are no such shares.
        gate: ``(N,)`` float64 score of the gate that accepts or rejects; ``None`` where nobody asked.
        given: ``(N,)`` how many of the best labels are given; ``None`` where all are.
    """

    best: NDArray[np.intp]
    similarity: NDArray[np.floating[Any]]
    score: NDArray[np.float64] | None = None
    gate: NDArray[np.float64] | None = None
    given: NDArray[np.intp] | None = None

    @property
    def first(self) -> NDArray[np.intp]:
        """The label of each picture."""
        first: NDArray[np.intp] = self.best[:, 0]
        return first

    def cut(self) -> Ranking:
        """Return the ranking with five labels a picture at most."""
        return replace(self, best=self.best[:, :_BEST].copy())

    @classmethod
    def joined(cls, parts: Sequence[Ranking]) -> Ranking:
        """Return one ranking of what was ranked in parts; at least one."""
        names = [each.name for each in fields(cls) if getattr(parts[0], each.name) is not None]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class ZeroShotReport:
    """What an evaluation found.

    Attributes:
        n: pictures.
        labels: labels offered.
        top1: share of pictures whose label came first.
        top5: share of pictures whose label was among the first five; everything where fewer are offered.
        mean_per_class_recall: mean share of labels that have pictures.
        calibration_error: expected calibration error of the scores; ``None`` without scores.
        groups: top-1 of each group of pictures.
        confusions: labels most often taken for another one.
        skipped: pictures that could not be read, and why; they are not part of ``n``.
        per_class: top-1 of the pictures of each label, where asked for.
    """

    n: int
    labels: int
    top1: Share
    top5: Share
    mean_per_class_recall: float
    calibration_error: float | None = None
    groups: Mapping[str, Share] = field(default_factory=dict)
    confusions: tuple[NamedConfusion, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    per_class: Mapping[str, Share] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, with ``"schema"``."""
        said = asdict(self)
        if not self.per_class:
            del said["per_class"]
        said["skipped"] = [{"key": key, "reason": reason} for key, reason in self.skipped]
        said["confusions"] = list(said["confusions"])
        return {"schema": SCHEMA, **said}

    def to_table(self) -> str:
        """Return it as lines for people."""
        lines = [
            f"{self.n:,} pictures, {self.labels:,} labels offered",
            f"top-1                  {_shown(self.top1)}",
            f"top-5                  {_shown(self.top5)}",
            f"mean per-class recall  {self.mean_per_class_recall:6.1%}",
        ]
        if self.calibration_error is not None:
            lines.append(f"calibration error      {self.calibration_error:6.1%}")
        width = max((len(name) for name in self.groups), default=0)
        lines += [f"  {name:{width}}  {_shown(each)}  n {each.n:,}" for name, each in self.groups.items()]
        if self.confusions:
            lines.append("most often confused:")
            lines += [
                f"  {each.target} -> {each.predicted}  {each.count} of {each.of}" for each in self.confusions
            ]
        if self.skipped:
            key, reason = self.skipped[0]
            lines.append(f"{len(self.skipped):,} pictures could not be read, first {key!r}: {reason}")
        return "\n".join(lines)


def _shown(each: Share) -> str:
    return f"{each.value:6.1%}  ({each.low:.1%} to {each.high:.1%}, {each.confidence:.0%} interval)"


def evaluate_zero_shot(
    image_embeddings: ArrayLike,
    text_embeddings: ArrayLike | LabelBank,
    targets: Sequence[int] | Sequence[str] | NDArray[np.integer[Any]],
    *,
    labels: Sequence[str] | None = None,
    groups: Sequence[str | None] | None = None,
    scale: float | None = None,
    confidence: float = CONFIDENCE,
) -> ZeroShotReport:
    """Return how often each picture is closest to its label, by cosine.

    Args:
        image_embeddings: ``(N, E)``, of any length but zero; computed in float64 if they are, else float32.
        text_embeddings: ``(C, E)``, or a label bank.
        targets: the label of each picture, by number or by name.
        labels: names of the labels; those of a bank if missing.
        groups: of each picture, its group; ``None`` for none.
        scale: multiplier of cosines; with it scores are their softmax and a calibration error is given.
        confidence: of the intervals.

    Raises:
        InputError: shapes disagree, a label is not offered, or an embedding is zero or not finite.
        ConfigError: ``confidence`` is out of range.
    """
    if isinstance(text_embeddings, LabelBank):
        labels = text_embeddings.names if labels is None else labels
        text_embeddings = text_embeddings.embeddings
    images = unit_rows("image embeddings", image_embeddings)
    texts = unit_rows("text embeddings", text_embeddings)
    if images.shape[1] != texts.shape[1]:
        raise InputError(
            f"zero-shot: image embeddings have {images.shape[1]} dimensions and text embeddings "
            f"{texts.shape[1]}; they must come from one model."
        )
    names = tuple(map(str, range(len(texts)))) if labels is None else tuple(labels)
    if len(names) != len(texts):
        raise InputError(f"zero-shot: got {len(names)} names for {len(texts)} labels.")
    ranking = rank_pictures(images, texts, scale=scale)
    return report_of(ranking, _numbers(targets, names), names, groups=groups, confidence=confidence)


def rank_pictures(
    images: NDArray[np.floating[Any]], texts: NDArray[np.floating[Any]], *, scale: float | None = None
) -> Ranking:
    """Return the labels most similar to each picture; of equal ones the first offered comes first.

    Args:
        images: ``(N, E)`` unit rows.
        texts: ``(C, E)`` unit rows of the labels.
        scale: multiplier of cosines; with it scores are given.

    Raises:
        InputError: an embedding is not finite.
    """
    parts = []
    for start in range(0, len(images), _CHUNK):
        cosine = images[start : start + _CHUNK] @ texts.T  # (b, C)
        best = top_k(cosine, _BEST)
        score = None
        if scale is not None:
            logits = scale * cosine.astype(np.float64)
            score = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        parts.append(Ranking(best, np.take_along_axis(cosine, best[:, :1], axis=1)[:, 0], score))
    if not parts:
        return Ranking(np.empty((0, 1), np.intp), np.empty(0, np.float32))
    return Ranking.joined(parts)


def ranking_of(force: InForce, images: NDArray[np.float32], *, what: str = "image embeddings") -> Ranking:
    """Return what is answered of unit embeddings ``(N, E)``, N at least 1, as devices answer it.

    Args:
        force: what makes the answers.
        images: the embeddings.
        what: how errors call them.

    Raises:
        InputError: an embedding is not finite.
    """
    if not np.isfinite(images).all():
        raise InputError(f"{what}: row {int(np.argmin(np.isfinite(images).all(axis=1)))} is not finite.")
    said = force.ranked(images, len(force.names) if force.multi else _BEST)
    firsts = [best[0] for best, _ in said]
    asked = [rejection for _, rejection in said if rejection is not None]
    given = [len(force.fitting(best, rejection)) for best, rejection in said if rejection is not None]
    return Ranking(
        np.array([[number for _, number, _ in best] for best, _ in said], np.intp),
        np.array([similarity for similarity, _, _ in firsts], np.float32),
        np.array([score for _, _, score in firsts]) if force.score_kind in SHARES else None,
        np.array([rejection.score for rejection in asked]) if asked else None,
        np.array(given, np.intp) if asked else None,
    )


def evaluate_classifier(
    classifier: ZeroShotClassifier,
    samples: Iterable[Sample],
    *,
    batch_size: int = 8,
    workers: int | None = None,
    groups: Grouping | None = None,
    confidence: float = CONFIDENCE,
    progress: Callable[[int], None] | None = None,
) -> ZeroShotReport:
    """Return how well an open classifier does with the labels it offers.

    Args:
        classifier: an open one; its labels in force are offered.
        samples: pictures with labels.
        batch_size: pictures a tower call.
        workers: decoding threads.
        groups: names the group of a picture, if it has one.
        confidence: of the intervals.
        progress: called after each picture with how many are done.

    Raises:
        InputError: no picture can be read, or one has no label or one that is not offered.
        ConfigError: the classifier rejects, so that pictures have no ranking.
        BackendError: the tower failed.
    """
    if classifier.answers.gated:
        raise ConfigError(
            "zero-shot: this classifier gives no label to pictures that it rejects, and everything is to be "
            "ranked; open it without, or measure it with `edgeclip eval --reject`."
        )
    names = classifier.labels
    known = {name: index for index, name in enumerate(names)}
    waiting: deque[tuple[Sample, int]] = deque()  # samples may hold their pictures

    def sources() -> Iterator[Any]:
        for sample in samples:
            waiting.append((sample, _number(sample, known)))
            yield sample.source

    rows: list[list[int]] = []
    similarities, scores, targets, grouped, skipped = [], [], [], list[str | None](), []
    outcomes = classifier.classify_stream(sources(), top_k=_BEST, batch_size=batch_size, workers=workers)
    for done, outcome in enumerate(outcomes, start=1):
        sample, target = waiting.popleft()
        if progress is not None:
            progress(done)
        if outcome.error is not None:
            skipped.append((sample.key, str(outcome.error)))
            continue
        rows.append([known[prediction.label] for prediction in outcome.predictions])
        similarities.append(outcome.predictions[0].similarity)
        scores.append(outcome.predictions[0].score)
        targets.append(target)
        grouped.append(None if groups is None else groups(sample))
    return report_of(
        Ranking(
            np.array(rows, np.intp) if rows else np.empty((0, 1), np.intp),
            np.array(similarities),
            np.array(scores) if classifier.score_kind in SHARES else None,
        ),
        np.array(targets, np.intp),
        names,
        groups=grouped,
        skipped=tuple(skipped),
        confidence=confidence,
    )


def evaluate_embedder(
    embed: Callable[[Any], ArrayLike],
    samples: Iterable[Sample],
    text_embeddings: ArrayLike | LabelBank,
    *,
    labels: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    groups: Grouping | None = None,
    scale: float | None = None,
    confidence: float = CONFIDENCE,
    progress: Callable[[int], None] | None = None,
) -> ZeroShotReport:
    """Return how well a function that embeds pictures does.

    Args:
        embed: gives ``(B, E)`` for uint8 ``(B, H, W, 3)`` RGB; without ``preprocess`` it is handed the
            list of paths and bytes instead and reads them itself.
        samples: pictures with labels.
        text_embeddings: ``(C, E)``, or a label bank.
        labels: names of the labels; those of a bank if missing.
        preprocess: reads and resizes pictures; one it cannot read is skipped and named in the report.
        batch_size: pictures a call.
        groups: names the group of a picture, if it has one.
        scale: multiplier of cosines, for a calibration error.
        confidence: of the intervals.
        progress: called after each batch with how many pictures are done.

    Raises:
        InputError: no picture can be read, or one has no label or one that is not offered; embeddings that
            do not fit.
    """
    names = text_embeddings.names if labels is None and isinstance(text_embeddings, LabelBank) else labels
    if names is None:
        raise InputError("zero-shot: got no names of labels, but samples have labels by name; pass `labels`.")
    known = {name: index for index, name in enumerate(names)}
    rows, targets, grouped, skipped = [], [], list[str | None](), []
    source, done = iter(samples), 0
    while batch := list(islice(source, batch_size)):
        inputs: list[Any] = []
        for sample in batch:
            number = _number(sample, known)
            try:
                inputs.append(sample.source if preprocess is None else preprocess(sample.source))
            except InputError as error:
                skipped.append((sample.key, str(error)))
                continue
            targets.append(number)
            grouped.append(None if groups is None else groups(sample))
        if inputs:
            embedded = np.asarray(embed(inputs if preprocess is None else np.stack(inputs)))
            if embedded.ndim != 2 or len(embedded) != len(inputs):
                raise InputError(
                    f"zero-shot: embedding {len(inputs)} pictures gave shape {embedded.shape}, "
                    f"expected ({len(inputs)}, E)."
                )
            rows.append(embedded)
        done += len(batch)
        if progress is not None:
            progress(done)
    if not rows:
        raise _nothing(skipped)
    report = evaluate_zero_shot(
        np.concatenate(rows),
        text_embeddings,
        targets,
        labels=names,
        groups=grouped,
        scale=scale,
        confidence=confidence,
    )
    return ZeroShotReport(**{**report.__dict__, "skipped": tuple(skipped)})


def _number(sample: Sample, known: Mapping[str, int]) -> int:
    if sample.label is None:
        raise InputError(
            f"picture {sample.key!r} has no label; expected a column 'label' or a folder per label."
        )
    return _known(sample.label, known, f"picture {sample.key!r}")


def _known(name: str, known: Mapping[str, int], where: str) -> int:
    if name not in known:
        raise InputError(
            f"{where} has the label {name!r}, which is not among the {len(known)} offered; offer it, or "
            "leave the picture out."
        )
    return known[name]


def _numbers(
    targets: Sequence[int] | Sequence[str] | NDArray[np.integer[Any]], names: Sequence[str]
) -> NDArray[np.intp]:
    given = np.asarray(targets)
    if given.dtype.kind in "US":
        known = {name: index for index, name in enumerate(names)}
        return np.array(
            [_known(str(name), known, f"picture {row}") for row, name in enumerate(targets)], np.intp
        )
    if given.ndim != 1 or (given.dtype.kind not in "iu" and len(given)):
        raise InputError(
            f"targets: got shape {given.shape} of {given.dtype}, expected one number or name a picture."
        )
    outside = (given < 0) | (given >= len(names))
    if outside.any():
        row = int(np.argmax(outside))
        raise InputError(f"targets: entry {row} is {given[row]}, expected 0 to {len(names) - 1}.")
    return given.astype(np.intp)


def report_of(
    ranking: Ranking,
    targets: NDArray[np.intp],
    names: Sequence[str],
    *,
    groups: Sequence[str | None] | None = None,
    skipped: tuple[tuple[str, str], ...] = (),
    per_class: bool = False,
    confidence: float = CONFIDENCE,
) -> ZeroShotReport:
    """Return the report of a ranking.

    Args:
        ranking: of N pictures.
        targets: ``(N,)`` numbers of their labels.
        names: of the labels offered.
        groups: of each picture, its group; ``None`` for none.
        skipped: pictures that are not among these, and why.
        per_class: also report each label.
        confidence: of the intervals.

    Raises:
        InputError: there are no pictures, or counts disagree.
    """
    best, scores = ranking.best, ranking.score
    if not len(best):
        raise _nothing(skipped)
    if len(targets) != len(best) or (groups is not None and len(groups) != len(best)):
        raise InputError(
            f"zero-shot: got {len(best)} pictures, {len(targets)} targets and "
            f"{len(best) if groups is None else len(groups)} groups; expected as many of each."
        )
    first = best[:, 0] == targets
    grouped: dict[str, list[bool]] = {}
    for group, hit in zip(groups or (), first.tolist(), strict=bool(groups)):
        if group is not None:
            grouped.setdefault(group, []).append(hit)
    return ZeroShotReport(
        n=len(best),
        labels=len(names),
        top1=share(first, confidence=confidence),
        top5=share((best == targets[:, None]).any(axis=1), confidence=confidence),
        mean_per_class_recall=mean_per_class_recall(first, targets, classes=len(names)),
        calibration_error=None if scores is None else expected_calibration_error(scores, first),
        groups={group: share(grouped[group], confidence=confidence) for group in sorted(grouped)},
        confusions=tuple(
            NamedConfusion(names[each.target], names[each.predicted], each.count, each.of)
            for each in confusions(best[:, 0], targets)
        ),
        skipped=skipped,
        per_class={
            names[target]: share(first[targets == target], confidence=confidence)
            for target in (np.unique(targets).tolist() if per_class else ())
        },
    )


def _nothing(skipped: Sequence[tuple[str, str]]) -> InputError:
    first = f"; the first of {len(skipped)} that could not be read: {skipped[0][1]}" if skipped else ""
    return InputError(f"zero-shot: got no picture that can be read{first}")
