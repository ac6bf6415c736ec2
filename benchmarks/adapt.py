"""Adaptation to unlabelled pictures: does `edgeclip adapt` help, and does it say when it does not?

Settings and thresholds were chosen on OpenMoji (unseen too), Noto (a style that the default model learnt
from), the tuning half of the stamps and generated shapes; Twemoji and the report half were looked at once,
by this program. The tasks were written down before.

*Names*, of drawings in a style that nothing trains on: each thing or being (no flag, face or sign) in eight
pictures on plain grounds, different in colour, size, place, tilt and mirroring. Four are adapted on, without
their names, and judged (transductive); the other four are judged alone (inductive). Offered are ten names
drawn from all (20 draws), all names of a kind of Unicode's list (kinds of eight names and more), all names.
Draws of ten less well chosen: *uneven*, with 1 to 4 pictures a name; *ten shown of twenty*, with names
offered that no picture shows; *among others*, with pictures of five names that are not offered.
*Kinds*: the names of 31 kinds offered, one drawing on white a thing, half of the things to adapt on; and
*ten kinds*, 20 draws of ten of them, at most ten things each. These are what gates are hardest put to: clear
groups that are not the labels.
*Stamps*: 14 superclasses; adapted on the report half and judged there, and adapted on the tuning half and
judged on the other. *Shapes*: probes that were trained on generated shapes; 40 captions of held-out
combinations in eight pictures each, and one attribute alone among pictures that differ in five.

Methods: `vectors` and `prompts` of `edgeclip adapt`; `upl`, the sixteen pictures that are surest of a label
among those it comes first for, as in UPL (Huang et al. 2022), though not for prompts: the row is the text and
their mean in equal parts; for `nano` also `taught` by the default model. Each is measured whether or not the
command would refuse it, and so that a refusal leaves the rows as they are ("gated"). `nano` is adapted with
the default model as a witness, as the command does; `gates` counts what is written and refused with it and
without. Prompts take time: they are not learned for all names at once, nor for the less well chosen.

Intervals are of differences to zero-shot, 95 %, bootstrap over names (of shapes: over captions); three seeds
choose draws, which pictures are adapted on, and halves. `--style openmoji` is what choices were made on.

    edgeclip data fetch pictograms held-out-pictograms stamps default-model
    python benchmarks/adapt.py
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from agreement_pictures import on_white
from default_model import embedded, rendered_openmoji
from written import ROOT, write

from edgeclip.distill.adapt import Fit, Judgement, Self, Taught, adapt, ask_teacher, first_labels, posterior
from edgeclip.distill.eager import open_eager
from edgeclip.distill.learned_prompts import LearnedPrompts, PromptTower, open_prompt_tower
from edgeclip.evaluate.paired import clustered_mean
from edgeclip.evaluate.subjects import Subject, open_bundle
from edgeclip.export.recipes.emoji import Pictogram, read_pictograms
from edgeclip.export.recipes.stamps import read_stamps
from edgeclip.fetch import materials
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.host import usable_cores
from edgeclip.shapes import held_out_combinations, label, ordered_combinations, render

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.float32]

SEEDS = (0, 1, 2)
DRAWS, OFFERED, PICTURES, ADAPTED = 20, 10, 8, 4
CHECKPOINT = ROOT / "tests/data/default-checkpoint"
PROBES = ("mobileclip", "tinyclip", "vit")
ATTRIBUTES = ("colour", "count", "position", "shape", "texture")
KINDS = {
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-marine": "sea animal", "animal-bug": "insect",
    "plant-flower": "flower", "plant-other": "plant", "food-fruit": "fruit", "food-vegetable": "vegetable",
    "food-prepared": "dish", "food-asian": "asian food", "food-sweet": "dessert", "drink": "drink",
    "place-building": "building", "transport-ground": "land vehicle", "transport-air": "aircraft",
    "transport-water": "boat", "time": "clock", "sky-weather": "weather", "event": "celebration",
    "sport": "sport", "game": "game", "clothing": "clothing", "musical-instrument": "musical instrument",
    "computer": "computer", "light-video": "camera", "book-paper": "book", "money": "money", "mail": "mail",
    "office": "office supplies", "tool": "tool", "household": "household item",
}  # fmt: skip
_SIDE_PX, _LEAST_NAMES, _UPL_TOP, _CAPTIONS, _ATTRIBUTE_PICTURES = 160, 8, 16, 40, 500
_THINGS_OF_A_KIND, _POINT = 10, 1.0
UNEVEN = (4, 4, 4, 3, 2, 2, 1, 1, 1, 1)
_OTHERS = 5


@dataclass(frozen=True, eq=False)
class Seen:
    """Embeddings of pictures, rows of labels and scale: what one model has of a case.

    Attributes:
        adapted: ``(n, E)`` pictures that are adapted on.
        others: ``(m, E)`` pictures that are judged alone.
        rows: ``(N, E)`` labels.
        scale: multiplier of cosines.
    """

    adapted: Rows
    others: Rows
    rows: Rows
    scale: float


@dataclass(frozen=True, eq=False)
class Case:
    """Labels that are offered, pictures, and what they show.

    Attributes:
        task: which table it belongs to.
        seed: of the task.
        names: that are offered.
        own: columns of what the adapted pictures show; -1 where that is not offered.
        own_others: the same of the other pictures.
        clusters: what each adapted picture belongs to in the bootstrap.
        clusters_others: the same of the others.
        seen: by model.
        templates: name of the templates.
        checkpoint: whose text tower prompts are learned through; nothing: they are not.
    """

    task: str
    seed: int
    names: tuple[str, ...]
    own: NDArray[np.intp]
    own_others: NDArray[np.intp]
    clusters: tuple[str, ...]
    clusters_others: tuple[str, ...]
    seen: Mapping[str, Seen]
    templates: str = "one"
    checkpoint: Path | None = None


# --- pictures of pictograms --------------------------------------------------------------------------------


def drawn(drawing: Image.Image, draw: random.Random) -> Image.Image:
    """Return a drawing on a plain light ground: size, place, tilt, mirroring and colour are drawn."""
    colour = tuple(draw.randint(150, 255) for _ in range(3)) if draw.random() < 0.7 else (255, 255, 255)
    ground = Image.new("RGB", (_SIDE_PX, _SIDE_PX), colour)
    side = round(_SIDE_PX * draw.uniform(0.5, 0.9))
    large = drawing.convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        large = large.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    large = large.rotate(draw.uniform(-15, 15), Image.Resampling.BICUBIC)
    ground.paste(large, (draw.randint(0, _SIDE_PX - side), draw.randint(0, _SIDE_PX - side)), large)
    return ground


@dataclass(frozen=True, eq=False)
class Drawings:
    """Pictures of a style, embedded by every model: the first of each is on white.

    Attributes:
        names: of the emoji.
        kinds: of Unicode's list.
        embeddings: ``(emoji, 1 + PICTURES, E)`` by model.
        labels: ``(emoji, E)`` by model.
        kind_labels: ``(kinds, E)`` by model.
        scales: by model.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    embeddings: Mapping[str, Rows]
    labels: Mapping[str, Rows]
    kind_labels: Mapping[str, Rows]
    scales: Mapping[str, float]


def drawings(style: str, models: Mapping[str, Subject]) -> Drawings:
    """Embed a style's pictures of things, one emoji a name."""
    packages = materials("pictograms")
    folder = (
        rendered_openmoji()[0]
        if style == "openmoji"
        else packages[f"emoji-datasource-{style}"] / "img" / style / "64"
    )
    table = materials("held-out-pictograms")["openmoji"] / "data" / "openmoji.csv"
    with table.open(encoding="utf-8", newline="") as stream:
        kind_of = {row["hexcode"].lower(): row["subgroups"] for row in csv.DictReader(stream)}
    by_name: dict[str, Pictogram] = {}
    for each in read_pictograms(packages["emojibase-data"], (folder,)):
        if each.is_thing:
            by_name.setdefault(each.english, each)
    names = tuple(sorted(by_name))
    emoji = [by_name[name] for name in names]
    found, labels, kinds = {}, {}, {}
    for model, subject in models.items():
        prepare = Preprocess(subject.preprocess)
        pixels = (prepare.resize(picture) for each in emoji for picture in _pictures(style, each))
        rows = embedded(subject, pixels).astype(np.float32)
        found[model] = rows.reshape(len(emoji), 1 + PICTURES, -1)
        labels[model] = _labels(subject, names)
        kinds[model] = _labels(subject, tuple(KINDS.values()))
    of_emoji = tuple(
        kind_of.get(each.code, kind_of.get(each.code.replace("-fe0f", ""), "")) for each in emoji
    )
    scales = {model: subject.scale for model, subject in models.items()}
    return Drawings(names, of_emoji, found, labels, kinds, scales)


def _pictures(style: str, emoji: Pictogram) -> Iterator[Image.Image]:
    yield on_white(emoji.files[0])
    draw = random.Random(f"{style} {emoji.code}")
    with Image.open(emoji.files[0]) as drawing:
        for _ in range(PICTURES):
            yield drawn(drawing, draw)


def _labels(subject: Subject, names: Sequence[str], templates: str = "one") -> Rows:
    return np.asarray(subject.bank(LabelSet.of(list(names)), Templates.of(templates)).embeddings, np.float32)


def of_drawings(found: Drawings, seed: int) -> Iterator[Case]:
    """Yield the tasks over names."""
    draw = np.random.default_rng(seed)
    every = np.arange(len(found.names))

    def case(task: str, rows: NDArray[np.intp], checkpoint: Path | None) -> Case:
        order = 1 + draw.permutation(PICTURES)
        parts = (order[:ADAPTED], order[ADAPTED:])
        names = tuple(found.names[row] for row in rows)
        own = np.repeat(np.arange(len(rows)), ADAPTED)
        seen = {
            model: Seen(
                *(all_of[rows][:, part].reshape(-1, all_of.shape[2]) for part in parts),
                found.labels[model][rows],
                found.scales[model],
            )
            for model, all_of in found.embeddings.items()
        }
        clusters = tuple(names[column] for column in own)
        return Case(task, seed, names, own, own, clusters, clusters, seen, checkpoint=checkpoint)

    for _ in range(DRAWS):
        yield case("ten names", draw.choice(every, OFFERED, replace=False), CHECKPOINT)
    for kind in sorted(set(found.kinds)):
        rows = np.flatnonzero([each == kind for each in found.kinds])
        if kind and len(rows) >= _LEAST_NAMES:
            yield case("names of a kind", rows, CHECKPOINT)
    yield case("all names", every, None)


def of_kinds(found: Drawings, seed: int) -> Iterator[Case]:
    """Yield kinds: all of them, and draws of ten."""
    draw = np.random.default_rng([seed, 2])
    every = [key for key in KINDS if found.kinds.count(key) >= _LEAST_NAMES]

    def case(task: str, keys: Sequence[str], most: int, checkpoint: Path | None) -> Case:
        things = [
            draw.permutation([row for row, kind in enumerate(found.kinds) if kind == key]) for key in keys
        ]
        shown = draw.permutation(np.concatenate([rows[:most] for rows in things]))
        halves = np.split(shown, [len(shown) // 2])
        columns = [list(KINDS).index(key) for key in keys]
        seen = {
            model: Seen(
                *(all_of[half, 0] for half in halves), found.kind_labels[model][columns], found.scales[model]
            )
            for model, all_of in found.embeddings.items()
        }
        own = [np.array([keys.index(found.kinds[row]) for row in half], np.intp) for half in halves]
        clusters = [tuple(found.names[row] for row in half) for half in halves]
        return Case(
            task, seed, tuple(KINDS[key] for key in keys), *own, *clusters, seen, checkpoint=checkpoint
        )

    yield case("kinds", every, len(found.names), CHECKPOINT)
    for _ in range(DRAWS):
        keys = [every[row] for row in draw.choice(len(every), OFFERED, replace=False)]
        yield case("ten kinds", keys, _THINGS_OF_A_KIND, None)


def of_misfits(found: Drawings, seed: int) -> Iterator[Case]:
    """Yield draws of ten names whose pictures are not what was asked for."""
    draw = np.random.default_rng([seed, 1])
    for _ in range(DRAWS):
        rows = draw.choice(len(found.names), 2 * OFFERED, replace=False)
        order = 1 + draw.permutation(PICTURES)
        shown, others = rows[:OFFERED], rows[OFFERED:]
        every = [(row, column) for column, row in enumerate(shown)]
        full = [(row, column, place) for row, column in every for place in order[:ADAPTED]]
        uneven = [
            (row, column, place)
            for (row, column), count in zip(every, UNEVEN, strict=True)
            for place in order[:count]
        ]
        strangers = [(row, -1, place) for row in others[:_OTHERS] for place in order[:ADAPTED]]
        judged = [(row, column, place) for row, column in every for place in order[ADAPTED:]]
        for task, adapted, offered in (
            ("uneven", uneven, shown),
            ("ten shown of twenty", full, rows),
            ("among others", full + strangers, shown),
        ):
            seen = {
                model: Seen(
                    *(np.stack([of[row, place] for row, _, place in part]) for part in (adapted, judged)),
                    found.labels[model][offered],
                    found.scales[model],
                )
                for model, of in found.embeddings.items()
            }
            names = [tuple(found.names[row] for row, _, _ in part) for part in (adapted, judged)]
            own = [np.array([column for _, column, _ in part], np.intp) for part in (adapted, judged)]
            yield Case(task, seed, tuple(found.names[row] for row in offered), *own, *names, seen)


# --- stamps ------------------------------------------------------------------------------------------------


def of_stamps(models: Mapping[str, Subject], half: str) -> Iterator[Case]:
    """Yield superclasses of stamps: adapted and judged on a half, then adapted on the other half."""
    package = materials("stamps")["tuxpaint-stamps-default"]
    stamps = [each for each in read_stamps(ROOT / "benchmarks/data/stamps.jsonl") if each.coarse is not None]
    names = tuple(sorted({str(each.coarse) for each in stamps}))
    halves = {part: [each for each in stamps if each.split == part] for part in dict.fromkeys(("tune", half))}
    rows = {
        (part, model): embedded(
            subject, (Preprocess(subject.preprocess)(each.path(package)) for each in shown)
        )
        for part, shown in halves.items()
        for model, subject in models.items()
    }
    labels = {model: _labels(subject, names) for model, subject in models.items()}
    own = {
        part: np.array([names.index(str(each.coarse)) for each in shown]) for part, shown in halves.items()
    }
    clusters = {part: tuple(each.en for each in shown) for part, shown in halves.items()}
    for task, on in (
        ("superclasses, adapted on the same half", half),
        ("superclasses, on the other", "tune"),
    ):
        if task.endswith("other") and half == "tune":
            continue
        seen = {
            model: Seen(
                rows[on, model].astype(np.float32),
                rows[half, model].astype(np.float32),
                labels[model],
                subject.scale,
            )
            for model, subject in models.items()
        }
        yield Case(
            task, 0, names, own[on], own[half], clusters[on], clusters[half], seen, checkpoint=CHECKPOINT
        )


# --- shapes ------------------------------------------------------------------------------------------------


def of_shapes(probe: str, seed: int) -> Iterator[Case]:
    """Yield captions of held-out combinations, and attributes, as a probe sees them."""
    directory = ROOT / "tests/data/probes" / probe
    subject = open_eager(str(directory), threads=1)
    size = subject.preprocess.image_size_px[0]

    def seen(pixels: Sequence[NDArray[np.uint8]]) -> Rows:
        return embedded(subject, pixels).astype(np.float32)

    def case(task: str, names: tuple[str, ...], rows: Rows, own: NDArray[np.intp], half: int) -> Case:
        clusters = tuple(f"{names[column]} {seed}" for column in own)
        of_probe = Seen(rows[:half], rows[half:], _labels(subject, names, "bare"), subject.scale)
        return Case(
            task,
            seed,
            names,
            own[:half],
            own[half:],
            clusters[:half],
            clusters[half:],
            {probe: of_probe},
            templates="bare",
        )

    chosen = random.Random(seed).sample(held_out_combinations(), _CAPTIONS)
    draws = [
        (column, render(each, seed=1_000_000 * (seed + 1) + 100 * column + number, size_px=size))
        for number in range(PICTURES)
        for column, each in enumerate(chosen)
    ]
    own = np.array([column for column, _ in draws])
    names = tuple(label(each, "en") for each in chosen)
    yield case("captions of shapes", names, seen([pixels for _, pixels in draws]), own, ADAPTED * _CAPTIONS)
    mixed = list(itertools.islice(ordered_combinations(True, 100 + seed), 2 * _ATTRIBUTE_PICTURES))
    rows = seen([render(each, seed=5_000_000 + i, size_px=size) for i, each in enumerate(mixed)])
    for attribute in ATTRIBUTES:
        values = [str(getattr(each, attribute)) for each in mixed]
        offered = tuple(sorted(set(values)))
        columns = np.array([offered.index(value) for value in values])
        yield case("one attribute of five", offered, rows, columns, _ATTRIBUTE_PICTURES)


# --- methods -----------------------------------------------------------------------------------------------


def upl(seen: Seen) -> Rows:
    """Return rows from the surest pictures among those that a label comes first for; its text without any."""
    said = posterior(seen.adapted, seen.rows, seen.scale)
    first, sure = said.argmax(axis=1), said.max(axis=1)
    rows = seen.rows.copy()
    for column in np.unique(first):
        own = np.flatnonzero(first == column)
        mean = seen.adapted[own[np.argsort(-sure[own], kind="stable")[:_UPL_TOP]]].mean(axis=0)
        row = rows[column] + mean / np.linalg.norm(mean)
        rows[column] = row / np.linalg.norm(row)
    return rows


def outcomes(case: Case, model: str) -> Iterator[tuple[str, Rows, Judgement | None]]:
    """Yield the methods with the rows they make, and how they are judged."""
    seen = case.seen[model]
    yield "zero-shot", seen.rows, None
    yield "upl", upl(seen), None

    def judged(fit: Fit, taught: Taught | None = None, witness: Rows | None = None) -> tuple[Rows, Judgement]:
        found = adapt(
            seen.adapted, seen.rows, fit, scale=seen.scale, taught=taught, witness=witness, seed=case.seed
        )
        return found.rows, found.judgement

    own = Self(seen.scale)
    if model == "nano":
        teacher = case.seen["default"]
        yield "vectors", *judged(own, witness=posterior(teacher.adapted, teacher.rows, teacher.scale))
        taught, _ = ask_teacher(teacher.adapted, teacher.rows, teacher.scale, seed=case.seed)
        yield "taught", *judged(taught, taught)
        return
    yield "vectors", *judged(own)
    if case.checkpoint is not None:
        tower = _tower(case)
        tower.check(seen.rows, where=case.checkpoint.name)
        yield "prompts", *judged(LearnedPrompts(tower, own, seen.scale, seed=case.seed))


def _tower(case: Case) -> PromptTower:
    return open_prompt_tower(
        str(case.checkpoint), LabelSet.of(list(case.names)), Templates.of(case.templates)
    )


def measured(case: Case) -> list[dict[str, Any]]:
    """Return a row a model for the file: what was right by each method, and how it was judged."""
    torch.set_num_threads(1)
    rows = []
    known = case.own >= 0  # the others show nothing that is offered
    for model, seen in case.seen.items():
        said: dict[str, Any] = {}
        for method, made, judgement in outcomes(case, model):
            said[method] = {
                "transductive": _digits((first_labels(seen.adapted, made) == case.own)[known]),
                "inductive": _digits(first_labels(seen.others, made) == case.own_others),
            }
            if judgement is not None:
                said[method]["judgement"] = judgement.to_dict()
                said[method]["alone"] = replace(judgement, witness=None).reliable
        rows.append(
            {
                "task": case.task,
                "model": model,
                "seed": case.seed,
                "names": list(case.names),
                "clusters": {
                    "transductive": tuple(itertools.compress(case.clusters, known)),
                    "inductive": case.clusters_others,
                },
                "methods": said,
            }
        )
    return rows


def compact(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for the file: how many pictures of each name (or other cluster) are right."""
    kept = {key: row[key] for key in ("task", "model", "seed")} | {"names": "; ".join(row["names"])}
    for how, clusters in row["clusters"].items():
        places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
        place = np.array([places[cluster] for cluster in clusters])
        # Where every name offered has its pictures, they are the clusters.
        shown = "names" if list(places) == list(row["names"]) else "; ".join(places)
        kept[how] = {"clusters": shown, "pictures": " ".join(map(str, np.bincount(place)))}
        for method, said in row["methods"].items():
            right = np.bincount(place, weights=np.array([*said[how]]) == "1")
            kept[how][method] = " ".join(str(int(each)) for each in right)
    kept["judgements"] = {
        method: _short(said["judgement"]) for method, said in row["methods"].items() if "judgement" in said
    }
    return kept


def _short(judgement: Mapping[str, Any]) -> str:
    """Return a judgement in a line."""
    before, after = judgement["before"], judgement["after"]
    said = (
        f"{'reliable' if judgement['reliable'] else 'not reliable'}; changed {judgement['changed']:.3f}, "
        f"agreement {judgement['agreement']:.3f}, explained {judgement['explained']:.3f}, neighbours "
        f"{before['neighbours']:.3f} to {after['neighbours']:.3f}, in use {before['in_use']} to "
        f"{after['in_use']}"
    )
    if judgement["follows"] is not None:
        said += f", follows {judgement['follows_before']:.3f} to {judgement['follows']:.3f}"
    if judgement["witness"] is not None:
        said += f", witness {judgement['witness']:+.3f}"
    return said


def _digits(right: NDArray[np.bool_]) -> str:
    return "".join("01"[int(each)] for each in right)


# --- figures -----------------------------------------------------------------------------------------------


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return accuracy, difference to zero-shot with its interval, and gates, by task, model and method."""
    found: dict[str, Any] = {}
    for task, model in dict.fromkeys((row["task"], row["model"]) for row in rows):
        of_task = [row for row in rows if (row["task"], row["model"]) == (task, model)]
        methods = dict.fromkeys(method for row in of_task for method in row["methods"])
        found[f"{task}: {model}"] = {method: _of_method(of_task, method) for method in methods}
    return found


def _of_method(rows: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    having = [row for row in rows if method in row["methods"]]
    said: dict[str, Any] = {"cases": len(having)}
    judged = [row["methods"][method].get("judgement") for row in having]
    accepted = [each is None or each["reliable"] for each in judged]
    if method not in ("zero-shot", "upl"):
        said["accepted"] = sum(accepted)
    for how in ("transductive", "inductive"):
        parts = [
            (row, *(np.array([*row["methods"][each][how]]) == "1" for each in ("zero-shot", method)))
            for row in having
        ]
        clusters = [cluster for row, _, _ in parts for cluster in row["clusters"][how]]
        before = np.concatenate([before for _, before, _ in parts])
        after = np.concatenate([after for _, _, after in parts])
        figure: dict[str, Any] = {"accuracy": _percent(after.mean()), "n": len(after)}
        if method != "zero-shot":
            figure["difference"] = _difference(after * 1.0 - before, clusters)
            figure["difference_by_seed"] = [
                _percent(np.mean(np.concatenate([a * 1.0 - b for row, b, a in parts if row["seed"] == seed])))
                for seed in sorted({row["seed"] for row in having})
            ]
        if "accepted" in said:
            kept = [(a if ok else b) * 1.0 - b for (_, b, a), ok in zip(parts, accepted, strict=True)]
            figure["gated_difference"] = _difference(np.concatenate(kept), clusters)
            gains = [100 * float(np.mean(a * 1.0 - b)) for _, b, a in parts]
            figure["gates"] = _gates(accepted, gains)
            alone = [row["methods"][method]["alone"] for row in having]
            if any(each is not None and each["witness"] is not None for each in judged):
                figure["gates_without_a_witness"] = _gates(alone, gains)
        said[how] = figure
    return said


def _gates(accepted: Sequence[bool], gains: Sequence[float]) -> dict[str, int]:
    """Return how many banks are written and refused, by whether they gain or lose more than a point."""
    found = {}
    for what, wanted in (("written", True), ("refused", False)):
        of_them = [gain for gain, ok in zip(gains, accepted, strict=True) if ok is wanted]
        found[f"{what}_better"] = sum(gain > _POINT for gain in of_them)
        found[f"{what}_worse"] = sum(gain < -_POINT for gain in of_them)
        found[f"{what}_same"] = len(of_them) - found[f"{what}_better"] - found[f"{what}_worse"]
    return found


def witnessed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what gates write and refuse of all drawings with a witness and without."""
    total: dict[str, Any] = {}
    for how, key in itertools.product(("transductive", "inductive"), ("gates", "gates_without_a_witness")):
        of_them = Counter[str]()
        for task, methods in found.items():
            figure = methods["vectors"][how]
            if "gates_without_a_witness" in figure and not task.startswith("superclasses"):
                of_them.update(figure[key])
        total.setdefault(how, {})[key] = dict(of_them)
    return total


def _difference(values: NDArray[np.float64], clusters: Sequence[str]) -> dict[str, float]:
    mean = clustered_mean(values, clusters, seed=0)
    return {"value": _percent(mean.value), "low": _percent(mean.low), "high": _percent(mean.high)}


def _percent(value: float | np.floating[Any]) -> float:
    return round(100 * float(value), 2)


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as lines."""
    heads = "".join(f"{each:>24}" for each in ("transductive", "inductive", "gated, inductive"))
    worse = "written worse"
    lines = [f"{'points over zero-shot, 95 % interval':52}{'accepted':>10}{heads}{worse:>15} (no witness)"]
    for task, methods in found.items():
        for method, said in methods.items():
            cells = []
            for how in ("transductive", "inductive"):
                figure = said[how]
                cells.append(
                    _cell(figure["difference"]) if "difference" in figure else f"{figure['accuracy']:.1f} %"
                )
            gated = said["inductive"].get("gated_difference")
            cells.append("" if gated is None else _cell(gated))
            ok = f"{said['accepted']}/{said['cases']}" if "accepted" in said else ""
            gates = [said["inductive"].get(key) for key in ("gates", "gates_without_a_witness")]
            end = "" if gates[0] is None else f"{gates[0]['written_worse']:>15}"
            end += "" if gates[1] is None else f" ({gates[1]['written_worse']})"
            lines.append(f"{f'{task}: {method}':52}{ok:>10}" + "".join(f"{cell:>24}" for cell in cells) + end)
    return "\n".join(lines)


def _cell(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:+.1f} [{figure['low']:+.1f}, {figure['high']:+.1f}]"


def main() -> None:
    """Measure, print the table, and write it with every answer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--style", default="twitter", choices=["twitter", "google", "openmoji"])
    parser.add_argument("--half", default="report", choices=["report", "tune"], help="of the stamps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/adapt.json")
    asked = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    models: dict[str, Subject] = {}
    for name in ("default", "nano"):
        (models[name],), _ = open_bundle(name)
    say(f"embedding {asked.style}")
    found = drawings(asked.style, models)
    cases = itertools.chain(
        *(of_drawings(found, seed) for seed in SEEDS),
        *(of_kinds(found, seed) for seed in SEEDS),
        *(of_misfits(found, seed) for seed in SEEDS),
        of_stamps(models, asked.half),
        *(of_shapes(probe, seed) for probe in PROBES for seed in SEEDS),
    )
    rows = []
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        for number, of_case in enumerate(pool.map(measured, cases)):
            say(f"{of_case[0]['task']} {number}")
            rows += of_case
    for subject in models.values():
        subject.close()
    said = figures(rows)
    document = {
        "what": "points of accuracy that adaptation to unlabelled pictures adds, 95 % intervals over names",
        "style": asked.style,
        "half": asked.half,
        "seeds": list(SEEDS),
        "emoji": len(found.names),
        "pictures": {"each": PICTURES, "adapted_on": ADAPTED},
        "draws_of_ten": DRAWS,
        "kinds": KINDS,
        "witnessed": witnessed(said),
        "figures": said,
        "cases": [compact(row) for row in rows],
    }
    write(asked.output, document, show=False)
    print(table(said))


if __name__ == "__main__":
    main()
