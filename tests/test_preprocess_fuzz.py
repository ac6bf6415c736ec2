"""Damaged and forged pictures end in a result or in one `InputError` line: no traceback, hang or crash."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.errors import InputError
from edgeclip.preprocess import Preprocess, PreprocessSpec

# Pillow warns about damaged metadata; as errors these would hide what users get.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE_PX = 24
GUARD_SECONDS = 5.0


@functools.cache
def seeds() -> dict[str, tuple[bytes, ...]]:
    """Return small valid pictures by format, in every flavour worth breaking."""
    rng = np.random.default_rng(0)
    pixels = np.array(
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (83, 61), Image.Resampling.BICUBIC
        )
    )
    alpha = np.dstack([pixels, pixels[..., :1]])
    rgb, rgba = Image.fromarray(pixels), Image.fromarray(alpha)
    grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    floats = Image.fromarray(pixels[..., 0].astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"

    def save(image: Image.Image, file_format: str, **options: object) -> bytes:
        stream = io.BytesIO()
        image.save(stream, file_format, **options)
        return stream.getvalue()

    pictures = {
        "JPEG": (
            save(rgb, "JPEG", quality=80, exif=exif),
            save(rgb, "JPEG", progressive=True, subsampling=2),
            save(rgb, "JPEG", optimize=True, restart_marker_rows=1),
            save(rgb.convert("L"), "JPEG"),
            save(rgb.convert("CMYK"), "JPEG"),
            save(rgb, "MPO", save_all=True, append_images=[rgb]),
        ),
        "PNG": (
            save(rgb, "PNG", exif=exif),
            save(rgba, "PNG"),
            save(rgb.quantize(16), "PNG", transparency=3),
            save(grey16, "PNG"),
            save(rgb.convert("1"), "PNG"),
            save(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        ),
        "WEBP": (
            save(rgb, "WEBP", exif=exif),
            save(rgba, "WEBP", lossless=True),
            save(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        ),
        "GIF": (
            save(rgb, "GIF"),
            save(rgba, "GIF"),
            save(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)], interlace=1),
        ),
        "BMP": (
            save(rgb, "BMP"),
            save(rgba, "BMP"),
            save(rgb.quantize(16), "BMP"),
            save(rgb.convert("1"), "BMP"),
        ),
        "TIFF": (
            save(rgb, "TIFF", exif=exif),
            save(rgb, "TIFF", compression="tiff_lzw"),
            save(rgb, "TIFF", compression="jpeg"),
            save(rgb.convert("1"), "TIFF", compression="group4"),
            save(rgb.convert("CMYK"), "TIFF", compression="tiff_adobe_deflate"),
            save(grey16, "TIFF"),
            save(floats, "TIFF", compression="packbits"),
            save(rgb, "TIFF", save_all=True, append_images=[rgba], big_tiff=True),
        ),
        "PPM": (
            save(rgb, "PPM"),
            b"P5 83 61 65535\n" + np.asarray(grey16).astype(">u2").tobytes(),
            save(floats, "PPM"),
            b"P3 2 2 255\n" + b"1 2 3 40 50 60 7 8 9 250 0 1\n",
            b"P1 3 2\n1 0 1\n0 1 0\n",
        ),
    }
    with contextlib.suppress(KeyError, OSError):  # Pillow may be built without
        pictures["AVIF"] = (save(rgb, "AVIF"), save(rgba, "AVIF"))
    return pictures


# -- Mutations ----------------------------------------------------------------------------------------------

Mutation = Callable[[np.random.Generator, bytes], bytes]


def truncate(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


def flip_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    for position in rng.integers(0, len(content), int(rng.integers(1, 9))):
        changed[position] = int(rng.integers(0, 256))
    return bytes(changed)


def edit_header(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    for position in rng.integers(0, min(96, len(content)), int(rng.integers(1, 5))):
        changed[position] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(0, 256))]))
    return bytes(changed)


def write_extreme_number(rng: np.random.Generator, content: bytes) -> bytes:
    """Put a huge, zero or negative number where sizes, counts and offsets stand."""
    changed = bytearray(content)
    order = rng.choice(["<", ">"])
    value = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 20_000, 65_500]))
    number = struct.pack(f"{order}H", value) if rng.random() < 0.5 else struct.pack(f"{order}I", value * 3)
    if rng.random() < 0.2:
        number = b"\xff\xff\xff\xff"
    at = int(rng.integers(0, min(200, len(content))))
    changed[at : at + len(number)] = number
    return bytes(changed)


def remove_slice(rng: np.random.Generator, content: bytes) -> bytes:
    start = int(rng.integers(0, len(content)))
    return content[:start] + content[start + int(rng.integers(1, 64)) :]


def repeat_slice(rng: np.random.Generator, content: bytes) -> bytes:
    start = int(rng.integers(0, len(content)))
    piece = content[start : start + int(rng.integers(1, 64))]
    return content[:start] + piece * int(rng.integers(2, 40)) + content[start:]


def splice_other_format(rng: np.random.Generator, content: bytes) -> bytes:
    others = [picture for pictures in seeds().values() for picture in pictures]
    other = others[int(rng.integers(0, len(others)))]
    at = int(rng.integers(0, min(len(content), len(other))))
    return content[:at] + other[at:]


def append_noise(rng: np.random.Generator, content: bytes) -> bytes:
    return content + rng.integers(0, 256, int(rng.integers(1, 400)), dtype=np.uint8).tobytes()


def zero_tail(rng: np.random.Generator, content: bytes) -> bytes:
    keep = int(rng.integers(0, len(content)))
    return content[:keep] + bytes(len(content) - keep)


MUTATIONS: tuple[Mutation, ...] = (
    truncate,
    flip_bytes,
    edit_header,
    write_extreme_number,
    remove_slice,
    repeat_slice,
    splice_other_format,
    append_noise,
    zero_tail,
)


# -- The property -------------------------------------------------------------------------------------------


def run_guarded(pool: ThreadPoolExecutor, attempt: Callable[[], np.ndarray]) -> str | None:
    """Run one case; return the error line or None. Anything but a result or an error line fails the test."""
    try:
        result = pool.submit(attempt).result(timeout=GUARD_SECONDS)
    except InputError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 400
        return line
    assert result.shape == (SIZE_PX, SIZE_PX, 3)
    assert result.dtype == np.uint8
    return None


def fuzz(file_format: str, *, seed: int, count: int, folder: Path) -> tuple[int, int]:
    """Run ``count`` mutated pictures, half as bytes, half as misnamed files; return (results, errors)."""
    rng = np.random.default_rng([seed, *file_format.encode()])
    spec = PreprocessSpec(image_size_px=(SIZE_PX, SIZE_PX))
    exact, fast = Preprocess(spec), Preprocess(spec, fast_decode=True)
    pictures = seeds()[file_format]
    errors = 0
    with ThreadPoolExecutor(1) as pool:
        for index in range(count):
            content = pictures[index % len(pictures)]
            for _ in range(int(rng.integers(1, 3))):
                content = MUTATIONS[int(rng.integers(0, len(MUTATIONS)))](rng, content) or b"\0"
            preprocess = fast if index % 3 == 0 else exact
            if index % 2:
                path = folder / f"{index}.{'jpg' if file_format != 'JPEG' else 'png'}"
                path.write_bytes(content)
                line = run_guarded(pool, functools.partial(preprocess, path))
                path.unlink()
                assert line is None or repr(os.fspath(path)) in line
            else:
                line = run_guarded(pool, functools.partial(preprocess, content))
            errors += line is not None
    return count - errors, errors


@pytest.mark.parametrize("file_format", list(seeds()))
def test_mutated_pictures_give_a_result_or_an_error_line(file_format: str, tmp_path: Path) -> None:
    results, errors = fuzz(file_format, seed=1, count=320, folder=tmp_path)
    assert results > 0  # some damage is harmless, so the cases do reach the decoders
    assert errors > 0


def test_noise_with_the_first_bytes_of_a_format_is_an_error() -> None:
    rng = np.random.default_rng(3)
    preprocess = Preprocess(PreprocessSpec(image_size_px=(SIZE_PX, SIZE_PX)))
    with ThreadPoolExecutor(1) as pool:
        for pictures in seeds().values():
            for head_bytes in (3, 8, 16, 30):
                content = pictures[0][:head_bytes] + rng.integers(0, 256, 500, dtype=np.uint8).tobytes()
                if pictures[0][:2] in (b"P6", b"BM"):
                    continue  # raw pixels: noise is a picture
                assert run_guarded(pool, functools.partial(preprocess, content)) is not None
