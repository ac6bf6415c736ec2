"""Graph passes: each says what it needs of a graph, changes it, and says what then holds.

A pass is an ``onnx_ir.passes.InPlacePass`` in a file of its own: ``requires`` (raises ``PreconditionError``),
``call`` (returns the model and whether it changed), ``ensures`` (raises ``PostconditionError``).
:func:`apply` runs passes over a serialized graph and names the one that failed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from edgeclip.errors import ExportError

__all__ = ["LARGEST_MESSAGE", "apply", "check"]

LARGEST_MESSAGE = (1 << 31) - (1 << 24)
"""Bytes of weights in a protobuf message, with room for the graph around them."""


def apply(model: onnx.ModelProto, passes: Sequence[ir.passes.PassBase], *, what: str) -> onnx.ModelProto:
    """Return a graph after passes; the given one stays as it is.

    Args:
        model: a valid graph.
        passes: in order.
        what: the graph, as messages name it.

    Raises:
        ExportError: a pass does not apply or breaks its promise; the message names it and those before it.
    """
    graph = ir.from_proto(model)
    done: list[str] = []
    for each in passes:
        name = type(each).__name__
        try:
            graph = each(graph).model
        except Exception as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            after = f" after {', '.join(done)}" if done else ""
            raise ExportError(f"{what}: the pass {name} fails{after}: {reason}.") from error
        done.append(name)
    proto = ir.to_proto(graph)
    # onnx_ir notes the shapes of weights a second time; files hold them once.
    notes = [value for value in proto.graph.value_info if value.name not in graph.graph.initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(notes)
    return proto


def check(model: onnx.ModelProto, *, what: str) -> None:
    """Run the full checker of ONNX: types and shapes of every node. The graph stays as it is.

    Args:
        model: of any size; above 2 GB it takes room for a copy in the temporary directory.
        what: the graph, as messages name it.

    Raises:
        ExportError: the graph is not valid.
    """
    try:
        if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= LARGEST_MESSAGE:
            onnx.checker.check_model(model, full_check=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            ir.save(ir.from_proto(model), path, external_data="weights.data")
            onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # the checker raises what its parts raise
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{what}: the ONNX checker refuses the graph: {reason}.") from error
