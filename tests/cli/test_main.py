from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeclip import __version__
from edgeclip.cli import _COMMANDS, _run
from edgeclip.errors import BackendUnavailableError, MissingExtraError, ParityError


def _edgeclip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeclip", *arguments], capture_output=True, text=True, check=False
    )


def test_help_lists_every_command_and_an_example() -> None:
    result = _edgeclip("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in _COMMANDS)
    assert "Example: edgeclip classify" in result.stdout


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([name, "--help"], debug=False) == 0
    shown = capsys.readouterr().out
    assert f"edgeclip {name}" in shown
    assert "xample" in shown


def test_version() -> None:
    assert _edgeclip("--version").stdout == f"edgeclip, version {__version__}\n"


def test_a_mistyped_command_is_a_syntax_error_with_a_suggestion() -> None:
    result = _edgeclip("clasify", "photo.jpg")
    assert result.returncode == 2
    assert "No such command 'clasify'. Did you mean 'classify'?" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            MissingExtraError("edgeclip train", extra="train", module="torch"),
            1,
            'pip install "edgeclip[train]"',
        ),
        (ParityError("onnx-int8: cosine 0.4, expected at least 0.99"), 4, "cosine 0.4"),
        (PermissionError(13, "Permission denied", "/etc/shadow"), 1, "'/etc/shadow': Permission denied"),
        (OSError(28, "No space left on device"), 1, "No space left on device. Make room where results go"),
        (OSError(27, "File too large", "a.onnx"), 1, "'a.onnx': File too large"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import click

    import edgeclip.cli

    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setitem(edgeclip.cli._COMMANDS, "fails", (f"{__name__}:fails", "Fail."))
    monkeypatch.setattr(sys.modules[__name__], "fails", fails, raising=False)
    assert _run(["fails"], debug=False) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert "Traceback" not in shown.err


ENTRY = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, {handler})
from edgeclip.__main__ import main
sys.argv[1:] = ["cache", "info"]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to oneself there")
@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("edgeclip.cli", 130, ""),
        ("click", 130, ""),
        ("edgeclip.errors", 130, ""),
        ("edgeclip.cli.cache", 130, "edgeclip: interrupted\n"),
        ("edgeclip.cache", 130, "edgeclip: interrupted\n"),
    ],
)
def test_ctrl_c_during_imports_is_no_traceback(module: str, code: int, said: str) -> None:
    script = ENTRY.format(module=module, handler="signal.default_int_handler")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.lstrip()) == (code, "", said)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to oneself there")
def test_a_background_job_goes_on_at_ctrl_c() -> None:
    script = ENTRY.format(module="click", handler="signal.SIG_IGN")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_an_import_that_ctrl_c_broke_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As modules in C report it: KeyboardInterrupt is the cause of an ImportError, and we translate that."""
    import click

    import edgeclip.cli

    @click.command()
    def fails() -> None:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as interrupt:
                raise ImportError("initialization failed") from interrupt
        except ImportError as error:
            raise BackendUnavailableError("onnxruntime does not import") from error

    monkeypatch.setitem(edgeclip.cli._COMMANDS, "fails", (f"{__name__}:fails", "Fail."))
    monkeypatch.setattr(sys.modules[__name__], "fails", fails, raising=False)
    assert _run(["fails"], debug=False) == 130
    assert capsys.readouterr().err == "edgeclip: interrupted\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    import click

    import edgeclip.cli

    @click.command()
    def fails() -> None:
        raise ParityError("different")

    globals()["fails_loudly"] = fails
    edgeclip.cli._COMMANDS["fails-loudly"] = (f"{__name__}:fails_loudly", "Fail.")
    try:
        assert _run(["fails-loudly"], debug=True) == 4
    finally:
        del edgeclip.cli._COMMANDS["fails-loudly"], globals()["fails_loudly"]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals of another kind")
def test_ctrl_c_in_code_run_from_text_ends_with_130_too(tmp_path: Path) -> None:
    """Python itself would end `python -m` with a signal then, though the exception was handled."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, types\n"
        "def main():\n"
        "    try:\n"
        "        exec('os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(10**8): pass')\n"
        "    except KeyboardInterrupt:\n"
        "        print('handled')\n"
        "        sys.exit(130)\n"
        "module = types.ModuleType('edgeclip.cli')\n"
        "module.main = main\n"
        "sys.modules['edgeclip.cli'] = module\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "edgeclip"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "handled\n"), done.stderr
