"""Where training begins: the student with its tokenizer, and the teachers that run beside it.

A teacher is frozen and stays in eval mode whatever is done to what holds it: its batch norms must not learn
from the student's batches. It brings its own normalization and tokenizer; which crop and which caption it
sees is the student's (:mod:`edgeclip.distill.inputs`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgeclip.distill.batches import to_float
from edgeclip.distill.inputs import Consumer, ViewForm, check_tokenizer, form_of
from edgeclip.distill.objective import Embedded
from edgeclip.distill.recipe import (
    CheckpointTeacher,
    OpenClipTeacher,
    Recipe,
    StoredTeacher,
    StudentSpec,
    TeacherSpec,
)
from edgeclip.errors import ConfigError, MissingExtraError
from edgeclip.models.checkpoints import load_model
from edgeclip.models.clip import CLIP, build_clip
from edgeclip.models.config import CLIPConfig, config_from_dict
from edgeclip.models.zoo import MODELS, clip_config
from edgeclip.tokenizer import Tokenizer

__all__ = ["Student", "Teacher", "embed", "licence_of", "open_student", "open_teacher"]

_NOT_SAID = "NOASSERTION"
_IDENTIFIER = re.compile(r"[A-Za-z0-9.+-]+")
_RESEARCH_ONLY = frozenset(
    entry.licence.identifier
    for entry in MODELS.values()
    if entry.licence is not None and entry.licence.research_only
)


def embed(
    model: nn.Module,
    image: Tensor,
    tokens: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, ...]:
    """Return the embeddings of a batch, not normalized: the pictures', then each caption's.

    Args:
        model: has ``encode_image`` and ``encode_text``.
        image: ``(b, 3, H, W)`` uint8.
        tokens: ``(b, n, L)``.
        mean: of the model's preprocessing.
        std: likewise.

    Returns:
        ``1 + n`` tensors ``(b, E)``, float32.
    """
    pictures: Tensor = model.encode_image(to_float(image, mean=mean, std=std))  # type: ignore[operator]
    texts: Tensor = model.encode_text(tokens.flatten(0, 1))  # type: ignore[operator]
    each = texts.float().view(*tokens.shape[:2], -1)  # (b, n, E)
    return (pictures.float(), *each.unbind(1))


class Teacher(nn.Module):
    """A frozen model that says where the student's embeddings should be.

    Args:
        name: as losses call it.
        model: has ``encode_image`` and ``encode_text``.
        form: how its views are made.
        mean: per RGB channel, on pixels in [0, 1].
        std: likewise.
        tokenizer: its own.
        embed_dim: width of its embedding.
        parent: what the student's checkpoint records about it.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        form: ViewForm,
        mean: Sequence[float],
        std: Sequence[float],
        tokenizer: Tokenizer,
        embed_dim: int,
        parent: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.requires_grad_(False).eval()
        self.mean, self.std = tuple(mean), tuple(std)
        self.consumer = Consumer(form, tokenizer)
        self.embed_dim = embed_dim
        self.parent = dict(parent)

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, image: Tensor, tokens: Tensor) -> Embedded:
        """Embed ``(b, 3, H, W)`` uint8 pictures and ``(b, n, L)`` token ids."""
        pictures, *texts = embed(self.model, image, tokens, mean=self.mean, std=self.std)
        return Embedded(pictures, tuple(texts))


@dataclass(frozen=True)
class Student:
    """The model that is trained, before its first step.

    Attributes:
        model: in float32.
        config: what it was built from.
        tokenizer: its own.
        parents: what it descends from; empty for fresh weights.
    """

    model: CLIP
    config: CLIPConfig
    tokenizer: Tokenizer
    parents: tuple[Mapping[str, Any], ...] = ()

    @property
    def consumer(self) -> Consumer:
        """What it takes in."""
        return Consumer(form_of(self.config), self.tokenizer)


def open_student(recipe: Recipe, root: Path) -> Student:
    """Return the student of a recipe; fresh weights depend on the recipe's seed alone.

    Args:
        recipe: whose ``[student]``.
        root: what paths are relative to.

    Raises:
        ConfigError: the model is not known, or its tokenizer does not fit it.
        InputError: the checkpoint cannot be read.
    """
    said = recipe.student
    parents: tuple[Mapping[str, Any], ...] = ()
    if said.checkpoint is not None:
        path = root / said.checkpoint
        loaded = load_model(path, model=said.model)
        model, config = loaded.model, loaded.config
        own = path if loaded.source == "edgeclip" and (path / "tokenizer.json").is_file() else None
        parents = (
            _parent(config.name, "start", loaded.licence, said.checkpoint, loaded.source, loaded.parents),
        )
    else:
        config, own = _config(recipe.name, said), None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = build_clip(config)
    tokenizer = _tokenizer(said, root, own, config)
    check_tokenizer(config, tokenizer, who="student")
    return Student(model, config, tokenizer, parents)


def _config(name: str, said: StudentSpec) -> CLIPConfig:
    if said.config is not None:
        return config_from_dict(CLIPConfig, {"name": name, **said.config}, where="[student.config]")
    assert said.model is not None
    return clip_config(said.model)


def _tokenizer(said: StudentSpec, root: Path, own: Path | None, config: CLIPConfig) -> Tokenizer:
    if said.tokenizer is not None:
        return Tokenizer.open(root / said.tokenizer)
    if own is not None:
        return Tokenizer.open(own)
    known = MODELS.get(config.name)
    if said.config is None and known is not None and known.tokenizer != "clip-bpe":
        raise ConfigError(
            f"student: the model {config.name!r} reads ids of kind {known.tokenizer!r}; expected "
            "'tokenizer', the directory of one."
        )
    return Tokenizer.clip(config.text.context_length)


def open_teacher(spec: TeacherSpec, root: Path) -> Teacher:
    """Return a teacher of a recipe.

    Args:
        spec: which.
        root: what paths are relative to.

    Raises:
        ConfigError: it is of a kind that cannot be run, or its tokenizer does not fit it.
        InputError: its checkpoint cannot be read.
        MissingExtraError: the package it needs is not installed.
    """
    if isinstance(spec, StoredTeacher):
        raise ConfigError(
            f"teacher {spec.name!r}: kind = 'stored' reads embeddings from reinforced shards, which this "
            "version does not make or read yet; use kind = 'checkpoint' or 'open-clip'."
        )
    if isinstance(spec, OpenClipTeacher):
        return _open_clip(spec, root)
    return _checkpoint(spec, root)


def _checkpoint(spec: CheckpointTeacher, root: Path) -> Teacher:
    path = root / spec.path
    loaded = load_model(path, model=spec.model)
    config = loaded.config
    has_own = loaded.source == "edgeclip" and (path / "tokenizer.json").is_file()
    tokenizer = Tokenizer.open(path) if has_own else Tokenizer.clip(config.text.context_length)
    check_tokenizer(config, tokenizer, who=f"teacher {spec.name!r}")
    return Teacher(
        spec.name,
        loaded.model,
        form=form_of(config),
        mean=config.mean,
        std=config.std,
        tokenizer=tokenizer,
        embed_dim=config.embed_dim,
        parent=_parent(config.name, "teacher", loaded.licence, spec.path, loaded.source, loaded.parents),
    )


def _open_clip(spec: OpenClipTeacher, root: Path) -> Teacher:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError(
            f"the teacher {spec.name!r} (kind = 'open-clip')", extra="openclip", module="open_clip"
        ) from error
    file = root / spec.pretrained
    if not file.is_file():
        raise ConfigError(
            f"teacher {spec.name!r}: 'pretrained' is {spec.pretrained!r}, which is no file at "
            f"{str(file)!r}; training downloads nothing: fetch the weights first and name the file."
        )
    if spec.model not in open_clip.list_models():
        raise ConfigError(f"teacher {spec.name!r}: open_clip knows no model {spec.model!r}.")
    text = open_clip.get_model_config(spec.model)["text_cfg"]
    foreign = sorted(key for key in text if key.startswith("hf_") or key == "tokenizer_kwargs")
    if foreign:  # open_clip would fetch them from the hub
        raise ConfigError(
            f"teacher {spec.name!r}: the model {spec.model!r} has a text tower or tokenizer of another "
            f"library ({', '.join(foreign)}); expected one with CLIP's tokenizer."
        )
    try:
        model = open_clip.create_model(spec.model, pretrained=str(file), weights_only=True)
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"teacher {spec.name!r}: {spec.pretrained!r} cannot be loaded as {spec.model!r}: "
            f"{str(error)[:300]}"
        ) from error
    prepared = open_clip.get_model_preprocess_cfg(model)
    size = prepared.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    interpolation: Literal["bilinear", "bicubic"] = (
        "bilinear" if prepared.get("interpolation") == "bilinear" else "bicubic"
    )
    context_length = int(getattr(model, "context_length", 77))
    with torch.no_grad():
        rows = model.encode_text(torch.zeros(1, context_length, dtype=torch.int64))
    return Teacher(
        spec.name,
        model,
        form=ViewForm((height, width), interpolation),
        mean=prepared["mean"],
        std=prepared["std"],
        tokenizer=Tokenizer.clip(context_length),
        embed_dim=rows.shape[1],
        parent=_parent(spec.model, "teacher", "", spec.pretrained, "open_clip", ()),
    )


def _parent(
    name: str,
    role: Literal["teacher", "start"],
    licence: str,
    path: str,
    source: str,
    parents: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what a checkpoint records about a model; only the last part of its path, for privacy."""
    return {
        "role": role,
        "name": name,
        "licence": licence or _NOT_SAID,
        "file": Path(path).name,
        "source": source,
        "parents": [dict(parent) for parent in parents],
    }


def licence_of(wanted: str, parents: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the licence of what descends from ``parents``, and why it is another than wanted (or ``""``).

    The most restrictive decides: terms that allow research only, then terms nobody stated, then all together.

    Args:
        wanted: what the recipe says.
        parents: teachers and start checkpoint, as recorded.
    """
    said = [(str(parent["name"]), str(parent["licence"])) for parent in parents]
    research = [(name, licence) for name, licence in said if _RESEARCH_ONLY & _identifiers(licence)]
    if research:
        licences = " AND ".join(sorted({licence for _, licence in research}))
        return licences, (
            f"the student may be used for research only ({licences}), because it descends from "
            f"{', '.join(sorted({name for name, _ in research}))}"
        )
    unknown = sorted({name for name, licence in said if _NOT_SAID in _identifiers(licence)})
    if unknown:
        return _NOT_SAID, f"the student's licence is open, because nobody says that of {', '.join(unknown)}"
    licences = " AND ".join(sorted({wanted, *(licence for _, licence in said)}))
    return licences, "" if licences == wanted else f"the student's licence is {licences}, by its parents"


def _identifiers(licence: str) -> set[str]:
    return set(_IDENTIFIER.findall(licence))
