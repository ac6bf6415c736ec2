"""Memory and time of a training step with blocks recomputed in the backward pass, at MobileCLIP2-S0's size.

Memory is the highest resident size of a process that does one step, less what it had with the model and the
batch in place; each form runs in a process of its own. Time is taken in turns in one process.

    python benchmarks/recompute_memory.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = "MobileCLIP2-S0"


def stepper(batch: int) -> Callable[[bool], None]:
    """Return what does forward, loss and backward on one batch."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from edgeclip.distill.losses import info_nce
    from edgeclip.distill.pairs import Pairs
    from edgeclip.distill.recompute import recomputed_blocks
    from edgeclip.models.clip import build_clip
    from edgeclip.models.zoo import clip_config

    torch.manual_seed(0)
    config = clip_config(MODEL)
    model = build_clip(config).train()
    image = torch.randn(batch, 3, *config.image_size_px)
    tokens = torch.randint(1, 49_000, (batch, config.text.context_length))

    def step(recompute: bool) -> None:
        model.zero_grad(set_to_none=False)
        with recomputed_blocks(model) if recompute else nullcontext():
            first, second, scale = model(image, tokens)
        info_nce(Pairs.gather(F.normalize(first, dim=-1), F.normalize(second, dim=-1)), scale).backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return step


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--form", choices=("kept", "recomputed"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "recompute_memory.json"
    )
    options = parser.parse_args()
    step = stepper(options.batch)
    if options.form:
        before = peak_bytes()
        step(options.form == "recomputed")
        print(json.dumps({"before_bytes": before, "step_bytes": peak_bytes() - before}))
        return
    memory: dict[str, Any] = {}
    for form in ("kept", "recomputed"):
        command = [sys.executable, __file__, "--batch", str(options.batch), "--form", form]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        memory[form] = json.loads(said.splitlines()[-1])
    from written import ratio, write

    from edgeclip.runtime.latency import compare_interleaved

    found = compare_interleaved(
        lambda: step(True),
        lambda: step(False),
        min_blocks=options.blocks,
        min_duration_s=options.seconds,
        max_duration_s=2 * options.seconds,
        warmup=1,
    )
    write(
        options.output,
        {
            "measures": "a training step with checkpoint_activations (a) beside one without (b), float32",
            "model": MODEL,
            "batch": options.batch,
            "memory": memory,
            "memory_share": round(memory["recomputed"]["step_bytes"] / memory["kept"]["step_bytes"], 3),
            "step_time": ratio(found),
        },
    )


if __name__ == "__main__":
    main()
