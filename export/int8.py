"""Int8 graphs: static Q/DQ with corrected biases, for ONNX Runtime on CPUs and for TensorRT.

*ONNX Runtime*: unsigned activations, signed weights. Processors with AVX2 and without VNNI add two products
of bytes in 16 bits, which 8-bit weights overflow. In files for ``x86-avx2``, and in those for no target, two
weights that meet there add up to 128 at most (``Scheme.fit_pairs``), which costs less than 7-bit weights and
is exact everywhere. All other targets have 8-bit weights, and their hosts what those need. The setting
``session.x64quantprecision`` would make 8-bit weights exact too; it takes kernels as slow as float32 ones, on
hosts with VNNI as well.

*TensorRT*: signed and symmetric throughout (:func:`symmetric_qdq`), never the CPU's graph; what is not
quantized is cast to float16 afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeclip.bundle import Requires
from edgeclip.cache import HostCache
from edgeclip.calibration.ranges import MeanSquaredError, MinMax, RangeMethod, means, observe
from edgeclip.calibration.sensitivity import Choice
from edgeclip.errors import ExportError
from edgeclip.quantization import (
    CONVOLUTIONS,
    CPU,
    TENSORRT,
    TRANSFORMER,
    WEIGHTS,
    Int8Policy,
    Ranges,
    RoundedWeight,
    Scheme,
)

from .build import DEFAULT_SETTINGS, BuildRequest, BuiltVariant, Int8Settings
from .passes import apply
from .passes._graph import constant
from .passes.bias import CorrectBiases, corrected
from .passes.keep_float import KeepFloat
from .passes.qdq import InsertQdq, is_product, observed, place
from .passes.sequences import for_onnx_runtime
from .ranges import GraphWatch, check_rows
from .rounding import rounded_weights
from .storage import store_small
from .to_onnx import built_tower

__all__ = [
    "chosen_policy",
    "method_of",
    "policy_of",
    "quantize",
    "quantized",
    "said",
    "scheme_of",
    "symmetric_qdq",
]


def quantized(request: BuildRequest) -> BuiltVariant:
    """Make the int8 ONNX files of one variant.

    Raises:
        CalibrationError: a tower has no calibration rows, or ranges cannot be had from them.
        ExportError: a graph cannot be quantized.
    """
    name, target = request.spec.name, request.spec.target
    for tower, graph in request.graphs.items():
        check_rows(graph, request.calibration.get(tower), what=f"variant {name!r}, {tower} tower")
    scheme = scheme_of(fit_pairs=target is None or target.fit_pairs)
    towers, policies = {}, {}
    choices: dict[str, Choice] = {}
    for tower, graph in request.graphs.items():
        request.on_step(f"quantize the {tower} tower")
        what = f"variant {name!r}, {tower} tower"
        model = apply(graph, for_onnx_runtime(request.spec, gelu_tanh=request.options.gelu_tanh), what=what)
        policies[tower] = policy = chosen_policy(request, tower, model, scheme, choices)
        if policy != WEIGHTS:
            rows, settings = request.calibration[tower], request.options.quantization
            model = quantize(model, rows, policy, scheme, settings, what=what)
        store_small(model, tables=policy.tables, others=policy.others)
        del model.graph.value_info[:]  # engines infer it again
        towers[tower] = built_tower(tower, model, external_data=request.options.external_data)
    return BuiltVariant(
        towers,
        requires=Requires() if target is None else target.requires,
        calibration=said(request, scheme, policies, choices),
    )


def scheme_of(weight_bits: int = 8, *, fit_pairs: bool = False) -> Scheme:
    """Return ONNX Runtime's form of int8 with weights of so many bits, or such as fit in pairs."""
    return replace(CPU, weight_bits=weight_bits, fit_pairs=fit_pairs)


def policy_of(graph: onnx.ModelProto) -> Int8Policy:
    """Return the default policy of a tower: by where most of its weights are."""
    weights = {"Conv": 0, "Gemm": 0, "MatMul": 0}
    for node in ir.from_proto(graph).graph:
        if node.op_type in weights and is_product(node):
            array = constant(node.inputs[1])
            weights[node.op_type] += 0 if array is None else array.size
    return CONVOLUTIONS if weights["Conv"] > weights["Gemm"] + weights["MatMul"] else TRANSFORMER


def chosen_policy(
    request: BuildRequest, tower: str, graph: onnx.ModelProto, scheme: Scheme, choices: dict[str, Choice]
) -> Int8Policy:
    """Return what stays float in a tower: what was chosen for it, if that was asked for.

    Args:
        request: the variant.
        tower: its name.
        graph: of the tower, as it will be quantized.
        scheme: what int8 means.
        choices: a choice is added here.

    Raises:
        CalibrationError: no choice reaches the target.
        InputError: the latency table cannot be used.
    """
    if tower == "text" and scheme != TENSORRT and request.options.quantization.text == "weights":
        return WEIGHTS
    asked = request.options.int8
    if asked is None or asked.of(tower) is None:
        return policy_of(graph)
    from .sensitivity_search import search

    report = search(
        graph,
        request.calibration[tower],
        scheme,
        asked,
        request.options.quantization,
        tower=tower,
        variant=request.spec.name,
        bank=request.bank,
        backend="openvino" if request.spec.form.format == "openvino" else "ort",
        on_step=request.on_step,
    )
    assert report.choice is not None
    choices[tower] = report.choice
    kept = frozenset(report.choice.keep_float)
    return replace(policy_of(graph), stem=True, entry=0, pooled=True, keep_float=kept)


def quantize(
    graph: onnx.ModelProto,
    rows: NDArray[np.generic],
    policy: Int8Policy,
    scheme: Scheme,
    settings: Int8Settings = DEFAULT_SETTINGS,
    *,
    what: str,
    ranges: Ranges | None = None,
) -> onnx.ModelProto:
    """Return a graph with Q/DQ around what a policy chooses, ranges from calibration rows.

    Ranges are kept in the host cache, by graph, rows and method: variants of one graph share them.

    Args:
        graph: float32, of one tower; stays as it is.
        rows: ``(n, …)`` for its input, at least 16.
        policy: what stays float.
        scheme: what int8 means.
        settings: how ranges are chosen, and whether biases are corrected.
        what: the graph, as messages name it.
        ranges: of the tensors that are rounded, where somebody chose them already.

    Raises:
        CalibrationError: rows do not fit, or a tensor is not finite for some of them.
        ExportError: nothing can be quantized, or a pass fails.
    """
    # Which products are with one vector a picture is told by shapes.
    shaped = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    model = ir.from_proto(shaped)
    nodes = place(model, policy)
    if not nodes:
        raise ExportError(
            f"{what}: nothing in it can be quantized (policy {policy.name!r}: products of "
            f"{', '.join(sorted(policy.ops))} with constant weights); export it in float."
        )
    rows = check_rows(graph, rows, what=what)
    watch = GraphWatch(shaped, what=what)
    if ranges is None:
        names = observed(model, nodes, scheme)
        method = settings.method or method_of(policy)
        cache = HostCache.open(watch.digest)
        ranges = observe(watch, rows, names, method, scheme=scheme, what=what, cache=cache)
    sources = corrected(model, nodes) if settings.correct_biases else {}
    rounded: dict[str, RoundedWeight] = {}
    if settings.rounding == "moments":
        rounded = rounded_weights(model, watch, rows, nodes, scheme, corrected=sources, what=what)
    passes: list[ir.passes.PassBase] = []
    if settings.correct_biases:
        found = means(watch, rows, tuple(dict.fromkeys(sources.values())))
        passes.append(CorrectBiases(nodes, found, scheme, rounded))
    return apply(shaped, [*passes, InsertQdq(nodes, ranges, scheme, rounded), KeepFloat()], what=what)


def method_of(policy: Int8Policy) -> RangeMethod:
    """Return the default method of a policy.

    Activations of convolutions have long tails that are worth cutting; LayerNorm's few large channels carry
    what a transformer tells, and cutting them costs more than finer steps give.
    """
    return MinMax() if policy.name == TRANSFORMER.name else MeanSquaredError()


def symmetric_qdq(
    graph: onnx.ModelProto,
    rows: NDArray[np.generic],
    policy: Int8Policy | None = None,
    settings: Int8Settings = DEFAULT_SETTINGS,
    *,
    what: str = "graph",
) -> onnx.ModelProto:
    """Return a graph as TensorRT wants it: activations and weights symmetric int8, everything else float32.

    Q/DQ stand around the inputs and weights of products only; biases and outputs stay float, so that a cast
    to float16 can follow. All scales are numbers that float16 holds.

    Args:
        graph: float32, of one tower; stays as it is.
        rows: ``(n, …)`` for its input, at least 16.
        policy: what stays float; :func:`policy_of` the graph if missing.
        settings: how ranges are chosen, and whether biases are corrected.
        what: the graph, as messages name it.

    Raises:
        CalibrationError: rows do not fit, or a tensor is not finite for some of them.
        ExportError: nothing can be quantized, or a pass fails.
    """
    return quantize(graph, rows, policy or policy_of(graph), TENSORRT, settings, what=what)


def said(
    request: BuildRequest,
    scheme: Scheme,
    policies: Mapping[str, Int8Policy],
    choices: Mapping[str, Choice] | None = None,
) -> dict[str, Any]:
    """Return what the manifest says about how a variant was quantized."""
    found: dict[str, Any] = {
        "method": {tower: _method(request, policy) for tower, policy in policies.items()},
        "correct_biases": request.options.quantization.correct_biases,
        "rounding": request.options.quantization.rounding,
        "rows": {
            tower: len(request.calibration[tower]) for tower, policy in policies.items() if policy != WEIGHTS
        },
        "digest": request.calibration_digest,
        "scheme": scheme.to_dict(),
        "policy": {tower: policy.to_dict() for tower, policy in policies.items()},
    }
    if choices:
        found["choice"] = {tower: choice.to_manifest() for tower, choice in choices.items()}
    return found


def _method(request: BuildRequest, policy: Int8Policy) -> str | None:
    if policy == WEIGHTS:
        return None
    return str(request.options.quantization.method or method_of(policy))
