"""Decode pictures on threads, ahead of the one consumer that runs the tower, in order and within bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, EdgeClipError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .preprocess import Channels, ImageSource, Preprocess
    from .runtime.latency import Clock

__all__ = ["Decoded", "decode_ahead"]

_END: Any = object()


@dataclass(frozen=True, eq=False)
class Decoded:
    """One picture on its way to the tower: its pixels, or the error that stands for them.

    Attributes:
        source: the picture as it was given.
        pixels: ``(H, W, 3)`` uint8, the tower's input.
        error: why there are none.
        timing_ms: what ``decode`` and ``resize`` took.
    """

    source: Any
    pixels: NDArray[np.uint8] | None
    error: EdgeClipError | None
    timing_ms: dict[str, float]


def decode_ahead(
    images: Iterable[ImageSource],
    preprocess: Preprocess,
    *,
    channels: Channels,
    batch_size: int,
    workers: int,
    ready: Callable[[], bool] | None,
    clock: Clock,
) -> Generator[list[Decoded], None, None]:
    """Yield groups of decoded pictures, in order; threads decode the next ones while a group is used.

    Threads suffice: Pillow's decoders and resizing release the GIL. With as many workers as cores, decoders
    and tower share the cores as the system schedules them, and no core is idle as long as pictures wait on
    either side: a long stream takes its total work divided by the cores, whichever side is the slower one. So
    the tower need not be opened with fewer threads than for single pictures, where latency counts.

    Args:
        images: drawn by the consuming thread, at most ``batch_size + 2 · workers`` ahead.
        preprocess: decodes and resizes.
        channels: order of the colours in arrays.
        batch_size: pictures in a group, fewer at the end and where ``ready`` says so.
        workers: decoding threads.
        ready: whether the next picture is there; where it is not, what is at hand is yielded first.
        clock: where decoding and resizing are timed.

    Raises:
        ConfigError: ``batch_size`` or ``workers`` is below 1.
    """
    if batch_size < 1 or workers < 1:
        raise ConfigError(f"batch_size is {batch_size} and workers {workers}, expected at least 1.")

    def decode(source: Any) -> Decoded:
        began = perf_counter_ns()
        try:
            with clock.span("decode"):
                image = preprocess.decode(source, channels=channels)
            decoded = perf_counter_ns()
            with clock.span("resize"):
                pixels = preprocess.resize(image)
        except EdgeClipError as error:
            return Decoded(source, None, error, {})
        ended = perf_counter_ns()
        timing_ms = {"decode": (decoded - began) / 1e6, "resize": (ended - decoded) / 1e6}
        return Decoded(source, pixels, None, timing_ms)

    source = iter(images)
    pending: deque[Future[Decoded]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="edgeclip-decode")
    try:
        while True:
            while len(pending) < batch_size + 2 * workers and (ready is None or not pending or ready()):
                image = next(source, _END)
                if image is _END:
                    break
                pending.append(pool.submit(decode, image))
            if not pending:
                return
            yield [pending.popleft().result() for _ in range(min(batch_size, len(pending)))]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
