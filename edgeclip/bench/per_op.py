"""Where the time of a tower goes, operator by operator: what an engine says of itself.

ONNX Runtime and OpenVINO time their own kernels. Both fuse nodes and insert some of their own, so that a
kernel is named after *one* node of the file it computes, and some after none. Timing costs time: beside the
kernels stand the wall times of calls with and without it, so that nothing is mistaken for the other.
"""

from __future__ import annotations

import datetime
import importlib
import json
import re
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct, field

from edgeclip.errors import BackendUnavailableError, ConfigError
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
    TensorSpec,
    model_files,
    resolve_backend,
)
from edgeclip.tables import aligned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.bundle import TowerFiles

__all__ = ["OpEntry", "OpProfile", "example_feeds", "op_profile_schema", "profile_tower"]

SCHEMA_ID: Final = "urn:edgeclip:op-profile:1"
Ms = Annotated[float, Meta(ge=0)]

_TIMED: Final = ("ort", "openvino")
_TOKENS: Final = 64  # ids below it are in every vocabulary
_NO_LIMIT_S: Final = 1e9
_BLOCKED: Final = "_nchwc"
_FUSED: Final = frozenset({"Add", "Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})


class OpEntry(Struct, frozen=True, kw_only=True):
    """One kernel of an engine.

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


class OpProfile(Document, frozen=True, kw_only=True):
    """The kernels of one tower on one engine, in the order they ran. Made by :func:`profile_tower`.

    ``wall_samples_ms`` are calls without the engine's timing, ``timed_wall_samples_ms`` those whose kernels
    stand here; each warmed up first.
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
    placement: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def kernels_ms(self) -> float:
        """Sum of the medians of all kernels."""
        return sum(entry.ms for entry in self.ops)

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

    def to_table(self, *, most: int = 20) -> str:
        """Return the slowest kernels and the sums by kernel as a text table."""
        where = self.placement
        ran = f"{where['backend']} on {where['device']}, {where['threads']} thread(s), batch {self.batch}"
        timed = f"{self.timed_wall_ms:.2f} ms while kernels are timed"
        lines = [
            f"{self.subject}: {ran}, medians of {self.runs} runs",
            f"a call takes {self.wall_ms:.2f} ms, {timed}; kernels {self.kernels_ms:.2f} ms",
            "",
        ]
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
    options = replace(options, cache_dir=None)  # compiled forms that are kept time nothing
    with OpenSession(module.load(model, options, reason=reason), name=model.name) as session:
        given = dict(example_feeds(session.inputs, batch) if feeds is None else feeds)
        placement = session.chosen
        plain = _calls(session, given, runs, warmup, lambda done: on_run(done))
    with tempfile.TemporaryDirectory() as folder:
        engine = module.load_profiled(model, options, folder=Path(folder))
        with OpenSession(engine, name=model.name) as session:
            timed = _calls(session, given, runs, warmup, lambda done: on_run(warmup + runs + done))
            calls = engine.kernel_times()[warmup:]
    files = model if isinstance(tower, Path) else tower
    return OpProfile(
        subject=model.name,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tower=getattr(files, "tower", None) or model.model.name,
        batch=len(next(iter(given.values()))),
        runs=runs,
        warmup=warmup,
        ops=_entries(model, calls),
        wall_ms=plain.median_ms,
        wall_samples_ms=tuple(plain.samples_ms.tolist()),
        timed_wall_ms=timed.median_ms,
        timed_wall_samples_ms=tuple(timed.samples_ms.tolist()),
        bundle=_bundle(tower),
        placement=asdict(placement),
        host=Host.here().to_dict(),
        versions=versions(),
    )


def example_feeds(inputs: Mapping[str, TensorSpec], batch: int = 1) -> dict[str, NDArray[Any]]:
    """Return inputs of a tower that are like none in particular: noise, and small token ids.

    Args:
        inputs: of a session.
        batch: taken where the tower leaves it open.
    """
    draw = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {}
    for name, spec in inputs.items():
        shape = tuple(size if isinstance(size, int) else batch for size in spec.shape)
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            feeds[name] = draw.standard_normal(shape).astype(spec.dtype)
        else:
            limit = 256 if spec.dtype == "uint8" else _TOKENS
            feeds[name] = draw.integers(1, limit, shape).astype(spec.dtype)
    return feeds


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


def _entries(model: ModelFiles, calls: list[list[KernelTime]]) -> tuple[OpEntry, ...]:
    """Return the kernels, in the order of the calls that name them first, with their times in all calls."""
    sums = [_summed(call) for call in calls]
    keys = dict.fromkeys(key for found in sums for key in found)
    # Engines leave a kernel out of a call where it had nothing to do.
    samples = {key: [found.get(key, 0.0) for found in sums] for key in keys}
    medians = {key: float(np.median(found)) for key, found in samples.items()}
    total = sum(medians.values()) or 1.0
    of = _Nodes.of(model)
    return tuple(
        OpEntry(
            name=name,
            kernel=kernel,
            ms=medians[name, kernel],
            share=medians[name, kernel] / total,
            samples_ms=tuple(found),
            **of.named(name, kernel),
        )
        for (name, kernel), found in samples.items()
    )


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
        return cls(graph_nodes(model.model))

    def named(self, name: str, kernel: str) -> dict[str, str | None]:
        """Return node, op and output of the node that a kernel is named after."""
        match = None if self._pattern is None else self._pattern.search(name)
        node = self._blocked(name, kernel) if match is None else self._nodes[match[0]]
        if node is None:
            return {"node": None, "op": None, "output": None}
        return {"node": node.name, "op": node.op, "output": node.outputs[0] if node.outputs else None}

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
