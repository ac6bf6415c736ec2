"""The accuracy floor of tuning: what a variant must keep of the float32 model's answers to be considered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from edgeclip.errors import ConfigError

if TYPE_CHECKING:
    from edgeclip.manifest import VariantEntry

__all__ = ["Floor"]

_NUMBERS: Final = (
    "cosine_min",
    "cosine_mean",
    "centred_cosine_mean",
    "top1_agreement",
    "top5_agreement",
    "max_abs",
)


@dataclass(frozen=True)
class Floor:
    """What a variant must keep of the float32 model's answers.

    Attributes:
        said: conditions, as given. The golden inputs must give the right answers here in any case.

    Raises:
        ConfigError: a condition cannot be read.
    """

    said: tuple[str, ...] = ("golden",)

    def __post_init__(self) -> None:
        for each in self.said:
            _condition(each)

    def refuses(self, entry: VariantEntry) -> str | None:
        """Return why a variant is below the floor, by what its manifest says; ``None`` where it is not."""
        for each in self.said:
            name, limit = _condition(each)
            why = _below(entry, name, limit)
            if why is not None:
                return why
        return None


def _condition(said: str) -> tuple[str, float]:
    if said in ("golden", "parity"):
        return said, 0.0
    name, equals, number = said.partition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    known = name in _NUMBERS or (name.startswith("accuracy.") and len(name) > len("accuracy."))
    if not equals or not known or not math.isfinite(limit):
        raise ConfigError(
            f"floor: got {said!r}, expected 'golden', 'parity', or NUMBER=LIMIT with a number of "
            f"{', '.join(_NUMBERS)} or accuracy.NAME, such as top1_agreement=0.98."
        )
    return name, limit


def _below(entry: VariantEntry, name: str, limit: float) -> str | None:
    if name == "golden":
        return None
    if name.startswith("accuracy."):
        got: Any = entry.accuracy
        for part in name.split(".")[1:]:
            got = got.get(part) if isinstance(got, dict) else None
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            return f"its manifest does not tell its {name}, and the floor is {limit:g}"
        return None if got >= limit else f"its {name} is {got:g}, and the floor is {limit:g}"
    if name == "parity":
        for tower, said in sorted(entry.parity.items()):
            if said.status != "passed":
                return f"the numbers of its {tower} tower are {said.status}, and the floor is parity"
            if said.missed:
                missed = ", ".join(f"{number} ({least:g})" for number, least in sorted(said.missed.items()))
                return f"its {tower} tower missed {missed}, and the floor is parity"
        return None if "image" in entry.parity else "its manifest has no parity of the image tower"
    parity = entry.parity.get("image")
    value = None if parity is None else getattr(parity, name)
    if value is None:
        return f"its manifest does not tell its {name}, and the floor is {limit:g}"
    is_fine = value <= limit if name == "max_abs" else value >= limit
    return None if is_fine else f"its {name} is {value:g}, and the floor is {limit:g}"
