"""Write ``tests/data/keys`` again, as far as the installed open_clip and timm know the names.

The other lists there (Apple's, OpenAI's, Hugging Face's, TinyCLIP's) were written once from the code that
each names as its source. Needs open_clip and timm: ``make install`` brings them.
"""

from __future__ import annotations

import logging

import torch
import torchvision_shim  # noqa: F401
from key_lists import write_keys

import open_clip  # isort: skip
import timm  # isort: skip

OPEN_CLIP = {
    "MobileCLIP-S1": "apple/MobileCLIP-S1-OpenCLIP",
    "MobileCLIP-S2": "apple/MobileCLIP-S2-OpenCLIP",
    "MobileCLIP-B": "apple/MobileCLIP-B-OpenCLIP and apple/MobileCLIP-B-LT-OpenCLIP",
    "MobileCLIP2-S0": "timm/MobileCLIP2-S0-OpenCLIP",
    "MobileCLIP2-S2": "timm/MobileCLIP2-S2-OpenCLIP",
    "MobileCLIP2-B": "timm/MobileCLIP2-B-OpenCLIP",
    "MobileCLIP2-S3": "timm/MobileCLIP2-S3-OpenCLIP",
    "MobileCLIP2-S4": "timm/MobileCLIP2-S4-OpenCLIP",
    "MobileCLIP2-L-14": "timm/MobileCLIP2-L-14-OpenCLIP",
    "ViT-B-32": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K and others",
    "ViT-B-16": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K and others",
    "ViT-L-14": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K and others",
}
# timm's published image towers end in the classifier that open_clip uses as the projection.
TIMM = {
    "fastvit_mci0": 512,
    "fastvit_mci1": 512,
    "fastvit_mci2": 512,
    "fastvit_mci3": 768,
    "fastvit_mci4": 768,
    "vit_base_mci_224": 512,
    "tf_efficientnet_lite0": 1000,
    "tf_efficientnet_lite1": 1000,
    "tf_efficientnet_lite2": 1000,
}


def main() -> None:
    """Write the lists and print where they are."""
    logging.disable(logging.INFO)
    for name, where in OPEN_CLIP.items():
        with torch.device("meta"):
            model = open_clip.create_model(name, load_weights=False, device="meta")
        source = (
            f"state dict of open_clip {open_clip.__version__}'s {name} (timm {timm.__version__}); {where}"
        )
        print(write_keys(f"openclip-{name}", model.state_dict(), source=source))
    for name, width in TIMM.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=width)
        source = f"state dict of timm {timm.__version__}'s {name} with num_classes={width}"
        print(write_keys(f"timm-{name}", model.state_dict(), source=source))


if __name__ == "__main__":
    main()
