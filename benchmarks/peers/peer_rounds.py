"""Workers, and rounds that measure many of them in turns.

A round calls every subject once in a random order and then once more in the reverse order: a drift that is
linear over the round cancels in the ratio of any two, as it does in a block of ``compare_interleaved``,
whose statistics these are: geometric means over the two samples of a round, the median over rounds, an
interval from order statistics. So one run of rounds gives the ratio of every pair.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.latency import LatencySamples
from edgeclip.runtime.statistics import CONFIDENCE, order_interval

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("peer_worker.py")
Samples = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Subject:
    """Something that is measured: a peer with its settings, and what every cell of a table must say.

    Attributes:
        name: in tables.
        module: file of this folder with the class ``Peer``.
        options: for it.
        precision: of weights and sums.
        jpeg: ``"full"``, ``"reduced scale"``, or ``""`` where no picture is decoded.
        engine: what runs the tower.
        path: folders to import from first.
        do: method that is called.
        given: argument of every call, where it is not the picture.
        same_weights: whether its weights are those of every other subject of MobileCLIP2-S0.
        ours: whether it is edgeclip.
        all_cores: it cannot be told how many threads to take.
        cache: folder of our host cache.
    """

    name: str
    module: str
    options: Mapping[str, Any]
    precision: str
    jpeg: str
    engine: str
    path: tuple[str, ...] = ()
    do: str = "classify"
    given: str | None = None
    same_weights: bool = True
    ours: bool = False
    all_cores: bool = False
    cache: str = "cache"

    def to_dict(self) -> dict[str, Any]:
        """Return what a cell must say."""
        return {
            "precision": self.precision,
            "jpeg": self.jpeg,
            "engine": self.engine,
            "same_weights": self.same_weights,
            "ours": self.ours,
        }


# --- processes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where workers write their logs and find our host caches, and what their environments hold besides.

    ``site`` is where our package is installed as users install it: compiled to byte code, as every peer is.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    site: str = ""

    def environment_of(self, subject: Subject, threads: int) -> dict[str, str]:
        """Return the environment of a worker."""
        path = [*subject.path, *([self.site] if self.site and subject.ours else [])]
        return {
            **os.environ,
            **self.environment,
            "EDGECLIP_CACHE_DIR": str(self.folder / subject.cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(path),
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }


def torchvision_environment() -> dict[str, str]:
    """Return what makes torchvision import here: nothing, where it does by itself."""
    asked = [sys.executable, "-c", "import torchvision"]
    alone = subprocess.run(asked, capture_output=True, check=False).returncode
    return {"TORCHVISION_SCHEMAS": "1"} if alone else {}


def command(subject: Subject, threads: int, **more: Any) -> list[str]:
    """Return the command line of a worker."""
    spec = {
        "module": subject.module,
        "options": dict(subject.options),
        "threads": threads,
        "path": list(subject.path),
        **more,
    }
    return [sys.executable, str(WORKER), json.dumps(spec)]


class Worker:
    """A running subject."""

    def __init__(self, subject: Subject, threads: int, places: Places) -> None:
        self.subject = subject
        (places.folder / "logs").mkdir(parents=True, exist_ok=True)
        file_name = "".join(sign if sign.isalnum() else "-" for sign in subject.name)
        self._log_path = places.folder / "logs" / f"{file_name}.log"
        self._log = self._log_path.open("wb")
        self._process = subprocess.Popen(
            command(subject, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=places.environment_of(subject, threads),
            cwd=ROOT,
        )
        self._answer()

    def ask(
        self, do: str, given: Any, *, untimed: int = 0, for_s: float = 0.0, tell: bool = False
    ) -> tuple[float, Any]:
        """Let it do one thing; return the milliseconds by its own clock, and what it found if it is to tell.

        With ``for_s`` it does so without a pause for so many seconds, and the median comes back.

        Raises:
            RuntimeError: it has ended; the message holds the end of its log.
        """
        assert self._process.stdin is not None
        request = {"do": do, "given": given, "untimed": untimed, "for_s": for_s, "tell": tell}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer["ns"] / 1e6, answer["value"]

    def call(self, picture: str | None, *, untimed: int = 1) -> float:
        """Let it do what it is here for, once untimed and once timed; return milliseconds."""
        subject = self.subject
        return self.ask(subject.do, picture if subject.given is None else subject.given, untimed=untimed)[0]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.flush()
            said = self._log_path.read_text(encoding="utf-8", errors="replace")[-600:]
            raise RuntimeError(f"{self.subject.name}: its process ended: {said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=60)
        self._log.close()


@contextmanager
def workers(subjects: Sequence[Subject], threads: int, places: Places) -> Iterator[dict[str, Worker]]:
    """Start a worker for each subject and end them all at the end."""
    started: dict[str, Worker] = {}
    try:
        for subject in subjects:
            started[subject.name] = Worker(subject, threads, places)
        yield started
    finally:
        for worker in started.values():
            worker.close()


# --- rounds -------------------------------------------------------------------------------------------------


def rounds(
    calls: Mapping[str, Callable[[int], float]], n: int, *, seconds: float = 0.0, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Call everything in turns; return milliseconds, ``(rounds, 2)`` for each name.

    Args:
        calls: given the number of the round, returns milliseconds.
        n: rounds at least.
        seconds: go on for so long.
        seed: of the orders.
    """
    order = random.Random(seed)
    names = list(calls)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    began = time.monotonic()
    number = 0
    while number < n or time.monotonic() - began < seconds:
        order.shuffle(names)
        there = {name: calls[name](number) for name in names}
        back = {name: calls[name](number) for name in reversed(names)}
        for name in names:
            taken[name].append((there[name], back[name]))
        number += 1
    return {name: np.array(taken[name]) for name in calls}


def ratio(a: NDArray[np.float64], b: NDArray[np.float64], confidence: float = CONFIDENCE) -> dict[str, Any]:
    """Return the time of ``a`` over the time of ``b``: median over rounds with its interval.

    Args:
        a: milliseconds ``(rounds, 2)``, or ``(rounds,)``.
        b: the same rounds.
        confidence: of the interval.
    """
    rows = [np.log(np.maximum(side, 1e-9)).reshape(len(side), -1).mean(axis=1) for side in (a, b)]
    ordered = np.sort(rows[0] - rows[1])
    low, high = order_interval(len(ordered), 0.5, confidence)
    middle, below, above = np.exp([np.median(ordered), ordered[low - 1], ordered[high - 1]])
    return {
        "ratio": round(float(middle), 4),
        "low": round(float(below), 4),
        "high": round(float(above), 4),
        "rounds": len(ordered),
    }


def summary(samples_ms: NDArray[np.float64]) -> dict[str, Any]:
    """Return median with interval, and the raw samples."""
    flat = np.asarray(samples_ms, np.float64).ravel()
    ordered = np.sort(flat)
    low, high = order_interval(len(ordered), 0.5, CONFIDENCE)
    return {
        "n": len(flat),
        "p50": round(LatencySamples(flat).median_ms, 3),
        "p50_low": round(float(ordered[low - 1]), 3),
        "p50_high": round(float(ordered[high - 1]), 3),
        "samples": [round(float(value), 3) for value in flat],
    }


# --- fresh processes ----------------------------------------------------------------------------------------


def first_label(
    subject: Subject, threads: int, places: Places, picture: Path, *, more: int
) -> dict[str, Any]:
    """Start a process, let it classify one picture, then ``more`` more; return times and peak memory.

    Returns:
        ``start_ms`` from the start of the process to its first label, ``open_ms`` from its first line until
        it could classify, ``peak_rss_mb`` after all pictures.
    """
    asked = command(subject, threads, first=str(picture), more=more)
    environment = places.environment_of(subject, threads)
    began_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    done = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{subject.name}: its process ended: {done.stderr[-600:]}")
    told = json.loads(done.stdout)
    return {
        "start_ms": (told["labelled_ns"] - began_ns) / 1e6,
        "open_ms": (told["opened_ns"] - told["began_ns"]) / 1e6,
        "peak_rss_mb": told["peak_rss_bytes"] / 1e6,
        "label": told["label"],
    }
