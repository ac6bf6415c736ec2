"""Every kind of picture comes out as the same upright RGB, and what is no picture as one sentence."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from sample_pictures import encoded, photo

import edgeclip.pictures
from edgeclip.errors import InputError
from edgeclip.pictures import decode_image


def pixels(source: object, **options: object) -> np.ndarray:
    image = decode_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 9) + b"IDAT"


# -- Formats and modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_keep_every_pixel(file_format: str, options: dict[str, object]) -> None:
    image = photo()
    content = encoded(Image.fromarray(image), file_format, **options)
    np.testing.assert_array_equal(pixels(content), image)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "AVIF", "GIF"])
def test_lossy_formats_equal_pillow(file_format: str) -> None:
    try:
        content = encoded(Image.fromarray(photo()), file_format)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {file_format}")
    np.testing.assert_array_equal(pixels(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_a_multi_picture_jpeg_is_its_first_picture() -> None:
    first, second = (Image.fromarray(photo(seed=seed)) for seed in (1, 2))
    content = encoded(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_array_equal(pixels(content), pixels(encoded(first, "JPEG")))


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(photo()), "PNG"))
    np.testing.assert_array_equal(pixels(path), photo())
    np.testing.assert_array_equal(pixels(str(path)), photo())


def test_bytes_bytearray_and_memoryview_are_the_content_of_a_file() -> None:
    content = encoded(Image.fromarray(photo()), "PNG")
    for source in (content, bytearray(content), memoryview(content)):
        np.testing.assert_array_equal(pixels(source), photo())


@pytest.mark.parametrize(
    "mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX", "LA", "RGBA", "PA", "La", "RGBa"]
)
def test_opaque_pil_modes_equal_pillow(mode: str) -> None:
    source = Image.fromarray(photo())
    for step in {"PA": ["P"], "La": ["LA"], "RGBa": ["RGBA"]}.get(mode, []):
        source = source.convert(step)
    image = source.convert(mode)
    via = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(mode)
    expected = (image.convert(via) if via else image).convert("RGB")
    np.testing.assert_array_equal(pixels(image), np.asarray(expected))


def test_lab_tiff_is_converted() -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    content = encoded(ImageCms.applyTransform(Image.fromarray(photo()), to_lab), "TIFF")
    assert np.abs(pixels(content) - photo()).mean() < 4  # 8-bit LAB is coarse


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_files_look_like_the_original(file_format: str) -> None:
    """Pillow writes and reads JPEG's CMYK the way Adobe does: inverted."""
    options = {"quality": 95} if file_format == "JPEG" else {}
    content = encoded(Image.fromarray(photo()).convert("CMYK"), file_format, **options)
    assert np.abs(pixels(content) - photo()).mean() < 4


def test_animations_give_their_first_frame() -> None:
    first, second = (Image.fromarray(photo(seed=seed)) for seed in (1, 2))
    for file_format in ("GIF", "WEBP", "PNG", "TIFF"):
        still = encoded(first, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
        options = {"lossless": True} if file_format == "WEBP" else {}
        moving = encoded(first, file_format, save_all=True, append_images=[second], **options)
        np.testing.assert_array_equal(pixels(moving), pixels(still), err_msg=file_format)


# -- Transparency -------------------------------------------------------------------------------------------


def test_alpha_is_laid_over_white() -> None:
    rgba = np.dstack([photo(), np.full((47, 61), 51, dtype=np.uint8)])  # 20 % opaque
    expected = photo() * 0.2 + 255 * 0.8
    for source in (Image.fromarray(rgba), encoded(Image.fromarray(rgba), "PNG"), rgba):
        assert np.abs(pixels(source) - expected).max() <= 1


def test_transparent_pixels_become_white_in_every_mode() -> None:
    corner = (slice(0, 10), slice(0, 10))
    alpha = np.full((47, 61), 255, dtype=np.uint8)
    alpha[corner] = 0
    rgba = Image.fromarray(np.dstack([photo(), alpha]))
    palette = rgba.convert("P")
    sources = {
        "RGBA": encoded(rgba, "PNG"),
        "LA": encoded(rgba.convert("LA"), "PNG"),
        "WebP": encoded(rgba, "WEBP", lossless=True),
        "TIFF": encoded(rgba, "TIFF"),
        "GIF": encoded(rgba, "GIF"),
        "P index": encoded(palette, "PNG", transparency=palette.getpixel((30, 30))),
        "P table": encoded(palette, "PNG", transparency=bytes([0] * 256)),
        "grey key": encoded(Image.new("L", (61, 47), 7), "PNG", transparency=7),
        "colour key": encoded(Image.new("RGB", (61, 47), (7, 8, 9)), "PNG", transparency=(7, 8, 9)),
    }
    for kind, content in sources.items():
        where = (30, 30) if kind == "P index" else (5, 5)
        assert pixels(content)[where].tolist() == [255, 255, 255], kind


def test_16_bit_grey_key_becomes_white() -> None:
    levels = np.full((4, 4), 3000, dtype=np.uint16)
    levels[0, 0] = 60000
    content = encoded(Image.fromarray(levels), "PNG", transparency=3000)
    result = pixels(content)
    assert result[1, 1].tolist() == [255, 255, 255]
    assert result[0, 0].tolist() == [233, 233, 233]


# -- More than 8 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(file_format: str) -> None:
    levels = np.linspace(0, 65535, 61 * 47).reshape(47, 61).astype(np.uint16)
    if file_format == "PPM":  # older Pillow reads it and does not write it
        content = b"P5 61 47 65535\n" + levels.astype(">u2").tobytes()
    else:
        content = encoded(Image.fromarray(levels), file_format)
    result = pixels(content)
    assert np.abs(result[..., 0] - levels / 257).max() <= 0.51  # rounding
    assert len(np.unique(result)) == 256


def test_a_dark_16_bit_png_stays_dark() -> None:
    levels = np.arange(200, dtype=np.uint16).reshape(10, 20)
    assert pixels(encoded(Image.fromarray(levels), "PNG")).max() == 1


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("I", 0, 255, (0, 255)),
        ("I", 10, 200, (10, 200)),
        ("I", 0, 65535, (0, 255)),
        ("I", -70000, 90000, (0, 255)),
        ("I", 5, 5, (5, 5)),
        ("F", 0.0, 1.0, (0, 255)),
        ("F", 0.2, 0.4, (51, 102)),
        ("F", 0.0, 255.0, (0, 255)),
        ("F", 0.0, 65535.0, (0, 255)),
        ("F", -3.0, 3.0, (0, 255)),
        ("F", -3.0, -3.0, (0, 0)),
    ],
)
def test_32_bit_and_float_ranges(mode: str, low: float, high: float, expected: tuple[int, int]) -> None:
    dtype = np.int32 if mode == "I" else np.float32
    levels = np.linspace(low, high, 64).reshape(8, 8).astype(dtype)
    image = Image.fromarray(levels)
    assert image.mode == mode
    result = pixels(encoded(image, "TIFF"))
    assert (result.min(), result.max()) == expected


def test_float_pixels_that_are_no_numbers_are_an_error() -> None:
    levels = np.zeros((4, 4), dtype=np.float32)
    levels[1, 1] = np.nan
    with pytest.raises(InputError, match="holds NaN or infinite pixels"):
        decode_image(Image.fromarray(levels))


# -- Orientation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_equals_pillow(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(photo()), file_format, exif=exif)
    opened = Image.open(io.BytesIO(content))
    expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert expected.shape[:2] == ((61, 47) if orientation >= 5 else (47, 61))
    np.testing.assert_array_equal(pixels(content), expected)
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(content))), expected)


def test_damaged_exif_does_not_refuse_the_picture() -> None:
    content = encoded(Image.fromarray(photo()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the metadata
        np.testing.assert_array_equal(pixels(content), photo())


def test_results_carry_no_metadata() -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    source = Image.open(io.BytesIO(encoded(Image.fromarray(photo()), "JPEG", exif=exif, dpi=(72, 72))))
    image = decode_image(source)
    assert type(image) is Image.Image
    assert image.info == {}
    assert not image.getexif()
    assert "exif" in source.info  # the caller's picture keeps its own


# -- Arrays -------------------------------------------------------------------------------------------------


def test_arrays_rgb_bgr_grey_and_views() -> None:
    image = photo()
    np.testing.assert_array_equal(pixels(image), image)
    np.testing.assert_array_equal(pixels(image[..., ::-1], channels="bgr"), image)
    np.testing.assert_array_equal(pixels(image[::2, ::-3]), image[::2, ::-3])
    np.testing.assert_array_equal(pixels(image[..., 0]), np.dstack([image[..., 0]] * 3))
    bgra = np.dstack([image[..., ::-1], np.full(image.shape[:2], 255, dtype=np.uint8)])
    np.testing.assert_array_equal(pixels(bgra, channels="bgr"), image)


def test_channels_mean_nothing_for_files() -> None:
    content = encoded(Image.fromarray(photo()), "PNG")
    np.testing.assert_array_equal(pixels(content, channels="bgr"), photo())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), r"array float32 \(4, 4, 3\): expected uint8"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), r"array uint8 \(2, 4, 4, 3\): expected a picture"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"\(4, 4, 2\): expected a picture"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\): expected a picture"),
        (np.zeros((7,), dtype=np.uint8), r"\(7,\): expected a picture"),
    ],
)
def test_other_arrays_are_an_error(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_image(array)


def test_unknown_channels_and_sources_are_an_error() -> None:
    with pytest.raises(InputError, match="channels: got 'gbr'"):
        decode_image(photo(), channels="gbr")
    with pytest.raises(InputError, match="list object: expected a path"):
        decode_image([1, 2])
    with pytest.raises(InputError, match="NoneType object: expected a path"):
        decode_image(None)


# -- Files that are no pictures -----------------------------------------------------------------------------


def assert_one_line_error(source: object, message: str, *, seconds: float = 5.0, **options: object) -> None:
    """Assert an InputError of one line that names the file, from a thread so that a hang fails the test."""
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            decode_image(source, **options)
        except BaseException as error:
            raised.append(error)

    worker = threading.Thread(target=attempt, daemon=True)
    worker.start()
    worker.join(seconds)
    assert not worker.is_alive(), "hangs"
    assert raised, "no error"
    assert isinstance(raised[0], InputError), repr(raised[0])
    text = str(raised[0])
    assert "\n" not in text
    assert message in text
    if isinstance(source, (str, os.PathLike)):
        assert repr(str(source)) in text


def test_what_is_no_picture_file_names_it(tmp_path: Path) -> None:
    empty, text, folder = tmp_path / "empty.jpg", tmp_path / "text\nwith break.png", tmp_path / "folder.jpg"
    empty.write_bytes(b"")
    text.write_text("no picture")
    folder.mkdir()
    assert_one_line_error(empty, "is empty")
    assert_one_line_error(text, "begins with b'no pictu'")
    assert_one_line_error(folder, f"{str(folder)!r}: is a directory, expected a picture file. Name the files")
    assert_one_line_error(tmp_path / "missing.jpg", "no such file")
    assert_one_line_error(text / "below.jpg", "cannot be opened")
    assert_one_line_error("null\0byte.jpg", "cannot be opened")
    assert_one_line_error("x" * 5000, "cannot be opened")
    assert_one_line_error(b"", "is empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    assert_one_line_error(pipe, f"{str(pipe)!r}: is a pipe or device, expected a picture file")
    assert_one_line_error("/dev/zero", "'/dev/zero': is a pipe or device")


def test_formats_that_need_other_programs_are_not_opened() -> None:
    assert_one_line_error(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture format known here"
    )
    assert_one_line_error(b"%PDF-1.7\n", "no picture format known here")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_an_error(file_format: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), file_format)
    path = tmp_path / "cut.bin"
    for share in (0.01, 0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        assert_one_line_error(path, "cannot be decoded")


# -- Limits -------------------------------------------------------------------------------------------------


def test_too_many_pixels_are_refused_before_decoding() -> None:
    assert_one_line_error(
        png_header(60000, 60000), "60000 x 60000 is 3600000000 pixels, the limit is 178956970", seconds=1
    )
    assert_one_line_error(photo(), "61 x 47 is 2867 pixels, the limit is 2866", max_pixels=2866)
    assert_one_line_error(Image.fromarray(photo()), "the limit is 2866", max_pixels=2866)
    assert_one_line_error(encoded(Image.fromarray(photo()), "JPEG"), "the limit is 2866", max_pixels=2866)
    assert decode_image(photo(), max_pixels=2867).size == (61, 47)


def test_a_small_file_that_claims_a_large_picture_is_refused() -> None:
    assert_one_line_error(png_header(9000, 9000), "claims 9000 x 9000 pixels in 41 bytes", seconds=1)
    flat = encoded(Image.new("1", (9000, 5000)), "PNG")  # a blank page stays welcome
    assert len(flat) < 45_000
    assert decode_image(flat).size == (9000, 5000)


def test_pillows_own_limit_stays_untouched_and_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 2000
    )  # Pillow would warn above 2,000 and raise above 4,000
    content = encoded(Image.fromarray(photo()), "JPEG")
    assert decode_image(content).size == (61, 47)
    assert Image.MAX_IMAGE_PIXELS == 2000


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    content = encoded(Image.fromarray(photo()), "JPEG", progressive=True)
    assert decode_image(content).size == (61, 47)
    scan = content.index(b"\xff\xda")
    bomb = content[:-2] + content[scan : scan + 12] * 200 + content[-2:]
    assert_one_line_error(bomb, "scans, the limit is 100")


def test_public_names_exist() -> None:
    assert all(hasattr(edgeclip.pictures, name) for name in edgeclip.pictures.__all__)


def test_as_stored_is_pillow_s_plain_conversion() -> None:
    """Not turned upright, transparency left out: what crops of DataCompDR were drawn on."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, clear, palette = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels[..., :3]).save(turned, "JPEG", exif=exif)
    Image.fromarray(pixels).save(clear, "PNG")
    colours = Image.fromarray(pixels[..., :3]).quantize(16)
    colours.save(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    for buffer in (turned, clear, palette):
        content = buffer.getvalue()
        found = decode_image(content, as_stored=True)
        with Image.open(io.BytesIO(content)) as opened:
            wanted = np.asarray(opened.convert("RGBA").convert("RGB"))
        assert (found.size, found.mode, found.info) == ((9, 6), "RGB", {})
        assert np.array_equal(np.asarray(found), wanted)
    assert decode_image(turned.getvalue()).size == (6, 9)
    assert not np.array_equal(np.asarray(decode_image(clear.getvalue())), pixels[..., :3])
