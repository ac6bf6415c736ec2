"""Options, the choice of a backend, and what the input check does with several inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeclip.runtime
from edgeclip.bundle import Bundle
from edgeclip.errors import BackendUnavailableError, BundleError, ConfigError, InputError
from edgeclip.runtime import Placement, RuntimeOptions, TensorSpec, open_session
from edgeclip.runtime.session import BACKENDS, Backend, OpenSession, parse_device, resolve_backend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, r"threads: got 0, expected a whole number of at least 1"),
        ({"threads": True}, r"threads: got True"),
        ({"threads": 1.5}, r"threads: got 1.5"),
        ({"device": "tpu"}, r"device: got 'tpu', expected 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": "cuda:"}, r"device: got 'cuda:'"),
        ({"device": "cuda:-1"}, r"device: got 'cuda:-1'"),
        ({"device": "cpu:0"}, r"device: got 'cpu:0'"),
        ({"providers": ()}, r"providers: got none"),
        ({"providers": "CPUExecutionProvider"}, r"providers: got 'CPUExecutionProvider', expected a tuple"),
        ({"affinity": ()}, r"affinity: got \(\), expected CPU numbers"),
        ({"affinity": (0, -1)}, r"affinity: got \(0, -1\)"),
        ({"affinity": (0, 1), "threads": 3}, r"affinity: got 2 CPU numbers for 3 threads"),
        ({"allow": frozenset({"anything"})}, r"allow: got 'anything', expected some of 'unsafe-isa'"),
    ],
)
def test_options_that_cannot_be_used_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeOptions(**options)


def test_lists_sets_and_text_paths_are_taken() -> None:
    options = RuntimeOptions(
        providers=["CPUExecutionProvider"],  # type: ignore[arg-type]
        affinity=[0, 1],  # type: ignore[arg-type]
        allow={"unverified"},  # type: ignore[arg-type]
        cache_dir="somewhere",  # type: ignore[arg-type]
    )
    assert options.providers == ("CPUExecutionProvider",)
    assert options.affinity == (0, 1)
    assert options.allow == {"unverified"}
    assert options.cache_dir == Path("somewhere")
    assert hash(options) == hash(replace(options))


def test_an_unknown_backend_lists_those_there_are() -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"backend: got 'onnx', expected 'auto' or one of 'ort'"
    ):
        RuntimeOptions(backend="onnx")


@pytest.mark.parametrize(
    ("device", "parsed"),
    [
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:3", ("cuda", 3)),
        ("gpu", ("gpu", 0)),
        ("gpu:1", ("gpu", 1)),
        ("npu", ("npu", 0)),
        ("auto", ("auto", 0)),
        ("auto:gpu,cpu", ("auto", 0)),
        ("hetero:gpu:1,cpu", ("hetero", 0)),
        ("multi:npu,gpu", ("multi", 0)),
    ],
)
def test_devices_are_split(device: str, parsed: tuple[str, int]) -> None:
    assert parse_device(device) == parsed


@pytest.mark.parametrize(
    "device", ["CPU", "cuda:", "npu:1", "hetero", "auto:", "auto:gpu,", "multi:cuda,cpu"]
)
def test_a_device_that_is_none_is_an_error(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device: got '{device}', expected 'cpu', 'cuda'"):
        parse_device(device)


def test_auto_takes_the_backend_of_the_format() -> None:
    assert resolve_backend("onnx", RuntimeOptions()) == ("ort", "backend ort runs onnx files")
    assert resolve_backend("onnx", RuntimeOptions(backend="ort"))[1] == "backend ort was asked for"


def test_a_backend_that_cannot_run_the_format_says_so() -> None:
    with pytest.raises(BackendUnavailableError, match=r"'ort' runs onnx files, got 'tensorrt'"):
        resolve_backend("tensorrt", RuntimeOptions(backend="ort"))


def test_a_format_nobody_runs_is_an_error() -> None:
    with pytest.raises(BackendUnavailableError, match=r"got a 'coreml' file, expected one of 'onnx'"):
        resolve_backend("coreml", RuntimeOptions())


def test_a_missing_library_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Backend("edgeclip.runtime.ort", "no_such_engine", ("odd",), 'pip install "edgeclip[odd]"')
    monkeypatch.setattr("edgeclip.runtime.session.BACKENDS", {**BACKENDS, "odd": missing})
    expected = r"the package 'no_such_engine' is not installed: run pip install \"edgeclip\[odd\]\""
    with pytest.raises(BackendUnavailableError, match=expected):
        resolve_backend("odd", RuntimeOptions())
    with pytest.raises(BackendUnavailableError, match=f"'odd' cannot be used: {expected}"):
        resolve_backend("odd", RuntimeOptions(backend="odd"))


def test_a_backend_of_a_later_edition_says_so() -> None:
    later = Backend("edgeclip.runtime.no_such_module", "numpy", (), "")
    assert later.unavailable() == "this edgeclip has no such backend yet"


def test_a_bare_model_file_is_opened_by_its_suffix(tiny_bundle_session: Path) -> None:
    model = Bundle.open(tiny_bundle_session).variant("onnx-fp32").tower("image").model
    with open_session(model) as session:
        assert session.chosen.precision == "as stored"
        assert repr(session) == f"<OpenSession {model.name!r}: ort on cpu>"


def test_an_unknown_suffix_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got the suffix '.pt', expected one of '.onnx'"):
        open_session(tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"no.onnx' is not a file"):
        open_session(str(tmp_path / "no.onnx"))


def test_a_tower_that_is_not_what_the_manifest_says_is_refused(tiny_bundle_session: Path) -> None:
    tower = Bundle.open(tiny_bundle_session).variant("onnx-fp32").tower("image")
    other = replace(tower, inputs=tower.outputs)
    with pytest.raises(
        BundleError, match=r"has the inputs image uint8.*manifest says image_embedding float32"
    ):
        open_session(other)


def test_free_sizes_of_one_name_must_agree() -> None:
    session = OpenSession(_TwoInputs(), name="pair")
    row = np.zeros((2, 3), np.float32)
    session.run({"a": row, "b": row})
    with pytest.raises(InputError, match=r"b: got B = 4 where a has B = 2"):
        session.run({"a": row, "b": np.zeros((4, 3), np.float32)})


def test_engines_that_cannot_run_twice_at_once_wait() -> None:
    import threading

    engine = _TwoInputs()
    session = OpenSession(engine, name="pair")
    row = np.zeros((1, 3), np.float32)
    threads = [threading.Thread(target=lambda: session.run({"a": row, "b": row})) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.most_at_once == 1


def test_every_public_name_is_there_and_sorted() -> None:
    names = edgeclip.runtime.__all__
    constants = sorted(name for name in names if name.isupper())
    classes = sorted(name for name in names if name[0].isupper() and not name.isupper())
    functions = sorted(name for name in names if name[0].islower())
    assert names == [*constants, *classes, *functions]
    for name in names:
        assert getattr(edgeclip.runtime, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgeclip.runtime.nothing


class _TwoInputs:
    """An engine that counts how many calls are in it at once."""

    concurrent_runs = False

    def __init__(self) -> None:
        self.inputs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, "float32", ("B", 3)) for name in ("a", "b")
        }
        self.outputs: Mapping[str, TensorSpec] = {"sum": TensorSpec("sum", "float32", ("B", 3))}
        self.chosen = Placement("test", "numpy", "cpu", 1, "fp32", "a test")
        self.at_once = self.most_at_once = 0

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        import time

        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.002)
        self.at_once -= 1
        return {"sum": feeds["a"] + feeds["b"]}

    def close(self) -> None:
        pass
