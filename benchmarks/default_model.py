"""How well the default model does: every figure of its goal, with 95 % intervals and the rows behind them.

*Stamps* (cut-out photographs): candidates are always all 200 names of a language. ``5-way`` and ``10-way``:
the right name against others drawn from these, 100 draws, seed 0. Superclasses: 14 English names.
*Samples*: the ImageNet, CIFAR-10 and CIFAR-100 pictures of foolbox, among all names of their sets.
*Pictograms* of two styles that nothing trains on, on white, among the names of all emoji that the style
draws; ``things`` and ``others`` are parts of the pictures, ``no flags`` leaves flags and components out
of the names as well, as the recipe does.
*Rejection*: the area under the ROC curve of the best score, pictures whose name is offered against the same
pictures without it; the mean over 100 draws of the names.
*Calibration*: error over 15 bins at the scale that labels of one's own are scored with.

Intervals resample names (stamps, pictograms) or classes (samples), whole, so that pictures of one name stay
together. Ties count against the model. The report half is looked at only if it is asked for.

    edgeclip data fetch stamps samples pictograms held-out-pictograms default-model photos
    python benchmarks/default_model.py                                      # the int8 form that ships
    python benchmarks/default_model.py --checkpoint tests/data/default-checkpoint    # and its other forms
    python benchmarks/default_model.py --half report                        # once, for what is quoted

``--checkpoint`` makes the other forms of those very weights: eager float32, ONNX float32, OpenVINO int8.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import openmoji
from agreement_pictures import on_white, samples
from written import ROOT, write

from edgeclip.bundle import Bundle
from edgeclip.errors import InputError
from edgeclip.evaluate.metrics import (
    auroc,
    bootstrap_interval,
    expected_calibration_error,
    share,
    top_k,
    unit_rows,
)
from edgeclip.evaluate.paired import clustered_mean
from edgeclip.evaluate.subjects import Subject, open_bundle
from edgeclip.evaluate.zero_shot import rank_pictures
from edgeclip.export.recipes.emoji import Pictogram, read_pictograms
from edgeclip.export.recipes.nano_eval import n_way
from edgeclip.export.recipes.stamps import Stamp, candidates, of_half, ranks, read_stamps
from edgeclip.fetch import data_directory, materials, photos
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.latency import LatencySamples, measure
from edgeclip.runtime.session import RuntimeOptions, open_session

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALVES = ("tune", "report")
KINDS = ("all", "exact", "ancestor", "outside")
TEMPLATES = {"en": "one", "zh": "zh"}
GOALS = {
    "stamps en all top-1": 60,
    "stamps en all top-5": 80,
    "stamps en outside top-1": 30,
    "stamps zh all top-1": 54,
    "stamps en all 5-way": 92,
    "superclass top-1": 88,
    "twitter en no flags top-1": 45,
    "openmoji en no flags top-1": 45,
}
"""Least value of the shipped form on the report half, in %."""
_DRAWS, _SEED, _BINS = 100, 0, 15
_OFFERED = (5, 20)
_BATCH, _CALLS, _PROCESSES = 16, 50, 5
_EMOJI_PX = 64
_MEGAPIXELS = (1632, 1224)  # two millions
_PROGRAM = """
import sys
from edgeclip.classify import ZeroShotClassifier
from edgeclip.runtime.host import peak_rss_bytes
from edgeclip.runtime.session import RuntimeOptions
options = RuntimeOptions(threads=1)
with ZeroShotClassifier.open(sys.argv[1], variant=sys.argv[2], options=options) as classifier:
    classifier.classify(sys.argv[3])
    assert classifier.text_tower_runs == 0
print(peak_rss_bytes())
"""

Figure = dict[str, Any]


# --- arithmetic --------------------------------------------------------------------------------------------


def mean_figure(values: NDArray[Any], names: Sequence[str]) -> Figure:
    """Return the mean of a value a picture in %, with its interval over names.

    Args:
        values: ``(n,)`` hits or shares of draws.
        names: ``(n,)`` what each picture shows.
    """
    if not names:
        return {"n": 0, "names": 0}
    if len(set(names)) < 2:
        return {"value": _percent(float(np.mean(values))), "n": len(names), "names": 1}
    found = clustered_mean(values, names, seed=_SEED)
    return {
        "value": _percent(found.value),
        "low": _percent(found.low),
        "high": _percent(found.high),
        "n": found.n,
        "names": found.clusters,
    }


def calibration_figure(
    scores: NDArray[np.float64], correct: NDArray[np.bool_], names: Sequence[str]
) -> Figure:
    """Return the expected calibration error in %, with its interval over names.

    Args:
        scores: ``(n,)`` of the first labels.
        correct: ``(n,)`` whether these are right.
        names: ``(n,)`` what each picture shows.
    """
    of_name = list(_rows_of(names).values())

    def statistic(drawn: NDArray[np.float64]) -> float:
        rows = np.concatenate([of_name[int(each)] for each in drawn])
        return expected_calibration_error(scores[rows], correct[rows], bins=_BINS)

    low, high = bootstrap_interval(np.arange(len(of_name)), statistic, seed=_SEED)
    return {
        "value": _percent(expected_calibration_error(scores, correct, bins=_BINS)),
        "low": _percent(low),
        "high": _percent(high),
        "n": len(names),
        "names": len(of_name),
        "bins": _BINS,
        "mean_score": _percent(float(scores.mean())),
        "accuracy": _percent(share(correct).value),
    }


def rejection_scores(
    cosines: NDArray[np.floating[Any]],
    own: NDArray[np.intp],
    offered: int,
    scale: float,
    *,
    draws: int = _DRAWS,
    seed: int = _SEED,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the best score of each picture with its name offered, and with another in its place.

    Args:
        cosines: ``(n, N)`` of pictures and names.
        own: ``(n,)`` columns of the right names.
        offered: names offered, fewer than N.
        scale: multiplier of the cosines.
        draws: sets of names a picture.
        seed: of these.

    Returns:
        Two ``(draws, n)``; one draw shares all names but one.

    Raises:
        InputError: there are not enough names.
    """
    pictures, names = cosines.shape
    if not 2 <= offered < names:
        raise InputError(f"rejection: got {offered} of {names} names, expected 2 to {names - 1}.")
    random = np.random.default_rng(seed)
    rows = np.arange(pictures)
    inside, outside = np.empty((draws, pictures)), np.empty((draws, pictures))
    for draw in range(draws):
        keys = random.random((pictures, names))
        keys[rows, own] = 2.0  # never among the others
        others = np.argsort(keys, axis=1)[:, :offered]
        outside[draw] = _best_score(cosines[rows[:, None], others], scale)
        others[:, -1] = own
        inside[draw] = _best_score(cosines[rows[:, None], others], scale)
    return inside, outside


def _best_score(cosines: NDArray[np.floating[Any]], scale: float) -> NDArray[np.float64]:
    logits = scale * cosines.astype(np.float64)
    score: NDArray[np.float64] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return score


def rejection_figure(
    inside: NDArray[np.float64], outside: NDArray[np.float64], names: Sequence[str]
) -> Figure:
    """Return the mean over draws of the area under the ROC curve in %, with its interval over names.

    Args:
        inside: ``(draws, n)`` best scores with the right name offered.
        outside: ``(draws, n)`` without.
        names: ``(n,)`` what each picture shows.
    """
    draws, pictures = inside.shape
    positive = np.arange(2 * pictures) < pictures
    value = float(
        np.mean([auroc(np.concatenate(pair), positive) for pair in zip(inside, outside, strict=True)])
    )
    # The area is the share of pairs won, so that resampled names need no more than the pairs of names.
    won = np.zeros((pictures, pictures))
    for first, second in zip(inside, outside, strict=True):
        won += (first[:, None] > second) + 0.5 * (first[:, None] == second)
    of_name = _rows_of(names)
    belongs = np.array([np.isin(np.arange(pictures), rows) for rows in of_name.values()], np.float64)
    of_names, sizes = belongs @ (won / draws) @ belongs.T, belongs.sum(axis=1)

    def statistic(drawn: NDArray[np.float64]) -> float:
        counts = np.bincount(drawn.astype(np.intp), minlength=len(sizes))
        return float(counts @ of_names @ counts / (counts @ sizes) ** 2)

    low, high = bootstrap_interval(np.arange(len(sizes)), statistic, seed=_SEED)
    return {
        "value": _percent(value),
        "low": _percent(low),
        "high": _percent(high),
        "n": pictures,
        "names": len(of_name),
        "draws": draws,
    }


def _rows_of(names: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return rows


def _percent(value: float) -> float:
    return round(100 * value, 2)


# --- pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """A style of pictograms.

    Attributes:
        name: of the style.
        emoji: what it draws.
        about: where its pictures are from.
    """

    name: str
    emoji: tuple[Pictogram, ...]
    about: str


@dataclass(frozen=True)
class Asked:
    """Everything a form is asked.

    Attributes:
        stamps: all of them.
        halves: those to look at.
        package: the stamps' pictures.
        has_samples: whether foolbox was fetched.
        styles: of pictograms.
        left_out: what is not measured, and why.
    """

    stamps: tuple[Stamp, ...]
    halves: tuple[str, ...]
    package: Path
    has_samples: bool
    styles: tuple[Style, ...]
    left_out: list[str] = field(default_factory=list)


def asked_for(halves: Sequence[str]) -> Asked:
    """Find what was fetched."""
    left_out: list[str] = []
    has_samples = True
    try:
        materials("samples")
        materials("default-model")  # names of the classes
    except InputError as error:
        has_samples = False
        left_out.append(f"samples: {_portable(error)}")
    styles: list[Style] = []
    try:
        packages = materials("pictograms")
        emojibase = packages["emojibase-data"]
        twitter = packages["emoji-datasource-twitter"] / "img" / "twitter" / "64"
        styles.append(Style("twitter", read_pictograms(emojibase, (twitter,)), twitter.parents[2].name))
        try:
            folder, renderer = rendered_openmoji()
            styles.append(Style("openmoji", read_pictograms(emojibase, (folder,)), renderer))
        except InputError as error:
            left_out.append(f"openmoji: {_portable(error)}")
    except InputError as error:
        left_out.append(f"pictograms: {_portable(error)}")
    return Asked(
        read_stamps(ROOT / "benchmarks/data/stamps.jsonl"),
        tuple(dict.fromkeys(halves)),
        materials("stamps")["tuxpaint-stamps-default"],
        has_samples,
        tuple(styles),
        left_out,
    )


def _portable(error: InputError) -> str:
    """Return a message without this machine's home."""
    return str(error).replace(str(Path.home()), "~")


def rendered_openmoji() -> tuple[Path, str]:
    """Return the folder of OpenMoji's pictures, drawn once and kept, and what drew them.

    Raises:
        InputError: the set was not fetched, or nothing is there to draw it.
    """
    found, renderer = openmoji.drawings(), openmoji.renderer()
    folder = ROOT / "build" / f"openmoji-{_EMOJI_PX}-{renderer.split()[-1]}"
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        openmoji.render(found, folder, _EMOJI_PX)
        (folder / "done").touch()
    return folder, renderer


# --- one form ----------------------------------------------------------------------------------------------


def embedded(subject: Subject, pixels: Iterable[NDArray[np.uint8]]) -> NDArray[np.floating[Any]]:
    """Return unit embeddings ``(n, E)`` of prepared pictures."""
    source, parts = iter(pixels), []
    while batch := list(islice(source, _BATCH)):
        parts.append(subject.images(np.stack(batch)))
    return unit_rows("picture embeddings", np.concatenate(parts))


def bank(subject: Subject, names: Sequence[str], templates: str) -> NDArray[np.floating[Any]]:
    """Return unit embeddings ``(N, E)`` of names."""
    found = subject.bank(LabelSet.of(list(names)), Templates.of(templates))
    return unit_rows("label embeddings", found.embeddings)


def measured(subject: Subject, asked: Asked) -> dict[str, Any]:
    """Return everything that is asked about one form: figures by name, and rows by set."""
    prepare = Preprocess(subject.preprocess)
    figures: dict[str, dict[str, Figure]] = {}
    rows: dict[str, Any] = {}
    for half in asked.halves:
        figures[half], rows[half] = of_stamps(subject, prepare, asked, half)
    common, rows["common"] = {}, {}
    if asked.has_samples:
        common, rows["common"] = of_samples(subject, prepare)
    for style in asked.styles:
        said, rows["common"][style.name] = of_pictograms(subject, prepare, style)
        common |= said
    return {"scale": subject.scale, "figures": {**figures, "common": common}, "rows": rows}


def of_stamps(
    subject: Subject, prepare: Preprocess, asked: Asked, half: str
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Return what a form makes of one half of the stamps."""
    shown = [stamp for stamp in asked.stamps if stamp.split == half]
    images = embedded(subject, (prepare(stamp.path(asked.package)) for stamp in shown))
    said: dict[str, Figure] = {}
    kept: dict[str, Any] = {}
    for language in TEMPLATES:
        chosen_stamps = set(of_half(asked.stamps, half, language))
        judged = [row for row, stamp in enumerate(shown) if stamp in chosen_stamps]
        stamps = [shown[row] for row in judged]
        names = candidates(asked.stamps, language)
        texts = bank(subject, names, TEMPLATES[language])
        cosines = images[judged] @ texts.T
        truth = [stamp.name(language) for stamp in stamps]
        own = np.array([names.index(name) for name in truth], np.intp)
        rank = ranks(images[judged], texts, names, truth)
        ways = {n: n_way(cosines, own, n, draws=_DRAWS, seed=_SEED) for n in (5, 10)}
        values = {"top-1": rank <= 1, "top-5": rank <= 5} | {f"{n}-way": ways[n] for n in ways}
        for kind in KINDS:
            chosen = [row for row, stamp in enumerate(stamps) if kind in ("all", stamp.kind)]
            for what, each in values.items():
                figure = mean_figure(each[chosen], [truth[row] for row in chosen])
                said[f"stamps {language} {kind} {what}"] = figure
        ranking = rank_pictures(images[judged], texts, scale=subject.scale)
        assert ranking.score is not None
        right = ranking.first == own
        said[f"calibration error {language}"] = calibration_figure(ranking.score, right, truth)
        for offered in _OFFERED:
            scores = rejection_scores(cosines, own, offered, subject.scale)
            said[f"rejection {language} of {offered}"] = rejection_figure(*scores, truth)
        kept[f"stamps {language}"] = [
            {
                "file": stamp.file,
                "name": stamp.name(language),
                "kind": stamp.kind,
                "rank": int(rank[row]),
                "5-way": round(float(ways[5][row]), 2),
                "10-way": round(float(ways[10][row]), 2),
                "score": round(float(ranking.score[row]), 4),
                "top5": ", ".join(names[column] for column in ranking.best[row]),
            }
            for row, stamp in enumerate(stamps)
        ]
    classes = tuple(sorted({stamp.coarse for stamp in asked.stamps if stamp.coarse is not None}))
    chosen = [row for row, stamp in enumerate(shown) if stamp.coarse is not None]
    best = top_k(images[chosen] @ bank(subject, classes, "one").T, 1)[:, 0]
    right = np.array([classes[column] == shown[row].coarse for row, column in zip(chosen, best, strict=True)])
    said["superclass top-1"] = mean_figure(right, [shown[row].en for row in chosen])
    kept["superclass"] = [
        {"file": shown[row].file, "superclass": shown[row].coarse, "first": classes[column]}
        for row, column in zip(chosen, best, strict=True)
    ]
    return said, kept


def of_samples(subject: Subject, prepare: Preprocess) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Return what a form makes of the pictures of foolbox."""
    said: dict[str, Figure] = {}
    kept: dict[str, Any] = {}
    for each in samples(prepare):
        images = embedded(subject, each.pixels)
        best = rank_pictures(images, bank(subject, each.candidates, each.templates)).best
        truth = [each.candidates[target] for target in each.targets]
        place = best == each.targets[:, None]
        for top in (1, 5):
            said[f"{each.name} top-{top}"] = mean_figure(place[:, :top].any(axis=1), truth)
        kept[each.name] = [
            {"name": name, "top5": ", ".join(each.candidates[column] for column in columns)}
            for name, columns in zip(truth, best, strict=True)
        ]
    return said, kept


def of_pictograms(
    subject: Subject, prepare: Preprocess, style: Style
) -> tuple[dict[str, Figure], dict[str, str]]:
    """Return what a form makes of the pictograms of a style; rows are columns of words, for they are many.

    They are in the order of the style's emoji.
    """
    images = embedded(subject, (prepare.resize(on_white(each.files[0])) for each in style.emoji))
    is_flag = np.array([each.is_flag for each in style.emoji])
    is_thing = np.array([each.is_thing for each in style.emoji])
    said: dict[str, Figure] = {}
    kept: dict[str, str] = {}
    for language in TEMPLATES:
        own_names = [each.english if language == "en" else each.chinese for each in style.emoji]
        for title, offered in (("all", np.ones(len(is_flag), bool)), ("no flags", ~is_flag)):
            shown = np.flatnonzero(offered)
            names = tuple(sorted({own_names[row] for row in shown}))
            truth = [own_names[row] for row in shown]
            texts = bank(subject, names, TEMPLATES[language])
            own = np.array([names.index(name) for name in truth], np.intp)
            rank = ranks(images[shown], texts, names, truth)
            ten = n_way(images[shown] @ texts.T, own, 10, draws=_DRAWS, seed=_SEED)
            values = {"top-1": rank <= 1, "top-5": rank <= 5, "10-way": ten}
            parts = {title: np.ones(len(shown), bool)}
            if title == "all":
                parts |= {"things": is_thing[shown], "others": ~is_thing[shown]}
            for part, chosen in parts.items():
                for what, each in values.items():
                    named = [truth[row] for row in np.flatnonzero(chosen)]
                    said[f"{style.name} {language} {part} {what}"] = mean_figure(each[chosen], named)
            kept[f"{title}: rank, {language}"] = " ".join(map(str, rank))
            kept[f"{title}: wins of 10-way, {language}"] = " ".join(
                map(str, np.rint(_DRAWS * ten).astype(int))
            )
    return said, kept


# --- forms -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A form of the model.

    Attributes:
        name: as tables call it.
        subject: it, open.
        bundle: where it is stored; ``None`` for the eager one.
        variant: of the bundle.
    """

    name: str
    subject: Subject
    bundle: Bundle | None = None
    variant: str = ""


@contextlib.contextmanager
def forms(bundle: str, checkpoint: Path | None, options: RuntimeOptions) -> Iterator[Iterator[Form]]:
    """Open the form that ships, and those made from a checkpoint, one after the other."""
    with tempfile.TemporaryDirectory() as work:
        yield _forms(bundle, checkpoint, options, Path(work))


def _forms(bundle: str, checkpoint: Path | None, options: RuntimeOptions, work: Path) -> Iterator[Form]:
    yield from _of_bundle(bundle, ["onnx-int8"], options)
    if checkpoint is None:
        return
    with contextlib.closing(eager(checkpoint)) as subject:
        yield Form("eager float32", subject)
    del subject
    yield from _of_bundle(str(exported(checkpoint, work)), ["onnx-fp32", "openvino-int8"], options)


def _of_bundle(path: str, variants: Sequence[str], options: RuntimeOptions) -> Iterator[Form]:
    for variant in variants:
        (subject,), _ = open_bundle(path, variants=[variant], options=options)
        with contextlib.closing(subject):
            yield Form(variant, subject, Bundle.open(path), variant)


def eager(checkpoint: Path) -> Subject:
    """Return a checkpoint in float32; weights it left in their packages come from there."""
    import torch

    from edgeclip.distill.eager import EagerSubject
    from edgeclip.models.checkpoints import load_checkpoint, read_checkpoint_info
    from edgeclip.tokenizer import Tokenizer

    torch.set_num_threads(1)
    info = read_checkpoint_info(checkpoint)
    model = load_checkpoint(checkpoint, external=materials("default-model"))
    return EagerSubject(info.config.name, model.eval(), info.config, Tokenizer.open(checkpoint))


def exported(checkpoint: Path, work: Path) -> Path:
    """Export a checkpoint in its other forms, calibrated on the photographs for it, whatever they lose."""
    from edgeclip.export.exporter import export_bundle
    from edgeclip.export.options import Checkpoint, ExportSettings, Gates, LimitChange, References
    from edgeclip.export.variants import parse_variants

    calibration = work / "calibration photographs.jsonl"
    rows = [json.dumps({"path": str(photo.path.resolve())}) for photo in photos(use="calibration")]
    calibration.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    anything = tuple(
        LimitChange("int8", number, 0.0)
        for number in ("cosine_min", "cosine_mean", "centred_cosine_mean", "top1_agreement")
    )
    settings = ExportSettings(
        references=References(calibration=calibration), gates=Gates(anything), threads=1
    )
    variants = parse_variants(["onnx-fp32", "openvino-int8"])
    return export_bundle(Checkpoint(str(checkpoint)), variants, work / "bundle", settings).bundle.path


# --- cost --------------------------------------------------------------------------------------------------


def cost(form: Form, photo: Path) -> dict[str, Any]:
    """Return sizes, latencies and peak memory of a form; sizes and memory of stored ones alone.

    Sizes are those of a bundle with this form and no other.
    """
    spec = form.subject.preprocess
    picture = Preprocess(spec)(photo)[None]
    said: dict[str, Any] = {"threads": 1}
    if form.bundle is None:
        said["latency"] = {
            "image": _latency(lambda: form.subject.images(picture)),
            "text, with its tokens": _latency(lambda: form.subject.texts(["a photo of a dog."])),
        }
        return said
    variant = form.bundle.variant(form.variant)
    from edgeclip.text_encoder import open_tokenizer

    feeds: dict[str, NDArray[Any]] = {
        "image": picture,
        "text": open_tokenizer(form.bundle)(["a photo of a dog."], truncate=True),
    }
    said["latency"] = {}
    for tower, feed in feeds.items():
        with open_session(variant.tower(tower), options=RuntimeOptions(threads=1)) as session:
            (name,) = session.inputs
            said["latency"][tower] = _latency(lambda each=session, key=name, row=feed: each.run({key: row}))
    files = form.bundle.manifest.files
    others = set(form.bundle.manifest.variants) - {form.variant}
    parts: dict[str, int] = {"manifest": len(form.bundle.manifest_bytes)}
    for name, entry in files.items():
        part = name.split("/")[0] if "/" in name else name.split(".")[0].lower()
        if part in others:
            continue
        if part == form.variant:
            part = f"{Path(name).name.split('.')[0]} tower"
        parts[part] = parts.get(part, 0) + entry.size_bytes
    said["size_bytes"] = {**parts, "in all": sum(parts.values())}
    said["peak_rss"] = _peak_rss(form, photo)
    return said


def _latency(call: Callable[[], object]) -> dict[str, Any]:
    taken: LatencySamples = measure(call, min_samples=_CALLS, min_duration_s=0.0)
    half = taken.percentile(50)
    return {
        "p50_ms": round(taken.median_ms, 3),
        "low_ms": None if half is None else round(half.low_ms, 3),
        "high_ms": None if half is None else round(half.high_ms, 3),
        "samples_ms": taken.samples_ms.round(3).tolist(),
    }


def _peak_rss(form: Form, photo: Path) -> dict[str, Any]:
    """Return the peak memory of fresh processes; the first one stamps the host cache and is not counted.

    Each tells its own high-water mark: Linux counts that of the process it came from into ``ru_maxrss``.
    """
    assert form.bundle is not None
    command = [sys.executable, "-c", _PROGRAM, str(form.bundle.path), form.variant, str(photo)]
    told = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        for _ in range(1 + _PROCESSES)
    ]
    if told[0] == "None":
        return {"left_out": "this system does not tell it"}
    values = sorted(int(each) for each in told[1:])
    return {"median_bytes": values[len(values) // 2], "samples_bytes": values, "picture_px": _MEGAPIXELS}


def write_photo(path: Path) -> Path:
    """Write a JPEG of two megapixels."""
    from PIL import Image

    with Image.open(ROOT / "edgeclip/assets/photos/cat.jpg") as photo:
        photo.convert("RGB").resize(_MEGAPIXELS, Image.Resampling.BICUBIC).save(path, "JPEG", quality=90)
    return path


# --- what is said ------------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return all figures as lines: one a figure, a column a form."""
    forms_of = list(found)
    lines = [
        "%, 95 % intervals".ljust(38) + "n".rjust(6) + "  goal" + "".join(f"{name:>24}" for name in forms_of)
    ]
    first = found[forms_of[0]]["figures"]
    for part, figures in first.items():
        if figures:
            lines.append(f"-- {part}" if part == "common" else f"-- stamps, half: {part}")
        for name, figure in figures.items():
            cells = [_cell(found[form]["figures"][part][name]) for form in forms_of]
            goal = GOALS.get(name)
            said = f"≥ {goal}" if goal is not None else ""
            lines.append(f"{name:38}{figure['n']:>6}{said:>6}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append("-- cost, one thread")
    costs = [found[form]["cost"] for form in forms_of]
    for tower in ("image", "text"):
        cells = []
        for each in costs:
            (taken,) = [value for key, value in each["latency"].items() if key.startswith(tower)]
            cells.append(f"{taken['p50_ms']:.2f}")
        lines.append(f"{f'{tower} tower, p50, ms':50}" + "".join(f"{cell:>24}" for cell in cells))
    sizes = [each.get("size_bytes", {}) for each in costs]
    for part in dict.fromkeys(part for each in sizes for part in each):
        cells = [f"{each[part] / 1e6:.2f}" if part in each else "" for each in sizes]
        lines.append(f"{f'{part}, MB':50}" + "".join(f"{cell:>24}" for cell in cells))
    cells = []
    for each in costs:
        rss = each.get("peak_rss", {}).get("median_bytes")
        cells.append(f"{rss / 1e6:.0f}" if rss else "")
    lines.append(f"{'peak memory, one picture, MB':50}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    if "value" not in figure:
        return ""
    if "low" not in figure:
        return f"{figure['value']:.1f}"
    return f"{figure['value']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, say it in a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", default="default", help="the bundle  [default: the embedded one]")
    parser.add_argument("--checkpoint", type=Path, help="its weights in float32, for the other forms")
    parser.add_argument(
        "--half", action="append", choices=HALVES, help="of the stamps; repeat it  [default: tune]"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/default_model.json")
    chosen = parser.parse_args(arguments)
    if chosen.checkpoint is not None and importlib.util.find_spec("torch") is None:
        parser.error("--checkpoint needs torch: install edgeclip[train,export,openvino].")
    asked = asked_for(chosen.half or ["tune"])
    for reason in asked.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        cache = Path(work) / "cache"  # label vectors of a run are of no use to anybody else
        cache.mkdir()
        (cache / "data").symlink_to(data_directory())
        os.environ["EDGECLIP_CACHE_DIR"] = str(cache)
        photo = write_photo(Path(work) / "photo.jpg")
        with forms(chosen.bundle, chosen.checkpoint, RuntimeOptions(threads=1)) as opened:
            for form in opened:
                print(f"{form.name} …", file=sys.stderr)
                found[form.name] = {**measured(form.subject, asked), "cost": cost(form, photo)}
    shipped = Bundle.open(chosen.bundle)
    document = {
        "what": "figures of the default model in %, intervals of 95 % over names",
        "bundle": {"name": shipped.manifest.model.name, "digest": shipped.digest},
        "halves": list(asked.halves),
        "names": {language: len(candidates(asked.stamps, language)) for language in TEMPLATES},
        "templates": TEMPLATES,
        "draws": _DRAWS,
        "seed": _SEED,
        "goals": {"half": "report", "least": GOALS},
        "pictograms": {
            style.name: {
                "from": style.about,
                "emoji": " ".join(each.code for each in style.emoji),
                "flags": " ".join(each.code for each in style.emoji if each.is_flag),
            }
            for style in asked.styles
        },
        "left_out": asked.left_out,
        "forms": found,
    }
    write(chosen.output, document, show=False)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
