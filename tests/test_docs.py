"""The documentation is executed and its links are followed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("benchmarks/*.md")])
_BLOCK = re.compile(
    r"(?P<mark><!-- not run: [^>]+ -->\n)?```(?P<kind>sh|python)\n(?P<code>.*?)```", re.DOTALL
)
_LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)(#[^)]*)?\)")


def _blocks(kind: str) -> list[str]:
    """Return the README's code blocks of one kind that are not marked `<!-- not run: why -->`."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    return [match["code"] for match in _BLOCK.finditer(text) if match["kind"] == kind and not match["mark"]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two pictures in `photos/`, as the README's examples expect."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("cat.jpg", "dog.jpg"):
        shutil.copy(REPO / "edgeclip/assets/photos" / name, photos)
    (tmp_path / "edgeclip").symlink_to(REPO / "edgeclip")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_readme_run(workplace: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    lines = [line.partition("  #")[0].strip() for block in _blocks("sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("edgeclip ")]
    assert len(commands) >= 8
    for command in commands:
        result = subprocess.run(
            shlex.split(command), env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"


def test_the_python_of_the_readme_runs(workplace: Path) -> None:
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = [match["target"] for match in _LINK.finditer(page.read_text(encoding="utf-8"))]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []
