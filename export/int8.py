"""Int8 graphs: static Q/DQ with min-max ranges, for ONNX Runtime on CPUs and for TensorRT.

*ONNX Runtime*: unsigned activations, signed weights. Processors with AVX2 and without VNNI add two products
of bytes in 16 bits, which 8-bit weights overflow. Files for ``x86-avx2`` therefore have 7-bit weights; those
for no target have 8-bit weights and the session setting ``session.x64quantprecision``, which takes exact
kernels on x86 (some processors with VNNI too, where they are slower and change nothing) and nothing on ARM;
all other targets have 8-bit weights and need nothing.

*TensorRT*: signed and symmetric throughout (:func:`symmetric_qdq`), never the CPU's graph; what is not
quantized is cast to float16 afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeclip.bundle import Requires
from edgeclip.calibration.ranges import observe
from edgeclip.calibration.sensitivity import Choice
from edgeclip.errors import ExportError
from edgeclip.quantization import CONVOLUTIONS, CPU, TENSORRT, TRANSFORMER, Int8Policy, Scheme

from .build import BuildRequest, BuiltVariant
from .passes import apply
from .passes._graph import constant
from .passes.keep_float import KeepFloat
from .passes.qdq import InsertQdq, is_product, observed, place
from .passes.sequences import for_onnx_runtime
from .ranges import GraphWatch, check_rows
from .storage import store_small
from .to_onnx import built_tower

__all__ = [
    "METHOD",
    "chosen_policy",
    "policy_of",
    "quantize",
    "quantized",
    "said",
    "scheme_of",
    "symmetric_qdq",
]

METHOD: Final = "minmax"
_EXACT_KERNELS: Final[Mapping[str, str]] = MappingProxyType({"session.x64quantprecision": "1"})


def quantized(request: BuildRequest) -> BuiltVariant:
    """Make the int8 ONNX files of one variant.

    Raises:
        CalibrationError: a tower has no calibration rows, or ranges cannot be had from them.
        ExportError: a graph cannot be quantized.
    """
    name, target = request.spec.name, request.spec.target
    for tower, graph in request.graphs.items():
        check_rows(graph, request.calibration.get(tower), what=f"variant {name!r}, {tower} tower")
    scheme = scheme_of(8 if target is None else target.weight_bits)
    towers, policies = {}, {}
    choices: dict[str, Choice] = {}
    for tower, graph in request.graphs.items():
        request.on_step(f"quantize the {tower} tower")
        what = f"variant {name!r}, {tower} tower"
        model = apply(graph, for_onnx_runtime(request.spec, gelu_tanh=request.options.gelu_tanh), what=what)
        policies[tower] = policy = chosen_policy(request, tower, model, scheme, choices)
        model = quantize(model, request.calibration[tower], policy, scheme, what=what)
        store_small(model, tables=policy.tables, others=policy.others)
        del model.graph.value_info[:]  # engines infer it again
        towers[tower] = built_tower(tower, model, external_data=request.options.external_data)
    return BuiltVariant(
        towers,
        requires=Requires() if target is None else target.requires,
        session_config=_EXACT_KERNELS if target is None else {},
        calibration=said(request, scheme, policies, choices),
    )


def scheme_of(weight_bits: int) -> Scheme:
    """Return ONNX Runtime's form of int8 with weights of so many bits."""
    return replace(CPU, weight_bits=weight_bits)


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
    asked = request.options.int8
    if asked is None or asked.of(tower) is None:
        return policy_of(graph)
    from .sensitivity_onnx import CHOSEN
    from .sensitivity_search import search

    report = search(
        graph,
        request.calibration[tower],
        scheme,
        asked,
        tower=tower,
        variant=request.spec.name,
        bank=request.bank,
        on_step=request.on_step,
    )
    assert report.choice is not None
    choices[tower] = report.choice
    return replace(CHOSEN, keep_float=frozenset(report.choice.keep_float))


def quantize(
    graph: onnx.ModelProto, rows: NDArray[np.generic], policy: Int8Policy, scheme: Scheme, *, what: str
) -> onnx.ModelProto:
    """Return a graph with Q/DQ around what a policy chooses, ranges from calibration rows.

    Args:
        graph: float32, of one tower; stays as it is.
        rows: ``(n, …)`` for its input, at least 16.
        policy: what stays float.
        scheme: what int8 means.
        what: the graph, as messages name it.

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
    watch = GraphWatch(graph, what=what)
    ranges = observe(watch, check_rows(graph, rows, what=what), observed(model, nodes, scheme), what=what)
    return apply(shaped, [InsertQdq(nodes, ranges, scheme), KeepFloat()], what=what)


def symmetric_qdq(
    graph: onnx.ModelProto,
    rows: NDArray[np.generic],
    policy: Int8Policy | None = None,
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
        what: the graph, as messages name it.

    Raises:
        CalibrationError: rows do not fit, or a tensor is not finite for some of them.
        ExportError: nothing can be quantized, or a pass fails.
    """
    return quantize(graph, rows, policy or policy_of(graph), TENSORRT, what=what)


def said(
    request: BuildRequest,
    scheme: Scheme,
    policies: Mapping[str, Int8Policy],
    choices: Mapping[str, Choice] | None = None,
) -> dict[str, Any]:
    """Return what the manifest says about how a variant was quantized."""
    found: dict[str, Any] = {
        "method": METHOD,
        "rows": {tower: len(request.calibration[tower]) for tower in policies},
        "digest": request.calibration_digest,
        "scheme": scheme.to_dict(),
        "policy": {tower: policy.to_dict() for tower, policy in policies.items()},
    }
    if choices:
        found["choice"] = {tower: choice.to_manifest() for tower, choice in choices.items()}
    return found
