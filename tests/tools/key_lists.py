"""Lists of the tensors that published checkpoints hold, as data: ``tests/data/keys/NAME.json``.

A file says where the facts come from and what each tensor is called, with dtype and shape. Names are a tree;
numbered children that are alike share a line, ``"0-11"``. A leaf reads ``"float32 64,3,7,7"``, a scalar
``"float32"``.

Run ``python tests/tools/write_keys.py`` to write the lists of the installed open_clip and timm again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEYS = Path(__file__).parents[1] / "data/keys"

Tree = dict[str, Any]


def names(prefix: str = "") -> list[str]:
    """Return the names of the lists that begin with ``prefix``."""
    return sorted(path.stem for path in KEYS.glob(f"{prefix}*.json"))


def read_keys(name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every key of a list."""
    leaves = _leaves(json.loads((KEYS / f"{name}.json").read_text("utf-8"))["keys"])
    return {key: _parse(leaf) for key, leaf in sorted(leaves.items())}


def synthetic_state(name: str, *, device: str = "meta", seed: int = 0) -> dict[str, Tensor]:
    """Return tensors of every key of a list: without content on ``"meta"``, else random ones.

    The biases that conversions fill with zeros are zero, whole numbers too.
    """
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for key, (dtype, shape) in read_keys(name).items():
        if device == "meta" or not dtype.is_floating_point:
            state[key] = torch.zeros(shape, dtype=dtype, device=device)
        elif key.endswith(("head.fc.bias", "trunk.head.bias")):
            state[key] = torch.zeros(shape, dtype=dtype)
        elif key.endswith("running_var"):
            state[key] = torch.rand(shape, generator=generator, dtype=torch.float32).add(0.5).to(dtype)
        else:
            # Norms and biases of order 1 and 0.1, maps that keep the size of what passes.
            scale = 0.1 if len(shape) < 2 else (shape[1] * math.prod(shape[2:])) ** -0.5
            value = torch.randn(shape, generator=generator, dtype=torch.float32).mul_(scale)
            state[key] = value.add_(len(shape) == 1 and key.endswith("weight")).to(dtype)
    return state


def write_keys(name: str, state: Mapping[str, Tensor], *, source: str) -> Path:
    """Write a list; ``source`` says what was read, when, and what is not certain."""
    root: Tree = {}
    for key, value in state.items():
        *parents, last = key.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        shape = ",".join(str(size) for size in value.shape)
        node[last] = f"{str(value.dtype).removeprefix('torch.')} {shape}".strip()
    KEYS.mkdir(parents=True, exist_ok=True)
    path = KEYS / f"{name}.json"
    text = json.dumps({"source": source, "keys": _merge(root)}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    expected = {key: (value.dtype, tuple(value.shape)) for key, value in state.items()}
    assert read_keys(name) == dict(sorted(expected.items())), name
    return path


def _merge(node: Any) -> Any:
    """Give consecutive numbers with the same content one line."""
    if not isinstance(node, dict):
        return node
    merged: Tree = {}
    run: list[int] = []
    content: Any = None

    def close() -> None:
        if run:
            merged[str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"] = content

    for key in sorted((key for key in node if key.isdigit()), key=int):
        value = _merge(node[key])
        if not run or value != content or int(key) != run[-1] + 1:
            close()
            run, content = [], value
        run.append(int(key))
    close()
    return merged | {key: _merge(node[key]) for key in sorted(node) if not key.isdigit()}


def _leaves(node: Tree, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in node.items():
        first, _, last = key.partition("-")
        numbers = range(int(first), int(last or first) + 1) if first.isdigit() else [key]
        for name in numbers:
            if isinstance(value, dict):
                found |= _leaves(value, f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = value
    return found


def _parse(leaf: str) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype, _, shape = leaf.partition(" ")
    return getattr(torch, dtype), tuple(int(size) for size in shape.split(",") if size)
