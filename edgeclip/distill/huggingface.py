"""Teachers from local directories of Hugging Face transformers: image-text models and sentence encoders.

Nothing is downloaded, no pickle is opened (``use_safetensors``) and no code of the directory runs
(``trust_remote_code`` is never on). Weights that the directory lacks are an error, where the library would
draw them at random. Texts go through the directory's own tokenizer, padded to one length; the attention mask
is the tokenizer's, and travels as the id −1 in its padding. Pictures take the size, interpolation, mean and
deviation of the directory's processor; crops are the student's.

CLIP files that :mod:`edgeclip.models.foreign` knows need none of this: name the ``model.safetensors`` of
their directory with ``kind = "checkpoint"``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeclip.distill.inputs import ViewForm
from edgeclip.distill.lineage import parent_of
from edgeclip.distill.online_teacher import OnlineTeacher
from edgeclip.distill.recipe import HuggingFaceTeacher, SentenceTeacher
from edgeclip.errors import ConfigError, InputError, MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "PADDING",
    "FixedLengthTokenizer",
    "fixed_length",
    "is_directory_of_transformers",
    "open_huggingface",
    "open_sentence_directory",
    "pooled",
]

PADDING = -1
"""Id of what a text tower must not attend to."""

_CLASSES = {
    "altclip": "AltCLIPModel",
    "chinese_clip": "ChineseCLIPModel",
    "clip": "CLIPModel",
    "siglip": "SiglipModel",
}
_USUAL_LENGTH = 77  # CLIP's
_LONGEST = 512  # of towers without a table of positions
# Their first position is the one behind the padding id, so they have so many fewer than their table.
_POSITIONS_AFTER_PADDING = frozenset({"altclip", "camembert", "mpnet", "roberta", "xlm-roberta"})
_INTERPOLATIONS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_POOLING_STEPS = frozenset({"Transformer", "Pooling", "Normalize"})
_MAX_JSON_BYTES = 1 << 20
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


# -- Tokenizers ---------------------------------------------------------------------------------------------


class FixedLengthTokenizer:
    """A tokenizer of transformers that gives rows of one length, its padding as the id −1.

    Args:
        tokenizer: theirs.
        context_length: of a row.
        digest: see :class:`edgeclip.distill.inputs.TextInput`.
    """

    def __init__(self, tokenizer: Any, context_length: int, digest: str) -> None:
        self._tokenizer = tokenizer
        self.context_length = context_length
        self.digest = digest

    def __call__(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.int32]:
        """Return ``(n, context_length)`` int32.

        Raises:
            InputError: a text is too long and is not to be cut.
        """
        said = self._tokenizer(
            list(texts), padding="max_length", truncation=truncate, max_length=self.context_length
        )
        longest = max((len(row) for row in said["input_ids"]), default=0)
        if longest > self.context_length:
            raise InputError(
                f"text: got {longest} tokens, expected at most {self.context_length}; pass truncate=True."
            )
        ids = np.asarray(said["input_ids"], np.int32).reshape(-1, self.context_length)
        if "attention_mask" in said:
            ids[np.asarray(said["attention_mask"]).reshape(ids.shape) == 0] = PADDING
        return ids


def fixed_length(asked: int | None, limit: int, *, masked: bool, who: str) -> int:
    """Return the length of a row of tokens: what is asked for, else CLIP's 77 where the tower allows it.

    Raises:
        ConfigError: the tower has no such length. One that attends to its padding has a single length:
            another one changes its answers.
    """
    if asked is None:
        return min(limit, _USUAL_LENGTH) if masked else limit
    if asked > limit or (not masked and asked != limit):
        raise ConfigError(
            f"{who}: 'context_length' is {asked}, expected {'at most' if masked else 'exactly'} {limit}, "
            "which its text tower reads; leave it out."
        )
    return asked


def _open_tokenizer(
    library: Any, path: Path, length: int | None, config: Any, who: str
) -> tuple[FixedLengthTokenizer, int]:
    """Return the tokenizer and the id of its padding."""
    with _translated(who, f"the tokenizer in {path.name!r} cannot be loaded"):
        tokenizer = library.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    masked = "attention_mask" in tokenizer.model_input_names
    text = getattr(config, "text_config", config)
    with _translated(who, f"{path.name!r} does not say how long texts may be"):
        limit = int(getattr(text, "max_position_embeddings", _LONGEST))
        if config.model_type in _POSITIONS_AFTER_PADDING:
            limit -= int(text.pad_token_id) + 1
        limit = min(limit, int(tokenizer.model_max_length))
        if limit < 1:
            raise ValueError(f"{limit} tokens")
    rows = fixed_length(length, limit, masked=masked, who=who)
    if len(tokenizer) > text.vocab_size:
        raise ConfigError(
            f"{who}: its tokenizer gives {len(tokenizer)} ids, its text tower reads {text.vocab_size}; they "
            "must belong together."
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"{who}: its tokenizer has no padding token, expected one in tokenizer_config.json."
        )
    digest = hashlib.sha256(f"{rows}\n".encode())
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            digest.update(f"{name}\n".encode() + hashlib.sha256((path / name).read_bytes()).digest())
    return FixedLengthTokenizer(tokenizer, rows, digest.hexdigest()), int(tokenizer.pad_token_id)


def _width(model: _Towers | _Sentences, tokenizer: FixedLengthTokenizer, path: Path, who: str) -> int:
    """Return the width of a text's embedding."""
    with _translated(who, f"{path.name!r} cannot embed a text"), torch.no_grad():
        return model.encode_text(torch.from_numpy(tokenizer(["a"], truncate=True))).shape[1]


def _split(tokens: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and the attention mask, both ``(m, L)`` int64."""
    mask = tokens != PADDING
    return torch.where(mask, tokens, pad_id).long(), mask.long()


# -- Image-text models --------------------------------------------------------------------------------------


class _Towers(nn.Module):
    """A model of transformers with the names that teachers have."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__()
        self.model = model
        self._pad_id = pad_id

    def encode_image(self, image: Tensor) -> Tensor:
        """Embed ``(b, 3, H, W)`` normalized pictures."""
        return _embedding(self.model.get_image_features(pixel_values=image))  # type: ignore[operator]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed ``(m, L)`` ids."""
        ids, mask = _split(tokens, self._pad_id)
        said = self.model.get_text_features(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
        return _embedding(said)


def _embedding(said: Any) -> Tensor:
    rows: Tensor = said if isinstance(said, Tensor) else said.pooler_output
    return rows


def open_huggingface(spec: HuggingFaceTeacher, root: Path) -> OnlineTeacher:
    """Return a CLIP, ChineseCLIP, AltCLIP or SigLIP of a local directory.

    Args:
        spec: which.
        root: what paths are relative to.

    Raises:
        ConfigError: the directory holds something else, or lacks a part.
        MissingExtraError: transformers is not installed.
    """
    who = f"teacher {spec.name!r}"
    path = _directory(root / spec.path, who)
    model_type = _object(path / "config.json", who).get("model_type")
    if not isinstance(model_type, str) or model_type not in _CLASSES:
        raise ConfigError(
            f"{who}: config.json in {path.name!r} has the model_type {model_type!r}, expected one of "
            f"{sorted(_CLASSES)}; sentence encoders are kind = 'sentence'."
        )
    form, mean, std = _preprocessing(path, who)
    library = _transformers(f"{who} (kind = 'huggingface')", who)
    model = _load(getattr(library, _CLASSES[model_type]), path, who)
    side = int(model.config.vision_config.image_size)
    if form.size_px != (side, side):
        raise ConfigError(
            f"{who}: its processor makes pictures of {form.size_px} px, its image tower sees "
            f"({side}, {side}); they must belong together."
        )
    tokenizer, pad_id = _open_tokenizer(library, path, spec.context_length, model.config, who)
    towers = _Towers(model, pad_id).eval()
    width = _width(towers, tokenizer, path, who)
    return OnlineTeacher(
        spec.name,
        towers,
        form=form,
        mean=mean,
        std=std,
        tokenizer=tokenizer,
        embed_dim=width,
        scale=spec.scale,
        parent=parent_of(path.name, "teacher", spec.licence, path.name, "transformers", ()),
    )


def _preprocessing(path: Path, who: str) -> tuple[ViewForm, tuple[float, ...], tuple[float, ...]]:
    """Return form, mean and deviation of the pictures, as the directory's processor makes them."""
    file = path / "preprocessor_config.json"
    said: Mapping[str, Any] = {}
    if file.is_file():
        said = _object(file, who)
    elif (path / "processor_config.json").is_file():
        file = path / "processor_config.json"
        said = _object(file, who).get("image_processor", {})
    where = f"{who}: {file.name} in {path.name!r}"
    if not isinstance(said, Mapping) or "size" not in said:
        raise ConfigError(
            f"{where} has no 'size' of pictures, expected preprocessor_config.json of an image processor."
        )
    resample = said.get("resample", 3)
    if not isinstance(resample, int) or resample not in _INTERPOLATIONS:
        raise ConfigError(f"{where}: 'resample' is {resample!r}, expected 2 (bilinear) or 3 (bicubic).")
    factor = said.get("rescale_factor", 1 / 255)
    scaled = isinstance(factor, float | int) and abs(factor * 255 - 1) <= 1e-6
    if not scaled or not said.get("do_rescale", True):
        raise ConfigError(f"{where}: 'rescale_factor' is not 1/255, expected pixels scaled to 0 … 1.")
    size = said.get("crop_size", said["size"]) if said.get("do_center_crop") else said["size"]
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    try:
        if isinstance(size, Mapping):
            sides = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
        else:
            sides = (size, size)
        size_px = (int(sides[0]), int(sides[1]))
        if said.get("do_normalize", True):
            mean, std = tuple(map(float, said["image_mean"])), tuple(map(float, said["image_std"]))  # type: ignore[assignment]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{where} cannot be used ({type(error).__name__}: {error}), expected 'size', 'image_mean' and "
            "'image_std' of an image processor."
        ) from error
    finite = all(map(math.isfinite, (*mean, *std)))
    if not finite or len(mean) != 3 or len(std) != 3 or min(std) <= 0 or min(size_px) < 1:
        raise ConfigError(
            f"{where}: size {size_px}, mean {mean} and deviation {std}, expected two sides and three numbers "
            "each."
        )
    return ViewForm(size_px, _INTERPOLATIONS[resample]), mean, std


# -- Sentence encoders --------------------------------------------------------------------------------------


class _Sentences(nn.Module):
    """An encoder of transformers with pooled tokens."""

    def __init__(self, model: nn.Module, pad_id: int, pooling: Literal["mean", "first"]) -> None:
        super().__init__()
        self.model = model
        self._pad_id, self._pooling = pad_id, pooling

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed ``(m, L)`` ids."""
        ids, mask = _split(tokens, self._pad_id)
        said = self.model(input_ids=ids, attention_mask=mask)
        return pooled(said.last_hidden_state, mask, self._pooling)


def pooled(states: Tensor, mask: Tensor, pooling: Literal["mean", "first"]) -> Tensor:
    """Return ``(m, D)`` of the states ``(m, L, D)`` of tokens: the first one's, or the mean where unmasked.

    Args:
        states: the last hidden layer.
        mask: ``(m, L)``, 0 at padding.
        pooling: ``"mean"`` (Reimers & Gurevych 2019, "Sentence-BERT") or ``"first"``.
    """
    if pooling == "first":
        return states[:, 0]
    weights = mask[:, :, None].to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def open_sentence_directory(spec: SentenceTeacher, root: Path) -> OnlineTeacher:
    """Return a sentence encoder of a local directory, pooled as the recipe says.

    Args:
        spec: which.
        root: what paths are relative to.

    Raises:
        ConfigError: the directory holds something else, lacks a part, or pools in another way.
        MissingExtraError: transformers is not installed.
    """
    who = f"teacher {spec.name!r}"
    path = _directory(root / spec.path, who)
    if spec.tokenizer is not None:
        raise ConfigError(
            f"{who}: 'tokenizer' is {spec.tokenizer!r} beside the directory {path.name!r}, which has its "
            "own; leave it out."
        )
    _check_pooling(path, spec.pooling, who)
    library = _transformers(f"{who} (kind = 'sentence')", who)
    model = _load(library.AutoModel, path, who, trust_remote_code=False)
    tokenizer, pad_id = _open_tokenizer(library, path, spec.context_length, model.config, who)
    encoder = _Sentences(model, pad_id, spec.pooling).eval()
    width = _width(encoder, tokenizer, path, who)
    return OnlineTeacher(
        spec.name,
        encoder,
        form=None,
        tokenizer=tokenizer,
        embed_dim=width,
        scale=spec.scale,
        parent=parent_of(path.name, "teacher", spec.licence, path.name, "transformers", ()),
    )


def _check_pooling(path: Path, pooling: str, who: str) -> None:
    """Raise where sentence-transformers' files beside the model say that it ends otherwise."""
    if (path / "modules.json").is_file():
        listed = _json(path / "modules.json", who)
        if not isinstance(listed, list):
            raise ConfigError(f"{who}: modules.json in {path.name!r} holds an object, expected an array.")
        steps = [str(step.get("type", "")).rpartition(".")[2] for step in listed if isinstance(step, Mapping)]
        further = sorted(set(steps) - _POOLING_STEPS)
        if further:
            raise ConfigError(
                f"{who}: modules.json in {path.name!r} adds {further} to the encoder, which are not applied "
                f"here; expected only {sorted(_POOLING_STEPS)}."
            )
    if (path / "1_Pooling" / "config.json").is_file():
        said = _object(path / "1_Pooling" / "config.json", who)
        prefix = "pooling_mode_"
        modes = [
            key.removeprefix(prefix)
            for key, value in said.items()
            if key.startswith(prefix) and value is True
        ]
        expected = {"mean": ["mean_tokens"], "first": ["cls_token"]}[pooling]
        if modes and modes != expected:
            raise ConfigError(
                f"{who}: 'pooling' is {pooling!r}, but 1_Pooling/config.json in {path.name!r} says {modes}; "
                "expected the same: 'mean' is mean_tokens, 'first' is cls_token."
            )


# -- The library --------------------------------------------------------------------------------------------


@contextmanager
def _translated(who: str, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into our one sentence: it passes on errors of a dozen libraries."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise ConfigError(f"{who}: {what}: {type(error).__name__}: {first}") from error


def _transformers(what: str, who: str) -> Any:
    # Captions are tokenized a few at a time, in workers that were forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError(f"the {what}", extra="hf", module="transformers")
    with _translated(who, "the package transformers is installed but does not import"):
        return importlib.import_module("transformers")


def _load(kind: Any, path: Path, who: str, **options: Any) -> Any:
    """Return the model in float32, every weight of it from the directory."""
    bars = importlib.import_module("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with _translated(who, f"{path.name!r} cannot be loaded"), torch.random.fork_rng(devices=[]):
            model, info = kind.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    finally:
        if shown:
            bars.enable_progress_bar()
    missing = sorted(info["missing_keys"]) + [key[0] for key in info["mismatched_keys"]]
    if missing:
        raise ConfigError(
            f"{who}: {path.name!r} lacks {len(missing)} weights of its model, the first is {missing[0]!r}; "
            "expected all of them in model.safetensors."
        )
    return model.eval()


def _directory(path: Path, who: str) -> Path:
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{who}: 'path' is {str(path)!r}, expected a directory of transformers with config.json, "
            "model.safetensors and a tokenizer; training downloads nothing."
        )
    return path


def is_directory_of_transformers(path: Path, *, who: str) -> bool:
    """Return whether the ``config.json`` of a directory is theirs and not ours."""
    return (path / "config.json").is_file() and "model_type" in _object(path / "config.json", who)


def _object(path: Path, who: str) -> dict[str, Any]:
    said = _json(path, who)
    if not isinstance(said, dict):
        raise ConfigError(f"{who}: {path.name} holds {type(said).__name__}, expected an object.")
    return said


def _json(path: Path, who: str) -> Any:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES} bytes")
        said = json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{who}: {path.name} cannot be read: {error}.") from error
    return said
