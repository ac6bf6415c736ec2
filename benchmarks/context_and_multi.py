"""What contexts and several labels a picture are worth, on generated shapes that no probe was trained on.

*Context*: labels are colour and shape ("one red circle", 100 of them); what pictures show besides (texture,
place) is in no label. Offered are labels alone; each texture as a context; each place; both crossed
(``edgeclip.answers.crossed``); and, as ensembles do, the mean of all contexts' texts. Pictures: four of each
of the held-out combinations. The embedded default model, which learnt names and no attributes, is asked the
same of stamps (tuning half), with contexts that say how these look.

*Several labels*: pictures of two objects, one in each half, on combinations held out from training; labels
are shapes, colours, or both. The threshold is fitted on pictures of training combinations by
``edgeclip.multi.fit_multi``. Beside it: the first label alone, the first two (which knows how many there
are), and one threshold on the plain cosine. Micro F1.

Intervals: 95 %, bootstrap over combinations (context) and pictures (several labels); of differences, paired.

    python benchmarks/context_and_multi.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from int8_methods import run
from numpy.typing import NDArray
from written import ROOT, write

from edgeclip.answers import crossed, in_context
from edgeclip.evaluate.metrics import bootstrap_interval
from edgeclip.evaluate.subjects import open_bundle
from edgeclip.export.options import Checkpoint, GraphOptions
from edgeclip.export.passes import apply
from edgeclip.export.passes.sequences import shared
from edgeclip.export.recipes.stamps import candidates, of_half, read_stamps
from edgeclip.export.source import open_source
from edgeclip.fetch import materials
from edgeclip.heads import ContextHead, cosines
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.multi import fit_multi, standardized
from edgeclip.preprocess import Preprocess
from edgeclip.shapes import (
    COLOURS,
    SHAPES,
    Combination,
    held_out_combinations,
    render,
    training_combinations,
)

PROBES = ("mobileclip", "vit", "tinyclip")
TEXTURES = ("solid {}", "striped {}", "dotted {}", "hollow {}")
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")
STAMP_CONTEXTS = ("on white", "a drawing of a {}", "a toy {}", "seen from the side")
_VIEWS, _OBJECTS, _SEED, _PERCENT = 4, 1500, 0, 100

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


class Probe:
    """Both float towers of a trained probe."""

    def __init__(self, name: str) -> None:
        source = open_source(Checkpoint(str(ROOT / "tests" / "data" / "probes" / name)), threads=2)
        self._graphs = {
            tower: apply(source.trace(tower, GraphOptions()), shared(), what=tower)
            for tower in ("image", "text")
        }
        self._tokenizer = source.tokenizer
        self.size_px = source.preprocess.image_size_px[0]
        self.scale = source.scale

    def images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit embeddings ``(B, E)``."""
        return run(self._graphs["image"], pictures)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit embeddings ``(B, E)``."""
        return run(self._graphs["text"], self._tokenizer(list(texts), truncate=True))


# --- context -----------------------------------------------------------------------------------------------


def in_contexts(
    images: NDArray[np.float32],
    truth: NDArray[np.intp],
    clusters: NDArray[np.intp],
    encode: Callable[[Templates], NDArray[np.float32]],
    scale: float,
    offered: dict[str, tuple[str, ...]],
) -> dict[str, Any]:
    """Return top-1 without contexts, and with each of the offered ones in both ways, in %.

    Args:
        images: ``(P, E)`` unit rows.
        truth: ``(P,)`` right labels.
        clusters: ``(P,)`` pictures that belong together when intervals are drawn.
        encode: the labels in templates.
        scale: of the model.
        offered: contexts by name.
    """
    plain = Templates.of("{}")
    rows = encode(plain)
    right = (images @ rows.T).argmax(axis=1) == truth
    said: dict[str, Any] = {"no context": _figure(right, clusters)}
    for name, phrases in offered.items():
        parts = [rows, *(encode(in_context(plain, phrase)) for phrase in phrases)]
        head = ContextHead(scale, len(parts))
        inferred = head.similarity(cosines(images, np.concatenate(parts))).argmax(axis=1) == truth
        mean = np.mean(parts, axis=0)
        averaged = (images @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T).argmax(axis=1) == truth
        said[name] = {
            "contexts": list(phrases),
            "inferred": _figure(inferred, clusters),
            "inferred less no context": _figure(inferred.astype(float) - right, clusters),
            "mean of texts": _figure(averaged, clusters),
            "mean of texts less no context": _figure(averaged.astype(float) - right, clusters),
        }
    return said


def shapes_in_context(probe: Probe) -> dict[str, Any]:
    """Return what contexts give a probe on held-out combinations."""
    shown = held_out_combinations()
    pictures = np.stack(
        [
            render(each, 10_000 * view + row, size_px=probe.size_px)
            for view in range(_VIEWS)
            for row, each in enumerate(shown)
        ]
    )
    classes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    labels = [f"one {colour} {shape.replace('-', ' ')}" for colour, shape in classes]
    truth = np.tile([classes.index((each.colour, each.shape)) for each in shown], _VIEWS)

    def encode(templates: Templates) -> NDArray[np.float32]:
        (template,) = templates.texts
        return probe.texts([template.replace("{}", each) for each in labels])

    offered = {"textures": TEXTURES, "places": PLACES, "crossed": crossed([TEXTURES, PLACES])}
    clusters = np.tile(np.arange(len(shown)), _VIEWS)
    return in_contexts(probe.images(pictures), truth.astype(np.intp), clusters, encode, probe.scale, offered)


def stamps_in_context() -> dict[str, Any]:
    """Return what contexts give the embedded default model on stamps, tuning half."""
    stamps = read_stamps(ROOT / "benchmarks/data/stamps.jsonl")
    shown, names = of_half(stamps, "tune", "en"), candidates(stamps, "en")
    package = materials("stamps")["tuxpaint-stamps-default"]
    (subject,), _ = open_bundle("default")
    with closing(subject):
        prepare = Preprocess(subject.preprocess)
        images = subject.images(np.stack([prepare(each.path(package)) for each in shown]))
        truth = np.array([names.index(each.en) for each in shown], np.intp)

        def encode(templates: Templates) -> NDArray[np.float32]:
            photo = Templates.of([f"a photo of a {text}." for text in templates.texts])
            return subject.bank(LabelSet.of(list(names)), photo).embeddings

        return in_contexts(
            images, truth, np.arange(len(shown)), encode, subject.scale, {"looks": STAMP_CONTEXTS}
        )


# --- several labels ----------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[Combination], str], list[str]]] = {
    "shapes": (lambda c: f"one {c.shape.replace('-', ' ')}", [f"one {s.replace('-', ' ')}" for s in SHAPES]),
    "colours": (lambda c: c.colour, list(COLOURS)),
    "both": (
        lambda c: f"one {c.colour} {c.shape.replace('-', ' ')}",
        [f"one {colour} {shape.replace('-', ' ')}" for colour in COLOURS for shape in SHAPES],
    ),
}


def two_objects(
    size_px: int, *, held_out: bool, seed: int
) -> tuple[NDArray[np.uint8], list[tuple[Combination, Combination]]]:
    """Return pictures ``(P, H, W, 3)`` with an object in each half, and what they are."""
    known = held_out_combinations() if held_out else training_combinations()
    left, right = (
        [each for each in known if (each.count, each.position) == (1, place)] for place in ("left", "right")
    )
    random = np.random.default_rng(seed)
    pictures, shown = [], []
    while len(shown) < _OBJECTS:
        pair = left[random.integers(len(left))], right[random.integers(len(right))]
        if pair[0].colour == pair[1].colour or pair[0].shape == pair[1].shape:
            continue  # two labels of every kind
        first, second = (
            render(each, 2 * len(shown) + side + 100_000 * (seed + 1), size_px=size_px)
            for side, each in enumerate(pair)
        )
        pictures.append(np.concatenate([first[:, : size_px // 2], second[:, size_px // 2 :]], axis=1))
        shown.append(pair)
    return np.stack(pictures), shown


def several_labels(probe: Probe) -> dict[str, Any]:
    """Return F1 of each way to give labels, by kind of label."""
    seen, unseen = (two_objects(probe.size_px, held_out=held, seed=held) for held in (False, True))
    embedded = [probe.images(pictures) for pictures, _ in (seen, unseen)]
    found: dict[str, Any] = {}
    for kind, (label_of, labels) in KINDS.items():
        rows = probe.texts(labels)
        (fitting, wanted), (judged, right) = (
            (images @ rows.T, _truth(shown, label_of, labels))
            for images, (_, shown) in zip(embedded, (seen, unseen), strict=True)
        )
        fit = fit_multi(fitting, wanted, seed=_SEED)
        order = np.argsort(-judged, axis=1)
        given = {
            "first label": _first(order, 1),
            "first two labels": _first(order, 2),
            "one cosine for all": judged >= _best_cosine(fitting, wanted),
            "multi": standardized(judged) >= fit.threshold,
        }
        said: dict[str, Any] = {"labels": len(labels), "threshold": round(fit.threshold, 3)}
        for name, each in given.items():
            said[name] = _f1_figure(each, right)
            said[name]["labels given"] = round(float(each.sum(axis=1).mean()), 2)
        said["multi less first label"] = _f1_figure(given["multi"], right, given["first label"])
        found[kind] = said
    return found


def _truth(
    shown: Sequence[tuple[Combination, Combination]],
    label_of: Callable[[Combination], str],
    labels: Sequence[str],
) -> NDArray[np.bool_]:
    truth = np.zeros((len(shown), len(labels)), np.bool_)
    for row, pair in enumerate(shown):
        for each in pair:
            truth[row, labels.index(label_of(each))] = True
    return truth


def _first(order: NDArray[np.intp], count: int) -> NDArray[np.bool_]:
    given = np.zeros(order.shape, np.bool_)
    np.put_along_axis(given, order[:, :count], True, axis=1)
    return given


def _best_cosine(cosine: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> float:
    thresholds = np.quantile(cosine, np.linspace(0.2, 0.999, 400))
    return float(max(thresholds, key=lambda each: float(_f1(_counts(cosine >= each, right).sum(axis=0)))))


def _counts(given: NDArray[np.bool_], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.stack([(given & right).sum(axis=1), given.sum(axis=1) + right.sum(axis=1)], axis=1)


def _f1(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(2 * counts[..., 0] / np.maximum(counts[..., 1], 1))


def _f1_figure(
    given: NDArray[np.bool_], right: NDArray[np.bool_], less: NDArray[np.bool_] | None = None
) -> dict[str, float]:
    parts = [_counts(each, right) for each in (given, less) if each is not None]
    counts = np.concatenate(parts, axis=1)

    def statistic(rows: NDArray[np.float64]) -> float:
        total = rows.sum(axis=0)
        first = float(_f1(total[:2]))
        return first - float(_f1(total[2:])) if len(total) > 2 else first

    low, high = bootstrap_interval(counts, statistic, seed=_SEED)
    return _rounded(statistic(counts.astype(float)), low, high)


def _figure(values: NDArray[Any], clusters: NDArray[np.intp]) -> dict[str, float]:
    means = np.bincount(clusters, values) / np.bincount(clusters)
    low, high = bootstrap_interval(means, lambda rows: float(rows.mean()), seed=_SEED)
    return _rounded(float(means.mean()), low, high)


def _rounded(value: float, low: float, high: float) -> dict[str, float]:
    return {
        "value": round(_PERCENT * value, 2),
        "low": round(_PERCENT * low, 2),
        "high": round(_PERCENT * high, 2),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/context_and_multi.json")
    asked = parser.parse_args()
    found: dict[str, Any] = {"unit": "%", "context": {}, "several labels": {}}
    for name in PROBES:
        probe = Probe(name)
        found["context"][name] = shapes_in_context(probe)
        found["several labels"][name] = several_labels(probe)
    found["context"]["default, stamps, tuning half"] = stamps_in_context()
    write(asked.output, found)


if __name__ == "__main__":
    main()
