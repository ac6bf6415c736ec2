"""``edgeclip classify -``: a stream on standard input, one decision after another out."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar
from unicodedata import east_asian_width

import click

from edgeclip.errors import InputError

from ._options import SCHEMA, quiet_broken_pipe, together
from ._results import SHARES, answer_object, kept_of, why_none

if TYPE_CHECKING:
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.stream import Ages, Counts, Decision, Frame, FrameReader

    from ._options import Notes
    from ._watch import Watch

__all__ = ["StreamChoice", "is_stream", "run_stream", "stream_options"]

_STDIN: Final = 0
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "": 1.0}
_MOST_SMOOTHED: Final = 1000  # their embeddings are kept
_SHOWN_LABELS: Final = 5
_HINT_S, _HINT_BYTES = 5.0, 1 << 20  # a picture should have come by then
_COLUMNS: Final = 80  # of a terminal that does not say
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _duration(_ctx: click.Context, _param: click.Parameter, said: str | None) -> float | None:
    """Return seconds, written as 500ms, 2s or 0.5."""
    if said is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|)", said.strip())
    if match is None or float(match[1]) <= 0:
        raise click.BadParameter(f"{said!r}: expected a time above 0, such as 500ms or 2s.")
    return float(match[1]) * _UNITS_S[match[2]]


def stream_options(command: _Command) -> _Command:
    """Add the options of a stream on standard input; :class:`StreamChoice` takes what they were given."""
    return together(
        click.option(
            "--raw",
            metavar="WxH[:LAYOUT]",
            help="Of a stream: frames are raw pixels: rgb (the default), bgr, gray, yuyv, nv12 or i420.",
        ),
        click.option(
            "--every",
            callback=_duration,
            metavar="TIME",
            help="Of a stream: least time between two decisions, such as 500ms.  [default: none]",
        ),
        click.option(
            "--smooth",
            type=click.IntRange(min=1, max=_MOST_SMOOTHED),
            metavar="N",
            help="Of a stream: decide on the mean of the last N frames.  [default: 1]",
        ),
        click.option(
            "--all-frames",
            is_flag=True,
            help="Of a stream: decide on every frame, and let its writer wait. So it is with a file; of a "
            "pipe the latest frame counts.",
        ),
    )(command)


def is_stream(paths: tuple[Path, ...], paths_from: str | None) -> bool:
    """Return whether pictures come from standard input.

    Raises:
        click.UsageError: they do, and from elsewhere, too.
    """
    if Path("-") not in paths:
        return False
    if len(paths) > 1 or paths_from is not None:
        raise click.UsageError("- is a stream on standard input, which goes with no other paths.")
    return True


@dataclass(frozen=True)
class StreamChoice:
    """What :func:`stream_options` were given."""

    raw: str | None
    every_s: float | None
    smooth: int | None
    all_frames: bool

    def check(self, *, stream: bool, form: str | None = None, others: dict[str, bool] | None = None) -> None:
        """Refuse what means nothing, before anything heavy is loaded.

        Args:
            stream: whether the pictures are a stream.
            form: of the output.
            others: options that a stream has no use for, and whether they were given.

        Raises:
            click.UsageError: an option that does not go with a stream, or only with one; or standard input is
                a terminal.
            ConfigError: raw frames that cannot be.
            InputError: standard input is closed.
        """
        if not stream:
            given = {
                "--raw": self.raw,
                "--every": self.every_s,
                "--smooth": self.smooth,
                "--all-frames": self.all_frames,
            }
            for name, value in given.items():
                if value:
                    raise click.UsageError(f"{name} is for a stream on standard input: edgeclip classify -")
            return
        if form not in (None, "jsonl"):
            raise click.UsageError(f"--{form} does not go with a stream, which has no end: use --jsonl.")
        for name, was_given in (others or {}).items():
            if was_given:
                raise click.UsageError(f"{name} does not go with a stream.")
        if sys.stdin is None:  # descriptor 0 may be any file that is opened from now on
            raise InputError("standard input is closed, expected a pipe or a file of pictures. Connect one.")
        if self.raw is not None:
            from edgeclip.frames import RawFormat

            RawFormat.parse(self.raw)
        if _is_terminal():
            raise click.UsageError(
                "- reads pictures from standard input, which is a terminal here. Pipe a camera or a file "
                "into it: ffmpeg -f v4l2 -i /dev/video0 -c:v mjpeg -q:v 3 -f mjpeg - | edgeclip classify -"
            )
        if self.every_s is not None and self.sees_all:
            raise click.UsageError(
                "--every leaves out frames, and "
                + ("--all-frames none." if self.all_frames else "of a file none is: pipe it in real time.")
            )

    @property
    def sees_all(self) -> bool:
        """Whether every frame is decided on."""
        return self.all_frames or _is_file()


def _is_terminal() -> bool:
    try:
        return os.isatty(_STDIN)
    except OSError:
        return False


def _is_file() -> bool:
    try:
        return stat.S_ISREG(os.fstat(_STDIN).st_mode)
    except OSError:  # said where it is read
        return False


@dataclass(frozen=True)
class Shown:
    """What of a decision is shown: so many labels, and how; see the options of ``edgeclip classify``."""

    form: str | None
    top_k: int
    min_confidence: float


def run_stream(
    classifier: ZeroShotClassifier,
    choice: StreamChoice,
    results: TextIO,
    notes: Notes,
    *,
    shown: Shown,
    watch: Watch | None = None,
    strict: bool = False,
) -> None:
    """Decide on the frames of standard input until it ends, and write each decision.

    Args:
        classifier: open, its labels or head set.
        choice: how the stream is read.
        results: where decisions go.
        notes: where remarks and the summary go.
        shown: what of a decision is shown.
        watch: offers labels or a head again while the stream runs.
        strict: stop at the first frame that cannot be decoded.

    Raises:
        InputError: the stream cannot be read, or has no frame that can be decoded.
    """
    from edgeclip.frames import PictureSplitter, RawFormat, RawSplitter
    from edgeclip.stream import FrameReader, decide

    splitter = PictureSplitter() if choice.raw is None else RawSplitter(RawFormat.parse(choice.raw))
    writer = (_JsonLines if shown.form == "jsonl" else _Lines)(results, classifier, shown.min_confidence)
    told = _Told(writer, notes)
    tally = _Tally(told)
    version = 1
    reader = FrameReader(_STDIN, splitter, every_frame=choice.sees_all)
    watching = nullcontext() if watch is None else watch.running(told.say)
    with watching, reader as frames, _hint(frames, told):
        try:
            for decision in decide(
                classifier,
                frames,
                top_k=shown.top_k,
                every_s=choice.every_s or 0.0,
                smooth=choice.smooth or 1,
                on_broken=None if strict else tally.on_broken,
            ):
                if decision.labels_version != version:
                    version = decision.labels_version
                    told.say(_of_labels(decision))
                tally.ages.add(told.write(decision))
        except BrokenPipeError:
            quiet_broken_pipe()  # the reader has what it wanted
            return
        except BaseException:
            if frames.counts.frames:
                told.say(tally.summary(frames.counts))
            raise
        if not tally.ages.n:
            raise InputError(_why_nothing(frames.counts, tally.broken, choice.raw))
        told.say(tally.summary(frames.counts))


@contextmanager
def _hint(frames: FrameReader, told: _Told) -> Iterator[None]:
    """Say once that standard input holds something else than pictures, in place of waiting in silence."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_HINT_S):
            counts = frames.counts
            if counts.frames:
                return
            if counts.skipped_bytes >= _HINT_BYTES:
                told.say(f"so far, {_why_nothing(counts, 0, None)}")
                return

    threading.Thread(target=look, name="edgeclip-hint", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


class _Told:
    """Decisions and remarks: one at a time, as they come from two threads and may share a terminal."""

    def __init__(self, writer: _JsonLines | _Lines, notes: Notes) -> None:
        self._writer = writer
        self._notes = notes
        self._lock = threading.Lock()

    def write(self, decision: Decision) -> float:
        """Write a decision, and return the age in it."""
        with self._lock:
            return self._writer.write(decision)

    def say(self, text: str) -> None:
        """Write a remark."""
        with self._lock:
            self._writer.pause()
            self._notes.say(text)


class _Tally:
    """Counts of one run, for the summary."""

    def __init__(self, told: _Told) -> None:
        from edgeclip.stream import Ages

        self.ages: Ages = Ages()
        self.broken = 0
        self._told = told

    def on_broken(self, frame: Frame, error: InputError) -> None:
        """Count a frame that cannot be decoded, and say so of the first."""
        self.broken += 1
        if self.broken == 1:
            said = " ".join(str(error).split())
            self._told.say(f"frame {frame.counts.frames:,} is left out: {said} Others are only counted.")

    def summary(self, counts: Counts) -> str:
        """Return what became of the stream, in one line."""
        from edgeclip.stream import AGE_SAMPLES_FOR_P99

        ages = self.ages
        left = counts.frames - counts.dropped - ages.n - self.broken
        parts = [
            f"{counts.frames:,} frame{'' if counts.frames == 1 else 's'}",
            f"{ages.n:,} decided, {counts.dropped:,} dropped for newer ones, {self.broken:,} broken",
            f"{counts.cut:,} cut off",
            f"{counts.skipped_bytes:,} bytes between frames skipped",
        ]
        if left:
            parts.append(f"{left:,} left over")
        if counts.inside:
            parts.append("the stream ended inside a frame")
        if ages.n:
            most = (
                f"{ages.quantile_ms(0.99):.1f} ms at the 99th percentile"
                if ages.n >= AGE_SAMPLES_FOR_P99
                else f"{ages.longest_ms:.1f} ms at most"
            )
            parts.append(f"age {ages.quantile_ms(0.5):.1f} ms in the median, {most}")
        return "; ".join(parts)


def _of_labels(decision: Decision) -> str:
    names, version, frame = decision.labels, decision.labels_version, decision.frame.counts.frames
    first = ", ".join(names[:_SHOWN_LABELS]) + (", …" if len(names) > _SHOWN_LABELS else "")
    return f"labels {version} answer from frame {frame:,} on: {len(names):,} of them ({first})"


def _why_nothing(counts: Counts, broken: int, raw: str | None) -> str:
    if broken:
        return (
            f"standard input: none of {counts.frames:,} frames could be decoded, expected JPEG or PNG "
            "pictures. Check what writes them."
        )
    if raw is not None:
        return (
            f"standard input: {counts.read_bytes:,} bytes hold no frame of {raw}, expected at least one. "
            "Check size and layout."
        )
    found = ", one that breaks off" if counts.cut else ""
    return (
        f"standard input: {counts.read_bytes:,} bytes hold no whole picture{found}, expected JPEG or PNG "
        "pictures one after another. Ask ffmpeg for -c:v mjpeg -q:v 3 -f mjpeg, or say --raw WIDTHxHEIGHT."
    )


# -- Output -------------------------------------------------------------------------------------------------


class _JsonLines:
    """One JSON object a decision."""

    def __init__(self, stream: TextIO, classifier: ZeroShotClassifier, min_confidence: float) -> None:
        self._stream = stream
        self._classifier = classifier
        self._min_confidence = min_confidence

    def write(self, decision: Decision) -> float:
        """Write one object, and return the age in it."""
        counts = decision.frame.counts
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "score_kind": self._classifier.score_kind,
            "frame": counts.frames,
            "dropped": counts.dropped,
            "skipped_bytes": counts.skipped_bytes,
            "age_ms": 0.0,
            "smoothed": decision.smoothed,
            "labels_version": decision.labels_version,
            **answer_object(kept_of(decision.answer, self._min_confidence), decision.answer.rejection),
        }
        age_ms = document["age_ms"] = round(decision.age_ms(), 3)
        self._stream.write(json.dumps(document, ensure_ascii=False) + "\n")
        self._stream.flush()
        return age_ms

    def pause(self) -> None:
        """Nothing is half written."""


class _Lines:
    """For people: a line a decision; on a terminal one that changes."""

    def __init__(self, stream: TextIO, classifier: ZeroShotClassifier, min_confidence: float) -> None:
        self._stream = stream
        self._min_confidence = min_confidence
        self._score = "{:.1%}" if classifier.score_kind in SHARES else "{:.2f}"
        self._changing = stream.isatty()
        self._open_line = False

    def write(self, decision: Decision) -> float:
        """Write one line, and return the age in it."""
        kept = kept_of(decision.answer, self._min_confidence)
        labels = [f"{each.label} {self._score.format(each.score)}" for each in kept]
        counts, age_ms = decision.frame.counts, decision.age_ms()
        aside = f"{age_ms:.0f} ms old" + (f", {counts.dropped:,} dropped" if counts.dropped else "")
        said = "  ".join(labels) or why_none(decision.answer)
        line = f"{counts.frames:>6}  {said}  ({aside})"
        if self._changing:
            line = f"\r{_cut(line, self._columns() - 1)}\x1b[K"
        self._stream.write(line if self._changing else line + "\n")
        self._stream.flush()
        self._open_line = self._changing
        return age_ms

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS
        except OSError:
            return _COLUMNS

    def pause(self) -> None:
        """End the line that changes, so that others may write."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False


def _cut(line: str, columns: int) -> str:
    """Return a line that fits into so many columns of a terminal; Chinese takes two a character."""
    ends = list(accumulate(2 if east_asian_width(each) in "WF" else 1 for each in line))
    return line if not ends or ends[-1] <= columns else line[: bisect_right(ends, columns - 1)] + "…"
