"""Pipeline recipes: TOML files that say what is exported for which devices, and when that is good enough.

A recipe is ``schema = 1``, ``kind = "pipeline"`` and the tables below; every table is a class here, every key
an attribute. Reading is as strict as that of training recipes. Paths are relative to the recipe's folder, or
to the working directory for the recipes that come with edgeclip.

    schema = 1
    kind = "pipeline"
    name = "cpu-int8"

    [model]
    checkpoint = "run/model"

    [export]
    variants = ["onnx-fp32", "onnx-int8@x86-avx2"]

    [[gate]]
    kind = "size"
    max_mb = 20

Knows neither torch nor onnx, and opens no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from edgeclip.calibration.dataset import Method
from edgeclip.calibration.ranges import RangeMethod
from edgeclip.calibration.sensitivity import Int8Target
from edgeclip.distill.recipe_text import convert, mapping, parse_tables, tables
from edgeclip.errors import ConfigError

from .build import BuildOptions, Int8Search, Int8Settings
from .options import METHOD, OPSET, ExportSettings, Gates, GraphOptions, LimitChange
from .variants import VariantSpec, parse_variants

__all__ = [
    "AccuracyGate",
    "BenchSpec",
    "CalibrationSpec",
    "DeviceReportGate",
    "ExportSpec",
    "GateSpec",
    "LatencyGate",
    "LicenceGate",
    "ModelSpec",
    "ParityGate",
    "PipelineRecipe",
    "SectionSpec",
    "SizeGate",
    "gate_variants",
    "is_int8",
    "parse_pipeline",
    "recipe_variants",
]

_EXAMPLE = "model.checkpoint=run/model"

_LARGEST = 1e12  # TOML has inf and nan
Positive = Annotated[float, Meta(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Word = Annotated[str, Meta(min_length=1, max_length=200)]
GateName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@+-]*$", max_length=100)]


class _Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a recipe."""


class ModelSpec(_Table, frozen=True, kw_only=True):
    """What goes in.

    Attributes:
        checkpoint: a checkpoint's directory, a published weights file, or a model of the zoo whose weights
            were pulled.
        model: name of the model, where it is a file that does not tell.
        bundle: instead: a finished bundle, which is judged as it is.
    """

    checkpoint: Word | None = None
    model: Word | None = None
    bundle: Word | None = None


class SectionSpec(_Table, frozen=True, kw_only=True):
    """Variants that want graphs of their own, for the same bundle.

    Attributes:
        variants: ``NAME[@TARGET]`` each.
        target: of those that name none.
        static_batch: the one batch their towers take.
        opset: of ONNX.
    """

    variants: Annotated[tuple[Word, ...], Meta(min_length=1)]
    target: Word | None = None
    static_batch: Count | None = None
    opset: int = OPSET


class ExportSpec(_Table, frozen=True, kw_only=True):
    """What is made of it.

    Attributes:
        variants: ``NAME[@TARGET]`` each.
        target: of those that name none.
        static_batch: the one batch the towers take; any if not given.
        opset: of ONNX, 17 to 24.
        float_input: pictures come as float32 ``(B, 3, H, W)``, normalized on the host.
        text: whether there is a text tower.
        labels: labels of the bundle: a file, or a list of names.
        templates: prompts around them: a name or a file.
        reference: pictures that variants are compared on: a folder, table or shards.
        limits: ``PRECISION|VARIANT:NUMBER=LIMIT`` each: limits of parity that are set on purpose.
        section: further variants for the same bundle.
    """

    variants: Annotated[tuple[Word, ...], Meta(min_length=1)]
    target: Word | None = None
    static_batch: Count | None = None
    opset: int = OPSET
    float_input: bool = False
    text: bool = True
    labels: Word | tuple[Word, ...] | None = None
    templates: Word | None = None
    reference: Word | None = None
    limits: tuple[Word, ...] = ()
    section: tuple[SectionSpec, ...] = ()

    @property
    def sections(self) -> tuple[SectionSpec, ...]:
        """This table and those below it, alike."""
        own = SectionSpec(
            variants=self.variants, target=self.target, static_batch=self.static_batch, opset=self.opset
        )
        return (own, *self.section)

    def graph(self, section: SectionSpec) -> GraphOptions:
        """Return the choices about the graphs of a section.

        Raises:
            ConfigError: a number is out of range.
        """
        return GraphOptions(
            opset=section.opset,
            static_batch=section.static_batch,
            float_input=self.float_input,
            text=self.text,
        )


class CalibrationSpec(_Table, frozen=True, kw_only=True):
    """How int8 is made.

    Attributes:
        data: pictures that ranges are chosen on: a folder, table, shards, or a finished calibration set;
            other crops of those that variants are compared on if not given.
        samples: pictures, and texts, at most; 64 and 256 if not given.
        selection: how they are chosen.
        seed: of that choice.
        method: how ranges are chosen, as ``edgeclip export --int8-method`` takes it; what suits the kind of
            tower if not given.
        text: compute text towers in int8 (``full``), or store only their ``weights`` so.
        int8_target: leave products in float until int8 reaches this, as ``edgeclip export --int8-target``
            takes it; a fixed policy if not given.
        latency_table: what products take on the device, from ``edgeclip bench --per-op``; measured on this
            host if not given.
        finish_int8: steps of training that image towers get first, so that int8 costs them less.
    """

    data: Word | None = None
    samples: Annotated[int, Meta(ge=16, le=100_000)] | None = None
    selection: Method = METHOD
    seed: Annotated[int, Meta(ge=0)] = 0
    method: Word | None = None
    text: Literal["full", "weights"] = "weights"
    int8_target: Word | None = None
    latency_table: Word | None = None
    finish_int8: Count | None = None

    def int8(self) -> Int8Settings:
        """Return how ranges are chosen.

        Raises:
            ConfigError: there is no such method.
        """
        return Int8Settings(None if self.method is None else RangeMethod.parse(self.method), text=self.text)

    def target(self) -> Int8Target | None:
        """Return what int8 has to keep, where that decides what stays float.

        Raises:
            ConfigError: it cannot be read.
        """
        return None if self.int8_target is None else Int8Target.parse(self.int8_target)

    def build(
        self,
        specs: Sequence[VariantSpec],
        root: Path = Path(),
        *,
        reports: Path | None = None,
        threads: int | None = None,
    ) -> BuildOptions:
        """Return the choices about these variants.

        Args:
            specs: what is made.
            root: folder that paths are relative to.
            reports: where the choice of what stays float is written down.
            threads: of every engine; usable cores if not given.

        Raises:
            ConfigError: method or target cannot be read.
        """
        target, table = self.target(), self.latency_table
        search = Int8Search(target, None if table is None else root / table, reports, threads)
        wanted = target is not None and is_int8(specs)
        return BuildOptions(
            int8=search if wanted else None,
            quantization=self.int8(),
        )


class BenchSpec(_Table, frozen=True, kw_only=True):
    """What is timed on this host.

    Attributes:
        variants: those that are; all that run here if not given.
        threads: of a call; usable cores if not given.
        batch: pictures a call of the image tower.
        samples: calls at least.
        duration_s: seconds at least, for each variant.
        images: pictures to time from file to answer as well: a folder, table or shards.
    """

    variants: tuple[Word, ...] = ()
    threads: Count | None = None
    batch: Annotated[int, Meta(ge=1, le=1024)] = 1
    samples: Count = 100
    duration_s: Annotated[float, Meta(ge=0, le=3600)] = 1.0
    images: Word | None = None


# --- gates -------------------------------------------------------------------------------------------------


class ParityGate(_Table, frozen=True, kw_only=True, tag_field="kind", tag="parity"):
    """Variants give the numbers of the float32 model, here and on the devices that reported.

    Attributes:
        name: as reports call it.
        variants: those that must; all if not given.
        require_verified: each must have been run on its own engine somewhere: at the export, here, or on a
            device that reported.
    """

    name: GateName = ""
    variants: tuple[Word, ...] = ()
    require_verified: bool = False


class AccuracyGate(_Table, frozen=True, kw_only=True, tag_field="kind", tag="accuracy"):
    """A variant is good at its task.

    Attributes:
        name: as reports call it.
        data: whatever ``edgeclip eval`` takes.
        variant: which.
        metric: what is measured; those of retrieval need captions in the data.
        min: least that is good enough.
        max_drop: most it may be below ``against``.
        against: ``"eager"``, the checkpoint itself, or another variant.
        labels: labels offered: a file, or a list of names; those of the data if not given.
        language: whose aliases are offered.
        templates: prompts: a name or a file.
        limit: pictures at most, spread over the data.
    """

    name: GateName = ""
    data: Word
    variant: Word
    metric: Literal[
        "top1",
        "top5",
        "mean_per_class_recall",
        "image_to_text_r1",
        "image_to_text_r5",
        "text_to_image_r1",
        "text_to_image_r5",
    ] = "top1"
    min: Share | None = None
    max_drop: Share | None = None
    against: Word = "eager"
    labels: Word | tuple[Word, ...] | None = None
    language: Word | None = None
    templates: Word | None = None
    limit: Count | None = None


class SizeGate(_Table, frozen=True, kw_only=True, tag_field="kind", tag="size"):
    """Files are small enough.

    Attributes:
        name: as reports call it.
        max_mb: most, in millions of bytes.
        of: each variant with all its files, each single file of a variant, or the whole bundle.
        variants: those that are looked at; all if not given.
    """

    name: GateName = ""
    max_mb: Positive
    of: Literal["variant", "file", "bundle"] = "variant"
    variants: tuple[Word, ...] = ()


class LicenceGate(_Table, frozen=True, kw_only=True, tag_field="kind", tag="licence"):
    """The model and everything it descends from is under terms of a list.

    Attributes:
        name: as reports call it.
        allow: SPDX identifiers.
    """

    name: GateName = ""
    allow: Annotated[tuple[Word, ...], Meta(min_length=1)]


class LatencyGate(_Table, frozen=True, kw_only=True, tag_field="kind", tag="latency"):
    """A variant is not slower than a baseline, measured in turns on this host.

    Attributes:
        name: as reports call it.
        variant: which.
        baseline: the other variant.
        baseline_bundle: bundle of the other variant, such as that of the last release; the same one if not
            given.
        max_ratio: most its time may be of the baseline's.
        tower: which one of both.
        blocks: of four calls, at least.
        duration_s: seconds at least.
    """

    name: GateName = ""
    variant: Word
    baseline: Word
    baseline_bundle: Word | None = None
    max_ratio: Positive = 1.0
    tower: Literal["image", "text"] = "image"
    blocks: Annotated[int, Meta(ge=6, le=100_000)] = 60
    duration_s: Annotated[float, Meta(ge=0, le=3600)] = 2.0


class DeviceReportGate(_Table, frozen=True, kw_only=True, tag_field="kind", tag="device-report"):
    """A device ran a variant of this bundle and reported.

    Attributes:
        name: as reports call it.
        device: name that its report gives.
        variant: which.
        stage: of its latency report.
        p50_ms: most that half of the calls may take; without this and the next, times are told, not judged.
        p90_ms: most that nine in ten calls may take.
    """

    name: GateName = ""
    device: Word
    variant: Word
    stage: Word = "image_tower"
    p50_ms: Positive | None = None
    p90_ms: Positive | None = None


GateSpec: TypeAlias = ParityGate | AccuracyGate | SizeGate | LicenceGate | LatencyGate | DeviceReportGate


class PipelineRecipe(_Table, frozen=True, kw_only=True):
    """A whole recipe.

    Attributes:
        name: of the recipe.
        model: what goes in.
        export: what is made of it; ``None`` where a finished bundle is judged.
        calibration: what int8 ranges are chosen on.
        bench: what is timed; ``None`` for nothing.
        gate: what has to hold, each with a name.
    """

    name: Word
    model: ModelSpec = ModelSpec()
    export: ExportSpec | None = None
    calibration: CalibrationSpec = CalibrationSpec()
    bench: BenchSpec | None = None
    gate: tuple[GateSpec, ...] = ()


def parse_pipeline(
    content: bytes, *, where: str = "recipe", changes: Iterable[str] = (), for_gates: bool = False
) -> PipelineRecipe:
    """Return the recipe of TOML text.

    Args:
        content: the text.
        where: the recipe, as messages name it.
        changes: ``key=value`` with dotted keys and TOML values, as ``--set`` takes them.
        for_gates: only its gates are asked for: it need not say what goes in.

    Raises:
        ConfigError: it cannot be used; the message names the key, what was found and what was expected.
    """
    said = parse_tables(content, where=where, kind="pipeline", changes=changes, example=_EXAMPLE)
    found: dict[str, Any] = {}
    for key, kind in (("model", ModelSpec), ("calibration", CalibrationSpec), ("bench", BenchSpec)):
        if key in said:
            found[key] = convert(said.pop(key), kind, f"{where}: [{key}]")
    if "export" in said:
        found["export"] = _export(said.pop("export"), where)
    gates = tuple(
        convert(table, GateSpec, f"{where}: [[gate]] {index}")
        for index, table in enumerate(tables(said.pop("gate", []), f"{where}: gate"))
    )
    checked: PipelineRecipe = convert(said, PipelineRecipe, where)
    recipe = msgspec.structs.replace(checked, gate=_named(gates, where), **found)
    if not for_gates or recipe.model != ModelSpec():
        _check_model(recipe, where)
    _check(recipe, where)
    return recipe


def recipe_variants(recipe: PipelineRecipe) -> tuple[tuple[SectionSpec, tuple[VariantSpec, ...]], ...]:
    """Return the variants of each section; none where a finished bundle is judged.

    Raises:
        ConfigError: a name cannot be read.
    """
    if recipe.export is None:
        return ()
    return tuple(
        (section, parse_variants(section.variants, target=section.target))
        for section in recipe.export.sections
    )


def gate_variants(gate: GateSpec) -> tuple[str, ...]:
    """Return the variants of the bundle that a gate names."""
    if isinstance(gate, ParityGate | SizeGate):
        return gate.variants
    if isinstance(gate, LicenceGate):
        return ()
    named = [gate.variant]
    if isinstance(gate, LatencyGate) and gate.baseline_bundle is None:
        named.append(gate.baseline)
    if isinstance(gate, AccuracyGate) and gate.max_drop is not None and gate.against != "eager":
        named.append(gate.against)
    return tuple(named)


def is_int8(specs: Iterable[VariantSpec]) -> bool:
    """Return whether any of these variants is int8."""
    return any(spec.form.precision == "int8" for spec in specs)


@contextmanager
def _within(at: str) -> Iterator[None]:
    """Let errors of choices name the place they stand at."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{at}: {error}") from error


def _export(said: Any, where: str) -> ExportSpec:
    rest = dict(mapping(said, f"{where}: [export]"))
    sections = tuple(
        convert(table, SectionSpec, f"{where}: [[export.section]] {index}")
        for index, table in enumerate(tables(rest.pop("section", []), f"{where}: export.section"))
    )
    checked: ExportSpec = convert(rest, ExportSpec, f"{where}: [export]")
    return msgspec.structs.replace(checked, section=sections)


def _named(gates: tuple[GateSpec, ...], where: str) -> tuple[GateSpec, ...]:
    """Return the gates, each with a name of its own.

    Raises:
        ConfigError: two have the same name.
    """
    named = [
        gate if gate.name else msgspec.structs.replace(gate, name=f"{_kind(gate)} {index}")
        for index, gate in enumerate(gates)
    ]
    names = [gate.name for gate in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: [[gate]]: the names {twice} stand twice; names must differ.")
    return tuple(named)


def _kind(gate: GateSpec) -> str:
    return str(gate.__struct_config__.tag)


def _check_model(recipe: PipelineRecipe, where: str) -> None:
    """Raise where it is not said once what goes in."""
    model, export = recipe.model, recipe.export
    given = sorted(key for key in ("checkpoint", "bundle") if getattr(model, key) is not None)
    if len(given) != 1:
        raise ConfigError(
            f"{where}: [model]: got {given or 'neither'}, expected 'checkpoint' or 'bundle'; set it with "
            f"--set {_EXAMPLE}."
        )
    if model.bundle is not None and (export is not None or model.model is not None):
        extra = "[export]" if export is not None else "'model'"
        raise ConfigError(
            f"{where}: [model]: got 'bundle' beside {extra}; a finished bundle is judged as it is."
        )
    if model.checkpoint is not None and export is None:
        raise ConfigError(f"{where}: got [model] 'checkpoint' without [export]; expected its 'variants'.")


def _check(recipe: PipelineRecipe, where: str) -> None:
    """Raise where the tables contradict each other."""
    if recipe.export is not None:
        _check_export(recipe.export, recipe, where)
    _check_calibration(recipe, f"{where}: [calibration]")
    for index, gate in enumerate(recipe.gate):
        _check_gate(gate, recipe, f"{where}: [[gate]] {index}")


def _check_export(export: ExportSpec, recipe: PipelineRecipe, where: str) -> None:
    every: list[VariantSpec] = []
    for index, section in enumerate(export.sections):
        at = f"{where}: [export]" if index == 0 else f"{where}: [[export.section]] {index - 1}"
        with _within(at):
            specs = parse_variants(section.variants, target=section.target)
            export.graph(section).check(specs)
        every += specs
    names = [spec.name for spec in every]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{where}: [export]: variant {twice[0]!r} stands in two sections; name it once.")
    with _within(f"{where}: [export]: 'limits'"):
        Gates(tuple(LimitChange.parse(text) for text in export.limits)).check(every)
    unknown = sorted(set(recipe.bench.variants if recipe.bench else ()) - set(names))
    if unknown:
        raise ConfigError(f"{where}: [bench]: 'variants' has {unknown[0]!r}, expected some of {names}.")


def _check_calibration(recipe: PipelineRecipe, at: str) -> None:
    calibration = recipe.calibration
    with _within(f"{at}: 'method'"):
        calibration.int8()
    with _within(f"{at}: 'int8_target'"):
        target = calibration.target()
    if calibration.latency_table is not None and calibration.int8_target is None:
        raise ConfigError(f"{at}: 'latency_table' needs 'int8_target'.")
    if recipe.export is None:
        return
    every = [spec for _, specs in recipe_variants(recipe) for spec in specs]
    build = BuildOptions(int8=None if target is None else Int8Search(target))
    with _within(at):
        ExportSettings(build=build, finish_int8=calibration.finish_int8 or 0).check(every)


def _check_gate(gate: GateSpec, recipe: PipelineRecipe, at: str) -> None:
    if recipe.export is not None:
        names = [spec.name for _, specs in recipe_variants(recipe) for spec in specs]
        unknown = next((name for name in gate_variants(gate) if name not in names), None)
        if unknown is not None:
            raise ConfigError(f"{at}: names the variant {unknown!r}, expected one of {names}.")
    if isinstance(gate, AccuracyGate):
        if gate.min is None and gate.max_drop is None:
            raise ConfigError(f"{at}: got neither 'min' nor 'max_drop', expected one of them or both.")
        if gate.max_drop is not None and gate.against == "eager" and recipe.model.bundle is not None:
            raise ConfigError(
                f"{at}: 'max_drop' against 'eager' needs [model] 'checkpoint'; name a variant in 'against'."
            )
    if isinstance(gate, LatencyGate) and gate.baseline_bundle is None and gate.baseline == gate.variant:
        raise ConfigError(
            f"{at}: 'baseline' is {gate.baseline!r}, the variant itself; name another one, or "
            "'baseline_bundle'."
        )
