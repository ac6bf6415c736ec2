"""Run any number of rows through a session, whatever batch its tower takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.runtime.session import Session

__all__ = ["fixed_batch", "run_rows"]

_BATCH: Final = 8  # what engines that are built for a range of batches take


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
