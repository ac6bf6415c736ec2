"""The models that say where the student's embeddings should be.

A teacher is frozen and stays in eval mode whatever is done to what holds it: its batch norms must not learn
from the student's batches. It brings its own normalization and tokenizer; which crop and which caption it
sees is the student's (:mod:`edgeclip.distill.inputs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from edgeclip.distill.batches import Batch
from edgeclip.distill.bundle_teacher import open_bundle_teacher
from edgeclip.distill.embedding_files import open_embedding_files
from edgeclip.distill.huggingface import is_directory_of_transformers, open_huggingface
from edgeclip.distill.inputs import Consumer, Inputs, StoredViews, ViewForm, check_tokenizer, form_of
from edgeclip.distill.lineage import parent_of
from edgeclip.distill.objective import Embedded
from edgeclip.distill.offline import open_stored_teacher
from edgeclip.distill.online_teacher import OnlineTeacher
from edgeclip.distill.recipe import (
    BundleTeacher,
    CheckpointTeacher,
    DataSpec,
    EmbeddingsTeacher,
    HuggingFaceTeacher,
    ImageFeaturesTeacher,
    OpenClipTeacher,
    SentenceTeacher,
    StageSpec,
    StoredTeacher,
    TeacherSpec,
)
from edgeclip.distill.samples import Samples
from edgeclip.distill.single_tower_teachers import open_image_features, open_sentence
from edgeclip.errors import ConfigError, MissingExtraError
from edgeclip.models.checkpoints import load_model
from edgeclip.tokenizer import Tokenizer

__all__ = ["OnlineTeacher", "Teacher", "open_teacher"]


class Teacher(Protocol):
    """What is asked about every batch.

    Attributes:
        name: as losses call it.
        image_dim: width of its image embeddings; ``None``: it has no image tower.
        text_dim: width of its text embeddings; ``None``: it has no text tower.
        scale: its own multiplier of cosines.
        parent: what the student's checkpoint records about it.
    """

    name: str
    image_dim: int | None
    text_dim: int | None
    scale: float
    parent: dict[str, Any]

    @property
    def consumer(self) -> Consumer | None:
        """What has to be prepared for it; ``None``: it reads what is stored."""
        ...

    @property
    def views(self) -> StoredViews | None:
        """What the samples hold of the views it saw; ``None``: it goes with views that are drawn."""
        ...

    def check(self, stage: StageSpec, table: DataSpec, samples: Samples) -> None:
        """Raise unless it can be asked about a stage's samples.

        Args:
            stage: which.
            table: the data it names.
            samples: of that table.

        Raises:
            ConfigError: what it has stored is of other samples or captions.
        """
        ...

    def ask(self, batch: Batch, inputs: Inputs, *, parts: int = 1) -> Embedded:
        """Return its embeddings of a batch, without gradients.

        Args:
            batch: this rank's.
            inputs: what prepared it.
            parts: micro-batches to take it in.
        """
        ...

    def to(self, device: torch.device) -> Any:
        """Move it to where it computes."""
        ...


def open_teacher(spec: TeacherSpec, root: Path, data: Mapping[str, Samples] | None = None) -> Teacher:
    """Return a teacher of a recipe.

    Args:
        spec: which.
        root: what paths are relative to.
        data: the tables of data it is asked about, by name; not given: it has to run on any picture.

    Raises:
        ConfigError: it is of a kind that cannot be run, its tokenizer does not fit it, or the shards do not
            hold what it said.
        InputError: its checkpoint cannot be read.
        MissingExtraError: the package it needs is not installed.
    """
    match spec:
        case CheckpointTeacher():
            return _checkpoint(spec, root)
        case OpenClipTeacher():
            return _open_clip(spec, root)
        case BundleTeacher():
            return open_bundle_teacher(spec, root)
        case HuggingFaceTeacher():
            return open_huggingface(spec, root)
        case ImageFeaturesTeacher():
            return open_image_features(spec, root)
        case SentenceTeacher():
            return open_sentence(spec, root)
        case EmbeddingsTeacher():
            return open_embedding_files(spec, root)
        case StoredTeacher() if data:
            return open_stored_teacher(spec, data)
        case StoredTeacher():
            raise ConfigError(
                f"teacher {spec.name!r}: kind = 'stored' reads embeddings from reinforced shards and cannot "
                "be run on other pictures; use another kind here."
            )


def _checkpoint(spec: CheckpointTeacher, root: Path) -> OnlineTeacher:
    path = root / spec.path
    if is_directory_of_transformers(path, who=f"teacher {spec.name!r}"):
        raise ConfigError(
            f"teacher {spec.name!r}: 'path' is {spec.path!r}, a directory of transformers; say kind = "
            "'huggingface', or name the model.safetensors in it, if it is of a model of the zoo."
        )
    loaded = load_model(path, model=spec.model)
    config = loaded.config
    has_own = loaded.source == "edgeclip" and (path / "tokenizer.json").is_file()
    tokenizer = Tokenizer.open(path) if has_own else Tokenizer.clip(config.text.context_length)
    check_tokenizer(config, tokenizer, who=f"teacher {spec.name!r}")
    return OnlineTeacher(
        spec.name,
        loaded.model,
        form=form_of(config),
        mean=config.mean,
        std=config.std,
        tokenizer=tokenizer,
        embed_dim=config.embed_dim,
        scale=spec.scale,
        parent=parent_of(config.name, "teacher", loaded.licence, spec.path, loaded.source, loaded.parents),
    )


def _open_clip(spec: OpenClipTeacher, root: Path) -> OnlineTeacher:
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
    prepared = {**open_clip.get_model_preprocess_cfg(model), **_published_preprocessing(open_clip, spec)}
    size = prepared.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    interpolation: Literal["bilinear", "bicubic"] = (
        "bilinear" if prepared.get("interpolation") == "bilinear" else "bicubic"
    )
    context_length = int(getattr(model, "context_length", 77))
    with torch.no_grad():
        rows = model.encode_text(torch.zeros(1, context_length, dtype=torch.int64))
    return OnlineTeacher(
        spec.name,
        model,
        form=ViewForm((height, width), interpolation),
        mean=prepared["mean"],
        std=prepared["std"],
        tokenizer=Tokenizer.clip(context_length),
        embed_dim=rows.shape[1],
        scale=spec.scale,
        parent=parent_of(spec.model, "teacher", spec.licence, spec.pretrained, "open_clip", ()),
    )


def _published_preprocessing(library: Any, spec: OpenClipTeacher) -> dict[str, Any]:
    """Return mean, deviation and interpolation of published weights, which open_clip has not for files."""
    listed = library.list_pretrained_tags_by_model(spec.model)
    if spec.tag is not None and spec.tag not in listed:
        raise ConfigError(
            f"teacher {spec.name!r}: 'tag' is {spec.tag!r}, expected one that open_clip lists for "
            f"{spec.model!r}: {sorted(listed) or 'it lists none'}."
        )
    found: list[dict[str, Any]] = []
    for tag in listed if spec.tag is None else [spec.tag]:
        said = library.get_pretrained_cfg(spec.model, tag)
        keys = ("mean", "std", "interpolation")
        found.append({key: said[key] for key in keys if said.get(key) is not None})
    if any(each != found[0] for each in found):
        raise ConfigError(
            f"teacher {spec.name!r}: the weights of {spec.model!r} differ in how pictures are prepared; say "
            f"with 'tag' in its [[teacher]] which {spec.pretrained!r} is, one of {sorted(listed)}."
        )
    return found[0] if found else {}
