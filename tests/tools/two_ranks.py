"""One rank of a two-process comparison: gradients of a contrastive loss with the batch split over ranks.

    python tests/tools/two_ranks.py RANK WORLD STORE LOSS OUT

Every rank builds the same small two-tower model in float64 and the same joint batch, takes its share, and
writes the gradients averaged over ranks (as DistributedDataParallel does) to OUT, with the mean loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeclip.distill import losses
from edgeclip.distill.pairs import Pairs
from edgeclip.distill.token_losses import TokenPairs, hidden_word_loss, token_alignment

BATCH, WIDTH, EMBED = 12, 6, 5


def towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"image": nn.Linear(WIDTH, EMBED), "text": nn.Linear(WIDTH, EMBED)})
    return model.double()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    return {
        "image": torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64),
        "text": torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64),
        "teacher_image": unit(BATCH, EMBED),
        "teacher_text": unit(BATCH, EMBED),
        "second_image": unit(BATCH, 7),
        "second_text": unit(BATCH, 7),
        "patches": torch.randn(BATCH, 4, WIDTH, generator=generator, dtype=torch.float64),
        "words": torch.randn(BATCH, 5, WIDTH, generator=generator, dtype=torch.float64),
        "kept": torch.arange(5) < torch.randint(1, 6, (BATCH, 1), generator=generator),
        # One rank may have hidden no word at all.
        "hidden": torch.arange(BATCH) % 3 + torch.where(torch.arange(BATCH) < BATCH // 2, 0, -3),
        "ids": torch.tensor([0, 1, 2, 0, 4, 5, 6, 1, 8, 9, 10, 11]),
    }


def loss_of(
    name: str, model: nn.ModuleDict, student: Pairs, part: dict[str, Tensor], scale: Tensor
) -> Tensor:
    tokens = {
        key: F.normalize(model[tower](part[key]), dim=-1)
        for key, tower in (("patches", "image"), ("words", "text"))
    }
    shown = part["hidden"] >= 0
    first = Pairs.gather(part["teacher_image"], part["teacher_text"])
    second = Pairs.gather(part["second_image"], part["second_text"])
    table: dict[str, Callable[[], Tensor]] = {
        "info_nce": lambda: losses.info_nce(student, scale),
        "soft_info_nce": lambda: losses.info_nce(student, scale, softness=0.3),
        "similar_info_nce": lambda: losses.info_nce(student, scale, softness=0.3, spread="similar"),
        "token_alignment": lambda: token_alignment(
            TokenPairs.gather(tokens["patches"], tokens["words"], part["kept"], pairs=student), scale
        ),
        "uniformity": lambda: losses.uniformity(student.all_image) + losses.uniformity(student.all_text),
        "hidden_words": lambda: hidden_word_loss(
            student.text[shown], part["hidden"][shown], torch.eye(3, EMBED).double(), torch.zeros(3).double()
        ),
        "decoupled_contrastive": lambda: losses.decoupled_contrastive(student, scale),
        "siglip": lambda: losses.siglip(student, scale, -2.0),
        "affinity_kl": lambda: losses.affinity_kl(
            student, [first, second], scale=scale, teacher_scales=[20.0, 30.0], teacher_weights=[1.0, 2.0]
        ),
        "interactive_contrastive": lambda: losses.interactive_contrastive(student, first, scale),
    }
    return table[name]()


def gradients(name: str, rank: int, world: int, *, ids: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Return this rank's gradients of the parameters and its loss."""
    model, whole = towers(), batch()
    logit_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    share = BATCH // world
    part = {key: value[rank * share : (rank + 1) * share] for key, value in whole.items()}
    student = Pairs.gather(
        F.normalize(model["image"](part["image"]), dim=-1),
        F.normalize(model["text"](part["text"]), dim=-1),
        ids=part["ids"] if ids else None,
    )
    value = loss_of(name, model, student, part, logit_scale.exp())
    value.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    found["logit_scale"] = logit_scale.grad
    return {key: grad for key, grad in found.items() if grad is not None}, value.detach()


NAMES = (
    "info_nce",
    "soft_info_nce",
    "similar_info_nce",
    "token_alignment",
    "uniformity",
    "hidden_words",
    "decoupled_contrastive",
    "siglip",
    "affinity_kl",
    "interactive_contrastive",
)


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    written = {}
    for name in NAMES:
        for ids in (False, True):
            found, value = gradients(name, rank, world, ids=ids)
            found["loss"] = value
            for key, grad in found.items():
                dist.all_reduce(grad)
                written[f"{name}/{ids}/{key}"] = grad / world
    if rank == 0:
        save_file(written, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
