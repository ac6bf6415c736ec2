"""Pictograms on coloured grounds with English captions: concept × ground × place × size × turn.

The drawings are emoji of two sets that `edgeclip data fetch pictograms` gets: Noto (Apache-2.0) and Fluent
(MIT). Pictures of one combination differ in the set, place, size, tilt, mirroring, shade and noise. 8,000
combinations; one in ten is held out, and no picture of a held-out one is among those to train on, while every
pair of values is. Nothing of the drawings is part of the distribution.

    >>> label(Combination("1f98a", "green", "left", "small", "upright"))
    'a small upright fox on the left of a green ground'
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice, product
from pathlib import Path

import numpy as np
from PIL import Image

from edgeclip.fetch import materials

SIZE_PX = 64
HELD_OUT_ONE_IN = 10
_DRAWING_PX = 64  # of Noto's pictures
# Of several words the first is the one in labels. Only drawings with one right way up.
CONCEPTS = {
    "1f412": ("monkey",), "1f436": ("dog", "puppy"), "1f43a": ("wolf",), "1f98a": ("fox",),
    "1f431": ("cat", "kitten"), "1f981": ("lion",), "1f42f": ("tiger",), "1f984": ("unicorn",),
    "1f993": ("zebra",), "1f42e": ("cow",), "1f437": ("pig",), "1f992": ("giraffe",), "1f418": ("elephant",),
    "1f430": ("rabbit", "bunny"), "1f43b": ("bear",), "1f43c": ("panda",), "1f413": ("rooster", "cockerel"),
    "1f427": ("penguin",), "1f989": ("owl",), "1f438": ("frog",), "1f419": ("octopus",), "1f980": ("crab",),
    "1f33b": ("sunflower",), "1f337": ("tulip",), "1f332": ("fir tree", "evergreen"), "1f334": ("palm tree",),
    "1f335": ("cactus",), "1f344": ("mushroom", "toadstool"), "1f347": ("bunch of grapes",),
    "1f34d": ("pineapple",), "1f353": ("strawberry",), "1f352": ("pair of cherries",),
    "1f354": ("hamburger", "burger"), "1f368": ("bowl of ice cream",), "1f382": ("birthday cake",),
    "1f377": ("glass of wine", "wine glass"), "1f3e0": ("house",), "1f3f0": ("castle",),
    "26fa": ("tent",), "1f682": ("steam engine", "locomotive"), "1f68c": ("bus",), "1f697": ("car",),
    "26f5": ("sailing boat", "sailboat"), "1f680": ("rocket",), "2614": ("umbrella",),
    "26c4": ("snowman",), "1f3c6": ("trophy",), "1f451": ("crown",), "1f514": ("bell",), "1f511": ("key",),
}  # fmt: skip
GROUNDS = {
    "red": (206, 60, 58), "orange": (240, 150, 60), "yellow": (244, 224, 96), "green": (92, 168, 96),
    "blue": (76, 118, 208), "purple": (142, 88, 172), "grey": (140, 140, 144), "white": (242, 242, 240),
}  # fmt: skip
PLACES = {
    "left": ((0.31, 0.5), ("on the left of",)),
    "right": ((0.69, 0.5), ("on the right of",)),
    "top": ((0.5, 0.31), ("at the top of",)),
    "bottom": ((0.5, 0.69), ("at the bottom of",)),
    "centre": ((0.5, 0.5), ("in the middle of", "in the centre of")),
}
SIZES = {"small": (0.34, ("small", "little")), "large": (0.56, ("large", "big"))}
TURNS = {"upright": (0, ("upright", "standing")), "upside down": (180, ("upside-down", "inverted"))}


@dataclass(frozen=True)
class Combination:
    """What a picture shows: keys of the tables above."""

    concept: str
    ground: str
    place: str
    size: str
    turn: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept out of training; drawn from its values, so it never changes."""
        text = "-".join(asdict(self).values())
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def combinations(*, held_out: bool) -> list[Combination]:
    """Return all combinations of a split, in the order of the tables."""
    every = (Combination(*values) for values in product(CONCEPTS, GROUNDS, PLACES, SIZES, TURNS))
    return [each for each in every if each.held_out == held_out]


def label(combination: Combination) -> str:
    """Return the one sentence that stands for a combination among labels."""
    return _phrases(combination, lambda words: words[0])[0]


def caption(combination: Combination, draw: random.Random) -> str:
    """Return a sentence with drawn words and order."""
    return draw.choice(_phrases(combination, draw.choice))


def _phrases(combination: Combination, pick: Callable[[Sequence[str]], str]) -> list[str]:
    """Return every phrasing, its words chosen by ``pick``; the first is the label's."""
    size, turn = pick(SIZES[combination.size][1]), pick(TURNS[combination.turn][1])
    name, where = pick(CONCEPTS[combination.concept]), pick(PLACES[combination.place][1])
    ground = _some(f"{combination.ground} {pick(('ground', 'background'))}")
    return [
        f"a {size} {turn} {name} {where} {ground}",
        f"{_some(turn)} {size} {name} {where} {ground}",
        f"{where} {ground} there is a {size} {turn} {name}",
        f"{ground} with a {size} {turn} {name} {where} it",
    ]


def _some(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class Drawings:
    """The emoji of both sets, by concept."""

    def __init__(self) -> None:
        folders = materials("pictograms")
        noto = folders["emoji-datasource-google"] / "img/google/64"
        fluent = folders["@lobehub/fluent-emoji-3d"] / "assets"
        self.by_concept = {
            concept: [_read(noto / f"{concept}.png"), _read(fluent / f"{concept}.webp")]
            for concept in CONCEPTS
        }


def _read(path: Path) -> Image.Image:
    """Return a drawing at the size of the smaller set, with room to turn it."""
    drawing = Image.open(path).convert("RGBA").resize((_DRAWING_PX,) * 2, Image.Resampling.LANCZOS)
    roomy = Image.new("RGBA", (_DRAWING_PX * 3 // 2,) * 2)
    roomy.paste(drawing, (_DRAWING_PX // 4,) * 2)
    return roomy


def render(combination: Combination, drawings: Drawings, draw: random.Random) -> Image.Image:
    """Return a picture of a combination."""
    drawing = draw.choice(drawings.by_concept[combination.concept])
    if draw.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = round(SIZE_PX * SIZES[combination.size][0] * draw.uniform(0.9, 1.1))
    turn = TURNS[combination.turn][0] + draw.uniform(-15, 15)
    drawing = drawing.rotate(turn, Image.Resampling.BICUBIC)
    drawing = drawing.resize((side * 3 // 2,) * 2, Image.Resampling.LANCZOS)
    picture = _ground(combination.ground, draw)
    corner = [
        round(SIZE_PX * (at + draw.uniform(-0.05, 0.05)) - drawing.width / 2)
        for at in PLACES[combination.place][0]
    ]
    picture.paste(drawing, (corner[0], corner[1]), drawing)
    return picture


def _ground(name: str, draw: random.Random) -> Image.Image:
    shade = [level + draw.uniform(-14, 14) for level in GROUNDS[name]]
    across, down = draw.uniform(-16, 16), draw.uniform(-16, 16)
    ramp = np.linspace(-1, 1, SIZE_PX)
    noise = np.frombuffer(draw.randbytes(3 * SIZE_PX**2), np.uint8).reshape(SIZE_PX, SIZE_PX, 3) / 255 - 0.5
    levels = np.array(shade) + (across * ramp + down * ramp[:, None])[..., None] + 12 * noise
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def write_pictograms(directory: Path, splits: dict[str, int]) -> None:
    """Write pictures and captions: ``SPLIT.jsonl`` for each split, and ``labels.json``.

    Args:
        directory: to make; one that is there is complete and stays as it is.
        splits: pictures by split; ``held_out`` shows held-out combinations, all others show the rest.
    """
    if directory.is_dir():
        return
    drawings, unfinished = Drawings(), directory.with_name(f"{directory.name}.unfinished")
    for split, pictures in splits.items():
        (unfinished / "images" / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for index, combination in enumerate(islice(_ordered(split), pictures)):
            draw, image = random.Random(f"{split} {index}"), f"images/{split}/{index:06d}.png"
            render(combination, drawings, draw).save(unfinished / image)
            row = {"image": image, "caption": caption(combination, draw), "label": label(combination)}
            rows.append(json.dumps(row | asdict(combination)) + "\n")
        (unfinished / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    labels = {"labels": [label(each) for each in combinations(held_out=True)]}
    (unfinished / "labels.json").write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(directory)


def _ordered(split: str) -> Iterator[Combination]:
    """Yield a split's combinations for ever: each once, then again in another order."""
    known = combinations(held_out=split == "held_out")
    for turn in count():
        yield from random.Random(f"order {split} {turn}").sample(known, len(known))
