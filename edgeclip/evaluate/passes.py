"""One pass over pictures for several models: each is decoded once, and every model sees the same ones.

A picture that one of the models cannot have, because it does not decode or becomes too large, is left out for
all of them. Decoding and corrupting run on threads, towers on the calling thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from edgeclip.bundle import PreprocessSpec
from edgeclip.errors import ConfigError, InputError
from edgeclip.evaluate.corruptions import corrupt
from edgeclip.evaluate.picture_sets import Picture, PictureSet
from edgeclip.evaluate.subjects import Subject
from edgeclip.preprocess import Preprocess

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Batch", "Chosen", "LeftOut", "Passes", "choose"]

T = TypeVar("T")


@dataclass(frozen=True)
class LeftOut:
    """A picture that is not part of the numbers, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Chosen(Generic[T]):
    """Which pictures of a set are taken.

    Attributes:
        pictures: the set.
        usable: what a picture is good for, or why it is not.
        total: pictures in the set.
        found: those that can be used.
        count: those that are taken.
        left_out: those that cannot be used.
    """

    pictures: PictureSet
    usable: Callable[[Picture], T | str]
    total: int
    found: int
    count: int
    left_out: tuple[LeftOut, ...] = ()

    def __iter__(self) -> Iterator[tuple[Picture, T]]:
        """Yield the pictures taken, evenly spread over those that can be used."""
        number, taken = 0, 0
        for picture in self.pictures:
            use = self.usable(picture)
            if isinstance(use, str):
                continue
            # As many as there should be by now: the k-th is taken at floor(k * found / count).
            if number == taken * self.found // self.count:
                taken += 1
                yield picture, use
                if taken == self.count:
                    return
            number += 1


def choose(
    pictures: PictureSet,
    usable: Callable[[Picture], T | str],
    *,
    limit: int | None = None,
    allowed: Callable[[int], int] | None = None,
) -> Chosen[T]:
    """Look through a set without decoding, and return what is taken from it.

    Args:
        pictures: the set.
        usable: what a picture is good for; a text says why it is not.
        limit: pictures at most, evenly spread over the set, so that no class of a sorted set is missed.
        allowed: how many of so many may be left out; all if missing.

    Raises:
        InputError: nothing can be used, or too much cannot.
    """
    total, left_out = 0, []
    for picture in pictures:
        total += 1
        use = usable(picture)
        if isinstance(use, str):
            left_out.append(LeftOut(picture.key, use))
    found = total - len(left_out)
    if not total:
        raise InputError(f"{pictures.path!r} holds no pictures; expected some. Check the path.")
    if not found:
        raise InputError(
            f"{pictures.path!r}: none of its {total:,} pictures can be used, first {left_out[0].key!r}: "
            f"{left_out[0].reason}"
        )
    check_left_out(pictures, left_out, total, allowed)
    return Chosen(pictures, usable, total, found, min(found, limit or found), tuple(left_out))


def check_left_out(
    pictures: PictureSet, left_out: Sequence[LeftOut], total: int, allowed: Callable[[int], int] | None
) -> None:
    """Raise where more pictures are left out than allowed.

    Raises:
        InputError: it names the first one.
    """
    most = total if allowed is None else allowed(total)
    if len(left_out) > most:
        raise InputError(
            f"{pictures.path!r}: {len(left_out):,} of {total:,} pictures cannot be used, expected at most "
            f"{most:,}; the first is {left_out[0].key!r}: {left_out[0].reason} Repair the set or raise the "
            "limit."
        )


@dataclass(frozen=True, eq=False)
class Batch(Generic[T]):
    """Pictures that were decoded, prepared for every subject.

    Attributes:
        keys: of the pictures.
        uses: what they are good for.
        forms: ``(B, H, W, 3)`` uint8 arrays, one for each way of preparing.
    """

    keys: tuple[str, ...]
    uses: tuple[T, ...]
    forms: tuple[NDArray[np.uint8], ...]


@dataclass
class Passes:
    """Runs pictures past subjects; use it as a context manager.

    Attributes:
        subjects: what is evaluated.
        batch_size: pictures a tower call.
        workers: threads that decode and corrupt.
        left_out: pictures that could not be read, in all passes.
    """

    subjects: Sequence[Subject]
    batch_size: int = 32
    workers: int = 1
    left_out: list[LeftOut] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 1:
            raise ConfigError(
                f"batch_size is {self.batch_size} and workers {self.workers}, expected at least 1."
            )
        self._forms: list[PreprocessSpec] = []
        self._form_of: list[int] = []
        for subject in self.subjects:
            spec = subject.preprocess
            same = [_sizing(form) for form in self._forms]
            if _sizing(spec) not in same:
                self._forms.append(spec)
                same.append(_sizing(spec))
            self._form_of.append(same.index(_sizing(spec)))
        self._preprocess = [Preprocess(form) for form in self._forms]
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="edgeclip-evaluate")

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, chosen: Chosen[T]) -> Generator[Batch[T], None, None]:
        """Yield what can be decoded of the pictures chosen, in order.

        Raises:
            InputError: nothing of it can be decoded.
        """
        source = iter(chosen)
        pending: deque[tuple[Picture, T, Future[list[NDArray[np.uint8]]]]] = deque()
        anything = False
        failed = len(self.left_out)

        def refill(count: int) -> None:
            for picture, use in islice(source, count):
                pending.append((picture, use, self._pool.submit(self._prepare, picture)))

        refill(self.batch_size + 2 * self.workers)
        while pending:
            keys, uses, rows = [], [], []
            for _ in range(min(self.batch_size, len(pending))):
                picture, use, future = pending.popleft()
                refill(1)
                try:
                    rows.append(future.result())
                except InputError as error:
                    self.left_out.append(LeftOut(picture.key, str(error)))
                    continue
                keys.append(picture.key)
                uses.append(use)
            if rows:
                anything = True
                yield Batch(tuple(keys), tuple(uses), tuple(map(np.stack, zip(*rows, strict=True))))
        if not anything:
            first = self.left_out[failed]
            raise InputError(
                f"{chosen.pictures.path!r}: none of {chosen.count:,} pictures can be read, first "
                f"{first.key!r}: {first.reason}"
            )

    def embedded(
        self, batch: Batch[T], *, corruption: tuple[str, int] | None = None, seed: int = 0
    ) -> Iterator[tuple[Subject, NDArray[np.float32]]]:
        """Yield every subject with its embeddings ``(B, E)`` of a batch.

        Args:
            batch: prepared pictures.
            corruption: name and severity, applied to the pictures at the size of the tower.
            seed: of the corruption's chance.
        """
        forms: Sequence[NDArray[np.uint8]] = batch.forms
        if corruption is not None:
            name, severity = corruption

            def worse(row: int, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
                return corrupt(pictures[row], name, severity, key=batch.keys[row], seed=seed)

            forms = [
                np.stack(list(self._pool.map(worse, range(len(pictures)), [pictures] * len(pictures))))
                for pictures in forms
            ]
        for subject, form in zip(self.subjects, self._form_of, strict=True):
            yield subject, subject.images(forms[form])

    def _prepare(self, picture: Picture) -> list[NDArray[np.uint8]]:
        image = self._preprocess[0].decode(picture.source)
        return [preprocess.resize(image) for preprocess in self._preprocess]


def _sizing(spec: PreprocessSpec) -> tuple[object, ...]:
    """Return what decides the uint8 picture; mean and deviation come later."""
    return (*spec.image_size_px, spec.resize, spec.interpolation, spec.crop)
