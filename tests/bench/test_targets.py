"""Names of what is timed: they read back, and what cannot be meant is refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeclip.bench.targets import Target, open_target, parse_target
from edgeclip.errors import BackendUnavailableError, ConfigError
from edgeclip.runtime import StageClock


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("my-bundle", Target("my-bundle")),
        ("a,b/c#onnx-int8", Target("a,b/c", "onnx-int8")),
        ("x#y@arm64-dotprod,threads=2,batch=8", Target("x", "y@arm64-dotprod", threads=2, batch=8)),
        ("hf:org/name@main#y,backend=openvino", Target("hf:org/name@main", "y", "openvino")),
        ("a#b#onnx-fp32", Target("a#b", "onnx-fp32")),
        ("x,device=hetero:gpu,cpu,batch=2", Target("x", device="hetero:gpu,cpu", batch=2)),
        ("x,decode=fast,variant=y", Target("x", "y", fast_decode=True)),
        ("x,decode=exact,threads=1", Target("x", threads=1)),
    ],
)
def test_targets_read_and_read_back(text: str, expected: Target) -> None:
    assert parse_target(text) == expected
    assert parse_target(expected.name) == expected


def test_targets_of_one_bundle_have_short_names() -> None:
    target = parse_target("somewhere/my-bundle#onnx-int8,threads=2,decode=fast")
    assert target.name == "somewhere/my-bundle#onnx-int8,threads=2,decode=fast"
    assert target.short_name == "onnx-int8,threads=2,decode=fast"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#onnx-int8", "target '#onnx-int8': got no bundle"),
        ("a#", "target 'a#': got no variant"),
        ("a,colour=red", "got 'colour', expected one of variant, backend, device, threads, batch, decode"),
        ("a,threads=many", "got threads='many', expected a whole number of at least 1"),
        ("a,threads=0", "threads: got 0,"),
        ("a,batch=-2", "batch: got -2,"),
        ("a,batch=1,batch=2", "got 'batch' twice"),
        ("a#b,variant=c", "got 'variant' twice"),
        ("a,decode=quick", "got decode='quick', expected exact or fast"),
        ("a,batch=1,cpu", "got 'cpu' among the settings"),
        ("a,device=tpu", "device: got 'tpu'"),
    ],
)
def test_what_is_no_target(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_target(text)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="backend: got 'tflite'"):
        parse_target("a,backend=tflite")


def test_it_is_opened_as_asked(tiny_bundle_session: Path) -> None:
    clock = StageClock()
    target = parse_target(f"{tiny_bundle_session}#onnx-fp32,threads=1")
    with open_target(target, clock) as classifier:
        assert classifier.choice.variant.name == "onnx-fp32"
        assert classifier.placement.threads == 1
    assert {span.stage for span in clock.spans} == {"open", "compile"}
