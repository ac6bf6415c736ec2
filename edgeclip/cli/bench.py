"""``edgeclip bench``: how fast a bundle is here, and where the time goes.

A group whose own work is its default: ``edgeclip bench my-bundle`` measures, ``edgeclip bench compare A B``
compares, ``edgeclip bench loadgen`` checks our clock. A bundle in a folder called ``compare`` is
``./compare``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ._bench_parts import ARGUMENTS, command_line, show_document, workload_of
from ._options import (
    BACKENDS,
    LabelChoice,
    Notes,
    bundle_directory,
    check_output,
    output_options,
    prepare_stdout,
    shown,
    workload_options,
)

if TYPE_CHECKING:
    from edgeclip.bench.op_tables import Level
    from edgeclip.bench.report import BenchReport
    from edgeclip.bench.targets import Target

    from ._bench_per_op import PerOpChoice

__all__ = ["bench"]

_RUN: Final = "run"
_COMMANDS: Final = {
    "compare": (
        "edgeclip.cli.bench_compare:compare",
        "Say which of two targets is faster, or that it is open.",
    ),
    "loadgen": (
        "edgeclip.cli.bench_loadgen:loadgen",
        "Let MLPerf's LoadGen check our clock.",
    ),
}


class _RunContext(click.Context):
    """The context of the default command, which is called by the group's name."""

    @property
    def command_path(self) -> str:
        return "edgeclip bench" if self.parent is None else self.parent.command_path


class _RunCommand(click.Command):
    """The default command; its help lists the others."""

    context_class = _RunContext

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(f"{name} …", said) for name, (_, said) in _COMMANDS.items()])
        super().format_epilog(ctx, formatter)


class _BenchGroup(click.Group):
    """A group that measures unless another command is named; those are imported when they are run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)  # they are part of reports
        named = bool(args) and args[0] in _COMMANDS
        return super().parse_args(ctx, args if named else [_RUN, *args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [_RUN, *_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=_BenchGroup)
def bench() -> None:
    """Say how fast a bundle is here, and where the time goes."""


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Return whole numbers of at least 1 that commas separate, each once."""
    if value is None:
        return None
    pieces = [piece.strip() for piece in value.split(",")]
    if not all(piece.isdecimal() and int(piece) for piece in pieces):
        raise click.BadParameter(
            f"{value!r} is not a list of whole numbers of at least 1, such as 1,2.", ctx, param
        )
    return tuple(dict.fromkeys(map(int, pieces)))


def _per_op_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option("--per-op", is_flag=True, help="Time every operator of the towers instead."),
            click.option(
                "--tower",
                type=click.Choice(["image", "text"]),
                help="With --per-op: which.  [default: image]",
            ),
            click.option(
                "--runs", type=click.IntRange(min=1), help="With --per-op: timed calls.  [default: 30]"
            ),
            click.option(
                "--by",
                type=click.Choice(["block", "stage", "kernel"]),
                help="With --per-op: what is summed in a row.  [default: block]",
            ),
            click.option(
                "--most",
                type=click.IntRange(min=1),
                help="With --per-op: rows to show, the slowest.  [default: all; 20 of kernels]",
            ),
            click.option(
                "--trace",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="With --per-op: write one call here, for ui.perfetto.dev or chrome://tracing.",
            ),
        )
    ):
        command = option(command)
    return command


@bench.command(
    _RUN,
    cls=_RunCommand,
    epilog="Example: edgeclip bench default --threads 1,2 --batch 1,8 --html bench.html",
)
@click.argument("bundle", default="default", metavar="[BUNDLE]")
@click.option(
    "--variant", "variants", multiple=True, help="Variant to measure. Repeatable.  [default: the one of auto]"
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    help="Engine. Repeatable.  [default: auto]",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N; OpenVINO: gpu, npu too.")
@click.option(
    "--threads",
    metavar="N,…",
    callback=_numbers,
    help="Threads of the towers, such as 1,2.  [default: usable cores]",
)
@click.option(
    "--batch",
    metavar="N,…",
    callback=_numbers,
    default="1",
    show_default=True,
    help="Pictures a call, such as 1,8.",
)
@workload_options
@click.option(
    "--fast-decode/--exact", default=False, show_default=True, help="Decode large JPEGs at reduced scale."
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Measure each target at least so long.  [default: 10]",
)
@click.option(
    "--min-samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Time at least so many calls of each target; p99 needs 1,000.  [default: 100]",
)
@click.option(
    "--cold",
    type=click.IntRange(min=0),
    metavar="N",
    help="Fresh processes for cold starts, with caches and as many without; 0 leaves them out.  [default: 5]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the order.")
@_per_op_options
@click.option(
    "--device-report",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Run one target for ten minutes instead, and write what the device gives in the long run.",
)
@click.option(
    "--device-name", metavar="NAME", help="What the report calls this device.  [default: its board]"
)
@click.option("--keep-partial", is_flag=True, help="With --device-report: keep a run that Ctrl-C ends.")
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with drawings here, too."
)
@output_options
def run(
    *,
    bundle: str,
    variants: tuple[str, ...],
    backends: tuple[str, ...],
    device: str,
    threads: tuple[int, ...] | None,
    batch: tuple[int, ...],
    images: Path | None,
    labels: str | None,
    label_file: Path | None,
    templates: str | None,
    language: str | None,
    fast_decode: bool,
    duration: float | None,
    min_samples: int | None,
    cold: int | None,
    seed: int,
    per_op: bool,
    tower: str | None,
    runs: int | None,
    by: Level | None,
    most: int | None,
    trace: Path | None,
    device_report: Path | None,
    device_name: str | None,
    keep_partial: bool,
    html: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say how fast BUNDLE is here: stages, cold starts, memory, and what the machine could do.

    All targets (variants × engines × threads × batches) take turns, so that what disturbs the machine
    disturbs all of them. BUNDLE is a directory, or hf:ORG/NAME@REV; without, the embedded bundle.
    """
    prepare_stdout()
    written = {"--output": output, "--html": html, "--device-report": device_report, "--trace": trace}
    for option, path in written.items():
        check_output(option, path)
    offered = LabelChoice(labels, label_file, templates, language)
    offered.check()
    if not per_op:
        _refuse("--per-op", {"--tower": tower, "--runs": runs, "--by": by, "--most": most, "--trace": trace})
    else:
        given = {"--images": images, "--labels": labels, "--label-file": label_file, "--duration": duration}
        given |= {"--min-samples": min_samples, "--cold": cold, "--fast-decode": fast_decode or None}
        given |= {"--html": html, "--device-report": device_report}
        _refuse("figures of whole calls", {**given, "--templates": templates, "--language": language})
        from ._bench_per_op import PerOpChoice

        choice = PerOpChoice(tower or "image", batch[0], runs or 30, most, by or "block")
        _per_op(bundle, variants, backends, device, threads, batch, choice, output, trace, as_json=as_json)
        return
    if device_report is None:
        _refuse("--device-report", {"--device-name": device_name, "--keep-partial": keep_partial or None})
    else:
        given = {"--min-samples": min_samples, "--cold": cold, "--output": output, "--html": html}
        _refuse("runs without --device-report", given)
    notes = Notes()
    targets = _targets(
        bundle_directory(bundle, notes),
        variants=variants,
        backends=backends,
        device=device,
        threads=threads,
        batches=batch,
        fast_decode=fast_decode,
    )
    workload = workload_of(images, offered, notes)
    if device_report is not None:
        from . import _bench_sustained as long

        if len(targets) > 1:
            raise click.UsageError(f"--device-report runs one target, got {len(targets)}.")
        long.sustained(
            device_report,
            targets[0],
            workload,
            device=long.device_name(device_name),
            duration_s=long.DURATION_S if duration is None else duration,
            keep_partial=keep_partial,
            notes=notes,
            as_json=as_json,
        )
        return
    from edgeclip.bench.run import BenchPlan, benchmark

    plan = BenchPlan(
        targets=targets,
        workload=workload,
        duration_s=10.0 if duration is None else duration,
        min_samples=min_samples or 100,
        cold=5 if cold is None else cold,
        seed=seed,
        command=command_line(),
    )
    try:
        report = benchmark(plan, notes.progress)
    finally:
        notes.done()
    _show(report, output, html, notes, as_json=as_json)


def _targets(
    bundle: str,
    *,
    variants: Sequence[str],
    backends: Sequence[str],
    device: str,
    threads: Sequence[int] | None,
    batches: Sequence[int],
    fast_decode: bool,
) -> tuple[Target, ...]:
    """Return every combination, each once."""
    from edgeclip.bench.targets import Target

    found = [
        Target(bundle, variant, backend, device, count, batch, fast_decode)
        for variant in variants or ("auto",)
        for backend in backends or ("auto",)
        for count in threads or (None,)
        for batch in batches
    ]
    return tuple(dict.fromkeys(found))


def _show(
    report: BenchReport, output: Path | None, html: Path | None, notes: Notes, *, as_json: bool
) -> None:
    try:
        if html is not None:
            from edgeclip.bench.html import to_html
            from edgeclip.labels import write_atomic

            write_atomic(html, to_html(report).encode())
            notes.say(f"wrote {shown(html)}")
    finally:  # what was measured is shown wherever it could not be written
        show_document(report, output, notes, as_json=as_json)
    if as_json:  # the table says it itself
        for run in report.runs:
            for warning in run.warnings():
                notes.say(f"warning: {run.name}: {warning}: do not trust these figures, measure again")


def _per_op(
    bundle: str,
    variants: tuple[str, ...],
    backends: tuple[str, ...],
    device: str,
    threads: tuple[int, ...] | None,
    batch: tuple[int, ...],
    choice: PerOpChoice,
    output: Path | None,
    trace: Path | None,
    *,
    as_json: bool,
) -> None:
    from edgeclip.runtime.session import RuntimeOptions

    from ._bench_per_op import per_op

    for name, values in (("--backend", backends), ("--threads", threads or ()), ("--batch", batch)):
        if len(values) > 1:
            raise click.UsageError(f"--per-op takes one {name}, got {len(values)}.")
    options = RuntimeOptions(
        backend=backends[0] if backends else "auto", device=device, threads=threads[0] if threads else None
    )
    per_op(bundle, variants, options, choice, output=output, trace=trace, as_json=as_json)


def _refuse(what: str, given: Mapping[str, object]) -> None:
    """Refuse options that mean nothing here."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise click.UsageError(f"{names[0]} is for {what}.")
