"""Bytes of a camera or a pipe to frames: pictures one after another, or raw pixels.

A splitter is handed bytes as they come, in pieces of any size, and gives back every frame that is complete.
It decodes nothing: a JPEG is followed from marker to marker (ITU-T T.81, annex B), a PNG from chunk to chunk
(ISO/IEC 15948, clause 5), so that a thumbnail inside a picture does not end it. What lies between pictures
(the boundaries and headers of HTTP multipart streams, padding, damage) is skipped and counted.

Every byte is looked at a bounded number of times, whatever it is, and no more than one frame and one read
are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from .errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .pictures import ImageSource

__all__ = ["FRAME_LIMIT_BYTES", "RAW_PIXELS", "PictureSplitter", "RawFormat", "RawSplitter", "Splitter"]

FRAME_LIMIT_BYTES: Final = 64 << 20
"""Larger frames are taken for damage."""

_READ_BYTES: Final = 128 << 10  # twice what a pipe holds on Linux
_BUFFER_BYTES: Final = 4 * _READ_BYTES  # of pictures; grows for larger ones

_SOI, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_BEGINNING: Final = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n")
# How files begin, in more bytes than chance writes into compressed pixels.
_PNG_HEADER: Final = _PNG + b"\0\0\0\rIHDR"
_JPEG_HEADER: Final = re.compile(
    rb"\xff\xd8\xff(?:\xdb\0[\x43\x84]\0|\xe0..(?:JFIF|AVI1)|\xe1..Exif)", re.DOTALL
)
# In coded data 0xFF is followed by 0x00, by another 0xFF, or is a restart marker.
_MARKER: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class Splitter(Protocol):
    """Cuts a stream into frames. Used by one thread.

    Attributes:
        skipped_bytes: bytes so far that belong to no frame.
        cut_frames: frames so far that began and did not end.
        inside_bytes: bytes of the frame that has begun and is not complete.
    """

    skipped_bytes: int
    cut_frames: int

    @property
    def inside_bytes(self) -> int:
        """See above."""
        ...

    def space(self) -> memoryview:
        """Return where the next bytes are to be written; valid until :meth:`take`."""
        ...

    def take(self, count: int) -> Iterator[bytes | bytearray]:
        """Take over the first ``count`` bytes of the space, and yield frames that are complete."""
        ...

    def finish(self) -> Iterator[bytes | bytearray]:
        """Yield what frames are left, and count the rest as skipped. No bytes may follow."""
        ...

    def picture(self, frame: bytes | bytearray) -> ImageSource:
        """Return a frame as something that a classifier takes."""
        ...


class _Step(NamedTuple):
    """How following a picture ended: it is ``size`` bytes long, or the search goes on behind so many."""

    size: int
    whole: bool


# -- Pictures -----------------------------------------------------------------------------------------------


class PictureSplitter:
    """Find JPEG and PNG files in a stream of bytes, see :class:`Splitter`.

    A picture that breaks off (another begins inside it, or its structure does not go on) is skipped, and the
    search goes on behind the last part of it that was proved: by another that began where it ended. Nothing
    is lost of the next picture; a thumbnail counts as a picture where the metadata around it break off.

    Args:
        limit_bytes: a picture that claims to be larger is skipped.
    """

    def __init__(self, *, limit_bytes: int = FRAME_LIMIT_BYTES) -> None:
        self.skipped_bytes = 0
        self.cut_frames = 0
        self._limit = limit_bytes
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = 0  # all before is done with
        self._end = 0  # all from here on is free
        self._walk: _JpegWalk | _PngWalk | None = None  # through the picture at start

    @property
    def inside_bytes(self) -> int:
        """Bytes of the picture that has begun and is not complete."""
        return 0 if self._walk is None else self._end - self._start

    def space(self) -> memoryview:
        """Return room for the next bytes, 128 KiB or more."""
        kept = self._end - self._start
        if kept + _READ_BYTES <= _BUFFER_BYTES < len(self._buffer):
            self._move_to(bytearray(_BUFFER_BYTES))
        elif len(self._buffer) - self._end < _READ_BYTES:
            if self._start >= kept + _READ_BYTES:
                self._move_to(self._buffer)
            else:
                self._move_to(bytearray(2 * (kept + _READ_BYTES)))
        return memoryview(self._buffer)[self._end :]

    def take(self, count: int) -> Iterator[bytes]:
        """Yield the pictures that ``count`` more bytes complete."""
        self._end += count
        return self._pictures(last=False)

    def finish(self) -> Iterator[bytes]:
        """Yield pictures behind one that was begun and is not complete, where there are any."""
        return self._pictures(last=True)

    def picture(self, frame: bytes | bytearray) -> ImageSource:
        """Return the frame: it is the content of a file."""
        return frame

    def _move_to(self, buffer: bytearray) -> None:
        kept = self._end - self._start
        buffer[:kept] = self._buffer[self._start : self._end]
        self._buffer, self._start, self._end = buffer, 0, kept

    def _pictures(self, *, last: bool) -> Iterator[bytes]:
        ends_inside = last and self._walk is not None
        while (walk := self._walk or self._find(last=last)) is not None:
            step = walk.advance(self._buffer, self._start, self._end)
            if step is None and not last:
                return
            size, whole = step or _Step(walk.again, whole=False)
            end = self._start + size
            proved = walk.overlooked(self._buffer, self._start, end)
            if whole and proved == end:
                yield bytes(memoryview(self._buffer)[self._start : end])
                self._start = end
            else:
                self.cut_frames += walk.proved or ends_inside
                self._skip(proved)
            self._walk, ends_inside = None, False

    def _find(self, *, last: bool) -> _JpegWalk | _PngWalk | None:
        """Begin to follow the next picture; what is before it is skipped."""
        found = _BEGINNING.search(self._buffer, self._start, self._end)
        if found is not None:
            self._skip(found.start())
            follow = _PngWalk if self._buffer[self._start] == _PNG[0] else _JpegWalk
            self._walk = follow(self._limit)
            return self._walk
        tail = bytes(self._buffer[max(self._start, self._end - len(_PNG) + 1) : self._end])
        kept = 0 if last else _begun(tail)
        self._skip(self._end - kept)
        if not kept:
            self._start = self._end = 0
        return None

    def _skip(self, position: int) -> None:
        self.skipped_bytes += position - self._start
        self._start = position


def _begun(tail: bytes) -> int:
    """Return how many bytes at the end of ``tail`` may be the beginning of a picture."""
    for size in range(len(tail), 0, -1):
        if _SOI.startswith(tail[-size:]) or _PNG.startswith(tail[-size:]):
            return size
    return 0


class _JpegWalk:
    """Follow one JPEG from marker to marker. Offsets count from its first byte."""

    _EOI, _SOI, _SOS, _COM = 0xD9, 0xD8, 0xDA, 0xFE
    _SCAN_BYTES = 16  # the longest header of a scan, which may have broken off unseen, too

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next = 2  # where a marker is expected, or from where one is looked for in coded data
        self._coded = False
        self._first_coded = 0  # where the coded data begins; 0 before
        self._segment = 0  # the segment that is to end at _next; 0 where there is none
        self.again = 2  # where to look for pictures if there is no marker at _next
        self.proved = False  # a segment ended where another began

    def advance(self, buffer: bytearray, start: int, end: int) -> _Step | None:
        """Return how the picture ends, or ``None`` while that needs more bytes."""
        while True:
            if self._next > self._limit:
                return _Step(self.again, whole=False)
            if self._coded and not self._leave_coded(buffer, start, end):
                return _Step(self._next, whole=False) if end - start > self._limit else None
            at = start + self._next
            if at + 2 > end:
                return None
            if buffer[at] != 0xFF:
                return _Step(self.again, whole=False)
            code = buffer[at + 1]
            if code == 0xFF:  # a fill byte
                self._next += 1
                continue
            if code == self._EOI:
                return _Step(self._next + 2, whole=self._first_coded > 0)
            if code < 0xC0 or 0xD0 <= code <= self._SOI:
                return _Step(self.again, whole=False)
            if at + 4 > end:
                return None
            size = 2 + (buffer[at + 2] << 8 | buffer[at + 3])
            if code == self._SOS and size >= 4 and at + size > end:
                return None
            if size < 4 or (code == self._SOS and not _is_scan(buffer[at + 4 : at + size])):
                return _Step(self.again, whole=False)
            if self._segment and self._swallows(buffer, start):
                return _Step(self.again, whole=False)
            self.proved = self.proved or self._segment > 0
            self._segment = self._next
            self.again = self._next + 2
            self._next += size
            if code == self._SOS:
                self._coded, self._segment = True, 0
                self._first_coded = self._first_coded or self._next

    def overlooked(self, buffer: bytearray, start: int, position: int) -> int:
        """Return where a PNG begins in what was taken for coded data, else ``position``."""
        first = start + self._first_coded - self._SCAN_BYTES
        found = buffer.find(_PNG, first, position) if self._first_coded else -1
        return position if found < 0 else found

    def _leave_coded(self, buffer: bytearray, start: int, end: int) -> bool:
        """Go to the next marker; ``False`` where there is none yet."""
        marker = _MARKER.search(buffer, start + self._next, end)
        if marker is None:
            self._next = max(self._next, end - start - (buffer[end - 1] == 0xFF))
            self.again = self._next
            return False
        self._next = self.again = marker.start() - start
        self._coded = False
        return True

    def _swallows(self, buffer: bytearray, start: int) -> bool:
        """Return whether another picture begins in the segment behind us.

        A segment that breaks off takes what follows for its own. Tables hold no pictures; other segments may,
        but do not end with the beginning of one.
        """
        code, begin, end = buffer[start + self._segment + 1], start + self._segment + 4, start + self._next
        if 0xE0 <= code <= 0xEF or code == self._COM:
            return buffer.find(_SOI, end - 2, end + 1) >= 0
        return _BEGINNING.search(buffer, begin, end + len(_SOI) - 2) is not None


def _is_scan(header: bytearray) -> bool:
    """Return whether the parameters of a scan are possible (T.81, B.2.3)."""
    count = header[0] if header else 0
    if not 1 <= count <= 4 or len(header) != 4 + 2 * count:
        return False
    tables, (first, last, bits) = header[2:-3:2], header[-3:]
    return all(not table & 0xCC for table in tables) and first <= 63 >= last and bits >> 4 <= 13 >= bits & 15


class _PngWalk:
    """Follow one PNG from chunk to chunk. Offsets count from its first byte."""

    _IEND = b"\0\0\0\0IEND\xaeB`\x82"
    _HEADERS = 128  # what stands before the pixels takes less, but for metadata

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next = self.again = len(_PNG)
        self._pixels = 0  # up to where the pixels in the chunk that ends at _next were looked at; 0 elsewhere
        self.proved = False

    def advance(self, buffer: bytearray, start: int, end: int) -> _Step | None:
        """Return how the picture ends, or ``None`` while that needs more bytes."""
        while True:
            at = start + self._next
            if self._pixels and self._swallows(buffer, start, min(at, end)):
                return _Step(self.again, whole=False)
            if at + 12 > end:
                return None
            size, kind = int.from_bytes(buffer[at : at + 4], "big"), bytes(buffer[at + 4 : at + 8])
            is_first = self._next == len(_PNG)
            if buffer.find(_PNG, max(start + self.again, at - self._HEADERS), at) >= 0:
                # a chunk that breaks off took what follows for its own
                return _Step(self.again, whole=False)
            if kind == b"IEND":
                whole = not is_first and buffer[at : at + 12] == self._IEND
                return _Step(self._next + 12 if whole else self.again, whole)
            is_header = kind == b"IHDR" and size == 13
            if is_header != is_first or not kind.isalpha() or self._next + size > self._limit:
                return _Step(self.again, whole=False)
            self.proved = not is_first
            self.again = self._next + 8
            self._pixels = self.again if kind == b"IDAT" else 0
            self._next += 12 + size

    def _swallows(self, buffer: bytearray, start: int, end: int) -> bool:
        """Return whether another picture begins in the pixels up to ``end``: their chunk breaks off.

        It is not waited for: a chunk may claim what a camera takes minutes to send.
        """
        looked = start + self._pixels
        self._pixels = max(self._pixels, end - start - len(_PNG_HEADER) + 1)
        is_png = buffer.find(_PNG_HEADER, looked, end) >= 0
        return is_png or _JPEG_HEADER.search(buffer, looked, end) is not None

    def overlooked(self, buffer: bytearray, start: int, position: int) -> int:
        """Return ``position``: nothing was passed over unseen."""
        return position


# -- Raw pixels ---------------------------------------------------------------------------------------------

RAW_PIXELS: Final = {"rgb": 24, "bgr": 24, "gray": 8, "yuyv": 16, "nv12": 12, "i420": 12}
"""Bits a pixel of the layouts that are read."""

_RAW: Final = re.compile(r"(\d{1,5})x(\d{1,5})(?::(\w+))?")


@dataclass(frozen=True)
class RawFormat:
    """How raw frames lie in a stream: rows from the top, without gaps.

    ``rgb``, ``bgr``: three bytes a pixel; ``gray``: one. ``yuyv`` (4:2:2 packed), ``nv12`` and ``i420``
    (4:2:0, chroma interleaved or in planes of its own): ITU-R BT.601 with Y from 16 to 235, as webcams give
    them and ffmpeg's ``yuyv422``, ``nv12`` and ``yuv420p`` are.

    Raises:
        ConfigError: an unknown layout, no pixels, too many, or an odd side where chroma is shared.
    """

    width: int
    height: int
    pixels: str = "rgb"

    def __post_init__(self) -> None:
        if self.pixels not in RAW_PIXELS:
            raise ConfigError(f"raw frames: got {self.pixels!r}, expected one of {', '.join(RAW_PIXELS)}.")
        said = f"raw frames of {self.width}x{self.height}:{self.pixels}"
        if not 0 < self.size_bytes <= FRAME_LIMIT_BYTES:
            raise ConfigError(
                f"{said} have {self.size_bytes:,} bytes each, expected 1 to {FRAME_LIMIT_BYTES:,}. "
                "Scale them down before."
            )
        odd_height = self.height % 2 and self.pixels != "yuyv"
        if RAW_PIXELS[self.pixels] in (12, 16) and (self.width % 2 or odd_height):
            raise ConfigError(f"{said} share colours between pixels, so their sides must be even.")

    @classmethod
    def parse(cls, text: str) -> RawFormat:
        """Return the format of a text such as ``640x480`` or ``640x480:nv12``.

        Raises:
            ConfigError: it is no such text, or names what cannot be.
        """
        found = _RAW.fullmatch(text.strip().lower())
        if found is None:
            raise ConfigError(
                f"raw frames: got {text!r}, expected WIDTHxHEIGHT[:{'|'.join(RAW_PIXELS)}], "
                "such as 640x480:yuyv."
            )
        return cls(int(found[1]), int(found[2]), found[3] or "rgb")

    @property
    def size_bytes(self) -> int:
        """Bytes a frame."""
        return self.width * self.height * RAW_PIXELS[self.pixels] // 8

    def picture(self, frame: bytes | bytearray) -> ImageSource:
        """Return a frame as a PIL picture of its own memory."""
        from PIL import Image

        size = (self.width, self.height)
        if self.pixels in ("rgb", "bgr"):
            return Image.frombytes("RGB", size, frame, "raw", self.pixels.upper())
        if self.pixels == "gray":
            return Image.frombytes("L", size, frame)
        y, u, v = self._planes(np.frombuffer(frame, np.uint8))
        colours = [Image.fromarray(_FULL_C[plane]).resize(size, Image.Resampling.NEAREST) for plane in (u, v)]
        return Image.merge("YCbCr", [Image.fromarray(_FULL_Y[y]), *colours]).convert("RGB")

    def _planes(
        self, levels: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Return Y ``(H, W)`` and both chroma planes at their own size."""
        height, width = self.height, self.width
        if self.pixels == "yuyv":
            pairs = levels.reshape(height, width // 2, 4)
            return pairs[..., ::2].reshape(height, width), pairs[..., 1], pairs[..., 3]
        y, chroma = np.split(levels, [height * width])
        if self.pixels == "nv12":
            both = chroma.reshape(height // 2, width // 2, 2)
            u, v = both[..., 0], both[..., 1]
        else:
            u, v = chroma.reshape(2, height // 2, width // 2)
        return y.reshape(height, width), u, v


def _stretched(levels: int, middle: int) -> NDArray[np.uint8]:
    """Return the full-range level of each level of a range with so many ``levels`` beside ``middle``."""
    offset = np.arange(256) - (16 if middle == 0 else middle)
    full: NDArray[np.uint8] = np.rint(offset * 255 / levels + middle).clip(0, 255).astype(np.uint8)
    return full


# Pillow's YCbCr is that of JPEG, from 0 to 255.
_FULL_Y: Final = _stretched(219, 0)
_FULL_C: Final = _stretched(224, 128)


class RawSplitter:
    """Cut a stream into raw frames of one size, see :class:`Splitter`. Nothing lies between them.

    Args:
        form: what a frame is.
    """

    def __init__(self, form: RawFormat) -> None:
        self.skipped_bytes = 0
        self.cut_frames = 0
        self.inside_bytes = 0
        self._form = form
        self._frame = bytearray(form.size_bytes)

    def space(self) -> memoryview:
        """Return the rest of the frame."""
        return memoryview(self._frame)[self.inside_bytes :]

    def take(self, count: int) -> Iterator[bytearray]:
        """Yield the frame if it is complete; its memory is the caller's."""
        self.inside_bytes += count
        if self.inside_bytes == len(self._frame):
            frame, self._frame = self._frame, bytearray(len(self._frame))
            self.inside_bytes = 0
            yield frame

    def finish(self) -> Iterator[bytearray]:
        """Yield nothing: a part of a frame is no frame."""
        self.skipped_bytes += self.inside_bytes
        self.cut_frames += self.inside_bytes > 0
        yield from ()

    def picture(self, frame: bytes | bytearray) -> ImageSource:
        """Return the frame as a PIL picture."""
        return self._form.picture(frame)
