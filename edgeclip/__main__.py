"""``edgeclip`` and ``python -m edgeclip``: the first lines that run, before anything heavy is imported."""

from __future__ import annotations

import os
import signal

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

    try:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # before or behind the command
        raise SystemExit(_INTERRUPTED) from None


def _leave(number: int, frame: object) -> None:
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
