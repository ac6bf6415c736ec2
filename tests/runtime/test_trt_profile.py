"""Times of TensorRT's layers. What needs no GPU: reading the inspector, and a call against stand-ins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCudart, FakeTensorRT

from edgeclip.bundle import Bundle
from edgeclip.errors import BackendError
from edgeclip.runtime.cuda import CudaRuntime
from edgeclip.runtime.session import KernelTime, Placement, model_files
from edgeclip.runtime.trt import TrtEngine
from edgeclip.runtime.trt_profile import Layer, layers_of

CONV = {
    "Name": "__myl_FusedConv_0x1",
    "LayerType": "CaskConvolution",
    "TacticName": "sm80_xmma_fprop_implicit_gemm",
    "Metadata": "[ONNX Layer: Conv_1]\x1e[ONNX Layer: Gelu_1]\x1f[ONNX Layer: Conv_1]",
}
COPY = {"Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "Reformat", "Metadata": ""}


def test_layers_name_the_nodes_they_compute() -> None:
    assert layers_of(json.dumps({"Layers": [CONV, COPY], "Bindings": ["image"]})) == {
        "__myl_FusedConv_0x1": Layer("sm80_xmma_fprop_implicit_gemm", ("Conv_1", "Gelu_1")),
        "Reformatting CopyNode for Input Tensor 0": Layer("Reformat", ()),
    }


@pytest.mark.parametrize(
    ("metadata", "nodes"),
    [
        ("[ONNX Layer: a][ONNX Layer: b]", ("a", "b")),
        ("[ONNX Layer: x[0]/Conv]\x1f[ONNX Layer: y]", ("x[0]/Conv", "y")),
        ("[ONNX Layer: /stages.0/Conv]", ("/stages.0/Conv",)),
        (None, ()),
        ("something else", ()),
    ],
)
def test_entries_of_metadata(metadata: str | None, nodes: tuple[str, ...]) -> None:
    said = json.dumps({"Layers": [{"Name": "l", "LayerType": "gemm", "Metadata": metadata}]})
    assert layers_of(said) == {"l": Layer("gemm", nodes)}


@pytest.mark.parametrize("said", ["", "no json", "[]", '{"Layers": ["Conv_1 + Gelu_1"]}', '{"Layers": 3}'])
def test_an_engine_that_tells_names_alone_tells_of_no_layer(said: str) -> None:
    assert layers_of(said) == {}


@pytest.fixture
def stand_in(tiny_bundle: Path) -> tuple[FakeTensorRT, TrtEngine]:
    tower = Bundle.open(tiny_bundle).variant("onnx-fp32").tower("image")
    cudart = FakeCudart()
    trt = FakeTensorRT(cudart)
    trt.information = json.dumps({"Layers": [CONV, COPY]})
    chosen = Placement("tensorrt", "TensorRT 10.3.0", "cuda:0", 1, "fp32", "a test")
    data = FakeTensorRT.engine(tower.model.read_bytes())
    model = model_files(tower)
    return trt, TrtEngine(trt, CudaRuntime(cudart), data, model=model, chosen=chosen, index=0)


def pixels(count: int) -> dict[str, Any]:
    return {"image": np.zeros((count, 32, 32, 3), np.uint8)}


def test_every_call_has_its_layers(stand_in: tuple[FakeTensorRT, TrtEngine]) -> None:
    _, engine = stand_in
    engine.run(pixels(1))
    engine.time_layers()
    engine.run(pixels(2))
    engine.run(pixels(10))  # in two parts, of 8 and of 2
    first, second = engine.kernel_times()
    assert first == [
        KernelTime(CONV["Name"], CONV["TacticName"], 2.0, None, ("Conv_1", "Gelu_1")),
        KernelTime(COPY["Name"], "Reformat", 2.0, None, ()),
    ]
    assert [each.ms for each in second] == [8.0, 8.0, 2.0, 2.0]
    engine.close()


def test_an_engine_that_reports_nothing_is_an_error(stand_in: tuple[FakeTensorRT, TrtEngine]) -> None:
    trt, engine = stand_in
    engine.time_layers()
    trt.refuse.add("report_to_profiler")
    with pytest.raises(BackendError, match="TensorRT reports no times"):
        engine.run(pixels(1))
    engine.close()


def test_the_installed_tensorrt_has_what_a_profile_needs() -> None:
    bindings = pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    assert hasattr(bindings, "IProfiler")
    for name in ("profiler", "enqueue_emits_profile", "report_to_profiler"):
        assert hasattr(bindings.IExecutionContext, name)
    assert hasattr(bindings.ICudaEngine, "create_engine_inspector")
    assert "JSON" in bindings.LayerInformationFormat.__members__

    class Profiler(bindings.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            bindings.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            """Take a time."""

    Profiler()
