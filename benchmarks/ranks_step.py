"""One step of two gloo ranks: our single all-reduce beside DistributedDataParallel, in turns.

Both do forward, InfoNCE over the joint batch, backward, averaged gradients and AdamW on the same CLIP of 20 M
parameters. Ours (`Ranks.average_`) sums gradients, batch norm statistics, loss and stop flag in one
all-reduce after the backward pass; DistributedDataParallel sums buckets of gradients while it goes on, and
sends the batch norm statistics of the first rank to the others in every step. Their gradients must agree.

    python benchmarks/ranks_step.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812
from torch import Tensor, nn  # noqa: E402

from edgeclip.distill.losses import info_nce  # noqa: E402
from edgeclip.distill.pairs import Pairs  # noqa: E402
from edgeclip.distill.ranks import Ranks, ranks  # noqa: E402
from edgeclip.models.clip import CLIP, build_clip  # noqa: E402
from edgeclip.models.config import CLIPConfig, FastViTConfig, TextTransformerConfig  # noqa: E402

SIDE_PX, CONTEXT, VOCAB = 128, 32, 32_000
CONFIG = CLIPConfig(
    name="about-20m",
    image_size_px=(SIDE_PX, SIDE_PX),
    image=FastViTConfig(
        dims=(48, 96, 192, 384),
        depths=(2, 4, 6, 2),
        mixers=("repmixer", "repmixer", "repmixer", "attention"),
        embed_dim=256,
    ),
    text=TextTransformerConfig(
        vocab_size=VOCAB,
        context_length=CONTEXT,
        width=256,
        heads=(4,) * 8,
        hidden_dims=(1024,) * 8,
        embed_dim=256,
    ),
)


class Side:
    """A model with its optimizer, and what averages over the ranks."""

    def __init__(self, here: Ranks, batch: int, *, wrapped: bool) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = build_clip(CONFIG).train()
        self.parameters = list(self.model.parameters())
        if wrapped:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.here, self.wrapped = here, wrapped
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        generator = torch.Generator().manual_seed(here.rank)
        self.image = torch.randn(batch, 3, SIDE_PX, SIDE_PX, generator=generator)
        self.tokens = torch.randint(1, VOCAB - 1, (batch, CONTEXT), generator=generator)

    def step(self) -> None:
        """Do one step with an update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        if not self.wrapped:
            assert isinstance(self.model, CLIP)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            statistics = [b for b in self.model.buffers() if b.is_floating_point()]
            values = torch.stack([loss.detach(), loss.new_zeros(())])
            self.here.average_([values, *gradients, *statistics])
        else:  # what a trainer wants to know of all ranks, as ours does
            values = torch.stack([loss.detach(), loss.new_zeros(())])
            dist.all_reduce(values)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def loss(self) -> Tensor:
        """Return this rank's share of the loss of the joint batch."""
        image, text, scale = self.model(self.image, self.tokens)
        return info_nce(Pairs.gather(F.normalize(image, dim=-1), F.normalize(text, dim=-1)), scale)


def difference(sides: dict[str, Side]) -> float:
    """Return the largest difference of averaged gradients, of the largest gradient."""
    for side in sides.values():
        side.optimizer.zero_grad(set_to_none=True)
        side.loss().backward()
        if not side.wrapped:
            side.here.average_([p.grad for p in side.parameters if p.grad is not None])
    ours, theirs = (sides[name].parameters for name in ("ours", "ddp"))
    largest = max(float(p.grad.abs().max()) for p in theirs if p.grad is not None)
    apart = max(
        float((a.grad - b.grad).abs().max())
        for a, b in zip(ours, theirs, strict=True)
        if a.grad is not None and b.grad is not None
    )
    return apart / largest


def measure(here: Ranks, options: argparse.Namespace) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    sides = {"ours": Side(here, options.batch, wrapped=False), "ddp": Side(here, options.batch, wrapped=True)}
    apart = difference(sides)
    names = list(sides)
    if not here.is_first:  # do what the first rank says: 0 or 1 which side, 2 the end
        while True:
            which = torch.zeros(1)
            dist.broadcast(which, 0)
            if which == 2:
                return None
            sides[names[int(which)]].step()

    def asked(number: int) -> Callable[[], None]:
        def step() -> None:
            dist.broadcast(torch.full((1,), float(number)), 0)
            sides[names[number]].step()

        return step

    from written import ratio

    from edgeclip.runtime.latency import compare_interleaved

    found = compare_interleaved(
        asked(0),
        asked(1),
        min_blocks=options.blocks,
        min_duration_s=options.seconds,
        max_duration_s=2 * options.seconds,
    )
    dist.broadcast(torch.full((1,), 2.0), 0)
    return {
        "parameters": sum(p.numel() for p in sides["ours"].parameters),
        "batch": 2 * options.batch,
        "gradients_differ_by": apart,
        "ours_over_ddp": ratio(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="of a rank")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ranks_step.json")
    options = parser.parse_args()
    if "RANK" in os.environ:
        with ranks("cpu") as here:
            found = measure(here, options)
        if found is not None:
            print(json.dumps(found))
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = subprocess.run(
        [*launcher, __file__, *sys.argv[1:]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    from written import write

    write(
        options.output,
        {
            "measures": "time of a step of two ranks (gloo, one thread each): averages by our one all-reduce "
            "(a) over DistributedDataParallel's (b)",
            "results": json.loads(said.stdout.splitlines()[-1]),
        },
    )


if __name__ == "__main__":
    main()
