"""The processes that train together: who this one is, and the averages they agree on.

``torchrun`` says so in the environment; without it there is one. Gradients are averaged here, in one piece,
and not by DistributedDataParallel: one sum carries the gradients, the statistics of batch norms, the losses
and whether somebody was asked to stop. So all ranks decide alike, also where gradients are accumulated in
parts or parameters are frozen.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from edgeclip.errors import ConfigError

__all__ = ["Ranks", "place_of_process", "ranks"]

_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_TIMEOUT = timedelta(hours=2)  # the first rank may validate for long
_MEETING = timedelta(minutes=10)  # a rank that failed before it is not heard of


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        world: how many.
        rank: which one this is.
        device: where this one computes.
    """

    world: int
    rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and says things."""
        return self.rank == 0

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating tensors by their mean over all ranks, in place."""
        if self.world == 1 or not tensors:
            return
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        at = 0
        for tensor in tensors:
            tensor.detach().copy_(flat[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()

    def check_same(self, what: str, value: bytes) -> None:
        """Raise on every rank where one of them has another value.

        Args:
            what: the value, as the message names it.
            value: anything that must agree.

        Raises:
            ConfigError: they disagree.
        """
        if self.world == 1:
            return
        own = int.from_bytes(hashlib.sha256(value).digest()[:7], "big")
        ends = torch.tensor([own, -own], dtype=torch.int64, device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise ConfigError(
                f"the {self.world} ranks disagree about {what} (seen on rank {self.rank}): all must be "
                "started with the same arguments and read the same files; on several machines the run's "
                "directory must be a shared one."
            )

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, or be the only one.

    Args:
        device: ``"cpu"`` (gloo) or ``"cuda"`` (nccl, the GPU of ``LOCAL_RANK``).

    Raises:
        ConfigError: the device is not there, the environment is not torchrun's, or the others do not come.
    """
    _check_launcher()
    world, rank = _place()
    if device == "cuda":
        place = _take_gpu()
    elif device == "cpu":
        place = torch.device("cpu")
    else:
        raise ConfigError(f"device is {device!r}, expected 'cpu' or 'cuda'.")
    if world == 1:
        yield Ranks(1, 0, place)
        return
    _load_what_would_keep_the_group()
    try:
        store, _, _ = next(rendezvous("env://", timeout=_MEETING))
        store.set_timeout(_TIMEOUT)
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{world} processes cannot meet: {str(error)[:200]}; start them with torchrun."
        ) from error
    try:
        yield Ranks(world, rank, place)
    finally:
        dist.destroy_process_group()


def _load_what_would_keep_the_group() -> None:
    """Load modules of torch that optimizers load, before there is a group.

    Loaded later, they keep the group of that moment for good, as the default of their functions'
    arguments (``torch.distributed.nn.functional``). ``destroy_process_group`` then ends none of gloo's
    threads, and one that lets go of its last tensor when Python has ended aborts the process.
    """
    importlib.import_module("torch._dynamo")


def _check_launcher() -> None:
    """Raise where a launcher was asked for several processes, and each would take itself for the only one."""
    if "WORLD_SIZE" in os.environ:
        return
    for name in _MPI:
        if os.environ.get(name, "1") != "1":
            raise ConfigError(
                f"mpirun started this process ({name}={os.environ[name]!r}) without WORLD_SIZE and RANK; "
                "start training with torchrun, or accelerate launch --multi_gpu, which works on CPUs too."
            )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate was asked for several processes but started this one alone, without WORLD_SIZE "
            f"(ACCELERATE_USE_CPU={os.environ.get('ACCELERATE_USE_CPU')!r}): put --multi_gpu in the place of "
            "--cpu, which works on CPUs too, or start training with torchrun."
        )


def place_of_process(device: str) -> tuple[int, int]:
    """Return world and rank as ``torchrun`` says them, without meeting the others; take the GPU of ours.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: the environment is not torchrun's, or there is no GPU for this process.
    """
    world, rank = _place()
    if device == "cuda" and world > 1:
        _take_gpu()
    return world, rank


def _place() -> tuple[int, int]:
    world, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if rank >= world:
        raise ConfigError(
            f"the environment says RANK={rank} and WORLD_SIZE={world}, expected a rank below the number of "
            "processes, as torchrun sets it."
        )
    return world, rank


def _take_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU here; use device 'cpu'.")
    place, count = torch.device("cuda", _number("LOCAL_RANK", 0)), torch.cuda.device_count()
    if place.index >= count:
        raise ConfigError(
            f"process {place.index} of this machine has no GPU of its own, torch sees {count}; start at most "
            "one process for each."
        )
    torch.cuda.set_device(place)
    return place


def _number(name: str, default: int) -> int:
    said = os.environ.get(name, str(default))
    if not said.isdigit():
        raise ConfigError(f"the environment says {name}={said!r}, expected a number, as torchrun sets it.")
    return int(said)
