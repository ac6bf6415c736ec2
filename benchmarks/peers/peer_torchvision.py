"""Let torchvision import beside a build of torch that its extension was not compiled for.

`tests/tools/torchvision_shim.py` does the same and first tries without, which imports torchvision twice: a
process that is timed from its start must not pay for that. So ``workers.py`` finds out once whether it is
needed, and says so in the environment.
"""

from __future__ import annotations

import os

import torch

KEPT = torch.library.Library("torchvision", "FRAGMENT") if os.environ.get("TORCHVISION_SCHEMAS") else None
if KEPT is not None:
    KEPT.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
