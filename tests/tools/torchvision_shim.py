"""Make torchvision importable beside a CPU build of torch, for comparisons with it, open_clip and timm.

The wheels of torchvision are built against a CUDA torch; beside the CPU one their own extension does not
load, and two operator schemas that the Python part mentions are missing. Declaring them is enough to import
it: resizing, transforms and models work, and calling ``nms`` raises ``NotImplementedError``, as it should.

``import torchvision_shim`` before the first import of torchvision, open_clip or timm, and only in tests that
compare with one of them: it imports torch.
"""

from __future__ import annotations

import torch

__all__ = ["KEPT"]

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare() -> torch.library.Library | None:
    """Declare the schemas that torchvision's own extension would bring, unless it does."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError):
        return None
    except RuntimeError:  # "operator torchvision::nms does not exist"
        import sys

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS.values():
        library.define(schema)
    return library


KEPT = _declare()  # the operators live as long as this object
