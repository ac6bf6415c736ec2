"""Weights of a graph's products in integers that keep what the products give; see calibration/rounding.py."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeclip.calibration.ranges import Watch
from edgeclip.calibration.rounding import Moments, Windows, moments, round_to_moments
from edgeclip.quantization import RoundedWeight, Scheme, neighbours

from .passes._graph import constant, flag
from .passes.qdq import channel_axis, steps_of

__all__ = ["rounded_weights", "windows_of"]

_PAIR = 128
_MOST_TERMS = 8192  # their moments take half a gigabyte


def rounded_weights(
    model: ir.Model,
    watch: Watch,
    rows: NDArray[np.generic],
    nodes: Sequence[str],
    scheme: Scheme,
    *,
    corrected: Collection[str],
    what: str,
) -> dict[str, RoundedWeight]:
    """Return weights in integers by the output of their product.

    A product is left out where shapes do not tell its sums, where those have more than 8,192 terms, or where
    it shares its weight with another one: it gets the nearest levels.

    Args:
        model: float32 graph with shapes.
        watch: of the same graph.
        rows: for its input.
        nodes: outputs of the products.
        scheme: what int8 means.
        corrected: products whose bias takes up what rounding does on average.
        what: the graph, as messages name it.

    Raises:
        BackendError: the graph cannot be run.
        CalibrationError: a tensor is not finite for some rows, or its squares are not.
    """
    chosen = set(nodes)
    products = [node for node in model.graph if node.outputs[0].name in chosen]
    weights = [_name(node.inputs[1]) for node in products]
    readers: dict[Windows, list[ir.Node]] = {}
    shape = model.graph.inputs[0].shape
    sizes = {str(name): size for name, size in zip(shape or (), rows.shape, strict=False)}
    for node, weight in zip(products, weights, strict=True):
        windows = windows_of(node, sizes)
        if windows is not None and windows.terms <= _MOST_TERMS and weights.count(weight) == 1:
            readers.setdefault(windows, []).append(node)
    found = {}
    for windows, seen in moments(watch, rows, list(readers), what=what):
        for node in readers[windows]:
            name = _name(node.outputs[0])
            found[name] = _rounded(node, windows, seen, scheme, is_corrected=name in corrected)
    return found


def windows_of(node: ir.Node, sizes: Mapping[str, int]) -> Windows | None:
    """Return what a product sums up; ``None`` where shapes do not tell.

    Args:
        node: the product.
        sizes: that free axes have, by their names.
    """
    source, weight = node.inputs[0], constant(node.inputs[1])
    assert source is not None
    assert weight is not None
    if source.shape is None:
        return None
    named = [sizes.get(str(size), size) for size in tuple(source.shape)[1:]]
    shape = [size for size in named if isinstance(size, int)]
    is_known = len(shape) == source.shape.rank() - 1
    if node.op_type != "Conv":
        terms = weight.shape[1 - channel_axis(node)]
        rows = math.prod(shape[:-1]) if is_known and len(shape) > 1 else 1
        return Windows(source.name or "", (rows, terms) if rows > 1 else (terms,))
    if weight.ndim != 4 or len(shape) != 3 or str(flag(node, "auto_pad", "NOTSET")) != "NOTSET":
        return None
    channels, height, width = shape
    pads = [int(each) for each in flag(node, "pads", [0] * 4)]
    strides, dilations = (
        [int(each) for each in flag(node, name, [1, 1])] for name in ("strides", "dilations")
    )
    return Windows(
        source.name or "",
        (channels, height, width),
        (weight.shape[2], weight.shape[3]),
        (strides[0], strides[1]),
        (pads[0], pads[1], pads[2], pads[3]),
        (dilations[0], dilations[1]),
        int(flag(node, "group", 1)),
    )


def _rounded(
    node: ir.Node, windows: Windows, seen: Moments, scheme: Scheme, *, is_corrected: bool
) -> RoundedWeight:
    weight, axis = constant(node.inputs[1]), channel_axis(node)
    assert weight is not None
    steps = steps_of(node, weight, scheme)
    rows = np.moveaxis(weight, axis, 0)
    grouped = rows.reshape(windows.groups, -1, windows.terms)
    is_depthwise = windows.groups > 1 and rows.shape[1] == 1
    pairs = None
    if scheme.fit_pairs and not is_depthwise:
        positions = math.prod(windows.kernel or (1,))
        pairs = neighbours(windows.terms // positions, positions)
    integers = round_to_moments(
        grouped,
        seen.centred if is_corrected else seen.second,
        steps.reshape(grouped.shape[:2]),
        limit=scheme.weight_limit,
        neighbours=pairs,
        most=_PAIR,
    )
    return RoundedWeight(np.moveaxis(integers.reshape(rows.shape), 0, axis), steps, axis)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""
