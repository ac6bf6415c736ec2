"""What the student can do so far: retrieval, zero-shot classification, and agreement with a teacher.

Measured on pictures it does not train on, prepared as on a device, without chance. Unreadable ones are left
out and counted. The numbers are those of :mod:`edgeclip.evaluate`, and so of ``edgeclip eval``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from edgeclip.bundle import PreprocessSpec
from edgeclip.distill.batches import Batch, Position
from edgeclip.distill.eager import EagerSubject
from edgeclip.distill.inputs import Consumer, Inputs, ViewForm, form_of
from edgeclip.distill.recipe import DataSpec, ValidationSpec
from edgeclip.distill.samples import Samples
from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.agreement import match_agreement, mean_cosine, neighbour_agreement
from edgeclip.evaluate.offered import Offered, offer
from edgeclip.evaluate.retrieval import Texts, evaluate_retrieval
from edgeclip.evaluate.zero_shot import evaluate_zero_shot
from edgeclip.label_sets import Templates, read_labels
from edgeclip.models.clip import CLIP
from edgeclip.models.config import CLIPConfig
from edgeclip.preprocess import Preprocess
from edgeclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeclip.distill.teachers import Teacher

__all__ = ["Validation", "open_validation"]

_BATCH = 64


@dataclass
class _Seen:
    """What was read so far.

    Attributes:
        texts: of each picture.
        skipped: pictures that cannot be read.
    """

    texts: list[tuple[str, ...]] = field(default_factory=list)
    skipped: int = 0


@dataclass(frozen=True)
class Validation:
    """One measurement of a recipe, opened.

    Attributes:
        spec: what the recipe says.
        data: the table of its pictures.
        samples: these.
        offered: the labels, for zero-shot.
        teacher: whom the student should agree with.
    """

    spec: ValidationSpec
    data: DataSpec
    samples: Samples
    offered: Offered | None = None
    teacher: Teacher | None = None

    def measure(
        self, model: CLIP, config: CLIPConfig, tokenizer: Tokenizer, *, device: torch.device
    ) -> dict[str, float]:
        """Return the numbers of a model in eval mode.

        * Retrieval: ``image_to_text_r1`` (a text of the picture is the most similar), ``…_r5``, ``…_r10`` and
          ``text_to_image_…``; equal texts are one.
        * Zero-shot: ``top1``, ``top5``, ``mean_per_class_recall``, ``calibration_error``.
        * Agreement: ``image_cosine`` and ``text_cosine``, the mean cosine of the student's embedding and the
          teacher's, where widths are equal; ``image_neighbours`` and ``text_neighbours``, the share whose
          closest other one is the same; ``image_to_text_matches`` and ``text_to_image_matches``, the share
          that both match with the same. What needs a tower the teacher lacks is left out.

        Raises:
            InputError: no picture can be used, or one has no label or caption.
        """
        student = EagerSubject("student", model, config, tokenizer, device=device)
        if self.offered is not None:
            return self._zero_shot(student, self.offered)
        if self.teacher is not None:
            return self._agreement(student, Consumer(form_of(config), tokenizer), self.teacher, device)
        return self._retrieval(student)

    def _zero_shot(self, student: EagerSubject, offered: Offered) -> dict[str, float]:
        seen = _Seen()
        images = self._images(student, seen, ("label",))
        targets = [offered.number(texts[0]) for texts in seen.texts]
        if None in targets:
            stray = seen.texts[targets.index(None)][0]
            raise InputError(
                f"validation {self.spec.name!r}: a picture has the label {stray[:80]!r}, which is not among "
                f"the {len(offered.names)} offered."
            )
        ((language, labels),) = offered.languages.items()
        report = evaluate_zero_shot(
            images,
            student.bank(labels, offered.templates[language]),
            np.array(targets, np.intp),
            labels=offered.names,
            scale=student.scale,
        )
        assert report.calibration_error is not None
        return {
            "top1": report.top1.value,
            "top5": report.top5.value,
            "mean_per_class_recall": report.mean_per_class_recall,
            "calibration_error": report.calibration_error,
            "pictures": float(len(seen.texts)),
            "skipped": float(seen.skipped),
        }

    def _retrieval(self, student: EagerSubject) -> dict[str, float]:
        seen = _Seen()
        images = self._images(student, seen, tuple(self.data.captions))
        texts = Texts.of(seen.texts)
        report = evaluate_retrieval(images, _texts(student, texts.texts), texts)
        return {
            "pictures": float(report.pictures),
            "texts": float(report.texts),
            "skipped": float(seen.skipped),
            **{f"image_to_text_r{k}": each.value for k, each in report.image_to_text.items()},
            **{f"text_to_image_r{k}": each.value for k, each in report.text_to_image.items()},
        }

    def _agreement(
        self, student: EagerSubject, consumer: Consumer, teacher: Teacher, device: torch.device
    ) -> dict[str, float]:
        asked = teacher.consumer
        assert asked is not None
        # As in training, the teacher sees the student's view at its own size.
        own = student.preprocess
        forms = [own] if asked.form is None else [own, _as_form(own, asked.form)]
        seen = _Seen()
        parts: dict[str, list[NDArray[np.float32]]] = {"student": [], "image": [], "text": []}
        teacher, inputs = teacher.to(device), Inputs.of(self.data, 1, [consumer, asked])
        for pictures in self._batches(seen, [Preprocess(form) for form in forms], tuple(self.data.captions)):
            parts["student"].append(student.images(pictures[0]))
            captions = [said[0] for said in seen.texts[-len(pictures[0]) :]]
            told = teacher.ask(_batch(asked, inputs, pictures[-1], captions).to(device), inputs)
            for name, embedded in (("image", told.image), ("text", told.texts[0] if told.texts else None)):
                if embedded is not None:
                    parts[name].append(embedded.float().cpu().numpy())
        texts = Texts.of([said[:1] for said in seen.texts])
        images, rows = np.concatenate(parts["student"]), _texts(student, texts.texts)
        told_images = np.concatenate(parts["image"]) if parts["image"] else None
        # There is one for each picture: that of the first picture with a text is taken.
        firsts = np.unique(texts.numbers, return_index=True)[1]
        told_texts = np.concatenate(parts["text"])[firsts] if parts["text"] else None
        found = {"pictures": float(len(images)), "texts": float(len(rows)), "skipped": float(seen.skipped)}
        for tower, ours, theirs in (("image", images, told_images), ("text", rows, told_texts)):
            if theirs is not None and theirs.shape == ours.shape:
                found[f"{tower}_cosine"] = mean_cosine(ours, theirs)
            if theirs is not None and len(ours) > 1:
                found[f"{tower}_neighbours"] = neighbour_agreement(ours, theirs)
        if told_images is not None and told_texts is not None:
            matches = match_agreement((images, rows), (told_images, told_texts))
            found["image_to_text_matches"], found["text_to_image_matches"] = matches
        return found

    def _images(self, student: EagerSubject, seen: _Seen, kinds: Sequence[str]) -> NDArray[np.float32]:
        batches = self._batches(seen, [Preprocess(student.preprocess)], kinds)
        return np.concatenate([student.images(pictures) for (pictures,) in batches])

    def _batches(
        self, seen: _Seen, forms: Sequence[Preprocess], kinds: Sequence[str]
    ) -> Iterator[tuple[NDArray[np.uint8], ...]]:
        """Yield some pictures at a time, as ``(b, H, W, 3)`` uint8 a form: all may be more than memory holds.

        They are evenly spread where there is a limit. Their texts of these kinds are added to ``seen``.
        """
        total = len(self.samples)
        count = min(total, self.spec.limit or total)
        rows: list[list[NDArray[np.uint8]]] = []
        for number in range(count):
            try:
                sample = self.samples.read(number * total // count)
                picture = forms[0].decode(sample.image)
                prepared = [form.resize(picture) for form in forms]
            except InputError:
                seen.skipped += 1
                continue
            texts = tuple(text for kind in kinds for text in sample.captions.get(kind, ()))
            if not texts:
                raise InputError(
                    f"validation {self.spec.name!r}: the picture {sample.key!r} has "
                    f"{', '.join(sorted(sample.captions)) or 'no texts'}, expected {' or '.join(kinds)}."
                )
            rows.append(prepared)
            seen.texts.append(texts)
            if len(rows) == _BATCH:
                yield _stacked(rows)
                rows = []
        if rows:
            yield _stacked(rows)
        if not seen.texts:
            raise InputError(f"validation {self.spec.name!r}: none of {count} pictures can be read.")


def _stacked(rows: Sequence[Sequence[NDArray[np.uint8]]]) -> tuple[NDArray[np.uint8], ...]:
    return tuple(np.stack(form) for form in zip(*rows, strict=True))


def _texts(student: EagerSubject, texts: Sequence[str]) -> NDArray[np.float32]:
    return np.concatenate(
        [student.texts(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
    )


def _as_form(spec: PreprocessSpec, form: ViewForm) -> PreprocessSpec:
    return msgspec.structs.replace(spec, image_size_px=form.size_px, interpolation=form.interpolation)


def _batch(asked: Consumer, inputs: Inputs, pictures: NDArray[np.uint8], texts: Sequence[str]) -> Batch:
    """Return pictures and a text each as a teacher reads them."""
    arrays: dict[str, torch.Tensor] = {}
    if asked.form is not None:
        turned = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
        arrays[inputs.image_name(asked)] = torch.from_numpy(turned)
    if asked.tokenizer is not None:
        tokens = asked.tokenizer(texts, truncate=True)
        arrays[inputs.tokens_name(asked)] = torch.from_numpy(tokens)[:, None]
    members = range(len(pictures))
    return Batch(Position(), torch.tensor(members), tuple(map(str, members)), arrays)


def open_validation(
    spec: ValidationSpec,
    data: DataSpec,
    samples: Samples,
    root: Path,
    teachers: Mapping[str, Teacher] | None = None,
) -> Validation:
    """Return a measurement, with its labels read.

    Args:
        spec: what the recipe says.
        data: the table it names.
        samples: of that table.
        root: what paths are relative to.
        teachers: by name; the one it names is among them.

    Raises:
        ConfigError: the templates are not known, a key means nothing for the kind, or a teacher can only say
            what it has stored.
        InputError: the file of labels cannot be read, or lacks the language.
    """
    for key, kind in (("labels", "zero-shot"), ("language", "zero-shot"), ("teacher", "teacher-agreement")):
        if getattr(spec, key) is not None and spec.kind != kind:
            raise ConfigError(
                f"validation {spec.name!r}: kind = {spec.kind!r} got {key!r} {getattr(spec, key)!r}, "
                f"expected none; say kind = {kind!r} to use it."
            )
    if spec.kind == "retrieval":
        return Validation(spec, data, samples)
    if spec.kind == "teacher-agreement":
        assert spec.teacher is not None
        teacher = (teachers or {})[spec.teacher]
        if teacher.consumer is None:
            raise ConfigError(
                f"validation {spec.name!r}: the teacher {spec.teacher!r} cannot be asked about other "
                "pictures than it has stored; name one that runs."
            )
        return Validation(spec, data, samples, teacher=teacher)
    assert spec.labels is not None
    languages = () if spec.language is None else (spec.language,)
    offered = offer(
        [(None, read_labels(root / spec.labels))],
        languages=languages,
        templates=[(None, Templates.of(spec.templates))],
    )
    return Validation(spec, data, samples, offered)
