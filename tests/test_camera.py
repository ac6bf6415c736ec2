"""What the documentation says of a camera is what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

RESULTS = Path("benchmarks", "results", "camera.json")


def test_the_documentation_says_what_was_measured(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(repo / "benchmarks")
    camera = importlib.import_module("camera")
    found = json.loads((repo / RESULTS).read_text(encoding="utf-8"))
    page = camera.DOCS.read_text(encoding="utf-8")
    said = camera.measured(found)
    assert f"{found['frames']['decided']:,} decided" in said
    assert camera.documented(page, said) == page, "python benchmarks/camera.py --docs"
    assert page.partition(camera.MARKS[1])[2].count("Limits:") == 1
