"""Batches whose content depends on the seed and the position, and on nothing else.

The order of an epoch is a random permutation of the samples (``edgeclip.distill.randomness.permutation``),
cut into joint batches from the position on; what is left at its end is smaller than a batch and left out,
another rest in each epoch. Rank ``r`` of ``W`` takes the ``r``-th contiguous share of every joint batch. All
other chance is drawn from streams named after the sample. So 0, 1 or many workers, another number of ranks
and a restart at any position give the same joint batches, bit by bit, and a checkpoint has to remember only a
:class:`Position`.

A sample that cannot be used is replaced by one that depends on the broken one's own stream, not on the order
in which workers find it. Not in here: which device, normalization by the model's mean (:func:`to_float` does
it where the batch has arrived), evaluation sets, which are read in order and to their end.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from edgeclip.distill.randomness import Randomness, permutation, random_stream
from edgeclip.distill.samples import Broken, BrokenLimit, Sample, Samples
from edgeclip.errors import ConfigError, EdgeClipError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Batch",
    "BatchLoader",
    "BatchPlan",
    "Caption",
    "CaptionMix",
    "Position",
    "Prepare",
    "choose_captions",
    "loaded",
    "to_float",
]

# More in a row than chance explains below any limit that makes sense: a disk that has gone, not bad pictures.
_MAX_IN_A_ROW = 32

_log = logging.getLogger(__name__)


# -- Positions ----------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """How far training is: ``epoch`` times through the data, and ``seen`` samples of the next time."""

    epoch: int = 0
    seen: int = 0


BEGINNING = Position()


@dataclass(frozen=True)
class BatchPlan:
    """Which samples are in which batch.

    Attributes:
        samples: how many there are.
        batch_size: of the joint batch of all ranks.
        seed: of the order.
        world: ranks.
        rank: which of them this is.
        weights: ``(samples,)`` how often each is drawn, relative; all alike if not given.

    Raises:
        ConfigError: a batch is larger than the data or cannot be shared equally, or a number is out of range.
    """

    samples: int
    batch_size: int
    seed: int = 0
    world: int = 1
    rank: int = 0
    weights: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.world < 1 or self.batch_size % self.world:
            raise ConfigError(
                f"batch size {self.batch_size} cannot be shared by {self.world} processes: "
                "expected a multiple of their number."
            )
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank is {self.rank}, expected 0 to {self.world - 1}.")
        if self.samples < self.batch_size:
            raise ConfigError(
                f"batch size {self.batch_size} is larger than the data, which have {self.samples} samples: "
                "choose a smaller one."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch that starts at its beginning."""
        return self.samples // self.batch_size

    def start(self, position: Position) -> Position:
        """Return where the batch at a position begins: there, or in the next epoch if too little is left.

        Raises:
            ConfigError: a position these data do not have.
        """
        if position.epoch < 0 or not 0 <= position.seen <= self.samples:
            raise ConfigError(
                f"position is epoch {position.epoch}, sample {position.seen}, expected at most sample "
                f"{self.samples}. It belongs to other data."
            )
        if self.samples - position.seen < self.batch_size:
            return Position(position.epoch + 1, 0)
        return position

    def after(self, position: Position) -> Position:
        """Return the position behind the batch at ``position``, where the next one begins."""
        begin = self.start(position)
        return self.start(Position(begin.epoch, begin.seen + self.batch_size))

    def at_step(self, step: int) -> Position:
        """Return where the batch of a step begins, counted from 0 at the very beginning."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return Position(epoch, number * self.batch_size)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch, ``(samples,)`` int64.

        With weights a sample is in it as often as its share of them asks for, up to rounding, which differs
        from epoch to epoch (systematic sampling): the heavy ones several times, some of the light ones not.
        """
        order = permutation(self.samples, seed=self.seed, epoch=epoch)
        if self.weights is None:
            return order
        ends = np.cumsum(self.weights)
        offset = random_stream(self.seed, epoch, 1, "order").random()
        points = (np.arange(self.samples) + offset) * (ends[-1] / self.samples)
        drawn: NDArray[np.int64] = np.searchsorted(ends, points, side="right").clip(max=self.samples - 1)
        return drawn[order]

    def requests(self, start: Position = BEGINNING) -> Iterator[tuple[Position, NDArray[np.int64]]]:
        """Yield, without end, where each batch begins and this rank's samples of it.

        The samples are ``(batch_size / world,)`` int64.
        """
        position, epoch, order = self.start(Position(*start)), -1, np.empty(0, np.int64)
        share = self.batch_size // self.world
        while True:
            if position.epoch != epoch:
                epoch, order = position.epoch, self.order(position.epoch)
            begin = position.seen + self.rank * share
            yield position, order[begin : begin + share].copy()
            position = self.after(position)


# -- Captions -----------------------------------------------------------------------------------------------


class Caption(NamedTuple):
    """A chosen caption: its kind, its number among those of the kind, its text."""

    kind: str
    number: int
    text: str


@dataclass(frozen=True)
class CaptionMix:
    """How often each kind of caption is drawn: first a kind, by weight, then one of its captions, evenly.

    Weights are shared among the kinds that a sample has. Fan et al. 2023 (LaCLIP) draw evenly from original
    and rewrites; Lai et al. 2024 (VeCLIP) mix alt texts and visually enriched ones half and half.

    Raises:
        ConfigError: no kind, or a weight that is not a positive number.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"alt": 1.0})

    def __post_init__(self) -> None:
        bad = {kind: weight for kind, weight in self.weights.items() if not 0 < weight < math.inf}
        if bad or not self.weights:
            raise ConfigError(
                f"captions: weights are {dict(self.weights)}, expected positive numbers by kind."
            )

    def choose(
        self,
        captions: Mapping[str, Sequence[str]],
        rng: np.random.Generator,
        *,
        taken: Iterable[Caption] = (),
    ) -> Caption:
        """Return a caption, another one than those taken as long as there is another.

        Raises:
            InputError: the sample has no caption of these kinds.
        """
        used = {(caption.kind, caption.number) for caption in taken}
        left = {
            kind: [number for number in range(len(captions.get(kind, ()))) if (kind, number) not in used]
            for kind in self.weights
        }
        if not any(left.values()):
            left = {kind: list(range(len(captions.get(kind, ())))) for kind in self.weights}
        kinds = [kind for kind, numbers in left.items() if numbers]
        if not kinds:
            has = ", ".join(sorted(captions)) or "none"
            raise InputError(f"captions: the sample has {has}, expected {' or '.join(sorted(self.weights))}.")
        point = rng.random() * sum(self.weights[kind] for kind in kinds)
        kind = kinds[-1]
        for candidate in kinds:
            point -= self.weights[candidate]
            if point < 0:
                kind = candidate
                break
        number = left[kind][int(rng.random() * len(left[kind]))]
        return Caption(kind, number, captions[kind][number])


def choose_captions(
    mixes: Iterable[CaptionMix], captions: Mapping[str, Sequence[str]], rng: np.random.Generator
) -> tuple[Caption, ...]:
    """Return a caption for each mix: ``(CaptionMix({"alt": 1}), CaptionMix({"synthetic": 1}))`` gives two.

    Raises:
        InputError: the sample has no caption that a mix asks for.
    """
    chosen: list[Caption] = []
    for mix in mixes:
        chosen.append(mix.choose(captions, rng, taken=chosen))
    return tuple(chosen)


# -- From samples to arrays ---------------------------------------------------------------------------------


class Prepare(Protocol):
    """From a sample to named arrays, which are stacked into a batch. It is pickled where workers start anew.

    ``image`` is ``(H, W, 3)`` uint8; everything else is stacked as it is. An :class:`InputError` means that
    the sample is broken.
    """

    def __call__(self, sample: Sample, randomness: Randomness) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of a sample; its streams give the chance that is needed."""
        ...


# -- Batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """This rank's share of a joint batch.

    Attributes:
        position: where the joint batch begins; ``plan.after`` it comes the next one.
        index: ``(b,)`` int64, the sample in each row: the same number is the same picture, as ``Pairs.ids``.
        keys: of these samples.
        arrays: what was prepared, stacked: ``image`` ``(b, 3, H, W)`` uint8, ``tokens`` ``(b, n, L)`` int32.
        broken: samples found unusable on the way; others stand in their rows.
    """

    position: Position
    index: Tensor
    keys: tuple[str, ...]
    arrays: Mapping[str, Tensor]
    broken: tuple[Broken, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def __len__(self) -> int:
        return len(self.index)

    def head(self, rows: int) -> Batch:
        """Return the first rows of the batch."""
        return replace(self._mapped(lambda tensor: tensor[:rows]), keys=self.keys[:rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on a device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the loader calls this."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> Batch:
        arrays = {name: move(tensor) for name, tensor in self.arrays.items()}
        return replace(self, index=move(self.index), arrays=arrays)


def to_float(image: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return ``(B, 3, H, W)`` float32 of uint8 pictures: scaled to 0 … 1, less the mean, by the deviation.

    Equal to :meth:`edgeclip.preprocess.Preprocess.normalize`, on the device of the batch.

    Raises:
        InputError: another shape or dtype.
    """
    if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] != 3:
        raise InputError(
            f"batch of pictures: got {image.dtype} {tuple(image.shape)}, expected uint8 (B, 3, H, W)."
        )
    centre, spread = (
        torch.tensor(values, dtype=torch.float32, device=image.device)[:, None, None]
        for values in (mean, std)
    )
    return image.to(torch.float32).div_(255).sub_(centre).div_(spread)


class BatchLoader:
    """Reads the batches of a plan, in this process or in workers.

    Attributes:
        plan: which samples.
        broken: samples found unusable so far by this rank, by number.

    Args:
        samples: what is read; as many as the plan says.
        plan: which samples are in which batch.
        prepare: makes arrays of a sample.
        workers: processes that prepare; 0 for none.
        limit: of broken samples, for each rank on its own.
        prefetch: batches each worker is ahead.
        pin_memory: put batches into page-locked memory, for a GPU.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; the system's own if not given.

    Raises:
        ConfigError: the plan is for another number of samples.
    """

    def __init__(
        self,
        samples: Samples,
        plan: BatchPlan,
        prepare: Prepare,
        *,
        workers: int = 0,
        limit: BrokenLimit | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        if len(samples) != plan.samples:
            raise ConfigError(f"the plan is for {plan.samples} samples, got {len(samples)}.")
        self.plan = plan
        self.broken: dict[int, Broken] = {}
        self._work = _Work(samples, prepare, plan)
        self._allowed = (limit or BrokenLimit()).allowed(plan.samples)
        self._workers, self._prefetch = workers, prefetch
        self._pin_memory, self._start_method = pin_memory, start_method

    def batches(self, start: Position = BEGINNING) -> Iterator[Batch]:
        """Yield batches without end, the first one at ``start``. Closing the iterator ends the workers.

        Raises:
            InputError: more broken samples than allowed, or many in a row.
        """
        loader: DataLoader[Any] = DataLoader(
            self._work,
            batch_size=None,
            sampler=_Requests(self.plan, start),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals,
            pin_memory=self._pin_memory,
            prefetch_factor=self._prefetch if self._workers else None,
            multiprocessing_context=self._start_method if self._workers else None,
            # Its own: otherwise a seed for workers is drawn from torch's global generator, and a restarted
            # run would go on with other numbers than one that was never stopped.
            generator=torch.Generator(),
        )
        for item in loaded(loader, "reading batches"):
            if isinstance(item, _Failed):
                raise InputError(item.message)
            self._count(item.broken)
            yield item

    def _count(self, broken: Iterable[Broken]) -> None:
        for sample in broken:
            if sample.index not in self.broken:
                self.broken[sample.index] = sample
                _log.warning("sample left out: %s: %s", sample.key, sample.reason)
        if len(self.broken) > self._allowed:
            last = list(self.broken.values())[-1]
            raise InputError(
                f"{len(self.broken)} of {self.plan.samples} samples cannot be used, {self._allowed} are "
                f"allowed; the last one is {last.key!r} ({last.reason.rstrip('.')}). List them with "
                "'edgeclip data validate', or raise the limit."
            )


def loaded(loader: DataLoader[Any], what: str) -> Iterator[Any]:
    """Yield what a loader loads; a worker that was killed is an error that says what to do.

    Raises:
        EdgeClipError: begins with ``what``.
    """
    found = iter(loader)
    while True:
        try:
            item = next(found)
        except StopIteration:
            return
        except RuntimeError as error:  # a worker that was killed
            raise EdgeClipError(
                f"{what}: {error} Take fewer workers if memory ran out, or 0 to see the error."
            ) from error
        yield item


class _Requests(Sampler[tuple[Position, "NDArray[np.int64]"]]):
    def __init__(self, plan: BatchPlan, start: Position) -> None:
        self._plan, self._start = plan, start

    def __iter__(self) -> Iterator[tuple[Position, NDArray[np.int64]]]:
        return self._plan.requests(self._start)


@dataclass(frozen=True)
class _Failed:
    """An error on its way out of a worker, where torch would wrap it in a traceback."""

    message: str


class _Work(Dataset[Any]):
    """Makes whole batches: what a worker does."""

    def __init__(self, samples: Samples, prepare: Prepare, plan: BatchPlan) -> None:
        self._samples, self._prepare, self._plan = samples, prepare, plan

    def __getitem__(self, request: tuple[Position, NDArray[np.int64]]) -> Batch | _Failed:
        position, indices = request
        broken: list[Broken] = []
        try:
            rows = [
                self._row(Randomness(self._plan.seed, position.epoch, stream), int(index), broken)
                for stream, index in zip(self._streams(position, indices), indices, strict=True)
            ]
            return _collated(position, rows, broken)
        except InputError as error:
            return _Failed(str(error))

    def _streams(self, position: Position, indices: NDArray[np.int64]) -> Sequence[int]:
        """Return what names each row's chance: its sample, or its place where samples come several times."""
        if self._plan.weights is None:
            found: list[int] = indices.tolist()
            return found
        first = position.seen + self._plan.rank * len(indices)
        return range(first, first + len(indices))

    def _row(
        self, randomness: Randomness, index: int, broken: list[Broken]
    ) -> tuple[int, str, Mapping[str, NDArray[Any]]]:
        others: np.random.Generator | None = None
        at = index
        for _ in range(_MAX_IN_A_ROW):
            try:
                sample = self._samples.read(at)
                return at, sample.key, self._prepare(sample, randomness)
            except InputError as error:
                broken.append(Broken(at, self._samples.key(at), str(error)))
            others = others or randomness.stream("replace")
            at = int(others.random() * len(self._samples))
        raise InputError(
            f"{_MAX_IN_A_ROW} samples in a row cannot be used, the last one is {broken[-1].key!r} "
            f"({broken[-1].reason.rstrip('.')}). Check that the data are all there."
        )


def _collated(
    position: Position, rows: Sequence[tuple[int, str, Mapping[str, NDArray[Any]]]], broken: Sequence[Broken]
) -> Batch:
    arrays = {}
    for name in rows[0][2]:
        columns = [row[2][name] for row in rows]
        shapes = {column.shape for column in columns}
        if len(shapes) > 1:
            raise InputError(
                f"batch at epoch {position.epoch}, sample {position.seen}: {name!r} comes in the shapes "
                f"{sorted(shapes)}, expected one."
            )
        stacked = np.stack(columns)
        if name == "image":
            stacked = np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))  # (b, 3, H, W)
        arrays[name] = torch.from_numpy(stacked)
    index = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    return Batch(position, index, tuple(row[1] for row in rows), arrays, tuple(broken))


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals(worker: int) -> None:
    """Let a worker outlive what is sent to the whole process group: its parent decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
