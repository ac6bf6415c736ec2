"""optimum's ONNX Runtime model for zero-shot classification: one graph that holds both towers.

Its pipeline encodes every label for every picture. The graph wants texts in any case: with the text
embeddings cached, one short text is given and only ``image_embeds`` is used.
"""

from __future__ import annotations

# isort: off
import torch

import peer_torchvision  # noqa: F401 - before torchvision
import numpy as np
import onnxruntime
import transformers
from optimum.onnxruntime import ORTModelForZeroShotImageClassification
from PIL import Image

# isort: on


class Peer:
    """A directory that optimum exported."""

    def __init__(self, *, threads: int, model: str, bank: str, labels: list[str], template: str) -> None:
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.labels, self.template = labels, template
        self.processor = transformers.AutoImageProcessor.from_pretrained(model, use_fast=True)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.model = ORTModelForZeroShotImageClassification.from_pretrained(
            model, session_options=options, provider="CPUExecutionProvider"
        )
        self.bank = np.load(bank)
        self.short = self.tokenizer(["a"], return_tensors="np")
        self.pipe = None

    def cosines(self, path: str) -> np.ndarray:
        with Image.open(path) as opened:
            pixels = self.processor(images=opened.convert("RGB"), return_tensors="pt")["pixel_values"]
        found = self.model(
            input_ids=self.short["input_ids"],
            attention_mask=self.short["attention_mask"],
            pixel_values=pixels.numpy(),
        )
        features = np.asarray(found["image_embeds"])
        return (features / np.linalg.norm(features, axis=-1, keepdims=True) @ self.bank.T)[0]

    def classify(self, path: str) -> int:
        """Return the number of the best label."""
        return int(self.cosines(path).argmax())

    def similarities(self, path: str) -> list[float]:
        return self.cosines(path).tolist()

    def pipeline(self, path: str) -> int:
        """Return the number of the best label, all labels encoded anew."""
        if self.pipe is None:
            from optimum.onnxruntime import pipeline

            self.pipe = pipeline(
                "zero-shot-image-classification",
                model=self.model,
                tokenizer=self.tokenizer,
                image_processor=self.processor,
            )
        found = self.pipe(path, candidate_labels=self.labels, hypothesis_template=self.template)
        return self.labels.index(found[0]["label"])
