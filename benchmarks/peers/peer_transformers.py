"""transformers' CLIP: its zero-shot pipeline as documented, and its parts with the texts encoded once.

The pipeline encodes every label for every picture. Whoever has many pictures and the same labels takes the
parts: processor, ``get_image_features``, cached text embeddings. Processors are the fast ones (torchvision).
"""

from __future__ import annotations

# isort: off
import torch

import peer_torchvision  # noqa: F401 - before torchvision
import transformers
from PIL import Image

# isort: on


class Peer:
    """A directory that ``save_pretrained`` wrote, with its own image processor and tokenizer."""

    def __init__(self, *, threads: int, model: str, bank: str, labels: list[str], template: str) -> None:
        import numpy as np

        torch.set_num_threads(threads)
        self.directory, self.labels, self.template = model, labels, template
        self.processor = transformers.AutoImageProcessor.from_pretrained(model, use_fast=True)
        self.model = transformers.CLIPModel.from_pretrained(model).eval()
        self.bank = torch.from_numpy(np.load(bank))
        self.pipe = None

    @torch.inference_mode()
    def cosines(self, path: str) -> torch.Tensor:
        with Image.open(path) as opened:
            pixels = self.processor(images=opened.convert("RGB"), return_tensors="pt")["pixel_values"]
        found = self.model.get_image_features(pixel_values=pixels)
        features = getattr(found, "pooler_output", found)  # a tensor before transformers 5
        return (torch.nn.functional.normalize(features, dim=-1) @ self.bank.T)[0]

    def classify(self, path: str) -> int:
        """Return the number of the best label."""
        return int(self.cosines(path).argmax())

    def similarities(self, path: str) -> list[float]:
        return self.cosines(path).tolist()

    def pipeline(self, path: str) -> int:
        """Return the number of the best label, all labels encoded anew."""
        if self.pipe is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.directory)
            self.pipe = transformers.pipeline(
                "zero-shot-image-classification",
                model=self.model,
                tokenizer=tokenizer,
                image_processor=self.processor,
            )
        found = self.pipe(path, candidate_labels=self.labels, hypothesis_template=self.template)
        return self.labels.index(found[0]["label"])
