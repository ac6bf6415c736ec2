"""Inputs for towers whose numbers do not matter, only how long they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.runtime.session import TensorSpec

__all__ = ["TEXT_LENGTH", "example_feeds"]

TEXT_LENGTH: Final = 16
"""Tokens of a row where a text tower takes any number: those of a label in a template."""
_TOKENS: Final = 64  # ids below it are in every vocabulary


def example_feeds(inputs: Mapping[str, TensorSpec], batch: int = 1) -> dict[str, NDArray[Any]]:
    """Return inputs of a tower that are like none in particular: noise, and small token ids.

    Args:
        inputs: of a session.
        batch: taken where the tower leaves the first axis open.
    """
    draw = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {}
    for name, spec in inputs.items():
        free = (batch, *[TEXT_LENGTH] * (len(spec.shape) - 1))
        shape = tuple(
            size if isinstance(size, int) else instead for size, instead in zip(spec.shape, free, strict=True)
        )
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            feeds[name] = draw.standard_normal(shape).astype(spec.dtype)
        else:
            limit = 256 if spec.dtype == "uint8" else _TOKENS
            feeds[name] = draw.integers(1, limit, shape).astype(spec.dtype)
    return feeds
