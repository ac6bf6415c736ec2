from __future__ import annotations

import colorsys
import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.corruptions import CORRUPTIONS, SEVERITIES, corrupt

PHOTOS = Path(__file__).parent.parent.parent / "edgeclip/assets/photos"
BY_CHANCE = {"gaussian-noise", "shot-noise", "impulse-noise", "speckle-noise", "motion-blur", "fog"}
BLURS = ("defocus-blur", "gaussian-blur", "motion-blur", "zoom-blur")


def photo(name: str, size_px: int) -> np.ndarray:
    image = Image.open(PHOTOS / f"{name}.jpg").convert("RGB")
    return np.array(image.resize((size_px, size_px), Image.Resampling.BILINEAR))


def harm(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.abs(after.astype(np.float64) - before).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("picture", "size_px"), [("parrot", 64), ("castle", 224)])
def test_each_severity_changes_the_picture_more_than_the_last(name: str, picture: str, size_px: int) -> None:
    before = photo(picture, size_px)
    kept = before.copy()
    changes = []
    for severity in SEVERITIES:
        after = corrupt(before, name, severity, key="a")
        assert (after.shape, after.dtype) == (before.shape, np.uint8)
        changes.append(harm(before, after))
    assert (before == kept).all()
    assert changes[0] > 0.1, changes
    assert all(more > 1.01 * less for less, more in itertools.pairwise(changes)), changes


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_chance_depends_on_the_picture_and_the_seed_alone(name: str) -> None:
    before = photo("cat", 48)
    first = corrupt(before, name, 3, key="a")
    assert (corrupt(before, name, 3, key="a") == first).all()
    for other in (corrupt(before, name, 3, key="b"), corrupt(before, name, 3, key="a", seed=1)):
        assert (other != first).any() == (name in BY_CHANCE)


def test_no_two_corruptions_share_their_noise() -> None:
    grey = np.full((32, 32, 3), 128, np.uint8)
    fields = [
        corrupt(grey, name, 1).astype(float).ravel() - 128 for name in ("gaussian-noise", "speckle-noise")
    ]
    assert abs(np.corrcoef(fields)[0, 1]) < 0.1


def test_noise_has_the_stated_strength() -> None:
    grey = np.full((200, 200, 3), 100, np.uint8)
    level = 100 / 255
    for severity in (1, 2, 3):
        strengths = {name: CORRUPTIONS[name][severity - 1] for name in CORRUPTIONS}
        expected = {
            "gaussian-noise": strengths["gaussian-noise"],
            "shot-noise": math.sqrt(level / strengths["shot-noise"]),
            "speckle-noise": level * strengths["speckle-noise"],
        }
        for name, deviation in expected.items():
            noisy = corrupt(grey, name, severity, key="n") / 255
            assert noisy.std() == pytest.approx(deviation, rel=0.04), (name, severity)
            assert noisy.mean() == pytest.approx(level, abs=0.01)
        lost = corrupt(grey, "impulse-noise", severity, key="n")
        assert set(np.unique(lost)) == {0, 100, 255}
        assert np.mean(lost != 100) == pytest.approx(strengths["impulse-noise"], rel=0.05)
        assert np.mean(lost == 0) == pytest.approx(strengths["impulse-noise"] / 2, rel=0.08)


@pytest.mark.parametrize("name", [*BLURS, "contrast", "pixelate", "saturate"])
def test_an_even_grey_has_nothing_to_lose(name: str) -> None:
    grey = np.full((60, 80, 3), 77, np.uint8)
    for severity in SEVERITIES:
        assert (corrupt(grey, name, severity) == 77).all()


def test_gaussian_blur_is_scipy_s() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    before = photo("koala", 224)
    for severity in (1, 5):
        deviation = CORRUPTIONS["gaussian-blur"][severity - 1]
        wanted = ndimage.gaussian_filter(before / 255, (deviation, deviation, 0), mode="reflect", truncate=5)
        after = corrupt(before, "gaussian-blur", severity)
        assert np.abs(after - wanted * 255).max() < 1.5


def test_blurs_spread_a_dot_over_the_stated_length() -> None:
    dot = np.zeros((224, 224, 3), np.uint8)
    dot[111:113, 111:113] = 255
    for severity in (3, 5):
        strength = {name: CORRUPTIONS[name][severity - 1] for name in CORRUPTIONS}
        down, across = np.nonzero(corrupt(dot, "defocus-blur", severity)[..., 0])
        assert np.ptp(down) == np.ptp(across) == pytest.approx(2 * strength["defocus-blur"], abs=2.5)
        down, across = np.nonzero(corrupt(dot, "motion-blur", severity, key="m")[..., 0])
        assert math.hypot(np.ptp(down), np.ptp(across)) == pytest.approx(strength["motion-blur"], abs=4)


def test_zoom_blur_leaves_the_middle_and_moves_the_edge() -> None:
    before = np.zeros((65, 65, 3), np.uint8)
    before[32] = before[:, 32] = 255
    change = np.abs(corrupt(before, "zoom-blur", 5).astype(float) - before)[..., 0]
    assert change[32, 32] < 2
    assert change[30:35, 4].max() > 20


def test_brightness_and_saturation_move_one_coordinate_of_hsv() -> None:
    before = photo("parrot", 24)
    brighter, richer = corrupt(before, "brightness", 2) / 255, corrupt(before, "saturate", 2) / 255
    added, factor = CORRUPTIONS["brightness"][1], CORRUPTIONS["saturate"][1]
    for row, column in np.ndindex(24, 24):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before[row, column] / 255))
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(1, value + added))
        assert brighter[row, column] == pytest.approx(wanted, abs=0.003)
        wanted = colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)
        assert richer[row, column] == pytest.approx(wanted, abs=0.003)
    black = np.zeros((2, 2, 3), np.uint8)
    assert (corrupt(black, "brightness", 1) == round(255 * CORRUPTIONS["brightness"][0])).all()
    assert (corrupt(black, "saturate", 5) == 0).all()


def test_contrast_keeps_the_mean_and_a_share_of_the_deviation() -> None:
    before = photo("panda", 64)
    after = corrupt(before, "contrast", 3).astype(float)
    assert after.mean(axis=(0, 1)) == pytest.approx(before.mean(axis=(0, 1)), abs=0.6)
    assert after.std() == pytest.approx(
        np.sqrt((CORRUPTIONS["contrast"][2] * (before - before.mean(axis=(0, 1)))).var()
                + before.mean(axis=(0, 1)).var()), rel=0.02
    )  # fmt: skip


def test_fog_lifts_the_dark_and_keeps_the_brightest() -> None:
    before = photo("castle", 96)
    for severity in (1, 5):
        after = corrupt(before, "fog", severity, key="f")
        assert after.max() <= before.max()
        assert np.percentile(after, 5) > np.percentile(before, 5)
        assert after.std() < before.std()


def test_pixelate_leaves_so_many_cells() -> None:
    after = corrupt(photo("crab", 224), "pixelate", 5)[..., 0].astype(int)
    assert np.count_nonzero(np.any(np.diff(after, axis=0), axis=1)) == CORRUPTIONS["pixelate"][4] - 1
    assert np.count_nonzero(np.any(np.diff(after, axis=1), axis=0)) == CORRUPTIONS["pixelate"][4] - 1


def test_jpeg_is_a_file_of_that_quality() -> None:
    before, stream = photo("dog", 64), io.BytesIO()
    Image.fromarray(before).save(stream, "JPEG", quality=CORRUPTIONS["jpeg"][1])
    assert (corrupt(before, "jpeg", 2) == np.array(Image.open(stream))).all()


@pytest.mark.parametrize("size_px", [(1, 1), (3, 200), (31, 17)])
def test_any_size_can_be_corrupted(size_px: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size_px, 3), dtype=np.uint8)
    for name in CORRUPTIONS:
        assert corrupt(picture, name, 5, key="a").shape == picture.shape


def test_what_cannot_be_corrupted_is_said() -> None:
    grey = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"corruption 'snow' is not known; expected one of gaussian-noise"):
        corrupt(grey, "snow", 1)
    with pytest.raises(ConfigError, match="severity of 'fog' is 6"):
        corrupt(grey, "fog", 6)
    with pytest.raises(InputError, match=r"got float64 \(8, 8, 3\)"):
        corrupt(grey / 255, "fog", 1)
