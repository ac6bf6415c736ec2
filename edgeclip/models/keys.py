"""How one set of weights is called by others: key maps that are read in both directions.

Each tower's module says, for a config and a source (``"apple"``, ``"open_clip"``, ``"timm"``, …), which of
our keys stands for which of theirs. One table serves reading and writing, so that a round trip is
bit-identical by construction, and what is missing or unexpected is known exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeclip.errors import InputError

__all__ = ["Constant", "KeyMap", "KeyPair"]


@dataclass(frozen=True)
class KeyPair:
    """One of our tensors and what holds it elsewhere.

    Attributes:
        ours: our key.
        theirs: their key; several are concatenated along the first axis (separate q, k and v).
        transposed: theirs is the matrix transposed.
        theirs_shape: their shape where it has more or fewer axes of length 1; ``None`` where it is ours.
    """

    ours: str
    theirs: str | tuple[str, ...]
    transposed: bool = False
    theirs_shape: tuple[int, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Their keys."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that says nothing: a bias that is zero, a buffer of positions.

    Attributes:
        theirs: their key.
        shape: its shape.
        value: every element has it; ``None``: any content is passed over (and nothing is written).
        required: whether their files always have it, so that its absence is a missing key. A constant
            without a value is never required.
    """

    theirs: str
    shape: tuple[int, ...] = ()
    value: float | None = 0.0
    required: bool = True


@dataclass(frozen=True)
class KeyMap:
    """All pairs and constants of one source."""

    pairs: tuple[KeyPair, ...] = ()
    constants: tuple[Constant, ...] = ()

    def __add__(self, other: KeyMap) -> KeyMap:
        return KeyMap(self.pairs + other.pairs, self.constants + other.constants)

    def prefixed(self, *, ours: str = "", theirs: str = "") -> KeyMap:
        """Return the map with prefixes before every key."""
        return KeyMap(
            tuple(
                dataclasses.replace(
                    pair,
                    ours=ours + pair.ours,
                    theirs=theirs + pair.theirs
                    if isinstance(pair.theirs, str)
                    else tuple(theirs + name for name in pair.theirs),
                )
                for pair in self.pairs
            ),
            tuple(
                dataclasses.replace(constant, theirs=theirs + constant.theirs) for constant in self.constants
            ),
        )

    def to_ours(
        self, state: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]], *, where: str
    ) -> dict[str, Tensor]:
        """Return their tensors under our keys, values and dtypes as they are.

        Args:
            state: their tensors.
            shapes: shape of each of our keys.
            where: what is read, as messages name it.

        Raises:
            InputError: keys are missing or unexpected, shapes differ, or a constant is not constant; every
                such key is listed.
        """
        known = {name for pair in self.pairs for name in pair.names}
        known |= {constant.theirs for constant in self.constants}
        missing = sorted(
            {name for pair in self.pairs for name in pair.names if name not in state}
            | {
                constant.theirs
                for constant in self.constants
                if constant.required and constant.value is not None and constant.theirs not in state
            }
        )
        unexpected = sorted(set(state) - known)
        wrong = [
            f"{constant.theirs!r} is not {constant.value:g} throughout"
            for constant in self.constants
            if constant.value is not None
            and constant.theirs in state
            and not state[constant.theirs].is_meta
            and not bool((state[constant.theirs] == constant.value).all())
        ]
        found: dict[str, Tensor] = {}
        for pair in self.pairs:
            if not all(name in state for name in pair.names):
                continue
            expected = tuple(shapes[pair.ours])
            try:
                value = (
                    torch.cat([state[name] for name in pair.names])
                    if len(pair.names) > 1
                    else state[pair.names[0]]
                )
            except RuntimeError:
                wrong.append(f"{pair.names} have shapes {[tuple(state[name].shape) for name in pair.names]}")
                continue
            theirs_shape = pair.theirs_shape or (expected[::-1] if pair.transposed else expected)
            if tuple(value.shape) != theirs_shape:
                wrong.append(f"{' + '.join(pair.names)!r} is {tuple(value.shape)} instead of {theirs_shape}")
                continue
            found[pair.ours] = (value.mT if pair.transposed else value).reshape(expected)
        if missing or unexpected or wrong:
            raise InputError(
                f"{where}: the weights do not fit: missing keys {missing}, unexpected keys {unexpected}, "
                f"other differences [{'; '.join(wrong)}]."
            )
        return found

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our tensors under their keys, constants included."""
        written: dict[str, Tensor] = {}
        dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
        for pair in self.pairs:
            value = state[pair.ours]
            value = value.mT if pair.transposed else value
            if pair.theirs_shape is not None:
                value = value.reshape(pair.theirs_shape)
            parts = value.chunk(len(pair.names)) if len(pair.names) > 1 else (value,)  # a count has no axis
            for name, part in zip(pair.names, parts, strict=True):
                written[name] = part.contiguous()
        for constant in self.constants:
            if constant.value is not None and constant.required:
                written[constant.theirs] = torch.full(constant.shape, constant.value, dtype=dtype)
        return written
