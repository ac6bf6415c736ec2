"""Search a picture index by words and by pictures: exact cosines, and a cut-off that says where to stop.

Every picture is compared; nothing is approximated. Ranking is by cosine. What a cosine is worth differs from
query to query and from one kind of pictures to another, so that a search by words also judges *relevance*
(the aim of Rossi et al. 2024, "Relevance Filtering for Embedding-based Retrieval", without a network trained
for it): with ``g`` the score by which the bundle's gate tells one label alone from its background
(:mod:`edgeclip.reject`), a picture is relevant where

* ``g`` reaches the gate's own threshold for a label by itself, or
* ``g`` stands out of this collection: at least :data:`GATE_DEVIATIONS` standard deviations above its mean,
  for collections of :data:`LEAST_PICTURES` and more.

Relevance is ``g`` less the lower of these two limits, so that zero is the cut-off. Bundles without a gate are
judged by their cosines, in standard deviations above the mean less :data:`COSINE_DEVIATIONS`. Mean and
deviation describe the collection as if nearly nothing in it were relevant: where that is wrong, fewer are
found. How the limits were chosen: docs/search.md.

A search by a picture has no cut-off. "Similar" has no threshold of its own: pictures of one name and pictures
of one kind lie at very different cosines.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from .bundle_labels import BundleLabels
from .errors import ConfigError, InputError
from .heads import cosines
from .index_file import BLOCK_ROWS, PictureIndex
from .label_sets import Label, LabelSet, Templates
from .reject import open_gate, read_background
from .runtime.choose import choose_variant
from .runtime.latency import NO_CLOCK
from .runtime.session import DEFAULT_OPTIONS, RuntimeOptions
from .words import WordList, label_warnings

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from .bundle import Bundle
    from .labels import LabelBank
    from .reject import Gate

__all__ = ["Cutoff", "Found", "Match", "Searcher", "nearest"]

GATE_DEVIATIONS: Final = 3.5
"""Standard deviations above the mean of a collection from which a gate's score stands out."""
COSINE_DEVIATIONS: Final = 4.8
"""The same for cosines, where a bundle has no gate."""
LEAST_PICTURES: Final = 50
"""Of fewer, mean and deviation say nothing: no picture of 16 can lie four deviations above their mean."""

_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\w)", re.IGNORECASE)
_SAMPLE: Final = 256  # pictures that a gate's scores of a collection are estimated on
_CANDIDATES: Final = 32  # judged at a time, nearest first


@dataclass(frozen=True)
class Match:
    """One picture that was found.

    Attributes:
        path: relative to the folder of the index.
        similarity: cosine of query and picture.
        relevance: how far above the cut-off, see the module; ``None`` without one.
    """

    path: str
    similarity: float
    relevance: float | None = None


@dataclass(frozen=True)
class Cutoff:
    """What decided whether a picture is relevant.

    Attributes:
        method: ``"gate"`` or ``"cosine"``: see the module.
        least: the least score, in units of the gate or of cosines.
        mean: of the collection.
        deviation: of the collection.
    """

    method: str
    least: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        matches: nearest first.
        cutoff: what decided over them; ``None`` where nothing did, and they are merely the nearest.
    """

    matches: tuple[Match, ...]
    cutoff: Cutoff | None = None


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
    """Return the rows of the ``count`` largest, largest first, equal ones in the order of rows."""
    if count < len(similarity):
        least = np.partition(similarity, len(similarity) - count)[len(similarity) - count]
        rows = np.flatnonzero(similarity >= least)
    else:
        rows = np.arange(len(similarity))
    order: NDArray[np.intp] = rows[np.argsort(-similarity[rows], kind="stable")][:count]
    return order


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
        self._lock = threading.Lock()
        step = max(1, -(-len(index) // _SAMPLE))
        self._sample = slice(step // 2, None, step)
        self._background: tuple[LabelBank, NDArray[np.float32]] | None = None
        self._has_gate = True  # until the bundle says otherwise

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

    def by_text(self, query: LabelBank, *, top_k: int = 20, cut: bool = True) -> Found:
        """Return the pictures that a text is about, nearest first.

        Args:
            query: as :meth:`encode` returns it.
            top_k: at most so many.
            cut: leave out what is not relevant; without it the nearest come back whatever they show.

        Raises:
            InputError: the index is damaged.
        """
        similarity = nearest(self.index, query.embeddings[0])
        judge = self._judge(query, similarity) if cut else None
        if judge is None:
            rows = _best(similarity, top_k)
            return Found(tuple(self._match(row, similarity) for row in rows.tolist()))
        found: list[Match] = []
        order, start = _best(similarity, max(top_k, _CANDIDATES)), 0
        while len(found) < top_k and start < len(order):
            rows = order[start : start + _CANDIDATES]
            relevance = judge.relevance(rows)
            good = relevance >= 0
            found += [
                self._match(row, similarity, said)
                for row, said in zip(rows[good].tolist(), relevance[good].tolist(), strict=True)
            ]
            start += len(rows)
            if not good.any():
                break
            if start == len(order) < len(similarity):
                order = _best(similarity, 2 * len(order))
        return Found(tuple(found[:top_k]), judge.cutoff)

    def by_embedding(
        self, query: NDArray[np.float32], *, top_k: int = 20, leave_out: Path | None = None
    ) -> Found:
        """Return the pictures nearest to the embedding ``(E,)`` of another one; there is no cut-off.

        Args:
            query: unit embedding.
            top_k: at most so many.
            leave_out: a file that is not to be among them, as the one that was asked with.

        Raises:
            InputError: the index is damaged, or the query has other dimensions.
        """
        similarity = nearest(self.index, query)
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

    def _is_file(self, row: int, path: Path) -> bool:
        try:
            return (self.index.root / self.index.paths[row]).samefile(path)
        except OSError:
            return False

    def _judge(self, query: LabelBank, similarity: NDArray[np.float32]) -> _ByGate | _ByCosine | None:
        """Return what judges pictures, or ``None`` where nothing can."""
        background = self._read_background()
        if background is not None:
            bank, others = background
            try:
                scale = self.bundle.manifest.model.scale
                gate = open_gate(self.bundle, query, scale=scale, background=bank)
            except ConfigError:  # the query covers the whole background
                pass
            else:
                return _ByGate(gate, self.index.embeddings, similarity, similarity[self._sample], others)
        return _ByCosine(similarity) if len(similarity) >= LEAST_PICTURES else None

    def _read_background(self) -> tuple[LabelBank, NDArray[np.float32]] | None:
        """Return the bundle's background bank, and its cosines ``(S, M)`` with a sample of the pictures."""
        if self._background is None and self._has_gate:
            with self._lock:
                if self._background is None:
                    try:
                        bank = read_background(self.bundle)
                    except ConfigError:
                        self._has_gate = False
                        return None
                    sample = np.ascontiguousarray(self.index.embeddings[self._sample])
                    self._background = bank, cosines(sample, bank.embeddings)
        return self._background


class _ByGate:
    """Judge pictures by the score of a gate, beside the scores of the collection."""

    def __init__(
        self,
        gate: Gate,
        embeddings: NDArray[np.float32],
        similarity: NDArray[np.float32],
        own: NDArray[np.float32],
        others: NDArray[np.float32],
    ) -> None:
        self._gate, self._embeddings, self._similarity = gate, embeddings, similarity
        # All background rows, not the gate's alone: the few it leaves out do not show in mean and deviation.
        scores = gate.alone(own[:, None], others)[:, 0]
        mean, deviation = float(scores.mean()), float(scores.std())
        least = gate.threshold_alone
        if len(similarity) >= LEAST_PICTURES:
            least = min(least, mean + GATE_DEVIATIONS * deviation)
        self.cutoff = Cutoff("gate", least, mean, deviation)

    def relevance(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        others = cosines(self._embeddings[rows], self._gate.rows)
        return self._gate.alone(self._similarity[rows][:, None], others)[:, 0] - self.cutoff.least


class _ByCosine:
    """Judge pictures by how far their cosines stand out of the collection."""

    def __init__(self, similarity: NDArray[np.float32]) -> None:
        wide = similarity.astype(np.float64)
        mean, deviation = float(wide.mean()), float(wide.std())
        self._scores, self._unit = wide, deviation or 1.0
        self.cutoff = Cutoff("cosine", mean + COSINE_DEVIATIONS * deviation, mean, deviation)

    def relevance(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        relevance: NDArray[np.float64] = (self._scores[rows] - self.cutoff.least) / self._unit
        return relevance


class _Knows:
    """A word list for :func:`edgeclip.words.label_warnings`, without the tokenizer around it."""

    def __init__(self, words: WordList | None) -> None:
        self.words = words
