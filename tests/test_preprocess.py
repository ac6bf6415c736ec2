"""Preprocess gives the tower's input; decoding at reduced scale keeps the geometry of the full picture."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_pictures import encoded, photo

import edgeclip.preprocess
from edgeclip.errors import ConfigError, InputError
from edgeclip.preprocess import Preprocess, PreprocessSpec

SPEC = PreprocessSpec(image_size_px=(32, 32))


def test_result_is_contiguous_and_owned() -> None:
    result = Preprocess(SPEC)(photo())
    assert result.shape == (32, 32, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable
    same_size = Preprocess(PreprocessSpec(image_size_px=(47, 61), resize="squash"))(photo())
    np.testing.assert_array_equal(same_size, photo())
    assert same_size.flags.writeable


def test_specs_that_cannot_be_are_an_error() -> None:
    with pytest.raises(ConfigError, match="resize='shortest' with crop='none'"):
        Preprocess(PreprocessSpec(image_size_px=(32, 32), crop="none"))
    with pytest.raises(ConfigError, match=r"image_size_px is \(0, 32\)"):
        Preprocess(PreprocessSpec(image_size_px=(0, 32)))
    with pytest.raises(ConfigError, match=r"std is \(1.0, 0.0, 1.0\)"):
        Preprocess(PreprocessSpec(image_size_px=(32, 32), std=(1.0, 0.0, 1.0)))


def test_normalize_refuses_other_batches() -> None:
    preprocess = Preprocess(SPEC)
    with pytest.raises(InputError, match=r"batch: got float32 \(1, 32, 32, 3\), expected uint8"):
        preprocess.normalize(np.zeros((1, 32, 32, 3), dtype=np.float32))
    with pytest.raises(InputError, match=r"batch: got uint8 \(32, 32, 3\)"):
        preprocess.normalize(np.zeros((32, 32, 3), dtype=np.uint8))


def test_many_threads_give_the_serial_answers() -> None:
    contents = [encoded(Image.fromarray(photo(90 + n, 70 + n, seed=n)), "JPEG") for n in range(12)]
    preprocess = Preprocess(SPEC, fast_decode=True)
    serial = [preprocess(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(preprocess, contents * 8))
    for index, result in enumerate(parallel):
        np.testing.assert_array_equal(result, serial[index % 12])


def test_a_source_is_never_changed() -> None:
    image = photo()
    picture = Image.fromarray(image)
    preprocess = Preprocess(SPEC, fast_decode=True)
    preprocess(image, channels="bgr")
    preprocess(picture)
    np.testing.assert_array_equal(image, photo())
    np.testing.assert_array_equal(np.asarray(picture), photo())
    lazy = Image.open(io.BytesIO(encoded(Image.fromarray(photo(610, 470)), "JPEG")))
    preprocess(lazy)
    assert lazy.size == (610, 470)


def test_sides_too_unequal_to_resize_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (65500, 1)).save(path)
    preprocess = Preprocess(PreprocessSpec(image_size_px=(224, 224)))
    with pytest.raises(InputError, match=r"line.png'.* 65500 x 1 px are too unequal.* 14672000 x 224 px"):
        preprocess(path)
    squash = PreprocessSpec(image_size_px=(224, 224), resize="squash")
    assert Preprocess(squash)(path).shape == (224, 224, 3)


# -- Fast decoding ------------------------------------------------------------------------------------------


def test_exact_is_the_default_and_decodes_in_full() -> None:
    content = encoded(Image.fromarray(photo(800, 600)), "JPEG")
    assert Preprocess(SPEC).decode(content).size == (800, 600)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_fast_decode_reduces_and_stays_close(mode: str) -> None:
    content = encoded(Image.fromarray(photo(801, 603)).convert(mode), "JPEG", quality=90)
    fast = Preprocess(SPEC, fast_decode=True)
    assert fast.decode(content).size[1] < 603
    difference = fast(content).astype(int) - Preprocess(SPEC)(content)
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1003, 641), (641, 1003), (1029, 1031)])
def test_fast_decode_keeps_the_geometry_of_the_full_picture(orientation: int, size: tuple[int, int]) -> None:
    """Sides that are no multiple of 8 leave a cut last pixel; ignoring it shifts the picture."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(photo(*size)), "JPEG", quality=95, exif=exif)
    spec = PreprocessSpec(image_size_px=(48, 48))
    fast = Preprocess(spec, fast_decode=True)
    assert max(fast.decode(content).size) < 600
    difference = fast(content).astype(int) - Preprocess(spec)(content)
    assert np.abs(difference).mean() < 0.35


@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_decode_leaves_at_least_twice_the_target(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    fast = Preprocess(PreprocessSpec(image_size_px=(40, 60)), fast_decode=True)
    for width, height in [(239, 159), (240, 160), (479, 320), (480, 640), (970, 650), (300, 2000)]:
        stored = (width, height) if orientation == 1 else (height, width)
        decoded = fast.decode(encoded(Image.fromarray(photo(*stored)), "JPEG", exif=exif))
        assert decoded.width >= min(120, width)
        assert decoded.height >= min(80, height)
        reduced = decoded.width < width
        assert reduced == (width // 2 >= 120 and height // 2 >= 80)


def test_files_that_are_no_jpeg_are_exact_in_fast_mode() -> None:
    content = encoded(Image.fromarray(photo(800, 600)), "PNG")
    np.testing.assert_array_equal(Preprocess(SPEC, fast_decode=True)(content), Preprocess(SPEC)(content))


def test_pillow_is_imported_when_a_picture_comes() -> None:
    code = "import sys, edgeclip.preprocess; print('PIL' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_public_names_exist() -> None:
    assert all(hasattr(edgeclip.preprocess, name) for name in edgeclip.preprocess.__all__)
