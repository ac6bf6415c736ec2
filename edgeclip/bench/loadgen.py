"""MLPerf's LoadGen and our own loops, in turns, on one classifier: does our clock say what theirs says?

LoadGen decides which pictures are asked for and when, takes the time, and says in its log what it found. In
SingleStream it asks for a picture when the one before is answered, and its figure is the 90th percentile; in
Offline it asks for all pictures at once, and its figure is pictures a second. Our loop answers the very
pictures that LoadGen asked for, in their order. Pictures are in memory beforehand, as MLPerf's rules for the
query sample library have it: *decoded*, of the tower's own size, or as the bytes of their *file*.

All of it runs in a process of its own, :mod:`edgeclip.bench.loadgen_child`: LoadGen keeps threads and a log
for its process, and ends it where something goes wrong.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, cast

import msgspec

from edgeclip import errors
from edgeclip.bench.compare_child import LabelsAsked
from edgeclip.bench.loadgen_child import Done, Failure, Message, Progress, Task
from edgeclip.errors import BackendError, ConfigError, EdgeClipError, InputError, MissingExtraError

if TYPE_CHECKING:
    from edgeclip.bench.loadgen_report import Given, LoadGenCheck
    from edgeclip.bench.targets import Target

__all__ = ["LoadGenPlan", "check", "require_loadgen"]

BUNDLE_LABELS: Final = LabelsAsked()
_TAIL_CHARS: Final = 300
# The parent's path and not the folder at hand, which may hold files that are named like modules.
_PROGRAM: Final = (
    "import sys; sys.path[:] = sys.argv[1:]; from edgeclip.bench.loadgen_child import main; main()"
)


@dataclass(frozen=True)
class LoadGenPlan:
    """What is checked.

    Attributes:
        target: what answers; its batch is that of Offline.
        pictures: files, in memory before anything is measured.
        labels: what is offered; those of the bundle, without.
        pictures_source: how the report calls where they come from.
        labels_source: the same of labels.
        given: kinds of input.
        rounds: turns of LoadGen and of ours, each.
        turn_s: a turn measures at least so long…
        min_queries: …and answers so many pictures. SingleStream needs 64 for LoadGen's early stopping.
        seed: of LoadGen's choices and of the order of turns.
        logs: where LoadGen's logs are kept, a folder for each turn; without, they are removed.
        command: what the user typed.

    Raises:
        ConfigError: a value is out of range.
        InputError: there are no pictures.
    """

    target: Target
    pictures: Sequence[Path]
    labels: LabelsAsked = BUNDLE_LABELS
    pictures_source: str = "pictures"
    labels_source: str = "bundle"
    given: tuple[Given, ...] = ("decoded",)
    rounds: int = 6
    turn_s: float = 2.0
    min_queries: int = 100
    seed: int = 0
    logs: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if not self.pictures:
            raise InputError("pictures: got none, expected at least one.")
        if self.rounds < 1 or self.min_queries < 1 or not self.given:
            raise ConfigError(
                f"loadgen: got {self.rounds} rounds, {self.min_queries} queries and {len(self.given)} kinds "
                "of input, expected at least 1 of each."
            )
        if not 0.1 <= self.turn_s <= 3600:
            raise ConfigError(f"loadgen: got turns of {self.turn_s!r} s, expected 0.1 to 3600.")


def require_loadgen() -> None:
    """Do nothing where LoadGen is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if importlib.util.find_spec("mlperf_loadgen") is None:
        raise MissingExtraError(
            "MLPerf's LoadGen (which has wheels for Linux on x86-64, and none for Linux on ARM)",
            extra="loadgen",
            module="mlcommons-loadgen",
        )


def check(plan: LoadGenPlan, on_progress: Callable[[str], None] = lambda said: None) -> LoadGenCheck:
    """Measure what a plan says, in a fresh process.

    Args:
        plan: what is measured.
        on_progress: told before each turn, in a few words.

    Raises:
        MissingExtraError: LoadGen is not installed; that is found first.
        EdgeClipError: a picture, a label, the target or the folder of the logs cannot be used.
        BackendError: the process ended without a report.
    """
    require_loadgen()
    with ExitStack() as stack:
        if plan.logs is None:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeclip-loadgen-")))
        else:
            logs = _made(plan.logs)
        heard = stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=heard,
            )
        )
        stack.callback(process.kill)  # before it is waited for; it may have ended by itself
        # A process that is gone already says why below.
        with contextlib.suppress(BrokenPipeError), cast("IO[bytes]", process.stdin) as task:
            task.write(msgspec.json.encode(_task(plan, logs)))
        for line in cast("IO[bytes]", process.stdout):
            message = msgspec.json.decode(line, type=Message)
            if isinstance(message, Done):
                return message.check
            if isinstance(message, Failure):
                raise _raised(message)
            if isinstance(message, Progress):
                on_progress(message.said)
        code = process.wait()
        heard.seek(0)
        said = " ".join(heard.read().decode("utf-8", "replace").split())[-_TAIL_CHARS:]
    raise BackendError(
        f"the process of LoadGen ended with {code} and without a report ({said or 'silently'})."
    )


def _task(plan: LoadGenPlan, logs: Path) -> Task:
    return Task(
        target=plan.target,
        pictures=tuple(map(str, plan.pictures)),
        pictures_source=plan.pictures_source,
        labels=plan.labels,
        labels_source=plan.labels_source,
        given=plan.given,
        rounds=plan.rounds,
        turn_s=plan.turn_s,
        min_queries=plan.min_queries,
        seed=plan.seed,
        command=plan.command,
        logs=str(logs.absolute()),
    )


def _raised(failure: Failure) -> EdgeClipError:
    """Return an error of ours as the process raised it; others are a failure of the backend."""
    kind = getattr(errors, failure.kind, None)
    if kind is None:
        return BackendError(f"a call that LoadGen asked for failed: {failure.error}.")
    # The sentence names the extra already, which the class would put into one of its own.
    error: EdgeClipError = (EdgeClipError if kind is MissingExtraError else kind)(failure.error)
    return error


def _made(folder: Path) -> Path:
    """Make a folder for logs.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"LoadGen's logs cannot be kept in {str(folder)!r}: {error.strerror}.") from error
    return folder
