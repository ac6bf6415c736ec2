"""What a model is made of, as frozen values: one dataclass a tower, one for the whole.

They go into a checkpoint's ``config.json`` and come back from it unchanged; a missing or unknown key is an
error that names it. Nothing here builds or loads anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from edgeclip.errors import ConfigError

__all__ = ["BagTextConfig", "CLIPConfig", "PosteriorImageConfig", "config_from_dict", "config_to_dict"]


@dataclass(frozen=True, kw_only=True)
class PosteriorImageConfig:
    """An image tower that projects a classifier's posterior (``models/clip.py``).

    Attributes:
        backbone: variant of EfficientNet-Lite, ``"lite0"``, ``"lite1"`` or ``"lite2"``.
        classes: classes of its classifier.
        part_dims: width of each part of the embedding.
        part_weights: share of each part in the squared length of the embedding; they sum to 1.
    """

    backbone: str = "lite0"
    classes: int = 1000
    part_dims: tuple[int, ...] = (384, 128)
    part_weights: tuple[float, ...] = (0.6, 0.4)


@dataclass(frozen=True, kw_only=True)
class BagTextConfig:
    """A bag-of-pieces text tower (``models/text.py``).

    Attributes:
        vocab_size: token ids, padding included.
        context_length: tokens per text in exported graphs.
        pad_id: id of padding, which the tower leaves out.
        width: channels of a piece.
        heads: groups of channels with attention of their own.
        hidden_dim: width of the projection's hidden layer.
        embed_dim: width of the embedding.
    """

    vocab_size: int
    context_length: int
    pad_id: int
    width: int = 256
    heads: int = 8
    hidden_dim: int = 768
    embed_dim: int = 512


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both towers, and how pictures are prepared.

    Attributes:
        name: name of the model.
        image: image tower.
        text: text tower.
        image_size_px: ``(H, W)`` of the input.
        resize: ``"shortest"`` or ``"squash"``.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        crop: ``"center"`` or ``"none"``.
        mean: per RGB channel, on pixels in [0, 1].
        std: per RGB channel, on pixels in [0, 1].
    """

    name: str
    image: PosteriorImageConfig
    text: BagTextConfig
    image_size_px: tuple[int, int] = (224, 224)
    resize: str = "shortest"
    interpolation: str = "bilinear"
    crop: str = "center"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        return self.text.embed_dim


_Config = TypeVar("_Config", PosteriorImageConfig, BagTextConfig, CLIPConfig)


def config_to_dict(config: PosteriorImageConfig | BagTextConfig | CLIPConfig) -> dict[str, Any]:
    """Return the config as JSON values (tuples become lists)."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def config_from_dict(kind: type[_Config], said: Mapping[str, Any], *, where: str) -> _Config:
    """Return the config that ``config_to_dict`` wrote.

    Args:
        kind: the class to build.
        said: its fields.
        where: what is read, as messages name it.

    Raises:
        ConfigError: a key is missing, unknown or of the wrong type; the message names it.
    """
    if not isinstance(said, Mapping):
        raise ConfigError(f"{where}: got {type(said).__name__}, expected an object.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(said) - set(fields))
    missing = sorted(set(fields) - set(said))
    if unknown or missing:
        raise ConfigError(
            f"{where}: unknown keys {unknown}, missing keys {missing}; expected exactly {sorted(fields)}. "
            "Was it written by another version of edgeclip?"
        )
    values: dict[str, Any] = {}
    for name, field in fields.items():
        values[name] = _value(str(field.type), said[name], where=f"{where}: {name!r}")
    return kind(**values)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


_NESTED: dict[str, type[PosteriorImageConfig] | type[BagTextConfig]] = {
    "PosteriorImageConfig": PosteriorImageConfig,
    "BagTextConfig": BagTextConfig,
}
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


def _value(kind: str, said: Any, *, where: str) -> Any:
    """Return ``said`` as the annotated type ``kind``, or raise with the place."""
    if kind in _NESTED:
        nested: type[Any] = _NESTED[kind]
        return config_from_dict(nested, said, where=where)
    if kind.startswith("tuple["):
        items = [item.strip() for item in kind[len("tuple[") : -1].split(",")]
        if not isinstance(said, list) or (items[-1] != "..." and len(said) != len(items)):
            raise ConfigError(f"{where}: got {said!r}, expected a list for {kind}.")
        return tuple(_value(items[0], item, where=where) for item in said)
    if not isinstance(said, _SCALARS[kind]) or isinstance(said, bool):
        raise ConfigError(f"{where}: got {said!r}, expected {kind}.")
    return float(str(said)) if kind == "float" else said
