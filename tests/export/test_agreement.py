"""What is said where a variant disagrees: ways out, less those that were tried."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from edgeclip.export.agreement import _ways_out
from edgeclip.export.variants import parse_variants
from edgeclip.runtime.parity import ParityFailure

CHOICE = {"image": {"target": {"cosine": 0.99, "top1": 0.97}}}


@pytest.mark.parametrize(
    ("variant", "tower", "number", "calibration", "there", "absent"),
    [
        (
            "onnx-int8",
            "image",
            "top1_agreement",
            {},
            ["--calibration-data, --reference, --labels", "--int8-target cosine=0.995", "--finish-int8 120"],
            [],
        ),
        (
            "onnx-int8",
            "image",
            "top1_agreement",
            {"choice": CHOICE},
            ["a higher --int8-target than cosine=0.99,top1=0.97", "--finish-int8 120"],
            ["cosine=0.995"],
        ),
        (
            "openvino-int8",
            "image",
            "cosine_mean",
            {"finishing": {"steps": 8}},
            ["or set the limit on purpose (--limit int8:cosine_mean=…)"],
            ["--finish-int8"],
        ),
        ("onnx-int8", "text", "cosine_mean", {}, ["use another precision, or set"], ["--calibration-data"]),
        ("onnx-fp16", "image", "max_abs", None, ["--limit fp16:max_abs=…"], ["int8"]),
        ("onnx-fp16", "image", "not_finite", None, ["use another precision"], ["--limit", " or "]),
    ],
)
def test_ways_out(
    variant: str, tower: str, number: str, calibration: Any, there: list[str], absent: list[str]
) -> None:
    (spec,) = parse_variants([variant])
    manifest = {"variants": {variant: {"calibration": calibration}}}
    said = _ways_out(spec, tower, ParityFailure(number, 0.5, 0.9, 3), manifest)
    assert [words for words in there if words not in said] == []
    assert [words for words in absent if words in said] == []
