"""The folder of a pipeline run: what earlier runs did, and the files a run leaves."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edgeclip.errors import BundleError, InputError
from edgeclip.labels import write_atomic
from edgeclip.storage import DirectoryLock

from .artifacts import PipelineReport, junit, model_card, summary

__all__ = ["ARTIFACTS", "State", "locked", "write_artifacts"]

ARTIFACTS: Final = ("report.json", "summary.md", "junit.xml", "model-card.md")
_STATE: Final = "state.json"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep others out of the folder.

    Raises:
        BundleError: somebody else is at work in it.
        InputError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = DirectoryLock(out)
    except BlockingIOError as error:
        raise BundleError(f"{str(out)!r}: another pipeline is running in it; wait for it to end.") from error
    except OSError as error:
        raise InputError(f"{str(out)!r} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        lock.release()


@dataclass
class State:
    """What earlier runs in a folder did: results by stage, each with the key it holds for."""

    out: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, out: Path, force: bool) -> State:
        """Read the state of a folder; one that cannot be read, or not be vouched for, is none."""
        path = out / _STATE
        if force or not path.is_file():
            return cls(out)
        try:
            said = json.loads(path.read_bytes())
        except (OSError, ValueError):
            said = None
        if isinstance(said, dict) and said.get("schema") == 1 and said.get("sha256") == _digest(said):
            return cls(out, said["stages"])
        return cls(out, remarks=[f"{_STATE} of an earlier run cannot be used, so everything was done again"])

    def result(self, stage: str, key: str) -> Any:
        """Return the result of a stage that has this key, else ``None``."""
        said = self.stages.get(stage)
        return said["result"] if said is not None and said["key"] == key else None

    def keep(self, stage: str, key: str, result: Any) -> None:
        """Note a result.

        Raises:
            InputError: the folder cannot be written.
        """
        self.stages[stage] = {"key": key, "result": result}
        said: dict[str, Any] = {"schema": 1, "kind": "pipeline-state", "stages": self.stages}
        said["sha256"] = _digest(said)
        write_atomic(self.out / _STATE, json.dumps(said).encode())


def _digest(said: dict[str, Any]) -> str:
    """Return what vouches for a state: a file that was changed by others has another one."""
    return hashlib.sha256(json.dumps(said.get("stages"), sort_keys=True).encode()).hexdigest()


def write_artifacts(report: PipelineReport, out: Path) -> None:
    """Write what people and CI read, each file at once or not at all.

    Raises:
        InputError: the folder cannot be written.
    """
    texts = {
        "report.json": json.dumps(report.to_dict(), indent=1, ensure_ascii=False).encode(
            "utf-8",
            "backslashreplace",  # half a surrogate pair, from a name of a file
        ),
        "summary.md": summary(report).encode(),
        "junit.xml": junit(report),
    }
    if report.manifest is not None:
        texts["model-card.md"] = model_card(report).encode()
    for name, content in texts.items():
        write_atomic(out / name, content)
