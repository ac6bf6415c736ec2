"""What a run says, as TensorBoard's scalars (extra ``tensorboard``).

A run that goes on writes another file of events into the same directory. It begins by withdrawing every step
from the one it goes on with, so that steps that were done twice are shown once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from edgeclip.distill.trainer import Progress

__all__ = ["written_scalars"]

_FLUSH_S = 10
_STEP = {"loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm", "scale": "scale"}


@contextmanager
def written_scalars(directory: Path, *, every: int = 1) -> Iterator[Callable[[Progress], None]]:
    """Yield what hears a run's progress and writes it down.

    The directory is made with the first step: nothing is written by a process that hears of none.

    Args:
        directory: of TensorBoard's files.
        every: steps between two that are written.

    Raises:
        MissingExtraError: ``tensorboard`` is not installed.
        InputError: the directory cannot be written.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("--tensorboard", extra="tensorboard", module="tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None

    def hear(progress: Progress) -> None:
        nonlocal writer
        if progress.kind == "remark":
            return
        with _translated(directory):
            if writer is None:
                directory.mkdir(parents=True, exist_ok=True)
                writer = SummaryWriter(str(directory), purge_step=progress.step, flush_secs=_FLUSH_S)
            if progress.kind == "validation":
                _write(
                    writer, f"validation/{progress.entry['name']}", progress.entry["values"], progress.step
                )
            elif progress.step % every == 0 or progress.step == progress.steps:
                said = {name: progress.entry[key] for key, name in _STEP.items()}
                said["samples_per_s"] = progress.entry["samples_per_s"]
                _write(writer, "train", said, progress.step)
                _write(writer, "loss", progress.entry["parts"], progress.step)

    try:
        yield hear
    finally:
        if writer is not None:
            with _translated(directory):
                writer.close()


@contextmanager
def _translated(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"TensorBoard's files in {str(directory)!r} cannot be written: {error.strerror or error}."
        ) from error


def _write(writer: Any, group: str, values: Mapping[str, Any], step: int) -> None:
    for name, value in values.items():
        # What is not finite stands in the log by name.
        writer.add_scalar(f"{group}/{name}", float(value), step)
