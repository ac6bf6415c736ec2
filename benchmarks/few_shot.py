"""Few-shot heads against zero-shot and each other: how often right, how sure, what they tell, what they cost.

What the classes are was decided before anything was measured:

* *stamps*: the superclasses with at least ten pictures, four of them in the half ``tune``: shots are drawn
  from ``tune``, all pictures of the half ``report`` are asked;
* *pictograms* of a style that nothing trains on (Twitter's), by the eight groups of the emoji list and by its
  sixteen finer groups of things with at least twenty drawings; named as the list names them;
* *shapes*, for each trained probe: the names of textures, shapes, colours, counts and positions, and the
  whole captions of 40 combinations, of pictures of combinations that no probe was trained on.

A draw takes the shots of each class; of the other pictures up to 30 a class are asked. Accuracy is the mean
over classes. Intervals are over draws (bootstrap): draws share pictures, so that they say how much depends
on the shots, not on the set.

Methods: *zero-shot*, the names alone; *mean*, nearest class mean; *gda*, the discriminant of pictures alone;
*wang*, gda with its ridge plus zero-shot, as published (Wang et al. 2024) but without random crops of the
pictures, the weight chosen from decades by cross-validation of the shots (1 for one shot); *tip*, Tip-Adapter
(Zhang et al. 2022), its two numbers chosen by leave-one-out (their defaults for one shot), which is no linear
layer; *blend*, what `edgeclip heads fit` does. Two more figures of it say what a second picture of one class
does, and, of the most shots, what all pictures that are not asked would give in place of the shots.
Strangers: half of the classes are left out of the head, and their pictures are told from the others'.

Choices in edgeclip were made on the half ``tune``, pictograms of Google's style and other pictures of shapes.

    edgeclip data fetch stamps pictograms default-model
    OPENBLAS_NUM_THREADS=1 python benchmarks/few_shot.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from agreement_pictures import on_white
from int8_methods import PROBES, run
from written import ROOT, commit, difference, ratio, write

from edgeclip.classify import ZeroShotClassifier
from edgeclip.evaluate.metrics import auroc, bootstrap_interval, expected_calibration_error
from edgeclip.evaluate.subjects import Subject, open_bundle
from edgeclip.export.options import Checkpoint, GraphOptions
from edgeclip.export.passes import apply
from edgeclip.export.passes.sequences import shared
from edgeclip.export.recipes.emoji import read_pictograms
from edgeclip.export.recipes.stamps import read_stamps
from edgeclip.export.source import open_source
from edgeclip.fetch import materials
from edgeclip.few_shot import FewShotHead, gate_of
from edgeclip.few_shot_fit import fit_head
from edgeclip.heads import LinearHead, TemperatureHead, rank
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.latency import compare_interleaved, measure
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.shapes import COLOURS, COUNTS, POSITIONS, SHAPES, TEXTURES, held_out_combinations, label, render

SHOTS = (1, 2, 4, 8, 16)
METHODS = ("zero-shot", "mean", "gda", "wang", "tip", "blend")
GROUPS = {
    0: "smileys and emotion",
    1: "people and body",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
}
SUBGROUPS = {
    34: "mammal",
    35: "bird",
    42: "fruit",
    44: "prepared food",
    47: "drink",
    51: "building",
    54: "ground transport",
    58: "time",
    59: "sky and weather",
    60: "event",
    62: "sport",
    63: "game",
    65: "clothing",
    76: "office",
    78: "tool",
    81: "household",
}
_SPOKEN = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the middle",
    "1": "one",
    "2": "two",
    "3": "three",
    "4": "four",
}
_ASKED, _LEAST = 30, 3
_SHAPE_SEED, _CAPTIONS, _OF_CAPTION = 50_000, 40, 26
_DECADES = tuple(10.0**each for each in range(-4, 3))
_BETAS, _ALPHAS = (1.0, 3.0, 5.5, 10.0, 20.0), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_TIMED_CLASSES, _TIMED_SHOTS = 100, 16

Rows = NDArray[np.float32]
Places = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Embedded pictures of a set.

    Attributes:
        name: of the set.
        rows: ``(N, E)``.
        targets: ``(N,)``.
        texts: ``(C, E)`` text rows of the class names.
        names: of the classes.
        scale: the model's multiplier of cosines.
        shots: numbers of pictures a class that are tried.
        drawn_from: ``(N,)`` which pictures may be shots; the others are asked. ``None``: all may, and those
            that are not are asked.
    """

    name: str
    rows: Rows
    targets: Places
    texts: Rows
    names: tuple[str, ...]
    scale: float
    shots: tuple[int, ...] = SHOTS
    drawn_from: NDArray[np.bool_] | None = None

    def draw(self, shots: int, seed: int) -> tuple[Places, Places]:
        """Return the pictures that are shots, and those that are asked."""
        random = np.random.default_rng([seed, shots])
        taken, asked = [], []
        for each in range(len(self.names)):
            own = random.permutation(np.flatnonzero(self.targets == each))
            if self.drawn_from is None:
                taken.append(own[:shots])
                asked.append(own[shots : shots + _ASKED])
            else:
                taken.append(own[self.drawn_from[own]][:shots])
                asked.append(own[~self.drawn_from[own]])
        return np.concatenate(taken), np.concatenate(asked)

    def others(self, asked: Places) -> Places:
        """Return all pictures that may be shots where these are asked."""
        may = np.ones(len(self.rows), np.bool_) if self.drawn_from is None else self.drawn_from.copy()
        may[asked] = False
        return np.flatnonzero(may)


# --- sets --------------------------------------------------------------------------------------------------


def pictograms_and_stamps() -> Iterable[Pictures]:
    """Embed with the default bundle."""
    (subject, *_), _ = open_bundle("default")
    try:
        prepare = Preprocess(subject.preprocess)
        stamps = read_stamps(ROOT / "benchmarks/data/stamps.jsonl")
        package = materials("stamps")["tuxpaint-stamps-default"]
        kinds = [stamp.coarse or "" for stamp in stamps]
        tune = np.array([stamp.split == "tune" for stamp in stamps])
        names = tuple(
            name
            for name in sorted(set(kinds) - {""})
            if kinds.count(name) >= 10
            and sum(tune[row] for row, kind in enumerate(kinds) if kind == name) >= 4
        )
        shown = [row for row, kind in enumerate(kinds) if kind in names]
        yield Pictures(
            "stamps superclasses",
            _embedded(subject, (prepare(stamps[row].path(package)) for row in shown)),
            np.array([names.index(kinds[row]) for row in shown], np.intp),
            _texts(subject, names),
            names,
            subject.scale,
            (1, 2, 4),
            tune[shown],
        )
        packages = materials("pictograms")
        folder = packages["emoji-datasource-twitter"] / "img" / "twitter" / "64"
        emoji = read_pictograms(packages["emojibase-data"], (folder,))
        listed = json.loads((packages["emojibase-data"] / "en" / "data.json").read_text("utf-8"))
        places = {entry["hexcode"].lower(): entry for entry in listed}
        rows = _embedded(subject, (prepare.resize(on_white(each.files[0])) for each in emoji))
        for key, named in (("group", GROUPS), ("subgroup", SUBGROUPS)):
            numbers = [places[each.code].get(key) for each in emoji]
            chosen = [row for row, number in enumerate(numbers) if number in named]
            yield Pictures(
                f"pictograms by {key}",
                rows[chosen],
                np.array([list(named).index(numbers[row]) for row in chosen], np.intp),
                _texts(subject, tuple(named.values())),
                tuple(named.values()),
                subject.scale,
            )
    finally:
        subject.close()


def _embedded(subject: Subject, pixels: Iterable[NDArray[np.uint8]]) -> Rows:
    source, parts = iter(pixels), []
    while batch := list(islice(source, 16)):
        parts.append(subject.images(np.stack(batch)))
    return np.concatenate(parts)


def _texts(subject: Subject, names: Sequence[str]) -> Rows:
    return np.asarray(subject.bank(LabelSet.of(list(names)), None).embeddings)


def shapes() -> Iterable[Pictures]:
    """Render shapes and embed them with the trained probes."""
    combinations = held_out_combinations()
    shown = [each for each in combinations for _ in range(2)]
    pixels = np.stack([render(each, _SHAPE_SEED + row, size_px=64) for row, each in enumerate(shown)])
    said = combinations[:: len(combinations) // _CAPTIONS][:_CAPTIONS]
    repeated = [each for each in said for _ in range(_OF_CAPTION)]
    others = np.stack([render(each, 2 * _SHAPE_SEED + row, size_px=64) for row, each in enumerate(repeated)])
    attributes = {
        "texture": TEXTURES,
        "shape": SHAPES,
        "colour": COLOURS,
        "count": COUNTS,
        "position": POSITIONS,
    }
    for probe in PROBES:
        source = open_source(Checkpoint(str(ROOT / "tests/data/probes" / probe)), threads=1)
        graphs = {t: apply(source.trace(t, GraphOptions()), shared(), what=t) for t in ("image", "text")}

        def texts(names: Sequence[str], source: Any = source, graph: Any = graphs["text"]) -> Rows:
            return _unit(run(graph, source.tokenizer(list(names), truncate=True)))

        rows = _unit(run(graphs["image"], pixels))
        for attribute, values in attributes.items():
            names = tuple(_SPOKEN.get(str(each), str(each)).replace("-", " ") for each in values)
            targets = np.array([list(values).index(getattr(each, attribute)) for each in shown], np.intp)
            yield Pictures(f"{probe}: {attribute}", rows, targets, texts(names), names, float(source.scale))
        names = tuple(label(each, "en") for each in said)
        targets = np.repeat(np.arange(len(said)), _OF_CAPTION)
        captioned = _unit(run(graphs["image"], others))
        yield Pictures(f"{probe}: captions", captioned, targets, texts(names), names, float(source.scale))


def _unit(rows: Rows) -> Rows:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


# --- methods -----------------------------------------------------------------------------------------------


def wang(rows: Rows, targets: Places, pictures: Pictures, asked: Rows) -> NDArray[np.float64]:
    """Return logits of Wang et al. 2024: zero-shot plus a weight times the discriminant with their ridge."""
    classes = len(pictures.names)

    def discriminant(rows: Rows, targets: Places, asked: Rows) -> NDArray[np.float64]:
        means = np.stack([rows[targets == each].mean(axis=0) for each in range(classes)]).astype(np.float64)
        centred = rows - means[targets]
        scatter = centred.T @ centred  # (N - 1) times their covariance
        width = rows.shape[1]
        level = np.trace(scatter) / max(len(rows) - 1, 1)
        if not level:
            level = 1.0
        weights = np.linalg.solve(scatter + level * np.eye(width), means.T).T * width
        return asked @ weights.T - 0.5 * (weights * means).sum(axis=1)

    def zero_shot(asked: Rows) -> NDArray[np.float64]:
        return pictures.scale * (asked @ pictures.texts.T).astype(np.float64)

    alpha = 1.0
    most = int(np.bincount(targets).min())
    if most > 1:
        parts = np.concatenate([np.arange((targets == each).sum()) for each in range(classes)]) % min(4, most)
        hits = np.zeros(len(_DECADES))
        for part in range(min(4, most)):
            out = parts == part
            words, own = zero_shot(rows[out]), discriminant(rows[~out], targets[~out], rows[out])
            for place, each in enumerate(_DECADES):
                hits[place] += ((words + each * own).argmax(axis=1) == targets[out]).sum()
        alpha = _DECADES[int(hits.argmax())]
    return zero_shot(asked) + alpha * discriminant(rows, targets, asked)


def tip(rows: Rows, targets: Places, pictures: Pictures, asked: Rows) -> NDArray[np.float64]:
    """Return logits of Tip-Adapter without training: zero-shot plus a cache of the shots."""
    classes = len(pictures.names)
    one_hot = np.eye(classes)[targets]

    def zero_shot(asked: Rows) -> NDArray[np.float64]:
        return pictures.scale * (asked @ pictures.texts.T).astype(np.float64)

    alpha, beta = 1.0, 5.5
    if np.bincount(targets).min() > 1:
        alike, words = (rows @ rows.T).astype(np.float64), zero_shot(rows)
        best = -1
        for each_alpha, each_beta in itertools.product(_ALPHAS, _BETAS):
            cache = np.exp(-each_beta * (1 - alike))
            np.fill_diagonal(cache, 0)
            hits = int(((words + each_alpha * cache @ one_hot).argmax(axis=1) == targets).sum())
            if hits > best:
                best, alpha, beta = hits, each_alpha, each_beta
    cache = np.exp(-beta * (1 - (asked @ rows.T).astype(np.float64)))
    return zero_shot(asked) + alpha * cache @ one_hot


# --- measuring ---------------------------------------------------------------------------------------------


def measured(pictures: Pictures, draws: int) -> dict[str, Any]:
    """Return what all methods make of a set, by shots."""
    classes = len(pictures.names)
    said: dict[str, Any] = {
        "classes": list(pictures.names),
        "pictures": np.bincount(pictures.targets, minlength=classes).tolist(),
        "shots": {},
    }
    for shots in pictures.shots:
        rows: dict[str, list[float]] = {}
        for seed in range(draws):
            for name, value in _one_draw(pictures, shots, seed).items():
                rows.setdefault(name, []).append(value)
        figures = {name: _figure(np.array(values)) for name, values in rows.items()}
        gains = {
            method: _figure(np.array(rows[method]) - np.array(rows["zero-shot"])) for method in METHODS[1:]
        }
        kept = {name: [round(value, 3) for value in values] for name, values in rows.items()}
        said["shots"][shots] = {"figures": figures, "points_above_zero_shot": gains, "draws": kept}
        print(
            f"{pictures.name:24}{shots:3} zero-shot {figures['zero-shot']['value']:5.1f}",
            *(f"{method} {each['value']:+5.1f}" for method, each in gains.items()),
            f"[{gains['blend']['low']:+.1f}, {gains['blend']['high']:+.1f}]",
            *(f"{name} {figures[name]['value']:.1f}" for name in ("ece", "auroc", "accepted", "told")),
            flush=True,
        )
    return said


def _one_draw(pictures: Pictures, shots: int, seed: int) -> dict[str, float]:
    taken, asked = pictures.draw(shots, seed)
    rows, targets = pictures.rows[taken], pictures.targets[taken]
    shown, truth = pictures.rows[asked], pictures.targets[asked]
    words: dict[str, Any] = {"zero_shot": pictures.texts, "scale": pictures.scale}
    heads = {
        "mean": fit_head(rows, targets, pictures.names, space="", method="mean"),
        "gda": fit_head(rows, targets, pictures.names, space="", method="gda"),
        "blend": fit_head(rows, targets, pictures.names, space="", **words),
    }
    logits: dict[str, NDArray[Any]] = {
        "zero-shot": shown @ pictures.texts.T,
        "wang": wang(rows, targets, pictures, shown),
        "tip": tip(rows, targets, pictures, shown),
        **{name: head.logits(shown) for name, head in heads.items()},
    }
    said = {method: 100 * _accuracy(logits[method], truth) for method in METHODS}
    scores = np.exp(logits["blend"] - logits["blend"].max(axis=1, keepdims=True)).astype(np.float64)
    scores /= scores.sum(axis=1, keepdims=True)
    right = logits["blend"].argmax(axis=1) == truth
    said["ece"] = 100 * expected_calibration_error(scores.max(axis=1), right)
    said["mean score less accuracy"] = 100 * float(scores.max(axis=1).mean() - right.mean())
    if shots == 2:
        first = (targets == 0) | np.append(True, targets[1:] != targets[:-1])
        head = fit_head(rows[first], targets[first], pictures.names, space="", **words)
        said["blend, two of the first class and one of each other"] = 100 * _accuracy(
            head.logits(shown), truth
        )
    if shots == max(pictures.shots):
        others = pictures.others(asked)
        head = fit_head(pictures.rows[others], pictures.targets[others], pictures.names, space="", **words)
        said["blend, all pictures that are not asked"] = 100 * _accuracy(head.logits(shown), truth)
    # Strangers: pictures of the other half of the classes.
    kept = np.sort(
        np.random.default_rng(seed).permutation(len(pictures.names))[: max(2, len(pictures.names) // 2)]
    )
    own, known = np.isin(targets, kept), np.isin(truth, kept)
    half = fit_head(
        rows[own],
        np.searchsorted(kept, targets[own]),
        [pictures.names[each] for each in kept],
        space="",
        zero_shot=pictures.texts[kept],
        scale=pictures.scale,
    )
    gate = gate_of(half)
    fits = gate.scores(half.logits(shown), shown @ gate.rows.T)
    highest = (shown @ pictures.texts[kept].T).max(axis=1)
    said["auroc"] = 100 * auroc(fits, known)
    said["auroc of the best cosine of the names"] = 100 * auroc(highest, known)
    said["auroc of the best score"] = 100 * auroc(_best_score(half.logits(shown)), known)
    said["accepted"] = 100 * float((fits >= gate.threshold)[known].mean())
    said["told"] = 100 * float((fits < gate.threshold)[~known].mean())
    return said


def _best_score(logits: Rows) -> NDArray[np.float64]:
    scores: NDArray[np.float64] = 1 / np.exp(
        logits - logits.max(axis=1, keepdims=True), dtype=np.float64
    ).sum(axis=1)
    return scores


def _accuracy(logits: NDArray[Any], truth: Places) -> float:
    right = logits.argmax(axis=1) == truth
    return float(np.mean([right[truth == each].mean() for each in np.unique(truth)]))


def _figure(values: NDArray[np.float64]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {
        "value": round(float(values.mean()), 2),
        "low": round(low, 2),
        "high": round(high, 2),
        "draws": len(values),
    }


def bars(sets: dict[str, Any]) -> dict[str, Any]:
    """Return what each set reaches of what is asked of few-shot heads."""
    said: dict[str, Any] = {}
    for name, each in sets.items():
        found: dict[str, Any] = {}
        for shots, row in each["shots"].items():
            before, gain = (
                row["figures"]["zero-shot"]["value"],
                row["points_above_zero_shot"]["blend"]["value"],
            )
            if shots == 1:
                found["1 shot: at most 1 point below"] = {"reached": gain, "passed": gain >= -1}
            if shots == 16 and before <= 80:
                found["16 shots: 8 points above"] = {"reached": gain, "passed": gain >= 8}
            if shots == 16 and before > 80:
                removed = round(gain / (100 - before), 3)
                found["16 shots: half of the error removed"] = {"reached": removed, "passed": removed >= 0.5}
        said[name] = found
    return said


def timed(pictures: Pictures, parts: Sequence[str]) -> dict[str, Any]:
    """Return what fitting 100 classes of 16 pictures takes (part "fit"), and the head a picture ("cost")."""
    random = np.random.default_rng(0)
    count = _TIMED_CLASSES * _TIMED_SHOTS
    rows = pictures.rows[random.choice(len(pictures.rows), count, replace=len(pictures.rows) < count)]
    targets = np.repeat(np.arange(_TIMED_CLASSES), _TIMED_SHOTS)
    means = rows.reshape(_TIMED_CLASSES, _TIMED_SHOTS, -1).mean(axis=1)
    texts = _unit(means + 0.1 * random.standard_normal(means.shape) / means.shape[1] ** 0.5)
    names = tuple(f"class {each}" for each in range(_TIMED_CLASSES))

    def fit() -> object:
        return fit_head(rows, targets, names, space="", zero_shot=texts, scale=pictures.scale)

    said: dict[str, Any] = {}
    head = fit_head(rows, targets, names, space="", zero_shot=texts, scale=pictures.scale)
    if "fit" in parts:
        taken, busy = measure(fit, warmup=2, min_samples=20, min_duration_s=5), []
        for _ in range(20):  # of one core where there is one BLAS thread, whatever else the machine does
            before = process_time()
            fit()
            busy.append(process_time() - before)
        said["fit"] = {
            "classes": _TIMED_CLASSES,
            "pictures_a_class": _TIMED_SHOTS,
            "embed_dim": rows.shape[1],
            "median_s": round(taken.median_ms / 1e3, 3),
            "samples_s": [round(each / 1e3, 3) for each in taken.samples_ms.tolist()],
            "median_cpu_s": round(float(np.median(busy)), 3),
            "samples_cpu_s": [round(each, 3) for each in busy],
            "head_bytes": len(head.to_bytes()),
        }
    if "cost" in parts:
        linear, plain, picture = LinearHead(head.bias), TemperatureHead(pictures.scale), rows[:1]
        found = compare_interleaved(
            lambda: rank(picture, head.weights, linear),
            lambda: rank(picture, texts, plain),
            min_blocks=400,
            min_duration_s=5,
            repeat=50,
            warmup=50,
        )
        what = {"labels": _TIMED_CLASSES, "a": "few-shot head", "b": "label bank"}
        said["rank"] = {**what, **ratio(found)}
        said["classify"] = {**what, **_classified(pictures, head, texts, names)}
    return said


def _classified(pictures: Pictures, head: FewShotHead, texts: Rows, names: Sequence[str]) -> dict[str, Any]:
    """Return how much longer a picture takes with a head than with a label bank, tower and all."""
    with ZeroShotClassifier.open(options=RuntimeOptions(threads=1)) as classifier:
        space = classifier.bundle.manifest.model.embedding_space
        classifier.set_labels(LabelBank(LabelSet.of(list(names)), texts, Templates.of("one"), space=space))
        named = classifier._active
        classifier.set_head(replace(head, space=space))
        fitted = classifier._active
        picture = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)

        # One session for both: two of them differ by more than what is asked, wherever their weights lie.
        def classify(active: Any) -> object:
            classifier._active = active
            return classifier.classify(picture)

        found = compare_interleaved(
            lambda: classify(fitted), lambda: classify(named), min_blocks=500, min_duration_s=10, warmup=20
        )
    return {**ratio(found), **difference(found)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument(
        "--parts", default="sets,fit,cost", help="what to measure; what is there of others stays"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/few_shot.json")
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    made: dict[str, Any] = {}
    commits: dict[str, str] = {}
    if asked.output.is_file():
        known = json.loads(asked.output.read_text("utf-8"))
        made = {key: known[key] for key in ("sets", "bars", "cost") if key in known}
        commits = known["commits"]
    sources: Sequence[Callable[[], Iterable[Pictures]]] = (pictograms_and_stamps, shapes)
    if "sets" in parts:
        sets = {each.name: measured(each, asked.draws) for source in sources for each in source()}
        made |= {"sets": sets, "bars": bars(sets)}
        for name, found in made["bars"].items():
            for what, said in found.items():
                print(f"{'ok  ' if said['passed'] else 'MISS'} {name:24} {what}: {said['reached']}")
    if {"fit", "cost"}.intersection(parts):
        largest = max(pictograms_and_stamps(), key=lambda each: len(each.rows))
        made["cost"] = {**made.get("cost", {}), **timed(largest, parts)}
        print(
            json.dumps(
                {**made["cost"], "fit": {**made["cost"]["fit"], "samples_s": "…", "samples_cpu_s": "…"}},
                indent=1,
            )
        )
    commits |= dict.fromkeys(parts, commit())
    write(asked.output, {"benchmark": "few_shot", **made, "commits": commits}, show=False)


if __name__ == "__main__":
    main()
