"""What int8 costs, product by product, and which products are worth keeping in float.

Cost is measured where it counts, on the embedding: one minus the cosine to float, and the share of pictures
whose best label changes. A :class:`Switchboard` embeds rows with any products in simulated int8, so that one
session measures all of them.

Costs hardly add up: errors of products lean on one another. So :func:`choose` takes from them an order alone
(cost over the time that int8 saves, which is the order of the knapsack's Lagrangian), finds by measuring how
far to follow it, takes back what is not needed, and has the last word from the real graph in its real engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np

from edgeclip.errors import CalibrationError, ConfigError
from edgeclip.runtime.parity import ParityLimits, ParityNumbers, check_parity, compare_embeddings

from .latency_table import LatencyTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "EVERYTHING",
    "Choice",
    "Cost",
    "Int8Target",
    "Point",
    "Score",
    "Sensitivity",
    "Switchboard",
    "choose",
    "measure",
]

_log = logging.getLogger(__name__)

EVERYTHING: Final = "everything"
_SCHEMA: Final = 1
_FIELDS: Final = frozenset({"kind", "name", "cosine", "centred", "flips"})
_REPAIRS: Final = 32  # products that are tried in int8 again
_SLOWER: Final = 1.5  # alone in float among int8 a product needs conversions, which no table knows
_LEAST_SHARE: Final = 0.01  # of the usual saving: what a product counts at least
_EXTENSIONS: Final = 12  # times that the real graph may ask for more in float

Score: TypeAlias = Callable[[Collection[str]], ParityNumbers]
"""How far from float a tower is with these products, and no others, in int8."""


class Switchboard(Protocol):
    """A tower whose products can be put into simulated int8 one by one."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of what the products give, in the order of the graph."""

    @property
    def blocks(self) -> Mapping[str, str]:
        """The block of each product."""

    @property
    def digest(self) -> str:
        """Sha256 of all that its numbers depend on: graph, ranges and scheme."""

    def embed(self, rows: NDArray[Any], on: Collection[str]) -> NDArray[np.float32]:
        """Return embeddings ``(n, E)`` with exactly these products in int8."""


@dataclass(frozen=True)
class Int8Target:
    """What int8 has to keep; ``None`` does not look at that number.

    Attributes:
        cosine: least mean cosine to float.
        centred: the same after taking float's mean embedding off both.
        top1: least share of pictures with the same best label.
    """

    cosine: float | None = None
    centred: float | None = None
    top1: float | None = None

    @classmethod
    def parse(cls, text: str) -> Int8Target:
        """Read ``cosine=0.99,top1=0.98``.

        Raises:
            ConfigError: it cannot be read.
        """
        said: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = part.partition("=")
            try:
                said[name.strip()] = float(number)
            except ValueError:
                said[name.strip()] = math.nan
        known = tuple(cls.__dataclass_fields__)
        if any(name not in known or not 0 < limit <= 1 for name, limit in said.items()):
            raise ConfigError(
                f"int8 target {text!r}: expected NAME=LIMIT, with commas between several, NAME one of "
                f"{', '.join(known)} and LIMIT above 0 up to 1, as in cosine=0.99,top1=0.98."
            )
        return cls(**said)

    def __str__(self) -> str:
        return ",".join(f"{name}={limit:.12g}" for name, limit in self.to_dict().items())

    def to_dict(self) -> dict[str, float]:
        """Return what is looked at."""
        named = {"cosine": self.cosine, "centred": self.centred, "top1": self.top1}
        return {name: limit for name, limit in named.items() if limit is not None}

    @property
    def limits(self) -> ParityLimits:
        """The same as limits of parity."""
        return ParityLimits(
            cosine_mean=self.cosine, centred_cosine_mean=self.centred, top1_agreement=self.top1
        )

    def is_met(self, numbers: ParityNumbers) -> bool:
        """Whether a tower is within it."""
        return not check_parity(numbers, self.limits)

    def missed(self, numbers: ParityNumbers) -> str:
        """Return what a tower misses, as a clause."""
        return "; ".join(map(str, check_parity(numbers, self.limits)))


# --- measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What int8 costs.

    Attributes:
        cosine: one minus the mean cosine to float.
        centred: the same after taking float's mean embedding off both.
        flips: share of rows whose best label changes; ``None`` without a bank.
    """

    cosine: float
    centred: float
    flips: float | None = None

    @classmethod
    def of(cls, numbers: ParityNumbers) -> Cost:
        """Return what the distance of embeddings from float's says."""
        top1, centred = numbers.top1_agreement, numbers.centred_cosine_mean
        return cls(
            max(0.0, 1 - numbers.cosine_mean),
            max(0.0, 1 - (numbers.cosine_mean if centred is None else centred)),
            None if top1 is None else 1 - top1,
        )

    def to_dict(self) -> dict[str, float | None]:
        """Return it as plain JSON values."""
        return {"cosine": self.cosine, "centred": self.centred, "flips": self.flips}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Cost:
        """Return what :meth:`to_dict` said."""
        flips = said["flips"]
        return cls(float(said["cosine"]), float(said["centred"]), None if flips is None else float(flips))


@dataclass(frozen=True)
class Sensitivity:
    """What int8 costs a tower.

    Attributes:
        nodes: cost of each product alone, in the order of the graph.
        blocks: cost of all products of a block together.
        everything: cost of all products.
        block_of: block of each product.
        rows: how many it was measured on.
        digest: of all it depends on.
    """

    nodes: Mapping[str, Cost]
    blocks: Mapping[str, Cost]
    everything: Cost
    block_of: Mapping[str, str]
    rows: int
    digest: str

    def worst(self) -> list[str]:
        """Return the products, the most costly first; equal ones in the order of the graph."""
        return sorted(self.nodes, key=lambda name: -self.nodes[name].cosine)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "rows": self.rows,
            "digest": self.digest,
            "everything": self.everything.to_dict(),
            "nodes": {
                name: {"block": self.block_of[name], **cost.to_dict()} for name, cost in self.nodes.items()
            },
            "blocks": {name: cost.to_dict() for name, cost in self.blocks.items()},
        }


def measure(
    board: Switchboard,
    rows: NDArray[Any],
    bank: NDArray[np.float32] | None = None,
    *,
    state: Path | None = None,
    on_node: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Sensitivity:
    """Measure what int8 costs, per product and per block.

    Args:
        board: of a tower.
        rows: ``(n, …)`` for its input.
        bank: ``(N, E)`` label embeddings, for changes of the best label.
        state: a directory that keeps what was measured, so that a run that was stopped goes on where it was;
            it holds one file for each set of inputs, of a JSON line a result.
        on_node: told how many of how many are done, and the last one's name.

    Raises:
        CalibrationError: an embedding is not finite, or there is nothing to measure.
        BackendError: the board cannot be run.
    """
    if not board.nodes:
        raise CalibrationError("sensitivity: got a tower without products in int8, expected at least one.")
    digest = _digest(board, rows, bank)
    members: dict[str, list[str]] = {}
    for name in board.nodes:
        members.setdefault(board.blocks[name], []).append(name)
    asked: list[tuple[str, str, Sequence[str]]] = [
        *(("node", name, [name]) for name in board.nodes),
        *(("block", name, nodes) for name, nodes in members.items()),
        ("all", EVERYTHING, board.nodes),
    ]
    known = {} if state is None else _read(state / f"{digest[:32]}.jsonl", digest)
    reference = None
    with _Journal(state, digest, known) as journal:
        for done, (kind, name, nodes) in enumerate(asked):
            if (kind, name) not in known:
                reference = board.embed(rows, ()) if reference is None else reference
                numbers = compare_embeddings(reference, board.embed(rows, nodes), bank=bank)
                if numbers.not_finite:
                    raise CalibrationError(
                        f"sensitivity of {name!r}: {numbers.not_finite} of {numbers.n} embeddings are not "
                        "finite, expected none; its float32 form is broken, or the rows are."
                    )
                known[kind, name] = Cost.of(numbers)
                journal.add(kind, name, known[kind, name])
            on_node(done + 1, len(asked), name)
    return Sensitivity(
        {name: known["node", name] for name in board.nodes},
        {name: known["block", name] for name in members},
        known["all", EVERYTHING],
        dict(board.blocks),
        len(rows),
        digest,
    )


def _digest(board: Switchboard, rows: NDArray[Any], bank: NDArray[np.float32] | None) -> str:
    """Return what names the inputs of a measurement."""
    digest = hashlib.sha256(f"{_SCHEMA} {board.digest} {rows.dtype} {rows.shape}".encode())
    digest.update(json.dumps(dict(board.blocks)).encode())
    digest.update(np.ascontiguousarray(rows).data)
    if bank is not None:
        digest.update(np.ascontiguousarray(bank, np.float32).data)
    return digest.hexdigest()


class _Journal:
    """Results on disk, a line each; whatever stops the process, all but the last line are whole.

    Where nothing can be kept, on a full disk, measuring goes on without.
    """

    def __init__(self, folder: Path | None, digest: str, known: Mapping[tuple[str, str], Cost]) -> None:
        self._path = None if folder is None else folder / f"{digest[:32]}.jsonl"
        self._digest, self._known, self._descriptor = digest, dict(known), -1

    def __enter__(self) -> _Journal:
        if self._path is not None:
            # Written anew from what is whole: a torn last line would swallow the next one.
            head = json.dumps({"schema": _SCHEMA, "digest": self._digest})
            lines = [head, *(_line(kind, name, cost) for (kind, name), cost in self._known.items())]
            part = self._path.with_suffix(f".{os.getpid()}.part")
            try:
                part.parent.mkdir(parents=True, exist_ok=True)
                part.write_text("\n".join(lines) + "\n", encoding="utf-8")
                part.replace(self._path)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
            except OSError as error:
                with contextlib.suppress(OSError):
                    part.unlink()
                self._give_up(error)
        return self

    def __exit__(self, *args: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def add(self, kind: str, name: str, cost: Cost) -> None:
        """Add one result; it is on disk when this returns."""
        if self._descriptor < 0:
            return
        try:
            os.write(self._descriptor, (_line(kind, name, cost) + "\n").encode())
            os.fsync(self._descriptor)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _log.warning("what is measured cannot be kept in %r: %s", str(self._path), error.strerror or error)
        self.__exit__()


def _line(kind: str, name: str, cost: Cost) -> str:
    return json.dumps({"kind": kind, "name": name, **cost.to_dict()}, ensure_ascii=False)


def _read(path: Path, digest: str) -> dict[tuple[str, str], Cost]:
    """Return what a file holds for these inputs; whatever cannot be read is measured again."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    head, *said = (_parsed(line) for line in lines)
    if (head.get("schema"), head.get("digest")) != (_SCHEMA, digest):
        return {}
    return {(each["kind"], each["name"]): Cost.from_dict(each) for each in said if each.keys() >= _FIELDS}


def _parsed(line: str) -> dict[str, Any]:
    """Return a line of JSON; nothing where it is torn."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


# --- choosing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One way to choose, measured.

    Attributes:
        kept: how many products stay float.
        lost_ms: what int8 would have saved there; negative where it would have been slower.
        cosine: mean, to float.
        top1: share of rows with the same best label; ``None`` without a bank.
        is_met: whether the target is reached.
    """

    kept: int
    lost_ms: float
    cosine: float
    top1: float | None
    is_met: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "kept": self.kept,
            "lost_ms": round(self.lost_ms, 6),
            "cosine": self.cosine,
            "top1": self.top1,
            "is_met": self.is_met,
        }


@dataclass(frozen=True)
class Choice:
    """Which products stay float, and why.

    Attributes:
        target: what had to be kept.
        keep_float: products that stay float, with the reason.
        nodes: all products, in the order of the graph.
        simulated: how far from float the switchboard was.
        measured: how far from float the real graph is.
        gain_ms: what int8 saves, by the latency table.
        possible_ms: what it would save without the target.
        curve: all that was tried.
    """

    target: Int8Target
    keep_float: Mapping[str, str]
    nodes: tuple[str, ...]
    simulated: ParityNumbers
    measured: ParityNumbers
    gain_ms: float
    possible_ms: float
    curve: tuple[Point, ...] = field(default=(), repr=False)

    def to_manifest(self) -> dict[str, Any]:
        """Return what a bundle says about it."""
        return {
            "target": self.target.to_dict(),
            "products": len(self.nodes),
            "kept": dict(self.keep_float),
            "cosine": float(f"{self.measured.cosine_mean:.6g}"),
            "top1": self.measured.top1_agreement,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "target": self.target.to_dict(),
            "nodes": len(self.nodes),
            "keep_float": dict(self.keep_float),
            "simulated": self.simulated.to_dict(),
            "measured": self.measured.to_dict(),
            "gain_ms": round(self.gain_ms, 6),
            "possible_ms": round(self.possible_ms, 6),
            "curve": [each.to_dict() for each in self.curve],
        }


def choose(
    sensitivity: Sensitivity,
    latency: LatencyTable,
    target: Int8Target,
    simulate: Score,
    exact: Score,
    *,
    on_step: Callable[[str], None] = lambda said: None,
) -> Choice:
    """Choose the products that stay float: what saves least time and costs most, until the target is reached.

    Products that int8 makes slower by half stay float, unless it makes the whole tower slower: then times
    count nothing, and the fewest products stay float. A product that the latency table does not know counts
    as the mean of those that it does.

    Args:
        sensitivity: of the tower.
        latency: of its products.
        target: what has to be kept.
        simulate: measures a choice on the switchboard; asked some tens of times.
        exact: measures a choice in the real graph and engine; asked once if the simulation is right.
        on_step: told what is being tried.

    Raises:
        CalibrationError: the target is reached by no choice that leaves anything in int8.
    """
    return _Search(sensitivity, latency, target, simulate, exact, on_step).run()


class _Search:
    def __init__(
        self,
        sensitivity: Sensitivity,
        latency: LatencyTable,
        target: Int8Target,
        simulate: Score,
        exact: Score,
        on_step: Callable[[str], None],
    ) -> None:
        self._sensitivity, self._target = sensitivity, target
        self._simulate, self._exact, self._on_step = simulate, exact, on_step
        self._nodes = tuple(sensitivity.nodes)
        known = {name: latency.nodes[name] for name in self._nodes if name in latency.nodes}
        total = sum(each.gain_ms for each in known.values())
        usual = total / len(known) if known else 0.0
        self._known = known
        self._gain = {name: known[name].gain_ms if name in known else usual for name in self._nodes}
        self._slower = frozenset(
            name for name, each in known.items() if total > 0 and each.int8_ms > _SLOWER * each.float_ms
        )
        # Where int8 saves nothing, the fewest products count.
        least = _LEAST_SHARE * usual
        self._weight = {name: max(gain, least) if total > 0 else 1.0 for name, gain in self._gain.items()}
        self._seen: dict[frozenset[str], ParityNumbers] = {}
        self._points: dict[frozenset[str], Point] = {}

    def run(self) -> Choice:
        """Search."""
        found = [(kept, order) for order in self._orders() if (kept := self._along(order)) is not None]
        if not found:
            self._raise_unreachable()
        kept, order = min(found, key=lambda each: (self._weighed(each[0]), len(each[0])))
        kept = self._repaired(kept)
        kept, measured = self._confirmed(kept, order)
        reasons = {name: self._reason(name) for name in self._nodes if name in kept}
        return Choice(
            target=self._target,
            keep_float=reasons,
            nodes=self._nodes,
            simulated=self._score(kept),
            measured=measured,
            gain_ms=self._lost(self._nodes) - self._lost(kept),
            possible_ms=self._lost([name for name in self._nodes if name not in self._slower]),
            curve=tuple(sorted(self._points.values(), key=lambda point: (point.lost_ms, point.kept))),
        )

    def _orders(self) -> Iterator[list[str]]:
        """Give orders in which products go into float."""
        costs, places = self._sensitivity.nodes, {name: place for place, name in enumerate(self._nodes)}
        rest = [name for name in self._nodes if name not in self._slower]

        def cost(name: str) -> float:
            is_centred = self._target.cosine is None and self._target.centred is not None
            return costs[name].centred if is_centred else costs[name].cosine

        def budget(name: str) -> float:
            flips = costs[name].flips
            least = self._target.cosine if self._target.cosine is not None else self._target.centred
            spent = cost(name) / max(1 - (least or 0.99), 1e-4)
            limit = self._target.top1
            return spent if flips is None or limit is None else spent + flips / max(1 - limit, 1e-3)

        keys: list[Callable[[str], float]] = [lambda name: cost(name) / self._weight[name], cost]
        if self._target.top1 is not None:
            keys.insert(1, lambda name: budget(name) / self._weight[name])
        seen = set()
        for key in keys:
            order = sorted(rest, key=lambda name, key=key: (-key(name), places[name]))  # type: ignore[misc]
            if tuple(order) not in seen:
                seen.add(tuple(order))
                yield order

    def _along(self, order: Sequence[str]) -> frozenset[str] | None:
        """Return the shortest start of an order that suffices in float; ``None`` if all but one do not."""
        low, high = 0, len(order) - 1
        if self._meets(self._slower):
            return self._slower
        if not self._meets(self._slower.union(order[:high])):
            return None
        while high - low > 1:  # low misses, high meets
            middle = (low + high) // 2
            low, high = (low, middle) if self._meets(self._slower.union(order[:middle])) else (middle, high)
        return self._slower.union(order[:high])

    def _repaired(self, kept: frozenset[str]) -> frozenset[str]:
        """Put products back into int8 that need not be float: least cost for what it saves first."""
        costs = self._sensitivity.nodes
        given = sorted(
            kept - self._slower,
            key=lambda name: (costs[name].cosine / self._weight[name], self._nodes.index(name)),
        )
        for name in given[:_REPAIRS]:
            if self._meets(kept - {name}):
                kept = kept - {name}
        return kept

    def _confirmed(self, kept: frozenset[str], order: Sequence[str]) -> tuple[frozenset[str], ParityNumbers]:
        """Return what the real graph meets the target with."""
        more = 1
        for _ in range(_EXTENSIONS):
            self._on_step(f"check the real graph with {len(kept)} products in float")
            measured = self._exact([name for name in self._nodes if name not in kept])
            if self._target.is_met(measured):
                return kept, measured
            following = [name for name in order if name not in kept][:more]
            if len(kept) + len(following) >= len(self._nodes):
                break
            kept, more = kept.union(following), 2 * more
        raise CalibrationError(
            f"int8 target {self._target}: with {len(kept)} of {len(self._nodes)} products in float "
            f"{self._target.missed(measured)} in the real graph, although simulated int8 reaches it; give a "
            "lower target, or use 8-bit weights."
        )

    def _meets(self, kept: frozenset[str]) -> bool:
        return self._target.is_met(self._score(kept))

    def _score(self, kept: frozenset[str]) -> ParityNumbers:
        if kept not in self._seen:
            self._on_step(f"try {len(kept)} products in float")
            numbers = self._simulate([name for name in self._nodes if name not in kept])
            self._seen[kept] = numbers
            self._points[kept] = Point(
                len(kept),
                self._lost(kept),
                numbers.cosine_mean,
                numbers.top1_agreement,
                self._target.is_met(numbers),
            )
        return self._seen[kept]

    def _lost(self, kept: Collection[str]) -> float:
        return math.fsum(self._gain[name] for name in kept)

    def _weighed(self, kept: Collection[str]) -> float:
        return math.fsum(self._weight[name] for name in kept)

    def _reason(self, name: str) -> str:
        if name in self._slower:
            return f"int8 is {-self._gain[name]:.4f} ms slower"
        cost = self._sensitivity.nodes[name]
        flips = "" if cost.flips is None else f" and {cost.flips:.1%} of the best labels"
        gain = self._gain[name]
        saves = f"{gain:.4f} ms saved" if gain >= 0 else f"{-gain:.4f} ms slower"
        saves = saves if name in self._known else "its time is not known"
        return f"int8 costs {cost.cosine:.2g} of the cosine{flips} ({saves})"

    def _raise_unreachable(self) -> None:
        best = max(self._seen, key=lambda kept: (self._seen[kept].cosine_mean, len(kept)))
        raise CalibrationError(
            f"int8 target {self._target}: {self._target.missed(self._seen[best])} with {len(best)} of "
            f"{len(self._nodes)} products in float, which is as near as it gets; give a lower target, more "
            "calibration pictures, or export float."
        )
