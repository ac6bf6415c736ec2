"""What is exported, opened: the float32 model with its tokenizer, and what is known of its origin.

The exporter's only way to torch; it is imported when an export begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from io import FileIO
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
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.labels import BankProgress, LabelBank, build_bank
from edgeclip.models.checkpoints import load_model, read_checkpoint_info
from edgeclip.models.clip import CLIP, MAX_SCALE
from edgeclip.models.config import CLIPConfig
from edgeclip.models.zoo import MODELS
from edgeclip.storage import hash_stream
from edgeclip.tokenizer import Tokenizer

from .options import Checkpoint, GraphOptions
from .passes import apply
from .passes.sequences import shared
from .trace import image_graph, trace_image_tower, trace_text_tower

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from edgeclip.runtime.latency import Clock

__all__ = ["Source", "open_source"]

_PICTURES, _TEXTS = 16, 32  # a call: small ones keep the peak of memory low
_KEPT_TEXTS = 4096


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
        for start in range(0, len(pictures), _PICTURES):
            parts.append(self._subject.images(pictures[start : start + _PICTURES]))
            on_progress(min(start + _PICTURES, len(pictures)), len(pictures))
        return np.concatenate(parts)

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit embeddings ``(m, E)`` of texts, cut where they are too long; each is encoded once."""
        known = self._known_texts
        rows: list[NDArray[np.float32]] = []
        for start in range(0, len(texts), _TEXTS):
            part = texts[start : start + _TEXTS]
            missing = [text for text in dict.fromkeys(part) if text not in known]
            fresh = dict(zip(missing, self._subject.texts(missing), strict=True)) if missing else {}
            rows += [known[text] if text in known else fresh[text] for text in part]
            if len(known) < _KEPT_TEXTS:
                known.update(fresh)
        return np.stack(rows)

    def bank(
        self,
        labels: LabelSet,
        templates: Templates,
        on_progress: Callable[[BankProgress], None] | None = None,
    ) -> LabelBank:
        """Return the bank of labels."""
        return build_bank(labels, templates, _Encoder(self), on_progress=on_progress)

    @cached_property
    def _subject(self) -> EagerSubject:
        return EagerSubject(self.config.name, self.model, self.config, self.tokenizer)

    @cached_property
    def _known_texts(self) -> dict[str, NDArray[np.float32]]:
        return {}

    def release(self) -> None:
        """Let go of the weights."""
        self.model.image_tower, self.model.text_tower = nn.Identity(), nn.Identity()

    def image_graph(self, options: GraphOptions) -> nn.Module:
        """Return what will be traced of the image tower: a copy."""
        return image_graph(self.model.image_tower, self.config, options)

    def trace(self, tower: str, options: GraphOptions) -> onnx.ModelProto:
        """Return the graph of a tower, and let go of its weights: it is asked once.

        Raises:
            ExportError: the tower cannot be traced.
        """
        if tower == "image":
            graph = trace_image_tower(self.model.image_tower, self.config, options)
            self.model.image_tower = nn.Identity()
        else:
            text = self.config.text
            graph = trace_text_tower(
                self.model.text_tower, text.context_length, options, free_length=text.free_length
            )
            self.model.text_tower = nn.Identity()
        return apply(graph, shared(), what=f"{tower} tower")


@dataclass(frozen=True)
class _Encoder:
    """What a bank is built with; see :class:`edgeclip.labels.Encoder`."""

    source: Source
    digest: str = ""  # its vectors are kept nowhere
    space: str = ""

    def encode(
        self, texts: Sequence[str], *, clock: Clock | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return unit embeddings, and which texts were cut."""
        tokenizer = self.source.tokenizer
        cut = [tokenizer.count(text) > tokenizer.context_length for text in texts]
        return self.source.texts(texts), np.array(cut, np.bool_)


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
    loaded = load_model(path, model=model, external=_external(path, checkpoint.materials))
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
        known = {name.lower(): name for name in MODELS}
        close = get_close_matches(said.lower(), known, n=1)
        hint = f"did you mean {known[close[0]]!r}? See" if close else "see"
        raise InputError(
            f"checkpoint {said!r}: there is no such file or directory, and no model of that name; {hint} "
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


def _external(path: str, directory: Path | None) -> Mapping[str, Path] | None:
    """Return where the weights are that a checkpoint left in the packages they came in."""
    if not (Path(path) / "config.json").is_file() or not read_checkpoint_info(path).external_weights:
        return None
    return materials("default-model", directory)


def _weights_digest(model: CLIP) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with FileIO(path) as stream:
        return hash_stream(stream)[1]
