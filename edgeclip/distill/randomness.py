"""Randomness as a pure function of what it is for, so that nothing depends on workers, ranks or restarts.

A stream is named by ``(seed, epoch, index, purpose)``: the same name gives the same numbers in every process,
and two names give independent ones. Philox is a counter-based generator (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"): seed and purpose are its key, epoch and index the upper half of its counter, so
streams cannot overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from edgeclip.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Purpose", "Randomness", "permutation", "random_stream"]

Purpose = Literal[
    "order", "replace", "caption", "view", "model", "other", "hide", "gates", "prompt", "pictures"
]
# The place in this table is part of the stream's name: append only.
_PURPOSES: dict[str, int] = {name: number for number, name in enumerate(get_args(Purpose))}
_MAX = (1 << 64) - 1


def _bits(seed: int, epoch: int, index: int, purpose: Purpose) -> np.random.Philox:
    if purpose not in _PURPOSES:
        raise ConfigError(f"randomness: purpose is {purpose!r}, expected one of {', '.join(_PURPOSES)}.")
    for name, value in (("seed", seed), ("epoch", epoch), ("index", index)):
        if not 0 <= value <= _MAX:
            raise ConfigError(f"randomness: {name} is {value}, expected 0 to {_MAX}.")
    return np.random.Philox(
        key=np.array([seed, _PURPOSES[purpose]], np.uint64), counter=np.array([0, 0, index, epoch], np.uint64)
    )


def random_stream(seed: int, epoch: int, index: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of this name, at its beginning.

    Raises:
        ConfigError: a number is negative or above 64 bits, or the purpose is unknown.
    """
    return np.random.Generator(_bits(seed, epoch, index, purpose))


def permutation(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch: a random permutation of ``0 … count - 1``, ``(count,)`` int64.

    Made from the generator's raw bits, which numpy keeps from version to version, unlike its own shuffles.
    Takes 16 bytes a sample while it runs, and about a second for ten million.
    """
    if not 0 <= count <= 1 << 32:
        raise ConfigError(f"order of samples: got {count} samples, expected 0 to {1 << 32}.")
    # The low bits of each random key are replaced by the sample's number: keys differ, so that every way of
    # sorting gives the same order, and the number comes along.
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    keys = _bits(seed, epoch, 0, "order").random_raw(count) & ~low
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= low
    return keys.view(np.int64)


@dataclass(frozen=True)
class Randomness:
    """The streams of one sample in one epoch.

    Attributes:
        seed: of the run.
        epoch: how often the data have been through.
        index: of the place's own sample; one that replaces a broken sample uses the broken one's streams.
    """

    seed: int
    epoch: int
    index: int

    def stream(self, purpose: Purpose) -> np.random.Generator:
        """Return the generator for a purpose, at its beginning."""
        return random_stream(self.seed, self.epoch, self.index, purpose)
