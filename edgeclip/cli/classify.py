"""``edgeclip classify``: pictures in, labels out, each result as soon as it is there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._options import (
    AnswerChoice,
    LabelChoice,
    ModelChoice,
    Notes,
    Pictures,
    answer_options,
    bundle_directory,
    form_option,
    label_options,
    model_options,
    quiet_broken_pipe,
    stdout_of_results,
)
from ._results import Summary, Writer, kept_of, open_writer, timing_table
from ._stream import Shown, StreamChoice, is_stream, run_stream, stream_options
from ._watch import watch_of

if TYPE_CHECKING:
    from edgeclip.classify import ZeroShotClassifier

__all__ = ["classify"]

# Off: reduced-scale decoding is quicker, but its pixels are not quite the same.
_FAST_DECODE = False


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@model_options
@label_options
@answer_options
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Labels a picture.")
@click.option(
    "--min-confidence",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Leave out labels that score less.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Pictures a tower call.  [default: what 'edgeclip tune' found, else 1]",
)
@click.option(
    "--fast-decode/--exact",
    default=_FAST_DECODE,
    show_default=True,
    help="Decode large JPEGs at reduced scale: faster, scores move a little.",
)
@form_option("json", "Print one JSON document.")
@form_option("jsonl", "Print one JSON object a picture.")
@form_option("csv", "Print CSV, one row a label.")
@click.option("--timing", is_flag=True, help="Show where the time went.")
@stream_options
@click.option("--strict", is_flag=True, help="Stop at the first picture that cannot be read.")
@click.option(
    "--paths-from", metavar="FILE", help="Read more paths from a file, one a line; - is standard input."
)
@click.pass_context
def classify(
    ctx: click.Context,
    *,
    paths: tuple[Path, ...],
    bundle: str,
    variant: str,
    backend: str,
    device: str,
    threads: int | None,
    cache_dir: Path | None,
    allow: tuple[str, ...],
    labels: str | None,
    label_file: Path | None,
    templates: str | None,
    language: str | None,
    head: str | None,
    reject: bool,
    multi: bool,
    threshold: float | None,
    context: tuple[str, ...],
    top_k: int,
    min_confidence: float,
    batch_size: int | None,
    fast_decode: bool,
    form: str | None,
    timing: bool,
    strict: bool,
    paths_from: str | None,
    raw: str | None,
    every: float | None,
    smooth: int | None,
    all_frames: bool,
) -> None:
    """Classify pictures, and folders of them, against labels of your choice.

    Without labels the bundle's own are offered. Results come as they are ready, in the order of the pictures.
    A picture that cannot be read is reported, the others go on, and the exit code is 1. One of the labels
    always fits best; with --reject none is given to a picture that shows none of them.

    - is a stream of pictures on standard input, such as a camera's: one decision a line on the latest one.

    Example: edgeclip classify photos/ --labels "cat,dog,car" --reject --timing
    """
    if not paths and paths_from is None:
        raise click.UsageError("name a picture or a folder, or give --paths-from.")
    stream = is_stream(paths, paths_from)
    frames = StreamChoice(raw, every, smooth, all_frames)
    others = {"--timing": timing, "--batch-size": batch_size is not None}
    frames.check(stream=stream, form=form, others=others)
    offered = LabelChoice(labels, label_file, templates, language)
    asked = AnswerChoice(head, reject, multi, threshold, context)
    offered.check()
    asked.check(offered)
    if multi and min_confidence:
        raise click.UsageError(
            "--min-confidence is of scores that are shared out; with --multi, --threshold."
        )
    model = ModelChoice(bundle, variant, backend, device, threads, cache_dir, allow)
    began_ns = time.perf_counter_ns()
    from edgeclip.classify import ZeroShotClassifier
    from edgeclip.runtime.latency import NO_CLOCK, StageClock

    results = stdout_of_results()
    clock = StageClock() if not stream and (timing or form in ("json", "jsonl")) else None
    if clock is not None:
        clock.record("import", began_ns, time.perf_counter_ns())
    notes = Notes()
    with ZeroShotClassifier.open(
        bundle_directory(model.bundle, notes),
        variant=model.variant,
        # Labels that change while it runs: opening the tower at each change moves the memory up and down.
        keep_text_tower=stream and label_file is not None,
        options=model.options(),
        fast_decode=fast_decode,
        answers=asked.answers(),
        clock=NO_CLOCK if clock is None else clock,
    ) as classifier:
        notes.on_choice(classifier.choice)
        watch = watch_of(classifier, offered, asked.head) if stream else None  # before it is read
        if asked.head is None:
            offered.apply(classifier, notes)
        else:
            classifier.set_head(asked.head)
        if stream:
            shown = Shown(form, top_k, min_confidence)
            run_stream(classifier, frames, results, notes, shown=shown, watch=watch, strict=strict)
            return
        writer = open_writer(form, results, classifier, clock)
        run = _Run(classifier, writer, notes, top_k, min_confidence, batch_size, strict)
        try:
            summary = run.over(Pictures(paths, paths_from, notes))
        except BrokenPipeError:
            quiet_broken_pipe()  # the reader has what it wanted
            return
        if timing and form in ("jsonl", "csv") and clock is not None:
            notes.say("timing\n" + timing_table(clock, summary))
    if summary.failed:
        ctx.exit(1)


@dataclass(frozen=True)
class _Run:
    """One pass over the pictures."""

    classifier: ZeroShotClassifier
    writer: Writer
    notes: Notes
    top_k: int
    min_confidence: float
    batch_size: int | None
    strict: bool

    def over(self, pictures: Pictures) -> Summary:
        """Classify the pictures and write what comes of each.

        Raises:
            EdgeClipError: with ``strict``, the first picture that cannot be read.
        """
        summary = Summary()
        outcomes = self.classifier.classify_stream(
            pictures, top_k=self.top_k, batch_size=self.batch_size, ready=pictures.ready
        )
        for outcome in outcomes:
            key = pictures.next_key()
            summary.pictures += 1
            self.notes.done()
            if outcome.error is not None:
                if self.strict:
                    raise outcome.error
                summary.failed += 1
                self.notes.say(f"error: {' '.join(str(outcome.error).split())}")
            self.writer.picture(key, outcome, kept_of(outcome, self.min_confidence))
            self.notes.progress(f"{summary.pictures:,} pictures, last {key[-40:]}")
        self.notes.done()
        self.writer.end(summary)
        if not summary.pictures:
            self.notes.say("no pictures found")
        return summary
