"""Which block of a tower each node of its file belongs to.

Files do not say it in so many words. Names of weights do (``tower.stages.0.blocks.1.1.body.expand.weight``),
where the exporter keeps them; those of older exporters are paths themselves (``/blocks.0/conv/Conv``). A node
without weights belongs to the block of what it reads. Where a file has lost the names, as int8 and OpenVINO's
form do, those of another variant of the tower are taken over, if both have the same products in the same
order. Where there is none, blocks are read off the graph: one ends with the sum of a residual branch, or with
a product that is not activated (the linear end of an inverted bottleneck), and is called by what its products
give.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from edgeclip.bench.operations import Product
from edgeclip.onnx_files import GraphNode, graph_nodes

__all__ = ["BEFORE", "Place", "file_nodes", "named_products", "places"]

BEFORE: Final = "input"
"""The block of what runs before the first weight: scaling of pictures, casts."""

_LISTS: Final = frozenset({"blocks", "layers", "resblocks"})
_WRAPPERS: Final = ("tower.", "backbone.", "trunk.")
_PARAMETER: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_STAGE: Final = re.compile(r"(?:.*\.)?stages\.\d+")
# What neither activates nor mixes: behind it a product is as linear as before.
_QUANTIZES: Final = frozenset({"DequantizeLinear", "FakeQuantize", "QuantizeLinear"})
_LINEAR: Final = _QUANTIZES | frozenset(
    {"Add", "Cast", "Convert", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_SUMS: Final = frozenset({"Add", "Sum"})
_JOINS: Final = frozenset({"Concat"})
_CUTS: Final = _QUANTIZES | frozenset({"Slice", "Split", "StridedSlice", "VariadicSplit"})


class Place(NamedTuple):
    """Where in a tower something is: its block (``stages.0.blocks.1``), and the stage around that."""

    block: str
    stage: str


def file_nodes(path: Path, inputs: Iterable[str]) -> tuple[list[GraphNode], set[str]]:
    """Return the nodes of an ONNX file or IR in their order, and the tensors that are its inputs.

    Tensors of an IR are called by layer and port.

    Args:
        path: the file.
        inputs: their names, which an ONNX file does not set apart from weights.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    if path.suffix != ".xml":
        return graph_nodes(path), set(inputs)
    root = ET.parse(path).getroot()  # noqa: S314  # the engine has read it
    reads: dict[str, list[str]] = {}
    for edge in root.iterfind("edges/edge"):
        source = f"{edge.get('from-layer')}:{edge.get('from-port')}"
        reads.setdefault(edge.get("to-layer", ""), []).append(source)
    nodes: list[GraphNode] = []
    roots: set[str] = set()
    for layer in root.iterfind("layers/layer"):
        number, kind = layer.get("id", ""), layer.get("type", "")
        gives = tuple(f"{number}:{port.get('id')}" for port in layer.iterfind("output/port"))
        if kind == "Parameter":
            roots.update(gives)
        else:
            nodes.append(GraphNode(layer.get("name", ""), kind, tuple(reads.get(number, ())), gives))
    return nodes, roots


class _Graph:
    """What of a file depends on its inputs, in order, and what is known of the rest by name."""

    def __init__(self, nodes: Sequence[GraphNode], roots: Iterable[str]) -> None:
        live = set(roots)
        constant: dict[str, frozenset[str]] = {}
        self.nodes: list[GraphNode] = []
        for node in nodes:
            if any(name in live for name in node.inputs):
                self.nodes.append(node)
                live.update(node.outputs)
                continue
            names = frozenset().union(*(constant.get(each, {each}) for each in node.inputs))
            constant.update((output, names | {output}) for output in node.outputs)
        self.live = live
        self.makers = {output: node for node in self.nodes for output in node.outputs}
        self.readers: dict[str, list[GraphNode]] = {}
        of_node = {
            node: [
                sorted(constant.get(each, {each}))
                for each in node.inputs
                if each not in live and each  # an input left out has no name
            ]
            for node in self.nodes
        }
        used: dict[str, int] = {}
        for node in self.nodes:
            for each in node.inputs:
                self.readers.setdefault(each, []).append(node)
            for name in {name for names in of_node[node] for name in names}:
                used[name] = used.get(name, 0) + 1
        # Equal weights are stored once: a name that several nodes share says nothing of any.
        self._paths = {
            node: [_module(name) for names in lists for name in names if used[name] == 1 and _is_path(name)]
            for node, lists in of_node.items()
        }

    def path(self, node: GraphNode) -> str | None:
        """Return the module that a node says it belongs to."""
        if node.name.startswith("/") and node.name.count("/") > 1:
            return ".".join(node.name.strip("/").split("/")[:-1])
        found = self._paths[node]
        return found[0] if found else None

    def product_path(self, node: GraphNode) -> str | None:
        """Return the module of a product, which may stand at the bias that is added to it alone."""
        said = self.path(node)
        readers = [each for output in node.outputs for each in self.readers.get(output, ())]
        if said is None and len(readers) == 1 and readers[0].op in _SUMS:
            return self.path(readers[0])
        return said

    def weighted(self, products: Iterable[Product]) -> list[tuple[GraphNode, Product]]:
        """Return the products that multiply by a weight; parts of a convolution that was cut up are one."""
        by_name = {node.name: node for node in self.nodes}
        found: dict[str, tuple[GraphNode, Product]] = {}
        for each in products:
            node = by_name.get(each.node)
            if node is None or sum(name in self.live for name in node.inputs) != 1:
                continue
            whole = self.whole(node)
            if whole in found:
                first, known = found[whole]
                found[whole] = (first, known._replace(operations=known.operations + each.operations))
            else:
                found[whole] = (node, each)
        return list(found.values())

    def whole(self, node: GraphNode) -> str:
        """Return what tells a product from others: its output, or for a part what it is part of.

        Parts of a convolution read one tensor, or pieces that one node cut from it, and are joined again.
        """
        tensor = node.outputs[0] if node.outputs else node.name
        ends = tensor
        while len(readers := self.readers.get(ends, [])) == 1 and readers[0].op in _LINEAR:
            if sum(name in self.live for name in readers[0].inputs) > 1:
                return tensor
            ends = readers[0].outputs[0]
        if len(readers) != 1 or readers[0].op not in _JOINS:
            return tensor
        read = next((name for name in node.inputs if name in self.live), "")
        while (maker := self.makers.get(read)) is not None and maker.op in _CUTS:
            read = next(name for name in maker.inputs if name in self.live)
        return f"{readers[0].outputs[0]} of {read}"

    def is_part(self, node: GraphNode) -> bool:
        """Return whether a product is part of a convolution."""
        return self.whole(node) != (node.outputs[0] if node.outputs else node.name)


def named_products(
    nodes: Sequence[GraphNode], roots: Iterable[str], products: Sequence[Product]
) -> list[tuple[int, str]] | None:
    """Return operations and block of every product with a weight, ``None`` unless names tell all of them."""
    graph = _Graph(nodes, roots)
    weighted = graph.weighted(products)
    paths = _paths(graph, weighted)
    named = [(each.operations, _block(path)) for (_, each), path in zip(weighted, paths, strict=True) if path]
    return named if named and all(paths) else None


def _paths(graph: _Graph, weighted: Sequence[tuple[GraphNode, Product]]) -> list[str | None]:
    """Return the module of every product with a weight.

    A convolution that was cut into parts has weights of no name. It opens the module of the product after it.
    """
    found: list[str | None] = []
    for node, _ in reversed(weighted):
        path = graph.product_path(node)
        if path is None and found and graph.is_part(node):
            path = found[-1]
        found.append(path)
    return found[::-1]


def places(
    nodes: Sequence[GraphNode],
    roots: Iterable[str],
    products: Sequence[Product],
    like: Iterable[Sequence[tuple[int, str]]] = (),
) -> dict[str, Place]:
    """Return where the nodes of a file are, by name.

    Args:
        nodes: of the file, in order.
        roots: tensors that are its inputs.
        products: of the file, as :func:`edgeclip.bench.operations.products_of` finds them.
        like: blocks of other forms of the tower, from :func:`named_products`; tried in order where the names
            of this file do not tell all.
    """
    graph = _Graph(nodes, roots)
    weighted = graph.weighted(products)
    paths = _paths(graph, weighted)
    block_of: dict[str, str] = {}
    if all(paths):
        block_of = {node.name: _block(path) for (node, _), path in zip(weighted, paths, strict=True) if path}
    else:
        for other in like:
            taken = _taken_over(weighted, other)
            if taken is not None:
                block_of = taken
                break
        else:
            block_of = _units(graph, weighted, paths)
    stages = _stages(block_of, weighted)
    wholes = {graph.whole(node): block_of[node.name] for node, _ in weighted}
    made: dict[str, tuple[int, str]] = {}  # tensor: when it was made, and in which block
    found: dict[str, Place] = {}
    for when, node in enumerate(graph.nodes):
        block = wholes.get(graph.whole(node))
        path = graph.path(node)
        if block is None and path is not None and all(paths):
            block = _block(path)
        if block is None:  # of what it reads, what was made last
            block = max((made[name] for name in node.inputs if name in made), default=(0, BEFORE))[1]
        made.update((output, (when, block)) for output in node.outputs)
        found[node.name] = Place(block, stages.get(block) or _named_stage(block) or block)
    return found


def _taken_over(
    weighted: Sequence[tuple[GraphNode, Product]], other: Sequence[tuple[int, str]]
) -> dict[str, str] | None:
    """Return blocks by product as another form of the tower has them; ``None`` where it is another tower.

    The n-th product of a size there is the n-th of that size here: forms differ in what of two branches they
    write first.
    """
    if sorted(operations for operations, _ in other) != sorted(each.operations for _, each in weighted):
        return None
    waiting: dict[int, list[str]] = {}
    for operations, block in reversed(other):
        waiting.setdefault(operations, []).append(block)
    return {node.name: waiting[each.operations].pop() for node, each in weighted}


def _units(
    graph: _Graph, weighted: Sequence[tuple[GraphNode, Product]], paths: Sequence[str | None]
) -> dict[str, str]:
    """Return blocks by product, from the shape of the graph and the names that are left."""
    units: list[list[int]] = []
    sizes = {graph.whole(node): product for node, product in weighted}
    for place, (node, _) in enumerate(weighted):
        before = _before(graph, node, sizes)
        named = {_block(path) for path in (paths[at] for at in units[-1]) if path} if units else set()
        path = paths[place]
        if path is not None and (named or not _is_numbered(_block(path))):
            fresh = _block(path) not in named
        else:  # what reads the picture, and modules of their own, end with themselves
            alone = len(units) == 1 == len(units[-1]) or not all(map(_is_numbered, named))
            fresh = not units or alone or before
        if fresh:
            units.append([place])
        else:
            units[-1].append(place)
    found: dict[str, str] = {}
    for unit in units:
        says = [_block(path) for path in (paths[at] for at in unit) if path]
        gives = [_short(weighted[at][0]) for at in (unit[0], unit[-1])]
        label = says[0] if says else gives[0] if len(unit) == 1 else f"{gives[0]}…{gives[1]}"
        found.update((weighted[at][0].name, label) for at in unit)
    return found


def _before(graph: _Graph, node: GraphNode, sizes: Mapping[str, Product]) -> bool:
    """Return whether a block ends before a product."""
    waiting = [name for name in node.inputs if name in graph.live]
    while waiting:
        maker = graph.makers.get(waiting.pop())
        if maker is None:
            continue
        product = sizes.get(graph.whole(maker))
        if product is not None:
            return not product.depthwise
        if maker.op in _SUMS and sum(name in graph.live for name in maker.inputs) > 1:
            return True
        if maker.op in _LINEAR:
            waiting += [name for name in maker.inputs if name in graph.live]
    return False


def _short(node: GraphNode) -> str:
    """Return what a product gives, or its own name where tensors have none."""
    return node.name if ":" in node.outputs[0] else node.outputs[0]


def _stages(block_of: Mapping[str, str], weighted: Iterable[tuple[GraphNode, Product]]) -> dict[str, str]:
    """Return stages by block: as their names say, or the size of the picture they give."""
    found: dict[str, str] = {}
    for node, product in weighted:
        block, shape = block_of[node.name], product.output
        size = f"{shape[2]}x{shape[3]}" if len(shape) == 4 and shape[2] > 1 else None
        found[block] = _named_stage(block) or (size if _is_numbered(block) else None) or _list_of(block)
    return found


def _is_numbered(block: str) -> bool:
    return re.search(r"\d$", block) is not None


def _named_stage(block: str) -> str | None:
    match = _STAGE.match(block)
    return None if match is None else match[0]


def _list_of(block: str) -> str:
    """Return what a numbered block is one of: ``transformer`` for ``transformer.layers.3``."""
    parts = block.split(".")
    if parts[-1].isdecimal() and len(parts) > 1:
        parts = parts[:-2] or parts[:1]
    return ".".join(parts)


def _is_path(name: str) -> bool:
    return _PARAMETER.fullmatch(name) is not None


def _module(name: str) -> str:
    """Return the module of a weight, which is what stands before its last dot."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    module, dot, last = name.rpartition(".")
    return module if dot else last


def _block(path: str) -> str:
    """Return the block that a module is in: up to the number of a list of blocks, else its first part."""
    parts = path.split(".")
    for place, part in enumerate(parts[:-1]):
        if part in _LISTS and parts[place + 1].isdecimal():
            return ".".join(parts[: place + 2])
    if parts[0] == "stages" and len(parts) > 2:
        return ".".join(parts[:3])
    return parts[0]
