"""Whether sums of bytes are exact: a simulation of int8 kernels, bit for bit, and what an engine does here.

Int8 kernels of x86 multiply unsigned bytes (activations) with signed ones (weights). With VNNI four products
are added in 32 bits. Without, ``vpmaddubsw`` adds two in 16 bits first and cuts off what does not fit: pairs
are neighbours along the sum, and along the sum stand the positions of a kernel, the channels within each.
ONNX Runtime (MLAS) goes through them as they are; OpenVINO (oneDNN) fills the channels of each position up to
four. Both turn signed activations of Q/DQ graphs into unsigned ones by adding 128. Two unsigned or two signed
operands, and convolutions of one channel each, are widened before they are multiplied and are exact
everywhere. All of that is MLAS as of ONNX Runtime 1.31 (``mlas/lib/x86_64/QgemmU8X8KernelAvx2.S``,
``ConvSymKernelAvx2.S``, ``convsym.cpp``, ``qgemm.h``), checked against the engines under an emulated
processor (tests).

The simulation is for :func:`detect`, for tests, and for whoever wants to know on one host what another would
answer. It is numpy, and slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import CalibrationError
from edgeclip.quantization import Scheme, activation_step, weight_steps
from edgeclip.runtime import probe_graphs
from edgeclip.runtime.byte_sums import run_graph

__all__ = [
    "CHANNEL_BLOCKS",
    "Adding",
    "Detection",
    "Finding",
    "Layer",
    "compare",
    "convolve",
    "detect",
    "gelu_layer",
    "linear",
    "patches",
    "quantized_layer",
    "sums",
]

Adding: TypeAlias = Literal["32-bit", "16-bit pairs"]
"""How products of bytes are added: exactly, or two in 16 bits first."""

CHANNEL_BLOCKS: Final[Mapping[str, int]] = {"ort": 1, "openvino": 4}
"""To what multiple an engine fills up the channels of a kernel's position."""

_LOW, _HIGH = -(2**15), 2**15 - 1


# --- the simulation ---------------------------------------------------------------------------------------


def sums(a: NDArray[Any], b: NDArray[Any], adding: Adding = "32-bit") -> NDArray[np.int32]:
    """Return what kernels make of two matrices of bytes, zero points apart.

    Args:
        a: ``(M, K)`` uint8 or int8.
        b: ``(K, N)`` int8 or uint8.
        adding: how products are added. Sums of 16 bits are those of unsigned ``a`` and signed ``b`` alone;
            other operands are exact.

    Returns:
        ``(M, N)`` int32, wrapped where 32 bits overflow.

    Raises:
        CalibrationError: they are not two matrices of bytes that fit.
    """
    bytes_ = (np.dtype(np.uint8), np.dtype(np.int8))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not {a.dtype, b.dtype} <= {*bytes_}:
        raise CalibrationError(
            f"product of bytes: got {a.dtype} {a.shape} and {b.dtype} {b.shape}, expected (M, K) and (K, N) "
            "of int8 or uint8."
        )
    if adding == "32-bit" or a.dtype != np.uint8 or b.dtype != np.int8:
        return _wrapped(a.astype(np.int64) @ b.astype(np.int64))
    total = np.zeros((len(a), b.shape[1]), np.int64)
    for pair in _pairs(a, b):
        total += np.clip(pair, _LOW, _HIGH)
    return _wrapped(total)


def _pairs(a: NDArray[Any], b: NDArray[Any]) -> Iterator[NDArray[np.int32]]:
    """Yield the sums of two neighbouring products, before anything is cut off."""
    left, right = a.astype(np.int32), b.astype(np.int32)
    for start in range(0, a.shape[1], 2):
        pair = np.multiply.outer(left[:, start], right[start])
        if start + 1 < a.shape[1]:
            pair += np.multiply.outer(left[:, start + 1], right[start + 1])
        yield pair


def _wrapped(total: NDArray[np.int64]) -> NDArray[np.int32]:
    return total.astype(np.uint64).astype(np.uint32).view(np.int32)


def linear(
    a: NDArray[Any], b: NDArray[Any], adding: Adding = "32-bit", *, zero: int = 0
) -> NDArray[np.int32]:
    """Return the integer result of a linear map with symmetric weights, ``(M, N)``.

    Args:
        a: ``(M, K)`` rounded activations.
        b: ``(K, N)`` weights.
        adding: see :func:`sums`.
        zero: zero point of the activations; its share is taken off after the sums, exactly.
    """
    return _wrapped(sums(a, b, adding).astype(np.int64) - zero * b.astype(np.int64).sum(axis=0))


def patches(
    x: NDArray[Any], kernel: tuple[int, int], *, zero: int = 0, stride: int = 1, padding: int = 0
) -> NDArray[Any]:
    """Return what a convolution multiplies at each place, ``(B, oh, ow, kh, kw, C)``.

    Args:
        x: ``(B, C, H, W)``.
        kernel: its height and width.
        zero: what the padding holds.
        stride: of both axes.
        padding: on all four sides.
    """
    width = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    seen = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, width, constant_values=zero), kernel, axis=(2, 3)
    )
    return seen[:, :, ::stride, ::stride].transpose(0, 2, 3, 4, 5, 1)


def convolve(
    x: NDArray[Any],
    weight: NDArray[Any],
    adding: Adding = "32-bit",
    *,
    zero: int = 0,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    channel_block: int = 1,
) -> NDArray[np.int32]:
    """Return the integer result of a convolution with symmetric weights, ``(B, O, oh, ow)``.

    Args:
        x: ``(B, C, H, W)`` uint8 or int8.
        weight: ``(O, C / groups, kh, kw)`` int8.
        adding: see :func:`sums`.
        zero: zero point of ``x``, which padding holds too.
        stride: of both axes.
        padding: on all four sides.
        groups: of channels.
        channel_block: see :data:`CHANNEL_BLOCKS`.
    """
    depthwise = weight.shape[1] == 1 and groups == len(weight)
    inside, outside = weight.shape[1], len(weight) // groups
    results = []
    for group in range(groups):
        own = weight[group * outside : (group + 1) * outside].transpose(2, 3, 1, 0)
        seen = patches(
            x[:, group * inside : (group + 1) * inside],
            (weight.shape[2], weight.shape[3]),
            zero=zero,
            stride=stride,
            padding=padding,
        )
        filled = -inside % channel_block
        own = np.pad(own, ((0, 0), (0, 0), (0, filled), (0, 0)))
        seen = np.pad(seen, (*((0, 0),) * 5, (0, filled)))
        rows = seen.reshape(-1, own.shape[0] * own.shape[1] * own.shape[2])
        columns = own.reshape(-1, outside)
        made = linear(rows, columns, "32-bit" if depthwise else adding, zero=zero)
        results.append(made.reshape(*seen.shape[:3], outside).transpose(0, 3, 1, 2))
    return np.concatenate(results, axis=1)


# --- layers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear map in float and what it is in int8.

    Attributes:
        name: for reports.
        rows: ``(M, K)`` float32, what goes in.
        weight: ``(K, N)`` float32.
        scheme: what int8 means; the zero point of activations is theirs.
        step: scale and zero point of the activations.
        integers: ``(K, N)`` int8, the weight.
        scales: of each output, ``(N,)``.
    """

    name: str
    rows: NDArray[np.float32]
    weight: NDArray[np.float32]
    scheme: Scheme
    step: tuple[np.float32, int]
    integers: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def kind(self) -> str:
        """Dtype of the rounded activations."""
        return "int8" if self.scheme.signed else "uint8"

    @property
    def exact(self) -> NDArray[np.float64]:
        """The map in float64, ``(M, N)``."""
        return self.rows.astype(np.float64) @ self.weight.astype(np.float64)

    def simulated(self, adding: Adding) -> NDArray[np.float64]:
        """Return what kernels give, ``(M, N)``; signed activations are made unsigned first, as engines do."""
        scale, zero = self.step
        info = np.iinfo(self.kind)
        rounded = np.clip(np.rint(self.rows / scale) + zero, info.min, info.max).astype(np.int64)
        shift = 128 if self.scheme.signed else 0
        unsigned = (rounded + shift).astype(np.uint8)
        made = linear(unsigned, self.integers, adding, zero=zero + shift)
        return made * (np.float64(scale) * self.scales.astype(np.float64))

    def graph(self) -> bytes:
        """Return it as an ONNX file: input ``x``, output ``y``."""
        return probe_graphs.product(self.rows.shape, self.step, self.kind, self.integers, self.scales)


def quantized_layer(
    name: str, rows: NDArray[np.float32], weight: NDArray[np.float32], scheme: Scheme
) -> Layer:
    """Return a linear map in int8, the range of activations from the rows themselves.

    Args:
        name: for reports.
        rows: ``(M, K)`` float32.
        weight: ``(K, N)`` float32.
        scheme: what int8 means.
    """
    step = activation_step((float(rows.min()), float(rows.max())), scheme)
    scales = weight_steps(weight, 1, scheme)
    limit = scheme.weight_limit
    integers = np.rint(weight / scales).clip(-limit, limit).astype(np.int8)
    return Layer(name, rows, weight, scheme, step, integers, scales)


def gelu_layer(
    scheme: Scheme, *, rows: int = 64, inputs: int = 384, outputs: int = 64, seed: int = 0
) -> Layer:
    """Return a layer behind a GELU: most activations next to 0, none below -0.17, weights evenly spread.

    Symmetric activations have their zero point in the middle, so that their unsigned form is mostly 128 and
    more: few pairs of weights fit then.

    Args:
        scheme: what int8 means.
        rows: of activations.
        inputs: terms of a sum.
        outputs: of the layer.
        seed: of everything drawn.
    """
    drawn = np.random.default_rng(seed)
    x = drawn.standard_normal((rows, inputs))
    activations = x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    weight = drawn.uniform(-1, 1, (inputs, outputs)) / np.sqrt(inputs)
    activations_are = "symmetric signed" if scheme.symmetric else "signed" if scheme.signed else "unsigned"
    weights_are = "weights that fit in pairs" if scheme.fit_pairs else f"{scheme.weight_bits}-bit weights"
    bits = f"{weights_are}, {activations_are} activations"
    return quantized_layer(f"GELU, {bits}", activations.astype(np.float32), weight.astype(np.float32), scheme)


# --- what an engine does ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What an engine makes of one layer.

    Attributes:
        layer: its name.
        outputs: how many numbers it gives.
        wrong: how many are not the exact sums.
        adding: the way of adding that gives the engine's numbers, all of them; ``None`` if none does.
        largest: the largest difference from exact sums, in units of the largest exact one.
        error: distance from the layer in float over the length of that, all outputs together.
        exact_error: the same with exact sums, which is what rounding costs.
    """

    layer: str
    outputs: int
    wrong: int
    adding: Adding | None
    largest: float
    error: float
    exact_error: float


@dataclass(frozen=True)
class Detection:
    """How an engine adds products of bytes on this host.

    Attributes:
        backend: the engine.
        findings: layer by layer.
    """

    backend: str
    findings: tuple[Finding, ...]

    @property
    def exact(self) -> bool:
        """Whether every sum was exact."""
        return all(finding.wrong == 0 for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        findings = [asdict(finding) for finding in self.findings]
        return {"backend": self.backend, "exact": self.exact, "findings": findings}


def detect(
    backend: str = "ort",
    layers: tuple[Layer, ...] | None = None,
    *,
    session_config: Mapping[str, str] | None = None,
) -> Detection:
    """Run layers through an engine on this host and compare with exact sums and with sums of 16 bits.

    Args:
        backend: ``"ort"`` or ``"openvino"``.
        layers: to run; without, one whose sums must overflow and GELU-like ones in 8 bits.
        session_config: settings of the engine.

    Raises:
        BackendError: the engine is not here or fails.
    """
    chosen = _default_layers() if layers is None else layers
    run = functools.partial(_run, backend=backend, session_config=session_config)
    return Detection(backend, tuple(compare(layer, functools.partial(run, layer)) for layer in chosen))


def _run(
    layer: Layer, rows: NDArray[np.float32], *, backend: str, session_config: Mapping[str, str] | None
) -> NDArray[Any]:
    return run_graph(layer.graph(), {"x": rows}, backend=backend, session_config=session_config)["y"]


def compare(layer: Layer, run: Callable[[NDArray[np.float32]], NDArray[Any]]) -> Finding:
    """Return what a callable makes of a layer.

    Args:
        layer: with what goes in.
        run: takes ``(M, K)`` float32 and returns ``(M, N)``.
    """
    got = np.asarray(run(layer.rows), np.float64)
    exact = layer.simulated("32-bit")
    # Products of two scales are rounded to float32 by engines, one way or another.
    unit = np.float64(layer.step[0]) * layer.scales.astype(np.float64)
    wrong = np.rint((got - exact) / unit) != 0
    ways: tuple[Adding, ...] = ("32-bit", "16-bit pairs")
    adding = next((way for way in ways if not np.rint((got - layer.simulated(way)) / unit).any()), None)
    reference = layer.exact
    size = np.linalg.norm(reference)
    return Finding(
        layer.name,
        outputs=got.size,
        wrong=int(wrong.sum()),
        adding=adding,
        largest=float(np.abs(got - exact).max() / max(np.abs(exact).max(), 1e-30)),
        error=float(np.linalg.norm(got - reference) / size),
        exact_error=float(np.linalg.norm(exact - reference) / size),
    )


def _default_layers() -> tuple[Layer, ...]:
    """Return a layer that must overflow, and layers as towers have them."""
    worst = quantized_layer(
        "largest bytes", np.full((4, 16), 255, np.float32), np.full((16, 16), 127, np.float32), Scheme()
    )
    return (worst, gelu_layer(Scheme(), rows=16), gelu_layer(Scheme(signed=True, symmetric=True), rows=16))
