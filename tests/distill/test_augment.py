"""Views replay pixel by pixel, equal torchvision's, are drawn as torchvision draws, and survive JSON."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_pictures import encoded, photo

from edgeclip.distill.augment import (
    DATACOMPDR,
    Augmentation,
    CropBox,
    HorizontalFlip,
    Operation,
    RandAugment,
    RandomResizedCrop,
)
from edgeclip.distill.operations import OPERATIONS
from edgeclip.errors import ConfigError, InputError
from edgeclip.pictures import decode_image

NAMES = [kind.name for kind in OPERATIONS]
ALL_THREE = Augmentation((RandomResizedCrop((32, 32)), HorizontalFlip(), RandAugment()))
BOX = [3, 5, 20, 30]  # top, left, height, width
PHOTO = Image.fromarray(photo(61, 47))
PILLOW = int(PIL.__version__.split(".")[0])
UNLIKELY = 1e-3  # the seeds are fixed: this much luck they must have had


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def draw(augmentation: Augmentation, count: int, size_px: tuple[int, int] = (47, 61)) -> Iterator[tuple]:
    for index in range(count):
        yield augmentation.sample(generator(7, index), size_px)


# -- Replay -------------------------------------------------------------------------------------------------


def test_parameters_through_json_replay_the_view_pixel_by_pixel() -> None:
    for index in range(40):
        view = ALL_THREE(PHOTO, generator(0, index))
        parameters = ALL_THREE.sample(generator(0, index), (47, 61))
        text = json.dumps(ALL_THREE.to_json(parameters))
        replayed = ALL_THREE.from_json(json.loads(text))
        assert replayed == parameters
        np.testing.assert_array_equal(ALL_THREE.apply(PHOTO, replayed), view)


def test_views_are_owned_by_the_caller_and_leave_the_picture_as_it_was() -> None:
    before = PHOTO.tobytes()
    view = ALL_THREE(PHOTO, generator(1))
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
    assert view.flags.c_contiguous
    assert view.flags.writeable
    view[:] = 0
    assert PHOTO.tobytes() == before


def test_what_was_drawn_before_does_not_matter_when_every_sample_has_its_own_generator() -> None:
    alone = ALL_THREE(PHOTO, generator(5, 3))
    for index in range(4):
        after_others = ALL_THREE(PHOTO, generator(5, index))
    np.testing.assert_array_equal(after_others, alone)


def test_replay_at_another_size_keeps_the_box_and_does_not_scale_translations() -> None:
    large = ALL_THREE.with_size((64, 48))
    assert large.size_px == (64, 48)
    assert large.transforms[1:] == ALL_THREE.transforms[1:]
    parameters = large.from_json([BOX, False, [[NAMES.index("TranslateX"), 8.9], [0, 0.0]]])
    view = large.apply(PHOTO, parameters)
    plain = PHOTO.crop((5, 3, 35, 23)).resize((48, 64), Image.Resampling.BICUBIC)
    assert (view[:, :8] == 0).all()
    np.testing.assert_array_equal(view[:, 8:], np.asarray(plain)[:, :-8])


def test_operations_left_out_by_chance_are_null_and_change_nothing() -> None:
    never = Augmentation((RandomResizedCrop((16, 16)), RandAugment(probability=0.0)))
    parameters = never.sample(generator(0), (47, 61))
    assert parameters[1] is None
    said = never.to_json(parameters)
    assert said[1] is None
    assert never.from_json(said) == parameters
    crop_only = Augmentation(never.transforms[:1])
    np.testing.assert_array_equal(never.apply(PHOTO, parameters), crop_only.apply(PHOTO, parameters[:1]))


def test_views_have_the_digest_they_were_stored_under() -> None:
    # The same with Pillow 10.3, 11.3, 12.1 and 13.0. One with other filters would replay what no teacher saw.
    picture = Image.fromarray(photo(90, 70, seed=3))
    digest = hashlib.sha256()
    for interpolation in ("bilinear", "bicubic"):
        augmentation = Augmentation(
            (RandomResizedCrop((32, 48), interpolation=interpolation), HorizontalFlip(), RandAugment())
        )
        for index, (name, magnitude) in enumerate(
            zip(NAMES, [0, -0.1, 0.2, 9.7, -5, 21, 0.3, -0.4, 0.5, -0.6, 5, 99.5, 0, 0], strict=True)
        ):
            said = [
                [index, 2 * index, 40, 31 + index],
                index % 2 == 1,
                [[NAMES.index(name), magnitude], [5, 4]],
            ]
            digest.update(augmentation.apply(picture, augmentation.from_json(said)).tobytes())
    assert digest.hexdigest() == "f11b1a8aa32875d0adc0b57d0e3d3f2c2be6082b7bf234b8f0698cb145c049cc"


def test_parameters_drawn_stay_those_of_their_seed() -> None:
    said = [DATACOMPDR.to_json(DATACOMPDR.sample(generator(1, index), (480, 640))) for index in range(2)]
    assert said == [
        [[1, 367, 235, 185], [[4, -30.45317268371582], [6, 0.26999998092651367]]],
        [[129, 109, 340, 257], [[7, -0.26999998092651367], [8, -0.26999998092651367]]],
    ]


def test_augmentations_travel_to_workers() -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        view = pool.apply(ALL_THREE, (PHOTO, generator(0)))
    np.testing.assert_array_equal(view, ALL_THREE(PHOTO, generator(0)))


def test_torch_is_not_imported() -> None:
    code = "import edgeclip.distill.views, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- Against torchvision ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transforms():
    """Return torchvision.transforms, on PIL pictures."""
    pytest.importorskip("torch")
    import torchvision_shim  # noqa: F401
    from torchvision import transforms

    return transforms


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_and_resize_equal_torchvision(transforms, interpolation: str) -> None:
    rng = np.random.default_rng(0)
    resize, mode = transforms.functional.resize, transforms.InterpolationMode(interpolation)
    in_one_call = 0
    for index in range(120):
        width, height = (int(side) for side in rng.integers(1, 260, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        size = ((224, 224), (97, 160), (31, 32), (1, 1))[index % 4]
        ours = RandomResizedCrop(size, interpolation=interpolation)
        box = ours.sample(rng, (height, width))
        view = Augmentation((ours,)).apply(image, (box,))
        part = transforms.functional.crop(image, box.top, box.left, box.height, box.width)
        by_sides = resize(resize(part, [box.height, size[1]], mode), list(size), mode)
        np.testing.assert_array_equal(view, np.asarray(by_sides), err_msg=str((box, image.size)))
        if PILLOW < 13 or box.height * size[1] <= box.width * size[0]:
            np.testing.assert_array_equal(view, np.asarray(resize(part, list(size), mode)), err_msg=str(box))
            in_one_call += 1
    assert in_one_call > 40


def record(monkeypatch: pytest.MonkeyPatch, transforms) -> list[list[object]]:
    """Let torchvision's transforms write down what they draw, as DataCompDR's generator does."""
    from torchvision.transforms import autoaugment

    drawn: list[list[object]] = []
    get_params, apply_op = transforms.RandomResizedCrop.get_params, autoaugment._apply_op

    def recorded_box(*args: object) -> tuple[int, int, int, int]:
        box = get_params(*args)
        drawn.append([list(box), []])
        return box

    def recorded_op(image, name: str, magnitude: float, **options: object):
        drawn[-1][1].append([NAMES.index(name), magnitude])
        return apply_op(image, name, magnitude, **options)

    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(recorded_box))
    monkeypatch.setattr(autoaugment, "_apply_op", recorded_op)
    return drawn


def test_views_drawn_by_torchvision_replay_pixel_by_pixel(transforms, monkeypatch) -> None:
    import torch

    drawn = record(monkeypatch, transforms)
    theirs = transforms.Compose(
        [
            # no box higher than wide: those Pillow 13 resizes in another order than the one kept here
            transforms.RandomResizedCrop(
                48, ratio=(1.0, 1.7), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandAugment(),
        ]
    )
    ours = Augmentation((RandomResizedCrop((48, 48)), RandAugment()))
    seen: set[int] = set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for index in range(60):
            image = Image.fromarray(photo(80 + index, 140 - index, seed=index))
            view = theirs(image)
            stored = json.loads(json.dumps(drawn[-1]))
            np.testing.assert_array_equal(ours.apply(image, ours.from_json(stored)), np.asarray(view))
            seen.update(operation for operation, _ in stored[1])
    assert seen == set(range(14))


def test_flip_equals_torchvision(transforms) -> None:
    augmentation = Augmentation((RandomResizedCrop((32, 32)), HorizontalFlip()))
    whole = CropBox(0, 0, 47, 61)
    flipped, straight = (augmentation.apply(PHOTO, (whole, flip)) for flip in (True, False))
    expected = transforms.functional.hflip(Image.fromarray(straight))
    np.testing.assert_array_equal(flipped, np.asarray(expected))


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.9, 1.0)])
def test_pictures_too_narrow_for_the_ratio_are_cropped_as_torchvision_does(transforms, scale) -> None:
    crop = RandomResizedCrop((8, 8), scale=scale)
    for sides in [(1, 40), (40, 1), (3, 400), (400, 7), (33, 100), (1000, 301)]:
        image = Image.new("RGB", sides[::-1])
        expected = transforms.RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio))
        assert crop.to_json(crop.sample(generator(0), sides)) == list(expected)


def test_a_ratio_no_strip_has_still_gives_a_pixel() -> None:
    crop = RandomResizedCrop((8, 8), ratio=(4.0, 5.0))
    assert crop.sample(generator(0), (1, 1)) == CropBox(0, 0, 1, 1)


def test_boxes_are_distributed_as_torchvision_draws_them(transforms) -> None:
    import torch

    stats = pytest.importorskip("scipy.stats")
    crop = RandomResizedCrop((8, 8), scale=(0.2, 0.9), ratio=(0.5, 1.6))
    count, sides = 1500, (300, 420)
    image = Image.new("RGB", sides[::-1])
    rng = generator(2)
    ours = np.array([crop.to_json(crop.sample(rng, sides)) for _ in range(count)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [
                transforms.RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio))
                for _ in range(count)
            ]
        )
    for said in (ours, theirs):
        top, left, height, width = said.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= sides[0]).all()
        assert (left + width <= sides[1]).all()
    for measure in (
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: width / height,
        lambda top, left, height, width: top / np.maximum(1, sides[0] - height),
        lambda top, left, height, width: left / np.maximum(1, sides[1] - width),
    ):
        assert stats.ks_2samp(measure(*ours.T), measure(*theirs.T)).pvalue > UNLIKELY


def test_areas_and_ratios_keep_their_ranges_and_reach_their_ends() -> None:
    crop = RandomResizedCrop((8, 8), scale=(0.08, 1.0))
    rng = generator(3)
    boxes = [crop.sample(rng, (1000, 1000)) for _ in range(2000)]
    areas = [box.height * box.width / 1e6 for box in boxes]
    ratios = [box.width / box.height for box in boxes]
    assert 0.079 < min(areas) < 0.09
    assert 0.95 < max(areas) <= 1
    assert 0.745 < min(ratios) < 0.76
    assert 1.32 < max(ratios) < 1.34
    assert any(box.top == 0 for box in boxes)
    assert any(box.top + box.height == 1000 for box in boxes)


def test_operations_are_drawn_evenly_with_both_signs_and_torchvision_magnitudes(transforms) -> None:
    stats = pytest.importorskip("scipy.stats")
    space = transforms.RandAugment()._augmentation_space(31, (224, 192))
    augment = RandAugment()
    rng = generator(4)
    drawn = [operation for _ in range(7000) for operation in augment.sample(rng, (224, 192))]
    counts = np.bincount([operation.index for operation in drawn], minlength=14)
    assert len(drawn) == 14000
    assert stats.chisquare(counts).pvalue > UNLIKELY
    for name, (magnitudes, signed) in space.items():
        expected = float(magnitudes.reshape(-1)[-1 if magnitudes.ndim == 0 else 9])
        found = [operation.magnitude for operation in drawn if operation.name == name]
        assert {abs(magnitude) for magnitude in found} == {expected}
        negative = sum(magnitude < 0 for magnitude in found)
        assert stats.binomtest(negative, len(found)).pvalue > UNLIKELY if signed else negative == 0


@pytest.mark.parametrize(("probability", "low", "high"), [(0.0, 0, 0), (0.25, 200, 300), (1.0, 1000, 1000)])
def test_probabilities_are_kept(probability: float, low: int, high: int) -> None:
    augmentation = Augmentation(
        (RandomResizedCrop((8, 8)), HorizontalFlip(probability), RandAugment(probability=probability))
    )
    views = list(draw(augmentation, 1000))
    assert low <= sum(flip for _, flip, _ in views) <= high
    assert low <= sum(operations is not None for _, _, operations in views) <= high


# -- JSON ---------------------------------------------------------------------------------------------------


def test_json_has_the_published_form() -> None:
    box, flip, operations = ALL_THREE.to_json(
        (CropBox(3, 5, 20, 30), True, (Operation(1, -0.09), Operation(13, 0.0)))
    )
    assert box == BOX
    assert flip is True
    assert operations == [[1, -0.09], [13, 0.0]]
    parameters = DATACOMPDR.sample(generator(0), (47, 61))
    assert [type(entry) for entry in DATACOMPDR.to_json(parameters)] == [list, list]


GOOD = [BOX, True, [[0, 0.0], [3, 7.5]]]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            None,
            {"param_aug": []},
            r"one view is \{'param_aug'.*expected a list of 3 entries \(random_resized",
        ),
        (None, GOOD[:2], r"one view is \[\[3, 5, 20, 30\], True\], expected 3 entries"),
        (None, [*GOOD, None], "expected 3 entries"),
        (None, None, "one view is None"),
        (0, None, r"random_resized_crop is None, expected four integers \[top, left"),
        (0, [3, 5, 20], r"random_resized_crop is \[3, 5, 20\]"),
        (0, [3, 5, 20, 30.0], r"random_resized_crop is \[3, 5, 20, 30.0\]"),
        (0, [3, 5, 20, True], r"random_resized_crop is \[3, 5, 20, True\]"),
        (0, "3520", "random_resized_crop is '3520'"),
        (0, [-1, 5, 20, 30], r"crop box is \[-1, 5, 20, 30\], expected"),
        (0, [3, 5, 0, 30], r"crop box is \[3, 5, 0, 30\], expected"),
        (0, [list(range(100))], r"random_resized_crop is \[\[0, 1.{60,}\.\.\., expected"),
        (1, 1, "random_horizontal_flip is 1, expected true or false"),
        (2, [], r"rand_augment is \[\], expected a list of 2 \[index, magnitude\]"),
        (2, [[0, 0.0]], r"rand_augment is \[\[0, 0.0\]\], expected a list of 2"),
        (2, [[0, 0.0], [3]], r"rand_augment is \[3\], expected an integer and a number"),
        (2, [[0, 0.0], 3], "rand_augment is 3, expected an integer and a number"),
        (2, [[0, 0.0], [3.0, 1.0]], r"rand_augment is \[3.0, 1.0\]"),
        (2, [[0, 0.0], [True, 1.0]], r"rand_augment is \[True, 1.0\]"),
        (2, [[0, 0.0], [3, False]], r"rand_augment is \[3, False\]"),
        (2, [[0, 0.0], ["ShearX", 0.1]], r"rand_augment is \['ShearX', 0.1\]"),
        (
            2,
            [[0, 0.0], [14, 0.0]],
            r"operation is 14, expected an index from 0 to 13 \(Identity to Equalize\)",
        ),
        (2, [[0, 0.0], [-1, 0.0]], "operation is -1, expected"),
        (2, [[0, 0.0], [10**30, 0.0]], "operation is 10+, expected"),
        (2, [[0, 0.5], [3, 1.0]], "magnitude of Identity is 0.5, expected a number from 0 to 0"),
        (2, [[5, 181.0], [3, 1.0]], "magnitude of Rotate is 181.0, expected a number from -180 to 180"),
        (2, [[10, 0.0], [3, 1.0]], "magnitude of Posterize is 0.0, expected a number from 1 to 8"),
        (2, [[11, -1], [3, 1.0]], "magnitude of Solarize is -1.0, expected a number from 0 to 256"),
        (2, [[3, float("nan")], [3, 1.0]], "magnitude of TranslateX is nan, expected"),
        (2, [[3, float("inf")], [3, 1.0]], "magnitude of TranslateX is inf, expected"),
        (2, [[3, 10**400], [3, 1.0]], "magnitude of TranslateX is inf, expected"),
    ],
)
def test_json_that_says_no_view_is_refused(place: int | None, value: object, message: str) -> None:
    said = value if place is None else [*GOOD[:place], value, *GOOD[place + 1 :]]
    assert ALL_THREE.from_json(GOOD)
    with pytest.raises(InputError, match=message):
        ALL_THREE.from_json(said)


SHARES = st.floats(1e-6, 1.0)
RATIOS = st.floats(0.01, 100.0)
SIDES = st.integers(1, 40) | st.integers(1, 100_000)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(SIDES, SIDES),
    st.lists(SHARES, min_size=2, max_size=2).map(sorted).map(tuple),
    st.lists(RATIOS, min_size=2, max_size=2).map(sorted).map(tuple),
    st.integers(2, 40),
    st.data(),
)
def test_what_is_drawn_for_any_picture_fits_it_and_comes_back(size_px, scale, ratio, bins, data) -> None:
    augment = RandAugment(
        num_ops=data.draw(st.integers(1, 3)),
        magnitude=data.draw(st.integers(0, bins - 1)),
        num_magnitude_bins=bins,
    )
    augmentation = Augmentation((RandomResizedCrop((9, 300), scale, ratio), HorizontalFlip(), augment))
    parameters = augmentation.sample(generator(data.draw(st.integers(0, 2**32))), size_px)
    assert parameters[0].top + parameters[0].height <= size_px[0]
    assert parameters[0].left + parameters[0].width <= size_px[1]
    assert augmentation.from_json(json.loads(json.dumps(augmentation.to_json(parameters)))) == parameters


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)
NEARLY = st.tuples(
    st.lists(st.integers(-2, 70) | st.floats(), min_size=3, max_size=4) | JSON,
    st.booleans() | JSON,
    st.lists(st.tuples(st.integers(-1, 14), st.floats(-300, 300) | st.integers()).map(list), max_size=2)
    | JSON,
).map(list)


@settings(max_examples=300, deadline=None)
@given(JSON | NEARLY)
def test_any_json_gives_a_view_that_comes_back_or_an_input_error(value: object) -> None:
    try:
        parameters = ALL_THREE.from_json(value)
        view = ALL_THREE.apply(PHOTO, parameters)
    except InputError:
        return
    assert view.shape == (32, 32, 3)
    assert ALL_THREE.from_json(ALL_THREE.to_json(parameters)) == parameters


# -- Errors -------------------------------------------------------------------------------------------------


def test_a_box_beyond_the_picture_is_an_error() -> None:
    parameters = DATACOMPDR.from_json([BOX, [[0, 0.0], [0, 0.0]]])
    DATACOMPDR.apply(PHOTO.crop((0, 0, 35, 23)), parameters)
    for size in [(34, 23), (35, 22)]:
        with pytest.raises(
            InputError, match=f"column 35 and row 23, but the picture is {size[0]} x {size[1]} "
        ):
            DATACOMPDR.apply(PHOTO.crop((0, 0, *size)), parameters)


def test_a_box_that_would_explode_while_resized_is_an_error() -> None:
    strip = Image.new("RGB", (1, 800_000))
    parameters = DATACOMPDR.from_json([[0, 0, 800_000, 1], [[0, 0.0], [0, 0.0]]])
    with pytest.raises(
        InputError, match="crop box of 1 x 800000 pixels is too narrow: resized to a width of 224"
    ):
        DATACOMPDR.apply(strip, parameters)


def test_parameters_of_another_augmentation_are_an_error() -> None:
    box, _, operations = ALL_THREE.from_json(GOOD)
    with pytest.raises(InputError, match=r"expected 2 entries \(random_resized_crop, rand_augment\)"):
        DATACOMPDR.apply(PHOTO, (box, True, operations))
    with pytest.raises(InputError, match="rand_augment is True, expected operations"):
        DATACOMPDR.apply(PHOTO, (box, True))
    with pytest.raises(InputError, match="random_resized_crop is None, expected a crop box"):
        DATACOMPDR.apply(PHOTO, (None, operations))
    with pytest.raises(InputError, match=r"random_horizontal_flip is CropBox.*expected true or false"):
        ALL_THREE.apply(PHOTO, (box, box, operations))
    with pytest.raises(InputError, match="rand_augment is False, expected operations"):
        DATACOMPDR.to_json((box, False))
    with pytest.raises(InputError, match="random_resized_crop is True, expected a crop box"):
        DATACOMPDR.to_json((True, operations))


def test_pictures_of_another_mode_are_an_error() -> None:
    with pytest.raises(InputError, match="mode 'L', expected 'RGB'"):
        ALL_THREE.apply(PHOTO.convert("L"), ALL_THREE.from_json(GOOD))


def test_pictures_decoded_at_reduced_scale_are_an_error() -> None:
    jpeg = encoded(Image.fromarray(photo(256, 192)), "JPEG")
    reduced = decode_image(jpeg, draft_size_px=(48, 64))
    with pytest.raises(InputError, match="64 x 48 of 256 x 192 pixels"):
        ALL_THREE.apply(reduced, ALL_THREE.from_json(GOOD))
    assert ALL_THREE.apply(decode_image(jpeg), ALL_THREE.from_json(GOOD)).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop((0, 8)), r"size_px is \(0, 8\)"),
        (lambda: RandomResizedCrop((8, 8, 3)), r"size_px is \(8, 8, 3\)"),
        (lambda: RandomResizedCrop((8, 8), scale=(0.5, 0.2)), r"scale is \(0.5, 0.2\)"),
        (lambda: RandomResizedCrop((8, 8), scale=(0.5, 1.2)), r"scale is \(0.5, 1.2\)"),
        (lambda: RandomResizedCrop((8, 8), scale=(0.0, 1.0)), r"scale is \(0.0, 1.0\)"),
        (lambda: RandomResizedCrop((8, 8), ratio=(2.0, 1.0)), r"ratio is \(2.0, 1.0\)"),
        (lambda: RandomResizedCrop((8, 8), ratio=(-1.0, 1.0)), r"ratio is \(-1.0, 1.0\)"),
        (lambda: RandomResizedCrop((8, 8), interpolation="nearest"), "interpolation is 'nearest'"),
        (lambda: HorizontalFlip(1.5), "random_horizontal_flip: probability is 1.5"),
        (lambda: RandAugment(probability=-0.1), "rand_augment: probability is -0.1"),
        (lambda: RandAugment(num_ops=0), "num_ops is 0"),
        (lambda: RandAugment(magnitude=31), "magnitude is 31, expected 0 to 30"),
        (lambda: RandAugment(magnitude=-1), "magnitude is -1, expected 0 to 30"),
        (lambda: RandAugment(num_magnitude_bins=1), "num_magnitude_bins is 1"),
        (lambda: Augmentation(()), "got nothing; expected RandomResizedCrop first"),
        (lambda: Augmentation((RandAugment(),)), "got RandAugment; expected"),
        (
            lambda: Augmentation((RandomResizedCrop((8, 8)), RandAugment(), HorizontalFlip())),
            "got RandomResizedCrop, RandAugment, HorizontalFlip; expected",
        ),
        (lambda: Augmentation((RandomResizedCrop((8, 8)),) * 2), "got RandomResizedCrop, RandomResizedCrop"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
