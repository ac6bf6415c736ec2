"""Pictures to the uint8 array an image tower expects: decode, resize, crop.

Decoding and resizing are two calls, because they are two stages of the latency report and may run on
different threads. For opaque 8-bit RGB without rotation the result equals torchvision's ``Resize`` and
``CenterCrop`` on PIL pictures bit for bit (``tests/test_preprocess_parity.py``). Cropping inside Pillow's
resize (``box=``) saves work, but its float32 edges change single levels: it is used for pictures decoded at
reduced scale alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgeclip.bundle import PreprocessSpec
from edgeclip.errors import ConfigError, InputError
from edgeclip.pictures import (
    DEFAULT_MAX_PIXELS,
    Channels,
    ImageSource,
    decode_image,
    name_of_source,
    reduction_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["DEFAULT_MAX_PIXELS", "Channels", "ImageSource", "Preprocess", "PreprocessSpec", "decode_image"]

# Decoded JPEG sides stay at least this many times the target, so that what the reduced inverse DCT does
# differently is averaged away by the resize that follows (benchmarks/fast_decode.py).
_DRAFT_MARGIN = 2


class Preprocess:
    """Turn pictures into the arrays one image tower was trained on.

    Holds no state beyond its settings and is safe from many threads.

    Args:
        spec: size, resize, crop and interpolation from the bundle's manifest.
        fast_decode: let JPEG files at least twice as large as needed be decoded at reduced scale: about three
            times as fast for photographs of 8 megapixels and more, but labels that were nearly tied may
            change places (``benchmarks/fast_decode.py``). Off means exact.
        max_pixels: larger pictures are refused, before and after resizing.

    Raises:
        ConfigError: the spec asks for what cannot be, such as ``resize="shortest"`` without a crop.
    """

    def __init__(
        self, spec: PreprocessSpec, *, fast_decode: bool = False, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> None:
        if min(spec.image_size_px) < 1:
            raise ConfigError(
                f"preprocess: image_size_px is {spec.image_size_px}, expected two positive sides."
            )
        if spec.resize == "shortest" and spec.crop == "none":
            raise ConfigError(
                "preprocess: resize='shortest' with crop='none' gives pictures of different sizes; "
                "use crop='center' or resize='squash'."
            )
        if not all(std > 0 for std in spec.std):
            raise ConfigError(f"preprocess: std is {spec.std}, expected three positive numbers.")
        self.spec = spec
        self.fast_decode = fast_decode
        self.max_pixels = max_pixels
        height, width = spec.image_size_px
        self._draft_size_px = (height * _DRAFT_MARGIN, width * _DRAFT_MARGIN) if fast_decode else None
        mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
        levels = np.arange(256, dtype=np.float32) / np.float32(255)  # as ToTensor divides
        self._normalized_levels = (levels[:, None] - mean) / std  # (256, 3)

    def __call__(self, source: ImageSource, *, channels: Channels = "rgb") -> NDArray[np.uint8]:
        """Decode and resize: the ``(H, W, 3)`` uint8 RGB input of the tower. See `decode` and `resize`."""
        return self.resize(self.decode(source, channels=channels))

    def decode(self, source: ImageSource, *, channels: Channels = "rgb") -> Image.Image:
        """Decode to a loaded RGB picture, at reduced scale where ``fast_decode`` allows.

        Raises:
            InputError: as `decode_image`; also where the picture is so narrow that its resized form would
                exceed ``max_pixels``.
        """
        image = decode_image(
            source, channels=channels, draft_size_px=self._draft_size_px, max_pixels=self.max_pixels
        )
        self._new_size(image, source)
        return image

    def resize(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop to the size of the tower.

        Args:
            image: what `decode` returned (mode RGB).

        Returns:
            ``(H, W, 3)`` uint8 RGB, contiguous, owned by the caller.
        """
        from PIL import Image

        height, width = self.spec.image_size_px
        new_height, new_width = self._new_size(image, image)
        resample = (
            Image.Resampling.BICUBIC if self.spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
        )
        # torchvision's CenterCrop: round() to even, and the resized picture is never smaller than the crop
        top = round((new_height - height) / 2)
        left = round((new_width - width) / 2)
        reduction = reduction_of(image)
        if reduction is not None:
            x, y, right, bottom = reduction.box
            step_x, step_y = (right - x) / new_width, (bottom - y) / new_height
            x, y = x + left * step_x, y + top * step_y
            box = (x, y, min(x + width * step_x, right), min(y + height * step_y, bottom))
            return np.array(image.resize((width, height), resample, box=box), dtype=np.uint8)
        resized = image.resize((new_width, new_height), resample)
        if (new_height, new_width) != (height, width):
            resized = resized.crop((left, top, left + width, top + height))
        return np.array(resized, dtype=np.uint8)

    def _new_size(self, image: Image.Image, source: object) -> tuple[int, int]:
        """Return ``(height, width)`` after resizing and before the crop; refuse what would explode."""
        reduction = reduction_of(image)
        width, height = reduction.full_size_px if reduction else image.size
        new_height, new_width = _resized_size(height, width, self.spec)
        if new_height * new_width > self.max_pixels:
            raise InputError(
                f"{name_of_source(source)}: its sides of {width} x {height} px are too unequal: resized to "
                f"{new_width} x {new_height} px it would exceed the limit of {self.max_pixels} pixels. "
                f"Cut it into squarer pieces."
            )
        return new_height, new_width

    def normalize(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scale to [0, 1], subtract mean, divide by std: for towers whose spec says ``applied == "host"``.

        Args:
            batch: ``(B, H, W, 3)`` uint8 RGB.

        Returns:
            ``(B, 3, H, W)`` float32, equal to torchvision's ``ToTensor`` and ``Normalize``.

        Raises:
            InputError: another shape or dtype.
        """
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
            raise InputError(f"batch: got {batch.dtype} {batch.shape}, expected uint8 (B, H, W, 3).")
        planes = np.empty((batch.shape[0], 3, *batch.shape[1:3]), dtype=np.float32)
        for channel in range(3):
            np.take(self._normalized_levels[:, channel], batch[..., channel], out=planes[:, channel])
        return planes


def _resized_size(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """Return ``(height, width)`` after resizing and before the crop.

    Square targets as torchvision's ``Resize(size)`` (``int()`` for the longer side), others as open_clip's
    ``ResizeKeepRatio`` (``round()``).
    """
    target_height, target_width = spec.image_size_px
    if spec.resize == "squash":
        return target_height, target_width
    if target_height != target_width:
        ratio = min(height / target_height, width / target_width)
        return round(height / ratio), round(width / ratio)
    if width <= height:
        return int(target_width * height / width), target_width
    return target_height, int(target_height * width / height)
