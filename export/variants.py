"""Names of variants: a form of the model (``onnx-int8``) for a target (``arm64-dotprod``).

The target is what the files are made for and never the machine that makes them. It decides how many bits a
quantized weight has and what the manifest asks of a host. Imports neither torch nor onnx: the command line
reads names with it before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from edgeclip.bundle import Requires
from edgeclip.errors import ConfigError

__all__ = ["FORMS", "TARGETS", "Form", "Target", "VariantSpec", "parse_variants"]

Format = Literal["onnx", "openvino", "tensorrt"]
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Form:
    """A format with a precision.

    Attributes:
        format: whose files.
        precision: of the tower's arithmetic.
    """

    format: Format
    precision: Precision


FORMS: Final[Mapping[str, Form]] = MappingProxyType(
    {
        "onnx-fp32": Form("onnx", "fp32"),
        "onnx-fp16": Form("onnx", "fp16"),
        "onnx-int8": Form("onnx", "int8"),
        "openvino-fp32": Form("openvino", "fp32"),
        "openvino-fp16": Form("openvino", "fp16"),
        "openvino-int8": Form("openvino", "int8"),
        "tensorrt-fp32": Form("tensorrt", "fp32"),
        "tensorrt-fp16": Form("tensorrt", "fp16"),
        "tensorrt-int8": Form("tensorrt", "int8"),
    }
)


@dataclass(frozen=True)
class Target:
    """What a variant is made for.

    Attributes:
        formats: those that can serve it.
        requires: what its hosts must offer.
        fit_pairs: whether int8 weights of ONNX Runtime's graphs must fit where two products of bytes are
            added in 16 bits (AVX2 without VNNI), see :class:`edgeclip.quantization.Scheme`.
        about: what it is, for help and messages.
    """

    formats: frozenset[str]
    requires: Requires
    about: str
    fit_pairs: bool = False


def _gpu(capability: str, about: str) -> Target:
    return Target(frozenset({"tensorrt"}), Requires(compute_capability=capability), about)


_CPU = frozenset({"onnx", "openvino"})
TARGETS: Final[Mapping[str, Target]] = MappingProxyType(
    {
        "x86-avx2": Target(
            _CPU, Requires(isa_any=("avx2",)), "x86-64 with AVX2, VNNI or not", fit_pairs=True
        ),
        "x86-vnni": Target(
            _CPU, Requires(isa_any=("avx512_vnni", "avx_vnni")), "x86-64 with VNNI (8-bit dot products)"
        ),
        "arm64-neon": Target(_CPU, Requires(isa_any=("neon",)), "64-bit ARM without dot products (Pi 4)"),
        "arm64-dotprod": Target(
            _CPU, Requires(isa_any=("dotprod",)), "64-bit ARM with dot products (Pi 5, Apple M, phones)"
        ),
        "intel-gpu": Target(frozenset({"openvino"}), Requires(), "Intel's integrated and Arc graphics"),
        "intel-npu": Target(frozenset({"openvino"}), Requires(), "Intel's NPU; wants a static batch"),
        "cuda-sm75": _gpu("7.5", "Turing"),
        "cuda-sm80": _gpu("8.0", "Ampere: A100"),
        "cuda-sm86": _gpu("8.6", "Ampere: RTX 30"),
        "cuda-sm87": _gpu("8.7", "Ampere: Jetson Orin"),
        "cuda-sm89": _gpu("8.9", "Ada: RTX 40, L4"),
        "cuda-sm90": _gpu("9.0", "Hopper: H100, H200"),
        "cuda-sm100": _gpu("10.0", "Blackwell: B200"),
        "cuda-sm110": _gpu("11.0", "Blackwell: Jetson Thor"),
        "cuda-sm120": _gpu("12.0", "Blackwell: RTX 50"),
    }
)


@dataclass(frozen=True)
class VariantSpec:
    """One variant to make.

    Attributes:
        form: its format and precision.
        form_name: ``"onnx-int8"``.
        target_name: ``"x86-avx2"``; ``None`` runs wherever the engine does.
        name: key in the manifest, ``"onnx-int8@x86-avx2"``.
    """

    form: Form
    form_name: str
    target_name: str | None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        name = self.form_name if self.target_name is None else f"{self.form_name}@{self.target_name}"
        object.__setattr__(self, "name", name)

    @property
    def target(self) -> Target | None:
        """What it is made for; ``None`` for no host in particular."""
        return None if self.target_name is None else TARGETS[self.target_name]

    @classmethod
    def parse(cls, text: str, *, target: str | None = None) -> VariantSpec:
        """Read ``NAME[@TARGET]``.

        Args:
            text: as typed.
            target: taken where ``text`` names none.

        Raises:
            ConfigError: unknown form or target, or a target that the format cannot serve.
        """
        form_name, at, said = text.strip().partition("@")
        if form_name not in FORMS:
            raise ConfigError(f"variant {text!r}: got {form_name!r}, expected one of {', '.join(FORMS)}.")
        target_name = said if at else target
        if target_name is not None:
            if target_name not in TARGETS:
                raise ConfigError(
                    f"variant {text!r}: got the target {target_name!r}, expected one of {', '.join(TARGETS)}."
                )
            form = FORMS[form_name]
            if form.format not in TARGETS[target_name].formats:
                served = [name for name, each in TARGETS.items() if form.format in each.formats]
                raise ConfigError(
                    f"variant {text!r}: {form.format} files cannot serve {target_name!r} "
                    f"({TARGETS[target_name].about}); expected one of {', '.join(served)}."
                )
        return cls(FORMS[form_name], form_name, target_name)


def parse_variants(texts: Iterable[str], *, target: str | None = None) -> tuple[VariantSpec, ...]:
    """Read several variants, each once.

    Args:
        texts: ``NAME[@TARGET]`` each; one may hold several, split by commas.
        target: taken where one names none.

    Raises:
        ConfigError: one cannot be read, is named twice, or there is none.
    """
    said = [part for text in texts for part in text.split(",") if part.strip()]
    if not said:
        raise ConfigError(f"no variant was asked for: expected some of {', '.join(FORMS)}.")
    specs = [VariantSpec.parse(part, target=target) for part in said]
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"variant {twice[0]!r} is asked for twice; name each once.")
    return tuple(specs)
