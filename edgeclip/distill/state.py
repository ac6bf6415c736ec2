"""Where training stands, on disk: a checkpoint with the optimizer's state beside the weights.

A directory ``step-00001234`` holds a checkpoint (``config.json``, ``model.safetensors``, the tokenizer),
``optimizer.safetensors`` (moments by parameter name, the objective's own parameters), ``ema.safetensors``
where a running average is kept, and ``state.json``. It is written under another name and renamed when it is
complete and synced, so that whatever directory is there can be resumed from; the one before it stays until
then.

Resuming is exact: the order of samples is a function of the position, learning rate and random numbers are
functions of the step, and everything else is here. No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edgeclip.errors import ConfigError, InputError
from edgeclip.models.checkpoints import CheckpointInfo, save_checkpoint
from edgeclip.models.clip import CLIP
from edgeclip.models.state_files import write_state

__all__ = [
    "Position",
    "TrainingState",
    "latest_state",
    "load_state",
    "optimizer_moments",
    "restore_moments",
    "save_state",
]

SCHEMA = 1
_STATE, _OPTIMIZER, _EMA = "state.json", "optimizer.safetensors", "ema.safetensors"
_STEP = re.compile(r"step-(\d{8})")
_STAGING = ".partial-"


@dataclass(frozen=True)
class Position:
    """How far training is.

    Attributes:
        stage: index of the stage.
        step: steps of this stage that are done.
        total_steps: steps of all stages that are done.
        broken: samples that could not be decoded so far.
        skipped: steps without an update, because the loss or a gradient was not finite.
    """

    stage: int = 0
    step: int = 0
    total_steps: int = 0
    broken: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class TrainingState:
    """Everything beside the model's own weights.

    Attributes:
        position: how far training is.
        recipe_digest: of the recipe (``recipe_digest``); another recipe cannot resume.
        moments: the optimizer's state by ``<parameter>/<moment>``.
        objective: parameters that only training needs, by name.
        ema: running average of the weights by name; empty where none is kept.
        scaler: state of the loss scaling of float16.
    """

    position: Position
    recipe_digest: str
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    scaler: Mapping[str, float] = field(default_factory=dict)


def optimizer_moments(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return the optimizer's state under the names of the parameters.

    Args:
        optimizer: whose state.
        names: name by ``id`` of the parameter.
    """
    return {
        f"{names[id(parameter)]}/{moment}": value.detach().clone()
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], moments: Mapping[str, Tensor]
) -> None:
    """Put moments back where :func:`optimizer_moments` took them.

    Raises:
        InputError: a moment belongs to no parameter, or its shape differs.
    """
    parameters = {
        names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]
    }
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        if name not in parameters or value.shape not in (parameters[name].shape, torch.Size([])):
            raise InputError(
                f"training state: the moment {key!r} of shape {tuple(value.shape)} fits no trained "
                "parameter; was the recipe changed?"
            )
        # Adam counts its steps on the CPU.
        device = torch.device("cpu") if moment == "step" else parameters[name].device
        optimizer.state[parameters[name]][moment] = value.to(device)


def save_state(
    directory: Path,
    model: CLIP,
    info: CheckpointInfo,
    state: TrainingState,
    *,
    tokenizer_files: Mapping[str, bytes],
    keep: int = 2,
) -> Path:
    """Write ``directory/step-…`` completely or not at all, remove older ones, and return it.

    Args:
        directory: holds the states of one run.
        model: unfolded.
        info: what the checkpoint says about itself.
        state: the rest.
        tokenizer_files: content by file name.
        keep: newest states that stay.

    Raises:
        InputError: the directory cannot be written.
    """
    final = directory / f"step-{state.position.total_steps:08d}"
    staging = directory / f"{_STAGING}{final.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_checkpoint(model, staging, info, tokenizer_files=tokenizer_files)
        tensors = {
            f"{prefix}:{key}": value.detach().cpu().contiguous()
            for prefix, part in (("moments", state.moments), ("objective", state.objective))
            for key, value in part.items()
        }
        write_state(staging / _OPTIMIZER, tensors)
        if state.ema:
            average = {key: value.detach().cpu().contiguous() for key, value in state.ema.items()}
            write_state(staging / _EMA, average)
        said = {
            "schema": SCHEMA,
            "position": asdict(state.position),
            "recipe_digest": state.recipe_digest,
            "scaler": dict(state.scaler),
        }
        (staging / _STATE).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        for file in staging.iterdir():
            _sync(file)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        _sync(directory)
        for old in _states(directory)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError, InputError) as error:
        shutil.rmtree(staging, ignore_errors=True)  # it may be what fills the disk
        reason = str(error).rstrip(".")
        raise InputError(
            f"training state {str(final)!r} cannot be written: {reason}. Make room; the same command goes on "
            f"from {_goes_on_from(directory)}."
        ) from error
    return final


def _goes_on_from(directory: Path) -> str:
    found = latest_state(directory)
    return "the beginning" if found is None else repr(found.name)


def latest_state(directory: Path) -> Path | None:
    """Return the newest complete state of a run, or ``None``."""
    found = _states(directory)
    return found[-1] if found else None


def load_state(path: Path, model: nn.Module, *, recipe_digest: str) -> TrainingState:
    """Read the state and put the weights into the model, bit for bit.

    Raises:
        InputError: a file is missing or damaged, or keys disagree.
        ConfigError: the state is of another recipe or schema.
    """
    where = f"training state {str(path)!r}"
    try:
        said = json.loads((path / _STATE).read_text(encoding="utf-8"))
        weights, tensors = load_file(path / "model.safetensors"), load_file(path / _OPTIMIZER)
        ema = load_file(path / _EMA) if (path / _EMA).exists() else {}
        if said["schema"] != SCHEMA:
            raise ConfigError(f"{where}: got schema {said['schema']!r}, expected {SCHEMA}.")
        position, digest, scaler = Position(**said["position"]), said["recipe_digest"], said["scaler"]
        parts: dict[str, dict[str, Tensor]] = {"moments": {}, "objective": {}}
        for key, value in tensors.items():
            prefix, _, name = key.partition(":")
            parts[prefix][name] = value
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{where} cannot be read: {error}. Remove it to resume from the one before."
        ) from error
    if digest != recipe_digest:
        raise ConfigError(
            f"{where} belongs to another recipe (digest {str(digest)[:8]}, now {recipe_digest[:8]}); undo "
            "the change, or train into another directory."
        )
    expected = model.state_dict()
    difference = set(weights) ^ set(expected)
    difference |= {name for name in set(weights) - difference if weights[name].shape != expected[name].shape}
    if difference:
        raise InputError(f"{where}: weights and model disagree about {sorted(difference)[:5]}.")
    model.load_state_dict(weights)
    return TrainingState(position, digest, **parts, ema=ema, scaler=scaler)


def _states(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _STEP.fullmatch(path.name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
