"""Building engines with NVIDIA's own parser and builder, which need no GPU (TensorRT-RTX)."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from fake_cuda import RtxAs
from onnx import TensorProto, helper, numpy_helper

from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError
from edgeclip.runtime import trt_build
from edgeclip.runtime.session import BACKENDS, RuntimeOptions, resolve_backend
from edgeclip.runtime.trt_build import (
    BatchRange,
    EngineLog,
    build_engine,
    compute_capabilities,
    import_tensorrt,
)

pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)


@pytest.fixture(scope="module")
def trt() -> Any:
    return import_tensorrt("tensorrt_rtx")


def tiny_graph(*, batch: int | str = "batch") -> onnx.ModelProto:
    """Return a convolution and a pool over ``(batch, 16, 16, 3)`` uint8 pictures."""
    weight = np.random.default_rng(0).normal(0, 1, (8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "weight"], ["maps"], name="conv"),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 16, 16, 3])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, 8])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "image.onnx"
    onnx.save(tiny_graph(), path)
    return path


def build(trt: Any, model: Path, batch: BatchRange | None = None, **options: Any) -> trt_build.BuiltEngine:
    return build_engine(trt, model, name="tiny image tower", batch=batch or BatchRange(), **options)


# --- what is built


def test_a_network_becomes_an_engine_without_a_gpu(trt: Any, model: Path) -> None:
    built = build(trt, model, BatchRange(1, 2, 4))
    assert built.profile == {"image": ((1, 16, 16, 3), (2, 16, 16, 3), (4, 16, 16, 3))}
    assert len(built.data) > 8 * 3 * 3 * 3 * 4  # the weights at least
    assert built.layers >= 5
    assert built.timing_cache is None


def test_a_fixed_batch_needs_no_profile(trt: Any, tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    onnx.save(tiny_graph(batch=3), path)
    built = build(trt, path)
    assert built.profile == {}
    assert built.data


def test_every_generation_that_is_offered_is_built_for(trt: Any, model: Path) -> None:
    known = compute_capabilities(trt)
    assert "8.6" in known
    assert "12.0" in known
    for capability in known:
        assert build(trt, model, compute_capability=capability).data


def test_weights_beside_the_graph_are_found(trt: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    onnx.save(tiny_graph(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size >= 8 * 3 * 3 * 3 * 4
    assert build(trt, path).data
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BackendError, match=r"cannot parse 'image\.onnx' \(.*initializer: weight\)"):
        build(trt, path)


# --- what fails


def test_a_damaged_file_is_refused_in_tensorrts_words(trt: Any, model: Path) -> None:
    model.write_bytes(model.read_bytes()[:200])
    with pytest.raises(
        BackendError,
        match=r"tiny image tower: TensorRT-RTX \d.* cannot parse 'image\.onnx' "
        r"\(.*Failed to parse the ONNX model\)\. Export",
    ):
        build(trt, model)


def test_an_operator_tensorrt_does_not_have_is_named(trt: Any, tmp_path: Path) -> None:
    graph = tiny_graph()
    graph.graph.node[3].op_type = "GlobalBogusPool"
    path = tmp_path / "image.onnx"
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(BackendError, match=r"cannot parse.*GlobalBogusPool pool: .*Plugin not found"):
        build(trt, path)


def test_a_batch_the_network_cannot_have_is_refused_in_tensorrts_words(trt: Any, tmp_path: Path) -> None:
    """A reshape to three rows allows a batch of three and no other."""
    graph = tiny_graph()
    graph.graph.initializer.append(numpy_helper.from_array(np.array([3, 8], np.int64), "three"))
    graph.graph.node[4].CopyFrom(helper.make_node("Reshape", ["pooled", "three"], ["embedding"], name="fix"))
    path = tmp_path / "image.onnx"
    onnx.save(graph, path)
    with pytest.raises(BackendError, match=r"cannot build 'image\.onnx' for batches 1/1/8 \(.*[Rr]eshape"):
        build(trt, path)


def test_a_second_free_size_is_refused(trt: Any, tmp_path: Path) -> None:
    graph = tiny_graph()
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"
    path = tmp_path / "image.onnx"
    onnx.save(graph, path)
    with pytest.raises(BackendError, match=r"'image' has the shape \(-1, -1, 16, 3\), expected a free batch"):
        build(trt, path)


def test_a_profile_that_tensorrt_refuses_is_an_error(trt: Any, model: Path) -> None:
    wrong = BatchRange()
    object.__setattr__(wrong, "smallest", 9)  # past the check, to see what TensorRT's own does
    with pytest.raises(BackendError, match=r"refuses the batches 9/1/8 \(.*profile"):
        build(trt, model, wrong)


def test_an_unknown_generation_is_an_error(trt: Any, model: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"compute capability '9\.0', expected one of 7\.5, 8\.0"
    ):
        build(trt, model, compute_capability="9.0")


def test_the_gpu_at_hand_is_missed_in_cudas_words(trt: Any, model: Path) -> None:
    try:
        from edgeclip.runtime.cuda import find_gpu

        find_gpu()
    except BackendUnavailableError:
        pass
    else:
        pytest.skip("there is a GPU")
    data = build(trt, model).data
    log = EngineLog.of(trt)
    log.begin()
    assert trt.Runtime(log.logger).deserialize_cuda_engine(data) is None
    assert "CUDA driver version is insufficient" in log.last()


# --- progress and interruption


def test_stages_are_told(trt: Any, model: Path) -> None:
    stages: list[str] = []
    build(trt, model, on_progress=stages.append)
    assert "Building engine" in stages
    assert len(stages) > 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_what_progress_raises_ends_the_build(trt: Any, model: Path, error: type[BaseException]) -> None:
    told: list[str] = []

    def on_progress(said: str) -> None:
        told.append(said)
        if len(told) == 3:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        build(trt, model, on_progress=on_progress)
    assert len(told) == 3
    assert build(trt, model).data  # and the next build is as ever


@pytest.mark.parametrize("while_building", [False, True])
def test_ctrl_c_while_tensorrt_logs_is_not_lost(trt: Any, model: Path, while_building: bool) -> None:
    """TensorRT swallows what its log raises, and that is where Python would raise the interrupt."""
    usual = signal.getsignal(signal.SIGINT)
    stages: list[str] = []

    class Pressed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if bool(stages) == while_building and not pressed:
                pressed.append(record.getMessage())
                signal.raise_signal(signal.SIGINT)

    pressed: list[str] = []
    logger = logging.getLogger("edgeclip.runtime.trt_build")
    handler = Pressed()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(trt, model, on_progress=stages.append)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert pressed
    assert bool(stages) == while_building
    assert signal.getsignal(signal.SIGINT) is usual
    assert build(trt, model).data


# --- TensorRT 10 and 11 by way of RTX, whose API is theirs


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 1), ("11.4.0.106", 0)])
def test_networks_are_strongly_typed_in_10_and_11(trt: Any, model: Path, version: str, flags: int) -> None:
    module = RtxAs(trt, version)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # RTX's timing cache does nothing, and says so
        built = build(module, model)
    assert module.flags == [flags << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]
    assert built.data
    assert built.timing_cache  # TensorRT's is kept for the next build


def test_tensorrt_itself_builds_for_the_gpu_at_hand_alone(trt: Any, model: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"TensorRT 10\.3\.0 cannot build .*'8\.6', expected none"
    ):
        build(RtxAs(trt, "10.3.0"), model, compute_capability="8.6")


def test_a_timing_cache_that_does_not_fit_is_begun_anew() -> None:
    made: list[bytes] = []
    config = SimpleNamespace(
        create_timing_cache=lambda data: made.append(data) or data,
        set_timing_cache=lambda timing, ignore: timing == b"",
    )
    module = SimpleNamespace(__name__="tensorrt")
    assert trt_build._set_timing_cache(module, config, b"of another GPU") == b""
    assert made == [b"of another GPU", b""]
    refusing = SimpleNamespace(create_timing_cache=lambda data: None)
    assert trt_build._set_timing_cache(module, refusing, b"") is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("Builder", r"TensorRT 10\.3\.0 cannot start: it finds no usable GPU \(CUDA initialization failure"),
        ("create_network", r"gives no network \(out of memory\)"),
        ("create_builder_config", r"gives no build configuration \(out of memory\)"),
    ],
)
def test_nothing_made_is_an_error_with_the_last_line_of_the_log(
    trt: Any, model: Path, broken: str, message: str
) -> None:
    class Module(RtxAs):
        def Builder(self, logger: Any) -> Any:
            severity = self._real.ILogger.Severity
            if broken == "Builder":
                logger.log(severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            real = self._real.Builder(logger)

            def nothing(*_: Any) -> None:
                logger.log(severity.WARNING, "not this one")
                logger.log(severity.INTERNAL_ERROR, "out of memory.")
                logger.log(severity.ERROR, "catchCudaError: there is no GPU")

            made = {
                "create_network": real.create_network,
                "create_builder_config": real.create_builder_config,
            }
            return SimpleNamespace(**{**made, broken: nothing})

    module = Module(trt, "10.3.0")
    with pytest.raises(BackendError, match=message):
        build(module, model)


def test_the_log_goes_to_logging(trt: Any, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "edgeclip.runtime.trt_build"):
        build(trt, model)
    assert any("image with dtype: uint8, dimensions: (-1, 16, 16, 3)" in line for line in caplog.messages)


# --- finding the module


def test_the_bindings_alone_are_enough() -> None:
    assert BACKENDS["tensorrt_rtx"].unavailable() is None
    assert resolve_backend("tensorrt", RuntimeOptions(backend="tensorrt_rtx"))[0] == "tensorrt_rtx"
    assert import_tensorrt("tensorrt_rtx").__name__ in ("tensorrt_rtx", "tensorrt_rtx_bindings")


def test_a_module_that_does_not_import_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_bindings", None)
    with pytest.raises(
        BackendUnavailableError, match=r"'tensorrt' cannot be used: tensorrt: .*tensorrt_bindings: "
    ):
        import_tensorrt("tensorrt")


def test_a_tensorrt_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    module.__version__ = "8.6.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BackendUnavailableError, match=r"got TensorRT 8\.6\.1, expected 10 or newer"):
        import_tensorrt("tensorrt")
    module.__version__ = "10.3.0"  # type: ignore[attr-defined]
    assert import_tensorrt("tensorrt") is module


# --- batches


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", "8/8/8"), ("1,8", "1/1/8"), ("8, 1", "1/8/8"), ("1/4/16", "1/4/16"), (" 2 / 2 / 2 ", "2/2/2")],
)
def test_batches_are_read(text: str, expected: str) -> None:
    assert str(BatchRange.parse(text)) == expected


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "1/2", "-1", "1.5", "1/2/3/4"])
def test_batches_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"got {text!r}, expected N"):
        BatchRange.parse(text)


@pytest.mark.parametrize("text", ["0", "4/2/8", "1/9/8", "0,4"])
def test_batches_in_no_order_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"got \d/\d/\d, expected 1 <= MIN"):
        BatchRange.parse(text)
