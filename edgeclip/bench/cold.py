"""Cold starts: fresh processes from nothing to the first label, and the most memory they held.

Every process has a cache directory of its own. For a *miss* it is empty; for a *hit* the same one has served
a process before, which is not counted, so that labels are encoded and towers compiled already. Files are in
the memory of the system either way: nobody may empty that without being root.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

import edgeclip.errors
from edgeclip.bench.report import COLD_PHASES, MemoryEntry, MemorySample, stage_entry
from edgeclip.bench.targets import Target
from edgeclip.cache import COMPILED, HostCache, cache_root
from edgeclip.errors import BackendError, EdgeClipError
from edgeclip.runtime.choose import PROFILE_NAME
from edgeclip.runtime.host import UNAVAILABLE, Host
from edgeclip.runtime.latency import LatencySamples
from edgeclip.runtime.session import parse_device

if TYPE_CHECKING:
    from edgeclip.bench.workload import Workload
    from edgeclip.bundle import Bundle
    from edgeclip.runtime.latency_report import StageEntry

__all__ = ["ColdResult", "ColdTarget", "measure_cold"]

_PROGRAM: Final = (
    "import time; began = time.perf_counter_ns(); from edgeclip.bench.cold_child import main; main(began)"
)
_MEMORY_RUNS: Final = 3
_LIMIT_S: Final = 600.0

Kind = Literal["hit", "miss", "memory"]


@dataclass(frozen=True)
class ColdTarget:
    """What is started.

    Attributes:
        target: as its user opens it.
        bundle: of the target, open.
        format: of its variant.
    """

    target: Target
    bundle: Bundle
    format: str

    @property
    def needs_engine(self) -> bool:
        """Whether it opens only what was compiled before, because that takes long."""
        return self.format == "tensorrt" or parse_device(self.target.device)[0] != "cpu"


@dataclass
class ColdResult:
    """What fresh processes of one target told.

    Attributes:
        phases: milliseconds by phase, for hits and misses.
        memory: what watched processes held at most.
        missing: why there is nothing, by the name of the figure.
    """

    phases: dict[Literal["hit", "miss"], list[dict[str, float]]] = field(
        default_factory=lambda: {"hit": [], "miss": []}
    )
    memory: list[MemorySample] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def cold_start(self) -> dict[Literal["hit", "miss"], dict[str, StageEntry]]:
        """Return it for a report, phases in their order."""
        found: dict[Literal["hit", "miss"], dict[str, StageEntry]] = {}
        for kind, runs in self.phases.items():
            if runs:
                found[kind] = {
                    phase: stage_entry(LatencySamples(np.array([run[phase] for run in runs])))
                    for phase in COLD_PHASES
                    if phase in runs[0]
                }
        return found

    def memory_entry(self) -> MemoryEntry | None:
        """Return it for a report; ``None`` where nobody was watched."""
        if not self.memory:
            return None
        rss = [each.rss_bytes for each in self.memory if isinstance(each.rss_bytes, int)]
        pss = [each.pss_bytes for each in self.memory if isinstance(each.pss_bytes, int)]
        return MemoryEntry(
            peak_rss_bytes=int(np.median(rss)) if rss else UNAVAILABLE,
            peak_pss_bytes=int(np.median(pss)) if pss else UNAVAILABLE,
            samples=tuple(self.memory),
        )


def measure_cold(
    targets: Sequence[ColdTarget],
    workload: Workload,
    *,
    runs: int,
    seed: int = 0,
    on_run: Callable[[int, int], None] = lambda done, of: None,
) -> list[ColdResult]:
    """Start fresh processes of every target, in random order over all of them.

    Args:
        targets: what is started.
        workload: labels, and pictures of which the first is classified.
        runs: processes a target with a warm cache, and as many with an empty one; a few more are watched for
            their memory.
        seed: of the order.
        on_run: told how many processes there were, and of how many.

    Returns:
        One result a target.

    Raises:
        EdgeClipError: as the process of a target said, which could not start.
        BackendError: a process ended without a word of its own.
    """
    results = [ColdResult() for _ in targets]
    with tempfile.TemporaryDirectory(prefix="edgeclip-cold-") as name:
        starter = _Starter(Path(name), workload)
        jobs: list[tuple[int, Kind]] = []
        for place, target in enumerate(targets):
            kinds: dict[Kind, int] = {"hit": runs, "miss": runs, "memory": min(runs, _MEMORY_RUNS)}
            if target.needs_engine:
                kinds["miss"] = 0
                results[place].missing["cold_start.miss"] = "it opens only what was compiled before"
            jobs += [(place, kind) for kind, count in kinds.items() for _ in range(count)]
        random.Random(seed).shuffle(jobs)  # noqa: S311 - an order of measurements, not a secret
        total = len(targets) + len(jobs)
        for place, target in enumerate(targets):
            starter.start(target, "hit", place)  # fills the cache; what cannot run fails here
            on_run(place + 1, total)
        for done, (place, kind) in enumerate(jobs, start=len(targets) + 1):
            told = starter.start(targets[place], kind, place)
            if kind == "memory":
                rss, pss = told["rss_bytes"], told["pss_bytes"]
                results[place].memory.append(
                    MemorySample(rss_bytes=rss or UNAVAILABLE, pss_bytes=pss or UNAVAILABLE)
                )
            else:
                results[place].phases[kind].append(told["phases"])
            on_run(done, total)
    return results


class _Starter:
    """Start processes in a folder of their own, with labels and caches in it."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        self._folder = folder
        self._picture = workload.pictures[0]
        self._templates = None if workload.templates is None else list(workload.templates.texts)
        self._language = workload.language
        self._labels: Path | None = None
        if workload.labels is not None:
            from edgeclip.labels import LabelBank

            is_bank = isinstance(workload.labels, LabelBank)
            self._labels = folder / ("labels.safetensors" if is_bank else "labels.json")
            if isinstance(workload.labels, LabelBank):
                workload.labels.save(self._labels)
            else:
                said = [label.to_json() for label in workload.labels.labels]
                self._labels.write_text(json.dumps(said), encoding="utf-8")
        self._caches: dict[int, Path] = {}

    def start(self, target: ColdTarget, kind: Kind, place: int) -> dict[str, Any]:
        """Start one process, wait for it, and return what it told."""
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            if kind == "miss":
                cache = self._new_cache(folder / "cache", target)
            else:
                cache = self._caches.get(place) or self._new_cache(self._folder / f"cache-{place}", target)
                self._caches[place] = cache
            report = folder / "report.json"
            spec = {
                "target": {**asdict(target.target), "bundle": str(target.bundle.path)},
                "picture": str(self._picture),
                "labels": None if self._labels is None else str(self._labels),
                "templates": self._templates,
                "language": self._language,
                "watch": kind == "memory",
                "report": str(report),
            }
            ended = self._run(spec, folder, cache)
            if not report.exists():
                raise _silent(target.target, ended)
            told: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        if "error" in told:
            raise _translated(told)
        return told

    @staticmethod
    def _run(spec: dict[str, Any], folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "EDGECLIP_CACHE_DIR": str(cache)}
        if "PYTHONPATH" in environment:
            # The process starts in an empty folder, lest files beside the user hide modules.
            parts = environment["PYTHONPATH"].split(os.pathsep)
            environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in parts if part)  # noqa: PTH100
        started_ns = perf_counter_ns()  # the clock of the whole system: the process reads the same
        try:
            return subprocess.run(
                [sys.executable, "-c", _PROGRAM, json.dumps({**spec, "started_ns": started_ns})],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BackendError(
                f"cold start of {spec['target']['variant']!r}: no label after {_LIMIT_S:g} s. Leave cold "
                "starts out with --cold 0."
            ) from error

    @staticmethod
    def _new_cache(root: Path, target: ColdTarget) -> Path:
        """Return an empty cache: but for the tuned profile, and for engines where nothing runs without."""
        root.mkdir()
        digest, host = target.bundle.digest, Host.here().fingerprint()
        profile = HostCache.open(digest, host).get(PROFILE_NAME)
        if profile is not None:
            HostCache.open(digest, host, root=root).put(PROFILE_NAME, profile)
        compiled = cache_root() / COMPILED
        if target.needs_engine and compiled.is_dir():
            try:
                (root / COMPILED).symlink_to(compiled, target_is_directory=True)
            except OSError:  # Windows lets few users make links
                shutil.copytree(compiled, root / COMPILED)
        return root


def _silent(target: Target, ended: subprocess.CompletedProcess[str]) -> BackendError:
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    said = f": {lines[-1].strip()[:300]}" if lines else ""
    return BackendError(
        f"cold start of {target.short_name!r}: the process ended with code {ended.returncode}{said}. Run "
        "`edgeclip doctor`, or leave cold starts out with --cold 0."
    )


def _translated(told: dict[str, Any]) -> EdgeClipError:
    """Return the error a process met, as if it had been met here."""
    kind: type[EdgeClipError] = getattr(edgeclip.errors, told["kind"], BackendError)
    error = kind.__new__(kind)  # constructors differ; the sentence is at hand
    Exception.__init__(error, told["error"])
    return error
