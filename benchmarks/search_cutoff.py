"""Where to stop in a list of pictures that words found: cut-offs compared where the answers are known.

Queries are all names of a set, those without a picture in the collection too; a picture is relevant to its
own name alone. Precision, recall and F1 are over all pairs of query and picture; average precision is the
mean over queries that have a picture.

* ``cosine``: a fixed one.
* ``deviations``: how far a cosine lies above the mean of the collection, in standard deviations.
* ``background``: the probability of the words against the background of the bundle's gate; what ships.
* ``gate``: the score of one label by itself, as the gate gives it, at the gate's threshold and at one tuned.
* ``gate, deviations``: that score in standard deviations of the collection.

Limits are chosen on the half ``tune`` of the stamps, English and Chinese names together, by F1. Pictograms of
a style that nothing trains on (Twemoji, things) are another kind of pictures: they show what becomes of a
limit there. Intervals of 95 % resample queries. Beside it the same question for pictures as queries, with
cosines and deviations: relevant is a picture of the same name, or of the same superclass.

    edgeclip data fetch stamps pictograms
    python benchmarks/search_cutoff.py
    python benchmarks/search_cutoff.py --half report      # once, for what is quoted
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from agreement_pictures import on_white
from numpy.typing import NDArray
from written import ROOT, arguments, model, write

from edgeclip.classify import ZeroShotClassifier
from edgeclip.evaluate.metrics import bootstrap_interval
from edgeclip.export.recipes.emoji import read_pictograms
from edgeclip.export.recipes.stamps import Stamp, candidates, of_half, read_stamps
from edgeclip.fetch import materials
from edgeclip.index import made_with
from edgeclip.index_file import Entry, PictureIndex, Stat, write_index
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.reject import NegativesGate, open_gate
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.search import COSINE_DEVIATIONS, LEAST_RELEVANCE, Searcher

TEMPLATES = {"en": "one", "zh": "zh"}
_STEPS = 2001

Score = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Collection:
    """Pictures, and names to look for.

    Attributes:
        name: of the collection.
        images: ``(n, E)`` embeddings.
        queries: Q names, encoded.
        relevant: ``(n, Q)``.
    """

    name: str
    images: NDArray[np.float32]
    queries: LabelBank
    relevant: NDArray[np.bool_]


# --- collections -------------------------------------------------------------------------------------------


def stamps(classifier: ZeroShotClassifier, half: str) -> tuple[list[Collection], list[Stamp], Any]:
    """Return the stamps of a half, asked for in both languages, and the pictures themselves."""
    package = materials("stamps")["tuxpaint-stamps-default"]
    every = read_stamps(ROOT / "benchmarks/data/stamps.jsonl")
    shown = [stamp for stamp in every if stamp.split == half]
    images = classifier.embed_images([stamp.path(package) for stamp in shown])
    found = []
    for language, templates in TEMPLATES.items():
        judged = set(of_half(every, half, language))
        rows = [row for row, stamp in enumerate(shown) if stamp in judged]
        names = candidates(every, language)
        truth = [shown[row].name(language) for row in rows]
        queries = _bank(classifier, names, templates)
        found.append(Collection(f"stamps {language}", images[rows], queries, _same(truth, names)))
    return found, shown, images


def pictograms(classifier: ZeroShotClassifier) -> Collection:
    """Return things and beings in Twemoji's style, on white, asked for by their English names."""
    packages = materials("pictograms")
    style = packages["emoji-datasource-twitter"] / "img" / "twitter" / "64"
    shown = [each for each in read_pictograms(packages["emojibase-data"], (style,)) if each.is_thing]
    names = tuple(dict.fromkeys(each.english for each in shown))
    images = classifier.embed_images([on_white(each.files[0]) for each in shown])
    truth = [each.english for each in shown]
    return Collection("twemoji en", images, _bank(classifier, names, "one"), _same(truth, names))


def _bank(classifier: ZeroShotClassifier, names: Sequence[str], templates: str) -> LabelBank:
    classifier.set_labels(LabelSet.of(list(names)), templates=Templates.of(templates))
    return classifier.bank


def _same(truth: Sequence[str], names: Sequence[str]) -> NDArray[np.bool_]:
    place = {name: column for column, name in enumerate(names)}
    relevant = np.zeros((len(truth), len(names)), np.bool_)
    relevant[np.arange(len(truth)), [place[name] for name in truth]] = True
    return relevant


# --- scores ------------------------------------------------------------------------------------------------


def scores(classifier: ZeroShotClassifier, found: Collection) -> tuple[dict[str, Score], float]:
    """Return the scores ``(n, Q)`` of each method, and the gate's own threshold."""
    cosine = (found.images @ found.queries.embeddings.T).astype(np.float64)
    odds, alone = np.empty_like(cosine), np.empty_like(cosine)
    threshold = 0.0
    for column, label in enumerate(found.queries.labels.labels):
        one = replace(
            found.queries,
            labels=LabelSet.of([label]),
            embeddings=found.queries.embeddings[column : column + 1],
            truncated=(),
        )
        gate = open_gate(classifier.bundle, one, scale=classifier.bundle.manifest.model.scale)
        assert isinstance(gate, NegativesGate)
        own = cosine[:, column : column + 1].astype(np.float32)
        others = found.images @ gate.rows.T
        alone[:, column] = gate.alone(own, others)[:, 0]
        odds[:, column] = replace(gate, weight=1.0).alone(own, others)[:, 0]
        threshold = gate.threshold_alone
    return {
        "cosine": cosine,
        "deviations": _deviations(cosine),
        "background": 1 / (1 + np.exp(-odds)),
        "gate": alone,
        "gate, deviations": _deviations(alone),
    }, threshold


def _deviations(values: Score) -> Score:
    found: Score = (values - values.mean(axis=0)) / values.std(axis=0)
    return found


# --- figures -----------------------------------------------------------------------------------------------


def figures(score: Score, relevant: NDArray[np.bool_], limit: float) -> dict[str, Any]:
    """Return precision, recall and F1 in %, with intervals over queries, and what is found a query."""
    kept = score >= limit
    counts = np.stack([(kept & relevant).sum(axis=0), kept.sum(axis=0), relevant.sum(axis=0)])

    def value(what: str) -> Callable[[NDArray[np.float64]], float]:
        def of(columns: NDArray[np.float64]) -> float:
            right, found, there = counts[:, columns.astype(np.intp)].sum(axis=1)
            precision, recall = right / max(found, 1), right / max(there, 1)
            f1 = 2 * right / max(found + there, 1)
            return 100 * float({"precision": precision, "recall": recall, "f1": f1}[what])

        return of

    columns = np.arange(score.shape[1], dtype=np.float64)
    told: dict[str, Any] = {"limit": float(f"{limit:.6g}"), "queries": score.shape[1], "pictures": len(score)}
    for what in ("precision", "recall", "f1"):
        low, high = bootstrap_interval(columns, value(what), seed=0)
        told[what] = [round(each, 1) for each in (value(what)(columns), low, high)]
    empty = ~relevant.any(axis=0)
    told["found_a_query"] = round(float(kept.sum(axis=0).mean()), 3)
    if empty.any():
        told["queries_without_picture"] = int(empty.sum())
        told["of_these_with_nothing_found"] = int((~kept[:, empty].any(axis=0)).sum())
    return told


def average_precision(score: Score, relevant: NDArray[np.bool_]) -> float:
    """Return the mean average precision in %, over queries that have a picture."""
    values = []
    for column in np.flatnonzero(relevant.any(axis=0)):
        hits = relevant[np.argsort(-score[:, column], kind="stable"), column]
        values.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return round(100 * float(np.mean(values)), 1)


def best_limit(pairs: Sequence[tuple[Score, NDArray[np.bool_]]]) -> float:
    """Return the limit of the best F1, pooled over collections: of equal ones the middle."""
    every = np.concatenate([score.ravel() for score, _ in pairs])
    right = np.concatenate([relevant.ravel() for _, relevant in pairs])
    limits = np.unique(np.quantile(every, np.linspace(0.9, 1, _STEPS)))
    order = np.sort(every)
    hits = np.sort(every[right])
    found = len(order) - np.searchsorted(order, limits)
    good = len(hits) - np.searchsorted(hits, limits)
    f1 = 2 * good / (found + len(hits))
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(limits[best[len(best) // 2]])


def by_pictures(images: NDArray[np.float32], shown: Sequence[Stamp]) -> dict[str, Any]:
    """Return how well pictures find their like, at the best limit there is: a cut-off can do no better."""
    cosine = (images @ images.T).astype(np.float64)
    others = ~np.eye(len(cosine), dtype=np.bool_)
    masked = np.where(others, cosine, np.nan)
    deviations = (cosine - np.nanmean(masked, axis=0)) / np.nanstd(masked, axis=0)
    told: dict[str, Any] = {}
    for what, names in (
        ("same name", [stamp.en for stamp in shown]),
        ("same superclass", [stamp.coarse or f"alone {row}" for row, stamp in enumerate(shown)]),
    ):
        relevant = np.array([[a == b for a in names] for b in names]) & others
        for name, score in (("cosine", cosine), ("deviations", deviations)):
            score = np.where(others, score, -np.inf)
            finite = [(np.where(others, score, score[others].min()), relevant)]
            limit = best_limit(finite)
            told[f"{what}, {name}"] = {
                **figures(score, relevant, limit),
                "average_precision": average_precision(score, relevant),
            }
    return told


# --- what ships --------------------------------------------------------------------------------------------


def shipped_agrees(classifier: ZeroShotClassifier, found: Collection, score: Score) -> int:
    """Return for how many queries a searcher finds what the method ``background`` keeps."""
    made = made_with(classifier.bundle, classifier.choice.variant)
    entries = {
        f"{row:05}": Entry(Stat(row, 0, 0), row.to_bytes(16, "big"), each)
        for row, each in enumerate(found.images, start=1)
    }
    same = 0
    with tempfile.TemporaryDirectory() as work:
        write_index(Path(work) / "index", ".", made, entries)
        with Searcher(PictureIndex(Path(work) / "index"), classifier.bundle) as searcher:
            for column, label in enumerate(found.queries.labels.labels):
                one = replace(
                    found.queries,
                    labels=LabelSet.of([label]),
                    embeddings=found.queries.embeddings[column : column + 1],
                    truncated=(),
                )
                told = {int(each.path) - 1 for each in searcher.by_text(one, top_k=len(entries)).matches}
                same += told == set(np.flatnonzero(score[:, column] >= LEAST_RELEVANCE).tolist())
    return same


def main() -> int:
    """Measure, write everything, and print a table."""
    parser = arguments("Compare cut-offs of searches by words.", "search_cutoff.json")
    parser.add_argument("--half", choices=("tune", "report"), default="tune")
    chosen = parser.parse_args()
    with ZeroShotClassifier.open(
        chosen.bundle, variant=chosen.variant, options=RuntimeOptions(threads=1), keep_text_tower=True
    ) as classifier:
        tuned, _, _ = stamps(classifier, "tune")
        limits: dict[str, float] = {}
        kept = [(each, *scores(classifier, each)) for each in tuned]
        for method in kept[0][1]:
            limits[method] = best_limit([(score[method], each.relevant) for each, score, _ in kept])
        judged, shown, images = stamps(classifier, chosen.half)
        results: dict[str, dict[str, Any]] = {}
        agreeing: dict[str, list[int]] = {}
        for each in [*judged, pictograms(classifier)]:
            score, threshold = scores(classifier, each)
            told: dict[str, Any] = {}
            for method, limit in limits.items():
                told[method] = {
                    **figures(score[method], each.relevant, limit),
                    "average_precision": average_precision(score[method], each.relevant),
                }
            told["gate, at its threshold"] = figures(score["gate"], each.relevant, threshold)
            told["background, as shipped"] = figures(score["background"], each.relevant, LEAST_RELEVANCE)
            told["deviations, as shipped"] = figures(score["deviations"], each.relevant, COSINE_DEVIATIONS)
            results[each.name] = told
            agreeing[each.name] = [shipped_agrees(classifier, each, score["background"]), len(each.queries)]
        document = {
            "what": "cut-offs of searches by words: precision, recall, F1 in %, 95 % intervals over queries",
            **model(classifier),
            "half": chosen.half,
            "limits_of_the_half_tune": {name: float(f"{each:.6g}") for name, each in limits.items()},
            "shipped": {"background": LEAST_RELEVANCE, "deviations": COSINE_DEVIATIONS},
            "words": results,
            "queries_that_a_searcher_answers_so": agreeing,
            "pictures": by_pictures(images, shown),
        }
    write(chosen.output, document, show=False)
    for name, told in {**results, "pictures": document["pictures"]}.items():
        print(f"-- {name}")
        for method, each in told.items():
            cells = "  ".join(
                f"{what} {each[what][0]:5.1f} [{each[what][1]:.0f}, {each[what][2]:.0f}]"
                for what in ("precision", "recall", "f1")
            )
            print(f"{method:28} {each['limit']:8.3f}  {cells}  AP {each.get('average_precision', '')}")
    print(agreeing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
