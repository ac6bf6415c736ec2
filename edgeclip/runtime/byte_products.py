"""Which products of bytes a stored graph asks for, and whether sums of 16 bits would hold them.

A processor with AVX2 and without VNNI multiplies unsigned bytes with signed ones and adds two products in 16
bits (``vpmaddubsw``); what does not fit is cut off, silently. That can happen where two weights that meet in
such a pair add up to more than 128 in one direction: 255 times that is beyond 16 bits. The weights alone
decide, so a file tells it without being run. ONNX files are read as protobuf wire format and OpenVINO's as
XML, because neither the onnx package nor OpenVINO needs to be here.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgeclip.onnx_files import fields, varint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LARGEST_PAIR", "ByteProduct", "Overflow", "can_overflow", "overflow", "products"]

LARGEST_PAIR: Final = 128
"""Two weights of a pair that add up to so much still fit: 255 x 128 is 32640, and 16 bits end at 32767."""

# ONNX operators on integers, with the place of their weight.
_INTEGER_OPS: Final = {
    "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "QGemm": 3,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
}
_FLOAT_OPS: Final = ("Conv", "Gemm", "MatMul")
_CONVOLUTIONS: Final = ("Conv", "ConvInteger", "QLinearConv")
# What only moves values: engines take the rounding in front of it as the rounding behind it.
_MOVES: Final = (
    *("Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze"),
    *("Transpose", "Unsqueeze"),
)
_INT8: Final = 3


@dataclass(frozen=True)
class ByteProduct:
    """One product of a graph that an engine computes in bytes.

    Attributes:
        name: of its output.
        weight: ``(K, N)`` int8, in the order in which kernels add: positions of a kernel first, channels
            within.
    """

    name: str
    weight: NDArray[np.int8]

    @property
    def largest_pair(self) -> int:
        """Largest sum of two neighbouring weights in one direction; where all fit, a bound of it."""
        import numpy as np

        low, high = int(self.weight.min(initial=0)), int(self.weight.max(initial=0))
        if max(high, -low) <= LARGEST_PAIR // 2:
            return 2 * max(high, -low)
        signed = self.weight.astype(np.int16)
        if len(signed) % 2:
            signed = np.concatenate([signed, np.zeros_like(signed[:1])])
        upward, downward = np.maximum(signed, 0), np.maximum(-signed, 0)
        most = [(each[0::2] + each[1::2]).max(initial=0) for each in (upward, downward)]
        return int(max(most))


@dataclass(frozen=True)
class Overflow:
    """Products of a file whose sums may not fit into 16 bits.

    Attributes:
        products: how many there are.
        worst: output of the one with the largest pair.
        largest_pair: that pair's sum; 128 would fit.
    """

    products: int
    worst: str
    largest_pair: int


def overflow(path: Path, files: Iterable[Path] = ()) -> Overflow | None:
    """Return what of a file may overflow sums of 16 bits, ``None`` where nothing can.

    Args:
        path: an ``.onnx`` or ``.xml`` file; others tell nothing.
        files: all files of the tower, where OpenVINO's weights are not named after ``path``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    found = ((product.largest_pair, product.name) for product in products(path, files))
    wide = [each for each in found if each[0] > LARGEST_PAIR]
    if not wide:
        return None
    largest, worst = max(wide)
    return Overflow(len(wide), worst, largest)


def can_overflow(path: Path, files: Iterable[Path] = ()) -> bool:
    """Return whether anything can, reading no further than the first such product; see :func:`overflow`."""
    return any(product.largest_pair > LARGEST_PAIR for product in products(path, files))


def products(path: Path, files: Iterable[Path] = ()) -> Iterator[ByteProduct]:
    """Yield the products of bytes in a file; see :func:`overflow`.

    Convolutions of one channel each are left out: engines widen those before they multiply.
    """
    if path.suffix == ".onnx":
        with path.open("rb") as stream:
            if not stream.seek(0, 2):
                return
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield from _of_onnx(_Graph.read(data), path.parent)
    elif path.suffix == ".xml":
        named = path.with_suffix(".bin")
        yield from _of_openvino(path, next((file for file in files if file.suffix == ".bin"), named))


# --- ONNX -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flags: Mapping[str, int]


@dataclass(frozen=True)
class _Stored:
    """A tensor of int8 and where its bytes are."""

    shape: tuple[int, ...]
    data: mmap.mmap
    start: int
    end: int
    external: Mapping[str, str]

    def array(self, folder: Path) -> NDArray[np.int8] | None:
        import numpy as np

        if self.external:
            offset, length = (int(self.external.get(key, 0)) for key in ("offset", "length"))
            with (folder / self.external["location"]).open("rb") as stream:
                stream.seek(offset)
                content = stream.read(length or -1)
        else:
            content = self.data[self.start : self.end]
        if len(content) != np.prod(self.shape):
            return None  # not as raw bytes; the engine says what is wrong with it
        return np.frombuffer(content, np.int8).reshape(self.shape)


@dataclass
class _Graph:
    nodes: list[_Node] = field(default_factory=list)
    tensors: dict[str, _Stored] = field(default_factory=dict)

    @classmethod
    def read(cls, data: mmap.mmap) -> _Graph:
        graph = cls()
        for number, start, end in fields(data, 0, len(data)):
            if number == 7:  # ModelProto.graph
                for inner, a, b in fields(data, start, end):
                    if inner == 1:
                        graph.nodes.append(_node(data, a, b))
                    elif inner == 5:
                        graph._add_tensor(data, a, b)
        return graph

    def _add_tensor(self, data: mmap.mmap, start: int, end: int) -> None:
        if _numbers(data, start, end, 2) != [_INT8]:
            return
        name, raw, external = "", (0, 0), {}
        for number, a, b in fields(data, start, end):
            if number == 8:
                name = data[a:b].decode("utf-8")
            elif number == 9:
                raw = (a, b)
            elif number == 13:
                said = {each: data[x:y].decode("utf-8") for each, x, y in fields(data, a, b)}
                external[said.get(1, "")] = said.get(2, "")
        self.tensors[name] = _Stored(tuple(_numbers(data, start, end, 1)), data, *raw, external)


def _node(data: mmap.mmap, start: int, end: int) -> _Node:
    names: dict[int, list[str]] = {1: [], 2: [], 4: []}
    flags: dict[str, int] = {}
    for number, a, b in fields(data, start, end):
        if number in names:
            names[number].append(data[a:b].decode("utf-8"))
        elif number == 5:
            called = "".join(data[x:y].decode("utf-8") for each, x, y in fields(data, a, b) if each == 1)
            values = _numbers(data, a, b, 3)
            if values:
                flags[called] = values[0]
    return _Node("".join(names[4]), tuple(names[1]), tuple(names[2]), flags)


def _numbers(data: mmap.mmap, start: int, end: int, wanted: int) -> list[int]:
    """Return the whole numbers in one field of a message, packed or not."""
    found = []
    position = start
    while position < end:
        tag, position = varint(data, position, end)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, position = varint(data, position, end)
            if number == wanted:
                found.append(value)
        elif kind == 2:
            length, position = varint(data, position, end)
            if number == wanted:
                at = position
                while at < position + length:
                    value, at = varint(data, at, position + length)
                    found.append(value)
            position += length
        else:
            position += 8 if kind == 1 else 4
    return found


def _of_onnx(graph: _Graph, folder: Path) -> Iterator[ByteProduct]:
    made = {name: node for node in graph.nodes for name in node.outputs}
    read: dict[str, list[_Node]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            read.setdefault(name, []).append(node)
    for node in graph.nodes:
        weight_name = _weight_of(node, made, read)
        stored = None if weight_name is None else graph.tensors.get(weight_name)
        if stored is None or len(stored.shape) < 2:
            continue
        weight = stored.array(folder)
        if weight is None:
            continue
        if node.op_type in _CONVOLUTIONS:
            if weight.shape[1] == 1 and node.flags.get("group", 1) == len(weight):
                continue
            # Kernels go through positions, and through the channels of each.
            weight = weight.reshape(len(weight), weight.shape[1], -1).transpose(2, 1, 0)
            weight = weight.reshape(-1, weight.shape[-1])
        elif node.flags.get("transB", 0):
            weight = weight.T
        yield ByteProduct(node.outputs[0], weight.reshape(-1, weight.shape[-1]))


def _weight_of(node: _Node, made: Mapping[str, _Node], read: Mapping[str, list[_Node]]) -> str | None:
    """Return the stored weight of a product in bytes, ``None`` where a node is none."""
    if node.op_type in _INTEGER_OPS:
        place = _INTEGER_OPS[node.op_type]
        return node.inputs[place] if len(node.inputs) > place else None
    if node.op_type not in _FLOAT_OPS or len(node.inputs) < 2:
        return None
    source, weight = (made.get(name) for name in node.inputs[:2])
    while source is not None and source.op_type in _MOVES:
        source = made.get(source.inputs[0])
    if source is None or source.op_type != "DequantizeLinear":
        return None  # weights alone are bytes: the product is one of floats
    if node.op_type == "Conv" and not _is_rounded(node, read):
        return None  # and so is a convolution that gives floats
    return weight.inputs[0] if weight is not None and weight.op_type == "DequantizeLinear" else None


def _is_rounded(node: _Node, read: Mapping[str, list[_Node]]) -> bool:
    reading = read.get(node.outputs[0], [])
    if len(reading) == 1 and reading[0].op_type in ("Relu", "Clip"):
        reading = read.get(reading[0].outputs[0], [])
    return any(each.op_type == "QuantizeLinear" for each in reading)


# --- OpenVINO ---------------------------------------------------------------------------------------------

_SCALED: Final = ("Convert", "Subtract", "Multiply", "Reshape")


@dataclass(frozen=True)
class _Layer:
    name: str
    kind: str
    said: Mapping[str, str]
    inputs: tuple[str, ...]


def _of_openvino(path: Path, stored_in: Path) -> Iterator[ByteProduct]:
    import numpy as np

    layers = _layers(path)
    weights: Any = None
    for layer in layers.values():
        if layer.kind not in ("Convolution", "GroupConvolution", "MatMul") or len(layer.inputs) < 2:
            continue
        source = _back(layers, layer.inputs[0], (*_MOVES, "Convert"))
        stored = _back(layers, layer.inputs[1], _SCALED)
        is_bytes = stored.kind == "Const" and stored.said.get("element_type") == "i8"
        if source.kind != "FakeQuantize" or not is_bytes:
            continue
        shape = tuple(int(size) for size in stored.said["shape"].split(",") if size.strip())
        if layer.kind == "GroupConvolution" and shape[1:3] == (1, 1):
            continue
        if weights is None:
            weights = np.memmap(stored_in, np.int8, mode="r")
        start, size = int(stored.said["offset"]), int(stored.said["size"])
        weight = np.asarray(weights[start : start + size]).reshape(shape)
        if layer.kind == "MatMul":
            if layer.said.get("transpose_b") in ("true", "1"):
                weight = weight.swapaxes(-1, -2)
            yield ByteProduct(layer.name, weight.reshape(-1, weight.shape[-1]))
            continue
        if layer.kind == "GroupConvolution":
            weight = weight.reshape(-1, *shape[2:])
        weight = weight.reshape(len(weight), weight.shape[1], -1)
        # oneDNN fills the channels of a position up to four.
        weight = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 4), (0, 0))).transpose(2, 1, 0)
        yield ByteProduct(layer.name, weight.reshape(-1, weight.shape[-1]))


def _layers(path: Path) -> dict[str, _Layer]:
    import xml.etree.ElementTree as ET

    try:
        root = ET.parse(path).getroot()  # noqa: S314  # a file of the bundle, read by the engine next
    except ET.ParseError as error:
        raise ValueError(f"{path.name}: {error}") from error
    edges: dict[str, dict[int, str]] = {}
    for edge in root.iterfind("edges/edge"):
        port = int(edge.get("to-port", 0))
        edges.setdefault(edge.get("to-layer", ""), {})[port] = edge.get("from-layer", "")
    found = {}
    for layer in root.iterfind("layers/layer"):
        number, data = layer.get("id", ""), layer.find("data")
        ports = edges.get(number, {})
        found[number] = _Layer(
            layer.get("name", ""),
            layer.get("type", ""),
            {} if data is None else dict(data.attrib),
            tuple(ports[port] for port in sorted(ports)),
        )
    return found


def _back(layers: Mapping[str, _Layer], number: str, through: Iterable[str]) -> _Layer:
    """Return what makes a value, through layers that only move or scale it."""
    layer = layers[number]
    while layer.kind in through and layer.inputs:
        layer = layers[layer.inputs[0]]
    return layer
