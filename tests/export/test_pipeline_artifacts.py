"""What a pipeline leaves for people and CI, read by readers that nobody here wrote."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.dom.minidom
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from markdown_it import MarkdownIt

from edgeclip.bundle import Bundle
from edgeclip.export.artifacts import PipelineReport, StageOutcome, junit, model_card, summary
from edgeclip.export.gates import Finding, Verdict

NASTY = "a|b <i>&amp;</i> `x` [l](u) *b* \x00\x1b[31m ]]> \udc80 \n end"


def verdict(name: str, status: Any, **changes: Any) -> Verdict:
    said = {"subject": "onnx-int8", "status": status, "got": "4.00 MB", "limit": "at most 3 MB"} | changes
    return Verdict(name, "size", (Finding(**said),))


@pytest.fixture
def report(tiny_bundle_session: Path) -> PipelineReport:
    bundle = Bundle.open(tiny_bundle_session)
    return PipelineReport(
        recipe="cpu",
        recipe_digest="0" * 64,
        created="2026-01-02T03:04:05Z",
        inconclusive="report",
        verdicts=(verdict("good", "passed"), verdict("bad", "failed"), verdict("open", "inconclusive")),
        stages=(StageOutcome("export", "reused", 0.25, "2 variants"),),
        manifest=bundle.manifest,
        bundle={"name": "tiny-colours", "digest": bundle.digest, "size_bytes": 1},
        verify={"variants": {"onnx-int8": {"status": "passed"}}},
        bench={
            "onnx-int8": {
                "stages": {
                    "image_tower": {
                        "batch": 1,
                        "n": 100,
                        "wall_ms": 1.5,
                        "percentiles": [{"p": 50.0, "ms": 1.5, "low_ms": 1.4, "high_ms": 1.6}],
                    }
                }
            }
        },
        not_timed={"onnx-fp32": "it needs a GPU"},
        measured={},
        unmeasured={},
        device_reports=(
            {
                "device": "pi",
                "variant": "onnx-int8",
                "verify": {"status": "passed"},
                "created": "2026-01-01T00:00:00Z",
                "host": {"board": "Raspberry Pi 5"},
            },
        ),
        host={"cpu_model": "x", "machine": "x86_64"},
        versions={"edgeclip": "0.1.0"},
    )


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the cells of each table, as CommonMark with GitHub's tables reads them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    found: list[list[list[str]]] = []
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            children = tokens[place + 1].children or []
            assert {child.type for child in children} <= {"text", "text_special"}, children
            found[-1][-1].append("".join(child.content for child in children))
    return found


# --- summary -----------------------------------------------------------------------------------------------


def test_the_summary_begins_with_the_gates_then_variants_then_the_host(report: PipelineReport) -> None:
    text = summary(report)
    assert text.startswith("# cpu: ❌ failed\n\n| gate |")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## Variants", "## Devices", "## Stages", "## Host and versions"]
    gates, variants, devices, stages, _ = tables(text)
    assert [row[:2] for row in gates[1:]] == [
        ["good", "✅ passed"],
        ["bad", "❌ failed"],
        ["open", "❔ inconclusive"],
    ]
    assert [row[0] for row in variants[1:]] == ["onnx-fp32", "", "onnx-int8", ""]
    int8 = variants[3]
    assert int8[-2:] == ["passed", "1.50 (1.40 to 1.60, n 100)"]
    assert devices[1][:3] == ["pi", "onnx-int8", "passed"]
    assert stages[1] == ["export", "reused", "0.2", "2 variants"]
    assert "onnx-fp32 was not timed: it needs a GPU" in text


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ({"board": "Raspberry Pi 5", "cpu_model": "A76"}, "Raspberry Pi 5"),
        ({"board": "unavailable", "cpu_model": "AMD EPYC"}, "AMD EPYC"),
        ({"board": "unavailable", "cpu_model": "unavailable"}, ""),
    ],
)
def test_a_device_is_called_by_what_is_known_of_it(
    report: PipelineReport, host: dict[str, str], shown: str
) -> None:
    said = replace(report, device_reports=({**report.device_reports[0], "host": host},))
    table = next(table for table in tables(summary(said)) if table[0][0] == "device")
    assert table[-1][4] == shown


def test_sizes_in_the_summary_are_those_on_disk(report: PipelineReport, tiny_bundle_session: Path) -> None:
    variants = tables(summary(report))[1]
    entry = Bundle.open(tiny_bundle_session).manifest.variants["onnx-int8"]
    names = {name for tower in entry.towers.values() for name in tower.files}
    size = sum((tiny_bundle_session / name).stat().st_size for name in names)
    assert variants[3][1] == f"{size / 1e6:.2f}"


def test_whatever_names_and_reasons_hold_the_tables_stay_whole(report: PipelineReport) -> None:
    nasty = replace(report, verdicts=(verdict("n", "failed", subject=NASTY, reason=NASTY),), recipe=NASTY)
    for text in (summary(nasty), model_card(nasty)):
        for table in tables(text):
            assert len({len(row) for row in table}) == 1
    cells = tables(summary(nasty))[0][1]
    assert cells[2].startswith("a|b <i>&amp;</i> `x` [l](u) *b*")
    assert "\x1b" not in summary(nasty)


def test_an_inconclusive_gate_counts_as_asked(report: PipelineReport) -> None:
    only = replace(report, verdicts=(verdict("good", "passed"), verdict("open", "inconclusive")))
    cases = {"report": ("inconclusive", 3), "pass": ("passed", 0), "fail": ("failed", 4)}
    for asked, (status, code) in cases.items():
        said = replace(only, inconclusive=asked)
        assert (said.status, said.exit_code) == (status, code)
    assert "❔ inconclusive, counts as passed" in summary(replace(only, inconclusive="pass"))
    assert replace(report, inconclusive="pass").exit_code == 4


# --- JUnit -------------------------------------------------------------------------------------------------


def outcomes(content: bytes) -> dict[str, str]:
    cases = ElementTree.fromstring(content).iter("testcase")  # noqa: S314 - our own document
    kinds = ("failure", "skipped", "error")
    return {case.attrib["name"]: next((each.tag for each in case if each.tag in kinds), "") for case in cases}


def test_a_gate_is_a_test_case(report: PipelineReport) -> None:
    content = junit(report)
    assert outcomes(content) == {"good": "", "bad": "failure", "open": "skipped"}
    assert outcomes(junit(replace(report, inconclusive="fail")))["open"] == "failure"
    assert outcomes(junit(replace(report, inconclusive="pass")))["open"] == ""
    suite = ElementTree.fromstring(content).find("testsuite")  # noqa: S314
    assert suite is not None
    assert {key: suite.attrib[key] for key in ("tests", "failures", "skipped", "errors")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
    }
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.attrib["message"] == "onnx-int8: got 4.00 MB, expected at most 3 MB"


def test_it_is_xml_whatever_a_reason_holds(report: PipelineReport) -> None:
    nasty = replace(report, recipe=NASTY, verdicts=(verdict(NASTY, "failed", reason=NASTY, subject=NASTY),))
    document = xml.dom.minidom.parseString(junit(nasty))  # noqa: S318
    name = document.getElementsByTagName("testcase")[0].getAttribute("name")
    assert name.startswith("a|b <i>&amp;</i> `x`")
    assert "\x00" not in name


def test_it_has_the_shape_that_pytest_writes(report: PipelineReport, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_open(): pytest.skip('no')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml=r.xml",
        "test_x.py",
    ]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    theirs = ElementTree.parse(tmp_path / "r.xml").getroot()  # noqa: S314
    ours = ElementTree.fromstring(junit(report))  # noqa: S314

    def shape(root: ElementTree.Element) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for parent in root.iter():
            for each in parent:
                found.setdefault(f"{parent.tag}/{each.tag}", set()).update(each.attrib)
        return found

    known, made = shape(theirs), shape(ours)
    assert set(known) <= set(made)
    for path in ("testsuites/testsuite", "testsuite/testcase"):
        assert known[path] == made[path]
    assert set(made) - set(known) == {"testcase/system-out"}


# --- model card --------------------------------------------------------------------------------------------


def test_the_card_says_where_the_model_is_from_and_what_it_is_not(report: PipelineReport) -> None:
    assert report.manifest is not None
    manifest = Bundle.open("default").manifest
    variant = manifest.variants["onnx-int8"]
    missed = msgspec.structs.replace(variant.parity["image"], missed={"top1_agreement": 0.98})
    variant = msgspec.structs.replace(variant, parity={**variant.parity, "image": missed})
    manifest = msgspec.structs.replace(manifest, variants={"onnx-int8": variant})
    text = model_card(replace(report, manifest=manifest))
    facts, parents, variants = tables(text)
    assert ["licence", "Apache-2.0"] in facts
    assert ["all-MiniLM-L6-v2", "text teacher: not shipped", "Apache-2.0"] in parents
    assert variants[1][0] == "onnx-int8"
    assert "- onnx-int8: default limits of parity were set aside for top1\\_agreement" in text


def test_the_report_is_plain_json(report: PipelineReport) -> None:
    said = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (said["schema"], said["kind"], said["status"], said["exit_code"]) == (
        1,
        "pipeline-report",
        "failed",
        4,
    )
    assert [gate["status"] for gate in said["gates"]] == ["passed", "failed", "inconclusive"]
