"""What an export is asked for, and what it tells: values, without torch and without onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from edgeclip.bundle import Bundle
from edgeclip.calibration.dataset import Method, Selection
from edgeclip.errors import ConfigError
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.parity import Basis, ParityLimits, ParityNumbers

from .build import BuildOptions
from .variants import VariantSpec

__all__ = [
    "METHOD",
    "OPSET",
    "OPSETS",
    "SAMPLES",
    "Checkpoint",
    "ExportReport",
    "ExportSettings",
    "Exported",
    "Gates",
    "GraphOptions",
    "LimitChange",
    "Offered",
    "References",
    "Step",
    "TowerReport",
    "VariantReport",
]

OPSET: Final = 20
"""One node for GELU; from 23 on an Attention node that older runtimes lack."""
OPSETS: Final = range(17, 25)
METHOD: Final[Method] = "coverage"
"""How calibration pictures are chosen, where nothing else is said."""
SAMPLES: Final = 64
"""Pictures to choose int8 ranges on at most, where nothing else is said."""
_TEXTS: Final = 256
_NUMBERS = ("max_abs", "cosine_min", "cosine_mean", "centred_cosine_mean", "top1_agreement")
_PRECISIONS = ("fp32", "fp16", "int8")


# --- what is asked for -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What to export.

    Attributes:
        path: a checkpoint's directory, a published weights file, or the name of a model of the zoo whose
            weights were pulled.
        model: name of the model, where it is a file that does not tell.
        materials: where ``edgeclip data fetch default-model -o`` put the packages that a checkpoint may have
            left weights in; its own directory if not given.
    """

    path: str
    model: str | None = None
    materials: Path | None = None


@dataclass(frozen=True)
class GraphOptions:
    """Choices about the graphs that hold for every variant.

    Attributes:
        opset: of ONNX, 17 to 24.
        static_batch: the one batch that towers take; ``None`` for any.
        float_input: pictures come as float32 ``(B, 3, H, W)``, scaled and normalized on the host.
        text: whether there is a text tower.
        bake_labels: whether ONNX variants get a graph ``classifier`` with the labels inside.

    Raises:
        ConfigError: a number is out of range.
    """

    opset: int = OPSET
    static_batch: int | None = None
    float_input: bool = False
    text: bool = True
    bake_labels: bool = False

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ConfigError(f"opset: got {self.opset}, expected {OPSETS[0]} to {OPSETS[-1]}.")
        if self.static_batch is not None and not 1 <= self.static_batch <= 4096:
            raise ConfigError(f"static batch: got {self.static_batch}, expected 1 to 4096.")

    def check(self, specs: Sequence[VariantSpec]) -> None:
        """Refuse what cannot be had together.

        Raises:
            ConfigError: these variants cannot be made so.
        """
        if self.bake_labels and not any(spec.form.format == "onnx" for spec in specs):
            raise ConfigError(
                "labels are baked into ONNX variants only, and none is asked for among "
                f"{', '.join(spec.name for spec in specs)}; add onnx-fp32."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Offered:
    """Labels for the bundle, which also judge the agreement of ranks.

    Attributes:
        name: of the bank.
        labels: the labels.
        templates: prompt templates; ``None`` takes ``one``, or ``zh`` for Chinese labels.
    """

    name: str
    labels: LabelSet
    templates: Templates | None = None


@dataclass(frozen=True)
class References:
    """Where the inputs come from.

    Attributes:
        pictures: folder, table or shards with pictures to compare on; ``None`` takes the photographs that
            come with edgeclip, cropped and flipped.
        calibration: the same for int8, or a finished calibration set; ``None`` takes other crops of
            ``pictures``.
        calibration_samples: pictures, and texts, to choose int8 ranges on at most; ``None`` takes 64 pictures
            and 256 texts.
        calibration_selection: how they are chosen.
        calibration_seed: of that choice.
        offered: labels; ``None`` takes a hundred everyday names.

    Raises:
        ConfigError: samples or seed are out of range.
    """

    pictures: Path | None = None
    calibration: Path | None = None
    calibration_samples: int | None = None
    calibration_selection: Method = METHOD
    calibration_seed: int = 0
    offered: Offered | None = None

    def __post_init__(self) -> None:
        self.selection  # noqa: B018  # refuses what cannot be

    @property
    def selection(self) -> Selection:
        """How pictures are chosen."""
        samples = SAMPLES if self.calibration_samples is None else self.calibration_samples
        return Selection(self.calibration_selection, samples, self.calibration_seed)

    @property
    def texts(self) -> int:
        """Texts at most."""
        return self.calibration_samples or _TEXTS


@dataclass(frozen=True)
class LimitChange:
    """A limit of parity that is set on purpose.

    Attributes:
        where: a precision (``"int8"``) or the name of a variant.
        number: which one.
        limit: what is still agreement.
    """

    where: str
    number: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> LimitChange:
        """Read ``PRECISION|VARIANT:NUMBER=LIMIT``.

        Raises:
            ConfigError: it cannot be read.
        """
        where, colon, rest = text.rpartition(":")
        number, equals, limit = rest.partition("=")
        try:
            value = float(limit)
        except ValueError:
            value = float("nan")
        if not (colon and equals and where.strip()) or number not in _NUMBERS or not 0 <= value <= 1:
            raise ConfigError(
                f"limit {text!r}: expected PRECISION:NUMBER=LIMIT with NUMBER one of {', '.join(_NUMBERS)} "
                "and LIMIT from 0 to 1, as in int8:cosine_mean=0.97."
            )
        return cls(where.strip(), number, value)


@dataclass(frozen=True)
class Gates:
    """When an export fails.

    Attributes:
        limits: those that are not the defaults.
        require_verified: a variant whose engine cannot be run here counts as failed.
    """

    limits: tuple[LimitChange, ...] = ()
    require_verified: bool = False

    def check(self, specs: Sequence[VariantSpec]) -> None:
        """Refuse a limit that no variant has.

        Raises:
            ConfigError: nothing asked for has that precision or name.
        """
        names = [*dict.fromkeys(spec.form.precision for spec in specs), *(spec.name for spec in specs)]
        for change in self.limits:
            if change.where not in names:
                raise ConfigError(
                    f"limit of {change.where!r}: nothing that is asked for is called so; expected one of "
                    f"{', '.join(names)}."
                )

    def of(self, spec: VariantSpec, defaults: ParityLimits) -> ParityLimits:
        """Return the limits of a variant; the name of a variant counts before its precision."""
        ordered = sorted(self.limits, key=lambda change: change.where not in _PRECISIONS)
        for change in ordered:
            if change.where in (spec.form.precision, spec.name):
                defaults = replace(defaults, **{change.number: change.limit})
        return defaults


@dataclass(frozen=True)
class ExportSettings:
    """How to export.

    Attributes:
        graph: choices about the graphs.
        build: choices about the variants.
        references: where the inputs come from.
        gates: when the export fails.
        threads: of every engine; usable cores without.
        finish_int8: steps of training that int8 variants get first; 0 for none.
        keep_intermediate: a directory that keeps the float32 graphs and what makers wrote on their way.
    """

    graph: GraphOptions = GraphOptions()
    build: BuildOptions = field(default_factory=BuildOptions)
    references: References = References()
    gates: Gates = Gates()
    threads: int | None = None
    finish_int8: int = 0
    keep_intermediate: Path | None = None

    def check(self, specs: Sequence[VariantSpec]) -> None:
        """Refuse what cannot be had together.

        Raises:
            ConfigError: these variants cannot be made so.
        """
        self.graph.check(specs)
        self.gates.check(specs)
        self.build.check(specs)
        if self.finish_int8 and all(spec.form.precision != "int8" for spec in specs):
            raise ConfigError(
                f"finishing for int8: no int8 variant is asked for among "
                f"{', '.join(spec.name for spec in specs)}; add onnx-int8."
            )


# --- what is told ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of an export.

    Attributes:
        name: what is done, in a few words.
        seconds: how long it took; ``None`` while it runs.
    """

    name: str
    seconds: float | None = None


@dataclass(frozen=True)
class TowerReport:
    """How far one tower is from eager float32.

    Attributes:
        status: ``"passed"``, or ``"unverified"`` where its engine cannot be run here.
        basis: what was judged, see :class:`edgeclip.bundle.Parity`.
        numbers: what was measured; ``None`` where nothing could be.
        missed: default limits that were not reached and accepted on purpose.
        proxy: what was run in place of the engine.
        reason: why it is unverified.
        size_bytes: of its files.
    """

    status: str
    basis: Basis
    numbers: ParityNumbers | None
    missed: Mapping[str, float] = field(default_factory=dict)
    proxy: str | None = None
    reason: str = ""
    size_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "status": self.status,
            "basis": self.basis,
            "numbers": None if self.numbers is None else self.numbers.to_dict(),
            "missed": dict(self.missed),
            "proxy": self.proxy,
            "reason": self.reason,
            "size_bytes": self.size_bytes,
        }


@dataclass(frozen=True)
class VariantReport:
    """One variant.

    Attributes:
        towers: by name.
        replaced: whether one of that name was replaced.
        choices: what stays float in int8 towers, where that was chosen: target, products, reasons, numbers.
    """

    towers: Mapping[str, TowerReport]
    replaced: bool = False
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """``"passed"`` where every tower did."""
        return next((tower.status for tower in self.towers.values() if tower.status != "passed"), "passed")


@dataclass(frozen=True)
class ExportReport:
    """What an export tells.

    Attributes:
        bundle: where it is.
        digest: of its manifest.
        model: name of the model.
        reference: what was compared on: source, pictures, texts, digest.
        basis: of the image tower's numbers.
        variants: those that were made.
        default_variants: of the bundle.
        steps: what was done, in order.
        peak_rss_bytes: of this process; ``None`` where the system does not tell.
        remarks: what the user should know.
    """

    bundle: str
    digest: str
    model: str
    reference: Mapping[str, Any]
    basis: Basis
    variants: Mapping[str, VariantReport]
    default_variants: tuple[str, ...]
    steps: tuple[Step, ...]
    peak_rss_bytes: int | None
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "schema": 1,
            "kind": "export",
            "bundle": self.bundle,
            "digest": self.digest,
            "model": self.model,
            "reference": dict(self.reference),
            "basis": self.basis,
            "variants": {
                name: {
                    "status": variant.status,
                    "replaced": variant.replaced,
                    "choices": {tower: dict(said) for tower, said in variant.choices.items()},
                    "towers": {tower: said.to_dict() for tower, said in variant.towers.items()},
                }
                for name, variant in self.variants.items()
            },
            "default_variants": list(self.default_variants),
            "steps": [asdict(step) for step in self.steps],
            "peak_rss_bytes": self.peak_rss_bytes,
            "remarks": list(self.remarks),
            "host": Host.here().to_dict(),
            "versions": versions(),
        }


@dataclass(frozen=True, eq=False)
class Exported:
    """The bundle, opened, and the report."""

    bundle: Bundle
    report: ExportReport
