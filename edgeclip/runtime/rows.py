"""Run any number of rows through a session, whatever batch its tower takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.runtime.session import Session

__all__ = ["fixed_batch", "has_free_length", "run_rows", "run_texts"]

_BATCH: Final = 8  # what engines that are built for a range of batches take
_TEXTS: Final = 16  # a call, sorted by length: fewer read all weights more often, more differ in length
_LEAST_LENGTH: Final = 2  # of exported graphs
_AXES_OF_TOKENS: Final = 2


def fixed_batch(session: Session) -> int | None:
    """Return the one batch a tower takes; ``None`` where it takes any."""
    (spec,) = session.inputs.values()
    size = spec.shape[0] if spec.shape else None
    return size if isinstance(size, int) else None


def run_rows(session: Session, rows: NDArray[Any], *, batch: int = _BATCH) -> NDArray[Any]:
    """Run all rows, some at a time; a tower of fixed batch gets its batch, the last one filled up.

    Args:
        session: a tower with one input and one output.
        rows: at least one, in the dtype and shape of the input.
        batch: rows a call, where the tower takes any.

    Returns:
        The output, row for row.
    """
    (name,) = session.inputs
    (output,) = session.outputs
    fixed = fixed_batch(session)
    size = fixed or batch
    parts = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        count = len(part)
        if fixed is not None and count < size:
            part = np.concatenate([part, np.repeat(part[-1:], size - count, axis=0)])
        parts.append(session.run({name: np.ascontiguousarray(part)})[output][:count])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def has_free_length(session: Session) -> bool:
    """Return whether a text tower takes rows that are cut behind the end of their texts."""
    (spec,) = session.inputs.values()
    return len(spec.shape) == _AXES_OF_TOKENS and isinstance(spec.shape[1], str)


def run_texts(
    session: Session, tokens: NDArray[np.int32], lengths: NDArray[np.intp], *, batch: int = _BATCH
) -> NDArray[Any]:
    """Run all rows of a text tower; where their length is free, without the padding they have in common.

    Args:
        session: a text tower.
        tokens: ``(n, L)``, at least one row.
        lengths: ``(n,)``, how many tokens of each row say something: at least 1.
        batch: rows a call of a tower of fixed length that takes any.

    Returns:
        The output, row for row in the order of ``tokens``.
    """
    if not has_free_length(session):
        return run_rows(session, tokens, batch=batch)
    order = np.argsort(lengths, kind="stable")
    parts = []
    for chosen in np.array_split(order, -(-len(order) // _TEXTS)):
        longest = min(max(_LEAST_LENGTH, int(lengths[chosen[-1]])), tokens.shape[1])
        parts.append(run_rows(session, tokens[chosen, :longest], batch=_TEXTS))
    sorted_rows = np.concatenate(parts)
    out = np.empty_like(sorted_rows)
    out[order] = sorted_rows
    return out
