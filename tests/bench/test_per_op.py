"""The operator profile: every product of a file is found in what an engine says, and the times add up."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from edgeclip.bench.feeds import example_feeds
from edgeclip.bench.per_op import OpProfile, op_profile_schema, profile_tower
from edgeclip.bundle import Bundle
from edgeclip.errors import BackendUnavailableError, ConfigError, InputError
from edgeclip.onnx_files import graph_nodes
from edgeclip.runtime import RuntimeOptions, open_session
from edgeclip.runtime.session import model_files

ONE_THREAD = RuntimeOptions(threads=1)
PRODUCTS = ("Conv", "Gemm", "MatMul")


@pytest.fixture(scope="module")
def default_bundle() -> Bundle:
    return Bundle.open("default")


@pytest.fixture(scope="module")
def profile(default_bundle: Bundle) -> OpProfile:
    """The embedded image tower, in int8, on ONNX Runtime."""
    return profile_tower(default_bundle.variant("onnx-int8").tower("image"), options=ONE_THREAD, runs=7)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_nodes_are_those_that_the_onnx_package_reads(default_bundle: Bundle, tower: str) -> None:
    path = default_bundle.variant("onnx-int8").tower(tower).model
    expected = [
        (node.name, node.op_type, tuple(node.input), tuple(node.output))
        for node in onnx.load(path).graph.node
    ]
    assert [tuple(node) for node in graph_nodes(path)] == expected


def test_a_cut_file_has_no_nodes(default_bundle: Bundle, tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(default_bundle.variant("onnx-int8").tower("text").model.read_bytes()[:-100])
    with pytest.raises(ValueError, match="reaches beyond"):
        graph_nodes(cut)
    (tmp_path / "empty.onnx").touch()
    assert graph_nodes(tmp_path / "empty.onnx") == []


def test_every_product_of_the_file_is_one_kernel(default_bundle: Bundle, profile: OpProfile) -> None:
    nodes = graph_nodes(default_bundle.variant("onnx-int8").tower("image").model)
    products = [node.outputs[0] for node in nodes if node.op in PRODUCTS]
    found = [entry.output for entry in profile.ops if entry.op in PRODUCTS]
    assert sorted(found, key=str) == sorted(products)
    # The first ones stay in float: ONNX Runtime runs these on blocked channels, activations fused.
    assert {entry.kernel for entry in profile.ops if entry.op == "Conv"} == {"Conv", "QLinearConv"}


def test_times_add_up(profile: OpProfile) -> None:
    assert all(len(entry.samples_ms) == 7 for entry in profile.ops)
    calls = np.array([entry.samples_ms for entry in profile.ops]).sum(axis=0)
    # Kernels run one after the other in one thread: together they take no longer than their call.
    assert (calls <= np.array(profile.timed_wall_samples_ms)).all()
    assert calls.min() > 0.2 * min(profile.wall_samples_ms)
    assert sum(entry.share for entry in profile.ops) == pytest.approx(1)
    assert sum(profile.by_kernel().values()) == pytest.approx(profile.kernels_ms)
    assert max(profile.by_kernel(), key=profile.by_kernel().__getitem__) == next(iter(profile.by_kernel()))


def test_openvino_names_the_same_products(default_bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    options = RuntimeOptions(backend="openvino", threads=1)
    path = default_bundle.variant("onnx-int8").tower("image").model
    seen = profile_tower(path, options=options, runs=3, warmup=1)
    convolutions = {node.outputs[0] for node in graph_nodes(path) if node.op == "Conv"}
    assert {entry.output for entry in seen.ops if entry.op == "Conv"} == convolutions
    assert seen.placement["backend"] == "openvino"
    assert seen.bundle == {}


def test_openvino_times_every_call_by_itself(default_bundle: Bundle, tmp_path: Path) -> None:
    # OpenVINO's CPU tells means of all calls so far: five of one picture and one of 32 have a mean of 6.2.
    pytest.importorskip("openvino")
    from edgeclip.runtime import ov

    model = model_files(default_bundle.variant("onnx-int8").tower("image").model)
    engine = ov.load_profiled(model, RuntimeOptions(backend="openvino", threads=1), folder=tmp_path)
    for batch in (1, 1, 1, 1, 1, 32):
        engine.run(example_feeds(engine.inputs, batch))
    sums = [sum(each.ms for each in call) for call in engine.kernel_times()]
    assert sums[-1] > 10 * min(sums[1:-1])


def test_runs_are_counted_and_told(default_bundle: Bundle) -> None:
    told: list[int] = []
    tower = default_bundle.variant("onnx-int8").tower("text")
    seen = profile_tower(tower, options=ONE_THREAD, batch=3, runs=4, warmup=2, on_run=told.append)
    assert told == list(range(1, 13))
    assert (seen.batch, seen.runs, seen.warmup) == (3, 4, 2)
    assert (len(seen.wall_samples_ms), len(seen.timed_wall_samples_ms)) == (4, 4)
    assert seen.bundle["digest"] == default_bundle.digest


def test_examples_fit_every_input(default_bundle: Bundle) -> None:
    with open_session(default_bundle.variant("onnx-int8").tower("text"), options=ONE_THREAD) as session:
        feeds = example_feeds(session.inputs, 2)
        assert session.run(feeds)["text_embedding"].shape[0] == 2
        assert all(feeds[name].min() > 0 for name in feeds)


@pytest.mark.parametrize(("runs", "warmup", "batch"), [(0, 1, 1), (1, -1, 1), (1, 0, 0)])
def test_numbers_out_of_range(default_bundle: Bundle, runs: int, warmup: int, batch: int) -> None:
    tower = default_bundle.variant("onnx-int8").tower("text")
    with pytest.raises(ConfigError, match=rf"got {runs} runs, {warmup} warm-up runs and batch {batch},"):
        profile_tower(tower, runs=runs, warmup=warmup, batch=batch)


def test_a_backend_that_times_nothing(default_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.bench.per_op.resolve_backend", lambda form, options: ("eager", ""))
    with pytest.raises(BackendUnavailableError, match="'eager' does not time"):
        profile_tower(default_bundle.variant("onnx-int8").tower("text"))


def test_it_reads_back(profile: OpProfile) -> None:
    assert OpProfile.from_json(profile.to_json()) == profile
    table = profile.to_table(most=3)
    assert "QLinearConv" in table
    assert f"and {len(profile.ops) - 3} more" in table


def test_the_committed_schema_is_the_one_the_code_has(repo: Path, profile: OpProfile) -> None:
    # After a change of edgeclip/bench/per_op.py: python tests/tools/write_op_profile_schema.py
    schema = json.loads((repo / "docs" / "op-profile.schema.json").read_text())
    assert schema == json.loads(json.dumps(op_profile_schema()))
    jsonschema.Draft202012Validator(schema).validate(profile.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "latency-report"}, "expected one of kind 'op-profile'"),
        ({"schema": 2}, "got schema 2, expected 1"),
        ({"ops": []}, "cannot be read"),
        ({"batch": 0}, "cannot be read"),
    ],
)
def test_other_documents_are_refused(profile: OpProfile, change: dict[str, Any], message: str) -> None:
    raw = copy.deepcopy(profile.to_dict())
    raw.update(change)
    with pytest.raises(InputError, match=message):
        OpProfile.from_dict(raw)


def test_no_json_at_all() -> None:
    with pytest.raises(InputError, match="not valid JSON"):
        OpProfile.from_json("{")
