"""How one set of weights is called by others: key maps that are read in both directions.

Each tower's module says, for a config and a source (``"apple"``, ``"open_clip"``, ``"timm"``, …), which of
our keys stands for which of theirs. One table serves reading and writing, so that a round trip is
bit-identical by construction, and what is missing or unexpected is known exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeclip.errors import InputError

__all__ = ["Constant", "Differences", "KeyMap", "KeyMismatchError", "KeyPair"]

_MAX_LISTED = 20


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

    def shape_for(self, ours: Iterable[int]) -> tuple[int, ...]:
        """Return their shape, all names together, for our shape."""
        shape = tuple(ours)
        return self.theirs_shape or (shape[::-1] if self.transposed else shape)


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
class Differences:
    """How some weights differ from what is expected.

    Attributes:
        missing: keys that are not there.
        unexpected: keys that nothing asks for.
        other: sentences about shapes and values.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.missing) + len(self.unexpected) + len(self.other)

    def __str__(self) -> str:
        return (
            f"missing keys {_listed(self.missing)}, unexpected keys {_listed(self.unexpected)}, other "
            f"differences {_listed(self.other, quoted=False)}"
        )


class KeyMismatchError(InputError):
    """Report weights that do not fit.

    Args:
        where: what was read, and for which model.
        differences: all of them; the message shows the first of each kind.
        hint: what to do about it.
    """

    def __init__(self, where: str, differences: Differences, *, hint: str = "") -> None:
        super().__init__(f"{where}: the weights do not fit: {differences}.{hint and ' ' + hint}")
        self.differences = differences


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

    def compare(self, state: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> Differences:
        """Return how ``state`` differs from what the map describes, by names and shapes alone.

        Args:
            state: their tensors.
            shapes: shape of each of our keys.
        """
        known = {name for pair in self.pairs for name in pair.names}
        known |= {constant.theirs for constant in self.constants}
        missing = {name for pair in self.pairs for name in pair.names if name not in state}
        missing |= {
            constant.theirs
            for constant in self.constants
            if constant.required and constant.value is not None and constant.theirs not in state
        }
        other = [
            _shape_message(constant.theirs, state[constant.theirs].shape, constant.shape)
            for constant in self.constants
            if constant.value is not None
            and constant.theirs in state
            and tuple(state[constant.theirs].shape) != constant.shape
        ]
        for pair in self.pairs:
            if not all(name in state for name in pair.names):
                continue
            parts = [tuple(state[name].shape) for name in pair.names]
            expected = pair.shape_for(shapes[pair.ours])
            if len({part[1:] for part in parts}) > 1:
                other.append(f"{pair.names} have shapes {parts}")
            else:
                found = parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])
                if found != expected:
                    other.append(_shape_message(" + ".join(pair.names), found, expected))
        return Differences(tuple(sorted(missing)), tuple(sorted(set(state) - known)), tuple(other))

    def to_ours(
        self, state: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]], *, where: str
    ) -> dict[str, Tensor]:
        """Return their tensors under our keys, values and dtypes as they are.

        Args:
            state: their tensors.
            shapes: shape of each of our keys.
            where: what is read, as messages name it.

        Raises:
            KeyMismatchError: keys are missing or unexpected, shapes differ, or a constant is not constant.
        """
        differences = self.compare(state, shapes)
        wrong = tuple(
            f"{constant.theirs!r} is not {constant.value:g} throughout"
            for constant in self.constants
            if constant.value is not None
            and constant.theirs in state
            and not state[constant.theirs].is_meta
            and not bool((state[constant.theirs] == constant.value).all())
        )
        differences = dataclasses.replace(differences, other=differences.other + wrong)
        if differences.count:
            raise KeyMismatchError(where, differences)
        found: dict[str, Tensor] = {}
        for pair in self.pairs:
            parts = [state[name] for name in pair.names]
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
            found[pair.ours] = (value.mT if pair.transposed else value).reshape(tuple(shapes[pair.ours]))
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


def _listed(items: Sequence[str], *, quoted: bool = True) -> str:
    """Return the first items and how many more there are."""
    shown = ", ".join(repr(item) if quoted else item for item in items[:_MAX_LISTED])
    more = len(items) - _MAX_LISTED
    return f"[{shown}{f', … and {more} more' if more > 0 else ''}]"


def _shape_message(name: str, found: Iterable[int], expected: Iterable[int]) -> str:
    return f"{name!r} is {tuple(found)} instead of {tuple(expected)}"
