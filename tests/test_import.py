from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import edgeclip

HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "numpy",
    "PIL",
    "openvino",
    "tensorrt",
    "click",
    "rich",
    "regex",
    "ftfy",
    "msgspec",
}


def _modules_after(code: str) -> set[str]:
    """Return the top-level modules that running `code` adds to a fresh interpreter."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(' '.join(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_import_edgeclip_loads_only_the_standard_library() -> None:
    loaded = _modules_after("import edgeclip")
    assert loaded <= {"edgeclip", *sys.stdlib_module_names}


def test_help_loads_click_only() -> None:
    loaded = _modules_after(
        "import sys, io, contextlib\n"
        "from edgeclip.cli import _run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    _run(['--help'], debug=False)\n"
    )
    third_party = {name for name in loaded - sys.stdlib_module_names if not name.startswith("_")}
    assert third_party == {"edgeclip", "click"}


@pytest.mark.parametrize("name", edgeclip.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(edgeclip, name) is not None


def test_all_is_sorted_and_lists_the_errors() -> None:
    errors = importlib.import_module("edgeclip.errors")
    assert edgeclip.__all__ == sorted(edgeclip.__all__)
    assert set(errors.__all__) <= set(edgeclip.__all__)
    assert errors.__all__ == sorted(errors.__all__)


def test_an_unknown_attribute_is_named() -> None:
    with pytest.raises(AttributeError, match="'edgeclip' has no attribute 'classifer'"):
        _ = edgeclip.classifer
