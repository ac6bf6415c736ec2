"""Random views of pictures, told apart from how they are made: parameters are drawn, kept and replayed.

A teacher's embedding belongs to the pixels it saw. So a view is made in two steps: `Augmentation.sample`
draws parameters, `Augmentation.apply` makes pixels of them, and the second holds no chance. Parameters drawn
once and stored next to the teacher's embeddings give the student the same view again, pixel by pixel
(dataset reinforcement: Faghri et al. 2023; Vasu et al. 2024, "MobileCLIP").

    >>> augmentation = Augmentation((RandomResizedCrop((224, 224)), RandAugment()))
    >>> parameters = augmentation.sample(np.random.default_rng(0), (480, 640))
    >>> augmentation.from_json(augmentation.to_json(parameters)) == parameters
    True

Parameters have DataCompDR's form: crop boxes in pixels of the source, magnitudes final (signed, translations
in pixels of the crop). A student may replay at another size than the teacher's: the box means the same part
of the picture, translations are not scaled, which is what the published loader does.

Pixels equal those of torchvision's ``RandomResizedCrop``, ``RandomHorizontalFlip`` and ``RandAugment`` on PIL
pictures, and are the same from Pillow 10.3 to 13. One thing is kept here that Pillow 13 changed (its pull
request 9549): where a crop's height shrinks more than its width, torchvision's own pixels now differ from
those of earlier versions, and so from what teachers saw.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
from PIL import Image

from edgeclip.distill.operations import OPERATIONS
from edgeclip.errors import ConfigError, InputError
from edgeclip.pictures import DEFAULT_MAX_PIXELS, reduction_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DATACOMPDR",
    "Augmentation",
    "CropBox",
    "HorizontalFlip",
    "Operation",
    "Parameters",
    "RandAugment",
    "RandomResizedCrop",
    "Step",
    "Transform",
]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_CROP_TRIES = 10


# -- Parameters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropBox:
    """Part of a picture, in pixels of the source as decoded in full.

    Raises:
        InputError: a negative corner, or a side below 1.
    """

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.top, self.left) < 0 or min(self.height, self.width) < 1:
            raise InputError(
                f"augmentation parameters: crop box is {list(dataclasses.astuple(self))}, expected "
                "[top, left, height, width], a corner of 0 or more and sides of 1 or more pixels. "
                "Draw them again."
            )


@dataclass(frozen=True)
class Operation:
    """One operation of RandAugment with the magnitude it is applied with.

    Attributes:
        index: position in `edgeclip.distill.operations.OPERATIONS`.
        magnitude: final value. Shears: slope. Translations: pixels, whole ones count. Rotation: degrees
            counter-clockwise. Brightness to sharpness: added to a factor of 1. Posterize: bits kept.
            Solarize: level from which on a channel is inverted. 0 for the rest.

    Raises:
        InputError: no such operation, or a magnitude outside its range.
    """

    index: int
    magnitude: float

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(OPERATIONS):
            raise InputError(
                f"augmentation parameters: operation is {self.index}, expected an index from 0 to "
                f"{len(OPERATIONS) - 1} ({OPERATIONS[0].name} to {OPERATIONS[-1].name}). Draw them again."
            )
        low, high = OPERATIONS[self.index].limits
        if not low <= self.magnitude <= high:  # also true of NaN
            raise InputError(
                f"augmentation parameters: magnitude of {self.name} is {self.magnitude}, expected a number "
                f"from {low:g} to {high:g}. Draw them again."
            )

    @property
    def name(self) -> str:
        """Torchvision's name of the operation."""
        return OPERATIONS[self.index].name


Step: TypeAlias = CropBox | bool | tuple[Operation, ...] | None
"""What was drawn for one transform: a box, whether to flip, operations; ``None``: leave it out."""
Parameters: TypeAlias = tuple[Step, ...]
"""What was drawn for one view, a step for each transform of its `Augmentation`."""


# -- Transforms ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut out a random part and resize it (Szegedy et al. 2015; as torchvision draws it).

    Attributes:
        size_px: ``(H, W)`` of the view.
        scale: smallest and largest share of the source's area.
        ratio: smallest and largest width over height, uniform in the logarithm.
        interpolation: of the resize, with antialiasing.

    Raises:
        ConfigError: a setting that cannot be.
    """

    name: ClassVar[str] = "random_resized_crop"
    size_px: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if len(self.size_px) != 2 or min(self.size_px) < 1:
            raise ConfigError(
                f"{self.name}: size_px is {self.size_px}, expected (height, width) of 1 or more pixels."
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"{self.name}: scale is {self.scale}, expected two shares of the area, the smaller first, "
                "above 0 and at most 1."
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(
                f"{self.name}: ratio is {self.ratio}, expected two positive numbers, the smaller first."
            )
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(
                f"{self.name}: interpolation is {self.interpolation!r}, expected 'bilinear' or 'bicubic'."
            )

    def sample(self, rng: np.random.Generator, size_px: tuple[int, int]) -> CropBox:
        """Draw the part to cut out of a picture of ``size_px`` ``(H, W)``."""
        full_height, full_width = size_px
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_CROP_TRIES):
            area = full_height * full_width * _uniform(rng, *self.scale)
            ratio = math.exp(_uniform(rng, log_low, log_high))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= full_width and 0 < height <= full_height:
                return CropBox(
                    _below(rng, full_height - height + 1), _below(rng, full_width - width + 1), height, width
                )
        return self._largest_centred(full_height, full_width)

    def _largest_centred(self, full_height: int, full_width: int) -> CropBox:
        """Return the largest centred box whose ratio is allowed, for pictures too narrow to hit by chance."""
        height, width = full_height, full_width
        if width / height < self.ratio[0]:
            height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            width = round(height * self.ratio[1])
        # Rounding may give 0, which cannot be cut out.
        height, width = max(1, height), max(1, width)
        return CropBox((full_height - height) // 2, (full_width - width) // 2, height, width)

    def apply(self, image: Image.Image, step: Step) -> Image.Image:
        """Return the part ``step`` says, resized.

        Raises:
            InputError: the box reaches beyond the picture, is too narrow to be resized, or is none.
        """
        if not isinstance(step, CropBox):
            raise _misfit(self.name, step, "a crop box")
        right, bottom = step.left + step.width, step.top + step.height
        if right > image.width or bottom > image.height:
            raise InputError(
                f"augmentation parameters: crop box ends at column {right} and row {bottom}, but the picture "
                f"is {image.width} x {image.height} pixels. It is not the one they were drawn for: decode "
                "that one in full, and do not resize it."
            )
        height, width = self.size_px
        if width * step.height > DEFAULT_MAX_PIXELS:
            raise InputError(
                f"augmentation parameters: crop box of {step.width} x {step.height} pixels is too narrow: "
                f"resized to a width of {width} it would exceed the limit of {DEFAULT_MAX_PIXELS} pixels. "
                "Draw them again."
            )
        resampling = _RESAMPLING[self.interpolation]
        # Not with `box=`, which changes single levels, and not in one call: where the height shrinks more
        # than the width Pillow 13 begins with the height, before it with the width, and levels differ.
        part = image.crop((step.left, step.top, right, bottom))
        return part.resize((width, step.height), resampling).resize((width, height), resampling)

    def to_json(self, step: Step) -> list[int]:
        """Return ``[top, left, height, width]``."""
        if not isinstance(step, CropBox):
            raise _misfit(self.name, step, "a crop box")
        return [step.top, step.left, step.height, step.width]

    def from_json(self, value: object) -> CropBox:
        """Return the box that ``[top, left, height, width]`` says.

        Raises:
            InputError: it says none.
        """
        if not isinstance(value, list) or len(value) != 4 or not all(type(side) is int for side in value):
            raise _misfit(self.name, value, "four integers [top, left, height, width]")
        return CropBox(*value)


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left and right.

    Attributes:
        probability: of doing so. Views whose captions name left and right should not be flipped.

    Raises:
        ConfigError: no probability.
    """

    name: ClassVar[str] = "random_horizontal_flip"
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability(self.name, self.probability)

    def sample(self, rng: np.random.Generator, size_px: tuple[int, int]) -> bool:
        """Draw whether to flip a picture of any size."""
        return rng.random() < self.probability

    def apply(self, image: Image.Image, step: Step) -> Image.Image:
        """Return the picture, flipped if ``step`` says so."""
        if not isinstance(step, bool):
            raise _misfit(self.name, step, "true or false")
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if step else image

    def to_json(self, step: Step) -> bool:
        """Return the step as it is."""
        return self.from_json(step)

    def from_json(self, value: object) -> bool:
        """Return the value if it is true or false, else raise `InputError`."""
        if not isinstance(value, bool):
            raise _misfit(self.name, value, "true or false")
        return value


@dataclass(frozen=True)
class RandAugment:
    """Apply operations drawn from fourteen (Cubuk et al. 2020, with torchvision's ranges).

    What moves in from outside is black, and geometry takes the nearest pixel.

    Attributes:
        num_ops: operations a view; the same one may come twice.
        magnitude: strength of them all, counted from 0 and below ``num_magnitude_bins``.
        num_magnitude_bins: steps from nothing to the largest magnitude.
        probability: of applying any.

    Raises:
        ConfigError: a setting that cannot be.
    """

    name: ClassVar[str] = "rand_augment"
    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.num_ops < 1:
            raise ConfigError(f"{self.name}: num_ops is {self.num_ops}, expected 1 or more.")
        if self.num_magnitude_bins < 2:
            raise ConfigError(
                f"{self.name}: num_magnitude_bins is {self.num_magnitude_bins}, expected 2 or more."
            )
        if not 0 <= self.magnitude < self.num_magnitude_bins:
            raise ConfigError(
                f"{self.name}: magnitude is {self.magnitude}, expected 0 to {self.num_magnitude_bins - 1} "
                "(below num_magnitude_bins)."
            )
        _check_probability(self.name, self.probability)

    def sample(self, rng: np.random.Generator, size_px: tuple[int, int]) -> tuple[Operation, ...] | None:
        """Draw operations for a crop of ``size_px`` ``(H, W)``, which sets how far translations go."""
        if rng.random() >= self.probability:
            return None
        return tuple(self._draw_one(rng, size_px) for _ in range(self.num_ops))

    def _draw_one(self, rng: np.random.Generator, size_px: tuple[int, int]) -> Operation:
        index = _below(rng, len(OPERATIONS))
        kind = OPERATIONS[index]
        magnitude = kind.magnitude(self.magnitude, self.num_magnitude_bins, size_px)
        return Operation(index, -magnitude if kind.signed and rng.random() < 0.5 else magnitude)

    def apply(self, image: Image.Image, step: Step) -> Image.Image:
        """Return the picture after the operations of ``step``, in their order."""
        if not isinstance(step, tuple):
            raise _misfit(self.name, step, "operations")
        for operation in step:
            image = OPERATIONS[operation.index].apply(image, operation.magnitude)
        return image

    def to_json(self, step: Step) -> list[list[int | float]]:
        """Return ``[[index, magnitude], …]``."""
        if not isinstance(step, tuple):
            raise _misfit(self.name, step, "operations")
        return [[operation.index, operation.magnitude] for operation in step]

    def from_json(self, value: object) -> tuple[Operation, ...]:
        """Return the operations that ``[[index, magnitude], …]`` says, as many as `num_ops`.

        Raises:
            InputError: it says others, or another number of them.
        """
        if not isinstance(value, list) or len(value) != self.num_ops:
            raise _misfit(self.name, value, f"a list of {self.num_ops} [index, magnitude]")
        return tuple(self._operation(pair) for pair in value)

    def _operation(self, pair: object) -> Operation:
        match pair:
            case [int(index), int(magnitude) | float(magnitude)] if bool not in map(type, pair):
                return Operation(index, _float(magnitude))
        raise _misfit(self.name, pair, "an integer and a number [index, magnitude] in each place")


Transform: TypeAlias = RandomResizedCrop | HorizontalFlip | RandAugment

# Stored parameters have no names: this order, which is DataCompDR's, says which is which.
_ORDER = (RandomResizedCrop, HorizontalFlip, RandAugment)


@dataclass(frozen=True)
class Augmentation:
    """Random views of pictures, as a crop and what follows it. Holds no state; safe from many threads.

    Attributes:
        transforms: a `RandomResizedCrop`, then perhaps a `HorizontalFlip`, then perhaps a `RandAugment`.

    Raises:
        ConfigError: other transforms, or in another order.
    """

    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        kinds = [type(transform) for transform in self.transforms]
        if kinds[:1] != [RandomResizedCrop] or kinds != [kind for kind in _ORDER if kind in kinds]:
            raise ConfigError(
                f"augmentation: got {', '.join(kind.__name__ for kind in kinds) or 'nothing'}; expected "
                f"RandomResizedCrop first, and each at most once in the order "
                f"{', '.join(kind.__name__ for kind in _ORDER)}."
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Draw a view of the picture: `sample`, then `apply`."""
        return self.apply(image, self.sample(rng, (image.height, image.width)))

    @property
    def size_px(self) -> tuple[int, int]:
        """``(H, W)`` of the views."""
        crop = self.transforms[0]
        assert isinstance(crop, RandomResizedCrop)
        return crop.size_px

    def with_size(self, size_px: tuple[int, int]) -> Augmentation:
        """Return the same with views of ``size_px`` ``(H, W)``, to replay what was drawn for another size."""
        crop = self.transforms[0]
        assert isinstance(crop, RandomResizedCrop)
        return Augmentation((dataclasses.replace(crop, size_px=size_px), *self.transforms[1:]))

    def sample(self, rng: np.random.Generator, size_px: tuple[int, int]) -> Parameters:
        """Draw parameters of one view.

        Args:
            rng: the only source of chance; only its ``random()`` is called.
            size_px: ``(H, W)`` of the source picture.
        """
        crop, *others = self.transforms
        return (crop.sample(rng, size_px), *(other.sample(rng, self.size_px) for other in others))

    def apply(self, image: Image.Image, parameters: Parameters) -> NDArray[np.uint8]:
        """Make the view that ``parameters`` say.

        Args:
            image: mode RGB, decoded in full, not resized. Not changed.
            parameters: from `sample` for a picture of this size, or from `from_json`.

        Returns:
            ``(H, W, 3)`` uint8 RGB, contiguous, owned by the caller.

        Raises:
            InputError: the picture is none of those, or the parameters do not fit it or this augmentation.
        """
        if image.mode != "RGB":
            raise InputError(
                f"augmentation: got a picture of mode {image.mode!r}, expected 'RGB'. Convert it."
            )
        if (reduction := reduction_of(image)) is not None:
            raise InputError(
                f"augmentation: got a picture decoded at reduced scale, {image.width} x {image.height} of "
                f"{reduction.full_size_px[0]} x {reduction.full_size_px[1]} pixels; crop boxes are in pixels "
                "of the whole. Decode it in full."
            )
        self._check_count(parameters, parameters)
        for transform, step in zip(self.transforms, parameters, strict=True):
            if step is not None or isinstance(transform, RandomResizedCrop):
                image = transform.apply(image, step)
        return np.array(image, dtype=np.uint8)

    def to_json(self, parameters: Parameters) -> list[Any]:
        """Return the parameters in DataCompDR's form, ready for JSON.

        One entry a transform, ``null`` for one left out: ``[top, left, height, width]`` of the crop in pixels
        of the source, whether to flip, and ``[[index, magnitude], …]`` with indexes into `OPERATIONS`.

        Raises:
            InputError: they belong to another augmentation.
        """
        self._check_count(parameters, parameters)
        return [
            None if step is None and not isinstance(transform, RandomResizedCrop) else transform.to_json(step)
            for transform, step in zip(self.transforms, parameters, strict=True)
        ]

    def from_json(self, value: object) -> Parameters:
        """Return the parameters that parsed JSON in the form of `to_json` says.

        Nothing is taken on trust: types are exact (no float for an integer), magnitudes finite and within the
        range of their operation. Whether the crop lies within the picture is seen when it is applied.

        Raises:
            InputError: it says none, or those of another augmentation.
        """
        if not isinstance(value, list):
            raise _misfit("one view", value, f"a list of {len(self.transforms)} entries ({self._names()})")
        self._check_count(value, value)
        return tuple(
            None
            if entry is None and not isinstance(transform, RandomResizedCrop)
            else transform.from_json(entry)
            for transform, entry in zip(self.transforms, value, strict=True)
        )

    def _check_count(self, entries: Sequence[object], said: object) -> None:
        if len(entries) != len(self.transforms):
            raise _misfit("one view", said, f"{len(self.transforms)} entries ({self._names()})")

    def _names(self) -> str:
        return ", ".join(transform.name for transform in self.transforms)


def _misfit(what: str, got: object, expected: str) -> InputError:
    said = repr(got)
    return InputError(
        f"augmentation parameters: {what} is {said if len(said) <= 80 else said[:77] + '...'}, expected "
        f"{expected}. Use the augmentation they were drawn with."
    )


def _check_probability(name: str, probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ConfigError(f"{name}: probability is {probability}, expected a number from 0 to 1.")


def _float(number: int | float) -> float:
    """Convert a number of any size: integers that no float can hold are infinite, and refused as such."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


# Everything is drawn from `random()`, the one stream of numpy's generators least likely to change.
def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _below(rng: np.random.Generator, count: int) -> int:
    """Draw an integer from 0 to below ``count``; the bias, below ``count / 2**53``, does not matter here."""
    return int(rng.random() * count)


DATACOMPDR = Augmentation((RandomResizedCrop((224, 224)), RandAugment()))
"""What DataCompDR's views were drawn with (their published configuration)."""
