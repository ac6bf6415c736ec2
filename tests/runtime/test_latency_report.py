"""The latency report: what is in it, that it reads back, and that the committed schema describes it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from edgeclip.bundle import Bundle
from edgeclip.errors import InputError
from edgeclip.runtime import (
    LatencyReport,
    LatencySamples,
    StageClock,
    compare_interleaved,
    measure,
    open_session,
)
from edgeclip.runtime.latency_report import latency_schema


@pytest.fixture(scope="module")
def report(tiny_bundle_session: Path) -> LatencyReport:
    """A report of real measurements on a real tower."""
    bundle = Bundle.open(tiny_bundle_session)
    feeds = {"image": np.zeros((2, 32, 32, 3), np.uint8)}
    clock = StageClock()
    with open_session(bundle.variant("onnx-fp32").tower("image")) as session:
        measured = measure(lambda: session.run(feeds), min_samples=120, min_duration_s=0, batch=2)
        for _ in range(3):
            with clock.span("head"):
                session.run(feeds)
        ratio = compare_interleaved(lambda: session.run(feeds), lambda: session.run(feeds), min_duration_s=0)
        return LatencyReport.of(
            "tiny image tower",
            {"image_tower": measured, **clock.samples()},
            cold_start_ms={"import": 300, "open": 12.5},
            ratios={("fp32", "fp32 again"): ratio},
            placement=session.chosen,
            bundle={"name": "tiny-colours", "digest": bundle.digest, "variant": "onnx-fp32"},
        )


@pytest.fixture(scope="module")
def schema(repo: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((repo / "docs" / "latency-report.schema.json").read_text())
    return loaded


def test_the_committed_schema_is_the_one_the_code_has(schema: dict[str, Any]) -> None:
    # After a change of edgeclip/runtime/latency_report.py: python tests/tools/write_latency_schema.py
    assert ordered(schema) == ordered(latency_schema())
    jsonschema.Draft202012Validator.check_schema(schema)


def ordered(value: Any) -> Any:
    """Return a schema with every ``anyOf`` sorted and plain spaces.

    Versions of msgspec differ in the order, and Python 3.13 takes the indentation off docstrings.
    """
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, dict):
        done = {key: ordered(item) for key, item in value.items()}
        if "anyOf" in done:
            done["anyOf"] = sorted(done["anyOf"], key=str)
        return done
    return [ordered(item) for item in value] if isinstance(value, list) else value


def test_a_real_report_meets_the_schema(report: LatencyReport, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(report.to_json()))


def test_it_says_what_where_and_with_what(report: LatencyReport) -> None:
    said = report.to_dict()
    stage = said["stages"]["image_tower"]
    assert (stage["n"], stage["batch"], stage["warmup"]) == (120, 2, 10)
    assert stage["ms"] == stage["wall_ms"] / 2
    assert [one["p"] for one in stage["percentiles"]] == [50, 90]
    assert len(stage["samples_ms"]) == 120
    assert stage["drift"]["low"] <= stage["drift"]["ratio"] <= stage["drift"]["high"]
    assert said["stages"]["head"]["percentiles"] == []
    assert said["cold_start_ms"] == {"import": 300, "open": 12.5}
    assert said["placement"]["backend"] == "ort"
    assert said["versions"]["onnxruntime"]
    assert said["host"]["fingerprint"]
    assert said["peak_rss_bytes"] == "unavailable" or said["peak_rss_bytes"] > 1 << 20
    (ratio,) = said["ratios"]
    assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert len(ratio["a_samples_ms"]) == 2 * ratio["n"]


def test_it_reads_back_as_it_was(report: LatencyReport) -> None:
    assert LatencyReport.from_json(report.to_json()) == report
    assert LatencyReport.from_dict(report.to_dict()) == report
    again = report.samples("image_tower")
    assert again.batch == 2
    assert again.percentiles()[0].ms == report.stages["image_tower"].percentiles[0].ms


def test_the_table_has_a_line_for_each_stage(report: LatencyReport) -> None:
    lines = report.to_table().splitlines()
    assert lines[0] == "tiny image tower"
    assert lines[1].startswith("ort on cpu, ")
    assert lines[2].split() == ["stage", "ms/item", "p50", "p90", "p99", "batch", "n", "drift"]
    assert [line.split()[0] for line in lines[3:5]] == ["image_tower", "head"]
    assert lines[3].split()[4] == "-"  # 120 samples carry no p99
    assert any(line.startswith("cold start: open 12.5 ms") for line in lines)
    assert any(line.startswith("fp32 / fp32 again: ") for line in lines)


def test_a_stolen_machine_is_said() -> None:
    stolen = LatencySamples(np.ones(30), steal_share=0.2)
    assert (
        "the hypervisor gave 20% of the time to others" in LatencyReport.of("x", {"head": stolen}).to_table()
    )


BROKEN: list[tuple[Any, str]] = [
    (lambda raw: raw.update(kind="other"), "got another document"),
    (lambda raw: raw.update(schema=2), r"got schema 2, expected 1"),
    (lambda raw: raw["stages"]["head"].update(n=0), r"cannot be read.*stages"),
    (lambda raw: raw["stages"]["head"].update(samples_ms=[]), "cannot be read"),
    (lambda raw: raw["stages"]["head"].update(samples_ms=["fast"]), "cannot be read"),
    (lambda raw: raw.update(cold_start_ms={"boot": 3}), "cannot be read"),
    (lambda raw: raw.update(peak_rss_bytes="a lot"), "cannot be read"),
    (lambda raw: raw.pop("subject"), "subject"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN, ids=range(len(BROKEN)))
def test_what_the_schema_refuses_is_one_sentence_here_too(
    report: LatencyReport, schema: dict[str, Any], break_it: Any, message: str
) -> None:
    raw = copy.deepcopy(json.loads(report.to_json()))
    break_it(raw)
    assert not jsonschema.Draft202012Validator(schema).is_valid(raw)
    with pytest.raises(InputError, match=message):
        LatencyReport.from_dict(raw)


def test_what_is_no_json_is_an_error() -> None:
    with pytest.raises(InputError, match="not valid JSON"):
        LatencyReport.from_json("{")
    with pytest.raises(InputError, match="got another document"):
        LatencyReport.from_json("[]")


def test_stages_without_samples_and_unknown_phases_are_an_error() -> None:
    with pytest.raises(InputError, match="stage 'head' has no samples"):
        LatencyReport.of("x", {"head": LatencySamples(np.array([]))})
    with pytest.raises(InputError, match="got the phase 'boot', expected one of"):
        LatencyReport.of("x", {}, cold_start_ms={"boot": 1.0})
