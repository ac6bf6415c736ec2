"""One launch of a comparison: a fresh process that opens both sides and times them in turns.

Standard input is one JSON document, :class:`Task`; standard output is another, :class:`Told` or
:class:`Failure`. The parent is :mod:`edgeclip.bench.compare`.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from edgeclip.bench.report import END_TO_END
from edgeclip.bench.targets import Target, open_target
from edgeclip.errors import BackendError, EdgeClipError
from edgeclip.runtime.host import cpu_times
from edgeclip.runtime.latency import NO_CLOCK, STAGES, StageClock

if TYPE_CHECKING:
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.runtime.latency import Clock

__all__ = [
    "COMPARED",
    "TEXT_STAGES",
    "Failure",
    "LabelsAsked",
    "Open",
    "SideTold",
    "Task",
    "Told",
    "launch",
    "main",
]

Open: TypeAlias = "Callable[[Target, Clock], ZeroShotClassifier]"

COMPARED: Final = (END_TO_END, *STAGES)
TEXT_STAGES: Final = ("tokenize", "text_tower")

_TURN_MS = 30.0
"""A turn lasts about so long: short beside what disturbs a machine, long beside the cost of taking turns."""
_MOST_UNITS = 16
# Below this a turn begins with a call that is not counted: the other side has emptied the caches.
_SETTLED_MS = 10.0
_WARM_CALLS, _WARM_MS = 3, 150.0


class LabelsAsked(Struct, frozen=True, kw_only=True):
    """The labels that are offered.

    Attributes:
        labels: as :meth:`edgeclip.label_sets.Label.to_json` writes them; ``None`` for those of the bundle.
        templates: around them; ``None`` for those of the bundle.
        language: of the bundle's own labels.
        bank: file of a finished bank, in place of labels.
    """

    labels: tuple[Any, ...] | None = None
    templates: tuple[str, ...] | None = None
    language: str | None = None
    bank: str | None = None

    def set(self, classifier: ZeroShotClassifier) -> None:
        """Offer them.

        Raises:
            EdgeClipError: as the classifier's ``set_labels`` and ``set_bundle_labels``.
        """
        if self.bank is not None:
            from edgeclip.labels import LabelBank

            classifier.set_labels(LabelBank.open(self.bank))
        elif self.labels is None:
            classifier.set_bundle_labels(self.language)
        else:
            from edgeclip.label_sets import labels_from_bytes

            said = labels_from_bytes(msgspec.json.encode(self.labels), source="labels", as_json=True)
            classifier.set_labels(said, templates=self.templates)


class Task(Struct, frozen=True, kw_only=True):
    """What a launch is to do.

    Attributes:
        a: one side, as the fields of a ``Target``.
        b: the other one.
        stage: what is timed.
        pictures: files, the same for both.
        labels: what is offered.
        measure_s: how long to measure, warm-up not included.
        opened_first: which side is opened, and warmed up, first.
        seed: of what is random.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    stage: str
    pictures: tuple[str, ...]
    labels: LabelsAsked
    measure_s: float
    opened_first: Literal["a", "b"] = "a"
    seed: int


class SideTold(Struct, frozen=True, kw_only=True):
    """What ran on one side, and its milliseconds a picture, turn after turn."""

    bundle: str
    digest: str
    variant: str
    placement: dict[str, Any]
    labels: int
    samples_ms: tuple[float, ...]


class Told(Struct, frozen=True, kw_only=True, tag="told"):
    """What a launch measured.

    Every block is ``abba`` or ``baab``; each of its turns handles the same ``units`` units of
    ``items`` pictures or texts.
    """

    a: SideTold
    b: SideTold
    opened_first: Literal["a", "b"]
    blocks: tuple[Literal["abba", "baab"], ...]
    units: int
    items: int
    measured_s: float
    steal_share: float | None


class Failure(Struct, frozen=True, kw_only=True, tag="failure"):
    """An error of ours by the name of its class, for the parent to raise."""

    kind: str
    error: str


class _Side:
    """One opened target, and how a unit of work is timed on it."""

    def __init__(self, target: Target, stage: str, classifier: ZeroShotClassifier, clock: Clock) -> None:
        self._batch = target.batch
        self._workers = target.threads
        self._stage = stage
        self._classifier = classifier
        self._clock = clock
        self.samples_ms: list[float] = []

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels in force."""
        return self._classifier.bank.names

    def item_ms(self, items: Sequence[Any]) -> float:
        """Handle pictures or texts and return milliseconds for one of them."""
        if not isinstance(self._clock, StageClock):
            start_ns = perf_counter_ns()
            self._work(items)
            return (perf_counter_ns() - start_ns) / 1e6 / len(items)
        self._clock.clear()
        self._work(items)
        spent = [span.wall_ms for span in self._clock.spans if span.stage == self._stage]
        if not spent:
            raise BackendError(
                f"stage {self._stage!r} never ran on {self._classifier.bundle.where}: compare another one."
            )
        return sum(spent) / len(items)

    def _work(self, items: Sequence[Any]) -> None:
        classifier, batch = self._classifier, self._batch
        if self._stage in TEXT_STAGES:
            for start in range(0, len(items), batch):
                classifier.embed_texts(items[start : start + batch], truncate=True)
        elif batch == 1:
            for item in items:
                classifier.classify(item)
        else:
            for outcome in classifier.classify_stream(items, batch_size=batch, workers=self._workers):
                if outcome.error is not None:
                    raise outcome.error

    def told(self) -> SideTold:
        """Return what ran and what was measured."""
        return SideTold(
            bundle=self._classifier.bundle.manifest.model.name,
            digest=self._classifier.bundle.digest,
            variant=self._classifier.choice.variant.name,
            placement=asdict(self._classifier.placement),
            labels=len(self.label_names),
            samples_ms=tuple(self.samples_ms),
        )


def launch(task: Task, open_side: Open | None = None) -> Told:
    """Open both sides and time them in turns.

    Args:
        task: what to do.
        open_side: opens a target with a clock; :func:`edgeclip.bench.targets.open_target`, without.

    Raises:
        EdgeClipError: a side cannot be opened or fails.
    """
    rng = random.Random(task.seed)  # noqa: S311 - an order of measurements, not a secret
    targets = {"a": Target(**task.a), "b": Target(**task.b)}
    order = ("a", "b") if task.opened_first == "a" else ("b", "a")
    with ExitStack() as stack:
        sides: dict[str, _Side] = {}
        for name in order:
            clock: Clock = NO_CLOCK if task.stage == END_TO_END else StageClock()
            classifier = stack.enter_context(
                open_target(targets[name], clock, keep_text_tower=task.stage in TEXT_STAGES)
                if open_side is None
                else open_side(targets[name], clock)
            )
            task.labels.set(classifier)
            sides[name] = _Side(targets[name], task.stage, classifier, clock)
        items = sides["a"].label_names if task.stage in TEXT_STAGES else list(map(Path, task.pictures))
        work = _Work(items, math.lcm(targets["a"].batch, targets["b"].batch), rng.randrange(len(items)))
        unit_ms = max(_warm_up(sides[name], work) for name in order)
        units = max(1, min(_MOST_UNITS, round(_TURN_MS / max(unit_ms, 1e-3))))
        blocks: list[Literal["abba", "baab"]] = []
        ticks, began_ns = cpu_times(), perf_counter_ns()
        while not blocks or (perf_counter_ns() - began_ns) / 1e9 < task.measure_s:
            blocks.append(rng.choice(("abba", "baab")))
            block = work.take(units)
            for turn in blocks[-1]:
                side = sides[turn]
                if unit_ms < _SETTLED_MS:
                    side.item_ms(block[-1])
                side.samples_ms += [side.item_ms(unit) for unit in block]
        measured_s = (perf_counter_ns() - began_ns) / 1e9
        now = cpu_times()
        return Told(
            a=sides["a"].told(),
            b=sides["b"].told(),
            opened_first=task.opened_first,
            blocks=tuple(blocks),
            units=units,
            items=work.per_unit,
            measured_s=measured_s,
            steal_share=None if ticks is None or now is None else max(0.0, now.steal_share_since(ticks)),
        )


def main() -> None:
    """Do the task of standard input; write what was measured, or our error, to standard output."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    # What engines print must not mix with the document.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        said: Told | Failure = launch(task)
    except EdgeClipError as error:
        said = Failure(kind=type(error).__name__, error=str(error))
    with os.fdopen(answer, "wb") as stream:
        stream.write(msgspec.json.encode(said))


class _Work:
    """Pictures or texts over and over, in units that both sides can handle in whole batches."""

    def __init__(self, items: Sequence[Any], per_unit: int, start: int) -> None:
        self.per_unit = per_unit
        self._items = items
        self._next = start

    def take(self, units: int) -> list[list[Any]]:
        """Return the next units."""
        return [[self._item() for _ in range(self.per_unit)] for _ in range(units)]

    def _item(self) -> Any:
        item = self._items[self._next]
        self._next = (self._next + 1) % len(self._items)
        return item


def _warm_up(side: _Side, work: _Work) -> float:
    """Run a side for a while and return the milliseconds of a unit, all stages of it."""
    began_ns = perf_counter_ns()
    taken_ms: list[float] = []
    while len(taken_ms) < _WARM_CALLS or (perf_counter_ns() - began_ns) / 1e6 < _WARM_MS:
        (unit,) = work.take(1)
        start_ns = perf_counter_ns()
        side.item_ms(unit)
        taken_ms.append((perf_counter_ns() - start_ns) / 1e6)
    return sorted(taken_ms)[len(taken_ms) // 2]
