"""Samples a second of our trainer over those of open_clip's, in turns.

Each side is its own trainer in a process of its own: `edgeclip.distill.trainer.train` on a recipe, and
`open_clip_train.train.train_one_epoch` with open_clip's data pipeline, loss and optimizer groups as its
`main` builds them. Both have the same towers (the number of parameters must agree), batch, precision
(float32), threads, clipping, the same shards, the same random crop and the same number of loader workers.
Ours logs every step, theirs every 100 as is their default.

A side waits inside its own loop, after it has fetched its batch, until it is told to go on; what is timed is
from there to the same place some steps later: forward, backward, update, logging, the next batch. States and
validation are not timed on either side.

    python benchmarks/peers/train_throughput.py
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "tools")]

import torch

SAMPLES, SHARDS, SOURCE_PX = 512, 4, 256
# Of both towers: width and layers (heads have 64 channels); then the side of the picture and of a patch, the
# batch, and how many steps are timed as one.
MODELS = {
    "ViT 192x6, 224 px, batch 32": (192, 6, 224, 16, 32, 1),
    "ViT 128x4, 64 px, batch 64": (128, 4, 64, 16, 64, 4),
    "smoke": (64, 1, 32, 16, 8, 1),  # only to see that this runs
}
CONTEXT, VOCAB = 77, 49408
RATE, WEIGHT_DECAY = 1e-4, 0.2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_data(folder: Path) -> None:
    """Write shards of JPEG pictures with their captions."""
    from PIL import Image

    from edgeclip.shapes import captions, ordered_combinations, render

    drawn = list(itertools.islice(ordered_combinations(False, 0), SAMPLES))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, SAMPLES, SHARDS):
                picture = io.BytesIO()
                Image.fromarray(render(drawn[number], number, size_px=SOURCE_PX)).save(picture, "JPEG")
                text = captions(drawn[number], "en", number)[0].encode()
                for extension, content in (("jpg", picture.getvalue()), ("txt", text)):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def waiting() -> Callable[[], None]:
    """Return what a side calls at the same place of every step: it says so, and waits to be told to go on."""
    told, say = sys.stdin.fileno(), os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    left = 0

    def wait() -> None:
        nonlocal left
        if left == 0:
            os.write(say, b".")
            left = os.read(told, 1)[0]
        left -= 1

    return wait


def run_ours(name: str, folder: Path, workers: int) -> None:
    from edgeclip.distill.recipe import parse_recipe
    from edgeclip.distill.trainer import TrainOptions, train

    width, layers, side, patch, batch, _ = MODELS[name]
    heads, hidden = [width // 64] * layers, [4 * width] * layers
    shared = f"width = {width}\nheads = {heads}\nhidden_dims = {hidden}\nembed_dim = {width}\n"
    recipe = parse_recipe(
        f"""
schema = 1
kind = "train"
name = "ours"
checkpoint_every = 1_000_000_000
[student.config]
image_size_px = [{side}, {side}]
interpolation = "bicubic"
mean = {list(MEAN)}
std = {list(STD)}
[student.config.image]
kind = "vit"
patch_px = {patch}
grid = [{side // patch}, {side // patch}]
{shared}
[student.config.text]
kind = "transformer"
vocab_size = {VOCAB}
context_length = {CONTEXT}
{shared}
[data.train]
paths = ["."]
crop_scale = [0.9, 1.0]
[[stage]]
name = "contrastive"
data = "train"
samples = 1_000_000_000
batch_size = {batch}
optimizer = {{ learning_rate = {RATE}, weight_decay = {WEIGHT_DECAY}, betas = [0.9, 0.98], eps = 1e-6 }}
schedule = {{ kind = "constant" }}
[[stage.loss]]
kind = "info-nce"
""".encode()
    )
    wait = waiting()

    def stop() -> bool:
        wait()
        return False

    train(recipe, TrainOptions(folder / f"run-{os.getpid()}", folder, workers=workers), stop=stop)


def run_theirs(name: str, folder: Path, workers: int) -> None:
    import torchvision_shim  # noqa: F401 - open_clip imports torchvision

    import open_clip  # isort: skip

    if importlib.util.find_spec("pandas") is None:  # their data module reads tables with it; shards need none
        stub = sys.modules["pandas"] = ModuleType("pandas")
        stub.__spec__ = ModuleSpec("pandas", None)
    from open_clip_train import data as their_data
    from open_clip_train.train import train_one_epoch

    # Newer versions of webdataset mark the end of a shard, which their reader does not know.
    their_data.tar_file_expander = partial(their_data.tar_file_expander, eof_value=None)

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    width, layers, side, patch, batch, _ = MODELS[name]
    vision = open_clip.CLIPVisionCfg(
        layers=layers, width=width, head_width=64, patch_size=patch, image_size=side
    )
    text = open_clip.CLIPTextCfg(
        context_length=CONTEXT, vocab_size=VOCAB, width=width, heads=width // 64, layers=layers
    )
    model = open_clip.CLIP(width, vision, text, output_dict=True)
    preprocess = open_clip.image_transform(side, is_train=True, mean=MEAN, std=STD)
    args = argparse.Namespace(
        accum_freq=1,
        batch_size=batch,
        dataset_resampled=False,
        device="cpu",
        distill=False,
        grad_clip_norm=1.0,
        horovod=False,
        log_every_n_steps=100,
        precision="fp32",
        rank=0,
        seed=0,
        skip_scheduler=False,
        train_data=f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar",
        train_data_upsampling_factors=None,
        train_num_samples=10_000_000,
        wandb=False,
        workers=workers,
        world_size=1,
    )
    data = {
        "train": their_data.get_wds_dataset(
            args, preprocess, is_train=True, tokenizer=open_clip.SimpleTokenizer()
        )
    }

    def plain(key: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim < 2 or any(part in key for part in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for key, p in named if plain(key, p)], "weight_decay": 0.0},
            {"params": [p for key, p in named if not plain(key, p)], "weight_decay": WEIGHT_DECAY},
        ],
        lr=RATE,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    wait = waiting()
    # Called in every step, when the batch has been fetched.
    train_one_epoch(
        model,
        data,
        open_clip.ClipLoss(cache_labels=True),
        0,
        optimizer,
        None,
        lambda step: wait(),
        None,
        args,
    )


def parameters(name: str) -> dict[str, int]:
    """Return the parameters of each side, so that the same towers are compared."""
    import torchvision_shim  # noqa: F401 - open_clip imports torchvision

    import open_clip  # isort: skip

    from edgeclip.models.clip import build_clip
    from edgeclip.models.config import CLIPConfig, TextTransformerConfig, ViTConfig

    width, layers, side, patch, _, _ = MODELS[name]
    shared = {"width": width, "heads": (width // 64,) * layers, "hidden_dims": (4 * width,) * layers}
    grid = (side // patch, side // patch)
    ours = build_clip(
        CLIPConfig(
            name="ours",
            image_size_px=(side, side),
            image=ViTConfig(**shared, patch_px=patch, grid=grid, embed_dim=width),
            text=TextTransformerConfig(**shared, vocab_size=VOCAB, context_length=CONTEXT, embed_dim=width),
        )
    )
    theirs = open_clip.CLIP(
        width,
        open_clip.CLIPVisionCfg(layers=layers, width=width, head_width=64, patch_size=patch, image_size=side),
        open_clip.CLIPTextCfg(
            context_length=CONTEXT, vocab_size=VOCAB, width=width, heads=width // 64, layers=layers
        ),
    )
    return {
        "ours": sum(p.numel() for p in ours.parameters()),
        "theirs": sum(p.numel() for p in theirs.parameters()),
    }


class Side:
    """A trainer in a process of its own that does some steps when told to."""

    def __init__(self, side: str, name: str, folder: Path, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--side", side, "--models", name, "--data", str(folder)]
        self._process = subprocess.Popen(
            [*command, "--workers", str(options.workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
        self._steps = bytes([MODELS[name][5]])
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.read(1) != b".":
            raise SystemExit(f"{self._process.args} ended; say --verbose to see why")

    def steps(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(self._steps)
        self._wait()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from written import ratio

    from edgeclip.runtime.latency import compare_interleaved

    counted = parameters(name)
    if counted["ours"] != counted["theirs"]:
        raise SystemExit(f"{name}: the sides differ in parameters: {counted}")
    sides = [Side(side, name, folder, options) for side in ("theirs", "ours")]
    theirs, ours = sides
    try:
        found = compare_interleaved(
            theirs.steps,
            ours.steps,
            min_blocks=options.blocks,
            min_duration_s=options.seconds,
            max_duration_s=options.seconds,
            warmup=4,
        )
    finally:
        for side in sides:
            side.end()
    steps, batch = MODELS[name][5], MODELS[name][4]
    rates = {
        side: round(steps * batch * 1e3 / taken.median_ms, 2)
        for side, taken in (("theirs", found.a), ("ours", found.b))
    }
    return {
        "parameters": counted["ours"],
        "steps_a_sample": steps,
        "samples_per_s": rates,
        "ours_over_theirs": ratio(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=";".join(name for name in MODELS if name != "smoke"))
    parser.add_argument("--seconds", type=float, default=130.0, help="for each model")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "train_throughput.json"
    )
    options = parser.parse_args()
    if options.side:
        run = run_ours if options.side == "ours" else run_theirs
        run(options.models, options.data, options.workers)
        return
    from written import write

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        results = {name: compare(name, Path(folder), options) for name in options.models.split(";")}
    write(
        options.output,
        {
            "measures": "samples a second of our trainer over open_clip's: time of theirs (a) over time of "
            "ours (b); float32, the same towers, shards, crops, batch and threads",
            "threads": options.threads,
            "workers": options.workers,
            "bar": "low >= 0.97",
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
