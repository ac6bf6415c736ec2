"""Several models on the same pictures: one row a model, everything measured in one pass.

>>> subjects, _ = open_bundle("default")                                               # doctest: +SKIP
>>> pictures = open_set("shapes/held_out.jsonl")
>>> offered = offer([(None, read_labels("shapes/labels.json"))], languages=["en", "zh"])
>>> compare_zero_shot(subjects, pictures, offered).rows[0].reports["zh"].top1.value
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgeclip.answers import InForce
from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.corruptions import CORRUPTIONS, SEVERITIES
from edgeclip.evaluate.metrics import Share, share
from edgeclip.evaluate.offered import Offered
from edgeclip.evaluate.passes import Chosen, LeftOut, Passes, check_left_out, choose
from edgeclip.evaluate.picture_sets import Picture, PictureSet
from edgeclip.evaluate.results import (
    Comparison,
    Counts,
    OutOfDistribution,
    Rejections,
    Robustness,
    Row,
    SeveralLabels,
)
from edgeclip.evaluate.retrieval import Texts, evaluate_retrieval
from edgeclip.evaluate.subjects import OnProgress, Subject
from edgeclip.evaluate.zero_shot import Ranking, ranking_of, report_of
from edgeclip.few_shot import FewShotHead
from edgeclip.few_shot_fit import without_class
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Settings", "compare_retrieval", "compare_zero_shot"]

Progress = Callable[[str, int, int], None]
_TEXTS = 64  # a text tower call


@dataclass(frozen=True)
class Settings:
    """How pictures are taken and sent through.

    Attributes:
        limit: pictures at most, evenly spread over a set; ``None`` takes all.
        batch_size: pictures a tower call.
        workers: threads that decode.
        allowed: how many of so many pictures may be left out; all if missing.
        progress: called with what is being done, how many pictures are done, and of how many.
        on_encoding: called while labels are encoded.
    """

    limit: int | None = None
    batch_size: int = 32
    workers: int = 1
    allowed: Callable[[int], int] | None = None
    progress: Progress | None = None
    on_encoding: OnProgress | None = None

    def said(self, what: str, done: int, total: int) -> None:
        """Tell who listens."""
        if self.progress is not None:
            self.progress(what, done, total)


# --- zero-shot ---------------------------------------------------------------------------------------------


def compare_zero_shot(
    subjects: Sequence[Subject],
    pictures: PictureSet,
    offered: Offered,
    *,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = SEVERITIES,
    ood: PictureSet | None = None,
    per_class: bool = False,
    seed: int = 0,
    settings: Settings = Settings(),
) -> Comparison:
    """Return how well models name pictures, all on the same ones.

    Where templates are left to the models, those of the first model are used for all. What is asked of each
    picture beside that (contexts, rejection, several labels) is what the models were opened with, and is
    answered as the classifier answers it. Where several labels are asked for, pictures may have several,
    separated by ``|``; in top-1 and recall a picture then counts for that of them which came first.

    Args:
        subjects: models; the first is the reference.
        pictures: with labels.
        offered: labels in one language or several.
        corruptions: names of :data:`~edgeclip.evaluate.corruptions.CORRUPTIONS` to measure as well.
        severities: 1 to 5, for each of them.
        ood: pictures that belong to none of the labels.
        per_class: also report each label.
        seed: of the corruptions' chance.
        settings: how pictures are taken.

    Raises:
        InputError: no picture can be used, or too many cannot.
        ConfigError: a corruption or severity is not known, or there is no model.
        EdgeClipError: a model cannot embed what it is given.
    """
    _check(subjects, corruptions, severities)
    answers = subjects[0].answers
    chosen = choose(
        pictures,
        lambda picture: _right(picture, offered, answers.multi),
        limit=settings.limit,
        allowed=settings.allowed,
    )
    outside = (
        None if ood is None else choose(ood, _nothing_right, limit=settings.limit, allowed=settings.allowed)
    )
    forces, templates = _forces(subjects, offered, settings)
    conditions = [(name, severity) for name in corruptions for severity in severities]
    with Passes(subjects, settings.batch_size, settings.workers) as passes:
        found = _rank(passes, chosen, forces, conditions, seed, settings, "pictures", keep=answers.gated)
        unread = tuple(passes.left_out)
        far = None
        if outside is not None:
            far = _rank(passes, outside, forces, [], seed, settings, "ood pictures")
        unread_far = tuple(passes.left_out[len(unread) :])
    rows = []
    for subject in subjects:
        row = Row(subject.name, subject.about)
        for language in offered.languages:
            key = subject.name, language
            ranking, force = found.rankings[key], forces[key]
            targets = _counted(ranking, found.right)
            report = report_of(ranking, targets, offered.names, per_class=per_class)
            row.reports[language] = report
            if subject is not subjects[0]:
                reference = found.rankings[subjects[0].name, language]
                row.agreement[language] = share(ranking.first == reference.first)
            if conditions:
                corrupted: dict[str, dict[int, Share]] = {}
                for name, severity in conditions:
                    hits = found.hits[(*key, name, severity)]
                    corrupted.setdefault(name, {})[severity] = share(np.concatenate(hits))
                row.robustness[language] = Robustness(report.top1, corrupted)
            if far is not None:
                row.ood[language] = OutOfDistribution.of(ranking, far.rankings[key])
            if force.gate is not None:
                held_out = _held_out(subject, force, offered, templates[language], found, settings)
                threshold = force.gate.threshold_alone if force.multi else force.gate.threshold
                row.rejections[language] = Rejections.of(ranking, targets, threshold, held_out)
            if force.multi:
                row.several[language] = SeveralLabels.of(np.concatenate(found.counts[key]))
        rows.append(row)
    return Comparison(
        "zero-shot",
        tuple(rows),
        _counts(chosen, unread, settings),
        tuple(offered.languages),
        labels=len(offered.names),
        templates={language: () if each is None else each.texts for language, each in templates.items()},
        ood=None if outside is None else _counts(outside, unread_far, settings),
        seed=seed if conditions else None,
        answers=answers,
        instead=offered.instead,
    )


_Key = tuple[str, str]  # name of a model, language
_Right = tuple[int, ...]  # numbers of the labels that are right for a picture


def _right(picture: Picture, offered: Offered, several: bool) -> _Right | str:
    if picture.label is None:
        return "has no label; expected a column 'label', a .cls or a folder per label."
    found = offered.right(picture.label, several=several)
    if isinstance(found, str):
        return f"has the label {found[:80]!r}, which is not among the {len(offered.names):,} offered."
    return found


def _nothing_right(_: Picture) -> _Right | str:
    return ()


def _counted(ranking: Ranking, right: Sequence[_Right]) -> NDArray[np.intp]:
    """Return the right label of each picture that came first; where none did, the first it has."""
    return np.array(
        [
            numbers[0] if len(numbers) == 1 else next((each for each in best if each in numbers), numbers[0])
            for best, numbers in zip(ranking.best.tolist(), right, strict=True)
        ],
        np.intp,
    )


def _forces(
    subjects: Sequence[Subject], offered: Offered, settings: Settings
) -> tuple[dict[_Key, InForce], dict[str, Templates | None]]:
    """Return what makes answers, by model and language, and the templates that all used."""
    forces, used = {}, {}
    for language, labels in offered.languages.items():
        templates = offered.templates[language]
        for subject in subjects:
            asked = labels if offered.instead is None else offered.instead.asked
            force = subject.in_force(asked, templates, settings.on_encoding)
            if offered.instead is not None and force.names != offered.names:
                raise InputError(
                    f"{subject.name}: offers {len(force.names):,} labels, first {force.names[0]!r}; expected "
                    f"the {len(offered.names):,} of the first model, first {offered.names[0]!r}."
                )
            templates = templates if force.bank is None else force.bank.templates
            forces[subject.name, language] = force
        used[language] = templates
    return forces, used


def _held_out(
    subject: Subject,
    force: InForce,
    offered: Offered,
    templates: Templates | None,
    found: _Found,
    settings: Settings,
) -> Ranking | None:
    """Return what is said of pictures without their own labels among those offered, in no certain order."""
    of_label: dict[_Right, list[int]] = {}
    for row, numbers in enumerate(found.right):
        of_label.setdefault(tuple(sorted(numbers)), []).append(row)
    images, parts = np.concatenate(found.images[subject.name]), []
    for done, (numbers, members) in enumerate(of_label.items(), start=1):
        others = _without(force, offered, numbers)
        if others is not None:
            left = subject.in_force(others, templates, settings.on_encoding)
            parts.append(ranking_of(left, images[members]).cut())
        settings.said(f"{subject.name}: labels held out", done, len(of_label))
    return Ranking.joined(parts) if parts else None


def _without(force: InForce, offered: Offered, numbers: _Right) -> LabelSet | LabelBank | FewShotHead | None:
    """Return what is offered less some labels; ``None`` where nothing could be offered."""
    head, bank = force.fitted, force.bank
    if head is not None:
        if len(head) - len(numbers) < 2:
            return None
        for number in numbers:
            head = without_class(head, force.names[number], choose=False)
        return head
    kept = [number for number in range(len(force.names)) if number not in numbers]
    kind = None if offered.instead is None else offered.instead.kind
    # A bundle's own labels are judged together: less one of them, they are other labels.
    if bank is None or not kept or kind == "own":
        return None
    labels = LabelSet(tuple(bank.labels.labels[number] for number in kept))
    return replace(bank, labels=labels, embeddings=bank.embeddings[kept], truncated=()) if kind else labels


@dataclass
class _Found:
    """What a pass over pictures found.

    Attributes:
        right: of each picture its right labels.
        rankings: by model and language.
        hits: whether the first label is right, batch by batch, under each corruption.
        counts: of each picture (given and right, given, right, first is right), where labels are judged one
            by one.
        images: embeddings by model, batch by batch, where they are needed again.
    """

    right: list[_Right] = field(default_factory=list)
    rankings: dict[_Key, Ranking] = field(default_factory=dict)
    hits: dict[tuple[str, str, str, int], list[NDArray[np.bool_]]] = field(default_factory=dict)
    counts: dict[_Key, list[NDArray[np.intp]]] = field(default_factory=dict)
    images: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)


def _rank(
    passes: Passes,
    chosen: Chosen[_Right],
    forces: Mapping[_Key, InForce],
    conditions: Sequence[tuple[str, int]],
    seed: int,
    settings: Settings,
    what: str,
    *,
    keep: bool = False,
) -> _Found:
    """Return what models say of the pictures chosen, and under each condition; ``keep`` embeddings, too."""
    found = _Found()
    parts: dict[_Key, list[Ranking]] = {key: [] for key in forces}
    languages = list(dict.fromkeys(language for _, language in forces))
    before = len(passes.left_out)
    for batch in passes.batches(chosen):
        for subject, rows in passes.embedded(batch):
            if keep:
                found.images.setdefault(subject.name, []).append(rows)
            for language in languages:
                key = subject.name, language
                ranking = ranking_of(forces[key], rows, what=f"{subject.name}: image embeddings")
                if forces[key].multi:
                    found.counts.setdefault(key, []).append(_several(ranking, batch.uses))
                parts[key].append(ranking.cut())
        for name, severity in conditions:
            for subject, rows in passes.embedded(batch, corruption=(name, severity), seed=seed):
                for language in languages:
                    key = subject.name, language
                    ranking = ranking_of(forces[key], rows, what=f"{subject.name}: image embeddings").cut()
                    hits = ranking.first == _counted(ranking, batch.uses)
                    found.hits.setdefault((*key, name, severity), []).append(hits)
        found.right += batch.uses
        settings.said(what, len(found.right) + len(passes.left_out) - before, chosen.count)
    found.rankings = {key: Ranking.joined(each) for key, each in parts.items()}
    return found


def _several(ranking: Ranking, right: Sequence[_Right]) -> NDArray[np.intp]:
    """Return of each picture how many labels are given and right, given, right, and first and right."""
    counts = []
    lengths = cast("NDArray[np.intp]", ranking.given)  # a gate judged the labels
    for best, given, numbers in zip(ranking.best.tolist(), lengths.tolist(), right, strict=True):
        wanted = set(numbers)
        counts.append((len(wanted & set(best[:given])), given, len(wanted), best[0] in wanted))
    return np.array(counts, np.intp).reshape(-1, 4)


# --- retrieval ---------------------------------------------------------------------------------------------


def compare_retrieval(
    subjects: Sequence[Subject],
    pictures: PictureSet,
    *,
    kinds: Sequence[str] = (),
    settings: Settings = Settings(),
) -> Comparison:
    """Return how well models find pictures by their captions and captions by their pictures.

    Args:
        subjects: models; the first is the reference.
        pictures: with captions.
        kinds: of captions, each measured by itself; none takes all that pictures measured have.
        settings: how pictures are taken.

    Raises:
        InputError: no picture measured has a caption of a kind, or too many cannot be used.
        ConfigError: there is no model.
        EdgeClipError: a model cannot embed what it is given.
    """
    _check(subjects, (), SEVERITIES)

    def captions(picture: Picture) -> Mapping[str, tuple[str, ...]] | str:
        wanted = {kind: said for kind, said in picture.captions.items() if not kinds or kind in kinds}
        said = ", ".join(sorted(picture.captions)) or "none"
        return wanted or f"has captions of the kinds {said}, expected {', '.join(kinds) or 'some'}."

    chosen = choose(pictures, captions, limit=settings.limit, allowed=settings.allowed)
    parts: dict[str, list[NDArray[np.float32]]] = {subject.name: [] for subject in subjects}
    said: list[Mapping[str, tuple[str, ...]]] = []
    with Passes(subjects, settings.batch_size, settings.workers) as passes:
        for batch in passes.batches(chosen):
            for subject, rows in passes.embedded(batch):
                parts[subject.name].append(rows)
            said += batch.uses
            settings.said("pictures", len(said) + len(passes.left_out), chosen.count)
        unread = tuple(passes.left_out)
    columns = tuple(dict.fromkeys(kinds or (kind for each in said for kind in each)))
    with_kind = {kind: [row for row, each in enumerate(said) if kind in each] for kind in columns}
    empty = next((kind for kind, rows_of in with_kind.items() if not rows_of), None)
    if empty is not None:
        raise InputError(
            f"{pictures.path!r}: none of {len(said):,} pictures measured has a caption of kind {empty!r}, "
            "expected some. Leave the kind out, or raise the limit."
        )
    rows_ = []
    for subject in subjects:
        images, reports = np.concatenate(parts[subject.name]), {}
        for kind, members in with_kind.items():
            texts = Texts.of([said[row][kind] for row in members])
            reports[kind] = evaluate_retrieval(
                images[members], _embedded_texts(subject, texts.texts, kind, settings), texts
            )
        rows_.append(Row(subject.name, subject.about, retrieval=reports))
    return Comparison(
        "retrieval",
        tuple(rows_),
        _counts(chosen, unread, settings),
        columns,
        without={kind: len(said) - len(members) for kind, members in with_kind.items()},
    )


def _embedded_texts(
    subject: Subject, texts: Sequence[str], kind: str, settings: Settings
) -> NDArray[np.float32]:
    rows = []
    for start in range(0, len(texts), _TEXTS):
        rows.append(subject.texts(texts[start : start + _TEXTS]))
        settings.said(f"{subject.name}: texts ({kind})", min(start + _TEXTS, len(texts)), len(texts))
    return np.concatenate(rows)


# --- shared ------------------------------------------------------------------------------------------------


def _check(subjects: Sequence[Subject], corruptions: Sequence[str], severities: Sequence[int]) -> None:
    if not subjects:
        raise ConfigError("evaluation: got no model, expected at least one.")
    names = [subject.name for subject in subjects]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"evaluation: {twice!r} is there twice, expected every model once.")
    unknown = next((name for name in corruptions if name not in CORRUPTIONS), None)
    if unknown is not None:
        raise ConfigError(f"corruption {unknown!r} is not known; expected one of {', '.join(CORRUPTIONS)}.")
    wrong = next((severity for severity in severities if severity not in SEVERITIES), None)
    if wrong is not None or not severities:
        raise ConfigError(f"severities: got {wrong!r}, expected whole numbers from 1 to 5.")


def _counts(chosen: Chosen[Any], unread: tuple[LeftOut, ...], settings: Settings) -> Counts:
    left_out = (*chosen.left_out, *unread)
    check_left_out(chosen.pictures, left_out, chosen.total, settings.allowed)
    # What a large set may lose is more than what may be lost of a few taken from it.
    check_left_out(chosen.pictures, unread, chosen.count, settings.allowed)
    return Counts(chosen.pictures.path, chosen.total, chosen.count, chosen.count - len(unread), left_out)
