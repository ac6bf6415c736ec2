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
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from edgeclip.distill.augment import Augmentation, Parameters, RandAugment, RandomResizedCrop, Transform
from edgeclip.distill.batches import Caption, CaptionMix, choose_captions
from edgeclip.distill.prompts import Prompted, Prompts, Writer
from edgeclip.distill.randomness import Randomness
from edgeclip.distill.recipe import DataSpec
from edgeclip.distill.samples import Sample
from edgeclip.distill.stored import open_stored, place_of
from edgeclip.distill.views import VIEWS_EXTENSION, list_views, view_of
from edgeclip.errors import ConfigError, InputError
from edgeclip.models.config import BagTextConfig, CLIPConfig, TextTransformerConfig
from edgeclip.pictures import DEFAULT_MAX_PIXELS, decode_image
from edgeclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "STORED_IMAGE",
    "STORED_TEXT",
    "Consumer",
    "Inputs",
    "StoredViews",
    "TextInput",
    "ViewForm",
    "check_tokenizer",
    "form_of",
    "with_form",
]

STORED_IMAGE, STORED_TEXT = "stored-image", "stored-text"


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


class TextInput(Protocol):
    """What turns texts into the ids one model reads: a :class:`Tokenizer`, or one of another library."""

    @property
    def digest(self) -> str:
        """Say who it is: equal digests give equal ids."""
        ...

    def __call__(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.int32]:
        """Return ``(n, L)`` int32 of ``n`` texts; ``L`` is always the same."""
        ...


@dataclass(frozen=True)
class Consumer:
    """What one model takes in.

    Attributes:
        form: of its views; ``None``: it has no image tower.
        tokenizer: its own; ``None``: it has no text tower.
    """

    form: ViewForm | None
    tokenizer: TextInput | None = field(repr=False)


@dataclass(frozen=True)
class StoredViews:
    """Views that lie in the samples with what teachers said about them.

    Attributes:
        columns: width of the stored embeddings, all teachers together.
        upright: whether crops were drawn on pictures as :func:`~edgeclip.pictures.decode_image` gives them;
            DataCompDR's were drawn on what Pillow's plain ``convert("RGB")`` gives.
    """

    columns: int
    upright: bool = True


@dataclass(frozen=True, eq=False)
class Inputs:
    """Prepares samples for several models; the first is the student.

    Gives ``image`` ``(H, W, 3)`` uint8 and ``tokens`` ``(n, L)`` int32 for the student, and
    ``image:<i>`` ``(3, H, W)`` uint8 and ``tokens:<i>`` for further forms; :meth:`image_name` and
    :meth:`tokens_name` say which array is a model's. With stored views also ``stored-image`` ``(K·d,)`` and
    ``stored-text`` ``(n, K·d)`` float32, the rows that belong to the view and the captions. Of texts without
    pictures there is no ``image``, but ``picture``, the number of one the text fits, where it has some.

    Attributes:
        augmentation: draws views, and makes the student's.
        captions: one mix for each caption of a picture.
        consumers: the models.
        stored: views are not drawn but chosen among those of the sample.
        max_pixels: larger pictures count as broken.
        prompts: what is put around captions.
        of_texts: the samples are texts without pictures.
        writer: writes the student's captions, where they have prompts or are all there is.
    """

    augmentation: Augmentation
    captions: tuple[CaptionMix, ...]
    consumers: tuple[Consumer, ...]
    stored: StoredViews | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    prompts: Prompts | None = None
    of_texts: bool = False
    writer: Writer | None = None

    @classmethod
    def of(
        cls,
        data: DataSpec,
        texts: int,
        consumers: Sequence[Consumer],
        *,
        stored: StoredViews | None = None,
        prompts: Prompts | None = None,
    ) -> Inputs:
        """Return what a stage of the recipe wants.

        Args:
            data: how views and captions are drawn.
            texts: captions a picture.
            consumers: the student first.
            stored: where the samples hold their views.
            prompts: of these data.
        """
        form = consumers[0].form
        assert form is not None
        transforms: list[Transform] = [
            RandomResizedCrop(form.size_px, scale=data.crop_scale, interpolation=form.interpolation)
        ]
        if data.rand_augment:
            transforms.append(RandAugment(num_ops=data.rand_augment, magnitude=data.rand_augment_magnitude))
        own = consumers[0].tokenizer
        writer = None
        if prompts is not None or data.texts is not None:
            assert isinstance(own, Tokenizer)
            writer = Writer(own)
        mixes = (CaptionMix(data.captions), *[CaptionMix(data.synthetic)] * (texts - 1))
        return cls(
            Augmentation(tuple(transforms)),
            mixes,
            tuple(consumers),
            stored,
            prompts=prompts,
            of_texts=data.texts is not None,
            writer=writer,
        )

    def image_name(self, consumer: Consumer) -> str:
        """Return the name of the array that holds a model's pictures."""
        assert consumer.form is not None
        return _name("image", list(self._forms()).index(consumer.form))

    def tokens_name(self, consumer: Consumer) -> str:
        """Return the name of the array that holds a model's tokens."""
        assert consumer.tokenizer is not None
        return _name("tokens", list(self._tokenizers()).index(consumer.tokenizer.digest))

    def _forms(self) -> dict[ViewForm, None]:
        return dict.fromkeys(consumer.form for consumer in self.consumers if consumer.form is not None)

    def _tokenizers(self) -> dict[str, TextInput]:
        found: dict[str, TextInput] = {}
        for consumer in self.consumers:
            if consumer.tokenizer is None:
                continue
            found.setdefault(consumer.tokenizer.digest, consumer.tokenizer)
        return found

    def __call__(self, sample: Sample, randomness: Randomness) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of a sample.

        Raises:
            InputError: the picture cannot be decoded, there is no caption of the kinds asked for, or what is
                stored cannot be used.
        """
        if self.of_texts:
            return self._of_text(sample, randomness)
        chosen = choose_captions(self.captions, sample.captions, randomness.stream("caption"))
        picture = decode_image(
            sample.image,
            max_pixels=self.max_pixels,
            as_stored=self.stored is not None and not self.stored.upright,
        )
        arrays: dict[str, NDArray[Any]] = {}
        augmentation, rng = self.augmentation, randomness.stream("view")
        if self.stored is None:
            parameters = augmentation.sample(rng, (picture.height, picture.width))
        else:
            augmentation, parameters, rows = self._replay(self.stored, sample, chosen, rng)
            arrays |= rows
        for number, form in enumerate(self._forms()):
            view = with_form(augmentation, form).apply(picture, parameters)
            # Collation turns the array called "image", and only that.
            arrays[_name("image", number)] = (
                view if number == 0 else np.ascontiguousarray(view.transpose(2, 0, 1))
            )
        return arrays | self._tokens(chosen, randomness.stream("prompt") if self.prompts else None)

    def _of_text(self, sample: Sample, randomness: Randomness) -> dict[str, NDArray[Any]]:
        """Return the arrays of a text without a picture."""
        ((kind, (text,)),) = sample.captions.items()
        # A generator costs more than the rest of a short text.
        rng = randomness.stream("prompt") if self.prompts or len(sample.pictures) > 1 else None
        arrays = self._tokens([Caption(kind, 0, text)], rng)
        if sample.pictures:
            place = 0 if rng is None else int(rng.random() * len(sample.pictures))
            arrays["picture"] = np.array(sample.pictures[place], np.int64)
        return arrays

    def _tokens(self, chosen: Sequence[Caption], rng: np.random.Generator | None) -> dict[str, NDArray[Any]]:
        """Return captions, in their prompts, as every tokenizer writes them."""
        if self.prompts is None or rng is None:
            drawn = [Prompted("", caption.text, "") for caption in chosen]
        else:
            drawn = [self.prompts.draw(caption, rng) for caption in chosen]
        arrays: dict[str, NDArray[Any]] = {}
        for number, tokenizer in enumerate(self._tokenizers().values()):
            if number == 0 and self.writer is not None:
                rows = np.array([self.writer(prompted) for prompted in drawn])
            else:
                rows = tokenizer([prompted.whole for prompted in drawn], truncate=True)
            arrays[_name("tokens", number)] = rows
        return arrays

    def _replay(
        self, stored: StoredViews, sample: Sample, chosen: Sequence[Caption], rng: np.random.Generator
    ) -> tuple[Augmentation, Parameters, dict[str, NDArray[Any]]]:
        """Return one of a sample's views, and the rows that belong to it and to the captions."""
        embeddings = open_stored(sample.members, where=sample.key)
        if embeddings.columns != stored.columns:
            raise InputError(
                f"{embeddings.where}: embeddings have {embeddings.columns} columns, expected "
                f"{stored.columns}, as in the other samples. Reinforce the sample again."
            )
        where = f"{sample.key}.{VIEWS_EXTENSION}"
        if VIEWS_EXTENSION not in sample.members:
            raise InputError(f"{where}: is missing. Reinforce the sample again.")
        views = list_views(sample.members[VIEWS_EXTENSION], where=where)
        if len(views) != embeddings.views:
            raise InputError(
                f"{where}: says {len(views)} views, there are embeddings of {embeddings.views}. Reinforce "
                "the sample again."
            )
        number = int(rng.random() * len(views))
        crop = self.augmentation.transforms[0]
        assert isinstance(crop, RandomResizedCrop)
        augmentation, parameters = view_of(crop, views[number], where=f"{where}, view {number}")
        places = [place_of(caption.kind, caption.number, sample.captions, embeddings) for caption in chosen]
        arrays = {
            STORED_IMAGE: embeddings.rows("image_emb", [number])[0],
            STORED_TEXT: np.concatenate([embeddings.rows(place.array, [place.row]) for place in places]),
        }
        return augmentation, parameters, arrays


def _name(what: str, number: int) -> str:
    return f"{what}:{number}" if number else what


def with_form(augmentation: Augmentation, form: ViewForm) -> Augmentation:
    """Return the same augmentation with views of another form."""
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
