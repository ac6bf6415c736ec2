"""The settings that tuning tries, each measured as it is used: contenders of a race.

All go through :class:`~edgeclip.classify.ZeroShotClassifier` with the bundle's own labels. What is compiled
on the way stays out of the host cache, where the device allows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BackendError, InputError
from edgeclip.runtime.parity import Golden, judge_tower
from edgeclip.runtime.session import RuntimeOptions, parse_device
from edgeclip.runtime.tuned import TunedSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeclip.bundle import Bundle, Variant

__all__ = ["Bench", "Fresh", "Runner", "Setting", "Single", "Streamed"]

_TURN_S: Final = 0.06
_STREAM_S: Final = 0.25
_QUIET_S: Final = 2.0


@dataclass(frozen=True, eq=False)
class Runner:
    """A variant on an engine; ``place`` is where the variant stands in the bundle's own order."""

    variant: Variant
    backend: str
    place: int

    @property
    def name(self) -> str:
        """Both in words."""
        return f"{self.variant.name} with {self.backend}"


@dataclass
class Bench:
    """What all settings share.

    Attributes:
        bundle: the bundle.
        device: where towers run.
        scratch: where compiled towers are kept meanwhile.
        images: picture files of the stream.
        proved: by variant and engine why its answers are wrong here, ``None`` where they are right.
        golden: read at first use.
        streamed: pictures of one turn of a stream, 0 until it is known.
    """

    bundle: Bundle
    device: str
    scratch: Path
    images: tuple[Path, ...] = ()
    proved: dict[tuple[str, str], str | None] = field(default_factory=dict)
    golden: Golden | None = None
    streamed: int = 0

    def options(self, settings: TunedSettings) -> RuntimeOptions:
        """Return options to open a setting with."""
        kind, _ = parse_device(self.device)
        return RuntimeOptions(
            backend=settings.backend,
            device=self.device,
            threads=settings.threads,
            spinning=settings.spinning,
            low_memory=settings.low_memory,
            # What is tried should not fill the host cache. Other devices find engines in it.
            cache_dir=self.scratch if kind == "cpu" else None,
        )

    def prove(self, runner: Runner, classifier: ZeroShotClassifier) -> None:
        """Run the golden pictures once for each variant and engine.

        Raises:
            BackendError: its answers on this host are wrong.
        """
        key = (runner.variant.name, runner.backend)
        if key not in self.proved:
            self.proved[key] = None
            if self.bundle.manifest.golden is not None:
                self.golden = self.golden or Golden.of(self.bundle)
                rows = classifier.embed_images(self.golden.images)
                result = judge_tower(self.bundle, self.golden, runner.variant, "image", rows)
                if not result.passed:
                    said = "; ".join(map(str, result.failures))
                    self.proved[key] = f"its answers on this host are below the floor: {said}"
        why = self.proved[key]
        if why is not None:
            raise BackendError(why)

    def picture(self) -> NDArray[np.uint8]:
        """Return one picture ``(H, W, 3)`` at the tower's size."""
        if self.bundle.manifest.golden is not None:
            self.golden = self.golden or Golden.of(self.bundle)
            pixels: NDArray[np.uint8] = self.golden.images[0]
            return pixels
        height, width = self.bundle.manifest.preprocess.image_size_px
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
        return noise.astype(np.uint8)


class Setting:
    """One setting: a variant on an engine, and how it is run. A contender of the race."""

    def __init__(self, bench: Bench, runner: Runner, settings: TunedSettings) -> None:
        self._bench = bench
        self.runner = runner
        self.settings = settings
        self._classifier: ZeroShotClassifier | None = None

    @property
    def name(self) -> str:
        """Variant and settings in words."""
        return f"{self.runner.variant.name}, {self.settings}"

    @property
    def rank(self) -> tuple[Any, ...]:
        """Gentler to what else runs, then what the bundle prefers, then simpler."""
        it = self.settings
        return (it.spinning, it.threads, self.runner.place, it.batch_size or 1, it.workers or 0)

    def open(self) -> None:
        """Open the classifier and check its answers."""
        bench = self._bench
        self._classifier = classifier = ZeroShotClassifier.open(
            bench.bundle, variant=self.runner.variant.name, options=bench.options(self.settings)
        )
        bench.prove(self.runner, classifier)
        if bench.bundle.manifest.default_bank is not None:
            classifier.set_bundle_labels()

    def turn(self) -> float:
        """Return seconds a picture."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the classifier."""
        classifier, self._classifier = self._classifier, None
        if classifier is not None:
            classifier.close()

    def _opened(self) -> ZeroShotClassifier:
        if self._classifier is None:
            raise BackendError(f"{self.name}: it is not open.")
        return self._classifier

    def _let_spin_down(self) -> None:
        """Wait until the threads of this setting sleep: they would run in the turn of another one."""
        until = time.perf_counter() + _QUIET_S
        while self.settings.spinning and time.perf_counter() < until:
            before = time.process_time()
            time.sleep(0.01)
            if time.process_time() - before < 0.002:
                return


class Single(Setting):
    """One picture after another."""

    def open(self) -> None:
        """Open the classifier and make a picture ready."""
        super().open()
        pixels = self._bench.picture()
        classifier = self._opened()
        if self._bench.bundle.manifest.default_bank is not None:
            self._call: Callable[[], object] = lambda: classifier.classify(pixels)
        else:
            self._call = lambda: classifier.embed_images(pixels)

    def turn(self) -> float:
        """Return the median of some calls, the first one left out: it finds the caches another one left."""
        call = self._call
        call()
        taken_s: list[float] = []
        until = time.perf_counter() + _TURN_S
        while not taken_s or (time.perf_counter() < until and len(taken_s) < 200):
            began = time.perf_counter()
            call()
            taken_s.append(time.perf_counter() - began)
        self._let_spin_down()
        return float(np.median(taken_s))


class Streamed(Setting):
    """A stream of picture files."""

    def turn(self) -> float:
        """Return seconds a picture of a stream that takes about a quarter of a second.

        Raises:
            InputError: a picture cannot be read.
        """
        bench, classifier = self._bench, self._opened()
        images = bench.images
        if bench.streamed == 0:
            began = time.perf_counter()
            self._stream(classifier, [images[number % len(images)] for number in range(16)])
            each_s = (time.perf_counter() - began) / 16
            bench.streamed = 16 * max(1, min(16, round(_STREAM_S / each_s / 16)))
        sources = [images[number % len(images)] for number in range(bench.streamed)]
        began = time.perf_counter()
        self._stream(classifier, sources)
        taken_s = (time.perf_counter() - began) / len(sources)
        self._let_spin_down()
        return taken_s

    def _stream(self, classifier: ZeroShotClassifier, sources: Sequence[Path]) -> None:
        settings = self.settings
        stream = (
            classifier.classify_stream
            if self._bench.bundle.manifest.default_bank is not None
            else classifier.embed_stream
        )
        for outcome in stream(sources, batch_size=settings.batch_size, workers=settings.workers):
            if outcome.error is not None:
                raise InputError(f"{str(outcome.source)!r}: {outcome.error}") from outcome.error


_CHILD: Final = """
import json, sys, time
said = json.loads(sys.argv[1])
import numpy as np
from edgeclip.classify import ZeroShotClassifier
from edgeclip.runtime.host import peak_rss_bytes
from edgeclip.runtime.session import RuntimeOptions
options = RuntimeOptions(**said["options"])
with ZeroShotClassifier.open(said["bundle"], variant=said["variant"], options=options) as classifier:
    pixels = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(said["shape"])
    call = classifier.classify if said["labels"] else classifier.embed_images
    call(pixels)
    taken = []
    until = time.perf_counter() + 0.2
    while not taken or time.perf_counter() < until:
        began = time.perf_counter()
        call(pixels)
        taken.append(time.perf_counter() - began)
    print(json.dumps({"bytes": peak_rss_bytes(), "s": sorted(taken)[len(taken) // 2]}))
"""


class Fresh(Setting):
    """A process of its own."""

    def __init__(self, bench: Bench, runner: Runner, settings: TunedSettings) -> None:
        super().__init__(bench, runner, settings)
        self._taken_s: list[float] = []

    @property
    def rank(self) -> tuple[Any, ...]:
        """Faster first."""
        return (float(np.median(self._taken_s)), *super().rank)

    def open(self) -> None:
        """Check the answers, once for each variant and engine; what is measured is another process."""
        if (self.runner.variant.name, self.runner.backend) not in self._bench.proved:
            super().open()
            self.close()
        elif (why := self._bench.proved[self.runner.variant.name, self.runner.backend]) is not None:
            raise BackendError(why)

    def turn(self) -> float:
        """Return megabytes.

        Raises:
            BackendError: the process failed, or the system does not tell its memory.
        """
        bench, options = self._bench, self._bench.options(self.settings)
        pixels = bench.picture()
        said = {
            "bundle": str(bench.bundle.path),
            "variant": self.runner.variant.name,
            "shape": pixels.shape,
            "labels": bench.bundle.manifest.default_bank is not None,
            "options": {
                "backend": options.backend,
                "device": options.device,
                "threads": options.threads,
                "low_memory": options.low_memory,
                "cache_dir": None if options.cache_dir is None else str(options.cache_dir),
            },
        }
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(said)], input=pixels.tobytes(), capture_output=True
        )
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [""]
        if done.returncode:
            raise BackendError(f"a process of its own ended with {done.returncode}: {lines[-1][:200]}")
        told = json.loads(done.stdout)
        if told["bytes"] is None:
            raise BackendError("this system does not tell how much memory a process has had.")
        self._taken_s.append(told["s"])
        return float(told["bytes"]) / 1e6
