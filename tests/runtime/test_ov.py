"""OpenVINO: what was asked for is what runs, every failure is ours, and nothing leaves the machine."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.bundle import Bundle, TowerFiles
from edgeclip.cache import HostCache
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError
from edgeclip.runtime import RuntimeOptions, open_session
from edgeclip.runtime.diagnose import diagnose
from edgeclip.runtime.host import usable_cores
from edgeclip.runtime.parity import golden_check
from edgeclip.runtime.session import ModelFiles

if importlib.util.find_spec("openvino") is None:
    pytest.skip("OpenVINO is not installed", allow_module_level=True)

from edgeclip.runtime import ov as backend
from edgeclip.runtime.ov import import_openvino, openvino_devices, prepare

FEEDS = {"image": np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)}
ONE = RuntimeOptions(backend="openvino", threads=1)


@pytest.fixture(scope="module")
def tower(tiny_bundle_session: Path) -> TowerFiles:
    return Bundle.open(tiny_bundle_session).variant("onnx-fp32").tower("image")


@pytest.fixture(scope="module")
def ir_tower(tower: TowerFiles, tmp_path_factory: pytest.TempPathFactory) -> TowerFiles:
    """Return the same tower as an IR whose two files have names as in a bundle."""
    openvino = import_openvino()
    folder = tmp_path_factory.mktemp("ir")
    openvino.save_model(openvino.Core().read_model(tower.model), folder / "image.xml", compress_to_fp16=False)
    model = (folder / "image.xml").rename(folder / "image.01234567.xml")
    weights = (folder / "image.bin").rename(folder / "image.89abcdef.bin")
    return replace(tower, model=model, files=(model, weights), format="openvino", digest="ab" * 32)


def answers(tower: TowerFiles | Path, options: RuntimeOptions = ONE) -> np.ndarray[Any, Any]:
    with open_session(tower, options=options) as session:
        return session.run(FEEDS)["image_embedding"]


# --- what runs, where and how


def test_its_answers_are_those_of_onnx_runtime(tower: TowerFiles) -> None:
    np.testing.assert_allclose(answers(tower), answers(tower, RuntimeOptions(backend="ort")), atol=1e-5)


def test_the_embedded_bundle_gives_the_right_answers() -> None:
    bundle = Bundle.open("default")
    report = golden_check(bundle, bundle.manifest.default_variants[0], options=ONE)
    assert {name: tower.failures for name, tower in report.towers.items()} == {"image": (), "text": ()}


def test_the_doctor_says_which_devices_there_are() -> None:
    (state,) = (state for state in diagnose().backends if state.name == "openvino")
    assert state.works
    assert f"CPU ({openvino_devices()['CPU']})" in state.detail


def test_an_ir_is_read_with_its_weights_under_another_name(tower: TowerFiles, ir_tower: TowerFiles) -> None:
    options = replace(ONE, backend="auto")
    with open_session(ir_tower, options=options) as session:
        assert session.chosen.backend == "openvino"
        assert session.inputs["image"].shape == ("B", 32, 32, 3)
        assert session.outputs["image_embedding"].dtype == "float32"
    np.testing.assert_allclose(answers(ir_tower, options), answers(tower), atol=1e-6)


def test_a_bare_ir_finds_its_weights_beside_it(ir_tower: TowerFiles, tmp_path: Path) -> None:
    for path, name in zip(ir_tower.files, ("bare.xml", "bare.bin"), strict=True):
        (tmp_path / name).write_bytes(path.read_bytes())
    np.testing.assert_array_equal(answers(tmp_path / "bare.xml"), answers(ir_tower))


def test_the_placement_says_where_and_why(tower: TowerFiles) -> None:
    with open_session(tower, options=ONE) as session:
        chosen = session.chosen
    assert (chosen.backend, chosen.device, chosen.threads, chosen.precision) == ("openvino", "cpu", 1, "fp32")
    assert re.fullmatch(r"OpenVINO 20\d\d\.\S+ CPU", chosen.provider)
    assert chosen.reason == "backend openvino was asked for; 1 thread(s) asked for; floats in f32"


def test_more_threads_than_cores_are_taken_back_aloud(tower: TowerFiles) -> None:
    with open_session(tower, options=replace(ONE, threads=4096)) as session:
        chosen = session.chosen
    assert chosen.threads < 4096
    assert f"OpenVINO uses {chosen.threads}, no more than this host has cores" in chosen.reason


@pytest.mark.parametrize(
    "options",
    [
        RuntimeOptions(threads=2),
        RuntimeOptions(threads=1, spinning=True),
        RuntimeOptions(threads=1, low_memory=True),
        RuntimeOptions(affinity=tuple(sorted(os.sched_getaffinity(0)))),
        RuntimeOptions(device="auto:cpu"),
        RuntimeOptions(device="hetero:cpu", threads=1),
    ],
    ids=["two threads", "spinning", "low memory", "affinity", "auto", "hetero"],
)
def test_how_it_runs_does_not_change_the_answers(tower: TowerFiles, options: RuntimeOptions) -> None:
    got = answers(tower, replace(options, backend="openvino"))
    np.testing.assert_allclose(got, answers(tower), atol=1e-5)


def test_threads_are_pinned_only_where_that_is_asked_for(tower: TowerFiles) -> None:
    every = tuple(sorted(os.sched_getaffinity(0)))
    for options, pinned in ((ONE, False), (RuntimeOptions(backend="openvino", affinity=every), True)):
        with open_session(tower, options=options) as session:
            compiled = session._engine._compiled  # type: ignore[union-attr]
            assert compiled.get_property("ENABLE_CPU_PINNING") is pinned
            assert int(compiled.get_property("NUM_STREAMS")) == 1


@pytest.mark.skipif(usable_cores() < 2, reason="needs two CPUs")
def test_a_choice_of_cpus_that_openvino_cannot_keep_is_an_error(tower: TowerFiles) -> None:
    with pytest.raises(ConfigError, match=r"affinity: got \(0,\) for OpenVINO.*taskset -c 0"):
        open_session(tower, options=RuntimeOptions(backend="openvino", affinity=(0,)))


def test_providers_are_not_openvinos(tower: TowerFiles) -> None:
    options = RuntimeOptions(backend="openvino", providers=("CPUExecutionProvider",))
    with pytest.raises(ConfigError, match=r"providers: got \('CPUExecutionProvider',\) for OpenVINO"):
        open_session(tower, options=options)


@pytest.mark.parametrize("device", ["npu", "gpu:9", "auto:gpu:9,cpu"])
def test_a_device_that_is_not_here_is_an_error(
    tower: TowerFiles, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        available_devices = ("CPU", "GPU.0", "GPU.1")

    monkeypatch.setattr(backend, "_core", lambda: Core())
    missing = device.removeprefix("auto:").removesuffix(",cpu")
    with pytest.raises(
        BackendUnavailableError, match=f"device '{missing}' is not here: OpenVINO sees CPU, GPU.0, GPU.1"
    ):
        open_session(tower, options=RuntimeOptions(backend="openvino", device=device))


def test_nvidias_devices_are_not_openvinos(tower: TowerFiles) -> None:
    with pytest.raises(BackendUnavailableError, match="'openvino' does not run on 'cuda:0'"):
        open_session(tower, options=RuntimeOptions(backend="openvino", device="cuda:0"))


def test_this_host_has_a_cpu_with_a_name() -> None:
    assert openvino_devices()["CPU"]


# --- precision


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_precision_is_set_read_back_and_said(tower: TowerFiles, precision: str) -> None:
    has_half = "FP16" in backend._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    expected = "f16" if has_half and precision != "fp32" else "f32"
    with open_session(replace(tower, precision=precision), options=ONE) as session:
        compiled = session._engine._compiled  # type: ignore[union-attr]
        assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == expected
        assert f"floats in {expected}" in session.chosen.reason
        said = "because CPU has no float16 arithmetic" in session.chosen.reason
        assert said is (precision != "fp32" and not has_half)


def test_a_device_that_computes_otherwise_is_an_error(tower: TowerFiles) -> None:
    """Asked for float16, a CPU that lacks it takes bfloat16 or float32."""
    if "FP16" in backend._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has float16")
    half = replace(tower, session_config={"INFERENCE_PRECISION_HINT": "f16"})
    with pytest.raises(BackendError, match=r"OpenVINO computes in (bf16|f32) on CPU, expected f16"):
        open_session(half, options=ONE)


def test_a_device_without_float32_refuses_float32_towers(
    tower: TowerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Core:
        available_devices = ("NPU",)

        def get_property(self, device: str, name: str) -> list[str]:
            return {"OPTIMIZATION_CAPABILITIES": ["FP16", "INT8", "EXPORT_IMPORT"]}[name]

    monkeypatch.setattr(backend, "_core", lambda: Core())
    with pytest.raises(BackendUnavailableError, match="NPU does not compute in float32, which 'fp32' towers"):
        open_session(tower, options=RuntimeOptions(backend="openvino", device="npu"))


def test_settings_of_the_bundle_reach_the_engine(tower: TowerFiles) -> None:
    asked = replace(
        tower,
        session_config={"EXECUTION_MODE_HINT": "ACCURACY", "session.x64quantprecision": "1"},
    )
    with open_session(asked, options=ONE) as session:
        compiled = session._engine._compiled  # type: ignore[union-attr]
        assert "ACCURACY" in str(compiled.get_property("EXECUTION_MODE_HINT"))
        assert int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 0


# --- failures


def content(kind: str, whole: bytes) -> bytes:
    return {
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(5000),
        "half": whole[: len(whole) // 2],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "noise", "half"])
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_damaged_file_is_one_sentence_that_names_it(
    tower: TowerFiles,
    ir_tower: TowerFiles,
    tmp_path: Path,
    kind: str,
    suffix: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / f"damaged{suffix}"
    of = tower if suffix == ".onnx" else ir_tower
    path.write_bytes(content(kind, of.model.read_bytes()))
    files = (path, *(file for file in of.files if file.suffix == ".bin"))
    expected = rf"onnx-fp32 image tower: OpenVINO \S+ cannot load 'damaged{suffix}'"
    with pytest.raises(BackendError, match=expected) as caught:
        open_session(replace(of, model=path, files=files), options=ONE)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert "Exception from" not in str(caught.value)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")  # the library does not print either


@pytest.mark.parametrize("kind", ["empty", "half", "missing"])
def test_damaged_weights_are_an_error(ir_tower: TowerFiles, tmp_path: Path, kind: str) -> None:
    model, whole = ir_tower.files
    weights = tmp_path / "weights.bin"
    if kind != "missing":
        weights.write_bytes(content(kind, whole.read_bytes()))
    with pytest.raises(
        BackendError,
        match=r"cannot load 'image.01234567.xml'.*(it is damaged, or not a model|a file is missing)",
    ):
        open_session(replace(ir_tower, files=(model, weights)), options=ONE)


def test_an_unknown_operator_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(graph([helper.make_node("NoSuchOperator", ["x"], ["y"])]), path)
    with pytest.raises(BackendError, match=r"odd.onnx: OpenVINO \S+ cannot load .*NoSuchOperator"):
        open_session(path, options=ONE)


def test_shapes_that_do_not_fit_are_our_error(tmp_path: Path) -> None:
    path = tmp_path / "product.onnx"
    weight = numpy_helper.from_array(np.ones((5, 3), np.float32), "w")
    onnx.save(graph([helper.make_node("MatMul", ["x", "w"], ["y"])], initializer=[weight]), path)
    with pytest.raises(BackendError, match=r"cannot load 'product.onnx': Incompatible MatMul .*=4 .*=5"):
        open_session(path, options=ONE)


def test_a_failure_while_running_is_our_error(tower: TowerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def infer(self, feeds: object, **options: object) -> None:
            raise RuntimeError("Exception from src/plugins/intel_cpu/src/node.cpp:12:\nno primitive\n")

    with open_session(tower, options=ONE) as session:
        monkeypatch.setattr(session._engine, "_request", Failing())
        with pytest.raises(BackendError, match=r"^onnx-fp32 image tower: OpenVINO failed: no primitive\.$"):
            session.run(FEEDS)


def test_a_type_we_do_not_pass_on_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "wide.onnx"
    onnx.save(graph([helper.make_node("Identity", ["x"], ["y"])], dtype=TensorProto.UINT64), path)
    with pytest.raises(BackendError, match=r"has the type 'u64', expected one of bool, float16"):
        open_session(path, options=ONE)


def test_memory_that_runs_out_says_what_to_do() -> None:
    error = backend._translated(RuntimeError("Exception from src/a.cpp:1:\nstd::bad_alloc\n"), "x")
    assert "x: out of memory (std::bad_alloc). Use a smaller batch" in str(error)


def test_messages_lose_source_files_and_directories() -> None:
    text = (
        "Exception from src/inference/src/cpp/core.cpp:84:\n"
        "Check 'false' failed at src/frontends/common/src/frontend.cpp:47:\n"
        "FrontEnd API failed with GeneralFailure:\n"
        "Loading input model\n"
        "Can not open file /some/where/none.bin for mapping. Ensure that it is there.\n"
    )
    assert backend.openvino_message(RuntimeError(text)) == "Can not open file none.bin for mapping"


def test_a_refusal_of_a_device_behind_another_is_told(tower: TowerFiles) -> None:
    odd = replace(tower, session_config={"INFERENCE_PRECISION_HINT": "f12"})
    with pytest.raises(
        BackendError, match=r"'.*\.onnx' for AUTO:CPU: Wrong value f12 for property key INFER"
    ):
        open_session(odd, options=replace(ONE, device="auto:cpu"))


def test_a_missing_library_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "edgeclip\[openvino\]"'):
        import_openvino()


def graph(
    nodes: list[onnx.NodeProto],
    *,
    dtype: int = TensorProto.FLOAT,
    initializer: list[onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", dtype, ["B", 4])]
    outputs = [helper.make_tensor_value_info("y", dtype, None)]
    made = helper.make_graph(nodes, "g", inputs, outputs, initializer or [])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


# --- the compiled form in the cache


def blobs(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.endswith(".blob"))


def open_cached(tower: TowerFiles, directory: Path, **changes: Any) -> tuple[np.ndarray[Any, Any], bool]:
    with open_session(tower, options=replace(ONE, cache_dir=directory, **changes)) as session:
        from_cache = session.chosen.reason.endswith("compiled form from the cache")
        return session.run(FEEDS)["image_embedding"], from_cache


def test_a_compiled_form_from_the_cache_answers_to_the_last_bit(ir_tower: TowerFiles, tmp_path: Path) -> None:
    first, was_cached = open_cached(ir_tower, tmp_path)
    second, is_cached = open_cached(ir_tower, tmp_path)
    assert (was_cached, is_cached) == (False, True)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(first, answers(ir_tower))
    assert len(blobs(tmp_path)) == 1


def test_every_tower_precision_and_setting_has_its_own(
    tower: TowerFiles, ir_tower: TowerFiles, tmp_path: Path
) -> None:
    other = replace(ir_tower, session_config={"EXECUTION_MODE_HINT": "ACCURACY"})
    for each in (tower, ir_tower, other):
        open_cached(each, tmp_path)
    if usable_cores() > 1:
        open_cached(tower, tmp_path, threads=2)
    assert len(blobs(tmp_path)) == 3 + (usable_cores() > 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "other content"])
def test_a_damaged_compiled_form_is_made_again(ir_tower: TowerFiles, tmp_path: Path, damage: str) -> None:
    open_cached(ir_tower, tmp_path)
    (path,) = blobs(tmp_path)
    whole = path.read_bytes()
    if damage == "other content":
        HostCache(tmp_path, writable=True).put(path.name, b"no blob, with a good checksum")
    else:
        path.write_bytes(whole[:-100] if damage == "cut" else whole[:500] + b"\xff" + whole[501:])
    assert [open_cached(ir_tower, tmp_path)[1] for _ in range(2)] == [False, True]
    assert blobs(tmp_path) == [path]


def test_a_cache_that_is_not_there_or_not_wanted_costs_nothing_but_time(
    ir_tower: TowerFiles, tmp_path: Path
) -> None:
    assert open_cached(ir_tower, tmp_path / "none")[1] is False
    assert not (tmp_path / "none").exists()
    open_cached(ir_tower, tmp_path, low_memory=True)
    open_cached(ir_tower, tmp_path, device="auto:cpu")
    assert blobs(tmp_path) == []


def test_preparing_keeps_what_opening_takes(ir_tower: TowerFiles, tmp_path: Path) -> None:
    model, options = files_of(ir_tower), replace(ONE, cache_dir=tmp_path)
    said: list[str] = []
    made = prepare(model, options, on_progress=said.append)
    assert said == ["compiling for CPU"]
    assert not made.up_to_date
    assert made.path is not None
    assert made.path.stat().st_size == made.size_bytes
    assert prepare(model, options).up_to_date
    assert not prepare(model, options, force=True).up_to_date
    assert open_cached(ir_tower, tmp_path)[1] is True


def test_what_cannot_be_kept_is_said_when_preparing(
    ir_tower: TowerFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostCache, "put", lambda self, name, data: False)
    with pytest.raises(BackendError, match=f"cannot be kept in '{tmp_path}'. Set EDGECLIP_CACHE_DIR"):
        prepare(files_of(ir_tower), replace(ONE, cache_dir=tmp_path))
    assert open_cached(ir_tower, tmp_path)[1] is False  # opening does without


def files_of(tower: TowerFiles) -> ModelFiles:
    return ModelFiles(
        tower.model,
        "image tower",
        tower.format,
        tower.precision,
        digest=tower.digest,
        files=tower.files,
        variant="openvino-fp32",
        bundle=Path("my-bundle"),
    )


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a GPU: plans are made for it, and say that they are for one."""
    make = backend._Plan.of

    def plan(model: ModelFiles, options: RuntimeOptions) -> backend._Plan:
        return replace(make(model, replace(options, device="cpu")), kind=options.device)

    monkeypatch.setattr(backend._Plan, "of", plan)


@pytest.mark.usefixtures("as_gpu")
def test_a_gpu_compiles_when_that_is_asked_for_and_not_when_a_tower_is_opened(
    ir_tower: TowerFiles, tmp_path: Path
) -> None:
    model, options = files_of(ir_tower), replace(ONE, device="gpu", cache_dir=tmp_path)
    with pytest.raises(
        BackendError,
        match=r"not compiled for CPU on this host.*Run edgeclip compile 'my-bundle' --variant openvino-fp32 "
        "--backend openvino --device gpu",
    ):
        backend.load(model, options, reason="")
    prepare(model, options)
    assert backend.load(model, options, reason="").chosen.device == "gpu:0"
    assert backend.load(model, replace(options, cache_dir=None), reason="").chosen.threads >= 1


@pytest.mark.usefixtures("as_gpu")
def test_the_npu_asks_for_one_batch(ir_tower: TowerFiles) -> None:
    with pytest.raises(BackendError, match=r"NPU takes towers of one batch.*--static-batch 1"):
        backend.load(files_of(ir_tower), replace(ONE, device="npu"), reason="")


# --- nothing leaves, nothing is touched

QUIET = """
    import os, sys
    touched = []
    sys.addaudithook(
        lambda event, arguments: os._exit(99)
        if event.startswith("socket.") and event != "socket.gethostname" else None
    )
    import numpy as np
    {first}
    from edgeclip.runtime import RuntimeOptions, open_session
    with open_session(sys.argv[1], options=RuntimeOptions(backend="openvino")) as session:
        session.run({{"image": np.zeros((1, 32, 32, 3), np.uint8)}})
    assert "openvino_telemetry" not in sys.modules
    assert not [name for name in sys.modules if name.partition(".")[0] in ("torch", "onnx", "nncf")]
"""


def in_a_new_home(code: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # CI is what the reporter itself looks at.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")
    }
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_openvino_reports_to_nobody(tower: TowerFiles, tmp_path: Path) -> None:
    result = in_a_new_home(QUIET.format(first=""), tmp_path, str(tower.model))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.skipif(importlib.util.find_spec("openvino_telemetry") is None, reason="nothing would report")
def test_imported_otherwise_it_would(tmp_path: Path) -> None:
    """Without this, the test above proves nothing."""
    code = """
        import os, sys
        sys.addaudithook(lambda event, arguments: os._exit(9) if event.startswith("socket.") else None)
        import openvino
    """
    in_a_new_home(code, tmp_path)
    assert list(tmp_path.rglob("*")) != []


def test_the_reporter_can_be_imported_by_others_again() -> None:
    before = dict(sys.modules)
    with backend.without_telemetry(), pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")
    assert dict(sys.modules) == before


def test_openvino_is_imported_with_its_telemetry_off(repo: Path) -> None:
    folders = [repo / name for name in ("edgeclip", "calibration", "export")]
    texts = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    careless = [
        path.relative_to(repo).as_posix()
        for path, text in texts.items()
        if re.search(r"^\s*(import|from) (openvino|nncf)\b", text, re.MULTILINE)
        and not re.search(r"import_openvino\(\)|without_telemetry\(\)", text)
    ]
    assert careless == []


def test_signals_and_affinity_of_the_process_are_left_alone(tower: TowerFiles) -> None:
    code = """
        import os, signal, sys
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        names = set(os.environ)
        import numpy as np
        from edgeclip.runtime import RuntimeOptions, open_session
        every = tuple(sorted(affinity)) if affinity else None
        session = open_session(sys.argv[1], options=RuntimeOptions(backend="openvino", affinity=every))
        session.run({"image": np.zeros((1, 32, 32, 3), np.uint8)})
        assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}
        assert affinity is None or affinity == os.sched_getaffinity(0)
        assert set(os.environ) - names <= {"ORT_DISABLE_TELEMETRY"}
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tower.model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
