"""Where to stop in a list of pictures that words, or a picture, found: cut-offs compared where it is known.

*Words.* Queries are all names of a set, those without a picture in the collection too; a picture is relevant
to its own name alone. Precision, recall and F1 are over all pairs of query and picture; average precision is
the mean over queries that have a picture.

* ``cosine``: a fixed one.
* ``deviations``: how far a cosine lies above the mean of the collection, in standard deviations.
* ``background``: the probability of the words against the background of the bundle's gate; what ships.
* ``gate``: the score of one label by itself, as the gate gives it, at the gate's threshold and at one tuned.
* ``gate, deviations``: that score in standard deviations of the collection.

A bundle without a gate has the first two.

Limits are chosen on the half ``tune`` of the stamps, English and Chinese names together, by F1. Pictograms of
a style that nothing trains on (Twemoji, things) are another kind of pictures: they show what becomes of a
limit there. Intervals of 95 % resample queries.

*Pictures of the same kind.* Queries are pictures; relevant are those of the same name, of the same
superclass, or of the same emoji in another style (things). Beside cosines and deviations: ``neighbours``,
``2 · cos(x, y) − r(x) − r(y)`` with ``r`` the mean cosine of the ten nearest (CSLS, Conneau et al. 2018), and
``names``, the probability that two draws from the bundle's names, one for each picture, are the same. Limits
are chosen for the same name on the half ``tune``; beside what they do elsewhere stands the best limit there.

*The same picture.* Queries are edits of each picture of a collection, one kind of edit at a time, and only
that picture is relevant. Beside it the share of pairs of different pictures above each limit.

    edgeclip data fetch stamps pictograms held-out-pictograms photos
    apt-get install librsvg2-bin
    python benchmarks/search_cutoff.py --half tune --output benchmarks/results/search_cutoff_tune.json
    python benchmarks/search_cutoff.py      # the half report: once, for what is quoted
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from agreement_pictures import on_white
from default_model import rendered_openmoji
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from written import ROOT, arguments, model, write

from edgeclip.classify import ZeroShotClassifier
from edgeclip.evaluate.metrics import bootstrap_interval
from edgeclip.export.recipes.emoji import read_pictograms
from edgeclip.export.recipes.stamps import Stamp, candidates, of_half, read_stamps
from edgeclip.fetch import materials, photos
from edgeclip.index import made_with
from edgeclip.index_file import Entry, PictureIndex, Stat, write_index
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.reject import NegativesGate, open_gate
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.search import COSINE_DEVIATIONS, LEAST_RELEVANCE, Searcher

TEMPLATES = {"en": "one", "zh": "zh"}
LIMITS = (0.8, 0.85, 0.9, 0.95)
_STEPS, _NEIGHBOURS, _EDITED_PX, _SMALL_PX = 2001, 10, 768, 160

Score = NDArray[np.float64]
Styles = Mapping[str, NDArray[np.float32]]


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
    """Return the scores ``(n, Q)`` of each method, and the gate's own threshold (0 without one)."""
    cosine = (found.images @ found.queries.embeddings.T).astype(np.float64)
    if classifier.bundle.manifest.background_bank is None:
        return {"cosine": cosine, "deviations": _deviations(cosine)}, 0.0
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


# --- pictures as queries -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Alike:
    """Pictures as queries, and pictures that are like them.

    Attributes:
        queries: ``(Q, E)``.
        images: ``(n, E)``.
        relevant: ``(n, Q)``.
        others: ``(n, Q)`` which are pictures other than the query.
    """

    queries: NDArray[np.float32]
    images: NDArray[np.float32]
    relevant: NDArray[np.bool_]
    others: NDArray[np.bool_]

    @classmethod
    def within(cls, images: NDArray[np.float32], names: Sequence[str]) -> Alike:
        """Return a collection in which pictures of one name are alike."""
        others = ~np.eye(len(images), dtype=np.bool_)
        said = np.array(names)
        return cls(images, images, (said[:, None] == said[None]) & others, others)

    @classmethod
    def across(cls, queries: NDArray[np.float32], images: NDArray[np.float32]) -> Alike:
        """Return two collections in which each picture is like the one in its place."""
        same = np.eye(len(images), dtype=np.bool_)
        return cls(queries, images, same, np.ones_like(same))

    def scores(self, bank: LabelBank, scale: float) -> dict[str, Score]:
        """Return the scores ``(n, Q)`` of each method; the least where the picture is the query itself."""
        cosine = (self.images @ self.queries.T).astype(np.float64)
        masked = np.where(self.others, cosine, np.nan)
        deviations = (cosine - np.nanmean(masked, axis=0)) / np.nanstd(masked, axis=0)
        low = np.where(self.others, cosine, -1.0)
        near = [np.sort(low, axis=axis).take(range(-_NEIGHBOURS, 0), axis).mean(axis) for axis in (0, 1)]
        images, queries = (_shares(rows, bank, scale) for rows in (self.images, self.queries))
        found = {
            "cosine": cosine,
            "deviations": deviations,
            "neighbours": 2 * cosine - near[0][None] - near[1][:, None],
            "names": images @ queries.T,
        }
        return {name: np.where(self.others, each, each.min()) for name, each in found.items()}


def _shares(rows: NDArray[np.float32], bank: LabelBank, scale: float) -> Score:
    """Return the softmax over the names of a bank, ``(n, N)``."""
    odds = scale * (rows @ bank.embeddings.T).astype(np.float64)
    shares: Score = np.exp(odds - odds.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def same_name(images: NDArray[np.float32], shown: Sequence[Stamp]) -> Alike:
    """Return stamps, alike where they have one name."""
    return Alike.within(images, [stamp.en for stamp in shown])


def alike(images: NDArray[np.float32], shown: Sequence[Stamp], styles: Styles) -> dict[str, Alike]:
    """Return all collections of pictures that are alike."""
    coarse = [stamp.coarse or f"alone {row}" for row, stamp in enumerate(shown)]
    return {
        "stamps, same name": same_name(images, shown),
        "stamps, same superclass": Alike.within(images, coarse),
        "Google's emoji, the same in Twemoji": Alike.across(styles["google"], styles["twitter"]),
        "Twemoji, the same in OpenMoji": Alike.across(styles["twitter"], styles["openmoji"]),
    }


def emoji_styles(classifier: ZeroShotClassifier) -> Styles:
    """Return the embeddings of things and beings that three styles draw, row for row the same emoji."""
    packages = materials("pictograms")
    folders = {
        "google": packages["emoji-datasource-google"] / "img" / "google" / "64",
        "twitter": packages["emoji-datasource-twitter"] / "img" / "twitter" / "64",
        "openmoji": rendered_openmoji()[0],
    }
    found = read_pictograms(packages["emojibase-data"], tuple(folders.values()))
    things = [each for each in found if each.is_thing]
    return {
        name: _rows(classifier, (on_white(each.files[place]) for each in things))
        for place, name in enumerate(folders)
    }


def same_kind(
    classifier: ZeroShotClassifier, tuned: Alike, judged: Mapping[str, Alike], scale: float
) -> dict[str, Any]:
    """Return what limits chosen on ``tuned`` are worth on each collection, and the best ones there."""
    classifier.set_bundle_labels("en")
    bank = classifier.bank
    limits = {
        name: best_limit([(score, tuned.relevant)]) for name, score in tuned.scores(bank, scale).items()
    }
    told: dict[str, Any] = {}
    for what, each in judged.items():
        for name, score in each.scores(bank, scale).items():
            told[f"{what}, {name}"] = {
                **figures(score, each.relevant, limits[name]),
                "average_precision": average_precision(score, each.relevant),
                "best_here": figures(score, each.relevant, best_limit([(score, each.relevant)])),
            }
    return told


def edits(picture: Image.Image) -> dict[str, Image.Image]:
    """Return a picture as it is, and edited."""
    width, height = picture.size

    def middle(share: float) -> Image.Image:
        left, top = (round(side * (1 - share) / 2) for side in picture.size)
        return picture.crop((left, top, width - left, height - top))

    def jpeg(quality: int) -> Image.Image:
        stream = BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        return Image.open(stream).convert("RGB")

    def resized(factor: float) -> Image.Image:
        return picture.resize(
            (max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.BICUBIC
        )

    return {
        "as it is": picture,
        "JPEG of quality 75": jpeg(75),
        "JPEG of quality 30": jpeg(30),
        "half as wide": resized(0.5),
        f"{_SMALL_PX} pixels": resized(_SMALL_PX / min(picture.size)),
        "middle 90 %": middle(0.9),
        "middle 75 %": middle(0.75),
        "middle 50 %": middle(0.5),
        "mirrored": ImageOps.mirror(picture),
        "brighter by 30 %": ImageEnhance.Brightness(picture).enhance(1.3),
        "darker by 30 %": ImageEnhance.Brightness(picture).enhance(0.7),
        "grey": picture.convert("L").convert("RGB"),
        "turned by 90°": picture.transpose(Image.Transpose.ROTATE_90),
    }


def same_picture(
    classifier: ZeroShotClassifier, paths: Mapping[str, Sequence[Path]], drawings: Styles
) -> dict[str, Any]:
    """Return how edits of pictures are found by a fixed cosine, and how often different pictures pass."""
    told: dict[str, Any] = {"edits": {}, "different_pairs": {}}
    collections: dict[str, NDArray[np.float32]] = dict(drawings)
    for name, files in paths.items():
        edited = [edits(_opened(path)) for path in files]
        rows = {edit: _rows(classifier, (each[edit] for each in edited)) for edit in edited[0]}
        originals = collections[name] = rows.pop("as it is")
        told["edits"][name] = {
            edit: [_found_again((originals @ each.T).astype(np.float64), limit) for limit in LIMITS]
            for edit, each in rows.items()
        }
    for name, rows in collections.items():
        told["different_pairs"][name] = _different(rows)
    return told


def _found_again(score: Score, limit: float) -> dict[str, Any]:
    said = figures(score, np.eye(len(score), dtype=np.bool_), limit)
    return {name: said[name] for name in ("limit", "queries", "precision", "recall", "f1")}


def _different(rows: NDArray[np.float32]) -> dict[str, Any]:
    """Return how many of 10,000 pairs of different pictures are above each limit."""
    cosine = (rows @ rows.T).astype(np.float64)
    np.fill_diagonal(cosine, -1.0)
    told: dict[str, Any] = {"pictures": len(rows), "highest": round(float(cosine.max()), 4)}
    for limit in LIMITS:
        above = (cosine >= limit).sum(axis=0) / (len(rows) - 1) * 1e4  # a picture; pairs share pictures
        low, high = bootstrap_interval(above, lambda each: float(each.mean()), seed=0)
        told[f"{limit:g}"] = [round(each, 3) for each in (float(above.mean()), low, high)]
    return told


def _opened(path: Path) -> Image.Image:
    """Return a picture on white, at most ``_EDITED_PX`` wide and high."""
    with Image.open(path) as picture:
        picture.draft("RGB", (2 * _EDITED_PX, 2 * _EDITED_PX))
        upright = ImageOps.exif_transpose(picture).convert("RGBA")
    ground = Image.new("RGBA", upright.size, (255, 255, 255, 255))
    ground.alpha_composite(upright)
    found = ground.convert("RGB")
    found.thumbnail((_EDITED_PX, _EDITED_PX))
    return found


def _rows(classifier: ZeroShotClassifier, pictures: Iterable[Any]) -> NDArray[np.float32]:
    return np.stack(
        [each.embedding for each in classifier.embed_stream(pictures) if each.embedding is not None]
    )


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
    parser = arguments("Compare cut-offs of searches.", "search_cutoff.json")
    parser.add_argument("--half", choices=("tune", "report"), default="report")
    chosen = parser.parse_args()
    with ZeroShotClassifier.open(
        chosen.bundle, variant=chosen.variant, options=RuntimeOptions(threads=1), keep_text_tower=True
    ) as classifier:
        tuned, tuned_stamps, tuned_images = stamps(classifier, "tune")
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
            told["deviations, as shipped"] = figures(score["deviations"], each.relevant, COSINE_DEVIATIONS)
            results[each.name] = told
            if "background" not in score:
                continue
            told["gate, at its threshold"] = figures(score["gate"], each.relevant, threshold)
            told["background, as shipped"] = figures(score["background"], each.relevant, LEAST_RELEVANCE)
            agreeing[each.name] = [shipped_agrees(classifier, each, score["background"]), len(each.queries)]
        styles, scale = emoji_styles(classifier), classifier.bundle.manifest.model.scale
        package = materials("stamps")["tuxpaint-stamps-default"]
        paths = {
            "stamps": [stamp.path(package) for stamp in shown],
            "photographs": [photo.path for photo in photos()],
        }
        document = {
            "what": "cut-offs of searches: precision, recall, F1 in %, 95 % intervals over queries",
            **model(classifier),
            "half": chosen.half,
            "limits_of_the_half_tune": {name: float(f"{each:.6g}") for name, each in limits.items()},
            "shipped": {"background": LEAST_RELEVANCE, "deviations": COSINE_DEVIATIONS},
            "words": results,
            "queries_that_a_searcher_answers_so": agreeing,
            "pictures": same_kind(
                classifier, same_name(tuned_images, tuned_stamps), alike(images, shown, styles), scale
            ),
            "same_picture": same_picture(classifier, paths, styles),
        }
    write(chosen.output, document, show=False)
    for name, told in {**results, "pictures": document["pictures"]}.items():
        print(f"-- {name}")
        for method, each in told.items():
            cells = "  ".join(
                f"{what} {each[what][0]:5.1f} [{each[what][1]:.0f}, {each[what][2]:.0f}]"
                for what in ("precision", "recall", "f1")
            )
            print(f"{method:50} {each['limit']:8.3f}  {cells}  AP {each.get('average_precision', '')}")
            if "best_here" in each:
                print(f"{'  best here':50} {each['best_here']['limit']:8.3f}  F1 {each['best_here']['f1']}")
    for name, told in document["same_picture"]["edits"].items():
        print(f"-- the same picture: {name}, recall and precision at {LIMITS}")
        for edit, each in told.items():
            print(f"{edit:28}", *(f"{one['recall'][0]:6.1f} {one['precision'][0]:6.1f}" for one in each))
    for name, told in document["same_picture"]["different_pairs"].items():
        print(f"{name:28}", told)
    print(agreeing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
