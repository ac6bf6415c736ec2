"""What a model is made of, as frozen values: one dataclass a tower, one for the whole.

They go into a checkpoint's ``config.json`` and come back from it unchanged; an unknown key, or a missing one
that has no default, is an error that names it. Nothing here builds or loads anything, and nothing imports
torch. Variants are tables of these values (``zoo.py``); ``kind`` tells the towers of a checkpoint apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from edgeclip.errors import ConfigError

__all__ = [
    "BagTextConfig",
    "CLIPConfig",
    "EfficientNetImageConfig",
    "FastViTConfig",
    "ImageConfig",
    "PosteriorImageConfig",
    "TextConfig",
    "TextTransformerConfig",
    "ViTConfig",
    "config_from_dict",
    "config_to_dict",
]

Activation = Literal["gelu", "quick-gelu"]
Mixer = Literal["repmixer", "attention"]
AttentionNorm = Literal["batch", "layer"]
Stem = Literal["patch", "conv"]
Attention = Literal["causal", "full", "padded"]
Pool = Literal["eot", "mean"]
Resize = Literal["shortest", "squash"]
Interpolation = Literal["bilinear", "bicubic"]
Crop = Literal["center", "none"]

_SMALLEST_STEM = 32


@dataclass(frozen=True, kw_only=True)
class FastViTConfig:
    """An MCi image tower (``models/fastvit.py``).

    Attributes:
        dims: channels of each stage.
        depths: blocks of each stage.
        mixers: token mixer of each stage.
        mlp_ratio: hidden width of the feed-forward part over the channels.
        position_stages: stages, counted from 0, that begin with a conditional position encoding.
        se_stages: stages, counted from 0, whose downsampling carries squeeze-and-excitation; the first has
            no downsampling.
        attention_norm: norm before attention.
        stem_scale_branch: whether the stem's 3×3 convolutions train with a 1×1 branch.
        head_dim: channels of an attention head.
        layer_scale_init: initial layer scale.
        final_expansion: channels of the last convolution over those of the last stage.
        embed_dim: width of the embedding.
        projection_bias: whether the projection has a bias. Apple's names have none; timm's heads do, zero
            in converted weights.
    """

    kind: ClassVar[str] = "fastvit"
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    mixers: tuple[Mixer, ...]
    mlp_ratio: float = 3.0
    position_stages: tuple[int, ...] = ()
    se_stages: tuple[int, ...] = ()
    attention_norm: AttentionNorm = "batch"
    stem_scale_branch: bool = True
    head_dim: int = 32
    layer_scale_init: float = 1e-5
    final_expansion: float = 2.0
    embed_dim: int = 512
    projection_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer (``models/vit.py``).

    Attributes:
        width: channels of a token.
        heads: attention heads of each layer; 0 leaves the layer's attention out (a pruned model).
        hidden_dims: width of each layer's feed-forward part; 0 leaves it out.
        head_dim: channels of an attention head.
        patch_px: side of a patch.
        grid: rows and columns of patches.
        activation: of the feed-forward part.
        stem: ``"patch"``: one strided convolution; ``"conv"``: the three of MobileCLIP-B.
        stem_padding_px: zeros around the picture before the ``"conv"`` stem; 1 in Apple's code, 0 in timm's.
        stem_dim: channels inside the ``"conv"`` stem; 0 for the published rule, a quarter of ``width`` and at
            least 32.
        class_position: whether the class token has a position embedding.
        pre_norm: whether a norm stands before the first layer.
        norm_eps: of every layer norm.
        embed_dim: width of the embedding.
        projection_bias: whether the projection has a bias (published weights have none).
    """

    kind: ClassVar[str] = "vit"
    width: int
    heads: tuple[int, ...]
    hidden_dims: tuple[int, ...]
    head_dim: int = 64
    patch_px: int = 16
    grid: tuple[int, int] = (14, 14)
    activation: Activation = "gelu"
    stem: Stem = "patch"
    stem_padding_px: int = 0
    stem_dim: int = 0
    class_position: bool = True
    pre_norm: bool = True
    norm_eps: float = 1e-5
    embed_dim: int = 512
    projection_bias: bool = False

    @property
    def stem_channels(self) -> int:
        """Channels inside the ``"conv"`` stem."""
        return self.stem_dim or max(_SMALLEST_STEM, self.width // 4)


@dataclass(frozen=True, kw_only=True)
class EfficientNetImageConfig:
    """EfficientNet-Lite's pooled features through a projection (``models/efficientnet_lite.py``).

    Attributes:
        backbone: ``"lite0"``, ``"lite1"`` or ``"lite2"``.
        embed_dim: width of the embedding.
    """

    kind: ClassVar[str] = "efficientnet-lite"
    backbone: str = "lite0"
    embed_dim: int = 512


@dataclass(frozen=True, kw_only=True)
class PosteriorImageConfig:
    """An image tower that projects a classifier's posterior (``models/clip.py``).

    Attributes:
        backbone: variant of EfficientNet-Lite, ``"lite0"``, ``"lite1"`` or ``"lite2"``.
        classes: classes of its classifier.
        part_dims: width of each part of the embedding that is made from the posterior.
        part_weights: share of each of them in the squared length of the embedding.
        feature_dims: width of each part that is made from the pooled features.
        feature_weights: share of each of them; with ``part_weights`` they sum to 1.
        gated_dim: width of a last part, also from the features, that takes the place of all others as far as
            a gate says so; 0 for none.
    """

    kind: ClassVar[str] = "posterior"
    backbone: str = "lite0"
    classes: int = 1000
    part_dims: tuple[int, ...] = (384, 128)
    part_weights: tuple[float, ...] = (0.6, 0.4)
    feature_dims: tuple[int, ...] = ()
    feature_weights: tuple[float, ...] = ()
    gated_dim: int = 0

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        return sum(self.part_dims) + sum(self.feature_dims) + self.gated_dim

    @property
    def feature_columns(self) -> int:
        """Columns of the table that features are multiplied with, the gate's included."""
        return sum(self.feature_dims) + (self.gated_dim + 1 if self.gated_dim else 0)


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """A transformer text tower, MCt's convolutional blocks included (``models/text_transformer.py``).

    Attributes:
        vocab_size: token ids, padding included.
        context_length: tokens per text, start and end included.
        width: channels of a token.
        heads: attention heads of each attention layer; 0 leaves the attention out (a pruned model).
        hidden_dims: width of each attention layer's feed-forward part; 0 leaves it out.
        head_dim: channels of an attention head.
        conv_ends: whether a RepMixer block stands before the first and after the last attention layer (MCt).
        conv_kernel: kernel of these blocks, in tokens.
        activation: of the feed-forward parts.
        attention: ``"causal"``; ``"full"``: every token sees every other, padding included, as the published
            unmasked towers were trained; ``"padded"``: padding is left out exactly.
        pool: ``"eot"``: the token with the largest id; ``"mean"``: mean of the tokens that are not padding.
        pad_id: id of padding.
        token_dim: width of the token table where it is factorised (a linear map leads to ``width``); 0 where
            the table has the tower's width.
        norm_eps: of every layer norm.
        embed_dim: width of the embedding.
        projection_bias: whether the projection has a bias (published weights have none).
    """

    kind: ClassVar[str] = "transformer"
    vocab_size: int
    context_length: int
    width: int
    heads: tuple[int, ...]
    hidden_dims: tuple[int, ...]
    head_dim: int = 64
    conv_ends: bool = False
    conv_kernel: int = 11
    activation: Activation = "gelu"
    attention: Attention = "causal"
    pool: Pool = "eot"
    pad_id: int = 0
    token_dim: int = 0
    norm_eps: float = 1e-5
    embed_dim: int = 512
    projection_bias: bool = False

    @property
    def free_length(self) -> bool:
        """Whether padding takes no part in the result, so that rows may be cut behind the end of a text."""
        return self.attention != "full"


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
        token_dim: width of the token table where it is factorised (a linear map leads to ``width``); 0 where
            the table has the tower's width.
    """

    kind: ClassVar[str] = "bag"
    vocab_size: int
    context_length: int
    pad_id: int
    width: int = 256
    heads: int = 8
    hidden_dim: int = 768
    embed_dim: int = 512
    token_dim: int = 0

    @property
    def free_length(self) -> bool:
        """As :attr:`TextTransformerConfig.free_length`: always."""
        return True


ImageConfig: TypeAlias = FastViTConfig | ViTConfig | EfficientNetImageConfig | PosteriorImageConfig
TextConfig: TypeAlias = TextTransformerConfig | BagTextConfig


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
    image: ImageConfig
    text: TextConfig
    image_size_px: tuple[int, int] = (224, 224)
    resize: Resize = "shortest"
    interpolation: Interpolation = "bilinear"
    crop: Crop = "center"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        return self.text.embed_dim


AnyConfig: TypeAlias = ImageConfig | TextConfig | CLIPConfig
_Config = TypeVar("_Config", bound=AnyConfig)

_TOWERS: dict[str, dict[str, type[Any]]] = {
    "ImageConfig": {kind.kind: kind for kind in get_args(ImageConfig)},
    "TextConfig": {kind.kind: kind for kind in get_args(TextConfig)},
}
_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(values)
    for name, values in {
        "Activation": Activation,
        "Mixer": Mixer,
        "AttentionNorm": AttentionNorm,
        "Stem": Stem,
        "Attention": Attention,
        "Pool": Pool,
        "Resize": Resize,
        "Interpolation": Interpolation,
        "Crop": Crop,
    }.items()
}
_SCALARS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


def config_to_dict(config: AnyConfig) -> dict[str, Any]:
    """Return the config as JSON values (tuples become lists); towers carry their ``kind``."""
    kind = {} if isinstance(config, CLIPConfig) else {"kind": config.kind}
    return kind | {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def config_from_dict(kind: type[_Config], said: Mapping[str, Any], *, where: str) -> _Config:
    """Return the config that ``config_to_dict`` wrote.

    Args:
        kind: the class to build.
        said: its fields; a tower's own ``kind`` may stand among them and must then be that of the class.
        where: what is read, as messages name it.

    Raises:
        ConfigError: a key is unknown, of the wrong type or value, or missing without a default; the message
            names it.
    """
    if not isinstance(said, Mapping):
        raise ConfigError(f"{where}: got {type(said).__name__}, expected an object.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    named = getattr(kind, "kind", None)
    if said.get("kind", named) != named:
        raise ConfigError(f"{where}: 'kind' is {said['kind']!r}, expected {named!r}.")
    unknown = sorted(set(said) - set(fields) - ({"kind"} if named else set()))
    missing = sorted(
        name for name, field in fields.items() if name not in said and field.default is dataclasses.MISSING
    )
    if unknown or missing:
        raise ConfigError(
            f"{where}: unknown keys {unknown}, missing keys {missing}; known are {sorted(fields)}. "
            "Was it written by another version of edgeclip?"
        )
    return kind(
        **{
            name: _value(str(field.type), said[name], where=f"{where}: {name!r}")
            for name, field in fields.items()
            if name in said
        }
    )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)  # type: ignore[arg-type]
    return list(value) if isinstance(value, tuple) else value


def _value(kind: str, said: Any, *, where: str) -> Any:
    """Return ``said`` as the annotated type ``kind``, or raise with the place."""
    if kind in _TOWERS:
        name = said.get("kind") if isinstance(said, Mapping) else None
        if name not in _TOWERS[kind]:
            raise ConfigError(f"{where}: 'kind' is {name!r}, expected one of {sorted(_TOWERS[kind])}.")
        tower: type[Any] = _TOWERS[kind][str(name)]
        return config_from_dict(tower, said, where=where)
    if kind.startswith("tuple["):
        items = [item.strip() for item in kind[len("tuple[") : -1].split(",")]
        if not isinstance(said, list) or (items[-1] != "..." and len(said) != len(items)):
            raise ConfigError(f"{where}: got {said!r}, expected a list for {kind}.")
        return tuple(_value(items[0], item, where=where) for item in said)
    if kind in _CHOICES:
        if not isinstance(said, str) or said not in _CHOICES[kind]:
            raise ConfigError(f"{where}: got {said!r}, expected one of {list(_CHOICES[kind])}.")
        return said
    if kind == "bool":
        if not isinstance(said, bool):
            raise ConfigError(f"{where}: got {said!r}, expected true or false.")
        return said
    if not isinstance(said, _SCALARS[kind]) or isinstance(said, bool):
        raise ConfigError(f"{where}: got {said!r}, expected {kind}.")
    return float(str(said)) if kind == "float" else said
