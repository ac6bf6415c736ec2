"""Pictures of any kind to upright, opaque, 8-bit RGB.

What a user may hand in is wide (:data:`ImageSource`), what comes out is narrow. The decoder is chosen by the
first bytes of a file, from a short list; the limits here keep a damaged or hostile file from taking seconds
and gigabytes before it is refused.

Out of scope: colour management (ICC profiles are ignored, as torchvision and open_clip do), animation (the
first frame counts) and formats that Pillow hands to other programs (EPS, PDF).
"""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from edgeclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image, ImageFile

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "Channels",
    "ImageSource",
    "Reduction",
    "decode_image",
    "name_of_source",
    "reduction_of",
    "sniff_format",
]

Channels: TypeAlias = Literal["rgb", "bgr"]
# A str or PathLike is a path; bytes-like objects are the content of a file; an array is pixels.
ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
)

DEFAULT_MAX_PIXELS = 178_956_970
"""Largest picture decoded, in pixels: where Pillow's own error begins (about 716 MB as Pillow's RGB)."""

# A large file that claims more pixels a byte has a damaged header or is a decompression bomb: of blank
# pictures JPEG reaches 255, 8-bit PNG 1,029, GIF 1,336. Lossless WebP and bilevel ones reach more, and may
# while small.
_MAX_PIXELS_PER_BYTE = 2000
_SMALL_PIXELS = 50_000_000

# Scans of a progressive JPEG cost a pass over the whole picture each; cameras and encoders write about ten.
_MAX_JPEG_SCANS = 100

# Format -> Pillow plugin and class. Opening the class directly imports one plugin (Image.open five, 22 ms),
# leaves out every decoder not listed here, and keeps Pillow's process-wide pixel limit and its warnings out
# of it. A multi-picture JPEG (MPO) opens as its first picture.
_DECODERS = {
    "JPEG": ("JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PngImagePlugin", "PngImageFile"),
    "WebP": ("WebPImagePlugin", "WebPImageFile"),
    "GIF": ("GifImagePlugin", "GifImageFile"),
    "BMP": ("BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("TiffImagePlugin", "TiffImageFile"),
    "PPM": ("PpmImagePlugin", "PpmImageFile"),
    "AVIF": ("AvifImagePlugin", "AvifImageFile"),  # from Pillow 11.3
}
_HEAD_BYTES = 16

# Key in `Image.info` of a picture decoded at reduced scale; the value is a `Reduction`.
_REDUCTION_KEY = "edgeclip_reduction"

# EXIF orientation -> the sides of the upright picture on which the stored picture's right and bottom end up.
_UPRIGHT_SIDES = {
    1: ("right", "bottom"),
    2: ("left", "bottom"),
    3: ("left", "top"),
    4: ("right", "top"),
    5: ("bottom", "right"),
    6: ("bottom", "left"),
    7: ("top", "left"),
    8: ("top", "right"),
}


class Reduction(NamedTuple):
    """Where a picture decoded at reduced scale came from, upright.

    Attributes:
        full_size_px: (width, height) of the full picture, which sets the geometry of a resize.
        box: (left, top, right, bottom) of the full picture in reduced pixels; the last pixel may be cut.
    """

    full_size_px: tuple[int, int]
    box: tuple[float, float, float, float]


def decode_image(
    source: ImageSource,
    *,
    channels: Channels = "rgb",
    draft_size_px: tuple[int, int] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    as_stored: bool = False,
) -> Image.Image:
    """Decode a picture of any kind to upright, opaque, 8-bit RGB.

    16-bit pictures are scaled to 8 bits (Pillow's ``convert`` clips them), transparent ones are laid over
    white, the EXIF orientation is applied, CMYK becomes RGB by Pillow's plain formula, ICC profiles are
    ignored.

    Args:
        source: a path; the content of a file as bytes; a PIL picture; or a uint8 array ``(H, W)`` grey,
            ``(H, W, 3)`` colour, ``(H, W, 4)`` colour with alpha.
        channels: order of the colours in an array; has no meaning for other sources.
        draft_size_px: ``(H, W)``; a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size as long as both
            sides of the upright picture stay at least this large. Pixels then differ a little from a full
            decode, and `reduction_of` the result tells how.
        max_pixels: pictures with more pixels are refused before they are decoded.
        as_stored: give what Pillow's plain ``convert("RGB")`` gives: not turned upright, transparency left
            out, 16-bit pictures clipped. Crops drawn by programs that decode so mean these pixels. For files
            only, and not at reduced scale.

    Returns:
        A loaded picture of mode RGB without metadata. It may share memory with a PIL picture that was passed
        in; treat it as read-only.

    Raises:
        InputError: the source is missing, no picture, of an unknown format, damaged, truncated or too large.
            (What is missing at the end of a file is grey, not an error, in a process that has set Pillow's
            ``ImageFile.LOAD_TRUNCATED_IMAGES``.)

    Safe from many threads (a PIL picture opened lazily must not be shared between them); Pillow's decoders
    release the GIL.
    """
    from PIL import Image

    if channels not in ("rgb", "bgr"):
        raise InputError(f"channels: got {channels!r}, expected 'rgb' or 'bgr'.")
    name = name_of_source(source)
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source, channels, max_pixels)
        if isinstance(source, Image.Image):
            return _from_pil(source, name, max_pixels)
        with ExitStack() as stack:
            if isinstance(source, (str, os.PathLike)):
                stream: IO[bytes] = stack.enter_context(_open_regular_file(Path(source), name))
            elif isinstance(source, (bytes, bytearray, memoryview)):
                stream = BytesIO(source)
            else:
                raise InputError(
                    f"{name}: expected a path, the bytes of a file, a PIL picture or a uint8 array (H, W, 3)."
                )
            return _decode_stream(stream, name, draft_size_px, max_pixels, as_stored=as_stored)
    except InputError:
        raise
    # Decoders fed with damaged data raise whatever their parsing stumbles over: OSError, SyntaxError,
    # ValueError, struct.error, zlib.error, MemoryError, DecompressionBombError... All mean the same here.
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"{name}: cannot be decoded ({reason}); expected a complete picture. Check or replace the file."
        ) from error


def reduction_of(image: Image.Image) -> Reduction | None:
    """Return how `decode_image` reduced this picture; ``None`` for one decoded in full."""
    found: Reduction | None = image.info.get(_REDUCTION_KEY)
    return found


# -- Sources ------------------------------------------------------------------------------------------------


def name_of_source(source: object) -> str:
    """Return how an error names this source: its path, or what kind of thing it is."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fsdecode(source))
    if isinstance(source, (bytes, bytearray)):
        return f"picture of {len(source)} bytes"
    if isinstance(source, memoryview):
        return f"picture of {source.nbytes} bytes"
    if isinstance(source, np.ndarray):
        return f"array {source.dtype} {source.shape}"
    if filename := getattr(source, "filename", ""):
        return repr(os.fsdecode(filename))
    return f"{type(source).__name__} object"


def _open_regular_file(path: Path, name: str) -> IO[bytes]:
    """Open a file for reading; a pipe, device or directory is an error, because reading it may never end."""
    try:
        mode = path.stat().st_mode
        # Only a regular file is opened: opening a pipe waits for its other end.
        stream = path.open("rb") if stat.S_ISREG(mode) else None
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name}: cannot be opened ({reason}). Check path and rights.") from error
    if stream is not None:
        return stream
    if stat.S_ISDIR(mode):
        raise InputError(f"{name}: is a directory, expected a picture file. Name the files in it.")
    raise InputError(f"{name}: is a pipe or device, expected a picture file. Read it and pass the bytes.")


def _from_array(array: NDArray[Any], channels: Channels, max_pixels: int) -> Image.Image:
    from PIL import Image

    name = name_of_source(array)
    if array.dtype != np.uint8:
        raise InputError(
            f"{name}: expected uint8 with levels 0 to 255. Scale it, then convert with astype(numpy.uint8)."
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise InputError(
            f"{name}: expected a picture (H, W, 3), (H, W, 4) or (H, W). Pass pictures one by one."
        )
    _check_pixels(name, array.shape[1], array.shape[0], max_pixels)
    if array.ndim == 3 and channels == "bgr":
        order = [2, 1, 0, 3][: array.shape[2]]
        array = array[..., order]
    return _over_white(Image.fromarray(np.ascontiguousarray(array)))


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Take a picture the caller opened: never at reduced scale, which would change the caller's object."""
    _check_pixels(name, *image.size, max_pixels)
    image.load()
    return _upright(_bare_rgb(image, name), _orientation(image))


def _check_pixels(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name}: has no pixels ({width} x {height}), expected a picture.")
    if width * height > max_pixels:
        raise InputError(
            f"{name}: {width} x {height} is {width * height} pixels, the limit is {max_pixels}. "
            "Scale it down, or raise max_pixels if you trust its source."
        )


# -- Decoding -----------------------------------------------------------------------------------------------


def _open_picture(stream: IO[bytes], name: str) -> ImageFile.ImageFile:
    """Read the header of a picture file with the one decoder its first bytes call for."""
    head = stream.read(_HEAD_BYTES)
    if not head:
        raise InputError(f"{name}: is empty, expected a picture file. Replace it.")
    kind = sniff_format(head)
    if kind is None:
        raise InputError(
            f"{name}: begins with {head[:8]!r}, which is no picture format known here; "
            f"expected one of {', '.join(_DECODERS)}. Convert it first."
        )
    module_name, class_name = _DECODERS[kind]
    try:
        plugin = importlib.import_module(f"PIL.{module_name}")
    except ImportError as error:
        raise InputError(
            f"{name}: is {kind}, which the installed Pillow does not read. Update Pillow or convert it."
        ) from error
    opener = cast("Callable[[IO[bytes]], ImageFile.ImageFile]", getattr(plugin, class_name))
    stream.seek(0)
    # No file name goes along: with one, Pillow maps uncompressed files, and a file that shrinks while it is
    # mapped ends the process.
    return opener(stream)


def sniff_format(head: bytes) -> str | None:
    """Return the format that the first bytes of a file call for, whatever the file is named."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):  # the last two: BigTIFF
        return "TIFF"
    if head.startswith(b"BM"):
        return "BMP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head[:1] == b"P" and head[1:2] in b"123456f" and head[2:3].isspace():
        return "PPM"
    return None


def _decode_stream(
    stream: IO[bytes],
    name: str,
    draft_size_px: tuple[int, int] | None,
    max_pixels: int,
    *,
    as_stored: bool = False,
) -> Image.Image:
    """Decode a picture file from its header to upright RGB."""
    image = _open_picture(stream, name)
    _check_pixels(name, *image.size, max_pixels)
    _check_density(stream, image, name)
    if as_stored:
        if image.format == "JPEG" and image.info.get("progressive"):
            _check_scans(stream, name)
        image.load()
        # The way over RGBA gives the same colours, and no warning about palettes with transparency.
        opaque = image.convert("RGBA") if image.has_transparency_data else image
        plain = image._new(image.im) if image.mode == "RGB" else opaque.convert("RGB")
        plain.info = {}
        return plain
    if image.format != "JPEG":
        image.load()
        # after loading: PNG may store EXIF behind the pixels, newer Pillow has turned a TIFF and then says 1
        return _upright(_bare_rgb(image, name), _orientation(image))
    if image.info.get("progressive"):
        _check_scans(stream, name)
    orientation = _orientation(image)
    stored_size_px = image.size
    drafted = None
    if draft_size_px is not None:
        height, width = draft_size_px if orientation < 5 else draft_size_px[::-1]
        drafted = image.draft("RGB", (width, height))
    image.load()
    rgb = _upright(_bare_rgb(image, name), orientation)
    if drafted is not None and image.size != stored_size_px:
        _, (_, _, right, bottom) = drafted
        rgb.info[_REDUCTION_KEY] = _reduction(stored_size_px, image.size, (right, bottom), orientation)
    return rgb


def _reduction(
    stored: tuple[int, int], decoded: tuple[int, int], edge: tuple[float, float], orientation: int
) -> Reduction:
    """Return the upright geometry of a picture of ``stored`` (width, height) that was decoded to ``decoded``.

    The decoder rounds sides up: the last column and row may stand for less than a whole pixel, and ``edge``
    says where the picture really ends.
    """
    right_side, bottom_side = _UPRIGHT_SIDES[orientation]
    cut = {right_side: decoded[0] - edge[0], bottom_side: decoded[1] - edge[1]}
    width, height = decoded if orientation < 5 else decoded[::-1]
    box = (
        cut.get("left", 0.0),
        cut.get("top", 0.0),
        width - cut.get("right", 0.0),
        height - cut.get("bottom", 0.0),
    )
    return Reduction(stored if orientation < 5 else stored[::-1], box)


def _check_density(stream: IO[bytes], image: Image.Image, name: str) -> None:
    """Refuse a small file that claims a large picture, before seconds and gigabytes go into it."""
    pixels = image.width * image.height
    size_bytes = stream.seek(0, os.SEEK_END)
    if pixels > _SMALL_PIXELS and pixels > _MAX_PIXELS_PER_BYTE * size_bytes:
        raise InputError(
            f"{name}: claims {image.width} x {image.height} pixels in {size_bytes} bytes; expected at most "
            f"{_MAX_PIXELS_PER_BYTE} a byte above {_SMALL_PIXELS} pixels. Check or replace the file."
        )


def _check_scans(stream: IO[bytes], name: str) -> None:
    """Refuse a JPEG whose many scans would keep the decoder busy for minutes."""
    stream.seek(0)
    # The marker cannot occur inside coded data, where 0xFF is always followed by 0x00 or a restart marker.
    scans = sum(block.count(b"\xff\xda") for block in iter(lambda: stream.read(1 << 20), b""))
    if scans > _MAX_JPEG_SCANS:
        raise InputError(
            f"{name}: is a JPEG of {scans} scans, the limit is {_MAX_JPEG_SCANS}. Encode it again."
        )


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; damaged or missing metadata count as 1 (upright)."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # the metadata of a picture are no reason to refuse it, whatever their parser raised
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn and mirror the stored picture as EXIF 2.32, tag 0x0112 (Orientation), says it is to be shown."""
    from PIL.Image import Transpose

    method = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


# -- Colour -------------------------------------------------------------------------------------------------


def _bare_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return the loaded picture as opaque RGB, free of metadata and the decoder's class; may share pixels."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(image, name)).convert("RGB")
    rgb = _over_white(image)
    if rgb is image:
        rgb = image._new(image.im)
    rgb.info = {}
    return rgb


def _over_white(image: Image.Image) -> Image.Image:
    """Lay what is transparent over white and convert to RGB. An RGB picture is returned as it is."""
    from PIL import Image

    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # premultiplied grey converts to nothing else
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return white


def _to_8_bit(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Scale a grey picture of 16 or 32 bits or of floats to 8 bits; Pillow's ``convert`` would clip it.

    Pillow's 32-bit modes do not say which range is meant. A 16-bit PNG or PGM (older Pillow opens them in a
    32-bit mode) has 16; otherwise the smallest of these ranges that holds all pixels is taken: floats 0 to 1,
    8 bits, 16 bits, and else darkest to brightest.

    Returns:
        ``(H, W)`` uint8.
    """
    levels = np.asarray(image)
    if not np.isfinite(levels).all():
        raise InputError(f"{name}: holds NaN or infinite pixels, expected numbers. Replace them first.")
    low, high = float(levels.min()), float(levels.max())
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        low, high = 0.0, 65535.0
    elif low >= 0 and image.mode == "F" and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 255.0 if high <= 255 else 65535.0
    scale = 255.0 / (high - low) if high > low else 0.0
    shifted = levels.astype(np.float32) - np.float32(low)
    scaled: NDArray[np.uint8] = np.rint(shifted * np.float32(scale)).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a PNG names one grey level as transparent
        scaled[levels == transparent] = 255
    return scaled
