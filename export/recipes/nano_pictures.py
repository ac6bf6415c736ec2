"""Pictures and captions the small model learns from: pictograms on many grounds, and crops of photographs.

There are no labelled photographs. Pictograms of two styles have names in English and Chinese; photographs in
the public domain have none, so that each crop is called what the teacher takes it for among the thousand
class names. A third of the crops are seen through a soft mask on white, as cut-outs are.

What is made depends on the materials, the teacher and the seed alone.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .emoji import Pictogram

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "SIZE_PX",
    "Named",
    "Scene",
    "photograph",
    "pictogram",
    "whole_folder",
    "write_table",
]

SIZE_PX = 160
"""Side of the pictures: the student's views are crops of them."""
_QUALITY = 92
_FRAMES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a cut-out photo of a {}.",
    "this is a {}.",
)
_CHINESE_FRAMES = ("一张{}的图片。", "一张{}的照片。", "这是{}。", "图中有一个{}。")


@dataclass(frozen=True)
class Named:
    """English and Chinese words for what a picture shows."""

    english: tuple[str, ...]
    chinese: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A picture to write: its caption is still open where ``named`` is ``None``."""

    picture: Image.Image
    named: Named | None


# --- drawing -----------------------------------------------------------------------------------------------


def pictogram(one: Pictogram, draw: random.Random, photographs: Sequence[Image.Image]) -> Scene:
    """Return a pictogram of a drawn style, size, place and turn on a drawn ground, with its names."""
    drawing = _open(draw.choice(one.files))
    if draw.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = round(SIZE_PX * draw.uniform(0.5, 1.0))
    wide = max(8, round(side * min(1.0, draw.uniform(0.75, 1.35))))
    drawing = drawing.resize((wide, side), Image.Resampling.BICUBIC)
    if draw.random() < 0.6:
        drawing = drawing.rotate(draw.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
    if draw.random() < 0.4:
        drawing = _shifted_hue(drawing, draw)
    picture = _ground(draw, photographs)
    corner = [round(draw.uniform(-0.05, 1.05) * (SIZE_PX - size)) for size in drawing.size]
    picture.paste(drawing, (corner[0], corner[1]), drawing)
    if draw.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(draw.uniform(0.5, 1.5)))
    tags = [*one.tags, *one.chinese_tags]
    draw.shuffle(tags)
    is_chinese = [any("一" <= letter <= "鿿" for letter in tag) for tag in tags]
    english = [tag for tag, han in zip(tags, is_chinese, strict=True) if not han][:1]
    chinese = [tag for tag, han in zip(tags, is_chinese, strict=True) if han][:1]
    return Scene(picture, Named((one.english, *english), (one.chinese, *chinese)))


def photograph(
    photo: Image.Image, draw: random.Random, masks: Sequence[Path], *, cut_out_share: float = 0.35
) -> Scene:
    """Return a drawn crop of a photograph, or something cut out of it on white; it has no name yet."""
    picture = _crop(photo, draw, least=0.04)
    if draw.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < cut_out_share:
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, (0, 0), _mask(draw, masks))
        picture = white
    return Scene(picture, None)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as drawing:
        return drawing.convert("RGBA")


def _crop(photo: Image.Image, draw: random.Random, *, least: float) -> Image.Image:
    """Return a crop of an area between ``least`` and all, at the size of the pictures."""
    width, height = photo.size
    area = np.exp(draw.uniform(np.log(least), 0.0)) * width * height
    ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
    wide, high = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = draw.randint(0, width - wide), draw.randint(0, height - high)
    box = (left, top, left + wide, top + high)
    return photo.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def _mask(draw: random.Random, masks: Sequence[Path]) -> Image.Image:
    """Return a soft mask: an ellipse, or the outline of a pictogram."""
    if not masks or draw.random() < 0.5:
        mask = Image.new("L", (SIZE_PX, SIZE_PX), 0)
        box = [draw.uniform(0, 0.2), draw.uniform(0, 0.2), draw.uniform(0.8, 1), draw.uniform(0.8, 1)]
        ImageDraw.Draw(mask).ellipse([SIZE_PX * edge for edge in box], fill=255)
        mask = mask.rotate(draw.uniform(0, 180), Image.Resampling.BILINEAR)
    else:
        outline = _open(draw.choice(masks)).getchannel("A")
        mask = outline.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
    return mask.filter(ImageFilter.GaussianBlur(1.0))


def _shifted_hue(drawing: Image.Image, draw: random.Random) -> Image.Image:
    """Return a drawing whose colours are a little others; its outline stays."""
    alpha = drawing.getchannel("A")
    levels = np.asarray(drawing.convert("RGB"), np.float32)
    gains = np.array([draw.uniform(0.8, 1.2) for _ in range(3)], np.float32)
    grey = levels.mean(axis=2, keepdims=True)
    mixed = grey + (levels - grey) * draw.uniform(0.5, 1.3)
    changed = Image.fromarray((mixed * gains + draw.uniform(-20, 20)).clip(0, 255).astype(np.uint8))
    changed.putalpha(alpha)
    return changed


def _ground(draw: random.Random, photographs: Sequence[Image.Image]) -> Image.Image:
    kind = draw.random()
    if kind < 0.5:
        level = 255 if kind < 0.4 else draw.randint(235, 254)
        return Image.new("RGB", (SIZE_PX, SIZE_PX), (level, level, level))
    if kind < 0.62 or (kind >= 0.85 and not photographs):
        shade = tuple(draw.randint(0, 255) for _ in range(3))
        return Image.new("RGB", (SIZE_PX, SIZE_PX), shade)
    if kind < 0.85:
        corners = np.frombuffer(draw.randbytes(12), np.uint8).reshape(2, 2, 3)
        ramp = Image.fromarray(corners).resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
        if kind < 0.74:
            return ramp
        noise = np.frombuffer(draw.randbytes(3 * SIZE_PX**2), np.uint8).reshape(SIZE_PX, SIZE_PX, 3)
        strength = draw.uniform(0.05, 0.5)
        return Image.blend(ramp, Image.fromarray(noise), strength)
    return _crop(draw.choice(photographs), draw, least=0.04)


# --- the table ---------------------------------------------------------------------------------------------


def write_table(
    directory: Path,
    scenes: Iterator[Scene],
    name_all: Callable[[NDArray[np.uint8]], Sequence[Named]],
    *,
    seed: int,
    batch_size: int = 64,
) -> int:
    """Write pictures and ``train.jsonl``, and return how many there are.

    Args:
        directory: to make; it appears when it is whole.
        scenes: what to write.
        name_all: gives names to pictures ``(n, SIZE_PX, SIZE_PX, 3)`` uint8 that have none.
        seed: of the captions' frames.
        batch_size: pictures named at once.
    """
    rows = 0
    with (
        whole_folder(directory) as unfinished,
        (unfinished / "train.jsonl").open("w", encoding="utf-8") as table,
    ):
        (unfinished / "images").mkdir()
        for group in _groups(scenes, batch_size):
            nameless = [scene.picture for scene in group if scene.named is None]
            given = iter(name_all(np.stack([np.asarray(each) for each in nameless])) if nameless else ())
            for scene in group:
                named = scene.named or next(given)
                image = f"images/{rows:06d}.jpg"
                scene.picture.convert("RGB").save(unfinished / image, quality=_QUALITY)
                draw = random.Random(f"caption {seed} {rows}")  # noqa: S311 - captions, not secrets
                row = {"image": image, **_captions(named, draw)}
                table.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows += 1
    return rows


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes ``folder`` when that is done."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    unfinished.rename(folder)


def _captions(named: Named, draw: random.Random) -> dict[str, list[str]]:
    """Return the captions of a picture: bare names and one of them in a frame, by language."""
    english, chinese = named.english, named.chinese
    return {
        "caption": [*english, draw.choice(_FRAMES).replace("{}", english[0])],
        "caption_zh": [*chinese, draw.choice(_CHINESE_FRAMES).replace("{}", chinese[0])],
    }


def _groups(scenes: Iterator[Scene], size: int) -> Iterator[list[Scene]]:
    group: list[Scene] = []
    for scene in scenes:
        group.append(scene)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
