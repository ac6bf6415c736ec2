"""Decisions on a stream of frames: a camera or a pipe in, one answer after another out.

    >>> with FrameReader(0, PictureSplitter()) as frames:
    ...     for decision in decide(classifier, frames, smooth=5):
    ...         decision.frame, decision.answer.predictions[0].label, decision.age_ms()

A thread reads and keeps only the newest complete frame, so an answer is about what the camera sees now and
the memory is that of three frames, however slow the classifier is and however long it runs. What has to be
seen frame by frame is read with ``every_frame``: then the writer of the pipe waits.

It knows neither labels nor heads: frames are smoothed as embeddings, and the labels may change meanwhile.
"""

from __future__ import annotations

import math
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from .errors import ConfigError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .answers import Answer
    from .frames import Splitter
    from .pictures import ImageSource

__all__ = ["AGE_SAMPLES_FOR_P99", "Ages", "Answering", "Counts", "Decision", "Frame", "FrameReader", "decide"]

AGE_SAMPLES_FOR_P99: Final = 1000
"""Ages from which a 99th percentile has ten above it."""

# Waiting without end is not interrupted by Ctrl-C on Windows.
_HEED_S: Final = 0.5


class Answering(Protocol):
    """What decisions need of a classifier; ``ZeroShotClassifier`` is one."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels in force; another object after every change."""
        ...

    def embed_images(self, images: ImageSource, *, exact: bool) -> NDArray[np.float32]:
        """Return the unit embedding ``(E,)`` of a picture."""
        ...

    def answer(self, embeddings: NDArray[np.float32], *, top_k: int) -> list[Answer]:
        """Return the answers to unit embeddings ``(B, E)``."""
        ...


@dataclass(frozen=True)
class Counts:
    """What became of a stream so far. Every complete frame is decided, dropped, broken or not yet looked at.

    Attributes:
        frames: complete frames.
        dropped: frames that a newer one replaced before they were looked at.
        cut: frames that began and did not end.
        skipped_bytes: bytes that belong to no complete frame.
        read_bytes: all bytes.
        inside: whether the stream ended inside a frame.
    """

    frames: int = 0
    dropped: int = 0
    cut: int = 0
    skipped_bytes: int = 0
    read_bytes: int = 0
    inside: bool = False


@dataclass(frozen=True, eq=False)
class Frame:
    """One complete frame.

    Attributes:
        data: its bytes.
        complete_ns: when its last byte was in our memory, by ``time.perf_counter_ns``.
        counts: those of the stream when it was complete; ``counts.frames`` is its number, from 1.
    """

    data: bytes | bytearray
    complete_ns: int
    counts: Counts


class FrameReader:
    """Read frames in a thread of its own; use it in a ``with`` statement.

    Args:
        descriptor: of an open pipe, file or socket. It is read without buffer, and not closed; what is read
            is a duplicate, so closing yours early does no harm.
        splitter: what cuts the stream into frames.
        every_frame: keep each frame until it is taken, and read on only then.

    Leaving the ``with`` statement does not wait for the thread: it may be waiting for bytes. It ends with the
    stream or the process.
    """

    def __init__(self, descriptor: int, splitter: Splitter, *, every_frame: bool = False) -> None:
        self.splitter = splitter
        self._descriptor = descriptor
        self._every_frame = every_frame
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._dropped = 0
        self._frames = 0
        self._read_bytes = 0
        self._inside = self._ended = self._closed = False
        self._error: BaseException | None = None

    def __enter__(self) -> FrameReader:
        try:
            # Its number may be another file's once the caller has closed it, and the thread be about to read.
            own = os.dup(self._descriptor)
        except OSError as error:  # raised again where frames are taken
            self._error, self._ended = error, True
            return self
        threading.Thread(target=self._read_all, args=(own,), name="edgeclip-frames", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def counts(self) -> Counts:
        """What became of the stream so far."""
        with self._changed:
            return self._count()

    def take(self, *, not_before: float = 0.0) -> Frame | None:
        """Return the newest frame that was not taken yet, or ``None`` at the end of the stream.

        Args:
            not_before: wait until then (``time.perf_counter``), unless the stream ends.

        Raises:
            InputError: the stream cannot be read.
        """
        with self._changed:
            while not self._ended and (wait_s := not_before - perf_counter()) > 0:
                self._changed.wait(min(wait_s, _HEED_S))
            while self._newest is None and not self._ended:
                self._changed.wait(_HEED_S)
            frame, self._newest = self._newest, None
            self._changed.notify_all()
            if frame is None and self._error is not None:
                reason = getattr(self._error, "strerror", None) or str(self._error)
                raise InputError(
                    f"the stream cannot be read ({reason}), expected a pipe or a file of frames. "
                    "Check what it is connected to."
                ) from self._error
            return frame

    # -- in the thread -------------------------------------------------------------------------------------

    def _read_all(self, own: int) -> None:
        try:
            # By descriptor, unbuffered: a thread waiting inside sys.stdin aborts the interpreter at its exit.
            with open(own, "rb", buffering=0) as stream:
                while not self._closed:
                    count = stream.readinto(self.splitter.space())
                    if count is None:  # whoever shares the pipe made it non-blocking
                        with selectors.DefaultSelector() as ready:  # select() takes no number above 1023
                            ready.register(own, selectors.EVENT_READ)
                            ready.select()
                        continue
                    if count == 0:
                        break
                    self._read_bytes += count
                    self._keep(self.splitter.take(count))
            inside = self.splitter.inside_bytes > 0
            self._keep(self.splitter.finish())
            self._inside = inside
        except BaseException as error:  # raised again where frames are taken
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _keep(self, frames: Iterator[bytes | bytearray]) -> None:
        complete_ns = perf_counter_ns()
        for data in frames:
            with self._changed:
                while self._every_frame and self._newest is not None and not self._closed:
                    self._changed.wait()
                self._dropped += self._newest is not None
                self._frames += 1
                self._newest = Frame(data, complete_ns, self._count())
                self._changed.notify_all()

    def _count(self) -> Counts:
        return Counts(
            self._frames,
            self._dropped,
            self.splitter.cut_frames,
            self.splitter.skipped_bytes,
            self._read_bytes,
            self._inside,
        )


@dataclass(frozen=True, eq=False)
class Decision:
    """What was made of one frame.

    Attributes:
        answer: what the labels say of it, or of the last few frames together.
        frame: the frame; its ``counts`` are those of the stream when it was complete.
        smoothed: frames that the answer is made of.
        labels: names of the labels that were offered.
        labels_version: 1 for the labels of the start, one more each time others answer.
    """

    answer: Answer
    frame: Frame
    smoothed: int
    labels: tuple[str, ...]
    labels_version: int

    def age_ms(self) -> float:
        """Return how long ago the last byte of the frame was in our memory."""
        return (perf_counter_ns() - self.frame.complete_ns) / 1e6


def decide(
    classifier: Answering,
    frames: FrameReader,
    *,
    top_k: int = 5,
    every_s: float = 0.0,
    smooth: int = 1,
    on_broken: Callable[[Frame, InputError], None] | None = None,
) -> Iterator[Decision]:
    """Yield a decision on the newest frame, again and again until the stream ends; its last frame is decided.

    Args:
        classifier: embeds pictures and answers.
        frames: the stream.
        top_k: labels a decision, at least 1.
        every_s: least time between two decisions; 0 decides as fast as frames come and the tower runs.
        smooth: decide on the mean of the unit embeddings of so many frames, the last ones decided on.
        on_broken: called for a frame that cannot be decoded, which is left out; without, it is an error.

    Raises:
        ConfigError: a negative time, or fewer than one frame to smooth over.
        InputError: the stream cannot be read, or a frame cannot be decoded and there is no ``on_broken``.
    """
    if not 0 <= every_s < math.inf or smooth < 1:
        raise ConfigError(
            f"decisions every {every_s!r} s over {smooth!r} frames: expected a time of 0 or more and at "
            "least one frame."
        )
    recent: deque[NDArray[np.float32]] = deque(maxlen=smooth)
    labels, version = classifier.labels, 1
    due = 0.0
    while (frame := frames.take(not_before=due)) is not None:
        now = perf_counter()
        try:
            picture = frames.splitter.picture(frame.data)
            recent.append(classifier.embed_images(picture, exact=False))
        except InputError as error:
            if on_broken is None:
                raise
            on_broken(frame, error)
            continue
        due = (due if now - due < every_s else now) + every_s  # steady, and no burst after a pause
        embedding = _mean(recent)
        while True:  # labels may change while it answers: which ones did, is known only if they have not
            asked = classifier.labels
            (answer,) = classifier.answer(embedding, top_k=top_k)
            if classifier.labels is asked:
                break
        version += asked is not labels
        labels = asked
        yield Decision(answer, frame, len(recent), labels, version)


def _mean(embeddings: deque[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the unit mean ``(1, E)`` of unit embeddings ``(E,)``; the last one where they cancel out."""
    last = embeddings[-1]
    if len(embeddings) == 1:
        return last[None]
    total: NDArray[np.float64] = np.stack(embeddings).sum(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(total))
    unit: NDArray[np.float32] = (total / length).astype(np.float32) if length > 1e-6 else last
    return unit[None]


class Ages:
    """Ages of decisions, counted in classes 2 % wide: quantiles of days take the memory of minutes."""

    _STEP: Final = math.log(1.02)
    _LEAST_MS, _MOST_MS = 1e-3, 1e7

    def __init__(self) -> None:
        classes = math.ceil(math.log(self._MOST_MS / self._LEAST_MS) / self._STEP) + 1
        self._counts = [0] * classes
        self.n = 0
        self.longest_ms = 0.0

    def add(self, age_ms: float) -> None:
        """Count one age."""
        within = min(max(age_ms, self._LEAST_MS), self._MOST_MS)
        self._counts[round(math.log(within / self._LEAST_MS) / self._STEP)] += 1
        self.n += 1
        self.longest_ms = max(self.longest_ms, age_ms)

    def quantile_ms(self, share: float) -> float:
        """Return the age that a ``share`` of all are at most, within 1 %; not a number without ages."""
        rank, below = share * self.n, 0
        for number, count in enumerate(self._counts):
            below += count
            if count and below >= rank:
                return min(self._LEAST_MS * math.exp(number * self._STEP), self.longest_ms)
        return math.nan
