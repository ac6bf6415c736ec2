"""Gates over measured values: what passes, what fails, and what nothing can be said about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeclip.bundle import Bundle, Parity
from edgeclip.export.device_report import BundleRef, DeviceReport, VerifyEntry
from edgeclip.export.gates import Accuracy, Facts, VariantFacts, judge, licence_allowed
from edgeclip.export.pipeline_recipe import (
    AccuracyGate,
    DeviceReportGate,
    LatencyGate,
    LicenceGate,
    ParityGate,
    SizeGate,
)
from edgeclip.runtime.latency import LatencySamples
from edgeclip.runtime.latency_report import LatencyReport, RatioEntry

DIGEST = "ab" * 32
PASSED = {"image": Parity(status="passed", n=16)}
PROXY = {"image": Parity(status="unverified", n=16, proxy="ONNX Runtime 1.31.1 on this CPU")}


def facts(**changes: Any) -> Facts:
    variants = {
        "onnx-fp32": VariantFacts({"a.onnx": 3_000_000, "a.data": 1_000_000}, PASSED, "passed", ""),
        "tensorrt-fp16": VariantFacts({"b.onnx": 2_000_000}, PROXY, "not run", "it needs a GPU"),
    }
    return replace(Facts(DIGEST, 7_500_000, "Apache-2.0", (), variants), **changes)


def ratio(low: float, middle: float, high: float) -> RatioEntry:
    return RatioEntry(a="a", b="b", ratio=middle, low=low, high=high, n=60, confidence=0.95, seed=0)


def report(
    device: str = "pi", *, status: str = "passed", digest: str = DIGEST, samples: Any = None, **changes: Any
) -> DeviceReport:
    latency = None
    if samples is not None:
        latency = LatencyReport.of("x", {"image_tower": LatencySamples(np.asarray(samples, float))})
    said: dict[str, Any] = {
        "device": device,
        "created": "2026-01-01T00:00:00Z",
        "bundle": BundleRef(name="m", digest=digest),
        "variant": "tensorrt-fp16",
        "verify": VerifyEntry(status=status, reason="" if status == "passed" else "cosine is 0.2"),
        "latency": latency,
    }
    return DeviceReport(**(said | changes))


# --- parity ------------------------------------------------------------------------------------------------


def test_numbers_that_agree_here_pass() -> None:
    verdict = judge(ParityGate(name="p", variants=("onnx-fp32",)), facts())
    assert verdict.status == "passed"
    assert verdict.findings[0].got == "verified at the export, on this host"


def test_a_stand_in_is_enough_unless_more_is_asked_for() -> None:
    verdict = judge(ParityGate(name="p"), facts())
    assert verdict.status == "passed"
    assert verdict.findings[1].got == "compared on ONNX Runtime 1.31.1 on this CPU only"
    strict = judge(ParityGate(name="p", require_verified=True), facts())
    assert strict.status == "failed"
    assert [str(finding) for finding in strict.telling] == [
        "tensorrt-fp16: got unverified, expected verified on its own engine (it needs a GPU)"
    ]


def test_numbers_from_another_kind_of_processor_are_called_that() -> None:
    said = {"image": Parity(status="passed", n=16, proxy="the same engine on x86_64")}
    variants = {"onnx-int8@arm64-dotprod": VariantFacts({}, said, "not run", "it needs dotprod")}
    verdict = judge(ParityGate(name="p"), facts(variants=variants))
    assert verdict.findings[0].got == "verified at the export (the same engine on x86_64)"


def test_a_device_that_reported_verifies_a_variant() -> None:
    gate = ParityGate(name="p", require_verified=True)
    assert judge(gate, facts(reports=(report(),))).status == "passed"
    assert judge(gate, facts(reports=(report(digest="cd" * 32),))).status == "failed"


def test_wrong_numbers_on_a_device_fail_though_all_is_well_elsewhere() -> None:
    verdict = judge(ParityGate(name="p"), facts(reports=(report(status="failed"),)))
    assert verdict.status == "failed"
    assert "on pi: cosine is 0.2" in verdict.telling[0].reason


def test_a_variant_that_was_never_run_says_nothing() -> None:
    alone = {"onnx-fp32": VariantFacts({}, {}, "not run", "the bundle has no golden file")}
    verdict = judge(ParityGate(name="p"), facts(variants=alone))
    assert verdict.status == "inconclusive"
    assert "the bundle has no golden file" in verdict.findings[0].reason


def test_numbers_that_are_wrong_here_fail() -> None:
    bad = {"onnx-fp32": VariantFacts({}, PASSED, "failed", "image max_abs is 0.3")}
    verdict = judge(ParityGate(name="p"), facts(variants=bad))
    assert verdict.status == "failed"
    assert "on this host: image max_abs is 0.3" in verdict.findings[0].reason


# --- accuracy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "against", "least", "drop", "status"),
    [
        (0.80, None, 0.80, None, "passed"),
        (0.79, None, 0.80, None, "failed"),
        (0.80, 0.82, None, 0.02, "passed"),
        (0.80, 0.83, None, 0.02, "failed"),
        (0.80, 0.70, None, 0.0, "passed"),
        (0.80, 0.81, 0.9, 0.02, "failed"),
    ],
)
def test_accuracy(
    value: float, against: float | None, least: float | None, drop: float | None, status: str
) -> None:
    gate = AccuracyGate(name="a", data="d", variant="onnx-fp32", min=least, max_drop=drop)
    verdict = judge(gate, facts(measured={"a": Accuracy(value, 200, against)}))
    assert verdict.status == status
    assert f"{value:.1%} of 200" in verdict.findings[0].got


def test_what_could_not_be_measured_is_inconclusive_with_the_reason() -> None:
    for gate in (
        AccuracyGate(name="g", data="d", variant="onnx-fp32", min=0.1),
        LatencyGate(name="g", variant="onnx-fp32", baseline="tensorrt-fp16"),
    ):
        verdict = judge(gate, facts(unmeasured={"g": "it needs a GPU"}))
        assert (verdict.status, verdict.findings[0].reason) == ("inconclusive", "it needs a GPU")
        assert judge(gate, facts()).findings[0].reason == "it was not measured"


# --- size and licence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "most", "status"),
    [
        ("variant", 4.0, "passed"),
        ("variant", 3.9, "failed"),
        ("file", 3.0, "passed"),
        ("file", 2.9, "failed"),
        ("bundle", 7.5, "passed"),
        ("bundle", 7.4, "failed"),
    ],
)
def test_size(of: Any, most: float, status: str) -> None:
    assert judge(SizeGate(name="s", max_mb=most, of=of), facts()).status == status


def test_size_names_what_is_too_large_and_what_is_not_there() -> None:
    verdict = judge(SizeGate(name="s", max_mb=3, variants=("onnx-fp32", "nothing")), facts())
    assert [finding.subject for finding in verdict.telling] == ["nothing", "onnx-fp32"]
    assert str(verdict.telling[1]) == "onnx-fp32: got 4.00 MB, expected at most 3 MB"


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT AND Apache-2.0", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only OR MIT AND Apache-2.0", True),
        ("(GPL-3.0-only OR MIT) AND GPL-2.0-only", False),
        ("(GPL-3.0-only OR MIT) AND Apache-2.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("MIT AND", False),
        ("(MIT", False),
        ("MIT Apache-2.0", False),
        ("", False),
        ("NOASSERTION", False),
        ("the licence of somebody, see his page", False),
    ],
)
def test_licence_expressions(expression: str, allowed: bool) -> None:
    assert licence_allowed(expression, ("MIT", "Apache-2.0")) is allowed


@pytest.mark.parametrize(
    "expression", ["MIT AND Apache-2.0", "MIT OR GPL-3.0-only", "Apache-2.0 WITH LLVM-exception"]
)
def test_the_expressions_are_what_packaging_takes_for_valid(expression: str) -> None:
    licenses = pytest.importorskip("packaging.licenses")
    assert licenses.canonicalize_license_expression(expression) == expression


def test_every_ancestor_is_looked_at() -> None:
    parents: Any = (
        {"name": "student", "licence": "MIT", "parents": [{"name": "teacher", "licence": "apple-amlr"}]},
        "somebody's weights",
        {"name": "open", "licence": ""},
    )
    verdict = judge(LicenceGate(name="l", allow=("MIT", "Apache-2.0")), facts(parents=parents))
    assert [(finding.subject, finding.status) for finding in verdict.findings] == [
        ("model", "passed"),
        ("student", "passed"),
        ("teacher", "failed"),
        ("somebody's weights", "failed"),
        ("open", "failed"),
    ]


def test_the_embedded_bundle_descends_from_more_than_apache() -> None:
    bundle = Bundle.open("default")
    known = Facts.of(bundle, verified={}, measured={}, unmeasured={}, reports=())
    assert judge(LicenceGate(name="l", allow=("Apache-2.0",)), known).status == "failed"
    allow = ("Apache-2.0", "CC0-1.0", "MIT", "WordNet-3.0")
    assert judge(LicenceGate(name="l", allow=allow), known).status == "passed"


# --- latency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [(0.80, 0.99, "passed"), (0.9, 1.0, "passed"), (0.95, 1.05, "inconclusive"), (1.01, 1.2, "failed")],
)
def test_latency_is_judged_by_its_interval(low: float, high: float, status: str) -> None:
    gate = LatencyGate(name="t", variant="onnx-fp32", baseline="tensorrt-fp16", max_ratio=1.0)
    verdict = judge(gate, facts(measured={"t": ratio(low, (low + high) / 2, high)}))
    assert verdict.status == status
    assert f"({low:.3f} to {high:.3f}, 60 blocks)" in verdict.findings[0].got


# --- devices -----------------------------------------------------------------------------------------------


def device(**changes: Any) -> DeviceReportGate:
    return DeviceReportGate(name="d", device="pi", variant="tensorrt-fp16", **changes)


def test_a_missing_report_is_inconclusive_and_says_what_there_is() -> None:
    assert "there is no report at all" in judge(device(), facts()).findings[0].reason
    others = (report(digest="cd" * 32, samples=[1.0]), report("jetson"))
    verdict = judge(device(), facts(reports=others))
    assert verdict.status == "inconclusive"
    assert verdict.findings[0].reason == (
        "there are reports of pi for tensorrt-fp16 of the bundle cdcdcdcdcdcd…, jetson for tensorrt-fp16 of "
        "this bundle; this bundle is abababababab…"
    )


def test_without_a_budget_times_are_told_and_the_numbers_alone_are_judged() -> None:
    gate = device()
    verdict = judge(gate, facts(reports=(report(samples=np.full(400, 7.0)),)))
    assert verdict.status == "passed"
    assert verdict.findings[1].limit == "no budget is set"
    assert verdict.findings[1].got.startswith("p50 7.00 ms")
    assert "set p50_ms or p90_ms" in verdict.findings[1].reason
    assert judge(gate, facts(reports=(report(),))).findings[1].got == "no latency"
    set_one = judge(device(p90_ms=8), facts(reports=(report(samples=np.full(400, 7.0)),)))
    assert "no budget is set" not in {finding.limit for finding in set_one.findings}


def test_a_report_passes_within_its_limits() -> None:
    samples = np.random.default_rng(0).normal(10, 0.5, 400)
    found = facts(reports=(report(samples=samples),))
    assert judge(device(p50_ms=11, p90_ms=12), found).status == "passed"
    assert judge(device(p50_ms=9), found).status == "failed"
    assert judge(device(p90_ms=10.3), found).status == "failed"
    middle = float(np.median(samples))
    assert judge(device(p50_ms=middle), found).status == "inconclusive"


def test_too_few_samples_and_missing_stages_are_inconclusive() -> None:
    found = facts(reports=(report(samples=np.full(50, 5.0)),))
    verdict = judge(device(p50_ms=6, p90_ms=6), found)
    assert [finding.status for finding in verdict.findings] == ["passed", "passed", "inconclusive"]
    assert verdict.telling[0].reason == "50 samples do not carry p90"
    other = judge(device(p50_ms=6, stage="head"), found)
    assert other.telling[0].reason == "timed was image_tower, not head"
    assert judge(device(p50_ms=6), facts(reports=(report(),))).status == "inconclusive"


def test_wrong_numbers_on_the_device_fail_however_fast_it_is() -> None:
    found = facts(reports=(report(status="failed", samples=np.full(400, 1.0)),))
    assert judge(device(p50_ms=100), found).status == "failed"
    assert judge(device(), facts(reports=(report(status="not run"),))).status == "inconclusive"


def test_facts_of_a_bundle(tiny_bundle_session: Path) -> None:
    bundle = Bundle.open(tiny_bundle_session)
    verified = {"onnx-int8": {"status": "passed", "reason": ""}}
    found = Facts.of(bundle, verified=verified, measured={}, unmeasured={}, reports=())
    on_disk = sum(file.stat().st_size for file in tiny_bundle_session.rglob("*") if file.is_file())
    assert found.size_bytes == on_disk
    int8 = found.variants["onnx-int8"]
    assert len(int8.files) == 2
    assert int8.files == {name: (tiny_bundle_session / name).stat().st_size for name in int8.files}
    assert (int8.status, found.variants["onnx-fp32"].status) == ("passed", "not run")
