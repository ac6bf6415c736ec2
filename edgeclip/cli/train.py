"""``edgeclip train``: run a training recipe, and go on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeclip.cli._options import SCHEMA, Notes, prepare_stdout, shown
from edgeclip.errors import MissingExtraError
from edgeclip.tables import aligned

if TYPE_CHECKING:
    from edgeclip.distill.run import StagePlan
    from edgeclip.distill.trainer import Progress, Result

__all__ = ["train"]

EXIT_INTERRUPTED = 130
_LINE_EVERY_S = 10.0


@click.command(epilog="Example: edgeclip train plain-clip -o run --set stage.0.samples=20000")
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Directory of the run.",
)
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the recipe: stage.0.batch_size=64."
)
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that prepare batches.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left in DIR.")
@click.option(
    "--log-every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Steps between two lines of log.jsonl.",
)
@click.option("--tensorboard", is_flag=True, help="Write DIR/tensorboard too (extra tensorboard).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    output: Path,
    changes: tuple[str, ...],
    dry_run: bool,
    workers: int,
    device: str,
    restart: bool,
    log_every: int,
    tensorboard: bool,
    as_json: bool,
) -> None:
    """Train the student of RECIPE; the same command again goes on where it stopped.

    RECIPE is a .toml file, whose paths are relative to its folder, or the name of a built-in recipe, whose
    paths are relative to the working directory: plain-clip, mobileclip, mobileclip2, clip-kd, dc-clip,
    tinyclip, tinyclip-manual, lightclip, nano, default. DIR/model is the checkpoint that comes out,
    DIR/log.jsonl says how training went. Ctrl-C and SIGTERM finish the step, save and end with 130. Several
    processes: torchrun --nproc-per-node 2 -m edgeclip train …
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("edgeclip train", extra="train", module="torch")
    from edgeclip.distill.ranks import place_of_process
    from edgeclip.distill.recipe import parse_recipe
    from edgeclip.distill.recipe_text import find_recipe
    from edgeclip.distill.run import dry_run_of
    from edgeclip.distill.trainer import TrainOptions
    from edgeclip.distill.trainer import train as run_training

    prepare_stdout()
    notes = Notes()
    content, root, where = find_recipe(recipe, "edgeclip.distill.recipes")
    parsed = parse_recipe(content, where=where, changes=changes)
    if dry_run:
        plans, remark = dry_run_of(parsed, root, device=device)
        if place_of_process("cpu")[1]:  # the first rank speaks for all
            return
        if as_json:
            _print({"dry_run": True, "stages": [plan.to_dict() for plan in plans]})
            return
        click.echo(_table(plans))
        if remark:
            notes.say(remark)
        return
    record = "".join(f"# --set {' '.join(change.split())}\n" for change in changes)
    options = TrainOptions(
        output,
        root,
        workers=workers,
        device=device,
        restart=restart,
        log_every=log_every,
        recipe_text=record + content.decode("utf-8"),
    )
    with _stopping() as stop, _reporting(notes) as report, ExitStack() as opened:
        listen = report
        if tensorboard:
            from edgeclip.distill.tensorboard import written_scalars

            write = opened.enter_context(written_scalars(output / "tensorboard", every=log_every))
            listen = _both(report, write)
        result = run_training(parsed, options, listen=listen, stop=stop)
    if result.rank == 0:
        if as_json:
            _print(result.to_dict())
        else:
            click.echo(_outcome(result, output))
    if result.status == "interrupted":
        ctx.exit(EXIT_INTERRUPTED)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a signal asked to stop; a second Ctrl-C does not wait."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def remember(number: int, frame: Any) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _reporting(notes: Notes) -> Iterator[Callable[[Progress], None]]:
    """Yield what shows progress: a bar where a person watches, else a line every few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        with Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task("training", total=None)

            def show(progress: Progress) -> None:
                if progress.kind == "step":
                    text = f"{progress.entry['stage']}: {_numbers(progress.entry)}"
                    bar.update(task, description=text, completed=progress.step, total=progress.steps)
                else:
                    bar.console.print(_said(progress), markup=False, highlight=False)

            yield show
        return
    began = last = time.monotonic()
    first = 0

    def say(progress: Progress) -> None:
        nonlocal last, first
        now = time.monotonic()
        if progress.kind != "step":
            notes.say(_said(progress))
            return
        first = first or progress.step
        if now - last >= _LINE_EVERY_S or progress.step == progress.steps:
            last = now
            done = progress.step - first + 1
            left_s = (progress.steps - progress.step) * (now - began) / done
            notes.say(
                f"step {progress.step:,} of {progress.steps:,}: {_numbers(progress.entry)}, "
                f"{left_s / 60:.0f} min left"
            )

    yield say


def _both(
    first: Callable[[Progress], None], second: Callable[[Progress], None]
) -> Callable[[Progress], None]:
    def hear(progress: Progress) -> None:
        first(progress)
        second(progress)

    return hear


def _numbers(entry: Any) -> str:
    loss = entry["loss"]
    said = f"{loss:.4f}" if isinstance(loss, float) else loss
    return f"loss {said}, lr {entry['lr']:.2e}, {entry['samples_per_s']:,.0f} samples/s"


def _said(progress: Progress) -> str:
    if progress.kind == "remark":
        return progress.text
    values = ", ".join(
        f"{name} {value:.3f}"
        for name, value in progress.entry["values"].items()
        if name not in ("pictures", "texts", "skipped")
    )
    return f"step {progress.step:,}: {progress.entry['name']}: {values}"


def _outcome(result: Result, output: Path) -> str:
    where = shown(output)
    if result.status == "interrupted":
        return (
            f"stopped and saved at step {result.steps:,} of {result.of:,}; the same command goes on ({where})"
        )
    begin = "finished before" if result.status == "present" else "finished"
    counts = "".join(
        f", {count:,} {what}"
        for count, what in ((result.skipped, "steps skipped"), (result.broken, "samples broken"))
        if count
    )
    return f"{begin}: {result.steps:,} steps{counts}; model in {shown(output / 'model')} ({result.licence})"


def _table(plans: Sequence[StagePlan]) -> str:
    rows = [("stage", "steps", "batch", "samples", "trained", "frozen", "similarities", "teachers")]
    rows += [
        (
            plan.name,
            f"{plan.steps:,}",
            f"{plan.batch_size:,}",
            f"{plan.samples:,}",
            f"{plan.trained:,}",
            f"{plan.frozen:,}",
            f"{plan.matrix_bytes / 1e6:,.1f} MB",
            ", ".join(plan.teachers) or "-",
        )
        for plan in plans
    ]
    return "\n".join(aligned(rows, range(1, 7)))


def _print(said: dict[str, Any]) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **said}, indent=2, ensure_ascii=False))
