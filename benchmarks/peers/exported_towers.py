"""Exported image towers beside a plain export of open_clip: latency on ONNX Runtime and OpenVINO.

Both sides hold the same weights (random; batch norms, layer scales and biases perturbed). Theirs is what a
careful user does today: open_clip's model, timm's `reparameterize_model`, `torch.onnx.export` with the same
opset, float pictures in, unit embeddings out. Ours is the file of the variant `onnx-fp32` as the exporter
makes it, with `--float-input` (the same input), and with uint8 pictures and the preprocessing inside. Outputs
must agree before anything is timed; then the two run in turns with the same settings of the engine.

    python benchmarks/peers/exported_towers.py
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests" / "tools")]

import numpy as np
import torch
import torchvision_shim  # noqa: F401 - open_clip and timm import torchvision
from folded_towers import perturb
from torch import nn
from written import arguments, ratio, write

import open_clip  # isort: skip
from timm.utils import reparameterize_model  # isort: skip

from edgeclip.export.build import BuildRequest, builder_of
from edgeclip.export.options import OPSET, GraphOptions
from edgeclip.export.passes import apply
from edgeclip.export.passes.sequences import shared
from edgeclip.export.trace import trace_image_tower
from edgeclip.export.variants import VariantSpec
from edgeclip.models.clip import build_clip
from edgeclip.models.naming import key_map
from edgeclip.models.zoo import model_entry
from edgeclip.runtime.latency import compare_interleaved
from edgeclip.runtime.ort import import_onnxruntime
from edgeclip.runtime.ov import import_openvino

# Our name and open_clip's for the same computation.
MODELS = {"MobileCLIP2-S0": "MobileCLIP2-S0", "MobileCLIP-S2": "MobileCLIP-S2"}
ENGINES = ("onnxruntime", "openvino")
MAX_DIFFERENCE = 0.01  # of the spread between pictures: random weights give all of them nearly one embedding

Runner = Callable[[np.ndarray], np.ndarray]


class Theirs(nn.Module):
    """The image tower of an open_clip model, with the L2 norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(image, normalize=True)


@torch.no_grad()
def fresh(name: str) -> nn.Module:
    """Return open_clip's model with weights at which nothing is folded away by chance."""
    torch.manual_seed(0)
    model = open_clip.create_model(MODELS[name]).eval()
    perturb(model)
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        if key.endswith("bias") and not key.endswith("head.fc.bias"):  # which is 0 in every published model
            tensor.normal_(0, 0.02, generator=generator)
    return model


def pictures(size_px: tuple[int, int]) -> np.ndarray:
    """Return four pictures that differ in colour and texture."""
    random = np.random.default_rng(0)
    height, width = size_px
    noise = random.integers(0, 256, (height, width, 3))
    ramp = np.broadcast_to(np.linspace(0, 255, width)[:, None], (height, width, 3))
    checks = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((height // 8, width // 8)))[..., None] * [
        255,
        80,
        0,
    ]
    return np.stack([noise, ramp, checks, np.full_like(noise, 40)]).astype(np.uint8)


def theirs(model: nn.Module, size_px: tuple[int, int]) -> bytes:
    """Export the folded tower as PyTorch's documentation says."""
    tower = Theirs(reparameterize_model(copy.deepcopy(model))).eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower,
            (torch.rand(2, 3, *size_px),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["image_embedding"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 16)},),
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def ours(name: str, model: nn.Module, *, float_input: bool) -> bytes:
    """Return the image tower's file of the variant `onnx-fp32`."""
    config = model_entry(name).config
    own = build_clip(config).eval()
    shapes = {key: value.shape for key, value in own.state_dict().items()}
    own.load_state_dict(key_map(config, "open_clip").to_ours(model.state_dict(), shapes, where=name))
    traced = trace_image_tower(own.image_tower, config, GraphOptions(float_input=float_input))
    graph = apply(traced, shared(), what="image tower")
    with tempfile.TemporaryDirectory() as folder:
        request = BuildRequest(VariantSpec.parse("onnx-fp32"), {"image": graph}, Path(folder))
        tower = builder_of("onnx")(request).towers["image"]
    content = tower.files[tower.model]
    assert isinstance(content, bytes)
    return content


def on_onnxruntime(graph: bytes, threads: int) -> Runner:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image})[0]


def on_openvino(graph: bytes, threads: int) -> Runner:
    openvino = import_openvino()

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()

    def run(image: np.ndarray) -> np.ndarray:
        return next(iter(request.infer({0: image}).values()))

    return run


def compare(name: str, engine: str, seconds: float) -> dict[str, Any]:
    config = model_entry(name).config
    model = fresh(name)
    rival = theirs(model, config.image_size_px)
    pixels = pictures(config.image_size_px)
    mean, std = (np.asarray(each, np.float32) for each in (config.mean, config.std))
    normalized = np.ascontiguousarray(
        ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2), np.float32
    )
    start = on_onnxruntime if engine == "onnxruntime" else on_openvino
    found: dict[str, Any] = {}
    for form, fed in (("float input", normalized), ("uint8 input", pixels)):
        graph = ours(name, model, float_input=form == "float input")
        for threads in (1, 2):
            a, b = start(graph, threads), start(rival, threads)
            got, wanted = a(fed), b(normalized)
            difference = float(np.abs(got - wanted).max() / np.abs(wanted - wanted.mean(axis=0)).max())
            if not difference <= MAX_DIFFERENCE:
                raise SystemExit(f"{name} {engine}: embeddings differ by {difference:.2e} of their spread")
            found[f"{form}, threads {threads}"] = {
                "max_difference_of_spread": difference,
                **ratio(
                    compare_interleaved(
                        lambda a=a, one=fed[:1]: a(one),
                        lambda b=b, one=normalized[:1]: b(one),
                        min_blocks=30,
                        min_duration_s=seconds,
                        max_duration_s=4 * seconds,
                    )
                ),
            }
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "exported_towers.json")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--models", default="MobileCLIP2-S0")
    parser.add_argument("--engines", default=",".join(ENGINES))
    options = parser.parse_args()
    results = {
        f"{name} {engine}": compare(name, engine, options.seconds)
        for name in options.models.split(",")
        for engine in options.engines.split(",")
    }
    write(
        options.output,
        {
            "measures": "latency of our exported image tower (a) over open_clip's, folded by timm and "
            "exported by torch.onnx.export (b); batch 1, float32, theirs with float input throughout",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
