"""Tiny quantized graphs that make an engine show how it adds products of bytes.

ONNX files of a few hundred bytes, written as protobuf wire format
(https://protobuf.dev/programming-guides/encoding, field numbers from onnx.proto), because the onnx package
belongs to the exporter and a device checks itself without it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["convolution", "float_product", "integer_product", "product"]

_OPSET: Final = 13  # scales for each index of an axis
_IR_VERSION: Final = 8
_KINDS: Final = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}
_INT, _INTS = 2, 7


def integer_product(a: NDArray[Any], b: NDArray[Any]) -> bytes:
    """Return a graph ``MatMulInteger``: input ``a`` ``(M, K)``, output ``y`` int32 ``(M, N)``.

    Args:
        a: rows of the dtype and shape that will be given.
        b: ``(K, N)`` int8 or uint8, a constant.
    """
    return _model(
        [_node("MatMulInteger", ["a", "b"], "y")],
        {"b": b},
        {"a": (a.dtype.name, a.shape)},
        {"y": ("int32", (len(a), b.shape[1]))},
    )


def float_product(rows: int, b: NDArray[np.float32]) -> bytes:
    """Return a graph ``MatMul``: input ``a`` float32 ``(rows, K)``, output ``y`` float32 ``(rows, N)``.

    Args:
        rows: of the input.
        b: ``(K, N)``, a constant.
    """
    return _model(
        [_node("MatMul", ["a", "b"], "y")],
        {"b": b},
        {"a": ("float32", (rows, b.shape[0]))},
        {"y": ("float32", (rows, b.shape[1]))},
    )


def product(
    shape: tuple[int, ...],
    steps: tuple[np.float32, int],
    kind: str,
    weight: NDArray[Any],
    scale: NDArray[Any],
) -> bytes:
    """Return a linear map between Q/DQ: input ``x`` float32, output ``y`` float32 ``(…, N)``.

    Args:
        shape: of the input, ``(…, K)``.
        steps: scale and zero point of the input.
        kind: ``"uint8"`` or ``"int8"``, what the input is quantized to.
        weight: ``(K, N)`` int8.
        scale: of each column of the weight, ``(N,)``.
    """
    nodes = [
        *_rounded("x", "x_dq"),
        _node("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_dq", axis=1),
        _node("MatMul", ["x_dq", "w_dq"], "y"),
    ]
    constants = {**_steps("x", steps, kind), **_weight(weight, scale)}
    return _model(
        nodes, constants, {"x": ("float32", shape)}, {"y": ("float32", (*shape[:-1], weight.shape[1]))}
    )


def convolution(
    shape: tuple[int, int, int, int],
    steps: tuple[np.float32, int],
    kind: str,
    weight: NDArray[Any],
    scale: NDArray[Any],
    output_steps: tuple[np.float32, int],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> bytes:
    """Return a convolution between Q/DQ: input ``x`` float32 ``(B, C, H, W)``, output ``y`` float32.

    Args:
        shape: of the input.
        steps: scale and zero point of the input.
        kind: ``"uint8"`` or ``"int8"``, what input and output are quantized to.
        weight: ``(O, C / groups, kh, kw)`` int8.
        scale: of each output channel, ``(O,)``.
        output_steps: scale and zero point of the output.
        stride: of both axes.
        padding: on all four sides.
        groups: of channels.
    """
    height, width = ((shape[axis] + 2 * padding - weight.shape[axis]) // stride + 1 for axis in (2, 3))
    nodes = [
        *_rounded("x", "x_dq"),
        _node("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_dq", axis=0),
        _node(
            "Conv",
            ["x_dq", "w_dq"],
            "z",
            kernel_shape=weight.shape[2:],
            strides=(stride, stride),
            pads=(padding,) * 4,
            group=groups,
        ),
        *_rounded("z", "y"),
    ]
    constants = {**_steps("x", steps, kind), **_weight(weight, scale), **_steps("z", output_steps, kind)}
    output = (shape[0], len(weight), height, width)
    return _model(nodes, constants, {"x": ("float32", shape)}, {"y": ("float32", output)})


def _rounded(source: str, result: str) -> list[bytes]:
    steps = [f"{source}_scale", f"{source}_zero"]
    return [
        _node("QuantizeLinear", [source, *steps], f"{source}_q"),
        _node("DequantizeLinear", [f"{source}_q", *steps], result),
    ]


def _steps(name: str, steps: tuple[np.float32, int], kind: str) -> dict[str, NDArray[Any]]:
    return {f"{name}_scale": np.asarray(steps[0], np.float32), f"{name}_zero": np.asarray(steps[1], kind)}


def _weight(weight: NDArray[Any], scale: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {"w": weight, "w_scale": scale.astype(np.float32), "w_zero": np.zeros(len(scale), weight.dtype)}


# --- protobuf ---------------------------------------------------------------------------------------------


def _model(
    nodes: Iterable[bytes],
    constants: Mapping[str, NDArray[Any]],
    inputs: Mapping[str, tuple[str, tuple[int, ...]]],
    outputs: Mapping[str, tuple[str, tuple[int, ...]]],
) -> bytes:
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, b"probe")
    graph += b"".join(_bytes(5, _tensor(name, array)) for name, array in constants.items())
    graph += b"".join(_bytes(11, _value(name, *said)) for name, said in inputs.items())
    graph += b"".join(_bytes(12, _value(name, *said)) for name, said in outputs.items())
    return _int(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _bytes(1, b"") + _int(2, _OPSET))


def _node(op_type: str, inputs: Iterable[str], output: str, **attributes: int | tuple[int, ...]) -> bytes:
    node = b"".join(_bytes(1, name.encode()) for name in inputs) + _bytes(2, output.encode())
    node += _bytes(4, op_type.encode())
    for name, value in attributes.items():
        said = _bytes(1, name.encode())
        if isinstance(value, int):
            said += _int(3, value) + _int(20, _INT)
        else:
            said += b"".join(_int(8, each) for each in value) + _int(20, _INTS)
        node += _bytes(5, said)
    return node


def _tensor(name: str, array: NDArray[Any]) -> bytes:
    dims = b"".join(_int(1, size) for size in array.shape)
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return dims + _int(2, _KINDS[array.dtype.name]) + _bytes(8, name.encode()) + _bytes(9, little.tobytes())


def _value(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_bytes(1, _int(1, size)) for size in shape)
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _int(1, _KINDS[kind]) + _bytes(2, dims)))


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    said = bytearray()
    while value >= 0x80:
        said += struct.pack("B", value & 0x7F | 0x80)
        value >>= 7
    return bytes(said) + struct.pack("B", value)
