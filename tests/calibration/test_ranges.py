"""Ranges: methods against ONNX Runtime's own calibrators, histograms, memory, cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.cache import HostCache
from edgeclip.calibration import ranges
from edgeclip.calibration.ranges import (
    METHODS,
    Entropy,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    RangeMethod,
    means,
    observe,
)
from edgeclip.errors import CalibrationError, ConfigError
from edgeclip.quantization import CPU, TENSORRT, Range, Scheme, activation_step
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.runtime.session import Session, TensorSpec

Array = NDArray[Any]
DIGEST = "0" * 64


class _Session:
    """Tells of what functions make of its input."""

    def __init__(self, outputs: Callable[[Array], dict[str, Array]], batch: int | str) -> None:
        self.inputs = {"x": TensorSpec("x", "float32", (batch, 64))}
        self._outputs = outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._outputs(feeds["x"])


class Watched:
    """A graph of named functions; counts what is asked of it."""

    digest = DIGEST

    def __init__(self, tensors: Mapping[str, Callable[[Array], Array]], batch: int | str = "n") -> None:
        self.tensors, self.batch = tensors, batch
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def extremes(self, names: Sequence[str]) -> contextlib.AbstractContextManager[Session]:
        def tell(x: Array) -> dict[str, Array]:
            made = [self.tensors[name](x) for name in names]
            return {
                f"{place}:{said}": np.asarray(value)
                for place, each in enumerate(made)
                for said, value in (("least", each.min()), ("most", each.max()), ("size", each.size))
            }

        return self._opened("extremes", names, tell)

    def values(self, names: Sequence[str]) -> contextlib.AbstractContextManager[Session]:
        return self._opened(
            "values", names, lambda x: {str(p): self.tensors[name](x) for p, name in enumerate(names)}
        )

    def means(self, names: Sequence[str]) -> contextlib.AbstractContextManager[Session]:
        return self._opened(
            "means", names, lambda x: {str(p): self.tensors[name](x).mean(0) for p, name in enumerate(names)}
        )

    @contextlib.contextmanager
    def _opened(
        self, told: str, names: Sequence[str], outputs: Callable[[Array], dict[str, Array]]
    ) -> Iterator[Session]:
        self.asked.append((told, tuple(names)))
        yield cast("Session", _Session(outputs, self.batch))


def bent(x: Array) -> Array:
    """GELU, whose least value is -0.17."""
    return np.asarray(x / (1 + np.exp(-1.702 * x)), np.float32)


KINDS: dict[str, Callable[[Array], Array]] = {
    "even": lambda x: x,
    "positive": lambda x: np.maximum(x, 0),
    "bent": bent,
    "tailed": lambda x: (x**3).astype(np.float32),
    "shifted": lambda x: x + 3,
}


def rows(count: int = 64, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)


def seen(kind: str, method: RangeMethod, *, scheme: Scheme = CPU) -> Range:
    return observe(Watched(KINDS), rows(), [kind], method, scheme=scheme, what="tower")[kind]


# --- against ONNX Runtime


def theirs(kind: str, method: str, **given: Any) -> Range:
    import_onnxruntime()
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=method,
        symmetric=False,
        num_bins=2049,
        num_quantized_bins=128,
        percentile=given.get("percentile", 99.99),
        scenario="same",
    )
    collector.collect({kind: [KINDS[kind](rows())]})
    low, high = collector.compute_collection_result()[kind][:2]
    return float(low), float(high)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("share", [99.0, 99.9, 99.99])
def test_percentiles_are_those_of_onnx_runtime(kind: str, share: float) -> None:
    """Within two bins of 2,049: float32 and float64 put values on an edge into either neighbour."""
    ours, wanted = seen(kind, Percentile(share)), theirs(kind, "percentile", percentile=share)
    bin_width = 2 * np.abs(KINDS[kind](rows())).max() / 2049
    np.testing.assert_allclose(ours, wanted, atol=2 * bin_width)


@pytest.mark.parametrize("kind", ["even", "tailed", "shifted"])
def test_the_threshold_of_entropy_is_that_of_onnx_runtime(kind: str) -> None:
    """Within four bins: the divergence is flat around its least value."""
    ours, wanted = seen(kind, Entropy()), theirs(kind, "entropy")
    bin_width = 2 * np.abs(KINDS[kind](rows())).max() / 2049
    np.testing.assert_allclose(ours, wanted, atol=4 * bin_width)


@pytest.mark.parametrize("averaged", [False, True])
def test_extremes_are_those_of_onnx_runtime(tmp_path: Path, averaged: bool) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    import_onnxruntime()
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "relu.onnx")
    calibrator = create_calibrator(
        str(tmp_path / "relu.onnx"),
        augmented_model_path=str(tmp_path / "watched.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"moving_average": averaged},
    )
    parts = iter(np.split(rows(), 8))

    class Reader:
        def get_next(self) -> dict[str, Array] | None:
            part = next(parts, None)
            return None if part is None else {"x": part}

    calibrator.collect_data(Reader())
    found = calibrator.compute_data()
    method = MovingAverage() if averaged else MinMax()
    wanted = [np.asarray(each).item() for each in found["x"].range_value]
    np.testing.assert_allclose(seen("even", method), wanted, rtol=1e-6)


# --- what is chosen


def error(kind: str, given: Range, scheme: Scheme) -> float:
    """Return the true mean squared error of rounding by a range."""
    values = KINDS[kind](rows()).astype(np.float64)
    step, zero = activation_step(given, scheme)
    low, high = (-128, 127) if scheme.signed else (0, 255)
    rounded = (np.clip(np.rint(values / step) + zero, low, high) - zero) * step
    return float(((rounded - values) ** 2).mean())


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("scheme", [CPU, TENSORRT], ids=["cpu", "tensorrt"])
def test_mse_rounds_with_the_least_error(kind: str, scheme: Scheme) -> None:
    """Within a tenth: what lies between two levels is taken as even."""
    best = error(kind, seen(kind, MeanSquaredError(), scheme=scheme), scheme)
    others = [Percentile(share) for share in (99.0, 99.9, 99.99)]
    for other in [MinMax(), MovingAverage(), Entropy(), *others]:
        assert best <= 1.1 * error(kind, seen(kind, other, scheme=scheme), scheme), other


def test_mse_leaves_out_what_lies_far_out() -> None:
    """One value of 20 among n = 262,144 from -1 to 1: n (h + 1)² / 255² / 12 + (20 - h)² is least at 14.7."""

    def outlying(x: Array) -> Array:
        made = np.tanh(np.tile(x, (1, 64)))
        made[x[:, 0] > 2.1, 0] = 20
        return np.asarray(made, np.float32)

    assert (rows()[:, 0] > 2.1).sum() == 1
    low, high = observe(Watched({"far": outlying}), rows(), ["far"], MeanSquaredError(), what="tower")["far"]
    assert high == pytest.approx(14.72, abs=20 / 64)
    assert -1.1 < low < -0.9


def test_ranges_never_leave_what_was_seen() -> None:
    for kind, made in KINDS.items():
        values = made(rows())
        for method in METHODS.values():
            low, high = seen(kind, method())
            assert min(values.min(), 0) - 1e-6 <= low <= high <= max(values.max(), 0) + 1e-6, (kind, method)


def test_a_tensor_of_zeros_has_a_range() -> None:
    watched = Watched({"nothing": lambda x: x * 0})
    for method in METHODS.values():
        assert observe(watched, rows(), ["nothing"], method(), what="tower")["nothing"] == (0, 0)


# --- memory


def test_no_more_tensors_are_held_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = observe(Watched(KINDS), rows(), sorted(KINDS), Percentile(), what="tower")
    monkeypatch.setattr(ranges, "_MOST_BYTES", 2 * 4 * 8 * 64)
    watched = Watched(KINDS)
    assert observe(watched, rows(), sorted(KINDS), Percentile(), what="tower") == whole
    held = [len(names) for told, names in watched.asked if told == "values"]
    assert held == [2, 2, 1]


def test_a_graph_of_fixed_batch_gets_its_batch() -> None:
    free = observe(Watched(KINDS), rows(21), ["even"], what="tower")
    fixed = observe(Watched(KINDS, batch=4), rows(21), ["even"], what="tower")
    assert free == fixed
    exact = rows(21).mean(0)
    np.testing.assert_allclose(means(Watched(KINDS), rows(21), ["even"])["even"], exact, atol=1e-6)
    assert means(Watched(KINDS), rows(21), []) == {}


# --- cache


def test_ranges_are_kept_by_rows_names_method_and_symmetry(tmp_path: Path) -> None:
    watched = Watched(KINDS)
    cache = HostCache.open(DIGEST, root=tmp_path)

    def asked(*given: Any, names: Sequence[str] = ("bent",), scheme: Scheme = CPU, seed: int = 0) -> int:
        before = len(watched.asked)
        for method in given:
            observe(watched, rows(seed=seed), names, method, scheme=scheme, what="tower", cache=cache)
        return len(watched.asked) - before

    assert asked(MinMax()) == 1
    assert asked(MinMax()) == 0
    assert asked(MinMax(), seed=1) == 1
    assert asked(MinMax(), names=("bent", "even")) == 1
    assert asked(Percentile(99.9), Percentile(99.0)) == 4
    assert asked(Percentile(99.9), Percentile(99.0)) == 0
    assert asked(MeanSquaredError()) == 2
    assert asked(MeanSquaredError(), scheme=TENSORRT) == 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"ranges": {}}', b'{"ranges": {"bent": [0]}}', b'{"ranges": {"bent": [0, NaN]}}']
)
def test_a_damaged_entry_is_computed_again(tmp_path: Path, content: bytes) -> None:
    watched = Watched(KINDS)
    cache = HostCache.open(DIGEST, root=tmp_path)
    first = observe(watched, rows(), ["bent"], what="tower", cache=cache)
    (entry,) = tmp_path.rglob("ranges-*.json")
    cache.put(entry.name, content)  # whole, as the cache sees it
    assert observe(watched, rows(), ["bent"], what="tower", cache=cache) == first
    assert len(watched.asked) == 2


# --- names and errors


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("minmax", MinMax()),
        ("moving-average", MovingAverage()),
        ("percentile", Percentile(99.99)),
        ("percentile:99.999", Percentile(99.999)),
        ("entropy", Entropy()),
        (" mse ", MeanSquaredError()),
    ],
)
def test_methods_have_names(text: str, method: RangeMethod) -> None:
    assert RangeMethod.parse(text) == method
    assert RangeMethod.parse(str(method)) == method
    assert method.to_dict()["name"] == method.name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("best", r"int8 method 'best': expected one of entropy, minmax, moving-average, mse, percentile"),
        ("mse:3", "int8 method 'mse:3'"),
        ("percentile:50", "percentile: got 50, expected above 50"),
        ("percentile:100.5", "percentile: got 100.5"),
        ("percentile:most", "percentile: got nan"),
    ],
)
def test_what_is_no_method_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RangeMethod.parse(text)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(wrong: float) -> None:
    given = rows()
    given[17, 3] = wrong
    with pytest.raises(CalibrationError, match=r"tower: 'even' is not finite for the .* rows from 16 on \(1"):
        observe(Watched(KINDS), given, ["even"], what="tower")
