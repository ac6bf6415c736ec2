"""One sample for several models: the same crop and the same captions, as each model wants them.

A teacher is asked about what the student sees. So the parameters of a view are drawn once, and the view is
made from them for every size and interpolation that some model has; captions are chosen once and tokenized by
every tokenizer. Models that want the same share one array: the batch holds each form once.

Normalization is not done here but where the batch has arrived (:func:`edgeclip.distill.batches.to_float`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeclip.distill.augment import Augmentation, RandAugment, RandomResizedCrop, Transform
from edgeclip.distill.batches import CaptionMix, choose_captions
from edgeclip.distill.randomness import Randomness
from edgeclip.distill.recipe import DataSpec
from edgeclip.distill.samples import Sample
from edgeclip.errors import ConfigError
from edgeclip.models.config import BagTextConfig, CLIPConfig, TextTransformerConfig
from edgeclip.pictures import DEFAULT_MAX_PIXELS, decode_image
from edgeclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Consumer", "Inputs", "ViewForm", "check_tokenizer", "form_of"]

_SYNTHETIC = CaptionMix({"synthetic": 1.0})


@dataclass(frozen=True)
class ViewForm:
    """How a view is made for one image tower.

    Attributes:
        size_px: ``(H, W)``.
        interpolation: of the resize.
    """

    size_px: tuple[int, int]
    interpolation: Literal["bilinear", "bicubic"]


def form_of(config: CLIPConfig) -> ViewForm:
    """Return the form a model's views have; how it resizes whole pictures does not matter for crops."""
    return ViewForm(config.image_size_px, config.interpolation)


@dataclass(frozen=True)
class Consumer:
    """What one model takes in: its form of views, and its tokenizer."""

    form: ViewForm
    tokenizer: Tokenizer = field(repr=False)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Prepares samples for several models; the first is the student.

    Gives ``image`` ``(H, W, 3)`` uint8 and ``tokens`` ``(n, L)`` int32 for the student, and
    ``image:<i>`` ``(3, H, W)`` uint8 and ``tokens:<i>`` for further forms; :meth:`image_name` and
    :meth:`tokens_name` say which array is a model's.

    Attributes:
        augmentation: draws views, and makes the student's.
        captions: one mix for each caption of a picture.
        consumers: the models.
        max_pixels: larger pictures count as broken.
    """

    augmentation: Augmentation
    captions: tuple[CaptionMix, ...]
    consumers: tuple[Consumer, ...]
    max_pixels: int = DEFAULT_MAX_PIXELS

    @classmethod
    def of(cls, data: DataSpec, texts: int, consumers: Sequence[Consumer]) -> Inputs:
        """Return what a stage of the recipe wants.

        Args:
            data: how views and captions are drawn.
            texts: captions a picture.
            consumers: the student first.
        """
        form = consumers[0].form
        transforms: list[Transform] = [
            RandomResizedCrop(form.size_px, scale=data.crop_scale, interpolation=form.interpolation)
        ]
        if data.rand_augment:
            transforms.append(RandAugment(num_ops=data.rand_augment, magnitude=data.rand_augment_magnitude))
        mixes = (CaptionMix(data.captions), *[_SYNTHETIC] * (texts - 1))
        return cls(Augmentation(tuple(transforms)), mixes, tuple(consumers))

    def image_name(self, consumer: Consumer) -> str:
        """Return the name of the array that holds a model's pictures."""
        return _name("image", list(self._forms()).index(consumer.form))

    def tokens_name(self, consumer: Consumer) -> str:
        """Return the name of the array that holds a model's tokens."""
        return _name("tokens", list(self._tokenizers()).index(consumer.tokenizer.digest))

    def _forms(self) -> dict[ViewForm, None]:
        return dict.fromkeys(consumer.form for consumer in self.consumers)

    def _tokenizers(self) -> dict[str, Tokenizer]:
        found: dict[str, Tokenizer] = {}
        for consumer in self.consumers:
            found.setdefault(consumer.tokenizer.digest, consumer.tokenizer)
        return found

    def __call__(self, sample: Sample, randomness: Randomness) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of a sample.

        Raises:
            InputError: the picture cannot be decoded, or there is no caption of the kinds asked for.
        """
        chosen = choose_captions(self.captions, sample.captions, randomness.stream("caption"))
        texts = [caption.text for caption in chosen]
        picture = decode_image(sample.image, max_pixels=self.max_pixels)
        parameters = self.augmentation.sample(randomness.stream("view"), (picture.height, picture.width))
        arrays: dict[str, NDArray[Any]] = {}
        for number, form in enumerate(self._forms()):
            view = _with_form(self.augmentation, form).apply(picture, parameters)
            # Collation turns the array called "image", and only that.
            arrays[_name("image", number)] = (
                view if number == 0 else np.ascontiguousarray(view.transpose(2, 0, 1))
            )
        for number, tokenizer in enumerate(self._tokenizers().values()):
            arrays[_name("tokens", number)] = tokenizer(texts, truncate=True)
        return arrays


def _name(what: str, number: int) -> str:
    return f"{what}:{number}" if number else what


def _with_form(augmentation: Augmentation, form: ViewForm) -> Augmentation:
    crop, *rest = augmentation.transforms
    assert isinstance(crop, RandomResizedCrop)
    return Augmentation(
        (dataclasses.replace(crop, size_px=form.size_px, interpolation=form.interpolation), *rest)
    )


def check_tokenizer(config: CLIPConfig, tokenizer: Tokenizer, *, who: str) -> None:
    """Raise where a text tower cannot read a tokenizer's ids, or would look for the text elsewhere.

    Raises:
        ConfigError: they do not fit; begins with ``who``.
    """
    text = config.text
    if tokenizer.context_length != text.context_length or tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"{who}: the tokenizer gives {tokenizer.vocab_size} ids in rows of {tokenizer.context_length}, "
            f"the text tower reads {text.vocab_size} in rows of {text.context_length}; they must belong "
            "together."
        )
    masked = isinstance(text, BagTextConfig) or text.attention == "padded" or text.pool == "mean"
    pad = tokenizer.config.special.pad
    if masked and pad != text.pad_id:
        raise ConfigError(
            f"{who}: the tokenizer fills rows with the id {pad}, the text tower leaves out {text.pad_id}; "
            "set the tower's 'pad_id'."
        )
    if isinstance(text, TextTransformerConfig) and text.pool == "eot" and tokenizer.pooling != "argmax":
        raise ConfigError(
            f"{who}: the text tower looks for the text at the largest id, the tokenizer's pooling is "
            f"{tokenizer.pooling!r}, expected 'argmax'."
        )
