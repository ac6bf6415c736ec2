"""Splitting streams into frames: nothing lost, nothing made up, whatever the pieces and the damage."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.errors import ConfigError
from edgeclip.frames import RAW_PIXELS, PictureSplitter, RawFormat, RawSplitter, Splitter
from edgeclip.pictures import decode_image

PHOTOS = sorted((Path(__file__).parents[1] / "edgeclip" / "assets" / "photos").glob("*.jpg"))
BOUNDARY = b"\r\n--frame\r\nContent-Type: image/jpeg\r\n\r\n"


def _file(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def plain() -> list[bytes]:
    """Return pictures of all codings, without other pictures inside."""
    rng = random.Random(0)
    found = []
    for path in PHOTOS[:8]:
        photo = Image.open(path).convert("RGB")
        sizes = [(rng.randrange(16, 150), rng.randrange(16, 150)) for _ in range(4)]
        found += [
            _file(photo.resize(sizes[0]), "JPEG", quality=rng.choice([5, 50, 95])),
            _file(photo.resize(sizes[1]), "JPEG", progressive=True),
            _file(photo.resize(sizes[2]), "JPEG", restart_marker_blocks=2),
            _file(photo.resize(sizes[3]), "PNG"),
        ]
    return found


@pytest.fixture(scope="module")
def nested(plain: list[bytes]) -> list[bytes]:
    """Return JPEGs that hold whole JPEGs: a thumbnail, a comment, a profile of several segments."""
    photo = Image.open(PHOTOS[0]).convert("RGB").resize((200, 150))
    thumbnail = plain[0]
    return [
        _file(photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail),
        _file(photo, "JPEG", comment=b"\xff\xd8\xff\xd9" + thumbnail),
        _file(photo, "JPEG", icc_profile=thumbnail * (150_000 // len(thumbnail))),
    ]


def _split(splitter: Splitter, stream: bytes, piece: Callable[[], int]) -> list[bytes]:
    found, position = [], 0
    while position < len(stream):
        space = splitter.space()
        size = min(len(space), piece(), len(stream) - position)
        space[:size] = stream[position : position + size]
        position += size
        found += [bytes(frame) for frame in splitter.take(size)]
    found += [bytes(frame) for frame in splitter.finish()]
    assert sum(map(len, found)) + splitter.skipped_bytes == len(stream)
    return found


def _pictures(stream: bytes, piece: int = 1 << 20) -> list[bytes]:
    return _split(PictureSplitter(), stream, lambda: piece)


def _garbage(rng: random.Random) -> bytes:
    drawn = rng.randbytes(rng.randrange(3000))
    return drawn.replace(b"\xff\xd8", b"\0\0").replace(b"\xff\xd9", b"\0\0") + b"."


@pytest.mark.parametrize("seed", range(12))
def test_frames_found_are_frames_sent(plain: list[bytes], nested: list[bytes], seed: int) -> None:
    rng = random.Random(seed)
    for trial in range(25):
        sent, stream = [], b""
        for _ in range(rng.randrange(1, 16)):
            kind = rng.randrange(4)
            if kind < 2:
                sent.append(rng.choice(plain + nested))
                stream += sent[-1]
            elif kind == 2:
                stream += rng.choice([_garbage(rng), BOUNDARY, bytes(rng.randrange(9)), b"\xff\xd8"])
            else:
                broken = rng.choice(plain)
                stream += broken[: rng.randrange(1, len(broken))]
        pieces = (lambda: 1 << 20, lambda: 7, lambda: rng.randrange(1, 50), lambda: rng.randrange(1, 5000))
        found = _split(PictureSplitter(), stream, rng.choice(pieces))
        assert [len(each) for each in found] == [len(each) for each in sent], trial
        assert found == sent, trial


def test_every_cut_of_a_picture_leaves_the_next_one_whole(plain: list[bytes]) -> None:
    for broken, following in (
        (plain[0], plain[1]),
        (plain[2], plain[4]),
        (plain[3], plain[6]),
        plain[1::2][:2],
    ):
        cuts = [*range(1, min(len(broken), 900)), *range(900, len(broken), 97)]
        for cut in cuts:
            assert _pictures(broken[:cut] + following) == [following], cut


def test_pillow_finds_the_same_pixels_in_what_was_found(plain: list[bytes], nested: list[bytes]) -> None:
    sent = plain + nested
    for before, after in zip(sent, _pictures(BOUNDARY.join(sent)), strict=True):
        with Image.open(io.BytesIO(before)) as a, Image.open(io.BytesIO(after)) as b:
            assert np.array_equal(np.asarray(a), np.asarray(b))


def test_garbage_is_counted_to_the_byte_while_the_stream_goes_on(plain: list[bytes]) -> None:
    splitter = PictureSplitter()
    for number in range(1, 4):
        piece = BOUNDARY + plain[0] + b"\r\n"
        splitter.space()[: len(piece)] = piece
        assert list(splitter.take(len(piece))) == [plain[0]]
        assert splitter.skipped_bytes == number * (len(BOUNDARY) + 2)
    assert splitter.cut_frames == 0


@pytest.mark.parametrize("cut", [1, 3, 30, 700, -1])
def test_a_stream_that_ends_inside_a_frame(plain: list[bytes], cut: int) -> None:
    splitter = PictureSplitter()
    stream = plain[0] + plain[1][:cut]
    splitter.space()[: len(stream)] = stream
    assert list(splitter.take(len(stream))) == [plain[0]]
    begun = len(plain[1][:cut]) >= 3
    assert (splitter.inside_bytes > 0) == begun
    assert list(splitter.finish()) == []
    assert (splitter.cut_frames, splitter.skipped_bytes) == (int(begun), len(plain[1][:cut]))


def test_an_interrupted_frame_is_counted(plain: list[bytes]) -> None:
    splitter = PictureSplitter()
    assert _split(splitter, plain[0][:-50] + plain[1] + plain[3][:-20] + plain[0], lambda: 999) == [
        plain[1],
        plain[0],
    ]
    assert splitter.cut_frames == 2


def test_a_frame_above_the_limit_is_garbage(plain: list[bytes]) -> None:
    small, large = plain[0], _file(Image.open(PHOTOS[0]).convert("RGB").resize((900, 700)), "PNG")
    assert len(large) > 400_000 > len(small)
    splitter = PictureSplitter(limit_bytes=400_000)
    assert _split(splitter, small + large + small, lambda: 65536)[-1] == small
    header = small[: small.index(b"\xff\xda") + 14]
    splitter = PictureSplitter(limit_bytes=400_000)
    assert _split(splitter, header + b"a" * 3_000_000 + small, lambda: 65536) == [small]
    assert len(splitter._buffer) < 2_000_000


@pytest.mark.parametrize("number", [1, 3], ids=["JPEG", "PNG"])
def test_pixels_that_break_off_are_not_waited_for(plain: list[bytes], number: int) -> None:
    whole = plain[3]
    at = whole.index(b"IDAT")
    claims = whole[: at - 4] + (60_000_000).to_bytes(4, "big") + whole[at : at + 300]
    for piece in (7, 1 << 16):
        splitter = PictureSplitter()
        stream, found = claims + plain[number], []
        while stream:
            part, stream = stream[:piece], stream[piece:]
            splitter.space()[: len(part)] = part
            found += splitter.take(len(part))
        assert found == [plain[number]]
        assert (splitter.cut_frames, splitter.skipped_bytes) == (1, len(claims))


def test_motion_jpeg_without_its_tables(plain: list[bytes]) -> None:
    whole, bare, position = plain[0], bytearray(b"\xff\xd8"), 2
    while whole[position + 1] != 0xDA:
        size = 2 + int.from_bytes(whole[position + 2 : position + 4], "big")
        if whole[position + 1] != 0xC4:  # as webcams leave Huffman tables out
            bare += whole[position : position + size]
        position += size
    bare += whole[position:]
    assert len(bare) < len(whole) - 400
    assert _pictures(BOUNDARY.join([bytes(bare)] * 3)) == [bare] * 3
    assert np.array_equal(np.asarray(decode_image(bytes(bare))), np.asarray(decode_image(whole)))


def test_large_frames_come_whole_and_memory_goes_back(plain: list[bytes]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1500, 3), np.uint8)
    large = _file(Image.fromarray(noise), "PNG", compress_level=0)
    splitter = PictureSplitter()
    assert _split(splitter, large + plain[0] * 400 + large, lambda: 65536) == [
        large,
        *[plain[0]] * 400,
        large,
    ]
    _split(splitter, plain[0] * 400, lambda: 65536)
    assert len(splitter._buffer) < 1_000_000


# What takes longest to tell from pictures: beginnings, segments and chunks that lead nowhere.
HOSTILE = {
    "random": os.urandom,
    "beginnings": lambda size: b"\xff\xd8\xff" * (size // 3),
    "fill": lambda size: b"\xff\xd8" + b"\xff" * size,
    "segments": lambda size: b"\xff\xd8\xff\xe0\xff\xff" * (size // 6),
    "short segments": lambda size: b"\xff\xd8" + b"\xff\xe0\0\x04\xff\xd8" * (size // 6),
    "chunks": lambda size: (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17) + b"\x03\0\0\0IDAT") * (size // 41),
    "scans": lambda size: (b"\xff\xd8\xff\xda\0\x08\x01\0\0\0\x3f\0" + b"a" * 20) * (size // 32),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_time_grows_with_the_stream_and_no_faster(kind: str) -> None:
    def seconds(size: int) -> float:
        stream = HOSTILE[kind](size)
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            _pictures(stream, 65536)
            best = min(best, time.process_time() - began)
        return best

    # Eight times as much: a quadratic search would take 64 times as long.
    assert seconds(240_000) < 24 * max(seconds(30_000), 0.002)


# -- raw pixels --------------------------------------------------------------------------------------------


def _levels(form: RawFormat) -> tuple[bytes, np.ndarray]:
    """Return a frame of smooth colours as raw bytes, and the pixels ITU-R BT.601 says they are."""
    rng = np.random.default_rng(3)
    y = rng.integers(16, 236, (form.height, form.width)).astype(np.float64)
    down = 1 if form.pixels == "yuyv" else 2
    u, v = rng.integers(90, 160, (2, form.height // down, form.width // 2)).astype(np.float64)
    if form.pixels == "yuyv":
        packed = np.stack([y[:, ::2], u, y[:, 1::2], v], axis=-1)
    elif form.pixels == "nv12":
        packed = np.concatenate([y.ravel(), np.stack([u, v], axis=-1).ravel()])
    else:
        packed = np.concatenate([y.ravel(), u.ravel(), v.ravel()])
    cb, cr = (plane.repeat(2, axis=1).repeat(down, axis=0) - 128 for plane in (u, v))
    luma = 255 / 219 * (y - 16)
    # BT.601: Kr = 0.299, Kb = 0.114; chroma from 16 to 240
    red = luma + 255 / 224 * 2 * (1 - 0.299) * cr
    blue = luma + 255 / 224 * 2 * (1 - 0.114) * cb
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return packed.astype(np.uint8).tobytes(), np.stack([red, green, blue], axis=-1).clip(0, 255)


@pytest.mark.parametrize("pixels", ["yuyv", "nv12", "i420"])
def test_chroma_layouts_are_those_of_bt601(pixels: str) -> None:
    form = RawFormat(36, 20, pixels)
    frame, expected = _levels(form)
    assert len(frame) == form.size_bytes
    # Two roundings, and Pillow's own of fixed-point products.
    assert np.abs(np.asarray(form.picture(frame), float) - expected).max() <= 2.5


def test_plain_layouts_are_taken_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(np.asarray(RawFormat(7, 5).picture(pixels.tobytes())), pixels)
    bgr = RawFormat(7, 5, "bgr").picture(pixels[..., ::-1].tobytes())
    assert np.array_equal(np.asarray(bgr), pixels)
    gray = RawFormat(7, 5, "gray").picture(pixels[..., 0].tobytes())
    assert np.array_equal(np.asarray(gray), pixels[..., 0])


@pytest.mark.parametrize("piece", [1, 100, 10_000])
def test_raw_frames_are_cut_by_size(piece: int) -> None:
    form = RawFormat.parse("16x10:gray")
    sent = [os.urandom(160) for _ in range(7)]
    splitter = RawSplitter(form)
    assert _split(splitter, b"".join(sent) + b"rest", lambda: piece) == sent
    assert (splitter.cut_frames, splitter.skipped_bytes) == (1, 4)


@pytest.mark.parametrize("layout", RAW_PIXELS)
def test_formats_are_read(layout: str) -> None:
    assert RawFormat.parse(f"640x480:{layout}") == RawFormat(640, 480, layout)
    assert RawFormat.parse("8X6") == RawFormat(8, 6, "rgb")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("640", "'640', expected WIDTHxHEIGHT"),
        ("640x480:rgba", "got 'rgba', expected one of rgb, bgr"),
        ("0x480", "have 0 bytes each"),
        ("9999x9999", "299,940,003 bytes each"),
        ("641x480:nv12", "641x480:nv12 share colours"),
        ("640x481:i420", "must be even"),
        ("641x480:yuyv", "must be even"),
    ],
)
def test_formats_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RawFormat.parse(text)
