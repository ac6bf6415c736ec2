"""Folded towers beside open_clip's and timm's: nodes of the graph, and latency on ONNX Runtime.

Both sides hold the same weights (random, batch norms and layer scales perturbed), are folded by their own
means (ours: `reparameterize`; theirs: timm's `reparameterize_model` where it knows the model), traced by the
same exporter with the same opset as bare towers (float pictures or token ids in, features out), and run in
turns on the same threads. Outputs must agree before anything is timed.

    python benchmarks/peers/folded_towers.py
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests" / "tools")]

import numpy as np
import torch
import torchvision_shim  # noqa: F401 - open_clip and timm import torchvision
from torch import nn
from written import arguments, ratio, write

import open_clip  # isort: skip
from timm.utils import reparameterize_model  # isort: skip

from edgeclip.export.trace import to_bytes, trace_module
from edgeclip.models.clip import build_clip
from edgeclip.models.naming import key_map
from edgeclip.models.reparam import reparameterize
from edgeclip.models.zoo import model_entry
from edgeclip.runtime.latency import compare_interleaved
from edgeclip.runtime.ort import import_onnxruntime

# Our name, open_clip's for the same computation, and the towers that are compared.
MODELS = {
    "MobileCLIP2-S0": ("MobileCLIP2-S0", ("image", "text")),
    "MobileCLIP-S2": ("MobileCLIP-S2", ("image",)),
    "MobileCLIP2-B": ("MobileCLIP2-B", ("image",)),
    "ViT-B-32.laion2b_s34b_b79k": ("ViT-B-32", ("image", "text")),
}
MAX_DIFFERENCE = 2e-3  # of the largest feature, in float32: random weights lose digits


class Theirs(nn.Module):
    """One tower of an open_clip model, without the L2 norm."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(x) if self.tower == "image" else self.model.encode_text(x)


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> None:
    """Make fresh weights behave like trained ones: no statistic at its initial value, no scale near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1, generator=generator)
        elif "layer_scale" in name:
            tensor.uniform_(0.1, 0.5, generator=generator)


def session(model: Any, threads: int) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(to_bytes(model), options, providers=["CPUExecutionProvider"])


def compare(name: str, tower: str, seconds: float) -> dict[str, Any]:
    theirs = open_clip.create_model(MODELS[name][0]).eval()
    perturb(theirs)
    entry = model_entry(name)
    ours = build_clip(entry.config).eval()
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    ours.load_state_dict(key_map(entry.config, "open_clip").to_ours(theirs.state_dict(), shapes, where=name))
    height, width = entry.config.image_size_px
    if tower == "image":
        example = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
        folded = reparameterize(ours.image_tower)
    else:
        example = open_clip.tokenize(["a photo of a cat", "two dogs"]).to(torch.int32)
        folded = reparameterize(ours.text_tower)
    rival = Theirs(reparameterize_model(copy.deepcopy(theirs)), tower).eval()
    graphs = {
        "ours": trace_module(folded, example, input_name="x", output_name="y"),
        "theirs": trace_module(rival, example, input_name="x", output_name="y"),
    }
    found: dict[str, Any] = {
        "nodes": {side: len(graph.graph.node) for side, graph in graphs.items()},
        "operators": {
            side: dict(Counter(node.op_type for node in graph.graph.node).most_common())
            for side, graph in graphs.items()
        },
    }
    one = example[:1].numpy()
    for threads in (1, 2):
        running = {side: session(graph, threads) for side, graph in graphs.items()}
        outputs = {side: runner.run(None, {"x": one})[0] for side, runner in running.items()}
        difference = float(
            np.abs(outputs["ours"] - outputs["theirs"]).max() / np.abs(outputs["theirs"]).max()
        )
        if difference > MAX_DIFFERENCE:
            raise SystemExit(f"{name} {tower}: outputs differ by {difference:.2e} of the largest feature")
        found["max_relative_difference"] = difference
        found[f"threads {threads}"] = ratio(
            compare_interleaved(
                lambda running=running: running["ours"].run(None, {"x": one}),
                lambda running=running: running["theirs"].run(None, {"x": one}),
                min_blocks=30,
                min_duration_s=seconds,
                max_duration_s=4 * seconds,
            )
        )
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "folded_towers.json")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    results = {
        f"{name} {tower}": compare(name, tower, options.seconds)
        for name in options.models.split(",")
        for tower in MODELS[name][1]
    }
    write(
        options.output,
        {
            "measures": "latency of our folded tower (a) over open_clip's, folded by timm where it can (b); "
            "bare ONNX graphs, batch 1, float32",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
