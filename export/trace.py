"""Trace a checkpoint into two ONNX graphs, one a tower, with everything a device needs inside.

Image graph: ``image`` uint8 ``(B, H, W, 3)`` RGB -> cast, scale, mean and std, transpose, tower, L2 norm ->
``image_embedding`` float32 ``(B, E)``. Text graph: ``tokens`` int32 ``(B, L)`` -> ``text_embedding`` float32
``(B, E)``, unit norm. Batch symbolic, and ``L`` where padding takes no part in the text tower; the rest
static, opset 20, unless :class:`GraphOptions` say otherwise.

The graph to export is a wrapper of its own, so that no tower ever asks whether it is being exported. Towers
are folded in a copy before tracing, and explicit padding goes into the convolutions after it; both are exact.
What tells where and by whom the graph was made (stack traces, module paths, doc strings) is removed, so that
the same checkpoint gives the same bytes from any directory. The full checker runs on every graph.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from edgeclip.errors import ExportError
from edgeclip.models.clip import CLIP
from edgeclip.models.config import CLIPConfig
from edgeclip.models.reparam import reparameterize

from .options import OPSET, OPSETS, GraphOptions
from .passes import apply, check
from .passes.fold_padding import FoldPadding
from .passes.strip_provenance import StripProvenance
from .text_length import LEAST_LENGTH, LENGTH

__all__ = [
    "OPSET",
    "ImageGraph",
    "TextGraph",
    "TracedTowers",
    "check_model",
    "fold_padding",
    "image_graph",
    "strip_provenance",
    "to_bytes",
    "trace",
    "trace_image_graph",
    "trace_image_tower",
    "trace_module",
    "trace_text_tower",
]

_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""Version of the file format that came with an opset: engines refuse files newer than themselves."""
_DEFAULT = GraphOptions()
_EXAMPLE_BATCH = 2  # 0 and 1 would be taken for constants


class ImageGraph(nn.Module):
    """uint8 NHWC pixels to unit embeddings.

    Args:
        tower: ``(B, 3, H, W)`` to ``(B, E)``.
        mean: per channel, on pixels in [0, 1].
        std: per channel, on pixels in [0, 1].
    """

    def __init__(self, tower: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.tower = tower
        # (x/255 - mean)/std as one product and one sum over the channels, computed in float64.
        factor = 1 / (255 * np.asarray(std, np.float64))
        shift = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)
        self.factor: Tensor
        self.shift: Tensor
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float32))
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float32))

    def forward(self, image: Tensor) -> Tensor:
        """Embed ``(B, H, W, 3)`` uint8 pixels."""
        x = image.to(torch.float32) * self.factor + self.shift
        embedding = self.tower(x.permute(0, 3, 1, 2))
        return _normalize(embedding)


class FloatImageGraph(nn.Module):
    """Float NCHW pixels, scaled and normalized on the host, to unit embeddings."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: Tensor) -> Tensor:
        """Embed ``(B, 3, H, W)`` float32 pixels."""
        return _normalize(self.tower(image))


class TextGraph(nn.Module):
    """int32 token ids to unit embeddings."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed ``(B, L)`` token ids."""
        return _normalize(self.tower(tokens))


def _normalize(x: Tensor) -> Tensor:
    # sqrt(sum + tiny) rather than max(norm, eps): fewer nodes, and the gradient-free form every engine fuses.
    return x / (x.square().sum(dim=-1, keepdim=True) + 1e-24).sqrt()


@dataclass(frozen=True)
class TracedTowers:
    """Both graphs; either may be missing where the model has no such tower."""

    image: onnx.ModelProto
    text: onnx.ModelProto

    def by_name(self) -> Mapping[str, onnx.ModelProto]:
        """Return the graphs by tower name."""
        return {"image": self.image, "text": self.text}


def trace(model: CLIP, config: CLIPConfig, options: GraphOptions = _DEFAULT) -> TracedTowers:
    """Trace both towers of a model, which stays as it is.

    Raises:
        ExportError: a graph cannot be traced or fails the checker.
    """
    return TracedTowers(
        trace_image_tower(model.image_tower, config, options),
        trace_text_tower(
            model.text_tower, config.text.context_length, options, free_length=config.text.free_length
        ),
    )


def trace_image_tower(
    tower: nn.Module, config: CLIPConfig, options: GraphOptions = _DEFAULT
) -> onnx.ModelProto:
    """Trace an image tower, folded in a copy, with the preprocessing of ``config`` inside.

    Without it where ``options.float_input`` leaves that to the host.

    Raises:
        ExportError: the tower cannot be traced or fails the checker.
    """
    return trace_image_graph(image_graph(tower, config, options), config, options)


def image_graph(tower: nn.Module, config: CLIPConfig, options: GraphOptions = _DEFAULT) -> nn.Module:
    """Return what is traced of an image tower: a folded copy between its preprocessing and the L2 norm."""
    folded = reparameterize(tower)
    return FloatImageGraph(folded) if options.float_input else ImageGraph(folded, config.mean, config.std)


def trace_image_graph(
    graph: nn.Module, config: CLIPConfig, options: GraphOptions = _DEFAULT
) -> onnx.ModelProto:
    """Trace what :func:`image_graph` returned.

    Raises:
        ExportError: it cannot be traced or fails the checker.
    """
    height, width = config.image_size_px
    batch = options.static_batch or _EXAMPLE_BATCH
    if options.float_input:
        example = torch.zeros(batch, 3, height, width)
    else:
        example = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    return _trace(graph, example, input_name="image", output_name="image_embedding", options=options)


def trace_text_tower(
    tower: nn.Module,
    context_length: int,
    options: GraphOptions = _DEFAULT,
    *,
    free_length: bool = False,
) -> onnx.ModelProto:
    """Trace a text tower for rows of ``context_length`` tokens, folded in a copy.

    Args:
        tower: ``(B, L)`` to ``(B, E)``.
        context_length: tokens a row, at most.
        options: a static batch has a static length, too.
        free_length: let rows be shorter, where the tower gives the same embedding then.

    Raises:
        ExportError: the tower cannot be traced or fails the checker.
    """
    graph = TextGraph(reparameterize(tower))
    example = torch.ones(options.static_batch or _EXAMPLE_BATCH, context_length, dtype=torch.int32)
    return _trace(
        graph,
        example,
        input_name="tokens",
        output_name="text_embedding",
        options=options,
        length=context_length if free_length and context_length > LEAST_LENGTH else None,
    )


def trace_module(
    module: nn.Module, example: Tensor, *, input_name: str = "input", output_name: str = "output"
) -> onnx.ModelProto:
    """Trace a module as it is: no folding, no preprocessing, no L2 norm; for comparisons and parts of towers.

    Args:
        module: one tensor in, one out; put into eval mode and without gradients from here on.
        example: an input with a batch of at least 2, which stays symbolic.
        input_name: of the graph.
        output_name: of the graph.

    Raises:
        ExportError: the module cannot be traced or fails the checker.
    """
    return _trace(module, example, input_name=input_name, output_name=output_name)


def _trace(
    graph: nn.Module,
    example: Tensor,
    *,
    input_name: str,
    output_name: str,
    options: GraphOptions = _DEFAULT,
    length: int | None = None,
) -> onnx.ModelProto:
    """Trace a graph; ``length`` is the most that its second axis may have, where that is free."""
    graph = graph.eval().requires_grad_(False)
    free = {0: torch.export.Dim("batch", min=1, max=1 << 16)}
    if length is not None:
        free[1] = torch.export.Dim(LENGTH, min=LEAST_LENGTH, max=length)
    is_static = options.static_batch is not None
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                opset_version=max(options.opset, _LEAST_TRACED),
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=None if is_static else (free,),
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
        del program  # it holds the weights once more
    except Exception as error:  # the exporter raises whatever its stages stumble over
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"{input_name!r} tower cannot be traced to ONNX opset {options.opset} "
            f"({type(error).__name__}: {reason})."
        ) from error
    if options.opset < _LEAST_TRACED:
        _say_as_before(model)
    for clean in (fold_padding, strip_provenance):
        clean(model)
        model = _fresh(model)
        gc.collect()  # passes leave circles behind that hold the weights
    if not is_static:
        _name_axes(model, free_length=length is not None)
    model.ir_version = _IR_VERSIONS[options.opset]
    check_model(model, what=f"{input_name!r} tower", opset=options.opset)
    return model


def _fresh(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy: a message that was written over keeps what it held before until it goes itself."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


_LEAST_TRACED = 18
"""The exporter writes none older, whatever it is asked for."""


def _say_as_before(model: onnx.ModelProto) -> None:
    """Say in opset 17 what opset 18 says: sizes for Split's ``num_outputs``, axes of reductions as attribute.

    The checker, which runs afterwards, finds whatever else 18 brought.
    """
    graph = model.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        attributes = {each.name: each for each in node.attribute}
        if node.op_type == "Split" and "num_outputs" in attributes:
            axis = attributes["axis"].i if "axis" in attributes else 0
            sizes = [shapes[name][axis].dim_value for name in node.output]
            node.attribute.remove(attributes["num_outputs"])
            name = f"{node.output[0]}_sizes"
            graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
            node.input.append(name)
        elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) == 2:
            axes = numpy_helper.to_array(tensors[node.input.pop()]).tolist()
            node.attribute.append(helper.make_attribute("axes", axes))
            if "noop_with_empty_axes" in attributes:
                node.attribute.remove(attributes["noop_with_empty_axes"])
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = _LEAST_TRACED - 1


def check_model(model: onnx.ModelProto, *, what: str, opset: int | None = None) -> None:
    """Run the full checker: types and shapes of every node.

    Args:
        model: the graph.
        what: how messages name it.
        opset: the one it must have; ``None`` for any that an export may have.

    Raises:
        ExportError: the graph is not valid ONNX, or not of that opset alone.
    """
    check(model, what=what)
    expected = OPSETS if opset is None else (opset,)
    imported = {entry.domain: entry.version for entry in model.opset_import}
    if imported.get("") not in expected or any(imported[domain] for domain in imported if domain):
        raise ExportError(
            f"{what}: it imports the operator sets {imported}, expected ONNX's own alone, "
            f"{' or '.join(map(str, expected))}."
        )


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Return the serialized graph; equal graphs give equal bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def fold_padding(model: onnx.ModelProto) -> int:
    """Run :class:`~.passes.fold_padding.FoldPadding` over a graph in place; return how many it moved."""
    each = FoldPadding()
    model.CopyFrom(apply(model, [each], what=model.graph.name))
    return each.folded


def strip_provenance(model: onnx.ModelProto) -> None:
    """Run :class:`~.passes.strip_provenance.StripProvenance` over a graph in place.

    Empty notes are written out and notes of shapes stay in their order, as in all files of the embedded
    bundle.
    """
    shapes = list(model.graph.value_info)
    stripped = apply(model, [StripProvenance()], what=model.graph.name)
    del stripped.graph.value_info[:]
    stripped.graph.value_info.extend(shapes)
    model.CopyFrom(stripped)
    model.producer_version, model.domain, model.model_version = "", "", 0
    graph = model.graph
    for value in graph.value_info:
        del value.metadata_props[:]
    for part in (
        model,
        graph,
        *graph.node,
        *graph.initializer,
        *graph.value_info,
        *graph.input,
        *graph.output,
    ):
        part.doc_string = ""


def _name_axes(model: onnx.ModelProto, *, free_length: bool) -> None:
    """Call the first axis of inputs and outputs ``batch``, and a free second one of inputs ``length``."""
    graph = model.graph
    axes = [(value, 0, "batch") for value in (*graph.input, *graph.output)]
    if free_length:
        axes += [(value, 1, LENGTH) for value in graph.input]
    for value, axis, name in axes:
        dims = value.type.tensor_type.shape.dim
        if len(dims) <= axis or dims[axis].WhichOneof("value") == "dim_value":
            raise ExportError(
                f"{value.name!r}: the exporter made the {name} a constant; trace with an example of 2 rows, "
                "and a network that asks for no size."
            )
        dims[axis].dim_param = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and deprecation notes to itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
