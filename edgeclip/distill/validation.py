"""What the student can do so far: retrieval and zero-shot classification on pictures it does not train on.

Pictures are prepared as on a device, without chance. Unreadable ones are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeclip.bundle import PreprocessSpec
from edgeclip.distill.batches import to_float
from edgeclip.distill.recipe import DataSpec, ValidationSpec
from edgeclip.distill.samples import Samples
from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.metrics import recall_at_k
from edgeclip.evaluate.zero_shot import evaluate_zero_shot
from edgeclip.label_sets import LabelSet, Templates, read_labels
from edgeclip.labels import build_bank
from edgeclip.models.clip import CLIP
from edgeclip.models.config import CLIPConfig
from edgeclip.preprocess import Preprocess
from edgeclip.tokenizer import Tokenizer

__all__ = ["Validation", "open_validation"]

_BATCH = 64


@dataclass(frozen=True)
class Validation:
    """One measurement of a recipe, opened.

    Attributes:
        spec: what the recipe says.
        data: the table of its pictures.
        samples: these.
        labels: what is offered, for zero-shot.
        templates: around the labels.
    """

    spec: ValidationSpec
    data: DataSpec
    samples: Samples
    labels: LabelSet | None = None
    templates: Templates | None = None

    def measure(
        self, model: CLIP, config: CLIPConfig, tokenizer: Tokenizer, *, device: torch.device
    ) -> dict[str, float]:
        """Return the numbers of a model in eval mode.

        Retrieval: ``image_to_text_r1`` (a text of the picture is the most similar), ``…_r5`` and
        ``text_to_image_…``; equal texts are one. Zero-shot: ``top1``, ``top5``, ``mean_per_class_recall``.

        Raises:
            InputError: no picture can be used, or one has no label or caption.
        """
        encoder = _Encoder(model, config, tokenizer, device)
        count = min(len(self.samples), self.spec.limit or len(self.samples))
        return self._zero_shot(encoder, count) if self.labels else self._retrieval(encoder, count)

    def _zero_shot(self, encoder: _Encoder, count: int) -> dict[str, float]:
        assert self.labels is not None
        assert self.templates is not None
        images, targets, skipped = self._pictures(encoder, count, ("label",))
        report = evaluate_zero_shot(
            images, build_bank(self.labels, self.templates, encoder), [said[0] for said in targets]
        )
        return {
            "top1": report.top1.value,
            "top5": report.top5.value,
            "mean_per_class_recall": report.mean_per_class_recall,
            "pictures": len(images),
            "skipped": skipped,
        }

    def _retrieval(self, encoder: _Encoder, count: int) -> dict[str, float]:
        images, captions, skipped = self._pictures(encoder, count, tuple(self.data.captions))
        numbers = {text: at for at, text in enumerate(dict.fromkeys(t for said in captions for t in said))}
        texts = np.concatenate(
            [
                encoder.encode(list(numbers)[start : start + _BATCH])[0]
                for start in range(0, len(numbers), _BATCH)
            ]
        )
        relevant = np.zeros((len(images), len(numbers)), np.bool_)
        for row, said in enumerate(captions):
            relevant[row, [numbers[text] for text in said]] = True
        similarity = images @ texts.T
        found = {"pictures": float(len(images)), "texts": float(len(texts)), "skipped": float(skipped)}
        for k in (1, 5):
            found[f"image_to_text_r{k}"] = recall_at_k(similarity, relevant, k=min(k, len(texts)))
            found[f"text_to_image_r{k}"] = recall_at_k(similarity.T, relevant.T, k=min(k, len(images)))
        return found

    def _pictures(
        self, encoder: _Encoder, count: int, kinds: Sequence[str]
    ) -> tuple[NDArray[np.float32], list[tuple[str, ...]], int]:
        """Return unit rows of the pictures, their texts of these kinds, and how many cannot be read."""
        rows, said, skipped = [], [], 0
        waiting: list[NDArray[np.uint8]] = []
        for index in range(count):
            try:
                sample = self.samples.read(index)
                picture = encoder.preprocess(sample.image)
            except InputError:
                skipped += 1
                picture = None
            if picture is not None:
                texts = tuple(text for kind in kinds for text in sample.captions.get(kind, ()))
                if not texts:
                    raise InputError(
                        f"validation {self.spec.name!r}: the picture {sample.key!r} has "
                        f"{', '.join(sorted(sample.captions)) or 'no texts'}, expected {' or '.join(kinds)}."
                    )
                waiting.append(picture)
                said.append(texts)
            if waiting and (len(waiting) == _BATCH or index == count - 1):
                rows.append(encoder.images(np.stack(waiting)))
                waiting = []
        if not rows:
            raise InputError(f"validation {self.spec.name!r}: none of {count} pictures can be read.")
        return np.concatenate(rows), said, skipped


class _Encoder:
    """An eager model as :func:`edgeclip.labels.build_bank` wants it."""

    digest, space = "", ""

    def __init__(self, model: CLIP, config: CLIPConfig, tokenizer: Tokenizer, device: torch.device) -> None:
        self._model, self._config, self._tokenizer, self._device = model, config, tokenizer, device
        self.preprocess = Preprocess(
            PreprocessSpec(
                image_size_px=config.image_size_px,
                resize=config.resize,
                interpolation=config.interpolation,
                crop=config.crop,
                mean=config.mean,
                std=config.std,
            )
        )

    @torch.no_grad()
    def images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(self._device)
        rows = self._model.encode_image(
            to_float(batch, mean=self._config.mean, std=self._config.std), normalize=True
        )
        return rows.float().cpu().numpy()

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, clock: Any = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        tokens = torch.from_numpy(self._tokenizer(list(texts), truncate=True)).to(self._device)
        rows = self._model.encode_text(tokens, normalize=True)
        return rows.float().cpu().numpy(), np.zeros(len(texts), np.bool_)


def open_validation(spec: ValidationSpec, data: DataSpec, samples: Samples, root: Path) -> Validation:
    """Return a measurement, with its labels read.

    Args:
        spec: what the recipe says.
        data: the table it names.
        samples: of that table.
        root: what paths are relative to.

    Raises:
        ConfigError: the templates are not known, or a retrieval has labels.
        InputError: the file of labels cannot be read.
    """
    if spec.kind == "retrieval":
        if spec.labels is not None:
            raise ConfigError(
                f"validation {spec.name!r}: kind = 'retrieval' got 'labels' {spec.labels!r}, expected none; "
                "say kind = 'zero-shot' to use them."
            )
        return Validation(spec, data, samples)
    assert spec.labels is not None
    return Validation(spec, data, samples, read_labels(root / spec.labels), Templates.of(spec.templates))
