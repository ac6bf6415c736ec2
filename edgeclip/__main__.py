"""``edgeclip`` and ``python -m edgeclip``: the first lines that run, before anything heavy is imported."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit; Ctrl-C while that is being imported ends in silence, with 130.

    Where SIGINT is ignored, as in what a shell script starts in the background, it stays ignored.
    """
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    from edgeclip.cli import main as run

    interrupted: list[bool] = []
    atexit.register(_finish, interrupted)  # before anything else registers, so that it runs behind all
    try:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # before or behind the command
        interrupted.append(True)
        raise SystemExit(_INTERRUPTED) from None
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            interrupted.append(True)
        raise


def _finish(interrupted: list[bool]) -> None:
    """End with 130 after Ctrl-C.

    Python remembers a Ctrl-C that fell into code run from text, as dataclasses are made, and `python -m` ends
    with a signal in place of the code, though the exception was handled.
    """
    if interrupted:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(_INTERRUPTED)


def _leave(number: int, frame: object) -> None:
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
