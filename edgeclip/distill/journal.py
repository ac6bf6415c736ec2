"""The directory of a run: what it is a run of, and what happened in it.

::

    run.json        digests of recipe and data: a run goes on only with the same
    recipe.toml     the recipe as it was given, with its changes
    log.jsonl       an object a logged step, one a validation, and one where a stage pruned the model
    skipped.jsonl   steps without an update: the keys of their samples
    states/         where training stands (edgeclip/distill/state.py)
    model/          the checkpoint that comes out; there only when training is done
    tensorboard/    scalars, where they are asked for

Lines beyond the state that a run goes on from are removed, so that no step stands in the log twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeclip.errors import ConfigError, InputError
from edgeclip.labels import write_atomic
from edgeclip.storage import DirectoryLock

__all__ = ["Journal"]

SCHEMA = 1
_RUN, _RECIPE, _LOG, _SKIPPED = "run.json", "recipe.toml", "log.jsonl", "skipped.jsonl"
_STATES, _MODEL, _STAGED_MODEL, _SCALARS = "states", "model", ".partial-model", "tensorboard"


class Journal:
    """Writes into the directory of a run; one process at a time.

    Args:
        directory: made if missing.
        recipe_digest: of the recipe.
        data: digest of each table of pairs.
        recipe: text that is kept beside the run.
        restart: throw away what an earlier run left.

    Raises:
        ConfigError: the directory belongs to another run, to none, or to a process that still runs.
        InputError: it cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        recipe_digest: str,
        data: Mapping[str, str],
        recipe: str = "",
        restart: bool = False,
    ) -> None:
        self.directory = directory
        said = {"schema": SCHEMA, "recipe": recipe_digest, "data": dict(data)}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._check(said, restart)
            self._lock = DirectoryLock(directory)
            if restart:
                self._clear()
            if not (directory / _RUN).exists():
                (directory / _RECIPE).write_text(recipe, encoding="utf-8")
                write_atomic(directory / _RUN, (json.dumps(said, indent=1) + "\n").encode())
        except BlockingIOError as error:
            raise ConfigError(
                f"run {str(directory)!r}: another process trains there; wait for it, or choose another -o."
            ) from error
        except OSError as error:
            raise InputError(
                f"run {str(directory)!r} cannot be written: {error.strerror or error}."
            ) from error

    @property
    def states(self) -> Path:
        """Directory of the states."""
        return self.directory / _STATES

    @property
    def model(self) -> Path:
        """Directory of the checkpoint that comes out."""
        return self.directory / _MODEL

    @property
    def staged_model(self) -> Path:
        """Where that checkpoint is written before it is complete."""
        return self.directory / _STAGED_MODEL

    def _check(self, said: Mapping[str, Any], restart: bool) -> None:
        where = f"run {str(self.directory)!r}"
        path = self.directory / _RUN
        if not path.exists():
            others = [entry.name for entry in self.directory.iterdir() if not entry.name.startswith(".")]
            # Killed between the two files that begin a run.
            if others and others != [_RECIPE]:
                raise ConfigError(
                    f"{where} holds {sorted(others)[:3]}, but no run; choose a new or an empty directory."
                )
            return
        if restart:
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            recipe, data = found["recipe"], dict(found["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where}: {_RUN} is damaged ({error}); begin again with --restart.") from error
        if recipe != said["recipe"]:
            raise ConfigError(
                f"{where} belongs to another recipe (digest {str(recipe)[:8]}, now {said['recipe'][:8]}); "
                "undo the change, choose another -o, or begin again with --restart."
            )
        changed = sorted(name for name in said["data"] if data.get(name) != said["data"][name])
        if changed:
            raise ConfigError(
                f"{where}: the data {changed} are others than when it began; put them back, or begin again "
                "with --restart."
            )

    def _clear(self) -> None:
        (self.directory / _RUN).unlink(missing_ok=True)  # first: a rest without it is no run
        for name in (_STATES, _MODEL, _STAGED_MODEL, _SCALARS):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in (_RECIPE, _LOG, _SKIPPED):
            (self.directory / name).unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Remove what was written after ``step``."""
        for name in (_LOG, _SKIPPED):
            path = self.directory / name
            if not path.exists():
                continue
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            staged = path.with_name(f".partial-{name}")
            staged.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            staged.replace(path)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append an object with its ``step`` to the log."""
        self._append(_LOG, entry)

    def skipped(self, entry: Mapping[str, Any]) -> None:
        """Append a step without an update."""
        self._append(_SKIPPED, entry)

    def _append(self, name: str, entry: Mapping[str, Any]) -> None:
        try:
            with (self.directory / name).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(
                f"run {str(self.directory)!r}: {name} cannot be written: {error.strerror or error}."
            ) from error

    def close(self) -> None:
        """Let go of the directory."""
        self._lock.release()


def _step(line: str) -> float:
    """Return the step of a line; infinity for one that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
