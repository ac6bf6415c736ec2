"""The command line: a lazy group, one thin module per command, one place where errors become exit codes.

``edgeclip --help`` loads click and nothing else: the table below holds each command's module and its one line
of help, and the module is imported when the command runs.
"""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

import click

from edgeclip import __version__
from edgeclip.errors import EdgeClipError, InputError

__all__ = ["cli", "main"]

EXIT_INTERRUPTED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_COMMANDS: dict[str, tuple[str, str]] = {
    "adapt": ("edgeclip.cli.adapt:adapt", "Learn a label bank from pictures that nobody labelled."),
    "bench": ("edgeclip.cli.bench:bench", "Say where the time of a bundle goes."),
    "bundle": ("edgeclip.cli.bundle:bundle", "Inspect, slim, compare and pack bundles."),
    "cache": ("edgeclip.cli.cache:cache", "Show or clear what edgeclip keeps on this host."),
    "classify": ("edgeclip.cli.classify:classify", "Classify pictures against labels of your choice."),
    "compile": ("edgeclip.cli.compile:compile_", "Build the engines of a bundle for this host."),
    "data": ("edgeclip.cli.data:data", "Fetch, generate, pack and check data."),
    "doctor": ("edgeclip.cli.doctor:doctor", "Say what this machine is and which backends work."),
    "embed": ("edgeclip.cli.embed:embed", "Write image embeddings to a file."),
    "eval": ("edgeclip.cli.eval:eval_", "Measure how good models are, all on the same pictures."),
    "export": ("edgeclip.cli.export:export", "Export a model to a verified bundle."),
    "heads": ("edgeclip.cli.heads:heads", "Fit what turns similarities into scores."),
    "index": ("edgeclip.cli.index:index", "Keep the embeddings of a folder's pictures, to search them."),
    "labels": ("edgeclip.cli.labels:labels", "Build and inspect label banks."),
    "models": ("edgeclip.cli.models:models", "List the models edgeclip knows, and download their weights."),
    "pipeline": (
        "edgeclip.cli.pipeline:pipeline",
        "Export, verify, time and judge a model by a recipe.",
    ),
    "reinforce": (
        "edgeclip.cli.reinforce:reinforce",
        "Store what teachers say about every sample of shards.",
    ),
    "search": ("edgeclip.cli.search:search", "Find the pictures of a folder that show something."),
    "sensitivity": (
        "edgeclip.cli.sensitivity:sensitivity",
        "Measure what int8 costs a tower, product by product.",
    ),
    "train": ("edgeclip.cli.train:train", "Train or distil a model from a recipe."),
    "tune": ("edgeclip.cli.tune:tune", "Find the best setting of a bundle on this device."),
    "verify": ("edgeclip.cli.verify:verify", "Check that a bundle gives the right numbers on this host."),
}


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are run, not when help is shown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry[0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(name, _COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {name!r}.{hint} Commands: {', '.join(sorted(_COMMANDS))}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: edgeclip classify photos/ --labels 'cat,dog,car'",
)
@click.version_option(__version__, prog_name="edgeclip")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Zero-shot image classification that fits a small device."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0 done, 1 error or bad input, 2 command-line syntax, 3 inconclusive, 4 gate failed,
    130 interrupted.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    # Pillow warns about damaged metadata of pictures it reads well. Silencing it is up to the process: it is
    # done here and not in the library.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.showwarning = _show_warning
    sys.exit(_run(arguments, debug=debug))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show warnings that are ours as a line for people, others as Python does."""
    if category.__module__.startswith("edgeclip."):
        click.echo(f"warning: {message}", err=True)
        return
    said = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(said)


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        result: Any = cli.main(args=arguments, prog_name="edgeclip", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _interrupted()
    except Exception as error:
        if _is_interrupt(error):
            return _interrupted()
        if isinstance(error, EdgeClipError):
            return _report(error, debug=debug)
        if isinstance(error, OSError):
            return _report(_from_os_error(error), debug=debug)
        raise
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    click.echo("edgeclip: interrupted", err=True)
    return EXIT_INTERRUPTED


def _is_interrupt(error: BaseException) -> bool:
    """Return whether an error is what became of Ctrl-C: modules in C that it hits fail to import."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return found is not None


def _report(error: EdgeClipError, *, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    else:
        message = " ".join(str(error).split())
        click.echo(f"edgeclip: error: {message}", err=True)
    return error.exit_code


def _from_os_error(error: OSError) -> EdgeClipError:
    """Return a one-sentence error for an operating-system failure nobody translated on the way up."""
    what = error.strerror or str(error)
    if error.filename or error.errno not in _NO_ROOM:
        where = f"{error.filename!r}: " if error.filename else ""
        translated = InputError(f"{where}{what}. Check the path, its permissions and free space.")
    else:
        import tempfile

        translated = InputError(
            f"a file cannot be written: {what}. Make room where results go, and where files on the way go: "
            f"{tempfile.gettempdir()!r} (TMPDIR names another place)."
        )
    translated.__cause__ = error
    return translated
