"""What one thread of this machine can calculate at best: the ceiling that towers are held against.

A matrix product ``n × n × n`` with a constant factor, as the products of towers are, through ONNX Runtime: in
float32, and of bytes. Clocks change with heat and neighbours, so a ceiling belongs to the run it was measured
in, and is looked for several times while that lasts; the best counts.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgeclip.bench.report import PeaksEntry
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.runtime.probe_graphs import float_product, integer_product

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SIZES", "Peaks"]

SIZES: Final = (512, 1024, 2048)
_REPEAT_NS: Final = 50_000_000
_MOST_NS: Final = 3_000_000_000


class Peaks:
    """Matrix products of one thread, measured again at every :meth:`measure`.

    Args:
        sizes: each n.

    Raises:
        BackendUnavailableError: ONNX Runtime is not here.
    """

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        ort = import_onnxruntime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        draw = np.random.default_rng(0)
        self._products: list[tuple[str, int, Any, NDArray[Any]]] = []
        self._best_ns: dict[tuple[str, int], int] = {}
        for n in sizes:
            real = draw.standard_normal((2, n, n)).astype(np.float32)
            a, b = draw.integers(0, 256, (n, n), np.uint8), draw.integers(-127, 128, (n, n), np.int8)
            for kind, left, graph in (
                ("float", real[0], float_product(n, real[1])),
                ("int8", a, integer_product(a, b)),
            ):
                session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
                self._products.append((kind, n, session, left))

    def measure(self) -> None:
        """Run every product at least once, small ones for a twentieth of a second, and keep the best.

        Products that would take seconds, by what the next smaller one took, are left out.
        """
        ns_of_a_product: dict[str, float] = {}
        for kind, n, session, left in self._products:
            if ns_of_a_product.get(kind, 0.0) * n**3 > _MOST_NS:
                continue
            began_ns = perf_counter_ns()
            while True:
                start_ns = perf_counter_ns()
                session.run(None, {"a": left})
                end_ns = perf_counter_ns()
                best_ns = self._best_ns.get((kind, n))
                taken_ns = max(1, end_ns - start_ns)
                self._best_ns[kind, n] = taken_ns if best_ns is None else min(best_ns, taken_ns)
                if end_ns - began_ns >= _REPEAT_NS:
                    break
            ns_of_a_product[kind] = self._best_ns[kind, n] / n**3

    def entry(self) -> PeaksEntry:
        """Return the best of each, in 10⁹ operations a second; a product of n has ``2 n³``."""
        found: dict[str, dict[str, float]] = {"float": {}, "int8": {}}
        for (kind, n), taken_ns in self._best_ns.items():
            found[kind][str(n)] = 2 * n**3 / taken_ns
        return PeaksEntry(float_gflops=found["float"], int8_gops=found["int8"])
