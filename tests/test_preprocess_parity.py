"""Resizing and cropping equal torchvision's on PIL pictures, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgeclip.preprocess import Preprocess, PreprocessSpec

torch = pytest.importorskip("torch")
import torchvision_shim  # noqa: E402, F401  (torchvision needs it)
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor  # noqa: E402

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def torchvision_pixels(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """Return what torchvision makes of the picture, ``(H, W, 3)`` uint8."""
    interpolation = MODES[spec.interpolation]
    if spec.resize == "squash":
        return np.asarray(Resize(spec.image_size_px, interpolation)(image))
    size = spec.image_size_px[0]
    return np.asarray(Compose([Resize(size, interpolation), CenterCrop(size)])(image))


def noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def odd_sizes(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Return sizes (width, height): small, tall, wide, near the target, one short side, and camera-like."""
    sizes = []
    for index in range(count):
        kind = index % 6
        short, long = int(rng.integers(1, 300)), int(rng.integers(300, 1400))
        size = {
            0: (short, int(rng.integers(1, 300))),
            1: (short, long),
            2: (long, short),
            3: (int(rng.integers(215, 235)), int(rng.integers(215, 235))),
            4: (int(rng.integers(300, 1400)) | 1, long | 1),
            5: (long, long * 3 // 4),
        }[kind]
        if max(size) <= 40 * min(size):  # a narrower one explodes in both
            sizes.append(size)
    return sizes


def assert_equal_to_torchvision(seed: int, count: int) -> int:
    rng = np.random.default_rng(seed)
    compared = 0
    for index, (width, height) in enumerate(odd_sizes(rng, count)):
        image = noise(rng, width, height)
        target = (224, 256, 97, 224, 192)[index % 5]
        for interpolation in MODES:
            spec = PreprocessSpec(image_size_px=(target, target), interpolation=interpolation)
            np.testing.assert_array_equal(
                Preprocess(spec)(image), torchvision_pixels(image, spec), err_msg=f"{width}x{height} {spec}"
            )
        compared += 1
    return compared


def test_shortest_and_centre_crop_equal_torchvision() -> None:
    assert assert_equal_to_torchvision(seed=0, count=48) >= 30


@pytest.mark.slow
def test_shortest_and_centre_crop_equal_torchvision_over_500_sizes() -> None:
    assert assert_equal_to_torchvision(seed=1, count=700) >= 500


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("target", [(224, 224), (160, 224), (225, 131)])
def test_squash_equals_torchvision(interpolation: str, target: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    spec = PreprocessSpec(image_size_px=target, resize="squash", interpolation=interpolation)
    for width, height in [(1, 1), (3, 700), (224, 160), (641, 427), (399, 1201)]:
        image = noise(rng, width, height)
        np.testing.assert_array_equal(Preprocess(spec)(image), torchvision_pixels(image, spec))


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("target", [(160, 224), (225, 131), (77, 300)])
def test_other_than_square_equals_open_clip(interpolation: str, target: tuple[int, int]) -> None:
    transform = pytest.importorskip("open_clip.transform")
    rng = np.random.default_rng(3)
    reference = Compose(
        [transform.ResizeKeepRatio(target, interpolation=MODES[interpolation]), CenterCrop(target)]
    )
    spec = PreprocessSpec(image_size_px=target, interpolation=interpolation)
    for width, height in odd_sizes(rng, 12):
        image = noise(rng, width, height)
        np.testing.assert_array_equal(
            Preprocess(spec)(image), np.asarray(reference(image)), err_msg=f"{width}x{height} {target}"
        )


def test_normalize_equals_torchvision() -> None:
    rng = np.random.default_rng(4)
    batch = rng.integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    spec = PreprocessSpec(image_size_px=(8, 9), mean=mean, std=std, applied="host")
    reference = Compose([ToTensor(), Normalize(mean, std)])
    expected = torch.stack([reference(Image.fromarray(picture)) for picture in batch]).numpy()
    result = Preprocess(spec).normalize(batch)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)
