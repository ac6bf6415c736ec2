"""A teacher from an exported bundle: its towers run in their own runtime, its tokenizer is in it.

Bundles embed into unit vectors. They run on the CPU, with as many threads as torch, wherever the student is:
an exported graph is made for a device, and teachers worth a GPU are better had as checkpoints.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgeclip.bundle import EMBEDDED, Bundle, Variant
from edgeclip.distill.inputs import TextInput, ViewForm
from edgeclip.distill.lineage import parent_of
from edgeclip.distill.online_teacher import OnlineTeacher
from edgeclip.distill.recipe import BundleTeacher
from edgeclip.errors import ConfigError
from edgeclip.runtime.choose import choose_variant, open_tower, unmet
from edgeclip.runtime.host import Host
from edgeclip.runtime.session import OpenSession, RuntimeOptions
from edgeclip.text_encoder import open_tokenizer, text_variant

__all__ = ["open_bundle_teacher"]

_FULL_PRECISION = "fp32"


class _Sessions(nn.Module):
    """Open towers with the names that teachers have."""

    def __init__(self, image: OpenSession, text: OpenSession | None, digest: str) -> None:
        super().__init__()
        self._image, self._text = image, text
        # Whoever compares the states of two teachers should see that their towers differ.
        self.register_buffer("digest", torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))

    def encode_image(self, image: Tensor) -> Tensor:
        """Embed ``(b, 3, H, W)``: uint8 where the graph scales pixels, else float32 as it wants them."""
        if image.dtype == torch.uint8:
            image = image.permute(0, 2, 3, 1)  # (b, H, W, 3), as cameras give them
        return _run(self._image, image)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed ``(m, L)`` ids."""
        assert self._text is not None
        return _run(self._text, tokens)


def _run(session: OpenSession, rows: Tensor) -> Tensor:
    """Return what a tower says, ``(b, E)``, where the rows are."""
    ((name, spec),) = session.inputs.items()
    given = np.ascontiguousarray(rows.cpu().numpy(), dtype=np.dtype(spec.dtype))
    size = spec.shape[0]
    step = size if isinstance(size, int) else len(given)
    said = [
        next(iter(session.run({name: given[start : start + step]}).values()))
        for start in range(0, len(given), step)
    ]
    return torch.from_numpy(np.concatenate(said)).float().to(rows.device)


def open_bundle_teacher(spec: BundleTeacher, root: Path) -> OnlineTeacher:
    """Return a bundle as a teacher; one without text tower has pictures alone.

    Args:
        spec: which.
        root: what paths are relative to.

    Raises:
        ConfigError: the towers take fixed batches of more than one.
        BundleError: the bundle is missing or damaged, or has no such variant.
        BackendError: nothing here can run it.
    """
    who = f"teacher {spec.name!r}"
    bundle = Bundle.open(spec.path if spec.path in EMBEDDED else root / spec.path)
    options = RuntimeOptions(threads=torch.get_num_threads())
    variant = choose_variant(
        bundle, variant=spec.variant or _preferred(bundle, options), options=options
    ).variant
    reads = text_variant(bundle, variant) if bundle.manifest.tokenizer is not None else None
    image = open_tower(bundle, variant, "image", options)
    text = None if reads is None else open_tower(bundle, reads, "text", options)
    for session in (image, text):
        if session is not None:
            _check_batch(session, who)
    digests = [variant.tower_digest("image"), "" if reads is None else reads.tower_digest("text")]
    tokenizer: TextInput | None = None if text is None else open_tokenizer(bundle)
    model, prepared = bundle.manifest.model, bundle.manifest.preprocess
    in_graph = prepared.applied == "graph"
    parents = [{"name": each} if isinstance(each, str) else each for each in model.parents]
    return OnlineTeacher(
        spec.name,
        _Sessions(image, text, hashlib.sha256("\n".join(digests).encode()).hexdigest()),
        form=ViewForm(prepared.image_size_px, prepared.interpolation),
        mean=None if in_graph else prepared.mean,
        std=None if in_graph else prepared.std,
        tokenizer=tokenizer,
        embed_dim=model.embed_dim,
        scale=spec.scale,
        parent=parent_of(model.name, "teacher", model.licence, spec.path, f"bundle, {variant.name}", parents),
    )


def _preferred(bundle: Bundle, options: RuntimeOptions) -> str:
    """Return the first variant in full precision that runs here, else ``"auto"``."""
    host = Host.here()
    names = dict.fromkeys((*bundle.manifest.default_variants, *sorted(bundle.manifest.variants)))
    for variant in map(bundle.variant, names):
        if variant.entry.precision == _FULL_PRECISION and _runs(variant, options, host):
            return variant.name
    return "auto"


def _runs(variant: Variant, options: RuntimeOptions, host: Host) -> bool:
    return "image" in variant.entry.towers and unmet(variant, options=options, host=host) is None


def _check_batch(session: OpenSession, who: str) -> None:
    ((_, spec),) = session.inputs.items()
    if isinstance(spec.shape[0], int) and spec.shape[0] != 1:
        raise ConfigError(
            f"{who}: its {spec.name!r} takes batches of exactly {spec.shape[0]}, expected any size or 1; "
            "name another variant."
        )
