"""The fourteen operations of RandAugment on PIL pictures, pixel by pixel as torchvision's.

Names, order and ranges are those of torchvision's ``RandAugment`` (Cubuk et al. 2020). What moves in from
outside is black, and geometry takes the nearest pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

__all__ = ["OPERATIONS", "OperationKind"]

_Apply: TypeAlias = Callable[[Image.Image, float], Image.Image]
_Magnitude: TypeAlias = Callable[[int, int, tuple[int, int]], float]
_Enhancer: TypeAlias = (
    ImageEnhance.Brightness | ImageEnhance.Color | ImageEnhance.Contrast | ImageEnhance.Sharpness
)

_BLACK = (0, 0, 0)
_SHARE_MOVED = 150 / 331
# Larger than any crop: farther moves are all the same black.
_FARTHEST_PX = 65536.0


def _ramp(first: float, last: float, bin_index: int, bins: int) -> float:
    """Return one of ``bins`` values from first to last, in float32 as torch (to the last place)."""
    low, high = np.float32(first), np.float32(last)
    step = (high - low) / np.float32(bins - 1)
    if bin_index < bins // 2:  # from the nearer end, as torch.linspace
        return float(low + step * np.float32(bin_index))
    return float(high - step * np.float32(bins - 1 - bin_index))


def _up_to(largest: float) -> _Magnitude:
    return lambda bin_index, bins, size_px: _ramp(0.0, largest, bin_index, bins)


def _nothing(bin_index: int, bins: int, size_px: tuple[int, int]) -> float:
    return 0.0


@dataclass(frozen=True)
class OperationKind:
    """One kind of operation.

    Attributes:
        name: torchvision's.
        apply: a picture of mode RGB and a magnitude to a new picture of the same size, or to the same one.
        magnitude: bin, number of bins and ``(H, W)`` of the picture to the magnitude before its sign.
        signed: whether half of the magnitudes are negated.
        limits: smallest and largest magnitude accepted; wider than what is drawn here, for parameters drawn
            by others (torchvision's ``TrivialAugmentWide`` fits too).
    """

    name: str
    apply: _Apply
    magnitude: _Magnitude = _nothing
    signed: bool = False
    limits: tuple[float, float] = (0.0, 0.0)


def _identity(image: Image.Image, magnitude: float) -> Image.Image:
    return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Take pixel ``(x, y)`` from ``(ax + by + c, dx + ey + f)``; the matrix is ``(a, b, c, d, e, f)``."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=_BLACK
    )


def _angle(slope: float) -> float:
    """Return the angle of a slope in radians, by way of degrees: that rounding may decide a pixel."""
    return math.radians(math.degrees(math.atan(slope)))


def _shear_x(image: Image.Image, slope: float) -> Image.Image:
    return _affine(image, 1.0, math.tan(_angle(slope)), 0.0, 0.0, 1.0, 0.0)


def _shear_y(image: Image.Image, slope: float) -> Image.Image:
    angle = _angle(slope)
    return _affine(image, 1.0, 0.0, 0.0, math.sin(angle) / math.cos(angle), 1.0, 0.0)


def _translate_x(image: Image.Image, pixels: float) -> Image.Image:
    return _affine(image, 1.0, 0.0, -int(pixels), 0.0, 1.0, 0.0)


def _translate_y(image: Image.Image, pixels: float) -> Image.Image:
    return _affine(image, 1.0, 0.0, 0.0, 0.0, 1.0, -int(pixels))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=_BLACK)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    return ImageOps.posterize(image, int(bits))


def _bits_kept(bin_index: int, bins: int, size_px: tuple[int, int]) -> float:
    return float(8 - round(bin_index / ((bins - 1) / 4)))


def _solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(level))


def _auto_contrast(image: Image.Image, magnitude: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, magnitude: float) -> Image.Image:
    return ImageOps.equalize(image)


def _signed(name: str, apply: _Apply, magnitude: _Magnitude, limit: float) -> OperationKind:
    return OperationKind(name, apply, magnitude, signed=True, limits=(-limit, limit))


def _enhancement(name: str, enhancer: type[_Enhancer]) -> OperationKind:
    def apply(image: Image.Image, magnitude: float) -> Image.Image:
        return enhancer(image).enhance(1.0 + magnitude)

    return _signed(name, apply, _up_to(0.9), 1.0)


OPERATIONS: tuple[OperationKind, ...] = (
    OperationKind("Identity", _identity),
    _signed("ShearX", _shear_x, _up_to(0.3), 1.0),
    _signed("ShearY", _shear_y, _up_to(0.3), 1.0),
    _signed(
        "TranslateX",
        _translate_x,
        lambda bin_index, bins, size_px: _ramp(0.0, _SHARE_MOVED * size_px[1], bin_index, bins),
        _FARTHEST_PX,
    ),
    _signed(
        "TranslateY",
        _translate_y,
        lambda bin_index, bins, size_px: _ramp(0.0, _SHARE_MOVED * size_px[0], bin_index, bins),
        _FARTHEST_PX,
    ),
    _signed("Rotate", _rotate, _up_to(30.0), 180.0),
    _enhancement("Brightness", ImageEnhance.Brightness),
    _enhancement("Color", ImageEnhance.Color),
    _enhancement("Contrast", ImageEnhance.Contrast),
    _enhancement("Sharpness", ImageEnhance.Sharpness),
    OperationKind("Posterize", _posterize, _bits_kept, limits=(1.0, 8.0)),
    OperationKind(
        "Solarize",
        _solarize,
        lambda bin_index, bins, size_px: _ramp(255.0, 0.0, bin_index, bins),
        limits=(0.0, 256.0),
    ),
    OperationKind("AutoContrast", _auto_contrast),
    OperationKind("Equalize", _equalize),
)
"""The operations of RandAugment, in the order in which stored parameters count them."""
