"""Where the time of a tower goes, operator by operator: what an engine says of itself.

ONNX Runtime, OpenVINO and TensorRT time their own kernels. All fuse nodes and insert some of their own, so
that a kernel is named after *one* node of the file it computes, and some after none. Timing costs time:
beside the kernels stand the wall times of calls with and without it, so that nothing is mistaken for the
other.

An account adds what the kernels are there for: the block of the tower that each belongs to, how much it
calculates, and what the machine can calculate at best.
"""

from __future__ import annotations

import datetime
import importlib
import json
import re
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct, field

from edgeclip.bench.blocks import Place, file_nodes, named_products, places
from edgeclip.bench.feeds import example_feeds
from edgeclip.bench.operations import Product, products_of
from edgeclip.bench.report import PeaksEntry
from edgeclip.bundle import Bundle
from edgeclip.errors import BackendError, BackendUnavailableError, ConfigError, InputError
from edgeclip.onnx_files import GraphNode, graph_nodes
from edgeclip.runtime.documents import Document
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.latency import LatencySamples, measure
from edgeclip.runtime.session import (
    BACKENDS,
    DEFAULT_OPTIONS,
    KernelTime,
    ModelFiles,
    OpenSession,
    RuntimeOptions,
    model_files,
    resolve_backend,
)
from edgeclip.tables import aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.bench.peaks import Peaks
    from edgeclip.bundle import TowerFiles

__all__ = ["OpEntry", "OpProfile", "TimelineEntry", "op_profile_schema", "profile_tower"]

SCHEMA_ID: Final = "urn:edgeclip:op-profile:1"
Ms = Annotated[float, Meta(ge=0)]

_TIMED: Final = ("ort", "openvino", "tensorrt", "tensorrt_rtx")
_KEEP_ENGINES: Final = ("tensorrt", "tensorrt_rtx")  # they run what was compiled before
_NO_LIMIT_S: Final = 1e9
_BLOCKED: Final = "_nchwc"
_FUSED: Final = frozenset({"Add", "Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})


class OpEntry(Struct, frozen=True, kw_only=True):
    """One kernel of an engine.

    ``block`` and ``stage`` say where in the tower it is, and ``operations`` how many multiplications and
    additions its products have in a call, ``int8`` whether between bytes; null in profiles without account.
    ``kernel`` is what the engine calls its code (``QLinearConv``, ``brgconv_avx512_1x1_I8``) and ``name`` how
    it names this use of it. ``node`` is the node of the file it is named after, ``op`` its kind and
    ``output`` what it gives; null where the engine put the kernel in by itself. ``samples_ms`` has one time a
    run, ``ms`` is their median and ``share`` that of the medians of all kernels.
    """

    name: str
    kernel: str
    ms: Ms
    share: Annotated[float, Meta(ge=0, le=1)]
    samples_ms: Annotated[tuple[Ms, ...], Meta(min_length=1)]
    node: str | None = None
    op: str | None = None
    output: str | None = None
    block: str | None = None
    stage: str | None = None
    operations: Annotated[int, Meta(ge=0)] | None = None
    int8: bool = False


class TimelineEntry(Struct, frozen=True, kw_only=True):
    """One kernel of one call: which of ``ops``, when after the start of the call it began, for how long."""

    op: Annotated[int, Meta(ge=0)]
    start_ms: Ms
    ms: Ms


class OpProfile(Document, frozen=True, kw_only=True):
    """The kernels of one tower on one engine, in the order they ran. Made by :func:`profile_tower`.

    ``wall_samples_ms`` are calls without the engine's timing, ``timed_wall_samples_ms`` those whose kernels
    stand here; each warmed up first. ``timeline`` is the call whose kernels took the median time: with starts
    as the engine tells them (``clock`` is ``"engine"``) or, where it tells none, laid end to end in the order
    they ran (``"end-to-end"``). ``operations`` are those of a call, ``int8_operations`` those between bytes;
    ``why`` says why they are missing. ``peaks`` is what matrix products reached in this run.
    """

    schema: Literal[1] = 1
    kind: Literal["op-profile"] = "op-profile"
    subject: Annotated[str, Meta(min_length=1)]
    created: str
    tower: str
    batch: Annotated[int, Meta(ge=1)]
    runs: Annotated[int, Meta(ge=1)]
    warmup: Annotated[int, Meta(ge=0)]
    ops: Annotated[tuple[OpEntry, ...], Meta(min_length=1)]
    wall_ms: Ms
    wall_samples_ms: Annotated[tuple[Ms, ...], Meta(min_length=1)]
    timed_wall_ms: Ms
    timed_wall_samples_ms: Annotated[tuple[Ms, ...], Meta(min_length=1)]
    bundle: dict[str, str] = field(default_factory=dict)
    timeline: tuple[TimelineEntry, ...] = ()
    clock: Literal["engine", "end-to-end"] = "end-to-end"
    operations: Annotated[int, Meta(ge=0)] | None = None
    int8_operations: Annotated[int, Meta(ge=0)] | None = None
    why: str | None = None
    peaks: PeaksEntry | None = None
    placement: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def kernels_ms(self) -> float:
        """Sum of the medians of all kernels."""
        return sum(entry.ms for entry in self.ops)

    def ideal_ms(self, operations: int, int8_operations: int) -> float | None:
        """Return how long so many would take at the peak of this run; ``None`` where that is not known."""
        if self.peaks is None:
            return None
        threads = int(self.placement.get("threads", 1))
        real, integer = (
            1e6 * threads * max(each.values(), default=0.0)  # a millisecond has 10⁶ of 10⁹ a second
            for each in (self.peaks.float_gflops, self.peaks.int8_gops)
        )
        parts = ((operations - int8_operations, real), (int8_operations, integer))
        if any(count and not rate for count, rate in parts):
            return None
        return sum(count / rate for count, rate in parts if count)

    def by_output(self) -> dict[str, float]:
        """Return milliseconds by the output of the node that kernels are named after."""
        return self._summed(lambda entry: entry.output)

    def by_kernel(self) -> dict[str, float]:
        """Return milliseconds by kernel, longest first."""
        return dict(sorted(self._summed(lambda entry: entry.kernel).items(), key=lambda item: -item[1]))

    def _summed(self, key: Callable[[OpEntry], str | None]) -> dict[str, float]:
        found: dict[str, float] = {}
        for entry in self.ops:
            name = key(entry)
            if name is not None:
                found[name] = found.get(name, 0.0) + entry.ms
        return found

    def heading(self) -> list[str]:
        """Return what ran and how long calls took, in words."""
        where = self.placement
        ran = f"{where['backend']} on {where['device']}, {where['threads']} thread(s), batch {self.batch}"
        timed = f"{self.timed_wall_ms:.2f} ms while kernels are timed"
        return [
            f"{self.subject}: {ran}, medians of {self.runs} runs",
            f"a call takes {self.wall_ms:.2f} ms, {timed}; kernels {self.kernels_ms:.2f} ms",
        ]

    def to_table(self, *, most: int = 20) -> str:
        """Return the slowest kernels and the sums by kernel as a text table."""
        lines = [*self.heading(), ""]
        slowest = sorted(self.ops, key=lambda entry: -entry.ms)[:most]
        rows: list[tuple[str, ...]] = [("ms", "share", "kernel", "op", "node", "output")]
        rows += [
            (
                f"{each.ms:.3f}",
                f"{each.share:.1%}",
                each.kernel,
                each.op or "-",
                each.node or "-",
                each.output or "-",
            )
            for each in slowest
        ]
        lines += aligned(rows, range(2))
        if len(self.ops) > most:
            lines.append(f"and {len(self.ops) - most} more")
        total = self.kernels_ms or 1.0
        sums = list(self.by_kernel().items())
        lines += ["", *aligned([(f"{ms:.3f}", f"{ms / total:.1%}", name) for name, ms in sums], range(2))]
        return "\n".join(lines)


def op_profile_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a profile."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(OpProfile)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "edgeclip operator profile, schema 1",
        **schema,
    }


def profile_tower(
    tower: TowerFiles | Path,
    *,
    options: RuntimeOptions = DEFAULT_OPTIONS,
    feeds: Mapping[str, NDArray[Any]] | None = None,
    batch: int = 1,
    runs: int = 30,
    warmup: int = 5,
    account: bool = False,
    peaks: Peaks | None = None,
    on_run: Callable[[int], None] = lambda done: None,
) -> OpProfile:
    """Let an engine time its kernels.

    Args:
        tower: of a bundle, or an ONNX file or IR.
        options: backend, device and threads.
        feeds: inputs; :func:`example_feeds` without.
        batch: pictures or texts in a call, where ``feeds`` are not given.
        runs: timed calls, at least 1.
        warmup: calls before them.
        account: tell block and operations of every kernel, too; takes one more loading of the file.
        peaks: measured again before and after, and told in the profile.
        on_run: told after each call how many there were, of ``2 · (warmup + runs)``.

    Raises:
        ConfigError: ``runs``, ``warmup`` or ``batch`` is out of range.
        BackendUnavailableError: the backend is not here, or does not time its kernels.
        BackendError: the tower cannot be run.
        InputError: the inputs do not fit.
    """
    if runs < 1 or warmup < 0 or batch < 1:
        raise ConfigError(
            f"profile: got {runs} runs, {warmup} warm-up runs and batch {batch}, expected at least 1, 0, 1."
        )
    model = model_files(tower)
    backend, reason = resolve_backend(model.format, options)
    if backend not in _TIMED:
        raise BackendUnavailableError(
            f"backend {backend!r} does not time its kernels for us: expected one of {', '.join(_TIMED)}."
        )
    module = importlib.import_module(BACKENDS[backend].module)
    if backend not in _KEEP_ENGINES:
        options = replace(options, cache_dir=None)  # compiled forms that are kept time nothing
    if peaks is not None:
        peaks.measure()
    with OpenSession(module.load(model, options, reason=reason), name=model.name) as session:
        given = dict(example_feeds(session.inputs, batch) if feeds is None else feeds)
        placement = session.chosen
        plain = _calls(session, given, runs, warmup, lambda done: on_run(done))
    with tempfile.TemporaryDirectory() as folder:
        engine = module.load_profiled(model, options, folder=Path(folder))
        with OpenSession(engine, name=model.name) as session:
            timed = _calls(session, given, runs, warmup, lambda done: on_run(warmup + runs + done))
            calls = engine.kernel_times()[warmup:]
    if peaks is not None:
        peaks.measure()
    files = model if isinstance(tower, Path) else tower
    rows = len(next(iter(given.values())))
    told = _Account.of(tower, model, tuple(given)) if account else _Account()
    ops = _entries(model, calls, told, rows)
    timeline, clock = _timeline(calls, ops)
    return OpProfile(
        subject=model.name,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tower=getattr(files, "tower", None) or model.model.name,
        batch=rows,
        runs=runs,
        warmup=warmup,
        ops=ops,
        wall_ms=plain.median_ms,
        wall_samples_ms=tuple(plain.samples_ms.tolist()),
        timed_wall_ms=timed.median_ms,
        timed_wall_samples_ms=tuple(timed.samples_ms.tolist()),
        bundle=_bundle(tower),
        timeline=timeline,
        clock=clock,
        operations=told.total(rows),
        int8_operations=told.total(rows, int8=True),
        why=told.why,
        peaks=None if peaks is None else peaks.entry(),
        placement=asdict(placement),
        host=Host.here().to_dict(),
        versions=versions(),
    )


def _calls(
    session: OpenSession,
    feeds: Mapping[str, NDArray[Any]],
    runs: int,
    warmup: int,
    on_run: Callable[[int], None],
) -> LatencySamples:
    """Time exactly so many calls."""
    done = 0

    def call() -> None:
        nonlocal done
        session.run(feeds)
        done += 1
        on_run(done)

    return measure(call, warmup=warmup, min_samples=runs, min_duration_s=0.0, max_duration_s=_NO_LIMIT_S)


class _Account:
    """Where the nodes of a file are in the tower, and what its products cost."""

    def __init__(
        self,
        products: Sequence[Product] | None = None,
        found: Mapping[str, Place] | None = None,
        why: str | None = None,
    ) -> None:
        self.places = found or {}
        self.why = why
        self._products = products
        self._by_node = {each.node: each for each in products or ()}

    @classmethod
    def of(cls, tower: TowerFiles | Path, model: ModelFiles, inputs: Sequence[str]) -> _Account:
        try:
            products = products_of(tower)
        except (BackendError, InputError) as error:
            return cls(why=str(error))
        nodes, roots = file_nodes(model.model, inputs)
        return cls(products, places(nodes, roots, products, _others(tower)))

    def total(self, rows: int, *, int8: bool = False) -> int | None:
        if self._products is None:
            return None
        return rows * sum(each.operations for each in self._products if each.int8 or not int8)

    def products(self, nodes: Sequence[str]) -> list[Product]:
        return [self._by_node[name] for name in nodes if name in self._by_node]


def _others(tower: TowerFiles | Path) -> Iterator[list[tuple[int, str]]]:
    """Yield the blocks of the tower in other variants of its bundle whose names tell them, float32 first."""
    if isinstance(tower, Path) or tower.bundle is None:
        return
    bundle = Bundle.open(tower.bundle)
    entries = {name: each for name, each in bundle.manifest.variants.items() if tower.tower in each.towers}
    onnx = [name for name, each in entries.items() if each.format == "onnx" and name != tower.variant]
    for name in sorted(onnx, key=lambda each: entries[each].precision != "fp32"):
        files = bundle.variant(name).tower(tower.tower)
        nodes, roots = file_nodes(files.model, [each.name for each in files.inputs])
        try:
            named = named_products(nodes, roots, products_of(files))
        except (BackendError, InputError):
            continue  # a form that is not counted names nothing
        if named is not None:
            yield named


def _entries(
    model: ModelFiles, calls: list[list[KernelTime]], told: _Account, rows: int
) -> tuple[OpEntry, ...]:
    """Return the kernels, in the order of the calls that name them first, with their times in all calls."""
    sums = [_summed(call) for call in calls]
    keys = {(each.name, each.kernel): each.nodes for call in reversed(calls) for each in reversed(call)}
    ordered = dict.fromkeys(key for found in sums for key in found)
    # Engines leave a kernel out of a call where it had nothing to do.
    samples = {key: [found.get(key, 0.0) for found in sums] for key in ordered}
    medians = {key: float(np.median(found)) for key, found in samples.items()}
    total = sum(medians.values()) or 1.0
    of = _Nodes.of(model)
    nodes = {key: of.computed(*key, keys[key]) for key in ordered}
    slowest: dict[str, tuple[str, str]] = {}  # of the kernels that name a node, what computes it
    for key in sorted(ordered, key=medians.__getitem__):
        slowest.update((node.name, key) for node in nodes[key])
    place: Place | None = None
    entries = []
    for key, found in samples.items():
        products = told.products([node.name for node in nodes[key] if slowest[node.name] == key])
        heavy = max(products, key=lambda each: each.operations, default=None)
        node = next((each for each in nodes[key] if heavy and each.name == heavy.node), None)
        node = node or next(iter(nodes[key]), None)
        if node is not None and node.name in told.places:
            place = told.places[node.name]  # what an engine puts in by itself belongs to what ran before it
        entries.append(
            OpEntry(
                name=key[0],
                kernel=key[1],
                ms=medians[key],
                share=medians[key] / total,
                samples_ms=tuple(found),
                node=None if node is None else node.name,
                op=None if node is None else node.op,
                output=node.outputs[0] if node is not None and node.outputs else None,
                block=None if place is None else place.block,
                stage=None if place is None else place.stage,
                operations=rows * sum(each.operations for each in products) if told.places else None,
                int8=any(each.int8 for each in products),
            )
        )
    return tuple(entries)


def _timeline(
    calls: list[list[KernelTime]], ops: Sequence[OpEntry]
) -> tuple[tuple[TimelineEntry, ...], Literal["engine", "end-to-end"]]:
    """Return the call whose kernels took the median time, and where its starts come from."""
    order = sorted(calls, key=lambda call: sum(each.ms for each in call))
    call = order[(len(order) - 1) // 2]
    numbers = {(each.name, each.kernel): place for place, each in enumerate(ops)}
    told = all(each.start_ms is not None for each in call)
    found: list[TimelineEntry] = []
    end_ms = 0.0
    for each in sorted(call, key=lambda one: one.start_ms or 0.0) if told else call:
        # Starts and lengths are rounded each for itself: a kernel may seem to begin before the last one ends.
        start_ms = max(each.start_ms or 0.0, end_ms)
        found.append(TimelineEntry(op=numbers[each.name, each.kernel], start_ms=start_ms, ms=each.ms))
        end_ms = start_ms + each.ms
    return tuple(found), "engine" if told else "end-to-end"


def _summed(call: list[KernelTime]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for each in call:
        key = (each.name, each.kernel)
        found[key] = found.get(key, 0.0) + each.ms
    return found


class _Nodes:
    """The nodes of a file, found again in the names that an engine makes of theirs."""

    def __init__(self, nodes: Sequence[GraphNode]) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._makers = {output: node for node in nodes for output in node.outputs}
        longest_first = sorted(filter(None, self._nodes), key=len, reverse=True)
        self._pattern = (
            re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, longest_first))})(?![^\W_])")
            if longest_first
            else None
        )

    @classmethod
    def of(cls, model: ModelFiles) -> _Nodes:
        if model.model.suffix == ".xml":
            layers = ET.parse(model.model).getroot().iterfind("layers/layer")  # noqa: S314  # the engine has read it
            return cls([GraphNode(each.get("name", ""), each.get("type", ""), (), ()) for each in layers])
        return cls(graph_nodes(model.model) if model.model.suffix == ".onnx" else ())  # an engine has none

    def computed(self, name: str, kernel: str, said: Sequence[str]) -> list[GraphNode]:
        """Return the nodes that a kernel computes: those its engine says, else the one it is named after."""
        known = [self._nodes[each] for each in said if each in self._nodes]
        if known:
            return known
        match = None if self._pattern is None else self._pattern.search(name)
        node = self._blocked(name, kernel) if match is None else self._nodes[match[0]]
        return [] if node is None else [node]

    def _blocked(self, name: str, kernel: str) -> GraphNode | None:
        """Return the node of a kernel on blocked channels.

        ONNX Runtime names these after the tensor they end in, behind the sums and activations that it fused.
        """
        node = self._makers.get(name.removesuffix(_BLOCKED)) if name.endswith(_BLOCKED) else None
        waiting = [node] if node else []
        while waiting:
            each = waiting.pop(0)
            if each.op == kernel:
                return each
            if each.op in _FUSED:
                waiting += [self._makers[tensor] for tensor in each.inputs if tensor in self._makers]
        return None


def _bundle(tower: TowerFiles | Path) -> dict[str, str]:
    if isinstance(tower, Path):
        return {}
    said = {"digest": tower.bundle_digest, "variant": tower.variant, "tower_digest": tower.digest}
    return {name: value for name, value in said.items() if value}
