"""The least and largest value of tensors over a calibration set (min-max), observed in ONNX Runtime.

Other ways of choosing ranges give the same mapping, see :mod:`edgeclip.quantization`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeclip.errors import CalibrationError
from edgeclip.quantization import Range
from edgeclip.runtime.session import DEFAULT_OPTIONS, RuntimeOptions, open_session

from .to_onnx import built_tower, tensor_entries

__all__ = ["LEAST_ROWS", "check_rows", "observe"]

LEAST_ROWS = 16
_BATCH = 8


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
    if rows is None or rows.dtype.name != entry.dtype or rows.shape[1:] != shape or len(rows) < LEAST_ROWS:
        got = "none" if rows is None else f"{rows.dtype.name} {rows.shape}"
        expected = ", ".join(map(str, shape))
        raise CalibrationError(
            f"{what}: its calibration rows are {got}, expected at least {LEAST_ROWS} of {entry.dtype} "
            f"({expected}); give more with --calibration-data."
        )
    return rows


def observe(
    graph: onnx.ModelProto,
    rows: NDArray[np.generic],
    names: Sequence[str],
    *,
    what: str,
    options: RuntimeOptions = DEFAULT_OPTIONS,
) -> dict[str, Range]:
    """Return the range of tensors over calibration rows.

    Args:
        graph: float32, with one input.
        rows: ``(n, …)`` for that input. A graph of fixed batch gets its batch, the last one filled up.
        names: of float32 tensors.
        what: the tower, as messages name it.
        options: where to run.

    Raises:
        CalibrationError: rows do not fit, or a tensor is NaN or infinite for some of them.
        BackendError: ONNX Runtime cannot run the graph.
    """
    rows = check_rows(graph, rows, what=what)
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    with tempfile.TemporaryDirectory() as folder:
        path = _write(_watched(graph, names), Path(folder))
        with open_session(path, options=options) as session:
            ((name, spec),) = session.inputs.items()
            fixed = spec.shape[0]
            size = fixed if isinstance(fixed, int) else _BATCH
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                if isinstance(fixed, int) and len(part) < size:
                    part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
                seen = session.run({name: np.ascontiguousarray(part)})
                least = [float(seen[f"{place}:least"]) for place in range(len(names))]
                most = [float(seen[f"{place}:most"]) for place in range(len(names))]
                _check_finite(names, [*least], [*most], what=what, row=start)
                low, high = np.minimum(low, least), np.maximum(high, most)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _check_finite(
    names: Sequence[str], least: list[float], most: list[float], *, what: str, row: int
) -> None:
    wrong = [name for name, *both in zip(names, least, most, strict=True) if not np.isfinite(both).all()]
    if wrong:
        raise CalibrationError(
            f"{what}: {wrong[0]!r} is not finite for the calibration rows from {row} on ({len(wrong)} "
            "tensors are not); its float32 form is broken, or the rows are."
        )


def _watched(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy that gives two numbers a tensor and nothing else."""
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    del watched.graph.output[:]
    for place, name in enumerate(names):
        for op_type, said in (("ReduceMin", "least"), ("ReduceMax", "most")):
            output = f"{place}:{said}"
            watched.graph.node.append(helper.make_node(op_type, [name], [output], keepdims=0))
            watched.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    return watched


def _write(graph: onnx.ModelProto, folder: Path) -> Path:
    """Write a graph with its weights, which may be too many for one file."""
    tower = built_tower("watched", graph)
    for name, content in tower.files.items():
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
    return folder / tower.model
