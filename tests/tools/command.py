"""Run the command line in this process, as ``edgeclip`` does: exit code, stdout, stderr."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from edgeclip.cli import _run


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        self._capsys.readouterr()
        code = _run([str(argument) for argument in arguments], debug=False)
        captured = self._capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)
