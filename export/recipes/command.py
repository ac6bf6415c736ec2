"""What the commands that build our own models share: options, progress, being stopped, placing the bundle."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BundleError, EdgeClipError

__all__ = ["INTERRUPTED", "asked_to_stop", "check_out", "count", "parser_of", "put_bundle", "run_build"]

INTERRUPTED = 130
"""Exit code of a build that was asked to stop; the same command goes on."""


def parser_of(module: str, said: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every build takes.

    Args:
        module: that is run.
        said: its docstring.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=said, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--materials", type=Path, help="where `edgeclip data fetch -o` put its sets [default: the cache]"
    )
    parser.add_argument("--work", type=Path, required=True, help="keeps what each stage makes")
    parser.add_argument("-o", "--output", type=Path, required=True, help="bundle to write, or to replace")
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the training recipe, as `edgeclip train --set` does",
    )
    parser.add_argument("--threads", type=count, default=1, help="of every engine [default: %(default)s]")
    return parser


def count(said: str) -> int:
    """Return a whole number from 1 that an option was given.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not said.isdecimal() or int(said) < 1:
        raise argparse.ArgumentTypeError(f"got {said!r}, expected a whole number, 1 or more.")
    return int(said)


def run_build(log: logging.Logger, build: Callable[[], object]) -> int:
    """Run a build with its progress on the error stream; return the exit code.

    Args:
        log: of the build.
        build: the whole of it; it raises ``KeyboardInterrupt`` where it was asked to stop.
    """
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s", stream=sys.stderr)
    for name in (log.name, "edgeclip"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        build()
    except EdgeClipError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on")
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C and SIGTERM put something into, so that training can finish its step."""
    asked: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in kinds}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_out(out: Path) -> None:
    """Raise before anything is done where the bundle could not be put.

    Raises:
        BundleError: something is there that is no bundle.
    """
    if out.exists() and not (out / "manifest.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise BundleError(
            f"{str(out)!r} is there and no bundle; name another place, or a bundle to be replaced."
        )


def put_bundle(bundle: Bundle, out: Path) -> Bundle:
    """Copy a bundle to its place, byte by byte, and return the copy.

    Raises:
        BundleError: it cannot be written.
    """
    for _ in range(2):  # the second time takes away what only the bundle before used
        with BundleWriter(out, manifest={}) as writer:
            for name in bundle.manifest.files:
                writer.add(name, bundle.file(name), exact=True)
            copy = writer.commit_copy(bundle.manifest_bytes)
    return copy
