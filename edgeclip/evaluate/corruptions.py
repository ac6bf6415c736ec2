"""Pictures made worse on purpose: fourteen corruptions at five severities.

The families are the classic ones of Hendrycks & Dietterich 2019 ("Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations") that need no further pictures: noise (gaussian, shot, impulse,
speckle), blur (defocus, gaussian, motion, zoom), weather and light (fog, brightness, contrast, saturate) and
what files do (pixelate, jpeg). Snow, frost, spatter, glass and elastic are left out. The strengths below are
ours, in the style of ImageNet-C: accuracies are not comparable with published ones.

A corruption works on the picture as the tower gets it, so that nothing of it is averaged away by resizing.
Lengths are given for a side of 224 pixels and follow the side, except JPEG's blocks of 8. Chance (noise, the
direction of motion, fog) is a pure function of seed, picture and corruption; another severity has the same
noise, stronger.

    >>> corrupt(picture, "gaussian-noise", 3, key="photos/cat.jpg")                        # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip.errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)
_REFERENCE_PX = 224


def corrupt(
    picture: NDArray[np.uint8], name: str, severity: int, *, key: str = "", seed: int = 0
) -> NDArray[np.uint8]:
    """Return a picture with a corruption.

    Args:
        picture: ``(H, W, 3)`` uint8 RGB; not changed.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        key: which picture this is; its chance depends on it.
        seed: another seed, other chance.

    Raises:
        ConfigError: an unknown corruption or severity.
        InputError: another shape or dtype.
    """
    if name not in CORRUPTIONS:
        raise ConfigError(f"corruption {name!r} is not known; expected one of {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity of {name!r} is {severity!r}, expected a whole number from 1 to 5.")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise InputError(f"picture: got {picture.dtype} {picture.shape}, expected uint8 (H, W, 3).")
    digest = hashlib.sha256(f"{seed}\0{key}\0{name}".encode("utf-8", "surrogatepass")).digest()
    random = np.random.default_rng(list(digest[:16]))
    levels = _FUNCTIONS[name](picture / 255.0, CORRUPTIONS[name][severity - 1], random)
    worse: NDArray[np.uint8] = (np.clip(levels, 0, 1) * 255).round().astype(np.uint8)
    return worse


# --- noise: on levels in [0, 1] ----------------------------------------------------------------------------


def _gaussian_noise(x: Array, deviation: float, random: np.random.Generator) -> Array:
    return x + random.normal(0, 1, x.shape) * deviation


def _shot_noise(x: Array, photons: float, random: np.random.Generator) -> Array:
    return random.poisson(x * photons) / photons


def _impulse_noise(x: Array, share: float, random: np.random.Generator) -> Array:
    chance = random.random(x.shape)
    return np.where(chance < share / 2, 0.0, np.where(chance > 1 - share / 2, 1.0, x))


def _speckle_noise(x: Array, deviation: float, random: np.random.Generator) -> Array:
    return x + x * random.normal(0, 1, x.shape) * deviation


# --- blur --------------------------------------------------------------------------------------------------


def _defocus_blur(x: Array, radius: float, random: np.random.Generator) -> Array:
    radius *= _relative(x)
    down, across = _grid(radius + 1)
    return _convolved(x, np.clip(radius + 0.5 - np.hypot(down, across), 0, 1))


def _gaussian_blur(x: Array, deviation: float, random: np.random.Generator) -> Array:
    deviation *= _relative(x)
    down, across = _grid(4 * deviation + 1)
    return _convolved(x, np.exp(-(down**2 + across**2) / (2 * deviation**2)))


def _motion_blur(x: Array, length: float, random: np.random.Generator) -> Array:
    half, angle = length * _relative(x) / 2, random.uniform(0, math.pi)
    down, across = _grid(half + 1)
    along = across * math.cos(angle) + down * math.sin(angle)
    beside = down * math.cos(angle) - across * math.sin(angle)
    return _convolved(x, np.clip(1 - np.hypot(np.maximum(np.abs(along) - half, 0), beside), 0, 1))


def _zoom_blur(x: Array, largest: float, random: np.random.Generator) -> Array:
    from PIL import Image

    height, width = x.shape[:2]
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    # The corners move by half a pixel from one exposure to the next, or nearly so.
    exposures = min(32, max(3, math.ceil((largest - 1) * max(height, width))))
    total = np.zeros_like(x)
    for factor in np.linspace(1, largest, exposures):
        top, left = (height - height / factor) / 2, (width - width / factor) / 2
        box = (left, top, width - left, height - top)
        total += np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box)) / 255.0
    blurred: Array = total / exposures
    return blurred


def _grid(reach: float) -> tuple[Array, Array]:
    """Return rows and columns of an odd square around zero."""
    side = np.arange(-math.ceil(reach), math.ceil(reach) + 1, dtype=np.float64)
    down, across = np.meshgrid(side, side, indexing="ij")
    return down, across


def _convolved(x: Array, kernel: Array) -> Array:
    """Return the picture convolved with a kernel of odd sides, mirrored beyond its edges."""
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    size = padded.shape[:2]
    transfer = np.fft.rfft2(kernel / kernel.sum(), size)[..., None]
    blurred = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * transfer, size, axes=(0, 1))
    # The product is circular: what is whole begins after the kernel's other half.
    whole: Array = blurred[2 * reach :, 2 * reach :]
    return whole


# --- weather and light -------------------------------------------------------------------------------------


def _fog(x: Array, density: float, random: np.random.Generator) -> Array:
    height, width = x.shape[:2]
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(down * height, across * width)  # waves over the picture, whatever its size
    frequency[0, 0] = np.inf
    waves = np.fft.rfft2(random.normal(0, 1, (height, width))) / frequency**1.7
    clouds = np.fft.irfft2(waves, (height, width))
    clouds = 0.35 + 0.65 * (clouds - clouds.min()) / max(float(np.ptp(clouds)), 1e-12)
    brightest = max(float(x.max()), 1e-3)
    foggy: Array = (x + density * clouds[..., None]) * brightest / (brightest + density)
    return foggy


def _brightness(x: Array, added: float, random: np.random.Generator) -> Array:
    """HSV's value raised; hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    raised = np.clip(value + added, 0, 1)
    brighter: Array = np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)
    return brighter


def _contrast(x: Array, factor: float, random: np.random.Generator) -> Array:
    mean = x.mean(axis=(0, 1))
    faded: Array = (x - mean) * factor + mean
    return faded


def _saturate(x: Array, factor: float, random: np.random.Generator) -> Array:
    """HSV's saturation multiplied; hue and value stay, and grey, which has no hue, stays grey."""
    value = x.max(axis=2, keepdims=True)
    drop = value - x.min(axis=2, keepdims=True)
    saturation = drop / np.where(value > 0, value, 1)
    wanted = np.clip(saturation * factor, 0, 1)
    factors = np.where(saturation > 0, wanted / np.where(saturation > 0, saturation, 1), 1)
    saturated: Array = value - (value - x) * factors
    return saturated


# --- what files do -----------------------------------------------------------------------------------------


def _pixelate(x: Array, cells: float, random: np.random.Generator) -> Array:
    from PIL import Image

    height, width = x.shape[:2]
    share = min(1.0, cells / min(height, width))
    small = (max(1, round(width * share)), max(1, round(height * share)))
    image = Image.fromarray((x * 255).round().astype(np.uint8)).resize(small, Image.Resampling.BOX)
    return np.asarray(image.resize((width, height), Image.Resampling.NEAREST)) / 255.0


def _jpeg(x: Array, quality: float, random: np.random.Generator) -> Array:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray((x * 255).round().astype(np.uint8)).save(stream, "JPEG", quality=int(quality))
    return np.asarray(Image.open(stream)) / 255.0


def _relative(x: Array) -> float:
    shorter: int = min(x.shape[:2])
    return shorter / _REFERENCE_PX


_TABLE: dict[str, tuple[Callable[[Array, float, np.random.Generator], Any], tuple[float, ...]]] = {
    "gaussian-noise": (_gaussian_noise, (0.06, 0.10, 0.16, 0.24, 0.34)),  # standard deviation
    "shot-noise": (_shot_noise, (60, 25, 12, 6, 3)),  # photons at full level
    "impulse-noise": (_impulse_noise, (0.03, 0.06, 0.10, 0.17, 0.27)),  # share of values that are lost
    "speckle-noise": (_speckle_noise, (0.15, 0.22, 0.33, 0.46, 0.62)),  # deviation, relative to the level
    "defocus-blur": (_defocus_blur, (2.0, 3.5, 5.0, 7.0, 9.5)),  # radius of the disk, px
    "gaussian-blur": (_gaussian_blur, (1.2, 2.2, 3.3, 4.6, 6.5)),  # standard deviation, px
    "motion-blur": (_motion_blur, (8, 13, 19, 26, 36)),  # length of the line, px
    "zoom-blur": (_zoom_blur, (1.08, 1.14, 1.20, 1.28, 1.38)),  # largest magnification
    "fog": (_fog, (0.6, 1.0, 1.5, 2.1, 3.0)),  # weight of the clouds
    "brightness": (_brightness, (0.12, 0.22, 0.32, 0.42, 0.54)),  # added to HSV's value
    "contrast": (_contrast, (0.50, 0.36, 0.26, 0.18, 0.11)),  # what is left of it
    "saturate": (_saturate, (1.5, 2.1, 3.0, 4.5, 9.0)),  # factor on HSV's saturation
    "pixelate": (_pixelate, (52, 40, 30, 21, 14)),  # cells along the shorter side
    "jpeg": (_jpeg, (30, 20, 14, 9, 6)),  # quality
}
_FUNCTIONS = {name: function for name, (function, _) in _TABLE.items()}
CORRUPTIONS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {name: strengths for name, (_, strengths) in _TABLE.items()}
)
"""Names, and the strength at each of the five severities; what it measures stands beside it in the source."""
