"""What is exported, opened: the float32 model with its tokenizer, and what is known of its origin.

The exporter's only way to torch; it is imported when an export begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgeclip.bundle import PreprocessSpec
from edgeclip.distill.eager import EagerSubject, preprocess_of, tokenizer_of
from edgeclip.errors import ConfigError, InputError
from edgeclip.fetch import materials
from edgeclip.hub import weights_directory
from edgeclip.models.checkpoints import load_model, read_checkpoint_info
from edgeclip.models.clip import CLIP, MAX_SCALE
from edgeclip.models.config import CLIPConfig
from edgeclip.models.zoo import MODELS
from edgeclip.tokenizer import Tokenizer

from .options import Checkpoint, GraphOptions
from .trace import trace_image_tower, trace_text_tower

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = ["Source", "open_source"]

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export.

    Attributes:
        model: in float32, in eval mode; its towers go as they are traced.
        config: what it was built from.
        preprocess: how whole pictures are prepared.
        tokenizer: its own.
        scale: multiplier of cosines.
        licence: SPDX expression.
        parents: what the weights descend from.
        parameters: of each tower.
        digest: sha256 of the weights as they are in memory.
        origin: what the bundle says of where it came from.
    """

    model: CLIP
    config: CLIPConfig
    preprocess: PreprocessSpec
    tokenizer: Tokenizer
    scale: float
    licence: str
    parents: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, int]
    digest: str
    origin: Mapping[str, Any]

    @property
    def family(self) -> str:
        """Family in the zoo, else the kinds of the towers."""
        known = MODELS.get(self.config.name)
        return f"{self.config.image.kind}-{self.config.text.kind}" if known is None else known.family

    def images(
        self, pictures: NDArray[np.uint8], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> NDArray[np.float32]:
        """Return unit embeddings ``(n, E)`` of prepared pictures ``(n, H, W, 3)``."""
        parts = []
        for start in range(0, len(pictures), _BATCH):
            parts.append(self.subject.images(pictures[start : start + _BATCH]))
            on_progress(min(start + _BATCH, len(pictures)), len(pictures))
        return np.concatenate(parts)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit embeddings ``(m, E)`` of texts, cut where they are too long."""
        parts = [self.subject.texts(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)]
        return np.concatenate(parts)

    @property
    def subject(self) -> EagerSubject:
        """The model as evaluation knows it."""
        return EagerSubject(self.config.name, self.model, self.config, self.tokenizer)

    def release(self) -> None:
        """Let go of the weights."""
        self.model.image_tower, self.model.text_tower = nn.Identity(), nn.Identity()

    def trace(self, tower: str, options: GraphOptions) -> onnx.ModelProto:
        """Return the graph of a tower, and let go of its weights: it is asked once.

        Raises:
            ExportError: the tower cannot be traced.
        """
        if tower == "image":
            graph = trace_image_tower(self.model.image_tower, self.config, options)
            self.model.image_tower = nn.Identity()
        else:
            graph = trace_text_tower(self.model.text_tower, self.config.text.context_length, options)
            self.model.text_tower = nn.Identity()
        return graph


def open_source(checkpoint: Checkpoint, *, threads: int | None = None) -> Source:
    """Open what is to be exported.

    Args:
        checkpoint: which.
        threads: of torch, for the whole process; as they are if missing.

    Raises:
        InputError: it is missing, damaged, or several models fit.
        ConfigError: the model is unknown, or has no tokenizer.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    path, model = _locate(checkpoint)
    loaded = load_model(path, model=model, external=_external(path))
    towers = loaded.model.eval().requires_grad_(False)
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    return Source(
        model=towers,
        config=loaded.config,
        preprocess=preprocess_of(loaded.config),
        tokenizer=tokenizer_of(path, loaded),
        scale=min(towers.logit_scale.exp().item(), MAX_SCALE),
        licence=loaded.licence,
        parents=loaded.parents,
        parameters={
            "image": sum(each.numel() for each in towers.image_tower.parameters()),
            "text": sum(each.numel() for each in towers.text_tower.parameters()),
        },
        digest=_weights_digest(towers),
        # The name of the file alone: a path tells who made the bundle.
        origin={
            "model": loaded.config.name,
            "kind": loaded.source,
            "file": file.name,
            "sha256": _sha256(file),
        },
    )


def _locate(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """Return path and model name of what was asked for.

    Raises:
        InputError: it is not there, or is something else.
        ConfigError: a model of the zoo whose weights cannot be had by name.
    """
    said, path = checkpoint.path, Path(checkpoint.path)
    if (path / "config.json").is_file() or path.is_file():
        return said, checkpoint.model
    if path.is_dir():
        inside = path / "model"
        if (path / "manifest.json").is_file():
            hint = "it is a bundle, whose float32 weights are gone"
        elif (inside / "config.json").is_file():
            hint = f"did you mean {str(inside)!r}"
        else:
            hint = "it has no config.json"
        raise InputError(f"checkpoint {said!r}: {hint}; expected a checkpoint's directory.")
    entry = MODELS.get(said)
    if entry is None:
        raise InputError(
            f"checkpoint {said!r}: there is no such file or directory, and no model of that name; see "
            "`edgeclip models list`."
        )
    if entry.weights is None:
        raise ConfigError(f"model {said!r} has no published weights: train it and name the checkpoint.")
    folder = weights_directory(said)
    found = next((folder / name for name in entry.weights.files if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"model {said!r}: its weights are not in {str(folder)!r}; run `edgeclip models pull {said}`, or "
            f"name a file with --model {said}."
        )
    return str(found), said


def _external(path: str) -> Mapping[str, Path] | None:
    """Return where the weights are that a checkpoint left in the packages they came in."""
    if not (Path(path) / "config.json").is_file() or not read_checkpoint_info(path).external_weights:
        return None
    return materials("default-model")


def _weights_digest(model: CLIP) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
