"""Run a pipeline recipe: export, verify, time, judge; and leave one folder that CI can keep.

Everything that was done is noted in ``state.json`` beside the bundle, with the digest of what it was made
from: contents of files, options, versions of tools. Another run takes over what has not changed. The state is
written after what it speaks of, atomically, so that a process killed at any moment leaves a folder in which
another run succeeds; what it cannot vouch for is done again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from edgeclip.bundle import Bundle, BundleWriter
from edgeclip.errors import BundleError, InputError, ParityError

from .artifacts import Inconclusive, PipelineReport, StageOutcome
from .device_report import DeviceReport
from .gates import Finding, Verdict
from .options import Checkpoint, ExportSettings, Gates, References, Step
from .pipeline_inputs import CHECKPOINT, Inputs, digest_of, limits_of, offered_of
from .pipeline_judge import Stored, gates_of, judged, now, read_stored
from .pipeline_measure import Measuring, count
from .pipeline_recipe import (
    AccuracyGate,
    ExportSpec,
    LatencyGate,
    ParityGate,
    PipelineRecipe,
    SectionSpec,
    is_int8,
    recipe_variants,
)
from .pipeline_state import ARTIFACTS, State, locked, write_artifacts
from .variants import VariantSpec

__all__ = ["PipelineOptions", "Planned", "judge_bundle", "judge_run", "plan_pipeline", "run_pipeline"]

_BUNDLE: Final = "bundle"
_SENSITIVITY: Final = "sensitivity"
_NEW: Final = ".bundle-new"
_OLD: Final = ".bundle-old"


@dataclass(frozen=True)
class PipelineOptions:
    """How to run.

    Attributes:
        root: folder that paths of the recipe are relative to.
        out: folder of the run.
        inconclusive: what an inconclusive gate counts as.
        force: do everything again.
        on_note: told what was done or taken over, a line each.
        on_progress: told what is being done.
    """

    root: Path
    out: Path
    inconclusive: Inconclusive = "report"
    force: bool = False
    on_note: Callable[[str], None] = lambda said: None
    on_progress: Callable[[str], None] = lambda said: None


@dataclass(frozen=True)
class Planned:
    """One stage of a dry run: what it is about, and whether it would be taken over."""

    name: str
    what: str
    outcome: str


# --- the three ways in -------------------------------------------------------------------------------------


def run_pipeline(recipe: PipelineRecipe, options: PipelineOptions) -> PipelineReport:
    """Run a recipe and write its artifacts.

    A variant that does not agree with float32 ends the run with a failed gate and not with an error, so that
    CI has a summary of it.

    Raises:
        ConfigError: the recipe names what is not there.
        MissingExtraError: a package that the export needs is not installed.
        InputError: something that is read cannot be used, or the folder cannot be written.
        BundleError: the bundle is damaged, or another run is at work in the folder.
        ExportError: the model cannot be exported.
    """
    inputs = Inputs.of(recipe, options.root)
    with locked(options.out):
        for name in ARTIFACTS:  # of an earlier run: nobody should take them for this one's
            (options.out / name).unlink(missing_ok=True)
        run = _Run(recipe, options, inputs, State.load(options.out, options.force))
        report = run.all()
        write_artifacts(report, options.out)
    return report


def plan_pipeline(recipe: PipelineRecipe, options: PipelineOptions) -> tuple[Planned, ...]:
    """Return what a run would do; nothing is written.

    Raises:
        ConfigError: the recipe names what is not there.
        InputError: something cannot be read.
    """
    inputs = Inputs.of(recipe, options.root)
    state = State.load(options.out, options.force)
    return _Run(recipe, options, inputs, state).plan()


def judge_run(
    recipe: PipelineRecipe, options: PipelineOptions, reports: Sequence[DeviceReport]
) -> PipelineReport:
    """Judge a finished run again, with what devices reported; measure nothing, and write the artifacts.

    Raises:
        InputError: the folder holds no report of a run, or one of another bundle.
        BundleError: the bundle is missing or damaged.
    """
    path = options.out / "report.json"
    said = read_stored(path)
    if said.bundle is None:
        raise InputError(
            f"{str(path)!r}: its run ended without a bundle, and its summary.md says why; "
            "run the pipeline again."
        )
    with locked(options.out):
        own = options.out / _BUNDLE
        bundle = Bundle.open(own if recipe.model.bundle is None else options.root / recipe.model.bundle)
        if bundle.digest != said.bundle.get("digest"):
            raise InputError(
                f"{str(path)!r} is about the bundle {str(said.bundle.get('digest'))[:12]}…, got "
                f"{bundle.digest[:12]}… in {str(bundle.path)!r}; run the pipeline again."
            )
        report = judged(recipe, bundle, said, reports, options.inconclusive)
        write_artifacts(report, options.out)
    return report


def judge_bundle(
    recipe: PipelineRecipe,
    bundle: Bundle,
    reports: Sequence[DeviceReport],
    *,
    inconclusive: Inconclusive = "report",
) -> PipelineReport:
    """Judge a bundle by its manifest and by what devices reported; measure and write nothing."""
    return judged(recipe, bundle, Stored(), reports, inconclusive)


# --- stages ------------------------------------------------------------------------------------------------


class _Run:
    """One run of a recipe."""

    def __init__(
        self, recipe: PipelineRecipe, options: PipelineOptions, inputs: Inputs, state: State
    ) -> None:
        self.recipe, self.options, self.inputs, self.state = recipe, options, inputs, state
        self.outcomes: list[StageOutcome] = []
        self.measuring = Measuring(recipe, inputs, state, done=self._done, on_progress=options.on_progress)

    def all(self) -> PipelineReport:
        """Do what is not done yet."""
        began = time.perf_counter()
        try:
            bundle = self._bundle()
        except ParityError as error:
            self._done("export", began, "numbers are beyond their limits", failed=True)
            return self._without_bundle(error)
        verified = self.measuring.verify(bundle)
        bench, not_timed = self.measuring.bench(bundle)
        measured, unmeasured = self.measuring.measure(bundle)
        said = Stored(
            verify=verified,
            bench=bench,
            not_timed=not_timed,
            measured=measured,
            unmeasured=unmeasured,
            stages=tuple(self.outcomes),
            remarks=tuple(self.state.remarks),
            host=self.measuring.host.to_dict(),
            versions=self.measuring.tools,
        )
        return judged(self.recipe, bundle, said, (), self.options.inconclusive)

    def plan(self) -> tuple[Planned, ...]:
        """Return what :meth:`all` would do."""
        lines = []
        bundle: Bundle | None = None
        if self.inputs.bundle is not None:
            bundle = Bundle.open(self.inputs.bundle)
            lines.append(Planned("bundle", str(self.inputs.bundle), "is judged as it is"))
        else:
            lines.append(Planned("checkpoint", f"sha256 {self.inputs.digests[CHECKPOINT][:12]}…", "is read"))
            wanted = self._wanted()
            bundle, kept = self._built(wanted)
            lines += [Planned("export", name, "reused" if name in kept else "to do") for name in wanted]
            if set(kept) != set(wanted) or (bundle and set(bundle.manifest.variants) != set(wanted)):
                bundle = None
        verified = bundle and self.state.result("verify", self.measuring.verify_key(bundle))
        lines.append(Planned("verify", "every variant, on this host", "reused" if verified else "to do"))
        if self.recipe.bench is not None:
            names = self.recipe.bench.variants or tuple(
                bundle.manifest.variants if bundle else self._wanted()
            )
            for name in names:
                timed = bundle and self.state.result(f"bench {name}", self.measuring.bench_key(bundle, name))
                lines.append(Planned("bench", name, "reused" if timed else "to do"))
        for gate in gates_of(self.recipe):
            outcome = "judged"
            if isinstance(gate, AccuracyGate | LatencyGate):
                found = bundle and self.state.result(
                    f"measure {gate.name}", self.measuring.measure_key(bundle, gate)
                )
                outcome = "measurement reused" if found else "to be measured"
            lines.append(Planned("gate", f"{gate.name} ({gate.__struct_config__.tag})", outcome))
        return tuple(lines)

    # --- the bundle

    def _bundle(self) -> Bundle:
        if self.inputs.bundle is not None:
            return Bundle.open(self.inputs.bundle)
        for name in (_NEW, _OLD):  # of a run that was killed
            shutil.rmtree(self.options.out / name, ignore_errors=True)
        began = time.perf_counter()
        assert self.recipe.export is not None
        self._done("checkpoint", began, f"sha256 {self.inputs.digests[CHECKPOINT][:12]}…")
        wanted = self._wanted()
        began = time.perf_counter()
        bundle, kept = self._built(wanted)
        path = self.options.out / _BUNDLE
        if bundle is not None and set(kept) == set(wanted) == set(bundle.manifest.variants):
            self.state.remarks += self.state.stages["export"]["result"]["remarks"]
            self._done("export", began, count(len(kept), "variant"), reused=True)
            return bundle
        fresh = bundle is None or not kept
        target = self.options.out / _NEW if fresh else path
        built = dict(kept)
        for section, specs in recipe_variants(self.recipe):
            missing = [spec for spec in specs if spec.name not in kept]
            if missing:
                bundle = self._export(section, missing, target)
                built |= {spec.name: wanted[spec.name] for spec in missing}
                if not fresh:
                    self._keep_export(bundle, built)
        bundle = self._tidied(target, wanted)
        if fresh:
            if path.exists():
                path.rename(self.options.out / _OLD)
            target.rename(path)
            shutil.rmtree(self.options.out / _OLD, ignore_errors=True)
            bundle = Bundle.open(path)
        self._keep_export(bundle, wanted)
        taken = f", {len(kept)} reused" if kept else ""
        self._done("export", began, f"{count(len(wanted) - len(kept), 'variant')} made{taken}")
        return bundle

    def _keep_export(self, bundle: Bundle, built: Mapping[str, str]) -> None:
        result = {"variants": dict(built), "remarks": list(self.state.remarks)}
        self.state.keep("export", bundle.digest, result)

    def _wanted(self) -> dict[str, str]:
        """Return the key of every variant of the recipe: what its files depend on."""
        export = self.recipe.export
        assert export is not None
        return {
            spec.name: self._variant_key(export, section, spec, specs)
            for section, specs in recipe_variants(self.recipe)
            for spec in specs
        }

    def _variant_key(
        self, export: ExportSpec, section: SectionSpec, spec: VariantSpec, siblings: Sequence[VariantSpec]
    ) -> str:
        digests = self.inputs.digests
        limits = self._limits(export, spec)
        return digest_of(
            checkpoint=digests[CHECKPOINT],
            model=self.inputs.model,
            variant=spec.name,
            graph=asdict(export.graph(section)),
            labels=digests.get(export.labels) if isinstance(export.labels, str) else export.labels,
            templates=digests.get(export.templates or "", export.templates),
            reference=digests.get(export.reference or ""),
            limits=limits,
            calibration=self._int8_key(export, spec, siblings) if is_int8([spec]) else None,
            tools=self.measuring.tools,
        )

    def _int8_key(
        self, export: ExportSpec, spec: VariantSpec, siblings: Sequence[VariantSpec]
    ) -> dict[str, Any]:
        """Return what only int8 variants depend on."""
        digests, calibration = self.inputs.digests, self.recipe.calibration
        target = calibration.target()
        said: dict[str, Any] = {
            "data": digests.get(calibration.data or ""),
            "samples": calibration.samples,
            "selection": calibration.selection,
            "seed": calibration.seed,
            "method": calibration.method,
            "text": calibration.text,
            "target": None if target is None else target.to_dict(),
            "latency_table": digests.get(calibration.latency_table or ""),
        }
        if calibration.finish_int8 is not None:
            # One training serves all of a section, and is for the coarsest weights among them.
            finished = [other for other in siblings if is_int8([other])]
            said["finish_int8"] = calibration.finish_int8
            said["finished"] = {other.name: self._limits(export, other) for other in finished}
        return said

    def _limits(self, export: ExportSpec, spec: VariantSpec) -> list[dict[str, Any]]:
        said = (spec.form.precision, spec.name)
        return [asdict(change) for change in limits_of(export) if change.where in said]

    def _built(self, wanted: Mapping[str, str]) -> tuple[Bundle | None, dict[str, str]]:
        """Return the bundle of an earlier run if it is what the state says, and the variants still wanted."""
        said = self.state.stages.get("export")
        if said is None:
            return None, {}
        try:
            bundle = Bundle.open(self.options.out / _BUNDLE)
            if bundle.digest != said["key"]:
                return None, {}
            bundle.check_files()
        except BundleError:
            return None, {}
        built = {
            name: key
            for name, key in said["result"]["variants"].items()
            if wanted.get(name) == key and name in bundle.manifest.variants
        }
        return bundle, built

    def _export(self, section: SectionSpec, specs: Sequence[VariantSpec], target: Path) -> Bundle:
        from .exporter import export_bundle

        export = self.recipe.export
        assert export is not None
        assert self.inputs.checkpoint is not None
        names = {spec.form.precision for spec in specs} | {spec.name for spec in specs}
        root, calibration = self.inputs.root, self.recipe.calibration
        settings = ExportSettings(
            graph=export.graph(section),
            build=calibration.build(
                specs,
                root,
                reports=self.options.out / _SENSITIVITY,
                threads=self.measuring.runtime.threads,
            ),
            references=References(
                pictures=None if export.reference is None else root / export.reference,
                calibration=None if calibration.data is None else root / calibration.data,
                calibration_samples=calibration.samples,
                calibration_selection=calibration.selection,
                calibration_seed=calibration.seed,
                offered=offered_of(export, root),
            ),
            gates=Gates(tuple(change for change in limits_of(export) if change.where in names)),
            threads=self.measuring.runtime.threads,
            finish_int8=(calibration.finish_int8 or 0) if is_int8(specs) else 0,
        )
        checkpoint = Checkpoint(str(self.inputs.checkpoint), self.inputs.model)
        exported = export_bundle(checkpoint, specs, target, settings, on_step=self._on_step)
        self.state.remarks += [
            remark for remark in exported.report.remarks if remark not in self.state.remarks
        ]
        return exported.bundle

    def _tidied(self, target: Path, wanted: Mapping[str, str]) -> Bundle:
        """Take out variants that the recipe no longer has, and say which recipe the rest is from."""
        from .exporter import default_order

        with BundleWriter(target) as writer:
            manifest = writer.manifest
            manifest["variants"] = {name: manifest["variants"][name] for name in wanted}
            manifest["default_variants"] = default_order(manifest["variants"])
            provenance = manifest.setdefault("provenance", {})
            provenance["recipe"] = {"name": self.recipe.name, "variants": dict(wanted)}
            known = provenance.get("variants", {})
            provenance["variants"] = {name: said for name, said in known.items() if name in wanted}
            writer.commit()
        with BundleWriter(target) as writer:  # a write leaves the files of the one before: others may read
            return writer.commit()

    def _without_bundle(self, error: ParityError) -> PipelineReport:
        """Return the report of a run whose export failed its own gate."""
        why = (
            f"{error} A recipe says so in [export] 'reference', 'labels' and 'limits', and in [calibration] "
            "'data', 'samples', 'int8_target' and 'finish_int8'."
        )
        wrong = Finding("export", "failed", "wrong numbers", "within its limits", why)
        unjudged = Finding("bundle", "inconclusive", "no bundle", "a bundle", "its export failed")
        verdicts = [
            Verdict(
                gate.name,
                str(gate.__struct_config__.tag),
                (wrong if isinstance(gate, ParityGate) else unjudged,),
            )
            for gate in gates_of(self.recipe)
        ]
        if (self.options.out / _BUNDLE).is_dir():
            self.state.remarks.append(f"{_BUNDLE}/ is of an earlier run")
        return PipelineReport(
            recipe=self.recipe.name,
            recipe_digest=digest_of(recipe=msgspec.to_builtins(self.recipe)),
            created=now(),
            inconclusive=self.options.inconclusive,
            verdicts=tuple(verdicts),
            stages=tuple(self.outcomes),
            manifest=None,
            bundle=None,
            verify={},
            bench={},
            not_timed={},
            measured={},
            unmeasured={},
            device_reports=(),
            host=self.measuring.host.to_dict(),
            versions=self.measuring.tools,
            remarks=tuple(self.state.remarks),
        )

    # --- what is told

    def _on_step(self, step: Step) -> None:
        took = "" if step.seconds is None else f": {step.seconds:.1f} s"
        self.options.on_progress(f"export: {step.name}{took}")

    def _done(
        self, stage: str, began: float, note: str, *, reused: bool = False, failed: bool = False
    ) -> None:
        seconds = round(time.perf_counter() - began, 3)
        outcome = StageOutcome(stage, "failed" if failed else "reused" if reused else "done", seconds, note)
        self.outcomes.append(outcome)
        self.options.on_note(f"{stage}: {outcome.outcome}, {note}")
