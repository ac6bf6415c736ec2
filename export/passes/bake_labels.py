"""Put labels into an image tower: embeddings become logits."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["BakeLabels"]


class BakeLabels(ir.passes.InPlacePass):
    """Multiply the one output, unit embeddings, with those of labels and the scale.

    What comes out is ``logits`` ``(B, N)``. The names of the labels, the scale and the name of their bank go
    into the model's metadata.

    Args:
        embeddings: ``(N, E)`` unit rows.
        names: of the labels.
        bank: name of their bank.
        scale: multiplier of cosines.
    """

    def __init__(
        self, embeddings: NDArray[np.float32], names: Sequence[str], *, bank: str, scale: float
    ) -> None:
        super().__init__()
        self._weights = np.ascontiguousarray((embeddings.astype(np.float64) * scale).T.astype(np.float32))
        self._metadata = {
            "labels": json.dumps(list(names), ensure_ascii=False),
            "scale": repr(scale),
            "bank": bank,
        }

    def requires(self, model: ir.Model) -> None:
        """Expect one output of the labels' width."""
        outputs = model.graph.outputs
        width = self._weights.shape[0]
        shape = outputs[0].shape if len(outputs) == 1 else None
        if shape is None or len(shape) != 2 or shape[1] != width or outputs[0].dtype != ir.DataType.FLOAT:
            found = [(each.name, str(each.shape)) for each in outputs]
            raise ir.passes.PreconditionError(f"outputs are {found}, expected one float (B, {width})")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Append the product."""
        graph = model.graph
        (embedding,) = graph.outputs
        assert embedding.shape is not None
        weights = ir.Value(
            name="label_weights",
            shape=ir.Shape(self._weights.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(self._weights, name="label_weights"),
        )
        graph.register_initializer(weights)
        node = ir.Node("", "MatMul", inputs=[embedding, weights], name="MatMul_labels")
        (logits,) = node.outputs
        logits.name = "logits"
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        logits.shape = ir.Shape([embedding.shape[0], self._weights.shape[1]])
        graph.append(node)
        graph.outputs[0] = logits
        model.metadata_props.update(self._metadata)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Promise one output, ``logits``."""
        if [each.name for each in model.graph.outputs] != ["logits"]:
            raise ir.passes.PostconditionError("the output is not 'logits'")
