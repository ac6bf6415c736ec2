"""Rows that a tower takes, and the graph of a tower as :mod:`edgeclip.calibration.ranges` watches it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.errors import CalibrationError
from edgeclip.runtime.session import DEFAULT_OPTIONS, OpenSession, RuntimeOptions, open_session

from .passes import apply
from .passes.watch import Told, WatchTensors
from .to_onnx import built_tower, tensor_entries

__all__ = ["LEAST_ROWS", "GraphWatch", "check_rows"]

LEAST_ROWS = 16


def check_rows(graph: onnx.ModelProto, rows: NDArray[np.generic] | None, *, what: str) -> NDArray[np.generic]:
    """Return calibration rows that a graph takes.

    Args:
        graph: of one tower.
        rows: ``(n, …)``.
        what: the tower, as messages name it.

    Raises:
        CalibrationError: there are none or fewer than 16, or they are of another dtype or shape.
    """
    (entry,), _ = tensor_entries(graph)
    shape = entry.shape[1:]
    fits = (
        rows is not None
        and rows.dtype.name == entry.dtype
        and rows.ndim == len(entry.shape)
        and all(
            isinstance(want, str) or want == size for want, size in zip(shape, rows.shape[1:], strict=True)
        )
        and len(rows) >= LEAST_ROWS
    )
    if rows is None or not fits:
        got = "none" if rows is None else f"{rows.dtype.name} {rows.shape}"
        expected = ", ".join(map(str, shape))
        raise CalibrationError(
            f"{what}: its calibration rows are {got}, expected at least {LEAST_ROWS} of {entry.dtype} "
            f"({expected}); give more with --calibration-data."
        )
    return rows


class GraphWatch:
    """Tells what is inside an ONNX graph, by running it in ONNX Runtime.

    Args:
        graph: of one tower.
        what: the tower, as messages name it.
        options: where to run.
    """

    def __init__(
        self, graph: onnx.ModelProto, *, what: str, options: RuntimeOptions = DEFAULT_OPTIONS
    ) -> None:
        self._graph, self._what, self._options = graph, what, options

    @cached_property
    def digest(self) -> str:
        """Sha256 of the graph."""
        digest = hashlib.sha256()
        graph = self._graph.graph  # by its parts: as a whole it may be too large for one message
        for part in (*graph.input, *graph.initializer, *graph.node, *graph.output):
            digest.update(part.SerializeToString(deterministic=True))
        return digest.hexdigest()

    def extremes(self, names: Sequence[str]) -> contextlib.AbstractContextManager[OpenSession]:
        """See :class:`edgeclip.calibration.ranges.Watch`."""
        return self._open(names, "extremes")

    def values(self, names: Sequence[str]) -> contextlib.AbstractContextManager[OpenSession]:
        """See :class:`edgeclip.calibration.ranges.Watch`."""
        return self._open(names, "values")

    def means(self, names: Sequence[str]) -> contextlib.AbstractContextManager[OpenSession]:
        """See :class:`edgeclip.calibration.ranges.Watch`."""
        return self._open(names, "means")

    @contextlib.contextmanager
    def _open(self, names: Sequence[str], told: Told) -> Iterator[OpenSession]:
        graph = apply(self._graph, [WatchTensors(names, told)], what=self._what)
        with tempfile.TemporaryDirectory() as folder:
            tower = built_tower("watched", graph)
            for name, content in tower.files.items():
                assert isinstance(content, bytes)
                (Path(folder) / name).write_bytes(content)
            with open_session(Path(folder) / tower.model, options=self._options) as session:
                yield session
