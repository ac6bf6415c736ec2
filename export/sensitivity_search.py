"""Find what stays float in an int8 tower: measured, chosen, and written down."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.cache import HostCache
from edgeclip.calibration.latency_table import LatencyTable
from edgeclip.calibration.sensitivity import choose, measure
from edgeclip.errors import ExportError, MissingExtraError
from edgeclip.quantization import TENSORRT, Scheme
from edgeclip.runtime.parity import DEGENERATE_SIMILARITY, ParityNumbers, compare_embeddings
from edgeclip.runtime.session import RuntimeOptions

from .build import DEFAULT_SETTINGS, Int8Search, Int8Settings, chooses
from .calibration_rows import calibration_set
from .int8 import scheme_of
from .options import Checkpoint, GraphOptions, References
from .passes import apply
from .passes.sequences import for_onnx_runtime
from .reference import default_templates, everyday
from .sensitivity_onnx import Quantizable, SwitchedTower
from .sensitivity_report import SensitivityReport
from .variants import VariantSpec

__all__ = ["search", "search_checkpoint"]


def search(
    graph: onnx.ModelProto,
    rows: NDArray[Any],
    scheme: Scheme,
    asked: Int8Search,
    settings: Int8Settings = DEFAULT_SETTINGS,
    *,
    tower: str,
    variant: str,
    model: str = "",
    bank: NDArray[np.float32] | None = None,
    backend: str = "ort",
    on_step: Callable[[str], None] = lambda said: None,
) -> SensitivityReport:
    """Measure a tower, and choose what stays float where a target was given.

    What was measured is kept in the host cache, so that a run that was stopped goes on where it was.

    Args:
        graph: float32, after all passes that come before quantization.
        rows: ``(n, …)`` for its input, at least 16; ranges are chosen on them too.
        scheme: what int8 means.
        asked: target, times and places.
        settings: how ranges are chosen, and whether biases are corrected.
        tower: ``"image"`` or ``"text"``.
        variant: name of the variant.
        model: name of the model.
        bank: ``(N, E)`` label embeddings, for changes of the best label.
        backend: the engine whose kernels are timed, where no latency table is given.
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
        found = Quantizable.of(graph, rows, scheme, settings, what=what, options=options)
    with timed("times"):
        if asked.latency_table is None:
            table = found.times(options=replace(options, backend=backend))
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


def search_checkpoint(
    checkpoint: Checkpoint,
    spec: VariantSpec,
    asked: Int8Search,
    *,
    tower: str = "image",
    references: References | None = None,
    on_step: Callable[[str], None] = lambda said: None,
) -> SensitivityReport:
    """Measure a tower of a checkpoint.

    Args:
        checkpoint: which model.
        spec: an int8 variant for ONNX Runtime or TensorRT.
        asked: target, times and places.
        tower: ``"image"`` or ``"text"``.
        references: calibration pictures and labels, as for an export.
        on_step: told what is being done.

    Raises:
        MissingExtraError: torch or onnx is not installed.
        ExportError: the variant is neither, or the tower cannot be traced or quantized.
        InputError: checkpoint, pictures or latency table cannot be read.
        CalibrationError: no choice reaches the target.
    """
    if not chooses(spec) or spec.form.format == "openvino":
        raise ExportError(f"sensitivity of {spec.name!r}: expected onnx-int8 or tensorrt-int8.")
    for module in ("torch", "onnx", "onnxscript"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("tracing a model", extra="export", module=module)
    from .source import open_source

    on_step("open the checkpoint")
    source = open_source(checkpoint, threads=asked.threads)
    references = references or References()
    languages = source.tokenizer.config.languages
    chosen = calibration_set(
        source.preprocess,
        references,
        languages=languages,
        tokenize=partial(source.tokenizer, truncate=True) if tower == "text" else None,
        tokenizer=source.tokenizer.digest,
        embed=source.images,
        on_note=on_step,
    )
    rows = chosen.rows[tower]
    bank = None
    if tower == "image":
        on_step("labels: eager float32")
        embeddings = source.images(rows)
        similarity = compare_embeddings(embeddings, embeddings).reference_similarity or 0.0
        if similarity < DEGENERATE_SIMILARITY:  # else ranks mean nothing
            offered = references.offered or everyday(languages)
            templates = offered.templates or default_templates(offered.labels)
            bank = source.bank(offered.labels, templates).embeddings
    on_step(f"trace the {tower} tower")
    graph = source.trace(tower, GraphOptions())
    source.release()
    if spec.form.format == "onnx":
        graph = apply(graph, for_onnx_runtime(spec, gelu_tanh=True), what=f"{tower} tower")
    return search(
        graph,
        rows,
        scheme_for(spec),
        asked,
        tower=tower,
        variant=spec.name,
        model=source.config.name,
        bank=bank,
        on_step=on_step,
    )


def scheme_for(spec: VariantSpec) -> Scheme:
    """Return what int8 means for a variant."""
    if spec.form.format == "tensorrt":
        return TENSORRT
    return scheme_of(fit_pairs=spec.target is None or spec.target.fit_pairs)
