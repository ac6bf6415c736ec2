"""Generated pictures with English and Chinese captions: colour × shape × count × position × texture.

A set whose every answer is known, for tests, calibration and small experiments; it says nothing about how a
model does on photographs. 8,000 combinations; one in ten is held out, and no picture of a held-out one is
ever in training, while every value and every pair of values is. Pictures of one combination differ in place,
size, turn, shade, background and noise.

    >>> combination = held_out_combinations()[0]
    >>> label(combination, "en")
    'one solid red circle at the top'
    >>> render(combination, seed=1, size_px=64).shape
    (64, 64, 3)

The same seed gives the same bytes on every machine: random numbers are SplitMix64 (Steele et al. 2014) and
not numpy's, whose streams may change; arithmetic on pixels is integer, that on edges uses only operations
that IEEE 754 rounds exactly (no sine, no power); nothing is drawn by a library. Changing what a seed gives
means a new ``VERSION``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as count_from
from itertools import product
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from edgeclip.errors import ConfigError

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    _Points: TypeAlias = NDArray[np.float64]
    _Mask: TypeAlias = NDArray[np.bool_]
    _Test: TypeAlias = Callable[[_Points, _Points], _Mask]

__all__ = [
    "COLOURS",
    "COUNTS",
    "LANGUAGES",
    "MAX_CAPTIONS",
    "MAX_SIZE_PX",
    "MIN_SIZE_PX",
    "POSITIONS",
    "SHAPES",
    "TEXTURES",
    "VERSION",
    "Combination",
    "captions",
    "check_size",
    "combinations",
    "held_out_combinations",
    "label",
    "ordered_combinations",
    "render",
    "training_combinations",
]

VERSION: Final = 1
LANGUAGES: Final = ("en", "zh")
MIN_SIZE_PX: Final = 32  # textures are not told apart in fewer
MAX_SIZE_PX: Final = 1024
_HELD_OUT_ONE_IN = 10
_T = TypeVar("_T")


# --- words -------------------------------------------------------------------------------------------------
# Of several words the first is the one in labels.


@dataclass(frozen=True)
class _Colour:
    rgb: tuple[int, int, int]
    en: tuple[str, ...]
    zh: tuple[str, ...]


@dataclass(frozen=True)
class _Shape:
    inside: _Test
    turns: bool  # whether quarter turns leave it the same shape
    en: tuple[str, str]  # one, several
    zh: tuple[tuple[str, str], ...]  # measure word, noun


@dataclass(frozen=True)
class _Texture:
    en: tuple[str, ...]
    en_phrase: str
    zh: tuple[str, ...]
    zh_clause: str


@dataclass(frozen=True)
class _Position:
    centre: tuple[float, float]  # x to the right, y down, as parts of the picture
    en: tuple[str, ...]
    zh: tuple[str, ...]


_COLOURS: dict[str, _Colour] = {
    "red": _Colour((212, 32, 38), ("red",), ("红色",)),
    "orange": _Colour((246, 134, 22), ("orange",), ("橙色", "橘色")),
    "yellow": _Colour((246, 222, 40), ("yellow",), ("黄色",)),
    "green": _Colour((34, 150, 62), ("green",), ("绿色",)),
    "blue": _Colour((34, 82, 206), ("blue",), ("蓝色",)),
    "purple": _Colour((126, 44, 160), ("purple", "violet"), ("紫色",)),
    "pink": _Colour((250, 140, 190), ("pink",), ("粉色", "粉红色")),
    "brown": _Colour((120, 72, 34), ("brown",), ("棕色", "褐色")),
    "black": _Colour((20, 20, 22), ("black",), ("黑色",)),
    "white": _Colour((246, 246, 244), ("white",), ("白色",)),
}
_NUMBERS_EN = {1: "one", 2: "two", 3: "three", 4: "four"}
_NUMBERS_ZH = {1: "一", 2: "两", 3: "三", 4: "四"}  # 两, not 二, before a measure word
_TEXTURES: dict[str, _Texture] = {
    "solid": _Texture(("solid", "plain"), "filled in evenly", ("实心", "纯色"), "全部涂满"),
    "striped": _Texture(("striped",), "with stripes", ("条纹",), "带条纹"),
    "dotted": _Texture(("dotted", "spotted"), "with dots", ("波点",), "带波点"),
    "hollow": _Texture(("hollow", "outlined"), "with only an outline", ("空心",), "只有轮廓"),
}
_POSITIONS: dict[str, _Position] = {
    "left": _Position((0.29, 0.5), ("on the left", "at the left side"), ("左边", "左侧")),
    "right": _Position((0.71, 0.5), ("on the right", "at the right side"), ("右边", "右侧")),
    "top": _Position((0.5, 0.29), ("at the top", "in the upper part"), ("上方", "上面")),
    "bottom": _Position((0.5, 0.71), ("at the bottom", "in the lower part"), ("下方", "下面")),
    "centre": _Position((0.5, 0.5), ("in the middle", "in the centre"), ("中间", "中央")),
}


# --- outlines ----------------------------------------------------------------------------------------------
# Each takes local coordinates, u to the right and v down, and fills about the unit circle.


def _circle(u: _Points, v: _Points) -> _Mask:
    inside: _Mask = u * u + v * v <= 0.92
    return inside


def _square(u: _Points, v: _Points) -> _Mask:
    inside: _Mask = np.maximum(abs(u), abs(v)) <= 0.84
    return inside


def _cross(u: _Points, v: _Points) -> _Mask:
    across, along = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    inside: _Mask = (across <= 0.35) & (along <= 0.95)
    return inside


def _diamond(u: _Points, v: _Points) -> _Mask:
    inside: _Mask = abs(u) / 0.7 + abs(v) / 1.12 <= 1.0
    return inside


def _crescent(u: _Points, v: _Points) -> _Mask:
    w = u - 0.58
    inside: _Mask = (u * u + v * v <= 1.0) & (w * w + v * v > 0.64)
    return inside


def _half_circle(u: _Points, v: _Points) -> _Mask:
    w = v - 0.45
    inside: _Mask = (u * u + w * w <= 1.1) & (v <= 0.45)
    return inside


def _heart(u: _Points, v: _Points) -> _Mask:
    x, y = 1.18 * u, 0.12 - 1.18 * v
    squared = x * x + y * y - 1.0
    inside: _Mask = squared * squared * squared <= x * x * y * y * y
    return inside


def _polygon(*corners: tuple[float, float]) -> _Test:
    """Return a test for points inside: a ray to the right crosses an odd number of edges."""

    def inside(u: _Points, v: _Points) -> _Mask:
        odd = np.zeros(np.broadcast_shapes(u.shape, v.shape), np.bool_)
        for (u0, v0), (u1, v1) in zip(corners, (*corners[1:], corners[0]), strict=True):
            if v0 != v1:
                between = (v0 > v) != (v1 > v)
                odd ^= between & (u < (u1 - u0) * (v - v0) / (v1 - v0) + u0)
        return odd

    return inside


_STAR = (
    *((0.0, -1.1), (0.303, -0.417), (1.046, -0.34), (0.49, 0.159), (0.647, 0.89)),
    *((0.0, 0.515), (-0.647, 0.89), (-0.49, 0.159), (-1.046, -0.34), (-0.303, -0.417)),
)
_ARROW = ((-1.0, -0.34), (0.0, -0.34), (0.0, -0.92), (1.0, 0.0), (0.0, 0.92), (0.0, 0.34), (-1.0, 0.34))

_SHAPES: dict[str, _Shape] = {
    "circle": _Shape(_circle, True, ("circle", "circles"), (("个", "圆形"), ("个", "圆"))),
    "square": _Shape(_square, True, ("square", "squares"), (("个", "正方形"), ("个", "方块"))),
    "triangle": _Shape(
        _polygon((0.0, -1.05), (1.0, 0.75), (-1.0, 0.75)),
        False,
        ("triangle", "triangles"),
        (("个", "三角形"),),
    ),
    "star": _Shape(_polygon(*_STAR), False, ("star", "stars"), (("颗", "星星"), ("个", "五角星"))),
    "heart": _Shape(_heart, False, ("heart", "hearts"), (("颗", "爱心"), ("个", "心形"))),
    "cross": _Shape(_cross, True, ("cross", "crosses"), (("个", "十字"),)),
    "crescent": _Shape(_crescent, True, ("crescent", "crescents"), (("个", "月牙"), ("弯", "月牙"))),
    "diamond": _Shape(_diamond, False, ("diamond", "diamonds"), (("个", "菱形"),)),
    "arrow": _Shape(_polygon(*_ARROW), True, ("arrow", "arrows"), (("个", "箭头"),)),
    "half-circle": _Shape(
        _half_circle, True, ("half circle", "half circles"), (("个", "半圆形"), ("个", "半圆"))
    ),
}

COLOURS: Final = tuple(_COLOURS)
SHAPES: Final = tuple(_SHAPES)
COUNTS: Final = tuple(_NUMBERS_EN)
POSITIONS: Final = tuple(_POSITIONS)
TEXTURES: Final = tuple(_TEXTURES)


# --- combinations ------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Combination:
    """What a picture shows.

    Raises:
        ConfigError: a value that the set does not have.
    """

    colour: str
    shape: str
    count: int
    position: str
    texture: str

    def __post_init__(self) -> None:
        for name, values in _ATTRIBUTES.items():
            value = getattr(self, name)
            if value not in values:
                raise ConfigError(
                    f"shapes: {name} is {value!r}, expected one of {', '.join(map(str, values))}."
                )

    @property
    def key(self) -> str:
        """Its name in files: ``"red-circle-2-left-striped"``."""
        return f"{self.colour}-{self.shape}-{self.count}-{self.position}-{self.texture}"

    @property
    def held_out(self) -> bool:
        """Whether it is kept out of training; drawn from its key, so it never changes."""
        return _Random("split", self.key).below(_HELD_OUT_ONE_IN) == 0


_ATTRIBUTES: dict[str, tuple[object, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "count": COUNTS,
    "position": POSITIONS,
    "texture": TEXTURES,
}


@lru_cache(maxsize=1)
def combinations() -> tuple[Combination, ...]:
    """Return all combinations, in the order of the attributes' values."""
    return tuple(Combination(*values) for values in product(COLOURS, SHAPES, COUNTS, POSITIONS, TEXTURES))


@lru_cache(maxsize=1)
def training_combinations() -> tuple[Combination, ...]:
    """Return the combinations of which training may see pictures."""
    return tuple(combination for combination in combinations() if not combination.held_out)


@lru_cache(maxsize=1)
def held_out_combinations() -> tuple[Combination, ...]:
    """Return the combinations kept for evaluation; each value and each pair of values is in training."""
    return tuple(combination for combination in combinations() if combination.held_out)


def ordered_combinations(held_out: bool, seed: int) -> Iterator[Combination]:
    """Yield the combinations of a split in random order, for ever: each once, then again in another order."""
    known = held_out_combinations() if held_out else training_combinations()
    for turn in count_from():
        yield from _Random("order", held_out, seed, turn).shuffled(known)


class _Random:
    """SplitMix64 (Steele et al. 2014, figure 17), seeded with a hash of ``key``."""

    def __init__(self, *key: object) -> None:
        text = "\x1f".join(("edgeclip shapes", str(VERSION), *map(str, key)))
        self.state = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def next(self) -> int:
        """Return the next 64 bits."""
        self.state = (self.state + _GAMMA) & _MASK64
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        return z ^ (z >> 31)

    def below(self, end: int) -> int:
        """Return a number from 0 to ``end - 1``."""
        return (self.next() * end) >> 64

    def spread(self, most: int) -> int:
        """Return a number from ``-most`` to ``most``."""
        return self.below(2 * most + 1) - most

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * ((self.next() >> 11) * 2.0**-53)

    def pick(self, values: Sequence[_T]) -> _T:
        return values[self.below(len(values))]

    def shuffled(self, values: Sequence[_T]) -> list[_T]:
        """Return the values in a random order (Fisher and Yates)."""
        shuffled = list(values)
        for last in range(len(shuffled) - 1, 0, -1):
            other = self.below(last + 1)
            shuffled[last], shuffled[other] = shuffled[other], shuffled[last]
        return shuffled

    def bytes(self, count: int) -> NDArray[np.int32]:
        """Return ``count`` numbers from 0 to 255, the same as from :meth:`next`, made by numpy."""
        words = -(-count // 8)
        z = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(self.state)
        self.state = (self.state + words * _GAMMA) & _MASK64
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        numbers: NDArray[np.int32] = z.astype("<u8").view(np.uint8)[:count].astype(np.int32)
        return numbers


_GAMMA, _MASK64 = 0x9E3779B97F4A7C15, (1 << 64) - 1


# --- captions ----------------------------------------------------------------------------------------------


def label(combination: Combination, language: str) -> str:
    """Return the one sentence that stands for a combination among labels.

    Raises:
        ConfigError: ``language`` is not ``"en"`` or ``"zh"``.
    """
    return _phrasings(combination, language, None)[0]


def captions(combination: Combination, language: str, seed: int, *, count: int = 1) -> tuple[str, ...]:
    """Return captions that differ in words and word order; the same seed gives the same ones.

    Args:
        combination: what the picture shows.
        language: ``"en"`` or ``"zh"``.
        seed: chooses the phrasings.
        count: how many, all different, at most ``MAX_CAPTIONS``.

    Raises:
        ConfigError: ``language`` or ``count`` is out of range.
    """
    if not 1 <= count <= MAX_CAPTIONS:
        raise ConfigError(f"shapes: count of captions is {count!r}, expected 1 to {MAX_CAPTIONS}.")
    random = _Random("caption", language, combination.key, seed)
    return tuple(random.shuffled(_phrasings(combination, language, random))[:count])


MAX_CAPTIONS: Final = 7


def _phrasings(combination: Combination, language: str, random: _Random | None) -> list[str]:
    """Return every phrasing once, with the words of labels or with drawn ones; the first is the label's."""
    if language not in LANGUAGES:
        raise ConfigError(f"shapes: language is {language!r}, expected one of {', '.join(LANGUAGES)}.")
    return (_phrasings_en if language == "en" else _phrasings_zh)(combination, random)


def _word(words: Sequence[_T], random: _Random | None) -> _T:
    return words[0] if random is None else random.pick(words)


def _phrasings_en(combination: Combination, random: _Random | None) -> list[str]:
    texture = _TEXTURES[combination.texture]
    colour = _word(_COLOURS[combination.colour].en, random)
    adjective, phrase = _word(texture.en, random), texture.en_phrase
    where = _word(_POSITIONS[combination.position].en, random)
    several = combination.count > 1
    noun = _SHAPES[combination.shape].en[several]
    number = _NUMBERS_EN[combination.count]

    def some(following: str) -> str:
        if several:
            return f"{number} {following}"
        article = "an" if following[0] in "aeiou" else "a"
        return f"{_word(('one', article), random)} {following}"

    return [
        some(f"{adjective} {colour} {noun} {where}"),
        some(f"{colour} {adjective} {noun} {where}"),
        f"{where} there {'are' if several else 'is'} {some(f'{adjective} {colour} {noun}')}",
        f"a picture of {some(f'{colour} {noun} {phrase} {where}')}",
        f"{where}, {some(f'{colour} {noun} {phrase}')}",
        f"{some(noun)} {where}, {colour} and {adjective}",
        f"{colour} {adjective} {noun}, {f'{number} of them' if several else 'a single one'}, {where}",
    ]


def _phrasings_zh(combination: Combination, random: _Random | None) -> list[str]:
    texture = _TEXTURES[combination.texture]
    colour = _word(_COLOURS[combination.colour].zh, random)
    adjective, clause = _word(texture.zh, random), texture.zh_clause
    where = _word(_POSITIONS[combination.position].zh, random)
    measure, noun = _word(_SHAPES[combination.shape].zh, random)
    number = _NUMBERS_ZH[combination.count] + measure
    return [
        f"{where}有{number}{colour}{adjective}{noun}",
        f"图片{where}是{number}{clause}的{colour}{noun}",
        f"{number}{colour}的{adjective}{noun},在{where}",
        f"{number}{colour}{noun},{clause},位于{where}",
        f"{where}的{number}{colour}{adjective}{noun}",
        f"{colour}{noun}{number},{clause},在图片{where}",
        f"在{where}可以看到{number}{adjective}的{colour}{noun}",
    ]


# --- pictures ----------------------------------------------------------------------------------------------

_SUPERSAMPLING = 4
_CONTRAST = 62  # least difference in brightness between an object and its background, of 255
_SPACING = 0.145  # from the middle of a group to its objects, as part of the picture
_TAN_22_5 = 0.41421356237309503
# Half sizes of the objects of a group, by their number; they just do not touch.
_HALF_SIZE = {1: (0.19, 0.235), 2: (0.12, 0.137), 3: (0.112, 0.13), 4: (0.112, 0.13)}
_GROUPS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    1: (((0, 0),),),
    2: (((-1, 0), (1, 0)), ((0, -1), (0, 1)), ((-0.9, -0.9), (0.9, 0.9)), ((0.9, -0.9), (-0.9, 0.9))),
    3: (((0, -0.95), (-1, 0.9), (1, 0.9)), ((0, 0.95), (-1, -0.9), (1, -0.9))),
    4: (((-1, -1), (1, -1), (-1, 1), (1, 1)),),
}


def render(combination: Combination, seed: int, *, size_px: int = 64) -> NDArray[np.uint8]:
    """Draw a picture of a combination.

    Takes about a millisecond at 64 px. One seed gives one scene, whatever the size; only the noise differs.

    Args:
        combination: what to draw.
        seed: chooses everything else.
        size_px: side of the picture, 32 to 1024.

    Returns:
        ``(size_px, size_px, 3)`` uint8 RGB, owned by the caller.

    Raises:
        ConfigError: ``size_px`` is out of range.
    """
    check_size(size_px)
    random = _Random("picture", combination.key, seed)
    red, green, blue = _COLOURS[combination.colour].rgb
    ink = np.array([min(255, max(0, level + random.spread(12))) for level in (red, green, blue)], np.int32)
    brightness = (299 * red + 587 * green + 114 * blue) // 1000
    picture = _background(random, brightness, size_px)
    for coverage, top, left in _objects(combination, random, size_px):
        part = picture[top : top + coverage.shape[0], left : left + coverage.shape[1]]
        full = _SUPERSAMPLING * _SUPERSAMPLING
        part += ((ink - part) * coverage[..., None] + full // 2) // full
    noise = random.below(9)
    levels = random.bytes(size_px * size_px * 3).reshape(size_px, size_px, 3)
    noisy = np.clip(picture + (levels * (2 * noise + 1) // 256 - noise), 0, 255)
    pixels: NDArray[np.uint8] = noisy.astype(np.uint8)
    return pixels


def check_size(size_px: int) -> None:
    """Raise ``ConfigError`` unless pictures can be drawn at this size."""
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise ConfigError(f"shapes: size_px is {size_px!r}, expected {MIN_SIZE_PX} to {MAX_SIZE_PX}.")


def _background(random: _Random, brightness: int, size_px: int) -> NDArray[np.int32]:
    """Return ``(S, S, 3)``: a greyish shade far from ``brightness``, with a slope and blotches."""
    grey = random.pick([level for level in range(48, 209) if abs(level - brightness) >= _CONTRAST])
    shade = np.array([grey + random.spread(11) for _ in range(3)], np.int32)
    slope_x, slope_y, blotch = random.spread(12), random.spread(12), random.below(12)
    place = 2 * np.arange(size_px, dtype=np.int32) + 1  # the middle of a pixel, in half pixels
    slope = (slope_x * (place - size_px)[None, :] + slope_y * (place - size_px)[:, None]) // size_px
    # Blotches: random levels at the corners of a 4 × 4 grid, linear between them, in steps of 1/256.
    grid = np.array([random.spread(blotch) for _ in range(25)], np.int32).reshape(5, 5)
    cell, part = np.divmod(place * 512 // size_px, 256)
    rows = grid[cell] * (256 - part[:, None]) + grid[cell + 1] * part[:, None]  # (S, 5)
    blotches = (rows[:, cell] * (256 - part) + rows[:, cell + 1] * part) >> 16  # (S, S)
    background: NDArray[np.int32] = shade + (slope + blotches)[..., None]
    return background


def _objects(
    combination: Combination, random: _Random, size_px: int
) -> list[tuple[NDArray[np.int32], int, int]]:
    """Return for each object how much of each pixel it covers, of 16, and where that block lies."""
    x, y = _POSITIONS[combination.position].centre
    # Along the side a group may slide further than away from it.
    x += random.between(-0.08, 0.08) if combination.position in ("top", "bottom") else _near(random)
    y += random.between(-0.08, 0.08) if combination.position in ("left", "right") else _near(random)
    half_size = random.between(*_HALF_SIZE[combination.count])
    texture = _texture(combination.texture, random)
    objects = []
    for dx, dy in random.pick(_GROUPS[combination.count]):
        objects.append(
            _object(
                _SHAPES[combination.shape],
                texture,
                random,
                centre=(x + _SPACING * dx + _near(random) / 2, y + _SPACING * dy + _near(random) / 2),
                half_size=half_size * random.between(0.9, 1.0),
                size_px=size_px,
            )
        )
    return objects


def _near(random: _Random) -> float:
    return random.between(-0.015, 0.015)


def _object(
    shape: _Shape,
    texture: _Test | None,
    random: _Random,
    *,
    centre: tuple[float, float],
    half_size: float,
    size_px: int,
) -> tuple[NDArray[np.int32], int, int]:
    fine = size_px * _SUPERSAMPLING
    reach = half_size * 1.3
    (left, right), (top, bottom) = (
        (max(0, int((middle - reach) * size_px)), min(size_px, int((middle + reach) * size_px) + 1))
        for middle in centre
    )
    x = (np.arange(left * _SUPERSAMPLING, right * _SUPERSAMPLING) + 0.5) / fine - centre[0]
    y = (np.arange(top * _SUPERSAMPLING, bottom * _SUPERSAMPLING) + 0.5) / fine - centre[1]
    x, y = _turned(x[None, :], y[:, None], random.between(-0.11, 0.11))  # up to 12.6 degrees
    u, v = x / half_size, y / half_size
    if shape.turns:
        for _ in range(random.below(4)):
            u, v = v, -u
    inside = shape.inside(u, v)
    if texture is not None:
        inside &= texture(x, y) | ~_shrunk(inside, max(1, size_px * _SUPERSAMPLING // 60))
    height, width = bottom - top, right - left
    samples = inside.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING)
    return samples.sum(axis=(1, 3), dtype=np.int32), top, left


def _turned(x: _Points, y: _Points, tan_half: float) -> tuple[_Points, _Points]:
    """Turn coordinates by the angle whose half has this tangent: exact arithmetic, no sine."""
    squared = tan_half * tan_half
    cosine, sine = (1.0 - squared) / (1.0 + squared), 2.0 * tan_half / (1.0 + squared)
    return x * cosine + y * sine, y * cosine - x * sine


def _shrunk(inside: _Mask, by: int) -> _Mask:
    """Return where all samples within ``by`` to the four sides are inside: what an outline leaves."""
    shrunk = inside.copy()
    for step in range(1, by + 1):
        shrunk[step:] &= inside[:-step]
        shrunk[:-step] &= inside[step:]
        shrunk[:, step:] &= inside[:, :-step]
        shrunk[:, :-step] &= inside[:, step:]
    return shrunk


def _texture(name: str, random: _Random) -> _Test | None:
    """Return where a texture has ink, for coordinates in parts of the picture; None for all of it."""
    if name == "solid":
        return None
    turn = random.pick((0.0, _TAN_22_5, -_TAN_22_5, 1.0) if name == "striped" else (0.0, _TAN_22_5))
    period = random.between(0.074, 0.088)
    shift = random.between(0.4, 0.6), random.between(0.4, 0.6)  # thin shapes keep a dot in their middle

    def inked(x: _Points, y: _Points) -> _Mask:
        if name == "hollow":
            return np.zeros(x.shape, np.bool_)
        x, y = _turned(x, y, turn)
        a, b = x / period + shift[0], y / period + shift[1]  # in periods
        if name == "striped":
            ink: _Mask = a - np.floor(a) < 0.5
        else:
            a, b = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
            ink = a * a + b * b < 0.105
        return ink

    return inked
