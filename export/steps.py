"""What an export is doing, told and timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from .options import Step

__all__ = ["OnStep", "Steps"]

OnStep = Callable[[Step], None]


class Steps:
    """The steps of an export, one after the other.

    Args:
        tell: told each step when it begins and when it ends.

    Attributes:
        done: those that ended, with their times.
    """

    def __init__(self, tell: OnStep) -> None:
        self._tell = tell
        self.done: list[Step] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Tell and time what is done inside."""
        self._tell(Step(name))
        began = time.perf_counter()
        yield
        self.done.append(Step(name, round(time.perf_counter() - began, 3)))
        self._tell(self.done[-1])

    def note(self, name: str) -> None:
        """Tell a part of a step."""
        self._tell(Step(name))
