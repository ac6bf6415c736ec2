"""Make ``import torchvision`` work where its wheel was built for another torch (CUDA wheel beside CPU torch).

Import this module before torchvision, open_clip or timm. Only what needs torchvision's compiled operators
(``nms`` and its kind) stays unusable; transforms and models work.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _own_operators_load() -> bool:
    """Return whether torchvision's own compiled operators load beside this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    library = next(Path(spec.origin).parent.glob("_C*"), None)
    if library is None:
        return False
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


# Operators live as long as this object. Without them torchvision fails while it registers their shapes.
operators: torch.library.Library | None = None
if not _own_operators_load():
    operators = torch.library.Library("torchvision", "FRAGMENT")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
