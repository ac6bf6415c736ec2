"""The trace: slices nest, lie on one track one after the other, and sum up to what the profile has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeclip.bench.per_op import OpProfile, profile_tower
from edgeclip.bench.trace import to_trace
from edgeclip.bundle import Bundle
from edgeclip.runtime import RuntimeOptions

US = 0.002  # times are rounded to nanoseconds


def profiled(backend: str, *, account: bool = True) -> OpProfile:
    bundle = Bundle.open("default")
    tower = bundle.variant("onnx-int8").tower("image")
    options = RuntimeOptions(backend=backend, threads=1)
    path = tower.model if backend == "openvino" else tower
    return profile_tower(path, options=options, runs=3, warmup=1, account=account)


@pytest.fixture(scope="module")
def profile() -> OpProfile:
    return profiled("ort")


def slices(text: str, process: int = 1) -> list[dict[str, Any]]:
    events = json.loads(text)["traceEvents"]
    return [each for each in events if each["ph"] == "X" and each["pid"] == process]


def check_nesting(found: list[dict[str, Any]]) -> None:
    """Walk slices as a viewer does: each lies wholly inside the innermost one that is open, or behind it."""
    depth = {"call": 0, "stage": 1, "block": 2, "kernel": 3}
    open_slices: list[dict[str, Any]] = []
    last_ts = 0.0
    for each in found:
        assert each["ts"] >= last_ts >= 0
        assert each["dur"] >= 0
        last_ts = each["ts"]
        while open_slices and open_slices[-1]["ts"] + open_slices[-1]["dur"] <= each["ts"] + US:
            if depth[open_slices[-1]["cat"]] < depth[each["cat"]] and not each["dur"]:
                break  # an empty slice at the end of what holds it
            open_slices.pop()
        if open_slices:
            around = open_slices[-1]
            assert depth[around["cat"]] < depth[each["cat"]], (around, each)
            assert each["ts"] + each["dur"] <= around["ts"] + around["dur"] + US, (around, each)
        open_slices.append(each)


def test_slices_nest(profile: OpProfile) -> None:
    found = slices(to_trace({"onnx-int8": profile}))
    assert {each["cat"] for each in found} == {"call", "stage", "block", "kernel"}
    assert found[0]["cat"] == "call"
    check_nesting(found)


def test_times_sum_up(profile: OpProfile) -> None:
    found = slices(to_trace({"onnx-int8": profile}))
    kernels = [each for each in found if each["cat"] == "kernel"]
    assert len(kernels) == len(profile.timeline)
    assert sum(each["dur"] for each in kernels) == pytest.approx(
        1e3 * sum(each.ms for each in profile.timeline), abs=US * len(kernels)
    )
    (call,) = [each for each in found if each["cat"] == "call"]
    assert sum(each["dur"] for each in kernels) <= call["dur"] + US * len(kernels)
    assert call["args"]["operations"] == profile.operations
    # What the engine calls a call holds all of its kernels, and takes no longer than the call from outside.
    assert call["ts"] + call["dur"] <= 1e3 * max(profile.timed_wall_samples_ms)


def test_onnx_runtime_tells_true_starts(profile: OpProfile) -> None:
    assert profile.clock == "engine"
    said = json.loads(to_trace({"onnx-int8": profile}))
    assert said["otherData"]["profiles"]["onnx-int8"]["clock"].startswith("start and length")
    assert profile.timeline[0].start_ms > 0
    gaps = [
        later.start_ms - each.start_ms - each.ms
        for each, later in zip(profile.timeline, profile.timeline[1:], strict=False)
    ]
    assert min(gaps) > -1e-6
    assert max(gaps) > 0


def test_openvino_is_laid_end_to_end_and_says_so() -> None:
    pytest.importorskip("openvino")
    profile = profiled("openvino")
    text = to_trace({"onnx-int8": profile})
    assert profile.clock == "end-to-end"
    assert "end to end" in json.loads(text)["otherData"]["profiles"]["onnx-int8"]["clock"]
    found = slices(text)
    check_nesting(found)
    kernels = [each for each in found if each["cat"] == "kernel"]
    assert found[0]["dur"] == pytest.approx(sum(each["dur"] for each in kernels), abs=US * len(kernels))


def test_profiles_are_processes_with_names(profile: OpProfile) -> None:
    said = json.loads(to_trace({"a": profile, "b": profile}))
    assert said["displayTimeUnit"] == "ms"
    names = {
        each["pid"]: each["args"]["name"] for each in said["traceEvents"] if each["name"] == "process_name"
    }
    assert names == {1: "a image tower", 2: "b image tower"}
    assert len(slices(to_trace({"a": profile, "b": profile}), 2)) == len(slices(to_trace({"a": profile})))
    assert all({"ph", "pid", "name"} <= each.keys() for each in said["traceEvents"])


def test_a_profile_without_account_has_kernels_alone() -> None:
    found = slices(to_trace({"plain": profiled("ort", account=False)}))
    assert {each["cat"] for each in found} == {"call", "kernel"}
    check_nesting(found)
