"""Ways to tell that no offered label fits, side by side: areas under the ROC curve, rates, demo photographs.

A picture is offered N names with its own among them, and the same but for its own; a hundred draws of the
others, the same for every way. *Areas*: a picture of the first kind should score above any of the second.
*Rates* are at the threshold that ships. Intervals of 95 % resample names; ``gain`` is over the greatest
softmax, resampled in pairs.

=================  =========================================================================================
``softmax``        greatest softmax over the offered names: the plain maximum score
``cosine``         greatest cosine
``mcm``            greatest softmax of the cosines as they are (Ming et al. 2022, temperature 1)
``energy``         log Σ exp(s · c) over the offered names (Liu et al. 2020)
``neglabel``       offered over all, both summed (Jiang et al. 2024, eq. 4), with the background that ships
``rank``           background rows above the best offered name, fewer being better
``standardised``   greatest cosine less its mean over background rows, over their deviation
``best``           the best name alone against the background: ``s · max c − w · log Σ exp(s · d)``
``summed``         the gate that ships, without regard to which rows are near to the first name
``imagenet``       the gate that ships, with the 998 ImageNet names for background
``gate``           the gate that ships
``gate, unnamed``  the same without background rows that mean what the picture shows: it is of nothing known
``no``             the first name against "a photo without a …" (method ``no``)
=================  =========================================================================================

Stamps are cut-out photographs; Twemoji and OpenMoji are styles that nothing was trained on. Everything was
chosen on the half ``tune`` of the stamps.

    edgeclip data fetch stamps pictograms held-out-pictograms photos default-model
    python benchmarks/rejection.py                   # tune half
    python benchmarks/rejection.py --half tune --half report     # once, for what is quoted
    python benchmarks/rejection.py --probes          # denials on models that were trained here, on shapes
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from agreement_pictures import on_white
from default_model import Figure, asked_for, embedded, mean_figure
from written import ROOT, write

from edgeclip.answers import Answers
from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.classify import ZeroShotClassifier
from edgeclip.evaluate.metrics import bootstrap_interval
from edgeclip.evaluate.rejection import Shown, draw_sets, fit_no, fit_reject
from edgeclip.evaluate.subjects import Subject, open_bundle
from edgeclip.export.recipes.rejection import add_rejection
from edgeclip.export.recipes.stamps import candidates, of_half
from edgeclip.fetch import data_directory, photos
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank
from edgeclip.preprocess import Preprocess
from edgeclip.reject import RejectHead, kinds_of, meaning, read_background, read_reject_head
from edgeclip.runtime.session import RuntimeOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEMPLATES = {"en": "one", "zh": "zh"}
DENIALS = {
    "en": ("a photo without a {}.", "a photo of something that is no {}.", "there is no {} in the picture."),
    "zh": ("没有{}的图片。", "图中没有{}。", "这不是{}。"),
}
JUDGED, RATED = (5, 20), (1, 5, 20)
GOALS = {"gate of 5": 85, "gate of 20": 78, "gain of 5": 3, "gain of 20": 3}
_DRAWS, _RESAMPLES, _SEED = 100, 1000, 0
_MANY, _FEWER = 500, 200
"""Of so many names each draw says more, and costs more: fewer draws, fewer resamples."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A set of pictures with names in one language, and everything that is multiplied with them.

    Attributes:
        title: of the set.
        language: of the names.
        bank: the names.
        images: ``(P, E)``.
        own: ``(P,)`` column of each picture's name.
        shown: with the background that ships.
        bare: the same without kinds of names.
        imagenet: with the bundle's own names as background.
        denials: ``(P, N)`` cosines with the denied names.
        texts: mean and deviation ``(N,)`` of each name's cosines with background rows.
    """

    title: str
    language: str
    bank: LabelBank
    images: NDArray[np.float32]
    own: NDArray[np.intp]
    shown: Shown
    bare: Shown
    imagenet: Shown
    denials: NDArray[np.float32]
    texts: tuple[NDArray[np.float32], NDArray[np.float32]]
    names: list[str] = field(default_factory=list)


def draws_of(asked: Asked) -> int:
    """Return how many sets of names a picture is offered."""
    return _DRAWS if len(asked.bank) < _MANY else _DRAWS // 10


def scores_of(asked: Asked, head: RejectHead, sets: NDArray[np.intp]) -> dict[str, NDArray[np.float64]]:
    """Return the scores ``(P,)`` of every way, for the names offered ``(P, N)``."""
    shown, scale = asked.shown, asked.shown.scale
    own = np.take_along_axis(shown.cosines, sets, axis=1).astype(np.float64)
    best, first = own.max(axis=1), own.argmax(axis=1)
    sums = np.exp(scale * own).sum(axis=1)
    kept = ~shown.same[sets].any(axis=1)
    background = np.exp(asked.bare.background(sets))
    named = sets[np.arange(len(sets)), first]
    mean, deviation = asked.texts
    weight, near, most = head.weight, head.nearness, head.offered[-1]
    return {
        "softmax": shown.softmax(sets),
        "cosine": best,
        "mcm": 1 / np.exp(own - best[:, None]).sum(axis=1),
        "energy": np.log(sums),
        "neglabel": np.log(sums) - np.log(background),
        "rank": -((shown.others > best[:, None]) & kept).sum(axis=1).astype(np.float64),
        "standardised": ((own - mean[sets]) / deviation[sets]).max(axis=1),
        "best": shown.negatives(weight)(sets),
        "summed": shown.together(weight, 0.0)(sets),
        "imagenet": asked.imagenet.together(weight, near, most=most)(sets),
        "gate": shown.together(weight, near, most=most)(sets),
        "gate, unnamed": shown.together(weight, near, most=most, unnamed=True)(sets),
        "gate without kinds": asked.bare.together(weight, near, most=most)(sets),
        "no": scale * (best - asked.denials[np.arange(len(sets)), named]),
    }


def areas(asked: Asked, head: RejectHead, offered: int) -> dict[str, dict[str, Figure]]:
    """Return the area of every way in %, with intervals, and its gain over the greatest softmax."""
    inside: dict[str, list[NDArray[np.float64]]] = {}
    outside: dict[str, list[NDArray[np.float64]]] = {}
    for having, without in draw_sets(asked.own, len(asked.bank), offered, draws_of(asked), _SEED):
        for kept, sets in ((inside, having), (outside, without)):
            for way, scores in scores_of(asked, head, sets).items():
                kept.setdefault(way, []).append(scores)
    found: dict[str, dict[str, Figure]] = {}
    plain = won_by_name(inside["softmax"], outside["softmax"], asked.names)
    for way in inside:
        won = won_by_name(inside[way], outside[way], asked.names)
        found[way] = {"auroc": _figure(won), "gain": _figure((won[0] - plain[0], won[1]))}
    return found


def won_by_name(
    inside: Sequence[NDArray[np.float64]], outside: Sequence[NDArray[np.float64]], names: Sequence[str]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the share of draws in which pairs of pictures are won, summed by the names of both ``(K, K)``.

    Beside it is how many pictures each name has ``(K,)``. The area is the share of pairs won, ties counting
    half; so resampled names need no more than these.
    """
    won = np.zeros((len(names), len(names)), np.int32)
    for first, second in zip(inside, outside, strict=True):
        won += first[:, None] > second
        won += first[:, None] >= second
    order = np.argsort(np.array(names), kind="stable")
    ordered = np.array(names)[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sums = np.add.reduceat(np.add.reduceat(won[order][:, order], starts, axis=0), starts, axis=1)
    sizes = np.diff(np.append(starts, len(names))).astype(np.float32)
    return (sums / np.float32(2 * len(inside))).astype(np.float32), sizes


def _figure(found: tuple[NDArray[np.float32], NDArray[np.float32]]) -> Figure:
    won, sizes = found

    def statistic(drawn: NDArray[np.float64]) -> float:
        counts = np.bincount(drawn.astype(np.intp), minlength=len(sizes)).astype(np.float32)
        return float(counts @ won @ counts / (counts @ sizes) ** 2)

    low, high = bootstrap_interval(
        np.arange(len(sizes)), statistic, draws=_RESAMPLES if len(sizes) < _MANY else _FEWER, seed=_SEED
    )
    value = float(won.sum() / sizes.sum() ** 2)
    return {
        "value": round(100 * value, 2), "low": round(100 * low, 2), "high": round(100 * high, 2),
        "n": int(sizes.sum()), "names": len(sizes),
    }  # fmt: skip


def accepts(shown: Shown, head: RejectHead, sets: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return which pictures ``(P,)`` the shipped gate accepts, for the names offered ``(P, n)``."""
    least = np.array([head.least(each) for each in shown.counted(sets)])
    score = shown.together(head.weight, head.nearness, most=head.offered[-1])
    return np.asarray(score(sets) >= least)


def rates(
    shown: Shown,
    head: RejectHead,
    pairs: Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]],
    offered: int,
    names: Sequence[str],
) -> dict[str, Any]:
    """Return the shares of pictures that are accepted with their name offered, and without it, in %."""
    accepted = [tuple(accepts(shown, head, sets) for sets in pair) for pair in pairs]
    right, wrong = (np.mean([pair[side] for pair in accepted], axis=0) for side in (0, 1))
    return {
        "threshold": round(head.least(offered), 4),
        "true accepts": mean_figure(right, names),
        "false accepts": mean_figure(wrong, names),
    }


def every_set(subject: Subject, bundle: Bundle, halves: Sequence[str]) -> Iterator[Asked]:
    """Yield all sets, English before Chinese."""
    found = asked_for(halves)
    prepare = Preprocess(subject.preprocess)
    stamps = embedded(subject, (prepare(stamp.path(found.package)) for stamp in found.stamps))
    row = {stamp: number for number, stamp in enumerate(found.stamps)}
    for half in halves:
        for language in TEMPLATES:
            judged = of_half(found.stamps, half, language)
            names = candidates(found.stamps, language)
            truth = [stamp.name(language) for stamp in judged]
            images = stamps[[row[stamp] for stamp in judged]]
            yield asked_of(f"stamps {half}", language, names, truth, images, subject, bundle)
    for style in found.styles:
        images = embedded(subject, (prepare.resize(on_white(each.files[0])) for each in style.emoji))
        for language in TEMPLATES if style.name == "twitter" else ("en",):
            truth = [each.english if language == "en" else each.chinese for each in style.emoji]
            yield asked_of(style.name, language, sorted(set(truth)), truth, images, subject, bundle)


def asked_of(
    title: str,
    language: str,
    names: Sequence[str],
    truth: list[str],
    images: NDArray[np.floating[Any]],
    subject: Subject,
    bundle: Bundle,
) -> Asked:
    """Encode the names of a set and multiply them with its pictures."""
    pictures = np.asarray(images, np.float32)
    head, background = read_reject_head(bundle), read_background(bundle)
    entry = bundle.manifest.label_banks[str(bundle.manifest.background_bank)]
    own_names = LabelBank.from_bytes(bundle.read(entry.file))
    bank = subject.bank(LabelSet.of(list(names)), Templates.of(TEMPLATES[language]))
    denied = [template.replace("{}", name) for name in names for template in DENIALS[language]]
    texts = np.concatenate([subject.texts(denied[at : at + 32]) for at in range(0, len(denied), 32)])
    means = texts.reshape(len(names), len(DENIALS[language]), -1).mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    columns = {name: column for column, name in enumerate(names)}
    own = np.array([columns[name] for name in truth], np.intp)
    cosines = pictures @ bank.embeddings.T
    scale = head.scale or subject.scale

    def shown(rows: LabelBank) -> Shown:
        same, of_texts = meaning(bank, rows, head.overlap), bank.embeddings @ rows.embeddings.T
        return Shown(cosines, own, pictures @ rows.embeddings.T, same, scale, of_texts)

    bare = shown(background)
    of_texts = bank.embeddings @ background.embeddings.T
    return Asked(
        title, language, bank, pictures, own,
        replace(bare, kinds=kinds_of(head, bank, background) & ~bare.same), bare, shown(own_names),
        np.asarray(pictures @ means.T, np.float32), (of_texts.mean(axis=1), of_texts.std(axis=1)), truth,
    )  # fmt: skip


def mixed(english: Asked, chinese: Asked, head: RejectHead) -> dict[str, Any]:
    """Return rates with the right name in Chinese among English ones, on pictures that both judge."""
    count = len(english.bank)
    rows = {image.tobytes(): row for row, image in enumerate(english.images)}
    pairs = [
        (rows[image.tobytes()], row) for row, image in enumerate(chinese.images) if image.tobytes() in rows
    ]
    first, second = (np.array(each, np.intp) for each in zip(*pairs, strict=True))
    shown = Shown(
        np.concatenate([english.shown.cosines[first], chinese.shown.cosines[second]], axis=1),
        count + chinese.own[second],
        english.shown.others[first],
        np.concatenate([english.shown.same, chinese.shown.same]),
        english.shown.scale,
        np.concatenate([_texts(english), _texts(chinese)]),
        kinds=np.concatenate([_kinds(english), _kinds(chinese)]),
    )

    def sets(offered: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        for having, without in draw_sets(english.own[first], count, offered, draws_of(english), _SEED):
            having[:, -1] = shown.own
            yield having, without

    names = [chinese.names[row] for row in second]
    return {f"of {offered}": rates(shown, head, sets(offered), offered, names) for offered in RATED}


def _kinds(asked: Asked) -> NDArray[np.bool_]:
    assert asked.shown.kinds is not None
    return asked.shown.kinds


def _texts(asked: Asked) -> NDArray[np.float32]:
    assert asked.shown.texts is not None
    return asked.shown.texts


def unrelated(
    asked: Asked, images: NDArray[np.float32], background: LabelBank, head: RejectHead
) -> dict[str, Any]:
    """Return the share of landscapes and other photographs of nothing offered that is accepted, in %."""
    shown = Shown(
        images @ asked.bank.embeddings.T, np.zeros(len(images), np.intp), images @ background.embeddings.T,
        asked.shown.same, asked.shown.scale, asked.shown.texts, kinds=asked.shown.kinds,
    )  # fmt: skip
    random = np.random.default_rng(_SEED)
    said: dict[str, Any] = {}
    for offered in RATED:
        accepted = [
            accepts(
                shown,
                head,
                np.argsort(random.random((len(images), len(asked.bank))), axis=1)[:, :offered],
            )
            for _ in range(draws_of(asked))
        ]
        pictures = [str(number) for number in range(len(images))]
        said[f"of {offered}"] = mean_figure(np.mean(accepted, axis=0), pictures)
    return said


def superclasses(bundle: str, halves: Sequence[str]) -> dict[str, Any]:
    """Return what is accepted where superclasses of what is shown are offered, with kinds and without, in %.

    *alone*: one of them, the right one or another. *all*: all of them, or all but the right one.
    """
    said: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(Bundle.open(bundle).path, Path(work) / "bare")
        with BundleWriter(Path(work) / "bare") as writer:
            opened = Bundle.open(bundle)
            entry = writer.manifest["heads"]["reject"]
            bare = replace(read_reject_head(opened), kinds={})
            entry["file"] = writer.add("heads/bare.safetensors", bare.to_bytes())
            writer.commit()
        for title, path in (("with kinds", bundle), ("without kinds", str(Path(work) / "bare"))):
            with ZeroShotClassifier.open(path, answers=Answers(reject=True)) as classifier:
                said[title] = {half: _of_superclasses(classifier, half) for half in halves}
    return said


def _of_superclasses(classifier: ZeroShotClassifier, half: str) -> dict[str, Figure]:
    found = asked_for([half])
    shown = [stamp for stamp in found.stamps if stamp.split == half and stamp.coarse is not None]
    images = classifier.embed_images([stamp.path(found.package) for stamp in shown])
    own = np.array([str(stamp.coarse) for stamp in shown])
    classes = sorted({str(stamp.coarse) for stamp in found.stamps if stamp.coarse is not None})

    def accepted(labels: Sequence[str]) -> NDArray[np.float64]:
        classifier.set_labels(labels)
        said = [answer.rejection for answer in classifier.answer(images)]
        return np.array([0.0 if each is None or each.rejected else 1.0 for each in said])

    alone = np.stack([accepted([each]) for each in classes])  # (N, P)
    right = np.array(classes)[:, None] == own
    every = accepted(classes)
    without = np.zeros(len(shown))
    for each in classes:
        of_class = own == each
        if of_class.any():
            without[of_class] = accepted([other for other in classes if other != each])[of_class]
    names = [stamp.en for stamp in shown]
    return {
        "alone, right": mean_figure((alone * right).sum(axis=0), names),
        "alone, wrong": mean_figure((alone * ~right).sum(axis=0) / (len(classes) - 1), names),
        "all, right": mean_figure(every, names),
        "all but the right one, wrong": mean_figure(without, names),
    }


def demo(bundle: str) -> dict[str, Any]:
    """Return what the classifier itself says of the demo photographs, each beside its score."""
    folder = ROOT / "edgeclip/assets/photos"
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        rows = [(row["image"], row["label"]) for row in csv.DictReader(file)]
    said: dict[str, Any] = {}
    with ZeroShotClassifier.open(bundle, answers=Answers(reject=True)) as classifier:
        images = {name: classifier.embed_images(folder / name) for name, _ in rows}
        for title, labels in (("teapot", "teapot"), ("茶壶", "茶壶"), ("right name", None)):
            scores = {}
            for name, label in rows:
                classifier.set_labels([labels or label])
                asked = classifier.answer(images[name][None])[0].rejection
                assert asked is not None
                scores[name] = {"score": round(asked.score, 3), "rejected": asked.rejected}
            rejected = sum(each["rejected"] for each in scores.values())
            said[title] = {
                "pictures": len(rows),
                "rejected": rejected,
                "threshold": asked.threshold,
                "of": scores,
            }
    return said


def of_nano() -> dict[str, Any]:
    """Return what the same recipe makes of the small bundle: why it has no such head."""
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(Bundle.open("nano").path, Path(work) / "nano")
        copy = Bundle.open(Path(work) / "nano")
        bank = copy.manifest.default_bank
        assert bank is not None
        _, fit = add_rejection(copy, bank, data=None, threads=1)
    return fit.to_dict()


def of_probes() -> dict[str, Any]:
    """Return what negatives and denials are worth for models trained here, on shapes they never saw.

    The names are the hundred of one colour and shape; general names are these and those of two and more
    objects. Denials are texts that no training caption resembles: "without" was never learnt.
    """
    from context_and_multi import Probe

    from edgeclip.shapes import COLOURS, COUNTS, SHAPES, held_out_combinations, render

    names = [f"{colour} {shape.replace('-', ' ')}" for colour in COLOURS for shape in SHAPES]
    general = [f"{count} {name}" for count in COUNTS for name in names]
    shown = held_out_combinations()
    own = np.array([names.index(f"{each.colour} {each.shape.replace('-', ' ')}") for each in shown], np.intp)
    said: dict[str, Any] = {}
    for name in ("mobileclip", "vit", "tinyclip"):
        probe = Probe(name)
        pictures = np.stack([render(each, row, size_px=probe.size_px) for row, each in enumerate(shown)])
        images = probe.images(pictures)

        def bank(texts: Sequence[str], probe: Probe = probe) -> LabelBank:
            return LabelBank(LabelSet.of(list(texts)), probe.texts(texts), Templates.of("bare"))

        forms = ("no {}", "a picture without a {}")
        denied = np.mean(
            [probe.texts([form.replace("{}", each) for each in names]) for form in forms], axis=0
        )
        denied /= np.linalg.norm(denied, axis=1, keepdims=True)
        labels = bank(names)
        said[name] = {
            "negatives": fit_reject(labels, bank(general), images, own, scale=probe.scale).to_dict(),
            "no": fit_no(labels, denied, images, own, scale=probe.scale).to_dict(),
        }
    return said


@contextmanager
def own_cache() -> Iterator[None]:
    """Keep label vectors of this run out of the user's cache."""
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "data").symlink_to(data_directory())
        os.environ["EDGECLIP_CACHE_DIR"] = work
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write everything, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--half", action="append", choices=("tune", "report"), help="[default: tune]")
    parser.add_argument("--probes", action="store_true", help="models trained on shapes instead")
    parser.add_argument("--output", type=Path, help="[default: benchmarks/results/rejection….json]")
    chosen = parser.parse_args(arguments)
    if chosen.probes:
        write(
            chosen.output or ROOT / "benchmarks/results/rejection_probes.json",
            {"what": "area under the ROC curve and rates, models trained on shapes", "probes": of_probes()},
        )
        return 0
    bundle = Bundle.open(chosen.bundle)
    head, background = read_reject_head(bundle), read_background(bundle)
    found: dict[str, Any] = {}
    with own_cache():
        (subject,), _ = open_bundle(chosen.bundle, variants=["onnx-int8"], options=RuntimeOptions(threads=1))
        with closing(subject):
            prepare = Preprocess(subject.preprocess)
            strange = np.asarray(embedded(subject, (prepare(each.path) for each in photos())), np.float32)
            english: Asked | None = None
            for asked in every_set(subject, bundle, chosen.half or ["tune"]):
                title = f"{asked.title} {asked.language}"
                sys.stderr.write(f"{title} …\n")
                said: dict[str, Any] = {f"of {offered}": areas(asked, head, offered) for offered in JUDGED}
                said["rates"] = {
                    f"of {offered}": rates(
                        asked.shown,
                        head,
                        draw_sets(asked.own, len(asked.bank), offered, draws_of(asked), _SEED),
                        offered,
                        asked.names,
                    )
                    for offered in RATED
                }
                if asked.language == "en":
                    english = asked
                    said["unrelated photographs"] = unrelated(asked, strange, background, head)
                elif english is not None:
                    said["right name in Chinese among English ones"] = mixed(english, asked, head)
                found[title] = said
        document = {
            "what": "telling that no offered name fits: areas and rates in %, 95 % intervals over names",
            "bundle": {"name": bundle.manifest.model.name, "digest": bundle.digest},
            "head": {
                "method": head.method, "scale": head.scale, "weight": head.weight, "overlap": head.overlap,
                "threshold": list(head.threshold), "together": list(head.together),
                "nearness": head.nearness, "offered": list(head.offered), "background": len(background),
            },
            "draws": {"names below 500": _DRAWS, "others": _DRAWS // 10},
            "seed": _SEED,
            "denials": DENIALS,
            "goals": {"half": "report, and Twemoji", "least": GOALS},
            "sets": found,
            "superclasses": superclasses(chosen.bundle, chosen.half or ["tune"]),
            "demo photographs": demo(chosen.bundle),
            "nano, tuning half": of_nano(),
        }  # fmt: skip
    write(chosen.output or ROOT / "benchmarks/results/rejection.json", document, show=False)
    sys.stdout.write(table(document) + "\n")
    return 0


def table(document: dict[str, Any]) -> str:
    """Return the areas, a line a way, a column a set and number of names; then rates and photographs."""
    sets = document["sets"]
    columns = [(title, f"of {offered}") for title in sets for offered in JUDGED]
    lines = [
        "| area under the ROC curve, % | " + " | ".join(f"{title}, {of}" for title, of in columns) + " |"
    ]
    lines.append("|---|" + "---|" * len(columns))
    for way in sets[columns[0][0]][columns[0][1]]:
        cells = []
        for title, of in columns:
            area = sets[title][of][way]["auroc"]
            cells.append(f"{area['value']:.1f} [{area['low']:.1f}, {area['high']:.1f}]")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    cells = []
    for title, of in columns:
        gain = sets[title][of]["gate"]["gain"]
        cells.append(f"+{gain['value']:.1f} [{gain['low']:.1f}, {gain['high']:.1f}]")
    lines.append("| gate over softmax | " + " | ".join(cells) + " |")
    lines += ["", "| accepted, % | names | right name offered | not offered |", "|---|---|---|---|"]
    for title, said in sets.items():
        for key, parts in ((title, said["rates"]), *(
            (f"{title}, {key}", said[key]) for key in said if key.startswith("right name")
        )):  # fmt: skip
            for of, each in parts.items():
                cell = [_cell(each[kind]) for kind in ("true accepts", "false accepts")]
                lines.append(f"| {key} | {of[3:]} | {cell[0]} | {cell[1]} |")
        for of, each in said.get("unrelated photographs", {}).items():
            lines.append(f"| photographs of other things, names of {title} | {of[3:]} | | {_cell(each)} |")
    for label, said in document["demo photographs"].items():
        lines.append(f"{label}: {said['rejected']} of {said['pictures']} demo photographs rejected")
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    return f"{figure['value']:.0f} [{figure['low']:.0f}, {figure['high']:.0f}]"


if __name__ == "__main__":
    sys.exit(main())
