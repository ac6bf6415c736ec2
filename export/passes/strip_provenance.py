"""Remove what tells where and by whom a graph was made."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["StripProvenance"]

_PRODUCER = "edgeclip"


class StripProvenance(ir.passes.InPlacePass):
    """Remove stack traces, module paths, doc strings and producer notes; number the nodes by kind.

    So the same checkpoint gives the same bytes from any directory. Opset imports of domains that no node uses
    go too: they only frighten readers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Strip the model."""
        before = _said(model)
        model.producer_name, model.producer_version, model.domain = _PRODUCER, "", ""
        model.model_version = 0
        model.graph.name = "tower"
        counts: dict[str, int] = {}
        for node in model.graph:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
            node.name = f"{node.op_type}_{counts[node.op_type]}"
        for holder in _holders(model):
            holder.metadata_props.clear()
            holder.doc_string = ""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and (tensor.doc_string or tensor.metadata_props):
                value.const_value = ir.Tensor(
                    tensor.numpy(), name=value.name
                )  # those of a file are read only
        used = {node.domain for node in model.graph} | {""}
        for domain in [domain for domain in model.opset_imports if domain not in used]:
            del model.opset_imports[domain]
        return ir.passes.PassResult(model, modified=_said(model) != before)

    def ensures(self, model: ir.Model) -> None:
        """Find nothing left that was not computed from the network."""
        left = next((holder for holder in _holders(model) if holder.metadata_props), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"{left!r} still has metadata")


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _holders(model: ir.Model) -> Iterator[ir.Model | ir.Graph | ir.Node | ir.Value]:
    yield model
    yield model.graph
    yield from model.graph
    yield from _values(model.graph)


def _said(model: ir.Model) -> list[object]:
    """Return all that the pass may change."""
    return [
        *(getattr(model, name) for name in ("producer_name", "producer_version", "domain", "model_version")),
        sorted(model.opset_imports),
        *((holder.doc_string, dict(holder.metadata_props)) for holder in _holders(model)),
        *(node.name for node in model.graph),
        model.graph.name,
    ]
