"""Graph passes: each says what it needs of a graph, changes it, and says what then holds.

A pass is an ``onnx_ir.passes.InPlacePass`` in a file of its own: ``requires`` (raises ``PreconditionError``),
``call`` (returns the model and whether it changed), ``ensures`` (raises ``PostconditionError``).
:func:`apply` runs passes over a serialized graph and names the one that failed.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from edgeclip.errors import ExportError

__all__ = ["apply"]


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
