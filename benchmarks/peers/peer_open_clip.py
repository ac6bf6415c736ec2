"""open_clip as its README uses it, folded by timm, in inference mode: eager PyTorch on the CPU."""

from __future__ import annotations

# isort: off
import torch

import peer_torchvision  # noqa: F401 - before torchvision
import open_clip
from PIL import Image
from timm.utils import reparameterize_model

# isort: on


class Peer:
    """open_clip's model, preprocessing and tokenizer; text embeddings are read from a file."""

    def __init__(self, *, threads: int, model: str, weights: str, bank: str) -> None:
        import numpy as np

        torch.set_num_threads(threads)
        # As published for MobileCLIP2-S0; a local file of weights would get OpenAI's mean, std and bicubic.
        created, _, self.preprocess = open_clip.create_model_and_transforms(
            model,
            pretrained=weights,
            image_mean=(0.0, 0.0, 0.0),
            image_std=(1.0, 1.0, 1.0),
            image_interpolation="bilinear",
        )
        self.model = reparameterize_model(created.eval())
        self.tokenizer_name, self.tokenizer = model, None
        self.bank = torch.from_numpy(np.load(bank))

    @torch.inference_mode()
    def cosines(self, path: str) -> torch.Tensor:
        with Image.open(path) as opened:
            pixels = self.preprocess(opened).unsqueeze(0)
        return (self.model.encode_image(pixels, normalize=True) @ self.bank.T)[0]

    def classify(self, path: str) -> int:
        """Return the number of the best label."""
        return int(self.cosines(path).argmax())

    def similarities(self, path: str) -> list[float]:
        return self.cosines(path).tolist()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> list[float]:
        """Encode texts in one batch; return the first row."""
        if self.tokenizer is None:
            self.tokenizer = open_clip.get_tokenizer(self.tokenizer_name)
        return self.model.encode_text(self.tokenizer(texts), normalize=True)[0].tolist()
