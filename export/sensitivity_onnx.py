"""What :mod:`edgeclip.calibration.sensitivity` asks of an ONNX graph: a switchboard, the real thing, times.

The graph is that of one tower after the passes that come before quantization. Everything that can be
quantized may be: what the default policies leave in float (the stem, products with one vector a picture) is
measured like the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeclip.bench.per_op import OpProfile, profile_tower
from edgeclip.bundle import Requires, TowerFiles
from edgeclip.cache import HostCache
from edgeclip.calibration.latency_table import LatencyTable, Tensors
from edgeclip.calibration.ranges import means, observe
from edgeclip.errors import ExportError
from edgeclip.quantization import TENSORRT, Int8Policy, Ranges, RoundedWeight, Scheme
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import DEFAULT_OPTIONS, OpenSession, RuntimeOptions, open_session

from .build import DEFAULT_SETTINGS, Int8Settings
from .int8 import method_of, policy_of
from .passes import apply
from .passes._graph import readers
from .passes.bias import CorrectBiases, corrected
from .passes.keep_float import KeepFloat
from .passes.qdq import InsertQdq, observed, place
from .passes.switches import SWITCHES, InsertSwitches
from .ranges import GraphWatch, check_rows
from .rounding import rounded_weights
from .storage import store_small
from .to_onnx import built_tower

__all__ = ["CHOSEN", "Quantizable", "SwitchedTower"]

CHOSEN: Final = Int8Policy("chosen", stem=True, pooled=True)
"""The policy of chosen products: all may be quantized but those that are named."""
_EXACT: Final = MappingProxyType({"session.x64quantprecision": "1"})
_SIMULATED: Final = MappingProxyType({"session.disable_quant_qdq": "1"})
# Blocks as weights are named in this project: numbered in stages or towers; stems and heads are not numbered.
_NUMBERED: Final = re.compile(r"(?:\w+\.)*?(?:blocks|layers|resblocks)\.\d+")
_NAMED: Final = re.compile(r"(?:stages\.\d+\.)?[a-z_]+(?=\.)")
_FUSED: Final = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "LeakyRelu", "Tanh", "Add"})


@dataclass(frozen=True, eq=False)
class Quantizable:
    """A tower with all that is needed to quantize any of its products.

    Attributes:
        graph: float32, with shapes.
        nodes: names of what the products give, in the order of the graph.
        ranges: of every tensor that might be rounded.
        means: of the channels of what goes into products whose bias is corrected; ``None`` corrects none.
        rounded: weights in integers by product; the rest get the nearest levels.
        scheme: what int8 means.
        what: the tower, as messages name it.
    """

    graph: onnx.ModelProto
    nodes: tuple[str, ...]
    ranges: Ranges
    means: Mapping[str, NDArray[np.float64]] | None
    rounded: Mapping[str, RoundedWeight]
    scheme: Scheme
    what: str

    @classmethod
    def of(
        cls,
        graph: onnx.ModelProto,
        rows: NDArray[np.generic],
        scheme: Scheme,
        settings: Int8Settings = DEFAULT_SETTINGS,
        *,
        what: str,
        options: RuntimeOptions = DEFAULT_OPTIONS,
    ) -> Quantizable:
        """Observe a graph.

        Args:
            graph: float32, of one tower; stays as it is.
            rows: ``(n, …)`` for its input, at least 16.
            scheme: what int8 means.
            settings: how ranges are chosen, and whether biases are corrected.
            what: the tower, as messages name it.
            options: where to run.

        Raises:
            CalibrationError: rows do not fit, or a tensor is not finite for some of them.
            ExportError: nothing can be quantized.
        """
        check_rows(graph, rows, what=what)
        shaped = onnx.shape_inference.infer_shapes(graph, data_prop=True)
        model = ir.from_proto(shaped)
        nodes = place(model, CHOSEN)
        if not nodes:
            raise ExportError(
                f"{what}: nothing in it can be quantized, expected products with constant weights; export it "
                "in float."
            )
        watch = GraphWatch(shaped, what=what, options=options)
        ranges = observe(
            watch,
            rows,
            observed(model, nodes, scheme),
            settings.method or method_of(policy_of(graph)),
            scheme=scheme,
            what=what,
            cache=HostCache.open(watch.digest),
        )
        sources = corrected(model, nodes) if settings.correct_biases else {}
        rounded: dict[str, RoundedWeight] = {}
        if settings.rounding == "moments":
            rounded = rounded_weights(model, watch, rows, nodes, scheme, corrected=sources, what=what)
        names = tuple(dict.fromkeys(sources.values()))
        found = means(watch, rows, names) if settings.correct_biases else None
        return cls(shaped, nodes, ranges, found, rounded, scheme, what)

    @cached_property
    def digest(self) -> str:
        """Sha256 of graph, ranges and scheme."""
        digest = hashlib.sha256(self.graph.SerializeToString(deterministic=True))
        shifts = {name: array.tolist() for name, array in (self.means or {}).items()}
        digest.update(json.dumps([self.nodes, self.ranges, shifts, self.scheme.to_dict()]).encode())
        for name, weight in self.rounded.items():
            digest.update(name.encode() + weight.integers.tobytes())
        return digest.hexdigest()

    @cached_property
    def blocks(self) -> Mapping[str, str]:
        """The block of each product, by the names of weights: its own, else the last one that says."""
        found: dict[str, str] = {}
        before = ""
        graph = ir.from_proto(self.graph).graph
        for node in graph:
            said = [
                _block(value.name or "")
                for value in node.inputs
                if value is not None and value.is_initializer()
            ]
            before = next(filter(None, said), before)
            name = node.outputs[0].name or ""
            if name in self.nodes:
                found[name] = before or name
        return found

    @cached_property
    def tensors(self) -> Tensors:
        """Which product a tensor belongs to."""
        made: dict[str, str] = {}
        read: dict[str, str] = {}
        for node in ir.from_proto(self.graph).graph:
            name = node.outputs[0].name or ""
            if name not in self.nodes:
                continue
            source: ir.Value | None = node.inputs[0]
            read.setdefault("" if source is None else source.name or "", name)
            value = node.outputs[0]
            made[name] = name
            while len(following := readers(value)) == 1 and following[0].op_type in _FUSED:
                value = following[0].outputs[0]
                made.setdefault(value.name or "", name)
        return Tensors(self.nodes, made, read)

    def corrections(self, on: Collection[str]) -> list[ir.passes.PassBase]:
        """Return the passes that go before the one that quantizes these products."""
        return [] if self.means is None else [CorrectBiases(tuple(on), self.means, self.scheme, self.rounded)]

    def quantized(self, on: Collection[str], *, stored: bool = True) -> onnx.ModelProto:
        """Return the graph with these products in int8.

        Args:
            on: their names.
            stored: for CPUs, round the rest as files store it.
        """
        nodes = [name for name in self.nodes if name in set(on)]
        if not nodes:
            return self.graph
        insert = InsertQdq(nodes, self.ranges, self.scheme, self.rounded)
        graph = apply(self.graph, [*self.corrections(nodes), insert, KeepFloat()], what=self.what)
        if stored and self.scheme != TENSORRT:
            policy = policy_of(self.graph)
            store_small(graph, tables=policy.tables, others=policy.others)
        return graph

    def embed_exact(
        self, rows: NDArray[Any], on: Collection[str], *, options: RuntimeOptions = DEFAULT_OPTIONS
    ) -> NDArray[np.float32]:
        """Return embeddings ``(n, E)`` of the graph with these products in int8, in ONNX Runtime.

        Its exact integer kernels are taken, whatever this processor has; TensorRT's graph is computed in
        float, as its parity is where there is no GPU.
        """
        config = _EXACT if self.scheme.integer_outputs else _SIMULATED
        with _opened(self.quantized(on), self.what, config, options) as session:
            return np.asarray(run_rows(session, rows), np.float32)

    def opened(
        self, on: Collection[str], *, options: RuntimeOptions = DEFAULT_OPTIONS
    ) -> contextlib.AbstractContextManager[OpenSession]:
        """Open the graph with these products in int8, with the kernels that this processor has."""
        return _opened(self.quantized(on), self.what, {}, options)

    def times(
        self,
        *,
        options: RuntimeOptions = DEFAULT_OPTIONS,
        runs: int = 30,
        on_run: Callable[[int], None] = lambda done: None,
    ) -> LatencyTable:
        """Measure float and int8 kernels on this host, in ONNX Runtime.

        Args:
            options: threads.
            runs: timed calls of each.
            on_run: told after each call.
        """

        def profile(on: Collection[str]) -> OpProfile:
            # Read from ONNX, OpenVINO would compute such weights of linear maps anew in each call.
            graph = self.quantized(on, stored=self.scheme.integer_outputs)
            with _written(graph, self.what, {}) as files:
                return profile_tower(files, options=options, runs=runs, on_run=on_run)

        return LatencyTable.of(profile(()), profile(self.nodes), self.tensors)


class SwitchedTower:
    """A switchboard in ONNX Runtime; see :class:`edgeclip.calibration.sensitivity.Switchboard`.

    It is a context manager, which holds the session.

    Args:
        tower: observed.
        options: where to run.
    """

    def __init__(self, tower: Quantizable, *, options: RuntimeOptions = DEFAULT_OPTIONS) -> None:
        self._tower, self._options = tower, options
        self._stack = contextlib.ExitStack()
        self._session: OpenSession | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of what the products give, in the order of the graph."""
        return self._tower.nodes

    @property
    def blocks(self) -> Mapping[str, str]:
        """The block of each product."""
        return self._tower.blocks

    @property
    def digest(self) -> str:
        """Sha256 of graph, ranges and scheme."""
        return self._tower.digest

    def __enter__(self) -> SwitchedTower:
        """Open the session."""
        tower = self._tower
        quantize = InsertQdq(tower.nodes, tower.ranges, tower.scheme, tower.rounded)
        switches = InsertSwitches(quantize, before=tower.corrections(tower.nodes))
        graph = apply(tower.graph, [switches], what=tower.what)
        self._session = self._stack.enter_context(_opened(graph, tower.what, _SIMULATED, self._options))
        return self

    def __exit__(self, *args: object) -> None:
        """Close the session."""
        self._session = None
        self._stack.close()

    def embed(self, rows: NDArray[Any], on: Collection[str]) -> NDArray[np.float32]:
        """Return embeddings ``(n, E)`` with exactly these products in int8."""
        if self._session is None:
            raise ExportError(f"{self._tower.what}: its switchboard is closed; use it in a with statement.")
        chosen = set(on)
        unknown = sorted(chosen.difference(self.nodes))
        if unknown:
            raise ExportError(
                f"{self._tower.what}: it has no product {unknown[0]!r}, expected some of {self.nodes}."
            )
        switches = np.array([name in chosen for name in self.nodes], np.bool_)
        return np.asarray(run_rows(_Switched(self._session, switches), rows), np.float32)


class _Switched:
    """A session with its switches set."""

    def __init__(self, session: OpenSession, switches: NDArray[np.bool_]) -> None:
        self._session, self._switches = session, switches
        self.inputs = {name: spec for name, spec in session.inputs.items() if name != SWITCHES}
        self.outputs, self.chosen = session.outputs, session.chosen

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the tower."""
        return self._session.run({**feeds, SWITCHES: self._switches})

    def close(self) -> None:
        """Leave the session open: it is shared."""


@contextlib.contextmanager
def _written(graph: onnx.ModelProto, what: str, config: Mapping[str, str]) -> Iterator[TowerFiles]:
    """Give the files of a graph, as an engine opens them."""
    with tempfile.TemporaryDirectory(prefix="edgeclip-sensitivity-") as folder:
        built = built_tower("tower", graph)
        for name, content in built.files.items():
            assert isinstance(content, bytes)
            (Path(folder) / name).write_bytes(content)
        files = tuple(Path(folder) / name for name in built.files)
        yield TowerFiles(
            tower="tower",
            model=Path(folder) / built.model,
            files=files,
            variant=what,
            format="onnx",
            precision="int8",
            inputs=built.inputs,
            outputs=built.outputs,
            requires=Requires(),
            session_config=dict(config),
            digest=hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        )


@contextlib.contextmanager
def _opened(
    graph: onnx.ModelProto, what: str, config: Mapping[str, str], options: RuntimeOptions
) -> Iterator[OpenSession]:
    with _written(graph, what, config) as files, open_session(files, options=options) as session:
        yield session


def _block(weight: str) -> str:
    """Return the block that the name of a weight tells; empty where it was made up on the way."""
    name = weight.removeprefix("tower.")
    match = _NUMBERED.match(name) or _NAMED.match(name)
    return "" if match is None else match[0]
