"""A captioner that runs here: open_clip's CoCa (Yu et al. 2022) writes synthetic captions for pictures.

DataCompDR's captions were made like this (Vasu et al. 2024, "MobileCLIP": CoCa, top-p 0.9). What it writes
depends on the pictures of a group, the seed and the device, and on nothing else: the generator is seeded for
every group. Words are drawn here: open_clip's own ``generate`` does not run beside every version of the
package it takes that from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgeclip.distill.augment import CropBox
from edgeclip.distill.batches import to_float
from edgeclip.distill.inputs import ViewForm
from edgeclip.errors import ConfigError, InputError, MissingExtraError
from edgeclip.tokenizer import Tokenizer

__all__ = ["CAPTIONER_PREFIX", "Captioner", "central_square", "open_captioner", "weights_digest"]

CAPTIONER_PREFIX = "open-clip:"
_TOP_P, _TOP_K = 0.9, 1000
_MIN_TOKENS, _MAX_TOKENS = 5, 30
_START, _END = 49406, 49407  # of CLIP's vocabulary, which these models have


def central_square(height: int, width: int) -> CropBox:
    """Return the largest square in the middle of a picture."""
    side = min(height, width)
    return CropBox((height - side) // 2, (width - side) // 2, side, side)


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of a model's parameters and buffers: names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return digest.hexdigest()


class Captioner:
    """Writes captions for pictures.

    Args:
        name: of the model.
        model: has open_clip's ``generate``.
        form: how pictures are made for it.
        mean: per RGB channel, on pixels in [0, 1].
        std: likewise.
    """

    def __init__(
        self, name: str, model: nn.Module, *, form: ViewForm, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.name, self.form = name, form
        self._model = model.requires_grad_(False).eval()
        self._mean, self._std = tuple(mean), tuple(std)
        self._tokenizer = Tokenizer.clip()
        self.digest = weights_digest(model)

    def to(self, device: str) -> Captioner:
        """Move the model."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, image: Tensor, count: int, *, seed: int) -> list[tuple[str, ...]]:
        """Return captions of ``(b, 3, H, W)`` uint8 pictures, up to ``count`` each, none empty or twice.

        Raises:
            InputError: what the model says is not finite.
        """
        model: Any = self._model
        pictures = to_float(image, mean=self._mean, std=self._std)
        latent, tokens = (part.repeat_interleave(count, dim=0) for part in model._encode_image(pictures))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.full((len(latent), 1), _START, device=image.device)
        done = torch.zeros(len(ids), dtype=torch.bool)
        for length in range(1, _MAX_TOKENS):
            said = model(None, ids, image_latent=latent, image_embs=tokens, output_labels=False)
            logits = said["logits"][:, -1].float()
            if not torch.isfinite(logits).all():
                raise InputError(f"captioner {self.name!r}: what it says is not finite; check its weights.")
            chosen = _drawn(logits, generator, may_end=length >= _MIN_TOKENS)
            chosen[done] = _END
            done |= chosen == _END
            ids = torch.cat([ids, chosen.to(ids.device)[:, None]], dim=1)
            if done.all():
                break
        texts = [self._text(row) for row in ids.tolist()]
        return [
            tuple(dict.fromkeys(text for text in texts[at : at + count] if text))
            for at in range(0, len(texts), count)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(one for one in ids if 0 < one <= _END)
        return " ".join(text.encode("utf-8", "replace").decode().split())


def _drawn(logits: Tensor, generator: torch.Generator, *, may_end: bool) -> Tensor:
    """Draw the next id of each text, among the likeliest that together have a share of ``_TOP_P``.

    Nucleus sampling (Holtzman et al. 2020), of ``_TOP_K`` ids at most: sorting all of them takes longer than
    the model.

    Returns:
        ``(b,)`` ids, on the CPU, where the generator is.
    """
    logits[:, _START] = -torch.inf
    logits[:, _END + 1 :] = -torch.inf
    logits[:, 0] = -torch.inf  # padding
    if not may_end:
        logits[:, _END] = -torch.inf
    shares, order = (part.cpu() for part in logits.softmax(dim=1).topk(_TOP_K, dim=1))
    before = shares.cumsum(dim=1) - shares
    shares[before >= _TOP_P] = 0
    picked = torch.multinomial(shares, 1, generator=generator)
    return order.gather(1, picked)[:, 0]


def open_captioner(said: str) -> Captioner:
    """Return the captioner of ``open-clip:MODEL:FILE``.

    Raises:
        ConfigError: no such model or file, or the model writes no captions.
        MissingExtraError: open_clip is not installed.
    """
    model, colon, name = said.removeprefix(CAPTIONER_PREFIX).partition(":")
    if not (said.startswith(CAPTIONER_PREFIX) and model and colon and name):
        raise ConfigError(f"captioner {said!r}: expected open-clip:MODEL:FILE, such as coca_ViT-L-14.")
    file = Path(name)
    if not file.is_file():
        raise ConfigError(
            f"captioner {said!r}: {name!r} is no file; nothing is downloaded: fetch the weights first."
        )
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError(f"the captioner {said!r}", extra="openclip", module="open_clip") from error
    if model not in open_clip.list_models() or "multimodal_cfg" not in open_clip.get_model_config(model):
        coca = [one for one in open_clip.list_models() if "multimodal_cfg" in open_clip.get_model_config(one)]
        raise ConfigError(f"captioner {said!r}: {model!r} writes no captions; open_clip's {sorted(coca)} do.")
    config: dict[str, Any] = open_clip.get_model_config(model)
    if any(key.startswith("hf_") for key in config["text_cfg"]) or config["text_cfg"]["vocab_size"] != 49408:
        raise ConfigError(
            f"captioner {said!r}: its text tower has a vocabulary of its own, expected that of CLIP (49408)."
        )
    try:
        opened = open_clip.create_model(model, pretrained=str(file), weights_only=True)
    # The parsers of pickles, safetensors and numpy files raise whatever they stumble over.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"captioner {said!r}: {name!r} cannot be loaded as {model!r}: {reason}") from error
    prepared = open_clip.get_model_preprocess_cfg(opened)
    size = prepared.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    interpolation: Literal["bilinear", "bicubic"] = (
        "bilinear" if prepared.get("interpolation") == "bilinear" else "bicubic"
    )
    return Captioner(
        model,
        opened,
        form=ViewForm((height, width), interpolation),
        mean=prepared["mean"],
        std=prepared["std"],
    )
