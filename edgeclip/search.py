"""Search a picture index by words and by pictures: exact cosines, and a cut-off that says where to stop.

Every picture is compared; nothing is approximated. What a cosine is worth differs from query to query and
from one kind of pictures to another, so that a search by words judges *relevance*, which can be compared
(the aim of Rossi et al. 2024, "Relevance Filtering for Embedding-based Retrieval"). Theirs is a network
trained for it; here it is the probability of the words against the background of the bundle's gate
(:mod:`edgeclip.reject`), general names that stand for everything else. With ``c`` the cosine of the words,
``d`` those of the background rows that do not mean them, and ``s`` the gate's multiplier::

    relevance = exp(s · c) / (exp(s · c) + Σ exp(s · d))

Pictures from :data:`LEAST_RELEVANCE` on are relevant; what is found is ranked by cosine all the same. The
gate's own threshold is no help here: it lets one label alone pass for one strange picture in so many, and a
collection is nearly all strange pictures.

Without a gate, a picture is relevant whose cosine lies :data:`COSINE_DEVIATIONS` standard deviations above
the mean of a collection of at least :data:`LEAST_PICTURES`. That takes the collection to be of other things
nearly throughout. How the limits were chosen and what they are worth: docs/search.md.

A search by a picture has no cut-off. "Similar" has no threshold of its own: pictures of one name and pictures
of one kind lie at very different cosines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from .bundle_labels import BundleLabels
from .errors import ConfigError, InputError
from .heads import cosines
from .index_file import BLOCK_ROWS, PictureIndex
from .label_sets import Label, LabelSet, Templates
from .reject import NegativesGate, open_gate
from .runtime.choose import choose_variant
from .runtime.latency import NO_CLOCK
from .runtime.session import DEFAULT_OPTIONS, RuntimeOptions
from .words import WordList, label_warnings

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from .bundle import Bundle
    from .labels import LabelBank

__all__ = ["Cutoff", "Found", "Match", "Searcher", "nearest"]

LEAST_RELEVANCE: Final = 0.36
"""Probability of the words against the background from which a picture is relevant."""
COSINE_DEVIATIONS: Final = 4.6
"""Standard deviations above the mean of a collection that do for a bundle without a gate."""
LEAST_PICTURES: Final = 50
"""Of fewer, mean and deviation say nothing: no picture of 16 can lie four deviations above their mean."""

_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\w)", re.IGNORECASE)
_JUDGED: Final = 256  # pictures whose relevance is looked at at once
_ROUNDING: Final = 1e-3  # of log odds: cosines of float32 times a scale of at most 100


@dataclass(frozen=True)
class Match:
    """One picture that was found.

    Attributes:
        path: relative to the folder of the index.
        similarity: cosine of query and picture.
        relevance: what the cut-off was compared with; ``None`` without one.
    """

    path: str
    similarity: float
    relevance: float | None = None


@dataclass(frozen=True)
class Cutoff:
    """What decided whether a picture is relevant.

    Attributes:
        method: ``"background"``: relevance is a probability; ``"deviations"``: it is how many standard
            deviations a cosine lies above the mean of the collection.
        least: relevance of the least relevant picture that is relevant.
    """

    method: Literal["background", "deviations"]
    least: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        matches: nearest first.
        cutoff: what decided over them; ``None`` where nothing did, and they are merely the nearest.
        more: whether further pictures are relevant; ``False`` without a cut-off.
    """

    matches: tuple[Match, ...]
    cutoff: Cutoff | None = None
    more: bool = False


def nearest(index: PictureIndex, query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of a unit embedding ``(E,)`` with every picture of an index, ``(N,)``.

    Runs on the calling thread alone, block by block as they lie on the disk. Equal queries give equal bits.

    Raises:
        InputError: the index is damaged, or the query has other dimensions.
    """
    embeddings = index.embeddings
    if query.shape != (embeddings.shape[1],):
        raise InputError(f"query of shape {query.shape}, expected ({embeddings.shape[1]},).")
    index.check()
    row = np.ascontiguousarray(query, np.float32)[None]
    similarity = np.empty(len(embeddings), np.float32)
    for start in range(0, len(embeddings), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        similarity[block] = cosines(row, embeddings[block])[0]
    return similarity


def _best(similarity: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the rows of the ``count`` largest, largest first, equal ones in the order of rows.

    Minus infinity stands for what is left out.
    """
    if count < len(similarity):
        least = np.partition(similarity, len(similarity) - count)[len(similarity) - count]
        rows = np.flatnonzero(similarity >= least)
    else:
        rows = np.arange(len(similarity))
    rows = rows[np.isfinite(similarity[rows])]
    order: NDArray[np.intp] = rows[np.argsort(-similarity[rows], kind="stable")][:count]
    return order


def _check(top_k: int) -> None:
    if top_k < 1:
        raise InputError(f"top_k is {top_k}, expected at least 1.")


class Searcher:
    """Search one index with the bundle it was made with. Safe from many threads.

    Args:
        index: the index.
        bundle: of the same embedding space.
        variant: whose text tower encodes queries; ``"auto"`` takes that of the index where it runs here.
        options: how the text tower is run.
        keep_text_tower: leave it open after use; costs its memory.

    Raises:
        ConfigError: bundle and index are of two embedding spaces.
        BackendUnavailableError: the variant cannot be run here.
    """

    def __init__(
        self,
        index: PictureIndex,
        bundle: Bundle,
        *,
        variant: str = "auto",
        options: RuntimeOptions = DEFAULT_OPTIONS,
        keep_text_tower: bool = False,
    ) -> None:
        model, made = bundle.manifest.model, index.made_with
        if model.embedding_space != made.space:
            raise ConfigError(
                f"{index.where}: was made with model {made.model!r} (space {made.space[:12]}), but "
                f"{bundle.where} is {model.name!r} (space {model.embedding_space[:12]}). Give the bundle of "
                "the index with --bundle, or index the folder anew."
            )
        self.index, self.bundle = index, bundle
        choice = choose_variant(bundle, variant=variant, options=options)
        self._labels = BundleLabels(
            bundle, choice.variant, choice.options_for(options, "text"), keep_text_tower, NO_CLOCK
        )

    def encode(
        self, query: str, *, templates: Templates | None = None, language: str | None = None
    ) -> LabelBank:
        """Return a query as a label bank of one: ``"car|automobile"`` is the mean of both.

        Args:
            query: words; synonyms after ``|``.
            templates: prompt templates; by default those of the bundle's bank in the language.
            language: by default Chinese for words in Chinese characters, else that of the bundle.

        Raises:
            InputError: the query is empty or overlong.
            ConfigError: the bundle has no bank in that language.
            BundleError: the bundle has no text tower.
        """
        if not query.strip(" |"):
            raise InputError(f"query {query!r}: says nothing, expected words or the path of a picture.")
        # Templates bring an article of their own, and names of labels have none.
        name, *synonyms = (_ARTICLE.sub("", part.strip(), count=1) for part in query.split("|"))
        labels = LabelSet.of([Label(name, tuple(each for each in synonyms if each))])
        if templates is None and language is not None:
            bank = self._labels.bank_name(language)
            templates = None if bank is None else self._labels.bank(bank).templates
        made: list[LabelBank] = []
        self._labels.build(labels, templates, made.append)
        return made[0]

    def warnings(self, query: LabelBank) -> list[str]:
        """Return sentences on words of a query that the model probably does not know."""
        files = self.bundle.manifest.tokenizer
        words = None if files is None or files.words is None else WordList(self.bundle.read(files.words))
        phrases = [phrase for label in query.labels.labels for phrase in (label.name, *label.synonyms)]
        return label_warnings(phrases, self.bundle.manifest.model.languages, _Knows(words))

    def by_text(self, query: LabelBank, *, top_k: int = 20, cut: bool = True, below: str = "") -> Found:
        """Return the pictures that a text is about, nearest first.

        Args:
            query: as :meth:`encode` returns it.
            top_k: at most so many.
            cut: leave out what is not relevant; without it the nearest come back, whatever they show.
            below: only pictures whose path begins so, as ``2024/``.

        Raises:
            InputError: the index is damaged, or ``top_k`` below 1.
        """
        _check(top_k)
        whole = nearest(self.index, query.embeddings[0])
        similarity = self._below(below, whole)
        gate = self._gate(query) if cut else None
        if gate is not None:
            cutoff = Cutoff("background", LEAST_RELEVANCE)
            good = list(islice(self._relevant(gate, similarity), top_k + 1))
        elif cut and len(similarity) >= LEAST_PICTURES:
            cutoff = Cutoff("deviations", COSINE_DEVIATIONS)
            wide = whole.astype(np.float64)
            deviations = (wide - wide.mean()) / (wide.std() or 1.0)
            rows = _best(similarity, top_k + 1)
            good = [(row, float(deviations[row])) for row in rows[deviations[rows] >= cutoff.least].tolist()]
        else:
            return Found(tuple(self._match(row, similarity) for row in _best(similarity, top_k).tolist()))
        matches = tuple(self._match(row, similarity, said) for row, said in good[:top_k])
        return Found(matches, cutoff, len(good) > top_k)

    def by_embedding(
        self,
        query: NDArray[np.float32],
        *,
        top_k: int = 20,
        leave_out: Path | None = None,
        below: str = "",
    ) -> Found:
        """Return the pictures nearest to the embedding ``(E,)`` of another one; there is no cut-off.

        Args:
            query: unit embedding.
            top_k: at most so many.
            leave_out: a file that is not to be among them, as the one that was asked with.
            below: only pictures whose path begins so, as ``2024/``.

        Raises:
            InputError: the index is damaged, the query has other dimensions, or ``top_k`` is below 1.
        """
        _check(top_k)
        similarity = self._below(below, nearest(self.index, query))
        rows = _best(similarity, top_k + (leave_out is not None)).tolist()
        if leave_out is not None:
            rows = [row for row in rows if not self._is_file(row, leave_out)]
        return Found(tuple(self._match(row, similarity) for row in rows[:top_k]))

    def close(self) -> None:
        """Close the text tower; the next text that is new opens it again."""
        self._labels.close()

    def __enter__(self) -> Searcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _match(self, row: int, similarity: NDArray[np.float32], relevance: float | None = None) -> Match:
        return Match(self.index.paths[row], float(similarity[row]), relevance)

    def _below(self, below: str, similarity: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return cosines, minus infinity for pictures whose path does not begin so."""
        if not below:
            return similarity
        inside = [path.startswith(below) for path in self.index.paths]
        return np.where(np.array(inside, np.bool_), similarity, np.float32(-np.inf))

    def _is_file(self, row: int, path: Path) -> bool:
        try:
            return (self.index.root / self.index.paths[row]).samefile(path)
        except OSError:
            return False

    def _gate(self, query: LabelBank) -> NegativesGate | None:
        """Return the gate that holds words against the background, ``None`` where nothing can."""
        try:
            gate = open_gate(self.bundle, query, scale=self.bundle.manifest.model.scale)
        except ConfigError:  # there is none, or the query covers its background
            return None
        # A gate may trust the background less; what is asked here is a probability.
        return replace(gate, weight=1.0) if isinstance(gate, NegativesGate) else None

    def _relevant(self, gate: NegativesGate, similarity: NDArray[np.float32]) -> Iterator[tuple[int, float]]:
        """Yield the rows of all relevant pictures and their relevance, nearest first.

        Few pictures are held against the whole background. ``Σ exp(s · d)`` of M rows is at least ``M · exp(s
        · d̄)`` (Jensen), and ``d̄`` costs one product a picture: where that is too much already, the picture
        cannot be relevant.
        """
        embeddings, least = self.index.embeddings, np.log(LEAST_RELEVANCE / (1 - LEAST_RELEVANCE))
        kinds = sum(len(rows) for _, rows in gate.kinds)  # of one label: the first rows of the gate
        others = gate.rows[kinds:]
        floor = nearest(self.index, others.mean(axis=0)) * gate.scale + (
            np.log(len(others)) + least - _ROUNDING
        )
        rows = np.flatnonzero(np.isfinite(similarity) if kinds else similarity * gate.scale >= floor)
        rows = rows[np.argsort(-similarity[rows], kind="stable")]
        for start in range(0, len(rows), _JUDGED):
            judged = rows[start : start + _JUDGED]
            if kinds:  # a kind of the words stands for them
                own = cosines(embeddings[judged], gate.rows[:kinds]).max(axis=1)
                own = np.maximum(own, similarity[judged])
                judged = judged[own * gate.scale >= floor[judged]]
            odds = gate.alone(similarity[judged][:, None], cosines(embeddings[judged], gate.rows))[:, 0]
            relevance = 1 / (1 + np.exp(-odds))
            good = relevance >= LEAST_RELEVANCE
            yield from zip(judged[good].tolist(), relevance[good].tolist(), strict=True)


class _Knows:
    """A word list for :func:`edgeclip.words.label_warnings`, without the tokenizer around it."""

    def __init__(self, words: WordList | None) -> None:
        self.words = words
