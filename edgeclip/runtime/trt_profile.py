"""What TensorRT says of the layers of an engine: how long each took, and which nodes of the file it computes.

Both TensorRT and TensorRT-RTX call a profiler back once a layer, after a call has ended. Which nodes went
into a layer stands in what the engine inspector says, for engines that were built with detailed verbosity, as
ours are; of others, and of layers of TensorRT's own, the name is all there is.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

from edgeclip.runtime.session import KernelTime

__all__ = ["Layer", "LayerTimes", "layers_of"]

# Entries follow each other with a separator of ASCII between them, or with none.
_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1c-\x1f]|\[ONNX Layer: |\s*$)")


class Layer(NamedTuple):
    """A layer of an engine: its code (tactic, else kind), and the nodes of the ONNX file it computes."""

    kernel: str
    nodes: tuple[str, ...]


def layers_of(information: str) -> dict[str, Layer]:
    """Return the layers of an engine by name.

    Args:
        information: what an engine inspector gives as JSON. What is no JSON, or has names alone, tells of no
            layer: nothing of it is needed to run.
    """
    try:
        said = json.loads(information)
    except ValueError:
        return {}
    listed = said.get("Layers") if isinstance(said, dict) else None
    found: dict[str, Layer] = {}
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, dict) and each.get("Name"):
            kernel = str(each.get("TacticName") or each.get("LayerType") or "layer")
            nodes = dict.fromkeys(_NODE.findall(str(each.get("Metadata") or "")))
            found[str(each["Name"])] = Layer(kernel, tuple(nodes))
    return found


class LayerTimes:
    """Times of layers, call by call, as a context reports them.

    Args:
        trt: the module.
        engine: TensorRT's.
        context: of the engine, which reports here from now on.
    """

    def __init__(self, trt: Any, engine: Any, context: Any) -> None:
        inspector = engine.create_engine_inspector()
        said = "" if inspector is None else inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        self._layers = layers_of(said or "")
        self._calls: list[list[KernelTime]] = []
        self._context = context
        self._profiler = _profiler(trt, self._note)
        context.profiler = self._profiler
        context.enqueue_emits_profile = False  # else a call waits for the GPU while it is being handed over

    def begin(self) -> None:
        """Begin a call."""
        self._calls.append([])

    def collect(self) -> bool:
        """Let the context report what has ended; return whether it did."""
        return bool(self._context.report_to_profiler())

    def calls(self) -> list[list[KernelTime]]:
        """Return the layers of every call so far, in the order TensorRT reports them."""
        return [list(call) for call in self._calls]

    def close(self) -> None:
        """Let go of TensorRT's objects."""
        self._context = None

    def _note(self, name: str, ms: float) -> None:
        layer = self._layers.get(name, Layer("layer", ()))
        self._calls[-1].append(KernelTime(name, layer.kernel, ms, None, layer.nodes))


def _profiler(trt: Any, note: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # a class of a module found when it is needed
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # TensorRT wants it by name

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            note(str(layer_name), float(ms))

    return Profiler()
