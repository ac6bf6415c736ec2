"""What a student descends from, and what that means for its licence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgeclip.models.zoo import MODELS

__all__ = ["licence_of", "parent_of"]

_NOT_SAID = "NOASSERTION"
_IDENTIFIER = re.compile(r"[A-Za-z0-9.+-]+")
_RESEARCH_ONLY = frozenset(
    entry.licence.identifier
    for entry in MODELS.values()
    if entry.licence is not None and entry.licence.research_only
)


def parent_of(
    name: str,
    role: Literal["teacher", "start"],
    licence: str,
    path: str,
    source: str,
    parents: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what a checkpoint records about a model; only the last part of its path, for privacy."""
    return {
        "role": role,
        "name": name,
        "licence": licence or _NOT_SAID,
        "file": Path(path).name,
        "source": source,
        "parents": [dict(parent) for parent in parents],
    }


def licence_of(wanted: str, parents: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the licence of what descends from ``parents``, and why it is another than wanted (or ``""``).

    The most restrictive decides: terms that allow research only, then terms nobody stated, then all together.

    Args:
        wanted: what the recipe says.
        parents: teachers and start checkpoint, as recorded.
    """
    said = [(str(parent["name"]), str(parent["licence"])) for parent in parents]
    research = [(name, licence) for name, licence in said if _RESEARCH_ONLY & _identifiers(licence)]
    if research:
        licences = _all_of(licence for _, licence in research)
        return licences, (
            f"the student may be used for research only ({licences}), because it descends from "
            f"{', '.join(sorted({name for name, _ in research}))}"
        )
    unknown = sorted({name for name, licence in said if _NOT_SAID in _identifiers(licence)})
    if unknown:
        return _NOT_SAID, f"the student's licence is open, because nobody says that of {', '.join(unknown)}"
    licences = _all_of([wanted, *(licence for _, licence in said)])
    return licences, "" if licences == wanted else f"the student's licence is {licences}, by its parents"


def _all_of(licences: Iterable[str]) -> str:
    """Return the terms of several licences together, each once."""
    parts: set[str] = set()
    for licence in licences:
        parts.update([licence] if "(" in licence or " OR " in licence else licence.split(" AND "))
    if len(parts) == 1:
        return parts.pop()
    # AND binds closer than OR in SPDX expressions.
    return " AND ".join(sorted(f"({part})" if " OR " in part else part for part in parts))


def _identifiers(licence: str) -> set[str]:
    return set(_IDENTIFIER.findall(licence))
