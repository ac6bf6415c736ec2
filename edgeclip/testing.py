"""Fakes for tests of code that uses edgeclip: no model file, no engine, the same checks as the real thing."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeclip.errors import ConfigError
from edgeclip.runtime.session import OpenSession, Placement, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FakeSession"]


class FakeSession(OpenSession):
    """A session whose embeddings are drawn from a hash of each row: equal rows, equal embeddings.

    Inputs are checked as in every session, and it refuses work after ``close`` and after ``fork``. Embeddings
    are unit rows without meaning: two inputs that differ are about orthogonal.

    Args:
        tower: ``"image"`` takes ``image`` uint8 ``(B, H, W, 3)``, ``"text"`` takes ``tokens`` int32
            ``(B, L)``.
        image_size_px: ``(H, W)``.
        context_length: L.
        embed_dim: E.
        delay_s: how long each run sleeps, for tests of overlap.

    Example:
        >>> session = FakeSession("text", context_length=8)
        >>> session.run({"tokens": np.zeros((2, 8), np.int32)})["text_embedding"].shape
        (2, 16)
        >>> session.runs, session.rows
        (1, 2)
    """

    def __init__(
        self,
        tower: Literal["image", "text"] = "image",
        *,
        image_size_px: tuple[int, int] = (32, 32),
        context_length: int = 16,
        embed_dim: int = 16,
        delay_s: float = 0.0,
    ) -> None:
        specs = {
            "image": TensorSpec("image", "uint8", ("B", *image_size_px, 3)),
            "text": TensorSpec("tokens", "int32", ("B", context_length)),
        }
        if tower not in specs:
            raise ConfigError(f"tower: got {tower!r}, expected 'image' or 'text'.")
        output = TensorSpec(f"{tower}_embedding", "float32", ("B", embed_dim))
        self._fake = _FakeEngine(specs[tower], output, delay_s)
        super().__init__(self._fake, name=f"fake {tower} tower")

    @property
    def runs(self) -> int:
        """How many calls of ``run`` succeeded."""
        return self._fake.runs

    @property
    def rows(self) -> int:
        """How many rows they had together."""
        return self._fake.rows


class _FakeEngine:
    concurrent_runs = True

    def __init__(self, spec: TensorSpec, output: TensorSpec, delay_s: float) -> None:
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec}
        self.outputs: Mapping[str, TensorSpec] = {output.name: output}
        self.chosen = Placement("fake", "numpy", "cpu", 1, "fp32", "a fake was asked for")
        self.runs = 0
        self.rows = 0
        self._delay_s = delay_s
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        (rows,) = feeds.values()
        (output,) = self.outputs.values()
        if self._delay_s:
            time.sleep(self._delay_s)
        embeddings = np.stack([_embedding(row, int(output.shape[-1])) for row in rows])
        with self._lock:
            self.runs += 1
            self.rows += len(rows)
        return {output.name: embeddings}

    def close(self) -> None:
        """Nothing to release."""


def _embedding(row: NDArray[Any], embed_dim: int) -> NDArray[np.float32]:
    digest = hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=8).digest()
    embedding = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(embed_dim)
    unit: NDArray[np.float32] = (embedding / np.linalg.norm(embedding)).astype(np.float32)
    return unit
