"""What a pipeline measures of a bundle on this host, or takes over from an earlier run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgeclip.bundle import Bundle
from edgeclip.data import read_samples
from edgeclip.errors import BackendError, BundleError
from edgeclip.runtime.choose import unmet
from edgeclip.runtime.host import Host
from edgeclip.runtime.latency_report import LatencyReport, RatioEntry
from edgeclip.runtime.session import RuntimeOptions

from .gates import Accuracy
from .pipeline_inputs import CHECKPOINT, Inputs, digest_of, tools
from .pipeline_judge import Measured, asked_of, is_settled
from .pipeline_recipe import AccuracyGate, LatencyGate, PipelineRecipe
from .pipeline_state import State
from .timing import Effort, compare_towers, time_variant
from .verify import verify_bundle

__all__ = ["Done", "Measuring", "count"]


class Done(Protocol):
    """Is told that a stage ended."""

    def __call__(self, stage: str, began: float, note: str, *, reused: bool = False) -> None:
        """Tell the stage, when it began (``perf_counter``), what came of it, and whether nothing was done."""
        ...


class Measuring:
    """The stages after the export.

    Args:
        recipe: what is asked.
        inputs: what it reads.
        state: what earlier runs did.
        done: told of every stage.
        on_progress: told what is being done.
    """

    def __init__(
        self,
        recipe: PipelineRecipe,
        inputs: Inputs,
        state: State,
        *,
        done: Done,
        on_progress: Callable[[str], None],
    ) -> None:
        self.recipe, self.inputs, self.state = recipe, inputs, state
        self.done, self.on_progress = done, on_progress
        self.tools = tools()
        self.host = Host.here()
        self.runtime = RuntimeOptions(threads=None if recipe.bench is None else recipe.bench.threads)
        self._eager: Any = None

    def verify_key(self, bundle: Bundle) -> str:
        """Return what the result of :meth:`verify` depends on."""
        return digest_of(
            bundle=bundle.digest,
            host=self.host.fingerprint(),
            threads=self.runtime.threads,
            tools=self.tools,
        )

    def verify(self, bundle: Bundle) -> dict[str, Any]:
        """Return what ``edgeclip verify --json`` says here.

        Raises:
            BundleError: a file is damaged.
        """
        key, began = self.verify_key(bundle), time.perf_counter()
        found: dict[str, Any] | None = self.state.result("verify", key)
        if found is None:
            self.on_progress("verify")
            report = verify_bundle(bundle, options=self.runtime)
            if report.damaged:
                report.raise_for()
            said = report.to_dict()
            self.state.keep("verify", key, said)
            self.done("verify", began, count(len(said["variants"]), "variant"))
            return said
        self.done("verify", began, count(len(found["variants"]), "variant"), reused=True)
        return found

    def bench_key(self, bundle: Bundle, name: str) -> str:
        """Return what the times of a variant depend on."""
        spec = self.recipe.bench
        assert spec is not None
        asked = {key: value for key, value in msgspec.to_builtins(spec).items() if key != "variants"}
        return digest_of(
            towers=_tower_digests(bundle, name),
            asked=asked,
            images=self.inputs.digests.get(spec.images or ""),
            host=self.host.fingerprint(),
            tools=self.tools,
        )

    def bench(self, bundle: Bundle) -> tuple[dict[str, LatencyReport], dict[str, str]]:
        """Return the times of variants, and why others were not timed."""
        spec = self.recipe.bench
        if spec is None:
            return {}, {}
        began, reused = time.perf_counter(), 0
        timed: dict[str, LatencyReport] = {}
        left: dict[str, str] = {}
        effort = Effort(spec.samples, spec.duration_s, spec.batch)
        images = _images(self.inputs.root, spec.images)
        for name in spec.variants or tuple(bundle.manifest.variants):
            variant = bundle.variant(name)
            problem = unmet(variant, options=self.runtime, host=self.host)
            if problem is not None:
                left[name] = problem
                continue
            key = self.bench_key(bundle, name)
            found = self.state.result(f"bench {name}", key)
            if found is not None:
                reused += 1
                timed[name] = LatencyReport.from_dict(found)
                continue
            self.on_progress(f"bench {name}")
            try:
                report = time_variant(variant, options=self.runtime, effort=effort, images=images)
            except (BackendError, BundleError) as error:
                left[name] = str(error)
                continue
            self.state.keep(f"bench {name}", key, report.to_dict())
            timed[name] = report
        note = count(len(timed), "variant") + (f", {len(left)} cannot run here" if left else "")
        self.done("bench", began, note, reused=bool(timed) and reused == len(timed))
        return timed, left

    def measure_key(self, bundle: Bundle, gate: AccuracyGate | LatencyGate) -> str:
        """Return what the measurement of a gate depends on."""
        digests = self.inputs.digests
        names = [gate.variant, gate.against if isinstance(gate, AccuracyGate) else gate.baseline]
        paths = [value for value in msgspec.to_builtins(gate).values() if isinstance(value, str)]
        bench = self.recipe.bench
        return digest_of(
            asked=asked_of(gate),
            towers=[_tower_digests(bundle, name) for name in names if name in bundle.manifest.variants],
            contents={said: digests[said] for said in paths if said in digests},
            checkpoint=digests.get(CHECKPOINT),
            threads=self.runtime.threads,
            batch=None if bench is None else bench.batch,
            host=self.host.fingerprint(),
            tools=self.tools,
        )

    def measure(self, bundle: Bundle) -> tuple[dict[str, Measured], dict[str, str]]:
        """Return what gates need, and why something could not be had."""
        gates = [gate for gate in self.recipe.gate if isinstance(gate, AccuracyGate | LatencyGate)]
        measured: dict[str, Measured] = {}
        unmeasured: dict[str, str] = {}
        began, reused = time.perf_counter(), 0
        for gate in gates:
            stage, key = f"measure {gate.name}", self.measure_key(bundle, gate)
            stored = self.state.result(stage, key)
            if stored is not None and is_settled(gate, found := msgspec.convert(stored, Measured)):
                reused += 1
                measured[gate.name] = found
                continue
            self.on_progress(f"measure {gate.name}")
            asked = asked_of(gate)
            try:
                if isinstance(gate, AccuracyGate):
                    found = Measured(asked=asked, accuracy=self._accuracy(bundle, gate))
                else:
                    found = Measured(asked=asked, ratio=self._ratio(bundle, gate))
            except BackendError as error:
                unmeasured[gate.name] = str(error)
                continue
            self.state.keep(stage, key, msgspec.to_builtins(found))
            measured[gate.name] = found
        if gates:
            note = f"{len(measured)} measured" + (f", {len(unmeasured)} could not be" if unmeasured else "")
            self.done("gates", began, note, reused=reused == len(gates))
        if self._eager is not None:
            self._eager.close()
        return measured, unmeasured

    def _accuracy(self, bundle: Bundle, gate: AccuracyGate) -> Accuracy:
        from .pipeline_accuracy import measure_accuracy

        def eager() -> Any:
            if self._eager is None:
                from edgeclip.distill.eager import open_eager

                self._eager = open_eager(
                    str(self.inputs.checkpoint), model=self.inputs.model, threads=self.runtime.threads
                )
            return self._eager

        return measure_accuracy(
            bundle, gate, root=self.inputs.root, options=self.runtime, eager=eager,
            on_progress=self.on_progress,
        )  # fmt: skip

    def _ratio(self, bundle: Bundle, gate: LatencyGate) -> RatioEntry:
        other = (
            bundle if gate.baseline_bundle is None else Bundle.open(self.inputs.root / gate.baseline_bundle)
        )
        batch = 1 if self.recipe.bench is None else self.recipe.bench.batch
        found = compare_towers(
            bundle.variant(gate.variant),
            other.variant(gate.baseline),
            tower=gate.tower,
            options=self.runtime,
            effort=Effort(gate.blocks, gate.duration_s, batch),
        )
        return RatioEntry(
            a=gate.variant,
            b=gate.baseline,
            ratio=found.ratio,
            low=found.low,
            high=found.high,
            n=found.n,
            confidence=found.confidence,
            seed=found.seed,
            a_samples_ms=tuple(found.a.samples_ms.tolist()),
            b_samples_ms=tuple(found.b.samples_ms.tolist()),
        )


def _tower_digests(bundle: Bundle, name: str) -> list[str]:
    variant = bundle.variant(name)
    return [variant.tower_digest(tower) for tower in sorted(variant.entry.towers)]


def _images(root: Path, said: str | None) -> list[Path | bytes]:
    return [] if said is None else [sample.source for sample in read_samples([root / said])]


def count(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
