"""``edgeclip bench --per-op``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Command

from edgeclip.bench.per_op import OpProfile


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_a_table_says_where_the_time_goes(run: Command, tiny_bundle: Path) -> None:
    result = run("bench", "--per-op", tiny_bundle, "--runs", "3", "--threads", "1", "--most", "2")
    assert result.code == 0
    assert "ort on cpu, 1 thread(s), batch 1, medians of 3 runs" in result.out
    assert "more" in result.out


def test_json_holds_a_profile_of_each_variant(run: Command, tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    result = run(
        "bench", "--per-op", "--variant", "onnx-int8", "--tower", "text", "--runs", "2", "--json", "-o", out
    )
    assert result.code == 0
    document = json.loads(result.out)
    assert document == json.loads(out.read_text(encoding="utf-8"))
    (profile,) = [OpProfile.from_dict(each) for each in document["profiles"]]
    assert profile.runs == 2
    assert profile.bundle["variant"] == "onnx-int8"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "--per-op"),
        (("--per-op", "--variant", "onnx-fp64"), 1, "onnx-fp64"),
        (("--per-op", "-o", "not-there/x.json"), 1, "there is no directory 'not-there'"),
        (("--per-op", "not-a-bundle"), 1, "not-a-bundle"),
        (("--per-op", "--tower", "audio"), 2, "audio"),
    ],
)
def test_bad_input_is_one_sentence(run: Command, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run("bench", *arguments)
    assert result.code == code
    assert message in result.err
