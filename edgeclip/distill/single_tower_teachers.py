"""Teachers with one tower: features of an image classifier, embeddings of a sentence encoder.

They know no similarity of pictures and texts; losses reach them through an adapter from the student's
embedding to their width (``kind = "feature"``).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeclip.distill.huggingface import (
    PADDING,
    FixedLengthTokenizer,
    fixed_length,
    open_sentence_directory,
    pooled,
)
from edgeclip.distill.inputs import ViewForm
from edgeclip.distill.lineage import parent_of
from edgeclip.distill.online_teacher import OnlineTeacher
from edgeclip.distill.recipe import ImageFeaturesTeacher, SentenceTeacher
from edgeclip.errors import ConfigError, MissingExtraError
from edgeclip.models.checkpoints import load_model
from edgeclip.models.efficientnet_lite import (
    LITE0,
    LITE1,
    LITE2,
    LITE_MEAN,
    LITE_STD,
    EfficientNetLite,
    rename_lite_pytorch_keys,
)
from edgeclip.models.foreign import load_image_tower
from edgeclip.models.state_files import read_state
from edgeclip.runtime.session import OpenSession, RuntimeOptions, open_session

__all__ = ["open_image_features", "open_sentence"]

_LITE_PYTORCH_KEY = "_conv_stem.weight"
_ONNX_INPUTS = frozenset({"attention_mask", "input_ids", "token_type_ids"})
_LONGEST = 512  # of an ONNX encoder that does not say what it reads


# -- Pictures -----------------------------------------------------------------------------------------------


class _Features(nn.Module):
    """An image tower with the name that teachers have."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def encode_image(self, image: Tensor) -> Tensor:
        """Return pooled features ``(b, D)``, of a classifier what it classifies."""
        if isinstance(self.tower, EfficientNetLite):
            return self.tower.features(image)
        rows: Tensor = self.tower(image)
        return rows


def open_image_features(spec: ImageFeaturesTeacher, root: Path) -> OnlineTeacher:
    """Return an image tower as a teacher: ours, a published one, or one of timm.

    Args:
        spec: which.
        root: what paths are relative to.

    Raises:
        ConfigError: timm does not know the model, or its weights do not fit.
        InputError: the weights cannot be read, or fit several models.
        MissingExtraError: timm is not installed.
    """
    if spec.library == "timm":
        return _of_timm(spec, root)
    path = root / spec.path
    if (path / "config.json").is_file():
        loaded = load_model(path, model=spec.model)
        config = loaded.config
        parent = parent_of(config.name, "teacher", loaded.licence, spec.path, loaded.source, loaded.parents)
        tower: nn.Module = loaded.model.image_tower
        return _image_teacher(
            spec, tower, ViewForm(config.image_size_px, config.interpolation), config.mean, config.std, parent
        )
    if spec.model is None and _LITE_PYTORCH_KEY in (state := read_state(path)):
        lite = _lite(state, spec)
        parent = parent_of(
            f"EfficientNet-{lite.config.name}", "teacher", spec.licence, spec.path, "lite-pytorch", ()
        )
        form = ViewForm((lite.config.image_size_px,) * 2, "bicubic")
        return _image_teacher(spec, lite, form, LITE_MEAN, LITE_STD, parent)
    found = load_image_tower(path, model=spec.model)
    licence = found.licence or spec.licence
    parent = parent_of(found.name, "teacher", licence, spec.path, found.source, found.parents)
    form = ViewForm(found.config.image_size_px, found.config.interpolation)
    return _image_teacher(spec, found.tower, form, found.config.mean, found.config.std, parent)


def _image_teacher(
    spec: ImageFeaturesTeacher,
    tower: nn.Module,
    form: ViewForm,
    mean: Sequence[float],
    std: Sequence[float],
    parent: Mapping[str, Any],
) -> OnlineTeacher:
    features = _Features(tower).eval()
    with torch.no_grad():
        rows = features.encode_image(torch.zeros(1, 3, *form.size_px))
    if rows.ndim != 2:
        raise ConfigError(
            f"teacher {spec.name!r}: its tower gives {tuple(rows.shape)} for one picture, expected (1, D) "
            "pooled features."
        )
    return OnlineTeacher(
        spec.name,
        features,
        form=form,
        mean=mean,
        std=std,
        tokenizer=None,
        embed_dim=rows.shape[1],
        scale=spec.scale,
        parent=parent,
    )


def _lite(state: Mapping[str, Tensor], spec: ImageFeaturesTeacher) -> EfficientNetLite:
    """Return the EfficientNet-Lite whose weights these are, by the names of ``lite-pytorch``."""
    renamed = rename_lite_pytorch_keys(state)
    shapes = {key: tuple(value.shape) for key, value in renamed.items()}
    for config in (LITE0, LITE1, LITE2):
        with torch.device("meta"):
            lite = EfficientNetLite(config)
        if {key: tuple(value.shape) for key, value in lite.state_dict().items()} == shapes:
            lite.load_state_dict({key: value.clone() for key, value in renamed.items()}, assign=True)
            return lite
    raise ConfigError(
        f"teacher {spec.name!r}: {spec.path!r} has the names of an EfficientNet-Lite, but the shapes of none "
        "from 0 to 2; expected one of these."
    )


def _of_timm(spec: ImageFeaturesTeacher, root: Path) -> OnlineTeacher:
    who = f"teacher {spec.name!r}"
    if importlib.util.find_spec("timm") is None:
        raise MissingExtraError(f"the {who} (library = 'timm')", extra="openclip", module="timm")
    timm = importlib.import_module("timm")
    assert spec.model is not None
    if not timm.is_model(spec.model):
        raise ConfigError(f"{who}: timm knows no model {spec.model!r}; expected one that it lists.")
    state = read_state(root / spec.path)
    classes = _classes(state, timm.get_pretrained_cfg(spec.model))
    try:
        # Its weights would be fetched from the hub, were they not handed over. They are compared strictly
        # where the file has as many classes as the model, so the classifier goes afterwards.
        handed = {"state_dict": dict(state), "num_classes": classes, "label_offset": 0}
        model = timm.create_model(
            spec.model, pretrained=True, pretrained_cfg_overlay=handed, num_classes=classes
        ).eval()
        model.reset_classifier(0)
        prepared = importlib.import_module("timm.data").resolve_model_data_config(model)
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"{who}: {spec.path!r} cannot be loaded as {spec.model!r} of timm: {str(error)[:300]}"
        ) from error
    _, height, width = prepared["input_size"]
    interpolation: Literal["bilinear", "bicubic"] = (
        "bilinear" if prepared["interpolation"] == "bilinear" else "bicubic"
    )
    parent = parent_of(spec.model, "teacher", spec.licence, spec.path, "timm", ())
    form = ViewForm((height, width), interpolation)
    return _image_teacher(spec, model, form, prepared["mean"], prepared["std"], parent)


def _classes(state: Mapping[str, Tensor], config: Any) -> int:
    """Return how many classes weights of timm classify, 0 without a classifier."""
    names = getattr(config, "classifier", None) or ()
    for name in (names,) if isinstance(names, str) else names:
        if f"{name}.weight" in state:
            return len(state[f"{name}.weight"])
    return 0


# -- Texts --------------------------------------------------------------------------------------------------


def open_sentence(spec: SentenceTeacher, root: Path) -> OnlineTeacher:
    """Return a sentence encoder as a teacher: a directory of transformers, or an ONNX file.

    Args:
        spec: which.
        root: what paths are relative to.

    Raises:
        ConfigError: it is neither, or its tokenizer does not fit it.
        BackendError: ONNX Runtime cannot load the file.
        MissingExtraError: the package it needs is not installed.
    """
    path = root / spec.path
    if path.suffix != ".onnx":
        return open_sentence_directory(spec, root)
    who = f"teacher {spec.name!r}"
    if not path.is_file():
        raise ConfigError(f"{who}: 'path' is {str(path)!r}, which is no file; training downloads nothing.")
    if spec.tokenizer is None:
        raise ConfigError(f"{who}: the ONNX file {spec.path!r} needs 'tokenizer', its tokenizer.json.")
    session = open_session(path, options=RuntimeOptions(threads=torch.get_num_threads()))
    length = _onnx_length(session, who)
    tokenizer = _open_json_tokenizer(root / spec.tokenizer, spec.context_length, length, who)
    encoder = _OnnxSentences(session, spec.pooling)
    rows = encoder.encode_text(torch.from_numpy(tokenizer(["a", "b c"], truncate=True)))
    if rows.ndim != 2 or len(rows) != 2:
        raise ConfigError(
            f"{who}: {spec.path!r} gives {tuple(rows.shape)} for two texts, expected (2, L, D) tokens or "
            "(2, D) sentences."
        )
    return OnlineTeacher(
        spec.name,
        encoder,
        form=None,
        tokenizer=tokenizer,
        embed_dim=rows.shape[1],
        scale=spec.scale,
        parent=parent_of(path.stem, "teacher", spec.licence, spec.path, "onnx", ()),
    )


class _OnnxSentences(nn.Module):
    """An ONNX encoder with pooled tokens; it runs on the CPU."""

    def __init__(self, session: OpenSession, pooling: Literal["mean", "first"]) -> None:
        super().__init__()
        self._session, self._pooling = session, pooling

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed ``(m, L)`` ids."""
        mask = (tokens != PADDING).long().cpu()
        given = {
            "input_ids": tokens.cpu().clamp(min=0).numpy(),
            "attention_mask": mask.numpy(),
            "token_type_ids": np.zeros(tuple(tokens.shape), np.int64),
        }
        said = self._session.run(
            {
                name: np.ascontiguousarray(given[name], dtype=np.dtype(spec.dtype))
                for name, spec in self._session.inputs.items()
            }
        )
        rows = torch.from_numpy(next(iter(said.values()))).float().to(tokens.device)
        if rows.ndim != 3:
            return rows
        return pooled(rows, mask.to(rows.device), self._pooling)


def _onnx_length(session: OpenSession, who: str) -> int | None:
    """Return the number of tokens an encoder takes where it is fixed."""
    names = set(session.inputs)
    if not {"input_ids", "attention_mask"} <= names <= _ONNX_INPUTS:
        raise ConfigError(
            f"{who}: the ONNX file takes {sorted(names)}, expected 'input_ids' and 'attention_mask' and at "
            "most 'token_type_ids' beside them."
        )
    size = session.inputs["input_ids"].shape[-1]
    return size if isinstance(size, int) else None


def _open_json_tokenizer(path: Path, asked: int | None, fixed: int | None, who: str) -> FixedLengthTokenizer:
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingExtraError(f"the {who} (kind = 'sentence')", extra="train", module="tokenizers")
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_str(content)
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(
            f"{who}: 'tokenizer' is {str(path)!r}, which cannot be read as a tokenizer.json: "
            f"{str(error)[:200]}."
        ) from error
    said = tokenizer.truncation
    limit = fixed or (int(said["max_length"]) if said else _LONGEST)
    if fixed is not None and asked not in (None, fixed):
        raise ConfigError(f"{who}: 'context_length' is {asked}, expected {fixed}, which its ONNX file takes.")
    length = fixed or fixed_length(asked, limit, masked=True, who=who)
    digest = hashlib.sha256(f"{length}\n{content}".encode()).hexdigest()
    return FixedLengthTokenizer(_Rows(tokenizer), length, digest)


class _Rows:
    """A tokenizer of the ``tokenizers`` package, called as one of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(
        self, texts: Sequence[str], *, padding: str, truncation: bool, max_length: int
    ) -> dict[str, list[list[int]]]:
        if truncation:
            self._tokenizer.enable_truncation(max_length)
        else:
            self._tokenizer.no_truncation()
        self._tokenizer.enable_padding(length=max_length)
        rows = [self._tokenizer.encode(text) for text in texts]
        return {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
        }
