"""Is a stored tower what the float32 model is? It is opened as a device will open it, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgeclip.bundle import Bundle, BundleWriter, PreprocessSpec, TowerFiles, Variant
from edgeclip.errors import BackendError, BackendUnavailableError, ExportError, ParityError
from edgeclip.labels import LabelBank
from edgeclip.preprocess import Preprocess
from edgeclip.runtime.choose import unmet
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.parity import (
    Basis,
    Golden,
    ParityFailure,
    ParityLimits,
    ParityNumbers,
    check_parity,
    check_tower,
    compare_embeddings,
    compare_logits,
    run_both_lengths,
)
from edgeclip.runtime.rows import run_rows
from edgeclip.runtime.session import OpenSession, RuntimeOptions, open_session

from .options import Gates, TowerReport
from .reference import Expected, Reference
from .variants import VariantSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Yardstick", "verify_tower"]

_INTEL: Final = {"intel-gpu": "gpu", "intel-npu": "npu"}
"""Devices of OpenVINO by target."""
_ANY_ISA: Final = frozenset({"unsafe-isa"})
_EXACT_KERNELS: Final = {"session.x64quantprecision": "1"}
"""Kernels that do not saturate on AVX2 without VNNI, where a file for other processors is tried."""


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What every variant is compared with, and where it goes."""

    writer: BundleWriter
    spec: PreprocessSpec
    reference: Reference
    expected: Expected
    tokens: NDArray[np.int32] | None
    bank: LabelBank
    bank_name: str
    basis: Basis
    similarity: float
    scale: float
    threads: int | None
    remarks: list[str] = field(default_factory=list)


def verify_tower(
    spec: VariantSpec, tower: str, yardstick: Yardstick, gates: Gates, work: Path
) -> TowerReport:
    """Open a stored tower as a device will, compare it, and write what was measured into the manifest.

    Raises:
        ParityError: it is beyond its limits.
        ExportError: its engine is here and cannot run it.
    """
    draft = yardstick.writer.draft()
    variant = draft.variant(spec.name)
    what = f"variant {spec.name!r}, {tower} tower"
    try:
        session, reason, proxy = _open(variant, tower, yardstick, work)
        if session is None:
            report = TowerReport("unverified", yardstick.basis, None, reason=reason)
            _record(spec, tower, yardstick, report)
            return report
        with session:
            if tower == "text":
                tokens, expected = yardstick.tokens, yardstick.expected.text
                assert tokens is not None
                assert expected is not None
                candidate = run_both_lengths(draft, session, tokens, expected)
            else:
                candidate = run_rows(session, _rows(yardstick))
            numbers = _compare(tower, candidate, yardstick)
            missed = _judge(spec, tower, yardstick, gates, numbers, proxy)
            status = "unverified" if reason else "passed"
            report = TowerReport(status, yardstick.basis, numbers, missed, proxy, reason)
            _record(spec, tower, yardstick, report)
            if not reason:
                _check_golden(yardstick.writer.draft(), spec, tower, session)
    except BackendError as error:
        raise ExportError(f"{what}: its engine is here and cannot run it: {error}") from error
    return report


def _open(
    variant: Variant, tower: str, yardstick: Yardstick, work: Path
) -> tuple[OpenSession | None, str, str | None]:
    """Open a tower where it is for, else in its place; say why not the former, and what the latter is."""
    format_name = variant.entry.format
    device = "cuda" if format_name == "tensorrt" else _INTEL.get(variant.entry.target or "", "cpu")
    options = RuntimeOptions(threads=yardstick.threads, device=device)
    if device != "cpu":
        (work / "engines").mkdir(exist_ok=True)
        options = replace(options, cache_dir=work / "engines")
    files, host = variant.tower(tower), Host.here()
    reason = unmet(variant, options=options, host=host)
    if reason is None:
        try:
            if device != "cpu":  # what is not the CPU opens only what was compiled before
                from edgeclip.runtime.compile import compile_variant

                compile_variant(variant, towers=[tower], options=options)
            return open_session(files, options=options), "", None
        except BackendUnavailableError as error:
            reason = str(error).rstrip(".")
    try:
        session, proxy = _stand_in(variant, files, options, host)
    except BackendError as error:
        return None, f"{reason}; nor can this CPU stand in: {str(error).rstrip('.')}", None
    return session, reason, proxy


def _stand_in(
    variant: Variant, files: TowerFiles, options: RuntimeOptions, host: Host
) -> tuple[OpenSession | None, str | None]:
    """Open a tower in place of where it is for, and say in what; ``None`` where nothing here can.

    Raises:
        BackendError: it does not open.
    """
    installed, needed = versions(), variant.entry.requires.isa_any
    lacks_isa = bool(needed) and not (host.isa or frozenset()).intersection(needed)
    if lacks_isa and unmet(variant, options=replace(options, allow=_ANY_ISA), host=host) is None:
        if (files.format, files.precision) == ("onnx", "int8"):
            files = replace(files, session_config={**files.session_config, **_EXACT_KERNELS})
        session = open_session(files, options=options)
        return session, f"the same engine on {host.machine}, which has none of {', '.join(needed)}"
    on_cpu = RuntimeOptions(threads=options.threads)
    if options.device in _INTEL.values():
        session = open_session(files, options=on_cpu)
        return session, f"OpenVINO {installed.get('openvino', '')} on this CPU"
    if files.model.suffix != ".onnx":
        return None, None
    # Rounded values, added up in float: a CPU's integer kernels would saturate where the engine does not.
    config = {"session.disable_quant_qdq": "1"} if files.precision == "int8" else {}
    graph = replace(files, format="onnx", session_config=config)
    session = open_session(graph, options=replace(on_cpu, backend="ort"))
    return session, f"ONNX Runtime {installed.get('onnxruntime', '')} on this CPU"


def _rows(yardstick: Yardstick) -> NDArray[Any]:
    pixels = yardstick.reference.pictures.pixels
    return Preprocess(yardstick.spec).normalize(pixels) if yardstick.spec.applied == "host" else pixels


def _compare(tower: str, candidate: NDArray[Any], yardstick: Yardstick) -> ParityNumbers:
    image = yardstick.expected.image
    ranked = yardstick.basis == "trained"
    if tower == "classifier":
        cosines = image @ yardstick.bank.embeddings.T
        numbers = compare_logits(cosines, candidate / yardstick.scale, similarity=yardstick.similarity)
        return numbers if ranked else replace(numbers, top1_agreement=None, top5_agreement=None)
    if tower == "text":
        assert yardstick.expected.text is not None
        return compare_embeddings(yardstick.expected.text, candidate)
    return compare_embeddings(image, candidate, bank=yardstick.bank.embeddings if ranked else None)


def _judge(
    spec: VariantSpec,
    tower: str,
    yardstick: Yardstick,
    gates: Gates,
    numbers: ParityNumbers,
    proxy: str | None,
) -> dict[str, float]:
    """Return the default limits that were missed and accepted on purpose.

    Raises:
        ParityError: a number is beyond its limit.
    """
    precision = spec.form.precision
    if tower == "classifier":
        defaults = ParityLimits.of_classifier(precision, yardstick.basis)
    else:
        defaults = ParityLimits.of(precision, yardstick.basis)
    if tower == "text":
        defaults = replace(defaults, top1_agreement=None)
    limits = gates.of(spec, defaults)
    failures = check_parity(numbers, limits)
    if failures:
        names = yardstick.reference.texts if tower == "text" else yardstick.reference.pictures.names
        where = f"variant {spec.name!r}, {tower} tower" + (f" ({proxy})" if proxy else "")
        raise ParityError(
            f"{where}: {'; '.join(map(str, failures))}, over {numbers.n} inputs; the worst input is "
            f"{names[numbers.worst]!r}. Nothing was written: "
            f"{_ways_out(spec, tower, failures[0], yardstick.writer.manifest)}."
        )
    return {failure.number: failure.limit for failure in check_parity(numbers, defaults)}


def _ways_out(spec: VariantSpec, tower: str, failure: ParityFailure, manifest: Mapping[str, Any]) -> str:
    """Return what to try, the likeliest to help first, less what was tried already."""
    ways = []
    if spec.form.precision == "int8" and tower == "image":
        said = manifest["variants"][spec.name]["calibration"] or {}
        ways.append(
            "give pictures and labels that suit the model (--calibration-data, --reference, --labels)"
        )
        target = said.get("choice", {}).get(tower, {}).get("target")
        asked = ",".join(f"{name}={limit:g}" for name, limit in (target or {}).items())
        ways.append(
            f"leave more in float (a higher --int8-target than {asked}, more --calibration-samples)"
            if asked
            else "leave more in float (--int8-target cosine=0.995,top1=0.99)"
        )
        if "finishing" not in said:
            ways.append("train it with the rounding inside (--finish-int8 120)")
    ways.append("use another precision")
    if failure.number != "not_finite":
        ways.append(f"set the limit on purpose (--limit {spec.form.precision}:{failure.number}=…)")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}" if len(ways) > 1 else ways[0]


def _record(spec: VariantSpec, tower: str, yardstick: Yardstick, report: TowerReport) -> None:
    host = Host.here().to_dict()
    said: dict[str, Any] = {
        "status": report.status,
        "n": 0 if report.numbers is None else report.numbers.n,
        "host": {key: host[key] for key in ("machine", "system", "cpu_model", "isa") if key in host},
        "proxy": report.proxy,
        "missed": dict(report.missed),
    }
    if report.basis != "trained":
        said["basis"] = report.basis
    if report.numbers is not None:
        for number in ("max_abs", "cosine_min", "cosine_mean", "top1_agreement", "top5_agreement"):
            said[number] = _rounded(getattr(report.numbers, number))
        if report.basis == "centred":
            said["centred_cosine_mean"] = _rounded(report.numbers.centred_cosine_mean)
    ranked = report.numbers is not None and report.numbers.top1_agreement is not None
    if ranked or tower == "classifier":
        said["bank"] = yardstick.bank_name
    yardstick.writer.manifest["variants"][spec.name]["parity"][tower] = said


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _check_golden(draft: Bundle, spec: VariantSpec, tower: str, session: OpenSession) -> None:
    """Make sure that the bundle's own check on a device passes.

    Raises:
        ParityError: it does not.
    """
    checked = check_tower(draft, Golden.of(draft), draft.variant(spec.name), tower, session)
    if not checked.passed:
        raise ParityError(
            f"variant {spec.name!r}, {tower} tower: agrees on the reference set, but on the "
            f"{checked.numbers.n} golden inputs {'; '.join(map(str, checked.failures))}, so that devices "
            "would refuse it. Give other pictures with --reference, or use another precision."
        )
