"""The simulation of int8 kernels against loops, against engines here, and under emulated AVX2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.calibration.saturation import (
    CHANNEL_BLOCKS,
    Adding,
    Detection,
    compare,
    convolve,
    detect,
    gelu_layer,
    linear,
    patches,
    quantized_layer,
    sums,
)
from edgeclip.errors import CalibrationError
from edgeclip.quantization import TENSORRT, Scheme, weight_steps
from edgeclip.runtime import probe_graphs
from edgeclip.runtime.byte_sums import adds_in_16_bits, run_graph

QEMU = shutil.which("qemu-x86_64")
CHILD = Path(__file__).parents[1] / "tools" / "engine_sums.py"
WAYS: tuple[Adding, ...] = ("32-bit", "16-bit pairs")
S8S8 = Scheme(signed=True, symmetric=True)  # what ONNX Runtime's documentation recommends first
OURS = Scheme(fit_pairs=True)  # what x86-avx2 and no target get
EXACT = {"session.x64quantprecision": "1"}


def drawn(kind: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    info = np.iinfo(kind)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(kind)


# --- the simulation alone


def looped(a: NDArray[Any], b: NDArray[Any]) -> list[list[int]]:
    """vpmaddubsw as Intel describes it, in Python's own numbers."""
    table = []
    for row in a.tolist():
        line = []
        for column in b.T.tolist():
            total = 0
            for start in range(0, len(row), 2):
                pair = sum(
                    x * y for x, y in zip(row[start : start + 2], column[start : start + 2], strict=True)
                )
                total += max(-32768, min(32767, pair))
            line.append(total)
        table.append(line)
    return table


@pytest.mark.parametrize("terms", [1, 2, 7, 32])
def test_pairs_are_cut_off_at_16_bits(terms: int) -> None:
    a, b = drawn("uint8", (5, terms)), drawn("int8", (terms, 6), 1)
    assert sums(a, b, "16-bit pairs").tolist() == looped(a, b)
    assert (sums(a, b) == a.astype(int) @ b.astype(int)).all()


def test_the_largest_bytes_give_what_is_known_of_avx2() -> None:
    a, b = np.full((1, 64), 255, np.uint8), np.full((64, 1), 127, np.int8)
    assert sums(a, b).item() == 2072640
    assert sums(a, b, "16-bit pairs").item() == 1048544
    low = np.full((64, 1), -128, np.int8)
    assert sums(a, low, "16-bit pairs").item() == -32768 * 32


@pytest.mark.parametrize(("left", "right"), [("uint8", "uint8"), ("int8", "int8"), ("int8", "uint8")])
def test_other_operands_are_widened_first(left: str, right: str) -> None:
    a, b = drawn(left, (3, 16)), drawn(right, (16, 4), 1)
    assert (sums(a, b, "16-bit pairs") == a.astype(int) @ b.astype(int)).all()


def test_what_is_no_product_of_bytes_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"got uint8 \(2, 3\) and int8 \(4, 5\), expected \(M, K\)"):
        sums(np.zeros((2, 3), np.uint8), np.zeros((4, 5), np.int8))
    with pytest.raises(CalibrationError, match=r"got float32 \(2, 3\)"):
        sums(np.zeros((2, 3), np.float32), np.zeros((3, 5), np.int8))


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "padding", "groups"),
    [(3, 8, 3, 2, 1, 1), (8, 8, 3, 1, 1, 8), (8, 4, 1, 1, 0, 1), (8, 12, 3, 1, 0, 4)],
)
def test_convolutions_are_those_of_the_standard(
    channels: int, outputs: int, kernel: int, stride: int, padding: int, groups: int
) -> None:
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    x, zero = drawn("uint8", (2, channels, 6, 6)), 7
    weight = drawn("int8", (outputs, channels // groups, kernel, kernel), 1)
    node = helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        strides=[stride] * 2,
        pads=[padding] * 4,
        group=groups,
        kernel_shape=[kernel] * 2,
    )
    values = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in "xwy"]
    graph = helper.make_model(helper.make_graph([node], "g", values[:2], values[2:]))
    (expected,) = ReferenceEvaluator(graph).run(
        None, {"x": x.astype(np.float64) - zero, "w": weight.astype(np.float64)}
    )
    for block in (1, 4):
        made = convolve(
            x, weight, zero=zero, stride=stride, padding=padding, groups=groups, channel_block=block
        )
        assert (made == expected).all()


def test_padding_holds_the_zero_point() -> None:
    seen = patches(np.zeros((1, 1, 2, 2), np.uint8), (3, 3), zero=9, padding=1)
    assert seen.shape == (1, 2, 2, 3, 3, 1)
    assert seen[0, 0, 0, 0].ravel().tolist() == [9, 9, 9]


# --- the trap


def error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_the_trap_and_our_way_out() -> None:
    """Relative error 0.016 becomes 0.16 on AVX2; weights that fit in pairs bring it under 0.02."""
    trap = gelu_layer(S8S8)
    assert error(trap.simulated("32-bit"), trap.exact) < 0.02
    assert 0.1 < error(trap.simulated("16-bit pairs"), trap.exact) < 0.25
    ours = gelu_layer(OURS)
    assert (ours.simulated("16-bit pairs") == ours.simulated("32-bit")).all()
    assert error(ours.simulated("16-bit pairs"), ours.exact) < 0.02
    seven = gelu_layer(Scheme(weight_bits=7))
    assert (seven.simulated("16-bit pairs") == seven.simulated("32-bit")).all()
    assert error(ours.simulated("32-bit"), ours.exact) <= error(seven.simulated("32-bit"), seven.exact)
    wide = gelu_layer(Scheme())
    assert error(wide.simulated("32-bit"), wide.exact) < 0.02


@pytest.mark.parametrize("scheme", [Scheme(weight_bits=7), Scheme(weight_bits=7, signed=True), OURS])
def test_neither_seven_bits_nor_pairs_that_fit_overflow(scheme: Scheme) -> None:
    rows = np.random.default_rng(0).uniform(0, 1, (8, 64)).astype(np.float32)
    weight = np.random.default_rng(1).choice([-1.0, 1.0], (64, 16)).astype(np.float32)
    layer = quantized_layer("extreme", rows, weight, scheme)
    assert np.abs(layer.integers).max() == 64  # neighbours of one sign are the worst there is for pairs
    assert (layer.simulated("16-bit pairs") == layer.simulated("32-bit")).all()


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((24, 33, 3, 3), 0), ((24, 3, 3, 3), 0), ((24, 16, 1, 1), 0), ((385, 24), 1), ((24, 384), 0)],
)
@pytest.mark.parametrize("spread", ["normal", "even", "signs", "ones"])
def test_scales_make_pairs_fit_in_both_engines(shape: tuple[int, ...], axis: int, spread: str) -> None:
    random = np.random.default_rng(0)
    weight: NDArray[Any] = {
        "normal": random.standard_normal(shape),
        "even": random.uniform(-1, 1, shape),
        "signs": random.choice([-1.0, 1.0], shape),
        "ones": np.ones(shape),
    }[spread].astype(np.float32)
    steps = weight_steps(weight, axis, OURS)
    along = steps.reshape([-1 if each == axis else 1 for each in range(len(shape))])
    integers = np.rint(weight / along).clip(-127, 127).astype(np.int8)
    columns = np.moveaxis(integers, axis, -1)
    ways = [columns]
    if len(shape) == 4:  # a position after the other, channels within; and those filled up to four
        rows = columns.transpose(1, 2, 0, 3)
        filled = np.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 4), (0, 0)))
        ways = [each.reshape(-1, each.shape[-1]) for each in (rows, filled)]
    for way in ways:
        a = np.full((1, len(way)), 255, np.uint8)
        for given in (np.where(way > 0, way, 0), np.where(way < 0, way, 0)):
            given = given.astype(np.int8)
            assert (sums(a, given, "16-bit pairs") == sums(a, given)).all()
    coarser = steps / weight_steps(weight, axis, Scheme())
    assert 1 <= coarser.min() <= coarser.mean() <= 2
    if spread == "normal":
        assert coarser.mean() < 1.5  # 7 bits: 127 / 64


def test_depthwise_weights_keep_all_their_bits() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 1, 3, 3)).astype(np.float32)
    assert (weight_steps(weight, 0, OURS, groups=16) == weight_steps(weight, 0, Scheme())).all()
    assert (weight_steps(weight, 0, OURS, groups=1) > weight_steps(weight, 0, Scheme())).any()


def test_a_comparison_tells_how_an_engine_adds() -> None:
    layer = gelu_layer(S8S8, rows=16)
    exact = compare(layer, lambda rows: layer.simulated("32-bit").astype(np.float32))
    assert (exact.adding, exact.wrong, exact.outputs) == ("32-bit", 0, 16 * 64)
    cut = compare(layer, lambda rows: layer.simulated("16-bit pairs").astype(np.float32))
    assert cut.adding == "16-bit pairs"
    assert cut.wrong > 900
    assert cut.error > 0.1 > 0.02 > cut.exact_error
    neither = compare(layer, lambda rows: layer.simulated("32-bit") * 1.01)
    assert neither.adding is None
    assert not Detection("ort", (exact, cut)).exact
    assert Detection("ort", (exact,)).to_dict()["findings"][0]["wrong"] == 0


# --- engines


@dataclass(frozen=True)
class Case:
    """A graph, what goes in, and what either way of adding gives."""

    name: str
    graph: bytes
    feeds: dict[str, NDArray[Any]]
    expected: dict[Adding, NDArray[Any]]


def integer_cases() -> list[Case]:
    cases = []
    for left in ("uint8", "int8"):
        for rows, terms in ((1, 37), (5, 64), (5, 300), (3, 1000)):
            for worst in (False, True):
                a, b = drawn(left, (rows, terms)), drawn("int8", (terms, 21), 1)
                if worst:
                    a, b = np.full_like(a, np.iinfo(left).max), np.where(b < 0, -128, 127).astype(np.int8)
                expected: dict[Adding, NDArray[Any]] = {way: sums(a, b, way) for way in WAYS}
                name = f"{left}-{rows}-{terms}-{'worst' if worst else 'random'}"
                cases.append(Case(name, probe_graphs.integer_product(a, b), {"a": a}, expected))
    return cases


def product_cases() -> list[Case]:
    """Linear maps between Q/DQ with scales of one, so that floats are the integers."""
    cases = []
    for kind, zero in (("uint8", 128), ("int8", 0)):
        rounded, b = drawn("uint8", (5, 70)), drawn("int8", (70, 32), 1)
        graph = probe_graphs.product(rounded.shape, (np.float32(1), zero), kind, b, np.ones(32, np.float32))
        expected: dict[Adding, NDArray[Any]] = {way: linear(rounded, b, way, zero=128) for way in WAYS}
        cases.append(Case(f"product-{kind}", graph, {"x": rounded.astype(np.float32) - 128}, expected))
    return cases


SHAPES = [  # channels, outputs, kernel, stride, padding, groups
    (16, 16, 1, 1, 0, 1),
    (16, 32, 3, 1, 1, 1),
    (3, 16, 3, 2, 1, 1),
    (5, 7, 3, 1, 0, 1),
    (16, 16, 3, 1, 1, 16),
    (16, 32, 3, 1, 1, 4),
]


def convolution_cases(backend: str) -> list[Case]:
    cases = []
    for kind, zero in (("uint8", 128), ("int8", 0)):
        for channels, outputs, kernel, stride, padding, groups in SHAPES:
            rounded = drawn("uint8", (2, channels, 8, 8))
            weight = drawn("int8", (outputs, channels // groups, kernel, kernel), 1)
            step = np.float32(1024)
            graph = probe_graphs.convolution(
                (2, channels, 8, 8),
                (np.float32(1), zero),
                kind,
                weight,
                np.ones(outputs, np.float32),
                (step, zero),
                stride=stride,
                padding=padding,
                groups=groups,
            )
            expected: dict[Adding, NDArray[Any]] = {}
            for way in WAYS:
                made = convolve(
                    rounded,
                    weight,
                    way,
                    zero=128,
                    stride=stride,
                    padding=padding,
                    groups=groups,
                    channel_block=CHANNEL_BLOCKS[backend],
                )
                expected[way] = np.clip(np.rint(made / step), -128, 127) * step
            name = f"{kind}-{channels}-{outputs}-{kernel}-{groups}"
            cases.append(Case(name, graph, {"x": rounded.astype(np.float32) - 128}, expected))
    return cases


def cases_of(backend: str) -> list[Case]:
    own = integer_cases() if backend == "ort" else []
    return [*own, *product_cases(), *convolution_cases(backend)]


def check(cases: list[Case], found: dict[str, NDArray[Any]], way: Adding) -> None:
    for case in cases:
        wrong = (found[case.name] != case.expected[way]).sum()
        assert wrong == 0, f"{case.name}: {wrong} of {found[case.name].size} sums are not those of {way}"


def test_cases_tell_the_ways_of_adding_apart() -> None:
    """Or agreement with the simulation would mean little."""
    for backend in ("ort", "openvino"):
        differ = [
            case
            for case in cases_of(backend)
            if (case.expected["32-bit"] != case.expected["16-bit pairs"]).any()
        ]
        assert len(differ) >= len(cases_of(backend)) // 2


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_an_engine_here_adds_as_simulated(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    cases = cases_of(backend)
    found = {case.name: run_graph(case.graph, case.feeds, backend=backend)["y"] for case in cases}
    check(cases, found, "16-bit pairs" if adds_in_16_bits(backend) else "32-bit")


def test_detection_here_finds_one_way_of_adding() -> None:
    found = detect("ort")
    assert found.exact is not adds_in_16_bits("ort")
    ways = {finding.adding for finding in found.findings if finding.wrong or finding.error == 0}
    assert len(ways) == 1
    assert detect("ort", session_config=EXACT).exact


def emulated(backend: str, cases: list[Case], folder: Path, *settings: str) -> dict[str, NDArray[Any]]:
    """Run graphs on an emulated Haswell: AVX2 and no VNNI."""
    if QEMU is None:
        pytest.skip("qemu-x86_64 is not installed (Debian, Ubuntu: apt install qemu-user)")
    given, result = folder / "graphs.npz", folder / "result.npz"
    arrays = {}
    for case in cases:
        arrays[f"{case.name}.graph"] = np.frombuffer(case.graph, np.uint8)
        arrays |= {f"{case.name}.{side}": rows for side, rows in case.feeds.items()}
    np.savez(given, **arrays)
    command = [QEMU, "-cpu", "Haswell", sys.executable, str(CHILD), backend, str(given), str(result)]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(result) as found:
        return dict(found)


@pytest.mark.slow
def test_onnx_runtime_on_avx2_is_the_simulation_sum_for_sum(tmp_path: Path) -> None:
    cases = cases_of("ort")
    check(cases, emulated("ort", cases, tmp_path), "16-bit pairs")


@pytest.mark.full
def test_openvino_on_avx2_is_the_simulation_sum_for_sum(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    cases = cases_of("openvino")
    check(cases, emulated("openvino", cases, tmp_path), "16-bit pairs")


def quantized_by_onnx_runtime(folder: Path, *, symmetric: bool) -> bytes:
    """Return the GELU-like layer as ONNX Runtime's own quantizer makes it: S8S8, per channel."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import quantization

    layer = gelu_layer(S8S8)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, layer.rows.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, layer.exact.shape)],
        [numpy_helper.from_array(layer.weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "float.onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        rows = iter([{"x": layer.rows}])

        def get_next(self) -> Any:
            return next(self.rows, None)

    quantization.quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Reader(),
        per_channel=True,
        extra_options={"ActivationSymmetric": symmetric},
    )
    return (folder / "int8.onnx").read_bytes()


@pytest.mark.slow
def test_the_trap_is_real_and_detected_on_avx2(tmp_path: Path) -> None:
    """ONNX Runtime's own S8S8 per channel saturates there; detection says so, and our recipe holds."""
    trap = gelu_layer(S8S8)
    theirs = quantized_by_onnx_runtime(tmp_path, symmetric=True)
    ours = gelu_layer(OURS)
    unsigned = gelu_layer(Scheme())
    nothing: dict[Adding, NDArray[Any]] = {}
    cases = [
        Case("theirs", theirs, {"x": trap.rows}, nothing),
        Case("trap", trap.graph(), {"x": trap.rows}, nothing),
        Case("ours", ours.graph(), {"x": ours.rows}, nothing),
        Case("unsigned", unsigned.graph(), {"x": unsigned.rows}, nothing),
    ]
    found = emulated("ort", cases, tmp_path)
    detected = compare(trap, lambda rows: found["trap"])
    assert detected.adding == "16-bit pairs"
    assert detected.wrong > 0.8 * detected.outputs
    assert detected.exact_error < 0.02 < 0.1 < detected.error
    assert error(found["theirs"], trap.exact) > 0.1  # its output is rounded too
    assert compare(unsigned, lambda rows: found["unsigned"]).adding == "16-bit pairs"
    held = compare(ours, lambda rows: found["ours"])
    assert (held.adding, held.wrong) == ("32-bit", 0)
    assert held.error < 0.02
    asked = emulated("ort", cases, tmp_path, *(f"{key}={value}" for key, value in EXACT.items()))
    assert error(asked["theirs"], trap.exact) < 0.03
    assert compare(unsigned, lambda rows: asked["unsigned"]).wrong == 0
    assert compare(unsigned, lambda rows: asked["unsigned"]).error < 0.02


def test_tensorrt_graphs_would_overflow_on_a_cpu_with_avx2() -> None:
    """They are signed and symmetric: what stands in for TensorRT adds their rounded values up in float."""
    layer = gelu_layer(TENSORRT)
    assert error(layer.simulated("16-bit pairs"), layer.exact) > 0.1
