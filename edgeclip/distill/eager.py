"""An eager model as evaluation wants it: pictures and texts in, unit rows out.

The one place where evaluation meets torch. The trainer's measurements and ``edgeclip eval`` both ask it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeclip.answers import Answers, InForce
from edgeclip.bundle import PreprocessSpec
from edgeclip.distill.batches import to_float
from edgeclip.distill.inputs import check_tokenizer
from edgeclip.errors import ConfigError
from edgeclip.evaluate.subjects import force_of_labels
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import LabelBank, build_bank
from edgeclip.models.checkpoints import LoadedModel, load_model
from edgeclip.models.clip import CLIP, MAX_SCALE
from edgeclip.models.config import CLIPConfig
from edgeclip.models.zoo import MODELS
from edgeclip.tokenizer import Tokenizer
from edgeclip.words import scripts_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.evaluate.subjects import Asked, OnProgress

__all__ = ["EagerSubject", "open_eager", "preprocess_of", "tokenizer_of"]

_PLAIN = Answers()


class EagerSubject:
    """A model in float32 as it is, unfolded; see :class:`edgeclip.evaluate.subjects.Subject`.

    Args:
        name: as tables call it.
        model: in eval mode.
        config: what it was built from.
        tokenizer: its own.
        device: where it lies.
        about: what it is, as JSON values.
        answers: what is asked of each picture; of what needs a bundle nothing.
    """

    digest, space = "", ""  # its label vectors are kept nowhere

    def __init__(
        self,
        name: str,
        model: CLIP,
        config: CLIPConfig,
        tokenizer: Tokenizer,
        *,
        device: torch.device | None = None,
        about: Mapping[str, Any] | None = None,
        answers: Answers = _PLAIN,
    ) -> None:
        self.name = name
        self.answers = answers
        self.preprocess = preprocess_of(config)
        self.scale = min(model.logit_scale.exp().item(), MAX_SCALE)
        self.about = dict(about or {})
        self._model, self._config, self._tokenizer = model, config, tokenizer
        self._device = device or torch.device("cpu")

    @torch.no_grad()
    def images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return unit embeddings ``(B, E)`` of prepared pictures ``(B, H, W, 3)`` uint8 RGB."""
        batch = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(self._device)
        rows = self._model.encode_image(
            to_float(batch, mean=self._config.mean, std=self._config.std), normalize=True
        )
        return rows.float().cpu().numpy()

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit embeddings ``(T, E)`` of texts, cut where they are too long."""
        return self.encode(texts)[0]

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, clock: Any = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return what :func:`edgeclip.labels.build_bank` asks for: unit embeddings; none is called cut."""
        tokens = torch.from_numpy(self._tokenizer(list(texts), truncate=True)).to(self._device)
        rows = self._model.encode_text(tokens, normalize=True)
        return rows.float().cpu().numpy(), np.zeros(len(texts), np.bool_)

    def bank(
        self, labels: LabelSet, templates: Templates | None, on_progress: OnProgress | None = None
    ) -> LabelBank:
        """Return the bank of labels; without templates as a bundle would: ``one``, or ``zh`` for Chinese."""
        if templates is None:
            is_chinese = all("han" in scripts_of(name) for name in labels.names)
            templates = Templates.of("zh" if is_chinese else "one")
        return build_bank(labels, templates, self, on_progress=on_progress)

    def in_force(
        self, asked: Asked, templates: Templates | None, on_progress: OnProgress | None = None
    ) -> InForce:
        """Return what makes answers of embeddings; :func:`edgeclip.evaluate.subjects.force_of_labels`."""
        return force_of_labels(self, asked, templates, on_progress)

    def close(self) -> None:
        """Nothing to close."""


def preprocess_of(config: CLIPConfig) -> PreprocessSpec:
    """Return how whole pictures are prepared for a model."""
    return PreprocessSpec(
        image_size_px=config.image_size_px,
        resize=config.resize,
        interpolation=config.interpolation,
        crop=config.crop,
        mean=config.mean,
        std=config.std,
    )


def tokenizer_of(path: str, loaded: LoadedModel) -> Tokenizer:
    """Return the tokenizer that goes with a model: the one beside its weights, else CLIP's.

    Args:
        path: what was loaded.
        loaded: what came of it.

    Raises:
        ConfigError: its text tower wants another tokenizer, and none is there.
    """
    config, directory = loaded.config, Path(path)
    if loaded.source == "edgeclip" and (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.open(directory)
    else:
        known = MODELS.get(config.name)
        if known is not None and known.tokenizer != "clip-bpe":
            raise ConfigError(
                f"{path!r}: the model {config.name!r} has a tokenizer of kind {known.tokenizer!r} and none "
                "beside its weights; expected a checkpoint with a tokenizer."
            )
        tokenizer = Tokenizer.clip(config.text.context_length)
    check_tokenizer(config, tokenizer, who=f"{path!r}")
    return tokenizer


def open_eager(
    path: str,
    *,
    model: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    answers: Answers = _PLAIN,
) -> EagerSubject:
    """Return a checkpoint of ours, or a published file of a model of the zoo.

    Args:
        path: a checkpoint's directory, or a weights file.
        model: name of the model, where it is a file.
        device: where it runs.
        threads: of torch, for the whole process; as they are if missing.
        answers: what is asked of each picture.

    Raises:
        InputError: the checkpoint cannot be read.
        ConfigError: it has no text tower or no tokenizer, the model is not known, or there is no such device.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used by torch here: {str(error).splitlines()[0]}"
        ) from error
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(path, model=model)
    config = loaded.config
    tokenizer = tokenizer_of(path, loaded)
    towers = loaded.model.to(place).eval()
    about = {
        "kind": "checkpoint" if loaded.source == "edgeclip" else "published file",
        "model": config.name,
        "source": loaded.source,
        "format": "eager",
        "precision": "fp32",
        "backend": "torch",
        "device": device,
        "threads": torch.get_num_threads(),
        "parameters": sum(each.numel() for each in towers.parameters()),
        "embed_dim": config.embed_dim,
        "scale": min(towers.logit_scale.exp().item(), MAX_SCALE),
        "licence": loaded.licence,
    }
    name = path if model is None else f"{model}:{path}"
    return EagerSubject(name, towers, config, tokenizer, device=place, about=about, answers=answers)
