"""Every operation equals torchvision's on PIL pictures, byte by byte, and so do the magnitudes drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from sample_pictures import photo

from edgeclip.distill.operations import OPERATIONS

torch = pytest.importorskip("torch")
import torchvision_shim  # noqa: E402, F401  (torchvision needs it)
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide  # noqa: E402
from torchvision.transforms.autoaugment import _apply_op  # noqa: E402

NAMES = [kind.name for kind in OPERATIONS]
FLOAT32_EPSILON = 2.0**-23


def pictures() -> list[Image.Image]:
    """Return a photograph, noise, one colour, black and white, and a strip; sides even and odd."""
    rng = np.random.default_rng(0)
    arrays = [
        photo(64, 64),
        photo(61, 47, seed=1),
        rng.integers(0, 256, (32, 45, 3), dtype=np.uint8),
        np.full((17, 16, 3), (200, 3, 90), dtype=np.uint8),
        rng.integers(0, 2, (20, 21, 3), dtype=np.uint8) * 255,
        rng.integers(100, 140, (3, 90, 3), dtype=np.uint8),
    ]
    return [Image.fromarray(array) for array in arrays]


def magnitudes(name: str, size_px: tuple[int, int]) -> list[float]:
    """Return what torchvision's two policies draw for a picture of this size, in 7, 10 and 31 bins."""
    found: set[float] = set()
    for bins in (7, 10, 31):
        for space in (
            RandAugment()._augmentation_space(bins, size_px),
            TrivialAugmentWide()._augmentation_space(bins),
        ):
            values, signed = space[name]
            said = [float(value) for value in values.reshape(-1)]
            found.update(said)
            if signed:
                found.update(-value for value in said)
    return sorted(found)


def test_names_and_order_are_those_of_torchvision() -> None:
    assert list(RandAugment()._augmentation_space(31, (224, 224))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_pixels_equal_torchvision_at_every_magnitude(name: str) -> None:
    kind = OPERATIONS[NAMES.index(name)]
    changed = 0
    for image in pictures():
        before = image.tobytes()
        for magnitude in magnitudes(name, image.size[::-1]):
            expected = _apply_op(image, name, magnitude, interpolation=InterpolationMode.NEAREST, fill=None)
            assert kind.apply(image, magnitude).tobytes() == expected.tobytes(), (image.size, magnitude)
            changed += expected.tobytes() != before
        assert image.tobytes() == before
    assert (changed > 0) == (name != "Identity")


@pytest.mark.parametrize("name", NAMES)
def test_pixels_equal_torchvision_at_random_magnitudes_and_full_size(name: str) -> None:
    kind = OPERATIONS[NAMES.index(name)]
    rng = np.random.default_rng(NAMES.index(name))
    for index in range(60):
        sides = (224, 224) if index % 2 else tuple(int(side) for side in rng.integers(90, 300, 2))
        image = Image.fromarray(photo(*sides, seed=index))
        low, high = kind.limits
        if name.startswith("Translate"):
            low, high = -1.2 * sides[0], 1.2 * sides[0]
        magnitude = float(rng.uniform(low, high))
        expected = _apply_op(image, name, magnitude, interpolation=InterpolationMode.NEAREST, fill=None)
        assert kind.apply(image, magnitude).tobytes() == expected.tobytes(), (sides, magnitude)


@pytest.mark.parametrize("bins", [2, 5, 10, 11, 31])
@pytest.mark.parametrize("size_px", [(224, 224), (97, 256)])
def test_magnitudes_equal_torchvision(bins: int, size_px: tuple[int, int]) -> None:
    space = RandAugment()._augmentation_space(bins, size_px)
    for kind in OPERATIONS:
        values, signed = space[kind.name]
        assert kind.signed == signed
        expected = values.to(torch.float64).expand(bins).numpy()
        ours = [kind.magnitude(index, bins, size_px) for index in range(bins)]
        # torch's own values differ in the last place with the width of the vector instructions used
        np.testing.assert_allclose(ours, expected, rtol=0, atol=FLOAT32_EPSILON * max(1.0, expected.max()))
        assert [float(np.float32(value)) for value in ours] == ours


def test_what_is_drawn_lies_within_the_limits() -> None:
    for kind in OPERATIONS:
        low, high = kind.limits
        for index in range(31):
            magnitude = kind.magnitude(index, 31, (4096, 4096))
            assert low <= magnitude <= high
            assert not kind.signed or low <= -magnitude
