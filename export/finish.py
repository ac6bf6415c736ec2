"""Finish an image tower for int8: find what int8 will round in it, train a copy, trace it again.

What is rounded is found in the graph, as for any int8 file, and told to :mod:`edgeclip.distill.finish_int8`
by the parameters it belongs to. For that the graph is traced without the pass that splits grouped
convolutions for speed, whose parts belong to no parameter. The traced copy takes the place of the float graph
in every int8 variant of the export; all of them are compared with the untrained float model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from torch import nn

from edgeclip.calibration.ranges import means, observe
from edgeclip.distill.finish_int8 import Finished, FinishSettings, RoundedProduct, finish_int8
from edgeclip.errors import CalibrationError
from edgeclip.models.config import CLIPConfig
from edgeclip.quantization import CPU, Int8Policy, Ranges, Scheme

from .build import DEFAULT_SETTINGS, Int8Settings
from .int8 import method_of, policy_of
from .options import GraphOptions
from .passes import apply
from .passes._graph import constant
from .passes.bias import corrected
from .passes.qdq import clamped, observed, place
from .passes.sequences import shared
from .passes.split_grouped import SplitGrouped
from .ranges import GraphWatch, check_rows
from .trace import trace_image_graph

__all__ = ["FinishedGraph", "finish_image_tower", "rounded_products"]


@dataclass(frozen=True, eq=False)
class FinishedGraph:
    """The graph of a finished tower.

    Attributes:
        graph: float32, through the passes of every graph.
        finished: what was gained.
        products: that int8 rounds.
        simulated: those of them that training rounded, too.
        settings: how it was trained.
    """

    graph: onnx.ModelProto
    finished: Finished
    products: int
    simulated: int
    settings: FinishSettings

    def to_dict(self) -> dict[str, Any]:
        """Return what the manifest says about it."""
        said = self.finished.to_dict()
        return {"steps": self.settings.steps, "products": self.products, "simulated": self.simulated, **said}


def finish_image_tower(
    module: nn.Module,
    config: CLIPConfig,
    options: GraphOptions,
    rows: NDArray[np.generic],
    *,
    policy: Int8Policy | None = None,
    scheme: Scheme = CPU,
    quantization: Int8Settings = DEFAULT_SETTINGS,
    bank: NDArray[np.float32] | None = None,
    settings: FinishSettings | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> FinishedGraph:
    """Train a copy of an image tower with int8's rounding inside, and trace it.

    Args:
        module: what is traced, see :func:`edgeclip.export.trace.image_graph`.
        config: of the model.
        options: of the graph.
        rows: ``(n, …)`` for its input, at least 32.
        policy: what stays float; without, as for any int8 file.
        scheme: what int8 means.
        quantization: how ranges are chosen, and whether biases are corrected.
        bank: unit embeddings of labels whose order is to be kept.
        settings: how to train.
        on_step: told each step and its loss.

    Raises:
        CalibrationError: too few rows, or no product of the graph is one of the module's.
        ExportError: the trained tower cannot be traced.
    """
    settings = settings or FinishSettings()
    what = "finishing the image tower"
    whole = [each for each in shared() if not isinstance(each, SplitGrouped)]
    graph = apply(trace_image_graph(module, config, options), whole, what="image tower")
    policy = policy or policy_of(graph)
    shaped = onnx.shape_inference.infer_shapes(graph, data_prop=True)
    model = ir.from_proto(shaped)
    nodes = place(model, policy)
    watch = GraphWatch(graph, what=what)
    rows = check_rows(graph, rows, what=what)
    method = quantization.method or method_of(policy)
    ranges = observe(watch, rows, observed(model, nodes, scheme), method, scheme=scheme, what=what)
    sources = corrected(model, nodes) if quantization.correct_biases else {}
    seen = means(watch, rows, tuple(dict.fromkeys(sources.values())))
    average = {name: seen[source] for name, source in sources.items()}
    products = rounded_products(model, module, nodes, ranges, scheme, average)
    if not products:
        raise CalibrationError(
            f"{what}: none of the graph's {len(nodes)} products is the tower's; export without finishing."
        )
    finished = finish_int8(module, products, scheme, rows, bank=bank, settings=settings, on_step=on_step)
    traced = apply(trace_image_graph(finished.tower, config, options), shared(), what="image tower")
    return FinishedGraph(traced, finished, len(nodes), len(products), settings)


def rounded_products(
    model: ir.Model,
    module: nn.Module,
    nodes: tuple[str, ...],
    ranges: Ranges,
    scheme: Scheme,
    average: Mapping[str, NDArray[np.float64]] = MappingProxyType({}),
) -> dict[str, RoundedProduct]:
    """Return what int8 rounds around products, by the parameter of the module that is their weight.

    Linear maps stand in graphs with their weight as it is, or transposed. Weights are told by what they hold.

    Args:
        model: the graph, traced from ``module``.
        module: with parameters.
        nodes: outputs of the products.
        ranges: of what is rounded.
        scheme: what int8 means.
        average: mean of each channel of what goes into products whose bias is corrected, by their output.
    """
    names: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            array = parameter.detach().numpy()
            names[_told(array)] = name
            if array.ndim == 2:
                names.setdefault(_told(array.T), name)
    chosen, found = set(nodes), {}
    for node in model.graph:
        if node.outputs[0].name not in chosen:
            continue
        weight, source = constant(node.inputs[1]), node.inputs[0]
        assert weight is not None
        assert source is not None
        parameter_name = names.get(_told(weight))
        if parameter_name is None:
            continue
        output = None
        if scheme.integer_outputs and node.op_type == "Conv":
            output = ranges[clamped(node.outputs[0]).name or ""]
        mean = average.get(node.outputs[0].name or "")
        found[parameter_name] = RoundedProduct(ranges[source.name or ""], output, mean)
    return found


def _told(array: NDArray[Any]) -> str:
    content = np.ascontiguousarray(array)
    return f"{content.shape} {hashlib.sha256(content.data).hexdigest()}"
