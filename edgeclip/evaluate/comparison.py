"""Several models on the same pictures: one row a model, everything measured in one pass.

>>> subjects, _ = open_bundle("default")                                               # doctest: +SKIP
>>> pictures = open_set("shapes/held_out.jsonl")
>>> offered = offer([(None, read_labels("shapes/labels.json"))], languages=["en", "zh"])
>>> compare_zero_shot(subjects, pictures, offered).rows[0].reports["zh"].top1.value
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.corruptions import CORRUPTIONS, SEVERITIES
from edgeclip.evaluate.metrics import Share, share, unit_rows
from edgeclip.evaluate.offered import Offered
from edgeclip.evaluate.passes import Chosen, LeftOut, Passes, check_left_out, choose
from edgeclip.evaluate.picture_sets import Picture, PictureSet
from edgeclip.evaluate.results import Comparison, Counts, OutOfDistribution, Robustness, Row
from edgeclip.evaluate.retrieval import Texts, evaluate_retrieval
from edgeclip.evaluate.subjects import OnProgress, Subject
from edgeclip.evaluate.zero_shot import Ranking, rank_pictures, report_of

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

    Where templates are left to the models, those of the first model are used for all.

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
    chosen = choose(
        pictures, lambda picture: _target(picture, offered), limit=settings.limit, allowed=settings.allowed
    )
    outside = (
        None
        if ood is None
        else choose(ood, lambda picture: True, limit=settings.limit, allowed=settings.allowed)
    )
    banks, templates = _banks(subjects, offered, settings)
    conditions = [(name, severity) for name in corruptions for severity in severities]
    with Passes(subjects, settings.batch_size, settings.workers) as passes:
        rankings, targets, hits = _rank(passes, chosen, banks, conditions, seed, settings, "pictures")
        unread = tuple(passes.left_out)
        far: dict[tuple[str, str], Ranking] = {}
        if outside is not None:
            far, _, _ = _rank(passes, outside, banks, [], seed, settings, "ood pictures")
        unread_far = tuple(passes.left_out[len(unread) :])
    rows = []
    for subject in subjects:
        reports, agreement, robustness, apart = {}, {}, {}, {}
        for language in offered.languages:
            ranking = rankings[subject.name, language]
            reports[language] = report_of(ranking, targets, offered.names, per_class=per_class)
            if subject is not subjects[0]:
                reference = rankings[subjects[0].name, language]
                agreement[language] = share(ranking.first == reference.first)
            if conditions:
                found: dict[str, dict[int, Share]] = {}
                for name, severity in conditions:
                    found.setdefault(name, {})[severity] = share(
                        np.concatenate(hits[subject.name, language, name, severity])
                    )
                robustness[language] = Robustness(reports[language].top1, found)
            if far:
                apart[language] = OutOfDistribution.of(ranking, far[subject.name, language])
        rows.append(
            Row(
                subject.name,
                subject.about,
                reports=reports,
                agreement=agreement,
                robustness=robustness,
                ood=apart,
            )
        )
    return Comparison(
        "zero-shot",
        tuple(rows),
        _counts(chosen, unread, settings),
        tuple(offered.languages),
        labels=len(offered.names),
        templates=templates,
        ood=None if outside is None else _counts(outside, unread_far, settings),
        seed=seed if conditions else None,
    )


def _target(picture: Picture, offered: Offered) -> int | str:
    if picture.label is None:
        return "has no label; expected a column 'label', a .cls or a folder per label."
    number = offered.number(picture.label)
    if number is None:
        return f"has the label {picture.label[:80]!r}, which is not among the {len(offered.names):,} offered."
    return number


def _banks(
    subjects: Sequence[Subject], offered: Offered, settings: Settings
) -> tuple[dict[tuple[str, str], NDArray[Any]], dict[str, tuple[str, ...]]]:
    banks, used = {}, {}
    for language, labels in offered.languages.items():
        templates = offered.templates[language]
        for subject in subjects:
            bank = subject.bank(labels, templates, settings.on_encoding)
            templates = bank.templates
            banks[subject.name, language] = unit_rows("label embeddings", bank.embeddings)
        used[language] = () if templates is None else templates.texts
    return banks, used


_Hits = dict[tuple[str, str, str, int], list[Any]]


def _rank(
    passes: Passes,
    chosen: Chosen[Any],
    banks: Mapping[tuple[str, str], NDArray[Any]],
    conditions: Sequence[tuple[str, int]],
    seed: int,
    settings: Settings,
    what: str,
) -> tuple[dict[tuple[str, str], Ranking], NDArray[np.intp], _Hits]:
    """Return rankings by model and language, targets, and hits under each condition."""
    parts: dict[tuple[str, str], list[Ranking]] = {key: [] for key in banks}
    languages = list(dict.fromkeys(language for _, language in banks))
    targets: list[int] = []
    hits: _Hits = {}
    before = len(passes.left_out)
    for batch in passes.batches(chosen):
        for subject, rows in passes.embedded(batch):
            images = unit_rows(f"{subject.name}: image embeddings", rows)
            for language in languages:
                key = subject.name, language
                parts[key].append(rank_pictures(images, banks[key], scale=subject.scale))
        wanted = np.array(batch.uses, np.intp)
        for name, severity in conditions:
            for subject, rows in passes.embedded(batch, corruption=(name, severity), seed=seed):
                images = unit_rows(f"{subject.name}: image embeddings", rows)
                for language in languages:
                    ranking = rank_pictures(images, banks[subject.name, language])
                    hits.setdefault((subject.name, language, name, severity), []).append(
                        ranking.first == wanted
                    )
        targets += batch.uses
        settings.said(what, len(targets) + len(passes.left_out) - before, chosen.count)
    return {key: Ranking.joined(each) for key, each in parts.items()}, np.array(targets, np.intp), hits


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
