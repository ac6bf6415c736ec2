"""Every attribute of TensorRT that our sources use exists on NVIDIA's own module.

The names are read from the sources, so the test follows them. It needs no GPU.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.runtime.trt import _DTYPES

rtx = pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)

SOURCES = ("trt.py", "trt_build.py", "trt_cache.py", "trt_profile.py")
CLASS_OF = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "timing": "ITimingCache",
    "memory": "IHostMemory",
    "monitor": "IProgressMonitor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_runtime": "Runtime",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "running": "IRuntimeConfig",
    "jit": "IRuntimeCache",
    "_jit": "IRuntimeCache",
}
"""Names that our sources give to TensorRT's objects, and to nothing else they take attributes of."""
OURS = {"raised"}
"""Attributes that we put on a monitor of our own."""


def _used(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (class, attribute) for each use of TensorRT in a source; the class is empty for the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        names = _chain(node)
        if names[0] == "trt" and len(names) > 1:
            yield "", ".".join(names[1:])
        elif len(names) > 1 and names[-2] in CLASS_OF and names[:-2] in ([], ["self"]):
            yield CLASS_OF[names[-2]], names[-1]


def _chain(node: ast.expr) -> list[str]:
    """Return ``["trt", "BuilderFlag", "TF32"]``; starts with an empty name where it is no plain name."""
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def _uses(repo: Path) -> list[tuple[str, str]]:
    found = {use for name in SOURCES for use in _used(repo / "edgeclip/runtime" / name)}
    return sorted(found)


def test_every_attribute_exists_on_the_real_module(repo: Path) -> None:
    uses = _uses(repo)
    assert ("IExecutionContext", "execute_async_v3") in uses
    assert ("IRuntimeCache", "deserialize") in uses
    assert ("", "MemoryPoolType.WORKSPACE") in uses
    assert len(uses) > 45
    missing = []
    for kind, attribute in uses:
        value: Any = rtx if not kind else getattr(rtx, kind)
        for name in attribute.split("."):
            if not hasattr(value, name) and name not in OURS:
                missing.append(f"{kind or 'module'}.{attribute}")
                break
            value = getattr(value, name, None)
    assert missing == []


def test_the_names_of_element_types_are_tensorrts() -> None:
    assert set(_DTYPES) <= set(rtx.DataType.__members__)
    for name, dtype in _DTYPES.items():
        assert np.dtype(rtx.nptype(rtx.DataType.__members__[name])) == np.dtype(dtype)


def test_every_object_of_tensorrt_has_a_name_that_is_looked_at(repo: Path) -> None:
    """What a call on TensorRT's objects returns is kept under a name above, or is a plain value."""
    plain = {"added", "version", "data", "flags", "loud", "aim", "names", "said", "unknown", "made"}
    for source in ("trt.py", "trt_build.py"):
        tree = ast.parse((repo / "edgeclip/runtime" / source).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            names = _chain(node.value.func)
            of_tensorrt = names[0] == "trt" or (len(names) > 1 and names[-2] in CLASS_OF)
            target = node.targets[0]
            if of_tensorrt and isinstance(target, ast.Name):
                assert target.id in CLASS_OF or target.id in plain, f"{source}:{node.lineno}: {target.id}"
