"""What a maker of variants gets and gives: float32 graphs in, the files of one variant out.

A format is one module with a function ``build(request) -> BuiltVariant``; :data:`BUILDERS` maps the format to
that module, which is imported when it is used. Makers write no bundle and check no embeddings: the exporter
does both, for every format alike.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast

from edgeclip.bundle import Requires, TensorEntry
from edgeclip.calibration.ranges import RangeMethod
from edgeclip.calibration.sensitivity import Int8Target
from edgeclip.errors import ConfigError, ExportError

from .variants import VariantSpec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

__all__ = [
    "BUILDERS",
    "DEFAULT_SETTINGS",
    "BuildOptions",
    "BuildRequest",
    "Builder",
    "BuiltTower",
    "BuiltVariant",
    "Int8Search",
    "Int8Settings",
    "builder_of",
    "chooses",
]


@dataclass(frozen=True)
class Int8Search:
    """What is asked of the choice of products that stay float.

    Attributes:
        target: what int8 has to keep; ``None`` measures, and chooses nothing.
        latency_table: a file with times from the device; ``None`` measures on this host.
        folder: where reports go; ``None`` writes none.
        threads: of every engine; usable cores without.
    """

    target: Int8Target | None = None
    latency_table: Path | None = None
    folder: Path | None = None
    threads: int | None = None

    def of(self, tower: str) -> Int8Target | None:
        """Return the target of a tower: texts have no best label."""
        if self.target is None or tower == "image":
            return self.target
        target = replace(self.target, top1=None)
        return target if target.to_dict() else None


@dataclass(frozen=True)
class Int8Settings:
    """How int8 is made, whatever stays float.

    Attributes:
        method: how ranges are chosen; ``None`` takes what suits the kind of tower.
        correct_biases: add to biases what rounded weights take off on average.
        rounding: of weights: by the second moments of what they are multiplied with (``"moments"``), or to
            the nearest level.
        text: for CPUs, compute text towers in int8 (``"full"``), or only store their weights so.
    """

    method: RangeMethod | None = None
    correct_biases: bool = True
    rounding: Literal["moments", "nearest"] = "moments"
    text: Literal["full", "weights"] = "weights"


DEFAULT_SETTINGS: Final = Int8Settings()
"""What is taken where nothing is asked for."""


@dataclass(frozen=True)
class BuildOptions:
    """Choices that hold for every variant of an export.

    Attributes:
        gelu_tanh: let variants below float32 take the tanh form of GELU for targets on which it is faster
            (AVX2 without AVX-512); in float32 it would miss the limits of parity.
        external_data: keep weights of ONNX files in a file beside them; ``None`` does so above 2 GB, where
            one file cannot hold them.
        int8: choose the products of int8 towers that stay float; ``None`` takes the fixed policy.
        quantization: how int8 is made.
    """

    gelu_tanh: bool = True
    external_data: bool | None = None
    int8: Int8Search | None = None
    quantization: Int8Settings = DEFAULT_SETTINGS

    def check(self, specs: Sequence[VariantSpec]) -> None:
        """Refuse what cannot be had together.

        Raises:
            ConfigError: a choice for int8 is asked for, and no variant that it can be made for.
        """
        if self.int8 is not None and not any(chooses(spec) for spec in specs):
            raise ConfigError(
                f"int8 target {self.int8.target}: no int8 variant is asked for among "
                f"{', '.join(spec.name for spec in specs)}; add onnx-int8."
            )


def chooses(spec: VariantSpec) -> bool:
    """Whether what stays float in a variant can be chosen."""
    return spec.form.precision == "int8"


@dataclass(frozen=True, eq=False)
class BuildRequest:
    """One variant to make.

    Attributes:
        spec: which.
        graphs: float32 graphs by tower, folded, cleaned and checked. Read only: a maker copies what it
            changes.
        calibration: rows for the input of each tower, ``(n, …)`` in the dtype of the graph's input; empty
            where nothing is to be quantized.
        calibration_digest: names those rows in the manifest.
        work: an empty directory for files on the way; the exporter removes it, or keeps it on request.
        options: choices.
        bank: ``(N, E)`` label embeddings, for the agreement of ranks; ``None`` where ranks mean nothing.
        on_step: told what is being done, in a few words.
    """

    spec: VariantSpec
    graphs: Mapping[str, onnx.ModelProto]
    work: Path
    calibration: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    calibration_digest: str | None = None
    options: BuildOptions = BuildOptions()
    bank: NDArray[np.float32] | None = None
    on_step: Callable[[str], None] = lambda said: None


@dataclass(frozen=True, eq=False)
class BuiltTower:
    """Files of one tower.

    Attributes:
        model: name of the file to open, one of ``files``; flat, such as ``"image.onnx"``.
        files: content (bytes, or the path of a file to copy) by name, in the order they are to be stored.
            A file that names another one names it as ``edgeclip.bundle.stored_name`` will call it.
        inputs: of the tower.
        outputs: of the tower.
        alike: whether the engine finds one file by the name of another: they are stored under one stem.
    """

    model: str
    files: Mapping[str, bytes | Path]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    alike: bool = False


@dataclass(frozen=True, eq=False)
class BuiltVariant:
    """One variant, ready to be checked and stored.

    Attributes:
        towers: by name.
        requires: what a host must offer.
        session_config: engine settings it is to be run with (``edgeclip.bundle.SESSION_KEYS``).
        calibration: what the manifest says about how it was quantized; ``None`` for float.
    """

    towers: Mapping[str, BuiltTower]
    requires: Requires = field(default_factory=Requires)
    session_config: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None


class Builder(Protocol):
    """Makes one variant."""

    def __call__(self, request: BuildRequest) -> BuiltVariant:
        """Make it.

        Raises:
            ExportError: it cannot be made.
            MissingExtraError: a package it needs is not installed.
        """
        ...


BUILDERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "onnx": "edgeclip.export.to_onnx",
        "openvino": "edgeclip.export.to_openvino",
        "tensorrt": "edgeclip.export.to_tensorrt",
    }
)
"""Format to the module that has ``build``."""


def builder_of(format_name: str) -> Builder:
    """Return the maker of a format.

    Raises:
        ExportError: no such format.
    """
    if format_name not in BUILDERS:
        raise ExportError(f"no maker of {format_name!r} files: expected one of {', '.join(BUILDERS)}.")
    return cast(Builder, importlib.import_module(BUILDERS[format_name]).build)
