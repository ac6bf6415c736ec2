"""Train a recipe under torchrun, where the embeddings of one rank become NaN in one step.

    python -m torch.distributed.run --nproc-per-node 2 tests/tools/poisoned_rank.py RECIPE OUT RANK STEP

Every rank writes its final weights to ``OUT/rank-<n>.safetensors``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgeclip.distill import trainer
from edgeclip.distill.recipe import load_recipe
from edgeclip.distill.stage import Stage


def main() -> None:
    torch.set_num_threads(1)
    path, out, rank, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    me = os.environ["RANK"]
    honest = Stage._backward

    def poisoned(self: Stage, *arguments: Any, **options: Any) -> Any:
        said = honest(self, *arguments, **options)
        nonlocal calls
        calls += 1
        if me == rank and calls == step:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
            for name, buffer in self._model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.fill_(float("inf"))
        return said

    calls, kept = 0, []
    Stage._backward = poisoned  # type: ignore[method-assign]
    begin = Stage.__init__

    def remembered(self: Stage, *arguments: Any) -> None:
        begin(self, *arguments)
        kept.append(self)

    Stage.__init__ = remembered  # type: ignore[method-assign]
    trainer.train(load_recipe(path), trainer.TrainOptions(out, path.parent))
    save_file(dict(kept[-1]._model.state_dict()), out / f"rank-{me}.safetensors")


if __name__ == "__main__":
    main()
