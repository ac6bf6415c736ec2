"""Find what stays float in an int8 tower: measured, chosen, and written down."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.cache import HostCache
from edgeclip.calibration.latency_table import LatencyTable
from edgeclip.calibration.sensitivity import choose, measure
from edgeclip.quantization import Scheme
from edgeclip.runtime.parity import ParityNumbers, compare_embeddings
from edgeclip.runtime.session import RuntimeOptions

from .build import Int8Search
from .sensitivity_onnx import Quantizable, SwitchedTower
from .sensitivity_report import SensitivityReport

__all__ = ["search"]


def search(
    graph: onnx.ModelProto,
    rows: NDArray[Any],
    scheme: Scheme,
    asked: Int8Search,
    *,
    tower: str,
    variant: str,
    model: str = "",
    bank: NDArray[np.float32] | None = None,
    on_step: Callable[[str], None] = lambda said: None,
) -> SensitivityReport:
    """Measure a tower, and choose what stays float where a target was given.

    What was measured is kept in the host cache, so that a run that was stopped goes on where it was.

    Args:
        graph: float32, after all passes that come before quantization.
        rows: ``(n, …)`` for its input, at least 16; ranges are chosen on them too.
        scheme: what int8 means.
        asked: target, times and places.
        tower: ``"image"`` or ``"text"``.
        variant: name of the variant.
        model: name of the model.
        bank: ``(N, E)`` label embeddings, for changes of the best label.
        on_step: told what is being done.

    Raises:
        CalibrationError: rows do not fit, or no choice reaches the target.
        ExportError: nothing can be quantized.
        InputError: the latency table cannot be read, or is of another model.
        BackendError: ONNX Runtime cannot run the graph.
    """
    options = RuntimeOptions(threads=asked.threads)
    what = f"variant {variant!r}, {tower} tower"
    bank = bank if tower == "image" else None
    took: dict[str, float] = {}
    choice = None

    @contextmanager
    def timed(step: str) -> Iterator[None]:
        began = time.perf_counter()
        on_step(f"{tower} tower: {step}")
        yield
        took[step] = round(time.perf_counter() - began, 2)

    with timed("ranges"):
        found = Quantizable.of(graph, rows, scheme, what=what, options=options)
    with timed("times"):
        if asked.latency_table is None:
            table = found.times(options=options)
        else:
            table = LatencyTable.read(asked.latency_table, found.tensors)
    with SwitchedTower(found, options=options) as board:
        with timed("sensitivity"):
            kept = HostCache.open(found.digest).directory
            sensitivity = measure(
                board,
                rows,
                bank,
                state=None if kept is None else kept / "sensitivity",
                on_node=lambda done, total, name: on_step(
                    f"{tower} tower: {done} of {total} measured, last {name}"
                ),
            )
        target = asked.of(tower)
        if target is not None:
            reference = board.embed(rows, ())

            def simulate(on: Collection[str]) -> ParityNumbers:
                return compare_embeddings(reference, board.embed(rows, on), bank=bank)

            def exact(on: Collection[str]) -> ParityNumbers:
                got = found.embed_exact(rows, on, options=options)
                return compare_embeddings(reference, got, bank=bank)

            with timed("choice"):
                choice = choose(
                    sensitivity,
                    table,
                    target,
                    simulate,
                    exact,
                    on_step=lambda said: on_step(f"{tower} tower: {said}"),
                )
    report = SensitivityReport(model, tower, variant, scheme, sensitivity, table, choice, took)
    if asked.folder is not None:
        report.write(asked.folder)
    return report
