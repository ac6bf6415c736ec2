"""Drawings for the default model: their features, a linear part for them, and the gate that tells them apart.

Drawings are emoji in two styles (Noto, Fluent), each as it is on white and in drawn views: other sizes,
turns, colours and grounds. Their features of the frozen backbone and the sentence vectors of their names
meet in a small space: a linear map each, trained with cross-entropy over all names; every name has an offset
of its own, which other names do not share. The gate is a linear discriminant (Fisher 1936) between drawings
and free photographs (public domain and CC0), whole, cropped, and cut out on white; nothing of what they show
is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from edgeclip.errors import InputError
from edgeclip.fetch import Photo
from edgeclip.models.efficientnet_lite import LITE_MEAN, LITE_STD, EfficientNetLite

from .default_space import Floats, Sight, unit
from .emoji import read_pictograms

__all__ = [
    "FREE",
    "Drawing",
    "HeadRecipe",
    "PictogramCodes",
    "PictogramNames",
    "fit_gate",
    "fit_head",
    "learn_sight",
    "look",
    "photograph_views",
    "pictogram_views",
    "read_drawings",
    "rows_of_names",
]

Pixels = NDArray[np.uint8]
_SIZE_PX = 224
_BATCH = 32
FREE = frozenset({"CC0-1.0", "public-domain"})
"""Terms of photographs that may train weights."""
_GATE_MIDDLE, _GATE_SLOPE = 0.3, 60.0
_SHRINKAGE = 0.3
_MOST_OF_A_TAG = 2


@dataclass(frozen=True)
class Drawing:
    """One emoji: its name, its tags, and a file in each style."""

    name: str
    tags: tuple[str, ...]
    files: tuple[Path, ...]


def read_drawings(emojibase: Path, noto: Path, fluent: Path) -> list[Drawing]:
    """Return the emoji that both styles draw, but no flags.

    Args:
        emojibase: unpacked package ``emojibase-data``.
        noto: unpacked package ``emoji-datasource-google``.
        fluent: unpacked package ``@lobehub/fluent-emoji-3d``.

    Raises:
        InputError: a package is missing or damaged.
    """
    found = read_pictograms(emojibase, (noto / "img/google/64", fluent / "assets"))
    return [Drawing(each.english, each.tags, each.files) for each in found if not each.is_flag]


# Views
# ------------------------------------------------------------------------------------------------------------


def pictogram_views(paths: Iterable[Path], *, seed: int | None) -> Iterator[Pixels]:
    """Yield a picture ``(224, 224, 3)`` of each drawing: plain on white without a seed, else drawn anew."""
    random = np.random.default_rng(seed)
    for path in paths:
        drawing = Image.open(path).convert("RGBA")
        if seed is None:
            plain = Image.new("RGB", drawing.size, (255, 255, 255))
            plain.paste(drawing, (0, 0), drawing)
            yield np.asarray(plain.resize((_SIZE_PX, _SIZE_PX), Image.Resampling.BILINEAR))
            continue
        side, shape = _SIZE_PX * random.uniform(0.55, 1.05), random.uniform(0.85, 1.18) ** 0.5
        drawing = drawing.resize((int(side * shape), int(side / shape)), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawing = drawing.rotate(random.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
        pixels = np.asarray(drawing).astype(np.float32)
        colours = pixels[..., :3] * random.uniform(0.75, 1.25) * random.uniform(0.85, 1.15, 3)
        if random.random() < 0.15:
            colours = np.repeat(colours.mean(axis=-1, keepdims=True), 3, axis=-1)
        changed = np.concatenate([np.clip(colours, 0, 255), pixels[..., 3:]], axis=-1).astype(np.uint8)
        drawing = Image.fromarray(changed)
        ground = _ground(random)
        x, y = (
            (_SIZE_PX - side_px) // 2 + int(random.integers(-20, 21))
            for side_px in (drawing.width, drawing.height)
        )
        ground.paste(drawing, (x, y), drawing)
        yield np.asarray(ground)


def _ground(random: np.random.Generator) -> Image.Image:
    """Return white, one colour, a gradient, or blots with or without noise."""
    kind = random.random()
    if kind < 0.35:
        return Image.new("RGB", (_SIZE_PX, _SIZE_PX), (255, 255, 255))
    cells = 1 if kind < 0.55 else 2 if kind < 0.75 else int(random.integers(4, 24))
    colours = random.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    ground = Image.fromarray(colours).resize((_SIZE_PX, _SIZE_PX), Image.Resampling.BICUBIC)
    if kind < 0.9:
        return ground
    noise = random.normal(0, 25, (_SIZE_PX, _SIZE_PX, 3))
    return Image.fromarray(np.clip(np.asarray(ground) + noise, 0, 255).astype(np.uint8))


def photograph_views(photographs: Iterable[Photo], *, seed: int = 0) -> Iterator[Pixels]:
    """Yield six pictures of each free photograph: the whole, a crop, and four blots of it on white.

    Photographs under any other licence are passed over.
    """
    random = np.random.default_rng(seed)
    for photograph in photographs:
        if photograph.entry.licence not in FREE:
            continue
        whole = Image.open(photograph.path).convert("RGB")
        whole.thumbnail((900, 900))
        yield np.asarray(whole.resize((_SIZE_PX, _SIZE_PX), Image.Resampling.BILINEAR))
        for number in range(5):
            width = max(32, int(whole.width * random.uniform(0.3, 0.8)))
            height = max(32, int(whole.height * random.uniform(0.3, 0.8)))
            width, height = min(width, whole.width), min(height, whole.height)
            x = int(random.integers(0, whole.width - width + 1))
            y = int(random.integers(0, whole.height - height + 1))
            crop = whole.crop((x, y, x + width, y + height))
            yield np.asarray((_cut_out(crop, random) if number else crop).resize((_SIZE_PX, _SIZE_PX)))


def _cut_out(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    angles, radii = np.sort(random.uniform(0, 2 * np.pi, 14)), random.uniform(0.25, 0.5, 14)
    mask = Image.new("L", picture.size, 0)
    corners = [
        (picture.width * (0.5 + radius * np.cos(angle)), picture.height * (0.5 + radius * np.sin(angle)))
        for angle, radius in zip(angles, radii, strict=True)
    ]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture, (0, 0), mask)
    return white


@torch.inference_mode()
def look(backbone: EfficientNetLite, pictures: Iterable[Pixels], keep: Path | None = None) -> Floats:
    """Return features ``(n, F)`` of pictures ``(224, 224, 3)``.

    Args:
        backbone: in evaluation mode.
        pictures: what to look at.
        keep: where to keep the features; read from there if the file is there, and no picture is drawn then.

    Raises:
        InputError: no pictures.
    """
    if keep is not None and keep.is_file():
        kept: Floats = np.load(keep)
        return kept
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (LITE_MEAN, LITE_STD))
    found: list[NDArray[np.float32]] = []
    batch: list[Pixels] = []

    def flush() -> None:
        x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 255
        found.append(backbone.features((x - mean) / std).numpy())
        batch.clear()

    for picture in pictures:
        batch.append(picture)
        if len(batch) == _BATCH:
            flush()
    if batch:
        flush()
    if not found:
        raise InputError(
            "features: got 0 pictures to look at, expected at least one; free photographs come with "
            "`edgeclip data fetch photos`."
        )
    features = np.concatenate(found).astype(np.float32)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        unfinished = keep.with_suffix(".tmp.npy")
        np.save(unfinished, features)
        unfinished.replace(keep)
    return features


# Fitting
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HeadRecipe:
    """How the pictogram part is trained.

    Attributes:
        dim: width of the part.
        steps: steps of AdamW, one cycle of the rate.
        batch_size: drawings a step.
        learning_rate: peak.
        weight_decay: of both maps.
        own_decay: of what a name has of its own.
        dropout: of features.
        noise: added to features, in their standard deviations.
        scale: of cosines.
        seed: of everything that is drawn.
    """

    dim: int = 128
    steps: int = 400
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    own_decay: float = 0.3
    dropout: float = 0.3
    noise: float = 0.3
    scale: float = 15.0
    seed: int = 0


@dataclass(frozen=True)
class PictogramCodes:
    """Where a name's drawing should lie.

    Attributes:
        table: features to the part ``(F, P)``.
        bias: ``(P,)``.
        known: codes of the drawings learnt from ``(n, P)``.
        centre: mean sentence vector of their names ``(D,)``.
        text_table: sentence vectors to the part ``(D, P)``, for other names.
    """

    table: Floats
    bias: Floats
    known: Floats
    centre: Floats
    text_table: Floats


@dataclass(frozen=True)
class PictogramNames:
    """What drawings say about names: where such a drawing lies, and what it looks like.

    Attributes:
        names: of the drawings ``(n)``.
        rows: of the drawings that a name means: one by its own name, else the few that have it as a tag.
        head: the pictogram part.
        looks: mean features of each drawing ``(n, F)``, less the mean of its style: what is left of a style
            is then mostly gone, and what it shows is not.
    """

    names: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]
    head: PictogramCodes
    looks: Floats

    def codes(self, names: Sequence[str], vectors: Floats) -> Floats:
        """Return unit codes ``(n, P)`` of names with these unit sentence vectors ``(n, D)``."""
        head = self.head
        found = unit(unit(vectors - head.centre) @ head.text_table)
        for row, name in enumerate(names):
            if known := self.rows.get(name.lower()):
                found[row] = unit(head.known[list(known)].mean(axis=0, keepdims=True))[0]
        return found

    def drawn(self, names: Sequence[str], more: Sequence[Sequence[int]]) -> Floats:
        """Return what drawings of names look like ``(n, F)``, zeros where there are none.

        Args:
            names: which.
            more: rows of further drawings of each.
        """
        found = np.zeros((len(names), self.looks.shape[1]), np.float32)
        for row, (name, others) in enumerate(zip(names, more, strict=True)):
            if rows := sorted({*self.rows.get(name.lower(), ()), *others}):
                found[row] = self.looks[rows].mean(axis=0)
        return found


def rows_of_names(drawings: Sequence[Drawing]) -> dict[str, tuple[int, ...]]:
    """Return which drawings each name means; a tag of more than two is a topic and means none."""
    tagged: dict[str, list[int]] = {}
    for row, drawing in enumerate(drawings):
        for tag in drawing.tags:
            tagged.setdefault(tag.lower(), []).append(row)
    found = {tag: tuple(rows) for tag, rows in tagged.items() if len(rows) <= _MOST_OF_A_TAG}
    return found | {drawing.name.lower(): (row,) for row, drawing in enumerate(drawings)}


def fit_head(
    styles: Sequence[Sequence[Floats]], names: Sequence[str], vectors: Floats, recipe: HeadRecipe
) -> PictogramCodes:
    """Learn the pictogram part.

    Args:
        styles: for every style its views, features ``(n, F)`` each, in the order of the names.
        names: of the drawings ``(n)``.
        vectors: unit sentence vectors of them ``(n, D)``.
        recipe: how.
    """
    torch.manual_seed(recipe.seed)
    draw = torch.Generator().manual_seed(recipe.seed)
    every = torch.from_numpy(np.concatenate([view for views in styles for view in views]))
    mean, std = every.mean(dim=0), every.std(dim=0) + 0.05
    banks = [torch.stack([(torch.from_numpy(view) - mean) / std for view in views]) for views in styles]
    centre = vectors.mean(axis=0)
    said = torch.from_numpy(unit(vectors - centre))
    picture = nn.Linear(every.shape[1], recipe.dim)
    text = nn.Linear(said.shape[1], recipe.dim, bias=False)
    own = nn.Parameter(torch.zeros(len(names), recipe.dim))
    optimizer = torch.optim.AdamW(
        [
            {"params": [*picture.parameters(), *text.parameters()], "weight_decay": recipe.weight_decay},
            {"params": [own], "weight_decay": recipe.own_decay},
        ],
        lr=recipe.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.steps)

    def view_of(bank: Tensor, rows: Tensor) -> Tensor:
        return bank[torch.randint(len(bank), rows.shape, generator=draw), rows]

    def codes() -> Tensor:
        return F.normalize(F.normalize(text(said), dim=-1) + own, dim=-1)

    for _ in range(recipe.steps):
        rows = torch.randint(len(names), (recipe.batch_size,), generator=draw)
        style = torch.randint(len(banks), rows.shape, generator=draw)[:, None]
        x = sum(view_of(bank, rows) * (style == number) for number, bank in enumerate(banks))
        other = view_of(banks[int(torch.randint(len(banks), (1,), generator=draw))], rows)
        share = torch.rand(len(rows), 1, generator=draw)
        x = share * x + (1 - share) * other
        x = x + recipe.noise * torch.randn(x.shape, generator=draw)
        seen = F.normalize(picture(F.dropout(x, recipe.dropout)), dim=-1)
        loss = F.cross_entropy(recipe.scale * seen @ codes().T, rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        weight = (picture.weight / std).T.contiguous()
        bias = picture.bias - mean @ weight
        return PictogramCodes(
            weight.numpy(),
            bias.numpy(),
            codes().numpy(),
            centre,
            text.weight.T.contiguous().numpy(),
        )


def fit_gate(drawings: Floats, photographs: Floats) -> Floats:
    """Return weights and bias ``(F + 1,)`` whose sigmoid is near 1 on drawings and 0 on photographs.

    The middle is not halfway: pictures of a third kind should count as photographs.
    """
    covariance = (np.cov(drawings.T) + np.cov(photographs.T)) / 2
    width = len(covariance)
    covariance += np.eye(width) * np.trace(covariance) / width * _SHRINKAGE
    weights = np.linalg.solve(covariance, drawings.mean(axis=0) - photographs.mean(axis=0))
    high, low = (float(np.mean(each @ weights)) for each in (drawings, photographs))
    weights = _GATE_SLOPE / (high - low) * weights
    bias = -_GATE_SLOPE * ((high + low) / 2 / (high - low) + _GATE_MIDDLE)
    return np.append(weights, bias).astype(np.float32)


def learn_sight(
    backbone: EfficientNetLite,
    drawings: Sequence[Drawing],
    photographs: Sequence[Photo],
    encode: Callable[[Sequence[str]], Floats],
    keep: Path,
    recipe: HeadRecipe,
    *,
    views: int = 3,
) -> tuple[Sight, PictogramNames]:
    """Look at drawings and photographs, and return what the space needs of them.

    Args:
        backbone: frozen, in evaluation mode.
        drawings: see :func:`read_drawings`.
        photographs: those that are free are looked at.
        encode: texts to unit sentence vectors ``(n, D)``.
        keep: folder that keeps features between runs; that takes five minutes.
        recipe: of the pictogram part.
        views: drawn views of each drawing besides the plain one.
    """
    styles = [
        [
            look(
                backbone,
                pictogram_views(paths, seed=None if view == 0 else 100 * style + view),
                _kept(keep, f"drawings-{style}-{view}", paths),
            )
            for view in range(views + 1)
        ]
        for style, paths in enumerate(zip(*(drawing.files for drawing in drawings), strict=True))
    ]
    free = look(
        backbone,
        photograph_views(photographs),
        _kept(keep, "photographs", [photograph.path for photograph in photographs]),
    )
    names = [drawing.name for drawing in drawings]
    tagged = [", ".join([drawing.name, *drawing.tags[:5]]) for drawing in drawings]
    head = fit_head(styles, names, unit(encode(names) + encode(tagged)), recipe)
    looks = np.mean([[view - view.mean(axis=0) for view in each] for each in styles], axis=(0, 1))
    gate = fit_gate(np.concatenate([view for each in styles for view in each]), free)
    return Sight(
        free.reshape(-1, 6, free.shape[1])[:, :2].mean(axis=(0, 1)), head.table, head.bias, gate
    ), PictogramNames(tuple(names), rows_of_names(drawings), head, looks)


def _kept(folder: Path, name: str, paths: Sequence[Path]) -> Path:
    said = hashlib.sha256("\0".join(path.name for path in paths).encode()).hexdigest()[:16]
    return folder / f"features-{name}-{said}.npy"
