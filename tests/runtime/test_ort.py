"""ONNX Runtime: what was asked for is what runs, every failure is ours, and nothing leaves the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeclip.bundle import Bundle, TowerFiles
from edgeclip.cache import HostCache
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError
from edgeclip.runtime import RuntimeOptions, open_session
from edgeclip.runtime.host import usable_cores
from edgeclip.runtime.ort import import_onnxruntime

FEEDS = {"image": np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)}


@pytest.fixture(scope="module")
def tower(tiny_bundle_session: Path) -> TowerFiles:
    return Bundle.open(tiny_bundle_session).variant("onnx-fp32").tower("image")


@pytest.fixture(scope="module")
def int8_tower(tiny_bundle_session: Path) -> TowerFiles:
    return Bundle.open(tiny_bundle_session).variant("onnx-int8").tower("image")


def test_provider_missing_after_load_is_an_error(tower: TowerFiles) -> None:
    with pytest.raises(BackendUnavailableError, match=r"CUDAExecutionProvider.*CPUExecutionProvider"):
        open_session(tower, options=RuntimeOptions(backend="ort", providers=("CUDAExecutionProvider",)))


def test_a_gpu_that_is_not_here_is_an_error_with_the_way_out(tower: TowerFiles) -> None:
    with pytest.raises(BackendUnavailableError, match="onnxruntime-gpu in the place of onnxruntime"):
        open_session(tower, options=RuntimeOptions(device="cuda:0"))


def test_a_provider_that_does_not_start_is_an_error(
    tower: TowerFiles, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    # The library says it has CUDA, and then runs on the CPU with nothing but a warning.
    ort = import_onnxruntime()
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    options = RuntimeOptions(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        open_session(tower, options=options)


def test_a_device_of_openvino_is_an_error(tower: TowerFiles) -> None:
    with pytest.raises(BackendUnavailableError, match=r"'ort' does not run on 'gpu:1'.*backend='openvino'"):
        open_session(tower, options=RuntimeOptions(device="gpu:1"))


def test_device_and_providers_that_contradict_each_other_are_an_error(tower: TowerFiles) -> None:
    options = RuntimeOptions(device="cuda:0", providers=("CPUExecutionProvider",))
    with pytest.raises(ConfigError, match=r"got 'CPUExecutionProvider' first for device 'cuda:0'"):
        open_session(tower, options=options)


def test_the_placement_says_where_and_why(tower: TowerFiles) -> None:
    with open_session(tower, options=RuntimeOptions(threads=1)) as session:
        chosen = session.chosen
    assert (chosen.backend, chosen.provider, chosen.device) == ("ort", "CPUExecutionProvider", "cpu")
    assert (chosen.threads, chosen.precision) == (1, "fp32")
    assert chosen.reason == "backend ort runs onnx files; 1 thread(s) asked for"


def test_without_a_number_the_usable_cores_are_taken(tower: TowerFiles) -> None:
    with open_session(tower) as session:
        assert session.chosen.threads == usable_cores()
        assert "usable cores" in session.chosen.reason


@pytest.mark.parametrize(
    "options",
    [
        RuntimeOptions(threads=1),
        RuntimeOptions(threads=3),
        RuntimeOptions(spinning=True, threads=2),
        RuntimeOptions(low_memory=True),
        RuntimeOptions(providers=("CPUExecutionProvider",)),
        RuntimeOptions(affinity=(0,) * min(2, usable_cores())),
    ],
    ids=["one thread", "three threads", "spinning", "low memory", "provider", "affinity"],
)
def test_how_it_runs_does_not_change_the_answers(tower: TowerFiles, options: RuntimeOptions) -> None:
    with open_session(tower, options=RuntimeOptions(threads=1)) as session:
        expected = session.run(FEEDS)["image_embedding"]
    with open_session(tower, options=options) as session:
        # Sums over a few hundred float32 terms in another order.
        np.testing.assert_allclose(session.run(FEEDS)["image_embedding"], expected, atol=1e-5)


def test_one_thread_for_each_cpu_of_the_affinity(tower: TowerFiles) -> None:
    with open_session(tower, options=RuntimeOptions(affinity=(0,))) as session:
        assert session.chosen.threads == 1
        assert "on CPUs (0,)" in session.chosen.reason


def test_a_cpu_this_process_may_not_use_is_an_error(tower: TowerFiles) -> None:
    with pytest.raises(
        ConfigError, match=r"affinity: CPU 4095 is not usable by this process, expected some of \[0"
    ):
        open_session(tower, options=RuntimeOptions(affinity=(0, 4095)))


def test_nodes_that_would_fall_back_to_the_cpu_are_an_error(tower: TowerFiles) -> None:
    """Azure's provider is in every wheel and runs none of our nodes."""
    if "AzureExecutionProvider" not in import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has the CPU provider alone")
    options = RuntimeOptions(providers=("AzureExecutionProvider",))
    with pytest.raises(
        BackendUnavailableError, match=r"wholly on the provider asked for .*Add 'CPUExecutionProvider'"
    ):
        open_session(tower, options=options)


def test_session_keys_of_the_bundle_reach_the_engine(int8_tower: TowerFiles) -> None:
    exact = replace(int8_tower, session_config={"session.x64quantprecision": "1"})
    with open_session(exact) as session:
        settings = session._engine._session.get_session_options()  # type: ignore[union-attr]
        assert settings.get_session_config_entry("session.x64quantprecision") == "1"
        assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert settings.inter_op_num_threads == 1


def damaged(tower: TowerFiles, tmp_path: Path, content: bytes) -> TowerFiles:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    return replace(tower, model=path, files=(path,))


@pytest.mark.parametrize("kind", ["empty", "noise", "half", "flipped"])
def test_a_damaged_file_is_one_sentence_that_names_it(
    tower: TowerFiles, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = tower.model.read_bytes()
    content = {
        "empty": b"",
        "noise": np.random.default_rng(0).bytes(5000),
        "half": whole[: len(whole) // 2],
        "flipped": whole[:10] + b"\xff" * 40 + whole[50:],
    }[kind]
    with pytest.raises(
        BackendError, match=r"onnx-fp32 image tower: ONNX Runtime \S+ cannot load 'damaged.onnx'"
    ):
        open_session(damaged(tower, tmp_path, content))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")  # the library does not print either


def test_a_newer_opset_says_to_update(tower: TowerFiles, tmp_path: Path) -> None:
    model = onnx.load(tower.model)
    model.opset_import[0].version = 999
    with pytest.raises(BackendError, match=r"needs a newer ONNX Runtime .*pip install -U onnxruntime"):
        open_session(damaged(tower, tmp_path, model.SerializeToString()))


def test_an_unknown_operator_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(graph([helper.make_node("NoSuchOperator", ["x"], ["y"])]), path)
    with pytest.raises(BackendError, match=r"cannot load 'odd.onnx'.*NoSuchOperator"):
        open_session(path)


def test_a_type_we_do_not_pass_on_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    onnx.save(graph([helper.make_node("Identity", ["x"], ["y"])], dtype=TensorProto.STRING), path)
    with pytest.raises(
        BackendError, match=r"'x' has the type 'tensor\(string\)', expected one of bool, float16"
    ):
        open_session(path)


def test_weights_that_lie_elsewhere_and_are_gone_are_named(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    weight = numpy_helper.from_array(np.ones((4, 4096), np.float32), "w")
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], initializer=[weight])
    onnx.save(model, path, save_as_external_data=True, location="big.data", size_threshold=0)
    (tmp_path / "big.data").unlink()
    with pytest.raises(BackendError, match=r"cannot load 'big.onnx'.*big.data"):
        open_session(path)


def test_a_failure_while_running_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "reshape.onnx"
    shape = numpy_helper.from_array(np.array([7, 7], np.int64), "shape")
    onnx.save(graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], initializer=[shape]), path)
    with (
        open_session(path) as session,
        pytest.raises(BackendError, match=r"reshape.onnx: ONNX Runtime failed: .*Reshape") as caught,
    ):
        session.run({"x": np.zeros((2, 4), np.float32)})
    assert "\n" not in str(caught.value)


def test_too_large_a_batch_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "expand.onnx"
    shape = numpy_helper.from_array(np.array([1 << 22, 1 << 22, 1], np.int64), "shape")
    onnx.save(graph([helper.make_node("Expand", ["x", "shape"], ["y"])], initializer=[shape]), path)
    with (
        open_session(path) as session,
        pytest.raises(BackendError, match=r"expand.onnx: out of memory .*smaller batch"),
    ):
        session.run({"x": np.zeros((1, 4), np.float32)})


NOTHING_LEAVES = """
    import os, sys, threading, time
    from edgeclip.runtime import open_session
    before = set(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else set()
    import numpy as np
    with_numpy = set(os.listdir("/proc/self/task")) if before else set()
    from edgeclip.runtime.ort import import_onnxruntime
    import_onnxruntime()
    after = set(os.listdir("/proc/self/task")) if before else set()
    assert after == with_numpy, "importing onnxruntime has started a thread"
    with open_session(sys.argv[1]) as session:
        session.run({"image": np.zeros((1, 32, 32, 3), np.uint8)})
    time.sleep(0.3)
"""


def test_onnxruntime_reports_to_nobody(tower: TowerFiles, tmp_path: Path) -> None:
    """It would start an uploader and keep a device identifier in the user's cache, as it does elsewhere."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, "-c", textwrap.dedent(NOTHING_LEAVES), str(tower.model)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


def test_signals_and_threads_of_the_process_are_left_alone(tower: TowerFiles) -> None:
    code = """
        import os, signal, sys
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        from edgeclip.runtime import RuntimeOptions, open_session
        session = open_session(sys.argv[1], options=RuntimeOptions(affinity=(0, 0)))
        assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}
        assert affinity is None or affinity == os.sched_getaffinity(0)
        assert not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ) - set(sys.argv[2].split())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tower.model), " ".join(os.environ)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stderr) == (0, "")


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


# --- the optimised graph in the cache


def graphs(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.startswith(("graph-", "new-")))


@pytest.fixture
def cached(tmp_path: Path) -> RuntimeOptions:
    return RuntimeOptions(threads=1, cache_dir=tmp_path)


@pytest.mark.parametrize("variant", ["onnx-fp32", "onnx-int8"])
def test_a_graph_from_the_cache_answers_to_the_last_bit(
    tiny_bundle_session: Path, tmp_path: Path, cached: RuntimeOptions, variant: str
) -> None:
    tower = Bundle.open(tiny_bundle_session).variant(variant).tower("image")
    answers, reasons = [], []
    for options in (RuntimeOptions(threads=1), cached, cached):
        with open_session(tower, options=options) as session:
            answers.append(session.run(FEEDS)["image_embedding"])
            reasons.append(session.chosen.reason.endswith("optimised graph from the cache"))
    assert reasons == [False, False, True]
    np.testing.assert_array_equal(answers[1], answers[0])
    np.testing.assert_array_equal(answers[2], answers[0])
    assert len(graphs(tmp_path)) == 1


def test_every_tower_and_setting_has_its_own_graph(
    tower: TowerFiles, int8_tower: TowerFiles, tmp_path: Path, cached: RuntimeOptions
) -> None:
    exact = replace(int8_tower, session_config={"session.x64quantprecision": "1"})
    for one in (tower, int8_tower, exact):
        open_session(one, options=cached).close()
    assert len(graphs(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "other content"])
def test_a_damaged_graph_is_made_again(
    tower: TowerFiles, tmp_path: Path, cached: RuntimeOptions, damage: str
) -> None:
    open_session(tower, options=cached).close()
    (path,) = graphs(tmp_path)
    whole = path.read_bytes()
    if damage == "other content":
        HostCache(tmp_path, writable=True).put(path.name, b"not a graph, with a good checksum")
    else:
        path.write_bytes(whole[:-100] if damage == "cut" else whole[:500] + b"\xff" + whole[501:])
    for from_cache in (False, True):
        with open_session(tower, options=cached) as session:
            session.run(FEEDS)
            assert ("from the cache" in session.chosen.reason) is from_cache
    assert graphs(tmp_path) == [path]


def test_a_cache_that_does_not_exist_or_refuses_costs_nothing_but_time(
    tower: TowerFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_session(tower, options=RuntimeOptions(cache_dir=tmp_path / "none")).close()
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("edgeclip.runtime.ort.secrets.token_hex", lambda size: "no-such-folder/x" * 40)
    with open_session(tower, options=RuntimeOptions(cache_dir=tmp_path)) as session:
        session.run(FEEDS)


def test_a_bare_file_keeps_no_graph(tower: TowerFiles, tmp_path: Path, cached: RuntimeOptions) -> None:
    open_session(tower.model, options=cached).close()
    assert graphs(tmp_path) == []


def test_little_memory_takes_the_same_graph(
    tower: TowerFiles, tmp_path: Path, cached: RuntimeOptions
) -> None:
    little = replace(cached, low_memory=True)
    with open_session(tower, options=little) as made, open_session(tower, options=little) as opened:
        assert "from the cache" not in made.chosen.reason
        assert "from the cache" in opened.chosen.reason
        answers = [session.run(FEEDS)["image_embedding"] for session in (made, opened)]
    np.testing.assert_array_equal(answers[0], answers[1])
    with open_session(tower, options=cached) as plain:
        np.testing.assert_allclose(plain.run(FEEDS)["image_embedding"], answers[0], atol=1e-5)
    assert len(graphs(tmp_path)) == 1


def test_a_file_that_does_not_load_fails_with_its_reason_and_leaves_nothing(
    tower: TowerFiles, tmp_path: Path, cached: RuntimeOptions
) -> None:
    with pytest.raises(BackendError, match="no ONNX file, or damaged"):
        open_session(damaged(tower, tmp_path, b"\xff" * 100), options=cached)
    assert graphs(tmp_path) == []


def test_onnxruntime_is_imported_with_its_telemetry_off(repo: Path) -> None:
    """Whoever needs more of it than sessions, such as its quantizer, calls ``import_onnxruntime`` first."""
    folders = [repo / name for name in ("edgeclip", "calibration", "export")]
    texts = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    assert len(texts) > 20
    careless = [
        path.relative_to(repo).as_posix()
        for path, text in texts.items()
        if re.search(r"^\s*(import|from) onnxruntime\b", text, re.MULTILINE)
        and "import_onnxruntime()" not in text
    ]
    assert careless == []
