"""How far our towers are from open_clip's with the same weights: every published architecture, in float64.

For each model open_clip's own is built with random weights, its batch norms and layer scales are perturbed,
and its state dict is read by ours. Compared are the features of both towers before the L2 norm, for batches
of 1 and 3, as the largest difference over the largest feature; then our folded towers with our unfolded ones.
Unit embeddings in float32 would hide errors: random weights send every picture to nearly the same point.

    python benchmarks/peers/parity.py                      # all; 20 GB of memory for the largest
    python benchmarks/peers/parity.py --models ViT-B-32.openai
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests" / "tools")]

import torch
import torchvision_shim  # noqa: F401 - open_clip and timm import torchvision
from folded_towers import perturb
from written import arguments, write

import open_clip  # isort: skip

from edgeclip.models.foreign import from_state
from edgeclip.models.naming import key_map
from edgeclip.models.reparam import reparameterize

# Our name, and open_clip's for the same architecture.
MODELS = {
    "MobileCLIP-S1": "MobileCLIP-S1",
    "MobileCLIP-S2": "MobileCLIP-S2",
    "MobileCLIP-B": "MobileCLIP-B",
    "MobileCLIP2-S0": "MobileCLIP2-S0",
    "MobileCLIP2-S2": "MobileCLIP2-S2",
    "MobileCLIP2-B": "MobileCLIP2-B",
    "MobileCLIP2-S3": "MobileCLIP2-S3",
    "MobileCLIP2-S4": "MobileCLIP2-S4",
    "MobileCLIP2-L-14": "MobileCLIP2-L-14",
    "ViT-B-32.openai": "ViT-B-32-quickgelu",
    "ViT-B-16.openai": "ViT-B-16-quickgelu",
    "ViT-L-14.openai": "ViT-L-14-quickgelu",
}
LIMIT = 1e-9


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def compare(name: str) -> dict[str, Any]:
    started = time.perf_counter()
    theirs = open_clip.create_model(MODELS[name]).eval()
    perturb(theirs)
    theirs = theirs.double()
    # As a file of open_clip's would be read: its source decides the epsilon of MobileCLIP-B's norms.
    listed = {key: value.to("meta") for key, value in theirs.state_dict().items()}
    found_by_names = from_state(listed, model=name, where=name)
    config, ours = found_by_names.config, found_by_names.model
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    state = key_map(config, "open_clip").to_ours(theirs.state_dict(), shapes, where=name)
    ours.load_state_dict(state, assign=True)
    ours.eval()
    generator = torch.Generator().manual_seed(0)
    height, width = config.image_size_px
    images = torch.rand(3, 3, height, width, generator=generator, dtype=torch.float64)
    tokens = open_clip.tokenize(["a cat", "two dogs on a red sofa", "the sea at night, seen from a tower"])
    found: dict[str, Any] = {"relative_difference": {}, "folded_relative_difference": {}}
    for batch in (1, 3):
        for tower, mine, other in (
            ("image", ours.encode_image(images[:batch]), theirs.encode_image(images[:batch])),
            ("text", ours.encode_text(tokens[:batch]), theirs.encode_text(tokens[:batch])),
        ):
            found["relative_difference"][f"{tower}, batch {batch}"] = relative(mine, other)
    plain = {"image": ours.encode_image(images), "text": ours.encode_text(tokens)}
    del theirs
    folded = reparameterize(ours)
    found["folded_relative_difference"] = {
        "image": relative(folded.encode_image(images), plain["image"]),
        "text": relative(folded.encode_text(tokens), plain["text"]),
    }
    found["parameters"] = {
        "image": sum(parameter.numel() for parameter in ours.image_tower.parameters()),
        "text": sum(parameter.numel() for parameter in ours.text_tower.parameters()),
    }
    found["seconds"] = round(time.perf_counter() - started, 1)
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "parity.json")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--one", help="compare one model in this process and print its result")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compare(options.one)))
        return
    results: dict[str, Any] = {}
    for name in options.models.split(","):
        # A process each: the next model finds the memory of the last one free.
        run = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise SystemExit(f"{name}: {run.stderr[-2000:]}")
        results[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, results[name], file=sys.stderr)
    worst = max(
        value
        for result in results.values()
        for part in ("relative_difference", "folded_relative_difference")
        for value in result[part].values()
    )
    write(
        options.output,
        {
            "measures": "largest difference over largest feature, unnormalised features, float64, "
            "random weights with perturbed batch norms and layer scales: ours against open_clip, "
            "folded against ours",
            "limit": LIMIT,
            "worst": worst,
            "passed": worst <= LIMIT,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
