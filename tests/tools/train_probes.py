"""Train the probes: small models of every topology with weights that mean something.

Random weights prove little: they collapse all pictures onto one vector. Every check of folding, export and
quantization therefore has three models trained on generated pictures (``edgeclip.shapes``), in minutes on two
cores::

    python tests/tools/train_probes.py mobileclip vit tinyclip -o tests/data/probes

A probe is a checkpoint directory (float16, at most 3 MB) and a ``recipe.json`` with the recipe, hashes of the
recipe, of this file and of the weights, and what the probe reaches on pictures of held-out combinations.
``tests/evaluate/test_probes.py`` holds the committed ones to it. After a change of this file that changes no
number, ``--restamp`` evaluates the probes again and writes the hashes.

Loss: the symmetric contrastive loss of Radford et al. 2021, §2.3. Pairs of one combination are not taken
for negatives of each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edgeclip.evaluate.metrics import median_similarity
from edgeclip.evaluate.zero_shot import ZeroShotReport, evaluate_zero_shot
from edgeclip.models.checkpoints import CheckpointInfo, load_checkpoint, save_checkpoint
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import CLIPConfig, FastViTConfig, TextTransformerConfig, ViTConfig
from edgeclip.shapes import (
    COLOURS,
    LANGUAGES,
    TEXTURES,
    VERSION,
    Combination,
    captions,
    held_out_combinations,
    label,
    ordered_combinations,
    render,
    training_combinations,
)
from edgeclip.tokenizer import Tokenizer, train_bpe

CONTEXT_LENGTH = 24
EVALUATED = 1592  # two pictures of each held-out combination
_EVALUATION_SEED = 1 << 40  # no training picture has a seed like this
_SMALLEST_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        config: the model.
        seed: of weights, pictures, captions and their order.
        size_px: side of the pictures.
        pictures: of each training combination.
        captions: of each picture and language.
        batch: pictures, and as many captions, half of them of each language.
        steps: optimizer steps.
        warmup: steps of linear warm-up; a half cosine to zero follows.
        learning_rate: the highest (AdamW).
        muon_rate: the highest of the matrices of transformer layers (Muon; Jordan et al. 2024); 0 leaves them
            to AdamW.
        alike: of so many batches one is plain and the others hold two colours and two textures only, so that
            places, shapes and counts, which are learned last, tell their pictures apart; 0 makes all plain.
        position_gain: factor on the initial positions of a ViT: as published they are a tenth of a patch, and
            for some hundred steps it would see colours and textures but no places.
        parent: the probe whose weights are inherited, without the heads and hidden units that this config
            leaves out; empty for fresh weights.
        weight_decay: of matrices and kernels (AdamW); norms, biases and scales have none.
        shift_px: pictures are shifted by up to so many pixels, at random.
        layer_scale: initial value of every layer scale: 1e-5, as published, would leave the blocks of so
            short a training unused, and folding them would prove nothing.
    """

    config: CLIPConfig
    seed: int = 0
    size_px: int = 64
    pictures: int = 3
    captions: int = 2
    batch: int = 128
    steps: int = 600
    warmup: int = 50
    learning_rate: float = 2e-3
    muon_rate: float = 0.0
    alike: int = 0
    position_gain: float = 1.0
    parent: str = ""
    weight_decay: float = 0.05
    shift_px: int = 2
    layer_scale: float = _SMALLEST_SCALE

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _text(**changes: Any) -> TextTransformerConfig:
    # 837 ids are what the captions give; `shapes_tokenizer` checks it.
    fields: dict[str, Any] = {
        "vocab_size": 837,
        "context_length": CONTEXT_LENGTH,
        "width": 96,
        "heads": (3, 3),
        "hidden_dims": (192, 192),
        "head_dim": 32,
        "pad_id": 834,
        "embed_dim": 96,
    }
    return TextTransformerConfig(**fields | changes)


RECIPES: dict[str, Recipe] = {
    "mobileclip": Recipe(
        config=CLIPConfig(
            name="probe-mobileclip",
            image=FastViTConfig(
                dims=(24, 48, 96),
                depths=(1, 1, 2),
                mixers=("repmixer", "repmixer", "attention"),
                position_stages=(2,),
                se_stages=(1, 2),
                layer_scale_init=_SMALLEST_SCALE,
                embed_dim=96,
            ),
            text=_text(conv_ends=True, attention="full"),
            image_size_px=(64, 64),
        ),
        steps=1600,
        alike=3,
    ),
    "vit": Recipe(
        config=CLIPConfig(
            name="probe-vit",
            image=ViTConfig(
                width=96,
                heads=(3, 3, 3),
                hidden_dims=(192, 192, 192),
                head_dim=32,
                patch_px=8,
                grid=(8, 8),
                embed_dim=96,
            ),
            text=_text(),
            image_size_px=(64, 64),
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        steps=2200,
        muon_rate=0.008,
        learning_rate=1.5e-3,
        alike=3,
        position_gain=5.0,
    ),
    "tinyclip": Recipe(
        config=CLIPConfig(
            name="probe-tinyclip",
            image=ViTConfig(
                width=96,
                heads=(3, 2, 3),
                hidden_dims=(192, 128, 160),
                head_dim=32,
                patch_px=8,
                grid=(8, 8),
                activation="quick-gelu",
                embed_dim=96,
            ),
            text=_text(heads=(2, 3), hidden_dims=(128, 160), activation="quick-gelu"),
            image_size_px=(64, 64),
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        steps=400,
        warmup=20,
        learning_rate=1e-3,
        muon_rate=0.006,
        alike=3,
        parent="vit",
    ),
}


# --- data --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Training pictures and captions.

    Attributes:
        pictures: ``(N, S, S, 3)`` uint8; each combination comes once before any comes again.
        tokens: ``(N, languages, captions, L)``.
        combinations: number of each picture's combination.
        looks: ``(N, 2)``, numbers of its colour and texture.
    """

    pictures: Tensor
    tokens: Tensor
    combinations: Tensor
    looks: Tensor


def shapes_tokenizer() -> Tokenizer:
    """Return a small vocabulary learned from captions of training combinations."""
    texts = [
        caption
        for seed, combination in enumerate(training_combinations()[::5])
        for language in LANGUAGES
        for caption in captions(combination, language, seed, count=3)
    ]
    return train_bpe(texts, vocab_size=1000, context_length=CONTEXT_LENGTH, languages=LANGUAGES, frame=True)


def training_data(recipe: Recipe, tokenizer: Tokenizer, *, limit: int | None = None) -> Data:
    """Draw what a recipe trains on, or its first ``limit`` pictures."""
    known = training_combinations()
    count = recipe.pictures * len(known) if limit is None else limit
    drawn = list(islice(ordered_combinations(False, recipe.seed), count))
    number = {combination: index for index, combination in enumerate(known)}
    texts = [
        caption
        for index, combination in enumerate(drawn)
        for language in LANGUAGES
        for caption in captions(combination, language, index, count=recipe.captions)
    ]
    tokens = torch.from_numpy(tokenizer(texts)).long()
    return Data(
        pictures=_pictures(drawn, 0, recipe.size_px),
        tokens=tokens.reshape(count, len(LANGUAGES), recipe.captions, -1),
        combinations=torch.tensor([number[combination] for combination in drawn]),
        looks=torch.tensor([(COLOURS.index(each.colour), TEXTURES.index(each.texture)) for each in drawn]),
    )


def _pictures(drawn: Sequence[Combination], seed: int, size_px: int) -> Tensor:
    pictures = np.empty((len(drawn), size_px, size_px, 3), np.uint8)
    for index, combination in enumerate(drawn):
        pictures[index] = render(combination, seed + index, size_px=size_px)
    return torch.from_numpy(pictures)


def held_out_pictures(count: int, size_px: int, *, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Return fresh pictures ``(N, S, S, 3)`` of held-out combinations and the number of each one's label."""
    known = held_out_combinations()
    number = {combination: index for index, combination in enumerate(known)}
    drawn = list(islice(ordered_combinations(True, seed), count))
    pictures = _pictures(drawn, _EVALUATION_SEED + (seed << 32), size_px)
    return pictures, [number[combination] for combination in drawn]


def normalized(pictures: Tensor, config: CLIPConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what an image tower takes, ``(B, 3, H, W)``, from uint8 ``(B, H, W, 3)``."""
    mean, std = (torch.tensor(values, dtype=dtype) for values in (config.mean, config.std))
    return ((pictures.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


# --- training ----------------------------------------------------------------------------------------------


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, combinations: Tensor) -> Tensor:
    """Return the mean of both cross entropies (Radford et al. 2021, figure 3).

    Args:
        image: ``(B, E)`` unit rows.
        text: ``(B, E)`` unit rows, the caption of each picture.
        scale: multiplier of cosines.
        combinations: ``(B,)``; other pairs of one combination count neither for nor against.
    """
    logits = scale * image @ text.T  # (B, B)
    same = combinations[:, None] == combinations
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fresh_model(recipe: Recipe, parent: CLIP | None = None) -> CLIP:
    """Return the model of a recipe before training; ``parent`` is the one it inherits from, if it has one."""
    torch.manual_seed(recipe.seed)
    model = build_clip(recipe.config)
    if parent is not None:
        return inherited(model, parent)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(recipe.layer_scale)
            elif name == "image_tower.positions.table":
                parameter.mul_(recipe.position_gain)
    return model


@torch.no_grad()
def inherited(model: CLIP, parent: CLIP) -> CLIP:
    """Return ``model`` with the weights of a wider ``parent``, pruned by magnitude (cf. Wu et al. 2023).

    Of each layer the heads and hidden units stay whose output weights are the largest; the rest is equal.
    """
    theirs = parent.state_dict()
    state = dict(theirs)
    for name, wanted in model.state_dict().items():
        if theirs[name].shape == wanted.shape:
            continue
        layer = name.rsplit(".", 3 if ".attention." in name else 2)[0]
        if ".attention." in name:
            size = model.get_submodule(f"{layer}.attention").head_dim
            out = theirs[f"{layer}.attention.out.weight"]  # (D, heads · size)
            strength = out.unflatten(1, (-1, size)).norm(dim=(0, 2))
            count = model.get_submodule(f"{layer}.attention").heads
            heads = strength.argsort(descending=True)[:count].sort().values
            columns = (heads[:, None] * size + torch.arange(size)).flatten()
            if ".qkv." in name:
                columns = (torch.arange(3)[:, None] * out.shape[1] + columns).flatten()
        else:
            columns = theirs[f"{layer}.fc2.weight"].norm(dim=0).argsort(descending=True)
            columns = columns[: model.get_submodule(f"{layer}.fc1").out_features].sort().values
        axis = int(name.endswith(("out.weight", "fc2.weight")))
        state[name] = theirs[name].index_select(axis, columns)
    model.load_state_dict(state)
    return model


def train(
    recipe: Recipe,
    data: Data,
    *,
    parent: CLIP | None = None,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> CLIP:
    """Return the trained model, in eval mode."""
    model = fresh_model(recipe, parent).train()
    optimizers = _optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
        for optimizer in optimizers
    ]
    random = torch.Generator().manual_seed(recipe.seed)
    every = len(training_combinations())
    order: list[int] = []
    for step in range(recipe.steps):
        if recipe.alike and step % recipe.alike:
            batch = _look_alikes(data.looks, recipe.batch, random)
        else:
            if len(order) < recipe.batch:
                order = _order(len(data.pictures), every, random)
            batch = torch.tensor(order[: recipe.batch])
            del order[: recipe.batch]
        pictures = _shifted(data.pictures[batch], recipe.shift_px, random)
        language = torch.arange(len(batch)) % len(LANGUAGES)
        caption = torch.randint(recipe.captions, (len(batch),), generator=random)
        image, text, scale = model(normalized(pictures, recipe.config), data.tokens[batch, language, caption])
        loss = contrastive_loss(image, text, scale, data.combinations[batch])
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress(step + 1, loss.item())
    return model.eval()


def _optimizers(model: CLIP, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return AdamW, and Muon for the matrices of the layers where the recipe asks for it."""
    matrices, kernels, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 1:
            vectors.append(parameter)
        elif recipe.muon_rate and ".layers." in name:
            matrices.append(parameter)
        else:
            kernels.append(parameter)
    groups = [
        {"params": kernels, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay))
    return optimizers


def _rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return (1 + math.cos(math.pi * done)) / 2


def _order(count: int, every: int, random: torch.Generator) -> list[int]:
    """Return an order of pictures in which no combination comes twice within ``every``."""
    blocks = [range(start, min(start + every, count)) for start in range(0, count, every)]
    return [
        blocks[index][place]
        for index in torch.randperm(len(blocks), generator=random).tolist()
        for place in torch.randperm(len(blocks[index]), generator=random).tolist()
    ]


def _look_alikes(looks: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Return pictures of two colours and two textures."""
    chosen = torch.ones(len(looks), dtype=torch.bool)
    for column, values in enumerate((COLOURS, TEXTURES)):
        pair = torch.randperm(len(values), generator=random)[:2]
        chosen &= torch.isin(looks[:, column], pair)
    found = chosen.nonzero().flatten()
    return found[torch.randperm(len(found), generator=random)[:count]]


def _shifted(pictures: Tensor, most: int, random: torch.Generator) -> Tensor:
    """Return the pictures, each shifted by up to ``most`` pixels; what appears repeats the edge."""
    size = pictures.shape[1]
    place = torch.arange(size)
    by = torch.randint(-most, most + 1, (2, len(pictures), 1), generator=random)
    rows, columns = (place + by).clamp(0, size - 1)  # (B, S) each
    index = torch.arange(len(pictures))[:, None, None]
    return pictures[index, rows[:, :, None], columns[:, None, :]]


# --- evaluation --------------------------------------------------------------------------------------------


@torch.inference_mode()
def embed_pictures(model: CLIP, config: CLIPConfig, pictures: Tensor) -> np.ndarray:
    """Return unit embeddings ``(N, E)`` in the dtype of the model."""
    dtype = model.logit_scale.dtype
    rows = [
        model.encode_image(normalized(part, config, dtype), normalize=True) for part in pictures.split(128)
    ]
    return torch.cat(rows).numpy()


@torch.inference_mode()
def embed_labels(model: CLIP, tokenizer: Tokenizer, language: str) -> np.ndarray:
    """Return unit embeddings of the labels of all held-out combinations."""
    texts = [label(combination, language) for combination in held_out_combinations()]
    tokens = torch.from_numpy(tokenizer(texts)).long()
    return model.encode_text(tokens, normalize=True).numpy()


def evaluate(
    model: CLIP, config: CLIPConfig, tokenizer: Tokenizer, *, count: int = EVALUATED, seed: int = 0
) -> tuple[dict[str, ZeroShotReport], float]:
    """Return the report of each language and the median cosine of two pictures.

    All held-out combinations are offered, each with the one sentence that is its label.
    """
    pictures, targets = held_out_pictures(count, config.image_size_px[0], seed=seed)
    embeddings = embed_pictures(model, config, pictures)
    reports = {
        language: evaluate_zero_shot(embeddings, embed_labels(model, tokenizer, language), targets)
        for language in LANGUAGES
    }
    return reports, median_similarity(embeddings)


# --- probes ------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Return the sha256 of JSON values, or of a file with line endings as ``\\n``."""
    if isinstance(value, Path):
        content = value.read_bytes().replace(b"\r\n", b"\n")
    else:
        content = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def hashes(recipe: Recipe) -> dict[str, Any]:
    """Return what must not drift apart from a committed probe unnoticed."""
    return {
        "recipe_sha256": digest(recipe.to_dict()),
        "code_sha256": digest(Path(__file__)),
        "shapes_version": VERSION,
    }


def _numbers(report: ZeroShotReport) -> dict[str, Any]:
    shares = {name: dataclasses.asdict(getattr(report, name)) for name in ("top1", "top5")}
    rounded = {name: {key: round(value, 4) for key, value in each.items()} for name, each in shares.items()}
    return {"n": report.n, "labels": report.labels, **rounded}


def describe(directory: Path, recipe: Recipe, training: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a probe as it is stored and write its ``recipe.json``."""
    model, tokenizer = load_checkpoint(directory), Tokenizer.open(directory)
    reports, similarity = evaluate(model, recipe.config, tokenizer)
    weights = directory / "model.safetensors"
    said = {
        "schema": 1,
        "recipe": recipe.to_dict(),
        **hashes(recipe),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "weights_bytes": weights.stat().st_size,
        "parameters": {
            name: sum(parameter.numel() for parameter in tower.parameters())
            for name, tower in (("image", model.image_tower), ("text", model.text_tower))
        },
        "held_out": {language: _numbers(report) for language, report in reports.items()},
        "median_image_cosine": round(similarity, 4),
        "training": training,
    }
    (directory / "recipe.json").write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    return said


def make(
    name: str, directory: Path, *, recipe: Recipe | None = None, data: Data | None = None
) -> dict[str, Any]:
    """Train the probe ``name`` and write it."""
    recipe = recipe or RECIPES[name]
    tokenizer = shapes_tokenizer()
    expected = recipe.config.text.vocab_size
    if tokenizer.vocab_size != expected:
        raise SystemExit(f"{name}: the tokenizer has {tokenizer.vocab_size} ids, the config says {expected}.")
    began = time.perf_counter()
    if data is None:
        data = training_data(recipe, tokenizer)
    drawn = time.perf_counter()

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0 or step == recipe.steps:
            seconds = time.perf_counter() - drawn
            print(f"{name}: step {step}/{recipe.steps}, loss {loss:.3f}, {seconds:.0f} s", file=sys.stderr)

    parent = load_checkpoint(directory.parent / recipe.parent) if recipe.parent else None
    model = train(recipe, data, parent=parent, progress=progress)
    ended = time.perf_counter()
    info = CheckpointInfo(
        config=recipe.config,
        scale=1.0,  # save_checkpoint takes the model's
        dtype="float16",
        tokenizer_digest=tokenizer.digest,
        tokenizer_files={},
        licence="Apache-2.0",
        parents=({"name": RECIPES[recipe.parent].config.name, "licence": "Apache-2.0"},) if parent else (),
    )
    save_checkpoint(model, directory, info, tokenizer_files=tokenizer.files)
    training = {
        "draw_s": round(drawn - began, 1),
        "train_s": round(ended - drawn, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return describe(directory, recipe, training)


def main() -> None:
    """Parse the command line and make probes."""
    parser = argparse.ArgumentParser(description="Train the probes.")
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the probes")
    parser.add_argument("--restamp", action="store_true", help="train nothing; evaluate and write the hashes")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        directory = arguments.output / name
        if arguments.restamp:
            before = json.loads((directory / "recipe.json").read_text("utf-8"))
            said = describe(directory, RECIPES[name], before["training"])
        else:
            said = make(name, directory)
        top1 = {language: report["top1"]["value"] for language, report in said["held_out"].items()}
        print(f"{name}: top-1 {top1}, median image cosine {said['median_image_cosine']}")


if __name__ == "__main__":
    main()
