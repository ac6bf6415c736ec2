"""What an ONNX graph says of itself, found without the onnx package: external data, and its nodes.

An engine opens whatever path a graph names, and older ones do not check where that leads. A bundle therefore
asks this module before it hands a graph out. A profile asks for the nodes, to find them in what engines say.
The graph is walked as protobuf wire format (https://protobuf.dev/programming-guides/encoding) along the
messages of onnx.proto that matter; weights are skipped over, not read. Nothing is interpreted beyond that.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["GraphNode", "external_locations", "fields", "graph_nodes", "varint"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Message -> field number -> message in that field; numbers as in onnx.proto.
_MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "TensorProto": {13: "StringStringEntryProto"},
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
}
_ENTRY = "StringStringEntryProto"
_KEY = b"location"
_GRAPH, _NODE = 7, 1  # fields of ModelProto and GraphProto


def external_locations(path: Path) -> set[str]:
    """Return the paths of external data a graph names, as they stand in it, relative to its own folder.

    Costs 2 to 5 ms for the graph of an image tower, whatever the size of its weights.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no protobuf message, or holds a location that is no UTF-8.
    """
    with path.open("rb") as stream:
        if not stream.seek(0, 2):
            return set()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _locations(data)


class GraphNode(NamedTuple):
    """A node of a graph: the names of what it reads and gives, constants among them."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def graph_nodes(path: Path) -> list[GraphNode]:
    """Return the nodes of a graph in their order, without those of graphs inside attributes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no protobuf message, or a name is no UTF-8.
    """
    with path.open("rb") as stream:
        if not stream.seek(0, 2):
            return []
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return [
                _node(data, start, end)
                for graph, begin, stop in fields(data, 0, len(data))
                if graph == _GRAPH
                for number, start, end in fields(data, begin, stop)
                if number == _NODE
            ]


def _node(data: mmap.mmap, start: int, end: int) -> GraphNode:
    said: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}  # input, output, name, op_type
    for number, a, b in fields(data, start, end):
        if number in said:
            said[number].append(data[a:b].decode("utf-8"))
    inputs, outputs, name, op = said.values()
    return GraphNode("".join(name[-1:]), "".join(op[-1:]), tuple(inputs), tuple(outputs))


def _locations(data: mmap.mmap) -> set[str]:
    found: set[str] = set()
    # A stack, not recursion: graphs nest in attributes as deep as a hostile file likes.
    stack = [("ModelProto", 0, len(data))]
    while stack:
        message, start, end = stack.pop()
        if message == _ENTRY:
            entry = list(fields(data, start, end))
            keys = [data[a:b] for number, a, b in entry if number == 1]
            if _KEY in keys:
                found.update(data[a:b].decode("utf-8") for number, a, b in entry if number == 2)
            continue
        inner = _MESSAGES[message]
        for number, a, b in fields(data, start, end):
            if number in inner:
                stack.append((inner[number], a, b))
    return found


def fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of the length-delimited fields of a message; others are skipped.

    Raises:
        ValueError: it is no message.
    """
    position = start
    while position < end:
        tag = data[position]
        position += 1
        if tag >= 0x80:
            tag, position = varint(data, position - 1, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, position = varint(data, position, end)
        elif kind == _BYTES:
            length = data[position] if position < end else 0x80
            position += 1
            if length >= 0x80:
                length, position = varint(data, position - 1, end)
            if length > end - position:
                raise ValueError("a field reaches beyond its message")
            yield number, position, position + length
            position += length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field has the wire type {kind}")
    if position != end:
        raise ValueError("a field reaches beyond its message")


def varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Return a number of variable length and the position behind it.

    Raises:
        ValueError: it does not end.
    """
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number does not end")
