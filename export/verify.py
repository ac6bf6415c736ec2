"""Check a finished bundle on this machine: every file against its hash, every variant against golden numbers.

Needs the base install only. It compares with what eager float32 gave when the bundle was made; it does not
measure accuracy or latency.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from edgeclip.bundle import Bundle, Variant
from edgeclip.errors import BackendError, BackendUnavailableError, BundleError, ParityError
from edgeclip.runtime.choose import unmet, with_cache
from edgeclip.runtime.host import Host, versions
from edgeclip.runtime.parity import GoldenReport, golden_check
from edgeclip.runtime.session import (
    DEFAULT_OPTIONS,
    OPENVINO_DEVICES,
    RuntimeOptions,
    parse_device,
)

__all__ = ["VariantVerdict", "VerifyReport", "verify_bundle"]


@dataclass(frozen=True)
class VariantVerdict:
    """What became of one variant.

    Attributes:
        name: of the variant.
        status: ``"passed"`` and ``"failed"`` were run here; ``"not run"`` could not be.
        reason: why it failed or was not run; empty where it passed.
        golden: the numbers, where it was run.
    """

    name: str
    status: Literal["passed", "failed", "not run"]
    reason: str
    golden: GoldenReport | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What ``edgeclip verify`` says about a bundle.

    Attributes:
        bundle: where it is.
        digest: of its manifest.
        files: how many files were checked.
        damaged: one sentence for each file that is missing or damaged.
        variants: one verdict each.
    """

    bundle: str
    digest: str
    files: int
    damaged: tuple[str, ...]
    variants: tuple[VariantVerdict, ...]

    def raise_for(self, *, require_verified: bool = False) -> None:
        """Raise unless everything is in order.

        Args:
            require_verified: a variant that could not be run here counts as a failed gate.

        Raises:
            BundleError: a file is missing or damaged.
            ParityError: a variant's numbers are beyond their limits; or it was not run, where that counts.
        """
        if self.damaged:
            more = f" ({len(self.damaged)} files are damaged)" if len(self.damaged) > 1 else ""
            raise BundleError(f"{self.damaged[0].rstrip('.')}{more}.")
        failed = [verdict for verdict in self.variants if verdict.status == "failed"]
        if failed:
            reasons = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in failed)
            raise ParityError(f"{self.bundle}: {reasons}. Export it again, or use another variant.")
        if require_verified:
            left = [verdict for verdict in self.variants if verdict.status != "passed"]
            if left:
                reasons = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in left)
                raise ParityError(f"{self.bundle}: not verified here ({reasons}). Run it on a host that can.")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "schema": 1,
            "kind": "verify",
            "bundle": self.bundle,
            "digest": self.digest,
            "files": self.files,
            "damaged": list(self.damaged),
            "variants": {verdict.name: _verdict(verdict) for verdict in self.variants},
            "host": Host.here().to_dict(),
            "versions": versions(),
        }


def verify_bundle(
    bundle: Bundle,
    *,
    variant: str = "all",
    options: RuntimeOptions = DEFAULT_OPTIONS,
    device_of_format: bool = True,
) -> VerifyReport:
    """Check a bundle's files and run its golden inputs.

    Args:
        bundle: an open bundle.
        variant: a name, or ``"all"``.
        options: where to run.
        device_of_format: whether TensorRT variants run on ``cuda`` where ``options`` say ``cpu``.

    Raises:
        BundleError: there is no such variant.
        BackendUnavailableError: what was asked for by name, a variant, backend or device, runs nothing here.
    """
    chosen = list(bundle.manifest.variants) if variant == "all" else [bundle.variant(variant).name]
    damaged = [problem for name in sorted(bundle.manifest.files) if (problem := _damage(bundle, name))]
    verdicts = []
    for name in chosen:
        each = bundle.variant(name)
        on_gpu = device_of_format and each.entry.format == "tensorrt" and options.device == "cpu"
        verdicts.append(_verify(bundle, each, replace(options, device="cuda") if on_gpu else options))
    is_asked = variant != "all" or options.backend != "auto" or options.device != "cpu"
    ran = any(verdict.status != "not run" for verdict in verdicts)
    if is_asked and not ran and bundle.manifest.golden and not damaged:
        if variant != "all":
            raise BackendUnavailableError(f"variant {variant!r} cannot be run here: {verdicts[0].reason}.")
        why: dict[str, list[str]] = {}
        for verdict in verdicts:
            why.setdefault(verdict.reason, []).append(verdict.name)
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
        raise BackendUnavailableError(
            f"{bundle.where}: none of its variants can be run with backend {options.backend!r} on device "
            f"{options.device!r} ({reasons})."
        )
    count = len(bundle.manifest.files)
    return VerifyReport(str(bundle.path), bundle.digest, count, tuple(damaged), tuple(verdicts))


def _damage(bundle: Bundle, name: str) -> str | None:
    try:
        bundle.file(name)
    except BundleError as error:
        return str(error)
    return None


def _verify(bundle: Bundle, variant: Variant, options: RuntimeOptions) -> VariantVerdict:
    if bundle.manifest.golden is None:
        return VariantVerdict(variant.name, "not run", "the bundle has no golden file")
    problem = unmet(variant, options=options, host=Host.here())
    if problem is not None:
        return VariantVerdict(variant.name, "not run", problem)
    if parse_device(options.device)[0] in OPENVINO_DEVICES:  # they open only what was compiled before
        options = with_cache(variant, "image", options)
    try:
        golden = golden_check(bundle, variant, options=options)
    except (BundleError, BackendUnavailableError) as error:
        return VariantVerdict(variant.name, "not run", str(error).rstrip("."))
    except BackendError as error:
        return VariantVerdict(variant.name, "failed", str(error).rstrip("."))
    if golden.passed:
        return VariantVerdict(variant.name, "passed", "", golden)
    reason = "; ".join(
        f"{tower.tower} {failure}" for tower in golden.towers.values() for failure in tower.failures
    )
    return VariantVerdict(variant.name, "failed", reason, golden)


def _verdict(verdict: VariantVerdict) -> dict[str, Any]:
    towers = {} if verdict.golden is None else verdict.golden.towers
    return {
        "status": verdict.status,
        "reason": verdict.reason,
        "towers": {
            name: {**tower.numbers.to_dict(), "passed": tower.passed, "bank": tower.bank}
            for name, tower in towers.items()
        },
    }
