"""Cold starts: what fresh processes tell, and what becomes of those that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_bundle import colour_picture

from edgeclip.bench import cold
from edgeclip.bench.cold import ColdResult, ColdTarget, measure_cold
from edgeclip.bench.report import COLD_PHASES, FIRST_LABEL, MemorySample
from edgeclip.bench.targets import Target
from edgeclip.bench.workload import Workload, picture_files
from edgeclip.bundle import Bundle
from edgeclip.cache import HostCache
from edgeclip.classify import ZeroShotClassifier
from edgeclip.errors import BackendError, BundleError, InputError
from edgeclip.label_sets import LabelSet, Templates
from edgeclip.runtime.choose import PROFILE_NAME
from edgeclip.runtime.host import UNAVAILABLE, Host


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    Image.fromarray(colour_picture("red")).save(tmp_path / "red.png")
    return Workload(picture_files(tmp_path / "red.png"), labels=LabelSet.of(["red", "dark blue"]))


@pytest.fixture
def target(tiny_bundle_session: Path) -> ColdTarget:
    bundle = Bundle.open(tiny_bundle_session)
    return ColdTarget(Target(str(tiny_bundle_session), "onnx-fp32", threads=1), bundle, "onnx")


@pytest.mark.slow
def test_fresh_processes_tell_their_phases_and_their_memory(target: ColdTarget, workload: Workload) -> None:
    told: list[tuple[int, int]] = []
    (found,) = measure_cold([target], workload, runs=2, on_run=lambda done, of: told.append((done, of)))
    assert told == [(done, 7) for done in range(1, 8)]  # one fills the cache; two, two, and two are watched
    starts = found.cold_start()
    assert set(starts) == {"hit", "miss"}
    for phases in starts.values():
        assert tuple(phases) == COLD_PHASES
        for run in range(2):
            parts = [phases[name].samples_ms[run] for name in COLD_PHASES if name != FIRST_LABEL]
            assert 0 < sum(parts) <= phases[FIRST_LABEL].samples_ms[run]
            assert all(part >= 0 for part in parts)
    memory = found.memory_entry()
    assert memory is not None
    assert len(memory.samples) == 2
    if sys.platform == "linux":
        assert isinstance(memory.peak_rss_bytes, int)
        assert isinstance(memory.peak_pss_bytes, int)
        assert 10 << 20 < memory.peak_pss_bytes <= memory.peak_rss_bytes


@pytest.mark.slow
def test_labels_are_cached_for_hits_alone(target: ColdTarget, workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    starter = cold._Starter(tmp_path / "own", workload)
    runs = [starter.start(target, kind, 0) for kind in ("hit", "hit", "miss")]
    assert [told["text_tower_runs"] for told in runs] == [1, 0, 1]
    assert {told["label"] for told in runs} == {"red"}


@pytest.mark.slow
def test_banks_and_the_bundles_own_labels_are_offered(
    target: ColdTarget, workload: Workload, tmp_path: Path
) -> None:
    with ZeroShotClassifier.open(target.bundle) as classifier:
        classifier.set_labels(["green", "red"])
        bank = classifier.bank
    for number, labels in enumerate((None, bank)):
        (tmp_path / f"{number}").mkdir()
        starter = cold._Starter(tmp_path / f"{number}", Workload(workload.pictures, labels=labels))
        told = starter.start(target, "miss", 0)
        assert (told["label"], told["text_tower_runs"]) == ("red", 0)


@pytest.mark.slow
def test_what_a_process_refuses_is_raised_here(tiny_bundle: Path, workload: Workload) -> None:
    bundle = Bundle.open(tiny_bundle)
    model = bundle.variant("onnx-fp32").tower("image").model
    model.write_bytes(model.read_bytes()[:-1])
    target = ColdTarget(Target(str(tiny_bundle), "onnx-fp32"), bundle, "onnx")
    with pytest.raises(BundleError, match=model.name):
        measure_cold([target], workload, runs=1)


# --- without processes ------------------------------------------------------------------------------------


def test_errors_keep_their_kind_and_their_words() -> None:
    error = cold._translated({"error": "it is blue", "kind": "InputError"})
    assert type(error) is InputError
    assert str(error) == "it is blue"
    assert type(cold._translated({"error": "x", "kind": "MissingExtraError"})).__name__ == "MissingExtraError"
    assert type(cold._translated({"error": "x", "kind": "NoSuch"})) is BackendError


def test_a_process_that_says_nothing_is_an_error(
    target: ColdTarget, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "_PROGRAM", "import sys; print('it rains', file=sys.stderr); sys.exit(3)")
    said = r"cold start of 'onnx-fp32,threads=1': the process ended with code 3: it rains\. Run"
    with pytest.raises(BackendError, match=said):
        measure_cold([target], workload, runs=1)


def test_a_process_that_hangs_is_an_error(
    target: ColdTarget, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "_PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(cold, "_LIMIT_S", 0.5)
    with pytest.raises(BackendError, match=r"cold start of 'onnx-fp32': no label after 0\.5 s"):
        measure_cold([target], workload, runs=1)


def test_jobs_come_in_mixed_order_and_engines_have_no_misses(
    target: ColdTarget, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[tuple[int, str]] = []

    def start(self: Any, target: ColdTarget, kind: str, place: int) -> dict[str, Any]:
        jobs.append((place, kind))
        return {"phases": {"import": 1.0}, "rss_bytes": 5, "pss_bytes": None}

    monkeypatch.setattr(cold._Starter, "start", start)
    engine = ColdTarget(target.target, target.bundle, "tensorrt")
    usual, compiled = measure_cold([target, engine], workload, runs=4)
    assert jobs[:2] == [(0, "hit"), (1, "hit")]
    counts = {job: jobs[2:].count(job) for job in jobs[2:]}
    assert counts == {(0, "hit"): 4, (0, "miss"): 4, (0, "memory"): 3, (1, "hit"): 4, (1, "memory"): 3}
    assert jobs[2:] != sorted(jobs[2:])
    assert len(usual.phases["miss"]) == 4
    assert compiled.missing == {"cold_start.miss": "it opens only what was compiled before"}
    assert "miss" not in compiled.cold_start()
    entry = compiled.memory_entry()
    assert entry is not None
    assert (entry.peak_rss_bytes, entry.peak_pss_bytes) == (5, UNAVAILABLE)


def _refused(*_: object, **__: object) -> None:
    raise OSError("links are for administrators")


def test_caches_are_empty_but_for_what_is_no_cache(
    target: ColdTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, host = target.bundle.digest, Host.here().fingerprint()
    kept = HostCache.open(digest, host)
    kept.put(PROFILE_NAME, b"{}")
    kept.put("golden-stamp.json", b"{}")
    HostCache.open("compiled").put("x.engine", b"engine")
    fresh = HostCache.open(digest, host, root=cold._Starter._new_cache(tmp_path / "a", target))
    assert fresh.get(PROFILE_NAME) == b"{}"
    assert fresh.get("golden-stamp.json") is None
    assert HostCache.open("compiled", root=tmp_path / "a").get("x.engine") is None
    engine = ColdTarget(target.target, target.bundle, "tensorrt")
    cold._Starter._new_cache(tmp_path / "b", engine)
    assert HostCache.open("compiled", root=tmp_path / "b").get("x.engine") == b"engine"
    monkeypatch.setattr(Path, "symlink_to", _refused)
    cold._Starter._new_cache(tmp_path / "c", engine)
    assert not (tmp_path / "c" / "compiled").is_symlink()
    assert HostCache.open("compiled", root=tmp_path / "c").get("x.engine") == b"engine"


def test_nobody_watched_is_no_memory() -> None:
    assert ColdResult().memory_entry() is None
    assert ColdResult().cold_start() == {}
    several = ColdResult(memory=[MemorySample(rss_bytes=size, pss_bytes=1) for size in (9, 3, 4)])
    entry = several.memory_entry()
    assert entry is not None
    assert entry.peak_rss_bytes == 4


def test_relative_module_paths_hold_in_the_folder_of_the_process(
    target: ColdTarget, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["beside", "/somewhere"]))
    monkeypatch.setattr(
        cold, "_PROGRAM", "import os, sys; sys.exit(os.environ['PYTHONPATH'] + ' in ' + os.getcwd())"
    )
    with pytest.raises(BackendError, match=f"{tmp_path / 'beside'}{os.pathsep}/somewhere in ") as caught:
        measure_cold([target], workload, runs=1)
    assert f"in {tmp_path}" not in str(caught.value)


def test_the_child_imports_little_before_it_is_timed() -> None:
    program = "import edgeclip.bench.cold_child, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = set(json.loads(done.stdout))
    assert not found & {"numpy", "msgspec", "PIL", "onnxruntime", "click", "subprocess"}


def test_templates_travel_with_the_labels(workload: Workload, tmp_path: Path) -> None:
    templates = Templates.of(["a {}.", "one {}."])
    starter = cold._Starter(
        tmp_path, Workload(workload.pictures, labels=workload.labels, templates=templates)
    )
    assert starter._templates == ["a {}.", "one {}."]
    assert starter._labels is not None
    assert json.loads(starter._labels.read_text()) == ["red", "dark blue"]
