"""Small pictures and files for tests of decoding and resizing."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photo(width: int = 61, height: int = 47, seed: int = 0) -> np.ndarray:
    """Return a smooth, colourful, asymmetric picture ``(H, W, 3)`` uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()
